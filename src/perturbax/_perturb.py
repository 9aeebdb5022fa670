"""make_perturbed_fun: a smoothed, differentiable version of any function."""

import dataclasses
import inspect
from typing import Any

from jax import Array
from jax.sharding import Mesh

from . import _checks
from ._call import Call, Settings, evaluate, prepare
from ._describe import Made, describe, leading
from ._types import Fun, PyTree
from .estimator._default_rule import RULE
from .noise._protocol import NoiseDistribution
from .noise._smooth import Gumbel
from .sampling._protocol import Sampler


@dataclasses.dataclass(frozen=True, eq=False)
class PerturbedFun:
    """A perturbed function, as `make_perturbed_fun` returns it: a function of a key and x.

    It has the name, the documentation and the signature of a function, and can be pickled if what
    it was made of can be.

    Attributes:
      fun: the function that is perturbed.
      settings: how.
    """

    fun: Fun
    settings: Settings

    def __post_init__(self) -> None:
        """Checks fun, and takes over what it tells about itself."""
        _checks.check_fun(self.fun)
        if not isinstance(self.settings, Settings):
            raise TypeError(f"settings must be Settings, got {type(self.settings).__name__}")
        number = self.settings.num_samples
        does = f"Estimates E[{{name}}(x + sigma eps)] by the mean of {number} samples."
        describe(self, "perturbed", self.fun, ("key", "x"), "make_perturbed_fun", does)

    def __call__(self, /, *args: Any, **kwargs: Any) -> PyTree:
        """An estimate of E[fun(x + sigma eps, *args, **kwargs)], of g(key, x, *args, **kwargs)."""
        key, x, *rest = leading(("key", "x"), args, kwargs)
        return evaluate(self.prepare(key, x, tuple(rest), kwargs))

    def prepare(
        self,
        key: Array,
        x: PyTree,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_nets: int = RULE.nets,
    ) -> Call:
        """Checks and plans a call."""
        return prepare(
            self.settings, lambda x: self.fun(x, *args, **kwargs), key, x, num_nets=num_nets
        )

    def __reduce__(self) -> Any:
        return type(self), (self.fun, self.settings)


def check_perturbed_fun(value: object, name: str, remedy: str = "") -> None:
    """Raises TypeError unless `value` is a `PerturbedFun`."""
    if not isinstance(value, PerturbedFun):
        told = f"{name} must be what make_perturbed_fun returned, got {kind_of_fun(value)}"
        raise TypeError(f"{told}; {remedy}" if remedy else told)


def kind_of_fun(fun: Any) -> str:
    """What an error calls a function in the place of which a `PerturbedFun` is needed."""
    kind = getattr(fun, "__name__", type(fun).__name__)
    inner = inspect.unwrap(fun) if callable(fun) else fun
    wraps = inner is not fun and isinstance(inner, PerturbedFun | Made)
    return f"{kind}, a function that wraps it, as those of jit, vmap and grad do" if wraps else kind


