"""Noise distributions: how to draw them, and the logarithm of their density."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from . import _quantiles
from ._derivative_limit import Limit, limit_derivatives
from ._quantiles import at_least_single, mirror

Shape = tuple[int, ...]


@runtime_checkable
class NoiseDistribution(Protocol):
    """What an object must offer to serve as noise: independent draws and their log-density.

    The two methods are all that counts; no base class is needed. The density may leave out its
    normalising constant, since only its derivatives are used.

    More is used where it is there, and every noise of this library has it:

    - `derivatives`, how many derivatives the score-function method is right for: as many as the
      density has kinds of smoothness (infinity for a smooth one, 1 for one with kinks, 0 for one
      with jumps). More than that raise `NotImplementedError`. Where the attribute is missing, what
      the operations of `log_prob` give away is taken, else infinity.
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


def is_invertible(noise: Any) -> bool:
    """Whether the noise has an inverse distribution function, under either of its names."""
    return hasattr(noise, "from_bits") or hasattr(noise, "icdf")


def from_words(noise: Any, bits: Array) -> Array:
    """The draws that uniform words stand for, by the `from_bits` or the `icdf` of any noise."""
    if hasattr(noise, "from_bits"):
        return noise.from_bits(bits)
    tail, upper = _quantiles.from_bits(bits)
    below_one = 1 - jnp.finfo(tail.dtype).epsneg
    return noise.icdf(jnp.where(upper, jnp.minimum(1 - tail, below_one), tail))


def from_normal(noise: Any, z: Array) -> Array:
    """The draws that standard normal numbers stand for, increasing in them, for any noise.

    By the noise's own `from_normal`, if it has one, else by its `icdf`.
    """
    if hasattr(noise, "from_normal"):
        return noise.from_normal(z)
    tail, upper = _quantiles.from_normal(z)
    below_one = 1 - jnp.finfo(tail.dtype).epsneg
    return noise.icdf(jnp.where(upper, jnp.minimum(1 - tail, below_one), tail))


def _draw(noise: Any, key: Array, sample_shape: Shape, dtype: DTypeLike) -> Array:
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {dtype}")
    # Half precision holds too few values to be drawn directly: 128 of them bias the score.
    wide = dtype if dtype.itemsize >= 4 else np.dtype("float32")
    bits = jax.random.bits(key, sample_shape, jnp.uint64 if wide.itemsize == 8 else jnp.uint32)
    return noise.from_bits(bits).astype(dtype)


def _icdf(quantile: Any, u: ArrayLike, low: float = -math.inf, high: float = math.inf) -> Array:
    """`quantile` of the probabilities u: the ends of the support at 0 and 1, NaN beyond."""
    u = at_least_single(u)
    inside = (u > 0) & (u < 1)
    ends = jnp.where(u == 0, low, jnp.where(u == 1, high, jnp.nan)).astype(u.dtype)
    return jnp.where(
        inside, quantile(*_quantiles.from_probability(jnp.where(inside, u, 0.5))), ends
    )


def _two_sided(lower_tail: Any, z: ArrayLike) -> Array:
    """The distribution function of a symmetric law, from that at -|z|."""
    z = at_least_single(z)
    tail = lower_tail(-jnp.abs(z))
    return jnp.where(z > 0, 1 - tail, tail)


def _even(order: int, moment: Callable[[int], float]) -> float:
    """A moment of a symmetric law, whose even ones are `moment(order)`."""
    _check_order(order)
    return 0.0 if order % 2 else float(moment(order))


def _check_order(order: int) -> None:
    if not isinstance(order, int) or order < 0:
        raise ValueError(f"order must be an int >= 0, got {order!r}")


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

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        return _draw(self, key, sample_shape, dtype)

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

    def icdf(self, u: ArrayLike) -> Array:
        """Inverse of the distribution function, -log(-log u), element by element."""
        return _icdf(_quantiles.gumbel, u)

    def from_bits(self, bits: Array) -> Array:
        """The draw that uniform words (uint32 or uint64) stand for, increasing in the words."""
        return _quantiles.gumbel(*_quantiles.from_bits(bits))

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for, increasing in them."""
        return _quantiles.gumbel(*_quantiles.from_normal(z))

    def moment(self, order: int) -> float:
        """E[z^order], from the cumulants: Euler's constant, then (k - 1)! zeta(k)."""
        _check_order(order)
        moments = [1.0]
        for k in range(1, order + 1):
            terms = (
                math.comb(k - 1, j - 1) * _gumbel_cumulant(j) * moments[k - j]
                for j in range(1, k + 1)
            )
            moments.append(math.fsum(terms))
        return moments[order]


def _gumbel_cumulant(k: int) -> float:
    return float(np.euler_gamma) if k == 1 else math.factorial(k - 1) * _zeta(k)


