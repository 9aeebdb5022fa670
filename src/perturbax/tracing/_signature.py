"""A user's function as data: traced once a call, compared by structure.

Eager calls trace the function afresh, so a value that it closes over is never stale, and still meet
the program compiled for the call before: a trace equal in structure is an equal argument to
`jax.jit`. Everything that the function closes over, tracers included, becomes an explicit operand;
so do most floating-point numbers among its operations.

JAX's own jaxprs are each equal to itself alone (jax#1221 made them equal for a while).
"""

import enum
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Trace, eval_jaxpr
from jax.extend import core

from ._callbacks import along_one_axis, takes_many
from ._dependence import reached
from ._files import is_file_of_user
from ._host_call import Host, NoResultError, asking, hosts_of
from ._mesh_axes import without_told_meshes

_COMPARISONS = ("max", "min", "eq", "ne", "ge", "gt", "le", "lt")


class TracedFunction:
    """A pure function of flat arrays, hashable and comparable by the operations it consists of.

    Attributes:
      jaxpr: the operations; its constants are operands that `__call__` expects first.
      out_tree: structure of the result.
      in_avals: types of the arguments.
      out_avals: types of the result's leaves.
    """

    def __init__(self, jaxpr: core.Jaxpr, out_tree: Any):
        """Wraps an open jaxpr and the structure of its results."""
        self.jaxpr = jaxpr
        self.out_tree = out_tree
        self.in_avals: tuple[Any, ...] = tuple(v.aval for v in jaxpr.invars)
        self.out_avals: tuple[Any, ...] = tuple(v.aval for v in jaxpr.outvars)
        # Taken now, not when it is compared: by then, an array may have changed in place.
        self._signature = out_tree, _of_jaxpr(jaxpr)
        self._hash = hash(self._signature)

    def __call__(self, operands: Sequence[Any], *leaves: Any) -> list[Any]:
        """Flat results for the constants `operands` and the arguments `leaves`."""
        return eval_jaxpr(self._called, operands, *leaves)

    def without_told_meshes(self) -> "TracedFunction":
        """The same function, of types that tell no mesh."""
        jaxpr = without_told_meshes(self.jaxpr)
        if jaxpr is self.jaxpr:
            return self
        return TracedFunction(_with_places(jaxpr, len(self.jaxpr.constvars)), self.out_tree)

    @functools.cached_property
    def takes_many(self) -> bool:
        """Whether it has callbacks of many points."""
        return takes_many(self.jaxpr)

    @functools.cached_property
    def _called(self) -> core.Jaxpr:
        return along_one_axis(self.jaxpr) if self.takes_many else self.jaxpr

    def __hash__(self) -> int:
        """A hash of the operations and of the types that go in and out."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether both perform the same operations on the same types."""
        return self is other or (
            isinstance(other, TracedFunction)
            and self._hash == other._hash
            and self._signature == other._signature
        )

    @property
    def widths(self) -> list[Any]:
        """Elements of each intermediate array."""
        results = [v.aval for e in self.jaxpr.eqns for v in e.outvars]
        return [getattr(aval, "size", 1) for aval in results]

    @functools.cached_property
    def hosts(self) -> tuple[Host, ...]:
        """The host functions that it calls."""
        return tuple(hosts_of(self.jaxpr))

    def depends_on_inputs(self, *which: int) -> bool:
        """Whether any result can change with these arguments, or any of them, all else fixed."""
        places = range(len(self.jaxpr.invars))
        return any(reached(self.jaxpr, [not which or i in which for i in places]))


def trace(fun: Callable[..., Any], *leaves: Any) -> tuple[TracedFunction, tuple[Any, ...]]:
    """Traces fun(*leaves), arrays; returns it with the constants that it closed over."""
    make = jax.make_jaxpr(fun, return_shape=True)
    try:
        closed, shape = make(*leaves)
    except NoResultError:
        # Of a host function that was not called before. Where values are known, it can be.
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise
        with asking():
            fun(*map(jax.lax.stop_gradient, leaves))
        closed, shape = make(*leaves)
    operands = tuple(np.asarray(c) if isinstance(c, np.ndarray) else c for c in closed.consts)
    jaxpr, numbers = _with_numbers_as_operands(closed.jaxpr)
    operands = (*operands, *numbers)
    jaxpr = _with_places(jaxpr, len(operands))
    return TracedFunction(jaxpr, jax.tree.structure(shape)), operands


def _with_places(jaxpr: core.Jaxpr, count: int) -> core.Jaxpr:
    """The operations with places for so many constants, and no values in them.

    From JAX 0.12 on a jaxpr has the values, which compiled programs would keep alive, and only
    where it has them does it tell constants from arguments.
    """
    with_values = getattr(jaxpr, "with_consts", None)
    return jaxpr if with_values is None else with_values([None] * count)


