"""How one layer is stored and computed: the line of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["ACTIVATIONS", "BITS", "BLOCKS", "FORMATS", "INDEX_BITS", "INT_BITS", "ROUNDINGS", "VECTORS", "Form"]

BITS = (32, 16, 8, 6, 4, 3, 2, 1)
INT_BITS = (8, 4, 3, 2)
BLOCKS = (128, 64, 32, 16)
FORMATS = ("int", "palette", "fp4", "log")
ROUNDINGS = ("nearest", "adaptive", "descent")
ACTIVATIONS = ("none", "int8", "int8-token")
#: Weights to an entry of a palette, and bits of an entry's number.
VECTORS = (1, 2, 4, 8)
INDEX_BITS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Form:
    """How the weight of a layer is stored, and what is done so that less is lost.

    Attributes:
        bits: 32 or 16 for a float, 8, 4, 3 or 2 for codes, also 6 or 1 for palettes.
        block: weights to a scale along the input axis; None: one scale an output channel.
        int8_activations: the layer computes in int8; its input is rounded as it comes, with one range for the tensor.
        format: "int" for evenly spaced codes; "palette" for learned entries of `width` weights each; "fp4" and "log"
            for four-bit codes of unevenly spaced numbers (see `levels`).
        rounding: "nearest"; "adaptive": each rounding error is taken up by the weights not yet rounded, so that the
            layer's output on calibration inputs changes least (Frantar et al., "GPTQ", 2022, algorithm 1); "descent":
            then input by input to what is best beside the others (Behdin et al., "QuantEase", 2023).
        balance: share of the input's outliers that is moved into the weights, 0 to 1 (Xiao et al., "SmoothQuant", 2022,
            equation 4; ViDiT-Q, section 4.2), None for none of it.
        rotate: mix input channels in groups by a Hadamard matrix, which spreads outliers (Ashkboos et al., "QuaRot",
            2024).
        per_token: with int8 activations, each token has a range of its own.
        vector: weights to an entry of a palette; None: as many as fill a byte.
        sparsity: share of the weights that become zero and are not stored, 0 to 1; None for none.
    """

    bits: int
    block: int | None = None
    int8_activations: bool = False
    format: str = "int"
    rounding: str = "nearest"
    balance: float | None = None
    rotate: bool = False
    per_token: bool = False
    vector: int | None = None
    sparsity: float | None = None

    @property
    def width(self) -> int:
        """Weights to an entry of a palette."""
        return self.vector or 8 // self.bits

    @property
    def index_bits(self) -> int:
        """Bits of the number of a palette's entry."""
        return self.bits * self.width

    @property
    def is_coded(self) -> bool:
        """Whether the weight is stored as codes and not as a float."""
        return self.bits <= 8

    @property
    def needs_calibration(self) -> bool:
        """Whether the layer's inputs must be known."""
        return self.is_coded and (self.rounding != "nearest" or self.balance is not None)

    def as_dict(self) -> dict[str, Any]:
        """The keys of a recipe's line; what is at its default is left out."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "int8_activations":
                found |= {"activations": "int8-token" if self.per_token else "int8"} if value else {}
            elif field.name == "per_token":
                continue
            elif field.name == "bits" or value != field.default:
                found[field.name] = value
        return found

    def describe(self) -> str:
        """In words: "4 bits, blocks of 64, adaptive"."""
        zeros = [f"{self.sparsity:.0%} zeros"] if self.sparsity is not None else []
        if not self.is_coded:
            return ", ".join([f"float{self.bits}", *zeros])
        words = [f"{self.bits} bits per channel" if self.block is None else f"{self.bits} bits, blocks of {self.block}"]
        if self.format in ("fp4", "log"):
            name = "e2m1 floats" if self.format == "fp4" else "twin logarithms"
            words = [f"{name} of {self.bits} bits, blocks of {self.block}"]
        if self.format == "palette":
            each = f"{self.width} weights" if self.width > 1 else "a weight"
            words = [f"{self.bits} bits, palette of {2**self.index_bits} entries of {each}"]
        words += ["int8 arithmetic" + " by tokens" * self.per_token] if self.int8_activations else []
        words += [self.rounding] if self.rounding != "nearest" else []
        words += [f"balanced {self.balance:g}"] if self.balance is not None else []
        words += ["rotated"] if self.rotate else []
        words += zeros
        return ", ".join(words)
