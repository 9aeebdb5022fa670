"""Digital nets: points that are sums, bit by bit, of scrambled generators."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _bits, _generators
from ._noise import from_words
from ._words import MANY, NARROW, columns, grid, materialise

# Of keys (count, 2), levels and dim: the scrambled generators of the binary digits of a point's
# index (count, levels, dim), lowest digit first, and what is added to all (count, 1, dim).
_Scrambled = Callable[[Array, int, int], tuple[Array, Array]]


def sobol(keys: Array, noise: Any, size: int, dim: int, dtype: np.dtype) -> Array:
    """Noise of a scrambled Sobol net for each of the keys (count, 2): (count, size, dim)."""
    return _noise(scrambled_sobol, keys, noise, size, dim, dtype)


def orthogonal_array(keys: Array, noise: Any, size: int, dim: int, dtype: np.dtype) -> Array:
    """Noise of a random orthogonal array for each of the keys (count, 2): (count, size, dim)."""
    return _noise(scrambled_array, keys, noise, size, dim, dtype)


def _noise(
    scrambled: _Scrambled, keys: Array, noise: Any, size: int, dim: int, dtype: np.dtype
) -> Array:
    count = keys.shape[0]
    levels, wide = shape_of(size, dim)

    def draw() -> Array:
        return from_words(noise, _widen(net(scrambled, keys, size, dim), keys, dtype))

    # Many apart from what cuts them into points: together they take up to four times as long.
    many = 2**levels * dim > MANY
    shape = (count, 2**levels // wide, wide * dim)
    z = materialise(draw, shape, dtype, keys[0]) if many else draw()
    return z.reshape(count, 2**levels, dim)[:, :size]


def shape_of(size: int, dim: int) -> tuple[int, int]:
    """Of a net of at least `size` points: log2 of their number, and how many share a row."""
    levels = max(1, (size - 1).bit_length())
    if dim >= NARROW or _is_simple(levels, dim):
        return levels, 1
    return levels, 2 ** min(levels, (NARROW // dim).bit_length())


def _is_simple(levels: int, dim: int) -> bool:
    """Whether a net is so small that what compiles fastest is as good as anything."""
    return dim < 8 and 2**levels * dim <= MANY


def net(scrambled: _Scrambled, keys: Array, size: int, dim: int) -> Array:
    """A net for each of the keys (count, 2), uniform uint32 words.

    `shape_of` tells how many points and rows.
    """
    levels, wide = shape_of(size, dim)
    generators, shift = scrambled(keys, levels, dim)
    if _is_simple(levels, dim):
        return _points(jnp.concatenate([generators, shift], 1), 2**levels)
    # A point is the sum of the generators at the binary digits of its index: one operation a
    # number, from the sums for the lowest digits, those of the points of a row, the low and the
    # high ones.
    lowest = wide.bit_length() - 1
    first = _points(jnp.concatenate([generators[:, :lowest], shift], 1), wide)
    higher = jnp.tile(generators[:, lowest:], (1, 1, wide))
    half = max(levels // 2 - lowest, 0)
    first = first.reshape(-1, 1, wide * dim)
    low = _points(jnp.concatenate([higher[:, :half], first], 1), 2**half)
    high = _points(higher[:, half:], 2 ** (levels - lowest - half))
    return (high[:, :, None] ^ low[:, None]).reshape(-1, 2**levels // wide, wide * dim)


def scrambled_sobol(keys: Array, levels: int, dim: int) -> tuple[Array, Array]:
    """Sobol's generators, scrambled by a random lower triangular matrix in each coordinate."""
    tables = _generators.sobol(dim, levels)  # (levels, dim), numpy
    words = _random(keys, levels + 1, dim)
    # Column q of the scramble has a one at bit q and random bits below it.
    top = np.uint32(1) << np.arange(31, 31 - levels, -1, dtype=np.uint32)[:, None]
    scramble = (words[:, :levels] & (top - np.uint32(1))[None]) | top[None]
    hit = (tables[:, None] & top[None]) != 0  # generator k has bit q
    return _sums(scramble, hit[None]), words[:, levels:]


