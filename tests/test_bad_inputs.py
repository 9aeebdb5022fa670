"""What users get wrong: every mistake ends in an error that names the remedy, or in a right number.

The tables list mistakes; what must work although it looks odd has a test each, against an exact
value. Nothing may end in a silent wrong number.
"""

import copy
import functools
import inspect
import pickle
import pydoc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.experimental import io_callback

import perturbax as px
import reference
from helpers import AS_FOR_USERS, assert_trees_close, enable_x64

KEY = jax.random.key(0, impl="threefry2x32")
X = jnp.array([0.5, -1.0, 2.0])
NORMAL = px.Normal()


def squares(tree):
    """The sum of the squares of everything floating in a pytree."""
    leaves = [v for v in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(v), jnp.floating)]
    return sum((jnp.sum(jnp.asarray(v) ** 2) for v in leaves), jnp.zeros(()))


def one_hot_argmax(y):
    return jax.nn.one_hot(jnp.argmax(y), y.shape[0], dtype=jnp.float32)


def smooth(fun=squares, num_samples=8, sigma=0.5, noise=NORMAL, **settings):
    return px.make_perturbed_fun(fun, num_samples, sigma, noise, **settings)


def message(error):
    """What the user reads: the text of an exception and the notes added to it."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def fails(kind, *parts):
    """A context that expects an error of a kind, whose message has all of the parts."""

    def check(error):
        text = message(error)
        missing = [part for part in parts if part not in text]
        assert not missing, f"{missing} not in {text!r}"
        return True

    return pytest.RaisesExc(kind, check=check)


class OfAnotherLibrary:
    """An array as others have them, such as a Series of pandas or a tensor of torch."""

    shape = (3,)

    def __init__(self, dtype="torch.float32"):
        self.dtype = dtype

    def __array__(self, dtype=None, copy=None):
        return np.asarray(X, dtype)


# --- Mistakes that are found when the perturbed function is made

CONSTRUCTION = {
    "fun is a number": ({"fun": 3.0}, TypeError, ["fun must be callable", "float"]),
    "no fun": ({"fun": None}, TypeError, ["fun must be callable", "NoneType"]),
    "sigma zero": (
        {"sigma": 0},
        ValueError,
        ["sigma must be > 0", "got 0.0", "unperturbed", "fun(x)"],
    ),
    "sigma negative": ({"sigma": -0.5}, ValueError, ["sigma must be > 0", "scale", "got -0.5"]),
    "sigma negative in one place": (
        {"sigma": {"a": 1.0, "b": np.array([1.0, -2.0])}},
        ValueError,
        ["sigma must be > 0", "got -2.0 at sigma['b'][1]."],
    ),
    "sigma negative in a place of two axes": (
        {"sigma": np.array([[1.0, 2.0, 0.5], [3.0, 1.0, -4.0]])},
        ValueError,
        ["sigma must be > 0", "got -4.0 at sigma[1, 2]."],
    ),
    "sigma negative at a leaf": (
        {"sigma": {"a": 1.0, "b": -2.0}},
        ValueError,
        ["sigma must be > 0", "got -2.0 at sigma['b']."],
    ),
    "sigma NaN": ({"sigma": float("nan")}, ValueError, ["sigma must be finite", "got nan"]),
    "sigma infinite": ({"sigma": jnp.inf}, ValueError, ["sigma must be finite", "got inf"]),
    "sigma a jax array with an infinity": (
        {"sigma": jnp.array([1.0, -jnp.inf])},
        ValueError,
        ["sigma must be finite", "got -inf at sigma[1]"],
    ),
    "sigma a bool": ({"sigma": True}, TypeError, ["sigma must be a real number", "bool"]),
    "sigma an array of bools": (
        {"sigma": np.array([True])},
        TypeError,
        ["sigma must be a real number", "array of bool"],
    ),
    "sigma a string": ({"sigma": "0.1"}, TypeError, ["sigma must be a positive number", "str"]),
    "sigma an array of another library": (
        {"sigma": {"a": OfAnotherLibrary()}},
        TypeError,
        [
            "sigma must be a positive number",
            "OfAnotherLibrary: convert it, jnp.asarray(sigma['a'])",
        ],
    ),
    "sigma missing": ({"sigma": None}, TypeError, ["sigma must be a positive number", "None"]),
    "sigma an array of strings": (
        {"sigma": np.array(["a"])},
        TypeError,
        ["sigma must be a real number", "array of <U1"],
    ),
    "sigma wider than double precision": (
        {"sigma": [np.longdouble(1.0)]},
        TypeError,
        ["sigma must be a real number", "array of float", "convert it to float32"],
    ),
    "sigma complex": ({"sigma": 1j}, TypeError, ["sigma must be real", "complex64"]),
    "sigma a complex array": (
        {"sigma": jnp.ones(3, jnp.complex64)},
        TypeError,
        ["sigma must be real", "complex64"],
    ),
    "no samples": ({"num_samples": 0}, ValueError, ["num_samples must be >= 1", "got 0"]),
    "more samples than can be counted": (
        {"num_samples": 2**33},
        ValueError,
        ["num_samples must be <= 2147483647", "got 8589934592", "different keys"],
    ),
    "negative samples": ({"num_samples": -1}, ValueError, ["num_samples must be >= 1", "got -1"]),
    "num_samples a whole float": (
        {"num_samples": 1e1},
        TypeError,
        ["num_samples must be an int", "float 10.0: write int(10.0)"],
    ),
    "num_samples a fraction": (
        {"num_samples": 10.5},
        TypeError,
        ["num_samples must be an int", "float"],
    ),
    "num_samples infinite": (
        {"num_samples": np.float32(np.inf)},
        TypeError,
        ["num_samples must be an int, got float32"],
    ),
    "num_samples a string": ({"num_samples": "10"}, TypeError, ["num_samples must be", "str"]),
    "num_samples None": ({"num_samples": None}, TypeError, ["num_samples must be", "NoneType"]),
    "num_samples a bool": ({"num_samples": True}, TypeError, ["num_samples must be", "bool"]),
    "num_samples a numpy bool": (
        {"num_samples": np.True_},
        TypeError,
        ["num_samples must be", "bool"],
    ),
    "num_samples a shape": ({"num_samples": (10,)}, TypeError, ["num_samples must be", "tuple"]),
    "batch_size zero": ({"batch_size": 0}, ValueError, ["batch_size must be >= 1", "got 0"]),
    "batch_size a float": ({"batch_size": 2.0}, TypeError, ["batch_size must be an int", "float"]),
    "use_baseline a string": (
        {"use_baseline": "False"},
        TypeError,
        ["use_baseline must be a bool", "'False'", "str"],
    ),
    "use_baseline None": ({"use_baseline": None}, TypeError, ["use_baseline must be a bool"]),
    "missing an array": (
        {"missing": np.array(["drop", "drop"])},
        ValueError,
        ["missing must be 'propagate' or 'drop'"],
    ),
    "has_aux a number": ({"has_aux": 1}, TypeError, ["has_aux must be a bool", "int"]),
    "noise None": (
        {"noise": None},
        TypeError,
        ["noise must define sample and log_prob", "NoiseDistribution", "NoneType"],
    ),
    "noise a class": (
        {"noise": px.Normal},
        TypeError,
        ["noise must be an instance", "class Normal", "pass Normal()"],
    ),
    "noise a string": (
        {"noise": "normal"},
        TypeError,
        ["noise must define sample and log_prob", "str lacks sample and log_prob"],
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_construction_refuses(name):
    arguments, kind, parts = CONSTRUCTION[name]
    with fails(kind, *parts):
        smooth(**arguments)


@pytest.mark.parametrize(("has", "lacks"), [("sample", "log_prob"), ("log_prob", "sample")])
def test_noise_needs_both_methods(has, lacks):
    noise = type("Half", (), {has: lambda self, *args: None})()
    with fails(TypeError, "noise must define sample and log_prob", f"Half lacks {lacks}"):
        smooth(noise=noise)


@pytest.mark.parametrize(
    ("name", "kind"), [("num_samples", "int"), ("degree", "int"), ("use_baseline", "bool")]
)
def test_what_must_be_static(name, kind):
    with fails(TypeError, f"{name} must be static", f"Python {kind}", "static_argnums"):
        jax.jit(lambda value: smooth(**{name: value})(KEY, X))(1)


# --- Mistakes that are found when it is called


class Noise:
    """Noise made of two functions; by default, standard normal."""

    def __init__(self, draw=jax.random.normal, log_prob=lambda z: -0.5 * z**2):
        self.draw = draw
        self.log_prob = log_prob

    def sample(self, key, sample_shape=(), dtype=float):
        return self.draw(key, sample_shape, dtype)


class Groups:
    """A sampler made of a function; groups of four."""

    def __init__(self, draw=jax.random.normal, size=4):
        self.draw = draw
        self.size = size

    def group_size(self, num_samples, dim):
        return self.size

    def sample_group(self, key, noise, group_size, dim, dtype):
        return self.draw(key, (group_size, dim), dtype)


class Together(Groups):
    """The same, which draws several groups at once."""

    def sample_groups(self, key, first, count, noise, group_size, dim, dtype):
        return self.draw(key, (count, group_size, dim))


def with_method(name, method):
    noise = Noise()
    setattr(noise, name, method)
    return noise


def call(x=X, key=KEY, **arguments):
    return lambda: smooth(**arguments)(key, x)


def swapped():
    return smooth()(X, KEY)


def checks_its_argument(y):
    """As scikit-learn does it."""
    if not isinstance(y, float):
        raise ValueError(f"The parameter must be a float. Got {y} instead.")


CALLS = {
    "sigma too short": (
        call(sigma=np.array([0.1, 0.2])),
        ValueError,
        ["sigma of shape (2,)", "leaf 'x' of shape (3,)", "must not enlarge"],
    ),
    "sigma larger than x": (
        call(sigma=np.ones((4, 3))),
        ValueError,
        ["sigma of shape (4, 3)", "leaf 'x' of shape (3,)", "must not enlarge"],
    ),
    "sigma with an axis for a scalar x": (
        call(x=jnp.float32(1.0), sigma=np.ones(1)),
        ValueError,
        ["sigma of shape (1,)", "leaf 'x' of shape ()", "must not enlarge"],
    ),
    "sigma for one leaf does not fit": (
        call(x={"w": X, "b": jnp.ones(2)}, sigma={"w": 1.0, "b": np.ones(3)}),
        ValueError,
        ["sigma of shape (3,)", "x['b']", "(2,)"],
    ),
    "sigma a list for an array": (
        call(sigma=[0.1, 0.2, 0.3]),
        ValueError,
        [
            "sigma has structure PyTreeDef([*, *, *])",
            "that of x, PyTreeDef(*)",
            "prefix",
            "np.array([...])",
        ],
    ),
    "sigma has other keys than x": (
        call(x={"a": X}, sigma={"b": 0.1}),
        ValueError,
        ["PyTreeDef({'b': *})", "PyTreeDef({'a': *})", "prefix"],
    ),
    "sigma missing for a leaf": (
        call(x=[X, {"w": X}], sigma=[0.1, {"w": None}]),
        TypeError,
        ["sigma[1]['w'] must be a positive number", "x[1]['w']", "got None"],
    ),
    "sigma missing for a subtree": (
        call(x=[X, {"w": X}], sigma=[0.1, None]),
        TypeError,
        ["sigma[1] must be a positive number", "x[1]", "got None"],
    ),
    "sigma a matrix for the rows of a matrix": (
        call(x=jnp.ones((2, 2)), sigma=jnp.eye(2)),
        ValueError,
        ["got 0.0 at sigma[0, 1]. A matrix for a leaf of shape (2, 2) has shape (2, 2, 2, 2)."],
    ),
    "sigma zero in a square": (
        call(x=jnp.ones((2, 2)), sigma=jnp.zeros((2, 2))),
        ValueError,
        ["got 0.0 at sigma[0, 0]. For the unperturbed function"],
    ),
    "sigma too small for the dtype": (
        call(sigma=1e-300),
        ValueError,
        ["sigma must be within the range of float32", "got 1e-300", "rescale x"],
    ),
    "sigma too large for the dtype": (
        call(sigma=np.array([1.0, 1.0, 1e300])),
        ValueError,
        ["sigma must be within the range of float32", "got 1e+300", "rescale x"],
    ),
    "sigma too small, of JAX": (
        call(sigma=jnp.float32(1e-40)),
        ValueError,
        ["sigma must be within the range of float32", "got 1e-40", "rescale x"],
    ),
    "several keys": (
        call(key=jax.random.split(KEY, 3)),
        TypeError,
        ["key must be one PRNG key", "shape (3,)", "vmap over the keys"],
    ),
    "several raw keys": (
        call(key=np.zeros((3, 2), np.uint32)),
        TypeError,
        ["key must be one PRNG key", "shape (3, 2)", "vmap over the keys"],
    ),
    "a seed for a key": (
        call(key=0),
        TypeError,
        ["first argument must be a PRNG key", "jax.random.key(0)", "got int"],
    ),
    "no key": (call(key=None), TypeError, ["first argument must be a PRNG key", "got NoneType"]),
    "floats for a key": (
        call(key=jnp.zeros(2)),
        TypeError,
        ["first argument must be a PRNG key", "got float32[2]"],
    ),
    "key data of a wrong length": (
        call(key=np.zeros(3, np.uint32)),
        TypeError,
        ["first argument must be a PRNG key", "got uint32[3]"],
    ),
    "key and x swapped": (
        swapped,
        TypeError,
        ["first argument must be a PRNG key", "got float32[3]", "g(x, key)", "it is g(key, x)"],
    ),
    "raw key and x swapped": (
        lambda: smooth()(X, np.zeros(2, np.uint32)),
        TypeError,
        ["first argument must be a PRNG key", "g(x, key)", "it is g(key, x)"],
    ),
    "x complex": (
        call(x={"w": jnp.ones(3, jnp.complex64)}),
        TypeError,
        ["complex leaves are not supported", "x['w']", "complex64", "real and imaginary"],
    ),
    "x a complex Python number": (
        call(x=1j),
        TypeError,
        ["complex leaves are not supported", "'x'", "real and imaginary"],
    ),
    "x integer": (
        call(x=jnp.arange(3)),
        TypeError,
        ["x has no floating leaf to perturb", "int32", "jnp.asarray(x, float)"],
    ),
    "x a Python int": (call(x=2), TypeError, ["x has no floating leaf to perturb", "int32"]),
    "x a string": (
        call(x="hi"),
        TypeError,
        ["x must be a pytree of arrays", "leaf 'x' is a str", "further argument"],
    ),
    "x with a string inside": (
        call(x={"w": [X, "hi"]}),
        TypeError,
        ["leaf \"x['w'][1]\" is a str", "further argument, g(key, x, ...)"],
    ),
    **{
        f"x of another library, {name}": (
            call(x={"w": OfAnotherLibrary(dtype)}),
            TypeError,
            [
                "leaf \"x['w']\" is an OfAnotherLibrary: convert it, jnp.asarray(x['w']); or",
                "not to be perturbed, pass it to fun as a further argument, g(key, x, ...)",
            ],
        )
        for name, dtype in [
            ("with a dtype of numpy", np.dtype(np.float32)),
            ("with the name of a dtype", "torch.float32"),
            ("with a dtype of its own", object()),
        ]
    },
    **{
        f"x of dtype {kind}": (
            call(x={"w": [X, np.array([value], kind)]}),
            TypeError,
            ["leaf \"x['w'][1]\" is an array of", shown, "further argument", "float32"],
        )
        for kind, value, shown in [
            ("U2", "hi", "<U2"),
            ("O", None, "object"),
            ("g", 1.0, str(np.dtype("g"))),
            ("M8[D]", "2020-01-01", "datetime64[D]"),
            (">f4", 1.0, ">f4"),
        ]
    },
    "fun uses numpy": (
        call(fun=lambda y: np.sin(y)),
        jax.errors.TracerArrayConversionError,
        ["fun is traced and vmapped", "numpy", "perturbax.host_function"],
    ),
    "fun hands its argument to a library that checks it": (
        call(fun=checks_its_argument),
        ValueError,
        ["must be a float. Got JitTracer", "other than JAX", "perturbax.host_function"],
    ),
    "fun branches on its argument": (
        call(fun=lambda y: 1.0 if y[0] > 0 else 0.0),
        jax.errors.TracerBoolConversionError,
        ["fun is traced and vmapped", "`if`", "perturbax.host_function"],
    ),
    "fun converts its argument to a float": (
        call(fun=lambda y: float(y[0])),
        jax.errors.ConcretizationTypeError,
        ["fun is traced and vmapped", "float()", "perturbax.host_function"],
    ),
    "fun uses its argument as an index": (
        call(fun=lambda y: [1.0, 2.0][jnp.argmax(y)]),
        jax.errors.TracerIntegerConversionError,
        ["fun is traced and vmapped", "perturbax.host_function"],
    ),
    "fun selects by its argument": (
        call(fun=lambda y: jnp.sum(y[y > 0])),
        jax.errors.NonConcreteBooleanIndexError,
        ["fun is traced and vmapped", "index of bools", "perturbax.host_function"],
    ),
    "fun without a return": (
        call(fun=lambda y: None),
        TypeError,
        ["fun returned None, expected a pytree of arrays", "`return` missing"],
    ),
    "fun returns a string": (
        call(fun=lambda y: {"a": y, "b": "hi"}),
        TypeError,
        ["fun's value must be a pytree of arrays", "value['b']", "str"],
    ),
    "fun returns the name of a dtype": (  # numpy warned of its alias
        call(fun=lambda y: "a"),
        TypeError,
        ["fun's value must be a pytree of arrays", "'value'", "a str"],
    ),
    "aux is the name of a dtype": (
        call(fun=lambda y: (jnp.sum(y), "a"), has_aux=True),
        TypeError,
        ["fun's aux must be a pytree of arrays", "'aux'", "a str"],
    ),
    "fun returns an array of strings": (
        call(fun=lambda y: {"a": y, "b": np.array("hi")}),
        TypeError,
        ["fun's value must be a pytree of arrays", "value['b']", "array of <U2"],
    ),
    "fun returns an array of objects": (
        call(fun=lambda y: np.array([None])),
        TypeError,
        ["fun's value must be a pytree of arrays", "'value'", "array of object"],
    ),
    "fun returns a key": (
        call(fun=lambda y: [y, KEY]),
        TypeError,
        ["fun's value must be a pytree of numbers", "value[1]", "PRNG key", "has_aux=True"],
    ),
    "aux holds a string": (
        call(fun=lambda y: (jnp.sum(y), {"name": "hi"}), has_aux=True),
        TypeError,
        ["fun's aux must be a pytree of arrays", "aux['name']", "str"],
    ),
    "aux announced but not returned": (
        call(has_aux=True),
        TypeError,
        ["has_aux=True", "pair (value, aux)", "an array of float32 alone", "leave has_aux out"],
    ),
    "aux and more": (
        call(fun=lambda y: (y, y, y), has_aux=True),
        TypeError,
        ["pair (value, aux), got a tuple of 3"],
    ),
    "aux in a list": (
        call(fun=lambda y: [y, y], has_aux=True),
        TypeError,
        ["pair (value, aux), got a list:"],
    ),
    "noise of shape ()": (
        call(noise=Noise(lambda key, shape, dtype: jax.random.normal(key, (), dtype))),
        ValueError,
        ["noise.sample(key, (3,), float32) returned shape ()", "expected (3,)"],
    ),
    "noise of a shape of its own": (
        call(noise=Noise(lambda key, shape, dtype: jax.random.normal(key, (2, 3), dtype))),
        ValueError,
        ["noise.sample(key, (3,), float32) returned shape (2, 3)", "expected (3,)"],
    ),
    "noise drawn by numpy": (
        call(noise=Noise(lambda key, shape, dtype: np.random.randn(*shape).astype(dtype))),
        TypeError,
        ["noise.sample(key, (3,), float32)", "does not depend on key", "jax.random"],
    ),
    "noise the same at every sample": (
        call(noise=Noise(lambda key, shape, dtype: jax.random.normal(jax.random.key(0), shape))),
        TypeError,
        ["does not depend on key", "share one draw"],
    ),
    "noise of integers": (
        call(noise=Noise(lambda key, shape, dtype: jax.random.randint(key, shape, 0, 2))),
        TypeError,
        ["noise must be real numbers", "returned int32"],
    ),
    "noise of two arrays": (
        call(noise=Noise(lambda key, shape, dtype: 2 * [jax.random.normal(key, shape)])),
        TypeError,
        ["noise.sample(key, (3,), float32) must return one array"],
    ),
    "log-density of a wrong shape": (
        call(noise=Noise(log_prob=lambda z: -0.5 * z[:2] ** 2)),
        ValueError,
        ["noise.log_prob(inputs) returned shape (2,)", "shape (3,)", "expected (3,), or ()"],
    ),
    "a group of columns": (
        call(sampler=Groups(lambda key, shape, dtype: jax.random.normal(key, shape[::-1], dtype))),
        ValueError,
        [
            "sampler.sample_group(key, noise, 4, 3, float32) returned shape (3, 4)",
            "expected (4, 3)",
            "one row for each sample",
        ],
    ),
    "a group in one row": (
        call(sampler=Groups(lambda key, shape, dtype: jax.random.normal(key, (12,), dtype))),
        ValueError,
        ["returned shape (12,)", "expected (4, 3)"],
    ),
    "a group of too many rows": (
        call(sampler=Groups(lambda key, shape, dtype: jax.random.normal(key, (8, 3), dtype))),
        ValueError,
        ["returned shape (8, 3)", "expected (4, 3)"],
    ),
    "no group": (
        call(sampler=Groups(lambda key, shape, dtype: None)),
        TypeError,
        ["sampler.sample_group(key, noise, 4, 3, float32) must return one array"],
    ),
    "a group of bfloat16": (
        call(sampler=Groups(lambda key, shape, dtype: jax.random.normal(key, shape, "bfloat16"))),
        TypeError,
        ["returned bfloat16", "so few numbers", "Draw in float32"],
    ),
    "a group of integers": (
        call(sampler=Groups(lambda key, shape, dtype: jax.random.randint(key, shape, 0, 2))),
        TypeError,
        ["returned dtype int32, expected a floating dtype"],
    ),
    "a group drawn by numpy": (
        call(sampler=Groups(lambda key, shape, dtype: np.random.randn(*shape).astype(dtype))),
        TypeError,
        ["sampler.sample_group(key", "does not depend on key", "all groups", "jax.random"],
    ),
    "a group seeded by numpy": (
        call(sampler=Groups(lambda key, shape, dtype: np.asarray(jax.random.key_data(key)))),
        jax.errors.TracerArrayConversionError,
        ["sampler.sample_group(key", "jax.random, not with numpy"],
    ),
    "groups of one shape each": (
        call(sampler=Together(lambda key, shape: jax.random.normal(key, shape))),
        ValueError,
        ["sampler.sample_groups(key, first, ", "noise, 4, 3, float32) returned shape (", ", 4, 3)"],
    ),
    "groups drawn by numpy": (
        call(sampler=Together(lambda key, shape: np.ones((shape[0] * 4, 3), np.float32))),
        TypeError,
        ["sampler.sample_groups(key, first, ", "does not depend on key", "all groups"],
    ),
    "a sampler that takes other arguments": (
        call(sampler=Groups(lambda key, shape: jax.random.normal(key, shape))),
        TypeError,
        ["takes 2 positional arguments", "sampler.sample_group(key", "perturbax.Sampler"],
    ),
    "a derivative with a group of columns": (
        lambda: jax.grad(
            smooth(sampler=Groups(lambda key, shape, dtype: jax.random.normal(key, shape[::-1]))),
            argnums=1,
        )(KEY, X),
        ValueError,
        ["returned shape (3, 4)", "expected (4, 3)"],
    ),
    "groups of none": (
        call(sampler=Groups(size=0)),
        ValueError,
        ["sampler.group_size(8, 3) must be >= 1, got 0"],
    ),
    "groups of a negative size": (
        call(sampler=Groups(size=-1)),
        ValueError,
        ["sampler.group_size(8, 3) must be >= 1, got -1"],
    ),
    "groups of a whole float": (
        call(sampler=Groups(size=4.0)),
        TypeError,
        ["sampler.group_size(8, 3) must be an int, got float"],
    ),
    "groups of an array": (
        call(sampler=Groups(size=jnp.int32(4))),
        TypeError,
        ["sampler.group_size(8, 3) must be a Python int, got a JAX array", "int(...)"],
    ),
    "log-density by numpy": (
        call(noise=Noise(log_prob=lambda z: -0.5 * np.square(np.asarray(z)))),
        jax.errors.TracerArrayConversionError,
        ["noise.log_prob(inputs) is traced", "jax.numpy, not with numpy"],
    ),
    "log-density by cases": (
        call(noise=Noise(log_prob=lambda z: jnp.sum(z[z > 0]))),
        jax.errors.NonConcreteBooleanIndexError,
        ["noise.log_prob(inputs) is traced"],
    ),
    "log-density of integers": (
        call(noise=Noise(log_prob=lambda z: jnp.zeros(3, jnp.int32))),
        TypeError,
        ["noise.log_prob(inputs) returned int32", "a floating dtype"],
    ),
    "log-density of integers, declared smooth": (
        call(
            noise=type("Smooth", (Noise,), {"derivatives": np.inf})(
                log_prob=lambda z: jnp.zeros(3, jnp.int32)
            )
        ),
        TypeError,
        ["noise.log_prob(inputs) returned int32", "a floating dtype"],
    ),
    "log-density that is rounded": (
        call(noise=Noise(log_prob=lambda z: (-0.5 * z**2).astype(jnp.int32))),
        TypeError,
        ["noise.log_prob(inputs) returned int32", "a floating dtype"],
    ),
    "words by numpy": (
        call(noise=with_method("from_bits", lambda bits: np.asarray(bits))),
        jax.errors.TracerArrayConversionError,
        ["noise.from_bits is traced", "jax.numpy, not with numpy"],
    ),
    "inverse of a wrong shape": (
        call(noise=with_method("icdf", lambda u: u.reshape(-1)[:2])),
        ValueError,
        ["noise.icdf returned shape (2,)", "of shape (3,)", "expected (3,)"],
    ),
    "words made into a wrong shape": (
        call(noise=with_method("from_bits", lambda bits: jnp.zeros(()))),
        ValueError,
        ["noise.from_bits returned shape ()", "of shape (3,)", "expected (3,)"],
    ),
    "callback that cannot be vmapped": (
        call(fun=lambda y: jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), np.float32), y)),
        NotImplementedError,
        ["vmap", "vmapped over the samples", "batch_size=1"],
    ),
    "ordered callback": (
        call(
            fun=lambda y: io_callback(np.sum, jax.ShapeDtypeStruct((), np.float32), y, ordered=True)
        ),
        ValueError,
        ["Cannot `vmap` ordered IO callback", "vmapped over the samples", "batch_size=1"],
    ),
    "differentiated by the key": (
        lambda: jax.grad(smooth())(KEY, X),
        TypeError,
        ["grad requires real- or complex-valued inputs", "key<fry>"],
    ),
    "x is missing": (
        lambda: smooth()(KEY, scale=2.0),
        TypeError,
        ["x is missing", "g(key, x, ...)", "['scale']"],
    ),
    "x is missing and the key has a name": (
        lambda: smooth()(key=KEY, scale=2.0),
        TypeError,
        ["x is missing", "the names ['key', 'scale']"],
    ),
    "key is missing": (lambda: smooth()(x=X), TypeError, ["key is missing", "g(key, x, ...)"]),
    "x without a key": (
        lambda: smooth()(X),
        TypeError,
        ["the key is missing: call g(key, x), for example g(jax.random.key(0), x)"],
    ),
    "a number without a key": (
        lambda: smooth()(0.5, scale=2.0),
        TypeError,
        ["the key is missing: call g(key, x)"],
    ),
    "x of another library without a key": (
        lambda: smooth()(OfAnotherLibrary()),
        TypeError,
        ["the key is missing: call g(key, x)"],
    ),
    "a raw key without x": (
        lambda: smooth()(np.zeros(2, np.uint32)),
        TypeError,
        ["x is missing", "g(key, x, ...)"],
    ),
    "scores and a solution without a key": (
        lambda: px.make_fenchel_young_loss(one_hot_argmax, 4)(X, X),
        TypeError,
        ["the key is missing: call g(key, theta, y_true)"],
    ),
    "a perturbed function in the place of fun": (
        lambda: smooth(fun=smooth())(KEY, X),
        TypeError,
        ["the key is missing", "without a key", "give the one that was perturbed"],
    ),
    "an argument that fun does not take": (
        lambda: smooth(fun=lambda y: y)(KEY, X, 1.0),
        TypeError,
        ["takes 1 positional argument but 2 were given"],
    ),
    "a seed= interface of another library": (
        call(noise=type("Other", (Noise,), {"sample": lambda self, *, seed: None})()),
        TypeError,
        ["keyword argument", "noise.sample(key, (3,), float32)", "NoiseDistribution"],
    ),
}


def test_what_another_library_has_is_converted_as_the_error_says():
    found = smooth()(KEY, jnp.asarray(OfAnotherLibrary()))
    np.testing.assert_array_equal(found, smooth()(KEY, X))


@pytest.mark.parametrize("name", CALLS)
def test_call_refuses(name):
    run, kind, parts = CALLS[name]
    with fails(kind, *parts):
        run()


def test_the_error_of_fun_itself_is_passed_on():
    class OwnError(Exception):
        pass

    def fun(y):
        raise OwnError("mine")

    with pytest.raises(OwnError, match="mine") as caught:
        smooth(fun)(KEY, X)
    assert "host_function" not in message(caught.value)


def test_an_error_of_fun_that_cannot_be_printed_is_passed_on():
    class OwnError(Exception):
        def __str__(self):
            raise ValueError("not this one")

    def fun(y):
        raise OwnError

    with pytest.raises(OwnError):
        smooth(fun)(KEY, X)


def test_a_host_function_is_no_remedy_for_errors_about_other_things():
    def fun(y):
        raise ValueError("RayTracer: no surface was hit")

    with pytest.raises(ValueError, match="no surface") as caught:
        smooth(fun)(KEY, X)
    assert "host_function" not in message(caught.value)


def test_a_host_function_is_no_remedy_for_a_value_kept_from_another_trace():
    kept = []
    jax.make_jaxpr(kept.append)(1.0)
    with pytest.raises(jax.errors.UnexpectedTracerError) as caught:
        smooth(lambda y: y + kept[0])(KEY, X)
    assert "host_function" not in message(caught.value)


# --- sigma


def samples(**settings):
    """The points at which the function is evaluated, and the estimate of their mean."""
    return smooth(lambda y: (y, y), has_aux=True, **settings)


def test_traced_sigma_that_is_not_positive_gives_nan():
    # The function never returns NaN, whatever it is given.
    def value_and_gradients(sigma):
        def value(x, sigma):
            return smooth(lambda y: 1.0 * jnp.argmax(y), sigma=sigma)(KEY, x)

        return jax.value_and_grad(value, argnums=(0, 1))(X, sigma)

    sigmas = np.float32([0.5, 0.0, -0.5, np.nan, np.inf])
    value, (in_x, in_sigma) = jax.jit(jax.vmap(value_and_gradients))(sigmas)
    for array in (np.asarray(value), np.sum(in_x, axis=1), np.asarray(in_sigma)):
        assert np.isfinite(array[0])
        assert np.isnan(array[1:]).all()


@pytest.mark.parametrize("sigma", [1, np.int64(1), np.float64(1.0), jnp.int32(1)], ids=repr)
def test_sigma_of_any_real_type(sigma):
    assert_trees_close(smooth(sigma=sigma)(KEY, X), smooth(sigma=1.0)(KEY, X))


def test_sigma_for_each_coordinate():
    scales = np.float32([0.2, 0.5, 3.0])

    def scaled(y, scales):
        return squares(y * scales) + jnp.sum(y > 0)

    # f(x + s z) is f(s (x / s + z)), with the chain rule for the gradient.
    value, gradient = jax.value_and_grad(smooth(scaled, sigma=1.0), argnums=1)(
        KEY, np.asarray(X) / scales, scales
    )
    actual, (in_x, in_sigma) = jax.value_and_grad(
        lambda x, s: smooth(lambda y: scaled(y, 1.0), sigma=s)(KEY, x), argnums=(0, 1)
    )(X, scales)
    assert_trees_close(actual, value, rtol=1e-5)
    assert_trees_close(in_x, np.asarray(gradient) / scales, rtol=1e-4, atol=1e-5)
    # Without a baseline, the mean of f times (-1 - z d log p / dz) / s.
    _, y = samples(sigma=scales)(KEY, X)
    z = (np.asarray(y) - np.asarray(X)) / scales
    in_sigma = jax.grad(
        lambda s: smooth(lambda y: scaled(y, 1.0), sigma=s, use_baseline=False)(KEY, X)
    )(scales)
    f = np.asarray(jax.jit(jax.vmap(lambda y: scaled(y, 1.0)))(y))
    expected = np.mean(f[:, None] * (z**2 - 1) / scales, axis=0)
    assert_trees_close(in_sigma, expected, rtol=1e-4, atol=1e-4)


def test_sigma_as_a_pytree_or_prefix():
    x = {"a": X, "b": (jnp.ones(2), jnp.array(3))}  # an integer leaf takes no noise
    whole = smooth(sigma={"a": 0.5, "b": (2.0, 1.0)})(KEY, x)
    prefix = smooth(sigma={"a": 0.5, "b": 2.0})(KEY, x)
    arrays = smooth(sigma={"a": np.full(3, 0.5), "b": jnp.full((1,), 2.0)})(KEY, x)
    assert_trees_close(prefix, whole)
    assert_trees_close(arrays, whole, rtol=1e-6)
    assert abs(float(smooth(sigma=0.5)(KEY, x) - whole)) > 1e-3


def test_sigma_may_be_none_where_x_is():
    """As it is made by a tree.map over x."""
    x = {"u": X, "n": None, "v": [X, None]}
    sigma = jax.tree.map(lambda _: 0.5, x)
    assert_trees_close(smooth(sigma=sigma)(KEY, x), smooth(sigma=0.5)(KEY, x), rtol=1e-6)
    prefix = {"u": 0.5, "n": None, "v": 0.5}
    assert_trees_close(smooth(sigma=prefix)(KEY, x), smooth(sigma=0.5)(KEY, x), rtol=1e-6)


def test_sigma_of_double_precision_leaves_single_precision_alone():
    with enable_x64(True):
        x = jnp.asarray(X, jnp.float32)
        value, y = samples(sigma=np.float64(0.1))(KEY, x)
        assert value.dtype == y.dtype == jnp.float32
        assert_trees_close(y, samples(sigma=0.1)(KEY, x)[1])


def test_sigma_keeps_double_precision():
    with enable_x64(True):
        x = jnp.zeros(3)
        _, unit = samples(sigma=1.0)(KEY, x)
        _, y = samples(sigma=0.1)(KEY, x)
        assert y.dtype == jnp.float64
        assert_trees_close(y, 0.1 * unit, rtol=1e-15)


@pytest.mark.parametrize("noise", [px.Normal(), px.Gumbel()], ids=repr)
def test_derivative_in_sigma(noise):
    _, y = samples(num_samples=64, sigma=0.7, noise=noise)(KEY, X)
    z = (np.asarray(y) - np.asarray(X)) / np.float32(0.7)
    f = np.sum(np.square(y), axis=1)
    expected = reference.differentiate_samples(f, z, 0.7, type(noise).__name__)
    actual = jax.grad(
        lambda s: smooth(num_samples=64, sigma=s, noise=noise, use_baseline=False)(KEY, X)
    )(0.7)
    np.testing.assert_allclose(actual, expected["dsigma"], rtol=1e-4)


@pytest.mark.covering("transform")
@pytest.mark.parametrize(
    ("x", "sigma"),
    [
        (X, 1e-30),
        (jnp.full(3, 100.0, jnp.bfloat16), 0.24),  # spaced by 0.5
        (jnp.full(3, 100.0, jnp.float16), 0.03),  # by 0.0625
        (1e4, 4.8e-4),  # by 9.8e-4, if not in double precision
        (X, np.diag([1.0, 1.0, 1e-8])),
    ],
    ids=str,
)
@pytest.mark.parametrize("transform", ["none", "grad", "value_and_grad", "grad in sigma", "jvp"])
def test_sigma_that_is_lost_in_rounding_is_warned_of(x, sigma, transform):
    """It was not while differentiating, nor up to twice as large, and not at the user's line."""
    run = {
        "none": lambda: smooth(sigma=sigma)(KEY, x),
        "grad": lambda: jax.grad(smooth(sigma=sigma), argnums=1)(KEY, x),
        "value_and_grad": lambda: jax.value_and_grad(smooth(sigma=sigma), argnums=1)(KEY, x),
        "grad in sigma": lambda: jax.grad(lambda s: smooth(sigma=s)(KEY, x))(sigma),
        "jvp": lambda: jax.jvp(lambda v: smooth(sigma=sigma)(KEY, v), (x,), (x,)),
    }[transform]
    message = "sigma is below the spacing of .* at leaf 'x'.*larger"
    with pytest.warns(UserWarning, match=message) as found:
        run()
    assert {warning.filename for warning in found} == {__file__}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("x", "sigma"),
    [
        (jnp.full(3, 100.0, jnp.bfloat16), 0.26),
        (jnp.full(3, 100.0, jnp.float16), 0.033),
        (1e4, 5e-4),
        (jnp.array([-jnp.inf, jnp.nan, 1.0]), 1e-4),
    ],
    ids=str,
)
def test_sigma_of_the_order_of_the_spacing_is_not_warned_of(x, sigma):
    smooth(sigma=sigma)(KEY, x)
    jax.grad(smooth(sigma=sigma), argnums=1)(KEY, x)


