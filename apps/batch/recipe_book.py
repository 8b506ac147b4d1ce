"""The recipes of jobs on one model, each set of settings resolved once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedit.apps.batch.jobs import Job, MistakeError
from edgedit.bundle import Bundle
from edgedit.errors import EdgeditError, InputError
from edgedit.guidance import Guidance
from edgedit.recipes import Recipe
from edgedit.sizes import check_size

__all__ = ["RecipeBook"]

#: Sets of settings that are remembered.
LARGEST = 4096

Settings = tuple[tuple[str, Any], ...]


class RecipeBook:
    """Resolves the settings of jobs.

    `force_size`: let `check` pass sizes that the model was not made for.
    """

    def __init__(self, bundle: Bundle, *, force_size: bool = False) -> None:
        best = bundle.manifest.recommended
        self.bundle, self._sizes = bundle, () if force_size or best is None else best.sizes
        self.guidance = Guidance.from_manifest(bundle.manifest.guidance)
        self._recipes: dict[tuple[Settings, str | None, str], Recipe] = {}
        self._good: dict[Settings, Recipe] = {}
        self._images: dict[str, str | None] = {}

    def recipe(self, spec: Mapping[str, Any]) -> Recipe:
        """The recipe of a job in the form that a ledger keeps. Raises InputError."""
        names = ("prompt", "negative_prompt", "metadata", "image", "latents")
        settings = tuple(
            (name, tuple(value) if isinstance(value, list) else value)
            for name, value in sorted(spec.items())
            if name not in names
        )
        start = next((name for name in ("image", "latents") if name in spec), "")
        return replace(self._resolve(settings, spec.get("negative_prompt"), start), prompt=spec["prompt"])

    def check(self, job: Job) -> Recipe:
        """The job's recipe, its prompt left out. Raises MistakeError that names the field at fault."""
        start = "image" if job.image is not None else "latents" if job.latents is not None else ""
        plain = not start and job.negative_prompt is None
        if plain and job.settings in self._good:
            return self._good[job.settings]
        settings = tuple(sorted(job.settings))
        try:
            recipe = self._resolve(settings, job.negative_prompt, start)
        except InputError as error:
            raise MistakeError(self._blame(settings, job.negative_prompt, start), str(error)) from None
        if self._sizes and (recipe.width, recipe.height) not in self._sizes:
            self._refuse_size(settings, recipe)
        guided = self.guidance.needs_negative(recipe.guidance_scale)
        best = self.bundle.manifest.recommended
        if (
            self.guidance.kind == "none"
            and best is not None
            and recipe.guidance_scale not in (1.0, best.guidance_scale)
        ):
            raise MistakeError("guidance_scale", "does nothing for this model, which was distilled to run without")
        if not guided and job.negative_prompt:
            raise MistakeError("negative_prompt", "does nothing at a guidance scale of 1 or less")
        if not guided and recipe.guidance_interval != (0.0, 1.0):
            raise MistakeError("guidance_interval", "does nothing without classifier-free guidance")
        if recipe.step_cache is not None and recipe.step_cache.looks:
            raise MistakeError(
                "step_cache", "first-block would make pictures of a batch depend on each other; use taylor or delta"
            )
        if job.image is not None:
            self._check_image(job.image)
        if job.latents is not None:
            _check_latents(job.latents, recipe)
        if plain and len(self._good) < LARGEST:
            self._good[job.settings] = recipe
        return recipe

    def _refuse_size(self, settings: Settings, recipe: Recipe) -> None:
        named = [name for name, _ in settings if name in ("width", "height")]
        try:
            check_size(self._sizes, recipe.width, recipe.height)
        except InputError as error:
            raise MistakeError(named[0] if len(named) == 1 else "size", str(error)) from None

    def _resolve(self, settings: Settings, negative: str | None, start: str) -> Recipe:
        # Negative prompts are many and all alike to the resolver, but for being there.
        key = (settings, negative and "-", start)
        if key not in self._recipes:
            if len(self._recipes) >= LARGEST:
                self._recipes.clear()
            values = dict(settings)
            names = (
                *("steps", "width", "height", "guidance_scale", "sampler", "sigmas", "strength", "step_cache"),
                "attention_scale",
            )
            self._recipes[key] = Recipe.resolve(
                self.bundle,
                prompt="",
                negative_prompt=negative,
                guidance_interval=values.get("guidance_interval", (0.0, 1.0)),
                rng=values.get("rng", "philox"),
                has_image=start == "image",
                has_latents=start == "latents",
                **{name: values.get(name) for name in names},
            )
        recipe = self._recipes[key]
        return recipe if negative is None else replace(recipe, negative_prompt=negative)

    def _blame(self, settings: Settings, negative: str | None, start: str) -> str:
        """The one field that the model refuses by itself, or all of them where only their combination is refused."""
        if negative:
            try:
                self._resolve((), negative, "")
            except InputError:
                return "negative_prompt"
        for name, value in settings:
            try:
                self._resolve(((name, value),), None, start if name == "strength" else "")
            except InputError:
                return name
        return ", ".join(name for name, _ in settings)

    def _check_image(self, path: str) -> None:
        """Readable as a picture, as far as its header tells; each file once."""
        if path not in self._images:
            if len(self._images) >= LARGEST:
                self._images.clear()
            self._images[path] = self._image_problem(path)
        problem = self._images[path]
        if problem is not None:
            raise MistakeError("image", problem)

    def _image_problem(self, path: str) -> str | None:
        from PIL import Image

        if "encoder" not in self.bundle.manifest.components:
            return "needs an encoder, which this bundle has not"
        try:
            with Image.open(path):
                return None
        except FileNotFoundError:
            return f"{path}: there is no such picture"
        except (EdgeditError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            return f"{path}: cannot be read as a picture ({' '.join(str(error).split())[:120]})"


def _check_latents(path: str, recipe: Recipe) -> None:
    import numpy as np

    if not Path(path).exists():
        raise MistakeError("latents", f"{path}: there is no such file")
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (OSError, ValueError, EOFError, AttributeError):
        raise MistakeError("latents", f"{path}: is not a NumPy file of numbers; save it with numpy.save") from None
    if tuple(shape) != recipe.latents_shape:
        raise MistakeError("latents", f"are {list(shape)}, not {list(recipe.latents_shape)} as the size needs")
