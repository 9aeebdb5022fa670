"""Claim: PyEPO's perturbed methods reach the same regret here, in less time.

Shortest paths at the setting of PyEPO's notebook 03 (5 x 5, seed 42, degree 4, noise 0.5, linear
model, Adam 0.01, batches of 32, 20 epochs, sigma = 1): the same data, the same losses, the same
solver, the cheapest of 70 listed paths. PyEPO runs in three ways:

- torch, and JAX with host solver: a user's own optModel, which PyEPO calls for one problem after
  another, as it does Gurobi and the other solvers outside JAX;
- JAX, compiled solver: the only class that PyEPO solves whole batches with inside jit is that of
  its first-order solver MPAX, so the listed paths are put in its place. This is the best it could
  do, and not what it ships.

It needs `pip install pyepo` (which brings torch); without it the script says so and ends.

    python benchmarks/pyepo_side_by_side.py [--quick]
"""

import argparse
import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from decisions import BATCH, NUM_FEATURES, Model, make_regret, mean_and_error, shortest_path_data
from shortest_path_task import EDGES, PATHS, cheapest_path, load
from timing import table, write

import perturbax as px

SEED, DEGREE, NOISE = 42, 4, 0.5
HAS_PYEPO = importlib.util.find_spec("pyepo") is not None
MISSING = "PyEPO is not installed, so it is left out: pip install pyepo (it brings torch)"


def host_model():
    """PyEPO's view of the paths: one problem at a time, in numpy."""
    from pyepo.model.opt import optModel

    class ListedPaths(optModel):
        def _getModel(self):
            return None, list(range(len(EDGES)))

        def setObj(self, c):
            self.costs = np.asarray(c, np.float32)

        def solve(self):
            values = PATHS @ self.costs
            best = int(np.argmin(values))
            return PATHS[best], float(values[best])

    return ListedPaths()


def compiled_model():
    """The paths in the place of PyEPO's batched solver in JAX."""
    from pyepo.model.mpax import optMpaxModel
    from pyepo.model.opt import optModel

    class CompiledPaths(optMpaxModel):
        def __init__(self):
            optModel.__init__(self)

        def _getModel(self):
            return None, list(range(len(EDGES)))

        @property
        def num_cost(self):
            return len(EDGES)

        def batch_optimize(self, costs):
            solved = jax.vmap(cheapest_path)(costs)
            return solved, jnp.sum(solved * costs, axis=-1), None

    return CompiledPaths()


def pyepo_layers(model, num_samples):
    """PyEPO's loss of a batch, and the squared error of its layer, as functions of a key first."""
    from pyepo.func.jax import perturbedFenchelYoung, perturbedOpt

    young = perturbedFenchelYoung(model, n_samples=num_samples, sigma=1.0)
    layer = perturbedOpt(model, n_samples=num_samples, sigma=1.0)
    return (
        lambda key, costs, solutions: young(costs, solutions, key=key),
        lambda key, costs, solutions: jnp.mean(
            jnp.sum((layer(costs, key=key) - solutions) ** 2, axis=-1)
        ),
    )


def our_layers(num_samples):
    """The same, of this library."""
    common = {"sigma": 1.0, "noise": px.Normal(), "maximize": False}
    young = px.make_fenchel_young_loss(cheapest_path, num_samples=num_samples, **common)
    layer = px.make_perturbed_argmax(cheapest_path, num_samples, **common)

    def young_of_batch(key, costs, solutions):
        return jnp.mean(jax.vmap(young)(jax.random.split(key, len(costs)), costs, solutions))

    def squared_of_batch(key, costs, solutions):
        found = jax.vmap(layer)(jax.random.split(key, len(costs)), costs)
        return jnp.mean(jnp.sum((found - solutions) ** 2, axis=-1))

    return young_of_batch, squared_of_batch


