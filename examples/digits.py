"""Handwritten digits, classified by minimising the number of errors itself.

A linear classifier of scikit-learn's 1,797 images (8 x 8 pixels, ten digits) is trained on the
0/1 error of the training images. That error has derivative zero wherever it has one, which is why
classifiers are trained on a surrogate (cross-entropy, hinge). Perturbing the 650 parameters makes
the error itself smooth, and its gradient is estimated from 256 values a step.

Split: 70 % of the images to train (1,257), 30 % to test (540), digits in equal shares, seed 0.

    python examples/digits.py
"""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Images(NamedTuple):
    """Images as a classifier sees them, one column an image, and their digits."""

    features: jax.Array  # (65, n): the pixels, centred, and a constant 1
    labels: jax.Array  # (n,)


class Result(NamedTuple):
    """The trained classifier, its errors on the way, and the test images to look at."""

    weights: np.ndarray  # (10, 65), the last column is the bias
    train_errors: np.ndarray  # (num_steps,), share of the images, after each step
    test_errors: np.ndarray
    logistic_train_error: float
    logistic_test_error: float
    seconds: float  # of training, compilation included
    test_pixels: np.ndarray  # (n, 8, 8)
    test_labels: np.ndarray  # (n,)
    test_predictions: np.ndarray  # (n,)


def load(seed=0):
    """The training images, the test images, and the latter's pixels for a look at them."""
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    train_pixels, test_pixels, train_labels, test_labels = train_test_split(
        pixels, labels, test_size=0.3, stratify=labels, random_state=seed
    )
    mean = train_pixels.mean(axis=0)

    def images(pixels, labels):
        centred = (pixels - mean) / 16  # pixels are whole numbers from 0 to 16
        features = np.concatenate([centred.T, np.ones((1, len(labels)))])
        return Images(jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32))

    return images(train_pixels, train_labels), images(test_pixels, test_labels), test_pixels


def predict(weights, features):
    return jnp.argmax(weights @ features, axis=0)


def error_rate(weights, images):
    """The share of the images that a linear classifier gets wrong; a step function of weights."""
    return jnp.mean(predict(weights, images.features) != images.labels)


def logistic_regression(train, test):
    """The usual surrogate on the same images: the errors in training and test."""
    classifier = LogisticRegression(max_iter=1000)
    classifier.fit(train.features.T, train.labels)
    return [1 - classifier.score(i.features.T, i.labels) for i in (train, test)]


def main(
    path="build/digits.png", num_steps=300, num_samples=256, sigma=0.3, learning_rate=0.05, seed=0
):
    """Trains, prints what that is worth, and draws it unless path is None; returns the Result."""
    train, test, test_pixels = load()
    smooth_error = px.make_perturbed_fun(error_rate, num_samples, sigma, px.Normal())
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    @jax.jit
    def update(step, weights, state, train, test):
        key = jax.random.fold_in(jax.random.key(seed), step)
        # Arguments after weights are passed to error_rate unchanged.
        gradient = jax.grad(smooth_error, argnums=1)(key, weights, train)
        updates, state = optimizer.update(gradient, state)
        weights = optax.apply_updates(weights, updates)
        return weights, state, error_rate(weights, train), error_rate(weights, test)

    start = time.perf_counter()
    weights = jnp.zeros((10, 65))
    state = optimizer.init(weights)
    errors = []
    with tqdm(range(num_steps), "  training", unit="step", leave=False) as steps:
        for step in steps:
            weights, state, *step_errors = update(step, weights, state, train, test)
            errors.append([float(e) for e in step_errors])
            steps.set_postfix_str(f"test error {errors[-1][1]:.1%}", refresh=False)
    seconds = time.perf_counter() - start

    train_errors, test_errors = np.array(errors).T
    logistic_train_error, logistic_test_error = logistic_regression(train, test)
    result = Result(
        weights=np.asarray(weights),
        train_errors=train_errors,
        test_errors=test_errors,
        logistic_train_error=logistic_train_error,
        logistic_test_error=logistic_test_error,
        seconds=seconds,
        test_pixels=test_pixels.reshape(-1, 8, 8),
        test_labels=np.asarray(test.labels),
        test_predictions=np.asarray(predict(weights, test.features)),
    )
    show(result)
    if path is not None:
        draw(Path(path), result)
        print(f"Figure: {path}")
    return result


def show(result):
    print(f"  {result.weights.size} parameters, trained in {result.seconds:.1f} s")
    print("  images wrong                        training     test")
    for name, train, test in (
        ("number of errors, perturbed", result.train_errors[-1], result.test_errors[-1]),
        ("logistic regression", result.logistic_train_error, result.logistic_test_error),
    ):
        print(f"  {name:35} {train:7.1%}  {test:7.1%}")


def draw(path, result, rows=3, columns=6):
    """The errors on the way, and test images that are taken for another digit."""
    figure = plt.figure(figsize=(11, 4), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    axes = left.subplots()
    axes.semilogy(100 * result.train_errors, color="#1f77b4", label="training")
    axes.semilogy(100 * result.test_errors, color="#ff7f0e", label="test")
    reference = 100 * result.logistic_test_error
    axes.axhline(reference, color="#7f7f7f", ls="--", lw=1, label="logistic regression, test")
    axes.set(xlabel="step of Adam", ylabel="images wrong, %")
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    wrong = np.flatnonzero(result.test_predictions != result.test_labels)
    right.suptitle(f"Of the {len(wrong)} test images that it gets wrong", fontsize=10.5)
    for axes in right.subplots(rows, columns).flat:
        axes.axis("off")
    for axes, i in zip(right.axes, wrong[: rows * columns], strict=False):
        axes.imshow(result.test_pixels[i], cmap="gray_r")
        axes.set_title(f"{result.test_labels[i]}, not {result.test_predictions[i]}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
