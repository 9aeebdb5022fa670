"""Surrogates carried across steps: exact where they can be, unbiased whatever the state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import perturbax as px
from helpers import assert_biased, assert_trees_close, assert_unbiased, enable_x64
from perturbax.carried import _carry, _features, _regression

X = jnp.array([0.3, -0.2, 0.1])
best = jax.jit(_carry._best)
SIGMA = 0.5
NUM_SAMPLES = 8


def bumpy(x):
    """Something smooth and something that jumps, whose smoothed version is known."""
    return jnp.sum(x**2) + jnp.sum(jnp.where(x > 0, 1.0, 0.0))


def exact_of_bumpy(x, sigma=SIGMA):
    x = np.asarray(x, np.float64)
    value = np.sum(x**2 + sigma**2 + norm.cdf(x / sigma))
    return {"value": value, "gradient": 2 * x + norm.pdf(x / sigma) / sigma}


INDEPENDENT = px.Independent()  # the quickest to compile


def smoothed(fun=bumpy, num_samples=NUM_SAMPLES, noise=px.Normal(), sampler=INDEPENDENT):
    return px.make_perturbed_fun(fun, num_samples, SIGMA, noise, sampler=sampler)


@functools.cache
def trained(noise, sampler):
    """A carried function, and its state after thirty steps that wander about."""
    carried = px.carry(smoothed(noise=noise, sampler=sampler), memory=64)

    def step(state, key):
        x = X + 0.2 * jax.random.normal(jax.random.fold_in(key, 1), X.shape)
        (value, _), state = carried.value_and_grad(state, key, x)
        return state, value

    keys = jax.random.split(jax.random.key(1), 30)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))(carried.init(X))
    return carried, state


def after_steps(carried, x, seed, num_steps, *args):
    """The last of some estimates at one point, and the state after them."""

    def step(state, key):
        found, state = carried.value_and_grad(state, key, x, *args)
        return state, found

    @jax.jit
    def run(state, keys):
        state, found = jax.lax.scan(step, state, keys)
        return jax.tree.map(lambda v: v[-1], found), state

    return run(carried.init(x), jax.random.split(jax.random.key(seed), num_steps))


def estimator(carried):
    def estimate(key, state):
        (value, gradient), _ = carried.value_and_grad(state, key, X)
        return {"value": value, "gradient": gradient}

    return estimate


# --- The regression


@functools.partial(jax.jit, static_argnums=1)
def fit_of(points, law):
    """A fit that has seen something: two batches of values of a function that is not smooth."""
    sigma = jnp.full(points.shape[1], 0.8)
    fit = _regression.nothing(6, sigma, law)
    values = jnp.sum(jnp.floor(points), axis=1)
    for rows in (slice(0, 6), slice(6, 12)):
        args = points[rows], values[rows], jnp.ones(6), 6, points[rows][0] / 4
        fit = _regression.renew(fit, *args, sigma, law)
    return fit


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=str)
def test_coefficients_solve_the_regression(noise):
    draw, law = np.random.default_rng(0), _features.law_of(noise)
    points, values = draw.normal(size=(12, 3)), draw.normal(size=12)
    counted = np.ones(12)
    counted[[2, 7]] = 0
    values[2] = 1e6
    with enable_x64(True):

        @jax.jit
        def fit(*drawn):
            empty = _regression.nothing(12, jnp.full(3, 2.0), law)
            return _regression.renew(empty, *drawn, 12, jnp.full(3, 0.1), jnp.full(3, 2.0), law)

        found = fit(points, values, counted)
        u = (points - 0.1) / 2.0
        phi = np.asarray(jax.jit(_features.features, static_argnums=1)(u, law))
        gram = phi @ phi.T
        if isinstance(noise, px.Normal):
            apart = np.sum((u[:, None] - u[None]) ** 2, axis=2)
            gram = gram + 1.5 * np.exp(-apart / 6)
    kept = counted > 0
    rest = values[kept] - values[kept].mean()
    for level, coefficients in zip(_regression.NOISE_LEVELS, found.coefficients, strict=True):
        exact = np.linalg.solve(gram[np.ix_(kept, kept)] + 3 * level * np.eye(10), rest)
        assert_trees_close(coefficients[kept], exact, atol=1e-6)
        assert not np.any(coefficients[~kept])
    assert_trees_close(
        found.weights, np.asarray(found.coefficients)[:, kept] @ phi[kept], rtol=1e-9
    )


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel(), px.Logistic(), px.Laplace()], ids=str)
def test_the_mean_of_a_prediction_is_exact(noise):
    """By quadrature in two coordinates."""
    draw, law = np.random.default_rng(1), _features.law_of(noise)
    z, step = np.linspace(-30, 30, 601, retstep=True)
    chance = np.exp(np.asarray(noise.log_prob(z), np.float64))
    if isinstance(noise, px.Laplace):  # the rule of trapezoids is exact for smooth densities only
        z, weights = np.polynomial.laguerre.laggauss(40)
        z, chance, step = np.concatenate([z, -z]), np.concatenate([weights, weights]) / 2, 1
    chance = chance / (chance.sum() * step) * step
    near = chance > 1e-13
    z, chance = z[near], chance[near]
    x, sigma = np.array([0.4, -0.7]), np.array([0.5, 1.3])
    grid = np.stack(np.meshgrid(z, z, indexing="ij"), -1).reshape(-1, 2)
    with enable_x64(True):
        fit = fit_of(jnp.asarray(draw.normal(size=(12, 2))), law)
        at = jnp.asarray(x + sigma * grid)
        predicted = jax.jit(_regression.predict, static_argnums=2)(fit, at, law)
        exact = np.asarray(predicted) @ np.outer(chance, chance).ravel()
        found = jax.jit(_regression.expect, static_argnums=3)(fit, x, sigma, law)
        assert np.abs(exact).min() > 0.03
        assert_trees_close(found, exact, atol=1e-7)


def test_what_was_absorbed_is_the_same_sum_around_any_centre():
    draw, law = np.random.default_rng(2), _features.law_of(px.Normal())
    move = jax.jit(_features.moved, static_argnums=3)
    features = jax.jit(_features.features, static_argnums=1)
    with enable_x64(True):
        weights = draw.normal(size=(2, 3 * _features.basis(3, law).size))
        u, shift = draw.normal(size=(5, 3)), draw.normal(size=3)
        moved = np.asarray(move(weights, shift, np.ones(3), law))
        change = np.asarray(features(u, law)) @ weights.T
        change -= np.asarray(features(u - shift, law)) @ moved.T
        assert_trees_close(change, np.broadcast_to(change[:1], change.shape), atol=1e-10)
        # In other units what is periodic is forgotten; the rest is as it was.
        first = np.where(np.arange(weights.shape[1]) < 6, weights, 0)
        moved = np.asarray(move(weights, shift, np.full(3, 3.0), law))
        assert not np.any(moved[:, 6:])
        change = np.asarray(features(u, law)) @ first.T
        change -= np.asarray(features((u - shift) / 3, law)) @ moved.T
        assert_trees_close(change, np.broadcast_to(change[:1], change.shape), atol=1e-10)


# --- Right


def test_what_points_said_of_single_coordinates_stays_when_they_leave():
    """A fit whose points have all made room predicts what it did, but for a constant."""
    draw, law = np.random.default_rng(4), _features.law_of(px.Gumbel())
    with enable_x64(True):
        before = fit_of(jnp.asarray(draw.normal(size=(12, 2))), law)
        none = jnp.zeros((6, 2)), jnp.zeros(6), jnp.zeros(6)
        middle, sigma = before.centre + 0.3, before.scale
        after = jax.jit(_regression.renew, static_argnums=(4, 7))(
            before, *none, 6, middle, sigma, law
        )
        assert not np.any(after.coefficients)
        y = jnp.asarray(draw.normal(size=(50, 2)))
        first, second = (
            np.asarray(jax.jit(_regression.predict, static_argnums=2)(fit, y, law))
            for fit in (before, after)
        )
    assert np.std(first, axis=1).min() > 0.1
    gone = first - second
    assert_trees_close(gone, np.broadcast_to(gone[:, :1], gone.shape), atol=1e-9)


def test_without_a_past_it_is_the_perturbed_function():
    g = smoothed(num_samples=40)
    carried = px.carry(g)
    key = jax.random.key(3)
    (found, _), expected = jax.jit(
        lambda x: (
            carried.value_and_grad(carried.init(x), key, x),
            jax.value_and_grad(g, argnums=1)(key, x),
        )
    )(X)
    assert_trees_close(found, expected, rtol=1e-5)


SAMPLERS = [
    (px.Normal(), px.Independent()),
    # What is learnt knows no sampler; what it knows of laws has an exact test above.
    pytest.param(px.Normal(), px.Antithetic(), marks=pytest.mark.full),
    (px.Normal(), px.Orthogonal()),
    (px.Normal(), px.Sobol()),
    pytest.param(px.Normal(), px.OrthogonalArray(), marks=pytest.mark.full),
    (px.Gumbel(), px.Independent()),
    pytest.param(px.Logistic(), px.Independent(), marks=pytest.mark.full),
]


@pytest.mark.parametrize(("noise", "sampler"), SAMPLERS, ids=str)
def test_unbiased_after_thirty_steps(noise, sampler):
    carried, state = trained(noise, sampler)
    # It learnt something: otherwise this would be another test of make_perturbed_fun.
    assert float(best(state)[1]) > 0.5
    x = np.asarray(X, np.float64)
    exact = exact_of_bumpy(X)
    if not isinstance(noise, px.Normal):
        z, step = np.linspace(-12, 60, 200_001, retstep=True)
        density = np.exp(np.asarray(noise.log_prob(z)))
        density /= density.sum() * step
        at = (-x / SIGMA - z[0]) / step
        slopes = density[np.round(at).astype(int)] / SIGMA
        first, second = noise.mean, noise.variance + noise.mean**2
        chance = [density[z > edge].sum() * step for edge in -x / SIGMA]
        exact = {
            "value": np.sum(x**2 + 2 * x * SIGMA * first + SIGMA**2 * second) + sum(chance),
            "gradient": 2 * (x + SIGMA * first) + slopes,
        }
    assert_unbiased(
        estimator(carried),
        exact,
        args=(state,),
        seed=4,
        # What is learnt under logistic noise, and so the variance, depends on the release of JAX.
        num_keys=2**13 if isinstance(noise, px.Logistic) else 2**11,
        promise={"value": 0.01, "gradient": 0.05},
    )


def test_unbiased_whatever_the_state():
    """Garbage predicts nothing, and costs variance; it is no bias."""
    carried, state = trained(*SAMPLERS[0])
    draw = np.random.default_rng(5)
    hostile = jax.tree.map(lambda v: np.float32(v + 0.06 * draw.normal(size=v.shape)), state)
    ones = np.ones(3, np.float32)
    hostile = hostile._replace(
        fit=hostile.fit._replace(scale=0.7 * ones), variance=ones, covariance=ones
    )
    assert_unbiased(
        estimator(carried),
        exact_of_bumpy(X),
        args=(hostile,),
        seed=6,
        num_keys=9 * 2**10,
        promise={"value": 0.01, "gradient": 0.05},
    )


def test_a_state_tells_shapes():
    """It printed hundreds of lines of numbers."""
    state = px.carry(px.make_perturbed_fun(jnp.sum, 8), memory=64).init(np.zeros(3))
    told = repr(state)
    assert told.startswith("CarriedState(origin=(3,), points=(64, 3), values=(64,), ")
    assert "fit.centre=(3,)" in told
    assert "\n" not in told


def test_no_coordinates():
    """A step is made with a constant, as by the perturbed function."""
    carried = px.carry(px.make_perturbed_fun(lambda x: 2.0 + jnp.sum(x), 4, noise=px.Normal()))
    step = jax.jit(carried.value_and_grad)
    state = carried.init(jnp.zeros(0))
    for key in jax.random.split(jax.random.key(0)):
        (value, gradient), state = step(state, key, jnp.zeros(0))
        assert value == 2
        assert gradient.shape == (0,)


def test_a_state_that_is_not_a_number_gives_none():
    carried, state = trained(*SAMPLERS[0])
    fit = state.fit._replace(coefficients=np.full_like(state.fit.coefficients, np.nan))
    estimate = jax.jit(carried.value_and_grad)
    (value, gradient), _ = estimate(state._replace(fit=fit), jax.random.key(7), X)
    assert np.isnan(value)
    assert np.isnan(gradient).all()


def test_mutant_that_learns_before_it_predicts_is_caught():
    """A prediction made of this step's own evaluations takes from the estimate what it fits."""
    carried, _ = trained(*SAMPLERS[0])

    def early(key, state):
        _, after = carried.value_and_grad(state, key, X)
        after = after._replace(variance=jnp.ones(3), covariance=jnp.ones(3), error=jnp.arange(3.0))
        return estimator(carried)(key, after)

    forgetful = carried.init(X)
    assert_biased(early, exact_of_bumpy(X), args=(forgetful,), seed=8, num_keys=512)


