"""Which tests run by default: covering arrays of `conftest.py` leave out no pair of values."""

import dataclasses
import fnmatch
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import collect_ignore_glob, core_of, covering

AXES = {"sampler": "abcdefg", "degree": (0, 1, 2), "noise": ("normal", "gumbel"), "jit": (0, 1)}


@dataclasses.dataclass(eq=False)
class Case:
    """Of a collected test, what is read."""

    marker: Any
    callspec: Any

    def get_closest_marker(self, name):
        assert name == "covering"
        return self.marker


def product_of(axes, *names):
    marker = pytest.mark.covering(*names).mark
    return [
        Case(marker, SimpleNamespace(params=dict(zip(axes, values, strict=True))))
        for values in itertools.product(*axes.values())
    ]


def values_of(cases, *names):
    return {tuple(case.callspec.params[name] for name in names) for case in cases}


def test_each_pair_of_values_occurs():
    product = product_of(AXES)
    chosen = covering(product)
    assert len(chosen) < 27 < len(product)  # 21 are the least
    for one, two in itertools.combinations(AXES, 2):
        assert values_of(chosen, one, two) == set(itertools.product(AXES[one], AXES[two]))


def test_each_pair_of_the_named_and_each_value_occurs():
    chosen = covering(product_of(AXES, "degree", "noise"))
    assert len(chosen) == 7
    assert values_of(chosen, "degree", "noise") == set(itertools.product((0, 1, 2), AXES["noise"]))
    for name, values in AXES.items():
        assert values_of(chosen, name) == {(value,) for value in values}


def test_values_may_be_arrays():
    arrays = [np.zeros(2), np.zeros(2)]
    chosen = covering(product_of({"x": arrays, "y": arrays, "z": (0, 1)}))
    assert len(chosen) == 4


def test_the_documentation_need_not_be_installed():
    """Its modules were collected, which failed where sphinx is missing, and no test ran."""
    root = Path(__file__).parent.parent
    modules = [path.relative_to(root) for path in root.glob("docs/**/*.py")]
    assert modules
    for module in modules:
        assert any(fnmatch.fnmatch(str(module), glob) for glob in collect_ignore_glob)


def test_each_of_as_many_workers_as_cores_has_its_own():
    assert [core_of(f"gw{k}", 3, {7, 2, 5}) for k in range(4)] == [{2}, {5}, {7}, {2}]
    assert core_of("gw1", 2, {7, 2, 5}) == core_of("gw1", 4, {7, 2, 5}) == {7, 2, 5}
