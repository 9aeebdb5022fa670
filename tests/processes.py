"""One of several processes that share samples, started by test_devices.py.

    python processes.py RANK COUNT ADDRESS

As a program, this file prints, as JSON, what it found and how often its host function was called.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import perturbax as px

X = np.array([0.5, -1.0, 2.0], np.float32)
INDEPENDENT = {"sampler": px.Independent(), "degree": 0}
NUM_SAMPLES = 50


def fun(y, scale):
    return scale * jnp.sum(jnp.tanh(y) ** 2) + y[0] * y[1] + jnp.sum(y > 0)


def count_above(y):
    """For the host: numpy, called with one point, and failing at some."""
    count_above.calls += 1
    if y[2] > 2.3:
        raise ArithmeticError
    return np.float32(np.sum(y > 0))


count_above.calls = 0


def found(mesh):
    """Results of a few programs on the devices of a mesh, or without one, as lists of numbers."""
    key = jax.random.key(0)
    make = functools.partial(px.make_perturbed_fun, noise=px.Normal(), mesh=mesh)
    smooth = make(fun, NUM_SAMPLES, 0.5, **INDEPENDENT)

    @jax.jit
    @functools.partial(jax.jacfwd, has_aux=True)
    def derivatives(x):
        first = jax.value_and_grad(smooth, argnums=(1, 2))(key, x, 1.5)
        return first[1][0], first

    # Of two nets the points are shared out, for lack of groups.
    nets = px.estimate(make(fun, 64, 0.5, sampler=px.Sobol(), degree=1), key, X, 1.5)
    on_host = px.host_function(count_above, like=np.float32(0), on_failure="missing")
    called = make(on_host, NUM_SAMPLES, 0.5, missing="drop", **INDEPENDENT)
    results = {
        "derivatives": derivatives(X),
        "errors": (nets.value, nets.value_error, nets.gradient, nets.gradient_error),
        "host": jax.value_and_grad(called, argnums=1)(key, X),
    }
    return {
        name: [np.asarray(v).tolist() for v in jax.tree.leaves(values)]
        for name, values in results.items()
    }


if __name__ == "__main__":
    rank, count = map(int, sys.argv[1:3])
    jax.distributed.initialize(sys.argv[3], count, rank, initialization_timeout=60)
    mesh = jax.make_mesh((count,), ("processes",))
    print(json.dumps({**found(mesh), "calls": count_above.calls}))
