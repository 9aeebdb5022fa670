"""Claim: what `px.minimize` takes to a target, beside the optimisers that one would use instead.

Each method minimises each problem of optimizer_problems.py ten times, from ten starts, with its
defaults, and every evaluation counts. A run ends at the problem's hard target or after
`--budget` x sqrt(coordinates) evaluations (half of it in control). Rivals are told a sensible scale
(a first standard deviation; differential evolution a box); `px.minimize` is told nothing. A target
counts as reached at the very evaluation that reached it, for rivals in the order of a generation,
for `px.minimize` in the order of a step: its proposal, then its samples. Runs are appended to
build/benchmarks/optimizers.jsonl, and those that are there, or in docs/_generated/optimizers.json,
are not made again, so the script may be interrupted, and run for a few problems or methods at a
time.

    python benchmarks/optimizers.py [--problems REGEX] [--methods REGEX] [--seeds N] [--budget B]
    python benchmarks/optimizers.py --report

The rivals come with `pip install 'perturbax[rivals]'`. The report (tables and the sentences under
them in docs/_generated/optimizers.md, data profiles in docs/_static/optimizers.png) is made of all
runs there are, and keeps them in docs/_generated/optimizers.json.
"""

import argparse
import functools
import importlib.util
import json
import math
import re
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optimizer_problems import all_problems, budget
from timing import OUTPUT, ROOT, machine, table, version

import perturbax as px

RUNS = OUTPUT / "optimizers.jsonl"
BUDGET = 500
SEEDS = 10
OURS = "px.minimize"
RIVALS = "cma", "nevergrad", "evosax", "cocoex", "gymnax"
OPTAX_SAMPLES = 100
ADAM = optax.adam(0.05)


class Enough(Exception):
    """The target is reached, or all evaluations are used."""


class Counter:
    """Counts evaluations, and notes at which one each target was reached."""

    def __init__(self, problem, seed, most):
        """Prepares the problem."""
        problem.prepare(seed)
        self.many, self.targets, self.most = problem.many, problem.targets(seed), most
        problem.prepare(seed)
        self.made, self.best = 0, math.inf
        self.reached = [None, None]

    def __call__(self, points):
        """Values at points (n, dim)."""
        points = np.atleast_2d(points)[: self.most - self.made]
        values = self.many(points)
        for value in values:
            self.note(self.made + 1, float(value))
        if self.made >= self.most or self.reached[1]:
            raise Enough
        return values

    def note(self, made, value):
        """Takes down a value and the number of evaluations made."""
        self.made = made
        self.best = min(self.best, value)
        for i, target in enumerate(self.targets):
            if self.reached[i] is None and self.best <= target:
                self.reached[i] = made

    def one(self, x):
        """The value at one point."""
        return float(self(x)[0])


# ----------------------------------------------------------------------------------- methods


# Values of the function since the last step, an array for each call of the host.
# One list for all runs: with a callback of its own each would be compiled anew.
SEEN = []


def take_down(values):
    SEEN.append(np.ravel(values))
    return values


def minimize(problem, seed, counter, optimizer=None):
    def seen(x, *args):
        value = problem.fun(x, *args)
        return jax.pure_callback(take_down, value, value, vmap_method="expand_dims")

    def follow(progress):
        *before, one, other = SEEN
        SEEN.clear()
        # A step's proposal and samples are evaluated in either order; the proposal stands first.
        values = np.concatenate([*before, *sorted((one, other), key=len)])
        if counter.made + len(values) != progress.evaluations:
            raise AssertionError(f"{counter.made} + {len(values)} is not {progress.evaluations}")
        for value in values:
            counter.note(counter.made + 1, float(value))
        return counter.reached[1] is not None

    def follow_centres(progress):
        """An optimiser's samples are not what it finds, as with optax."""
        counter.note(progress.evaluations, progress.best_value)
        return counter.reached[1] is not None

    SEEN.clear()
    px.minimize(
        seen if optimizer is None else problem.fun,
        jnp.asarray(problem.start(seed), jnp.float32),
        jax.random.key(seed),
        args=problem.args,
        optimizer=optimizer,
        max_evaluations=counter.most,
        callback=follow if optimizer is None else follow_centres,
        progress=False,
    )


def cma(problem, seed, counter):
    import cma

    options = {"seed": seed + 1, "verbose": -9, "maxfevals": counter.most}
    while True:  # it restarts where it converges
        search = cma.CMAEvolutionStrategy(problem.start(seed), problem.width, options)
        while not search.stop():
            points = search.ask()
            search.tell(points, counter(np.array(points)))
        if "maxfevals" in search.stop():
            return
        options["seed"] += 1000


