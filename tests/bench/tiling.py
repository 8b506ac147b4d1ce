"""Tiled decoding measured: quality beside diffusers' own tiling, peak memory by height, time against the whole.

    python tests/bench/tiling.py quality --kind kl --side 512 --heat-map heat.png
    python tests/bench/tiling.py memory --kind sdxl --width 1024 --heights 2048 8192 32768 --max-memory 2G
    python tests/bench/tiling.py memory --kind dcae --width 16384 --heights 2048 --max-memory 3G
    python tests/bench/tiling.py memory --kind sdxl --width 4096 --heights 4096 --max-memory 2G --one-tile
    python tests/bench/tiling.py time --kind sdxl --side 1024
    python tests/bench/tiling.py end-to-end --side 4096 --steps 2 --max-memory 8G

Kinds: scenes (the embedded model's decoder), kl, kl3, kl2, dc, tiny (small, random), sdxl, dcae, taesd (real sizes,
random).
`end-to-end` draws with SANA-0.6B's transformer and the DC-AE, random, behind a tiny text encoder, in 4096-pixel
settings whatever the side; it needs 10 GB of disk.
Everything is decoded in a child process of its own, so that a peak is that of one decode. With `--one-tile` a child
runs one tile of every pass over maps that are all there: the peak is that of the whole decode, hours later.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

KL_WIDTHS = {"kl": (32, 64, 64, 64), "kl3": (64, 64, 32), "kl2": (32, 64), "sdxl": (128, 256, 512, 512)}
LEVELS = ("DownEncoderBlock2D", "UpDecoderBlock2D")


def make(kind: str) -> Any:
    """A diffusers autoencoder; its weights are drawn as torch draws them unless it is the embedded model's."""
    import diffusers
    import torch

    torch.manual_seed(0)
    if kind == "scenes":
        return diffusers.AutoencoderKL.from_pretrained(ROOT / "models" / "scenes" / "vae")
    if kind in KL_WIDTHS:
        widths = KL_WIDTHS[kind]
        return diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=LEVELS[:1] * len(widths),
            up_block_types=LEVELS[1:] * len(widths),
            layers_per_block=2,
            latent_channels=4,
            sample_size=256,
        )
    if kind in ("dc", "dcae"):
        small = kind == "dc"
        widths = (16, 32, 64, 64) if small else (128, 256, 512, 512, 1024, 1024)
        deep = 2 if small else 3
        shallow = len(widths) - deep
        types = ("ResBlock",) * shallow + ("EfficientViTBlock",) * deep
        scales = ((),) * shallow + ((5,),) * deep
        return diffusers.AutoencoderDC(
            latent_channels=32,
            attention_head_dim=32,
            encoder_block_types=types,
            decoder_block_types=types,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(2,) * len(widths),
            decoder_layers_per_block=(3,) * len(widths),
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        )
    width = 16 if kind == "tiny" else 64
    return diffusers.AutoencoderTiny(encoder_block_out_channels=(width,) * 4, decoder_block_out_channels=(width,) * 4)


def prepare(kind: str, folder: Path) -> Path:
    """The kind's bundle in `folder`, made when it is not there."""
    import edgedit

    bundle = folder / f"{kind}.edgedit"
    if not bundle.exists():
        make(kind).eval().save_pretrained(folder / kind)
        edgedit.convert(folder / kind, bundle, components=["decoder"], measure=False)
    return bundle


