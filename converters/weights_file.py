"""One file of weights, whatever its format: the content decides, not the ending."""

from __future__ import annotations

from pathlib import Path

from edgedit.converters.safetensors_file import looks_like_safetensors, read_safetensors
from edgedit.converters.tensors import read_bytes, regular_file_size
from edgedit.converters.torch_file import TorchFile, is_legacy_torch, read_torch
from edgedit.errors import CheckpointError

__all__ = ["is_weights_name", "read_weights"]

_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_OTHERS = (
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<!", "a web page, perhaps of a log-in"),
    (b"<html", "a web page, perhaps of a log-in"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"{", "a JSON file"),
)


def is_weights_name(name: str) -> bool:
    """Whether a path ends as a weights file does."""
    return name.lower().endswith(_ENDINGS)


def read_weights(path: Path) -> TorchFile:
    """The tensors of a safetensors or torch file, none read yet.

    Raises CheckpointError for any other file, saying what it is where that can be told.
    """
    size = regular_file_size(path)
    start = read_bytes(path, 0, min(size, 64)).tobytes()
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer and not the weights: run `git lfs pull` in its folder.")
    if start.startswith(b"PK") or is_legacy_torch(start):
        return read_torch(path)
    if looks_like_safetensors(start, size) or path.suffix.lower() == ".safetensors":
        return TorchFile(read_safetensors(path), {}, ())
    if path.suffix.lower() in _ENDINGS and not any(start.startswith(magic) for magic, _ in _OTHERS):
        return read_torch(path)
    kind = next((kind for magic, kind in _OTHERS if start.startswith(magic)), "neither safetensors nor torch's")
    raise CheckpointError(f"{path} is {kind}: give weights as .safetensors, .pth, .pt, .bin or .ckpt.")
