"""A transformer's step or a decoder at full size, with random weights, beside torch and what other tools export.

    python tests/bench/beside.py sana pixart lit dcae kl embedded [--batch 1 2] [--pixels 1024] [--out build/bench]
                                 [--vs diffusers ort-export openvino openvino-w8a8] [--dtypes w8a8 fp32]

Every case is one interleaved run: the bundle in each of `--dtypes` on ONNX Runtime and on OpenVINO, and each of `--vs`
with the same weights (`lit`: with those of the softmax model of the same size, whose outputs are its own). Decoders in
int8 are calibrated; the noise that is timed lies outside of the ranges of pictures, so their likeness is low. Prints a
Markdown table a case and batch, with ratios to torch and to ONNX Runtime's float32, and how near the outputs are.
`--quick` takes networks of a few thousand weights. At full size a case takes up to an hour on two cores, 10 GB of disk
and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from attention_references import REFERENCES
from tiny_pipelines import build_pipeline, randomize

import edgedit
from edgedit.benchmark import BenchmarkReport, benchmark
from edgedit.device import available_cores, processor_name

ENGINES = ("onnxruntime", "openvino")


def sana(quick: bool) -> torch.nn.Module:
    """SANA 0.6B."""
    heads, layers = (2, 2) if quick else (36, 28)
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
    if not quick:
        cross = {"num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152}
    size = {"in_channels": 4, "out_channels": 4, "caption_channels": 64} if quick else {}
    return diffusers.SanaTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=32, num_layers=layers, **cross, **size
    )


def pixart(quick: bool) -> torch.nn.Module:
    """PixArt-Sigma, 1024 pixels."""
    shape: dict[str, Any] = {"num_layers": 28, "caption_channels": 4096, "sample_size": 128, "interpolation_scale": 2}
    if quick:
        shape = {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "cross_attention_dim": 64,
            "caption_channels": 64,
            "sample_size": 8,
        }
    return diffusers.PixArtTransformer2DModel(use_additional_conditions=False, **shape)


def lit(quick: bool) -> torch.nn.Module:
    """PixArt-Sigma with LiT's linear attention in every block."""
    model = pixart(quick)
    config = model.config
    width, heads = config["num_attention_heads"] * config["attention_head_dim"], _lit_heads(quick)
    for block in model.transformer_blocks:
        block.attn1 = REFERENCES["lit"](width, heads, kernel_size=5)
    return model


def _lit_heads(quick: bool) -> int:
    return 2 if quick else 4


def dcae(quick: bool) -> torch.nn.Module:
    """SANA's autoencoder (f32c32)."""
    if quick:
        from tiny_pipelines import _dc

        return _dc()
    return diffusers.AutoencoderDC(
        latent_channels=32,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def kl(quick: bool) -> torch.nn.Module:
    """The autoencoder of SDXL and PixArt-Sigma."""
    if quick:
        from tiny_pipelines import _kl

        return _kl()
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=1024,
        scaling_factor=0.13025,
    )


MODELS: dict[str, tuple[Callable[[bool], torch.nn.Module], str]] = {
    "sana": (sana, "transformer"),
    "pixart": (pixart, "transformer"),
    "lit": (lit, "transformer"),
    "dcae": (dcae, "decoder"),
    "kl": (kl, "decoder"),
}
CASES = (*MODELS, "embedded")


def save(name: str, folder: Path, quick: bool) -> None:
    """Write a case's network with random weights, as a component's folder of diffusers.

    A decoder is part of a pipeline whose other networks are tiny: calibration draws with it.
    """
    make, component = MODELS[name]
    model = make(quick)
    randomize(model, 0)
    if component == "decoder":
        pipeline = build_pipeline("sana" if name == "dcae" else "pixart-sigma", 0)
        pipeline.register_modules(vae=model)
        if name == "dcae":
            config = {
                **pipeline.transformer.config,
                **dict.fromkeys(("in_channels", "out_channels"), model.config["latent_channels"]),
            }
            pipeline.register_modules(transformer=diffusers.SanaTransformer2DModel.from_config(config))
            randomize(pipeline.transformer, 1)
        pipeline.save_pretrained(folder)
        return
    model.save_pretrained(folder)
    if name == "lit":
        layers = list(range(model.config["num_layers"]))
        entry = {"operator": "lit", "heads": _lit_heads(quick), "kernel_size": 5, "layers": layers}
        (folder / "edgedit.json").write_text(json.dumps({"attention": [entry]}))


