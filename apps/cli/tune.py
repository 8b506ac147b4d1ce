"""`edgedit tune`: find out what is fastest on this machine, and use it from then on."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgedit.apps.cli.bundles import find_bundle, open_local
from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.request import parse_size
from edgedit.apps.cli.tables import print_json, print_line, print_table, small
from edgedit.errors import InputError

if TYPE_CHECKING:
    from edgedit.tuning_record import TuningRecord

__all__ = ["tune"]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def tune(
    bundle: Annotated[str, typer.Argument(help="builtin, a bundle's path, or the name of one at hand.")] = "builtin",
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Picture size.", show_default="the model's own")
    ] = None,
    seconds: Annotated[
        str, typer.Option("--time", metavar="TIME", help="About how long to measure, as 60s or 5m.")
    ] = "60s",
    length: Annotated[int, typer.Option(metavar="N", min=3, help="Text tokens.")] = 120,
    components: Annotated[
        str | None, typer.Option(metavar="A,B", help="Components to try.", show_default="all of them")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show what was found before; measure nothing.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Remove what was found before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Time engines, threads and forms of each graph on this machine, and keep the fastest for `generate`.

    What is kept belongs to this processor, bundle and versions of the engines.
    """
    from edgedit import tuning_record

    if show and forget:
        raise InputError("give either --show or --forget, not both")
    width, height = parse_size(size, None, None)
    if show or forget:
        opened = open_local(bundle)
        if forget:
            print_line("removed" if tuning_record.forget(opened) else "there was nothing to remove")
            return
        record = tuning_record.load(opened)
        if record is None:
            raise InputError(f"{opened.path.name} was not tuned on this machine; run: edgedit tune {bundle}")
    else:
        from edgedit.tuning import tune as measure

        with make_progress(quiet=as_json) as progress:
            record = measure(
                find_bundle(bundle, hub=False),
                width=width,
                height=height,
                length=length,
                seconds=_seconds(seconds),
                components=None if components is None else [name.strip() for name in components.split(",")],
                on_progress=progress.stage,
            )
    if as_json:
        print_json(record.as_dict())
    else:
        _print(record)


def _seconds(text: str) -> float:
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "s")
    try:
        return float(number) * _UNITS[unit]
    except ValueError:
        raise InputError(f"--time {text!r} is not a time; write 60s or 5m") from None


def _print(record: TuningRecord) -> None:
    rows = []
    for item in record.measured:
        chosen = "chosen" if record.components[item.component] == item.choice else ""
        times: list[Any] = ["-", "-"]
        if item.seconds:
            times = [f"{statistics.median(item.seconds):.4f}", f"{min(item.seconds):.4f}"]
        error = small(item.relative_l2) if item.seconds else "-"
        shown = [item.choice.engine, str(item.choice.threads), item.choice.form, *times, str(len(item.seconds)), error]
        rows.append([item.component, *shown, item.refused or chosen])
    print_table(["component", "engine", "threads", "graph", "median s", "best s", "runs", "rel. L2", ""], rows)
    if record.guidance_seconds is not None:
        one, two = record.guidance_seconds
        best = "one batch" if record.guidance_together else "two"
        print_line(f"guidance: {one:.4f} s a step as one batch of two, {two:.4f} s as two; {best} is chosen")
    print_line(f"{record.width}×{record.height} px on {record.machine}")
