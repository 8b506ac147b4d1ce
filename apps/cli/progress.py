"""What a command says while it works: bars on a terminal, lines elsewhere, JSON events for programs, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Bars", "Events", "Lines", "Progress", "make_progress"]

#: Seconds between two lines about one stage where there is no terminal to redraw.
LINE_INTERVAL = 5.0


class Progress:
    """The quiet one: results on stdout, warnings on stderr, nothing in between. It keeps the time of every stage.

    Attributes:
        seconds: time spent by kind of stage, the first word of its name ("load", "encode", "denoise", "decode").
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name = ""
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def stage(self, name: str) -> None:
        """A stage begins, and the one before it ends."""
        self.finish()
        self._name = name

    def step(self, done: int, total: int, **facts: Any) -> None:
        """The stage has done `done` of `total`."""

    def say(self, text: str) -> None:
        """Something worth knowing that is no result."""

    def warn(self, text: str) -> None:
        """Something that the user may not have meant."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def result(self, event: Mapping[str, Any], text: str) -> None:
        """A result: `text` for people and pipes, `event` for programs."""
        print(text, flush=True)

    def done(self, summary: Mapping[str, Any]) -> None:
        """The command is done; figures for programs."""

    def finish(self) -> None:
        """The current stage, if any, is over."""
        now = time.monotonic()
        if self._name:
            kind = self._name.split()[0]
            self.seconds[kind] = self.seconds.get(kind, 0.0) + now - self._since
        self._name, self._since = "", now


class Lines(Progress):
    """Lines on stderr, for logs and pipes: one a stage, and one every few seconds of a long stage."""

    def __init__(self) -> None:
        super().__init__()
        self._spoke = 0.0

    def stage(self, name: str) -> None:
        super().stage(name)
        self._spoke = time.monotonic()
        self.say(name)

    def step(self, done: int, total: int, **facts: Any) -> None:
        if time.monotonic() - self._spoke >= LINE_INTERVAL:
            self._spoke = time.monotonic()
            self.say(f"{self._name}: {_amount(done, total)}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bars(Progress):
    """A bar a stage, on a terminal. It goes when the stage ends, so that only results stay."""

    def __init__(self) -> None:
        super().__init__()
        self._live: RichProgress | None = None
        self._task: TaskID | None = None

    def stage(self, name: str) -> None:
        super().stage(name)
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._live = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        self._task = self._live.add_task(name, total=None, amount="")

    def step(self, done: int, total: int, **facts: Any) -> None:
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, total=total or None, amount=_amount(done, total))

    def say(self, text: str) -> None:
        self._above(text)

    def warn(self, text: str) -> None:
        self._above(f"warning: {text}")

    def finish(self) -> None:
        super().finish()
        if self._live is not None:
            self._live.stop()
            self._live = self._task = None

    def result(self, event: Mapping[str, Any], text: str) -> None:
        self.finish()
        super().result(event, text)

    def _above(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


class Events(Progress):
    """One JSON object a line on stdout, and nothing else there."""

    def __init__(self, *, steps: bool = True) -> None:
        super().__init__()
        self._steps = steps

    def stage(self, name: str) -> None:
        super().stage(name)
        if self._steps:
            self._emit({"event": "stage", "name": name})

    def step(self, done: int, total: int, **facts: Any) -> None:
        if self._steps:
            self._emit({"event": "step", "stage": self._name, "step": done, "steps": total, **facts})

    def warn(self, text: str) -> None:
        self._emit({"event": "warning", "message": text})

    def result(self, event: Mapping[str, Any], text: str) -> None:
        self._emit(event)

    def done(self, summary: Mapping[str, Any]) -> None:
        self._emit({"event": "done", **summary})

    @staticmethod
    def _emit(event: Mapping[str, Any]) -> None:
        print(json.dumps(event), flush=True)


def make_progress(*, quiet: bool = False, events: bool = False) -> Progress:
    """The way to report that fits the flags and the place where stderr leads."""
    if events:
        return Events(steps=not quiet)
    if quiet:
        return Progress()
    return Bars() if sys.stderr.isatty() else Lines()


def _amount(done: int, total: int) -> str:
    """ "3/20", or megabytes where the numbers are bytes."""
    if total >= 1 << 20:
        return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB"
    return f"{done}/{total}"
