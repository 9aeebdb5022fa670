"""JAX's transformations, modes, keys, dtypes and callbacks: what works for a plain function works.

Most checks are exact: the same samples are drawn whatever the transformation, so results agree to
rounding; and without a baseline each derivative is the mean of fun times an explicit ratio.
"""

import collections
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import perturbax as px
import reference
from helpers import EvaluationCounter, assert_trees_close, enable_x64

KEY = jax.random.key(0, impl="threefry2x32")
X = jnp.array([0.5, -1.0, 2.0])
SIGMA = 0.7
NORMAL = px.Normal()
# Where samples are drawn in any way: what is taken by default compiles for longer.
INDEPENDENT = {"sampler": px.Independent(), "degree": 0}


def fun(y):
    """A smooth part and steps."""
    return jnp.sum(y**2) + y[0] * y[1] + jnp.sum(y > 0)


def smooth(fun=fun, num_samples=12, sigma=SIGMA, noise=NORMAL, **settings):
    return px.make_perturbed_fun(fun, num_samples, sigma, noise, **settings)


def value_and_grad(*args, **settings):
    return jax.value_and_grad(smooth(*args, **settings), argnums=1)


def noise_and_values(fun=fun, x=X, **settings):
    """The noise of each sample, and the value there."""
    with_samples = smooth(lambda y: (fun(y), (y, fun(y))), has_aux=True, **settings)
    _, (y, f) = with_samples(KEY, x)
    noise = (np.asarray(y) - np.asarray(x)) / np.float32(settings.get("sigma", SIGMA))
    return noise, np.asarray(f)


@functools.cache
def eager():
    """Value and gradient without any transformation around them."""
    return value_and_grad()(KEY, X)


@functools.cache
def eager_hessian():
    return jax.hessian(smooth(), argnums=1)(KEY, X)


def assert_like_eager(actual):
    assert_trees_close(actual, eager(), rtol=1e-5, atol=1e-5)


