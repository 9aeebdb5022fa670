"""Claim: no slower than optax.perturbations for functions with vector outputs, and for batches.

Reverse mode through a scalar loss of the perturbed output, as in training, of a ranking of 100
scores and the one-hot argmax of 1,000; for one input with 1,000 samples, and vmapped over 32
inputs, each with a key of its own, with 100 samples.

    python benchmarks/vector_outputs.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax.perturbations
from timing import alternate, keys, spread, table, write

import perturbax as px
from perturbax.sampling._independent import Independent

SIGMA = 0.5
MOST = 100
BATCH = 32


def ranking(scores):
    return jnp.sum(scores[:, None] > scores[None, :], axis=1).astype(jnp.float32)


def one_hot(scores):
    return jax.nn.one_hot(jnp.argmax(scores), scores.shape[0])


def relu_sum(x):
    return jnp.sum(jnp.maximum(x, 0.0))


# Name, function, size of its input, samples, inputs.
CASES = [
    ("ranking of 100", ranking, 100, 1_000, 1),
    ("one-hot of 1,000", one_hot, 1_000, 1_000, 1),
    ("ranking of 100, 32 inputs", ranking, 100, 100, BATCH),
    ("one-hot of 1,000, 32 inputs", one_hot, 1_000, 100, BATCH),
    ("ReLU sum of 100, 32 inputs", relu_sum, 100, 1_000, BATCH),
]


def gradient(smooth, target, batch):
    def loss(key, x):
        return jnp.mean((smooth(key, x) - target) ** 2)

    one = jax.grad(loss, argnums=1)
    return jax.jit(one if batch == 1 else jax.vmap(one))


def measure(fun, size, num_samples, batch, seconds):
    draw = np.random.RandomState(0)
    x = draw.normal(size=(batch, size) if batch > 1 else (size,)).astype(np.float32)
    x = jnp.asarray(x)
    target = fun(jnp.asarray(draw.normal(size=size), jnp.float32))
    smooths = {
        "default": px.make_perturbed_fun(fun, num_samples, SIGMA),
        "independent": px.make_perturbed_fun(
            fun, num_samples, SIGMA, sampler=Independent(), degree=0
        ),
        "optax": optax.perturbations.make_perturbed_fun(fun, num_samples, SIGMA),
    }
    turns = keys(MOST)
    if batch > 1:
        turns = jax.block_until_ready([jax.random.split(key, batch) for key in turns])
    gradients = {name: gradient(smooth, target, batch) for name, smooth in smooths.items()}
    calls = {n: lambda turn, g=g: g(turns[turn], x) for n, g in gradients.items()}
    return alternate(calls, seconds, most=MOST)


def main(cases=CASES, seconds=4.0):
    results, rows = [], []
    for name, fun, size, num_samples, batch in cases:
        timing = measure(fun, size, num_samples, batch, seconds)
        ratios = {n: timing.ratio("optax", n) for n in ("default", "independent")}
        met = {n: ratio["median"] >= 1 for n, ratio in ratios.items()}
        results.append(
            {
                "case": name,
                "num_samples": num_samples,
                "inputs": batch,
                "milliseconds": {n: timing.milliseconds(n) for n in timing.names},
                "times_as_fast_as_optax": ratios,
                "met": met,
            }
        )
        rows.append(
            [
                name,
                f"{num_samples:,}",
                *(f"{timing.milliseconds(n):.3g}" for n in timing.names),
                *(spread(ratio) for ratio in ratios.values()),
                "yes" if all(met.values()) else "short",
            ]
        )
    print("Gradient of a squared error of the output; times in ms, ratios with quartiles")
    head = ["case", "samples", "default", "independent", "optax"]
    print(table([*head, "optax / default", "optax / independent", "as fast"], rows))
    write("vector_outputs", f"keys 0 to {MOST - 1}, one a turn; inputs 0", results)


if __name__ == "__main__":
    main()
