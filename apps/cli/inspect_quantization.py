"""What `inspect` tells of quantized weights: layers by form, and what each lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgedit.apps.cli.tables import decibels, megabytes, print_line, print_table, small

__all__ = ["print_quantization"]

#: Layers of one form that are named before the rest is counted.
NAMED = 2
#: Layers of the sensitivity table that are shown; --json has all.
SHOWN = 12
_SHAPE = ("kind", "shape", "bytes")


def print_quantization(recipes: Mapping[str, Any]) -> None:
    """The resolved recipe of each component, and the sensitivity table where one was measured."""
    rows = []
    for component, record in recipes.items():
        groups: dict[str, list[str]] = {}
        for name, layer in record["layers"].items():
            words = " ".join(f"{key} {value}" for key, value in layer.items() if key not in _SHAPE)
            groups.setdefault(words, []).append(name)
        for words, names in groups.items():
            size = sum(record["layers"][name]["bytes"] for name in names)
            rows.append([component, words, str(len(names)), megabytes(size), _some(names)])
    print_table(["quantized", "form", "layers", "size", "which"], rows)
    for component, record in recipes.items():
        if (calibration := record.get("calibration")) is not None:
            print_line(
                f"{component}: calibrated on {calibration['prompts']} prompts, {calibration['calls']} calls at "
                f"{calibration['width']}x{calibration['height']}, seed {calibration['seed']}"
            )
        if (found := record.get("sensitivity")) is not None:
            _print_sensitivity(component, found)


def _print_sensitivity(component: str, found: Mapping[str, Any]) -> None:
    """The layers that lose most, in the forms they could have; the chosen one is marked."""
    layers = found["layers"]
    worst = sorted(layers, key=lambda name: -max(choice["loss"] for choice in layers[name]["choices"]))
    print_line(
        f"{component}: {megabytes(found['bytes'])} of weights for an estimated {decibels(found['psnr_db'])}; "
        f"loss of the prediction (share of its energy) by layer and bits:"
    )
    bits = sorted({choice["bits"] for layer in layers.values() for choice in layer["choices"]})
    rows = []
    for name in worst[:SHOWN]:
        losses = {choice["bits"]: choice["loss"] for choice in layers[name]["choices"]}
        chosen = layers[name]["chosen"]
        rows.append([name, *(small(losses[b]) + ("*" if b == chosen else "") if b in losses else "-" for b in bits)])
    print_table(["layer", *(f"{b} bits" for b in bits)], rows)
    if len(layers) > SHOWN:
        print_line(f"  and {len(layers) - SHOWN} layers that lose less (--json has them)")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
