"""What a model is calibrated or distilled on: prompts, their embeddings, and pictures that the model itself draws.

No data set is needed: the teacher's own samples stand in for data (as in CLEAR and in data-free distillation).
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedit.converters.convert import convert
from edgedit.converters.prompts import DEFAULT_PROMPTS, PROMPTS_FILE, read_prompts
from edgedit.converters.training.denoisers import Denoiser, Text, guided
from edgedit.converters.training.loop import autocast, step_rng
from edgedit.errors import InputError

__all__ = [
    "DEFAULT_PROMPTS",
    "PROMPTS_FILE",
    "Calibration",
    "batch_noise",
    "draw_latents",
    "embed_prompts",
    "noise_of_samples",
    "read_prompts",
    "sample_latents",
    "trajectory",
]

SAMPLE_STEPS = 20


@dataclass(frozen=True)
class Calibration:
    """Embedded prompts and the latents that the teacher drew for them.

    Attributes:
        text: one row a prompt.
        empty: the negative prompt, one row.
        latents: float16 (N, C, H, W); latents[i] was drawn for prompt i modulo the number of prompts.
        guidance_scale: the scale that they were drawn with.
        seed, batch_size: what their noise depends on, see `noise_of_samples`.
        points, pictures: where the teacher set out and arrived, float16 (N, levels, C, H, W), see `trajectory`.
        right: whether the latents show what their prompts say (N,), where somebody looked.
    """

    text: Text
    empty: Text
    latents: npt.NDArray[np.float16]
    guidance_scale: float
    seed: int
    batch_size: int
    points: npt.NDArray[np.float16] | None = None
    pictures: npt.NDArray[np.float16] | None = None
    right: npt.NDArray[np.bool_] | None = None

    def batch(self, chosen: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, Text]:
        """Latents (B, C, H, W) float32 and the embedded prompts they belong to."""
        clean = torch.from_numpy(self.latents[chosen].astype(np.float32)).to(device)
        return clean, self.prompts(chosen, device)

    def prompts(self, chosen: npt.NDArray[np.int64], device: torch.device) -> Text:
        """The embedded prompts of samples."""
        rows = torch.from_numpy(chosen % len(self.text.states))
        text = self.text[rows]
        return Text(text.states.float().to(device), text.mask.to(device))

    def negative(self, count: int, device: torch.device) -> Text:
        """The negative prompt, `count` times."""
        states, mask = self.empty.states.float().to(device), self.empty.mask.to(device)
        return Text(states.expand(count, -1, -1), mask.expand(count, -1))


def embed_prompts(
    checkpoint: Path, prompts: Sequence[str], *, on_step: Callable[[int, int], None] | None = None
) -> tuple[Text, Text]:
    """Embeds prompts, and the empty negative prompt, with the runtime's own text encoder.

    The encoder is converted into a temporary bundle, so that training sees exactly what drawing will give.

    Returns:
        Text (N, L, D) float16 and (1, L, D), both padded to the longest prompt.
    """
    import edgedit

    with tempfile.TemporaryDirectory(prefix="edgedit-text-") as folder:
        bundle = Path(folder) / "text.edgedit"
        convert(checkpoint, bundle, components=("text_encoder",), measure=False)
        with edgedit.load(bundle, use_cache=False) as pipeline:
            found = [pipeline.encode_prompt("", negative=True)]
            for index, prompt in enumerate(prompts):
                found.append(pipeline.encode_prompt(prompt))
                if on_step is not None:
                    on_step(index + 1, len(prompts))
    length = max(embedding.hidden_states.shape[1] for embedding in found)
    width = found[0].hidden_states.shape[2]
    states = np.zeros((len(found), length, width), np.float16)
    mask = np.zeros((len(found), length), np.int64)
    for row, embedding in enumerate(found):
        used = embedding.hidden_states.shape[1]
        states[row, :used] = embedding.hidden_states[0].clip(-65504, 65504)
        mask[row, :used] = embedding.attention_mask[0]
    whole = Text(torch.from_numpy(states), torch.from_numpy(mask))
    return whole[torch.arange(1, len(found))], whole[torch.arange(1)]


@torch.no_grad()
def trajectory(
    denoiser: Denoiser,
    noise: Tensor,
    text: Text,
    empty: Text,
    *,
    guidance_scale: float,
    levels: npt.NDArray[np.float64],
) -> Iterator[Tensor]:
    """The latents at each of `levels`, by DPM-Solver++ 2M on the straight path (Lu et al. 2022, algorithm 2).

    Args:
        noise: unit noise (B, C, H, W), the first that is given.
        levels: falling levels s, from that of the noise.
    """
    x, before, last_step = noise.float(), None, 0.0
    for now, then in itertools.pairwise(levels):
        yield x
        s = torch.full((len(x),), float(now), device=x.device)
        clean = x - float(now) * guided(denoiser, x, s, text, empty, guidance_scale)
        if then <= 0:
            x = clean
            break
        step = _log_snr(then) - _log_snr(now)
        estimate = clean
        if before is not None:
            estimate = clean + (clean - before) * (0.5 * step / last_step)
        ratio = float(then) / float(now)
        x = ratio * x + (1 - float(then) - ratio * (1 - float(now))) * estimate
        # Pure noise is an infinite step away from everything, so there is no second order right after it.
        before, last_step = (clean, step) if now < 1 else (None, 0.0)
    yield x


@torch.no_grad()
def draw_latents(
    denoiser: Denoiser,
    noise: Tensor,
    text: Text,
    empty: Text,
    *,
    guidance_scale: float,
    levels: npt.NDArray[np.float64],
    rng: np.random.Generator | None = None,
) -> Tensor:
    """Latents (B, C, H, W) drawn along `levels`, which end at 0.

    The end of a `trajectory`; with `rng`, fresh noise is drawn after every step instead (the "lcm" sampler).
    """
    if rng is None:
        states = trajectory(denoiser, noise, text, empty, guidance_scale=guidance_scale, levels=levels)
        return list(states)[-1]
    x = noise.float()
    for now, then in itertools.pairwise(levels):
        s = torch.full((len(x),), float(now), device=x.device)
        clean = x - float(now) * guided(denoiser, x, s, text, empty, guidance_scale)
        fresh = torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32)).to(x.device)
        x = (1 - float(then)) * clean + float(then) * fresh
    return x


def _log_snr(s: float) -> float:
    return math.log((1 - s) / s) if s < 1 else -math.inf


def batch_noise(seed: int, batch: int, size: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The unit noise (size, *shape) that batch number `batch` of the samples is drawn from."""
    return step_rng(seed, batch, purpose=11).standard_normal((size, *shape), dtype=np.float32)


