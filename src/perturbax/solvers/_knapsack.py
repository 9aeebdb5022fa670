"""The 0/1 knapsack, with one or several capacities."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from ._scores import accumulator, as_solution, constant_scores, is_static, real_array, static_int


def knapsack(
    values: ArrayLike, weights: ArrayLike, capacity: ArrayLike, *, scale: int = 1
) -> Array:
    r"""The items of greatest total value that fit into the capacity, each taken once at most.

    .. math:: y^*(\theta) = \arg\max \{\langle \theta, y \rangle :
        y \in \{0, 1\}^n, \; W y \le c\}

    Maximises, exactly up to the rounding of sums (for integers: only from 2**24 on, in single
    precision), by dynamic programming over the capacities left. Items of negative value
    stay out; -inf keeps an item out, and inf outweighs all finite values together. Among
    solutions of equal value the one that takes the first item wins, then the one that takes
    the second, and so on (so an item of value 0 is taken where it fits).

    Time and memory are `n` times the product of `scale * capacity + 1` over the
    constraints, memory in bytes: fine for one constraint of some thousands, or two of some
    tens. Beyond that call a solver on the host.

    Args:
      values: Shape (n,).
      weights: Shape (n,), or (num_constraints, n) for several constraints at once. Integers
        >= 0; or numbers that `scale` makes integers. May be traced if of integer dtype.
      capacity: A number, or one for each constraint. It must be known while tracing.
      scale: What to multiply weights and capacity by, for instance 100 for weights such as
        3.25.

    Returns:
      Ones for the items taken and zeros elsewhere, of shape (n,), in the dtype of `values`
      (the default float for integers). NaN if a value is NaN, or a traced weight is negative.
      Its derivative is zero.

    Raises:
      TypeError: If an argument has the wrong type, or `capacity` is traced.
      ValueError: If shapes disagree, a weight or the capacity is negative, or a weight is no
        integer once scaled.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> px.solvers.knapsack(jnp.array([6.0, 10.0, 12.0]), [1, 2, 3], capacity=5)
      Array([0., 1., 1.], dtype=float32)

    References:
      Hans Kellerer, Ulrich Pferschy, David Pisinger, "Knapsack Problems", 2004,
      doi:10.1007/978-3-540-24777-7.
    """
    values = constant_scores("values", values, ndim=1)
    if (scale := static_int("scale", scale)) < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    if not is_static(capacity):
        raise TypeError(
            "capacity must be known while tracing, got a traced value; it sets the size of the "
            "table: close over it, or mark it with static_argnames"
        )
    array = real_array("weights", weights)
    if array.ndim > 2:
        raise ValueError(f"weights must have shape (n,) or (num_constraints, n), got {array.shape}")
    if array.shape[-1] != values.shape[0]:
        raise ValueError(
            f"weights must have one entry an item, got shape {array.shape} "
            f"for {values.shape[0]} values"
        )
    limits = _scaled_capacities(capacity, scale, len(jnp.atleast_2d(array)))
    if is_static(weights):
        return _pack(values, _scaled_weights(weights, scale), limits)
    return _pack(values, _scaled_traced_weights(array, scale, limits), limits)


# What a weight may differ from an integer by once scaled; float32 weights need that much.
_ROUNDING = 1e-4
_LARGEST = np.iinfo(np.int32).max


def _scaled_capacities(capacity: ArrayLike, scale: int, num_constraints: int) -> tuple[int, ...]:
    """Capacities as integers, one for each constraint."""
    try:
        capacities = np.asarray(capacity)
    except ValueError:  # a ragged list
        capacities = np.asarray(None)
    kind = capacities.dtype
    if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
        raise TypeError(
            "capacity must be a real number, or a list of one for each constraint, "
            f"got {capacity!r} ({type(capacity).__name__})"
        )
    capacities = capacities.astype(float).reshape(-1)
    if len(capacities) != num_constraints:
        raise ValueError(
            f"capacity must have one entry a constraint, got {len(capacities)} "
            f"for {num_constraints}, the rows of weights"
        )
    if not (np.isfinite(capacities).all() and capacities.min() >= 0):
        raise ValueError(f"capacity must be finite and >= 0, got {capacity}")
    if capacities.max() * scale >= _LARGEST:
        raise ValueError(
            f"capacity must be below {_LARGEST} once multiplied by scale={scale}, got {capacity}; "
            "the table has an entry for each unit: choose a smaller scale"
        )
    # The small addition takes 0.29 * 100 = 28.999999999999996 for 29.
    return tuple(int(limit) for limit in np.floor(capacities * scale + _ROUNDING))


def _scaled_traced_weights(weights: Array, scale: int, limits: tuple[int, ...]) -> Array:
    """Traced weights as integers of shape (num_constraints, n), too large ones made smaller."""
    if not jnp.issubdtype(weights.dtype, jnp.integer):
        raise TypeError(
            f"weights must hold integers where they are traced, got dtype {weights.dtype}; "
            "round them first"
        )
    kind = jnp.iinfo(weights.dtype)
    rows = []
    for row, limit in zip(jnp.atleast_2d(weights), limits, strict=True):
        # Before they are multiplied, as the product may not fit the integers of the weights. What
        # fits into the capacity weighs `most` units at most.
        most = limit // scale
        bounded = jnp.clip(row, max(-1, kind.min), min(most, kind.max)).astype(int)
        fits = row <= min(most, kind.max)
        rows.append(jnp.where(fits, bounded * min(scale, limit + 1), limit + 1))
    return jnp.stack(rows)


def _scaled_weights(weights: ArrayLike, scale: int) -> np.ndarray:
    """Weights that are known, as integers of shape (num_constraints, n)."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told below
        exact = np.atleast_2d(np.asarray(weights, float)) * scale
        rounded = np.round(exact)
        off = np.abs(exact - rounded)
    if not np.all(off <= _ROUNDING):
        raise ValueError(
            f"weights must be integers once multiplied by scale={scale}, "
            f"got {np.asarray(weights).flat[np.argmax(off)]}; "
            "choose scale so that they are, for instance 100 for two decimals"
        )
    if rounded.min() < 0:
        raise ValueError(f"weights must be >= 0, got {np.min(np.asarray(weights))}")
    return np.minimum(rounded, _LARGEST).astype(np.int32)


