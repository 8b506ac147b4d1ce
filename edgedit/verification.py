"""Is a bundle whole, and does it compute here what it computed where it was converted?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.bundle import Bundle, open_bundle
from edgedit.errors import BundleError
from edgedit.metrics import Agreement, compare

__all__ = ["TOLERANCES", "ComponentCheck", "VerificationReport", "verify"]

#: Relative L2 that a component may be off its canonical fp32 graph, by precision of its weights.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "w8": 0.1, "w8a8": 0.2, "w4": 0.5}


@dataclass(frozen=True)
class ComponentCheck:
    """One component run on this machine. `agreement` is None when the bundle holds no reference for it."""

    name: str
    backend: str
    precision: str
    against: str
    agreement: Agreement | None
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found. Damaged files raise BundleError instead; they make everything else moot."""

    bundle: Path
    files: int
    components: list[ComponentCheck]
    notes: list[str]

    @property
    def passed(self) -> bool:
        """Whether every component that could be checked agrees."""
        return all(check.passed for check in self.components)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bundle": str(self.bundle), "passed": self.passed}


def verify(
    path: str | Path,
    *,
    backend: str = "auto",
    threads: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> VerificationReport:
    """Check every file's hash, then run every component on the inputs that the conversion recorded.

    A component is compared with the outputs of its canonical fp32 graph, recorded at conversion. Where none were
    recorded (large models, by default), the form that this backend runs is compared with the bundle's canonical graph,
    run here.

    Raises:
        BundleError: a file is missing or damaged, or a component cannot be opened.
    """
    bundle = open_bundle(path)
    total = len(bundle.manifest.files)
    done = 0

    def counted(_: str) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress("files", done, total)

    bundle.verify(on_file=counted)
    base = import_module("edgedit.runtimes.base")
    runtime = base.open_runtime(bundle, backend, base.RuntimeOptions(threads=threads))
    checks, notes = [], []
    for index, name in enumerate(bundle.manifest.components):
        if on_progress is not None:
            on_progress(name, index, len(bundle.manifest.components))
        check = _check(bundle, runtime, name)
        if check.agreement is None:
            notes.append(
                f"{name}: the bundle holds no reference inputs, so only its files were checked; convert it again"
            )
        checks.append(check)
    return VerificationReport(bundle=bundle.path, files=total, components=checks, notes=notes)


def _check(bundle: Bundle, runtime: Any, name: str) -> ComponentCheck:
    precision = bundle.artefact(name, runtime.name).precision
    tolerance = TOLERANCES.get(precision, 1.0)
    against = "canonical fp32 graph, recorded at conversion"
    recorded = _reference(bundle, name)
    agreement = None
    if recorded is not None:
        inputs, outputs = recorded
        if not outputs:
            against, tolerance = "canonical graph of this bundle, run here", TOLERANCES["fp32"]
            outputs = _run(runtime.open_canonical(name), inputs)
        found = _run(runtime.open(name), inputs)
        agreement = max((compare(found[key], value) for key, value in outputs.items()), key=lambda a: a.relative_l2)
    return ComponentCheck(
        name=name,
        backend=runtime.name,
        precision=precision,
        against=against,
        agreement=agreement,
        tolerance=tolerance,
        passed=agreement is None or agreement.relative_l2 <= tolerance,
    )


def _run(session: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        result: dict[str, np.ndarray] = session.run(inputs)
        return result
    finally:
        session.close()


def _reference(bundle: Bundle, name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
    relative = f"reference/{name}.npz"
    if relative not in bundle.manifest.files:
        return None
    try:
        with np.load(bundle.file(relative), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"{bundle.path}: {relative} cannot be read ({error}); convert the model again") from error
    inputs = {key[3:]: value for key, value in arrays.items() if key.startswith("in.")}
    outputs = {key[4:]: value for key, value in arrays.items() if key.startswith("out.")}
    return inputs, outputs
