"""Users' functions, noise and samplers: traced, checked, and explained where tracing fails."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._checks import check_log_prob, dtype_of, kind_of, on_device
from ._mesh_axes import varying, varying_axes
from ._signature import TracedFunction, trace

# What JAX raises where a function needs values of what is traced.
_NEEDS_VALUES = (
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
)


@contextlib.contextmanager
def explained_vmap(batch_size: int | None) -> Iterator[None]:
    """Adds the remedy to the error of a function that cannot be vmapped."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        if batch_size != 1 and ("vmap" in str(error) or "atching rule" in str(error)):
            error.add_note(
                "fun is vmapped over the samples. With batch_size=1, make_perturbed_fun calls it "
                "sample by sample instead, as it is."
            )
        raise


def trace_fun(
    fun: Callable[..., Any], leaves: list[Array], has_aux: bool
) -> tuple[TracedFunction, tuple[Any, ...], int, Any, Any]:
    """Traces fun(leaves), with hints where that fails.

    Returns the function, what it closes over, how many of its results are its value, and the
    structures of value and aux.
    """
    structures: list[Any] = []

    def flat(*values: Array) -> list[Any]:
        out = fun(list(values))
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                "with has_aux=True fun must return a pair (value, aux), got "
                f"{jax.tree.structure(out)}"
            )
        value, aux = out if has_aux else (out, None)
        for name, tree in (("value", value), ("aux", aux)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                kinds = bool | int | float | complex | np.generic | np.ndarray | Array
                if not isinstance(leaf, kinds) or dtype_of(leaf) is None:
                    raise TypeError(
                        f"fun's {name} must be a pytree of arrays, but its leaf "
                        f"'{name}{jax.tree_util.keystr(path)}' is {kind_of(leaf)}"
                    )
                if name == "value" and jnp.issubdtype(dtype_of(leaf), jax.dtypes.prng_key):
                    raise TypeError(
                        "fun's value must be a pytree of numbers, for it is averaged, but its leaf "
                        f"'{name}{jax.tree_util.keystr(path)}' is a PRNG key; return it as aux, "
                        "with has_aux=True"
                    )
        structures[:] = [jax.tree.structure(value), jax.tree.structure(aux)]
        return [*jax.tree.leaves(value), *jax.tree.leaves(aux)]

    try:
        traced, operands = trace(flat, *leaves)
    except _NEEDS_VALUES as error:
        error.add_note(
            "fun is traced and vmapped over the samples, so it cannot use numpy, float(), `if` or "
            "an index of bools on its argument. Call such code through jax.pure_callback; what "
            "cannot be vmapped is evaluated one sample at a time with batch_size=1."
        )
        raise
    value_tree, aux_tree = structures
    return traced, tuple(map(on_device, operands)), value_tree.num_leaves, value_tree, aux_tree


# What a noise may know of its inverse distribution function: functions of numbers, one by one.
_INVERSES = ("icdf", "from_bits", "from_normal")


class TracedNoise:
    """A user's noise, traced: what it closes over is an operand, and equal traces are equal."""

    def __init__(self, methods: dict[str, TracedFunction], noise: Any):
        """Wraps the traced methods, for one shape, and takes over what else `noise` tells."""
        self.methods = methods
        self.derivatives = getattr(noise, "derivatives", math.inf)
        self.mean, self.variance = (
            # No others are of use; tracers and NaN cannot be compared.
            m if isinstance(m, int | float) and math.isfinite(m) else None
            for m in (getattr(noise, name, None) for name in ("mean", "variance"))
        )

    @property
    def _parts(self) -> Any:
        return tuple(self.methods.items()), self.derivatives, self.mean, self.variance

    def __hash__(self) -> int:
        """A hash of the methods' operations."""
        return hash(self._parts)

    def __eq__(self, other: object) -> bool:
        """Whether all methods perform the same operations."""
        return isinstance(other, TracedNoise) and self._parts == other._parts

    def bind(self, operands: Any) -> "BoundNoise":
        """The noise, given what its methods closed over."""
        return BoundNoise(self, operands)


class BoundNoise:
    """A traced noise with its operands: draws and log-densities for the shape it was traced at."""

    # It holds arrays.
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, traced: TracedNoise, operands: dict[str, Any]):
        """Binds the operands of each method; has those inverses that were traced."""
        self._methods, self._operands = traced.methods, operands
        self._shape = traced.methods["sample"].out_avals[0].shape
        self.mean, self.variance = traced.mean, traced.variance
        for name in _INVERSES:
            if name in traced.methods:
                setattr(self, name, functools.partial(self._inverse, name))

    def sample(self, key: Array, sample_shape: Any = (), dtype: Any = float) -> Array:
        """Draws of the traced shape, one or as many as the axes in front of it ask for."""
        shape = tuple(sample_shape) if isinstance(sample_shape, tuple | list) else (sample_shape,)
        if shape[len(shape) - 1 :] != self._shape:
            raise ValueError(
                f"noise.sample was asked for the shape {shape}, but a sampler draws noise for all "
                f"coordinates of x, so a shape that ends with {self._shape[0]} was expected"
            )
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        if len(shape) == 1:
            return self._call("sample", key).astype(dtype)
        keys = jax.random.split(key, math.prod(shape[:-1]))
        one = functools.partial(self._call, "sample")
        return jax.vmap(one)(keys).reshape(shape).astype(dtype)

    def __getattr__(self, name: str) -> Any:
        known = ("sample", "log_prob", "mean", "variance", *self.__dict__.get("_methods", ()))
        raise AttributeError(
            f"noise has no attribute {name!r} here: of a noise that is not one of perturbax's own, "
            f"a sampler sees {', '.join(dict.fromkeys(known))}"
        )

    def log_prob(self, inputs: Array) -> Array:
        """Log-density of one draw."""
        return self._call("log_prob", inputs).astype(inputs.dtype)

    def _call(self, name: str, argument: Array) -> Array:
        return self._methods[name](self._operands[name], argument)[0]

    def _inverse(self, name: str, rows: Array) -> Array:
        dtype = np.dtype(np.float32 if rows.dtype.itemsize <= 4 else np.float64)
        draws = rows.reshape(-1, *self._shape)  # samplers may have several in a row
        return (
            jax.vmap(functools.partial(self._call, name))(draws).reshape(rows.shape).astype(dtype)
        )


