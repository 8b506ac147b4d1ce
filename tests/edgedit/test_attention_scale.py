"""Softmax scores follow the size of the picture, and are those of training at the sizes of training."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgedit.attention_scale import entropy_scale, resolve_scale
from edgedit.errors import InputError


def manifest(*, takes: bool = True, sizes: tuple[tuple[int, int], ...] = ((512, 512), (768, 320))) -> Any:
    inputs = [SimpleNamespace(name="latents"), *([SimpleNamespace(name="attention_scale")] if takes else [])]
    return SimpleNamespace(
        components={"transformer": SimpleNamespace(inputs=inputs)},
        latents=SimpleNamespace(scale_factor=8, patch_size=2),
        recommended=SimpleNamespace(width=512, height=512, sizes=sizes),
    )


def mean_entropy(tokens: int, scale: float) -> float:
    """Of the attention that unit normal queries of 64 channels pay to `tokens` unit normal keys, in nats."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((64, 64)) @ rng.standard_normal((64, tokens)) / 8 * scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return float(-(weights * np.log(weights)).sum(axis=1).mean())


@pytest.mark.parametrize("size", [(512, 512), (768, 320)])
@pytest.mark.parametrize("asked", [None, "entropy", 1, "1.0"])
def test_scores_are_those_of_training_at_every_trained_size(size: tuple[int, int], asked: Any) -> None:
    assert resolve_scale(asked, manifest(), *size) == 1.0


def test_other_sizes_have_the_scale_of_jin_et_al() -> None:
    assert resolve_scale(None, manifest(), 1024, 768) == math.sqrt(math.log(64 * 48) / math.log(32 * 32))
    assert resolve_scale("entropy", manifest(), 256, 256) == math.sqrt(math.log(256) / math.log(1024))
    assert resolve_scale("1.1", manifest(), 1024, 1024) == 1.1


def test_the_scale_brings_the_entropy_back_towards_that_of_training() -> None:
    trained = mean_entropy(1024, 1.0)
    for tokens in (256, 4096, 16384):
        without = abs(mean_entropy(tokens, 1.0) - trained)
        assert abs(mean_entropy(tokens, entropy_scale(tokens, 1024)) - trained) < without


def test_a_single_token_has_no_entropy_to_keep() -> None:
    assert entropy_scale(1, 1024) == entropy_scale(1024, 1) == 1.0


def test_a_transformer_that_takes_no_scale_is_left_alone_unless_one_is_asked_for() -> None:
    plain = manifest(takes=False)
    assert resolve_scale(None, plain, 1024, 1024) == 1.0
    assert resolve_scale(1.0, plain, 1024, 1024) == 1.0
    assert resolve_scale("entropy", plain, 512, 512) == 1.0
    for asked in ("entropy", 1.2):
        with pytest.raises(InputError, match="cannot be honoured"):
            resolve_scale(asked, plain, 1024, 1024)


@pytest.mark.parametrize("asked", ["entropie", 0, -1, 5, float("nan"), True, "inf"])
def test_what_is_no_scale_is_refused(asked: Any) -> None:
    with pytest.raises(InputError, match="an attention scale is entropy or a number above 0"):
        resolve_scale(asked, manifest(), 512, 512)
