"""Several groups of a sampler taken as one."""

import dataclasses

import numpy as np
from jax import Array

from ..noise._protocol import NoiseDistribution
from ._draw_groups import sample_groups
from ._drawn_together import DrawnTogether
from ._protocol import Sampler


@dataclasses.dataclass(frozen=True)
class Merged(DrawnTogether):
    """Several groups of a sampler taken as one: fewer groups on whose others a surrogate is fitted.

    Attributes:
      sampler: draws them.
      count: how many make one.
    """

    sampler: Sampler
    count: int

    def __repr__(self) -> str:
        return f"<{self.sampler}, {self.count} of its groups as one>"

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        return self.count * self.sampler.group_size(num_samples, dim)

    def _draw(
        self,
        key: Array,
        numbers: Array,
        noise: NoiseDistribution,
        group_size: int,
        dim: int,
        dtype: np.dtype,
    ) -> Array:
        each, size = self.count, group_size // self.count
        first, count = numbers[0] * np.uint32(each), len(numbers) * each
        return sample_groups(noise, self.sampler, key, first, count, size, dim, dtype)
