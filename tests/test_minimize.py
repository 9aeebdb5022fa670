"""px.minimize: what it finds, tells and refuses, and that interruptions cost nothing."""

import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import checkpoints
import perturbax as px
from perturbax.host_functions._function_names import known_by
from perturbax.minimization import (
    _checkpoint,
    _minimize,
    _progress,
    _quadratic_fit,
)
from perturbax.minimization._fingerprint import called_in, fingerprint, operations
from perturbax.minimization._run import block

quiet = functools.partial(px.minimize, progress=False)


def staircase(x):
    return jnp.sum(jnp.round(4 * (x - 1)) ** 2)


def valley(x, edge):
    """Rosenbrock's function, NaN where the first coordinate is below the edge."""
    value = jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
    return jnp.where(x[0] < edge, jnp.nan, value)


def run_valley(edge):
    """Runs to any edge are by one program."""
    args = (jnp.float32(edge),)
    return quiet(valley, jnp.zeros(4), jax.random.key(0), max_evaluations=3000, args=args)


ADAM = optax.adam(0.05)
# A run whose steps are quickly compiled, for what holds of any.
QUICK = {"optimizer": ADAM, "sigma": 0.5, "sampler": px.Independent(), "degree": 0}


@pytest.fixture(scope="module")
def found():
    """One run on a staircase, by the default method."""
    return quiet(staircase, jnp.zeros(4), jax.random.key(0), max_evaluations=600)


@pytest.mark.parametrize("optimizer", [None, ADAM], ids=["surrogate", "adam"])
def test_finds_the_minimum_of_a_staircase(optimizer, found):
    run = found
    if optimizer is not None:
        run = quiet(
            staircase,
            jnp.zeros(4),
            jax.random.key(0),
            optimizer=optimizer,
            max_evaluations=3000,
        )
    assert run.value == 0
    assert run.value == staircase(run.x)
    assert run.value_error == 0


def test_a_value_may_be_an_object_that_jax_takes_for_an_array():
    class Value:
        def __init__(self, array):
            self.array = array

        def __jax_array__(self):
            return self.array

    run = quiet(lambda x: Value(staircase(x)), jnp.zeros(1), jax.random.key(0), **QUICK)
    assert run.value == staircase(run.x)


def test_a_smooth_valley_is_followed_to_its_end():
    run = run_valley(-np.inf)
    assert run.value < 1e-9
    np.testing.assert_allclose(run.x, 1, atol=1e-4)
    assert run.reason == "sigma is lost in the rounding of x"
    assert run.num_evaluations < 1500


def test_noise_keeps_its_shape_where_curvatures_are_not_known():
    """Of 40 coordinates, 90 values tell few of 820 curvatures; a guess at them bent the noise."""

    def sphere(x):
        return jnp.sum((x - 1) ** 2)

    def left(key):
        start_key, run_key = jax.random.split(key)
        start = jax.random.uniform(start_key, (40,), minval=-4.0, maxval=4.0)
        found = px.minimize(sphere, start, run_key, max_evaluations=90, progress=False)
        return found.value / sphere(start)

    # It was .04.
    assert np.median(jax.jit(jax.vmap(left))(jax.random.split(jax.random.key(0), 8))) < 0.01


def test_history_counts_and_falls(found):
    h = found.history
    assert len(h) == found.num_steps
    assert (np.diff(h.evaluations) == 6).all()
    assert (np.diff(h.best_value) <= 0).all()
    assert found.num_evaluations == h.evaluations[-1] + 1 <= 600
    assert found.num_evaluations > 600 - 2 * 6
    assert found.value == h.best_value[-1]
    assert found.reason == "max_evaluations reached"


# Points at which `tilted` was evaluated; tests share its programs, so it is one list.
CALLS = []


def tilted_on_host(x, tilt):
    CALLS.append(x.copy())
    return np.float32(np.linalg.norm(x) + tilt * x[0])


def tilted(x, tilt):
    like = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(tilted_on_host, like, x, tilt, vmap_method="sequential")


def run_tilted(tilt, **options):
    """A run, and the points at which it evaluated its function."""
    CALLS.clear()
    run = quiet(tilted, jnp.zeros(4), jax.random.key(2), args=(jnp.float32(tilt),), **options)
    return run, CALLS.copy()


def test_every_evaluation_is_counted():
    for optimizer in (None, ADAM):
        run, calls = run_tilted(3.0, optimizer=optimizer, max_evaluations=200)
        assert len(calls) == run.num_evaluations <= 200
        # In the end the best point, and with an optimiser where it ended; the better one is found.
        tried = calls[-1 if optimizer is None else -2 :]
        np.testing.assert_array_equal(min(tried, key=lambda x: tilted_on_host(x, 3.0)), run.x)


def test_a_first_sigma_is_looked_for_no_longer_than_it_takes():
    """The widest that is good is taken at once; what was seen on the way counts."""
    for tilt, looks in ((3.0, 4), (0.0, 24)):
        seen = []
        run, calls = run_tilted(tilt, callback=seen.append, max_evaluations=40)
        assert len(calls) == run.num_evaluations
        assert seen[0].evaluations == 2 + looks + 6
        values = [tilted_on_host(x, np.float32(tilt)) for x in calls[: seen[0].evaluations]]
        assert seen[0].best_value == min(values)
        assert tilt or (run.x == 0).all()


def test_prints_as_a_table(found):
    head, columns, *rows = str(found).splitlines()
    assert head == f"value 0 after {found.num_evaluations} evaluations: max_evaluations reached"
    assert columns.split() == ["step", "evaluations", "smoothed", "±", "error", "best", "sigma"]
    assert len(rows) == 10
    assert rows[-1].split()[:2] == [str(len(found.history) - 1), str(found.num_evaluations - 1)]
    assert repr(found) == str(found)
    shapes = jax.eval_shape(lambda: found)
    assert repr(shapes).startswith("MinimizeResult(x=ShapeDtypeStruct")


def test_plot(found):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    assert found.plot(ax=ax) is ax
    np.testing.assert_array_equal(ax.get_lines()[1].get_ydata(), found.history.best_value)
    plt.close(figure)


