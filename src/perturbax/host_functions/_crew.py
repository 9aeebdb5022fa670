"""Threads of our own that make attempts, each of which may have a process."""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ._attempts import MOST_LEFT_BEHIND, START, Attempt, in_this_process, run


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


class InThread:
    """Calls the function in the thread itself."""

    def __init__(self, fun: Callable[..., Any]):
        self._fun = in_this_process(fun)

    def call(self, attempt: Attempt) -> None:
        try:
            run(self._fun, attempt)
        except BaseException as error:  # SystemExit, which would end the thread unseen
            attempt.error = error

    def kill(self) -> bool:
        return False

    def close(self) -> None:
        pass


class _Shift:
    """A queue, and threads that take from it, each until a None: then the crew was closed."""

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self.threads: dict[threading.Thread, Caller] = {}  # but for those left behind


class _Shared:
    """What the threads of a crew share. They do not know the crew, so that it can be forgotten."""

    def __init__(self, count: int, make: Callable[[], Caller]):
        self.count, self.make = count, make
        self.lock = threading.Lock()
        self.shift = _Shift()
        self.left_behind = 0


class _Place(NamedTuple):
    """Where an attempt is."""

    shift: _Shift
    caller: Caller


class Crew:
    """Threads that take attempts from a queue, started when they are needed.

    An attempt that is given up costs its thread, if nothing ends the call; another one takes its
    place. Threads are daemons: one that hangs does not keep the program from ending.
    """

    ahead = 1

    def __init__(self, count: int, make: Callable[[], Caller]):
        """Of up to `count` threads, each with a caller of its own."""
        self._shared = _Shared(count, make)
        self._end = weakref.finalize(self, _end_crew, self._shared)

    def window(self) -> int | None:
        """Two for each thread: the next attempt waits in the queue."""
        return 2 * self._shared.count

    def submit(self, attempt: Attempt) -> None:
        """Puts the attempt in the queue, and starts a thread if one may be missing."""
        with self._shared.lock:
            shift = self._shared.shift
            shift.tasks.put(attempt)
            self._grow(shift)

    def _grow(self, shift: _Shift) -> None:
        """Starts a thread, if there are fewer than there may be; the lock is held."""
        if len(shift.threads) >= self._shared.count:
            return
        place = _Place(shift, self._shared.make())
        thread = threading.Thread(
            target=_serve, args=(self._shared, place), daemon=True, name="perturbax: evaluations"
        )
        thread.start()
        shift.threads[thread] = place.caller

    def deadline(self, attempt: Attempt, timeout: float) -> float | None:
        """From the start of the call; a worker that does not even start has a minute more."""
        if attempt.started is not None:
            return attempt.started + timeout
        return None if attempt.taken is None else attempt.taken + timeout + START

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
            if attempt.taken is None or attempt.ended or attempt.place.caller.kill():
                return
            attempt.left_behind = True
            shift, caller = attempt.place
            for thread in [t for t, one in shift.threads.items() if one is caller]:
                del shift.threads[thread]
            shared.left_behind += 1
            # Also if the crew was closed meanwhile: what is in the queue is still to be done.
            self._grow(shift)
        if shared.left_behind > MOST_LEFT_BEHIND:
            raise RuntimeError(
                f"{shared.left_behind} evaluations hang in threads, which cannot be ended. Use "
                "executor=perturbax.ProcessWorkers(...), which ends and replaces the process of "
                "each evaluation that takes longer than timeout"
            )

    def close(self, wait: float = 0.0) -> None:
        """Ends the threads, and their processes; a thread that is in a call ends after it."""
        _end_crew(self._shared, wait)


def _serve(shared: _Shared, place: _Place) -> None:
    """What a thread of a crew does."""
    caller = place.caller
    try:
        while (attempt := place.shift.tasks.get()) is not None:
            with shared.lock:
                if attempt.given_up:
                    continue
                attempt.taken, attempt.place = time.monotonic(), place
            try:
                caller.call(attempt)
            except BaseException as error:  # not fun's; lest the call wait for ever
                attempt.error, attempt.fatal = error, True
                caller.close()
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
        shift, shared.shift = shared.shift, _Shift()
        threads = dict(shift.threads)
        for _ in threads:
            shift.tasks.put(None)
    for caller in threads.values():
        caller.kill()
    for thread in threads:
        if wait and thread is not threading.current_thread():
            thread.join(wait)
