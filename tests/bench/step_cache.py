"""What step caches save and what they cost: time of a picture, likeness to the picture without, claims that hold.

    python tests/bench/step_cache.py [BUNDLE] [--prompts 100] [--steps 20] [--policies taylor:2 taylor:3 ...]

Draws held-out prompts of the embedded model's world, each with every policy in turn, so that all of them share the
machine's moods. BUNDLE must be a model of that world for the claims to mean anything; the embedded one by default.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np

import edgedit
from edgedit.converters.training.evaluate import Picture, held_out_prompts, score
from edgedit.converters.training.similarity import psnr

POLICIES = ("taylor:2", "taylor:3", "taylor:4", "delta:2", "delta:3", "first-block:0.1", "first-block:0.2")


def measure(
    bundle: str, count: int, steps: int | None, policies: Sequence[str], threads: int | None, sampler: str | None
) -> list[str]:
    """Rows of a Markdown table, the first one without a cache."""
    prompts = held_out_prompts(count, seed=11)
    names = ["off", *policies]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    reused: dict[str, int] = dict.fromkeys(names, 0)
    pictures: dict[str, list[Picture]] = {name: [] for name in names}
    evaluations = 0
    pipes = {name: edgedit.load(bundle, threads=threads) for name in names}
    for number, prompt in enumerate(prompts):
        for name in names:
            seen: list[bool] = []
            began = time.perf_counter()
            latents = (
                pipes[name]
                .generate(
                    prompt.text,
                    seed=prompt.seed,
                    steps=steps,
                    sampler=sampler,
                    step_cache=name,
                    decode=False,
                    on_step=lambda state, seen=seen: seen.append(state.reused),
                )
                .latents
            )
            if number:  # the first opens the sessions
                seconds[name].append(time.perf_counter() - began)
            pictures[name].append(np.asarray(pipes[name].decode(latents)[0]))
            reused[name] += sum(seen)
            evaluations = len(seen)
    rows = ["| policy | steps that reuse | denoising | PSNR to none | all claims right |", "|---|---|---|---|---|"]
    whole = statistics.median(seconds["off"])
    for name in names:
        tables, _ = score(pictures[name], prompts)
        right = f"{100 * tables['all prompts']['all']['share']:.1f} %"
        likeness = [psnr(a, b) for a, b in zip(pictures[name], pictures["off"], strict=True)]
        close = "" if name == "off" else f"{np.mean(likeness):.1f} dB"
        share = f"{reused[name] / count:.1f} of {evaluations}"
        rows.append(f"| {name} | {share} | {whole / statistics.median(seconds[name]):.2f}× | {close} | {right} |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="builtin")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler", help="the bundle's own by default; none that draws all noise afresh")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    options = parser.parse_args(arguments)
    rows = measure(options.bundle, options.prompts, options.steps, options.policies, options.threads, options.sampler)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
