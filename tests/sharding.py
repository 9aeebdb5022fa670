"""Checks that need two devices, run by test_transforms.py in a process of their own.

A process fixes its number of devices before anything else. As a program, this file runs all checks
and prints, as JSON, the traceback of each that fails.
"""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import perturbax as px
from helpers import assert_trees_close, failures

KEYS = jax.random.split(jax.random.key(0), 2)
POINTS = np.arange(6, dtype=np.float32).reshape(2, 3) / 3


def fun(y):
    return jnp.sum(y**2) + jnp.sum(y > 0)


# For what holds whatever the sampler: half of the time of compilation, or less.
INDEPENDENT = {"sampler": px.Independent(), "degree": 0}


def smooth(**settings):
    return px.make_perturbed_fun(fun, 10, 0.5, px.Normal(), **settings)


def one_by_one(transformed):
    """The results for each key and point, stacked."""
    results = [transformed(key, x) for key, x in zip(KEYS, POINTS, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2,), ("devices",), axis_types=(axis_type,))


def each_on_a_device(transformed):
    """The same, each point on a device of its own, by shard_map."""

    def local(key, x):
        return jax.tree.map(lambda v: v[None], transformed(key[0], x[0]))

    spec = P("devices")
    mapped = jax.shard_map(local, mesh=mesh(), in_specs=(spec, spec), out_specs=spec)
    return jax.jit(mapped)(KEYS, POINTS)


def agrees(transformed):
    expected = one_by_one(jax.jit(transformed))
    assert_trees_close(each_on_a_device(transformed), expected, rtol=1e-5, atol=1e-5)


def derivatives(**settings):
    """Hessian, value and gradient."""
    first = jax.value_and_grad(smooth(**settings), argnums=1)

    def gradient(key, x):
        value, slope = first(key, x)
        return slope, (value, slope)

    return jax.jacfwd(gradient, argnums=1, has_aux=True)


def check_shard_map():
    agrees(derivatives())


def check_shard_map_in_batches():
    agrees(derivatives(batch_size=5, **INDEPENDENT))


class OwnNoise:
    """Noise that is known by its two methods alone."""

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.logistic(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -jnp.abs(inputs) - 2.0 * jnp.log1p(jnp.exp(-jnp.abs(inputs)))


def check_own_noise():
    agrees(jax.value_and_grad(px.make_perturbed_fun(fun, 10, 0.5, OwnNoise()), argnums=1))


def check_a_host_function():
    h = px.host_function(lambda y: np.float32(np.sum(y**2) + np.sum(y > 0)), like=np.float32(0))
    g = px.make_perturbed_fun(h, 10, 0.5, px.Normal())
    expected = one_by_one(jax.jit(jax.value_and_grad(smooth(), argnums=1)))
    found = each_on_a_device(jax.value_and_grad(g, argnums=1))
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


def check_what_only_some_arguments_differ_in():
    """Only x differs from device to device, or only the key: types then do, too."""

    def shared_key(_, x):
        return jax.value_and_grad(smooth(), argnums=1)(KEYS[0], x)

    def shared_point(key, _):
        return jax.value_and_grad(smooth(), argnums=1)(key, POINTS[0])

    agrees(shared_key)
    value, _ = each_on_a_device(shared_point)
    np.testing.assert_allclose(value, one_by_one(shared_point)[0], rtol=1e-5)


def check_pmap():
    gradient = jax.value_and_grad(smooth(), argnums=1)
    assert_trees_close(jax.pmap(gradient)(KEYS, POINTS), one_by_one(gradient), rtol=1e-5, atol=1e-5)


def check_samples_shared_by_devices():
    """Each device averages samples of its own, from a key folded with the device's number."""
    g, x = smooth(), POINTS[1]

    def local(key, x):
        key = jax.random.fold_in(key, jax.lax.axis_index("devices"))
        return jax.lax.pmean(g(key, x), "devices")

    shared = jax.shard_map(local, mesh=mesh(), in_specs=(P(), P()), out_specs=P())
    value, gradient = jax.jit(jax.value_and_grad(shared, argnums=1))(KEYS[0], x)
    folded = [jax.random.fold_in(KEYS[0], device) for device in range(2)]
    parts = [jax.value_and_grad(g, argnums=1)(key, x) for key in folded]
    values, gradients = (np.stack(part) for part in zip(*parts, strict=True))
    assert_trees_close(value, np.mean(values), rtol=1e-5)
    assert_trees_close(gradient, np.mean(gradients, axis=0), rtol=1e-5, atol=1e-5)
    assert abs(values[0] - values[1]) > 1e-3


def check_a_sum_over_devices_inside_the_function():
    """With one key, both devices draw the same noise: each knows where the other is."""

    def square(y):
        return jnp.sum(y**2)

    def local(key, x):
        g = px.make_perturbed_fun(lambda y: jax.lax.psum(square(y), "devices"), 40, 0.5)
        return jax.grad(g, argnums=1)(key, x[0])[None]

    mapped = jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("devices")), out_specs=P("devices"))
    points = np.float32([[0.5, -1.0], [2.0, 0.25]])
    for here, gradient in enumerate(jax.jit(mapped)(KEYS[0], points)):
        apart = points[1 - here] - points[here]
        both = px.make_perturbed_fun(lambda y, d=apart: square(y) + square(y + d), 40, 0.5)
        expected = jax.grad(both, argnums=1)(KEYS[0], points[here])
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def check_an_argument_split_over_devices_in_chunks():
    """Values, and the one that others are counted from, vary where neither key nor point does."""
    whole_data = np.arange(8, dtype=np.float32)
    data = jax.device_put(whole_data, NamedSharding(mesh(), P("devices")))

    def steps(y, data):
        return jnp.sum(jnp.floor(4 * y)) * jnp.sum(data)

    def gradient(batch_size):
        settings = {"sampler": px.Independent(), "degree": 0, "batch_size": batch_size}
        g = px.make_perturbed_fun(steps, 64, 0.5, px.Normal(), **settings)

        def local(x, data):
            return jax.grad(lambda x: jax.lax.psum(g(KEYS[0], x, data), "devices"))(x)

        return jax.jit(
            jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("devices")), out_specs=P())
        )(POINTS[1], data)

    whole = px.make_perturbed_fun(steps, 64, 0.5, px.Normal(), sampler=px.Independent(), degree=0)
    expected = jax.grad(whole, argnums=1)(KEYS[0], POINTS[1], whole_data)
    for batch_size in (None, 8):
        np.testing.assert_allclose(gradient(batch_size), expected, rtol=1e-4)


