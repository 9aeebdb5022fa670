"""Checks of `mesh=` that need several devices, run by test_devices.py in a process of their own.

A process fixes its number of devices before anything else. As a program, this file runs all checks
and prints, as JSON, the traceback of each that fails.

    python meshes.py [--all]
"""

import contextlib
import functools
import gc
import json
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import perturbax as px
from helpers import AS_FOR_USERS, assert_trees_close, failures, twice

EVERYTHING = "--all" in sys.argv
KEY = jax.random.key(0)
X = jnp.array([0.5, -1.0, 2.0])
NORMAL = px.Normal()
INDEPENDENT = {"sampler": px.Independent(), "degree": 0}


def fun(y, scale=1.5):
    """A smooth part and steps."""
    return scale * jnp.sum(jnp.tanh(y) ** 2) + y[0] * y[1] + jnp.sum(y > 0)


def mesh(count, *shape):
    """A mesh of the first devices, of one axis or several."""
    shape = shape or (count,)
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), tuple("abc"[: len(shape)]))


def smooth(where, fun=fun, num_samples=50, **settings):
    return px.make_perturbed_fun(fun, num_samples, 0.5, NORMAL, mesh=where, **settings)


def derivatives(where, argnums=(0, 1, 2), **settings):
    """Value and derivatives in x, sigma and an argument of fun."""

    def value(x, sigma, scale):
        g = px.make_perturbed_fun(fun, sigma=sigma, noise=NORMAL, mesh=where, **settings)
        return g(KEY, x, scale)

    return jax.jit(jax.value_and_grad(value, argnums=argnums))(X, 0.5, 1.5)


def errors(where, x=X, **settings):
    found = px.estimate(smooth(where, **settings), KEY, x)
    return found.value, found.value_error, found.gradient, found.gradient_error


def check_every_sampler_and_degree():
    """On three devices, which divide no number of samples or groups here."""
    cases = [
        {"num_samples": 1, **INDEPENDENT},
        {"num_samples": 31, "sampler": px.Antithetic(), "use_baseline": False, "batch_size": 4},
        {"num_samples": 50, "sampler": px.Orthogonal(), "degree": 1},
        {"num_samples": 64},  # two Sobol nets, whose points are shared
        {"num_samples": 65, "sampler": px.OrthogonalArray(num_groups=4), "batch_size": 5},
    ]
    argnums = [(0, 1), (0, 1), (0,), (2,), (0, 1)]
    if EVERYTHING:  # else 21 such samples on two devices, below
        cases.append({"num_samples": 50, **INDEPENDENT})
        argnums.append((2,))
    for settings, which in zip(cases, argnums, strict=True):
        found = functools.partial(derivatives, argnums=which, **settings)
        assert_trees_close(found(mesh(3)), found(None), rtol=1e-4, atol=1e-5)
    if EVERYTHING:  # else on two devices, by processes.py
        actual, expected = errors(mesh(3), **cases[3]), errors(None, **cases[3])
        assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


def check_bits_on_any_number_of_devices():
    """As XLA compiles for users; it rounds in other ways where it is asked for less."""

    def failing(y):
        return jnp.where(y[2] > 2.3, jnp.nan, fun(y))

    def gradient(where):
        return jax.value_and_grad(smooth(where, failing, missing="drop", **INDEPENDENT), argnums=1)

    def bits(where):
        compiled = functools.partial(jax.jit, compiler_options=AS_FOR_USERS)
        nets = {"sampler": px.Sobol(num_groups=8), "num_samples": 64}
        each = compiled(functools.partial(errors, where, **nets))
        return compiled(gradient(where))(KEY, X), each(X)

    expected = bits(mesh(1))
    for count in (2, 4, 8) if EVERYTHING else (8,):
        assert_trees_close(bits(mesh(count)), expected)
    assert_trees_close(jax.jit(gradient(None))(KEY, X), expected[0], rtol=1e-4, atol=1e-5)


def check_second_derivatives():
    """Forward over reverse mode, and reverse over reverse mode in an argument of fun as well."""

    def hessian(where):
        return jax.jit(jax.hessian(smooth(where, num_samples=64), argnums=1))(KEY, X)

    def in_reverse(where):
        gradient = jax.grad(smooth(where, **INDEPENDENT), argnums=1)
        return jax.jit(jax.jacrev(gradient, argnums=(1, 2)))(KEY, X, 1.5)

    assert_trees_close(hessian(mesh(4, 2, 2)), hessian(None), rtol=1e-4, atol=1e-4)
    assert_trees_close(in_reverse(mesh(2)), in_reverse(None), rtol=1e-4, atol=1e-5)


