"""Several groups of a sampler taken as one."""

import dataclasses

import jax
import numpy as np
from jax import Array

from ..noise._protocol import NoiseDistribution
from ._draw_groups import sample_group
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
        self, key: Array, noise: NoiseDistribution, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        size = group_size // self.count

        def part(key: Array) -> Array:
            return sample_group(self.sampler, key, noise, size, dim, dtype)

        return jax.vmap(part)(jax.random.split(key, self.count)).reshape(group_size, dim)
