"""Claim: nets cost no more for each number than the noise of `jax.random` does.

Drawing Gumbel noise, jitted, and nothing else: orthogonal directions with their opposites,
orthogonal arrays, Sobol nets, pairs of opposite samples, independent samples by the same generator,
and `jax.random.gumbel`, which `optax.perturbations` uses. Where few numbers are drawn, the overhead
of the call dominates.

    python benchmarks/drawing.py
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate, keys, spread, table, write

import perturbax as px
from perturbax.sampling import _random_bits
from perturbax.sampling._draw_groups import draw

MOST = 200
CASES = [
    (100, 10),
    (1_000, 3),
    (1_000, 10),
    (1_000, 100),
    (84, 42),
    (288, 144),
    (1_000, 250),
    (20_000, 3),
    (20_001, 10),
    (20_000, 100),
    (4_000, 1_000),
]
SAMPLERS = {
    "independent": px.Independent(),
    "pairs": px.Antithetic(),
    "Sobol": px.Sobol(),
    "arrays": px.OrthogonalArray(),
    "directions": px.Orthogonal(antithetic=True),
}


def drawing(sampler, num_samples, dim, key):
    size = sampler.group_size(num_samples, dim)
    groups = -(-num_samples // size)
    dtype = np.dtype(np.float32)
    return draw(
        px.Gumbel(), sampler, _random_bits.root(key), jnp.uint32(0), groups, size, dim, dtype
    )


def measure(num_samples, dim, seconds):
    functions = {
        name: jax.jit(partial(drawing, sampler, num_samples, dim))
        for name, sampler in SAMPLERS.items()
    }
    functions["jax.random"] = jax.jit(partial(jax.random.gumbel, shape=(num_samples, dim)))
    turns = keys(MOST)
    calls = {n: lambda turn, f=f: f(turns[turn]) for n, f in functions.items()}
    return alternate(calls, seconds, most=MOST)


def main(cases=CASES, seconds=3.0):
    rows, results = [], []
    for num_samples, dim in cases:
        timing = measure(num_samples, dim, seconds)
        each = {
            name: 1e6 * timing.milliseconds(name) / (num_samples * dim) for name in timing.names
        }
        ratios = {name: timing.ratio(name, "independent") for name in ("arrays", "directions")}
        case = f"{num_samples:,} x {dim:,}"
        rows.append([case, *(f"{v:.3g}" for v in each.values()), *map(spread, ratios.values())])
        results.append({"case": case, "nanoseconds": each, "over_independent": ratios})
    print("Drawing Gumbel noise: nanoseconds for each number")
    heads = (f"{name} / independent" for name in ("arrays", "directions"))
    print(table(["N x D", *SAMPLERS, "jax.random", *heads], rows))
    write("drawing", f"keys 0 to {MOST - 1}, one a turn", results)


if __name__ == "__main__":
    main()
