"""Draws docs/_static/minimizing.png: a run of `px.minimize` on a step-ellipsoid of 40 coordinates.

python docs/minimizing_example.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import perturbax as px

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIM = 40
WEIGHTS = 10 ** (2 * np.arange(DIM) / (DIM - 1))


def step_ellipsoid(x):
    """A quadratic of a rounded, rotated vector: flat almost everywhere."""
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (DIM, DIM)))[0]
    z = rotation @ (x - 1)
    rounded = jnp.where(jnp.abs(z) > 0.5, jnp.round(z), jnp.round(10 * z) / 10)
    return jnp.sum(jnp.asarray(WEIGHTS, x.dtype) * rounded**2)


def main():
    """Runs and draws."""
    start = 4 * jax.random.uniform(jax.random.key(2), (DIM,), minval=-1.0)
    found = px.minimize(
        step_ellipsoid, start, jax.random.key(0), max_evaluations=3_000, progress=False
    )
    print(found)
    _, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.set_yscale("log")
    found.plot(ax=axes)
    path = Path(__file__).parent / "_static" / "minimizing.png"
    axes.figure.savefig(path, dpi=130)
    print(path)


if __name__ == "__main__":
    main()