def nevergrad(problem, seed, counter):
    import nevergrad as ng

    space = ng.p.Array(init=problem.start(seed)).set_mutation(sigma=problem.width)
    space.random_state.seed(seed)
    search = ng.optimizers.NGOpt(parametrization=space, budget=counter.most)
    search.minimize(counter.one)


def evosax(problem, seed, counter, name):
    from evosax import algorithms

    dim = problem.dim
    # evosax has no default for it: that of CMA-ES, made even.
    size = 2 * math.ceil((4 + int(3 * math.log(dim))) / 2)
    search, ask, tell = compiled_evosax(getattr(algorithms, name), size, dim)
    params = search.default_params
    if hasattr(params, "std_init"):
        params = params.replace(std_init=problem.width)
    key = jax.random.key(seed)
    state = search.init(key, jnp.asarray(problem.start(seed), jnp.float32), params)
    while True:
        key, ask_key, tell_key = jax.random.split(key, 3)
        points, state = ask(ask_key, state, params)
        values = jnp.asarray(counter(np.asarray(points)), jnp.float32)
        state, _ = tell(tell_key, points, values, state, params)


@functools.cache
def compiled_evosax(algorithm, size, dim):
    search = algorithm(size, jnp.zeros(dim))
    return search, jax.jit(search.ask), jax.jit(search.tell)


def differential_evolution(problem, seed, counter):
    from scipy.optimize import differential_evolution

    low, high = problem.box
    differential_evolution(
        counter.one,
        [(low, high)] * problem.dim,
        x0=np.clip(problem.start(seed), low, high),
        rng=seed,
        maxiter=10**9,
        polish=False,
    )


def nelder_mead(problem, seed, counter):
    from scipy.optimize import minimize

    options = {"maxfev": counter.most, "maxiter": 10**9}
    minimize(counter.one, problem.start(seed), method="Nelder-Mead", options=options)


def optax_adam(problem, seed, counter):
    """As in optax's documentation, but for 100 samples a step in place of 1,000, and a rate."""
    step = compiled_optax(problem.fun, problem.dim)
    x = jnp.asarray(problem.start(seed), jnp.float32)
    state, key = ADAM.init(x), jax.random.key(seed)
    while counter.reached[1] is None and counter.made + OPTAX_SAMPLES < counter.most:
        key, draw = jax.random.split(key)
        value, x, state = step(draw, x, state, *problem.args)
        # The value at x is optax's baseline, so it is paid for already.
        counter.note(counter.made + OPTAX_SAMPLES + 1, float(value))


@functools.lru_cache(maxsize=1)
def compiled_optax(fun, dim):
    @jax.jit
    def step(key, x, state, *args):
        smooth = optax.perturbations.make_perturbed_fun(lambda x: fun(x, *args), OPTAX_SAMPLES)
        updates, state = ADAM.update(jax.grad(smooth, argnums=1)(key, x), state)
        return fun(x, *args), optax.apply_updates(x, updates), state

    return step


METHODS = {
    OURS: minimize,
    "px.minimize, Adam": functools.partial(minimize, optimizer=ADAM),
    "cma": cma,
    "nevergrad": nevergrad,
    "evosax CMA-ES": functools.partial(evosax, name="CMA_ES"),
    "evosax OpenES": functools.partial(evosax, name="Open_ES"),
    "evosax SNES": functools.partial(evosax, name="SNES"),
    "scipy DE": differential_evolution,
    "scipy Nelder-Mead": nelder_mead,
    "optax + Adam": optax_adam,
}

# -------------------------------------------------------------------------------------- runs


