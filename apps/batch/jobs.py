"""A job: the fields that one line of a job file may hold, checked for everything that needs no model."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FIELDS", "MISTAKE_LIMIT", "Job", "Mistake", "MistakeError", "parse_job", "prompt_hash", "seed_of"]

#: Longest prompt, in characters; a text encoder reads about a thousand.
LONGEST_PROMPT = 100_000
#: Longest id in bytes of UTF-8: file names end at 255 on all common file systems.
LONGEST_ID = 180
#: Most seeds of one job.
MOST_SEEDS = 100_000
#: Mistakes of a job file that are kept and shown; more are only counted.
MISTAKE_LIMIT = 1000

_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\<>:"|?*]')
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")


@dataclass(frozen=True)
class Mistake:
    """What is wrong with one line: 1-based line (or row) number, field ("" for the line as a whole), reason."""

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {f'{self.field}: ' if self.field else ''}{self.reason}"


class MistakeError(Exception):
    """A field that cannot be used. The reader of the job file adds the line."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.reason = field, reason


@dataclass(frozen=True, slots=True)
class Job:
    """One line of a job file, its fields of the right types. None, and an empty mapping, mean that it does not say.

    Attributes:
        seeds: one picture each; empty when the job gives none.
        settings: arguments of `Pipeline.generate` other than prompt, seed and what the picture starts from, as given.
        image, latents: absolute paths of a picture or of starting noise.
    """

    id: str | None
    prompt: str
    negative_prompt: str | None
    seeds: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...]
    image: str | None
    latents: str | None
    metadata: Mapping[str, Any] | None

    def spec(self) -> dict[str, Any]:
        """What the picture depends on, the seed and the model aside, with the metadata; the form kept in a ledger."""
        spec: dict[str, Any] = {"prompt": self.prompt, **dict(self.settings)}
        for name in ("negative_prompt", "image", "latents", "metadata"):
            if getattr(self, name) is not None:
                spec[name] = getattr(self, name)
        return spec


