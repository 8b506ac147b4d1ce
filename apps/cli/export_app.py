"""`edgedit export-app`: a bundle → what an app ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgedit.apps.cli.bundles import find_bundle
from edgedit.apps.cli.tables import megabytes, print_json, print_line, print_table

__all__ = ["export_app"]


def export_app(
    bundle: Annotated[str, typer.Argument(help="A bundle with Core ML packages, or the name of one at hand.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write what an Xcode project needs: Core ML packages, tokenizer, manifest, and a report of sizes and systems.

    edgedit export-app cat.edgedit -o App/Resources/cat
    """
    from edgedit.app_export import export_app as export

    report = export(find_bundle(bundle, hub=False), output, overwrite=overwrite)
    if as_json:
        print_json(report.as_dict())
        return
    print_table(["package", "size"], [[name, megabytes(size)] for name, size in report.components.items()])
    print_line("pictures: " + ", ".join(f"{width}x{height}" for width, height in report.pictures))
    print_line("needs " + ", ".join(f"{system} {version}" for system, version in report.systems.items()) + " or later")
    print_line(f"{report.folder}: {megabytes(report.size)}")
