"""Users' functions: traced, checked, and explained where tracing fails, as other code of theirs."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core

from .._leaves import dtype_of, kind_of, on_device
from .._types import Fun, PyTree
from ._signature import TracedFunction, trace

# What JAX raises where a function needs values of what is traced.
_NEEDS_VALUES = (
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
)


@contextlib.contextmanager
def explained_vmap(batch_size: int | None) -> Iterator[None]:
    """Adds the remedy to the error of a function that cannot be vmapped."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        if batch_size != 1 and ("vmap" in str(error) or "atching rule" in str(error)):
            error.add_note(
                "fun is vmapped over the samples. A function outside JAX is best wrapped by "
                "perturbax.host_function. With batch_size=1, make_perturbed_fun calls fun sample "
                "by sample instead, as it is."
            )
        raise


class Traced(NamedTuple):
    """A user's function as it was traced.

    Attributes:
      function: its operations.
      operands: what it closes over.
      value_tree: structure of its value, whose leaves come first.
      aux_tree: structure of aux; of None, if there is none.
    """

    function: TracedFunction
    operands: tuple[Any, ...]
    value_tree: Any
    aux_tree: Any


def trace_fun(fun: Fun, leaves: list[Array], has_aux: bool) -> Traced:
    """Traces fun(leaves), with hints where that fails."""
    structures: list[Any] = []

    def flat(*values: Array) -> list[Any]:
        out = fun(list(values))
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"with has_aux=True fun must return a pair (value, aux), got {_in_words(out)}: "
                "return (value, aux), or leave has_aux out"
            )
        value, aux = out if has_aux else (out, None)
        if value is None:
            raise TypeError(
                "fun returned None, expected a pytree of arrays: is a `return` missing? One that "
                "has nothing to return returns ()"
            )
        for name, tree in (("value", value), ("aux", aux)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                kinds = bool | int | float | complex | np.generic | np.ndarray | Array
                dtype = dtype_of(leaf)
                if not isinstance(leaf, kinds) or dtype is None:
                    raise TypeError(
                        f"fun's {name} must be a pytree of arrays, but its leaf "
                        f"'{name}{jax.tree_util.keystr(path)}' is {kind_of(leaf)}"
                    )
                if name == "value" and jnp.issubdtype(dtype, jax.dtypes.prng_key):
                    raise TypeError(
                        "fun's value must be a pytree of numbers, for it is averaged, but its leaf "
                        f"'{name}{jax.tree_util.keystr(path)}' is a PRNG key; return it as aux, "
                        "with has_aux=True"
                    )
        structures[:] = [jax.tree.structure(value), jax.tree.structure(aux)]
        return [*jax.tree.leaves(value), *jax.tree.leaves(aux)]

    try:
        traced, operands = trace(flat, *leaves)
    except Exception as error:
        if isinstance(error, _NEEDS_VALUES) or _names_a_tracer(error):
            error.add_note(
                "fun is traced and vmapped over the samples, so it cannot use numpy, float(), `if` "
                "or an index of bools on its argument, nor libraries other than JAX. Make a host "
                "function of such code, perturbax.host_function(fun): it is called with numpy "
                "arrays, one point at a time."
            )
        raise
    return Traced(traced, tuple(map(on_device, operands)), *structures)


def _names_a_tracer(error: Exception) -> bool:
    """Whether code that is not for JAX complains, in words of its own, of what it was given."""
    if isinstance(error, jax.errors.UnexpectedTracerError):  # kept from another trace
        return False
    try:
        return re.search(r"Tracer[<(]|Traced<", str(error)) is not None
    except Exception:  # of a class that cannot be printed
        return False


def _in_words(out: Any) -> str:
    if isinstance(out, tuple):
        return f"a tuple of {len(out)}"
    return f"{kind_of(out)} alone" if hasattr(out, "dtype") else kind_of(out)


def leaves_among(operands: Sequence[Any], x: PyTree) -> tuple[int, ...]:
    """Which operands are leaves of x, whose leaves are arrays of JAX."""
    leaves = set(map(id, jax.tree.leaves(x)))
    return tuple(i for i, v in enumerate(operands) if id(v) in leaves)


@contextlib.contextmanager
def explained_method(what: str) -> Iterator[None]:
    """Adds a hint to the errors of a method of a user's noise."""
    try:
        yield
    except _NEEDS_VALUES as error:
        error.add_note(f"{what} is traced, so it must compute with jax.numpy, not with numpy")
        raise


def only_leaf(traced: TracedFunction, what: str) -> core.ShapedArray:
    """The type of what a method returned, if it is one array."""
    if len(traced.out_avals) != 1:
        raise TypeError(f"{what} must return one array, got {traced.out_tree}")
    return traced.out_avals[0]


def trace_draw(
    draw: Callable[[Array], Any],
    key: Any,
    what: str,
    shape: tuple[int, ...],
    protocol: str,
    sharing: str,
    layout: str = "",
) -> tuple[TracedFunction, Sequence[Any]]:
    """Traces a user's method that draws, and checks shape, dtype and its use of the key.

    Args:
      draw: the call of the method, a function of the key.
      key: a key, or what is like one.
      what: the call in words.
      shape: what it must have.
      protocol: the class of perturbax that describes the method.
      sharing: what would share one draw if the key were not used.
      layout: what the shape means, for the error.
    """
    try:
        traced, operands = trace(draw, key)
    except _NEEDS_VALUES as error:
        error.add_note(f"{what} must compute with jax.random, not with numpy")
        raise
    except TypeError as error:
        error.add_note(f"raised by {what}, a call that perturbax.{protocol} describes")
        raise
    aval = only_leaf(traced, what)
    if aval.shape != shape:
        raise ValueError(f"{what} returned shape {aval.shape}, expected {shape}{layout}")
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        raise TypeError(f"{what} returned dtype {aval.dtype}, expected a floating dtype")
    if shape[-1] != 0 and not traced.depends_on_inputs():
        raise TypeError(
            f"{what} does not depend on key: all {sharing} would share one draw. Return a traced "
            "JAX array drawn with jax.random from the key"
        )
    return traced, operands