# --- Values and derivatives


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=repr)
@pytest.mark.parametrize("use_baseline", [True, False], ids=["baseline", "no baseline"])
def test_value_is_the_plain_mean(noise, use_baseline):
    settings = {"noise": noise, "use_baseline": use_baseline}
    z, f = noise_and_values(**settings)
    at_samples = jax.jit(jax.vmap(fun))(X + np.float32(SIGMA) * z)
    np.testing.assert_allclose(f, at_samples, rtol=1e-5)
    np.testing.assert_allclose(smooth(**settings)(KEY, X), np.mean(f), rtol=1e-6)


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=repr)
def test_derivatives_of_every_order(noise):
    x = X[:2]
    z, f = noise_and_values(x=x, noise=noise)
    expected = reference.differentiate_samples(f, z, SIGMA, type(noise).__name__)

    def value(x, sigma):
        return smooth(sigma=sigma, noise=noise, use_baseline=False)(KEY, x)

    gradient = jax.grad(value, argnums=(0, 1))
    hessian = jax.jacfwd(gradient, argnums=(0, 1))

    @jax.jit
    def derivatives(x, sigma):
        (second, mixed), (_, dsigma2) = hessian(x, sigma)
        first, dsigma = gradient(x, sigma)
        third = jax.jacfwd(lambda x: hessian(x, sigma)[0][0])(x)
        return {
            "value": value(x, sigma),
            "gradient": first,
            "hessian": second,
            "third": third,
            "dsigma": dsigma,
            "mixed": mixed,
            "dsigma2": dsigma2,
        }

    actual = derivatives(x, jnp.float32(SIGMA))
    for name, array in actual.items():
        scale = np.max(np.abs(expected[name]))
        np.testing.assert_allclose(
            array, expected[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name
        )


def test_fourth_derivative():
    def f(y):
        return y**3 + (y > 0)

    z, f = noise_and_values(f, jnp.float32(0.3))
    g = smooth(lambda y: y**3 + (y > 0), use_baseline=False)
    fourth = jax.grad(jax.grad(jax.jacfwd(jax.grad(functools.partial(g, KEY)))))
    z = z.astype(np.float64)
    ratio = (z**4 - 6.0 * z**2 + 3.0) / SIGMA**4
    np.testing.assert_allclose(jax.jit(fourth)(0.3), np.mean(f * ratio), rtol=1e-4)


def test_forward_and_reverse_mode_agree():
    # Of two outputs, with the baseline, in everything that can be differentiated.
    def value(x, sigma, theta):
        g = smooth(lambda y: {"a": fun(theta * y), "b": jnp.sort(y)}, sigma=sigma)
        return g(KEY, x)

    @jax.jit
    def derivatives(*at):
        return [
            derivative(value, argnums=(0, 1, 2))(*at) for derivative in (jax.jacfwd, jax.jacrev)
        ]

    forward, reverse = derivatives(X, np.float32([0.5, 0.6, 0.7]), np.float32(1.5))
    assert_trees_close(forward, reverse, rtol=1e-4, atol=1e-5)


def test_hessian_is_symmetric_in_all_modes():
    g = functools.partial(smooth(), KEY)
    hessian = np.asarray(eager_hessian())
    assert_trees_close(hessian, hessian.T, rtol=1e-5, atol=1e-5)
    modes = [(jax.jacrev, jax.jacfwd), (jax.jacfwd, jax.jacfwd)]
    for found in jax.jit(lambda x: [outer(inner(g))(x) for outer, inner in modes])(X):
        assert_trees_close(found, hessian, rtol=1e-4, atol=1e-4)


def test_constant_function_has_no_derivatives():
    def value(x, sigma):
        return smooth(lambda y: 3.0, sigma=sigma)(KEY, x)

    gradient = jax.grad(value, argnums=(0, 1))
    zeros = np.zeros(3, np.float32), np.zeros((), np.float32)
    assert_trees_close(gradient(X, 0.5), zeros)
    second = jax.jit(jax.jacfwd(gradient, argnums=(0, 1)))(X, 0.5)
    assert all((np.asarray(v) == 0).all() for v in jax.tree.leaves(second))


def test_derivative_of_fun_itself_is_not_used():
    @jax.custom_jvp
    def step(y):
        return jnp.sum(y > 0).astype(jnp.float32)

    @step.defjvp
    def refuse(primals, tangents):
        raise AssertionError

    assert np.isfinite(value_and_grad(step)(KEY, X)[1]).all()


# --- Transformations


def test_jit():
    assert_like_eager(jax.jit(value_and_grad())(KEY, X))
    assert_trees_close(
        jax.jit(jax.hessian(smooth(), argnums=1))(KEY, X), eager_hessian(), rtol=1e-4, atol=1e-4
    )


def test_vmap():
    keys = jax.random.split(KEY, 3)
    x = np.asarray(X)
    points = np.stack([x, x + 1.0, -x])
    function = value_and_grad()

    def stacked(keys, points):
        results = [function(key, x) for key, x in zip(keys, points, strict=True)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    both = jax.vmap(function)(keys, points)
    assert_trees_close(both, stacked(keys, points), rtol=1e-5, atol=1e-5)
    over_keys = jax.vmap(function, in_axes=(0, None))(keys, X)
    assert_trees_close(over_keys, stacked(keys, [X] * 3), rtol=1e-5, atol=1e-5)
    over_points = jax.vmap(function, in_axes=(None, 0))(KEY, points)
    assert_trees_close(over_points, stacked([KEY] * 3, points), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared_key", [False, True])
def test_derivatives_of_a_batch(shared_key):
    """The mean over a batch is differentiated, as in training, not the function of one element."""
    points = np.stack([X, np.asarray(X) + 1, -np.asarray(X)])
    keys = KEY if shared_key else jax.random.split(KEY, 3)
    axes = (None if shared_key else 0, 0)

    def mean(points):
        return jnp.mean(jax.vmap(smooth(), axes)(keys, points))

    direction = np.array([[1.0], [-2.0], [1.0]], np.float32) * np.ones(3, np.float32)

    @jax.jit
    def of_the_mean(points):
        slope = jax.jvp(mean, (points,), (direction,))[1]
        return jax.value_and_grad(mean)(points), slope, jax.hessian(mean)(points)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=axes)
    def of_each(key, x):
        return value_and_grad()(key, x), jax.hessian(smooth(), argnums=1)(key, x)

    actual, slope, hessian = of_the_mean(points)
    (values, gradients), own = jax.tree.map(np.asarray, of_each(keys, points))
    assert_trees_close(actual, (np.mean(values), gradients / 3), rtol=1e-5, atol=1e-5)
    assert_trees_close(slope, np.sum(gradients / 3 * direction), rtol=1e-5, atol=1e-5)
    diagonal = np.stack([np.asarray(hessian)[i, :, i] for i in range(3)])
    assert_trees_close(diagonal, own / 3, rtol=1e-4, atol=1e-4)


def test_vmap_over_sigma_and_further_arguments():
    def value(sigma, theta):
        return smooth(lambda y: fun(theta * y), sigma=sigma, batch_size=4)(KEY, X)

    sigmas, thetas = np.float32([0.3, 0.7]), np.float32([1.0, 2.0])
    actual = jax.vmap(jax.value_and_grad(value))(sigmas, thetas)
    expected = [jax.value_and_grad(value)(s, t) for s, t in zip(sigmas, thetas, strict=True)]
    assert_trees_close(
        actual, jax.tree.map(lambda *leaves: np.stack(leaves), *expected), rtol=1e-4, atol=1e-5
    )


def test_jvp_vjp_and_linearize():
    g = functools.partial(smooth(), KEY)
    value, gradient = map(np.asarray, eager())
    tangent = np.float32([1.0, -2.0, 0.5])
    assert_trees_close(jax.jvp(g, [X], [tangent]), (value, gradient @ tangent), rtol=1e-5)
    primal, pushforward = jax.linearize(g, X)
    assert_trees_close((primal, pushforward(tangent)), (value, gradient @ tangent), rtol=1e-5)
    primal, pullback = jax.vjp(g, X)
    two = np.float32(2)
    assert_trees_close((primal, *pullback(two * value)), (value, two * value * gradient), rtol=1e-5)


@pytest.mark.parametrize(
    "policy", [None, jax.checkpoint_policies.dots_saveable], ids=["all", "dots_saveable"]
)
def test_checkpoint(policy):
    g = jax.checkpoint(lambda x: smooth()(KEY, x), policy=policy)
    assert_like_eager(jax.value_and_grad(g)(X))


def descend(key, x):
    return x - 0.1 * jax.grad(smooth(), argnums=1)(key, x)


def test_loops():
    keys = jax.random.split(KEY, 3)
    expected = functools.reduce(lambda x, key: descend(key, x), keys, X)
    scanned, _ = lax.scan(lambda x, key: (descend(key, x), None), X, keys)
    assert_trees_close(scanned, expected, rtol=1e-5, atol=1e-5)
    looped = lax.fori_loop(0, 3, lambda i, x: descend(keys[i], x), X)
    assert_trees_close(looped, expected, rtol=1e-5, atol=1e-5)


def test_derivative_through_a_scan():
    keys = jax.random.split(KEY, 2)

    def by_scan(x):
        return lax.scan(lambda x, key: (x * smooth()(key, x), None), x, keys)[0].sum()

    def by_hand(x):
        for key in keys:
            x = x * smooth()(key, x)
        return x.sum()

    assert_trees_close(
        jax.value_and_grad(by_scan)(X), jax.value_and_grad(by_hand)(X), rtol=1e-4, atol=1e-4
    )


def test_cond():
    function = value_and_grad()

    def run(flag):
        return lax.cond(flag, lambda: function(KEY, X), lambda: function(KEY, -X))

    assert_like_eager(run(True))
    assert_trees_close(run(False), function(KEY, -X), rtol=1e-5, atol=1e-5)


def test_nested():
    inner = smooth(fun, 5, sigma=0.3)
    key = jax.random.key(1, impl="threefry2x32")
    z, f = noise_and_values(functools.partial(inner, key))
    np.testing.assert_allclose(f, [inner(key, X + SIGMA * row) for row in z], rtol=1e-5)
    expected = reference.differentiate_samples(f, z, SIGMA, "Normal")
    value, gradient = value_and_grad(lambda y: inner(key, y), use_baseline=False)(KEY, X)
    np.testing.assert_allclose(value, expected["value"], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected["gradient"], rtol=1e-4, atol=1e-5)


def test_on_two_devices():
    tests = Path(__file__).parent
    unreadable = "ignore:Error reading persistent compilation cache entry"
    path = os.pathsep.join([str(Path(px.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-W", unreadable, str(tests / "sharding.py")],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "PYTHONPATH": path.rstrip(os.pathsep),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["ran"] == 13
    assert not report["failed"], "\n".join(report["failed"].values())


# --- Shapes without values


def test_eval_shape():
    def run(key, x):
        g = smooth(lambda y: {"a": jnp.argmax(y), "b": (y.astype(jnp.float16), None)})
        return g(key, x), jax.jacrev(g, argnums=1)(key, x)["a"]

    value, row = jax.eval_shape(run, KEY, jax.ShapeDtypeStruct((3,), jnp.float32))
    assert value == {
        "a": jax.ShapeDtypeStruct((), jnp.float32),
        "b": (jax.ShapeDtypeStruct((3,), jnp.float32), None),
    }
    assert row == jax.ShapeDtypeStruct((3,), jnp.float32)


class Pairs:
    """A user's sampler: opposite numbers."""

    def group_size(self, num_samples, dim):
        return 2

    def sample_group(self, key, noise, group_size, dim, dtype):
        z = jax.random.normal(key, (1, dim), dtype)
        return jnp.concatenate([z, -z])


@pytest.mark.parametrize("sampler", [px.Independent(), Pairs()], ids=["independent", "own"])
def test_export_with_a_symbolic_shape(sampler):
    (size,) = jax.export.symbolic_shape("n")

    def run(data, x):
        # Where the number of coordinates is unknown, independent samples are what is chosen.
        g = smooth(lambda y: jnp.sum(y**2), sampler=sampler, degree=0)
        return jax.value_and_grad(g, argnums=1)(jax.random.wrap_key_data(data), x)

    data = jax.random.key_data(KEY)
    exported = jax.export.export(jax.jit(run))(data, jax.ShapeDtypeStruct((size,), jnp.float32))
    for x in (X, np.arange(5, dtype=np.float32)):
        value, gradient = exported.call(data, x)
        expected = run(data, x)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-5)


def test_estimate_exports_with_a_symbolic_shape():
    """Its bound on the Jacobians that it holds compared the unknown size with a number."""
    (size,) = jax.export.symbolic_shape("n")

    def run(data, x):
        g = smooth(sampler=px.Independent(), degree=0)
        return px.estimate(g, jax.random.wrap_key_data(data), x).gradient_error

    data = jax.random.key_data(KEY)
    exported = jax.export.export(jax.jit(run))(data, jax.ShapeDtypeStruct((size,), jnp.float32))
    np.testing.assert_allclose(exported.call(data, X), run(data, X), rtol=1e-4)


def one_hot(y):
    return jax.nn.one_hot(jnp.argmax(y), 3)


@pytest.mark.parametrize(
    "run",
    [
        smooth(),
        jax.grad(smooth(), argnums=1),
        # A single input of it fills the cache: one after another.
        smooth(lambda y: jnp.sum(jnp.tile(y, 2**19) > 0)),
        px.make_perturbed_argmax(one_hot, 12, **INDEPENDENT),
        lambda key, x: px.make_fenchel_young_loss(one_hot, num_samples=12, **INDEPENDENT)(
            key, x, jnp.ones(3)
        ),
    ],
    ids=["value", "gradient", "large", "argmax", "loss"],
)
def test_export_of_a_batch_of_unknown_size(run):
    """On a CPU the size of a batch was compared with how many inputs fit into the cache."""
    (size,) = jax.export.symbolic_shape("b")

    def batch(data, x):
        return jax.vmap(run)(jax.random.wrap_key_data(data), x)

    x = np.stack([np.asarray(X) * factor for factor in (1, -1, 0.5, 2)])
    data = jax.random.key_data(jax.random.split(KEY, 4))
    shapes = [jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for v in (data, x)]
    exported = jax.export.export(jax.jit(batch))(*shapes)
    expected = np.asarray(jax.jit(batch)(data, x))
    parts = jax.jit(lambda *args: [exported.call(*(v[:count] for v in args)) for count in (1, 4)])
    for found in parts(data, x):
        np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-4, atol=1e-5)


# --- Modes


@pytest.mark.covering("mode")
@pytest.mark.parametrize("mode", ["jax_debug_nans", "jax_debug_infs"])
@pytest.mark.parametrize("masked", [False, True], ids=["finite", "masked"])
def test_debugging_of_nans(mode, masked):
    x, key = np.array(X), jax.random.key(5)
    if masked and mode == "jax_debug_nans":
        x[0] = -np.inf
    g = smooth(lambda y: jax.nn.one_hot(jnp.argmax(y), 3), sigma=2.0, noise=px.Gumbel())
    before = getattr(jax.config, mode)
    jax.config.update(mode, True)
    try:
        jacobian = np.asarray(jax.jacrev(g, argnums=1)(key, x))
        in_sigma = jax.grad(lambda s: smooth(sigma=s)(KEY, X))(0.5)
    finally:
        jax.config.update(mode, before)
    # As without the mode, and what theory says: the three chances add up to one in every sample.
    assert_trees_close(jacobian, jax.jacrev(g, argnums=1)(key, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jacobian.sum(axis=0), 0.0, atol=1e-5)
    assert np.all(jacobian[0] == 0) == np.all(jacobian[:, 0] == 0) == np.isinf(x[0])
    assert np.abs(jacobian[1:, 1:]).min() > 0.01
    assert_trees_close(in_sigma, jax.grad(lambda s: smooth(sigma=s)(KEY, X))(0.5), rtol=1e-5)


def test_strict_dtypes_and_ranks():
    def strict(y):
        return jnp.sum(y**2) + y[0] * y[1] + jnp.sum(y > 0, dtype=jnp.float32)

    def outputs(t):
        return t["w"] @ jnp.ones(3) + t["b"], jnp.argmax(t["b"]), t["half"]

    shapes = {"w": ((2, 3), "float32"), "b": ((2,), "float32"), "half": ((2,), "bfloat16")}
    tree = {name: jax.ShapeDtypeStruct(*of_it) for name, of_it in shapes.items()}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        actual = value_and_grad(strict)(KEY, X)

        def pulled_back(tree):
            value, pullback = jax.vjp(functools.partial(smooth(outputs), KEY), tree)
            return value, *pullback(jax.tree.map(jnp.ones_like, value))

        value, gradient = jax.eval_shape(pulled_back, tree)
        hessian = jax.hessian(smooth(lambda w: w @ jnp.ones(3)), argnums=1)
        hessian = jax.eval_shape(hessian, KEY, tree["w"])
    assert_like_eager(actual)
    assert {v.dtype for v in jax.tree.leaves(value)} == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(lambda v: v.dtype, gradient) == jax.tree.map(lambda v: v.dtype, tree)
    assert hessian.shape == (2, 2, 3, 2, 3)


def test_no_tracer_leaks():
    with jax.checking_leaks():
        hessian = jax.hessian(smooth(), argnums=1)(KEY, X)
        jax.grad(lambda t: smooth(lambda y: fun(t * y), num_samples=3)(KEY, X))(1.0)
        in_chunks = smooth(num_samples=8, batch_size=3, degree=0, sampler=px.Independent())
        jax.eval_shape(jax.grad(in_chunks, argnums=1), KEY, X)
    assert_trees_close(hessian, eager_hessian(), rtol=1e-4, atol=1e-4)


def test_no_implicit_transfers():
    one = jax.device_put(np.float32(1.0))
    table = np.array([1.0, 2.0, 3.0], np.float32)
    g = smooth(lambda y: fun(y) + jnp.sum(table * y), noise=Own())
    with jax.transfer_guard("disallow"):
        value, pullback = jax.vjp(functools.partial(g, KEY), X)
        (gradient,) = pullback(one)
    assert_trees_close((value, gradient), jax.value_and_grad(g, argnums=1)(KEY, X))


@pytest.mark.parametrize(
    "sigma", [0.5, np.eye(3, dtype=np.float32) + 0.1], ids=["number", "matrix"]
)
def test_disable_jit(sigma):
    function = value_and_grad(num_samples=3, sigma=sigma, **INDEPENDENT)
    expected = function(KEY, X)
    with jax.disable_jit():
        assert_trees_close(function(KEY, X), expected, rtol=1e-4, atol=1e-5)


# --- Keys


def test_every_form_of_one_key():
    g = smooth()
    expected = g(jax.random.key(7, impl="threefry2x32"), X)
    raw = np.array([0, 7], np.uint32)
    for key in (jax.random.PRNGKey(7), raw, jnp.asarray(raw)):
        assert_trees_close(g(key, X), expected)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators(impl):
    key = jax.random.key(3, impl=impl)
    function = jax.jit(value_and_grad(jnp.sum, 4000))
    value, gradient = function(key, X)
    np.testing.assert_allclose(value, np.sum(X), atol=5 * SIGMA * np.sqrt(3 / 4000))
    np.testing.assert_allclose(gradient, 1.0, atol=0.2)
    other, _ = function(jax.random.key(4, impl=impl), X)
    assert other != value


def test_reuse_of_a_key_is_detected():
    g = smooth()
    with jax.debug_key_reuse(True):
        jax.jit(lambda key: jax.grad(g, argnums=1)(key, X))(jax.random.key(1))
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda key: g(key, X) + g(key, X))(jax.random.key(2))
        gradient, key = jax.grad(g, argnums=1), jax.random.key(3)
        gradient(key, X)  # it left the key unused: a draw that nobody reads is left out
        with pytest.raises(jax.errors.KeyReuseError):
            gradient(key, X)


def test_noise_differs_between_keys_samples_leaves_and_coordinates():
    x = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(6, np.float32)}
    draw = smooth(lambda y: (0.0, y), num_samples=5, sigma=1.0, has_aux=True)
    drawn = [draw(key, x)[1] for key in jax.random.split(KEY, 2)]
    numbers = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(drawn)])
    assert len(np.unique(numbers)) == 2 * 5 * 12


# --- What fun may return


def test_outputs_of_every_dtype():
    dtypes = ["int8", "int32", "uint8", "uint32", "bool", "float16", "bfloat16", "float32"]

    def many(y):
        up = jnp.sum(y > 0)
        return {name: up.astype(name) for name in dtypes}, 2.5, 3, True, None, np.ones(2, np.int8)

    value, *rest = smooth(many)(KEY, X)
    z, _ = noise_and_values()
    up = np.sum(X + SIGMA * z > 0, axis=1)
    for name in dtypes:
        values = up > 0 if name == "bool" else up
        assert value[name].dtype == jnp.float32
        np.testing.assert_allclose(value[name], np.mean(values), rtol=1e-6)
    numbers = [np.float32(number) for number in (2.5, 3, 1)]
    assert_trees_close(rest, [*numbers, None, np.ones(2, np.float32)])


def test_complex_output():
    g = smooth(lambda y: jnp.sum(y) * (1 + 2j))
    value = g(KEY, X)
    mean, slope = map(np.asarray, value_and_grad(jnp.sum)(KEY, X))
    assert_trees_close(value, mean * np.complex64(1 + 2j), rtol=1e-5)
    gradient = jax.grad(lambda x: g(KEY, x).imag)(X)
    assert_trees_close(gradient, 2 * slope, rtol=1e-5)


def test_complex_values_that_are_not_finite():
    """With a traced sigma, inf + nan j became nan + nan j."""
    odd = np.complex64(complex(np.inf, np.nan))

    @jax.jit
    def values(sigma):
        alone = smooth(lambda y: odd, sigma=sigma)(KEY, X)
        return alone, smooth(lambda y: (1 + 2j) * jnp.sum(y), sigma=sigma)(KEY, X)

    alone, mean = map(np.asarray, values(SIGMA))
    assert np.isposinf(alone.real)
    assert np.isnan(alone.imag)
    expected = np.complex64(1 + 2j) * np.asarray(smooth(jnp.sum)(KEY, X))
    assert_trees_close(mean, expected, rtol=1e-5)
    impossible = np.asarray(values(-1.0)[1])
    assert np.isnan(impossible.real)
    assert np.isnan(impossible.imag)


def test_pytrees_in_and_out():
    Pair = collections.namedtuple("Pair", ["first", "second"])
    x = Pair({"w": X}, [np.ones((2, 2), np.float32), ()])
    g = smooth(lambda t: Pair(t.second, {"sum": jnp.sum(t.first["w"])}))
    value = g(KEY, x)
    assert jax.tree.structure(value) == jax.tree.structure(Pair(x.second, {"sum": 0}))
    gradient = jax.grad(lambda x: g(KEY, x).second["sum"])(x)
    assert jax.tree.map(np.shape, gradient) == jax.tree.map(np.shape, x)


def test_fun_may_be_any_callable():
    class Weighted:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, y):
            return self.weight * fun(y)

        def method(self, y):
            return self(y)

    @jax.jit
    def jitted(weight, y):
        return weight * fun(y)

    expected = np.float32(2) * np.asarray(eager()[0])
    double = Weighted(2.0)
    for f in (double, double.method, functools.partial(jitted, 2.0)):
        assert_trees_close(smooth(f)(KEY, X), expected, rtol=1e-6)


