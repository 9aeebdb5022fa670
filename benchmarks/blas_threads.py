"""What threads of BLAS cost where evaluations already run side by side.

Each evaluation fits a logistic regression of scikit-learn's, by linear algebra, on 1,000 points in
100 dimensions; 32 of them are a step. Every process or thread lets its BLAS use all cores by
default, so that there are many times as many threads as cores. Compared: threads and processes,
each with BLAS as it is and with one thread each.

    python benchmarks/blas_threads.py
"""

import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import spread, table, write

POINTS = 32
TURNS = 5


def fits():
    """A function that fits; local, so that it goes to workers by value."""
    import numpy as np

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1000, 100))
    labels = inputs[:, 0] + 0.3 * rng.normal(size=1000) > 0

    def fit(log_c):
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=float(10**log_c), solver="newton-cholesky", max_iter=20)
        return float(model.fit(inputs, labels).score(inputs, labels))

    return fit


def one_thread(fit):
    """The same with one thread for BLAS, by threadpoolctl, which scikit-learn brings along."""
    from threadpoolctl import ThreadpoolController

    controller = ThreadpoolController()

    def limited(log_c):
        with controller.limit(limits=1):
            return fit(log_c)

    return limited


def main() -> None:
    import perturbax as px

    cores = os.cpu_count() or 1
    points = jnp.linspace(-2.0, 1.0, POINTS)
    with (
        px.ProcessWorkers(cores) as limited,
        px.ProcessWorkers(cores, threads_per_worker=None) as unlimited,
    ):
        fit = fits()
        ways = {
            "threads, BLAS as it is": px.host_function(fit, executor=cores, like=0.0),
            "threads, one of BLAS each": px.host_function(
                one_thread(fit), executor=cores, like=0.0
            ),
            "processes, BLAS as it is": px.host_function(fit, executor=unlimited, like=0.0),
            "processes, one of BLAS each": px.host_function(fit, executor=limited, like=0.0),
        }
        values, seconds = {}, {name: [] for name in ways}
        for turn in range(TURNS + 1):
            for name, h in ways.items():
                start = time.perf_counter()
                values[name] = np.asarray(jax.vmap(h)(points))
                if turn:  # the first one starts workers and imports
                    seconds[name].append(time.perf_counter() - start)
    for name in ways:
        np.testing.assert_allclose(values[name], values["threads, BLAS as it is"], atol=0.01)
    best = np.array(seconds["processes, one of BLAS each"])
    results: dict[str, Any] = {}
    for name, taken in seconds.items():
        ratios = np.array(taken) / best
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        results[name] = {
            "seconds": float(np.median(taken)),
            "ratio": {"median": median, "lower": low, "upper": high, "turns": TURNS},
        }
    rows = [[k, f"{v['seconds']:.2f}", spread(v["ratio"])] for k, v in results.items()]
    print(table([f"{POINTS} fits on {cores} cores", "s", "times the last"], rows))
    write("blas_threads", None, results)


if __name__ == "__main__":
    main()
