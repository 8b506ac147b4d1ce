"""`edgedit verify`: is a bundle whole, and does it compute what it should?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgedit.apps.cli.bundles import find_bundle
from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.tables import decibels, print_json, print_line, print_table, small

if TYPE_CHECKING:
    from edgedit.verification import ComponentCheck

__all__ = ["verify"]

FAILED = 1


def verify(
    bundle: Annotated[str, typer.Argument(help="builtin, a bundle's path, or the name of one at hand.")],
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, onnx, coreml, mlx or all.")] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", metavar="N", help="Threads.", show_default="all cores")
    ] = None,
    interpreter: Annotated[
        bool, typer.Option("--interpreter", help="Evaluate Core ML programs with numpy, on any OS.")
    ] = False,
    emulate_fp16: Annotated[
        bool, typer.Option("--emulate-fp16", help="With --interpreter: round to float16 as the programs say.")
    ] = False,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Draw a picture on every backend too, and compare them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing; the exit status tells.")] = False,
) -> None:
    """Check every file's hash, and run every component against what the conversion recorded.

    The exit status is 0 when everything agrees, 1 when a component does not, 2 when a file is damaged.
    """
    import edgedit

    with make_progress(quiet=quiet) as progress:
        stage = ""

        def on_progress(name: str, done: int, total: int) -> None:
            nonlocal stage
            if name != stage:
                stage = name
                progress.stage(f"check {name}")
            progress.step(done, total)

        report = edgedit.verify(
            find_bundle(bundle, hub=False),
            backend=backend,
            threads=threads,
            interpreter=interpreter,
            emulate_fp16=emulate_fp16,
            pictures=pictures,
            on_progress=on_progress,
        )
    if as_json:
        print_json(report.as_dict())
    elif not quiet:
        print_table(
            ["component", "backend", "type", "rel. L2", "tolerance", "parity", "since conversion", "result"],
            [_row(check) for check in report.components],
        )
        for drawn in report.pictures:
            print_line(
                f"picture on {drawn.backend} against {drawn.against}: {decibels(drawn.psnr_db)}, "
                f"at most {drawn.levels}/255 off, {'passed' if drawn.passed else 'FAILED'}"
            )
        for note in report.notes:
            print_line(f"note: {note}")
        verdict = "passed" if report.passed else "FAILED"
        print_line(f"{report.bundle.name}: {report.files} files whole, {len(report.components)} components {verdict}")
    if not report.passed:
        raise typer.Exit(FAILED)


def _row(check: ComponentCheck) -> list[str]:
    found = check.agreement
    if found is None:
        return [check.name, check.backend, check.precision, "-", "-", "-", "-", "not checked"]
    return [
        check.name,
        check.backend,
        check.precision,
        small(found.relative_l2),
        small(check.tolerance),
        decibels(found.psnr_db),
        "-" if check.own is None else small(check.own),
        "passed" if check.passed else "FAILED",
    ]
