"""What each preset costs in pictures: held-out prompts drawn at equal seeds, plain rounding beside the methods.

    python tests/bench/quantization.py --prompts 1000 -o quantization.md

For each form: size on disk against fp32, PSNR of the pictures against those of fp32, and the share of claims that the
scene reader finds right (for the embedded model, whose prompts make checkable claims).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edgedit
from edgedit.converters.training.evaluate import Picture, held_out_prompts, open_model, score
from edgedit.converters.training.similarity import psnr

MODEL = Path(__file__).parents[2] / "models" / "scenes"
FORMS = (
    "fp32",
    "fp16",
    "w8",
    "w8a8",
    "w8a8+",
    "w4",
    "w4+",
    "fp4",
    "fp4+",
    "w4a8",
    "w4a8+",
    "w3",
    "w3+",
    "w2",
    "w2+",
    "mixed:3.2M+",
    "mixed:35dB+",
)
"""Presets; with a plus sign, calibrated."""


def rows(source: Path, forms: Sequence[str], count: int, *, steps: int | None, seed: int) -> list[dict[str, Any]]:
    """One row a form; the first form is what the others are compared with."""
    prompts = held_out_prompts(count, seed=seed)
    found: list[dict[str, Any]] = []
    reference: list[Picture] = []
    size = {}
    for form in forms:
        with tempfile.TemporaryDirectory() as place:
            bundle = Path(place) / "model.edgedit"
            calibration = "self" if form.endswith("+") else None
            report = edgedit.convert(source, bundle, dtype=form.rstrip("+"), calibration=calibration, measure=False)
            size = {part.name: part.size for part in report.components}
            with open_model(bundle, steps=steps, guidance_scale=None) as draw:
                pictures = draw([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts])
            extra = {}
            record = bundle / "quantization" / "transformer.json"
            if record.exists() and "sensitivity" in (told := json.loads(record.read_text())):
                found_by = told["sensitivity"]
                extra = {"predicted_db": found_by["psnr_db"], "average_bits": found_by["average_bits"]}
        reference = reference or pictures
        tables, _ = score(pictures, prompts)
        table = tables["all prompts"]
        right = sum(row["right"] for name, row in table.items() if name != "all")
        total = sum(row["total"] for name, row in table.items() if name != "all")
        found.append(
            {
                "form": form,
                "bytes": size["transformer"],
                "ratio": size["transformer"] / (found[0]["bytes"] if found else size["transformer"]),
                "psnr_db": float(np.mean([psnr(a, b) for a, b in zip(pictures, reference, strict=True)])),
                "claims": right / total,
                "all_right": table["all"]["share"],
                **extra,
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = ["| weights | transformer | of fp32 | PSNR of pictures | claims right | pictures all right |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found:
        name = f"{row['form'].rstrip('+')}, calibrated" if row["form"].endswith("+") else row["form"]
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:.2f} MB | {row['ratio']:.3f} | {row['psnr_db']:.1f} dB "
            f"| {100 * row['claims']:.1f} % | {100 * row['all_right']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seed", type=int, default=4321)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("-o", "--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    found = rows(options.model, options.forms, options.prompts, steps=options.steps, seed=options.seed)
    if options.output is not None:
        options.output.write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
