"""The work of `generate`: open the model, check the request against it, draw, and save picture by picture."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedit.apps.cli.interrupt import Interrupt
from edgedit.apps.cli.progress import Progress
from edgedit.apps.cli.start import Start, plan_latents, save_latents
from edgedit.apps.cli.tables import megabytes
from edgedit.errors import BundleError, InputError

if TYPE_CHECKING:
    from edgedit.apps.cli.request import Request
    from edgedit.denoise import StepState
    from edgedit.pipeline import Pipeline
    from edgedit.recipes import Recipe

__all__ = ["draw"]

#: Unknown words that a warning names.
NAMED = 6
#: Characters of a cut prompt that a warning shows.
CUT_SHOWN = 120


def draw(request: Request, progress: Progress, *, verbose: bool = False) -> None:
    """Draw and save every picture of the request.

    Raises:
        EdgeditError: something the user can mend; found before a component is loaded, as far as that can be.
        KeyboardInterrupt: stopped by the user; the pictures that were finished are saved.
    """
    import edgedit
    from edgedit.apps.cli.bundles import find_bundle
    from edgedit.device import peak_memory
    from edgedit.outputs import plan_outputs

    outputs = plan_outputs(request.output, request.seeds)
    latents_out = plan_latents(request.latents_out, request.seeds)
    start = Start.read(request.image, request.latents_in)
    if request.preview is not None:
        request = replace(request, preview=plan_outputs(str(request.preview), request.seeds[:1])[0])
    with progress, Interrupt("this step" if request.denoise_tile is None else "this window") as interrupt:
        with edgedit.load(
            find_bundle(request.model or "builtin", offline=request.offline),
            request.backend,
            engine=request.engine,
            threads=request.threads,
            providers=request.providers or None,
            low_ram=request.low_ram or None,
            use_cache=request.use_cache,
            graph_cache=request.graph_cache,
            interpreter=request.interpreter,
            emulate_fp16=request.emulate_fp16,
            compute_units=request.compute_units,
            decoder=request.decoder or "full",
        ) as pipe:
            run = Run(request, pipe, progress, interrupt, start)
            pipe.on_stage = run.stage
            if verbose:
                progress.say(run.describe())
            run.warn()
            done = 0
            try:
                for run.index, (output, latents) in enumerate(zip(outputs, latents_out, strict=True)):
                    run.picture(output, latents)
                    done += 1
            except KeyboardInterrupt:
                progress.finish()
                progress.say(f"{done} of {len(outputs)} pictures finished")
                raise
        progress.finish()
        peak = peak_memory()
        progress.done({"pictures": done, "seconds": progress.seconds, "peak_memory_bytes": peak})
        if verbose:
            times = [f"{kind} {seconds:.2f} s" for kind, seconds in progress.seconds.items()]
            progress.say(", ".join(times + ([f"peak memory {megabytes(peak)}"] if peak else [])))


@dataclass
class Run:
    """One request on an open pipeline. Making it checks the request against the model and loads nothing."""

    request: Request
    pipe: Pipeline
    progress: Progress
    interrupt: Interrupt
    start: Start
    index: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        from edgedit.apps.cli.finish import make_tiling
        from edgedit.guidance import Guidance
        from edgedit.recipes import Recipe
        from edgedit.sizes import check_size, size_of_aspect

        asked = self.request
        best = self.pipe.bundle.manifest.recommended
        sizes = () if best is None else best.sizes
        if asked.aspect is not None:
            width, height = size_of_aspect(sizes, *asked.aspect)
            self.request = replace(asked, width=width, height=height)
        self.tiling = make_tiling(
            asked.vae_tiling, asked.vae_tile_size, asked.vae_tile_overlap, asked.max_memory, self.tile
        )
        request, manifest = self.request, self.pipe.bundle.manifest
        self.prompt = request.prompt or ""
        self.settings: dict[str, Any] = {
            "negative_prompt": request.negative_prompt,
            "steps": request.steps,
            "width": request.width,
            "height": request.height,
            "guidance_scale": request.guidance_scale,
            "guidance_interval": request.guidance_interval or (0.0, 1.0),
            "sampler": request.sampler,
            "sigmas": request.sigmas,
            "rng": request.rng or "philox",
            "strength": request.strength,
            "step_cache": request.step_cache,
            "denoise_tile": request.denoise_tile,
            "denoise_overlap": request.denoise_overlap,
            "attention_scale": request.attention_scale,
        }
        self.recipe: Recipe = Recipe.resolve(
            self.pipe.bundle,
            prompt=self.prompt,
            has_image=self.start.image is not None,
            has_latents=self.start.latents is not None,
            **self.settings,
        )
        seen = (self.recipe.width, self.recipe.height)
        if not request.force_size and request.denoise_tile is None:
            check_size(sizes, *seen)
        elif not request.force_size and request.denoise_tile is not None:
            width, height = (min(side, request.denoise_tile) for side in seen)
            check_size(sizes, width, height, what="the model was not made for windows of")
        guidance = Guidance.from_manifest(manifest.guidance)
        self.guided = guidance.needs_negative(self.recipe.guidance_scale)
        usual = best.guidance_scale if best is not None else 1.0
        if guidance.kind == "none" and self.recipe.guidance_scale not in (1.0, usual):
            raise InputError("--guidance does nothing for this model, which was distilled to run without; leave it out")
        if not self.guided and request.negative_is_explicit:
            raise InputError(
                "a negative prompt does nothing at a guidance of 1 or less; raise --guidance or leave it out"
            )
        if not self.guided and self.recipe.guidance_interval != (0.0, 1.0):
            raise InputError("--guidance-interval does nothing without classifier-free guidance; leave it out")
        if self.start.latents is not None and self.start.latents.shape != self.recipe.latents_shape:
            shapes = f"{list(self.start.latents.shape)}, not {list(self.recipe.latents_shape)}"
            raise InputError(
                f"the latents are {shapes} as {self.recipe.width}x{self.recipe.height} needs; check the size"
            )
        if self.recipe.step_cache is not None and not self.recipe.step_cache.never:
            self.pipe.check_step_cache()
        if self.start.image is not None:
            self.pipe.bundle.component("encoder")
        if asked.max_memory or asked.vae_tile_size or asked.vae_tile_overlap or asked.vae_tiling != "auto":
            self.pipe.check_tiling(self.recipe.width, self.recipe.height, self.tiling)
        if request.preview is not None and (manifest.latents is None or manifest.latents.preview is None):
            raise BundleError(f"{self.pipe.bundle.path.name} has no preview factors; leave --preview out")

    def describe(self) -> str:
        """The settings in one line."""
        from edgedit.runtimes.base import choose_backend

        recipe, runtime = self.recipe, self.pipe.runtime.describe()
        why = f" (auto: {choose_backend(self.pipe.bundle).reason})" if self.request.backend == "auto" else ""
        return (
            f"{self.pipe.bundle.manifest.name}: {recipe.width}x{recipe.height}, {recipe.steps} steps, "
            f"{recipe.sampler}, guidance {recipe.guidance_scale:g}, {recipe.rng} noise; "
            f"{', '.join(runtime.values())}{why}"
        )

    def warn(self) -> None:
        """Say what the user may not have meant. Encodes the prompts."""
        warn, bundle = self.progress.warn, self.pipe.bundle
        if self.request.model_hash not in (None, bundle.model_hash):
            warn(f"the picture was drawn with another model than {bundle.manifest.name}; it will look different")
        sides = [("prompt", self.prompt, False)]
        if self.guided:
            sides.append(("negative prompt", self.recipe.negative_prompt, True))
        for side, text, negative in sides:
            embedding = self.pipe.encode_prompt(text, negative=negative)
            if embedding.cut:
                words = len(embedding.cut.split())
                shown = embedding.cut if len(embedding.cut) <= CUT_SHOWN else embedding.cut[:CUT_SHOWN] + "…"
                shown = " ".join(shown.split())
                warn(f'the {side} is too long for the model; its last {words} words were cut: "{shown}"')
            if embedding.unknown:
                more = f" and {len(embedding.unknown) - NAMED} more" if len(embedding.unknown) > NAMED else ""
                warn(f"the model does not know these words of the {side}: {', '.join(embedding.unknown[:NAMED])}{more}")

    def stage(self, name: str) -> None:
        """The pipeline's `on_stage`. A picture that only needs decoding is finished even if stopping was asked for."""
        if "decode" not in name:
            self.interrupt.checkpoint()
        kind, _, what = name.partition(" ")
        if kind in ("denoise", "decode"):
            count = len(self.request.seeds)
            what = f"{self.index + 1}/{count}" if count > 1 else ""
        self.progress.stage(f"{kind} {what}".strip())

    def step(self, state: StepState) -> bool | None:
        """The pipeline's `on_step`."""
        seed = self.request.seeds[self.index]
        self.progress.step(state.step, state.steps, index=self.index, seed=seed, sigma=state.sigma)
        self.reused = (0 if state.step == 1 else self.reused) + state.reused
        if self.request.preview is not None and state.preview is not None:
            self._save_preview(self.request.preview, state.preview())
        return state.step == state.steps or not self.interrupt.requested

    def tile(self, done: int, total: int) -> bool:
        """Called after every tile of the decoder."""
        self.progress.step(done, total, index=self.index)
        return not self.interrupt.requested

    def _save_preview(self, path: Path, image: Any) -> None:
        from PIL import Image

        from edgedit.metadata import save_image

        size = (self.recipe.width, self.recipe.height)
        save_image(image.resize(size, Image.Resampling.BICUBIC), path, None)

    def picture(self, output: Path, latents_out: Path | None) -> None:
        """Draw picture `index` and save it. Raises KeyboardInterrupt when it was stopped before it was finished."""
        from edgedit.apps.cli.finish import Undecoded, decode_to_file
        from edgedit.tiling.run import TilesStoppedError

        started, seed = time.monotonic(), self.request.seeds[self.index]
        result = self.pipe.generate(
            self.prompt,
            seed=seed,
            image=self.start.image,
            latents=self.start.latents,
            on_step=self.step,
            on_window=lambda done, total: not self.interrupt.requested,
            tiling=self.tiling,
            decode=False,
            **self.settings,
        )
        if result.stopped:
            raise KeyboardInterrupt
        recipe = {**result.recipe, **self.start.facts}
        if self.tiling.mode == "fast":
            recipe["vae_tiling"] = "fast"
        shown = recipe if self.request.metadata else None
        # From here on nothing but decoding is left: should the run die, `edgedit decode` finishes it.
        kept = Undecoded(result.latents, shown, str(output), self.pipe.bundle.model_hash).save()
        try:
            decode_to_file(self.pipe, result.latents, output, shown, self.tiling, stage="decode")
        except BaseException as error:
            self.progress.finish()
            self.progress.say(f"the latents are kept; finish the picture with: edgedit decode {kept}")
            if isinstance(error, TilesStoppedError):
                raise KeyboardInterrupt from None
            raise
        kept.unlink(missing_ok=True)
        if latents_out is not None:
            save_latents(result.latents, latents_out)
        seconds = time.monotonic() - started
        self.progress.result(
            {
                "event": "picture",
                "path": str(output),
                "latents": None if latents_out is None else str(latents_out),
                "index": self.index,
                "seed": seed,
                "seconds": round(seconds, 3),
                "steps_reused": self.reused,
                "recipe": recipe,
            },
            str(output),
        )
        reused = f", blocks reused in {self.reused} steps" if self.recipe.step_cache else ""
        self.progress.say(f"seed {seed}, {seconds:.1f} s{reused}")
