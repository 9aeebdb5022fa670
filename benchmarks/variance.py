"""Claim: at equal numbers of evaluations, derivatives are more precise, usually in no more time.

On every problem of `problems.py`, with both noises and 100 and 1,000 samples: the gradient, and for
up to 20 dimensions the Hessian, by perturbax and by optax.perturbations, each with its defaults.
Reported are the variance ratio (summed over coordinates, between keys), the time ratio, and the
product of both: how much more computing optax.perturbations needs for the same precision. Each is
theirs over ours.

The time ratio is the median over turns; the error of a variance ratio is one standard error. Where
an estimate is exact to rounding, its variance counts as that of float32's rounding, so ratios stay
finite; geometric means are given with products as they are and with products over 100 taken as 100.

    python benchmarks/variance.py [--only NAME ...] [--seconds SECONDS]

Without --only, writes docs/_generated/variance.md and docs/_static/variance.png too.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax.perturbations
from problems import held_back, suite
from timing import ROOT, alternate, keys, table, write

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MOST = 300
LARGEST_HESSIAN = 20
CAP = 100.0
COUNTS = (100, 1_000)
NOISES = ("Normal", "Gumbel")
# Derivative, samples: geometric mean and least product that are aimed at.
AIMS = {("gradient", 1_000): (10, 1), ("gradient", 100): (3, 1), ("Hessian", 1_000): (10, 1)}


def spread_of(estimates):
    """Squared distances of estimates from their mean, and the variance summed over coordinates."""
    estimates = np.asarray(estimates, np.float64).reshape(len(estimates), -1)
    mean = estimates.mean(axis=0)
    squares = np.sum((estimates - mean) ** 2, axis=1)
    rounding = np.sum((np.finfo(np.float32).eps * mean) ** 2)
    return squares, np.sum(squares) / (len(squares) - 1), rounding


def compare(problem, noise, num_samples, derivative, turns, seconds):
    """Both libraries on one problem."""
    x = jnp.asarray(problem.x)
    transform = {"gradient": jax.grad, "Hessian": jax.hessian}[derivative]
    calls = {}
    for name, library in (("perturbax", px), ("optax", optax.perturbations)):
        smooth = library.make_perturbed_fun(
            problem.fun, num_samples, problem.sigma, getattr(library, noise)()
        )
        derived = jax.jit(transform(smooth, argnums=1))
        calls[name] = lambda turn, f=derived: f(turns[turn], x)
    timing = alternate(calls, seconds, least=4, most=MOST, keep=True)
    ours, theirs = (spread_of(timing.results[name]) for name in ("perturbax", "optax"))
    floor = max(ours[2], theirs[2], np.finfo(np.float64).tiny)
    ratio = max(theirs[1], floor) / max(ours[1], floor)
    relative = [
        np.std(squares, ddof=1) / max(np.mean(squares), floor) / math.sqrt(len(squares))
        for squares, _, _ in (ours, theirs)
    ]
    times = timing.ratio("optax", "perturbax")
    return {
        "problem": problem.name,
        "dim": problem.x.size,
        "noise": noise,
        "num_samples": num_samples,
        "derivative": derivative,
        "variance_ratio": ratio,
        "variance_ratio_error": ratio * math.hypot(*relative),
        "to_rounding": bool(ours[1] <= floor),
        "time_ratio": times,
        "milliseconds": {name: timing.milliseconds(name) for name in timing.names},
        "product": ratio * times["median"],
    }


def measure(problems, counts, seconds, tell=True):
    turns = keys(MOST)
    results = []
    for problem in problems:
        start = time.perf_counter()
        derivatives = ["gradient"] + ["Hessian"] * (problem.x.size <= LARGEST_HESSIAN)
        for derivative in derivatives:
            for num_samples in counts:
                for noise in NOISES:
                    results.append(compare(problem, noise, num_samples, derivative, turns, seconds))
        if tell:
            print(f"{problem.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return results


def summarise(results):
    """Geometric means and least products, by derivative and number of samples."""
    summaries = []
    for derivative, num_samples in sorted(
        {(r["derivative"], r["num_samples"]) for r in results}, reverse=True
    ):
        chosen = [
            r for r in results if (r["derivative"], r["num_samples"]) == (derivative, num_samples)
        ]
        products = np.array([r["product"] for r in chosen])
        worst = chosen[int(np.argmin(products))]
        mean, least = AIMS.get((derivative, num_samples), (None, None))
        capped = geometric_mean(np.minimum(products, CAP))
        summaries.append(
            {
                "derivative": derivative,
                "num_samples": num_samples,
                "cells": len(chosen),
                "variance": geometric_mean([r["variance_ratio"] for r in chosen]),
                "time": geometric_mean([r["time_ratio"]["median"] for r in chosen]),
                "product": geometric_mean(products),
                "product_capped": capped,
                "least": worst["product"],
                "least_at": f"{worst['problem']}, {worst['noise']}",
                "aim": {"product": mean, "least": least},
                "met": None if mean is None else bool(capped >= mean and worst["product"] >= least),
            }
        )
    return summaries


def geometric_mean(ratios):
    return float(np.exp(np.mean(np.log(ratios))))


# What is larger is exact but for rounding, so that its digits tell nothing.
LARGEST = 1e6


def figure(value):
    """Three digits, and no exponents."""
    if value > LARGEST:
        return "> 10⁶"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def without_error(result):
    """Whether a variance ratio is told without its error."""
    return result["to_rounding"] or result["variance_ratio"] > LARGEST


def report(results, summaries):
    rows = []
    for r in results:
        times = r["time_ratio"]
        rows.append(
            [
                r["problem"],
                r["noise"],
                r["derivative"],
                f"{r['num_samples']:,}",
                "exact" if r["to_rounding"] else figure(r["variance_ratio"]),
                "" if without_error(r) else figure(r["variance_ratio_error"]),
                figure(times["median"]),
                f"{figure(times['lower'])} to {figure(times['upper'])}",
                times["turns"],
                figure(r["product"]),
            ]
        )
    head = ["problem", "noise", "derivative", "N", "variance", "±", "time", "quartiles", "turns"]
    cells = table([*head, "product"], rows)
    rows = [
        [
            s["derivative"],
            f"{s['num_samples']:,}",
            s["cells"],
            *(figure(s[name]) for name in ("variance", "time", "product", "product_capped")),
            "" if s["aim"]["product"] is None else s["aim"]["product"],
            f"{figure(s['least'])} ({s['least_at']})",
            {None: "", True: "yes", False: "short"}[s["met"]],
        ]
        for s in summaries
    ]
    head = ["derivative", "N", "cells", "variance", "time", "product", f"product, at most {CAP:g}"]
    return table([*head, "aim", "least product", "met"], rows) + "\n\n" + cells


# Products beyond are drawn here, as triangles: most of them are exact.
SHOWN = 2000


def draw(suites, path):
    """One row a problem, one dot a noise and number of samples, one panel a derivative."""
    results = [r for cells in suites.values() for r in cells]
    derivatives = [d for d in ("gradient", "Hessian") if any(r["derivative"] == d for r in results)]
    names = list(dict.fromkeys(r["problem"] for r in results))
    size = (5 * len(derivatives) + 2, 0.35 * len(names) + 1.6)
    canvas, axes = plt.subplots(
        1, len(derivatives), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    colours = dict(zip(NOISES, ("tab:blue", "tab:orange"), strict=True))
    for axis, derivative in zip(axes[0], derivatives, strict=True):
        for noise in NOISES:
            for num_samples in COUNTS:
                chosen = [
                    r
                    for r in results
                    if (r["derivative"], r["noise"], r["num_samples"])
                    == (derivative, noise, num_samples)
                ]
                filled = colours[noise] if num_samples == max(COUNTS) else "none"
                for marker, beyond in (("o", False), (">", True)):
                    shown = [r for r in chosen if (r["product"] > SHOWN) == beyond]
                    axis.scatter(
                        [min(r["product"], SHOWN) for r in shown],
                        [names.index(r["problem"]) for r in shown],
                        s=36,
                        marker=marker,
                        facecolors=filled,
                        edgecolors=colours[noise],
                        label=None if beyond else f"{noise}, {num_samples:,} samples",
                    )
        axis.axvline(1, color="black", linewidth=0.8)
        rows = -0.5
        for cells in list(suites.values())[:-1]:
            rows += len({r["problem"] for r in cells})
            axis.axhline(rows, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlim(0.4, SHOWN * 1.5)
        axis.set_title(derivative)
        axis.set_xlabel("variance × time, optax.perturbations / perturbax")
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


def main(only=(), seconds=0.6, counts=COUNTS):
    found, text = {}, []
    for title, problems in (("Suite", suite()), ("Held back", held_back())):
        chosen = [p for p in problems if not only or any(part in p.name for part in only)]
        if chosen:
            results = measure(chosen, counts, seconds)
            summaries = summarise(results)
            found[title] = {"summary": summaries, "cells": results}
            text.append(f"**{title}**\n\n{report(results, summaries)}")
    print("Ratios, optax.perturbations over perturbax, at equal numbers of evaluations\n")
    print("\n\n".join(text))
    if not only:
        path = ROOT / "docs" / "_generated" / "variance.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(text) + "\n")
        suites = {title: part["cells"] for title, part in found.items()}
        draw(suites, ROOT / "docs" / "_static" / "variance.png")
    write("variance" if not only else "variance_part", f"keys 0 to {MOST - 1}, one a turn", found)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", nargs="+", default=(), help="parts of names of problems")
    arguments.add_argument("--seconds", type=float, default=0.6, help="for each cell")
    main(**vars(arguments.parse_args()))
