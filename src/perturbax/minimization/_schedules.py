"""How sigma and the number of samples begin, where they are not given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._perturb import make_perturbed_fun
from ..noise._protocol import NoiseDistribution
from ..sampling._independent import Independent
from ._problem import Objective
from ._states import Operands

# Multiples of the problem's scale that a sweep looks at.
_MULTIPLES = tuple(4.0**-k for k in range(6))
# Samples at each of them.
_SAMPLES = 12


# What stands for a sigma that is not a schedule.
ADAPTED, GIVEN = "adapted", "given"

Sigma = Callable[[Array], Array] | str


def given_sigma(sigma: Sigma, operands: Operands, count: Array) -> Any:
    """Sigma of a step, where it is given as numbers or as a schedule of steps."""
    return operands.sigma if isinstance(sigma, str) else sigma(count)


class Sweep(NamedTuple):
    """A choice of the first sigma.

    Attributes:
      choose: a multiple of the problem's scale, from (operands, key, u).
      evaluations: how many it takes.
    """

    choose: Callable[[Operands, Array, Any], Array]
    evaluations: int


def sweep(objective: Objective, noise: NoiseDistribution, batch_size: int | None) -> Sweep:
    """A sweep that takes the sigma whose better half of samples has the lowest mean.

    Too small a sigma does not get far, too large a one overshoots, and on a plateau it does not
    change the value at all; a step to the better samples tells all three apart.
    """
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
                noise,
                batch_size=batch_size,
                degree=0,
                has_aux=True,
            )
            return _mean_of_better_half(drawn(draw_key, u)[1])

        found = lax.map(better_half, (keys, multiples))
        # Where no sigma changes anything, the largest looks furthest.
        return multiples[jnp.argmin(found)]

    return Sweep(choose, _SAMPLES * len(_MULTIPLES))


def _mean_of_better_half(values: Array) -> Array:
    """Of values that failed as infinite ones; infinite where all are the same, as on a plateau."""
    ordered = jnp.sort(jnp.where(jnp.isfinite(values), values, jnp.inf))
    moved = ordered[-1] > ordered[0]
    return jnp.where(moved, jnp.mean(ordered[: len(ordered) // 2]), jnp.inf)


# Samples at each multiple of which the widest is chosen.
_FEW = 4


class Widest(NamedTuple):
    """A choice of the first sigma, whose evaluations are kept.

    Attributes:
      choose: a multiple of the problem's scale, the points where the function was evaluated, as a
        pytree of arrays along a first axis, and its values, from (operands, key, u).
      evaluations: how many it takes.
    """

    choose: Callable[[Operands, Array, Any], tuple[Array, Any, Array]]
    evaluations: int


def widest(objective: Objective, noise: NoiseDistribution, batch_size: int | None) -> Widest:
    """A choice of the largest sigma one of whose samples is no worse than the start.

    What is fitted to samples may be wrong about small features, so it begins wide: from there it
    gets to a small sigma in a few steps, and the other way only if what it sees is clear.
    """
    multiples = jnp.asarray(_MULTIPLES, objective.dtype)

    def choose(operands: Operands, key: Array, u: Any) -> tuple[Array, Any, Array]:
        fun_key, *keys = jax.random.split(key, 1 + len(_MULTIPLES))

        def look(key_and_multiple: tuple[Array, Array]) -> tuple[Array, tuple[Any, Array]]:
            key, multiple = key_and_multiple

            def where_and_what(u: Any) -> tuple[Array, tuple[Any, Array]]:
                value = objective.value(operands.function, fun_key, u)
                return value, (u, value)

            drawn = make_perturbed_fun(
                where_and_what,
                _FEW,
                jax.tree.map(lambda scale: multiple * scale, operands.scale),
                noise,
                batch_size=batch_size,
                sampler=Independent(),
                degree=0,
                has_aux=True,
            )
            points, values = drawn(key, u)[1]
            ordered = jnp.sort(jnp.where(jnp.isfinite(values), values, jnp.inf))
            lowest = jnp.where(ordered[-1] > ordered[0], ordered[0], jnp.inf)
            return lowest, (points, values)

        lowest, (points, values) = lax.map(look, (jnp.stack(keys), multiples))
        start = objective.value(operands.function, fun_key, u)
        good = lowest <= jnp.where(jnp.isfinite(start), start, jnp.inf)
        good = good & jnp.isfinite(lowest)
        # Where no sigma is good, the best; where none changes anything, the largest.
        first = jnp.where(good.any(), jnp.argmax(good), jnp.argmin(lowest))
        flat = jax.tree.map(lambda v: v.reshape(v.shape[0] * v.shape[1], *v.shape[2:]), points)
        flat = jax.tree.map(lambda v, begin: jnp.concatenate([v, begin[None]]), flat, u)
        return multiples[first], flat, jnp.append(values.ravel(), start)

    return Widest(choose, _FEW * len(_MULTIPLES) + 1)
