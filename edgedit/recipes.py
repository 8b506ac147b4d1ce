"""A recipe: every setting of one run, checked against the model before anything is loaded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgedit.attention_scale import resolve_scale
from edgedit.errors import BundleError, InputError
from edgedit.noise import KINDS
from edgedit.sampler_names import resolve_sampler
from edgedit.schedules import Schedule, make_schedule
from edgedit.solvers import make_solver
from edgedit.step_cache import StepCache, parse_step_cache

if TYPE_CHECKING:
    from edgedit.bundle import Bundle

__all__ = ["MAX_STEPS", "Recipe"]

MAX_STEPS = 1000
DEFAULT_STRENGTH = 0.6


@dataclass(frozen=True)
class Recipe:
    """Settings of a run, complete and valid for one bundle. `width` and `height` are pixels.

    `denoise_tile` is the side, and `denoise_overlap` the least overlap, of the windows in which the picture is
    denoised, in pixels; None for the picture as a whole. `attention_scale` multiplies the scores of self-attention.
    """

    prompt: str
    negative_prompt: str
    steps: int
    width: int
    height: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    sampler: str
    sigmas: tuple[float, ...] | None
    rng: str
    strength: float | None
    schedule: Schedule
    latents_shape: tuple[int, int, int, int]
    step_cache: StepCache | None = None
    denoise_tile: int | None = None
    denoise_overlap: int | None = None
    attention_scale: float = 1.0

    @classmethod
    def resolve(
        cls,
        bundle: Bundle,
        *,
        prompt: str,
        negative_prompt: str | None = None,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str | None = None,
        sigmas: Sequence[float] | None = None,
        rng: str = "philox",
        strength: float | None = None,
        has_image: bool = False,
        has_latents: bool = False,
        step_cache: str | None = None,
        denoise_tile: int | None = None,
        denoise_overlap: int | None = None,
        attention_scale: float | str | None = None,
    ) -> Recipe:
        """Fill what is None from the manifest and check the rest.

        Raises:
            InputError: a value that the model cannot honour; the message names one that works.
            BundleError: the bundle holds single components only and draws nothing.
        """
        manifest = bundle.manifest
        space, recommended, config = manifest.latents, manifest.recommended, manifest.schedule
        if space is None or recommended is None or config is None or manifest.prompt is None:
            raise BundleError(
                f"{bundle.path.name} holds {', '.join(manifest.components)} only and draws no pictures; "
                "convert the whole pipeline folder"
            )
        if not isinstance(prompt, str):
            raise InputError(f"the prompt must be a string, not {type(prompt).__name__}")
        if has_latents and has_image:
            raise InputError("pass either latents or an image to start from, not both")
        width = _pixels("width", width if width is not None else recommended.width, space.size_multiple)
        height = _pixels("height", height if height is not None else recommended.height, space.size_multiple)
        rows, columns = height // space.scale_factor, width // space.scale_factor
        tile, overlap = _windows(denoise_tile, denoise_overlap, space.size_multiple)
        # What the network sees at once.
        seen = [side if tile is None else min(side, tile // space.scale_factor) for side in (rows, columns)]
        values = _sigmas(sigmas)
        count = steps if steps is not None or values is not None else recommended.steps
        name, spacing = resolve_sampler(sampler or recommended.sampler)
        label = name if spacing is None else f"{name} {spacing}"
        schedule = make_schedule(
            config,
            None if count is None else _steps(count),
            sigmas=values,
            image_tokens=seen[0] * seen[1] // space.patch_size**2,
            sampler=label,
        )
        make_solver(name, schedule)
        cache = parse_step_cache(step_cache)
        if cache is not None:
            cache.check(schedule.steps, name)
            if tile is not None:
                raise InputError("a step cache knows one picture, not its windows; leave it or the denoise tile out")
        if rng not in KINDS:
            raise InputError(f"unknown rng {rng!r}; choose one of: {', '.join(KINDS)}")
        return cls(
            prompt=prompt,
            negative_prompt=_negative(negative_prompt, manifest.prompt.negative_prompt, manifest.guidance),
            steps=schedule.steps,
            width=width,
            height=height,
            guidance_scale=_scale(recommended.guidance_scale if guidance_scale is None else guidance_scale),
            guidance_interval=_interval(guidance_interval),
            sampler=label,
            sigmas=values,
            rng=rng,
            strength=_strength(strength, has_image),
            schedule=schedule,
            latents_shape=(1, space.channels, rows, columns),
            step_cache=cache,
            denoise_tile=tile,
            denoise_overlap=overlap,
            attention_scale=resolve_scale(
                attention_scale, manifest, seen[1] * space.scale_factor, seen[0] * space.scale_factor
            ),
        )

    def as_dict(self, bundle: Bundle, *, seed: int, runtime: Mapping[str, str]) -> dict[str, Any]:
        """The recipe that travels in a picture."""
        from edgedit import __version__

        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": seed,
            "steps": self.steps,
            "width": self.width,
            "height": self.height,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": list(self.guidance_interval),
            "sampler": self.sampler,
            "sigmas": None if self.sigmas is None else list(self.sigmas),
            "rng": self.rng,
            "strength": self.strength,
            **self._only_if_used(),
            "model": bundle.manifest.name,
            "model_hash": bundle.model_hash,
            **runtime,
            "edgedit": __version__,
        }

    def _only_if_used(self) -> dict[str, Any]:
        used: dict[str, Any] = {} if self.step_cache is None else {"step_cache": str(self.step_cache)}
        if self.denoise_tile is not None:
            used |= {"denoise_tile": self.denoise_tile, "denoise_overlap": self.denoise_overlap}
        if self.attention_scale != 1:
            used["attention_scale"] = self.attention_scale
        return used


def _pixels(name: str, value: int, multiple: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a positive whole number of pixels, not {value!r}")
    if value % multiple:
        below, above = value // multiple * multiple, (value // multiple + 1) * multiple
        choice = f"{below} or {above}" if below else str(above)
        raise InputError(f"{name} {value} is not a multiple of {multiple}, as this model needs; use {choice}")
    return value


def _windows(tile: int | None, overlap: int | None, multiple: int) -> tuple[int | None, int | None]:
    """Side and overlap of the windows; by default they overlap by half, as far as `multiple` divides it."""
    if tile is None:
        if overlap is not None:
            raise InputError("a denoise overlap does nothing without a denoise tile; leave it out")
        return None, None
    side = _pixels("the denoise tile", tile, multiple)
    shared = side // 2 // multiple * multiple if overlap is None else overlap
    if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared < side or shared % multiple:
        raise InputError(
            f"the denoise overlap must be a multiple of {multiple} from 0 to below the tile's {side}, not {overlap!r}"
        )
    return side, shared


def _steps(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_STEPS:
        raise InputError(f"steps must be a whole number from 1 to {MAX_STEPS}, not {value!r}")
    return value


def _sigmas(values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    result = tuple(float(v) for v in values)
    if not result or not all(math.isfinite(v) and v >= 0 for v in result) or result[0] == 0:
        raise InputError("sigmas must be numbers of at least 0, from the noisiest to the cleanest")
    if any(b >= a for a, b in itertools.pairwise(result)):
        raise InputError("sigmas must fall from step to step")
    return result


def _scale(value: float) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError(f"guidance scale must be a number of at least 0, not {value!r}")
    return float(value)


def _interval(value: tuple[float, float]) -> tuple[float, float]:
    if len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
        raise InputError(f"guidance interval must be two fractions 0 <= start <= end <= 1, not {value!r}")
    return float(value[0]), float(value[1])


def _strength(value: float | None, has_image: bool) -> float | None:
    if value is not None and not has_image:
        raise InputError("strength needs an image to start from")
    if value is not None and not 0 < value <= 1:
        raise InputError(f"strength must be above 0 and at most 1, not {value!r}")
    return (DEFAULT_STRENGTH if value is None else float(value)) if has_image else None


def _negative(value: str | None, default: str, guidance: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"the negative prompt must be a string, not {type(value).__name__}")
    if value and (guidance is None or guidance.kind != "cfg"):
        raise InputError(
            "this model takes no negative prompt: it was distilled to run without classifier-free guidance"
        )
    return default if value is None else value
