"""Workers of a batch as threads of the test: the same drawing without the seconds that a process takes to start."""

from __future__ import annotations

import queue
import threading
from typing import Any

from edgedit.apps.batch.places import Places
from edgedit.apps.batch.pool import Message
from edgedit.apps.batch.studio import Studio
from edgedit.apps.batch.worker import LocalSink, WorkerSettings, identity_of, open_pipeline


class InlinePool:
    """Serves the tasks of `edgedit.apps.batch.worker` in threads; `kill` only stops listening to one."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.told: queue.Queue[Message] = queue.Queue()
        self.tasks: dict[int, queue.Queue[Any]] = {}
        self.gone: set[int] = set()

    def start(self) -> int:
        number = len(self.tasks) + 1
        self.tasks[number] = queue.Queue()
        threading.Thread(target=self._serve, args=(number,), daemon=True).start()
        return number

    def _serve(self, number: int) -> None:
        def told(event: str, facts: dict[str, Any]) -> None:
            self.told.put(Message(number, event, facts))

        pipe = open_pipeline(self.settings, Places(self.settings.root).embeddings)
        runtime = dict(pipe.runtime.describe())
        studio = Studio(
            pipe,
            LocalSink(self.settings.root),
            told,
            identity=identity_of(self.settings, runtime),
            overlap=not self.settings.low_ram,
            free_encoder=self.settings.free_encoder,
        )
        told("ready", {"runtime": runtime})
        while (task := self.tasks[number].get()) is not None:
            if task[0] == "encode":
                told("encoded", {"prompts": studio.encode(task[1])})
            else:
                studio.draw(task[1], task[2])
                told("ready", {})
        studio.close()
        told("died", {"how": "the worker ended"})

    def send(self, worker: int, task: Any) -> None:
        self.tasks[worker].put(task)

    def poll(self, timeout: float) -> list[Message]:
        try:
            message = self.told.get(timeout=timeout)
        except queue.Empty:
            return []
        return [] if message.worker in self.gone else [message]

    def kill(self, worker: int) -> None:
        self.told.put(Message(worker, "died", {"how": "the worker was killed"}))
        self.gone.add(worker)

    def kill_all(self) -> None:
        for tasks in self.tasks.values():
            tasks.put(None)
