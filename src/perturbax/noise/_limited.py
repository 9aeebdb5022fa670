"""Laws whose densities have kinks or jumps: good for one derivative, or for values only."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from . import _inverse
from ._derivative_limit import Limit, limit_derivatives
from ._moments import even_moment
from ._protocol import Shape
from ._quantiles import at_least_single, mirror, two_sided

_LAPLACE = Limit("Laplace()", 1, "has a kink at 0, which the second derivative would miss")


@dataclasses.dataclass(frozen=True)
class Laplace:
    """Standard Laplace noise, density `exp(-|z|) / 2`; mean 0, variance 2.

    Good for **one** derivative: the density has a kink at 0. Second derivatives, in x and sigma
    together, raise `NotImplementedError`.

    Example:
      >>> import perturbax as px
      >>> float(px.Laplace().score(-0.25))
      -1.0
    """

    derivatives: ClassVar[float] = 1
    mean: ClassVar[float] = 0.0
    variance: ClassVar[float] = 2.0

    sample = _inverse.sample
    icdf = _inverse.icdf
    from_bits = _inverse.from_bits

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density `-|z| - log 2`, element by element."""
        return -jnp.abs(limit_derivatives(inputs, _LAPLACE)) - math.log(2)

    def score(self, inputs: ArrayLike) -> Array:
        """Score -d log p / dz = sign(z), element by element."""
        return jnp.sign(limit_derivatives(at_least_single(inputs), _LAPLACE, taken=1))

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function, element by element."""
        return two_sided(lambda z: jnp.exp(z) / 2, inputs)

    def moment(self, order: int) -> float:
        """E[z^order]: order! for even orders."""
        return even_moment(order, math.factorial)

    def from_tail(self, tail: Array, upper: Array) -> Array:
        """The draw whose probability is `tail` from 0 or, where `upper`, from 1."""
        return mirror(-jnp.log(2 * tail), upper)


_TRIANGULAR = Limit("Triangular()", 1, "has kinks at -1, 0 and 1, which second derivatives miss")


@dataclasses.dataclass(frozen=True)
class Triangular:
    """Triangular noise on (-1, 1), density `1 - |z|`; mean 0, variance 1/6.

    Good for **one** derivative: the density has kinks at -1, 0 and 1. Second derivatives, in x and
    sigma together, raise `NotImplementedError`. Gradients are unbiased but of **infinite
    variance**: the score `sign(z) / (1 - |z|)` grows without bound towards the ends, and now and
    then a draw near one of them outweighs all others. For a bounded range of evaluations only.

    Example:
      >>> import perturbax as px
      >>> float(px.Triangular().icdf(0.125))
      -0.5
    """

    derivatives: ClassVar[float] = 1
    mean: ClassVar[float] = 0.0
    variance: ClassVar[float] = 1 / 6
    support: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        z = _inverse.sample(self, key, sample_shape, dtype)
        # Rounding to half precision must not reach the ends, where the score is infinite.
        most = (1 - jnp.finfo(z.dtype).epsneg).astype(z.dtype)
        return jnp.clip(z, -most, most)

    icdf = _inverse.icdf
    from_bits = _inverse.from_bits

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density `log(1 - |z|)`, element by element; minus infinity outside (-1, 1)."""
        inputs = limit_derivatives(inputs, _TRIANGULAR)
        inside = jnp.abs(inputs) < 1
        magnitude = jnp.where(inside, jnp.abs(inputs), 0)
        return jnp.where(inside, jnp.log1p(-magnitude), -jnp.inf)

    def score(self, inputs: ArrayLike) -> Array:
        """Score `-d log p / dz = sign(z) / (1 - |z|)`, element by element; 0 outside (-1, 1)."""
        inputs = limit_derivatives(at_least_single(inputs), _TRIANGULAR, taken=1)
        inside = jnp.abs(inputs) < 1
        magnitude = jnp.where(inside, jnp.abs(inputs), 0)
        return jnp.where(inside, jnp.sign(inputs) / (1 - magnitude), 0)

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function, element by element."""
        return two_sided(lambda z: jnp.maximum(1 + z, 0) ** 2 / 2, inputs)

    def moment(self, order: int) -> float:
        """E[z^order]: 2 / ((order + 1) (order + 2)) for even orders."""
        return even_moment(order, lambda k: 2 / ((k + 1) * (k + 2)))

    def from_tail(self, tail: Array, upper: Array) -> Array:
        """The draw whose probability is `tail` from 0 or, where `upper`, from 1."""
        most = 1 - jnp.finfo(tail.dtype).epsneg
        return mirror(jnp.minimum(1 - jnp.sqrt(2 * tail), most), upper)


_UNIFORM = Limit(
    "Uniform()",
    0,
    "is flat between jumps at -1 and 1, so that its score says nothing",
    "; Triangular() also stays within (-1, 1), and is good for one derivative",
)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform noise on (-1, 1); mean 0, variance 1/3.

    Good for **values only**: the density is flat, its score 0, and the derivative of the smoothed
    function lies in what the score does not see, the jumps at the ends. Derivatives in x and sigma
    raise `NotImplementedError`; those in other arguments of the function are as usual.

    Example:
      >>> import perturbax as px
      >>> float(px.Uniform().icdf(0.25))
      -0.5
    """

    derivatives: ClassVar[float] = 0
    mean: ClassVar[float] = 0.0
    variance: ClassVar[float] = 1 / 3
    support: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    sample = _inverse.sample
    icdf = _inverse.icdf
    from_bits = _inverse.from_bits

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density -log 2, element by element; minus infinity outside [-1, 1]."""
        inputs = limit_derivatives(inputs, _UNIFORM)
        # In this form the density depends on the inputs, and a derivative meets the limit.
        outside = jnp.maximum(jnp.abs(inputs) - 1, 0)
        return jnp.where(outside > 0, -jnp.inf, -math.log(2) - outside)

    def score(self, inputs: ArrayLike) -> Array:
        """Raises: the score, 0 within [-1, 1], does not give the derivatives."""
        return limit_derivatives(at_least_single(inputs), _UNIFORM, taken=1)

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function, element by element."""
        return jnp.clip((1 + at_least_single(inputs)) / 2, 0, 1)

    def moment(self, order: int) -> float:
        """E[z^order]: 1 / (order + 1) for even orders."""
        return even_moment(order, lambda k: 1 / (k + 1))

    def from_tail(self, tail: Array, upper: Array) -> Array:
        """The draw whose probability is `tail` from 0 or, where `upper`, from 1."""
        return mirror(1 - 2 * tail, upper)
