"""Eager calls: compiled once, never stale, and no two different functions share a program."""

import contextlib
import dataclasses
import functools
import gc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import perturbax as px
from helpers import EvaluationCounter, assert_trees_close, enable_x64
from perturbax.tracing._signature import trace

KEY = jax.random.key(0, impl="threefry2x32")
X = jnp.array([0.5, -1.0, 2.0])
SPEC = jax.ShapeDtypeStruct((3,), jnp.float32)
BIG = jnp.arange(12.0).reshape(4, 3)

durations = []


def record(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
        durations.append(duration)


jax.monitoring.register_event_duration_secs_listener(record)


def compilations(run):
    """How many programs are compiled by run()."""
    before = len(durations)
    jax.block_until_ready(run())
    return len(durations) - before


def smooth(fun, sigma=0.5, num_samples=6, **settings):
    return px.make_perturbed_fun(fun, num_samples, sigma, px.Normal(), **settings)


def test_compilations_are_counted():
    assert compilations(lambda: jax.jit(lambda x: x * 2.0 + 1.0)(X)) == 1


# --- Functions that are written anew at every call, and equal


def host_sum(y):
    return np.sum(np.abs(y)).astype(np.float32)


def host_sort(y):
    return np.sort(np.asarray(y), axis=-1)


@jax.custom_jvp
def clipped(y):
    return jnp.clip(y, -1.0, 1.0)


@clipped.defjvp
def clipped_jvp(primals, tangents):
    return clipped(*primals), tangents[0]


@jax.custom_vjp
def doubled(y):
    return 2.0 * y


doubled.defvjp(lambda y: (2.0 * y, None), lambda _, y_bar: (2.0 * y_bar,))


def softmax_made_anew(y):
    """Rules and all made at every call."""

    @jax.custom_jvp
    def softmax(v):
        e = jnp.exp(v)
        return e / e.sum()

    @softmax.defjvp
    def rule(primals, tangents):
        p = softmax(*primals)
        return p, p * (tangents[0] - p @ tangents[0])

    return softmax(y)


def rounded_made_anew(y):
    @jax.custom_vjp
    def rounded(v):
        return jnp.round(v)

    rounded.defvjp(lambda v: (jnp.round(v), None), lambda _, v_bar: (v_bar,))
    return rounded(y)


LABELS = np.array([0.0, 1.0, 0.0], np.float32)


# Each entry makes the function: what is called twice is not one Python object.
ALIKE = {
    "lambda": lambda: lambda y: jnp.sum(y**2),
    "constants": lambda: lambda y: y @ BIG.T + np.arange(4.0, dtype=np.float32) * 2,
    "nan": lambda: lambda y: jnp.where(y > 0, y, jnp.nan),
    "relu": lambda: lambda y: jax.nn.relu(y),
    "gelu": lambda: lambda y: jax.nn.gelu(y),
    "softmax": lambda: lambda y: jax.nn.softmax(y),
    "logsumexp": lambda: lambda y: jax.nn.logsumexp(y),
    "top_k": lambda: lambda y: lax.top_k(y, 2),
    "argsort": lambda: lambda y: jnp.argsort(y),
    "while": lambda: lambda y: lax.while_loop(lambda v: v[0] < 4, lambda v: v + 1, y),
    "fori": lambda: lambda y: lax.fori_loop(0, 3, lambda i, v: v * i, y),
    "cond": lambda: lambda y: lax.cond(y[0] > 0, lambda v: v, lambda v: -v, y),
    "switch": lambda: lambda y: lax.switch(jnp.argmax(y), [jnp.sum, jnp.min, jnp.max], y),
    "scan": lambda: lambda y: lax.scan(lambda c, v: (c + v, c * v), 0.0, y),
    "scan over constants": lambda: lambda y: lax.scan(lambda c, v: (c + y * v, None), y, BIG),
    "map": lambda: lambda y: lax.map(lambda v: v**2, y),
    "vmap": lambda: lambda y: jax.vmap(lambda row: row @ y)(BIG),
    "jit": lambda: lambda y: jax.jit(lambda v: v * 3.0)(y),
    "checkpoint": lambda: lambda y: jax.checkpoint(lambda v: jnp.sin(v))(y),
    "grad inside": lambda: lambda y: jax.grad(lambda v: jnp.sum(jax.nn.softmax(v) ** 2))(y),
    "pure_callback": lambda: (
        lambda y: jax.pure_callback(host_sort, SPEC, y, vmap_method="broadcast_all")
    ),
    "pure_callback of a lambda": lambda: (
        lambda y: jax.pure_callback(lambda v: host_sort(v), SPEC, y, vmap_method="broadcast_all")
    ),
    "random": lambda: lambda y: y + jax.random.normal(jax.random.key(1), (3,)),
    "solve": lambda: lambda y: jnp.linalg.solve(jnp.eye(3) + jnp.outer(y, y), y),
    "cholesky": lambda: lambda y: jnp.linalg.cholesky(jnp.eye(3) + jnp.outer(y, y)),
    "eigh": lambda: lambda y: jnp.linalg.eigh(jnp.outer(y, y))[0],
    "custom_linear_solve": lambda: lambda y: jax.scipy.sparse.linalg.cg(lambda v: 2.0 * v, y)[0],
    "custom_jvp": lambda: lambda y: clipped(y),
    "custom_vjp": lambda: lambda y: doubled(y),
    "custom_jvp made anew": lambda: lambda y: softmax_made_anew(y),
    "custom_vjp made anew": lambda: lambda y: rounded_made_anew(y),
    "optax cross entropy": lambda: lambda y: optax.softmax_cross_entropy(y, LABELS),
    "optax focal loss": lambda: lambda y: optax.sigmoid_focal_loss(y, LABELS),
    "optax hinge loss": lambda: lambda y: optax.hinge_loss(y, 2 * LABELS - 1),
    "optax huber loss": lambda: lambda y: optax.huber_loss(y, LABELS),
    "optax sparsemax loss": lambda: (
        lambda y: optax.losses.multiclass_sparsemax_loss(y[None], jnp.array([1]))
    ),
    "optax projection": lambda: lambda y: optax.projections.projection_simplex(y),
}

# One of each kind; the rest compares traces.
COMPILED = [
    "relu",
    "softmax",
    "logsumexp",
    "top_k",
    "argsort",
    "while",
    "cond",
    "scan",
    "pure_callback",
    "solve",
    "custom_vjp made anew",
    "optax cross entropy",
    "optax projection",
]


@pytest.mark.parametrize("name", ALIKE)
def test_equal_functions_have_equal_traces(name):
    make = ALIKE[name]
    (first, _), (second, _) = trace(make(), SPEC), trace(make(), SPEC)
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize("name", COMPILED)
def test_second_call_compiles_nothing(name):
    make = ALIKE[name]
    smooth(make(), sigma=0.5)(KEY, X)
    assert compilations(lambda: smooth(make(), sigma=0.7)(KEY, X)) == 0
    # A copy of what goes to a callback is compiled once for each shape (`lax.stage`).
    most = int(name == "pure_callback")
    assert compilations(lambda: smooth(make(), sigma=np.float64(0.9))(KEY, np.ones(3))) <= most


def test_an_eager_step_of_carry_compiles_nothing_after_the_second():
    """A loop was compiled in every one, which took half a second."""
    carried = px.carry(px.make_perturbed_fun(jnp.max, 4, 0.5, px.Normal()))
    found = [carried.init(X)]

    def step():
        _, state = carried.value_and_grad(found[-1], KEY, X)
        found.append(state)

    step()
    step()
    assert compilations(step) == 0


class NoMoments:
    """Noise that says by NaN, computed anew each time, that it has neither mean nor variance."""

    mean = property(lambda self: float("nan"))
    variance = property(lambda self: float("nan"))

    def sample(self, key, sample_shape=(), dtype=float):
        return jax.random.cauchy(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -jnp.log1p(inputs**2)


def test_noise_without_moments_compiles_once():
    """NaN is not equal to itself, so that every call compiled its program anew."""
    noise = NoMoments()

    def run(noise):
        return jax.value_and_grad(px.make_perturbed_fun(jnp.max, 6, 0.5, noise), 1)(KEY, X)

    first = run(noise)
    for again in (noise, NoMoments()):
        second = []
        assert compilations(lambda n=again, s=second: s.append(run(n)) or s) == 0
        assert_trees_close(second[0], first)


@pytest.mark.parametrize("name", ["relu", "custom_jvp", "custom_vjp made anew"])
def test_second_derivative_call_compiles_nothing(name):
    def gradients(sigma, theta):
        def value(x, sigma, theta):
            fun = ALIKE[name]()
            return smooth(lambda y: jnp.sum(fun(y * theta)), sigma=sigma)(KEY, x)

        return jax.grad(value, argnums=(0, 1, 2))(X, sigma, theta)

    first, second = jnp.array([1.0, 1.0, 1.0]), jnp.array([1.0, 2.0, 3.0])
    gradients(0.5, first)
    assert compilations(lambda: gradients(0.7, second)) == 0


def test_new_values_of_what_fun_closes_over_compile_nothing():
    def run(offset, noise_scale):
        class Scaled:
            def sample(self, key, sample_shape=(), dtype=float):
                return noise_scale * jax.random.normal(key, sample_shape, dtype)

            def log_prob(self, inputs):
                return -0.5 * (inputs / noise_scale) ** 2

        table = np.full(3, 2.0, np.float32)
        g = px.make_perturbed_fun(lambda y: jnp.sum(y * offset + table), 6, 0.5, Scaled())
        return jax.grad(g, argnums=1)(KEY, X)

    offsets, scales = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), jnp.array([1.0, 2.0])
    (first, second), (narrow, wide) = list(offsets), list(scales)
    run(first, narrow)
    assert compilations(lambda: run(second, wide)) == 0


class ScaledNormal:
    def __init__(self, scale):
        self.scale = scale

    def sample(self, key, sample_shape=(), dtype=float):
        return self.scale * jax.random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs):
        return -0.5 * (inputs / self.scale) ** 2


