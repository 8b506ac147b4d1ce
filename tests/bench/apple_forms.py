"""What each form of Core ML and MLX costs in pictures of the embedded model, off a Mac.

    python tests/bench/apple_forms.py --prompts 24 --steps 20 [--forms coreml:weights=int4 mlx:w4 …] [-o OUT.md]

Held-out prompts at equal seeds, each picture against that of ONNX Runtime in float32: PSNR, and whether the scene
reader finds every claim right. Core ML runs in the interpreter, float16 arithmetic emulated, MLX in its CPU build,
where `quantized_matmul` takes seconds for what the same product with opened weights does in milliseconds: weights
are opened first.
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
from edgedit.converters.coreml import CoremlOptions
from edgedit.converters.training.evaluate import Picture, Prompt, held_out_prompts, score
from edgedit.converters.training.similarity import psnr
from edgedit.pipeline import Pipeline

MODEL = Path(__file__).parents[2] / "models" / "scenes"
#: Backend and, behind the colon, `dtype`, with "+" calibrated; or with "weights=" a form of that backend alone.
FORMS = (
    "onnx:fp32",
    "coreml:fp16",
    "coreml:weights=int8",
    "coreml:weights=int4",
    "coreml:weights=palette8",
    "coreml:weights=palette6",
    "coreml:weights=palette4",
    "coreml:weights=palette2",
    "coreml:w4",
    "coreml:w4+",
    "coreml:w2",
    "coreml:w2+",
    "coreml:w8a8+",
    "mlx:fp16",
    "mlx:weights=q8",
    "mlx:weights=q4",
    "mlx:weights=mxfp4",
    "mlx:w4",
)


def convert(form: str, model: Path, bundle: Path) -> str:
    """Makes a bundle of one form; returns its backend."""
    backend, _, how = form.partition(":")
    weights = how.removeprefix("weights=") if how.startswith("weights=") else None
    options: dict[str, Any] = {"dtype": "fp16" if weights else how.removesuffix("+"), "measure": False}
    if how.endswith("+"):
        options["calibration"] = "self"
    if weights:
        options |= {"coreml": CoremlOptions(weights=weights)} if backend == "coreml" else {"mlx_weights": weights}
    edgedit.convert(model, bundle, to=(backend,), **options)
    return backend


def open_weights() -> None:
    """Have MLX multiply with dequantized weights: the same numbers, as its own tests and edgedit's say to 1e-3."""
    import mlx.core as mx

    def product(x: Any, w: Any, /, scales: Any, biases: Any = None, transpose: bool = True, **form: Any) -> Any:
        weight = mx.dequantize(w, scales, biases, **form).astype(x.dtype)
        return x @ (weight.T if transpose else weight)

    mx.quantized_matmul = product


def draw(pipe: Pipeline, prompts: Sequence[Prompt], steps: int | None) -> list[Picture]:
    """The picture of each prompt."""
    return [
        np.asarray(pipe.generate(prompt.text, seed=prompt.seed, steps=steps).images[0].convert("RGB"))
        for prompt in prompts
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seed", type=int, default=4321)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("-o", "--output", type=Path, default=None)
    options = parser.parse_args(arguments)
    if any(form.startswith("mlx:") for form in options.forms):
        open_weights()
    prompts = held_out_prompts(options.prompts, seed=options.seed)
    reference: list[Picture] = []
    lines = ["| backend | form | transformer | PSNR of pictures | pictures all right |", "|---|---|---|---|---|"]
    for form in dict.fromkeys(("onnx:fp32", *options.forms)):
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "model.edgedit"
            backend = convert(form, options.model, bundle)
            how = {"interpreter": True, "emulate_fp16": True} if backend == "coreml" else {}
            with edgedit.load(bundle, backend=backend, **how) as pipe:  # type: ignore[arg-type]
                artefact = pipe.bundle.component("transformer").artefacts[backend]
                size = sum(pipe.bundle.manifest.files[path].size for path in artefact.files)
                pictures = draw(pipe, prompts, options.steps)
        reference = reference or pictures
        right = score(pictures, prompts)[0]["all prompts"]["all"]["share"]
        likeness = float(np.mean([psnr(a, b) for a, b in zip(pictures, reference, strict=True)]))
        print(json.dumps({"form": form, "bytes": size, "psnr_db": likeness, "all_right": right}), flush=True)
        name = form.partition(":")[2].removeprefix("weights=")
        lines.append(f"| {backend} | {name} | {size / 1e6:.2f} MB | {likeness:.1f} dB | {100 * right:.0f} % |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.output is not None:
        options.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
