"""Recipes: which form each layer of each component gets, by patterns of names."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from edgedit.converters.quantization.form import (
    ACTIVATIONS,
    BITS,
    BLOCKS,
    FORMATS,
    INDEX_BITS,
    INT_BITS,
    ROUNDINGS,
    VECTORS,
    Form,
)
from edgedit.converters.quantization.layers import Layer, fitted
from edgedit.converters.quantization.levels import LEVELS
from edgedit.errors import ConversionError

__all__ = ["COMPONENTS", "MAPS", "Recipe", "Rule", "parse_recipe", "read_recipe"]

COMPONENTS = ("transformer", "text_encoder", "decoder", "encoder", "tiny_decoder")
#: Those whose inputs calibration does not see.
UNSEEN = ("encoder", "tiny_decoder")
#: Those that run in tiles: their convolutions compute in int8, with ranges that calibration finds and that are a tile's
#: as they are the whole's. Nothing else in them does.
MAPS = ("decoder",)
_LARGEST_FILE = 1 << 20
_KEYS = ("bits", "block", "format", "vector", "activations", "rounding", "balance", "rotate", "sparsity")
_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Rule:
    """A pattern of layer names (`*`, `?` and `[abc]` as in a shell) and the form of the layers that it matches."""

    pattern: str
    form: Form


@dataclass(frozen=True)
class Recipe:
    """Rules by component; of the rules that match a layer the last counts. Layers without a rule are float16.

    Attributes:
        name: what the bundle calls the precision.
        rules: by component.
        strict: whether a rule that matches no layer is a mistake; presets serve every architecture and are not strict.
        budget: bytes, or decibels with `budget_unit` "dB", for mixed precision; None where the rules say everything.
    """

    name: str
    rules: Mapping[str, tuple[Rule, ...]]
    strict: bool = True
    budget: float | None = None
    budget_unit: str = ""

    @property
    def calibrated(self) -> tuple[str, ...]:
        """Components for which a rule needs to know the inputs of layers."""

        def needs(component: str, form: Form) -> bool:
            return form.needs_calibration or (component in MAPS and form.int8_activations)

        return tuple(c for c, rules in self.rules.items() if any(needs(c, rule.form) for rule in rules))

    @property
    def computes_in_int8(self) -> bool:
        """Whether any rule asks for int8 arithmetic."""
        return any(rule.form.int8_activations for rules in self.rules.values() for rule in rules)

    def resolve(self, component: str, layers: Mapping[str, Layer]) -> dict[str, Form]:
        """The form of every layer of a component, as it fits the layer.

        Raises ConversionError for a rule of a strict recipe that matches no layer, with the nearest names, or that
        names a single layer and asks of it what it cannot have.
        """
        found = dict.fromkeys(layers, Form(16))
        for rule in self.rules.get(component, ()):
            matched = [name for name in layers if fnmatchcase(name, rule.pattern)]
            if not matched and self.strict:
                raise ConversionError(self._no_layer(component, rule.pattern, layers))
            computes = [name for name in matched if _computes_in_int8(component, layers[name])]
            if self.strict and rule.form.int8_activations and not computes:
                able = "convolutions of 64 channels and more" if component in MAPS else "matrices and 1x1 convolutions"
                raise ConversionError(
                    f"{self.name}: [{component}] {rule.pattern!r} matches none of the layers that compute in int8, "
                    f"which are {able}; leave activations out"
                )
            for name in matched:
                wanted = rule.form if name in computes else replace(rule.form, int8_activations=False, per_token=False)
                form = fitted(wanted, layers[name])
                if self.strict and not _WILD & set(rule.pattern) and form != rule.form:
                    raise ConversionError(
                        f"{self.name}: [{component}] {name} is a {layers[name].kind} of "
                        f"{'x'.join(map(str, layers[name].shape))} and cannot have {rule.form.describe()}; "
                        f"the nearest that it can have: {form.describe()}"
                    )
                found[name] = form
        return found

    def _no_layer(self, component: str, pattern: str, layers: Iterable[str]) -> str:
        names = list(layers)
        near = difflib.get_close_matches(pattern.removesuffix(".weight"), names, n=3, cutoff=0.4) or names[:3]
        return f"{self.name}: [{component}] {pattern!r} matches no layer; nearest: {', '.join(near) or 'none at all'}"


def _computes_in_int8(component: str, layer: Layer) -> bool:
    return layer.has_int8_maps if component in MAPS else layer.has_int8


def read_recipe(path: Path) -> Recipe:
    """The recipe of a TOML file. Raises ConversionError with the place of what is wrong."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConversionError(f"{path}: too large for a recipe; give a TOML file with a line for each pattern")
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror}); give a recipe's TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path}: not TOML ({' '.join(str(error).split())}); mend the recipe") from None
    return parse_recipe(document, str(path), path.stem)