# Proportional to the number that they are called with.
OF_A_NUMBER = {
    "further argument": lambda c: smooth(lambda y, rate: jnp.sum(y * rate))(KEY, X, c),
    "keyword argument": lambda c: smooth(lambda y, rate: jnp.sum(y * rate))(KEY, X, rate=c),
    "closure": lambda c: smooth(lambda y: jnp.sum(y) * c)(KEY, X),
    "numpy scalar": lambda c: smooth(lambda y: jnp.sum(y * np.float32(c)))(KEY, X),
    "result": lambda c: smooth(lambda y: c)(KEY, X),
    "two choices": lambda c: smooth(lambda y: jnp.sum(jnp.where(y > 0, c, -c)))(KEY, X),
    "gradient": lambda c: jax.grad(smooth(lambda y: jnp.sum(y) * c), argnums=1)(KEY, X),
    "Hessian": lambda c: jax.hessian(smooth(lambda y: jnp.sum(y**2) * c), argnums=1)(KEY, X),
    "one by one": lambda c: smooth(lambda y: jnp.sum(y) * c, batch_size=1)(KEY, X),
    "vmap": lambda c: jax.vmap(smooth(lambda y: jnp.sum(y) * c), (None, 0))(KEY, X[None]),
    "aux": lambda c: smooth(lambda y: (c * y, 3.0 * c), has_aux=True)(KEY, X),
    "noise": lambda c: px.make_perturbed_fun(
        jnp.sum, 6, 0.5, ScaledNormal(c), sampler=px.Independent()
    )(KEY, jnp.zeros(3)),
    "argmax": lambda c: px.make_perturbed_argmax(lambda y: jnp.where(y > 0, c, 0.0), 6, 0.5)(
        KEY, X
    ),
}


