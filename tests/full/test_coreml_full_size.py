"""Core ML packages of real sizes with random weights: time, memory, and one block of full width against diffusers.

Needs about 10 GB of disk and 8 GB of memory; run by `make check-full`.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import edgedit
from edgedit.bundle import open_bundle
from edgedit.runtimes.mil_interpreter import MilInterpreter
from edgedit.runtimes.mil_report import report

pytestmark = pytest.mark.full

SECONDS, PEAK = 360, 6e9
COMPONENTS = ("transformer", "decoder")
GUARD = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(json.dumps({"code": code, "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}))
"""


def sana(layers: int) -> Any:
    """SANA 0.6B."""
    return diffusers.SanaTransformer2DModel(
        num_layers=layers,
        num_attention_heads=36,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=2304,
    )


def pixart(layers: int) -> Any:
    """PixArt-Sigma."""
    return diffusers.PixArtTransformer2DModel(
        num_layers=layers,
        sample_size=128,
        interpolation_scale=2,
        use_additional_conditions=False,
        caption_channels=4096,
    )


MODELS = {"sana": sana, "pixart": pixart}


def narrow_autoencoder(name: str) -> Any:
    """As many levels as the model's own, since they say how many pixels a latent is, and next to no weights."""
    if name == "pixart":
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            latent_channels=4,
        )
    half = {"block_types": ("ResBlock",) * 6, "block_out_channels": (8,) * 5 + (32,), "layers_per_block": (1,) * 6}
    halves = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in half.items()}
    return diffusers.AutoencoderDC(latent_channels=32, **halves)


def save(make: Any, layers: int, folder: Path) -> Any:
    torch.manual_seed(0)
    model = make(layers).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("form", ["fp16", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_full_size_transformer_is_converted_in_minutes_and_bounded_memory(
    name: str, form: str, tmp_path: Path
) -> None:
    save(MODELS[name], 28, tmp_path / "transformer")
    gc.collect()
    target = tmp_path / "x.edgedit"
    command = [sys.executable, "-m", "edgedit", "convert", str(tmp_path / "transformer"), "-o", str(target)]
    command += ["--to", "coreml", "--dtype", "fp16", "--no-measure", "--quiet"]
    command += ["--coreml-weights", form] if form != "fp16" else []
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", GUARD, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["code"] == 0, done.stderr
    artefact = open_bundle(target, verify=True).artefact("transformer", "coreml")
    found = report(target / artefact.graph)
    size = sum(path.stat().st_size for path in (target / artefact.graph).rglob("*") if path.is_file())
    print(f"{name} {form}: {seconds:.0f} s, peak {measured['peak'] / 1e9:.2f} GB, {size / 1e9:.3f} GB, {found.weights}")
    assert found.largest_rank <= 5
    assert seconds < SECONDS
    assert measured["peak"] < PEAK


@pytest.mark.parametrize("name", MODELS)
def test_a_second_size_costs_less_than_a_hundredth(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    transformer = save(MODELS[name], 4, folder / "transformer")
    autoencoder = narrow_autoencoder(name)
    autoencoder.save_pretrained(folder / "vae")
    index = {"_class_name": {"sana": "SanaPipeline", "pixart": "PixArtSigmaPipeline"}[name]}
    parts = {"transformer": transformer, "vae": autoencoder}
    index |= {part: ["diffusers", type(module).__name__] for part, module in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    bytes_of = {}
    for sizes in ([(1024, 1024)], [(1024, 1024), (1280, 768)]):
        target = tmp_path / f"{len(sizes)}.edgedit"
        options: dict[str, Any] = {"dtype": "fp16", "components": COMPONENTS, "sizes": sizes, "measure": False}
        edgedit.convert(folder, target, to=("coreml",), **options)
        package = target / open_bundle(target).artefact("transformer", "coreml").graph
        bytes_of[len(sizes)] = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    growth = bytes_of[2] / bytes_of[1] - 1
    print(f"{name}: a second size adds {100 * growth:.2f} % of {bytes_of[1] / 1e6:.0f} MB (4 layers)")
    assert growth < 0.01


@pytest.mark.parametrize("name", MODELS)
def test_one_block_of_full_width_agrees_with_diffusers(name: str, tmp_path: Path) -> None:
    model = save(MODELS[name], 1, tmp_path / "transformer")
    target = tmp_path / "x.edgedit"
    edgedit.convert(tmp_path / "transformer", target, to=("coreml",), dtype="fp16", measure=False)
    bundle = open_bundle(target)
    entry, artefact = bundle.component("transformer"), bundle.artefact("transformer", "coreml")
    (function,) = artefact.functions
    random = np.random.default_rng(0)
    shapes = {
        spec.name: tuple(d if isinstance(d, int) else function.sizes[d] for d in spec.shape) for spec in entry.inputs
    }
    inputs = {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    inputs["timestep"] = np.array([431.0], np.float32)
    inputs["encoder_attention_mask"] = (np.arange(function.sizes["length"]) < 77).astype(np.float32)[None]
    if "attention_scale" in inputs:
        inputs["attention_scale"] = np.ones(1, np.float32)
    if "pos_embed" in inputs:
        from edgedit.positions import pos_embed_table

        inputs["pos_embed"] = pos_embed_table(entry.config["positions"], *inputs["latents"].shape[2:])  # type: ignore[arg-type]
    with torch.no_grad():
        expected = model(
            torch.from_numpy(inputs["latents"]),
            encoder_hidden_states=torch.from_numpy(inputs["encoder_hidden_states"]),
            timestep=torch.from_numpy(inputs["timestep"]),
            encoder_attention_mask=torch.from_numpy(inputs["encoder_attention_mask"]),
            **({"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if name == "pixart" else {}),
        ).sample.numpy()
    found = MilInterpreter(target / artefact.graph).run(inputs)["prediction"]
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    print(f"{name}: one block is off by {error:.1e}")
    assert error < 1e-3
