"""Functions compiled by the operations they consist of, not by which object they are."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from ._signature import TracedFunction, trace


def compiled(fun: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`fun` for arguments like these, pytrees of arrays, compiled now.

    JAX knows functions by identity, so that one made anew is compiled anew. Here a function of the
    same operations as one before has the same program, of which what it closes over, as far as
    these are arrays, is an argument. It is traced every time.
    """
    leaves, tree = jax.tree.flatten(args)
    traced, operands = trace(lambda *values: fun(*jax.tree.unflatten(tree, values)), *leaves)
    if not jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        _called.lower(traced, operands, *args).compile()  # which calls find
    return functools.partial(_called, traced, operands)


@functools.partial(jax.jit, static_argnums=0)
def _called(traced: TracedFunction, operands: Any, *args: Any) -> Any:
    return jax.tree.unflatten(traced.out_tree, traced(operands, *jax.tree.leaves(args)))
