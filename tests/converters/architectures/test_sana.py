"""SANA and SANA-Sprint against diffusers, on fresh random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from parity_tools import (
    BASE_SEED,
    TOLERANCE,
    Graph,
    fresh_seed,
    padding_mask,
    parameter_shapes,
    randomise,
    relative_l2,
)

from edgedit.converters.architectures.sana import build_transformer
from edgedit.errors import ConversionError
from edgedit.positions import pos_embed_table

RMS, LAYER = "rms_norm_across_heads", "layer_norm_across_heads"


def draw_config(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    """A tiny configuration that diffusers accepts; `fixed` overrides what is drawn."""
    heads, head_dim = int(random.integers(1, 6)), int(random.choice([4, 8, 16]))
    in_channels = int(random.integers(1, 9))
    return {
        "in_channels": in_channels,
        "out_channels": random.choice([None, in_channels, int(random.integers(1, 9))]),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": int(random.integers(1, 4)),
        "num_cross_attention_heads": int(random.integers(1, 4)),
        "cross_attention_head_dim": int(random.integers(2, 14)),
        "cross_attention_dim": heads * head_dim,
        "caption_channels": int(random.integers(3, 40)),
        "mlp_ratio": float(random.choice([1, 2.5, 3.3])),
        "attention_bias": bool(random.integers(2)),
        "sample_size": int(random.choice([6, 8, 32])),
        "patch_size": int(random.choice([1, 1, 2])),
        "norm_elementwise_affine": bool(random.integers(2)),
        "norm_eps": float(random.choice([1e-6, 1e-5, 1e-3])),
        "interpolation_scale": random.choice([None, None, 1, 2]),
        "guidance_embeds": bool(random.integers(2)),
        "qk_norm": random.choice([None, RMS]),
        **fixed,
    }


def draw_inputs(
    random: np.random.Generator, config: dict[str, Any], grid: tuple[int, int], batch: int
) -> dict[str, np.ndarray]:
    """Everything that the graph takes but the table of positions."""
    patch, length = config["patch_size"], int(random.integers(1, 12))
    # Sprint is told sin/(cos + sin) of the TrigFlow time, SANA a whole number.
    times = (
        random.uniform(0, 1, batch) if config["guidance_embeds"] else random.choice([1.0, 136.0, 499.0, 999.0], batch)
    )
    inputs = {
        "latents": random.standard_normal((batch, config["in_channels"], grid[0] * patch, grid[1] * patch)),
        "timestep": times,
        "encoder_hidden_states": random.standard_normal((batch, length, config["caption_channels"])),
        "encoder_attention_mask": padding_mask(random, batch, length),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = random.uniform(0, 1, batch)
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def reference(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        return model(tensors.pop("latents"), **tensors).sample.numpy()


FIXED: list[dict[str, Any]] = [
    {"guidance_embeds": False, "qk_norm": None, "interpolation_scale": None, "patch_size": 1},
    {"guidance_embeds": True, "qk_norm": RMS, "interpolation_scale": None, "patch_size": 1},
    {"guidance_embeds": False, "qk_norm": RMS},
    {"qk_norm": LAYER},
    {"patch_size": 2, "interpolation_scale": 2},
    {"patch_size": 2, "interpolation_scale": None, "guidance_embeds": True},
    {"interpolation_scale": 1, "guidance_embeds": True},
    {"attention_bias": True, "norm_elementwise_affine": True, "out_channels": None},
    {"mlp_ratio": 3.3, "norm_eps": 1e-3},
    {},
    {},
]


@pytest.mark.parametrize("case", range(len(FIXED)))
def test_sana_matches_diffusers_on_a_fresh_random_configuration(case: int, tmp_path: Path) -> None:
    seed = fresh_seed(case)
    random = np.random.default_rng(seed)
    config = draw_config(random, **FIXED[case])
    model = randomise(SanaTransformer2DModel(**config), seed)
    component = build_transformer(config)
    graph = Graph(component, model, tmp_path)
    for grid, batch in (((4, 4), 1), ((3, 7), 2), ((9, 2), 3), ((1, 5), 1)):
        inputs = draw_inputs(random, config, grid, batch)
        extra = {}
        if component.runtime["positions"] is not None:
            extra["pos_embed"] = pos_embed_table(component.runtime["positions"], *inputs["latents"].shape[2:])
        error = relative_l2(graph(**inputs, **extra), reference(model, inputs))
        assert error <= TOLERANCE, f"{error:.2e} at grid {grid}, batch {batch}, {config}, seed {BASE_SEED}"


def test_guidance_changes_the_prediction_of_sprint(tmp_path: Path) -> None:
    random = np.random.default_rng(fresh_seed(40))
    config = draw_config(random, guidance_embeds=True, interpolation_scale=None)
    model = randomise(SanaTransformer2DModel(**config), fresh_seed(40))
    graph = Graph(build_transformer(config), model, tmp_path)
    inputs = draw_inputs(random, config, (4, 3), 1)
    changed = inputs | {"guidance": inputs["guidance"] + 0.2}
    assert relative_l2(graph(**changed), graph(**inputs)) > 1e-4


SMALL = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        pytest.param(SMALL, 591.7, id="0.6B"),
        pytest.param({}, 1604.5, id="1.6B"),
        pytest.param({"num_layers": 60, "qk_norm": RMS}, 4721.8, id="4.8B"),
        pytest.param({**SMALL, "guidance_embeds": True, "qk_norm": RMS}, 593.5, id="Sprint 0.6B"),
        pytest.param({"guidance_embeds": True, "qk_norm": RMS}, 1610.2, id="Sprint 1.6B"),
    ],
)
def test_full_size_sana_has_the_parameters_of_diffusers_and_builds_in_seconds(
    config: dict[str, Any], millions: float
) -> None:
    with torch.device("meta"):
        model = SanaTransformer2DModel(**config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes, seconds = parameter_shapes(build_transformer(dict(model.config)))
    assert shapes == expected
    assert round(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6, 1) == millions
    assert seconds < 5


def test_runtime_tells_what_the_sampler_must_know() -> None:
    sprint = build_transformer(
        {"guidance_embeds": True, "interpolation_scale": 2, "num_layers": 1, "timestep_scale": 1000.0}
    )
    assert sprint.runtime == {
        "patch_size": 1,
        "in_channels": 32,
        "out_channels": 32,
        "learned_sigma": False,
        "sample_size": 32,
        "positions": {"kind": "sincos_2d", "dim": 2240, "base_size": 32, "interpolation_scale": 2, "patch_size": 1},
        "resolution_aspect_ratio": False,
        "guidance_embeds": True,
        "guidance_embeds_scale": 0.1,
        "timestep_scale": 1000.0,
        "caption_channels": 2304,
        "self_attention": [{"operator": "relu", "heads": 70, "layers": [0]}],
    }
    assert [spec.name for spec in sprint.inputs][4:] == ["pos_embed", "guidance"]
    plain = build_transformer({"num_layers": 1})
    assert (plain.runtime["positions"], plain.runtime["guidance_embeds_scale"]) == (None, None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qk_norm": "l2"}, "qk_norm='l2'"),
        ({"cross_attention_dim": None}, "cross_attention_dim=None"),
        ({"cross_attention_dim": 40}, "cross_attention_dim=40"),
        ({"num_cross_attention_heads": None}, "num_cross_attention_heads=None"),
        ({"mlp_ratio": "2"}, "mlp_ratio='2'"),
        ({"guidance_embeds": "yes"}, "guidance_embeds='yes'"),
        ({"interpolation_scale": -1}, "interpolation_scale=-1"),
        ({"linear_head_dim": 8}, "linear_head_dim=8"),
    ],
)
def test_what_the_graph_cannot_represent_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 1}
    build_transformer(config)
    with pytest.raises(ConversionError, match=named) as caught:
        build_transformer({**config, **change})
    assert "\n" not in str(caught.value)


def test_blocks_that_the_record_names_have_its_operator() -> None:
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    entries = [{"operator": "lit", "heads": 4, "kernel_size": 3, "layers": [1]}]
    component = build_transformer({**config, "self_attention": entries})
    assert component.runtime["self_attention"] == [{"operator": "relu", "heads": 2, "layers": [0]}, *entries]
    shapes, _ = parameter_shapes(component)
    assert shapes["transformer_blocks.1.attn1.dwc.weight"] == (16, 1, 3, 3)
    assert "transformer_blocks.0.attn1.dwc.weight" not in shapes
