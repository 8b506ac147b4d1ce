"""The golden vectors against other people's code, and against the command that makes them."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tokenizers
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from edgedit.api import BUILTIN

HERE = Path(__file__).parent


def read(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def _philox(seed: int, draw: int, count: int) -> list[float]:
    """Philox4x32-10 and Box-Muller on whole numbers, one block at a time, as docs/embedding.md states them."""
    found: list[float] = []
    for block in range(-(-count // 4)):
        c = [block & 0xFFFFFFFF, block >> 32, draw & 0xFFFFFFFF, draw >> 32]
        k = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        for w, v in ((c[0], c[1]), (c[2], c[3])):
            radius, angle = math.sqrt(-2 * math.log((w + 0.5) / 2**32)), 2 * math.pi * v / 2**32
            found += [radius * math.cos(angle), radius * math.sin(angle)]
    return found[:count]


@pytest.mark.parametrize("case", range(8))
def test_noise_is_philox_as_specified_and_torchs_own(case: int) -> None:
    entry = read("noise")[case]
    if entry["kind"] == "philox":
        expected = [_philox(entry["seed"], d, len(draw)) for d, draw in enumerate(entry["draws"])]
    else:
        signed = entry["seed"] - 2**64 if entry["seed"] >= 2**63 else entry["seed"]
        generator = torch.Generator().manual_seed(signed)
        expected = [torch.randn(len(draw), generator=generator).tolist() for draw in entry["draws"]]
    for draw, wanted in zip(entry["draws"], expected, strict=True):
        np.testing.assert_allclose(draw, wanted, rtol=1e-6, atol=1e-7)


def _scheduler(entry: dict[str, Any]) -> Any:
    scheduler = getattr(diffusers, entry["diffusers"]["class"])(**entry["diffusers"]["config"])
    scheduler.set_timesteps(entry["steps"])
    return scheduler


@pytest.mark.parametrize("case", range(len(read("schedules"))))
def test_schedules_and_solver_steps_are_those_of_diffusers(case: int) -> None:
    entry, run = read("schedules")[case], read("solvers")[case]
    assert run["schedule"] == case
    scheduler = _scheduler(entry)
    np.testing.assert_allclose(entry["timesteps"], scheduler.timesteps.float().numpy(), rtol=1e-6)
    if entry["path"] != "flow":
        assert entry["init_noise_scale"] == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-5)
    current = torch.tensor(run["first"]).reshape(run["shape"])
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(current, t) / current
            assert float(scaled.flatten()[0]) == pytest.approx(entry["input_scales"][i], rel=1e-5)
        output = torch.tensor(run["outputs"][i]).reshape(run["shape"])
        current = scheduler.step(output, t, current).prev_sample
        error = np.linalg.norm(np.array(run["latents"][i]) - current.flatten().numpy())
        assert error <= 2e-5 * np.linalg.norm(run["latents"][i]), f"step {i}"


def test_levels_of_noise_end_at_none_and_fit_their_path() -> None:
    for entry in read("schedules"):
        alphas, sigmas = np.array(entry["alphas"]), np.array(entry["sigmas"])
        assert len(alphas) == len(entry["timesteps"]) + 1
        assert sigmas[-1] < 0.05
        if entry["path"] == "flow":
            np.testing.assert_allclose(alphas + sigmas, 1, atol=1e-9)
        elif entry["path"] == "vp":
            np.testing.assert_allclose(alphas**2 + sigmas**2, 1, atol=1e-6)


def test_guidance_is_what_its_papers_say() -> None:
    (entry,) = read("guidance")
    cond, uncond = torch.tensor(entry["cond"]), torch.tensor(entry["uncond"])
    for case in entry["cases"]:
        rule, scale = case["guidance"], case["scale"]
        base = uncond if rule["formula"] == "uncond" else cond
        guided = base + scale * (cond - uncond)
        factor = rule["renormalise_factor"]
        if rule["renormalise"] == "row":
            guided = guided * cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        elif rule["renormalise"] == "clamp":
            limit = factor * cond.flatten(1).norm(dim=1) / guided.flatten(1).norm(dim=1)
            guided = guided * limit.clamp(max=1)[:, None, None]
        elif rule["renormalise"] == "std":
            spread = cond.std(dim=(1, 2), keepdim=True) / guided.std(dim=(1, 2), keepdim=True)
            guided = factor * guided * spread + (1 - factor) * guided
        np.testing.assert_allclose(case["result"], guided.numpy(), rtol=1e-5, atol=1e-5)


def test_tokens_are_those_of_the_tokenizers_library() -> None:
    golden = read("tokens")
    recipe = golden["prompt"]
    backend = tokenizers.Tokenizer.from_file(str(BUILTIN / recipe["tokenizer"]))
    backend.no_padding()
    for case in golden["cases"]:
        side = recipe["negative" if case["negative"] else "positive"]
        backend.enable_truncation(side["max_length"])
        text = case["prompt"].lower() if recipe["lower"] else case["prompt"]
        text = text.strip() if recipe["strip"] else text
        ids = backend.encode(side["template"].replace("{prompt}", text)).ids
        padding = side["max_length"] - len(ids) if recipe["padding"] == "max_length" else 0
        assert case["ids"] == ids + [recipe["pad_token_id"]] * padding
        assert case["mask"] == [1] * len(ids) + [0] * padding
        assert case["tokens"] == len(ids)


def test_positions_are_those_of_diffusers() -> None:
    for case in read("positions"):
        section = case["positions"]
        grid = (case["height"] // section["patch_size"], case["width"] // section["patch_size"])
        expected = get_2d_sincos_pos_embed(
            section["dim"],
            grid,
            base_size=section["base_size"],
            interpolation_scale=section["interpolation_scale"],
            output_type="pt",
        )
        np.testing.assert_allclose(case["table"], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_the_command_writes_the_same_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    module.main()
    for path in sorted(HERE.glob("*.json")):
        again, before = (json.loads((place / path.name).read_text(encoding="utf-8")) for place in (tmp_path, HERE))
        assert _close(again, before), path.name


def _close(a: Any, b: Any) -> bool:
    """Equal but for the last digits of numbers, which differ between processors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=2e-6, abs_tol=2e-7)
    return bool(a == b)
