"""Where evaluations run: this thread, threads and processes of our own, executors of others.

Each takes attempts at evaluations, and reports through a queue that they have ended.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import operator
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from .._checks import check_count
from ..tracing._host_call import without_jax
from . import _worker

# How many threads with hung evaluations may be left behind: none of them can be ended.
_MOST_LEFT_BEHIND = 500
# The same in a process of somebody else's executor, which then ends itself.
_MOST_IN_A_PROCESS = 16
# What a worker may need to start, in seconds, on top of what an evaluation may take.
_START = 60.0
# Variables that tell numerical libraries how many threads to use.
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


@dataclasses.dataclass(eq=False)
class Attempt:
    """One call of the function: what it is called with, and what became of it.

    Attributes:
      args: positional arguments.
      kwargs: arguments by name.
      events: where the attempt is put when it has ended, unless it was given up before.
      value: what the function returned.
      error: the exception that it ended with instead.
      died: whether `error` is about the worker, not about the function.
      fatal: whether there is no use in another attempt at anything.
      given_up: whether nobody waits for it any more.
      left_behind: whether its thread is to end with it.
      submitted: when it was handed over, by time.monotonic().
      taken: when a worker took it.
      started: when the function was called.
      ended: whether it has ended.
      place: what the workers know it by.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    events: "queue.SimpleQueue[Attempt]"
    value: Any = None
    error: BaseException | None = None
    died: bool = False
    fatal: bool = False
    given_up: bool = False
    left_behind: bool = False
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    taken: float | None = None
    started: float | None = None
    ended: bool = False
    place: Any = None


class Workers(Protocol):
    """Where attempts run."""

    def window(self) -> int | None:
        """How many attempts under way keep all workers busy; None for unknown."""
        ...

    def ahead(self) -> int:
        """How many windows to hand over at a time, for where results take a while to come back."""
        ...

    def submit(self, attempt: Attempt) -> None:
        """Has the attempt made as soon as a worker is free."""
        ...

    def deadline(self, attempt: Attempt, timeout: float) -> float | None:
        """When the attempt will have taken too long, as far as that is known by now."""
        ...

    def withdraw(self, attempt: Attempt) -> bool:
        """Whether no worker had taken the attempt, and none will."""
        ...

    def give_up(self, attempt: Attempt) -> None:
        """Frees the worker of the attempt, of which no event will come any more."""
        ...

    def close(self) -> None:
        """Ends what was started here."""
        ...


def workers_for(executor: Any, fun: Callable[..., Any], timeout: float | None) -> Workers:
    """The workers that call `fun` as `executor` says, an argument of `host_function`."""
    if executor is None:
        # To give up an evaluation takes another thread than the one that waits.
        return ThisThread(fun) if timeout is None else Crew(1, lambda: _Direct(fun))
    if isinstance(executor, ProcessWorkers):
        return executor.workers(fun)
    if isinstance(executor, int) and not isinstance(executor, bool):
        return Crew(executor, lambda: _Direct(fun))
    return Foreign(executor, fun, timeout)


def check_executor(executor: Any) -> Any:
    """The executor, as one of those that `workers_for` knows."""
    if executor is None or isinstance(executor, ProcessWorkers):
        return executor
    if isinstance(executor, concurrent.futures.ProcessPoolExecutor):
        context = getattr(executor, "_mp_context", None)
        if context is not None and context.get_start_method() == "fork":
            raise ValueError(
                "executor forks this process, in which JAX runs threads: a forked process can wait "
                "forever for one of them (jax#4228). Pass perturbax.ProcessWorkers(...), or "
                "ProcessPoolExecutor(..., mp_context=multiprocessing.get_context('forkserver'))"
            )
        return executor
    if _is_from(executor, "distributed"):
        if hasattr(executor, "get_executor"):
            return executor.get_executor(pure=False)
        if getattr(executor, "_kwargs", {}).get("pure", True):
            raise ValueError(
                "executor may remember results of equal arguments; pass the Client itself, or "
                "client.get_executor(pure=False)"
            )
    if isinstance(executor, concurrent.futures.Executor):
        return executor
    if isinstance(executor, str | type) or not hasattr(executor, "__index__"):
        raise TypeError(
            "executor must be None, a number of threads, perturbax.ProcessWorkers(...), an object "
            "such as concurrent.futures.ThreadPoolExecutor(8) or loky.get_reusable_executor(8) "
            "(pip install 'perturbax[loky]'), or a Dask Client (pip install 'perturbax[dask]'), "
            f"got {executor!r} ({type(executor).__name__})"
        )
    return check_count(executor, "executor")