def test_small_sigma_at_zero_is_not_lost():
    gradient = jax.grad(smooth(lambda y: 3.0 * jnp.sum(y), 1000, 1e-30), argnums=1)(KEY, 0.0)
    assert gradient == pytest.approx(3.0, abs=0.5)


# --- Precision


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_large_x_and_small_sigma(jit):
    # One step of x in single precision is as large as sigma.
    gradient = jax.grad(
        smooth(lambda y: jnp.sum(y - 1e4), 20_000, sigma=1e-3, noise=NORMAL), argnums=1
    )
    gradient = jax.jit(gradient) if jit else gradient
    assert gradient(KEY, jnp.array([1e4]))[0] == pytest.approx(1.0, abs=0.04)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype):
    seen = []

    def fun(y):
        seen.append(y.dtype)
        return one_hot_argmax(y)

    x = jnp.array([1.0, 0.5, 0.0], dtype)
    g = smooth(fun, 20_000, sigma=1.0, noise=px.Gumbel())
    value, pullback = jax.vjp(lambda x: g(KEY, x), x)
    p = scipy.special.softmax([1.0, 0.5, 0.0])
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, p, atol=0.015)
    (row,) = pullback(np.float32([1, 0, 0]))
    assert row.dtype == dtype
    np.testing.assert_allclose(np.asarray(row, np.float32), p[0] * (np.eye(3)[0] - p), atol=0.04)
    assert set(seen) == {jnp.dtype(dtype)}


