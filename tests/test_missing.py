"""missing="drop": samples whose value has a NaN are left out, as if they had not been drawn."""

import operator
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px
from helpers import assert_biased, assert_trees_close, assert_unbiased
from perturbax.estimator import _surrogate

KEY = jax.random.key(5, impl="threefry2x32")
X = jnp.array([0.3, -0.2, 0.1])
SIGMA = 0.4
NORMAL = px.Normal()


def bumps(y):
    return jnp.sum(jnp.floor(2 * y)) + y[0] * y[1]


def fails(fun, limit=0.3):
    """fun, which fails in a leaf of its value where the last coordinate is large."""

    def failing(y):
        return {"a": fun(y), "b": jnp.where(y[-1] > limit, jnp.nan, y)}

    return failing


def smooth(fun, num_samples=22, missing="drop", **options):
    settings = {"noise": NORMAL, "missing": missing, **options}
    return px.make_perturbed_fun(fun, num_samples, SIGMA, **settings)


@pytest.mark.parametrize(
    ("num_samples", "block", "degree"), [(3, 1, 0), (20, 1, 1), (8, 4, 1), (60, 30, 2)]
)
def test_a_sample_that_is_left_alone_is_not_subtracted_from_itself(num_samples, block, degree):
    """Nothing else is known of the function then. Its gradient was 0, with an error of 0."""
    options = {"num_samples": num_samples, "sampler": px.Independent(block), "degree": degree}

    def value_and_points(key):
        return smooth(lambda y: (jnp.sum(y), y), has_aux=True, **options)(key, X)

    keys = jax.random.split(KEY, 400)
    drawn = np.asarray(jax.jit(jax.vmap(value_and_points))(keys)[1], np.float64)
    # The key of which the first sample is the one with the largest y[-1].
    chosen = np.argmax(np.argmax(drawn[:, :, -1], axis=1) == 0)
    key, y = keys[chosen], drawn[chosen]
    limit = np.float32(np.sort(y[:, -1])[-2:].mean())

    def fun(y):
        return jnp.where(y[-1] > limit, 10 + y[0], jnp.nan)

    g = smooth(fun, **options)
    expected = (10 + y[0, 0]) * (y[0] - np.asarray(X)) / SIGMA**2
    both = jax.jit(lambda x: (jax.grad(g, argnums=1)(key, x), px.estimate(g, key, x).gradient))
    for gradient in both(X):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 6])
def test_what_is_left_is_estimated_as_if_the_rest_had_not_been_drawn(size):
    """Value, gradient and standard errors by sums in float64, over samples that did not fail."""
    options = {"sampler": px.Independent(block=size), "degree": 0}
    by_formula = smooth(lambda y: (fails(bumps)(y), y), has_aux=True, **options)
    g = smooth(fails(bumps), **options)
    _, y = by_formula(KEY, X)
    y = np.asarray(y, np.float64)
    f = np.asarray(jax.jit(jax.vmap(bumps))(y.astype(np.float32)), np.float64)
    z = (y - np.asarray(X)) / SIGMA
    present, number = y[:, -1] <= np.float32(0.3), 22
    left = present.sum()
    assert 5 < left < number
    parts, shares = [], []
    for start in range(0, number, size):
        own = np.isin(np.arange(number), np.arange(start, start + size))
        here, baseline = present & own, f[present & ~own].mean()
        parts.append((f[here] - baseline) @ z[here] / SIGMA / left)
        shares.append(here.sum() / left)
    parts, shares = np.array(parts), np.array(shares)
    gradient = parts.sum(axis=0)

    @jax.jit
    def results(x):
        found = px.estimate(g, KEY, x)
        backwards = jax.jacrev(g, argnums=1)(KEY, x)["a"]
        forwards = jax.jacfwd(lambda x: by_formula(KEY, x)[0]["a"])(x)
        return found, g(KEY, x)["a"], (found.gradient["a"], backwards, forwards)

    found, value, jacobians = results(X)
    for jacobian in jacobians:
        np.testing.assert_allclose(jacobian, gradient, rtol=1e-4)
    np.testing.assert_allclose(value, f[present].mean(), rtol=1e-5)
    groups = (shares > 0).sum()
    spread = ((parts - shares[:, None] * gradient) ** 2).sum(axis=0) / (1 - (shares**2).sum())
    np.testing.assert_allclose(found.gradient_error["a"], np.sqrt(spread), rtol=1e-4)
    assert found.missing == number - left
    assert found.empty_groups == len(shares) - groups


