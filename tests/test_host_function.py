"""Functions outside JAX: what they see and return, where they run, what becomes of faults.

Most tests compare with the same function written in JAX, or with a loop over the points.
"""

import concurrent.futures
import contextlib
import copy
import functools
import gc
import io
import itertools
import math
import multiprocessing
import os
import pickle
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from typing import Any, NamedTuple

import distributed
import jax
import jax.numpy as jnp
import loky
import numpy as np
import pytest
import tqdm

import perturbax as px
from helpers import assert_trees_close
from perturbax.host_functions import _processes, _worker
from perturbax.host_functions._attempts import Attempt
from perturbax.host_functions._call_back import CallBack
from perturbax.host_functions._foreign_executors import Foreign, _Place
from perturbax.host_functions._progress import Bar
from perturbax.host_functions._scheduling import Schedule
from perturbax.tracing import _host_exceptions
from test_trace import compilations

KEY = jax.random.key(0, impl="threefry2x32")
X = jnp.array([0.25, -1.0, 2.0])
ONE = jax.ShapeDtypeStruct((), jnp.float32)


def steps(x):
    """A function of numpy arrays alone."""
    assert isinstance(x, np.ndarray)
    return np.rint(2 * x).sum() + 0.5 * x[0] * x[1]


def steps_in_jax(x):
    return jnp.rint(2 * x).sum() + 0.5 * x[0] * x[1]


def smooth(fun, num_samples=12, **settings):
    return px.make_perturbed_fun(fun, num_samples, 0.5, px.Normal(), **settings)


def counts(h):
    return h.counts.evaluations


# --- What it sees and what comes back


def described(x, *args, **kwargs):
    """Shapes, dtypes and types of all leaves, as the function sees them."""
    seen.append(
        jax.tree.map(lambda v: (type(v), np.shape(v), np.asarray(v).dtype.name), (x, args, kwargs))
    )
    return {"sum": float(sum(np.sum(v) for v in jax.tree.leaves(x))), "n": 3, "flag": True}


seen = []


def test_the_function_sees_numpy_and_any_pytree():
    seen.clear()
    x = {"w": X, "b": jnp.float16(2.0), "n": np.array([1, 2]), "flags": (True, jnp.array([False]))}
    h = px.host_function(described)
    result = h(x, 3, name="a", scale=jnp.ones(2))
    sees = {
        "w": (np.ndarray, (3,), "float32"),
        "b": (np.float16, (), "float16"),
        "n": (np.ndarray, (2,), "int32"),
        "flags": ((np.bool_, (), "bool"), (np.ndarray, (1,), "bool")),
    }
    scale = (np.ndarray, (2,), "float32")
    three = (np.int32, (), "int32")
    assert seen == [(sees, (three,), {"name": (str, (), "str32"), "scale": scale})]
    assert {k: v.dtype.name for k, v in result.items()} == {
        "sum": "float32",
        "n": "int32",
        "flag": "bool",
    }
    jitted = jax.jit(lambda x, s: h(x, 3, name="a", scale=s))
    assert_trees_close(jitted(x, jnp.ones(2)), result)
    assert seen[0] == seen[1]
    assert float(result["sum"]) == 1.25 + 2 + 3 + 1


@pytest.mark.parametrize("settings", [{}, {"executor": 3}], ids=["serial", "threads"])
def test_transformations(settings):
    """jit, nested vmaps of every kind, and scan, against the same function in JAX."""
    h = px.host_function(lambda x, y: steps(x) * y, like=ONE, **settings)

    def in_jax(x, y):
        return steps_in_jax(x) * y

    xs = np.float32(np.random.default_rng(0).normal(size=(2, 5, 3)))
    ys = np.float32([1, 2])

    def nested(f):
        inner = jax.vmap(f, (0, None))
        over_both = jax.vmap(inner, (0, 0))
        outside = jax.vmap(jax.vmap(f, (None, 0)), (0, None))
        transposed = jax.vmap(jax.vmap(f, (1, None), 0), (2, None), 1)
        three = jax.vmap(over_both, (None, 0))
        return lambda xs, ys: (
            f(xs[0, 0], ys[0]),
            over_both(xs, ys),
            outside(xs[0], ys),
            transposed(jnp.moveaxis(xs, -1, 0), 2.0),
            three(xs, jnp.stack([ys, ys + 1, ys + 2])),
            jax.lax.scan(lambda c, x: (c + 1, f(x, c)), 1.0, xs[0])[1],
            jax.lax.map(lambda x: f(x, 1.0), xs[0], batch_size=2),
        )

    expected = jax.jit(nested(in_jax))(xs, ys)
    assert_trees_close(nested(h)(xs, ys), expected, rtol=1e-6)
    assert_trees_close(jax.jit(nested(h))(xs, ys), expected, rtol=1e-6)


@pytest.mark.parametrize("executor", [None, 3])
def test_batched_functions_have_one_leading_axis(executor):
    shapes = []

    def batch(x, scale):
        shapes.append((x["a"].shape, x["n"].shape, scale.shape))
        return np.sum(x["a"], axis=-1) * x["n"] * scale

    h = px.host_function(batch, batched=True, executor=executor)
    x = {"a": np.arange(24, dtype=np.float32).reshape(2, 4, 3), "n": np.arange(4)}
    f = jax.vmap(jax.vmap(h, ({"a": 0, "n": 0}, None)), ({"a": 0, "n": None}, None))
    h({"a": X, "n": 1}, 2.0)
    result = jax.jit(f)(x, 3.0)
    np.testing.assert_allclose(result, x["a"].sum(-1) * x["n"] * 3.0)
    assert shapes[0] == ((1, 3), (1,), (1,))
    sizes = [a[0] for a, *_ in shapes[1:]]
    assert sum(sizes) == 8
    assert len(sizes) == (executor or 1)
    assert all(
        a == (m, 3) and n == s == (m,) for (a, n, s), m in zip(shapes[1:], sizes, strict=True)
    )


@pytest.mark.parametrize("batched", [False, True])
def test_what_the_function_sees_is_its_own_to_keep(batched):
    """Memory of JAX's ends with the call back."""
    kept = []

    def fun(x, y):
        kept.extend([x, y])
        return x.sum(axis=-1)

    h = px.host_function(fun, like=ONE, batched=batched)
    jax.vmap(h, (0, None))(np.ones((3, 2), np.float32), np.ones(2, np.float32))
    assert len(kept) == (2 if batched else 6)
    for array in kept:
        while isinstance(array.base, np.ndarray):
            array = array.base
        assert array.flags.owndata


def test_what_the_function_sees_may_be_changed_in_place():
    """A batch of one point could not. What many points share cannot either: it is there once."""

    def sort(x, y):
        x.sort(axis=-1)
        y *= 2
        return (x * y).sum(axis=-1)

    xs, y = jnp.array([[2.0, 1.0], [4.0, 3.0]]), jnp.array([1.0, 10.0])
    for settings in ({}, {"batched": True}, {"batched": True, "executor": 2}):
        h = px.host_function(sort, like=ONE, **settings)
        assert float(h(xs[0], y)) == 42.0
        np.testing.assert_array_equal(jax.vmap(h)(xs, jnp.stack([y, y])), [42.0, 86.0])
    with pytest.raises(ValueError, match="read-only"):
        jax.vmap(h, (0, None))(xs, y)
    np.testing.assert_array_equal([xs[0], y], [[2.0, 1.0], [1.0, 10.0]])


