"""Recipes read back from pictures, to draw them again (`generate -C`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedit.apps.cli.start import file_hash
from edgedit.errors import BundleError, InputError

if TYPE_CHECKING:
    from edgedit.apps.cli.request import Request

__all__ = ["Replay", "load_replay"]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _are_numbers(value)


def _is_file(value: object) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(key)) for key in ("path", "sha256"))


#: Keys of a recipe that a replay uses: what their values must be, in words and as a test.
_KINDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "prompt": ("a text", _is_text),
    "negative_prompt": ("a text", _is_text),
    "seed": ("a whole number", _is_whole),
    "steps": ("a whole number", _is_whole),
    "width": ("a whole number", _is_whole),
    "height": ("a whole number", _is_whole),
    "guidance_scale": ("a number", _is_number),
    "guidance_interval": ("two numbers", _is_interval),
    "sampler": ("a text", _is_text),
    "sigmas": ("a list of numbers", _are_numbers),
    "rng": ("a text", _is_text),
    "strength": ("a number", _is_number),
    "step_cache": ("a text", _is_text),
    "decoder": ("a text", _is_text),
    "denoise_tile": ("a whole number", _is_whole),
    "denoise_overlap": ("a whole number", _is_whole),
    "attention_scale": ("a number", _is_number),
    "image": ("a path with its hash", _is_file),
    "latents": ("a path with its hash", _is_file),
    "model": ("a text", _is_text),
    "model_hash": ("a text", _is_text),
}
#: Those that are settings of a request of the same name.
_SETTINGS = (
    *("prompt", "negative_prompt", "steps", "width", "height", "guidance_scale", "guidance_interval"),
    *("sampler", "sigmas", "rng", "strength", "step_cache", "denoise_tile", "denoise_overlap", "decoder", "model_hash"),
)


@dataclass(frozen=True)
class Replay:
    """The recipe of the picture at `path`; its values are of the right types, and those that it lacks are absent."""

    path: Path
    recipe: Mapping[str, Any]

    @property
    def seeds(self) -> list[int]:
        """The picture's seed, none when the recipe does not say."""
        return [self.recipe["seed"]] if "seed" in self.recipe else []

    def complete(self, request: Request) -> Request:
        """`request` with what it leaves open taken from this recipe; a flag that was given always wins.

        Steps and sigmas say the same thing, and so do the two kinds of start: giving one replaces the recipe's other.
        Raises EdgeditError when the model, or a file that the picture was drawn from, is not there any more.
        """
        changes = {
            name: self.recipe[name] for name in _SETTINGS if name in self.recipe and getattr(request, name) is None
        }
        for name in ("guidance_interval", "sigmas"):
            if name in changes:
                changes[name] = tuple(map(float, changes[name]))
        if request.denoise_tile is not None:
            changes.pop("denoise_overlap", None)
        if request.steps is not None:
            changes.pop("sigmas", None)
        if request.sigmas is not None or "sigmas" in changes:
            changes.pop("steps", None)
        if request.latents_in is not None:
            changes.pop("strength", None)
        elif request.image is None:
            changes |= {"image": self._file("image", "--image"), "latents_in": self._file("latents", "--latents-in")}
        if request.attention_scale is None and request.aspect is None and not _resized(request):
            # A recipe that names no scale was drawn with that of training.
            changes["attention_scale"] = str(self.recipe.get("attention_scale", 1.0))
        if request.model is None:
            changes["model"] = self.find_model()
        if request.aspect is not None:
            changes = {name: value for name, value in changes.items() if name not in ("width", "height")}
        elif {"width", "height"} <= set(changes):
            # The picture was drawn at this size: whoever did has said that it may be.
            changes["force_size"] = True
        if not request.prompt and self.recipe.get("prompt") == "":
            changes["allow_empty"] = True
        return replace(request, **changes)

    def find_model(self) -> str:
        """The model that drew the picture: builtin or a bundle at hand with its hash, of its name if there are more."""
        from edgedit.apps.cli.bundles import bundles_at_hand, open_local

        wanted = self.recipe.get("model_hash")
        if wanted is None:
            return "builtin"
        found = []
        for place in ["builtin", *map(str, bundles_at_hand())]:
            try:
                bundle = open_local(place)
            except BundleError:
                continue
            if bundle.model_hash == wanted:
                if bundle.manifest.name == self.recipe.get("model"):
                    return place
                found.append(place)
        if found:
            return found[0]
        raise BundleError(
            f"{self.path}: drawn with {self.recipe.get('model')!r} (hash {wanted[:10]}), which is not at hand; "
            "say which model to use with -m"
        )

    def _file(self, key: str, flag: str) -> Path | None:
        """A file that the picture was drawn from, checked to be the same as then."""
        entry = self.recipe.get(key)
        if entry is None:
            return None
        path = Path(entry["path"])
        if not path.is_file():
            raise InputError(f"{self.path}: was drawn from {path}, which is not there; pass {flag}")
        if file_hash(path) != entry["sha256"]:
            raise InputError(f"{self.path}: was drawn from {path}, which has changed since; pass {flag} to use it now")
        return path


def _resized(request: Request) -> bool:
    """Whether another size is asked for than that of the picture that is drawn again."""
    return any(value is not None for value in (request.width, request.height, request.denoise_tile))


def load_replay(path: Path) -> Replay:
    """The recipe in a picture. Raises InputError when there is none or a value in it has a wrong type."""
    from edgedit.metadata import read_recipe

    recipe = {key: value for key, value in read_recipe(path).items() if value is not None}
    for key, (kind, accept) in _KINDS.items():
        if key in recipe and not accept(recipe[key]):
            raise InputError(f"{path}: the recipe's {key} is not {kind}; it was not written by edgedit")
    return Replay(path, recipe)
