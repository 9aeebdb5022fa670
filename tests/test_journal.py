"""The journal: nothing finished is evaluated twice, nothing else is taken for a result."""

import _random
import dataclasses
import enum
import functools
import importlib
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px
from perturbax.host_functions._function_names import name_of
from perturbax.host_functions._journal import JournalFile
from perturbax.tracing import _files

KEY = jax.random.key(0, impl="threefry2x32")
POINTS = jax.random.normal(KEY, (12, 3))
OFFSET = 1.0


def measured(x, scale=1.0):
    """Results that tell one evaluation from another."""
    return {"sum": float(x.sum()) * float(scale), "parts": [x * 2, np.float16(scale)], "none": None}


def rows_of(journal, table):
    database = sqlite3.connect(journal)
    [rows] = database.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
    database.close()
    return rows


def counted(h):
    return h.counts.evaluations, h.counts.recalled


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "journal.sqlite"


# --- What is recalled


@pytest.mark.parametrize("executor", [None, 3])
def test_what_is_finished_is_recalled(journal, executor):
    expected = jax.vmap(px.host_function(measured))(POINTS)
    with px.host_function(measured, journal=journal, executor=executor) as h:
        assert_same(jax.vmap(h)(POINTS[:5]), jax.tree.map(lambda v: v[:5], expected))
        assert counted(h) == (5, 0)
        assert_same(jax.vmap(h)(POINTS), expected)
        assert counted(h) == (12, 5)
    with px.host_function(measured, journal=journal) as again:
        assert_same(jax.vmap(again)(POINTS), expected)  # which learns the structure from the file
        assert counted(again) == (0, 12)
    batched = px.host_function(
        lambda x: {"sum": x.sum(axis=1)}, journal=px.Journal(journal, "b"), batched=True
    )
    for count, evaluations in ((4, 4), (12, 12)):
        jax.vmap(batched)(POINTS[:count])
        assert counted(batched)[0] == evaluations
    batched.close()


def test_equal_points_are_evaluated_once(journal):
    with px.host_function(measured, journal=journal, executor=3) as h:
        rows = jnp.stack([POINTS[0], POINTS[1], POINTS[0], POINTS[0]])
        found = jax.vmap(h)(rows)
        assert counted(h) == (2, 0)
        assert_same(found["parts"][0], 2 * rows)
        # Exact bytes count: another sign of zero, argument, dtype or place is another point.
        h(jnp.zeros(3)), h(-jnp.zeros(3)), h(jnp.zeros(3), 2.0), h(jnp.zeros(3), scale=2.0)
        h(jnp.zeros(3, jnp.float16)), h(jnp.zeros(4)), h(np.zeros(3, np.int32))
        assert counted(h) == (9, 0)
        h(jnp.zeros(3), jnp.float32(2.0))
        assert counted(h) == (9, 1)
        h(jnp.zeros((3, 1)))
        assert counted(h) == (10, 1)
    # So do strings.
    with px.host_function(lambda x, unit: x * len(unit), journal=journal) as h:
        assert [float(h(1.0, unit)) for unit in ("m", "mm", "m")] == [1.0, 2.0, 1.0]
        assert counted(h) == (2, 1)


def test_failures_are_not_finished(journal):
    fails = [True]

    def fun(x):
        if fails and x[0] > 0:
            raise OSError("not yet")
        return x.sum()

    named = px.Journal(journal, "fun")
    with px.host_function(fun, journal=named, like=np.float32(0), on_failure="missing") as h:
        count = int(np.sum(np.isnan(jax.vmap(h)(POINTS))))
        assert 0 < count < 12
        fails.clear()
        assert not np.any(np.isnan(jax.vmap(h)(POINTS)))
        assert counted(h) == (12, 12 - count)


@pytest.mark.parametrize("pool", [False, True])
def test_a_failure_keeps_what_was_under_way_and_begins_nothing_more(journal, pool):
    begun, fails, under_way = [], [True], threading.Event()

    def fun(x):
        begun.append(x[0])
        if fails and x[0] == 0:
            assert under_way.wait(20.0)
            raise OSError("not yet")
        under_way.set()
        time.sleep(0.3)
        return x.sum()

    points = jnp.arange(8.0)[:, None]
    named = px.Journal(journal, "fun")
    executor = ThreadPoolExecutor(2) if pool else 2
    with px.host_function(fun, journal=named, like=np.float32(0), executor=executor) as h:
        with pytest.raises(OSError, match="not yet"):
            jax.vmap(h)(points)
        assert rows_of(journal, "claims") == 0
        # The thread that failed may have begun one more, but not two.
        assert set(begun) in ({0, 1}, {0, 1, 2})
        done = len(begun) - 1
        assert counted(h) == (done, 0)
        fails.clear()
        assert_same(jax.vmap(h)(points), points[:, 0])
        assert counted(h) == (8, done)