def test_is_a_pytree(found):
    doubled = jax.tree.map(lambda v: 2 * v, found)
    np.testing.assert_array_equal(doubled.x, 2 * found.x)
    with pytest.raises(AttributeError):
        found.x = 0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_batch_of_starts_is_each_start_alone(found):
    """Under vmap a run takes the steps that it takes alone."""
    starts = np.float32([[0] * 4, [3] * 4])
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    run = functools.partial(quiet, staircase, max_evaluations=600)
    batch = jax.vmap(run)(starts, keys)
    batch = jax.tree.map(np.asarray, batch)
    first = jax.tree.map(lambda v: v[0], batch)
    steps = int(first.num_steps)
    assert steps == found.num_steps
    assert first.num_evaluations == found.num_evaluations
    assert first.reason == found.reason
    assert (batch.value == 0).all()
    smoothed = first.history.smoothed_value
    assert np.isnan(smoothed[steps:]).all()
    # Later, rounding takes samples over the edges of steps.
    np.testing.assert_allclose(smoothed[:2], found.history.smoothed_value[:2], rtol=1e-2)


def test_a_start_of_a_weak_type_is_one_like_any_other(found):
    """The steps from a start like `jnp.full(4, 0.0)` were compiled twice."""
    before = block._cache_size()
    run = quiet(staircase, jnp.full(4, 0.0), jax.random.key(0), max_evaluations=600)
    assert block._cache_size() == before
    assert run.value == found.value


def test_an_optimizer_made_anew_is_not_compiled_anew():
    """It cost seconds each time, and a program that was kept for ever."""

    def run(rate):
        options = {**QUICK, "optimizer": optax.adam(rate), "num_samples": 8}
        return quiet(staircase, jnp.zeros(4), jax.random.key(0), max_evaluations=300, **options)

    once = run(0.05)
    before = block._cache_size()
    other = run(0.2)
    assert block._cache_size() == before
    assert not np.array_equal(once.history.smoothed_value, other.history.smoothed_value)


@pytest.mark.parametrize("optimizer", [ADAM, pytest.param(None, marks=pytest.mark.full)])
def test_sigma_of_the_history_is_the_geometric_mean_over_coordinates(optimizer):
    """With an optimizer it was the mean over leaves, whatever their sizes."""
    run = quiet(
        lambda x: staircase(x["a"]) + staircase(x["b"]),
        {"a": jnp.zeros(3), "b": jnp.zeros(())},
        jax.random.key(0),
        sigma={"a": 0.1, "b": 0.8},
        optimizer=optimizer,
        sampler=px.Independent(),
        num_samples=8,
        max_evaluations=60,
    )
    np.testing.assert_allclose(run.history.sigma, (0.1**3 * 0.8) ** 0.25, rtol=1e-5)


