"""Claim: at equal numbers of evaluations, gradients are as fast as optax.perturbations' or faster.

The gradient of a sum of ReLUs, Gumbel noise, sigma 0.1, for N samples in D dimensions. Compared are

- perturbax with its defaults, which choose a sampler and a surrogate;
- perturbax with independent samples and a constant surrogate, which does what optax does;
- one fused loop ("limit" in the tables): draw the same noise, evaluate the function on it once and
  sum, in one jitted expression and nothing else.

    python benchmarks/speed.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax.perturbations
from jax import lax
from timing import alternate, keys, spread, table, write

import perturbax as px
from perturbax.sampling import _random_bits
from perturbax.sampling._independent import Independent

SIGMA = 0.1
MOST = 200
# N, D and how many times as fast as optax.perturbations it should be at least.
CASES = [
    (1_000, 3, 1.0),
    (1_000, 100, 1.0),
    (100, 1_000, 1.0),
    (1_000, 10_000, 4.0),
    (100, 100_000, 4.0),
    (10, 1_000_000, 3.0),
]


def relu_sum(x):
    return jnp.sum(jnp.maximum(x, 0.0))


def draw_and_evaluate(num_samples, dim):
    def total(key, x):
        words = _random_bits.words(
            _random_bits.root(key),
            lax.iota(jnp.uint32, num_samples)[:, None],
            lax.iota(jnp.uint32, dim)[None, :],
            np.dtype(np.float32),
        )
        return jnp.sum(jax.vmap(relu_sum)(x + SIGMA * px.Gumbel().from_bits(words)))

    return total


def measure(num_samples, dim, seconds):
    x = jnp.asarray(np.linspace(-1.0, 2.0, dim, dtype=np.float32))
    by_default = px.make_perturbed_fun(relu_sum, num_samples, SIGMA)
    independent = px.make_perturbed_fun(
        relu_sum, num_samples, SIGMA, sampler=Independent(), degree=0
    )
    theirs = optax.perturbations.make_perturbed_fun(relu_sum, num_samples, SIGMA)
    functions = {
        "default": jax.jit(jax.grad(by_default, argnums=1)),
        "independent": jax.jit(jax.grad(independent, argnums=1)),
        "optax": jax.jit(jax.grad(theirs, argnums=1)),
        "limit": jax.jit(draw_and_evaluate(num_samples, dim)),
    }
    turns = keys(MOST)
    calls = {n: lambda turn, f=f: f(turns[turn], x) for n, f in functions.items()}
    return alternate(calls, seconds, most=MOST)


def main(cases=CASES, seconds=4.0):
    results, rows = [], []
    for num_samples, dim, least in cases:
        timing = measure(num_samples, dim, seconds)
        ratios = {
            "default": timing.ratio("optax", "default"),
            "independent": timing.ratio("optax", "independent"),
            "limit": timing.ratio("default", "limit"),
            "independent_limit": timing.ratio("independent", "limit"),
        }
        met = {name: ratios[name]["median"] >= least for name in ("default", "independent")}
        results.append(
            {
                "num_samples": num_samples,
                "dim": dim,
                "milliseconds": {name: timing.milliseconds(name) for name in timing.names},
                "times_as_fast_as_optax": {n: ratios[n] for n in ("default", "independent")},
                "times_the_limit": {
                    "default": ratios["limit"],
                    "independent": ratios["independent_limit"],
                },
                "least": least,
                "met": met,
            }
        )
        rows.append(
            [
                f"{num_samples:,} x {dim:,}",
                *(f"{timing.milliseconds(name):.3g}" for name in timing.names),
                spread(ratios["default"]),
                spread(ratios["independent"]),
                f"{least:g}",
                "yes" if all(met.values()) else "short",
                spread(ratios["limit"]),
                spread(ratios["independent_limit"]),
            ]
        )
    print("Gradient of a ReLU sum, Gumbel noise; times in ms, ratios with quartiles")
    head = ["N x D", "default", "independent", "optax", "limit"]
    head += ["optax / default", "optax / independent", "at least", "met"]
    head += ["default / limit", "independent / limit"]
    print(table(head, rows))
    write("speed", f"keys 0 to {MOST - 1}, one a turn", results)


if __name__ == "__main__":
    main()
