"""The leaves of x: their names, their dtypes, and which of them are perturbed."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._types import PyTree

# What is to be done with an argument that cannot be perturbed.
_ELSEWHERE = "pass it to fun as a further argument, g(key, x, ...)"


def leaf_name(path: Any, root: str = "x") -> str:
    """How an error names a leaf of x, or of what has the name `root`."""
    return f"{root}{jax.tree_util.keystr(path)}"


def perturbed_leaves(
    x: PyTree, name: str = "x", elsewhere: str = _ELSEWHERE
) -> tuple[list[Array], list[str], Callable[[Iterable[Array]], PyTree]]:
    """The floating leaves of x, their names, and how to put others in their place.

    Errors call it `name`, and say what to do with what is no array by `elsewhere`.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(x)
    fixed: list[Any] = []
    leaves: list[Any] = []
    names: list[str] = []
    for path, leaf in paths:
        if isinstance(leaf, float):
            leaf = np.asarray(leaf, jax.dtypes.canonicalize_dtype(float))
        if not isinstance(leaf, int | np.ndarray | np.generic | Array | complex):
            own, remedy = leaf_name(path, name), elsewhere
            if conversion := conversion_of(leaf, own):
                remedy = f"{conversion}; or, if it is not to be perturbed, {remedy}"
            raise TypeError(
                f"{name} must be a pytree of arrays, but leaf {own!r} is {_of_its_class(leaf)}: "
                f"{remedy}"
            )
        dtype = dtype_of(leaf)
        if dtype is None:
            raise TypeError(
                f"{name} must be a pytree of arrays, but leaf {leaf_name(path, name)!r} is "
                f"{kind_of(leaf)}, a dtype that JAX does not support: convert it to float32, for "
                f"example, or {elsewhere}"
            )
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"complex leaves are not supported (leaf {leaf_name(path, name)!r} is {dtype}); "
                "split it into its real and imaginary parts"
            )
        if jnp.issubdtype(dtype, jnp.floating):
            if isinstance(leaf, np.ndarray | np.generic):
                leaf = on_device(np.asarray(leaf, dtype))
            leaves.append(leaf)
            names.append(leaf_name(path, name))
            fixed.append(None)
        else:
            fixed.append(leaf)
    if paths and not leaves:
        raise TypeError(
            f"{name} has no floating leaf to perturb: its leaves are "
            f"{', '.join(sorted({str(jnp.result_type(v)) for v in fixed}))}; make those floating "
            f"that are to be perturbed, as jnp.asarray({name}, float) does"
        )

    def merge(perturbed: Iterable[Array]) -> PyTree:
        rest = iter(perturbed)
        return tree.unflatten([next(rest) if v is None else v for v in fixed])

    return leaves, names, merge


def noise_dtype(leaves: list[Array]) -> np.dtype:
    """Dtype of noise, scores and weights for these leaves: at least single precision."""
    return np.dtype(np.float64 if any(v.dtype == np.float64 for v in leaves) else np.float32)


def num_elements(leaves: list[Array]) -> int:
    """Number of coordinates of the leaves together."""
    return sum(math.prod(leaf.shape) for leaf in leaves)


def dtype_of(value: object) -> np.dtype | None:
    """As JAX has it; None for those that it does not support, such as that of strings."""
    if isinstance(value, str | bytes | type):  # not the dtype that it names
        return None
    given = getattr(value, "dtype", None)
    if isinstance(given, np.dtype) and not given.isnative:
        return None  # JAX does not raise at once in all of its releases
    try:
        return jnp.result_type(value)
    except TypeError:
        return None


def is_floating(value: object) -> bool:
    """Whether it has a dtype of real floating numbers."""
    dtype = dtype_of(value)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def kind_of(value: object) -> str:
    """What an error calls it."""
    dtype = getattr(value, "dtype", None)
    return _of_its_class(value) if dtype is None else f"an array of {dtype}"


def _of_its_class(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def conversion_of(value: object, name: str) -> str:
    """How to make an array of what another library has for one; nothing for what is none."""
    return f"convert it, jnp.asarray({name})" if hasattr(type(value), "__array__") else ""


def on_device(value: Any) -> Any:
    # Explicit, so that jax.transfer_guard('disallow') has nothing to object to. JAX may use memory
    # of numpy in place, which its owner may change before the program, or its derivative, runs.
    return value if isinstance(value, Array) else jax.device_put(np.array(value))
