"""Guidance formulae against the code of diffusers' pipelines."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edgedit.errors import BundleError
from edgedit.guidance import Guidance

SEED = random.SystemRandom().randrange(2**31)
SHAPE = (2, 4, 6, 5)


def predictions() -> tuple[np.ndarray, np.ndarray, float]:
    generator = np.random.default_rng(SEED)
    cond, uncond = (generator.normal(size=SHAPE).astype(np.float32) for _ in range(2))
    return cond, uncond, float(generator.uniform(1.5, 9.0))


def close(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=3e-6, atol=1e-6, err_msg=f"seed {SEED}")


def test_classifier_free_guidance_of_pixart_and_sana() -> None:
    cond, uncond, scale = predictions()
    c, u = torch.from_numpy(cond), torch.from_numpy(uncond)
    ours = Guidance().apply(cond, uncond, scale)
    np.testing.assert_array_equal(ours, (u + scale * (c - u)).numpy())


def test_guidance_of_z_image_starts_from_the_prediction_with_the_prompt_and_may_be_clamped() -> None:
    cond, uncond, scale = predictions()
    c, u = torch.from_numpy(cond), torch.from_numpy(uncond)
    close(Guidance(formula="cond").apply(cond, uncond, scale), c + scale * (c - u))
    for factor in (0.3, 1.0, 50.0):
        expected = []
        for pos, neg in zip(c, u, strict=True):
            # ZImagePipeline.__call__ with cfg_normalization
            pred = pos + scale * (pos - neg)
            limit = torch.linalg.vector_norm(pos) * factor
            norm = torch.linalg.vector_norm(pred)
            expected.append(pred * (limit / norm) if norm > limit else pred)
        guidance = Guidance(formula="cond", renormalise="clamp", renormalise_factor=factor)
        close(guidance.apply(cond, uncond, scale), torch.stack(expected))


def test_guidance_of_lumina_2_keeps_the_norm_of_every_row() -> None:
    cond, uncond, scale = predictions()
    c, u = torch.from_numpy(cond), torch.from_numpy(uncond)
    guided = u + scale * (c - u)
    expected = guided * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))
    close(Guidance(renormalise="row").apply(cond, uncond, scale), expected)


def test_guidance_rescale_of_hunyuan_dit() -> None:
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import rescale_noise_cfg

    cond, uncond, scale = predictions()
    c, u = torch.from_numpy(cond), torch.from_numpy(uncond)
    for factor in (0.0, 0.4, 1.0):
        expected = rescale_noise_cfg(u + scale * (c - u), c, guidance_rescale=factor)
        close(Guidance(renormalise="std", renormalise_factor=factor).apply(cond, uncond, scale), expected)


def test_renormalising_nothing_gives_nothing_and_no_warning() -> None:
    zero = np.zeros(SHAPE, np.float32)
    for kind in ("row", "clamp", "std"):
        with np.errstate(all="raise"):
            assert not Guidance(renormalise=kind).apply(zero, zero, 5.0).any()


def test_embedded_guidance_of_sana_sprint_is_a_number_for_the_network_and_no_second_pass() -> None:
    guidance = Guidance.from_manifest({"kind": "embedded", "scale": 0.1})
    assert guidance.embedded(4.5) == pytest.approx(0.45)
    assert not guidance.needs_negative(4.5)
    assert not any(guidance.active(i, 4, 4.5) for i in range(4))


def test_no_second_pass_at_a_neutral_scale() -> None:
    assert not Guidance().needs_negative(1.0)
    assert not Guidance().needs_negative(0.0)
    assert Guidance().needs_negative(1.01)
    assert not Guidance(formula="cond").needs_negative(0.0)
    assert Guidance(formula="cond").needs_negative(0.5)
    assert not Guidance(kind="none").needs_negative(7.0)
    assert not Guidance().active(0, 4, 1.0)


def test_the_interval_of_guidance_truncates_as_lumina_2_does() -> None:
    for n in range(1, 51):
        for ratio in (0.1, 0.25, 0.3, 0.7, 1.0, random.Random(SEED + n).random()):
            ours = [Guidance(interval=(0.0, ratio)).active(i, n, 4.0) for i in range(n)]
            theirs = [not (i + 1) / n > ratio for i in range(n)]
            assert ours == theirs, (n, ratio)


def test_the_users_interval_and_the_models_both_limit_guidance() -> None:
    guidance = Guidance(interval=(0.2, 1.0))
    assert [guidance.active(i, 10, 4.0) for i in range(10)] == [False] * 2 + [True] * 8
    assert [guidance.active(i, 10, 4.0, (0.0, 0.5)) for i in range(10)] == [False] * 2 + [True] * 3 + [False] * 5
    assert [guidance.active(i, 10, 4.0, (0.6, 1.0)) for i in range(10)] == [False] * 6 + [True] * 4
    assert not any(guidance.active(i, 10, 4.0, (0.0, 0.1)) for i in range(10))


def test_a_guidance_object_survives_json_and_reads_a_parsed_section() -> None:
    guidance = Guidance(formula="cond", renormalise="clamp", renormalise_factor=0.7, interval=(0.1, 0.9))
    assert Guidance.from_manifest(json.loads(json.dumps(guidance.to_manifest()))) == guidance
    parsed = SimpleNamespace(kind="embedded", options={"kind": "embedded", "scale": 0.1})
    assert Guidance.from_manifest(parsed) == Guidance(kind="embedded", scale=0.1)
    assert Guidance.from_manifest({"kind": "cfg"}) == Guidance()
    assert Guidance.from_manifest(None).kind == "none"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "apg"}, "kind = 'apg'"),
        ({"kind": "cfg", "formula": "pos"}, "formula = 'pos'"),
        ({"kind": "cfg", "renormalise": "global"}, "renormalise = 'global'"),
        ({"kind": "cfg", "rescale": 0.7}, "unknown field 'rescale'"),
        ({"kind": "cfg", "interval": [0.9, 0.1]}, "interval = "),
        ({"kind": "cfg", "interval": [0.0, 1.5]}, "interval = "),
        ({"kind": "cfg", "interval": 0.5}, "interval = 0.5"),
        ({"kind": "cfg", "interval": ["a", "b"]}, "interval = "),
        ({"kind": "embedded", "scale": -1}, "scale = -1"),
        ({"kind": "embedded", "scale": "0.1"}, "scale = '0.1'"),
        ({"kind": "cfg", "renormalise_factor": float("nan")}, "renormalise_factor = nan"),
    ],
)
def test_a_faulty_guidance_object_is_refused_in_one_line(section: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Guidance.from_manifest(section)
    assert "\n" not in str(caught.value)
