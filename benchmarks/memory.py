"""Claim: the memory for a gradient does not grow with the number of samples.

Peak resident memory of a fresh process that computes the gradient of a sum of ReLUs in 100,000
dimensions, Gumbel noise, with 2,000 and with 20,000 samples. For optax.perturbations, the memory
that XLA plans for the same gradient when it compiles it; it is not run.

    python benchmarks/memory.py
"""

import json
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax.perturbations
from timing import fresh, table, write

import perturbax as px

DIM = 100_000
MOST_MIB = 400


def peak_mib():
    """Peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not what getrusage tells: on Linux a new process starts with the peak of the one that
        # started it, so that a test runner of 700 MiB would be taken for this gradient.
        [line] = [v for v in status.read_text().splitlines() if v.startswith("VmHWM")]
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def relu_sum(x):
    return jnp.sum(jnp.maximum(x, 0.0))


def measure(library, num_samples, dim):
    """What one fresh process finds."""
    x = jnp.asarray(np.linspace(-1.0, 2.0, dim, dtype=np.float32))
    key = jax.block_until_ready(jax.random.key(0))
    before = peak_mib()
    made = {"perturbax": px, "optax": optax.perturbations}[library]
    smooth = made.make_perturbed_fun(relu_sum, num_samples)
    compiled = jax.jit(jax.grad(smooth, argnums=1)).lower(key, x).compile()
    planned = compiled.memory_analysis()
    found = {
        "num_samples": num_samples,
        "dim": dim,
        "idle_mib": before,
        "planned_mib": planned.temp_size_in_bytes / 2**20,
    }
    if library == "perturbax":
        start = time.perf_counter()
        jax.block_until_ready(compiled(key, x))
        found |= {"peak_mib": peak_mib(), "seconds": time.perf_counter() - start}
    return found


def main(dim=DIM, counts=(2_000, 20_000)):
    runs = [fresh(__file__, "perturbax", n, dim) for n in counts]
    theirs = [fresh(__file__, "optax", n, dim) for n in counts]
    rows = [
        [
            f"{ours['num_samples']:,} x {dim:,}",
            f"{ours['idle_mib']:,.0f}",
            f"{ours['peak_mib']:,.0f}",
            f"{ours['planned_mib']:,.0f}",
            f"{ours['seconds']:.1f}",
            f"{other['planned_mib'] / 2**10:,.1f} GiB",
        ]
        for ours, other in zip(runs, theirs, strict=True)
    ]
    print("Memory for a gradient of a ReLU sum; the process, MiB (optax: XLA's plan, not run)")
    head = ["N x D", "idle", "peak", "XLA's plan", "seconds", "optax, XLA's plan"]
    print(table(head, rows))
    growth = runs[-1]["peak_mib"] - runs[0]["peak_mib"]
    met = runs[-1]["peak_mib"] < MOST_MIB
    print(
        f"{counts[-1] // counts[0]} times the samples: {growth:+.0f} MiB; "
        f"under {MOST_MIB} MiB: {'yes' if met else 'short'}"
    )
    results = {"perturbax": runs, "optax_planned": theirs, "most_mib": MOST_MIB, "met": met}
    write("memory", "key 0", results)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
