"""Which self-attention operator each block of a transformer has, from the "attention" list of a checkpoint's record.

The list has objects {"operator", its options, "layers"}; `layers` are indices of blocks, and blocks that no object
names keep the family's own attention. The same form, with every block in it, is what a manifest shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgedit.converters.architectures.attention import (
    KVCompressedAttention,
    LinearAttention,
    SoftmaxAttention,
    qk_norms,
)
from edgedit.converters.architectures.layers import Module
from edgedit.converters.architectures.local_attention import LocalAttention
from edgedit.converters.architectures.proxy_attention import ProxyAttention
from edgedit.converters.graph import TensorSpec
from edgedit.errors import ConversionError

__all__ = [
    "OPERATORS",
    "SOFTMAX",
    "Operator",
    "attention_scale_input",
    "describe_operators",
    "operators_of",
    "self_attention",
]


def _whole(value: object, minimum: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


@dataclass(frozen=True)
class _Option:
    """An option: what it may be, in a check and in words, and its default (`...`: it must be given)."""

    allows: Callable[[Any], bool]
    words: str
    default: Any = ...


_HEADS = _Option(_whole, "a whole number of at least 1")

#: Operator → its options. `heads` of the linear ones are their own; the others have those of the configuration.
OPERATORS: Mapping[str, Mapping[str, _Option]] = {
    "softmax": {},
    "relu": {"heads": _HEADS},
    "lit": {
        "heads": _HEADS,
        "kernel_size": _Option(lambda value: _whole(value) and value % 2 == 1, "an odd whole number", 5),
    },
    "clear": {
        "radius": _Option(_whole, "a whole number of at least 1, in tokens"),
        "pool": _Option(lambda value: value is None or _whole(value, 2), "null or a whole number of at least 2", None),
    },
    "kv": {
        "factor": _Option(lambda value: _whole(value, 2), "a whole number of at least 2"),
        "sampling": _Option(lambda value: value in ("conv", "ave", "uniform"), "conv, ave or uniform", "conv"),
    },
    "proxy": {"window": _Option(lambda value: _whole(value, 2), "a whole number of at least 2")},
}


#: Operators whose softmax is over the more keys the larger the map is.
_GLOBAL_SOFTMAX = frozenset(["softmax", "kv", "proxy"])


@dataclass(frozen=True)
class Operator:
    """One of `OPERATORS` with all its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_scale(self) -> bool:
        """Whether it multiplies its scores by the grid's `attention_scale`."""
        return self.name in _GLOBAL_SOFTMAX


SOFTMAX = Operator("softmax")


def operators_of(
    entries: Sequence[Any] | None, num_layers: int, width: int, default: Operator | Mapping[int, Operator] = SOFTMAX
) -> tuple[Operator, ...]:
    """The operator of each of `num_layers` blocks, whose attention is `width` wide inside.

    entries: the "attention" list, or None. default: the operator of a block that it does not name, for all blocks or by
    block (softmax for those that are missing).

    Raises ConversionError, naming the entry, for an operator, option or layer that is not supported, and for a layer
    named twice.
    """
    chosen: dict[int, Operator] = {}
    if entries is not None and not isinstance(entries, (list, tuple)):
        raise ConversionError(f"attention is {entries!r}: it must be a list of objects")
    for number, entry in enumerate(entries or ()):
        where = f"attention[{number}]"
        operator = _operator(entry, width, where)
        for layer in _layers(entry.get("layers"), num_layers, where):
            if layer in chosen:
                raise ConversionError(f"{where} names layer {layer}, which has one already: name each layer once")
            chosen[layer] = operator
    defaults = dict.fromkeys(range(num_layers), default) if isinstance(default, Operator) else default
    return tuple(chosen.get(layer, defaults.get(layer, SOFTMAX)) for layer in range(num_layers))


def _operator(entry: Any, width: int, where: str) -> Operator:
    if not isinstance(entry, dict):
        raise ConversionError(f"{where} is {entry!r}: it must be an object")
    name = entry.get("operator")
    if not isinstance(name, str) or name not in OPERATORS:
        raise ConversionError(f"{where} has operator {name!r}: choose one of {', '.join(OPERATORS)}")
    options = OPERATORS[name]
    for key in entry:
        if key not in options and key not in ("operator", "layers"):
            known = ", ".join(("operator", *options, "layers"))
            raise ConversionError(f"{where} has the unknown entry {key!r}: {name} may have {known}")
    values = {}
    for key, option in options.items():
        value = entry.get(key, option.default)
        if value is ...:
            raise ConversionError(f"{where} lacks {key}: {name} needs it, {option.words}")
        if not option.allows(value):
            raise ConversionError(f"{where} has {key} = {value!r}: it must be {option.words}")
        values[key] = value
    if "heads" in values and width % values["heads"]:
        raise ConversionError(f"{where} has heads = {values['heads']}: it must divide the width, {width}")
    return Operator(name, values)


def _layers(layers: Any, num_layers: int, where: str) -> list[int]:
    if not isinstance(layers, list) or not all(_whole(layer, 0) and layer < num_layers for layer in layers):
        raise ConversionError(f"{where} has layers = {layers!r}: it must list blocks from 0 to {num_layers - 1}")
    return layers


def describe_operators(operators: Sequence[Operator]) -> list[dict[str, Any]]:
    """The "attention" list that makes these operators, every block named, for the manifest."""
    found: list[tuple[Operator, list[int]]] = []
    for layer, operator in enumerate(operators):
        same = next((layers for other, layers in found if other == operator), None)
        if same is None:
            found.append((operator, [layer]))
        else:
            same.append(layer)
    return [{"operator": operator.name, **operator.options, "layers": layers} for operator, layers in found]


def attention_scale_input(operators: Sequence[Operator]) -> tuple[TensorSpec, ...]:
    """The graph input that grows softmax scores with the picture; none where no block has a softmax over the map."""
    return (TensorSpec("attention_scale", "float32", (1,)),) if any(o.takes_scale for o in operators) else ()


def self_attention(
    operator: Operator, width: int, heads: int, head_dim: int, *, bias: bool, qk_norm: str | None
) -> Module:
    """The module of one block, forward(op, x [B, H·W, width], TokenGrid) → [B, H·W, width].

    width, heads, head_dim, bias, qk_norm: those of the attention that it replaces, as diffusers' Attention has them.
    """
    options, inner = operator.options, heads * head_dim
    if operator.name == "softmax":
        return SoftmaxAttention(width, heads, head_dim, bias=bias, **qk_norms(qk_norm, inner))
    if operator.name in ("relu", "lit"):
        own = options["heads"]
        kernel_size = options.get("kernel_size")
        return LinearAttention(width, own, inner // own, bias=bias, qk_norm=qk_norm, kernel_size=kernel_size)
    makes: Mapping[str, Callable[..., Module]] = {
        "clear": LocalAttention,
        "kv": KVCompressedAttention,
        "proxy": ProxyAttention,
    }
    return makes[operator.name](width, heads, head_dim, **options, bias=bias, qk_norm=qk_norm)
