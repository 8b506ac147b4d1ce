"""`distill`: a case with a known answer, what the checkpoint says of itself, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import build_pipeline
from torch import Tensor, nn

import edgedit
from edgedit.converters.training.calibration import Calibration, draw_latents, noise_of_samples, sample_latents
from edgedit.converters.training.denoisers import Denoiser, Text
from edgedit.converters.training.distillation import METHODS, distill, few_step_schedule
from edgedit.converters.training.trainable import open_trainable
from edgedit.converters.training.trajectory import sample_trajectories, teacher_levels
from edgedit.errors import InputError

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"train_steps": 6, "samples": 8, "batch_size": 4, "guidance_scale": 3.0}
SPREAD = 0.6
"""Standard deviation of the data of the known case: latents are Gaussian, every pixel by itself."""


class PixArtTransformer2DModel(nn.Module):
    """The exact velocity of Gaussian data, times a gain that is 1 where it is right."""

    config = SimpleNamespace(in_channels=4, patch_size=2, use_additional_conditions=None)

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gain = kind, nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: Tensor, *, timestep: Tensor, **unused: Any) -> tuple[Tensor]:
        s = timestep.view(-1, 1, 1, 1) / 1000
        variance = (1 - s) ** 2 * SPREAD**2 + s**2
        if self.kind == "velocity":
            return (self.gain * (s - (1 - s) * SPREAD**2) / variance * hidden_states,)
        # The consistency function of a Gaussian scales a point to the spread of the data.
        clean = hidden_states * SPREAD / variance.sqrt()
        return (self.gain * (hidden_states - clean) / s.clamp(min=1e-4),)


def known_case(kind: str, method: str) -> Any:
    flow = {"path": "flow", "prediction": "flow", "sampler": "euler", "shift": 1.0}
    teacher = Denoiser(PixArtTransformer2DModel("velocity"), flow)
    generator = torch.Generator().manual_seed(1)
    latents = (SPREAD * torch.randn(64, 4, 8, 8, generator=generator)).numpy().astype(np.float16)
    text = Text(torch.zeros(1, 1, 4), torch.ones(1, 1))
    data = Calibration(text, text, latents, 1.0, 0, 8)
    if method == "trajectory":
        points = sample_trajectories(teacher, data, steps=1, shape=(4, 8, 8), count=64, device=CPU)
        data = replace(data, latents=points[:, -1], states=points[:, :-1])
    return METHODS[method](
        teacher, PixArtTransformer2DModel(kind), data, levels=[1.0], seed=0, device=CPU, batch_size=32
    )


@pytest.mark.parametrize("method", ["lcm", "scm", "trajectory"])
def test_the_exact_consistency_function_has_less_loss_than_the_teacher(method: str) -> None:
    def mean(stage: Any) -> float:
        with torch.no_grad():
            # "scm" brings its derivative in over the first thousand steps.
            return float(np.mean([stage.loss(2000 + step).item() for step in range(6)]))

    right, wrong = mean(known_case("consistency", method)), mean(known_case("velocity", method))
    assert right < 0.35 * wrong, (right, wrong)


def test_distribution_matching_leaves_a_right_student_alone() -> None:
    """Where the fake score is the real one, the student's gradient is that of the regression alone."""
    stage = known_case("consistency", "dmd")
    stage._fake = stage.teacher
    drawn = SPREAD * torch.randn(8, 4, 8, 8)
    drawn.requires_grad_(True)
    text = stage.calibration.prompts(np.arange(8), CPU)
    stage._matching_loss(drawn, text, np.random.default_rng(0)).backward()
    assert drawn.grad is not None
    assert float(drawn.grad.abs().max()) < 1e-6


