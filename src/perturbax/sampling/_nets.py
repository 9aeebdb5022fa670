"""Digital nets: Sobol's, and orthogonal arrays."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import _checks
from ..noise._inverse import from_words
from ..noise._protocol import NoiseDistribution
from ..tracing._broadcasting import where
from . import _generators
from ._drawn_together import DrawnTogether
from ._protocol import MAX_GROUP
from ._random_bits import MANY, NARROW, child, materialise, numbered


class Scrambling(NamedTuple):
    """How the generators of a kind of nets are made random."""

    # How many words it takes for each net, by levels and dim.
    num_words: Callable[[int, int], int]
    # Of words (count, number), levels and dim: the scrambled generators of the binary digits of a
    # point's index (count, levels, dim), lowest digit first, and what is added to all (count, 1,
    # dim).
    generators: Callable[[Array, int, int], tuple[Array, Array]]


# Sobol nets estimate some products of signs badly; coordinates dealt at random keep these from
# being the same ones in every net. Of three coordinates nothing changes; for many it takes long.
_FEWEST_DEALT, _MOST_DEALT = 4, 64


def shape_of(size: int, dim: int) -> tuple[int, int]:
    """Of a net of at least `size` points: log2 of their number, and how many share a row."""
    levels = max(1, (size - 1).bit_length())
    if dim >= NARROW or _is_simple(levels, dim):
        return levels, 1
    return levels, 2 ** min(levels, (NARROW // dim).bit_length())


def _is_simple(levels: int, dim: int) -> bool:
    """Whether a net is so small that what compiles fastest is as good as anything."""
    return dim < 8 and 2**levels * dim <= MANY


def net(scrambling: Scrambling, words: Array, size: int, dim: int) -> Array:
    """A net for each row of words, uniform uint32 words.

    `shape_of` tells how many points and rows.
    """
    levels, wide = shape_of(size, dim)
    generators, shift = scrambling.generators(words, levels, dim)
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


def _words_of_sobol(levels: int, dim: int) -> int:
    return (levels + 1 + (_FEWEST_DEALT <= dim <= _MOST_DEALT)) * dim


def _scrambled_sobol(words: Array, levels: int, dim: int) -> tuple[Array, Array]:
    """Sobol's generators, scrambled by a random lower triangular matrix in each coordinate."""
    directions = jnp.asarray(_generators.sobol(dim, levels))[None]
    words = words.reshape(len(words), -1, dim)
    if words.shape[1] > levels + 1:
        number = _dealt(words[:, levels + 1], dim, dim)[:, None]
        own = number[..., None, :] == lax.broadcasted_iota(jnp.uint32, (1, 1, dim, 1), 2)
        directions = _sums(directions[..., None], own)
    hit = (directions[:, :, None] & _place(levels)[None, None]) != 0  # generator k has digit q
    return _sums(_triangle(words[:, None, :levels]), hit), words[:, levels : levels + 1]


SOBOL = Scrambling(_words_of_sobol, _scrambled_sobol)


