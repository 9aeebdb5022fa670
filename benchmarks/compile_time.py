"""Claim: compiling takes about as long as with optax.perturbations, and grows with the leaves.

Lowering and compiling jit(grad) in a fresh process each time, for an x of 1, 20 and 200 leaves, a
sum of ReLUs over all of them, 1,000 samples. For comparison: optax.perturbations at 1 and 20
leaves, at 1 the default without its fit (degree 0), and at 200 the function itself, unperturbed.
Processes alternate; wall and processor time.

    python benchmarks/compile_time.py
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax.perturbations
from timing import fresh, spread, table, write

import perturbax as px

# Leaves, what is compared at them, and how often.
CASES = [
    (1, ("perturbax", "degree 0", "optax"), 5),
    (20, ("perturbax", "optax"), 2),
    (200, ("perturbax", "plain"), 3),
]
MOST_RATIO = 1.3
MOST_SECONDS = 2.0


def relu_sums(leaves):
    return sum(jnp.sum(jnp.maximum(leaf, 0.0)) for leaf in leaves)


def measure(kind, num_leaves):
    """What one fresh process finds."""
    leaves = [jnp.full((3,), 0.1 * i) for i in range(num_leaves)]
    key = jax.random.key(0)
    jax.block_until_ready((leaves, key))
    functions = {
        "perturbax": px.make_perturbed_fun(relu_sums, 1_000),
        "degree 0": px.make_perturbed_fun(relu_sums, 1_000, degree=0),
        "optax": optax.perturbations.make_perturbed_fun(relu_sums, 1_000),
        "plain": lambda key, leaves: relu_sums(leaves),
    }
    gradient = jax.jit(jax.grad(functions[kind], argnums=1))
    wall, cpu = [time.perf_counter()], [time.process_time()]
    lowered = gradient.lower(key, leaves)
    wall.append(time.perf_counter())
    lowered.compile()
    wall.append(time.perf_counter())
    cpu.append(time.process_time())
    return {"wall": wall[2] - wall[0], "lower": wall[1] - wall[0], "cpu": cpu[1] - cpu[0]}


def main(cases=CASES):
    results, rows, walls = [], [], {}
    for num_leaves, kinds, repeats in cases:
        runs = {kind: [] for kind in kinds}
        for turn in range(repeats):
            for kind in np.roll(kinds, turn):
                runs[str(kind)].append(fresh(__file__, kind, num_leaves))
        for kind in kinds:
            figures = {
                name: float(np.median([run[name] for run in runs[kind]]))
                for name in ("wall", "lower", "cpu")
            }
            walls[kind, num_leaves] = figures["wall"]
            ratio = None
            if "optax" in kinds and kind != "optax":
                pairs = zip(runs[kind], runs["optax"], strict=True)
                low, median, high = np.quantile(
                    [ours["wall"] / theirs["wall"] for ours, theirs in pairs], [0.25, 0.5, 0.75]
                )
                ratio = {"median": median, "lower": low, "upper": high, "turns": repeats}
            results.append(
                {"leaves": num_leaves, "kind": kind, **figures, "ratio": ratio, "runs": runs[kind]}
            )
            told = spread(ratio) if ratio else ""
            rows.append(
                [f"{kind}, {num_leaves}", *(f"{v:.2f}" for v in figures.values()), repeats, told]
            )
    print("Lowering and compiling jit(grad), fresh processes; medians, seconds")
    head = ["x of how many leaves", "wall", "of it lowering", "cpu", "runs"]
    print(table([*head, "perturbax / optax"], rows))
    verdicts = {}
    default = [r for r in results if r["kind"] == "perturbax"]
    one = [r["ratio"]["median"] for r in default if r["leaves"] == 1 and r["ratio"]]
    if one:
        verdicts[f"within {MOST_RATIO} times at one leaf"] = one[0] <= MOST_RATIO
    if ("perturbax", 200) in walls:
        verdicts[f"under {MOST_SECONDS:g} s at 200"] = walls["perturbax", 200] < MOST_SECONDS
    if all(("perturbax", n) in walls for n in (1, 20, 200)):
        first, second, third = (walls["perturbax", n] for n in (1, 20, 200))
        slopes = (second - first) / 19, (third - second) / 180
        print(f"a further leaf: {1e3 * slopes[0]:.1f} ms up to 20, {1e3 * slopes[1]:.1f} ms after")
        verdicts["no faster than linear"] = slopes[1] <= 1.2 * slopes[0]
    for claim, met in verdicts.items():
        print(f"{claim}: {'yes' if met else 'short'}")
    write("compile_time", "key 0", {"cases": results, "met": verdicts})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
