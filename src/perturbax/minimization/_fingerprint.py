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
from ..tracing._callbacks import called_back, inner_with_constants


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
    """What tells operations from others, as a pytree: their text, and what they close over."""
    return [str(jaxpr), *(constants for _, constants in _inside(jaxpr))]


def called_in(jaxpr: core.Jaxpr) -> list[str]:
    """What the functions outside JAX that operations call are known by."""
    parts = [jaxpr, *(inner for inner, _ in _inside(jaxpr))]
    found = [called_back(eqn) for part in parts for eqn in part.eqns]
    return [known_by(fun) for fun in found if fun is not None]


def without_key_type(leaf: Any) -> Any:
    """The data of a PRNG key; any other array as it is."""
    is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _inside(jaxpr: core.Jaxpr) -> Iterator[tuple[core.Jaxpr, list[Any]]]:
    """The operations inside operations, however deep, and what each closes over."""
    for eqn in jaxpr.eqns:
        for inner, constants in inner_with_constants(eqn):
            yield inner, list(constants)
            yield from _inside(inner)


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-fA-F]+", "0x", text)
