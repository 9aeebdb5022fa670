"""Claim: what `px.minimize` takes to a target, beside the optimisers that one would use instead.

Each method minimises each problem of optimizer_problems.py ten times, from ten starts, with its
defaults, and every evaluation counts. A run ends at the problem's hard target or after
`--budget` x sqrt(coordinates) evaluations (half of it in control). Rivals are told a sensible scale
(a first standard deviation; differential evolution a box); `px.minimize` is told nothing. Runs are
appended to build/benchmarks/optimizers.jsonl, and those that are there are not made again, so the
script may be interrupted, and run for a few problems or methods at a time.

    python benchmarks/optimizers.py [--problems REGEX] [--methods REGEX] [--seeds N] [--budget B]
    python benchmarks/optimizers.py --report

The rivals come with `pip install 'perturbax[rivals]'`. The report (a table and the sentences under
it in docs/_generated/optimizers.md, data profiles in docs/_static/optimizers.png) is made of all
runs there are.
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
from timing import OUTPUT, ROOT, machine, table

import perturbax as px

RUNS = OUTPUT / "optimizers.jsonl"
BUDGET = 500
SEEDS = 10
OURS = "px.minimize"
OPTAX_SAMPLES = 100
ADAM = optax.adam(0.05)


class Enough(Exception):  # noqa: N818
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


def minimize(problem, seed, counter, optimizer=None):
    def follow(progress):
        counter.note(progress.evaluations, progress.best_value)
        return counter.reached[1] is not None

    px.minimize(
        problem.fun,
        jnp.asarray(problem.start(seed), jnp.float32),
        jax.random.key(seed),
        args=problem.args,
        optimizer=optimizer,
        max_evaluations=counter.most,
        callback=follow,
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
    runs = [json.loads(line) for line in lines if line.strip()]
    return {(run["problem"], run["method"], run["seed"]): run for run in runs}


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
