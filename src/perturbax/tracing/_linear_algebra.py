"""Products in full precision, and the one way to invert a matrix."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ._broadcasting import where

# Eliminated at a time in large matrices: 32 rows take half the time of 16 or 64.
_ROWS = 32
# Numbers of a matrix up to which a vector times it is as fast by two rows.
_SHORT = 2**18


def matmul(left: Array, right: Array) -> Array:
    """A matrix product in full precision, whatever the accelerator's default."""
    if min(left.ndim, right.ndim) > 1:
        # A product with one vector XLA compiles by itself for CPUs, which takes longer than two of
        # them by the library that has all other products. That is faster, too, but for long rows.
        if right.shape[-1] == 1:
            return _product(left, jnp.broadcast_to(right, (*right.shape[:-1], 2)))[..., :1]
        if left.shape[-2] == 1 and isinstance(right.size, int) and right.size <= _SHORT:
            both = jnp.broadcast_to(left, (*left.shape[:-2], 2, left.shape[-1]))
            return _product(both, right)[..., :1, :]
    return _product(left, right)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def invert(matrix: Array) -> Array:
    """The inverse of a matrix (n, n); not finite if there is none."""
    if not matrix.size:
        return matrix
    # Rows of one length, so that pivots compare, whatever the units of the coordinates.
    lengths = row_lengths(matrix)
    return _eliminate(matrix / lengths[:, None], pivoting=True) / lengths[None]


def invert_positive(matrices: Array) -> Array:
    """The inverses of positive definite matrices (count, n, n), which need no pivoting.

    Large ones by elimination of several rows at a time, in products.
    """
    if matrices.shape[1] <= 2 * _ROWS:
        return _eliminate(matrices, pivoting=False)
    size = matrices.shape[1]
    more = -size % _ROWS
    if more:
        rest = jnp.diag((np.arange(size + more) >= size).astype(matrices.dtype))
        matrices = jnp.pad(matrices, [(0, 0), (0, more), (0, more)]) + rest[None]
    index = np.arange(size + more, dtype=np.int32)

    def eliminate(step: Array, tables: Array) -> Array:
        start = step * np.int32(_ROWS)
        rows = lax.dynamic_slice_in_dim(tables, start, _ROWS, 1)
        columns = lax.dynamic_slice_in_dim(tables, start, _ROWS, 2)
        pivots = _eliminate(lax.dynamic_slice_in_dim(rows, start, _ROWS, 2), pivoting=False)
        ones = jnp.broadcast_to(jnp.eye(_ROWS, dtype=rows.dtype), pivots.shape)
        rows = matmul(pivots, lax.dynamic_update_slice_in_dim(rows, ones, start, 2))
        at_columns = ((index >= start) & (index < start + _ROWS))[None, None]
        tables = where(at_columns, 0, tables) - matmul(columns, rows)
        return lax.dynamic_update_slice_in_dim(tables, rows, start, 1)

    return lax.fori_loop(0, len(index) // _ROWS, eliminate, matrices)[:, :size, :size]


def _eliminate(matrix: Array, pivoting: bool) -> Array:
    """The inverse by Gauss-Jordan elimination in place, each step a change of rank one.

    Without pivoting of several at once, (..., n, n), for what vmap makes of one takes longer to
    trace. In plain operations: batches of LAPACK's factorisations and triangular solves can bring
    XLA's thread pool to a standstill on machines with two cores.
    """
    size = matrix.shape[-1]
    index = np.arange(size, dtype=np.int32)  # a constant, which need not be compiled

    def eliminate(k: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        table, *order = state
        if pivoting:
            column = jnp.abs(lax.dynamic_index_in_dim(table, k, 1, keepdims=False))
            best = jnp.argmax(where(index >= k, column, -1.0)).astype(index.dtype)
            other = where(index == best, jnp.asarray(k, index.dtype), index)
            swap = where(index == k, best, other)
            table, order = table[swap], [order[0][swap]]
        at_row, at_column = (index == k)[:, None], (index == k)[None]
        column = lax.dynamic_slice_in_dim(table, k, 1, -1)
        row = lax.dynamic_slice_in_dim(table, k, 1, -2)
        row = where(at_column, 1, row) / lax.dynamic_slice_in_dim(row, k, 1, -1)
        table = where(at_row, row, where(at_column, 0, table) - column * row)
        return table, *order

    start = (matrix, jnp.asarray(index)) if pivoting else (matrix,)
    inverse, *order = lax.fori_loop(0, size, eliminate, start)
    # Rows that were exchanged are columns of the inverse.
    return inverse[:, jnp.argsort(order[0])] if pivoting else inverse


def row_lengths(matrix: Any) -> Any:
    """The Euclidean length of each row, the scale of a coordinate's noise, of numpy or JAX."""
    largest = abs(matrix).max(axis=1, initial=0)  # lest squares overflow
    safe = largest + (largest == 0).astype(largest.dtype)
    return safe * ((matrix / safe[:, None]) ** 2).sum(axis=1) ** 0.5