def test_trees_keep_structure_and_dtypes():
    x0 = {"a": jnp.zeros((2, 2)), "b": jnp.zeros((), jnp.bfloat16), "c": jnp.zeros((0, 3))}

    def fun(x, offset):
        return jnp.sum(jnp.floor(8 * (x["a"] - offset)) ** 2) + jnp.abs(x["b"] - 1)

    run = quiet(fun, x0, jax.random.key(0), args=(0.55,), max_evaluations=600)
    assert jax.tree.structure(run.x) == jax.tree.structure(x0)
    assert [v.dtype for v in jax.tree.leaves(run.x)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    assert run.value <= 0.1


@pytest.mark.parametrize("optimizer", [None, ADAM], ids=["surrogate", "adam"])
def test_bounds_hold_and_a_minimum_on_one_is_found(optimizer):
    """The distances inside are those outside, reflected: no point beyond a bound is evaluated."""
    seen = []

    def on_host(x):
        seen.append(x.copy())
        return np.float32(x[0] - x[1] + (x[2] - 0.25) ** 2 + abs(x[3] + 9))

    def fun(x):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(on_host, like, x, vmap_method="sequential")

    lower = np.array([-1.0, -np.inf, 0.0, -np.inf])
    upper = np.array([1.0, 2.0, 1.0, np.inf])
    run = quiet(
        fun,
        jnp.array([0.5, 0.0, 0.5, 0.0]),
        jax.random.key(0),
        optimizer=optimizer and optax.adam(0.2),
        sigma=None if optimizer is None else 0.1,
        max_evaluations=1500,
        lower=lower,
        upper=upper,
    )
    points = np.array(seen)
    assert (points >= lower).all()
    assert (points <= upper).all()
    np.testing.assert_allclose(run.x, [-1, 2, 0.25, -9], atol=0.1)


def test_reflection():
    from perturbax.minimization._problem import _reflected

    u = np.float32([0.5, 1.5, 2.5, -0.25, -1.75, 7.0])
    low, high = np.zeros(6), np.ones(6)
    bounds = (low, high), (low, low + np.inf), (low - np.inf, high)
    inside, above, below = jax.jit(lambda u: [_reflected(u, *ends) for ends in bounds])(u)
    np.testing.assert_allclose(inside, [0.5, 0.5, 0.5, 0.25, 0.25, 1.0])
    np.testing.assert_allclose(above, np.abs(u))
    np.testing.assert_allclose(below, 1 - np.abs(1 - u))


@pytest.mark.parametrize("options", [{}, QUICK], ids=["surrogate", "adam"])
def test_schedule_of_sigma_is_one_of_steps(options):
    """One that is made anew is not compiled anew, as an optimizer is not."""

    def run():
        schedule = optax.exponential_decay(0.5, 1, 0.9)
        return quiet(
            staircase,
            jnp.zeros(4),
            jax.random.key(0),
            **{**options, "sigma": schedule, "num_samples": 20, "max_evaluations": 150},
        )

    once = run()
    before = block._cache_size()
    again = run()
    assert block._cache_size() == before
    sigmas = 0.5 * 0.9 ** np.arange(len(once.history))
    np.testing.assert_allclose(once.history.sigma, sigmas, rtol=1e-5)
    np.testing.assert_array_equal(again.history.smoothed_value, once.history.smoothed_value)


def test_fixed_settings_are_the_loop_that_one_would_write():
    """With sigma and num_samples given, each step is value_and_grad and the optimiser's update."""
    sampling = {"sampler": px.Independent(), "degree": 0}
    g = px.make_perturbed_fun(staircase, 32, 0.5, px.Normal(), **sampling)
    value_and_grad = jax.jit(jax.value_and_grad(g, argnums=1))
    x, state = jnp.zeros(4), ADAM.init(jnp.zeros(4))
    run = quiet(staircase, x, jax.random.key(3), num_samples=32, max_evaluations=540, **QUICK)
    key = jax.random.split(jax.random.key(3), 4)[0]
    for step in range(16):
        draw, _ = jax.random.split(jax.random.fold_in(key, step))
        value, gradient = value_and_grad(draw, x)
        np.testing.assert_allclose(run.history.smoothed_value[step], value, rtol=1e-5)
        hard = staircase(x) if step % 13 == 0 else np.nan  # one evaluation in 400, at most
        np.testing.assert_allclose(run.history.hard_value[step], hard)
        updates, state = ADAM.update(gradient, state, x)
        x = optax.apply_updates(x, updates)
    assert run.num_steps == 16
    # The best point that was evaluated, and where the run ended, are evaluated in the end.
    assert run.num_evaluations == 2 + 16 * 32 + 2 + 2
    assert run.value == staircase(run.x) <= run.history.best_value[-1]


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_values_of_any_magnitude_in_single_precision(unit):
    """Of 1e30, squares of slopes overflowed, no step was made, and .3 to 70 units were left."""
    weights = 10.0 ** (3 * np.arange(20, dtype=np.float32) / 20)

    def ellipsoid(x, weights):
        return jnp.sum(weights * (x - 1) ** 2)

    # The unit is in an argument: both runs are by one program.
    args = (np.float32(unit * weights),)
    run = quiet(ellipsoid, jnp.zeros(20), jax.random.key(0), max_evaluations=1500, args=args)
    assert run.value < 1e-6 * unit


def test_where_an_optimiser_ended_is_tried_too():
    """After its only step it is nearer; the step's centre is where the run began."""

    def sphere(x):
        return jnp.sum((x - 1) ** 2)

    options = {"sigma": 0.01, "num_samples": 32, "max_evaluations": 70}
    run = quiet(sphere, jnp.zeros(2), jax.random.key(0), optimizer=optax.sgd(0.4), **options)
    assert run.num_steps == 1
    np.testing.assert_allclose(run.x, [0.8, 0.8], atol=0.01)


@pytest.mark.parametrize("at_end", [np.nan, np.inf, 1.0])
def test_the_lowest_of_best_and_last_is_found(at_end):
    """Minus infinity is lower than any number, and a number better than NaN."""

    def fun(x):
        return jnp.where(x[0] == 0, -jnp.inf, jnp.where(jnp.abs(x[0]) < 2, x[0], at_end))

    run = quiet(
        fun,
        jnp.zeros(1),
        jax.random.key(0),
        optimizer=optax.sgd(5.0),
        sigma=0.3,
        num_samples=8,
        max_evaluations=16,
    )
    assert run.num_steps == 1
    assert run.value == -np.inf


def test_num_samples_grows_where_the_signal_is_weak():
    """A function that changes sign from one step to the next: its slope adds up to nothing."""

    def wave(x):
        return jnp.sum(jnp.sin(1000 * x))

    run = quiet(
        wave, jnp.ones(3), jax.random.key(3), optimizer=ADAM, sigma=1.0, max_evaluations=3000
    )
    taken = np.diff(run.history.evaluations)
    # One at the centre as often as one in 400 allows.
    assert set(taken[:18]) == {16}
    last = int(run.num_steps) - 1
    assert taken[-1] in [2**k + (last % -(-400 // 2**k) == 0) for k in range(6, 11)]


def test_a_noisy_function_is_noticed_and_its_value_has_an_error():
    def fun(key, x):
        return jnp.sum((x - 1) ** 2) + 0.5 * jax.random.normal(key)

    run = quiet(
        fun, jnp.zeros(4), jax.random.key(0), takes_key=True, max_evaluations=2000, num_samples=8
    )
    assert 0.02 < run.value_error < 0.2
    lowest = np.sum((np.asarray(run.x) - 1) ** 2)
    assert lowest < 1
    assert abs(float(run.value) - lowest) < 5 * float(run.value_error)
    assert run.num_evaluations == run.history.evaluations[-1] + 3 * 40


def test_a_function_of_a_key_is_noisy_whatever_two_evaluations_show():
    """Where they were equal or one failed, the luckiest sample was told, with an error of 0."""

    def fun(key, x):
        return jnp.round(jnp.sum(x**2)) + 4.0 * jax.random.bernoulli(key)

    options = {**QUICK, "takes_key": True, "num_samples": 8, "max_evaluations": 400}

    def run(key):
        return px.minimize(fun, jnp.zeros(2), key, **options)

    runs = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 8))
    assert (runs.value_error > 0).all()
    assert abs(float(jnp.mean(runs.value)) - 2) < 1
    unused = quiet(lambda key, x: staircase(x), jnp.zeros(2), jax.random.key(0), **options)
    assert unused.value_error == 0
    assert unused.value == staircase(unused.x)


def test_failures_of_a_noisy_function_are_left_out_in_the_end_too():
    """The point at which it failed was returned, with NaN, and not the good one seen before."""

    def edge(key, x):
        noise = 0.01 * jax.random.normal(key)
        return jnp.where(jnp.sum(x) > 1, jnp.nan, -jnp.sum(x) + noise)

    def failing(key, x):
        value_key, failing_key = jax.random.split(key)
        value = jnp.sum(x**2) + jax.random.normal(value_key)
        return jnp.where(jax.random.bernoulli(failing_key, 0.2), jnp.nan, value)

    # Long steps along the last gradient end far beyond the edge.
    options = {"takes_key": True, "num_samples": 8, "max_evaluations": 500}
    options |= {**QUICK, "optimizer": optax.sgd(0.2), "sigma": 0.1}
    beyond = quiet(edge, jnp.zeros(2), jax.random.key(0), **options)
    assert -1.1 < beyond.value < 0
    assert jnp.sum(beyond.x) <= 1
    now_and_then = quiet(failing, jnp.zeros(2), jax.random.key(0), **options)
    assert abs(float(now_and_then.value)) < 6 * float(now_and_then.value_error) + 0.1

    def seldom(key, x):
        return jnp.where(jax.random.uniform(key) < 0.9, jnp.nan, jnp.sum(x**2))

    def run(key):
        return px.minimize(seldom, jnp.zeros(2), key, **{**options, "max_evaluations": 120})

    runs = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 32))
    # Of two evaluations in the end often one is left, of which nothing tells the error.
    assert np.isnan(runs.value_error[np.isfinite(runs.value)]).any()
    assert not (runs.value_error == 0).any()


# The second learns no curvatures of its own, as functions of many coordinates do.
@pytest.mark.parametrize(("dim", "most_metric"), [(20, 200), (30, 10)])
def test_what_a_key_adds_to_all_values_of_a_step_does_not_matter(dim, most_metric, monkeypatch):
    monkeypatch.setattr(_quadratic_fit, "MOST_METRIC", most_metric)

    def fun(key, x):
        return jnp.sum((x - 1) ** 2) + dim / 2 * jax.random.normal(key)

    run = quiet(
        fun, jnp.zeros(dim), jax.random.key(0), takes_key=True, max_evaluations=600 + 10 * dim
    )
    assert np.sum((np.asarray(run.x) - 1) ** 2) < 0.1 * dim


