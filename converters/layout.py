"""Where things lie in a checkpoint: which weights file to take, which files a pipeline needs.

The rules look at names only, so that they serve a folder on disk and a listing of a Hub repository alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgedit.converters.folder import Listing, MissingFileError, is_plain_name
from edgedit.converters.tensors import quoted
from edgedit.errors import CheckpointError

__all__ = [
    "CONFIG",
    "MODEL_INDEX",
    "OWN_RECORD",
    "SCHEDULER_CONFIG",
    "PipelinePart",
    "Plan",
    "Weights",
    "choose_weights",
    "pipeline_parts",
    "plan_files",
    "shard_map",
]

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"
OWN_RECORD = "edgedit.json"
SCHEDULER_CONFIG = "scheduler_config.json"

_VOCABULARIES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
_VARIANT = re.compile(r"[A-Za-z0-9_]+")
# Stems and endings that diffusers and transformers write, preferred first.
_FILES = (
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
)


@dataclass(frozen=True)
class Weights:
    """The weights chosen for a component: one file, or an index of shards.

    `variant` is "" for the plain ones; `note` says so where they are not what was asked for.
    """

    file: str
    sharded: bool
    variant: str
    note: str = ""


def choose_weights(files: Collection[str], variant: str | None, where: str) -> Weights:
    """Chooses among the file names of one component's folder.

    Safetensors before pickles, one file before shards. With `variant` that one, and the plain weights when it is not
    there; without it the plain weights, and when there are none, the only variant there is. Either replacement is told
    in `note`. Raises MissingFileError when nothing fits or several variants do.
    """
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise CheckpointError(f"the variant {quoted(variant)} is not a name: use fp16 or bf16, say.")
    if variant is not None and (chosen := _find(files, variant)):
        return chosen
    if chosen := _find(files, ""):
        return replace(chosen, note=f"{where} has no variant {variant}: took the plain weights" if variant else "")
    found = sorted({match for name in files if (match := _variant_of(name))})
    if len(found) > 1 or (found and variant):
        raise MissingFileError(f"{where} has only the variant {' and '.join(found)}: choose one that it has.")
    if found and (chosen := _find(files, found[0])):
        return replace(chosen, note=f"{where} has only the variant {found[0]}: took it")
    if any("-of-" in name for name in files):
        raise MissingFileError(f"{where} has shards of weights and no index.json that names them: download it again.")
    others = ", ".join(sorted(quoted(name)[1:-1] for name in files)[:6]) or "nothing"
    raise MissingFileError(f"{where} has no weights in safetensors or .bin (it has {others}): download it again.")


def _names(stem: str, ending: str, variant: str) -> tuple[tuple[str, bool], ...]:
    if not variant:
        return (f"{stem}.{ending}", False), (f"{stem}.{ending}.index.json", True)
    return (
        (f"{stem}.{variant}.{ending}", False),
        (f"{stem}.{ending}.index.{variant}.json", True),
        (f"{stem}.{ending}.{variant}.index.json", True),
    )


def _find(files: Collection[str], variant: str) -> Weights | None:
    for stem, ending in _FILES:
        for name, sharded in _names(stem, ending, variant):
            if name in files:
                return Weights(name, sharded, variant)
    return None


def _variant_of(name: str) -> str | None:
    for stem, ending in _FILES:
        match = re.fullmatch(rf"{stem}\.(\w+)\.{ending}|{stem}\.{ending}\.index\.(\w+)\.json", name) or re.fullmatch(
            rf"{stem}\.{ending}\.(?!index)(\w+)\.index\.json", name
        )
        if match:
            return next(group for group in match.groups() if group)
    return None


def shard_map(index: Mapping[str, Any], where: str) -> dict[str, str]:
    """Tensor name → shard's file name, from the content of an index.json; shards lie in the index's own folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map: download or export it again.")
    for shard in weight_map.values():
        if not is_plain_name(shard):
            raise CheckpointError(
                f"{where} names the shard {quoted(shard)}, which is not in its folder: do not use it."
            )
    return weight_map


@dataclass(frozen=True)
class PipelinePart:
    """One entry of model_index.json. `kind` is "weights", "scheduler" or "tokenizer"."""

    name: str
    kind: str
    library: str
    class_name: str


