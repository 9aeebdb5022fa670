"""Claim: a second eager call compiles nothing, and costs no more than with optax.perturbations.

The value and the gradient, without jit, of a sum of ReLUs in 3 dimensions, 1,000 samples. The
compilations that JAX reports during the second call are counted; also with a new gradient function,
with another key, and of a function in which another Python number stands.

    python benchmarks/eager.py
"""

import jax
import jax.monitoring
import jax.numpy as jnp
import optax.perturbations
from timing import alternate, keys, spread, table, write

import perturbax as px
from perturbax.sampling._independent import Independent

MOST = 200
_compilations = []


def _listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(duration)


def relu_sum(x):
    return jnp.sum(jnp.maximum(x, 0.0))


def compilations(call):
    """How many compilations a call causes."""
    before = len(_compilations)
    jax.block_until_ready(call())
    return len(_compilations) - before


def main(seconds=4.0):
    jax.monitoring.register_event_duration_secs_listener(_listen)
    x = jnp.array([-1.0, 0.5, 2.0])
    turns = keys(MOST)
    smooths = {
        "default": px.make_perturbed_fun(relu_sum, 1_000),
        "independent": px.make_perturbed_fun(relu_sum, 1_000, sampler=Independent(), degree=0),
        "optax": optax.perturbations.make_perturbed_fun(relu_sum, 1_000),
    }
    # A slope that changes from step to step, known as a Python number when the function is traced.
    steeper = {
        "default": lambda fun: px.make_perturbed_fun(fun, 1_000),
        "independent": lambda fun: px.make_perturbed_fun(
            fun, 1_000, sampler=Independent(), degree=0
        ),
        "optax": lambda fun: optax.perturbations.make_perturbed_fun(fun, 1_000),
    }
    transforms = {"value": lambda g: g, "gradient": lambda g: jax.grad(g, argnums=1)}
    results, rows = [], []
    for what, transform in transforms.items():
        functions = {name: transform(smooth) for name, smooth in smooths.items()}
        counts = {}
        for name, function in functions.items():
            first = compilations(lambda f=function: f(turns[0], x))
            second = compilations(lambda f=function: f(turns[1], x))
            anew = compilations(lambda n=name, t=transform: t(smooths[n])(turns[2], x))
            for slope in (2.5, 1.5):
                other = compilations(
                    lambda n=name, t=transform, slope=slope: t(
                        steeper[n](lambda x: slope * relu_sum(x))
                    )(turns[3], x)
                )
            counts[name] = {
                "first": first,
                "second": second,
                "made anew": anew,
                "another number": other,
            }
        calls = {n: lambda turn, f=f: f(turns[turn], x) for n, f in functions.items()}
        timing = alternate(calls, seconds, most=MOST)
        for name in functions:
            ratio = timing.ratio("optax", name)
            met = not counts[name]["second"] and (name == "optax" or ratio["median"] >= 1)
            results.append(
                {
                    "what": what,
                    "by": name,
                    "milliseconds": timing.milliseconds(name),
                    "times_as_fast_as_optax": ratio,
                    "compilations": counts[name],
                    "met": met,
                }
            )
            rows.append(
                [
                    f"{what}, {name}",
                    f"{timing.milliseconds(name):.2f}",
                    spread(ratio) if name != "optax" else "",
                    *counts[name].values(),
                    ("yes" if met else "short") if name != "optax" else "",
                ]
            )
    print("Eager calls, 1,000 x 3; times in ms of a further call; compilations by call")
    head = ["", "ms", "optax / this", "first", "second", "made anew", "another number", "met"]
    print(table(head, rows))
    write("eager", f"keys 0 to {MOST - 1}, one a turn", results)


if __name__ == "__main__":
    main()
