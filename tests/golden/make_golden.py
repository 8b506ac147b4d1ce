"""Writes the golden vectors beside this file: what an implementation in another language is tested against.

    python tests/golden/make_golden.py

Numbers are float32 in the shortest decimal form that reads back as the same float32 (levels are float64). The test
beside this file checks every one of them against diffusers, torch and tokenizers, without the code used here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.api import BUILTIN
from edgedit.bundle import open_bundle
from edgedit.guidance import Guidance
from edgedit.noise import make_noise
from edgedit.positions import pos_embed_table
from edgedit.schedules import make_schedule, schedule_config_from_diffusers
from edgedit.solvers import make_solver
from edgedit.text import Tokenizer

HERE = Path(__file__).parent

SEEDS = (0, 7, 2**32 + 5, 2**64 - 1)
_VP = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
#: diffusers' scheduler class, its configuration, steps.
SCHEDULES: list[tuple[str, dict[str, Any], int]] = [
    ("DPMSolverMultistepScheduler", _VP, 1),
    ("DPMSolverMultistepScheduler", _VP, 20),
    ("DPMSolverMultistepScheduler", {**_FLOW}, 14),
    ("DDIMScheduler", {**_VP, "clip_sample": False}, 10),
    ("EulerDiscreteScheduler", {**_VP}, 12),
    ("HeunDiscreteScheduler", {**_VP}, 5),
    ("UniPCMultistepScheduler", {**_VP}, 9),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 8),
]
PROMPTS = (
    "",
    "a red circle above a blue square on a white background",
    "  A Green   Triangle, inside a YELLOW ring!  ",
    "crème brûlée & 東京 \N{ROCKET} 1234567890",
    "red " * 60,
)


def numbers(array: Any) -> list[Any]:
    """Nested lists of the shortest decimals that read back as the same float32."""
    values = np.asarray(array, np.float32)
    return [numbers(row) for row in values] if values.ndim > 1 else [float(str(value)) for value in values]


def noise() -> list[dict[str, Any]]:
    """Three draws of each kind and seed, of different lengths."""
    found = []
    for kind in ("philox", "torch"):
        for seed in SEEDS:
            stream = make_noise(kind, seed)
            found.append({"kind": kind, "seed": seed, "draws": [numbers(stream.normal((n,))) for n in (20, 5, 33)]})
    return found


def schedules() -> list[dict[str, Any]]:
    """What the network is told, and the levels of noise."""
    found = []
    for name, settings, steps in SCHEDULES:
        config = schedule_config_from_diffusers(name, settings)
        schedule = make_schedule(config, steps)
        found.append(
            {
                "diffusers": {"class": name, "config": settings},
                "schedule": config,
                "steps": steps,
                "path": schedule.path,
                "prediction": schedule.prediction,
                "sampler": schedule.sampler,
                "init_noise_scale": schedule.init_noise_scale,
                "timesteps": numbers(schedule.timesteps),
                "input_scales": [schedule.input_scale(i) for i in range(len(schedule))],
                "alphas": schedule.alphas.tolist(),
                "sigmas": schedule.sigmas.tolist(),
            }
        )
    return found


def solvers() -> list[dict[str, Any]]:
    """Every latent of a run in which the network's answers are drawn numbers."""
    found = []
    for index, entry in enumerate(schedules()):
        schedule = make_schedule(entry["schedule"], entry["steps"])
        solver = make_solver(schedule.sampler, schedule)
        source = make_noise("philox", 100 + index)
        shape = (1, 2, 2, 3)
        first = (source.normal(shape) * np.float32(schedule.init_noise_scale)).astype(np.float32)
        outputs = [source.normal(shape) for _ in range(len(schedule))]
        latents, current = [], first
        for i, output in enumerate(outputs):
            current = solver.step(i, current, output, make_noise("philox", 0).normal)
            latents.append(current)
        found.append(
            {
                "schedule": index,
                "shape": list(shape),
                "first": numbers(first.ravel()),
                "outputs": [numbers(output.ravel()) for output in outputs],
                "latents": [numbers(latent.ravel()) for latent in latents],
            }
        )
    return found


def guidance() -> list[dict[str, Any]]:
    """Both formulas and every renormalisation."""
    source = make_noise("philox", 200)
    cond, uncond = source.normal((2, 3, 4)), source.normal((2, 3, 4))
    found = []
    for formula in ("uncond", "cond"):
        for renormalise, factor in ((None, 1.0), ("row", 1.0), ("clamp", 1.1), ("std", 0.7)):
            rule = Guidance(formula=formula, renormalise=renormalise, renormalise_factor=factor)
            result = rule.apply(cond, uncond, 4.5)
            found.append({"guidance": rule.to_manifest(), "scale": 4.5, "result": numbers(result)})
    return [{"cond": numbers(cond), "uncond": numbers(uncond), "cases": found}]


def tokens() -> dict[str, Any]:
    """The embedded model's prompt recipe on prompts that test folding, padding and cutting."""
    bundle = open_bundle(BUILTIN)
    recipe = bundle.need(bundle.manifest.prompt, "prompt")
    tokenizer = Tokenizer(bundle.file(recipe.tokenizer), recipe)
    cases = []
    for prompt in PROMPTS:
        for negative in (False, True):
            encoded = tokenizer.encode(prompt, negative=negative)
            cases.append(
                {
                    "prompt": prompt,
                    "negative": negative,
                    "ids": encoded.ids.tolist(),
                    "mask": encoded.mask.tolist(),
                    "tokens": encoded.n_tokens,
                }
            )
    return {"prompt": bundle.manifest.raw["prompt"], "cases": cases}


def positions() -> list[dict[str, Any]]:
    """Tables of positions of grids that are not square."""
    found = []
    for dim, patch, base, scale, height, width in ((8, 2, 8, 1.0, 4, 6), (12, 1, 16, 2.0, 3, 2)):
        section = {
            "kind": "sincos_2d",
            "dim": dim,
            "patch_size": patch,
            "base_size": base,
            "interpolation_scale": scale,
        }
        table = pos_embed_table(section, height, width)
        found.append({"positions": section, "height": height, "width": width, "table": numbers(table[0])})
    return found


def main() -> None:
    """Write all files."""
    for name, content in (
        ("noise", noise()),
        ("schedules", schedules()),
        ("solvers", solvers()),
        ("guidance", guidance()),
        ("tokens", tokens()),
        ("positions", positions()),
    ):
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
