"""The operators in torch: against explicit references, and against the graphs that the converter makes of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_pipelines import build_pipeline, randomize

import edgedit
from edgedit.converters.training.operators import make_operator, parse_operator
from edgedit.converters.training.trainable import open_trainable, replace_attention, save_trainable
from edgedit.errors import CheckpointError, InputError

SPECS: list[dict[str, Any]] = [
    {"operator": "relu", "heads": 2},
    {"operator": "lit", "heads": 1, "kernel_size": 5},
    {"operator": "clear", "radius": 2, "pool": None},
    {"operator": "clear", "radius": 3, "pool": 2},
    {"operator": "kv", "factor": 2},
]


def ids(spec: dict[str, Any]) -> str:
    return "-".join(str(value) for value in spec.values())


def attention(heads: int, width: int, seed: int) -> Attention:
    made = Attention(width, heads=heads, dim_head=width // heads, bias=True)
    scramble(made, seed)
    return made


def scramble(module: torch.nn.Module, seed: int) -> None:
    randomize(torch.nn.ModuleDict({"module": module}), seed)


@pytest.fixture
def seed() -> int:
    return int(np.random.default_rng().integers(2**31))


@pytest.mark.parametrize("name", ["relu", "lit"])
def test_linear_attention_is_what_the_whole_matrix_of_scores_gives(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(4):
        heads, width, grid = 2, 8 * int(rng.integers(1, 4)), (int(rng.integers(2, 8)), int(rng.integers(2, 8)))
        softmax = attention(4, width, seed)
        operator = make_operator({"operator": name, "heads": heads}, softmax)
        if name == "lit":
            scramble(operator.dwc, seed + 1)
        operator.grid = grid
        x = torch.randn(2, grid[0] * grid[1], width)
        with torch.no_grad():
            q, k, v = (getattr(softmax, f"to_{part}")(x) for part in "qkv")
            split = [part.view(2, -1, heads, width // heads).transpose(1, 2) for part in (q.relu(), k.relu(), v)]
            scores = split[0] @ split[1].transpose(-1, -2)
            mixed = (scores @ split[2] / scores.sum(-1, keepdim=True).clamp(min=1e-15)).transpose(1, 2).flatten(2)
            if name == "lit":
                local = operator.dwc(v.transpose(1, 2).unflatten(-1, grid))
                mixed = mixed + local.flatten(2).transpose(1, 2)
            expected = softmax.to_out[0](mixed)
            torch.testing.assert_close(operator(x), expected, rtol=1e-4, atol=1e-5)


def test_a_circle_wider_than_the_map_is_full_attention(seed: int) -> None:
    softmax = attention(2, 16, seed)
    operator = make_operator({"operator": "clear", "radius": 20, "pool": None}, softmax)
    operator.grid = (5, 7)
    x = torch.randn(2, 35, 16)
    with torch.no_grad():
        torch.testing.assert_close(operator(x), softmax(x), rtol=1e-4, atol=1e-5)
        operator.radius = 2
        assert (operator(x) - softmax(x)).abs().max() > 1e-3


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_torch_and_the_converted_graph_compute_the_same(spec: dict[str, Any], tmp_path: Path, seed: int) -> None:
    build_pipeline("pixart-sigma", seed).save_pretrained(tmp_path / "softmax")
    source = open_trainable(tmp_path / "softmax")
    changed = copy.deepcopy(source.transformer)
    specs = [{**spec, "layers": [1]}]
    for operator in replace_attention(changed, specs):
        scramble(operator, seed + 9)
    save_trainable(source, tmp_path / "new", weights=changed.state_dict(), settings={"attention": specs})
    again = open_trainable(tmp_path / "new").transformer
    edgedit.convert(tmp_path / "new", tmp_path / "new.edgedit", components=("transformer",), measure=False)
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((2, 4, 10, 6), dtype=np.float32)
    text = rng.standard_normal((2, 5, 24), dtype=np.float32)
    with torch.no_grad():
        expected = again(
            torch.from_numpy(latents),
            encoder_hidden_states=torch.from_numpy(text),
            timestep=torch.tensor([700.0, 31.0]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0].numpy()
    with edgedit.load(tmp_path / "new.edgedit") as pipeline:
        found = pipeline.predict(
            latents=latents, timestep=np.array([700.0, 31.0], np.float32), encoder_hidden_states=text
        )
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 1e-5, f"seed {seed}: {error}"


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("lit", {"operator": "lit", "heads": 2, "kernel_size": 5}),
        ("relu", {"operator": "relu", "heads": 2}),
        ("clear:8", {"operator": "clear", "radius": 8, "pool": None}),
        ("CLEAR:8:4", {"operator": "clear", "radius": 8, "pool": 4}),
        ("kv:2", {"operator": "kv", "factor": 2}),
    ],
)
def test_the_command_lines_spelling_becomes_the_object_of_the_checkpoint(text: str, spec: dict[str, Any]) -> None:
    assert parse_operator(text, heads=8) == spec


@pytest.mark.parametrize("text", ["", "mamba", "clear", "clear:0", "clear:x", "lit:2", "kv", "kv:2:2"])
def test_an_operator_that_is_not_known_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(InputError, match="lit, relu, clear:RADIUS"):
        parse_operator(text, heads=8)


def test_heads_are_for_linear_attention_and_must_divide_the_width(seed: int) -> None:
    with pytest.raises(InputError, match="keeps the 8 heads"):
        parse_operator("kv:2", heads=8, linear_heads=2)
    with pytest.raises(InputError, match="do not divide into 5 heads"):
        make_operator({"operator": "relu", "heads": 5}, attention(2, 16, seed))


def test_a_checkpoint_whose_weights_are_not_those_of_its_operators_is_refused(tmp_path: Path) -> None:
    build_pipeline("pixart-sigma", 1).save_pretrained(tmp_path / "softmax")
    (tmp_path / "softmax" / "edgedit.json").write_text(
        json.dumps({"attention": [{"operator": "lit", "heads": 1, "kernel_size": 5, "layers": [0]}]})
    )
    with pytest.raises(CheckpointError, match=r"lacks transformer_blocks\.0\.attn1\.dwc"):
        open_trainable(tmp_path / "softmax")
