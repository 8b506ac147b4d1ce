"""Recipes: what lines mean, and what is said of lines that mean nothing."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.presets import PRESETS, recipe_of
from edgedit.converters.quantization.recipe import Recipe, read_recipe
from edgedit.errors import ConversionError


def layer(name: str, *shape: int, kind: str = "matrix") -> Layer:
    return Layer(name, kind, ir.Value(name=f"{name}.weight"), shape)


LAYERS = {
    found.name: found
    for found in (
        layer("blocks.0.attn.to_q", 128, 128),
        layer("blocks.0.ff", 128, 512),
        layer("blocks.1.attn.to_q", 128, 128),
        layer("blocks.1.odd", 100, 128),
        layer("blocks.1.seven", 128, 84),
        layer("conv", 32, 32, 3, 3, kind="convolution"),
        layer("table", 300, 64, kind="table"),
    )
}


def read(text: str, place: Path) -> Recipe:
    path = place / "mine.toml"
    path.write_text(text)
    return read_recipe(path)


def test_the_last_line_that_matches_a_layer_counts_and_the_rest_is_float16(tmp_path: Path) -> None:
    recipe = read(
        """
        [transformer]
        "blocks.*" = {bits = 4, block = 32}
        "*.to_q" = {bits = 8, activations = "int8"}
        "blocks.1.attn.to_q" = {bits = 32}
        "blocks.1.odd" = {bits = 8, activations = "int8-token"}
        """,
        tmp_path,
    )
    assert recipe.name == "mine"
    found = recipe.resolve("transformer", LAYERS)
    assert found["blocks.0.attn.to_q"] == Form(8, int8_activations=True)
    assert found["blocks.1.attn.to_q"] == Form(32)
    assert found["blocks.1.odd"] == Form(8, int8_activations=True, per_token=True)
    assert found["blocks.1.odd"].as_dict() == {"bits": 8, "activations": "int8-token"}
    assert found["blocks.0.ff"] == Form(4, 32)
    assert found["conv"] == Form(16)
    assert recipe.resolve("decoder", LAYERS) == dict.fromkeys(LAYERS, Form(16))


def test_a_pattern_gives_each_layer_what_it_can_have(tmp_path: Path) -> None:
    found = read('[transformer]\n"*" = {bits = 3}', tmp_path).resolve("transformer", LAYERS)
    assert found["blocks.0.ff"] == Form(3, 64)
    assert found["blocks.1.odd"] == Form(8), "100 inputs do not divide into blocks"
    assert found["blocks.1.seven"] == Form(4, 64), "84 outputs do not fill the bytes of a plane"
    assert found["conv"] == found["table"] == Form(8)
    floats = read('[transformer]\n"*" = {bits = 4, format = "fp4", block = 32}', tmp_path)
    found = floats.resolve("transformer", LAYERS)
    assert found["blocks.0.ff"] == Form(4, 32, format="fp4")
    assert found["blocks.1.odd"] == Form(8)


def test_every_key_of_a_line_is_read_and_written_again(tmp_path: Path) -> None:
    line = '{bits = 2, format = "palette", activations = "int8", rounding = "adaptive", balance = 0.3, rotate = true}'
    (rule,) = read(f'[transformer]\n"*" = {line}', tmp_path).rules["transformer"]
    assert rule.form == Form(2, None, True, "palette", "adaptive", 0.3, True)
    assert rule.form.as_dict() == {
        "bits": 2,
        "activations": "int8",
        "format": "palette",
        "rounding": "adaptive",
        "balance": 0.3,
        "rotate": True,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "says nothing of any layer"),
        ("[transformer", "not TOML"),
        ('[transfomer]\n"*" = {bits = 8}', r"unknown table \[transfomer\]; did you mean \[transformer\]"),
        ("transformer = 8", r"write \[transformer\]"),
        ('[decoder]\n"*" = 8', "must be a table such as"),
        ('[decoder]\n"*" = {block = 64}', "bits is missing"),
        ('[decoder]\n"*" = {bits = 5}', "bits must be one of 32, 16, 8, 6, 4, 3, 2, 1, not 5"),
        ('[decoder]\n"*" = {bits = true}', "bits must be one of"),
        ('[decoder]\n"*" = {bits = 8, blok = 64}', "unknown key 'blok'; did you mean 'block'"),
        ('[decoder]\n"*" = {bits = 4, block = 48}', "block must be one of 128, 64, 32, 16, not 48"),
        ('[decoder]\n"*" = {bits = 8, block = 64}', "block goes with 4, 3 or 2 bits"),
        ('[decoder]\n"*" = {bits = 3, format = "fp4"}', "format fp4 has 4 bits, not 3"),
        (
            '[transformer]\n"*" = {bits = 4, format = "log", activations = "int8"}',
            "leave no room for the scales of blocks",
        ),
        ('[decoder]\n"*" = {bits = 16, rotate = true}', "16 bits are a float"),
        ('[decoder]\n"*" = {bits = 8, balance = 1.5}', "balance must be a number from 0 to 1, not 1.5"),
        ('[decoder]\n"*" = {bits = 8, rotate = 1}', "rotate must be true or false"),
        ('[decoder]\n"*" = {bits = 8, activations = "int4"}', "activations must be one of none, int8, int8-token"),
        ('[encoder]\n"*" = {bits = 8, balance = 0.5}', r"\[encoder\] sees no inputs in calibration"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=said) as caught:
        read(text, tmp_path)
    assert "\n" not in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_a_layer_that_is_not_there_is_answered_with_the_nearest_names(tmp_path: Path) -> None:
    recipe = read('[transformer]\n"blocks.0.attn.to_k" = {bits = 8}', tmp_path)
    with pytest.raises(ConversionError, match=r"matches no layer; nearest: blocks\.0\.attn\.to_q"):
        recipe.resolve("transformer", LAYERS)


def test_a_single_layer_is_not_quietly_given_something_else(tmp_path: Path) -> None:
    recipe = read('[transformer]\n"conv" = {bits = 4}', tmp_path)
    with pytest.raises(ConversionError, match="conv is a convolution of 32x32x3x3 and cannot have 4 bits"):
        recipe.resolve("transformer", LAYERS)


@pytest.mark.parametrize("kind", ["int8", "int8-token"])
def test_int8_arithmetic_is_refused_where_nothing_can_have_it(kind: str, tmp_path: Path) -> None:
    for component, able in (("transformer", "matrices and 1x1 conv"), ("decoder", "convolutions of 64 channels")):
        recipe = read(f'[{component}]\n"conv*" = {{bits = 8, activations = "{kind}"}}', tmp_path)
        with pytest.raises(ConversionError, match=f"matches none of the layers that compute in int8, which are {able}"):
            recipe.resolve(component, LAYERS)


def test_a_decoder_computes_in_int8_where_its_convolutions_are_wide(tmp_path: Path) -> None:
    layers = {
        one.name: one
        for one in (
            layer("wide", 64, 128, 3, 3, kind="convolution"),
            layer("narrow", 3, 128, 3, 3, kind="convolution"),
            layer("attention", 128, 128),
        )
    }
    recipe = read('[decoder]\n"*" = {bits = 8, activations = "int8"}', tmp_path)
    assert recipe.calibrated == ("decoder",)
    found = recipe.resolve("decoder", layers)
    assert found == {"wide": Form(8, int8_activations=True), "narrow": Form(8), "attention": Form(8)}
    recipe = read('[transformer]\n"*" = {bits = 8, activations = "int8"}', tmp_path)
    assert recipe.resolve("transformer", layers)["wide"] == Form(8)


@pytest.mark.parametrize(
    ("dtype", "calibrated", "said"),
    [
        ("w5", False, "unknown dtype 'w5'; choose from: fp32, fp16, w8"),
        ("fp16", True, "--calibration does nothing for fp16"),
        ("w8", True, "--calibration does nothing for w8"),
        ("mixed:30M", False, "add --calibration"),
        ("mixed:30", True, "is no budget; write a size as mixed:30M"),
        ("mixed:0dB", True, "is no budget"),
        ("absent.toml", False, "cannot be read"),
    ],
)
def test_a_dtype_that_cannot_be_had_says_what_can(dtype: str, calibrated: bool, said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        recipe_of(dtype, calibrated=calibrated)


def test_a_recipe_with_methods_needs_calibration_and_one_without_refuses_it(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[transformer]\n"*" = {bits = 4, rounding = "adaptive"}')
    with pytest.raises(ConversionError, match="add --calibration self"):
        recipe_of(str(path), calibrated=False)
    path.write_text('[transformer]\n"*" = {bits = 4, rotate = true}')
    assert recipe_of(str(path), calibrated=False) is not None
    with pytest.raises(ConversionError, match="leave --calibration out"):
        recipe_of(str(path), calibrated=True)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "w8"])
def test_presets_use_methods_only_when_the_inputs_of_layers_are_known(name: str) -> None:
    plain, calibrated = recipe_of(name, calibrated=False), recipe_of(name, calibrated=True)
    assert plain is not None
    assert calibrated is not None
    assert not plain.calibrated
    assert calibrated.calibrated == ("transformer", "decoder")[: 1 + name.endswith("a8")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bits = 6", "6 bits are a palette's; choose from 8, 4, 3, 2"),
        ("bits = 4, vector = 2", 'vector goes with format = "palette"'),
        ('bits = 8, format = "palette", vector = 2', "has entries of 1 weights, not 2; set vector"),
        ("bits = 8, sparsity = 1.0", "above 0 and below 1"),
        ("bits = 8, sparsity = true", "sparsity must be a number from 0 to 1"),
        ("bits = 4, sparsity = 0.5", "sparsity goes with 16 or 8 bits"),
        ('bits = 8, rounding = "adaptive", sparsity = 0.5', "would fill the zeros"),
    ],
)
def test_palettes_and_zeros_that_no_backend_stores_are_refused(line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=said):
        read(f'[transformer]\n"*" = {{{line}}}', tmp_path)


def test_zeros_and_vectors_go_where_a_layer_can_have_them(tmp_path: Path) -> None:
    found = read('[transformer]\n"*" = {bits = 1, format = "palette", sparsity = 0.3}', tmp_path)
    forms = found.resolve("transformer", LAYERS)
    assert forms["blocks.0.ff"] == Form(1, format="palette", sparsity=0.3)
    assert forms["blocks.1.seven"] == Form(8, sparsity=0.3), "84 outputs do not fill entries of eight"
    assert (forms["conv"], forms["table"]) == (Form(8, sparsity=0.3), Form(8))


def test_budgets_are_bytes_or_decibels() -> None:
    size, quality = recipe_of("mixed:3.5M", calibrated=True), recipe_of("mixed:35dB", calibrated=True)
    assert size is not None
    assert quality is not None
    assert (size.budget, size.budget_unit) == (3.5e6, "B")
    assert (quality.budget, quality.budget_unit) == (35, "dB")
