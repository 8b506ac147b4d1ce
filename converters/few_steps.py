"""Published few-step models: how their checkpoints are told apart, and what they were distilled for.

This is data, as `edgedit.converters.families` is. A distilled checkpoint has the files of its teacher, so what its
model card or its authors' code says of steps, levels and guidance is here. A checkpoint that states its schedule in its
own record (`edgedit.converters.own_record`) is not looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgedit.converters.checkpoint import Checkpoint

__all__ = ["FEW_STEPS", "FewSteps", "few_steps_of"]


@dataclass(frozen=True)
class FewSteps:
    """One few-step model, or several that are run alike.

    Attributes:
        name: for reports.
        pipelines: diffusers pipeline classes that it comes in.
        scheduler: the scheduler that it comes with, (class, the options that differ from the class's defaults).
        steps: evaluations it was trained for or is published with, the usual first.
        guidance_scale: recommended; 1 where there is no classifier-free guidance.
        schedule: fields of the manifest's schedule that the scheduler's configuration does not tell.
        guidance: the manifest's guidance, None for the family's.
        source: what the checkpoint's name, in small letters, must contain (a regular expression), for models that
            differ from their teacher in nothing but the weights.
        marks: further entries that tell it: "scheduler.KEY", "transformer.KEY" or "index.KEY" (model_index.json) and
            their values.
    """

    name: str
    pipelines: tuple[str, ...]
    scheduler: tuple[str, Mapping[str, Any]]
    steps: tuple[int, ...]
    guidance_scale: float = 1.0
    schedule: Mapping[str, Any] = field(default_factory=dict)
    guidance: Mapping[str, Any] | None = None
    source: str | None = None
    marks: Mapping[str, Any] = field(default_factory=dict)


_NONE = {"kind": "none"}
_EMBEDDED = {"kind": "embedded"}
_PIXART = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
_LINEAR_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
_FLUX_SHIFT = {"use_dynamic_shifting": True, "shift": 3.0}
# The pipelines of FLUX, Z-Image and Qwen-Image hand linspace(1, 1/N, N) to their scheduler.
_UNIT = {"base_sigmas": "unit"}


def _hyper_sd3(steps: int, guidance_scale: float) -> FewSteps:
    # ByteDance/Hyper-SD, fused into the transformer with scale 0.125; its guidance depends on the steps
    return FewSteps(
        name=f"hyper-sd3-{steps}",
        pipelines=("StableDiffusion3Pipeline",),
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        steps=(steps,),
        guidance_scale=guidance_scale,
        source=rf"hyper.*sd3.*(?<!\d){steps}[-_]?step",
    )


def _hyper_flux(steps: int) -> FewSteps:
    return FewSteps(
        name=f"hyper-flux-{steps}",
        pipelines=("FluxPipeline",),
        scheduler=("FlowMatchEulerDiscreteScheduler", _FLUX_SHIFT),
        steps=(steps,),
        guidance_scale=3.5,
        schedule=_UNIT,
        guidance=_EMBEDDED,
        source=rf"hyper.*flux.*(?<!\d){steps}[-_]?step",
        marks={"transformer.guidance_embeds": True},
    )


FEW_STEPS: tuple[FewSteps, ...] = (
    # Chen et al. 2025: 2 steps, and 1 or 4 from the same weights
    FewSteps(
        name="sana-sprint",
        pipelines=("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        scheduler=("SCMScheduler", {}),
        steps=(2, 1, 4),
        guidance_scale=4.5,
    ),
    # PixArt-alpha/PixArt-LCM-XL-2-1024-MS: Chen et al., "PixArt-delta" (2024)
    FewSteps(
        name="pixart-lcm",
        pipelines=_PIXART,
        scheduler=("LCMScheduler", _LINEAR_BETAS),
        steps=(4,),
    ),
    # PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512: app/app_pixart_dmd.py of PixArt-sigma's repository
    FewSteps(
        name="pixart-dmd",
        pipelines=_PIXART,
        scheduler=("DDPMScheduler", {**_LINEAR_BETAS, "clip_sample": False}),
        steps=(1,),
        schedule={"sampler": "dmd", "timesteps": [400]},
        guidance=_NONE,
        source=r"(?<![a-z])dmd(?![a-z])",
    ),
    # Zheng et al. 2024: any model distilled by TCD comes with its scheduler
    FewSteps(
        name="tcd",
        pipelines=_PIXART,
        scheduler=("TCDScheduler", _LINEAR_BETAS),
        steps=(4,),
    ),
    # stabilityai/stable-diffusion-3.5-large-turbo
    FewSteps(
        name="sd3.5-turbo",
        pipelines=("StableDiffusion3Pipeline",),
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        steps=(4,),
        guidance=_NONE,
        source=r"3\.5.*turbo",
    ),
    _hyper_sd3(8, 5.0),
    _hyper_sd3(4, 3.0),
    _hyper_sd3(16, 7.0),
    # black-forest-labs/FLUX.1-schnell
    FewSteps(
        name="flux-schnell",
        pipelines=("FluxPipeline",),
        scheduler=("FlowMatchEulerDiscreteScheduler", {}),
        steps=(4,),
        schedule=_UNIT,
        guidance=_NONE,
        marks={"transformer.guidance_embeds": False},
    ),
    _hyper_flux(8),
    _hyper_flux(16),
    # black-forest-labs/FLUX.2-klein-4B and -9B
    FewSteps(
        name="flux2-klein",
        pipelines=("Flux2KleinPipeline", "Flux2KleinKVPipeline"),
        scheduler=("FlowMatchEulerDiscreteScheduler", _FLUX_SHIFT),
        steps=(4,),
        schedule={**_UNIT, "dynamic_shift": {"rule": "empirical"}},
        guidance=_NONE,
        marks={"index.is_distilled": True},
    ),
    # Tongyi-MAI/Z-Image-Turbo
    FewSteps(
        name="z-image-turbo",
        pipelines=("ZImagePipeline",),
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        steps=(8,),
        schedule=_UNIT,
        guidance=_NONE,
        source=r"z[-_]?image.*turbo",
    ),
    # lightx2v/Qwen-Image-Lightning, fused into the transformer: generate_with_diffusers.py of its repository
    FewSteps(
        name="qwen-image-lightning",
        pipelines=("QwenImagePipeline",),
        scheduler=(
            "FlowMatchEulerDiscreteScheduler",
            {
                "use_dynamic_shifting": True,
                "base_shift": math.log(3),
                "max_shift": math.log(3),
                "max_image_seq_len": 8192,
            },
        ),
        steps=(8, 4),
        schedule=_UNIT,
        guidance=_NONE,
        marks={"scheduler.base_shift": math.log(3), "scheduler.max_shift": math.log(3)},
    ),
)


def few_steps_of(checkpoint: Checkpoint) -> FewSteps | None:
    """The published few-step model that a checkpoint is; None for any other, and for one that states its schedule."""
    if checkpoint.own.schedule is not None or checkpoint.scheduler is None:
        return None
    transformer = checkpoint.components.get("transformer")
    places: Mapping[str, Mapping[str, Any]] = {
        "scheduler": checkpoint.scheduler.config,
        "transformer": {} if transformer is None else transformer.config,
        "index": checkpoint.model_index,
    }
    name = re.split(r"[/\\]", checkpoint.source.rstrip("/\\"))[-1].lower()
    for entry in FEW_STEPS:
        if checkpoint.pipeline_class not in entry.pipelines or checkpoint.scheduler.class_name != entry.scheduler[0]:
            continue
        if entry.source is not None and not re.search(entry.source, name):
            continue
        told = (mark.split(".", 1) for mark in entry.marks)
        if all(places[place].get(key) == entry.marks[f"{place}.{key}"] for place, key in told):
            return entry
    return None
