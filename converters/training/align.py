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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
from edgedit.converters.training.claims_loss import claims_loss
from edgedit.converters.training.data import cache_latents, training_scenes
from edgedit.converters.training.denoisers import Denoiser
from edgedit.converters.training.jobs import pick_device, training_budget, weights_of
from edgedit.converters.training.latent_reader import LatentReader
from edgedit.converters.training.loop import Budget, Stage, run_stage
from edgedit.converters.training.teacher import PlainAttention, TeacherStage
from edgedit.converters.training.train import parse_budget
from edgedit.converters.training.trainable import Trainable, check_output, open_trainable, save_trainable
from edgedit.converters.training.trajectory import TrajectoryStage, sample_trajectories
from edgedit.converters.work_folder import WorkFolder
from edgedit.errors import EdgeditError, InputError

__all__ = ["align", "main"]

READER_STEPS = 600
BATCH = 32
MOST_MISSED = 0.5
"""Largest loss of the claims at which a trajectory's end is taken for right: one object too few costs 0.7."""


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def few_step_tables(schedule: dict[str, Any]) -> list[list[float]]:
    """The levels of each number of steps of a distilled model, [] for another."""
    return [list(map(float, table)) for table in schedule.get("sigmas") or []]


def _regression(
    teacher: Denoiser,
    student: Trainable,
    captions: SceneCaptions,
    reader: LatentReader,
    path: Path,
    *,
    shape: tuple[int, int, int],
    count: int,
    seed: int,
    device: torch.device,
) -> TrajectoryStage:
    """Regression of those of the teacher's trajectories that end in what their captions claim.

    The trajectories are read from `path` when it is there.
    """
    levels = few_step_tables(student.schedule)[0]
    text, claims = captions.one_each(count, seed)
    data = Calibration(text, captions.embed([""]), np.empty((0, *shape), np.float16), GUIDANCE_SCALE, seed, BATCH)
    if not path.exists():
        points = sample_trajectories(
            teacher,
            data,
            steps=len(levels),
            shape=shape,
            count=count,
            device=device,
            on_step=lambda done, total: _say(f"trajectories: {done} of {total}") if done % 512 == 0 else None,
        )
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, points)
        temporary.replace(path)
    points = np.load(path)
    ends = torch.from_numpy(points[:, -1].astype(np.float32)).to(device)
    with torch.no_grad():
        rows = [torch.arange(first, min(first + BATCH, count), device=device) for first in range(0, count, BATCH)]
        missed = torch.cat([claims_loss(reader(ends[some]), claims[some]) for some in rows])
    right = torch.nonzero(missed < MOST_MISSED)[:, 0].cpu().numpy()
    _say(f"trajectories: {len(right)} of {count} hold their captions")
    return TrajectoryStage(
        teacher,
        student.transformer,
        replace(data, latents=points[:, -1], states=points[:, :-1]),
        chosen=right if len(right) else None,
        levels=levels,
        seed=seed,
        device=device,
        batch_size=BATCH,
    )


def _open_teacher(folder: str | Path, device: torch.device) -> Denoiser:
    teacher = open_trainable(folder)
    teacher.transformer.set_attn_processor(PlainAttention())
    teacher.transformer.to(device).eval().requires_grad_(False)
    return teacher.denoiser()


def align(
    source: str | Path,
    output: str | Path,
    *,
    teacher: str | Path | None = None,
    budget: float | None = None,
    train_steps: int | None = None,
    reader_steps: int = READER_STEPS,
    scene_count: int = 16_000,
    trajectories: int = 3072,
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
        trajectories: that the teacher draws for a distilled model.

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
    if teacher is None:
        many_steps = denoiser.with_network(copy.deepcopy(network).eval().requires_grad_(False))
    else:
        many_steps = _open_teacher(teacher, place)
    reading = ReaderStage(many_steps, latents, captions, seed=seed, device=place)
    learnt = run_stage(reading, work.folder, Budget(steps=reader_steps), log=_say, warm_up=50, decay_share=0.5)
    reading.reader.load_state_dict(learnt)
    beside: Stage
    way: GuidedWay | FewStepWay
    if teacher is not None:
        beside = _regression(
            many_steps,
            trainable,
            captions,
            reading.reader.eval(),
            work.folder / "trajectories.npy",
            shape=latents.shape[1:],
            count=trajectories,
            seed=seed,
            device=place,
        )
        way = FewStepWay(denoiser, tables)
    else:
        beside = TeacherStage(
            latents,
            scenes,
            encoder,
            seed=seed + 1,
            device=place,
            batch_size=BATCH,
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
    parser.add_argument("--trajectories", type=int, default=3072, help="that the teacher draws for a distilled model")
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
            trajectories=options.trajectories,
            learning_rate=options.learning_rate,
            seed=options.seed,
            device=options.device,
        )
    except EdgeditError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
