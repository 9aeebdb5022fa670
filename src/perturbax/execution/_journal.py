"""The journal of a host function: results on disk, to go on from after a crash.

A SQLite database with one table of results and one of claims, by which processes that share it do
not evaluate the same point at the same time. Results are arrays in an encoding of their own: dtype,
shape and bytes. A key is a hash of the exact bytes of a point and arguments, and of the function.
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import json
import os
import socket
import sqlite3
import struct
import sys
import threading
import time
import types
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

# "pxJ1": says whose database it is.
_APPLICATION = 0x70784A31
_VERSION = 1
_HEADER = b"SQLite format 3\x00"
_SCHEMA = """
CREATE TABLE results (key BLOB PRIMARY KEY, function TEXT NOT NULL, value BLOB NOT NULL);
CREATE TABLE claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL);
"""
# How long another process may hold the lock, in seconds.
_PATIENCE = 60.0
# A claim holds for so long, and is renewed a few times as often: who does not renew it is gone.
_CLAIM = 10.0


@dataclasses.dataclass(frozen=True)
class Journal:
    """Where a host function keeps its results, and what it is called there.

    Every finished evaluation is in the file before it is used, so that a program that ends in any
    way, and is started again, evaluates only what was not finished. Equal points are evaluated
    once. Several processes of one machine may share a file, and several functions.

    Args:
      path: a file, which is made if it is not there. Beside it lie, while it is in use, two more.
      name: what tells the function from others, and from its own earlier versions: results of the
        same name are taken for the function's. None makes a name of the function's code, of what it
        closes over, and of the functions, classes and data of its own modules that it uses. What it
        reads from files or calls in installed packages is not in that name, nor are objects of
        their classes in its modules: change `name` when these change.

    Raises:
      TypeError: if path is no path, or name neither None nor a string.
    """

    path: str | os.PathLike[str]
    name: str | None = None

    def __post_init__(self) -> None:
        """Checks both."""
        if not isinstance(self.path, str | os.PathLike):
            raise TypeError(
                "journal must be None, a path or perturbax.Journal(path, name=...), got "
                f"{self.path!r} ({type(self.path).__name__})"
            )
        if not isinstance(self.name, str | None):
            raise TypeError(f"name must be a string or None, got {type(self.name).__name__}")


def check_journal(journal: Any) -> Journal | None:
    """The argument `journal` of `host_function`."""
    return journal if journal is None or isinstance(journal, Journal) else Journal(journal)


# --- Names of functions


class _Unnamed(Exception):
    """What a function refers to cannot be told from other objects of its kind."""


def name_of(fun: Callable[..., Any]) -> str:
    """A name that changes with the function's code, and with the data that it refers to."""
    try:
        digest = hashlib.sha256(_content(fun, {})).hexdigest()
    except _Unnamed as error:
        raise ValueError(
            f"journal cannot tell fun from others, for it refers to {error}: give it a name, "
            "journal=perturbax.Journal(path, name='...'), another one whenever fun changes"
        ) from None
    module = getattr(fun, "__module__", "")
    return f"{module}.{getattr(fun, '__qualname__', type(fun).__name__)}:{digest[:32]}"


