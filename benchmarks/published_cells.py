"""Question: are the stratified samplers of the literature ever better than this library's?

Petersen et al., Generalizing Stochastic Smoothing for Differentiation and Gradient Estimation,
2024, arXiv:2410.08125, compare samplers and covariates on sorting (the hard permutation matrix of 3
and 5 numbers) and on shortest paths (8 x 8 and 12 x 12 cells, 8 neighbours), with six noises and
1,024 samples. Compared are their estimators, by their formulas, and this library's, on such cells:

    Monte Carlo     independent samples; covariate none, f(x) or the mean of all other values
    Latin, grid     one group of all samples, with one point in each slice of each coordinate, or in
                    each cell of a grid of k^D; the covariate is the mean of the *same* group's
                    other values, which is biased by a term of order 1 / N: they are not independent
    ... in two      the same samplers as `px.Sampler` objects in two independent groups, unbiased

The measure is theirs, the mean L2 error of the Jacobian, as a squared ratio, Monte Carlo without
covariate over the estimator, at equal numbers of evaluations; larger is better. Ratios of a
public reproduction of their cells are in brackets. Neither source has the points: sorting is at
normal ones with sigma = 1, paths at uniform costs with sigmas that give leave-one-out with Normal
noise about the published gain. The Jacobian of a path is measured along eight random directions.
Sorting two numbers, for a grid at its best, is added.

    python benchmarks/published_cells.py [--quick] [--only NAME ...]

Without either, writes docs/_generated/published_cells.md too.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from timing import ROOT, table, write

import perturbax as px

NUM_SAMPLES = 1_024
NOISES = (px.Cauchy(), px.Normal(), px.Gumbel(), px.Laplace(), px.Logistic(), px.Triangular())
# For cheap functions, most of the time would go into compiling.
QUICK_COMPILATION: Any = {"xla_backend_optimization_level": 0}

# Squared ratios of mean L2 errors, in the order of NOISES, None where there is no figure.
PUBLISHED = {
    "sorting, n = 3": {
        "Monte Carlo, f(x)": (0.88, 0.95, 0.88, 1.02, 0.84, 1.23),
        "Monte Carlo, leave-one-out": (1.66, 1.52, 1.51, 1.53, 1.63, 1.75),
        "antithetic": (1.47, 1.22, None, 1.42, 1.43, 1.49),
        "Latin, leave-one-out": (2.08, 2.40, 2.19, 1.94, 2.17, 2.85),
        "grid, leave-one-out": (8.87, 7.38, 5.26, 9.21, 10.1, 2.16),
    },
    "sorting, n = 5": {
        "Monte Carlo, f(x)": (0.69, 0.68, 0.69, 0.71, 0.69, 0.91),
        "Monte Carlo, leave-one-out": (1.27, 1.33, 1.29, 1.32, 1.26, 1.43),
        "Latin, leave-one-out": (1.34, 1.62, 1.40, 1.51, 1.50, 2.78),
        "grid, leave-one-out": (2.12, 2.30, 1.93, 2.61, 2.44, 2.80),
    },
    "path, 8 x 8": {
        "Monte Carlo, f(x)": (1.55, 1.86, 1.66, 1.65, 1.54, 1.97),
        "Monte Carlo, leave-one-out": (2.61, 3.07, 2.87, 2.91, 2.89, 3.19),
        "antithetic": (1.94, 2.05, None, 1.93, 1.84, 2.27),
        "Latin, leave-one-out": (2.69, 3.10, 2.77, 2.99, 2.95, 0.60),
    },
    "path, 12 x 12": {
        "Monte Carlo, f(x)": (3.18, 3.80, 3.78, 4.02, 3.79, 3.59),
        "Monte Carlo, leave-one-out": (5.99, 7.84, 7.80, 8.18, 7.46, 7.51),
        "antithetic": (4.46, 5.43, None, 5.48, 5.07, 5.37),
        "Latin, leave-one-out": (6.09, 8.00, 7.79, 7.87, 7.30, 10.9),
    },
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A function, the points where it is smoothed, and how often."""

    name: str
    fun: Callable[[Array], Array]
    points: np.ndarray  # (points, D)
    sigma: float
    keys: int  # for each point

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return self.points.shape[1]


