"""What follows from the inverse distribution function of a law: draws, from words or normals."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from . import _quantiles
from ._protocol import Shape
from ._quantiles import at_least_single


def is_invertible(noise: Any) -> bool:
    """Whether the noise has an inverse distribution function, under either of its names."""
    return hasattr(noise, "from_bits") or hasattr(noise, "icdf")


def from_words(noise: Any, bits: Array) -> Array:
    """The draws that uniform words stand for, by the `from_bits` or the `icdf` of any noise."""
    if hasattr(noise, "from_bits"):
        return noise.from_bits(bits)
    tail, upper = _quantiles.from_bits(bits)
    below_one = 1 - jnp.finfo(tail.dtype).epsneg
    return noise.icdf(jnp.where(upper, jnp.minimum(1 - tail, below_one), tail))


def from_normal(noise: Any, z: Array) -> Array:
    """The draws that standard normal numbers stand for, increasing in them, for any noise.

    By the noise's own `from_normal`, if it has one, else by its `icdf`.
    """
    if hasattr(noise, "from_normal"):
        return noise.from_normal(z)
    tail, upper = _quantiles.from_normal(z)
    below_one = 1 - jnp.finfo(tail.dtype).epsneg
    return noise.icdf(jnp.where(upper, jnp.minimum(1 - tail, below_one), tail))


def draw(noise: Any, key: Array, sample_shape: Shape, dtype: DTypeLike) -> Array:
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {dtype}")
    # Half precision holds too few values to be drawn directly: 128 of them bias the score.
    wide = dtype if dtype.itemsize >= 4 else np.dtype("float32")
    bits = jax.random.bits(key, sample_shape, jnp.uint64 if wide.itemsize == 8 else jnp.uint32)
    return noise.from_bits(bits).astype(dtype)


def icdf(quantile: Any, u: ArrayLike, low: float = -math.inf, high: float = math.inf) -> Array:
    """`quantile` of the probabilities u: the ends of the support at 0 and 1, NaN beyond."""
    u = at_least_single(u)
    inside = (u > 0) & (u < 1)
    ends = jnp.where(u == 0, low, jnp.where(u == 1, high, jnp.nan)).astype(u.dtype)
    return jnp.where(
        inside, quantile(*_quantiles.from_probability(jnp.where(inside, u, 0.5))), ends
    )
