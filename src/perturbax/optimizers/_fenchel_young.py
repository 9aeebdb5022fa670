"""The Fenchel-Young loss of a perturbed optimizer: learning scores from solutions."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from .._call import Settings
from .._describe import describe, leading, remembered
from .._types import Fun, PyTree
from ..noise._protocol import NoiseDistribution
from ..noise._smooth import Gumbel
from ..sampling._protocol import Sampler
from ._layer import Layer
from ._max import maximum, objective_value
from ._perturbed_scores import inner_product, same_shapes


@remembered
def make_fenchel_young_loss(
    argmax_fun: Fun,
    num_samples: int = 1,
    sigma: PyTree = 0.1,
    noise: NoiseDistribution = Gumbel(),
    *,
    maximize: bool = True,
    multiplicative: bool = False,
    objective: Fun | None = None,
    use_baseline: bool = True,
    symmetrize: bool = True,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    degree: int | None = None,
    mesh: Mesh | None = None,
) -> Fun:
    r"""A convex loss for scores whose best solution is known, from a solver alone.

    .. math:: L(\theta, y) = E\left[\max_{y' \in \mathcal{Y}} \langle \theta + \sigma Z, y' \rangle
        \right] - \langle \theta, y \rangle, \quad
        \nabla_\theta L = E[y^*(\theta + \sigma Z)] - y

    The gradient vanishes where the mean solution is y. Value and gradient are unbiased for every
    number of samples, so that one, drawn afresh at each step, will do: together they take exactly
    num_samples solutions. The value is the true one (up to the convex conjugate of the perturbed
    maximum at y, which does not depend on theta), so it can be monitored, and compared between
    steps. With one-hot solutions and Gumbel noise, it is the cross-entropy of softmax(theta /
    sigma), times sigma, plus sigma times Euler's constant.

    Args:
      argmax_fun: the solver, as in `make_perturbed_max`.
      num_samples: how many problems are solved for a value and a gradient. One is the default, as
        the gradient is unbiased and averaged over a batch and many steps anyway.
      sigma: as in `make_perturbed_argmax`.
      noise: as in `make_perturbed_argmax`.
      maximize: False for a solver that minimises costs theta. The loss is then
        `<theta, y> - E min <theta - sigma Z, y'>`, convex in the costs, with the gradient
        `y - E[y*]`.
      multiplicative: as in `make_perturbed_argmax`. The gradient is
        `E[exp(sigma Z - sigma^2 / 2) y*] - y`.
      objective: as in `make_perturbed_max`; for `<theta, g(y)> + h(y)` the gradient is
        `E[g(y*)] - g(y)`.
      use_baseline: serves derivatives of second order and above, as do the options that follow.
      symmetrize: as in `make_perturbed_max`.
      batch_size: as in `make_perturbed_argmax`.
      sampler: as in `make_perturbed_argmax`; of first derivatives too.
      degree: as in `make_perturbed_argmax`.
      mesh: as in `make_perturbed_argmax`.

    Returns:
      A function `loss(key, theta, y_true, *args, **kwargs)` that returns an estimate of L, a
      scalar. y_true has the structure and shapes of theta (where an objective is given, those of
      solutions), in any dtype; a mean of solutions will do as well. `key` is one PRNG key; it is
      consumed. For a batch, `jax.vmap` over keys, scores and solutions, and average.

    Raises:
      TypeError: at construction or call, where an argument is not of the kind described.
      ValueError: where argmax_fun's result or y_true does not have the shape of theta, and as in
        `make_perturbed_max`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> loss = px.make_fenchel_young_loss(px.solvers.one_hot_argmax, num_samples=1, sigma=1.0)
      >>> theta, y_true = jnp.array([0.1, -0.2, 0.3]), jnp.array([0, 1, 0])
      >>> for key in jax.random.split(jax.random.key(0), 200):  # gradient descent
      ...     theta = theta - 0.1 * jax.grad(loss, argnums=1)(key, theta, y_true)
      >>> print(jnp.argmax(theta))
      1

    References:
      - Berthet et al., Learning with Differentiable Perturbed Optimizers, 2020, arXiv:2002.08676
      - Blondel, Martins and Niculae, Learning with Fenchel-Young Losses, 2019, arXiv:1901.02324
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
    names = ("key", "theta", "y_true")

    def fenchel_young_loss(*args: Any, **kwargs: Any) -> Array:
        key, theta, y_true, *rest = leading(names, args, kwargs)
        expected = perturbed_max(key, theta, *rest, **kwargs)
        if objective is None:
            y = same_shapes("y_true", y_true, theta)
            chosen = inner_product(
                [jnp.asarray(v) for v in jax.tree.leaves(theta)], y, expected.dtype
            )
        else:
            value = objective_value(objective, expected.dtype)
            chosen = value(theta, y_true, *rest, **kwargs)
        return expected - chosen if layer.maximize else chosen - expected

    does = f"Estimates the Fenchel-Young loss of {{name}} from {num_samples} solutions."
    maker = "make_fenchel_young_loss"
    describe(fenchel_young_loss, "fenchel_young_loss_of", argmax_fun, names, maker, does)
    return fenchel_young_loss
