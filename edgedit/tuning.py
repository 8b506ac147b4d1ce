"""Which engine, how many threads and which form of a graph are fastest on this machine, found by trying them.

Candidates run in processes of their own, in turns, so that a machine that is busy for a while slows all of them. After
the first turn only those near the best go on.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.bench.spawn import call_alone
from edgedit.benchmark import picture_size, stage_inputs
from edgedit.bundle import Bundle, open_bundle
from edgedit.device import available_cores
from edgedit.errors import EdgeditError, InputError
from edgedit.guidance import Guidance
from edgedit.metrics import compare
from edgedit.tuning_record import ComponentChoice, Measured, TuningRecord, machine, save

__all__ = ["candidates", "tune"]

#: Of the time, the parts that components get; the transformer runs at every step.
_SHARES = {"transformer": 6.0}
#: Candidates within this factor of the best go on after the first turn.
_NEAR = 1.3
#: A candidate may be this much further from the standard graph than the bundle's own form is, and this far besides.
_ERROR_FACTOR, _ERROR_MORE = 2.0, 1e-3
#: Turns after which nothing more is learnt.
_MOST_TURNS = 10
#: Evaluations after the first, a turn.
_REPEAT = 2


@dataclass
class _Candidate:
    choice: ComponentChoice
    seconds: list[float] = field(default_factory=list)
    output: Path | None = None
    relative_l2: float = 0.0
    refused: str | None = None


def _median(item: _Candidate) -> float:
    return statistics.median(item.seconds)


def candidates(bundle: Bundle, component: str, engines: Sequence[str], threads: Sequence[int]) -> list[ComponentChoice]:
    """What may run a component: each engine with each number of threads, ONNX Runtime with each form of the graph.

    The first is what runs without a record.
    """
    fused = bundle.artefact(component, "onnx").fused_graph is not None
    forms = {"onnxruntime": ["cpu", "standard"] if fused else ["standard"], "openvino": ["standard"]}
    return [
        ComponentChoice(engine, count, form)
        for engine in engines
        for form in forms[engine]
        for count in sorted(set(threads), reverse=True)
    ]


def tune(
    path: str | Path,
    *,
    width: int | None = None,
    height: int | None = None,
    length: int = 120,
    seconds: float = 60.0,
    components: Sequence[str] | None = None,
    engines: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> TuningRecord:
    """Time the candidates of every component and keep what is fastest for `edgedit.load` and `generate`.

    Args:
        width, height: of the picture, in pixels; by default what the bundle recommends.
        length: text tokens.
        seconds: about how long to measure; every candidate gets one turn, however long that takes.
        components: by default all.
        engines: by default ONNX Runtime, and OpenVINO where it is installed.
        threads: numbers to try; by default all cores, and half of them.

    Raises:
        InputError: a size that the model cannot draw, or no time.
        BundleError: the bundle has no ONNX graphs.
        EdgeditError: ONNX Runtime cannot run a component.
    """
    if not seconds > 0:
        raise InputError(f"the time to measure must be above 0 seconds, not {seconds:g}")
    bundle = open_bundle(path)
    columns, rows = picture_size(bundle, width, height)
    names = list(components or bundle.manifest.components)
    wanted = list(engines or ["onnxruntime", *(["openvino"] if find_spec("openvino") else [])])
    counts = list(threads or {available_cores(), max(1, available_cores() // 2)})
    shares = {name: _SHARES.get(name, 1.0) for name in names}
    guided = "transformer" in names and Guidance.from_manifest(bundle.manifest.guidance).kind == "cfg"
    if guided:
        shares["guidance"] = 2.0
    chosen: dict[str, ComponentChoice] = {}
    measured: list[Measured] = []
    together = None
    tell = on_progress or (lambda _: None)
    with tempfile.TemporaryDirectory(prefix="edgedit-tune-") as place:
        for name in names:
            inputs = Path(place) / f"{name}.npz"
            np.savez(inputs, **stage_inputs(bundle, name, columns, rows, length, 1))  # type: ignore[arg-type]
            runners = [_Candidate(choice) for choice in candidates(bundle, name, wanted, counts)]
            _race(bundle, name, inputs, runners, seconds * shares[name] / sum(shares.values()), Path(place), tell)
            chosen[name] = min((item for item in runners if item.refused is None), key=_median).choice
            measured += [
                Measured(name, item.choice, tuple(item.seconds), item.relative_l2, item.refused) for item in runners
            ]
        if guided:
            share = seconds * shares["guidance"] / sum(shares.values())
            sizes = (columns, rows, length)
            together = _guidance(bundle, chosen["transformer"], sizes, share, Path(place), tell)
    space = bundle.manifest.latents
    token = (space.scale_factor * space.patch_size) if space else 8
    record = TuningRecord(
        width=columns,
        height=rows,
        tokens=(columns // token) * (rows // token),
        components=chosen,
        guidance_together=None if together is None else together[0] <= together[1],
        guidance_seconds=together,
        measured=tuple(measured),
        machine=machine(),
    )
    save(bundle, record)
    return record


def _race(
    bundle: Bundle,
    name: str,
    inputs: Path,
    runners: Sequence[_Candidate],
    seconds: float,
    place: Path,
    tell: Callable[[str], None],
) -> None:
    """Give every candidate a turn, then those near the best one after another until the time is up."""
    started = time.monotonic()
    running = list(runners)
    for turn in range(_MOST_TURNS):
        for index, item in enumerate(running):
            if turn and time.monotonic() - started > seconds:
                return
            tell(f"{name} on {item.choice}, turn {turn + 1}")
            outputs = None
            if turn == 0:
                outputs = place / f"{name}-{index}"
                outputs.mkdir()
                item.output = outputs / f"{name}.npy"
            try:
                item.seconds += _turn(bundle, name, inputs, item.choice, outputs, place)
            except EdgeditError as error:
                if item is runners[0]:
                    raise
                item.refused = str(error)
        if turn == 0:
            _compare(runners)
        running = [item for item in running if item.refused is None]
        best = min(map(_median, running))
        running = [item for item in running if _median(item) <= _NEAR * best]
        if len(running) == 1:
            return


def _turn(
    bundle: Bundle, name: str, inputs: Path, choice: ComponentChoice, outputs: Path | None, place: Path
) -> list[float]:
    order = {
        "label": f"{name} on {choice}",
        "contender": "edgedit.bench.child:open_bundle_contender",
        "settings": {
            "path": str(bundle.path),
            "backend": "onnx",
            "engine": choice.engine,
            "threads": choice.threads,
            "standard_graph": choice.form == "standard",
        },
        "stages": {name: str(inputs)},
        "repeat": _REPEAT,
        "outputs": None if outputs is None else str(outputs),
        "warm": False,
    }
    found: Mapping[str, Any] = call_alone("edgedit.bench.child:measure", order, place)
    return [float(second) for second in found["stages"][0]["seconds"]]


def _compare(runners: Sequence[_Candidate]) -> None:
    """How far each output is from that of the standard graph in ONNX Runtime, and who is too far to be chosen."""
    runs = [item for item in runners if item.refused is None and item.output is not None]
    plain = [item for item in runs if item.choice.engine == "onnxruntime" and item.choice.form == "standard"]
    standard = (plain or runs)[0]
    assert standard.output is not None
    wanted = np.load(standard.output)
    for item in runs:
        assert item.output is not None
        item.relative_l2 = compare(np.load(item.output), wanted).relative_l2
    limit = _ERROR_FACTOR * runners[0].relative_l2 + _ERROR_MORE
    for item in runs:
        if item.relative_l2 > limit and item is not runners[0]:
            item.refused = f"its output is {item.relative_l2:.1e} from the standard graph's, too far"


def _guidance(
    bundle: Bundle,
    choice: ComponentChoice,
    sizes: tuple[int, int, int],
    seconds: float,
    place: Path,
    tell: Callable[[str], None],
) -> tuple[float, float]:
    """Median seconds of a guided step as one batch of two and as two of one."""
    name, started = "transformer", time.monotonic()
    paths = []
    for batch in (2, 1):
        paths.append(place / f"guidance-{batch}.npz")
        np.savez(paths[-1], **stage_inputs(bundle, name, *sizes, batch))  # type: ignore[arg-type]
    found: list[list[float]] = [[], []]
    for turn in range(_MOST_TURNS):
        if turn and time.monotonic() - started > seconds:
            break
        for index, way in enumerate(("one batch", "two")):
            tell(f"guidance as {way}, turn {turn + 1}")
            found[index] += _turn(bundle, name, paths[index], choice, None, place)
    return statistics.median(found[0]), 2 * statistics.median(found[1])