def check_vmap_scan_and_eager_calls():
    keys = jax.random.split(KEY, 2)
    points = jnp.stack([X, -X])

    def steps(gradient):
        def step(x, key):
            return x - 0.1 * gradient(key, x), x

        return jax.lax.scan(step, X, keys)

    def run(where):
        gradient = jax.grad(smooth(where, **INDEPENDENT), argnums=1)
        mapped, scanned = jax.jit(lambda: (jax.vmap(gradient)(keys, points), steps(gradient)))()
        return mapped, scanned, gradient(KEY, X)

    assert_trees_close(run(mesh(2)), run(None), rtol=1e-4, atol=1e-5)


def check_layers():
    def run(where):
        settings = {"num_samples": 50, "sigma": 0.5, "mesh": where, **INDEPENDENT}
        layer = px.make_perturbed_argmax(px.solvers.one_hot_argmax, **settings)
        jacobian, value = jax.jit(jax.jacrev(twice(functools.partial(layer, KEY)), has_aux=True))(X)
        loss = px.make_fenchel_young_loss(px.solvers.one_hot_argmax, **settings)
        slope = jax.jit(jax.grad(loss, argnums=1))(KEY, X, jnp.array([1.0, 0.0, 0.0]))
        return value, jacobian, slope

    assert_trees_close(run(mesh(2)), run(None), rtol=1e-4, atol=1e-5)


def check_aux_and_several_outputs():
    def both(y):
        return {"a": jnp.sort(y), "b": jnp.sum(y > 0)}, y

    def run(where):
        g = smooth(where, both, 21, has_aux=True, **INDEPENDENT)
        plain = smooth(where, lambda y: both(y)[0], 21, **INDEPENDENT)
        return g(KEY, X), jax.jit(jax.jacrev(plain, argnums=1))(KEY, X)

    assert_trees_close(run(mesh(2)), run(None), rtol=1e-4, atol=1e-5)


def check_exceptions_of_host_functions_arrive():
    """The other devices waited for the one that failed, until XLA ended the process."""
    calls = []

    def failing(y):
        calls.append(y)
        if len(calls) == 5:
            raise ArithmeticError("diverged")
        return np.round(y).sum()

    where = mesh(4)
    g = smooth(where, px.host_function(failing, like=0.0), 16, **INDEPENDENT)
    with pytest.raises(ArithmeticError, match="diverged"):
        jax.value_and_grad(g, argnums=1)(KEY, X)
    jitted = px.own_exceptions(jax.jit(jax.grad(g, argnums=1)))
    assert np.isfinite(jitted(KEY, X)).all()
    calls.clear()
    with pytest.raises(ArithmeticError, match="diverged"):
        jitted(KEY, X)

    def solver(y):
        failing(y)
        return np.round(y)

    solve = px.host_function(solver, like=X)
    layer = px.make_perturbed_argmax(solve, 16, mesh=where, **INDEPENDENT)
    calls.clear()
    with pytest.raises(ArithmeticError, match="diverged"):
        layer(KEY, X)


def check_each_device_calls_the_host_for_its_own_samples():
    lock, points = threading.Lock(), []

    def on_host(y):
        with lock:
            points.extend(np.reshape(y, (-1, 3)).tolist())
        return np.sum(np.asarray(y) > 0, axis=-1).astype(np.float32)

    def count_above(y):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(on_host, like, y, vmap_method="expand_dims")

    def count(y):
        return jnp.sum(y > 0).astype(jnp.float32)

    for settings in (INDEPENDENT, {"sampler": px.Sobol()}):
        expected = jax.value_and_grad(smooth(None, count, 64, **settings), argnums=1)(KEY, X)
        points.clear()
        g = smooth(mesh(4), count_above, 64, **settings)
        found = jax.block_until_ready(jax.value_and_grad(g, argnums=1)(KEY, X))
        assert_trees_close(found, expected, rtol=1e-4, atol=1e-5)
        assert len(points) == len({tuple(p) for p in points}) == 64


def check_meshes_that_are_set_and_explicit_axes():
    g = functools.partial(smooth, **INDEPENDENT)
    expected = jax.value_and_grad(g(None), argnums=1)(KEY, X)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        where = jax.make_mesh((2, 2), ("a", "b"), axis_types=(axis_type, axis_type))
        gradient = jax.value_and_grad(g(where), argnums=1)
        placed = jax.device_put(X, NamedSharding(where, P()))
        found = [gradient(KEY, placed), jax.jit(gradient)(KEY, placed)]
        in_shardings = NamedSharding(where, P())
        found.append(jax.jit(gradient, in_shardings=(in_shardings, in_shardings))(KEY, X))
        with jax.set_mesh(where):
            found += [jax.jit(gradient)(KEY, X), jax.jit(gradient)(KEY, placed)]
        for one in found:
            assert_trees_close(one, expected, rtol=1e-4, atol=1e-5)


