"""The configuration of a transformer from its weights, for files that come without a config.json.

Shapes tell nearly everything. The number of heads they do not, so it is known for the published widths only; size and
position scale are read off the original repositories' `pos_embed` table, or off the file's name. What remains unknown
must be given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgedit.converters.tensors import TensorRef
from edgedit.errors import CheckpointError

__all__ = ["CLASSES", "infer_config"]

CLASSES = {"pixart": "PixArtTransformer2DModel", "sana": "SanaTransformer2DModel"}

# width → heads × size of a head, of the published models: PixArt-alpha/-Sigma XL/2 (PixArtMS_XL_2); SANA 0.6B, 1.6B and
# 4.8B, whose self-attention has heads of 32 (linear_head_dim) and cross-attention others.
_PIXART_HEADS = {1152: (16, 72)}
_SANA_CROSS_HEADS = {1152: (16, 72), 2240: (20, 112)}
_SANA_HEAD_SIZE = 32
# picture's side → scale of positions, as the conversion scripts of PixArt-sigma and diffusers have it.
_PIXART_SCALES = {256: 0.5, 512: 1, 1024: 2, 2048: 4}
_SANA_SCALES = {512: None, 1024: None, 2048: 1.0, 4096: 2.0}


def infer_config(
    family: str,
    tensors: Mapping[str, TensorRef],
    *,
    set_aside: Mapping[str, TensorRef],
    file_name: str,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """A whole configuration, as diffusers would write it to config.json.

    Args:
        family: "pixart" or "sana".
        tensors: the weights under diffusers' names.
        set_aside: `pos_embed` of the original repository, when the file has it.
        file_name: may tell the size ("PixArt-Sigma-XL-2-1024-MS.pth", "Sana_1600M_2Kpx_BF16.pth").
        given: fields that are known from elsewhere; they win, and whether they fit the weights is for the accounting.

    Raises CheckpointError naming the field when something can be told neither from the weights nor from `given`.
    """
    found = (_pixart if family == "pixart" else _sana)(tensors, set_aside, file_name, given)
    return {"_class_name": CLASSES[family], **found, **given}


def _pixart(
    tensors: Mapping[str, TensorRef], set_aside: Mapping[str, TensorRef], file_name: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    width, in_channels, patch, _ = _shape(tensors, "pos_embed.proj.weight", 4)
    heads, head_size = _heads(given, "", _PIXART_HEADS.get(width), width)
    additional = "adaln_single.emb.resolution_embedder.linear_1.weight" in tensors
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": head_size,
        "in_channels": in_channels,
        "out_channels": _shape(tensors, "proj_out.weight", 2)[0] // (patch * patch),
        "num_layers": _depth(tensors),
        "dropout": 0.0,
        "norm_num_groups": 32,
        "cross_attention_dim": _shape(tensors, "transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in tensors,
        "patch_size": patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "upcast_attention": False,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "use_additional_conditions": additional,
        "caption_channels": _shape(tensors, "caption_projection.linear_1.weight", 2)[1],
        "attention_type": "default",
    }
    sample_size, scale = _positions(set_aside, patch, given, 8, file_name, _PIXART_SCALES)
    config |= {"sample_size": sample_size, "interpolation_scale": scale}
    if "transformer_blocks.0.attn1.norm_q.weight" in tensors:
        config["qk_norm"] = "layer_norm_across_heads"
    compressed = {int(match[1]): ref.shape for key, ref in tensors.items() if (match := _COMPRESSED.fullmatch(key))}
    if compressed:
        factors = {shape[-1] for shape in compressed.values() if len(shape) == 4}
        if len(factors) != 1:
            raise CheckpointError(f"{file_name} compresses keys and values by several factors: give it a config.json.")
        config["kv_compress_config"] = {
            "sampling": "conv",
            "scale_factor": factors.pop(),
            "kv_compress_layer": sorted(compressed),
        }
    return config


_COMPRESSED = re.compile(r"transformer_blocks\.(\d+)\.attn1\.sr\.weight")


def _sana(
    tensors: Mapping[str, TensorRef], set_aside: Mapping[str, TensorRef], file_name: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    width, in_channels, patch, _ = _shape(tensors, "patch_embed.proj.weight", 4)
    usual = (width // _SANA_HEAD_SIZE, _SANA_HEAD_SIZE) if width in _SANA_CROSS_HEADS else None
    heads, head_size = _heads(given, "", usual, width)
    cross_width = _shape(tensors, "transformer_blocks.0.attn2.to_k.weight", 2)[0]
    cross_heads, cross_size = _heads(given, "cross", _SANA_CROSS_HEADS.get(cross_width), cross_width)
    sample_size, scale = _positions(set_aside, patch, given, 32, file_name, _SANA_SCALES)
    return {
        "in_channels": in_channels,
        "out_channels": _shape(tensors, "proj_out.weight", 2)[0] // (patch * patch),
        "num_attention_heads": heads,
        "attention_head_dim": head_size,
        "num_layers": _depth(tensors),
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": cross_size,
        "cross_attention_dim": _shape(tensors, "transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "caption_channels": _shape(tensors, "caption_projection.linear_1.weight", 2)[1],
        "mlp_ratio": _shape(tensors, "transformer_blocks.0.ff.conv_inverted.weight", 4)[0] / (2 * width),
        "dropout": 0.0,
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in tensors,
        "sample_size": sample_size,
        "patch_size": patch,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": scale,
        "guidance_embeds": "time_embed.guidance_embedder.linear_1.weight" in tensors,
        "guidance_embeds_scale": 0.1,
        "qk_norm": "rms_norm_across_heads" if "transformer_blocks.0.attn1.norm_q.weight" in tensors else None,
        "timestep_scale": 1.0,
    }


def _shape(tensors: Mapping[str, TensorRef], key: str, ndim: int) -> tuple[int, ...]:
    if key not in tensors:
        raise CheckpointError(f"the weights have no {key}, so they are not a whole transformer: save it again.")
    shape = tensors[key].shape
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(f"the weights' {key} has the shape {shape}, where {ndim} axes belong: save it again.")
    return shape


def _depth(tensors: Mapping[str, TensorRef]) -> int:
    layers = {int(match[1]) for key in tensors if (match := re.match(r"transformer_blocks\.(\d+)\.", key))}
    return 1 + max(layers, default=-1)


def _heads(given: Mapping[str, Any], kind: str, usual: tuple[int, int] | None, width: int) -> tuple[int, int]:
    count_field, size_field = (
        ("num_cross_attention_heads", "cross_attention_head_dim")
        if kind
        else ("num_attention_heads", "attention_head_dim")
    )
    count, size = given.get(count_field), given.get(size_field)
    if count is None and size is None and usual:
        return usual
    if isinstance(count, int) and count > 0:
        return count, width // count
    if isinstance(size, int) and size > 0:
        return width // size, size
    raise CheckpointError(
        f"weights of width {width} do not tell {count_field}: put a config.json with it beside the file, or name one."
    )


def _positions(
    set_aside: Mapping[str, TensorRef],
    patch: int,
    given: Mapping[str, Any],
    downsampling: int,
    file_name: str,
    scales: Mapping[int, float | None],
) -> tuple[int, float | None]:
    """(sample_size, interpolation_scale): given, or from the table, or from the size in the file's name."""
    if "sample_size" in given and "interpolation_scale" in given:
        return given["sample_size"], given["interpolation_scale"]
    if "pos_embed" in set_aside:
        return _read_table(set_aside["pos_embed"], patch)
    side = _side_in(file_name)
    if side is not None and side in scales:
        scale = scales[side]
        # Only Sigma shrinks the positions of 256 pixels; alpha's 256 and 512 share theirs.
        if scale == 0.5 and "sigma" not in file_name.lower():
            scale = 1
        return side // downsampling, scale
    field = "sample_size" if "sample_size" not in given else "interpolation_scale"
    raise CheckpointError(
        f"{file_name} has no pos_embed and no size in its name, so {field} cannot be told: put a config.json with "
        "sample_size and interpolation_scale beside the file, or name one."
    )


