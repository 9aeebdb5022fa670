"""The estimate: arguments made flat, the way to it chosen, the results in leaves."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from ..execution._plan import Operands, Plan, shaped
from ..sampling import _random_bits
from ._derivatives import expectation, value_by_formula


@partial(jax.jit, static_argnums=0)
def estimate(
    plan: Plan, key: Array, x: list[Array], sigma: list[Array], operands: Operands
) -> tuple[list[Array], list[Array]]:
    """The Monte-Carlo estimate of E[fun(x + sigma eps)]; differentiable in x, sigma and operands.

    Args:
      plan: the static part.
      key: one typed PRNG key.
      x: the perturbed leaves.
      sigma: one scale a leaf, each of which broadcasts into the leaf, or is a matrix that has the
        leaf's axes twice; or a single number for all.
      operands: what fun and the noise close over.

    Returns:
      The leaves of the value, and of aux stacked over samples.
    """
    words = _random_bits.root(key)
    has_aux = len(plan.fun.out_avals) > plan.num_outputs
    if has_aux or plan.fun.jaxpr.effects:
        # JAX allows no side effects inside a custom derivative rule (jax#11916).
        parts, aux = value_by_formula(plan, words, x, sigma, operands)
    else:
        parts, aux = expectation(plan, words, x, sigma, operands), []
    value = shaped(parts, plan.outputs, plan.output_dtypes)
    if plan.drop_missing and any(v.size for v in value):
        unknown = [jnp.all(jnp.isnan(lax.stop_gradient(v))) for v in value if v.size]
        jax.debug.callback(partial(_warn_if, plan.num_samples), _of_any(jnp.stack(unknown).all()))
    return value, aux


@custom_vmap
def _of_any(flag: Array) -> Array:
    """Whether it is so anywhere in a batch: JAX would make a program with a callback for each."""
    return flag


@_of_any.def_vmap
def _of_any_in_batch(_size: int, _batched: Any, flags: Array) -> tuple[Array, bool]:
    return _of_any(jnp.any(flags)), False


def _warn_if(num_samples: int, unknown: Array) -> None:
    if unknown:
        warnings.warn(
            f"the estimate is NaN: all {num_samples} samples are missing, as fun returned NaN at "
            "each, or the others are infinite, with both signs",
            stacklevel=2,
        )
