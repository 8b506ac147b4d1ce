"""`distill`: a case with a known answer, what the checkpoint says of itself, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
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
from edgedit.converters.training.trajectory import descent, sample_trajectories
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
        ways = sample_trajectories(teacher, data, levels=[1.0], shape=(4, 8, 8), count=64, device=CPU)
        data = replace(data, points=ways[:, 0], pictures=ways[:, 1])
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


def test_a_teacher_that_draws_fresh_noise_gives_samples_with_the_spread_of_the_data() -> None:
    flow = {"path": "flow", "prediction": "flow", "sampler": "lcm", "shift": 2.0}
    model = Denoiser(PixArtTransformer2DModel("velocity"), flow)
    text = Text(torch.zeros(1, 1, 4), torch.ones(1, 1))
    given: dict[str, Any] = {"count": 6, "shape": (4, 16, 16), "guidance_scale": 1.0, "device": CPU, "batch_size": 3}
    fresh, again, alone = (
        sample_latents(model, text, text, seed=9, from_noise_alone=alone, **given).astype(np.float32)
        for alone in (False, False, True)
    )
    np.testing.assert_array_equal(fresh, again)
    # In few steps the means of what could be take some of the spread away: a Gaussian's is known.
    spread, levels = 1.0, model.levels(20)
    for now, then in itertools.pairwise(levels):
        shrink = (1 - now) * SPREAD**2 / ((1 - now) ** 2 * SPREAD**2 + now**2)
        spread = math.hypot((1 - then) * shrink * spread, then)
    assert np.std(fresh) == pytest.approx(spread, rel=0.06)
    assert np.std(alone) == pytest.approx(SPREAD, rel=0.06)
    assert np.abs(fresh - alone).mean() > 0.1 * SPREAD


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_teacher_goes_down_to_nothing_from_every_level_of_its_student(
    shift: float, checkpoints: dict[str, Path]
) -> None:
    flow = {"path": "flow", "prediction": "flow", "sampler": "euler", "shift": shift}
    for denoiser in (
        Denoiser(PixArtTransformer2DModel("velocity"), flow),
        *(open_trainable(checkpoint).denoiser() for checkpoint in checkpoints.values()),
    ):
        for level in denoiser.levels(4)[:-1]:
            levels = descent(denoiser, level)
            assert levels[0] == level
            assert 6 < len(levels) <= 13
            assert (np.diff(levels) < 0).all()
            assert levels[-1] == 0


def test_ways_set_out_where_the_student_will_be_called() -> None:
    stage = known_case("velocity", "lcm")
    levels = [1.0, 0.7, 0.3]
    ways = sample_trajectories(stage.teacher, stage.calibration, levels=levels, shape=(4, 8, 8), count=40, device=CPU)
    points, pictures = ways.astype(np.float64).swapaxes(0, 1)
    for number, level in enumerate(levels):
        spread = math.hypot((1 - level) * SPREAD, level)
        assert np.std(points[:, number]) == pytest.approx(spread, rel=0.05)
        assert np.std(pictures[:, number]) == pytest.approx(SPREAD, rel=0.1)
        if number:
            fresh = points[:, number] - (1 - level) * pictures[:, number - 1]
            assert np.std(fresh) == pytest.approx(level, rel=0.05)
            assert abs(np.corrcoef(fresh.ravel(), pictures[:, number - 1].ravel())[0, 1]) < 0.05


def test_only_pictures_that_are_right_are_learnt_from() -> None:
    stage = known_case("velocity", "trajectory")
    right = np.arange(64) % 3 == 0
    spoiled = np.where(right[:, None, None, None, None], stage.calibration.pictures, np.float16(np.nan))
    data = replace(stage.calibration, pictures=spoiled, right=right)
    options: dict[str, Any] = {"levels": [1.0], "seed": 0, "device": CPU, "batch_size": 32}
    careful = METHODS["trajectory"](stage.teacher, stage.student.network, data, **options)
    assert math.isfinite(careful.loss(0).item())
    with pytest.raises(InputError, match=r"2 of 64 .* give more --samples"):
        METHODS["trajectory"](stage.teacher, stage.student.network, replace(data, right=np.arange(64) < 2), **options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("distill")
    seed = int(np.random.default_rng().integers(2**31))
    for kind, name in (("pixart-sigma", "vp"), ("sana", "flow")):
        build_pipeline(kind, seed).save_pretrained(folder / name)
        (folder / name / "calibration.txt").write_text("a red circle\na blue star\n")
    return {"vp": folder / "vp", "flow": folder / "flow"}


@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "guidance"])
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


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_guidance_that_was_learnt_is_that_of_diffusers(path: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Untrained, the student's error is what guidance adds in diffusers; trained on one batch, it goes."""
    scale = 3.0
    trainable = open_trainable(checkpoints[path])
    shape = (trainable.transformer.config.in_channels, 8, 8)
    rng = np.random.default_rng()
    width = int(trainable.transformer.config.caption_channels)
    text = Text(torch.from_numpy(rng.standard_normal((2, 5, width), np.float32)), torch.ones(2, 5))
    empty = Text(torch.from_numpy(rng.standard_normal((1, 5, width), np.float32)), torch.ones(1, 5))
    latents = rng.standard_normal((2, *shape)).astype(np.float16)
    teacher = trainable.denoiser()
    teacher.network.eval().requires_grad_(False)
    student = copy.deepcopy(trainable.transformer).requires_grad_(True)
    data = Calibration(text, empty, latents, scale, 0, 2)
    stage = METHODS["guidance"](teacher, student, data, levels=[1.0], seed=3, device=CPU, batch_size=2)
    kept: list[Any] = []
    guided = stage.guided
    stage.guided = lambda x, s, prompts: (kept.extend([x, s, prompts]), guided(x, s, prompts))[1]
    loss = stage.loss(0).item()
    x, s, prompts = kept
    with torch.no_grad():
        outputs = [
            teacher.output(x, s, Text(states.expand(2, -1, -1), mask.expand(2, -1)))[:, : shape[0]]
            for states, mask in ((prompts.states, prompts.mask), (empty.states, empty.mask))
        ]
    # What the pipelines of diffusers do: outputs, not velocities, are guided, which comes to the same.
    added = (scale - 1) * (outputs[0] - outputs[1])
    assert loss == pytest.approx(added.square().mean().item(), rel=0.05)
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        stage.loss(0).backward()
        optimiser.step()
    assert stage.loss(0).item() < 0.3 * loss


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_a_model_that_learnt_guidance_keeps_its_sampler(
    path: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    report = distill(checkpoints[path], tmp_path / "new", method="guidance", steps=7, **QUICK)
    assert report.schedule == open_trainable(checkpoints[path]).schedule
    edgedit.convert(tmp_path / "new", tmp_path / "new.edgedit", measure=False)
    edgedit.convert(checkpoints[path], tmp_path / "old.edgedit", measure=False)
    with edgedit.load(tmp_path / "new.edgedit") as new, edgedit.load(tmp_path / "old.edgedit") as old:
        assert new.bundle.manifest.schedule == old.bundle.manifest.schedule
        calls: list[int] = []
        recipe = new.generate("a red circle", seed=1, on_step=lambda state: calls.append(state.step)).recipe
        assert recipe["steps"] == len(calls) == 7
        with pytest.raises(InputError, match="negative prompt"):
            new.generate("a red circle", negative_prompt="a cat", seed=1)


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
    flow = open_trainable(checkpoints["flow"]).denoiser()
    four, two, one = few_step_schedule(flow, "trajectory", 4, 3.0)["sigmas"]
    np.testing.assert_allclose(four, [1, 0.9, 0.75, 0.5])
    assert two == [four[0], four[2]]
    assert one == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"steps": 3}, "choose 1, 2, 4"),
        ({"train_steps": 0}, "more than nothing"),
        ({"budget": 3.0}, "not both"),
        ({"sigma_shift": 3.0}, "for a flow model"),
        ({"method": "guidance", "steps": 0}, "give 1 or more"),
        ({"method": "guidance", "guidance_scale": 1.0}, "above 1"),
        ({"method": "guidance", "guidance_scale": 0.5}, "above 1"),
        ({"method": "guidance", "sigma_shift": 3.0}, "leave --sigma-shift out"),
        ({"keep_right": True}, "does nothing for --method lcm"),
        ({"keep_right": True, "method": "trajectory"}, "only the prompts of the embedded model's"),
    ],
)
def test_options_without_sense_are_refused(
    options: dict[str, Any], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        distill(checkpoints["vp"], tmp_path / "new", **{**QUICK, **options})


def test_another_checkpoint_can_be_the_teacher(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    build_pipeline("sana", int(np.random.default_rng().integers(2**31))).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "calibration.txt").write_text("a red circle\na blue star\n")
    for teacher in (None, tmp_path / "teacher"):
        name = "alone" if teacher is None else "taught"
        with pytest.raises(KeyboardInterrupt):
            distill(
                checkpoints["flow"],
                tmp_path / name,
                method="trajectory",
                steps=2,
                teacher=teacher,
                stop_after=2,
                **QUICK,
            )
    drawn = {name: np.load(tmp_path / f".{name}.work" / "latents.npy") for name in ("alone", "taught")}
    stored = torch.load(tmp_path / ".taught.work" / "text.pt", weights_only=True)
    text, empty = Text(stored["states"], stored["mask"]), Text(stored["no_states"], stored["no_mask"])
    denoiser = open_trainable(tmp_path / "teacher").denoiser()
    denoiser.network.eval()
    known = Calibration(text, empty, np.empty(0, np.float16), 3.0, 0, 4)
    levels = [float(level) for level in denoiser.levels(2)[:-1]]
    again = sample_trajectories(denoiser, known, levels=levels, shape=drawn["taught"].shape[3:], count=8, device=CPU)
    # bfloat16 products, in other kernels: near, and far from what the student itself would have drawn
    far = {name: float(np.linalg.norm(pictures.astype(np.float32) - again)) for name, pictures in drawn.items()}
    assert far["taught"] < 0.5 * far["alone"], far


def test_a_teacher_of_other_latents_or_another_path_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--teacher .* has another (latents|path) "):
        distill(checkpoints["flow"], tmp_path / "new", teacher=checkpoints["vp"], **QUICK)
    assert not (tmp_path / "new").exists()


def test_a_consistency_model_of_another_kind_cannot_be_distilled(tmp_path: Path) -> None:
    build_pipeline("sana-sprint", 1).save_pretrained(tmp_path / "sprint")
    with pytest.raises(InputError, match="give its teacher"):
        distill(tmp_path / "sprint", tmp_path / "new", **QUICK)