def trace_noise(noise: Any, key: Array, dim: int, dtype: np.dtype) -> tuple[TracedNoise, Any]:
    """Traces a user's noise for `dim` coordinates, and checks shapes and its use of the key."""
    what = f"noise.sample(key, ({dim},), {np.dtype(dtype).name})"
    like_key: Any = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    like_z: Any = jax.ShapeDtypeStruct((dim,), dtype)
    words = np.uint32 if np.dtype(dtype).itemsize <= 4 else np.uint64
    like_bits: Any = jax.ShapeDtypeStruct((dim,), words)
    axes = varying_axes(key)
    if axes:  # inside shard_map, where only an array has the axes in its type
        like_key = jax.random.wrap_key_data(jax.random.bits(key, (2,)), impl="threefry2x32")
        like_z = varying(jnp.zeros((dim,), dtype), axes)
        like_bits = varying(jnp.zeros((dim,), words), axes)
    with _explained_draw(what, "NoiseDistribution"):
        sample, sample_operands = trace(lambda k: noise.sample(k, (dim,), dtype), like_key)
    [aval] = _only_leaf(sample, what)
    if aval.shape != (dim,):
        raise ValueError(f"{what} returned shape {aval.shape}, expected ({dim},)")
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        raise TypeError(f"{what} returned dtype {aval.dtype}, expected a floating dtype")
    if dim and not sample.depends_on_inputs():
        raise TypeError(
            f"{what} does not depend on key: all samples would share one draw. Return a traced "
            "JAX array drawn with jax.random from the key"
        )
    methods, operands = {"sample": sample}, {"sample": sample_operands}
    methods["log_prob"], operands["log_prob"] = _trace_method(
        noise.log_prob, like_z, "noise.log_prob(inputs)"
    )
    [aval] = _only_leaf(methods["log_prob"], "noise.log_prob(inputs)")
    if aval.shape not in ((dim,), ()):
        raise ValueError(
            f"noise.log_prob(inputs) returned shape {aval.shape} for inputs of shape ({dim},), "
            f"expected ({dim},), or () for the log-density of all coordinates together"
        )
    check_log_prob(aval)
    for name in _INVERSES:
        if not hasattr(noise, name):
            continue
        like = like_bits if name == "from_bits" else like_z
        methods[name], operands[name] = _trace_method(getattr(noise, name), like, f"noise.{name}")
        [aval] = _only_leaf(methods[name], f"noise.{name}")
        if aval.shape != (dim,):
            raise ValueError(
                f"noise.{name} returned shape {aval.shape} for an array of shape ({dim},), "
                f"expected ({dim},)"
            )
    operands = {name: tuple(map(on_device, v)) for name, v in operands.items()}
    return TracedNoise(methods, noise), operands


@contextlib.contextmanager
def _explained_draw(what: str, protocol: str) -> Iterator[None]:
    """Adds hints to the errors of a user's method that draws."""
    try:
        yield
    except _NEEDS_VALUES as error:
        error.add_note(f"{what} must compute with jax.random, not with numpy")
        raise
    except TypeError as error:
        error.add_note(f"raised by {what}, a call that perturbax.{protocol} describes")
        raise


def _trace_method(method: Callable[..., Any], like: Any, what: str) -> Any:
    """`trace` with hints where it fails."""
    try:
        return trace(lambda v: method(v), like)
    except _NEEDS_VALUES as error:
        error.add_note(f"{what} is traced, so it must compute with jax.numpy, not with numpy")
        raise


def sample_group(
    sampler: Any, key: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
) -> Array:
    """Noise of one group by a user's sampler; checks its shape, dtype and use of the key."""
    name = np.dtype(dtype).name
    what = f"sampler.sample_group(key, noise, {group_size}, {dim}, {name})"
    with _explained_draw(what, "Sampler"):
        traced, operands = trace(
            lambda k: sampler.sample_group(k, noise, group_size, dim, dtype), key
        )
    [aval] = _only_leaf(traced, what)
    if aval.shape != (group_size, dim):
        raise ValueError(
            f"{what} returned shape {aval.shape}, expected ({group_size}, {dim}): one row for each "
            "sample of the group"
        )
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        raise TypeError(f"{what} returned dtype {aval.dtype}, expected a floating dtype")
    if aval.dtype.itemsize < 4:
        raise TypeError(
            f"{what} returned {aval.dtype}, which holds so few numbers that the gradient would be "
            f"far off. Draw in {name}, as asked for"
        )
    if dim != 0 and not traced.depends_on_inputs():
        raise TypeError(
            f"{what} does not depend on key: all groups would share one draw. Return a traced JAX "
            "array drawn with jax.random from the key"
        )
    return traced(operands, key)[0].astype(dtype)


def _only_leaf(traced: TracedFunction, what: str) -> Any:
    if len(traced.out_avals) != 1:
        raise TypeError(f"{what} must return one array, got {traced.out_tree}")
    return traced.out_avals
