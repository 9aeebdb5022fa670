"""Claim: what earlier steps saw makes gradients more precise, at the same number of evaluations.

Along an optimisation of a hundred steps (Adam, driven by the carried gradients), at every 25th
step, the variance of the carried gradient at that point and state, over many keys, is compared with
that of the default and with that of independent samples less the mean of the others
(leave-one-out), at the same number of samples. Geometric means over these steps; "least" is the
least of them, with its standard error. Then the default and the carried gradients each drive a
hundred steps for themselves, at several rates: evaluations until 95 % are done of what the loss
falls by default at its best rate, each at the rate that does it first, by the mean over seeds.

    python benchmarks/carried.py [--samples N ...] [--problem NAME ...] [--noise NOISE ...]
        [--part PART] [--keys KEYS] [--seeds SEEDS] [--seconds SECONDS]

Without --problem and --part, writes docs/_generated/carried.md and docs/_static/carried.png too.
"""

import argparse
import functools
import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from problems import Problem, held_back, suite, zero_one_error
from timing import OUTPUT, ROOT, alternate, table, write

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS, BETWEEN = 100, 25
# Adam's, in units of sigma.
RATE, RATES, SLOW = 0.03, (0.03, 0.1, 0.3, 1.0), 0.1
# Steps between two looks at the loss, and samples for one.
JUDGED, JUDGES = 4, 256
CAP, WAY = 10.0, 0.95
SHOWN = ("quantised quadratic (20)", "sum of steps (20)", "ReLU sum (300)", "0/1 error (640)")


def others() -> list[Problem]:
    """Problems that were not looked at before all was fixed, but for the first."""

    def sign_network(w: Any) -> Any:
        draw = np.random.RandomState(41)
        inputs = jnp.asarray(draw.normal(size=(100, 6)), jnp.float32)
        labels = jnp.sign(inputs[:, 0] + inputs[:, 1] * inputs[:, 2])
        hidden = jnp.sign(inputs @ w[:84].reshape(6, 14) + w[84:98])
        return jnp.mean((jnp.sign(hidden @ w[98:]) != labels) * 1.0)

    def ndcg(scores: Any) -> Any:
        gain = jnp.asarray(np.random.RandomState(42).randint(0, 4, 12), jnp.float32)
        ranks = jnp.sum(scores[None, :] > scores[:, None], axis=1)
        return -jnp.sum((2**gain - 1) / jnp.log2(2.0 + ranks)) / 10

    def cheapest(costs: Any) -> Any:
        grid, row = costs.reshape(12, 12), []
        for i in range(12):
            for j in range(12):
                before = row[j : j + 1] + row[j - 1 : j] * (j > 0)
                best = grid[i, j] + (functools.reduce(jnp.minimum, before) if before else 0.0)
                row[j : j + 1] = [best]
        return -row[-1]

    def knapsack(value: Any) -> Any:
        weight, worth = np.random.RandomState(43).randint(1, 10, (2, 10))
        best, paid = jnp.zeros(26), jnp.zeros(26)
        for i in range(10):
            w = int(weight[i])
            taken = jnp.pad(best, (w, 0))[:26] + jnp.maximum(value[i], 0.0)
            better = taken > best
            paid = jnp.where(better, jnp.pad(paid, (w, 0))[:26] + worth[i], paid)
            best = jnp.where(better, taken, best)
        return -paid[-1]

    def point(seed: int, size: int, scale: float = 1.0) -> np.ndarray:
        return np.random.RandomState(seed).normal(0.0, scale, size).astype(np.float32)

    return [
        Problem("0/1 error (42)", zero_one_error(14, 3, 200), point(31, 42, 0.1), 0.3),
        Problem("NDCG (12)", ndcg, point(44, 12), 0.5),
        Problem("knapsack (10)", knapsack, 5 + point(45, 10), 1.0),
        Problem("sign network (112)", sign_network, point(46, 112), 0.5),
        Problem("cheapest path (144)", cheapest, 1 + point(47, 144, 0.3), 0.3),
        Problem("0/1 error (42), batches of 50", batched_error, point(31, 42, 0.1), 0.3),
    ]


