"""The mean solution of a perturbed optimizer."""

from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from .. import _checks
from .._call import Settings
from .._describe import describe, remembered
from .._types import Fun, PyTree
from ..noise._protocol import NoiseDistribution
from ..noise._smooth import Gumbel
from ..sampling._protocol import Sampler
from ..tracing._host_exceptions import called
from ..tracing._signature import trace
from ._layer import Drawn, Layer
from ._perturbed_scores import same_shapes
from ._symmetric import symmetrized


@remembered
def make_perturbed_argmax(
    argmax_fun: Fun,
    num_samples: int = 1000,
    sigma: PyTree = 0.1,
    noise: NoiseDistribution = Gumbel(),
    use_baseline: bool = True,
    *,
    maximize: bool = True,
    multiplicative: bool = False,
    symmetrize: bool = True,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    degree: int | None = None,
    mesh: Mesh | None = None,
) -> Fun:
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
      mesh: as in `make_perturbed_fun`.

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
      - Berthet et al., Learning with Differentiable Perturbed Optimizers, 2020, arXiv:2002.08676
      - Dalle et al., Learning with Combinatorial Optimization Layers: a Probabilistic Approach,
        2022, arXiv:2207.13513 (the multiplicative perturbation)
    """
    symmetrize = _checks.check_bool(symmetrize, "symmetrize")
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

    def perturbed_argmax(*args: Any, **kwargs: Any) -> PyTree:
        key, leaves, scales, tree, rest = layer.given(args, kwargs)

        def solve(u: list[Array], _: Drawn) -> list[Array]:
            scores = layer.unsigned(tree, u)
            y = layer.argmax_fun(scores, *rest, **kwargs)
            return same_shapes("the result of argmax_fun", y, scores)

        def mean(*parts: Array) -> list[Array]:
            return layer.expectation(solve, key, *layer.split(parts, scales))

        inputs = layer.inputs(leaves, scales)
        traced, operands = trace(mean, *inputs)
        symmetric = symmetrize and not layer.multiplicative
        num_symmetric = len(leaves) if symmetric and not traced.jaxpr.effects else 0
        value = called(
            traced.hosts, symmetrized, traced, len(leaves), num_symmetric, inputs, operands
        )
        return jax.tree.unflatten(tree, value)

    does = f"Estimates E[{{name}}(theta + sigma Z)] by the mean of {num_samples} solutions."
    names = ("key", "theta")
    describe(perturbed_argmax, "perturbed", argmax_fun, names, "make_perturbed_argmax", does)
    return perturbed_argmax
