"""Alignment with claims, on a transformer small enough to be moved in a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from tiny_scenes import TINY_TEXT, TINY_TRANSFORMER, write_tiny_scenes

from edgedit.converters.training.align import align
from edgedit.converters.training.alignment import (
    CYCLE,
    AlignmentStage,
    FewStepWay,
    GuidedWay,
    ReaderStage,
    SceneCaptions,
)
from edgedit.converters.training.data import training_scenes
from edgedit.converters.training.denoisers import Denoiser
from edgedit.converters.training.distillation import distill
from edgedit.converters.training.export import build_scheduler
from edgedit.converters.training.teacher import PlainAttention, TeacherStage, build_transformer
from edgedit.converters.training.text_encoder import build_text_encoder
from edgedit.errors import InputError
from edgedit.schedules import schedule_config_from_diffusers

CPU = torch.device("cpu")


def stages(
    seed: int, *, few_steps: bool = False, weight: float = 0.05
) -> tuple[ReaderStage, AlignmentStage, PixArtTransformer2DModel]:
    torch.manual_seed(seed)
    transformer = build_transformer(TINY_TRANSFORMER)
    transformer.set_attn_processor(PlainAttention())
    scenes = training_scenes(12, seed=seed)
    latents = np.random.default_rng(seed).standard_normal((12, 4, 16, 16)).astype(np.float16)
    encoder = build_text_encoder(TINY_TEXT)
    captions = SceneCaptions(scenes, encoder, CPU)
    schedule = schedule_config_from_diffusers("DPMSolverMultistepScheduler", dict(build_scheduler().config))
    denoiser = Denoiser(transformer, schedule)
    reading = ReaderStage(denoiser, latents, captions, seed=seed, device=CPU, batch_size=4)
    flow = TeacherStage(
        latents,
        scenes,
        encoder,
        seed=seed,
        device=CPU,
        batch_size=2,
        layout_weight=0,
        compiled=False,
        transformer=transformer,
    )
    way = (
        FewStepWay(denoiser, [[1.0, 0.9, 0.6], [1.0, 0.8]]) if few_steps else GuidedWay(denoiser, captions.embed([""]))
    )
    stage = AlignmentStage(
        flow, way, reading.reader, captions, shape=(4, 16, 16), seed=seed, device=CPU, batch_size=4, weight=weight
    )
    return reading, stage, transformer


def fresh_seed() -> int:
    seed = int(np.random.default_rng().integers(2**31))
    print("seed", seed)
    return seed


def test_the_reader_learns_from_clean_latents_and_from_estimates() -> None:
    reading, _, transformer = stages(fresh_seed())
    reading.modules.requires_grad_(True)
    loss = reading.loss(0)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in reading.modules.parameters())
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_a_step_depends_on_its_number_and_the_weights_alone() -> None:
    seed = fresh_seed()
    first, again = stages(seed)[1], stages(seed)[1]
    assert torch.equal(first.loss(0), again.loss(0))
    assert torch.equal(first.loss(1), again.loss(1))


@pytest.mark.parametrize("few_steps", [False, True])
def test_a_cycle_has_as_many_states_of_every_level(few_steps: bool) -> None:
    _, stage, _ = stages(fresh_seed(), few_steps=few_steps)
    stage.loss(0)
    assert stage._states is not None
    levels = stage._states[1]
    assert len(levels) >= 4 * CYCLE
    for level in set(stage._way.levels):
        times = stage._way.levels.count(level)
        assert (levels == level).sum() * len(stage._way.levels) == times * len(levels)


@pytest.mark.parametrize("few_steps", [False, True])
def test_training_on_claims_lowers_what_is_missed(few_steps: bool) -> None:
    _, stage, transformer = stages(fresh_seed(), few_steps=few_steps, weight=10.0)
    optimiser = torch.optim.Adam(transformer.parameters(), lr=3e-3)
    missed = []
    for _ in range(24):
        # One step again and again: the same states, so that the loss can be compared.
        stage.loss(1).backward()  # type: ignore[no-untyped-call]
        missed.append(stage.missed)
        optimiser.step()
        optimiser.zero_grad()
    assert np.mean(missed[-3:]) < missed[0]


def test_a_teacher_and_its_distilled_model_are_aligned_and_stay_what_they_were(tmp_path: Path) -> None:
    teacher = write_tiny_scenes(tmp_path, tmp_path / "scenes", fresh_seed())
    small = {"train_steps": 2, "reader_steps": 2, "scene_count": 8, "trajectories": 6}
    aligned = align(teacher, tmp_path / "aligned", **small)
    before, after = (DiffusionPipeline.from_pretrained(folder) for folder in (teacher, aligned))
    changed = dict(after.transformer.named_parameters())
    assert not torch.equal(before.transformer.proj_out.weight, changed["proj_out.weight"])
    for component in ("vae", "text_encoder"):
        pairs = zip(getattr(before, component).parameters(), getattr(after, component).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    few = tmp_path / "few"
    distill(aligned, few, steps=2, train_steps=1, samples=4, batch_size=2)
    with pytest.raises(InputError, match="--teacher"):
        align(few, tmp_path / "refused", **small)
    last = align(few, tmp_path / "last", teacher=aligned, **small)
    assert (last / "edgedit.json").read_text() == (few / "edgedit.json").read_text()
    assert not list(tmp_path.glob(".*.work"))
