"""Claim: where a fit has nothing to gain, the default is about as precise as leave-one-out.

Functions that are little like a polynomial, at the fewest samples for which the default fits one,
and noise with heavy tails: the variance of independent samples against the mean of the others
(`sampler=Independent(), degree=0`) over that of the default, for the gradient, the derivative in
sigma and, in few dimensions, the Hessian. At x = 0, sigma = 1. Ratios are accurate to a tenth.
Products of an odd number of signs from few samples are included as known exceptions: nets line up
with them. Latin hypercubes, which cannot lose more than a fraction of one over the group size, are
included for the gradient.

    python benchmarks/worst_cases.py [--keys KEYS]
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


def three_signs(y):
    return jnp.sign(y[1]) * jnp.sign(y[3]) * jnp.sign(y[5])


def four_signs(y):
    return three_signs(y) * jnp.sign(y[8])


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
    (parity, 7, 41, NORMAL),
    (parity, 7, 100, NORMAL),
    (three_signs, 10, 100, NORMAL),
    (three_signs, 10, 1_000, NORMAL),
    (four_signs, 10, 100, NORMAL),
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


def main(num_keys=400):
    keys = jax.random.split(jax.random.key(5), num_keys)
    rows, results = [], []
    for fun, dim, num_samples, noise in CASES:
        alone = variances(fun, dim, num_samples, noise, keys, sampler=px.Independent(), degree=0)
        default = variances(fun, dim, num_samples, noise, keys)
        hypercube = variances(fun, dim, num_samples, noise, keys, sampler=Latin())[0]
        ratios = [a / b for a, b in zip(alone, default, strict=True)]
        case = f"{fun.__name__} ({dim}), {noise!r}"
        rows.append([case, f"{num_samples:,}", *(f"{r:.3g}" for r in ratios)])
        rows[-1] += [""] * (5 - len(rows[-1])) + [f"{alone[0] / hypercube:.3g}"]
        results.append(
            {
                "case": case,
                "num_samples": num_samples,
                "ratios": ratios,
                "hypercubes": alone[0] / hypercube,
            }
        )
    print("Variance of leave-one-out over that of the default")
    head = ["case", "samples", "gradient", "d/dsigma", "Hessian", "gradient, hypercubes"]
    print(table(head, rows))
    write("worst_cases", f"{num_keys} keys split from 5", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=400)
    main(parser.parse_args().keys)
