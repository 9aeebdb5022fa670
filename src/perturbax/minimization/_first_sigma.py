"""Sigma of the first steps: as it is given, or by a few samples at each of several widths."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .. import _leaves
from .._perturb import make_perturbed_fun
from ..sampling._independent import Independent
from ..scale._matrices import is_matrix, row_lengths
from ..scale._scales import one_each, scale_leaves
from ._setup import Setup, Sigma
from ._states import Operands

# Multiples of the problem's scale that a sweep looks at.
_MULTIPLES = tuple(4.0**-k for k in range(6))
# Samples at each of them.
_SAMPLES = 12
SWEEP_EVALUATIONS = _SAMPLES * len(_MULTIPLES)


def given_sigma(sigma: Sigma, operands: Operands, count: Array) -> Any:
    """Sigma of a step, where it is given as numbers or as a schedule of steps."""
    if isinstance(sigma, str):
        return operands.sigma
    return jax.tree.unflatten(sigma.out_tree, sigma(operands.sigma, count))


def coordinate_scales(scale: Any, u: Any) -> Array:
    """The scale of the noise of each coordinate, flat; of a matrix, the lengths of its rows."""
    leaves, names, _ = _leaves.perturbed_leaves(u)
    scales = one_each(scale_leaves(scale, u, leaves, names), leaves)
    each = [
        row_lengths(s.reshape(leaf.size, leaf.size))
        if is_matrix(s, leaf)
        else jnp.broadcast_to(s, leaf.shape).ravel()
        for s, leaf in zip(scales, leaves, strict=True)
    ]
    return jnp.concatenate(each)


def sweep(setup: Setup) -> Callable[[Operands, Array, Any], Array]:
    """From operands, key and u the multiple whose better half of samples has the lowest mean.

    Too small a sigma does not get far, too large a one overshoots, and on a plateau it does not
    change the value at all; a step to the better samples tells all three apart.
    """
    objective = setup.objective
    multiples = jnp.asarray(_MULTIPLES, objective.dtype)

    def choose(operands: Operands, key: Array, u: Any) -> Array:
        keys = jax.random.split(key, len(_MULTIPLES))

        def better_half(key_and_multiple: tuple[Array, Array]) -> Array:
            key, multiple = key_and_multiple
            draw_key, fun_key = jax.random.split(key)

            def twice(u: Any) -> tuple[Array, Array]:
                value = objective.value(operands.function, fun_key, u)
                return value, value

            drawn = make_perturbed_fun(
                twice,
                _SAMPLES,
                jax.tree.map(lambda scale: multiple * scale, operands.scale),
                setup.law(operands),
                batch_size=setup.batch_size,
                degree=0,
                has_aux=True,
            )
            return _mean_of_better_half(drawn(draw_key, u)[1])

        found = lax.map(better_half, (keys, multiples))
        # Where no sigma changes anything, the largest looks furthest.
        return multiples[jnp.argmin(found)]

    return choose


def _mean_of_better_half(values: Array) -> Array:
    """Of values that failed as infinite ones; infinite where all are the same, as on a plateau."""
    ordered = jnp.sort(jnp.where(jnp.isfinite(values), values, jnp.inf))
    moved = ordered[-1] > ordered[0]
    return jnp.where(moved, jnp.mean(ordered[: len(ordered) // 2]), jnp.inf)


# Samples at each multiple of which the widest is chosen.
_FEW = 4
WIDEST_EVALUATIONS = _FEW * len(_MULTIPLES)  # at most


class Look(NamedTuple):
    """What a choice of the first sigma has seen.

    Attributes:
      level: index of the next multiple of the problem's scale.
      found: whether the last one was good.
      lowest: the lowest value at each multiple, infinite where all were the same.
      points: where the function was evaluated, with a row for each multiple and sample.
      values: what it was, NaN where it was not evaluated.
    """

    level: Array
    found: Array
    lowest: Array
    points: Any
    values: Array


def widest(setup: Setup) -> Callable[..., tuple[Array, Any, Array, Array]]:
    """The largest multiple one of whose samples is no worse than the start, and what it saw.

    Points and values of all samples, NaN for those that were not needed, and how many were, from
    operands, keys for the noise and the function, u, and the value at u.

    What is fitted to samples may be wrong about small features, so it begins wide: from there it
    gets to a small sigma in a few steps, and the other way only if what it sees is clear. It looks
    at smaller ones only until one is good: evaluations close to the start tell a search less than
    its own steps do.
    """
    objective, levels = setup.objective, len(_MULTIPLES)
    multiples = jnp.asarray(_MULTIPLES, objective.dtype)

    def choose(
        operands: Operands, keys: tuple[Array, Array], u: Any, start: Array
    ) -> tuple[Array, Any, Array, Array]:
        draw_key, fun_key = keys
        start = jnp.where(jnp.isfinite(start), start, jnp.inf)

        def where_and_what(u: Any) -> tuple[Array, tuple[Any, Array]]:
            value = objective.value(operands.function, fun_key, u)
            return value, (u, value)

        def look(seen: Look) -> Look:
            drawn = make_perturbed_fun(
                where_and_what,
                _FEW,
                jax.tree.map(lambda scale: multiples[seen.level] * scale, operands.scale),
                setup.law(operands),
                batch_size=setup.batch_size,
                sampler=Independent(),
                degree=0,
                has_aux=True,
            )
            points, values = drawn(jax.random.fold_in(draw_key, seen.level), u)[1]
            ordered = jnp.sort(jnp.where(jnp.isfinite(values), values, jnp.inf))
            lowest = jnp.where(ordered[-1] > ordered[0], ordered[0], jnp.inf)
            return Look(
                level=seen.level + 1,
                found=(lowest <= start) & jnp.isfinite(lowest),
                lowest=seen.lowest.at[seen.level].set(lowest),
                points=jax.tree.map(lambda a, b: a.at[seen.level].set(b), seen.points, points),
                values=seen.values.at[seen.level].set(values),
            )

        dtype = objective.dtype
        nothing = Look(
            level=jnp.zeros((), jnp.int32),
            found=jnp.zeros((), bool),
            lowest=jnp.full(levels, jnp.inf, dtype),
            points=jax.tree.map(lambda v: jnp.broadcast_to(v, (levels, _FEW, *v.shape)), u),
            values=jnp.full((levels, _FEW), jnp.nan, dtype),
        )
        seen = lax.while_loop(lambda seen: ~seen.found & (seen.level < levels), look, nothing)
        # Where no sigma is good, the best; where none changes anything, the largest.
        chosen = jnp.where(seen.found, seen.level - 1, jnp.argmin(seen.lowest))
        points = jax.tree.map(lambda v: v.reshape(levels * _FEW, *v.shape[2:]), seen.points)
        return multiples[chosen], points, seen.values.ravel(), _FEW * seen.level

    return choose
