"""Independent samples, and pairs of opposite ones."""

import copy
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import _checks
from ..noise._inverse import from_words
from ..noise._protocol import NoiseDistribution
from ._drawn_together import DrawnTogether
from ._random_bits import (
    MANY,
    NARROW,
    child,
    grid,
    group_numbers,
    kept_words,
    materialise,
    numbered,
)


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

    def in_groups(self, num_samples: int, count: int) -> "Independent":
        """The same samples in so many groups, unless `block` says how many make one."""
        if self.block > 1:
            return self
        grouped = copy.copy(self)  # of a user's class, too, whatever that is made of
        object.__setattr__(grouped, "block", -(-num_samples // count))
        return grouped

    def sample_group(
        self, key: Array, noise: NoiseDistribution, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        if not hasattr(noise, "from_bits"):
            one = lambda k: noise.sample(k, (dim,), dtype)  # noqa: E731
            return jax.vmap(one)(jax.random.split(key, group_size)).astype(dtype)
        return from_words(noise, grid(jax.random.key_data(key), group_size, dim, dtype))

    def sample_groups(
        self,
        key: Array,
        first: Array,
        count: int,
        noise: NoiseDistribution,
        group_size: int,
        dim: int,
        dtype: np.dtype,
    ) -> Array:
        """Noise of several groups, shape (count * group_size, dim)."""
        rows = count * group_size
        if not hasattr(noise, "from_bits"):

            def one(key: Array) -> Array:
                typed = jax.random.wrap_key_data(key, impl="threefry2x32")
                if group_size == 1:
                    return noise.sample(typed, (dim,), dtype)[None].astype(dtype)
                return self.sample_group(typed, noise, group_size, dim, dtype)

            keys = child(key, group_numbers(first, count))
            draw = lambda: jax.vmap(one)(keys).reshape(rows, dim)  # noqa: E731
            return materialise(draw, (rows, dim), dtype, key)

        # XLA makes no vector instructions of a number of elements that four do not divide.
        more = -rows % 4 if isinstance(dim, int) and 0 < dim < NARROW else 0
        samples = first * np.uint32(group_size) + lax.iota(jnp.uint32, rows + more)
        # Many words apart from what makes noise of them: both in one loop take up to twice as long.
        words = kept_words if isinstance(dim, int) and rows * dim > MANY else numbered
        block = lambda: from_words(noise, words(key, samples, dim, dtype))  # noqa: E731
        z = materialise(block, (rows + more, dim), dtype, key)
        return z[:rows]


@dataclasses.dataclass(frozen=True)
class Antithetic(DrawnTogether):
    """Pairs of opposite samples: z and -z for a symmetric law, opposite quantiles for any other.

    For symmetric noise, what is odd about x cancels from the value and what is even from the
    gradient; what remains has twice the variance of independent samples. So it is good for values
    of nearly linear functions and, with `degree=1`, which takes the linear part out, for gradients
    of smooth ones; of degree 0 it is worse than `Independent()` for gradients of the former.
    """

    needs_inverse: ClassVar[bool] = True

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group: two."""
        del dim
        return min(2, num_samples)

    def _draw(
        self,
        key: Array,
        numbers: Array,
        noise: NoiseDistribution,
        group_size: int,
        dim: int,
        dtype: np.dtype,
    ) -> Array:
        shape = len(numbers) * group_size, dim
        few = isinstance(dim, int) and len(numbers) * dim <= MANY
        # Read twice, hence apart from what is made of them: before it; or in it, so that many do
        # not take memory for longer.
        bits = numbered(key, numbers, dim, dtype) if few else None

        def pairs() -> Array:
            found = kept_words(key, numbers, dim, dtype) if bits is None else bits
            both = jnp.stack([found, ~found], axis=1)[:, :group_size]
            return from_words(noise, both).reshape(shape)

        return materialise(pairs, shape, dtype, key)