@functools.partial(jax.jit, static_argnames="limits")
def _pack(values: Array, weights: Array, limits: tuple[int, ...]) -> Array:
    """Fills the table of best values from the last item to the first, then reads off the items.

    `table[left]` is the best value of the items so far within the capacities `left`.
    """
    gains = accumulator(values)
    # Lest sums be infinite, and so equal, whatever else they are of.
    positive = jnp.sum(gains, where=jnp.isfinite(gains) & (gains > 0))
    gains = jnp.where(gains == jnp.inf, 2 * positive + 1, gains)
    sizes = tuple(limit + 1 for limit in limits)
    # An item heavier than the capacity reaches only into the padding below the table.
    reach = jnp.minimum(weights.astype(int), jnp.array(sizes)[:, None]).T

    def consider(table, item):
        gain, weight = item
        padded = jnp.pad(table, [(size, 0) for size in sizes], constant_values=-jnp.inf)
        start = [size - weight[axis] for axis, size in enumerate(sizes)]
        with_item = lax.dynamic_slice(padded, start, sizes) + gain
        taken = with_item >= table
        return jnp.where(taken, with_item, table), taken

    empty = jnp.zeros(sizes, gains.dtype)
    _, taken = lax.scan(consider, empty, (gains, reach), reverse=True)

    def read(left, item):
        taken, weight = item
        chosen = taken.ravel()[jnp.sum(left * strides)]
        return left - jnp.where(chosen, weight, 0), chosen

    strides = jnp.array([math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))])
    _, chosen = lax.scan(read, jnp.array(limits), (taken, reach))
    return as_solution(chosen, values, feasible=jnp.all(weights >= 0))
