"""The expected optimum of a perturbed optimizer."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import Mesh

from .. import _checks, _leaves
from .._call import Settings
from .._describe import describe, remembered
from .._types import Fun, PyTree
from ..noise._protocol import NoiseDistribution
from ..noise._smooth import Gumbel
from ..sampling._protocol import Sampler
from ..tracing._host_exceptions import called
from ..tracing._signature import trace
from ._layer import Drawn, Layer
from ._perturbed_scores import inner_product, same_shapes, times
from ._symmetric import with_envelope_derivatives, with_slopes


@remembered
def make_perturbed_max(
    argmax_fun: Fun,
    num_samples: int = 1000,
    sigma: PyTree = 0.1,
    noise: NoiseDistribution = Gumbel(),
    use_baseline: bool = True,
    *,
    objective: Fun | None = None,
    maximize: bool = True,
    multiplicative: bool = False,
    symmetrize: bool = True,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    degree: int | None = None,
    mesh: Mesh | None = None,
) -> Fun:
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
      mesh: as in `make_perturbed_argmax`.

    Returns:
      A function `g(key, theta, *args, **kwargs)` that returns an estimate of F, a scalar. `key` is
      one PRNG key; it is consumed. If argmax_fun has side effects, `symmetrize` is without effect;
      if the noise has traced parameters as well, the first derivative is that of
      `make_perturbed_fun`, by the score: unbiased, but noisier.

    Raises:
      TypeError: at construction or call, where an argument is not of the kind described.
      ValueError: where argmax_fun returns another shape than that of theta and there is no
        objective, where the objective is not a scalar (TypeError: not one array of real
        numbers), and as in `make_perturbed_fun`.

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
    settings = Settings(
        num_samples=num_samples,
        sigma=sigma,
        noise=noise,
        use_baseline=use_baseline,
        batch_size=batch_size,
        sampler=sampler,
        degree=degree,
        mesh=mesh,
    )
    layer = Layer(argmax_fun, settings, maximize, multiplicative)
    perturbed_max = maximum(layer, objective, symmetrize)
    does = f"Estimates the expected optimum of {{name}} by the mean of {num_samples} samples."
    names = ("key", "theta")
    describe(perturbed_max, "perturbed_max_of", argmax_fun, names, "make_perturbed_max", does)
    return perturbed_max


def maximum(layer: Layer, objective: Fun | None, symmetrize: bool) -> Callable[..., Array]:
    """`make_perturbed_max` of a layer: what it returns, but for its description."""
    symmetrize = _checks.check_bool(symmetrize, "symmetrize")
    if objective is not None:
        _checks.check_fun(objective, "objective")

    def perturbed_max(*args: Any, **kwargs: Any) -> Array:
        key, leaves, scales, tree, rest = layer.given(args, kwargs)
        dtype = _leaves.noise_dtype(leaves)

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

        def slopes_of(g: list[Array], noise: Drawn) -> tuple[list[Array], list[Array]]:
            perturbation = noise.perturbation
            by_theta, by_sigma = perturbation.slopes(noise.v)
            changes = [times(one, change) for one, change in zip(g, by_sigma, strict=True)]
            if by_theta is not None:
                g = [times(one, factor) for one, factor in zip(g, by_theta, strict=True)]
            return g, perturbation.along_sigma(changes) if layer.has_traced_scales else []

        def solve(u: list[Array], noise: Drawn) -> tuple[list[Array], Array, list[Array]]:
            g, value = solution(u)
            g, changes = slopes_of(g, noise)
            return g, value, changes

        def means(*parts: Array) -> Any:
            return layer.expectation(solve, key, *layer.split(parts, scales))

        inputs = layer.inputs(leaves, scales)
        traced, operands = trace(means, *inputs)
        if traced.jaxpr.effects:  # which a derivative rule may not have (jax#11916)

            def with_fixed_value(u: list[Array], noise: Drawn) -> Any:
                g, value = solution(u)
                return slopes_of(lax.stop_gradient(g), noise), value, lax.stop_gradient(value)

            parts = layer.split(inputs, scales)
            *slopes, value, fixed = called(
                traced.hosts, layer.expectation, with_fixed_value, key, *parts
            )
            if not layer.has_traced_noise(_leaves.num_elements(leaves)):
                value = with_slopes(value, fixed, slopes, inputs)
        else:
            num_symmetric = len(leaves) if symmetrize else 0
            sizes = len(leaves), num_symmetric
            value = called(
                traced.hosts, with_envelope_derivatives, traced, *sizes, inputs, operands
            )
        return value if layer.maximize else -value

    return perturbed_max


def objective_value(objective: Fun, dtype: Any) -> Callable[..., Array]:
    """The objective, whose value must be one real number."""

    def value(theta: PyTree, y: PyTree, *args: Any, **kwargs: Any) -> Array:
        result = objective(theta, y, *args, **kwargs)
        remedy = "return what is to be maximised alone, such as a sum of it"
        return _checks.one_number(result, "objective", remedy).astype(dtype)

    return value