@pytest.mark.parametrize("batch_size", [None, 5])
def test_derivatives_are_those_of_the_function_in_jax(batch_size):
    """And each estimate of a value with all its derivatives evaluates each sample once."""
    h = px.host_function(steps, executor=4, like=ONE)
    g, in_jax = (smooth(f, 40, batch_size=batch_size) for f in (h, steps_in_jax))
    value_and_grad, hessian = (
        lambda g: jax.jit(jax.value_and_grad(g, 1)),
        lambda g: jax.jit(jax.hessian(g, 1)),
    )
    for transform in (value_and_grad, hessian) if batch_size is None else (value_and_grad,):
        before = counts(h)
        found, expected = transform(g)(KEY, X), transform(in_jax)(KEY, X)
        assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)
        assert counts(h) - before == 40


def test_all_samples_arrive_together():
    batches = []

    def batch(x):
        batches.append(len(x))
        return x.sum(axis=1)

    h = px.host_function(batch, batched=True, like=ONE)
    jax.jit(jax.grad(smooth(h, 64), 1))(KEY, X)
    jax.vmap(lambda x: smooth(h, 64)(KEY, x))(jnp.stack([X, X]))
    # In more coordinates than fit into a chunk, still enough for all workers.
    wide = px.host_function(batch, batched=True, like=ONE, executor=8)
    smooth(wide, 128, use_baseline=False)(KEY, jnp.zeros(40_000))
    assert batches == [64, 128, *[4] * 32][: len(batches)]
    assert sum(batches[2:]) == 128


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_without_an_executor_calls_never_overlap(timeout):
    """Programs on several devices call from a thread each."""
    under_way, most = [], []

    def fun(x):
        under_way.append(x)
        most.append(len(under_way))
        time.sleep(0.01)
        under_way.pop()
        return x.sum()

    h = px.host_function(fun, like=ONE, timeout=timeout)
    program = jax.jit(jax.vmap(h))
    program(jnp.ones((4, 3)))
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda v: np.asarray(program(v)), [jnp.ones((4, 3))] * 3))
    np.testing.assert_array_equal(found, np.full((3, 4), 3.0))
    assert len(most) == 16
    assert max(most) == 1


def test_layers_take_host_functions():
    def first(scores):
        return np.eye(3, dtype=np.float32)[np.argmax(scores)]

    def first_in_jax(scores):
        return jax.nn.one_hot(jnp.argmax(scores), 3)

    scores = np.float32([0.3, 0.1, 0.7])
    argmax, loss = px.make_perturbed_argmax, px.make_fenchel_young_loss
    for make, args in ((argmax, ()), (loss, (scores,))):
        host, in_jax = (make(f, num_samples=20) for f in (px.host_function(first), first_in_jax))
        for layer in (host, lambda *v, f=host: jax.jit(f)(*v)):  # the second one knows the result
            assert_trees_close(layer(KEY, scores, *args), in_jax(KEY, scores, *args), rtol=1e-5)
    found, expected = (jax.jit(jax.grad(f, 1))(KEY, scores, scores) for f in (host, in_jax))
    assert_trees_close(found, expected, rtol=1e-5)


def test_eager_calls_compile_once():
    h = px.host_function(lambda x, seed: steps(x) + seed, executor=2)

    def gradient(seed):  # an integer further on would be a part of the program
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.grad(smooth(lambda x: h(x, seed), use_baseline=False), 1)(key, X)

    gradient(0)
    assert compilations(lambda: gradient(1)) == 0


def test_programs_do_not_hang_on_large_arrays():
    """On one core, jax.pure_callback does, while it makes a JAX array of its argument."""
    program = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, numpy as np, perturbax as px
h = px.host_function(lambda x: x.sum(), like=np.float32(0))
f = jax.jit(lambda x: h(jnp.cos(x)) + jax.vmap(h)(jnp.stack([x * 2, jnp.sin(x)])).sum())
for i in range(5):
    total = f(jnp.full(1_000_000, 1.0 * i))
print(float(total))
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    expected = 1e6 * (np.cos(4) + np.sin(4) + 8)
    assert float(run.stdout) == pytest.approx(expected, rel=1e-3)


# --- like


def test_like_is_asked_for_once_and_under_a_trace_needed():
    h = px.host_function(lambda x: {"a": x * 2, "b": 1.5})
    with pytest.raises(ValueError, match=r"called under a trace.*like=jax.ShapeDtypeStruct"):
        jax.jit(h)(X)
    assert counts(h) == 0
    # Under an eager vmap and an eager derivative, one point is asked for.
    jax.vmap(jax.grad(lambda x: smooth(lambda y: h(y)["b"], 6, degree=0)(KEY, x)))(jnp.ones((4, 3)))
    assert counts(h) == 1 + 4 * 7
    assert jax.jit(h)(X)["a"].shape == (3,)
    with pytest.raises(ValueError, match="called under a trace"):
        jax.jit(h)(jnp.ones(4))


LIKES = {
    "other shape": (lambda x: x, 0.0, ValueError, [r"shape \(3,\), expected \(\)"]),
    "other structure": (lambda x: (1.0, 2.0), 0.0, TypeError, ["structure", "like"]),
    "number for an integer": (lambda x: 1.5, 0, TypeError, ["float64", "int64", "like="]),
    "integer too large": (lambda x: 300, np.uint8(0), OverflowError, ["300", "uint8"]),
    "integer too large for JAX": (lambda x: 2**40, 0, OverflowError, ["1099511627776", "int32"]),
    "string": (lambda x: "a", 0.0, TypeError, ["must return numbers", "'a'", "str"]),
    "None": (lambda x: None, 0.0, TypeError, ["returned None", "`return` missing"]),
    "keys of two types": (
        lambda x: {"a": 1.0, 3: 1.0},
        0.0,
        TypeError,
        ["must return a pytree", "keys of a dict one type"],
    ),
    "object": (lambda x: np.array([None]), 0.0, TypeError, ["must return numbers", "object"]),
    "masked": (
        lambda x: np.ma.masked_array([1.0], [True]),
        np.zeros(1),
        TypeError,
        ["masked entries", r"leaf\.filled"],
    ),
    "jax.Array": (lambda x: X, X, TypeError, ["jax.Array", "numpy", "24255"]),
}


@pytest.mark.parametrize("name", LIKES)
def test_results_that_do_not_fit(name):
    fun, like, error, parts = LIKES[name]
    h = px.host_function(fun, like=like, on_failure=1)
    with pytest.raises(error) as caught:
        h(X)
    for part in parts:
        caught.match(part)


def test_results_are_cast():
    like = {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "b": np.float32(0), "c": np.int8(0)}
    h = px.host_function(
        lambda x: {"a": [1.0, 2.0] @ np.eye(2), "b": np.longdouble(1), "c": 7}, like=like
    )
    result = jax.jit(h)(X)
    assert {k: v.dtype.name for k, v in result.items()} == {
        "a": "bfloat16",
        "b": "float32",
        "c": "int8",
    }
    np.testing.assert_array_equal([*result["a"], result["b"], result["c"]], [1, 2, 1, 7])


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i4", ">c8", ">f16"])
def test_results_of_another_byte_order_are_the_same_numbers(dtype):
    """JAX refused them with an error of its own."""
    for like in (None, np.zeros(3, dtype)):
        h = px.host_function(lambda x: np.rint(x).astype(dtype), like=like)
        np.testing.assert_array_equal(h(X), np.rint(X))


# --- Errors


def above(x):
    if x[0] > 0.6:
        raise KeyError("my own") from OSError("the reason")
    return x.sum()


