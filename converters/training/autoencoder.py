"""The autoencoder: 128×128 pictures to 8×16×16 latents and back.

A narrow `AutoencoderKL`. The loss is L1 + squared error + L1 of the finite differences (edges are all the detail that
these pictures have), more near the objects, and a KL term that is large for an autoencoder of this kind: it holds the
posterior's noise up, so the decoder learns to undo small errors of the latents, which the transformer will make.

Normalisation over few channels hides the absolute colour of a flat background, so the norms have two groups only. With
four latent channels and whole, unweighted pictures small stars and crosses were still round after 5,300 steps (28 dB);
eight channels and windows around objects were brought in together, and 6,600 further steps reached 36 dB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from edgedit.converters.training.loop import autocast, step_rng
from edgedit.converters.training.world import BACKGROUNDS, IMAGE_SIZE, Scene, render, sample_scene

__all__ = [
    "AUTOENCODER_CONFIG",
    "AutoencoderStage",
    "crop",
    "crop_corners",
    "encode_mean",
    "object_weights",
    "picture_loss",
    "pictures_to_tensor",
    "standardise",
]

AUTOENCODER_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 128],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 2,
    "sample_size": 128,
}

OBJECT_WEIGHT = 4.0
"""Weight of the error near objects, over that of the background."""


def pictures_to_tensor(pictures: list[np.ndarray[Any, np.dtype[np.uint8]]]) -> Tensor:
    """uint8 (H, W, 3) pictures to float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class _Reconstruct(nn.Module):
    """Encode, draw from the posterior with given noise, decode: one graph for the compiler."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moments = self.autoencoder.quant_conv(self.autoencoder.encoder(pictures))
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latents = mean + noise * torch.exp(0.5 * log_variance)
        return self.autoencoder.decoder(self.autoencoder.post_quant_conv(latents)), mean, log_variance


def object_weights(pictures: Tensor, scenes: list[Scene]) -> Tensor:
    """Weights of the pixels, (N, 1, H, W): what counts is near the objects, a small part of most pictures."""
    backgrounds = np.array([BACKGROUNDS[scene.background] for scene in scenes], np.float32) / 127.5 - 1
    objects = (pictures - torch.from_numpy(backgrounds)[:, :, None, None]).abs().amax(1, keepdim=True) > 0.02
    return 1 + OBJECT_WEIGHT * F.max_pool2d(objects.float(), 9, stride=1, padding=4)


def crop_corners(scenes: list[Scene], side: int, unit: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(top, left), multiples of `unit` pixels, of a window of `side` pixels around one object of each scene."""
    corners = []
    for scene in scenes:
        item = scene.items[int(rng.integers(len(scene.items)))]
        corner = np.array([item.y, item.x]) - side / 2 + rng.uniform(-side / 4, side / 4, size=2)
        top, left = (int(value) * unit for value in np.clip(np.rint(corner / unit), 0, (IMAGE_SIZE - side) // unit))
        corners.append((top, left))
    return corners


def crop(tensor: Tensor, corners: list[tuple[int, int]], side: int) -> Tensor:
    """The windows of a batch (N, C, H, W), as (N, C, side, side)."""
    windows = zip(tensor, corners, strict=True)
    return torch.stack([image[:, top : top + side, left : left + side] for image, (top, left) in windows])


def picture_loss(drawn: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted L1 and squared error, and L1 of the differences between neighbours."""
    difference = drawn - target
    down = (difference.diff(dim=2) * weights[:, :, 1:]).abs().mean()
    across = (difference.diff(dim=3) * weights[:, :, :, 1:]).abs().mean()
    return (weights * (difference.abs() + difference.square())).mean() + (down + across) / 2


class AutoencoderStage:
    """Training of the autoencoder on scenes rendered on the fly."""

    name = "autoencoder"
    hidden_matrices: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        config: dict[str, Any] | None = None,
        batch_size: int = 8,
        compiled: bool = False,
        learning_rate: float = 6e-4,
        kl_weight: float = 2e-4,
        crop_steps: int = 6500,
    ) -> None:
        """`crop_steps`: for so many steps the pictures are quarters, which teaches the colours four times as fast."""
        torch.manual_seed(seed)
        self.autoencoder = AutoencoderKL(**(config or AUTOENCODER_CONFIG)).to(device, memory_format=torch.channels_last)
        self.modules: nn.Module = self.autoencoder
        self.learning_rate = learning_rate
        self._kl_weight = kl_weight
        self._crop_steps = crop_steps
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        # Plain attention: on CPU the fused kernel's backward pass in bfloat16 is several times slower.
        self.autoencoder.set_attn_processor(AttnProcessor())
        forward = _Reconstruct(self.autoencoder)
        self._forward = torch.compile(forward) if compiled else forward

    def loss(self, step: int) -> Tensor:
        """Reconstruction, edge and KL loss of one batch."""
        rng = step_rng(self._seed, step, purpose=1)
        scenes = [sample_scene(rng) for _ in range(self._batch_size)]
        pictures = pictures_to_tensor([render(scene) for scene in scenes])
        weights = object_weights(pictures, scenes)
        if step < self._crop_steps:
            side = IMAGE_SIZE // 2
            corners = crop_corners(scenes, side, 1, rng)
            pictures, weights = crop(pictures, corners, side), crop(weights, corners, side)
        target = pictures.to(self._device, memory_format=torch.channels_last)
        weights = weights.to(self._device)
        config = self.autoencoder.config
        side = target.shape[-1] // 2 ** (len(config.block_out_channels) - 1)
        shape = (self._batch_size, config.latent_channels, side, side)
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(self._device)
        with autocast(self._device):
            drawn, mean, log_variance = self._forward(target, noise)
        mean, log_variance = mean.float(), log_variance.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss: Tensor = picture_loss(drawn.float(), target, weights) + self._kl_weight * kl
        return loss


@torch.no_grad()
def encode_mean(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Posterior means, float32 (N, 4, H/8, W/8), of float32 pictures in [-1, 1]."""
    device = next(autoencoder.parameters()).device
    with autocast(device):
        moments = autoencoder.quant_conv(autoencoder.encoder(pictures.to(device, memory_format=torch.channels_last)))
    mean: Tensor = moments.float().chunk(2, dim=1)[0]
    return mean.cpu()


@torch.no_grad()
def standardise(autoencoder: AutoencoderKL, latents: Tensor) -> None:
    """Changes the 1×1 convolutions beside the latents so that each channel has mean 0 and variance 1.

    Exact, and it leaves `scaling_factor` 1 and no `shift_factor` (which the PixArt pipelines would ignore).

    Args:
        autoencoder: changed in place.
        latents: posterior means of typical pictures, (N, C, h, w).
    """
    mean = latents.mean((0, 2, 3)).to(autoencoder.device)
    deviation = latents.std((0, 2, 3)).to(autoencoder.device)
    outward, inward = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = mean.numel()
    outward.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    outward.bias[:channels] = (outward.bias[:channels] - mean) / deviation
    outward.bias[channels:] -= 2 * deviation.log()
    inward.bias += (inward.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
    inward.weight *= deviation.view(1, -1, 1, 1)
    autoencoder.register_to_config(scaling_factor=1.0)