def _is_from(value: Any, package: str) -> bool:
    return type(value).__module__.split(".")[0] == package


def run(fun: Callable[..., Any], attempt: Attempt) -> None:
    """Calls the function, and keeps what becomes of it."""
    attempt.started = time.monotonic()
    try:
        attempt.value = fun(*attempt.args, **attempt.kwargs)
    except Exception as error:
        attempt.error = error


class ThisThread:
    """Attempts are made while they are handed over."""

    def __init__(self, fun: Callable[..., Any]):
        """For calls of `fun`."""
        self._fun = without_jax(fun)

    def window(self) -> int | None:
        """One."""
        return 1

    def ahead(self) -> int:
        """One."""
        return 1

    def submit(self, attempt: Attempt) -> None:
        """Makes the attempt."""
        run(self._fun, attempt)
        attempt.events.put(attempt)

    def deadline(self, attempt: Attempt, timeout: float) -> float | None:
        """None: when it is asked, the attempt has ended."""
        del attempt, timeout

    def withdraw(self, attempt: Attempt) -> bool:
        """False: the attempt has ended."""
        del attempt
        return False

    def give_up(self, attempt: Attempt) -> None:
        """Nothing: the attempt has ended."""

    def close(self) -> None:
        """Nothing: there is nothing to end."""


# --- Threads of our own, each of which may have a process


class Caller(Protocol):
    """What one thread calls the function with."""

    def call(self, attempt: Attempt) -> None:
        """Makes the attempt, and keeps what becomes of it."""
        ...

    def kill(self) -> bool:
        """Ends the call that is under way, from another thread; whether that was possible."""
        ...

    def close(self) -> None:
        """Ends what it calls with."""
        ...


class _Direct:
    """Calls the function in the thread itself."""

    def __init__(self, fun: Callable[..., Any]):
        self._fun = without_jax(fun)

    def call(self, attempt: Attempt) -> None:
        try:
            run(self._fun, attempt)
        except BaseException as error:  # SystemExit, which would end the thread unseen
            attempt.error = error

    def kill(self) -> bool:
        return False

    def close(self) -> None:
        pass


class _Shared:
    """What the threads of a crew share. They do not know the crew, so that it can be forgotten."""

    def __init__(self, count: int, make: Callable[[], Caller]):
        self.count, self.make = count, make
        self.tasks: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.threads: dict[threading.Thread, Caller] = {}  # but for those left behind
        self.left_behind = 0