def _words_of_array(levels: int, dim: int) -> int:
    columns = sum(_generators.family_sizes(levels, _generators.leading_digits(levels, dim), dim))
    return (levels + 3) * dim + -(-dim // columns) * columns


def _scrambled_array(words: Array, levels: int, dim: int) -> tuple[Array, Array]:
    """Generators of an orthogonal array whose columns are dealt to the coordinates at random.

    The leading digits of a coordinate are multiplied by a random element of their field, so that
    none of their sums is distinguished. The other digits are scrambled like those of Sobol's nets.
    """
    leading = _generators.leading_digits(levels, dim)
    words, order = words[:, : (levels + 3) * dim], words[:, (levels + 3) * dim :]
    words = words.reshape(len(words), levels + 3, dim)

    def generators() -> Array:
        digits = _dealt_columns(order, words[:, levels + 1], levels, leading)[:, None]
        factor = _nonzero(words[:, levels + 2], leading)
        powers = _sums_over_bits(_generators.multiples(leading, leading), factor)
        below = words[:, :leading] & np.uint32(2 ** (32 - leading) - 1)
        first = powers << np.uint32(32 - leading) | below
        rest = _triangle(words[:, None, :levels])[:, :, leading:]
        index = np.arange(levels, dtype=np.uint32)[None, :, None, None]
        hit = (digits >> index) & np.uint32(1) != 0  # generator k has digit q
        return _sums(jnp.concatenate([first[:, None], rest], 2), hit)

    # Apart from the sums of which points are made: fused with these it takes twice as long.
    kept = materialise(generators, (len(words), levels, dim), jnp.uint32, words[0, 0])
    return kept, words[:, levels : levels + 1]


ARRAY = Scrambling(_words_of_array, _scrambled_array)


def _dealt_columns(order: Array, random: Array, levels: int, leading: int) -> Array:
    """Columns of an orthogonal array for all coordinates, dealt at random, digit by digit.

    Shape (count, levels, dim); `random` are words, (count, dim), for `order` see `_dealt`.
    """
    sizes = _generators.family_sizes(levels, leading, random.shape[-1])
    number = _dealt(order, random.shape[-1], sum(sizes))
    found = []
    for size, family in zip(sizes, _generators.families(levels, leading, len(sizes)), strict=True):
        rest = np.uint32(family.rest)
        word = number | (_nonzero(random, family.rest) << rest) if rest else number + np.uint32(1)
        rows = family.constant[None, :, None] ^ _sums_over_bits(family.linear, word)
        found.append((number < np.uint32(size), rows))
        number = number - np.uint32(size)
    columns = found[-1][1]
    for belongs, rows in found[-2::-1]:
        columns = where(belongs[:, None], rows, columns)
    return columns


def _nonzero(words: Array, degree: int) -> Array:
    """Random elements of the field of 2**degree other than zero."""
    return np.uint32(1) + words % np.uint32(2**degree - 1)


def _dealt(words: Array, dim: int, columns: int) -> Array:
    """A random one of so many columns for each coordinate, (count, dim).

    All of a coordinate's own, if there are as many. Otherwise so for each block of as many
    coordinates, and independently for each: `words` are (count, blocks * columns).
    """
    # By the ranks of random words. Sorting them compiles slowly, and a table would have to be read
    # by indices, which arrays split over a mesh do not allow.
    words = words.reshape(len(words), -1, 1, columns)
    several = dim if words.shape[1] == 1 else columns
    rank = jnp.sum(words < jnp.swapaxes(words[..., :several], -1, -2), -1, dtype=jnp.uint32)
    return rank.reshape(len(words), words.shape[1] * several)[:, :dim]


def _place(levels: int) -> np.ndarray:
    """A one at each of the leading bits of a word, as rows."""
    return np.uint32(1) << np.arange(31, 31 - levels, -1, dtype=np.uint32)[:, None]


def _triangle(words: Array) -> Array:
    """Columns of a random lower triangular matrix: column q has a one at bit q, and bits below."""
    place = _place(words.shape[-2])[None, None]
    return (words & (place - np.uint32(1))) | place


def _points(generators: Array, size: int) -> Array:
    """The sums of the generators (count, levels, dim) at the digits 1 of 0, ..., size - 1.

    Generators beyond the digits of size belong to all sums. Shape (count, size, dim).
    """
    levels = np.arange(generators.shape[1])
    digits = (np.arange(size)[:, None] >> levels & 1 != 0) | (2**levels >= size)
    return _sums(generators[:, None], digits[None, ..., None])


def _sums(terms: Array | np.ndarray, chosen: Array | np.ndarray) -> Array:
    """Sums, bit by bit, of those terms that are chosen, over the third axis of both, of four."""
    # By a reduction, which XLA keeps apart from what is made of the net: fused with it,
    # concatenations would keep it from being vectorised, and the random words be drawn anew.
    return lax.reduce(where(chosen, terms, np.uint32(0)), np.uint32(0), lax.bitwise_xor, (2,))


def _sums_over_bits(rows: np.ndarray, words: Array) -> Array:
    """Sums of the rows (bits, n) that the bits of words (count, dim) mark: (count, n, dim)."""
    bits = np.arange(len(rows), dtype=np.uint32)[None, None, :, None]
    hit = (words[:, None, None] >> bits) & np.uint32(1) != 0
    return _sums(rows.T[None, ..., None], hit)


def _widen(points: Array, key: Array, numbers: Array, dtype: np.dtype) -> Array:
    """Fills 64-bit words up with random low bits where the noise is double precision.

    Of nets of the given numbers, (count, rows, n).
    """
    if dtype.itemsize <= 4:
        return points
    count, rows, columns = points.shape
    index = numbers[:, None] * np.uint32(rows) + lax.iota(jnp.uint32, rows)[None]
    low = numbered(child(key, jnp.uint32(0)), index.reshape(-1), columns, np.dtype(np.float32))
    high = points.astype(jnp.uint64) << np.uint64(32)
    return high | low.reshape(count, rows, columns).astype(jnp.uint64)


@dataclasses.dataclass(frozen=True)
class DigitalNet(DrawnTogether):
    """What digital nets have in common: a few groups, as large as can be."""

    num_groups: int = 2

    needs_inverse: ClassVar[bool] = True
    needs_dim: ClassVar[bool] = True
    _scrambling: ClassVar[Scrambling]

    def __post_init__(self) -> None:
        """Checks num_groups."""
        count = _checks.check_count(self.num_groups, "num_groups")
        object.__setattr__(self, "num_groups", count)

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        del dim
        groups = max(min(self.num_groups, num_samples), -(-num_samples // MAX_GROUP))
        return -(-num_samples // groups)

    def _draw(
        self,
        key: Array,
        numbers: Array,
        noise: NoiseDistribution,
        group_size: int,
        dim: int,
        dtype: np.dtype,
    ) -> Array:
        size, count, (levels, wide) = group_size, len(numbers), shape_of(group_size, dim)
        num_words = self._scrambling.num_words(levels, dim)
        words = numbered(key, numbers, num_words, np.dtype(np.float32))

        def whole() -> Array:
            points = net(self._scrambling, words, size, dim)
            return from_words(noise, _widen(points, key, numbers, dtype))

        def samples(z: Array) -> Array:
            return z.reshape(count, 2**levels, dim)[:, :size].reshape(count * size, dim)

        keep = partial(materialise, shape=(count * size, dim), dtype=dtype, words=key)
        if 2**levels * dim <= MANY:
            return keep(lambda: samples(whole()))
        # Many apart from what cuts them into points: together they take up to four times as long.
        z = materialise(whole, (count, 2**levels // wide, wide * dim), dtype, key)
        return samples(z) if size == 2**levels else keep(lambda: samples(z))


@dataclasses.dataclass(frozen=True)
class Sobol(DigitalNet):
    """Scrambled Sobol nets: each group is a net of its own, randomised independently.

    Randomised by a random linear scramble and a digital shift, so that each point is exactly
    uniform before it is carried to the law of the noise. Nets are best at a power of two points.

    In few coordinates nothing is more precise. In many, functions like the product of the signs of
    some of them are estimated worse than from independent samples: up to 64 coordinates change
    places from group to group, so that no choice of them is worse than the average of all, which is
    at most about three times the variance up to 11; beyond 64 it is always the same choices, and
    many times. An `OrthogonalArray` distinguishes no coordinates.

    Attributes:
      num_groups: number of nets; more where a net would exceed 8,192 points.

    References:
      Joe and Kuo, Constructing Sobol sequences with better two-dimensional projections, 2008,
      doi:10.1137/070709359
      Matousek, On the L2-discrepancy for anchored boxes, 1998, doi:10.1006/jcom.1998.0489
    """

    _scrambling = SOBOL


@dataclasses.dataclass(frozen=True)
class OrthogonalArray(DigitalNet):
    """Latin hypercubes in which any two coordinates are stratified jointly as well.

    Of 2**m points each coordinate has one in each of 2**m intervals of equal probability, and any
    two coordinates have equally many in each cell of a grid of 2**k by 2**k cells. k is as large as
    leaves a column of the array to each coordinate, at most m / 2 (of 16 and 64 points one less),
    at least 1. What depends on three and more coordinates together is estimated about as precisely
    as from independent samples, on average over keys, because columns are dealt to coordinates at
    random: with 16 or more points, and fewer than 2**m - 1 coordinates, no product of signs that
    was measured has more than 1.3 times their variance, with 8 points 1.6 times. (All 2**m - 1
    columns add up to zero: the product of as many signs is in line with every array.)

    Of 2**m coordinates and more some share a column; chance decides which. A group with another
    number of points is a part of an array. All points are exactly uniform before they are carried
    to the law of the noise.

    Attributes:
      num_groups: number of arrays; more where an array would exceed 8,192 points.

    References:
      Tang, Orthogonal array-based Latin hypercubes, 1993, doi:10.1080/01621459.1993.10476423
      Owen, Orthogonal arrays for computer experiments, integration and visualization, 1992,
      Statistica Sinica 2(2), 439-452
    """

    _scrambling = ARRAY
