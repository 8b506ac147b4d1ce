"""Budgets, modes and refusals."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiled_models import TiledModel

from edgedit.device import parse_memory, resident_memory
from edgedit.errors import InputError
from edgedit.tiling.component import FREE_SHARE, Tiling, choose, run
from edgedit.tiling.memory import pass_cost, whole_peak
from edgedit.tiling.pieces import Sums
from edgedit.tiling.program import Pass
from edgedit.tiling.regions import Extent
from edgedit.tiling.schedule import Budget, make_schedule

Get = Callable[[str], TiledModel]


def decode(made: TiledModel, latents: np.ndarray, tiling: Tiling) -> tuple[np.ndarray, Any]:
    bands: list[np.ndarray] = []
    schedule = run(
        made.bundle,
        made.runtime,
        "decoder",
        latents,
        tiling,
        lambda _, rows: bands.append(rows.copy()),
        lambda lean: made.runtime.open("decoder", lean=lean),
    )
    return np.concatenate(bands, axis=2), schedule


@pytest.mark.parametrize("kind", ["kl", "dc", "tiny"])
def test_what_fits_runs_whole_and_the_rest_in_tiles_with_the_same_result(tiled_model: Get, kind: str) -> None:
    made = tiled_model(kind)
    latents = made.input("decoder", 40, 33)
    whole, schedule = decode(made, latents, Tiling())
    assert schedule is None
    for tiling in (Tiling("exact"), Tiling(tile_size=24), Tiling(tile_overlap=48)):
        found, schedule = decode(made, latents, tiling)
        assert schedule is not None
        assert np.abs(found - whole).max() <= 2e-4 * max(1, np.abs(whole).max())
        assert tiling.tile_overlap is None or schedule.halo <= tiling.tile_overlap
        assert tiling.tile_size is None or schedule.tile == tiling.tile_size


def test_a_smaller_budget_takes_less_memory_and_no_less_time(tiled_model: Get) -> None:
    pieces = tiled_model("kl").pieces("decoder")
    extent = Extent(256, 200)
    found = [make_schedule(pieces, extent, "exact", Budget(memory, 1e12)) for memory in (400e6, 160e6, 90e6)]
    assert all(schedule is not None for schedule in found)
    peaks = [schedule.peak for schedule in found if schedule]
    seconds = [schedule.seconds for schedule in found if schedule]
    assert peaks == sorted(peaks, reverse=True)
    assert seconds == sorted(seconds)
    assert peaks[-1] <= 90e6 < whole_peak(pieces, 256, 200)


@pytest.mark.parametrize("kind", ["kl", "dc", "tiny"])
def test_a_strip_of_any_length_has_a_schedule(tiled_model: Get, kind: str) -> None:
    pieces = tiled_model(kind).pieces("decoder")
    long = random.randint(800, 3000)
    for short, memory in itertools.product((8, 32, 64), (60e6, 120e6, 240e6, 480e6)):
        for extent in (Extent(short, long), Extent(long, short)):
            found = make_schedule(pieces, extent, "exact", Budget(memory, 1e12))
            assert found is None or found.peak <= memory, (short, long)


def test_what_is_summed_over_as_it_was_kept_counts(tiled_model: Get) -> None:
    """AutoencoderDC sums over a kept map and over what the pass makes of it; a tile of both is there at once."""
    pieces = tiled_model("dc").pieces("decoder")
    counted = 0
    for stop, parts in pieces.reductions.items():
        for part in (part for part in parts if isinstance(part, Sums)):
            if set(part.inputs) & set(pieces.live(stop - 1)):
                counted += 1
                cost = pass_cost(pieces, Pass(stop - 1, stop, 64, False, True, True), Extent(512, 512), 0)
                channels = sum(pieces.values[name].channels for name in part.inputs)
                assert cost.peak >= 64 * 64 * (4 * channels + part.workspace)
    assert counted


def test_without_scratch_an_exact_schedule_runs_parts_again(tiled_model: Get) -> None:
    pieces = tiled_model("kl").pieces("decoder")
    kept = make_schedule(pieces, Extent(256, 256), "exact", Budget(90e6, 1e12))
    again = make_schedule(pieces, Extent(256, 256), "exact", Budget(90e6, 8e6))
    assert kept is not None
    assert again is not None
    assert again.scratch <= 8e6 < kept.scratch
    assert again.seconds > kept.seconds


@pytest.mark.parametrize(
    ("tiling", "words"),
    [
        (Tiling(max_memory="10M"), "10 MB do not suffice .* at least"),
        (Tiling("off", max_memory="10M"), "do not suffice to run the decoder whole"),
        (Tiling(tile_size=1), "a tile of 1 pixels is smaller than its halo"),
        (Tiling(tile_size=64, tile_overlap=1), "a tile overlap of 1 pixels is less than"),
        (Tiling("often"), "unknown tiling 'often'; choose one of: auto, off, exact, fast"),
        (Tiling(tile_size=0), "a tile size is a whole number of pixels"),
        (Tiling("off", tile_size=64), "does nothing with tiling off"),
        (Tiling(max_memory="much"), "write it like 3G"),
    ],
    ids=["budget", "budget-whole", "tile", "overlap", "mode", "size", "off", "memory"],
)
def test_a_setting_that_cannot_be_honoured_is_one_line(tiled_model: Get, tiling: Tiling, words: str) -> None:
    made = tiled_model("kl")
    with pytest.raises(InputError, match=words) as caught:
        choose(made.bundle, made.runtime, "decoder", 64, 64, tiling)
    assert "\n" not in str(caught.value)


def test_the_smallest_budget_that_is_named_works(tiled_model: Get) -> None:
    made = tiled_model("kl")
    with pytest.raises(InputError) as caught:
        choose(made.bundle, made.runtime, "decoder", 512, 512, Tiling(max_memory=1))
    found = re.search(r"at least ([0-9.]+ [MG]B)", str(caught.value))
    assert found is not None
    named = parse_memory(found[1])
    assert named > resident_memory()
    _, schedule = choose(made.bundle, made.runtime, "decoder", 512, 512, Tiling(max_memory=named + 30_000_000))
    assert schedule is not None


@pytest.mark.parametrize(
    ("text", "count"), [("3G", 3 * 10**9), ("800M", 8 * 10**8), ("1.5 GB", 15 * 10**8), ("2GiB", 2 << 30), (77, 77)]
)
def test_sizes_of_memory_are_read(text: str | int, count: int) -> None:
    assert parse_memory(text) == count


def test_maps_come_out_of_an_arena_only_where_memory_is_free_and_no_limit_is_named(
    tiled_model: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiled_model("kl")
    latents = made.input("decoder", 16, 16)
    peak = whole_peak(made.pieces("decoder"), 16, 16)
    found, told = [], []
    for free, limit in ((1e12, None), (1e12, "8G"), (peak / FREE_SHARE * 1.1, None)):
        monkeypatch.setattr("edgedit.tiling.component.available_memory", lambda free=free: free)

        def whole(lean: bool) -> Any:
            told.append(lean)
            return made.runtime.open("decoder", lean=lean)

        run(
            made.bundle,
            made.runtime,
            "decoder",
            latents,
            Tiling(max_memory=limit),
            lambda _, rows: found.append(rows.copy()),
            whole,
        )
    assert told == [False, True, True]
    assert all(np.array_equal(one, found[0]) for one in found)
