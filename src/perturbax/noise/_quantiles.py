"""From uniform words to numbers of a given law: inverse distribution functions, exact in the tails.

A point u of (0, 1) is kept as its distance `tail` to the nearer end, at most 1/2, and as `upper`,
whether that end is 1. So the far tails, which scores amplify, keep their full resolution, and the
two halves of a symmetric law are mirror images to the last bit.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from ..tracing._broadcasting import where

_SINGLE = np.dtype("float32")


def from_bits(bits: Array) -> tuple[Array, Array]:
    """Tail and end of the midpoint of the cell of (0, 1) that a uint32 or uint64 word numbers.

    The tail is a multiple of 2**-33 (2**-55), never 0; the complement `~bits` has the same tail.
    """
    upper = lax.bitcast_convert_type(bits, jnp.int64 if bits.dtype == jnp.uint64 else jnp.int32) < 0
    folded = where(upper, ~bits, bits)
    if bits.dtype == jnp.uint64:
        return ((folded >> np.uint64(10)).astype(jnp.float64) + 0.5) * 2.0**-54, upper
    # A signed conversion is one instruction where an unsigned one is many.
    folded = lax.bitcast_convert_type(folded, jnp.int32).astype(jnp.float32)
    return (folded + np.float32(0.5)) * np.float32(2**-32), upper


def to_bits(tail: Array, upper: Array) -> Array:
    """The uint32 or uint64 word whose cell holds what has this tail and end: `from_bits` undone."""
    wide = tail.dtype.itemsize == 8
    # To the middle one at most: there the tail, 1/2, is rounded up.
    scale, most = (2.0**64, 2**63 - 2**11) if wide else (2.0**32, 2**31 - 2**7)
    word = jnp.minimum(tail * scale, most).astype(jnp.uint64 if wide else jnp.uint32)
    return jnp.where(upper, ~word, word)


def from_probability(u: ArrayLike) -> tuple[Array, Array]:
    """Tail and end of probabilities in [0, 1]."""
    u = at_least_single(u)
    upper = u > 0.5
    return jnp.where(upper, 1 - u, u), upper


# Phi(-s) exp(s^2 / 2) for s >= 0 as a quotient of two polynomials in s: relative error 1.2e-8.
_MILLS = (
    (0.00411545201, 0.0406279109, 0.18322013, 0.438275929, 0.5),
    (0.0103157886, 0.10184552, 0.469430811, 1.20244279, 1.67443684, 1.0),
)


def from_normal(z: ArrayLike) -> tuple[Array, Array]:
    """Tail and end of the probabilities Phi(z) of standard normal numbers z."""
    z = at_least_single(z)
    s = jnp.abs(z)
    if z.dtype == jnp.float64:
        tail = jax.scipy.special.ndtr(-s)
    else:  # in half of the time, and with a quarter of the error in the tails
        s = jnp.minimum(s, 14)  # the tail is below the smallest number from there on
        above, below = (_polynomial(coefficients, s) for coefficients in _MILLS)
        tail = jnp.exp(-s * s / 2) * (above / below)
    return jnp.maximum(tail, jnp.finfo(z.dtype).tiny), z > 0


def at_least_single(value: ArrayLike) -> Array:
    """The value as a floating array of at least single precision."""
    value = jnp.asarray(value)
    narrow = not jnp.issubdtype(value.dtype, jnp.floating) or value.dtype.itemsize < 4
    return value.astype(_SINGLE) if narrow else value


def mirror(magnitude: Array, upper: Array) -> Array:
    """The magnitude with the sign of its half of a symmetric law."""
    return where(upper, magnitude, -magnitude)


def two_sided(lower_tail: Callable[[Array], Array], z: ArrayLike) -> Array:
    """The distribution function of a symmetric law, from that at -|z|."""
    z = at_least_single(z)
    tail = lower_tail(-jnp.abs(z))
    return jnp.where(z > 0, 1 - tail, tail)


def _polynomial(coefficients: tuple[float, ...], v: Array) -> Array:
    """The polynomial with the given coefficients, highest power first."""
    value = coefficients[0] * v + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * v + coefficient
    return value


# z / (1 - 2 tail) for the normal law, as a quotient of two polynomials in -log(4 tail (1 - tail));
# largest relative error 4e-7 down to tails of 1e-10.
_NORMAL_NUMERATOR = (
    2.87697189e-05, 0.00102288498, 0.0120795372, 0.0910042246, 0.456113127, 1.25331431,
)  # fmt: skip
_NORMAL_DENOMINATOR = (
    9.76512192e-07, 0.000169719254, 0.00236616992, 0.0328282711, 0.10212963, 1.0,
)  # fmt: skip


def normal(tail: Array) -> Array:
    """-Phi^{-1}(tail) >= 0, without cancellation however small the tail is.

    Ends in a division for a reason: XLA counts it as expensive, and so does not fuse the whole
    generator into consumers that read an element more than once, to draw it again at each reading.
    """
    if tail.dtype == jnp.float64:
        return -jax.scipy.special.ndtri(tail)
    w = -jnp.log(4 * tail * (1 - tail))
    numerator = (1 - 2 * tail) * _polynomial(_NORMAL_NUMERATOR, w)
    return numerator / _polynomial(_NORMAL_DENOMINATOR, w)


def gumbel(tail: Array, upper: Array) -> Array:
    """-log(-log u), whose lower tail the score amplifies and whose upper tail is long."""
    u = where(upper, 1 - tail, tail)
    # Near 1, u is rounded and its logarithm off; both by the same factor, tail / (1 - u).
    away = where(upper & (u < 1), 1 - u, tail)
    return -jnp.log(where(u < 1, -jnp.log(u) * (tail / away), tail))


# -log(-log Phi(s)) and -log(-log Phi(-s)) for s >= 0, as quotients of two polynomials in s: errors
# 3e-7 of the former, 5e-8 of the latter, whose exponential is minus the score, up to s = 14.
_GUMBEL_UPPER = (
    (
        0.000979959096, 0.00303981407, 0.0150646125, 0.0406956877, 0.159037667, 0.223108774,
        1.14479502, 0.366512817,
    ),
    (0.00195996058, 0.00599525668, 0.0131451655, 0.108530177, -0.0172390278, 1.0),
)  # fmt: skip
_GUMBEL_LOWER = (
    (
        -4.93651737e-06, -0.00312636715, -0.0784570862, -0.403934281, -0.940671269, 0.366512874,
    ),
    (0.000345198332, 0.0153280102, 0.146451633, 0.574144552, 1.0),
)  # fmt: skip


def gumbel_from_normal(z: Array) -> Array:
    """-log(-log Phi(z)), in a fifth of the time that the two functions one by one take."""
    if z.dtype == jnp.float64:
        return gumbel(*from_normal(z))
    s, upper = jnp.abs(z), z > 0
    above, below = (
        jnp.where(upper, _polynomial(up, s), _polynomial(low, s))
        for up, low in zip(_GUMBEL_UPPER, _GUMBEL_LOWER, strict=True)
    )
    return above / below


# tan(pi v) / v as a polynomial in v**2 for v <= 1/4; largest relative error 4e-8.
_TANGENT = (
    27601.328, 831.407503, 736.179606, 160.978166, 40.826214, 10.3353135, 3.14159278,
)  # fmt: skip


def cauchy(tail: Array) -> Array:
    """cot(pi tail) >= 0."""
    centre = tail > 0.25
    v = jnp.where(centre, 0.5 - tail, tail)
    tangent = jnp.tan(np.pi * v) if v.dtype == jnp.float64 else v * _polynomial(_TANGENT, v * v)
    return jnp.where(centre, tangent, 1 / jnp.where(centre, 1, tangent))


_SHIFT = 8.0


def student_t(tail: Array, df: float) -> Array:
    """Minus the quantile of Student's law at `tail`, which is >= 0.

    With w = -log(4 tail (1 - tail)), the logarithm of z / (1 - 2 tail) is a smooth function of w
    that ends as a straight line, for every df. Over w + 8, it is a polynomial in 1 / (w + 8),
    which is fitted once for each df, to rounding.
    """
    offset, scale, coefficients = _student_coefficients(float(df), tail.dtype.itemsize)
    w = _SHIFT - jnp.log(4 * tail * (1 - tail))
    return (1 - 2 * tail) * jnp.exp(w * _polynomial(coefficients, offset + scale / w))


@functools.lru_cache(maxsize=64)
def _student_coefficients(df: float, itemsize: int) -> tuple[float, float, tuple[float, ...]]:
    """An affine map of 1 / (w + 8) to [-1, 1], and a polynomial there, highest power first."""
    # Not at the top: only this law needs it, and it would lengthen the import of the package.
    import scipy.special

    degree, most = (13, 22.0) if itemsize == 4 else (30, 37.5)
    # h = df log(1 + z^2 / df), from the centre to where the smallest tails lie.
    h = np.concatenate([3 * np.linspace(0.001, 1, 2000) ** 2, np.linspace(3, 2 * most + 10, 2000)])
    tail = 0.5 * scipy.special.betainc(df / 2, 0.5, np.exp(-h / df))
    h, tail = h[tail > 0.2 * math.exp(-most)], tail[tail > 0.2 * math.exp(-most)]
    # Each of two forms where it is accurate.
    central = scipy.special.betainc(0.5, df / 2, -np.expm1(-h / df))
    w = np.where(
        tail > 0.25, -np.log1p(-(np.minimum(central, 0.9) ** 2)), -np.log(4 * tail * (1 - tail))
    )
    target = np.log(df * np.expm1(h / df)) / 2 - np.log(
        np.where(tail > 0.25, central, 1 - 2 * tail)
    )
    v = 1 / (w + _SHIFT)
    low, high = v.min(), 1 / _SHIFT
    offset, scale = -(high + low) / (high - low), 2 / (high - low)
    fit = np.polynomial.chebyshev.chebfit(offset + scale * v, target * v, degree, w=1 / v)
    powers = np.polynomial.chebyshev.cheb2poly(fit)
    return float(offset), float(scale), tuple(map(float, powers[::-1]))