def prompt_hash(prompt: str) -> str:
    """The first 12 hexadecimal digits of the prompt's SHA-256, for file names."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:12]


def seed_of(identity: str, prompt: str) -> int:
    """The seed, below 2^32, of a job that gives none: the same whenever its id and prompt are."""
    return int.from_bytes(hashlib.sha256(f"{identity}\0{prompt}".encode()).digest()[:4], "big")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise MistakeError(field, f"must be a text, not {_shown(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise MistakeError(field, "holds bytes that are not UTF-8 or half a surrogate pair") from None
    return value


def _prompt(field: str, value: object) -> str:
    text = _text(field, value)
    if len(text) > LONGEST_PROMPT:
        raise MistakeError(field, f"is longer than {LONGEST_PROMPT} characters")
    return text


def _identity(field: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    text = _text(field, value)
    if not text:
        raise MistakeError(field, "is empty; leave it out for the line's number")
    if found := _UNSAFE.search(text):
        raise MistakeError(field, f"holds {found.group()!r}, which file names cannot; use letters, digits, - _ . +")
    if text[0] in ". " or text[-1] in ". " or _RESERVED.fullmatch(text):
        raise MistakeError(field, f"{_shown(text)} is no file name on every system; choose another")
    if len(text.encode()) > LONGEST_ID:
        raise MistakeError(field, f"is longer than {LONGEST_ID} bytes")
    return text


def _whole(field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise MistakeError(field, f"must be a whole number, not {_shown(value)}")
    return value


def _number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MistakeError(field, f"must be a number, not {_shown(value)}")
    if not -1e308 < value < 1e308:
        raise MistakeError(field, f"must be a finite number, not {_shown(value)}")
    return value


def _seed(field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise MistakeError(field, f"must be a whole number from 0 to 2^64 - 1, not {_shown(value)}")
    return value


def _seeds(field: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise MistakeError(field, f"must be a list of whole numbers, not {_shown(value)}")
    if len(value) > MOST_SEEDS:
        raise MistakeError(field, f"are more than {MOST_SEEDS}; write several jobs")
    seeds = tuple(_seed(field, seed) for seed in value)
    if len(set(seeds)) < len(seeds):
        raise MistakeError(field, "hold one seed twice, which would draw one picture twice")
    return seeds


def _numbers(field: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise MistakeError(field, f"must be a list of numbers, not {_shown(value)}")
    return tuple(_number(field, item) for item in value)


def _interval(field: str, value: object) -> tuple[float, ...]:
    pair = _numbers(field, value)
    if len(pair) != 2:
        raise MistakeError(field, f"must be two fractions, not {_shown(value)}")
    return pair


def _size(field: str, value: object) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2:
        return _whole(field, value[0]), _whole(field, value[1])
    columns, cross, rows = str(value).lower().replace("×", "x").partition("x")
    if not isinstance(value, str) or not cross or not columns.isdecimal() or not rows.isdecimal():
        raise MistakeError(field, f'must be like "512x512", not {_shown(value)}')
    return int(columns), int(rows)


def _scale(field: str, value: object) -> float | str:
    return _text(field, value) if isinstance(value, str) else _number(field, value)


def _metadata(field: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise MistakeError(field, f"must be an object, not {_shown(value)}")
    pending: list[object] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            for key in item:
                _text(field, key)
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str):
            _text(field, item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise MistakeError(field, "holds a number that is not finite")
    return value


#: Every field of a job and what reads it.
FIELDS: Mapping[str, Callable[[str, object], Any]] = {
    "id": _identity,
    "prompt": _prompt,
    "negative_prompt": _prompt,
    "seed": _seed,
    "seeds": _seeds,
    "width": _whole,
    "height": _whole,
    "size": _size,
    "steps": _whole,
    "guidance_scale": _number,
    "guidance_interval": _interval,
    "sampler": _text,
    "sigmas": _numbers,
    "rng": _text,
    "image": _text,
    "strength": _number,
    "step_cache": _text,
    "attention_scale": _scale,
    "latents": _text,
    "metadata": _metadata,
}
_SETTINGS = (
    *("width", "height", "steps", "guidance_scale", "guidance_interval"),
    *("sampler", "sigmas", "rng", "strength", "step_cache", "attention_scale"),
)


#: Fields that say the same thing.
_SAME = (("seed", "seeds"), ("size", "width"), ("size", "height"), ("steps", "sigmas"))


def parse_job(raw: Mapping[str, object], folder: Path) -> Job:
    """The job in one line's fields; null counts as left out, and paths are relative to `folder`.

    Raises MistakeError for an unknown field, a wrong type, and fields that contradict each other.
    """
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if value is None:
            continue
        read = FIELDS.get(name)
        if read is None:
            near = difflib.get_close_matches(str(name), FIELDS, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"use some of: {', '.join(FIELDS)}"
            raise MistakeError(str(name)[:60], f"is not a field of a job; {hint}")
        values[name] = read(name, value)
    if "prompt" not in values:
        raise MistakeError("prompt", "is missing")
    if not values["prompt"].strip():
        raise MistakeError("prompt", "is empty")
    for one, other in _SAME if len(values) > 2 else ():
        if one in values and other in values:
            raise MistakeError(other, f"says the same as {one}; give one of them")
    if "image" in values and "latents" in values:
        raise MistakeError("latents", "start the picture, and so does image; give one of them")
    if "strength" in values and "image" not in values:
        raise MistakeError("strength", "needs an image to start from")
    if "size" in values:
        values["width"], values["height"] = values["size"]
    seeds = values.get("seeds", ())
    if "seed" in values:
        seeds = (values["seed"],)
    if "latents" in values and len(seeds) > 1:
        raise MistakeError("seeds", "make one picture with latents; give one seed")
    return Job(
        id=values.get("id"),
        prompt=values["prompt"],
        negative_prompt=values.get("negative_prompt"),
        seeds=seeds,
        settings=tuple((name, values[name]) for name in _SETTINGS if name in values),
        image=_path(values.get("image"), folder),
        latents=_path(values.get("latents"), folder),
        metadata=values.get("metadata"),
    )


def _path(value: str | None, folder: Path) -> str | None:
    return None if value is None else str(folder / value)