def raised(run, kind=KeyError):
    with pytest.raises(kind, match="my own") as caught:
        run()
    return caught


@pytest.mark.parametrize("executor", [None, 2])
def test_exceptions_are_the_users_own(executor):
    h = px.host_function(above, executor=executor)
    g = smooth(h, 64)
    for run in (
        lambda: h(X + 1),
        lambda: jax.vmap(h)(jnp.stack([X, X + 1, X])),
        lambda: g(KEY, X),
        lambda: jax.grad(g, 1)(KEY, X),
        lambda: jax.vmap(lambda x: jax.grad(g, 1)(KEY, x))(jnp.ones((2, 3))),
        lambda: px.estimate(smooth(h, 64), KEY, X),
    ):
        error = raised(run).value
        assert isinstance(error.__cause__, OSError)
        assert any("at the point x = array([" in note for note in error.__notes__)
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        assert frames[-1] == "above"


def test_an_exception_under_jit_is_told_in_full():
    h = px.host_function(above, like=ONE)
    f = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, h(x)), 0.0, xs))
    f(jnp.zeros((3, 3)))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as caught:
        jax.block_until_ready(f(jnp.stack([X, X + 1])))
    for part in ("KeyError: 'my own'", "OSError: the reason", "in above", r"x = array\(\[1.25"):
        caught.match(part)


def test_jax_inside_is_refused():
    """Before it can hang."""
    with concurrent.futures.ThreadPoolExecutor(1) as own:
        for executor in (None, 1, own):
            h = px.host_function(lambda x: float(jnp.sum(x)), executor=executor, like=ONE)
            with pytest.raises(TypeError, match=r"a JAX operation.*ProcessWorkers"):
                h(X)
            with pytest.raises(TypeError, match=r"a JAX operation"):
                smooth(h, 6, use_baseline=False)(KEY, X)
    assert float(jnp.sum(X)) == 1.25  # out here all is as it was


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"fun": 3}, TypeError, ["fun must be callable"]),
        ({"fun": px.host_function(steps)}, TypeError, ["host function already"]),
        ({"executor": 0}, ValueError, ["executor must be >= 1"]),
        (
            {"executor": "loky"},
            TypeError,
            ["executor must be", "loky.get_reusable_executor", "perturbax[loky]"],
        ),
        ({"executor": True}, TypeError, ["executor must be an int, got bool"]),
        ({"timeout": 0.0}, ValueError, ["timeout must be None or a positive number"]),
        ({"timeout": "5"}, TypeError, ["timeout must be None or a positive number", "'5'"]),
        ({"retries": -1}, ValueError, ["retries must be >= "]),
        ({"on_failure": "drop"}, ValueError, ["on_failure", "'missing'", "'drop'"]),
        ({"on_failure": "missing", "like": 1}, TypeError, ["missing", "NaN", "int64"]),
        (
            {"on_failure": (1.0, 2.0), "like": 1.0},
            ValueError,
            ["on_failure", "pytree like the result"],
        ),
        ({"on_failure": 0.5, "like": 1}, TypeError, ["on_failure", "float64", "int64"]),
        ({"like": "float"}, TypeError, ["like must be", "'float'"]),
        ({"batched": 1}, TypeError, ["batched must be a bool"]),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, parts):
    with pytest.raises(error) as caught:
        px.host_function(**{"fun": steps, **arguments})
    for part in parts:
        assert part in str(caught.value)


def test_bad_calls():
    h = px.host_function(steps)
    with pytest.raises(TypeError, match=r"PRNG key.*key_data"):
        h(KEY)
    with pytest.raises(ValueError, match=r"must have a leading axis.*got shape \(\)"):
        px.host_function(np.sum, batched=True)(X)
    with pytest.raises(TypeError, match="takes pytrees of arrays, numbers and strings"):
        h(X, object())
    with pytest.raises(NotImplementedError, match=r"steps is a host function.*make_perturbed_fun"):
        jax.grad(h)(X)
    scaled = px.host_function(lambda x, t: steps(x) * t)
    with pytest.raises(NotImplementedError, match="stop_gradient"):
        jax.grad(lambda t: smooth(scaled)(KEY, X, t))(2.0)
    with pytest.raises(TypeError, match=r"steps cannot be pickled; .* make a host function of it"):
        pickle.dumps(smooth(h))
    held = jax.grad(lambda x: smooth(scaled)(KEY, x, jax.lax.stop_gradient(2.0)))(X)
    assert_trees_close(held, jax.grad(lambda x: 2.0 * smooth(steps_in_jax)(KEY, x))(X), rtol=1e-5)


def test_it_is_copied_as_a_function_is():
    """That of a model with one inside raised what pickling it does."""
    h = px.host_function(steps, like=ONE)
    assert copy.copy(h) is h
    assert copy.deepcopy(smooth(h)).fun is h


def test_forking_executors_are_refused():
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("fork")
    ) as executor:
        with pytest.raises(ValueError, match=r"forks this process.*forkserver"):
            px.host_function(steps, executor=executor)


def test_the_bar(monkeypatch):
    """Of points, failures and retries, where a call takes more than a second."""
    bars = []

    class Bar:
        def __init__(self, *, total, desc, **rest):
            self.n, self.start_t, self.told, self.total, self.desc = 0, 0.0, [], total, desc
            bars.append(self)

        def set_postfix(self, **told):
            self.told.append((told["failures"], told["retries"]))

        def update(self, more):
            self.n += more

        def close(self):
            self.total = f"{self.n} of {self.total}"

    def fun(x):
        if x[0] < 0:
            raise ValueError
        return x.sum()

    monkeypatch.setattr("perturbax.host_functions._progress._tqdm", lambda: Bar)
    h = px.host_function(fun, like=ONE, executor=2, on_failure=0.0, retries=1, progress=True)
    jax.vmap(h)(jnp.ones((5, 3)))
    assert not bars
    monkeypatch.setattr("perturbax.host_functions._progress._PATIENCE", 0.0)
    jax.vmap(h)(jnp.array([[1.0], [-1.0], [2.0]]))
    [bar] = bars
    assert (bar.desc, bar.total, bar.told[-1]) == ("fun", "3 of 3", (1, 1))
    h.close()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install 'perturbax\[progress\]'"):
        px.host_function(fun, progress=True)


def test_no_bar_where_there_is_no_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr("perturbax.host_functions._progress._PATIENCE", 0.0)
    bar = Bar(True, "fun", 10)
    bar.update(3, px.host_function(lambda x: x).counts)
    assert bar._bar is None
    assert bar.interval == math.inf


def test_the_first_rate_on_the_bar_is_that_of_the_work(monkeypatch):
    """It was that of all points so far in the time since the bar was drawn."""
    drawn = functools.partial(tqdm.tqdm, file=io.StringIO())
    monkeypatch.setattr("perturbax.host_functions._progress._tqdm", lambda: drawn)
    monkeypatch.setattr("perturbax.host_functions._progress._PATIENCE", 0.3)
    rates, counts = [], px.host_function(lambda x: x).counts
    bar = Bar(True, "fun", 10)
    for done, pause in ((3, 0.31), (4, 0.11)):
        time.sleep(pause)
        bar.update(done, counts)
        rates.append(bar._bar.format_dict["rate"])
    bar.close()
    assert 0 < min(rates)
    assert max(rates) <= 10


# --- Faults


