"""Claim: what earlier steps saw makes gradients more precise, at the same number of evaluations.

Along optimisations of a hundred steps (Adam, driven by gradients of the default) a carried function
sees every step. At some steps, the variance of its gradient at that point and state, over many
keys, is compared with the default's and with that of independent samples less the mean of the
others (leave-one-out), at the same number of samples. Geometric means over steps; "least" is the
least of all steps, with its standard error. Then both optimise for themselves, with the best of
several rates each: evaluations to the loss that the default reaches at the end.

    python benchmarks/carried.py [--samples N ...] [--problem NAME ...] [--keys K]
"""

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import held_back, suite
from timing import table, write

import perturbax as px

STEPS = 100
LOOKS = (14, 39, 69, 99)
RATES = (0.01, 0.03, 0.1, 0.3)
FEW_CAPPED = 10.0


def problems():
    """Of the two suites, those whose size is in the range that the claim is about."""
    chosen = [p for p in suite() + held_back() if 5 < p.x.size < 200]
    return [p for p in chosen if "median" not in p.name]


def smooth(problem, num_samples):
    return px.make_perturbed_fun(problem.fun, num_samples, problem.sigma, px.Normal())


def variance(gradients):
    """Summed over coordinates, and its relative standard error."""
    squares = np.sum((gradients - gradients.mean(axis=0)) ** 2, axis=1)
    mean = squares.mean()
    return mean, squares.std() / max(mean, 1e-30) / math.sqrt(len(squares))


def along(problem, num_samples, num_keys):
    """Ratios of variances at LOOKS, of the default and of leave-one-out over the carried one."""
    g = smooth(problem, num_samples)
    alone = px.make_perturbed_fun(
        problem.fun, num_samples, problem.sigma, px.Normal(), sampler=px.Independent(), degree=0
    )
    carried = px.carry(g)
    adam = optax.adam(0.03 * problem.sigma)

    @jax.jit
    def advance(x, state, moments, key):
        used, other = jax.random.split(key)
        slope = jax.grad(g, argnums=1)(used, x)
        _, state = carried.value_and_grad(state, other, x)
        step, moments = adam.update(slope, moments)
        return x + step, state, moments

    @jax.jit
    def gradients(x, state, keys):
        ours = jax.lax.map(lambda k: carried.value_and_grad(state, k, x)[0][1], keys, batch_size=32)
        return ours, *(
            jax.lax.map(lambda k, f=f: jax.grad(f, argnums=1)(k, x), keys, batch_size=32)
            for f in (g, alone)
        )

    x = jnp.asarray(problem.x)
    state, moments = carried.init(x), adam.init(x)
    ratios = []
    for step, key in enumerate(jax.random.split(jax.random.key(num_samples), STEPS)):
        if step in LOOKS:
            keys = jax.random.split(jax.random.fold_in(key, 1), num_keys)
            found = [variance(np.asarray(v)) for v in gradients(x, state, keys)]
            (ours, e0), (default, e1), (plain, _) = found
            if default > 0:
                floor = max(ours, 1e-12 * default)
                ratios.append(
                    (default / floor, plain / floor, default / floor * math.hypot(e0, e1))
                )
        x, state, moments = advance(x, state, moments, key)
    return np.array(ratios)


def evaluations_to(problem, num_samples, seeds=5):
    """Evaluations of default and carried to what the default reaches in STEPS, best rates each."""
    g, x0 = smooth(problem, num_samples), jnp.asarray(problem.x)
    carried = px.carry(g)
    judge = px.make_perturbed_fun(problem.fun, 1000, problem.sigma, px.Normal())

    def run(rate, key, learn):
        adam = optax.adam(rate * problem.sigma)

        def step(now, key):
            x, best, state, moments = now
            if learn:
                (_, slope), state = carried.value_and_grad(state, key, x)
            else:
                slope = jax.grad(g, argnums=1)(key, x)
            change, moments = adam.update(slope, moments)
            x = x + change
            return (x, best, state, moments), judge(jax.random.key(0), x)

        start = (x0, 0.0, carried.init(x0), adam.init(x0))
        return jax.lax.scan(step, start, jax.random.split(key, STEPS))[1]

    keys = jax.random.split(jax.random.key(1), seeds)
    curves = {}
    for learn in (False, True):
        one = jax.jit(jax.vmap(functools.partial(run, learn=learn), (None, 0)))
        # A rate is chosen for the mean of the last steps.
        found = [np.asarray(one(rate, keys)) for rate in RATES]
        curves[learn] = min(found, key=lambda curve: curve[:, -10:].mean()).mean(axis=0)
    target = curves[False][-10:].mean()
    steps = [
        int(np.argmax(curves[learn] <= target)) + 1 if (curves[learn] <= target).any() else None
        for learn in (False, True)
    ]
    return steps