def make_training(batch_loss, data, epochs):
    """A function of a seed that trains a model; an epoch is one compiled call."""
    x, solutions = data.x[0], data.solutions[0]
    batches = -(-len(x) // BATCH)
    optimizer = optax.adam(1e-2)

    def loss(model, key, chosen):
        return batch_loss(key, model(x[chosen]), solutions[chosen])

    @jax.jit
    def epoch(state, key):
        keys = jax.random.split(key)
        order = jnp.pad(
            jax.random.permutation(keys[0], len(x)), (0, batches * BATCH - len(x)), "wrap"
        )

        def step(state, batch):
            model, moments = state
            gradient = jax.grad(loss)(model, *batch)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(model, updates), moments), None

        steps = jax.random.split(keys[1], batches), order.reshape(batches, BATCH)
        return jax.lax.scan(step, state, steps)[0]

    def train(seed):
        bound = NUM_FEATURES**-0.5
        draw = np.random.default_rng(seed).uniform(-bound, bound, (len(EDGES), NUM_FEATURES + 1))
        draw = jnp.asarray(draw, jnp.float32)
        model = Model(draw[:, :-1], draw[:, -1])
        state = (model, optimizer.init(model))
        for key in jax.random.split(jax.random.key(seed), epochs):
            state = jax.block_until_ready(epoch(state, key))
        return state[0]

    return train


def make_torch_training(num_samples, squared, data, epochs):
    """The same with PyEPO's torch modules and the host solver."""
    import torch
    from pyepo.func import perturbedFenchelYoung, perturbedOpt

    x, solutions = (torch.from_numpy(np.array(v[0])) for v in (data.x, data.solutions))

    def train(seed):
        torch.manual_seed(seed)
        common = {"n_samples": num_samples, "sigma": 1.0, "seed": seed}
        method = (perturbedOpt if squared else perturbedFenchelYoung)(host_model(), **common)
        model = torch.nn.Linear(NUM_FEATURES, len(EDGES))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(epochs):
            for chosen in torch.randperm(len(x)).split(BATCH):
                if squared:
                    loss = ((method(model(x[chosen])) - solutions[chosen]) ** 2).sum(1).mean()
                else:
                    loss = method(model(x[chosen]), solutions[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return Model(*(jnp.asarray(v.detach().numpy()) for v in (model.weight, model.bias)))

    return train


def check_data(data_x, costs):
    """Raises unless PyEPO draws the same data."""
    from pyepo.data.shortestpath import genData

    theirs = genData(len(data_x), NUM_FEATURES, (5, 5), deg=DEGREE, noise_width=NOISE, seed=SEED)
    np.testing.assert_allclose(theirs[0], data_x)
    np.testing.assert_allclose(theirs[1], costs)


def main(trainings=5, epochs=20, samples=(1, 3, 10)):
    if not HAS_PYEPO:
        print(MISSING)
        return []
    check_data(*shortest_path_data(SEED, 2_000, len(EDGES), DEGREE, NOISE))
    data = load([(DEGREE, NOISE, SEED)], 1_000)
    regret = make_regret(cheapest_path)
    results, rows = [], []
    for squared, method in enumerate(("Fenchel-Young", "argmax, squared")):
        for m in samples:
            if squared and m == 1:
                continue  # one sample has no baseline
            ways = {
                "perturbax": make_training(our_layers(m)[squared], data, epochs),
                "PyEPO, JAX, compiled solver": make_training(
                    pyepo_layers(compiled_model(), m)[squared], data, epochs
                ),
                "PyEPO, JAX, host solver": make_training(
                    pyepo_layers(host_model(), m)[squared], data, epochs
                ),
                "PyEPO, torch": make_torch_training(m, squared, data, epochs),
            }
            for way, train in ways.items():
                train(0)  # compiles
                seconds, regrets = [], []
                for seed in range(1, 1 + trainings):
                    start = time.perf_counter()
                    model = train(seed)
                    seconds.append((time.perf_counter() - start) / epochs)
                    one = jax.tree.map(lambda v: v[None], model)
                    test = (data.test_x, data.test_costs, data.test_solutions)
                    regrets.append(float(regret(one, *test)[0]))
                milliseconds = 1e3 * float(np.median(seconds))
                rows.append([method, str(m), way, mean_and_error(regrets), f"{milliseconds:.3g}"])
                results.append(
                    {"method": method, "num_samples": m, "by": way, "regret": regrets,
                     "milliseconds_an_epoch": milliseconds}
                )  # fmt: skip
    print(f"Test regret in percent, {trainings} trainings on the same data")
    print(table(["method", "M", "by", "regret ± s.e.", "ms an epoch"], rows))
    write("pyepo_side_by_side", f"data {SEED}, trainings 1 to {trainings}", results)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke size")
    main(**({"trainings": 2, "epochs": 1, "samples": (3,)} if parser.parse_args().quick else {}))
