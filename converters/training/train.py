"""Trains the embedded model: `python -m edgedit.converters.training.train -o RUNDIR`.

Stages: the autoencoder, its decoder alone on cached latents, the text encoder, then the transformer behind it on the
same latents. Start the same command again after an interruption and it goes on from the last checkpoint. With
`--from FOLDER` the transformer of a pipeline is trained on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel

from edgedit.converters.training.autoencoder import AutoencoderStage, encode_mean, pictures_to_tensor, standardise
from edgedit.converters.training.data import cache_latents, training_scenes
from edgedit.converters.training.decoder import DecoderStage
from edgedit.converters.training.export import (
    TRANSFORMER,
    export_pipeline,
    load_autoencoder,
    load_text_encoder,
)
from edgedit.converters.training.loop import Budget, load_file, run_stage, save_file, step_rng
from edgedit.converters.training.teacher import SIGMA_SHIFT, TeacherStage
from edgedit.converters.training.text_encoder import TextStage
from edgedit.converters.training.world import Scene, render, sample_scene

__all__ = [
    "begin_from",
    "main",
    "mean_with",
    "parse_budget",
    "save_transformer",
    "train_autoencoder",
    "train_decoder",
    "train_text_encoder",
    "train_transformer",
]

DEFAULT_BUDGET = 6000.0
"""Seconds."""
SHARES = {"autoencoder": 0.25, "decoder": 0.1, "text_encoder": 0.03, "transformer": 0.62}
"""Parts of the budget when all stages run."""

TrainingSet: TypeAlias = tuple[AutoencoderKL, npt.NDArray[np.float16], list[Scene]]


def parse_budget(text: str) -> float:
    """Seconds in "90s", "100m", "2h" or "1.5h"."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        return float(text[:-1]) * units[text[-1:]]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write 90s, 100m or 2h") from None


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def train_autoencoder(run_dir: Path, budget: Budget, *, seed: int, device: torch.device) -> None:
    """Trains the autoencoder and writes its averaged, standardised weights to `autoencoder-final.pt`."""
    stage = AutoencoderStage(seed=seed, device=device)
    averaged = run_stage(stage, run_dir, budget, log=_say, save_every=60, decay_share=0.5)
    autoencoder = stage.autoencoder
    autoencoder.load_state_dict(averaged)
    autoencoder.eval()
    rng = step_rng(seed, 0, purpose=4)
    typical = [pictures_to_tensor([render(sample_scene(rng)) for _ in range(32)]) for _ in range(32)]
    standardise(autoencoder, torch.cat([encode_mean(autoencoder, pictures) for pictures in typical]))
    save_file({"averaged": autoencoder.state_dict()}, run_dir / "autoencoder-final.pt")


def _training_set(run_dir: Path, *, seed: int, count: int, device: torch.device) -> TrainingSet:
    """Scenes, their cached latents, and the autoencoder that made them."""
    _say(f"sampling {count} scenes")
    scenes = training_scenes(count, seed=seed)
    autoencoder = load_autoencoder(run_dir / "autoencoder-final.pt")
    autoencoder.to(device, memory_format=torch.channels_last)
    return autoencoder, cache_latents(autoencoder, scenes, run_dir / f"latents-{seed}-{count}.npy", log=_say), scenes


def train_decoder(run_dir: Path, budget: Budget, *, seed: int, device: torch.device, scene_count: int) -> None:
    """Trains the decoder on with the encoder frozen, and replaces `autoencoder-final.pt`."""
    autoencoder, latents, scenes = _training_set(run_dir, seed=seed, count=scene_count, device=device)
    stage = DecoderStage(autoencoder, latents, scenes, seed=seed, device=device)
    averaged = run_stage(stage, run_dir, budget, log=_say, save_every=60, decay_share=0.6)
    stage.modules.load_state_dict(averaged)
    save_file({"averaged": autoencoder.state_dict()}, run_dir / "autoencoder-final.pt")


def train_text_encoder(run_dir: Path, budget: Budget, *, seed: int, device: torch.device, scene_count: int) -> None:
    """Trains the text encoder and writes its averaged weights to `text-encoder-final.pt`."""
    stage = TextStage(training_scenes(scene_count, seed=seed), seed=seed, device=device)
    averaged = run_stage(stage, run_dir, budget, log=_say, save_every=60, warm_up=50, decay_share=0.4)
    prefix = "text_encoder."
    weights = {name.removeprefix(prefix): value for name, value in averaged.items() if name.startswith(prefix)}
    save_file({"averaged": weights}, run_dir / "text-encoder-final.pt")


def begin_from(folder: Path, run_dir: Path) -> None:
    """Puts a pipeline folder's autoencoder and text encoder where the transformer's training looks for them."""
    for name, build, path in (
        ("vae", AutoencoderKL, "autoencoder-final.pt"),
        ("text_encoder", T5EncoderModel, "text-encoder-final.pt"),
    ):
        if not (run_dir / path).exists():
            module = build.from_pretrained(folder / name, torch_dtype=torch.float32)
            save_file({"averaged": module.state_dict()}, run_dir / path)


def _load_transformer(folder: Path) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)


