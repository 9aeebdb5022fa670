"""What becomes of the evaluations of one call back: order, attempts, time limits, failures."""

import collections
import contextlib
import dataclasses
import math
import os
import queue
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from ._attempts import Attempt, Workers
from ._journal import Session
from ._progress import Bar

# After so many deaths of workers at a point, further ones are taken for failures of the point.
_MOST_DEATHS = 5
# How often to look at what other processes have done, in seconds.
_GLANCE = 0.05
# Seconds; on Windows Ctrl-C does not end a wait.
_LONGEST_WAIT = 0.5 if os.name == "nt" else math.inf
# How long evaluations that run may go on, in seconds, when another one has raised.
_GRACE = 10.0


class HostCounts(NamedTuple):
    """What a host function has done so far.

    Attributes:
      evaluations: points that were evaluated.
      recalled: points whose results were taken from the journal instead.
      failures: points that failed, after all retries.
      retries: attempts beyond the first.
      timeouts: attempts that took longer than `timeout`. A TimeoutError of the function's own is a
        failure as any other.
    """

    evaluations: int = 0
    recalled: int = 0
    failures: int = 0
    retries: int = 0
    timeouts: int = 0


class Tally:
    """`HostCounts` that several threads add to."""

    def __init__(self) -> None:
        """All zero."""
        self._lock = threading.Lock()
        self.counts = HostCounts()

    def add(self, **more: int) -> None:
        """Adds to the counts of these names."""
        with self._lock:
            added = {name: getattr(self.counts, name) + n for name, n in more.items()}
            self.counts = self.counts._replace(**added)


@dataclasses.dataclass
class _Task:
    """Points for one call of the function."""

    rows: list[int]
    failures: int = 0
    deaths: int = 0


