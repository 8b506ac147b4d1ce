"""Original-repository names against diffusers: random models go there and come back, tensor by tensor."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel, SanaTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file

from edgedit.converters.checkpoint import ComponentSource, TensorRef, open_checkpoint
from edgedit.converters.inferred_config import infer_config
from edgedit.converters.original_keys import from_original, modernise, strip_prefix
from edgedit.errors import CheckpointError

State = dict[str, torch.Tensor]


def pixart_config(rng: random.Random) -> dict[str, Any]:
    heads, size = rng.randint(1, 3), 4 * rng.randint(1, 3)
    return {
        "num_attention_heads": heads,
        "attention_head_dim": size,
        "cross_attention_dim": heads * size,
        "in_channels": rng.choice([3, 4, 16]),
        "out_channels": rng.choice([4, 8, 32]),
        "num_layers": rng.randint(1, 12),
        "sample_size": 2 * rng.randint(2, 9),
        "patch_size": 2,
        "caption_channels": rng.randint(5, 20),
        "interpolation_scale": rng.choice([1, 2, 4]),
        "use_additional_conditions": rng.random() < 0.5,
    }


def sana_config(rng: random.Random) -> dict[str, Any]:
    heads, size, patch = rng.randint(1, 3), 4 * rng.randint(1, 3), rng.choice([1, 2])
    return {
        "num_attention_heads": heads,
        "attention_head_dim": size,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": heads * size // 2,
        "cross_attention_dim": heads * size,
        "in_channels": rng.choice([8, 32]),
        "out_channels": rng.choice([8, 32]),
        "num_layers": rng.randint(1, 12),
        "caption_channels": rng.randint(5, 20),
        "mlp_ratio": rng.choice([2.5, 3.0]),
        "sample_size": patch * rng.randint(2, 9),
        "patch_size": patch,
        "guidance_embeds": rng.random() < 0.5,
        "qk_norm": rng.choice([None, "rms_norm_across_heads"]),
        "interpolation_scale": rng.choice([None, 1.0, 2.0]),
    }


MODELS: dict[str, tuple[Any, Any]] = {
    "pixart": (PixArtTransformer2DModel, pixart_config),
    "sana": (SanaTransformer2DModel, sana_config),
}


def original(family: str, state: State, config: dict[str, Any]) -> State:
    """The state dict as the original repository would have saved it."""
    result: State = {}
    first = {"pixart": "pos_embed", "sana": "patch_embed"}[family]
    shared = {"pixart": "adaln_single", "sana": "time_embed"}[family]
    timestep = f"{shared}." if config.get("guidance_embeds") else f"{shared}.emb."
    for letter in ("weight", "bias"):
        result[f"x_embedder.proj.{letter}"] = state[f"{first}.proj.{letter}"]
        result[f"t_block.1.{letter}"] = state[f"{shared}.linear.{letter}"]
        result[f"final_layer.linear.{letter}"] = state[f"proj_out.{letter}"]
        for layer, place in (("1", "0"), ("2", "2")):
            result[f"y_embedder.y_proj.fc{layer}.{letter}"] = state[f"caption_projection.linear_{layer}.{letter}"]
            for ours, theirs in (
                (f"{timestep}timestep_embedder", "t_embedder"),
                (f"{shared}.guidance_embedder", "cfg_embedder"),
                (f"{shared}.emb.resolution_embedder", "csize_embedder"),
                (f"{shared}.emb.aspect_ratio_embedder", "ar_embedder"),
            ):
                if f"{ours}.linear_{layer}.{letter}" in state:
                    result[f"{theirs}.mlp.{place}.{letter}"] = state[f"{ours}.linear_{layer}.{letter}"]
    result["final_layer.scale_shift_table"] = state["scale_shift_table"]
    if family == "sana":
        result["attention_y_norm.weight"] = state["caption_norm.weight"]
    for n in range(config["num_layers"]):
        there, here = f"blocks.{n}.", f"transformer_blocks.{n}."
        result[there + "scale_shift_table"] = state[here + "scale_shift_table"]
        for letter in ("weight", "bias"):
            if here + f"attn1.to_q.{letter}" in state:
                result[there + f"attn.qkv.{letter}"] = torch.cat(
                    [state[here + f"attn1.to_{x}.{letter}"] for x in "qkv"]
                )
            result[there + f"attn.proj.{letter}"] = state[here + f"attn1.to_out.0.{letter}"]
            result[there + f"cross_attn.q_linear.{letter}"] = state[here + f"attn2.to_q.{letter}"]
            result[there + f"cross_attn.kv_linear.{letter}"] = torch.cat(
                [state[here + f"attn2.to_{x}.{letter}"] for x in "kv"]
            )
            result[there + f"cross_attn.proj.{letter}"] = state[here + f"attn2.to_out.0.{letter}"]
            for theirs, ours in (
                ("mlp.fc1", "ff.net.0.proj"),
                ("mlp.fc2", "ff.net.2"),
                ("mlp.inverted_conv.conv", "ff.conv_inverted"),
                ("mlp.depth_conv.conv", "ff.conv_depth"),
                ("mlp.point_conv.conv", "ff.conv_point"),
                ("attn.q_norm", "attn1.norm_q"),
                ("attn.k_norm", "attn1.norm_k"),
                ("cross_attn.q_norm", "attn2.norm_q"),
                ("cross_attn.k_norm", "attn2.norm_k"),
            ):
                if f"{here}{ours}.{letter}" in state:
                    result[f"{there}{theirs}.{letter}"] = state[f"{here}{ours}.{letter}"]
    return result


def positions(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    side = config["sample_size"] // config["patch_size"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    scale = config["interpolation_scale"]
    if scale is None:
        return torch.zeros(1, side * side, width)
    table = get_2d_sincos_pos_embed(width, side, base_size=side, interpolation_scale=scale, output_type="pt")
    return table[None].to(dtype)


def assert_same_weights(source: ComponentSource, state: State) -> None:
    assert source.tensors.keys() == state.keys()
    for name, tensor in state.items():
        ref = source.tensors[name]
        array = ref.load()
        assert ref.name == name
        assert array.shape == ref.shape == tuple(tensor.shape)
        assert array.dtype.name == ref.dtype
        np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy(), err_msg=name)


def drawn(family: str) -> tuple[dict[str, Any], Any]:
    seed = random.SystemRandom().randrange(1 << 32)
    build, draw = MODELS[family]
    config = draw(random.Random(seed))
    print(f"seed {seed}: {config}")
    return config, build(**config)


@pytest.mark.parametrize("trial", range(6))
@pytest.mark.parametrize("family", MODELS)
def test_original_names_come_back_as_the_diffusers_model_that_they_were(
    family: str, trial: int, tmp_path: Path
) -> None:
    config, model = drawn(family)
    state = model.state_dict()
    weights = original(family, state, config)
    extra = {"y_embedder.y_embedding": torch.randn(9, config["caption_channels"]), "pos_embed": positions(config)}
    if family == "sana":
        extra |= {"logvar_linear.weight": torch.randn(1, 8), "logvar_linear.bias": torch.randn(1)}
    # torch's own module order is shuffled: no reader may depend on it.
    keys = list(weights | extra)
    random.shuffle(keys)
    shuffled = {key: (weights | extra)[key] for key in keys}
    if trial % 2:
        torch.save({"state_dict": shuffled, "epoch": 1}, tmp_path / "model.pth")
    else:
        save_file({key: value.contiguous() for key, value in shuffled.items()}, tmp_path / "model.safetensors")
    # The number of heads is the one thing that neither shapes nor the table tell.
    heads = {key: value for key, value in config.items() if "heads" in key}
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    path = tmp_path / ("model.pth" if trial % 2 else "model.safetensors")
    checkpoint = open_checkpoint(path, config=tmp_path / "heads.json")
    source = checkpoint.components["transformer"]
    assert (source.library, source.class_name) == ("diffusers", type(model).__name__)
    assert_same_weights(source, state)
    assert source.dropped.keys() == extra.keys()
    assert all(source.dropped.values())
    # The inferred configuration is the one that the model was made of, field by field, and builds the same model.
    for name in set(model.config) - {"_name_or_path"}:
        if not name.startswith("_"):
            assert source.config[name] == model.config[name], (name, config)
    again = type(model).from_config(dict(source.config))
    again.load_state_dict(state, strict=True)
    assert any("own repository" in note for note in checkpoint.notes)


@pytest.mark.parametrize("family", MODELS)
def test_a_single_file_with_diffusers_names_needs_only_what_shapes_do_not_tell(family: str, tmp_path: Path) -> None:
    config, model = drawn(family)
    state = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        open_checkpoint(tmp_path / "model.safetensors")
    told = {key: value for key, value in config.items() if "heads" in key}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="sample_size cannot be told"):
        open_checkpoint(tmp_path / "model.safetensors")
    told |= {key: config[key] for key in ("sample_size", "interpolation_scale")}
    (tmp_path / "config.json").write_text(json.dumps(told))
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    source = checkpoint.components["transformer"]
    assert_same_weights(source, state)
    assert {key: source.config[key] for key in config} == config
    assert any("config.json" in note for note in checkpoint.notes)


def shapes_of(model: torch.nn.Module) -> dict[str, TensorRef]:
    def unread() -> np.ndarray:
        raise AssertionError("only shapes may be looked at")

    return {key: TensorRef(key, "float32", tuple(t.shape), unread) for key, t in model.state_dict().items()}


PUBLISHED = [
    (
        "PixArt-XL-2-1024-MS.pth",
        "pixart",
        {"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": True},
    ),
    (
        "PixArt-XL-2-512x512.pth",
        "pixart",
        {"sample_size": 64, "interpolation_scale": 1, "use_additional_conditions": False},
    ),
    (
        "PixArt-XL-2-256x256.pth",
        "pixart",
        {"sample_size": 32, "interpolation_scale": 1, "use_additional_conditions": False},
    ),
    ("PixArt-Sigma-XL-2-256x256.pth", "pixart", {"sample_size": 32, "interpolation_scale": 0.5}),
    ("PixArt-Sigma-XL-2-1024-MS.pth", "pixart", {"sample_size": 128, "interpolation_scale": 2}),
    ("PixArt-Sigma-XL-2-2K-MS.pth", "pixart", {"sample_size": 256, "interpolation_scale": 4}),
    ("Sana_600M_512px_MultiLing.pth", "sana", {"sample_size": 16, "num_layers": 28}),
    ("Sana_1600M_1024px_BF16.pth", "sana", {"sample_size": 32}),
    ("Sana_1600M_2Kpx_BF16.pth", "sana", {"sample_size": 64, "interpolation_scale": 1.0}),
    ("Sana_1600M_4Kpx_BF16.pth", "sana", {"sample_size": 128, "interpolation_scale": 2.0}),
    ("SANA1.5_4.8B_1024px.pth", "sana", {"sample_size": 32, "num_layers": 60, "qk_norm": "rms_norm_across_heads"}),
    ("Sana_Sprint_0.6B_1024px.pth", "sana", {"sample_size": 32, "num_layers": 28, "guidance_embeds": True}),
]
XL = {"num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152, "caption_channels": 4096}
SMALL_SANA = {
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


@pytest.mark.parametrize(
    ("name", "family", "fields"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_published_sizes_need_no_configuration(name: str, family: str, fields: dict[str, Any]) -> None:
    small = family == "sana" and fields.get("num_layers") == 28
    fields = (XL if family == "pixart" else SMALL_SANA if small else {}) | fields
    with torch.device("meta"):
        model = MODELS[family][0](**fields)
    found = infer_config(family, shapes_of(model), set_aside={}, file_name=name, given={})
    assert found["_class_name"] == type(model).__name__
    for key, value in model.config.items():
        if not key.startswith("_") and value is not None:
            assert found[key] == value, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.5, 1, 1.5, 2, 4])
def test_the_scale_of_positions_is_read_off_the_table(scale: float, dtype: torch.dtype, tmp_path: Path) -> None:
    config = pixart_config(random.Random()) | {"sample_size": 2 * random.randint(2, 40), "interpolation_scale": scale}
    model = PixArtTransformer2DModel(**(config | {"interpolation_scale": 1}))
    weights = original("pixart", model.state_dict(), config) | {"pos_embed": positions(config, dtype)}
    torch.save(weights, tmp_path / "m.pth")
    (tmp_path / "c.json").write_text(json.dumps({"num_attention_heads": config["num_attention_heads"]}))
    found = open_checkpoint(tmp_path / "m.pth", config=tmp_path / "c.json").components["transformer"].config
    assert (found["sample_size"], found["interpolation_scale"]) == (config["sample_size"], scale), config


def test_a_position_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = pixart_config(random.Random())
    model = PixArtTransformer2DModel(**config)
    for table in (torch.randn_like(positions(config)), positions(config)[:, 1:], torch.ones(3)):
        torch.save(original("pixart", model.state_dict(), config) | {"pos_embed": table}, tmp_path / "m.pth")
        (tmp_path / "c.json").write_text(json.dumps({"num_attention_heads": config["num_attention_heads"]}))
        with pytest.raises(CheckpointError, match="pos_embed"):
            open_checkpoint(tmp_path / "m.pth", config=tmp_path / "c.json")


def refs(state: State) -> dict[str, TensorRef]:
    return {
        key: TensorRef(key, "float32", tuple(value.shape), lambda value=value: value.numpy())  # type: ignore[misc]
        for key, value in state.items()
    }


def test_key_value_compression_keeps_its_weights_and_enters_the_configuration() -> None:
    config = pixart_config(random.Random()) | {"num_layers": 4}
    model = PixArtTransformer2DModel(**config)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    weights = original("pixart", model.state_dict(), config)
    for n in (2, 3):
        weights[f"blocks.{n}.attn.sr.weight"] = torch.randn(width, 1, 2, 2)
        weights[f"blocks.{n}.attn.sr.bias"] = torch.randn(width)
        weights[f"blocks.{n}.attn.norm.weight"] = torch.randn(width)
        weights[f"blocks.{n}.attn.norm.bias"] = torch.randn(width)
        for norm in ("q_norm", "k_norm"):
            weights[f"blocks.{n}.attn.{norm}.weight"] = torch.randn(width)
    renamed = from_original("pixart", refs(weights)).tensors
    for n in (2, 3):
        for name in ("sr.weight", "sr.bias", "norm.weight", "norm.bias"):
            np.testing.assert_array_equal(
                renamed[f"transformer_blocks.{n}.attn1.{name}"].load(), weights[f"blocks.{n}.attn.{name}"].numpy()
            )
        assert f"transformer_blocks.{n}.attn1.norm_q.weight" in renamed
    given = {"sample_size": 8, "interpolation_scale": 1, "num_attention_heads": config["num_attention_heads"]}
    found = infer_config("pixart", renamed, set_aside={}, file_name="x.pth", given=given)
    assert found["kv_compress_config"] == {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [2, 3]}


def test_unknown_keys_stay_for_the_accounting_to_find() -> None:
    weights = {"blocks.0.attn.novel": torch.ones(1), "blocks.0.attn.qkv.weight": torch.ones(4, 2)}
    renamed = from_original("pixart", refs(weights))
    # Four rows make no three equal parts.
    assert list(renamed.tensors) == list(weights)


def test_a_weight_under_both_its_names_is_refused() -> None:
    weights = {"t_block.1.bias": torch.ones(1), "adaln_single.linear.bias": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"both 'adaln_single\.linear\.bias'"):
        from_original("pixart", refs(weights))


def test_the_prefixes_of_wrappers_are_taken_off_only_when_all_keys_have_them() -> None:
    plain = {"a": torch.ones(1), "module.b": torch.ones(1)}
    assert strip_prefix(refs(plain))[1] == ""
    wrapped = {f"module._orig_mod.{key}": value for key, value in plain.items()}
    tensors, prefix = strip_prefix(refs(wrapped))
    assert (list(tensors), prefix) == (list(plain), "module._orig_mod.")
    assert [ref.name for ref in tensors.values()] == list(plain)


def test_the_attention_of_old_autoencoders_gets_its_present_names() -> None:
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    state = model.state_dict()
    old = {}
    for key, value in state.items():
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(now, then)
        old[key] = value
    assert old.keys() != state.keys()
    name, tensors, dropped = modernise("AutoencoderKL", {}, refs(old))
    assert (name, dropped) == ("AutoencoderKL", {})
    assert tensors.keys() == state.keys()
    for key, ref in tensors.items():
        np.testing.assert_array_equal(ref.load(), state[key].numpy())


def test_old_class_names_become_the_present_ones() -> None:
    assert modernise("Transformer2DModel", {"norm_type": "ada_norm_single"}, {})[0] == "PixArtTransformer2DModel"
    assert modernise("Transformer2DModel", {"norm_type": "ada_norm_zero"}, {})[0] == "DiTTransformer2DModel"
    assert modernise("Transformer2DModel", {"norm_type": "layer_norm"}, {})[0] == "Transformer2DModel"
    weights = {
        "model.norm.weight": torch.ones(1),
        "model.embed_tokens.weight": torch.ones(1),
        "lm_head.weight": torch.ones(1),
    }
    name, tensors, dropped = modernise("Gemma2ForCausalLM", {}, refs(weights))
    assert (name, list(tensors)) == ("Gemma2Model", ["norm.weight", "embed_tokens.weight"])
    assert list(dropped) == ["lm_head.weight"]
