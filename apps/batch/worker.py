"""A worker process: one pipeline of its own, the weights shared with the others through the page cache."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from edgedit.apps.batch.places import Places
from edgedit.errors import EdgeditError

__all__ = ["LocalSink", "WorkerSettings", "identity_of", "open_pipeline", "run_worker"]

#: Bytes of encoded prompts that are kept on disk.
EMBEDDINGS_LIMIT = 8 << 30


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a run has in common.

    Attributes:
        threads: threads within an operator, of each worker.
        low_ram: one component in memory at a time.
        free_encoder: free the text encoder whenever the prompts at hand are encoded.
        memory: bytes of private memory that a worker may take; None sets no limit.
    """

    root: Path
    bundle: Path
    model_hash: str
    backend: str = "auto"
    providers: tuple[str, ...] = ()
    threads: int = 1
    low_ram: bool = False
    decoder: str = "full"
    free_encoder: bool = False
    memory: int | None = None


def identity_of(settings: WorkerSettings, runtime: dict[str, str]) -> str:
    """Names everything besides the job that a picture's bytes may depend on."""
    machine = f"threads={settings.threads} low_ram={settings.low_ram} decoder={settings.decoder}"
    return f"{settings.model_hash} {sorted(runtime.items())} {machine}"


def open_pipeline(settings: WorkerSettings, embeddings: Path) -> Any:
    """A pipeline on the bundle. Raises BundleError when the bundle is not the one that the run began with."""
    import edgedit
    from edgedit.embeddings import EmbeddingCache
    from edgedit.errors import BundleError

    pipe = edgedit.load(
        settings.bundle,
        settings.backend,
        threads=settings.threads,
        providers=settings.providers or None,
        low_ram=settings.low_ram,
        decoder=settings.decoder,
        # What was measured fastest differs from machine to machine, and pictures of one batch are drawn alike.
        engine=None,
    )
    if pipe.bundle.model_hash != settings.model_hash:
        raise BundleError(f"{settings.bundle}: was replaced during the run; put the bundle back and start again")
    pipe.prompt_encoder.embeddings = EmbeddingCache(embeddings, EMBEDDINGS_LIMIT)
    return pipe


class LocalSink:
    """Writes to the output folder of this machine."""

    def __init__(self, root: Path) -> None:
        from edgedit.apps.batch.store import Store

        self._store = Store(Places(root), f"w{os.getpid()}")
        self.save_latents, self.latents = self._store.save_latents, self._store.latents

    def picture(self, path: str, data: bytes) -> dict[str, Any]:
        self._store.save(path, data)
        return {}


def _die_with_parent() -> None:
    """A killed coordinator must leave no worker that goes on writing."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _limit_memory(size: int | None) -> None:
    """Make an allocation beyond the limit fail, instead of the whole machine running out. Where the system can."""
    if size is None:
        return
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


def run_worker(connection: Connection, settings: WorkerSettings) -> None:
    """Serve ("encode", prompts), ("draw", pictures, batch) and None (end) until the coordinator has no more."""
    # Ctrl-C in a terminal reaches every process; only the coordinator decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent()
    _limit_memory(settings.memory)
    lock = threading.Lock()

    def told(event: str, facts: dict[str, Any]) -> None:
        with lock:
            connection.send((event, facts))

    try:
        from edgedit.apps.batch.studio import Studio

        pipe = open_pipeline(settings, Places(settings.root).embeddings)
        runtime = dict(pipe.runtime.describe())
        studio = Studio(
            pipe,
            LocalSink(settings.root),
            told,
            identity=identity_of(settings, runtime),
            overlap=not settings.low_ram,
            free_encoder=settings.free_encoder,
        )
    except EdgeditError as error:
        told("fatal", {"message": str(error)})
        return
    told("ready", {"runtime": runtime})
    try:
        while (task := connection.recv()) is not None:
            if task[0] == "encode":
                told("encoded", {"prompts": studio.encode(task[1])})
            else:
                studio.draw(task[1], task[2])
                told("ready", {})
    except EOFError:
        return
    studio.close()
    told("bye", {})
