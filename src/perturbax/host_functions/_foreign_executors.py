"""Executors of others: with the interface of concurrent.futures, and Dask's clusters."""

import concurrent.futures
import functools
import importlib.util
import operator
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from .._checks import package_of
from ..tracing._host_call import without_jax
from . import _worker
from ._attempts import MOST_LEFT_BEHIND, START, Attempt, in_this_process
from ._pickles import ByName, Shipped

# How many threads with hung evaluations there may be in a process, which then ends itself.
_MOST_IN_A_PROCESS = 16


def is_from(value: Any, package: str) -> bool:
    """Whether a value is of a class of the package."""
    return package_of(type(value)) == package


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
        # A cluster sends messages every ten milliseconds, both ways.
        self.ahead = 1 if self._client is None else 8
        self._count, self._count_again = 1, 0.0
        self._places = [_Place(executor, ready=True)]
        self._lock = threading.Lock()
        self._sealed, self._timed = is_from(executor, "distributed"), timeout is not None
        call = functools.partial(_call_of, executor, fun, timeout, self._sealed)
        self._call = functools.cache(call)
        self._made: list[Any] = []  # executors, to be shut down
        self._end = weakref.finalize(self, _shut_down, self._made)

    def window(self) -> int | None:
        """Two for each worker, if the executor tells how many there are."""
        if self._client is not None:
            if getattr(self._client, "status", "") in ("closing", "closed"):
                raise RuntimeError("the Dask client of executor is closed: make a new one")
            # The cluster may grow and shrink. To ask takes as long as a few evaluations.
            if time.monotonic() > self._count_again:
                self._count = max(1, sum(self._client.nthreads().values()))
                self._count_again = time.monotonic() + 1.0
            return 2 * self._count
        workers = getattr(self._given, "_max_workers", None)
        return None if workers is None else 2 * workers

    def submit(self, attempt: Attempt) -> None:
        """Submits the call; where workers died before, to an executor made anew."""
        # In one piece: executors have arguments by name of their own, as Dask's `key`.
        call = functools.partial(*self._call(), *attempt.args, **attempt.kwargs)
        while True:
            with self._lock:
                place = min(self._places, key=lambda one: (not one.ready, one.load))
                place.load += 1
            executor = place.executor
            try:
                attempt.place = executor.submit(call)
                break
            except concurrent.futures.BrokenExecutor as error:
                place.load = 0
                self._renew(place, executor, error)
            except RuntimeError as error:
                with self._lock:
                    place.load -= 1
                error.add_note("executor of a host function has to stay open while it is called")
                raise
        attempt.place.add_done_callback(functools.partial(self._done, place, attempt))

    def _done(self, place: _Place, attempt: Attempt, future: Any) -> None:
        """Keeps what became of a future."""
        with self._lock:
            place.load -= 1
        if attempt.given_up:
            return
        if future.cancelled():
            attempt.error = RuntimeError("the executor withdrew an evaluation")
            attempt.died = True
        else:
            attempt.error = future.exception()
            if attempt.error is None:
                attempt.value = future.result()
                if self._sealed:
                    attempt.value, attempt.error = _worker.unsealed(attempt.value)
                if attempt.error is None and self._timed:
                    attempt.overdue, attempt.value = attempt.value
            broken = isinstance(attempt.error, concurrent.futures.BrokenExecutor)
            # Dask tells of lost workers by exceptions of its own.
            attempt.died = broken or is_from(attempt.error, "distributed")
            if broken:
                self._forget(place.executor)
        attempt.ended = True
        attempt.events.put(attempt)

    def _forget(self, broken: Any) -> None:
        """Ends what was made here and broke.

        Its exception holds this object, which would never be forgotten, nor end its workers.
        """
        with self._lock:
            if broken not in self._made:
                return
            self._made.remove(broken)
        broken.shutdown(wait=False)

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
        for new in places:
            # Loads the function, with what it imports.
            future = new.executor.submit(callable, self._call()[-1])
            future.add_done_callback(functools.partial(_now_ready, new))

    def deadline(self, attempt: Attempt, timeout: float) -> float | None:
        """Late: the worker itself looks at the clock, and says when it gave up.

        None while the attempt waits in the executor's queue, which may be long, or serve others
        too. Pools of processes, and clusters, say of a few more than they have workers that they
        run, so there is time for those in front.
        """
        if attempt.taken is None and attempt.place.running():
            attempt.taken = time.monotonic()
        if attempt.taken is None:
            return None
        return attempt.taken + (2 * self.ahead + 1) * timeout + START

    def withdraw(self, attempt: Attempt) -> bool:
        """Cancels the future."""
        attempt.given_up = True  # before the callback of the future looks at it
        # Without a future where Ctrl-C came before there was one.
        attempt.given_up = attempt.place is None or attempt.place.cancel()
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


def _call_of(
    executor: Any, fun: Callable[..., Any], timeout: float | None, sealed: bool
) -> tuple[Any, ...]:
    """What is submitted, in front of the arguments."""
    # What is sealed is in memory of its own.
    here = without_jax(fun) if sealed else in_this_process(fun)
    if timeout is not None:
        here = functools.partial(_worker.timed, here, timeout, MOST_LEFT_BEHIND, True)
    if isinstance(executor, concurrent.futures.ThreadPoolExecutor):
        return (here,)
    # In these, an exception that cannot be unpickled takes all workers with it.
    breaks = isinstance(executor, concurrent.futures.ProcessPoolExecutor)
    breaks = breaks or is_from(executor, "loky")
    there = fun
    if timeout is not None:
        there = functools.partial(_worker.timed, fun, timeout, _MOST_IN_A_PROCESS, False)
    elif importlib.util.find_spec("cloudpickle") is None:
        return operator.call, ByName(here, fun)
    if breaks:
        there = functools.partial(_worker.careful, there)
    if sealed:
        here, there = (functools.partial(_worker.sealed, one) for one in (here, there))
    shipped = Shipped(here, there)
    if breaks or sealed:
        shipped.pickle()  # now, not while something is sent: this can fail
    return operator.call, shipped


def _now_ready(place: _Place, future: Any) -> None:
    del future  # a pool that cannot start shows when it is used
    place.ready = True


def _shut_down(executors: list[Any]) -> None:
    while executors:
        executors.pop().shutdown(wait=False)


def _like(executor: Any) -> Any:
    """A new executor of one worker, like one whose processes died; None if it cannot be made."""
    names = "mp_context context timeout initializer initargs env max_tasks_per_child".split()
    known = {v: getattr(executor, f"_{v}") for v in names if hasattr(executor, f"_{v}")}
    if is_from(executor, "loky"):
        import loky

        return loky.ProcessPoolExecutor(1, **known)
    if type(executor) is concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(1, **known)
    return None
