"""Runs the benchmarks on real tasks in a smoke size, against figures known from elsewhere."""

import functools
from pathlib import Path

import numpy as np
import pytest

from helpers import import_program

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a benchmark by its name, as a script beside it would."""
    return functools.partial(import_program, BENCHMARKS, monkeypatch)


def test_shortest_path_task(benchmark_module):
    task, decisions = benchmark_module("shortest_path_task"), benchmark_module("decisions")
    data = task.load([(4, 0.5, 42)], 1_000)
    models = decisions.least_squares(data.x, data.costs)
    # Found independently in numpy, on the same data.
    assert task.evaluate(task.regret_of(""), models, data)[0] == pytest.approx(8.579, abs=0.01)
    models = decisions.fit(task.fenchel_young(1), decisions.Training(20), 1_000)(0, data)
    assert 6.7 < task.evaluate(task.regret_of(""), models, data)[0] < 7.9


def test_knapsack_task(benchmark_module):
    task = benchmark_module("knapsack_task")
    data = task.load([(4, 0.0, 42)], 64, 50)
    assert np.all(data.solutions @ task.WEIGHTS <= 100 * task.CAPACITY)
    assert task.WEIGHTS.min() >= 300
    assert task.WEIGHTS.max() < 800
    losses = {"exact": None, "multiplicative": task.fenchel_young(1, 0.5, multiplicative=True)}
    exact, multiplicative = task.compare(losses, data, 64, 60)
    assert exact["regret"][0] < 5
    # Decided as it was trained, by softplus of the model: not by its sign.
    assert multiplicative["regret"][0] < 50
