"""How sigma and the number of samples begin, where they are not given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._perturb import make_perturbed_fun
from ..noise._protocol import NoiseDistribution
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
            values = drawn(draw_key, u)[1]
            values = jnp.sort(jnp.where(jnp.isfinite(values), values, jnp.inf))
            moved = values[-1] > values[0]
            return jnp.where(moved, jnp.mean(values[: _SAMPLES // 2]), jnp.inf)

        found = lax.map(better_half, (keys, multiples))
        # Where no sigma changes anything, the largest looks furthest.
        return multiples[jnp.argmin(found)]

    return Sweep(choose, _SAMPLES * len(_MULTIPLES))