def pipeline_parts(index: Mapping[str, Any], where: str, components: Sequence[str] | None) -> list[PipelinePart]:
    """The entries of a model_index.json, restricted to the weights named in `components` (None: all)."""
    parts = []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(item, str) for item in entry) or not is_plain_name(name):
            raise CheckpointError(f"{where} has the entry {quoted(name)} that is not [library, class]: do not use it.")
        kind = _kind(name, entry[1])
        if kind:
            parts.append(PipelinePart(name, kind, entry[0], entry[1]))
    if components is not None:
        known = [part.name for part in parts if part.kind == "weights"]
        unknown = [name for name in components if name not in known]
        if unknown:
            raise CheckpointError(
                f"{where} has no component {quoted(unknown[0])}; it has {', '.join(known) or 'none'}."
            )
        encodes = any(name.startswith("text_encoder") for name in components)
        parts = [
            part
            for part in parts
            if part.name in components or part.kind == "scheduler" or (part.kind == "tokenizer" and encodes)
        ]
    return parts


def _kind(name: str, class_name: str) -> str | None:
    if class_name.endswith("Scheduler"):
        return "scheduler"
    if "Tokenizer" in class_name or name.startswith("tokenizer"):
        return "tokenizer"
    if class_name.endswith(("FeatureExtractor", "ImageProcessor", "Processor")):
        return None
    return "weights"


@dataclass(frozen=True)
class Plan:
    """The files that opening a pipeline or component reads, and the notes of the choices among weights."""

    files: frozenset[str]
    notes: tuple[str, ...]


def plan_files(listing: Listing, variant: str | None, components: Sequence[str] | None) -> Plan:
    """Which files of `listing` it takes to open the pipeline or component in it.

    Raises MissingFileError when the listing is neither, a part has no weights or no vocabulary, or no part has the
    `variant` asked for; CheckpointError when an index is unsound.
    """
    needed: set[str] = set()
    chosen: list[Weights] = []
    if MODEL_INDEX in listing.files:
        needed |= {MODEL_INDEX} | ({OWN_RECORD} & set(listing.files))
        for part in pipeline_parts(listing.read_json(MODEL_INDEX), listing.name, components):
            if part.kind == "scheduler":
                needed.add(f"{part.name}/{SCHEDULER_CONFIG}")
            elif part.kind == "tokenizer":
                inside = {name for name in listing.files if name.startswith(f"{part.name}/")}
                if not any(f"{part.name}/{name}" in inside for name in _VOCABULARIES):
                    raise MissingFileError(
                        f"{listing.name}/{part.name} has no vocabulary (tokenizer.json or the like): download it again."
                    )
                needed |= inside
            else:
                chosen.append(_plan_weights(listing, f"{part.name}/", variant, needed))
    elif CONFIG in listing.files:
        needed |= {OWN_RECORD} & set(listing.files)
        chosen.append(_plan_weights(listing, "", variant, needed))
    else:
        weights = sorted(name for name in listing.files if name.endswith((".safetensors", ".pth", ".pt", ".bin")))
        hint = f"give the file {quoted(weights[0])[1:-1]} of it itself" if weights else "give another"
        raise MissingFileError(f"{listing.name} is no diffusers pipeline and no component of one: {hint}.")
    if variant is not None and chosen and not any(weights.variant == variant for weights in chosen):
        raise MissingFileError(f"{listing.name} has no weights of the variant {variant}: leave the variant out.")
    return Plan(frozenset(needed), tuple(weights.note for weights in chosen if weights.note))


def _plan_weights(listing: Listing, prefix: str, variant: str | None, needed: set[str]) -> Weights:
    names = [name[len(prefix) :] for name in listing.files if name.startswith(prefix)]
    chosen = choose_weights([name for name in names if "/" not in name], variant, f"{listing.name}/{prefix}"[:-1])
    needed |= {prefix + CONFIG, prefix + chosen.file}
    if chosen.sharded:
        index = listing.read_json(prefix + chosen.file, strict=True)
        needed |= {prefix + shard for shard in shard_map(index, f"{listing.name}/{prefix}{chosen.file}").values()}
    return chosen
