"""Conversion streams: its peak does not grow with the checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers
import torch

PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_of_converting(layers: int, folder: Path) -> int:
    with torch.device("meta"):
        model = diffusers.PixArtTransformer2DModel(
            num_layers=layers,
            sample_size=64,
            caption_channels=512,
            use_additional_conditions=False,
            interpolation_scale=1,
        )
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.05, 0.05)
    model.pos_embed.pos_embed.zero_()
    model.save_pretrained(folder / "checkpoint")
    command = [
        sys.executable,
        "-c",
        PEAK,
        sys.executable,
        "-m",
        "edgedit",
        "convert",
        "checkpoint",
        "-o",
        "x.edgedit",
        "-q",
    ]
    done = subprocess.run([*command, "--no-measure"], cwd=folder, capture_output=True, text=True, check=True)
    code, peak = done.stdout.split()[-2:]
    assert code == "0", done.stderr
    return int(peak)


def test_a_checkpoint_ten_times_as_large_needs_hardly_more_memory(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    weights = 9 * 21_250_000 * 4
    assert peak_of_converting(10, large) - peak_of_converting(1, small) < 0.15 * weights
