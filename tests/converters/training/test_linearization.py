"""`linearize`: what it learns, what an interruption leaves, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import build_pipeline, randomize

from edgedit.converters.training.calibration import Calibration
from edgedit.converters.training.denoisers import Text
from edgedit.converters.training.linearization import linearize
from edgedit.converters.training.linearize import (
    Batches,
    RegressionStage,
    layer_errors,
    linear_student,
    make_operators,
    softmax_layers,
)
from edgedit.converters.training.loop import Budget, run_stage
from edgedit.converters.training.trainable import open_trainable, replace_attention
from edgedit.errors import CheckpointError, ConversionError, InputError

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"steps": 6, "samples": 8, "batch_size": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linearize") / "softmax"
    build_pipeline("pixart-sigma", int(np.random.default_rng().integers(2**31))).save_pretrained(folder)
    (folder / "calibration.txt").write_text("a red circle\na blue square above a star\n")
    return folder


def calibration(seed: int, width: int = 24) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    text = Text(torch.randn(4, 5, width, generator=generator), torch.ones(4, 5, dtype=torch.long))
    empty = Text(torch.randn(1, 5, width, generator=generator), torch.ones(1, 5, dtype=torch.long))
    latents = torch.randn(16, 4, 8, 8, generator=generator).numpy().astype(np.float16)
    return Calibration(text, empty, latents, 1.0, seed, 8)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_an_operator_grafted_onto_itself_learns_itself(checkpoint: Path, tmp_path: Path) -> None:
    spec = {"operator": "lit", "heads": 1, "kernel_size": 3}
    torch.manual_seed(4)
    teacher = open_trainable(checkpoint)
    replace_attention(teacher.transformer, [{**spec, "layers": [0, 1]}])
    randomize(teacher.transformer, 5)
    operators = make_operators(build_pipeline("pixart-sigma", 6).transformer, [0, 1], spec)
    stage = RegressionStage(
        teacher.denoiser(), operators, calibration(1), seed=3, device=CPU, batch_size=8, learning_rate=1e-2
    )
    with torch.no_grad():
        before = stage.loss(0).item()
    averaged = run_stage(stage, tmp_path, Budget(steps=600), log=lambda line: None, warm_up=10, decay_share=0.7)
    operators.load_state_dict(averaged)
    with torch.no_grad():
        after = float(np.mean([stage.loss(1000 + step).item() for step in range(4)]))
    assert after < 0.03 * before, (before, after)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_prompts_are_left_out_only_where_guidance_takes_them_off(checkpoint: Path, guidance_scale: float) -> None:
    data = replace(calibration(2), guidance_scale=guidance_scale)
    batches = Batches(data, open_trainable(checkpoint).denoiser(), 0, 12, 64, CPU)
    empty = [
        bool((states == data.empty.states[0]).all()) for step in range(3) for states in batches.draw(step)[2].states
    ]
    assert any(empty) == (guidance_scale != 1)


def test_no_layers_is_the_identity_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    report = linearize(checkpoint, tmp_path / "same", layers="none", **QUICK)
    assert report.attention == []
    before = {path.relative_to(checkpoint): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    after = {
        path.relative_to(tmp_path / "same"): path.read_bytes()
        for path in (tmp_path / "same").rglob("*")
        if path.is_file()
    }
    assert before == after


@pytest.mark.parametrize("stage", ["regression", "distillation"])
def test_interrupted_and_resumed_gives_the_same_checkpoint(stage: str, checkpoint: Path, tmp_path: Path) -> None:
    linearize(checkpoint, tmp_path / "whole", attention="lit", **QUICK)
    with pytest.raises(KeyboardInterrupt):
        linearize(checkpoint, tmp_path / "parts", attention="lit", stop_after=(stage, 3), **QUICK)
    assert not (tmp_path / "parts").exists()
    linearize(checkpoint, tmp_path / "parts", attention="lit", **QUICK)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not list(tmp_path.glob(".*")), "the folder with intermediate results is gone"


def test_only_attention_gains_tensors_and_the_rest_of_the_folder_is_the_old_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    linearize(checkpoint, tmp_path / "new", attention="lit", layers="1", **QUICK)
    gained = weights(tmp_path / "new").keys() - weights(checkpoint).keys()
    assert gained == {f"transformer_blocks.1.attn1.dwc.{name}" for name in ("weight", "bias")}
    assert not weights(checkpoint).keys() - weights(tmp_path / "new").keys()
    record = json.loads((tmp_path / "new" / "edgedit.json").read_text())
    assert record == {"attention": [{"operator": "lit", "heads": 1, "kernel_size": 5, "layers": [1]}]}
    for name in ("text_encoder/model.safetensors", "vae/config.json", "transformer/config.json", "calibration.txt"):
        assert (tmp_path / "new" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_auto_ranks_layers_by_what_they_cost_and_stays_within_the_error(checkpoint: Path) -> None:
    source = open_trainable(checkpoint)
    source.transformer.eval().requires_grad_(False)
    teacher, data = source.denoiser(), calibration(2)
    layers = softmax_layers(source.transformer)
    operators = make_operators(source.transformer, layers, {"operator": "relu", "heads": 3})
    options: dict[str, Any] = {"seed": 1, "device": CPU, "batch_size": 4, "batch_count": 2}
    rows = layer_errors(teacher, operators, data, max_error=float("inf"), **options)
    assert [row.alone for row in rows] == sorted(row.alone for row in rows)
    assert all(row.chosen for row in rows)
    limit = (rows[0].together + rows[1].together) / 2
    if rows[0].together < rows[1].together:
        again = layer_errors(teacher, operators, data, max_error=limit, **options)
        assert [row.chosen for row in again] == [True, False]
    assert not any(row.chosen for row in layer_errors(teacher, operators, data, max_error=0.0, **options))


def test_a_student_without_replaced_layers_is_its_teacher(checkpoint: Path) -> None:
    source = open_trainable(checkpoint)
    data = calibration(3)
    student = linear_student(source.transformer, {}, [])
    x, s = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8])
    text = data.prompts(np.arange(2), CPU)
    with torch.no_grad():
        mine = source.denoiser().with_network(student)(x, s, text)
        assert torch.equal(mine, source.denoiser()(x, s, text))


def test_weights_keep_the_type_they_were_stored_in(checkpoint: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    linearize(checkpoint, half, layers="none", **QUICK)
    path = half / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    linearize(half, tmp_path / "new", attention="relu", **QUICK)
    assert {value.dtype for value in weights(tmp_path / "new").values()} == {torch.float16}


def test_a_checkpoint_without_softmax_attention_is_refused(tmp_path: Path) -> None:
    build_pipeline("sana", 1).save_pretrained(tmp_path / "sana")
    with pytest.raises(InputError, match="no layer with softmax self-attention"):
        linearize(tmp_path / "sana", tmp_path / "new", **QUICK)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None, "budget": 0.0}, "more than nothing"),
        ({"steps": 0}, "more than nothing"),
        ({"budget": 5.0}, "not both"),
        ({"layers": "7"}, "layer 7 has no softmax"),
        ({"layers": "some"}, "not all, auto, none"),
        ({"attention": "mamba"}, "unknown attention"),
        ({"device": "tpu"}, "unknown device"),
        ({"calibration": "missing.txt"}, "cannot be read"),
        ({"layers": "auto", "max_error": 0.0}, "no layer keeps within"),
    ],
)
def test_options_without_sense_are_refused(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        linearize(checkpoint, tmp_path / "new", **{**QUICK, **options})
    assert not (tmp_path / "new").exists()


def test_a_calibration_file_without_prompts_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(InputError, match="holds no prompts"):
        linearize(checkpoint, tmp_path / "new", calibration=str(tmp_path / "empty.txt"), **QUICK)


def test_an_output_that_exists_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(ConversionError, match="exists"):
        linearize(checkpoint, tmp_path / "new", **QUICK)


def test_a_component_alone_cannot_be_linearized(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no pipeline folder"):
        linearize(checkpoint / "transformer", tmp_path / "new", **QUICK)


def test_an_unfinished_run_with_other_options_is_not_mixed_up(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        linearize(checkpoint, tmp_path / "new", stop_after=("regression", 2), **QUICK)
    with pytest.raises(InputError, match="unfinished run with other options"):
        linearize(checkpoint, tmp_path / "new", seed=1, **QUICK)
    for file in (tmp_path / ".new.work").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        linearize(checkpoint, tmp_path / "new", **QUICK)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    linearize(checkpoint, broken, layers="none", **QUICK)
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="not numbers"):
        linearize(broken, tmp_path / "new", **QUICK)
    assert not (tmp_path / "new").exists()