def test_aux_with_derivatives():
    (value, aux), gradient = jax.value_and_grad(
        smooth(lambda y: (fun(y), {"order": jnp.argsort(y)}), has_aux=True), argnums=1, has_aux=True
    )(KEY, X)
    assert_like_eager((value, gradient))
    z, _ = noise_and_values()
    np.testing.assert_array_equal(aux["order"], np.argsort(X + SIGMA * z, axis=1))


# --- Callbacks

METHODS = ["sequential", "sequential_unrolled", "expand_dims", "broadcast_all", None]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_pure_callback(method):
    rows = 0

    def host(y):
        nonlocal rows
        y = np.asarray(y)
        rows += int(np.prod(y.shape[:-1]))
        return np.asarray(np.sum(y**2, axis=-1) + y[..., 0] * y[..., 1] + np.sum(y > 0, axis=-1))

    def call(y):
        spec = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda v: host(v).astype(np.float32), spec, y, vmap_method=method)

    batch_size = 1 if method is None else None
    value = smooth(call, batch_size=batch_size)(KEY, X)
    jax.block_until_ready(value)
    assert rows == 12
    rows = 0
    result = jax.block_until_ready(value_and_grad(call, batch_size=batch_size)(KEY, X))
    assert rows == 12
    assert_like_eager(result)
    assert_trees_close(value, eager()[0], rtol=1e-5)


