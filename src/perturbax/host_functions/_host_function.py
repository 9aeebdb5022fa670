"""host_function: functions outside JAX, evaluated by threads, processes and clusters."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np

from .._checks import check_bool, check_count, check_fun, check_number
from ..tracing._host_call import host_call, is_asking
from ._arguments import Arguments, taken_apart
from ._call_back import CallBack, Evaluator
from ._executors import check_executor, workers_for
from ._function_names import known_by
from ._journal import JournalFile, check_journal
from ._progress import check_progress
from ._results import canonical, described
from ._scheduling import HostCounts


def host_function(
    fun: Callable[..., Any],
    *,
    executor: Any = None,
    like: Any = None,
    batched: bool = False,
    timeout: float | None = None,
    retries: int = 0,
    on_failure: Any = "raise",
    journal: Any = None,
    progress: bool = False,
) -> "HostFunction":
    r"""A function outside JAX (a solver, a simulator, a service) as one that JAX can call.

    The result h(x) works eagerly and inside `jit`, `vmap`, `scan`, layers and perturbed functions,
    through which it gets derivatives: :math:`\nabla E[h(x + \sigma \epsilon)]` from values of
    `fun` alone. All points of a vmap (the samples of a perturbed function, for one) arrive
    together, and are evaluated side by side; results are those of a loop, bit by bit.

    Args:
      fun: from a pytree (and any further arguments) to a pytree of numbers and arrays. It gets
        numpy arrays, and numpy numbers for arrays without axes, and computes with numpy: JAX inside
        a callback can wait forever, and is an error where that is seen. Its result has to depend on
        its arguments alone (and chance), and is cast to the dtypes of `like`.
      executor: where evaluations run. None: one after another in the thread that waits for them,
        and never two at a time, on several devices either. An int: in so many threads, for what
        waits or computes outside Python. `ProcessWorkers(n)`: in processes, for what computes in
        Python or may hang or crash. Or any `concurrent.futures.Executor`, of loky too, or a Dask
        Client.
      like: what fun returns for one point: a pytree of `jax.ShapeDtypeStruct`, arrays or numbers,
        of which shapes and dtypes count. None asks fun, once for each kind of argument, where x is
        not traced.
      batched: whether fun takes many points at once: all leaves of its arguments, and of its
        result, have one leading axis then, of the same size, whatever vmaps there are. What all
        points share is there once, as a view that is not to be written to. An executor is given one
        part a worker.
      timeout: seconds after which a call of fun is given up; None for never. `ProcessWorkers` end
        and replace the process; a thread cannot be ended, and is left behind and replaced.
      retries: how many times a point is evaluated again after an exception or a timeout. (What a
        dead worker was at is evaluated again anyway.)
      on_failure: what becomes of a point where all attempts fail: "raise", the exception; a number,
        or a pytree like the result, which is the result then; or "missing", NaN. See
        `make_perturbed_fun(..., missing=...)`.
      journal: a path, or a `Journal`: every finished evaluation is in this file before it is used,
        and is not made again, by this program or by one that is started after it has crashed. A
        result with other nodes than dicts, lists and tuples takes `like`.
      progress: whether to draw a bar where evaluations take more than a second (with tqdm).

    Returns:
      A function `h(x, *args, **kwargs)`, with attributes `counts` (what it has done so far) and
      `close()` (which ends threads that it has started). Make it once: each one is compiled anew.

    Raises:
      TypeError: where an argument, or what fun returns, is not of the kind described.
      ValueError: where an argument is out of range, or fun returns other shapes than `like`.
      ImportError: where an optional package is missing; the error names the extra.
      NotImplementedError: for a derivative of h itself.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> import perturbax as px
      >>> def simulator(settings):  # numpy in, numpy out
      ...     return np.sum(np.rint(settings))
      >>> h = px.host_function(simulator, executor=8)
      >>> smooth = px.make_perturbed_fun(h, num_samples=400, sigma=0.5, noise=px.Normal())
      >>> print(jax.grad(smooth, argnums=1)(jax.random.key(0), jnp.ones(2)).round(1))
      [1. 1.]
    """
    check_fun(fun)
    if isinstance(fun, HostFunction):
        raise TypeError("fun is a host function already")
    executor = check_executor(executor)
    batched = check_bool(batched, "batched")
    if timeout is not None:
        timeout = check_number(timeout, "timeout", "None or a positive number")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be None or a positive number, got {timeout:g}")
    retries = check_count(retries, "retries", least=0)
    if isinstance(on_failure, str) and on_failure not in ("raise", "missing"):
        raise ValueError(
            f"on_failure must be 'raise', 'missing', a number or a pytree, got {on_failure!r}"
        )
    progress = check_progress(check_bool(progress, "progress"))
    journal = check_journal(journal)
    evaluator = Evaluator(
        name=_name_of(fun),
        batched=batched,
        timeout=timeout,
        retries=retries,
        on_failure=on_failure,
        progress=progress,
        workers=workers_for(executor, fun, timeout),
        journal=None if journal is None else JournalFile(journal, fun),
        like=None if like is None else described(like, on_failure),
    )
    return HostFunction(fun, evaluator)


def _name_of(fun: Callable[..., Any]) -> str:
    name = getattr(fun, "__name__", None)
    return name if isinstance(name, str) else type(fun).__name__


class HostFunction:
    """A function made by `host_function`, whose documentation says more."""

    def __init__(self, fun: Callable[..., Any], evaluator: Evaluator):
        """From checked arguments."""
        self.__name__ = self.__qualname__ = evaluator.name
        self.__doc__ = inspect.getdoc(fun)
        self.__wrapped__ = fun
        self._evaluator = evaluator

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluates the function."""
        arguments, arrays = taken_apart((x, *args), kwargs, self.__name__)
        like = self._evaluator.like_at(arguments, arrays)
        results = None if like is None else tuple(map(canonical, like.leaves))
        found = host_call(arrays, _Call(self, arguments), results)
        like = like or self._evaluator.like_at(arguments, arrays)
        assert like is not None
        return jax.tree.unflatten(like.tree, found)

    @property
    def counts(self) -> HostCounts:
        """What this function has done so far."""
        return self._evaluator.tally.counts

    def close(self) -> None:
        """Ends threads that were started for this function, and closes its journal.

        A call starts and opens them again.
        """
        self._evaluator.workers.close()
        if self._evaluator.journal is not None:
            self._evaluator.journal.close()

    def __enter__(self) -> "HostFunction":
        """Returns the function, which the end of the `with` block closes."""
        return self

    def __exit__(self, *exception: object) -> None:
        """As `close`."""
        self.close()

    def __repr__(self) -> str:
        """Says what it was made of."""
        return f"<host function {self.__name__}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> Any:
        """Raises: what it runs on belongs to this process."""
        raise TypeError(
            f"the host function {self.__name__} cannot be pickled; pickle the function that it was "
            "made of, and make a host function of it there"
        )

    def identity(self) -> str:
        """Its name in a journal; without one, what its code and data are known by."""
        journal = self._evaluator.journal
        return known_by(self.__wrapped__) if journal is None else journal.name


@dataclasses.dataclass(frozen=True)
class _Call:
    """A host function, called with arguments of some structure: what a program calls back to."""

    function: HostFunction
    arguments: Arguments

    @property
    def __name__(self) -> str:
        return self.function.__name__

    @property
    def _evaluator(self) -> Evaluator:
        return self.function._evaluator

    def evaluate(
        self,
        arrays: Sequence[np.ndarray],
        mapped: tuple[bool, ...],
        size: int | None,
        results: tuple[jax.ShapeDtypeStruct, ...] | None,
    ) -> list[np.ndarray]:
        # Asked for what comes back alone: one point stands for all.
        several = size if is_asking() else None
        back = CallBack(self._evaluator, self.arguments, arrays, mapped, 1 if several else size)
        back.run()
        found = back.results(results)
        return [np.repeat(v, several, axis=0) for v in found] if several else found

    def points_at_a_time(self) -> int:
        """Twice what is under way at a time, so that workers seldom wait for the last of many."""
        return 2 * (self._evaluator.workers.window() or 1)

    def no_result(self) -> Exception:
        return self._evaluator.no_result()

    def identity(self) -> str:
        return self.function.identity()
