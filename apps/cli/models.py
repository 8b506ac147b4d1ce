"""`edgedit models`: what is at hand, and what can be converted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgedit.apps.cli.bundles import MODELS_VARIABLE, SUFFIX, bundles_at_hand
from edgedit.apps.cli.tables import megabytes, print_json, print_line, print_table
from edgedit.errors import EdgeditError

if TYPE_CHECKING:
    from edgedit.converters.families import Family

__all__ = ["models"]


def models(as_json: Annotated[bool, typer.Option("--json", help="Print the lists as JSON.")] = False) -> None:
    """List the models at hand and the families that convert understands.

    Looks for NAME.edgedit in the current folder, in the folders of EDGEDIT_MODELS, and among bundles fetched before.
    """
    from edgedit.api import BUILTIN
    from edgedit.converters.families import FAMILIES

    found = [_describe("builtin", BUILTIN)]
    found += [_describe(path.name.removesuffix(SUFFIX), path) for path in bundles_at_hand()]
    families = [
        {
            "family": family.name,
            "pipelines": list(family.pipeline_classes),
            "example": _example(family),
        }
        for family in FAMILIES
    ]
    if as_json:
        print_json({"models": found, "families": families})
        return
    rows = [
        [cells[column] for column in ("name", "family", "size", "backends", "bytes", "path")]
        for cells in map(_cells, found)
    ]
    print_table(["model", "family", "size", "backends", "on disk", "path"], rows)
    for entry in found:
        if entry["error"]:
            print_line(f"cannot be used: {entry['error']}")
    print_line(f"More folders: set {MODELS_VARIABLE}. Draw with: edgedit generate PROMPT -m MODEL")
    print_line()
    print_table(["family", "convert with"], [[family.name, _example(family)] for family in FAMILIES])


def _example(family: Family) -> str:
    return f"edgedit convert {family.example} -o {family.name}{SUFFIX} --dtype fp16"


def _describe(name: str, path: Path) -> dict[str, Any]:
    from edgedit.bundle import open_bundle

    entry: dict[str, Any] = {"name": name, "path": str(path), "error": None}
    try:
        bundle = open_bundle(path)
    except EdgeditError as error:
        return {**entry, "error": str(error)}
    manifest = bundle.manifest
    best = manifest.recommended
    return {
        **entry,
        "title": manifest.name,
        "family": manifest.family,
        "components": list(manifest.components),
        "backends": sorted({name for part in manifest.components.values() for name in part.artefacts}),
        "bytes": sum(file.size for file in manifest.files.values()),
        "width": best.width if best else None,
        "height": best.height if best else None,
        "model_hash": bundle.model_hash,
    }


def _cells(entry: dict[str, Any]) -> dict[str, str]:
    if entry["error"]:
        return {
            **dict.fromkeys(("family", "size", "backends", "bytes"), "-"),
            "name": entry["name"],
            "path": entry["path"],
        }
    size = f"{entry['width']}x{entry['height']}" if entry["width"] else ", ".join(entry["components"])
    return {
        "name": entry["name"],
        "family": entry["family"],
        "size": size,
        "backends": ", ".join(entry["backends"]),
        "bytes": megabytes(entry["bytes"]),
        "path": entry["path"],
    }