@pytest.mark.covering("num_samples")
@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
@pytest.mark.parametrize("num_samples", [1, 2, 32])
def test_callbacks_of_many_points_see_one_leading_axis(method, num_samples):
    """With few samples they saw the bare point as well, and two axes under a vmap.

    Leaves of x that are not floating had an axis of 1; so did numbers.
    """
    seen = []

    def host(y, *others):
        seen.append([np.shape(v) for v in (y, *others)])
        return np.sum(np.square(y), axis=-1, dtype=np.float32)

    def call(x):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(host, like, *jax.tree.leaves(x), vmap_method=method)

    def fun(x, weight):  # jitted inside, and differentiable in what is not the callback's
        return weight * jax.jit(call)(x)

    def gradient(y, weight):
        x = [y, jnp.asarray(np.array([1, 2])), np.array([1, 2, 3]), 4]
        g = px.make_perturbed_fun(fun, num_samples, 0.3, degree=0)
        return jax.grad(lambda y, w: g(KEY, [y, *x[1:]], w), (0, 1))(y, weight)

    single = jax.block_until_ready(gradient(X, 2.0))
    rows = {shapes[0][0] for shapes in seen}
    assert rows == {1, num_samples} - ({1} if num_samples == 32 else set())
    for shapes in seen:
        assert shapes == [(shapes[0][0], *shape) for shape in [(3,), (2,), (3,), ()]]
    seen.clear()
    batch = jax.block_until_ready(jax.vmap(gradient)(np.stack([X] * 4), np.full(4, 2, np.float32)))
    assert {shapes[0][0] for shapes in seen} == {4 * n for n in rows}
    for shapes in seen:
        assert shapes == [(shapes[0][0], *shape) for shape in [(3,), (2,), (3,), ()]]
    assert_trees_close(jax.tree.map(lambda v: np.asarray(v)[3], batch), single, rtol=1e-5)


