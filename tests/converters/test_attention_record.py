"""Checkpoints whose edgedit.json names self-attention operators, from the folder to the prediction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_references import REFERENCES, Reference
from diffusers import PixArtTransformer2DModel
from tiny_pipelines import randomize

import edgedit
from edgedit.converters.architectures.operators import operators_of
from edgedit.converters.own_record import read_own_record
from edgedit.errors import CheckpointError, ConversionError
from edgedit.schedules import own_steps

Saved = Callable[[str], tuple[Any, Path, int]]

WIDTH, HEADS = 24, 3
EVERY_OPERATOR: list[dict[str, Any]] = [
    {"operator": "lit", "heads": 2, "kernel_size": 5, "layers": [0]},
    {"operator": "clear", "radius": 2, "pool": 2, "layers": [1]},
    {"operator": "kv", "factor": 2, "layers": [3]},
    {"operator": "proxy", "window": 2, "layers": [4]},
    {"operator": "relu", "heads": 1, "layers": [5]},
]
RELU = [{"operator": "relu", "heads": 2, "layers": [0, 1]}]


def transformer(entries: Sequence[dict[str, Any]], num_layers: int, seed: int) -> PixArtTransformer2DModel:
    """A PixArt with the named operators, written with torch, in its blocks."""
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=num_layers,
        cross_attention_dim=WIDTH,
        caption_channels=24,
        sample_size=8,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    for entry in entries:
        options = {key: value for key, value in entry.items() if key not in ("operator", "layers", "heads")}
        for layer in entry["layers"]:
            operator = REFERENCES[entry["operator"]](WIDTH, entry.get("heads", HEADS), **options)
            model.transformer_blocks[layer].attn1 = operator
    randomize(model, seed)
    return model.eval()


def predict(model: PixArtTransformer2DModel, inputs: dict[str, np.ndarray]) -> np.ndarray:
    size = tuple(side // 2 for side in inputs["latents"].shape[2:])
    for module in model.modules():
        if isinstance(module, Reference):
            module.size = size
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        return model(
            tensors["latents"],
            encoder_hidden_states=tensors["encoder_hidden_states"],
            timestep=tensors["timestep"],
            encoder_attention_mask=tensors["encoder_attention_mask"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.numpy()


def draw_inputs(random: np.random.Generator, height: int, width: int) -> dict[str, np.ndarray]:
    return {
        "latents": random.standard_normal((2, 4, 2 * height, 2 * width), dtype=np.float32),
        "timestep": np.array([999.0, 13.0], np.float32),
        "encoder_hidden_states": random.standard_normal((2, 5, 24), dtype=np.float32),
        "encoder_attention_mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32),
    }


def agrees(bundle: Path, model: PixArtTransformer2DModel, seed: int) -> None:
    pipeline, random = edgedit.load(bundle), np.random.default_rng(seed)
    for height, width in ((5, 7), (4, 9)):
        inputs = draw_inputs(random, height, width)
        expected = predict(model, inputs)
        actual = pipeline.predict(**inputs)
        difference = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert difference <= 1e-5, f"{(height, width)}, seed {seed}"


def test_a_lone_transformer_takes_the_record_beside_it(tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    model = transformer(EVERY_OPERATOR, 6, seed)
    folder = tmp_path / "mine"
    model.save_pretrained(folder)
    (folder / "edgedit.json").write_text(json.dumps({"attention": EVERY_OPERATOR}))
    edgedit.convert(folder, tmp_path / "x.edgedit")
    agrees(tmp_path / "x.edgedit", model, seed)
    config = edgedit.load(tmp_path / "x.edgedit").bundle.component("transformer").config
    assert config["self_attention"] == [
        EVERY_OPERATOR[0],
        EVERY_OPERATOR[1],
        {"operator": "softmax", "layers": [2]},
        {**EVERY_OPERATOR[2], "sampling": "conv"},
        *EVERY_OPERATOR[3:],
    ]


@pytest.fixture
def linearized(saved_pipeline: Saved, tmp_path: Path) -> tuple[Path, PixArtTransformer2DModel, int]:
    """A pipeline's folder with ReLU attention in both blocks, which has the parameters of softmax attention."""
    _, folder, seed = saved_pipeline("pixart-sigma")
    checkpoint = Path(shutil.copytree(folder, tmp_path / "checkpoint"))
    model = transformer(RELU, 2, seed)
    shutil.rmtree(checkpoint / "transformer")
    model.save_pretrained(checkpoint / "transformer")
    (checkpoint / "edgedit.json").write_text(json.dumps({"attention": RELU}))
    return checkpoint, model, seed