def make_perturbed_fun(
    fun: Fun,
    num_samples: int = 1000,
    sigma: PyTree = 0.1,
    noise: NoiseDistribution = Gumbel(),
    use_baseline: bool = True,
    *,
    batch_size: int | None = None,
    has_aux: bool = False,
    sampler: Sampler | None = None,
    degree: int | None = None,
    missing: str = "propagate",
    mesh: Mesh | None = None,
) -> PerturbedFun:
    r"""Smooths a function by averaging it over noise added to its input.

    The perturbed function is :math:`F(x) = E[f(x + \sigma \epsilon)]`, with noise :math:`\epsilon`
    of the given law. It has derivatives of every order in x and sigma even where f has none. The
    returned function estimates F(x) by a mean over `num_samples` draws; JAX's own transformations
    (`grad`, `jacfwd`, `hessian`, `vmap`, `jit`, ...) of it give unbiased estimates of the
    derivatives of F, from values of f alone.

    Args:
      fun: the function, from a pytree (and any further arguments) to a pytree of arrays. It may be
        discontinuous; its derivative in the perturbed argument is never used. It is traced, then
        vmapped over the samples.
      num_samples: number of evaluations of fun, a static int of at least 1 (powers of two suit the
        default nets best). Where a group of samples has fewer others than its root, as for one or
        two samples or a single group, derivatives of degree 0 take one more, at x.
      sigma: scale of the noise, > 0: a number; an array that broadcasts into a leaf of x; or a
        pytree of them with the structure of x, or a prefix of it. For a leaf of shape s, with axes,
        an array of shape s + s is an invertible matrix L, so that the noise is L eps: for a vector,
        the Cholesky factor of its covariance, for example. May be traced, and differentiated with
        respect to. A traced sigma that is not > 0, or not invertible, gives NaN.
      noise: law of the noise, an object with the methods of `NoiseDistribution`.
      use_baseline: subtract from each value a prediction of it, made from other samples' values and
        (of degree 0, where these are few) from fun(x), before weighing it by the score; see degree.
        Changes no expectation, and not the value, but lowers the variance of derivatives.
      batch_size: how many samples are evaluated at a time; None chooses. With 1, fun is not vmapped
        but called sample by sample, for what cannot be vmapped (such as ordered callbacks). The
        result is the same but for rounding.
      has_aux: whether fun returns a pair (value, aux). The perturbed function then returns a pair
        too, with aux as it is, stacked over the samples. In x and sigma aux has the derivative
        zero; in further arguments it is differentiable as fun's own.
      sampler: how samples depend on each other: `Independent()`, `Antithetic()`, `Orthogonal()`,
        `Sobol()`, `OrthogonalArray()` or any object with the methods of `Sampler`; None chooses by
        num_samples, the number of coordinates and noise (see the guide to samplers).
      degree: 0, 1 or 2, that of the polynomial that is fitted to fun's values, always on other
        samples than those it is subtracted from, and added back as its exact mean; None chooses.
        Needs noise with a mean and a variance unless 0, which stands for the mean of the values.
        Unused where use_baseline is False.
      missing: what becomes of samples at which fun's value has a NaN: "propagate" makes the result
        NaN; "drop" leaves them out, as if they had not been drawn. That changes no expectation if
        failing has nothing to do with where the sample is; see the guide to missing values for
        what is estimated if it has.
      mesh: a `jax.sharding.Mesh` whose devices, along all of its axes, share the samples; None for
        the device that x is on. All arguments and results are replicated. The samples are the same
        however many devices there are, and so is the result, but for rounding (see the guide to
        devices). Where it has devices of several processes, all of them make the call.

    Returns:
      A function `g(key, x, *args, **kwargs)`, a `PerturbedFun`, that returns an estimate of
      `E[fun(x + sigma eps, *args, **kwargs)]`, with the structure and shapes of fun's result, in
      its floating dtypes of at least single precision. `key` is one PRNG key; it is consumed. All
      floating leaves of x are perturbed, all others handed to fun as they are; so are further
      arguments, in which g is differentiable as fun is. Key and x may also be given by name.

    Raises:
      TypeError: at construction or call, where an argument is not of the kind described.
      ValueError: where num_samples or batch_size is below 1 or num_samples above 2^31 - 1, sigma
        is not positive and finite (a matrix: not invertible) or does not fit x, or noise or sampler
        returns arrays of another shape than asked for.
      NotImplementedError: where a derivative is asked for that the noise is not smooth enough for.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> steps = lambda x: jnp.sum(jnp.where(x > 0, 1.0, 0.0))
      >>> smooth_steps = px.make_perturbed_fun(steps, 10_000, sigma=0.5, noise=px.Normal())
      >>> x = jnp.array([-0.5, 0.0, 1.0])
      >>> with jnp.printoptions(precision=1, suppress=True):
      ...     print(jax.grad(smooth_steps, argnums=1)(jax.random.key(0), x))
      [0.5 0.8 0.1]

    References:
      - Berthet et al., Learning with Differentiable Perturbed Optimizers, 2020, arXiv:2002.08676
      - Foerster et al., DiCE: The Infinitely Differentiable Monte Carlo Estimator, 2018,
        arXiv:1802.05098
    """
    settings = Settings(
        num_samples=num_samples,
        sigma=sigma,
        noise=noise,
        use_baseline=use_baseline,
        batch_size=batch_size,
        has_aux=has_aux,
        sampler=sampler,
        degree=degree,
        missing=missing,
        mesh=mesh,
    )
    return PerturbedFun(fun, settings)
