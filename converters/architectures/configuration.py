"""Reading a component's `config.json`: the class's defaults, and nothing that a graph would silently ignore."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from edgedit.errors import ConversionError

__all__ = ["resolve"]


def resolve(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    optional: Mapping[str, Any] | None = None,
    allowed: Mapping[str, Collection[Any]] | None = None,
) -> dict[str, Any]:
    """`config` completed with `defaults`. Keys that begin with "_" are diffusers' own notes and are left out.

    A key that `defaults` lacks is refused. So is a value of another kind than its default, where an int stands for a
    whole number above 0, a float for any number and a bool for true or false. An entry of `optional` may also be null,
    and is otherwise of the kind of the example given there; an entry of `allowed` is one of the values listed there.
    A default of None outside these leaves the value to the caller.

    Raises ConversionError that names the key and the value.
    """
    optional, allowed = optional or {}, allowed or {}
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in values.items():
        if key not in defaults:
            raise ConversionError(f"configuration entry {key}={value!r} is not supported: convert a model without it")
        if key in allowed:
            if value not in allowed[key]:
                choices = " or ".join(repr(choice) for choice in allowed[key])
                raise ConversionError(f"configuration entry {key}={value!r} is not supported: it must be {choices}")
        elif not (key in optional and value is None):
            example = optional.get(key, defaults[key])
            if not _same_kind(value, example):
                raise ConversionError(f"configuration entry {key}={value!r} is not supported: {_wanted(example)}")
    return {**defaults, **values}


def _same_kind(value: Any, example: Any) -> bool:
    if example is None:
        return True
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(example, bool) and isinstance(value, bool)
    if isinstance(example, int):
        return isinstance(value, int) and value > 0
    if isinstance(example, float):
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, type(example))


def _wanted(example: Any) -> str:
    if isinstance(example, bool):
        return "it must be true or false"
    if isinstance(example, int):
        return "it must be a whole number above 0"
    return f"it must be like {example!r}"
