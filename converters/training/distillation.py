"""`distill`: from a checkpoint to one that draws in few steps, or in steps of half the work, in one resumable call."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgedit.converters.training.calibration import read_prompts
from edgedit.converters.training.denoisers import Denoiser
from edgedit.converters.training.distill import (
    ConsistencyStage,
    ContinuousStage,
    DistillationStage,
    GuidanceStage,
    MatchingStage,
)
from edgedit.converters.training.jobs import (
    default_guidance,
    latent_shape,
    pick_device,
    run_training,
    training_budget,
    weights_of,
)
from edgedit.converters.training.teacher import PlainAttention
from edgedit.converters.training.trainable import Trainable, check_output, open_trainable, save_trainable
from edgedit.converters.training.trajectory import TrajectoryStage
from edgedit.converters.training.workspace import OnProgress, Workspace, digest
from edgedit.errors import InputError

__all__ = ["METHODS", "STEP_COUNTS", "DistillationReport", "distill", "few_step_schedule"]

STEP_COUNTS = (1, 2, 4)
METHODS: Mapping[str, Callable[..., DistillationStage]] = {
    "lcm": ConsistencyStage,
    "scm": ContinuousStage,
    "dmd": MatchingStage,
    "trajectory": TrajectoryStage,
    "guidance": GuidanceStage,
}
"""Methods by the command line's names."""


@dataclass(frozen=True)
class DistillationReport:
    """What `distill` did.

    Attributes:
        output: the new checkpoint.
        method, steps, guidance_scale: as trained.
        schedule: the manifest's schedule object that it is drawn with.
        losses: first and last loss.
        seconds: time of this call.
    """

    output: Path
    method: str
    steps: int
    guidance_scale: float
    schedule: dict[str, Any]
    losses: dict[str, tuple[float, float]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "output": str(self.output)}


def few_step_schedule(teacher: Denoiser, method: str, steps: int, shift: float | None = None) -> dict[str, Any]:
    """The schedule object of a distilled model: the teacher's path, and a table of levels for each number of steps.

    Consistency models are called anywhere on the trajectory, and "trajectory" at levels that those of fewer steps are
    among, so fewer steps work too; "dmd" is trained for its own number alone.
    """
    counts = [steps] if method == "dmd" else [count for count in reversed(STEP_COUNTS) if count <= steps]
    kept = {
        key: value
        for key, value in teacher.schedule.items()
        if key in ("path", "prediction", "num_train_timesteps") or (key in _BETAS and teacher.schedule["path"] == "vp")
    }
    tables: list[list[float]] = []
    for count in counts:
        levels = teacher.levels(count, shift)[:-1]
        if kept["path"] == "flow":
            tables.append([float(level) for level in levels])
        else:
            tables.append([float(round(float(t))) for t in teacher.timestep(torch.tensor(levels))])
    return {**kept, "sampler": "dmd", ("sigmas" if kept["path"] == "flow" else "timesteps"): tables}


_BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")


