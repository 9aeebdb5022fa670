"""Many devices: the checks of meshes.py, which a process of its own runs, and what needs none."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbax as px
import processes
from helpers import assert_trees_close, import_program

KEY = jax.random.key(0)


def start(program, *arguments, devices):
    """A program of this folder, with devices of a CPU."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(Path(px.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": path.rstrip(os.pathsep),
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(tests / program), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def reports(processes, seconds=600):
    """What processes print last, as JSON; they all end, whatever becomes of one of them."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_on_eight_devices(everything):
    [report] = reports([start("meshes.py", *["--all"] * everything, devices=8)])
    assert report["ran"] == 16
    assert not report["failed"], "\n".join(report["failed"].values())


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.full)])
def test_in_several_processes(count):
    """All find what one process finds; each calls the host for its own samples."""
    address = f"localhost:{free_port()}"
    started = [start("processes.py", i, count, address, devices=1) for i in range(count)]
    each = reports(started)
    expected = processes.found(None)
    calls = [report.pop("calls") for report in each]
    assert sum(calls) == processes.NUM_SAMPLES
    assert max(calls) <= -(-processes.NUM_SAMPLES // count) + 4  # a chunk has 4 samples
    for report in each:
        assert_trees_close(report, each[0])
        assert_trees_close(report, expected, rtol=1e-4, atol=1e-5)


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


def test_benchmark_of_an_accelerator_on_a_cpu(monkeypatch, tmp_path, capsys):
    """One table, at small sizes: times, memory and precision of both libraries."""
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    gpu = import_program(benchmarks, monkeypatch, "gpu")
    monkeypatch.setattr(sys.modules["timing"], "OUTPUT", tmp_path)
    monkeypatch.setattr(sys.modules["timing"], "ROOT", tmp_path)
    results = gpu.main(small=True, seconds=0.0)
    told = capsys.readouterr().out
    for num_samples, dim in gpu.SMALL:
        assert f"{num_samples:,} x {dim:,}" in told
    for row in results["speed"]:
        # What a chunk holds, not all noise: several arrays of its size, of 4 bytes a number.
        most = 4 * 4 * max(2**19, row["dim"])
        assert row["planned"]["perturbax"] < most
        assert set(row["milliseconds"]) == {"perturbax", "optax"}
    assert results["variance"][0]["variance_ratio"] > 2
    assert json.loads((tmp_path / "gpu_small.json").read_text())["results"]["device"]
