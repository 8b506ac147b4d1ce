"""Time and memory of one block of PixArt-Sigma against the number of tokens, for each self-attention operator.

    python tests/bench/attention_cost.py OUT [--tokens 1024 4096 …] [--operators softmax lit …] [--no-arena]

Every case is a graph with random weights, lowered as `edgedit convert` does it, in a process of its own. Writes
OUT/attention_cost.json, .md and .svg. With its defaults it needs about 20 minutes on two cores and 8 GB of memory; a
case that would need more than --memory is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from run_alone import run_alone

from edgedit.converters.architectures.layers import Module, Op, Value, padding_bias
from edgedit.converters.architectures.operators import Operator, operators_of
from edgedit.converters.architectures.pixart import PixArtBlock
from edgedit.converters.architectures.token_grid import TokenGrid
from edgedit.converters.graph import Component, TensorSpec, build
from edgedit.converters.lowerings import onnx as onnx_lowering

TOKENS = (1024, 4096, 16384, 65536)
OPERATORS = ("softmax", "softmax-standard", "lit", "relu", "clear:8", "kv:2")
#: The option that the number behind a colon is.
NUMBERS = {"clear": "radius", "kv": "factor", "proxy": "window", "lit": "heads", "relu": "heads"}


class BlockAlone(Module):
    """One block with what the rest of the network hands to it as inputs."""

    def __init__(self, operator: Operator, width: int, heads: int) -> None:
        super().__init__()
        config = {
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "attention_bias": True,
            "norm_eps": 1e-6,
            "norm_elementwise_affine": False,
            "qk_norm": None,
            "cross_attention_dim": width,
            "activation_fn": "gelu-approximate",
        }
        self.block = PixArtBlock(config, operator)

    def forward(self, op: Op, x: Value, size: Value, text: Value, mask: Value, modulation: Value) -> Value:
        return self.block(op, x, text, padding_bias(op, mask, x), modulation, TokenGrid(size))


def parse_operator(text: str, width: int, heads: int, linear_heads: int) -> Operator:
    """ "lit", "clear:8" …, as an entry of a checkpoint's "attention" list says it."""
    name, _, number = text.partition(":")
    entry: dict[str, Any] = {"operator": name.removesuffix("-standard"), "layers": [0]}
    if name in ("lit", "relu"):
        entry["heads"] = linear_heads
    if number:
        entry[NUMBERS[name]] = int(number)
    return operators_of([entry], 1, width)[0]


def write_block(operator: Operator, width: int, heads: int, folder: Path, *, fused: bool = True) -> Path:
    """The block with random weights, lowered into `folder`: the graph that the CPU provider is given, or the standard
    one."""
    tokens, text = ("batch", "tokens", width), ("batch", "length", width)
    component = Component(
        name="block",
        architecture="PixArtBlock",
        module=BlockAlone(operator, width, heads),
        inputs=(
            TensorSpec("x", "float32", tokens),
            TensorSpec("size", "int64", (2,)),
            TensorSpec("text", "float32", text),
            TensorSpec("mask", "float32", ("batch", "length")),
            TensorSpec("modulation", "float32", ("batch", 6, width)),
        ),
        outputs=(TensorSpec("y", "float32", tokens),),
    )
    model = build(component)
    random = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            shape = tuple(int(side) for side in value.shape.numpy())
            spread = (shape[0] / math.prod(shape)) ** 0.5 if len(shape) > 1 else 0.1
            values = random.standard_normal(shape, dtype=np.float32) * np.float32(spread)
            value.const_value = ir.tensor(values, name=name)
    artefact = onnx_lowering.write(model, folder, "block", dtype="fp32")
    graph = artefact.fused_graph if fused and artefact.fused_graph else artefact.graph
    return folder / graph