def test_half_precision_in_many_dimensions():
    g = smooth(lambda y: y.astype(jnp.float32).mean(), 4)
    value = g(KEY, jnp.zeros(200_000, jnp.float16))
    assert abs(value) < 5 * 0.5 / np.sqrt(4 * 200_000)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_offset_of_the_values_does_not_matter(degree):
    # Values are exact with the offset too, and differences are what is added up.
    g = smooth(lambda y, offset: offset + jnp.sum(y > 0), 1000, noise=NORMAL, degree=degree)
    gradient = jax.jit(jax.grad(g, argnums=1))
    large = gradient(KEY, jnp.zeros(2), 1e6)
    assert_trees_close(large, gradient(KEY, jnp.zeros(2), 0.0), atol=1e-5)
    np.testing.assert_allclose(large, 0.798, atol=0.15)


# --- x


def test_leaves_that_are_not_floating_pass_through():
    rest = {
        "int": jnp.arange(3),
        "bool": np.array(True),
        "uint8": jnp.array(7, jnp.uint8),
        "key": jax.random.key(5),
        "python": 3,
        "none": None,
    }
    seen = []

    def fun(x):
        seen.append(x["rest"])
        # A key inside x is one and the same for every sample.
        drawn = jax.random.uniform(x["rest"]["key"])
        return x["w"] * x["rest"]["int"] + x["rest"]["python"], drawn

    x = {"w": X, "rest": rest}
    (value, drawn), pullback = jax.vjp(lambda x: smooth(fun)(KEY, x), {**x, "rest": dict(rest)})
    assert_trees_close(drawn, jax.random.uniform(rest["key"]))
    _, w = samples()(KEY, X)
    expected = np.mean(w, axis=0) * np.float32([0, 1, 2]) + 3
    assert_trees_close(value, expected, rtol=1e-5)
    (gradient,) = pullback((np.ones(3, np.float32), 1.0))
    assert gradient["w"].dtype == jnp.float32
    assert np.isfinite(gradient["w"]).all()
    for name in ("int", "bool", "uint8", "key", "python"):
        assert gradient["rest"][name].dtype == jax.dtypes.float0
    assert gradient["rest"]["none"] is None
    assert isinstance(seen[0]["python"], int)