def test_samples_can_be_drawn_again_from_their_noise() -> None:
    flow = {"path": "flow", "prediction": "flow", "sampler": "euler", "shift": 2.0}
    model = Denoiser(PixArtTransformer2DModel("velocity"), flow)
    text, empty = Text(torch.zeros(3, 1, 4), torch.ones(3, 1)), Text(torch.zeros(1, 1, 4), torch.ones(1, 1))
    latents = sample_latents(
        model, text, empty, count=7, shape=(4, 6, 4), guidance_scale=1.0, seed=9, device=CPU, batch_size=3
    )
    data = Calibration(text, empty, latents, 1.0, 9, 3)
    noise = noise_of_samples(np.array([6, 0, 4]), (4, 6, 4), data)
    again = draw_latents(model, noise, text, text, guidance_scale=1.0, levels=model.levels(20))
    np.testing.assert_allclose(again.numpy(), latents[[6, 0, 4]].astype(np.float32), atol=2e-3)
    assert np.std(latents.astype(np.float32)) == pytest.approx(SPREAD, rel=0.15)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_trajectory_passes_through_the_levels_of_its_student(steps: int, checkpoints: dict[str, Path]) -> None:
    for checkpoint in checkpoints.values():
        denoiser = open_trainable(checkpoint).denoiser()
        levels, where = teacher_levels(denoiser, steps)
        assert levels[where].tolist() == denoiser.levels(steps)[:-1].tolist()
        assert len(levels) > 12
        assert (np.diff(levels) < 0).all()
        assert levels[-1] == 0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("distill")
    seed = int(np.random.default_rng().integers(2**31))
    for kind, name in (("pixart-sigma", "vp"), ("sana", "flow")):
        build_pipeline(kind, seed).save_pretrained(folder / name)
        (folder / name / "calibration.txt").write_text("a red circle\na blue star\n")
    return {"vp": folder / "vp", "flow": folder / "flow"}


@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("method", list(METHODS))
def test_generate_uses_the_schedule_that_the_student_was_trained_for(
    method: str, path: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    report = distill(checkpoints[path], tmp_path / "new", method=method, steps=2, **QUICK)
    edgedit.convert(tmp_path / "new", tmp_path / "new.edgedit", measure=False)
    with edgedit.load(tmp_path / "new.edgedit") as pipeline:
        told: list[float] = []
        result = pipeline.generate("a red circle", seed=1, on_step=lambda state: told.append(state.timestep))
        assert result.recipe["steps"] == 2
        levels = open_trainable(checkpoints[path]).denoiser().levels(2)[:-1]
        expected = [999, 500] if path == "vp" else [1000 * level for level in levels]
        np.testing.assert_allclose(told, expected, rtol=1e-6)
        with pytest.raises(InputError, match="negative prompt"):
            pipeline.generate("a red circle", negative_prompt="a cat", seed=1)
    assert report.schedule["sampler"] == "dmd"
    record = json.loads((tmp_path / "new" / "edgedit.json").read_text())
    assert record["guidance"] == {"kind": "none"}
    assert record["recommended"] == {"steps": 2}


def test_interrupted_and_resumed_gives_the_same_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    distill(checkpoints["vp"], tmp_path / "whole", method="dmd", steps=1, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        distill(checkpoints["vp"], tmp_path / "parts", method="dmd", steps=1, stop_after=4, **QUICK)
    distill(checkpoints["vp"], tmp_path / "parts", method="dmd", steps=1, **QUICK)
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_consistency_model_also_draws_in_fewer_steps_and_dmd_does_not(checkpoints: dict[str, Path]) -> None:
    teacher = open_trainable(checkpoints["vp"]).denoiser()
    assert few_step_schedule(teacher, "lcm", 4)["timesteps"] == [[999, 749, 500, 250], [999, 500], [999]]
    assert few_step_schedule(teacher, "trajectory", 4) == few_step_schedule(teacher, "lcm", 4)
    assert few_step_schedule(teacher, "dmd", 4)["timesteps"] == [[999, 749, 500, 250]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"steps": 3}, "choose 1, 2, 4"),
        ({"train_steps": 0}, "more than nothing"),
        ({"budget": 3.0}, "not both"),
    ],
)
def test_options_without_sense_are_refused(
    options: dict[str, Any], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        distill(checkpoints["vp"], tmp_path / "new", **{**QUICK, **options})


def test_a_consistency_model_of_another_kind_cannot_be_distilled(tmp_path: Path) -> None:
    build_pipeline("sana-sprint", 1).save_pretrained(tmp_path / "sprint")
    with pytest.raises(InputError, match="give its teacher"):
        distill(tmp_path / "sprint", tmp_path / "new", **QUICK)
