"""What a batch says while it runs: a bar on a terminal, lines in a log, JSON events for programs, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["BarReporter", "EventReporter", "LineReporter", "Reporter", "make_reporter"]

#: Seconds of the past that the rate is taken from, and seconds between two lines in a log.
WINDOW, INTERVAL = 120.0, 10.0
#: Failures that are shown as they happen; the rest are for the report.
SHOWN = 10


@dataclass
class Reporter:
    """The quiet one: warnings only. It keeps count of what the others show.

    Attributes:
        total, done, failed: pictures of the ledger, those finished in earlier runs included.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    drawn: int = 0
    _times: deque[float] = field(default_factory=deque)

    def reading(self, line: int) -> None:
        """The job file is being read."""

    def begin(self, *, total: int, done: int, failed: int, workers: int) -> None:
        """The run begins."""
        self.total, self.done, self.failed = total, done, failed
        self._times.append(time.monotonic())

    def picture(self, entry: Mapping[str, Any]) -> None:
        """A picture is recorded."""
        self.done += 1
        self.drawn += 1
        self._times.append(time.monotonic())
        while len(self._times) > 2 and self._times[-1] - self._times[0] > WINDOW:
            self._times.popleft()

    def failure(self, identity: str, seed: int, error: str, *, final: bool) -> None:
        """An attempt failed."""
        if final:
            self.failed += 1

    def step(self, identity: str, step: int, steps: int) -> None:
        """A picture has come so far."""

    def warn(self, text: str) -> None:
        """Something that the user may not have meant."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Something worth knowing."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is over."""

    @property
    def rate(self) -> float | None:
        """Pictures a second, lately; None before the second one."""
        if len(self._times) < 3:
            return None
        return (len(self._times) - 1) / max(time.monotonic() - self._times[0], 1e-6)

    def line(self) -> str:
        """Where the run stands, in words."""
        words = [f"{self.done:,} of {self.total:,}"]
        if self.failed:
            words.append(f"{self.failed:,} failed")
        rate = self.rate
        if rate:
            words += [_rate(rate), f"{_duration((self.total - self.done - self.failed) / rate)} left"]
        return ", ".join(words)


@dataclass
class LineReporter(Reporter):
    """Lines on stderr: failures, and every few seconds where the run stands."""

    _spoke: float = field(default_factory=time.monotonic)
    _failures: int = 0

    def reading(self, line: int) -> None:
        if time.monotonic() - self._spoke > INTERVAL:
            self._spoke = time.monotonic()
            self.say(f"reading line {line:,}")

    def begin(self, *, total: int, done: int, failed: int, workers: int) -> None:
        super().begin(total=total, done=done, failed=failed, workers=workers)
        self.say(f"{self.line()}, {workers} workers")

    def picture(self, entry: Mapping[str, Any]) -> None:
        super().picture(entry)
        if time.monotonic() - self._spoke > INTERVAL:
            self._spoke = time.monotonic()
            self.say(self.line())

    def failure(self, identity: str, seed: int, error: str, *, final: bool) -> None:
        super().failure(identity, seed, error, final=final)
        self._failures += 1
        if self._failures <= SHOWN:
            self.say(f"{'failed' if final else 'will try again'}: {identity} (seed {seed}): {error}")
        elif self._failures == SHOWN + 1:
            self.say("more failures are in the report only")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def end(self, summary: Mapping[str, Any]) -> None:
        self.say(f"{summary['drawn']:,} drawn in {_duration(summary['seconds'])}: {self.line()}")


@dataclass
class BarReporter(LineReporter):
    """One bar on a terminal, with rate, time left, failures and the picture under way."""

    _bar: Progress | None = None
    _task: TaskID | None = None
    _now: str = ""

    def begin(self, *, total: int, done: int, failed: int, workers: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        Reporter.begin(self, total=total, done=done, failed=failed, workers=workers)
        self._bar = Progress(
            BarColumn(bar_width=30),
            TextColumn("{task.fields[status]}", markup=False),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total, completed=done + failed, status=self.line())

    def picture(self, entry: Mapping[str, Any]) -> None:
        Reporter.picture(self, entry)
        self._show()

    def step(self, identity: str, step: int, steps: int) -> None:
        self._now = f"{identity} {step}/{steps}"
        self._show()

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            super().say(text)

    def end(self, summary: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        super().end(summary)

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            status = f"{self.line()}{f', now {self._now}' if self._now else ''}"
            self._bar.update(self._task, completed=self.done + self.failed, status=status)


@dataclass
class EventReporter(Reporter):
    """One JSON object a line on stdout."""

    def begin(self, *, total: int, done: int, failed: int, workers: int) -> None:
        super().begin(total=total, done=done, failed=failed, workers=workers)
        self._emit("start", total=total, done=done, failed=failed, workers=workers)

    def picture(self, entry: Mapping[str, Any]) -> None:
        super().picture(entry)
        rate = self.rate
        self._emit("picture", **entry, done=self.done, total=self.total, rate=None if rate is None else round(rate, 4))

    def failure(self, identity: str, seed: int, error: str, *, final: bool) -> None:
        super().failure(identity, seed, error, final=final)
        self._emit("failed" if final else "retrying", id=identity, seed=seed, error=error)

    def step(self, identity: str, step: int, steps: int) -> None:
        self._emit("step", id=identity, step=step, steps=steps)

    def warn(self, text: str) -> None:
        self._emit("warning", message=text)

    def end(self, summary: Mapping[str, Any]) -> None:
        self._emit("done", **summary)

    @staticmethod
    def _emit(event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), flush=True)


def make_reporter(*, quiet: bool = False, events: bool = False) -> Reporter:
    """The reporter that fits the flags and the place where stderr leads."""
    if events:
        return EventReporter()
    if quiet:
        return Reporter()
    return BarReporter() if sys.stderr.isatty() else LineReporter()


def _rate(rate: float) -> str:
    return f"{rate:.1f} a second" if rate >= 1 else f"{rate * 60:.1f} a minute"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
