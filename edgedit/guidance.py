"""Guidance: how the network's answers with and without the prompt become one, or how the scale is told to the network.

The manifest's "guidance" object, plain JSON, is
  `kind`         "cfg" (two predictions), "embedded" (the scale is an input of the network) or "none"
  `formula`      "uncond": u + g (c - u) (Ho & Salimans 2022; PixArt, SANA, SD3, Lumina 2); "cond": c + g (c - u)
                 (Z-Image). With "uncond" a scale of 1 is no guidance, with "cond" a scale of 0
  `renormalise`  null; "row": every row (last axis) gets the norm that it has with the prompt (Lumina 2, Qwen-Image);
                 "clamp": the norm of each picture is held at most `renormalise_factor` times that with the prompt
                 (Z-Image's cfg_normalization); "std": mixed with itself at the standard deviation that it has with the
                 prompt, `renormalise_factor` of the latter (Lin et al. 2023, section 3.4; HunyuanDiT)
  `interval`     [start, end], fractions of the steps in which guidance acts (Kynkaanniemi et al. 2024); [0, r] is
                 Lumina 2's cfg_trunc_ratio r
  `scale`        "embedded": the network is told guidance_scale * scale (SANA-Sprint: 0.1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedit.errors import BundleError

__all__ = ["Guidance"]

_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "kind": ("cfg", "embedded", "none"),
    "formula": ("uncond", "cond"),
    "renormalise": (None, "row", "clamp", "std"),
}
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Guidance:
    """One model's guidance; the fields are those of the manifest's "guidance" object, described in this module."""

    kind: str = "cfg"
    formula: str = "uncond"
    renormalise: str | None = None
    renormalise_factor: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise BundleError(
                    f"the guidance has {name} = {getattr(self, name)!r}; it may be one of {list(choices)}"
                )
        start, end = self.interval
        if not 0.0 <= start <= end <= 1.0:
            raise BundleError(
                f"the guidance has interval = {list(self.interval)}; it must be two rising numbers in 0 to 1"
            )
        for name in ("renormalise_factor", "scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise BundleError(f"the guidance has {name} = {getattr(self, name)!r}; it must be a number, 0 or more")

    @classmethod
    def from_manifest(cls, section: Any) -> Guidance:
        """From the manifest's "guidance": the JSON object, the parsed section (`kind`, `options`), or None.

        Raises `BundleError` for an unknown field or a value that is not allowed.
        """
        if section is None:
            return cls(kind="none")
        values = dict(section if isinstance(section, Mapping) else {**section.options, "kind": section.kind})
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise BundleError(
                f"the guidance has the unknown field {unknown[0]!r}; convert the model again with this version"
            )
        if "interval" in values:
            pair = values["interval"]
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(_is_number(end) for end in pair):
                raise BundleError(f"the guidance has interval = {pair!r}; it must be two numbers")
            values["interval"] = (float(pair[0]), float(pair[1]))
        for name in ("renormalise_factor", "scale"):
            if name in values and not _is_number(values[name]):
                raise BundleError(f"the guidance has {name} = {values[name]!r}; it must be a number, 0 or more")
        return cls(**values)

    def to_manifest(self) -> dict[str, Any]:
        """The JSON object that `from_manifest` reads."""
        values = asdict(self)
        values["interval"] = list(self.interval)
        return values

    def needs_negative(self, guidance_scale: float) -> bool:
        """Whether any step of a run at this scale evaluates the network without the prompt too."""
        neutral = 1.0 if self.formula == "uncond" else 0.0
        return self.kind == "cfg" and guidance_scale > neutral

    def active(self, i: int, n: int, guidance_scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> bool:
        """Whether evaluation i of n is guided: it lies wholly in the model's interval and in the user's `interval`."""
        start, end = max(self.interval[0], interval[0]), min(self.interval[1], interval[1])
        inside = i / n >= start - _ROUNDING and (i + 1) / n <= end + _ROUNDING
        return inside and self.needs_negative(guidance_scale)

    def embedded(self, guidance_scale: float) -> float:
        """The number that an "embedded" network is told."""
        return guidance_scale * self.scale

    def apply(
        self, cond: NDArray[np.float32], uncond: NDArray[np.float32], guidance_scale: float
    ) -> NDArray[np.float32]:
        """The guided prediction, float32, from those with (`cond`) and without (`uncond`) the prompt, [B, ...]."""
        base = uncond if self.formula == "uncond" else cond
        guided = base + np.float32(guidance_scale) * (cond - base if self.formula == "uncond" else cond - uncond)
        if self.renormalise is None:
            return np.asarray(guided, dtype=np.float32)
        if self.renormalise == "row":
            factor = _ratio(_norm(cond, -1), _norm(guided, -1))
        else:
            axes = tuple(range(1, cond.ndim))
            if self.renormalise == "clamp":
                limit = np.float32(self.renormalise_factor) * _norm(cond, axes)
                factor = np.minimum(_ratio(limit, _norm(guided, axes)), np.float32(1))
            else:
                # the quotient is the same with and without Bessel's correction
                spread = _ratio(cond.std(axis=axes, keepdims=True), guided.std(axis=axes, keepdims=True))
                factor = self.renormalise_factor * spread + (1 - self.renormalise_factor)
        return np.asarray(guided * factor, dtype=np.float32)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _norm(values: NDArray[np.float32], axes: int | tuple[int, ...]) -> NDArray[Any]:
    return np.asarray(np.sqrt(np.sum(np.square(values, dtype=np.float64), axis=axes, keepdims=True)))


def _ratio(over: NDArray[Any], under: NDArray[Any]) -> NDArray[Any]:
    """over / under, and 1 where both vanish: an all-zero row stays what it is instead of turning into NaN."""
    return np.asarray(np.divide(over, under, out=np.ones_like(over), where=under > 0))
