"""Ctrl-C: the first lets what is under way finish, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interrupt"]


class Interrupt:
    """Within its block the first of `signals` sets `requested` and the second raises KeyboardInterrupt.

    A signal that is ignored (SIGINT under nohup) stays so, and outside the main thread nothing is changed.

    Args:
        what: what is finished after the first, for the message.
    """

    def __init__(self, what: str = "this step", signals: Sequence[signal.Signals] = (signal.SIGINT,)) -> None:
        self.requested = False
        self._what, self._signals = what, signals
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def checkpoint(self) -> None:
        """A place where stopping loses nothing. Raises KeyboardInterrupt when it was asked for."""
        if self.requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\nstopping after {self._what}; press Ctrl-C again to stop at once\n".encode())
