"""What edgedit knows of model families: which classes make which graphs, and the constants that no checkpoint states.

This is data. Everything that a checkpoint's own configuration says is read from there; a table entry here fills only
what lives in the code of the family's reference pipeline.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgedit.converters.graph import Component
from edgedit.converters.layout import TINY_DECODER
from edgedit.errors import ConversionError

__all__ = ["BUILDERS", "FAMILIES", "Family", "Template", "builder", "components_of", "family_of"]

#: Checkpoint class → component of the bundle → "module:function" under converters/architectures, imported on use.
BUILDERS: Mapping[str, Mapping[str, str]] = {
    "PixArtTransformer2DModel": {"transformer": "pixart:build_transformer"},
    "SanaTransformer2DModel": {"transformer": "sana:build_transformer"},
    "AutoencoderKL": {"decoder": "autoencoder_kl:build_decoder", "encoder": "autoencoder_kl:build_encoder"},
    "AutoencoderDC": {"decoder": "autoencoder_dc:build_decoder", "encoder": "autoencoder_dc:build_encoder"},
    "AutoencoderTiny": {"decoder": "autoencoder_tiny:build_decoder", "encoder": "autoencoder_tiny:build_encoder"},
    "T5EncoderModel": {"text_encoder": "t5:build_text_encoder"},
    "UMT5EncoderModel": {"text_encoder": "t5:build_text_encoder"},
    "Gemma2Model": {"text_encoder": "gemma2:build_text_encoder"},
    "Gemma2ForCausalLM": {"text_encoder": "gemma2:build_text_encoder"},
}

#: Component of the bundle → the one that is built the same way, and the checkpoint's folder that it comes from.
TINY = {"tiny_decoder": ("decoder", TINY_DECODER)}


@dataclass(frozen=True)
class Template:
    """How a prompt becomes text for the tokenizer.

    `instruction` is put in front of the positive prompt; the transformer then sees the first token and the last
    `max_length - 1` ones.
    """

    max_length: int
    instruction: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        pipeline_classes: diffusers pipeline classes, the first being the one that documents name.
        transformer_classes: for a transformer converted alone.
        template: how its prompts are built (diffusers' `encode_prompt` of the pipeline class).
        guidance: the manifest's guidance section.
        steps, guidance_scale: what the reference pipeline uses when the user says nothing. Distilled models of the
            family are in `edgedit.converters.few_steps`.
        uses_shift_factor: whether the reference pipeline applies the autoencoder's shift_factor.
        scales_timestep: whether the reference pipeline multiplies timesteps by the transformer's timestep_scale.
        bucketed: sides in pixels of the square pictures at which its checkpoints were trained on aspect-ratio buckets.
        example: a published checkpoint.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    transformer_classes: tuple[str, ...]
    template: Template
    guidance: Mapping[str, Any]
    steps: int
    guidance_scale: float
    uses_shift_factor: bool = False
    scales_timestep: bool = False
    bucketed: tuple[int, ...] = ()
    example: str = ""


# The instruction that SANA's text encoder was trained behind (SanaPipeline.__call__, complex_human_instruction).
_SANA_INSTRUCTION = (
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions "
        "suitable for image generation. Evaluate the level of detail in the user prompt:"
    ),
    (
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and "
        "spatial relationships to create vivid and concrete scenes."
    ),
    ("- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating."),
    "Here are examples of how to transform or refine prompts:",
    (
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, "
        "sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers."
    ),
    (
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring "
        "glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus "
        "passing by towering glass skyscrapers."
    ),
    (
        "Please generate only the enhanced description for the prompt below and avoid including any "
        "additional commentary or evaluations:"
    ),
    "User Prompt: ",
)

_CFG = {"kind": "cfg"}

FAMILIES: tuple[Family, ...] = (
    Family(
        name="pixart-sigma",
        pipeline_classes=("PixArtSigmaPipeline",),
        transformer_classes=("PixArtTransformer2DModel",),
        template=Template(max_length=300),
        guidance=_CFG,
        steps=20,
        guidance_scale=4.5,
        bucketed=(256, 512, 1024, 2048),
        example="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    ),
    Family(
        name="pixart-alpha",
        pipeline_classes=("PixArtAlphaPipeline",),
        transformer_classes=("PixArtTransformer2DModel",),
        template=Template(max_length=120),
        guidance=_CFG,
        steps=20,
        guidance_scale=4.5,
        bucketed=(256, 512, 1024),
        example="PixArt-alpha/PixArt-XL-2-1024-MS",
    ),
    Family(
        name="sana",
        pipeline_classes=("SanaPipeline", "SanaPAGPipeline"),
        transformer_classes=("SanaTransformer2DModel",),
        template=Template(max_length=300, instruction=_SANA_INSTRUCTION),
        guidance=_CFG,
        steps=20,
        guidance_scale=4.5,
        scales_timestep=True,
        bucketed=(512, 1024, 2048, 4096),
        example="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    ),
    Family(
        name="sana-sprint",
        pipeline_classes=("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        transformer_classes=("SanaTransformer2DModel",),
        template=Template(max_length=300, instruction=_SANA_INSTRUCTION),
        guidance={"kind": "embedded", "scale": 0.1},
        steps=2,
        guidance_scale=4.5,
        bucketed=(1024,),
        example="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
    ),
)


def family_of(pipeline_class: str | None, transformer_class: str | None, config: Mapping[str, Any]) -> Family:
    """The family of a pipeline class, or of a transformer alone.

    Raises:
        ConversionError: neither is known; the message lists what is.
    """
    for family in FAMILIES:
        if pipeline_class in family.pipeline_classes:
            return family
    if pipeline_class is not None:
        known = ", ".join(name for family in FAMILIES for name in family.pipeline_classes)
        raise ConversionError(f"pipeline class {pipeline_class} is not supported; convert understands: {known}")
    candidates = [family for family in FAMILIES if transformer_class in family.transformer_classes]
    if not candidates:
        return Family("custom", (), (), Template(300), _CFG, steps=20, guidance_scale=4.5)
    if transformer_class == "SanaTransformer2DModel":
        return candidates[1] if config.get("guidance_embeds") else candidates[0]
    alpha = config.get("use_additional_conditions")
    return candidates[1] if alpha or (alpha is None and config.get("sample_size", 128) == 128) else candidates[0]


def builder(class_name: str, component: str) -> Callable[[Mapping[str, Any]], Component]:
    """The function that builds a component's graph from the configuration of a checkpoint class.

    Raises:
        ConversionError: the class is not known; the message lists what is.
    """
    if class_name not in BUILDERS:
        raise ConversionError(f"class {class_name} is not supported; convert understands: {', '.join(BUILDERS)}")
    like, _ = TINY.get(component, (component, ""))
    module, _, function = BUILDERS[class_name][like].partition(":")
    build = getattr(importlib.import_module(f"edgedit.converters.architectures.{module}"), function)
    return lambda config: replace(build(config), name=component)


def components_of(class_name: str, folder: str) -> list[str]:
    """The bundle's components that a network of a checkpoint makes; `folder` is its name there."""
    tiny = [name for name, (_, place) in TINY.items() if place == folder]
    return tiny or list(BUILDERS[class_name])
