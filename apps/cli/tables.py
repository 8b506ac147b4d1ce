"""Tables, sizes and JSON documents on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["count", "decibels", "megabytes", "print_facts", "print_json", "print_line", "print_table", "small"]

#: Wider than any table: a name or a number is never cut or broken, a narrow terminal wraps whole lines.
WIDTH = 400


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose numbers stand to the right. Cells are printed as they are, without markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(columns):
        numeric = all(row[i] in ("", "-") or row[i][0].isdigit() for row in rows)
        table.add_column(Text(name), justify="right" if numeric and rows else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=WIDTH, highlight=False).print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Lines of `name  value`, aligned; facts that are None are left out."""
    shown = {name: value for name, value in facts.items() if value is not None}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        print_line(f"{name:<{width}}  {value}")


def print_line(text: str = "") -> None:
    """One line on stdout."""
    print(text)


def print_json(document: object) -> None:
    """One JSON document on stdout. Numbers that JSON lacks (not a number, infinity) become null."""
    print(json.dumps(_finite(document), indent=2, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def megabytes(size: float) -> str:
    """A size in bytes as people read it: "29.4 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def count(number: int) -> str:
    """Parameters as people read them: "610.9 M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return str(number)


def decibels(value: float | None) -> str:
    """A PSNR; None and 200 or more mean that the two are equal."""
    return "equal" if value is None or value >= 200 else f"{value:.1f} dB"


def small(value: float) -> str:
    """A relative error."""
    return f"{value:.1e}"
