"""make_perturbed_fun: a smoothed, differentiable version of any function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from . import _checks
from ._describe import describe, leading
from .estimator import _default_rule, _estimator
from .execution._plan import Operands, Plan
from .noise._foreign import AdaptedNoise, as_noise
from .noise._protocol import NoiseDistribution
from .noise._smooth import Gumbel
from .noise._traced import trace_noise
from .sampling._protocol import Sampler
from .scale import _scales
from .tracing import _user_code
from .tracing._host_call import own_exceptions
from .tracing._mesh_axes import share_axes

# Sums over samples are divided by their number, an int32.
_MAX_SAMPLES = 2**31 - 1


class Call(NamedTuple):
    """A call of a perturbed function: its arguments, checked, and what was found out about them."""

    plan: Plan
    key: Array
    x: list[Array]
    sigma: list[Array]
    operands: Operands
    value_tree: Any
    aux_tree: Any


class Perturbed(NamedTuple):
    """What a perturbed function is made of.

    Attributes:
      function: the perturbed function. What wraps it takes over its attributes, but is not it.
      prepare: checks a call's arguments and traces what is called.
      sampler: as given to make_perturbed_fun.
      has_aux: as given to make_perturbed_fun.
      batch_size: as given to make_perturbed_fun.
    """

    function: Callable[..., Any]
    prepare: Callable[..., Call]
    sampler: Sampler | None
    has_aux: bool
    batch_size: int | None


def make_perturbed_fun(
    fun: Callable[..., Any],
    num_samples: int = 1000,
    sigma: Any = 0.1,
    noise: NoiseDistribution = Gumbel(),
    use_baseline: bool = True,
    *,
    batch_size: int | None = None,
    has_aux: bool = False,
    sampler: Sampler | None = None,
    degree: int | None = None,
) -> Callable[..., Any]:
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
        default nets best). With few of them and degree 0, derivatives take one more, at x.
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
      sampler: how samples depend on each other: `Independent()`, `Antithetic()`, `Orthogonal()`,
        `Sobol()`, `OrthogonalArray()` or any object with the methods of `Sampler`; None chooses by
        num_samples, the number of coordinates and noise (see the guide to samplers).
      degree: 0, 1 or 2, that of the polynomial that is fitted to fun's values, always on other
        samples than those it is subtracted from, and added back as its exact mean; None chooses.
        Needs noise with a mean and a variance unless 0, which stands for the mean of the values.
        Unused where use_baseline is False.
      has_aux: whether fun returns a pair (value, aux). The perturbed function then returns a pair
        too, with aux as it is, stacked over the samples. In x and sigma aux has the derivative
        zero; in further arguments it is differentiable as fun's own.

    Returns:
      A function `g(key, x, *args, **kwargs)` that returns an estimate of
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
      Berthet et al., Learning with Differentiable Perturbed Optimizers, 2020, arXiv:2002.08676
      Foerster et al., DiCE: The Infinitely Differentiable Monte Carlo Estimator, 2018,
      arXiv:1802.05098
    """
    _checks.check_fun(fun)
    num_samples = _checks.check_count(num_samples, "num_samples", _MAX_SAMPLES)
    sigma = _scales.check_sigma(sigma)
    _checks.check_noise(noise)
    noise = as_noise(noise)
    use_baseline = _checks.check_bool(use_baseline, "use_baseline")
    if batch_size is not None:
        batch_size = _checks.check_count(batch_size, "batch_size")
    has_aux = _checks.check_bool(has_aux, "has_aux")
    _checks.check_sampler(sampler)
    _checks.check_degree(degree)

    def prepare(
        key: Array,
        x: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_nets: int = _default_rule.RULE.nets,
    ) -> Call:
        key = _checks.check_key(key, x)
        leaves, names, merge = _checks.perturbed_leaves(x)
        scales = _scales.scale_leaves(sigma, x, leaves, names)
        key, leaves, scales = share_axes(key, leaves, scales)
        fun_traced, operands, num_outputs, value_tree, aux_tree = _user_code.trace_fun(
            lambda values: fun(merge(values), *args, **kwargs), leaves, has_aux
        )
        dtype = _checks.noise_dtype(leaves)
        law, law_operands = noise, None
        dim = _checks.num_elements(leaves)
        choice = _default_rule.choose(num_samples, dim, noise, sampler, degree, num_nets)
        if isinstance(noise, AdaptedNoise):
            law, law_operands = trace_noise(noise, key, dim, dtype)
        plan = Plan(
            fun=fun_traced,
            noise=law,
            sampler=choice.sampler,
            num_samples=num_samples,
            batch_size=batch_size,
            degree=choice.degree if use_baseline else None,
            num_outputs=num_outputs,
            shapes=tuple(v.shape for v in leaves),
            dtypes=tuple(v.dtype for v in leaves),
            dtype=dtype,
            own_operands=_user_code.leaves_among(operands, x) if fun_traced.takes_many else (),
        )
        return Call(
            plan, key, leaves, scales, Operands(operands, law_operands), value_tree, aux_tree
        )

    def perturbed_fun(*args: Any, **kwargs: Any) -> Any:
        key, x, *rest = leading(("key", "x"), args, kwargs)
        call = prepare(key, x, tuple(rest), kwargs)
        inputs = call.key, call.x, call.sigma, call.operands
        with own_exceptions(call.plan.fun.hosts, inputs), _user_code.explained_vmap(batch_size):
            value, aux = _estimator.estimate(call.plan, *inputs)
        if _checks.is_traced(sigma):
            value = _scales.nan_unless_valid(value, call.sigma, call.x)
        value = jax.tree.unflatten(call.value_tree, value)
        return (value, jax.tree.unflatten(call.aux_tree, aux)) if has_aux else value

    # What `estimate` needs to know of it.
    known = Perturbed(perturbed_fun, prepare, sampler, has_aux, batch_size)
    perturbed_fun.__dict__["_perturbed"] = known
    does = f"Estimates E[{{name}}(x + sigma eps)] by the mean of {num_samples} samples."
    describe(perturbed_fun, "perturbed", fun, ("key", "x"), "make_perturbed_fun", does)
    return perturbed_fun
