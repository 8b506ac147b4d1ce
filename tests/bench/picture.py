"""From starting a process to a picture on disk: a few-step linear model in w8a8 beside diffusers' PixArt-Sigma.

    python tests/bench/picture.py [--pixels 1024] [--rounds 1] [--encoder-layers 4] [--out build/bench]

SANA-Sprint, 2 steps, by `edgedit generate`, and PixArt-Sigma, 20 steps with guidance, by diffusers in float32; networks
of full size with random weights, each picture in a process of its own, in turns. The text encoders have their full
width and `--encoder-layers` layers: all 24 of T5-XXL do not fit 23 GB in float32 (Gemma-2 2B has 26). The two models
are different ones, so their pictures cannot be compared. Prints a Markdown table. `--quick` takes tiny pipelines.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parents[1] / "support"
PROMPT = "a small blue cat on a big red circle"
STEPS = {"edgedit, SANA-Sprint w8a8": 2, "diffusers, PixArt-Sigma fp32": 20}
DIFFUSERS = """
import sys, torch
from diffusers import PixArtSigmaPipeline
folder, steps, pixels, path, prompt = sys.argv[1:6]
pipe = PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
options = {"num_inference_steps": int(steps), "guidance_scale": 4.5, "use_resolution_binning": False}
pipe(prompt, width=int(pixels), height=int(pixels), **options).images[0].save(path)
"""


def build(kind: str, folder: Path, *, quick: bool, encoder_layers: int) -> None:
    """Save a pipeline with random weights. Runs in a process of its own: what it takes must not count elsewhere."""
    sys.path.insert(0, str(SUPPORT))
    import tiny_pipelines

    if quick:
        tiny_pipelines.build_pipeline(kind, 0).save_pretrained(folder)
        return
    import beside
    import diffusers
    from transformers import Gemma2Config, Gemma2Model, T5Config, T5EncoderModel

    sprint = kind == "sana-sprint"
    parts: dict[str, Any]
    if sprint:
        config = Gemma2Config(vocab_size=64, hidden_size=2304, intermediate_size=9216, num_hidden_layers=encoder_layers)
        transformer = diffusers.SanaTransformer2DModel(
            num_attention_heads=36,
            attention_head_dim=32,
            num_layers=28,
            num_cross_attention_heads=16,
            cross_attention_head_dim=72,
            cross_attention_dim=1152,
            guidance_embeds=True,
            qk_norm="rms_norm_across_heads",
            timestep_scale=1.0,
        )
        parts = {"text_encoder": Gemma2Model(config), "vae": beside.dcae(False), "transformer": transformer}
        scheduler: Any = diffusers.SCMScheduler()
        cls = diffusers.SanaSprintPipeline
    else:
        shape = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": encoder_layers}
        encoder = T5EncoderModel(T5Config(vocab_size=64, feed_forward_proj="gated-gelu", **shape))
        parts = {"text_encoder": encoder, "vae": beside.kl(False), "transformer": beside.pixart(False)}
        scheduler = diffusers.DPMSolverMultistepScheduler(**tiny_pipelines.DPM_VP)
        cls = diffusers.PixArtSigmaPipeline
    for index, part in enumerate(parts.values()):
        tiny_pipelines.randomize(part, index)
    tokenizer = tiny_pipelines.word_tokenizer(bos=sprint)
    cls(scheduler=scheduler, tokenizer=tokenizer, **parts).save_pretrained(folder)


def run(command: Sequence[str]) -> tuple[float, int]:
    """Seconds from starting the process to its end, and its peak of resident bytes."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(errors.read().decode(errors="replace")[-2000:])
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(options: argparse.Namespace, place: Path) -> dict[str, list[tuple[float, int]]]:
    """Seconds and bytes of each round, by contender."""
    for kind in ("sana-sprint", "pixart-sigma"):
        command = [sys.executable, __file__, "--build", kind, str(place / kind)]
        more = ["--encoder-layers", str(options.encoder_layers), *(["--quick"] if options.quick else [])]
        subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL)
    edgedit = [sys.executable, "-m", "edgedit"]
    bundle = str(place / "sprint.edgedit")
    subprocess.run(
        [*edgedit, "convert", str(place / "sana-sprint"), "-o", bundle, "--dtype", "w8a8", "-q"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    side = str(options.pixels)
    if options.tune:
        subprocess.run([*edgedit, "tune", bundle, "--size", f"{side}x{side}", "--time", options.tune], check=True)
    (ours, few), (theirs, many) = STEPS.items()
    generate = [*edgedit, "generate", PROMPT, "-m", bundle, "--size", f"{side}x{side}", "--no-cache", "-q", "-s", "1"]
    other = [sys.executable, "-c", DIFFUSERS, str(place / "pixart-sigma")]
    commands = {
        ours: [*generate, "--steps", str(few), "-o", str(place / "ours.png")],
        theirs: [*other, str(many), side, str(place / "theirs.png"), PROMPT],
    }
    found: dict[str, list[tuple[float, int]]] = {label: [] for label in commands}
    for _ in range(options.rounds):
        for label, command in commands.items():
            found[label].append(run(command))
    return found


def markdown(found: dict[str, list[tuple[float, int]]], options: argparse.Namespace) -> str:
    """A row for each contender; × say how many times as fast, and what part of the memory."""
    base = list(STEPS)[-1]
    seconds = {label: statistics.median(time for time, _ in rounds) for label, rounds in found.items()}
    peaks = {label: max(peak for _, peak in rounds) for label, rounds in found.items()}
    setting = f"{options.rounds} rounds in turns, text encoders of {options.encoder_layers} layers"
    lines = [
        f"From process start to a picture of {options.pixels} px, {setting}",
        "",
        "| | steps | s | × as fast | peak MB | × memory |",
        "|---|---|---|---|---|---|",
    ]
    for label, steps in STEPS.items():
        lines.append(
            f"| {label} | {steps} | {seconds[label]:.4g} | {seconds[base] / seconds[label]:.2f} "
            f"| {peaks[label] / 1e6:.0f} | {peaks[label] / peaks[base]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--encoder-layers", type=int, default=4)
    parser.add_argument("--tune", metavar="TIME", help="tune the bundle first, for about this long")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--build", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.build:
        kind, folder = options.build
        build(kind, Path(folder), quick=options.quick, encoder_layers=options.encoder_layers)
        return
    with tempfile.TemporaryDirectory(prefix="edgedit-picture-") as place:
        found = measure(options, Path(place))
    options.out.mkdir(parents=True, exist_ok=True)
    table = markdown(found, options)
    (options.out / "picture.json").write_text(json.dumps(found, indent=2) + "\n")
    (options.out / "picture.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