def done():
    """Runs that there are, the last of each problem, method and seed."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    runs = [*kept(), *(json.loads(line) for line in lines if line.strip())]
    return {(run["problem"], run["method"], run["seed"]): run for run in runs}


def kept():
    """Runs of the last report."""
    problems = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return [
        {"problem": name, "method": method, "seed": int(seed), "reached": reached, **about}
        for name, (about, methods) in problems.items()
        for method, seeds in methods.items()
        for seed, reached in seeds.items()
    ]


def keep(runs):
    """Writes what a report needs of the runs, a line for each problem."""
    problems = {}
    for run in sorted(runs, key=lambda run: (run["problem"], run["method"], run["seed"])):
        about = {key: run[key] for key in ("label", "group", "dim", "most")}
        _, methods = problems.setdefault(run["problem"], (about, {}))
        methods.setdefault(run["method"], {})[str(run["seed"])] = run["reached"]
    lines = [
        f"{json.dumps(name)}:{json.dumps(found, separators=(',', ':'))}"
        for name, found in problems.items()
    ]
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def run(name, problem, method, seed, factor):
    most = budget(problem, factor)
    counter = Counter(problem, seed, most)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            METHODS[method](problem, seed, counter)
        except Enough:
            pass
    return {
        "problem": name,
        "label": problem.label,
        "group": problem.group,
        "dim": problem.dim,
        "method": method,
        "seed": seed,
        "most": most,
        "targets": counter.targets,
        "reached": counter.reached,
        "made": counter.made,
        "best": counter.best,
        "seconds": round(time.process_time() - begun, 3),
    }


# ------------------------------------------------------------------------------------ report

PAGE = ROOT / "docs" / "_generated" / "optimizers.md"
KEPT = ROOT / "docs" / "_generated" / "optimizers.json"
PICTURE = ROOT / "docs" / "_static" / "optimizers.png"
SHORT = {
    "evosax CMA-ES": "evosax<br>CMA-ES",
    "evosax OpenES": "evosax<br>OpenES",
    "evosax SNES": "evosax<br>SNES",
    "scipy DE": "scipy<br>DE",
    "scipy Nelder-Mead": "scipy<br>NM",
    "optax + Adam": "optax<br>+ Adam",
    OURS: "`px.`<br>`minimize`",
}
COLOURS = {OURS: "#1f4e8c", "cma": "#b3400e", "nevergrad": "#3a7d44", "evosax SNES": "#8a5aa8"}
GREYS = {
    "evosax CMA-ES": ("--", "0.3"),
    "evosax OpenES": (":", "0.2"),
    "scipy DE": ("-.", "0.4"),
    "scipy Nelder-Mead": ((0, (1, 4)), "0.2"),
    "optax + Adam": ((0, (8, 2, 1, 2, 1, 2)), "0.5"),
}
MANY = 40


class Row:
    """Evaluations of each method to the hard target of one problem."""

    def __init__(self, runs):
        """Takes the runs of one problem."""
        self.label, self.group, self.dim = (runs[0][k] for k in ("label", "group", "dim"))
        self.most = runs[0]["most"]
        self.reached = {}
        for run in runs:
            self.reached.setdefault(run["method"], []).append(run["reached"][1] or math.inf)

    def median(self, method):
        """Median over seeds, infinite where fewer than half get there."""
        return float(np.median(self.reached[method]))

    def rivals(self):
        """Methods that are not ours."""
        return [m for m in METHODS if m in self.reached and not m.startswith(OURS)]

    def best_rival(self):
        """The one with the lowest median."""
        return min(self.rivals(), key=self.median)

    def gain(self):
        """The best rival's evaluations over ours; who does not get there counts with all."""
        best = min(self.median(self.best_rival()), self.most)
        return best / min(self.median(OURS), self.most)

    def times(self, method):
        """How many runs get there."""
        return sum(map(math.isfinite, self.reached[method]))

    def solved(self):
        """Whether anyone gets there."""
        return any(math.isfinite(self.median(m)) for m in self.reached)

    def cell(self, method):
        """The median, bold if it is the lowest, or how many runs got there."""
        if method not in self.reached:
            return ""
        median, found = self.median(method), self.reached[method]
        if not math.isfinite(median):
            return f"{self.times(method)}/{len(found)}"
        best = all(median <= self.median(other) for other in self.reached)
        return f"**{median:,.0f}**" if best else f"{median:,.0f}"


def rows_of(runs):
    names = {}
    for run in runs:
        if run["method"] in METHODS and run["method"] != "px.minimize, Adam":
            names.setdefault(run["problem"], []).append(run)
    order = {name: i for i, name in enumerate(all_problems())}
    chosen = sorted(names, key=lambda name: order.get(name, len(order)))
    rows = [Row(names[name]) for name in chosen]
    rows = [row for row in rows if OURS in row.reached and row.rivals()]
    return sorted(rows, key=lambda row: row.dim < MANY)


def mean_gain(rows):
    return math.exp(np.mean([math.log(row.gain()) for row in rows]))


def better_rivals(rows):
    """For each rival, the problems on which it is the best and better than ours by a twentieth."""
    found = {}
    for row in rows:
        best, count = row.best_rival(), row.times
        if not row.solved():
            best = max(row.rivals(), key=count)
            if count(best) > count(OURS):
                runs = "1 run gets" if count(best) == 1 else f"{count(best)} runs get"
                words = f"{runs} there, {count(OURS)} of `px.minimize`'s"
                found.setdefault(best, []).append(f"*{row.label}* ({words})")
        elif row.median(best) < row.median(OURS) / 1.05:  # ten runs tell no less
            ours = row.median(OURS)
            instead = f"{ours:,.0f}" if math.isfinite(ours) else "more than it was given"
            words = f"{row.median(best):,.0f} evaluations, `px.minimize` {instead}"
            found.setdefault(best, []).append(f"*{row.label}* ({words})")
    return [f"- Use **{best}** if yours is like {'; '.join(few)}." for best, few in found.items()]


