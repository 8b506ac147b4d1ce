"""The manifest of a bundle as typed, frozen records. `manifest.schema.json` is the same contract for other languages.

A reader ignores keys that it does not know; what it must know is required, with null where a model has no such thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "FORMAT_VERSION",
    "Artefact",
    "Component",
    "Conditioning",
    "Exported",
    "FileEntry",
    "Function",
    "FusedGraph",
    "Guidance",
    "Latents",
    "Manifest",
    "Parity",
    "Positions",
    "Preview",
    "Prompt",
    "PromptSide",
    "Provenance",
    "Recommended",
    "Select",
    "TensorSpec",
]

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a graph. A shape holds sizes (0 or more) and names of sizes that may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Parity:
    """How far an artefact is from `against`. `psnr_db` is None when the two are equal."""

    against: str
    cosine: float
    psnr_db: float | None
    max_abs: float
    relative_l2: float


@dataclass(frozen=True, slots=True)
class FusedGraph:
    """A second graph over the same weights, for these ONNX Runtime execution `providers` (`for` in the manifest)."""

    path: str
    providers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Function:
    """A form of a component for fixed sizes: what each named size of its inputs and outputs must be (`length`, the text
    tokens, at most), and the name to ask the graph for, None where it has only this one."""

    name: str | None
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Exported:
    """A component as an `.mlxfn` file: one function for each of `sizes`, which give every named size of the inputs."""

    path: str
    sizes: tuple[Mapping[str, int], ...]


@dataclass(frozen=True, slots=True)
class Artefact:
    """What one backend loads: `graph` is a file or a folder (an .mlpackage), `files` everything that it needs.

    `functions` are the sizes that it was made for; empty for a graph that takes any.
    `tiles` is the plan (JSON) by which a picture's tiles are computed, None where the component only runs whole.
    `chunks` are the Core ML packages that run one after the other, `graph` first; empty where there is one only.
    `parts` is the plan (JSON) of the graphs that a transformer is cut into between its blocks, None where it is not.
    """

    precision: str
    graph: str
    fused_graph: FusedGraph | None
    files: tuple[str, ...]
    parity: Parity | None
    functions: tuple[Function, ...] = ()
    tiles: str | None = None
    parts: str | None = None
    exported: Exported | None = None
    chunks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Component:
    """One network of the model. `config` is the part of the checkpoint's configuration that is needed to run it."""

    architecture: str
    config: Mapping[str, object]
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    artefacts: Mapping[str, Artefact]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 (lower-case hexadecimal) of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Guidance:
    """How the guidance scale acts. `kind` says which fields of `options`, the whole section, count."""

    kind: str
    options: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Preview:
    """A linear map from latents to RGB in [-1, 1]: `factors` [channels][3], `bias` [3]."""

    factors: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Latents:
    """The latent space: decoder input = latents / scaling_factor + shift_factor; a side is pixels / scale_factor.

    Width and height in pixels must be multiples of `size_multiple`.
    """

    channels: int
    scale_factor: int
    patch_size: int
    size_multiple: int
    scaling_factor: float
    shift_factor: float
    preview: Preview | None


@dataclass(frozen=True, slots=True)
class Positions:
    """The table of positions that the transformer takes as an input, as diffusers' `get_2d_sincos_pos_embed`: `dim`
    values a token, coordinates i / (side / base_size) / interpolation_scale, one token for patch_size x patch_size
    latents."""

    kind: str
    dim: int
    patch_size: int
    base_size: int
    interpolation_scale: float


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the transformer is told beside the text and the time. `resolution_aspect_ratio`: the size in pixels and
    height / width (PixArt-alpha 1024). `options` is the whole section."""

    resolution_aspect_ratio: bool
    options: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Select:
    """Which positions of the encoded text the transformer sees: the `first` ones, then the `last` ones."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class PromptSide:
    """How the positive or the negative prompt becomes tokens: `template` with `{prompt}` replaced, at most `max_length`
    tokens with the special ones, and after the text encoder only the positions of `select`."""

    template: str
    max_length: int
    select: Select | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt recipe. `lower` and `strip` act on the prompt before it enters the template, in this order."""

    tokenizer: str
    lower: bool
    strip: bool
    add_special_tokens: bool
    padding: str
    pad_token_id: int
    unk_token_id: int | None
    positive: PromptSide
    negative: PromptSide
    negative_prompt: str


@dataclass(frozen=True, slots=True)
class Recommended:
    """What to use when the user says nothing. `sizes` are the (width, height) pairs that the model was trained on."""

    steps: int
    width: int
    height: int
    guidance_scale: float
    sampler: str
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the bundle comes from. `created` is an ISO 8601 time, `licence` that of the weights."""

    source: str
    revision: str | None
    licence: str | None
    created: str
    options: Mapping[str, object]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole manifest; `raw` is the JSON object that it was read from. Sections are None in a bundle that holds only
    single components (one converted from a component's folder): such a bundle predicts but draws nothing."""

    format_version: int
    name: str
    family: str
    pipeline_class: str | None
    components: Mapping[str, Component]
    files: Mapping[str, FileEntry]
    schedule: Mapping[str, object] | None
    guidance: Guidance | None
    latents: Latents | None
    positions: Positions | None
    conditioning: Conditioning | None
    prompt: Prompt | None
    recommended: Recommended | None
    provenance: Provenance
    raw: Mapping[str, object]