def test_mutant_that_weighs_the_past_by_importance_is_caught():
    """The point of a step depends on the samples of the step before, so these have another law."""

    def reuse(key, _):
        z = jax.random.normal(key, (NUM_SAMPLES, 3))
        y = X + SIGMA * z
        values = jax.vmap(bumpy)(y)
        slope = (values - values.mean()) @ z / (NUM_SAMPLES - 1) / SIGMA
        x = X - 0.6 * slope
        # The samples of this step, weighted for the point of the next.
        weight = jnp.exp(jnp.sum(z**2 - ((y - x) / SIGMA) ** 2, axis=1) / 2)
        # At every point the mean weight is 1, if samples have the law that they claim.
        return {"value": jnp.mean(weight)}

    assert_biased(reuse, {"value": np.ones(())}, args=(None,), seed=9, num_keys=16_384)


# --- Precise


def gradients_at(carried, state, g, keys):
    """Those of the carried function and those of the perturbed one alone, one a key."""

    @jax.jit
    @jax.vmap
    def both(key):
        (_, found), _ = carried.value_and_grad(state, key, X)
        return found, jax.grad(g, argnums=1)(key, X)

    return both(keys)


def test_what_is_linear_is_known_after_some_steps():
    """The gradient of a linear function is exact, as far as the regression has converged."""
    slope = jnp.array([1.0, -2.0, 3.0])
    g = smoothed(lambda x: slope @ x)
    carried = px.carry(g, memory=128)
    _, state = after_steps(carried, X, 10, 20)
    found, alone = gradients_at(carried, state, g, jax.random.split(jax.random.key(11), 64))
    error, alone = (np.sqrt(np.mean((v - slope) ** 2)) for v in (found, alone))
    assert error < alone / 15