def test_sigma_beside_leaves_that_are_not_floating():
    x = {"w": X, "k": jax.random.key(1), "n": 3}
    sigma = {"w": 0.5, "k": 1.0, "n": 1.0}
    assert_trees_close(smooth(sigma=sigma)(KEY, x), smooth(sigma=0.5)(KEY, x))


@pytest.mark.parametrize(
    ("x", "like"),
    [
        (1.0, jnp.array(1.0)),
        (np.float64(1.0), jnp.array(1.0)),
        ([1.0, 2.0], [jnp.array(1.0), jnp.array(2.0)]),
        (np.array([1.0, 2.0]), jnp.array([1.0, 2.0])),
        ({"a": 1.0, "b": None}, {"a": jnp.array(1.0), "b": None}),
    ],
    ids=["float", "numpy scalar", "list of floats", "numpy array", "with None"],
)
def test_numbers_and_numpy_arrays_are_converted(x, like):
    assert_trees_close(smooth()(KEY, x), smooth()(KEY, like))


def test_gradient_in_a_python_float():
    actual, expected = (jax.grad(smooth(), argnums=1)(KEY, x) for x in (1.0, jnp.array(1.0)))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("x", [(), {}, None, [None]], ids=str)
def test_nothing_to_perturb(x):
    value, gradient = jax.value_and_grad(smooth(lambda y: 3.0), argnums=1)(KEY, x)
    assert value == 3.0
    assert gradient == x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"degree": 1},
        {"degree": 2, "batch_size": 2},
        {"sampler": px.Sobol()},
        {"sampler": px.Antithetic(), "degree": 1},
        {"sampler": px.Orthogonal()},
    ],
    ids=str,
)
def test_empty_array(options):
    """A division by zero, once, wherever a group had several samples."""
    x = jnp.zeros((0, 2))
    fun = smooth(**options)
    value, gradient = jax.value_and_grad(fun, argnums=1)(KEY, x)
    assert value == 0.0
    assert_trees_close(gradient, x)
    assert jax.jit(jax.hessian(fun, argnums=1))(KEY, x).shape == (0, 2, 0, 2)
    found = px.estimate(fun, KEY, x)
    assert found.value == found.value_error == 0.0
    assert found.gradient.shape == found.gradient_error.shape == (0, 2)


