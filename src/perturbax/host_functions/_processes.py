"""Processes of our own, which can be ended one by one."""

import contextlib
import functools
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from .._checks import check_count
from . import _worker
from ._attempts import Attempt, Workers
from ._crew import Crew
from ._pickles import cloudpickle, pickled

# Variables that tell numerical libraries how many threads to use.
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


class ProcessWorkers:
    """Processes that evaluate host functions, and can be ended one by one.

    Workers are not copies of this process, and do not import JAX unless the function does. An
    evaluation that takes longer than `timeout` is ended with its worker and with all processes that
    it started, and the worker is replaced, within milliseconds; so is one that dies. Nothing is
    left behind when the workers are closed, when the program ends, or when it is killed.

    Args:
      num_workers: number of processes; None for as many as this machine has cores.
      initializer: called without arguments in each worker before anything else.
      threads_per_worker: how many threads numerical libraries (BLAS, OpenMP) may use in each
        worker; None leaves that to them. Each of them would use all cores.

    Functions are sent to the workers by cloudpickle, so that they may be local, lambdas, or defined
    in a notebook, and so may classes of pytrees and exceptions. Functions are sent once, arguments
    each time.

    Raises:
      ImportError: if cloudpickle is missing: pip install 'perturbax[processes]'.
      NotImplementedError: on Windows.
      TypeError: where an argument is not of the kind described.
      ValueError: where a number is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import perturbax as px
      >>> with px.ProcessWorkers(2) as workers:
      ...     h = px.host_function(lambda x: float(x.sum()), executor=workers, timeout=10.0)
      ...     print(h(jnp.ones(3)))
      3.0
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        initializer: Callable[[], Any] | None = None,
        threads_per_worker: int | None = 1,
    ):
        if os.name != "posix":
            raise NotImplementedError(
                "perturbax.ProcessWorkers needs a POSIX system; use loky.get_reusable_executor() "
                "(pip install 'perturbax[loky]')"
            )
        if num_workers is None:
            num_workers = os.cpu_count() or 1
        self.num_workers = check_count(num_workers, "num_workers")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be callable, got {type(initializer).__name__}")
        if threads_per_worker is not None:
            threads_per_worker = check_count(threads_per_worker, "threads_per_worker")
        environment = dict(os.environ)
        if threads_per_worker is not None:
            environment |= dict.fromkeys(_THREADS, str(threads_per_worker))
        cloudpickle()
        first = None if initializer is None else pickled(initializer, "initializer")
        # What each worker needs is imported once. Numpy with threads of its own forks less well.
        modules = ("cloudpickle",)
        if threads_per_worker is not None:
            modules += ("numpy", "numpy.random")
        nursery = _Nursery(environment, modules)
        self._crew = Crew(self.num_workers, lambda: _Process(nursery, first))
        self._closed = False
        self._nursery = nursery
        self._end = weakref.finalize(self, nursery.close)

    def workers(self, fun: Callable[..., Any]) -> Workers:
        """These processes, to call `fun`."""
        return _OnProcesses(self, fun)

    def crew(self) -> Crew:
        """The threads that have the processes; an error if they were ended."""
        if self._closed:
            raise RuntimeError("these perturbax.ProcessWorkers were closed; make new ones")
        return self._crew

    def close(self) -> None:
        """Ends all workers."""
        self._closed = True
        self._crew.close(wait=5.0)
        self._end()

    def __enter__(self) -> "ProcessWorkers":
        """Returns the workers, which the end of the `with` block closes."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends all workers."""
        self.close()

    def __repr__(self) -> str:
        """Says how many there are."""
        return f"ProcessWorkers({self.num_workers})"


class _OnProcesses:
    """Calls of one function on `ProcessWorkers`."""

    ahead = Crew.ahead
    _numbers = itertools.count()

    def __init__(self, pool: ProcessWorkers, fun: Callable[..., Any]):
        self._crew = pool.crew
        # Pickled at the first call, by which time what it refers to is there.
        self._function = functools.cache(lambda: (next(self._numbers), pickled(fun, "fun")))

    def window(self) -> int | None:
        return self._crew().window()

    def submit(self, attempt: Attempt) -> None:
        attempt.args = (*self._function(), pickled((attempt.args, attempt.kwargs), "x"))
        self._crew().submit(attempt)

    def deadline(self, attempt: Attempt, timeout: float) -> float | None:
        return self._crew().deadline(attempt, timeout)

    def withdraw(self, attempt: Attempt) -> bool:
        return self._crew().withdraw(attempt)

    def give_up(self, attempt: Attempt) -> None:
        self._crew().give_up(attempt)

    def close(self) -> None:
        pass  # the processes are their owner's


