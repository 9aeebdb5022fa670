"""Many devices: the checks of meshes.py, which a process of its own runs, and what needs none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px

KEY = jax.random.key(0)


def run(program, *arguments, **environment):
    """What a program of this folder prints, on devices of a CPU."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(Path(px.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path.rstrip(os.pathsep), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(tests / program), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_on_eight_devices():
    report = json.loads(run("meshes.py", JAX_NUM_CPU_DEVICES="8"))
    assert report["ran"] == 12
    assert not report["failed"], "\n".join(report["failed"].values())


def test_a_mesh_of_one_device():
    mesh = jax.make_mesh((1,), ("samples",))

    def fun(y):
        return jnp.sum(y**2) + jnp.sum(y > 0)

    def gradient(mesh):
        g = px.make_perturbed_fun(fun, 40, 0.5, sampler=px.Independent(), degree=0, mesh=mesh)
        return jax.grad(g, argnums=1)(KEY, jnp.array([0.5, -1.0]))

    np.testing.assert_allclose(gradient(mesh), gradient(None), rtol=1e-5)


@pytest.mark.parametrize("make", [px.make_perturbed_fun, px.make_perturbed_argmax])
def test_what_is_no_mesh(make):
    with pytest.raises(TypeError, match=r"mesh must be None or a jax\.sharding\.Mesh, got list"):
        make(jnp.sort, mesh=jax.devices())
    with pytest.raises(ValueError, match="mesh must have at least one device"):
        make(jnp.sort, mesh=jax.sharding.Mesh(np.empty((0,), object), ("samples",)))
