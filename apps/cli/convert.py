"""`edgedit convert`: checkpoint → bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.request import parse_size
from edgedit.apps.cli.tables import count, decibels, megabytes, print_json, print_line, print_table, small
from edgedit.errors import InputError

if TYPE_CHECKING:
    from edgedit.converters.coreml import CoremlOptions
    from edgedit.converters.report import ArtefactReport, ComponentReport, ConversionReport

__all__ = ["convert"]


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Diffusers folder, one component's folder, weights file, or a Hub id ORG/NAME."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write, NAME.edgedit.")],
    to: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help="Backends to convert for: onnx, coreml, mlx.", show_default="onnx"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE|RECIPE.toml",
            help="Weights: fp32, fp16, w8, w4, fp4, w3, w2; w8a8 or w4a8 (int8 arithmetic too); mixed:30M or "
            "mixed:35dB (a budget); or a recipe's file.",
        ),
    ] = "fp32",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPTS.txt|self",
            help="Draw these prompts first, to learn what each layer must keep; self takes eight of the model's own.",
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WxH",
            help="Picture size for Core ML packages and for MLX functions without Python; repeat for more.",
            show_default="Core ML: the model's own, MLX: none",
        ),
    ] = None,
    coreml_target: Annotated[
        str | None, typer.Option(metavar="OS", help="iOS18 (and macOS 15) or iOS26.", show_default="iOS18")
    ] = None,
    coreml_attention: Annotated[
        str | None,
        typer.Option(metavar="FORM", help="fused, or written (product, softmax, product).", show_default="fused"),
    ] = None,
    compute_units: Annotated[
        str | None,
        typer.Option(
            metavar="UNITS",
            help="Form of Core ML packages: ne for the Neural Engine, all for the GPU.",
            show_default="all",
        ),
    ] = None,
    coreml_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="Weights of transformer and text encoder for Core ML: int8, int4, palette1 to palette8.",
            show_default="as --dtype",
        ),
    ] = None,
    mlx_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="Quantize matrices for MLX: q2 to q8, -g32, -g64 or -g128 after it; mxfp4, mxfp8, nvfp4.",
            show_default="as --dtype",
        ),
    ] = None,
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
            to=_names("--to", ",".join(to)) if to else ("onnx",),
            dtype=dtype,
            calibration=calibration,
            sizes=[_size(text) for text in size] if size else None,
            coreml=_coreml(
                target=coreml_target, attention=coreml_attention, weights=coreml_weights, compute_units=compute_units
            ),
            mlx_weights=mlx_weights,
            components=None if components is None else _names("--components", components),
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


def _names(flag: str, text: str) -> tuple[str, ...]:
    names = tuple(word.strip() for word in text.split(",") if word.strip())
    if not names:
        raise InputError(f"{flag} is empty; name some, joined by commas, or leave it out")
    return names


def _size(text: str) -> tuple[int, int]:
    width, height = parse_size(text, None, None)
    return width or 0, height or 0


def _coreml(**options: str | None) -> CoremlOptions | None:
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if not given:
        return None
    from edgedit.converters.coreml import CoremlOptions

    return CoremlOptions(**given)


def _print(report: ConversionReport, verbose: bool) -> None:
    kind = f" ({report.pipeline_class})" if report.pipeline_class else ""
    print_line(f"{report.family}{kind}")
    print_table(
        ["component", "class", "params", "backend", "size", "type", "parity", "rel. L2", "dropped keys"],
        [_row(component, artefact) for component in report.components for artefact in component.artefacts],
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


def _row(component: ComponentReport, artefact: ArtefactReport) -> list[str]:
    parity = artefact.parity
    return [
        component.name,
        component.class_name,
        count(component.parameters),
        artefact.backend,
        megabytes(artefact.size) if artefact.size else "-",
        artefact.precision,
        "not measured" if parity is None else decibels(parity["psnr_db"]),
        "-" if parity is None else small(parity["relative_l2"]),
        str(len(component.dropped)),
    ]