def _with_numbers_as_operands(jaxpr: core.Jaxpr) -> tuple[core.Jaxpr, list[jax.Array]]:
    """The operations with their floating-point numbers as further constants, and these numbers.

    So functions that differ in a number alone, such as a rate that decays from call to call, are
    equal. Numbers inside loops, branches and jitted functions stay where they are. So do exponents,
    for which XLA has better programs where it knows them: a square root for 0.5. So do zeros that
    something is compared with, for rectifiers are many and theirs do not change.
    """

    def lifted(eqn: Any) -> list[bool]:
        name = eqn.primitive.name
        return [
            _is_number(v) and name != "pow" and not (name in _COMPARISONS and v.val == 0)
            for v in eqn.invars
        ]

    pairs = [(eqn, lifted(eqn)) for eqn in jaxpr.eqns]
    literals: list[Any] = [v for eqn, lift in pairs for v in itertools.compress(eqn.invars, lift)]
    literals += [v for v in jaxpr.outvars if _is_number(v)]
    if not literals:
        return jaxpr, []
    variables = [core.Var(v.aval) for v in literals]
    rest = iter(variables)

    def replaced(values: Any, which: Iterable[bool]) -> list[Any]:
        return [next(rest) if lift else v for v, lift in zip(values, which, strict=True)]

    eqns = [
        eqn.replace(invars=replaced(eqn.invars, lift)) if any(lift) else eqn for eqn, lift in pairs
    ]
    outvars = replaced(jaxpr.outvars, map(_is_number, jaxpr.outvars))
    jaxpr = jaxpr.replace(constvars=[*jaxpr.constvars, *variables], eqns=eqns, outvars=outvars)
    # A Python number becomes an array of weak type.
    numbers = [
        np.asarray(v.val).item() if v.aval.weak_type else np.asarray(v.val, v.aval.dtype)
        for v in literals
    ]
    return jaxpr, jax.device_put(numbers)


def _is_number(atom: Any) -> bool:
    """Whether it is a floating-point literal that an array can stand for, weak type and all."""
    if not isinstance(atom, core.Literal):
        return False
    aval: Any = atom.aval
    if not jnp.issubdtype(aval.dtype, np.inexact):
        return False
    kind = complex if jnp.issubdtype(aval.dtype, np.complexfloating) else float
    return not aval.weak_type or aval.dtype == jax.dtypes.canonicalize_dtype(kind)


# --- Signatures: hashable values that are equal only where what they stand for acts alike. A new
# object, equal to nothing else, stands for what cannot be compared; that costs a compilation.


