"""Implicit maximum likelihood estimation: a gradient from a second, better set of scores."""

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from .. import _checks, _leaves
from .._call import Settings, evaluate, prepare
from .._describe import describe, leading, remembered
from .._types import Fun, PyTree
from ..noise._derivative_limit import Limit, limit_derivatives
from ..noise._protocol import NoiseDistribution, Shape
from ..noise._smooth import Gumbel
from ..sampling._protocol import Sampler
from ..tracing._derivative_rules import aligned, without_derivatives
from ..tracing._host_exceptions import called
from ..tracing._signature import TracedFunction, trace
from ._perturbed_scores import same_shapes, score_leaves


@remembered
def make_implicit_mle(
    argmax_fun: Fun,
    num_samples: int = 10,
    sigma: PyTree = 1.0,
    noise: NoiseDistribution = Gumbel(),
    *,
    lam: float = 10.0,
    alpha: float = 1.0,
    two_sided: bool = False,
    maximize: bool = True,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    mesh: Mesh | None = None,
) -> Fun:
    r"""A perturbed argmax whose gradient is a difference of two mean solutions.

    Forward, the value is that of `make_perturbed_argmax`. Backward, the cotangent dL/dy moves the
    scores towards a target with a lower loss, and the gradient is

    .. math:: \frac{\partial L}{\partial \theta} \approx \frac{1}{\lambda} \left( \bar y(\theta)
        - \bar y\left(\alpha \theta - \lambda \frac{\partial L}{\partial y}\right)\right),
        \quad \bar y(\theta) = \frac{1}{N} \sum_i y^*(\theta + \sigma Z_i)

    with the same noise in both means. It needs no density of the noise, and has a small variance
    where lam is large, at the price of a bias: with alpha = 1 it is a difference quotient of the
    mean solution, and tends to the gradient of `make_perturbed_argmax` as lam goes to 0.

    Args:
      argmax_fun: the solver, as in `make_perturbed_argmax`.
      num_samples: how many problems are solved for a value, and again for a gradient.
      sigma: scale of the noise, as in `make_perturbed_fun`.
      noise: law of the noise, an object with the methods of `NoiseDistribution`; `SumOfGamma` is
        made for solutions with a fixed number of ones.
      lam: length of the step to the target, lambda in the formula, > 0. May be traced.
      alpha: weight of the scores themselves in the target, a finite number. With 0 the target is
        the step alone: the solution that is best for L to first order, whatever the scores.
        Infinite scores stay what they are. May be traced.
      two_sided: take the central difference, of alpha theta + lam dL/dy and alpha theta - lam dL/dy
        over 2 lam: twice the solutions, and a bias of higher order in lam.
      maximize: False for a solver that minimises costs theta; the solver sees theta - sigma Z, and
        the target steps the other way: alpha theta + lam dL/dy, whose solutions less those of theta
        are the gradient, times lam.
      batch_size: as in `make_perturbed_fun`.
      sampler: as in `make_perturbed_fun`.
      mesh: as in `make_perturbed_fun`.

    Returns:
      A function `g(key, theta, *args, **kwargs)` that returns the mean solution. Reverse mode of
      first order only, in theta; in sigma and further arguments it is that of
      `make_perturbed_fun`. `key` is one PRNG key; it is consumed.

    Raises:
      TypeError: at construction or call, where an argument is not of the kind described.
      ValueError: where lam is not positive and finite, or alpha not finite, where argmax_fun
        returns another shape than that of theta, and as in `make_perturbed_fun`. A traced lam that
        is not > 0 gives NaN.
      NotImplementedError: where a derivative of second order is asked for; in forward mode, as by
        `jax.hessian`, JAX's own TypeError for a custom_vjp.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> top = lambda theta: px.solvers.top_k_mask(theta, 2)
      >>> choose = px.make_implicit_mle(top, 100, noise=px.SumOfGamma(2), lam=1.0)
      >>> loss = lambda key, theta: jnp.sum((choose(key, theta) - jnp.array([1, 1, 0, 0.0])) ** 2)
      >>> print(jnp.sign(jax.grad(loss, argnums=1)(jax.random.key(0), jnp.zeros(4))))
      [-1. -1.  1.  1.]

    References:
      - Niepert, Minervini and Franceschi, Implicit MLE: Backpropagating Through Discrete
        Exponential Family Distributions, 2021, arXiv:2106.01798
      - Minervini, Franceschi and Niepert, Adaptive Perturbation-Based Gradient Estimation for
        Discrete Latent Variable Models, 2022, arXiv:2209.04862 (1 / lambda, and the two-sided form)
    """
    _checks.check_fun(argmax_fun, "argmax_fun")
    lam = _check_number(lam, "lam", "positive ", 0)
    alpha = _check_number(alpha, "alpha")
    two_sided = _checks.check_bool(two_sided, "two_sided")
    maximize = _checks.check_bool(maximize, "maximize")
    sign = 1 if maximize else -1

    # With a baseline, should sigma or a further argument be differentiated.
    settings = Settings(
        num_samples=num_samples,
        sigma=sigma,
        noise=noise,
        batch_size=batch_size,
        sampler=sampler,
        degree=0,
        mesh=mesh,
    )

    def implicit_mle(*args: Any, **kwargs: Any) -> PyTree:
        key, theta, *rest = leading(("key", "theta"), args, kwargs)
        key = _checks.check_key(key, theta)
        leaves, _, tree = score_leaves(theta)

        def solve(scores: PyTree) -> Any:
            scores = jax.tree.map(lambda v: sign * v, scores)
            y = argmax_fun(scores, *rest, **kwargs)
            y = same_shapes("the result of argmax_fun", y, scores)
            return jax.tree.unflatten(tree, y)

        def mean(key: Array, *scores: Array) -> Any:
            return evaluate(prepare(settings, solve, key, jax.tree.unflatten(tree, scores)))

        traced, operands = trace(mean, key, *leaves)
        scores = [sign * v for v in leaves]
        value = called(traced.hosts, traced, operands, key, *lax.stop_gradient(scores))
        fixed = lax.stop_gradient((value, operands, jnp.asarray(lam, _leaves.noise_dtype(value))))
        # The target steps from alpha theta, but the gradient is one in theta.
        start = [v + lax.stop_gradient(_scaled(v, alpha - 1)) for v in scores]
        change: Any = _zeros(traced, two_sided, start, *fixed, jax.random.clone(key))
        return jax.tree.unflatten(tree, [v + c for v, c in zip(value, change, strict=True)])

    does = f"Estimates E[{{name}}(theta + sigma Z)] by the mean of {num_samples} solutions."
    describe(
        implicit_mle, "implicit_mle_of", argmax_fun, ("key", "theta"), "make_implicit_mle", does
    )
    return implicit_mle


