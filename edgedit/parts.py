"""A transformer open as the graphs that it is cut into between its blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgedit.errors import BundleError

if TYPE_CHECKING:
    from edgedit.runtimes.base import Session

__all__ = ["PartedSession", "Parts", "read_parts"]

PLAN_VERSION = 1
#: First block, front half, rear half, what follows the last block.
FIRST, FRONT, REAR, LAST = range(4)

Floats = npt.NDArray[np.float32]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Parts:
    """The plan: names of the graphs, of the hidden states before the first block and after each part, and of what each
    graph takes."""

    graphs: tuple[str, ...]
    inputs: tuple[tuple[str, ...], ...]
    before: str
    hidden: tuple[str, ...]
    blocks: int


def read_parts(path: Path) -> Parts:
    """Read a plan. Raises BundleError when it is damaged or of a newer version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] > PLAN_VERSION:
            raise BundleError(f"{path}: made for a newer edgedit; upgrade it (pip install --upgrade edgedit)")
        return _parse(raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: is no plan of a transformer's parts ({error}); convert the model again") from error


def _parse(raw: Mapping[str, Any]) -> Parts:
    parts = Parts(
        graphs=tuple(str(part["graph"]) for part in raw["parts"]),
        inputs=tuple(tuple(map(str, part["inputs"])) for part in raw["parts"]),
        before=str(raw["before"]),
        hidden=tuple(map(str, raw["hidden"])),
        blocks=int(raw["blocks"]),
    )
    if len(parts.graphs) != LAST + 1 or len(parts.hidden) != LAST:
        raise ValueError(f"{len(parts.graphs)} parts instead of {LAST + 1}")
    return parts


class PartedSession:
    """The four parts, open. As a session it computes what the whole transformer does."""

    def __init__(self, parts: Parts, open_part: Callable[[str], Session]) -> None:
        self.parts = parts
        self._sessions = [open_part(graph) for graph in parts.graphs]

    def first(self, inputs: Mapping[str, np.ndarray]) -> tuple[Floats, Floats, Arrays]:
        """Hidden states [B, N, D] before and after the first block, and all that later parts take."""
        known = {**inputs, **self._run(FIRST, inputs)}
        return known[self.parts.before], known[self.parts.hidden[FIRST]], known

    def blocks(self, part: int, hidden: Floats, known: Mapping[str, np.ndarray]) -> Floats:
        """Hidden states after the blocks of the part FRONT or REAR."""
        return self._run(part, {**known, self.parts.hidden[part - 1]: hidden})[self.parts.hidden[part]]

    def last(self, hidden: Floats, known: Mapping[str, np.ndarray]) -> Arrays:
        """The transformer's outputs from the hidden states after the last block."""
        return self._run(LAST, {**known, self.parts.hidden[REAR]: hidden})

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Evaluate the whole transformer."""
        _, hidden, known = self.first(inputs)
        for part in (FRONT, REAR):
            hidden = self.blocks(part, hidden, known)
        return self.last(hidden, known)

    def close(self) -> None:
        """Free the weights."""
        while self._sessions:
            self._sessions.pop().close()

    def _run(self, part: int, known: Mapping[str, np.ndarray]) -> Arrays:
        return self._sessions[part].run({name: known[name] for name in self.parts.inputs[part]})
