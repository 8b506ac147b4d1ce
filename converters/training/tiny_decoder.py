"""A small decoder that imitates an autoencoder's own, for pictures in a fraction of the time.

The student is the decoder of diffusers' AutoencoderTiny (TAESD): 3×3 convolutions and nearest-neighbour upsampling, no
norms and no attention. No data set is needed: the model draws latents for a list of prompts, and the student learns
what the full decoder makes of them. It takes latents in the transformer's space, so it has a scaling factor of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from edgedit.converters.checkpoint import ComponentSource, open_checkpoint
from edgedit.converters.families import family_of
from edgedit.converters.layout import CONFIG, TINY_DECODER
from edgedit.converters.training.calibration import read_prompts
from edgedit.converters.training.jobs import (
    default_guidance,
    latent_shape,
    pick_device,
    run_training,
    training_budget,
)
from edgedit.converters.training.loop import autocast, step_rng
from edgedit.converters.training.teacher import PlainAttention
from edgedit.converters.training.trainable import WEIGHTS, check_output, load_network, open_trainable, save_trainable
from edgedit.converters.training.workspace import OnProgress, Workspace, digest
from edgedit.errors import InputError

__all__ = ["DecoderReport", "TinyDecoderStage", "build_tiny", "distill_decoder"]

DEFAULT_WIDTH = 64
BLOCKS = 3
"""Residual blocks at each resolution but the last, which has one."""
LARGEST_CROP = 32
"""Sides of what the student sees at a time, in latent pixels."""
NOISE = 0.1
"""Largest share of noise that is added to the latents, so that the student forgives what few steps leave behind."""
EDGE_WEIGHT = 0.5
HELD_OUT = 16
"""Drawn latents that are kept out of training, to measure the likeness on."""


@dataclass(frozen=True)
class DecoderReport:
    """What `distill_decoder` did.

    Attributes:
        output: the new checkpoint.
        width: channels of the student.
        parameters: of the student's, and of the full decoder's.
        psnr_db: likeness to the full decoder's pictures of latents that training did not see.
        losses: first and last loss.
        seconds: time of this call.
    """

    output: Path
    width: int
    parameters: tuple[int, int]
    psnr_db: float
    losses: dict[str, tuple[float, float]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "output": str(self.output)}


def build_tiny(channels: int, factor: int, width: int) -> Any:
    """An untrained AutoencoderTiny for latents of `channels` that are `factor` times smaller than their picture."""
    stages = factor.bit_length()
    blocks = (BLOCKS,) * (stages - 1) + (1,)
    return diffusers.AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(width,) * stages,
        decoder_block_out_channels=(width,) * stages,
        num_encoder_blocks=blocks[::-1],
        num_decoder_blocks=blocks,
        scaling_factor=1.0,
    )


class TinyDecoderStage:
    """Training of a tiny decoder on what the full one makes of the same latents.

    Args:
        teacher: takes latents (B, C, h, w) of the transformer's space, returns pictures (B, 3, H, W) in [-1, 1].
        student: the same, trainable.
        latents: float16 (N, C, h, w) in the transformer's space.
    """

    name = "decoder"
    hidden_matrices: frozenset[str] = frozenset()

    def __init__(
        self,
        teacher: Any,
        student: nn.Module,
        latents: npt.NDArray[np.float16],
        *,
        seed: int,
        device: torch.device,
        batch_size: int,
        learning_rate: float,
    ) -> None:
        self.modules = student.to(device)
        self.learning_rate = learning_rate
        self._teacher, self._latents = teacher, latents
        self._seed, self._device, self._batch_size = seed, device, batch_size

    def loss(self, step: int) -> Tensor:
        """L1 of the pictures and of the differences between neighbouring pixels, where blur shows."""
        rng = step_rng(self._seed, step, purpose=31)
        chosen = rng.integers(len(self._latents), size=self._batch_size)
        clean = torch.from_numpy(self._latents[chosen].astype(np.float32))
        height, width = (min(LARGEST_CROP, side) for side in clean.shape[2:])
        top, left = (
            int(rng.integers(side - part + 1)) for side, part in zip(clean.shape[2:], (height, width), strict=True)
        )
        clean = clean[:, :, top : top + height, left : left + width]
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        share = torch.from_numpy(rng.uniform(0, NOISE, (len(clean), 1, 1, 1)).astype(np.float32))
        latents = (clean + share * noise).to(self._device)
        with torch.no_grad(), autocast(self._device):
            wanted = self._teacher(latents).float()
        with autocast(self._device):
            got = self.modules(latents).float()
        difference = got - wanted
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        total: Tensor = F.l1_loss(got, wanted) + EDGE_WEIGHT * edges
        return total


def distill_decoder(
    source: str | Path,
    output: str | Path,
    *,
    width: int = DEFAULT_WIDTH,
    calibration: str = "self",
    budget: float | None = None,
    train_steps: int | None = None,
    samples: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress | None = None,
    stop_after: int | None = None,
) -> DecoderReport:
    """Train a tiny decoder for a checkpoint; the new checkpoint has it beside everything else.

    Call it again with the same arguments after an interruption and it goes on.

    Args:
        source: a pipeline folder with an AutoencoderKL or AutoencoderDC.
        output: the checkpoint to make: the old one's files and `tiny_vae`, an AutoencoderTiny without an encoder.
        width: channels of its convolutions, at least 8.
        calibration, budget, train_steps, samples, seed, device: as for `distill`.
        learning_rate: peak of AdamW's.
        batch_size: latents in a step.
        stop_after: leave at this step as if interrupted, for tests.

    Raises:
        CheckpointError: the source is missing, damaged or no pipeline.
        InputError: an option without sense, an autoencoder of another class, or a loss that is not a number.
        ConversionError: the output exists or cannot be written.
    """
    began = time.monotonic()
    limit = training_budget(budget, train_steps)
    if not 8 <= width <= 512:
        raise InputError(f"--width must be from 8 to 512 channels, not {width}")
    target = Path(output)
    check_output(target)
    trainable = open_trainable(source)
    checkpoint = open_checkpoint(source)
    source_vae = checkpoint.components.get("vae")
    if source_vae is None or source_vae.class_name not in ("AutoencoderKL", "AutoencoderDC"):
        found = "none" if source_vae is None else source_vae.class_name
        raise InputError(f"a tiny decoder can be made for AutoencoderKL and AutoencoderDC; the checkpoint has {found}")
    prompts = read_prompts(calibration, trainable.path)
    count = HELD_OUT + (samples if samples is not None else max(64, min(2048, 4 * len(prompts))))
    scale = default_guidance(trainable)
    work = Workspace(
        target,
        {
            "source": str(trainable.path.resolve()),
            "component": ["decoder", width, learning_rate],
            "prompts": digest("\n".join(prompts)),
            "budget": [limit.seconds, limit.steps],
            "samples": [count, scale, batch_size],
            "seed": seed,
        },
    )
    place = pick_device(device)
    trainable.transformer.to(place).eval().requires_grad_(False)
    if place.type == "cpu":
        trainable.transformer.set_attn_processor(PlainAttention())
    data = work.calibration(
        trainable.path,
        trainable.denoiser(),
        prompts,
        count=count,
        shape=latent_shape(trainable),
        guidance_scale=scale,
        seed=seed,
        device=place,
        batch_size=min(32, count),
        on_progress=on_progress,
    )
    shifts = family_of(checkpoint.pipeline_class, None, {}).uses_shift_factor
    full = _FullDecoder(source_vae, shifts=shifts).to(place)
    torch.manual_seed(seed)
    tiny = build_tiny(data.latents.shape[1], full.factor, width)
    stage = TinyDecoderStage(
        full,
        tiny.decoder,
        data.latents[:-HELD_OUT],
        seed=seed,
        device=place,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    averaged = run_training(stage, work, limit, on_progress, stop_after)
    tiny.decoder.load_state_dict(averaged)
    likeness = _likeness(full, tiny.decoder.eval(), data.latents[-HELD_OUT:], place)
    folder = work.path(TINY_DECODER)
    folder.mkdir(exist_ok=True)
    stored = {f"decoder.{name}": value.to(trainable.dtype).cpu().contiguous() for name, value in averaged.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    config = {key: value for key, value in tiny.config.items() if key != "_use_default_values"}
    (folder / CONFIG).write_text(json.dumps({"_class_name": "AutoencoderTiny", **config}, indent=2), encoding="utf-8")
    extra = {TINY_DECODER: folder}
    plot = work.plot("decoder-loss.png")
    if plot is not None:
        extra["decoder-loss.png"] = plot
    save_trainable(trainable, target, weights=None, settings=trainable.settings, extra=extra)
    losses = work.first_and_last()
    work.remove()
    sizes = (sum(p.numel() for p in tiny.decoder.parameters()), full.parameter_count)
    return DecoderReport(target, width, sizes, likeness, losses, time.monotonic() - began)


class _FullDecoder(nn.Module):
    """The checkpoint's own decoder, float32, on latents of the transformer's space."""

    def __init__(self, source: ComponentSource, *, shifts: bool) -> None:
        super().__init__()
        self.vae = load_network(source).eval().requires_grad_(False)
        config: Mapping[str, Any] = source.config
        self._scale = float(config.get("scaling_factor") or 1.0)
        self._shift = float((config.get("shift_factor") or 0.0) if shifts else 0.0)
        widths = config.get("block_out_channels") or config.get("decoder_block_out_channels") or [0] * 4
        self.factor = int(2 ** (len(widths) - 1))
        self.parameter_count = sum(
            value.numel() for name, value in self.vae.named_parameters() if name.startswith(("decoder", "post_quant"))
        )

    def forward(self, latents: Tensor) -> Tensor:
        pictures: Tensor = self.vae.decode(latents / self._scale + self._shift, return_dict=False)[0]
        return pictures


@torch.no_grad()
def _likeness(full: nn.Module, tiny: nn.Module, latents: npt.NDArray[np.float16], device: torch.device) -> float:
    """Mean PSNR in dB of the tiny decoder's pictures, both clipped to [-1, 1]."""
    found = []
    for one in latents:
        x = torch.from_numpy(one[None].astype(np.float32)).to(device)
        error = (tiny(x).clamp(-1, 1) - full(x).clamp(-1, 1)).square().mean().item()
        found.append(10 * np.log10(4 / max(error, 1e-12)))
    return float(np.mean(found))
