"""What a bundle can be timed against: names, what each needs to be installed, and how its process is told to begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgedit.bundle import open_bundle
from edgedit.errors import BundleError, InputError, RuntimeUnavailableError

__all__ = ["RIVALS", "ContenderPlan", "Rival", "bundle_plan", "rival_plans"]


@dataclass(frozen=True)
class Rival:
    """A tool that runs the checkpoint that a bundle was made from.

    Attributes:
        packages: modules that have to be there.
        install: how to get them.
        engine: what runs the graphs that are exported first; None for torch itself.
        precision: what it computes in.
    """

    packages: tuple[str, ...]
    install: str
    engine: str | None = None
    precision: str = "fp32"


_TORCH = ("torch", "diffusers", "transformers")
RIVALS: Mapping[str, Rival] = {
    "diffusers": Rival(_TORCH, "'edgedit[train]'"),
    "ort-export": Rival((*_TORCH, "onnxscript"), "'edgedit[train]'", "onnxruntime"),
    "openvino": Rival((*_TORCH, "openvino"), "'edgedit[train,openvino]'", "openvino"),
    "openvino-w8": Rival((*_TORCH, "openvino", "nncf"), "'edgedit[train,openvino]' nncf", "openvino", "w8"),
    "openvino-w8a8": Rival((*_TORCH, "openvino", "nncf"), "'edgedit[train,openvino]' nncf", "openvino", "w8a8"),
}
#: What may follow a bundle's path.
_ENGINES = ("auto", "onnxruntime", "openvino")


@dataclass
class ContenderPlan:
    """One contender: the function that opens it in its process, and the settings that it is given.

    `export` are settings of `edgedit.converters.training.rivals.export`, to be run once before; `folder` is then added
    to both.
    """

    label: str
    function: str
    settings: dict[str, Any]
    export: dict[str, Any] | None = None
    stages: Mapping[str, Path] = field(default_factory=dict)


def bundle_plan(path: Path, label: str, backend: str, engine: str, threads: int | None) -> ContenderPlan:
    """A bundle, run as `edgedit.load` would."""
    settings = {"path": str(path), "backend": backend, "engine": engine, "threads": threads}
    return ContenderPlan(label, "edgedit.bench.child:open_bundle_contender", settings)


def rival_plans(
    names: Sequence[str], bundle: Path, source: str | Path | None, backend: str, engine: str, threads: int | None
) -> list[ContenderPlan]:
    """One plan for each of `names`: a name of `RIVALS`, or the path of a bundle, PATH@ENGINE for another engine.

    Raises:
        InputError: neither the one nor the other, or a rival without `source`, the checkpoint's folder.
        RuntimeUnavailableError: a package that the rival needs is not installed.
    """
    plans = []
    for name in names:
        rival = RIVALS.get(name)
        if rival is None:
            plans.append(_other_bundle(name, backend, engine, threads))
            continue
        missing = [package for package in rival.packages if find_spec(package) is None]
        if missing:
            raise RuntimeUnavailableError(
                f"--vs {name} needs {', '.join(missing)}, not installed here; run: pip install {rival.install}"
            )
        folder = _source(name, bundle, source)
        if rival.engine is None:
            settings: dict[str, Any] = {"source": str(folder), "threads": threads}
            plans.append(ContenderPlan(name, "edgedit.converters.training.rivals:open_torch", settings))
        else:
            settings = {"engine": rival.engine, "threads": threads, "precision": rival.precision}
            export = {"source": str(folder), "engine": rival.engine, "precision": rival.precision, "label": name}
            plans.append(ContenderPlan(name, "edgedit.runtimes.exported:open_exported", settings, export))
    return plans


def _other_bundle(name: str, backend: str, engine: str, threads: int | None) -> ContenderPlan:
    path, _, own = name.rpartition("@")
    if own in _ENGINES and path:
        engine = own
    else:
        path = name
    try:
        other = open_bundle(path)
    except BundleError as error:
        if Path(path).exists():
            raise
        raise InputError(
            f"--vs {name}: choose one of {', '.join(RIVALS)}, or a bundle, as x.edgedit or x.edgedit@openvino"
        ) from error
    label = other.path.name if path == name else f"{other.path.name}@{engine}"
    return bundle_plan(other.path, label, backend, engine, threads)


def _source(name: str, bundle: Path, source: str | Path | None) -> Path:
    """The checkpoint's folder: the one given, or the one that the bundle says it comes from, if it is still there."""
    folder = Path(source or str(open_bundle(bundle).manifest.provenance.source)).expanduser()
    if folder.is_dir():
        return folder
    if source is None:
        raise InputError(
            f"--vs {name} needs the checkpoint that the bundle was made from; pass its folder with --source"
        )
    raise InputError(f"--source {folder}: there is no such folder; give the diffusers folder of the checkpoint")