def test_directions_of_several_steps_are_orthogonal():
    """In so many coordinates noise takes no shape: directions are seen as they are drawn."""
    calls, dim, num_samples, steps = [], 240, 24, 3

    def on_host(x):
        calls.append(x.copy())
        return x.sum()

    def fun(x):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(on_host, like, x, vmap_method="sequential")

    most = 2 + (num_samples + 1) * steps + 1
    options = {"sigma": 1.0, "num_samples": num_samples, "max_evaluations": most}
    run = quiet(fun, jnp.zeros(dim), jax.random.key(0), **options)
    assert run.num_steps == steps
    # Around each step's proposal, which is evaluated before its samples or after them.
    points = np.array(calls[2:-1]).reshape(steps, num_samples + 1, dim)
    at = [int(np.argmin(np.square(p[:, None] - p).sum((1, 2)))) for p in points]
    away = np.concatenate([np.delete(p, i, 0) - p[i] for p, i in zip(points, at, strict=True)])
    lengths = np.linalg.norm(away, axis=1)
    assert abs(np.mean(lengths**2) / dim - 1) < 0.1
    np.testing.assert_allclose(away @ away.T / np.outer(lengths, lengths), np.eye(72), atol=1e-4)


def test_a_factorisation_that_fails_does_not_end_the_search(monkeypatch):
    """In single precision it fails beside large priors; the next step has a larger ridge."""
    monkeypatch.setattr(_quadratic_fit, "_QUADRATICS", (4, 5))

    def fun(x):
        return jnp.sum(jnp.round(4 * x) ** 2)

    run = quiet(fun, jnp.ones(6), jax.random.key(0), max_evaluations=600)
    assert np.isnan(run.history.smoothed_value).any()
    assert np.isfinite(run.history.sigma).all()
    assert run.value == 0


def test_values_that_are_not_numbers():
    partly, never = run_valley(-0.2), run_valley(np.inf)
    assert partly.value < 1e-3
    assert never.reason == "every value was NaN or infinite"
    np.testing.assert_array_equal(never.x, 0)
    assert np.isnan(never.history.standard_error).all()


@pytest.mark.parametrize("optimizer", [None, ADAM], ids=["surrogate", "adam"])
def test_strict_settings_of_jax_change_nothing(optimizer):
    """fun is traced by the user's rules; what is missing is NaN, by which a run is not ended."""
    options = {"optimizer": optimizer, "max_evaluations": 600}
    start, key = jnp.zeros(4), jax.random.key(0)
    expected = quiet(staircase, start, key, **options)
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.debug_infs(True),
    ):
        run = quiet(staircase, start, key, **options)
        with pytest.raises(ValueError, match="promotion"):
            quiet(lambda x: jnp.sum(x * jnp.arange(4)), start, key, **options)
    np.testing.assert_array_equal(run.x, expected.x)
    assert run.num_evaluations == expected.num_evaluations


def test_tol_ends_a_run():
    run = quiet(staircase, jnp.zeros(4), jax.random.key(0), tol=1.0, max_evaluations=5000)
    assert run.reason == "no improvement by more than tol"
    assert run.num_evaluations < 2500


def test_callback_sees_each_step_and_may_end_the_run(found):
    told = []

    def callback(progress):
        told.append(progress)
        return progress.evaluations >= 300

    run = quiet(staircase, jnp.zeros(4), jax.random.key(0), max_evaluations=600, callback=callback)
    assert run.reason == "stopped by callback"
    assert [p.step for p in told] == list(range(1, run.num_steps + 1))
    np.testing.assert_array_equal(
        run.history.smoothed_value, found.history.smoothed_value[: len(told)]
    )
    assert told[-1].smoothed_value == found.history.smoothed_value[len(told) - 1]


def test_what_a_callback_returns_must_be_one_truth_value():
    with pytest.raises(TypeError, match="callback must return whether"):
        quiet(
            staircase,
            jnp.zeros(4),
            jax.random.key(0),
            max_evaluations=600,
            callback=lambda progress: np.array([True, False]),
        )


def distance(x, target, power):
    """Of the first of five coordinates; tests with bounds share its program."""
    return jnp.abs(x[0] - target) ** power


def test_what_does_not_matter_to_the_function_stays_in_sight():
    """Its noise grew in each step, until it was infinite; a bounded one was lost in rounding."""
    run = quiet(
        distance,
        jnp.full(5, 0.5),
        jax.random.key(0),
        args=(np.float32(0.3), np.float32(2)),
        max_evaluations=2000,
        lower=np.array([-np.inf, -np.inf, 0.0, 0.0, -np.inf]),
        upper=np.array([np.inf, np.inf, 1.0, np.inf, 1.0]),
    )
    assert run.value < 1e-6
    x = np.asarray(run.x)
    assert (np.abs(x) < 1e6).all()
    assert 0 <= x[2] <= 1


@pytest.mark.parametrize("bounds", [{}, {"lower": 0.0, "upper": 1.0}], ids=["free", "box"])
def test_sigma_is_that_of_the_noise_where_coordinates_are_as_wide_as_they_may_be(bounds):
    """It grew while their noise could not, until a plateau was asked for at NaN."""
    points = []

    def fun(x, weights):
        points.append(np.array(x, np.float64))
        return float(weights @ np.round(8 * points[-1]) ** 2)

    start = jnp.array([0.5, 0.5])
    host = px.host_function(fun, like=0.0)
    # The function depends on neither coordinate, or on the first.
    for weights in np.float32([[0, 0], [1, 0]]):
        points.clear()
        run = quiet(host, start, jax.random.key(0), args=(weights,), max_evaluations=1600, **bounds)
        last = np.array(points[slice(*run.history.evaluations[-2:])])
        widths = np.linalg.svd(last - last.mean(axis=0), compute_uv=False) / np.sqrt(len(last))
        assert np.isfinite(points).all()
        np.testing.assert_allclose(np.log(run.history.sigma[-1]), np.log(widths).mean(), atol=0.7)


