"""`edgedit eval`: how often a model draws what it is told, and how near its pictures are to another's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgedit.apps.cli.progress import Progress, make_progress
from edgedit.apps.cli.tables import print_json, print_line
from edgedit.errors import InputError

if TYPE_CHECKING:
    from edgedit.converters.training.evaluate import Picture

__all__ = ["eval_model"]

SHEET_PICTURES = 80
PAIRS = 24


def eval_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="builtin, a bundle, or a checkpoint's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for tables and pictures.")],
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            "-n",
            metavar="N|FILE",
            help="How many held-out scenes of the embedded model's world, or a text file of prompts.",
        ),
    ] = "400",
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Compare with this model's pictures of the same seeds."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses the scenes and the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps.", show_default="its own")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance", "--cfg", metavar="G", help="Guidance scale.", show_default="its own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the tables only.")] = False,
) -> None:
    """Measure a model: accuracy per attribute with 95 % intervals, Fréchet distance, agreement with another model.

    Writes scores.json, scores.md and sheet.png, and pairs.png with --against.

    edgedit eval student.edgedit --against teacher.edgedit -n 1000 -o scores
    """
    began = time.monotonic()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; choose a folder")
    from edgedit.converters.training import evaluate as measure
    from edgedit.converters.training.similarity import frechet_distance
    from edgedit.converters.training.world import render

    chosen = _prompts(prompts, seed, measure.held_out_prompts)
    texts, seeds = [p[0] for p in chosen], [p[1] for p in chosen]
    record: dict[str, Any] = {"model": model, "against": against, "prompts": len(chosen), "seed": seed}
    record |= {"steps": steps, "guidance_scale": guidance_scale}
    with make_progress(quiet=quiet) as progress:
        pictures = _draw(measure, progress, model, texts, seeds, steps, guidance_scale)
        others = None if against is None else _draw(measure, progress, against, texts, seeds, None, None)
        progress.stage("compare")
        marks = None
        if prompts.isdigit():
            scenes = measure.held_out_prompts(len(chosen), seed=seed)
            tables, scores = measure.score(pictures, scenes)
            marks = [score.all_right for score in scores]
            record |= {"tables": tables, "failures": measure.failures(scenes, scores)}
            record["frechet_to_scenes"] = frechet_distance(pictures, [render(p.scene) for p in scenes])
        if others is not None:
            record["agreement"] = measure.agreement(pictures, others)
            record["frechet_to_other"] = frechet_distance(pictures, others)
    record["seconds"] = round(time.monotonic() - began, 1)
    text = measure.report(record)
    output.mkdir(parents=True, exist_ok=True)
    (output / "scores.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "scores.md").write_text(text, encoding="utf-8")
    shown = slice(0, SHEET_PICTURES)
    sheet = measure.contact_sheet(pictures[shown], texts[shown], columns=10, marks=marks and marks[shown])
    sheet.save(output / "sheet.png")
    if others is not None:
        both = [picture for pair in zip(others[:PAIRS], pictures[:PAIRS], strict=True) for picture in pair]
        captions = [line for text in texts[:PAIRS] for line in (f"{against}: {text}", model)]
        measure.contact_sheet(both, captions, columns=8).save(output / "pairs.png")
    if as_json:
        print_json(record)
    else:
        print_line(text)


def _prompts(given: str, seed: int, held_out: Callable[..., Sequence[Any]]) -> list[tuple[str, int]]:
    """Texts and seeds: of the world's held-out scenes, or of a file."""
    if given.isdigit():
        if int(given) < 2:
            raise InputError("--prompts must be at least 2: a distribution needs more than one picture")
        return [(prompt.text, prompt.seed) for prompt in held_out(int(given), seed=seed)]
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--prompts {given} is neither a number nor a text file that can be read") from None
    texts = [line.strip() for line in lines if line.strip()]
    if len(texts) < 2:
        raise InputError(f"{given} holds fewer than two prompts; write one a line")
    return [(text, seed + index) for index, text in enumerate(texts)]


def _draw(
    measure: Any,
    progress: Progress,
    model: str,
    texts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None,
    guidance_scale: float | None,
) -> list[Picture]:
    progress.stage(f"draw with {model}")
    with measure.open_model(model, steps=steps, guidance_scale=guidance_scale) as draw:
        pictures: list[Picture] = draw(texts, seeds, progress.step)
    return pictures
