"""What `generate` was asked for: the flags, parsed, merged with a recipe, and checked before a model is opened."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedit.errors import InputError

__all__ = [
    "Request",
    "parse_aspect",
    "parse_interval",
    "parse_seeds",
    "parse_sigmas",
    "parse_size",
    "read_prompt",
]

#: Longest prompt file that is read; a text encoder takes about a thousand characters.
LARGEST_PROMPT = 1 << 20
LARGEST_BATCH = 10_000


@dataclass(frozen=True)
class Request:
    """One call of `generate`. None leaves the choice to the model."""

    prompt: str | None
    seeds: tuple[int, ...]
    allow_empty: bool = False
    negative_prompt: str | None = None
    negative_is_explicit: bool = False
    model: str | None = None
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    aspect: tuple[float, float] | None = None
    force_size: bool = False
    denoise_tile: int | None = None
    denoise_overlap: int | None = None
    attention_scale: str | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None
    sigmas: tuple[float, ...] | None = None
    rng: str | None = None
    step_cache: str | None = None
    image: Path | None = None
    strength: float | None = None
    latents_in: Path | None = None
    latents_out: str | None = None
    output: str | None = None
    preview: Path | None = None
    metadata: bool = True
    backend: str = "auto"
    engine: str = "auto"
    providers: tuple[str, ...] = ()
    threads: int | None = None
    low_ram: bool = False
    decoder: str | None = None
    vae_tiling: str = "auto"
    vae_tile_size: int | None = None
    vae_tile_overlap: int | None = None
    max_memory: str | None = None
    graph_cache: bool = False
    interpreter: bool = False
    emulate_fp16: bool = False
    compute_units: str | None = None
    use_cache: bool = True
    offline: bool = False
    model_hash: str | None = None

    def check(self) -> None:
        """Refuse what no model can make sense of. Raises InputError."""
        if self.prompt is None:
            raise InputError('there is no prompt; say what to draw, as in: edgedit generate "a red circle"')
        if not self.prompt.strip() and not self.allow_empty:
            raise InputError("the prompt is empty; say what to draw, or pass --allow-empty to draw without one")
        if self.aspect is not None and (self.width is not None or self.height is not None):
            raise InputError("give either --aspect or a size, not both")
        if self.steps is not None and self.sigmas is not None:
            raise InputError("--sigmas sets the steps itself; leave --steps out")
        if self.image is not None and self.latents_in is not None:
            raise InputError("give either --image or --latents-in to start from, not both")
        if self.strength is not None and self.image is None:
            raise InputError("--strength needs a picture to start from; pass --image too")
        if self.latents_in is not None and len(self.seeds) > 1:
            raise InputError("--latents-in makes one picture; give one seed and no --batch-count")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads must be at least 1, not {self.threads}")


def read_prompt(argument: str | None, option: str | None, file: Path | None) -> str | None:
    """The prompt from the one place that gives it; None when none does. "-" reads standard input."""
    given = [value for value in (argument, option, file) if value is not None]
    if len(given) > 1:
        raise InputError("give the prompt once: as an argument, with --prompt or with --prompt-file")
    if not given:
        return None
    if file is not None:
        try:
            with file.open("rb") as stream:
                data = stream.read(LARGEST_PROMPT + 1)
        except OSError as error:
            raise InputError(f"{file}: the prompt cannot be read ({error.strerror}); check the path") from None
        return _decode(data, str(file))
    text = argument if argument is not None else option
    if text == "-":
        return _decode(sys.stdin.buffer.read(LARGEST_PROMPT + 1), "standard input")
    return text


def _decode(data: bytes, place: str) -> str:
    if len(data) > LARGEST_PROMPT:
        raise InputError(f"{place}: a prompt of more than {LARGEST_PROMPT >> 20} MB is not a prompt; shorten it")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise InputError(f"{place}: the prompt is not UTF-8 text; save it as UTF-8") from None


def parse_size(size: str | None, width: int | None, height: int | None) -> tuple[int | None, int | None]:
    """(width, height) in pixels from --size WxH or from -W and -H."""
    if size is None:
        return width, height
    if width is not None or height is not None:
        raise InputError("give either --size or --width and --height, not both")
    columns, cross, rows = size.lower().replace("×", "x").partition("x")
    if not cross or not columns.strip().isdecimal() or not rows.strip().isdecimal():
        raise InputError(f"--size {size!r} is not WIDTHxHEIGHT; write it like 512x512")
    return int(columns), int(rows)


def parse_aspect(text: str | None) -> tuple[float, float] | None:
    """(width, height) in any unit from "16:9"."""
    if text is None:
        return None
    width, colon, height = text.partition(":")
    try:
        found = float(width), float(height)
    except ValueError:
        found = (0.0, 0.0)
    if not colon or not all(0 < side < math.inf for side in found):
        raise InputError(f"--aspect {text!r} is not WIDTH:HEIGHT; write it like 16:9")
    return found


def parse_sigmas(text: str | None) -> tuple[float, ...] | None:
    """Noise levels from "1,0.7,0.3"; spaces do as well as commas. The model's schedule checks their values."""
    if text is None:
        return None
    try:
        values = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise InputError(f"--sigmas {text!r} are not numbers; write them like 1,0.7,0.3") from None
    if not values:
        raise InputError("--sigmas is empty; write it like 1,0.7,0.3")
    return values


def parse_interval(text: str | None) -> tuple[float, float] | None:
    """(start, end) from "0.1:0.8": the fractions of the steps between which guidance acts."""
    if text is None:
        return None
    start, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(start or 0.0), float(end or 1.0)
    except ValueError:
        raise InputError(f"--guidance-interval {text!r} is not START:END; write it like 0.1:0.8") from None


def parse_seeds(given: Sequence[int], batch_count: int) -> tuple[int, ...]:
    """`batch_count` consecutive seeds from each given one, each once; none given, or -1, is a random start."""
    if not 1 <= batch_count <= LARGEST_BATCH:
        raise InputError(f"--batch-count must be from 1 to {LARGEST_BATCH}, not {batch_count}")
    seeds: dict[int, None] = {}
    for start in given or (-1,):
        first = secrets.randbelow(2**32) if start == -1 else start
        if not 0 <= first <= 2**64 - batch_count:
            raise InputError(f"a seed is a whole number from 0 to 2^64 - 1 (-1: random), not {start}")
        seeds.update(dict.fromkeys(range(first, first + batch_count)))
    return tuple(seeds)
