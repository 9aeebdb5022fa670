"""Claim: the number of samples that `px.diagnose` suggests gives the relative error asked for.

For each problem, whose gradient is known exactly, `diagnose` is run at many keys; the true relative
error of the gradient at the number of samples that it suggests is measured over further keys, and
compared with the 10 % that were asked for. Where a diagnosis says that its suggestion is a rough
one, it is done again with as many samples as it says, once: as its reader would.

    python benchmarks/diagnose.py [--keys KEYS] [--only NAME]

Without `--only`, writes docs/_generated/diagnose.md too, after each problem.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import ROOT, table, write

import perturbax as px
from perturbax.diagnostics import _diagnose
from perturbax.diagnostics._layer_subject import subject_of

sys.path.insert(0, str(ROOT / "tests"))
import closed_forms as exact

KEYS = 20
PAGE = ROOT / "docs" / "_generated" / "diagnose.md"
WANTED = 0.1
# Keys for the true relative error: each tells a square of as many numbers as the gradient has.
TRUTH_KEYS, MOST_NUMBERS = 400, 8_000


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function with its exact smoothed gradient (or Jacobian), and how it is perturbed."""

    name: str
    fun: Callable[[jax.Array], jax.Array]
    x: np.ndarray
    sigma: float
    noise: Any
    gradient: np.ndarray
    num_samples: int = 1000
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def points(size, scale=1.0, seed=0):
    return np.random.RandomState(seed).normal(0.0, scale, size)


def separable(name, scalar, profile, x, sigma, noise, law, **settings):
    found = exact.smooth_separable(profile, np.ones(len(x)), x, sigma, law)
    fun = lambda y: jnp.sum(scalar(y).astype(y.dtype))  # noqa: E731
    return Problem(f"{name} ({len(x)})", fun, x, sigma, noise, found.gradient, **settings)


def problems():
    relu, step = exact.relu, exact.step
    normal, gumbel, laplace = px.Normal(), px.Gumbel(), px.Laplace()
    heavy = px.StudentT(6)
    direction = np.array([1.0, -2.0, 0.5, 0.0, 1.0])
    at, scores = np.array([0.3, -0.2, 0.5, 0.1]), exact.SCORES
    matrix, tilt = np.eye(12) / 4, points(12, 0.5, 3)
    window = exact.window(exact.normal)

    def positive(y):
        return y > 0

    def hinge(y):
        return jnp.maximum(y, 0)

    def halfspace(y):
        return (jnp.dot(jnp.asarray(direction, y.dtype), y) > 0.3).astype(y.dtype)

    def ball(y):
        return (jnp.sum(y * y) <= 1.0).astype(y.dtype)

    def quadratic(y):
        return jnp.dot(y, jnp.asarray(matrix, y.dtype) @ y) + jnp.dot(jnp.asarray(tilt, y.dtype), y)

    def bump(y):
        return jnp.exp(-jnp.sum(y * y) / y.shape[0])

    x5, spread = points(5, 0.3, 1), points(6, 0.7, 2)
    some = {"sampler": px.Independent(), "degree": 0}
    pairs = {"sampler": px.Antithetic(), "degree": 1}
    return [
        Problem("window (1)", window.fun, window.x, 0.5, normal, window.exact.gradient),
        separable("steps", positive, step, points(3, 0.3), 0.5, normal, exact.normal),
        separable("steps", positive, step, points(20, 0.3), 0.5, normal, exact.normal),
        separable("steps", positive, step, points(300, 0.3), 0.5, normal, exact.normal),
        separable("ReLU sum", hinge, relu, points(3, 0.1), 0.1, gumbel, exact.gumbel),
        separable("ReLU sum", hinge, relu, points(50, 0.3), 0.3, normal, exact.normal),
        separable("absolute", jnp.abs, exact.absolute, points(10), 0.5, laplace, exact.laplace),
        separable(
            "floor", jnp.floor, exact.floor(400), points(2), 0.5, heavy, exact.student_t(6.0)
        ),
        Problem(
            "halfspace (5)",
            halfspace,
            x5,
            0.4,
            normal,
            exact.smooth_halfspace(direction, 0.3, x5, 0.4, exact.normal).gradient,
        ),
        Problem("ball (4)", ball, at, 0.4, normal, exact.smooth_ball(1.0, at, 0.4).gradient),
        Problem(
            "quadratic (12)",
            quadratic,
            points(12),
            0.3,
            gumbel,
            exact.smooth_quadratic(matrix, tilt, points(12), 0.3, exact.gumbel).gradient,
        ),
        Problem("bump (6)", bump, spread, 0.5, normal, exact.smooth_bump(spread, 0.5).gradient),
        Problem(
            "argmax (3)",
            exact.argmax_one_hot,
            scores,
            0.5,
            gumbel,
            exact.smooth_argmax_gumbel(scores, 0.5).gradient,
        ),
        Problem(
            "ranks (3)",
            exact.ranks,
            scores,
            0.5,
            normal,
            exact.smooth_ranks(scores, 0.5, exact.normal).gradient,
        ),
        separable(
            "steps, independent", positive, step, x5, 0.5, normal, exact.normal, options=some
        ),
        separable("ReLU sum, pairs", hinge, relu, x5, 0.3, normal, exact.normal, options=pairs),
        separable(
            "steps, pilot of 100", positive, step, x5, 0.5, normal, exact.normal, num_samples=100
        ),
        separable(
            "ReLU sum, pilot of 100",
            hinge,
            relu,
            points(30, 0.3),
            0.3,
            gumbel,
            exact.gumbel,
            num_samples=100,
        ),
    ]


