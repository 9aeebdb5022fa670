"""Custom derivative rules that vmap, jit and differentiation may be applied to in any order.

JAX differentiates what vmap makes of a jitted function with a custom rule in it only if the rule's
results are batched along the same axis as the function's own (jax#16374). Where a result of the
function does not depend on what is batched and its derivative does (such as a zero with a
derivative), it sums cotangents over the batch, without a word, or fails. Here results are batched
along axis 0 as soon as any argument is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from ._broadcasting import where


def with_jvp(
    fun: Callable[..., Any],
    jvp: Callable[..., tuple[Any, Any]],
    num_static: int = 0,
    symbolic_zeros: bool = False,
) -> Any:
    """`fun` with the derivative rule `jvp`, as `jax.custom_jvp` would have it.

    Args:
      fun: a function of `num_static` static arguments and then of pytrees of arrays.
      jvp: its rule: a function of the static arguments, the others, and their tangents.
      num_static: how many arguments are static.
      symbolic_zeros: whether the rule is told which tangents are known to be zero.

    Returns:
      The function with its rule.
    """

    def primal(*args: Any) -> Any:
        return aligned(fun(*args), args[num_static:])

    def rule(*args: Any) -> tuple[Any, Any]:
        return aligned(tuple(jvp(*args)), args[-2])

    primal.__name__ = fun.__name__
    made = jax.custom_jvp(primal, nondiff_argnums=tuple(range(num_static)))
    made.defjvp(rule, symbolic_zeros=symbolic_zeros)
    return made


def aligned(values: Any, inputs: Any) -> Any:
    """`values` unchanged; under vmap batched along axis 0, if any of the inputs is batched."""
    leaves = jax.tree.leaves(inputs)
    if not leaves:
        return values
    # Always false, and batched as soon as an input is; XLA removes it. By lax, for JAX traces the
    # functions of jax.numpy several times as slowly.
    batched = functools.reduce(lax.bitwise_or, map(_never, leaves))
    return jax.tree.map(lambda v: _leading(lax.select(batched, v, v)), values)


def _never(leaf: Any) -> Array:
    """False."""
    leaf = leaf if isinstance(leaf, Array) else jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    none = lax.slice(leaf, (0,) * leaf.ndim, (0,) * leaf.ndim) if leaf.ndim else leaf
    return lax.reduce_or(lax.ne(none, none), tuple(range(leaf.ndim)))


def _leading(value: Array) -> Array:
    """The same; both operations have the batch axis first."""
    return lax.squeeze(lax.expand_dims(value, (0,)), (0,))


def is_live(tangent: Any) -> bool:
    """Whether a tangent is not known to be zero."""
    return not isinstance(tangent, SymbolicZero)


def any_live(tangents: Any) -> bool:
    """Whether any of the leaves is not known to be zero."""
    return any(map(is_live, jax.tree.leaves(tangents)))


def live_jvp(fun: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """jax.jvp along the arguments whose tangents are not known to be zero, and those alone."""
    leaves, tree = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents)
    live = [i for i, t in enumerate(dots) if is_live(t)]

    def restricted(*values: Array) -> Any:
        merged = list(leaves)
        for i, value in zip(live, values, strict=True):
            merged[i] = value
        return fun(*jax.tree.unflatten(tree, merged))

    return jax.jvp(restricted, [leaves[i] for i in live], [dots[i] for i in live])


def _departure_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    return departure(x), where(jnp.isfinite(x), x_dot, 0)


# x - stop_gradient(x): zero, also where x is infinite or NaN; such x have no derivative.
departure = with_jvp(jnp.zeros_like, _departure_jvp)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _underived(message: str, value: Array) -> Array:
    del message
    return value


@functools.partial(_underived.defjvp, symbolic_zeros=True)
def _underived_jvp(message: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    if is_live(tangents[0]):
        raise NotImplementedError(message)
    return primals[0], jnp.zeros_like(primals[0])


def without_derivatives(message: str, values: Any) -> Any:
    """A pytree of arrays as it is; derivatives of it raise NotImplementedError with the message."""
    return jax.tree.map(
        lambda v: _underived(message, v) if jnp.issubdtype(v.dtype, jnp.inexact) else v, values
    )
