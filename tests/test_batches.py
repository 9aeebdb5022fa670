"""Batches: vmap, jit and differentiation in any order give the same, for all that can be built.

JAX has a defect there, which `perturbax.tracing._derivative_rules` works around: see the top of
that file.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px
from helpers import assert_trees_close

NUM = 4
KEYS = jax.random.split(jax.random.key(0, impl="threefry2x32"), NUM)
SCORES = np.asarray(jax.random.uniform(jax.random.key(1), (NUM, 3), minval=0.3, maxval=1.5))
WEIGHTS = np.asarray(jax.random.normal(jax.random.key(2), (NUM, 3)))
SIGMAS = np.float32([0.3, 0.5, 0.7, 0.9])
ARGUMENTS = KEYS, SCORES, SIGMAS, WEIGHTS
one_hot = px.solvers.one_hot_argmax
# It takes half of the time to compile. "fun" and "argmax" have what is taken by default, which are
# orthogonal directions here, "fun of degree 2" nets.
INDEPENDENT = {"sampler": px.Independent(), "degree": 0}


def argmax(sigma, **options):
    return px.make_perturbed_argmax(one_hot, 8, sigma, px.Normal(), **options)


def weighed(make):
    """A nonlinear function of a layer's result and of weights."""
    return lambda key, x, sigma, w: jnp.sum(make(sigma)(key, x) * w) ** 2


def expected_cost(key, x, sigma, w):
    layer = px.make_perturbed_distribution(one_hot, 8, sigma, px.Normal(), sampler=px.Independent())
    found = layer(key, x)
    return found.expectation(lambda y, w: jnp.sum(y * w), w) ** 2


def young(key, x, sigma, w):
    loss = px.make_fenchel_young_loss(
        one_hot, num_samples=8, sigma=sigma, noise=px.Normal(), **INDEPENDENT
    )
    return loss(key, x, w)


def with_argument(key, x, sigma, w):
    fun = px.make_perturbed_fun(lambda y, w: one_hot(y) * w, 8, sigma, **INDEPENDENT)
    return jnp.sum(fun(key, x, w)) ** 2


def with_aux(key, x, sigma, w):
    fun = px.make_perturbed_fun(lambda y: (one_hot(y), y), 8, sigma, has_aux=True, **INDEPENDENT)
    return jnp.sum(fun(key, x)[0] * w) ** 2


FUNCTIONS = {
    "fun": weighed(lambda s: px.make_perturbed_fun(one_hot, 8, s, px.Normal())),
    "fun of degree 2": weighed(lambda s: px.make_perturbed_fun(one_hot, 64, s, degree=2)),
    "constant fun": weighed(
        lambda s: px.make_perturbed_fun(lambda y: jnp.ones(3), 8, s, **INDEPENDENT)
    ),
    "fun with an argument": with_argument,
    "fun with aux": with_aux,
    "argmax": weighed(argmax),
    "argmax, not symmetric": weighed(lambda s: argmax(s, symmetrize=False, **INDEPENDENT)),
    "argmax, multiplicative": weighed(lambda s: argmax(s, multiplicative=True, **INDEPENDENT)),
    "max": lambda key, x, sigma, w: (
        px.make_perturbed_max(one_hot, 8, sigma, px.Normal(), **INDEPENDENT)(key, x * w) ** 2
    ),
    "Fenchel-Young": young,
    "distribution": expected_cost,
    "straight-through": weighed(
        lambda s: px.make_straight_through_fun(
            jnp.round, 8, s, px.Normal(), sampler=px.Independent()
        )
    ),
    "I-MLE": weighed(
        lambda s: px.make_implicit_mle(
            one_hot, 8, s, px.Normal(), lam=1.0, sampler=px.Independent()
        )
    ),
}
# Which of key, x, sigma and weights are batched.
MASKS = [(1, 1, 1, 1), (1, 1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0)]


