"""How tests and doctests are compiled, quickly and each program once; which of them run by default.

Most of the suite's time would go into compiling small programs. Two settings, made before JAX
reads them, make that cheaper; neither changes a number beyond rounding:

- XLA leaves out its costly optimisations (up to JAX 0.10), and does not split programs to compile
  the parts in parallel, which takes a fifth more in all. What runs for long asks for some again:
  `measure` of `tests/helpers.py` does. With ``FULL_OPTIMIZATION=1`` in the environment all is
  compiled as it is for users; `make test-all` sets it.
- Compiled programs are kept in ``build/jax-cache``, for both workers, for the processes that tests
  start, and for the next run. JAX finds an entry by the whole program together with the release,
  the flags and the processor: a change of the library asks for another entry. ``make clean``
  removes the folder.

With as many workers as cores each has a core of its own, and XLA no threads beside its first:
programs of microseconds, split among threads that wander from core to core, took a sixth more of
the whole suite's time. Not so with ``FULL_OPTIMIZATION=1``.

Linear algebra outside JAX has one thread, for there are as many workers as cores: two threads of
each took turns, and a regression of scikit-learn 4 s in place of 0.1.

Python looks for garbage where a test asks it to, and then not at what was there before its file of
tests: looking whenever it likes took a twelfth of the suite's time and found next to nothing. After
a file, compiled programs are forgotten, and all garbage with them, if a worker holds more than
`MOST_MEMORY`: they would grow to five gigabytes in each. What is freed must be given back by hand:
glibc keeps it, so that they would be forgotten again after each file that follows.

A test of a product of cases that is marked ``covering`` runs, by default, at so many of them that
each pair of values occurs, and one that is marked ``full`` does not run; ``--all`` runs all. The
fixture ``everything`` tells a test that has cases of its own.
"""

import ctypes
import gc
import importlib.metadata
import itertools
import os
import shutil
from pathlib import Path

import pytest

QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_parallel_codegen_split_count": "1",
    "xla_cpu_use_fusion_emitters": "false",
}
# No doctests, and Sphinx, which they import, is not installed by `make test`.
collect_ignore_glob = ["docs/*.py", "docs/_extensions/*.py"]
CACHE = Path(__file__).parent / "build" / "jax-cache"
LARGEST_CACHE = 2**30  # bytes
MOST_MEMORY = 1.5 * 2**30  # bytes


def helps(flag: str) -> bool:
    """Whether this release of XLA compiles faster with the flag.

    Newer ones always use fusion emitters: they end the process for the flag of these, and what the
    emitters make they compile in minutes without optimisations that with them takes seconds.
    """
    release = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    return flag == "xla_cpu_parallel_codegen_split_count" or release <= (0, 10)


def as_for_users() -> bool:
    """Whether all is compiled and run as it is for users."""
    return os.environ.get("FULL_OPTIMIZATION", "0") not in ("", "0")


def prepare() -> None:
    """Sets what JAX reads; workers and other processes inherit it."""
    environment = os.environ
    flags = environment.get("XLA_FLAGS", "")
    if not as_for_users():
        added = [f"--{k}={v}" for k, v in QUICK.items() if k not in flags and helps(k)]
        environment["XLA_FLAGS"] = " ".join([*flags.split(), *added])
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        if CACHE.exists() and sum(f.stat().st_size for f in CACHE.iterdir()) > LARGEST_CACHE:
            shutil.rmtree(CACHE, ignore_errors=True)
        environment["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()


def core_of(worker: str, workers: int, cores: set[int]) -> set[int]:
    """The core that a worker, gw0, gw1, ..., has for itself; all, if there are not as many."""
    if workers != len(cores):
        return cores
    number = int(worker.removeprefix("gw"))  # one that takes the place of a crashed one has a new
    return {sorted(cores)[number % workers]}


def keep_to_a_core() -> None:
    """Gives each of several workers a core of its own, before JAX counts them."""
    environment = os.environ
    worker = environment.get("PYTEST_XDIST_WORKER")
    if worker is None or as_for_users() or not hasattr(os, "sched_setaffinity"):
        return
    workers = int(environment["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, core_of(worker, workers, os.sched_getaffinity(0)))


prepare()
keep_to_a_core()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--all``."""
    parser.addoption("--all", action="store_true", help="run whole products of cases")


def resident() -> float:
    """The memory of this process in bytes; infinite where the system does not tell."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return float("inf")
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a file of tests, forgets compiled programs, if they take too much memory."""
    if nextitem is None or nextitem.path == item.path:
        return
    if resident() > MOST_MEMORY:
        import jax

        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
        if give_back is not None:
            give_back(0)
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Looks for garbage once: pytest and Python would look several times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def everything(request: pytest.FixtureRequest) -> bool:
    """Whether whole products of cases are asked for."""
    return request.config.getoption("all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the markers ``full`` and ``covering`` allow to leave out."""
    if config.getoption("all"):
        return
    products: dict[object, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("covering"):
            products.setdefault((item.path, item.originalname), []).append(item)
    left_out = {item for item in items if item.get_closest_marker("full")}
    for product in products.values():
        left_out |= set(product) - set(covering(product))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def covering(product: list[pytest.Function]) -> list[pytest.Function]:
    """So few of a product's cases that each pair of values of its axes occurs, chosen greedily.

    With names, ``covering("order", "how")``, each pair of values of these parameters, and each
    value of any axis.
    """
    wanted = {}
    for item in product:
        # Values are known by identity: they may be arrays, and each stands in a list once.
        axes = {name: (name, id(value)) for name, value in item.callspec.params.items()}
        names = item.get_closest_marker("covering").args
        if names:
            wanted[item] = {*axes.values(), tuple(axes[name] for name in names)}
        else:
            wanted[item] = set(itertools.combinations(axes.values(), 2))
    chosen, missing = [], set().union(*wanted.values())
    while missing:
        best = max(wanted, key=lambda item: len(wanted[item] & missing))
        chosen.append(best)
        missing -= wanted.pop(best)
    return chosen
