"""The three verbs of the Python API: load, convert, verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from edgedit.bundle import open_bundle
from edgedit.device import cache_dir
from edgedit.pipeline import Pipeline

if TYPE_CHECKING:
    from edgedit.converters.coreml import CoremlOptions
    from edgedit.converters.report import ConversionReport
    from edgedit.verification import VerificationReport

__all__ = ["BUILTIN", "convert", "load", "verify"]

#: The embedded default model.
BUILTIN = Path(__file__).parent / "builtin" / "scenes.edgedit"


def load(
    source: str | Path = "builtin",
    backend: str = "auto",
    *,
    engine: str | None = "auto",
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    low_ram: bool | None = None,
    use_cache: bool = True,
    graph_cache: bool = False,
    memory_limit: int | None = None,
    interpreter: bool = False,
    emulate_fp16: bool = False,
    compute_units: str | None = None,
    decoder: str = "full",
    verify: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Pipeline:
    """Open a bundle and return a pipeline; its components are loaded when they are first needed.

    Args:
        source: path of a bundle, or "builtin" for the embedded model.
        backend: "auto" or a runtime's name ("onnx", "coreml", "mlx").
        engine: what runs the graphs of the backend "onnx": "onnxruntime", "openvino", or "auto" for what
            `edgedit tune` found fastest on this machine, and ONNX Runtime where it has not run; None for ONNX Runtime.
        threads: worker threads within an operator; None lets the backend choose.
        providers: ONNX Runtime execution providers, short names or full ones, by default the CPU; for MLX "gpu" or
            "cpu", by default the GPU where there is one.
        low_ram: keep one component in memory at a time; None decides by the free memory.
        use_cache: keep embeddings of large text encoders on disk between runs.
        graph_cache: keep optimised graphs on disk; opening is faster, and the cache takes as much room as the weights.
        memory_limit: bytes that MLX should stay within; no other backend has such a limit.
        interpreter: evaluate Core ML programs with numpy, on any OS.
        emulate_fp16: have the interpreter round to float16 where the programs say so.
        compute_units: what Core ML may use: "all" (the default), "cpu", "gpu" or "ne".
        decoder: "full", or "tiny" for a distilled one that is quick, where the bundle has it.
        verify: check every file's hash first.
        on_stage: told what begins ("load transformer", "encode", "denoise 1/1", "decode 1/1").

    Raises:
        BundleError: not a bundle, damaged, or made by a newer version.
        InputError: a decoder that the bundle does not have.
        RuntimeUnavailableError: the backend or a provider is not on this machine.
    """
    base = import_module("edgedit.runtimes.base")
    bundle = open_bundle(BUILTIN if str(source) == "builtin" else source, verify=verify)
    options = base.RuntimeOptions(
        threads=threads,
        providers=tuple(providers) if providers else None,
        graph_cache=cache_dir() / "graphs" if graph_cache else None,
        memory_limit=memory_limit,
        interpreter=interpreter,
        emulate_fp16=emulate_fp16,
        compute_units=compute_units,
        engine=engine,
    )
    return Pipeline(
        bundle=bundle,
        runtime=base.open_runtime(bundle, backend, options),
        low_ram=low_ram,
        use_cache=use_cache,
        on_stage=on_stage,
        decoder=decoder,
    )


def convert(
    source: str | Path,
    bundle: str | Path,
    *,
    to: Sequence[str] = ("onnx",),
    dtype: str = "fp32",
    calibration: str | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    coreml: CoremlOptions | None = None,
    mlx_weights: str | None = None,
    components: Sequence[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    variant: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    measure: bool | None = None,
    dry_run: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ConversionReport:
    """Convert a checkpoint into a bundle. See `edgedit.converters.convert.convert`."""
    report: ConversionReport = import_module("edgedit.converters.convert").convert(
        source,
        bundle,
        to=to,
        dtype=dtype,
        calibration=calibration,
        sizes=sizes,
        coreml=coreml,
        mlx_weights=mlx_weights,
        components=components,
        revision=revision,
        offline=offline,
        variant=variant,
        name=name,
        overwrite=overwrite,
        measure=measure,
        dry_run=dry_run,
        on_progress=on_progress,
    )
    return report


def verify(
    bundle: str | Path,
    *,
    backend: str = "auto",
    threads: int | None = None,
    interpreter: bool = False,
    emulate_fp16: bool = False,
    pictures: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> VerificationReport:
    """Check a bundle's files and run its components against what the conversion recorded.

    See `edgedit.verification`.
    """
    report: VerificationReport = import_module("edgedit.verification").verify(
        BUILTIN if str(bundle) == "builtin" else bundle,
        backend=backend,
        threads=threads,
        interpreter=interpreter,
        emulate_fp16=emulate_fp16,
        pictures=pictures,
        on_progress=on_progress,
    )
    return report
