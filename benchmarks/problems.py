"""The problems on which variances are measured: name, function, point and scale."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function of a vector to a scalar, where to smooth it and how much."""

    name: str
    fun: Callable[[Array], Array]
    x: np.ndarray
    sigma: float


def _grid_path(side: int) -> Callable[[Array], Array]:
    """Cost, under a fixed target, of the cheapest right-and-down path through a grid of costs."""
    target = np.random.RandomState(4).uniform(0.0, 1.0, (side, side)).astype(np.float32)

    def fun(costs: Array) -> Array:
        grid = costs.reshape(side, side)
        row_cost, row_target = [], []
        for i in range(side):
            for j in range(side):
                if i == j == 0:
                    best, paid = jnp.float32(0), jnp.float32(0)
                elif i == 0:
                    best, paid = row_cost[j - 1], row_target[j - 1]
                elif j == 0:
                    best, paid = row_cost[0], row_target[0]
                else:
                    up = row_cost[j] < row_cost[j - 1]
                    best = jnp.where(up, row_cost[j], row_cost[j - 1])
                    paid = jnp.where(up, row_target[j], row_target[j - 1])
                best, paid = best + grid[i, j], paid + target[i, j]
                if i == 0:
                    row_cost.append(best)
                    row_target.append(paid)
                else:
                    row_cost[j], row_target[j] = best, paid
        return row_target[-1]

    return fun


def _ranking_loss(size: int) -> Callable[[Array], Array]:
    wanted = jnp.asarray(np.random.RandomState(5).permutation(size), jnp.float32)

    def fun(scores: Array) -> Array:
        ranks = jnp.sum(scores[None, :] < scores[:, None], axis=1).astype(jnp.float32)
        return jnp.sum((ranks - wanted) ** 2) / size

    return fun


def zero_one_error(features: int, classes: int, images: int) -> Callable[[Array], Array]:
    draw = np.random.RandomState(6)
    labels = draw.randint(0, classes, images)
    centres = draw.normal(0.0, 1.0, (classes, features))
    inputs = (centres[labels] + draw.normal(0.0, 1.5, (images, features))).astype(np.float32)

    def fun(weights: Array) -> Array:
        guess = jnp.argmax(inputs @ weights.reshape(features, classes), axis=1)
        return jnp.mean((guess != labels).astype(jnp.float32))

    return fun


def _relu(x: Array) -> Array:
    return jnp.sum(jnp.maximum(x, 0.0))


def _steps(x: Array) -> Array:
    return jnp.sum((x > 0).astype(jnp.float32))


def _quantised(x: Array) -> Array:
    return jnp.sum(jnp.round(x * 4) / 4 * x)


def _top_3(x: Array) -> Array:
    value = jnp.asarray(np.random.RandomState(7).uniform(-1.0, 1.0, x.shape[0]), jnp.float32)
    return jnp.sum(value[jax.lax.top_k(x, 3)[1]])


def _choice(weights: Array) -> Array:
    scores = weights * jnp.array([1.0, 2.0, 3.0])
    return -scores[jnp.argmax(scores)]


def _point(seed: int, size: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.RandomState(seed).normal(0.0, scale, size)).astype(np.float32)


def suite() -> list[Problem]:
    """Those that the default rule was fitted to."""
    return [
        Problem("ReLU sum (3), kink in reach", _relu, np.float32([-0.1, 0.05, 0.1]), 0.1),
        Problem("ReLU sum (3), far from kinks", _relu, np.float32([-1.0, 0.5, 2.0]), 0.1),
        Problem("discrete choice (3)", _choice, np.float32([0.1, 0.1, 0.1]), 0.2),
        Problem("ranking loss (10)", _ranking_loss(10), _point(1, 10), 0.5),
        Problem("sum of steps (20)", _steps, _point(2, 20), 0.5),
        Problem("quantised quadratic (20)", _quantised, _point(3, 20), 0.5),
        Problem("top 3 of 20", _top_3, _point(4, 20), 0.5),
        Problem("grid path (64)", _grid_path(8), 1 + _point(5, 64, 0.3), 0.3),
        Problem("ReLU sum (300)", _relu, _point(6, 300, 0.3), 0.3),
        Problem("0/1 error (640)", zero_one_error(64, 10, 200), _point(7, 640, 0.1), 0.3),
        Problem("ReLU sum (2,000)", _relu, _point(8, 2000, 0.3), 0.3),
        Problem("ReLU sum (100,000)", _relu, _point(9, 100_000, 0.3), 0.3),
    ]


def held_back() -> list[Problem]:
    """Those that were looked at only once the rule was fixed."""

    def corner(x: Array) -> Array:
        return jnp.all(x > 0).astype(jnp.float32)

    def median(x: Array) -> Array:
        return jnp.median(x)

    def knapsack(value: Array) -> Array:
        weight = np.random.RandomState(11).randint(1, 10, value.shape[0])
        best = jnp.zeros(31)
        for i, w in enumerate(weight):
            best = jnp.maximum(best, jnp.pad(best, (w, 0))[:31] + jnp.maximum(value[i], 0.0))
        return jnp.floor(best[-1] * 4)

    def threshold_net(w: Array) -> Array:
        draw = np.random.RandomState(12)
        inputs = jnp.asarray(draw.normal(size=(64, 4)), jnp.float32)
        hidden = jnp.sign(inputs @ w[:32].reshape(4, 8) + w[32:40])
        return jnp.mean(
            (jnp.sign(hidden @ w[40:48]) != jnp.sign(inputs[:, 0] * inputs[:, 1])) * 1.0
        )

    return [
        Problem("corner (2)", corner, np.float32([0.2, -0.1]), 0.3),
        Problem("median of 15", median, _point(21, 15), 0.5),
        Problem("rounded knapsack (12)", knapsack, 1 + np.abs(_point(22, 12)), 0.3),
        Problem("threshold network (48)", threshold_net, _point(23, 48, 0.5), 0.3),
        Problem("grid path (144)", _grid_path(12), 1 + _point(24, 144, 0.3), 0.3),
    ]
