"""Fingerprints, which tell one problem from another in the next process as in this one."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..host_functions._function_names import known_by
from ..tracing._callbacks import inner_with_constants

# Their results count, unlike those of callbacks that only print.
_CALLBACKS = ("pure_callback", "io_callback")


def fingerprint(value: Any) -> str:
    """Of a pytree: of its structure, all bytes of arrays, and the text of other leaves."""
    digest = hashlib.sha256()
    leaves, tree = jax.tree.flatten(value)
    digest.update(_without_addresses(str(tree)).encode())
    for leaf in leaves:
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            array = np.asarray(without_key_type(leaf))
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            digest.update(_without_addresses(str(leaf)).encode())
    return digest.hexdigest()[:32]


def operations(jaxpr: core.Jaxpr) -> list[Any]:
    """What tells operations from others, as a pytree: their text, and what is missing there."""
    return [str(jaxpr), *_not_in_text(jaxpr)]


def without_key_type(leaf: Any) -> Any:
    """The data of a PRNG key; any other array as it is."""
    is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _not_in_text(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """What jitted functions close over, however deep inside, and what is called back."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _CALLBACKS:
            yield known_by(eqn.params["callback"].callback_func)
        for inner, constants in inner_with_constants(eqn):
            yield list(constants)
            yield from _not_in_text(inner)


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-fA-F]+", "0x", text)
