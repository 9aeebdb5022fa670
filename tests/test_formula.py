"""The formula against sums in plain numpy, and every faster way against the formula, key by key.

A function that returns aux is estimated by the formula as JAX differentiates it, whatever is
asked for; without aux, by the fastest way there is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px
from helpers import twice
from perturbax.estimator import _formula

KEY = jax.random.key(7, impl="threefry2x32")
X = jnp.array([0.3, -0.2, 0.1])
SCALES = {
    "number": jnp.float32(0.4),
    "coordinates": jnp.array([0.2, 0.3, 0.4]),
    "matrix": jnp.array([[0.3, 0.0, 0.0], [0.1, 0.2, 0.0], [-0.1, 0.1, 0.4]]),
}


def bumps(y):
    return jnp.sum(jnp.floor(2 * y)) + y[0] * y[1]


def leaves(y):
    """Two leaves, the second of whole numbers."""
    return {"a": jnp.stack([bumps(y), jnp.max(y)]), "b": jnp.sum(y > 0)}


def many(y):
    return jnp.cumsum(jnp.tile(jnp.maximum(y, 0.0), 4))


def of_complex(y):
    return jax.lax.complex(bumps(y), jnp.max(y))


def smooth(fun, sigma, aux=False, num_samples=22, **options):
    def with_aux(y):
        return fun(y), y

    g = px.make_perturbed_fun(with_aux if aux else fun, num_samples, sigma, has_aux=aux, **options)
    return lambda x: g(KEY, x)


def assert_close(actual, expected, rtol):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.max(np.abs(e), initial=1e-3)
        np.testing.assert_allclose(a, e, rtol=0, atol=rtol * scale)


# Pairs of all options that decide the way: one pass, sums of groups, chunks, the formula itself.
CASES = [
    (bumps, 0, px.Independent(), "number", {}),
    (leaves, 0, px.Independent(), "coordinates", {"num_samples": 41}),
    (leaves, 0, px.Sobol(3), "number", {"batch_size": 8}),
    (bumps, 0, px.Independent(block=4), "matrix", {}),
    (leaves, 1, px.Sobol(4), "coordinates", {"noise": px.Normal()}),
    (bumps, 1, px.Antithetic(), "matrix", {"batch_size": 6}),
    (leaves, 2, px.OrthogonalArray(3), "number", {"num_samples": 60, "noise": px.Normal()}),
    (bumps, 2, px.Sobol(2), "coordinates", {"num_samples": 45, "batch_size": 23}),
    (leaves, None, px.Orthogonal(), "number", {}),
    (many, 0, px.Independent(), "number", {"batch_size": 9}),
    (of_complex, 1, px.Sobol(4), "coordinates", {}),
]


def ids(value):
    return value.__name__ if callable(value) else str(value)


@pytest.mark.parametrize(("fun", "degree", "sampler", "scale", "options"), CASES, ids=ids)
def test_the_way_taken_gives_what_the_formula_gives(fun, degree, sampler, scale, options):
    options = {**options, "sampler": sampler, "use_baseline": degree is not None, "degree": degree}

    def first(x, sigma):
        return smooth(fun, sigma, **options)(x)

    def by_formula(x, sigma):
        return smooth(fun, sigma, aux=True, **options)(x)[0]

    @jax.jit
    def both(x, sigma):
        taken = jax.jacfwd(first, (0, 1))(x, sigma), first(x, sigma)
        return taken, jax.jacfwd(twice(by_formula), (0, 1), has_aux=True)(x, sigma)

    taken, expected = both(X, SCALES[scale])
    assert_close(taken, expected, 2e-5)


@pytest.mark.parametrize("case", [1, 6])
def test_second_derivatives_of_a_faster_way_are_those_of_the_formula(case):
    fun, degree, sampler, scale, options = CASES[case]
    options = {**options, "sampler": sampler, "degree": degree}
    sigma = SCALES[scale]

    def total(aux):
        def one(x):
            out = smooth(fun, sigma, aux=aux, **options)(x)
            return sum(map(jnp.sum, jax.tree.leaves(out[0] if aux else out)))

        return jax.jit(jax.hessian(one))(X)

    assert_close(total(False), total(True), 1e-4)


def explicit_groups(y, f, size, sigma):
    """What each group adds to the gradient, in float64, for Normal noise and degree 0."""
    z = (np.asarray(y, np.float64) - np.asarray(X)) / sigma
    f, num = np.asarray(f, np.float64), len(f)
    found = []
    for start in range(0, num, size):
        own = np.arange(start, min(start + size, num))
        baseline = np.delete(f, own).mean()
        found.append((f[own] - baseline) @ z[own] / sigma / num)
    return np.array(found)


def test_gradient_and_standard_errors_are_those_of_the_groups():
    """Of 22 samples in groups of 6, the last of which has 4."""
    sigma, options = 0.4, {"sampler": px.Independent(block=6), "degree": 0, "noise": px.Normal()}
    _, y = smooth(bumps, sigma, aux=True, **options)(X)
    parts = explicit_groups(y, jax.vmap(bumps)(y), 6, sigma)
    found = px.estimate(px.make_perturbed_fun(bumps, 22, sigma, **options), KEY, X)
    np.testing.assert_allclose(found.gradient, parts.sum(axis=0), rtol=1e-4)
    shares = np.array([6, 6, 6, 4])[:, None] / 22
    spread = ((parts - shares * parts.sum(axis=0)) ** 2).sum(axis=0) / (1 - (shares**2).sum())
    np.testing.assert_allclose(found.gradient_error, np.sqrt(spread), rtol=1e-4)


@pytest.mark.parametrize("size", [1, 4, 22])
def test_baselines_can_be_subtracted_from_the_weights(size):
    rng = np.random.default_rng(0)
    e, f = rng.normal(size=22).astype(np.float32), rng.normal(size=22)
    weights = _formula.weights_less_baselines(jnp.asarray(e), size)
    group = np.arange(22) // size
    b = [f[group != g].mean() if (group != g).any() else 0.0 for g in group]
    np.testing.assert_allclose(np.sum(weights * f), np.sum(e * (f - b)), rtol=1e-5)