def test_what_cannot_be_predicted_costs_next_to_nothing():
    """Products of signs of all coordinates: the share of the prediction goes to nothing."""
    g = smoothed(lambda x: jnp.prod(jnp.sign(jnp.sin(40 * x))), num_samples=16)
    carried = px.carry(g)
    _, state = after_steps(carried, X, 12, 40)
    found, alone = gradients_at(carried, state, g, jax.random.split(jax.random.key(13), 1024))
    assert np.var(found, axis=0).sum() < 1.1 * np.var(alone, axis=0).sum()


def test_a_point_that_travels_far_loses_nothing():
    """What old evaluations left once grew from step to step, up to gradients of 1e13."""
    x, heading = np.zeros(10, np.float32), np.random.default_rng(30).normal(size=10)
    g = smoothed(lambda x: jnp.sum(jnp.sign(x)) + jnp.median(x), num_samples=16)
    carried = px.carry(g)

    def step(state, key):
        place = x + 0.3 * SIGMA * state[1] * heading
        (_, found), after = carried.value_and_grad(state[0], key, place)
        return (after, state[1] + 1), (found, jax.grad(g, argnums=1)(key, place))

    keys = jax.random.split(jax.random.key(31), 100)
    start = carried.init(x), 0
    _, (found, alone) = jax.jit(lambda s: jax.lax.scan(step, s, keys))(start)
    assert np.abs(found).max() < 1.5 * np.abs(alone).max()


