"""Functions compiled by the operations they consist of: one like another meets its program."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from ._signature import TracedFunction, trace


def compiled(fun: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`fun` as a program for arguments like these, pytrees of arrays.

    JAX knows functions by identity, so that one made anew would be compiled anew. Here a function
    of the same operations as one before has the same program; arrays that it closes over may be
    others.
    """
    leaves, tree = jax.tree.flatten(args)
    traced, operands = trace(lambda *values: fun(*jax.tree.unflatten(tree, values)), *leaves)
    return functools.partial(_called.lower(traced, operands, *args).compile(), operands)


@functools.partial(jax.jit, static_argnums=0)
def _called(traced: TracedFunction, operands: Any, *args: Any) -> Any:
    return jax.tree.unflatten(traced.out_tree, traced(operands, *jax.tree.leaves(args)))