def _content(value: Any, seen: dict[int, tuple[int, Any]]) -> bytes:
    """Bytes that are equal only for what acts alike.

    Args:
      value: a function, or what one refers to.
      seen: what was met on the way here, by id, each with a number: functions and objects may refer
        to themselves and, in many ways, to each other. It is kept alive, lest ids be used again.
    """
    kind = type(value).__name__.encode()
    inner = functools.partial(_content, seen=seen)
    if value is None or value is Ellipsis or isinstance(value, bool | int | float | complex):
        return kind + repr(value).encode()
    if isinstance(value, str | bytes | range | PurePath | enum.Enum | np.dtype):
        return kind + repr(value).encode()
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise _Unnamed("an array of objects")
        return kind + leaf_digest(array)
    if isinstance(value, types.ModuleType):
        return kind + value.__name__.encode()
    if isinstance(value, types.CodeType):
        parts = (value.co_code, value.co_names, value.co_varnames, value.co_freevars)
        return _joined(kind, map(inner, (*parts, *value.co_consts)))
    if isinstance(value, set | frozenset):  # in no order
        return _joined(kind, sorted(_content(v, dict(seen)) for v in value))
    if isinstance(value, tuple):  # constants of code among them, which Python shares at will
        return _joined(kind, map(inner, value))
    if id(value) in seen:
        return kind + str(seen[id(value)][0]).encode()
    seen[id(value)] = len(seen), value
    if isinstance(value, type):
        name = kind + f"{value.__module__}.{value.__qualname__}".encode()
        if not _is_class_of_user(value):
            return name
        own = {k: v for k, v in vars(value).items() if not _is_bookkeeping(k, v)}
        return _joined(name, [*map(inner, value.__bases__), *_tellable(own, seen)])
    if isinstance(value, types.FunctionType):
        if not _is_of_user(value):
            return kind + f"{value.__module__}.{value.__qualname__}".encode()
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__]
        parts += _closed_over(value)
        return _joined(kind, [*map(inner, parts), *_globals_of(value, seen)])
    if isinstance(value, types.MethodType):
        return _joined(kind, map(inner, (value.__func__, value.__self__)))
    if isinstance(value, staticmethod | classmethod):
        return _joined(kind, [inner(value.__func__)])
    if isinstance(value, property):
        return _joined(kind, map(inner, (value.fget, value.fset, value.fdel)))
    if isinstance(value, functools.cached_property):
        return _joined(kind, [inner(value.func)])
    if isinstance(value, np.ufunc):
        return kind + value.__name__.encode()
    if isinstance(value, functools.partial):
        return _joined(kind, map(inner, (value.func, value.args, value.keywords)))
    if isinstance(value, dict):
        return _joined(kind, (inner(k) + b"=" + inner(v) for k, v in value.items()))
    if isinstance(value, list):
        return _joined(kind, map(inner, value))
    if dataclasses.is_dataclass(value):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
        return _joined(kind, map(inner, (type(value), *parts)))
    if callable(value) and hasattr(value, "__qualname__"):  # compiled, or wrapped by a package
        name = f"{getattr(value, '__module__', '')}.{value.__qualname__}".encode()
        parts = (getattr(value, name, None) for name in ("__self__", "__wrapped__"))
        return _joined(kind + name, map(inner, parts))
    plain = isinstance(value, types.SimpleNamespace) or _is_class_of_user(type(value))
    if plain and hasattr(value, "__dict__"):
        return _joined(kind, map(inner, (type(value), vars(value))))
    raise _Unnamed(f"an object of the class {type(value).__name__}")


def _joined(kind: bytes, parts: Iterable[bytes]) -> bytes:
    hashed = hashlib.sha256(kind)
    for part in parts:
        hashed.update(hashlib.sha256(part).digest())
    return kind + hashed.digest()


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell that is still empty
            yield cell.cell_contents


def _is_of_user(value: Any) -> bool:
    """Whether a function or a module is in a file of the user's, not in an installed package."""
    code = getattr(value, "__code__", None)
    file = code.co_filename if code is not None else getattr(value, "__file__", None)
    inside = os.path.dirname(os.__file__)
    return file is not None and "site-packages" not in file and not file.startswith(inside)


def _is_class_of_user(value: type) -> bool:
    """Whether a class is defined in a file of the user's, or in a notebook."""
    module = sys.modules.get(value.__module__)
    if getattr(module, "__file__", None) is None:
        return value.__module__ not in sys.builtin_module_names
    return _is_of_user(module)


def _is_bookkeeping(name: str, value: Any) -> bool:
    """Whether Python itself keeps this in a class, such as the number of its first line."""
    return name[:2] == name[-2:] == "__" and not isinstance(value, types.FunctionType)


