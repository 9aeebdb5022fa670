"""What a gradient of a function outside JAX costs beside its evaluations.

64 points of 20 ms, which wait: on 16 workers they take 80 ms at best. Printed is how many times as
long a whole gradient takes, warm, jitted and not: noise, evaluations, surrogate, derivative. With
evaluations that take no time, what is left is the cost of handing points out.

    python benchmarks/host_functions.py
"""

import concurrent.futures
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate, table, write

import perturbax as px

POINTS, SECONDS, WORKERS = 64, 0.02, 16


def waiting(seconds):
    """A function that waits; local, so that it goes to workers by value."""

    def fun(x):
        import time

        if seconds:
            time.sleep(seconds)
        return float(x.sum())

    return fun


def gradients(h):
    """A jitted and an eager gradient, of the number of a turn."""
    x = jnp.arange(3.0)
    eager = jax.grad(px.make_perturbed_fun(h, POINTS, 0.5, px.Normal()), 1)
    jitted = jax.jit(eager)
    return {
        name: functools.partial(lambda f, turn: f(jax.random.key(turn), x), f)
        for name, f in (("jit", jitted), ("eager", eager))
    }


def main() -> None:
    results: dict[str, Any] = {}
    best = POINTS * SECONDS / WORKERS
    with (
        px.ProcessWorkers(WORKERS) as processes,
        concurrent.futures.ThreadPoolExecutor(WORKERS) as pool,
    ):
        executors = {
            "16 threads": WORKERS,
            "16 threads, timeout": WORKERS,
            "ThreadPoolExecutor(16)": pool,
            "ProcessWorkers(16)": processes,
        }
        for name, executor in executors.items():
            limit = 10.0 if "timeout" in name else None
            calls = {}
            for seconds in (SECONDS, 0.0):
                h = px.host_function(
                    waiting(seconds), executor=executor, timeout=limit, like=np.float32(0)
                )
                made = gradients(h)
                calls |= {f"{way} {seconds}": call for way, call in made.items()}
            timing = alternate(calls, seconds=6.0, least=9)
            results[name] = {
                "ratio_jit": timing.milliseconds(f"jit {SECONDS}") / (1e3 * best),
                "ratio_eager": timing.milliseconds(f"eager {SECONDS}") / (1e3 * best),
                "microseconds_a_point": 1e3 * timing.milliseconds("jit 0.0") / POINTS,
            }
    start = time.perf_counter()
    for _ in range(100):
        time.sleep(SECONDS)
    results["sleeping"] = (time.perf_counter() - start) / 100 / SECONDS
    rows = [
        [name, *(f"{r[k]:.2f}" for k in ("ratio_jit", "ratio_eager")),
         f"{r['microseconds_a_point']:.0f}"]
        for name, r in results.items() if isinstance(r, dict)
    ]  # fmt: skip
    print(table(["executor", "times the best, jit", "eager", "us a point of no time"], rows))
    print(f"a sleep of {SECONDS:g} s itself: {results['sleeping']:.2f} times that long")
    write("host_functions", "the number of the turn", results)


if __name__ == "__main__":
    main()
