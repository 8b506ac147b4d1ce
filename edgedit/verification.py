"""Is a bundle whole, and does it compute here what it computed where it was converted?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.bundle import Bundle, open_bundle
from edgedit.errors import BundleError, RuntimeUnavailableError
from edgedit.example_inputs import example_inputs
from edgedit.json_reader import parse_json
from edgedit.metrics import Agreement, compare

__all__ = ["TOLERANCES", "ComponentCheck", "PictureCheck", "VerificationReport", "verify"]

#: Relative L2 that a component may be off its canonical fp32 graph, by precision of its weights.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.1, "w8": 0.1, "w8a8": 0.2, "w4": 0.5}

#: Relative L2 between what compressed weights gave at conversion and what they give here: float16 and another order of
#: sums are in it; with int8 arithmetic also rounding that depends on the processor.
OWN_TOLERANCE, OWN_TOLERANCE_INT8 = 2e-2, 0.1


RECORDED = "canonical fp32 graph, recorded at conversion"


@dataclass(frozen=True)
class ComponentCheck:
    """One component run on this machine.

    `agreement` with its fp32 graph is None when the bundle holds no reference for it. `own` is the relative L2 to what
    the same weights gave at conversion, recorded for compressed ones; at most `own_tolerance` passes.
    """

    name: str
    backend: str
    precision: str
    against: str
    agreement: Agreement | None
    tolerance: float
    passed: bool
    own: float | None = None
    own_tolerance: float | None = None


@dataclass(frozen=True)
class PictureCheck:
    """The same prompt and seed drawn on two backends: their 8-bit values, `levels` the most they differ."""

    backend: str
    against: str
    psnr_db: float
    levels: int
    passed: bool


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found. Damaged files raise BundleError instead; they make everything else moot."""

    bundle: Path
    files: int
    components: list[ComponentCheck]
    notes: list[str]
    pictures: list[PictureCheck] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every component and picture that could be checked agrees."""
        return all(check.passed for check in self.components) and all(check.passed for check in self.pictures)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bundle": str(self.bundle), "passed": self.passed}


#: PSNR of a whole picture against ONNX Runtime's, by precision of the weights.
PICTURE_PSNR = {"fp32": 50.0, "fp16": 40.0}
#: What is drawn to compare backends.
PICTURE_PROMPT, PICTURE_SEED = "a red circle above a blue square on a white background", 7


def verify(
    path: str | Path,
    *,
    backend: str = "auto",
    threads: int | None = None,
    interpreter: bool = False,
    emulate_fp16: bool = False,
    pictures: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> VerificationReport:
    """Check every file's hash, then run every component on the inputs that the conversion recorded.

    A component is compared with the outputs of its canonical fp32 graph, recorded at conversion. Where none were
    recorded (large models, by default), the form that this backend runs is compared with the bundle's canonical graph,
    run here.

    Args:
        backend: a backend's name, "auto", or "all" for every one that the bundle has artefacts for.
        threads: of ONNX Runtime.
        interpreter, emulate_fp16: how Core ML's packages are evaluated; see `edgedit.load`.
        pictures: also draw one picture on every backend and compare it with ONNX Runtime's.

    Raises:
        BundleError: a file is missing or damaged, or a component cannot be opened.
        RuntimeUnavailableError: the backend is not on this machine.
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
    notes: list[str] = []
    checks = []
    runtimes = _runtimes(bundle, backend, threads, interpreter, emulate_fp16, notes)
    components = list(bundle.manifest.components)
    for runtime in runtimes:
        for index, name in enumerate(components):
            if on_progress is not None:
                on_progress(f"{name} ({runtime.name})", index, len(components))
            check = _check(bundle, runtime, name)
            if check.agreement is None:
                notes.append(
                    f"{name} ({runtime.name}): the bundle holds nothing to compare with, so only its files were "
                    "checked; convert it again with --measure"
                )
            checks.append(check)
    drawn = _pictures(bundle, runtimes, on_progress) if pictures else []
    return VerificationReport(bundle=bundle.path, files=total, components=checks, notes=notes, pictures=drawn)


def _runtimes(
    bundle: Bundle, backend: str, threads: int | None, interpreter: bool, emulate_fp16: bool, notes: list[str]
) -> list[Any]:
    """The backends to check; of "all", those that this machine has not are left out with a note."""
    base = import_module("edgedit.runtimes.base")
    there = {name for part in bundle.manifest.components.values() for name in part.artefacts}
    found, missing = [], None
    for name in [n for n in base.RUNTIMES if n in there] if backend == "all" else [backend]:
        own = name == "coreml" or backend != "all"
        options = base.RuntimeOptions(
            threads=threads if name == "onnx" or backend != "all" else None,
            interpreter=interpreter and own,
            emulate_fp16=emulate_fp16 and own,
        )
        try:
            found.append(base.open_runtime(bundle, name, options))
        except RuntimeUnavailableError as error:
            if backend != "all":
                raise
            missing = error
            notes.append(f"{name}: not checked: {error}")
    if not found and missing is not None:
        raise missing
    return found


