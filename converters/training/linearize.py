"""Softmax attention to another operator: weights inherited, each layer regressed, the whole distilled.

1. The teacher draws its own calibration latents (`calibration`).
2. Every new operator learns, by itself, the outputs of the attention that it replaces, on that attention's inputs
   (Grafting, "Exploring Diffusion Transformer Designs via Grafting", 2025, stage 1).
3. With "auto", layers are ranked by what replacing each alone does to the network's output, and as many are replaced
   as an error budget admits.
4. The student as a whole learns the teacher's outputs, noise and (where a network predicts it) variance (LiT,
   "Delving into a simple linear diffusion transformer for image generation", 2025, section 3.3). The latents are the
   teacher's own samples, so the loss against the noise itself would teach nothing that the teacher does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from edgedit.converters.training.calibration import Calibration
from edgedit.converters.training.denoisers import Denoiser, Text
from edgedit.converters.training.loop import autocast, step_rng
from edgedit.converters.training.operators import make_operator
from edgedit.converters.training.salience import salience
from edgedit.converters.training.trainable import attention_layers, follow_grid

__all__ = [
    "Batches",
    "DistillationStage",
    "LayerError",
    "RegressionStage",
    "layer_errors",
    "linear_student",
    "make_operators",
    "softmax_layers",
]

VARIANCE_WEIGHT = 0.1
"""Weight of the predicted variance against the predicted noise (LiT: 0.05 against 0.5)."""
EMPTY_SHARE = 0.1
"""Share of samples whose prompt is left out, so that guidance keeps what it subtracts; none for a model without it."""


def softmax_layers(transformer: Any) -> list[int]:
    """Indices of the blocks whose self-attention is softmax attention over all tokens."""
    attentions = [getattr(block, name) for block, name in attention_layers(transformer)]
    return [
        index
        for index, attention in enumerate(attentions)
        if isinstance(attention, Attention) and "Linear" not in type(attention.processor).__name__
    ]


def make_operators(transformer: Any, layers: Sequence[int], spec: Mapping[str, Any]) -> nn.ModuleDict:
    """An operator for each layer, on copies of that layer's projections, by the layer's number."""
    places = attention_layers(transformer)
    made = {}
    for layer in layers:
        block, name = places[layer]
        made[str(layer)] = make_operator(spec, copy.deepcopy(getattr(block, name)))
    return nn.ModuleDict(made)


def linear_student(transformer: Any, operators: Mapping[str, nn.Module], layers: Sequence[int]) -> Any:
    """A copy of the transformer with the operators of `layers` in place."""
    student = copy.deepcopy(transformer)
    places = attention_layers(student)
    for layer in layers:
        block, name = places[layer]
        setattr(block, name, copy.deepcopy(operators[str(layer)]))
    follow_grid(student)
    return student


@contextmanager
def _captured(transformer: Any, layers: Sequence[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of the self-attention of `layers` in the calls made inside."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    for layer, (block, name) in enumerate(attention_layers(transformer)):
        if layer in layers:

            def keep(module: nn.Module, inputs: Any, named: Any, output: Tensor, layer: int = layer) -> None:
                found[layer] = (inputs[0] if inputs else named["hidden_states"], output)

            handles.append(getattr(block, name).register_forward_hook(keep, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Batches:
    """The noisy latents of a step, the same for every stage that has the same purpose."""

    calibration: Calibration
    denoiser: Denoiser
    seed: int
    purpose: int
    batch_size: int
    device: torch.device

    def draw(self, step: int) -> tuple[Tensor, Tensor, Text, Tensor]:
        """Noisy latents (B, C, H, W), levels (B,), prompts, some of them empty, and the clean latents."""
        rng = step_rng(self.seed, step, purpose=self.purpose)
        chosen = rng.integers(len(self.calibration.latents), size=self.batch_size)
        clean, text = self.calibration.batch(chosen, self.device)
        noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32)).to(self.device)
        s = torch.from_numpy(self.denoiser.sample_levels(self.batch_size, rng)).float().to(self.device)
        share = EMPTY_SHARE if self.calibration.guidance_scale != 1 else 0.0
        left_out = torch.from_numpy(rng.random(self.batch_size) < share).to(self.device)
        empty = self.calibration.negative(self.batch_size, self.device)
        text = Text(
            torch.where(left_out[:, None, None], empty.states, text.states),
            torch.where(left_out[:, None], empty.mask, text.mask),
        )
        level = s.view(-1, 1, 1, 1)
        return (1 - level) * clean + level * noise, s, text, clean


class RegressionStage:
    """Every operator against the attention that it replaces, on the teacher's own activations."""

    name = "regression"

    def __init__(
        self,
        denoiser: Denoiser,
        operators: nn.ModuleDict,
        calibration: Calibration,
        *,
        seed: int,
        device: torch.device,
        batch_size: int,
        learning_rate: float = 1e-3,
    ) -> None:
        self.modules: nn.Module = operators
        self.learning_rate = learning_rate
        self.hidden_matrices = frozenset(n for n, p in operators.named_parameters() if p.ndim == 2)
        self._operators = {int(layer): module for layer, module in operators.items()}
        self._denoiser = denoiser
        self._batches = Batches(calibration, denoiser, seed, 12, batch_size, device)
        self._patch = int(denoiser.network.config.patch_size)
        self._device = device

    def loss(self, step: int) -> Tensor:
        """Mean over the layers of the squared error over the squared output."""
        return torch.stack(list(self.layer_losses(step).values())).mean()

    def layer_losses(self, step: int) -> dict[int, Tensor]:
        """The squared error of each layer over its squared output, on the batch of a step."""
        x, s, text, _ = self._batches.draw(step)
        with autocast(self._device):
            with torch.no_grad(), _captured(self._denoiser.network, list(self._operators)) as found:
                self._denoiser.output(x, s, text)
            losses = {}
            for layer, operator in self._operators.items():
                hidden_states, wanted = found[layer]
                operator.grid = (x.shape[-2] // self._patch, x.shape[-1] // self._patch)  # type: ignore[assignment]
                got = operator(hidden_states)
                wanted = wanted.float()
                losses[layer] = F.mse_loss(got.float(), wanted) / wanted.square().mean().clamp(min=1e-12)
        return losses


class DistillationStage:
    """The student's output against the teacher's."""

    name = "distillation"

    def __init__(
        self,
        teacher: Denoiser,
        student: Any,
        calibration: Calibration,
        *,
        seed: int,
        device: torch.device,
        batch_size: int,
        learning_rate: float = 2e-4,
    ) -> None:
        self.modules: nn.Module = student
        self.learning_rate = learning_rate
        self.hidden_matrices = frozenset(
            n for n, p in student.named_parameters() if p.ndim == 2 and "transformer_blocks" in n and "table" not in n
        )
        self._teacher, self._student = teacher, teacher.with_network(student)
        self._batches = Batches(calibration, teacher, seed, 13, batch_size, device)
        self._device = device

    def loss(self, step: int) -> Tensor:
        """Weighted mean squared error of the prediction, plus that of the predicted variance where there is one."""
        x, s, text, clean = self._batches.draw(step)
        with autocast(self._device):
            with torch.no_grad():
                wanted = self._teacher.output(x, s, text).float()
            got = self._student.output(x, s, text).float()
        channels = self._teacher.channels
        error = salience(clean) * (got - wanted).square()
        loss = error[:, :channels].mean()
        if wanted.shape[1] > channels:
            loss = loss + VARIANCE_WEIGHT * error[:, channels:].mean()
        return loss


@dataclass(frozen=True)
class LayerError:
    """What replacing a layer costs: relative L2 error of the network's output, `alone` and `together` with all layers
    ranked before it; whether it was `chosen`."""

    layer: int
    alone: float
    together: float
    chosen: bool


def _relative_error(
    teacher: Denoiser, student: Any, batches: Sequence[tuple[Tensor, Tensor, Text, Tensor]], wanted: Sequence[Tensor]
) -> float:
    other = teacher.with_network(student)
    error = size = 0.0
    with torch.no_grad():
        for (x, s, text, _), reference in zip(batches, wanted, strict=True):
            error += float((other(x, s, text) - reference).square().sum())
            size += float(reference.square().sum())
    return float(np.sqrt(error / size)) if size else 0.0


def layer_errors(
    teacher: Denoiser,
    operators: nn.ModuleDict,
    calibration: Calibration,
    *,
    max_error: float,
    seed: int,
    device: torch.device,
    batch_size: int,
    batch_count: int = 4,
    on_step: Callable[[int, int], None] | None = None,
) -> list[LayerError]:
    """Ranks layers by what replacing each alone costs, and takes as many in that order as keep within `max_error`."""
    source = Batches(calibration, teacher, seed, 14, batch_size, device)
    batches = [source.draw(step) for step in range(batch_count)]
    with torch.no_grad():
        wanted = [teacher(x, s, text) for x, s, text, _ in batches]
    layers = [int(layer) for layer in operators]

    def cost(replaced: Sequence[int]) -> float:
        student = linear_student(teacher.network, dict(operators.items()), replaced)
        return _relative_error(teacher, student, batches, wanted)

    alone = {}
    for index, layer in enumerate(layers):
        alone[layer] = cost([layer])
        if on_step is not None:
            on_step(index + 1, 2 * len(layers))
    ranked = sorted(layers, key=lambda layer: alone[layer])
    together = []
    for index in range(len(ranked)):
        together.append(cost(ranked[: index + 1]))
        if on_step is not None:
            on_step(len(layers) + index + 1, 2 * len(layers))
    taken = max((index + 1 for index, error in enumerate(together) if error <= max_error), default=0)
    return [LayerError(layer, alone[layer], together[i], i < taken) for i, layer in enumerate(ranked)]
