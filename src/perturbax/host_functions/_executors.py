"""Which workers the argument `executor` of `host_function` stands for."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

from .._checks import check_count
from ._attempts import ThisThread, Workers
from ._crew import Crew, InThread
from ._foreign_executors import Foreign, is_from
from ._processes import ProcessWorkers


def workers_for(executor: Any, fun: Callable[..., Any], timeout: float | None) -> Workers:
    """The workers that call `fun` as `executor` says, an argument of `host_function`."""
    if executor is None:
        # To give up an evaluation takes another thread than the one that waits.
        return ThisThread(fun) if timeout is None else Crew(1, lambda: InThread(fun))
    if isinstance(executor, ProcessWorkers):
        return executor.workers(fun)
    if isinstance(executor, int) and not isinstance(executor, bool):
        return Crew(executor, lambda: InThread(fun))
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
    if is_from(executor, "distributed"):
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
