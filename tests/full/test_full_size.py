"""Real sizes with random weights: conversion in bounded memory, and one evaluation against diffusers.

Needs about 25 GB of disk and 20 GB of memory; run by `make check-full`.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

import edgedit

pytestmark = pytest.mark.full

CONVERT_PEAK = 1.5e9
GUARD = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(json.dumps({"code": code, "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}))
"""


def _pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        num_layers=28, sample_size=128, interpolation_scale=2, use_additional_conditions=False, caption_channels=4096
    )


def _sana(layers: int, heads: int, head_dim: int, cross_heads: int, cross_dim: int) -> Any:
    return diffusers.SanaTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_cross_attention_heads=cross_heads,
        cross_attention_head_dim=cross_dim,
        cross_attention_dim=cross_heads * cross_dim,
    )


def _dc() -> Any:
    return diffusers.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def _kl() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    )


def _t5() -> Any:
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=2,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "pixart-sigma-0.6b": (_pixart, "transformer"),
    "sana-0.6b": (lambda: _sana(28, 36, 32, 16, 72), "transformer"),
    "sana-1.6b": (lambda: _sana(20, 70, 32, 20, 112), "transformer"),
    "sdxl-vae": (_kl, "decoder"),
    "dc-ae": (_dc, "decoder"),
    "t5-xxl-2-layers": (_t5, "text_encoder"),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path, str]]:
    name = request.param
    make, component = MODELS[name]
    torch.manual_seed(0)
    with torch.device("meta"):
        network = make()
    network = network.to_empty(device="cpu").eval()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if parameter.ndim >= 2 and "table" not in key:
                parameter.normal_(0, 1 if "shared" in key else parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(1 if key.endswith("weight") else 0, 0.05)
        for buffer_name, _ in list(network.named_buffers()):
            if buffer_name.endswith("pos_embed.pos_embed"):
                fresh = diffusers.models.embeddings.get_2d_sincos_pos_embed(
                    1152, 64, base_size=64, interpolation_scale=2, output_type="pt"
                )
                network.pos_embed.pos_embed = fresh.float().unsqueeze(0)
    if component == "text_encoder":
        network.tie_weights()
    folder = tmp_path / "checkpoint"
    network.save_pretrained(folder, max_shard_size="2GB")
    del network
    gc.collect()
    yield name, folder, component
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_conversion_streams_and_one_evaluation_agrees(model: tuple[str, Path, str], tmp_path: Path) -> None:
    name, folder, component = model
    bundle = tmp_path / "model.edgedit"
    started = time.perf_counter()
    command = [
        sys.executable,
        "-c",
        GUARD,
        sys.executable,
        "-m",
        "edgedit",
        "convert",
        str(folder),
        "-o",
        str(bundle),
        "-q",
    ]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    seconds = time.perf_counter() - started
    assert report["code"] == 0
    size = sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file())
    inputs = example(component, name)
    with edgedit.load(bundle) as pipe:
        started = time.perf_counter()
        found = pipe.runtime.open(component).run(inputs)
        step = time.perf_counter() - started
    (value,) = found.values()
    del found, pipe
    gc.collect()
    wanted = reference(folder, component, inputs)
    error = float(np.linalg.norm(value - wanted) / np.linalg.norm(wanted))
    print(
        f"\n{name}: converted in {seconds:.0f} s, peak {report['peak'] / 1e9:.2f} GB, {size / 1e9:.2f} GB on disk, "
        f"one evaluation (session opened anew) {step:.1f} s, relative L2 {error:.1e}"
    )
    assert error <= 1e-4
    assert report["peak"] < CONVERT_PEAK


def example(component: str, name: str) -> dict[str, np.ndarray]:
    """Inputs at 1024 px (512 px for the autoencoders, so that torch's decode fits beside)."""
    rng = np.random.default_rng()

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    if component == "text_encoder":
        return {"input_ids": rng.integers(0, 32128, (1, 120)), "attention_mask": np.ones((1, 120), np.int64)}
    if component == "decoder":
        return {"latents": normal(1, 32, 16, 16) if name == "dc-ae" else normal(1, 4, 64, 64)}
    mask = np.ones((1, 300), np.float32)
    mask[:, 77:] = 0
    sana = name.startswith("sana")
    inputs = {
        "latents": normal(1, 32, 32, 32) if sana else normal(1, 4, 128, 128),
        "timestep": np.array([937.0], np.float32),
        "encoder_hidden_states": normal(1, 300, 2304 if sana else 4096),
        "encoder_attention_mask": mask,
    }
    if not sana:
        positions = {"kind": "sincos_2d", "dim": 1152, "base_size": 64, "interpolation_scale": 2, "patch_size": 2}
        from edgedit.positions import pos_embed_table

        inputs["pos_embed"] = pos_embed_table(positions, 128, 128)
        inputs["attention_scale"] = np.ones(1, np.float32)
    return inputs


def reference(folder: Path, component: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The same evaluation by diffusers or transformers in float32."""
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    with torch.no_grad():
        if component == "text_encoder":
            network = T5EncoderModel.from_pretrained(folder).eval()
            return network(**tensors)[0].numpy()
        class_name = json.loads((folder / "config.json").read_text())["_class_name"]
        network = getattr(diffusers, class_name).from_pretrained(folder).eval()
        if component == "decoder":
            return network.decode(tensors["latents"], return_dict=False)[0].numpy()
        extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if "pos_embed" in inputs else {}
        return network(
            tensors["latents"],
            encoder_hidden_states=tensors["encoder_hidden_states"],
            encoder_attention_mask=tensors["encoder_attention_mask"],
            timestep=tensors["timestep"],
            return_dict=False,
            **extra,
        )[0].numpy()
