"""The example of docs/diagnosing.md: its tables and its pictures.

Writes docs/_generated/sweep.txt, docs/_generated/diagnosis.txt and docs/_static/diagnosing.png.

    python docs/diagnosing_example.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent


def share_wrong(weights):
    """Of 500 points, those that a linear classifier puts on the wrong side."""
    inputs = jax.random.normal(jax.random.key(0), (500, 3))
    labels = inputs @ jnp.array([1.0, -2.0, 0.5]) > 0
    return jnp.mean((inputs @ weights > 0) != labels)


def main() -> None:
    """Writes the tables and the figure."""
    key, weights = jax.random.key(1), jnp.array([0.5, 0.2, 0.1])
    sigmas = [1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1]
    sweep = px.sweep_sigma(share_wrong, key, weights, noise=px.Normal(), sigmas=sigmas)
    g = px.make_perturbed_fun(share_wrong, num_samples=1000, sigma=0.2, noise=px.Normal())
    found = px.diagnose(g, key, weights, relative_error=0.02)
    for name, report in (("sweep", sweep), ("diagnosis", found)):
        path = DOCS / "_generated" / f"{name}.txt"
        path.write_text(f"{report}\n")
        print(f"{report}\n")

    # Two rows, for in one the letters were too small to read in a narrow window.
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False})
    canvas, axes = plt.subplot_mosaic(
        [["sweep", "sweep"], ["line", "errors"]], figsize=(7.2, 5.6), layout="constrained"
    )
    sweep.plot(ax=axes["sweep"])
    axes["sweep"].set_title("sweep.plot()")
    direction = jnp.array([0.0, 1.0, 0.0])
    px.plot_smoothing(g, key, weights, direction, ax=axes["line"])
    axes["line"].set_title("plot_smoothing(g, key, x, direction)")
    found.plot(ax=axes["errors"])
    axes["errors"].set_title("found.plot()")
    path = DOCS / "_static" / "diagnosing.png"
    canvas.savefig(path, dpi=130)
    plt.close(canvas)
    print(path)


if __name__ == "__main__":
    main()