def train_transformer(
    run_dir: Path,
    budget: Budget,
    *,
    seed: int,
    device: torch.device,
    scene_count: int,
    batch_size: int,
    compiled: bool,
    source: Path | None = None,
    guide: Path | None = None,
    **options: Any,
) -> None:
    """Trains the transformer on cached latents and the finished text encoder, from the weights of `source` if any.

    `guide` is the pipeline folder of a `TeacherStage`'s guide, `options` are others of that class.
    """
    begin = None
    if source is not None:
        begin_from(source, run_dir)
        begin = _load_transformer(source)
    _, latents, scenes = _training_set(run_dir, seed=seed, count=scene_count, device=device)
    text_encoder = load_text_encoder(run_dir / "text-encoder-final.pt")
    stage = TeacherStage(
        latents,
        scenes,
        text_encoder,
        seed=seed,
        device=device,
        batch_size=batch_size,
        compiled=compiled,
        transformer=begin,
        guide=None if guide is None else _load_transformer(guide),
        **options,
    )
    averaged = run_stage(stage, run_dir, budget, log=_say, log_every=100, save_every=100)
    save_transformer(averaged, run_dir / TRANSFORMER)


def save_transformer(averaged: Mapping[str, Tensor], path: Path) -> None:
    """Writes the transformer's part of a stage's averaged weights."""
    prefix = "transformer."
    weights = {name.removeprefix(prefix): value for name, value in averaged.items() if name.startswith(prefix)}
    save_file({"averaged": weights}, path)


def mean_with(folder: Path, path: Path) -> None:
    """Replaces a run's averaged transformer by its mean with that of a pipeline folder.

    Two ends of training that began alike draw better together than apart (Wortsman et al., "Model soups", 2022).
    """
    weights: dict[str, Tensor] = load_file(path)["averaged"]
    others = _load_transformer(folder).state_dict()
    save_file({"averaged": {name: (value + others[name]) / 2 for name, value in weights.items()}}, path)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m edgedit.converters.training.train", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RUNDIR", help="checkpoints and caches")
    parser.add_argument("--stage", choices=(*SHARES, "all"), default="all")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--budget", type=parse_budget, help="training time in all, such as 100m (the default)")
    length.add_argument("--steps", type=int, help="training steps of each stage, instead of a time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=60_000, help="size of the training set")
    parser.add_argument("--batch", type=int, default=64, help="captions and latents per step of the transformer")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="peak, of the transformer")
    parser.add_argument("--sigma-shift", type=float, default=SIGMA_SHIFT, help="shift of sigma in its training")
    parser.add_argument(
        "--weighted-steps", type=int, default=0, help="so many first steps of it weigh errors more where objects are"
    )
    parser.add_argument("--guide", type=Path, metavar="FOLDER", help="train in this pipeline's guidance")
    parser.add_argument("--guidance-scale", type=float, default=None, help="how much of it (2.5)")
    parser.add_argument(
        "--borrowed-steps",
        type=int,
        default=0,
        help="so many first steps learn the guide's velocity, not the pictures'",
    )
    parser.add_argument(
        "--mean-with", type=Path, metavar="FOLDER", help="at the end, the mean of the weights with this pipeline's"
    )
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="train on from this pipeline")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the pipeline here at the end")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if (options.steps is not None and options.steps < 1) or (options.budget is not None and options.budget <= 0):
        parser.error("--steps and --budget must be positive")
    if options.source is not None and options.stage != "transformer":
        parser.error("--from goes with --stage transformer: the transformer alone is trained on")
    if options.guide is not None and options.source is None:
        parser.error("--guide goes with --from: guidance is trained into a transformer that draws already")
    if options.guide is None and (options.guidance_scale is not None or options.borrowed_steps):
        parser.error("--guidance-scale and --borrowed-steps go with --guide")
    if options.guidance_scale is not None and options.guidance_scale <= 1:
        parser.error(f"--guidance-scale {options.guidance_scale:g} adds nothing; give a number above 1")
    if options.borrowed_steps < 0:
        parser.error("--borrowed-steps must be 0 or more")
    if options.mean_with is not None and options.stage not in ("transformer", "all"):
        parser.error("--mean-with is for the transformer's weights, and --stage says that another part is trained")
    for name, folder in (("--from", options.source), ("--guide", options.guide), ("--mean-with", options.mean_with)):
        if folder is not None and not (folder / "model_index.json").is_file():
            parser.error(f"{name} {folder} is no pipeline folder (it has no model_index.json)")
    seconds = options.budget if options.budget is not None else DEFAULT_BUDGET

    def budget(stage: str) -> Budget:
        if options.steps is not None:
            return Budget(steps=options.steps)
        return Budget(seconds=seconds * (SHARES[stage] if options.stage == "all" else 1))

    options.output.mkdir(parents=True, exist_ok=True)
    if options.stage in ("autoencoder", "all"):
        train_autoencoder(options.output, budget("autoencoder"), seed=options.seed, device=device)
    if options.stage in ("decoder", "all"):
        train_decoder(options.output, budget("decoder"), seed=options.seed, device=device, scene_count=options.scenes)
    if options.stage in ("text_encoder", "all"):
        limit = budget("text_encoder")
        train_text_encoder(options.output, limit, seed=options.seed, device=device, scene_count=options.scenes)
    if options.stage in ("transformer", "all"):
        train_transformer(
            options.output,
            budget("transformer"),
            seed=options.seed,
            device=device,
            scene_count=options.scenes,
            batch_size=options.batch,
            compiled=not options.no_compile,
            source=options.source,
            guide=options.guide,
            guidance_scale=2.5 if options.guidance_scale is None else options.guidance_scale,
            borrowed_steps=options.borrowed_steps,
            learning_rate=options.learning_rate,
            sigma_shift=options.sigma_shift,
            weighted_steps=options.weighted_steps,
        )
    if options.mean_with is not None:
        mean_with(options.mean_with, options.output / TRANSFORMER)
    if options.export is not None:
        export_pipeline(options.output, options.export)
    return 0


if __name__ == "__main__":
    sys.exit(main())
