"""Claim: the standard errors of `px.estimate` are right.

How often the 95 % intervals of the value and of each coordinate of the gradient contain the exact
number, over 2,000 keys: for problems with closed forms, two noises, few and many samples, the
default sampler and independent samples.

    python benchmarks/coverage.py [--keys KEYS]

Writes docs/_generated/coverage.md too, with all 2,000 keys.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import ROOT, table, write

import perturbax as px

SIGMA = 0.3
KEYS = 2_000
SAMPLERS = {
    "default": {},
    "independent": {"sampler": px.Independent(), "degree": 0},
}


def relu(x):
    return jnp.sum(jnp.maximum(x, 0.0))


def steps(x):
    return jnp.sum(jnp.where(x > 0, 1.0, 0.0))


def square(x):
    return jnp.sum(x) ** 2


def corner(x):
    return jnp.where(jnp.all(x > 0), 1.0, 0.0)


def smoothed(noise, order):
    """E max(x + sigma z, 0), by quadrature, and its derivatives, element by element."""
    ends = np.linspace(0, 1, 400_002)[1:-1]
    z = np.asarray(jax.jit(noise.icdf)(jnp.asarray(ends, jnp.float32)), np.float64)

    def at(x):
        if order == 0:
            return np.maximum(x + SIGMA * z, 0).mean()
        if order == 1:
            return 1 - float(noise.cdf(-x / SIGMA))
        return float(jax.grad(noise.cdf)(-x / SIGMA)) / SIGMA

    return np.vectorize(at, otypes=[float])


def exact(name, noise, x):
    """Value and gradient."""
    value, tail, density = (smoothed(noise, k)(x) for k in range(3))
    if name == "relu":
        return value.sum(), tail
    if name == "steps":
        return tail.sum(), density
    if name == "corner":
        return tail.prod(), density * tail.prod() / tail
    centre = np.sum(x + SIGMA * noise.mean)
    return centre**2 + len(x) * SIGMA**2 * noise.variance, np.full(len(x), 2 * centre)


PROBLEMS = [
    ("ReLU sum (3)", relu, np.float32([-0.1, 0.05, 0.1])),
    ("ReLU sum (50)", relu, np.linspace(-1, 1, 50, dtype=np.float32)),
    ("steps (5)", steps, np.linspace(-0.5, 0.4, 5, dtype=np.float32)),
    ("steps (50)", steps, np.linspace(-1, 1, 50, dtype=np.float32)),
    ("steps (300)", steps, np.linspace(-1, 1, 300, dtype=np.float32)),
    ("corner (2)", corner, np.float32([0.2, -0.1])),
    ("squared sum (2)", square, np.float32([0.5, -0.2])),
    ("squared sum (12)", square, np.linspace(-0.5, 0.5, 12, dtype=np.float32)),
]


def coverage(fun, x, noise, num_samples, options, num_keys, truth):
    """Shares of intervals that contain the truth: of the value, and of each coordinate."""
    smooth = px.make_perturbed_fun(fun, num_samples, SIGMA, noise, **options)

    @jax.jit
    def intervals(keys):
        return jax.lax.map(lambda key: px.estimate(smooth, key, x).interval(), keys, batch_size=20)

    found = jax.tree.map(np.asarray, intervals(jax.random.split(jax.random.key(0), num_keys)))
    return [
        np.mean((low <= t) & (t <= high), axis=0)
        for (low, high), t in zip(found, truth, strict=True)
    ]


def main(num_keys=KEYS, problems=PROBLEMS, counts=(100, 1_000)):
    results, rows = [], []
    for name, fun, x in problems:
        for noise in (px.Normal(), px.Gumbel()):
            truth = exact(fun.__name__, noise, np.asarray(x, np.float64))
            for num_samples in counts:
                row = [name, type(noise).__name__, f"{num_samples:,}"]
                for sampler, options in SAMPLERS.items():
                    value, gradient = coverage(
                        fun, jnp.asarray(x), noise, num_samples, options, num_keys, truth
                    )
                    row += [f"{100 * value:.1f}", f"{100 * gradient.mean():.1f}"]
                    results.append(
                        {
                            "problem": name,
                            "noise": row[1],
                            "num_samples": num_samples,
                            "sampler": sampler,
                            "value": value,
                            "gradient": gradient.tolist(),
                        }
                    )
                rows.append(row)
        print(f"{name}: done", flush=True)
    head = ["problem", "noise", "samples", "value", "gradient", "independent: value", "gradient"]
    text = table(head, rows)
    print(f"\nCoverage of 95 % intervals in percent, {num_keys:,} keys\n\n{text}")
    if num_keys == KEYS:
        path = ROOT / "docs" / "_generated" / "coverage.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    write("coverage", f"{num_keys} keys split from 0", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=KEYS)
    main(parser.parse_args().keys)