def test_failures_in_place():
    """A number, a pytree and NaN instead of an exception; the other points are as they were."""
    xs = jnp.stack([X, X + 1, X - 1])
    expected = np.array([above(np.asarray(X)), -7.0, above(np.asarray(X) - 1)], np.float32)
    for executor in (None, 2):
        for settings in ({}, {"batched": True}):
            fun = above if not settings else lambda x: np.array([above(v) for v in x])
            for value in (-7.0, np.float32(-7.0), "missing"):
                h = px.host_function(
                    fun, like=ONE, on_failure=value, retries=1, executor=executor, **settings
                )
                wanted = expected.copy()
                wanted[1] = np.nan if value == "missing" else -7.0
                np.testing.assert_array_equal(jax.vmap(h)(xs), wanted)
                assert h.counts.failures == h.counts.retries == 1
                assert counts(h) == 2


@pytest.mark.parametrize(
    ("on_failure", "like"),
    [
        (1, "like=0.0), if it returns one number"),
        (2j, "like=0j), if it returns one number"),
        (np.ones(2), "like=np.full((2,), 0.0)), if it returns an array"),
        ({"a": 1.0}, "like=...)"),
        ("missing", "like=...)"),
    ],
    ids=str,
)
def test_a_failure_at_the_first_point_tells_which_like_to_give(on_failure, like):
    with pytest.raises(ValueError, match="failed at the first point") as caught:
        px.host_function(above, on_failure=on_failure)(X + 1)
    assert str(caught.value).split("host_function(..., ")[1].startswith(like)


@pytest.mark.parametrize(("on_failure", "like"), [(1, 0.0), (np.ones(2), np.full((2,), 0.0))])
def test_the_like_that_is_told_serves(on_failure, like):
    found = px.host_function(above, on_failure=on_failure, like=like)(X + 1)
    np.testing.assert_array_equal(found, on_failure)


def test_a_batch_with_a_failure_is_halved_until_the_point_is_found():
    def batch(x):
        if np.any(x == 3):
            raise ValueError("three")
        return x

    h = px.host_function(batch, like=ONE, batched=True)
    with pytest.raises(ValueError, match="three") as caught:
        jax.vmap(h)(jnp.arange(4.0))
    assert any("(3 of 4 points had been evaluated)" in note for note in caught.value.__notes__)
    assert h.counts == (3, 0, 1, 0, 0)


def test_flaky_points_are_retried():
    """So that estimates are those without faults, bit by bit; each point counts once."""
    rng, lock, attempts = np.random.default_rng(0), threading.Lock(), []

    def flaky(x):
        with lock:
            attempts.append(x)
            fails = rng.random() < 0.2
        if fails:
            raise ConnectionError("try again")
        return steps(x)

    h = px.host_function(flaky, executor=4, retries=20, like=ONE)
    expected = jax.value_and_grad(smooth(px.host_function(steps, like=ONE), 200), 1)(KEY, X)
    found = jax.value_and_grad(smooth(h, 200), 1)(KEY, X)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert counts(h) == 200
    assert h.counts.retries == len(attempts) - 200 > 10


def test_hung_threads_are_left_behind_and_replaced():
    release, before = threading.Event(), threading.active_count()

    def hangs(x):
        if x[0] > 0.6:
            release.wait()
        return x.sum()

    own = concurrent.futures.ThreadPoolExecutor(2)
    for executor in (2, own):
        h = px.host_function(hangs, like=ONE, executor=executor, timeout=0.05, on_failure=-1.0)
        found = jax.vmap(h)(jnp.stack([X + 1] * 5 + [X]))
        np.testing.assert_array_equal(found, [-1.0] * 5 + [1.25])
        assert h.counts.timeouts == h.counts.failures == 5
        h.close()
    release.set()
    own.shutdown()
    wait_for(lambda: threading.active_count() <= before)


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("executor", [None, 1, "pool"])
def test_a_timeout_error_of_the_functions_own_is_a_failure_as_any_other(executor, timeout):
    """It was counted as an attempt that took longer than `timeout`, without one too."""

    def fun(x):
        raise TimeoutError("the service did not answer")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        executor = pool if executor == "pool" else executor
        with px.host_function(fun, like=ONE, executor=executor, timeout=timeout, retries=1) as h:
            with pytest.raises(TimeoutError, match="the service did not answer"):
                h(X)
            assert h.counts == (0, 0, 1, 1, 0)


def test_what_ended_in_time_has_not_taken_too_long(monkeypatch):
    """It had where it waited for what came before it to be written to a journal, for one."""
    accept = CallBack.accept

    def slow(back, rows, value):
        time.sleep(0.5)
        accept(back, rows, value)

    monkeypatch.setattr(CallBack, "accept", slow)
    with px.host_function(np.sum, like=ONE, executor=2, timeout=0.3, on_failure=-1.0) as h:
        np.testing.assert_array_equal(jax.vmap(h)(jnp.arange(3.0)), [0.0, 1.0, 2.0])
        assert h.counts == (3, 0, 0, 0, 0)


def test_too_many_hung_threads_are_an_error(monkeypatch):
    """It was hidden by a StopIteration, ten seconds later."""
    monkeypatch.setattr("perturbax.host_functions._crew.MOST_LEFT_BEHIND", 1)
    monkeypatch.setattr("perturbax.host_functions._scheduling._GRACE", 0.0)
    release = threading.Event()

    def hangs(x):
        release.wait(20.0)
        return x.sum()

    with px.host_function(hangs, like=ONE, executor=1, timeout=0.05, on_failure=-1.0) as h:
        with pytest.raises(RuntimeError, match=r"^\d evaluations hang in threads.*ProcessWorkers"):
            jax.vmap(h)(jnp.ones((4, 3)))
    release.set()


def test_what_goes_wrong_after_an_error_does_not_hide_it(monkeypatch):
    """A result of a wrong shape was raised in its place, and the thread of what hung was lost."""
    monkeypatch.setattr("perturbax.host_functions._scheduling._GRACE", 0.5)
    begun, raises, release = threading.Barrier(3), threading.Event(), threading.Event()

    def fun(x):
        if x < 3:
            begun.wait(20.0)
        if x == 0:
            raises.set()
            raise ArithmeticError("my own")
        if x == 1:
            raises.wait(20.0)
            time.sleep(0.1)
            return np.zeros(2)
        if x == 2:
            release.wait(60.0)
        if x > 2:  # takes all three threads
            begun.wait(20.0)
        return x

    with px.host_function(fun, like=ONE, executor=3) as h:
        with pytest.raises(ArithmeticError, match="my own"):
            jax.vmap(h)(jnp.arange(3.0))
        np.testing.assert_array_equal(jax.vmap(h)(jnp.arange(3.0, 6.0)), [3, 4, 5])
        release.set()


