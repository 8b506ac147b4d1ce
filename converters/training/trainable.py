"""A checkpoint's transformer in torch, to be changed and saved again as a checkpoint.

Only the transformer is touched: every other file of the folder is copied as it is. What a folder of diffusers cannot
say (which operator a layer's self-attention is, the schedule of a distilled model) stands in `edgedit.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgedit.converters.checkpoint import ComponentSource, open_checkpoint
from edgedit.converters.tensors import TensorRef
from edgedit.converters.training.denoisers import CALLS, Denoiser
from edgedit.converters.training.operators import SelfAttention, make_operator
from edgedit.errors import CheckpointError, ConversionError, InputError
from edgedit.schedules import schedule_config_from_diffusers

__all__ = [
    "SETTINGS",
    "Trainable",
    "attention_layers",
    "check_output",
    "follow_grid",
    "open_trainable",
    "replace_attention",
    "save_trainable",
]

SETTINGS = "edgedit.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Trainable:
    """A diffusers pipeline folder with its transformer in memory.

    Attributes:
        path: the folder.
        transformer: float32, with the operators of `attention` in place.
        dtype: the type that the weights are stored in.
        attention: the objects of `edgedit.json` that name operators.
        settings: the whole of `edgedit.json`, {} without one.
        schedule: the manifest's schedule object.
        scale_factor: pixels a latent pixel stands for.
    """

    path: Path
    transformer: Any
    dtype: torch.dtype
    attention: list[dict[str, Any]]
    settings: dict[str, Any]
    schedule: dict[str, Any]
    scale_factor: int

    def denoiser(self) -> Denoiser:
        """The transformer on the straight path."""
        return Denoiser(self.transformer, self.schedule, scale_factor=self.scale_factor)


def attention_layers(transformer: Any) -> list[tuple[nn.Module, str]]:
    """Where each block keeps its self-attention: (block, name of the attribute), in order."""
    return [(block, "attn1") for block in transformer.transformer_blocks]


def open_trainable(source: str | Path) -> Trainable:
    """Read a pipeline folder's transformer.

    Raises:
        CheckpointError: the folder is missing, damaged or unsafe, or is no pipeline.
        InputError: a transformer of a class that cannot be trained.
    """
    checkpoint = open_checkpoint(source)
    network = checkpoint.components.get("transformer")
    if checkpoint.pipeline_class is None or network is None or checkpoint.scheduler is None:
        raise CheckpointError(
            f"{source} is no pipeline folder with a transformer and a scheduler; give the folder with model_index.json"
        )
    if network.class_name not in CALLS:
        raise InputError(f"class {network.class_name} cannot be trained; choose a checkpoint of {', '.join(CALLS)}")
    settings = _settings(checkpoint.path)
    attention = [dict(spec) for spec in settings.get("attention", [])]
    transformer = _build(network)
    replace_attention(transformer, attention)
    _load(transformer, network)
    vae = next((c for c in checkpoint.components.values() if c.class_name.startswith("Autoencoder")), None)
    schedule = settings.get("schedule") or schedule_config_from_diffusers(
        checkpoint.scheduler.class_name, checkpoint.scheduler.config
    )
    stored = max((ref.dtype for ref in network.tensors.values()), key=lambda name: (name in _DTYPES, name))
    return Trainable(
        path=checkpoint.path,
        transformer=transformer,
        dtype=_DTYPES.get(stored, torch.float32),
        attention=attention,
        settings=settings,
        schedule=dict(schedule),
        scale_factor=_scale_factor(vae),
    )


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _build(network: ComponentSource) -> Any:
    try:
        # The reader puts what edgedit.json says of attention beside what diffusers knows.
        config = {key: value for key, value in network.config.items() if key != "self_attention"}
        return getattr(diffusers, network.class_name).from_config(config).float()
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"transformer/config.json describes no {network.class_name}: {error}") from None


def _tensor(ref: TensorRef) -> Tensor:
    array = ref.load()
    return torch.from_numpy(array if array.dtype.kind in "iub" else array.astype(np.float32))


def _load(transformer: nn.Module, network: ComponentSource) -> None:
    """Fill every parameter; a key that is missing, left over or of another shape is an error."""
    wanted = transformer.state_dict()
    tensors = network.tensors
    missing = [name for name in wanted if name not in tensors and name != "pos_embed.pos_embed"]
    unexpected = [name for name in tensors if name not in wanted]
    wrong = [name for name in wanted if name in tensors and tuple(wanted[name].shape) != tuple(tensors[name].shape)]
    for what, names in (("lacks", missing), ("also has", unexpected), ("has another shape of", wrong)):
        if names:
            raise CheckpointError(
                f"transformer {what} {names[0]} and {len(names) - 1} more keys than its configuration and "
                f"{SETTINGS} say; the checkpoint is not whole, or edgedit.json is another's",
                details="\n".join(names),
            )
    transformer.load_state_dict({name: _tensor(tensors[name]) for name in wanted if name in tensors}, strict=False)


def _scale_factor(vae: ComponentSource | None) -> int:
    if vae is None:
        return 8
    blocks = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels") or [0] * 4
    return int(2 ** (len(blocks) - 1))


def replace_attention(transformer: Any, specs: Sequence[Mapping[str, Any]]) -> list[SelfAttention]:
    """Put the operators that objects of `edgedit.json` name in the place of softmax attention.

    Every operator learns its token grid from the latents before each call.

    Raises InputError for a layer that is not there or named twice.
    """
    places = attention_layers(transformer)
    operators: list[SelfAttention] = []
    taken: set[int] = set()
    for spec in specs:
        for layer in spec.get("layers", []):
            if not isinstance(layer, int) or not 0 <= layer < len(places) or layer in taken:
                raise InputError(
                    f"{SETTINGS}: attention names layer {layer!r}; each of 0 to {len(places) - 1} may be named once"
                )
            taken.add(layer)
            block, name = places[layer]
            operator = make_operator(spec, getattr(block, name))
            setattr(block, name, operator)
            operators.append(operator)
    follow_grid(transformer)
    return operators


def follow_grid(transformer: Any) -> None:
    """Let the transformer's operators know the token grid of the latents before each call."""
    if _tell_grid not in transformer._forward_pre_hooks.values():
        transformer.register_forward_pre_hook(_tell_grid, with_kwargs=True)


