"""Strict accounting of a checkpoint's keys: each is consumed or dropped by name, and every parameter is filled."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgedit.converters.tensors import TensorRef, quoted
from edgedit.errors import ConversionError

__all__ = ["Accounting", "account"]

_LISTED = 24
_COMPARED = 400


@dataclass(frozen=True)
class Accounting:
    """Where every key went.

    Attributes:
        tensors: parameter → its tensor, in the order of the parameters.
        dropped: key of the checkpoint → why it is not used.
        absent: optional parameters that the checkpoint does not have.
    """

    tensors: Mapping[str, TensorRef]
    dropped: Mapping[str, str]
    absent: tuple[str, ...]


def account(
    parameters: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorRef],
    *,
    drop: Sequence[tuple[str, str]] = (),
    optional: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Accounting:
    """Assigns a checkpoint's tensors to a model's parameters of the same names.

    Args:
        parameters: name → shape the model needs.
        tensors: the checkpoint's.
        drop: (regular expression, reason) for keys that the model does not use; it must match the whole key. A
            parameter's own name is never dropped.
        optional: regular expressions of parameters that may be missing.
        config: the configuration `parameters` come from, so that the message can name the field that is wrong.

    Raises ConversionError unless every key is used or dropped and every parameter is filled with the right shape. Its
    message is one line; its `details` list the keys, each beside the nearest match.
    """
    rules = [(re.compile(pattern), reason) for pattern, reason in drop]
    excused = [re.compile(pattern) for pattern in optional]
    used: dict[str, TensorRef] = {}
    absent: list[str] = []
    missing: list[str] = []
    misshapen: list[str] = []
    for name, shape in parameters.items():
        ref = tensors.get(name)
        if ref is None:
            (absent if any(pattern.fullmatch(name) for pattern in excused) else missing).append(name)
        elif tuple(ref.shape) != tuple(shape):
            misshapen.append(name)
        else:
            used[name] = ref
    dropped: dict[str, str] = {}
    unused: list[str] = []
    for key in tensors:
        if key in parameters:
            continue
        reason = next((reason for pattern, reason in rules if pattern.fullmatch(key)), None)
        if reason is None:
            unused.append(key)
        else:
            dropped[key] = reason
    if missing or misshapen or unused:
        raise _refusal(parameters, tensors, unused, missing, misshapen, config or {})
    return Accounting(used, dropped, tuple(absent))


def _refusal(
    parameters: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorRef],
    unused: list[str],
    missing: list[str],
    misshapen: list[str],
    config: Mapping[str, Any],
) -> ConversionError:
    cause = _depth_cause(parameters, tensors, config) or _size_cause(parameters, tensors, misshapen, config)
    counts = [
        f"{len(keys)} {what}"
        for keys, what in ((unused, "unused"), (missing, "missing"), (misshapen, "of another shape"))
        if keys
    ]
    first = cause or f"the first is {_shown((unused + missing + misshapen)[0])}"
    message = (
        f"the weights do not fit the configuration ({', '.join(counts)}): {first}. Give the weights' own config.json."
    )
    sections = [
        _section("in the checkpoint, not used", unused, tensors, missing, parameters),
        _section("needed, not in the checkpoint", missing, parameters, unused, tensors),
        [f"of another shape ({len(misshapen)}):"]
        + [
            f"  {_shown(key)}: has {_shape(tensors[key])}, needs {_shape(parameters[key])}"
            for key in misshapen[:_LISTED]
        ]
        + _rest(misshapen)
        if misshapen
        else [],
    ]
    return ConversionError(message, details="\n".join(line for section in sections for line in section))


def _section(
    title: str, keys: list[str], shapes: Mapping[str, Any], others: list[str], other_shapes: Mapping[str, Any]
) -> list[str]:
    if not keys:
        return []
    lines = [f"{title} ({len(keys)}):"]
    for key in keys[:_LISTED]:
        near = _nearest(key, shapes[key], others, other_shapes)
        lines.append(f"  {_shown(key)} {_shape(shapes[key])}" + (f"   nearest: {near}" if near else ""))
    return lines + _rest(keys)


def _rest(keys: list[str]) -> list[str]:
    return [f"  … and {len(keys) - _LISTED} more"] if len(keys) > _LISTED else []


def _nearest(key: str, shape: Any, others: list[str], shapes: Mapping[str, Any]) -> str:
    """The most similar of `others`: of the same shape and layer if there is one, then of the layer, then any."""
    numbers = re.findall(r"\d+", key)
    layer = [other for other in others if re.findall(r"\d+", other) == numbers]
    same = [other for other in layer if _shape(shapes[other]) == _shape(shape)]
    for candidates in (same, layer, others[:_COMPARED]):
        close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.6)
        if close:
            return f"{_shown(close[0])} {_shape(shapes[close[0]])}"
    return ""


def _shape(value: TensorRef | tuple[int, ...]) -> str:
    return str(list(value.shape if isinstance(value, TensorRef) else value))


def _shown(key: str) -> str:
    return quoted(key)[1:-1]


def _depths(keys: Iterable[str]) -> dict[str, int]:
    """Name of each numbered list ("transformer_blocks") → how many entries it has."""
    entries: dict[str, set[int]] = {}
    for key in keys:
        for match in re.finditer(r"(?:^|(?<=\.))(\d{1,6})\.", key):
            entries.setdefault(key[: match.start()].rstrip("."), set()).add(int(match[1]))
    return {name: len(numbers) for name, numbers in entries.items()}


def _depth_cause(parameters: Mapping[str, Any], tensors: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    wanted, have = _depths(parameters), _depths(tensors)
    for name, count in wanted.items():
        other = have.get(name, count)
        if other == count:
            continue
        fields = [
            field
            for field, value in config.items()
            if type(value) is int and value == count and re.search("layer|depth|block", field)
        ]
        if len(fields) == 1:
            return f"{fields[0]} is {count} and the weights have {other} of {_shown(name)}"
        return f"the configuration makes {count} of {_shown(name)} and the weights have {other}"
    return None


def _size_cause(
    parameters: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorRef],
    misshapen: list[str],
    config: Mapping[str, Any],
) -> str | None:
    """The configuration's field behind the change of size that most of the misshapen tensors share."""
    changes: Counter[tuple[int, int]] = Counter()
    for key in misshapen:
        shape = tensors[key].shape
        if len(shape) == len(parameters[key]):
            changes.update({(a, b) for a, b in zip(parameters[key], shape, strict=True) if a != b})
    if not changes:
        return None
    (wanted, have), _ = max(changes.items(), key=lambda item: (item[1], -item[0][0]))
    fields = _fields_of(wanted, config)
    key = next(key for key in misshapen if have in tensors[key].shape and wanted in parameters[key])
    if fields:
        return f"{fields} gives {wanted} where {_shown(key)} has {have}"
    return f"{_shown(key)} is {_shape(tensors[key])} and should be {_shape(parameters[key])}"


def _fields_of(size: int, config: Mapping[str, Any]) -> str:
    numbers = {field: value for field, value in config.items() if type(value) is int and value > 1}
    fields = [field for field, value in numbers.items() if value == size]
    for heads, count in numbers.items():
        for head, dim in numbers.items():
            # num_attention_heads goes with attention_head_dim, num_cross_attention_heads with cross_attention_head_dim.
            stem = head.removesuffix("_head_dim")
            if stem != head and heads == f"num_{stem}_heads" and count * dim == size:
                fields.append(f"{heads} × {head}")
    return " or ".join(fields[:3])
