"""Claim: learning values through a knapsack, Fenchel-Young losses beat least squares where it errs.

PyEPO's knapsack data: 32 items, five features, whole values that are a polynomial of them times
noise, weights of 3 to 8 in hundredths, one capacity of 20, a linear model. The weights are those of
the first seed. What is reported is the regret of 1,000 test decisions, in percent of what the best
ones are worth: mean and standard error over seeds. Adam, learning rate 0.01, batches of 32, 1,000
training examples, 20 epochs, Normal noise, sigma = 1; where values are multiplied by the noise,
sigma = 0.5, and they are softplus of the linear model.

    python benchmarks/knapsack_task.py [--seeds 5] [--quick]
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from decisions import (
    Data,
    Training,
    fit,
    knapsack_data,
    least_squares,
    make_regret,
    mean_and_error,
    split,
)
from timing import table, write

import perturbax as px

NUM_ITEMS, CAPACITY, FIRST_SEED = 32, 20, 42
CELLS = ((1, 0.5), (4, 0.0), (4, 0.5), (6, 0.5))  # degree and noise
WEIGHTS = knapsack_data(FIRST_SEED, 1, NUM_ITEMS, 1, 0.0)[0]


def best_items(values):
    """The most valuable items that fit, a 1 at each."""
    return px.solvers.knapsack(values, WEIGHTS / 100, CAPACITY, scale=100)


def best_items_of_softplus(predicted):
    """What a model that was trained with softplus decides."""
    return best_items(jax.nn.softplus(predicted))


def load(cells, num_train, num_test=1_000):
    """Data of the given (degree, noise, seed), stacked."""
    parts = []
    for degree, noise, seed in cells:
        count = num_train + num_test
        _, x, values = knapsack_data(seed, count, NUM_ITEMS, degree, noise)
        train, test = split(seed, count, num_test)
        parts.append((x[train], values[train], x[test], values[test]))
    x, values, test_x, test_values = (
        jnp.asarray(np.stack(part), jnp.float32) for part in zip(*parts, strict=True)
    )
    solve = jax.jit(lambda values: jax.lax.map(best_items, values, batch_size=256))
    solved = [
        solve(v.reshape(-1, NUM_ITEMS)).reshape(v.shape).astype(jnp.float32)
        for v in (values, test_values)
    ]
    return Data(x, values, solved[0], test_x, test_values, solved[1])


def fenchel_young(num_samples, sigma=1.0, multiplicative=False):
    """The loss of one example."""
    loss = px.make_fenchel_young_loss(
        best_items, num_samples=num_samples, sigma=sigma, noise=px.Normal(),
        multiplicative=multiplicative,
    )  # fmt: skip
    sign = jax.nn.softplus if multiplicative else lambda predicted: predicted
    return lambda key, predicted, values, solution: loss(key, sign(predicted), solution)


def squared_error(num_samples):
    """The loss of one example, its mean items against the best ones."""
    layer = px.make_perturbed_argmax(best_items, num_samples, 1.0, px.Normal())

    def loss(key, predicted, values, solution):
        del values
        return jnp.sum((layer(key, predicted) - solution) ** 2)

    return loss


def methods():
    """Losses by name; without one, least squares."""
    return {
        "two-stage least squares": None,
        "Fenchel-Young, M = 1": fenchel_young(1),
        "Fenchel-Young, M = 3": fenchel_young(3),
        "Fenchel-Young, multiplicative, M = 1": fenchel_young(1, 0.5, multiplicative=True),
        "perturbed argmax, squared, M = 3": squared_error(3),
    }


def compare(losses, data, num_train, epochs):
    """Regrets of each method on each problem, and the seconds that it took."""
    results = []
    for name, loss in losses.items():
        start = time.perf_counter()
        if loss is None:
            models = least_squares(data.x, data.costs)
        else:
            models = fit(loss, Training(epochs), num_train)(0, data)
        regret = make_regret(best_items_of_softplus if "multiplicative" in name else best_items)
        regrets = regret(models, data.test_x, data.test_costs, data.test_solutions)
        jax.block_until_ready(regrets)
        seconds = time.perf_counter() - start
        results.append({"method": name, "regret": np.asarray(regrets).tolist(), "seconds": seconds})
    return results


def main(seeds=5, quick=False):
    start = time.perf_counter()
    losses, cells = methods(), CELLS
    num_train, num_test, epochs = 1_000, 1_000, 20
    if quick:
        losses = {name: losses[name] for name in list(losses)[:2]}
        cells, seeds, num_train, num_test, epochs = CELLS[2:3], 1, 96, 100, 4
    data_seeds = range(FIRST_SEED, FIRST_SEED + seeds)
    data = load([(*cell, seed) for cell in cells for seed in data_seeds], num_train, num_test)
    results = compare(losses, data, num_train, epochs)
    head = [f"{degree}, {noise:g}" for degree, noise in cells]
    rows = [
        [r["method"], *map(mean_and_error, np.reshape(r["regret"], (-1, seeds))),
         f"{r['seconds']:.0f}"]
        for r in results
    ]  # fmt: skip
    print(f"Test regret in percent, {num_train:,} training examples, {seeds} seeds; s for all")
    print(table(["method; degree, noise:", *head, "s"], rows))
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    write("knapsack_task", f"data {data_seeds}, trainings 0", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="data sets of each kind")
    parser.add_argument("--quick", action="store_true", help="a smoke size")
    arguments = parser.parse_args()
    main(arguments.seeds, arguments.quick)