def on_explicit_axes(x, count, spec):
    """The array on the first devices, in a type that tells of them."""
    where = jax.make_mesh((count,), ("a",), axis_types=(AxisType.Explicit,))
    return jax.device_put(x, NamedSharding(where, spec))


def check_arguments_elsewhere():
    """An array that was put on another device, or is split over the mesh, is replicated first.

    Types of arrays on the mesh tell of it in eager calls. They met those of shard_map in all that
    is more than a gradient: second derivatives, estimate, and functions with aux, as of carry.
    """
    x = jnp.arange(4.0) - 1.5

    def run(where, x):
        g = smooth(where, **INDEPENDENT)
        with_aux = smooth(where, lambda y: (fun(y), y), has_aux=True, **INDEPENDENT)
        return (
            jax.value_and_grad(g, argnums=1)(KEY, x),
            jax.jacrev(jax.grad(g, argnums=1), argnums=1)(KEY, x),
            jax.grad(with_aux, argnums=1, has_aux=True)(KEY, x),
            errors(where, x, **{**INDEPENDENT, "degree": 1}),
        )

    where, expected = mesh(2), jax.jit(functools.partial(run, None))(x)
    gradient = jax.value_and_grad(smooth(where, **INDEPENDENT), argnums=1)
    found = gradient(KEY, jax.device_put(x, jax.devices()[5]))
    assert_trees_close(found, expected[0], rtol=1e-4, atol=1e-5)
    split = jax.device_put(x, NamedSharding(where, P("a")))
    assert_trees_close(gradient(KEY, split), expected[0], rtol=1e-4, atol=1e-5)
    # The types of other axes than explicit ones tell nothing.
    for placed in (on_explicit_axes(x, 2, P("a")), *[split] * EVERYTHING):
        assert_trees_close(run(where, placed), expected, rtol=1e-3, atol=1e-4)


def check_points_on_explicit_axes():
    """Types that told how x is split did not fit those of what is computed from it, or its shapes.

    Steps of px.minimize without an optimizer are traced alone: on a busy machine XLA may bring
    LAPACK's operations on several devices to a standstill (see `tracing/_linear_algebra.py`).
    """
    x = jnp.arange(4.0) - 1.5

    def stairs(y):
        return jnp.sum(jnp.floor(3 * y) ** 2)

    def run(x):
        g = smooth(None, stairs, **{**INDEPENDENT, "degree": 1})
        found = px.estimate(g, KEY, x)
        return found.value_error, found.gradient, found.gradient_error, jax.hessian(g, 1)(KEY, x)

    settings = {"optimizer": optax.sgd(0.01), "sigma": 0.5, "num_samples": 8, "degree": 0}

    def found(x):
        result = px.minimize(
            stairs, x, KEY, max_evaluations=60, sampler=px.Independent(), **settings
        )
        return result.x, result.value

    expected, lowest = jax.jit(run)(x), found(x)
    # Of a point that is split the types tell more than of one that is not.
    for spec, where in (*[(P(), None)] * EVERYTHING, (P("a"), mesh(2))):
        placed = on_explicit_axes(x, 2, spec)
        assert_trees_close(jax.jit(run)(placed), expected, rtol=1e-3, atol=1e-4)
        carried = px.carry(smooth(where, stairs))
        jax.eval_shape(carried.value_and_grad, carried.init(placed), KEY, placed)
        jax.eval_shape(lambda x: px.minimize(stairs, x, KEY, max_evaluations=60), placed)
    where = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(where):  # of a point that is on no mesh
        carried = px.carry(smooth(None, stairs))
        jax.eval_shape(carried.value_and_grad, carried.init(x), KEY, x)
        on_mesh = found(x)
    actual = found(placed)
    for values in (actual, on_mesh):
        assert_trees_close(values, lowest, rtol=1e-4, atol=1e-5)
    assert jax.typeof(actual[0]) == jax.typeof(placed)


