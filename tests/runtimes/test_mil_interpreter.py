"""Programs made with coremltools and evaluated with numpy: compressed weights, float16, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedit.errors import BundleError, InputError
from edgedit.runtimes.mil_interpreter import MilInterpreter

library = pytest.importorskip("coremltools")

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes mb operations on an input x [3, 64] as a package."""
    from coremltools.converters import mil
    from coremltools.converters.mil.mil import types

    def made(body: Callable[[Any, Any], Any], dtype: str = "fp32", **options: Any) -> Path:
        @mil.Builder.program(  # type: ignore[untyped-decorator]
            input_specs=[mil.Builder.TensorSpec((3, 64), dtype=getattr(types, dtype))],
            opset_version=library.target.iOS18,
        )
        def program(x: Any) -> Any:
            return mil.Builder.identity(x=body(mil.Builder, x), name="y")

        pipeline = library.PassPipeline.EMPTY
        model = library.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=library.target.iOS18,
            compute_precision=library.precision.FLOAT32,
            pass_pipeline=pipeline,
            skip_model_load=True,
        )
        path = tmp_path / "P.mlpackage"
        model.save(str(path))
        return path

    return made


def _weights(kind: str, random: np.random.Generator) -> tuple[Callable[[Any], Any], np.ndarray]:
    """A constexpr of a [32, 64] weight, and the weight by numpy alone."""
    from coremltools.converters.mil.mil import types

    scale = random.uniform(0.1, 1, (32, 2)).astype(np.float32)
    wide = np.repeat(scale, 32, axis=1)
    if kind == "int4":
        codes, zero = random.integers(-8, 8, (32, 64)), random.integers(-8, 8, (32, 2))
        narrow = types.np_int4_dtype
        return (
            lambda mb: mb.constexpr_blockwise_shift_scale(
                data=codes.astype(narrow), scale=scale, offset=zero.astype(narrow)
            ),
            (codes - np.repeat(zero, 32, axis=1)) * wide,
        )
    if kind == "int8":
        codes = random.integers(-128, 128, (32, 64))
        return lambda mb: mb.constexpr_blockwise_shift_scale(data=codes.astype(np.int8), scale=scale), codes * wide
    if kind.startswith("palette"):
        bits = int(kind[-1])
        groups, lut = 4, random.standard_normal((4, 1, 2**bits, 1)).astype(np.float32)
        codes = random.integers(0, 2**bits, (32, 64))
        narrow = types.string_to_nptype(f"uint{bits}")
        dense = np.stack([lut[row // (32 // groups), 0, codes[row], 0] for row in range(32)])
        return lambda mb: mb.constexpr_lut_to_dense(indices=codes.astype(narrow), lut=lut), dense
    if kind == "vectors":
        lut = random.standard_normal((1, 1, 16, 4)).astype(np.float32)
        codes = random.integers(0, 16, (8, 64))
        narrow = types.string_to_nptype("uint4")
        dense = lut[0, 0][codes].transpose(0, 2, 1).reshape(32, 64)
        return (
            lambda mb: mb.constexpr_lut_to_dense(indices=codes.astype(narrow), lut=lut, vector_axis=0),
            dense,
        )
    if kind == "sparse":
        mask = random.random((32, 64)) < 0.4
        values = random.standard_normal(int(mask.sum())).astype(np.float32)
        dense = np.zeros((32, 64))
        dense[mask] = values
        narrow = types.string_to_nptype("uint1")
        return lambda mb: mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask.astype(narrow)), dense
    half = random.standard_normal((32, 64)).astype(np.float16)
    return lambda mb: mb.constexpr_cast(source_val=half, output_dtype="fp32"), half.astype(np.float32)


KINDS = ["int4", "int8", "palette1", "palette2", "palette3", "palette4", "palette6", "vectors", "sparse", "half"]


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_weights_are_decompressed_bit_by_bit(kind: str, save: Save) -> None:
    random = np.random.default_rng()
    make, dense = _weights(kind, random)
    package = save(lambda mb, x: mb.linear(x=x, weight=make(mb)))
    x = random.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(MilInterpreter(package).run({"x": x})["y"], x @ dense.T, rtol=1e-4, atol=1e-4)


def test_float16_is_rounded_only_where_that_is_asked_for(save: Save) -> None:
    package = save(lambda mb, x: mb.cast(x=mb.square(x=mb.cast(x=x, dtype="fp16")), dtype="fp32"))
    x = np.full((3, 64), 1.0009, np.float32)
    exact = MilInterpreter(package).run({"x": x})["y"]
    rounded = MilInterpreter(package, emulate_fp16=True).run({"x": x})["y"]
    np.testing.assert_array_equal(exact, x * x)
    half = x.astype(np.float16)
    np.testing.assert_array_equal(rounded, (half * half).astype(np.float32))


def test_overflow_is_found_and_named_before_a_phone_finds_it(save: Save) -> None:
    package = save(lambda mb, x: mb.cast(x=mb.square(x=mb.cast(x=x, dtype="fp16"), name="power"), dtype="fp32"))
    x = np.full((3, 64), 300, np.float32)
    for emulated in (False, True):
        interpreter = MilInterpreter(package, emulate_fp16=emulated)
        y = interpreter.run({"x": x})["y"]
        assert interpreter.overflows == {"power": 90000.0}
        assert np.isinf(y).all() == emulated
    quiet = MilInterpreter(package)
    quiet.run({"x": x / 10})
    assert not quiet.overflows


def test_wrong_names_shapes_and_functions_are_named(save: Save) -> None:
    interpreter = MilInterpreter(save(lambda mb, x: mb.relu(x=x)))
    with pytest.raises(InputError, match=r"takes \['x'\]; got \['z'\]"):
        interpreter.run({"z": np.zeros((3, 64))})
    with pytest.raises(InputError, match=r"x must have the shape \[3, 64\], not \[2, 64\]"):
        interpreter.run({"x": np.zeros((2, 64))})
    with pytest.raises(InputError, match="has no function other; it has: main"):
        interpreter.run({"x": np.zeros((3, 64))}, "other")


def test_an_operator_that_is_not_known_is_named_when_the_package_is_opened(save: Save) -> None:
    package = save(lambda mb, x: mb.topk(x=x, k=64, axis=1, name="best")[0])
    with pytest.raises(BundleError, match="no operator topk"):
        MilInterpreter(package)


def test_missing_weights_are_one_line(save: Save) -> None:
    weight = np.random.default_rng().standard_normal((32, 64)).astype(np.float32)
    package = save(lambda mb, x: mb.linear(x=x, weight=weight))
    weights = next(package.rglob("weight.bin"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BundleError, match=r"weight\.bin"):
        MilInterpreter(package).run({"x": np.zeros((3, 64))})