def check_point_split_over_devices():
    x = np.arange(4, dtype=np.float32)
    for batch_size in (None, 5):
        gradient = jax.value_and_grad(smooth(batch_size=batch_size, **INDEPENDENT), argnums=1)
        expected = gradient(KEYS[0], x)
        for axis_type in (AxisType.Auto, AxisType.Explicit):
            where = mesh(axis_type)
            with jax.set_mesh(where):
                split = jax.device_put(x, NamedSharding(where, P("devices")))
                value, slope = jax.jit(gradient)(KEYS[0], split)
            np.testing.assert_allclose(value, expected[0], rtol=1e-5)
            np.testing.assert_allclose(slope, expected[1], rtol=1e-5, atol=1e-5)


def check_eager_call_with_a_point_split_over_devices():
    x = np.arange(4, dtype=np.float32)
    gradient = jax.value_and_grad(smooth(), argnums=1)
    split = jax.device_put(x, NamedSharding(mesh(), P("devices")))
    assert_trees_close(gradient(KEYS[0], split), gradient(KEYS[0], x), rtol=1e-5, atol=1e-5)


def check_vmap_with_an_axis_of_the_mesh():
    gradient = jax.value_and_grad(smooth(batch_size=5, **INDEPENDENT), argnums=1)
    where = mesh()
    with jax.set_mesh(where):
        split = NamedSharding(where, P("devices"))
        mapped = jax.jit(jax.vmap(gradient, spmd_axis_name="devices"))
        actual = mapped(jax.device_put(KEYS, split), jax.device_put(POINTS, split))
    assert_trees_close(actual, one_by_one(gradient), rtol=1e-5, atol=1e-5)


def check_vmap_over_keys_split_over_a_mesh_with_explicit_axes():
    """Samples of two coordinates are nets, of 7 orthogonal arrays, of 40 orthogonal directions."""

    def count_above(y):
        return jnp.sum(jnp.where(y > 0, 1.0, 0.0))

    where = mesh(AxisType.Explicit)
    for dim, degree in ((2, 0), (7, None), (40, 0)):
        g = px.make_perturbed_fun(count_above, 200, 0.5, degree=degree)
        gradient = jax.vmap(jax.grad(g, argnums=1))
        points = np.linspace(-1, 1, len(KEYS) * dim, dtype=np.float32).reshape(len(KEYS), dim)
        expected = jax.jit(gradient)(KEYS, points)
        with jax.set_mesh(where):
            split = NamedSharding(where, P("devices"))
            actual = jax.jit(gradient)(jax.device_put(KEYS, split), jax.device_put(points, split))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}


if __name__ == "__main__":
    gc.disable()  # as in conftest.py
    assert jax.device_count() == 2
    print(json.dumps({"ran": len(CHECKS), "failed": failures(CHECKS)}))
