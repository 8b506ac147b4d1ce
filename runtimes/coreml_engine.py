"""What runs one function of an `.mlpackage`: Core ML on a Mac, the interpreter anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgedit.errors import BundleError, InputError, RuntimeUnavailableError

__all__ = ["COMPUTE_UNITS", "CoremlEngine", "Engine", "InterpreterEngine", "chained", "coremltools", "require_macos"]

#: What Core ML may use, by the names that people type → coremltools' ComputeUnit.
COMPUTE_UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ne": "CPU_AND_NE"}


class Engine(Protocol):
    """Runs functions of one package."""

    def run(self, function: str | None, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate a function, the only one for None. Shapes are exactly those of the package."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


@cache
def coremltools() -> Any:
    """coremltools, without what it prints about the platform that it is on.

    Raises RuntimeUnavailableError, with what to install, when it cannot be imported.
    """
    logger = logging.getLogger("coremltools")
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import coremltools as library
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"coremltools cannot be imported ({error}); run: pip install 'edgedit[coreml]'"
        ) from error
    logger.setLevel(logging.ERROR)
    return library


def require_macos() -> None:
    """Raises RuntimeUnavailableError anywhere else."""
    if sys.platform != "darwin":
        raise RuntimeUnavailableError(
            "Core ML runs on macOS only; add --interpreter to evaluate its programs here, or use --backend onnx"
        )


class InterpreterEngine:
    """The numpy interpreter. See `mil_interpreter`."""

    def __init__(self, package: Path, *, emulate_fp16: bool) -> None:
        from edgedit.runtimes.mil_interpreter import MilInterpreter

        self.package = package
        self.interpreter: MilInterpreter | None = MilInterpreter(package, emulate_fp16=emulate_fp16)

    def run(self, function: str | None, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate a function. With emulation, values beyond float16 become infinite, as they would on a phone."""
        if self.interpreter is None:
            raise BundleError(f"{self.package.name}: the session is closed")
        return self.interpreter.run(inputs, function)

    def close(self) -> None:
        """Free the weights."""
        self.interpreter = None


class _Chain:
    """Packages that run one after the other: each takes what it names of the inputs and of what came before."""

    def __init__(self, links: Sequence[tuple[Mapping[str | None, Collection[str]], Engine]]) -> None:
        self.links = links

    def run(self, function: str | None, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate a function of every package."""
        values = dict(inputs)
        for names, engine in self.links:
            values |= engine.run(function, {name: values[name] for name in names[function]})
        return values

    def close(self) -> None:
        """Free what is held."""
        for _, engine in self.links:
            engine.close()


def chained(engines: Sequence[tuple[Path, Engine]]) -> Engine:
    """One engine for the packages of a component, in their order. Raises BundleError for a damaged one."""
    if len(engines) == 1:
        return engines[0][1]
    from edgedit.runtimes.mil_package import read_package

    links = []
    for path, engine in engines:
        package = read_package(path)
        names: dict[str | None, Collection[str]] = {name: list(f.inputs) for name, f in package.functions.items()}
        links.append(({**names, None: names[package.default]}, engine))
    return _Chain(links)


class CoremlEngine:
    """Core ML itself, through coremltools; macOS only. Compiled models are kept in `cache`, one for each package."""

    def __init__(self, package: Path, *, compute_units: str, cache: Path) -> None:
        require_macos()
        if compute_units not in COMPUTE_UNITS:
            raise InputError(f"unknown compute units {compute_units!r}; choose one of: {', '.join(COMPUTE_UNITS)}")
        library = coremltools()
        self.package, self.units = package, getattr(library.ComputeUnit, COMPUTE_UNITS[compute_units])
        self.compiled = _compiled(library, package, cache)
        self._models: dict[str | None, Any] = {}

    def run(self, function: str | None, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate a function, loading it the first time; a second evaluation finds it warm."""
        if function not in self._models:
            library = coremltools()
            extra = {} if function is None else {"function_name": function}
            try:
                self._models[function] = library.models.CompiledMLModel(str(self.compiled), self.units, **extra)
            except Exception as error:  # coremltools raises bare exceptions
                raise BundleError(f"{self.package.name}: Core ML refuses the model: {_first_line(error)}") from error
        try:
            found = self._models[function].predict(dict(inputs))
        except Exception as error:
            raise BundleError(f"{self.package.name}: Core ML stopped: {_first_line(error)}") from error
        return {name: np.asarray(value) for name, value in found.items()}

    def close(self) -> None:
        """Free the models."""
        self._models.clear()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _compiled(library: Any, package: Path, cache: Path) -> Path:
    """The compiled form of a package, from the cache or made now, put in its place whole."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.relative_to(package)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest.update(str(package.resolve()).encode())
    target = cache / f"{digest.hexdigest()[:32]}.mlmodelc"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        made = Path(library.models.utils.compile_model(str(package), str(partial / target.name)))
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have been first; anything else is an error
                raise
    except RuntimeError as error:
        raise BundleError(f"{package.name}: Core ML cannot compile the model: {_first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
