"""Properties of the whole package: what it imports, what it weighs at start, what it contains."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "scipy",
    "edgedit.converters",
    "edgedit.runtimes",
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_edgedit_takes_less_than_a_third_of_a_second() -> None:
    code = "import time; t = time.perf_counter(); import edgedit; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("module", ["edgedit", "edgedit.pipeline", "edgedit.solvers", "edgedit.bundle", "edgedit.text"])
def test_the_core_imports_no_backend_and_no_converter(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*sys.modules)").split()
    assert not {name for name in loaded if name in FORBIDDEN}


def test_converting_needs_no_torch() -> None:
    loaded = run(
        "import sys, edgedit.converters.convert, edgedit.converters.architectures.t5; print(*sys.modules)"
    ).split()
    assert "edgedit.converters.convert" in loaded
    assert not {"torch", "diffusers", "transformers"} & set(loaded)


def test_every_package_folder_is_listed_in_the_project_file() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {}
    for name, place in tools["package-dir"].items():
        for init in (ROOT / place).rglob("__init__.py"):
            folders[".".join([name, *init.parent.relative_to(ROOT / place).parts])] = init
    assert set(folders) == set(tools["packages"])


def test_every_public_name_can_be_imported() -> None:
    import edgedit

    for name in edgedit.__all__:
        assert getattr(edgedit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute"):
        _ = edgedit.nothing