def test_nan_in_x_stays_where_it_is():
    x = np.float32([1, np.nan, 2])
    value, gradient = jax.value_and_grad(smooth(lambda y: y[0] ** 2 + y[2]), argnums=1)(KEY, x)
    assert np.isfinite(value)
    assert np.isfinite(np.asarray(gradient)[::2]).all()
    assert np.isnan(smooth()(KEY, x))


def test_masked_logits():
    x = np.array(X)
    x[0] = -np.inf
    g = smooth(one_hot_argmax, 20_000, sigma=1.0, noise=px.Gumbel())
    value = g(KEY, x)
    jacobian = np.asarray(jax.jit(jax.jacrev(g, argnums=1))(KEY, x))
    p = scipy.special.softmax(x)
    np.testing.assert_allclose(value, p, atol=0.01)
    np.testing.assert_allclose(jacobian[:, 1:], (np.diag(p) - np.outer(p, p))[:, 1:], atol=0.02)
    assert_trees_close(jacobian[:, 0], np.zeros(3, np.float32))


# --- num_samples, batch_size and memory


@pytest.mark.parametrize("count", [np.int64(8), jnp.int32(8), np.array(8)], ids=repr)
def test_num_samples_of_any_integer_type(count):
    assert_trees_close(smooth(num_samples=count)(KEY, X), smooth()(KEY, X))