def batched_error(weights: Any, key: Any = None) -> Any:
    """The 0/1 error on other data in each step."""
    centres = jnp.asarray(np.random.RandomState(6).normal(0.0, 1.0, (3, 14)), jnp.float32)
    which, other = jax.random.split(key)
    labels = jax.random.randint(which, (50,), 0, 3)
    inputs = centres[labels] + 1.5 * jax.random.normal(other, (50, 14))
    guess = jnp.argmax(inputs @ weights.reshape(14, 3), axis=1)
    return jnp.mean((guess != labels).astype(jnp.float32))


def problems() -> list[Problem]:
    """Of all suites, those of a size that the claim is about."""
    return [p for p in [*suite(), *held_back(), *others()] if 5 < p.x.size <= 2000]


def smooth(problem: Problem, num_samples: int, **options: Any) -> Any:
    """The perturbed function of a point and of a key for its data, which most do not have."""
    fun: Any = problem.fun if problem.fun is batched_error else lambda x, _: problem.fun(x)
    return px.make_perturbed_fun(fun, num_samples, problem.sigma, **options)


def variance(gradients: np.ndarray) -> tuple[float, float]:
    """Summed over coordinates, and its relative standard error."""
    squares = np.sum((gradients - gradients.mean(axis=0)) ** 2, axis=1)
    mean = squares.mean()
    return mean, squares.std() / max(mean, 1e-30) / math.sqrt(len(squares))