def test_every_way_to_name_a_linearized_transformer_converts_its_operators(
    linearized: tuple[Path, PixArtTransformer2DModel, int], tmp_path: Path
) -> None:
    checkpoint, model, seed = linearized
    inside = checkpoint / "transformer"
    for number, source in enumerate((checkpoint, inside, inside / "diffusion_pytorch_model.safetensors")):
        edgedit.convert(source, tmp_path / f"{number}.edgedit", components=["transformer"])
        agrees(tmp_path / f"{number}.edgedit", model, seed)


def test_a_linearized_pipeline_draws_and_tells_its_operators(
    linearized: tuple[Path, PixArtTransformer2DModel, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgedit.apps.cli.main import main

    checkpoint, model, seed = linearized
    assert main(["convert", str(checkpoint), "-o", str(tmp_path / "x.edgedit"), "-q"]) == 0
    agrees(tmp_path / "x.edgedit", model, seed)
    assert len(edgedit.load(tmp_path / "x.edgedit").generate("a red cat", steps=2, seed=0).images) == 1
    assert main(["inspect", str(tmp_path / "x.edgedit")]) == 0
    assert "relu (heads 2) in 0-1" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "x.edgedit")]) == 0


def test_a_component_with_its_own_record_does_not_take_that_of_the_pipeline(
    linearized: tuple[Path, PixArtTransformer2DModel, int], tmp_path: Path
) -> None:
    inside = linearized[0] / "transformer"
    (inside / "edgedit.json").write_text("{}")
    edgedit.convert(inside, tmp_path / "x.edgedit")
    config = edgedit.load(tmp_path / "x.edgedit").bundle.component("transformer").config
    assert config["self_attention"] == [{"operator": "softmax", "layers": [0, 1]}]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"operator": "relu", "heads": 7, "layers": [0]}], "heads = 7: it must divide the width, 24"),
        ([{"operator": "relu", "heads": 2, "layers": [2]}], r"layers = \[2\]: it must list blocks from 0 to 1"),
        ([{"operator": "lit", "heads": 2, "layers": [0]}], r"attn1\.dwc"),
    ],
    ids=["heads", "layers", "weights"],
)
def test_operators_that_the_weights_cannot_have_are_refused(
    linearized: tuple[Path, PixArtTransformer2DModel, int], tmp_path: Path, entries: Any, message: str
) -> None:
    checkpoint = linearized[0]
    (checkpoint / "edgedit.json").write_text(json.dumps({"attention": entries}))
    with pytest.raises((CheckpointError, ConversionError), match=message):
        edgedit.convert(checkpoint, tmp_path / "x.edgedit")
    assert not (tmp_path / "x.edgedit").exists()


def test_the_record_in_the_documentation_is_accepted(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")
    record = page.split("## What a checkpoint says of itself")[1].split("```json\n")[1].split("```")[0]
    (tmp_path / "edgedit.json").write_text(record)
    own = read_own_record(tmp_path)
    assert own.schedule is not None
    assert own_steps(own.schedule) == (4, 2, 1)
    names = [operator.name for operator in operators_of(own.attention, 6, 12)]
    assert names == ["lit", "lit", "kv", "softmax", "softmax", "lit"]
