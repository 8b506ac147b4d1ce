"""Prompt → picture: encode, sample, decode.

Components are opened when they are needed and freed when memory is short.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
from PIL import Image

from edgedit import image as images
from edgedit.autoencoder import Autoencoder
from edgedit.bundle import Bundle
from edgedit.components import Components
from edgedit.denoise import StepState, StoppedError
from edgedit.embeddings import EmbeddingCache, PromptEmbedding, join
from edgedit.errors import InputError
from edgedit.guidance import Guidance
from edgedit.noise import NoiseBatch, make_noise
from edgedit.prompt_encoder import PromptEncoder
from edgedit.recipes import Recipe
from edgedit.tiling.component import Tiling
from edgedit.transformer import OnStep, Transformer
from edgedit.windows import OnWindow

if TYPE_CHECKING:
    from edgedit.manifest import Latents
    from edgedit.runtimes.base import Runtime
    from edgedit.tiling.schedule import Schedule

__all__ = ["Pipeline", "Result"]

OnTile = Callable[[int, int], bool | None]


@dataclass(frozen=True)
class Result:
    """What `Pipeline.generate` returns.

    Attributes:
        images: finished pictures, one a seed.
        latents: float32 [n, C, H, W], as diffusers returns them with output_type="latent".
        recipes: everything that is needed to draw each picture again.
        stopped: True when the step callback stopped the run; only the pictures finished before are here.
    """

    images: list[Image.Image]
    latents: np.ndarray
    recipes: list[dict[str, Any]]
    stopped: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """Recipe of the first picture."""
        return self.recipes[0]


class Pipeline:
    """A bundle, open on one backend. Use `edgedit.load`."""

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        *,
        low_ram: bool | None = None,
        use_cache: bool = True,
        on_stage: Callable[[str], None] | None = None,
        embeddings: EmbeddingCache | None = None,
        decoder: str = "full",
    ) -> None:
        """`embeddings` is where those of any text encoder are kept, instead of the machine's cache of large ones.

        Args:
            low_ram: keep one component in memory at a time. None decides by the free memory when components are opened.
            use_cache: keep prompt embeddings of large text encoders on disk between runs.
            on_stage: told "load COMPONENT", "encode", "denoise 1/3", "decode 1/3" as they begin.
            decoder: "full", or "tiny" for the decoder that was distilled to be quick, where the bundle has one.

        Raises InputError for a decoder that the bundle does not have.
        """
        self.components = Components(bundle, runtime, low_ram, on_stage)
        self.prompt_encoder = PromptEncoder(self.components, use_cache, embeddings)
        self.transformer = Transformer(self.components)
        self.autoencoder = Autoencoder(self.components, decoder)

    @property
    def bundle(self) -> Bundle:
        """The bundle that is open."""
        return self.components.bundle

    @property
    def runtime(self) -> Runtime:
        """The backend that it is open on."""
        return self.components.runtime

    @property
    def on_stage(self) -> Callable[[str], None] | None:
        """Told what begins."""
        return self.components.on_stage

    @on_stage.setter
    def on_stage(self, told: Callable[[str], None] | None) -> None:
        self.components.on_stage = told

    @property
    def decoder(self) -> str:
        """ "full" or "tiny"."""
        return self.autoencoder.decoder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free every component."""
        self.components.close()

    def open(self, component: str) -> None:
        """Load a component now instead of when it is first needed. Raises BundleError."""
        self.components.session(component)

    def free(self, component: str) -> None:
        """Free one component; it is loaded again when it is needed. Nothing happens when it is not loaded."""
        self.components.free(component)

    def check_step_cache(self) -> None:
        """Raises InputError where this backend or this bundle has no step cache."""
        self.components.parts_plan()

    @property
    def latent_space(self) -> Latents:
        """The manifest's latent space. Raises BundleError when the bundle has none."""
        return self.components.latent_space

    def encode_prompt(self, prompt: str, *, negative: bool = False) -> PromptEmbedding:
        """Encode one prompt by the bundle's recipe (template, case folding, token limit).

        Args:
            negative: encode it as a negative prompt, for which SANA's instruction prefix is left out.

        Raises:
            InputError: not a string.
            BundleError: the bundle has no text encoder or tokenizer.
        """
        return self.prompt_encoder(prompt, negative=negative)

    def predict(
        self,
        *,
        latents: np.ndarray,
        timestep: float | np.ndarray,
        encoder_hidden_states: np.ndarray,
        encoder_attention_mask: np.ndarray | None = None,
        **conditions: np.ndarray,
    ) -> np.ndarray:
        """One raw call of the transformer: all output channels, nothing scaled, nothing guided.

        Args:
            latents: float32 [B, C, H, W].
            timestep: a number, or float32 [B].
            encoder_hidden_states: float32 [B, L, D].
            encoder_attention_mask: float32 [B, L], 1 keep, 0 discard; all ones by default.
            conditions: further inputs that the component's manifest entry lists (`resolution`, `aspect_ratio`,
                `guidance`); `pos_embed` is computed from the manifest when it is not given, and `attention_scale`,
                float32 [1], is 1 then.

        Raises:
            InputError: shapes that do not fit together, or a condition that this transformer does not take.
        """
        return self.transformer.predict(latents, timestep, encoder_hidden_states, encoder_attention_mask, conditions)

    def denoise(
        self,
        latents: np.ndarray,
        prompt: PromptEmbedding,
        negative: PromptEmbedding | None = None,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
        rng: str = "philox",
        step_cache: str | None = None,
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """Unit noise [1, C, H, W] and encoded prompts → latents as `generate` returns them.

        What is left out comes from the manifest's recommendation.

        Args:
            negative: the encoded negative prompt; by default that of the bundle, when guidance needs one.
            seed: for the noise that some samplers draw on the way.

        Raises:
            InputError: a setting that this model cannot honour.
            StoppedError: `on_step` returned False.
        """
        space = self.latent_space
        if latents.ndim != 4:
            raise InputError(f"latents must be [1, {space.channels}, height, width], not {list(latents.shape)}")
        recipe = Recipe.resolve(
            self.bundle,
            prompt="",
            negative_prompt=None,
            steps=steps,
            width=latents.shape[3] * space.scale_factor,
            height=latents.shape[2] * space.scale_factor,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            sampler=sampler,
            sigmas=sigmas,
            rng=rng,
            strength=None,
            has_image=False,
            has_latents=True,
            step_cache=step_cache,
        )
        start = self._start_latents(latents, recipe)
        guidance = Guidance.from_manifest(self.bundle.manifest.guidance)
        if negative is None and guidance.needs_negative(recipe.guidance_scale):
            negative = self.encode_prompt(recipe.negative_prompt, negative=True)
        first = start * np.float32(recipe.schedule.init_noise_scale)
        return self.transformer.denoise(
            first, prompt, negative, recipe, make_noise(rng, _seeds(seed)[0]), on_step=on_step
        )

    def denoise_together(
        self,
        recipe: Recipe,
        prompts: Sequence[PromptEmbedding],
        negatives: Sequence[PromptEmbedding] | None,
        seeds: Sequence[int],
        *,
        latents: np.ndarray | None = None,
        references: np.ndarray | None = None,
        on_step: OnStep | None = None,
        on_window: OnWindow | None = None,
    ) -> np.ndarray:
        """Denoise several pictures of one recipe, prompts and seeds aside, in one batch.

        Each row of the result equals what `generate` computes for that picture alone, to the bit wherever the backend
        computes the rows of a batch alike.

        Args:
            prompts: one embedding a picture, all of one length: padding would change a picture's rounding.
            negatives: the same for the negative prompts; None for a run without guidance.
            seeds: one a picture.
            latents: unit noise to start from, float32 [B, C, H, W]; by default it is drawn from the seeds.
            references: encoded pictures to start from, float32 [B, C, H, W].

        Returns: latents, float32 [B, C, H, W].

        Raises:
            InputError: embeddings of different lengths, or not one of each for every seed.
            StoppedError: `on_step` or `on_window` returned False.
        """
        for group in (prompts, negatives if negatives is not None else prompts):
            if len(group) != len(seeds) or len({item.hidden_states.shape for item in group}) != 1:
                raise InputError("pictures drawn together need one seed and one embedding each, of one length")
        if recipe.step_cache is not None and recipe.step_cache.looks and len(seeds) > 1:
            raise InputError(
                f"with the step cache {recipe.step_cache} a picture would depend on the others of its batch; "
                "draw one at a time, or use taylor or delta"
            )
        noises = [make_noise(recipe.rng, seed) for seed in seeds]
        noise = noises[0] if len(noises) == 1 else NoiseBatch(noises)
        first = noise.normal((len(seeds), *recipe.latents_shape[1:])) if latents is None else latents
        start = 0
        if references is not None:
            start = recipe.schedule.start_at(recipe.strength or 1.0)
            first = recipe.schedule.add_noise(references, first, start)
        else:
            first = first * np.float32(recipe.schedule.init_noise_scale)
        negative = None if negatives is None else join(negatives)
        return self.transformer.denoise(
            first, join(prompts), negative, recipe, noise, start=start, on_step=on_step, on_window=on_window
        )

    @overload
    def decode(
        self,
        latents: np.ndarray,
        *,
        output: Literal["pil"] = "pil",
        tiling: str = "auto",
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        max_memory: int | str | None = None,
        on_tile: OnTile | None = None,
    ) -> list[Image.Image]: ...
    @overload
    def decode(
        self,
        latents: np.ndarray,
        *,
        output: Literal["array"],
        tiling: str = "auto",
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        max_memory: int | str | None = None,
        on_tile: OnTile | None = None,
    ) -> np.ndarray: ...
    def decode(
        self,
        latents: np.ndarray,
        *,
        output: Literal["pil", "array"] = "pil",
        tiling: str = "auto",
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        max_memory: int | str | None = None,
        on_tile: OnTile | None = None,
    ) -> list[Image.Image] | np.ndarray:
        """Decode latents [B, C, H, W] (as diffusers returns them) to pictures, or to float32 NCHW in [-1, 1].

        `tiling`, `tile_size`, `tile_overlap`, `max_memory`, `on_tile`: see `edgedit.tiling.component.Tiling`.

        Raises:
            InputError: latents of another shape or not finite; a budget that is too small, with the least that works.
            TilesStoppedError: `on_tile` returned False.
        """
        if output not in ("pil", "array"):
            raise InputError(f"output must be 'pil' or 'array', not {output!r}")
        settings = Tiling(tiling, tile_size, tile_overlap, max_memory, on_tile)
        latents = self.autoencoder.checked_latents(latents)
        pictures: list[Any] = []
        for number, one in enumerate(latents, 1):
            collected = images.RowCollector(as_pixels=output == "pil")
            self.decode_rows(one[None], collected, settings, stage=f"decode {number}/{len(latents)}")
            pictures.append(collected.result())
        return np.concatenate(pictures) if output == "array" else pictures

    def decode_rows(
        self,
        latents: np.ndarray,
        on_rows: Callable[[int, np.ndarray], None],
        tiling: Tiling | None = None,
        *,
        stage: str = "decode",
    ) -> Schedule | None:
        """Decode one picture's latents [1, C, H, W] and hand over its rows as they come.

        `on_rows` is called from the top to the bottom with the number of the first row and float32 [1, 3, rows, width]
        in [-1, 1]. Returns the schedule of the tiles, None when the picture was decoded whole. Raises as `decode`.
        `stage` is what `on_stage` is told once the decoder is open.
        """
        return self.autoencoder.decode_rows(latents, on_rows, tiling, stage=stage)

    def check_tiling(self, width: int, height: int, tiling: Tiling) -> Schedule | None:
        """The schedule by which a picture of `width` × `height` pixels would be decoded now, None for whole.

        Raises as `decode` does for settings that cannot be honoured; nothing is opened.
        """
        return self.autoencoder.check_tiling(width, height, tiling)

    def encode_image(
        self,
        image: Image.Image | str | Path,
        *,
        width: int,
        height: int,
        tiling: str = "auto",
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        max_memory: int | str | None = None,
        on_tile: OnTile | None = None,
    ) -> np.ndarray:
        """Picture → latents [1, C, H, W] in the transformer's space (the posterior's mean, where there is one).

        The settings of the tiles are those of `decode`.
        """
        picture = image if isinstance(image, Image.Image) else images.open_image(image)
        settings = Tiling(tiling, tile_size, tile_overlap, max_memory, on_tile)
        return self.autoencoder.encode(picture, width, height, settings)

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str | None = None,
        sigmas: Sequence[float] | None = None,
        rng: str = "philox",
        latents: np.ndarray | None = None,
        image: Image.Image | str | Path | None = None,
        strength: float | None = None,
        step_cache: str | None = None,
        denoise_tile: int | None = None,
        denoise_overlap: int | None = None,
        attention_scale: float | str | None = None,
        tiling: Tiling | None = None,
        decode: bool = True,
        on_step: OnStep | None = None,
        on_window: OnWindow | None = None,
    ) -> Result:
        """Draw `prompt` once a seed. What is left out comes from the manifest's recommendation.

        Args:
            seed: one or several; None draws a random one, which the recipe tells. Pictures do not depend on what else
                is in the run.
            latents: starting noise [1, C, H, W] of unit variance, as diffusers takes it; `seed` then only feeds noise
                drawn later.
            image, strength: start from a picture, `strength` (0, 1] of the way back to noise (0.6 by default).
            rng: "philox", or "torch" for the noise of torch.manual_seed on a CPU.
            step_cache: a policy of `edgedit.step_cache` by which steps leave blocks out, as "taylor:3"; None or "off"
                computes every step.
            denoise_tile: side in pixels of overlapping windows in which a picture larger than the model draws is
                denoised (`edgedit.windows`); the prompt speaks to every window.
            denoise_overlap: least pixels by which they overlap, half of the side by default.
            attention_scale: what the scores of self-attention are multiplied by; "entropy" (`edgedit.attention_scale`),
                the default where the model can, is 1 at the sizes that it was trained at.
            tiling: how the picture is decoded; by default whole where that fits the free memory, else in exact tiles.
                Its memory limit holds for encoding `image` too.
            decode: False returns latents and no pictures.
            on_step: called after each network evaluation; returning False stops the run.
            on_window: the same after each window of `denoise_tile`, with (windows done, windows in all).

        Raises:
            InputError: a setting that this model cannot honour, named.
        """
        recipe = Recipe.resolve(
            self.bundle,
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            width=width,
            height=height,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            sampler=sampler,
            sigmas=sigmas,
            rng=rng,
            strength=strength,
            has_image=image is not None,
            has_latents=latents is not None,
            step_cache=step_cache,
            denoise_tile=denoise_tile,
            denoise_overlap=denoise_overlap,
            attention_scale=attention_scale,
        )
        seeds = _seeds(seed)
        start_latents = None if latents is None else self._start_latents(latents, recipe)
        guided = Guidance.from_manifest(self.bundle.manifest.guidance).needs_negative(recipe.guidance_scale)
        positive = self.encode_prompt(prompt)
        negative = self.encode_prompt(recipe.negative_prompt, negative=True) if guided else None
        reference = None
        if image is not None:
            reference = self.encode_image(
                image,
                width=recipe.width,
                height=recipe.height,
                max_memory=None if tiling is None else tiling.max_memory,
            )

        finished: list[np.ndarray] = []
        stopped = False
        parted = recipe.step_cache is not None and not recipe.step_cache.never
        for index, value in enumerate(seeds):
            self.components.parted_transformer() if parted else self.components.session("transformer")
            self.components.stage(f"denoise {index + 1}/{len(seeds)}")
            callback = None if on_step is None else partial(_with_picture, on_step, self._preview, index, value)
            try:
                finished.append(
                    self.denoise_together(
                        recipe,
                        [positive],
                        None if negative is None else [negative],
                        [value],
                        latents=start_latents,
                        references=reference,
                        on_step=callback,
                        on_window=on_window,
                    )
                )
            except StoppedError:
                stopped = True
                break
        pictures: list[Image.Image] = []
        for index, result in enumerate(finished if decode else ()):
            collected = images.RowCollector(as_pixels=True)
            self.decode_rows(result, collected, tiling, stage=f"decode {index + 1}/{len(finished)}")
            pictures.append(collected.result())  # type: ignore[arg-type]
        description = {**self.runtime.describe(), **({"decoder": "tiny"} if self.decoder == "tiny" else {})}
        return Result(
            images=pictures,
            latents=np.concatenate(finished) if finished else np.zeros((0, *recipe.latents_shape[1:]), np.float32),
            recipes=[recipe.as_dict(self.bundle, seed=value, runtime=description) for value in seeds[: len(finished)]],
            stopped=stopped,
        )

    def _preview(self, x0: np.ndarray) -> Image.Image | None:
        preview = self.latent_space.preview
        if preview is None:
            return None
        return images.latent_preview(x0, np.array(preview.factors), np.array(preview.bias))

    @staticmethod
    def _start_latents(latents: np.ndarray, recipe: Recipe) -> np.ndarray:
        latents = np.asarray(latents, np.float32)
        if latents.shape != recipe.latents_shape:
            raise InputError(
                f"latents of shape {list(latents.shape)} do not fit {recipe.width}×{recipe.height}; "
                f"expected {list(recipe.latents_shape)}"
            )
        if not np.isfinite(latents).all():
            raise InputError("the latents hold values that are not numbers")
        return latents


def _with_picture(
    on_step: OnStep, preview: Callable[[np.ndarray], Image.Image | None], index: int, seed: int, state: StepState
) -> bool | None:
    return on_step(replace(state, index=index, seed=seed, preview=partial(preview, state.x0)))


def _seeds(seed: int | Sequence[int] | None) -> list[int]:
    if seed is None:
        return [secrets.randbelow(2**32)]
    seeds = [seed] if isinstance(seed, int | np.integer) else list(seed)
    if not seeds:
        raise InputError("no seed given; leave `seed` out for a random one")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**64:
            raise InputError(f"a seed is a whole number from 0 to 2^64 - 1, not {value!r}")
    return [int(value) for value in seeds]
