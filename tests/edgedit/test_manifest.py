from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgedit.errors import BundleError
from edgedit.guidance import Guidance
from edgedit.json_reader import JsonNode, parse_json
from edgedit.manifest import FORMAT_VERSION
from edgedit.manifest_parser import check_references, is_bundle_path, parse_manifest
from edgedit.schedule_config import FIELDS, check_schedule_config

SCHEMA = json.loads(resources.files("edgedit").joinpath("manifest.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2.0, 2.5, -0.0, 10**30, 1e300),
    *(
        "",
        "x",
        "..",
        "../x",
        "/abs",
        "a/../b",
        "a//b",
        "a/",
        "a\\b",
        "C:x",
        "a/b",
        "a\n",
        "é",
        "\ud800",
        "vp",
        "float32",
    ),
    *("{prompt}", "{prompt}{prompt}", "{prompt", "a\n{prompt}\n", "f" * 64, "F" * 64, "f" * 63, "f" * 64 + "\n"),
    *([], {}, [1], [1, 2], [1, 2, 3], [1.5, 2, 3], ["x"], [[1, 2]], [["a", 1]], {"x": 1}, {"path": "a", "for": []}),
]

FIGURES = {"against": "x", "cosine": 1, "psnr_db": 60.5, "max_abs": 0.5, "relative_l2": 0}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate(rng: random.Random, manifest: dict[str, Any]) -> None:
    container, key = rng.choice(list(places(manifest)))
    kind = rng.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice([j for j in JUNK if isinstance(j, str)])] = container.pop(key)
    elif kind == 2 and isinstance(container, dict):
        container[rng.choice(["unknown", "../up", "Name", "new_name"])] = copy.deepcopy(rng.choice(JUNK))
    elif kind == 3 and isinstance(container, list):
        container.append(copy.deepcopy(rng.choice([container[key], rng.choice(JUNK)])))
    elif kind == 4 and isinstance(container[key], dict | list):
        container[key].clear()
    else:
        container[key] = copy.deepcopy(rng.choice(JUNK))


def refusal(manifest: Any) -> str | None:
    try:
        parse_manifest(JsonNode(manifest, "manifest.json"))
    except BundleError as error:
        return str(error)
    return None


def test_the_published_schema_is_valid_json_schema_2020_12() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["properties"]["format_version"]["const"] == FORMAT_VERSION


#: Entries that bundles of this format version lack when they were made before there were any.
LATER = {"functions", "tiles", "parts", "exported", "chunks"}