@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_new_numbers_compile_nothing(name):
    """A decaying rate, a Python number, once cost a compilation at every step."""
    run = OF_A_NUMBER[name]
    first, second = run(1.5), []
    assert compilations(lambda: second.append(run(3.0)) or second) == 0
    assert_trees_close(second[0], jax.tree.map(lambda v: 2.0 * v, first), rtol=1e-5)


def test_sign_of_a_zero_is_that_of_the_call():
    results = [smooth(lambda y, z=z: jnp.max(1.0 / (z * abs(y))))(KEY, X) for z in (0.0, -0.0, 0.0)]
    np.testing.assert_array_equal(results, [np.inf, -np.inf, np.inf])


@pytest.mark.parametrize("x64", [False, True])
def test_numbers_keep_their_types(x64):
    with enable_x64(x64):
        fun = lambda y: (y * 2.0, 2.5, np.float32(2.5), y.astype(jnp.bfloat16) * 2.0, 1j)  # noqa: E731
        leaf = jnp.ones(3, jnp.float32)
        traced, operands = trace(fun, leaf)
        assert len(operands) == 5
        expected = jax.tree.leaves(jax.jit(fun)(leaf))
        for value, like in zip(traced(operands, leaf), expected, strict=True):
            assert jax.typeof(value) == jax.typeof(like)
            assert_trees_close(value, like)


