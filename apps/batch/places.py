"""Where a batch keeps its own files inside the output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Places"]


@dataclass(frozen=True)
class Places:
    """Paths of one output folder. Everything that is no picture or report is below the hidden folder `.batch`."""

    root: Path

    @property
    def inside(self) -> Path:
        """The batch's own folder."""
        return self.root / ".batch"

    @property
    def ledger(self) -> Path:
        """The SQLite database."""
        return self.inside / "ledger.sqlite"

    @property
    def partial(self) -> Path:
        """Files that are being written; renamed to their place when they are whole and on the disk."""
        return self.inside / "partial"

    @property
    def latents(self) -> Path:
        """Latents of pictures that are denoised and not yet recorded as finished."""
        return self.inside / "latents"

    @property
    def embeddings(self) -> Path:
        """Encoded prompts."""
        return self.inside / "embeddings"

    @property
    def index(self) -> Path:
        """One JSON object a finished picture, in the order in which they were finished."""
        return self.root / "index.jsonl"

    @property
    def spool(self) -> Path:
        """The jobs, when they came from standard input."""
        return self.inside / "jobs-from-stdin"