def test_every_object_of_the_schema_describes_itself_and_requires_what_it_describes() -> None:
    def walk(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if "properties" in node:
                yield node
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    for node in walk(SCHEMA):
        assert node.get("description"), node
        assert list(node["required"]) == [key for key in node["properties"] if key not in LATER]


def test_parser_and_schema_accept_every_random_valid_manifest(
    rng: random.Random, random_manifest: Callable[[random.Random], dict[str, Any]]
) -> None:
    for _ in range(60):
        manifest = random_manifest(rng)
        VALIDATOR.validate(manifest)
        parsed = parse_manifest(parse_json(json.dumps(manifest).encode(), "manifest.json"))
        check_references(parsed, "manifest.json")
        assert parsed.raw == manifest


def test_parser_and_schema_agree_on_mutated_manifests(
    rng: random.Random, random_manifest: Callable[[random.Random], dict[str, Any]]
) -> None:
    accepted = refused = 0
    for _ in range(700):
        manifest = random_manifest(rng)
        for _ in range(rng.choice([1, 1, 2])):
            mutate(rng, manifest)
        error = refusal(manifest)
        assert (error is None) == VALIDATOR.is_valid(manifest), (error, json.dumps(manifest))
        accepted, refused = accepted + (error is None), refused + (error is not None)
        assert error is None or "\n" not in error
    assert accepted > 50
    assert refused > 300


def test_parser_and_schema_agree_on_every_value_in_every_place(
    rng: random.Random, random_manifest: Callable[[random.Random], dict[str, Any]]
) -> None:
    manifest = full_manifest(rng, random_manifest)
    transformer = manifest["components"]["transformer"]
    transformer["artefacts"] = {"onnx": transformer["artefacts"]["onnx"] | {"parity": FIGURES}}
    transformer["inputs"], transformer["outputs"] = transformer["inputs"][:1], transformer["outputs"][:1]
    manifest["components"] = {"transformer": transformer}
    manifest["files"] = dict(list(manifest["files"].items())[:1])
    manifest["latents"]["preview"] = {"factors": [[1, 2, 3]], "bias": [1, 2, 3]}
    VALIDATOR.validate(manifest)
    for container, key in list(places(manifest)):
        sound = container[key]
        for value in JUNK:
            container[key] = value
            error = refusal(manifest)
            assert (error is None) == VALIDATOR.is_valid(manifest), (error, json.dumps(manifest))
        container[key] = sound


def test_every_value_that_the_records_hold_is_the_manifests_own(
    rng: random.Random, random_manifest: Callable[[random.Random], dict[str, Any]]
) -> None:
    for _ in range(40):
        manifest = random_manifest(rng)
        parsed = parse_manifest(JsonNode(manifest, "manifest.json"))
        for name in ("name", "family", "pipeline_class", "schedule"):
            assert getattr(parsed, name) == manifest[name]
        for name in ("latents", "positions", "prompt", "recommended", "provenance"):
            if manifest[name] is None:
                assert getattr(parsed, name) is None
                continue
            for key, value in manifest[name].items():
                if isinstance(value, str | int | float):
                    assert getattr(getattr(parsed, name), key) == value, (name, key)
        for name, component in manifest["components"].items():
            for field in ("inputs", "outputs"):
                for tensor, spec in zip(component[field], getattr(parsed.components[name], field), strict=True):
                    assert (spec.name, spec.dtype, list(spec.shape)) == tuple(tensor.values())
            for backend, artefact in component["artefacts"].items():
                made = parsed.components[name].artefacts[backend]
                assert (made.graph, list(made.files)) == (artefact["graph"], artefact["files"])
                fused = None if made.fused_graph is None else list(made.fused_graph.providers)
                assert fused == (artefact["fused_graph"] and artefact["fused_graph"]["for"])
                assert [(f.name, dict(f.sizes)) for f in made.functions] == [
                    (f["name"], f["sizes"]) for f in artefact.get("functions", [])
                ]
                if made.parity is not None:
                    assert made.parity.psnr_db == artefact["parity"]["psnr_db"]
        for path, entry in manifest["files"].items():
            assert (parsed.files[path].size, parsed.files[path].sha256) == (entry["size"], entry["sha256"])
        if parsed.latents is not None and parsed.latents.preview is not None:
            assert [list(row) for row in parsed.latents.preview.factors] == manifest["latents"]["preview"]["factors"]
        if parsed.prompt is not None and parsed.prompt.positive.select is not None:
            assert parsed.prompt.positive.select.last == manifest["prompt"]["positive"]["select"]["last"]


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("components", "transformer", "inputs", 0, "dtype"), "float8", "components.transformer.inputs[0].dtype"),
        (
            ("components", "transformer", "artefacts", "onnx", "graph"),
            "../x",
            "components.transformer.artefacts.onnx.graph",
        ),
        (("files", "tokenizer/tokenizer.json", "size"), -1, 'files["tokenizer/tokenizer.json"].size'),
        (("latents", "preview", "factors", 1), [1, 2], "latents.preview.factors[1]"),
        (("prompt", "positive", "template"), "no place", "prompt.positive.template"),
        (("recommended", "sizes"), [[512]], "recommended.sizes[0]"),
        (("provenance", "versions", "edgedit"), 1, "provenance.versions.edgedit"),
    ],
)
def test_an_error_is_one_line_that_names_the_json_path(
    path: tuple[Any, ...],
    value: Any,
    place: str,
    rng: random.Random,
    random_manifest: Callable[[random.Random], dict[str, Any]],
) -> None:
    manifest = full_manifest(rng, random_manifest)
    target: Any = manifest
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    error = refusal(manifest)
    assert error is not None
    assert error.startswith(f"manifest.json: {place}: expected ")
    assert "\n" not in error


def test_a_missing_key_is_named_whatever_the_key(
    rng: random.Random, random_manifest: Callable[[random.Random], dict[str, Any]]
) -> None:
    template = full_manifest(rng, random_manifest)
    for section in ("", "latents", "positions", "prompt", "recommended", "provenance", "guidance", "conditioning"):
        for key in list(template[section] if section else template):
            if section == "guidance" and key != "kind":
                continue
            manifest = copy.deepcopy(template)
            del (manifest[section] if section else manifest)[key]
            error = refusal(manifest)
            assert error is not None, (section, key)
            assert error.startswith(f"manifest.json: {section}{'.' if section else ''}{key}: missing")