@pytest.mark.parametrize("like", [None, np.zeros(3, ">f4")])
def test_results_of_another_byte_order_are_recalled_as_the_same_numbers(like, journal):
    """What was in the journal had lost the order: a second run read other numbers."""
    for run in range(2):
        with px.host_function(lambda x: x.astype(">f8"), journal=journal, like=like) as h:
            np.testing.assert_array_equal(h(POINTS[0]), POINTS[0])
            assert counted(h) == (1 - run, run)


@dataclass
class Cost:
    value: float


jax.tree_util.register_dataclass(Cost)
Pair = namedtuple("Pair", "cost time")


@pytest.mark.parametrize("result", [Pair(1.0, 2.0), Cost(1.0), {0: 1.0}], ids=str)
def test_a_structure_that_a_journal_cannot_tell_has_to_be_said(result, journal):
    """At once. It was an error when the program was started again, and only then."""
    named = px.Journal(journal, "fun")
    for told in ("when the program is started again", "does not tell the structure"):
        with px.host_function(lambda x: result, journal=named) as h:
            with pytest.raises(ValueError, match=f"{told}.* like="):
                h(POINTS[0])
    with px.host_function(lambda x: result, journal=named, like=result) as h:
        assert_same(h(POINTS[0]), jax.tree.map(jnp.float32, result))
        assert counted(h) == (0, 1)


def test_another_like_is_an_error(journal):
    with px.host_function(measured, journal=px.Journal(journal, "a")) as h:
        h(POINTS[0])
    with px.host_function(lambda x: {"a": 1.0}, journal=px.Journal(journal, "b")) as h:
        h(POINTS[0])
    for name, like in (("a", 0.0), ("b", {"b": 0.0})):
        with px.host_function(lambda x: 1.0, journal=px.Journal(journal, name), like=like) as other:
            with pytest.raises(ValueError, match="the journal has a result"):
                other(POINTS[0])


# --- Names


@dataclass(frozen=True)
class Settings:
    width: float


def closing_over(value):
    return lambda x: x * value


def with_helper(x):
    return helper(x) + OFFSET


def helper(x):
    return x + 1


def recursive(x):
    return x if x < 1 else recursive(x - 1)


def test_names_tell_functions_apart(monkeypatch):
    alike = [
        lambda: closing_over(2.0),
        lambda: closing_over(np.arange(3)),
        lambda: closing_over({"a": [1, (2, b"3")], "b": {4, 5}}),
        lambda: closing_over(Settings(1.0)),
        lambda: closing_over(closing_over(2.0)),
        lambda: functools.partial(measured, scale=2.0),
        lambda: measured,
        lambda: lambda x: x + 1,
        lambda: lambda x: x + 2,
        lambda: lambda x, y=1: x + 1,
        lambda: with_helper,
        lambda: recursive,
        lambda: np.linalg.norm,
        lambda: closing_over(Path("a")),
        lambda: closing_over(3.0),
        lambda: closing_over(np.arange(4)),
        lambda: closing_over(Settings(2.0)),
        lambda: closing_over(statistics.NormalDist(1.0)),
        lambda: closing_over(statistics.NormalDist(2.0)),
        lambda: functools.partial(measured, scale=3.0),
    ]
    names = [name_of(make()) for make in alike]
    assert names == [name_of(make()) for make in alike]
    assert len(set(names)) == len(names)
    # What a function uses of its module is part of it.
    before = name_of(with_helper)
    monkeypatch.setitem(globals(), "OFFSET", 2.0)
    changed = name_of(with_helper)
    monkeypatch.setitem(globals(), "helper", lambda x: x + 2)
    assert len({before, changed, name_of(with_helper)}) == 3


SOURCE = """
import functools, types, typing

class Base:
    def step(self):
        return {0}

class Plain(Base):
    rate = {1}

    @staticmethod
    def scale(x):
        return {2} * x

    @property
    def width(self):
        return {3}

    def __init__(self, value):
        self.value = value

class Pair(typing.NamedTuple):
    a: int = {4}

@functools.cache
def cached(x):
    return {5}

plain = Plain({6})
space = types.SimpleNamespace(a={7})
both = [cached, object()]

def fun(x):
    if both:
        return cached(x), plain.step(), plain.rate, plain.value, plain.width, space.a, Pair().a
"""


def test_names_tell_what_functions_use_apart(tmp_path, monkeypatch):
    """Of classes only methods counted, of what is cached and of objects nothing at all."""
    monkeypatch.syspath_prepend(tmp_path)

    def name(numbers):
        (tmp_path / "of_users.py").write_text(SOURCE.format(*numbers))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        importlib.invalidate_caches()
        sys.modules.pop("of_users", None)
        return name_of(importlib.import_module("of_users").fun)

    count = SOURCE.count("{")
    names = [name([10 + (i == j) for i in range(count)]) for j in range(count + 1)]
    assert len(set(names)) == count + 1
    assert name([10] * count) == names[-1]