def test_callbacks_of_many_points_inside_a_linear_solve():
    """Its parts are a named tuple, which once could not be put together again."""
    halve = lambda v: np.asarray(v) / np.float32(2)  # noqa: E731

    def fun(y):
        solve = lambda _, b: jax.pure_callback(halve, y, b, vmap_method="expand_dims")  # noqa: E731
        return jnp.sum(jax.lax.custom_linear_solve(lambda v: 2 * v, y, solve, symmetric=True))

    assert_trees_close(smooth(fun)(KEY, X), smooth(lambda y: jnp.sum(y / 2))(KEY, X), rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"batch_size": 1}, {"batch_size": 4}], ids=str)
def test_number_of_evaluations(settings):
    counter = EvaluationCounter(fun)
    jax.block_until_ready(jax.jit(smooth(counter, use_baseline=False, **settings))(KEY, X))
    assert counter.evaluations == 12
    counter.reset()
    jax.block_until_ready(jax.jit(value_and_grad(counter, **settings))(KEY, X))
    assert counter.evaluations == 12


def on_the_host(outputs):
    """A function of so many outputs that runs outside JAX, and the list of what it has seen."""
    seen = []

    def record(y):
        seen.extend(y.reshape(-1, 3))
        value = np.sum(np.square(y), axis=-1, keepdims=True, dtype=np.float32)
        return np.repeat(value, outputs, axis=-1)

    def host(y):
        shape = jax.ShapeDtypeStruct((outputs,), jnp.float32)
        return jax.pure_callback(record, shape, y, vmap_method="expand_dims")

    return host, seen


