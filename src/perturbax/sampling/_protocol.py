"""What a sampler is: how the noise of a group of samples is drawn together.

Inside a group samples may depend on each other in any way; each has exactly the law of the noise;
groups are independent of each other. That is all the estimator relies on.
"""

from typing import Protocol, runtime_checkable

import numpy as np
from jax import Array

from ..noise._protocol import NoiseDistribution

# A group is drawn as a whole; this bounds the memory that it takes.
MAX_GROUP = 2**13


@runtime_checkable
class Sampler(Protocol):
    """What an object must offer to draw noise in groups.

    It must be hashable, for it is a static part of the compiled program.

    More is used where it is there:

    - `sample_groups(key, first, count, noise, group_size, dim, dtype)`, noise of the groups first,
      ..., first + count - 1 in one array (count * group_size, dim), where that is faster than one
      by one. `key` is then two uint32 words for all groups, `first` an uint32 scalar; each group's
      noise must depend on the group's number, not on which others are drawn.
    - `needs_inverse = True`, if it draws through the noise's inverse distribution function, and
      `needs_dim = True`, if it cannot do with a symbolic number of coordinates: then what cannot
      work raises an error that says so.
    - `in_groups(num_samples, count)`, for a sampler that may group its samples at will: a sampler
      with the same samples in so many groups, where each group gets a surrogate. Of other samplers,
      several groups are taken as one.
    """

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group, when `num_samples` of `dim` coordinates are wanted in all."""
        ...

    def sample_group(
        self, key: Array, noise: NoiseDistribution, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim), each row with the law of `noise`.

        `key` is a Threefry key of the group's own; `dtype` is float32 or float64.
        """
        ...
