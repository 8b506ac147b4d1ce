"""Many steps to few: ways to train a student that draws in one to four steps, guidance included.

All work on the straight path of `denoisers`, so they serve flow and variance-preserving teachers alike. The teacher's
own samples stand in for data. All but "guidance" give a student that is used alike: at each level of a short table it
estimates the clean latents, x_0 = x - s v(x, s), and fresh noise leads to the next level.

* `GuidanceStage` ("guidance"): as many steps as before, each with one call and not two (Meng et al., "On Distillation
  of Guided Diffusion Models", 2023, section 3.1, for one scale).

* `ConsistencyStage` ("lcm"): two neighbouring points of the teacher's trajectory give the same x_0 (Luo et al., "Latent
  Consistency Models", 2023, algorithm 1; without the averaged target network, after Song and Dhariwal, "Improved
  Techniques for Training Consistency Models", 2023, section 3.2).
* `ContinuousStage` ("scm"): the same in the limit of no distance (Lu and Song, "Simplifying, Stabilizing and Scaling
  Continuous-Time Consistency Models", 2024, section 4), written on the straight path, where the tangent condition reads
  v = v_teacher - s dv/ds (Geng et al., "Mean Flows", 2025, equation 6, with r = 0). The derivative along the trajectory
  is a central difference in float32: forward-mode differentiation does not pass through fused attention.
* `MatchingStage` ("dmd"): the student's pictures are distributed as the teacher's, by the difference of two scores (Yin
  et al., "Improved Distribution Matching Distillation", 2024, section 4, without the discriminator), and its first step
  also regresses the teacher's trajectories (Yin et al., "One-step Diffusion with Distribution Matching Distillation",
  2023, section 3.3).
* `trajectory.TrajectoryStage` ("trajectory"): regression of the ends of the teacher's trajectories.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedit.converters.training.calibration import Calibration, noise_of_samples
from edgedit.converters.training.denoisers import Denoiser, Text, guided
from edgedit.converters.training.loop import autocast, step_rng

__all__ = [
    "HUBER",
    "ConsistencyStage",
    "ContinuousStage",
    "DistillationStage",
    "GuidanceStage",
    "MatchingStage",
    "first_latents",
]

TRAJECTORY_STEPS = 40
"""Points of the teacher's trajectory for "lcm" (its own 50 for Stable Diffusion; a straighter path needs fewer)."""
HUBER = 0.03
"""Below this root mean square error the consistency loss is quadratic, above it linear."""
DIFFERENCE = 0.005
"""Half the distance in s over which "scm" takes the derivative along the trajectory."""
TANGENT_WARM_UP = 1000
"""Steps over which the derivative comes in (section 4.1 of the sCM paper has 10,000 for 100,000)."""
TANGENT_NORM = 0.1
GENERATOR_EVERY = 5
"""Steps of the fake score for one of the student (DMD2, section 4.2)."""
PAIR_WEIGHT = 0.25


def _column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)


def first_latents(denoiser: Denoiser, noise: Tensor, level: float) -> Tensor:
    """Where drawing starts: unit noise in the model's own space, on the straight path at `level`."""
    if denoiser.schedule["path"] == "flow":
        return noise
    return noise * float(np.hypot(level, 1 - level))


def _hidden(network: nn.Module, prefix: str = "") -> set[str]:
    return {
        prefix + name
        for name, parameter in network.named_parameters()
        if parameter.ndim == 2 and "transformer_blocks" in name and "table" not in name
    }


