"""Claim: for a JAX function, `px.minimize` takes at most 5 % longer than a loop written by hand.

The loop is `lax.scan` over value_and_grad of `make_perturbed_fun` and an update of Adam, compiled
once and for all, and keeps the values of its steps. `px.minimize` makes as many steps with the same
numbers, and besides looks for the best point, counts evaluations, and goes back to the host every
second; it is called as its users call it, so what it checks and traces at each call is counted.

    python benchmarks/minimize_loop.py [--steps STEPS] [--seconds SECONDS]
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from timing import alternate, spread, table, write

import perturbax as px

ADAM = optax.adam(0.01)
SIGMA = 0.3
# Coordinates, samples a step, and rows of data that the function looks at.
SIZES = ((20, 32, 1_000), (100, 64, 1_000), (1_000, 64, 300))


def share_wrong(weights, inputs, labels):
    return jnp.mean((inputs @ weights > 0) != labels)


def by_hand(num_samples, steps):
    def run(x, key, *data):
        smooth = px.make_perturbed_fun(
            lambda x: share_wrong(x, *data), num_samples, SIGMA, px.Normal()
        )

        def step(state, key):
            x, moments = state
            value, slope = jax.value_and_grad(smooth, argnums=1)(key, x)
            updates, moments = ADAM.update(slope, moments)
            return (optax.apply_updates(x, updates), moments), value

        return jax.lax.scan(step, (x, ADAM.init(x)), jax.random.split(key, steps))

    return jax.jit(run)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each size")
    arguments = parser.parse_args()
    steps, rows, results = arguments.steps, [], []
    for dim, num_samples, rows_of_data in SIZES:
        inputs = jax.random.normal(jax.random.key(0), (rows_of_data, dim))
        data = inputs, inputs @ jax.random.normal(jax.random.key(1), (dim,)) > 0
        x = jnp.zeros(dim)
        loop = by_hand(num_samples, steps)

        def minimized(turn, most, num_samples=num_samples, x=x, data=data):
            return px.minimize(
                share_wrong,
                x,
                jax.random.key(turn),
                args=data,
                optimizer=ADAM,
                sigma=SIGMA,
                num_samples=num_samples,
                max_evaluations=most,
                progress=False,
            )

        # In some steps the function is evaluated where they begin, too.
        most = int(minimized(0, 2 * steps * num_samples).history.evaluations[steps - 1])
        assert minimized(0, most + 4).num_steps == steps
        timing = alternate(
            {
                "px.minimize": lambda turn, f=minimized, most=most: f(turn, most + 4),
                "by hand": lambda turn, loop=loop, x=x, data=data: loop(
                    x, jax.random.key(turn), *data
                ),
            },
            seconds=arguments.seconds,
        )
        ratio = timing.ratio("px.minimize", "by hand")
        per_step = 1e3 * timing.milliseconds("by hand") / steps
        rows.append([f"{dim:,}", str(num_samples), f"{per_step:.0f}", spread(ratio)])
        results.append({"dim": dim, "num_samples": num_samples, "steps": steps, "ratio": ratio})
        print(rows[-1], flush=True)
    head = ["coordinates", "samples", "microseconds a step", "px.minimize / by hand"]
    print(f"\n{steps:,} steps, quartiles in brackets\n\n{table(head, rows)}")
    write("minimize_loop", "keys 0 and 1 for data, the number of the turn for noise", results)


if __name__ == "__main__":
    main()
