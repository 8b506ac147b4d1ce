"""Tiles give the result of the whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tiled_models import KINDS, TiledModel, exact_passes

from edgedit.errors import InputError
from edgedit.tiling.pieces import Moments
from edgedit.tiling.program import Pass, Program
from edgedit.tiling.regions import Region
from edgedit.tiling.run import TileRunner, TilesStoppedError
from edgedit.tiling.stores import Map

Get = Callable[[str], TiledModel]
TOLERANCE = 2e-4


@pytest.mark.parametrize("component", ["decoder", "encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_any_size_give_the_result_of_the_whole(tiled_model: Get, kind: str, component: str) -> None:
    made = tiled_model(kind)
    pieces = made.pieces(component)
    array = made.input(component, 9, 14)
    wanted = made.whole(component, array)
    everywhere = pieces.boundaries[1:-1]
    seldom = everywhere[len(everywhere) // 2 :: 100]
    drawn = bool(np.random.default_rng().integers(2))
    cases = ((7, everywhere, drawn), (512, everywhere, False), (16, seldom, False), (64, (), False))
    for tile, kept, in_file in cases:
        program = Program(exact_passes(pieces, kept, tile, in_file=in_file))
        found = made.tiled(component, array, program)
        worst = np.abs(found - wanted).max()
        assert worst <= TOLERANCE * max(1.0, np.abs(wanted).max()), (kind, component, tile, in_file, made.seed)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_map_that_goes_on_unchanged_is_kept_once(
    tiled_model: Get, in_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiled_model("kl")
    pieces = made.pieces("decoder")
    begun: list[int] = []
    store = TileRunner._store

    def count(self: TileRunner, channels: int, whole: Region, step: Pass) -> Map:
        begun.append(step.stop)
        return store(self, channels, whole, step)

    monkeypatch.setattr(TileRunner, "_store", count)
    made.tiled(
        "decoder",
        made.input("decoder", 8, 8),
        Program(exact_passes(pieces, pieces.boundaries[1:-1], 16, in_file=in_file)),
    )
    kept = {name for boundary in begun for name in pieces.live(boundary)}
    assert len(begun) == len(kept)


@pytest.mark.parametrize("kind", ["kl", "dc", "tiny"])
def test_the_whole_that_tiles_are_compared_with_is_that_of_diffusers(tiled_model: Get, kind: str) -> None:
    import torch

    made = tiled_model(kind)
    latents = made.input("decoder", 7, 5)
    with torch.no_grad():
        wanted = made.model.decode(torch.from_numpy(latents), return_dict=False)[0].numpy()
    program = Program(exact_passes(made.pieces("decoder"), (), 16, in_file=False))
    np.testing.assert_allclose(made.tiled("decoder", latents, program), wanted, atol=2e-4 * np.abs(wanted).max())


def test_halos_are_as_wide_as_they_must_be(tiled_model: Get) -> None:
    """With one pixel less of halo, pixels at the border of a tile come out wrong."""
    from dataclasses import replace

    made = tiled_model("tiny")
    pieces = made.pieces("decoder")
    array = made.input("decoder", 9, 9)
    wanted = made.whole("decoder", array)
    for number, stage in enumerate(pieces.stages):
        if max(stage.halo) == 0:
            continue
        less = replace(stage, halo=(stage.halo[0] - 1, stage.halo[1]))
        starved = replace(pieces, stages=(*pieces.stages[:number], less, *pieces.stages[number + 1 :]), _live={})
        made.pieces = lambda component, starved=starved: starved  # type: ignore[method-assign]
        try:
            passes = exact_passes(starved, starved.boundaries[1:-1], 8, in_file=False)
            found = made.tiled("decoder", array, Program(passes))
        finally:
            del made.pieces
        # Rounding alone is below 5e-6; how much one pixel weighs depends on the random weights.
        assert np.abs(found - wanted).max() > 2e-5, stage.graph


def test_coarse_moments_come_close(tiled_model: Get) -> None:
    made = tiled_model("kl")
    pieces = made.pieces("decoder")
    rng = np.random.default_rng(made.seed)
    latents = np.repeat(np.repeat(rng.standard_normal((1, 4, 4, 4)), 16, 2), 16, 3).astype(np.float32)
    wanted = np.clip(made.whole("decoder", latents), -1, 1)
    last_other = max(b for b, parts in pieces.reductions.items() if any(not isinstance(p, Moments) for p in parts))
    scale = max(value.scale for value in pieces.values.values())
    start = next(b for b in pieces.boundaries if b > last_other and pieces.scale_at(b) == scale)
    head = exact_passes(pieces, [b for b in pieces.boundaries[1:] if b <= start], 64, in_file=False)[:-1]
    head = tuple(p for p in head if p.stop <= start)
    last = max(pieces.reductions)
    coarse = tuple(Pass(start, b, 64, keep=False) for b in sorted(pieces.reductions) if start < b <= last)
    program = Program(
        (*head, Pass(start, len(pieces.stages), 64, keep=True, reduce=False)), coarse, len(head), (2, 4), (1.5, -0.5)
    )
    found = np.clip(made.tiled("decoder", latents, program), -1, 1)
    assert 0 < np.mean((found - wanted) ** 2) < 2e-3


def test_the_callback_sees_every_tile_and_can_stop(tiled_model: Get) -> None:
    made = tiled_model("dc")
    array = made.input("decoder", 9, 14)
    program = Program(exact_passes(made.pieces("decoder"), (), 16, in_file=True))
    seen: list[tuple[int, int]] = []
    made.tiled("decoder", array, program, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
    with pytest.raises(TilesStoppedError):
        made.tiled("decoder", array, program, lambda done, total: done < 2)


def test_a_full_scratch_disk_is_one_line(tiled_model: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    class Full:
        def seek(self, place: int) -> None: ...
        def close(self) -> None: ...
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgedit.tiling.stores._scratch", lambda folder: Full())
    made = tiled_model("tiny")
    pieces = made.pieces("decoder")
    program = Program(exact_passes(pieces, pieces.boundaries[1:-1], 16, in_file=True))
    with pytest.raises(InputError, match="No space left") as caught:
        made.tiled("decoder", made.input("decoder", 9, 9), program)
    assert "\n" not in str(caught.value)
