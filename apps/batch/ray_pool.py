"""Workers that are actors of a Ray cluster: the bundle travels to each node once, the pictures come back."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedit.apps.batch.pool import Message
from edgedit.apps.batch.worker import WorkerSettings, identity_of, open_pipeline
from edgedit.errors import EdgeditError, RuntimeUnavailableError

__all__ = ["RayPool", "cluster_cores", "connect"]


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RuntimeUnavailableError(f'ray cannot be imported ({error}); run: pip install "edgedit[ray]"') from error
    return ray


def connect(address: str | None) -> None:
    """Join the cluster at `address`, that of RAY_ADDRESS, or a new one on this machine.

    Raises RuntimeUnavailableError when ray is not installed or the cluster does not answer.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RuntimeUnavailableError(
            f"no Ray cluster answers at {address or 'the local address'} ({reason}); start one with: ray start --head"
        ) from error


def cluster_cores() -> int:
    """Processors of the whole cluster."""
    return int(_ray().cluster_resources().get("CPU", 1))


def _pack(bundle: Path) -> bytes:
    """The bundle as one tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(bundle.resolve(), arcname=".")
    return buffer.getvalue()


def _unpack(data: bytes, model_hash: str) -> Path:
    """The bundle on this node, unpacked by whichever actor comes first."""
    folder = Path(tempfile.gettempdir()) / f"edgedit-ray-{os.getuid() if hasattr(os, 'getuid') else 0}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{model_hash[:32]}.edgedit"
    if not target.exists():
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(partial, filter="data")
        try:
            partial.rename(target)
        except OSError:
            import shutil

            # Another actor of this node was first.
            shutil.rmtree(partial, ignore_errors=True)
            if not target.exists():
                raise
    return target


class _ReturningSink:
    """Sends pictures back to the coordinator, which has the output folder."""

    def picture(self, path: str, data: bytes) -> dict[str, Any]:
        return {"data": data}

    def save_latents(self, key: str, latents: Any) -> None:
        """The node may be gone before another attempt begins, so nothing is kept on it."""

    def latents(self, key: str, shape: tuple[int, ...]) -> None:
        """Nothing was kept."""


class _RayWorker:
    """What an actor runs. Every method returns (event, facts) pairs for the coordinator."""

    def __init__(self, settings: WorkerSettings, bundle: bytes) -> None:
        from edgedit.apps.batch.studio import Studio

        place = _unpack(bundle, settings.model_hash)
        self._events: list[tuple[str, dict[str, Any]]] = []
        settings = replace(settings, bundle=place)
        pipe = open_pipeline(settings, place.parent / "embeddings")
        self._runtime = dict(pipe.runtime.describe())
        self._studio = Studio(
            pipe,
            _ReturningSink(),
            lambda event, facts: self._events.append((event, facts)),
            identity=identity_of(settings, self._runtime),
            overlap=False,
            free_encoder=settings.free_encoder,
        )

    def ready(self) -> list[tuple[str, dict[str, Any]]]:
        """The model is open."""
        return [("ready", {"runtime": self._runtime})]

    def encode(self, prompts: Any) -> list[tuple[str, dict[str, Any]]]:
        """Encode prompts."""
        return [("encoded", {"prompts": self._studio.encode(prompts)})]

    def draw(self, pictures: Any, batch: int) -> list[tuple[str, dict[str, Any]]]:
        """Draw pictures; their bytes are in the events."""
        self._events.clear()
        self._studio.draw(pictures, batch)
        return [*self._events, ("ready", {})]


class RayPool:
    """Actors with `threads` processors each. Connect first (`connect`)."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._ray = _ray()
        self.settings = settings
        self._bundle = self._ray.put(_pack(settings.bundle))
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}
        self._told: deque[Message] = deque()
        self._count = 0

    def start(self) -> int:
        """Ask for an actor; it starts wherever the cluster has room."""
        self._count += 1
        actor = self._ray.remote(num_cpus=self.settings.threads, max_restarts=0)(_RayWorker)
        self._actors[self._count] = actor.remote(self.settings, self._bundle)
        self._pending[self._actors[self._count].ready.remote()] = self._count
        return self._count

    def send(self, worker: int, task: Any) -> None:
        """Give an actor a task."""
        actor = self._actors.get(worker)
        if actor is None:
            return
        if task is None:
            self.kill(worker)
            return
        if task[0] == "encode":
            self._pending[actor.encode.remote(task[1])] = worker
        else:
            self._told.append(Message(worker, "start", {"indices": [picture.index for picture in task[1]]}))
            self._pending[actor.draw.remote(task[1], task[2])] = worker

    def poll(self, timeout: float) -> list[Message]:
        """What actors have finished."""
        found = list(self._told)
        self._told.clear()
        if not self._pending:
            if not found:
                time.sleep(timeout)
            return found
        done, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=0 if found else timeout)
        for reference in done:
            worker = self._pending.pop(reference)
            try:
                found += [Message(worker, event, facts) for event, facts in self._ray.get(reference)]
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, EdgeditError) else error
                found.append(Message(worker, "fatal", {"message": " ".join(str(cause).split())[-300:]}))
            except self._ray.exceptions.RayError as error:
                self._actors.pop(worker, None)
                reason = " ".join(str(error).split())[:120]
                found.append(Message(worker, "died", {"how": f"the Ray worker was lost ({reason})"}))
        return found

    def kill(self, worker: int) -> None:
        """Kill an actor."""
        actor = self._actors.pop(worker, None)
        if actor is None:
            return
        self._ray.kill(actor)
        if worker not in self._pending.values():
            self._told.append(Message(worker, "died", {"how": "the Ray worker was ended"}))

    def kill_all(self) -> None:
        """Kill every actor."""
        for worker in list(self._actors):
            self.kill(worker)
        self._pending.clear()
