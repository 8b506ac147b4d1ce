"""What `edgedit tune` found for one bundle on this machine, kept in the cache folder.

A record belongs to the processor, the number of cores, the bundle's hash and the versions of the engines: with any of
them changed there is no record, and the defaults hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from edgedit.bundle import Bundle
from edgedit.device import available_cores, cache_dir, processor_name
from edgedit.files import atomic_write_bytes

__all__ = ["FORMS", "ComponentChoice", "Measured", "TuningRecord", "forget", "load", "record_path", "save"]

#: How a graph is run: ONNX Runtime has a form for the CPU beside the standard one, where a bundle holds it.
FORMS = ("standard", "cpu")
#: Guidance as measured holds for pictures of this many times the tokens, up or down.
_GUIDANCE_REACH = 2.0
_VERSION = 1
_ENGINES = ("onnxruntime", "openvino")
_log = logging.getLogger("edgedit")


@dataclass(frozen=True)
class ComponentChoice:
    """What runs a component: an engine of the `onnx` backend, its threads and the form of the graph."""

    engine: str
    threads: int
    form: str

    def __str__(self) -> str:
        plural = "s" if self.threads > 1 else ""
        return f"{self.engine}, {self.threads} thread{plural}, {self.form} graph"


@dataclass(frozen=True)
class Measured:
    """One candidate: seconds of its evaluations, and the relative L2 of its output to the standard graph's in ONNX
    Runtime. `refused` says why it could not be chosen, None where it could."""

    component: str
    choice: ComponentChoice
    seconds: tuple[float, ...]
    relative_l2: float
    refused: str | None = None


@dataclass(frozen=True)
class TuningRecord:
    """What was found, at what size.

    Attributes:
        components: component → what is fastest.
        tokens: latent tokens of the size it was measured at.
        guidance_together: whether guidance is faster as one batch of two; None where it was not measured.
        guidance_seconds: of a step in one batch and in two, medians; None likewise.
    """

    width: int
    height: int
    tokens: int
    components: Mapping[str, ComponentChoice]
    guidance_together: bool | None = None
    guidance_seconds: tuple[float, float] | None = None
    measured: tuple[Measured, ...] = field(default=())
    machine: str = ""

    def guides_together(self, tokens: int) -> bool | None:
        """Whether guidance runs as one batch at this many latent tokens; None where that is too far from what was
        measured."""
        near = self.tokens / _GUIDANCE_REACH <= tokens <= self.tokens * _GUIDANCE_REACH
        return self.guidance_together if near else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"version": _VERSION, **asdict(self)}


def machine() -> str:
    """Processor, cores and engines, as they identify a record."""
    versions = []
    for name in ("edgedit", *_ENGINES):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{processor_name()}, {available_cores()} cores, {', '.join(versions)}"


def record_path(bundle: Bundle) -> Path:
    """Where the record of `bundle` on this machine is, or would be."""
    key = hashlib.sha256(f"{bundle.model_hash}\n{machine()}".encode()).hexdigest()[:32]
    return cache_dir() / "tuning" / f"{key}.json"


def load(bundle: Bundle) -> TuningRecord | None:
    """The record of `bundle`, None when there is none. A damaged one is ignored, with one line to the log."""
    path = record_path(bundle)
    try:
        data = path.read_bytes()
    except OSError:
        return None
    try:
        return _parse(json.loads(data), bundle)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _log.warning(
            "the record of what is fastest here (%s) is damaged and was ignored; make it again with: edgedit tune %s",
            path,
            bundle.path,
        )
        return None


def save(bundle: Bundle, record: TuningRecord) -> Path:
    """Write the record, whole or not at all, and say where. Raises InputError when the place cannot be written."""
    path = record_path(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, (json.dumps(record.as_dict(), indent=2) + "\n").encode())
    return path


def forget(bundle: Bundle) -> bool:
    """Remove the record, damaged or not. False when there was none."""
    path = record_path(bundle)
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def _parse(document: Any, bundle: Bundle) -> TuningRecord:
    if document["version"] != _VERSION:
        raise ValueError("another version")
    chosen = {str(name): _choice(item) for name, item in document["components"].items()}
    if not chosen or not chosen.keys() <= bundle.manifest.components.keys():
        raise ValueError("other components")
    together, seconds = document["guidance_together"], document["guidance_seconds"]
    if together is not None and not isinstance(together, bool):
        raise ValueError("no truth value")
    return TuningRecord(
        width=int(document["width"]),
        height=int(document["height"]),
        tokens=int(document["tokens"]),
        components=chosen,
        guidance_together=together,
        guidance_seconds=None if seconds is None else (float(seconds[0]), float(seconds[1])),
        measured=tuple(
            Measured(
                str(item["component"]),
                _choice(item["choice"]),
                tuple(float(second) for second in item["seconds"]),
                float(item["relative_l2"]),
                None if item["refused"] is None else str(item["refused"]),
            )
            for item in document["measured"]
        ),
        machine=str(document["machine"]),
    )


def _choice(item: Any) -> ComponentChoice:
    choice = ComponentChoice(str(item["engine"]), int(item["threads"]), str(item["form"]))
    if choice.engine not in _ENGINES or choice.form not in FORMS or choice.threads < 1:
        raise ValueError("no such choice")
    return choice