# --- Usable


def test_scans_vmaps_and_takes_trees():
    def fun(x, shift, *, times):
        return times * jnp.sum(jnp.floor(x["a"] + shift)) + jnp.sum(x["b"]), x["count"]

    g = px.make_perturbed_fun(
        fun, 6, {"a": 0.3, "b": np.array([0.1, 0.2]), "count": 0.1}, has_aux=True
    )
    carried = px.carry(g, memory=20)
    x = {"a": np.float16(0.5), "b": np.zeros(2, np.float32), "count": np.arange(2)}

    def run(key):
        def step(state, key):
            (value, gradient), state = carried.value_and_grad(state, key, x, 0.25, times=2.0)
            return state, (value, gradient["b"])

        return jax.lax.scan(step, carried.init(x), jax.random.split(key, 4))

    keys = jax.random.split(jax.random.key(14), 2)
    state, ((value, aux), slope) = jax.jit(jax.vmap(run))(keys)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(carried.init, x))
    assert value.shape == (2, 4)
    assert aux.shape == (2, 4, 6, 2)
    assert slope.shape == (2, 4, 2)
    assert np.isfinite(slope).all()
    one, _ = jax.jit(run)(keys[1])
    second = jax.tree.map(lambda v: np.asarray(v)[1], state)
    assert_trees_close(second, one, rtol=1e-3, atol=1e-3)


