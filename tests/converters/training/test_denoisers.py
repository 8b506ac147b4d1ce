"""The straight path: what it says of VP and flow models, against diffusers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from edgedit.converters.training.calibration import draw_latents
from edgedit.converters.training.denoisers import Denoiser, Text
from edgedit.schedules import schedule_config_from_diffusers


class PixArtTransformer2DModel(nn.Module):
    """A stand-in under the name by which a denoiser knows how to call it: smooth in its input and its timestep."""

    config = SimpleNamespace(in_channels=4, patch_size=2, use_additional_conditions=None)

    def forward(self, hidden_states: Tensor, *, timestep: Tensor, **unused: Any) -> tuple[Tensor]:
        return (torch.tanh(hidden_states * 0.7) * (1 + timestep.view(-1, 1, 1, 1) / 2000),)


TEXT = Text(torch.zeros(3, 1, 4), torch.ones(3, 1))
VP = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def denoiser(prediction: str) -> tuple[Denoiser, DDIMScheduler]:
    scheduler = DDIMScheduler(**VP, prediction_type=prediction, clip_sample=False)
    return Denoiser(
        PixArtTransformer2DModel(), schedule_config_from_diffusers("DDIMScheduler", dict(scheduler.config))
    ), scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_clean_estimate_is_the_one_of_diffusers_at_every_level(prediction: str) -> None:
    model, scheduler = denoiser(prediction)
    scheduler.set_timesteps(1000)
    torch.manual_seed(int(np.random.default_rng().integers(2**31)))
    for timestep in (999, 740, 400, 20, 1):
        kept = scheduler.alphas_cumprod[timestep].double()
        alpha, sigma = float(kept.sqrt()), float((1 - kept).sqrt())
        sample = torch.randn(3, 4, 4, 6)
        s = torch.full((3,), sigma / (alpha + sigma))
        x = sample / (alpha + sigma)
        assert abs(float(model.timestep(s)[0]) - timestep) < 0.05
        clean = x - s.view(-1, 1, 1, 1) * model(x, s, TEXT)
        output = model.network(sample, timestep=torch.full((3,), float(timestep)))[0]
        expected = scheduler.step(output, timestep, sample).pred_original_sample
        scale = float(expected.abs().max())
        torch.testing.assert_close(clean / scale, expected / scale, rtol=0, atol=2e-3 if timestep > 900 else 2e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_velocity_of_the_true_target_is_noise_minus_clean(prediction: str) -> None:
    if prediction == "flow":
        model = Denoiser(PixArtTransformer2DModel(), {"path": "flow", "prediction": "flow", "sampler": "euler"})
    else:
        model, _ = denoiser(prediction)
    clean, noise, s = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    level = s.view(-1, 1, 1, 1)
    x = (1 - level) * clean + level * noise
    velocity = model.velocity(x, s, model.target(clean, noise, s))
    torch.testing.assert_close(velocity, noise - clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_drawing_follows_the_solver_of_diffusers(shift: float) -> None:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    scheduler.set_timesteps(20)
    model = Denoiser(
        PixArtTransformer2DModel(),
        schedule_config_from_diffusers("DPMSolverMultistepScheduler", dict(scheduler.config)),
    )
    x = noise = torch.randn(3, 4, 4, 4)
    for index, timestep in enumerate(scheduler.timesteps):
        told = torch.full((3,), float(scheduler.sigmas[index]) * 1000)
        x = scheduler.step(model.network(x, timestep=told)[0], timestep, x).prev_sample
    levels = scheduler.sigmas.double().numpy()
    drawn = draw_latents(model, noise, TEXT, TEXT, guidance_scale=1.0, levels=levels)
    torch.testing.assert_close(drawn, x, rtol=1e-3, atol=1e-4)


def test_levels_fall_from_the_noisiest_to_nothing() -> None:
    flow = Denoiser(PixArtTransformer2DModel(), {"path": "flow", "prediction": "flow", "sampler": "euler", "shift": 5})
    np.testing.assert_allclose(flow.levels(4), [1, 15 / 16, 5 / 6, 5 / 8, 0])
    model, _ = denoiser("epsilon")
    levels = model.levels(4)
    told = model.timestep(torch.tensor(levels[:-1])).round().tolist()
    assert told == [999, 749, 500, 250]
    assert levels[-1] == 0
