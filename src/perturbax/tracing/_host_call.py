"""The operation that calls back to the host: numpy arrays in and out, one batch axis at most.

`jax.pure_callback` hands its function JAX arrays, made inside the running program; reading one can
wait for a thread that the program itself occupies (jax#24255: on one core, arrays of 4 MB hang at
jax 0.6.2 and 0.10.2 although the function uses numpy alone). This operation is lowered like that
one, but hands on what the runtime has: numpy arrays. Under any number of vmaps it keeps one batch
axis, in front, and does not repeat what has none.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax._src import core as inner_core
from jax._src.callback import _callback_op_sharding
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from ._host_exceptions import carried, put_off
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
            if several and put_off(error, callback):
                return tuple(_nothing_like(v) for v in ctx.avals_out)
            raise carried(error) from None

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


def _nothing_like(aval: Any) -> np.ndarray:
    return np.full(aval.shape, np.nan if jnp.issubdtype(aval.dtype, jnp.inexact) else 0, aval.dtype)


mlir.register_lowering(_host_call, _lower)


def _num_devices(context: Any) -> int:
    """Of the program that an axis context of JAX's lowering is of."""
    mesh = getattr(context, "mesh", None)
    return getattr(context, "num_devices", 1) if mesh is None else mesh.size


def hosts_of(jaxpr: core.Jaxpr) -> Iterator[Host]:
    """What the operations of a jaxpr, and of those inside it, call back to."""
    return (eqn.params["callback"] for eqn in equations(jaxpr) if eqn.primitive is _host_call)


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
