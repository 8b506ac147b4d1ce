"""`linearize`: from a checkpoint with softmax attention to one with another operator, in one resumable call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgedit.converters.training.calibration import read_prompts
from edgedit.converters.training.jobs import (
    default_guidance,
    latent_shape,
    pick_device,
    run_training,
    training_budget,
    weights_of,
)
from edgedit.converters.training.linearize import (
    DistillationStage,
    LayerError,
    RegressionStage,
    layer_errors,
    linear_student,
    make_operators,
    softmax_layers,
)
from edgedit.converters.training.loop import Budget
from edgedit.converters.training.operators import parse_operator
from edgedit.converters.training.teacher import PlainAttention
from edgedit.converters.training.trainable import check_output, open_trainable, save_trainable
from edgedit.converters.training.workspace import OnProgress, Workspace, digest
from edgedit.errors import InputError

__all__ = ["LinearizationReport", "linearize"]

REGRESSION_SHARE = 0.35
"""Part of the time left after calibration that the regression of the layers gets."""


@dataclass(frozen=True)
class LinearizationReport:
    """What `linearize` did.

    Attributes:
        output: the new checkpoint.
        attention: the objects that name the operators, as in `edgedit.json`.
        layers: the ranking that "auto" chose from, [] otherwise.
        losses: first and last loss of each stage.
        seconds: time of this call.
    """

    output: Path
    attention: list[dict[str, Any]]
    layers: list[LayerError]
    losses: dict[str, tuple[float, float]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "output": str(self.output)}


def _layers(text: str, available: Sequence[int]) -> list[int]:
    """The layers that --layers names among those that have softmax attention."""
    if text in ("all", "auto"):
        return list(available)
    if text == "none":
        return []
    try:
        wanted = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise InputError(f"--layers {text!r} is not all, auto, none or a list such as 0,2,5") from None
    for layer in wanted:
        if layer not in available:
            raise InputError(f"layer {layer} has no softmax self-attention; choose from {_ranges(available)}")
    return wanted


def _ranges(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def linearize(
    source: str | Path,
    output: str | Path,
    *,
    attention: str = "lit",
    heads: int | None = None,
    layers: str = "all",
    calibration: str = "self",
    budget: float | None = None,
    steps: int | None = None,
    max_error: float = 0.1,
    samples: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress | None = None,
    stop_after: tuple[str, int] | None = None,
) -> LinearizationReport:
    """Replace softmax self-attention and train the new operators to do what it did.

    Call it again with the same arguments after an interruption and it goes on.

    Args:
        source: a pipeline folder with a transformer of the PixArt class.
        output: the checkpoint to make: a pipeline folder with `edgedit.json`, and `loss.png`.
        attention: "lit", "relu", "clear:RADIUS", "clear:RADIUS:POOL" or "kv:FACTOR".
        heads: heads of lit and relu; a quarter of the checkpoint's by default.
        layers: "all", "auto" (as many as `max_error` admits), "none", or numbers such as "0,2,5".
        calibration: a text file of prompts, one a line, or "self".
        budget: seconds of training in all; half an hour by default.
        steps: training steps of each stage instead, for a result that does not depend on the machine's speed.
        max_error: for "auto": relative L2 error of the velocity that replacing layers may cost before distillation.
        samples: latents that the teacher draws to be calibrated on; four for each prompt, 64 to 2048, by default.
        guidance_scale: guidance of these samples; the checkpoint's recommendation by default.
        batch_size: latents in a step.
        stop_after: leave at this step of this stage as if interrupted, for tests.

    Raises:
        CheckpointError: the source is missing, damaged or no pipeline.
        InputError: an option without sense, or a loss that is not a number.
        ConversionError: the output exists or cannot be written.
    """
    began = time.monotonic()
    limit = training_budget(budget, steps)
    target = Path(output)
    check_output(target)
    trainable = open_trainable(source)
    available = softmax_layers(trainable.transformer)
    if not available:
        raise InputError(f"{source} has no layer with softmax self-attention; there is nothing to linearize")
    config_heads = int(trainable.transformer.config.num_attention_heads)
    spec = parse_operator(attention, heads=config_heads, linear_heads=heads)
    wanted = _layers(layers, available)
    if not wanted:
        save_trainable(trainable, target, weights=None, settings={})
        return LinearizationReport(target, [*trainable.attention], [], {}, time.monotonic() - began)
    prompts = read_prompts(calibration, trainable.path)
    count = samples if samples is not None else max(64, min(2048, 4 * len(prompts)))
    scale = default_guidance(trainable) if guidance_scale is None else guidance_scale
    work = Workspace(
        target,
        {
            "source": str(trainable.path.resolve()),
            "spec": spec,
            "layers": layers,
            "prompts": digest("\n".join(prompts)),
            "budget": [limit.seconds, limit.steps],
            "max_error": max_error,
            "samples": [count, scale, batch_size],
            "seed": seed,
        },
    )
    place = pick_device(device)
    trainable.transformer.to(place).eval().requires_grad_(False)
    if place.type == "cpu":
        trainable.transformer.set_attn_processor(PlainAttention())
    teacher = trainable.denoiser()
    data = work.calibration(
        trainable.path,
        teacher,
        prompts,
        count=count,
        shape=latent_shape(trainable),
        guidance_scale=scale,
        seed=seed,
        device=place,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    operators = make_operators(trainable.transformer, wanted, spec).to(place).requires_grad_(True)
    regression = RegressionStage(teacher, operators, data, seed=seed, device=place, batch_size=batch_size)
    stops = dict([stop_after]) if stop_after is not None else {}
    averaged = run_training(regression, work, _share(limit, REGRESSION_SHARE), on_progress, stops.get("regression"))
    operators.load_state_dict(averaged)
    ranking: list[LayerError] = []
    if layers == "auto":
        ranking = layer_errors(
            teacher,
            operators.eval(),
            data,
            max_error=max_error,
            seed=seed,
            device=place,
            batch_size=batch_size,
            on_step=None if on_progress is None else lambda done, total: on_progress("rank layers", done, total, {}),
        )
        wanted = sorted(row.layer for row in ranking if row.chosen)
        if not wanted:
            best = min(row.alone for row in ranking)
            raise InputError(
                f"no layer keeps within --max-error {max_error}: the best alone costs {best:.3f}; "
                "give more --budget or a larger --max-error"
            )
    student = linear_student(trainable.transformer, dict(operators.items()), wanted).requires_grad_(True)
    distillation = DistillationStage(teacher, student, data, seed=seed, device=place, batch_size=batch_size)
    averaged = run_training(
        distillation, work, _share(limit, 1 - REGRESSION_SHARE), on_progress, stops.get("distillation")
    )
    specs = [*trainable.attention, {**spec, "layers": wanted}]
    plot = work.plot("loss.png")
    save_trainable(
        trainable,
        target,
        weights=weights_of(student, averaged),
        settings={**trainable.settings, "attention": specs},
        extra={} if plot is None else {"loss.png": plot},
    )
    losses = work.first_and_last()
    work.remove()
    return LinearizationReport(target, specs, ranking, losses, time.monotonic() - began)


def _share(budget: Budget, share: float) -> Budget:
    """A stage's part of a time; a number of steps is each stage's own."""
    return budget if budget.seconds is None else Budget(seconds=share * budget.seconds)