class _Nursery:
    """The process that forks worker processes; started when it is needed, unless it was closed."""

    def __init__(self, environment: dict[str, str], modules: tuple[str, ...]):
        self._environment, self._modules = environment, modules
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker: its process, and the connection with it."""
        ours, theirs = socket.socketpair()
        with theirs:
            return self._order(b"f", 0, [theirs.fileno()]), ours

    def wait(self, process: int) -> int | None:
        """The exit status of a worker that ends; None if nobody knows it any more."""
        try:
            status = self._order(b"w", process, [])
        except OSError:  # the nursery has ended
            return None
        return None if status == _worker.UNKNOWN else status

    def _order(self, order: bytes, number: int, files: list[int]) -> int:
        with self._lock:
            if self._closed:  # by a finalizer, while a thread of the crew ends its worker
                raise ConnectionError("the process that starts workers was closed")
            if self._control is None:
                self._start()
            assert self._control is not None
            try:
                message = _worker.ORDER.pack(order, number)
                socket.send_fds(self._control, [message], files)
                return self._answer(self._control)
            except OSError:
                self._stop()
                raise

    def _answer(self, control: socket.socket) -> int:
        answer = control.recv(_worker.ANSWER.size, socket.MSG_WAITALL)
        if len(answer) < _worker.ANSWER.size:
            raise ConnectionError("the process that starts workers has died")
        return _worker.ANSWER.unpack(answer)[0]

    def _start(self) -> None:
        control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # Unbuffered: what a function prints is there, however its process ends.
                [sys.executable, "-P", "-u", _worker.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=[theirs.fileno()],
                process_group=0,  # not to end by the Ctrl-C that is meant for this program
            )
        with control.makefile("wb") as stream:
            _worker.write_message(stream, pickle.dumps((sys.path, self._modules)))
        self._answer(control)
        self._control = control

    def _stop(self) -> None:
        """Ends the process. Workers end when their own connections do."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stop()


class _RaisedThereError(Exception):
    """Carries an exception past those of the connection, which it may be like."""

    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error


class _Process:
    """A worker process, seen from the thread that has it."""

    def __init__(self, nursery: _Nursery, initializer: bytes | None):
        self._nursery, self._initializer = nursery, initializer
        self._connection: socket.socket | None = None
        self._stream: Any = None
        self._process = 0
        self._known: set[int] = set()
        self._lock = threading.Lock()

    def call(self, attempt: Attempt) -> None:
        number, function, arguments = attempt.args
        try:
            if self._connection is None:
                self._start(attempt)
            if number not in self._known:
                self._request("load", number, function)
                self._known.add(number)
            self._send("arguments", number, arguments)
            self._send("call", number, b"")
            self._reply()  # to the first: the call begins
            attempt.started = time.monotonic()
            attempt.value = self._reply()
        except _RaisedThereError as raised:
            attempt.error = raised.error
            if attempt.started is None:  # the initializer failed, or something cannot be unpickled
                attempt.fatal = True
                self._end()
        except (EOFError, OSError):
            attempt.error = RuntimeError(f"a worker process died{_how(self._end())}")
            attempt.died = True

    def _start(self, attempt: Attempt) -> None:
        with self._lock:
            if attempt.given_up:
                raise EOFError
            self._process, self._connection = self._nursery.fork()
            self._stream = self._connection.makefile("rwb")
        self._known.clear()
        if self._initializer is not None:
            self._request("initialize", 0, self._initializer)

    def _request(self, *message: Any) -> None:
        self._send(*message)
        self._reply()

    def _send(self, *message: Any) -> None:
        _worker.write_message(self._stream, pickle.dumps(message, 5))

    def _reply(self) -> Any:
        value, error = _worker.unsealed(_worker.read_message(self._stream))
        if error is not None:
            raise _RaisedThereError(error)
        return value

    def kill(self) -> bool:
        with self._lock:
            if self._process:
                _kill(self._process)
        return True

    def close(self) -> None:
        self._end()

    def _end(self) -> int | None:
        """Ends the process; its exit status, if there was one."""
        with self._lock:
            process, self._process = self._process, 0
        if not process:
            return None
        _kill(process)
        assert self._connection is not None
        with contextlib.suppress(OSError):  # of what could not be written any more
            self._stream.close()
        self._connection.close()
        self._connection = None
        return self._nursery.wait(process)


def _kill(process: int) -> None:
    """Ends a worker and all that it started."""
    for end in (os.kill, os.killpg):  # it may not have a group yet
        # On macOS the group of a process that has just ended may not be sent to.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(process, signal.SIGKILL)


def _how(code: int | None) -> str:
    if code is None:
        return ""
    return f", by signal {-code}" if code < 0 else f", with exit status {code}"