def distill(
    source: str | Path,
    output: str | Path,
    *,
    method: str = "lcm",
    steps: int | None = None,
    teacher: str | Path | None = None,
    calibration: str = "self",
    budget: float | None = None,
    train_steps: int | None = None,
    samples: int | None = None,
    guidance_scale: float | None = None,
    learning_rate: float | None = None,
    sigma_shift: float | None = None,
    keep_right: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress | None = None,
    stop_after: int | None = None,
) -> DistillationReport:
    """Train a student that draws in `steps` steps what the checkpoint draws in many, guidance distilled in.

    Call it again with the same arguments after an interruption and it goes on.

    Args:
        source: a pipeline folder, also one that `linearize` made.
        output: the checkpoint to make: a pipeline folder whose `edgedit.json` states the schedule, and `loss.png`.
        method: a key of `METHODS` (see `distill`).
        steps: 1, 2 or 4 (the default); with "guidance" any number to recommend, by default the checkpoint's own.
        teacher: another pipeline folder of the same latents and text encoder to learn from, such as the one that the
            source was linearized from; the source itself by default.
        calibration: a text file of prompts, one a line, or "self".
        budget: seconds of training; half an hour by default.
        train_steps: training steps instead, for a result that does not depend on the machine's speed.
        samples: latents that the teacher draws to learn from; four for each prompt, 64 to 2048, by default.
        guidance_scale: the teacher's guidance; the checkpoint's recommendation by default.
        learning_rate: the method's own by default.
        sigma_shift: of the student's levels, on the flow path; the checkpoint's own by default.
        keep_right: learn only from pictures that show what their prompts say ("trajectory", and the embedded model's
            own prompts).
        batch_size: latents in a step.
        stop_after: leave at this step as if interrupted, for tests.

    Raises:
        CheckpointError: the source is missing, damaged or no pipeline.
        InputError: an option without sense, or a loss that is not a number.
        ConversionError: the output exists or cannot be written.
    """
    began = time.monotonic()
    limit = training_budget(budget, train_steps)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    if keep_right and method != "trajectory":
        raise InputError(f"--keep-right does nothing for --method {method}; leave it out, or choose trajectory")
    target = Path(output)
    check_output(target)
    trainable = open_trainable(source)
    guide = trainable if teacher is None else _open_teacher(teacher, trainable)
    prompts = read_prompts(calibration, trainable.path)
    count = samples if samples is not None else max(64, min(2048, 4 * len(prompts)))
    scale = default_guidance(guide) if guidance_scale is None else guidance_scale
    steps = _steps(steps, method, trainable)
    if method == "guidance" and (scale <= 1 or sigma_shift is not None):
        raise InputError(
            "--method guidance learns guidance and keeps the checkpoint's schedule; "
            + ("give a --guidance above 1" if scale <= 1 else "leave --sigma-shift out")
        )
    work = Workspace(
        target,
        {
            "source": str(trainable.path.resolve()),
            "teacher": str(guide.path.resolve()),
            "method": [method, steps, learning_rate, sigma_shift, keep_right],
            "prompts": digest("\n".join(prompts)),
            "budget": [limit.seconds, limit.steps],
            "samples": [count, scale, batch_size],
            "seed": seed,
        },
    )
    place = pick_device(device)
    for network in {id(each): each.transformer for each in (trainable, guide)}.values():
        network.to(place).eval().requires_grad_(False)
        if place.type == "cpu":
            network.set_attn_processor(PlainAttention())
    denoiser = guide.denoiser()
    levels = [float(level) for level in denoiser.levels(steps, sigma_shift)[:-1]]
    data = work.calibration(
        guide.path,
        denoiser,
        prompts,
        count=count,
        shape=latent_shape(trainable),
        guidance_scale=scale,
        seed=seed,
        device=place,
        batch_size=batch_size,
        levels=levels if method == "trajectory" else None,
        from_noise_alone=method == "dmd",
        keep_right=keep_right,
        on_progress=on_progress,
    )
    student = copy.deepcopy(trainable.transformer).requires_grad_(True)
    options: dict[str, Any] = {} if learning_rate is None else {"learning_rate": learning_rate}
    stage = METHODS[method](
        denoiser,
        student,
        data,
        levels=levels,
        seed=seed,
        device=place,
        batch_size=batch_size,
        **options,
    )
    averaged = run_training(stage, work, limit, on_progress, stop_after)
    schedule = trainable.schedule if method == "guidance" else few_step_schedule(denoiser, method, steps, sigma_shift)
    plot = work.plot("loss.png")
    save_trainable(
        trainable,
        target,
        weights=weights_of(student, _student_weights(averaged, method)),
        settings=_settings(trainable.settings, schedule, steps),
        extra={} if plot is None else {"loss.png": plot},
    )
    losses = work.first_and_last()
    work.remove()
    return DistillationReport(target, method, steps, scale, schedule, losses, time.monotonic() - began)


def _steps(steps: int | None, method: str, trainable: Trainable) -> int:
    """Raises InputError for a number that the method cannot have."""
    if method == "guidance":
        steps = int(trainable.settings.get("recommended", {}).get("steps", 20)) if steps is None else steps
        if steps < 1:
            raise InputError(f"--steps {steps} is not possible; give 1 or more")
        return steps
    steps = 4 if steps is None else steps
    if steps not in STEP_COUNTS:
        raise InputError(f"--steps {steps} is not possible; choose {', '.join(map(str, STEP_COUNTS))}")
    return steps


def _open_teacher(teacher: str | Path, student: Trainable) -> Trainable:
    """Raises InputError when it draws or reads something else than the student."""
    opened = open_trainable(teacher)
    given, wanted = (
        {
            "latents": latent_shape(each),
            "path": each.schedule["path"],
            "prediction": each.schedule["prediction"],
            "width of the prompt": each.transformer.config.caption_channels,
        }
        for each in (opened, student)
    )
    for name, value in given.items():
        if value != wanted[name]:
            raise InputError(
                f"--teacher {teacher} has another {name} ({value}) than the student ({wanted[name]}); "
                "give the checkpoint that the student was made from, or leave it out"
            )
    return opened


def _student_weights(averaged: Mapping[str, torch.Tensor], method: str) -> dict[str, torch.Tensor]:
    if method != "dmd":
        return dict(averaged)
    return {name.removeprefix("student."): value for name, value in averaged.items() if name.startswith("student.")}


def _settings(settings: Mapping[str, Any], schedule: Mapping[str, Any], steps: int) -> dict[str, Any]:
    recommended = {key: value for key, value in settings.get("recommended", {}).items() if key == "sizes"}
    return {
        **settings,
        "schedule": dict(schedule),
        "guidance": {"kind": "none"},
        "recommended": {**recommended, "steps": steps},
    }
