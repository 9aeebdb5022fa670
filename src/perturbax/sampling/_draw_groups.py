"""Draws noise group by group: the same numbers however many groups are drawn at a time."""

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..tracing import _user_code
from ..tracing._mesh_axes import in_told_mesh
from . import _random_bits
from ._independent import Antithetic, Independent
from ._nets import DigitalNet, OrthogonalArray, Sobol
from ._orthogonal import Orthogonal
from ._protocol import Sampler


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
      key: two uint32 words (see `_random_bits.root`).
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
    return _random_bits.materialise(block, (count * group_size, dim), dtype, key)


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
        more = -rows % 4 if isinstance(dim, int) and 0 < dim < _random_bits.NARROW else 0
        samples = first * np.uint32(group_size) + lax.iota(jnp.uint32, rows + more)
        block = lambda: noise.from_bits(_random_bits.numbered(key, samples, dim, dtype))  # noqa: E731
        if not more:
            return block()
        return _random_bits.materialise(block, (rows + more, dim), dtype, key)[:rows]

    if isinstance(sampler, DigitalNet):
        # All at once, for vmap takes as long to trace as the net itself.
        keys = jax.vmap(partial(_random_bits.child, key))(groups)
        z = sampler.sample_groups(keys, noise, group_size, dim, dtype)
        return z.reshape(count * group_size, dim)

    def one(group: Array) -> Array:
        typed = jax.random.wrap_key_data(_random_bits.child(key, group), impl="threefry2x32")
        if group_size == 1 and isinstance(sampler, Independent):
            return noise.sample(typed, (dim,), dtype)[None].astype(dtype)
        return _sample_group(sampler, typed, noise, group_size, dim, dtype)

    return jax.vmap(one)(groups).reshape(count * group_size, dim)
