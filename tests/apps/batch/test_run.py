"""A batch drawn with real pipelines: the same bytes whatever the way, and nothing drawn twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgedit
from edgedit.apps.batch.checking import check_batch
from edgedit.apps.batch.index import read_index, write_parquet
from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.reporter import Reporter
from edgedit.apps.batch.run import Summary
from edgedit.errors import EdgeditError, InputError
from edgedit.metadata import read_recipe

Write = Callable[..., Path]
Draw = Callable[..., Summary]
Read = Callable[..., dict[str, bytes]]
Open = Callable[..., Ledger]


class Counter(Reporter):
    """Counts what is recorded, and can ask for a stop after so many."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit, self.errors, self.warnings = limit, [], []  # type: ignore[var-annotated]

    def failure(self, identity: str, seed: int, error: str, *, final: bool) -> None:
        super().failure(identity, seed, error, final=final)
        self.errors.append((identity, error, final))

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def full(self) -> bool:
        return self.limit is not None and self.drawn >= self.limit


@pytest.fixture
def mixed(write_jobs: Write, tmp_path: Path) -> Path:
    """Jobs of several sizes, samplers, prompt lengths and starts."""
    Image.effect_noise((24, 24), 90).convert("RGB").save(tmp_path / "start.png")
    np.save(tmp_path / "noise.npy", np.random.default_rng(3).standard_normal((1, 4, 8, 8)).astype(np.float32))
    few = {"steps": 2}
    return write_jobs(
        [
            {"id": "a", "prompt": "a red cat", "seeds": [1, 2, 3], **few},
            {"id": "b", "prompt": "a blue dog on the big circle", **few},
            {"id": "c", "prompt": "a red dog", **few, "negative_prompt": "a cat"},
            {"id": "d", "prompt": "a red cat", "seed": 4, "steps": 3, "size": "24x16"},
            {"id": "e", "prompt": "a red cat", "sampler": "euler_ancestral", "guidance_scale": 1, **few},
            {"id": "f", "prompt": "a red cat", "image": "start.png", "strength": 0.7, "steps": 4},
            {"id": "g", "prompt": "a cat", "latents": "noise.npy", **few, "metadata": {"shop": "ü"}},
            {"id": "h", "prompt": "a cat", "rng": "torch", "seed": 2**64 - 1, **few},
        ]
    )


def test_a_batch_draws_what_generate_draws_to_the_byte(
    mixed: Path, draw_batch: Draw, pictures: Read, bundle: Path, tmp_path: Path
) -> None:
    summary = draw_batch(mixed, batch=3)
    assert (summary.done, summary.failed) == (10, 0)
    from edgedit.apps.cli.main import main

    drawn = pictures()
    for job in map(json.loads, mixed.read_text().splitlines()):
        for seed in job.get("seeds", [job.get("seed")]):
            name = f"0000/{job['id']}{f'-{seed}' if 'seeds' in job else ''}.png"
            recipe = read_recipe(tmp_path / "out" / name)
            command = ["generate", job["prompt"], "-m", str(bundle), "-t", "1", "-s", str(recipe["seed"]), "-q"]
            command.append("--force-size")
            for key, flag in (("steps", "--steps"), ("size", "--size"), ("negative_prompt", "-n"), ("rng", "--rng")):
                command += [flag, str(job[key])] if key in job else []
            for key, flag in (("sampler", "--sampler"), ("guidance_scale", "--cfg"), ("strength", "--strength")):
                command += [flag, str(job[key])] if key in job else []
            for key, flag in (("image", "-i"), ("latents", "--latents-in")):
                command += [flag, str(tmp_path / job[key])] if key in job else []
            assert main([*command, "-o", "one.png"]) == 0
            assert Path("one.png").read_bytes() == drawn[name], name


def test_a_batch_refuses_sizes_that_the_model_was_not_made_for_unless_told(
    write_jobs: Write, draw_batch: Draw, pictures: Read, tmp_path: Path
) -> None:
    jobs = [
        {"id": "own", "prompt": "a cat", "steps": 1},
        {"id": "wide", "prompt": "a cat", "steps": 1, "size": "32x16"},
    ]
    refusal = r"line 2: size: the model was not made for 32x16 pixels; take one of 16x16, .* with --force-size"
    with pytest.raises(InputError, match=refusal):
        draw_batch(write_jobs(jobs), force_size=False)
    assert pictures() == {}
    assert draw_batch(write_jobs(jobs)).done == 2
    # What a batch let in once, it lets in when its job file grows.
    more = write_jobs([*jobs, {"id": "tall", "prompt": "a cat", "steps": 1, "size": "16x32"}])
    assert draw_batch(more, force_size=False).done == 3
    wide = read_recipe(tmp_path / "out" / "0000" / "wide.png")
    assert wide["attention_scale"] == pytest.approx((math.log(32) / math.log(16)) ** 0.5)
    assert "attention_scale" not in read_recipe(tmp_path / "out" / "0000" / "own.png")