def _tellable(values: dict[str, Any], seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    """Of named values, those that can be told from others of their kind."""
    for name in sorted(values):
        before = len(seen)
        try:
            yield name.encode() + b"=" + _content(values[name], seen)
        except _Unnamed:
            while len(seen) > before:  # what was met in vain is not part of the result
                seen.popitem()


def _globals_of(function: types.FunctionType, seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    """Of what a function uses of its module, and of the user's modules there, if it can be told."""
    names = sorted(_names(function.__code__))
    spaces = [function.__globals__]
    found = [function.__globals__.get(name) for name in names]
    spaces += [vars(v) for v in found if isinstance(v, types.ModuleType) and _is_of_user(v)]
    for space in spaces:
        yield from _tellable({name: space[name] for name in names if name in space}, seen)


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return {*code.co_names}.union(*map(_names, inner))


# --- Arrays and structures as bytes


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
    return array.copy(), data[end:]


def leaf_digest(array: np.ndarray) -> bytes:
    """A hash of the dtype, the shape and the bytes."""
    head = f"{array.dtype.name}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).digest()


def _skeleton(tree: Any) -> Any:
    """A structure as JSON knows it; None for one with nodes of other kinds than Python's own."""

    def described(node: Any) -> Any:
        if isinstance(node, int):
            return node
        if node is None:
            return {"none": 0}
        if type(node) in (list, tuple):
            return {type(node).__name__: [described(v) for v in node]}
        if type(node) is dict and all(type(k) is str for k in node):
            return {"dict": {k: described(v) for k, v in node.items()}}
        raise TypeError

    try:
        return described(jax.tree.unflatten(tree, range(tree.num_leaves)))
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


def _encode(leaves: Sequence[np.ndarray], tree: Any) -> bytes:
    """A result, with a checksum in front."""
    structure = json.dumps(_skeleton(tree)).encode()
    body = struct.pack("<II", len(structure), len(leaves)) + structure
    body += b"".join(map(_encode_array, leaves))
    return hashlib.sha256(body).digest()[:8] + body


def _decode(data: bytes) -> tuple[list[np.ndarray], Any]:
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


# --- The file


class JournalFile:
    """An open journal, with the name of one function."""

    def __init__(self, journal: Journal, fun: Callable[..., Any]):
        """Opens or makes the file; an error if it is damaged, or something else."""
        self.path = Path(journal.path)
        self.name = name_of(fun) if journal.name is None else f"name:{journal.name}"
        self._lock = threading.RLock()
        self._durable: sqlite3.Connection | None = None
        with self._lock, self._explained():
            self._open()

    def _open(self) -> None:
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"journal: there is no folder {self.path.parent}")
        if self.path.is_dir():
            raise IsADirectoryError(f"journal: {self.path} is a folder; give a file in it")
        if self.path.exists():
            with self.path.open("rb") as file:
                head = file.read(len(_HEADER))
            if head and head != _HEADER:
                raise self._foreign("it is no SQLite database")
        connections: list[sqlite3.Connection] = []
        self._close = weakref.finalize(self, _close_all, connections)
        try:
            # Results are on disk after a commit. Claims need not be: they end with their owners.
            for synchronous in ("FULL", "OFF"):
                # Transactions are begun by hand.
                connections.append(
                    sqlite3.connect(
                        self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
                    )
                )
                connections[-1].execute(f"PRAGMA synchronous={synchronous}")
            self._durable, self._fleeting = connections
            self._check()
        except BaseException:
            self._durable = None
            self._close()
            raise

    def _check(self) -> None:
        """Makes the tables in an empty file; raises for any other file that is not a journal."""
        database = self._connection(durable=True)
        found = self._identity()
        if found == (0, 0) and not self._tables():
            # A log instead of copies of pages: readers do not wait for writers, and a program that
            # is killed leaves nothing half done.
            database.execute("PRAGMA journal_mode=WAL")
            with self._transaction(durable=True):
                if not self._tables():  # or another process was first
                    for statement in _SCHEMA.split(";"):
                        database.execute(statement)
                    database.execute(f"PRAGMA application_id={_APPLICATION}")
                    database.execute(f"PRAGMA user_version={_VERSION}")
            found = self._identity()
        if found[0] != _APPLICATION:
            raise self._foreign("it is a SQLite database of another program")
        if found[1] != _VERSION:
            raise self._foreign(f"it has the format {found[1]}, and this release has {_VERSION}")
        [(verdict,), *_] = database.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    def _identity(self) -> tuple[int, int]:
        database = self._connection(durable=True)
        [application] = database.execute("PRAGMA application_id").fetchone()
        [version] = database.execute("PRAGMA user_version").fetchone()
        return application, version

    def _tables(self) -> list[str]:
        rows = self._connection(durable=True).execute("SELECT name FROM sqlite_master")
        return [name for (name,) in rows]

    def _foreign(self, why: str) -> ValueError:
        return ValueError(
            f"journal: {self.path} is not a journal of perturbax: {why}. It was left as it is; "
            "give another path"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # a full disk, a lock that is not released
            error.add_note(f"The journal is {self.path}")
            raise
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"journal: {self.path} is damaged ({error}). It was left as it is; give another "
                "path, or restore it from a copy"
            ) from error

    def _connection(self, durable: bool) -> sqlite3.Connection:
        if self._durable is None:
            self._open()
        connection = self._durable if durable else self._fleeting
        assert connection is not None
        return connection

    @contextlib.contextmanager
    def _transaction(self, durable: bool) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            database = self._connection(durable)
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    def close(self) -> None:
        """Closes the file; it is opened again when it is needed."""
        with self._lock:
            if self._durable is not None:
                self._durable = None
                self._close()

    def key_prefix(self, tree: Any, fixed: Any) -> bytes:
        """What keys of all points of a call have in common."""
        skeleton = _skeleton(tree)
        structure = str(tree) if skeleton is None else json.dumps(skeleton)
        return hashlib.sha256(repr((self.name, structure, fixed)).encode()).digest()

    def lookup(self, keys: Iterable[bytes]) -> dict[bytes, tuple[list[np.ndarray], Any]]:
        """The results that are there."""
        found = {}
        with self._lock, self._explained():
            database = self._connection(durable=True)
            for key in keys:
                row = database.execute("SELECT value FROM results WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = _decode(row[0])
        return found

    def claim(self, keys: Sequence[bytes], owner: str) -> list[bytes]:
        """Those of the keys that `owner` is to evaluate: neither done nor claimed by others."""
        now, granted = time.time(), []
        with self._transaction(durable=False) as database:
            for key in keys:
                done = database.execute("SELECT 1 FROM results WHERE key = ?", (key,)).fetchone()
                other = database.execute(
                    "SELECT owner, until FROM claims WHERE key = ?", (key,)
                ).fetchone()
                if done or (other and other[0] != owner and _holds(other[0], other[1], now)):
                    continue
                database.execute(
                    "INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (key, owner, now + _CLAIM)
                )
                granted.append(key)
        return granted

    def renew(self, owner: str) -> None:
        """Extends the claims of `owner`."""
        with self._transaction(durable=False) as database:
            until = time.time() + _CLAIM
            database.execute("UPDATE claims SET until = ? WHERE owner = ?", (until, owner))

    def release(self, owner: str) -> None:
        """Gives up the claims of `owner`."""
        with self._transaction(durable=False) as database:
            database.execute("DELETE FROM claims WHERE owner = ?", (owner,))

    def record(self, results: dict[bytes, tuple[list[np.ndarray], Any]]) -> None:
        """Writes results, to disk; those that are there already stay."""
        rows = [(key, self.name, _encode(*result)) for key, result in results.items()]
        with self._transaction(durable=True) as database:
            database.executemany("INSERT OR IGNORE INTO results VALUES (?, ?, ?)", rows)
            database.executemany("DELETE FROM claims WHERE key = ?", [(key,) for key in results])


def _close_all(connections: list[sqlite3.Connection]) -> None:
    for connection in connections:
        connection.close()


def _holds(owner: str, until: float, now: float) -> bool:
    """Whether a claim is still that of somebody."""
    host, process, _ = owner.rsplit(" ", 2)
    if until < now:
        return False
    if host != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Session:
    """The points of one call back, as the journal sees them."""

    def __init__(self, file: JournalFile, keys: Sequence[bytes]):
        """For points with these keys."""
        self._file, self.keys = file, keys
        self._owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self._written: dict[bytes, tuple[list[np.ndarray], Any]] = {}
        self._over = threading.Event()
        self._renewing: threading.Thread | None = None

    def known(self, rows: Iterable[int]) -> dict[int, tuple[list[np.ndarray], Any]]:
        """Results of those of the points that have one."""
        rows = list(rows)
        found = self._file.lookup({self.keys[row] for row in rows})
        return {row: found[self.keys[row]] for row in rows if self.keys[row] in found}

    def claim(self, rows: Sequence[int]) -> list[int]:
        """Those of the points that are to be evaluated here."""
        granted = set(self._file.claim([self.keys[row] for row in rows], self._owner))
        if self._renewing is None:
            self._renewing = threading.Thread(
                target=_renew, args=(self._file, self._owner, self._over), daemon=True
            )
            self._renewing.start()
        return [row for row in rows if self.keys[row] in granted]

    def write(self, row: int, leaves: list[np.ndarray], tree: Any) -> None:
        """Keeps a result for `flush`."""
        self._written[self.keys[row]] = leaves, tree

    def flush(self) -> None:
        """Brings the results to disk."""
        if self._written:
            self._file.record(self._written)
            self._written = {}

    def close(self) -> None:
        """Gives up what was claimed and has no result."""
        try:
            self.flush()
        finally:  # a claim that is renewed for ever would keep all from the point
            if self._renewing is not None:
                self._over.set()
                self._renewing.join()
                with contextlib.suppress(sqlite3.OperationalError):  # then it runs out
                    self._file.release(self._owner)


def _renew(file: JournalFile, owner: str, over: threading.Event) -> None:
    while not over.wait(_CLAIM / 5):
        # A lock that is not released in time costs the claim, so perhaps a second evaluation.
        with contextlib.suppress(sqlite3.OperationalError):
            file.renew(owner)
