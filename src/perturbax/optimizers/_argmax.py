r"""Perturbed optimizers: E[y*(theta + sigma Z)], and the expected maximum that it is a gradient of.

    y*(u) = argmax_y <u, y>,   F(theta, sigma) = E max_y <u, y>,   u = theta + sigma Z

F is a perturbed function like any other, but its first derivatives need no score (Danskin):

    dF/dtheta = E[y*(u) du/dtheta],   dF/dsigma = <E[y*(u) du/dsigma]>

Both are perturbed functions again, so their own derivatives are those of make_perturbed_fun. The
Jacobian of the first is a Hessian, hence symmetric: the mean of an estimate and its transpose is
unbiased too, and has less variance.

All this is written for maximisers. A minimiser of costs is a maximiser of the scores -theta.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .. import _checks
from .._describe import describe, leading
from .._perturb import make_perturbed_fun
from ..noise._foreign import as_noise
from ..noise._noise import Gumbel, NoiseDistribution
from ..sampling._sampling import Sampler
from ..tracing._derivative_rules import is_live, live_jvp, with_jvp
from ..tracing._signature import TracedFunction, trace
from ._perturbed_scores import (
    Perturbation,
    check_multiplicative,
    inner_product,
    same_shapes,
    scales_of,
    score_leaves,
    times,
)


def make_perturbed_argmax(
    argmax_fun: Callable[..., Any],
    num_samples: int = 1000,
    sigma: Any = 0.1,
    noise: NoiseDistribution = Gumbel(),
    use_baseline: bool = True,
    *,
    maximize: bool = True,
    multiplicative: bool = False,
    symmetrize: bool = True,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    degree: int | None = None,
) -> Callable[..., Any]:
    r"""Smooths the solution of a linear optimisation problem by averaging it over noisy scores.

    .. math:: g(\theta) = E[y^*(\theta + \sigma Z)], \quad
        y^*(\theta) = \arg\max_{y \in \mathcal{Y}} \langle \theta, y \rangle

    The value lies in the convex hull of the solutions. It has derivatives of every order in theta
    and sigma, estimated without bias from solutions alone. Its Jacobian in theta is the Hessian of
    the perturbed maximum, so it is symmetric, and the estimate is made symmetric, which lowers its
    variance. With one-hot solutions and Gumbel noise, g is softmax(theta / sigma).

    Args:
      argmax_fun: the solver, `argmax_fun(theta, *args, **kwargs)`, which returns y of the structure
        and shapes of theta, in any dtype. It is traced, then vmapped over the samples, and never
        differentiated in theta. For solutions of another shape, or the solutions together with
        auxiliary results, use `make_perturbed_fun`.
      num_samples: how many problems are solved, a static int of at least 1; as evaluations in
        `make_perturbed_fun`.
      sigma: scale of the noise, as in `make_perturbed_fun`.
      noise: law of the noise Z, an object with the methods of `NoiseDistribution`.
      use_baseline: as in `make_perturbed_fun`.
      maximize: False for a solver that minimises costs theta. The scores that are perturbed are
        then -theta, so the solver sees theta - sigma Z: with Gumbel noise, one-hot solutions have
        the mean softmax(-theta / sigma). For symmetric noise the sign makes no difference.
      multiplicative: perturb theta by the factor exp(sigma Z - sigma^2 / 2), which keeps signs and
        has mean 1. Needs Normal noise. At theta = 0 there is no derivative: it is not finite.
      symmetrize: average the Jacobian in theta with its transpose. Use False if the solver is not
        exact, for its mean is not a gradient then. Without effect where multiplicative, for the
        Jacobian is not symmetric, and where argmax_fun has side effects.
      batch_size: as in `make_perturbed_fun`.
      sampler: as in `make_perturbed_fun`.
      degree: as in `make_perturbed_fun`.

    Returns:
      A function `g(key, theta, *args, **kwargs)` that returns an estimate of the mean solution, of
      the structure and shapes of theta, in floating dtypes of at least single precision. `key` is
      one PRNG key; it is consumed. Further arguments go to argmax_fun as they are.

    Raises:
      TypeError: at construction or call, where an argument is not of the kind described.
      ValueError: where argmax_fun returns another shape than that of theta, and as in
        `make_perturbed_fun`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> choose = px.make_perturbed_argmax(px.solvers.one_hot_argmax, 10_000, sigma=0.5)
      >>> theta = jnp.array([-0.6, 1.9, -0.2, 1.1, -1.0])
      >>> print(choose(jax.random.key(0), theta).round(1), jax.nn.softmax(theta / 0.5).round(1))
      [0.  0.8 0.  0.2 0. ] [0.  0.8 0.  0.2 0. ]

    References:
      Berthet et al., Learning with Differentiable Perturbed Optimizers, 2020, arXiv:2002.08676
      Dalle et al., Learning with Combinatorial Optimization Layers: a Probabilistic Approach, 2022,
      arXiv:2207.13513 (the multiplicative perturbation)
    """
    symmetrize = _checks.check_bool(symmetrize, "symmetrize")
    layer = _Layer(
        argmax_fun,
        num_samples,
        sigma,
        noise,
        maximize=maximize,
        multiplicative=multiplicative,
        use_baseline=use_baseline,
        batch_size=batch_size,
        sampler=sampler,
        degree=degree,
    )

    def perturbed_argmax(*args: Any, **kwargs: Any) -> Any:
        key, theta, *rest = leading(("key", "theta"), args, kwargs)
        key = _checks.check_key(key, theta)
        leaves, names, tree = score_leaves(theta)
        scales = scales_of(layer.sigma, theta, leaves, names, layer.multiplicative)

        def solve(u: list[Array], _: Any) -> list[Array]:
            scores = layer.unsigned(tree, u)
            y = layer.argmax_fun(scores, *rest, **kwargs)
            return same_shapes("the result of argmax_fun", y, scores)

        def mean(*parts: Array) -> list[Array]:
            return layer.expectation(solve, key, *layer.split(parts, scales))

        inputs = layer.inputs(leaves, scales)
        traced, operands = trace(mean, *inputs)
        symmetric = symmetrize and not layer.multiplicative
        num_symmetric = len(leaves) if symmetric and not traced.jaxpr.effects else 0
        value = _symmetrized(traced, len(leaves), num_symmetric, inputs, operands)
        return jax.tree.unflatten(tree, value)

    does = f"Estimates E[{{name}}(theta + sigma Z)] by the mean of {num_samples} solutions."
    names = ("key", "theta")
    describe(perturbed_argmax, "perturbed", argmax_fun, names, "make_perturbed_argmax", does)
    return perturbed_argmax


def make_perturbed_max(
    argmax_fun: Callable[..., Any],
    num_samples: int = 1000,
    sigma: Any = 0.1,
    noise: NoiseDistribution = Gumbel(),
    use_baseline: bool = True,
    *,
    objective: Callable[..., Any] | None = None,
    maximize: bool = True,
    multiplicative: bool = False,
    symmetrize: bool = True,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    degree: int | None = None,
) -> Callable[..., Any]:
    r"""Smooths the optimal value of an optimisation problem by averaging it over noisy scores.

    .. math:: F(\theta) = E\left[\max_{y \in \mathcal{Y}} \langle \theta + \sigma Z, y \rangle
        \right]

    The first derivative in theta is the mean solution, as `make_perturbed_argmax` estimates it
    (Danskin's theorem): it needs no score, and for one sample it is that sample's solution. The
    first derivative in sigma is the mean of <y, Z>. Derivatives of higher order are those of these
    two, by the score; all are unbiased. With one-hot solutions and Gumbel noise, F is
    sigma (logsumexp(theta / sigma) + gamma) with Euler's constant gamma.

    In further arguments, which objective and solver may share, the first derivative is that of F
    too. Derivatives of it in such an argument are not: how solutions depend on it is not seen.

    Args:
      argmax_fun: the solver, `argmax_fun(theta, *args, **kwargs)`, which returns y of the structure
        and shapes of theta, in any dtype; of any structure where an objective is given.
      num_samples: how many problems are solved for a value with its first derivatives.
      sigma: as in `make_perturbed_argmax`.
      noise: as in `make_perturbed_argmax`.
      use_baseline: as in `make_perturbed_argmax`; serves derivatives of second order and above.
      objective: what argmax_fun optimises, `objective(theta, y, *args, **kwargs)`, a real number,
        differentiable in theta; None stands for <theta, y>. An objective <theta, g(y)> + h(y) has
        the mean of g(y) as the first derivative of F.
      maximize: False for a solver that minimises: F is then the expected minimum, of the costs
        theta - sigma Z.
      multiplicative: as in `make_perturbed_argmax`; first derivatives are right at theta = 0 too.
      symmetrize: average the Hessian in theta with its transpose. Use False if the solver is not
        exact.
      batch_size: as in `make_perturbed_argmax`.
      sampler: as in `make_perturbed_argmax`.
      degree: as in `make_perturbed_argmax`.

    Returns:
      A function `g(key, theta, *args, **kwargs)` that returns an estimate of F, a scalar. `key` is
      one PRNG key; it is consumed. If argmax_fun has side effects, `symmetrize` is without effect;
      if the noise has traced parameters as well, the first derivative is that of
      `make_perturbed_fun`, by the score: unbiased, but noisier.

    Raises:
      TypeError: at construction or call, where an argument is not of the kind described.
      ValueError: where argmax_fun returns another shape than that of theta and there is no
        objective, where the objective is not a scalar, and as in `make_perturbed_fun`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> maximum = px.make_perturbed_max(px.solvers.one_hot_argmax, 10_000, sigma=0.5)
      >>> theta = jnp.array([-0.6, 1.9, -0.2, 1.1, -1.0])
      >>> value, gradient = jax.value_and_grad(maximum, argnums=1)(jax.random.key(0), theta)
      >>> exact = 0.5 * (jax.nn.logsumexp(theta / 0.5) + jnp.euler_gamma)
      >>> print(value.round(1), exact.round(1), gradient.round(1))
      2.3 2.3 [0.  0.8 0.  0.2 0. ]

    References:
      Berthet et al., Learning with Differentiable Perturbed Optimizers, 2020, arXiv:2002.08676
    """
    symmetrize = _checks.check_bool(symmetrize, "symmetrize")
    if objective is not None:
        _checks.check_fun(objective, "objective")
    layer = _Layer(
        argmax_fun,
        num_samples,
        sigma,
        noise,
        maximize=maximize,
        multiplicative=multiplicative,
        use_baseline=use_baseline,
        batch_size=batch_size,
        sampler=sampler,
        degree=degree,
    )

    def perturbed_max(*args: Any, **kwargs: Any) -> Array:
        key, theta, *rest = leading(("key", "theta"), args, kwargs)
        key = _checks.check_key(key, theta)
        leaves, names, tree = score_leaves(theta)
        scales = scales_of(layer.sigma, theta, leaves, names, layer.multiplicative)
        dtype = _checks.noise_dtype(leaves)

        def solution(u: list[Array]) -> tuple[list[Array], Array]:
            scores = layer.unsigned(tree, u)
            y = layer.argmax_fun(scores, *rest, **kwargs)
            if objective is None:
                g = same_shapes("the result of argmax_fun", y, scores)
                value = inner_product(jax.tree.leaves(scores), g, dtype)
            else:
                value, g = jax.value_and_grad(objective_value(objective, dtype))(
                    scores, y, *rest, **kwargs
                )
                g = jax.tree.leaves(g)
            # Of the maximum in the scores, which a minimiser's are the opposites of.
            return [v.astype(dtype) for v in g], value if layer.maximize else -value

        def slopes_of(g: list[Array], noise: Any) -> tuple[list[Array], list[Array]]:
            perturbation, v = noise
            by_theta, by_sigma = perturbation.slopes(v)
            changes = [times(one, change) for one, change in zip(g, by_sigma, strict=True)]
            if by_theta is not None:
                g = [times(one, factor) for one, factor in zip(g, by_theta, strict=True)]
            return g, perturbation.along_sigma(changes) if layer.has_traced_scales else []

        def solve(u: list[Array], noise: Any) -> tuple[list[Array], Array, list[Array]]:
            g, value = solution(u)
            g, changes = slopes_of(g, noise)
            return g, value, changes

        def means(*parts: Array) -> Any:
            return layer.expectation(solve, key, *layer.split(parts, scales))

        inputs = layer.inputs(leaves, scales)
        traced, operands = trace(means, *inputs)
        if traced.jaxpr.effects:  # JAX allows none inside a custom derivative rule

            def with_fixed_value(u: list[Array], noise: Any) -> Any:
                g, value = solution(u)
                return slopes_of(lax.stop_gradient(g), noise), value, lax.stop_gradient(value)

            *slopes, value, fixed = layer.expectation(
                with_fixed_value, key, *layer.split(inputs, scales)
            )
            if not layer.has_traced_noise():
                value = _with_slopes(value, fixed, slopes, inputs)
        else:
            num_symmetric = len(leaves) if symmetrize else 0
            value = _with_envelope_derivatives(traced, len(leaves), num_symmetric, inputs, operands)
        return value if layer.maximize else -value

    does = f"Estimates the expected optimum of {{name}} by the mean of {num_samples} samples."
    names = ("key", "theta")
    describe(perturbed_max, "perturbed_max_of", argmax_fun, names, "make_perturbed_max", does)
    return perturbed_max


def objective_value(objective: Callable[..., Any], dtype: Any) -> Callable[..., Array]:
    """The objective, if it is a real scalar; otherwise calling it raises ValueError."""

    def value(theta: Any, y: Any, *args: Any, **kwargs: Any) -> Array:
        result = objective(theta, y, *args, **kwargs)
        if jax.tree.structure(result) != jax.tree.structure(0) or jnp.shape(result):
            shapes = jax.tree.map(jnp.shape, result)
            raise ValueError(f"objective must return a scalar, got arrays of the shapes {shapes}")
        return jnp.asarray(result).astype(dtype)

    return value


class _Layer:
    """What perturbed optimizers have in common: the solver, the noise, and how it is applied."""

    def __init__(
        self,
        argmax_fun: Callable[..., Any],
        num_samples: int,
        sigma: Any,
        noise: Any,
        *,
        maximize: Any,
        multiplicative: Any,
        **options: Any,
    ):
        """Checks all that can be checked before a call."""
        _checks.check_fun(argmax_fun, "argmax_fun")
        make_perturbed_fun(argmax_fun, num_samples, sigma, noise, **options)
        self.argmax_fun = argmax_fun
        self.num_samples = num_samples
        self.sigma = _checks.check_sigma(sigma)
        self.noise = as_noise(noise)
        self.maximize = _checks.check_bool(maximize, "maximize")
        self.multiplicative = check_multiplicative(multiplicative, self.noise)
        self.options = options

    def unsigned(self, tree: Any, u: list[Array]) -> Any:
        """What the solver sees of perturbed scores u: themselves, or costs."""
        return jax.tree.unflatten(tree, u if self.maximize else [-v for v in u])

    @property
    def has_traced_scales(self) -> bool:
        """Whether a scale may be differentiated with respect to."""
        return _checks.is_traced(self.sigma)

    def has_traced_noise(self) -> bool:
        """Whether a parameter of the noise may be differentiated with respect to."""
        _, parameters = trace(self.noise.log_prob, jnp.zeros(()))
        return _checks.is_traced(parameters)

    def inputs(self, leaves: list[Array], scales: list[Array]) -> list[Array]:
        """What the estimate is a function of: scores, and scales as far as they are traced."""
        leaves = leaves if self.maximize else [-v for v in leaves]
        return [*leaves, *(scales if self.has_traced_scales else [])]

    def split(self, parts: Any, scales: list[Array]) -> tuple[list[Array], list[Array]]:
        """`inputs` undone: scores and scales."""
        if not self.has_traced_scales:
            return list(parts), scales
        return list(parts[: len(parts) - len(scales)]), list(parts[len(parts) - len(scales) :])

    def expectation(
        self, solve: Callable[..., Any], key: Array, theta: list[Array], scales: list[Array]
    ) -> list[Array]:
        """The leaves of E[solve(u, (perturbation, v))]."""
        dtype = _checks.noise_dtype(theta)
        perturbation = Perturbation(theta, scales, self.multiplicative, dtype)
        estimate = make_perturbed_fun(
            lambda v: solve(perturbation.point(v), (perturbation, v)),
            self.num_samples,
            perturbation.scale(),
            self.noise,
            **self.options,
        )
        value = jax.tree.leaves(estimate(key, perturbation.location()))
        return _checks.nan_unless_valid(value, scales) if self.has_traced_scales else value


# --- Derivatives. `traced` is a function of operands (all that it closes over, the key included)
# and inputs: first the scores, `num_scores` arrays, then scales. The first of its results is its
# gradient in the scores, whose Jacobian is symmetric.


@partial(jax.jit, static_argnums=(0, 1, 2))
def _symmetrized(
    traced: TracedFunction, num_scores: int, num_symmetric: int, inputs: Any, operands: Any
) -> list[Array]:
    """traced(operands, *inputs), with a symmetric Jacobian of the first results in the scores."""
    if not num_symmetric:
        return traced(operands, *inputs)
    return _with_symmetric_jacobian(traced, num_scores, inputs, operands)


def _as_is(traced: TracedFunction, num_scores: int, inputs: Any, operands: Any) -> list[Array]:
    """traced(operands, *inputs); its derivative in the scores is J t / 2 + J' t / 2."""
    del num_scores
    return traced(operands, *inputs)


def _symmetric_jvp(traced: TracedFunction, num_scores: int, primals: Any, tangents: Any) -> Any:
    leaves, tree = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents)
    by_scores = any(map(is_live, dots[:num_scores]))
    live = [i for i, dot in enumerate(dots) if is_live(dot) or (by_scores and i < num_scores)]

    def restricted(*values: Array) -> list[Array]:
        merged = list(leaves)
        for i, value in zip(live, values, strict=True):
            merged[i] = value
        inputs, operands = jax.tree.unflatten(tree, merged)
        return traced(operands, *inputs)

    points = [leaves[i] for i in live]
    directions = [_instantiated(dots[i], leaves[i]) for i in live]
    out, push = jax.linearize(restricted, *points)
    out_dot = push(*directions)
    if by_scores:
        scores_dot = directions[:num_scores]
        halves = push(*(v / 2 for v in scores_dot), *directions[num_scores:])
        weights = [
            v.astype(o.dtype) if i < num_scores else jnp.zeros_like(o)
            for i, (v, o) in enumerate(_padded(scores_dot, out))
        ]
        pulled = jax.linear_transpose(push, *points)(weights)[:num_scores]
        symmetric = [
            half + pull.astype(half.dtype) / 2
            for half, pull in zip(halves[:num_scores], pulled, strict=True)
        ]
        out_dot = [*symmetric, *out_dot[num_scores:]]
    return out, out_dot


