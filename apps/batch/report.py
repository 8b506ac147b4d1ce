"""The contact sheet: one HTML file with a thumbnail of every picture, that can be filtered and sent to somebody."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from PIL import Image

from edgedit.apps.batch.ledger import Ledger
from edgedit.errors import InputError
from edgedit.files import atomic_write_bytes

__all__ = ["LARGEST_SHEET", "write_report"]

#: Pixels of a thumbnail's longer side.
THUMBNAIL = 192
#: Pictures that a sheet shows unless more are asked for: about 6 kB each.
LARGEST_SHEET = 2000


def write_report(
    ledger: Ledger, target: Path, *, limit: int = LARGEST_SHEET, on_picture: Callable[[int], None] | None = None
) -> int:
    """Write the sheet to `target`, whole or not at all: failures first counted, then up to `limit` finished pictures.

    Thumbnails are inside the file; a click opens the picture itself, relative to the sheet's place. Returns how many
    pictures are shown. Raises InputError when it cannot be written.
    """
    root = ledger.places.root.resolve()
    try:
        base = quote(root.relative_to(target.resolve().parent).as_posix())
    except ValueError:
        base = root.as_uri()
    items: list[dict[str, Any]] = []
    for picture, error in ledger.failures(limit):
        items.append(_item(picture, "failed") | {"error": error})
    for picture, _, _, seconds in ledger.finished(limit):
        if on_picture is not None:
            on_picture(len(items))
        item = _item(picture, "done")
        item["seconds"] = round(sum(seconds.values()), 2)
        item["href"] = f"{base}/{quote(picture.path)}"
        try:
            item["thumb"] = _thumbnail(root / picture.path)
        except (OSError, ValueError) as problem:
            item |= {"state": "failed", "error": f"the file cannot be read ({problem})"}
        items.append(item)
    counts, meta = ledger.counts(), ledger.meta
    facts = [
        f"{counts.done:,} of {counts.total:,} pictures",
        f"{counts.failed:,} failed",
        f"model {meta['model']} ({meta['model_hash'][:10]})",
        f"jobs from {meta['jobs_file']}",
    ]
    if len(items) < counts.done + counts.failed:
        facts.append(f"the first {len(items):,} are shown")
    # In a script element only "</" and "<!--" could end the data early.
    data = json.dumps(items, ensure_ascii=False).replace("<", "\\u003c")
    try:
        template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the report's template is missing ({error.strerror}); install edgedit again") from None
    page = Template(template).substitute(
        title=html.escape(f"Batch {ledger.places.root.resolve().name}"), facts=html.escape(", ".join(facts)), data=data
    )
    atomic_write_bytes(target, page.encode())
    return len(items)


def _item(picture: Any, state: str) -> dict[str, Any]:
    metadata = picture.spec.get("metadata")
    return {
        "index": picture.index,
        "id": picture.id,
        # Larger than JavaScript's numbers may be.
        "seed": str(picture.seed),
        "prompt": picture.spec["prompt"],
        "state": state,
        "seconds": 0,
        "metadata": None if metadata is None else json.dumps(metadata, ensure_ascii=False),
    }


def _thumbnail(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = BytesIO()
        small.save(buffer, "WEBP", quality=70)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
