"""The compiled parts of a run: its start, a block of steps, and the evaluation of what it found."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..sampling._random_bits import fold_in_and_split
from ._descent import descent
from ._problem import Objective, evaluations
from ._result import MinimizeHistory
from ._setup import Setup
from ._states import (
    CONVERGED,
    EXHAUSTED,
    NOT_FINITE,
    ROUNDING,
    RUNNING,
    Method,
    Operands,
    Run,
    where,
)
from ._surrogate_search import surrogate_search

# Steps without progress after which a run ends.
_PATIENCE = 30


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """JAX's settings for what is not the user's: fun was traced before, under those that were set.

    Optax's operations do not keep to strict rules; NaN and infinity stand for what is missing.
    """
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield


def method_of(setup: Setup) -> Method:
    """How to step."""
    return surrogate_search(setup) if setup.optimizer is None else descent(setup, setup.optimizer)


@functools.partial(jax.jit, static_argnums=0)
def begin(setup: Setup, operands: Operands, key: Array, u: Any) -> Run:
    """The state before the first step."""
    objective, method = setup.objective, method_of(setup)
    steps_key, init_key, *two = jax.random.split(key, 4)
    first, second = evaluations(objective, operands.function, jnp.stack(two), u)
    state, told = method.init(operands, (init_key, two[1]), u, second)
    # What a key draws may be the same twice, or fail.
    differs = (first != second) & jnp.isfinite(first) & jnp.isfinite(second)
    noisy = differs | objective.uses_key
    dtype = objective.dtype
    infinite = jnp.asarray(jnp.inf, dtype)
    zero = jnp.zeros((), jnp.int32)
    return Run(
        key=steps_key,
        method=state,
        steps=zero,
        evaluations=2 + told.evaluations,
        noisy=noisy,
        best=where(noisy, u, told.candidate),
        best_value=jnp.where(
            noisy | ~jnp.isfinite(told.candidate_value), infinite, told.candidate_value
        ),
        centre=u,
        reference=infinite,
        patience=zero,
        status=zero,
        wants_more=jnp.zeros((), bool),
    )


def step(setup: Setup, operands: Operands, run: Run, budget: Array) -> tuple[Run, MinimizeHistory]:
    """One step, and its row of the history."""
    objective, method = setup.objective, method_of(setup)
    keys = fold_in_and_split(run.key, run.steps)
    state, told = method.step(operands, run.method, keys, run.steps)
    made = run.evaluations + told.evaluations
    lowest = jnp.where(run.noisy, told.smoothed_value, told.candidate_value)
    better = lowest < run.best_value
    best = where(better, where(run.noisy, told.centre, told.candidate), run.best)
    best_value = jnp.where(better, lowest, run.best_value)

    improved = told.smoothed_value < run.reference - jnp.maximum(operands.tol, 0)
    patience = jnp.where(improved, 0, run.patience + 1)
    impatient = patience >= _PATIENCE
    finest = [
        float(jnp.finfo(v.dtype).eps) * jnp.max(jnp.abs(v)).astype(objective.dtype)
        for v in jax.tree.leaves(told.centre)
        if v.size
    ]
    finest = jnp.stack(finest)
    # A narrow coordinate, whose noise is limited, is not all of them.
    lost = (told.sigma <= jnp.min(finest)) & (told.most_noise <= jnp.max(finest))
    left = jnp.where(run.noisy, budget[1], budget[0]) - made
    status = jnp.where(left < method.most_evaluations, EXHAUSTED, RUNNING)
    status = jnp.where(impatient & (operands.tol >= 0), CONVERGED, status)
    status = jnp.where(lost, ROUNDING, status)
    status = jnp.where(impatient & ~jnp.isfinite(run.reference), NOT_FINITE, status)
    row = MinimizeHistory(
        evaluations=made,
        smoothed_value=told.smoothed_value,
        standard_error=told.standard_error,
        hard_value=told.hard_value,
        best_value=best_value,
        sigma=told.sigma,
    )
    run = run._replace(
        method=state,
        steps=run.steps + 1,
        evaluations=made,
        best=best,
        best_value=best_value,
        centre=told.centre,
        reference=jnp.where(improved, told.smoothed_value, run.reference),
        patience=patience,
        status=status.astype(jnp.int32),
        wants_more=told.wants_more,
    )
    return run, row


def empty_history(objective: Objective) -> MinimizeHistory:
    """One without rows."""
    column = np.zeros(0, objective.dtype)
    return MinimizeHistory(np.zeros(0, np.int32), column, column, column, column, column)


def joined(objective: Objective, parts: list[MinimizeHistory]) -> MinimizeHistory:
    """One history of all parts, on the host; of none, an empty one."""
    return jax.tree.map(lambda *c: np.concatenate(c), empty_history(objective), *parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def block(
    setup: Setup,
    length: int,
    operands: Operands,
    run: Run,
    most: Array,
    budget: Array,
) -> tuple[Run, MinimizeHistory]:
    """At most `most` steps, until the run ends or wants more samples.

    Args:
      setup: how.
      length: static, of the history; at least `most`.
      operands: numbers of the run.
      run: its state.
      most: steps to make.
      budget: evaluations that steps may use, of a function without noise and of a noisy one.

    Returns:
      The state, and the history, whose rows behind the steps that were made are NaN.
    """
    # One array: writing to each by itself takes as long as a small step.
    evaluations = jnp.zeros(length, jnp.int32)
    table = jnp.full((length, 5), jnp.nan, setup.objective.dtype)
    method = method_of(setup)
    left = jnp.where(run.noisy, budget[1], budget[0]) - run.evaluations
    ended = (left < method.most_evaluations) & (run.status == RUNNING)
    run = run._replace(
        status=jnp.where(ended, EXHAUSTED, run.status), wants_more=jnp.zeros((), bool)
    )
    first = run.steps

    def goes_on(carry: tuple[Run, Array, Array]) -> Array:
        run = carry[0]
        return (run.status == RUNNING) & ~run.wants_more & (run.steps - first < most)

    def body(carry: tuple[Run, Array, Array]) -> tuple[Run, Array, Array]:
        run, evaluations, table = carry
        after, row = step(setup, operands, run, budget)
        at, (made, *row) = run.steps - first, jax.tree.leaves(row)
        write = lax.dynamic_update_index_in_dim
        return after, write(evaluations, made, at, 0), write(table, jnp.stack(row), at, 0)

    run, evaluations, table = lax.while_loop(goes_on, body, (run, evaluations, table))
    return run, MinimizeHistory(evaluations, *table.T)


class Found(NamedTuple):
    """What a run found, evaluated anew."""

    u: Any
    value: Array
    value_error: Array
    evaluations: Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def finish(objective: Objective, repeats: int, operands: Operands, run: Run, last: Any) -> Found:
    """Evaluates the best point, of a noisy function three times `repeats` times.

    Args:
      objective: what is minimised.
      repeats: evaluations that the value of a noisy function is the mean of.
      operands: numbers of the run.
      run: its state.
      last: where an optimiser ended, which is tried as well; None for none.
    """
    key = jax.random.fold_in(run.key, np.iinfo(np.int32).max)

    def once() -> tuple[Any, Array, Array, Array]:
        value = objective.value(operands.function, key, run.best)
        if last is None:
            return run.best, value, jnp.zeros_like(value), run.evaluations + 1
        there = objective.value(operands.function, key, last)
        better = (there < value) | jnp.isnan(value)
        u, value = where(better, (last, there), (run.best, value))
        return u, value, jnp.zeros_like(value), run.evaluations + 2

    def several() -> tuple[Any, Array, Array, Array]:
        def values(u: Any, key: Array) -> Array:
            return evaluations(objective, operands.function, jax.random.split(key, repeats), u)

        first, second = jax.random.split(key)
        end = run.centre if last is None else last
        # The centre with the lowest smoothed value and the last one, by the same keys; the better
        # of the two is evaluated once more, for a value that was not chosen for being low.
        again = jax.random.clone(first)
        both = jnp.stack([values(run.best, first), values(end, again)])
        known = jnp.isfinite(both)
        # What failed counts as worse than all values, by as much as these range over: failing does
        # not make a point good.
        worst = jnp.max(jnp.where(known, both, -jnp.inf))
        worse = 2 * worst - jnp.min(jnp.where(known, both, jnp.inf))
        means = jnp.mean(jnp.where(known, both, worse), axis=1)
        safer = known[1].sum() > known[0].sum()
        better = (means[1] < means[0]) | ((means[1] == means[0]) & safer)
        chosen = where(better, end, run.best)
        fresh = values(chosen, second)
        known = jnp.isfinite(fresh)
        # One value alone tells no error.
        others = jnp.where(known.sum() > 1, known.sum() - 1, jnp.nan)
        error = jnp.std(fresh, where=known) / jnp.sqrt(others)
        made = run.evaluations + 3 * repeats
        return chosen, jnp.mean(fresh, where=known), error.astype(objective.dtype), made

    return Found(*lax.cond(run.noisy, several, once))
