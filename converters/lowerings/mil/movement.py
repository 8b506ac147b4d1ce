"""MIL rules: values moved, cut, joined and looked up, never changed. What arrives as a type leaves as it."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgedit.converters.lowerings.driver import NodeInfo, dense, is_static, reshaped
from edgedit.converters.lowerings.mil.builder import MilBuilder, Pending, rules, shape_of
from edgedit.converters.lowerings.mil.tokens import channels_first, has_tokens, tokens

__all__ = ["MAX_RANK", "pixel_order"]

#: Core ML's limit on the rank of a tensor, and the Neural Engine's.
MAX_RANK, NEURAL_RANK = 5, 4


@rules("Reshape")
def reshape(b: MilBuilder, node: NodeInfo, x: Any, shape: Any) -> Any:
    """A shape of more than five axes waits for the transposition that follows it."""
    source = x.base if isinstance(x, Pending) and x.kind == "reshape" and x.written is None else x
    wanted = reshaped(shape_of(x), [int(v) for v in dense(shape)], allow_zero=bool(node.get("allowzero", 0)))
    if len(wanted) > (NEURAL_RANK if b.neural else MAX_RANK):
        return _reshape_later(b, node, b.var(source), wanted)
    if shape_of(source) == tuple(wanted):
        return source
    return b.mb.reshape(x=b.var(source), shape=wanted, name=b.name(node.name))


def _reshape_later(b: MilBuilder, node: NodeInfo, base: Any, shape: list[int]) -> Pending:
    def refuse() -> Any:
        if len(shape) <= MAX_RANK:
            return b.mb.reshape(x=base, shape=shape, name=b.name(node.name))
        raise ValueError(f"a tensor of {len(shape)} axes, {shape}; Core ML has at most {MAX_RANK}")

    return Pending("reshape", tuple(shape), base, refuse)


@rules("Transpose")
def transpose(b: MilBuilder, node: NodeInfo, x: Any) -> Any:
    """A transposition; of more than five axes without those of size one, and with neighbours that stay so merged."""
    shape = shape_of(x)
    order = [int(axis) for axis in node.get("perm", range(len(shape))[::-1])]
    if b.neural and order == [0, 2, 1] and b.is_float(x):
        return _turned(b, node, x, shape)
    if len(shape) <= (NEURAL_RANK if b.neural else MAX_RANK):
        return b.mb.transpose(x=b.var(x), perm=order, name=b.name(node.name))
    if b.neural and not (isinstance(x, Pending) and x.base is None):
        base = x.base if isinstance(x, Pending) else x
        return _reshape_later(b, node, _in_steps(b, node, b.var(base), shape, order), [shape[axis] for axis in order])
    if not isinstance(x, Pending):
        raise ValueError(f"a tensor of {len(shape)} axes; Core ML has at most {MAX_RANK}")
    groups = _runs([axis for axis in order if shape[axis] != 1], shape)
    ranked = sorted(groups)
    merged = [int(np.prod([shape[axis] for axis in group])) for group in ranked]
    if len(merged) > MAX_RANK:
        raise ValueError(f"a transposition of {len(merged)} axes that part; Core ML has at most {MAX_RANK}")
    y = b.mb.reshape(x=x.base, shape=merged, name=b.name(node.name))
    y = b.mb.transpose(x=y, perm=[ranked.index(group) for group in groups], name=b.name(node.name))
    return _reshape_later(b, node, y, [shape[axis] for axis in order])


def _turned(b: MilBuilder, node: NodeInfo, x: Any, shape: tuple[int, ...]) -> Any:
    """Tokens become a map of one row, and a map's rows tokens, without moving anything."""
    n, s, c = shape
    if has_tokens(x):
        return b.mb.reshape(x=channels_first(b, node.name, x, None), shape=[n, c, s], name=b.name(node.name))
    rows = b.var(x)
    return tokens(b, node.name, (n, c, s), lambda: b.mb.expand_dims(x=rows, axes=[2], name=b.name(node.name)))


def _in_steps(b: MilBuilder, node: NodeInfo, x: Any, shape: tuple[int, ...], order: list[int]) -> Any:
    """A transposition of many axes as several of four: each brings the next axis to its place."""
    now = [axis for axis in range(len(shape)) if shape[axis] != 1]
    for place, axis in enumerate(axis for axis in order if shape[axis] != 1):
        at = now.index(axis)
        if at != place:
            parts = [now[:place], now[place:at], [axis], now[at + 1 :]]
            sizes = [int(np.prod([shape[a] for a in part], dtype=np.int64)) for part in parts]
            x = b.mb.reshape(x=x, shape=sizes, name=b.name(node.name))
            x = b.mb.transpose(x=x, perm=[0, 2, 1, 3], name=b.name(node.name))
            now = [*parts[0], axis, *parts[1], *parts[3]]
    return x


