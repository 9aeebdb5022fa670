"""What samplers of this library have in common that draw one group as they draw several."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..noise._protocol import NoiseDistribution
from ._random_bits import group_numbers


class DrawnTogether:
    """A sampler that draws groups by their numbers, at once."""

    def sample_group(
        self, key: Array, noise: NoiseDistribution, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        words = jax.random.key_data(key)
        # Not by `sample_groups`, which a class made of this one may define by this method.
        return DrawnTogether.sample_groups(
            self, words, jnp.uint32(0), 1, noise, group_size, dim, dtype
        )

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
        if dim == 0:
            return jnp.zeros((count * group_size, 0), dtype)
        return self._draw(key, group_numbers(first, count), noise, group_size, dim, dtype)

    def _draw(
        self,
        key: Array,
        numbers: Array,
        noise: NoiseDistribution,
        group_size: int,
        dim: int,
        dtype: np.dtype,
    ) -> Array:
        """Noise of the groups of these numbers in a row, each number once: see `materialise`."""
        raise NotImplementedError