def of_nine(y):
    return jnp.stack([k * jnp.sum(y**2) for k in range(1, 10)])


def of_nine_with_aux(y):
    return of_nine(y), y[0]


@pytest.mark.parametrize(
    ("fun", "dim", "num_samples", "settings", "most"),
    [
        (squares, 100_000, 1000, {}, 0.1),
        pytest.param(squares, 100_000, 1000, {"batch_size": 10}, 0.1, marks=pytest.mark.full),
        (of_nine, 100_000, 1000, {}, 0.2),
        pytest.param(
            of_nine_with_aux, 100_000, 1000, {"has_aux": True}, 0.1, marks=pytest.mark.full
        ),
        # A sixteenth of the samples is drawn as a whole, and aux adds a number to each sample.
        (squares, 100, 2**17, {"degree": 1}, 0.3),
        # 0.4 on JAX 0.10.2, 0.72 before.
        (of_nine_with_aux, 100, 2**17, {"degree": 1, "has_aux": True}, 0.75),
    ],
    ids=["default", "batch_size=10", "nine", "nine and aux", "degree 1", "degree 1, nine and aux"],
)
def test_memory_is_bounded(fun, dim, num_samples, settings, most):
    """In terms of all noise at once, which is never held."""
    g = smooth(fun, num_samples, **settings)
    jacobian = jax.jacrev(g, argnums=1, has_aux="has_aux" in settings)
    program = jax.jit(jacobian).lower(KEY, jnp.zeros(dim)).compile(compiler_options=AS_FOR_USERS)
    memory = program.memory_analysis()
    assert 0 < memory.temp_size_in_bytes < most * num_samples * dim * 4


