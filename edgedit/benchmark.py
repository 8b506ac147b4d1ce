"""How long each component takes to open and to run on this machine, how much memory that takes, and beside whom.

Every contender runs in processes of its own, in turns (A B A B …), on the same inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.attention_scale import INPUT as ATTENTION_SCALE
from edgedit.bench.contenders import ContenderPlan, bundle_plan, rival_plans
from edgedit.bench.report import BenchmarkReport, ComponentTimes, ContenderReport, make_reports
from edgedit.bench.spawn import call_alone
from edgedit.bundle import Bundle, open_bundle
from edgedit.errors import InputError
from edgedit.example_inputs import example_inputs
from edgedit.manifest import Latents

__all__ = ["BenchmarkReport", "ComponentTimes", "ContenderReport", "benchmark", "picture_size", "stage_inputs"]

#: Rounds by default: with and without somebody to be compared with.
ROUNDS_BESIDE, ROUNDS_ALONE = 3, 1


def benchmark(
    path: str | Path,
    *,
    vs: Sequence[str] = (),
    source: str | Path | None = None,
    backend: str = "auto",
    engine: str = "auto",
    threads: int | None = None,
    components: Sequence[str] | None = None,
    width: int | None = None,
    height: int | None = None,
    length: int = 120,
    batch: int = 1,
    repeat: int = 5,
    rounds: int | None = None,
    reference: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> BenchmarkReport:
    """Open and run every component (or those named) on noise, for a picture of `width` × `height` pixels.

    Args:
        vs: contenders beside the bundle: names of `edgedit.bench.contenders.RIVALS`, or paths of bundles, with
            "@openvino" or "@onnxruntime" behind them for an engine of their own.
        source: the diffusers folder that the bundle was made from, for rivals; by default where the bundle says.
        length: text tokens.
        batch: pictures at once.
        repeat: evaluations after the first, a round.
        rounds: turns of each contender; 3 with others, 1 alone.
        reference: label of the contender that outputs are compared with; by default one that runs the checkpoint in
            float32, else the bundle.

    Raises:
        InputError: a size that the model cannot draw, a repeat below 1, a contender that is not one.
        RuntimeUnavailableError: a package that a contender needs is not installed.
    """
    rounds = rounds if rounds is not None else (ROUNDS_BESIDE if vs else ROUNDS_ALONE)
    for name, value in (("repeat", repeat), ("rounds", rounds), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    bundle = open_bundle(path)
    columns, rows = picture_size(bundle, width, height)
    names = list(components or bundle.manifest.components)
    plans = [bundle_plan(bundle.path, bundle.path.name, backend, engine, threads)]
    plans += rival_plans(vs, bundle.path, source, backend, engine, threads)
    _distinct(plans)
    _reference(plans, reference)
    with tempfile.TemporaryDirectory(prefix="edgedit-bench-") as place:
        folder, done = Path(place), 0
        exports = sum(plan.export is not None for plan in plans)
        total = exports + rounds * len(plans)

        def tell(what: str) -> None:
            nonlocal done
            if on_progress is not None:
                on_progress(what, done, total)
            done += 1

        common = _write_inputs(bundle, names, columns, rows, length, batch, folder)
        for index, plan in enumerate(plans):
            own = folder / str(index)
            own.mkdir()
            plan.stages = _own_inputs(plan, common, (columns, rows, length, batch), own, bundle.manifest.latents)
            if plan.export is not None:
                tell(f"export for {plan.label}")
                order = {**plan.export, "stages": _paths(plan.stages), "folder": str(own)}
                call_alone("edgedit.converters.training.rivals:export", order, own)
                plan.settings["folder"] = str(own)
        found: list[list[dict[str, Any]]] = [[] for _ in plans]
        for turn in range(rounds):
            for index, plan in enumerate(plans):
                tell(f"{plan.label}, round {turn + 1}")
                own = folder / str(index)
                order = {
                    "label": plan.label,
                    "contender": plan.function,
                    "settings": plan.settings,
                    "stages": _paths(plan.stages),
                    "repeat": repeat,
                    "outputs": str(own) if turn == 0 and len(plans) > 1 else None,
                }
                found[index].append(call_alone("edgedit.bench.child:measure", order, own))
        compared = _reference(plans, reference)
        reports = make_reports(plans, found, names, folder, compared)
    label = None if compared is None else plans[compared].label
    return BenchmarkReport(bundle.path, columns, rows, batch, length, repeat, rounds, label, reports)


def _distinct(plans: Sequence[ContenderPlan]) -> None:
    """Labels that tell the contenders apart, in the order in which they were named."""
    seen: dict[str, int] = {}
    for plan in plans:
        seen[plan.label] = seen.get(plan.label, 0) + 1
        if seen[plan.label] > 1:
            plan.label = f"{plan.label} ({seen[plan.label]})"


def _paths(stages: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in stages.items()}


def picture_size(bundle: Bundle, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height in pixels, by default what the bundle recommends. Raises InputError for what it cannot draw."""
    manifest = bundle.manifest
    recommended = manifest.recommended
    columns = width or (recommended.width if recommended else 1024)
    rows = height or (recommended.height if recommended else 1024)
    multiple = manifest.latents.size_multiple if manifest.latents else 32
    for value in (columns, rows):
        if value < multiple or value % multiple:
            raise InputError(f"{columns}×{rows} does not divide into units of {multiple} pixels, as this model needs")
    return columns, rows