def test_values_that_are_not_finite_are_not_learnt():
    """Nor those of which a sum is not."""
    g = smoothed(lambda x, penalty: jnp.where(x[0] > 0.6, penalty, jnp.sum(x)))
    carried = px.carry(g, memory=16)
    # One program for all penalties.
    penalties = np.float32([np.nan, np.inf, np.finfo(np.float32).max])
    _, states = jax.vmap(lambda penalty: after_steps(carried, X, 15, 3, penalty))(penalties)
    for i, penalty in enumerate(penalties):
        state = jax.tree.map(lambda v, i=i: np.asarray(v)[i], states)
        assert 0 < state.counted.sum() < 16, penalty
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(state)), penalty


def test_penalties_whose_squares_overflow_are_learnt():
    """Where fun was 1e19, a state once was NaN, and value and gradient from then on."""
    size = np.float32(2.0**90)
    carried = px.carry(smoothed(lambda x, size: size * bumpy(x)))
    found = jax.vmap(lambda size: after_steps(carried, X, 6, 3, size))(np.array([1, size]))
    estimates, state = jax.tree.map(lambda v: np.asarray(v)[0], found)
    large, large_state = jax.tree.map(lambda v: np.asarray(v)[1], found)
    assert_trees_close(large, jax.tree.map(lambda v: size * v, estimates), rtol=1e-5)
    assert_trees_close(large_state.error, state.error, rtol=1e-4)


def test_a_step_may_write_on_its_state():
    carried = px.carry(smoothed())
    step = jax.jit(carried.value_and_grad, donate_argnums=0)
    (value, _), _ = step(carried.init(X), jax.random.key(0), X)
    assert np.isfinite(value)
    assert not X.is_deleted()