class Points(Protocol):
    """What is evaluated: points that are known by their numbers."""

    def arguments(self, rows: list[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of a call for these points, by position and by name."""
        ...

    def accept(self, rows: list[int], value: Any) -> None:
        """Takes what a call for these points has returned; raises what ends the whole call back."""
        ...

    def recall(self, known: dict[int, Any]) -> None:
        """Takes results that the journal has."""
        ...

    def show(self, row: int) -> str:
        """Describes a point, for an exception."""
        ...


@dataclasses.dataclass
class Schedule:
    """Evaluates points.

    Attributes:
      points: which.
      workers: where.
      timeout: the longest that a call may take, in seconds.
      retries: how many more attempts there are at a point.
      raises: whether the exception of a point that fails is raised.
      tally: counts.
      bar: shows how far it is.
      session: of the journal, if there is one.
      failures: the exceptions of points that have failed.
    """

    points: Points
    workers: Workers
    timeout: float | None
    retries: int
    raises: bool
    tally: Tally
    bar: Bar
    session: Session | None = None
    failures: dict[int, Exception] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing is under way."""
        self._pending: collections.deque[_Task] = collections.deque()
        self._running: dict[Attempt, _Task] = {}
        self._events: queue.SimpleQueue[Attempt] = queue.SimpleQueue()
        self._elsewhere: set[int] = set()  # points that another process evaluates
        self._finished = self._total = 0
        self._check = math.inf  # when to look for what has taken too long

    def run(self, parts: Iterable[list[int]]) -> None:
        """Evaluates all points, those of each part by one call, if it goes well."""
        self._pending.extend(_Task(list(rows)) for rows in parts)
        self._total = sum(len(task.rows) for task in self._pending)
        try:
            while self._pending or self._running or self._elsewhere:
                self._submit()
                self._wait()
        except BaseException as error:
            try:
                self._withdraw()
                if isinstance(error, Exception):  # not Ctrl-C
                    self._take_in()
            finally:  # Ctrl-C may come again
                self._give_up()
            raise

    def _submit(self) -> None:
        window = self.workers.window()
        if window is not None:
            window *= self.workers.ahead
        while self._pending and (window is None or len(self._running) < window):
            task = self._pending.popleft()
            if self.session is not None:
                granted = self.session.claim(task.rows)
                self._elsewhere.update(set(task.rows) - set(granted))
                if not granted:
                    continue
                task.rows = granted
            args, kwargs = self.points.arguments(task.rows)
            attempt = Attempt(args, kwargs, self._events)
            self._running[attempt] = task
            try:
                self.workers.submit(attempt)
            except Exception:  # after Ctrl-C, which comes at any moment, it may be in a queue
                del self._running[attempt]
                raise

    def _wait(self) -> None:
        """Until an attempt ends, has taken too long, or the bar is to be drawn."""
        now = time.monotonic()
        if self.timeout is not None:
            # Whatever starts from now on has that long.
            self._check = min(self._check, now + self.timeout)
        wake = min(self._check, now + min(self.bar.interval, _LONGEST_WAIT))
        if self._elsewhere:
            wake = min(wake, now + _GLANCE)
        try:
            attempt = self._events.get(timeout=None if math.isinf(wake) else max(wake - now, 0))
        except queue.Empty:
            self._look_elsewhere()
        else:
            self._handle(attempt)
            if self.session is not None and self._events.empty():
                self.session.flush()
        if time.monotonic() >= self._check:
            self._end_overdue()
        self.bar.update(self._finished + len(self.failures), self.tally.counts)

    def _look_elsewhere(self) -> None:
        """Takes what other processes have finished, and over from those that are gone."""
        if not self._elsewhere or self.session is None:
            return
        known = self.session.known(self._elsewhere)
        self.points.recall(known)
        self._finished += len(known)
        self._elsewhere -= set(known)
        left, self._elsewhere = self._elsewhere, set()
        self._pending.extend(_Task([row]) for row in sorted(left))

    def _end_overdue(self) -> None:
        self._check, now = math.inf, time.monotonic()
        assert self.timeout is not None
        for attempt in list(self._running):
            if attempt.ended:  # and is among the events
                continue
            deadline = self.workers.deadline(attempt, self.timeout)
            if deadline is None:
                continue
            if deadline > now:
                self._check = min(self._check, deadline)
                continue
            self.workers.give_up(attempt)
            attempt.overdue = True
            self._handle(attempt)

    def _handle(self, attempt: Attempt) -> None:
        """Accepts what an attempt has brought, or decides what comes next."""
        task = self._running.pop(attempt, None)
        if task is None:  # it ended while it was given up
            return
        error, died = attempt.error, attempt.died
        if attempt.overdue:  # whatever its worker says, which has just been ended
            message = f"an evaluation took more than timeout={self.timeout:g} seconds"
            error, died = TimeoutError(message), False
        if error is None:
            self.points.accept(task.rows, attempt.value)
            self._finished += len(task.rows)
            self.tally.add(evaluations=len(task.rows))
            return
        if isinstance(error, SystemExit):  # of a worker, where it ends nothing
            # Not its `code`, which is lost where tblib unpickles exceptions, as with Dask.
            reason, code = error, error.args[0] if error.args else None
            error = RuntimeError(f"the function called sys.exit({code!r})")
            error.__cause__ = reason
        if not isinstance(error, Exception) or attempt.fatal:
            raise error
        self.tally.add(timeouts=attempt.overdue)
        if died and task.deaths < _MOST_DEATHS:
            task.deaths += 1
        elif len(task.rows) > 1:  # to find out which of the points it is
            half = len(task.rows) // 2
            self._pending.extendleft([_Task(task.rows[half:]), _Task(task.rows[:half])])
            return
        elif task.failures < self.retries:
            task.failures += 1
        else:
            self.tally.add(failures=1)
            [row] = task.rows
            self.failures[row] = error
            if self.raises:
                error.add_note(
                    f"Raised by a host function at the point {self.points.show(row)}\n"
                    f"({self._finished} of {self._total} points had been evaluated)"
                )
                raise error
            return
        self.tally.add(retries=1)
        self._pending.append(task)

    # What ends a call back is its first error, not what may go wrong after it.

    def _withdraw(self) -> None:
        """Begins nothing more."""
        for attempt in list(self._running):
            with contextlib.suppress(Exception):
                # One that was given up is still here if giving it up raised.
                if attempt.given_up or self.workers.withdraw(attempt):
                    del self._running[attempt]

    def _take_in(self) -> None:
        """Takes what ends in time of what is under way."""
        end = time.monotonic() + _GRACE
        while self._running:
            try:
                attempt = self._events.get(timeout=max(end - time.monotonic(), 0))
            except queue.Empty:
                break
            task = self._running.pop(attempt, None)
            if task is not None and attempt.error is None and not attempt.overdue:
                with contextlib.suppress(Exception):
                    self.points.accept(task.rows, attempt.value)
                    self.tally.add(evaluations=len(task.rows))

    def _give_up(self) -> None:
        """Leaves what is under way, once nothing waits: a thread left behind is replaced."""
        for attempt in self._running:
            with contextlib.suppress(Exception):
                self.workers.give_up(attempt)
