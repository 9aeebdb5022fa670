"""Operations inside operations: the bodies of loops, branches, jitted functions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import core


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All operations, each followed by those inside it, however deep."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner, _ in inner_of(eqn):
            yield from equations(inner)


def inner_of(eqn: core.JaxprEqn) -> list[tuple[core.Jaxpr, Sequence[Any]]]:
    """The operations right inside an operation, with what they close over."""
    return _inner(list(eqn.params.values()))


def _inner(value: Any) -> list[tuple[core.Jaxpr, Sequence[Any]]]:
    if isinstance(value, core.ClosedJaxpr):
        return [(value.jaxpr, value.consts)]
    if isinstance(value, list | tuple):
        return [found for v in value for found in _inner(v)]
    return [(value, ())] if isinstance(value, core.Jaxpr) else []


def inner_replaced(
    params: dict[str, Any], change: Callable[[core.Jaxpr], core.Jaxpr]
) -> dict[str, Any]:
    """Parameters of an operation, with all operations right inside it changed."""

    def replaced(value: Any) -> Any:
        if isinstance(value, core.ClosedJaxpr):
            return value.replace(jaxpr=change(value.jaxpr))
        if isinstance(value, list | tuple) and _inner(value):
            make = getattr(value, "_make", type(value))  # named tuples take one by one
            return make(map(replaced, value))
        return change(value) if isinstance(value, core.Jaxpr) else value

    return {k: replaced(v) for k, v in params.items()}