def test_a_narrow_coordinate_does_not_end_the_run():
    """By the noise of all coordinates on average sigma was lost in rounding, at a value of 7."""
    x0 = jnp.array([1000, 0.5, 0.5, 0.5, 0.5], jnp.float32)
    ends = np.array([[-2000, *[0.5 - 1e-4] * 4], [2000, *[0.5 + 1e-4] * 4]])
    run = quiet(
        distance, x0, jax.random.key(0), args=(np.float32(1010), np.float32(1)),
        max_evaluations=1000, lower=ends[0], upper=ends[1],
    )  # fmt: skip
    assert run.value < 1e-3


def test_has_no_derivatives():
    """They were zero, without a word."""

    def lowest(shift):
        return quiet(lambda x: staircase(x - shift), jnp.zeros(2), jax.random.key(0)).x.sum()

    for derive in (jax.grad, jax.jacfwd):
        with pytest.raises(NotImplementedError, match="stop_gradient"):
            derive(lowest)(1.0)


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_a_run_shows_that_it_has_begun_before_its_first_step_is_over(has_tqdm, monkeypatch, capsys):
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(_progress, "_SILENT", 0.0)
    monkeypatch.setattr(_progress, "_BETWEEN_LINES", 0.0)
    telling = _progress.Telling(True, 100)
    telling.begin()
    telling._timer.join(10)
    begun = capsys.readouterr().err
    time.sleep(0.2)  # more than a bar waits between two looks
    telling.tell(30, 1.5, 0.25)
    then = capsys.readouterr().err
    telling.close()
    assert "compiling" in begun
    assert "0 of 100" in begun or "0/100" in begun
    assert "30 of 100" in then or "30/100" in then
    assert "value 1.5, sigma 0.25" in then


@pytest.mark.parametrize("first", [0.5, 10.0], ids=["before the bar", "after it"])
def test_the_time_in_which_a_run_was_compiled_is_not_in_its_rate(first, monkeypatch, capsys):
    """Ten seconds of compiling were told as 1.4 evaluations a second and half an hour left."""
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    telling = _progress.Telling(True, 1000, clock)
    clock.now = min(first, 1.0)
    if first > 1.0:
        telling._appear_at_last()
    clock.now = first
    telling.tell(20, np.inf, 1.0)
    shown = capsys.readouterr().err
    assert "value -, sigma 1" in shown if first > 1.0 else not shown
    clock.now += 2.0
    telling.tell(220, -np.inf, 1.0)
    shown = capsys.readouterr().err
    telling.close()
    assert "220/1000" in shown
    assert "00:02<00:07, 100.00 evaluations/s, value -inf, sigma 1" in shown


def test_without_a_bar_a_value_that_is_not_there_yet_is_a_dash(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    clock = Clock()
    telling = _progress.Telling(True, 100, clock)
    for clock.now, evaluations in ((0.5, 10), (11.0, 20)):
        telling.tell(evaluations, np.inf, 0.25)
    assert capsys.readouterr().err.splitlines() == [
        "minimize: 10 of 100 evaluations",
        "minimize: 20 of 100 evaluations, value -, sigma 0.25",
    ]


class Clock:
    """Tells the time that it is set to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_program_without_standard_error_is_told_nothing(monkeypatch):
    """Such as one of pythonw, in which a run ended after a second."""
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(_progress, "_SILENT", 0.0)
    telling = _progress.Telling(True, 100)
    telling.begin()
    telling.tell(30, 1.5, 0.25)
    telling.close()


def test_no_key_is_used_twice_but_to_compare():
    def fun(key, x):
        return staircase(x) + jax.random.normal(key)

    options = {"takes_key": True, "optimizer": ADAM, "num_samples": 4, "max_evaluations": 1000}
    with jax.debug_key_reuse(True):
        run = quiet(fun, jnp.zeros(2), jax.random.key(0), **options)
    assert np.isfinite(run.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_start_on_a_bound_that_is_rounded(dtype):
    """The nearest number to 0.7 in single precision is below 0.7: half of all were refused."""
    x0 = jnp.full(2, 0.7, dtype)
    options = {"max_evaluations": 32, "num_samples": 4, **QUICK}
    run = quiet(staircase, x0, jax.random.key(0), lower=0.7, upper=3.0, **options)
    assert np.all(np.asarray(run.x) >= np.asarray(0.7, dtype))


class Scaled:
    """Normal noise of another width, which cannot be hashed, as one with an array cannot."""

    __hash__ = None

    def __init__(self, width):
        self.width = jnp.asarray(width)

    def sample(self, key, sample_shape=(), dtype=float):
        return self.width * jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return px.Normal().log_prob(inputs / self.width) - jnp.log(self.width)


class Moved:
    """Noise whose mean is an array, of which no polynomial's mean follows."""

    mean, variance = jnp.zeros(()), 1.0
    sample, log_prob = px.Normal().sample, px.Normal().log_prob


class Several(px.Independent):
    """A sampler that knows no group of one sample, which nobody asked for."""

    def group_size(self, num_samples, dim):
        assert num_samples > 1
        return super().group_size(num_samples, dim)


class Frame:
    """A table of another library, which has no dtype."""

    def __array__(self, dtype=None, copy=None):
        return np.zeros(2, dtype)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"x0": jnp.zeros(2, jnp.int32)}, TypeError, "fun rounds"),
        ({"x0": {"a": jnp.zeros(2), "b": 3}}, TypeError, "args="),
        ({"x0": Frame()}, TypeError, r"is a Frame: convert it, jnp.asarray\(x0\); or"),
        ({"x0": object()}, TypeError, r"leaf 'x0' is an object: hand it to fun by args="),
        ({"x0": (jnp.zeros(2), jax.random.key(0))}, TypeError, "PRNG key: hand that .*takes_key"),
        ({"x0": jnp.zeros(2, complex)}, TypeError, "split it into its real"),
        ({"x0": jnp.zeros((0, 3))}, ValueError, "no coordinates"),
        ({"x0": jnp.array([jnp.nan])}, ValueError, "finite"),
        ({"lower": 1.0}, ValueError, "x0 must lie between"),
        ({"lower": 1.0, "upper": 0.0}, ValueError, "lower must be below upper"),
        ({"lower": jnp.zeros(3)}, ValueError, "does not broadcast"),
        ({"upper": "high"}, TypeError, "real numbers"),
        ({"upper": [1.0, 2.0]}, ValueError, r"structure of x0.*give an array"),
        ({"args": 3}, TypeError, "args must be a tuple"),
        ({"optimizer": 0.1}, TypeError, "optax"),
        ({"optimizer": optax.lbfgs()}, TypeError, "(?s)value_fn.*line search"),
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"sigma": -1.0}, ValueError, "sigma"),
        ({"sigma": {"a": 1.0}}, ValueError, "sigma has structure"),
        ({"sigma": jnp.ones(3)}, ValueError, "sigma of shape"),
        ({"sigma": jnp.eye(2)}, ValueError, "give optimizer, or a scale"),
        ({"sigma": lambda count: 0.0 * count}, ValueError, "sigma"),
        ({"sigma": lambda count: jnp.ones(3)}, ValueError, "sigma of shape"),
        (
            {"noise": px.Uniform(), "optimizer": optax.sgd(0.1)},
            ValueError,
            "good for no derivative",
        ),
        ({"degree": 1}, ValueError, "degree"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"max_evaluations": 20}, ValueError, "max_evaluations must be at least"),
        (
            {"max_evaluations": 20, "sampler": Several(), "optimizer": optax.sgd(0.1)},
            ValueError,
            "max_evaluations must be at least",
        ),
        ({"max_evaluations": 1e4}, TypeError, r"must be an int, got float .*int\(10000.0\)"),
        ({"fun": lambda x: x}, ValueError, r"one real number, got float32\[2\]: return what"),
        ({"fun": lambda x: "f"}, TypeError, "one real number, got a str: return what"),
        ({"fun": lambda x: None}, TypeError, "one real number, got nothing: return what"),
        (
            {"fun": lambda x: 1j * x[0]},
            TypeError,
            r"one real number, got complex64\[\]: return its",
        ),
        ({"fun": lambda key, x: x[0]}, TypeError, r"as fun\(x\).*takes \(key, x\).*takes_key=True"),
        ({"fun": lambda key, x, a: x[0], "args": (3,)}, TypeError, r"fun\(key, x, \*args\), give"),
        ({"fun": lambda x: x[0], "takes_key": True}, TypeError, "leave it out"),
        ({"fun": lambda x, a, b: x[0]}, TypeError, r"takes \(x, a, b\): hand further"),
        (
            {"fun": lambda key, x: x[0], "args": (1,), "takes_key": True},
            TypeError,
            r"takes \(key, x\): leave out of args",
        ),
        ({"sigma": {"b": 1.0}}, ValueError, r"neither that of x0, "),
        ({"sigma": 1e-39}, ValueError, "rescale x0"),
        ({"args": (1, 2)}, TypeError, r"with 2 args, but takes \(x\): leave out of args"),
        ({"fun": 3}, TypeError, "callable"),
        ({"batch_size": [5]}, TypeError, "batch_size must be an int, got list"),
        ({"degree": [1], "optimizer": optax.sgd(0.1)}, TypeError, "degree must be None, 0, 1"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be None or a path.*got int"),
        (
            {"noise": Scaled(2.0), "degree": 1, "optimizer": optax.sgd(0.1)},
            ValueError,
            "degree=1 needs noise .* Scaled has none",
        ),
        (
            {"noise": Moved(), "degree": 1, "optimizer": optax.sgd(0.1)},
            ValueError,
            "degree=1 needs noise .* mean of Moved is an array: give a float",
        ),
        ({"sigma": lambda: 0.5}, TypeError, "(?s)0 positional.*called with the number of steps"),
        ({"checkpoint": "/no/such/folder/run"}, ValueError, "folder"),
    ],
)
def test_refused(options, error, words):
    options = {"fun": lambda x: jnp.sum(jnp.abs(x)), "x0": jnp.zeros(2), **options}
    with pytest.raises(error, match=words):
        quiet(options.pop("fun"), options.pop("x0"), jax.random.key(0), **options)


