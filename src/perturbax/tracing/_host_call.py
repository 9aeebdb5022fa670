"""The operation that calls back to the host: numpy arrays in and out, one batch axis at most.

`jax.pure_callback` hands its function JAX arrays, made inside the running program; reading one can
wait for a thread that the program itself occupies (jax#24255: on one core, arrays of 4 MB hang at
jax 0.6.2 and 0.10.2 although the function uses numpy alone). This operation is lowered like that
one, but hands on what the runtime has: numpy arrays. Under any number of vmaps it keeps one batch
axis, in front, and does not repeat what has none. Exceptions are carried past the runtime, which
would leave of them a text in an error of its own (jax#26102).
"""

import collections
import contextlib
import functools
import itertools
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax._src import core as inner_core
from jax._src.callback import _callback_op_sharding
from jax.core import Tracer
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from .._checks import check_fun
from ._jaxprs import equations
from ._mesh_axes import varying, varying_axes


class Host(Protocol):
    """What is called back. Hashable: two that are equal share a compiled program."""

    def evaluate(
        self,
        arrays: Sequence[np.ndarray],
        mapped: tuple[bool, ...],
        size: int | None,
        results: tuple[jax.ShapeDtypeStruct, ...] | None,
    ) -> list[np.ndarray]:
        """The results for one point; or, stacked, for `size` points.

        Args:
          arrays: the arguments. Views of memory that is not theirs: to be read before it returns.
          mapped: which of them have a leading axis of length `size`, one entry a point.
          size: the number of points; None for one without a leading axis.
          results: what is expected for one point; None if that is to be found out.
        """
        ...

    def points_at_a_time(self) -> int:
        """With fewer points than this at a time, it cannot use all it has."""
        ...

    def no_result(self) -> Exception:
        """The error of a trace, where it is not known yet what comes back."""
        ...

    def identity(self) -> str:
        """A name that changes with the code and the data of what is called, as far as it can."""
        ...


class NoResultError(ValueError):
    """Under a trace it is not known what a host function returns."""


def host_call(
    arguments: Sequence[Any], host: Host, results: tuple[jax.ShapeDtypeStruct, ...] | None
) -> list[Array]:
    """Calls host.evaluate, now or, under a trace, whenever the program runs.

    Args:
      arguments: arrays.
      host: what is called. What it does has to depend on the arguments alone.
      results: what comes back for one point; None if that will be known after a call.

    Returns:
      The results.
    """
    arrays = [jnp.asarray(v) for v in arguments]
    # In shard_map: all arguments have to vary over the same axes for the results to have a type.
    axes = frozenset().union(*map(varying_axes, arrays))
    arrays = [varying(v, axes) for v in arrays]
    mapped = (False,) * len(arrays)
    return _host_call.bind(*arrays, callback=host, results=results, mapped=mapped, size=None)


_host_call = core.Primitive("host_call")
_host_call.multiple_results = True


@_host_call.def_impl
def _run(
    *arrays: Any, callback: Host, results: Any, mapped: tuple[bool, ...], size: int | None
) -> list[Array]:
    found = callback.evaluate([np.asarray(v) for v in arrays], mapped, size, results)
    return [jnp.asarray(v) for v in found]


@_host_call.def_abstract_eval
def _describe(
    *avals: Any, callback: Host, results: Any, mapped: tuple[bool, ...], size: int | None
) -> list[Any]:
    del mapped
    if results is None:
        raise callback.no_result()
    front = () if size is None else (size,)
    made = [inner_core.ShapedArray((*front, *v.shape), v.dtype) for v in results]
    axes = frozenset().union(*map(varying_axes, avals))
    return [_with_axes(v, axes) for v in made] if axes else made


def _with_axes(aval: Any, axes: frozenset[Any]) -> Any:
    # Of types that tell no mesh, JAX does not believe that they vary over its axes.
    told = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(*[None] * aval.ndim))
    if hasattr(aval, "manual_axis_type"):
        kind = type(aval.manual_axis_type)
        return aval.update(sharding=told, manual_axis_type=kind(varying=axes))
    return aval.update(sharding=told, vma=axes)


def _batch(
    arrays: Sequence[Any],
    dims: Sequence[int | None],
    *,
    callback: Host,
    results: Any,
    mapped: tuple[bool, ...],
    size: int | None,
) -> tuple[list[Array], list[int]]:
    """One more axis, merged with the one that is there."""
    count = next(v.shape[d] for v, d in zip(arrays, dims, strict=True) if d is not None)
    inner, merged = 1 if size is None else size, []
    for value, dim, has_points in zip(arrays, dims, mapped, strict=True):
        if dim is not None:
            moved = jnp.moveaxis(value, dim, 0)
            if not has_points:
                moved = moved[:, None]
            shape = (count, inner, *moved.shape[2:])
            merged.append(jnp.broadcast_to(moved, shape).reshape(count * inner, *shape[2:]))
        elif has_points:
            wide = jnp.broadcast_to(value[None], (count, *value.shape))
            merged.append(wide.reshape(count * inner, *value.shape[1:]))
        else:
            merged.append(value)
    has_points = tuple(d is not None or m for d, m in zip(dims, mapped, strict=True))
    found = _host_call.bind(
        *merged, callback=callback, results=results, mapped=has_points, size=count * inner
    )
    if size is not None:
        found = [v.reshape(count, size, *v.shape[1:]) for v in found]
    return found, [0] * len(found)


