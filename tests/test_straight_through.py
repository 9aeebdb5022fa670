"""Straight-through functions: the hard value, and the derivatives of the smoothed function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px
from helpers import assert_trees_close
from test_argmax import KEY, SIGMA, HostSolver, X


def fun(x, weight=1.0):
    return {"steps": weight * jnp.sum(x > 0), "signs": jnp.sign(x)}


def test_value_and_derivatives():
    options = {"num_samples": 20, "sigma": SIGMA, "noise": px.Normal()}
    hard = px.make_straight_through_fun(fun, **options)
    soft = px.make_perturbed_fun(fun, **options)

    @jax.jit
    def derivatives(x, weight):
        return [
            [
                jax.jacrev(g, argnums=(1, 2))(KEY, x, weight),
                jax.jacfwd(g, argnums=(1, 2))(KEY, x, weight),
                jax.hessian(g, argnums=1)(KEY, x, weight),
            ]
            for g in (hard, soft)
        ]

    value, mean = hard(KEY, X, 2.0), soft(KEY, X, 2.0)
    assert_trees_close(value, fun(X, 2.0))
    assert abs(mean["steps"] - value["steps"]) > 1e-3
    of_hard, of_soft = derivatives(X, 2.0)
    assert_trees_close(of_hard, of_soft, atol=1e-5)
    assert max(np.max(np.abs(v)) for v in jax.tree.leaves(of_hard)) > 0.1


def test_derivative_in_sigma_and_of_a_composition():
    def loss(x, sigma, make):
        choose = make(px.solvers.one_hot_argmax, 20, sigma, px.Normal())
        return jnp.sum((choose(KEY, x) - 0.25) ** 2)

    def soft(x, sigma):
        return px.make_perturbed_fun(px.solvers.one_hot_argmax, 20, sigma, px.Normal())(KEY, x)

    hard = jax.grad(loss, argnums=(0, 1))(X, SIGMA, px.make_straight_through_fun)
    slopes = jax.jit(jax.jacrev(soft, argnums=(0, 1)))(X, SIGMA)
    outer = 2 * (np.eye(3, dtype=np.float32)[np.argmax(X)] - np.float32(0.25))
    by_hand = [outer @ np.asarray(slope) for slope in slopes]
    assert abs(by_hand[1]) > 0.1
    assert_trees_close(list(hard), by_hand, atol=1e-5)


def test_integers_low_precision_and_trees():
    hard = px.make_straight_through_fun(lambda x: jnp.argmax(x["a"]), 5)
    value = hard(KEY, {"a": X.astype(jnp.bfloat16), "b": 3})
    assert value.dtype == jnp.float32
    assert value == 0


def test_a_value_takes_one_evaluation():
    solver = HostSolver()
    hard = px.make_straight_through_fun(solver, 6)
    jax.block_until_ready(hard(KEY, X))
    assert solver.solves == 1
    jax.block_until_ready(jax.vmap(jax.jit(hard), (None, 0))(KEY, np.stack([X, -X])))
    assert solver.solves == 3


def test_number_of_evaluations_of_derivatives():
    """Of fun(x), for the value, and where there are too few samples for the baseline too."""
    for num_samples in (2, 10):
        solver = HostSolver()
        hard = px.make_straight_through_fun(solver, num_samples)
        jax.block_until_ready(jax.jit(jax.value_and_grad(lambda x, g=hard: g(KEY, x) @ x))(X))
        assert solver.solves == num_samples + (2 if num_samples == 2 else 1)


def test_side_effects():
    seen = []

    def noisy(x):
        jax.experimental.io_callback(lambda v: seen.append(v), None, x[0], ordered=True)
        return jnp.sign(x)

    options = {"num_samples": 4, "batch_size": 1}
    hard = px.make_straight_through_fun(noisy, **options)
    soft = px.make_perturbed_fun(jnp.sign, **options)
    assert_trees_close(hard(KEY, X), np.sign(X))
    found, expected = (jax.jit(jax.jacrev(g, argnums=1))(KEY, X) for g in (hard, soft))
    assert_trees_close(found, expected, atol=1e-5)


def test_errors_are_those_of_make_perturbed_fun():
    with pytest.raises(TypeError, match="fun must be callable"):
        px.make_straight_through_fun(3)
    with pytest.raises(TypeError, match=r"did you call g\(x, key\)"):
        px.make_straight_through_fun(jnp.sign)(X, KEY)


@pytest.mark.parametrize("transform", [jax.grad, jax.hessian])
def test_a_key_is_used_once(transform):
    """The value was computed with operands whose keys the derivative had consumed."""
    signs = px.make_straight_through_fun(lambda x: jnp.sum(jnp.sign(x)), 32)
    with jax.debug_key_reuse(True):
        derived = transform(signs, argnums=1)(jax.random.key(11), jnp.array([0.5, -0.3]))
    assert np.isfinite(derived).all()
