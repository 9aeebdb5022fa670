"""What follows from the inverse distribution function of a law: draws, of words or of normals.

Each law of this library has it as `from_tail(tail, upper)`; see `_quantiles`. Other noise may have
`icdf(u)`, or `from_bits(bits)`.
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from . import _quantiles
from ._protocol import Shape
from ._quantiles import at_least_single


class Invertible(Protocol):
    """A law with an inverse distribution function."""

    def from_tail(self, tail: Array, upper: Array) -> Array:
        """The draw whose probability is `tail` from 0 or, where `upper`, from 1."""
        ...


# --- Methods of the laws of this library.


def sample(
    law: Invertible, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float
) -> Array:
    """Independent draws, an array of shape `sample_shape`; consumes `key`."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {dtype}")
    # Half precision holds too few values to be drawn directly: 128 of them bias the score.
    wide = dtype if dtype.itemsize >= 4 else np.dtype("float32")
    bits = jax.random.bits(key, sample_shape, jnp.uint64 if wide.itemsize == 8 else jnp.uint32)
    return from_bits(law, bits).astype(dtype)


def icdf(law: Invertible, u: ArrayLike) -> Array:
    """Inverse of the distribution function, element by element.

    The ends of the support at 0 and 1, NaN beyond.
    """
    u = at_least_single(u)
    low, high = getattr(law, "support", (-math.inf, math.inf))
    inside = (u > 0) & (u < 1)
    ends = jnp.where(u == 0, low, jnp.where(u == 1, high, jnp.nan)).astype(u.dtype)
    tail, upper = _quantiles.from_probability(jnp.where(inside, u, 0.5))
    return jnp.where(inside, law.from_tail(tail, upper), ends)


def from_bits(law: Invertible, bits: Array) -> Array:
    """The draw that uniform words (uint32 or uint64) stand for, increasing in the words."""
    return law.from_tail(*_quantiles.from_bits(bits))


# --- For any noise.


def is_invertible(noise: Any) -> bool:
    """Whether the noise has an inverse distribution function, under either of its names."""
    return hasattr(noise, "from_bits") or hasattr(noise, "icdf")


def from_words(noise: Any, bits: Array) -> Array:
    """The draws that uniform words stand for, increasing in the words."""
    if hasattr(noise, "from_bits"):
        return noise.from_bits(bits)
    return by_icdf(noise, *_quantiles.from_bits(bits))


def from_normal(noise: Any, z: Array) -> Array:
    """The draws that standard normal numbers stand for, increasing in them."""
    if hasattr(noise, "from_normal"):  # where there is a shorter way
        return noise.from_normal(z)
    tail, upper = _quantiles.from_normal(z)
    if hasattr(noise, "from_tail"):
        return noise.from_tail(tail, upper)
    if hasattr(noise, "icdf"):
        return by_icdf(noise, tail, upper)
    return noise.from_bits(_quantiles.to_bits(tail, upper))


def by_icdf(noise: Any, tail: Array, upper: Array) -> Array:
    """The draws of a noise with nothing but `icdf`, which is never asked for 0 or 1."""
    below_one = 1 - jnp.finfo(tail.dtype).epsneg
    return noise.icdf(jnp.where(upper, jnp.minimum(1 - tail, below_one), tail))
