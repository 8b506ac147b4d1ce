"""Reads a manifest: the checks of `manifest.schema.json`, in one pass, with one-line errors that name the place."""

from __future__ import annotations

import re

from edgedit.errors import BundleError
from edgedit.json_reader import JsonNode
from edgedit.manifest import (
    FORMAT_VERSION,
    Artefact,
    Component,
    Conditioning,
    Exported,
    FileEntry,
    Function,
    FusedGraph,
    Guidance,
    Latents,
    Manifest,
    Parity,
    Positions,
    Preview,
    Prompt,
    PromptSide,
    Provenance,
    Recommended,
    Select,
    TensorSpec,
)

__all__ = ["check_references", "is_bundle_path", "parse_manifest"]

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_PATH = rf"{_SEGMENT}(/{_SEGMENT})*"
_PATH_WORDS = "a plain path inside the bundle (letters, digits and _ . + - joined by /)"
_NAME = r"[a-z][a-z0-9_]*"
_NAME_WORDS = "a name of small letters, digits and _"
_TEMPLATE = r"((?!\{prompt\})[\s\S])*\{prompt\}((?!\{prompt\})[\s\S])*"
_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")


def is_bundle_path(path: str) -> bool:
    """Whether `path` can name a file of a bundle: relative, portable, without `..`."""
    return re.fullmatch(_PATH, path) is not None


def parse_manifest(node: JsonNode) -> Manifest:
    """The manifest at `node`. Raises BundleError where it departs from the schema."""
    _check_version(node)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=node.at("name").text(),
        family=node.at("family").text(),
        pipeline_class=node.at("pipeline_class").nullable(JsonNode.text),
        components={
            name: _component(part) for name, part in node.at("components").items(_NAME, _NAME_WORDS, minimum=1)
        },
        files={path: _file_entry(part) for path, part in node.at("files").items(_PATH, _PATH_WORDS)},
        schedule=node.at("schedule").nullable(_schedule),
        guidance=node.at("guidance").nullable(_guidance),
        latents=node.at("latents").nullable(_latents),
        positions=node.at("positions").nullable(_positions),
        conditioning=node.at("conditioning").nullable(_conditioning),
        prompt=node.at("prompt").nullable(_prompt),
        recommended=node.at("recommended").nullable(_recommended),
        provenance=_provenance(node.at("provenance")),
        raw=node.members(),
    )


def check_references(manifest: Manifest, source: str) -> None:
    """What a schema cannot say: every path that the manifest uses is listed in `files`, and sizes that must agree do.

    Raises BundleError; `source` is the name used in it.
    """
    root = JsonNode(manifest.raw, source)
    for name, component in manifest.components.items():
        for backend, artefact in component.artefacts.items():
            place = root.at("components").at(name).at("artefacts").at(backend)
            for path in artefact.files:
                if path not in manifest.files:
                    place.at("files").fail(f"{path} is not listed in the files of the manifest")
            graphs = [artefact.graph, *([artefact.fused_graph.path] if artefact.fused_graph else [])]
            graphs += [plan for plan in (artefact.tiles, artefact.parts) if plan]
            graphs += [artefact.exported.path] if artefact.exported else []
            graphs += artefact.chunks
            for graph in graphs:
                if not any(path == graph or path.startswith(graph + "/") for path in artefact.files):
                    place.fail(f"the graph {graph} is not among the artefact's files")
    prompt, latents = manifest.prompt, manifest.latents
    if prompt is not None:
        if prompt.tokenizer not in manifest.files:
            root.at("prompt").at("tokenizer").fail(f"{prompt.tokenizer} is not listed in the files of the manifest")
        for key, side in (("positive", prompt.positive), ("negative", prompt.negative)):
            if side.select is not None and (prompt.padding != "max_length" or side.select.last > side.max_length):
                root.at("prompt").at(key).at("select").fail("needs padding to a max_length that is not smaller")
    if latents is not None and latents.preview is not None and len(latents.preview.factors) != latents.channels:
        root.at("latents").at("preview").at("factors").fail(f"expected one row for each of {latents.channels} channels")


def _check_version(node: JsonNode) -> None:
    version = node.at("format_version").integer(minimum=1)
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{node.source}: the bundle has format version {version} and this edgedit reads up to {FORMAT_VERSION}; "
            "upgrade edgedit (pip install --upgrade edgedit)"
        )


def _component(node: JsonNode) -> Component:
    return Component(
        architecture=node.at("architecture").text(),
        config=node.at("config").members(),
        parameters=node.at("parameters").integer(minimum=0),
        inputs=tuple(_tensor(part) for part in node.at("inputs").elements()),
        outputs=tuple(_tensor(part) for part in node.at("outputs").elements(minimum=1)),
        artefacts={name: _artefact(part) for name, part in node.at("artefacts").items(_NAME, _NAME_WORDS, minimum=1)},
    )


def _tensor(node: JsonNode) -> TensorSpec:
    shape = tuple(
        part.text() if isinstance(part.value, str) else part.integer(minimum=0) for part in node.at("shape").elements()
    )
    return TensorSpec(node.at("name").text(), node.at("dtype").one_of(_DTYPES), shape)