def cases():
    """One function with every mask; the others with the first and with one of the rest in turn."""
    for i, name in enumerate(FUNCTIONS):
        for j, mask in enumerate(MASKS):
            chosen = name == "fun" or j in (0, 1 + i % (len(MASKS) - 1))
            yield pytest.param(name, mask, marks=() if chosen else pytest.mark.full)


@functools.cache
def gradient(name):
    """Of a single element of a batch, in all that has a derivative."""
    wrt = (1,) if name == "I-MLE" else (1, 2, 3)
    return wrt, jax.jit(jax.grad(FUNCTIONS[name], wrt))


@pytest.mark.parametrize(("name", "mask"), [*cases()])
def test_the_gradient_of_a_batch_is_the_batch_of_gradients(name, mask):
    wrt, single = gradient(name)
    axes = tuple(0 if batched else None for batched in mask)
    args = [v if batched else v[0] for v, batched in zip(ARGUMENTS, mask, strict=True)]
    each = [v if batched else [v] * NUM for v, batched in zip(args, mask, strict=True)]
    parts = jax.tree.map(lambda *v: np.stack(v), *map(single, *each))
    if mask == MASKS[0]:
        mapped = jax.jit(jax.vmap(single))(*args)
        for got, want in zip(mapped, parts, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    def total(*args):
        return jnp.sum(jax.vmap(FUNCTIONS[name], axes)(*args))

    expected = [p if mask[i] else np.sum(p, 0) for i, p in zip(wrt, parts, strict=True)]
    for got, want in zip(jax.jit(jax.grad(total, wrt))(*args), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    if name != "constant fun":
        assert np.abs(expected[0]).max() > 1e-3


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("I-MLE", "fun of degree 2")])
def test_the_hessian_of_a_batch_is_the_batch_of_hessians(name):
    def one(key, x, w):
        return FUNCTIONS[name](key, x, 0.5, w)

    keys, x, w = KEYS[:2], SCORES[:2], WEIGHTS[:2]
    total = jax.hessian(lambda x: jnp.sum(jax.vmap(one)(keys, x, w)))
    each = jax.vmap(jax.hessian(one, argnums=1))
    whole, parts = map(np.asarray, jax.jit(lambda x: (total(x), each(keys, x, w)))(x))
    for i in range(2):
        np.testing.assert_allclose(whole[i, :, i], parts[i], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(whole[i, :, 1 - i], 0.0, atol=1e-6)


def test_large_batches_are_gone_through_in_turn(monkeypatch, everything):
    """In parts of the batch that fit into the cache, and where not even one does, in chunks.

    The first of the two sizes once took what was traced for whole batches.
    """
    independent = {"sampler": px.Independent()}
    cases = [
        ({}, 6),
        ({**independent, "degree": 1}, 2),
        (INDEPENDENT, 5),
        ({**independent, "use_baseline": False}, 6),
    ]
    if everything:
        cases += [({}, 2), ({}, 5), ({"degree": 0}, 5), ({"use_baseline": False}, 6)]

    def estimates(options, size):
        x = np.linspace(-1.0, 1.0, size * 40, dtype=np.float32).reshape(size, 40)
        keys = jax.random.split(jax.random.key(3), size)
        fun = px.make_perturbed_fun(lambda y: jnp.sum(jnp.abs(y)), 300, 0.5, **options)
        one = jax.value_and_grad(fun, argnums=1)
        each, all_pairs = jax.vmap(one), jax.vmap(jax.vmap(one, (0, None)), (None, 0))
        if options not in ({}, INDEPENDENT) and not everything:  # they compile as long again
            return jax.jit(each)(keys, x)
        return jax.jit(lambda x: (each(keys, x), all_pairs(keys, x[:2])))(x)

    whole = [estimates(*case) for case in cases]
    for chunk in (300 * 40 * 2, 300 * 10):
        monkeypatch.setitem(px.execution._plan.CHUNK, "cpu", chunk)
        monkeypatch.setattr(px.execution._chunks, "_BATCH", chunk)
        jax.clear_caches()
        for case, want in zip(cases, whole, strict=True):
            assert_trees_close(estimates(*case), want, rtol=2e-4, atol=2e-4)
    jax.clear_caches()
