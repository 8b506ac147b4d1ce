"""Denoising in overlapping windows: a network is asked about parts of its own size of a larger picture.

Bar-Tal et al., "MultiDiffusion" (2023), section 3: every window sees its part of the same noisy latents, and where
windows overlap their predictions are averaged, here with weights that fall off towards a window's edges (Jimenez,
"Mixture of Diffusers" (2023), section 3.2). For solvers that are linear in the prediction, averaging predictions is
averaging what the windows would step to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgedit.denoise import StoppedError

__all__ = ["OnWindow", "Windows"]

Floats = npt.NDArray[np.float32]
#: Called with (windows done, windows in all) of one evaluation of the network; returning False stops the run.
OnWindow = Callable[[int, int], bool | None]


@dataclass(frozen=True)
class Windows:
    """Windows of `side` × `side` latents that overlap by at least `overlap`, placed at multiples of `step`.

    A picture that is smaller than a window in a direction is covered whole in it.
    """

    side: int
    overlap: int
    step: int = 1

    def starts(self, length: int) -> list[int]:
        """Where the windows along an axis of `length` latents begin: evenly spread, the last one ends with the axis."""
        side = min(self.side, length)
        count = 1 if side == length else math.ceil((length - self.overlap) / (side - self.overlap))
        last = length - side
        return [round(i * last / (max(count - 1, 1)) / self.step) * self.step for i in range(count)]

    def weights(self, length: int) -> Floats:
        """A window's weights along an axis: 1 in its middle, rising and falling in a straight line over `overlap`."""
        side = min(self.side, length)
        places = np.arange(side, dtype=np.float32) + np.float32(0.5)
        edge: Floats = np.minimum(places, side - places) / np.float32(max(self.overlap, 1))
        return edge.clip(max=np.float32(1))

    def places(self, height: int, width: int) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of every window, row by row."""
        tall, wide = min(self.side, height), min(self.side, width)
        for top in self.starts(height):
            for left in self.starts(width):
                yield slice(top, top + tall), slice(left, left + wide)

    def blend(self, predict: Callable[[Floats], Floats], latents: Floats, on_window: OnWindow | None = None) -> Floats:
        """`predict` asked about every window of `latents` [B, C, H, W], and its answers averaged by their weights.

        One window gives what `predict` gives for the whole, to the bit. Raises StoppedError when `on_window` returned
        False.
        """
        height, width = latents.shape[2:]
        places = list(self.places(height, width))
        if len(places) == 1:
            return predict(latents)
        weight = self.weights(height)[:, None] * self.weights(width)
        total = np.zeros((height, width), np.float32)
        for rows, columns in places:
            total[rows, columns] += weight
        result: Floats | None = None
        for done, (rows, columns) in enumerate(places, 1):
            answer = predict(np.ascontiguousarray(latents[:, :, rows, columns]))
            if result is None:
                result = np.zeros((*answer.shape[:2], height, width), np.float32)
            result[:, :, rows, columns] += answer * (weight / total[rows, columns])
            if on_window is not None and on_window(done, len(places)) is False:
                raise StoppedError(latents)
        assert result is not None
        return result