def suggestions(problem, num_keys):
    """What `diagnose` suggests at each key; programs are compiled once for all of them.

    Other samplers are left out, not from the budget, for nothing that is suggested depends on them.
    """
    subjects = {}

    def diagnosis(key, num_samples):
        if num_samples not in subjects:
            x = jnp.asarray(problem.x, jnp.float32)
            subjects[num_samples] = subject_of(make(problem, num_samples), key, x, (), {})
        subject = subjects[num_samples]
        subject._key, subject.num_evaluations = key, 0
        found = _diagnose._examine(subject, WANTED)
        assert found.num_evaluations <= 5 * num_samples + 1
        return found

    _diagnose._alternatives = lambda *_: iter(())
    found = []
    for key in jax.random.split(jax.random.key(1), num_keys):
        one, again = diagnosis(key, problem.num_samples), False
        if not one.settled and one.suggested_num_samples is not None:
            again = True
            # To one digit, so that keys share programs.
            number = max(one.suggested_num_samples, 2 * problem.num_samples)
            one = diagnosis(jax.random.fold_in(key, 1), round(number, 1 - len(str(number))))
        found.append((one.suggested_num_samples, one.suggested_range, again))
    return found


def make(problem, num_samples):
    return px.make_perturbed_fun(
        problem.fun, num_samples, problem.sigma, problem.noise, **problem.options
    )


def true_error(problem, num_samples):
    """Root mean square error of the gradient over its length."""
    g = make(problem, num_samples)
    x = jnp.asarray(problem.x, jnp.float32)

    @jax.jit
    def squares(keys):
        one = lambda key: jnp.sum((jax.jacrev(g, 1)(key, x) - problem.gradient) ** 2)  # noqa: E731
        return jax.lax.map(one, keys)

    num_keys = min(TRUTH_KEYS, MOST_NUMBERS // problem.gradient.size)
    found = np.asarray(squares(jax.random.split(jax.random.key(2), num_keys)))
    return np.sqrt(found.mean()) / np.linalg.norm(problem.gradient)


def page(rows, num_keys):
    """A table of what was measured."""
    head = ["problem", "noise", "pilot", "suggested", "again", "error there"]
    head += ["at most 1.3 x", "within 1.3"]
    good = sum(float(row[-2].split()[0]) >= 90 for row in rows)
    return (
        f"{table(head, rows)}\n\n*{num_keys} keys each, 10 % asked for. In nine diagnoses of ten, "
        f"the error is at most 1.3 times that on {good} of {len(rows)} problems.*\n"
    )


def main(num_keys=KEYS, only=""):
    results, rows = [], []
    for problem in problems():
        if only not in problem.name:
            continue
        found = suggestions(problem, num_keys)
        errors, truth = [], {}
        for number, *_ in found:
            if number is not None and number not in truth:
                truth[number] = true_error(problem, number)
            errors.append(truth.get(number, np.nan))
        errors = np.array(errors) / WANTED
        numbers = [number for number, *_ in found if number is not None]
        within = np.mean((errors >= 1 / 1.3) & (errors <= 1.3))
        row = [
            problem.name,
            type(problem.noise).__name__,
            f"{problem.num_samples:,}",
            f"{np.median(numbers):,.0f}" if numbers else "none",
            f"{sum(again for *_, again in found)}",
            f"{100 * np.nanmedian(errors) * WANTED:.1f} %",
            f"{100 * np.mean(errors <= 1.3):.0f} %",
            f"{100 * within:.0f} %",
        ]
        rows.append(row)
        results.append(
            {
                "problem": problem.name,
                "suggested": [number for number, *_ in found],
                "range": [ends for _, ends, _ in found],
                "again": [again for *_, again in found],
                "relative_error": errors.tolist(),
            }
        )
        print(" | ".join(row), flush=True)
        if not only:
            PAGE.write_text(page(rows, num_keys))
    print(page(rows, num_keys))
    write("diagnose", f"{num_keys} keys split from 1", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    main(args.keys, args.only)
