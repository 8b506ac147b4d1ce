"""Trains a model of scenes on, towards what captions claim.

    python -m edgedit.converters.training.align SOURCE -o OUTPUT

SOURCE is a pipeline folder of the embedded model's world: many-step or distilled, with softmax or linear attention. The
result is again such a folder. Start the same command again after an interruption and it goes on.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from transformers import T5EncoderModel

from edgedit.converters.training.alignment import (
    GUIDANCE_SCALE,
    AlignmentStage,
    FewStepWay,
    GuidedWay,
    ReaderStage,
    SceneCaptions,
)
from edgedit.converters.training.calibration import Calibration
from edgedit.converters.training.data import cache_latents, training_scenes
from edgedit.converters.training.distill import ConsistencyStage
from edgedit.converters.training.jobs import pick_device, training_budget, weights_of
from edgedit.converters.training.loop import Budget, Stage, run_stage
from edgedit.converters.training.teacher import PlainAttention, TeacherStage
from edgedit.converters.training.train import parse_budget
from edgedit.converters.training.trainable import Trainable, check_output, open_trainable, save_trainable
from edgedit.converters.work_folder import WorkFolder
from edgedit.errors import EdgeditError, InputError

__all__ = ["align", "main"]

READER_STEPS = 600
FLOW_BATCH = 32


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def few_step_tables(schedule: dict[str, Any]) -> list[list[float]]:
    """The levels of each number of steps of a distilled model, [] for another."""
    return [list(map(float, table)) for table in schedule.get("sigmas") or []]


def _consistency(
    teacher: str | Path,
    student: Trainable,
    latents: npt.NDArray[np.float16],
    captions: SceneCaptions,
    *,
    seed: int,
    device: torch.device,
) -> ConsistencyStage:
    """What a distilled model was trained by, with rendered scenes in the place of the teacher's samples."""
    trainable = open_trainable(teacher)
    trainable.transformer.set_attn_processor(PlainAttention())
    trainable.transformer.to(device).eval().requires_grad_(False)
    data = Calibration(captions.one_each(seed), captions.embed([""]), latents, GUIDANCE_SCALE, seed, FLOW_BATCH)
    return ConsistencyStage(
        trainable.denoiser(),
        student.transformer,
        data,
        levels=few_step_tables(student.schedule)[0],
        seed=seed,
        device=device,
        batch_size=FLOW_BATCH,
    )


def align(
    source: str | Path,
    output: str | Path,
    *,
    teacher: str | Path | None = None,
    budget: float | None = None,
    train_steps: int | None = None,
    reader_steps: int = READER_STEPS,
    scene_count: int = 16_000,
    learning_rate: float = 2e-4,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Train on along the model's own way from noise (`alignment`).

    Args:
        source: a pipeline folder of scenes.
        output: the folder to make.
        teacher: for a distilled model, the folder that it was distilled from.
        budget: seconds of training.
        train_steps: training steps instead.
        reader_steps: training steps of the latent reader before it.
        scene_count: rendered scenes to train on.

    Raises:
        CheckpointError: the source is missing or damaged.
        InputError: a distilled model without its teacher, or a loss that is not a number.
        ConversionError: the output exists or cannot be written.
    """
    limit = training_budget(budget, train_steps)
    target = Path(output)
    check_output(target)
    trainable = open_trainable(source)
    tables = few_step_tables(trainable.schedule)
    if bool(tables) != (teacher is not None):
        raise InputError(
            f"{source} is a distilled model; give the one that it was distilled from with --teacher"
            if tables
            else f"{source} draws in many steps and has no teacher; leave --teacher out"
        )
    options = {"source": str(trainable.path.resolve()), "scenes": scene_count, "seed": seed}
    work = WorkFolder(target, {**options, "budget": [limit.seconds, limit.steps]})
    place = pick_device(device)
    scenes = training_scenes(scene_count, seed=seed)
    autoencoder = AutoencoderKL.from_pretrained(trainable.path / "vae", torch_dtype=torch.float32).eval()
    autoencoder.to(place, memory_format=torch.channels_last)
    latents = cache_latents(autoencoder, scenes, work.folder / "latents.npy", log=_say)
    encoder = T5EncoderModel.from_pretrained(trainable.path / "text_encoder", torch_dtype=torch.float32)
    captions = SceneCaptions(scenes, encoder, place)
    network = trainable.transformer.to(place)
    network.set_attn_processor(PlainAttention())
    denoiser = trainable.denoiser()
    frozen = denoiser.with_network(copy.deepcopy(network).eval().requires_grad_(False))
    reading = ReaderStage(frozen, latents, captions, seed=seed, device=place)
    learnt = run_stage(reading, work.folder, Budget(steps=reader_steps), log=_say, warm_up=50, decay_share=0.5)
    reading.reader.load_state_dict(learnt)
    beside: Stage
    way: GuidedWay | FewStepWay
    if teacher is not None:
        beside = _consistency(teacher, trainable, latents, captions, seed=seed, device=place)
        way = FewStepWay(denoiser, tables)
    else:
        beside = TeacherStage(
            latents,
            scenes,
            encoder,
            seed=seed + 1,
            device=place,
            batch_size=FLOW_BATCH,
            layout_weight=0,
            compiled=False,
            transformer=network,
        )
        way = GuidedWay(denoiser, captions.embed([""]))
    stage = AlignmentStage(
        beside,
        way,
        reading.reader,
        captions,
        shape=latents.shape[1:],
        seed=seed,
        device=place,
        learning_rate=learning_rate,
    )

    def log(line: str) -> None:
        _say(f"{line} missed {stage.missed:.3f}")

    averaged = run_stage(stage, work.folder, limit, log=log, log_every=20, warm_up=30, decay_share=0.4, ema_decay=0.99)
    prefix = "" if teacher is not None else "transformer."
    weights = {name.removeprefix(prefix): value for name, value in averaged.items() if name.startswith(prefix)}
    save_trainable(trainable, target, weights=weights_of(network, weights), settings=trainable.settings)
    work.remove()
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m edgedit.converters.training.align", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="for a distilled model: what it was distilled from")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--budget", type=parse_budget, default=None, help="training time, such as 40m")
    length.add_argument("--steps", type=int, default=None, help="training steps instead")
    parser.add_argument("--scenes", type=int, default=16_000, help="rendered scenes to train on")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    try:
        align(
            options.source,
            options.output,
            teacher=options.teacher,
            budget=options.budget,
            train_steps=options.steps,
            scene_count=options.scenes,
            learning_rate=options.learning_rate,
            seed=options.seed,
            device=options.device,
        )
    except EdgeditError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
