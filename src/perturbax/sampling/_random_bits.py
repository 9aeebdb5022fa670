"""Random bits addressed by (key, row, column): no state, no storage, the same on every device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..tracing._broadcasting import broadcast

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Two words, or two arrays of them that broadcast with what is asked for.
Key = Array | tuple[Array, Array]
_PARITY = np.uint32(0x1BD11BDA)
_OURS = np.array([0x70657274, 0x75726261], np.uint32)
# Of fewer words, a loop of their own costs more than it saves, where each call is waited for.
MANY = 2**13
# XLA makes vector instructions of narrower rows only where it takes several for one.
NARROW = 32


@jax.jit  # traced once for each shape, not at each use
def threefry(key: Key, row: Array, column: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds: the two words that `key` assigns to the counter (row, column).

    Plain element-wise operations, which XLA makes vector instructions of.

    Args:
      key: two uint32 words, shape (2,), or two arrays of them that broadcast with the others.
      row: uint32 array.
      column: uint32 array that broadcasts with `row`.

    Returns:
      Two uint32 arrays of the common shape.

    References:
      Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011,
      doi:10.1145/2063384.2063405
    """
    # By lax and of few constants: these operations are half of what it takes to trace a call.
    first, second = key[0], key[1]
    schedule = first, second, lax.bitwise_xor(lax.bitwise_xor(first, second), _PARITY)
    _, a, b = broadcast(first, row, column)
    a, b = lax.add(*broadcast(a, first)), lax.add(*broadcast(b, second))
    places = {n for rotations in _ROTATIONS for left in rotations for n in (left, 32 - left)}
    shifts = {n: lax.broadcast(np.uint32(n), b.shape) for n in sorted(places)}
    for block in range(5):
        for left in _ROTATIONS[block % 2]:
            a = lax.add(a, b)
            high = lax.shift_left(b, shifts[left])
            low = lax.shift_right_logical(b, shifts[32 - left])
            b = lax.bitwise_xor(lax.bitwise_or(high, low), a)
        more = schedule[(block + 1) % 3], lax.add(schedule[(block + 2) % 3], np.uint32(block + 1))
        a, b = (lax.add(*broadcast(v, m)) for v, m in zip((a, b), more, strict=True))
    return a, b


def words(key: Key, row: Array, column: Array, dtype: np.dtype) -> Array:
    """Uniform words, wide enough for noise of the given floating dtype (uint32, or uint64)."""
    first, second = threefry(key, row, column)
    if dtype.itemsize <= 4:
        return first
    return (first.astype(jnp.uint64) << np.uint64(32)) | second.astype(jnp.uint64)


def root(key: Array) -> Array:
    """Two words that stand for `key`, whatever its implementation; consumes the key."""
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.bits(key, (2,), jnp.uint32)
    if jax.config.jax_debug_key_reuse:  # pyright: ignore[reportAttributeAccessIssue]
        # The check for reuse of keys sees nothing but draws, and none under derivatives that is of
        # no use.
        words = jax.random.key_data(jax.random.clone(key))
        words |= jax.random.bits(key, (), jnp.uint32) & np.uint32(0)
    else:
        words = jax.random.key_data(key)
    # Of another key, lest noise be made of the words that JAX's own generators have for this one.
    return lax.bitwise_xor(words, _OURS)


def fold_in_and_split(key: Array, data: Array) -> tuple[Array, Array]:
    """The two keys `jax.random.split(jax.random.fold_in(key, data))`.

    Of JAX's own generator each is a loop of small parts, which in a loop of small steps takes as
    long as the steps.
    """
    watched = jax.config.jax_debug_key_reuse  # pyright: ignore[reportAttributeAccessIssue]
    split = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    if watched or not split or jax.random.key_impl(key) != "threefry2x32":
        first, second = jax.random.split(jax.random.fold_in(key, data))
        return first, second
    folded = threefry(
        jax.random.key_data(key), jnp.uint32(0), lax.convert_element_type(data, np.uint32)
    )
    words = (jnp.stack(threefry(folded, jnp.uint32(0), jnp.uint32(c))) for c in range(2))
    first, second = (jax.random.wrap_key_data(w, impl="threefry2x32") for w in words)
    return first, second


def child(key: Array, index: Array) -> Array:
    """The two-word keys of the `index`-th children of `key`, uint32: shape (*index.shape, 2).

    The columns lie beyond any coordinate that `words` is asked for, so a child's key never repeats
    a word that the parent hands out as noise.
    """
    columns = np.uint32(0xFFFFFFFE) + lax.iota(jnp.uint32, 2)
    return threefry(key, index[..., None], columns.reshape((1,) * index.ndim + (2,)))[0]


def group_numbers(first: Array, count: int) -> Array:
    """The numbers of the groups first, ..., first + count - 1, uint32."""
    return first + lax.iota(jnp.uint32, count)


def materialise(
    block: Callable[[], Array], shape: tuple[Any, ...], dtype: Any, words: Array
) -> Array:
    """block(), of the given shape and dtype, computed once and kept.

    XLA fuses the generator, which it holds for cheap, into every consumer of its numbers, and draws
    each number again for each time that it is read: a hundred times slower where a function
    broadcasts a part of its argument. It does not fuse across a conditional, and it keeps this one,
    whose other branch is never taken, because it does not see through the barrier.
    """
    # A zero of the type of the words, of a key or made of it, that the block is made of: the result
    # varies over the mesh axes that they vary over.
    zero = words[0] & np.uint32(0)
    always = lax.optimization_barrier(np.bool_(True))
    return lax.cond(always, block, lambda: jnp.full(shape, zero.astype(dtype)))


def numbered(key: Key, rows: Array, columns: int, dtype: np.dtype) -> Array:
    """The words of the numbered rows, (len(rows), columns)."""
    return words(key, rows[:, None], lax.iota(jnp.uint32, columns)[None, :], dtype)


def kept_words(key: Array, rows: Array, columns: int, dtype: np.dtype) -> Array:
    """The words of the numbered rows, (len(rows), columns), apart from what is made of them."""
    kind = jnp.uint32 if dtype.itemsize <= 4 else jnp.uint64
    draw = lambda: numbered(key, rows, columns, dtype)  # noqa: E731
    return materialise(draw, (len(rows), columns), kind, key)


def grid(key: Key, rows: int, dim: int, dtype: np.dtype) -> Array:
    """Independent uniform words, shape (rows, dim)."""
    return numbered(key, lax.iota(jnp.uint32, rows), dim, dtype)