def update_time(dim, num_samples):
    """Milliseconds of a step beyond one of the default, of a function that costs nothing."""
    x = jnp.zeros(dim)
    g = px.make_perturbed_fun(lambda x: jnp.sum(jnp.sign(x)), num_samples, 0.3, px.Normal())
    carried = px.carry(g)
    state = carried.init(x)
    with_state = jax.jit(carried.value_and_grad)
    without = jax.jit(jax.value_and_grad(g, argnums=1))
    times = {"carried": [], "default": []}
    for turn in range(40):
        key = jax.random.key(turn)
        start = time.perf_counter()
        (_, _), state = jax.block_until_ready(with_state(state, key, x))
        middle = time.perf_counter()
        jax.block_until_ready(without(key, x))
        times["carried"].append(middle - start)
        times["default"].append(time.perf_counter() - middle)
    return 1e3 * (np.median(times["carried"][5:]) - np.median(times["default"][5:]))


def main() -> None:
    """Prints the tables, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--problem", nargs="*", default=None)
    parser.add_argument("--keys", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    rows, results = [], []
    for num_samples in arguments.samples:
        gains, plain, speedups = [], [], []
        for problem in problems():
            if arguments.problem and problem.name not in arguments.problem:
                continue
            ratios = along(problem, num_samples, arguments.keys)
            steps = evaluations_to(problem, num_samples, arguments.seeds)
            gain, over_plain = np.exp(np.log(ratios[:, :2]).mean(axis=0))
            least = int(np.argmin(ratios[:, 0]))
            gains.append(gain)
            plain.append(over_plain)
            if None not in steps:
                speedups.append(steps[0] / steps[1])
            rows.append(
                [
                    problem.name,
                    str(num_samples),
                    f"{gain:.2f}",
                    f"{over_plain:.2f}",
                    f"{ratios[least, 0]:.2f} ± {ratios[least, 2]:.2f}",
                    " / ".join("never" if s is None else str(s * num_samples) for s in steps),
                ]
            )
            results.append(
                {
                    "problem": problem.name,
                    "num_samples": num_samples,
                    "ratios": ratios.tolist(),
                    "steps": steps,
                }
            )
            print(rows[-1], flush=True)
        capped = np.minimum(gains, FEW_CAPPED)
        rows.append(
            [
                f"geometric mean (each counted as {FEW_CAPPED:g} at most)",
                str(num_samples),
                f"{np.exp(np.log(gains).mean()):.2f} ({np.exp(np.log(capped).mean()):.2f})",
                f"{np.exp(np.log(plain).mean()):.2f}",
                "",
                f"{np.exp(np.log(speedups).mean()):.2f} times fewer" if speedups else "",
            ]
        )
    heads = [
        "problem",
        "samples",
        "variance, default / carried",
        "leave-one-out / carried",
        "least of the steps",
        "evaluations to the default's last loss, default / carried",
    ]
    print(table(heads, rows))
    times = {(d, n): update_time(d, n) for d in (20, 144, 1000) for n in arguments.samples}
    print(
        table(
            ["coordinates", "samples", "milliseconds of an update"],
            [[f"{d:,}", str(n), f"{t:.2f}"] for (d, n), t in times.items()],
        )
    )
    seeds = "keys num_samples, 0 and 1; problems as in problems.py"
    write("carried", seeds, {"problems": results, "updates": [[*k, t] for k, t in times.items()]})


if __name__ == "__main__":
    main()
