"""Files that keep a run: written whole or not at all, and refused where they are of another run."""

import hashlib
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

_FORMAT = "perturbax minimize 1"


def fingerprint(setup: dict[str, Any]) -> dict[str, str]:
    """A digest for each setting, by which a checkpoint knows its run."""
    return {name: _digest(value) for name, value in setup.items()}


def save(path: Path, prints: dict[str, str], parts: dict[str, Any]) -> None:
    """Writes pytrees of arrays: a file beside `path` takes its place once it is on disk."""
    arrays: dict[str, np.ndarray] = {}
    kinds: dict[str, list[tuple[str, list[int]]]] = {}
    for name, part in parts.items():
        kinds[name] = []
        for i, leaf in enumerate(jax.tree.leaves(part)):
            array = np.asarray(_raw(leaf))
            kinds[name].append((str(array.dtype), list(array.shape)))
            # Bytes, for numpy's format does not know every dtype of JAX's.
            arrays[f"{name}.{i}"] = np.frombuffer(array.tobytes(), np.uint8)
    header = json.dumps({"format": _FORMAT, "prints": prints, "kinds": kinds})
    arrays["header"] = np.frombuffer(header.encode(), np.uint8)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def load(path: Path, prints: dict[str, str], likes: dict[str, Any]) -> dict[str, Any] | None:
    """Reads what `save` wrote, or None where there is no file.

    Args:
      path: of the file.
      prints: of this run.
      likes: for each part, a pytree of its structure.

    Raises:
      ValueError: if the file is no checkpoint, is damaged, or is of another run.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(bytes(file["header"]))
            arrays = {name: bytes(file[name]) for name in file.files if name != "header"}
        if header["format"] != _FORMAT:
            raise ValueError(header["format"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} is not one that minimize can read "
            f"({type(error).__name__}: {error}): it is left as it is; move it away, or give "
            "another path"
        ) from error
    other = sorted(name for name in prints if header["prints"].get(name) != prints[name])
    if other:
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} is of another problem: {', '.join(other)} differ. It "
            "is left as it is; move it away, or give another path"
        )
    found = {}
    for name, like in likes.items():
        kinds = header["kinds"][name]
        leaves = [
            np.frombuffer(arrays[f"{name}.{i}"], _dtype(dtype)).reshape(shape)
            for i, (dtype, shape) in enumerate(kinds)
        ]
        found[name] = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return found


def _raw(leaf: Any) -> Any:
    is_key = jax.numpy.issubdtype(jax.numpy.result_type(leaf), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _dtype(name: str) -> np.dtype:
    return np.dtype(jax.numpy.dtype(name))


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    leaves, tree = jax.tree.flatten(value)
    digest.update(_without_addresses(str(tree)).encode())
    for leaf in leaves:
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | bool):
            array = np.asarray(_raw(leaf))
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            digest.update(_without_addresses(str(leaf)).encode())
    return digest.hexdigest()[:32]


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-fA-F]+", "0x", text)
