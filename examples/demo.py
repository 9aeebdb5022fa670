"""Four examples in one run, and a figure of what they found: build/demo.png.

All others are run on their own; this one calls the `main` of the four and draws.

    python examples/demo.py
"""

import time
from pathlib import Path

import compare_optax
import digits
import discrete_choice
import matplotlib
import numpy as np
import relu_gradient

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

INK, MUTED, FAINT = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN = "#2463a8", "#d9622b", "#3c8d5a"
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "figure.dpi": 150,
    "font.size": 10,
    "grid.color": FAINT,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


def heading(text):
    print(f"\n{text}", flush=True)


def main(path="build/demo.png", num_keys=100, num_steps=300, problems=None):
    """Runs the examples, smaller if asked to, and returns the path of the figure."""
    start = time.perf_counter()
    heading("The gradient of a sum of ReLUs, from values alone")
    relu = relu_gradient.main(num_keys=num_keys)
    heading("A choice among three options, optimised through its argmax")
    choice = discrete_choice.main()
    heading("Handwritten digits, trained on the number of errors itself")
    trained = digits.main(None, num_steps=num_steps)
    heading("The same gradients by optax.perturbations")
    compare_optax.main(problems)
    path = draw(path, relu, choice, trained)
    print(f"\nFigure: {path}")
    print(f"{time.perf_counter() - start:.0f} seconds")
    return path


def draw(path, relu, choice, trained):
    """Writes the figure as a PNG file and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12, 9), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1), hspace=0.04)
        top_left, top_right = top.subfigures(1, 2, width_ratios=(1, 1), wspace=0.03)
        bottom_left, bottom_right = bottom.subfigures(1, 2, width_ratios=(1, 1), wspace=0.03)
        draw_training(top_left, trained)
        draw_digits(top_right, trained)
        draw_relu(bottom_left, relu)
        draw_choice(bottom_right, choice)
        figure.savefig(path)
        plt.close(figure)
    return path


def title(figure, text):
    figure.suptitle(text, x=0.01, ha="left", fontsize=11.5, fontweight="bold")


def draw_training(figure, trained):
    title(figure, "A classifier trained on its number of errors")
    axes = figure.subplots()
    steps = np.arange(1, len(trained.train_errors) + 1)
    for errors, color, name in (
        (trained.train_errors, BLUE, "training"),
        (trained.test_errors, ORANGE, "test"),
    ):
        axes.plot(steps, 100 * errors, color=color, label=f"{name}: {errors[-1]:.1%} at the end")
    reference = 100 * trained.logistic_test_error
    axes.axhline(reference, color=MUTED, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"logistic regression, test: {reference:.1f} %",
        (steps[-1], reference),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=MUTED,
    )
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.set(xlabel="step (Adam)", ylabel="images wrong (%)", xlim=(0, steps[-1]), ylim=(1, 100))
    axes.legend(loc="upper right")


def draw_digits(figure, trained, rows=4, columns=6):
    wrong = np.flatnonzero(trained.test_predictions != trained.test_labels)
    shown = wrong[: rows * columns]
    number = "The" if len(shown) == len(wrong) else f"{len(shown)} of the"
    title(
        figure,
        f"{number} {len(wrong)} of {len(trained.test_labels)} test images it gets wrong"
        " (true, not predicted)",
    )
    ink = LinearSegmentedColormap.from_list("ink", ["white", INK])
    for axes in figure.subplots(rows, columns, gridspec_kw={"hspace": 0.06}).flat:
        axes.axis("off")
    for axes, i in zip(figure.axes, shown, strict=False):
        axes.imshow(trained.test_pixels[i], cmap=ink, vmin=0, vmax=16)
        axes.set_title(f"{trained.test_labels[i]}, not {trained.test_predictions[i]}", pad=3)


def draw_relu(figure, relu):
    title(figure, f"A ReLU smoothed by Gumbel noise (σ = {relu.sigma}), and its gradient")
    value_axes, gradient_axes = figure.subplots(2, 1, sharex=True)
    value_axes.plot(relu.sweep, np.maximum(relu.sweep, 0), color=MUTED, label="ReLU")
    for axes, estimates in (
        (value_axes, relu.sweep_value),
        (gradient_axes, relu.sweep_gradient),
    ):
        axes.plot(relu.sweep, estimates.exact, color=BLUE, label="smoothed, exact")
        axes.errorbar(
            relu.sweep,
            estimates.rows[0],
            yerr=2 * estimates.deviation,
            fmt="o",
            markersize=3.5,
            linewidth=1,
            capsize=2,
            color=ORANGE,
            label=f"{relu.sweep_samples} samples, ± 2 s.e.",
        )
    value_axes.set_ylabel("value")
    value_axes.legend(loc="upper left")
    gradient_axes.set(xlabel="x", ylabel="gradient")


def draw_choice(figure, choice):
    title(figure, "A choice among three options, optimised through its argmax")
    loss_axes, weight_axes = figure.subplots(2, 1, sharex=True)
    loss_axes.plot(choice.exact, color=BLUE, label="exact")
    loss_axes.plot(choice.losses, ".", color=ORANGE, markersize=4, label="estimate at each step")
    loss_axes.set_ylabel("objective")
    loss_axes.legend(loc="upper right")
    for i, color in enumerate((GREEN, ORANGE, BLUE)):
        path = choice.weights[:, i]
        weight_axes.plot(path, color=color)
        weight_axes.annotate(
            f"option {i + 1}",
            (len(path) - 1, path[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )
    weight_axes.set(xlabel="step (Adam)", ylabel="weight", xlim=(0, len(choice.weights) * 1.12))


if __name__ == "__main__":
    main()