def along(problem: Problem, num_samples: int, num_keys: int, noise: Any) -> list[list[float]]:
    """Variances of default and leave-one-out over the carried one, and the first's error."""
    g = smooth(problem, num_samples, noise=noise)
    alone = smooth(problem, num_samples, noise=noise, sampler=px.Independent(), degree=0)
    carried = px.carry(g)
    adam = optax.adam(RATE * problem.sigma)

    @jax.jit
    def advance(x: Any, state: Any, moments: Any, keys: Any) -> Any:
        def step(now: Any, key: Any) -> Any:
            used, data = jax.random.split(key)
            x, state, moments = now
            (_, slope), state = carried.value_and_grad(state, used, x, data)
            change, moments = adam.update(slope, moments)
            return (x + change, state, moments), None

        return jax.lax.scan(step, (x, state, moments), keys)[0]

    @jax.jit
    def gradients(x: Any, state: Any, keys: Any) -> Any:
        def one(key: Any) -> Any:
            used, data = jax.random.split(key)
            ours = carried.value_and_grad(state, used, x, data)[0][1]
            return ours, *(jax.grad(f, argnums=1)(used, x, data) for f in (g, alone))

        return jax.lax.map(one, keys, batch_size=32)

    x = jnp.asarray(problem.x)
    state, moments = carried.init(x), adam.init(x)
    ratios = []
    for part, key in enumerate(jax.random.split(jax.random.key(num_samples), STEPS // BETWEEN)):
        x, state, moments = advance(x, state, moments, jax.random.split(key, BETWEEN))
        keys = jax.random.split(jax.random.key(1000 + part), num_keys)
        found = [variance(np.asarray(v, np.float64)) for v in gradients(x, state, keys)]
        (ours, e0), (default, e1), (plain, _) = found
        if default > 0:
            floor = max(ours, 1e-6 * default)
            ratio = default / floor
            ratios.append([ratio, plain / floor, ratio * math.hypot(e0, e1)])
    return ratios


def curves(problem: Problem, num_samples: int, seeds: int) -> dict[str, np.ndarray]:
    """Loss after 0, 4, 8, ... steps, (rates, looks), of default and carried; means over seeds."""
    g, x0 = smooth(problem, num_samples, noise=px.Normal()), jnp.asarray(problem.x)
    carried = px.carry(g)
    judge = smooth(problem, JUDGES, noise=px.Normal())

    def run(rate: Any, key: Any, learn: bool) -> Any:
        def step(now: Any, key: Any) -> Any:
            x, state, moments = now
            used, data = jax.random.split(key)
            if learn:
                (_, slope), state = carried.value_and_grad(state, used, x, data)
            else:
                slope = jax.grad(g, argnums=1)(used, x, data)
            change, moments = optax.scale_by_adam().update(slope, moments)
            return (x - rate * problem.sigma * change, state, moments), None

        def some(now: Any, keys: Any) -> Any:
            loss = judge(jax.random.key(0), now[0], jax.random.key(1))
            return jax.lax.scan(step, now, keys)[0], loss

        start = (x0, carried.init(x0), optax.scale_by_adam().init(x0))
        keys = jax.random.split(key, (STEPS // JUDGED + 1, JUDGED))
        return jax.lax.scan(some, start, keys)[1]

    keys = jax.random.split(jax.random.key(1), seeds)
    found = {}
    for name, learn in (("default", False), ("carried", True)):
        one = jax.vmap(functools.partial(run, learn=learn), (None, 0))
        every = jax.jit(jax.vmap(one, (0, None)))(jnp.array(RATES), keys)
        found[name] = np.asarray(every, np.float64).mean(axis=1)
    return found


def steps_to(curve: np.ndarray, target: float) -> float:
    """Steps until the loss is as low, between two looks in proportion; infinite if never."""
    below = np.flatnonzero(curve <= target)
    if not len(below):
        return math.inf
    k = int(below[0])
    if k == 0:
        return 0.0
    return JUDGED * (k - 1 + (curve[k - 1] - target) / (curve[k - 1] - curve[k]))


def target_of(found: dict[str, np.ndarray]) -> float:
    """Most of the way to where the default is at last, at its best rate."""
    start = found["default"][0, 0]
    return start + WAY * (found["default"][:, -3:].mean(axis=1).min() - start)


def speedup(found: dict[str, np.ndarray]) -> tuple[float, float]:
    """Steps of default and carried to the target."""
    target = target_of(found)
    default, carried = (min(steps_to(c, target) for c in found[k]) for k in ("default", "carried"))
    return default, carried


def update_times(seconds: float) -> list[list[float]]:
    """Milliseconds of a step beyond one of the default, of a function that costs nothing."""
    rows = []
    for dim in (20, 144, 1000):
        for num_samples in (16, 64):
            x = jnp.zeros(dim)
            g = px.make_perturbed_fun(lambda x: jnp.sum(jnp.sign(x)), num_samples, 0.3, px.Normal())
            carried = px.carry(g)
            state = carried.init(x)
            calls = {
                "carried": functools.partial(jax.jit(carried.value_and_grad), state),
                "default": jax.jit(jax.value_and_grad(g, argnums=1)),
            }
            turns = {
                name: lambda turn, call=call, x=x: call(jax.random.key(turn), x)
                for name, call in calls.items()
            }
            timing = alternate(turns, seconds)
            extra = timing.seconds @ np.array([1, -1])
            rows.append([dim, num_samples, *(1e3 * np.quantile(extra, [0.25, 0.5, 0.75]))])
    return rows


def number(v: float) -> str:
    """Three digits, or whole."""
    return f"{v:.2f}" if v < 10 else f"{v:,.0f}"


def mean_of(values: list[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(values)))) if values else math.nan


def report(cells: dict[str, Any], updates: list[list[float]]) -> str:
    """The tables."""
    rows, totals = [], []
    for about in sorted({(cell["samples"], cell["noise"]) for cell in cells.values()}):
        gains, plain, fewer, least = [], [], [], math.inf
        for cell in cells.values():
            if (cell["samples"], cell["noise"]) != about:
                continue
            row = [cell["problem"], *map(str, about), *[""] * 5]
            ratios = np.array(cell["ratios"]).reshape(-1, 3)
            if len(ratios):
                gains.append(mean_of(list(ratios[:, 0])))
                plain.append(mean_of(list(ratios[:, 1])))
                at = int(np.argmin(ratios[:, 0]))
                least = min(least, ratios[at, 0])
                row[3:6] = number(gains[-1]), number(plain[-1]), number(ratios[at, 0])
                row[5] += f" ± {ratios[at, 2]:.2f}"
            if cell["curves"]:
                default, ours = speedup({k: np.array(v) for k, v in cell["curves"].items()})
                row[6:] = [f"{default * about[0]:,.0f}", f"{ours * about[0]:,.0f}"]
                if math.isinf(ours):  # counted as twice as many as were made
                    row[7], ours = "never", 2 * STEPS
                fewer.append(default / max(ours, 1))
            rows.append(row)
        capped = mean_of([min(v, CAP) for v in gains])
        totals.append(
            [
                f"{about[0]} samples, {about[1]} noise",
                str(len(gains)),
                f"{mean_of(gains):.2f} ({capped:.2f})",
                f"{mean_of(plain):.2f}",
                f"{least:.2f}",
                f"{mean_of(fewer):.2f}" if fewer else "",
            ]
        )
    ratio, over_plain = "default / carried", "leave-one-out / carried"
    means = ["geometric means", "problems", f"{ratio} (at most {CAP:g} each)", over_plain, "least"]
    text = table([*means, "times fewer evaluations"], totals)
    head = ["problem", "samples", "noise", ratio, over_plain, "least"]
    text += "\n\n" + table([*head, "evaluations, default", "carried"], rows)
    if updates:
        times = [
            [f"{d:,.0f}", f"{n:.0f}", f"{mid:.2f} ({low:.2f} to {high:.2f})"]
            for d, n, low, mid, high in updates
        ]
        text += "\n\n" + table(["coordinates", "samples", "milliseconds of an update"], times)
    return text + "\n"


def draw(cells: dict[str, Any], num_samples: int) -> None:
    """Loss against evaluations of some problems: each side at its first rate and at a slow one."""
    shown = [f"{name}, {num_samples}, Normal" for name in SHOWN]
    figure, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 2.8), squeeze=False)
    for panel, name in zip(axes[0], shown, strict=True):
        found = {k: np.array(v) for k, v in cells[name]["curves"].items()}
        target = target_of(found)
        for side, colour in (("default", "0.55"), ("carried", "#1f4e8c")):
            first = min(found[side], key=lambda c: steps_to(c, target))
            at = JUDGED * num_samples * np.arange(len(first))
            panel.plot(at, first, color=colour, label=side, linewidth=1.6)
            slow = found[side][RATES.index(SLOW)]
            panel.plot(at, slow, color=colour, linewidth=1.2, linestyle="--")
        panel.axhline(target, color="0.85", linewidth=0.8, zorder=0)
        panel.set_title(cells[name]["problem"], fontsize=9)
        panel.set_xlabel("evaluations", fontsize=8)
        panel.tick_params(labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    axes[0][0].set_ylabel("smoothed loss", fontsize=8)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "_static" / "carried.png", dpi=150)


def main() -> None:
    """Prints the tables, and writes them as JSON; cells measured before are kept in a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--problem", nargs="*", default=None)
    parser.add_argument("--noise", nargs="*", default=["Normal", "Gumbel"])
    parser.add_argument("--part", choices=["variance", "evaluations", "updates", "report"])
    parser.add_argument("--keys", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    part, path = arguments.part, OUTPUT / "carried_cells.json"
    known = json.loads(path.read_text()) if part and path.exists() else {}
    cells = known.get("cells", {})
    noises: dict[str, Any] = {"Normal": px.Normal(), "Gumbel": px.Gumbel()}
    todo = itertools.product(arguments.noise, arguments.samples, problems())
    for noise, num_samples, problem in todo:
        if part in ("updates", "report") or problem.name not in (
            arguments.problem or [problem.name]
        ):
            continue
        cell = {"problem": problem.name, "samples": num_samples, "noise": noise, "curves": {}}
        cell = cells.setdefault(f"{problem.name}, {num_samples}, {noise}", cell | {"ratios": []})
        if part in (None, "variance"):
            cell["ratios"] = along(problem, num_samples, arguments.keys, noises[noise])
            print(problem.name, num_samples, np.round(cell["ratios"], 2).tolist(), flush=True)
        if part in (None, "evaluations") and noise == "Normal" and problem.x.size < 1000:
            found = curves(problem, num_samples, arguments.seeds)
            cell["curves"] = {k: v.tolist() for k, v in found.items()}
            print(problem.name, num_samples, *speedup(found), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**known, "cells": cells}))
    updates = known.get("updates", [])
    if part in (None, "updates"):
        updates = update_times(arguments.seconds)
        path.write_text(json.dumps({"cells": cells, "updates": updates}))
    text = report(cells, updates)
    print(text)
    if part in (None, "report") and not arguments.problem:
        (ROOT / "docs" / "_generated" / "carried.md").write_text(text)
        draw(cells, 16)
    seeds = "keys num_samples, 1,000 to 1,003, 1; problems as in problems.py and here"
    write("carried", seeds, {"cells": cells, "updates": updates})


if __name__ == "__main__":
    main()
