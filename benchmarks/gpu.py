"""Speed, memory and precision of gradients on an accelerator, in one table.

Rows of speed are those of speed.py, and further ones of up to 1e9 coordinates, of which a chunk is
one sample: the gradient of a sum of ReLUs, by perturbax with independent samples and by
optax.perturbations where XLA plans that it fits into memory. Memory is what XLA plans for the
program beside its arguments and results, and the device's peak where it tells one. Rows of variance
are a few of those of variance.py: 1,000 samples, each library with its defaults.

    python benchmarks/gpu.py [--small] [--seconds SECONDS]

It runs on a CPU too, with --small in a minute. A machine that has JAX and nothing else needs this
folder and the package, which `pip install --no-deps --target build/package .` puts into a folder
to copy; its name belongs into PYTHONPATH there. Without optax its columns stay empty.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from problems import suite
from timing import alternate, keys, table, write

import perturbax as px

try:
    from optax import perturbations as theirs
except ImportError:
    theirs = None

SIGMA = 0.1
MOST = 50
SPEED = [
    (1_000, 100),
    (1_000, 10_000),
    (10_000, 10_000),
    (100, 100_000),
    (1_000, 1_000_000),
    (100, 10_000_000),
    (20, 100_000_000),
    (4, 1_000_000_000),
]
SMALL = [(64, 100), (16, 10_000), (4, 1_000_000)]
# Names of problems, samples.
VARIANCE = (
    ("ranking loss (10)", "grid path (64)", "0/1 error (640)", "ReLU sum (2,000)"),
    1_000,
)
SMALL_VARIANCE = (("ranking loss (10)",), 100)
# Of a device's memory, what a program may plan for.
SHARE = 0.8


def relu_sum(x):
    return jnp.sum(jnp.maximum(x, 0.0))


def memory_of_device():
    """Bytes that the device has, or a guess where it does not tell."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 8 * 2**30)


def peak():
    """Most bytes in use so far, if the device tells."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def planned(compiled):
    """Bytes that XLA plans for, beside arguments and results; and all together."""
    plan = compiled.memory_analysis()
    sizes = (plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes)
    return plan.temp_size_in_bytes, sum(sizes)


def speed(num_samples, dim, seconds):
    """One gradient by both libraries."""
    x = jnp.linspace(-1.0, 2.0, dim, dtype=jnp.float32)
    turns = keys(MOST)
    independent = {"sampler": px.Independent(), "degree": 0}
    smooth = {"perturbax": px.make_perturbed_fun(relu_sum, num_samples, SIGMA, **independent)}
    if theirs:
        smooth["optax"] = theirs.make_perturbed_fun(relu_sum, num_samples, SIGMA)
    calls, plans, left_out = {}, {}, []
    for name, fun in smooth.items():
        compiled = jax.jit(jax.grad(fun, argnums=1)).lower(turns[0], x).compile()
        plans[name], everything = planned(compiled)
        if everything > SHARE * memory_of_device():
            left_out.append(name)
            continue
        calls[name] = lambda turn, run=compiled: run(turns[turn], x)
    found = {"num_samples": num_samples, "dim": dim, "planned": plans, "left_out": left_out}
    if not calls:
        return found
    timing = alternate(calls, seconds, least=3, most=MOST)
    found["milliseconds"] = {name: timing.milliseconds(name) for name in calls}
    if len(calls) == 2:
        found["times_as_fast"] = timing.ratio("optax", "perturbax")
    return found | {"peak": peak()}


def variance(problem, num_samples, seconds):
    """Variances of the gradient by both libraries."""
    x, turns = jnp.asarray(problem.x), keys(200)
    calls = {}
    for name, library in (("perturbax", px), ("optax", theirs)):
        if library is None:
            continue
        noise = library.Gumbel()
        smooth = library.make_perturbed_fun(problem.fun, num_samples, problem.sigma, noise)
        derived = jax.jit(jax.grad(smooth, argnums=1))
        calls[name] = lambda turn, f=derived: f(turns[turn], x)
    timing = alternate(calls, seconds, least=20, most=200, keep=True)
    spreads = {
        name: float(np.sum(np.var(np.asarray(results, np.float64), axis=0, ddof=1)))
        for name, results in timing.results.items()
    }
    found = {
        "problem": problem.name,
        "num_samples": num_samples,
        "milliseconds": {name: timing.milliseconds(name) for name in calls},
        "variance": spreads,
    }
    if theirs:
        found["times_as_fast"] = timing.ratio("optax", "perturbax")
        found["variance_ratio"] = spreads["optax"] / spreads["perturbax"]
    return found


def size(number):
    """Bytes, to be read."""
    if number is None:
        return ""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def main(small=False, seconds=2.0):
    cases, (names, count) = (SMALL, SMALL_VARIANCE) if small else (SPEED, VARIANCE)
    about = {"device": jax.devices()[0].device_kind}
    results = {**about, "speed": [], "variance": []}

    def row(name, dim, found):
        times, plans = found.get("milliseconds", {}), found.get("planned", {})
        ratios = found.get("times_as_fast", {}).get("median"), found.get("variance_ratio")
        return [
            name,
            f"{found['num_samples']:,} x {dim:,}",
            *(f"{times[n]:.3g}" if n in times else "" for n in ("perturbax", "optax")),
            *(f"{ratio:.3g}" if ratio else "" for ratio in ratios),
            *(size(v) for v in (plans.get("perturbax"), found.get("peak"), plans.get("optax"))),
        ]

    rows = []
    for num_samples, dim in cases:
        results["speed"].append(speed(num_samples, dim, seconds))
        rows.append(row("ReLU sum", dim, results["speed"][-1]))
    for problem in suite():
        if problem.name in names:
            results["variance"].append(variance(problem, count, seconds))
            rows.append(row(problem.name, problem.x.size, results["variance"][-1]))
    print(f"Gradients on {results['device']}; ratios are optax.perturbations over perturbax")
    head = ["function", "N x D", "ms", "optax, ms", "time", "variance"]
    print(table([*head, "planned", "peak", "optax, planned"], rows))
    write("gpu_small" if small else "gpu", f"keys 0 to {MOST - 1}, one a turn", results)
    return results


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--small", action="store_true", help="small sizes, for a CPU")
    arguments.add_argument("--seconds", type=float, default=2.0, help="for each row")
    main(**vars(arguments.parse_args()))
