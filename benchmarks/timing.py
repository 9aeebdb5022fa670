"""Shared by the benchmarks: fair timing, the machine they ran on, tables and JSON.

Callables to be compared take turns in one process, so that other load on the machine affects all of
them alike. For two of them the median of the ratio of their times over the turns is reported, with
its quartiles.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "benchmarks"
# A turn shorter than this is mostly clock and dispatch, and is made of several calls.
_SHORTEST_TURN = 2e-3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, (turns, callables), and what the calls returned, one result a turn."""

    names: tuple[str, ...]
    seconds: np.ndarray
    results: dict[str, list[Any]]

    def milliseconds(self, name: str) -> float:
        """Median time of a call."""
        return float(1e3 * np.median(self.seconds[:, self.names.index(name)]))

    def ratio(self, numerator: str, denominator: str) -> dict[str, float]:
        """Quartiles, over the turns, of the ratio of the times of two callables."""
        above, below = (self.seconds[:, self.names.index(v)] for v in (numerator, denominator))
        low, median, high = np.quantile(above / below, [0.25, 0.5, 0.75])
        turns = len(self.seconds)
        return {"median": median, "lower": low, "upper": high, "turns": turns}


def alternate(
    calls: dict[str, Callable[[int], Any]],
    seconds: float = 4.0,
    least: int = 5,
    most: int = 200,
    keep: bool = False,
) -> Timing:
    """Times callables in turns.

    Args:
      calls: callables by name; each is handed the number of the turn, from which it takes its key.
        Called once beforehand, to compile.
      seconds: how long to go on, once there are `least` turns.
      least: fewest turns.
      most: most turns.
      keep: whether to keep the results, as numpy arrays.

    Returns:
      The times of all turns.
    """
    names = tuple(calls)
    for call in calls.values():
        jax.block_until_ready(call(0))
    repeats = []
    for call in calls.values():
        start = time.perf_counter()
        jax.block_until_ready(call(0))
        repeats.append(1 + int(_SHORTEST_TURN / (time.perf_counter() - start)))
    times, results = [], {name: [] for name in names}
    begin = time.perf_counter()
    while len(times) < most and (len(times) < least or time.perf_counter() - begin < seconds):
        turn, row = len(times), np.empty(len(names))
        for i in np.roll(np.arange(len(names)), turn):  # no one is always first
            call, result = calls[names[i]], None
            start = time.perf_counter()
            for _ in range(repeats[i]):
                result = jax.block_until_ready(call(turn))
            row[i] = (time.perf_counter() - start) / repeats[i]
            if keep:
                results[names[i]].append(jax.tree.map(np.asarray, result))
        times.append(row)
    return Timing(names, np.array(times), results)


def keys(count: int, seed: int = 0) -> list[jax.Array]:
    """Keys to hand out turn by turn, made before the clock runs."""
    made = [jax.random.key(seed + i) for i in range(count)]
    return jax.block_until_ready(made)


def fresh(script: str, *arguments: Any) -> dict[str, Any]:
    """Runs a benchmark with arguments in a process of its own; what it prints last is JSON."""
    command = [sys.executable, script, *map(str, arguments)]
    # A cache of compiled programs would hide what is measured.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    run = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            v.split(":")[1].strip()
            for v in info.read_text().splitlines()
            if v.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    packages = ("jax", "jaxlib", "numpy", "optax", "perturbax")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(name: str, seeds: Any, results: Any) -> None:
    """Writes results, with the machine they are from, to a JSON file, and says where."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}.json"
    about = machine()
    report = {"benchmark": name, "machine": about, "seeds": seeds, "results": results}
    path.write_text(json.dumps(report, indent=2, default=float) + "\n")
    print(
        f"\n{about['cores']} x {about['cpu']}, {about['backend']}, load {about['load']}, "
        f"jax {about['jax']}, optax {about['optax']}, perturbax {about['perturbax']}, "
        f"{about['date']}\nseeds: {seeds}\n{path.relative_to(ROOT)}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, aligned so that it reads as plain text too."""
    cells = [[str(v) for v in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # The first column is text, the others are figures.
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    rule = ["-" * w if j == 0 else "-" * (w - 1) + ":" for j, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(r) + " |" for r in (aligned[0], rule, *aligned[1:]))


def spread(ratio: dict[str, float]) -> str:
    """A ratio and its quartiles, in words."""
    return f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"
