from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from edgedit.embeddings import EmbeddingCache, PromptEmbedding, stack


def embedding(length: int, width: int = 4) -> PromptEmbedding:
    states = np.random.default_rng().standard_normal((1, length, width)).astype(np.float32)
    return PromptEmbedding(states, np.ones((1, length), np.float32))


def test_stacking_pads_with_masked_places() -> None:
    long, short = embedding(5), embedding(2)
    states, mask = stack([long, short])
    assert states.shape == (2, 5, 4)
    assert np.array_equal(states[1, :2], short.hidden_states[0])
    assert np.array_equal(mask, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def test_cache_returns_what_was_put_for_the_same_encoder_and_ids_only(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache")
    states, ids = embedding(3).hidden_states, np.array([[1, 2, 3]])
    assert cache.get("encoder", ids) is None
    cache.put("encoder", ids, states)
    assert np.array_equal(cache.get("encoder", ids), states)
    assert cache.get("another", ids) is None
    assert cache.get("encoder", np.array([[1, 2, 4]])) is None


def test_a_damaged_entry_counts_as_absent_and_goes(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    ids = np.array([[1]])
    cache.put("encoder", ids, embedding(1).hidden_states)
    (entry,) = tmp_path.glob("*.npy")
    entry.write_bytes(entry.read_bytes()[:40])
    assert cache.get("encoder", ids) is None
    assert not entry.exists()


def test_cache_stays_below_its_limit_and_forgets_the_oldest(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, limit=3000)
    for index in range(6):
        cache.put("encoder", np.array([[index]]), embedding(50).hidden_states)
        for age, path in enumerate(sorted(tmp_path.glob("*.npy"), key=lambda p: p.stat().st_mtime_ns, reverse=True)):
            os.utime(path, (1e9 - age, 1e9 - age))
    kept = list(tmp_path.glob("*.npy"))
    assert sum(path.stat().st_size for path in kept) <= 3000
    assert cache.get("encoder", np.array([[5]])) is not None
    assert cache.get("encoder", np.array([[0]])) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file" / "cache")
    cache.put("encoder", np.array([[1]]), embedding(1).hidden_states)
