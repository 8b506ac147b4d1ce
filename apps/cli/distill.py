"""`edgedit distill`: a checkpoint of many steps → one of few, or one with a small decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.tables import print_json, print_line
from edgedit.apps.cli.training import need_training, parse_budget, training_progress
from edgedit.errors import InputError

if TYPE_CHECKING:
    from edgedit.converters.training.distillation import DistillationReport
    from edgedit.converters.training.tiny_decoder import DecoderReport

__all__ = ["distill"]


def distill(
    checkpoint: Annotated[str, typer.Argument(help="A pipeline's folder; one that linearize made, too.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CHECKPOINT2", help="Folder to write.")],
    component: Annotated[
        str, typer.Option(metavar="NAME", help="transformer (fewer steps) or decoder (a tiny one beside the full one).")
    ] = "transformer",
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="lcm, scm (consistency), dmd, trajectory (the teacher's ends), or guidance (steps of half the work).",
            show_default="lcm",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Steps to draw in: 1, 2 or 4; any for guidance.", show_default="4, or its own"),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Learn from this one, such as the one that was linearized.",
            show_default="the checkpoint itself",
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(metavar="N", help="Channels of a tiny decoder.", show_default="64")
    ] = None,
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
    sigma_shift: Annotated[
        float | None,
        typer.Option(metavar="S", help="Shift of the student's noise levels (flow models).", show_default="its own"),
    ] = None,
    keep_right: Annotated[
        bool,
        typer.Option("--keep-right", help="Learn only from pictures that the scene reader finds right (trajectory)."),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Latents in a training step.", show_default="32, or 8 for a decoder"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the new checkpoint's path.")] = False,
) -> None:
    """Train a student that draws in one to four steps, guidance distilled in; generate then uses its schedule.

    With --component decoder, a small decoder that imitates the full one instead, for generate --decoder tiny. Stopped
    or killed, the same command goes on where it was.

    edgedit distill scenes-linear -o scenes-fast --method lcm --steps 4 --budget 30m
    """
    need_training()
    for_steps = {"--method": method, "--steps": steps, "--guidance": guidance_scale, "--sigma-shift": sigma_shift}
    for_steps |= {"--keep-right": keep_right or None, "--teacher": teacher}
    if component not in ("transformer", "decoder"):
        raise InputError(f"--component {component!r} cannot be distilled; choose transformer or decoder")
    stray = for_steps if component == "decoder" else {"--width": width}
    for flag, value in stray.items():
        if value is not None:
            raise InputError(f"{flag} does nothing for --component {component}; leave it out")
    given: dict[str, object] = {
        "calibration": calibration,
        "budget": parse_budget(budget),
        "train_steps": train_steps,
        "samples": samples,
        "seed": seed,
        "device": device,
    }
    chosen: dict[str, object] = {"learning_rate": learning_rate, "batch_size": batch_size, "width": width}
    chosen |= {"method": method, "steps": steps, "guidance_scale": guidance_scale, "sigma_shift": sigma_shift}
    chosen |= {"keep_right": keep_right or None, "teacher": teacher}
    given |= {name: value for name, value in chosen.items() if value is not None}
    report: DistillationReport | DecoderReport
    with make_progress(quiet=quiet) as progress:
        progress.stage("read checkpoint")
        tell = training_progress(progress)
        if component == "decoder":
            from edgedit.converters.training.tiny_decoder import distill_decoder

            report = distill_decoder(checkpoint, output, on_progress=tell, **given)  # type: ignore[arg-type]
            small, full = report.parameters
            made = (
                f"a decoder of {small / 1e6:.2f} M parameters for {full / 1e6:.1f} M, {report.psnr_db:.1f} dB like it"
            )
        else:
            from edgedit.converters.training.distillation import distill as run

            few = run(checkpoint, output, on_progress=tell, **given)  # type: ignore[arg-type]
            report, made = few, f"{few.method}, {few.steps} step{'s' * (few.steps != 1)}"
    if as_json:
        print_json(report.as_dict())
    elif quiet:
        print_line(str(report.output))
    else:
        for stage, (first, last) in report.losses.items():
            print_line(f"{stage}: loss {first:.4g} → {last:.4g}")
        print_line(f"{report.output}: {made}, {report.seconds:.0f} s")
