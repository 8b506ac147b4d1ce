"""Where optimised graphs are kept between runs, for every engine that can write its own."""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

__all__ = ["through_cache"]

T = TypeVar("T")


def through_cache(cache: Path, graph: Path, parts: Sequence[str], make: Callable[[Path, bool], T]) -> T:
    """What `make(folder, fresh)` returns, with a folder of the cache that belongs to this graph, engine and machine.

    An optimised graph depends on the engine's version and the processor, so both are part of its key. With `fresh` the
    folder is empty and what `make` leaves there is kept: it is filled beside its final place and renamed, so that a run
    that dies leaves nothing half written.

    Args:
        cache: the folder of all optimised graphs.
        graph: the ONNX file; the size and time of the weights beside it count as well.
        parts: what else the optimised graph depends on: the engine, its version, its settings.
    """
    key = hashlib.sha256()
    key.update(graph.read_bytes())
    for part in (*parts, platform.machine(), platform.processor(), *_weights_identity(graph)):
        key.update(part.encode())
    folder = cache / key.hexdigest()[:32]
    if folder.is_dir():
        return make(folder, False)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        made = make(partial, True)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first; anything else is an error
                raise
        return made
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _weights_identity(graph: Path) -> list[str]:
    """Size and modification time of the weights beside a graph: they change whenever a bundle is written again."""
    data = graph.parent / (graph.name.replace(".cpu.onnx", ".onnx") + ".data")
    if not data.exists():
        return []
    stat = data.stat()
    return [str(stat.st_size), str(stat.st_mtime_ns), str(data.resolve())]
