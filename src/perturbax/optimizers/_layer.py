r"""Perturbed optimizers: E[y*(theta + sigma Z)], and the expected maximum that it is a gradient of.

    y*(u) = argmax_y <u, y>,   F(theta, sigma) = E max_y <u, y>,   u = theta + sigma Z

F is a perturbed function like any other, but its first derivatives need no score (Danskin):

    dF/dtheta = E[y*(u) du/dtheta],   dF/dsigma = <E[y*(u) du/dsigma]>

Both are perturbed functions again, so their own derivatives are those of make_perturbed_fun. The
Jacobian of the first is a Hessian, hence symmetric: the mean of an estimate and its transpose is
unbiased too, and has less variance.

All this is written for maximisers. A minimiser of costs is a maximiser of the scores -theta.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import _checks, _leaves
from .._call import Settings, evaluate, prepare
from .._describe import leading
from .._types import Fun, PyTree
from ..scale import _scales
from ..tracing._signature import trace
from ._perturbed_scores import Perturbation, check_multiplicative, scales_of, score_leaves


class Drawn(NamedTuple):
    """Noise as the solver's scores are perturbed by it: v, and how; see `_perturbed_scores`."""

    perturbation: Perturbation
    v: list[Array]


class Given(NamedTuple):
    """Arguments of a call, checked.

    Attributes:
      key: one typed PRNG key.
      leaves: the scores.
      scales: one for each leaf.
      tree: structure of the scores.
      rest: further positional arguments.
    """

    key: Array
    leaves: list[Array]
    scales: list[Array]
    tree: Any
    rest: list[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """What perturbed optimizers have in common: the solver, the noise, and how it is applied.

    Attributes:
      argmax_fun: the solver.
      settings: how scores are perturbed.
      maximize: whether the solver maximises.
      multiplicative: whether scores are perturbed by a factor.
    """

    argmax_fun: Fun
    settings: Settings
    maximize: bool
    multiplicative: bool

    def __post_init__(self) -> None:
        """Checks all that can be checked before a call."""
        _checks.check_fun(self.argmax_fun, "argmax_fun")
        checked = {
            "maximize": _checks.check_bool(self.maximize, "maximize"),
            "multiplicative": check_multiplicative(self.multiplicative, self.settings.noise),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """What a call (key, theta, *args, **kwargs) came with; its names are taken from kwargs."""
        key, theta, *rest = leading(("key", "theta"), args, kwargs)
        key = _checks.check_key(key, theta)
        leaves, names, tree = score_leaves(theta)
        scales = scales_of(self.settings.sigma, theta, leaves, names, self.multiplicative)
        return Given(key, leaves, scales, tree, rest)

    def unsigned(self, tree: Any, u: list[Array]) -> Any:
        """What the solver sees of perturbed scores u: themselves, or costs."""
        return jax.tree.unflatten(tree, u if self.maximize else [-v for v in u])

    @property
    def has_traced_scales(self) -> bool:
        """Whether a scale may be differentiated with respect to."""
        return _checks.is_traced(self.settings.sigma)

    def has_traced_noise(self, num_scores: int) -> bool:
        """Whether a parameter of the noise may be differentiated with respect to."""
        _, parameters = trace(self.settings.noise.log_prob, jnp.zeros(num_scores))
        return _checks.is_traced(parameters)

    def inputs(self, leaves: list[Array], scales: list[Array]) -> list[Array]:
        """What the estimate is a function of: scores, and scales as far as they are traced."""
        leaves = leaves if self.maximize else [-v for v in leaves]
        return [*leaves, *(scales if self.has_traced_scales else [])]

    def split(self, parts: PyTree, scales: list[Array]) -> tuple[list[Array], list[Array]]:
        """`inputs` undone: scores and scales."""
        if not self.has_traced_scales:
            return list(parts), scales
        return list(parts[: len(parts) - len(scales)]), list(parts[len(parts) - len(scales) :])

    def expectation(
        self, solve: Fun, key: Array, theta: list[Array], scales: list[Array]
    ) -> list[Array]:
        """The leaves of E[solve(u, Drawn(perturbation, v))]."""
        dtype = _leaves.noise_dtype(theta)
        perturbation = Perturbation(theta, scales, self.multiplicative, dtype)
        settings = dataclasses.replace(self.settings, sigma=perturbation.scale())

        def fun(v: list[Array]) -> PyTree:
            return solve(perturbation.point(v), Drawn(perturbation, v))

        value = jax.tree.leaves(evaluate(prepare(settings, fun, key, perturbation.location())))
        return _scales.nan_unless_valid(value, scales) if self.has_traced_scales else value
