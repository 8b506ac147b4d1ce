"""`edgedit bench`: how long each component of a bundle takes on this machine, and beside whom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgedit.apps.cli.bundles import find_bundle
from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.request import parse_size
from edgedit.apps.cli.tables import decibels, megabytes, print_json, print_line, print_table, small

if TYPE_CHECKING:
    from edgedit.benchmark import BenchmarkReport, ComponentTimes

__all__ = ["bench"]


def bench(
    bundle: Annotated[str, typer.Argument(help="builtin, a bundle's path, or the name of one at hand.")] = "builtin",
    vs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Time beside diffusers (torch eager), ort-export (torch.onnx.export), openvino, openvino-w8, "
            "openvino-w8a8 (OpenVINO's own conversion), or a bundle, BUNDLE@ENGINE for another engine; "
            "repeat for several.",
            show_default="nobody",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The checkpoint, for --vs.", show_default="where the bundle came from"),
    ] = None,
    components: Annotated[
        str | None, typer.Option(metavar="A,B", help="Components to time.", show_default="all of them")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Picture size.", show_default="the model's own")
    ] = None,
    length: Annotated[int, typer.Option(metavar="N", min=3, help="Text tokens.")] = 120,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures at once.")] = 1,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Evaluations after the first, a round.")] = 5,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Turns of each.", show_default="3 with --vs, else 1")
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, onnx or mlx.")] = "auto",
    engine: Annotated[str, typer.Option(metavar="NAME", help="auto, onnxruntime or openvino.")] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", metavar="N", help="Threads.", show_default="all cores")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Time each component on noise, every contender in processes of its own, in turns."""
    from edgedit.bench.contenders import RIVALS
    from edgedit.benchmark import benchmark

    width, height = parse_size(size, None, None)
    with make_progress() as progress:
        report = benchmark(
            find_bundle(bundle, hub=False),
            vs=[name if name in RIVALS else _bundle(name) for name in vs or ()],
            source=source,
            backend=backend,
            engine=engine,
            threads=threads,
            components=None if components is None else [name.strip() for name in components.split(",")],
            width=width,
            height=height,
            length=length,
            batch=batch,
            repeat=repeat,
            rounds=rounds,
            on_progress=lambda name, done, total: progress.stage(f"{name} ({done + 1}/{total})"),
        )
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)


def _bundle(name: str) -> str:
    """The path of a bundle at hand; the name itself, to be refused with the choices, when there is none."""
    from edgedit.errors import BundleError

    place, at, engine = name.rpartition("@")
    for path, suffix in ((name, ""), *([(place, at + engine)] if place else [])):
        try:
            return f"{find_bundle(path, hub=False)}{suffix}"
        except BundleError:
            continue
    return name


def _print(report: BenchmarkReport) -> None:
    beside = len(report.contenders) > 1
    columns = ["component", "precision", "cold s", "warm s", "first s", "median s", "best s", "peak RSS", "energy"]
    if beside:
        columns = [columns[0], "contender", *columns[1:], "× bundle", "PSNR", "rel. L2"]
    rows = []
    for position, component in enumerate(report.components):
        for contender in report.contenders:
            part = contender.components[position]
            cells = _cells(part)
            if beside:
                fit = part.agreement
                close = ["reference", "-"] if fit is None else [decibels(fit.psnr_db), small(fit.relative_l2)]
                cells = [contender.label, *cells, f"{part.ratio:.2f}", *close]
            rows.append([component.name, *cells])
    print_table(columns, rows)
    for contender in report.contenders:
        told = ", ".join(contender.runtime.values())
        print_line(f"{contender.label}: {told}; ready {contender.start_seconds:.2f} s after its process began")
    evaluations = f"{report.rounds} × {report.repeat} evaluations"
    print_line(
        f"{report.width}×{report.height} px, batch {report.batch}, {report.length} text tokens, {evaluations}; "
        "cold: opened in a new process; warm: opened again there"
    )
    if beside:
        print_line("× bundle: median over the bundle's, above 1 where the bundle is faster")
    if all(part.joules is None for contender in report.contenders for part in contender.components):
        print_line("energy: not available, this system does not tell it")


def _cells(part: ComponentTimes) -> list[str]:
    times = (part.cold_seconds, part.warm_seconds, part.first_seconds, part.median_seconds, part.best_seconds)
    return [
        part.precision,
        *(f"{value:.3f}" for value in times),
        "-" if part.peak_rss is None else megabytes(part.peak_rss),
        "-" if part.joules is None else f"{part.joules:.2f} J",
    ]