def _tell_grid(transformer: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    latents: Tensor = positional[0] if positional else named["hidden_states"]
    patch = int(transformer.config.patch_size)
    for module in transformer.modules():
        if isinstance(module, SelfAttention):
            module.grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)


def check_output(output: Path) -> None:
    """Refuse a place where a new checkpoint cannot be written.

    Raises ConversionError.
    """
    if output.exists():
        raise ConversionError(f"{output} exists; choose another --output or delete it")
    parent = output.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConversionError(f"{parent} is no folder that can be written; choose another --output")


def save_trainable(
    trainable: Trainable,
    output: Path,
    *,
    weights: Mapping[str, Tensor] | None,
    settings: Mapping[str, Any],
    extra: Mapping[str, Path] | None = None,
) -> None:
    """Write a checkpoint: the files of the old one, new transformer weights, new settings. Whole or not at all.

    Args:
        trainable: what was opened.
        output: the folder to make.
        weights: the transformer's tensors by name, stored in the old type; None keeps the old files.
        settings: the content of `edgedit.json`; {} writes none.
        extra: further files, by their name in the folder.

    Raises ConversionError when the folder exists or cannot be written.
    """
    check_output(output)
    partial = output.absolute().with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    transformer = trainable.path / "transformer"

    def skipped(folder: str, names: list[str]) -> set[str]:
        hidden = {name for name in names if name.startswith(".")}
        if weights is None or Path(folder) != transformer:
            return hidden
        return hidden | {name for name in names if name != "config.json"}

    try:
        shutil.copytree(trainable.path, partial, ignore=skipped)
        if weights is not None:
            stored = {name: value.detach().to(trainable.dtype).contiguous() for name, value in weights.items()}
            save_file(stored, partial / "transformer" / WEIGHTS, metadata={"format": "pt"})
        if settings:
            (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name, path in (extra or {}).items():
            shutil.copy(path, partial / name)
        partial.rename(output)
    except OSError as error:
        raise ConversionError(f"{output} cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