MODULES = {
    "outer/__init__.py": "",
    "outer/inner.py": "def law(x):\n    return {0}",
    "other.py": "def rule(x):\n    return {1}",
    "of_users.py": """
import datetime, threading
import outer.inner

SETTINGS = {{"alpha": {2}, "lock": threading.Lock()}}
BEGUN = [object(), datetime.date(2000, {3}, 1)]

def fun(x):
    from other import rule
    import jax.no_such_module, nor_such_a_module

    return outer.inner.law(x), rule(x), SETTINGS["alpha"], BEGUN
""",
}


def test_names_tell_what_other_modules_hold_apart(tmp_path, monkeypatch):
    """In packages, imported where fun runs, or beside what cannot be told, nothing counted."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def name(numbers):
        for file, source in MODULES.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(source.format(*numbers))
            sys.modules.pop(file.removesuffix("/__init__.py").removesuffix(".py"), None)
        sys.modules.pop("outer.inner", None)
        importlib.invalidate_caches()
        return name_of(importlib.import_module("of_users").fun)

    names = [name([10 + (i == j) for i in range(4)]) for j in range(5)]
    assert len(set(names)) == 5
    assert name([10] * 4) == names[-1]


USED = {
    "decorated by numpy": "@np.errstate(all='ignore')\ndef fun(x):\n    return x * NUMBER",
    "decorated by a closure of contextlib": """
@contextlib.contextmanager
def used():
    yield NUMBER

def fun(x):
    with used() as v:
        return x * v
""",
    "singledispatch": """
@functools.singledispatch
def used(x):
    return x * NUMBER

def fun(x):
    return used(x)
""",
    "registered with singledispatch": """
@functools.singledispatch
def used(x):
    return x

@used.register(float)
def of_floats(x):
    return x * NUMBER

def fun(x):
    return used(x)
""",
    "registered with singledispatchmethod": """
class Used:
    @functools.singledispatchmethod
    def of(self, x):
        return x

    @of.register
    def of_floats(self, x: float):
        return x * NUMBER

    del of_floats

used = Used()

def fun(x):
    return used.of(x)
""",
    "derivative": """
def used(x):
    return x * NUMBER

fun = jax.grad(used)
""",
    "derivative that was set": """
@jax.custom_jvp
def used(x):
    return x

used.defjvps(lambda tangent, _, x: tangent * NUMBER)
fun = jax.grad(used)
""",
    "np.vectorize": "fun = np.vectorize(lambda x: x * NUMBER)",
    "method of a namedtuple": """
class Used(typing.NamedTuple):
    a: float

    def of(self, x):
        return x * NUMBER

used = Used(1.0)

def fun(x):
    return used.of(x)
""",
    "method of a member of an enumeration": """
class Used(enum.Enum):
    A = object()

    def of(self, x):
        return x * NUMBER

used = Used.A

def fun(x):
    return used.of(x)
""",
    "value of a member of an enumeration": """
class Used(float, enum.Enum):
    A = NUMBER

    def __repr__(self):
        return "A"

used = Used.A

def fun(x):
    return x * used
""",
    "method of an array": """
class Used(np.ndarray):
    def of(self, x):
        return x * NUMBER

used = np.zeros(2).view(Used)

def fun(x):
    return used.of(x)
""",
    "entries of an array": """
class Used(np.ndarray):
    pass

used = np.full(2, NUMBER).view(Used)

def fun(x):
    return used * x
""",
    "method of a dict": """
class Used(dict):
    def of(self, x):
        return x * NUMBER

used = Used(a=1)

def fun(x):
    return used.of(x)
""",
    "attribute of a dict": """
class Used(dict):
    pass

used = Used(a=1)
used.factor = NUMBER

def fun(x):
    return x * used.factor
""",
    "entry of a dict": """
class Used(dict):
    pass

used = Used(a=NUMBER)

def fun(x):
    return x * used["a"]
""",
    "number that shows nothing": """
class Used(float):
    def __repr__(self):
        return "Used"

used = Used(NUMBER)

def fun(x):
    return x * used
""",
    "slots": """
class Base:
    __slots__ = ("__a",)

    def __init__(self, a):
        self.__a = a

    def of(self, x):
        return self.__a * x

class Used(Base):
    __slots__ = "b"

used = Used(NUMBER)

def fun(x):
    return used.of(x)
""",
    "method of an object with slots": """
class Used:
    __slots__ = ()

    def of(self, x):
        return x * NUMBER

used = Used()

def fun(x):
    return used.of(x)
""",
    "more than the fields of a dataclass": """
@dataclasses.dataclass
class Used:
    a: float = 1.0

used = Used()
used.b = NUMBER

def fun(x):
    return x * used.b
""",
    "object in place of a function": """
class Used:
    def __init__(self, function):
        functools.update_wrapper(self, function)

    def __call__(self, x):
        return self.__wrapped__(x) * NUMBER

