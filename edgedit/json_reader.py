"""A typed walk through untrusted JSON whose errors are one line and name the place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from edgedit.errors import BundleError

__all__ = ["JsonNode", "parse_json"]

T = TypeVar("T")
_MISSING = object()


def parse_json(data: bytes, source: str) -> JsonNode:
    """The root of the JSON text in `data`. `source` is the name used in errors.

    Stricter than `json.loads`: no NaN or infinity, no key twice in one object. Raises BundleError.
    """
    try:
        value = json.loads(
            data, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_object_without_duplicates
        )
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"{source}: not JSON ({reason}); fetch or convert the bundle again") from None
    return JsonNode(value, source)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return result


@dataclass(frozen=True, slots=True)
class JsonNode:
    """A JSON value and where it stands. Every reader raises BundleError when the value is of another kind."""

    value: object
    source: str
    path: str = ""

    def fail(self, problem: str) -> NoReturn:
        """Raises BundleError: this place, `problem`, and what to do."""
        place = f"{self.source}: {self.path}" if self.path else self.source
        raise BundleError(f"{place}: {problem}; mend the manifest or convert the model again")

    def _expected(self, what: str) -> NoReturn:
        if self.value is _MISSING:
            self.fail(f"missing, expected {what}")
        shown = json.dumps(self.value, default=repr)
        self.fail(f"expected {what}, found {shown if len(shown) <= 60 else shown[:57] + '...'}")

    def at(self, key: str) -> JsonNode:
        """The member `key`; a missing one is noticed when it is read."""
        step = key if re.fullmatch(r"[A-Za-z_]\w*", key) else f"[{json.dumps(key)}]"
        joined = step if step.startswith("[") or not self.path else f".{step}"
        return JsonNode(self.members().get(key, _MISSING), self.source, self.path + joined)

    def members(self) -> Mapping[str, object]:
        """The value, which must be an object."""
        if not isinstance(self.value, Mapping):
            self._expected("an object")
        return self.value

    def items(self, pattern: str, what: str, *, minimum: int = 0) -> Iterator[tuple[str, JsonNode]]:
        """At least `minimum` members of an object, in order; every key must match `pattern`, which `what` describes."""
        if len(self.members()) < minimum:
            self._expected(f"an object with at least {minimum} member")
        for key in self.members():
            if not re.fullmatch(pattern, key):
                self.fail(f"the key {json.dumps(key)} is not {what}")
            yield key, self.at(key)

    def elements(self, *, minimum: int = 0, exactly: int | None = None) -> list[JsonNode]:
        """The elements of an array with at least `minimum` or `exactly` so many of them."""
        value = self.value
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            self._expected("an array")
        if len(value) < minimum or (exactly is not None and len(value) != exactly):
            self._expected(f"an array of {'at least ' if exactly is None else ''}{exactly or minimum} elements")
        return [JsonNode(item, self.source, f"{self.path}[{index}]") for index, item in enumerate(value)]

    def text(self, *, empty: bool = False) -> str:
        """A string, not empty unless `empty`."""
        if not isinstance(self.value, str):
            self._expected("a string")
        if not (empty or self.value):
            self._expected("a string that is not empty")
        return self.value

    def matching(self, pattern: str, what: str) -> str:
        """A string that `pattern` matches as a whole; `what` describes it in the error."""
        if not isinstance(self.value, str) or not re.fullmatch(pattern, self.value):
            self._expected(what)
        return self.value

    def one_of(self, choices: Sequence[str]) -> str:
        """One of the strings `choices`."""
        if not isinstance(self.value, str) or self.value not in choices:
            self._expected("one of " + ", ".join(json.dumps(choice) for choice in choices))
        return self.value

    def integer(self, *, minimum: int) -> int:
        """An integer of at least `minimum`; 2.0 is one, as in JSON Schema, and true is not."""
        value = self.value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self._expected(f"an integer of at least {minimum}")
        return value

    def number(self, *, above: float | None = None) -> float:
        """A number, greater than `above` when that is given."""
        value = self.value
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._expected("a number")
        if above is not None and value <= above:
            self._expected(f"a number above {above:g}")
        return float(value)

    def boolean(self) -> bool:
        """true or false."""
        if not isinstance(self.value, bool):
            self._expected("true or false")
        return self.value

    def nullable(self, read: Callable[[JsonNode], T]) -> T | None:
        """None for null, otherwise what `read` makes of this node. The key must be there all the same."""
        return None if self.value is None else read(self)
