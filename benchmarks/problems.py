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


def _ndcg(size: int) -> Callable[[Array], Array]:
    """1 less the discounted gain of a ranking by score, relative to the best."""
    gain = np.random.RandomState(31).randint(0, 5, size).astype(np.float32)
    discount = (1 / np.log2(np.arange(size) + 2)).astype(np.float32)
    best = float(np.sort(2**gain - 1)[::-1] @ discount)

    def fun(scores: Array) -> Array:
        return 1 - jnp.sum(jnp.asarray(2**gain - 1)[jnp.argsort(-scores)] * discount) / best

    return fun


def _sign_network(inputs: int, hidden: int, points: int) -> Callable[[Array], Array]:
    """Mean error of a network of signs, whose target is another's."""
    draw = np.random.RandomState(32)
    data = draw.normal(size=(points, inputs)).astype(np.float32)

    def outputs(weights: Array) -> Array:
        first = weights[: inputs * hidden].reshape(inputs, hidden)
        return jnp.sign(data @ first) @ weights[inputs * hidden :]

    wanted = jnp.sign(outputs(jnp.asarray(draw.normal(size=(inputs + 1) * hidden), jnp.float32)))

    def fun(weights: Array) -> Array:
        return jnp.mean((jnp.sign(outputs(weights)) != wanted) * 1.0)

    return fun


def middling() -> list[Problem]:
    """More that the default rule was fitted to, of 12 to 144 coordinates."""
    return [
        Problem("NDCG (12)", _ndcg(12), _point(31, 12), 0.5),
        Problem("0/1 error (42)", zero_one_error(14, 3, 100), _point(32, 42, 0.3), 0.3),
        Problem("sign network (112)", _sign_network(6, 16, 64), _point(33, 112, 0.7), 0.3),
        Problem("grid path (144)", _grid_path(12), 1 + _point(24, 144, 0.3), 0.3),
    ]


