"""The journal of a host function: results on disk, to go on from after a crash.

A SQLite database with one table of results and one of claims, by which processes that share it do
not evaluate the same point at the same time. Results are arrays in an encoding of their own: dtype,
shape and bytes. A key is a hash of the exact bytes of a point and arguments, and of the function.
"""

import contextlib
import dataclasses
import hashlib
import os
import socket
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ._encoding import decode, encode
from ._function_names import name_of, name_of_arguments

_T = TypeVar("_T")

# "pxJ1": says whose database it is.
_APPLICATION = 0x70784A31
_VERSION = 2
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
      ValueError: if path is what SQLite calls a database without a file.
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
        if os.fspath(self.path) in ("", ":memory:"):
            raise ValueError(
                f"journal={os.fspath(self.path)!r} is no file, and would be gone with the program: "
                "give the path of one"
            )
        if not isinstance(self.name, str | None):
            raise TypeError(f"name must be a string or None, got {type(self.name).__name__}")


def check_journal(journal: Any) -> Journal | None:
    """The argument `journal` of `host_function`."""
    return journal if journal is None or isinstance(journal, Journal) else Journal(journal)


class JournalFile:
    """An open journal, with the name of one function."""

    def __init__(self, journal: Journal, fun: Callable[..., Any]):
        """Opens or makes the file; an error if it is damaged, or something else."""
        self.path = Path(journal.path)
        self.name = name_of(fun) if journal.name is None else f"name:{journal.name}"
        self._kinds: dict[type, bytes] = {}
        self._lock = threading.RLock()
        self._durable: sqlite3.Connection | None = None
        with self._lock, self._explained():
            self._open()

    def _open(self) -> None:
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"journal: there is no folder {self.path.parent}")
        if self.path.is_dir():
            raise IsADirectoryError(f"journal: {self.path} is a folder; give a file in it")
        # Never opened here: who closes a file gives up all locks that the process has on it, those
        # of SQLite too. SQLite tells what is no database, but takes a single byte for an empty one.
        if self.path.exists() and self.path.stat().st_size == 1:
            raise self._foreign("it is no SQLite database")
        connections: list[sqlite3.Connection] = []
        self._close = weakref.finalize(self, _close_all, connections)
        try:
            # Results are on disk after a commit. Claims need not be: they end with their owners.
            # But with OFF in place of NORMAL, where they or the end bring the log into the
            # database, results would not be on disk any more either.
            for synchronous in ("FULL", "NORMAL"):
                # Transactions are begun by hand.
                connections.append(
                    sqlite3.connect(
                        self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
                    )
                )
                connections[-1].execute(f"PRAGMA synchronous={synchronous}")
                # On macOS, fsync leaves what it writes in the cache of the drive, which loses it
                # with the power; these empty the cache. Elsewhere they do nothing.
                connections[-1].execute("PRAGMA fullfsync=1")
                connections[-1].execute("PRAGMA checkpoint_fullfsync=1")
            self._durable, self._fleeting = connections
            self._check()
        except BaseException as error:
            self._durable = None
            self._close()
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
                raise self._foreign("it is no SQLite database") from error
            raise

    def _check(self) -> None:
        """Makes the tables in an empty file; raises for any other file that is not a journal."""
        database = self._connection(durable=True)
        found = self._identity()
        if found == (0, 0) and not self._tables():
            # A log instead of copies of pages: readers do not wait for writers, and a program that
            # is killed leaves nothing half done.
            database.execute("PRAGMA journal_mode=WAL")
            self._transaction(True, self._make)
            found = self._identity()
        if found[0] != _APPLICATION:
            raise self._foreign("it is a SQLite database of another program")
        if found[1] != _VERSION:
            raise self._refused(
                f"is of another release: it has the format {found[1]}, this one {_VERSION}"
            )
        [(verdict,), *_] = database.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    def _make(self, database: sqlite3.Connection) -> None:
        if not self._tables():  # or another process was first
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA application_id={_APPLICATION}")
            database.execute(f"PRAGMA user_version={_VERSION}")

    def _identity(self) -> tuple[int, int]:
        database = self._connection(durable=True)
        [application] = database.execute("PRAGMA application_id").fetchone()
        [version] = database.execute("PRAGMA user_version").fetchone()
        return application, version

    def _tables(self) -> list[str]:
        rows = self._connection(durable=True).execute("SELECT name FROM sqlite_master")
        return [name for (name,) in rows]

    def _foreign(self, why: str) -> ValueError:
        return self._refused(f"is not a journal of perturbax: {why}")

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"journal: {self.path} {why}. It was left as it is; give another path")

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

    def _transaction(self, durable: bool, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """What `work` returns. No context manager: Ctrl-C before its body would leave it open."""
        with self._lock, self._explained():
            database = self._connection(durable)
            try:
                self._roll_back()  # what Ctrl-C has left, where it came twice
                database.execute("BEGIN IMMEDIATE")
                found = work(database)
                database.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise
            return found

    def _roll_back(self) -> None:
        for connection in (self._durable, self._fleeting):
            if connection is not None and connection.in_transaction:
                connection.execute("ROLLBACK")

    def close(self) -> None:
        """Closes the file; it is opened again when it is needed."""
        with self._lock:
            if self._durable is not None:
                self._durable = None
                self._close()

    def key_prefix(self, tree: Any, fixed: tuple[Any, ...]) -> bytes:
        """What keys of all points of a call have in common."""
        arguments = name_of_arguments(tree, fixed, self._kinds)
        return hashlib.sha256(repr((self.name, arguments)).encode()).digest()

    def lookup(self, keys: Iterable[bytes]) -> dict[bytes, tuple[list[np.ndarray], Any]]:
        """The results that are there."""
        found = {}
        with self._lock, self._explained():
            database = self._connection(durable=True)
            for key in keys:
                row = database.execute("SELECT value FROM results WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = decode(row[0])
        return found

    def claim(self, keys: Sequence[bytes], owner: str) -> list[bytes]:
        """Those of the keys that `owner` is to evaluate: neither done nor claimed by others."""
        now = time.time()

        def work(database: sqlite3.Connection) -> list[bytes]:
            granted = []
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

        return self._transaction(False, work)

    def renew(self, owner: str) -> None:
        """Extends the claims of `owner`."""

        def work(database: sqlite3.Connection) -> None:
            until = time.time() + _CLAIM
            database.execute("UPDATE claims SET until = ? WHERE owner = ?", (until, owner))

        self._transaction(False, work)

    def release(self, owner: str) -> None:
        """Gives up the claims of `owner`."""

        def work(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM claims WHERE owner = ?", (owner,))

        self._transaction(False, work)

    def record(self, results: dict[bytes, tuple[list[np.ndarray], Any]]) -> None:
        """Writes results, to disk; those that are there already stay."""
        rows = [(key, self.name, encode(*result)) for key, result in results.items()]

        def work(database: sqlite3.Connection) -> None:
            database.executemany("INSERT OR IGNORE INTO results VALUES (?, ?, ?)", rows)
            database.executemany("DELETE FROM claims WHERE key = ?", [(key,) for key in results])

        self._transaction(True, work)


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
        self._claims = False

    def known(self, rows: Iterable[int]) -> dict[int, tuple[list[np.ndarray], Any]]:
        """Results of those of the points that have one."""
        rows = list(rows)
        found = self._file.lookup({self.keys[row] for row in rows})
        return {row: found[self.keys[row]] for row in rows if self.keys[row] in found}

    def claim(self, rows: Sequence[int]) -> list[int]:
        """Those of the points that are to be evaluated here."""
        self._claims = True  # before they are there: Ctrl-C may come right after
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
        """Gives up what was claimed and has no result; where Ctrl-C ended it, call it again."""
        try:
            self.flush()
        finally:  # a claim that is renewed for ever would keep all from the point
            self._over.set()
            # One that Ctrl-C kept from its start cannot be joined, and renews nothing.
            if self._renewing is not None and self._renewing.is_alive():
                self._renewing.join()
            if self._claims:
                with contextlib.suppress(sqlite3.OperationalError):  # then it runs out
                    self._file.release(self._owner)


def _renew(file: JournalFile, owner: str, over: threading.Event) -> None:
    while not over.wait(_CLAIM / 5):
        # A lock that is not released in time costs the claim, so perhaps a second evaluation.
        with contextlib.suppress(sqlite3.OperationalError):
            file.renew(owner)
