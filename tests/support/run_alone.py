"""One ONNX graph in a process of its own: what it took, in seconds and bytes. Run as a program, it is that process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Cost", "run_alone"]


@dataclass(frozen=True)
class Cost:
    """Seconds of each evaluation after the first (of the first, if it is the only one), and resident bytes.

    `idle` is resident when the graph is open and its inputs are there, `peak` the most that ever was.
    """

    open_seconds: float
    seconds: list[float]
    idle: int
    peak: int

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def working(self) -> int:
        """Bytes that an evaluation takes beyond what is there before it."""
        return self.peak - self.idle

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "best": self.best, "working": self.working}


def run_alone(
    graph: Path,
    inputs: Mapping[str, Any],
    *,
    threads: int,
    repeat: int,
    arena: bool = True,
    patience: float = 60.0,
    timeout: float = 7200.0,
) -> Cost:
    """Evaluate `graph` on the CPU, once to warm up and `repeat` times more, and tell what it took.

    inputs: by name, a nested list of numbers, or {"shape": [...]} for unit noise, with "fill" for one value throughout.
    arena: whether ONNX Runtime keeps what it once took, in pieces of doubling size.
    patience: seconds; an evaluation that takes longer is the only one.

    Raises RuntimeError with the last line of the process's complaint, when it fails or runs longer than `timeout`.
    """
    order = {"graph": str(graph), "inputs": inputs, "threads": threads, "repeat": repeat, "patience": patience}
    order["arena"] = arena
    try:
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(order)], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {timeout:g} seconds") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"ended with status {done.returncode}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes. Unlike getrusage's, its peak does not begin with that of the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {field}")


def _input(spec: Any, random: np.random.Generator) -> np.ndarray:
    if not isinstance(spec, dict):
        return np.asarray(spec)
    if "fill" in spec:
        return np.full(spec["shape"], spec["fill"], np.float32)
    return random.standard_normal(spec["shape"], dtype=np.float32)


def _main(order: Mapping[str, Any]) -> None:
    from edgedit.runtimes.onnx import CPU, OnnxSession

    graph = Path(order["graph"])
    started = time.perf_counter()
    session = OnnxSession(graph, [CPU], order["threads"], None, graph.stem, arena="own" if order["arena"] else "none")
    opened = time.perf_counter() - started
    random = np.random.default_rng(0)
    inputs = {name: _input(spec, random) for name, spec in order["inputs"].items()}
    idle, seconds = _status("VmRSS"), []
    for _ in range(order["repeat"] + 1):
        started = time.perf_counter()
        outputs = session.run(inputs)
        seconds.append(time.perf_counter() - started)
        if not all(np.isfinite(value).all() for value in outputs.values()):
            raise RuntimeError("the graph returned values that are not numbers")
        if seconds[0] > order["patience"]:
            break
    print(json.dumps(asdict(Cost(opened, seconds[1:] or seconds, idle, _status("VmHWM")))))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
