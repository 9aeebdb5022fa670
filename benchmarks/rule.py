"""Question: which sampler and degree have the least variance, by samples for each coordinate?

The thresholds of the default rule (`estimator/_default_rule.py`) come from these tables. For each
problem, noise and number of samples N/D for each coordinate: the variance of the gradient (summed
over coordinates, between keys) with independent samples, each against the mean of the others, over
that of the default and of what else might be taken. Above 1 is better. Then, for each N/D,
geometric means and the least. Keys are common to all; 200 leave an error of about a tenth.

- "pairs": blocks of orthogonal directions with their opposites, of degree 0 and 1;
- "blocks": the same without opposites; "halves": two blocks, each of half of the samples;
- "arrays" and "Sobol": two nets; "opposites": independent pairs, of degree 1;
- "squares": what the default draws, with degree 2, in 7 to 20 coordinates.

Problems: those that the rule was set on (`middling` and some of `suite`), or with --unseen those
that were measured only once it was fixed; --only takes those of any of `suite`, too.

    python benchmarks/rule.py [--unseen] [--default] [--ratios RATIO ...] [--only NAME ...]
        [--noises NOISE ...] [--keys KEYS]
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from problems import middling, suite, unseen
from timing import table, write

import perturbax as px

ALONE: dict[str, Any] = {"sampler": px.Independent(), "degree": 0}
# Most of the time would go into compiling.
QUICK_COMPILATION: Any = {"xla_backend_optimization_level": 0}
SET_ON = ("ranking", "sum of steps", "quantised", "grid path (64)")
# Numbers of noise of all samples of the keys that are taken at a time.
AT_A_TIME = 2**22


def candidates(num_samples, dim):
    """Options of `make_perturbed_fun` by name: all that make sense of so many samples."""
    ratio = num_samples / dim
    pairs = px.Orthogonal(antithetic=True)
    found: dict[str, dict[str, Any]] = {"default": {}}
    if ratio >= 1:
        found["pairs, 0"] = {"sampler": pairs, "degree": 0}
    if ratio > 2:
        found["pairs, 1"] = {"sampler": pairs, "degree": 1}
        found["opposites, 1"] = {"sampler": px.Antithetic(), "degree": 1}
        found["blocks, 1"] = {"sampler": px.Orthogonal(), "degree": 1}
        found["arrays, 0"] = {"sampler": px.OrthogonalArray(), "degree": 0}
    if ratio > 4:
        found["arrays, 1"] = {"sampler": px.OrthogonalArray(), "degree": 1}
        found["Sobol, 1"] = {"sampler": px.Sobol(), "degree": 1}
    if 6 < dim <= 20 and ratio >= 20:
        found["squares"] = {"degree": 2}
    if ratio <= 3:
        found["blocks, 0"] = {"sampler": px.Orthogonal(), "degree": 0}
    if ratio < 2:
        found["halves, 0"] = {"sampler": px.Orthogonal(-(-num_samples // 2)), "degree": 0}
    return found


def variance(problem, noise, num_samples, keys, options):
    """Of the gradient, summed over its coordinates."""
    fun = px.make_perturbed_fun(problem.fun, num_samples, problem.sigma, noise, **options)
    gradient, x = jax.grad(fun, argnums=1), jnp.asarray(problem.x)
    batch = max(AT_A_TIME // (num_samples * problem.x.size), 1)
    mapped = jax.jit(lambda ks: jax.lax.map(lambda k: gradient(k, x), ks, batch_size=batch))
    run = mapped.lower(keys).compile(compiler_options=QUICK_COMPILATION)
    return float(np.var(np.asarray(run(keys), np.float64), axis=0, ddof=1).sum())


def geometric_mean(ratios):
    return float(np.exp(np.mean(np.log(ratios))))


def main(unseen_ones=False, default=False, ratios=(2.0, 4.0), only=(), noises=(), num_keys=200):
    first = [p for p in suite() if only or p.name.startswith(SET_ON)]
    problems = unseen() if unseen_ones else first + middling()
    problems = [p for p in problems if not only or any(part in p.name for part in only)]
    chosen = [v for v in (px.Normal(), px.Gumbel()) if not noises or type(v).__name__ in noises]
    keys = jax.random.split(jax.random.key(3), num_keys)
    cells = []
    for ratio in ratios:
        for problem in problems:
            num_samples = max(round(ratio * problem.x.size), 1)
            options = candidates(num_samples, problem.x.size)
            for noise in chosen:
                alone = variance(problem, noise, num_samples, keys, ALONE)
                found = {
                    name: alone / variance(problem, noise, num_samples, keys, option)
                    for name, option in options.items()
                    if not default or name == "default"
                }
                cells.append(
                    {
                        "problem": problem.name,
                        "noise": type(noise).__name__,
                        "ratio": ratio,
                        "num_samples": num_samples,
                        "found": found,
                    }
                )
                told = ", ".join(f"{name}: {v:.2f}" for name, v in found.items())
                print(f"{problem.name}, {noise}, N/D = {ratio:g}: {told}", flush=True)
    print("\nVariance of leave-one-out over that of each; geometric mean, least\n")
    names = list(dict.fromkeys(name for cell in cells for name in cell["found"]))
    rows = []
    for noise in chosen:
        for ratio in ratios:
            of = [c for c in cells if (c["noise"], c["ratio"]) == (type(noise).__name__, ratio)]
            row = [type(noise).__name__, f"{ratio:g}"]
            for name in names:
                values = [c["found"][name] for c in of if name in c["found"]]
                row.append(f"{geometric_mean(values):.2f}, {min(values):.2f}" if values else "")
            rows.append(row)
    print(table(["noise", "N/D", *names], rows))
    for name in names if len(cells) > 1 else ():
        values = [c["found"][name] for c in cells if name in c["found"]]
        print(f"{name}: geometric mean {geometric_mean(values):.2f}, least {min(values):.2f}")
    write("rule", f"{num_keys} keys split from 3", cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--unseen", action="store_true", dest="unseen_ones")
    parser.add_argument("--default", action="store_true", help="nothing but the default")
    parser.add_argument(
        "--ratios", nargs="+", type=float, default=(0.5, 1, 1.5, 2, 3, 4, 8, 12, 16)
    )
    parser.add_argument("--only", nargs="+", default=(), help="parts of names of problems")
    parser.add_argument("--noises", nargs="+", default=(), choices=("Normal", "Gumbel"))
    parser.add_argument("--keys", type=int, default=200, dest="num_keys")
    main(**vars(parser.parse_args()))