def _artefact(node: JsonNode) -> Artefact:
    return Artefact(
        precision=node.at("precision").text(),
        graph=_path(node.at("graph")),
        fused_graph=node.at("fused_graph").nullable(_fused_graph),
        files=tuple(_path(part) for part in node.at("files").elements(minimum=1)),
        parity=node.at("parity").nullable(_parity),
        functions=tuple(_function(part) for part in node.at("functions").elements(minimum=1))
        if "functions" in node.members()
        else (),
        tiles=node.at("tiles").nullable(_path) if "tiles" in node.members() else None,
        parts=node.at("parts").nullable(_path) if "parts" in node.members() else None,
        exported=_exported(node.at("exported")) if "exported" in node.members() else None,
        chunks=tuple(_path(part) for part in node.at("chunks").elements(minimum=2))
        if "chunks" in node.members()
        else (),
    )


def _exported(node: JsonNode) -> Exported:
    sizes = tuple(
        {name: part.integer(minimum=1) for name, part in entry.items(_NAME, _NAME_WORDS, minimum=1)}
        for entry in node.at("sizes").elements(minimum=1)
    )
    return Exported(_path(node.at("path")), sizes)


def _function(node: JsonNode) -> Function:
    sizes = node.at("sizes").items(_NAME, _NAME_WORDS)
    return Function(node.at("name").nullable(JsonNode.text), {name: part.integer(minimum=1) for name, part in sizes})


def _fused_graph(node: JsonNode) -> FusedGraph:
    return FusedGraph(_path(node.at("path")), tuple(part.text() for part in node.at("for").elements(minimum=1)))


def _parity(node: JsonNode) -> Parity:
    return Parity(
        against=node.at("against").text(),
        cosine=node.at("cosine").number(),
        psnr_db=node.at("psnr_db").nullable(JsonNode.number),
        max_abs=node.at("max_abs").number(),
        relative_l2=node.at("relative_l2").number(),
    )


def _path(node: JsonNode) -> str:
    return node.matching(_PATH, _PATH_WORDS)


def _file_entry(node: JsonNode) -> FileEntry:
    sha256 = node.at("sha256").matching("[0-9a-f]{64}", "64 hexadecimal digits in small letters")
    return FileEntry(node.at("size").integer(minimum=0), sha256)


def _schedule(node: JsonNode) -> dict[str, object]:
    for key in ("path", "prediction", "sampler"):
        node.at(key).text()
    return dict(node.members())


def _guidance(node: JsonNode) -> Guidance:
    return Guidance(node.at("kind").text(), node.members())


def _latents(node: JsonNode) -> Latents:
    return Latents(
        channels=node.at("channels").integer(minimum=1),
        scale_factor=node.at("scale_factor").integer(minimum=1),
        patch_size=node.at("patch_size").integer(minimum=1),
        size_multiple=node.at("size_multiple").integer(minimum=1),
        scaling_factor=node.at("scaling_factor").number(above=0),
        shift_factor=node.at("shift_factor").number(),
        preview=node.at("preview").nullable(_preview),
    )


def _preview(node: JsonNode) -> Preview:
    rows = node.at("factors").elements(minimum=1)
    return Preview(tuple(_rgb(row) for row in rows), _rgb(node.at("bias")))


def _rgb(node: JsonNode) -> tuple[float, ...]:
    return tuple(part.number() for part in node.elements(exactly=3))


def _positions(node: JsonNode) -> Positions:
    return Positions(
        kind=node.at("kind").one_of(("sincos_2d",)),
        dim=node.at("dim").integer(minimum=1),
        patch_size=node.at("patch_size").integer(minimum=1),
        base_size=node.at("base_size").integer(minimum=1),
        interpolation_scale=node.at("interpolation_scale").number(above=0),
    )


def _conditioning(node: JsonNode) -> Conditioning:
    return Conditioning(node.at("resolution_aspect_ratio").boolean(), node.members())


def _prompt(node: JsonNode) -> Prompt:
    return Prompt(
        tokenizer=_path(node.at("tokenizer")),
        lower=node.at("lower").boolean(),
        strip=node.at("strip").boolean(),
        add_special_tokens=node.at("add_special_tokens").boolean(),
        padding=node.at("padding").one_of(("max_length", "longest")),
        pad_token_id=node.at("pad_token_id").integer(minimum=0),
        unk_token_id=node.at("unk_token_id").nullable(lambda part: part.integer(minimum=0)),
        positive=_prompt_side(node.at("positive")),
        negative=_prompt_side(node.at("negative")),
        negative_prompt=node.at("negative_prompt").text(empty=True),
    )


def _prompt_side(node: JsonNode) -> PromptSide:
    return PromptSide(
        template=node.at("template").matching(_TEMPLATE, "a string with {prompt} in it once"),
        max_length=node.at("max_length").integer(minimum=1),
        select=node.at("select").nullable(
            lambda part: Select(part.at("first").integer(minimum=0), part.at("last").integer(minimum=1))
        ),
    )


def _recommended(node: JsonNode) -> Recommended:
    sizes = []
    for pair in node.at("sizes").elements():
        width, height = (part.integer(minimum=1) for part in pair.elements(exactly=2))
        sizes.append((width, height))
    return Recommended(
        steps=node.at("steps").integer(minimum=1),
        width=node.at("width").integer(minimum=1),
        height=node.at("height").integer(minimum=1),
        guidance_scale=node.at("guidance_scale").number(),
        sampler=node.at("sampler").text(),
        sizes=tuple(sizes),
    )


def _provenance(node: JsonNode) -> Provenance:
    return Provenance(
        source=node.at("source").text(),
        revision=node.at("revision").nullable(JsonNode.text),
        licence=node.at("licence").nullable(JsonNode.text),
        created=node.at("created").text(),
        options=node.at("options").members(),
        versions={name: part.text() for name, part in node.at("versions").items(r"[\s\S]*", "a name")},
    )
