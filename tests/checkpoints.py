"""A run of `minimize` that keeps a checkpoint: as a program, for test_minimize.py to kill.

python checkpoints.py FILE

How long an evaluation takes is in the environment: were it data of the function, a run that takes
another time would be one of another function.
"""

import os
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import perturbax as px
from perturbax.minimization import _checkpoint, _minimize

target = np.ones(4, np.float32)


def slow(x):
    time.sleep(float(os.environ.get("SECONDS_AN_EVALUATION", 0)))
    return np.float32(np.sum(np.round(4 * x) ** 2))


@jax.jit
def fun(x):
    like = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(slow, like, x - target, vmap_method="sequential")


@mock.patch.object(_checkpoint, "_SECONDS_A_CHECKPOINT", 0.1)
@mock.patch.object(_minimize, "_SECONDS_A_BLOCK", 0.05)
def run(checkpoint=None):
    """The bits of what it finds, and its numbers of evaluations."""
    found = px.minimize(
        fun,
        jnp.zeros(4),
        jax.random.key(0),
        # Of the steps that compile soonest; test_minimize.py has checkpoints of the others.
        optimizer=optax.adam(0.05),
        sigma=0.5,
        sampler=px.Independent(),
        degree=0,
        num_samples=6,
        max_evaluations=700,
        checkpoint=checkpoint,
        progress=False,
    )
    bits = [np.asarray(v).view(np.uint32).tolist() for v in (found.x, found.history.smoothed_value)]
    return found.num_evaluations, found.history.evaluations.tolist(), *bits


if __name__ == "__main__":
    run(sys.argv[1])
