"""Question: how many evaluations does a minimum take of a function that draws random numbers?

Functions of a key and a point: batches of data, a random target, noise that all samples of a step
have in common or not. Each search evaluates the samples of a step, or a generation, with one key.
Counted are evaluations until the function at the search's centre, averaged over 400 keys, has
fallen to a given share of what it was at the start; the median over ten seeds, or how many of the
runs got there. px.minimize is as it is by default and with Adam at a rate of 0.05, cma has its
defaults and a first sigma of 1.

    python benchmarks/random_functions.py [--seeds SEEDS] [--only NAME ...]
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from carried import batched_error, trail
from timing import ROOT, table, write

MOST, KEYS = 2_500, 400


class Random(NamedTuple):
    """A function of a key and a vector, how long that is, and the share to get to."""

    name: str
    fun: Callable
    dim: int
    share: float


def sphere(x):
    return jnp.sum((x - 1) ** 2)


def stairs(x):
    return jnp.sum(jnp.round(4 * (x - 1)) ** 2)


def ellipsoid(x):
    return jnp.sum(10.0 ** (3 * jnp.arange(x.size) / x.size) * (x - 1) ** 2)


def on_its_own(key, x):
    """Noise that has nothing in common with that at any other point."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return sphere(x) + 2 * jax.random.normal(jax.random.fold_in(key, jnp.sum(bits)))


def functions():
    def target(key, x, spread):
        return x - spread * jax.random.normal(key, x.shape)

    return [
        Random("errors, batches of 50", lambda k, x: batched_error(x, k), 42, 0.4),
        Random("sphere, and a number", lambda k, x: sphere(x) + 10 * jax.random.normal(k), 20, 0.1),
        Random("sphere, random target", lambda k, x: sphere(target(k, x, 0.5)), 20, 0.3),
        Random("stairs, random target", lambda k, x: stairs(target(k, x, 0.3)), 20, 0.35),
        Random(
            "ellipsoid, random height",
            lambda k, x: ellipsoid(x) * (1 + 0.3 * jax.random.normal(k)),
            20,
            0.02,
        ),
        Random("sphere, noise of its own", on_its_own, 20, 0.15),
        Random("sphere, no noise", lambda _, x: sphere(x), 20, 0.01),
        Random("stairs, no noise", lambda _, x: stairs(x), 20, 0.05),
    ]


def trail_of_minimize(problem, key, **options):
    return trail(problem.fun, jnp.zeros(problem.dim), key, MOST, takes_key=True, **options)


def trail_of_cma(problem, key):
    import cma

    seed = int(jax.random.key_data(key)[-1]) % 2**31 + 1
    search = cma.CMAEvolutionStrategy(np.zeros(problem.dim), 1.0, {"seed": seed, "verbose": -9})
    values = jax.jit(jax.vmap(problem.fun, (None, 0)))
    points, known, step = [np.zeros(problem.dim)], [0], 0
    while search.countevals < MOST:
        asked = search.ask()
        step += 1
        found = values(jax.random.fold_in(key, step), jnp.asarray(np.array(asked), jnp.float32))
        search.tell(asked, np.asarray(found, np.float64).tolist())
        points.append(search.mean.copy())
        known.append(search.countevals)
    return points, known


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", nargs="+", help="parts of names of functions")
    arguments = parser.parse_args()
    searches = {
        "px.minimize": trail_of_minimize,
        "with Adam": lambda p, k: trail_of_minimize(p, k, optimizer=optax.adam(0.05)),
        "cma": trail_of_cma,
    }
    rows, found = [], {}
    judges = jax.random.split(jax.random.key(99), KEYS)
    for problem in functions():
        if arguments.only and not any(part in problem.name for part in arguments.only):
            continue

        def average(x, fun=problem.fun):
            return jnp.mean(jax.vmap(lambda k: fun(k, x))(judges))

        averages = jax.jit(lambda xs, f=average: jax.lax.map(f, xs))
        target = problem.share * float(average(jnp.zeros(problem.dim)))
        row = [problem.name, str(problem.dim), f"{problem.share:g}"]
        found[problem.name] = {}
        for name, search in searches.items():
            counts = []
            for key in jax.random.split(jax.random.key(0), arguments.seeds):
                points, known = search(problem, key)
                values = np.asarray(averages(jnp.asarray(np.array(points), jnp.float32)))
                there = np.flatnonzero(values <= target)
                counts.append(float(known[there[0]]) if len(there) else math.inf)
            found[problem.name][name] = counts
            middle, reached = np.median(counts), np.isfinite(counts).sum()
            row.append(f"{middle:.0f}" if np.isfinite(middle) else f"{reached}/{len(counts)}")
        rows.append(row)
        print(*row, flush=True)
    text = table(["function", "coordinates", "share", *searches], rows)
    print(text)
    if not arguments.only:
        (ROOT / "docs" / "_generated" / "random_functions.md").write_text(text + "\n")
    write("random_functions", f"{arguments.seeds} keys split from 0; judged by 99", found)


if __name__ == "__main__":
    main()
