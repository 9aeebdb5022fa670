"""Reading four-digit numbers, taught by nothing but their order.

Each example is a set of five numbers, each written as four of scikit-learn's handwritten digits
side by side. A network gives every number a score; only the order of the numbers in a set is known,
not what they are and not what any digit is. Sorting has no useful derivative, so it is perturbed:
noise is added to the scores, and the mean of the ranks under noise is smooth. This is the
experiment of Grover et al., "Stochastic Optimization of Sorting Networks via Continuous
Relaxations", 2019, arXiv:1903.08850, with smaller and far fewer images.

Three ways to train the same network, each in 2,000 steps of 100 sets:

- the Fenchel-Young loss of the ranks, 8 noisy rankings a set;
- cross-entropy of the perturbed permutation matrix, 32 noisy sortings a set;
- for comparison, a network that is told the numbers: squared error of the standardised value.

Also for comparison, a logistic regression is told every digit and sorts the numbers that it reads.

The first 1,200 images are for training, the other 597 for testing; they are in the order of
collection, so the writers of the test images are mostly others. Sets are put together at random.

    python examples/sorting_digits.py
"""

import itertools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_TRAIN = 1200
NUMBERS, DIGITS = 5, 4  # numbers in a set, digits in a number
PLACES = 10.0 ** np.arange(DIGITS - 1, -1, -1)


class Sets(NamedTuple):
    """Sets of numbers: which images they are made of, and what they are."""

    images: Array  # (sets, 5, 4), indices
    values: Array  # (sets, 5), from 0 to 9999


class Result(NamedTuple):
    """What each way of training found, on sets of test images."""

    names: list[str]
    right_places: list[float]  # share of numbers with the right rank
    right_sets: list[float]  # share of sets in the right order
    curves: list[np.ndarray]  # (evaluations,) of right_sets on the way
    steps: np.ndarray  # (evaluations,)
    scores: list[np.ndarray]  # (sets, 5)
    seconds: list[float]  # of training, compilation included


def load():
    """Pixels (n, 64), from 0 to 1, and digits (n,): of the training images, then of the others."""
    pixels, digits = map(np.asarray, load_digits(return_X_y=True))
    pixels, digits = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(digits)
    return (pixels[:NUM_TRAIN], digits[:NUM_TRAIN]), (pixels[NUM_TRAIN:], digits[NUM_TRAIN:])


def draw_sets(key, digits, count):
    """Sets of numbers whose digits are any of the images."""
    images = jax.random.randint(key, (count, NUMBERS, DIGITS), 0, len(digits))
    return Sets(images, digits[images] @ jnp.asarray(PLACES, jnp.float32))


def initial_network(key, widths=(64, 128, 32), joint=(DIGITS * 32, 64, 1)):
    """Weights and biases: of what reads one digit, and of what puts four readings together."""

    def layers(key, widths):
        keys = jax.random.split(key, len(widths) - 1)
        shapes = itertools.pairwise(widths)
        return [
            (jax.random.normal(k, shape) * np.sqrt(2 / shape[0]), jnp.zeros(shape[1]))
            for k, shape in zip(keys, shapes, strict=True)
        ]

    keys = jax.random.split(key)
    return layers(keys[0], widths), layers(keys[1], joint)


def score(network, pixels):
    """One score for each number, from its pixels (..., 4, 64)."""
    reader, joint = network
    hidden = pixels
    for weights, bias in reader:
        hidden = jax.nn.relu(hidden @ weights + bias)
    hidden = hidden.reshape(*hidden.shape[:-2], -1)
    for weights, bias in joint[:-1]:
        hidden = jax.nn.relu(hidden @ weights + bias)
    weights, bias = joint[-1]
    return (hidden @ weights + bias)[..., 0]


def rank_loss(key, scores, values):
    """The Fenchel-Young loss of the ranks of one set."""
    loss = px.make_fenchel_young_loss(px.solvers.ranks, num_samples=8, sigma=1.0, noise=px.Normal())
    return loss(key, scores, px.solvers.ranks(values))


def permutation_loss(key, scores, values):
    """Cross-entropy of the mean permutation matrix of one set and the right one."""
    sort = px.make_perturbed_fun(
        px.solvers.sorting_permutation, num_samples=32, sigma=1.0, noise=px.Normal()
    )
    right = px.solvers.sorting_permutation(values)
    mean = jnp.clip(sort(key, scores), 1e-2, 1.0)  # a right place that was never seen is not -inf
    return -jnp.mean(jnp.sum(right * jnp.log(mean), axis=-1))


def value_loss(key, scores, values):
    """Squared error, for a network that is told the values."""
    del key
    standardised = (values - 4999.5) / 2886.8
    return jnp.mean((scores - standardised) ** 2)


def accuracies(scores, values):
    """Shares of numbers with the right rank, and of sets in the right order."""
    right = px.solvers.ranks(scores) == px.solvers.ranks(values)
    return jnp.mean(right), jnp.mean(jnp.all(right, axis=-1))


