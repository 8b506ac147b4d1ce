"""`edgedit linearize`: a checkpoint with softmax attention → one with another operator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.tables import print_json, print_line, print_table
from edgedit.apps.cli.training import need_training, parse_budget, training_progress

if TYPE_CHECKING:
    from edgedit.converters.training.linearization import LinearizationReport

__all__ = ["linearize"]


def linearize(
    checkpoint: Annotated[str, typer.Argument(help="A pipeline's folder, with a transformer of the PixArt class.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CHECKPOINT2", help="Folder to write.")],
    attention: Annotated[
        str,
        typer.Option(metavar="OPERATOR", help="lit, relu, clear:RADIUS, clear:RADIUS:POOL or kv:FACTOR."),
    ] = "lit",
    heads: Annotated[
        int | None, typer.Option(metavar="H", help="Heads of lit and relu.", show_default="a quarter")
    ] = None,
    layers: Annotated[
        str, typer.Option(metavar="LAYERS", help="all, auto (within --max-error), none, or numbers such as 0,2,5.")
    ] = "all",
    calibration: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts, one a line; self takes the checkpoint's own or general ones.")
    ] = "self",
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Training time, as 90s, 30m or 2h.", show_default="30m")
    ] = None,
    train_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Training steps of each stage, instead of a time.")
    ] = None,
    max_error: Annotated[
        float, typer.Option(metavar="E", help="For auto: relative error of the velocity before distillation.")
    ] = 0.1,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Pictures that the teacher draws to learn from.", show_default="4 a prompt"),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance", "--cfg", metavar="G", help="Guidance of these pictures.", show_default="its own"),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Latents in a training step.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the new checkpoint's path.")] = False,
) -> None:
    """Replace softmax self-attention by linear attention, and train it to do what softmax did.

    Stopped or killed, the same command goes on where it was.

    edgedit linearize models/scenes -o scenes-linear --attention lit --budget 30m
    """
    need_training()
    seconds = parse_budget(budget)
    from edgedit.converters.training.linearization import linearize as run

    with make_progress(quiet=quiet) as progress:
        progress.stage("read checkpoint")
        report = run(
            checkpoint,
            output,
            attention=attention,
            heads=heads,
            layers=layers,
            calibration=calibration,
            budget=seconds,
            steps=train_steps,
            max_error=max_error,
            samples=samples,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            seed=seed,
            device=device,
            on_progress=training_progress(progress),
        )
    if as_json:
        print_json(report.as_dict())
    elif quiet:
        print_line(str(report.output))
    else:
        _print(report)


def _print(report: LinearizationReport) -> None:
    if report.layers:
        rows = [
            [str(row.layer), f"{row.alone:.4f}", f"{row.together:.4f}", "yes" if row.chosen else "no"]
            for row in report.layers
        ]
        print_table(["layer", "error alone", "error with those above", "replaced"], rows)
    for stage, (first, last) in report.losses.items():
        print_line(f"{stage}: loss {first:.4g} → {last:.4g}")
    for spec in report.attention:
        print_line(f"{spec['operator']}: layers {', '.join(map(str, spec['layers']))}")
    print_line(f"{report.output}: {report.seconds:.0f} s")
