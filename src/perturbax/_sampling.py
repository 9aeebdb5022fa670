"""Samplers: how the noise of a group of samples is drawn together.

Inside a group samples may depend on each other in any way; each has exactly the law of the noise;
groups are independent of each other. That is all the estimator relies on.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax import Array, lax

from . import _arguments, _bits, _tracing
from ._noise import Normal, from_normal, from_words
from ._sharding import in_told_mesh

# A group is drawn as a whole; this bounds the memory that it takes.
_MAX_GROUP = 2**13
# Of scipy's direction numbers.
_MAX_SOBOL_DIM = 21_201
# Of fewer words, a loop of their own costs more than it saves.
_MANY = 2**13
# XLA makes vector instructions of narrower rows only where it takes several for one.
_NARROW = 32


@runtime_checkable
class Sampler(Protocol):
    """What an object must offer to draw noise in groups.

    It must be hashable, for it is a static part of the compiled program.
    """

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group, when `num_samples` of `dim` coordinates are wanted in all."""
        ...

    def sample_group(
        self, key: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim), each row with the law of `noise`.

        `key` is a Threefry key of the group's own; `dtype` is float32 or float64.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Independent:
    """Independent samples.

    Attributes:
      block: samples in a group. More than one makes no difference to the samples, only to what is
        left out when a surrogate is fitted.
    """

    block: int = 1

    def __post_init__(self) -> None:
        """Checks block."""
        object.__setattr__(self, "block", _arguments.check_count(self.block, "block"))

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        del dim
        return min(self.block, num_samples)

    def sample_group(
        self, key: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        if not hasattr(noise, "from_bits"):
            one = lambda k: noise.sample(k, (dim,), dtype)  # noqa: E731
            return jax.vmap(one)(jax.random.split(key, group_size)).astype(dtype)
        return noise.from_bits(_grid(jax.random.key_data(key), group_size, dim, dtype))


@dataclasses.dataclass(frozen=True)
class Antithetic:
    """Pairs of opposite samples: z and -z for a symmetric law, opposite quantiles for any other.

    For symmetric noise, what is odd about x cancels from the value and what is even from the
    gradient; what remains has twice the variance of independent samples. So it is good for values
    of nearly linear functions and, with `degree=1`, which takes the linear part out, for gradients
    of smooth ones; of degree 0 it is worse than `Independent()` for gradients of the former.
    """

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group: two."""
        del dim
        return min(2, num_samples)

    def sample_group(
        self, key: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        bits = _grid(jax.random.key_data(key), 1, dim, dtype)
        return from_words(noise, jnp.concatenate([bits, ~bits])[:group_size])


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """Blocks of orthogonal Gaussian directions, carried to other laws coordinate by coordinate.

    Directions are Haar-distributed, lengths chi-distributed and independent, so that each sample
    is exactly Gaussian. Costs a QR factorisation a block.

    Attributes:
      block: directions in a block, at most the number of coordinates; None for as many as that.
      antithetic: whether each direction comes with its opposite.

    References:
      Choromanski et al., Structured Evolution with Compact Architectures for Scalable Policy
      Optimization, 2018, arXiv:1804.02395
    """

    block: int | None = None
    antithetic: bool = False

    def __post_init__(self) -> None:
        """Checks block and antithetic."""
        if self.block is not None:
            object.__setattr__(self, "block", _arguments.check_count(self.block, "block"))
        pairs = _arguments.check_bool(self.antithetic, "antithetic")
        object.__setattr__(self, "antithetic", pairs)

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        directions = min(dim, self.block or dim, _MAX_GROUP)
        return min(num_samples, max(1, directions) * (2 if self.antithetic else 1))

    def sample_group(
        self, key: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        rows = -(-group_size // 2) if self.antithetic else group_size
        gauss = Normal().from_bits(_grid(jax.random.key_data(key), rows, dim, dtype))
        # Orthogonalisation sees the directions of the rows only, so their lengths are independent
        # of its result, and serve as the lengths that it takes away.
        q, triangle = jnp.linalg.qr(gauss.T)
        signs = jnp.where(jnp.diagonal(triangle) < 0, -1, 1).astype(dtype)
        z = (q * signs[None]).T * jnp.linalg.norm(gauss, axis=1, keepdims=True)
        if self.antithetic:
            z = jnp.concatenate([z, -z])[:group_size]
        return z if isinstance(noise, Normal) else from_normal(noise, z)


@dataclasses.dataclass(frozen=True)
class Sobol:
    """Scrambled Sobol nets: each group is a net of its own, randomised independently.

    Randomised by a random linear scramble and a digital shift, so that each point is exactly
    uniform before it is carried to the law of the noise. Nets are best at a power of two points.

    Attributes:
      num_groups: number of nets; more where a net would exceed 8,192 points.

    References:
      Joe and Kuo, Constructing Sobol sequences with better two-dimensional projections, 2008,
      doi:10.1137/070709359
      Matousek, On the L2-discrepancy for anchored boxes, 1998, doi:10.1006/jcom.1998.0489
    """

    num_groups: int = 2

    def __post_init__(self) -> None:
        """Checks num_groups."""
        count = _arguments.check_count(self.num_groups, "num_groups")
        object.__setattr__(self, "num_groups", count)

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        del dim
        groups = max(min(self.num_groups, num_samples), -(-num_samples // _MAX_GROUP))
        return -(-num_samples // groups)

    def sample_group(
        self, key: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        return _nets(jax.random.key_data(key)[None], noise, group_size, dim, dtype)[0]


@dataclasses.dataclass(frozen=True)
class Merged:
    """Several groups of a sampler taken as one: fewer groups on whose others a surrogate is fitted.

    Attributes:
      sampler: draws them.
      count: how many make one.
    """

    sampler: Sampler
    count: int

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        return self.count * self.sampler.group_size(num_samples, dim)

    def sample_group(
        self, key: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        size = group_size // self.count

        def part(key: Array) -> Array:
            return _sample_group(self.sampler, key, noise, size, dim, dtype)

        return jax.vmap(part)(jax.random.split(key, self.count)).reshape(group_size, dim)


def _sample_group(sampler: Any, *args: Any) -> Array:
    """One group, checked if the sampler is a user's."""
    if type(sampler) in (Independent, Antithetic, Orthogonal, Sobol, Merged):
        return sampler.sample_group(*args)
    return _tracing.sample_group(sampler, *args)


def _net_shape(size: int, dim: int) -> tuple[int, int]:
    """Of a net of at least `size` points: log2 of their number, and how many share a row."""
    levels = max(1, (size - 1).bit_length())
    if dim >= _NARROW or _is_simple(levels, dim):
        return levels, 1
    return levels, 2 ** min(levels, (_NARROW // dim).bit_length())


def _is_simple(levels: int, dim: int) -> bool:
    """Whether a net is so small that what compiles fastest is as good as anything."""
    return dim < 8 and 2**levels * dim <= _MANY


def _nets(keys: Array, noise: Any, size: int, dim: int, dtype: np.dtype) -> Array:
    """Noise of a net for each of the keys (count, 2): shape (count, size, dim)."""
    count = keys.shape[0]
    levels, wide = _net_shape(size, dim)

    def nets() -> Array:
        return from_words(noise, _widen(_net(keys, size, dim), keys, dtype))

    # Many apart from what cuts them into points: together they take up to four times as long.
    many = 2**levels * dim > _MANY
    shape = (count, 2**levels // wide, wide * dim)
    z = materialise(nets, shape, dtype, keys[0]) if many else nets()
    return z.reshape(count, 2**levels, dim)[:, :size]


def _net(keys: Array, size: int, dim: int) -> Array:
    """A scrambled Sobol net for each of the keys (count, 2), uniform uint32 words.

    `_net_shape` tells how many points and rows.
    """
    levels, wide = _net_shape(size, dim)
    count = keys.shape[0]
    generators = _sobol_generators(dim, levels)  # (levels, dim), numpy

    def random() -> Array:
        key = keys[:, 0, None, None], keys[:, 1, None, None]
        rows = lax.iota(jnp.uint32, levels + 1)[None, :, None]
        return _bits.words32(key, rows, _columns(dim)[None])

    # Each is read `levels` times, too often to be drawn anew, unless they are few.
    shape = (count, levels + 1, dim)
    words = materialise(random, shape, jnp.uint32, keys[0]) if dim >= _NARROW else random()
    # Column q of the scramble has a one at bit q and random bits below it.
    top = np.uint32(1) << np.arange(31, 31 - levels, -1, dtype=np.uint32)[:, None]
    columns = (words[:, :levels] & (top - np.uint32(1))[None]) | top[None]
    hit = (generators[:, None] & top[None]) != 0  # generator k has bit q
    scrambled, shift = _sums(columns, hit), words[:, levels:]
    if _is_simple(levels, dim):
        return _points(jnp.concatenate([scrambled, shift], 1), 2**levels)
    # A point is the sum, bit by bit, of the generators at the binary digits of its index: one
    # operation a number, from the sums for the lowest digits, those of the points of a row, the low
    # and the high ones.
    lowest = wide.bit_length() - 1
    first = _points(jnp.concatenate([scrambled[:, :lowest], shift], 1), wide)
    higher = jnp.tile(scrambled[:, lowest:], (1, 1, wide))
    half = max(levels // 2 - lowest, 0)
    first = first.reshape(count, 1, wide * dim)
    low = _points(jnp.concatenate([higher[:, :half], first], 1), 2**half)
    high = _points(higher[:, half:], 2 ** (levels - lowest - half))
    return (high[:, :, None] ^ low[:, None]).reshape(count, 2**levels // wide, wide * dim)


def _points(generators: Array, size: int) -> Array:
    """The sums of the generators (count, levels, dim) at the digits 1 of 0, ..., size - 1.

    Generators beyond the digits of size belong to all sums. Shape (count, size, dim).
    """
    levels = np.arange(generators.shape[1])
    digits = (np.arange(size)[:, None] >> levels & 1 != 0) | (2**levels >= size)
    return _sums(generators, digits[..., None])


def _sums(terms: Array, chosen: np.ndarray) -> Array:
    """Sums, bit by bit, of those of the terms (count, n, dim) that are chosen: (count, m, dim).

    `chosen` is (m, n, dim), or (m, n, 1) for all coordinates alike.
    """
    # By a reduction, which XLA keeps apart from what is made of the net: fused with it,
    # concatenations would keep it from being vectorised, and the random words be drawn anew.
    terms = jnp.where(chosen[None], terms[:, None], np.uint32(0))
    return lax.reduce(terms, np.uint32(0), lax.bitwise_xor, (2,))


def _columns(dim: int) -> Array:
    return lax.iota(jnp.uint32, dim)[None, :]


def _grid(key: Array, rows: int, dim: int, dtype: Any) -> Array:
    """Independent uniform words, shape (rows, dim)."""
    return _words(key, lax.iota(jnp.uint32, rows), dim, dtype)


def _words(key: Array, rows: Array, dim: int, dtype: Any) -> Array:
    """The words of the numbered rows, (len(rows), dim).

    Many are kept apart from what makes noise of them: both in one loop take up to twice as long.
    """

    def words() -> Array:
        return _bits.words(key, rows[:, None], _columns(dim), dtype)

    many = isinstance(dim, int) and rows.shape[0] * dim > _MANY
    if not many:
        return words()
    kind = jnp.uint32 if dtype.itemsize <= 4 else jnp.uint64
    return materialise(words, (rows.shape[0], dim), kind, key)


def _widen(points: Array, keys: Array, dtype: np.dtype) -> Array:
    """Fills 64-bit words up with random low bits where the noise is double precision."""
    if dtype.itemsize <= 4:
        return points

    rows, dim = points.shape[1:]

    def fill_of(key: Array) -> Array:
        low = _bits.child(key, jnp.uint32(0))
        return _grid(low, rows, dim, np.dtype(np.float32)).astype(jnp.uint64)

    fill = jax.vmap(fill_of)(keys)
    return (points.astype(jnp.uint64) << np.uint64(32)) | fill


@functools.lru_cache(maxsize=64)
def _sobol_generators(dim: int, levels: int) -> np.ndarray:
    """Direction numbers of the first `dim` Sobol coordinates, uint32 (levels, dim)."""
    if dim > _MAX_SOBOL_DIM:
        raise ValueError(
            f"Sobol nets have at most {_MAX_SOBOL_DIM} coordinates, x has {dim}; "
            "use Independent() or Orthogonal(block=8)"
        )
    # The table that scipy.stats has its nets from: importing that takes as long as importing JAX.
    table = Path(scipy.__file__).parent / "stats" / "_sobol_direction_numbers.npz"
    return _from_table(table, dim, levels) if table.exists() else _from_points(dim, levels)


def _from_table(table: Path, dim: int, levels: int) -> np.ndarray:
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


def _from_points(dim: int, levels: int) -> np.ndarray:
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


def draw(
    noise: Any,
    sampler: Any,
    key: Array,
    first: Array,
    count: int,
    group_size: int,
    dim: int,
    dtype: np.dtype,
) -> Array:
    """Noise of the groups first, ..., first + count - 1: shape (count * group_size, dim).

    A function of the key and of each group's number alone, so that it is the same however many
    groups are drawn at a time and wherever they are.

    Args:
      noise: the distribution.
      sampler: how samples of a group depend on each other.
      key: two uint32 words (see `_bits.root`).
      first: number of the first group, uint32 scalar.
      count: number of groups, static.
      group_size: samples in a group, static.
      dim: number of coordinates of a sample, static.
      dtype: floating dtype of the result.
    """
    # Traced once for value and derivative, where everything but key and first can be hashed.
    static = isinstance(dim, int) and isinstance(noise, Hashable)
    with in_told_mesh():
        return (_draw_traced_once if static else _draw)(
            noise, sampler, key, first, count, group_size, dim, dtype
        )


def _draw(
    noise: Any,
    sampler: Any,
    key: Array,
    first: Array,
    count: int,
    group_size: int,
    dim: int,
    dtype: np.dtype,
) -> Array:
    block = partial(_draw_block, noise, sampler, key, first, count, group_size, dim, dtype)
    return materialise(block, (count * group_size, dim), dtype, key)


_draw_traced_once = jax.jit(_draw, static_argnums=(0, 1, 4, 5, 6, 7))


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


def _draw_block(
    noise: Any,
    sampler: Any,
    key: Array,
    first: Array,
    count: int,
    group_size: int,
    dim: int,
    dtype: np.dtype,
) -> Array:
    """`draw`, which XLA may fuse with whatever reads it."""
    groups = first + lax.iota(jnp.uint32, count)
    if isinstance(sampler, Independent) and hasattr(noise, "from_bits"):
        rows = count * group_size
        # XLA makes no vector instructions of a number of elements that four do not divide.
        more = -rows % 4 if isinstance(dim, int) and 0 < dim < _NARROW else 0
        samples = first * np.uint32(group_size) + lax.iota(jnp.uint32, rows + more)
        block = lambda: noise.from_bits(_words(key, samples, dim, dtype))  # noqa: E731
        return materialise(block, (rows + more, dim), dtype, key)[:rows] if more else block()

    if isinstance(sampler, Sobol):  # all at once, for vmap takes as long to trace as the net itself
        keys = jax.vmap(partial(_bits.child, key))(groups)
        return _nets(keys, noise, group_size, dim, dtype).reshape(count * group_size, dim)

    def one(group: Array) -> Array:
        typed = jax.random.wrap_key_data(_bits.child(key, group), impl="threefry2x32")
        if group_size == 1 and isinstance(sampler, Independent):
            return noise.sample(typed, (dim,), dtype)[None].astype(dtype)
        return _sample_group(sampler, typed, noise, group_size, dim, dtype)

    return jax.vmap(one)(groups).reshape(count * group_size, dim)