@pytest.mark.parametrize("way", [{"batch": 1}, {"batch": 4, "workers": 2}, {"low_ram": True, "batch": 2}], ids=str)
def test_bytes_do_not_depend_on_batch_size_workers_or_interruptions(
    way: dict[str, Any], mixed: Path, draw_batch: Draw, pictures: Read, open_ledger: Open
) -> None:
    draw_batch(mixed, "whole", batch=2, low_ram=way.get("low_ram", False))
    total = 0
    for limit in (1, 2, None):
        counter = Counter(limit)
        summary = draw_batch(mixed, "parts", reporter=counter, stop=counter.full, **{"low_ram": False, **way})
        assert summary.stopped == (limit is not None)
        total += counter.drawn
    assert total == 10
    assert pictures("parts") == pictures("whole")
    with open_ledger("parts") as ledger:
        assert check_batch(ledger).problems == []


def test_a_finished_batch_draws_nothing_again(write_jobs: Write, draw_batch: Draw) -> None:
    assert draw_batch(write_jobs(2)).drawn == 2
    counter = Counter()
    assert draw_batch(write_jobs(2), reporter=counter).drawn == 0
    assert counter.drawn == 0


def test_latents_of_a_picture_that_died_in_decoding_are_reused(
    write_jobs: Write, draw_batch: Draw, pictures: Read, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = write_jobs(3)
    draw_batch(jobs, "whole")
    decode = edgedit.Pipeline.decode

    def fail(*_: Any, **__: Any) -> Any:
        raise EdgeditError("decoder: out of memory")

    monkeypatch.setattr(edgedit.Pipeline, "decode", fail)
    assert draw_batch(jobs, retries=0).failed == 3
    assert len(list((tmp_path / "out/.batch/latents").iterdir())) == 3
    monkeypatch.setattr(edgedit.Pipeline, "decode", decode)
    monkeypatch.setattr(edgedit.Pipeline, "denoise_together", fail)
    from edgedit.apps.batch.places import Places

    with Ledger(Places(tmp_path / "out")) as ledger:
        assert ledger.retry() == 3
    assert draw_batch(None).done == 3
    assert pictures() == pictures("whole")
    assert list((tmp_path / "out/.batch/latents").iterdir()) == []


def test_one_bad_picture_fails_alone_and_ends_nothing(
    write_jobs: Write, draw_batch: Draw, open_ledger: Open, pictures: Read
) -> None:
    jobs = [{"id": f"j{i}", "prompt": "a red cat", "seed": i, "steps": 2} for i in range(6)]
    good = write_jobs(jobs, "good.jsonl")
    draw_batch(good, "good")
    # So large a guidance overflows to values that are not numbers.
    bad = write_jobs([*jobs, {"id": "nan", "prompt": "a red cat", "guidance_scale": 1e38, "steps": 2}], "bad.jsonl")
    counter = Counter()
    summary = draw_batch(bad, reporter=counter, batch=3, retries=2)
    assert (summary.done, summary.failed) == (6, 1)
    assert [(identity, final) for identity, _, final in counter.errors] == [
        ("nan", False),
        ("nan", False),
        ("nan", True),
    ]
    assert pictures() == pictures("good")
    with open_ledger() as ledger:
        ((picture, error),) = ledger.failures()
    assert picture.attempts == 3
    assert "values that are not numbers" in error


def test_a_bad_picture_within_a_batch_is_told_from_the_good_ones(
    write_jobs: Write, draw_batch: Draw, tmp_path: Path
) -> None:
    noise = np.zeros((1, 4, 8, 8), np.float32)
    np.save(tmp_path / "good.npy", noise)
    np.save(tmp_path / "bad.npy", noise + np.float32(3e38))
    jobs = [{"id": n, "prompt": "a cat", "latents": f"{n[:-1]}.npy", "steps": 2} for n in ("good1", "bad1", "good2")]
    counter = Counter()
    summary = draw_batch(write_jobs(jobs), reporter=counter, batch=3, retries=0)
    assert (summary.done, summary.failed) == (2, 1)
    assert [identity for identity, _, _ in counter.errors] == ["bad1"]


def test_fail_fast_stops_at_the_first_failure(write_jobs: Write, draw_batch: Draw) -> None:
    bad = {"prompt": "a cat", "guidance_scale": 1e38, "steps": 1}
    jobs = [{**bad, "id": "nan"}] + [{"id": f"j{i}", "prompt": "a cat", "steps": 1} for i in range(40)]
    summary = draw_batch(write_jobs(jobs), fail_fast=True, retries=0, batch=1)
    assert summary.failed == 1
    assert summary.stopped
    assert summary.left > 0


def test_another_model_is_refused_by_its_hash(
    write_jobs: Write, draw_batch: Draw, bundle: Path, tmp_path: Path
) -> None:
    import shutil

    jobs = write_jobs(2)
    draw_batch(jobs, dry_run=True)
    other = tmp_path / "other.edgedit"
    shutil.copytree(bundle, other)
    manifest = json.loads((other / "manifest.json").read_text())
    name = next(iter(manifest["files"]))
    manifest["files"][name]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is not the model that this batch was begun with"):
        draw_batch(jobs, bundle=other)


def test_a_bundle_whose_files_were_replaced_is_refused(
    write_jobs: Write, draw_batch: Draw, bundle: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy.edgedit"
    shutil.copytree(bundle, copy)
    draw_batch(write_jobs(2), bundle=copy, dry_run=True)
    weights = copy / "onnx" / "transformer.onnx.data"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(EdgeditError, match=r"transformer\.onnx\.data is damaged \(wrong SHA-256\)"):
        draw_batch(write_jobs(2), bundle=copy)


def test_settings_that_change_pictures_cannot_change_within_a_batch(write_jobs: Write, draw_batch: Draw) -> None:
    jobs = write_jobs(2)
    draw_batch(jobs, dry_run=True)
    for change in ({"threads": 2}, {"low_ram": True}, {"name": "{id}.webp"}):
        with pytest.raises(InputError, match="pictures of one batch are drawn alike"):
            draw_batch(jobs, **change)


def test_a_job_file_may_grow_and_be_mended_but_not_change(write_jobs: Write, draw_batch: Draw, pictures: Read) -> None:
    jobs: list[Any] = [{"id": "a", "prompt": "a cat", "steps": 1}, {"id": "b", "prompt": ""}]
    draw_batch(write_jobs(jobs), skip_invalid=True)
    first = pictures()
    jobs[1] = {"id": "b", "prompt": "a dog", "steps": 1}
    jobs.append({"id": "c", "prompt": "a dog", "steps": 1})
    summary = draw_batch(write_jobs(jobs))
    assert (summary.done, summary.drawn, summary.skipped_lines) == (3, 2, 0)
    assert pictures()["0000/a.png"] == first["0000/a.png"]
    with pytest.raises(InputError, match="line 1 of the job file: job 'a' is not what it was"):
        draw_batch(write_jobs([{**jobs[0], "seed": 5}, *jobs[1:]]))
    with pytest.raises(InputError, match="1 jobs of this batch are gone"):
        draw_batch(write_jobs(jobs[:2]))
    with pytest.raises(InputError, match="1 lines cannot be used"):
        draw_batch(write_jobs([*jobs, {"prompt": 3}]))
    assert draw_batch(write_jobs(jobs)).done == 3


def test_the_index_has_recipe_times_hash_and_metadata_of_every_picture(
    mixed: Path, draw_batch: Draw, tmp_path: Path
) -> None:
    draw_batch(mixed, name="{index:04d}.jpg")
    entries = {entry["index"]: entry for entry in read_index(tmp_path / "out" / "index.jsonl")}
    assert sorted(entries) == list(range(10))
    assert entries[8]["metadata"] == {"shop": "ü"}
    for entry in entries.values():
        assert read_recipe(tmp_path / "out" / entry["path"]) == entry["recipe"]
        assert set(entry["seconds"]) == {"encode", "denoise", "decode", "save"}
    parquet = pytest.importorskip("pyarrow.parquet")
    assert write_parquet(tmp_path / "out/index.jsonl", tmp_path / "index.parquet") == 10
    table = parquet.read_table(tmp_path / "index.parquet").to_pylist()
    assert {row["sha256"] for row in table} == {entry["sha256"] for entry in entries.values()}
    assert {row["seed"] for row in table} >= {1, 2, 3, 4, 2**64 - 1}


def test_an_index_that_lost_its_end_is_written_again(
    write_jobs: Write, draw_batch: Draw, open_ledger: Open, tmp_path: Path
) -> None:
    draw_batch(write_jobs(2))
    index = tmp_path / "out" / "index.jsonl"
    before = list(read_index(index))
    index.write_bytes(index.read_bytes()[:100])
    draw_batch(write_jobs(3))
    after = {entry["index"]: entry for entry in read_index(index)}
    assert sorted(after) == [0, 1, 2]
    assert all(after[entry["index"]] == entry for entry in before)
    with open_ledger() as ledger:
        assert check_batch(ledger).problems == []


def test_prompts_are_encoded_once_and_kept_on_disk(
    write_jobs: Write, draw_batch: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgedit.runtimes.onnx import OnnxRuntime

    opened: list[str] = []
    original = OnnxRuntime.open

    def counted(self: OnnxRuntime, component: str) -> Any:
        opened.append(component)
        return original(self, component)

    monkeypatch.setattr(OnnxRuntime, "open", counted)
    jobs = [{"id": f"j{i}", "prompt": "a cat", "steps": 1, "seed": i} for i in range(3)]
    draw_batch(write_jobs(jobs))
    assert opened.count("text_encoder") == 1
    opened.clear()
    draw_batch(write_jobs([*jobs, {"id": "more", "prompt": "a cat", "steps": 1}]))
    assert "text_encoder" not in opened
