"""What a function's result depends on, as far as its operations tell."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax import Array
from jax.extend import core


def varies(fun: Callable[[Array], Array], inputs: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the result can change with the argument, an array or the description of one."""
    jaxpr = jax.make_jaxpr(fun)(inputs).jaxpr
    return any(reached(jaxpr, [True] * len(jaxpr.invars)))


def reached(jaxpr: core.Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which results can change with those of the inputs that are marked."""
    changing = {v for v, flag in zip(jaxpr.invars, inputs, strict=True) if flag}

    def flags(atoms: Iterable[core.Var | core.Literal]) -> list[bool]:
        return [isinstance(v, core.Var) and v in changing for v in atoms]

    for eqn in jaxpr.eqns:
        called = _called(eqn)
        if called is not None:
            results = reached(called, flags(eqn.invars))
        else:
            results = [any(flags(eqn.invars))] * len(eqn.outvars)
        changing.update(v for v, flag in zip(eqn.outvars, results, strict=True) if flag)
    return flags(jaxpr.outvars)


def is_zero(fun: Callable[[Array], Array], inputs: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the result is zero by construction: what JAX gives for a derivative known to be."""
    [result] = _zeros(jax.make_jaxpr(fun)(inputs).jaxpr)
    return result


def _zeros(jaxpr: core.Jaxpr) -> list[bool]:
    zero: set[core.Var] = set()

    def flags(atoms: Iterable[core.Var | core.Literal]) -> list[bool]:
        return [
            v in zero if isinstance(v, core.Var) else not np.any(np.asarray(v.val)) for v in atoms
        ]

    for eqn in jaxpr.eqns:
        called = _called(eqn)
        if called is not None:
            results = _zeros(called)
        else:
            plain = eqn.primitive.name in ("broadcast_in_dim", "convert_element_type", "neg")
            results = [plain and flags(eqn.invars)[0]] * len(eqn.outvars)
        zero.update(v for v, flag in zip(eqn.outvars, results, strict=True) if flag)
    return flags(jaxpr.outvars)


def _called(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """What an operation calls, if it is a call and no more."""
    for name in ("jaxpr", "call_jaxpr"):
        called = eqn.params.get(name)
        called = getattr(called, "jaxpr", called)
        if isinstance(called, core.Jaxpr) and (
            len(called.invars) == len(eqn.invars)
            and len(called.outvars) == len(eqn.outvars)
            and eqn.primitive.name not in ("scan", "while", "shard_map")
        ):
            return called
    return None
