"""Prompt embeddings: what the text encoder returned, and a cache of them on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["EmbeddingCache", "PromptEmbedding", "stack"]


@dataclass(frozen=True)
class PromptEmbedding:
    """One encoded prompt, padding removed.

    Attributes:
        hidden_states: float32 [1, L, D].
        attention_mask: float32 [1, L], 1 where a token counts.
        cut: the end of the prompt that did not fit into the token limit, "" when all of it did.
        unknown: words that the tokenizer does not know.
    """

    hidden_states: np.ndarray
    attention_mask: np.ndarray
    cut: str = ""
    unknown: tuple[str, ...] = ()


def stack(embeddings: list[PromptEmbedding]) -> tuple[np.ndarray, np.ndarray]:
    """Pad several embeddings to the longest: ([B, L, D], [B, L]). Padded places are masked out."""
    length = max(e.hidden_states.shape[1] for e in embeddings)
    states = np.zeros((len(embeddings), length, embeddings[0].hidden_states.shape[2]), np.float32)
    mask = np.zeros((len(embeddings), length), np.float32)
    for row, embedding in enumerate(embeddings):
        n = embedding.hidden_states.shape[1]
        states[row, :n], mask[row, :n] = embedding.hidden_states[0], embedding.attention_mask[0]
    return states, mask


class EmbeddingCache:
    """Hidden states by (text encoder, token ids), in a folder that never grows past `limit` bytes (oldest go first).

    A T5-XXL takes longer to load than a few-step model takes to draw; the same prompt is encoded once.
    """

    def __init__(self, folder: Path, limit: int = 512 << 20) -> None:
        self.folder, self.limit = folder, limit

    def _path(self, encoder: str, ids: np.ndarray) -> Path:
        digest = hashlib.sha256(encoder.encode() + b"\0" + np.ascontiguousarray(ids, np.int64).tobytes())
        return self.folder / f"{digest.hexdigest()}.npy"

    def get(self, encoder: str, ids: np.ndarray) -> np.ndarray | None:
        """Hidden states [1, L, D] or None. A damaged entry counts as absent and is removed."""
        path = self._path(encoder, ids)
        try:
            states: np.ndarray = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError):
            path.unlink(missing_ok=True)
            return None
        if states.dtype != np.float32 or states.ndim != 3 or not np.isfinite(states).all():
            path.unlink(missing_ok=True)
            return None
        os.utime(path)
        return states

    def put(self, encoder: str, ids: np.ndarray, states: np.ndarray) -> None:
        """Keep hidden states. A folder that cannot be written is no error: the cache only saves time."""
        path = self._path(encoder, ids)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".partial-", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    np.save(file, states, allow_pickle=False)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            self._shrink()
        except OSError:
            return

    def _shrink(self) -> None:
        entries = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.glob("*.npy")), reverse=True)
        total = 0
        for _, size, path in entries:
            total += size
            if total > self.limit:
                path.unlink(missing_ok=True)