# --- fun


def test_further_arguments_are_forwarded():
    def fun(y, scale, *, shift):
        return scale * jnp.sum(y) + shift

    def at_samples(x, scale, shift):
        _, y = samples()(KEY, x)
        return np.mean(scale * np.sum(y, axis=1) + shift, dtype=np.float32)

    g = smooth(fun)
    assert_trees_close(g(KEY, X, 2.0, shift=3.0), at_samples(X, 2.0, 3.0), rtol=1e-5)
    in_scale, in_shift = jax.grad(lambda a, b: g(KEY, X, a, shift=b), argnums=(0, 1))(2.0, 3.0)
    expected = at_samples(X, 1.0, 0.0)  # of what is multiplied by the scale
    np.testing.assert_allclose([in_scale, in_shift], [expected, 1.0], rtol=1e-5)
    assert_trees_close(
        smooth(lambda y, name: jnp.sum(y) if name == "sum" else 0.0)(KEY, X, "sum"),
        smooth(jnp.sum)(KEY, X),
    )


def test_key_and_x_may_be_given_by_name():
    """As in optax, where they are ordinary parameters."""
    g = smooth(lambda y, scale=1.0: scale * jnp.sum(y**2))
    expected = g(KEY, X)
    assert_trees_close(g(KEY, x=X), expected)
    assert_trees_close(g(x=X, key=KEY), expected)
    assert_trees_close(jax.jit(g)(KEY, x=X), expected, rtol=1e-6)
    doubled = np.float32(2) * np.asarray(expected)
    assert_trees_close(g(KEY, x=X, scale=2.0), doubled, rtol=1e-6)


def test_fun_may_have_a_key_and_an_x_of_its_own():
    g = smooth(lambda y, *, key, x: jnp.sum(y) + key + x)
    expected = np.asarray(smooth(jnp.sum)(KEY, X)) + np.float32(3)
    assert_trees_close(g(KEY, X, key=1.0, x=2.0), expected, rtol=1e-6)


def cost(y, weights, *, scale=1.0):
    """Not the docstring of what is made of it."""
    return scale * jnp.sum(weights * y)


class Callable:
    def __call__(self, y, key):
        return jnp.sum(y)


@pytest.mark.parametrize(
    ("fun", "name", "signature"),
    [
        (cost, "perturbed_cost", "(key, x, weights, *, scale=1.0)"),
        (lambda *values: 0.0, "perturbed_<lambda>", "(key, x, *values)"),
        (Callable(), "perturbed_Callable", "(key, x, *args, **kwargs)"),
        (lambda: 0.0, "perturbed_<lambda>", "(key, x, *args, **kwargs)"),
    ],
)
def test_perturbed_functions_describe_themselves(fun, name, signature):
    g = smooth(fun, num_samples=12)
    assert g.__name__ == g.__qualname__ == name
    assert str(inspect.signature(g)) == signature
    assert g.__doc__.startswith(f"Estimates E[{name.removeprefix('perturbed_')}(x + sigma eps)]")
    assert "12 samples" in g.__doc__


def solver(theta, weight=1.0):
    return jax.nn.one_hot(jnp.argmax(weight * theta), 3)


LAYERS = {
    "make_perturbed_argmax": {},
    "make_perturbed_max": {},
    "make_fenchel_young_loss": {"y_true": jnp.array([0.0, 1.0, 0.0])},
    "make_implicit_mle": {},
    "make_perturbed_distribution": {},
    "make_straight_through_fun": {},
    "make_perturbed_fun": {},
}


def test_every_function_that_makes_functions_is_in_the_table():
    made = {n for n in dir(px) if n.startswith("make_")}
    assert made == set(LAYERS)


def test_settings_of_another_kind():
    with fails(TypeError, "settings must be Settings, got int"):
        px.PerturbedFun(squares, 3)


@pytest.mark.parametrize("name", ["make_implicit_mle", "make_perturbed_distribution"])
def test_scores_without_leaves(name):
    """An IndexError, where other layers had nothing to say."""
    found = getattr(px, name)(lambda theta: theta, 4)(KEY, {})
    assert found == {} if name == "make_implicit_mle" else found.weights.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_told_most_is_told_in_the_same_order(name):
    """The loss took it by name alone."""
    taken = list(inspect.signature(getattr(px, name)).parameters.values())[1:4]
    assert [one.name for one in taken] == ["num_samples", "sigma", "noise"]
    assert {one.kind for one in taken} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_pickled_and_copied_and_tell_how_they_were_made(name):
    """Only what make_perturbed_fun returns could be pickled, the others were nested functions."""
    layer = getattr(px, name)(solver, 4, jnp.array(0.5), px.Normal())
    args = (KEY, X, *LAYERS[name].values())
    expected = layer(*args)
    for other in (pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer)):
        assert_trees_close(other(*args), expected, rtol=0)
        assert inspect.signature(other) == inspect.signature(layer)
        assert (other.__name__, other.__doc__) == (layer.__name__, layer.__doc__)
    assert re.search(r"\(.*<function solver.*num_samples=4, .*noise=Normal\(\)", repr(layer))


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"make_perturbed_fun"}))
def test_layers_are_functions_to_others(name):
    layer = getattr(px, name)(solver, 4)
    args = (KEY, X, *LAYERS[name].values())
    expected = layer(*args)
    assert repr(layer).startswith(f"{name}(<function solver")
    assert copy.deepcopy(layer) is layer
    static = jax.jit(lambda layer, *args: layer(*args), static_argnums=0)
    wrapped = functools.wraps(layer)(lambda *args: layer(*args))
    for other in (jax.jit(layer), functools.partial(static, layer), wrapped):
        assert_trees_close(other(*args), expected, rtol=1e-6)
    head = f"{layer.__name__}{inspect.signature(layer)}\n    {layer.__doc__.splitlines()[0]}"
    assert head in pydoc.plain(pydoc.render_doc(layer))

    class Model:
        method = layer

    assert Model.method is layer
    with pytest.raises(TypeError, match="first argument must be a PRNG key"):
        Model().method(*args)  # the model


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_arguments_by_name_and_describe_themselves(name):
    """Their parameters were positional only, and their help said nothing."""
    layer = getattr(px, name)(solver, num_samples=4)
    score = "x" if name in ("make_straight_through_fun", "make_perturbed_fun") else "theta"
    names = ["key", score, *LAYERS[name]]
    assert list(inspect.signature(layer).parameters) == [*names, "weight"]
    assert "key" in layer.__doc__
    assert "solver" in layer.__doc__.splitlines()[0]
    assert f"perturbax.{name}`" in layer.__doc__
    assert "solver" in layer.__name__
    given = dict(zip(names, (KEY, X, *LAYERS[name].values()), strict=True))
    expected = layer(*given.values())
    assert_trees_close(layer(**given), expected)
    assert_trees_close(layer(KEY, **{k: v for k, v in given.items() if k != "key"}), expected)
    assert_trees_close(layer(**given, weight=-1.0), layer(*given.values(), -1.0))
    with pytest.raises(TypeError, match=rf"{score} is missing.*got 1 of them by position"):
        layer(KEY)


