"""The autoencoder of an open bundle: latents to rows of pixels, whole or in tiles, and pictures to latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from edgedit import image as images
from edgedit.bundle import Bundle
from edgedit.components import Components
from edgedit.errors import InputError
from edgedit.tiling.component import Tiling, choose
from edgedit.tiling.component import run as run_component

if TYPE_CHECKING:
    from edgedit.tiling.schedule import Schedule

__all__ = ["DECODERS", "Autoencoder", "check_decoder"]

#: What people call the decoders, and the components that they are.
DECODERS = {"full": "decoder", "tiny": "tiny_decoder"}


def check_decoder(bundle: Bundle, name: str) -> None:
    """Raises InputError for a decoder that there is not, or that the bundle does not have."""
    if name not in DECODERS:
        raise InputError(f"unknown decoder {name!r}; choose one of: {', '.join(DECODERS)}")
    if name == "tiny" and DECODERS[name] not in bundle.manifest.components:
        raise InputError(f"{bundle.path.name} has no tiny decoder; make one with: edgedit distill --component decoder")


@dataclass
class Autoencoder:
    """Decoder and encoder.

    Attributes:
        decoder: a key of `DECODERS`.
    """

    components: Components
    decoder: str = "full"

    def __post_init__(self) -> None:
        check_decoder(self.components.bundle, self.decoder)

    def decode_rows(
        self,
        latents: np.ndarray,
        on_rows: Callable[[int, np.ndarray], None],
        tiling: Tiling | None = None,
        *,
        stage: str = "decode",
    ) -> Schedule | None:
        """See `Pipeline.decode_rows`."""
        latents = self.checked_latents(latents)
        if len(latents) != 1:
            raise InputError(f"decode_rows takes the latents of one picture, not of {len(latents)}")
        space, tiling = self.components.latent_space, tiling or Tiling()
        if tiling.max_memory is not None:
            # What other components hold counts as well.
            self.components.close()
        component, scale, shift = DECODERS[self.decoder], space.scaling_factor, space.shift_factor
        if self.decoder == "tiny":
            scale, shift = float(self.components.bundle.component(component).config["scaling_factor"]), 0.0  # type: ignore[arg-type]
        scaled = (latents / np.float32(scale) + np.float32(shift)).astype(np.float32)

        def clipped(top: int, rows: np.ndarray) -> None:
            on_rows(top, np.clip(rows, -1.0, 1.0, out=rows if rows.flags.writeable else None))

        return run_component(
            self.components.bundle,
            self.components.runtime,
            component,
            scaled,
            tiling,
            clipped,
            whole=lambda lean: self.components.session(component, lean=lean),
            begin=lambda: self.components.stage(stage),
        )

    def check_tiling(self, width: int, height: int, tiling: Tiling) -> Schedule | None:
        """See `Pipeline.check_tiling`."""
        factor = self.components.latent_space.scale_factor
        component = DECODERS[self.decoder]
        return choose(
            self.components.bundle, self.components.runtime, component, height // factor, width // factor, tiling
        )[1]

    def checked_latents(self, latents: np.ndarray) -> np.ndarray:
        """float32 [B, C, H, W]. Raises InputError for latents of another shape or not finite."""
        space = self.components.latent_space
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 4 or latents.shape[1] != space.channels or not latents.size:
            raise InputError(f"latents must be [batch, {space.channels}, height, width], not {list(latents.shape)}")
        if not np.isfinite(latents).all():
            raise InputError("the latents hold values that are not numbers; nothing was decoded")
        return latents

    def encode(self, picture: Image.Image, width: int, height: int, tiling: Tiling) -> np.ndarray:
        """See `Pipeline.encode_image`."""
        space = self.components.latent_space
        if tiling.max_memory is not None:
            self.components.close()
        rows: list[np.ndarray] = []
        run_component(
            self.components.bundle,
            self.components.runtime,
            "encoder",
            images.from_image(picture, width, height),
            tiling,
            lambda _, part: rows.append(part[:, : space.channels].copy()),
            lambda lean: self.components.session("encoder", lean=lean),
        )
        latents = np.concatenate(rows, axis=2)
        return (latents - np.float32(space.shift_factor)) * np.float32(space.scaling_factor)