def test_a_newer_format_says_to_upgrade() -> None:
    error = refusal({"format_version": FORMAT_VERSION + 1, "whatever": []})
    assert error is not None
    assert "upgrade edgedit" in error


def test_references_to_files_that_are_not_listed_are_refused(
    rng: random.Random, random_manifest: Callable[[random.Random], dict[str, Any]]
) -> None:
    def check(change: Callable[[dict[str, Any]], None], expected: str) -> None:
        manifest = full_manifest(rng, random_manifest)
        change(manifest)
        VALIDATOR.validate(manifest)
        parsed = parse_manifest(JsonNode(manifest, "manifest.json"))
        with pytest.raises(BundleError, match=expected):
            check_references(parsed, "manifest.json")

    def onnx(manifest: dict[str, Any]) -> dict[str, Any]:
        artefact: dict[str, Any] = manifest["components"]["transformer"]["artefacts"]["onnx"]
        return artefact

    check(lambda m: m["files"].pop(m["prompt"]["tokenizer"]), r"prompt\.tokenizer: .*not listed")
    check(lambda m: m["files"].pop(onnx(m)["files"][-1]), r"artefacts\.onnx\.files: .*not listed")
    check(lambda m: onnx(m).update(graph="onnx/other"), r"graph onnx/other is not among")
    check(lambda m: onnx(m).update(fused_graph={"path": "onnx/trans", "for": ["x"]}), r"graph onnx/trans is not among")
    check(lambda m: m["latents"]["preview"]["factors"].pop(), r"latents\.preview\.factors")
    check(lambda m: m["prompt"].update(padding="longest"), r"prompt\.positive\.select")
    check(lambda m: m["prompt"]["positive"]["select"].update(last=1000), r"prompt\.positive\.select")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "expected an object"),
        (b'"x"', "expected an object"),
    ],
)
def test_text_that_is_not_a_json_object_is_refused_in_one_line(text: bytes, reason: str) -> None:
    with pytest.raises(BundleError, match=reason) as caught:
        parse_manifest(parse_json(text, "manifest.json"))
    assert "\n" not in str(caught.value)


def test_the_manifest_in_the_documentation_is_valid_and_its_fields_are_explained() -> None:
    text = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")
    found = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert found is not None
    manifest = json.loads(found.group(1))
    VALIDATOR.validate(manifest)
    parsed = parse_manifest(JsonNode(manifest, "docs/bundle.md"))
    check_references(parsed, "docs/bundle.md")
    assert parsed.schedule is not None
    check_schedule_config(parsed.schedule)
    Guidance.from_manifest(parsed.guidance)
    for name in [*FIELDS, *(field.name for field in dataclasses.fields(Guidance))]:
        assert f"`{name}`" in text, name


def test_bundle_paths_are_relative_and_portable() -> None:
    good = ["a", "onnx/t.onnx.data", "coreml/T.mlpackage/Data/com.apple.CoreML/weights/weight.bin", "a-b/c+d_e.0"]
    bad = [
        "",
        ".",
        "..",
        "a/..",
        "../a",
        "/a",
        "a//b",
        "a/",
        "a\\b",
        "a b",
        ".hidden",
        "a/.b",
        "C:a",
        "a\n",
        "a\0",
        "é",
    ]
    assert all(is_bundle_path(path) for path in good)
    assert not any(is_bundle_path(path) for path in bad)


def full_manifest(rng: random.Random, random_manifest: Callable[[random.Random], dict[str, Any]]) -> dict[str, Any]:
    """A manifest with every section and an ONNX transformer that has a graph, a fused graph and an input."""
    while True:
        manifest = random_manifest(rng)
        artefacts = manifest["components"].get("transformer", {"artefacts": {}})["artefacts"]
        sections = all(manifest[key] is not None for key in manifest if key != "pipeline_class")
        graphs = "transformer" in manifest["components"] and manifest["components"]["transformer"]["inputs"]
        if sections and graphs and manifest["latents"]["preview"] and artefacts.get("onnx", {}).get("fused_graph"):
            return manifest
