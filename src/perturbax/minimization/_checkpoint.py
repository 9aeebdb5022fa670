"""Files that keep a run: written whole or not at all, and refused where they are of another run."""

import json
import os
import secrets
import shutil
import time
import zipfile
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._fingerprint import called_in, fingerprint, operations, without_key_type
from ._problem import Problem
from ._result import MinimizeHistory
from ._run import begin, empty_history, joined, own_settings, step
from ._setup import ADAPTED, Setup
from ._states import Operands, Run

_FORMAT = "perturbax minimize 6"
# Between two checkpoints.
_SECONDS_A_CHECKPOINT = 3.0
# Seconds before a file is replaced once more, where that was denied.
_WAITS = (0.1, 0.3, 1.0, 3.0) if os.name == "nt" else ()


class Checkpoint:
    """A checkpoint of one run."""

    @own_settings()
    def __init__(self, path: Path, setup: Setup, operands: Operands, problem: Problem, key: Array):
        """Takes the run's fingerprint."""
        if not path.parent.is_dir():
            raise ValueError(f"checkpoint's folder {os.fspath(path.parent)!r} does not exist")
        _check_writable(path)
        self._path, self._setup = path, setup
        self._last = time.monotonic()
        self._impls: list[Any] = []

        def begun() -> Run:
            run = begin(setup, operands, key, problem.start)
            self._impls = [_impl(leaf) for leaf in jax.tree.leaves(run)]
            return run

        run = self._like = jax.eval_shape(begun)
        stepped = jax.make_jaxpr(lambda run: step(setup, operands, run, jnp.zeros(2, jnp.int32)))(
            run
        )
        traced = setup.objective.traced
        known_by = {
            "x0": problem.start,
            "key": jax.random.key_data(key),
            "fun or its data": (
                operations(traced.jaxpr),
                called_in(traced.jaxpr),
                [host.identity() for host in setup.hosts],
                problem.operands,
            ),
            "bounds": (problem.scale, problem.widest),
            "sigma or tol": (operands.sigma, operands.tol, setup.sigma == ADAPTED),
            "optimizer, sigma or noise": (
                operations(stepped.jaxpr),
                stepped.consts,
                operands.optimizer,
            ),
            "num_samples": (setup.num_samples, setup.grows),
        }
        self._prints = {name: fingerprint(value) for name, value in known_by.items()}

    def load(self) -> tuple[Setup, Run | None, list[MinimizeHistory]]:
        """The run as it was kept, or as it was given where nothing was."""
        rows = empty_history(self._setup.objective)
        found = _load(self._path, self._prints, {"run": self._like, "rows": rows, "doublings": 0})
        if found is None:
            return self._setup, None, []
        leaves = map(jnp.asarray, jax.tree.leaves(found["run"]))
        run = jax.tree.unflatten(
            jax.tree.structure(self._like),
            [
                leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
                for leaf, impl in zip(leaves, self._impls, strict=True)
            ],
        )
        setup = self._setup._replace(doublings=int(found["doublings"]))
        return setup, run, [found["rows"]] if int(run.steps) else []

    def save_now_and_then(self, setup: Setup, run: Run, told: list[MinimizeHistory]) -> None:
        """Saves if the last time is seconds ago."""
        if time.monotonic() - self._last >= _SECONDS_A_CHECKPOINT:
            self.save(setup, run, told)

    def save(self, setup: Setup, run: Run, told: list[MinimizeHistory]) -> None:
        """Saves the run, without rows of later steps, which an interrupt may leave in `told`."""
        history, steps = joined(self._setup.objective, told), int(run.steps)
        rows = jax.tree.map(lambda column: column[:steps], history)
        parts = {"run": run, "rows": rows, "doublings": setup.doublings}
        try:
            _save(self._path, self._prints, parts)
        except OSError as error:
            error.add_note(
                f"checkpoint {os.fspath(self._path)!r} could not be written; if there was one "
                "before, it is whole, and a run with the same arguments goes on from it"
            )
            raise
        self._last = time.monotonic()


def _impl(leaf: Any) -> Any:
    """Of what kind a PRNG key is, such as an optimiser's state may hold; None for other arrays."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_impl(leaf) if is_key else None


def _check_writable(path: Path) -> None:
    """Raises before anything is evaluated, rather than where the run is to be saved."""
    try:
        file = _made_beside(path)
    except OSError as error:
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} cannot be written ({type(error).__name__}: {error}): "
            "allow new files in its folder, or give another path"
        ) from error
    file.close()
    Path(file.name).unlink()


def _made_beside(path: Path) -> IO[bytes]:
    """A file of another name, with the rights that new files have."""
    return (path.parent / f"{path.name}{secrets.token_hex(4)}.part").open("xb")


def _save(path: Path, prints: dict[str, str], parts: dict[str, Any]) -> None:
    """Writes pytrees of arrays: a file beside `path` takes its place once it is on disk."""
    arrays: dict[str, np.ndarray] = {}
    kinds: dict[str, list[tuple[str, list[int]]]] = {}
    for name, part in parts.items():
        kinds[name] = []
        for i, leaf in enumerate(jax.tree.leaves(part)):
            array = np.asarray(without_key_type(leaf))
            kinds[name].append((str(array.dtype), list(array.shape)))
            # Bytes, for numpy's format does not know every dtype of JAX's.
            arrays[f"{name}.{i}"] = np.frombuffer(array.tobytes(), np.uint8)
    header = json.dumps({"format": _FORMAT, "prints": prints, "kinds": kinds})
    arrays["header"] = np.frombuffer(header.encode(), np.uint8)
    file = _made_beside(path)
    try:
        with file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, file.name)
        _take_place(file.name, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise


def _take_place(new: str, path: Path) -> None:
    """Replaces a file; on Windows others, such as virus scanners, may have it open for a moment."""
    for wait in _WAITS:
        try:
            return os.replace(new, path)
        except PermissionError:
            time.sleep(wait)
    return os.replace(new, path)


def _load(path: Path, prints: dict[str, str], likes: dict[str, Any]) -> dict[str, Any] | None:
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
            f"checkpoint {os.fspath(path)!r} is of another problem: {', '.join(other)} differ (the "
            "data of a function outside JAX is all that it refers to). It is left as it is; move "
            "it away, or give another path"
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


def _dtype(name: str) -> np.dtype:
    return np.dtype(jnp.dtype(name))
