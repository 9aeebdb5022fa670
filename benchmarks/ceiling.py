"""Question: how much variance could surrogates take away at most, were they fitted without error?

A gradient of opposites, f(x + sigma z) and f(x - sigma z), sees the odd part of f alone. For each
problem, under Normal noise: the variance of the gradient (summed over coordinates) with independent
samples, each against the mean of the others, over that with as many samples in pairs of opposites,
of whose odd part the best function is subtracted that is linear, or linear with a cube of each
coordinate (He_3). The best is found by least squares on half of many points, and what it leaves is
measured on the other half. That is the most to be had of such a surrogate with independent pairs;
beside it what the default has, which must fit with what two or four samples for each coordinate
tell, but draws its pairs in orthogonal directions.

    python benchmarks/ceiling.py [--points POINTS] [--keys KEYS]
"""

import argparse

import jax
import numpy as np
from problems import middling, unseen
from rule import ALONE, geometric_mean, variance
from timing import table, write

import perturbax as px

RATIOS = (2, 4)


def left_by(features, odd, weight):
    """The mean of weight**2 (odd - best)**2 on the second half, for the best on the first."""
    half = len(odd) // 2
    told = [(weight[:, None] * features)[:half], (weight * odd)[:half]]
    best = np.linalg.lstsq(*told, rcond=None)[0]
    return np.mean((weight * (odd - features @ best))[half:] ** 2)


def ceilings(problem, points):
    """Of linear functions, and of those with cubes."""
    z = jax.random.normal(jax.random.key(0), (points, problem.x.size))

    @jax.jit
    def values(z):
        return jax.lax.map(lambda z: problem.fun(problem.x + problem.sigma * z), z, batch_size=1000)

    ahead, behind = (np.asarray(values(s * z), np.float64) for s in (1, -1))
    z = np.asarray(z, np.float64)
    odd, even = (ahead - behind) / 2, (ahead + behind) / 2
    weight = np.linalg.norm(z, axis=1)
    slope = np.mean(odd[:, None] * z, axis=0)
    alone = np.mean(weight**2 * (odd**2 + (even - even.mean()) ** 2)) - slope @ slope
    kinds = z, np.concatenate([z, z**3 - 3 * z], axis=1)
    return [alone / (2 * left_by(features, odd, weight)) for features in kinds]


def main(points, num_keys):
    cells, rows = [], []
    keys = jax.random.split(jax.random.key(3), num_keys)
    for problem in [*unseen(), *middling()]:
        found = ceilings(problem, points)
        for ratio in RATIOS:
            of = problem, px.Normal(), ratio * problem.x.size, keys
            found.append(variance(*of, ALONE) / variance(*of, {}))
        cells.append({"problem": problem.name, "found": found})
        rows.append([problem.name, *(f"{v:.2f}" for v in found)])
        print(*rows[-1], flush=True)
    for name, of in ("unseen", cells[: len(unseen())]), ("set on", cells[len(unseen()) :]):
        means = np.array([cell["found"] for cell in of]).T
        rows.append([f"geometric mean, {name}", *(f"{geometric_mean(v):.2f}" for v in means)])
    print("\nVariance of leave-one-out over that of each, Normal noise\n")
    at = [f"default, N/D = {ratio}" for ratio in RATIOS]
    print(table(["problem", "linear, without error", "and cubes", *at], rows))
    write("ceiling", f"points of key 0; {num_keys} keys split from 3", cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=60_000)
    parser.add_argument("--keys", type=int, default=200, dest="num_keys")
    main(**vars(parser.parse_args()))
