"""Claim: what earlier steps saw makes gradients more precise, at the same number of evaluations.

Along an optimisation of a hundred steps (Adam, driven by the carried gradients), at every 25th
step, the variance of the carried gradient at that point and state, over many keys, is compared with
that of the default and with that of independent samples less the mean of the others
(leave-one-out), at the same number of samples. Geometric means over these steps; "least" is the
least of them, with its standard error. Then the default and the carried gradients each drive a
hundred steps for themselves, of Adam and of gradient descent, at rates a factor of two apart:
evaluations until 95 % are done of what the loss falls by default at its best rate, each at the rate
that does it first, by the mean over seeds. "Exact" are gradients of hundreds of samples, counted as
if they were as many as the others': what is to be gained at most. A star is where they are first at
the largest rate, because the loss falls as far as x may move. "minimize" is px.minimize, which has
no rate, and chooses its samples and its noise by itself; its points are judged at the same sigma.

    python benchmarks/carried.py [--samples N ...] [--problem NAME ...] [--noise NOISE ...]
        [--part PART] [--keys KEYS] [--seeds SEEDS] [--seconds SECONDS]

Without --problem and --part, or with --part report of all that was measured before, writes the
pages docs/_generated/carried.md and carried_evaluations.md and docs/_static/carried.png too.
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
RATE = 0.03
# In units of sigma: what Adam moves each coordinate by; the length of the first step of gradient
# descent, were its gradient exact.
RATES = {"Adam": 2.0 ** np.arange(-5, 3), "gradient descent": 2.0 ** np.arange(-4, 8)}
GRADIENTS = ("default", "carried", "exact")
SIDES = (*GRADIENTS, "minimize")
# Samples of a step that is counted as exact: at least, and for each coordinate.
EXACT, EXACT_PER = 512, 8
# Steps between two looks at the loss, and samples for one.
JUDGED, JUDGES = 2, 256
CAP, WAY = 10.0, 0.95
SHOWN = ("quantised quadratic (20)", "grid path (64)", "0/1 error (42)", "threshold network (48)")


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


def trail(
    fun: Any, x0: Any, key: Any, max_evaluations: int, **options: Any
) -> tuple[list[Any], list[int]]:
    """The points of a run of px.minimize, and after how many evaluations each was known."""
    points, made = [x0], []

    def keep(told: Any) -> None:
        points.append(told.x)
        made.append(told.evaluations)

    options = {"max_evaluations": max_evaluations, "callback": keep, "progress": False, **options}
    px.minimize(fun, x0, key, **options)
    # A step's point is known before its own evaluations. Of all but the first, whose are as many as
    # those of the second, that is after the step before.
    return points, [0, 2 * made[0] - made[1], *made[:-1]]


def minimized(problem: Problem, judge: Any, looks: np.ndarray, seeds: int) -> np.ndarray:
    """Loss where px.minimize is after so many evaluations, (1, looks); means over seeds."""
    batched = problem.fun is batched_error
    fun: Any = (lambda key, x: problem.fun(x, key)) if batched else problem.fun
    judged = jax.jit(
        lambda xs: jax.lax.map(lambda x: judge(jax.random.key(0), x, jax.random.key(1)), xs)
    )
    losses = []
    for key in jax.random.split(jax.random.key(1), seeds):
        x0, most = jnp.asarray(problem.x), int(looks[-1]) + 200
        points, known = trail(fun, x0, key, most, takes_key=batched)
        at = np.searchsorted(known, looks, side="right") - 1
        losses.append(judged(jnp.stack(points)[at]))
    return np.mean(np.asarray(losses, np.float64), axis=0)[None]


def curves(problem: Problem, num_samples: int, seeds: int) -> dict[str, dict[str, Any]]:
    """Loss after 0, 2, 4, ... steps, (rates, looks), by optimizer and side; means over seeds."""
    x0, adam = jnp.asarray(problem.x), optax.scale_by_adam()
    g = smooth(problem, num_samples, noise=px.Normal())
    carried = px.carry(g)
    many = smooth(problem, max(EXACT, EXACT_PER * x0.size), noise=px.Normal())
    judge = smooth(problem, JUDGES, noise=px.Normal())
    slope = jax.grad(many, argnums=1)(jax.random.key(2), x0, jax.random.key(3))
    # What each rate multiplies of Adam's change and of the gradient itself.
    rates = problem.sigma * np.concatenate(
        [
            np.outer(RATES["Adam"], [1.0, 0.0]),
            np.outer(RATES["gradient descent"], [0.0, 1 / np.linalg.norm(slope)]),
        ]
    )

    def run(rate: Any, key: Any, side: str) -> Any:
        def step(now: Any, key: Any) -> Any:
            x, state, moments = now
            used, data = jax.random.split(key)
            if side == "carried":
                (_, slope), state = carried.value_and_grad(state, used, x, data)
            else:
                slope = jax.grad(g if side == "default" else many, argnums=1)(used, x, data)
            change, moments = adam.update(slope, moments)
            return (x - rate[0] * change - rate[1] * slope, state, moments), None

        def some(now: Any, keys: Any) -> Any:
            loss = judge(jax.random.key(0), now[0], jax.random.key(1))
            return jax.lax.scan(step, now, keys)[0], loss

        start = (x0, carried.init(x0), adam.init(x0))
        keys = jax.random.split(key, (STEPS // JUDGED + 1, JUDGED))
        return jax.lax.scan(some, start, keys)[1]

    found: dict[str, dict[str, Any]] = {name: {} for name in RATES}
    for side in GRADIENTS:
        keys = jax.random.split(jax.random.key(1), 1 if side == "exact" else seeds)
        seeded = jax.vmap(functools.partial(run, side=side), (None, 0))
        every = jax.jit(lambda rs, ks, f=seeded: jax.lax.map(lambda r: f(r, ks), rs))
        losses = np.asarray(every(jnp.asarray(rates, jnp.float32), keys), np.float64).mean(axis=1)
        parts = np.split(losses, [len(RATES["Adam"])])
        for name, part in zip(RATES, parts, strict=True):
            found[name][side] = part
    looks = JUDGED * num_samples * np.arange(STEPS // JUDGED + 1)
    without_rate = minimized(problem, judge, looks, seeds)
    for by_side in found.values():
        by_side["minimize"] = without_rate
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


def target_of(found: dict[str, Any]) -> float:
    """Most of the way to where the default is at last, at its best rate."""
    start = found["default"][0, 0]
    return start + WAY * (found["default"][:, -3:].mean(axis=1).min() - start)


def first(found: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Steps of each side to the target, at the rate that gets there first, and which it is."""
    target = target_of(found)
    steps = {side: [steps_to(c, target) for c in found[side]] for side in SIDES}
    return {side: (min(v), int(np.argmin(v))) for side, v in steps.items()}


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