@pytest.mark.parametrize("outputs", [1, 12])
@pytest.mark.parametrize("settings", [{}, {"degree": 0}], ids=str)
def test_number_of_evaluations_of_second_derivatives(outputs, settings):
    host, seen = on_the_host(outputs)

    def loss(x):
        return jnp.sum(smooth(host, 40, **settings)(KEY, x) ** 2)

    for second in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
        seen.clear()
        jax.block_until_ready(jax.jit(second(loss))(X))
        assert len(seen) == 40


@pytest.mark.covering("leaves")
@pytest.mark.parametrize("leaves", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"degree": 0}], ids=str)
def test_evaluations_do_not_grow_with_the_number_of_leaves(leaves, settings):
    """Of second derivatives: the function was evaluated once for each of several leaves."""
    host, seen = on_the_host(leaves)
    g = smooth(lambda y: [k * v for k, v in enumerate(host(y))], 40, **settings)

    def loss(x):
        return sum(v**2 for v in g(KEY, x))

    for second in (jax.hessian(functools.partial(g, KEY)), jax.hessian(loss))[: 1 + leaves // 4]:
        seen.clear()
        jax.block_until_ready(jax.jit(second)(X))
        assert len(seen) == 40


@pytest.mark.covering("sampler")
@pytest.mark.parametrize(
    ("sampler", "num_samples", "more"),
    [
        (px.Independent(), 1, 1),
        (px.Independent(), 2, 1),
        (px.Independent(), 3, 0),
        (px.Orthogonal(), 5, 1),
        (px.Orthogonal(), 6, 0),
        (px.Sobol(), 4, 0),
        (px.Sobol(1), 64, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [None, 8])
def test_the_value_at_x_is_evaluated_only_for_want_of_others(
    sampler, num_samples, more, batch_size
):
    settings = {"degree": 0, "sampler": sampler, "batch_size": batch_size}
    counter = EvaluationCounter(fun)
    jax.block_until_ready(value_and_grad(counter, num_samples, **settings)(KEY, X))
    assert counter.evaluations == num_samples + more


@pytest.mark.parametrize("sampler", [px.Independent(), px.Sobol(8)], ids=str)
def test_a_constant_costs_no_digits_in_chunks(sampler):
    """Values are counted from the first one, which goes from chunk to chunk."""

    def gradient(constant, batch_size):
        def steps(y):  # whole numbers, exact with the constant added
            return jnp.sum(jnp.floor(4 * y)) + constant

        settings = {"degree": 0, "sampler": sampler, "batch_size": batch_size}
        return jax.grad(px.make_perturbed_fun(steps, 88, 0.5, **settings), argnums=1)(KEY, X)

    expected = gradient(0.0, None)
    for batch_size in (None, 11, 24):
        np.testing.assert_allclose(gradient(2.0**20, batch_size), expected, rtol=1e-4)


@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_io_callback(ordered):
    seen = []

    def record(y):
        y = np.array(y)
        seen.append(y)
        return np.float32(np.sum(y**2) + y[0] * y[1] + np.sum(y > 0))

    def call(y):
        return io_callback(record, jax.ShapeDtypeStruct((), jnp.float32), y, ordered=ordered)

    result = value_and_grad(call, batch_size=1 if ordered else None)(KEY, X)
    jax.effects_barrier()
    assert_like_eager(result)
    z, _ = noise_and_values()
    expected = np.asarray(X + SIGMA * z)
    if not ordered:
        seen, expected = (sorted(rows, key=lambda row: row[0]) for rows in (seen, expected))
    np.testing.assert_allclose(seen, expected, atol=1e-5)


# --- What fun closes over, and further arguments


def test_closed_over_parameters():
    z, _ = noise_and_values()
    y = np.asarray(X) + np.float32(SIGMA) * z

    def loss(x, theta, batch_size=None):
        options = {"batch_size": batch_size, "use_baseline": False}
        return smooth(lambda y: jnp.sum(jnp.sin(theta * y)), **options)(KEY, x)

    def mean_derivative(x):
        # d/dtheta f is a function of its own, smoothed by the same samples.
        return smooth(lambda y: y * jnp.cos(2.0 * y), use_baseline=False)(KEY, x)

    theta = np.full(3, 2, np.float32)
    in_theta = jax.grad(loss, argnums=1)(X, theta)
    np.testing.assert_allclose(in_theta, np.mean(y * np.cos(2.0 * y), axis=0), rtol=1e-4)
    mixed = np.asarray(jax.jit(jax.jacrev(jax.grad(loss, argnums=1)))(X, theta))
    assert_trees_close(mixed, jax.jit(jax.jacrev(mean_derivative))(X), rtol=1e-4, atol=1e-4)
    other = jax.jit(jax.jacfwd(jax.grad(loss), argnums=1), static_argnums=2)(X, theta, 5)
    assert_trees_close(other, mixed.T, rtol=1e-4, atol=1e-4)


def test_closed_over_value_that_depends_on_x():
    g = smooth(lambda y, a: jnp.sum(a * y))

    def total(x):
        return smooth(lambda y: jnp.sum(x**2 * y))(KEY, x)

    x = np.asarray(X)
    slopes = jax.grad(lambda x, a: g(KEY, x, a), argnums=(0, 1))(X, x**2)
    in_y, in_a = map(np.asarray, slopes)
    assert_trees_close(jax.grad(total)(X), in_y + 2 * x * in_a, rtol=1e-4, atol=1e-5)


def test_further_arguments_of_any_kind():
    def f(y, tree, flag, *, count, table):
        picked = tree["w"] if flag else 0.0
        return jnp.sum(y * picked) + count * jnp.sum(y > 0) + table[jnp.argmax(y)]

    g = smooth(f)
    tree = {"w": np.float32([1, 2, 3]), "n": np.arange(2), "key": jax.random.key(1)}
    gradient = jax.grad(
        lambda tree: g(KEY, X, tree, True, count=2, table=jnp.arange(3.0)), allow_int=True
    )(tree)
    z, _ = noise_and_values()
    np.testing.assert_allclose(gradient["w"], np.mean(X + SIGMA * z, axis=0), rtol=1e-5)
    assert gradient["n"].dtype == gradient["key"].dtype == jax.dtypes.float0


# --- Batches


def evaluate_in_batches(batch_size):
    """Value, gradient and aux in one pass or two, 20 samples, without jit."""
    with_aux = smooth(lambda y: (fun(y), jnp.argmax(y)), 20, batch_size=batch_size, has_aux=True)
    plain = smooth(lambda y: {"a": fun(y), "b": y[0]}, 20, batch_size=batch_size)

    def results(key, x):
        pair = jax.value_and_grad(with_aux, argnums=1, has_aux=True)(key, x)
        value, pullback = jax.vjp(functools.partial(plain, key), x)
        return pair, value, pullback({"a": jnp.float32(1.0), "b": jnp.float32(2.0)})

    return results


@pytest.mark.parametrize(
    ("jit", "batch_sizes"),
    [(True, [1, 7, 64]), (False, [7])],
    ids=["jit", "eager"],
)
def test_result_does_not_depend_on_the_batch_size(jit, batch_sizes, everything):
    whole, *others = (
        (jax.jit if jit else lambda run: run)(evaluate_in_batches(batch_size))(KEY, X)
        for batch_size in [None, *batch_sizes, *[20] * everything]
    )
    ((_, aux), _), *_ = whole
    assert aux.shape == (20,)
    for other in others:
        assert_trees_close(other, whole, rtol=1e-4, atol=1e-5)


def test_derivatives_do_not_depend_on_the_batch_size():
    def run(batch_size):
        def value(x, theta):
            return smooth(lambda y: fun(theta * y), 20, batch_size=batch_size)(KEY, x)

        return jax.jit(jax.hessian(value, argnums=(0, 1)))(X, 1.5)

    assert_trees_close(run(7), run(None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"degree": 0}, pytest.param({"use_baseline": False}, marks=pytest.mark.full)],
    ids=str,
)
def test_derivatives_of_many_outputs_do_not_depend_on_the_batch_size(settings):
    """All samples in one chunk have a rule of their own, chunks are differentiated by JAX."""
    rows = np.float32(np.random.default_rng(1).normal(size=(12, 3)))

    def run(batch_size):
        def call(x, sigma, theta):
            def steps(y):
                return {"many": jnp.sign(rows @ y + theta) * jnp.sum(y**2), "one": jnp.max(y)}

            return smooth(steps, 30, sigma=sigma, batch_size=batch_size, **settings)(KEY, x)

        def first(*at):
            found = jax.jacrev(call, (0, 1))(*at)
            return found, found

        second = jax.jacfwd(first, (0, 1, 2), has_aux=True)
        forward = jax.jacfwd(call, (0, 1))
        return jax.jit(lambda *at: (second(*at), forward(*at)))(X, 0.5, 0.7)

    assert_trees_close(run(7), run(None), rtol=1e-4, atol=1e-4)


# --- x of any floating dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_of_x(dtype):
    seen = []

    def f(y):
        seen.append(str(y.dtype))
        return fun(y)

    with enable_x64(dtype == "float64"):
        x = jnp.asarray(np.asarray(X), dtype)
        value, gradient = value_and_grad(f)(KEY, x)
        samples = smooth(lambda y: (f(y), y), has_aux=True)
        mean, y = samples(KEY, x)
        # A compiled program may keep more digits of low precision than fun has by itself.
        rounding = {"float32": 1e-6, "float64": 1e-12}.get(dtype, float(jnp.finfo(dtype).eps))
        np.testing.assert_allclose(mean, value, rtol=rounding)
        assert value.dtype == ("float64" if dtype == "float64" else "float32")
        assert gradient.dtype == y.dtype == dtype
        assert set(seen) == {dtype}
        expected = np.mean(np.asarray(jax.jit(jax.vmap(fun))(y), np.float64))
        np.testing.assert_allclose(mean, expected, rtol=rounding)


def test_double_precision_is_double_precision():
    with enable_x64(True):
        x = jnp.asarray(np.asarray(X), jnp.float64)
        samples = smooth(lambda y: (fun(y), y), has_aux=True, use_baseline=False)
        _, y = samples(KEY, x)
        f = jax.jit(jax.vmap(fun))(y)
        z = (np.asarray(y) - np.asarray(x)) / SIGMA
        expected = reference.differentiate_samples(f, z, SIGMA, "Normal")
        hessian = jax.jit(jax.hessian(smooth(use_baseline=False), argnums=1))(KEY, x)
        np.testing.assert_allclose(hessian, expected["hessian"], rtol=1e-11, atol=1e-11)


def test_the_mean_of_the_others_is_of_double_precision():
    """JAX divides integers, such as how many the others are, in single precision."""
    with enable_x64(True):
        x, options = jnp.asarray(np.asarray(X), jnp.float64), {"sampler": px.Independent()}
        gradient = jax.jit(jax.grad(smooth(degree=0, **options), argnums=1))(KEY, x)
        _, (f, y) = smooth(lambda y: (fun(y), (fun(y), y)), has_aux=True, **options)(KEY, x)
        f, z = np.asarray(f), (np.asarray(y) - np.asarray(x)) / SIGMA
        others = (f.sum() - f) / (len(f) - 1)
        np.testing.assert_allclose(gradient, (f - others) @ z / len(f) / SIGMA, rtol=1e-12)


def test_mixed_dtypes():
    with enable_x64(True):
        x = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float64), "c": np.float16(1.0)}
        value, gradient = value_and_grad(lambda t: jnp.sum(t["a"]) + jnp.sum(t["b"]) + t["c"])(
            KEY, x
        )
        assert value.dtype == jnp.float64
        assert [gradient[name].dtype for name in "abc"] == ["float32", "float64", "float16"]


