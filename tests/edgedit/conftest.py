"""Random valid manifests, and bundles made of them."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def rng() -> random.Random:
    """Fresh randomness; pytest shows the printed seed when the test fails."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"random seed {seed}")
    return random.Random(seed)


@pytest.fixture
def random_manifest() -> Callable[[random.Random], dict[str, Any]]:
    """A function that draws a valid manifest, `files` included; every nullable section is null now and then."""
    return _manifest


@pytest.fixture
def fill_bundle() -> Callable[[random.Random, dict[str, Any], Path], None]:
    """A function that writes random contents under every path of a manifest's `files`."""
    return _fill


def _fill(rng: random.Random, manifest: dict[str, Any], root: Path) -> None:
    for path in manifest["files"]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(rng.randbytes(rng.randint(1, 5000)))


def _manifest(rng: random.Random) -> dict[str, Any]:
    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9)))

    def maybe(value: Any) -> Any:
        return value if rng.random() < 0.7 else None

    def number() -> float:
        return rng.choice([rng.uniform(-5, 5), rng.randint(-5, 5)])

    def tensor() -> dict[str, Any]:
        shape = [rng.choice([rng.randint(0, 64), word()]) for _ in range(rng.randint(0, 4))]
        return {"name": word(), "dtype": rng.choice(["float32", "float16", "int64", "bool"]), "shape": shape}

    def parity() -> dict[str, Any]:
        figures = {"cosine": number(), "psnr_db": maybe(number()), "max_abs": number(), "relative_l2": number()}
        return {"against": word(), **figures}

    def artefact(backend: str, component: str) -> dict[str, Any]:
        graph = f"{backend}/{component}.onnx"
        fused = f"{backend}/{component}.fused.onnx"
        inside = [f"{backend}/{component}.mlpackage/Data/{word()}.bin" for _ in range(2)]
        folder = f"{backend}/{component}.mlpackage"
        if rng.random() < 0.3:
            functions = [
                {"name": maybe(word()), "sizes": {word(): rng.randint(1, 99)}} for _ in range(rng.randint(1, 2))
            ]
            whole = {"precision": "fp16", "graph": folder, "fused_graph": None, "files": inside, "parity": None}
            return {**whole, **rng.choice([{}, {"functions": functions}])}
        sizes = [{word(): rng.randint(1, 99)} for _ in range(rng.randint(1, 2))]
        exported = rng.choice([{}, {"exported": {"path": graph, "sizes": sizes}}])
        return {
            "precision": rng.choice(["fp32", "fp16", "int8"]),
            "graph": graph,
            "fused_graph": maybe({"path": fused, "for": [word() for _ in range(rng.randint(1, 2))]}),
            "files": [graph, fused, f"{graph}.data"],
            "parity": maybe(parity()),
            **exported,
        }

    def component(name: str) -> dict[str, Any]:
        backends = rng.sample(["onnx", "coreml", "mlx"], rng.randint(1, 3))
        return {
            "architecture": word(),
            "config": {word(): number() for _ in range(rng.randint(0, 3))},
            "parameters": rng.randint(0, 10**10),
            "inputs": [tensor() for _ in range(rng.randint(0, 4))],
            "outputs": [tensor() for _ in range(rng.randint(1, 2))],
            "artefacts": {backend: artefact(backend, name) for backend in backends},
        }

    names = rng.sample(["transformer", "text_encoder", "decoder", "encoder"], rng.randint(1, 4))
    components = {name: component(name) for name in names}
    channels = rng.choice([4, 16, 32])
    rgb = [[number() for _ in range(3)] for _ in range(channels + 1)]
    limit = rng.randint(10, 300)
    select = {"first": rng.randint(0, 3), "last": rng.randint(1, limit)}
    side = {"template": word() + "{prompt}" + word(), "max_length": limit, "select": select}
    plain = {"template": "{prompt}", "max_length": limit, "select": None}
    size = [rng.randint(1, 4096), rng.randint(1, 4096)]
    tokenizer = "tokenizer/tokenizer.json"
    used = {path for part in components.values() for made in part["artefacts"].values() for path in made["files"]}
    return {
        "format_version": 1,
        "name": word(),
        "family": word(),
        "pipeline_class": maybe(word()),
        "components": components,
        "files": {
            path: {"size": rng.randint(0, 10**12), "sha256": rng.randbytes(32).hex()}
            for path in sorted(used | {tokenizer})
        },
        "schedule": maybe({"path": "vp", "prediction": "epsilon", "sampler": "dpmpp_2m", word(): number()}),
        "guidance": maybe({"kind": rng.choice(["cfg", "none", "embedded"]), word(): word()}),
        "latents": maybe(
            {
                "channels": channels,
                "scale_factor": rng.choice([8, 32]),
                "patch_size": rng.choice([1, 2]),
                "size_multiple": 32,
                "scaling_factor": rng.uniform(0.01, 2),
                "shift_factor": number(),
                "preview": maybe({"factors": rgb[1:], "bias": rgb[0]}),
            }
        ),
        "positions": maybe(
            {"kind": "sincos_2d", "dim": 16, "patch_size": 2, "base_size": 8, "interpolation_scale": 0.5}
        ),
        "conditioning": maybe({"resolution_aspect_ratio": rng.random() < 0.5}),
        "prompt": maybe(
            {
                "tokenizer": tokenizer,
                "lower": rng.random() < 0.5,
                "strip": rng.random() < 0.5,
                "add_special_tokens": True,
                "padding": "max_length",
                "pad_token_id": rng.randint(0, 5),
                "unk_token_id": maybe(rng.randint(0, 5)),
                "positive": side,
                "negative": plain,
                "negative_prompt": rng.choice(["", word()]),
            }
        ),
        "recommended": maybe(
            {
                "steps": rng.randint(1, 50),
                "width": size[0],
                "height": size[1],
                "guidance_scale": number(),
                "sampler": word(),
                "sizes": [size] * rng.randint(0, 2),
            }
        ),
        "provenance": {
            "source": word(),
            "revision": maybe(word()),
            "licence": maybe("apache-2.0"),
            "created": "2026-01-02T03:04:05Z",
            "options": {word(): rng.choice([True, None, word()])},
            "versions": {"edgedit": "0.1.0"},
        },
    }
