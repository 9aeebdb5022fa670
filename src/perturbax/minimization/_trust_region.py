"""From a surrogate to the next proposal: its minimum within reach."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ._quadratic_fit import Fit
from ._shape_of_noise import reshaped, stretched

# Longest step, in standard deviations of the noise.
_RADIUS = 2.0


class Move(NamedTuple):
    """A step of a search.

    Attributes:
      proposal: where it leads; where it starts, if the fit failed.
      length: how far, in standard deviations of the noise, averaged over coordinates.
      limited: whether it is as long as it may be.
      metric: of the noise, as the curvatures say.
    """

    proposal: Array
    length: Array
    limited: Array
    metric: Array


def move(
    found: Fit, centre: Array, scale: Array, metric: Array, explained: Array, reach: Array
) -> Move:
    """The step from a centre to the minimum of the surrogate around it.

    Args:
      found: the surrogate.
      centre: around which it was fitted.
      scale: shape of the noise that the surrogate has as its unit.
      metric: of the noise.
      explained: share of the variance that the surrogate explains, between 0 and 1.
      reach: how far the step may go, as a share of the longest.
    """
    dim = len(centre)
    radius = reach * (_RADIUS * math.sqrt(dim))
    if metric.ndim == 2:
        curvatures, axes = jnp.linalg.eigh(found.curvature)
        along, limited = trust_region_step(axes.T @ found.gradient, curvatures, radius)
        step = axes @ along
        metric = reshaped(metric, axes, curvatures, found.unsure, explained)
    else:
        curvatures = jnp.full(dim, jnp.trace(found.curvature) / dim)
        step, limited = trust_region_step(found.gradient, curvatures, radius)
    length = jnp.linalg.norm(step) / math.sqrt(dim)
    # Under the smallest ridges a factorisation may fail; the next one has a larger one.
    sound = jnp.isfinite(length)
    proposal = jnp.where(sound, centre + stretched(scale, step), centre)
    return Move(proposal, jnp.where(sound, length, 0), limited, metric)


def trust_region_step(gradient: Array, curvatures: Array, radius: Array) -> tuple[Array, Array]:
    """The minimum of a quadratic with these curvatures along the axes, no longer than radius.

    Returns:
      The step, and whether it is as long as it may be.
    """
    tiny = jnp.finfo(gradient.dtype).tiny
    # By a power of two, for digits: of values such as 1e25 squares of slopes would overflow.
    largest = jnp.maximum(jnp.abs(gradient).max(), jnp.abs(curvatures).max())
    exponent = jnp.frexp(largest)[1]
    gradient, curvatures = (jnp.ldexp(v, -exponent) for v in (gradient, curvatures))
    lowest = jnp.maximum(0, -curvatures.min())
    length = jnp.linalg.norm(gradient)
    low = lowest
    high = lowest + length / radius + tiny

    def step(shift: Array) -> Array:
        shifted = curvatures + shift
        return -gradient / jnp.where(shifted > 0, shifted, tiny)

    free = jnp.where(lowest == 0, jnp.linalg.norm(step(jnp.zeros_like(low))), jnp.inf) <= radius

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        long = ~(jnp.linalg.norm(step(middle)) <= radius)
        return jnp.where(long, middle, low), jnp.where(long, high, middle)

    low, high = lax.fori_loop(0, 60, halve, (low, high))
    return jnp.where(free, step(jnp.zeros_like(low)), step(high)), ~free
