r"""Functions of one coordinate each, whose sums are remembered for ever, in so many numbers.

In units of the noise around a centre, u = (y - centre) / scale, each coordinate has the features

    u / sqrt(2),   (u^2 - 1) / 2,   and, for k = 1, ..., K,   a_k cos(w_k u),   a_k sin(w_k u)

with w_k = k / 2 and a_k^2 in proportion to 1 / (1 + w_k^2), the spectrum of exp(-|u|): so that the
products of the last are a stationary kernel of functions that may jump. The mean of a feature under
noise of known mean, variance and characteristic function is known. What is a sum of features around
one centre is one around any other, so that a sum can be carried along with the point.

References:
  Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007
  Duvenaud, Nickisch and Rasmussen, Additive Gaussian Processes, 2011, arXiv:1112.4394
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..noise._smooth import Gumbel, Logistic, Normal

# Variances of the weights of the linear, the quadratic and all periodic features.
_LINEAR, _QUADRATIC, _PERIODIC = 0.5, 0.25, 0.5
_FREQUENCY = 0.5
# Most frequencies, and most periodic features of all coordinates; most coordinates whose squares
# are looked at. With many coordinates, few evaluations tell their slopes at best.
_MOST, _MOST_PERIODIC, _MOST_QUADRATIC = 8, 512, 500
# In units of the noise: what was learnt from further away is of no use.
FAR = 100.0


class Law(NamedTuple):
    """What predictions know of the noise: of which kind it is, its mean and its variance."""

    kind: type
    mean: float
    variance: float


def law_of(noise: Any) -> Law:
    """What predictions know of the noise; raises ValueError where they know too little."""
    found = []
    for name in ("mean", "variance"):
        moment = getattr(noise, name, None)
        if not isinstance(moment, int | float) or not math.isfinite(moment):
            raise ValueError(
                f"carry needs noise with a finite mean and variance, but noise.{name} is {moment} "
                f"for {noise!r}: use Normal(), for example"
            )
        found.append(float(moment))
    return Law(type(noise), *found)


class Basis(NamedTuple):
    """Which features there are of each coordinate, beside the linear one.

    Attributes:
      quadratic: whether there is a quadratic one.
      frequencies: K.
    """

    quadratic: bool
    frequencies: int

    @property
    def size(self) -> int:
        """How many features there are of a coordinate."""
        return 1 + self.quadratic + 2 * self.frequencies


def basis(dim: int, law: Law) -> Basis:
    """Those that pay; no periodic ones where the noise's characteristic function is not known."""
    known = characteristic_of(law) is not None
    most = min(_MOST, _MOST_PERIODIC // max(2 * dim, 1))
    return Basis(dim <= _MOST_QUADRATIC, most if known else 0)


def features(u: Array, law: Law) -> Array:
    """The features at each row of u (A, D): (A, P)."""
    quadratic, frequencies = basis(u.shape[1], law)
    parts = [_LINEAR**0.5 * u]
    if quadratic:
        parts.append(_QUADRATIC**0.5 * (u**2 - 1))
    if frequencies:
        first = jnp.cos(_FREQUENCY * u), jnp.sin(_FREQUENCY * u)
        cos, sin = first
        for k, amplitude in enumerate(_amplitudes(frequencies)):
            if k:  # by the law of addition, which is faster than another cosine
                cos, sin = cos * first[0] - sin * first[1], sin * first[0] + cos * first[1]
            parts += [amplitude * cos, amplitude * sin]
    return jnp.concatenate(parts, axis=1)


def expected_features(place: Array, ratio: Array, law: Law) -> Array:
    """E of the features at place + ratio eps, (P,), for place and ratio (D,)."""
    quadratic, frequencies = basis(place.shape[0], law)
    mean = place + ratio * law.mean
    parts = [_LINEAR**0.5 * mean]
    if quadratic:
        parts.append(_QUADRATIC**0.5 * (mean**2 + law.variance * ratio**2 - 1))
    characteristic = characteristic_of(law)
    if characteristic is not None and frequencies:
        frequency = _frequencies(frequencies, place.dtype)
        size, turn = characteristic(ratio[None] * frequency)
        size = np.array(_amplitudes(frequencies), place.dtype)[:, None] * size
        angle = place[None] * frequency + turn
        parts.append(jnp.stack([size * jnp.cos(angle), size * jnp.sin(angle)], axis=1).ravel())
    return jnp.concatenate(parts)


def moved(weights: Array, shift: Array, ratio: Array, law: Law) -> Array:
    """Weights (R, P) of the same sums, less constants, around another centre in other units.

    Args:
      weights: of the features of u.
      shift: where the new centre is, (D,), in the units of u.
      ratio: the new units over those of u, (D,). Where it is not 1, periodic features are
        forgotten, for they have no counterparts.
      law: of the noise.
    """
    quadratic, frequencies = kinds = basis(shift.shape[0], law)
    near = jnp.abs(shift) <= FAR
    shift = jnp.where(near, shift, 0)
    each = weights.reshape(len(weights), kinds.size, len(shift))
    linear, parts = each[:, 0], []
    if quadratic:
        squares = jnp.where(near[None], each[:, 1], 0)
        linear = linear + 2 * (_QUADRATIC / _LINEAR) ** 0.5 * shift[None] * squares
        parts.append((ratio**2)[None] * squares)
    if frequencies:
        angle = _frequencies(frequencies, shift.dtype) * shift[None]
        kept = (near & (ratio == 1))[None]
        cos, sin = (jnp.where(kept, v, 0)[None] for v in (jnp.cos(angle), jnp.sin(angle)))
        of_cos, of_sin = each[:, -2 * frequencies :: 2], each[:, 1 - 2 * frequencies :: 2]
        turned = jnp.stack([cos * of_cos + sin * of_sin, cos * of_sin - sin * of_cos], axis=2)
        parts.append(turned.reshape(len(weights), 2 * frequencies * len(shift)))
    return jnp.concatenate([ratio[None] * linear, *parts], axis=1)


def _frequencies(count: int, dtype: Any) -> np.ndarray:
    """w_1, w_2, ... as a column."""
    return _FREQUENCY * np.arange(1, count + 1, dtype=dtype)[:, None]


def _amplitudes(frequencies: int) -> list[float]:
    spectrum = 1 / (1 + _frequencies(frequencies, np.float64).ravel() ** 2)
    return [float(v) for v in np.sqrt(_PERIODIC * spectrum / spectrum.sum())]


# --- Characteristic functions E exp(i t eps), as their absolute value and their argument


def characteristic_of(law: Law) -> Callable[[Array], tuple[Array, Array]] | None:
    """That of the noise, if it is known."""
    known = {Normal: _normal, Logistic: _logistic, Gumbel: _gumbel}
    return known.get(law.kind)


def _normal(t: Array) -> tuple[Array, Array]:
    return jnp.exp(-(t**2) / 2), jnp.zeros_like(t)


def _logistic(t: Array) -> tuple[Array, Array]:
    return _over_sinh(np.pi * t), jnp.zeros_like(t)


def _gumbel(t: Array) -> tuple[Array, Array]:
    """Gamma(1 - i t), whose argument is Stirling's series ten places on, brought back."""
    away = 10
    size, angle = jnp.hypot(t, jnp.full_like(t, away)), jnp.arctan2(t, jnp.full_like(t, away))
    series = (away - 0.5) * angle + t * jnp.log(size) - t
    series = series - jnp.sin(angle) / (12 * size) + jnp.sin(3 * angle) / (360 * size**3)
    for k in range(1, away):
        series = series - jnp.arctan2(t, jnp.full_like(t, k))
    return jnp.sqrt(_over_sinh(np.pi * t)), -series


def _over_sinh(t: Array) -> Array:
    """t / sinh(t), by exponentials that cannot overflow."""
    t = jnp.abs(t)
    small = t < 1e-3
    safe = jnp.where(small, 1, t)
    return jnp.where(small, 1 - t**2 / 6, 2 * safe * jnp.exp(-safe) / -jnp.expm1(-2 * safe))