def parse_recipe(document: Mapping[str, Any], source: str, name: str) -> Recipe:
    """A recipe from what TOML or JSON gives: a table a component, a line a pattern.

    Raises ConversionError; `source` is the name used in it.
    """
    unknown = [key for key in document if key not in COMPONENTS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], COMPONENTS, n=1, cutoff=0.0)[0]
        raise ConversionError(
            f"{source}: unknown table [{unknown[0]}]; did you mean [{near}]? A recipe has: {', '.join(COMPONENTS)}"
        )
    if not any(document.values()):
        raise ConversionError(f'{source}: says nothing of any layer; write, under [transformer], "*" = {{bits = 8}}')
    rules = {}
    for component, lines in document.items():
        if not isinstance(lines, Mapping):
            raise ConversionError(f"{source}: {component} must be a table; write [{component}] and lines below it")
        rules[component] = tuple(
            Rule(pattern, _form(line, f"{source}: [{component}] {pattern!r}")) for pattern, line in lines.items()
        )
        if component in UNSEEN and any(rule.form.needs_calibration for rule in rules[component]):
            raise ConversionError(
                f"{source}: [{component}] sees no inputs in calibration; leave rounding and balance out"
            )
    return Recipe(name, rules)


def _form(line: Any, place: str) -> Form:
    if not isinstance(line, Mapping):
        raise ConversionError(f"{place}: must be a table such as {{bits = 4, block = 64}} (a pattern stands in quotes)")
    for key in line:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise ConversionError(f"{place}: unknown key {key!r}; did you mean {near!r}? Keys are: {', '.join(_KEYS)}")

    def choice(key: str, choices: tuple[Any, ...], default: Any) -> Any:
        value = line.get(key, default)
        if key in line and (isinstance(value, bool) or value not in choices):
            raise ConversionError(f"{place}: {key} must be one of {', '.join(map(str, choices))}, not {value!r}")
        return value

    if "bits" not in line:
        raise ConversionError(f"{place}: bits is missing; choose from {', '.join(map(str, BITS))}")
    bits, format = choice("bits", BITS, None), choice("format", FORMATS, "int")
    block = choice("block", BLOCKS, 64 if bits < 8 and format != "palette" else None)
    balance, rotate, sparsity = line.get("balance"), line.get("rotate", False), line.get("sparsity")
    activations = choice("activations", ACTIVATIONS, "none")
    form = Form(
        bits=bits,
        block=block,
        int8_activations=activations != "none",
        per_token=activations == "int8-token",
        format=format,
        rounding=choice("rounding", ROUNDINGS, "nearest"),
        balance=None if balance is None else _share(balance, f"{place}: balance"),
        rotate=rotate,
        vector=choice("vector", VECTORS, None),
        sparsity=None if sparsity is None else _share(sparsity, f"{place}: sparsity"),
    )
    if not isinstance(rotate, bool):
        raise ConversionError(f"{place}: rotate must be true or false, not {rotate!r}")
    if not form.is_coded and replace(form, block=None, sparsity=None) != Form(bits):
        raise ConversionError(f"{place}: {bits} bits are a float, which has no codes; leave the other keys out")
    if block is not None and (bits >= 8 or format == "palette"):
        raise ConversionError(f"{place}: block goes with 4, 3 or 2 bits of format int; leave it out")
    if format == "int" and form.is_coded and bits not in INT_BITS:
        raise ConversionError(f"{place}: {bits} bits are a palette's; choose from {', '.join(map(str, INT_BITS))}")
    if format in LEVELS and bits != 4:
        raise ConversionError(f"{place}: format {format} has 4 bits, not {bits}")
    if format == "log" and form.int8_activations:
        raise ConversionError(
            f"{place}: the numbers of format log fill int8 and leave no room for the scales of blocks; "
            "choose format fp4 or int, or leave activations out"
        )
    _check_palette(form, place)
    _check_sparsity(form, place)
    return form


def _check_palette(form: Form, place: str) -> None:
    if form.format != "palette":
        if form.vector is not None:
            raise ConversionError(f'{place}: vector goes with format = "palette"; leave it out')
        return
    if form.index_bits not in INDEX_BITS:
        fits = [width for width in VECTORS if form.bits * width in INDEX_BITS]
        raise ConversionError(
            f"{place}: a palette of {form.bits} bits has entries of {' or '.join(map(str, fits))} weights, "
            f"not {form.width}; set vector"
        )


def _check_sparsity(form: Form, place: str) -> None:
    if form.sparsity is None:
        return
    if not 0 < form.sparsity < 1:
        raise ConversionError(f"{place}: sparsity must be above 0 and below 1, not {form.sparsity:g}")
    if form.rounding != "nearest":
        raise ConversionError(
            f"{place}: {form.rounding} rounding would fill the zeros of sparsity; leave one of them out"
        )
    if form.bits == 32 or (form.format != "palette" and form.bits < 8):
        raise ConversionError(
            f'{place}: sparsity goes with 16 or 8 bits or format = "palette", since a bit a weight says which are '
            "stored; choose one of them"
        )


def _share(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConversionError(f"{place} must be a number from 0 to 1, not {value!r}")
    return float(value)