class _Same:
    """Equal to another one of the same object, which it keeps alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _of_jaxpr(jaxpr: core.Jaxpr) -> Any:
    """Of operations, whatever the names of their variables."""
    number: dict[core.Var, int] = {}

    def bind(variables: Sequence[core.Var]) -> Any:
        for v in variables:
            number[v] = len(number)
        return tuple(v.aval for v in variables)

    def atom(v: Any) -> Any:
        return (v.aval, _of(v.val)) if isinstance(v, core.Literal) else number[v]

    inputs = bind(jaxpr.constvars), bind(jaxpr.invars)
    eqns = []
    for eqn in jaxpr.eqns:
        params = tuple((k, _of(v, live=k == "callback")) for k, v in sorted(eqn.params.items()))
        setting = eqn.ctx.compute_type, eqn.ctx.threefry_partitionable, str(eqn.ctx.xla_metadata)
        operands = tuple(map(atom, eqn.invars))
        effects = frozenset(eqn.effects)
        eqns.append((eqn.primitive, operands, params, setting, effects, bind(eqn.outvars)))
    return inputs, tuple(eqns), tuple(map(atom, jaxpr.outvars))


def _of(value: Any, live: bool = False) -> Any:
    """Of a parameter of an operation; `live` if it is a function called while the program runs."""
    if value is None or type(value) in (bool, int, str):
        return type(value), value
    # First, for JAX 0.12 has one class of both, which keeps its constants.
    if isinstance(value, core.ClosedJaxpr):
        return _of_jaxpr(value.jaxpr), _of(value.consts)
    if isinstance(value, core.Jaxpr):
        return _of_jaxpr(value)
    if isinstance(value, list | tuple):
        return type(value), tuple(_of(v, live) for v in value)
    if isinstance(value, dict):
        return tuple((k, _of(v, live)) for k, v in value.items())
    if hasattr(value, "f") and hasattr(value, "transforms"):  # JAX's wrapper of a function
        return _of((value.f, value.transforms, value.params), live)
    if hasattr(value, "callback_func"):  # and that of a callback
        return _of((value.callback_func, value.in_tree), live)
    if isinstance(value, types.FunctionType) and _is_library(value):
        # Rules of jax.custom_jvp and the like are wrapped in a new closure at every trace.
        contents = [v for k, v in _contents(value).items() if not _is_bookkeeping(k, v)]
        return value.__code__, _of([value.__defaults__, value.__kwdefaults__, contents], live)
    return _of_captured(value, live, {}, by_value=not live)


def _of_captured(value: Any, live: bool, seen: dict[int, int], by_value: bool = False) -> Any:
    """Of a user's function, and of what functions refer to.

    A live function reads what it refers to when the program runs: that has to be the same object.
    Any other is only traced, and has read it by then: that has to have the same value.

    Args:
      value: the function, or something that one refers to.
      live: as in `_of`.
      seen: numbers of the functions on the way, by id; functions may refer to themselves.
      by_value: whether equality of hashable objects is to be trusted.
    """
    if type(value).__name__ == "Unhashable" and _is_library(type(value)):
        value = value.val  # JAX's wrapper of a static argument
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, types.FunctionType) and not _is_library(value):
        seen[id(value)] = len(seen)
        defaults = (value.__defaults__, tuple((value.__kwdefaults__ or {}).items()))
        if live:
            refers = tuple(map(_Same, (value.__globals__, *(value.__closure__ or ()))))
        else:
            refers = _of_captured(_references(value), live, seen)
        return value.__code__, _of_captured(defaults, live, seen), refers
    if isinstance(value, types.MethodType):
        return _of_captured((value.__func__, value.__self__), live, seen)
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, tuple(value.keywords.items()))
        return _of_captured(parts, live, seen)
    if isinstance(value, jax.custom_jvp | jax.custom_vjp) and not live:
        seen[id(value)] = len(seen)
        parts = ("fun", "jvp", "fwd", "bwd", "nondiff_argnums", "symbolic_zeros")
        return _of_captured(tuple(getattr(value, name, None) for name in parts), live, seen)
    if isinstance(value, tuple):
        return type(value), tuple(_of_captured(v, live, seen) for v in value)
    if isinstance(value, np.ndarray | np.generic) and not live and not value.dtype.hasobject:
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, float | complex):
        return type(value), repr(value)  # tells -0.0 from 0.0
    if isinstance(value, jax.Array | type | types.ModuleType | types.FunctionType | enum.Enum):
        return _Same(value)
    if by_value or _is_library(type(value)):
        try:
            hash(value)
            return type(value), value
        except TypeError:
            pass
    return _Same(value) if live else object()


def _references(function: types.FunctionType) -> Any:
    """What a function may read: its closure, its globals, what it names of modules and classes."""
    names = _names(function.__code__)
    known = function.__globals__
    values = [*_contents(function).values(), *(known[n] for n in names if n in known)]
    named, seen = {id(value) for value in values}, set()
    for owner in values:  # which grow: by modules of the user's packages, and what classes inherit
        if not isinstance(owner, types.ModuleType | type) or id(owner) in seen:
            continue
        seen.add(id(owner))
        for space in _spaces(owner):
            first = space is owner and id(owner) in named and not _is_library(owner)
            if first or _is_of_user(space):
                values.extend(vars(space)[n] for n in names if n in vars(space))
    return tuple(values)


def _spaces(owner: types.ModuleType | type) -> tuple[types.ModuleType | type, ...]:
    """Where names of a module or class are looked up."""
    # Not by `owner.__mro__`, which a metaclass may have changed.
    return type.__dict__["__mro__"].__get__(owner) if isinstance(owner, type) else (owner,)


def _is_of_user(space: types.ModuleType | type) -> bool:
    """Whether a module or class is in a file of the user's, and in no package that is installed."""
    is_module = isinstance(space, types.ModuleType)
    module = space if is_module else sys.modules.get(str(space.__module__))
    return module is not None and is_file_of_user(vars(module).get("__file__"))


def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return (*code.co_names, *(name for c in inner for name in _names(c)))


def _contents(function: types.FunctionType) -> dict[str, Any]:
    """What a function closes over."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    try:
        return {name: cell.cell_contents for name, cell in cells}
    except ValueError:  # a cell that is still empty
        return {"": object()}


def _is_library(value: Any) -> bool:
    """Whether a function, class or module is part of Python, numpy, JAX or this package."""
    name = getattr(value, "__name__" if isinstance(value, types.ModuleType) else "__module__", None)
    return str(name).split(".")[0] in ("builtins", "jax", "jaxlib", "numpy", "perturbax")


def _is_bookkeeping(name: str, value: Any) -> bool:
    """Whether JAX renews this part of a closure at every trace; `cells` is a memo."""
    return (
        name == "cells"
        or type(value) is object
        or isinstance(value, Trace)
        or type(value).__name__ in ("Store", "EqualStore", "DebugInfo")
    )