def test_noise_without_an_inverse_distribution_function():
    class Noise:
        def sample(self, key, sample_shape=(), dtype=float):
            return jax.random.normal(key, sample_shape, dtype)

        def log_prob(self, value):
            return -(value**2) / 2

    run = quiet(staircase, jnp.zeros(3), jax.random.key(0), noise=Noise(), max_evaluations=600)
    assert run.value == 0


def test_refused_under_a_trace(tmp_path):
    def run(x0):
        return quiet(staircase, x0, jax.random.key(0), checkpoint=tmp_path / "run")

    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(run)(jnp.zeros(2))


def test_a_checkpoint_that_goes_on_ends_in_the_same_bits(tmp_path, found):
    kept = tmp_path / "run"
    part = quiet(staircase, jnp.zeros(4), jax.random.key(0), max_evaluations=400, checkpoint=kept)
    assert part.num_evaluations < 401
    again = quiet(staircase, jnp.zeros(4), jax.random.key(0), max_evaluations=600, checkpoint=kept)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_holds_keys_of_an_optimizer(tmp_path):
    """What was read was an array of words."""
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.05))
    options = {**QUICK, "optimizer": noisy, "num_samples": 4}
    run = functools.partial(quiet, staircase, jnp.zeros(2), jax.random.key(0), **options)
    whole = run(max_evaluations=60)
    run(max_evaluations=40, checkpoint=tmp_path / "run")
    again = run(max_evaluations=60, checkpoint=tmp_path / "run")
    np.testing.assert_array_equal(again.history.smoothed_value, whole.history.smoothed_value)


def test_a_checkpoint_of_another_problem_is_refused(tmp_path):
    kept = tmp_path / "run"
    data = jnp.arange(4.0)

    def fun(x, data):
        return jnp.sum(jnp.round(x - data) ** 2)

    run = functools.partial(quiet, max_evaluations=200, checkpoint=kept, **QUICK)
    run(fun, jnp.zeros(4), jax.random.key(0), args=(data,))
    before = kept.read_bytes()
    for what, call in {
        "x0": lambda: run(fun, jnp.ones(4), jax.random.key(0), args=(data,)),
        "key": lambda: run(fun, jnp.zeros(4), jax.random.key(1), args=(data,)),
        "fun or its data": lambda: run(fun, jnp.zeros(4), jax.random.key(0), args=(data + 1,)),
        "num_samples": lambda: run(
            fun, jnp.zeros(4), jax.random.key(0), args=(data,), num_samples=7
        ),
        "sigma or tol": lambda: run(fun, jnp.zeros(4), jax.random.key(0), args=(data,), tol=1.0),
    }.items():
        with pytest.raises(ValueError, match=f"another problem: .*{what}"):
            call()
    kept.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="not one that minimize can read"):
        run(fun, jnp.zeros(4), jax.random.key(0), args=(data,))