def scrambled_array(keys: Array, levels: int, dim: int) -> tuple[Array, Array]:
    """Generators of an orthogonal array whose columns are dealt to the coordinates at random.

    The leading digits of a coordinate are multiplied by a random element of their field, so that
    no product of their signs is more in line with the array than another; the others are scrambled
    like those of Sobol's generators.
    """
    table, leading = _generators.orthogonal_array(dim, levels)  # (levels, columns), numpy
    deals = _generators.deals(table.shape[1])  # (how many, columns), numpy
    words = _random(keys, levels + 2, dim)
    key = keys[:, 0, None], keys[:, 1, None]
    deal = _bits.words32(key, jnp.uint32(levels + 2), jnp.uint32(0)) % np.uint32(deals.size)
    many = np.uint32(deals.shape[1])
    order = jnp.asarray(deals)[deal // many, (deal + columns(dim)) % many]  # (count, dim)
    dealt = jnp.moveaxis(jnp.asarray(table)[:, order], 1, 0)  # (count, levels, dim)

    place = np.arange(31, 31 - levels, -1, dtype=np.uint32)[:, None]
    top = np.uint32(1) << place
    scramble = (words[:, :levels] & (top - np.uint32(1))[None]) | top[None]
    # The first columns: products of a random element with the powers of the field's generator.
    power = np.uint32(1) + words[:, levels + 1] % np.uint32(2**leading - 1)
    powers = [power]
    for _ in range(leading - 1):
        powers.append(_generators.double(powers[-1], leading))
    below = np.uint32(2 ** (32 - leading) - 1)
    first = (words[:, :leading] & below) | (jnp.stack(powers, 1) << np.uint32(32 - leading))
    scramble = jnp.concatenate([first, scramble[:, leading:]], 1)
    digit = np.arange(levels, dtype=np.uint32)[:, None, None]
    hit = (dealt[:, None] >> digit[None]) & np.uint32(1) != 0  # generator k has digit q
    return _sums(scramble, hit), words[:, levels : levels + 1]


def _random(keys: Array, rows: int, dim: int) -> Array:
    """Independent words for each of the keys, (count, rows, dim)."""

    def random() -> Array:
        key = keys[:, 0, None, None], keys[:, 1, None, None]
        return _bits.words32(key, lax.iota(jnp.uint32, rows)[None, :, None], columns(dim)[None])

    # Each is read for every generator, too often to be drawn anew, unless they are few.
    shape = (keys.shape[0], rows, dim)
    return materialise(random, shape, jnp.uint32, keys[0]) if dim >= NARROW else random()


def _points(generators: Array, size: int) -> Array:
    """The sums of the generators (count, levels, dim) at the digits 1 of 0, ..., size - 1.

    Generators beyond the digits of size belong to all sums. Shape (count, size, dim).
    """
    levels = np.arange(generators.shape[1])
    digits = (np.arange(size)[:, None] >> levels & 1 != 0) | (2**levels >= size)
    return _sums(generators, digits[None, ..., None])


def _sums(terms: Array, chosen: Array | np.ndarray) -> Array:
    """Sums, bit by bit, of those of the terms (count, n, dim) that are chosen: (count, m, dim).

    `chosen` is (count, m, n, dim), or 1 where all are alike.
    """
    # By a reduction, which XLA keeps apart from what is made of the net: fused with it,
    # concatenations would keep it from being vectorised, and the random words be drawn anew.
    terms = jnp.where(chosen, terms[:, None], np.uint32(0))
    return lax.reduce(terms, np.uint32(0), lax.bitwise_xor, (2,))


def _widen(points: Array, keys: Array, dtype: np.dtype) -> Array:
    """Fills 64-bit words up with random low bits where the noise is double precision."""
    if dtype.itemsize <= 4:
        return points

    rows, dim = points.shape[1:]

    def fill_of(key: Array) -> Array:
        low = _bits.child(key, jnp.uint32(0))
        return grid(low, rows, dim, np.dtype(np.float32)).astype(jnp.uint64)

    return (points.astype(jnp.uint64) << np.uint64(32)) | jax.vmap(fill_of)(keys)
