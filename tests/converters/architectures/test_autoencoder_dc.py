"""AutoencoderDC's two graphs against diffusers, on fresh random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from parity_tools import BASE_SEED, TOLERANCE, Graph, fresh_seed, parameter_shapes, randomise, relative_l2

from edgedit.converters.architectures.autoencoder_dc import build_decoder, build_encoder
from edgedit.converters.graph import build
from edgedit.errors import ConversionError

RES, VIT = "ResBlock", "EfficientViTBlock"
LATENTS = (((3, 4), 1), ((2, 5), 2), ((1, 1), 3), ((7, 3), 1))


def draw_half(random: np.random.Generator, half: str, levels: int) -> dict[str, Any]:
    widths = [4 * int(random.integers(2, 5))]
    for _ in range(levels - 1):
        widths.append(
            int(random.choice([widths[-1], 2 * widths[-1], 4 * widths[-1]])) if widths[-1] < 32 else widths[-1]
        )
    return {
        f"{half}_block_types": [str(random.choice([RES, VIT])) for _ in range(levels)],
        f"{half}_block_out_channels": widths,
        f"{half}_layers_per_block": [int(n) for n in random.integers(1, 3, levels)],
        f"{half}_qkv_multiscales": [
            [int(k) for k in random.choice([1, 3, 5, 7], random.integers(0, 3))] for _ in range(levels)
        ],
    }


def draw_config(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    """A tiny configuration that diffusers accepts; `fixed` overrides what is drawn."""
    levels = int(fixed.pop("levels", random.integers(1, 4)))
    halves = {**draw_half(random, "encoder", levels), **draw_half(random, "decoder", levels)}
    last = [halves[f"{half}_block_out_channels"][-1] for half in ("encoder", "decoder")]
    return {
        "in_channels": int(random.integers(1, 5)),
        "latent_channels": int(random.choice([n for n in range(1, 17) if last[0] % n == last[1] % n == 0])),
        "attention_head_dim": int(random.choice([3, 4, 8])),
        **halves,
        "upsample_block_type": str(random.choice(["pixel_shuffle", "interpolate"])),
        "downsample_block_type": str(random.choice(["pixel_unshuffle", "conv", "Conv"])),
        "decoder_norm_types": [str(random.choice(["rms_norm", "batch_norm"])) for _ in range(levels)],
        "decoder_act_fns": [str(random.choice(["silu", "relu", "gelu", "mish"])) for _ in range(levels)],
        "encoder_out_shortcut": bool(random.integers(2)),
        "decoder_in_shortcut": bool(random.integers(2)),
        "decoder_conv_act_fn": str(random.choice(["relu", "silu"])),
        **fixed,
    }


SANA = {
    "encoder_block_types": [RES, VIT, VIT],
    "decoder_block_types": [RES, VIT, VIT],
    "encoder_qkv_multiscales": [[], [5], [5]],
    "decoder_qkv_multiscales": [[], [5], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
}
FIRST_EMPTY = {"encoder_layers_per_block": [0, 1, 2], "decoder_layers_per_block": [0, 2, 1]}
FIXED: list[dict[str, Any]] = [
    {"levels": 3, **SANA},
    {"levels": 3, **SANA, "upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"},
    {"levels": 3, **FIRST_EMPTY, "upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"},
    {"levels": 3, **FIRST_EMPTY, "upsample_block_type": "interpolate", "downsample_block_type": "conv"},
    {"levels": 2, "encoder_layers_per_block": [1, 0], "decoder_layers_per_block": [2, 0]},
    {"levels": 2, "decoder_norm_types": "batch_norm", "decoder_block_types": VIT, "encoder_block_types": RES},
    {"levels": 2, "encoder_block_out_channels": [8, 16], "decoder_block_out_channels": [32, 16], "latent_channels": 8},
    {"levels": 2, "decoder_act_fns": [None, "gelu"], "decoder_block_types": RES},
    {"levels": 1},
    {},
    {},
]


def randomised(config: dict[str, Any], seed: int) -> AutoencoderDC:
    """The diffusers model with drawn weights, and drawn running statistics where it has batch norms."""
    model = randomise(AutoencoderDC(**config), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


@pytest.mark.parametrize("case", range(len(FIXED)))
def test_decoder_matches_diffusers_on_a_fresh_random_configuration(case: int, tmp_path: Path) -> None:
    seed = fresh_seed(case)
    random = np.random.default_rng(seed)
    config = draw_config(random, **FIXED[case])
    model = randomised(config, seed)
    graph = Graph(build_decoder(config), model, tmp_path)
    for size, batch in LATENTS:
        latents = random.standard_normal((batch, config["latent_channels"], *size)).astype(np.float32)
        with torch.no_grad():
            expected = model.decode(torch.from_numpy(latents)).sample.numpy()
        error = relative_l2(graph(latents=latents), expected)
        assert error <= TOLERANCE, f"{error:.2e} at {size}, batch {batch}, {config}, seed {BASE_SEED}"


@pytest.mark.parametrize("case", range(len(FIXED)))
def test_encoder_matches_diffusers_on_a_fresh_random_configuration(case: int, tmp_path: Path) -> None:
    seed = fresh_seed(100 + case)
    random = np.random.default_rng(seed)
    config = draw_config(random, **FIXED[case])
    model = randomised(config, seed)
    component = build_encoder(config)
    graph = Graph(component, model, tmp_path)
    factor = component.runtime["scale_factor"]
    for (height, width), batch in LATENTS:
        size = (height * factor, width * factor)
        image = random.uniform(-1, 1, (batch, config["in_channels"], *size)).astype(np.float32)
        with torch.no_grad():
            expected = model.encode(torch.from_numpy(image)).latent.numpy()
        error = relative_l2(graph(image=image), expected)
        assert error <= TOLERANCE, f"{error:.2e} at {size}, batch {batch}, {config}, seed {BASE_SEED}"


@pytest.mark.parametrize("head_dim", [8, 32])
def test_linear_attention_matches_both_branches_of_diffusers(head_dim: int, tmp_path: Path) -> None:
    """diffusers multiplies in another order where a map has no more positions than a head has channels."""
    random = np.random.default_rng(fresh_seed(200 + head_dim))
    config = draw_config(
        random, levels=1, attention_head_dim=head_dim, decoder_block_types=[VIT], decoder_layers_per_block=[2]
    )
    config |= {"decoder_block_out_channels": [64], "encoder_block_out_channels": [64], "latent_channels": 16}
    model = randomised(config, fresh_seed(201))
    graph = Graph(build_decoder(config), model, tmp_path)
    for positions in (1, 2, head_dim - 1, head_dim, head_dim + 1, 5 * head_dim):
        latents = random.standard_normal((2, 16, 1, positions)).astype(np.float32)
        with torch.no_grad():
            expected = model.decode(torch.from_numpy(latents)).sample.numpy()
        error = relative_l2(graph(latents=latents), expected)
        assert error <= TOLERANCE, f"{error:.2e} for {positions} positions, {config}, seed {BASE_SEED}"


def test_a_head_that_sees_nothing_gives_zero_and_not_nan(tmp_path: Path) -> None:
    config = draw_config(np.random.default_rng(fresh_seed(202)), levels=1, decoder_block_types=[VIT])
    model = randomised(config, fresh_seed(202))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "to_k" in name:
                parameter.zero_()
    latents = (
        np.random.default_rng(fresh_seed(203)).standard_normal((1, config["latent_channels"], 6, 5)).astype(np.float32)
    )
    with torch.no_grad():
        expected = model.decode(torch.from_numpy(latents)).sample.numpy()
    error = relative_l2(Graph(build_decoder(config), model, tmp_path)(latents=latents), expected)
    assert error <= TOLERANCE, f"{error:.2e}, {config}, seed {BASE_SEED}"


LEVELS = {"encoder_block_types": [RES] * 3 + [VIT] * 3, "decoder_block_types": [RES] * 3 + [VIT] * 3}
PUBLISHED = {
    "f32c32-sana": {
        **LEVELS,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
        "scaling_factor": 0.41407,
    },
    "f32c32-in": {
        **LEVELS,
        "encoder_layers_per_block": [0, 4, 8, 2, 2, 2],
        "decoder_layers_per_block": [0, 5, 10, 2, 2, 2],
        "encoder_qkv_multiscales": [[]] * 6,
        "decoder_qkv_multiscales": [[]] * 6,
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * 3,
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * 3,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_halves_together_have_the_parameters_of_a_published_model(name: str) -> None:
    config = PUBLISHED[name]
    with torch.device("meta"):
        state = AutoencoderDC(**config).state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    decoder, encoder = parameter_shapes(build_decoder(config))[0], parameter_shapes(build_encoder(config))[0]
    assert not set(decoder) & set(encoder)
    assert decoder | encoder == expected


def test_no_map_is_transposed() -> None:
    for component in (build_decoder(PUBLISHED["f32c32-sana"]), build_encoder(PUBLISHED["f32c32-sana"])):
        transposed = [node for node in build(component).graph if node.op_type == "Transpose"]
        # One Kᵀ for each of two scales of each of nine attentions.
        assert [tuple(node.attributes["perm"].as_ints()) for node in transposed] == [(0, 1, 3, 2)] * 2 * 9


def test_runtime_tells_what_the_pipeline_must_know() -> None:
    expected = {"latent_channels": 32, "scale_factor": 32, "scaling_factor": 0.41407, "shift_factor": 0.0}
    assert build_decoder(PUBLISHED["f32c32-sana"]).runtime == expected
    assert build_encoder(PUBLISHED["f32c32-sana"]).runtime == expected
    assert build_decoder({"decoder_layers_per_block": [0, 1, 1, 1, 1, 1]}).runtime["scale_factor"] == 32


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"decoder_block_types": "ResNet"}, "decoder_block_types="),
        ({"decoder_block_types": [RES]}, "decoder_block_types="),
        ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types="),
        ({"decoder_act_fns": "relu6"}, "decoder_act_fns='relu6'"),
        ({"decoder_conv_act_fn": "relu6"}, "decoder_conv_act_fn='relu6'"),
        ({"upsample_block_type": "InterpolateConv"}, "upsample_block_type='InterpolateConv'"),
        ({"downsample_block_type": "pool"}, "downsample_block_type='pool'"),
        ({"decoder_layers_per_block": [3, 3, 0, 3, 3, 3]}, "decoder_layers_per_block="),
        ({"decoder_qkv_multiscales": [[4]] * 6}, "decoder_qkv_multiscales="),
        ({"decoder_block_out_channels": [96, 128, 256, 512, 1024, 1000]}, "decoder_block_out_channels="),
        ({"latent_channels": 33}, "decoder_block_out_channels="),
        ({"attention_head_dim": 2048, "decoder_block_types": VIT}, "attention_head_dim=2048"),
        ({"block_out_channels": [128]}, "block_out_channels="),
    ],
)
def test_what_the_graph_cannot_represent_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    build_decoder({})
    with pytest.raises(ConversionError, match=named) as caught:
        build_decoder(change)
    assert "\n" not in str(caught.value)