def _runs(order: list[int], shape: tuple[int, ...]) -> list[list[int]]:
    """Axes in their new order, those that were neighbours before and still are in one list."""
    groups: list[list[int]] = []
    for axis in order:
        last = groups[-1][-1] if groups else None
        if last is not None and last < axis and all(shape[between] == 1 for between in range(last + 1, axis)):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


@rules("Unsqueeze")
def unsqueeze(b: MilBuilder, node: NodeInfo, x: Any, axes: Any) -> Any:
    """New axes of size one."""
    places = sorted(int(axis) % (len(shape_of(x)) + len(dense(axes))) for axis in dense(axes))
    return b.mb.expand_dims(x=b.var(x), axes=places, name=b.name(node.name))


@rules("Squeeze")
def squeeze(b: MilBuilder, node: NodeInfo, x: Any, axes: Any = None) -> Any:
    """Axes of size one taken away."""
    shape = shape_of(x)
    gone = [i for i, size in enumerate(shape) if size == 1] if axes is None else [int(axis) for axis in dense(axes)]
    return b.mb.squeeze(x=b.var(x), axes=gone, name=b.name(node.name)) if gone else x


@rules("Expand")
def expand(b: MilBuilder, node: NodeInfo, x: Any, shape: Any) -> Any:
    """Waits for its user, which may do with the smaller tensor."""
    whole = np.broadcast_shapes(shape_of(x), tuple(int(v) for v in dense(shape)))
    if whole == shape_of(x):
        return x

    def write() -> Any:
        value = b.var(x)
        missing = len(whole) - len(value.shape)
        if missing:
            value = b.mb.expand_dims(x=value, axes=list(range(missing)), name=b.name(node.name))
        reps = [int(size) // int(now) for size, now in zip(whole, value.shape, strict=True)]
        return b.mb.tile(x=value, reps=reps, name=b.name(node.name))

    return Pending("broadcast", whole, x, write)


@rules("Concat")
def concat(b: MilBuilder, node: NodeInfo, *values: Any) -> Any:
    """Tensors joined; in the type of the node where theirs differ."""
    real = b.real(node) if any(b.is_float(value) for value in values) else None
    parts = [b.var(value) if not is_static(value) else None for value in values]
    kinds = {b.types.builtin_to_string(part.dtype) for part in parts if part is not None}
    common = kinds.pop() if len(kinds) == 1 and real is not None else real
    parts = [b.var(value, common) for value in values]
    return b.mb.concat(values=parts, axis=int(node.attributes["axis"]), name=b.name(node.name))


@rules("Split")
def split(b: MilBuilder, node: NodeInfo, x: Any, sizes: Any = None) -> list[Any]:
    """One axis cut into given sizes, or into as many parts as the node has outputs (the last may be smaller)."""
    axis, count = int(node.get("axis", 0)), len(node.outputs)
    if sizes is None:
        whole = shape_of(x)[axis]
        part = -(-whole // count)
        lengths = [part] * (count - 1) + [whole - part * (count - 1)]
    else:
        lengths = [int(size) for size in dense(sizes)]
    if has_tokens(x) and len(shape_of(x)) == 3 and axis % 3 == 2:
        return _token_split(b, node, x, lengths)
    return list(b.mb.split(x=b.var(x), split_sizes=lengths, axis=axis, name=b.name(node.name)))


def _token_split(b: MilBuilder, node: NodeInfo, x: Any, lengths: list[int]) -> list[Any]:
    parts = b.mb.split(x=channels_first(b, node.name, x, None), split_sizes=lengths, axis=1, name=b.name(node.name))
    n, s, _ = shape_of(x)

    def one(part: Any, length: int) -> Any:
        return tokens(b, node.name, (n, s, length), lambda: part)

    return [one(part, length) for part, length in zip(parts, lengths, strict=True)]


@rules("Slice")
def cut(b: MilBuilder, node: NodeInfo, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    """A part of some axes, forward."""
    shape = shape_of(x)
    firsts, lasts = [int(v) for v in dense(starts)], [int(v) for v in dense(ends)]
    places = list(range(len(firsts))) if axes is None else [int(v) % len(shape) for v in dense(axes)]
    strides = [1] * len(firsts) if steps is None else [int(v) for v in dense(steps)]
    if any(stride < 1 for stride in strides):
        raise ValueError("a slice that runs backwards")
    begin, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
    for axis, first, last, step in zip(places, firsts, lasts, strides, strict=True):
        begin[axis], end[axis], _ = slice(first, last).indices(shape[axis])
        stride[axis] = step
    return b.mb.slice_by_index(x=b.var(x), begin=begin, end=end, stride=stride, name=b.name(node.name))


@rules("Pad")
def pad(b: MilBuilder, node: NodeInfo, x: Any, pads: Any, value: Any = None, axes: Any = None) -> Any:
    """ONNX lists all beginnings, then all ends; MIL a beginning and an end for each axis."""
    rank = len(shape_of(x))
    amounts = [int(v) for v in dense(pads)]
    places = range(rank) if axes is None else [int(v) % rank for v in dense(axes)]
    pairs = [0] * (2 * rank)
    for i, axis in enumerate(places):
        pairs[2 * axis], pairs[2 * axis + 1] = amounts[i], amounts[len(amounts) // 2 + i]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(str(node.get("mode", "constant")))
    if mode is None or min(pairs) < 0:
        raise ValueError(f"padding of mode {node.get('mode', 'constant')!r} by {amounts}")
    source = b.var(x)
    extra: dict[str, Any] = {}
    if mode == "constant":
        half = b.types.builtin_to_string(source.dtype) == "fp16"
        fill = 0.0 if value is None else float(dense(value))
        extra["constant_val"] = np.float16(fill) if half else np.float32(fill)
    return b.mb.pad(x=source, pad=pairs, mode=mode, name=b.name(node.name), **extra)


@rules("Gather")
def gather(b: MilBuilder, node: NodeInfo, x: Any, indices: Any) -> Any:
    """Rows of a table by ids, or channels in another order (two orders in a row become one)."""
    axis = int(node.get("axis", 0)) % len(shape_of(x))
    if is_static(indices):
        order = dense(indices).astype(np.int32)
        order = np.where(order < 0, order + shape_of(x)[axis], order).astype(np.int32)
        if isinstance(x, Pending) and x.kind == "channels" and axis == 1 and order.ndim == 1 and x.written is None:
            return _reorder(b, node, x.base, np.asarray(x.detail)[order])
        return b.mb.gather(x=b.var(x), indices=order, axis=axis, name=b.name(node.name))
    if not is_static(x):
        return b.mb.gather(x=b.var(x), indices=b.var(indices), axis=axis, name=b.name(node.name))
    # Looked up in the stored type, then widened: only the rows in use are.
    real = b.real(node, x)
    stored = "fp16" if b.half and (real == "fp16" or b.store_half) and not b.overflows(x) else "fp32"
    table = b.kernel(x, stored) if getattr(x, "name", None) in b.codes else b.constant(x, stored)
    rows = b.mb.gather(x=table, indices=b.var(indices), axis=axis, name=b.name(node.name))
    return b.cast(rows, real) if b.is_float(x) else rows


def _reorder(b: MilBuilder, node: NodeInfo, x: Any, order: np.ndarray) -> Any:
    if len(order) == shape_of(x)[1] and np.array_equal(order, np.arange(len(order))):
        return x
    return b.mb.gather(x=b.var(x), indices=order.astype(np.int32), axis=1, name=b.name(node.name))


def pixel_order(channels: int, block: int) -> np.ndarray:
    """Where the channels of ONNX's order (row, column, channel) lie in pixel_unshuffle's (channel, row, column)."""
    return np.arange(channels * block * block).reshape(channels, block * block).T.reshape(-1)


@rules("SpaceToDepth")
def space_to_depth(b: MilBuilder, node: NodeInfo, x: Any) -> Pending:
    """pixel_unshuffle, with an order of the channels that waits for the next one."""
    block = int(node.attributes["blocksize"])
    n, channels, height, width = shape_of(x)
    moved = b.mb.pixel_unshuffle(x=b.var(x), downscale_factor=np.uint32(block), name=b.name(node.name))
    order = pixel_order(channels, block)
    shape = (n, channels * block * block, height // block, width // block)
    return Pending("channels", shape, moved, lambda: _reorder(b, node, moved, order), detail=order)


@rules("DepthToSpace")
def depth_to_space(b: MilBuilder, node: NodeInfo, x: Any) -> Any:
    """pixel_shuffle, after a change of order where the depth is in ONNX's."""
    block = int(node.attributes["blocksize"])
    if str(node.get("mode", "DCR")) == "DCR":
        channels = shape_of(x)[1] // (block * block)
        x = _reorder(b, node, x, np.argsort(pixel_order(channels, block)))
    return b.mb.pixel_shuffle(x=b.var(x), upscale_factor=block, name=b.name(node.name))
