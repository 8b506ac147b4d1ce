"""`edgedit distill`: a checkpoint of many steps → one of few."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.tables import print_json, print_line
from edgedit.apps.cli.training import need_training, parse_budget, training_progress

__all__ = ["distill"]


def distill(
    checkpoint: Annotated[str, typer.Argument(help="A pipeline's folder; one that linearize made, too.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CHECKPOINT2", help="Folder to write.")],
    method: Annotated[
        str, typer.Option(metavar="METHOD", help="lcm (consistency), scm (continuous-time consistency) or dmd.")
    ] = "lcm",
    steps: Annotated[int, typer.Option(metavar="N", help="Steps to draw in: 1, 2 or 4.")] = 4,
    calibration: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts, one a line; self takes the checkpoint's own or general ones.")
    ] = "self",
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Training time, as 90s, 30m or 2h.", show_default="30m")
    ] = None,
    train_steps: Annotated[int | None, typer.Option(metavar="N", help="Training steps, instead of a time.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Pictures that the teacher draws to learn from.", show_default="4 a prompt"),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance", "--cfg", metavar="G", help="Guidance to distil in.", show_default="its own"),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="RATE", help="Peak learning rate.", show_default="the method's")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Latents in a training step.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the new checkpoint's path.")] = False,
) -> None:
    """Train a student that draws in one to four steps, guidance distilled in; generate then uses its schedule.

    Stopped or killed, the same command goes on where it was.

    edgedit distill scenes-linear -o scenes-fast --method lcm --steps 4 --budget 30m
    """
    need_training()
    seconds = parse_budget(budget)
    from edgedit.converters.training.distillation import distill as run

    with make_progress(quiet=quiet) as progress:
        progress.stage("read checkpoint")
        report = run(
            checkpoint,
            output,
            method=method,
            steps=steps,
            calibration=calibration,
            budget=seconds,
            train_steps=train_steps,
            samples=samples,
            guidance_scale=guidance_scale,
            learning_rate=learning_rate,
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
        for stage, (first, last) in report.losses.items():
            print_line(f"{stage}: loss {first:.4g} → {last:.4g}")
        print_line(f"{report.output}: {report.method}, {report.steps} steps, {report.seconds:.0f} s")
