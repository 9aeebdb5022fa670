"""A ranker trained on NDCG@10 itself: given a handwritten digit, find others like it.

A query is an image of scikit-learn's digits, and all other images are to be ranked, those of the
same digit first. NDCG@10 scores the first ten places: a hit in place i is worth 1 / log2(1 + i),
and 10 hits make 1. Each place is a piecewise constant function of the scores, so the usual way is
to train on pairs (logistic loss of every hit against every miss). Here the scores are perturbed,
which makes NDCG@10 smooth, and its gradient is estimated from 32 rankings a query and step.

Each image is a query for the others, and relevance is known: it is having the same digit. Images
are reduced to 4 x 4 pixels, which leaves something to learn; the score of an image is minus a
squared distance, linear in 136 weights, one for each pair of pixels. The first half of the images
is for training and the second for testing; they are in the order of collection, so most writers
differ.

    python examples/learning_to_rank.py
    python examples/learning_to_rank.py rates    # how the learning rates were chosen
"""

import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLACES = 10
DISCOUNTS = 1 / np.log2(np.arange(2, 2 + PLACES))


class Images(NamedTuple):
    """Images as the ranker sees them, and their digits."""

    pixels: jax.Array  # (n, 16), from 0 to 1
    digits: jax.Array  # (n,)


class Result(NamedTuple):
    """What each way of training found."""

    names: list[str]
    test_ndcg: list[float]  # with all test images as queries
    curves: list[np.ndarray]  # (evaluations,) of test NDCG on the way; empty for the untrained
    steps: np.ndarray  # (evaluations,)
    metrics: list[np.ndarray]  # (16, 16) each
    seconds: list[float]  # of training, compilation included


def load():
    """Training images, test images, and the test images in full, (n, 8, 8)."""
    pixels, digits = map(np.asarray, load_digits(return_X_y=True))
    full = pixels.reshape(-1, 8, 8) / 16
    small = full.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    half = len(digits) // 2
    images = Images(jnp.asarray(small, jnp.float32), jnp.asarray(digits))
    return Images(*(v[:half] for v in images)), Images(*(v[half:] for v in images)), full[half:]


def scores(metric, query, documents):
    """Minus the squared distances of documents (n, 16) from a query (16,)."""
    difference = documents - query
    return -jnp.sum((difference @ metric) * difference, axis=-1)


def ndcg(scores, relevant):
    """NDCG@10 of one ranking, (n,) and (n,); constant but for jumps."""
    _, first = jax.lax.top_k(scores, PLACES)
    return jnp.sum(relevant[first] * DISCOUNTS) / jnp.sum(
        jnp.where(jnp.arange(PLACES) < jnp.sum(relevant), DISCOUNTS, 0.0)
    )


def logistic_pairs(scores, relevant):
    """The pairwise logistic loss: over all pairs of a hit and a miss, log(1 + e^(miss - hit))."""
    pair = relevant[:, None] * (1 - relevant)[None, :]
    return jnp.sum(pair * jax.nn.softplus(scores[None, :] - scores[:, None])) / jnp.sum(pair)


@jax.jit
def test_ndcg(metric, images):
    """Mean NDCG@10, each image in turn being the query and all others what is ranked."""

    def one(query, digit, place):
        found = scores(metric, query, images.pixels).at[place].set(-jnp.inf)
        relevant = (images.digits == digit).astype(jnp.float32).at[place].set(0.0)
        return ndcg(found, relevant)

    return jnp.mean(jax.vmap(one)(*images, jnp.arange(len(images.digits))))


