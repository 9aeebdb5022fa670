"""Orthogonal directions."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _checks
from ..noise._inverse import from_normal
from ..noise._protocol import NoiseDistribution
from ..noise._smooth import Normal
from . import _random_bits
from ._protocol import MAX_GROUP


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

    needs_inverse: ClassVar[bool] = True
    needs_dim: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks block and antithetic."""
        if self.block is not None:
            object.__setattr__(self, "block", _checks.check_count(self.block, "block"))
        pairs = _checks.check_bool(self.antithetic, "antithetic")
        object.__setattr__(self, "antithetic", pairs)

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        directions = min(dim, self.block or dim, MAX_GROUP)
        return min(num_samples, max(1, directions) * (2 if self.antithetic else 1))

    def sample_group(
        self, key: Array, noise: NoiseDistribution, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        if dim == 0:  # no directions to factorise
            return jnp.zeros((group_size, 0), dtype)
        rows = -(-group_size // 2) if self.antithetic else group_size
        gauss = Normal().from_bits(_random_bits.grid(jax.random.key_data(key), rows, dim, dtype))
        # Orthogonalisation sees the directions of the rows only, so their lengths are independent
        # of its result, and serve as the lengths that it takes away.
        q, triangle = jnp.linalg.qr(gauss.T)
        signs = jnp.where(jnp.diagonal(triangle) < 0, -1, 1).astype(dtype)
        z = (q * signs[None]).T * jnp.linalg.norm(gauss, axis=1, keepdims=True)
        if self.antithetic:
            z = jnp.concatenate([z, -z])[:group_size]
        return from_normal(noise, z)