batching.primitive_batchers[_host_call] = _batch


def _refuse_derivative(primals: Any, tangents: Any, **params: Any) -> Any:
    del primals, tangents
    name = getattr(params["callback"], "__name__", "this function")
    raise NotImplementedError(
        f"{name} is a host function: it has no derivative of its own. Smooth it, by "
        f"perturbax.make_perturbed_fun({name}, ...): the result has derivatives in its first "
        "argument, whose floating leaves are perturbed. What a derivative is wanted in has to be "
        "part of that argument; around all else, put jax.lax.stop_gradient"
    )


ad.primitive_jvps[_host_call] = _refuse_derivative


def _lower(ctx: Any, *operands: Any, callback: Host, mapped: Any, size: Any, results: Any) -> Any:
    context = ctx.module_context.axis_context
    several = _num_devices(context) > 1

    def call(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        try:
            return tuple(callback.evaluate(arrays, mapped, size, results))
        except BaseException as error:
            if several and _put_off(error, callback):
                return tuple(_nothing_like(v) for v in ctx.avals_out)
            raise _carried(error) from None

    sharding = _callback_op_sharding(context, None, ctx.avals_out)
    found, _, _ = mlir.emit_python_callback(
        ctx,
        call,
        None,
        list(operands),
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=False,
        sharding=sharding,
    )
    return found


mlir.register_lowering(_host_call, _lower)


def _num_devices(context: Any) -> int:
    """Of the program that an axis context of JAX's lowering is of."""
    mesh = getattr(context, "mesh", None)
    return getattr(context, "num_devices", 1) if mesh is None else mesh.size


def hosts_of(jaxpr: core.Jaxpr) -> Iterator[Host]:
    """What the operations of a jaxpr, and of those inside it, call back to."""
    return (eqn.params["callback"] for eqn in equations(jaxpr) if eqn.primitive is _host_call)


# --- Exceptions


class HostFunctionError(RuntimeError):
    """What JAX makes an error of its own of: a text with the user's exception and its traceback."""


# The latest of those that were raised inside a program, by the number in their text.
_exceptions: collections.OrderedDict[int, BaseException] = collections.OrderedDict()
_numbers = itertools.count(1)
_MOST = 32
_PACKAGE = __name__.partition(".")[0]


class _Running:
    """A program that `own_exceptions` runs: what it calls, if that is known, and is to raise."""

    def __init__(self, hosts: Sequence[Host] | None):
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


def _put_off(error: BaseException, host: Host) -> bool:
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


def _nothing_like(aval: Any) -> np.ndarray:
    return np.full(aval.shape, np.nan if jnp.issubdtype(aval.dtype, jnp.inexact) else 0, aval.dtype)


def _carried(error: BaseException) -> HostFunctionError:
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
    program: Callable[..., Any], hosts: Sequence[Host] | None
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


def called(hosts: Sequence[Host], program: Callable[..., Any], *args: Any) -> Any:
    """program(*args); where it calls any hosts, with exceptions as they were raised."""
    return (_with_own_exceptions(program, hosts) if hosts else program)(*args)


def _wait(values: Any) -> None:
    """Until values are there, under derivatives too; not under other traces."""
    arrays = [v for v in jax.tree.leaves(values) if isinstance(v, Array)]
    jax.block_until_ready([v for v in jax.lax.stop_gradient(arrays) if not isinstance(v, Tracer)])


# --- What comes back, found out


class _Asking(threading.local):
    now = False


_asking = _Asking()


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Calls are made for the sake of what comes back: one point is enough."""
    before, _asking.now = _asking.now, True
    try:
        yield
    finally:
        _asking.now = before


def is_asking() -> bool:
    """Whether this is inside `asking`."""
    return _asking.now


# --- JAX inside host functions


class _NoJax(inner_core.Trace):
    """Under this trace, every operation of JAX is an error: waiting for one could hang."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        what = next((v for v in args if isinstance(v, core.Primitive)), None)
        name = f" ({what})" if what is not None else ""
        raise TypeError(
            f"a JAX operation{name} inside a host function: waiting for JAX inside a callback can "
            "wait forever (jax#24255), so compute with numpy there. What needs JAX runs in "
            "processes: executor=perturbax.ProcessWorkers(...)"
        )

    process_primitive = _refuse
    stage_value = _refuse
    process_custom_jvp_call = _refuse
    process_custom_vjp_call = _refuse


_no_jax = _NoJax()


def without_jax(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, in which operations of JAX are errors."""

    @functools.wraps(fun)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with inner_core.set_current_trace(_no_jax):
            return fun(*args, **kwargs)

    return guarded
