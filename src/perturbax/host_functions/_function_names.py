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
import itertools
import operator
import re
import struct
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..tracing._files import is_file_of_user
from ._encoding import leaf_digest

# The repr of these tells all about them.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, range, PurePath, enum.Enum, np.dtype),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(decimal.Decimal, fractions.Fraction),
)
_VALUES = (
    *(*_PLAIN, types.NoneType, types.EllipsisType, np.ndarray, np.generic, jax.Array),
    *(set, frozenset, tuple, slice, re.Pattern),
)
# These are told by what they would be pickled as.
_REDUCED = (slice, operator.methodcaller, operator.itemgetter, operator.attrgetter)

# Objects of these classes are told by these attributes alone.
_MADE_OF: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset", "fdel"),
    functools.cached_property: ("func",),
    functools.singledispatchmethod: ("dispatcher",),
    np.vectorize: ("pyfunc", "otypes", "excluded", "signature"),
}
# So is what objects of these hold, beside what a class of the user's that derives from one adds.
_HOLDING: dict[type, tuple[str, ...]] = {
    BaseException: ("args",),
    re.Pattern: ("pattern", "flags"),
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
}
# And code, beside its constants.
_OF_CODE = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_exceptiontable"),
    *("co_flags", "co_argcount", "co_posonlyargcount", "co_kwonlyargcount"),
)

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
        kinds[kind] = _joined(b"node", [_content(v, {}) for v in (kind, fields)])
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
    kind = _kind(value)
    # Of a class of the user's, which may derive from one of Python's, the methods count as well.
    special = not isinstance(value, type) and _is_class_of_user(type(value), surely=True)
    # Never told by number: Python may make one object of several equal ones, as of constants.
    if not special and isinstance(value, _VALUES):
        return kind + (_data(value, seen, strict) or b"")
    if isinstance(value, types.ModuleType):
        return kind + value.__name__.encode()
    if isinstance(value, types.CodeType):
        parts = (*(getattr(value, name) for name in _OF_CODE), *value.co_consts)
        return _joined(kind, [_content(part, seen, strict) for part in parts])
    if id(value) in seen:
        return kind + str(seen[id(value)][0]).encode()
    seen[id(value)] = len(seen), value
    if special:
        return _object_of_user(value, seen, strict)
    if isinstance(value, type):
        return _class(value, seen, strict)
    if isinstance(value, types.FunctionType):
        return _function(value, seen, strict)
    data = _data(value, seen, strict)
    return _object(value, seen, strict) if data is None else kind + data


def _object_of_user(value: Any, seen: dict[int, tuple[int, Any]], strict: bool) -> bytes:
    """As `_content`, of an object of a class that is surely the user's."""
    # The value of a member of an enumeration is in its class, which is in a module.
    strict_inside = strict and not isinstance(value, enum.Enum)
    data = _data(value, seen, strict_inside)
    if data is None:
        data = b"" if _is_open(value) else _of_kind(b"", _told(value), strict)
    held, beside = _attributes(value), {}
    if dataclasses.is_dataclass(value):  # locks and caches
        fields = {field.name for field in dataclasses.fields(value)}
        others = sorted(name for name in {*held} - fields if "." not in name)
        beside = {name: held.pop(name) for name in others}
    parts = _content(held, seen, strict_inside), _content(beside, seen, strict=False)
    return _joined(_kind(value), [_content(type(value), seen, strict), *parts, data])


def _class(value: type, seen: dict[int, tuple[int, Any]], strict: bool) -> bytes:
    """As `_content`, of a class."""
    if not _is_class_of_user(value):
        return _kind_and_name(value)
    parts = [_content(v, seen, strict) for v in (type(value), *value.__bases__)]
    for name, own in sorted(vars(value).items()):
        if not _is_bookkeeping(name, own):
            parts.append(name.encode() + b"=" + _content(own, seen, strict=False))
    return _joined(_kind_and_name(value), parts)


def _function(value: types.FunctionType, seen: dict[int, tuple[int, Any]], strict: bool) -> bytes:
    """As `_content`, of a function that was written in Python."""
    if not _is_of_user(value):
        held, name = _held(value), _kind_and_name(value)
        # Of what a package keeps, there is much that a function does not depend on.
        return _joined(name, [_content(v, seen, strict=False) for v in held]) if held else name
    own = [value.__code__, value.__defaults__, value.__kwdefaults__, *_closed_over(value)]
    parts = [_content(v, seen, strict) for v in own]
    for name, used in itertools.chain(sorted(vars(value).items()), _globals_of(value)):
        parts.append(name.encode() + b"=" + _content(used, seen, strict=False))
    return _joined(_kind(value), parts)