def test_zeros_to_compare_with_are_no_operands():
    """With 200 leaves, those of as many rectifiers took a tenth of the time to trace and lower."""
    leaf = jnp.array([-1.0, 0.0, 2.0])
    for number, operands in ((0.0, 2), (0.5, 4)):
        fun = lambda y: jnp.maximum(y, number) + 0.0 * (y > number) + 3.0  # noqa: B023, E731
        traced, found = trace(fun, leaf)
        assert len(found) == operands
        assert_trees_close(traced(found, leaf)[0], fun(leaf))


def test_jitted_and_eager_calls_agree_about_numbers():
    def fun(y, rate):
        return jnp.sum(jnp.where(y > 0.25, 0.1 * y / 3.0, rate) + jax.nn.softplus(y * 0.7))

    for run in (smooth(fun), jax.grad(smooth(fun), argnums=1)):
        assert_trees_close(jax.jit(run)(KEY, X, 0.3), run(KEY, X, 0.3), rtol=3e-6)


def test_fun_is_traced_once_a_call():
    counter = EvaluationCounter(jnp.sum)
    g = smooth(counter)
    for run in (g, jax.grad(g, argnums=1)):
        run(KEY, X)
        counter.reset()
        run(KEY, X)
        assert counter.traces == 1


# --- What changes between calls


GLOBAL = 1.0


class Settings:
    value = 1.0


settings = types.SimpleNamespace(value=1.0, listed=[1.0], array=np.ones(3, np.float32))
scalar = np.array(1.0, np.float32)


def set_global(value):
    globals()["GLOBAL"] = value


def set_class(value):
    Settings.value = value


def set_attribute(value):
    settings.value = value


def set_item(value):
    settings.listed[0] = value


def set_array(value):
    settings.array[:] = value


def set_scalar(value):
    scalar[...] = value


def make_nonlocal():
    current = 1.0

    def change(value):
        nonlocal current
        current = value

    return lambda y: jnp.sum(y) * current, change


READ_NONLOCAL, set_nonlocal = make_nonlocal()

