"""AutoencoderTiny's two graphs against diffusers, on fresh random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from parity_tools import BASE_SEED, TOLERANCE, Graph, fresh_seed, parameter_shapes, randomise, relative_l2

from edgedit.converters.architectures.autoencoder_tiny import build_decoder, build_encoder
from edgedit.errors import ConversionError


def draw_config(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    """A tiny configuration that diffusers can run, odd widths among them; `fixed` overrides what is drawn."""
    blocks = {half: [int(n) for n in random.integers(0, 4, random.integers(1, 5))] for half in ("encoder", "decoder")}
    blocks |= {half: fixed.pop(f"num_{half}_blocks") for half in blocks if f"num_{half}_blocks" in fixed}
    return {
        "in_channels": int(random.integers(1, 5)),
        "out_channels": int(random.integers(1, 5)),
        "encoder_block_out_channels": [int(random.integers(1, 12))] * len(blocks["encoder"]),
        "decoder_block_out_channels": [int(random.integers(1, 12))] * len(blocks["decoder"]),
        "act_fn": str(random.choice(["swish", "silu", "mish", "gelu", "relu"])),
        "upsample_fn": str(random.choice(["nearest", "nearest-exact", "bilinear", "bicubic"])),
        "latent_channels": int(random.choice([1, 4, 16])),
        "upsampling_scaling_factor": int(random.choice([1, 2, 3])),
        "num_encoder_blocks": blocks["encoder"],
        "num_decoder_blocks": blocks["decoder"],
        **fixed,
    }


FIXED: list[dict[str, Any]] = [
    {
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
    },
    {"act_fn": "mish", "num_decoder_blocks": [1, 2]},
    {"upsample_fn": "bilinear", "upsampling_scaling_factor": 2, "num_decoder_blocks": [1, 0, 1]},
    {"upsample_fn": "bicubic", "upsampling_scaling_factor": 2, "num_decoder_blocks": [1, 1]},
    {"upsample_fn": "nearest-exact", "upsampling_scaling_factor": 3, "num_decoder_blocks": [0, 2]},
    {"act_fn": "gelu", "latent_channels": 16},
    {"num_encoder_blocks": [2], "num_decoder_blocks": [2]},
    {},
    {},
]


@pytest.mark.parametrize("case", range(len(FIXED)))
def test_decoder_matches_diffusers_on_a_fresh_random_configuration(case: int, tmp_path: Path) -> None:
    seed = fresh_seed(case)
    random = np.random.default_rng(seed)
    config = draw_config(random, **FIXED[case])
    model = randomise(AutoencoderTiny(**config), seed)
    graph = Graph(build_decoder(config), model, tmp_path)
    for size, batch in (((4, 4), 1), ((3, 7), 2), ((5, 1), 3)):
        latents = 3 * random.standard_normal((batch, config["latent_channels"], *size)).astype(np.float32)
        with torch.no_grad():
            expected = model.decode(torch.from_numpy(latents)).sample.numpy()
        error = relative_l2(graph(latents=latents), expected)
        assert error <= TOLERANCE, f"{error:.2e} at {size}, batch {batch}, {config}, seed {BASE_SEED}"


@pytest.mark.parametrize("case", range(len(FIXED)))
def test_encoder_matches_diffusers_on_a_fresh_random_configuration(case: int, tmp_path: Path) -> None:
    seed = fresh_seed(100 + case)
    random = np.random.default_rng(seed)
    config = draw_config(random, **FIXED[case])
    model = randomise(AutoencoderTiny(**config), seed)
    graph = Graph(build_encoder(config), model, tmp_path)
    for size, batch in (((16, 16), 1), ((9, 14), 2), ((13, 7), 3)):
        image = random.uniform(-1, 1, (batch, config["in_channels"], *size)).astype(np.float32)
        with torch.no_grad():
            expected = model.encode(torch.from_numpy(image)).latents.numpy()
        error = relative_l2(graph(image=image), expected)
        assert error <= TOLERANCE, f"{error:.2e} at {size}, batch {batch}, {config}, seed {BASE_SEED}"


def test_latents_are_squashed_and_the_picture_is_not_clamped(tmp_path: Path) -> None:
    config = draw_config(np.random.default_rng(fresh_seed(200)), act_fn="silu", num_decoder_blocks=[1, 1])
    graph = Graph(build_decoder(config), randomise(AutoencoderTiny(**config), fresh_seed(200)), tmp_path)
    latents = np.full((1, config["latent_channels"], 3, 2), 60, np.float32)
    np.testing.assert_array_equal(graph(latents=latents), graph(latents=2 * latents))
    far = {name: 50 * tensor for name, tensor in AutoencoderTiny(**config).state_dict().items()}
    assert np.abs(Graph(build_decoder(config), far, tmp_path)(latents=latents)).max() > 2


def test_both_halves_together_have_the_parameters_of_a_full_size_diffusers_model() -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in AutoencoderTiny().state_dict().items()}
    decoder, encoder = parameter_shapes(build_decoder({}))[0], parameter_shapes(build_encoder({}))[0]
    assert not set(decoder) & set(encoder)
    assert decoder | encoder == expected


def test_runtime_tells_what_the_pipeline_must_know() -> None:
    config = {**AutoencoderTiny(latent_channels=16, latent_magnitude=4, num_encoder_blocks=(1, 2, 1, 1)).config}
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    constants = {
        "latent_channels": 16,
        "scale_factor": 8,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "latent_magnitude": 4,
        "latent_shift": 0.5,
        "force_upcast": False,
    }
    assert build_encoder(config).runtime == constants
    assert build_decoder({**config, "upsampling_scaling_factor": 3}).runtime == {**constants, "scale_factor": 27}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "relu6"}, "act_fn='relu6'"),
        ({"upsample_fn": "trilinear"}, "upsample_fn='trilinear'"),
        ({"decoder_block_out_channels": [64, 64, 64, 32]}, "decoder_block_out_channels="),
        ({"decoder_block_out_channels": [64, 64]}, "decoder_block_out_channels="),
        ({"upsampling_scaling_factor": 1.5}, "upsampling_scaling_factor=1.5"),
        ({"latent_norm": True}, "latent_norm=True"),
    ],
)
def test_what_the_graph_cannot_represent_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    build_decoder({})
    with pytest.raises(ConversionError, match=named) as caught:
        build_decoder(change)
    assert "\n" not in str(caught.value)


def test_an_encoder_whose_widths_differ_is_refused_because_no_layer_takes_one_to_the_next() -> None:
    config = {"encoder_block_out_channels": [4, 6], "num_encoder_blocks": [1, 1]}
    with pytest.raises(RuntimeError):
        AutoencoderTiny(**config).encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConversionError, match="encoder_block_out_channels"):
        build_encoder(config)
