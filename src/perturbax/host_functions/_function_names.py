"""Names of functions, which change with their code and data."""

import contextlib
import dataclasses
import datetime
import decimal
import dis
import enum
import fractions
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

import jax
import numpy as np

from ._encoding import leaf_digest

# Of these repr tells all.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, range, PurePath, enum.Enum, np.dtype),
    *(datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction),
)


class _Unnamed(Exception):
    """What a function refers to cannot be told from other objects of its kind."""


def name_of(fun: Callable[..., Any]) -> str:
    """A name that changes with the function's code, and with the data that it refers to."""
    try:
        digest = hashlib.sha256(_content(fun, {})).hexdigest()
    except _Unnamed as error:
        raise ValueError(
            f"journal cannot tell fun from others, for it refers to {error}: give it a name, "
            "journal=perturbax.Journal(path, name='...'), another one whenever fun changes"
        ) from None
    module = getattr(fun, "__module__", "")
    return f"{module}.{getattr(fun, '__qualname__', type(fun).__name__)}:{digest[:32]}"


def _content(value: Any, seen: dict[int, tuple[int, Any]], strict: bool = True) -> bytes:
    """Bytes that are equal only for what acts alike.

    Args:
      value: a function, or what one refers to.
      seen: what was met on the way here, by id, each with a number: functions and objects may refer
        to themselves and, in many ways, to each other. It is kept alive, lest ids be used again.
      strict: whether to raise `_Unnamed` for what cannot be told from others of its kind. Else its
        kind stands for it: so for what is found in modules and classes, where there is much that a
        function does not depend on, such as a lock or a logger.
    """
    kind = type(value).__name__.encode()
    inner = functools.partial(_content, seen=seen, strict=strict)
    if value is None or value is Ellipsis or isinstance(value, _PLAIN):
        return kind + repr(value).encode()
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        if array.dtype.hasobject:
            return _of_kind(kind, "an array of objects", strict)
        return kind + leaf_digest(array)
    if isinstance(value, types.ModuleType):
        return kind + value.__name__.encode()
    if isinstance(value, types.CodeType):
        parts = (value.co_code, value.co_names, value.co_varnames, value.co_freevars)
        return _joined(kind, map(inner, (*parts, *value.co_consts)))
    if isinstance(value, set | frozenset):  # in no order
        return _joined(kind, sorted(_content(v, dict(seen), strict) for v in value))
    if isinstance(value, tuple):  # constants of code among them, which Python shares at will
        return _joined(kind, map(inner, value))
    if id(value) in seen:
        return kind + str(seen[id(value)][0]).encode()
    seen[id(value)] = len(seen), value
    if isinstance(value, type):
        name = kind + f"{value.__module__}.{value.__qualname__}".encode()
        if not _is_class_of_user(value):
            return name
        own = {k: v for k, v in vars(value).items() if not _is_bookkeeping(k, v)}
        return _joined(name, [*map(inner, value.__bases__), *_named(own, seen)])
    if isinstance(value, types.FunctionType):
        if not _is_of_user(value):
            return kind + f"{value.__module__}.{value.__qualname__}".encode()
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__]
        parts += _closed_over(value)
        return _joined(kind, [*map(inner, parts), *_globals_of(value, seen)])
    if isinstance(value, types.MethodType):
        return _joined(kind, map(inner, (value.__func__, value.__self__)))
    if isinstance(value, staticmethod | classmethod):
        return _joined(kind, [inner(value.__func__)])
    if isinstance(value, property):
        return _joined(kind, map(inner, (value.fget, value.fset, value.fdel)))
    if isinstance(value, functools.cached_property):
        return _joined(kind, [inner(value.func)])
    if isinstance(value, np.ufunc):
        return kind + value.__name__.encode()
    if isinstance(value, functools.partial):
        return _joined(kind, map(inner, (value.func, value.args, value.keywords)))
    if isinstance(value, dict):
        return _joined(kind, (inner(k) + b"=" + inner(v) for k, v in value.items()))
    if isinstance(value, list):
        return _joined(kind, map(inner, value))
    if dataclasses.is_dataclass(value):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
        return _joined(kind, map(inner, (type(value), *parts)))
    if callable(value) and hasattr(value, "__qualname__"):  # compiled, or wrapped by a package
        name = f"{getattr(value, '__module__', '')}.{value.__qualname__}".encode()
        parts = (getattr(value, name, None) for name in ("__self__", "__wrapped__"))
        return _joined(kind + name, map(inner, parts))
    plain = isinstance(value, types.SimpleNamespace) or _is_class_of_user(type(value))
    if plain and hasattr(value, "__dict__"):
        return _joined(kind, map(inner, (type(value), vars(value))))
    return _of_kind(kind, f"an object of the class {type(value).__name__}", strict)


