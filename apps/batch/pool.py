"""Workers as the coordinator sees them, and the ones that are processes of this machine."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from edgedit.apps.batch.worker import WorkerSettings, run_worker

__all__ = ["LocalPool", "Message", "Pool"]


@dataclass(frozen=True)
class Message:
    """What worker `worker` told: "ready", "start", "step", "done", "failed", "encoded", "fatal", "bye", or "died"."""

    worker: int
    event: str
    facts: dict[str, Any]


class Pool(Protocol):
    """Workers that can be started, given tasks, and lost."""

    def start(self) -> int:
        """Start a worker and return its number."""
        ...

    def send(self, worker: int, task: Any) -> None:
        """Give a worker a task; None ends it when it is done. A worker that is gone is noticed by `poll`."""
        ...

    def poll(self, timeout: float) -> Sequence[Message]:
        """What was told since the last call, after waiting up to `timeout` seconds for something."""
        ...

    def kill(self, worker: int) -> None:
        """End a worker at once. `poll` then says that it died."""
        ...

    def kill_all(self) -> None:
        """End every worker at once and wait until they are gone."""
        ...


class LocalPool:
    """Worker processes on this machine."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        # Not fork: a forked child would share the parent's ledger, threads and signal handlers.
        self._context = multiprocessing.get_context("spawn")
        self._count = 0
        self._processes: dict[int, multiprocessing.process.BaseProcess] = {}
        self._connections: dict[int, Connection] = {}

    def start(self) -> int:
        """Start a process."""
        self._count += 1
        here, there = self._context.Pipe()
        process = self._context.Process(
            target=run_worker, args=(there, self.settings), name=f"edgedit-worker-{self._count}", daemon=True
        )
        process.start()
        there.close()
        self._processes[self._count], self._connections[self._count] = process, here
        return self._count

    def send(self, worker: int, task: Any) -> None:
        """Give a process a task."""
        try:
            self._connections[worker].send(task)
        except (OSError, KeyError):
            return

    def poll(self, timeout: float) -> list[Message]:
        """Read every pipe that has something to say."""
        if not self._connections:
            time.sleep(timeout)
            return []
        numbers = {connection: number for number, connection in self._connections.items()}
        found = []
        for connection in wait(list(numbers), timeout):
            number = numbers[connection]  # type: ignore[index]
            try:
                while self._connections[number].poll():
                    found.append(Message(number, *self._connections[number].recv()))
            except (EOFError, OSError):
                found.append(Message(number, "died", {"how": self._bury(number)}))
        return found

    def _bury(self, number: int) -> str:
        self._connections.pop(number).close()
        process = self._processes.pop(number)
        process.join(5)
        code = process.exitcode
        process.close()
        if code is not None and code < 0:
            hint = ", probably for want of memory" if code == -9 else ""
            return f"the worker was killed by signal {-code}{hint}"
        return f"the worker ended with status {code}"

    def kill(self, worker: int) -> None:
        """Kill a process."""
        if worker in self._processes:
            self._processes[worker].kill()

    def kill_all(self) -> None:
        """Kill every process."""
        for process in self._processes.values():
            process.kill()
        for number in list(self._processes):
            self._bury(number)
