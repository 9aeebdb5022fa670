"""Attempts at calling a function, and what takes them: the thread that waits, for one."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ..tracing._host_call import without_jax
from ._results import returned

# How many threads with hung evaluations may be left behind: none of them can be ended.
MOST_LEFT_BEHIND = 500
# What a worker may need to start, in seconds, on top of what an evaluation may take.
START = 60.0


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
      overdue: whether it was ended because it took longer than `timeout`.
      fatal: whether there is no use in another attempt at anything.
      given_up: whether nobody waits for it any more.
      left_behind: whether its thread is to end with it.
      taken: when a worker took it, by time.monotonic().
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
    overdue: bool = False
    fatal: bool = False
    given_up: bool = False
    left_behind: bool = False
    taken: float | None = None
    started: float | None = None
    ended: bool = False
    place: Any = None


class Workers(Protocol):
    """Where attempts run.

    An attempt that was submitted is put among its events when it ends, unless it was withdrawn or
    given up before.

    Attributes:
      ahead: how many windows to hand over at a time: several where results take a while to come
        back.
    """

    ahead: int

    def window(self) -> int | None:
        """How many attempts under way keep all workers busy; None for unknown."""
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


def in_this_process(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun` for threads of this process: without JAX, and its results in memory of their own.

    The thread may begin the next call before anybody looks at the result, and the function may use
    the same memory for that.
    """
    alone, name = without_jax(fun), getattr(fun, "__name__", type(fun).__name__)
    return lambda *args, **kwargs: returned(alone(*args, **kwargs), name)


def run(fun: Callable[..., Any], attempt: Attempt) -> None:
    """Calls the function, and keeps what becomes of it."""
    attempt.started = time.monotonic()
    try:
        attempt.value = fun(*attempt.args, **attempt.kwargs)
    except Exception as error:
        attempt.error = error


class ThisThread:
    """Attempts are made one after another, each while it is handed over: it has ended then.

    Programs on several devices, and threads of the user's, wait for each other's.
    """

    ahead = 1

    def __init__(self, fun: Callable[..., Any]):
        """For calls of `fun`."""
        self._fun = in_this_process(fun)
        self._turn, self._next = threading.Lock(), threading.Lock()

    def window(self) -> int | None:
        return 1

    def submit(self, attempt: Attempt) -> None:
        # All but one queue for being next, or a thread could take many turns in a row. Devices
        # would come to their next exchange at different times, and XLA waits for 40 seconds.
        with self._next:
            self._turn.acquire()
        try:
            run(self._fun, attempt)
        finally:
            self._turn.release()
        attempt.events.put(attempt)

    def deadline(self, attempt: Attempt, timeout: float) -> float | None:
        return None

    def withdraw(self, attempt: Attempt) -> bool:
        return False

    def give_up(self, attempt: Attempt) -> None:
        pass

    def close(self) -> None:
        pass