def _zeta(k: int) -> float:
    """Riemann's zeta function at k >= 2, by Euler's and Maclaurin's formula."""
    n = 20
    head = math.fsum(i**-k for i in range(1, n))
    tail = n ** (1 - k) / (k - 1) + n**-k / 2 + k * n ** (-k - 1) / 12
    tail -= k * (k + 1) * (k + 2) * n ** (-k - 3) / 720
    return head + tail + math.prod(range(k, k + 5)) * n ** (-k - 5) / 30240


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

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        return _draw(self, key, sample_shape, dtype)

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

    def icdf(self, u: ArrayLike) -> Array:
        """Inverse of the distribution function, element by element."""
        return _icdf(self._quantile, u)

    def from_bits(self, bits: Array) -> Array:
        """The draw that uniform words (uint32 or uint64) stand for, increasing in the words."""
        return self._quantile(*_quantiles.from_bits(bits))

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for: themselves."""
        return at_least_single(z)

    def moment(self, order: int) -> float:
        """E[z^order]: 1 * 3 * ... * (order - 1) for even orders."""
        return _even(order, lambda k: math.prod(range(1, k, 2)))

    def _quantile(self, tail: Array, upper: Array) -> Array:
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

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        return _draw(self, key, sample_shape, dtype)

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

    def icdf(self, u: ArrayLike) -> Array:
        """Inverse of the distribution function, log(u / (1 - u)), element by element."""
        return _icdf(self._quantile, u)

    def from_bits(self, bits: Array) -> Array:
        """The draw that uniform words (uint32 or uint64) stand for, increasing in the words."""
        return self._quantile(*_quantiles.from_bits(bits))

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for, increasing in them."""
        return self._quantile(*_quantiles.from_normal(z))

    def moment(self, order: int) -> float:
        """E[z^order]: 2 order! (1 - 2^(1 - order)) zeta(order) for even orders, from 2 on."""
        _check_order(order)
        if order == 0:
            return 1.0
        return _even(order, lambda k: 2 * math.factorial(k) * (1 - 2.0 ** (1 - k)) * _zeta(k))

    def _quantile(self, tail: Array, upper: Array) -> Array:
        return mirror(jnp.log((1 - tail) / tail), upper)


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

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        return _draw(self, key, sample_shape, dtype)

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density `-|z| - log 2`, element by element."""
        return -jnp.abs(limit_derivatives(inputs, _LAPLACE)) - math.log(2)

    def score(self, inputs: ArrayLike) -> Array:
        """Score -d log p / dz = sign(z), element by element."""
        return jnp.sign(limit_derivatives(at_least_single(inputs), _LAPLACE, taken=1))

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function, element by element."""
        return _two_sided(lambda z: jnp.exp(z) / 2, inputs)

    def icdf(self, u: ArrayLike) -> Array:
        """Inverse of the distribution function, element by element."""
        return _icdf(self._quantile, u)

    def from_bits(self, bits: Array) -> Array:
        """The draw that uniform words (uint32 or uint64) stand for, increasing in the words."""
        return self._quantile(*_quantiles.from_bits(bits))

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for, increasing in them."""
        return self._quantile(*_quantiles.from_normal(z))

    def moment(self, order: int) -> float:
        """E[z^order]: order! for even orders."""
        return _even(order, math.factorial)

    def _quantile(self, tail: Array, upper: Array) -> Array:
        return mirror(-jnp.log(2 * tail), upper)


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

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        return _draw(self, key, sample_shape, dtype)

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

    def icdf(self, u: ArrayLike) -> Array:
        """Inverse of the distribution function, -cot(pi u), element by element."""
        return _icdf(self._quantile, u)

    def from_bits(self, bits: Array) -> Array:
        """The draw that uniform words (uint32 or uint64) stand for, increasing in the words."""
        return self._quantile(*_quantiles.from_bits(bits))

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for, increasing in them."""
        return self._quantile(*_quantiles.from_normal(z))

    def moment(self, order: int) -> float:
        """E[z^order]: infinite for even orders from 2 on, NaN for odd ones."""
        _check_order(order)
        return 1.0 if order == 0 else (math.nan if order % 2 else math.inf)

    def _quantile(self, tail: Array, upper: Array) -> Array:
        return mirror(_quantiles.cauchy(tail), upper)


