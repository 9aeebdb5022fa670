"""Choosing among the entries of a vector: the largest, the k largest, the median, a quantile."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._scores import (
    at_least_float32,
    constant_scores,
    is_static,
    real_array,
    solution_dtype,
    static_int,
)


def one_hot_argmax(scores: ArrayLike) -> Array:
    r"""Marks the largest score, along the last axis.

    .. math:: y^*(\theta) = \arg\max_{y \in \{e_1, \dots, e_n\}} \langle \theta, y \rangle

    Maximises. On a tie the first of the largest wins. A score of -inf masks an entry.

    Args:
      scores: Shape (..., n); leading axes are a batch.

    Returns:
      Zeros and a single one along the last axis, of the shape of `scores` and of its dtype
      (the default float for integers). NaN where a score is NaN. Its derivative is zero.

    Raises:
      TypeError: If `scores` does not hold real numbers.
      ValueError: If `scores` is empty or a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> px.solvers.one_hot_argmax(jnp.array([0.3, 2.0, -1.0]))
      Array([0., 1., 0.], dtype=float32)
    """
    scores = constant_scores("scores", scores)
    size = scores.shape[-1]
    chosen = jax.nn.one_hot(jnp.argmax(scores, -1), size, dtype=solution_dtype(scores))
    return _nan_rows(chosen, scores)


def top_k_mask(scores: ArrayLike, k: int) -> Array:
    r"""Marks the k largest scores, along the last axis.

    .. math:: y^*(\theta) = \arg\max \{\langle \theta, y \rangle : y \in \{0, 1\}^n,
        \sum_i y_i = k\}

    Maximises. Among equal scores the first ones are taken.

    Args:
      scores: Shape (..., n); leading axes are a batch.
      k: How many to mark, from 1 to n; a Python int.

    Returns:
      Zeros and k ones along the last axis, of the shape of `scores` and of its dtype (the
      default float for integers). NaN where a score is NaN. Its derivative is zero.

    Raises:
      TypeError: If `scores` does not hold real numbers, or `k` is no Python int.
      ValueError: If `k` is not between 1 and n.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> px.solvers.top_k_mask(jnp.array([0.3, 2.0, -1.0, 1.0]), 2)
      Array([0., 1., 0., 1.], dtype=float32)
    """
    scores = constant_scores("scores", scores)
    k = static_int("k", k)
    size = scores.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(
            f"k must be between 1 and {size}, the length of the last axis of scores, got {k}"
        )
    # top_k orders -0. below 0.; as scores they are equal, and the first of equals wins.
    _, indices = jax.lax.top_k(jnp.where(scores == 0, jnp.zeros_like(scores), scores), k)
    chosen = jnp.put_along_axis(
        jnp.zeros(scores.shape, solution_dtype(scores)), indices, 1, axis=-1, inplace=False
    )
    return _nan_rows(chosen, scores)


def median(values: ArrayLike) -> Array:
    """The median of the values, along the last axis: the mean of the middle two if n is even.

    The median maximises no linear objective, so there is no 0/1 solution to return: smooth it
    with `make_perturbed_fun`, not with `make_perturbed_argmax`.

    Args:
      values: Shape (..., n); leading axes are a batch.

    Returns:
      Shape (...), in the dtype of `values` (the default float for integers). NaN where a
      value is NaN.

    Raises:
      TypeError: If `values` does not hold real numbers.
      ValueError: If `values` is empty or a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> px.solvers.median(jnp.array([5.0, 1.0, 2.0, 9.0]))
      Array(3.5, dtype=float32)
    """
    return quantile(values, 0.5)


def quantile(values: ArrayLike, fraction: ArrayLike) -> Array:
    """The quantile of the values at a fraction between 0 and 1, along the last axis.

    Between two neighbouring values it is interpolated linearly, as numpy's default does. Smooth
    it with `make_perturbed_fun`; like the median it maximises no linear objective.

    Args:
      values: Shape (..., n); leading axes are a batch.
      fraction: A scalar from 0 (the minimum) to 1 (the maximum). It may be traced, and then a
        fraction outside gives NaN.

    Returns:
      Shape (...), in the dtype of `values` (the default float for integers). NaN where a
      value is NaN.

    Raises:
      TypeError: If `values` does not hold real numbers, or `fraction` is no number.
      ValueError: If `fraction` is outside [0, 1] or not a scalar, or `values` is empty.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> px.solvers.quantile(jnp.array([5.0, 1.0, 2.0, 9.0]), 0.25)
      Array(1.75, dtype=float32)
    """
    values = real_array("values", values)
    if np.ndim(fraction) != 0:
        raise ValueError(f"fraction must be a scalar, got shape {np.shape(fraction)}")
    try:
        outside = is_static(fraction) and not 0 <= float(fraction) <= 1  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise TypeError(f"fraction must be a number, got {type(fraction).__name__}") from None
    if outside:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    dtype = solution_dtype(values)
    wide = at_least_float32(dtype)
    last = values.shape[-1] - 1
    position = jnp.asarray(fraction, wide) * last
    below = jnp.clip(jnp.floor(position), 0, last)
    share = position - below
    ordered = jnp.sort(values, -1).astype(wide)
    low = jnp.take(ordered, below.astype(int), axis=-1)
    high = jnp.take(ordered, jnp.minimum(below.astype(int) + 1, last), axis=-1)
    # Where no interpolation is due the neighbour, which may be infinite, must not matter.
    between = jnp.where((share == 0) | (low == high), low, low * (1 - share) + high * share)
    inside = (position >= 0) & (position <= last)
    invalid = jnp.any(jnp.isnan(values), -1) | ~inside
    return jnp.where(invalid, jnp.nan, between).astype(dtype)


def _nan_rows(chosen: Array, scores: Array) -> Array:
    """Makes NaN the rows of a batch of solutions whose scores hold a NaN."""
    return jnp.where(jnp.any(jnp.isnan(scores), -1, keepdims=True), jnp.nan, chosen)
