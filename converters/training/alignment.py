"""The last part of training: on the model's own way from noise, towards pictures that hold what their captions claim.

Flow matching shows the network noisy versions of right pictures only. When it draws, it comes through states of its
own making, such as two half-formed objects where the caption has one, and nothing told it what to do there. So it draws
with its own sampler, guidance included; at states along the way its estimate of the clean latents is read by a
`LatentReader`, and what captions claim and the reading lacks is a loss (`claims_loss`). Flow matching goes on beside
it, which keeps the pictures the world's.

References: Xu et al., "ImageReward" (2023), section 3 (ReFL: the reward of a clean estimate, at a random step of the
model's own trajectory); Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from edgedit.converters.training.calibration import trajectory
from edgedit.converters.training.captions import Claims, caption
from edgedit.converters.training.claims_loss import ClaimBatch, claims_loss
from edgedit.converters.training.denoisers import Denoiser, Text
from edgedit.converters.training.latent_reader import LatentReader, centres_of, reading_loss
from edgedit.converters.training.loop import autocast, step_rng
from edgedit.converters.training.teacher import TeacherStage
from edgedit.converters.training.tokens import padding_tokenizer
from edgedit.converters.training.world import Scene

__all__ = ["AlignmentStage", "ReaderStage", "SceneCaptions"]

STEPS = 10
"""Steps of the sampler: as good as 20 for what a picture holds."""
STATES = range(1, 9)
"""Steps at whose beginning the clean estimate is read: from sigma 0.98 to 0.56. Pure noise tells nothing yet."""
CYCLE = 4
"""Training steps that one set of trajectories serves."""
GUIDANCE_SCALE = 2.5
CLAIMS_WEIGHT = 0.05


class SceneCaptions:
    """Captions of scenes, their claims, and their text states by a frozen encoder."""

    def __init__(self, scenes: Sequence[Scene], text_encoder: T5EncoderModel, device: torch.device) -> None:
        self.scenes, self.device = scenes, device
        self._text_encoder = text_encoder.eval().requires_grad_(False).to(device)
        self._tokenizer = padding_tokenizer()

    def draw(self, count: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], Text, ClaimBatch]:
        """Which scenes, their embedded captions, and the claims."""
        chosen = rng.integers(len(self.scenes), size=count)
        captions = [caption(self.scenes[int(index)], rng) for index in chosen]
        return chosen, self.embed([text for text, _ in captions]), self.claims([claims for _, claims in captions])

    def claims(self, claims: Sequence[Claims]) -> ClaimBatch:
        """On the device."""
        return ClaimBatch.of(claims).to(self.device)

    def embed(self, texts: Sequence[str]) -> Text:
        """Embeds captions, padded to the longest that there can be."""
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = torch.tensor([encoding.ids for encoding in encodings]).to(self.device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings]).to(self.device)
        with torch.no_grad():
            return Text(self._text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def _column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)


class ReaderStage:
    """Training of the latent reader: half on clean latents with a little noise, half on the denoiser's estimates.

    A reader that knew clean latents only would take the blur of an estimate for anything.
    """

    name = "latent_reader"
    hidden_matrices: frozenset[str] = frozenset()

    def __init__(
        self,
        denoiser: Denoiser,
        latents: npt.NDArray[np.float16],
        captions: SceneCaptions,
        *,
        seed: int,
        device: torch.device,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
    ) -> None:
        torch.manual_seed(seed)
        self.modules: nn.Module = LatentReader(latents.shape[1]).to(device)
        self.learning_rate = learning_rate
        self._denoiser, self._latents, self._captions = denoiser, latents, captions
        self._centres = torch.from_numpy(centres_of(captions.scenes, latents.shape[-1]))
        self._seed, self._device, self._batch_size = seed, device, batch_size

    def loss(self, step: int) -> Tensor:
        """Cross entropy of the readings of one batch."""
        rng = step_rng(self._seed, step, purpose=31)
        chosen, text, _ = self._captions.draw(self._batch_size, rng)
        clean = torch.from_numpy(self._latents[chosen].astype(np.float32)).to(self._device)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(self._device)
        half = self._batch_size // 2
        s = torch.from_numpy(rng.uniform(0.3, 0.95, size=half).astype(np.float32)).to(self._device)
        noisy = (1 - _column(s)) * clean[:half] + _column(s) * noise[:half]
        little = torch.from_numpy(rng.uniform(0, 0.3, size=self._batch_size - half).astype(np.float32))
        with autocast(self._device):
            with torch.no_grad():
                estimate = noisy - _column(s) * self._denoiser(noisy, s, Text(text.states[:half], text.mask[:half]))
            latents = torch.cat([estimate, clean[half:] + _column(little.to(self._device)) * noise[half:]])
            reading = self.modules(latents)
        return reading_loss(reading, self._centres[torch.from_numpy(chosen)].to(self._device))


class AlignmentStage:
    """Flow matching and the loss of the claims, together.

    The states of a cycle are drawn by the network as it is when the cycle begins, so a run that is taken up in the
    middle of one draws them anew.
    """

    name = "alignment"

    def __init__(
        self,
        flow: TeacherStage,
        denoiser: Denoiser,
        reader: LatentReader,
        captions: SceneCaptions,
        *,
        shape: tuple[int, ...],
        seed: int,
        device: torch.device,
        batch_size: int = 48,
        learning_rate: float = 2e-4,
        weight: float = CLAIMS_WEIGHT,
    ) -> None:
        """`flow` trains the network of `denoiser`; `batch_size` states are read in a step; latents are (B, *shape)."""
        self.modules: nn.Module = flow.modules
        self.hidden_matrices = flow.hidden_matrices
        self.learning_rate = learning_rate
        self._flow, self._denoiser, self._captions = flow, denoiser, captions
        self._reader = reader.eval().requires_grad_(False)
        self._shape, self._seed, self._device = shape, seed, device
        self._batch_size, self._weight = batch_size, weight
        self._levels = denoiser.levels(STEPS)
        self._empty = captions.embed([""])
        self._states: tuple[Tensor, Tensor, Text, ClaimBatch] | None = None
        self.last_claims = float("nan")

    def loss(self, step: int) -> Tensor:
        """Loss of one batch."""
        if self._states is None or step % CYCLE == 0:
            self._states = self._draw(step_rng(self._seed, step - step % CYCLE, purpose=32))
        rows = torch.arange(step % CYCLE, CYCLE * self._batch_size, CYCLE, device=self._device)
        x, s, text, claims = self._states
        x, s, text, claims = x[rows], s[rows], text[rows], claims[rows]
        with autocast(self._device):
            with torch.no_grad():
                negative = self._denoiser(x, s, self._nothing(len(x)))
            velocity = negative + GUIDANCE_SCALE * (self._denoiser(x, s, text) - negative)
            reading = self._reader(x - _column(s) * velocity)
        missed = claims_loss(reading, claims).mean()
        self.last_claims = float(missed.detach())
        return self._flow.loss(step) + self._weight * missed

    def _nothing(self, count: int) -> Text:
        return Text(self._empty.states.expand(count, -1, -1), self._empty.mask.expand(count, -1))

    def _draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Text, ClaimBatch]:
        """States of the sampler on its way, of every trajectory one at each of `STATES`, in a random order."""
        count = -(-CYCLE * self._batch_size // len(STATES))
        _, text, claims = self._captions.draw(count, rng)
        noise = torch.from_numpy(rng.standard_normal((count, *self._shape), dtype=np.float32)).to(self._device)
        levels = self._levels[: STATES.stop]
        with autocast(self._device):
            way = list(
                trajectory(
                    self._denoiser, noise, text, self._nothing(count), guidance_scale=GUIDANCE_SCALE, levels=levels
                )
            )
        order = torch.from_numpy(rng.permutation(count * len(STATES))).to(self._device)
        s = torch.tensor([self._levels[k] for k in STATES], dtype=torch.float32, device=self._device)
        prompt = order % count
        states = torch.cat([way[k] for k in STATES])[order]
        return states, s[order // count], text[prompt], claims[prompt]