CHANGES = {
    "global": (lambda y: jnp.sum(y) * GLOBAL, set_global),
    "attribute of a class": (lambda y: jnp.sum(y) * Settings.value, set_class),
    "attribute of an object": (lambda y: jnp.sum(y) * settings.value, set_attribute),
    "item of a list": (lambda y: jnp.sum(y) * settings.listed[0], set_item),
    "variable of an enclosing function": (READ_NONLOCAL, set_nonlocal),
    "array in place": (lambda y: jnp.sum(y * settings.array), set_array),
    "scalar array in place": (lambda y: jnp.sum(y) * scalar, set_scalar),
    "array in a branch": (
        lambda y: lax.cond(True, lambda v: jnp.sum(v * settings.array), jnp.sum, y),
        set_array,
    ),
    "array in a loop": (
        lambda y: lax.fori_loop(0, 1, lambda _, v: v * settings.array, y).sum(),
        set_array,
    ),
    "array in a jitted function": (
        lambda y: jax.jit(lambda v: jnp.sum(v * settings.array))(y),
        set_array,
    ),
    "scalar array in a jitted function": (
        lambda y: jax.jit(lambda v: jnp.sum(v) * scalar)(y),
        set_scalar,
    ),
    "attribute in a callback": (
        lambda y: jax.pure_callback(
            lambda v: host_total(v) * np.float32(settings.value),
            jax.ShapeDtypeStruct((), jnp.float32),
            y,
            vmap_method="broadcast_all",
        ),
        set_attribute,
    ),
}


def host_total(y):
    return np.sum(y, axis=-1, dtype=np.float32)


@pytest.mark.parametrize("name", CHANGES)
def test_changed_values_are_never_stale(name):
    fun, change = CHANGES[name]
    g = smooth(fun)
    results = []
    for value in (1.0, 3.0, 2.0, 1.0):
        change(value)
        results.append(float(g(KEY, X)))
    first = smooth(jnp.sum)(KEY, X)
    np.testing.assert_allclose(results, first * np.array([1.0, 3.0, 2.0, 1.0]), rtol=1e-5)