def _check_number(value: Any, name: str, kind: str = "", above: float = -math.inf) -> Any:
    if getattr(value, "ndim", 0):
        raise ValueError(f"{name} must be one {kind}number, got shape {value.shape}")
    if isinstance(value, Tracer):
        return value
    number = _checks.check_number(value, name, f"a {kind}number")
    # A larger one is infinite in single precision.
    if not above < number or abs(number) > float(np.finfo(np.float32).max):
        raise ValueError(f"{name} must be one {kind}finite number, got {value}")
    return number


def _scaled(scores: Array, factor: Any) -> Array:
    """factor times the scores, 0 for infinite ones: those of what is masked."""
    finite = jnp.where(jnp.isfinite(scores), scores, jnp.zeros_like(scores))
    return finite * jnp.asarray(factor, scores.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _zeros(
    traced: TracedFunction,
    two_sided: bool,
    scores: list[Array],
    value: list[Array],
    operands: PyTree,
    lam: Array,
    key: Array,
) -> list[Array]:
    """Zeros of the shapes of `value`, whose derivative in the scores is the implicit one."""
    del traced, two_sided
    return aligned([jnp.zeros_like(v) for v in value], (scores, value, operands, lam, key))


def _zeros_fwd(traced: TracedFunction, two_sided: bool, *inputs: PyTree) -> Any:
    return _zeros(traced, two_sided, *inputs), inputs


def _zeros_bwd(traced: TracedFunction, two_sided: bool, inputs: PyTree, y_bar: list[Array]) -> Any:
    scores, value, operands, lam, key = inputs

    def mean(step: Array) -> list[Array]:
        moved = [
            (v.astype(g.dtype) + step * g).astype(v.dtype)
            for v, g in zip(scores, y_bar, strict=True)
        ]
        # The same noise again: the key is used once more on purpose.
        return called(traced.hosts, traced, operands, jax.random.clone(key), *moved)

    if two_sided:
        start, width = mean(lam), 2 * lam
    else:
        start, width = value, lam
    width = jnp.where((lam > 0) & jnp.isfinite(lam), width, jnp.nan)
    scores_bar = [
        ((y - target) / width).astype(v.dtype)
        for v, y, target in zip(scores, start, mean(-lam), strict=True)
    ]
    scores_bar = without_derivatives(
        "a derivative of the gradient of make_implicit_mle was asked for, but that is a difference "
        "of solutions, which has none. Use make_perturbed_argmax for derivatives of higher order",
        scores_bar,
    )
    return scores_bar, *jax.tree.map(_no_cotangent, (value, operands, lam, key))


def _no_cotangent(value: Any) -> Any:
    if _leaves.is_floating(value):
        return jnp.zeros_like(value)
    return np.zeros(np.shape(value), jax.dtypes.float0)


_zeros.defvjp(_zeros_fwd, _zeros_bwd)


_SUM_OF_GAMMA = Limit(
    "SumOfGamma()",
    0,
    "has no closed form",
    "; make_implicit_mle takes its gradient without a density",
)


@dataclasses.dataclass(frozen=True)
class SumOfGamma:
    r"""Noise of which k independent draws add up to one Gumbel draw, if num_terms is infinite.

    .. math:: Z = \frac{1}{k} \left( \sum_{i=1}^{s} \Gamma_i - \log s \right), \quad
        \Gamma_i \sim \mathrm{Gamma}(\text{shape } 1 / k, \text{scale } k / i)

    With it the score of every solution with k ones is perturbed by Gumbel noise. Good for **values
    only**, as its density is not known: it serves `make_implicit_mle`.

    Attributes:
      k: number of ones of a solution, at least 1.
      num_terms: s in the formula.

    Example:
      >>> import perturbax as px
      >>> round(px.SumOfGamma(k=2, num_terms=10).mean, 3)
      0.313

    References:
      Niepert, Minervini and Franceschi, Implicit MLE: Backpropagating Through Discrete Exponential
      Family Distributions, 2021, arXiv:2106.01798, section 4.2
    """

    k: int
    num_terms: int = 10

    derivatives: ClassVar[float] = 0

    def __post_init__(self) -> None:
        """Checks the parameters."""
        for name in ("k", "num_terms"):
            object.__setattr__(self, name, _checks.check_count(getattr(self, name), name))

    @property
    def mean(self) -> float:
        """E[Z]: (1 + 1/2 + ... + 1/s - log s) / k."""
        harmonic = sum(1 / i for i in range(1, self.num_terms + 1))
        return (harmonic - math.log(self.num_terms)) / self.k

    @property
    def variance(self) -> float:
        """Variance of Z: (1 + 1/4 + ... + 1/s^2) / k."""
        return sum(1 / i**2 for i in range(1, self.num_terms + 1)) / self.k

    def sample(self, key: Array, sample_shape: Shape = (), dtype: DTypeLike = float) -> Array:
        """Independent draws, an array of shape `sample_shape`; consumes `key`."""
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        shape = tuple(np.atleast_1d(np.asarray(sample_shape, int)))
        gammas = jax.random.gamma(key, 1 / self.k, (*shape, self.num_terms), dtype)
        scales = np.asarray(1 / np.arange(1, self.num_terms + 1), dtype)
        return gammas @ scales - np.asarray(math.log(self.num_terms) / self.k, dtype)

    def log_prob(self, inputs: ArrayLike) -> Array:
        """NaN: the density is not known. Its derivatives raise."""
        return jnp.full_like(limit_derivatives(inputs, _SUM_OF_GAMMA), jnp.nan)
