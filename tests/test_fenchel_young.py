"""The Fenchel-Young loss: its true value, its gradient, and how many solves both take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import closed_forms as cf
import perturbax as px
from helpers import assert_biased, assert_trees_close, assert_unbiased
from test_argmax import KEY, SCORES, SIGMA, HostSolver, X, one_hot, two_way

CHOSEN = np.array([0, 1, 0])
PROMISES = {"value": 0.01, "gradient": 0.02, "hessian": 0.1}


def make_loss(solver=one_hot, num_samples=1, sigma=SIGMA, **options):
    return px.make_fenchel_young_loss(solver, num_samples=num_samples, sigma=sigma, **options)


def value_and_derivatives(loss):
    by_x = jax.value_and_grad(loss, argnums=1)

    def estimates(key, x, y):
        value, gradient = by_x(key, x, y)
        hessian = jax.jacfwd(lambda x: by_x(key, x, y)[1])(x)
        return {"value": value, "gradient": gradient, "hessian": hessian}

    return estimates


@pytest.mark.parametrize("num_samples", [1, 16])
def test_it_is_a_cross_entropy_under_gumbel_noise(num_samples):
    p = scipy.special.softmax(SCORES / SIGMA)
    exact = {
        "value": SIGMA * (np.euler_gamma - np.log(p[1])),
        "gradient": p - CHOSEN,
        "hessian": cf.smooth_argmax_gumbel(SCORES, SIGMA).gradient,
    }
    estimates = value_and_derivatives(make_loss(num_samples=num_samples))
    settings = {"seed": 31, "args": (X, CHOSEN), "keys_per_batch": 4096}
    num_keys = 327680 if num_samples == 1 else 12288
    assert_unbiased(estimates, exact, num_keys=num_keys, promise=PROMISES, **settings)
    exact["value"] = np.sum((p - CHOSEN) ** 2)  # a common stand-in for the value
    num_keys = 131072 // num_samples
    assert_biased(estimates, exact, quantities=("value",), num_keys=num_keys, **settings)


def test_of_costs_and_of_ranks():
    """A minimiser's loss is convex in the costs, with the gradient y - E y*."""
    ranks = np.float32([2, 1, 3])

    def lowest(costs):
        return px.solvers.ranks(-costs)  # the largest cost gets the smallest rank

    loss = make_loss(lowest, num_samples=16, noise=px.Normal(), maximize=False)
    mean = cf.smooth_ranks(-SCORES, SIGMA, cf.normal)

    def estimates(key, costs):
        by_costs = jax.grad(loss, argnums=1)
        return {
            "gradient": by_costs(key, costs, ranks),
            "hessian": jax.jacrev(by_costs, argnums=1)(key, costs, ranks),
        }

    exact = {"gradient": ranks - mean.value, "hessian": mean.gradient}
    promise = {"gradient": 0.02, "hessian": 0.05}
    assert_unbiased(estimates, exact, seed=32, num_keys=4096, args=(X,), promise=promise)
    assert np.linalg.eigvalsh(mean.gradient).min() > -1e-9
    mirror = make_loss(px.solvers.ranks, num_samples=16, noise=px.Normal())
    assert_trees_close(loss(KEY, X, ranks), mirror(KEY, -X, ranks), atol=1e-6)


def test_multiplicative_noise_keeps_its_factor():
    theta = np.array([1.5, 1.0])
    choice, best = two_way(theta, 0.6)
    chosen = np.array([0.0, 1.0])
    exact = {
        "value": best["value"] - theta @ chosen,
        "gradient": best["gradient"] - chosen,
        "hessian": best["hessian"],
    }
    loss = make_loss(num_samples=16, sigma=0.6, noise=px.Normal(), multiplicative=True)
    settings = {"seed": 33, "keys_per_batch": 4096}
    args = (jnp.asarray(theta, jnp.float32), jnp.asarray(chosen, jnp.float32))
    estimates = value_and_derivatives(loss)
    assert_unbiased(estimates, exact, num_keys=20480, args=args, promise=PROMISES, **settings)
    wrong = {"gradient": choice["value"] - chosen}
    assert_biased(
        lambda key, x, y: {"gradient": jax.grad(loss, argnums=1)(key, x, y)},
        wrong,
        num_keys=512,
        args=args,
        **settings,
    )


@pytest.mark.parametrize("num_samples", [1, 5])
def test_it_solves_each_instance_num_samples_times(num_samples):
    solver = HostSolver()
    loss = jax.value_and_grad(make_loss(solver, num_samples), argnums=1)
    jax.block_until_ready(loss(KEY, X, CHOSEN))
    assert solver.solves == num_samples
    solver.solves = 0
    batch = jax.jit(jax.vmap(loss, in_axes=(0, 0, None)))
    value, gradient = batch(jax.random.split(KEY, 3), np.stack([X] * 3), CHOSEN)
    jax.block_until_ready(gradient)
    assert solver.solves == 3 * num_samples
    assert np.all(np.ptp(np.asarray(gradient), axis=0) >= 0)
    assert value.shape == (3,)


