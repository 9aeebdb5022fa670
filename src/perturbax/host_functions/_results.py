"""What a host function returns: structure, shapes and dtypes, checked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


class Like(NamedTuple):
    """What a function returns for one point: structure, shapes and dtypes."""

    tree: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]


def canonical(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, jax.dtypes.canonicalize_dtype(spec.dtype))


def described(like: Any, on_failure: Any) -> Like:
    """The argument `like` as shapes and dtypes."""
    leaves, tree = jax.tree.flatten(like)
    specs = []
    for leaf in leaves:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            if not isinstance(leaf, bool | int | float | complex):
                raise TypeError(
                    "like must be a pytree of jax.ShapeDtypeStruct, arrays or numbers, got "
                    f"{leaf!r} ({type(leaf).__name__})"
                )
            leaf = np.asarray(leaf)
        specs.append(jax.ShapeDtypeStruct(leaf.shape, _known(leaf.dtype)))
    return _checked(Like(tree, tuple(specs)), on_failure)


class Returned(NamedTuple):
    """What a function returned, in memory of its own; or the error of what is no result."""

    leaves: list[np.ndarray]
    tree: Any
    error: Exception | None = None


def returned(value: Any, name: str) -> Returned:
    """The value of a call. An error is told, not raised: it is not one of the function."""
    if isinstance(value, Returned):
        return value
    try:
        if value is None:
            raise TypeError(
                f"{name} returned None, expected a pytree of numbers and arrays: is a `return` "
                "missing? One that has nothing to return returns ()"
            )
        try:
            leaves, tree = jax.tree.flatten(value)
        except ValueError as error:
            raise TypeError(
                f"{name} must return a pytree of numbers and arrays, got one that JAX cannot take "
                f"apart ({error}): give the keys of a dict one type, strings for example"
            ) from error
        return Returned([_numbers(leaf, name) for leaf in leaves], tree)
    except Exception as error:
        return Returned([], None, error)


def like_of(value: Returned, batched: bool, on_failure: Any) -> Like:
    """What a function returned for its first points, as shapes and dtypes."""
    arrays = value.leaves
    if batched and not all(v.ndim for v in arrays):
        raise ValueError(
            "with batched=True all that fun returns must have a leading axis, with a place for "
            f"each point, got shape {', '.join(sorted({str(v.shape) for v in arrays}))}: leave "
            "batched away for a function of one point"
        )
    shapes = [v.shape[1:] if batched else v.shape for v in arrays]
    specs = [jax.ShapeDtypeStruct(s, v.dtype) for s, v in zip(shapes, arrays, strict=True)]
    return _checked(Like(value.tree, tuple(specs)), on_failure)


def recalled(leaves: Sequence[np.ndarray], tree: Any, on_failure: Any) -> Like:
    """What a function returned, by what the journal has."""
    if tree is None:
        raise ValueError(
            "the journal does not tell the structure of this result, which has other nodes than "
            "dicts, lists and tuples; give like="
        )
    specs = tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in leaves)
    return _checked(Like(tree, specs), on_failure)


def _checked(like: Like, on_failure: Any) -> Like:
    """`like`, if what stands for a failure has a place in it."""
    if not isinstance(on_failure, str) or on_failure != "raise":
        instead_of(like, on_failure)
    return like


def instead_of(like: Like, on_failure: Any) -> list[np.ndarray]:
    """The leaves that stand for the result where it fails."""
    if isinstance(on_failure, str):  # "missing"
        for spec in like.leaves:
            if not jnp.issubdtype(spec.dtype, jnp.inexact):
                raise TypeError(
                    "on_failure='missing' marks failures by NaN, which an output of dtype "
                    f"{spec.dtype} cannot hold; return floating-point numbers, or give a value as "
                    "on_failure"
                )
        return [np.full(v.shape, np.nan, v.dtype) for v in like.leaves]
    leaves, tree = jax.tree.flatten(on_failure)
    if len(leaves) == 1 and tree != like.tree:
        leaves, tree = leaves * len(like.leaves), like.tree
    if tree != like.tree:
        raise ValueError(
            "on_failure must be a number or a pytree like the result, of the structure "
            f"{like.tree}, got {tree}"
        )
    values = []
    for leaf, spec in zip(leaves, like.leaves, strict=True):
        try:
            wide = np.broadcast_to(_numbers(leaf, "on_failure"), spec.shape)
        except ValueError as error:
            raise ValueError(
                f"on_failure has shape {np.shape(leaf)}, expected {spec.shape}"
            ) from error
        values.append(cast(wide, spec, (), "on_failure"))
    return values


def like_for(on_failure: Any) -> str:
    """The argument `like` to advise, as far as what stands for a failure tells what returns."""
    if isinstance(on_failure, str) or not jax.tree_util.all_leaves([on_failure]):
        return "like=...)"
    zero = "0j" if np.iscomplexobj(on_failure) else "0.0"
    if shape := np.shape(on_failure):
        return f"like=np.full({shape}, {zero})), if it returns an array like on_failure"
    return f"like={zero}), if it returns one number, as on_failure is"


def _of_numbers(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in _KINDS)


def _known(dtype: Any) -> Any:
    """The dtype in what JAX and the journal know: this machine's byte order, no long doubles."""
    if not _of_numbers(dtype):
        return dtype
    native = np.dtype(dtype).newbyteorder("=")
    if native in (np.longdouble, np.clongdouble):
        return np.dtype(np.complex128 if native.kind == "c" else np.float64)
    return native


def _numbers(leaf: Any, name: str) -> np.ndarray:
    """A copy of a leaf of what a function returned, as an array of numbers."""
    if isinstance(leaf, Array):
        raise TypeError(
            f"{name} returned a jax.Array; a host function computes with numpy, for waiting for "
            "JAX inside a callback can wait forever (jax#24255)"
        )
    if np.ma.is_masked(leaf):
        raise TypeError(
            f"{name} returned a numpy array with masked entries, which have no value; return "
            "leaf.filled(...) with what they are to count for"
        )
    array = np.asarray(leaf)
    if not _of_numbers(array.dtype):
        raise TypeError(
            f"{name} must return numbers or arrays of numbers, got {leaf!r} "
            f"({type(leaf).__name__}, dtype {array.dtype})"
        )
    return array.astype(_known(array.dtype))


def cast(
    array: np.ndarray, spec: jax.ShapeDtypeStruct, front: tuple[int, ...], name: str
) -> np.ndarray:
    if array.shape != (*front, *spec.shape):
        raise ValueError(
            f"{name} returned shape {array.shape}, expected {(*front, *spec.shape)}, by like or an "
            "earlier call" + (", with the leading axis of the points" if front else "")
        )
    kind = _kind(spec.dtype)
    if _kind(array.dtype) > kind:
        raise TypeError(
            f"{name} returned dtype {array.dtype}, which does not fit into {spec.dtype}, by like "
            "or an earlier call; say what it returns: host_function(..., like=...)"
        )
    return narrowed(array, spec.dtype, name)


def narrowed(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # an infinity, as everywhere in JAX
        cast = array.astype(dtype, copy=False)
    if jnp.issubdtype(dtype, jnp.integer) and not np.array_equal(cast, array):
        raise OverflowError(
            f"{name} returned {array!r}, which does not fit into {dtype}; return a floating number"
        )
    return cast


def _kind(dtype: Any) -> int:
    return next(i for i, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind))