class DistillationStage(ABC):
    """What the methods share; heirs say what the loss is.

    Args:
        teacher: the frozen teacher.
        student: a trainable transformer, at first with the teacher's weights.
        calibration: prompts and the teacher's samples.
        levels: the falling levels at which the student will be called, without the 0 at the end.
    """

    name = "distillation"

    def __init__(
        self,
        teacher: Denoiser,
        student: Any,
        calibration: Calibration,
        *,
        levels: Sequence[float],
        seed: int,
        device: torch.device,
        batch_size: int,
        learning_rate: float,
    ) -> None:
        self.modules: nn.Module = student
        self.hidden_matrices = frozenset(_hidden(student))
        self.learning_rate = learning_rate
        self.teacher, self.student = teacher, teacher.with_network(student)
        self.calibration, self.levels = calibration, list(levels)
        self.seed, self.device, self.batch_size = seed, device, batch_size
        # A model without classifier-free guidance has nothing to distil in.
        self.scale = calibration.guidance_scale

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of a step."""

    def guided(self, x: Tensor, s: Tensor, text: Text) -> Tensor:
        """The teacher's velocity under guidance."""
        with torch.no_grad(), autocast(self.device):
            return guided(self.teacher, x, s, text, self.calibration.negative(len(x), self.device), self.scale)

    def draw(self, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], Tensor, Text, Tensor]:
        """Which samples, their latents (B, C, H, W) and prompts, and fresh noise."""
        chosen = rng.integers(len(self.calibration.latents), size=self.batch_size)
        clean, text = self.calibration.batch(chosen, self.device)
        return chosen, clean, text, self.noise(rng, clean)

    def noise(self, rng: np.random.Generator, like: Tensor) -> Tensor:
        """Unit noise in the shape of `like`."""
        return torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype=np.float32)).to(self.device)

    def numbers(self, values: npt.NDArray[np.float64]) -> Tensor:
        """A float32 tensor on the device."""
        return torch.from_numpy(np.asarray(values, np.float32)).to(self.device)


class GuidanceStage(DistillationStage):
    """ "guidance"."""

    def __init__(self, *arguments: Any, learning_rate: float = 3e-4, **named: Any) -> None:
        super().__init__(*arguments, learning_rate=learning_rate, **named)

    def loss(self, step: int) -> Tensor:
        """Mean squared distance from the teacher's velocity under guidance, or from its noise where it predicts that.

        A velocity made of predicted noise is divided by 1 - s, which vanishes at the noisiest level.
        """
        rng = step_rng(self.seed, step, purpose=25)
        _, clean, text, noise = self.draw(rng)
        s = self.numbers(self.teacher.sample_levels(self.batch_size, rng))
        x = (1 - _column(s)) * clean + _column(s) * noise
        velocity = self.guided(x, s, text)
        with autocast(self.device):
            error = self.student(x, s, text) - velocity
        if self.teacher.prediction == "epsilon":
            error = error * _column(1 - s)
        return error.square().mean()


class ConsistencyStage(DistillationStage):
    """ "lcm"."""

    def __init__(self, *arguments: Any, learning_rate: float = 3e-4, **named: Any) -> None:
        super().__init__(*arguments, learning_rate=learning_rate, **named)
        self._grid = self.teacher.levels(TRAJECTORY_STEPS)

    def loss(self, step: int) -> Tensor:
        """Pseudo-Huber distance of the clean estimates at two neighbouring points."""
        rng = step_rng(self.seed, step, purpose=21)
        _, clean, text, noise = self.draw(rng)
        index = rng.integers(TRAJECTORY_STEPS, size=self.batch_size)
        s, then = self.numbers(self._grid[index]), self.numbers(self._grid[index + 1])
        x = (1 - _column(s)) * clean + _column(s) * noise
        velocity = self.guided(x, s, text)
        nearer = x + _column(then - s) * velocity
        with autocast(self.device):
            with torch.no_grad():
                # At the end of the trajectory the point itself is the clean estimate.
                wanted = nearer - _column(then) * self.student(nearer, then.clamp(min=1e-4), text)
            got = x - _column(s) * self.student(x, s, text)
        error = (got - wanted).square().mean((1, 2, 3))
        return ((error + HUBER**2).sqrt() - HUBER).mean()