def aligned(size):
    """A numpy array that JAX could use in place, instead of a copy."""
    room = np.empty(size + 64, np.float32)
    start = -(room.ctypes.data // 4) % 16
    return room[start : start + size]


def test_numpy_arrays_may_change_before_derivatives_are_taken():
    weights, x, sigma = aligned(16), aligned(16), aligned(16)

    def pull(change):
        weights[:], x[:], sigma[:] = 1.0, 2.0, 0.5
        g = smooth(lambda y, scale: jnp.sum(scale * weights * y**2), sigma=sigma)
        _, pullback = jax.vjp(lambda scale: g(KEY, x, scale), jnp.float32(1.0))
        if change:
            weights[:] = x[:] = sigma[:] = 100.0
        return pullback(jnp.float32(1.0))

    assert_trees_close(pull(change=True), pull(change=False))


def rule_of(slope):
    """A function whose derivative is what slope() says when it is differentiated."""

    @jax.custom_jvp
    def identity(v):
        return v

    @identity.defjvp
    def rule(primals, tangents):
        return primals[0], tangents[0] * slope()

    return identity


def backward_rule_of(slope):
    @jax.custom_vjp
    def identity(v):
        return v

    identity.defvjp(lambda v: (v, None), lambda _, v_bar: (v_bar * slope(),))
    return identity


def global_slope():
    return GLOBAL


RULES = {
    "global": (global_slope, set_global),
    "attribute of a class": (lambda: Settings.value, set_class),
    "attribute of an object": (lambda: settings.value, set_attribute),
    "item of a list": (lambda: settings.listed[0], set_item),
    "array in place": (lambda: settings.array[0], set_array),
    "variable of an enclosing function": (lambda: READ_NONLOCAL(jnp.ones(1)), set_nonlocal),
}


@pytest.mark.parametrize("make", [rule_of, backward_rule_of], ids=["jvp", "vjp"])
@pytest.mark.parametrize("name", RULES)
def test_changed_values_in_custom_rules_are_never_stale(name, make):
    # Compilations are kept by the trace, which holds the rule; what it would read, too, must match.
    slope, change = RULES[name]
    fun = make(slope)
    signatures = []
    for value in (1.0, 3.0, 1.0):
        change(value)
        signatures.append(trace(lambda y: fun(2.0 * y), SPEC)[0])
    assert signatures[0] != signatures[1]


@pytest.mark.parametrize("make", [rule_of, backward_rule_of], ids=["jvp", "vjp"])
def test_derivative_by_a_changed_rule(make):
    fun = make(global_slope)

    def gradient():
        return jax.grad(lambda t: smooth(lambda y: jnp.sum(fun(t * y)))(KEY, X))(1.0)

    results = []
    for value in (1.0, 3.0):
        set_global(value)
        results.append(float(gradient()))
    np.testing.assert_allclose(results[1], 3.0 * results[0], rtol=1e-5)


# --- Functions that differ


def with_callback(host):
    return lambda y: jax.pure_callback(host, SPEC, y, vmap_method="broadcast_all")


def with_debug_callback(host):
    def fun(y):
        jax.debug.callback(host, y)
        return jnp.sum(y)

    return fun


def scaling(factor):
    return with_callback(lambda v: v * np.float32(factor))


def scaling_by_default(factor):
    return with_callback(lambda v, factor=factor: v * np.float32(factor))


def appending(log):
    return with_debug_callback(lambda v: log.append(float(v.sum())))


def counting():
    count = 0

    def host(v):
        nonlocal count
        count += 1

    return with_debug_callback(host)


@dataclasses.dataclass
class Counter:
    """Equal to any other counter that stands at the same number."""

    count: int = 0

    def __call__(self, v):
        self.count += 1


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def host(self, v):
        return v * np.float32(self.factor)


def custom(factor):
    return rule_of(lambda: factor)


def custom_backward(factor):
    return backward_rule_of(lambda: factor)


def inner_constant(values):
    values = np.asarray(values, np.float32)
    return lambda y: jax.jit(lambda v: v * values)(y)


def in_context(make_context):
    def fun(y):
        with make_context():
            return y + jax.random.uniform(jax.random.key(0, impl="threefry2x32"), (3,))

    return fun


def with_precision(precision):
    def fun(y):
        with jax.default_matmul_precision(precision):
            return jnp.outer(y, y) @ y

    return fun


def from_namespace(slope):
    """A rule of one text, in namespaces of its own."""
    namespace = {"SLOPE": slope}
    exec("def rule(primals, tangents): return primals[0], tangents[0] * SLOPE", namespace)

    @jax.custom_jvp
    def identity(v):
        return v

    identity.defjvp(namespace["rule"])
    return identity


DIFFERENT = {
    "literal": (lambda y: y.astype(jnp.int32) * 2, lambda y: y.astype(jnp.int32) * 3),
    "exponent": (lambda y: abs(y) ** 0.5, lambda y: abs(y) ** 1.5),
    "integer and boolean": (lambda y: jnp.full(3, 1), lambda y: jnp.full(3, True)),
    "order of operands": (lambda y: y[0] - y[1], lambda y: y[1] - y[0]),
    "order of results": (lambda y: (y[0], y[1]), lambda y: (y[1], y[0])),
    "structure of results": (lambda y: {"a": y}, lambda y: {"b": y}),
    "result used twice": (lambda y: (y * 2.0) + (y * 2.0), lambda y: (lambda v: v + v)(y * 2.0)),
    "dtype": (lambda y: y.astype(jnp.float16), lambda y: y.astype(jnp.bfloat16)),
    "dtype inside": (
        lambda y: y.astype(jnp.float16).astype(jnp.float32),
        lambda y: y.astype(jnp.bfloat16).astype(jnp.float32),
    ),
    "static parameter": (lambda y: lax.top_k(y, 2)[0][:1], lambda y: lax.top_k(y, 1)[0][:1]),
    "axis": (lambda y: jnp.sort(BIG * y, axis=0), lambda y: jnp.sort(BIG * y, axis=1)),
    "direction": (lambda y: jnp.cumsum(y), lambda y: jnp.cumsum(y[::-1])),
    "fill value": (
        lambda y: y.at[jnp.array([5])].get(mode="fill", fill_value=1.0),
        lambda y: y.at[jnp.array([5])].get(mode="fill", fill_value=2.0),
    ),
    "sign of a zero fill value": (
        lambda y: y.at[jnp.array([5])].get(mode="fill", fill_value=0.0),
        lambda y: y.at[jnp.array([5])].get(mode="fill", fill_value=-0.0),
    ),
    "length of a loop": (
        lambda y: lax.fori_loop(0, 3, lambda i, v: v * 2, y),
        lambda y: lax.fori_loop(0, 4, lambda i, v: v * 2, y),
    ),
    "condition of a loop": (
        lambda y: lax.while_loop(lambda v: v[0] < 3, lambda v: v + 1, y),
        lambda y: lax.while_loop(lambda v: v[0] < 4, lambda v: v + 1, y),
    ),
    "body of a loop": (
        lambda y: lax.while_loop(lambda v: v[0] < 3, lambda v: v + 1, y),
        lambda y: lax.while_loop(lambda v: v[0] < 3, lambda v: v + 2, y),
    ),
    "branch": (
        lambda y: lax.cond(y[0] > 0, lambda v: v, lambda v: v * 2, y),
        lambda y: lax.cond(y[0] > 0, lambda v: v, lambda v: v * 3, y),
    ),
    "order of branches": (
        lambda y: lax.cond(y[0] > 0, jnp.sum, jnp.max, y),
        lambda y: lax.cond(y[0] > 0, jnp.max, jnp.sum, y),
    ),
    "inner function": (lambda y: jax.jit(jnp.sin)(y), lambda y: jax.jit(jnp.cos)(y)),
    "constant of an inner function": (inner_constant([1, 2, 3]), inner_constant([1, 2, 4])),
    "matrix precision": (with_precision("float32"), with_precision("bfloat16")),
    "random bits": (
        in_context(contextlib.nullcontext),
        in_context(lambda: jax.threefry_partitionable(False)),
    ),
    "generator": (
        lambda y: y + jax.random.normal(jax.random.key(0)),
        lambda y: y + jax.random.normal(jax.random.key(0, impl="rbg")),
    ),
    "solver of a linear system": (
        lambda y: lax.custom_linear_solve(lambda v: 2 * v, y, lambda _, b: b / 2, symmetric=True),
        lambda y: lax.custom_linear_solve(lambda v: 2 * v, y, lambda _, b: b / 3, symmetric=True),
    ),
    "callback": (with_callback(host_sort), with_callback(lambda v: -np.asarray(v))),
    "closure of a callback": (scaling(1.0), scaling(2.0)),
    "default of a callback": (scaling_by_default(1.0), scaling_by_default(2.0)),
    "partial callback": (
        with_callback(functools.partial(np.multiply, np.float32(2.0))),
        with_callback(functools.partial(np.multiply, np.float32(3.0))),
    ),
    "method of another object": (with_callback(Scale(1.0).host), with_callback(Scale(1.0).host)),
    "shape rule of a callback": (
        lambda y: jax.pure_callback(host_sort, SPEC, y, vmap_method="sequential"),
        lambda y: jax.pure_callback(host_sort, SPEC, y, vmap_method="expand_dims"),
    ),
    "log of a callback": (appending([]), appending([])),
    "variable that a callback changes": (counting(), counting()),
    "object that a callback changes": (
        with_debug_callback(Counter()),
        with_debug_callback(Counter()),
    ),
    "printed text": (
        lambda y: (jax.debug.print("a {}", y), y)[1],
        lambda y: (jax.debug.print("b {}", y), y)[1],
    ),
    "rule": (rule_of(lambda: 1.0), rule_of(lambda: 2.0)),
    "closure of a rule": (custom(1.0), custom(2.0)),
    "sign of a zero in a rule": (custom(0.0), custom(-0.0)),
    "array of a rule": (custom(np.ones(3)), custom(np.zeros(3))),
    "list of a rule": (custom([1.0]), custom([1.0])),
    "function of a rule": (custom(lambda: 1.0), custom(lambda: 2.0)),
    "closure of a backward rule": (custom_backward(1.0), custom_backward(2.0)),
    "namespace of a rule": (from_namespace(1.0), from_namespace(2.0)),
    "what is saved": (
        lambda y: jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.everything_saveable)(y),
        lambda y: jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.nothing_saveable)(y),
    ),
}