def _check(bundle: Bundle, runtime: Any, name: str) -> ComponentCheck:
    artefact = bundle.artefact(name, runtime.name)
    precision, tolerance = artefact.precision, TOLERANCES.get(artefact.precision, 1.0)
    own_tolerance = OWN_TOLERANCE_INT8 if _computes_in_int8(bundle, name) else OWN_TOLERANCE
    if precision not in ("fp32", "fp16") and artefact.parity is not None:
        tolerance = min(tolerance, artefact.parity.relative_l2 + own_tolerance)
    against = RECORDED
    recorded = _reference(bundle, name)
    agreement, own = None, None
    if recorded is not None:
        inputs, outputs, expected = recorded
        if not outputs or not _fits(bundle, runtime.name, name, inputs):
            against, outputs = "canonical graph of this bundle, run here", {}
            inputs = _inputs_that_fit(bundle, runtime.name, name, inputs)
            if "onnx" in bundle.component(name).artefacts:
                tolerance = TOLERANCES["fp32"] if runtime.name == "onnx" else tolerance
                base = import_module("edgedit.runtimes.base")
                outputs = _run(base.open_runtime(bundle, "onnx").open_canonical(name), inputs)
        if outputs:
            found = _run(runtime.open(name), inputs)
            agreement = max((compare(found[key], value) for key, value in outputs.items()), key=lambda a: a.relative_l2)
            if expected.get(runtime.name) and against == RECORDED:
                own = max(compare(found[key], value).relative_l2 for key, value in expected[runtime.name].items())
    return ComponentCheck(
        name=name,
        backend=runtime.name,
        precision=precision,
        against=against,
        agreement=agreement,
        tolerance=tolerance,
        passed=(agreement is None or agreement.relative_l2 <= tolerance) and (own is None or own <= own_tolerance),
        own=own,
        own_tolerance=None if own is None else own_tolerance,
    )


def _computes_in_int8(bundle: Bundle, name: str) -> bool:
    """Whether the component's recipe rounds inputs of layers, which every processor does in its own way."""
    record = f"quantization/{name}.json"
    if record not in bundle.manifest.files:
        return False
    layers: Any = parse_json(bundle.file(record).read_bytes(), record).members().get("layers", {})
    return any(form.get("activations") == "int8" for form in layers.values())


def _sizes(bundle: Bundle, name: str, inputs: dict[str, np.ndarray]) -> dict[str, int]:
    """Named sizes of a component's inputs, those apart that any backend fits to itself."""
    named = {}
    for spec in bundle.component(name).inputs:
        for size, value in zip(spec.shape, np.shape(inputs.get(spec.name, ())), strict=False):
            if isinstance(size, str) and size not in ("batch", "length"):
                named[size] = value
    return named


def _fits(bundle: Bundle, backend: str, name: str, inputs: dict[str, np.ndarray]) -> bool:
    """Whether `backend` was made for the sizes of `inputs`."""
    functions = bundle.artefact(name, backend).functions
    sizes = _sizes(bundle, name, inputs)
    return not functions or any(all(f.sizes.get(n) == size for n, size in sizes.items()) for f in functions)


def _inputs_that_fit(bundle: Bundle, backend: str, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The recorded inputs, or example inputs of the backend's first size where it does not take those."""
    if _fits(bundle, backend, name, inputs):
        return inputs
    entry = bundle.component(name)
    sizes = bundle.artefact(name, backend).functions[0].sizes
    patch = int(entry.config.get("patch_size", 1))  # type: ignore[call-overload]
    tokens = (sizes["height"] // patch, sizes["width"] // patch)
    return example_inputs(name, entry.inputs, entry.config, tokens=tokens, length=min(9, sizes["length"]))


def _pictures(
    bundle: Bundle, runtimes: list[Any], on_progress: Callable[[str, int, int], None] | None
) -> list[PictureCheck]:
    """One picture on every backend, against that of the first."""
    pipeline = import_module("edgedit.pipeline")
    drawn = []
    for index, runtime in enumerate(runtimes):
        if on_progress is not None:
            on_progress(f"picture ({runtime.name})", index, len(runtimes))
        with pipeline.Pipeline(bundle=bundle, runtime=runtime, use_cache=False) as pipe:
            image = pipe.generate(PICTURE_PROMPT, seed=PICTURE_SEED).images[0]
        drawn.append(np.asarray(image).astype(np.float64))
    checks = []
    for runtime, picture in zip(runtimes[1:], drawn[1:], strict=True):
        error = float(np.mean((picture - drawn[0]) ** 2))
        psnr = 200.0 if error == 0 else float(10 * np.log10(255**2 / error))
        precision = bundle.artefact("transformer", runtime.name).precision
        checks.append(
            PictureCheck(
                backend=runtime.name,
                against=runtimes[0].name,
                psnr_db=psnr,
                levels=int(np.abs(picture - drawn[0]).max()),
                passed=psnr >= PICTURE_PSNR.get(precision, 0.0),
            )
        )
    return checks


def _run(session: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        result: dict[str, np.ndarray] = session.run(inputs)
        return result
    finally:
        session.close()


def _reference(
    bundle: Bundle, name: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]] | None:
    """Inputs, outputs of the canonical graph, and those of compressed forms by backend."""
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
    own: dict[str, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        if key.startswith("own."):
            _, backend, output = key.split(".", 2)
            own.setdefault(backend, {})[output] = value
    return inputs, outputs, own