def variances(cells: dict[str, Any], updates: list[list[float]]) -> str:
    """The tables of variances and of times."""
    rows: dict[str, dict[str, str]] = {}
    totals = []
    for noise, samples in sorted({(cell["noise"], cell["samples"]) for cell in cells.values()}):
        gains, plain, least = [], [], (math.inf, 0.0)
        for cell in cells.values():
            ratios = np.array(cell["ratios"]).reshape(-1, 3)
            if (cell["noise"], cell["samples"]) == (noise, samples) and len(ratios):
                gains.append(mean_of(list(ratios[:, 0])))
                plain.append(mean_of(list(ratios[:, 1])))
                worst = ratios[ratios[:, 0].argmin()]
                least = min(least, (worst[0], worst[2]))
                row = rows.setdefault(cell["problem"], {})
                row[f"{samples} samples, {noise}"] = number(gains[-1])
        capped = mean_of([min(v, CAP) for v in gains])
        about = [f"{samples} samples, {noise}", str(len(gains)), f"{mean_of(plain):.2f}"]
        gained = f"{mean_of(gains):.2f} ({capped:.2f})"
        totals.append([*about, gained, f"{least[0]:.2f} ± {least[1]:.2f}"])
    if not rows:
        return ""
    head = ["variance over that of carried", "problems", "leave-one-out"]
    text = table([*head, f"default (at most {CAP:g} each)", "least of default"], totals)
    columns = [total[0] for total in totals]
    found = [[name, *(row.get(c, "") for c in columns)] for name, row in rows.items()]
    text += "\n\n" + table(["default / carried", *columns], found)
    if updates:
        times = [
            [f"{d:,.0f}", f"{n:.0f}", f"{mid:.2f} ({low:.2f} to {high:.2f})"]
            for d, n, low, mid, high in updates
        ]
        text += "\n\n" + table(["coordinates", "samples", "milliseconds of an update"], times)
    return text + "\n"