_with_symmetric_jacobian = with_jvp(_as_is, _symmetric_jvp, 2, symbolic_zeros=True)


def _padded(directions: list[Array], out: list[Array]) -> list[tuple[Array, Array]]:
    return [(directions[min(i, len(directions) - 1)], o) for i, o in enumerate(out)]


def _instantiated(tangent: Any, like: Array) -> Array:
    return tangent if is_live(tangent) else jnp.zeros_like(like)


def _maximum(
    traced: TracedFunction, num_scores: int, num_symmetric: int, inputs: Any, operands: Any
) -> Array:
    """The maximum, result number `num_scores`; those before and after it are its derivatives."""
    return _symmetrized(traced, num_scores, num_symmetric, inputs, operands)[num_scores]


def _maximum_jvp(
    traced: TracedFunction, num_scores: int, num_symmetric: int, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    inputs, operands = primals
    inputs_dot, operands_dot = tangents

    def results(operands: Any) -> list[Array]:
        return _symmetrized(traced, num_scores, num_symmetric, inputs, operands)

    out, out_dot = live_jvp(results, (operands,), (operands_dot,))
    value, value_dot = out[num_scores], out_dot[num_scores]
    # The results before the value belong to the scores, those after it to the scales.
    for slope, dot in zip([*out[:num_scores], *out[num_scores + 1 :]], inputs_dot, strict=True):
        if is_live(dot):
            value_dot += jnp.sum(slope.astype(value.dtype) * dot.astype(value.dtype))
    return value, value_dot


_with_envelope_derivatives = jax.jit(
    with_jvp(_maximum, _maximum_jvp, 3, symbolic_zeros=True), static_argnums=(0, 1, 2)
)


def _value_alone(value: Array, fixed: Array, slopes: list[Array], inputs: list[Array]) -> Array:
    """`value`, with `slopes` as its derivatives in the inputs.

    `fixed` is the mean of the same values, held fixed: its derivatives are those of `value` by the
    score alone, which are replaced; what is left are derivatives in operands, and mixed ones. So
    the slopes have none of these.
    """
    del fixed, slopes, inputs
    return value


def _value_alone_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    value, _, slopes, _ = primals
    value_dot, fixed_dot, _, inputs_dot = tangents
    out_dot = _instantiated(value_dot, value) - _instantiated(fixed_dot, value)
    for slope, dot in zip(slopes, inputs_dot, strict=True):
        if is_live(dot):
            out_dot += jnp.sum(slope.astype(value.dtype) * dot.astype(value.dtype))
    return _with_slopes(*primals), out_dot


_with_slopes = with_jvp(_value_alone, _value_alone_jvp, symbolic_zeros=True)
