"""`edgedit bench`: how long each component of a bundle takes on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from edgedit.apps.cli.bundles import find_bundle
from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.request import parse_size
from edgedit.apps.cli.tables import megabytes, print_json, print_line, print_table

__all__ = ["bench"]


def bench(
    bundle: Annotated[str, typer.Argument(help="builtin, a bundle's path, or the name of one at hand.")] = "builtin",
    components: Annotated[
        str | None, typer.Option(metavar="A,B", help="Components to time.", show_default="all of them")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Picture size.", show_default="the model's own")
    ] = None,
    length: Annotated[int, typer.Option(metavar="N", min=3, help="Text tokens.")] = 120,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Evaluations after the first.")] = 5,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, onnx or mlx.")] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", metavar="N", help="Threads.", show_default="all cores")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Time each component on noise: opening it, its first evaluation, and the median and best of the others."""
    from edgedit.benchmark import benchmark

    width, height = parse_size(size, None, None)
    with make_progress() as progress:
        report = benchmark(
            find_bundle(bundle, hub=False),
            backend=backend,
            threads=threads,
            components=None if components is None else [name.strip() for name in components.split(",")],
            width=width,
            height=height,
            length=length,
            repeat=repeat,
            on_progress=lambda name, done, total: progress.stage(f"time {name}"),
        )
    if as_json:
        print_json(report.as_dict())
        return
    print_table(
        ["component", "precision", "open s", "first s", "median s", "best s", "peak RSS"],
        [
            [
                item.name,
                item.precision,
                *(
                    f"{value:.3f}"
                    for value in (item.open_seconds, item.first_seconds, item.median_seconds, item.best_seconds)
                ),
                "-" if item.peak_rss is None else megabytes(item.peak_rss),
            ]
            for item in report.components
        ],
    )
    print_line(f"{report.width}×{report.height} px, {length} text tokens, {', '.join(report.runtime.values())}")
