"""The arguments of a host function: pytrees of arrays and numbers, and of strings, which stay."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._encoding import leaf_digest
from ._journal import JournalFile


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of a call, without the arrays.

    Attributes:
      tree: their structure, of those by position and those by name.
      fixed: their leaves, None where an array is.
    """

    tree: Any
    fixed: tuple[Any, ...]

    def kind(self, arrays: Sequence[Any]) -> Any:
        """What the structure of the result may depend on."""
        return self.tree, self.fixed, tuple((v.shape, np.dtype(v.dtype)) for v in arrays)

    def keys(
        self,
        journal: JournalFile,
        arrays: Sequence[np.ndarray],
        mapped: Sequence[bool],
        count: int,
    ) -> list[bytes]:
        """What the journal knows each point by, with the arguments and the function."""
        prefix = journal.key_prefix(self.tree, self.fixed)
        # What all points share is read once.
        shared = [None if m else leaf_digest(v) for v, m in zip(arrays, mapped, strict=True)]

        def key(row: int) -> bytes:
            digests = (
                leaf_digest(v[row]) if s is None else s for v, s in zip(arrays, shared, strict=True)
            )
            return hashlib.sha256(prefix + b"".join(digests)).digest()

        return [key(row) for row in range(count)]

    def unflatten(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments by position and those by name, with these arrays in their places."""
        rest = iter(arrays)
        leaves = [next(rest) if fixed is None else fixed for fixed in self.fixed]
        return jax.tree.unflatten(self.tree, leaves)


def taken_apart(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> tuple[Arguments, list[Any]]:
    """The arguments of a call of the function of this name, and their arrays."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    fixed = tuple(None if _is_array(v) else v for v in leaves)
    arrays = [_array(v) for v in leaves if _is_array(v)]
    for leaf in fixed:
        if not isinstance(leaf, str | bytes | None):
            raise TypeError(
                f"{name} was called with {leaf!r} ({type(leaf).__name__}), but takes pytrees of "
                "arrays, numbers and strings. Give it anything else by functools.partial, before "
                "host_function"
            )
    return Arguments(tree, fixed), arrays


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex | np.generic | np.ndarray | Array)


def _array(leaf: Any) -> Any:
    if jnp.issubdtype(getattr(leaf, "dtype", bool), jax.dtypes.prng_key):
        raise TypeError(
            "a host function was called with a PRNG key, which numpy does not know; pass "
            "jax.random.key_data(key), and make a numpy.random.Generator of it"
        )
    if isinstance(leaf, Array):
        return leaf
    # An array of JAX's own. Of another number JAX makes a part of the program, one for each.
    with jax.ensure_compile_time_eval():
        return jnp.asarray(leaf)
