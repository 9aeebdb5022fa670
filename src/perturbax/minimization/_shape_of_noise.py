"""The shape of a search's noise: a matrix or, of many coordinates, a scale for each."""

import jax.numpy as jnp
from jax import Array

# By how much a step may lengthen or shorten the noise along one direction.
_STRETCH = 1.2


def stretched(shape: Array, z: Array) -> Array:
    """Standard noise, a vector (D,) or rows of them, in coordinates of the function."""
    if shape.ndim == 1:
        return shape * z
    return shape @ z if z.ndim == 1 else z @ shape.T


def standard(shape: Array, away: Array) -> Array:
    """What `stretched` made these rows of."""
    return away / shape if shape.ndim == 1 else jnp.linalg.solve(shape, away.T).T


def widths(shape: Array) -> Array:
    """Scale of the noise of each coordinate."""
    return shape if shape.ndim == 1 else jnp.linalg.norm(shape, axis=1)


def reshaped(
    metric: Array, axes: Array, curvatures: Array, unsure: Array, explained: Array
) -> Array:
    """The metric with more noise along axes of little curvature, and less along those of much.

    Samples are fewer than curvatures: ratios are drawn towards one by how unsure each is, and by
    the correlation of what is predicted with what is seen.
    """
    typical, curved = jnp.mean(jnp.abs(curvatures)), jnp.maximum(curvatures, 0)
    stretch = jnp.sqrt((typical + unsure) / (curved + unsure)) ** jnp.sqrt(explained)
    stretch = jnp.clip(stretch, 1 / _STRETCH, _STRETCH)
    stretch = stretch / jnp.exp(jnp.mean(jnp.log(stretch)))
    after = metric @ (axes * stretch) @ axes.T
    return jnp.where((typical > 0) & jnp.isfinite(after).all(), after, metric)


def limited(
    sigma: Array, unlimited: Array, metric: Array, widest: Array
) -> tuple[Array, Array, Array]:
    """Sigma, what it would be without limits, and metric, with noise nowhere wider than `widest`.

    What all rows of a matrix lose is sigma's: it would grow without end, and the metric vanish,
    where the function does not depend on a coordinate.
    """
    if metric.ndim == 1:
        sigma = jnp.minimum(sigma, jnp.min(widest / metric))
        return sigma, sigma, metric
    left = jnp.minimum(1, widest / (sigma * widths(metric)))
    common = jnp.exp(jnp.mean(jnp.log(left)))
    return sigma * common, unlimited, metric * (left / common)[:, None]