# --- Noise that is known by its two methods alone


class Own:
    """Logistic noise, from a draw and a log-density."""

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.logistic(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -inputs - 2.0 * jnp.logaddexp(0.0, -inputs)


class OwnNormal(Own):
    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -0.5 * inputs**2


def test_own_noise():
    z, f = noise_and_values(noise=OwnNormal())
    expected = reference.differentiate_samples(f, z, SIGMA, "Normal")
    g = smooth(noise=OwnNormal(), use_baseline=False)
    hessian = jax.jit(jax.hessian(g, argnums=1))(KEY, X)
    np.testing.assert_allclose(g(KEY, X), expected["value"], rtol=1e-5)
    np.testing.assert_allclose(hessian, expected["hessian"], rtol=1e-4, atol=1e-4)
    value, gradient = value_and_grad(lambda y: jnp.sum(y), 20_000, noise=Own())(KEY, X)
    np.testing.assert_allclose(value, np.sum(X), atol=5 * SIGMA * np.pi / np.sqrt(20_000))
    np.testing.assert_allclose(gradient, 1.0, atol=0.1)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_noise_that_closes_over_a_tracer(jit):
    # A scale inside the noise does the same as sigma, except that it is not differentiated in x.
    class Scaled(OwnNormal):
        def __init__(self, scale):
            self.scale = scale

        def sample(self, key, sample_shape=(), dtype=float):
            return self.scale * super().sample(key, sample_shape, dtype)

        def log_prob(self, inputs):
            return super().log_prob(inputs / self.scale)

    def scaled(scale):
        return value_and_grad(sigma=1.0, noise=Scaled(scale))(KEY, X)

    expected = value_and_grad(noise=OwnNormal())(KEY, X)
    run = jax.jit(scaled) if jit else lambda s: jax.vmap(scaled)(np.float32([s, 1.0]))
    actual = run(SIGMA)
    actual = actual if jit else jax.tree.map(lambda v: np.asarray(v)[0], actual)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.covering("options")
@pytest.mark.parametrize("size", [2, 9])
@pytest.mark.parametrize(
    "options", [{}, {"degree": 0}, {"use_baseline": False}, {"batch_size": 64}]
)
def test_what_is_not_finite_in_one_leaf_spares_the_others(options, size):
    """In values and in derivatives of any order, with few outputs and with many."""

    def fun(y):
        return {"loss": jnp.sum(y**2), "other": jnp.log(-1 - y[0] ** 2) * jnp.ones(size)}

    smooth = px.make_perturbed_fun(fun, 256, 0.5, px.Normal(), **options)
    alone = px.make_perturbed_fun(lambda y: fun(y)["loss"], 256, 0.5, px.Normal(), **options)
    x = jnp.array([0.5, -1.0])

    modes = ((jax.jacfwd, jax.grad), (jax.jacrev, jax.jacfwd), (jax.jacrev, jax.grad))

    @jax.jit
    def derivatives(x):
        def first_and_second(outer, inner, fun):
            def first(x):
                return (inner(fun)(x),) * 2

            return outer(first, has_aux=True)(x)

        expected = first_and_second(*modes[0], lambda x: alone(KEY, x))
        return expected, [
            first_and_second(*mode, lambda x: smooth(KEY, x)["loss"]) for mode in modes
        ]

    expected, found = derivatives(x)
    for one in found:
        assert_trees_close(one, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_samples", [1, 10, 200])
def test_parameters_need_no_derivative_at_x_itself(num_samples):
    """A baseline may use fun(x), but not its derivative, which does not exist here."""

    def fun(y, parameters):
        return jnp.sqrt(jnp.abs(parameters @ y))

    x, parameters = np.float32([1, -1]), np.ones(2, np.float32)
    smooth = px.make_perturbed_fun(fun, num_samples, 0.5, px.Normal())
    gradient = jax.grad(smooth, argnums=2)(KEY, x, parameters)
    assert np.isfinite(gradient).all()
    plain = px.make_perturbed_fun(fun, num_samples, 0.5, px.Normal(), use_baseline=False)
    if num_samples == 1:  # where the default draws the same noise
        np.testing.assert_allclose(
            gradient, jax.grad(plain, argnums=2)(KEY, x, parameters), rtol=1e-5
        )


def fun_of_two(y, scale):
    return scale * jnp.max(y)


def fun_with_effects(y, scale):
    jax.experimental.io_callback(lambda _: None, None, y, ordered=True)
    return fun_of_two(y, scale)


@pytest.mark.parametrize("fun_of_x_and_scale", [fun_of_two, fun_with_effects])
def test_mixed_derivatives_in_chunks_whatever_the_order(fun_of_x_and_scale):
    """What reverse mode computes anew, chunk by chunk, has its derivatives too."""
    whole = px.make_perturbed_fun(fun_of_two, 4, 0.5)
    chunks = px.make_perturbed_fun(fun_of_x_and_scale, 4, 0.5, batch_size=1)
    modes = ((jax.jacfwd, jax.grad), (jax.jacrev, jax.grad), (jax.jacrev, jax.jacfwd))

    @jax.jit
    def derivatives(*at):
        def twice(outer, inner, fun):
            return outer(inner(fun, argnums=(1, 2)), argnums=(1, 2))(KEY, *at)

        return twice(jax.jacfwd, jax.jacfwd, whole), [twice(*mode, chunks) for mode in modes]

    expected, found = derivatives(jnp.array([0.5, 0.0625, -0.25]), 0.5)
    assert np.abs(expected[1][0]).min() > 0.01
    for one in found:
        assert_trees_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", ["propagate", "drop"])
def test_a_value_without_leaves(missing):
    """What is returned beside it is all that there is."""
    g = px.make_perturbed_fun(lambda x: ((), x), 5, has_aux=True, missing=missing)
    value, aux = jax.jit(g)(KEY, X)
    assert value == ()
    assert aux.shape == (5, *X.shape)
