"""What noise is: an object that draws and knows its log-density."""

from typing import Protocol, runtime_checkable

from jax import Array
from jax.typing import DTypeLike

Shape = tuple[int, ...]


@runtime_checkable
class NoiseDistribution(Protocol):
    """What an object must offer to serve as noise: independent draws and their log-density.

    The two methods are all that counts; no base class is needed. The density may leave out its
    normalising constant, since only its derivatives are used.

    More is used where it is there, and every noise of this library has it:

    - `derivatives`, the highest order for which the score-function method is right: infinity for a
      smooth density, 1 for one with kinks, 0 for one with jumps. Higher orders raise
      `NotImplementedError`. Where the attribute is missing, what the operations of `log_prob` give
      away is taken, else infinity.
    - `from_bits(bits)`, the draw that uniform words stand for, increasing in the words; or
      `icdf(u)`, the inverse of the distribution function: what quasi-random samplers need.
    - `mean` and `variance`, numbers: what surrogates need in closed form.

    `check_noise` measures whether a noise is what it should be.
    """

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`."""
        ...

    def log_prob(self, inputs: Array) -> Array:
        """Logarithm of the density at each element of `inputs`, up to a constant."""
        ...
