"""Claim: perturbed layers and losses are no slower than optax's and PyEPO's at equal samples.

Batches of 32 instances, each with its own key, Normal noise, sigma = 1; all compiled, with the same
solver, in turns in one process.

- layer: the mean solution and the gradient of its squared error. optax is its make_perturbed_fun
  around the solver, vmapped; ours also without symmetric derivatives and nets, which is the
  estimator that optax has;
- loss: value and gradient of the Fenchel-Young loss. optax has none: in its place
  is the mean solution minus the true one, which is the gradient alone.

PyEPO, where installed, with its JAX modules and the paths in place of its batched solver (see
pyepo_side_by_side.py).

    python benchmarks/layers.py
"""

import jax
import jax.numpy as jnp
import optax.perturbations
from pyepo_side_by_side import HAS_PYEPO, MISSING, compiled_model, pyepo_layers
from shortest_path_task import EDGES, cheapest_path
from timing import alternate, keys, spread, table, write

import perturbax as px

BATCH, SIGMA, MOST = 32, 1.0, 200


def grid_path(costs):
    """Minus a cheapest path, so that it maximises minus the costs."""
    return px.solvers.grid_shortest_path(-costs)


# Name, a solver that maximises, shape of its scores.
CASES = {
    "path, 5 x 5 (70 listed)": (lambda v: cheapest_path(-v), (len(EDGES),)),
    "path, 12 x 12 grid": (grid_path, (12, 12)),
    "top 10 of 100": (lambda v: px.solvers.top_k_mask(v, 10), (100,)),
    "ranks of 50": (px.solvers.ranks, (50,)),
}


def batched(layer, targets):
    """The layer's squared error, value and gradient, of a batch."""

    def squared(key, scores):
        found = jax.vmap(layer)(jax.random.split(key, BATCH), scores)
        return jnp.sum((found - targets) ** 2) / BATCH

    return jax.jit(jax.value_and_grad(squared, argnums=1))


def measure(name, num_samples, seconds=4.0):
    """Timings of the layer and of the loss."""
    solver, shape = CASES[name]
    scores = -1 - jax.random.uniform(jax.random.key(1), (BATCH, *shape))
    targets = jax.vmap(solver)(scores + jax.random.normal(jax.random.key(2), scores.shape))
    normal = {"sigma": SIGMA, "noise": px.Normal()}
    optax_layer = optax.perturbations.make_perturbed_fun(
        solver, num_samples, SIGMA, optax.perturbations.Normal()
    )
    plain = {"symmetrize": False, "sampler": px.Independent(), "degree": 0}
    layers = {
        "default": batched(px.make_perturbed_argmax(solver, num_samples, **normal), targets),
        "plain": batched(px.make_perturbed_argmax(solver, num_samples, **normal, **plain), targets),
        "optax": batched(optax_layer, targets),
    }
    young = px.make_fenchel_young_loss(solver, num_samples=num_samples, **normal)

    def loss(key, scores):
        return jnp.mean(jax.vmap(young)(jax.random.split(key, BATCH), scores, targets))

    def optax_gradient(key, scores):
        return (jax.vmap(optax_layer)(jax.random.split(key, BATCH), scores) - targets) / BATCH

    losses = {
        "default": jax.jit(jax.value_and_grad(loss, argnums=1)),
        "optax": jax.jit(optax_gradient),
    }
    if HAS_PYEPO and shape == (len(EDGES),):
        theirs = pyepo_layers(compiled_model(), num_samples)
        # A minimiser: the costs are minus the scores.
        for calls, fun in zip((losses, layers), theirs, strict=True):
            call = jax.jit(jax.value_and_grad(fun, argnums=1))
            calls["PyEPO"] = lambda key, scores, call=call: call(key, -scores, targets)
    turns = keys(MOST)
    return [
        alternate({n: lambda t, f=f: f(turns[t], scores) for n, f in calls.items()}, seconds,
                  most=MOST)
        for calls in (layers, losses)
    ]  # fmt: skip


def main(cases=tuple(CASES), samples=(10, 100), seconds=4.0):
    if not HAS_PYEPO:
        print(MISSING)
    rows, results = [], []
    for name in cases:
        for num_samples in samples:
            for kind, timing in zip(
                ("layer", "loss"), measure(name, num_samples, seconds), strict=True
            ):
                peers = [n for n in timing.names if n in ("optax", "PyEPO")]
                ours = [n for n in timing.names if n not in peers]
                ratios = {f"{p} / {o}": timing.ratio(p, o) for p in peers for o in ours}
                rows.append([
                    f"{name}, {kind}", str(num_samples),
                    *(f"{timing.milliseconds(n):.3g}" if n in timing.names else ""
                      for n in ("default", "plain", "optax", "PyEPO")),
                    *(spread(ratios[r]) if r in ratios else ""
                      for r in ("optax / default", "optax / plain", "PyEPO / default")),
                ])  # fmt: skip
                results.append({
                    "case": name, "kind": kind, "num_samples": num_samples,
                    "milliseconds": {n: timing.milliseconds(n) for n in timing.names},
                    "ratios": ratios,
                })  # fmt: skip
    print(f"Batches of {BATCH}; times in ms, ratios with quartiles")
    head = ["case", "samples", "default", "plain", "optax", "PyEPO"]
    head += ["optax / default", "optax / plain", "PyEPO / default"]
    print(table(head, rows))
    write("layers", f"keys 0 to {MOST - 1}, one a turn; scores 1, targets 2", results)


if __name__ == "__main__":
    main()
