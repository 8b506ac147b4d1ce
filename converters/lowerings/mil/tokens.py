"""Tokens in the layout that the Neural Engine takes: [batch, channels, 1, tokens], what is [batch, tokens, channels] in
the graph (Apple, "Deploying Transformers on the Apple Neural Engine", 2022).

A layer of tokens is then a 1×1 convolution, and values stay in this layout from one to the next: a `Pending` of
the kind "tokens" has the graph's shape, and turns its value around only for a rule that asks for that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from edgedit.converters.lowerings.driver import dense, is_static
from edgedit.converters.lowerings.mil.builder import MilBuilder, Pending, shape_of

__all__ = ["channels_first", "has_tokens", "norm", "tokens"]

Var = Any


def tokens(b: MilBuilder, name: str, shape: tuple[int, ...], first: Callable[[], Var]) -> Pending:
    """A value of shape [B, S, C] (or [B, C], one token) whose MIL value `first` writes, as [B, C, 1, S]."""
    first = cache(first)

    def turned() -> Var:
        if len(shape) == 2:
            return b.mb.reshape(x=first(), shape=list(shape), name=b.name(name))
        flat = b.mb.squeeze(x=first(), axes=[2], name=b.name(name))
        return b.mb.transpose(x=flat, perm=[0, 2, 1], name=b.name(name))

    return Pending("tokens", shape, None, turned, first)


def has_tokens(value: Any) -> bool:
    """Whether a value is in this layout already."""
    return isinstance(value, Pending) and value.kind in ("tokens", "product") and callable(value.first)


def channels_first(b: MilBuilder, name: str, value: Any, real: str | None) -> Var:
    """Any value that stands beside tokens, of up to three axes, as [B, C, 1, S] or what broadcasts to it."""
    if has_tokens(value):
        found = value.first()
        return found if real is None else b.cast(found, real)
    if is_static(value):
        return b.constant(value, real or "fp32", _turned, "channels_first")
    shape = shape_of(value)
    found = b.var(value, real)
    key = found, f"channels_first {len(shape)}"
    if key not in b.kept:
        if len(shape) <= 1:
            b.kept[key] = b.mb.reshape(x=found, shape=[1, *shape, 1, 1][: 4 if shape else 3], name=b.name(name))
        elif len(shape) == 2:
            b.kept[key] = b.mb.reshape(x=found, shape=[*shape, 1, 1], name=b.name(name))
        elif shape[1] == 1:
            b.kept[key] = b.mb.reshape(x=found, shape=[shape[0], shape[2], 1, 1], name=b.name(name))
        else:
            flat = b.mb.transpose(x=found, perm=[0, 2, 1], name=b.name(name))
            b.kept[key] = b.mb.expand_dims(x=flat, axes=[2], name=b.name(name))
    return b.kept[key]


def _turned(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim < 2:
        return array.reshape(1, -1, 1, 1)
    whole = array.reshape(*[1] * (3 - array.ndim), *array.shape)
    return np.ascontiguousarray(whole.transpose(0, 2, 1)[:, :, None])


def norm(b: MilBuilder, name: str, x: Var, scale: Any, bias: Any, epsilon: float, real: str, *, centred: bool) -> Var:
    """A norm over the channels of [B, C, 1, S] as one operator, whose sums the hardware keeps wide inside.

    Without a mean, x and -x are normalized together: their mean is zero and their variance the mean of squares.
    """
    channels = shape_of(x)[1]
    value = x if centred else b.mb.concat(values=[x, b.mb.mul(x=x, y=b.numpy_type(real)(-1))], axis=1)
    small = b.numpy_type(real)(max(epsilon, 1e-7))
    y = b.mb.layer_norm(x=value, axes=[1], epsilon=small, name=b.name(name))
    if not centred:
        y = b.mb.slice_by_size(x=y, begin=[0] * 4, size=[x.shape[0], channels, *x.shape[2:]], name=b.name(name))
    for operand, operator in ((scale, b.mb.mul), (bias, b.mb.add)):
        neutral = 1 if operator is b.mb.mul else 0
        if operand is not None and not (is_static(operand) and bool(np.all(dense(operand) == neutral))):
            y = operator(x=y, y=channels_first(b, name, operand, real), name=b.name(name))
    return y
