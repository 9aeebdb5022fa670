"""Claim: where there is nothing to gain, the default is about as precise as leave-one-out.

Functions that are little like a polynomial, at the fewest samples for which the default fits one,
and noise with heavy tails: the variance of independent samples against the mean of the others
(`sampler=Independent(), degree=0`) over that of the default, for the gradient, the derivative in
sigma and, in few dimensions, the Hessian. At x = 0, sigma = 1. Ratios are accurate to a tenth.

Then products of the signs of some coordinates, which may be in line with a net: ratios for 2 to 7
signs, with the mean variance over 30 choices of coordinates, and the ratio of the choice that comes
out worst, measured anew with 20 times as many other keys. (Where 400 keys have no large error, the
next may have one: see docs/theory.md.)

Then fewer samples than coordinates, of which a linear surrogate of each is fitted on all others.

    python benchmarks/worst_cases.py [--keys KEYS] [--few]

With --few this last part alone.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from published_cells import Latin
from timing import table, write

import perturbax as px


def ball(y):
    return (jnp.sum(y**2) > y.size).astype(jnp.float32)


def wave(y):
    return jnp.sin(37 * jnp.sum(jnp.arange(1, y.size + 1) * y))


def steps(y):
    return jnp.sum((y > 0).astype(jnp.float32))


def parity(y):
    return jnp.prod(jnp.sign(y))


def largest(y):
    return jnp.max(y)


def pole(y):
    return 1 / (jnp.abs(y[0]) + 1e-3)


def spike(y):
    return jnp.where(jnp.all(y == 0), 1e6, steps(y))


NORMAL, GUMBEL = px.Normal(), px.Gumbel()
# Function, dimension, samples, noise.
CASES = [
    (ball, 20, 126, NORMAL),
    (ball, 50, 306, NORMAL),
    (ball, 100, 606, NORMAL),
    (wave, 20, 126, NORMAL),
    (wave, 3, 200, GUMBEL),
    (wave, 1, 60, GUMBEL),
    (parity, 6, 560, GUMBEL),
    (parity, 7, 100, NORMAL),
    (largest, 10, 100, NORMAL),
    (steps, 20, 126, NORMAL),
    (steps, 3, 200, GUMBEL),
    (largest, 20, 126, GUMBEL),
    (pole, 3, 200, GUMBEL),
    (spike, 3, 200, NORMAL),
    (steps, 3, 200, px.StudentT(2.1)),
    (steps, 3, 200, px.StudentT(3)),
    (steps, 3, 1_000, px.StudentT(4)),
]


ALONE = {"sampler": px.Independent(), "degree": 0}
# Products of so many signs, of so many choices of coordinates.
NUMBERS, CHOICES = range(2, 8), 30
# Coordinates and samples.
SIGNS = [
    (3, 27),
    (4, 100),
    (4, 200),
    (5, 512),
    (6, 1_000),
    (7, 41),
    (10, 100),
    (10, 1_000),
    (10, 4_096),
]
SIGNS += [(20, 126), (50, 1_000)]
# And the fewest samples for which the default takes Sobol nets.
SIGNS += [(3, 47), (4, 191), (5, 191)]
SAMPLERS = {
    "default": {},
    "Sobol nets": {"sampler": px.Sobol()},
    "Latin hypercubes": {"sampler": Latin()},
}


# Functions of which few samples tell no slope, or one by a single value.
FEW_FUNCTIONS = {
    "2 signs": lambda y: jnp.sign(y[0]) * jnp.sign(y[1]),
    "all signs": parity,
    "wave": wave,
    "tail of 1/100": lambda y: (y[0] > 2.33).astype(jnp.float32),
}
# Samples and coordinates.
FEW = [(8, 12), (8, 16), (12, 18), (12, 24), (30, 40), (60, 80)]


def variances(fun, dim, num_samples, noise, keys, **options):
    """Of the gradient, the derivative in sigma and, in few dimensions, the Hessian."""

    def value(key, p):
        return px.make_perturbed_fun(fun, num_samples, p[-1], noise, **options)(key, p[:-1])

    def estimates(key):
        p = jnp.zeros(dim + 1).at[-1].set(1.0)
        gradient = jax.grad(value, argnums=1)(key, p)
        parts = [gradient[:-1], gradient[-1:]]
        if dim <= 6:
            parts.append(jax.hessian(value, argnums=1)(key, p)[:-1, :-1].ravel())
        return parts

    found = jax.jit(lambda keys: jax.lax.map(estimates, keys, batch_size=50))(keys)
    return [float(np.var(np.asarray(v, np.float64), axis=0, ddof=1).sum()) for v in found]


def sign_products(chosen, num_samples, keys, **options):
    """Variances of the gradient of products of the chosen signs, masks of shape (..., dim)."""
    dim = chosen.shape[-1]

    def products(y):
        return jnp.prod(jnp.where(chosen, jnp.sign(y), 1.0), axis=-1)

    fun = px.make_perturbed_fun(products, num_samples, 1.0, NORMAL, **options)
    jacobian = jax.jacrev(fun, argnums=1)
    found = jax.jit(lambda ks: jax.lax.map(lambda k: jacobian(k, jnp.zeros(dim)), ks, batch_size=8))
    return np.var(np.asarray(found(keys), np.float64), axis=0, ddof=1).sum(axis=-1)


def choices(dim):
    """Masks (numbers of signs, CHOICES, dim)."""
    numbers = [n for n in NUMBERS if n <= dim]
    choose = np.random.RandomState(0).choice
    chosen = np.zeros((len(numbers), CHOICES, dim), bool)
    for row, number in zip(chosen, numbers, strict=True):
        for choice in row:
            choice[choose(dim, number, replace=False)] = True
    return chosen


def ratios_of_signs(dim, num_samples, keys, more, options):
    """For each number of signs, and for the choice that is worst."""
    chosen = choices(dim)
    variance = [sign_products(chosen, num_samples, keys, **o) for o in (ALONE, options)]
    means = np.mean(variance[0], axis=1) / np.mean(variance[1], axis=1)
    ratios = variance[0] / variance[1]
    worst = chosen[np.unravel_index(np.argmin(ratios), ratios.shape)]
    again = [sign_products(worst[None], num_samples, more, **o) for o in (ALONE, options)]
    return means, float(again[0][0] / again[1][0])


def of_few_samples(keys):
    """Rows of ratios for FEW_FUNCTIONS."""
    rows = []
    for noise in (NORMAL, GUMBEL):
        for num_samples, dim in FEW:

            def outputs(y, noise=noise):
                return jnp.stack([fun(y - noise.mean) for fun in FEW_FUNCTIONS.values()])

            def spread(options, dim=dim, num_samples=num_samples, noise=noise, fun=outputs):
                fun = px.make_perturbed_fun(fun, num_samples, 1.0, noise, **options)
                of = jax.jit(
                    lambda keys: jax.lax.map(
                        lambda key: jax.jacrev(fun, argnums=1)(key, jnp.zeros(dim)),
                        keys,
                        batch_size=50,
                    )
                )
                return np.var(np.asarray(of(keys), np.float64), axis=0, ddof=1).sum(axis=-1)

            ratios = spread(ALONE) / spread({})
            rows.append([f"{num_samples} of {dim}", repr(noise), *(f"{r:.2f}" for r in ratios)])
            print(rows[-1], flush=True)
    return rows


def main(num_keys=400, few=False):
    keys = jax.random.split(jax.random.key(5), num_keys)
    more = jax.random.split(jax.random.key(6), 20 * num_keys)
    of_few = of_few_samples(more)
    print("Variance of leave-one-out over that of the default, fewer samples than coordinates")
    print(table(["samples", "noise", *FEW_FUNCTIONS], of_few))
    rows, results = [], [{"few": of_few}]
    if few:
        return write("worst_cases_few", f"{len(more):,} keys split from 6", results)
    for fun, dim, num_samples, noise in CASES:
        some = more if fun is pole else keys  # of its few largest values depends everything
        alone = variances(fun, dim, num_samples, noise, some, **ALONE)
        default = variances(fun, dim, num_samples, noise, some)
        ratios = [a / b for a, b in zip(alone, default, strict=True)]
        case = f"{fun.__name__} ({dim}), {noise!r}"
        rows.append([case, f"{num_samples:,}", *(f"{r:.3g}" for r in ratios)])
        rows[-1] += [""] * (5 - len(rows[-1]))
        results.append({"case": case, "num_samples": num_samples, "ratios": ratios})
    print("\nVariance of leave-one-out over that of the default")
    print(table(["case", "samples", "gradient", "d/dsigma", "Hessian"], rows))

    rows = []
    for dim, num_samples in SIGNS:
        for name, options in SAMPLERS.items():
            means, worst = ratios_of_signs(dim, num_samples, keys, more, options)
            row = [f"{dim} coordinates", f"{num_samples:,}", name, *(f"{r:.2f}" for r in means)]
            rows.append([*row, *[""] * (len(NUMBERS) - len(means)), f"{worst:.2f}"])
            results.append({"case": row[:3], "means": list(means), "worst": worst})
    print("\nThe same for gradients of products of signs, by their number")
    print(table(["case", "samples", "sampler", *map(str, NUMBERS), "worst"], rows))
    write("worst_cases", f"{num_keys} keys split from 5, {len(more):,} from 6", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=400)
    parser.add_argument("--few", action="store_true")
    main(*vars(parser.parse_args()).values())
