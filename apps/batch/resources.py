"""How many workers a machine has room for, and how they share its cores."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgedit.bundle import Bundle
from edgedit.device import available_cores, available_memory
from edgedit.errors import InputError

__all__ = ["Share", "estimate_memory", "parse_memory", "share_machine"]

#: Private memory of a worker beside the model: Python, NumPy and the backend.
BASE = 300 << 20
#: ONNX Runtime keeps packed copies of the weights, fp16 ones as fp32, beside the mapped file.
WEIGHTS = 2.5
#: Bytes of activations a pixel that the decoder needs at its widest layer.
PIXEL = 1600
#: Part of the free memory that is used when nothing else is said.
PART = 0.8

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True)
class Share:
    """Worker processes, threads of each, and whether each holds one component at a time."""

    workers: int
    threads: int
    low_ram: bool


def parse_memory(text: str | None) -> int | None:
    """Bytes from "8G", "512M" or a plain number. Raises InputError."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if not match or not float(match[1]):
        raise InputError(f"--memory {text!r} is not a size; write it like 8G or 512M")
    return int(float(match[1]) * _UNITS[match[2]])


def estimate_memory(bundle: Bundle, pixels: int, *, low_ram: bool, batch: int = 1) -> int:
    """Private bytes that a worker takes at most, roughly, for pictures of `pixels`."""
    sizes = []
    for name, component in bundle.manifest.components.items():
        if name != "encoder":
            sizes.append(max(sum(bundle.manifest.files[f].size for f in a.files) for a in component.artefacts.values()))
    weights = max(sizes) if low_ram else sum(sizes)
    return int(BASE + WEIGHTS * weights + PIXEL * pixels * (1 + (batch - 1) / 4))


def share_machine(
    bundle: Bundle,
    pixels: int,
    *,
    workers: int | None,
    threads: int | None,
    memory: int | None,
    low_ram: bool | None,
    batch: int,
) -> Share:
    """Fill in what is None: as many workers as cores and memory allow, the cores split between them.

    Many workers of one thread draw more pictures an hour than one worker of many threads, as long as they fit.
    Raises InputError when not even one worker fits into an explicit `memory`.
    """
    cores = available_cores()
    free = available_memory()
    budget = memory if memory is not None else None if free is None else int(free * PART)
    if low_ram is None:
        low_ram = budget is not None and estimate_memory(bundle, pixels, low_ram=False, batch=batch) > budget
    need = estimate_memory(bundle, pixels, low_ram=low_ram, batch=batch)
    room = cores if budget is None else budget // need
    if room < 1 and memory is not None:
        raise InputError(
            f"--memory of {memory / 1e9:.1f} GB is too little: this model and size take about {need / 1e9:.1f} GB"
        )
    if workers is None:
        workers = max(1, min(room, cores // threads if threads else cores))
    if threads is None:
        threads = max(1, cores // workers)
    return Share(workers, threads, low_ram)
