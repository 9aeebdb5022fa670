"""How a search's sigma follows what the surrogate explains."""

import jax.numpy as jnp
from jax import Array

from ._trust_region import Move

# Share of the variance between samples from which on sigma follows the surrogate: half of a
# function of plateaus would be explained between its steps, and sigma would shrink to their size.
# For noisy values it is larger, up to the second number: what looks like noise may be steps that a
# wider sigma sees over.
_EXPLAINED, _EXPLAINED_OF_NOISE = 0.7, 0.85
# Least and largest factor of a step where the surrogate is followed.
_SHRINK, _GROW = 0.2, 2.0
# Where it is not, a step of the length `_MODERATE` leaves sigma as it is, and another changes it by
# a factor of at most 1 / (1 - `_CAUTION` * explained).
_MODERATE, _CAUTION = 0.4, 0.3
# What is not explained pulls sigma towards the problem's scale: the power of their ratio, and the
# most of a step.
_PULL, _MOST_PULL = 0.15, 1.3
# Factor by which sigma grows on a plateau.
_FLAT = 1.25
# Where a step turned out worse, noise is this much narrower: where the surrogate is followed, else.
_BACK, _CAUTIOUS_BACK = 0.5, 0.9


def least_explained(prior: Array, dtype: jnp.dtype) -> Array:
    """Share of the variance that must be explained for sigma to follow the surrogate."""
    noise = 10.0 ** (prior[0].astype(dtype) / 2)
    return _EXPLAINED + (_EXPLAINED_OF_NOISE - _EXPLAINED) * noise


def back(follows: Array) -> Array:
    """What sigma is multiplied by where a step turned out worse."""
    return jnp.where(follows, _BACK, _CAUTIOUS_BACK)


def factor(
    step: Move, reach: Array, back: Array, explained: Array, least: Array, away: Array, flat: Array
) -> Array:
    """What sigma is multiplied by for the next step.

    Args:
      step: the one that is made.
      reach: how far it might have gone, as a share of the longest.
      back: what sigma was multiplied by already, because the step before turned out worse; else 1.
      explained: share of the variance that the surrogate explains, between 0 and 1.
      least: what `least_explained` says.
      away: ratio of the problem's scale to sigma.
      flat: whether the function is flat here.
    """
    worse = back < 1
    floor = jnp.maximum(_SHRINK, 1 - (explained - least) / (1 - least))
    wanted = jnp.where(step.limited & (reach >= 1), jnp.maximum(step.length, 1.5), step.length)
    followed = jnp.where(worse, 1, jnp.clip(wanted, jnp.minimum(floor, 1), _GROW))
    most = 1 / (1 - _CAUTION * explained)
    pull = away ** (_PULL * (1 - explained))
    cautious = jnp.clip(step.length / _MODERATE, 1 / most, most)
    cautious = cautious * jnp.clip(pull, 1 / _MOST_PULL, _MOST_PULL) / back
    return back * jnp.where(flat, _FLAT, jnp.where(explained < least, cautious, followed))
