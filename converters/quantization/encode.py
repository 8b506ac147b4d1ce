"""What is stored of a layer's weight: arrays by the end of their name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from edgedit.converters.quantization import palettes
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.levels import LEVELS, pack_pairs
from edgedit.converters.quantization.packing import pack, unpack
from edgedit.converters.quantization.rounding import adaptive, codes_and_scales, descend, largest_code, nearest

__all__ = ["Encoded", "encode", "opened"]

Float = npt.NDArray[np.float32]
Parts = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Encoded:
    """A weight as it is stored.

    Attributes:
        parts: arrays; "" are the codes, or their low bits; "scale", "multiplier", "sign" and "entries" as the form has;
            "mask" where a sparse palette is stored. Of a sparse float "" is the weight itself.
        value: makes the float32 weight that the parts stand for.
    """

    parts: Parts
    value: Callable[[], Float]


def encode(weight: Float, form: Form, kind: str, moments: Float | None = None) -> Encoded:
    """Round a weight into the parts of a form that is `fitted` to its layer.

    Args:
        weight: float32 in the graph's layout.
        kind: the layer's.
        moments: X^T X of the layer's inputs, which rounding other than the nearest needs.
    """
    kept = None
    if form.sparsity is not None:
        kept = _largest(weight, form.sparsity, form.width if form.format == "palette" else 1)
        weight = weight * np.repeat(kept, weight.shape[-1] // kept.shape[-1], axis=-1)
    if not form.is_coded:
        return Encoded({"": weight}, lambda: weight)
    if kind == "convolution":
        return _per_slice(weight, 0)
    if kind == "table":
        codes, scales = codes_and_scales(weight, 8, axis=1)
        return Encoded({"": codes, "scale": scales}, lambda: (codes * scales).astype(np.float32))
    if form.rounding != "nearest" and moments is None:
        raise ValueError(f"{form.rounding} rounding needs the moments of the layer's inputs")
    if form.format == "palette":
        return _palette(weight, form, moments, kept)
    if form.block is None:
        return _per_channel(weight, form, moments)
    return _blocks(weight, form, moments)


def opened(parts: Parts, form: Form) -> Float:
    """The float32 weight [K, N] that the parts of a matrix stand for."""
    rows, codes = len(parts[""]), parts[""]
    scales = parts["scale"].astype(np.float32, copy=False)
    if "multiplier" in parts:
        scales = parts["multiplier"].astype(np.float32) * scales
    if form.format == "palette":
        numbers = parts["entries"][codes.astype(np.uint8, copy=False)].reshape(rows, -1)
    elif form.format in LEVELS:
        numbers = LEVELS[form.format].table[codes.astype(np.uint8, copy=False)].reshape(rows, -1)
    elif form.bits == 3:
        numbers = unpack(codes.astype(np.uint8, copy=False), parts["sign"].astype(np.uint8, copy=False))
    else:
        numbers = codes
    found: Float = numbers.astype(np.float32) * (scales if scales.ndim == 1 else _rows(scales, rows))
    return found


def _per_slice(weight: Float, axis: int) -> Encoded:
    moved = np.moveaxis(weight, axis, 0)
    codes, scales = codes_and_scales(moved.reshape(len(moved), -1), 8, axis=1)
    shaped = np.ascontiguousarray(np.moveaxis(codes.reshape(moved.shape), 0, axis))
    sides = [1] * weight.ndim
    sides[axis] = -1
    scale = scales.reshape(len(moved))
    return Encoded({"": shaped, "scale": scale}, lambda: (shaped * scale.reshape(sides)).astype(np.float32))


def _per_channel(weight: Float, form: Form, moments: Float | None) -> Encoded:
    if form.rounding == "nearest" or moments is None:
        return _per_slice(weight, 1)
    _, scales = codes_and_scales(weight, 8, axis=0)
    return _coded({}, scales[0], weight, form, moments, lambda _: scales[0])


def _blocks(weight: Float, form: Form, moments: Float | None) -> Encoded:
    rows, columns = weight.shape
    block = form.block
    assert block is not None
    levels = LEVELS.get(form.format)
    codes, scales = codes_and_scales(weight.reshape(rows // block, block, columns), form.bits, 1, levels)
    scales = scales.reshape(rows // block, columns)
    parts: dict[str, npt.NDArray[np.generic]] = {"scale": scales}
    if form.int8_activations:
        multiplier, scale = _whole_multiples(scales, largest_code(form.bits, levels))
        parts, scales = {"multiplier": multiplier, "scale": scale}, multiplier * scale
    elif form.rounding == "nearest":
        return _finished(parts, codes.reshape(rows, columns), np.repeat(scales, block, 0), form)
    return _coded(parts, scales, weight, form, moments, lambda row: scales[row // block])


def _whole_multiples(scales: Float, largest: int) -> tuple[npt.NDArray[np.int8], Float]:
    """Block scales [G, N] as whole multiples [G, N] of one scale a channel [N], so that code · multiple is an int8
    (progressive group quantization: Lin et al., "QServe", 2024, section 4.1)."""
    most = 127 // largest
    channel = (np.abs(scales).max(0) / most).astype(np.float32)
    channel[channel == 0] = 1
    multiples = np.rint(scales / channel)
    return np.where(multiples == 0, 1, multiples).astype(np.int8), channel


def _coded(
    parts: Parts, scales: Float, weight: Float, form: Form, moments: Float | None, of_row: Callable[[int], Float]
) -> Encoded:
    """Codes for given scales, rounded as the form says where the moments are known."""
    bits, levels = form.bits, LEVELS.get(form.format)
    repeated = np.broadcast_to(scales, weight.shape) if scales.ndim == 1 else _rows(scales, len(weight))
    if moments is None:
        codes = nearest(weight, repeated, bits, levels)
    else:

        def round_row(row: int, values: Float) -> tuple[npt.NDArray[np.int8], Float]:
            found = nearest(values, of_row(row), bits, levels)
            return found, found * of_row(row)

        codes = adaptive(weight, moments, round_row).astype(np.int8)
        if form.rounding == "descent":
            codes = descend(weight, moments, codes, codes * repeated, round_row).astype(np.int8)
    return _finished(parts or {"scale": scales}, codes, repeated, form)


def _rows(scales: Float, rows: int) -> Float:
    return np.repeat(scales, rows // len(scales), 0)


def _finished(parts: Parts, codes: npt.NDArray[np.int8], scales: Float, form: Form) -> Encoded:
    value = partial(np.multiply, codes, scales, dtype=np.float32)
    if form.format in LEVELS:
        return Encoded({"": pack_pairs(LEVELS[form.format], codes), **parts}, value)
    if form.bits == 3:
        low, sign = pack(codes)
        return Encoded({"": low, "sign": sign, **parts}, value)
    return Encoded({"": codes, **parts}, value)


def _largest(weight: Float, sparsity: float, width: int) -> npt.NDArray[np.bool_]:
    """Which weights of a tensor stay when a share of them goes, the smallest first; vectors of `width` along the last
    axis go or stay as a whole."""
    sizes = np.square(weight).reshape(*weight.shape[:-1], -1, width).sum(-1)
    gone = round(sparsity * sizes.size)
    kept = np.ones(sizes.size, np.bool_)
    kept[np.argpartition(sizes.reshape(-1), max(0, gone - 1))[:gone]] = False
    return kept.reshape(sizes.shape)


def _palette(weight: Float, form: Form, moments: Float | None, kept: npt.NDArray[np.bool_] | None) -> Encoded:
    """Codes into a palette; with moments its fit minds them, and rounding is adaptive where the form says so."""
    diagonal = None if moments is None else np.ascontiguousarray(np.diag(moments))
    palette = palettes.fit(weight, form.width, diagonal, entries=2**form.index_bits, kept=kept)
    if form.rounding != "nearest" and moments is not None:
        codes = adaptive(weight, moments, palette.round_row).astype(np.uint8)
        if form.rounding == "descent":
            values = palette.values(codes)
            codes = descend(weight, moments, codes, values, palette.round_row).astype(np.uint8)
    else:
        codes = palette.round(weight)
    parts: Parts = {"": codes, "entries": palette.entries, "scale": palette.scales}
    if kept is None:
        return Encoded(parts, lambda: palette.values(codes))
    there = np.repeat(kept, form.width, axis=1)
    return Encoded({**parts, "mask": kept.astype(np.uint8)}, lambda: palette.values(codes) * there)