@dataclasses.dataclass(frozen=True)
class StudentT:
    """Student's noise with `df` degrees of freedom, density (1 + z^2 / df)^(-(df + 1) / 2).

    Mean 0 where df > 1, variance df / (df - 2) where df > 2; smooth. Between Cauchy (df = 1) and
    Normal (df infinite): moments of order df and above do not exist.

    Attributes:
      df: degrees of freedom, a Python number of at least 1.

    Raises:
      TypeError: if df is not a number known in advance.
      ValueError: if df is below 1 or infinite.

    Example:
      >>> import perturbax as px
      >>> px.StudentT(5).variance
      1.6666666666666667
    """

    df: float

    derivatives: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        """Checks df."""
        if isinstance(self.df, bool) or not isinstance(self.df, int | float | np.number):
            raise TypeError(f"df must be a Python number, got {type(self.df).__name__}")
        if not 1 <= self.df < math.inf:
            raise ValueError(
                f"df must be at least 1 and finite, got {self.df}; "
                "Normal() is the limit of many degrees of freedom"
            )
        object.__setattr__(self, "df", float(self.df))

    @property
    def mean(self) -> float:
        """0, or NaN where df is 1."""
        return self.moment(1)

    @property
    def variance(self) -> float:
        """df / (df - 2) where df > 2; NaN where df is 1, else infinite."""
        return self.df / (self.df - 2) if self.df > 2 else math.inf - abs(self.mean)

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        return _draw(self, key, sample_shape, dtype)

    def log_prob(self, inputs: ArrayLike) -> Array:
        """Log-density -(df + 1) / 2 log(1 + z^2 / df) up to its constant, element by element."""
        inputs = jnp.asarray(inputs)
        return -(self.df + 1) / 2 * jnp.log1p(inputs**2 / self.df)

    def score(self, inputs: ArrayLike) -> Array:
        """Score -d log p / dz = (df + 1) z / (df + z^2), element by element."""
        inputs = at_least_single(inputs)
        return (self.df + 1) * inputs / (self.df + inputs**2)

    def cdf(self, inputs: ArrayLike) -> Array:
        """Distribution function, by the incomplete beta function, element by element."""

        def lower_tail(z: Array) -> Array:
            half = jnp.full_like(z, 0.5)
            share = self.df / (self.df + z**2)
            return jax.scipy.special.betainc(half * self.df, half, share) / 2

        return _two_sided(lower_tail, inputs)

    def icdf(self, u: ArrayLike) -> Array:
        """Inverse of the distribution function, element by element."""
        return _icdf(self._quantile, u)

    def from_bits(self, bits: Array) -> Array:
        """The draw that uniform words (uint32 or uint64) stand for, increasing in the words."""
        return self._quantile(*_quantiles.from_bits(bits))

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for, increasing in them."""
        return self._quantile(*_quantiles.from_normal(z))

    def moment(self, order: int) -> float:
        """E[z^order]: where order >= df, infinite for even orders and NaN for odd ones."""
        _check_order(order)
        if order == 0:
            return 1.0
        if order >= self.df:
            return math.nan if order % 2 else math.inf
        # E[z^2] = df / (df - 2); each step by 2 multiplies by (k - 1) df / (df - k).
        factors = ((k - 1) * self.df / (self.df - k) for k in range(2, order + 1, 2))
        return 0.0 if order % 2 else math.prod(factors)

    def _quantile(self, tail: Array, upper: Array) -> Array:
        return mirror(_quantiles.student_t(tail, self.df), upper)


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

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        z = _draw(self, key, sample_shape, dtype)
        # Rounding to half precision must not reach the ends, where the score is infinite.
        most = (1 - jnp.finfo(z.dtype).epsneg).astype(z.dtype)
        return jnp.clip(z, -most, most)

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
        return _two_sided(lambda z: jnp.maximum(1 + z, 0) ** 2 / 2, inputs)

    def icdf(self, u: ArrayLike) -> Array:
        """Inverse of the distribution function, element by element."""
        return _icdf(self._quantile, u, -1, 1)

    def from_bits(self, bits: Array) -> Array:
        """The draw that uniform words (uint32 or uint64) stand for, increasing in the words."""
        return self._quantile(*_quantiles.from_bits(bits))

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for, increasing in them."""
        return self._quantile(*_quantiles.from_normal(z))

    def moment(self, order: int) -> float:
        """E[z^order]: 2 / ((order + 1) (order + 2)) for even orders."""
        return _even(order, lambda k: 2 / ((k + 1) * (k + 2)))

    def _quantile(self, tail: Array, upper: Array) -> Array:
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

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        return _draw(self, key, sample_shape, dtype)

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

    def icdf(self, u: ArrayLike) -> Array:
        """Inverse of the distribution function, 2 u - 1, element by element."""
        return _icdf(self._quantile, u, -1, 1)

    def from_bits(self, bits: Array) -> Array:
        """The draw that uniform words (uint32 or uint64) stand for, increasing in the words."""
        return self._quantile(*_quantiles.from_bits(bits))

    def from_normal(self, z: ArrayLike) -> Array:
        """The draw that standard normal numbers stand for, increasing in them."""
        return self._quantile(*_quantiles.from_normal(z))

    def moment(self, order: int) -> float:
        """E[z^order]: 1 / (order + 1) for even orders."""
        return _even(order, lambda k: 1 / (k + 1))

    def _quantile(self, tail: Array, upper: Array) -> Array:
        return mirror(1 - 2 * tail, upper)
