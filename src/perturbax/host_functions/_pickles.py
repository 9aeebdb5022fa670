"""Functions on their way to other processes."""

import functools
import os
import pickle
import uuid
import weakref
from collections.abc import Callable
from typing import Any

from . import _worker


def cloudpickle() -> Any:
    """The module, which sends local functions too; an error with the remedy if it is missing."""
    try:
        import cloudpickle
    except ImportError as error:
        raise ImportError(
            "to send functions to processes takes cloudpickle: pip install 'perturbax[processes]'"
        ) from error
    return cloudpickle


def pickled(value: Any, name: str) -> bytes:
    """A pickle of the argument `name`."""
    try:
        return cloudpickle().dumps(value)
    except Exception as error:
        error.add_note(f"{name} is sent to worker processes, so cloudpickle must be able to")
        raise


def by_value(call: Callable[..., Any]) -> bytes:
    """A pickle that brings along what it needs of `_worker`."""
    cloudpickle().register_pickle_by_value(_worker)
    try:
        return pickled(call, "fun")
    finally:
        cloudpickle().unregister_pickle_by_value(_worker)


class ByName:
    """A function `here` that unpickles as `there`, which pickle itself sends."""

    def __init__(self, here: Callable[..., Any], there: Callable[..., Any]):
        """Of both functions."""
        self._here, self._there = here, there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function in this process."""
        return self._here(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Unpickles as the function for there."""
        return functools.partial, (self._there,)


# What was made in this process, by tokens of their own.
SHIPPED: "weakref.WeakValueDictionary[str, Shipped]" = weakref.WeakValueDictionary()


class Shipped:
    """A function that unpickles without perturbax, hence without JAX, in the process it goes to.

    There it is another one: `there`. Where it is called without having been sent, or was sent to
    the same process, it is `here`.
    """

    def __init__(self, here: Callable[..., Any], there: Callable[..., Any]):
        """Of both functions."""
        self._here, token = here, uuid.uuid4().hex
        SHIPPED[token] = self
        there = functools.partial(_worker.at_home, os.getpid(), token, there)
        self.pickle = functools.cache(lambda: by_value(there))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function in this process."""
        return self._here(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Unpickles as the function for there."""
        return pickle.loads, (self.pickle(),)
