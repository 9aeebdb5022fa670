"""Draws the figure of the noises: docs/_static/noise.png.

One pair of panels a noise: its density and a step smoothed by it; a quantiser smoothed by it. All
curves are exact, by the distribution function: the smoothed step at x is P(x + sigma eps > 0).

    python docs/pictures.py
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISES = {
    "Normal()": px.Normal(),
    "Logistic()": px.Logistic(),
    "Gumbel()": px.Gumbel(),
    "Laplace()": px.Laplace(),
    "Cauchy()": px.Cauchy(),
    "StudentT(5)": px.StudentT(5),
    "Triangular()": px.Triangular(),
    "Uniform()": px.Uniform(),
}
# Where a quantiser of five levels, -2 to 2, goes up by one.
THRESHOLDS = np.array([-1.5, -0.5, 0.5, 1.5])
SIGMA = 0.25
GREY, FILL, STEP, LEVELS = "0.6", "#cfdcec", "#1f4e8c", "#b3400e"


def density(noise: Any, z: np.ndarray) -> np.ndarray:
    """The slope of the distribution function, which has its constant factor."""
    with np.errstate(over="ignore"):  # far out in the lower tail of Gumbel noise
        return np.asarray(jax.vmap(jax.grad(lambda v: noise.cdf(v)))(jnp.asarray(z)))


def smoothed(noise: Any, x: np.ndarray, sigma: float, thresholds: np.ndarray) -> np.ndarray:
    """What a staircase with steps of one at the thresholds becomes, less its lowest level."""
    below = np.asarray(noise.cdf(jnp.asarray((thresholds[None] - x[:, None]) / sigma)))
    return np.sum(1 - below, axis=1)


def panels(top: Any, bottom: Any, noise: Any) -> None:
    """Density and step above, quantiser below."""
    z = np.linspace(-4, 4, 1601)
    top.fill_between(z, density(noise, z), color=FILL, linewidth=0, label="density")
    top.step([-4, 0, 4], [0, 0, 1], where="pre", color=GREY, linewidth=1, label="step, quantiser")
    top.plot(z, smoothed(noise, z, 1.0, np.zeros(1)), color=STEP, label="smoothed step, σ = 1")
    x = np.linspace(-2.5, 2.5, 1001)
    bottom.step([-2.5, *THRESHOLDS, 2.5], [-2, -2, -1, 0, 1, 2], where="pre", color=GREY, lw=1)
    values = smoothed(noise, x, SIGMA, THRESHOLDS) - len(THRESHOLDS) / 2
    bottom.plot(x, values, color=LEVELS, label=f"smoothed quantiser, σ = {SIGMA:g}")
    top.set(xlim=(-4, 4), ylim=(-0.03, 1.08), xticks=[-4, -2, 0, 2, 4], yticks=[0, 0.5, 1])
    bottom.set(xlim=(-2.5, 2.5), ylim=(-2.3, 2.3), xticks=[-2, -1, 0, 1, 2], yticks=[-2, 0, 2])


def main() -> None:
    """Writes the figure."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    canvas, axes = plt.subplots(4, 4, figsize=(8.4, 6.8), sharey="row", layout="constrained")
    for i, (name, noise) in enumerate(NOISES.items()):
        row, column = divmod(i, 4)
        top, bottom = axes[2 * row : 2 * row + 2, column]
        panels(top, bottom, noise)
        top.set_title(name, fontsize=9, fontweight="bold")
    handles = [
        entry
        for axis in axes[:2, 0]
        for entry in zip(*axis.get_legend_handles_labels(), strict=True)
    ]
    canvas.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=4, frameon=False)
    path = Path(__file__).resolve().parent / "_static" / "noise.png"
    path.parent.mkdir(exist_ok=True)
    canvas.savefig(path, dpi=130)
    plt.close(canvas)
    print(path)


if __name__ == "__main__":
    main()
