"""Ranks and the sorting permutation of a vector."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._scores import at_least_float32, constant_scores, solution_dtype, static_bool

# Up to this length counting smaller entries is faster than sorting, on CPU by up to 20 times.
_LARGEST_COUNTED = 64


def ranks(scores: ArrayLike, *, descending: bool = False) -> Array:
    r"""The rank of each score, from 1 for the smallest to n for the largest, in the last axis.

    .. math:: y^*(\theta) = \arg\max \{\langle \theta, y \rangle :
        y \text{ a permutation of } (1, \dots, n)\}

    Maximises; `descending=True` gives rank 1 to the largest, as in learning to rank, which
    minimises the same objective (`maximize=False`). Equal scores are ranked in the order in
    which they stand, in both directions.

    Args:
      scores: Shape (..., n); leading axes are a batch.
      descending: Whether rank 1 goes to the largest.

    Returns:
      The ranks, of the shape of `scores`, floating, and at least float32, since bfloat16
      cannot hold 257. NaN where a score is NaN. Its derivative is zero.

    Raises:
      TypeError: If `scores` does not hold real numbers, or `descending` is no bool.
      ValueError: If `scores` is empty or a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> px.solvers.ranks(jnp.array([0.3, 2.0, -1.0]))
      Array([2., 3., 1.], dtype=float32)

    References:
      Mathieu Blondel, Olivier Teboul, Quentin Berthet, Josip Djolonga, "Fast Differentiable
      Sorting and Ranking", 2020, arXiv:2002.08871.
    """
    scores = constant_scores("scores", scores)
    dtype = at_least_float32(solution_dtype(scores))
    positions = _positions(scores, static_bool("descending", descending)).astype(dtype) + 1
    invalid = jnp.any(jnp.isnan(scores), -1, keepdims=True)
    return jnp.where(invalid, jnp.nan, positions)


def sorting_permutation(scores: ArrayLike, *, descending: bool = False) -> Array:
    r"""The permutation matrix that sorts the scores: `P @ scores` is in order.

    .. math:: P^*(\theta) = \arg\max \{\langle \rho, P \theta \rangle :
        P \text{ a permutation matrix}\}, \quad \rho = (1, \dots, n)

    Maximises; `descending=True` minimises, and `P @ scores` then falls. Equal scores keep
    their order, in both directions. Row i says which entry stands in place i of the sorted
    vector, so the last row (the first if descending) is the one-hot argmax.

    Args:
      scores: Shape (..., n); leading axes are a batch.
      descending: Whether the largest comes first.

    Returns:
      Zeros and ones of shape (..., n, n), in the dtype of `scores` (the default float for
      integers). Not the shape of `scores`: use it in `make_perturbed_fun`. NaN where a
      score is NaN. Its derivative is zero.

    Raises:
      TypeError: If `scores` does not hold real numbers, or `descending` is no bool.
      ValueError: If `scores` is empty or a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> px.solvers.sorting_permutation(jnp.array([0.3, 2.0, -1.0]))
      Array([[0., 0., 1.],
             [1., 0., 0.],
             [0., 1., 0.]], dtype=float32)
    """
    scores = constant_scores("scores", scores)
    positions = _positions(scores, static_bool("descending", descending))
    size = scores.shape[-1]
    rows = jnp.arange(size).reshape((1,) * (scores.ndim - 1) + (size, 1))
    permutation = (positions[..., None, :] == rows).astype(solution_dtype(scores))
    invalid = jnp.any(jnp.isnan(scores), -1)[..., None, None]
    return jnp.where(invalid, jnp.nan, permutation)


def _positions(scores: Array, descending: bool) -> Array:
    """Where each score stands in the sorted vector, from 0; equal scores keep their order."""
    size = scores.shape[-1]
    if size > _LARGEST_COUNTED:
        order = jnp.argsort(scores, -1, stable=True, descending=descending)
        places = jnp.broadcast_to(jnp.arange(size), scores.shape)
        return jnp.put_along_axis(jnp.zeros_like(places), order, places, axis=-1, inplace=False)
    index = jnp.arange(size)
    earlier = (index[None, :] < index[:, None]).reshape((1,) * (scores.ndim - 1) + (size, size))
    mine, other = scores[..., :, None], scores[..., None, :]
    if descending:
        mine, other = other, mine
    before = jnp.where(earlier, other <= mine, other < mine)
    return jnp.sum(before, -1)
