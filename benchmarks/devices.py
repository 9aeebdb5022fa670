"""Claim: two processes share the samples of a gradient 1.8 times as fast as one has them alone.

Speed: the gradient of a sum of ReLUs, 10,000 samples in 10,000 coordinates, Gumbel noise. Two
processes with a core each, which share the samples through `mesh=`, against one process with one
core and no mesh. All three are started once, and take turns, so that other load on the machine
affects both alike; reported is the median of the ratios with its quartiles. A machine with fewer
than two cores that nothing else uses cannot show what this measures.

Traffic: what the compiled program of a gradient moves between devices, counted from its text, for
1, 2, 4 and 8 devices.

Plan: what that comes to on more machines than there are here, computed, not measured: the part of
their time that is work, not exchange, if messages of neighbours all go at the speed of a link.

    python benchmarks/devices.py
"""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import spread, table, write

import perturbax as px

NUM_SAMPLES, DIM = 10_000, 10_000
LEAST = 1.8
TURNS = 15
# Samples, coordinates, options.
PROGRAMS = [
    (10_000, 10_000, {}),
    (100_000, 10_000, {}),
    (1_000, 1_000_000, {}),
    (1_024, 100, {}),
]
DEVICES = (1, 2, 4, 8)
# What is estimated: samples, coordinates, seconds for one evaluation; None for what is measured.
PLANS = [
    ("ReLU sum, one core each", NUM_SAMPLES, DIM, None),
    ("a simulation of 20 ms", 1_024, 1_000, 0.02),
    ("a model of 0.1 s", 1_024, 10_000_000, 0.1),
]
MACHINES = (8, 64, 512)
LINK, LATENCY = 10e9 / 8, 50e-6  # bytes a second, seconds a message


def relu_sum(x):
    return jnp.sum(jnp.maximum(x, 0.0))


def point(dim):
    return np.linspace(-1.0, 2.0, dim, dtype=np.float32)


# --- Speed


def work(rank, count, address, num_samples, dim):
    """One process: a gradient for every line that it reads; it answers with the seconds."""
    if count:
        jax.distributed.initialize(address, count, rank, initialization_timeout=60)
    mesh = jax.make_mesh((count,), ("samples",)) if count else None
    gradient = jax.jit(jax.grad(px.make_perturbed_fun(relu_sum, num_samples, mesh=mesh), argnums=1))
    x = point(dim)
    for line in sys.stdin:
        key = jax.random.key(int(line))
        start = time.perf_counter()
        found = np.asarray(gradient(key, x))
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "norm": float(np.linalg.norm(found))}), flush=True)


def start(rank, count, address, *size):
    """A process on one core."""
    arguments = ["work", rank, count, address, *size]
    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    cores = sorted(os.sched_getaffinity(0))
    # Before the process makes its threads; Python itself takes far longer to start.
    os.sched_setaffinity(process.pid, {cores[rank % len(cores)]})
    return process


def ask(processes, turn):
    """Seconds for one gradient by some processes, and its norm."""
    for process in processes:
        process.stdin.write(f"{turn}\n")
        process.stdin.flush()
    found = []
    for process in processes:
        line = process.stdout.readline()
        while line and not line.startswith("{"):  # what libraries print
            line = process.stdout.readline()
        found.append(json.loads(line))
    return max(v["seconds"] for v in found), found[0]["norm"]


