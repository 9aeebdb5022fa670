"""Names of functions, which change with their code and data."""

import array
import collections
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
import inspect
import operator
import re
import struct
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ..tracing._files import is_file_of_user
from ._encoding import leaf_digest

# Of these repr tells all.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, range, PurePath, enum.Enum, np.dtype),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(decimal.Decimal, fractions.Fraction),
)
_VALUES = (
    *(*_PLAIN, types.NoneType, types.EllipsisType, np.ndarray, np.generic, jax.Array),
    *(set, frozenset, tuple, slice, re.Pattern),
)
# Of these it is told by what they would be pickled as.
_REDUCED = (slice, operator.methodcaller, operator.itemgetter, operator.attrgetter)

# Operations by which code reads names of its module.
_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})


class _Unnamed(Exception):
    """What a function refers to cannot be told from other objects of its kind."""


def name_of(fun: Callable[..., Any]) -> str:
    """A name that changes with the function's code, and with the data that it refers to."""
    try:
        digest = hashlib.sha256(_content(fun, {})).hexdigest()
    except (_Unnamed, RecursionError) as error:
        raise ValueError(
            f"journal cannot tell fun from others, for it refers to {_obstacle(error)}: give it a "
            "name, journal=perturbax.Journal(path, name='...'), another one whenever fun changes"
        ) from None
    module = getattr(fun, "__module__", "")
    return f"{module}.{getattr(fun, '__qualname__', type(fun).__name__)}:{digest[:32]}"


def _obstacle(error: Exception) -> str:
    return str(error) if isinstance(error, _Unnamed) else "a long chain of objects"


def known_by(fun: Callable[..., Any]) -> str:
    """As `name_of`, of any function: what cannot be told from others of its kind is that kind."""
    try:
        content = _content(fun, {})
    except _Unnamed:
        content = _content(fun, {}, strict=False)
    except RecursionError:  # of a long chain of objects, such as a linked list
        content = _content(getattr(fun, "__code__", type(fun)), {}, strict=False)
    return hashlib.sha256(content).hexdigest()


def name_of_arguments(tree: Any, fixed: tuple[Any, ...], kinds: dict[type, bytes]) -> str:
    """A name that changes with what arguments hold beside arrays, and with the classes in them.

    Args:
      tree: their structure.
      fixed: their leaves, None where an array is.
      kinds: what was made of classes before, which takes time; what is made here is added.
    """
    try:
        return _joined(_structure(tree, kinds), [_content(fixed, {})]).hex()
    except (_Unnamed, RecursionError) as error:
        raise ValueError(
            "journal cannot tell arguments from others, for beside arrays they hold "
            f"{_obstacle(error)}: pass "
            "dicts, lists and tuples"
        ) from None