def patchwork(channels: int, height: int, width: int, patches: int = 6) -> np.ndarray:
    """Latents of flat patches: their statistics differ from tile to tile, as a picture's do."""
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((1, channels, patches, patches)).astype(np.float32)
    rows, columns = (np.arange(n) * patches // n for n in (height, width))
    return coarse[:, :, rows][:, :, :, columns]


def child(
    bundle: Path, height: int, width: int, mode: str, tile: int | None, memory: str | None, out: str, one_tile: bool
) -> None:
    """Decode; print seconds, peak and planned bytes and tiles as JSON. The picture goes to `out` unless empty.

    `one_tile`: run one tile of every pass only, where there are tiles.
    """
    from edgedit.bundle import open_bundle
    from edgedit.device import peak_memory, resident_memory
    from edgedit.runtimes.base import RuntimeOptions, open_runtime
    from edgedit.tiling.component import Tiling, choose, run
    from edgedit.tiling.memory import whole_peak

    opened = open_bundle(bundle)
    runtime = open_runtime(opened, "onnx", RuntimeOptions())
    spec = opened.component("decoder").inputs[0]
    runtime.describe()
    latents = patchwork(int(spec.shape[1]), height, width)
    tiling = Tiling(mode, tile, None, memory)
    held = resident_memory()
    pieces, schedule = choose(opened, runtime, "decoder", height, width, tiling)
    assert pieces is not None
    planned = held + (whole_peak(pieces, height, width) if schedule is None else schedule.peak)
    bands: list[np.ndarray] = []
    started = time.perf_counter()

    def keep(_: int, rows: np.ndarray) -> None:
        if out:
            bands.append(rows.copy())

    if one_tile and schedule is not None:
        from tile_probe import run_one_tile

        lean = memory is not None

        def open_piece(graph: str) -> Any:
            return runtime.open_piece("decoder", graph, lean=lean)  # type: ignore[attr-defined]

        run_one_tile(pieces, open_piece, latents, schedule.program)
    else:
        run(opened, runtime, "decoder", latents, tiling, keep, lambda lean: runtime.open("decoder", lean=lean))
    seconds = time.perf_counter() - started
    if out:
        np.save(out, np.concatenate(bands, axis=2))
    facts = {"mode": "whole", "tile": 0, "halo": 0, "scratch": 0.0}
    if schedule is not None:
        facts = {"mode": schedule.mode, "tile": schedule.tile, "halo": schedule.halo, "scratch": schedule.scratch}
    print(json.dumps({"seconds": seconds, "peak": peak_memory(), "planned": planned, **facts}))


def decode(bundle: Path, height: int, width: int, mode: str, **options: Any) -> dict[str, Any]:
    """`child` in a process of its own."""
    command = [sys.executable, __file__, "child", str(bundle), str(height), str(width), mode, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def factor_of(bundle: Path) -> int:
    from edgedit.bundle import open_bundle

    return int(open_bundle(bundle).component("decoder").config["scale_factor"])  # type: ignore[call-overload]


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    error = float(np.mean((np.clip(found, -1, 1) - np.clip(wanted, -1, 1)) ** 2, dtype=np.float64))
    return float("inf") if error == 0 else 10 * float(np.log10(4 / error))


def largest_step(found: np.ndarray, wanted: np.ndarray, tile: int) -> float:
    """The largest mean jump of the error from one side of a tile's border to the other."""
    error = found - wanted
    steps = [0.0]
    for axis in (2, 3):
        for place in range(tile, error.shape[axis], tile):
            a, b = (np.take(error, i, axis=axis) for i in (place - 1, place))
            steps.append(float(np.abs((b - a).mean(axis=-1)).max()))
    return max(steps)


def diffusers_tiles(kind: str, latents: np.ndarray, tile: int) -> tuple[np.ndarray, int]:
    """diffusers' own tiled decode with tiles of `tile` pixels, and the distance of its borders."""
    import torch

    model = make(kind).eval()
    factor = 8 if not kind.startswith("dc") else model.spatial_compression_ratio
    if kind.startswith("dc"):
        stride = tile * 7 // 8
        model.enable_tiling(tile, tile, stride, stride)
    else:
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size = tile, tile // factor
        overlap = getattr(model, "tile_overlap_factor", 0.25)
        stride = int(tile * (1 - overlap))
    with torch.no_grad():
        return model.decode(torch.from_numpy(latents), return_dict=False)[0].numpy(), stride


def quality(options: argparse.Namespace, folder: Path) -> None:
    bundle = prepare(options.kind, folder)
    factor = factor_of(bundle)
    side = options.side // factor
    out = {name: str(folder / f"{name}.npy") for name in ("off", "exact", "fast")}
    for mode in out:
        extra = {} if mode == "off" else {"tile": options.tile, "memory": options.max_memory}
        decode(bundle, side, side, mode, out=out[mode], **extra)
    wanted = np.load(out["off"])
    from edgedit.bundle import open_bundle

    channels = int(open_bundle(bundle).component("decoder").inputs[0].shape[1])
    theirs, stride = diffusers_tiles(options.kind, patchwork(channels, side, side), options.tile or 256)
    rows = {"diffusers": (theirs, stride)}
    rows |= {mode: (np.load(out[mode]), options.tile or 256) for mode in ("fast", "exact")}
    print("| tiles | PSNR | max abs | largest step at a border | equal bytes |\n|---|---|---|---|---|")
    for name, (found, border) in rows.items():
        same = np.mean(np.round(np.clip(found, -1, 1) * 127.5) == np.round(np.clip(wanted, -1, 1) * 127.5))
        print(
            f"| {name} | {psnr(found, wanted):.1f} dB | {np.abs(found - wanted).max():.1e} | "
            f"{largest_step(found, wanted, border):.1e} | {100 * same:.3f} % |"
        )
    if options.heat_map:
        heat_map(Path(options.heat_map), [np.abs(found - wanted)[0].max(0) for found, _ in rows.values()])


def heat_map(path: Path, errors: list[np.ndarray]) -> None:
    """Side by side, on one logarithmic scale from 1e-7 (black) to 1 (white): diffusers, fast, exact."""
    from PIL import Image

    panels = [np.clip((np.log10(np.maximum(e, 1e-7)) + 7) / 7, 0, 1) for e in errors]
    Image.fromarray((np.concatenate(panels, axis=1) * 255).astype(np.uint8)).save(path)


def memory(options: argparse.Namespace, folder: Path) -> None:
    bundle = prepare(options.kind, folder)
    factor = factor_of(bundle)
    print("| size | mode | tile | halo | scratch GB | peak GB | planned GB | s |\n|---|---|---|---|---|---|---|---|")
    for height in options.heights:
        found = decode(
            bundle,
            height // factor,
            options.width // factor,
            options.mode,
            memory=options.max_memory,
            tile=options.tile,
            one_tile=options.one_tile,
        )
        print(
            f"| {options.width}x{height} | {found['mode']} | {found['tile']} | {found['halo']} | "
            f"{found['scratch'] / 1e9:.2f} | {found['peak'] / 1e9:.2f} | {found['planned'] / 1e9:.2f} | "
            f"{found['seconds']:.0f} |",
            flush=True,
        )


def timing(options: argparse.Namespace, folder: Path) -> None:
    bundle = prepare(options.kind, folder)
    side = options.side // factor_of(bundle)
    whole = decode(bundle, side, side, "off")["seconds"]
    print(f"whole {whole:.1f} s")
    for mode in ("exact", "fast"):
        found = decode(bundle, side, side, mode, memory=options.max_memory, tile=options.tile)
        print(f"{mode} ({found['mode']}): {found['seconds']:.1f} s, {found['seconds'] / whole:.2f} times the whole")


def prepare_sana(folder: Path, *, tiny: bool) -> Path:
    """A bundle with SANA-0.6B's 4K transformer and the DC-AE in `folder`; `tiny` ones to try the script."""
    import diffusers
    import torch
    from tiny_pipelines import DPM_FLOW, build_pipeline

    import edgedit

    name = "sana-tiny" if tiny else "sana"
    bundle = folder / f"{name}.edgedit"
    if bundle.exists():
        return bundle
    pipeline = build_pipeline("sana", 0)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(**{**DPM_FLOW, "flow_shift": 6.0})
    torch.manual_seed(0)
    if not tiny:
        pipeline.vae = make("dcae")
        pipeline.transformer = diffusers.SanaTransformer2DModel(
            num_attention_heads=36,
            num_layers=28,
            num_cross_attention_heads=16,
            cross_attention_head_dim=72,
            cross_attention_dim=1152,
            caption_channels=pipeline.text_encoder.config.hidden_size,
            sample_size=128,
            interpolation_scale=2.0,
        )
    pipeline.save_pretrained(folder / name)
    edgedit.convert(folder / name, bundle, components=["text_encoder", "transformer", "decoder"], measure=False)
    return bundle


def draw_child(bundle: Path, side: int, steps: int, memory: str | None) -> None:
    """Draw one picture into a PNG band by band; print seconds and the process's peak after every stage as JSON."""
    import edgedit
    from edgedit.device import peak_memory
    from edgedit.png_rows import png_rows
    from edgedit.tiling.component import Tiling

    stages: list[tuple[str, float, int]] = []
    started = time.perf_counter()

    def note(name: str) -> None:
        stages.append((name, time.perf_counter() - started, peak_memory() or 0))

    with edgedit.load(bundle, low_ram=True, use_cache=False, on_stage=note) as pipe:
        drawn = pipe.generate("a red cat", seed=0, steps=steps, width=side, height=side, decode=False)
        with tempfile.TemporaryDirectory() as place, png_rows(Path(place) / "a.png", side, side, None) as rows:
            pipe.decode_rows(drawn.latents, rows, Tiling(max_memory=memory))
    note("end")
    print(json.dumps(stages))


def end_to_end(options: argparse.Namespace, folder: Path) -> None:
    bundle = prepare_sana(folder, tiny=options.tiny)
    arguments = [str(bundle), str(options.side), str(options.steps), options.max_memory or ""]
    done = subprocess.run([sys.executable, __file__, "draw", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    stages = json.loads(done.stdout.splitlines()[-1])
    print("| stage | s | peak GB at its end |\n|---|---|---|")
    for (name, begun, _), (_, ended, peak) in itertools.pairwise(stages):
        print(f"| {name} | {ended - begun:.1f} | {peak / 1e9:.2f} |")


def main() -> None:
    if sys.argv[1:2] == ["draw"]:
        draw_child(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] or None)
        return
    if sys.argv[1:2] == ["child"]:
        _, _, bundle, height, width, mode, options = sys.argv
        asked = json.loads(options)
        place, one_tile = asked.get("out", ""), asked.get("one_tile", False)
        child(Path(bundle), int(height), int(width), mode, asked.get("tile"), asked.get("memory"), place, one_tile)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "memory", "time", "end-to-end"])
    parser.add_argument("--kind", default="kl")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heights", type=int, nargs="+", default=[2048])
    parser.add_argument("--tile", type=int)
    parser.add_argument("--mode", default="exact")
    parser.add_argument("--max-memory")
    parser.add_argument("--one-tile", action="store_true", help="memory: run one tile of every pass only")
    parser.add_argument("--heat-map")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="end-to-end with tiny networks, to try the script")
    parser.add_argument("--folder", type=Path, help="where bundles are kept between runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        {"quality": quality, "memory": memory, "time": timing, "end-to-end": end_to_end}[options.what](options, folder)


if __name__ == "__main__":
    main()