def cells(quick: bool) -> list[Cell]:
    share = 2 if quick else 1

    def sorting(n: int) -> Cell:
        points = np.random.RandomState(n).normal(size=(8, n))
        return Cell(
            f"sorting, n = {n}",
            lambda x: px.solvers.sorting_permutation(x).ravel(),
            points,
            1.0,
            16 // share,
        )

    def path(side: int, sigma: float) -> Cell:
        draw = np.random.RandomState(side)
        points = draw.uniform(size=(2, side * side))
        directions = jnp.asarray(draw.normal(size=(8, side * side)), jnp.float32)

        def fun(costs: Array) -> Array:
            solution = px.solvers.grid_shortest_path(costs.reshape(side, side))
            return directions @ solution.ravel()

        return Cell(f"path, {side} x {side}", fun, points, sigma, 6 // share)

    return [sorting(2), sorting(3), sorting(5), path(8, 0.08), path(12, 0.05)]


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """One of NOISES, by a number that may be traced: programs are compiled once for all of them.

    Gumbel noise is centred. Good for gradients in x, which do not depend on the variance.
    """

    index: Array

    derivatives = 1
    mean = 0.0
    variance = 1.0

    def sample(self, key: Array, sample_shape: tuple[int, ...] = (), dtype: Any = float) -> Array:
        """Independent draws."""
        return self.icdf(uniform(key, sample_shape)).astype(dtype)

    def log_prob(self, inputs: Array) -> Array:
        """Log-density."""
        return self._switch(lambda law, z: law.log_prob(z + centre(law)), inputs)

    def score(self, inputs: Array) -> Array:
        """Score."""
        return self._switch(lambda law, z: law.score(z + centre(law)), inputs)

    def icdf(self, u: Array) -> Array:
        """Inverse of the distribution function."""
        return self._switch(lambda law, v: law.icdf(v) - centre(law), u)

    def _switch(self, method: Callable[[Any, Array], Array], argument: Array) -> Array:
        branches = [lambda v, law=law: method(law, v) for law in NOISES]
        return lax.switch(self.index, branches, argument)


class HeavyOneOf(OneOf):
    """The same, for Cauchy noise, which has no moments."""

    mean = math.nan
    variance = math.nan


def centre(law: Any) -> float:
    """The mean, or where there is none the median."""
    return law.mean if math.isfinite(law.mean) else 0.0


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform numbers in (0, 1), fine at 0, where float32 is."""
    return (jax.random.bits(key, shape).astype(jnp.float32) + 0.5) * 2.0**-32


def within(slices: Array, count: Any, key: Array) -> Array:
    """A uniform point in each of the given slices, of `count`, of (0, 1)."""
    u = (slices.astype(jnp.float32) + uniform(key, slices.shape)) / jnp.asarray(count, jnp.float32)
    return jnp.minimum(u, 1 - 2.0**-24)


@dataclasses.dataclass(frozen=True)
class Latin:
    """Latin hypercubes: a group has one sample in each of as many slices of each coordinate."""

    num_groups: int = 2

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        del dim
        return -(-num_samples // self.num_groups)

    def sample_group(
        self, key: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        order, inside = jax.random.split(key)
        slices = jnp.broadcast_to(jnp.arange(group_size)[:, None], (group_size, dim))
        slices = jax.random.permutation(order, slices, axis=0, independent=True)
        return noise.icdf(within(slices, group_size, inside)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid over all coordinates at once: a group has one sample in each cell.

    Rows are shuffled, so that each by itself has the law of the noise.

    Attributes:
      levels: slices of each coordinate.
    """

    levels: tuple[int, ...]

    def group_size(self, num_samples: int, dim: int) -> int:
        """Samples in a group."""
        del num_samples, dim
        return math.prod(self.levels)

    def sample_group(
        self, key: Array, noise: Any, group_size: int, dim: int, dtype: np.dtype
    ) -> Array:
        """Noise of one group, shape (group_size, dim)."""
        order, inside = jax.random.split(key)
        grid = np.stack(np.unravel_index(np.arange(group_size), self.levels), axis=1)
        slices = jax.random.permutation(order, jnp.asarray(grid), axis=0)
        levels = np.asarray(self.levels)[None]
        return noise.icdf(within(slices, levels, inside)).astype(dtype)


# The paper's grid, k^D cells, and the largest two groups with a power of two slices a coordinate.
GRIDS = {
    2: ((32, 32), (32, 16)),
    3: ((10, 10, 10), (8, 8, 8)),
    5: ((4, 4, 4, 4, 4), (4, 4, 4, 4, 2)),
}


def theirs(cell: Cell) -> Callable[[OneOf, Array, Array], dict[str, Array]]:
    """The estimators of the paper, from a noise, a key and a point."""

    def estimates(noise: OneOf, key: Array, x: Array) -> dict[str, Array]:
        keys = jax.random.split(key, 4)

        def values(z: Array) -> Array:
            return jax.vmap(lambda row: cell.fun(x + cell.sigma * row))(z)

        def jacobian(f: Array, z: Array) -> Array:
            slope = noise.score(z) / cell.sigma
            return jnp.matmul(f.T, slope, precision=lax.Precision.HIGHEST) / len(f)

        def others(f: Array) -> Array:
            """What leave-one-out leaves of each value."""
            return (f - jnp.mean(f, axis=0)[None]) * (len(f) / (len(f) - 1))

        def group(sampler: Any, key: Array) -> tuple[Array, Array]:
            size = sampler.group_size(NUM_SAMPLES, cell.dim)
            z = sampler.sample_group(key, noise, size, cell.dim, np.dtype(np.float32))
            return values(z), z

        u = uniform(keys[0], (NUM_SAMPLES, cell.dim))
        z = noise.icdf(u)
        f = values(z)
        half = u[: NUM_SAMPLES // 2]
        pairs = noise.icdf(jnp.concatenate([half, jnp.minimum(1 - half, 1 - 2.0**-24)]))
        found = {
            "Monte Carlo": jacobian(f, z),
            "Monte Carlo, f(x)": jacobian(f - cell.fun(x)[None], z),
            "Monte Carlo, leave-one-out": jacobian(others(f), z),
            "antithetic": jacobian(values(pairs), pairs),
        }
        f, z = group(Latin(1), keys[1])
        found["Latin, leave-one-out"] = jacobian(others(f), z)
        if cell.dim in GRIDS:
            f, z = group(Grid(GRIDS[cell.dim][0]), keys[2])
            found["grid, leave-one-out"] = jacobian(others(f), z)
        return found

    return estimates


def ours(cell: Cell) -> dict[str, dict[str, Any]]:
    """Options of make_perturbed_fun, by the name of the row."""
    small = cell.dim in GRIDS
    samplers: dict[str, Any] = {"Latin in two": Latin()}
    if small:
        samplers["grid in two"] = Grid(GRIDS[cell.dim][1])
    nets = px.Sobol(), px.OrthogonalArray()
    for sampler in (px.Independent(), px.Antithetic(), px.Orthogonal(), *nets):
        samplers[f"{type(sampler).__name__}()"] = sampler
    rows: dict[str, dict[str, Any]] = {
        f"{name}, degree {degree}": {"sampler": sampler, "degree": degree}
        for name, sampler in samplers.items()
        for degree in ((0, 1, 2) if small and name in ("grid in two", "Sobol()") else (0, 1))
    }
    return rows | {"default": {}}


def by_library(
    cell: Cell, options: dict[str, Any], num_samples: int = NUM_SAMPLES
) -> Callable[[OneOf, Array, Array], dict[str, Array]]:
    """The Jacobian as this library estimates it."""

    def estimates(noise: OneOf, key: Array, x: Array) -> dict[str, Array]:
        smooth = px.make_perturbed_fun(cell.fun, num_samples, cell.sigma, noise, **options)
        return {"": jax.jacrev(smooth, argnums=1)(key, x)}

    return estimates


def run(
    cell: Cell,
    estimates: Callable[[OneOf, Array, Array], dict[str, Array]],
    laws: Sequence[int],
    keys: int,
    seed: int,
    heavy: bool = False,
) -> dict[int, dict[str, np.ndarray]]:
    """Jacobians (points, keys, M, D) of each row, by the number of the noise."""
    make = HeavyOneOf if heavy else OneOf
    count = len(cell.points)
    points = jnp.repeat(jnp.asarray(cell.points, jnp.float32), keys, axis=0)
    pairs = (jax.random.split(jax.random.key(seed), count * keys), points)

    @partial(jax.jit, compiler_options=QUICK_COMPILATION if cell.dim in GRIDS else None)
    def jacobians(index: Array, pairs: tuple[Array, Array]) -> dict[str, Array]:
        return lax.map(lambda pair: estimates(make(index), *pair), pairs)

    return {
        law: {
            name: np.asarray(v, np.float64).reshape(count, keys, *v.shape[1:])
            for name, v in jacobians(jnp.asarray(law), pairs).items()
        }
        for law in laws
    }


def measure(cell: Cell, quick: bool) -> list[dict[str, Any]]:
    """Mean errors of all estimators with all noises."""
    start = time.perf_counter()
    heavy = [i for i, law in enumerate(NOISES) if not math.isfinite(law.mean)]
    light = [i for i in range(len(NOISES)) if i not in heavy]
    repeats = 1 if quick else 3 if cell.dim > 5 else 8
    truth = {}
    for laws, degree in ((light, 1), (heavy, 0)):
        exact = by_library(cell, {"sampler": px.Sobol(), "degree": degree}, 8 * NUM_SAMPLES)
        for law, found in run(cell, exact, laws, repeats, 1, laws is heavy).items():
            truth[law] = np.mean(found[""], axis=1, keepdims=True)
    rows: dict[tuple[str, int], np.ndarray] = {}

    def add(name: str, found: dict[int, dict[str, np.ndarray]]) -> None:
        for law, jacobians in found.items():
            for part, jacobian in jacobians.items():
                rows[name + part, law] = np.sqrt(np.sum((jacobian - truth[law]) ** 2, axis=(2, 3)))

    add("", run(cell, theirs(cell), light + heavy, cell.keys, 2))
    for name, options in ours(cell).items():
        estimates = by_library(cell, options)
        if "degree" not in options:  # chooses by the moments too
            add(name, run(cell, estimates, heavy, cell.keys, 3, heavy=True))
            add(name, run(cell, estimates, light, cell.keys, 3))
        else:
            add(name, run(cell, estimates, light + heavy * (options["degree"] == 0), cell.keys, 3))
    print(f"{cell.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return [
        {
            "cell": cell.name,
            "row": name,
            "noise": type(NOISES[law]).__name__,
            "error": float(error.mean()),
            **gain(rows["Monte Carlo", law], error),
            "published": PUBLISHED.get(cell.name, {}).get(name, (None,) * len(NOISES))[law],
        }
        for (name, law), error in rows.items()
    ]


def gain(reference: np.ndarray, error: np.ndarray) -> dict[str, float]:
    """The squared ratio of mean errors (points, keys), and its standard error."""
    ratio = (reference.mean() / error.mean()) ** 2
    relative = [
        np.sqrt(np.mean(np.var(v, axis=1, ddof=1)) / v.size) / v.mean() for v in (reference, error)
    ]
    return {"gain": float(ratio), "gain_error": float(2 * ratio * math.hypot(*relative))}


def report(results: list[dict[str, Any]]) -> str:
    """One table a cell: rows are estimators, columns are noises."""
    names = [type(law).__name__ for law in NOISES]
    text = []
    for cell in dict.fromkeys(r["cell"] for r in results):
        found = {(r["row"], r["noise"]): r for r in results if r["cell"] == cell}
        lines = [
            [row, *(entry(found.get((row, noise))) for noise in names)]
            for row in dict.fromkeys(row for row, _ in found)
        ]
        text.append(table([f"**{cell}**", *names], lines))
    return "\n\n".join(text)


def entry(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    published = "" if result["published"] is None else f" ({result['published']:g})"
    return f"{result['gain']:.3g} ± {result['gain_error']:.1g}{published}"


def main(quick: bool = False, only: Sequence[str] = ()) -> None:
    chosen = [c for c in cells(quick) if not only or any(part in c.name for part in only)]
    results = [r for cell in chosen for r in measure(cell, quick)]
    text = report(results)
    print("\nSquared ratio of mean errors, Monte Carlo over each; in brackets as published\n")
    print(text)
    if not quick and not only:
        path = ROOT / "docs" / "_generated" / "published_cells.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    write(
        "published_cells_part" if quick or only else "published_cells",
        "keys split from 1, 2 and 3",
        results,
    )


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="few keys, for a first look")
    arguments.add_argument("--only", nargs="+", default=(), help="parts of names of cells")
    main(**vars(arguments.parse_args()))
