"""Generators of digital nets: Sobol's direction numbers, and orthogonal arrays by finite fields."""

import functools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy

# Of scipy's direction numbers.
MAX_SOBOL_DIM = 21_201
# The lowest bits of a primitive polynomial over the field of two elements, of each degree: x is a
# generator of the field of 2**degree elements.
_PRIMITIVE = (0, 1, 3, 3, 3, 5, 3, 3, 29, 17, 9, 5, 83, 27)


def double(element: Any, degree: int) -> Any:
    """x times the elements of the field of 2**degree, uint32 arrays of their coefficients."""
    carried = element >> np.uint32(degree - 1)
    kept = (element << np.uint32(1)) & np.uint32(2**degree - 1)
    return kept ^ (carried * np.uint32(_PRIMITIVE[degree]))


@functools.lru_cache(maxsize=64)
def orthogonal_array(dim: int, levels: int) -> tuple[np.ndarray, int]:
    """Columns of an orthogonal array of 2**levels points, for `dim` coordinates if they suffice.

    Entry (q, j) holds, as bits, the digits of a point's index whose sum is digit q of column j. All
    digits of a column together are independent, so that each column has each value once; and so
    are the first digits of any two columns together, so that the array has strength two in them. As
    many digits as leave columns enough; one, if even that leaves too few.

    Returns:
      A uint32 array (levels, columns), and how many digits of any two are independent.
    """
    enough = [k for k in range(1, levels // 2 + 1) if num_columns(levels, k) >= dim]
    leading = max(enough, default=1)
    return _spread(levels, leading), leading


@functools.lru_cache(maxsize=64)
def deals(count: int) -> np.ndarray:
    """Orders of `count` columns, as rows; turned round as well, they are about 8,000.

    So many are as good as all, and one of them is chosen faster than columns are shuffled.
    """
    shuffle = np.random.RandomState(0)  # its numbers will never change
    orders = [shuffle.permutation(count) for _ in range(max(1, 2**13 // count))]
    return np.stack(orders).astype(np.uint32)


def num_columns(levels: int, leading: int) -> int:
    """How many columns `orthogonal_array` has, by the number of digits that are independent."""
    rest = levels - leading
    return 2**rest + num_columns(rest, leading) if rest >= leading else 1


def _spread(levels: int, leading: int) -> np.ndarray:
    """Spaces of dimension `leading` of which any two meet in zero alone, each with a complement.

    With a in the field of 2**leading elements and s in that of 2**rest, rest = levels - leading,
    the spaces {(a, s a)}, one for each s, meet in zero alone, since (s - t) a = 0 only for a = 0 or
    s = t. (As vectors a is in both fields, being the same bits.) More are found in {(0, b)}.

    References:
      Beutelspacher, Partial spreads in finite projective spaces and partial designs, 1975,
      doi:10.1007/BF01215286
    """
    rest = levels - leading
    if rest < leading:
        return np.uint32(1) << np.arange(levels, dtype=np.uint32)[::-1, None]
    s = np.arange(2**rest, dtype=np.uint32)
    # The complement {(0, b)}, in a basis of its own for each space: t, x t, x^2 t, ...
    t = np.uint32(1) + (s * np.uint32(2_654_435_761) >> np.uint32(8)) % np.uint32(2**rest - 1)
    identity = np.uint32(1) << np.arange(rest, levels, dtype=np.uint32)[:, None]
    lifted = np.concatenate([identity | _multiples(s, leading, rest), _multiples(t, rest, rest)])
    inner = _spread(rest, leading)
    outer = np.broadcast_to(identity, (leading, inner.shape[1])) | inner[:1]
    return np.hstack([lifted, np.concatenate([inner[:leading], outer, inner[leading:]])])


def _multiples(element: np.ndarray, count: int, degree: int) -> np.ndarray:
    """The elements times 1, x, x^2, ..., as rows."""
    rows = [element]
    for _ in range(count - 1):
        rows.append(double(rows[-1], degree))
    return np.stack(rows)


@functools.lru_cache(maxsize=64)
def sobol(dim: int, levels: int) -> np.ndarray:
    """Direction numbers of the first `dim` Sobol coordinates, uint32 (levels, dim)."""
    if dim > MAX_SOBOL_DIM:
        raise ValueError(
            f"Sobol nets have at most {MAX_SOBOL_DIM} coordinates, x has {dim}; "
            "use Independent() or Orthogonal(block=8)"
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
    with zipfile.ZipFile(table) as archive:
        [polynomials] = _first_rows(archive, "poly.npy", dim, 1)
        most = max(polynomials, default=1).bit_length() - 1  # numbers that are used
        columns = _first_rows(archive, "vinit.npy", dim, max(most, 1))
    first = [list(row) for row in zip(*columns, strict=True)]
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


def _first_rows(archive: zipfile.ZipFile, name: str, rows: int, columns: int) -> list[list[int]]:
    """The first rows of the first columns of an array of integers, column by column.

    The whole takes a hundredth of a second to unpack.
    """
    with archive.open(name) as file:
        np.lib.format.read_magic(file)
        shape: Any
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if len(shape) > 1 and not by_columns:
            found = np.frombuffer(file.read(rows * shape[1] * dtype.itemsize), dtype)
            return found.reshape(rows, shape[1])[:, :columns].T.tolist()
        parts = [file.read(shape[0] * dtype.itemsize) for _ in range(columns)]
        return [np.frombuffer(part, dtype)[:rows].tolist() for part in parts]


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
