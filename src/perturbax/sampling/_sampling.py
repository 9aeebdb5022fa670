"""Samplers: how the noise of a group of samples is drawn together.

Inside a group samples may depend on each other in any way; each has exactly the law of the noise;
groups are independent of each other. That is all the estimator relies on.
"""

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import _checks
from ..noise._noise import Normal, from_normal, from_words
from ..tracing import _user_code
from ..tracing._mesh_axes import in_told_mesh
from . import _nets, _random_words, _threefry

# A group is drawn as a whole; this bounds the memory that it takes.
_MAX_GROUP = 2**13


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
        object.__setattr__(self, "block", _checks.check_count(self.block, "block"))

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
        return noise.from_bits(_random_words.grid(jax.random.key_data(key), group_size, dim, dtype))


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
        bits = _random_words.grid(jax.random.key_data(key), 1, dim, dtype)
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
            object.__setattr__(self, "block", _checks.check_count(self.block, "block"))
        pairs = _checks.check_bool(self.antithetic, "antithetic")
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
        gauss = Normal().from_bits(_random_words.grid(jax.random.key_data(key), rows, dim, dtype))
        # Orthogonalisation sees the directions of the rows only, so their lengths are independent
        # of its result, and serve as the lengths that it takes away.
        q, triangle = jnp.linalg.qr(gauss.T)
        signs = jnp.where(jnp.diagonal(triangle) < 0, -1, 1).astype(dtype)
        z = (q * signs[None]).T * jnp.linalg.norm(gauss, axis=1, keepdims=True)
        if self.antithetic:
            z = jnp.concatenate([z, -z])[:group_size]
        return z if isinstance(noise, Normal) else from_normal(noise, z)


@dataclasses.dataclass(frozen=True)
class DigitalNet:
    """What digital nets have in common: a few groups, as large as can be."""

    num_groups: int = 2

    _scrambled: ClassVar[_nets.Scrambled]

    def __post_init__(self) -> None:
        """Checks num_groups."""
        count = _checks.check_count(self.num_groups, "num_groups")
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
        keys = jax.random.key_data(key)[None]
        return self.sample_groups(keys, noise, group_size, dim, dtype)[0]

    def sample_groups(
        self, keys: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of a group for each key of two words, shape (number of keys, group_size, dim)."""
        return _nets.noise_of_nets(self._scrambled, keys, noise, group_size, dim, dtype)


@dataclasses.dataclass(frozen=True)
class Sobol(DigitalNet):
    """Scrambled Sobol nets: each group is a net of its own, randomised independently.

    Randomised by a random linear scramble and a digital shift, so that each point is exactly
    uniform before it is carried to the law of the noise. Nets are best at a power of two points.

    In few coordinates nothing is more precise. In many, functions like the product of the signs of
    some of them are estimated worse than from independent samples, always of the same ones. An
    `OrthogonalArray` distinguishes no coordinates.

    Attributes:
      num_groups: number of nets; more where a net would exceed 8,192 points.

    References:
      Joe and Kuo, Constructing Sobol sequences with better two-dimensional projections, 2008,
      doi:10.1137/070709359
      Matousek, On the L2-discrepancy for anchored boxes, 1998, doi:10.1006/jcom.1998.0489
    """

    _scrambled = staticmethod(_nets.scrambled_sobol)


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

    _scrambled = staticmethod(_nets.scrambled_array)


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
    if type(sampler) in (Independent, Antithetic, Orthogonal, Sobol, OrthogonalArray, Merged):
        return sampler.sample_group(*args)
    return _user_code.sample_group(sampler, *args)


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
      key: two uint32 words (see `_threefry.root`).
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
    return _random_words.materialise(block, (count * group_size, dim), dtype, key)


_draw_traced_once = jax.jit(_draw, static_argnums=(0, 1, 4, 5, 6, 7))


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
        more = -rows % 4 if isinstance(dim, int) and 0 < dim < _random_words.NARROW else 0
        samples = first * np.uint32(group_size) + lax.iota(jnp.uint32, rows + more)
        block = lambda: noise.from_bits(_random_words.numbered(key, samples, dim, dtype))  # noqa: E731
        if not more:
            return block()
        return _random_words.materialise(block, (rows + more, dim), dtype, key)[:rows]

    if isinstance(sampler, DigitalNet):
        # All at once, for vmap takes as long to trace as the net itself.
        keys = jax.vmap(partial(_threefry.child, key))(groups)
        z = sampler.sample_groups(keys, noise, group_size, dim, dtype)
        return z.reshape(count * group_size, dim)

    def one(group: Array) -> Array:
        typed = jax.random.wrap_key_data(_threefry.child(key, group), impl="threefry2x32")
        if group_size == 1 and isinstance(sampler, Independent):
            return noise.sample(typed, (dim,), dtype)[None].astype(dtype)
        return _sample_group(sampler, typed, noise, group_size, dim, dtype)

    return jax.vmap(one)(groups).reshape(count * group_size, dim)