class Crew:
    """Threads that take attempts from a queue, started when they are needed.

    An attempt that is given up costs its thread, if nothing ends the call; another one takes its
    place. Threads are daemons: one that hangs does not keep the program from ending.
    """

    def __init__(self, count: int, make: Callable[[], Caller]):
        """Of up to `count` threads, each with a caller of its own."""
        self._shared = _Shared(count, make)
        self._end = weakref.finalize(self, _end_crew, self._shared)

    def window(self) -> int | None:
        """Two for each thread: the next attempt waits in the queue."""
        return 2 * self._shared.count

    def ahead(self) -> int:
        """One."""
        return 1

    def submit(self, attempt: Attempt) -> None:
        """Puts the attempt in the queue, and starts a thread if one may be missing."""
        self._shared.tasks.put(attempt)
        self._grow()

    def _grow(self) -> None:
        shared = self._shared
        with shared.lock:
            if len(shared.threads) >= shared.count:
                return
            caller = shared.make()
            thread = threading.Thread(
                target=_serve, args=(shared, caller), daemon=True, name="perturbax: evaluations"
            )
            shared.threads[thread] = caller
        thread.start()

    def deadline(self, attempt: Attempt, timeout: float) -> float | None:
        """From the start of the call; a worker that does not even start has a minute more."""
        if attempt.started is not None:
            return attempt.started + timeout
        return None if attempt.taken is None else attempt.taken + timeout + _START

    def withdraw(self, attempt: Attempt) -> bool:
        """Leaves the attempt in the queue, where it will be passed over."""
        with self._shared.lock:
            attempt.given_up = attempt.taken is None
        return attempt.given_up

    def give_up(self, attempt: Attempt) -> None:
        """Ends the process of the call, or leaves its thread behind."""
        shared = self._shared
        with shared.lock:
            attempt.given_up = True
            if attempt.taken is None or attempt.ended or attempt.place.kill():
                return
            attempt.left_behind = True
            thread = next(t for t, caller in shared.threads.items() if caller is attempt.place)
            del shared.threads[thread]
            shared.left_behind += 1
        self._grow()
        if shared.left_behind > _MOST_LEFT_BEHIND:
            raise RuntimeError(
                f"{shared.left_behind} evaluations hang in threads, which cannot be ended. Use "
                "executor=perturbax.ProcessWorkers(...), which ends and replaces the process of "
                "each evaluation that takes longer than timeout"
            )

    def close(self, wait: float = 0.0) -> None:
        """Ends the threads, and their processes; a thread that is in a call ends after it."""
        _end_crew(self._shared, wait)


def _serve(shared: _Shared, caller: Caller) -> None:
    """What a thread of a crew does."""
    try:
        while (attempt := shared.tasks.get()) is not None:
            with shared.lock:
                if attempt.given_up:
                    continue
                attempt.taken, attempt.place = time.monotonic(), caller
            caller.call(attempt)
            with shared.lock:
                attempt.ended = True
                if attempt.left_behind:
                    shared.left_behind -= 1
                    return
            if not attempt.given_up:
                attempt.events.put(attempt)
            del attempt
    finally:
        caller.close()


def _end_crew(shared: _Shared, wait: float = 0.0) -> None:
    with shared.lock:
        threads, shared.threads = shared.threads, {}
    for caller in threads.values():
        shared.tasks.put(None)
        caller.kill()
    for thread in threads:
        if wait and thread is not threading.current_thread():
            thread.join(wait)


# --- Processes of our own


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
    in a notebook. They are sent once, arguments each time.

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
        _cloudpickle()
        first = None if initializer is None else _pickled(initializer, "initializer")
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


def _cloudpickle() -> Any:
    try:
        import cloudpickle
    except ImportError as error:
        raise ImportError(
            "to send functions to processes takes cloudpickle: pip install 'perturbax[processes]'"
        ) from error
    return cloudpickle


class _OnProcesses:
    """Calls of one function on `ProcessWorkers`."""

    _numbers = itertools.count()

    def __init__(self, pool: ProcessWorkers, fun: Callable[..., Any]):
        self._pool = pool
        # Pickled at the first call, by which time what it refers to is there.
        self._function = functools.cache(lambda: (next(self._numbers), _pickled(fun, "fun")))

    def window(self) -> int | None:
        return self._pool.crew().window()

    def ahead(self) -> int:
        return self._pool.crew().ahead()

    def submit(self, attempt: Attempt) -> None:
        attempt.args = (*self._function(), pickle.dumps((attempt.args, attempt.kwargs), 5))
        self._pool.crew().submit(attempt)

    def deadline(self, attempt: Attempt, timeout: float) -> float | None:
        return self._pool.crew().deadline(attempt, timeout)

    def withdraw(self, attempt: Attempt) -> bool:
        return self._pool.crew().withdraw(attempt)

    def give_up(self, attempt: Attempt) -> None:
        self._pool.crew().give_up(attempt)

    def close(self) -> None:
        """Nothing: the processes are their owner's."""


def _pickled(value: Any, name: str) -> bytes:
    try:
        return _cloudpickle().dumps(value)
    except Exception as error:
        error.add_note(f"{name} is sent to worker processes, so cloudpickle must be able to")
        raise


