"""What faults cost a host function: exceptions, evaluations that never return, workers killed.

On threads, processes of our own, loky and a Dask cluster (started here, with processes):

- `faults`: evaluations of 5 ms, of which 5 % raise, 1 % never return and, where workers are
  processes, one in a thousand kills its worker. Every attempt draws its own fault, so retries
  succeed, and the gradients have to be those without faults, bit by bit. The time is compared with
  that of the same without faults, plus the timeouts that were waited for.
- `resume`: a program with a journal is killed (SIGKILL) at random moments and started again, until
  it ends. No point with a result in the journal may be evaluated again.
- `long run`: gradients in a row; threads, processes and file descriptors are counted before and
  after.

    python benchmarks/faults.py                   all, an hour or so
    python benchmarks/faults.py --quick           small, a few minutes
    python benchmarks/faults.py --only loky dask  some of the executors
"""

import argparse
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

EXECUTORS = ("threads", "processes", "loky", "dask")
WORKERS = 4
SECONDS = 0.005
TIMEOUT = 0.1


class Faults(NamedTuple):
    """Shares of the attempts."""

    raising: float = 0.0
    hanging: float = 0.0
    killing: float = 0.0


ALL = Faults(raising=0.05, hanging=0.01, killing=0.001)


def evaluation(faults: Faults, seconds: float = SECONDS):
    """A function of 5 ms that has faults. Local, so that it is sent to workers by value."""
    import numpy as np

    def evaluate(x):
        import os
        import random
        import signal
        import time

        time.sleep(seconds)
        draw = random.SystemRandom().random()
        if draw < faults.raising:
            raise ConnectionError("a fault")
        draw -= faults.raising
        if draw < faults.hanging:
            time.sleep(1e6)
        draw -= faults.hanging
        if draw < faults.killing:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.float32(np.sum(np.rint(3 * x)) + x[0] * x[1])

    return evaluate


