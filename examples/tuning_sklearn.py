"""Hyperparameters and a decision threshold of a scikit-learn model, tuned on validation F1.

A support vector machine looks for a rare class (a tenth of 1,500 points, with 5 % of all labels
wrong). Three numbers are tuned together: the penalty C and the width gamma of the kernel, both as
logarithms, and the decision value from which a point is reported. F1 counts errors: it is a step
function of the threshold, and nothing that scikit-learn could differentiate in the other two.

Each evaluation fits the model on 500 points and measures F1 on 500 others. Fits run in two worker
processes, with a time limit. All are written to a journal: interrupt the program, start it again,
and it goes on where it was; started after its end, it fits nothing. For comparison, a random search
has as many fits, in a box around the start. The last 500 points are for the final comparison alone.

    python examples/tuning_sklearn.py
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import make_classification
from sklearn.metrics import f1_score
from sklearn.svm import SVC

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

START = {"log_c": 0.0, "log_gamma": -1.0, "threshold": 0.0}
SIGMA = {"log_c": 0.25, "log_gamma": 0.25, "threshold": 0.1}


class Result(NamedTuple):
    """What was found, and on the way."""

    tuned: dict  # the three numbers
    validation: np.ndarray  # (num_steps,), the mean F1 under noise, before each step
    test_f1: dict[str, float]  # of each way, on new points
    curves: dict[str, np.ndarray]  # test F1 at each of `thresholds`
    thresholds: np.ndarray
    evaluations: int  # fits made
    recalled: int  # fits taken from the journal


def load(seed=0):
    """Points and labels to fit, to validate and to test on."""
    points, labels = make_classification(
        1500, 12, n_informative=5, weights=[0.9], flip_y=0.05, class_sep=0.8, random_state=seed
    )
    return [(points[i::3], labels[i::3]) for i in range(3)]


def problem(train, validation):
    """The model for given numbers, and its F1: inner functions, which workers get as they are.

    For a function of this file, they would have to import the file, and JAX with it.
    """

    def fit(settings):
        model = SVC(C=10 ** settings["log_c"], gamma=10 ** settings["log_gamma"])
        return model.fit(*train)

    def f1(settings):
        found = fit(settings).decision_function(validation[0]) > settings["threshold"]
        return f1_score(validation[1], found, zero_division=0.0)

    return fit, f1


def tune(f1, num_steps, num_samples, learning_rate=0.1):
    """Ascends the mean of F1 under noise; the numbers in the end, and that mean on the way."""
    smooth = px.make_perturbed_fun(f1, num_samples, SIGMA, px.Normal())
    optimizer = optax.adam(learning_rate, b1=0.8)
    settings = jax.tree.map(jnp.asarray, START)
    state, curve = optimizer.init(settings), []
    for step in range(num_steps):
        value, gradient = jax.value_and_grad(smooth, argnums=1)(jax.random.key(step), settings)
        updates, state = optimizer.update(jax.tree.map(jnp.negative, gradient), state)
        settings = optax.apply_updates(settings, updates)
        curve.append(float(value))
    return jax.tree.map(float, settings), np.array(curve)


def random_search(f1, count, seed=0):
    """The best of so many points of a box around the start."""
    rng = np.random.default_rng(seed)
    widths = {"log_c": 1.5, "log_gamma": 1.5, "threshold": 0.5}
    draws = {k: START[k] + w * rng.uniform(-1, 1, count) for k, w in widths.items()}
    best = int(np.argmax(jax.vmap(f1)(jax.tree.map(jnp.float32, draws))))
    return {k: float(v[best]) for k, v in draws.items()}


def main(
    path="build/tuning_sklearn.png",
    journal="build/tuning_sklearn.journal",
    num_steps=25,
    num_samples=24,
    num_workers=2,
):
    """Tunes, prints what that is worth, and draws it; returns the Result."""
    train, validation, test = load()
    fit, f1 = problem(train, validation)
    Path(journal).parent.mkdir(parents=True, exist_ok=True)
    with (
        px.ProcessWorkers(num_workers) as workers,
        px.host_function(
            f1,
            executor=workers,
            like=0.0,
            timeout=30.0,
            retries=2,
            journal=journal,
            progress=True,
        ) as h,
    ):
        tuned, curve = tune(h, num_steps, num_samples)
        searched = random_search(h, num_steps * num_samples)
        counts = h.counts

    ways = {"as it comes": START, "random search": searched, "perturbed gradient": tuned}
    thresholds = np.linspace(-1.0, 0.5, 151)
    test_f1, curves = {}, {}
    for name, settings in ways.items():
        scores = fit(settings).decision_function(test[0])
        test_f1[name] = f1_score(test[1], scores > settings["threshold"])
        curves[name] = np.array([f1_score(test[1], scores > t) for t in thresholds])
    result = Result(tuned, curve, test_f1, curves, thresholds, counts.evaluations, counts.recalled)
    show(result, ways)
    draw(Path(path), result, ways)
    print(f"Figure: {path}")
    return result


def show(result, ways):
    print(f"  {result.evaluations} fits, {result.recalled} more from the journal")
    print(f"  {'':20} {'C':>8} {'gamma':>8} {'threshold':>10} {'test F1':>8}")
    for name, s in ways.items():
        c, gamma = 10 ** s["log_c"], 10 ** s["log_gamma"]
        print(
            f"  {name:20} {c:8.2f} {gamma:8.3f} {s['threshold']:10.2f} {result.test_f1[name]:8.3f}"
        )


def draw(path, result, ways):
    """The mean on the way, and what the threshold does to each model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=150, layout="constrained")
    left.plot(result.validation, color="#1f77b4")
    left.set(xlabel="step of Adam", ylabel="validation F1, mean under noise")
    for (name, curve), colour in zip(
        result.curves.items(), ("#7f7f7f", "#ff7f0e", "#1f77b4"), strict=True
    ):
        right.plot(result.thresholds, curve, color=colour, label=name)
        right.plot(ways[name]["threshold"], result.test_f1[name], "o", color=colour)
    right.set(xlabel="threshold", ylabel="F1 on new points (dot: the one chosen)")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
