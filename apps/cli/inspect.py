"""`edgedit inspect`: what a bundle, a picture or a checkpoint is made of."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedit.apps.cli.bundles import SUFFIX, find_bundle
from edgedit.apps.cli.inspect_bundle import bundle_document, print_bundle
from edgedit.apps.cli.tables import count, megabytes, print_facts, print_json, print_line, print_table
from edgedit.errors import BundleError

__all__ = ["inspect"]


def inspect(
    path: Annotated[
        str, typer.Argument(help="builtin, a bundle, a picture that edgedit drew, a checkpoint, or a Hub id.")
    ],
    offline: Annotated[bool, typer.Option("--offline", help="Take a Hub id from the local cache only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what is in a bundle, a picture or a checkpoint. Nothing is loaded or run."""
    from edgedit.metadata import FORMATS

    place = Path(path).expanduser()
    if place.name == "manifest.json" and place.is_file():
        place = place.parent
    if place.is_file() and place.suffix.lower() in FORMATS:
        document, show = _picture(place), _print_picture
    elif (bundle := _bundle_folder(path, place)) is not None:
        document, show = bundle_document(bundle), print_bundle
    else:
        document, show = _checkpoint(path, offline), _print_checkpoint
    if as_json:
        print_json(document)
    else:
        show(document)


def _bundle_folder(name: str, place: Path) -> Path | None:
    if place.is_dir():
        return place if (place / "manifest.json").exists() or place.suffix == SUFFIX else None
    if place.exists():
        return None
    try:
        return find_bundle(name, hub=False)
    except BundleError:
        return None


def _picture(path: Path) -> dict[str, Any]:
    from edgedit.metadata import read_recipe

    return {"kind": "picture", "path": str(path), "recipe": read_recipe(path)}


def _print_picture(document: dict[str, Any]) -> None:
    print_line(f"{document['path']}: a picture drawn by edgedit")
    print_facts(document["recipe"])
    print_line(f"draw it again with: edgedit generate -C {document['path']}")


def _checkpoint(source: str, offline: bool) -> dict[str, Any]:
    from edgedit.converters.checkpoint import open_checkpoint
    from edgedit.converters.families import BUILDERS, components_of

    checkpoint = open_checkpoint(source, offline=offline)
    components = []
    for part in checkpoint.components.values():
        types = Counter[str]()
        for tensor in part.tensors.values():
            types[tensor.dtype] += math.prod(tensor.shape)
        components.append(
            {
                "name": part.name,
                "class": part.class_name,
                "parameters": sum(types.values()),
                "bytes": sum(tensor.nbytes for tensor in part.tensors.values()),
                "dtypes": dict(types.most_common()),
                "tensors": len(part.tensors),
                "makes": components_of(part.class_name, part.name) if part.class_name in BUILDERS else [],
                "config": dict(part.config),
            }
        )
    return {
        "kind": "checkpoint",
        "source": checkpoint.source,
        "path": str(checkpoint.path),
        "revision": checkpoint.revision,
        "pipeline": checkpoint.pipeline_class,
        "scheduler": None if checkpoint.scheduler is None else checkpoint.scheduler.class_name,
        "tokenizers": list(checkpoint.tokenizer_dirs),
        "components": components,
        "notes": list(checkpoint.notes),
    }


def _print_checkpoint(document: dict[str, Any]) -> None:
    print_line(f"{document['source']}: a checkpoint")
    print_facts({key: document[key] for key in ("pipeline", "revision", "scheduler")})
    rows = [
        [
            part["name"],
            part["class"],
            count(part["parameters"]),
            megabytes(part["bytes"]),
            ", ".join(part["dtypes"]),
            ", ".join(part["makes"]) or "cannot be converted",
        ]
        for part in document["components"]
    ]
    print_table(["component", "class", "params", "size", "type", "becomes"], rows)
    for note in document["notes"]:
        print_line(f"note: {note}")