def _of_kind(kind: bytes, told: str, strict: bool) -> bytes:
    if strict:
        raise _Unnamed(told)
    return kind


def _joined(kind: bytes, parts: Iterable[bytes]) -> bytes:
    hashed = hashlib.sha256(kind)
    for part in parts:
        hashed.update(hashlib.sha256(part).digest())
    return kind + hashed.digest()


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell that is still empty
            yield cell.cell_contents


def _is_of_user(value: Any) -> bool:
    """Whether a function or a module is in a file of the user's, not in an installed package."""
    code = getattr(value, "__code__", None)
    return _is_file_of_user(
        code.co_filename if code is not None else getattr(value, "__file__", None)
    )


def _is_file_of_user(file: str | None) -> bool:
    inside = os.path.dirname(os.__file__)
    return file is not None and "site-packages" not in file and not file.startswith(inside)


def _is_class_of_user(value: type) -> bool:
    """Whether a class is defined in a file of the user's, or in a notebook."""
    module = sys.modules.get(value.__module__)
    if getattr(module, "__file__", None) is None:
        return value.__module__ not in sys.builtin_module_names
    return _is_of_user(module)


def _is_bookkeeping(name: str, value: Any) -> bool:
    """Whether Python itself keeps this in a class, such as the number of its first line."""
    return name[:2] == name[-2:] == "__" and not isinstance(value, types.FunctionType)


def _named(values: dict[str, Any], seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    """Of named values of a module or a class."""
    for name in sorted(values):
        yield name.encode() + b"=" + _content(values[name], seen, strict=False)


def _globals_of(function: types.FunctionType, seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    """Of what a function uses of its module, and of the user's modules that it gets at there."""
    names = sorted(_names(function.__code__))
    spaces = [function.__globals__, *map(vars, _imported(function))]
    for space in spaces:  # which grow
        found = {name: space[name] for name in names if name in space}
        for value in found.values():
            if isinstance(value, types.ModuleType) and _is_of_user(value):
                if not any(vars(value) is other for other in spaces):
                    spaces.append(vars(value))
        yield from _named(found, seen)


def _names(code: types.CodeType) -> set[str]:
    return {name for inner in _codes(code) for name in inner.co_names}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function, and of those that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _imported(function: types.FunctionType) -> Iterator[types.ModuleType]:
    """The user's modules that a function imports where it runs, in the order of their names."""
    package = function.__globals__.get("__package__") or ""
    found = set()
    for code in _codes(function.__code__):
        before: list[dis.Instruction] = []
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                # How many packages up, and what is imported from there, come before it.
                level, _ = (b.argval for b in before[-2:])
                found.add("." * (level or 0) + (instruction.argval or ""))
            before.append(instruction)
    for name in sorted(found):
        # What is not to be had here may be elsewhere, or never be reached.
        with contextlib.suppress(Exception):
            full = importlib.util.resolve_name(name, package)
            # Asked about a module inside a package, Python would import the package.
            spec = importlib.util.find_spec(full.partition(".")[0])
            places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
            if any(map(_is_file_of_user, places)):
                yield importlib.import_module(full)