def check_layers_at_points_on_explicit_axes():
    """What fun told of how its values are split did not fit the weights of samples, nor reshapes.

    So it was of leaves of x that are split in several ways, and of solutions of all samples.
    """
    where = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = {"u": jnp.array([0.5, -0.3, 0.8, 0.1]), "v": jnp.arange(4.0).reshape(2, 2) / 3}
    places = {"u": NamedSharding(where, P("a")), "v": NamedSharding(where, P("a", "b"))}

    def choose(scores):
        return jax.tree.map(lambda v: (v == jnp.max(v)).astype(v.dtype), scores)

    def square(y):
        return sum(jnp.sum((v - 0.3) ** 2) for v in jax.tree.leaves(y))

    def made(maker, sigma=0.5, **more):
        return functools.partial(
            maker(choose, 8, sigma, NORMAL, sampler=px.Independent(), **more), KEY
        )

    def jacobian(x):
        def layer(x, sigma):
            return made(px.make_perturbed_argmax, sigma)(x)

        return jax.jacrev(layer, argnums=(0, 1))(x, 0.5)

    def gradient(x):
        def value(x):
            loss = made(px.make_fenchel_young_loss, multiplicative=True)(x, jnp.abs(x))
            return loss + square(made(px.make_implicit_mle)(x))

        return jax.grad(value)(x)

    def slope_of_cost(x):
        return jax.grad(lambda x: made(px.make_perturbed_distribution)(x).expectation(square))(x)

    placed = jax.device_put(x, places)
    cases = (jacobian, None), (gradient, "v"), (slope_of_cost, "u")
    for one, name in cases:
        expected = jax.jit(one)(x[name] if name else x)
        with jax.set_mesh(where) if name else contextlib.nullcontext():
            found = jax.jit(one)(placed[name] if name else placed)
        assert_trees_close(found, expected, rtol=1e-3, atol=1e-4)
        assert name is None or jax.typeof(found) == jax.typeof(placed[name])


def check_functions_of_arrays_on_the_mesh():
    """Types tell where such arrays are, inside loops and jitted functions too."""

    def fun(y, c):
        _, rows = jax.lax.scan(lambda s, v: (s + v * y, s * c), c, c)
        return jnp.sum(jnp.where(y > c, rows, jax.nn.relu(c) * y))

    def derivatives(where, c):
        def value(x, c):
            return smooth(where, lambda y: fun(y, c), 64)(KEY, x)

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(X, c)

    c = jnp.array([0.5, 1.5, -1.0])
    where = mesh(4)  # of which each evaluates some points of both nets
    found = derivatives(where, jax.device_put(c, NamedSharding(where, P())))
    assert_trees_close(found, derivatives(None, c), rtol=1e-4, atol=1e-5)
    carried = px.carry(smooth(where, num_samples=64))
    state = jax.device_put(carried.init(X), NamedSharding(where, P()))
    jax.eval_shape(carried.value_and_grad, state, KEY, X)


def collectives(text):
    """Operations of a compiled program that move data between devices, and their elements."""
    pattern = r"= (\(?[a-z0-9]+\[[^=]*?) (all-gather|all-reduce|collective-permute|all-to-all)\("
    found = []
    for shapes, operation in re.findall(pattern, text):
        sizes = re.findall(r"[a-z0-9]+\[([0-9,]*)\]", shapes)
        found.append(
            (operation, sum(int(np.prod([int(v or 1) for v in s.split(",")])) for s in sizes))
        )
    return found


def check_what_crosses_between_devices():
    """Of a gradient, two numbers a coordinate each way, whatever the number of samples."""
    dim = 1000
    for num_samples in (100, 400):
        g = smooth(mesh(2), lambda y: jnp.sum(y > 0), num_samples, **INDEPENDENT)
        compiled = jax.jit(jax.value_and_grad(g, argnums=1)).lower(KEY, jnp.zeros(dim)).compile()
        moved = collectives(compiled.as_text())
        assert {operation for operation, _ in moved} == {"collective-permute"}
        assert 2 * dim <= sum(size for _, size in moved) <= 2 * dim + 10


def check_noise_is_drawn_where_x_lives():
    """A point that is split over devices by the user: neither it nor its noise is gathered."""
    where, dim, num_samples = mesh(4), 4096, 64
    x = jax.device_put(jnp.linspace(-1.0, 1.0, dim), NamedSharding(where, P("a")))

    def loss(y):
        return jnp.sum(jnp.where(y > 0, y, 0.0))

    gradient = jax.value_and_grad(smooth(None, loss, num_samples, **INDEPENDENT), argnums=1)
    compiled = jax.jit(gradient).lower(KEY, x).compile()
    for operation, size in collectives(compiled.as_text()):
        assert size <= 2 * num_samples, (operation, size)
    found = compiled(KEY, x)
    assert found[1].sharding.spec == P("a")
    assert_trees_close(found, gradient(KEY, jnp.linspace(-1.0, 1.0, dim)), rtol=1e-4, atol=1e-4)


def check_error_inside_shard_map():
    where = mesh(2)
    g = smooth(where, **INDEPENDENT)
    inside = jax.shard_map(lambda x: g(KEY, x), mesh=where, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"mesh must be None inside jax\.shard_map"):
        jax.jit(inside)(X)


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}


if __name__ == "__main__":
    gc.disable()  # as in conftest.py
    assert jax.device_count() == 8
    print(json.dumps({"ran": len(CHECKS), "failed": failures(CHECKS)}))
