"""Key names of other repositories and of other days → the names that diffusers uses today.

PixArt's and SANA's own repositories name their weights otherwise than diffusers and keep q, k and v in one matrix
(PixArt-sigma `diffusion/model/nets/PixArtMS.py`, SANA `diffusion/model/nets/sana_multi_scale.py`); the published `.pth`
files have those names. Nothing is read here: a third of a matrix is a tensor that cuts when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgedit.converters.tensors import TensorRef, quoted, rows_of
from edgedit.errors import CheckpointError

__all__ = ["Renamed", "family_of", "from_original", "modernise", "strip_prefix"]

_PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.", "base_model.", "model.")


@dataclass(frozen=True)
class Renamed:
    """Tensors under diffusers' names.

    Attributes:
        tensors: what goes into the model, and any key that no rule knows, under its own name, so that the accounting
            finds it.
        dropped: keys that a model of diffusers has no use for, with the reason.
        set_aside: the dropped tensors that still tell something (`pos_embed`, `y_embedder.y_embedding`).
    """

    tensors: dict[str, TensorRef]
    dropped: dict[str, str]
    set_aside: dict[str, TensorRef]


def strip_prefix(tensors: Mapping[str, TensorRef]) -> tuple[dict[str, TensorRef], str]:
    """The tensors without the prefixes that wrappers put before every key (`module.`, `_orig_mod.` …), and those."""
    result, stripped = dict(tensors), ""
    while result:
        prefix = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in result)), None)
        if prefix is None:
            break
        result = {key[len(prefix) :]: ref.renamed(key[len(prefix) :]) for key, ref in result.items()}
        stripped += prefix
    return result, stripped


def family_of(tensors: Mapping[str, TensorRef]) -> tuple[str, bool] | None:
    """("pixart" or "sana", whether the names are the original repository's), or None for anything else."""
    if {"x_embedder.proj.weight", "t_block.1.weight", "final_layer.linear.weight"} <= tensors.keys():
        if "blocks.0.mlp.fc1.weight" in tensors:
            return "pixart", True
        if "blocks.0.mlp.inverted_conv.conv.weight" in tensors:
            return "sana", True
    if {"pos_embed.proj.weight", "adaln_single.linear.weight", "proj_out.weight"} <= tensors.keys():
        return "pixart", False
    if {"patch_embed.proj.weight", "time_embed.linear.weight", "caption_norm.weight"} <= tensors.keys():
        return "sana", False
    return None


_BLOCK = r"blocks\.(\d+)\."
_TO = r"transformer_blocks.\1."
_COMMON = (
    (r"y_embedder\.y_proj\.fc([12])\.(\w+)", r"caption_projection.linear_\1.\2"),
    (r"final_layer\.linear\.(\w+)", r"proj_out.\1"),
    (r"final_layer\.scale_shift_table", r"scale_shift_table"),
    (_BLOCK + r"scale_shift_table", _TO + r"scale_shift_table"),
    (_BLOCK + r"attn\.qkv\.(\w+)", _TO + r"attn1.{to_q,to_k,to_v}.\2"),
    (_BLOCK + r"attn\.proj\.(\w+)", _TO + r"attn1.to_out.0.\2"),
    (_BLOCK + r"attn\.([qk])_norm\.(\w+)", _TO + r"attn1.norm_\2.\3"),
    (_BLOCK + r"cross_attn\.q_linear\.(\w+)", _TO + r"attn2.to_q.\2"),
    (_BLOCK + r"cross_attn\.kv_linear\.(\w+)", _TO + r"attn2.{to_k,to_v}.\2"),
    (_BLOCK + r"cross_attn\.proj\.(\w+)", _TO + r"attn2.to_out.0.\2"),
    (_BLOCK + r"cross_attn\.([qk])_norm\.(\w+)", _TO + r"attn2.norm_\2.\3"),
)


def _mlp(original: str, target: str) -> tuple[tuple[str, str], ...]:
    return (
        (original + r"\.mlp\.0\.(\w+)", target + r".linear_1.\1"),
        (original + r"\.mlp\.2\.(\w+)", target + r".linear_2.\1"),
    )


_PIXART = (
    *_COMMON,
    (r"x_embedder\.proj\.(\w+)", r"pos_embed.proj.\1"),
    (r"t_block\.1\.(\w+)", r"adaln_single.linear.\1"),
    *_mlp("t_embedder", "adaln_single.emb.timestep_embedder"),
    *_mlp("csize_embedder", "adaln_single.emb.resolution_embedder"),
    *_mlp("ar_embedder", "adaln_single.emb.aspect_ratio_embedder"),
    (_BLOCK + r"mlp\.fc1\.(\w+)", _TO + r"ff.net.0.proj.\2"),
    (_BLOCK + r"mlp\.fc2\.(\w+)", _TO + r"ff.net.2.\2"),
    # KV compression (PixArt-Sigma, section 3.2), which diffusers does not have: named as its neighbours are.
    (_BLOCK + r"attn\.(sr|norm)\.(\w+)", _TO + r"attn1.\2.\3"),
)
_SANA = (
    *_COMMON,
    (r"x_embedder\.proj\.(\w+)", r"patch_embed.proj.\1"),
    (r"t_block\.1\.(\w+)", r"time_embed.linear.\1"),
    (r"attention_y_norm\.weight", r"caption_norm.weight"),
    (_BLOCK + r"mlp\.inverted_conv\.conv\.(\w+)", _TO + r"ff.conv_inverted.\2"),
    (_BLOCK + r"mlp\.depth_conv\.conv\.(\w+)", _TO + r"ff.conv_depth.\2"),
    (_BLOCK + r"mlp\.point_conv\.conv\.(\w+)", _TO + r"ff.conv_point.\2"),
)
_SANA_PLAIN = _mlp("t_embedder", "time_embed.emb.timestep_embedder")
_SANA_GUIDED = (
    *_mlp("t_embedder", "time_embed.timestep_embedder"),
    *_mlp("cfg_embedder", "time_embed.guidance_embedder"),
)
_DROPPED = {
    "pos_embed": "a fixed sin-cos table, computed anew for the picture's size",
    "y_embedder.y_embedding": "the embedding of a dropped caption, used in training only",
    "logvar_linear.weight": "the loss weighting of training",
    "logvar_linear.bias": "the loss weighting of training",
}


def from_original(family: str, tensors: Mapping[str, TensorRef]) -> Renamed:
    """Renames the tensors of an original-repository checkpoint to diffusers' names.

    Args:
        family: "pixart" or "sana".
        tensors: by their original names, without a wrapper's prefix.

    Raises CheckpointError when the file holds a weight under both its names.
    """
    if family == "pixart":
        rules: tuple[tuple[str, str], ...] = _PIXART
    else:
        guided = any(key.startswith("cfg_embedder.") for key in tensors)
        rules = (*_SANA, *(_SANA_GUIDED if guided else _SANA_PLAIN))
    compiled = [(re.compile(pattern), target) for pattern, target in rules]
    renamed = Renamed({}, {}, {})
    for key, ref in tensors.items():
        if key in _DROPPED:
            renamed.dropped[key] = _DROPPED[key]
            renamed.set_aside[key] = ref
            continue
        for pattern, target in compiled:
            if match := pattern.fullmatch(key):
                parts = _split(ref, match.expand(target))
                break
        else:
            parts = {key: ref}
        for name, part in parts.items():
            if name in renamed.tensors:
                raise CheckpointError(f"two weights of the file are both {quoted(name)}: save one model alone.")
            renamed.tensors[name] = part
    return renamed


def _split(ref: TensorRef, target: str) -> dict[str, TensorRef]:
    """One tensor under its new name, or the parts of it where `target` lists them: `a.{b,c}.d`."""
    head, brace, rest = target.partition("{")
    if not brace:
        return {target: ref.renamed(target)}
    listed, _, tail = rest.partition("}")
    names = [head + part + tail for part in listed.split(",")]
    if not ref.shape or ref.shape[0] % len(names):
        # Left whole under its old name; the accounting reports it beside the parameters that it leaves empty.
        return {ref.name: ref}
    rows = ref.shape[0] // len(names)
    return {name: rows_of(ref, name, index * rows, (index + 1) * rows) for index, name in enumerate(names)}


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modernise(
    class_name: str, config: Mapping[str, object], tensors: Mapping[str, TensorRef]
) -> tuple[str, dict[str, TensorRef], dict[str, str]]:
    """What diffusers and transformers do silently when they load old folders: (class, tensors, dropped keys).

    * `Transformer2DModel` with `ada_norm_single` is PixArt's, with `ada_norm_zero` DiT's (`LegacyModelMixin`).
    * AutoencoderKL's attention had the names query, key, value and proj_attn before diffusers 0.15.
    * A T5 encoder whose embedding is stored under its second name only.
    * A Gemma-2 that was saved as a language model has the prefix `model.` and a head, of which an encoder has no use.
    """
    if class_name == "Transformer2DModel":
        by_norm = {"ada_norm_single": "PixArtTransformer2DModel", "ada_norm_zero": "DiTTransformer2DModel"}
        return by_norm.get(str(config.get("norm_type")), class_name), dict(tensors), {}
    if class_name == "AutoencoderKL":
        return class_name, _rename(tensors, _modern_attention), {}
    if class_name in ("T5EncoderModel", "UMT5EncoderModel") and "shared.weight" not in tensors:
        aliases = {"encoder.embed_tokens.weight": "shared.weight"}
        return class_name, _rename(tensors, lambda key: aliases.get(key, key)), {}
    if class_name in ("Gemma2ForCausalLM", "Gemma2Model"):
        kept = {key: ref for key, ref in tensors.items() if not key.startswith("lm_head.")}
        dropped = {key: "the head of a language model" for key in tensors if key not in kept}
        if kept and all(key.startswith("model.") for key in kept):
            kept = _rename(kept, lambda key: key.removeprefix("model."))
        return "Gemma2Model", kept, dropped
    return class_name, dict(tensors), {}


def _rename(tensors: Mapping[str, TensorRef], rename: Callable[[str], str]) -> dict[str, TensorRef]:
    return {(name := rename(key)): ref.renamed(name) for key, ref in tensors.items()}


def _modern_attention(key: str) -> str:
    match = re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", key)
    return match[1] + _OLD_ATTENTION[match[2]] + match[3] if match else key
