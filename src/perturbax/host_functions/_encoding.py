"""Results as bytes: arrays, the structure that they are in, and a checksum."""

import hashlib
import itertools
import json
import sqlite3
import struct
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def _encode_array(array: np.ndarray) -> bytes:
    dtype = array.dtype.name.encode()
    shape = struct.pack(f"<{array.ndim}q", *array.shape)
    return struct.pack("<BB", len(dtype), array.ndim) + dtype + shape + array.tobytes()


def _decode_array(data: memoryview) -> tuple[np.ndarray, memoryview]:
    """The first array, and what follows it."""
    length, ndim = struct.unpack_from("<BB", data)
    start = 2 + length
    dtype = np.dtype(jax.numpy.dtype(bytes(data[2:start]).decode()))
    shape = struct.unpack_from(f"<{ndim}q", data, start)
    start += 8 * ndim
    count = int(np.prod(shape, dtype=np.int64))
    end = start + count * dtype.itemsize
    array = np.frombuffer(data[start:end], dtype, count).reshape(shape)
    return array, data[end:]


def leaf_digest(array: np.ndarray) -> bytes:
    """A hash of the dtype, the shape and the bytes."""
    head = f"{array.dtype.name}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).digest()


def skeleton_of(tree: Any) -> Any:
    """A structure as JSON knows it; None for one with nodes of other kinds than Python's own."""
    leaves = itertools.count()

    def described(tree: Any) -> Any:
        node = tree.node_data()
        if node is None:
            return next(leaves)
        kind, data = node
        if kind is type(None):
            return {"none": 0}
        if kind is dict and all(type(k) is str for k in data):
            return {"dict": dict(zip(data, map(described, tree.children()), strict=True))}
        if kind in (list, tuple):
            return {kind.__name__: [*map(described, tree.children())]}
        raise TypeError

    try:
        return described(tree)
    except TypeError:
        return None


def _tree(skeleton: Any) -> Any:
    def made(node: Any) -> Any:
        if isinstance(node, int):
            return node
        [(kind, inner)] = node.items()
        if kind == "none":
            return None
        if kind == "dict":
            return {k: made(v) for k, v in inner.items()}
        return {"list": list, "tuple": tuple}[kind](map(made, inner))

    return jax.tree.structure(made(skeleton))


def encode(leaves: Sequence[np.ndarray], tree: Any) -> bytes:
    """A result, with a checksum in front."""
    structure = json.dumps(skeleton_of(tree)).encode()
    body = struct.pack("<II", len(structure), len(leaves)) + structure
    body += b"".join(map(_encode_array, leaves))
    return hashlib.sha256(body).digest()[:8] + body


def decode(data: bytes) -> tuple[list[np.ndarray], Any]:
    """The leaves, and the structure if it is known."""
    body = memoryview(data)[8:]
    if hashlib.sha256(body).digest()[:8] != data[:8]:
        raise sqlite3.DatabaseError("a result does not fit its checksum")
    length, count = struct.unpack_from("<II", body)
    skeleton, rest, leaves = json.loads(bytes(body[8 : 8 + length])), body[8 + length :], []
    for _ in range(count):
        leaf, rest = _decode_array(rest)
        leaves.append(leaf)
    return leaves, None if skeleton is None else _tree(skeleton)
