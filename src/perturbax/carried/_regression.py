r"""A regression of a function on the points it was evaluated at, whose mean under noise is known.

The prediction is that of kernel ridge regression (the mean of a Gaussian process),

    q(u) = sum_i alpha_i k(u_i, u),    (K + rho D) alpha = f - mean f,

in units of the noise around the point of the last step: u = (y - centre) / scale. The kernel

    k(u, v) = u.v / 2 + (u^2 - 1).(v^2 - 1) / 4 + D exp(-|u - v|^2 / (2 D)) / 2

makes linear functions, sums of functions of one coordinate each, and smooth functions of all of
them cheap. Its mean E k(u_i, u) under noise of known mean and variance is known for the first two
terms, under Normal noise for the third too, which is left out for other laws.

Reference: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapter 2
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..tracing._linear_algebra import matmul

# Candidates for rho, of which the one that predicted the last steps best is used.
NOISE_LEVELS = (0.1, 1.0, 10.0)
# Steps of conjugate gradients from the coefficients of the step before.
_ITERATIONS = 20


class Fit(NamedTuple):
    """Predictions of a function, one for each of R noise levels.

    Attributes:
      centre: (D,), where the points lie around.
      scale: (D,), the unit of each coordinate.
      points: (M, D) in these units.
      coefficients: alpha, (R, M); zero for points that do not count.
    """

    centre: Array
    scale: Array
    points: Array
    coefficients: Array


def kernel(u: Array, v: Array, smooth: bool) -> Array:
    """k for each pair of rows of (A, D) and (B, D): (A, B)."""
    products = matmul(u, v.T)
    k = products / 2 + matmul(u**2 - 1, (v**2 - 1).T) / 4
    if smooth:
        dim = u.shape[1]
        apart = jnp.sum(u**2, axis=1)[:, None] + jnp.sum(v**2, axis=1)[None] - 2 * products
        k = k + dim / 2 * jnp.exp(-jnp.maximum(apart, 0) / (2 * dim))
    return k


def expected_kernel(u: Array, mean: Array, variance: Array, smooth: bool) -> Array:
    """E k(u_i, v), (A,), where v has independent coordinates of these means and variances (D,)."""
    k = matmul(u, mean) / 2 + matmul(u**2 - 1, mean**2 + variance - 1) / 4
    if smooth:
        dim = u.shape[1]
        wide = dim + variance
        apart = jnp.sum((u - mean[None]) ** 2 / wide[None], axis=1)
        k = k + dim / 2 * jnp.exp(-apart / 2 - jnp.sum(jnp.log1p(variance / dim)) / 2)
    return k


def predict(fit: Fit, y: Array, smooth: bool) -> Array:
    """The R predictions at each row of y (A, D), less a constant each: (R, A)."""
    u = (y - fit.centre[None]) / fit.scale[None]
    return matmul(fit.coefficients, kernel(fit.points, u, smooth))


def fit(
    points: Array,
    values: Array,
    counted: Array,
    centre: Array,
    scale: Array,
    before: Array,
    smooth: bool,
) -> Fit:
    """The regression on the points (M, D) with values (M,) that are counted, 1 or 0.

    Args:
      points: where the function was evaluated.
      values: what it was there.
      counted: which of them count.
      centre: of the new units.
      scale: the new units.
      before: coefficients (R, M) to start from.
      smooth: whether the kernel has its third term.
    """
    total = jnp.maximum(jnp.sum(counted), 1)
    rest = (values - jnp.sum(values * counted) / total) * counted
    unit = jnp.sqrt(jnp.sum(rest**2) / total)
    unit = jnp.where(unit > 0, unit, 1)
    # Points that are not counted may be anything; of no influence, and finite.
    u = jnp.where(counted[:, None] > 0, (points - centre[None]) / scale[None], 0)
    gram = kernel(u, u, smooth) * counted[:, None] * counted[None]
    dim = max(points.shape[1], 1)
    ridge = np.array(NOISE_LEVELS, gram.dtype)[:, None] * dim

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

    target = rest[None] / unit
    start = before * counted[None] / unit
    # From nothing, where what was known is further off than nothing.
    residual = target - apply(start)
    better = jnp.sum(residual**2, axis=1) < jnp.sum(target**2, axis=1)
    start = jnp.where(better[:, None], start, 0)
    residual = jnp.where(better[:, None], residual, target)
    alpha, *_ = lax.fori_loop(0, _ITERATIONS, advance, (start, residual, residual))
    return Fit(centre, scale, u, alpha * unit)
