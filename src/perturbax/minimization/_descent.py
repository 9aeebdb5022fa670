"""Stepping with an optimiser of optax along the smoothed function's estimated gradient."""

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


def descent(setup: Setup, optimizer: TracedOptimizer) -> Method:
    """The method: estimate the gradient, hand it to the optimiser, look at the signal."""
    objective, sigma = setup.objective, setup.sigma
    num_samples = setup.num_samples << setup.doublings
    grows = setup.grows and setup.doublings < _MOST_DOUBLINGS
    adapts = sigma == ADAPTED
    looks = adapts or grows
    period = max(1, math.ceil(_SHARE_OF_CENTRES / num_samples))
    dtype = objective.dtype
    choose, made = sweep(setup), SWEEP_EVALUATIONS if adapts else 0

    def scale_of(operands: Operands, state: Descent, count: Array) -> Any:
        if adapts:
            return jax.tree.map(lambda s: state.multiple * s, operands.scale)
        return given_sigma(sigma, operands, count)

    def init(
        operands: Operands, keys: tuple[Array, Array], u: Any, value: Array
    ) -> tuple[Descent, Start]:
        multiple = choose(operands, keys[0], u) if adapts else jnp.ones(())
        state = Descent(
            point=u,
            optimizer=optimizer.start(operands.optimizer, u),
            multiple=jnp.asarray(multiple, dtype),
            sum=jax.tree.map(lambda v: jnp.zeros(v.shape, dtype), u) if looks else (),
            noise=jnp.zeros((), dtype),
            signal=jnp.zeros((), dtype),
        )
        return state, Start(u, value, jnp.asarray(made, jnp.int32))

    def step(
        operands: Operands, state: Descent, keys: tuple[Array, Array], count: Array
    ) -> tuple[Descent, Step]:
        draw_key, fun_key = keys
        scale = scale_of(operands, state, count)

        def value(u: Any) -> tuple[Array, Array]:
            found = objective.value(operands.function, fun_key, u)
            return found, found

        smooth = make_perturbed_fun(
            value,
            num_samples,
            scale,
            setup.law(operands),
            batch_size=setup.batch_size,
            sampler=setup.sampler,
            degree=setup.degree,
            has_aux=True,
        )
        # The plan tells whether the estimate evaluates the function at its centre, too.
        nets = RULE.nets_for_errors if looks else RULE.nets
        plan = smooth.prepare(draw_key, state.point, (), {}, num_nets=nets).plan
        if looks:
            found = estimate(smooth, draw_key, state.point)
            mean, error, gradient = found.value, found.value_error, found.gradient
            gradient_error = found.gradient_error
        else:
            slope = jax.value_and_grad(smooth, argnums=1, has_aux=True)
            (mean, values), gradient = slope(draw_key, state.point)
            # Not by jnp.std, which adds the values up once more.
            spread = jnp.sqrt(jnp.mean((values - mean) ** 2))
            error = spread / math.sqrt(max(1, num_samples - 1))
            gradient_error = None
        finite = jnp.stack([jnp.isfinite(v).all() for v in jax.tree.leaves(gradient)]).all()
        given = jax.tree.map(
            lambda g, u: jnp.where(finite, g, 0).astype(u.dtype), gradient, state.point
        )
        updates, optimizer_state = optimizer.step(
            operands.optimizer, given, state.optimizer, state.point
        )
        moved = jax.tree.map(lambda u, d: (u + d).astype(u.dtype), state.point, updates)
        # A step without a gradient is not made, and does not reach the optimiser's averages.
        moved = where(finite, moved, state.point)
        optimizer_state = where(finite, optimizer_state, state.optimizer)

        evaluated = count % period == 0
        hard = lax.cond(
            evaluated,
            lambda: objective.value(operands.function, fun_key, state.point),
            lambda: jnp.full((), jnp.nan, dtype),
        )
        each = coordinate_scales(scale, state.point).astype(dtype)
        told = Step(
            smoothed_value=mean,
            standard_error=error,
            hard_value=hard,
            # One for all is told as it is, without what logarithms round.
            sigma=jnp.where((each == each[0]).all(), each[0], jnp.exp(jnp.mean(jnp.log(each)))),
            most_noise=jnp.max(each),
            candidate=state.point,
            candidate_value=hard,
            centre=state.point,
            evaluations=num_samples + plan.evaluates_at_x + evaluated.astype(jnp.int32),
            wants_more=jnp.zeros((), bool),
        )
        state = state._replace(point=moved, optimizer=optimizer_state)
        if looks:
            state, weak = looked(state, gradient, gradient_error, finite, count)
            told = told._replace(wants_more=weak)
        return state, told

    def squares(tree: Any) -> Array:
        leaves = [v.astype(dtype).ravel() for v in jax.tree.leaves(tree)]
        return jnp.sum(jnp.concatenate(leaves) ** 2)

    def looked(
        state: Descent, gradient: Any, errors: Any, finite: Array, count: Array
    ) -> tuple[Descent, Array]:
        total = jax.tree.map(
            lambda s, g: s + jnp.where(finite, g, 0).astype(dtype), state.sum, gradient
        )
        noise = state.noise + jnp.where(finite, squares(errors), 0)
        signal = state.signal + jnp.where(finite, squares(gradient), 0)
        over = (count + 1) % _WINDOW == 0
        # Of gradients that are noise alone, the sum's square is on average the sum of squares.
        by_chance = squares(total) <= 2 * noise
        multiple = state.multiple
        if adapts:
            multiple = multiple * jnp.where(over & by_chance, _LOWERED, 1).astype(dtype)
        weak = over & (signal - noise < _WEAK * noise) if grows else jnp.zeros((), bool)
        fresh = state._replace(
            sum=where(over, jax.tree.map(jnp.zeros_like, total), total),
            noise=jnp.where(over, 0, noise),
            signal=jnp.where(over, 0, signal),
            multiple=multiple,
        )
        return fresh, weak

    return Method(
        most_evaluations=num_samples + 2,
        init=init,
        init_evaluations=made,
        step=step,
    )