def run(case: str, options: argparse.Namespace, place: Path) -> list[BenchmarkReport]:
    """One report for each batch."""
    component = "decoder" if case == "embedded" else MODELS[case][1]
    source = place / case
    if case == "embedded":
        source = Path(__file__).parents[2] / "models" / "scenes"
    else:
        save(case, source, options.quick)
    bundles = {dtype: place / f"{case}-{dtype}.edgedit" for dtype in options.dtypes}
    for dtype, path in bundles.items():
        calibration = "self" if component == "decoder" and dtype.endswith("a8") else None
        edgedit.convert(source, path, dtype=dtype, components=[component], calibration=calibration, measure=False)
    first, *rest = [f"{path}@{engine}" for path in bundles.values() for engine in ENGINES]
    known = source
    if case == "lit" and options.vs:
        known = place / "pixart"
        if not known.exists():
            save("pixart", known, options.quick)
    reports = []
    for batch in options.batch:
        reports.append(
            benchmark(
                first.partition("@")[0],
                vs=[*rest, *options.vs],
                source=known,
                engine=ENGINES[0],
                threads=options.threads,
                components=[component],
                width=_side(case, options.pixels),
                height=_side(case, options.pixels),
                length=options.length,
                batch=batch,
                repeat=options.repeat,
                rounds=options.rounds,
                reference=_reference(case, options, bundles),
                on_progress=lambda name, done, total: print(f"{done + 1}/{total} {name}", file=sys.stderr, flush=True),
            )
        )
    return reports


def _side(case: str, pixels: int) -> int:
    """Of a picture with as many latents: a bundle that holds only a transformer counts 8 pixels to a latent."""
    return pixels * 8 // 32 if case == "sana" else pixels


def _reference(case: str, options: argparse.Namespace, bundles: dict[str, Path]) -> str | None:
    """Torch; for a linearized model, which torch does not run here, its own float32 graph."""
    if case != "lit" and "diffusers" in options.vs:
        return "diffusers"
    if "fp32" not in bundles:
        return None
    return bundles["fp32"].name + ("" if options.dtypes[0] == "fp32" else f"@{ENGINES[0]}")


def markdown(case: str, report: BenchmarkReport, pixels: int) -> str:
    """A table; × columns say how many times as fast as torch, and as ONNX Runtime's float32, a contender is."""
    rows = {item.label: item.components[0] for item in report.contenders}
    torch_row = rows.get("diffusers")
    plain = next((part for label, part in rows.items() if "-fp32.edgedit" in label and "openvino" not in label), None)
    setting = f"{pixels} px, batch {report.batch}, {report.rounds} × {report.repeat} evaluations in turns"
    lines = [
        f"**{case}**, {setting}; {processor_name()}, {available_cores()} cores",
        "",
        "| contender | precision | median s | best s | × torch | × fp32 | cold s | peak MB | PSNR dB | rel. L2 |",
        "|---" * 10 + "|",
    ]
    for label, part in rows.items():
        fit = part.agreement
        cells = [
            f"{label}@{ENGINES[0]}" if label == report.bundle.name else label,
            part.precision,
            f"{part.median_seconds:.4g}",
            f"{part.best_seconds:.4g}",
            "" if torch_row is None else f"{torch_row.median_seconds / part.median_seconds:.2f}",
            "" if plain is None else f"{plain.median_seconds / part.median_seconds:.2f}",
            f"{part.cold_seconds:.3g}",
            "" if part.peak_rss is None else f"{part.peak_rss / 1e6:.0f}",
            "reference" if fit is None else f"{fit.psnr_db:.1f}",
            "" if fit is None else f"{fit.relative_l2:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    engines = {key: value for item in report.contenders for key, value in item.runtime.items()}
    versions = [f"{key} {engines[key]}" for key in ("onnxruntime", "openvino", "torch", "diffusers") if key in engines]
    return "\n".join([*lines, "", ", ".join(versions)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--length", type=int, default=300, help="text tokens")
    parser.add_argument("--dtypes", nargs="+", default=["w8a8", "fp32"])
    parser.add_argument("--vs", nargs="*", default=["diffusers", "ort-export", "openvino", "openvino-w8a8"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edgedit-beside-") as place:
        for case in options.cases:
            for report in run(case, options, Path(place)):
                name = f"{case}-b{report.batch}"
                table = markdown(case, report, options.pixels)
                (options.out / f"{name}.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
                (options.out / f"{name}.md").write_text(table)
                print(table, flush=True)


if __name__ == "__main__":
    main()
