"""One view of every denoiser: a velocity on the straight path x = (1 - s) x_0 + s noise, s from 0 to 1.

A variance-preserving model is on that path once its input is scaled: alpha x_0 + sigma noise = (alpha + sigma) x, with
s = sigma / (alpha + sigma). So calibration, linearization and distillation are written once, for both.

Reference: Kingma and Gao, "Understanding Diffusion Objectives as the ELBO" (2023), section 2 (one path for all models).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgedit.errors import InputError
from edgedit.schedule_config import check_schedule_config
from edgedit.vp_table import alphas_cumprod

__all__ = ["Denoiser", "Text", "guided"]


@dataclass(frozen=True)
class Text:
    """Embedded prompts: states (B, L, D) and mask (B, L), 1 for a token and 0 for padding."""

    states: Tensor
    mask: Tensor

    def __getitem__(self, rows: Tensor) -> Text:
        return Text(self.states[rows], self.mask[rows])


def _call_pixart(network: nn.Module, x: Tensor, timestep: Tensor, text: Text, scale_factor: int) -> Tensor:
    batch, _, height, width = x.shape
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if getattr(network.config, "use_additional_conditions", None):
        size = x.new_tensor([height * scale_factor, width * scale_factor])
        added = {
            "resolution": size.expand(batch, 2),
            "aspect_ratio": x.new_tensor([[height / width]]).expand(batch, 1),
        }
    output: Tensor = network(
        x,
        encoder_hidden_states=text.states,
        encoder_attention_mask=text.mask,
        timestep=timestep,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output


def _call_sana(network: nn.Module, x: Tensor, timestep: Tensor, text: Text, scale_factor: int) -> Tensor:
    output: Tensor = network(
        x,
        encoder_hidden_states=text.states,
        encoder_attention_mask=text.mask,
        timestep=timestep,
        return_dict=False,
    )[0]
    return output


CALLS: Mapping[str, Callable[[nn.Module, Tensor, Tensor, Text, int], Tensor]] = {
    "PixArtTransformer2DModel": _call_pixart,
    "SanaTransformer2DModel": _call_sana,
}
"""How a transformer class of diffusers is called."""


class Denoiser:
    """A transformer of diffusers with its schedule.

    Args:
        network: the transformer; its class is a key of `CALLS`.
        schedule: the manifest's schedule object (`edgedit.schedule_config`), path "vp" or "flow".
        scale_factor: pixels a latent pixel stands for.
    """

    def __init__(self, network: Any, schedule: Mapping[str, Any], *, scale_factor: int = 8) -> None:
        self.network, self.schedule, self.scale_factor = network, check_schedule_config(schedule), scale_factor
        self.channels: int = network.config.in_channels
        self.prediction: str = self.schedule["prediction"]
        name = type(network).__name__
        if name not in CALLS:
            raise InputError(f"class {name} cannot be trained; choose a checkpoint of {', '.join(CALLS)}")
        self._call = CALLS[name]
        self._levels: np.ndarray | None = None
        if self.schedule["path"] == "vp":
            kept = alphas_cumprod(self.schedule).astype(np.float64)
            alpha, sigma = np.sqrt(kept), np.sqrt(1 - kept)
            self._levels = sigma / (alpha + sigma)
        elif self.schedule["path"] != "flow":
            raise InputError("a consistency model (TrigFlow) cannot be trained further; give its teacher")

    def with_network(self, network: Any) -> Denoiser:
        """The same schedule around another network."""
        return Denoiser(network, self.schedule, scale_factor=self.scale_factor)

    def levels(self, count: int, shift: float | None = None) -> np.ndarray:
        """`count` + 1 levels s from the noisiest to 0, spread as the checkpoint's own sampler spreads its steps.

        On the flow path `shift` takes the place of the checkpoint's own. Raises InputError for one that makes no sense.
        """
        if shift is not None and (self._levels is not None or not shift > 0):
            raise InputError("a sigma shift is a number above 0, for a flow model; give such a number, or leave it out")
        if self._levels is not None:
            last = len(self._levels) - 1
            steps = np.round(np.linspace(last, 0, count + 1)[:-1]).astype(int)
            return np.append(self._levels[steps], 0.0)
        grid = np.linspace(1, 0, count + 1)
        shift = float(self.schedule["shift"]) if shift is None else shift
        return np.asarray(shift * grid / (1 + (shift - 1) * grid))

    def sample_levels(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` random levels in (0, 1) with the density that such a model is trained with."""
        if self._levels is not None:
            return np.asarray(self._levels[rng.integers(len(self._levels), size=count)])
        logit = rng.standard_normal(count) + np.log(float(self.schedule["shift"]))
        return np.asarray(1 / (1 + np.exp(-logit)))

    def timestep(self, s: Tensor) -> Tensor:
        """What the network is told at the levels `s` (B,)."""
        if self._levels is None:
            return s * float(self.schedule["num_train_timesteps"])
        table = torch.as_tensor(self._levels, dtype=torch.float64, device=s.device)
        where = torch.searchsorted(table, s.double()).clamp(1, len(table) - 1)
        low, high = table[where - 1], table[where]
        return (where - 1 + ((s - low) / (high - low)).clamp(0, 1)).to(s.dtype)

    def output(self, x: Tensor, s: Tensor, text: Text) -> Tensor:
        """The network's whole output at `x` (B, C, H, W) on the straight path."""
        if self._levels is not None:
            x = x / _column(self._length(s))
        return self._call(self.network, x, self.timestep(s), text, self.scale_factor)

    @staticmethod
    def _length(s: Tensor) -> Tensor:
        """1 / (alpha + sigma)."""
        return torch.sqrt(s**2 + (1 - s) ** 2)

    def target(self, clean: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        """What the network should give, for the flow-matching or denoising loss."""
        if self.prediction == "flow":
            return noise - clean
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        length = _column(self._length(s))
        return (_column(1 - s) * noise - _column(s) * clean) / length

    def velocity(self, x: Tensor, s: Tensor, output: Tensor) -> Tensor:
        """noise - x_0 as the network's output has it."""
        output = output[:, : self.channels].float()
        level = _column(s)
        if self.prediction == "flow":
            return output
        if self.prediction == "epsilon":
            return (output - x) / (1 - level)
        if self.prediction == "sample":
            return (x - output) / level.clamp(min=1e-4)
        alpha, sigma = (part / _column(self._length(s)) for part in (1 - level, level))
        whole = x / _column(self._length(s))
        return (sigma * whole + alpha * output) - (alpha * whole - sigma * output)

    def __call__(self, x: Tensor, s: Tensor, text: Text) -> Tensor:
        """The velocity (B, C, H, W) at `x` and the levels `s` (B,)."""
        return self.velocity(x, s, self.output(x, s, text))


def _column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)


def guided(denoiser: Denoiser, x: Tensor, s: Tensor, text: Text, empty: Text, scale: float) -> Tensor:
    """The velocity under classifier-free guidance, both halves in one call; `scale` 1 is none."""
    if scale == 1:
        return denoiser(x, s, text)
    both = Text(torch.cat([text.states, empty.states]), torch.cat([text.mask, empty.mask]))
    positive, negative = denoiser(torch.cat([x, x]), torch.cat([s, s]), both).chunk(2)
    return negative + scale * (positive - negative)
