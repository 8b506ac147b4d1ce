"""The last part of training: on the model's own way from noise, towards pictures that hold what their captions claim.

Flow matching shows the network noisy versions of right pictures only. When it draws, it comes through states of its
own making, such as two half-formed objects where the caption has one, and nothing told it what to do there. So it draws
with its own sampler, guidance included; at states along the way its estimate of the clean latents is read by a
`LatentReader`, and what captions claim and the reading lacks is a loss (`claims_loss`). What trained it before (flow
matching, or its teacher's trajectories) goes on beside it, which keeps the pictures the world's.

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
from edgedit.converters.training.distill import first_latents
from edgedit.converters.training.latent_reader import LatentReader, centres_of, reading_loss
from edgedit.converters.training.loop import Stage, autocast, step_rng
from edgedit.converters.training.tokens import padding_tokenizer
from edgedit.converters.training.world import Scene

__all__ = ["AlignmentStage", "FewStepWay", "GuidedWay", "ReaderStage", "SceneCaptions"]

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

    def one_each(self, count: int, seed: int) -> tuple[Text, ClaimBatch]:
        """Captions of `count` scenes, embedded (float16, on the CPU), and their claims."""
        scenes = [self.scenes[index % len(self.scenes)] for index in range(count)]
        captions = [caption(scene, step_rng(seed, index, purpose=33)) for index, scene in enumerate(scenes)]
        parts = [self.embed([text for text, _ in captions[first : first + 256]]) for first in range(0, count, 256)]
        text = Text(torch.cat([part.states.half().cpu() for part in parts]), torch.cat([p.mask.cpu() for p in parts]))
        return text, self.claims([claims for _, claims in captions])

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
        self.reader = LatentReader(latents.shape[1]).to(device)
        self.modules: nn.Module = self.reader
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
            reading = self.reader(latents)
        return reading_loss(reading, self._centres[torch.from_numpy(chosen)].to(self._device))


class GuidedWay:
    """How a many-step model draws: DPM-Solver++ 2M under classifier-free guidance."""

    def __init__(self, denoiser: Denoiser, empty: Text) -> None:
        levels = denoiser.levels(STEPS)
        self.levels = [float(levels[k]) for k in STATES]
        self._denoiser, self._empty, self._grid = denoiser, empty, levels[: STATES.stop]

    def states(self, noise: Tensor, text: Text, rng: np.random.Generator) -> list[Tensor]:
        """The latents (B, C, h, w) at each of `levels`, from unit noise; without gradient."""
        empty = _repeated(self._empty, len(noise))
        way = trajectory(self._denoiser, noise, text, empty, guidance_scale=GUIDANCE_SCALE, levels=self._grid)
        return list(way)[STATES.start :]

    def clean(self, x: Tensor, s: Tensor, text: Text) -> Tensor:
        """The clean estimate, with the gradient of the half that sees the prompt."""
        with torch.no_grad():
            negative = self._denoiser(x, s, _repeated(self._empty, len(x)))
        velocity = negative + GUIDANCE_SCALE * (self._denoiser(x, s, text) - negative)
        return x - _column(s) * velocity


class FewStepWay:
    """How a distilled model draws: a clean estimate at each level, and fresh noise to the next."""

    def __init__(self, denoiser: Denoiser, tables: Sequence[Sequence[float]]) -> None:
        """`tables` has the falling levels of each number of steps, without the 0 at the end."""
        self.levels = [level for table in tables for level in table]
        self._denoiser, self._tables = denoiser, tables

    @torch.no_grad()
    def states(self, noise: Tensor, text: Text, rng: np.random.Generator) -> list[Tensor]:
        """The latents at each of `levels`, from unit noise."""
        found: list[Tensor] = []
        for table in self._tables:
            x = first_latents(self._denoiser, noise, table[0])
            for level, following in zip(table, [*table[1:], 0.0], strict=True):
                found.append(x)
                if following:
                    clean = self.clean(x, torch.full((len(x),), level, device=x.device), text)
                    fresh = torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32)).to(x.device)
                    x = (1 - following) * clean + following * fresh
        return found

    def clean(self, x: Tensor, s: Tensor, text: Text) -> Tensor:
        """The clean estimate."""
        return x - _column(s) * self._denoiser(x, s, text)


def _repeated(text: Text, count: int) -> Text:
    return Text(text.states.expand(count, -1, -1), text.mask.expand(count, -1))


class AlignmentStage:
    """The loss of the claims, and that of the stage that the network was trained by, together.

    The states of a cycle are drawn by the network as it is when the cycle begins, so a run that is taken up in the
    middle of one draws them anew.
    """

    name = "alignment"

    def __init__(
        self,
        beside: Stage,
        way: GuidedWay | FewStepWay,
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
        """`beside` trains the network that `way` draws with; `batch_size` states are read in a step; latents are
        (B, *shape)."""
        self.modules: nn.Module = beside.modules
        self.hidden_matrices = beside.hidden_matrices
        self.learning_rate = learning_rate
        self._beside, self._way, self._captions = beside, way, captions
        self._reader = reader.eval().requires_grad_(False)
        self._shape, self._seed, self._device = shape, seed, device
        self._batch_size, self._weight = batch_size, weight
        self._states: tuple[Tensor, Tensor, Text, ClaimBatch] | None = None
        self.missed = float("nan")
        """The loss of the claims in the last step."""

    def loss(self, step: int) -> Tensor:
        """Loss of one batch."""
        if self._states is None or step % CYCLE == 0:
            self._states = self._draw(step_rng(self._seed, step - step % CYCLE, purpose=32))
        rows = torch.arange(step % CYCLE, CYCLE * self._batch_size, CYCLE, device=self._device)
        x, s, text, claims = self._states
        x, s, text, claims = x[rows], s[rows], text[rows], claims[rows]
        with autocast(self._device):
            reading = self._reader(self._way.clean(x, s, text))
        missed = claims_loss(reading, claims).mean()
        self.missed = float(missed.detach())
        return self._beside.loss(step) + self._weight * missed

    def _draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Text, ClaimBatch]:
        """States of the sampler on its way, of every trajectory one at each level, in a random order."""
        levels = self._way.levels
        count = -(-CYCLE * self._batch_size // len(levels))
        _, text, claims = self._captions.draw(count, rng)
        noise = torch.from_numpy(rng.standard_normal((count, *self._shape), dtype=np.float32)).to(self._device)
        with autocast(self._device):
            states = torch.cat(self._way.states(noise, text, rng))
        order = torch.from_numpy(rng.permutation(len(states))).to(self._device)
        prompt = order % count
        s = torch.tensor(levels, dtype=torch.float32, device=self._device)
        return states[order], s[order // count], text[prompt], claims[prompt]
