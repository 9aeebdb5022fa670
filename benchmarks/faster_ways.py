"""Claim: each way beside the formula is worth at least 1.2 times, in time or memory, to some user.

The value and gradient of a sum of ReLUs by the way that is taken, and by the formula as JAX
differentiates it, which a function that returns aux gets: the same numbers but for rounding. One
pass for degree 0, sums of groups for polynomials, and the same under vmap, where inputs are gone
through in parts that fit into the cache. Memory is what XLA plans beside arguments and results.

    python benchmarks/faster_ways.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate, keys, spread, table, write

import perturbax as px

SIGMA = 0.5
MOST = 60
WORTH = 1.2


def relu_sum(x):
    return jnp.sum(jnp.maximum(x, 0.0))


# Way, coordinates, samples, inputs, options. The last of each is one where it is worth little.
CASES = [
    ("one pass, degree 0", 10_000, 1_000, 1, {}),
    ("one pass, degree 0", 1_000, 1_000, 1, {}),
    ("one pass, degree 0", 3, 1_000, 1, {"degree": 0}),
    ("sums of groups", 100, 1_000, 32, {}),
    ("sums of groups", 100, 1_000, 1, {}),
    ("sums of groups", 20, 10_000, 1, {}),
    ("sums of groups", 3, 1_000, 1, {}),
]


def programs(x, num_samples, batch, options, key):
    def taken(key, x):
        g = px.make_perturbed_fun(relu_sum, num_samples, SIGMA, **options)
        return jax.value_and_grad(g, argnums=1)(key, x)

    def by_formula(key, x):
        def with_aux(x):
            return relu_sum(x), jnp.zeros(())

        g = px.make_perturbed_fun(with_aux, num_samples, SIGMA, has_aux=True, **options)
        (value, _), gradient = jax.value_and_grad(g, argnums=1, has_aux=True)(key, x)
        return value, gradient

    def compiled(one):
        return jax.jit(one if batch == 1 else jax.vmap(one)).lower(key, x).compile()

    return {"taken": compiled(taken), "formula": compiled(by_formula)}


def measure(dim, num_samples, batch, options, seconds):
    draw = np.random.RandomState(0)
    x = jnp.asarray(draw.normal(size=(batch, dim) if batch > 1 else (dim,)), jnp.float32)
    turns = keys(MOST)
    if batch > 1:
        turns = jax.block_until_ready([jax.random.split(key, batch) for key in turns])
    made = programs(x, num_samples, batch, options, turns[0])
    results = {name: program(turns[0], x) for name, program in made.items()}
    off = [
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(results["taken"], results["formula"], strict=True)
    ]
    calls = {n: lambda turn, p=p: p(turns[turn], x) for n, p in made.items()}
    mib = {n: p.memory_analysis().temp_size_in_bytes / 2**20 for n, p in made.items()}
    return alternate(calls, seconds, most=MOST), mib, max(off)


def main(cases=CASES, seconds=3.0):
    results, rows, best = [], [], {}
    for way, dim, num_samples, batch, options in cases:
        timing, mib, off = measure(dim, num_samples, batch, options, seconds)
        ratio = timing.ratio("formula", "taken")
        less = mib["formula"] / max(mib["taken"], 1e-3)
        best[way] = max(best.get(way, 0.0), ratio["median"], less if mib["formula"] > 10 else 0.0)
        results.append(
            {
                "way": way,
                "dim": dim,
                "num_samples": num_samples,
                "inputs": batch,
                "milliseconds": {n: timing.milliseconds(n) for n in timing.names},
                "times_as_fast": ratio,
                "planned_mib": mib,
                "largest_relative_difference": off,
            }
        )
        rows.append(
            [
                f"{way}, {num_samples:,} x {dim:,}" + (f", {batch} inputs" if batch > 1 else ""),
                *(f"{timing.milliseconds(n):.3g}" for n in timing.names),
                spread(ratio),
                *(f"{mib[n]:.1f}" for n in timing.names),
                f"{off:.0e}",
            ]
        )
    print("Value and gradient, by the way taken and by the formula differentiated; ms and MiB")
    head = ["way, samples x coordinates", "taken", "formula", "formula / taken"]
    print(table([*head, "MiB taken", "MiB formula", "differ by"], rows))
    for way, worth in best.items():
        met = "yes" if worth >= WORTH else "short"
        print(f"{way}: worth {worth:.1f} times at best; at least {WORTH}: {met}")
    write("faster_ways", f"keys 0 to {MOST - 1}, one a turn", results)


if __name__ == "__main__":
    main()