def unseen() -> list[Problem]:
    """Of 12 to 144 coordinates, measured only once the rule for as many was fixed."""

    def bidding(bids: Array) -> Array:  # second prices of six auctions of two
        pair = bids.reshape(-1, 2)
        value = jnp.asarray(np.random.RandomState(41).uniform(0.5, 2.0, pair.shape), jnp.float32)
        won = jnp.argmax(pair, axis=1)
        gain = value[jnp.arange(pair.shape[0]), won] - jnp.min(pair, axis=1)
        return -jnp.sum(gain)

    def queue(cost: Array) -> Array:  # jobs in the order of their scores, with due dates
        length = np.random.RandomState(42).uniform(0.5, 1.5, cost.shape[0]).astype(np.float32)
        due = np.random.RandomState(43).uniform(2.0, 14.0, cost.shape[0]).astype(np.float32)
        order = jnp.argsort(cost)
        done = jnp.cumsum(jnp.asarray(length)[order])
        return jnp.mean((done > jnp.asarray(due)[order]) * 1.0)

    def orders(amount: Array) -> Array:  # of whole boxes, against 50 days of demand
        draw = np.random.RandomState(44)
        demand = jnp.asarray(draw.poisson(4.0, (50, amount.shape[0])), jnp.float32)
        boxes = 2 * jnp.round(jnp.maximum(amount, 0.0) / 2)
        short = jnp.maximum(demand - boxes, 0.0)
        fee = jnp.sum((boxes > 0) * 1.5)
        return jnp.mean(jnp.sum(3 * short + jnp.maximum(boxes - demand, 0.0), axis=1)) + fee

    def tree(thresholds: Array) -> Array:  # 0/1 error of a decision tree of depth five
        draw = np.random.RandomState(45)
        data = jnp.asarray(draw.normal(size=(200, 5)), jnp.float32)
        label = (jnp.sum(jnp.sin(2 * data), axis=1) > 0) * 1
        leaf = jnp.asarray(draw.randint(0, 2, 32))
        node = jnp.zeros(200, jnp.int32)
        for level in range(5):
            right = data[:, level] > thresholds[node]
            node = 2 * node + 1 + right
        return jnp.mean((leaf[node - 31] != label) * 1.0)

    def clusters(centres: Array) -> Array:  # mean distance to the nearest, in a city of blocks
        data = jnp.asarray(np.random.RandomState(46).normal(size=(80, 4)), jnp.float32)
        away = jnp.sum(jnp.abs(data[:, None] - jnp.round(4 * centres.reshape(-1, 4)) / 4), axis=2)
        return jnp.mean(jnp.min(away, axis=1))

    def spanning_tree(length: Array) -> Array:  # true cost of the tree that is shortest by `length`
        size = 10
        row, column = np.triu_indices(size, 1)
        true = jnp.asarray(np.random.RandomState(47).uniform(0, 1, length.shape[0]), jnp.float32)
        away = jnp.full((size, size), jnp.inf).at[row, column].set(length)
        away = jnp.minimum(away, away.T)
        cost = jnp.zeros((size, size)).at[row, column].set(true)
        cost = cost + cost.T
        inside, paid = jnp.arange(size) == 0, jnp.float32(0)
        for _ in range(size - 1):
            cut = jnp.where(inside[:, None] & ~inside[None], away, jnp.inf)
            best = jnp.argmin(cut)
            paid = paid + cost.ravel()[best]
            inside = inside.at[best % size].set(True)
        return paid

    def tables(weights: Array) -> Array:  # 0/1 error of a linear policy that steers a cart
        step = weights.reshape(6, 10)
        draw = np.random.RandomState(48)
        state = jnp.asarray(draw.normal(size=(20, 6)), jnp.float32)
        push = jnp.asarray(draw.normal(0.0, 0.5, (10, 6)), jnp.float32)
        lost = jnp.float32(0)
        for _ in range(6):
            action = jnp.argmax(state @ step, axis=1)
            state = 0.9 * state + push[action]
            lost = lost + jnp.mean((jnp.sum(jnp.abs(state), axis=1) > 5) * 1.0)
        return lost

    def project(duration: Array) -> Array:  # days late, and the longest chain, of 12 layers of 6
        layers = duration.reshape(12, 6)
        draw = np.random.RandomState(49)
        finish = layers[0]
        for layer in layers[1:]:
            needs = jnp.asarray(draw.rand(6, 6) < 0.4)
            start = jnp.max(jnp.where(needs, finish[None], 0.0), axis=1)
            finish = jnp.ceil(start) + layer
        return jnp.max(finish) + 2 * jnp.sum((finish > 16) * 1.0)

    def assignment(scores: Array) -> Array:  # cost of a greedy assignment of 10 to 10
        grid = scores.reshape(10, 10)
        true = jnp.asarray(np.random.RandomState(50).uniform(0, 1, (10, 10)), jnp.float32)
        free, paid = jnp.ones(10, bool), jnp.float32(0)
        for i in range(10):
            choice = jnp.argmin(jnp.where(free, grid[i], jnp.inf))
            paid = paid + true[i, choice]
            free = free.at[choice].set(False)
        return paid

    def spins(field: Array) -> Array:  # energy of 12 x 12 signs with random couplings
        spin = jnp.sign(field).reshape(12, 12)
        draw = np.random.RandomState(51)
        down = jnp.asarray(draw.normal(size=(11, 12)), jnp.float32)
        along = jnp.asarray(draw.normal(size=(12, 11)), jnp.float32)
        energy = jnp.sum(down * spin[1:] * spin[:-1]) + jnp.sum(along * spin[:, 1:] * spin[:, :-1])
        return -energy - 0.3 * jnp.sum(spin)

    return [
        Problem("bids (12)", bidding, 1 + _point(41, 12, 0.3), 0.3),
        Problem("jobs in order (16)", queue, _point(42, 16), 0.5),
        Problem("whole boxes (24)", orders, 4 + _point(43, 24), 0.7),
        Problem("decision tree (31)", tree, _point(44, 31, 0.5), 0.3),
        Problem("clusters in blocks (40)", clusters, _point(45, 40), 0.3),
        Problem("spanning tree (45)", spanning_tree, 1 + np.abs(_point(46, 45, 0.3)), 0.2),
        Problem("steered cart (60)", tables, _point(47, 60, 0.5), 0.3),
        Problem("project (72)", project, 1 + np.abs(_point(48, 72, 0.3)), 0.3),
        Problem("greedy assignment (100)", assignment, _point(49, 100, 0.5), 0.3),
        Problem("signs on a grid (144)", spins, _point(50, 144, 0.5), 0.5),
    ]
