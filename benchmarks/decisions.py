"""Shared by the benchmarks of predicted costs: data, training, regret and tables.

The problem: features x are observed, the costs c of an optimisation problem are not. A linear model
predicts them, a solver decides with the prediction, and the measure is the cost of that decision
under the true c. The two generators are those of Elmachtoub and Grigas, "Smart Predict, then
Optimize", 2022, arXiv:1710.08005, as PyEPO has them (Tang and Khalil, 2024, arXiv:2206.14234),
with the same draws in the same order, so the same seeds give the same data.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

NUM_FEATURES = 5
NUM_TEST = 1_000
BATCH = 32


class Data(NamedTuple):
    """Several problems of one size, stacked along the first axis."""

    x: Array  # (problems, n, features)
    costs: Array  # (problems, n, d)
    solutions: Array  # (problems, n, d), the optimum under the true costs
    test_x: Array
    test_costs: Array
    test_solutions: Array


class Model(NamedTuple):
    """A linear prediction of costs."""

    weights: Array  # (d, features)
    bias: Array  # (d,)

    def __call__(self, x: Array) -> Array:
        """Costs predicted from the features x (..., p)."""
        return x @ self.weights.T + self.bias


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained; PyEPO's way unless said otherwise."""

    epochs: int
    learning_rate: float = 1e-2
    decay: bool = False  # of the learning rate, by a cosine to 0
    average: bool = False  # the parameters over the last half of the steps


def polynomial(draw: np.random.RandomState, count: int, dim: int, degree: int):
    """Features and noiseless costs, up to scale: a polynomial of a random sum of features."""
    mixing = draw.binomial(1, 0.5, (dim, NUM_FEATURES))
    x = draw.normal(0, 1, (count, NUM_FEATURES))
    return x, (x @ mixing.T / np.sqrt(NUM_FEATURES) + 3) ** degree + 1


def shortest_path_data(seed: int, count: int, dim: int, degree: int, noise: float):
    """Features and costs of the edges of a lattice, as PyEPO's shortest path data."""
    draw = np.random.RandomState(seed)
    x, costs = polynomial(draw, count, dim, degree)
    return x, costs / 3.5**degree * draw.uniform(1 - noise, 1 + noise, costs.shape)


def knapsack_data(seed: int, count: int, dim: int, degree: int, noise: float):
    """Weights in hundredths, features and values of the items, as PyEPO's knapsack data."""
    draw = np.random.RandomState(seed)
    weights = draw.choice(np.arange(300, 800), (1, dim))[0]
    x, values = polynomial(draw, count, dim, degree)
    values = values * 5 / 3.5**degree * draw.uniform(1 - noise, 1 + noise, values.shape)
    return weights, x, np.ceil(values)


def split(seed: int, count: int, num_test: int = NUM_TEST) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test examples, as scikit-learn's train_test_split."""
    order = np.random.RandomState(seed).permutation(count)
    return order[num_test:], order[:num_test]


def fit(loss: Callable[..., Array], training: Training, num_train: int) -> Callable[..., Model]:
    """A function that trains one model a problem, all problems at once.

    Args:
      loss: of one example, from a key, predicted costs, true costs and the true solution.
      training: how to train.
      num_train: number of training examples.

    Returns:
      A function of a seed (for initial models, order of the examples and noise), the data and, if
      they are not to be random, the initial models. It returns a Model whose arrays are stacked
      along the first axis.
    """
    batches = -(-num_train // BATCH)
    steps = training.epochs * batches
    rate = training.learning_rate
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps) if training.decay else rate)

    def batch_loss(model, keys, x, costs, solutions):
        return jnp.mean(jax.vmap(loss)(keys, model(x), costs, solutions))

    @jax.jit
    @jax.vmap
    def fit_all(start, keys, order, x, costs, solutions):
        def step(state, batch):
            model, moments, total = state
            number, key, chosen = batch
            gradient = jax.grad(batch_loss)(model, key, x[chosen], costs[chosen], solutions[chosen])
            updates, moments = optimizer.update(gradient, moments)
            model = optax.apply_updates(model, updates)
            late = number >= steps // 2
            total = jax.tree.map(lambda t, m: t + jnp.where(late, m, 0.0), total, model)
            return (model, moments, total), None

        zero = jax.tree.map(jnp.zeros_like, start)
        state = (start, optimizer.init(start), zero)
        (model, _, total), _ = jax.lax.scan(step, state, (jnp.arange(steps), keys, order))
        return (
            jax.tree.map(lambda t: t / (steps - steps // 2), total) if training.average else model
        )

    def fit_problems(seed, data, start=None):
        num_problems = len(data.x)
        draw = np.random.default_rng(seed)
        order = draw.permuted(
            np.tile(np.arange(num_train), (num_problems, training.epochs, 1)), axis=-1
        )
        # The last batch of an epoch is filled up from the first.
        order = np.pad(order, [(0, 0), (0, 0), (0, batches * BATCH - num_train)], "wrap")
        order = jnp.asarray(order.reshape(num_problems, steps, BATCH))
        if start is None:
            # What torch.nn.Linear starts from.
            bound = NUM_FEATURES**-0.5
            shape = (num_problems, data.costs.shape[-1], NUM_FEATURES + 1)
            drawn = jnp.asarray(draw.uniform(-bound, bound, shape), jnp.float32)
            start = Model(drawn[..., :-1], drawn[..., -1])
        # Split here rather than step by step: it compiles once for all methods.
        keys = jax.random.split(jax.random.key(seed), order.shape)
        return fit_all(start, keys, order, data.x, data.costs, data.solutions)

    return fit_problems


@jax.jit
@jax.vmap
def least_squares(x: Array, costs: Array) -> Model:
    """The two-stage method: the model with the least squared error of the costs."""
    ones = jnp.ones((len(x), 1))
    found = jnp.linalg.lstsq(jnp.concatenate([x, ones], axis=1), costs)[0]
    return Model(found[:-1].T, found[-1])


def make_regret(solver: Callable[[Array], Array]) -> Callable[[Model, Array, Array, Array], Array]:
    """A jitted function of models, features, costs and solutions to the regret, in percent.

    The regret is what the decisions cost more than the best ones, summed over the examples, over
    what the best ones cost: |sum c (y(prediction) - y(c))| / |sum c y(c)|. One number a problem.
    """

    @jax.jit
    @jax.vmap
    def regret(model, x, costs, solutions):
        decided = jax.vmap(solver)(model(x))
        lost = jnp.sum(costs * (decided - solutions))
        return 100 * jnp.abs(lost) / jnp.abs(jnp.sum(costs * solutions))

    return regret


def mean_and_error(values: Sequence[float] | np.ndarray) -> str:
    """A mean and its standard error, as in 7.35 ± .04."""
    values = np.asarray(values)
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{values.mean():.2f} ± {values.std(ddof=1) / np.sqrt(len(values)):.2f}"
