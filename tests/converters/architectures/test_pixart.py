"""PixArt against diffusers, on fresh random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
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
from torch.nn import functional

from edgedit.converters.architectures.pixart import build_transformer
from edgedit.converters.architectures.token_grid import TokenGrid
from edgedit.errors import ConversionError
from edgedit.positions import pos_embed_table


def draw_config(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    """A tiny configuration that diffusers accepts; `fixed` overrides what is drawn."""
    sized = fixed.pop("use_additional_conditions", bool(random.integers(2)))
    heads = int(random.integers(1, 5)) * (3 if sized else 1)
    head_dim = int(random.choice([4, 8, 12]))
    in_channels = int(random.integers(1, 7))
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": random.choice([None, 2 * in_channels, int(random.integers(1, 9))]),
        "num_layers": int(random.integers(1, 4)),
        "cross_attention_dim": heads * head_dim,
        "attention_bias": bool(random.integers(2)),
        "sample_size": int(random.choice([8, 16, 32, 64, 96])),
        "patch_size": int(random.choice([1, 2, 2, 3])),
        "activation_fn": str(random.choice(["gelu-approximate", "gelu"])),
        "norm_elementwise_affine": bool(random.integers(2)),
        "norm_eps": float(random.choice([1e-6, 1e-5, 1e-3])),
        "interpolation_scale": random.choice([None, 1, 2, 4]),
        "use_additional_conditions": sized,
        "caption_channels": int(random.integers(3, 40)),
        **fixed,
    }


def draw_inputs(
    random: np.random.Generator, config: dict[str, Any], grid: tuple[int, int], batch: int
) -> dict[str, np.ndarray]:
    """Everything that the graph takes but the table of positions; times are fractional and differ within a batch."""
    patch, length = config["patch_size"], int(random.integers(1, 12))
    text_channels = config["caption_channels"] or config["cross_attention_dim"]
    inputs = {
        "latents": random.standard_normal((batch, config["in_channels"], grid[0] * patch, grid[1] * patch)),
        "timestep": random.choice([0.0, 1.0, 249.75, 500.0, 999.0], batch),
        "encoder_hidden_states": random.standard_normal((batch, length, text_channels)),
        "encoder_attention_mask": padding_mask(random, batch, length),
    }
    if config["use_additional_conditions"]:
        inputs["resolution"] = random.choice([256.0, 512.0, 704.0, 1024.0], (batch, 2))
        inputs["aspect_ratio"] = random.uniform(0.25, 4, (batch, 1))
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def reference(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    conditions = {name: tensors.get(name) for name in ("resolution", "aspect_ratio")}
    with torch.no_grad():
        return model(
            tensors["latents"],
            encoder_hidden_states=tensors["encoder_hidden_states"],
            timestep=tensors["timestep"],
            encoder_attention_mask=tensors["encoder_attention_mask"],
            added_cond_kwargs=conditions,
        ).sample.numpy()


def check(
    random: np.random.Generator, config: dict[str, Any], model: torch.nn.Module, folder: Path, *, note: str
) -> None:
    """Several shapes through one graph, each within tolerance of `model`."""
    component = build_transformer(config)
    graph = Graph(component, model, folder)
    for grid, batch in (((4, 4), 1), ((3, 7), 2), ((9, 2), 3), ((1, 5), 1)):
        inputs = draw_inputs(random, config, grid, batch)
        table = pos_embed_table(component.runtime["positions"], *inputs["latents"].shape[2:])
        error = relative_l2(graph(**inputs, pos_embed=table), reference(model, inputs))
        assert error <= TOLERANCE, f"{error:.2e} at grid {grid}, batch {batch}, {config}, {note}"


FIXED: list[dict[str, Any]] = [
    {"use_additional_conditions": True},
    {"use_additional_conditions": False, "patch_size": 2},
    {"caption_channels": None},
    {"attention_bias": False, "activation_fn": "gelu"},
    {"norm_elementwise_affine": True, "out_channels": None},
    {"interpolation_scale": 4, "sample_size": 64},
    {"sample_size": 128, "interpolation_scale": None, "use_additional_conditions": True},
    {"patch_size": 3, "norm_eps": 1e-3},
    {},
    {},
]


@pytest.mark.parametrize("case", range(len(FIXED)))
def test_pixart_matches_diffusers_on_a_fresh_random_configuration(case: int, tmp_path: Path) -> None:
    seed = fresh_seed(case)
    random = np.random.default_rng(seed)
    config = draw_config(random, **FIXED[case])
    model = randomise(PixArtTransformer2DModel(**config), seed)
    check(random, config, model, tmp_path, note=f"seed {BASE_SEED}")


@pytest.mark.parametrize("sized", [False, True])
def test_the_attention_scale_multiplies_the_scores_of_self_attention_only(sized: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(fresh_seed(40))
    config = draw_config(random, use_additional_conditions=sized)
    model = randomise(PixArtTransformer2DModel(**config), fresh_seed(40))
    component = build_transformer(config)
    graph = Graph(component, model, tmp_path)
    inputs = draw_inputs(random, config, (5, 4), 2)
    table = pos_embed_table(component.runtime["positions"], *inputs["latents"].shape[2:])
    plain = graph(**inputs, pos_embed=table, attention_scale=np.ones(1, np.float32))
    scaled = graph(**inputs, pos_embed=table, attention_scale=np.float32([1.25]))
    # diffusers' processor takes no scale, but scores are linear in the queries.
    with torch.no_grad():
        for block in model.transformer_blocks:
            for parameter in block.attn1.to_q.parameters():
                parameter.mul_(1.25)
    assert relative_l2(scaled, reference(model, inputs)) <= TOLERANCE
    assert relative_l2(plain, scaled) > 100 * TOLERANCE


def test_a_scale_of_one_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(fresh_seed(41))
    config = draw_config(random)
    model = randomise(PixArtTransformer2DModel(**config), fresh_seed(41))
    inputs = draw_inputs(random, config, (6, 5), 2)
    outputs = []
    for folder in ("scaled", "plain"):
        (tmp_path / folder).mkdir()
        component = build_transformer(config)
        table = pos_embed_table(component.runtime["positions"], *inputs["latents"].shape[2:])
        outputs.append(Graph(component, model, tmp_path / folder)(**inputs, pos_embed=table))
        monkeypatch.setattr(TokenGrid, "scaled", lambda _, op, query: query)
    assert np.array_equal(*outputs)


def test_a_transformer_without_softmax_over_the_map_takes_no_attention_scale() -> None:
    config = {"num_attention_heads": 3, "attention_head_dim": 4, "num_layers": 2, "cross_attention_dim": 12}
    linear = {"operator": "relu", "heads": 3}
    for layers, takes in (([0], True), ([0, 1], False)):
        component = build_transformer({**config, "self_attention": [{**linear, "layers": layers}]})
        assert any(spec.name == "attention_scale" for spec in component.inputs) == takes


def test_the_padding_mask_hides_the_text_that_it_covers(tmp_path: Path) -> None:
    random = np.random.default_rng(fresh_seed(50))
    config = draw_config(random)
    model = randomise(PixArtTransformer2DModel(**config), fresh_seed(50))
    component = build_transformer(config)
    graph = Graph(component, model, tmp_path)
    inputs = draw_inputs(random, config, (3, 5), 2)
    text = np.concatenate([inputs["encoder_hidden_states"]] * 2, axis=1)
    ones = np.ones(inputs["encoder_hidden_states"].shape[:2], np.float32)
    inputs["pos_embed"] = pos_embed_table(component.runtime["positions"], *inputs["latents"].shape[2:])
    outputs = []
    for noise in (0.0, 5.0):
        text[:, ones.shape[1] :] += noise
        inputs |= {"encoder_hidden_states": text, "encoder_attention_mask": np.concatenate([ones, 0 * ones], axis=1)}
        outputs.append(graph(**inputs))
    assert np.array_equal(*outputs)


class SigmaProcessor:
    """Self-attention of PixArt-Sigma's repository as a processor of diffusers' Attention: norms over all heads of query
    and key, keys and values shortened as maps (section 3.2)."""

    def __init__(self, factor: int, sampling: str | None) -> None:
        self.factor, self.sampling = factor, sampling
        self.grid = (0, 0)

    def __call__(self, attention: Any, x: torch.Tensor, **_: Any) -> torch.Tensor:
        q, k, v = attention.to_q(x), attention.to_k(x), attention.to_v(x)
        if attention.norm_q is not None:
            q, k = attention.norm_q(q), attention.norm_k(k)
        if self.sampling is not None:
            k, v = self.compress(attention, k), self.compress(attention, v)
        q, k, v = (y.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return attention.to_out[0](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def compress(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2).unflatten(2, self.grid)
        if self.sampling == "conv":
            return attention.norm(attention.sr(x).flatten(2).transpose(1, 2))
        return functional.interpolate(x, scale_factor=1 / self.factor, mode="nearest").flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("sampling", "qk_norm"),
    [("conv", None), ("ave", None), ("conv", "layer_norm_across_heads"), (None, "layer_norm_across_heads")],
)
def test_sigma_with_compressed_keys_and_values_matches_torch(
    sampling: str | None, qk_norm: str | None, tmp_path: Path
) -> None:
    seed = fresh_seed(60)
    random = np.random.default_rng(seed)
    config = draw_config(random, num_layers=3, use_additional_conditions=False)
    model = PixArtTransformer2DModel(**config)
    width, factor, layers = config["cross_attention_dim"], 2, (1, 2)
    processor, plain = SigmaProcessor(factor, sampling), SigmaProcessor(factor, None)
    for index, block in enumerate(model.transformer_blocks):
        if qk_norm is not None:
            block.attn1.norm_q, block.attn1.norm_k = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        if sampling == "conv" and index in layers:
            block.attn1.sr = torch.nn.Conv2d(width, width, factor, stride=factor, groups=width)
            block.attn1.norm = torch.nn.LayerNorm(width)
        block.attn1.set_processor(processor if index in layers else plain)
    randomise(model, seed)
    config["qk_norm"] = qk_norm
    if sampling is not None:
        config["kv_compress_config"] = {"sampling": sampling, "scale_factor": factor, "kv_compress_layer": list(layers)}
    component = build_transformer(config)
    graph = Graph(component, model, tmp_path)
    for grid in ((4, 6), (5, 7), (2, 9)):
        processor.grid = grid
        inputs = draw_inputs(random, config, grid, 2)
        table = pos_embed_table(component.runtime["positions"], *inputs["latents"].shape[2:])
        error = relative_l2(graph(**inputs, pos_embed=table), reference(model, inputs))
        assert error <= TOLERANCE, f"{error:.2e} at grid {grid}, {config}, seed {BASE_SEED}"


@pytest.mark.parametrize("sample_size", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("scale", [None, 1, 2, 0.5])
def test_positions_are_those_that_diffusers_derives_from_the_configuration(
    sample_size: int, scale: float | None
) -> None:
    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 4,
        "num_layers": 1,
        "cross_attention_dim": 12,
        "sample_size": sample_size,
        "interpolation_scale": scale,
    }
    layer = PixArtTransformer2DModel(**config).pos_embed
    component = build_transformer(config)
    positions = component.runtime["positions"]
    assert (positions["base_size"], positions["interpolation_scale"]) == (layer.base_size, layer.interpolation_scale)
    assert np.allclose(pos_embed_table(positions, sample_size, sample_size), layer.pos_embed.numpy(), rtol=0, atol=6e-8)
    assert component.runtime["resolution_aspect_ratio"] == (sample_size == 128)
    assert [spec.name for spec in component.inputs][5:] == (
        ["attention_scale", *(["resolution", "aspect_ratio"] if sample_size == 128 else [])]
    )


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        ({"caption_channels": 4096, "use_additional_conditions": False, "interpolation_scale": 2}, 610.9),
        ({"caption_channels": 4096, "use_additional_conditions": True}, 611.3),
    ],
)
def test_full_size_pixart_has_the_parameters_of_diffusers_and_builds_in_seconds(
    config: dict[str, Any], millions: float
) -> None:
    with torch.device("meta"):
        model = PixArtTransformer2DModel(**config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes, seconds = parameter_shapes(build_transformer(dict(model.config)))
    assert shapes == expected
    assert round(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6, 1) == millions
    assert seconds < 5


def test_the_configuration_of_the_first_checkpoints_is_understood() -> None:
    old = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.22.0.dev0",
        "num_vector_embeds": None,
        "use_linear_projection": False,
        "only_cross_attention": False,
        "double_self_attention": False,
        "sample_size": 128,
        "caption_channels": 4096,
        "num_layers": 1,
    }
    component = build_transformer(old)
    assert component.runtime == {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "learned_sigma": True,
        "sample_size": 128,
        "positions": {"kind": "sincos_2d", "dim": 1152, "base_size": 64, "interpolation_scale": 2, "patch_size": 2},
        "resolution_aspect_ratio": True,
        "guidance_embeds": False,
        "guidance_embeds_scale": None,
        "timestep_scale": 1.0,
        "caption_channels": 4096,
        "self_attention": [{"operator": "softmax", "layers": [0]}],
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"norm_type": "ada_norm_zero"}, "norm_type='ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"attention_type": "gated"}, "attention_type='gated'"),
        ({"cross_attention_dim": None}, "cross_attention_dim=None"),
        ({"cross_attention_dim": 40}, "cross_attention_dim=40"),
        ({"double_self_attention": True}, "double_self_attention=True"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_layers": True}, "num_layers=True"),
        ({"patch_size": "2"}, "patch_size='2'"),
        ({"attention_bias": 1}, "attention_bias=1"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"interpolation_scale": 0}, "interpolation_scale=0"),
        ({"attention_head_dim": 3, "cross_attention_dim": 6}, "width of 6"),
        ({"sample_size": 1}, "sample_size=1"),
        ({"use_additional_conditions": True}, "use_additional_conditions=True"),
        ({"caption_channels": "many"}, "caption_channels='many'"),
        ({"rotary": True}, "rotary=True"),
        ({"qk_norm": "l2"}, "qk_norm='l2'"),
        ({"kv_compress_config": {"sampling": "max", "scale_factor": 2, "kv_compress_layer": [0]}}, "sampling='max'"),
    ],
)
def test_what_the_graph_cannot_represent_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 1,
        "sample_size": 16,
        "caption_channels": 10,
    }
    build_transformer(config)
    with pytest.raises(ConversionError, match=named) as caught:
        build_transformer({**config, **change})
    assert "\n" not in str(caught.value)


def test_a_latent_that_patches_do_not_divide_fails_and_is_not_cropped(tmp_path: Path) -> None:
    random = np.random.default_rng(fresh_seed(70))
    config = draw_config(random, patch_size=2)
    model = randomise(PixArtTransformer2DModel(**config), fresh_seed(70))
    component = build_transformer(config)
    graph = Graph(component, model, tmp_path)
    inputs = draw_inputs(random, config, (4, 4), 1)
    table = pos_embed_table(component.runtime["positions"], 8, 8)
    inputs["latents"] = np.pad(inputs["latents"], ((0, 0), (0, 0), (0, 1), (0, 0)))
    with pytest.raises(Fail, match="cannot be reshaped"):
        graph(**inputs, pos_embed=table)
