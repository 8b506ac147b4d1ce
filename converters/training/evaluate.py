"""Draws held-out prompts with a model and counts how many claims hold.

Run as `python -m edgedit.converters.training.evaluate SOURCE -o DIR`.

Takes a diffusers pipeline folder or an `.edgedit` bundle. Writes `scores.json`, `scores.md` and `sheet.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from edgedit.converters.training.captions import Claims, caption
from edgedit.converters.training.scene_reader import read_scene
from edgedit.converters.training.scoring import Score, Tally, score_scene
from edgedit.converters.training.world import sample_scene
from edgedit.errors import InputError

__all__ = ["Draw", "Prompt", "contact_sheet", "evaluate", "held_out_prompts", "main", "open_model", "to_markdown"]

Picture = npt.NDArray[np.uint8]
Draw = Callable[[Sequence[str], Sequence[int]], list[Picture]]
"""Prompts and seeds in, uint8 (128, 128, 3) pictures out."""

GROUP_NAMES = {1: "one object", 2: "two objects", 3: "three objects"}


@dataclass(frozen=True)
class Prompt:
    """A caption of a combination that training never saw, its claims, and the seed to draw it with."""

    text: str
    claims: Claims
    seed: int


def held_out_prompts(count: int, *, seed: int) -> list[Prompt]:
    """Prompts that name all of a held-out combination: of ten, four have one object, four have two, two have three."""
    prompts = []
    for index in range(count):
        rng = np.random.default_rng((seed, 9, index))
        scene = sample_scene(rng, count=(1, 2, 1, 2, 3)[index % 5], held_out=True)
        text, claims = caption(scene, rng, complete=True)
        prompts.append(Prompt(text, claims, seed=int(rng.integers(2**31))))
    return prompts


def _open_diffusers(folder: Path, steps: int, guidance_scale: float, flow_shift: float | None) -> Draw:
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if flow_shift is not None:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=flow_shift)
    size = pipeline.transformer.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        pictures = pipeline(
            prompt=list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=size,
            width=size,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            use_resolution_binning=False,
            max_sequence_length=64,
            output_type="np",
        ).images
        return [np.rint(picture * 255).astype(np.uint8) for picture in pictures]

    return draw


def _open_bundle(path: Path, steps: int | None, guidance_scale: float | None) -> Draw:
    import edgedit

    pipeline: Any = edgedit.load(path)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Picture]:
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            result = pipeline.generate(prompt, seed=seed, steps=steps, guidance_scale=guidance_scale)
            pictures.append(np.asarray(result.images[0].convert("RGB")))
        return pictures

    return draw


def open_model(source: Path, *, steps: int, guidance_scale: float, flow_shift: float | None = None) -> Draw:
    """A drawing function for a diffusers folder (it has `model_index.json`) or a bundle."""
    if (source / "model_index.json").exists():
        return _open_diffusers(source, steps, guidance_scale, flow_shift)
    if not source.exists():
        raise InputError(f"{source} does not exist: name a diffusers pipeline folder or an .edgedit bundle")
    if flow_shift is not None:
        raise InputError("--flow-shift is for diffusers folders: a bundle has its own")
    return _open_bundle(source, steps, guidance_scale)


def evaluate(
    draw: Draw, prompts: Sequence[Prompt], *, batch_size: int = 16, log: Callable[[str], None] = print
) -> tuple[dict[str, dict[str, dict[str, float]]], list[Picture], list[Score]]:
    """Draws and scores all prompts.

    Returns:
        Tables (see `Tally.table`) for one, two and three objects and for all prompts; the pictures; their scores.
    """
    tallies = {name: Tally() for name in (*GROUP_NAMES.values(), "all prompts")}
    pictures: list[Picture] = []
    scores: list[Score] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        drawn = draw([prompt.text for prompt in part], [prompt.seed for prompt in part])
        for prompt, picture in zip(part, drawn, strict=True):
            score = score_scene(read_scene(picture), prompt.claims)
            tallies[GROUP_NAMES[prompt.claims.count]].add(score)
            tallies["all prompts"].add(score)
            scores.append(score)
        pictures += drawn
        log(f"{len(pictures)} of {len(prompts)}: {sum(score.all_right for score in scores)} all right")
    return {name: tally.table() for name, tally in tallies.items() if tally.claimed}, pictures, scores


def to_markdown(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """The tables as one Markdown table: share right, its 95 % interval, and the counts."""
    lines = ["| prompts | claim | right | 95 % interval | of |", "|---|---|---|---|---|"]
    for group, table in tables.items():
        for name, row in table.items():
            share = f"{100 * row['share']:.1f} %"
            label = "**all claims**" if name == "all" else name
            lines.append(
                f"| {group} | {label} | {share} | {100 * row['low']:.1f}–{100 * row['high']:.1f} % "
                f"| {row['right']}/{row['total']} |"
            )
    return "\n".join(lines) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def contact_sheet(
    pictures: Sequence[Picture],
    texts: Sequence[str],
    *,
    columns: int,
    scale: float = 1.0,
    marks: Sequence[bool] | None = None,
) -> Image.Image:
    """Pictures in rows with their captions below; a red bar under those marked False."""
    side = round(pictures[0].shape[0] * scale)
    font = ImageFont.load_default(size=11)
    gap, line_height, lines = 10, 13, 4
    rows = -(-len(pictures) // columns)
    cell = (side + gap, side + gap + lines * line_height)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), (245, 245, 245))
    draw = ImageDraw.Draw(sheet)
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = gap + index % columns * cell[0], gap + index // columns * cell[1]
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=(200, 200, 200))
        if marks is not None and not marks[index]:
            draw.rectangle((x, y + side + 1, x + side, y + side + 3), fill=(230, 0, 0))
        for number, line in enumerate(_wrapped(text, side // 6)[:lines]):
            draw.text((x, y + side + 4 + number * line_height), line, fill=(30, 30, 30), font=font)
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m edgedit.converters.training.evaluate", description=__doc__)
    parser.add_argument("source", type=Path, help="diffusers pipeline folder or .edgedit bundle")
    parser.add_argument("-n", "--prompts", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts and the noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--flow-shift", type=float, default=None)
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time (diffusers folders)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    if options.prompts < 1:
        parser.error("-n must be at least 1")
    try:
        draw = open_model(
            options.source,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            flow_shift=options.flow_shift,
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    prompts = held_out_prompts(options.prompts, seed=options.seed)
    began = time.monotonic()
    tables, pictures, scores = evaluate(draw, prompts, batch_size=options.batch)
    record = {
        "source": options.source.name,
        "prompts": options.prompts,
        "seed": options.seed,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "flow_shift": options.flow_shift,
        "seconds": round(time.monotonic() - began, 1),
        "tables": tables,
        "failures": [
            {
                "prompt": prompt.text,
                "seed": prompt.seed,
                "wrong": s.wrong,
            }
            for prompt, s in zip(prompts, scores, strict=True)
            if not s.all_right
        ],
    }
    (options.output / "scores.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "scores.md").write_text(to_markdown(tables))
    shown = slice(0, 80)
    sheet = contact_sheet(
        pictures[shown],
        [prompt.text for prompt in prompts[shown]],
        columns=10,
        marks=[score.all_right for score in scores[shown]],
    )
    sheet.save(options.output / "sheet.png")
    print(to_markdown(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