def test_a_checkpoint_of_another_host_function_is_refused(tmp_path):
    """Of a function outside JAX a program has the name alone."""

    def around(target):
        def simulator(x):
            return np.float32(np.sum((x - target) ** 2))

        return px.host_function(simulator, like=0.0)

    run = functools.partial(quiet, max_evaluations=100, checkpoint=tmp_path / "run", **QUICK)
    first = run(around(1.0), jnp.zeros(3), jax.random.key(0))
    again = run(around(1.0), jnp.zeros(3), jax.random.key(0))
    np.testing.assert_array_equal(first.x, again.x)
    with pytest.raises(ValueError, match="another problem: fun or its data"):
        run(around(2.0), jnp.zeros(3), jax.random.key(0))


def jitted(data):
    return jax.jit(lambda x: jnp.sum(jnp.round(x - data) ** 2))


def called_back(call, data):
    def simulator(x):
        return np.float32(np.sum(np.round(x - data) ** 2))

    return lambda x: call(simulator, jax.ShapeDtypeStruct((), jnp.float32), x)


def with_a_lock(data):
    class Simulator:
        def __init__(self):
            self.data, self.lock = data, threading.Lock()

        def __call__(self, x):
            return np.float32(np.sum(np.round(x - self.data) ** 2))

    return px.host_function(Simulator(), like=np.float32(0))


pure_callback = functools.partial(jax.pure_callback, vmap_method="sequential")


@pytest.mark.parametrize(
    "make",
    [jitted, with_a_lock, functools.partial(called_back, pure_callback)],
    ids=["jitted", "with a lock", "called back"],
)
def test_a_checkpoint_of_other_data_is_refused(make, tmp_path):
    """It was not where a program's text does not have them, or the function had no name."""
    run = functools.partial(quiet, max_evaluations=60, checkpoint=tmp_path / "run", **QUICK)
    run(make(np.ones(3, np.float32)), jnp.zeros(3), jax.random.key(0))
    with pytest.raises(ValueError, match="another problem: fun or its data"):
        run(make(2 * np.ones(3, np.float32)), jnp.zeros(3), jax.random.key(0))


def with_own_derivatives(data):
    inner = jitted(data)
    forwards, backwards = jax.custom_jvp(inner), jax.custom_vjp(inner)
    forwards.defjvp(lambda x, dx: (inner(*x), inner(*dx)))
    backwards.defvjp(lambda x: (inner(x), None), lambda _, g: (g,))
    return lambda x: forwards(x) + backwards(x)


DATA_INSIDE = {
    "jit": jitted,
    "jit of jit": lambda data: jax.jit(lambda x: jitted(data)(x)),
    "jit of an array of JAX": lambda data: jitted(jnp.asarray(data)),
    "scan": lambda data: lambda x: jax.lax.scan(lambda c, _: (jitted(data)(x), c), 0.0, length=2),
    "cond": lambda data: lambda x: jax.lax.cond(x[0] > 0, jitted(data), jnp.sum, x),
    "while": lambda data: (
        lambda x: jax.lax.while_loop(lambda x: jitted(data)(x) > 1, lambda x: x / 2, x)
    ),
    "derivatives": with_own_derivatives,
    "pure_callback": functools.partial(called_back, pure_callback),
    "pure_callback in jit": lambda data: jax.jit(called_back(pure_callback, data)),
    "io_callback": functools.partial(called_back, io_callback),
}


@pytest.mark.parametrize("make", DATA_INSIDE.values(), ids=DATA_INSIDE)
def test_a_fingerprint_is_of_all_data_and_of_no_more(make):
    def found(middle):
        data = np.linspace(-1, 1, 5000, dtype=np.float32)
        data[2500] = middle  # where text has dots
        jaxpr = jax.make_jaxpr(make(data))(jnp.zeros(5000)).jaxpr
        return fingerprint((operations(jaxpr), called_in(jaxpr)))

    assert found(1.0) == found(1.0) != found(2.0)


def test_what_a_function_outside_jax_refers_to_is_no_error():
    chain = None
    for _ in range(2000):
        chain = [chain]
    gone = jnp.ones(3)
    gone.delete()
    assert known_by(lambda: chain) == known_by(lambda: chain) != known_by(lambda: [chain])
    assert known_by(lambda: gone) == known_by(lambda: gone)


def test_a_checkpoint_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    """It was noticed when the first was due. (To root, any folder is writable.)"""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    simulator = px.host_function(lambda x: np.float32(np.sum(x**2)), like=np.float32(0))
    message = r"checkpoint '.*run' cannot be written .*another path"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match=message):
            quiet(simulator, jnp.zeros(2), jax.random.key(0), checkpoint=tmp_path / "run")
    assert simulator.counts.evaluations == 0


def test_a_checkpoint_waits_for_who_has_the_file_open(tmp_path, monkeypatch):
    """On Windows a virus scanner denies for a moment that it is replaced."""
    place, replace, denied = tmp_path / "run", os.replace, []

    def sometimes(new, path):
        denied.append(path)
        if len(denied) % 3:
            raise PermissionError(13, "Access is denied")
        replace(new, path)

    monkeypatch.setattr(os, "replace", sometimes)
    monkeypatch.setattr(_checkpoint, "_WAITS", ())
    with pytest.raises(PermissionError):
        _checkpoint._save(place, {}, {"a": np.ones(2)})
    monkeypatch.setattr(_checkpoint, "_WAITS", (0.0, 0.0, 0.0))
    _checkpoint._save(place, {}, {"a": np.ones(2)})
    assert len(denied) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_for_which_there_is_no_space_leaves_the_one_before(tmp_path, monkeypatch):
    kept = tmp_path / "run"
    run = functools.partial(quiet, staircase, jnp.zeros(4), jax.random.key(0), checkpoint=kept)
    run(max_evaluations=400)
    before = kept.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as raised:
        run(max_evaluations=600)
    [note] = raised.value.__notes__
    assert f"checkpoint {os.fspath(kept)!r} could not be written" in note
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {kept: before}
    monkeypatch.undo()
    (tmp_path / "other").touch()
    assert kept.stat().st_mode == (tmp_path / "other").stat().st_mode
    kept.chmod(0o600)
    run(max_evaluations=600)
    assert kept.stat().st_mode & 0o777 == 0o600


def test_what_a_host_function_raises_arrives_as_it_is():
    def simulator(x):
        raise ArithmeticError("no solution")

    with pytest.raises(ArithmeticError, match="no solution"):
        quiet(px.host_function(simulator, like=0.0), jnp.zeros(2), jax.random.key(0))