def speed(num_samples, dim, turns, count=2):
    """Times of one process and of several, in turns."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        address = f"localhost:{one.getsockname()[1]}"
    alone = [start(0, 0, "", num_samples, dim)]
    together = [start(rank, count, address, num_samples, dim) for rank in range(count)]
    try:
        norms = ask(alone, 0)[1], ask(together, 0)[1]  # compiled
        if abs(norms[0] / norms[1] - 1) > 1e-4:
            raise RuntimeError(f"different gradients, of norms {norms[0]} and {norms[1]}")
        seconds = np.array(
            [[ask(who, turn)[0] for who in (alone, together)] for turn in range(1, turns + 1)]
        )
    finally:
        for process in (*alone, *together):
            process.stdin.close()
        for process in (*alone, *together):
            process.wait(timeout=60)
    low, median, high = np.quantile(seconds[:, 0] / seconds[:, 1], [0.25, 0.5, 0.75])
    return {
        "num_samples": num_samples,
        "dim": dim,
        "processes": count,
        "seconds": {"one": np.median(seconds[:, 0]), "several": np.median(seconds[:, 1])},
        "times_as_fast": {"median": median, "lower": low, "upper": high, "turns": turns},
    }


# --- Traffic


def received(text, count):
    """Bytes that each of `count` devices receives in a program, by operation."""
    found, in_loop = {}, set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    operation = re.compile(
        r" = (\(?.*?\)?) (all-gather|all-reduce|collective-permute|all-to-all)(?:-start)?\("
    )
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and "(" in line:
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        match = operation.search(line)
        if not match:
            continue
        if computation in in_loop:
            raise RuntimeError(f"a loop communicates: {line}")
        size = 0
        for kind, shape in re.findall(r"([a-z]+\d+|pred)\[([\d,]*)\]", match.group(1)):
            width = int(re.sub(r"\D", "", kind) or 8) / 8
            size += width * np.prod([int(v) for v in shape.split(",") if v], dtype=int)
        if match.group(2) == "all-gather":  # a part of it is the device's own
            size *= (count - 1) / count
        found[match.group(2)] = found.get(match.group(2), 0) + size
    return found


def traffic(num_samples, dim, options):
    """Bytes that each of several devices receives for one gradient."""
    key, x = jax.random.key(0), jnp.zeros(dim)
    by_count = {}
    for count in DEVICES:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("samples",))
        smooth = px.make_perturbed_fun(relu_sum, num_samples, mesh=mesh, **options)
        compiled = jax.jit(jax.value_and_grad(smooth, argnums=1)).lower(key, x).compile()
        by_count[count] = received(compiled.as_text(), count)
    return {"num_samples": num_samples, "dim": dim, "received": by_count}


# --- Plan


def plan(seconds_alone):
    """For each number of machines, the part of the time in which they evaluate."""
    rows = []
    for name, num_samples, dim, each in PLANS:
        work = seconds_alone if each is None else num_samples * each
        parts = []
        for count in MACHINES:
            exchange = math.log2(count) * (LATENCY + 2 * 4 * dim / LINK)
            parts.append(work / count / (work / count + exchange))
        rows.append({"name": name, "num_samples": num_samples, "dim": dim, "busy": parts})
    return rows


def main(num_samples=NUM_SAMPLES, dim=DIM, turns=TURNS, programs=PROGRAMS):
    found = speed(num_samples, dim, turns)
    ratio = found["times_as_fast"]
    met = ratio["median"] >= LEAST
    print("Gradient of a ReLU sum: one process with one core, and two with a core each")
    cells = [
        f"{num_samples:,} x {dim:,}",
        f"{found['seconds']['one']:.3f}",
        f"{found['seconds']['several']:.3f}",
        spread(ratio),
        f"{LEAST:g}",
        "yes" if met else "short",
    ]
    print(table(["N x D", "one, s", "two, s", "times as fast", "at least", "met"], [cells]))
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(max(DEVICES)), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    run = subprocess.run(
        [sys.executable, __file__, "traffic", json.dumps(programs)],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        env=environment,
    )
    moved = json.loads(run.stdout.splitlines()[-1])
    print("\nBytes that each device receives for a value and its gradient")
    rows = [
        [f"{m['num_samples']:,} x {m['dim']:,}"]
        + [f"{sum(m['received'][str(n)].values()):,.0f}" for n in DEVICES]
        + [" ".join(m["received"][str(DEVICES[-1])])]
        for m in moved
    ]
    print(table(["N x D", *(f"{n} devices" for n in DEVICES), "operations"], rows))
    planned = plan(found["seconds"]["one"])
    print("\nComputed: part of the time that is work, at 10 Gbit/s and 50 microseconds a message")
    rows = [
        [p["name"], f"{p['num_samples']:,} x {p['dim']:,}", *(f"{v:.0%}" for v in p["busy"])]
        for p in planned
    ]
    print(table(["function", "N x D", *(f"{n} machines" for n in MACHINES)], rows))
    results = {"speed": found, "least": LEAST, "met": met, "traffic": moved, "plan": planned}
    write("devices", f"keys 0 to {turns}, one a turn", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        rank, count, address, num_samples, dim = sys.argv[2:]
        work(int(rank), int(count), address, int(num_samples), int(dim))
    elif sys.argv[1:2] == ["traffic"]:
        print(json.dumps([traffic(*program) for program in json.loads(sys.argv[2])]))
    else:
        main()