def report():
    runs = list(done().values())
    keep(runs)
    rows = rows_of(runs)
    methods = [m for m in METHODS if any(m in row.reached for row in rows)]
    head = ["problem (coordinates)", *(SHORT.get(m, m) for m in methods), "best rival / ours"]
    lines = []
    for words, part in (
        (f"{MANY} coordinates and more", [row for row in rows if row.dim >= MANY]),
        (f"Fewer than {MANY} coordinates", [row for row in rows if row.dim < MANY]),
    ):
        told = [row for row in part if row.solved()]
        if not told:
            continue
        cells = [
            [
                row.label,
                *(row.cell(m) for m in methods),
                f"{row.gain():.2f}" if row.solved() else "",
            ]
            for row in part
        ]
        ahead = sum(row.gain() > 1 for row in told)
        lines += [
            f"### {words}",
            "",
            f"Geometric mean of the last column: **{mean_gain(told):.2f}**; `px.minimize` is "
            f"ahead on {ahead} of {len(told)} problems.",
            "",
            "Where a rival is better by more than a twentieth:",
            "",
            *better_rivals(part),
            "",
            table(head, cells),
            "",
        ]
    counts = [len(found) for row in rows for found in row.reached.values()]
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    about = machine()
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("cma", "nevergrad", "evosax", "scipy", "optax", "coco-experiment", "gymnax")
        if version(name)
    )
    lines.append(
        f"*Medians of {seeds} runs; jax {about['jax']}, {versions}; {about['date'][:10]}.*"
    )
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n")
    draw(runs, rows)
    print("\n".join(lines))


def draw(runs, rows):
    """Data profiles: share of all runs and targets that were reached, against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    labels = {row.label for row in rows}
    parts = [
        (f"{MANY} coordinates and more", lambda dim: dim >= MANY),
        (f"fewer than {MANY} coordinates", lambda dim: dim < MANY),
    ]
    parts = [p for p in parts if any(p[1](row.dim) for row in rows)]
    canvas, axes = plt.subplots(
        1,
        len(parts),
        figsize=(4.6 * len(parts) + 2.2, 3.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, holds) in zip(axes[0], parts, strict=True):
        mine = [r for r in runs if r["label"] in labels and holds(r["dim"])]
        most = max(r["most"] / math.sqrt(r["dim"]) for r in mine)
        for method in METHODS:
            of = [r for r in mine if r["method"] == method]
            if not of or method == "px.minimize, Adam":
                continue
            effort = [
                at / math.sqrt(r["dim"]) if at else math.inf for r in of for at in r["reached"]
            ]
            grid = np.geomspace(1, most, 400)
            share = np.searchsorted(np.sort(effort), grid, side="right") / len(effort)
            style, colour = GREYS.get(method) or ("-", COLOURS[method])
            width = 2.4 if method == OURS else 1.2
            axis.plot(grid, share, linestyle=style, color=colour, label=method, linewidth=width)
        axis.set(xscale="log", xlim=(3, most), ylim=(0, 1), title=title)
        axis.set_xlabel("evaluations / √coordinates")
    axes[0, 0].set_ylabel("share of runs and targets reached")
    canvas.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False
    )
    PICTURE.parent.mkdir(exist_ok=True)
    canvas.savefig(PICTURE, dpi=130)
    plt.close(canvas)


def chosen(names, pattern):
    return [name for name in names if re.search(pattern, name)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", default="", help="regular expression of names")
    parser.add_argument("--methods", default="", help="regular expression of names")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--budget", type=float, default=BUDGET)
    parser.add_argument("--again", action="store_true", help="make runs anew")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--list", action="store_true", help="names of problems and methods")
    arguments = parser.parse_args()
    if arguments.report:
        report()
        return
    missing = [name for name in RIVALS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"{', '.join(missing)} not installed: the rivals come with pip install "
            "'perturbax[rivals]'"
        )
    makers = all_problems()
    if arguments.list:
        print("\n".join([*makers, "", *METHODS]))
        return
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    known = {} if arguments.again else done()
    for name in chosen(makers, arguments.problems):
        problem = None
        for method in chosen(METHODS, arguments.methods):
            seeds = [s for s in range(arguments.seeds) if (name, method, s) not in known]
            if not seeds:
                continue
            problem = problem or makers[name]()
            found = []
            with RUNS.open("a") as file:
                for seed in seeds:
                    found.append(run(name, problem, method, seed, arguments.budget))
                    file.write(json.dumps(found[-1]) + "\n")
                    file.flush()
            told = [f"{r['reached'][0]}/{r['reached'][1] or round(r['best'], 4)}" for r in found]
            seconds = sum(r["seconds"] for r in found)
            print(f"{name:24} {method:20} {seconds:6.1f} s  {' '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
