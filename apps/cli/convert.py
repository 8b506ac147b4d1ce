"""`edgedit convert`: checkpoint → bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.tables import count, decibels, megabytes, print_json, print_line, print_table, small
from edgedit.errors import InputError

if TYPE_CHECKING:
    from edgedit.converters.convert import ComponentReport, ConversionReport

__all__ = ["convert"]


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Diffusers folder, one component's folder, weights file, or a Hub id ORG/NAME."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write, NAME.edgedit.")],
    to: Annotated[
        list[str] | None,
        typer.Option(metavar="BACKEND", help="Backend to convert for; repeat for more.", show_default="onnx"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="Weights: fp32, fp16, w8, w4, or w8a8 (int8 arithmetic too).")
    ] = "fp32",
    components: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Only these of transformer, text_encoder, decoder, encoder.", show_default="all"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name.", show_default="that of BUNDLE")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub id.", show_default="main")
    ] = None,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Weights variant, fp16 or bf16.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Take a Hub id from the local cache only.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Run every component and record how it agrees with the fp32 graph.",
            show_default="components below 256 MiB",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the bundle's path.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List dropped keys and their reasons.")] = False,
) -> None:
    """Convert a checkpoint into a bundle that runs here.

    edgedit convert PixArt-alpha/PixArt-Sigma-XL-2-1024-MS -o pixart-sigma.edgedit --dtype fp16
    """
    if quiet and (verbose or as_json):
        raise InputError("--quiet goes with neither --verbose nor --json; give one of them")
    import edgedit

    with make_progress(quiet=quiet) as progress:
        stage = ""

        def on_progress(component: str, done: int, total: int) -> None:
            nonlocal stage
            if component != stage:
                stage = component
                progress.stage(component)
            progress.step(done, total)

        progress.stage("read checkpoint")
        report = edgedit.convert(
            source,
            output,
            to=tuple(to or ("onnx",)),
            dtype=dtype,
            components=None if components is None else _names(components),
            revision=revision,
            offline=offline,
            variant=variant,
            name=name,
            overwrite=overwrite,
            measure=measure,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    if as_json:
        print_json(report.as_dict())
    elif quiet:
        if report.bundle is not None:
            print_line(str(report.bundle))
    else:
        _print(report, verbose)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(word.strip() for word in text.split(",") if word.strip())
    if not names:
        raise InputError("--components is empty; name some, as transformer,decoder, or leave it out")
    return names


def _print(report: ConversionReport, verbose: bool) -> None:
    kind = f" ({report.pipeline_class})" if report.pipeline_class else ""
    print_line(f"{report.family}{kind}")
    print_table(
        ["component", "class", "params", "size", "type", "parity", "rel. L2", "dropped keys"],
        [_row(component) for component in report.components],
    )
    if verbose:
        for component in report.components:
            _print_dropped(component)
    for note in report.notes:
        print_line(f"note: {note}")
    if report.bundle is None:
        print_line("nothing was written (--dry-run)")
    else:
        print_line(f"{report.bundle}: {megabytes(report.size)} in {report.seconds:.1f} s")


def _print_dropped(component: ComponentReport) -> None:
    reasons: dict[str, list[str]] = {}
    for key, reason in component.dropped:
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        print_line(f"{component.name}: {len(keys)} keys dropped, {reason}")
        for key in keys:
            print_line(f"    {key}")


def _row(component: ComponentReport) -> list[str]:
    parity = component.parity
    return [
        component.name,
        component.class_name,
        count(component.parameters),
        megabytes(component.size) if component.size else "-",
        component.precision,
        "not measured" if parity is None else decibels(parity["psnr_db"]),
        "-" if parity is None else small(parity["relative_l2"]),
        str(len(component.dropped)),
    ]