def test_callback_without_a_rule_for_vmap():
    def summed(method):
        spec = jax.ShapeDtypeStruct((), np.float32)
        return lambda y: jax.pure_callback(lambda v: np.sum(v**2), spec, y, vmap_method=method)

    def run(*args, **settings):
        return jax.value_and_grad(smooth(*args, **settings), argnums=1)(KEY, X)

    expected = run()
    assert_trees_close(run(summed(None), batch_size=1), expected, rtol=1e-4, atol=1e-5)
    assert_trees_close(run(summed("sequential")), expected, rtol=1e-4, atol=1e-5)


def test_ordered_callback_sees_the_samples_in_order():
    seen = []

    def record(y):
        seen.append(np.array(y))
        return np.float32(np.sum(y**2))

    def fun(y):
        return io_callback(record, jax.ShapeDtypeStruct((), np.float32), y, ordered=True)

    value = smooth(fun, batch_size=1, use_baseline=False)(KEY, X)
    jax.effects_barrier()
    _, y = samples()(KEY, X)
    np.testing.assert_allclose(seen, y, rtol=1e-6)
    assert_trees_close(value, smooth()(KEY, X), rtol=1e-5)


def test_nan_at_a_sample_is_not_dropped():
    g = smooth(lambda y: jnp.where(y[0] > 0.5, jnp.nan, 1.0))
    value, gradient = jax.value_and_grad(g, argnums=1)(KEY, X)
    assert np.isnan(value)
    assert np.isnan(gradient).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_fun_that_is_not_finite_at_x_itself(bad):
    def fun(y):
        return jnp.where(jnp.all(y == X), bad, squares(y))

    value, gradient = jax.value_and_grad(smooth(fun, 1000), argnums=1)(KEY, X)
    assert_trees_close(value, smooth(num_samples=1000)(KEY, X), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * np.asarray(X), atol=0.6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_value_at_x_that_is_not_finite_does_not_count(bad):
    # With so few samples it would be one more value of the baseline; the others are all alike.
    g = smooth(lambda y: jnp.where(jnp.all(y == X), bad, 7.0), 8, degree=0)
    gradient = jax.grad(g, argnums=1)(KEY, X)
    assert_trees_close(gradient, np.zeros(3, np.float32), atol=1e-5)


def test_spike_at_x_does_not_matter_much():
    def gradients(height, **settings):
        g = smooth(lambda y: jnp.where(jnp.all(y == X), height, jnp.sum(y)), 1000, **settings)
        return jax.vmap(jax.grad(g, argnums=1), (0, None))(jax.random.split(KEY, 200), X)

    # fun(x) weighs as one value among 1001; alone, it would raise the deviation a thousandfold.
    plain = np.std(gradients(0.0, sampler=px.Independent(), degree=0), axis=0)
    for settings in ({"degree": 0}, {}):
        assert (np.std(gradients(1000.0, **settings), axis=0) < 2.0 * plain).all()


def test_aux_is_constant_in_x_and_differentiable_in_further_arguments():
    g = smooth(lambda y, scale: (jnp.sum(y), scale * jnp.sum(y)), has_aux=True)
    in_x, in_scale = jax.grad(lambda x, s: g(KEY, x, s)[1].sum(), argnums=(0, 1))(X, 2.0)
    assert_trees_close(in_x, np.zeros(3, np.float32))
    assert_trees_close(in_scale, np.sum(g(KEY, X, 1.0)[1]), rtol=1e-5)


def test_aux_is_stacked_and_untouched():
    def fun(y):
        return squares(y), {"best": jnp.argmax(y), "y": y, "on": y > 0, "none": None, "two": 2}

    value, aux = smooth(fun, has_aux=True)(KEY, X)
    assert_trees_close(value, smooth()(KEY, X), rtol=1e-6)
    y = np.asarray(aux["y"])
    assert y.shape == (8, 3)
    assert_trees_close(aux["best"], np.argmax(y, axis=1).astype(np.int32))
    assert_trees_close(aux["on"], y > 0)
    assert aux["best"].dtype == jax.eval_shape(jnp.argmax, X).dtype
    assert aux["none"] is None
    np.testing.assert_array_equal(aux["two"], np.full(8, 2))


# --- Strict modes of JAX


def test_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        count = smooth(lambda y: jnp.sum(y > jnp.zeros_like(y), dtype=jnp.int32))
        value, gradient = jax.eval_shape(jax.value_and_grad(count, argnums=1), KEY, X)
        x = (X, jnp.ones(2, jnp.float16), jnp.ones(2, jnp.bfloat16))
        mixed = jax.eval_shape(jax.grad(smooth(lambda tree: jnp.sum(tree[0])), argnums=1), KEY, x)
    assert value.dtype == gradient.dtype == jnp.float32
    assert [v.dtype for v in mixed] == [jnp.float32, jnp.float16, jnp.bfloat16]


def test_strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        x, sigma = jnp.ones((2, 3)), jnp.array([0.1, 0.2, 0.3])
        hessian = jax.hessian(smooth(jnp.sum, sigma=sigma), argnums=1)
        hessian = jax.eval_shape(hessian, KEY, x)
        in_sigma = jax.jacrev(lambda s: smooth(lambda y: y, sigma=s)(KEY, x))
        in_sigma = jax.eval_shape(in_sigma, sigma)
    assert hessian.shape == (2, 3, 2, 3)
    assert in_sigma.shape == (2, 3, 3)


def test_no_transfer_behind_the_scenes():
    # jax.grad itself transfers its 1.0; a cotangent on the device is its explicit form.
    offset, table = jnp.array([1.0, 2.0, 3.0]), np.arange(3.0, dtype=np.float32)
    weights = np.array([3.0, 1.0, 2.0], np.float32)

    def fun(y):
        return jnp.sum(y * offset + table) + jnp.sum(jnp.array([1.0, 2.0]) * y[:2] * weights[:2])

    one = jax.device_put(np.float32(1.0))
    for sigma in (jnp.float32(0.5), 0.5, np.array([0.1, 0.2, 0.3])):
        g = smooth(fun, sigma=sigma)
        with jax.transfer_guard("disallow"):
            value, pullback = jax.vjp(lambda x, g=g: g(KEY, x), X)
            (gradient,) = pullback(one)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


# --- noise


def test_noise_may_return_another_floating_dtype():
    seen = []

    def fun(y):
        seen.append(y.dtype)
        return squares(y)

    noise = Noise(lambda key, shape, dtype: jax.random.normal(key, shape, jnp.float16))
    value = smooth(fun, noise=noise)(KEY, X.astype(jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


def test_log_density_may_be_the_sum_over_coordinates():
    def run(noise):
        return jax.value_and_grad(smooth(noise=noise), argnums=1)(KEY, X)

    joint = Noise(log_prob=lambda z: -0.5 * jnp.sum(z**2))
    assert_trees_close(run(joint), run(Noise()), rtol=1e-5)


@pytest.mark.parametrize("num_samples", [8, 100])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strict_promotion_in_double_precision(dtype, num_samples):
    """Sizes of groups were of 64 bits, and a count of 32."""
    with enable_x64(True):
        x = np.array([0.1, 0.2], dtype)
        g = px.make_perturbed_fun(lambda y: jnp.sum(y * y), num_samples, 1.0, degree=0)
        expected = jax.grad(g, argnums=1)(KEY, x)
        with jax.numpy_dtype_promotion("strict"):
            found = jax.grad(g, argnums=1)(KEY, x)
    np.testing.assert_array_equal(found, expected)


def test_strict_promotion_of_errors_of_complex_values():
    """Complex values were divided by a real unit."""
    g = px.make_perturbed_fun(lambda y: jax.lax.complex(jnp.sum(y), jnp.sum(y * y)), 40, degree=0)
    expected = px.estimate(g, KEY, X)
    with jax.numpy_dtype_promotion("strict"):
        found = px.estimate(g, KEY, X)
    assert np.all(np.asarray(found.value_error) > 0)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