def _object(value: Any, seen: dict[int, tuple[int, Any]], strict: bool) -> bytes:
    """As `_content`, of an object that is neither surely the user's nor known to `_data`."""
    kind = _kind(value)
    inner = functools.partial(_content, seen=seen, strict=strict)
    made_of = _attributes_in(_MADE_OF, value)
    if made_of is not None:
        return _joined(kind, [*map(inner, made_of)])
    if isinstance(value, np.ufunc):
        name = kind + value.__name__.encode()
        if value.__name__.endswith(" (vectorized)"):  # of any function
            return _of_kind(name, "a function of numpy.frompyfunc", strict)
        return name
    if isinstance(value, jax.tree_util.PyTreeDef):
        return _structure(value, {})
    if dataclasses.is_dataclass(value):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
        return _joined(kind, [*map(inner, (type(value), *parts))])
    if callable(value) and hasattr(value, "__qualname__"):  # compiled, or wrapped by a package
        held = ["__self__", "__wrapped__"]
        if isinstance(value, jax.custom_jvp | jax.custom_vjp):
            held += ["jvp", "fwd", "bwd"]
        parts = (getattr(value, v, None) for v in held)
        return _joined(_kind_and_name(value), [*map(inner, parts)])
    plain = isinstance(value, types.SimpleNamespace) or _is_class_of_user(type(value))
    if (plain and hasattr(value, "__dict__")) or (strict and _is_slotted(value)):
        return _joined(kind, [*map(inner, (type(value), _attributes(value)))])
    # Looked for so that nothing runs: in a module may be anything.
    if inspect.getattr_static(value, "__wrapped__", None) is not None:
        kind = _joined(kind, [_content(getattr(value, "__wrapped__", None), seen, strict=False)])
    return _of_kind(kind, _told(value), strict)


def _kind(value: Any) -> bytes:
    return type(value).__name__.encode()


def _kind_and_name(value: Any) -> bytes:
    return _kind(value) + f"{getattr(value, '__module__', '')}.{value.__qualname__}".encode()


def _attributes_in(table: dict[type, tuple[str, ...]], value: Any) -> list[Any] | None:
    """The attributes that a table names for the class of a value; None where it has none."""
    found = (names for cls, names in table.items() if isinstance(value, cls))
    names = next(found, None)
    return None if names is None else [getattr(value, name) for name in names]


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
        return _array(value, seen, strict)
    if isinstance(value, set | frozenset):  # in no order
        kind: Any = set if isinstance(value, set) else frozenset
        members = (_content(v, dict(seen), strict) for v in kind.__iter__(value))
        return _joined(b"", sorted(members))
    if isinstance(value, tuple):
        return _joined(b"", [*map(inner, tuple.__iter__(value))])
    if isinstance(value, list):
        return _joined(b"", [*map(inner, list.__iter__(value))])
    if isinstance(value, dict):
        items = [
            _content(k, seen, strict) + b"=" + _content(v, seen, strict)
            for k, v in dict.items(value)
        ]
        default = getattr(value, "default_factory", None)  # of a defaultdict
        return _joined(b"", items if default is None else [*items, inner(default)])
    if isinstance(value, types.MappingProxyType):
        return _joined(b"", [inner(dict(value))])
    if isinstance(value, collections.deque):
        return _joined(b"", [*map(inner, (value.maxlen, *collections.deque.__iter__(value)))])
    if isinstance(value, array.array):
        return _joined(b"", (value.typecode.encode(), value.tobytes()))
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, jax.Device | jax.sharding.Mesh):
        return repr(value).encode()
    if isinstance(value, _REDUCED):
        return _joined(b"", [inner(value.__reduce__())])
    held = _attributes_in(_HOLDING, value)
    return None if held is None else _joined(b"", [*map(inner, held)])


def _array(value: Any, seen: dict[int, tuple[int, Any]], strict: bool) -> bytes:
    inner = functools.partial(_content, seen=seen, strict=strict)
    known = str(value.dtype).encode()
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, jax.Array) and value.is_deleted():  # by a call that it was donated to
        return _of_kind(known, "an array that was deleted", strict)
    if isinstance(value, np.ma.MaskedArray):
        known += inner(np.ma.getmaskarray(value))
    entries = np.asarray(value)
    if entries.dtype.hasobject:
        return _joined(known, [*map(inner, (entries.shape, entries.ravel().tolist()))])
    return known + leaf_digest(entries)


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


# The parts are made before this is called. During it they would take one more call for each object
# in a chain of objects, and Python has room for a thousand.
def _joined(kind: bytes, parts: Sequence[bytes]) -> bytes:
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


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function uses of its module, and of the user's modules that it gets at there."""
    # Names of attributes, as in x.mean(), may be those of other things in the module.
    own, every = _names(function.__code__, _GLOBAL), _names(function.__code__)
    spaces = [function.__globals__, *map(vars, _imported(function))]
    for i, space in enumerate(spaces):  # which grow
        # Sorted, for the order of sets is another one whenever the program is started.
        found = [(name, space[name]) for name in sorted(every if i else own) if name in space]
        for _, value in found:
            if isinstance(value, types.ModuleType) and _is_of_user(value):
                # The function's own module too, if it is got at by attributes.
                if not any(vars(value) is other for other in spaces[1:]):
                    spaces.append(vars(value))
        yield from found


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
