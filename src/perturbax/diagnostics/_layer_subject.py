"""A layer or a loss at a point: what `diagnose` does otherwise than for a perturbed function.

Its samples are solutions, its gradient is that of its own derivative rules, and whether its solver
is exact, and optimises what it is said to, can be seen from the solutions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._call import Settings
from .._describe import Made, leading
from .._perturb import PerturbedFun, kind_of_fun
from ..scale import _scales
from ..tracing._compiled import compiled_map
from . import _variance_law
from ._subject import Pilot, Subject, equal_rows, joined
from ._variance_law import Runs

# Runs that a number of samples is cut into: a run alone tells nothing of its spread.
_CUT = 8
# What has other derivatives than by the score or Danskin's theorem.
_OTHERS = ("make_implicit_mle", "make_perturbed_distribution")
# Solutions that a solver's own are held against, at most, and by which share of the sum of the
# sizes of its terms an objective must be better, to tell more than a solver's tolerance.
_COMPARED, _SURELY_BETTER = 256, 1e-3


def subject_of(
    g: Any, key: Array, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Subject:
    """The perturbed function, layer or loss at a point.

    Raises:
      TypeError: if g is none of these, or anything is traced.
      ValueError: if it has too few samples.
    """
    if isinstance(g, PerturbedFun):
        return Subject("make_perturbed_fun", g.fun, g.settings, key, x, args, kwargs)
    if isinstance(g, Made) and g.maker.__name__ not in _OTHERS:
        known = {field.name for field in dataclasses.fields(Settings)}
        settings = Settings(**{k: v for k, v in g.arguments.items() if k in known})
        if "fun" in g.arguments:  # the derivatives are those of a perturbed function
            fun = g.arguments["fun"]
            return Subject(g.maker.__name__, fun, settings, key, x, args, kwargs)
        return LayerSubject(g, settings, key, x, args, kwargs)
    raise TypeError(
        "g must be what make_perturbed_fun, make_straight_through_fun, make_perturbed_argmax, "
        f"make_perturbed_max or make_fenchel_young_loss returned, got {kind_of_fun(g)}"
    )


class LayerSubject(Subject):
    """A perturbed argmax or maximum, or a loss, at a point."""

    least_runs: ClassVar[int] = 2

    def __init__(
        self,
        made: Made,
        settings: Settings,
        key: Array,
        x: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        """Checks what came."""
        solver = made.arguments["argmax_fun"]
        super().__init__(made.maker.__name__, solver, settings, key, x, args, kwargs)
        self.arguments, self._made = made.arguments, made
        if self.maker == "make_fenchel_young_loss":
            kwargs = dict(kwargs)
            names = "key", "theta", "y_true"
            self._y_true, *rest = leading(names, (key, x, *args), kwargs)[2:]
            args = tuple(rest)
        # What the solver gets beside scores.
        self._rest = args, kwargs
        self._scores, self._sampled_at, sigma = self._perturbation()
        self._sampled_settings = dataclasses.replace(settings, sigma=sigma)

    def _sampled(self, point: Any) -> Any:
        args, kwargs = self._rest
        return self._fun(self._scores(point), *args, **kwargs)

    def _seen(self, point: Any) -> list[Array]:
        """The scores that the solver saw, if its objective is linear in them."""
        return [self._scores(point)] if self.arguments.get("objective") is None else []

    def _perturbation(self) -> tuple[Callable[[Any], Any], Callable[[list[Array]], Any], Any]:
        """What the solver sees of a point, where noise is added, and its scale."""
        sigma = self.settings.sigma
        if self.arguments["multiplicative"]:
            # theta exp(sigma Z - sigma^2 / 2), a function of Z
            scales = _scales.scale_leaves(sigma, self._x, self.leaves, self.names)
            scales = _scales.one_each(scales, self.leaves)

            def factors(z: Any) -> Any:
                theta = [
                    (v * jnp.exp(s * one - s**2 / 2)).astype(v.dtype)
                    for v, s, one in zip(self.leaves, scales, jax.tree.leaves(z), strict=True)
                ]
                return self._merge(theta)

            zeros = lambda leaves: self._merge([jnp.zeros_like(v) for v in leaves])  # noqa: E731
            return factors, zeros, 1.0
        if self.arguments["maximize"]:
            return lambda u: u, self._merge, sigma
        negated = functools.partial(jax.tree.map, jnp.negative)
        return negated, lambda leaves: self._merge([-v for v in leaves]), sigma

    def _value_of(self, found: Any) -> Any:
        """The value at the solution that was found."""
        arguments, theta, (rest, kwargs) = self.arguments, self._x, self._rest
        if self.maker == "make_perturbed_argmax":
            return found

        def objective(y: Any) -> Any:
            if arguments["objective"] is not None:
                return arguments["objective"](theta, y, *rest, **kwargs)
            return jnp.sum(joined(jax.tree.map(jnp.multiply, theta, y)))

        if self.maker == "make_perturbed_max":
            return objective(found)
        loss = objective(found) - objective(self._y_true)
        return loss if arguments["maximize"] else -loss

    def pilot(self) -> Pilot:
        """One estimate, whose samples are cut into runs of the layer's own derivative rules."""
        values, *seen = self._rows(self._estimates(self.num_samples, 1, {}, True).kept)
        runs, found = self._runs_of_layer(*self._cut(self.num_samples), {})
        value = jax.tree.map(lambda v: np.mean(v, axis=0), found)
        error = jax.tree.map(lambda v: np.std(v, axis=0, ddof=1) / runs.num_runs**0.5, found)
        better = self._share_better(values, *seen) if seen else (0.0, 0.0)
        return Pilot(value, error, values, equal_rows(values, self._at_x), runs, {}, better)

    def _share_better(self, solutions: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
        """Of pairs of solutions, and of samples, those for which another solution is better.

        An exact solver has none: <s_i, y_i> is at least <s_i, y_j>, but for rounding. Pairs that
        differ too little to tell are left out.
        """
        told = np.isfinite(solutions).all(axis=1) & ~np.isnan(scores).any(axis=1)
        y, s = (rows[told][:_COMPARED] for rows in (solutions, scores))
        s = np.where(np.isfinite(s), s, 0)  # what is masked, no solution has
        objectives = s @ y.T  # of scores i and solution j
        losses = objectives - np.diagonal(objectives)[:, None]
        if not self.arguments["maximize"]:
            losses = -losses
        size = np.abs(s) @ np.abs(y).T
        size = size + np.diagonal(size)[:, None]
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in self.leaves)
        least = max(_SURELY_BETTER, 16 * eps) * size
        better, worse = losses > least, losses < -least
        pairs = max(int(np.sum(better | worse)), 1)
        return float(np.sum(better) / pairs), float(np.mean(better.any(axis=1))) if len(s) else 0.0

    def runs(self, num_samples: int, count: int, keep: bool = False, **changes: Any) -> Runs:
        """Some estimates, each with the sampler and degree that g would have with as many."""
        del keep
        choice = self.choose(num_samples, **changes)
        changes = {"sampler": choice.sampler, "degree": choice.degree}
        return self._runs_of_layer(num_samples, count, changes)[0]

    def _cut(self, num_samples: int) -> tuple[int, int]:
        return num_samples // _CUT - 1, _CUT

    def _runs_of_layer(
        self, num_samples: int, count: int, changes: dict[str, Any]
    ) -> tuple[Runs, Any]:
        """Gradients of a layer by its own derivative rules, and its values at all runs."""
        law, name = self.law(num_samples, **changes), (num_samples, count, repr(changes))
        compiled = functools.partial(self._compiled_layer, num_samples=num_samples, changes=changes)
        values, gradients = self._run(name, compiled, num_samples, count, self.settings.sigma)
        return _variance_law.pooled(num_samples, gradients, None, 0, law), values

    def _compiled_layer(self, keys: Array, num_samples: int, changes: dict[str, Any]) -> Any:
        # A degree that is chosen for each number of samples serves derivatives of this one.
        again = functools.partial(self._made.again, num_samples=num_samples, **changes)

        def value(leaves: list[Array], key: Array, sigma: Any) -> tuple[Array, Any]:
            found = again(sigma=sigma)(key, self._merge(leaves), *self._args, **self._kwargs)
            found = self._combined(found)
            flat = joined(found)
            return (flat[0] if flat.size == 1 else flat), found

        derive = jax.grad if self._num_outputs == 1 or self._signs is not None else jax.jacrev

        def one(key: Array, leaves: list[Array], sigma: Any) -> Any:
            gradient, found = derive(value, has_aux=True)(leaves, key, sigma)
            return found, joined(gradient)

        return compiled_map(one, keys, self.leaves, self.settings.sigma)