@pytest.mark.parametrize("pool", [False, True])
def test_ctrl_c_begins_nothing_more(pool, monkeypatch):
    """Threads in place of those left behind took what was still in the queue."""
    begun, go_on, before = [], threading.Event(), threading.active_count()

    def fun(x):
        begun.append(x)
        go_on.wait(20.0)
        return x

    def interrupted(schedule):
        assert len(schedule._running) == 4
        wait_for(lambda: len(begun) == 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(Schedule, "_wait", interrupted)
    executor = concurrent.futures.ThreadPoolExecutor(2) if pool else 2
    h = px.host_function(fun, like=ONE, executor=executor)
    with pytest.raises(KeyboardInterrupt):
        jax.vmap(h)(jnp.arange(8.0))
    go_on.set()
    h.close()
    if pool:
        executor.shutdown()
    wait_for(lambda: threading.active_count() <= before)
    assert len(begun) == 2


@pytest.mark.parametrize("pool", [False, True])
def test_ctrl_c_while_an_evaluation_is_handed_over(pool, monkeypatch):
    """It was forgotten in the queue, and begun with the next ones."""
    called = []

    def fun(x):
        called.append(float(x))
        return x

    def interrupted(*_):
        raise KeyboardInterrupt

    executor = concurrent.futures.ThreadPoolExecutor(1) if pool else 1
    with px.host_function(fun, like=ONE, executor=executor) as h:
        # Before it is in the queue of a pool, and when it is in that of our own threads.
        monkeypatch.setattr(
            *((executor, "submit") if pool else (h._evaluator.workers, "_grow")), interrupted
        )
        with pytest.raises(KeyboardInterrupt):
            h(1.0)
        monkeypatch.undo()
        h(2.0)
    assert called == [2.0]


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def faulty(marker):
    """A function that raises, hangs, and dies once, at certain points. Local: sent by value."""

    def fun(x):
        import os
        import signal
        import sys
        import time

        if x[0] == 1:
            raise TimeoutError("my own")  # no time limit of the library's
        if x[0] == 2:
            time.sleep(1000)
        if x[0] == 3 and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        assert "jax" not in sys.modules
        return float(x.sum())

    return fun


def hostile(kind):
    """A function that raises what cannot be sent, or returns twice. Local: sent by value."""

    def fun(x):
        import os
        import threading
        import xmlrpc.client

        if kind == "forks":
            child = os.fork()
            if child:
                os.waitpid(child, 0)
            return x.sum()
        if kind == "Fault":  # which can be pickled, but not unpickled
            raise xmlrpc.client.Fault(1, "the service's")
        error = ValueError("the service's")
        error.lock = threading.Lock()
        raise error

    return fun


def assert_exceptions_that_cannot_be_sent_are_told(executor):
    for kind in ("Fault", "ValueError"):
        h = px.host_function(hostile(kind), like=ONE, executor=executor)
        with pytest.raises(RuntimeError, match=f"^{kind}: .*the service's") as caught:
            h(X)
        assert any("in fun" in note for note in caught.value.__notes__)
        assert h.counts == (0, 0, 1, 0, 0)


FAULTY_POINTS = jnp.stack([jnp.full(3, v, jnp.float32) for v in (0, 1, 2, 3, 4, 5)])


def forking_server():
    context = multiprocessing.get_context("forkserver")
    return concurrent.futures.ProcessPoolExecutor(2, mp_context=context)


@pytest.mark.parametrize("make", [forking_server, lambda: loky.ProcessPoolExecutor(2)])
def test_pools_of_others(make, tmp_path):
    """A pool that is broken by a worker's death is made anew."""
    with make() as pool:
        h = px.host_function(
            faulty(str(tmp_path / "died")), like=ONE, executor=pool, timeout=1.0, on_failure=-1.0
        )
        np.testing.assert_array_equal(jax.vmap(h)(FAULTY_POINTS), [0, -1, -1, 9, 12, 15])
        assert (h.counts.evaluations, h.counts.failures, h.counts.timeouts) == (4, 2, 1)
        assert h.counts.retries >= 1  # of whatever was under way
        # Of one worker each, so that the next death costs one.
        assert len(h._evaluator.workers._places) == 2
        own = h._evaluator.workers._places[0].executor
        assert_exceptions_that_cannot_be_sent_are_told(own)
        mean = px.host_function(statistics.fmean, executor=own)
        assert float(mean(X)) == pytest.approx(1.25 / 3)
        h.close()


class Wrapped(concurrent.futures.Executor):
    """Threads of somebody's own, which does not tell how many there are."""

    def __init__(self, count):
        self.threads = concurrent.futures.ThreadPoolExecutor(count)

    def submit(self, *args, **kwargs):
        return self.threads.submit(*args, **kwargs)

    def shutdown(self, *args, **kwargs):
        self.threads.shutdown(*args, **kwargs)


def test_an_executor_of_ones_own_that_has_threads():
    """What is sent elsewhere for a time limit is called here, where it is the function itself."""
    lock, release = threading.Lock(), threading.Event()  # which cannot be pickled

    def fun(x):
        with lock:
            seen.append(x)
        if x[0] > 2:
            release.wait()
        return jnp.sum(x) if x[0] < 0 else x.sum()

    seen.clear()
    with Wrapped(2) as executor:
        h = px.host_function(fun, like=ONE, executor=executor, timeout=0.5, on_failure=-1.0)
        assert float(h(X)) == 1.25
        assert float(h(X + 4)) == -1.0
        refusing = px.host_function(fun, like=ONE, executor=executor, timeout=0.5)
        with pytest.raises(TypeError, match="a JAX operation"):
            refusing(X - 4)
        release.set()
    assert len(seen) == 3


OWN_THREADS = {
    "the thread that waits": lambda: (None, {}),
    "one thread": lambda: (1, {}),
    "time limit": lambda: (None, {"timeout": 60.0}),
    "pool": lambda: (concurrent.futures.ThreadPoolExecutor(1), {}),
    "pool, time limit": lambda: (concurrent.futures.ThreadPoolExecutor(1), {"timeout": 60.0}),
    "executor of one's own": lambda: (Wrapped(1), {}),
    "executor of one's own, without cloudpickle": lambda: (Wrapped(1), {}),
}


@pytest.mark.parametrize("name", OWN_THREADS)
def test_a_function_may_return_the_same_memory_each_time(name, monkeypatch):
    """Its next call had begun before the value was copied, so that points had values of others."""
    if "without cloudpickle" in name:
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
    state, called, second = np.zeros(3, np.float32), [], threading.Event()

    def fun(x):
        state[:] = x
        called.append(x)
        if len(called) == 2:
            second.set()
        return {"array": state, "buffer": [memoryview(state)]}

    handle = Schedule._handle

    def late(schedule, attempt):
        assert second.wait(20.0)
        handle(schedule, attempt)

    monkeypatch.setattr(Schedule, "_handle", late)
    executor, settings = OWN_THREADS[name]()
    h = px.host_function(fun, like={"array": X, "buffer": [X]}, executor=executor, **settings)
    points = [X, X + 1]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        found = list(threads.map(h, points))
    assert_trees_close(found, [{"array": v, "buffer": [v]} for v in points], rtol=0)
    h.close()
    if executor not in (None, 1):
        executor.shutdown()


def test_what_is_no_result_is_an_error_and_no_failure_of_the_point():
    """In threads too, where it is looked at before the next call."""
    for value in (None, "a", {1: 0.0, "b": 0.0}):
        with px.host_function(lambda x, v=value: v, like=ONE, executor=1, on_failure=0.0) as h:
            with pytest.raises((TypeError, ValueError)):
                h(X)
            assert h.counts == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("like", [None, ()], ids=["learnt", "told"])
def test_nothing_at_all_is_no_result(like):
    """A function without a `return` was one without results. One of none returns ()."""

    def simulator(x):
        x.sum()

    with px.host_function(simulator, like=like) as h:
        with pytest.raises(TypeError, match=r"^simulator returned None, expected a pytree"):
            h(X)
    with px.host_function(lambda x: (), like=like) as h:
        assert h(X) == ()


@pytest.mark.parametrize("executor", [None, 1])
def test_errors_about_results_name_the_function(executor):
    def simulator(x):
        return "a"

    with px.host_function(simulator, like=ONE, executor=executor) as h:
        with pytest.raises(TypeError, match=r"^simulator must return numbers"):
            h(X)


def test_waiting_in_a_queue_is_not_taking_too_long(monkeypatch):
    monkeypatch.setattr("perturbax.host_functions._foreign_executors.START", 0.0)

    def fun(x):
        time.sleep(0.05)
        return x.sum()

    with Wrapped(1) as executor:
        h = px.host_function(fun, like=ONE, executor=executor, timeout=0.4)
        np.testing.assert_array_equal(jax.vmap(h)(jnp.ones((30, 3))), np.full(30, 3.0))


def test_a_worker_that_is_lost_is_noticed(monkeypatch):
    """One that runs the call and never tells, not even that it took too long."""
    monkeypatch.setattr("perturbax.host_functions._foreign_executors.START", 0.0)

    class Lost(concurrent.futures.Executor):
        def submit(self, *call, **kwargs):
            future = concurrent.futures.Future()
            future.set_running_or_notify_cancel()
            return future

    h = px.host_function(lambda x: x.sum(), like=ONE, executor=Lost(), timeout=0.05)
    with pytest.raises(TimeoutError, match=r"more than timeout=0\.05 seconds"):
        h(X)


def test_a_pool_that_is_busy_or_starting_is_given_nothing_while_another_is_free():
    release, events = threading.Event(), queue.SimpleQueue()
    pools = [concurrent.futures.ThreadPoolExecutor(1) for _ in range(3)]
    workers = Foreign(pools[0], lambda long: long and release.wait(20.0), None)
    workers._places = [_Place(pool, ready=i > 0) for i, pool in enumerate(pools)]
    workers.submit(Attempt((True,), {}, events))
    for _ in range(3):
        attempt = Attempt((False,), {}, events)
        workers.submit(attempt)
        assert events.get(timeout=10.0) is attempt
    assert workers._places[0].load == 0
    release.set()
    for pool in pools:
        pool.shutdown()


def test_what_comes_in_place_of_a_pool_that_broke_ends_with_the_function():
    """The exception of the pool that broke kept the function, and so the other pool, for ever."""

    def dies(x):
        import os

        os._exit(3)

    pool = loky.ProcessPoolExecutor(1)
    h = px.host_function(dies, like=ONE, executor=pool)
    try:
        h(X)
    except concurrent.futures.BrokenExecutor:  # pytest.raises would keep it too
        workers = weakref.ref(h._evaluator.workers)
    pool.shutdown()
    del h, pool

    def forgotten():
        gc.collect()
        return workers() is None

    wait_for(forgotten)


def test_workers_of_others_end_with_their_program():
    """One that was killed tells them nothing."""
    program = f"""
import os, runpy, signal, time
careful = runpy.run_path({_worker.__file__!r})["careful"]
ready, go = os.pipe()
if os.fork() == 0:
    careful(os.write, go, b"1")
    time.sleep(1000)
os.read(ready, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # Its output ends when all have that have inherited it.
    subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=30, check=False)


def test_a_cluster_is_not_asked_for_its_size_at_each_point():
    """It takes as long as a few evaluations; and messages take their time, so many are sent."""
    asked, sent, many = [], [], threading.Event()

    class Client:
        def nthreads(self):
            asked.append(len(sent))
            return {"one": 1}

    class Cluster(concurrent.futures.ThreadPoolExecutor):
        _client = Client()

        def submit(self, *call):
            sent.append(call)
            if len(sent) == 16:
                many.set()
            return super().submit(*call)

    def fun(x):
        assert many.wait(10.0)
        return x.sum()

    with Cluster(1) as cluster:
        h = px.host_function(fun, like=ONE, executor=cluster)
        np.testing.assert_array_equal(jax.vmap(h)(jnp.ones((40, 3))), np.full(40, 3.0))
    assert len(asked) < 3  # once a second


def test_a_dask_cluster(tmp_path):
    before = threading.active_count()
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        with pytest.raises(ValueError, match="pass the Client itself"):
            px.host_function(steps, executor=client.get_executor())
        for executor in (client, client.get_executor(pure=False)):
            marker = tmp_path / str(executor is client)
            h = px.host_function(
                faulty(str(marker)), like=ONE, executor=executor, timeout=1.0, on_failure=-1.0
            )
            np.testing.assert_array_equal(jax.vmap(h)(FAULTY_POINTS), [0, -1, -1, 9, 12, 15])
            assert (h.counts.evaluations, h.counts.failures, h.counts.timeouts) == (4, 2, 1)
        # A worker that has ended stands for a cluster without an answer.
        assert_exceptions_that_cannot_be_sent_are_told(client)
        ends = {
            r"called sys.exit\(3\)": lambda x: sys.exit(3),
            "cannot be pickled": lambda x: (v for v in x),
        }
        for text, fun in ends.items():
            h = px.host_function(fun, like=ONE, executor=client)
            with pytest.raises((RuntimeError, TypeError), match=text):
                h(X)
        assert_arguments_by_name_are_the_functions_own(client)
    wait_for(lambda: threading.active_count() <= before + 3)
    with pytest.raises(RuntimeError, match="the Dask client of executor is closed"):
        h(X)


def assert_arguments_by_name_are_the_functions_own(executor):
    """Executors have some too: with `key`, Dask took the first result for all others."""

    def named(x, key="none", fn=0.0, priority=1.0):
        return float(x.sum() * priority + fn + len(key))

    h = px.host_function(named, like=ONE, executor=executor)
    xs = jnp.arange(6.0, dtype=jnp.float32).reshape(2, 3)
    found = jax.vmap(lambda x: h(x, key="ab", fn=100.0, priority=3.0))(xs)
    np.testing.assert_array_equal(found, 3 * xs.sum(axis=1) + 102)


GO_ON = threading.Event()


def hangs(x):
    return GO_ON.wait(60.0) and float(x.sum())


def test_dask_workers_that_are_threads_of_this_program():
    """They count as such: too many that hung ended the program, and JAX was let in."""
    with distributed.Client(processes=False, dashboard_address=None, silence_logs=50) as client:
        h = px.host_function(hangs, like=ONE, executor=client, timeout=0.02, on_failure=-1.0)
        points = jnp.zeros((20, 3))  # more than a process of others may have
        np.testing.assert_array_equal(jax.vmap(h)(points), np.full(20, -1.0))
        GO_ON.set()
        h = px.host_function(lambda x: float(jnp.sum(x)), like=ONE, executor=client)
        with pytest.raises(TypeError, match="a JAX operation"):
            h(X)
        assert_arguments_by_name_are_the_functions_own(client)


def test_executors_of_ones_own_keep_jax_out():
    class Own(concurrent.futures.Executor):
        def __init__(self):
            self.pool = concurrent.futures.ThreadPoolExecutor(2)

        def submit(self, fn, /, *args, **kwargs):
            return self.pool.submit(fn, *args, **kwargs)

    own = Own()
    with own.pool:
        assert_arguments_by_name_are_the_functions_own(own)
        assert_arguments_by_name_are_the_functions_own(own.pool)
        with pytest.raises(TypeError, match="a JAX operation"):
            px.host_function(lambda x: float(jnp.sum(x)), like=ONE, executor=own)(X)
    with pytest.raises(RuntimeError, match="after shutdown") as caught:
        px.host_function(steps, like=ONE, executor=own.pool)(X)
    assert "has to stay open" in caught.value.__notes__[0]


def test_an_exception_is_put_off_for_programs_that_may_have_called(monkeypatch, capsys):
    """Of several devices. It was raised in another thread's, and the one that failed went on."""
    called, another = object(), object()
    programs = [_host_exceptions._Running(hosts) for hosts in ([called], [another], None)]
    monkeypatch.setattr(_host_exceptions, "_running", programs)

    class NeitherEqualNorNotError(ArithmeticError):
        """As one that holds an array."""

        def __eq__(self, other):
            raise ValueError("ambiguous")

        __hash__ = None

    error = NeitherEqualNorNotError("my own")
    assert _host_exceptions.put_off(NeitherEqualNorNotError(), called)
    assert _host_exceptions.put_off(error, called)
    assert [len(one.put_off) for one in programs] == [2, 0, 2]
    programs[0].put_off.reverse()
    # Around the first, which raises it, the last need not; in another thread it has to.
    assert programs[0].take() is error
    assert not programs[2].put_off
    programs[2].put_off, programs[2].thread = [error], None
    assert programs[0].take() is programs[2].put_off[0]
    monkeypatch.setattr(_host_exceptions, "_running", programs[1:2])
    assert not _host_exceptions.put_off(error, called)
    assert not programs[1].put_off
    assert "my own" in capsys.readouterr().err


def test_closing_during_a_call_that_takes_too_long():
    """What is left behind was looked for among threads that had been dismissed."""
    go_on = threading.Event()
    h = px.host_function(
        lambda x: go_on.wait(60.0) and 1.0, like=ONE, executor=1, timeout=0.3, on_failure=-1.0
    )
    timer = threading.Timer(0.1, h.close)
    timer.start()
    assert float(h(X)) == -1.0
    timer.join()
    go_on.set()


def test_processes_of_our_own(tmp_path):
    """Killed, hung and failing evaluations; nothing is left over of any of them."""
    marker = tmp_path / "died"
    threads, files = threading.active_count(), descriptors()

    def troublesome(x):
        x = np.asarray(x)
        if x[0] == 1:
            raise TimeoutError("my own")  # no time limit of the library's
        if x[0] == 2:
            os.system("sleep 1000 & echo $! >> " + str(marker) + ".children")
            time.sleep(1000)
        if x[0] == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        assert "jax" not in sys.modules
        return float(x.sum())

    xs = jnp.stack([jnp.full(3, v, jnp.float32) for v in (0, 1, 2, 3, 4, 5)])
    with px.ProcessWorkers(2) as workers:
        h = px.host_function(troublesome, like=ONE, executor=workers, timeout=1.0, on_failure=-1.0)
        np.testing.assert_array_equal(jax.vmap(h)(xs), [0, -1, -1, 9, 12, 15])
        assert h.counts == (4, 0, 2, 1, 1)
        raising = px.host_function(troublesome, like=ONE, executor=workers)
        error = raised(lambda: raising(xs[1]), TimeoutError).value
        assert any("in troublesome" in note for note in error.__notes__)
        for kind in (ConnectionResetError, EOFError, SystemExit):  # not taken for its worker's

            def failing(x, kind=kind):
                raise kind("the service's")

            for executor in (workers, 2):
                with px.host_function(failing, like=ONE, executor=executor) as h:
                    with pytest.raises((kind, RuntimeError), match="the service's"):
                        h(X)
                    assert h.counts == (0, 0, 1, 0, 0)

        assert_exceptions_that_cannot_be_sent_are_told(workers)
        forking = px.host_function(hostile("forks"), like=ONE, executor=workers)
        np.testing.assert_array_equal(jax.vmap(forking)(xs), xs.sum(axis=1))

        def local(x):  # by value: for one of this file, workers would import the file
            return np.sin(x).sum()

        same = px.host_function(local, executor=workers)
        points = jax.random.normal(KEY, (20, 3))
        np.testing.assert_array_equal(
            jax.vmap(same)(points), jax.vmap(px.host_function(local))(points)
        )
    with pytest.raises(RuntimeError, match="closed"):
        same(X)
    [child] = (tmp_path / "died.children").read_text().split()
    wait_for(lambda: not os.path.exists(f"/proc/{child}") or is_zombie(child))
    wait_for(lambda: threading.active_count() <= threads and descriptors() <= files)


@pytest.mark.parametrize("starts", ["fork", "program"])
def test_a_worker_that_dies_is_noticed_while_what_it_started_lives(starts, tmp_path):
    """Its children had its connection, whose end is how its death is seen; they are ended too."""
    path = tmp_path / "children"

    def dies_once(x):
        if path.exists():
            return x.sum()
        if starts == "program":
            os.system(f"sleep 1000 & echo $! > {path}")
        elif os.fork() == 0:
            with path.open("a") as file:  # by the number that the connection had
                os.fork()
                file.write(f"{os.getpid()} ")
            time.sleep(1000)
        while not path.exists() or len(path.read_text().split()) < (1 + (starts == "fork")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    with px.ProcessWorkers(1) as workers:
        h = px.host_function(dies_once, like=ONE, executor=workers)
        assert float(h(X)) == 1.25
        assert h.counts == (1, 0, 0, 1, 0)
        for child in path.read_text().split():
            wait_for(lambda child=child: not os.path.exists(f"/proc/{child}") or is_zombie(child))


def test_a_group_of_dead_processes_that_may_not_be_killed(monkeypatch):
    """So macOS tells that there is nothing to end; the thread of the worker ended by it."""
    real = os.killpg

    def darwin(group, number):
        with contextlib.suppress(ProcessLookupError):
            real(group, number)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "killpg", darwin)

    def fun(x):
        if x[0] > 0:
            time.sleep(100)
        os.kill(os.getpid(), signal.SIGKILL)

    with px.ProcessWorkers(1) as workers:
        h = px.host_function(fun, like=ONE, executor=workers, timeout=0.2, on_failure=-1.0)
        for first in (1.0, 1.0, -1.0):
            assert float(h(jnp.full(2, first))) == -1.0


def fails_at(number):
    """A function and a solver that raise at so many evaluations."""
    made = itertools.count(1)

    def value(x):
        if next(made) == number:
            raise ArithmeticError("no solution")
        return np.float32(np.sum(x > 0))

    def solution(x):
        return np.round(x) + 0 * value(x)

    return px.host_function(value, like=0.0), px.host_function(solution, like=X)


CALLS: dict[str, Any] = {
    "estimate": lambda fun, _: px.estimate(smooth(fun), KEY, X),
    "straight-through": lambda fun, _: jax.grad(px.make_straight_through_fun(fun, 12), 1)(KEY, X),
    "argmax": lambda _, solver: px.make_perturbed_argmax(solver, 12)(KEY, X),
    "max": lambda _, solver: px.make_perturbed_max(solver, 12)(KEY, X),
    "loss": lambda _, solver: px.make_fenchel_young_loss(solver, 12)(KEY, X, X),
    "implicit MLE": lambda _, solver: px.make_implicit_mle(solver, 12)(KEY, X),
    "distribution": lambda _, solver: px.make_perturbed_distribution(solver, 12)(KEY, X),
    "sweep": lambda fun, _: px.sweep_sigma(fun, KEY, X, num_samples=12, sigmas=(0.5, 1.0)),
    "diagnosis": lambda fun, _: px.diagnose(smooth(fun, 32), KEY, X),
    "minimum": lambda fun, _: px.minimize(fun, X, KEY, max_evaluations=500, progress=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_exception_arrives_as_it_was_raised_wherever_the_function_is_called(name):
    """From layers, sweeps and diagnoses it came as JAX's error, with its text in the middle."""
    with pytest.raises(ArithmeticError, match=r"^no solution"):
        CALLS[name](*fails_at(4))


def test_failures_do_not_keep_what_the_call_back_held():
    """Under jit each kept all results of its batch, of the last 32 failures."""

    def large(x):
        if x[0] > 10:
            raise ArithmeticError("no solution")
        return np.zeros(2**17, np.float32)

    program = jax.jit(jax.vmap(px.host_function(large, like=jnp.zeros(2**17))))
    kept = []
    tracemalloc.start()
    try:
        for _ in range(5):
            with pytest.raises(jax.errors.JaxRuntimeError, match="no solution"):
                jax.block_until_ready(program(jnp.arange(15.0).reshape(5, 3)))
            gc.collect()
            kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert kept[-1] - kept[0] < 2**20


def test_a_call_after_close_has_threads_of_its_own():
    """A thread of the next call took what was to end that of the last one, and was missing then."""
    begun = threading.Event()

    def slow(seconds):
        begun.set()
        time.sleep(float(seconds))
        return seconds

    h = px.host_function(slow, executor=1, timeout=0.5, like=0.0)
    first = threading.Thread(target=h, args=(0.4,))
    first.start()
    begun.wait()
    h.close()
    h(0.0)
    first.join()
    with pytest.raises(TimeoutError):
        h(2.0)
    found = []
    last = threading.Thread(target=lambda: found.append(h(0.0)), daemon=True)
    last.start()
    last.join(20)
    assert found == [0]


def test_what_waits_when_the_threads_are_closed_is_done_though_they_hang():
    """No thread was left that knew of it."""
    begun = threading.Event()

    def first_hangs(x):
        if x > 0 and not begun.is_set():
            begun.set()
            time.sleep(2)
        return x

    h = px.host_function(first_hangs, executor=1, timeout=0.3, retries=1, like=0.0)
    found = []
    points = jnp.arange(1.0, 4.0)
    call = threading.Thread(target=lambda: found.append(jax.vmap(h)(points)), daemon=True)
    call.start()
    begun.wait()
    h.close()
    call.join(20)
    np.testing.assert_array_equal(found[0], points)


def test_calls_while_another_thread_closes():
    """An attempt got into the queue of threads that were to end."""
    h = px.host_function(lambda x: x, executor=1, like=0.0)
    ended = threading.Event()

    def close():
        while not ended.is_set():
            h.close()

    closing = threading.Thread(target=close, daemon=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        closing.start()
        done = []
        calls = threading.Thread(
            target=lambda: done.extend(h(float(i)) for i in range(500)), daemon=True
        )
        calls.start()
        calls.join(30)
    finally:
        ended.set()
        sys.setswitchinterval(interval)
    assert len(done) == 500


def test_an_empty_batch_inside_a_batch():
    h = px.host_function(np.sum, like=0.0)
    assert jax.vmap(jax.vmap(h))(np.zeros((2, 0, 3), np.float32)).shape == (2, 0)
    assert jax.vmap(jax.vmap(h))(np.zeros((0, 2, 3), np.float32)).shape == (0, 2)


def test_what_ends_a_workers_thread_arrives(monkeypatch):
    """Whatever it is: nobody waits for it."""

    def fails(*_):
        raise RuntimeError("in the thread")

    monkeypatch.setattr(_processes._Process, "_start", fails)
    with px.ProcessWorkers(1) as workers:
        h = px.host_function(lambda x: x.sum(), like=ONE, executor=workers, on_failure=-1.0)
        with pytest.raises(RuntimeError, match="in the thread"):
            h(X)
        monkeypatch.undo()
        assert float(h(X)) == 1.25


def test_pytrees_and_exceptions_of_the_scripts_own_classes():
    """Which workers cannot import; that of the arguments comes back as the same class."""

    class Pair(NamedTuple):
        a: Any
        b: Any

    class OwnError(Exception):
        pass

    def swap(pair):
        if pair.b > 2:
            raise OwnError("too large")
        return Pair(pair.b, pair.a)

    with px.ProcessWorkers(1) as workers:
        h = px.host_function(swap, executor=workers)
        assert_trees_close(h(Pair(X, 1.0)), Pair(jnp.float32(1.0), X))
        with pytest.raises(OwnError, match="too large"):
            h(Pair(X, 3.0))


def test_workers_that_are_forgotten_end_quietly(capfd):
    """The threads that have them began the process that starts workers anew, in order to wait."""
    threads = threading.active_count()
    workers = px.ProcessWorkers(2)
    nursery = workers._nursery
    px.host_function(lambda x: x.sum(), like=ONE, executor=workers)(X)
    assert nursery._process is not None
    del workers
    jax.clear_caches()  # programs know the functions that they call
    gc.collect()
    wait_for(lambda: threading.active_count() <= threads)
    assert nursery._process is None
    assert "Traceback" not in capfd.readouterr().err


def test_the_process_that_starts_workers_may_die(capfd):
    """The next one is asked for the exit status of workers that it has not started."""

    def process(x):
        time.sleep(0.05)
        return np.int32(os.getpid())

    with px.ProcessWorkers(2) as workers:
        h = px.host_function(process, like=np.int32(0), executor=workers)
        before = set(jax.vmap(h)(jnp.ones((8, 3))).tolist())
        for one in (workers._nursery._process.pid, *before):
            os.kill(one, signal.SIGKILL)
        after = set(jax.vmap(h)(jnp.ones((8, 3))).tolist())
    assert len(before) == 2
    assert not before & after
    assert "Traceback" not in capfd.readouterr().err


def test_closing_ends_what_is_under_way(tmp_path):
    def sleeps(x):
        import os
        import time

        (tmp_path / "process").write_text(str(os.getpid()))
        time.sleep(1000)

    workers = px.ProcessWorkers(1)
    h = px.host_function(sleeps, like=ONE, executor=workers)
    found = []

    def call():
        with pytest.raises(RuntimeError) as caught:
            h(X)
        found.append(str(caught.value))

    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: (tmp_path / "process").exists() and (tmp_path / "process").read_text())
    workers.close()
    process = (tmp_path / "process").read_text()
    wait_for(lambda: not os.path.exists(f"/proc/{process}") or is_zombie(process))
    thread.join(20.0)
    assert "closed" in found[0]


def test_an_initializer_comes_first_and_its_failure_is_that_of_no_point():
    def begins():
        import os

        os.environ["BEGUN"] = "2"

    def fails():
        raise OSError("no licence")

    def fun(x):
        import os

        return x.sum() * float(os.environ["BEGUN"])

    for initializer in (begins, fails):
        with px.ProcessWorkers(1, initializer=initializer) as workers:
            h = px.host_function(fun, like=ONE, executor=workers, on_failure="missing", retries=2)
            if initializer is begins:
                assert float(h(X)) == 2.5
            else:
                with pytest.raises(OSError, match="no licence"):
                    h(X)
                assert h.counts == (0, 0, 0, 0, 0)


def test_the_ctrl_c_of_a_terminal_ends_no_worker():
    """It is sent to the program's group of processes, which workers and their parent are not in."""

    def groups(x):
        import os

        return x[:2] * 0 + np.array([os.getpgid(0), os.getpgid(os.getppid())])

    with px.ProcessWorkers(1) as workers:
        found = px.host_function(groups, executor=workers)(np.zeros(3, np.int32))
    assert os.getpgid(0) not in np.asarray(found)


def test_a_point_at_which_workers_always_die_is_given_up():
    def dies(x):
        import os

        os._exit(3)

    with px.ProcessWorkers(1) as workers:
        h = px.host_function(dies, like=ONE, executor=workers, retries=1)
        with pytest.raises(RuntimeError, match="died, with exit status 3"):
            h(X)
        assert h.counts == (0, 0, 1, 6, 0)


def is_zombie(process):
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
