"""Callbacks that take many points see them along one leading axis, whatever vmaps stand outside.

JAX gives a callback with vmap_method "expand_dims" or "broadcast_all" one more axis for each vmap.
Under a vmap of the user's it would see two, one for the samples and one for the batch, and code
that works on a batch of points would fail, or do something else. Here those axes are one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.custom_batching import custom_vmap
from jax.extend import core

from ._jaxprs import equations, inner_of, inner_replaced

_OF_MANY = ("expand_dims", "broadcast_all")


def takes_many(jaxpr: core.Jaxpr) -> bool:
    """Whether there is a callback that takes many points, in these operations or inside them."""
    return any(map(_is_of_many, equations(jaxpr)))


def along_one_axis(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The same operations, whose callbacks of many points have one leading axis for all vmaps."""
    eqns = [_callback(e) if _is_of_many(e) else _with_inner(e) for e in jaxpr.eqns]
    return jaxpr.replace(eqns=eqns)


def _is_of_many(eqn: Any) -> bool:
    return eqn.primitive.name == "pure_callback" and eqn.params["vmap_method"] in _OF_MANY


def called_back(eqn: Any) -> Callable[..., Any] | None:
    """The function outside JAX whose results an operation takes; not one that only prints."""
    named = eqn.primitive.name in ("pure_callback", "io_callback")
    return eqn.params["callback"].callback_func if named else None


def _with_inner(eqn: Any) -> Any:
    if not any(takes_many(inner) for inner, _ in inner_of(eqn)):
        return eqn
    return eqn.replace(params=inner_replaced(eqn.params, along_one_axis))


def _callback(eqn: Any) -> Any:
    """The operation, as one with a rule for vmap of its own."""
    wide = eqn.params["vmap_method"] == "broadcast_all"

    def bind(avals: Any, *args: Array) -> list[Array]:
        return eqn.primitive.bind(*args, **{**eqn.params, "result_avals": tuple(avals)})

    @custom_vmap
    def one(*args: Array) -> list[Array]:
        return bind(eqn.params["result_avals"], *args)

    @one.def_vmap
    def rule_of_one(axis_size: int, in_batched: Any, *args: Array) -> Any:
        parts = []
        for v, batched in zip(args, in_batched, strict=True):
            v = v if batched else jnp.asarray(v)[None]
            parts.append(jnp.broadcast_to(v, (axis_size, *v.shape[1:])) if wide else v)
        out = many(axis_size)(*parts)
        return out, [True] * len(out)

    def many(count: int) -> Any:
        """`one` for `count` points; what does not depend on the point has a leading axis of 1."""

        @custom_vmap
        def of_points(*args: Array) -> list[Array]:
            avals = [ShapedArray((count, *v.shape), v.dtype) for v in eqn.params["result_avals"]]
            return bind(avals, *args)

        @of_points.def_vmap
        def rule(axis_size: int, in_batched: Any, *args: Array) -> Any:
            total, parts = axis_size * count, []
            for v, batched in zip(args, in_batched, strict=True):
                if not batched and v.shape[0] == 1 and not wide:
                    parts.append(v)
                    continue
                v = v if batched else jnp.broadcast_to(v[None], (axis_size, *v.shape))
                v = jnp.broadcast_to(v, (axis_size, count, *v.shape[2:]))
                parts.append(v.reshape(total, *v.shape[2:]))
            out = many(total)(*parts)
            return [v.reshape(axis_size, count, *v.shape[1:]) for v in out], [True] * len(out)

        return of_points

    specs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    [made] = jax.make_jaxpr(one)(*specs).jaxpr.eqns
    return made.replace(invars=eqn.invars, outvars=eqn.outvars)