def test_a_mask_is_no_obstacle():
    """An entry of x that is infinite stays there: its noise has no part in the prediction's mean.

    It once had, which shifted values.
    """
    g = smoothed(lambda x: jnp.sum(jnp.where(x > 0, 1.0, 0.0)), noise=px.Gumbel())
    carried = px.carry(g, memory=64)
    x = np.float32([0.5, -np.inf, 0.1])
    _, state = after_steps(carried, x, 18, 12)
    assert float(best(state)[1]) > 0.5
    z = -np.array([0.5, 0.1]) / SIGMA
    beyond, slope = -np.expm1(-np.exp(-z)), np.exp(-z - np.exp(-z)) / SIGMA

    def estimate(key, state):
        (value, gradient), _ = carried.value_and_grad(state, key, x)
        return {"value": value, "gradient": gradient}

    exact = {"value": beyond.sum(), "gradient": np.array([slope[0], 0, slope[1]])}
    promise = {"value": 0.01, "gradient": 0.05}
    assert_unbiased(estimate, exact, args=(state,), seed=19, num_keys=4096, promise=promise)


def test_unbiased_where_sigma_changes():
    """What is periodic in the old unit is forgotten, all else is told in the new one."""
    _, state = trained(*SAMPLERS[0])
    sigma = 2.5 * SIGMA
    carried = px.carry(px.make_perturbed_fun(bumpy, NUM_SAMPLES, sigma, px.Normal()), memory=64)

    def twice(key, state):
        first, second = jax.random.split(key)
        _, state = carried.value_and_grad(state, first, X)
        (value, gradient), _ = carried.value_and_grad(state, second, X)
        return {"value": value, "gradient": gradient}

    exact, promise = exact_of_bumpy(X, sigma), {"value": 0.01, "gradient": 0.05}
    assert_unbiased(twice, exact, args=(state,), seed=20, num_keys=2048, promise=promise)


@pytest.mark.filterwarnings("ignore:sigma is below the spacing")
def test_a_jump_leaves_the_perturbed_function_as_it_is():
    """Far away the prediction is not used, and squares of the distance do not reach the state."""
    _, state = trained(*SAMPLERS[0])
    x, key = np.float32(X + np.float32(1e25)), jax.random.key(21)
    plain = smoothed(lambda x: jnp.sum(jnp.where(x > 1e25, 1.0, 2.0)))
    carried = px.carry(plain, memory=64)
    step, alone = jax.jit(carried.value_and_grad), jax.jit(jax.value_and_grad(plain, argnums=1))
    for at, close in ((x, {"rtol": 1e-5}), (X, {"atol": 1e-5})):
        found, state = step(state, key, at)
        assert_trees_close(found, alone(key, at), **close)
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(state))


def test_a_plateau_tells_nothing():
    carried = px.carry(smoothed(lambda x: jnp.sum(x > 9.0)))
    (value, gradient), state = after_steps(carried, X, 16, 3)
    assert value == 0
    assert not np.any(gradient)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(state))


def test_on_a_plateau_a_prediction_loses_its_share():
    """It once kept it while values were all the same, and told of slopes where there were none."""
    carried = px.carry(smoothed(lambda x, times: times * jnp.sum(x > 0.1)), memory=32)
    step = jax.jit(carried.value_and_grad)
    state, shares = carried.init(X), []
    for times, keys in zip((1.0, 0.0), jax.random.split(jax.random.key(22), (2, 10)), strict=True):
        for key in keys:
            _, state = step(state, key, X, times)
        shares.append(float(best(state)[1]))
    assert shares[0] > 0.5
    assert shares[1] < 0.2


def test_unbiased_where_sigma_is_below_the_spacing_of_numbers():
    """q was taken at the rounded points, its mean at others: off by 36 standard errors."""
    far, sigma, spacing = jnp.full(1, 1e6), 0.04, 2.0**-4

    def curved(y):
        return jnp.sum((y - far) + 2 * (y - far) ** 2)

    g = px.make_perturbed_fun(curved, 6, sigma, px.Normal(), sampler=INDEPENDENT, degree=0)
    carried = px.carry(g)
    _, state = after_steps(carried, far, 9, 40)
    cells = spacing * np.arange(-6, 7)
    edges = np.diff(norm.cdf((cells[:, None] + spacing * np.array([-0.5, 0.5])) / sigma), axis=1)
    exact = np.sum(edges[:, 0] * (cells + 2 * cells**2))

    def estimate(key, state):
        return {"value": carried.value_and_grad(state, key, far)[0][0]}

    options = {"args": (state,), "num_keys": 16384, "promise": 0.01, "scale": sigma}
    assert_unbiased(estimate, {"value": exact}, seed=22, **options)


