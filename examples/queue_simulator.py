"""Staff for a clinic: a stochastic simulator with failures, on a Dask cluster.

Patients of one day arrive at a clinic with three stations: reception, laboratory (for two in three
of them) and treatment. Each station has a queue and some members of staff. What is minimised is the
cost of a day: wages, and what a patient's waiting costs. A simulation is a Python program; staff
comes in whole numbers; a day's cost depends on chance. The gradient is estimated through noise on
the three numbers, with the same days of patients for all samples of a step.

It runs on a cluster of Dask, here one of two processes on this machine; one on a hundred machines
takes the same line. Some simulations fail, as they do on clusters: one in fifty loses its
connection and is tried again, one in two hundred never returns and is given up. And a clinic that
is overrun ends its simulation with an error; that is part of the problem, and is given a cost.

    python examples/queue_simulator.py
"""

import contextlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STATIONS = ("reception", "laboratory", "treatment")
START = (7.0, 2.0, 6.0)
OVERRUN = 6000.0  # the cost of a day that was broken off


class Result(NamedTuple):
    """What was found, and on the way."""

    staff: np.ndarray  # (3,), whole numbers
    path: np.ndarray  # (num_steps, 3), before each step
    costs: np.ndarray  # (num_steps,), the mean cost of a day under noise
    neighbours: dict[tuple[int, ...], float]  # mean cost of the start, `staff` and those beside it
    counts: px.HostCounts


def simulator(faults=True):
    """The cost of a day. It takes along what it needs to another machine."""
    import numpy as np

    def cost_of_a_day(staff, day):
        import heapq
        import random
        import time

        if faults:  # of the machine that happens to run it
            draw = random.SystemRandom().random()
            if draw < 0.02:
                raise ConnectionError("lost")
            if draw < 0.025:
                time.sleep(1e6)
        rng = np.random.default_rng(day)
        count = 200
        # Arrival times, in minutes, one every 1.2; minutes that each patient takes at each station.
        times = np.cumsum(rng.exponential(1.2, count))
        minutes = rng.gamma(2.0, [[1.2], [2.0], [3.2]], (3, count))
        minutes[1, rng.random(count) > 2 / 3] = 0.0
        waited = 0.0
        for station, servers in enumerate(np.maximum(np.rint(staff), 1).astype(int)):
            order = np.argsort(times, kind="stable")
            free = [0.0] * int(servers)
            for patient in order.tolist():
                took = minutes[station, patient]
                if took == 0.0:
                    continue
                start = max(times[patient], heapq.heappop(free))
                waited += start - times[patient]
                times[patient] = start + took
                heapq.heappush(free, times[patient])
            if waited > 60.0 * count:
                raise OverflowError("more than an hour of waiting for each patient")
        wages = np.maximum(np.rint(staff), 1) @ np.array([60.0, 100.0, 150.0])
        return wages + 0.5 * waited

    return cost_of_a_day


@contextlib.contextmanager
def cluster(num_workers=2):
    """A Dask cluster on this machine, and a client of it."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=num_workers, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as local,
        Client(local) as client,
    ):
        yield client


def descend(cost, num_steps, num_samples, learning_rate=0.25):
    """Staff, as real numbers, before each step, and the mean cost there."""
    sigmas = np.linspace(0.6, 0.3, num_steps)  # wide to find the way, narrow to arrive
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps, alpha=0.1))
    staff = jnp.array(START)
    state, path, costs = optimizer.init(staff), [], []
    for step in range(num_steps):
        key = jax.random.key(step)
        smooth = px.make_perturbed_fun(cost, num_samples, sigmas[step], px.Normal())
        # A day is one number, the seed of its patients: the same for all samples of a step.
        value, gradient = jax.value_and_grad(smooth, argnums=1)(key, staff, step)
        path.append(staff)
        costs.append(value)
        updates, state = optimizer.update(gradient, state)
        staff = optax.apply_updates(staff, updates)
    return np.array(path), np.array(costs)


def beside(cost, staff, days):
    """The mean cost of so many new days: of some staff, one more or less anywhere, the start."""
    around = [np.array(START), staff]
    around += [staff + s * np.eye(3)[i] for i in range(3) for s in (-1, 1)]
    around = np.unique(np.float32([v for v in around if v.min() >= 1]), axis=0)
    over_days = jax.vmap(cost, (None, 0))
    means = jax.vmap(over_days, (0, None))(around, 1000 + np.arange(days)).mean(axis=1)
    keys = [tuple(int(n) for n in v) for v in around]
    return dict(zip(keys, map(float, means), strict=True))


def main(path="build/queue_simulator.png", executor=None, num_steps=40, num_samples=24, days=30):
    """Finds the staff, prints how good it is, and draws it; returns the Result."""
    with contextlib.ExitStack() as stack:
        executor = executor or stack.enter_context(cluster())
        cost = stack.enter_context(
            px.host_function(
                simulator(),
                executor=executor,
                like=0.0,
                timeout=1.0,
                retries=5,
                on_failure=OVERRUN,
            )
        )
        steps, costs = descend(cost, num_steps, num_samples)
        # The mean of the last steps, for each of them still moves with its day.
        staff = np.maximum(np.rint(steps[-10:].mean(axis=0)), 1)
        neighbours = beside(cost, staff, days)
        counts = cost.counts
    result = Result(staff, steps, costs, neighbours, counts)
    show(result)
    draw(Path(path), result)
    print(f"Figure: {path}")
    return result


def show(result):
    counts = result.counts
    print(
        f"  {counts.evaluations} simulations; {counts.retries} were tried again, "
        f"{counts.timeouts} of them since they did not return; {counts.failures} clinics overrun"
    )
    print(f"  {'  '.join(STATIONS)}   cost of a day")
    for staff, cost in sorted(result.neighbours.items(), key=lambda item: item[1]):
        mark = {START: "start", tuple(result.staff): "where the descent ends"}.get(staff, "")
        print("  {:9} {:11} {:10}   {:13.0f}  {}".format(*staff, cost, mark).rstrip())


def draw(path, result):
    """Cost and staff on the way."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=150, layout="constrained")
    left.plot(result.costs, color="#1f77b4")
    left.axhline(result.neighbours[tuple(int(n) for n in result.staff)], color="#7f7f7f", lw=1)
    left.set(xlabel="step of Adam", ylabel="cost of a day under noise (line: found)")
    for name, numbers in zip(STATIONS, result.path.T, strict=True):
        right.plot(numbers, label=name)
    right.set(xlabel="step of Adam", ylabel="members of staff")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
