r"""A regression of a function on the points it was evaluated at, whose mean under noise is known.

The prediction is a sum of features phi of one coordinate each (`_features`), and what a kernel
ridge regression (the mean of a Gaussian process) adds that is made of the last M evaluations,

    q(u) = b . phi(u) + sum_i alpha_i k(u_i, u),    (K + rho D) alpha = f - b . phi - mean,
    k(u, v) = phi(u) . phi(v) + D exp(-|u - v|^2 / (2 D)) / 2,

in units of the noise around the point of the last step: u = (y - centre) / scale. At each step, b
takes over n / M of the sum of alpha_i phi(u_i), where n of the M evaluations are new: what was said
of single coordinates is kept in O(D) numbers. The mean of q is that of the features and of the
kernel's second term, which is there under Normal noise only.

Reference: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapter 2
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..noise._smooth import Normal
from ..tracing._linear_algebra import matmul
from ._features import FAR, Law, basis, expected_features, features, moved

# Candidates for rho, of which the one that predicted the last steps best is used.
NOISE_LEVELS = (0.1, 1.0, 10.0)
# Steps of conjugate gradients from the coefficients of the step before.
_ITERATIONS = 20
# b is forgotten where it leaves so many times the square of the last evaluations themselves. It may
# leave more than they are, for the coefficients make up for it.
_WILD = 9.0


class Fit(NamedTuple):
    """Predictions of a function, one for each of R noise levels.

    Attributes:
      centre: (D,), where the points lie around.
      scale: (D,), the unit of each coordinate.
      points: (M, D) in these units.
      coefficients: alpha, (R, M); zero for points that do not count.
      absorbed: b, (R, P), taken over from the fits of earlier steps.
      weights: of the features, (R, P): b and what the points add to it.
    """

    centre: Array
    scale: Array
    points: Array
    coefficients: Array
    absorbed: Array
    weights: Array


def num_features(dim: int, law: Law) -> int:
    """P, how many features there are."""
    return dim * basis(dim, law).size


def nothing(size: int, scale: Array, law: Law) -> Fit:
    """The fit to nothing yet, with room for `size` points, in these units."""
    dim, dtype, ranks = scale.shape[0], scale.dtype, len(NOISE_LEVELS)
    total = num_features(dim, law)
    return Fit(
        centre=jnp.zeros((dim,), dtype),
        scale=scale,
        points=jnp.zeros((size, dim), dtype),
        coefficients=jnp.zeros((ranks, size), dtype),
        absorbed=jnp.zeros((ranks, total), dtype),
        weights=jnp.zeros((ranks, total), dtype),
    )


def smooth_kernel(u: Array, v: Array) -> Array:
    """The second term of k for each pair of rows of (A, D) and (B, D): (A, B)."""
    dim = u.shape[1]
    apart = jnp.sum(u**2, axis=1)[:, None] + jnp.sum(v**2, axis=1)[None] - 2 * matmul(u, v.T)
    return dim / 2 * jnp.exp(-jnp.maximum(apart, 0) / (2 * max(dim, 1)))


def expected_kernel(u: Array, mean: Array, variance: Array) -> Array:
    """Its mean where v has independent normal coordinates of these means and variances: (A,)."""
    dim = u.shape[1]
    wide = dim + variance
    apart = jnp.sum((u - mean[None]) ** 2 / wide[None], axis=1)
    return dim / 2 * jnp.exp(-apart / 2 - jnp.sum(jnp.log1p(variance / max(dim, 1))) / 2)


def predict(fit: Fit, y: Array, law: Law) -> Array:
    """The R predictions at each row of y (A, D), less a constant each: (R, A)."""
    u = (y - fit.centre[None]) / fit.scale[None]
    q = matmul(fit.weights, features(u, law).T)
    return q + matmul(fit.coefficients, smooth_kernel(fit.points, u)) if _smooth(law) else q


# Jitted, as what else takes many operations, for a step that is not.
@partial(jax.jit, static_argnums=3)
def expect(fit: Fit, x: Array, sigma: Array, law: Law) -> Array:
    """The mean of each prediction at x + sigma eps, for x and sigma (D,): (R,)."""
    place, ratio = (x - fit.centre) / fit.scale, sigma / fit.scale
    mean = matmul(fit.weights, expected_features(place, ratio, law))
    if _smooth(law):
        kernel = expected_kernel(fit.points, place, ratio**2)
        mean = mean + matmul(fit.coefficients, kernel)
    return mean


def renew(
    fit: Fit,
    points: Array,
    values: Array,
    counted: Array,
    new: int,
    middle: Array,
    sigma: Array,
    law: Law,
) -> Fit:
    """The fit once `new` evaluations have taken the places of the oldest.

    Args:
      fit: of before.
      points: where the function was evaluated, (M, D), newest first.
      values: what it was there, (M,).
      counted: which of them count, 1 or 0.
      new: how many are new.
      middle: the new centre.
      sigma: the scale of the noise, (D,).
      law: its law.
    """
    # Every evaluation leaves a part of what it says at each step that it stays. Were it left as it
    # goes, all at once, others near it could take it back, which go in their turn: that grows.
    left = new / points.shape[0] * (fit.weights - fit.absorbed)
    # The units follow sigma in jumps, for what is periodic in one unit is not so in another.
    ratio = sigma / fit.scale
    ratio = jnp.where((ratio > 0.5) & (ratio < 2), 1, ratio)
    shift, scale = (middle - fit.centre) / fit.scale, ratio * fit.scale
    absorbed = moved(fit.absorbed + left, shift, ratio, law)
    absorbed = jnp.where(jnp.isfinite(absorbed), absorbed, 0)
    before = jnp.concatenate([jnp.zeros_like(fit.coefficients[:, :new]), fit.coefficients], axis=1)
    u = (points - middle[None]) / scale[None]
    counted = jnp.where(jnp.all(jnp.abs(u) < FAR, axis=1), counted, 0)
    # Points that are not counted may be anything; of no influence, and finite.
    u = jnp.where(counted[:, None] > 0, u, 0)
    phi = features(u, law) * counted[:, None]
    # Where the point moves fast, slopes told from ever further away may still grow without bound.
    size = size_of(jnp.where(counted > 0, values, 0))
    told = centred(values[None] / size, counted)
    rest = centred(values[None] / size - matmul(absorbed / size, phi.T), counted)
    tame = jnp.sum(rest**2, axis=1, keepdims=True) <= _WILD * jnp.sum(told**2)
    absorbed, rest = jnp.where(tame, absorbed, 0), jnp.where(tame, rest, told)
    before = before[:, : points.shape[0]] / size
    coefficients = size * _solve(u, phi, told, rest, counted, before, _smooth(law))
    weights = absorbed + matmul(coefficients, phi)
    return Fit(middle, scale, u, coefficients, absorbed, weights)


def _solve(
    u: Array, phi: Array, told: Array, rest: Array, counted: Array, before: Array, smooth: bool
) -> Array:
    """alpha, (R, M), by conjugate gradients from `before`, for `rest`, in the unit of `told`."""
    gram = matmul(phi, phi.T)
    if smooth:
        gram = gram + smooth_kernel(u, u) * counted[:, None] * counted[None]
    ridge = np.array(NOISE_LEVELS, gram.dtype)[:, None] * max(u.shape[1], 1)
    unit = jnp.sqrt(jnp.sum(told**2) / jnp.maximum(jnp.sum(counted), 1))
    unit = jnp.where(unit > 0, unit, 1)

    def apply(alpha: Array) -> Array:
        return matmul(alpha, gram) + ridge * alpha

    def advance(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        alpha, residual, direction = state
        image = apply(direction)
        length = jnp.sum(residual**2, axis=1, keepdims=True)
        curvature = jnp.sum(direction * image, axis=1, keepdims=True)
        step = jnp.where(curvature > 0, length / jnp.where(curvature > 0, curvature, 1), 0)
        alpha, residual = alpha + step * direction, residual - step * image
        ratio = jnp.sum(residual**2, axis=1, keepdims=True) / jnp.where(length > 0, length, 1)
        return alpha, residual, residual + ratio * direction

    target = rest / unit
    start = before * counted[None] / unit
    # From nothing, where what was known is further off than nothing.
    residual = target - apply(start)
    better = jnp.sum(residual**2, axis=1) < jnp.sum(target**2, axis=1)
    start = jnp.where(better[:, None], start, 0)
    residual = jnp.where(better[:, None], residual, target)
    alpha, *_ = lax.fori_loop(0, _ITERATIONS, advance, (start, residual, residual))
    return alpha * unit


def size_of(values: Array) -> Array:
    """The power of two next to the largest of them, 1 if there is none: squares do not overflow."""
    largest = jnp.max(jnp.abs(values), initial=0)
    known = (largest > 0) & jnp.isfinite(largest)
    # Within numbers that are normal, so is one over it.
    limit = jnp.finfo(values.dtype).maxexp - 2
    exponent = jnp.clip(jnp.frexp(jnp.where(known, largest, 1))[1], -limit, limit)
    return jnp.ldexp(jnp.ones((), values.dtype), jnp.where(known, exponent, 0))


def centred(v: Array, counted: Array) -> Array:
    """Rows (R, M), less the means of what counts of them."""
    total = jnp.maximum(jnp.sum(counted), 1)
    return (v - jnp.sum(v * counted[None], axis=1, keepdims=True) / total) * counted[None]


def _smooth(law: Law) -> bool:
    """Whether the kernel has its second term."""
    return issubclass(law.kind, Normal)