class ContinuousStage(DistillationStage):
    """ "scm"."""

    def __init__(self, *arguments: Any, learning_rate: float = 2e-4, **named: Any) -> None:
        super().__init__(*arguments, learning_rate=learning_rate, **named)

    def loss(self, step: int) -> Tensor:
        """Squared distance of the velocity from its tangent target."""
        rng = step_rng(self.seed, step, purpose=22)
        _, clean, text, noise = self.draw(rng)
        s = self.numbers(self.teacher.sample_levels(self.batch_size, rng)).clamp(max=self.top - DIFFERENCE)
        x = (1 - _column(s)) * clean + _column(s) * noise
        velocity = self.guided(x, s, text)
        with torch.no_grad():
            before, after = (s + sign * DIFFERENCE for sign in (-1, 1))
            low = self.student(x - DIFFERENCE * velocity, before.clamp(min=0), text)
            high = self.student(x + DIFFERENCE * velocity, after, text)
            slope = (high - low) / _column(after - before.clamp(min=0))
        with autocast(self.device):
            got = self.student(x, s, text)
        share = min(1.0, step / TANGENT_WARM_UP)
        tangent = got.detach() - velocity + share * _column(s) * slope
        tangent = tangent / (tangent.square().mean((1, 2, 3), keepdim=True).sqrt() + TANGENT_NORM)
        return (got - got.detach() + tangent).square().mean()

    @property
    def top(self) -> float:
        """The noisiest level that the model knows."""
        return float(self.teacher.levels(1)[0])


class MatchingStage(DistillationStage):
    """ "dmd". `modules` holds the student and the fake score, which is thrown away at the end."""

    def __init__(self, *arguments: Any, learning_rate: float = 1e-4, **named: Any) -> None:
        super().__init__(*arguments, learning_rate=learning_rate, **named)
        student = self.student.network
        fake = copy.deepcopy(student).requires_grad_(True)
        self.modules = nn.ModuleDict({"student": student, "fake": fake})
        self.hidden_matrices = frozenset(_hidden(student, "student.") | _hidden(fake, "fake."))
        self._fake = self.teacher.with_network(fake)

    def loss(self, step: int) -> Tensor:
        """Flow-matching loss of the fake score, and every few steps the student's loss."""
        rng = step_rng(self.seed, step, purpose=23)
        chosen, like, text, noise = self.draw(rng)
        turn = step % GENERATOR_EVERY == 0
        count = int(rng.integers(len(self.levels)))
        with torch.set_grad_enabled(turn), autocast(self.device):
            drawn = self._simulate(noise, text, count, rng)
        loss = self._fake_loss(drawn.detach(), text, rng)
        if not turn:
            return loss
        loss = loss + self._matching_loss(drawn, text, rng)
        pairs = noise_of_samples(chosen, like.shape[1:], self.calibration).to(self.device)
        with autocast(self.device):
            return loss + PAIR_WEIGHT * F.mse_loss(self._clean(pairs, 0, text), like)

    def _clean(self, noise_or_latents: Tensor, index: int, text: Text) -> Tensor:
        """The student's clean estimate at level `index`; at the first level from unit noise."""
        level = self.levels[index]
        x = first_latents(self.teacher, noise_or_latents, level) if index == 0 else noise_or_latents
        s = torch.full((len(x),), level, device=self.device)
        return x - level * self.student(x, s, text)

    def _simulate(self, noise: Tensor, text: Text, count: int, rng: np.random.Generator) -> Tensor:
        """What the student draws at its level `count`, the levels before it drawn without gradient."""
        x = noise
        for index in range(count):
            with torch.no_grad():
                clean = self._clean(x, index, text)
            following = self.levels[index + 1]
            x = (1 - following) * clean + following * self.noise(rng, clean)
        return self._clean(x, count, text)

    def _noised(self, clean: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        s = self.numbers(self.teacher.sample_levels(len(clean), rng)).clamp(0.02, 0.98)
        noise = self.noise(rng, clean)
        return (1 - _column(s)) * clean + _column(s) * noise, s, noise

    def _fake_loss(self, drawn: Tensor, text: Text, rng: np.random.Generator) -> Tensor:
        x, s, noise = self._noised(drawn, rng)
        with autocast(self.device):
            output = self._fake.output(x, s, text)[:, : self.teacher.channels].float()
        return F.mse_loss(output, self._fake.target(drawn, noise, s))

    def _matching_loss(self, drawn: Tensor, text: Text, rng: np.random.Generator) -> Tensor:
        with torch.no_grad():
            x, s, _ = self._noised(drawn, rng)
            real = x - _column(s) * self.guided(x, s, text)
            with autocast(self.device):
                fake = x - _column(s) * self._fake(x, s, text)
            size = (drawn - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
            wanted = drawn - (fake - real) / size
        return 0.5 * F.mse_loss(drawn, wanted)
