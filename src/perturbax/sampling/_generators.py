"""Generators of digital nets: Sobol's direction numbers, and orthogonal arrays by finite fields."""

import functools
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import scipy

# Of scipy's direction numbers.
MAX_SOBOL_DIM = 21_201
# The lowest bits of a primitive polynomial over the field of two elements, of each degree: x is a
# generator of the field of 2**degree elements.
_PRIMITIVE = (0, 1, 3, 3, 3, 5, 3, 3, 29, 17, 9, 5, 83, 27)
# How much more often than by chance digits of three columns may cancel.
_MOST_CANCELLING = 1.2


def leading_digits(levels: int, dim: int) -> int:
    """How many first digits of any two of `dim` columns should be independent; at least 1.

    As many as leave columns enough, but fewer where digits of three columns of the first family,
    dealt at random, would cancel much more often than by chance, which is once in 2**levels.
    """

    def cancelling(k: int) -> float:
        return 2**levels * (2**k - 2) / (2**k - 1) ** 2 / (2 ** (levels - k) - 2)

    possible = [k for k in range(2, levels // 2 + 1) if cancelling(k) < _MOST_CANCELLING]
    return max((k for k in possible if sum(family_sizes(levels, k, dim)) >= dim), default=1)


def family_sizes(levels: int, leading: int, dim: int) -> list[int]:
    """Of the families of columns of which `dim` coordinates are dealt one each."""
    if leading == 1:
        return [2**levels - 1]
    sizes: list[int] = []
    while levels >= leading and sum(sizes) < max(dim, 1):
        levels -= leading
        sizes.append(2**levels if levels >= leading else 1)
    return sizes


class Family(NamedTuple):
    """Columns of an orthogonal array, as sums over the bits of a word that stands for each.

    A digit of a point is the sum, modulo 2, of those digits of the point's index that a column has
    bits for.

    Attributes:
      constant: (levels,), what all columns have, digit by digit.
      linear: (bits, levels), what the bits of a column's word add.
      rest: the lowest bits of the word are the number of the column, and as many more, not all
        zero, are random: they determine the digits that do not lead. 0 if there is no choice.
    """

    constant: np.ndarray
    linear: np.ndarray
    rest: int


@functools.lru_cache(maxsize=64)
def families(levels: int, leading: int, count: int) -> list[Family]:
    """Families of columns of orthogonal arrays of 2**levels points, the first `count`.

    All digits of a column are independent, so that it has each value once. The `leading` first
    digits of any two columns are independent too: the array has strength two.

    With one leading digit, the digits of column v are v, x v, x^2 v, ... in the field of 2**levels
    elements. With more, they span a space, of which any two meet in zero alone: with a in the field
    of 2**leading elements and s in that of 2**rest, rest = levels - leading, these are {(a, s a)}
    for each s, since (s - t) a = 0 only if a = 0 or s = t. (As bits, a is in both fields.) Within
    {(0, b)} there is another family of the same kind, and so on.

    References:
      Beutelspacher, Partial spreads in finite projective spaces and partial designs, 1975,
      doi:10.1007/BF01215286
    """
    if leading == 1:
        return [Family(np.zeros(levels, np.uint32), multiples(levels, levels), 0)]
    found, rest = [], levels
    for _ in range(count):
        outer = np.arange(rest, levels, dtype=np.uint32)
        rest -= leading
        places = [np.arange(rest, rest + leading), np.zeros(rest), outer]
        constant = np.uint32(1) << np.concatenate(places).astype(np.uint32)
        constant[leading : leading + rest] = 0
        linear = np.zeros((2 * rest, levels), np.uint32)
        if rest >= leading:
            linear[:rest, :leading] = multiples(leading, rest)
        linear[rest:, leading : leading + rest] = multiples(rest, rest)
        found.append(Family(constant, linear, rest))
    return found


def multiples(count: int, degree: int) -> np.ndarray:
    """The `count` first multiples by 1, x, x^2, ... in the field of 2**degree elements.

    Row b is of the element that is bit b alone, so that sums of rows are those of any element.
    """
    found = [np.uint32(1) << np.arange(degree, dtype=np.uint32)]
    for _ in range(count - 1):
        carry = found[-1] >> np.uint32(degree - 1)
        rest = (found[-1] << np.uint32(1)) & np.uint32(2**degree - 1)
        found.append(rest ^ carry * np.uint32(_PRIMITIVE[degree]))
    return np.stack(found, -1)


@functools.lru_cache(maxsize=64)
def sobol(dim: int, levels: int) -> np.ndarray:
    """Direction numbers of the first `dim` Sobol coordinates, uint32 (levels, dim)."""
    if dim > MAX_SOBOL_DIM:
        raise ValueError(
            f"Sobol nets have at most {MAX_SOBOL_DIM} coordinates, x has {dim}; "
            "use OrthogonalArray() or Independent()"
        )
    # The table that scipy.stats has its nets from: importing that takes as long as importing JAX.
    table = Path(scipy.__file__).parent / "stats" / "_sobol_direction_numbers.npz"
    return from_table(table, dim, levels) if table.exists() else from_points(dim, levels)


def from_table(table: Path, dim: int, levels: int) -> np.ndarray:
    """Direction numbers by the recurrence over the primitive polynomials that a table lists.

    References:
      Joe and Kuo, Constructing Sobol sequences with better two-dimensional projections, 2008,
      doi:10.1137/070709359
    """
    with zipfile.ZipFile(table) as arrays:
        with arrays.open("poly.npy") as file:
            polynomials = np.lib.format.read_array(file)[:dim].tolist()
        with arrays.open("vinit.npy") as file:
            first = _columns(file, max(polynomials).bit_length())[:dim].tolist()
    generators = np.zeros((levels, dim), np.uint32)
    for j, (polynomial, numbers) in enumerate(zip(polynomials, first, strict=True)):
        order = polynomial.bit_length() - 1
        numbers = numbers[:order] if j else [1] * levels
        for k in range(len(numbers), levels):
            number = numbers[k - order]
            for i in range(1, order + 1):
                if polynomial >> (order - i) & 1:
                    number ^= numbers[k - i] << i
            numbers.append(number)
        for k in range(levels):
            generators[k, j] = numbers[k] << (31 - k)
    return generators


def _columns(file: IO[bytes], count: int) -> np.ndarray:
    """The first columns of a matrix in numpy's format; by columns, no more is read than these."""
    np.lib.format.read_magic(file)
    (rows, columns), by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if not by_columns:
        return np.frombuffer(file.read(), dtype).reshape(rows, columns)[:, :count]
    count = min(count, columns)
    return np.frombuffer(file.read(count * rows * dtype.itemsize), dtype).reshape(count, rows).T


def from_points(dim: int, levels: int) -> np.ndarray:
    """The same, from the points of scipy's own engine."""
    from scipy.stats import qmc

    engine = qmc.Sobol(dim, scramble=False, bits=32)
    generators = np.zeros((levels, dim), np.uint32)
    for k in range(levels):
        engine.fast_forward(2**k - engine.num_generated)
        point = (engine.random(1)[0] * 2.0**32).astype(np.uint64).astype(np.uint32)
        # scipy lists points in the order of the Gray code: this one is that of digits k and k - 1.
        generators[k] = point ^ generators[k - 1] if k else point
    return generators
