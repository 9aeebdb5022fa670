"""What holds for every pytree: structures, shapes and dtypes, and no NaN out of nowhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import perturbax as px

KEY = jax.random.key(0, impl="threefry2x32")

# Every example that runs is compiled: few of them, the same each time.
few = functools.partial(
    settings, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck
)

FLOATING = ["float32", "float16", "bfloat16"]
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0, 1), (1, 3, 1)])


def arrays(dtypes):
    kinds = st.sampled_from([jnp.dtype(dtype) for dtype in dtypes])
    return st.builds(np.zeros, SHAPES, kinds)


def trees(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=2),
            st.tuples(inner, inner),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        ),
        max_leaves=4,
    )


@st.composite
def points(draw):
    """A pytree with a floating leaf somewhere, and other things."""
    rest = st.one_of(
        arrays([*FLOATING, "int32", "bool", "uint8"]), st.none(), st.sampled_from([1.5, 3, True])
    )
    return draw(st.permutations([draw(arrays(FLOATING)), draw(trees(rest)), draw(trees(rest))]))


def is_floating(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def bounded(x):
    """Finite whatever x is; of all kinds of results."""
    leaves = [jnp.asarray(v) for v in jax.tree.leaves(x)]
    floating = [v for v in leaves if is_floating(v)]
    total = sum((jnp.sum(jnp.tanh(v).astype(jnp.float32)) for v in floating), jnp.float32(0.0))
    return {
        "like x": jax.tree.map(lambda v: jnp.tanh(v) if is_floating(v) else v, x),
        "total": total,
        "positive": [v > 0 for v in floating],
        "half": total.astype(jnp.float16),
        "count": sum((jnp.sum(v > 0) for v in floating), jnp.zeros((), jnp.int32)),
        "nothing": (None, ()),
    }


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def dtypes(tree):
    return jax.tree.map(lambda v: str(jnp.result_type(v)), tree)


SETTINGS = st.fixed_dictionaries(
    {
        "noise": st.sampled_from([px.Normal(), px.Gumbel()]),
        "num_samples": st.integers(1, 9),
        "batch_size": st.sampled_from([None, 1, 2, 100]),
        "use_baseline": st.booleans(),
    }
)


@few(max_examples=30)
@given(x=points(), arguments=SETTINGS)
def test_results_are_like_those_of_fun(x, arguments):
    g = px.make_perturbed_fun(bounded, **arguments)
    actual, expected = jax.eval_shape(g, KEY, x), jax.eval_shape(bounded, x)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert shapes(actual) == shapes(expected)
    assert set(jax.tree.leaves(dtypes(actual))) == {"float32"}


@few(max_examples=12)
@given(x=points(), arguments=SETTINGS)
def test_gradients_are_like_x(x, arguments):
    g = px.make_perturbed_fun(lambda x: bounded(x)["total"], **arguments)
    gradient = jax.eval_shape(jax.grad(lambda x: g(KEY, x), allow_int=True), x)
    assert jax.tree.structure(gradient) == jax.tree.structure(x)
    assert shapes(gradient) == shapes(x)
    for slope, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(x), strict=True):
        kind = jnp.result_type(leaf) if is_floating(leaf) else jax.dtypes.float0
        assert slope.dtype == kind


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=repr)
@few(max_examples=8)
@given(x=points(), seed=st.integers(0, 2**31 - 1), use_baseline=st.booleans())
def test_no_nan_from_a_finite_function(noise, x, seed, use_baseline):
    """Whatever finite or masked x is given, with scales from tiny to huge."""
    numbers = np.random.default_rng(seed)

    def fill(leaf):
        if not is_floating(leaf):
            return leaf
        largest = float(jnp.finfo(jnp.result_type(leaf)).max)
        choices = [0.0, -0.0, 1.0, -2.5, 1e-7, largest, -largest, -np.inf]
        return np.asarray(numbers.choice(choices, np.shape(leaf)), jnp.result_type(leaf))

    def value(x, sigma):
        def fun(x):
            out = bounded(x)
            return out["total"] + out["count"]

        return px.make_perturbed_fun(fun, 5, sigma, noise, use_baseline)(KEY, x)

    run = jax.jit(jax.value_and_grad(value, argnums=(0, 1), allow_int=True))
    x = jax.tree.map(fill, x)
    for sigma in (1e-3, 1.0, 1e3):
        for leaf in jax.tree.leaves(run(x, np.float32(sigma))):
            if leaf.dtype != jax.dtypes.float0:
                assert np.isfinite(np.asarray(leaf, np.float32)).all(), (x, sigma)
