"""Stepping with an optimiser of optax along the smoothed function's estimated gradient."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._perturb import make_perturbed_fun
from ..diagnostics._standard_errors import estimate
from ..estimator._default_rule import RULE
from ._first_sigma import SWEEP_EVALUATIONS, coordinate_scales, given_sigma, sweep
from ._setup import ADAPTED, Setup, TracedOptimizer
from ._states import Method, Operands, Start, Step, where

# Steps between two looks at the signal.
_WINDOW = 20
# By how much sigma is lowered where the gradients of a window do not add up to more than chance.
_LOWERED = 0.5
# Share of the gradient's square that is signal, below which a step needs more samples.
_WEAK = 0.1
# Most doublings of the number of samples.
_MOST_DOUBLINGS = 6
# The function itself is evaluated, at the centre, for a share of the evaluations no larger than
# one in as many: by itself it reads all its data, and may take as long as ten samples in a batch.
_SHARE_OF_CENTRES = 400


class Descent(NamedTuple):
    """The state of a descent.

    Attributes:
      point: where it is.
      optimizer: the optimiser's state.
      multiple: sigma, as a multiple of the problem's scale; not used where sigma is given.
      sum: of the gradients of this window.
      noise: squared standard errors of those gradients, added up.
      signal: squares of those gradients, added up.
    """

    point: Any
    optimizer: Any
    multiple: Array
    sum: Any
    noise: Array
    signal: Array


class Gradient(NamedTuple):
    """The smoothed function at a point, as the samples of a step tell it.

    Attributes:
      value: of the smoothed function.
      value_error: its standard error.
      gradient: likewise.
      gradient_error: standard errors of the gradient; None where nobody looks at them.
      evaluations: how many that took.
    """

    value: Array
    value_error: Array
    gradient: Any
    gradient_error: Any
    evaluations: int


def descent(setup: Setup, optimizer: TracedOptimizer) -> Method:
    """The method: estimate the gradient, hand it to the optimiser, look at the signal."""
    steps = OptimizerSteps(setup, optimizer)
    return Method(steps.num_samples + 2, steps.init, steps.init_evaluations, steps.step)


@dataclasses.dataclass(frozen=True)
class OptimizerSteps:
    """Start and step of a descent."""

    setup: Setup
    optimizer: TracedOptimizer

    @property
    def num_samples(self) -> int:
        """Of a step."""
        return self.setup.num_samples << self.setup.doublings

    @property
    def adapts(self) -> bool:
        """Whether sigma is the descent's own."""
        return self.setup.sigma == ADAPTED

    @property
    def init_evaluations(self) -> int:
        """Those that choose the first sigma."""
        return SWEEP_EVALUATIONS if self.adapts else 0

    @property
    def grows(self) -> bool:
        """Whether steps may take more samples."""
        return self.setup.grows and self.setup.doublings < _MOST_DOUBLINGS

    @property
    def looks(self) -> bool:
        """Whether it is asked how much of the gradients is signal."""
        return self.adapts or self.grows

    def init(
        self, operands: Operands, keys: tuple[Array, Array], u: Any, value: Array
    ) -> tuple[Descent, Start]:
        """As `Method` has it."""
        dtype = self.setup.objective.dtype
        multiple = sweep(self.setup)(operands, keys[0], u) if self.adapts else jnp.ones(())
        state = Descent(
            point=u,
            optimizer=self.optimizer.start(operands.optimizer, u),
            multiple=jnp.asarray(multiple, dtype),
            sum=jax.tree.map(lambda v: jnp.zeros(v.shape, dtype), u) if self.looks else (),
            noise=jnp.zeros((), dtype),
            signal=jnp.zeros((), dtype),
        )
        return state, Start(u, value, jnp.asarray(self.init_evaluations, jnp.int32))

    def step(
        self, operands: Operands, state: Descent, keys: tuple[Array, Array], count: Array
    ) -> tuple[Descent, Step]:
        """As `Method` has it."""
        objective, dtype = self.setup.objective, self.setup.objective.dtype
        scale = self._scale(operands, state, count)
        found = self._estimated(operands, state, scale, keys)
        finite = jnp.stack([jnp.isfinite(v).all() for v in jax.tree.leaves(found.gradient)]).all()
        given = jax.tree.map(
            lambda g, u: jnp.where(finite, g, 0).astype(u.dtype), found.gradient, state.point
        )
        updates, optimizer_state = self.optimizer.step(
            operands.optimizer, given, state.optimizer, state.point
        )
        moved = jax.tree.map(lambda u, d: (u + d).astype(u.dtype), state.point, updates)
        # A step without a gradient is not made, and does not reach the optimiser's averages.
        moved = where(finite, moved, state.point)
        optimizer_state = where(finite, optimizer_state, state.optimizer)

        evaluated = count % max(1, math.ceil(_SHARE_OF_CENTRES / self.num_samples)) == 0
        hard = lax.cond(
            evaluated,
            lambda: objective.value(operands.function, keys[1], state.point),
            lambda: jnp.full((), jnp.nan, dtype),
        )
        each = coordinate_scales(scale, state.point).astype(dtype)
        told = Step(
            smoothed_value=found.value,
            standard_error=found.value_error,
            hard_value=hard,
            # One for all is told as it is, without what logarithms round.
            sigma=jnp.where((each == each[0]).all(), each[0], jnp.exp(jnp.mean(jnp.log(each)))),
            most_noise=jnp.max(each),
            candidate=state.point,
            candidate_value=hard,
            centre=state.point,
            evaluations=found.evaluations + evaluated.astype(jnp.int32),
            wants_more=jnp.zeros((), bool),
        )
        state = state._replace(point=moved, optimizer=optimizer_state)
        if self.looks:
            state, weak = self._looked(state, found, finite, count)
            told = told._replace(wants_more=weak)
        return state, told

    def _scale(self, operands: Operands, state: Descent, count: Array) -> Any:
        if self.adapts:
            return jax.tree.map(lambda s: state.multiple * s, operands.scale)
        return given_sigma(self.setup.sigma, operands, count)

    def _estimated(
        self, operands: Operands, state: Descent, scale: Any, keys: tuple[Array, Array]
    ) -> Gradient:
        """The smoothed value and its gradient where the descent is."""
        setup = self.setup
        draw_key, fun_key = keys

        def value(u: Any) -> tuple[Array, Array]:
            found = setup.objective.value(operands.function, fun_key, u)
            return found, found

        smooth = make_perturbed_fun(
            value,
            self.num_samples,
            scale,
            setup.law(operands),
            batch_size=setup.batch_size,
            sampler=setup.sampler,
            degree=setup.degree,
            has_aux=True,
        )
        # The plan tells whether the estimate evaluates the function at its centre, too.
        nets = RULE.nets_for_errors if self.looks else RULE.nets
        plan = smooth.prepare(draw_key, state.point, (), {}, num_nets=nets).plan
        made = self.num_samples + plan.evaluates_at_x
        if self.looks:
            found = estimate(smooth, draw_key, state.point)
            return Gradient(
                found.value, found.value_error, found.gradient, found.gradient_error, made
            )
        slope = jax.value_and_grad(smooth, argnums=1, has_aux=True)
        (mean, values), gradient = slope(draw_key, state.point)
        # Not by jnp.std, which adds the values up once more.
        spread = jnp.sqrt(jnp.mean((values - mean) ** 2))
        error = spread / math.sqrt(max(1, self.num_samples - 1))
        return Gradient(mean, error, gradient, None, made)

    def _looked(
        self, state: Descent, found: Gradient, finite: Array, count: Array
    ) -> tuple[Descent, Array]:
        """The state after a look at the signal, and whether there is so little that it takes more.

        The look is at the end of a window of steps.
        """
        dtype = self.setup.objective.dtype

        def squares(tree: Any) -> Array:
            leaves = [v.astype(dtype).ravel() for v in jax.tree.leaves(tree)]
            return jnp.sum(jnp.concatenate(leaves) ** 2)

        total = jax.tree.map(
            lambda s, g: s + jnp.where(finite, g, 0).astype(dtype), state.sum, found.gradient
        )
        noise = state.noise + jnp.where(finite, squares(found.gradient_error), 0)
        signal = state.signal + jnp.where(finite, squares(found.gradient), 0)
        over = (count + 1) % _WINDOW == 0
        # Of gradients that are noise alone, the sum's square is on average the sum of squares.
        by_chance = squares(total) <= 2 * noise
        multiple = state.multiple
        if self.adapts:
            multiple = multiple * jnp.where(over & by_chance, _LOWERED, 1).astype(dtype)
        weak = over & (signal - noise < _WEAK * noise) if self.grows else jnp.zeros((), bool)
        fresh = state._replace(
            sum=where(over, jax.tree.map(jnp.zeros_like, total), total),
            noise=jnp.where(over, 0, noise),
            signal=jnp.where(over, 0, signal),
            multiple=multiple,
        )
        return fresh, weak
