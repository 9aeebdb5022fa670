"""Functions compiled by the operations they consist of, not by which object they are."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from ._signature import TracedFunction, trace


def compiled_map(fun: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """fun(row, *others) for each row of the first argument in turn, compiled now.

    Returns a function of arguments like these, pytrees of arrays.

    JAX knows functions by identity, so that one made anew is compiled anew. Here a function of the
    same operations as one before has the same program, of which what it closes over, as far as
    these are arrays, is an argument. It is traced every time.
    """
    leaves, tree = jax.tree.flatten(args)

    def all_of(*values: Any) -> Any:
        rows, *others = jax.tree.unflatten(tree, values)
        return jax.lax.map(lambda row: fun(row, *others), rows)

    traced, operands = trace(all_of, *leaves)
    if not jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        _called.lower(traced, operands, *args).compile()  # which calls find
    return functools.partial(_called, traced, operands)


@functools.partial(jax.jit, static_argnums=0)
def _called(traced: TracedFunction, operands: Any, *args: Any) -> Any:
    return jax.tree.unflatten(traced.out_tree, traced(operands, *jax.tree.leaves(args)))