def stage_inputs(
    bundle: Bundle, name: str, width: int, height: int, length: int, batch: int, space: Latents | None = None
) -> dict[str, np.ndarray]:
    """Noise for a component of a picture of `width` × `height` pixels, with all text tokens in use.

    `space` is the latent space; by default the bundle's own. A transformer alone has none: it then counts as 8 pixels
    to a latent.
    """
    entry = bundle.component(name)
    space = space or bundle.manifest.latents
    factor = space.scale_factor if space else int(str(entry.config.get("scale_factor", 8)))
    patch = int(str(entry.config.get("patch_size", 1)))
    tokens = (height // factor // patch, width // factor // patch)
    inputs = example_inputs(name, entry.inputs, entry.config, tokens=tokens, length=length, batch=batch)
    if ATTENTION_SCALE in inputs:
        # Other tools' networks have no such input: they compute with 1.
        inputs[ATTENTION_SCALE] = np.ones_like(inputs[ATTENTION_SCALE])
    # A run without padding, as prompts are encoded.
    return {key: np.ones_like(value) if key.endswith("attention_mask") else value for key, value in inputs.items()}


def _write_inputs(
    bundle: Bundle, names: Sequence[str], width: int, height: int, length: int, batch: int, folder: Path
) -> dict[str, Path]:
    paths = {}
    for name in names:
        paths[name] = folder / f"inputs-{name}.npz"
        np.savez(paths[name], **stage_inputs(bundle, name, width, height, length, batch))  # type: ignore[arg-type]
    return paths


def _own_inputs(
    plan: ContenderPlan,
    common: Mapping[str, Path],
    sizes: tuple[int, int, int, int],
    folder: Path,
    space: Latents | None,
) -> Mapping[str, Path]:
    """The inputs of a contender: those of the bundle; of another bundle its own, filled with the bundle's by name."""
    if "path" not in plan.settings:
        return common
    other, paths = open_bundle(plan.settings["path"]), {}
    for name, path in common.items():
        values = stage_inputs(other, name, *sizes, space)
        with np.load(path) as given:
            for key in values.keys() & given.keys():
                if values[key].shape != given[key].shape:
                    raise InputError(
                        f"{plan.label}: its {name} takes {key} as {list(values[key].shape)}, not "
                        f"{list(given[key].shape)}; the two draw with different networks"
                    )
                values[key] = given[key]
        paths[name] = folder / path.name
        np.savez(paths[name], **values)  # type: ignore[arg-type]
    return paths


def _reference(plans: Sequence[ContenderPlan], asked: str | None) -> int | None:
    """The contender that the others' outputs are compared with: what runs the checkpoint in float32, or the bundle."""
    if len(plans) == 1:
        return None
    labels = [plan.label for plan in plans]
    if asked is not None:
        if asked not in labels:
            raise InputError(f"there is no contender {asked!r} to compare with; there are {', '.join(labels)}")
        return labels.index(asked)
    return next((labels.index(name) for name in ("diffusers", "ort-export", "openvino") if name in labels), 0)
