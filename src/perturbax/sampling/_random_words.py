"""Uniform random words in rows and columns, and what keeps XLA from drawing them again."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _threefry

# Of fewer words, a loop of their own costs more than it saves.
MANY = 2**13
# XLA makes vector instructions of narrower rows only where it takes several for one.
NARROW = 32


def materialise(
    block: Callable[[], Array], shape: tuple[Any, ...], dtype: Any, key: Array
) -> Array:
    """block(), of the given shape and dtype, computed once and kept.

    XLA fuses the generator, which it holds for cheap, into every consumer of its numbers, and draws
    each number again for each time that it is read: a hundred times slower where a function
    broadcasts a part of its argument. It does not fuse across a conditional, and it keeps this one,
    whose other branch is never taken, because it does not see through the barrier.
    """
    # A zero of the key's type: the result varies over the mesh axes that the key varies over.
    zero = key[0] & np.uint32(0)
    always = lax.optimization_barrier(np.bool_(True))
    return lax.cond(always, block, lambda: jnp.full(shape, zero.astype(dtype)))


def column_numbers(dim: int) -> Array:
    return lax.iota(jnp.uint32, dim)[None, :]


def grid(key: Array, rows: int, dim: int, dtype: Any) -> Array:
    """Independent uniform words, shape (rows, dim)."""
    return numbered(key, lax.iota(jnp.uint32, rows), dim, dtype)


def numbered(key: Array, rows: Array, dim: int, dtype: Any) -> Array:
    """The words of the numbered rows, (len(rows), dim).

    Many are kept apart from what makes noise of them: both in one loop take up to twice as long.
    """

    def words() -> Array:
        return _threefry.words(key, rows[:, None], column_numbers(dim), dtype)

    many = isinstance(dim, int) and rows.shape[0] * dim > MANY
    if not many:
        return words()
    kind = jnp.uint32 if dtype.itemsize <= 4 else jnp.uint64
    return materialise(words, (rows.shape[0], dim), kind, key)