@pytest.mark.parametrize(
    ("degree", "sampler"),
    [(None, px.Independent()), (0, px.Sobol(3)), (1, px.Sobol(4)), (2, px.Sobol(2))],
    ids=str,
)
def test_nothing_changes_where_nothing_is_missing(degree, sampler):
    options = {"use_baseline": degree is not None, "degree": degree, "sampler": sampler}

    def results(missing):
        g = smooth(bumps, 41, missing, **options)

        @jax.jit
        def both(x):
            found = px.estimate(g, KEY, x)
            return found, found.interval().gradient, jax.value_and_grad(g, argnums=1)(KEY, x)

        found, interval, value = both(X)
        assert (found.missing is None) == (missing == "propagate")
        return value, found.gradient_error, interval

    for got, want in zip(*map(jax.tree.leaves, map(results, ("drop", "propagate"))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_changes_where_the_last_group_is_smaller():
    """A fit on fewer samples than another was doubted as if all had as few, but for `drop`."""
    keys = jax.random.split(KEY, 200)

    def gradients(missing):
        g = smooth(bumps, 13, missing, degree=2, sampler=px.Antithetic())
        return jax.jit(jax.vmap(jax.grad(g, argnums=1), (0, None)))(keys, X)

    np.testing.assert_allclose(gradients("drop"), gradients("propagate"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch_size", [None, 16])
def test_a_fit_of_what_is_left_is_exact_for_its_polynomials(batch_size):
    """One in four is missing, all on one side, and so is the whole last group."""
    options = {"degree": 2, "sampler": px.Sobol(4), "batch_size": batch_size}

    def quadratic(y):
        return 3.0 + y @ jnp.array([1.0, -2.0, 0.5]) + y[0] ** 2 - y[1] * y[2]

    g = smooth(lambda y: jnp.where(y[2] > 0.35, jnp.nan, quadratic(y)), 160, **options)
    gradient, hessian = jax.jit(lambda x: (jax.grad(g, 1)(KEY, x), jax.hessian(g, 1)(KEY, x)))(X)
    one, two = jax.jit(lambda x: (jax.grad(quadratic)(x), jax.hessian(quadratic)(x)))(X)
    np.testing.assert_allclose(gradient, one, atol=2e-3)
    np.testing.assert_allclose(hessian, two, atol=2e-2)


def test_a_group_with_too_few_left_for_a_fit_predicts_a_constant():
    """Each of two groups is fitted on the other: it is that one's number that counts."""
    draw, slope = np.random.default_rng(3), np.array([1.0, -2.0, 0.5])
    z = draw.normal(size=(2, 20, 3))
    phi = np.concatenate([np.ones((2, 1, 20)), z.swapaxes(1, 2)], axis=1).astype(np.float32)
    f = (3.0 + z @ slope).astype(np.float32)[..., None]
    present = np.stack([np.arange(20) < 17, np.arange(20) < 3]).astype(np.float32)
    left = phi * present[:, None], f * present[..., None], present

    @jax.jit
    def fitted(phi, f, weight):
        # Those of the other group are 3 of the first, 17 of the second.
        equations = _surrogate.normal_equations(phi, f, weight)
        return _surrogate.fit(equations, 20, jnp.array([3, 17]), 3)

    first, second = fitted(*left)
    np.testing.assert_allclose(first[:, 0], [f[1, :3].mean(), 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(second[:, 0], [3.0, *slope], atol=2e-3)


def estimator(degree, missing="drop", penalty=jnp.nan):
    """Of y1^2 y2, from evaluations that fail on a quarter of a coordinate that it does not see."""

    def fun(y):
        return jnp.where(y[2] > 0.37, penalty, y[0] ** 2 * y[1])

    g = smooth(fun, 32, missing, degree=degree, sampler=px.Independent(block=4))

    def estimate(key, x):
        value, gradient = jax.value_and_grad(g, argnums=1)(key, x)
        return {"value": value, "gradient": gradient[:2]}

    return estimate


# E of (x1 + s z1)^2 (x2 + s z2), and its derivatives.
EXACT = {
    "value": np.float64((0.3**2 + SIGMA**2) * -0.2),
    "gradient": np.array([2 * 0.3 * -0.2, 0.3**2 + SIGMA**2]),
}
SETTINGS = {
    "args": (X,),
    "seed": 71,
    "num_keys": 2**12,
    "scale": {"value": 1.0, "gradient": 1.0},
}


@pytest.mark.parametrize("degree", [0, 1])
def test_no_bias_where_failing_has_nothing_to_do_with_the_function(degree):
    assert_unbiased(estimator(degree), EXACT, promise={"value": 0.01, "gradient": 0.04}, **SETTINGS)


def test_values_of_zero_in_place_of_missing_ones_would_be_noticed():
    """What comes of it if the samples that are missing count."""
    assert_biased(estimator(0, "propagate", 0.0), EXACT, quantities=("gradient",), **SETTINGS)


@pytest.mark.parametrize("jit", [False, True])
def test_nothing_left_is_nan_and_told(jit):
    g = smooth(lambda y: jnp.sum(y) * jnp.nan, 10)
    derive = jax.value_and_grad(g, argnums=1)

    def run():
        found = (jax.jit(derive) if jit else derive)(KEY, X)
        jax.effects_barrier()
        return found

    with pytest.warns(UserWarning, match="all 10 samples are missing"):
        found = run()
    assert all(np.isnan(v).all() for v in found)


def test_a_value_without_numbers_is_not_missing():
    """There was a warning that all samples are missing."""
    assert smooth(lambda y: y[:0], 10)(KEY, X).shape == (0,)
    jax.effects_barrier()


def test_intervals_count_the_groups_that_are_left():
    """Of six samples four are missing: two groups have one degree of freedom."""
    independent = {"sampler": px.Independent(), "degree": 0}
    seen = jnp.sort(smooth(lambda y: (y[0], y[0]), 6, has_aux=True, **independent)(KEY, X)[1])
    fun = lambda y: jnp.where(y[0] > (seen[1] + seen[2]) / 2, jnp.nan, y[1])  # noqa: E731
    found = px.estimate(smooth(fun, 6, **independent), KEY, X)
    assert (found.missing, found.empty_groups, found.degrees_of_freedom) == (4, 4, 5)
    low, high = jax.jit(lambda found: found.interval(0.9))(found).value
    np.testing.assert_allclose((high - low) / 2 / found.value_error, 6.3138, rtol=1e-4)


@pytest.mark.parametrize("sampler", [px.Independent(), px.Sobol(3)], ids=str)
def test_one_group_that_is_left_tells_no_error(sampler):
    """Its errors were 0, so that diagnose found an estimate from one of 16 samples perfect."""
    options = {"sampler": sampler, "degree": 0}
    seen = jnp.sort(smooth(lambda y: (y[0], y[0]), 9, has_aux=True, **options)(KEY, X)[1])
    fun = lambda y: jnp.where(y[0] < (seen[7] + seen[8]) / 2, jnp.nan, y)  # noqa: E731
    found = px.estimate(smooth(fun, 9, **options), KEY, X)
    assert np.isfinite(found.value).all()
    assert found.missing == 8
    assert np.isnan(found.value_error).all()
    assert np.isnan(found.gradient_error).all()
    assert "\n0 degrees of freedom, 8 samples left out" in str(found)


def test_intervals_of_a_batch_are_those_of_each():
    """With as many estimates as coordinates, their widths went to the coordinates."""
    options = {"sampler": px.Independent(), "degree": 0}
    g = smooth(lambda y, edge: jnp.where(y[0] > edge, jnp.nan, jnp.sum(y)), 8, **options)
    keys, edges = jax.random.split(KEY, 3), jnp.array([2.0, 0.5, -0.2])
    found = jax.vmap(lambda key, edge: px.estimate(g, key, X, edge))(keys, edges)
    assert len(set(found.empty_groups.tolist())) == 3
    least, most = (7 - found.empty_groups).min(), (7 - found.empty_groups).max()
    assert f"\n{least} to {most} degrees of freedom" in str(found)
    together = found.interval().gradient
    one_by_one = [
        jax.tree.map(operator.itemgetter(i), found).interval().gradient for i in range(len(keys))
    ]
    expected = jax.tree.map(lambda *ends: jnp.stack(ends), *one_by_one)
    assert_trees_close(together, expected, rtol=1e-5)


def test_a_nan_is_propagated_by_default():
    assert np.isnan(smooth(fails(bumps), missing="propagate")(KEY, X)["b"]).all()


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="missing must be 'propagate' or 'drop', got 'ignore'"):
        smooth(bumps, missing="ignore")


def test_strict_promotion():
    """A number was multiplied with counts of samples."""
    with jax.numpy_dtype_promotion("strict"):
        g = smooth(fails(bumps), 64, sampler=px.Sobol(4), degree=1)
        found = jax.eval_shape(lambda x: px.estimate(g, KEY, x).interval().gradient, X)
    assert {v.dtype for v in jax.tree.leaves(found)} == {np.dtype("float32")}


def test_a_batch_warns_once():
    """JAX made as many callbacks as there were estimates, which took it seconds for a hundred."""
    nowhere = smooth(lambda y: jnp.where(y[0] > 5, y[0], jnp.nan))
    somewhere = smooth(bumps)
    points = jnp.stack([X] * 3 + [X + 10])

    def batch():
        values = jax.vmap(jax.vmap(nowhere, (None, 0)), (None, 0))(KEY, jnp.stack([points] * 2))
        jax.effects_barrier()
        return values

    with pytest.warns(UserWarning, match="all 22 samples are missing") as caught:
        values = batch()
    assert len(caught) == 1
    np.testing.assert_array_equal(jnp.isnan(values), [[True, True, True, False]] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.vmap(jax.grad(somewhere, argnums=1), (None, 0))(KEY, points)
        jax.effects_barrier()
