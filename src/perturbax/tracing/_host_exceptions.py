"""Exceptions of functions outside JAX, carried past its runtime and raised as they were.

The runtime would leave of them a text in an error of its own (jax#26102).
"""

import collections
import contextlib
import functools
import itertools
import re
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.core import Tracer

from .._checks import check_fun


class HostFunctionError(RuntimeError):
    """What JAX makes an error of its own of: a text with the user's exception and its traceback."""


# The latest of those that were raised inside a program, by the number in their text.
_exceptions: collections.OrderedDict[int, BaseException] = collections.OrderedDict()
_numbers = itertools.count(1)
_MOST = 32
_PACKAGE = __name__.partition(".")[0]


class _Running:
    """A program that `own_exceptions` runs: what it calls, if that is known, and is to raise."""

    def __init__(self, hosts: Sequence[object] | None):
        self.hosts, self.thread = hosts, threading.get_ident()
        self.put_off: list[BaseException] = []

    def take(self) -> BaseException:
        """The first exception; programs around this one see it raised, and need not raise it."""
        own = {id(error) for error in self.put_off}  # what they are equal to is the user's affair
        for one in list(_running):
            if one is not self and one.thread == self.thread:
                one.put_off = [error for error in one.put_off if id(error) not in own]
        return self.put_off[0]


_running: list[_Running] = []


def put_off(error: BaseException, host: object) -> bool:
    """Keeps an exception until the end of each program that may have called, if there is one.

    Of a program of several devices. Where one of them ends early, the others wait for it in the
    next collective operation, and XLA ends the process after some time; so all are to go on.
    """
    # Threads run programs side by side, and what a user's own one calls nobody here waits for.
    callers = [one for one in list(_running) if one.hosts is None or host in one.hosts]
    if not callers:
        # The process may end without another word.
        traceback.print_exception(error)
        return False
    for one in callers:
        one.put_off.append(error)
    return True


def carried(error: BaseException) -> HostFunctionError:
    """What to raise inside a program, so that around it the exception itself can be raised."""
    number = next(_numbers)
    shown = "".join(traceback.format_exception(error))
    # Frames of the library's own hold arguments and results of the whole call back.
    for top, _ in traceback.walk_tb(error.__traceback__):
        for frame, _ in traceback.walk_stack(top):
            if str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE:
                with contextlib.suppress(RuntimeError):  # one that still runs
                    frame.clear()
    _exceptions[number] = error
    while len(_exceptions) > _MOST:
        _exceptions.popitem(last=False)
    return HostFunctionError(f"host function, exception {number}:\n\n{shown}")


def own_exceptions(program: Callable[..., Any]) -> Callable[..., Any]:
    """The program, with exceptions of host functions as they were raised.

    Under `jax.jit`, an exception inside a host function ends the program with an error of JAX's
    own, which has the exception and its traceback as text. Around the jitted function, this raises
    the exception itself. Perturbed functions that are called outside `jit` need no help. Where
    several threads run such programs side by side, on several devices, it may be raised in each.

    Args:
      program: a function, jitted or not.

    Returns:
      A function like it, which waits for its results.

    Raises:
      TypeError: if program is not callable.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import perturbax as px
      >>> def solve(x):
      ...     raise ArithmeticError("no solution")
      >>> step = px.own_exceptions(jax.jit(px.host_function(solve, like=0.0)))
      >>> step(jnp.ones(2))
      Traceback (most recent call last):
        ...
      ArithmeticError: no solution
      ...
    """
    check_fun(program, "program")
    return _with_own_exceptions(program, None)


def _with_own_exceptions(
    program: Callable[..., Any], hosts: Sequence[object] | None
) -> Callable[..., Any]:
    """`own_exceptions` of a program that calls these hosts; None if that is not known."""

    @functools.wraps(program)
    def raising(*args: Any, **kwargs: Any) -> Any:
        running = _Running(hosts)
        _running.append(running)
        try:
            # A program whose inputs are ready runs at once, unless something else is in its way.
            _wait((args, kwargs))
            result = program(*args, **kwargs)
            _wait(result)
            if not running.put_off:
                return result
            original = running.take()
        except Exception as error:
            found = re.search(r"host function, exception (\d+):", str(error))
            original = _exceptions.pop(int(found.group(1)), None) if found else None
            if original is None:
                raise
        finally:
            _running.remove(running)
        # Here, not above: the exception keeps the context that it had.
        raise original

    return raising


def called(hosts: Sequence[object], program: Callable[..., Any], *args: Any) -> Any:
    """program(*args); where it calls any hosts, with exceptions as they were raised."""
    return (_with_own_exceptions(program, hosts) if hosts else program)(*args)


def _wait(values: Any) -> None:
    """Until values are there, under derivatives too; not under other traces."""
    arrays = [v for v in jax.tree.leaves(values) if isinstance(v, Array)]
    jax.block_until_ready([v for v in jax.lax.stop_gradient(arrays) if not isinstance(v, Tracer)])
