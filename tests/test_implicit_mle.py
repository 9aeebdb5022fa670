"""Implicit maximum likelihood: a difference quotient of the mean solution, and its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import perturbax as px
from helpers import (
    FOR_LONG_RUNS,
    assert_biased,
    assert_distributed_as,
    assert_trees_close,
    assert_unbiased,
)
from test_argmax import KEY, SCORES, SIGMA, HostSolver, X, one_hot

COST = np.array([1.0, -0.5, 0.25])


def softmax(scores):
    return scipy.special.softmax(np.asarray(scores) / SIGMA)


def layer(solver=one_hot, num_samples=32, sigma=SIGMA, **options):
    return px.make_implicit_mle(solver, num_samples, sigma, **options)


@pytest.mark.covering("two_sided")
@pytest.mark.parametrize("maximize", [True, False], ids=["max", "min"])
@pytest.mark.parametrize("two_sided", [False, True])
def test_gradient_is_the_difference_quotient(maximize, two_sided):
    """Under Gumbel noise, that of a softmax; and not the derivative, nor lam times it."""
    lam, sign = 0.8, 1 if maximize else -1
    scores = sign * SCORES
    solver = one_hot if maximize else lambda c: one_hot(-c)
    choose = layer(solver, lam=lam, two_sided=two_sided, maximize=maximize)

    def estimates(key, x):
        value, pull = jax.vjp(lambda x: choose(key, x), x)
        return {"value": value, "gradient": pull(jnp.asarray(COST, jnp.float32))[0]}

    low, high = softmax(scores - lam * COST), softmax(scores + lam * COST)
    quotient = (high - low) / (2 * lam) if two_sided else (softmax(scores) - low) / lam
    exact = {"value": softmax(scores), "gradient": sign * quotient}
    settings = {"seed": 41, "args": (X,)}
    promise = {"value": 0.01, "gradient": 0.05}
    assert_unbiased(estimates, exact, num_keys=7168, promise=promise, **settings)
    p = softmax(scores)
    derivative = sign * (np.diag(p) - np.outer(p, p)) @ COST / SIGMA
    wrong = {**exact, "gradient": derivative}
    assert_biased(estimates, wrong, quantities=("gradient",), num_keys=1024, **settings)


@pytest.mark.parametrize("maximize", [True, False], ids=["max", "min"])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_the_target_weighs_the_scores(alpha, maximize):
    """Exactly a difference of mean solutions with the same noise, the second at the target."""
    lam, sign = 0.8, 1 if maximize else -1
    cost = COST.astype(np.float32)
    masked, none = np.array(X), cost.copy()
    masked[1], none[1] = -sign * np.inf, 0

    def solver(x):
        return one_hot(sign * x)

    independent = {"sampler": px.Independent(), "maximize": maximize}
    choose, both = (
        layer(solver, lam=lam, alpha=alpha, two_sided=two_sided, **independent)
        for two_sided in (False, True)
    )
    plain = px.make_perturbed_argmax(solver, 32, SIGMA, degree=0, **independent)

    @jax.jit
    def results(x, step):
        """The value and two gradients, and the mean solutions that they are made of."""
        value, pull = jax.vjp(lambda x: choose(KEY, x), x)
        away = jnp.where(jnp.isfinite(x), alpha * x, x)
        shift = sign * lam * step
        means = jax.vmap(plain, (None, 0))(KEY, jnp.stack([x, away - shift, away + shift]))
        return value, pull(step)[0], jax.grad(lambda x: both(KEY, x) @ step)(x), means

    for x, step in [(np.asarray(X), cost), (masked, none)]:
        value, one_sided, two_sided, means = results(x, step)
        here, low, high = np.asarray(means)
        assert_trees_close(value, here, atol=1e-6)
        assert_trees_close(one_sided, sign * (here - low) / np.float32(lam), atol=1e-6)
        assert_trees_close(two_sided, sign * (high - low) / np.float32(2 * lam), atol=1e-6)


def test_both_means_share_their_noise():
    """A step that changes no choice has the gradient zero, exactly."""

    @jax.jit
    @jax.grad
    def gradient(x, lam, cost):
        return jnp.sum(layer(lam=lam)(KEY, x) * cost)

    cost, zero = COST.astype(np.float32), np.zeros(3, np.float32)
    assert_trees_close(gradient(X, 1e-6, cost), zero)
    assert np.linalg.norm(gradient(X, 1.0, cost)) > 0
    # A shift of all scores changes no choice either.
    assert_trees_close(gradient(X, 1.0, np.ones_like(cost)), zero)


def test_value_and_other_derivatives():
    def solver(x, factor):
        return one_hot(x) * factor

    choose = layer(solver)
    plain = px.make_perturbed_argmax(solver, 32, SIGMA, degree=0)
    assert_trees_close(choose(KEY, X, 2.0), plain(KEY, X, 2.0), atol=1e-6)
    by_factor = jax.jit(jax.jacrev(choose, argnums=2))(KEY, X, 2.0)
    assert_trees_close(by_factor, plain(KEY, X, 1.0), atol=1e-6)
    batch = jax.jit(jax.vmap(jax.jacrev(choose, argnums=1), in_axes=(0, 0, None)))
    assert batch(jax.random.split(KEY, 2), np.stack([X, -X]), 1.0).shape == (2, 3, 3)
    with jax.debug_key_reuse(True):
        jax.jit(jax.jacrev(choose, argnums=1))(jax.random.key(1), X, 1.0)


@pytest.mark.parametrize(("two_sided", "solves"), [(False, 8), (True, 12)])
def test_number_of_solves(two_sided, solves):
    solver = HostSolver()
    choose = layer(solver, 4, two_sided=two_sided)
    loss = lambda x: choose(KEY, x) @ COST.astype("f4")  # noqa: E731
    jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(X))
    assert solver.solves == solves


def test_sum_of_gamma():
    noise = px.SumOfGamma(k=3, num_terms=100)
    draw = jax.jit(lambda key: noise.sample(key, (2000, 3)), compiler_options=FOR_LONG_RUNS)
    z = np.asarray(draw(KEY))
    assert_distributed_as(z.sum(axis=1), scipy.stats.gumbel_r.cdf)
    few = px.SumOfGamma(k=jnp.asarray(2), num_terms=5)
    assert hash(few) == hash(px.SumOfGamma(2, 5))
    z = np.asarray(jax.jit(lambda key: few.sample(key, (40_000,)))(KEY))
    error = np.sqrt(few.variance / len(z))
    assert abs(z.mean() - few.mean) < 4.5 * error
    np.testing.assert_allclose(z.var(), few.variance, rtol=0.05)
    with pytest.raises(NotImplementedError, match=r"no closed form.*make_implicit_mle"):
        jax.grad(px.make_perturbed_fun(jnp.sum, 4, noise=few), argnums=1)(KEY, X)
    gradient = jax.grad(lambda x: layer(noise=few)(KEY, x) @ COST.astype("f4"))(X)
    assert np.isfinite(gradient).all()


def test_a_number_of_any_dtype_is_the_same_number():
    """Less 1, a small unsigned one was 255."""

    def gradient(alpha):
        weighed = layer(px.solvers.one_hot_argmax, alpha=alpha)
        return jax.grad(lambda x: weighed(KEY, x) @ np.arange(3, dtype="f4"))(X)

    np.testing.assert_array_equal(gradient(np.uint8(0)), gradient(0.0))


def test_errors():
    for lam in (0.0, -1.0, np.inf, jnp.ones(2)):
        with pytest.raises(ValueError, match="lam must be one positive"):
            layer(lam=lam)
    # Those of numpy were taken for the number 1 and the number 2.
    for lam, kind in (("1", "str"), (np.str_("2"), "str_"), (np.bool_(True), "bool")):
        with pytest.raises(TypeError, match=f"lam must be a positive number, got {kind}"):
            layer(lam=lam)
    with pytest.raises(ValueError, match="alpha must be one finite number, got nan"):
        layer(alpha=np.nan)
    with pytest.raises(ValueError, match="alpha must be one finite number, got 1e\\+39"):
        layer(alpha=1e39)  # which is not finite in single precision
    with pytest.raises(TypeError, match="alpha must be a number, got bool"):
        layer(alpha=True)
    with pytest.raises(ValueError, match=r"\(2,\), expected that of theta, \(3,\)"):
        layer(lambda x: x[:2])(KEY, X)
    with pytest.raises(ValueError, match="k must be >= 1"):
        px.SumOfGamma(0)
    with pytest.raises(ValueError, match=r"lam must be one positive number, got shape \(3,\)"):
        jax.jit(lambda lam: layer(lam=lam)(KEY, X))(jnp.ones(3))
    traced = jax.jit(lambda lam: jax.grad(lambda x: layer(lam=lam)(KEY, x)[0])(X))
    assert np.isnan(traced(-1.0)).all()


@pytest.mark.parametrize("two_sided", [False, True])
def test_second_order_raises(two_sided):
    """It returned numbers that meant nothing."""
    choose = layer(lam=1.0, two_sided=two_sided)
    gradient = jax.grad(lambda x: choose(KEY, x) @ COST.astype("f4"))
    assert np.isfinite(gradient(X)).all()
    for second in (jax.jacrev(gradient), jax.grad(lambda x: jnp.sum(gradient(x) ** 2))):
        with pytest.raises(NotImplementedError, match=r"make_implicit_mle.*make_perturbed_argmax"):
            second(X)