def _structure(tree: Any, kinds: dict[type, bytes]) -> bytes:
    node = tree.node_data()
    if node is None:
        return b"leaf"
    kind, data = node
    if kind not in kinds:
        fields = getattr(kind, "_fields", None)  # of a namedtuple, of which no more may be known
        kinds[kind] = _joined(b"node", (_content(v, {}) for v in (kind, fields)))
    inner = (_structure(child, kinds) for child in tree.children())
    return _joined(kinds[kind], [_content(data, {}), *inner])


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
    # Of a class of the user's, which may derive from one of Python's, the methods count as well.
    special = not isinstance(value, type) and _is_class_of_user(type(value), surely=True)
    # Of these Python shares equal ones at will, constants of code among them.
    if not special and isinstance(value, _VALUES):
        return kind + (_data(value, seen, strict) or b"")
    if isinstance(value, types.ModuleType):
        return kind + value.__name__.encode()
    if isinstance(value, types.CodeType):
        parts = (value.co_code, value.co_names, value.co_varnames, value.co_freevars)
        parts += (value.co_cellvars, value.co_exceptiontable, value.co_flags, value.co_argcount)
        parts += (value.co_posonlyargcount, value.co_kwonlyargcount, *value.co_consts)
        return _joined(kind, map(inner, parts))
    if id(value) in seen:
        return kind + str(seen[id(value)][0]).encode()
    seen[id(value)] = len(seen), value
    if special:
        # The value of a member of an enumeration is in its class, which is in a module.
        certain = strict and not isinstance(value, enum.Enum)
        data = _data(value, seen, certain)
        if data is None:
            data = b"" if _is_open(value) else _of_kind(b"", _told(value), strict)
        held, beside = _attributes(value), {}
        if dataclasses.is_dataclass(value):  # locks and caches
            fields = {field.name for field in dataclasses.fields(value)}
            others = sorted(name for name in {*held} - fields if "." not in name)
            beside = {name: held.pop(name) for name in others}
        parts = _content(held, seen, certain), _content(beside, seen, strict=False)
        return _joined(kind, [inner(type(value)), *parts, data])
    if isinstance(value, type):
        name = kind + f"{value.__module__}.{value.__qualname__}".encode()
        if not _is_class_of_user(value):
            return name
        own = {k: v for k, v in vars(value).items() if not _is_bookkeeping(k, v)}
        return _joined(name, [*map(inner, (type(value), *value.__bases__)), *_named(own, seen)])
    if isinstance(value, types.FunctionType):
        if not _is_of_user(value):
            name = kind + f"{value.__module__}.{value.__qualname__}".encode()
            held = _held(value)
            # Of what a package keeps, there is much that a function does not depend on.
            return _joined(name, (_content(v, seen, False) for v in held)) if held else name
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__]
        parts += _closed_over(value)
        return _joined(
            kind, [*map(inner, parts), *_named(vars(value), seen), *_globals_of(value, seen)]
        )
    if isinstance(value, types.MethodType):
        return _joined(kind, map(inner, (value.__func__, value.__self__)))
    if isinstance(value, staticmethod | classmethod):
        return _joined(kind, [inner(value.__func__)])
    if isinstance(value, property):
        return _joined(kind, map(inner, (value.fget, value.fset, value.fdel)))
    if isinstance(value, functools.cached_property):
        return _joined(kind, [inner(value.func)])
    if isinstance(value, functools.singledispatchmethod):
        return _joined(kind, [inner(value.dispatcher)])
    if isinstance(value, np.ufunc):
        name = kind + value.__name__.encode()
        if value.__name__.endswith(" (vectorized)"):  # of any function
            return _of_kind(name, "a function of numpy.frompyfunc", strict)
        return name
    if isinstance(value, np.vectorize):
        parts = (value.pyfunc, value.otypes, value.excluded, value.signature)
        return _joined(kind, map(inner, parts))
    if isinstance(value, jax.tree_util.PyTreeDef):
        return _structure(value, {})
    data = _data(value, seen, strict)
    if data is not None:
        return kind + data
    if dataclasses.is_dataclass(value):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
        return _joined(kind, map(inner, (type(value), *parts)))
    if callable(value) and hasattr(value, "__qualname__"):  # compiled, or wrapped by a package
        name = f"{getattr(value, '__module__', '')}.{value.__qualname__}".encode()
        held = ["__self__", "__wrapped__"]
        if isinstance(value, jax.custom_jvp | jax.custom_vjp):
            held += ["jvp", "fwd", "bwd"]
        return _joined(kind + name, map(inner, (getattr(value, v, None) for v in held)))
    plain = isinstance(value, types.SimpleNamespace) or _is_class_of_user(type(value))
    if (plain and hasattr(value, "__dict__")) or (strict and _is_slotted(value)):
        return _joined(kind, map(inner, (type(value), _attributes(value))))
    # Looked for so that nothing runs: in a module may be anything.
    if inspect.getattr_static(value, "__wrapped__", None) is not None:
        kind = _joined(kind, [_content(getattr(value, "__wrapped__", None), seen, strict=False)])
    return _of_kind(kind, _told(value), strict)


def _data(value: Any, seen: dict[int, tuple[int, Any]], strict: bool) -> bytes | None:
    """What an object holds as one of a class of Python's or numpy's; None where it is of none."""
    inner = functools.partial(_content, seen=seen, strict=strict)
    # The methods are those of Python's classes: derived ones may have others.
    if value is None or value is Ellipsis or isinstance(value, _PLAIN):
        bases = (c for c in type(value).__mro__ if not _is_class_of_user(c))
        plain: Any = next((c for c in bases if issubclass(c, _PLAIN)), type(value))
        # What tells a member of an enumeration is among its attributes.
        return b"" if plain is enum.Enum else plain.__repr__(value).encode()
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        known = str(value.dtype).encode()
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(cast(jax.Array, value))
        if isinstance(value, jax.Array) and value.is_deleted():  # by a call that it was donated to
            return _of_kind(known, "an array that was deleted", strict)
        if isinstance(value, np.ma.MaskedArray):
            known += inner(np.ma.getmaskarray(value))
        entries = np.asarray(value)
        if entries.dtype.hasobject:
            return _joined(known, map(inner, (entries.shape, entries.ravel().tolist())))
        return known + leaf_digest(entries)
    if isinstance(value, set | frozenset):  # in no order
        kind: Any = set if isinstance(value, set) else frozenset
        members = (_content(v, dict(seen), strict) for v in kind.__iter__(value))
        return _joined(b"", sorted(members))
    if isinstance(value, tuple):
        return _joined(b"", map(inner, tuple.__iter__(value)))
    if isinstance(value, list):
        return _joined(b"", map(inner, list.__iter__(value)))
    if isinstance(value, dict):
        items = [inner(k) + b"=" + inner(v) for k, v in dict.items(value)]
        default = getattr(value, "default_factory", None)  # of a defaultdict
        return _joined(b"", items if default is None else [*items, inner(default)])
    if isinstance(value, types.MappingProxyType):
        return _joined(b"", [inner(dict(value))])
    if isinstance(value, collections.deque):
        return _joined(b"", map(inner, (value.maxlen, *collections.deque.__iter__(value))))
    if isinstance(value, array.array):
        return _joined(b"", (value.typecode.encode(), value.tobytes()))
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, BaseException):
        return _joined(b"", [inner(value.args)])
    if isinstance(value, jax.Device | jax.sharding.Mesh):
        return repr(value).encode()
    if isinstance(value, re.Pattern):
        return _joined(b"", map(inner, (value.pattern, value.flags)))
    if isinstance(value, _REDUCED):
        return _joined(b"", [inner(value.__reduce__())])
    if isinstance(value, functools.partial | functools.partialmethod):
        return _joined(b"", map(inner, (value.func, value.args, value.keywords)))
    return None


