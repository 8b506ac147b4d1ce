"""What a benchmark found, and how it is put together from what the processes of the contenders wrote."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.bench.contenders import ContenderPlan
from edgedit.errors import InputError
from edgedit.metrics import Agreement, compare

__all__ = ["BenchmarkReport", "ComponentTimes", "ContenderReport", "make_reports"]


@dataclass(frozen=True)
class ComponentTimes:
    """Seconds of one component of one contender.

    Attributes:
        cold_seconds: opening it in a new process, median of the rounds; files may still be in the system's memory.
        warm_seconds: opening it once more in the same process.
        first_seconds: the first evaluation, median of the rounds.
        seconds: every later evaluation, of all rounds.
        ratio: median of this contender over that of the bundle: above 1 the bundle is faster.
        peak_rss: most resident bytes while it was opened and run, the largest of the rounds; None where the system
            does not tell.
        joules: of the processor packages, an evaluation; None where the system does not tell.
        agreement: of the output with that of `BenchmarkReport.reference`; None for the reference itself.
    """

    name: str
    precision: str
    shapes: dict[str, list[int]]
    cold_seconds: float
    warm_seconds: float
    first_seconds: float
    seconds: list[float]
    ratio: float
    peak_rss: int | None
    joules: float | None
    agreement: Agreement | None

    @property
    def median_seconds(self) -> float:
        """Median of `seconds`."""
        return statistics.median(self.seconds)

    @property
    def best_seconds(self) -> float:
        """Least of `seconds`."""
        return min(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "median_seconds": self.median_seconds, "best_seconds": self.best_seconds}


@dataclass(frozen=True)
class ContenderReport:
    """One contender. `start_seconds`: from starting its process to being ready to open, imports included."""

    label: str
    runtime: dict[str, str]
    start_seconds: float
    components: list[ComponentTimes]


@dataclass(frozen=True)
class BenchmarkReport:
    """What `benchmark` measured. The bundle is the first contender; `reference` is the label of the one whose outputs
    the others' are compared with, None when there is one contender only."""

    bundle: Path
    width: int
    height: int
    batch: int
    length: int
    repeat: int
    rounds: int
    reference: str | None
    contenders: list[ContenderReport] = field(default_factory=list)

    @property
    def components(self) -> list[ComponentTimes]:
        """Those of the bundle."""
        return self.contenders[0].components

    @property
    def runtime(self) -> dict[str, str]:
        """What ran the bundle."""
        return self.contenders[0].runtime

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        contenders = [
            {**asdict(item), "components": [part.as_dict() for part in item.components]} for item in self.contenders
        ]
        first = contenders[0]
        return {
            **asdict(self),
            "bundle": str(self.bundle),
            "runtime": first["runtime"],
            "components": first["components"],
            "contenders": contenders,
        }


def make_reports(
    plans: Sequence[ContenderPlan],
    found: Sequence[Sequence[Mapping[str, Any]]],
    names: Sequence[str],
    folder: Path,
    reference: int | None,
) -> list[ContenderReport]:
    """One report for each plan from the results of its rounds; `folder` holds a folder of outputs for each plan, by
    number, and `reference` is the number of the plan that the others' are compared with.

    Raises InputError when the outputs of two contenders have different shapes.
    """
    medians: dict[str, float] = {}
    reports = []
    for index, (plan, rounds) in enumerate(zip(plans, found, strict=True)):
        parts = []
        for position, name in enumerate(names):
            stages = [turn["stages"][position] for turn in rounds]
            seconds = [second for stage in stages for second in stage["seconds"]]
            median = statistics.median(seconds)
            agreement = None
            if reference is not None and index != reference:
                agreement = _agreement(folder, name, index, reference, plans)
            peaks = [stage["peak_rss"] for stage in stages if stage["peak_rss"] is not None]
            joules = [stage["joules"] for stage in stages if stage["joules"] is not None]
            parts.append(
                ComponentTimes(
                    name=name,
                    precision=stages[0]["precision"],
                    shapes=stages[0]["shapes"],
                    cold_seconds=statistics.median(stage["cold_seconds"] for stage in stages),
                    warm_seconds=statistics.median(stage["warm_seconds"] for stage in stages),
                    first_seconds=statistics.median(stage["first_seconds"] for stage in stages),
                    seconds=seconds,
                    ratio=median / medians.setdefault(name, median),
                    peak_rss=max(peaks, default=None),
                    joules=statistics.median(joules) if joules else None,
                    agreement=agreement,
                )
            )
        start = statistics.median(turn["start_seconds"] for turn in rounds)
        reports.append(ContenderReport(plan.label, rounds[0]["runtime"], start, parts))
    return reports


def _agreement(folder: Path, name: str, index: int, reference: int, plans: Sequence[ContenderPlan]) -> Agreement:
    value, wanted = (np.load(folder / str(one) / f"{name}.npy") for one in (index, reference))
    if value.shape != wanted.shape:
        raise InputError(
            f"{plans[index].label}: its {name} gives {list(value.shape)}, that of {plans[reference].label} "
            f"{list(wanted.shape)}; they are not of the same model"
        )
    return compare(value, wanted)
