"""Finishing of the decoder alone, on cached latents with a little noise.

The encoder stays, so the latents and every transformer trained on them stay valid. Without the encoder a step costs
half, and the noise teaches the decoder to draw clean edges from the inexact latents that a transformer makes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from edgedit.converters.training.autoencoder import (
    crop,
    crop_corners,
    object_weights,
    picture_loss,
    pictures_to_tensor,
)
from edgedit.converters.training.loop import autocast, step_rng
from edgedit.converters.training.world import IMAGE_SIZE, Scene, render

__all__ = ["DecoderStage"]

LATENT_NOISE = 0.1
"""Largest standard deviation of the noise; latents have variance 1."""


class DecoderStage:
    """Training of `decoder` and `post_quant_conv` of a finished autoencoder."""

    name = "decoder"
    hidden_matrices: frozenset[str] = frozenset()

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        latents: npt.NDArray[np.float16],
        scenes: list[Scene],
        *,
        seed: int,
        device: torch.device,
        batch_size: int = 8,
        learning_rate: float = 6e-4,
        crop_steps: int = 5000,
    ) -> None:
        """`latents` (N, C, 16, 16) belong to `scenes`; quarters of pictures for `crop_steps` steps, then whole ones."""
        self.autoencoder = autoencoder.to(device, memory_format=torch.channels_last)
        self.autoencoder.set_attn_processor(AttnProcessor())
        self.modules: nn.Module = nn.ModuleDict(
            {"decoder": autoencoder.decoder, "post_quant_conv": autoencoder.post_quant_conv}
        )
        self.learning_rate = learning_rate
        self._latents = latents
        self._scenes = scenes
        self._seed = seed
        self._device = device
        self._batch_size = batch_size
        self._crop_steps = crop_steps

    def loss(self, step: int) -> Tensor:
        """Reconstruction and edge loss of one batch."""
        rng = step_rng(self._seed, step, purpose=5)
        chosen = [int(index) for index in rng.integers(len(self._scenes), size=self._batch_size)]
        scenes = [self._scenes[index] for index in chosen]
        target = pictures_to_tensor([render(scene) for scene in scenes])
        weights = object_weights(target, scenes)
        latents = torch.from_numpy(self._latents[chosen].astype(np.float32))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        amount = torch.from_numpy(rng.uniform(0, LATENT_NOISE, size=(len(chosen), 1, 1, 1)).astype(np.float32))
        latents = latents + amount * noise
        if step < self._crop_steps:
            unit = IMAGE_SIZE // latents.shape[-1]
            side = IMAGE_SIZE // 2
            corners = crop_corners(scenes, side, unit, rng)
            target, weights = crop(target, corners, side), crop(weights, corners, side)
            latents = crop(latents, [(top // unit, left // unit) for top, left in corners], side // unit)
        latents = latents.to(self._device, memory_format=torch.channels_last)
        with autocast(self._device):
            drawn = self.autoencoder.decoder(self.autoencoder.post_quant_conv(latents))
        return picture_loss(drawn.float(), target.to(self._device), weights.to(self._device))