def _attributes(value: Any) -> dict[str, Any]:
    """What an object of a class of the user's holds, in slots as well."""
    classes = type(value).__mro__
    held = dict(vars(value)) if hasattr(value, "__dict__") else {}
    for cls in reversed(classes):
        for name, descriptor in vars(cls).items():
            # Of functools.partial, an address of Python's own, which no two runs share.
            if name == "__vectorcalloffset__":
                continue
            if isinstance(descriptor, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # nothing is there yet
                    held[f"{cls.__name__}.{name}"] = descriptor.__get__(value)
            if isinstance(descriptor, functools.cached_property):  # there once it was asked for
                held.pop(name, None)
    return held


def _is_open(value: Any) -> bool:
    """Whether attributes and slots are all that an object of a class of the user's holds.

    What it derives from a compiled class makes it larger.
    """
    cls = type(value)
    slots = [v for c in cls.__mro__ if "__slots__" in vars(c) for v in vars(c).values()]
    count = sum(isinstance(v, types.MemberDescriptorType) for v in slots)
    most = type("Plain", (), {}).__basicsize__ + struct.calcsize("P") * count
    return cls.__basicsize__ <= most and (hasattr(value, "__dict__") or _is_slotted(value))


def _is_slotted(value: Any) -> bool:
    """Whether all that an object holds is in slots; compiled classes keep it elsewhere."""
    *classes, _ = type(value).__mro__
    return bool(classes) and all("__slots__" in vars(c) for c in classes)


def _told(value: Any) -> str:
    return f"an object of the class {type(value).__name__}"


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


def _held(function: types.FunctionType) -> list[Any]:
    """What a function of a package was made of: functions of the user's, if it decorates them."""
    registry = getattr(function, "registry", None)
    if isinstance(registry, types.MappingProxyType):
        return [registry]  # of functools.singledispatch, which closes over counters as well
    wrapped = getattr(function, "__wrapped__", None)
    return [*([] if wrapped is None else [wrapped]), *_closed_over(function)]


def _is_of_user(value: Any) -> bool:
    """Whether a function or a module is in a file of the user's, not in an installed package."""
    code = getattr(value, "__code__", None)
    return is_file_of_user(
        code.co_filename if code is not None else getattr(value, "__file__", None)
    )


@functools.cache
def _is_class_of_user(value: type, surely: bool = False) -> bool:
    """Whether a class is defined in a file of the user's, or in a notebook.

    Args:
      value: the class.
      surely: whether it is not if its module is unknown, as is that of compiled functions.
    """
    if value.__module__ in sys.builtin_module_names:
        return False
    name = str(value.__module__)
    # A module inside a compiled one has no file of its own.
    while _file_of(name) is None and "." in name:
        name = name.rpartition(".")[0]
    file = _file_of(name)
    return is_file_of_user(file) if file is not None else name == "__main__" or not surely


def _file_of(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)


def _is_bookkeeping(name: str, value: Any) -> bool:
    """Whether Python itself keeps this in a class, such as the number of its first line."""
    if name == "_value2member_map_":  # of an enumeration: members, and what was asked for
        return True
    acts = callable(value) or isinstance(value, classmethod | property | functools.partialmethod)
    return name[:2] == name[-2:] == "__" and not acts


def _named(values: dict[str, Any], seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    """Of named values of a module or a class."""
    for name in sorted(values):
        yield name.encode() + b"=" + _content(values[name], seen, strict=False)


def _globals_of(function: types.FunctionType, seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    """Of what a function uses of its module, and of the user's modules that it gets at there."""
    # Names of attributes, as in x.mean(), may be those of other things in the module.
    own, every = _names(function.__code__, _GLOBAL), _names(function.__code__)
    spaces = [function.__globals__, *map(vars, _imported(function))]
    for i, space in enumerate(spaces):  # which grow
        # In one order, whichever the sets have: the names of two runs of a program are the same.
        found = {name: space[name] for name in sorted(every if i else own) if name in space}
        for value in found.values():
            if isinstance(value, types.ModuleType) and _is_of_user(value):
                # The function's own module too, if it is got at by attributes.
                if not any(vars(value) is other for other in spaces[1:]):
                    spaces.append(vars(value))
        yield from _named(found, seen)


def _names(code: types.CodeType, operations: frozenset[str] | None = None) -> set[str]:
    """The names in the code, of some operations alone."""
    if operations is None:
        return {name for inner in _codes(code) for name in inner.co_names}
    found = (i for inner in _codes(code) for i in dis.get_instructions(inner))
    return {i.argval for i in found if i.opname in operations}


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
            if any(map(is_file_of_user, places)):
                yield importlib.import_module(full)