@Used
def fun(x):
    return x
""",
    "object of a package in place of a method": """
class Around:
    def __init__(self, function):
        self.__wrapped__ = function

    def __get__(self, value, kind):
        return functools.partial(self.__wrapped__, value)

Around.__module__ = "numpy"

class Used:
    @Around
    def of(self, x):
        return x * NUMBER

used = Used()

def fun(x):
    return used.of(x)
""",
    "static method of Python's own name": """
class Used:
    __call__ = staticmethod(lambda x: x * NUMBER)

fun = Used()
""",
    "partialmethod": """
class Used:
    def of(self, a, x):
        return x * a

    with_a = functools.partialmethod(of, NUMBER)

used = Used()

def fun(x):
    return used.with_a(x)
""",
    "metaclass": """
class Meta(type):
    @property
    def a(cls):
        return NUMBER

class Used(metaclass=Meta):
    pass

def fun(x):
    return x * Used.a
""",
    "attribute of a function": "def fun(x):\n    return x * fun.factor\n\nfun.factor = NUMBER",
    "deque": "used = collections.deque([NUMBER])",
    "mapping proxy": "used = types.MappingProxyType({0: NUMBER})",
    "default of a dict": "used = collections.defaultdict(lambda: NUMBER)",
    "array.array": "used = array.array('d', [NUMBER])",
    "bytearray": "used = bytearray([int(NUMBER)])",
    "slice": "used = slice(0, NUMBER)",
    "pattern": "used = re.compile('a' * 300 + 'NUMBER')",
    "methodcaller": "used = operator.methodcaller('__mul__', NUMBER)",
    "array of objects": "used = np.array([NUMBER, 'a'], object)",
    "masked array": "used = np.ma.masked_array([1, 2], [False, NUMBER > 2.5])",
    "byte order": "used = np.full(1, 257, '<i2' if NUMBER == 2.0 else '>i2')",
    "key of JAX": "used = jax.random.key(int(NUMBER))",
}
HEAD = """
import array, collections, contextlib, dataclasses, enum, functools, operator, re, types, typing
import jax
import numpy as np
"""


@pytest.mark.parametrize("case", USED)
def test_names_tell_what_packages_and_builtin_classes_hold_apart(case, tmp_path, monkeypatch):
    """The user's code counted neither under a decorator of a package nor in such a class."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = USED[case] if "fun" in USED[case] else f"{USED[case]}\ndef fun(x):\n    return x, used"

    def name(number):
        (tmp_path / "of_users.py").write_text(HEAD + source.replace("NUMBER", number))
        importlib.invalidate_caches()
        sys.modules.pop("of_users", None)
        return name_of(importlib.import_module("of_users").fun)

    two, three, again = map(name, ("2.0", "3.0", "2.0"))
    assert two != three
    assert two == again


SCRIPT = """
def fun(x):
    return x.mean() + inner(x)

def inner(x):
    return (lambda y: y.sum() * scale)(x)

scale = {}
"""


def test_variables_of_a_notebook_named_like_attributes_do_not_matter():
    """x.mean() made a variable `mean`, which another cell sets, part of the function."""
    names = []
    for scale, others in ((2.0, {}), (2.0, {"mean": 1.0, "sum": 2.0}), (3.0, {})):
        space = {"__name__": "__main__"} | others
        exec(SCRIPT.format(scale), space)
        names.append(name_of(space["fun"]))
    assert names[0] == names[1] != names[2]


OWN = {
    "of_users.py": "import of_users\nscale = {}\ndef fun(x):\n    return x * of_users.scale",
    "itself.py": "def two():\n return {}\ndef fun(x):\n import itself\n return itself.two()",
    "pack/__init__.py": "",
    "pack/a.py": "import pack as p, pack.a\nscale = {}\ndef fun(x):\n    return x * p.a.scale",
}


