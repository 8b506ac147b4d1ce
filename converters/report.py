"""What a conversion did, for people and for JSON."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgedit.converters.checkpoint import Checkpoint
from edgedit.converters.families import Family
from edgedit.converters.jobs import Job

__all__ = ["ArtefactReport", "ComponentReport", "ConversionReport", "report_on"]


@dataclass(frozen=True)
class ArtefactReport:
    """One backend's form of a component: bytes in the bundle, 0 in a dry run; `parity` is None when not measured."""

    backend: str
    precision: str
    size: int
    parity: dict[str, Any] | None


@dataclass(frozen=True)
class ComponentReport:
    """What became of one component: `artefacts` by backend, and their total size.

    `precision` and `parity` are those of the first backend; `parity` is None when not measured.
    """

    name: str
    architecture: str
    class_name: str
    parameters: int
    size: int
    precision: str
    dropped: list[tuple[str, str]]
    parity: dict[str, Any] | None
    artefacts: list[ArtefactReport]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. `bundle` is None in a dry run."""

    bundle: Path | None
    family: str
    pipeline_class: str | None
    components: list[ComponentReport]
    notes: list[str]
    seconds: float

    @property
    def size(self) -> int:
        """Bytes of all components in the bundle."""
        return sum(component.size for component in self.components)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bundle": None if self.bundle is None else str(self.bundle), "size": self.size}


def report_on(
    bundle: Path | None,
    family: Family,
    checkpoint: Checkpoint,
    jobs: list[Job],
    notes: list[str],
    started: float,
) -> ConversionReport:
    return ConversionReport(
        bundle=bundle,
        family=family.name,
        pipeline_class=checkpoint.pipeline_class,
        components=[
            ComponentReport(
                name=job.name,
                architecture=job.component.architecture,
                class_name=job.source.class_name,
                parameters=job.parameters,
                size=sum(job.sizes.values()),
                precision=artefacts[0].precision,
                dropped=job.dropped,
                parity=artefacts[0].parity,
                artefacts=artefacts,
            )
            for job, artefacts in ((job, _artefacts(job)) for job in jobs)
        ],
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def _artefacts(job: Job) -> list[ArtefactReport]:
    return [
        ArtefactReport(
            backend,
            job.artefacts[backend].precision if backend in job.artefacts else precision,
            job.sizes.get(backend, 0),
            job.parity.get(backend),
        )
        for backend, precision in job.precisions.items()
    ]