class Slopes:
    slope = 2.0


class Inheriting(Slopes):
    pass


package = types.ModuleType("package")
package.constants = types.ModuleType("package.constants")
package.constants.slope = 2.0
package.__file__ = package.constants.__file__ = __file__


class Lazy(types.ModuleType):
    """A module that does not know all of its names, as packages that load their parts late."""

    def __getattr__(self, name):
        raise ImportError(f"{name} is loaded late")


def test_modules_that_load_late_and_installed_ones_are_not_searched():
    """A program was compiled in every call, where an installed package had what cannot be told."""
    lazy = Lazy("lazy")
    lazy.slope = 2.0
    for slope in (lambda: lazy.slope, lambda: optax.contrib.sam and 2.0):
        assert trace(rule_of(slope), SPEC)[0] == trace(rule_of(slope), SPEC)[0]


@pytest.mark.parametrize(
    ("owner", "slope"),
    [(Slopes, lambda: Inheriting.slope), (package.constants, lambda: package.constants.slope)],
    ids=["class", "package"],
)
def test_what_a_rule_inherits_or_finds_in_a_package_is_not_stale(owner, slope, monkeypatch):
    """The program of the call before was met, with the old slope."""
    before, _ = trace(rule_of(slope), SPEC)
    assert before == trace(rule_of(slope), SPEC)[0]
    monkeypatch.setattr(owner, "slope", 4.0)
    after, _ = trace(rule_of(slope), SPEC)
    assert before != after


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_functions_have_different_traces(name):
    first, second = (trace(fun, SPEC)[0] for fun in DIFFERENT[name])
    assert first != second


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("constant of an inner function", [1, 1, 4 / 3]), ("closure of a callback", 2)],
)
def test_different_functions_have_results_of_their_own(name, ratio):
    first, second = (smooth(fun)(KEY, X) for fun in DIFFERENT[name])
    np.testing.assert_allclose(second, first * np.array(ratio), rtol=1e-5)


