"""Pictures a second of `edgedit batch`, of `generate` in a loop, and of diffusers in a loop; and what a million take.

    python tests/bench/batch_throughput.py --pictures 60 --write docs/batch.md

Each way draws the same prompts and seeds at the embedded model's own settings, on the same cores, in a process of its
own, after the others have ended. Loading is counted for none of the loops, and for `batch` with `--whole` only: its
rate is taken between the first and the last picture that its index records.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PROMPTS = (
    "a red circle above a blue square on a white background",
    "three small purple rings on a white background",
    "a large green star to the left of a small yellow heart on a black background",
    "a pink heart in the centre",
)
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def jobs(count: int, steps: int | None) -> list[dict[str, Any]]:
    """The same jobs for every way of drawing them."""
    extra = {} if steps is None else {"steps": steps}
    return [{"id": f"p{i}", "prompt": PROMPTS[i % len(PROMPTS)], "seed": i, **extra} for i in range(count)]


def loop_edgedit(work: list[dict[str, Any]], folder: Path, cores: int) -> float:
    """Seconds a picture of `Pipeline.generate` in a loop, saving included."""
    import edgedit
    from edgedit.metadata import save_image

    with edgedit.load(threads=cores) as pipe:

        def draw(job: dict[str, Any]) -> None:
            result = pipe.generate(job["prompt"], seed=job["seed"], steps=job.get("steps"))
            save_image(result.images[0], folder / f"{job['id']}.png", result.recipe)

        return _timed(draw, work)


def loop_diffusers(work: list[dict[str, Any]], folder: Path, cores: int) -> float:
    """Seconds a picture of the diffusers pipeline in a loop, saving included."""
    import torch
    from diffusers import DiffusionPipeline

    import edgedit

    torch.set_num_threads(cores)
    recommended = edgedit.load().bundle.manifest.recommended
    assert recommended is not None
    pipe = DiffusionPipeline.from_pretrained(ROOT / "models" / "scenes", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw(job: dict[str, Any]) -> None:
        image = pipe(
            job["prompt"],
            num_inference_steps=job.get("steps", recommended.steps),
            guidance_scale=recommended.guidance_scale,
            width=recommended.width,
            height=recommended.height,
            generator=torch.Generator().manual_seed(job["seed"]),
            clean_caption=False,
            use_resolution_binning=False,
        ).images[0]
        image.save(folder / f"{job['id']}.png")

    return _timed(draw, work)


def _timed(draw: Callable[[dict[str, Any]], None], work: list[dict[str, Any]]) -> float:
    draw(work[0])
    started = time.perf_counter()
    for job in work:
        draw(job)
    return (time.perf_counter() - started) / len(work)


def batch(work: list[dict[str, Any]], folder: Path, cores: int) -> tuple[float, float, dict[str, float]]:
    """(seconds a picture between the first and the last, the same from process start, facts of the run)."""
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(job) + "\n" for job in work))
    command = [sys.executable, "-m", "edgedit", "batch", str(path), "-o", str(folder / "out"), "-q"]
    started = time.perf_counter()
    subprocess.run([*command, "-w", str(cores), "-t", "1"], check=True)
    whole = time.perf_counter() - started
    entries = [json.loads(line) for line in (folder / "out" / "index.jsonl").read_text().splitlines()]
    times = sorted(entry["finished"] for entry in entries)
    hidden = sum(f.stat().st_size for f in (folder / "out" / ".batch").rglob("*") if f.is_file())
    facts = {
        "bytes": sum(entry["bytes"] for entry in entries) / len(entries),
        "index": (folder / "out" / "index.jsonl").stat().st_size / len(entries),
        "hidden": hidden / len(entries),
    }
    # With several workers the first pictures come together, so they are left out on both sides.
    return (times[-1] - times[cores - 1]) / (len(times) - cores), whole / len(work), facts


def table(name: str, cores: int, count: int, rows: dict[str, float], whole: float, facts: dict[str, float]) -> str:
    """The measured part of the page."""
    best = rows["batch"]
    lines = [
        f"{count} pictures of the embedded model (128×128, 20 steps, guided), {cores} cores of {name}:",
        "",
        "| way | seconds a picture | pictures an hour | `batch` is faster by |",
        "|---|---|---|---|",
    ]
    names = {"batch": "`edgedit batch`", "generate": "`generate` in a loop", "diffusers": "diffusers in a loop"}
    for key, seconds in rows.items():
        lines.append(f"| {names[key]} | {seconds:.3f} | {3600 / seconds:,.0f} | {seconds / best:.2f}× |")
    hours = 1e6 * best / 3600
    disk = (facts["bytes"] + facts["index"] + facts["hidden"]) * 1e6 / 1e9
    lines += [
        "",
        f"From process start, loading included, `edgedit batch` took {whole:.3f} s a picture.",
        "",
        "| a million of these pictures | |",
        "|---|---|",
        f"| machine-hours on such a machine | {hours:,.0f} |",
        f"| wall clock on 100 such machines (`--shard`) | {hours / 100:,.1f} h |",
        f"| pictures on disk | {facts['bytes'] * 1e6 / 1e9:,.1f} GB ({facts['bytes'] / 1e3:.1f} kB each) |",
        f"| index | {facts['index'] * 1e6 / 1e9:,.1f} GB ({facts['index'] / 1e3:.1f} kB each) |",
        f"| all of the output folder | {disk:,.1f} GB |",
    ]
    return "\n".join(lines)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> None:
    """Measure, print, and put the figures between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--steps", type=int, help="instead of the model's own, to see that the script works")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", type=Path, help="page with the marks")
    parser.add_argument("--loop", choices=("generate", "diffusers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = jobs(options.pictures, options.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.loop:
            loop = loop_edgedit if options.loop == "generate" else loop_diffusers
            print(json.dumps(loop(work, folder, options.cores)))
            return
        rows: dict[str, float] = {}
        rows["batch"], whole, facts = batch(work, folder, options.cores)
    arguments = ["--pictures", str(options.pictures), "--cores", str(options.cores)]
    arguments += [] if options.steps is None else ["--steps", str(options.steps)]
    for way in ("generate", "diffusers"):
        command = [sys.executable, __file__, *arguments, "--loop", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[way] = float(done.stdout.splitlines()[-1])
    text = table(_cpu(), options.cores, options.pictures, rows, whole, facts)
    print(text)
    if options.write is not None:
        page = options.write.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, mark, after = rest.partition(END)
        if not mark:
            sys.exit(f"{options.write}: the marks {BEGIN} and {END} are missing")
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
