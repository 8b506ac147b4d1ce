"""Calibrating and rounding stream: the peak of a conversion is bounded, and does not grow with the rounding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from tiny_pipelines import build_pipeline

PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""
LAYERS = 8


def save_pipeline(folder: Path) -> int:
    """PixArt-Sigma's width with fewer blocks; the transformer's bytes in float32."""
    pipeline = build_pipeline("pixart-sigma", 3)
    with torch.device("meta"):
        model = diffusers.PixArtTransformer2DModel(
            num_layers=LAYERS,
            sample_size=32,
            caption_channels=24,
            use_additional_conditions=False,
            interpolation_scale=1,
        )
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.03, 0.03)
    model.pos_embed.pos_embed.zero_()
    pipeline.register_modules(transformer=model.eval())
    pipeline.save_pretrained(folder)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.full
def test_calibrated_conversions_stay_within_their_memory(tmp_path: Path) -> None:
    weights = save_pipeline(tmp_path / "source")
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    for dtype in ("w8a8", "w4"):
        command = [sys.executable, "-c", PEAK, sys.executable, "-m", "edgedit", "convert", "source", "-o"]
        options = [
            "--dtype",
            dtype,
            "--calibration",
            "prompts.txt",
            "--components",
            "transformer",
            "--no-measure",
            "-q",
        ]
        done = subprocess.run(
            [*command, f"{dtype}.edgedit", *options], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        code, peak = done.stdout.split()[-2:]
        assert code == "0", done.stderr
        # The float32 network draws the pictures; beside it there is room for one segment, its moments and one layer.
        assert int(peak) < 1.3 * weights + (1 << 30), dtype