def block_inputs(tokens: int, width: int, length: int) -> dict[str, Any]:
    """Inputs of the block for a map of `tokens` tokens, as near to a square as whole sides allow."""
    rows = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return {
        "x": {"shape": [1, tokens, width]},
        "size": [rows, tokens // rows],
        "text": {"shape": [1, length, width]},
        "mask": {"shape": [1, length], "fill": 1.0},
        "modulation": {"shape": [1, 6, width]},
    }


def needed(name: str, tokens: int, heads: int) -> float:
    """Bytes of the scores where all are held at once: the standard Attention operator on the CPU."""
    if name == "softmax-standard":
        return 4.0 * heads * tokens**2
    return 0.0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each operator and number of tokens."""
    rows = []
    for name in options.operators:
        operator = parse_operator(name, options.width, options.heads, options.linear_heads)
        with tempfile.TemporaryDirectory() as place:
            fused = not name.endswith("-standard")
            graph = write_block(operator, options.width, options.heads, Path(place), fused=fused)
            for tokens in options.tokens:
                row: dict[str, Any] = {"operator": name, "tokens": tokens}
                estimate = needed(name, tokens, options.heads)
                if estimate > options.memory * 1e9:
                    row["left_out"] = f"would need {estimate / 1e9:.0f} GB"
                else:
                    inputs = block_inputs(tokens, options.width, options.length)
                    row |= run_alone(
                        graph, inputs, threads=options.threads, repeat=options.repeat, arena=not options.no_arena
                    ).as_dict()
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    if "left_out" in row:
        return f"{row['operator']:>18} {row['tokens']:>6} tokens: left out, {row['left_out']}"
    return (
        f"{row['operator']:>18} {row['tokens']:>6} tokens: {row['best']:9.3f} s, "
        f"peak {row['peak'] / 1e6:7.0f} MB, of that for the evaluation {row['working'] / 1e6:7.0f} MB"
    )


def growth(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """For each operator, by how much `key` grows from the second largest number of tokens to the largest."""
    found = {}
    for name in dict.fromkeys(row["operator"] for row in rows):
        own = sorted((row["tokens"], row[key]) for row in rows if row["operator"] == name and key in row)
        if len(own) > 1 and own[-2][1] > 0:
            found[name] = own[-1][1] / own[-2][1]
    return found


def markdown(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Two tables, time and memory, a row for each operator."""
    tokens = sorted({row["tokens"] for row in rows})
    cell = {(row["operator"], row["tokens"]): row for row in rows}
    shown = {
        "Seconds, best of the evaluations": lambda row: f"{row['best']:.3f}",
        "Peak resident memory in MB": lambda row: f"{row['peak'] / 1e6:.0f}",
        "Of that for the evaluation, in MB": lambda row: f"{row['working'] / 1e6:.0f}",
    }
    keys = ("best", "peak", "working")
    heads = f"{options.heads} heads ({options.linear_heads} in linear attention)"
    setting = f"width {options.width}, {heads}, {options.length} text tokens, float32"
    lines = [f"One PixArt-Sigma block, {setting}, ONNX Runtime on {options.threads} threads."]
    for (title, show), key in zip(shown.items(), keys, strict=True):
        steps = f"× from {tokens[-2]:,} to {tokens[-1]:,}" if len(tokens) > 1 else "×"
        lines += ["", f"| {title} | " + " | ".join(f"{count:,} tokens" for count in tokens) + f" | {steps} |"]
        lines.append("|---" * (len(tokens) + 2) + "|")
        times = growth([row for row in rows if row["tokens"] in tokens[-2:]], key)
        for name in dict.fromkeys(row["operator"] for row in rows):
            found = [cell[name, count] for count in tokens]
            values = [row.get("left_out") or show(row) for row in found]
            values.append(f"{times[name]:.2f}" if name in times else "")
            lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and memory against tokens, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, key, factor, title in (
        (axes[0], "best", 1.0, "seconds a block"),
        (axes[1], "working", 1e-6, "MB for the evaluation"),
    ):
        for name in dict.fromkeys(row["operator"] for row in rows):
            own = [row for row in rows if row["operator"] == name and key in row]
            axis.plot([row["tokens"] for row in own], [factor * row[key] for row in own], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=title)
        counts = sorted({row["tokens"] for row in rows})
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS))
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--linear-heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=300, help="text tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-arena", action="store_true", help="without ONNX Runtime's memory arena")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a case may need")
    options = parser.parse_args(arguments)
    rows = measure(options)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    document = {"settings": settings, "machine": [platform.machine(), platform.processor()], "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attention_cost.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (options.out / "attention_cost.md").write_text(markdown(rows, options), encoding="utf-8")
    plot(rows, options.out / "attention_cost.svg")


if __name__ == "__main__":
    main()