def evaluations(cells: dict[str, Any]) -> str:
    """The tables of evaluations to the same loss."""
    driven = [cell for cell in cells.values() if cell["curves"]]
    if not driven:
        return ""
    rows, totals = {cell["problem"]: [cell["problem"]] for cell in driven}, []
    for name, rates in RATES.items():
        all_of, bounded = [], []
        for cell in driven:
            found = first({k: np.array(v) for k, v in cell["curves"][name].items()})
            steps = [found[side][0] for side in SIDES]
            # At the largest rate of all, a step is as long as one likes.
            endless = found["exact"][1] == len(rates) - 1
            told = ["never" if math.isinf(v) else f"{cell['samples'] * v:.0f}" for v in steps]
            rows[cell["problem"]].append(", ".join(told) + " *" * endless)
            ratios = [steps[0] / min(v, 2 * STEPS) for v in steps[1:]]  # never: twice as many
            all_of.append(ratios)
            if not endless:
                bounded.append(ratios)
        for kind, ratios in ("all", all_of), ("without star", bounded):
            logs = np.log(np.array(ratios).reshape(-1, len(SIDES) - 1))
            errors = logs.std(axis=0, ddof=1) / math.sqrt(max(len(logs), 1))
            pairs = zip(np.exp(logs.mean(axis=0)), np.exp(errors), strict=True)
            means = [f"{mean:.2f} (*/ {error:.2f})" for mean, error in pairs]
            totals.append([f"{name}, {kind}", str(len(logs)), *means])
    text = table(["times fewer evaluations than by default", "problems", *SIDES[1:]], totals)
    head = [f"evaluations, {name}: {', '.join(SIDES)}" for name in RATES]
    return text + "\n\n" + table(["problem", *head], list(rows.values())) + "\n"


def draw(cells: dict[str, Any], num_samples: int) -> None:
    """Loss against evaluations of some problems: each side at the rate with which it is first."""
    looks = {
        "default": ("0.55", "-"),
        "carried": ("#1f4e8c", "-"),
        "exact": ("black", ":"),
        "minimize": ("#c8553d", "-"),
    }
    shape = len(RATES), len(SHOWN)
    figure, axes = plt.subplots(*shape, figsize=(3 * shape[1], 2.4 * shape[0]), squeeze=False)
    for row, name in zip(axes, RATES, strict=True):
        for panel, problem in zip(row, SHOWN, strict=True):
            cell = cells[f"{problem}, {num_samples}, Normal"]
            found = {k: np.array(v) for k, v in cell["curves"][name].items()}
            rates = first(found)
            for side, (colour, style) in looks.items():
                curve = found[side][rates[side][1]]
                at = JUDGED * num_samples * np.arange(len(curve))
                panel.plot(at, curve, color=colour, linestyle=style, label=side, linewidth=1.5)
            panel.axhline(target_of(found), color="0.85", linewidth=0.8, zorder=0)
            panel.set_title(f"{problem}, {name}", fontsize=9)
            panel.tick_params(labelsize=7)
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
        row[0].set_ylabel("smoothed loss", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("evaluations", fontsize=8)
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
    parser.add_argument("--seeds", type=int, default=5)
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
            cell["curves"] = jax.tree.map(np.ndarray.tolist, found)
            for name in RATES:
                print(problem.name, num_samples, name, first(found[name]), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**known, "cells": cells}))
    updates = known.get("updates", [])
    if part in (None, "updates"):
        updates = update_times(arguments.seconds)
        path.write_text(json.dumps({"cells": cells, "updates": updates}))
    # In order, however they were measured.
    places = [problem.name for problem in problems()]
    cells = dict(sorted(cells.items(), key=lambda cell: places.index(cell[1]["problem"])))
    pages = {"carried": variances(cells, updates), "carried_evaluations": evaluations(cells)}
    for name, text in pages.items():
        print(text)
        if text and part in (None, "report") and not arguments.problem:
            (ROOT / "docs" / "_generated" / f"{name}.md").write_text(text)
    if pages["carried_evaluations"] and part in (None, "report") and not arguments.problem:
        draw(cells, 16)
    seeds = "keys num_samples, 1,000 to 1,003, 1; problems as in problems.py and here"
    write("carried", seeds, {"cells": cells, "updates": updates})


if __name__ == "__main__":
    main()