@pytest.mark.parametrize("maximize", [True, False], ids=["max", "min"])
def test_the_gradient_of_a_solver_with_side_effects(maximize):
    """It came by the score, and was far noisier than the mean solution minus the true one."""

    def pure(x):
        return one_hot(x if maximize else -x)

    def solver(x):
        jax.experimental.io_callback(lambda v: None, None, x, ordered=True)
        return pure(x)

    options = {"num_samples": 3, "batch_size": 1, "maximize": maximize}
    options |= {"sampler": px.Independent(), "degree": 0}
    mean_solution = px.make_perturbed_argmax(solver, sigma=SIGMA, **options)

    @jax.jit
    def results(x):
        found = jax.value_and_grad(make_loss(solver, **options), argnums=1)(KEY, x, CHOSEN)
        return *found, mean_solution(KEY, x), make_loss(pure, **options)(KEY, x, CHOSEN)

    value, gradient, mean, expected = results(X)
    difference = np.asarray(mean) - CHOSEN.astype(np.float32)
    assert_trees_close(gradient, difference * (1 if maximize else -1), atol=1e-6)
    assert_trees_close(value, expected, atol=1e-6)


def test_general_objective():
    """<theta, g(y)> + h(y): a choice among three with a bonus, y the number of the choice."""
    features = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    bonus = jnp.array([0.3, 0.0, -0.2])

    def objective(theta, y, bonus):
        return theta @ features[y] + bonus[y]

    def solver(theta, bonus):
        return jnp.argmax(features @ theta + bonus)

    loss = make_loss(solver, num_samples=40, noise=px.Normal(), objective=objective)
    theta = jnp.array([0.4, -0.1])

    def estimates(key, theta):
        gradient, by_bonus = jax.grad(loss, argnums=(1, 3))(key, theta, 2, bonus)
        return {"gradient": gradient, "bonus": by_bonus}

    # By the midpoint rule in probability: P(each choice) over two normal scores.
    nodes = scipy.stats.norm.ppf((np.arange(1000) + 0.5) / 1000)
    u = np.asarray(theta) + SIGMA * np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1)
    mass = np.full((1000, 1000), 1e-6)
    choice = np.argmax(u @ np.asarray(features).T + np.asarray(bonus), axis=-1)
    chances = np.array([mass[choice == k].sum() for k in range(3)])
    exact = {
        "gradient": chances @ np.asarray(features) - np.asarray(features[2]),
        "bonus": chances - np.array([0.0, 0.0, 1.0]),
    }
    measured = assert_unbiased(
        estimates, exact, seed=34, num_keys=2048, args=(theta,), promise=0.05
    )
    assert len(measured) == 2


def test_trees_masks_and_types():
    x = {"a": np.asarray(X)[:2], "b": np.float32([-np.inf])}

    def solver(tree):
        y = one_hot(jnp.concatenate([tree["a"], tree["b"]])).astype(bool)
        return {"a": y[:2], "b": y[2:]}

    y = {"a": np.array([True, False]), "b": np.array([False])}
    num = 20_000
    value_and_gradient = jax.jit(jax.value_and_grad(make_loss(solver, num), argnums=1))
    value, gradient = value_and_gradient(KEY, x, y)
    flat = np.concatenate([x["a"], x["b"]])
    expected = make_loss(num_samples=num)(KEY, flat, np.array([1, 0, 0]))
    assert_trees_close(value, expected, atol=1e-6)
    assert float(gradient["b"][0]) == 0
    # Sample by sample the mean solution less the true one; and near a softmax of two.
    mean = np.asarray(px.make_perturbed_argmax(one_hot, num, SIGMA)(KEY, flat))
    assert_trees_close(gradient["a"], mean[:2] - y["a"].astype(np.float32), atol=1e-6)
    p = scipy.special.softmax(SCORES[:2] / SIGMA)
    np.testing.assert_allclose(gradient["a"], p - y["a"], atol=0.02)
    np.testing.assert_allclose(value, SIGMA * (np.euler_gamma - np.log(p[0])), atol=0.03)


def test_wrong_solutions_are_told():
    with pytest.raises(ValueError, match=r"y_true has the shape \(2,\), expected that of theta"):
        make_loss()(KEY, X, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"y_true has the structure"):
        make_loss()(KEY, X, [jnp.zeros(3)])
    with pytest.raises(ValueError, match=r"argmax_fun has the shape \(\)"):
        make_loss(jnp.argmax)(KEY, X, CHOSEN)
    with pytest.raises(ValueError, match="needs noise=Normal"):
        make_loss(multiplicative=True)