class _Nursery:
    """The process that forks worker processes; started when it is needed."""

    def __init__(self, environment: dict[str, str], modules: tuple[str, ...]):
        self._environment, self._modules = environment, modules
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker: its process, and the connection with it."""
        ours, theirs = socket.socketpair()
        with theirs:
            return self._order(b"f", 0, [theirs.fileno()]), ours

    def wait(self, process: int) -> int | None:
        """The exit status of a worker that ends."""
        try:
            return self._order(b"w", process, [])
        except OSError:  # the nursery has ended, and another one does not know the worker
            return None

    def _order(self, order: bytes, number: int, files: list[int]) -> int:
        with self._lock:
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
        message = _worker.read_message(self._stream)
        try:
            kind, value, text = pickle.loads(message)
        except Exception as error:
            error.add_note("Raised by unpickling what a worker process has sent")
            raise _RaisedThereError(error) from None
        if kind != "raised":
            return value
        value.add_note(f"Raised in a worker process:\n\n{text}")
        raise _RaisedThereError(value)

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
        with contextlib.suppress(ProcessLookupError):
            end(process, signal.SIGKILL)


def _how(code: int | None) -> str:
    if code is None:
        return ""
    return f", by signal {-code}" if code < 0 else f", with exit status {code}"


# --- Executors of others


class _Shipped:
    """A function that unpickles without perturbax, hence without JAX, in the process it goes to."""

    def __init__(self, function: bytes):
        self._function = function

    def __reduce__(self) -> Any:
        return pickle.loads, (self._function,)


class _Place:
    """An executor of somebody else's kind, and what it has to do."""

    def __init__(self, executor: Any, ready: bool):
        self.executor, self.ready = executor, ready
        self.load = 0  # calls under way


class Foreign:
    """Attempts on an executor with the interface of `concurrent.futures`.

    A pool of processes breaks as a whole when one of them dies. In place of one that broke come as
    many pools of one process each, so that the next death costs one worker and what it was at. A
    pool that is just starting is given nothing while there are others.
    """

    def __init__(self, executor: Any, fun: Callable[..., Any], timeout: float | None):
        """For calls of `fun`, which are left behind where they take longer than `timeout`."""
        self._given = executor
        self._client = getattr(executor, "_client", None)  # of a Dask cluster
        self._count, self._count_again = 1, 0.0
        self._places = [_Place(executor, ready=True)]
        self._lock = threading.Lock()
        self._call = functools.cache(functools.partial(_call_of, executor, fun, timeout))
        self._made: list[Any] = []  # executors, to be shut down
        self._end = weakref.finalize(self, _shut_down, self._made)

    def window(self) -> int | None:
        """Two for each worker, if the executor tells how many there are."""
        if self._client is not None:
            # The cluster may grow and shrink. To ask takes as long as a few evaluations.
            if time.monotonic() > self._count_again:
                self._count = max(1, sum(self._client.nthreads().values()))
                self._count_again = time.monotonic() + 1.0
            return 2 * self._count
        workers = getattr(self._given, "_max_workers", None)
        return None if workers is None else 2 * workers

    def ahead(self) -> int:
        """Of a cluster several: it sends messages every ten milliseconds, both ways."""
        return 1 if self._client is None else 8

    def submit(self, attempt: Attempt) -> None:
        """Submits the call; where workers died before, to an executor made anew."""
        while True:
            with self._lock:
                place = min(self._places, key=lambda one: (not one.ready, one.load))
                place.load += 1
            executor = place.executor
            try:
                attempt.place = executor.submit(*self._call(), *attempt.args, **attempt.kwargs)
                break
            except concurrent.futures.BrokenExecutor as error:
                place.load = 0
                self._renew(place, executor, error)
        attempt.place.add_done_callback(functools.partial(self._done, place, attempt))

    def _done(self, place: _Place, attempt: Attempt, future: Any) -> None:
        with self._lock:
            place.load -= 1
        _report(attempt, future)

    def _renew(self, place: _Place, broken: Any, error: Exception) -> None:
        """Takes what is new in the place of an executor that broke."""
        with self._lock:
            if place.executor is not broken or place not in self._places:
                return  # another thread was first
            broken.shutdown(wait=False)
            count = (getattr(broken, "_max_workers", None) or 1) if broken is self._given else 1
            made = [_like(broken) for _ in range(count)]
            if None in made:
                error.add_note(
                    "workers of executor have died, and perturbax cannot make another "
                    f"{type(broken).__name__}; perturbax.ProcessWorkers replaces them"
                )
                raise error
            self._made[:] = [v for v in self._made if v is not broken] + made
            self._places.remove(place)
            places = [_Place(executor, ready=False) for executor in made]
            self._places += places
        for place in places:
            # Loads the function, with what it imports.
            future = place.executor.submit(callable, self._call()[-1])
            future.add_done_callback(functools.partial(_now_ready, place))

    def deadline(self, attempt: Attempt, timeout: float) -> float | None:
        """Late: the worker itself looks at the clock, and says when it gave up."""
        return attempt.submitted + (2 * self.ahead() + 1) * timeout + _START

    def withdraw(self, attempt: Attempt) -> bool:
        """Cancels the future."""
        attempt.given_up = True  # before the callback of the future looks at it
        attempt.given_up = attempt.place.cancel()
        return attempt.given_up

    def give_up(self, attempt: Attempt) -> None:
        """Leaves a call that runs to the executor."""
        attempt.given_up = True
        attempt.place.cancel()

    def close(self) -> None:
        """Ends the executors that were made in place of broken ones."""
        with self._lock:
            self._places = [_Place(self._given, ready=True)]
            _shut_down(self._made)


