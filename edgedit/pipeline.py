"""Prompt → picture: encode, sample, decode.

Components are opened when they are needed and freed when memory is short.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
from PIL import Image

from edgedit import image as images
from edgedit.attention_scale import INPUT as ATTENTION_SCALE
from edgedit.bundle import Bundle
from edgedit.denoise import StepState, StoppedError, denoise
from edgedit.device import available_memory, cache_dir
from edgedit.embeddings import EmbeddingCache, PromptEmbedding, join, stack
from edgedit.errors import BundleError, InputError
from edgedit.guidance import Guidance
from edgedit.noise import Noise, NoiseBatch, make_noise
from edgedit.parts import PartedSession, read_parts
from edgedit.positions import pos_embed_table
from edgedit.recipes import Recipe
from edgedit.solvers import make_solver
from edgedit.step_cache import CachedTransformer
from edgedit.text import Tokenizer
from edgedit.tiling.component import Tiling, choose
from edgedit.tiling.component import run as run_component
from edgedit.windows import OnWindow, Windows

if TYPE_CHECKING:
    from edgedit.manifest import Latents
    from edgedit.runtimes.base import Runtime, Session
    from edgedit.tiling.schedule import Schedule

__all__ = ["DECODERS", "Pipeline", "Result", "check_decoder"]

#: What people call the decoders, and the components that they are.
DECODERS = {"full": "decoder", "tiny": "tiny_decoder"}
#: Text encoders above this size have their embeddings cached on disk.
CACHE_ENCODERS_OVER = 100 << 20
#: Latent tokens up to which guidance runs as one batch of two; above, two passes are as fast and need half the memory.
GUIDANCE_BATCH_TOKENS = 1024

OnStep = Callable[[StepState], bool | None]
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


def check_decoder(bundle: Bundle, name: str) -> None:
    """Raises InputError for a decoder that there is not, or that the bundle does not have."""
    if name not in DECODERS:
        raise InputError(f"unknown decoder {name!r}; choose one of: {', '.join(DECODERS)}")
    if name == "tiny" and DECODERS[name] not in bundle.manifest.components:
        raise InputError(f"{bundle.path.name} has no tiny decoder; make one with: edgedit distill --component decoder")


@dataclass
class Pipeline:
    """A bundle, open on one backend. Use `edgedit.load`.

    Attributes:
        low_ram: keep one component in memory at a time. None decides by the free memory when components are opened.
        use_cache: keep prompt embeddings of large text encoders on disk between runs.
        on_stage: told "load COMPONENT", "encode", "denoise 1/3", "decode 1/3" as they begin.
        decoder: "full", or "tiny" for the decoder that was distilled to be quick, where the bundle has one.
        embeddings: where embeddings of any text encoder are kept, instead of the machine's cache of large ones.
    """

    bundle: Bundle
    runtime: Runtime
    low_ram: bool | None = None
    use_cache: bool = True
    on_stage: Callable[[str], None] | None = None
    embeddings: EmbeddingCache | None = None
    decoder: str = "full"
    _sessions: dict[str, Session] = field(default_factory=dict, repr=False)
    _embeddings: dict[str, PromptEmbedding] = field(default_factory=dict, repr=False)
    _tokenizer: Tokenizer | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_decoder(self.bundle, self.decoder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free every component."""
        for component in list(self._sessions):
            self.free(component)

    def open(self, component: str) -> None:
        """Load a component now instead of when it is first needed. Raises BundleError."""
        self._session(component)

    def free(self, component: str) -> None:
        """Free one component; it is loaded again when it is needed. Nothing happens when it is not loaded."""
        session = self._sessions.pop(component, None)
        if session is not None:
            session.close()

    def _stage(self, name: str) -> None:
        if self.on_stage is not None:
            self.on_stage(name)

    def _weights_size(self, component: str) -> int:
        artefact = self.bundle.component(component).artefacts[self.runtime.name]
        return sum(self.bundle.manifest.files[path].size for path in artefact.files)

    def _one_at_a_time(self) -> bool:
        if self.low_ram is not None:
            return self.low_ram
        free = available_memory()
        total = sum(self._weights_size(name) for name in self.bundle.manifest.components)
        return free is not None and total > 0.4 * free

    def _session(self, component: str) -> Session:
        if component not in self._sessions:
            self._begin_load(component)
            self._sessions[component] = self.runtime.open(component)
        return self._sessions[component]

    def _begin_load(self, component: str) -> None:
        self.bundle.component(component)
        if self._one_at_a_time():
            self.close()
        self._stage(f"load {component}")

    def _parted(self) -> PartedSession:
        """The transformer as the parts that it is cut into; it then answers `predict` as well."""
        session = self._sessions.get("transformer")
        if not isinstance(session, PartedSession):
            plan = self._parts_plan()
            self.free("transformer")
            self._begin_load("transformer")
            open_part = partial(self.runtime.open_part, "transformer")  # type: ignore[attr-defined]
            session = PartedSession(read_parts(self.bundle.file(plan)), open_part)
            self._sessions["transformer"] = session
        return session

    def check_step_cache(self) -> None:
        """Raises InputError where this backend or this bundle has no step cache."""
        self._parts_plan()

    def _parts_plan(self) -> str:
        """Path of the plan of the transformer's parts. Raises InputError where a step cache cannot be had."""
        if not hasattr(self.runtime, "open_part"):
            raise InputError("step caches run in ONNX Runtime only; leave it out, or choose that backend and engine")
        plan = self.bundle.component("transformer").artefacts[self.runtime.name].parts
        if plan is None:
            raise InputError(
                f"{self.bundle.path.name}: its transformer is not cut between its blocks, as a step cache needs; "
                "convert the model again, or leave the step cache out"
            )
        return plan

    @property
    def latent_space(self) -> Latents:
        """The manifest's latent space. Raises BundleError when the bundle has none."""
        latents = self.bundle.manifest.latents
        if latents is None:
            raise BundleError(
                f"{self.bundle.path.name} has no autoencoder and draws no pictures; convert the whole pipeline folder"
            )
        return latents

    def encode_prompt(self, prompt: str, *, negative: bool = False) -> PromptEmbedding:
        """Encode one prompt by the bundle's recipe (template, case folding, token limit).

        Args:
            negative: encode it as a negative prompt, for which SANA's instruction prefix is left out.

        Raises:
            InputError: not a string.
            BundleError: the bundle has no text encoder or tokenizer.
        """
        if not isinstance(prompt, str):
            raise InputError(f"the prompt must be a string, not {type(prompt).__name__}")
        key = f"{int(negative)}{prompt}"
        if key not in self._embeddings:
            if len(self._embeddings) >= 256:
                self._embeddings.clear()
            self._embeddings[key] = self._encode(prompt, negative)
        return self._embeddings[key]

    def _encode(self, prompt: str, negative: bool) -> PromptEmbedding:
        recipe = self.bundle.manifest.prompt
        if recipe is None:
            raise BundleError(f"{self.bundle.path.name} has no text encoder; pass embeddings to predict() instead")
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.bundle.file(recipe.tokenizer), recipe)
        tokens = self._tokenizer.encode(prompt, negative=negative).without_padding()
        states = self._hidden_states(tokens.ids[None])
        if tokens.select is not None:
            states = states[:, tokens.select]
        return PromptEmbedding(
            hidden_states=np.ascontiguousarray(states),
            attention_mask=np.ones(states.shape[:2], np.float32),
            cut=tokens.cut,
            unknown=tuple(tokens.unknown),
        )

    def _hidden_states(self, ids: np.ndarray) -> np.ndarray:
        cache = self.embeddings
        if cache is None and self.use_cache and self._weights_size("text_encoder") >= CACHE_ENCODERS_OVER:
            cache = EmbeddingCache(cache_dir() / "embeddings")
        artefact = self.bundle.component("text_encoder").artefacts[self.runtime.name]
        identity = ",".join(self.bundle.manifest.files[path].sha256 for path in artefact.files)
        states = cache.get(identity, ids) if cache else None
        if states is None:
            session = self._session("text_encoder")
            self._stage("encode")
            states = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["hidden_states"]
            if cache:
                cache.put(identity, ids, states)
        return states

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
        inputs = self._inputs(latents, timestep, encoder_hidden_states, encoder_attention_mask, conditions)
        return self._session("transformer").run(inputs)["prediction"]

    def _inputs(
        self,
        latents: np.ndarray,
        timestep: float | np.ndarray,
        encoder_hidden_states: np.ndarray,
        encoder_attention_mask: np.ndarray | None,
        conditions: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        entry = self.bundle.component("transformer")
        latents = np.ascontiguousarray(latents, np.float32)
        if latents.ndim != 4:
            raise InputError(f"latents must be [batch, channels, height, width], not {list(latents.shape)}")
        batch, _, height, width = latents.shape
        patch = int(entry.config.get("patch_size", 1))  # type: ignore[call-overload]
        if height % patch or width % patch:
            raise InputError(f"latents of {height}×{width} do not divide into patches of {patch}×{patch}")
        states = np.ascontiguousarray(encoder_hidden_states, np.float32)
        mask = np.ones(states.shape[:2], np.float32) if encoder_attention_mask is None else encoder_attention_mask
        inputs: dict[str, np.ndarray] = {
            "latents": latents,
            "timestep": np.broadcast_to(np.asarray(timestep, np.float32), (batch,)).copy(),
            "encoder_hidden_states": states,
            "encoder_attention_mask": np.ascontiguousarray(mask, np.float32),
            **{name: np.ascontiguousarray(value, np.float32) for name, value in conditions.items()},
        }
        wanted = {spec.name for spec in entry.inputs}
        if ATTENTION_SCALE in wanted and ATTENTION_SCALE not in inputs:
            inputs[ATTENTION_SCALE] = np.ones(1, np.float32)
        if "pos_embed" in wanted and "pos_embed" not in inputs:
            positions = self.bundle.manifest.positions
            if positions is None:
                raise BundleError(f"{self.bundle.path.name}: the manifest does not say how positions are computed")
            inputs["pos_embed"] = pos_embed_table(asdict(positions), height, width)
        return inputs

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
        return self._denoise(first, prompt, negative, recipe, make_noise(rng, _seeds(seed)[0]), on_step=on_step)

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
        return self._denoise(
            first, join(prompts), negative, recipe, noise, start=start, on_step=on_step, on_window=on_window
        )

    def _denoise(
        self,
        latents: np.ndarray,
        prompt: PromptEmbedding,
        negative: PromptEmbedding | None,
        recipe: Recipe,
        noise: Noise,
        *,
        start: int = 0,
        on_step: OnStep | None = None,
        on_window: OnWindow | None = None,
    ) -> np.ndarray:
        manifest, space = self.bundle.manifest, self.latent_space
        guidance = Guidance.from_manifest(manifest.guidance)
        schedule = recipe.schedule
        solver = make_solver(schedule.sampler, schedule)
        conditions = self._conditions(recipe, guidance)
        shared: dict[str, np.ndarray] = {}
        if recipe.attention_scale != 1:
            shared[ATTENTION_SCALE] = np.array([recipe.attention_scale], np.float32)
        windows = self._windows(recipe)
        seen = latents.shape[2:] if windows is None else [min(windows.side, side) for side in latents.shape[2:]]
        together = self._guides_together(seen[0] * seen[1] // space.patch_size**2)
        cached = None
        if recipe.step_cache is not None and not recipe.step_cache.never:
            cached = CachedTransformer(self._parted(), recipe.step_cache, len(schedule) - start)
        elif isinstance(self._sessions.get("transformer"), PartedSession):
            self.free("transformer")

        def one(x: np.ndarray, t: float, states: np.ndarray, mask: np.ndarray, *branches: str) -> np.ndarray:
            extra = {k: np.repeat(v, len(x), axis=0) for k, v in conditions.items()} | shared

            def ask(part: np.ndarray) -> np.ndarray:
                inputs = self._inputs(part, t, states, mask, extra)
                out = self._session("transformer").run(inputs) if cached is None else cached.run(inputs, branches)
                return out["prediction"][:, : space.channels]

            return ask(x) if windows is None else windows.blend(ask, x, on_window)

        def predict(x: np.ndarray, t: float, guided: bool) -> tuple[np.ndarray, np.ndarray | None]:
            guided = guided and negative is not None
            if cached is not None:
                cached.next_step(("prompt", "negative") if guided else ("prompt",))
            if not guided or negative is None:
                return one(x, t, prompt.hidden_states, prompt.attention_mask, "prompt"), None
            if together and not self._one_at_a_time():
                both = one(np.concatenate([x, x]), t, *stack([prompt, negative]), "prompt", "negative")
                return both[: len(x)], both[len(x) :]
            return (
                one(x, t, prompt.hidden_states, prompt.attention_mask, "prompt"),
                one(x, t, negative.hidden_states, negative.attention_mask, "negative"),
            )

        def told(state: StepState) -> bool | None:
            assert on_step is not None
            return on_step(state if cached is None else replace(state, reused=cached.reused))

        return denoise(
            predict,
            schedule,
            solver,
            latents,
            noise,
            guidance=guidance,
            guidance_scale=recipe.guidance_scale,
            guidance_interval=recipe.guidance_interval,
            start=start,
            on_step=None if on_step is None else told,
        )

    def _guides_together(self, tokens: int) -> bool:
        """Whether guidance is one batch of two: as measured on this machine, or by the number of latent tokens."""
        found = getattr(self.runtime, "guides_together", lambda _: None)(tokens)
        return tokens <= GUIDANCE_BATCH_TOKENS if found is None else bool(found)

    def _windows(self, recipe: Recipe) -> Windows | None:
        space = self.latent_space
        if recipe.denoise_tile is None or recipe.denoise_overlap is None:
            return None
        factor = space.scale_factor
        return Windows(recipe.denoise_tile // factor, recipe.denoise_overlap // factor, space.patch_size)

    def _conditions(self, recipe: Recipe, guidance: Guidance) -> dict[str, np.ndarray]:
        conditions: dict[str, np.ndarray] = {}
        wanted = {spec.name for spec in self.bundle.component("transformer").inputs}
        if "resolution" in wanted:
            tile = recipe.denoise_tile
            height, width = (side if tile is None else min(side, tile) for side in (recipe.height, recipe.width))
            conditions["resolution"] = np.array([[height, width]], np.float32)
            conditions["aspect_ratio"] = np.array([[height / width]], np.float32)
        if "guidance" in wanted:
            conditions["guidance"] = np.array([guidance.embedded(recipe.guidance_scale)], np.float32)
        return conditions

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
        latents = self._checked_latents(latents)
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
        latents = self._checked_latents(latents)
        if len(latents) != 1:
            raise InputError(f"decode_rows takes the latents of one picture, not of {len(latents)}")
        space, tiling = self.latent_space, tiling or Tiling()
        if tiling.max_memory is not None:
            # What other components hold counts as well.
            self.close()
        component, scale, shift = DECODERS[self.decoder], space.scaling_factor, space.shift_factor
        if self.decoder == "tiny":
            scale, shift = float(self.bundle.component(component).config["scaling_factor"]), 0.0  # type: ignore[arg-type]
        scaled = (latents / np.float32(scale) + np.float32(shift)).astype(np.float32)

        def clipped(top: int, rows: np.ndarray) -> None:
            on_rows(top, np.clip(rows, -1.0, 1.0, out=rows if rows.flags.writeable else None))

        return run_component(
            self.bundle,
            self.runtime,
            component,
            scaled,
            tiling,
            clipped,
            whole=lambda: self._session(component),
            begin=lambda: self._stage(stage),
        )

    def check_tiling(self, width: int, height: int, tiling: Tiling) -> Schedule | None:
        """The schedule by which a picture of `width` × `height` pixels would be decoded now, None for whole.

        Raises as `decode` does for settings that cannot be honoured; nothing is opened.
        """
        factor = self.latent_space.scale_factor
        component = DECODERS[self.decoder]
        return choose(self.bundle, self.runtime, component, height // factor, width // factor, tiling)[1]

    def _checked_latents(self, latents: np.ndarray) -> np.ndarray:
        space = self.latent_space
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 4 or latents.shape[1] != space.channels or not latents.size:
            raise InputError(f"latents must be [batch, {space.channels}, height, width], not {list(latents.shape)}")
        if not np.isfinite(latents).all():
            raise InputError("the latents hold values that are not numbers; nothing was decoded")
        return latents

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
        space = self.latent_space
        picture = image if isinstance(image, Image.Image) else images.open_image(image)
        if max_memory is not None:
            self.close()
        rows: list[np.ndarray] = []
        run_component(
            self.bundle,
            self.runtime,
            "encoder",
            images.from_image(picture, width, height),
            Tiling(tiling, tile_size, tile_overlap, max_memory, on_tile),
            lambda _, part: rows.append(part[:, : space.channels].copy()),
            lambda: self._session("encoder"),
        )
        latents = np.concatenate(rows, axis=2)
        return (latents - np.float32(space.shift_factor)) * np.float32(space.scaling_factor)

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
            self._parted() if parted else self._session("transformer")
            self._stage(f"denoise {index + 1}/{len(seeds)}")
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
