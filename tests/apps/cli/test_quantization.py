"""`convert` with recipes and calibration, and what `inspect` tells of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantizable import save_quantizable

Run = Callable[..., Any]

RECIPE = """
[transformer]
"*" = {bits = 8}
"transformer_blocks.*" = {bits = 4, block = 32, rounding = "adaptive"}
"transformer_blocks.0.attn1.*" = {bits = 8, activations = "int8", balance = 0.5, rotate = true}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantizable")
    save_quantizable(folder, 7)
    return folder


def test_a_recipe_is_followed_recorded_and_shown(cli: Run, source: Path) -> None:
    Path("mine.toml").write_text(RECIPE)
    Path("prompts.txt").write_text("a red cat\n")
    options = ("--dtype", "mine.toml", "--calibration", "prompts.txt", "--components", "transformer")
    done = cli("convert", source, "-o", "a.edgedit", *options)
    assert done.status == 0, done.err
    assert " mine " in next(line for line in done.lines if line.startswith("transformer"))
    assert {"encode prompts", "draw", "calibrate transformer"} <= set(done.err.splitlines())
    shown = cli("inspect", "a.edgedit")
    assert shown.status == 0, shown.err
    assert "bits 4 block 32 rounding adaptive" in shown.out
    assert "bits 8 activations int8 balance 0.5 rotate True" in shown.out
    assert "transformer: calibrated on 1 prompts, 10 calls" in shown.out
    record = json.loads(cli("inspect", "a.edgedit", "--json").out)["quantization"]["transformer"]
    assert record["layers"]["transformer_blocks.0.attn1.to_q"]["activations"] == "int8"
    assert record["rules"]["*"] == {"bits": 8}
    verified = cli("verify", "a.edgedit")
    assert verified.status == 0, verified.out + verified.err


def test_one_recipe_serves_every_backend_and_verify_knows_its_weights_again(cli: Run, source: Path) -> None:
    Path("two.toml").write_text('[transformer]\n"*" = {bits = 8}\n"*.ff.*" = {bits = 3, block = 32, rotate = true}\n')
    options = ("--to", "onnx,coreml,mlx", "--dtype", "two.toml", "--components", "transformer")
    done = cli("convert", source, "-o", "a.edgedit", *options, "--json")
    assert done.status == 0, done.err
    (component,) = json.loads(done.out)["components"]
    errors = [artefact["parity"]["relative_l2"] for artefact in component["artefacts"]]
    assert [artefact["precision"] for artefact in component["artefacts"]] == ["two"] * 3
    assert max(errors) < 1.1 * min(errors)
    verified = cli("verify", "a.edgedit", "--backend", "all", "--interpreter", "--json")
    assert verified.status == 0, verified.err
    assert all(check["own"] < 1e-2 for check in json.loads(verified.out)["components"])


def test_a_budget_shows_what_each_layer_loses(cli: Run, source: Path) -> None:
    Path("prompts.txt").write_text("a red cat\n")
    options = ("--dtype", "mixed:33dB", "--calibration", "prompts.txt", "--components", "transformer")
    assert cli("convert", source, "-o", "a.edgedit", "-q", *options).status == 0
    shown = cli("inspect", "a.edgedit").out
    assert "loss of the prediction (share of its energy) by layer and bits" in shown
    assert "layers that lose less" in shown
    assert any("*" in line for line in shown.splitlines() if line.startswith("transformer_blocks"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dtype", "w4", "--calibration", "absent.txt"), "cannot be read"),
        (("--dtype", "w8", "--calibration", "self"), "does nothing for w8"),
        (("--dtype", "mixed:30M"), "add --calibration self"),
        (("--dtype", "typo.toml"), "matches no layer; nearest: transformer_blocks.0.attn1.to_q"),
        (("--dtype", "w2", "--to", "mlx"), 'MLX has no palettes; use format = "int"'),
        (("--dtype", "fp4", "--to", "mlx"), 'format "fp4" is for ONNX Runtime only'),
        (("--dtype", "fp4", "--to", "coreml"), 'format "fp4" is for ONNX Runtime only'),
        (("--dtype", "w8a8", "--to", "onnx,mlx"), "MLX computes with float activations"),
        (("--dtype", "w8a8", "--to", "coreml"), "ranges that are known at conversion; add --calibration self"),
        (("--dtype", "zeros.toml"), "only Core ML stores no zeros, and this is for onnx"),
        (("--dtype", "vectors.toml"), "ONNX stores a byte for each entry's number; set vector = 2"),
        (("--dtype", "w4", "--to", "coreml", "--coreml-weights", "int4"), "dtype w4 says how weights are stored"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    options: tuple[str, ...], said: str, cli: Run, source: Path, tmp_path: Path
) -> None:
    Path("typo.toml").write_text('[transformer]\n"transformer_blocks.0.attn1.to_qq" = {bits = 8}\n')
    Path("zeros.toml").write_text('[transformer]\n"*" = {bits = 8, sparsity = 0.5}\n')
    Path("vectors.toml").write_text('[transformer]\n"*" = {bits = 4, format = "palette", vector = 1}\n')
    done = cli("convert", source, "-o", "a.edgedit", *options)
    assert done.status == 2
    assert said in done.err.splitlines()[-1]
    assert not any(path.name.startswith((".a.edgedit", "a.edgedit")) for path in tmp_path.iterdir())