@contextlib.contextmanager
def executor(name: str, workers: int = WORKERS):
    """An executor of four workers."""
    import perturbax as px

    if name == "threads":
        yield workers
    elif name == "processes":
        with px.ProcessWorkers(workers) as made:
            yield made
    elif name == "loky":
        import loky

        made = loky.ProcessPoolExecutor(workers)
        try:
            yield made
        finally:
            made.shutdown(wait=True, kill_workers=True)
    else:
        import dask
        import distributed

        # How long Dask looks for results on a worker that has died; 30 s by default.
        patience = {"distributed.comm.timeouts.connect": "3s"}
        with (
            dask.config.set(patience),
            distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                silence_logs=50,
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client


def gradients(h: Any, count: int, num_samples: int, first_key: int = 0) -> np.ndarray:
    """Gradients in a row, with values in front."""
    import jax
    import jax.numpy as jnp

    import perturbax as px

    smooth = px.make_perturbed_fun(h, num_samples, 0.5, px.Normal())
    step = px.own_exceptions(jax.jit(jax.value_and_grad(smooth, 1)))
    x = jnp.array([0.25, -1.0, 2.0])
    found = [step(jax.random.key(first_key + i), x) for i in range(count)]
    return np.stack([np.concatenate([np.reshape(v, 1), g]) for v, g in found])


def run_faults(name: str, evaluations: int, num_samples: int = 500) -> dict[str, Any]:
    """Times of gradients with and without faults, and whether they are the same."""
    import perturbax as px

    count = evaluations // num_samples
    # No worker is to be killed where all are threads of this program.
    faults = ALL._replace(killing=0.0) if name == "threads" else ALL
    settings = {"like": np.float32(0), "timeout": TIMEOUT, "retries": 50}
    serial = px.host_function(evaluation(Faults(), 0.0), like=np.float32(0))
    expected = gradients(serial, count, num_samples)
    with executor(name) as workers:
        with px.host_function(evaluation(Faults()), executor=workers, **settings) as faultless:
            gradients(faultless, 1, num_samples)  # compiles, and starts the workers
            start = time.perf_counter()
            gradients(faultless, count, num_samples)
            faultless_seconds = time.perf_counter() - start
        with px.host_function(evaluation(faults), executor=workers, **settings) as faulty:
            gradients(faulty, 1, num_samples)
            before = faulty.counts
            start = time.perf_counter()
            found = gradients(faulty, count, num_samples)
            seconds = time.perf_counter() - start
            after = faulty.counts
    counts = {k: v - b for (k, v), b in zip(after._asdict().items(), before, strict=True)}
    waited = counts["timeouts"] * TIMEOUT / WORKERS
    return {
        "executor": name,
        "evaluations": count * num_samples,
        "faultless_seconds": faultless_seconds,
        "seconds": seconds,
        "waited": waited,
        "ratio": (seconds - waited) / faultless_seconds,
        "same_bits": bool(np.array_equal(found, expected)),
        "lost_or_doubled": abs(counts["evaluations"] - count * num_samples),
        **counts,
    }


# --- Killed and started again


def program(name: str, journal: str, log: str, evaluations: int) -> None:
    """What is killed: gradients with a journal; prints their bits."""
    import perturbax as px

    num_samples = 250

    def logged(x):
        # For the parent: which points were evaluated.
        value = evaluation(Faults())(x)
        with open(log, "a") as file:
            file.write(x.tobytes().hex() + "\n")
        return value

    with (
        executor(name) as workers,
        px.host_function(
            logged, executor=workers, like=np.float32(0), journal=px.Journal(journal, "faults")
        ) as h,
    ):
        print("ready", flush=True)
        found = gradients(h, evaluations // num_samples, num_samples)
    print(found.tobytes().hex(), h.counts.evaluations, h.counts.recalled)


def run_resume(name: str, evaluations: int, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kills the program at random moments until it has ended."""
    import perturbax as px

    rng = random.Random(seed)
    serial = px.host_function(evaluation(Faults(), 0.0), like=np.float32(0))
    expected = gradients(serial, evaluations // 250, 250)
    repeated = killed = 0
    finished: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        journal, log = str(Path(folder) / "journal"), Path(folder) / "log"
        command = [sys.executable, __file__, "--program", name, journal, str(log), str(evaluations)]
        while True:
            log.write_text("")
            done = count_results(journal)
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, start_new_session=True
            ) as run:
                assert run.stdout is not None
                run.stdout.readline()
                if killed < kills:
                    # At a moment of the evaluations that are left: the rest is for later kills.
                    left = (evaluations - done) * (SECONDS + 0.001) / WORKERS
                    try:
                        run.wait(0.05 + rng.random() * 2 * left / (kills - killed + 1))
                    except subprocess.TimeoutExpired:
                        run.send_signal(signal.SIGKILL)
                        run.wait()
                        with contextlib.suppress(ProcessLookupError):  # loky's may wait for ever
                            os.killpg(run.pid, signal.SIGKILL)
                        killed += 1
                output = run.stdout.read()
            evaluated = [line for line in log.read_text().splitlines() if len(line) == 24]
            repeated += sum(point in finished for point in evaluated)
            # Results on disk: all of them but the last few that were evaluated in this run.
            finished |= set(evaluated) if run.returncode == 0 else on_disk(evaluated, done, journal)
            if run.returncode == 0:
                break
            assert run.returncode == -signal.SIGKILL, run.returncode
    bits, *_ = output.split()
    return {
        "executor": name,
        "evaluations": evaluations,
        "kills": killed,
        "finished_repeated": repeated,
        "same_bits": bits == expected.tobytes().hex(),
    }


def count_results(journal: str) -> int:
    """How many results the journal has."""
    if not Path(journal).exists():
        return 0
    with contextlib.closing(sqlite3.connect(journal)) as database:
        try:
            [count] = database.execute("SELECT COUNT(*) FROM results").fetchone()
        except sqlite3.OperationalError:  # killed before there was a table
            return 0
    return count


def on_disk(evaluated: list[str], before: int, journal: str) -> set[str]:
    """Of the points that were evaluated in this order, those that the journal has for sure."""
    return set(evaluated[: max(count_results(journal) - before - 2 * WORKERS, 0)])


# --- Many in a row


def resources() -> dict[str, int]:
    """Threads and file descriptors of this process, and processes that it started."""
    children = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children += status.read_text().rsplit(")", 1)[1].split()[1] == str(os.getpid())
    return {
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "processes": children,
    }


def run_long(name: str, count: int, num_samples: int = 16) -> dict[str, Any]:
    """Gradients in a row, and what they leave behind."""
    import perturbax as px

    with executor(name):  # what the executor's library keeps for good
        pass
    before = resources()
    with (
        executor(name) as workers,
        px.host_function(
            evaluation(Faults(), 0.0), executor=workers, like=np.float32(0), timeout=60.0
        ) as h,
    ):
        gradients(h, 20, num_samples)
        warm = resources()
        start = time.perf_counter()
        gradients(h, count, num_samples)
        seconds = time.perf_counter() - start
        after = resources()
    for _ in range(200):
        closed = resources()
        if all(closed[k] <= before[k] for k in before):
            break
        time.sleep(0.05)
    return {
        "executor": name,
        "gradients": count,
        "milliseconds_a_gradient": 1e3 * seconds / count,
        "grown_while_running": {k: after[k] - warm[k] for k in warm},
        "left_over": {k: closed[k] - before[k] for k in before},
    }


def main(names: list[str], quick: bool) -> None:
    from timing import table, write

    evaluations, kills, count = (1000, 2, 50) if quick else (10_000, 10, 1000)
    results: dict[str, Any] = {"faults": [], "resume": [], "long": []}
    for name in names:
        results["faults"].append(run_faults(name, evaluations))
        results["long"].append(run_long(name, count))
        results["resume"].append(run_resume(name, evaluations, kills))
        print({k: v[-1] for k, v in results.items()}, flush=True)
    print(
        table(
            [
                "executor",
                "evaluations",
                "s",
                "without faults",
                "waited",
                "ratio",
                "same bits",
                "lost",
            ],
            [
                [
                    r["executor"],
                    r["evaluations"],
                    *(f"{r[k]:.1f}" for k in ("seconds", "faultless_seconds", "waited")),
                    f"{r['ratio']:.2f}",
                    r["same_bits"],
                    r["lost_or_doubled"],
                ]
                for r in results["faults"]
            ],
        )
    )
    print(
        table(
            ["executor", "kill -9", "finished, repeated", "same bits"],
            [
                [r["executor"], r["kills"], r["finished_repeated"], r["same_bits"]]
                for r in results["resume"]
            ],
        )
    )
    print(
        table(
            ["executor", "gradients", "ms each", "left over"],
            [
                [
                    r["executor"],
                    r["gradients"],
                    f"{r['milliseconds_a_gradient']:.1f}",
                    sum(max(v, 0) for v in r["left_over"].values()),
                ]
                for r in results["long"]
            ],
        )
    )
    write("faults", {"kills": 0}, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=EXECUTORS, default=list(EXECUTORS))
    parser.add_argument("--program", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.program:
        program(*given.program[:3], int(given.program[3]))
    else:
        main(given.only, given.quick)
