"""Laws whose densities are smooth on the whole line: good for derivatives of every order."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .._checks import check_number
from . import _inverse, _quantiles
from ._moments import check_order, even_moment, zeta
from ._quantiles import at_least_single, mirror, two_sided

# Of Student's law: where quantiles have lost hardly any digits yet, and from where on a Normal
# variable, to one part in 10^5 at 6 standard deviations, serves better than what rounds to 1.
_MOST_DEGREES, _NEARLY_NORMAL = 1e12, 2_000


@dataclasses.dataclass(frozen=True)
class Gumbel:
    """Standard Gumbel noise (of maxima), density exp(-z - exp(-z)).

    Mean 0.5772 (Euler's constant), variance pi^2 / 6; smooth.

    Example:
      >>> import perturbax as px
      >>> float(px.Gumbel().log_prob(0.0))
      -1.0
    """

    derivatives: ClassVar[float] = math.inf
    mean: ClassVar[float] = float(np.euler_gamma)
    variance: ClassVar[float] = math.pi**2 / 6

    sample = _inverse.sample
    icdf = _inverse.icdf
    from_bits = _inverse.from_bits

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density -z - exp(-z), element by element."""
        inputs = jnp.asarray(inputs)
        return -inputs - jnp.exp(-inputs)

    def score(self, inputs: ArrayLike) -> Array:
        """Score -d log p / dz = 1 - exp(-z), element by element."""
        return -jnp.expm1(-at_least_single(inputs))

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function exp(-exp(-z)), element by element."""
        return jnp.exp(-jnp.exp(-at_least_single(inputs)))

    def moment(self, order: int) -> float:
        """E[z^order], from the cumulants: Euler's constant, then (k - 1)! zeta(k)."""
        check_order(order)
        moments = [1.0]
        for k in range(1, order + 1):
            terms = (
                math.comb(k - 1, j - 1) * _gumbel_cumulant(j) * moments[k - j]
                for j in range(1, k + 1)
            )
            moments.append(math.fsum(terms))
        return moments[order]

    def from_tail(self, tail: Array, upper: Array) -> Array:
        """The draw whose probability is `tail` from 0 or, where `upper`, from 1."""
        return _quantiles.gumbel(tail, upper)

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for, increasing in them."""
        return _quantiles.gumbel_from_normal(at_least_single(z))


def _gumbel_cumulant(k: int) -> float:
    return float(np.euler_gamma) if k == 1 else math.factorial(k - 1) * zeta(k)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Standard normal noise, mean 0 and variance 1; smooth.

    Example:
      >>> import perturbax as px
      >>> float(px.Normal().log_prob(2.0))
      -2.0
    """

    derivatives: ClassVar[float] = math.inf
    mean: ClassVar[float] = 0.0
    variance: ClassVar[float] = 1.0

    sample = _inverse.sample
    icdf = _inverse.icdf
    from_bits = _inverse.from_bits

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density -z^2 / 2 up to its constant, element by element."""
        inputs = jnp.asarray(inputs)
        return -0.5 * inputs**2

    def score(self, inputs: ArrayLike) -> Array:
        """Score -d log p / dz = z, element by element."""
        return at_least_single(inputs)

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function Phi(z), element by element."""
        return jax.scipy.special.ndtr(at_least_single(inputs))

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for: themselves."""
        return at_least_single(z)

    def moment(self, order: int) -> float:
        """E[z^order]: 1 * 3 * ... * (order - 1) for even orders."""
        return even_moment(order, lambda k: math.prod(range(1, k, 2)))

    def from_tail(self, tail: Array, upper: Array) -> Array:
        """The draw whose probability is `tail` from 0 or, where `upper`, from 1."""
        return mirror(_quantiles.normal(tail), upper)


@dataclasses.dataclass(frozen=True)
class Logistic:
    """Standard logistic noise, density 1 / (4 cosh(z / 2)^2); mean 0, variance pi^2 / 3; smooth.

    Its score lies between -1 and 1, and a step smoothed by it is the sigmoid function.

    Example:
      >>> import perturbax as px
      >>> float(px.Logistic().cdf(0.0))
      0.5
    """

    derivatives: ClassVar[float] = math.inf
    mean: ClassVar[float] = 0.0
    variance: ClassVar[float] = math.pi**2 / 3

    sample = _inverse.sample
    icdf = _inverse.icdf
    from_bits = _inverse.from_bits

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density -z - 2 log(1 + exp(-z)), element by element."""
        inputs = jnp.asarray(inputs)
        return -inputs - 2 * jax.nn.softplus(-inputs)

    def score(self, inputs: ArrayLike) -> Array:
        """Score -d log p / dz = tanh(z / 2), element by element."""
        return jnp.tanh(at_least_single(inputs) / 2)

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function 1 / (1 + exp(-z)), element by element."""
        return jax.nn.sigmoid(at_least_single(inputs))

    def moment(self, order: int) -> float:
        """E[z^order]: 2 order! (1 - 2^(1 - order)) zeta(order) for even orders, from 2 on."""
        check_order(order)
        if order == 0:
            return 1.0
        return even_moment(order, lambda k: 2 * math.factorial(k) * (1 - 2.0 ** (1 - k)) * zeta(k))

    def from_tail(self, tail: Array, upper: Array) -> Array:
        """The draw whose probability is `tail` from 0 or, where `upper`, from 1."""
        return mirror(jnp.log((1 - tail) / tail), upper)


@dataclasses.dataclass(frozen=True)
class Cauchy:
    """Standard Cauchy noise, density 1 / (pi (1 + z^2)); neither mean nor variance; smooth.

    For bounded functions: the value of an unbounded one need not exist.

    Example:
      >>> import perturbax as px
      >>> float(px.Cauchy().score(1.0))
      1.0
    """

    derivatives: ClassVar[float] = math.inf
    mean: ClassVar[float] = math.nan
    variance: ClassVar[float] = math.nan

    sample = _inverse.sample
    icdf = _inverse.icdf
    from_bits = _inverse.from_bits

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density -log(1 + z^2) - log pi, element by element."""
        inputs = jnp.asarray(inputs)
        return -jnp.log1p(inputs**2) - math.log(math.pi)

    def score(self, inputs: ArrayLike) -> Array:
        """Score -d log p / dz = 2 z / (1 + z^2), element by element."""
        inputs = at_least_single(inputs)
        return 2 * inputs / (1 + inputs**2)

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function 1/2 + arctan(z) / pi, element by element."""
        inputs = at_least_single(inputs)
        return jnp.arctan2(jnp.ones_like(inputs), -inputs) / math.pi

    def moment(self, order: int) -> float:
        """E[z^order]: infinite for even orders from 2 on, NaN for odd ones."""
        check_order(order)
        return 1.0 if order == 0 else (math.nan if order % 2 else math.inf)

    def from_tail(self, tail: Array, upper: Array) -> Array:
        """The draw whose probability is `tail` from 0 or, where `upper`, from 1."""
        return mirror(_quantiles.cauchy(tail), upper)


@dataclasses.dataclass(frozen=True)
class StudentT:
    """Student's noise with `df` degrees of freedom, density (1 + z^2 / df)^(-(df + 1) / 2).

    Mean 0 where df > 1, variance df / (df - 2) where df > 2; smooth. Between Cauchy (df = 1) and
    Normal (df infinite): moments of order df and above do not exist.

    Attributes:
      df: degrees of freedom, a Python number from 1 to 1e12.

    Raises:
      TypeError: if df is not a number known in advance.
      ValueError: if df is below 1, or above 1e12, where quantiles lose digits.

    Example:
      >>> import perturbax as px
      >>> px.StudentT(5).variance
      1.6666666666666667
    """

    df: float

    derivatives: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        """Checks df."""
        df = check_number(self.df, "df")
        if not 1 <= df <= _MOST_DEGREES:
            raise ValueError(
                f"df must be from 1 to {_MOST_DEGREES:g}, got {self.df}; "
                "Normal() is the limit of many degrees of freedom"
            )
        object.__setattr__(self, "df", df)

    @property
    def mean(self) -> float:
        """0, or NaN where df is 1."""
        return self.moment(1)

    @property
    def variance(self) -> float:
        """df / (df - 2) where df > 2; NaN where df is 1, else infinite."""
        return self.df / (self.df - 2) if self.df > 2 else math.inf - abs(self.mean)

    sample = _inverse.sample
    icdf = _inverse.icdf
    from_bits = _inverse.from_bits

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density -(df + 1) / 2 log(1 + z^2 / df) up to its constant, element by element."""
        inputs = jnp.asarray(inputs)
        return -(self.df + 1) / 2 * jnp.log1p(inputs**2 / self.df)

    def score(self, inputs: ArrayLike) -> Array:
        """Score -d log p / dz = (df + 1) z / (df + z^2), element by element."""
        inputs = at_least_single(inputs)
        return (self.df + 1) * inputs / (self.df + inputs**2)

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function, by the incomplete beta function, element by element.

        Of many degrees of freedom by a Normal variable, for that function's argument nears 1.

        References:
          Wallace, Bounds on Normal Approximations to Student's and the Chi-Square Distributions,
          1959
        """

        def lower_tail(z: Array) -> Array:
            if self.df > _NEARLY_NORMAL:
                square = self.df * jnp.log1p(z**2 / self.df)
                return jax.scipy.special.ndtr(-jnp.sqrt(square) * (1 - 2 / (8 * self.df + 3)))
            half = jnp.full_like(z, 0.5)
            share = self.df / (self.df + z**2)
            return jax.scipy.special.betainc(half * self.df, half, share) / 2

        return two_sided(lower_tail, inputs)

    def moment(self, order: int) -> float:
        """E[z^order]: where order >= df, infinite for even orders and NaN for odd ones."""
        check_order(order)
        if order == 0:
            return 1.0
        if order >= self.df:
            return math.nan if order % 2 else math.inf
        # E[z^2] = df / (df - 2); each step by 2 multiplies by (k - 1) df / (df - k).
        factors = ((k - 1) * self.df / (self.df - k) for k in range(2, order + 1, 2))
        return 0.0 if order % 2 else math.prod(factors)

    def from_tail(self, tail: Array, upper: Array) -> Array:
        """The draw whose probability is `tail` from 0 or, where `upper`, from 1."""
        return mirror(_quantiles.student_t(tail, self.df), upper)
