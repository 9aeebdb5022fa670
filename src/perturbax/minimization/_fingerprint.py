"""Fingerprints, which tell one problem from another in the next process as in this one."""

import hashlib
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..host_functions._function_names import known_by
from ..tracing._callbacks import called_back
from ..tracing._jaxprs import equations, inner_of


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
    inner = itertools.chain.from_iterable(map(inner_of, equations(jaxpr)))
    return [str(jaxpr), *(list(constants) for _, constants in inner)]


def called_in(jaxpr: core.Jaxpr) -> list[str]:
    """What the functions outside JAX that operations call are known by."""
    found = map(called_back, equations(jaxpr))
    return [known_by(fun) for fun in found if fun is not None]


def without_key_type(leaf: Any) -> Any:
    """The data of a PRNG key; any other array as it is."""
    is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-fA-F]+", "0x", text)