def test_far_from_the_origin_no_digits_are_lost():
    """Points are told from where x began, or steps of 1e-3 would be lost at 1e4 in float32."""
    g = px.make_perturbed_fun(
        lambda x, at: jnp.sum(jnp.floor(64 * (x - at))), 16, 2.0**-6, px.Normal()
    )
    carried = px.carry(g, memory=64)
    points = np.float32([[0, 0], [8192, 8192]])
    (_, (near, far)), _ = jax.vmap(lambda at: after_steps(carried, at, 17, 12, at))(points)
    assert_trees_close(far, near, rtol=0.2)


@pytest.mark.parametrize(
    ("option", "value"), [("numpy_dtype_promotion", "strict"), ("numpy_rank_promotion", "raise")]
)
def test_without_promotion(option, value):
    """Flags were multiplied with numbers, and rows with vectors."""
    g = px.make_perturbed_fun(lambda x: jnp.sum(jnp.floor(x)), 4, 0.5, px.Gumbel())
    carried = px.carry(g, memory=8)
    with getattr(jax, option)(value):
        state, x = jax.eval_shape(carried.init, X), np.asarray(X, np.float16)
        jax.eval_shape(carried.value_and_grad, state, jax.random.key(0), x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: px.carry(bumpy), TypeError, "make_perturbed_fun"),
        (lambda: px.carry(jax.jit(smoothed())), TypeError, "make_perturbed_fun"),
        (lambda: px.carry(smoothed(noise=px.Cauchy())), ValueError, "finite mean and variance"),
        (lambda: px.carry(smoothed(), memory=0), ValueError, "memory must be >= 1, got 0"),
        (
            lambda: step_of(smoothed(lambda x: 2 * x)),
            ValueError,
            r"float32\[3\]: carry the perturbed",
        ),
        (
            lambda: step_of(smoothed(lambda x: 1j * x[0])),
            TypeError,
            r"got complex64\[\]: return its",
        ),
        (
            lambda: step_of(smoothed(lambda x: (x[0], x))),
            TypeError,
            r"got float32\[\], float32\[3\]",
        ),
        (
            lambda: step_of(px.make_perturbed_fun(bumpy, 8, np.eye(3), px.Normal())),
            ValueError,
            "sigma is a matrix",
        ),
        (lambda: step_of(smoothed(), state=None), TypeError, "state must be what init.* NoneType"),
        (lambda: step_of(smoothed(), x=X[:2]), ValueError, "for 3 coordinates, but x has 2"),
        (
            lambda: step_of(smoothed(), state=px.carry(smoothed(noise=px.Laplace())).init(X)),
            ValueError,
            r"state is one for other noise than Normal\(\): call init",
        ),
        (
            lambda: jax.grad(px.carry(smoothed()), argnums=1)(jax.random.key(0), X),
            TypeError,
            r"use carried.value_and_grad\(state, key, x\), it takes the place of",
        ),
        (lambda: px.carry(smoothed())(X), TypeError, "cannot be called"),
        (lambda: step_of_doubles(), ValueError, "points of float32, but noise for x is float64"),
        (lambda: step_of(smoothed(), key=X, x=jax.random.key(0)), TypeError, "did you swap"),
    ],
)
def test_errors_tell_what_to_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


def step_of_doubles():
    state = px.carry(smoothed()).init(X)
    with enable_x64(True):
        step_of(smoothed(), state=state, x=np.asarray(X, np.float64))


def step_of(g, **changes):
    carried = px.carry(g)
    given = {"state": carried.init(X), "key": jax.random.key(0), "x": X, **changes}
    return carried.value_and_grad(*given.values())