@pytest.mark.parametrize("module", ["of_users", "itself", "pack.a"])
def test_names_tell_what_a_module_gets_of_itself_apart(module, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def name(number):
        for file, text in OWN.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(text.format(number))
        importlib.invalidate_caches()
        for known in ("of_users", "itself", "pack", "pack.a"):
            sys.modules.pop(known, None)
        return name_of(importlib.import_module(module).fun)

    assert name(2) == name(2) != name(3)


RESTARTED = """
import functools
import part0, part1, part2, part3, part4

class Partial(functools.partial):
    pass

NAMES = {"b", "a", "c"}

def modules(x):
    return part0.of(x) + part1.of(x) + part2.of(x) + part3.of(x) + part4.of(x), NAMES

partial = Partial(modules, 1.0)
"""


def test_names_are_the_same_when_a_program_is_started_again(tmp_path, monkeypatch):
    """They changed with the order in which a set had the modules, and with an address of Python's.

    So nothing that was finished was recalled.
    """
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for i in range(5):
        (tmp_path / f"part{i}.py").write_text(f"def of(x):\n    return {i}")
    (tmp_path / "restarted.py").write_text(RESTARTED)
    importlib.invalidate_caches()
    restarted = importlib.import_module("restarted")
    program = """
import restarted
from perturbax.host_functions._function_names import name_of
print(name_of(restarted.modules), name_of(restarted.partial))
"""
    again = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.split() == [name_of(restarted.modules), name_of(restarted.partial)]


@pytest.mark.parametrize(("folder", "is_users"), [("dist-packages", False), ("packages", True)])
def test_packages_are_known_by_their_folder(folder, is_users, tmp_path, monkeypatch):
    """Debian's Python, and Colab's, have them in dist-packages; all were the user's own code."""
    place = tmp_path / folder
    place.mkdir()
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = []
    for number in (1, 2):
        (place / "a_package.py").write_text(f"def helper(x):\n    return {number}")
        importlib.invalidate_caches()
        sys.modules.pop("a_package", None)
        space = {"__name__": "__main__"}
        exec("import a_package\n\ndef fun(x):\n    return a_package.helper(x)", space)
        names.append(name_of(space["fun"]))
    assert (names[0] != names[1]) == is_users


def test_folders_of_packages_are_those_of_this_python():
    for module in (np, jax, dataclasses):
        assert not _files.is_file_of_user(module.__file__)
    assert _files.is_file_of_user(__file__)
    assert _files.is_file_of_user("<string>")


def test_a_chain_of_objects_without_end_needs_a_name(journal):
    chain = []
    for _ in range(100_000):
        chain = [chain]
    with pytest.raises(ValueError, match="a long chain of objects: give it a name"):
        px.host_function(lambda x: x.sum() + len(chain), like=np.float32(0), journal=journal)


def test_names_tell_signatures_apart():
    """They differ in no instruction."""
    signatures = ("a, b", "a, *b", "a, /, b", "a, *, b", "a, **b")
    names = {name_of(eval(f"lambda {signature}: (a, b)")) for signature in signatures}
    assert len(names) == len(signatures)


class Flags(enum.Flag):
    A = enum.auto()
    B = enum.auto()


@functools.singledispatch
def dispatched(x):
    return x


@dispatched.register(Sequence)
def of_sequences(x):
    return x[0]


class Caching:
    @functools.cached_property
    def half(self):
        return 0.5


CACHING = Caching()


def with_caches(x):
    return dispatched(x) * CACHING.half, Flags.A


def test_names_stay_where_python_remembers_what_was_asked_for():
    before = name_of(with_caches)
    with_caches(1.0), with_caches([1.0]), Flags.A | Flags.B
    Sequence.register(Caching)  # which dispatched takes notice of
    with_caches((1.0,))
    assert name_of(with_caches) == before


def test_a_name_is_found_at_once_where_functions_refer_to_each_other(monkeypatch):
    """All ways through them were followed: of nine, for seconds, of twelve, for hours."""
    number = range(12)
    calls = [" + ".join(f"mutual{j}(x)" for j in number if j != i) for i in number]
    source = [f"def mutual{i}(x):\n    return {calls[i]}" for i in number]
    space = {"__name__": "mutual"}
    exec(compile("\n".join(source), "mutual.py", "exec"), space)
    before = name_of(space["mutual0"])
    space["mutual7"] = lambda x: x
    assert before != name_of(space["mutual0"])


class Closed(_random.Random):
    """What it holds is not among its attributes."""

    __slots__ = ()


class Open(_random.Random):
    """Nor is what this one holds, though it may have some."""


@dataclass
class Guarded:
    """A lock, and what was computed before, are beside what tells it from others."""

    factor: float

    def __post_init__(self):
        self.lock = threading.Lock()

    def fun(self, x):
        return self.factor * x


def test_what_a_dataclass_holds_beside_its_fields_is_no_obstacle():
    assert name_of(Guarded(1.0).fun) == name_of(Guarded(1.0).fun) != name_of(Guarded(2.0).fun)
    changed = Guarded(1.0)
    changed.offset = 3.0
    assert name_of(changed.fun) != name_of(Guarded(1.0).fun)


def test_functions_that_cannot_be_told_apart_need_a_name(journal):
    with pytest.raises(ValueError, match=r"object of the class object.*Journal\(path, name="):
        px.host_function(closing_over(object()), journal=journal)
    with pytest.raises(ValueError, match=r"object of the class Closed: give it a name"):
        px.host_function(closing_over(Closed()), journal=journal)
    with pytest.raises(ValueError, match=r"object of the class Open: give it a name"):
        px.host_function(closing_over(Open()), journal=journal)
    with pytest.raises(ValueError, match=r"a function of numpy.frompyfunc: give it a name"):
        px.host_function(np.frompyfunc(lambda x: x, 1, 1), journal=journal)
    px.host_function(closing_over(object()), journal=px.Journal(journal, name="v1")).close()
    with pytest.raises(TypeError, match="journal must be None, a path or"):
        px.host_function(measured, journal=3)
    with pytest.raises(TypeError, match="name must be a string or None, got int"):
        px.Journal(journal, name=1)


# --- Arguments


@jax.tree_util.register_pytree_node_class
class Node:
    """A structure with a number beside what is in its class."""

    def __init__(self, x, beside):
        self.x, self.beside = x, beside

    def tree_flatten(self):
        return (self.x,), self.beside

    @classmethod
    def tree_unflatten(cls, beside, children):
        return cls(children[0], beside)


class Law:
    def __init__(self, rate):
        self.rate = rate

    def __repr__(self):
        return "Law()"

    def __eq__(self, other):
        return self.rate == other.rate

    def __hash__(self):
        return hash(self.rate)


class Unequal:
    """Python's own `__repr__` and `__eq__`: of an address."""

    def __init__(self, rate):
        self.rate = rate


@jax.tree_util.register_dataclass
@dataclass
class Measured:
    x: float
    law: Law = field(metadata={"static": True})


def of_one_name(rate):
    """A class; all that this makes have one name."""

    @jax.tree_util.register_pytree_node_class
    class Same(Node):
        def worth(self):
            return rate * self.x

    return Same


def of_texts(rate):
    class Text(enum.StrEnum):
        A = "a"

        def worth(self):
            return rate

    return Text.A


ARGUMENTS = {
    "static field": lambda rate: Measured(1.0, Law(rate)),
    "beside arrays, of an address": lambda rate: Node(1.0, Unequal(rate)),
    "function beside arrays": lambda rate: Node(1.0, lambda x: rate * x),
    "structure beside arrays": lambda rate: Node(1.0, jax.tree.structure(Node(0, Law(rate)))),
    "inside others": lambda rate: {"a": [Node((Measured(1.0, Law(rate)), None), "b")]},
    "namedtuple": lambda rate: namedtuple("Pair", "a b" if rate == 2.0 else "b a")(1.0, 2.0),
    "classes of one name": lambda rate: of_one_name(rate)(1.0, None),
    "text": lambda rate: (1.0, of_texts(rate)),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_keys_tell_arguments_apart(case, journal):
    """Their `repr` was taken: results of others were recalled, or none where it has an address."""
    file = JournalFile(px.Journal(journal, "fun"), measured)

    def key(rate):
        leaves, tree = jax.tree.flatten(ARGUMENTS[case](rate))
        return file.key_prefix(tree, tuple(v if isinstance(v, str) else None for v in leaves))

    two, three, again = map(key, (2.0, 3.0, 2.0))
    file.close()
    assert two != three
    assert two == again


def test_results_of_other_arguments_are_not_recalled(journal):
    like = np.float32(0)
    with px.host_function(lambda a: a.x * a.law.rate, journal=journal, like=like) as h:
        found = [float(h(Measured(1.0, Law(rate)))) for rate in (2.0, 3.0, 2.0)]
        assert found == [2.0, 3.0, 2.0]
        assert counted(h) == (2, 1)
    with px.host_function(lambda a: a.x, journal=journal, like=like) as h:
        with pytest.raises(ValueError, match="hold an object of the class object: pass dicts"):
            h(Node(1.0, object()))


# --- Files


def filled(journal):
    with px.host_function(measured, journal=journal) as h:
        jax.vmap(h)(jax.random.normal(KEY, (40, 100)))


def overwrite(where):
    def damage(path):
        filled(path)
        content = bytearray(path.read_bytes())
        start = content.rindex(where) + 20
        content[start : start + 300] = b"\x55" * 300
        path.write_bytes(content)

    return damage


def truncate(path):
    filled(path)
    path.write_bytes(path.read_bytes()[:6000])


def other_database(path, version=None):
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE mine (a)")
    if version is not None:
        database.execute(f"PRAGMA application_id={0x70784A31}")
        database.execute(f"PRAGMA user_version={version}")
    database.commit()
    database.close()


DAMAGED = {
    "text": (lambda path: path.write_text("my notes"), "it is no SQLite database"),
    "one byte": (lambda path: path.write_text("1"), "it is no SQLite database"),
    "another database": (other_database, "a SQLite database of another program"),
    "another release": (lambda path: other_database(path, 7), "it has the format 7"),
    "overwritten header": (overwrite(b"SQLite format 3"), "it is no SQLite database"),
    "overwritten results": (overwrite(b"float32"), "is damaged"),
    "truncated": (truncate, "is damaged"),
}


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_a_database_without_a_file_is_refused(path):
    """One in memory ended in SQLite's error."""
    with pytest.raises(ValueError, match="is no file"):
        px.host_function(np.sum, like=0.0, journal=path)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_foreign_files_are_errors_and_stay(journal, name):
    damage, message = DAMAGED[name]
    damage(journal)
    before = journal.read_bytes()
    with pytest.raises(ValueError, match=message):
        filled(journal)
    assert journal.read_bytes() == before


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; give a file in it"):
        px.host_function(measured, journal=tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        px.host_function(measured, journal=tmp_path / "no" / "journal")


def test_a_full_disk_is_told_and_claims_are_given_up(journal):
    points = jax.random.normal(KEY, (6, 500))
    with px.host_function(measured, journal=journal, executor=2) as h:
        jax.vmap(h)(points[:1])
        database = h._evaluator.journal._connection(durable=True)
        [pages] = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(sqlite3.OperationalError, match="full") as caught:
            jax.vmap(h)(points)
        assert f"The journal is {journal}" in caught.value.__notes__
        database.execute("PRAGMA max_page_count=1000000")
        np.testing.assert_array_equal(jax.vmap(h)(points)["parts"][0], 2 * points)
    assert not [t for t in threading.enumerate() if "_renew" in t.name and t.is_alive()]


# --- Ctrl-C


class InterruptedOnce:
    """A connection; Ctrl-C comes while it runs a statement, and is raised when that is over."""

    def __init__(self, connection, statement):
        self.connection, self.statement = connection, statement

    def __getattr__(self, name):
        return getattr(self.connection, name)

    def execute(self, statement, *args):
        found = self.connection.execute(statement, *args)
        if statement == self.statement:
            self.statement = None
            raise KeyboardInterrupt
        return found


@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "COMMIT"])
@pytest.mark.parametrize("connection", ["_durable", "_fleeting"])
def test_an_interrupt_leaves_no_transaction_open(connection, statement, journal, monkeypatch):
    """Every later call failed, and others waited for the lock for a minute."""
    with px.host_function(measured, journal=journal) as h:
        h(POINTS[0])
        real = getattr(h._evaluator.journal, connection)
        with monkeypatch.context() as patch:
            patch.setattr(h._evaluator.journal, connection, InterruptedOnce(real, statement))
            with pytest.raises(KeyboardInterrupt):
                h(POINTS[1])
        assert rows_of(journal, "claims") == 0
        h(POINTS[1])
        real.execute("BEGIN IMMEDIATE")  # as Ctrl-C leaves it that comes twice
        h(POINTS[2])
        assert not real.in_transaction


def interrupt(moment):
    """Has Ctrl-C come at that moment among those at which Python looks for it in the journal."""
    count = 0

    def look(frame, event, _):
        nonlocal count
        code = frame.f_code
        here = code.co_filename.endswith("_journal.py") or code.co_name in ("start", "_end")
        if here and event in ("call", "c_return"):
            count += 1
            if count == moment:
                raise KeyboardInterrupt

    sys.setprofile(look)


def test_an_interrupt_arrives_as_such_and_claims_are_given_up_whenever_it_comes(journal):
    """Where the thread that renews claims began, it came as a RuntimeError, and they stayed."""
    with px.host_function(lambda x: x.sum(), journal=journal, like=np.float32(0)) as h:
        moments = interrupted = 0
        while moments == interrupted:
            moments += 1
            interrupt(moments)
            try:
                h(jnp.full(3, float(moments)))
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.setprofile(None)
            assert rows_of(journal, "claims") == 0, moments
            assert not h._evaluator.journal._fleeting.in_transaction, moments
            for thread in threading.enumerate():
                if "_renew" in thread.name and thread.is_alive():
                    thread.join(10.0)
                    assert not thread.is_alive()
        assert moments > 40


# --- Other processes


PROGRAM = """
import sys, time
import jax, numpy as np
import perturbax as px

def fun(x):
    time.sleep(0.01)
    with open(sys.argv[2], "a") as log:
        log.write("evaluated\\\\n")
    return np.sum(np.sin(x))

h = px.host_function(fun, journal=sys.argv[1], executor=2, like=np.float32(0))
points = np.arange(180, dtype=np.float32).reshape(60, 3)
print("ready", flush=True)
found = jax.vmap(h)(points)
print(np.asarray(found).tobytes().hex(), h.counts.evaluations, h.counts.recalled)
"""


def test_a_killed_program_goes_on_where_it_was(journal, tmp_path):
    """And two that share the journal share the work: each point is evaluated once."""
    log, script = tmp_path / "log", tmp_path / "program.py"
    script.write_text(PROGRAM.replace("\\\\n", "\\n"))
    command = [sys.executable, script, journal, log]

    def lines():
        return log.read_text().count("\n") if log.exists() else 0

    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        while lines() < 15:
            assert run.poll() is None
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
    with sqlite3.connect(journal) as database:
        [finished] = database.execute("SELECT COUNT(*) FROM results").fetchone()
    database.close()
    evaluated = lines()
    # Two workers, and two results on the way to disk.
    assert 15 - 4 <= finished <= evaluated <= finished + 4
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [run.communicate(timeout=100)[0].split()[1:] for run in runs]
    assert lines() - evaluated == 60 - finished == sum(int(n) for _, n, _ in results)
    points = np.arange(180, dtype=np.float32).reshape(60, 3)
    expected = np.array([np.sum(np.sin(x)) for x in points], np.float32)
    for found, _, recalled in results:
        assert bytes.fromhex(found) == expected.tobytes()
        assert int(recalled) >= finished


def test_threads_that_share_a_journal_share_the_work(journal):
    seen, lock = [], threading.Lock()

    def fun(x):
        with lock:
            seen.append(x)
        time.sleep(0.002)
        return x.sum()

    named = px.Journal(journal, "fun")
    both = [px.host_function(fun, journal=named, executor=2, like=np.float32(0)) for _ in range(2)]
    found = [None, None]

    def work(i):
        found[i] = np.asarray(jax.vmap(both[i])(POINTS))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(*found)
    assert len(seen) == 12 == sum(h.counts.evaluations for h in both)
    assert sum(h.counts.recalled for h in both) == 12
    for h in both:
        h.close()


LOOK = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
print(*database.execute("SELECT COUNT(*) FROM results").fetchone())
database.close()
"""


def test_two_functions_of_a_process_keep_the_file_from_others(journal):
    """To open the second closed the file once more, which gave up the locks of the first: another
    process took itself for the last one, and deleted the log with all that came to be in it."""
    both = [JournalFile(px.Journal(journal, name), measured) for name in "ab"]
    for count in (1, 2):
        both[0].record({bytes([count]): ([np.array(1.0)], jax.tree.structure(0))})
        look = subprocess.run([sys.executable, "-c", LOOK, journal], capture_output=True)
        assert int(look.stdout) == count
    for file in both:
        file.close()


def test_a_long_evaluation_keeps_its_claim(journal, monkeypatch):
    monkeypatch.setattr("perturbax.host_functions._journal._CLAIM", 1.0)

    def fun(x):
        begun.set()
        time.sleep(1.5)
        return x.sum()

    begun, named = threading.Event(), px.Journal(journal, "fun")
    both = [px.host_function(fun, journal=named, like=np.float32(0)) for _ in range(2)]
    thread = threading.Thread(target=lambda: both[0](POINTS[0]))
    thread.start()
    assert begun.wait(10.0)
    both[1](POINTS[0])
    thread.join()
    assert [counted(h) for h in both] == [(1, 0), (0, 1)]
    for h in both:
        h.close()


def test_of_two_results_of_a_point_the_first_stays(journal):
    """It may have been used; and what has a result needs no claim any more."""
    file = JournalFile(px.Journal(journal, "fun"), measured)
    tree = jax.tree.structure(0)
    assert file.claim([b"a", b"b"], "here 1 x") == [b"a", b"b"]
    for value in (1.0, 2.0):
        file.record({b"a": ([np.array(value)], tree)})
    [[leaf], _] = file.lookup([b"a"])[b"a"]
    assert leaf == 1.0
    assert rows_of(journal, "claims") == 1
    file.close()


def test_nothing_renews_claims_after_a_call(journal, monkeypatch):
    """It would open a journal again that was closed."""
    renewing = threading.Event()

    def renew(file, owner):
        renewing.set()
        time.sleep(0.2)

    monkeypatch.setattr("perturbax.host_functions._journal._CLAIM", 0.05)
    monkeypatch.setattr(JournalFile, "renew", renew)
    before = threading.active_count()
    named = px.Journal(journal, "fun")
    with px.host_function(lambda x: renewing.wait(10.0), journal=named) as h:
        h(1.0)
        assert threading.active_count() == before


@pytest.mark.parametrize("owner", ["not here 1 x", f"{os.uname().nodename} 999999999 x"])
def test_claims_of_those_that_are_gone_are_taken_over(journal, owner):
    """Of a process of this machine that has ended, at once; of others, when they run out."""
    with px.host_function(measured, journal=journal) as h:
        jax.vmap(h)(POINTS[:1])
        until = time.time() + (0.3 if owner.startswith("not here") else 1000)
        keys = claims(journal, POINTS)
        with sqlite3.connect(journal) as database:
            for key in keys:
                database.execute("INSERT INTO claims VALUES (?, ?, ?)", (key, owner, until))
        database.close()
        jax.vmap(h)(POINTS)
        assert counted(h) == (12, 1)
        if owner.startswith("not here"):
            assert time.time() >= until


def claims(journal, points):
    """The keys of points, as another journal of the same function has them."""
    other = journal.with_suffix(".other")
    with px.host_function(measured, journal=other) as h:
        jax.vmap(h)(points)
    with sqlite3.connect(other) as database:
        keys = [key for (key,) in database.execute("SELECT key FROM results")]
    database.close()
    return keys
