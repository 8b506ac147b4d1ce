"""`edgedit.json`: what a checkpoint says of itself that diffusers' own files have no place for.

An object with any of these entries; another entry, or a value that is not as described, is refused.
  `recommended`  {"steps", "guidance_scale", "sampler", "sizes"}: settings for a user who says nothing; `sizes` are the
                 [width, height] pairs in pixels that the model was trained on
  `prompt`       {"max_length"}: tokens, special ones included
  `licence`      of the weights
  `attention`    which self-attention operator each block has; see `edgedit.converters.architectures.operators`
  `schedule`     the manifest's schedule object, in place of the one that the scheduler's configuration makes
  `guidance`     the manifest's guidance object, in place of the family's
It lies beside model_index.json, or beside the config.json of a component that is given alone; a component's folder or
file inside a pipeline's folder takes that of the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedit.converters.folder import Folder
from edgedit.converters.layout import MODEL_INDEX, OWN_RECORD
from edgedit.converters.tensors import quoted
from edgedit.errors import BundleError, CheckpointError, InputError
from edgedit.guidance import Guidance
from edgedit.sampler_names import resolve_sampler
from edgedit.schedules import make_schedule, own_steps

__all__ = ["OwnRecord", "read_own_record"]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _text(value: object) -> bool:
    return isinstance(value, str)


def _object(value: object) -> bool:
    return isinstance(value, dict)


def _list(value: object) -> bool:
    return isinstance(value, list)


def _sizes(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(pair, list) and len(pair) == 2 and all(map(_whole, pair)) for pair in value)


_Entry = tuple[Callable[[object], bool], str]
_ENTRIES: Mapping[str, _Entry] = {
    "recommended": (_object, "an object"),
    "prompt": (_object, "an object"),
    "licence": (_text, "a text"),
    "attention": (_list, "a list of objects"),
    "schedule": (_object, "an object"),
    "guidance": (_object, "an object"),
}
_RECOMMENDED: Mapping[str, _Entry] = {
    "steps": (_whole, "a whole number of at least 1"),
    "guidance_scale": (_number, "a number of at least 0"),
    "sampler": (_text, "the name of a sampler"),
    "sizes": (_sizes, "a list of [width, height] in pixels"),
}
_PROMPT: Mapping[str, _Entry] = {"max_length": (_whole, "a whole number of at least 1")}


@dataclass(frozen=True)
class OwnRecord:
    """A checkpoint's `edgedit.json`; entries that it lacks are empty or None."""

    recommended: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    licence: str | None = None
    attention: tuple[Any, ...] = ()
    schedule: Mapping[str, Any] | None = None
    guidance: Mapping[str, Any] | None = None


def read_own_record(folder: Path) -> OwnRecord:
    """The record of the checkpoint in `folder`, empty when there is none.

    A folder without its own takes its parent's, if that is a pipeline's. Raises CheckpointError, in one line, when the
    record is not what it should be.
    """
    path = folder / OWN_RECORD
    if not path.exists():
        parent = folder.resolve().parent
        if (
            (folder / MODEL_INDEX).exists()
            or not (parent / MODEL_INDEX).is_file()
            or not (parent / OWN_RECORD).exists()
        ):
            return OwnRecord()
        path = parent / OWN_RECORD
    record = Folder(path.parent).read_json(OWN_RECORD, strict=True)
    where = str(path)
    _check(record, _ENTRIES, where)
    recommended, prompt = record.get("recommended", {}), record.get("prompt", {})
    _check(recommended, _RECOMMENDED, f"{where}: recommended")
    _check(prompt, _PROMPT, f"{where}: prompt")
    own = OwnRecord(
        recommended=recommended,
        max_length=prompt.get("max_length"),
        licence=record.get("licence"),
        attention=tuple(record.get("attention", ())),
        schedule=record.get("schedule"),
        guidance=record.get("guidance"),
    )
    _check_sampling(own, where)
    return own


def _check(values: Mapping[str, Any], entries: Mapping[str, _Entry], where: str) -> None:
    for name, value in values.items():
        if name not in entries:
            raise CheckpointError(f"{where} has the unknown entry {quoted(name)}: it may have {', '.join(entries)}.")
        allowed, wanted = entries[name]
        if not allowed(value):
            raise CheckpointError(f"{where} has {name} = {quoted(value)}: it must be {wanted}.")


def _check_sampling(own: OwnRecord, where: str) -> None:
    """Everything that would fail when a picture is drawn, found now."""
    asked, sampler = own.recommended.get("steps"), own.recommended.get("sampler")
    try:
        if sampler is not None:
            resolve_sampler(sampler)
        if own.guidance is not None:
            Guidance.from_manifest(own.guidance)
        if own.schedule is not None:
            for steps in {*own_steps(own.schedule), asked} - {None} or {1}:
                make_schedule(own.schedule, steps, image_tokens=1024, sampler=sampler)
    except (BundleError, InputError) as error:
        raise CheckpointError(f"{where}: {error}") from None