def train(set_loss, rate, data, test, test_sets, num_steps, num_sets=100, evaluations=12):
    """The scores of the test sets, and the share of sets in the right order on the way."""
    (pixels, digits), (test_pixels, _) = data, test
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    def loss(network, key, sets):
        scores = score(network, pixels[sets.images])
        keys = jax.random.split(key, num_sets)
        return jnp.mean(jax.vmap(set_loss)(keys, scores, sets.values))

    def update(state, key):
        network, moments = state
        keys = jax.random.split(key)
        gradient = jax.grad(loss)(network, keys[1], draw_sets(keys[0], digits, num_sets))
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(network, updates), moments), None

    @jax.jit
    def advance(state, keys):
        state, _ = jax.lax.scan(update, state, keys)
        scores = score(state[0], test_pixels[test_sets.images])
        return state, scores, accuracies(scores, test_sets.values)

    keys = jax.random.split(jax.random.key(1), (evaluations, max(num_steps // evaluations, 1)))
    network = initial_network(jax.random.key(0))
    state, curve = (network, optimizer.init(network)), []
    for part in keys:
        state, scores, shares = advance(state, part)
        curve.append([float(share) for share in shares])
    return np.asarray(scores), np.array(curve), keys.shape[1] * np.arange(1, evaluations + 1)


WAYS = {
    "ranks, Fenchel-Young": rank_loss,
    "permutation, cross-entropy": permutation_loss,
    "told the numbers": value_loss,
}


def told_every_digit(data, test, test_sets):
    """Accuracies of numbers put together from the digits that a logistic regression reads."""
    classifier = LogisticRegression(max_iter=1000).fit(*map(np.asarray, data))
    read = jnp.asarray(classifier.predict(np.asarray(test[0])))
    return accuracies(read[test_sets.images] @ jnp.asarray(PLACES, jnp.float32), test_sets.values)


def main(path="build/sorting_digits.png", num_steps=2000, num_test=2000):
    """Trains in three ways, prints what they reach, and writes the figure; returns the Result."""
    data, test = load()
    test_sets = draw_sets(jax.random.key(2), test[1], num_test)
    result = Result([], [], [], [], np.array([]), [], [])
    for name, loss in WAYS.items():
        start = time.perf_counter()
        scores, curve, steps = train(loss, 3e-3, data, test, test_sets, num_steps)
        result.seconds.append(time.perf_counter() - start)
        result.names.append(name)
        result.right_places.append(curve[-1, 0])
        result.right_sets.append(curve[-1, 1])
        result.curves.append(curve[:, 1])
        result.scores.append(scores)
    result = result._replace(steps=steps)
    print(f"{'':28} right places  right sets  training")
    for row in zip(
        result.names, result.right_places, result.right_sets, result.seconds, strict=True
    ):
        print("{:28} {:12.1%} {:11.1%} {:7.0f} s".format(*row))
    places, sets = told_every_digit(data, test, test_sets)
    print(f"{'told every digit, logistic':28} {places:12.1%} {sets:11.1%}")
    draw(Path(path), result, test, test_sets)
    print(f"Figure: {path}")
    return result


def draw(path, result, test, test_sets, rows=2, columns=3, dots=1500):
    """The curves, scores against numbers, and the first test sets as they were sorted."""
    figure = plt.figure(figsize=(11, 6), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.45))
    upper, lower = left.subplots(2, 1)
    for name, curve, colour in zip(
        result.names, result.curves, ("#1f77b4", "#ff7f0e", "#7f7f7f"), strict=True
    ):
        upper.plot(result.steps, 100 * curve, label=name, color=colour)
    upper.set(xlabel="step of Adam", ylabel="test sets in order, %")
    upper.set_ylim(bottom=0)
    upper.set_title("Five numbers each, of new writers", loc="left", fontsize=10.5)
    upper.legend(frameon=False, loc="lower right", fontsize=9)
    values, scores = (np.asarray(v) for v in (test_sets.values, result.scores[0]))
    lower.plot(values.ravel()[:dots], scores.ravel()[:dots], ".", ms=2.5, alpha=0.5)
    lower.set(xlabel="number", ylabel="learned score", xticks=np.arange(0, 10_001, 2_000))
    lower.set_title("Learned from ranks: no number was told", loc="left", fontsize=10.5)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    right.suptitle(
        "Test sets as the ranks taught to sort them (red: in a wrong place)", fontsize=10.5
    )
    pixels = np.asarray(test[0]).reshape(-1, 8, 8)
    blocks = right.subfigures(rows, columns)
    for chosen, block in enumerate(np.ravel(blocks)):
        order = np.argsort(scores[chosen])
        right_order = np.sort(values[chosen])
        for place, (axes, number) in enumerate(zip(block.subplots(NUMBERS), order, strict=True)):
            wrong = values[chosen, number] != right_order[place]
            images = pixels[np.asarray(test_sets.images[chosen, number])]
            axes.imshow(np.concatenate(images, axis=1), cmap="Reds" if wrong else "gray_r")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.text(
                33, 3.5, f"{values[chosen, number]:04.0f}", va="center", fontsize=9,
                color="#c00000" if wrong else "#444444",
            )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