def test_a_run_ended_by_kill_goes_on_and_ends_in_the_same_bits(tmp_path):
    kept = tmp_path / "run"
    program = Path(__file__).with_name("checkpoints.py")
    slow = {**os.environ, "SECONDS_AN_EVALUATION": "0.003"}  # so that there is time to kill it
    with subprocess.Popen([sys.executable, program, kept], env=slow) as killed:
        while not kept.exists():
            assert killed.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    assert kept.stat().st_size
    assert checkpoints.run(kept) == checkpoints.run()


def test_an_interrupt_keeps_the_run(tmp_path):
    kept = tmp_path / "run"

    def interrupt(progress):
        if progress.step == 10:
            raise KeyboardInterrupt

    run = functools.partial(
        quiet, staircase, jnp.zeros(4), jax.random.key(0), max_evaluations=600, checkpoint=kept
    )
    with pytest.raises(KeyboardInterrupt):
        run(callback=interrupt)
    seen = []
    run(callback=lambda progress: seen.append(progress.step))
    assert seen[0] == 11


def interrupted(run, countdown, monkeypatch):
    """Runs, and tells whether it was interrupted.

    It is at a line of its loop, so many of them after a block has asked for more samples; not where
    there are fewer before the next block.
    """
    called, before = _minimize.called, sys.gettrace()

    def interrupting(frame, event, _):
        nonlocal countdown
        countdown -= event == "line"
        if countdown == 0:
            raise KeyboardInterrupt
        return interrupting

    def counting(hosts, program, *args):
        found = called(hosts, program, *args)
        if program is block:
            sys._getframe(1).f_trace = interrupting
            sys.settrace((lambda *_: None) if found[0].wants_more else None)
        return found

    try:
        with monkeypatch.context() as patched:
            patched.setattr(_minimize, "called", counting)
            run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_keeps_the_run_whole(tmp_path, monkeypatch):
    """State, rows and number of samples were replaced one after another.

    JAX waits for a block where a number of it is looked at, between the two, so that most
    interrupts came there: rows of steps that were kept were NaN, or later steps were others.
    """
    run = functools.partial(
        quiet,
        lambda x: jnp.sum(jnp.sin(1000 * x)),
        jnp.ones(3),
        jax.random.key(2),
        optimizer=ADAM,
        sigma=1.0,
        max_evaluations=600,
    )
    whole = run()
    for number in itertools.count(1):
        kept = functools.partial(run, checkpoint=tmp_path / f"{number}")
        if not interrupted(kept, number, monkeypatch):
            break
        jax.tree.map(np.testing.assert_array_equal, kept(), whole)
    assert number > 10


def test_a_run_that_its_callback_ended_goes_on_from_its_checkpoint(tmp_path, found):
    """It stayed ended for good, so a callback could not divide a run among several jobs."""
    run = functools.partial(quiet, staircase, jnp.zeros(4), jax.random.key(0), max_evaluations=600)
    part = run(checkpoint=tmp_path / "run", callback=lambda progress: progress.step == 10)
    assert part.reason == "stopped by callback"
    again = run(checkpoint=tmp_path / "run")
    assert again.reason == found.reason == "max_evaluations reached"
    assert again.num_evaluations == found.num_evaluations
    np.testing.assert_array_equal(again.x, found.x)


def test_noise_is_not_stuck_at_a_width_at_which_bounds_hide_the_function():
    """With noise of half the range five of eight runs ended at values of 4 to 8."""

    def waves(x):
        return jnp.sum(10 * (x - 0.3) ** 2 + 1 - jnp.cos(12 * (x - 0.3)))

    @jax.jit
    @jax.vmap
    def value(key):
        return px.minimize(waves, jnp.zeros(6), key, max_evaluations=800, lower=-1, upper=1).value

    # Of other keys one run in a hundred ends in another dip.
    assert np.max(value(jax.random.split(jax.random.key(6), 8))) < 0.1


@dataclasses.dataclass(frozen=True)
class Drawn(px.Independent):
    """A sampler of a class that can be hashed, but for what it holds."""

    numbers: object = None


def test_what_programs_are_known_by_must_be_hashable():
    """JAX's own error was of a class that users never see."""
    for options, message in (
        ({"sampler": px.Sobol}, "sampler must be an instance, got the class Sobol"),
        ({"sampler": Drawn(numbers=jnp.ones(2))}, "sampler must be hashable.* make Drawn a frozen"),
    ):
        with pytest.raises(TypeError, match=message):
            quiet(staircase, jnp.zeros(2), jax.random.key(0), **options)


@pytest.mark.parametrize("optimizer", [None, optax.sgd(0.01)])
def test_a_users_noise_is_followed_where_it_changes(optimizer, tmp_path):
    """It was known by its hash, so that one by identity kept the numbers of its first run."""
    law, kept = Scaled(1.0), tmp_path / "kept"

    def found(noise, **options):
        options |= {"optimizer": optimizer, "sigma": 0.3, "num_samples": 16}
        options |= {"max_evaluations": 200}
        return quiet(staircase, jnp.zeros(3), jax.random.key(0), noise=noise, **options)

    first = found(law, checkpoint=kept)
    law.width = jnp.asarray(3.0)
    after, fresh = found(law), found(Scaled(3.0))
    np.testing.assert_array_equal(after.history.smoothed_value, fresh.history.smoothed_value)
    assert not np.array_equal(after.history.smoothed_value, first.history.smoothed_value)
    with pytest.raises(ValueError, match=r"another problem: .*noise"):
        found(law, checkpoint=kept)


@pytest.mark.parametrize("optimizer", [None, optax.sgd(0.01)])
def test_a_users_noise_under_transformations(optimizer):
    """By its hash, noise whose numbers are traced could not be told from others."""
    keys, widths = jax.random.split(jax.random.key(0)), jnp.array([0.5, 2.0])

    def value(key, width):
        options = {"optimizer": optimizer, "sigma": 0.3, "num_samples": 8, "max_evaluations": 120}
        return px.minimize(
            staircase, jnp.zeros(2), key, noise=Scaled(width), progress=False, **options
        )

    both = jax.vmap(value)(keys, widths).history.smoothed_value
    for i in range(2):
        one = value(keys[i], widths[i]).history.smoothed_value
        # Rounded otherwise, a fit differs; those of the two widths differ by factors.
        np.testing.assert_allclose(both[i, : len(one)], one, rtol=1e-2)
    assert np.max(np.abs(both[0] / both[1] - 1)[: len(one)]) > 0.5
    with pytest.raises(NotImplementedError, match="no derivatives"):
        jax.grad(lambda width: value(keys[0], width).value)(1.0)