def noise_of_samples(chosen: npt.NDArray[np.int64], shape: Sequence[int], calibration: Calibration) -> Tensor:
    """The unit noise (B, C, H, W) that samples number `chosen` were drawn from."""
    size, total = calibration.batch_size, len(calibration.latents)
    batches = {
        int(batch): batch_noise(calibration.seed, int(batch), min(size, total - int(batch) * size), tuple(shape))
        for batch in np.unique(chosen // size)
    }
    return torch.from_numpy(np.stack([batches[int(i) // size][int(i) % size] for i in chosen]))


def sample_latents(
    denoiser: Denoiser,
    text: Text,
    empty: Text,
    *,
    count: int,
    shape: tuple[int, int, int],
    guidance_scale: float,
    seed: int,
    device: torch.device,
    batch_size: int,
    from_noise_alone: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float16]:
    """Latents (count, *shape) that the teacher draws, number i for prompt i modulo the number of prompts.

    A teacher whose own sampler draws fresh noise on the way does so here, except with `from_noise_alone`: then a sample
    is a function of its `noise_of_samples`. Batch k depends on `(seed, k)` alone.

    Raises InputError when the model draws values that are not numbers.
    """
    result = np.empty((count, *shape), np.float16)
    calibration = Calibration(text, empty, result, guidance_scale, seed, batch_size)
    levels = denoiser.levels(SAMPLE_STEPS)
    fresh = denoiser.schedule["sampler"] == "lcm" and not from_noise_alone
    for index, start in enumerate(range(0, count, batch_size)):
        size = min(batch_size, count - start)
        noise = batch_noise(seed, index, size, shape)
        with autocast(device):
            latents = draw_latents(
                denoiser,
                torch.from_numpy(noise).to(device),
                calibration.prompts(np.arange(start, start + size), device),
                calibration.negative(size, device),
                guidance_scale=guidance_scale,
                levels=levels,
                rng=step_rng(seed, index, purpose=13) if fresh else None,
            )
        if not torch.isfinite(latents).all():
            raise InputError("the checkpoint draws values that are not numbers; it cannot be calibrated on itself")
        result[start : start + size] = latents.cpu().numpy()
        if on_step is not None:
            on_step(start + size, count)
    return result
