"""The transformer of an open bundle: what it is given, under guidance, in windows, behind a step cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgedit.attention_scale import INPUT as ATTENTION_SCALE
from edgedit.components import Components
from edgedit.denoise import StepState, denoise
from edgedit.embeddings import PromptEmbedding, stack
from edgedit.errors import BundleError, InputError
from edgedit.guidance import Guidance
from edgedit.noise import Noise
from edgedit.positions import pos_embed_table
from edgedit.recipes import Recipe
from edgedit.solvers import make_solver
from edgedit.step_cache import CachedTransformer
from edgedit.windows import OnWindow, Windows

if TYPE_CHECKING:
    pass

__all__ = ["OnStep", "Transformer"]

#: Latent tokens up to which guidance runs as one batch of two; above, two passes are as fast and need half the memory.
GUIDANCE_BATCH_TOKENS = 1024

OnStep = Callable[[StepState], bool | None]


@dataclass
class Transformer:
    """Calls of the transformer, one at a time or along a schedule."""

    components: Components

    def predict(
        self,
        latents: np.ndarray,
        timestep: float | np.ndarray,
        encoder_hidden_states: np.ndarray,
        encoder_attention_mask: np.ndarray | None,
        conditions: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        """See `Pipeline.predict`."""
        inputs = self._inputs(latents, timestep, encoder_hidden_states, encoder_attention_mask, conditions)
        return self.components.session("transformer").run(inputs)["prediction"]

    def _inputs(
        self,
        latents: np.ndarray,
        timestep: float | np.ndarray,
        encoder_hidden_states: np.ndarray,
        encoder_attention_mask: np.ndarray | None,
        conditions: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        entry = self.components.bundle.component("transformer")
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
            positions = self.components.bundle.manifest.positions
            if positions is None:
                raise BundleError(
                    f"{self.components.bundle.path.name}: the manifest does not say how positions are computed"
                )
            inputs["pos_embed"] = pos_embed_table(asdict(positions), height, width)
        return inputs

    def denoise(
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
        manifest, space = self.components.bundle.manifest, self.components.latent_space
        guidance = Guidance.from_manifest(manifest.guidance)
        schedule = recipe.schedule
        solver = make_solver(schedule.sampler, schedule)
        conditions = self._conditions(recipe, guidance)
        shared: dict[str, np.ndarray] = {}
        if recipe.attention_scale != 1:
            shared[ATTENTION_SCALE] = np.array([recipe.attention_scale], np.float32)
        windows = self._windows(recipe)
        seen = latents.shape[2:] if windows is None else [min(windows.side, side) for side in latents.shape[2:]]
        together = self.guides_together(seen[0] * seen[1] // space.patch_size**2)
        cached = None
        if recipe.step_cache is not None and not recipe.step_cache.never:
            cached = CachedTransformer(self.components.parted_transformer(), recipe.step_cache, len(schedule) - start)
        else:
            self.components.whole_transformer()

        def one(x: np.ndarray, t: float, states: np.ndarray, mask: np.ndarray, *branches: str) -> np.ndarray:
            extra = {k: np.repeat(v, len(x), axis=0) for k, v in conditions.items()} | shared

            def ask(part: np.ndarray) -> np.ndarray:
                inputs = self._inputs(part, t, states, mask, extra)
                if cached is None:
                    out = self.components.session("transformer").run(inputs)
                else:
                    out = cached.run(inputs, branches)
                return out["prediction"][:, : space.channels]

            return ask(x) if windows is None else windows.blend(ask, x, on_window)

        def predict(x: np.ndarray, t: float, guided: bool) -> tuple[np.ndarray, np.ndarray | None]:
            guided = guided and negative is not None
            if cached is not None:
                cached.next_step(("prompt", "negative") if guided else ("prompt",))
            if not guided or negative is None:
                return one(x, t, prompt.hidden_states, prompt.attention_mask, "prompt"), None
            if together and not self.components.one_at_a_time():
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

    def guides_together(self, tokens: int) -> bool:
        """Whether guidance is one batch of two: as measured on this machine, or by the number of latent tokens."""
        found = getattr(self.components.runtime, "guides_together", lambda _: None)(tokens)
        return tokens <= GUIDANCE_BATCH_TOKENS if found is None else bool(found)

    def _windows(self, recipe: Recipe) -> Windows | None:
        space = self.components.latent_space
        if recipe.denoise_tile is None or recipe.denoise_overlap is None:
            return None
        factor = space.scale_factor
        return Windows(recipe.denoise_tile // factor, recipe.denoise_overlap // factor, space.patch_size)

    def _conditions(self, recipe: Recipe, guidance: Guidance) -> dict[str, np.ndarray]:
        conditions: dict[str, np.ndarray] = {}
        wanted = {spec.name for spec in self.components.bundle.component("transformer").inputs}
        if "resolution" in wanted:
            tile = recipe.denoise_tile
            height, width = (side if tile is None else min(side, tile) for side in (recipe.height, recipe.width))
            conditions["resolution"] = np.array([[height, width]], np.float32)
            conditions["aspect_ratio"] = np.array([[height / width]], np.float32)
        if "guidance" in wanted:
            conditions["guidance"] = np.array([guidance.embedded(recipe.guidance_scale)], np.float32)
        return conditions
