"""Random autoencoders of every class, converted with their tiles, and their pieces run by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tiny_pipelines import randomize

import edgedit
from edgedit.bundle import Bundle, open_bundle
from edgedit.runtimes.base import RuntimeOptions, open_runtime
from edgedit.tiling.pieces import Pieces, read_pieces
from edgedit.tiling.program import Pass, Program
from edgedit.tiling.run import TileRunner

KINDS = ("kl", "kl-attention", "dc", "dc-shuffle", "tiny", "tiny-bicubic")


def make_autoencoder(kind: str, seed: int) -> Any:
    """A small diffusers autoencoder with random weights."""
    torch.manual_seed(seed)
    if kind.startswith("kl"):
        up = "AttnUpDecoderBlock2D" if kind == "kl-attention" else "UpDecoderBlock2D"
        model: Any = diffusers.AutoencoderKL(
            block_out_channels=(8, 16, 12),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=(up, *("UpDecoderBlock2D",) * 2),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
    elif kind.startswith("dc"):
        shuffle = kind == "dc-shuffle"
        model = diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            downsample_block_type="pixel_unshuffle" if shuffle else "conv",
            upsample_block_type="pixel_shuffle" if shuffle else "interpolate",
        )
    else:
        model = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * 3,
            decoder_block_out_channels=(8,) * 3,
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            upsample_fn="bicubic" if kind == "tiny-bicubic" else "nearest",
        )
    randomize(model, seed)
    return model.eval()


class TiledModel:
    """One converted autoencoder."""

    def __init__(self, kind: str, seed: int, folder: Path) -> None:
        self.model = make_autoencoder(kind, seed)
        self.model.save_pretrained(folder / "checkpoint")
        edgedit.convert(folder / "checkpoint", folder / "model.edgedit", measure=False)
        self.bundle: Bundle = open_bundle(folder / "model.edgedit")
        self.runtime: Any = open_runtime(self.bundle, "onnx", RuntimeOptions(threads=1))
        self.folder, self.seed = folder, seed

    def pieces(self, component: str) -> Pieces:
        tiles = self.bundle.artefact(component, "onnx").tiles
        assert tiles is not None
        return read_pieces(self.bundle.file(tiles))

    def input(self, component: str, height: int, width: int) -> np.ndarray:
        """Random input whose latents are height × width."""
        rng = np.random.default_rng(self.seed)
        shape = (1, 4, height, width) if component == "decoder" else (1, 3, 4 * height, 4 * width)
        return rng.standard_normal(shape).astype(np.float32)

    def whole(self, component: str, array: np.ndarray) -> np.ndarray:
        """The component run whole."""
        session = self.runtime.open(component)
        (name,) = session.inputs
        (output,) = session.run({name: array}).values()
        return output

    def tiled(
        self,
        component: str,
        array: np.ndarray,
        program: Program,
        on_tile: Callable[[int, int], bool | None] | None = None,
    ) -> np.ndarray:
        """The component run by `program`."""
        bands: list[np.ndarray] = []
        TileRunner(
            self.pieces(component),
            lambda graph: self.runtime.open_piece(component, graph),
            self.folder / "scratch",
            on_tile,
        ).run(array, program, lambda _, rows: bands.append(rows.copy()))
        return np.concatenate(bands, axis=2)


def exact_passes(pieces: Pieces, boundaries: Sequence[int], tile: int, *, in_file: bool) -> tuple[Pass, ...]:
    """Exact passes that keep maps at `boundaries` only."""
    passes: list[Pass] = []
    start = 0
    for stop in [*boundaries, len(pieces.stages)]:
        passes += [
            Pass(start, inner, tile, keep=False, in_file=in_file)
            for inner in range(start + 1, stop)
            if inner in pieces.reductions
        ]
        passes.append(Pass(start, stop, tile, keep=True, in_file=in_file))
        start = stop
    return tuple(passes)
