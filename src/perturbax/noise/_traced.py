"""A user's noise as data: traced once a call, checked, and compared by its operations."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core
from jax.typing import DTypeLike

from .._checks import check_log_prob
from .._leaves import on_device
from ..tracing._mesh_axes import varying, varying_axes
from ..tracing._signature import TracedFunction, trace
from ..tracing._user_code import explained_method, only_leaf, trace_draw
from ._foreign import AdaptedNoise
from ._protocol import NoiseDistribution, Shape

# What a noise may know of its inverse distribution function: functions of numbers, one by one.
_INVERSES = ("icdf", "from_bits")

# What each method of a noise closes over.
Operands = dict[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class TracedNoise:
    """A noise whose methods were traced for draws of one shape; equal where these are.

    It has those inverses that the noise has.

    Attributes:
      methods: names and traces.
      derivatives: how many the density is good for.
      mean: None where it is of no use: tracers and NaN cannot be compared.
      variance: the same.
      law: how errors name it.
      operands: what the methods closed over; None until they are bound.
    """

    methods: tuple[tuple[str, TracedFunction], ...]
    derivatives: float
    mean: float | None
    variance: float | None
    law: str = dataclasses.field(compare=False)
    operands: Operands | None = dataclasses.field(default=None, compare=False, repr=False)

    def bind(self, operands: Operands | None) -> "TracedNoise":
        """The noise, given what its methods closed over; only then can it be used."""
        return dataclasses.replace(self, operands=operands)

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
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

    def log_prob(self, inputs: Array) -> Array:
        """Log-density of one draw."""
        return self._call("log_prob", inputs).astype(inputs.dtype)

    def __getattr__(self, name: str) -> Callable[[Array], Array]:
        known = [known for known, _ in self.__dict__.get("methods", ())]
        if name in _INVERSES and name in known:
            return functools.partial(self._inverse, name)
        told = dict.fromkeys(("sample", "log_prob", "mean", "variance", *known))
        raise AttributeError(
            f"noise has no attribute {name!r} here: of a noise that is not one of perturbax's own, "
            f"a sampler sees {', '.join(told)}"
        )

    @property
    def _shape(self) -> Shape:
        return dict(self.methods)["sample"].out_avals[0].shape

    def _call(self, name: str, argument: Array) -> Array:
        return dict(self.methods)[name]((self.operands or {})[name], argument)[0]

    def _inverse(self, name: str, rows: Array) -> Array:
        dtype = np.dtype(np.float32 if rows.dtype.itemsize <= 4 else np.float64)
        draws = rows.reshape(-1, *self._shape)  # samplers may have several in a row
        one = functools.partial(self._call, name)
        return jax.vmap(one)(draws).reshape(rows.shape).astype(dtype)


def trace_noise(noise: Any, key: Array, dim: int, dtype: np.dtype) -> tuple[TracedNoise, Operands]:
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
    draw = lambda k: noise.sample(k, (dim,), dtype)  # noqa: E731
    sample, sample_operands = trace_draw(
        draw, like_key, what, (dim,), "NoiseDistribution", "samples"
    )
    methods, operands = {"sample": sample}, {"sample": sample_operands}

    def add(name: str, like: Any, what: str) -> core.ShapedArray:
        method = getattr(noise, name)
        with explained_method(what):
            methods[name], operands[name] = trace(lambda v: method(v), like)
        return only_leaf(methods[name], what)

    aval = add("log_prob", like_z, "noise.log_prob(inputs)")
    if aval.shape not in ((dim,), ()):
        raise ValueError(
            f"noise.log_prob(inputs) returned shape {aval.shape} for inputs of shape ({dim},), "
            f"expected ({dim},), or () for the log-density of all coordinates together"
        )
    check_log_prob(aval)
    for name, like in zip(_INVERSES, (like_z, like_bits), strict=True):
        if not hasattr(noise, name):
            continue
        aval = add(name, like, f"noise.{name}")
        if aval.shape != (dim,):
            raise ValueError(
                f"noise.{name} returned shape {aval.shape} for an array of shape ({dim},), "
                f"expected ({dim},)"
            )
    mean, variance = (
        m if isinstance(m, int | float) and math.isfinite(m) else None
        for m in (getattr(noise, name, None) for name in ("mean", "variance"))
    )
    derivatives = getattr(noise, "derivatives", math.inf)
    law = getattr(noise, "law", type(noise).__name__)
    traced = TracedNoise(tuple(methods.items()), derivatives, mean, variance, law)
    return traced, {name: tuple(map(on_device, v)) for name, v in operands.items()}


def without_numbers(
    noise: NoiseDistribution | AdaptedNoise | TracedNoise, key: Array, dim: int, dtype: np.dtype
) -> tuple[NoiseDistribution | TracedNoise, Operands | None]:
    """What a program can be known by, and the numbers that it is given in each call.

    A user's noise is traced, one that was traced before comes apart; the library's own laws are
    numbers of Python, and stay whole.
    """
    if isinstance(noise, TracedNoise):
        return noise.bind(None), noise.operands
    if isinstance(noise, AdaptedNoise):
        return trace_noise(noise, key, dim, dtype)
    return noise, None


def with_numbers(
    noise: NoiseDistribution | TracedNoise, operands: Operands | None
) -> NoiseDistribution | TracedNoise:
    """The noise that `without_numbers` took apart."""
    return noise.bind(operands) if isinstance(noise, TracedNoise) else noise
