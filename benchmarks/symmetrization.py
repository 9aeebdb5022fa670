"""Claim: making the Jacobian of a perturbed argmax symmetric makes it less noisy.

Total variance over 200 keys of the Jacobian of the mean solution, 1,000 samples, as the plain
estimate over the symmetric one. The same noise, the same solutions.

    python benchmarks/symmetrization.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from timing import table, write

import perturbax as px

PROBLEMS = {
    "choice of 5": (px.solvers.one_hot_argmax, 5, {}),
    "top 3 of 20": (lambda v: px.solvers.top_k_mask(v, 3), 20, {}),
    "ranks of 10": (px.solvers.ranks, 10, {}),
    "path, 5 x 5": (
        lambda v: px.solvers.grid_shortest_path(v.reshape(5, 5)).reshape(-1),
        25,
        {"maximize": False},
    ),
}
NUM_KEYS, NUM_SAMPLES, SIGMA = 200, 1000, 0.5


def total_variance(solver, theta, noise, options):
    layer = px.make_perturbed_argmax(solver, NUM_SAMPLES, SIGMA, noise, **options)
    jacobian = jax.jit(lambda key: jax.jacrev(layer, argnums=1)(key, theta))
    draws = [np.asarray(jacobian(k)) for k in jax.random.split(jax.random.key(0), NUM_KEYS)]
    return np.var(draws, axis=0, ddof=1).sum()


def main():
    rows, found = [], []
    for name, (solver, dim, options) in PROBLEMS.items():
        theta = 1 + jax.random.uniform(jax.random.key(1), (dim,), jnp.float32)
        for noise in (px.Normal(), px.Gumbel()):
            for degree in (0, None):
                plain, symmetric = (
                    total_variance(
                        solver, theta, noise, {**options, "symmetrize": flag, "degree": degree}
                    )
                    for flag in (False, True)
                )
                law, chosen = type(noise).__name__, "default" if degree is None else "0"
                rows.append([name, law, chosen, f"{plain / symmetric:.2f}"])
                found.append(
                    {"problem": name, "noise": law, "degree": chosen, "ratio": plain / symmetric}
                )
    print(table(["problem", "noise", "degree", "variance, plain / symmetric"], rows))
    write("symmetrization", {"keys": 0, "theta": 1}, found)


if __name__ == "__main__":
    main()
