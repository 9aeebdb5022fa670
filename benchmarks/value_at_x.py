"""Claim: beside as many as sqrt(N) other values, the value at x is not worth its evaluation.

A baseline of degree 0 is the mean of the values of other groups, and may take the function's value
at x for one more. For independent samples, and for one block of orthogonal directions and a few
more: the variance of the gradient without the value at x over that with it, times N / (N + 1), the
evaluations that it takes; above 1 it is worth more than it costs. Geometric mean, least and
largest over the problems of at most 48 coordinates of `problems.py`, Normal noise.

    python benchmarks/value_at_x.py [--keys KEYS]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from problems import held_back, suite
from timing import table, write

import perturbax as px
from perturbax.execution._plan import Plan


def variance(problem, num_samples, sampler, taken, keys):
    """Of the gradient, summed over its coordinates, with the value at x or without."""
    rule = Plan.evaluates_at_x
    Plan.evaluates_at_x = property(lambda plan: plan.degree == 0 and taken)
    try:
        jax.clear_caches()  # programs are known by their plan, not by this rule
        g = px.make_perturbed_fun(
            problem.fun, num_samples, problem.sigma, px.Normal(), sampler=sampler, degree=0
        )
        gradient, x = jax.grad(g, argnums=1), jnp.asarray(problem.x)
        run = jax.jit(lambda keys: jax.lax.map(lambda key: gradient(key, x), keys, batch_size=64))
        return float(np.var(np.asarray(run(keys), np.float64), axis=0).sum())
    finally:
        Plan.evaluates_at_x = rule


def main(num_keys):
    problems = [p for p in (*suite(), *held_back()) if p.x.size <= 48]
    keys = jax.random.split(jax.random.key(8), num_keys)
    kinds = [(px.Independent(), 0, n) for n in (2, 3, 4, 6, 8, 16, 32)]
    kinds += [(px.Orthogonal(), 1, n) for n in (1, 2, 3, 4, 6, 10)]
    rows, cells = [], []
    for sampler, blocks, more in kinds:
        gains = []
        for problem in problems:
            dim = problem.x.size
            if blocks and dim < 8:
                continue
            num_samples = blocks * dim + more
            with_it, without = (
                variance(problem, num_samples, sampler, taken, keys) for taken in (True, False)
            )
            gains.append(without / with_it * num_samples / (num_samples + 1))
            cells.append([problem.name, str(sampler), num_samples, gains[-1]])
        mean = np.exp(np.mean(np.log(gains)))
        number = f"D + {more}" if blocks else f"{more}"
        rows.append([str(sampler), number, f"{mean:.2f}", f"{min(gains):.2f}", f"{max(gains):.2f}"])
        print(rows[-1], flush=True)
    print("\n" + table(["samples", "N", "geometric mean", "least", "largest"], rows))
    write("value_at_x", f"{num_keys} keys split from 8", cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=2_000, dest="num_keys")
    main(**vars(parser.parse_args()))
