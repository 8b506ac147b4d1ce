"""Reading packages: weights of every width as coremltools writes them, and damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedit.errors import BundleError
from edgedit.runtimes.mil_package import Blob, MilType, read_package

library = pytest.importorskip("coremltools")

WIDTHS = {
    "fp32": ("float", np.float32, None),
    "int8": ("int8", np.int8, (-128, 128)),
    "uint8": ("uint8", np.uint8, (0, 256)),
    "int16": ("int16", np.int16, (-32768, 32768)),
    "uint16": ("uint16", np.uint16, (0, 65536)),
    "int32": ("int32", np.int32, (-(2**31), 2**31 - 1)),
    "int4": ("int4", np.int8, (-8, 8)),
    "uint1": ("uint1", np.uint8, (0, 2)),
    "uint2": ("uint2", np.uint8, (0, 4)),
    "uint3": ("uint3", np.uint8, (0, 8)),
    "uint4": ("uint4", np.uint8, (0, 16)),
    "uint6": ("uint6", np.uint8, (0, 64)),
}


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("count", [1, 7, 64])
def test_weights_of_every_width_are_read_as_coremltools_writes_them(kind: str, count: int, tmp_path: Path) -> None:
    from coremltools.libmilstoragepython import _BlobStorageWriter

    name, dtype, limits = WIDTHS[kind]
    random = np.random.default_rng()
    values = random.standard_normal(count) if limits is None else random.integers(*limits, count)
    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    writer.write_int8_data(np.zeros(3, np.int8))
    offset = getattr(writer, f"write_{name}_data")(values.astype(dtype))
    del writer
    blob = Blob(MilType(kind, (count,)), offset, path)
    loaded = blob.load()
    np.testing.assert_array_equal(loaded, values.astype(dtype))
    with pytest.raises(BundleError, match="not what the model says"):
        Blob(MilType(kind, (count + 64,)), offset, path).load()
    with pytest.raises(BundleError, match="ends before"):
        Blob(MilType(kind, (count,)), path.stat().st_size, path).load()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coremltools.converters import mil

    @mil.Builder.program(  # type: ignore[untyped-decorator]
        input_specs=[mil.Builder.TensorSpec((1, 8))], opset_version=library.target.iOS18
    )
    def program(x: Any) -> Any:
        weight = np.random.default_rng().standard_normal((16, 8)).astype(np.float32)
        return mil.Builder.softmax(x=mil.Builder.linear(x=x, weight=weight), axis=-1, name="y")

    path = tmp_path_factory.mktemp("package") / "P.mlpackage"
    library.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=library.target.iOS18,
        skip_model_load=True,
    ).save(str(path))
    return path


def test_operations_types_and_names_are_those_of_the_specification(package: Path) -> None:
    found = read_package(package)
    (function,) = found.functions.values()
    specification = library.utils.load_spec(str(package))
    block = specification.mlProgram.functions["main"].block_specializations["CoreML8"]
    assert (found.specification, found.default, function.opset) == (9, "main", "CoreML8")
    assert [o.kind for o in function.operations] == [o.type for o in block.operations]
    assert [o.outputs[0][0] for o in function.operations] == [o.outputs[0].name for o in block.operations]
    assert function.outputs == tuple(block.outputs)
    assert {n: t.shape for n, t in function.inputs.items()} == {"x": (1, 8)}


def _damage(path: Path, kind: str) -> None:
    model = next(path.rglob("model.mlmodel"))
    if kind == "no manifest":
        (path / "Manifest.json").unlink()
    elif kind == "manifest":
        (path / "Manifest.json").write_text("{}")
    elif kind == "cut":
        model.write_bytes(model.read_bytes()[:-100])
    elif kind == "noise":
        model.write_bytes(bytes(np.random.default_rng().integers(0, 256, 500, dtype=np.uint8)))
    else:
        model.write_bytes(b"")


@pytest.mark.parametrize("kind", ["no manifest", "manifest", "cut", "noise", "empty"])
def test_a_damaged_package_is_one_clear_line(kind: str, package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "P.mlpackage"))
    _damage(copy, kind)
    with pytest.raises(BundleError, match=r"P\.mlpackage.*convert the model again") as caught:
        read_package(copy)
    assert "\n" not in str(caught.value)