def test_callbacks_reach_their_own_objects():
    logs = [], []
    for log in logs:
        smooth(appending(log), use_baseline=False)(KEY, X)
        jax.effects_barrier()
        assert len(log) == 6
        log.clear()
    counters = Counter(), Counter()
    for counter in counters:
        smooth(with_debug_callback(counter), use_baseline=False)(KEY, X)
        jax.effects_barrier()
        assert counter.count == 6
        counter.count = 0


def test_shapes_and_dtypes_do_not_share_a_program():
    fun = functools.partial(jnp.sum)
    results = [
        smooth(fun)(KEY, jnp.ones(shape, dtype))
        for shape in [(3,), (3, 1)]
        for dtype in ("float32", "float16")
    ]
    assert len(results) == 4
    np.testing.assert_allclose(results[0], results[2], rtol=1e-6)


def test_a_jitted_call_holds_its_own_values():
    # Inside jit, as ever: what fun reads from outside is read while it is traced.
    set_global(1.0)
    jitted = jax.jit(smooth(lambda y: jnp.sum(y) * GLOBAL))
    first = jitted(KEY, X)
    set_global(5.0)
    assert_trees_close(jitted(KEY, X), first)
    assert_trees_close(smooth(lambda y: jnp.sum(y) * GLOBAL)(KEY, X), 5.0 * first, rtol=1e-5)


def test_what_a_function_closes_over_is_not_kept():
    """From JAX 0.12 on, operations have the values of their constants beside them."""

    def used():
        table = jnp.arange(3.0) + 1
        g = px.make_perturbed_fun(lambda y: jnp.sum(y * table), 4, noise=px.Normal())
        jax.value_and_grad(g, argnums=1)(jax.random.key(0), jnp.ones(3))
        return weakref.ref(table)

    table = used()
    gc.collect()
    assert table() is None


def test_constants_are_no_arguments():
    table = jnp.arange(3.0)
    assert not trace(lambda y: jnp.sin(table) * 2.5, table)[0].depends_on_inputs()
    assert trace(lambda y: jnp.sin(table) * y, table)[0].depends_on_inputs()
