"""Prompt embeddings: what the text encoder returned, and a cache of them on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["EmbeddingCache", "PromptEmbedding", "join", "stack"]


@dataclass(frozen=True)
class PromptEmbedding:
    """One encoded prompt, padding removed; or several of one length (`join`).

    Attributes:
        hidden_states: float32 [B, L, D].
        attention_mask: float32 [B, L], 1 where a token counts.
        cut: the end of the prompt that did not fit into the token limit, "" when all of it did.
        unknown: words that the tokenizer does not know.
    """

    hidden_states: np.ndarray
    attention_mask: np.ndarray
    cut: str = ""
    unknown: tuple[str, ...] = ()


def join(embeddings: Sequence[PromptEmbedding]) -> PromptEmbedding:
    """Several embeddings of one length as one, in their order."""
    if len(embeddings) == 1:
        return embeddings[0]
    return PromptEmbedding(
        hidden_states=np.concatenate([e.hidden_states for e in embeddings]),
        attention_mask=np.concatenate([e.attention_mask for e in embeddings]),
    )


def stack(embeddings: Sequence[PromptEmbedding]) -> tuple[np.ndarray, np.ndarray]:
    """Pad embeddings to the longest: ([B, L, D], [B, L]), B rows in all. Padded places are masked out."""
    rows = sum(len(e.hidden_states) for e in embeddings)
    length = max(e.hidden_states.shape[1] for e in embeddings)
    states = np.zeros((rows, length, embeddings[0].hidden_states.shape[2]), np.float32)
    mask = np.zeros((rows, length), np.float32)
    row = 0
    for embedding in embeddings:
        batch, n = embedding.hidden_states.shape[:2]
        states[row : row + batch, :n] = embedding.hidden_states
        mask[row : row + batch, :n] = embedding.attention_mask
        row += batch
    return states, mask


class EmbeddingCache:
    """Hidden states by (text encoder, token ids), in a folder kept to about `limit` bytes (oldest go first).

    A T5-XXL takes longer to load than a few-step model takes to draw; the same prompt is encoded once.
    """

    def __init__(self, folder: Path, limit: int = 512 << 20) -> None:
        self.folder, self.limit = folder, limit
        self._unswept: int | None = None

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
            # Listing the folder after every entry would cost more than encoding with a small encoder.
            self._unswept = None if self._unswept is None else self._unswept + states.nbytes
            if self._unswept is None or self._unswept > self.limit // 64:
                self._shrink()
                self._unswept = 0
        except OSError:
            return

    def _shrink(self) -> None:
        entries = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.glob("*.npy")), reverse=True)
        total = 0
        for _, size, path in entries:
            total += size
            if total > self.limit:
                path.unlink(missing_ok=True)