def _side_in(file_name: str) -> int | None:
    if match := re.search(r"(?<![\dA-Za-z])([24])K(?:px)?(?![\dA-Za-z])", file_name):
        return int(match[1]) * 1024
    if match := re.search(r"(?<!\d)(256|512|1024|2048|4096)(?!\d)", file_name):
        return int(match[1])
    return None


def _read_table(table: TensorRef, patch: int) -> tuple[int, float | None]:
    """Size and scale of a sin-cos position table [1, tokens, width]; the scale is None for a table of zeros.

    The table (MAE's get_2d_sincos_pos_embed) has sin(x / scale) in its first column and cos(x / scale) in the one a
    quarter further, with x the column of the token, so its second row tells the scale.
    """
    side = math.isqrt(table.shape[1]) if len(table.shape) == 3 else 0
    if side < 2 or side * side != table.shape[1] or table.shape[2] % 4:
        raise CheckpointError(f"pos_embed of shape {table.shape} is no square table of positions: remove it.")
    values = table.load()[0, :side].astype(np.float64)
    if not values.any():
        return side * patch, None
    quarter = table.shape[2] // 4
    angle = math.atan2(values[1, 0], values[1, quarter])
    scale = float(f"{1 / angle:.2g}") if angle > 0 else 0.0
    if scale:
        frequencies = 10000.0 ** -(np.arange(quarter) / quarter)
        angles = np.outer(np.arange(side) / scale, frequencies)
        if np.allclose(values[:, : 2 * quarter], np.hstack([np.sin(angles), np.cos(angles)]), atol=0.05):
            return side * patch, int(scale) if scale == int(scale) else scale
    raise CheckpointError("pos_embed is not the sin-cos table of PixArt and SANA: give the model's config.json.")
