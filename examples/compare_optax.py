"""The same gradients by perturbax and by optax.perturbations: time and variance.

Both estimate the gradient of the same function at the same point with the same number of
evaluations. They take turns, key by key; the time ratio is the median over the turns, and the
variance ratio compares the spread of the very gradients that were timed, summed over coordinates.
A ratio above 1 is in perturbax's favour.

    python examples/compare_optax.py
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import optax.perturbations
from digits import error_rate, load
from discrete_choice import discrete_objective
from relu_gradient import relu_sum
from tqdm import tqdm

import perturbax as px


class Problem(NamedTuple):
    """A function, a point, and how the gradient there is estimated."""

    name: str
    fun: Any
    x: np.ndarray
    num_samples: int
    sigma: float
    noise: str  # the name of a class in either library
    num_turns: int


class Comparison(NamedTuple):
    """What perturbax and optax.perturbations took, and how far their gradients spread."""

    problem: Problem
    milliseconds: float  # median time of perturbax's gradient
    optax_milliseconds: float
    time_ratio: float  # optax / perturbax, median over the turns
    variance_ratio: float  # optax / perturbax
    variance_ratio_error: float  # its standard error
    distance: float  # of the two mean gradients, squared, over what chance explains: about 1


def problems():
    """Functions of three numbers, of a classifier's 650 parameters, and of ten thousand numbers."""
    train, _, _ = load()
    # Every digit's mean image, less half its squared length: the nearest-mean classifier.
    pixels, labels = np.asarray(train.features)[:-1], np.asarray(train.labels)
    means = np.stack([pixels[:, labels == digit].mean(axis=1) for digit in range(10)])
    weights = np.concatenate([means, -0.5 * np.sum(means**2, axis=1, keepdims=True)], axis=1)

    def digits_wrong(flat_weights):
        return error_rate(flat_weights.reshape(weights.shape), train)

    point = np.array([-1.0, 0.5, 2.0], np.float32)
    small = np.full(3, 0.1, np.float32)
    large = np.linspace(-1, 2, 10_000, dtype=np.float32)
    return [
        Problem("ReLU sum", relu_sum, point, 1000, 0.1, "Gumbel", 200),
        Problem("discrete choice", discrete_objective, small, 2000, 0.2, "Gumbel", 200),
        Problem("digits wrong", digits_wrong, weights.ravel(), 256, 0.1, "Normal", 40),
        Problem("ReLU sum", relu_sum, large, 1000, 0.1, "Gumbel", 6),
    ]


def gradient_by(library, problem):
    smooth = library.make_perturbed_fun(
        problem.fun, problem.num_samples, problem.sigma, getattr(library, problem.noise)()
    )
    gradient = jax.jit(jax.grad(smooth, argnums=1))
    jax.block_until_ready(gradient(jax.random.key(0), problem.x))  # compiles
    return gradient


def compare(problem, progress):
    progress.set_description_str(f"  {problem.name}, {problem.x.size:,} dimensions")
    with ThreadPoolExecutor() as threads:  # compiled at the same time, but timed in turn
        gradients = list(threads.map(gradient_by, (px, optax.perturbations), (problem, problem)))
    seconds, estimates = np.empty((2, problem.num_turns)), [[], []]
    for turn in range(problem.num_turns):
        key = jax.random.key(turn)
        for who in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            gradient = jax.block_until_ready(gradients[who](key, problem.x))
            seconds[who, turn] = time.perf_counter() - start
            estimates[who].append(np.ravel(gradient))
        progress.update()

    # The squared distance of each estimate from the mean of them all: its mean is the variance.
    ours, theirs = (np.array(e, np.float64) for e in estimates)
    squares = [np.sum((e - e.mean(axis=0)) ** 2, axis=1) for e in (ours, theirs)]
    variance, optax_variance = (np.sum(s) / (len(s) - 1) for s in squares)
    ratio = optax_variance / variance
    relative = [np.std(s, ddof=1) / np.mean(s) / np.sqrt(len(s)) for s in squares]
    distance = np.sum((ours.mean(axis=0) - theirs.mean(axis=0)) ** 2)
    return Comparison(
        problem,
        *(1e3 * np.median(seconds, axis=1)),
        time_ratio=np.median(seconds[1] / seconds[0]),
        variance_ratio=ratio,
        variance_ratio_error=ratio * np.hypot(*relative),
        distance=distance * problem.num_turns / (variance + optax_variance),
    )


def main(chosen=None):
    """Compares on the given problems, or on all."""
    chosen = chosen or problems()
    num_turns = sum(problem.num_turns for problem in chosen)
    with tqdm(total=num_turns, unit="turn", leave=False) as progress:
        comparisons = [compare(problem, progress) for problem in chosen]
    show(comparisons)
    return comparisons


def show(comparisons):
    print("                    dimensions  samples   perturbax      optax    time       variance")
    for c in comparisons:
        print(
            f"  {c.problem.name:15}  {c.problem.x.size:11,}  {c.problem.num_samples:7,}"
            f"  {c.milliseconds:7.2f} ms  {c.optax_milliseconds:7.2f} ms"
            f"  {c.time_ratio:4.1f} x  {c.variance_ratio:8,.1f} ± {c.variance_ratio_error:,.1f} x"
        )
    print("  ratios: optax.perturbations over perturbax, at equal numbers of evaluations")


if __name__ == "__main__":
    main()