def train(list_loss, train_images, test_images, num_steps, rate, num_queries=32, length=200):
    """The metric, and its test NDCG on the way."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    def loss(metric, key, queries, lists):
        symmetric = (metric + metric.T) / 2

        def one(key, query, documents):
            found = scores(symmetric, train_images.pixels[query], train_images.pixels[documents])
            same = train_images.digits[query] == train_images.digits[documents]
            relevant = jnp.where(documents == query, 0.0, same.astype(jnp.float32))
            found = jnp.where(documents == query, -jnp.inf, found)
            return list_loss(key, found, relevant)

        return jnp.mean(jax.vmap(one)(jax.random.split(key, num_queries), queries, lists))

    @jax.jit
    def update(metric, state, step):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 3)
        total = len(train_images.digits)
        queries = jax.random.randint(keys[0], (num_queries,), 0, total)
        lists = jax.random.randint(keys[1], (num_queries, length), 0, total)
        gradient = jax.grad(loss)(metric, keys[2], queries, lists)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(metric, updates), state

    metric = jnp.eye(16)
    state = optimizer.init(metric)
    curve = [float(test_ndcg(metric, test_images))]
    every = max(num_steps // 10, 1)
    for step in range(num_steps):
        metric, state = update(metric, state, step)
        if (step + 1) % every == 0:
            curve.append(float(test_ndcg((metric + metric.T) / 2, test_images)))
    return (metric + metric.T) / 2, np.array(curve), every * np.arange(len(curve))


def main(path="build/learning_to_rank.png", num_steps=300):
    """Trains both ways, prints what they reach, and writes the figure; returns the Result."""
    train_images, test_images, pixels = load()
    result = Result(["untrained"], [float(test_ndcg(jnp.eye(16), test_images))], [], [], [], [])
    for name, (list_loss, rate) in WAYS.items():
        start = time.perf_counter()
        metric, curve, steps = train(list_loss, train_images, test_images, num_steps, rate)
        result.seconds.append(time.perf_counter() - start)
        result.names.append(name)
        result.test_ndcg.append(float(curve[-1]))
        result.curves.append(curve)
        result.metrics.append(np.asarray(metric))
    result = result._replace(steps=steps)
    for name, reached in zip(result.names, result.test_ndcg, strict=True):
        print(f"{name:28s} test NDCG@10 {reached:.4f}")
    draw(Path(path), result, test_images, pixels)
    print(f"Figure: {path}")
    return result


def perturbed_loss(key, found, hits):
    """Minus the mean NDCG@10 of 32 perturbed rankings."""
    # Masked documents, whose score is minus infinity, stay where they are.
    smooth = px.make_perturbed_fun(ndcg, num_samples=32, sigma=0.1, noise=px.Normal())
    return -smooth(key, found, hits)


# The loss of one list, and the learning rate that `choose_rates` finds for it.
WAYS = {
    "logistic loss of pairs": (lambda key, found, hits: logistic_pairs(found, hits), 0.003),
    "NDCG@10 itself, perturbed": (perturbed_loss, 0.01),
}


def choose_rates(rates=(0.001, 0.003, 0.01, 0.03, 0.1), num_steps=300):
    """Prints what each way reaches on the last third of the training images, held out."""
    images, _, _ = load()
    cut = 2 * len(images.digits) // 3
    kept, held_out = Images(*(v[:cut] for v in images)), Images(*(v[cut:] for v in images))
    for name, (list_loss, _) in WAYS.items():
        for rate in rates:
            _, curve, _ = train(list_loss, kept, held_out, num_steps, rate)
            print(f"{name:28s} rate {rate:<6} held-out NDCG@10 {curve[-1]:.4f}")


def draw(path, result, test_images, pixels, queries=(3, 30, 101, 257), shown=8):
    """The curves, and what the ranker trained on NDCG finds for a few queries."""
    figure = plt.figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    axes = left.subplots()
    for name, curve, colour in zip(
        result.names[1:], result.curves, ("#7f7f7f", "#1f77b4"), strict=True
    ):
        axes.plot(result.steps, curve, label=name, color=colour)
    axes.set(xlabel="step of Adam", ylabel="NDCG@10 of test queries")
    axes.set_title("Ranking by a learned distance", loc="left", fontsize=10.5)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    right.suptitle("A query, and what is ranked first (red: another digit)", fontsize=10.5)
    grid = right.subplots(len(queries), 1 + shown)
    for row, query in zip(grid, queries, strict=True):
        found = np.array(scores(result.metrics[-1], test_images.pixels[query], test_images.pixels))
        found[query] = -np.inf
        places = [query, *np.argsort(-found)[:shown]]
        for column, (axes, place) in enumerate(zip(row, places, strict=True)):
            wrong = test_images.digits[place] != test_images.digits[query]
            axes.imshow(pixels[place], cmap="Reds" if wrong else "gray_r")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(column == 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    choose_rates() if sys.argv[1:] == ["rates"] else main()