def _call_of(executor: Any, fun: Callable[..., Any], timeout: float | None) -> tuple[Any, ...]:
    """What is submitted, in front of the arguments."""
    here = isinstance(executor, concurrent.futures.ThreadPoolExecutor)
    call = without_jax(fun) if here else fun
    # In these, an exception that cannot be unpickled takes all workers with it.
    breaks = isinstance(executor, concurrent.futures.ProcessPoolExecutor)
    breaks = breaks or _is_from(executor, "loky")
    if timeout is not None:
        most = _MOST_LEFT_BEHIND if here else _MOST_IN_A_PROCESS
        call = functools.partial(_worker.timed, call, timeout, most, here)
    elif not breaks or importlib.util.find_spec("cloudpickle") is None:
        return (call,)
    if here:
        return (call,)
    # Pickled at the first call, by which time what it refers to is there.
    call = functools.partial(_worker.careful, call) if breaks else call
    return operator.call, _Shipped(_by_value(call))


def _now_ready(place: _Place, future: Any) -> None:
    del future  # a pool that cannot start shows when it is used
    place.ready = True


def _shut_down(executors: list[Any]) -> None:
    while executors:
        executors.pop().shutdown(wait=False)


def _by_value(call: Callable[..., Any]) -> bytes:
    """A pickle that brings along what it needs of `_worker`."""
    cloudpickle = _cloudpickle()
    cloudpickle.register_pickle_by_value(_worker)
    try:
        return _pickled(call, "fun")
    finally:
        cloudpickle.unregister_pickle_by_value(_worker)


def _report(attempt: Attempt, future: "concurrent.futures.Future[Any]") -> None:
    """Keeps what became of a future."""
    if attempt.given_up:
        return
    if future.cancelled():
        attempt.error = RuntimeError("the executor withdrew an evaluation")
        attempt.died = True
    else:
        attempt.error = future.exception()
        if attempt.error is None:
            attempt.value = future.result()
        # Dask tells of lost workers by exceptions of its own.
        broken = isinstance(attempt.error, concurrent.futures.BrokenExecutor)
        attempt.died = broken or _is_from(attempt.error, "distributed")
    attempt.ended = True
    attempt.events.put(attempt)


def _like(executor: Any) -> Any:
    """A new executor of one worker, like one whose processes died; None if it cannot be made."""
    names = "mp_context context timeout initializer initargs env max_tasks_per_child".split()
    known = {v: getattr(executor, f"_{v}") for v in names if hasattr(executor, f"_{v}")}
    if _is_from(executor, "loky"):
        import loky

        return loky.ProcessPoolExecutor(1, **known)
    if type(executor) is concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(1, **known)
    return None
