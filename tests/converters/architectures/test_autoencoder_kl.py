"""AutoencoderKL's two graphs against diffusers, on fresh random configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from parity_tools import BASE_SEED, TOLERANCE, Graph, fresh_seed, parameter_shapes, randomise, relative_l2
from safetensors.torch import save_file

from edgedit.converters.architectures.autoencoder_kl import build_decoder, build_encoder
from edgedit.converters.graph import Component, bind, build
from edgedit.converters.original_keys import modernise
from edgedit.converters.safetensors_file import read_safetensors
from edgedit.errors import ConversionError

Build = Callable[[dict[str, Any]], Component]

DOWN, DOWN_ATTENTION = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP, UP_ATTENTION = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"


def draw_config(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    """A tiny configuration that diffusers accepts, odd widths among them; `fixed` overrides what is drawn.

    A group has two channels or more: over a handful of numbers ONNX Runtime's variance, E[x²] - E[x]², cancels.
    """
    levels, groups = int(fixed.pop("levels", random.integers(1, 4))), int(random.choice([1, 2, 3, 5]))
    return {
        "in_channels": int(random.integers(1, 5)),
        "out_channels": int(random.integers(1, 5)),
        "down_block_types": [str(random.choice([DOWN, DOWN, DOWN_ATTENTION])) for _ in range(levels)],
        "up_block_types": [str(random.choice([UP, UP, UP_ATTENTION])) for _ in range(levels)],
        "block_out_channels": [groups * int(random.integers(2, 6)) for _ in range(levels)],
        "layers_per_block": int(random.integers(1, 4)),
        "act_fn": str(random.choice(["swish", "silu", "mish", "gelu", "relu", "SiLU"])),
        "latent_channels": int(random.choice([1, 3, 4, 16])),
        "norm_num_groups": groups,
        "use_quant_conv": bool(random.integers(2)),
        "use_post_quant_conv": bool(random.integers(2)),
        "mid_block_add_attention": bool(random.integers(2)),
        **fixed,
    }


CLASSIC = {"act_fn": "silu", "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
FIXED: list[dict[str, Any]] = [
    {**CLASSIC, "levels": 3, "layers_per_block": 2, "mid_block_add_attention": True},
    {**CLASSIC, "levels": 2, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    {"levels": 1, "act_fn": "mish", "mid_block_add_attention": False},
    {"levels": 2, "layers_per_block": 3, "act_fn": "gelu"},
    {"levels": 2, "down_block_types": [DOWN, DOWN_ATTENTION], "up_block_types": [UP_ATTENTION, UP], "act_fn": "relu"},
    {"use_quant_conv": True, "use_post_quant_conv": False},
    {"use_quant_conv": False, "use_post_quant_conv": True},
    {},
    {},
]


@pytest.mark.parametrize("case", range(len(FIXED)))
def test_decoder_matches_diffusers_on_a_fresh_random_configuration(case: int, tmp_path: Path) -> None:
    seed = fresh_seed(case)
    random = np.random.default_rng(seed)
    config = draw_config(random, **FIXED[case])
    model = randomise(AutoencoderKL(**config), seed)
    graph = Graph(build_decoder(config), model, tmp_path)
    for size, batch in (((4, 4), 1), ((3, 7), 2), ((5, 3), 3)):
        latents = random.standard_normal((batch, config["latent_channels"], *size)).astype(np.float32)
        with torch.no_grad():
            expected = model.decode(torch.from_numpy(latents)).sample.numpy()
        error = relative_l2(graph(latents=latents), expected)
        assert error <= TOLERANCE, f"{error:.2e} at {size}, batch {batch}, {config}, seed {BASE_SEED}"


@pytest.mark.parametrize("case", range(len(FIXED)))
def test_encoder_gives_the_moments_of_diffusers_on_a_fresh_random_configuration(case: int, tmp_path: Path) -> None:
    seed = fresh_seed(100 + case)
    random = np.random.default_rng(seed)
    config = draw_config(random, **FIXED[case])
    model = randomise(AutoencoderKL(**config), seed)
    graph = Graph(build_encoder(config), model, tmp_path)
    for size, batch in (((16, 16), 1), ((9, 14), 2), ((12, 7), 3)):
        image = random.uniform(-1, 1, (batch, config["in_channels"], *size)).astype(np.float32)
        with torch.no_grad():
            expected = model.encode(torch.from_numpy(image)).latent_dist.parameters.numpy()
        error = relative_l2(graph(image=image), expected)
        assert error <= TOLERANCE, f"{error:.2e} at {size}, batch {batch}, {config}, seed {BASE_SEED}"


FOUR_LEVELS = {
    "down_block_types": [DOWN] * 4,
    "up_block_types": [UP] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(FOUR_LEVELS, id="4 channels"),
        pytest.param(
            {**FOUR_LEVELS, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
            id="16 channels",
        ),
    ],
)
def test_both_halves_together_have_the_parameters_of_a_full_size_diffusers_model(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in AutoencoderKL(**config).state_dict().items()}
    decoder, encoder = parameter_shapes(build_decoder(config))[0], parameter_shapes(build_encoder(config))[0]
    assert not set(decoder) & set(encoder)
    assert decoder | encoder == expected


def test_the_attention_keys_of_old_checkpoints_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    config = draw_config(np.random.default_rng(fresh_seed(200)), levels=1, mid_block_add_attention=True)
    model = randomise(AutoencoderKL(**config), fresh_seed(200))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = model.state_dict()
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    save_file(state, tmp_path / "old.safetensors")
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    for component in (build_decoder(config), build_encoder(config)):
        _, tensors, _ = modernise("AutoencoderKL", config, read_safetensors(tmp_path / "old.safetensors"))
        graph = build(component)
        bind(graph, tensors, drop=component.drop)
        name = f"{component.name}.mid_block.attentions.0.to_out.0.weight"
        np.testing.assert_array_equal(
            graph.graph.initializers[name].const_value.numpy(), model.state_dict()[name].numpy().T
        )


@pytest.mark.parametrize(
    ("build_half", "flag"), [(build_decoder, "use_quant_conv"), (build_encoder, "use_post_quant_conv")]
)
def test_a_convolution_that_the_configuration_denies_is_not_dropped_in_silence(
    build_half: Build, flag: str, tmp_path: Path
) -> None:
    config = draw_config(
        np.random.default_rng(fresh_seed(201)), levels=1, use_quant_conv=True, use_post_quant_conv=True
    )
    model = randomise(AutoencoderKL(**config), 0)
    Graph(build_half(config), model, tmp_path)
    with pytest.raises(ConversionError):
        Graph(build_half({**config, flag: False}), model, tmp_path)


def test_a_map_is_transposed_to_tokens_and_back_and_nowhere_else() -> None:
    graph = build(build_decoder({**FOUR_LEVELS, "up_block_types": [UP_ATTENTION] + [UP] * 3})).graph
    count = {
        kind: sum(node.op_type == kind for node in graph) for kind in ("Transpose", "Attention", "GroupNormalization")
    }
    attentions = 1 + 3
    assert count == {
        "Transpose": 2 * attentions,
        "Attention": attentions,
        "GroupNormalization": 2 * 14 + attentions + 1,
    }


def test_runtime_tells_what_the_pipeline_must_know() -> None:
    config = {
        **FOUR_LEVELS,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "force_upcast": False,
    }
    expected = {
        "latent_channels": 16,
        "scale_factor": 8,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "latents_mean": None,
        "latents_std": None,
        "sample_size": 1024,
        "force_upcast": False,
    }
    assert build_decoder({**config, "sample_size": 1024}).runtime == expected
    assert build_encoder({**config, "sample_size": 1024}).runtime == expected
    assert (build_decoder({}).runtime["scaling_factor"], build_decoder({}).runtime["shift_factor"]) == (0.18215, 0.0)
    assert build_encoder(config).outputs[0].shape == ("batch", 32, "height", "width")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "tanh"}, "act_fn='tanh'"),
        ({"down_block_types": ["DownBlock2D"]}, r"down_block_types=\['DownBlock2D'\]"),
        ({"up_block_types": [UP, UP]}, "up_block_types="),
        ({"norm_num_groups": 7}, "norm_num_groups=7"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"mid_block_add_attention": "no"}, "mid_block_add_attention='no'"),
        ({"double_z": False}, "double_z=False"),
    ],
)
def test_what_the_graph_cannot_represent_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    for build_half in (build_decoder, build_encoder):
        build_half({})
        with pytest.raises(ConversionError, match=named) as caught:
            build_half({**change})
        assert "\n" not in str(caught.value)
