"""Draws held-out prompts with a model and counts how many claims hold."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from edgedit.converters.training.captions import Claims, caption
from edgedit.converters.training.scene_reader import read_scene
from edgedit.converters.training.scoring import Score, Tally, score_scene
from edgedit.converters.training.similarity import psnr, ssim, structure_distance
from edgedit.converters.training.world import IMAGE_SIZE, Scene, sample_scene
from edgedit.errors import InputError
from edgedit.guidance import Guidance
from edgedit.pipeline import Pipeline
from edgedit.recipes import Recipe

__all__ = [
    "Draw",
    "Picture",
    "Prompt",
    "agreement",
    "contact_sheet",
    "failures",
    "held_out_prompts",
    "open_model",
    "report",
    "score",
    "to_markdown",
]

Picture = npt.NDArray[np.uint8]
Tables = dict[str, dict[str, dict[str, float]]]
OnStep = Callable[[int, int], None]
"""Pictures done, and of how many."""
BATCH = 16
"""Pictures denoised together."""


GROUP_NAMES = {1: "one object", 2: "two objects", 3: "three objects"}


@dataclass(frozen=True)
class Prompt:
    """A caption of a combination that training never saw, its claims, the seed to draw with, and the scene itself."""

    text: str
    claims: Claims
    seed: int
    scene: Scene


def held_out_prompts(count: int, *, seed: int) -> list[Prompt]:
    """Prompts that name all of a held-out combination: of ten, four have one object, four have two, two have three."""
    prompts = []
    for index in range(count):
        rng = np.random.default_rng((seed, 9, index))
        scene = sample_scene(rng, count=(1, 2, 1, 2, 3)[index % 5], held_out=True)
        text, claims = caption(scene, rng, complete=True)
        prompts.append(Prompt(text, claims, seed=int(rng.integers(2**31)), scene=scene))
    return prompts


class Draw:
    """Draws many prompts with one open pipeline, those of one length together."""

    def __init__(self, pipeline: Pipeline, *, steps: int | None, guidance_scale: float | None) -> None:
        self._pipeline = pipeline
        self._recipe = Recipe.resolve(pipeline.bundle, prompt="", steps=steps, guidance_scale=guidance_scale)
        guidance = Guidance.from_manifest(pipeline.bundle.manifest.guidance)
        self._guided = guidance.needs_negative(self._recipe.guidance_scale)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], on_step: OnStep | None = None) -> list[Picture]:
        """Prompts and seeds in, uint8 (H, W, 3) pictures out, each the one that `generate` draws."""
        pipeline = self._pipeline
        embeddings = [pipeline.encode_prompt(prompt) for prompt in prompts]
        negative = pipeline.encode_prompt(self._recipe.negative_prompt, negative=True) if self._guided else None
        lengths: dict[int, list[int]] = {}
        for index, embedding in enumerate(embeddings):
            lengths.setdefault(embedding.hidden_states.shape[1], []).append(index)
        pictures: dict[int, Picture] = {}
        for same in lengths.values():
            for some in (same[first : first + BATCH] for first in range(0, len(same), BATCH)):
                latents = pipeline.denoise_together(
                    self._recipe,
                    [embeddings[index] for index in some],
                    None if negative is None else [negative] * len(some),
                    [seeds[index] for index in some],
                )
                for index, image in zip(some, pipeline.decode(latents), strict=True):
                    pictures[index] = np.asarray(image.convert("RGB"))
                if on_step is not None:
                    on_step(len(pictures), len(prompts))
        return [pictures[index] for index in range(len(prompts))]


@contextmanager
def open_model(source: str | Path, *, steps: int | None, guidance_scale: float | None) -> Iterator[Draw]:
    """A drawing function for a bundle, or for a checkpoint, which is converted for the occasion.

    Args:
        source: what `edgedit.load` takes, or a pipeline folder (it has `model_index.json`).
        steps, guidance_scale: the model's own when None.
    """
    import edgedit

    with tempfile.TemporaryDirectory(prefix="edgedit-eval-") as folder:
        bundle: str | Path = source
        if (Path(source) / "model_index.json").exists():
            bundle = Path(folder) / "model.edgedit"
            edgedit.convert(source, bundle, measure=False)
        with edgedit.load(bundle) as pipeline:
            yield Draw(pipeline, steps=steps, guidance_scale=guidance_scale)


def score(pictures: Sequence[Picture], prompts: Sequence[Prompt]) -> tuple[Tables, list[Score]]:
    """Reads the pictures and counts which claims hold.

    Returns:
        Tables (see `Tally.table`) for one, two and three objects and for all prompts, and the score of each picture.
    """
    tallies = {name: Tally() for name in (*GROUP_NAMES.values(), "all prompts")}
    scores: list[Score] = []
    for prompt, picture in zip(prompts, pictures, strict=True):
        found = score_scene(read_scene(_at_scene_size(picture)), prompt.claims)
        tallies[GROUP_NAMES[prompt.claims.count]].add(found)
        tallies["all prompts"].add(found)
        scores.append(found)
    return {name: tally.table() for name, tally in tallies.items() if tally.claimed}, scores


def _at_scene_size(picture: Picture) -> Picture:
    size = (IMAGE_SIZE, IMAGE_SIZE)
    if picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def failures(prompts: Sequence[Prompt], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Prompt, seed and wrong attributes of every picture that is not all right."""
    return [
        {"prompt": prompt.text, "seed": prompt.seed, "wrong": found.wrong}
        for prompt, found in zip(prompts, scores, strict=True)
        if not found.all_right
    ]


def agreement(pictures: Sequence[Picture], others: Sequence[Picture]) -> dict[str, float]:
    """Mean likeness of pictures with those of another model for the same prompts and seeds (see `similarity`).

    Raises InputError when the two models draw pictures of different sizes.
    """
    pairs = list(zip(pictures, others, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        raise InputError("the two models draw pictures of different sizes, which cannot be compared one by one")
    measures = {"psnr_db": psnr, "ssim": ssim, "structure_distance": structure_distance}
    return {name: float(np.mean([measure(a, b) for a, b in pairs])) for name, measure in measures.items()}


def report(record: Mapping[str, Any]) -> str:
    """What `edgedit eval` found, as Markdown."""
    parts = [to_markdown(record["tables"])] if "tables" in record else []
    rows = []
    if "frechet_to_scenes" in record:
        rows.append(("Fréchet distance to rendered scenes", f"{record['frechet_to_scenes']:.3f}"))
    if "agreement" in record:
        rows.append((f"Fréchet distance to {record['against']}", f"{record['frechet_to_other']:.3f}"))
        found = record["agreement"]
        rows.append(("PSNR, same seeds", f"{found['psnr_db']:.1f} dB"))
        rows.append(("SSIM, same seeds", f"{found['ssim']:.3f}"))
        rows.append(("structure distance, same seeds", f"{found['structure_distance']:.4f}"))
    if rows:
        parts.append("\n".join(["| measure | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]) + "\n")
    return "\n".join(parts)


def to_markdown(tables: Tables) -> str:
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
