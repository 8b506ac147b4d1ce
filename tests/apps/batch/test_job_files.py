"""Job files: every format gives the same jobs, and every mistake has its line, its field and its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgedit.apps.batch.job_files import kind_of, read_jobs
from edgedit.apps.batch.jobs import Mistake
from edgedit.apps.batch.naming import DEFAULT_NAME, NameTemplate
from edgedit.apps.batch.planning import PlannedJob, Shard, plan
from edgedit.apps.batch.run import Summary
from edgedit.bundle import open_bundle
from edgedit.errors import InputError

Write = Callable[..., Path]

#: What stands in line 2, the field that is at fault, and words of the reason.
MISTAKES: dict[str, tuple[Any, str, str]] = {
    "not JSON": ('{"prompt": "a cat"', "", "is not JSON"),
    "no object": ('["a cat"]', "", "is not a JSON object"),
    "a key twice": ('{"prompt": "a cat", "prompt": "a dog"}', "", "'prompt' stands twice"),
    "not a number": ('{"prompt": "a cat", "guidance_scale": NaN}', "", "NaN is not a JSON number"),
    "misspelt field": ({"prompt": "a cat", "step": 3}, "step", "did you mean steps?"),
    "unknown field": ({"prompt": "a cat", "colour": "red"}, "colour", "is not a field of a job"),
    "no prompt": ({"seed": 3}, "prompt", "is missing"),
    "empty prompt": ({"prompt": " "}, "prompt", "is empty"),
    "prompt no text": ({"prompt": 7}, "prompt", "must be a text, not 7"),
    "half a character": ('{"prompt": "a \\ud800 cat"}', "prompt", "half a surrogate pair"),
    "seed no number": ({"prompt": "a cat", "seed": "x"}, "seed", 'from 0 to 2^64 - 1, not "x"'),
    "seed too large": ({"prompt": "a cat", "seed": 2**64}, "seed", "from 0 to 2^64 - 1"),
    "seed and seeds": ({"prompt": "a cat", "seed": 1, "seeds": [2]}, "seeds", "says the same as seed"),
    "a seed twice": ({"prompt": "a cat", "seeds": [2, 2]}, "seeds", "one seed twice"),
    "width odd": ({"prompt": "a cat", "width": 30}, "width", "is not a multiple of 4"),
    "size malformed": ({"prompt": "a cat", "size": "16"}, "size", 'must be like "512x512"'),
    "size and width": ({"prompt": "a cat", "size": "16x16", "width": 16}, "width", "says the same as size"),
    "size not trained": (
        {"prompt": "a cat", "size": "32x20"},
        "size",
        "was not made for 32x20 pixels; take one of 16x16",
    ),
    "width not trained": ({"prompt": "a cat", "width": 32}, "width", "draw it anyway with --force-size"),
    "no scale": ({"prompt": "a cat", "attention_scale": "much"}, "attention_scale", "is entropy or a number"),
    "no steps": ({"prompt": "a cat", "steps": 0}, "steps", "from 1 to 1000"),
    "half a step": ({"prompt": "a cat", "steps": 2.5}, "steps", "must be a whole number, not 2.5"),
    "steps and sigmas": ({"prompt": "a cat", "steps": 2, "sigmas": [5, 1]}, "sigmas", "says the same as steps"),
    "rising sigmas": ({"prompt": "a cat", "sigmas": [1, 5]}, "sigmas", "must fall"),
    "unknown sampler": ({"prompt": "a cat", "sampler": "eulr"}, "sampler", "unknown sampler 'eulr'"),
    "negative guidance": ({"prompt": "a cat", "guidance_scale": -1}, "guidance_scale", "at least 0"),
    "backward interval": ({"prompt": "a cat", "guidance_interval": [0.9, 0.1]}, "guidance_interval", "0 <= start"),
    "useless interval": (
        {"prompt": "a cat", "guidance_scale": 1, "guidance_interval": [0, 0.5]},
        "guidance_interval",
        "does nothing",
    ),
    "useless negative": (
        {"prompt": "a cat", "guidance_scale": 1, "negative_prompt": "dog"},
        "negative_prompt",
        "does nothing",
    ),
    "unknown noise": ({"prompt": "a cat", "rng": "dice"}, "rng", "unknown rng 'dice'"),
    "strength alone": ({"prompt": "a cat", "strength": 0.5}, "strength", "needs an image"),
    "too strong": ({"prompt": "a cat", "image": "start.png", "strength": 1.5}, "strength", "above 0 and at most 1"),
    "image missing": ({"prompt": "a cat", "image": "gone.png"}, "image", "there is no such picture"),
    "image no picture": ({"prompt": "a cat", "image": "jobs.jsonl"}, "image", "cannot be read as a picture"),
    "latents missing": ({"prompt": "a cat", "latents": "gone.npy"}, "latents", "there is no such file"),
    "latents misfit": ({"prompt": "a cat", "latents": "noise.npy"}, "latents", "are [1, 4, 2, 2], not"),
    "two starts": ({"prompt": "a cat", "image": "start.png", "latents": "noise.npy"}, "latents", "give one of them"),
    "id twice": ({"prompt": "a cat", "id": "First"}, "id", "is already that of line 1"),
    "id with a folder": ({"prompt": "a cat", "id": "../up"}, "id", "holds '/'"),
    "id hidden": ({"prompt": "a cat", "id": ".git"}, "id", "is no file name on every system"),
    "id too long": ({"prompt": "a cat", "id": "x" * 300}, "id", "is longer than 180 bytes"),
    "id reserved": ({"prompt": "a cat", "id": "aux"}, "id", "is no file name on every system"),
    "metadata no object": ({"prompt": "a cat", "metadata": "x"}, "metadata", "must be an object"),
}


@pytest.fixture
def place(tmp_path: Path, write_jobs: Write) -> Path:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "start.png")
    np.save(tmp_path / "noise.npy", np.zeros((1, 4, 2, 2), np.float32))
    return tmp_path


def planned(path: Path, bundle: Path, **options: Any) -> list[PlannedJob | Mistake]:
    template = NameTemplate(options.pop("name", DEFAULT_NAME))
    return list(plan(path, kind_of(path, None), open_bundle(bundle), template, folder=path.parent, **options))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_line_field_and_reason(name: str, place: Path, write_jobs: Write, bundle: Path) -> None:
    line, field, words = MISTAKES[name]
    path = write_jobs([{"prompt": "a dog", "id": "first"}, line, {"prompt": "a dog", "id": "last"}])
    first, wrong, last = planned(path, bundle)
    assert isinstance(wrong, Mistake)
    assert (wrong.line, wrong.field) == (2, field)
    assert words in wrong.reason
    assert isinstance(first, PlannedJob)
    assert isinstance(last, PlannedJob)
    # A line that cannot be used keeps its number: mending it renames nothing.
    assert (first.number, last.number, last.pictures[0].index) == (0, 2, 2)


def test_lines_that_are_no_text_or_too_long_are_mistakes(tmp_path: Path, bundle: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(b'{"prompt": "a \xff"}\n\n{"prompt": "' + b"x" * (5 << 20) + b'"}\n{"prompt": "a cat"}\n')
    wrong, long, good = planned(path, bundle)
    assert str(wrong) == "line 1: is not UTF-8 text (byte 15)"
    assert str(long) == "line 3: is longer than 4 MB"
    assert good.line == 4


def test_pictures_of_one_name_are_a_mistake(write_jobs: Write, bundle: Path) -> None:
    jobs = [{"prompt": "a cat", "seed": 1, "id": "a"}, {"prompt": "a cat", "seed": 1, "id": "b"}]
    _, wrong = planned(write_jobs(jobs), bundle, name="{prompt_hash}-{seed}.png")
    assert isinstance(wrong, Mistake)
    assert "so would that of line 1" in wrong.reason


def test_all_formats_give_the_same_jobs(tmp_path: Path, bundle: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    jobs: list[dict[str, Any]] = [
        {"id": "a", "prompt": 'a "red" cat, big', "seed": 2**64 - 1, "steps": 3, "guidance_scale": 2.5},
        {"id": "b", "prompt": "a dog", "seeds": [1, 2], "size": "32x16", "metadata": {"shop": "x"}},
    ]
    names = ["id", "prompt", "seed", "steps", "guidance_scale", "seeds", "size", "metadata"]
    sizes = {"force_size": True}
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    (tmp_path / "jobs.csv").write_text(
        "\ufeff" + ",".join(names[:-1]) + ",metadata.shop\r\n"
        'a,"a ""red"" cat, big",18446744073709551615,3,2.5,,,\r\n\r\nb,a dog,,,,1 2,32x16,x\r\n'
    )
    kinds = {"seed": pa.uint64(), "seeds": pa.list_(pa.int64()), "metadata": pa.map_(pa.string(), pa.string())}
    types = {**kinds, "steps": pa.int32(), "guidance_scale": pa.float64()}
    rows = [{**job, "metadata": list(job["metadata"].items()) if "metadata" in job else None} for job in jobs]
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "jobs.parquet")
    wanted = [(j.id, j.spec, j.group, j.pictures) for j in planned(tmp_path / "jobs.jsonl", bundle, **sizes)]  # type: ignore[union-attr]
    assert len(wanted) == 2
    for name in ("jobs.csv", "jobs.parquet"):
        found = [(j.id, j.spec, j.group, j.pictures) for j in planned(tmp_path / name, bundle, **sizes)]  # type: ignore[union-attr]
        assert found == wanted


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "jobs.txt").write_text("\ufeffa red cat\n\n  a dog \n", encoding="utf-8")
    lines = list(read_jobs(tmp_path / "jobs.txt", "text"))
    assert lines == [(1, {"prompt": "a red cat"}), (3, {"prompt": "a dog"})]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("jobs.csv", b"id,text\n1,a cat\n", "the column 'text' is not a field"),
        ("jobs.csv", b"id,id\n1,2\n", "two columns are called 'id'"),
        ("jobs.csv", b"id\n1\n", "has no column called prompt"),
        ("jobs.parquet", b"PAR1 not really", "not a Parquet file"),
        ("jobs.doc", b"a cat", "job files end in .jsonl"),
    ],
)
def test_a_file_that_holds_no_jobs_is_refused(
    name: str, content: bytes, words: str, tmp_path: Path, bundle: Path
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        planned(tmp_path / name, bundle)


def test_a_csv_line_with_too_many_cells_is_a_mistake(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "jobs.csv").write_text("id,prompt,steps\nb,a cat,many\na,a cat, a dog, 3\n")
    wrong, more = planned(tmp_path / "jobs.csv", bundle)
    assert str(wrong) == 'line 2: steps: must be a whole number, not "many"'
    assert "has 4 cells and the header 3" in str(more)


def test_shards_share_the_jobs_out_and_keep_their_numbers(write_jobs: Write, bundle: Path) -> None:
    path = write_jobs(7)
    whole = planned(path, bundle)
    parts = [planned(path, bundle, shard=Shard(number, 3)) for number in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted((job for part in parts for job in part), key=lambda job: job.line) == whole


@pytest.mark.parametrize(
    "template",
    [
        *("../{id}.png", "/tmp/{id}.png", "a/../{id}.png", ".{id}.png", "a//{id}.png", "{id}", "{id}.gif"),
        *("{nothing}.png", "{id!r}.png", "{id:>9}.png", "{", "a\\{id}.png", "c:{id}.png", "{id.__class__}.png"),
        "{index:099999d}.png",
    ],
)
def test_a_name_that_leaves_the_folder_or_means_nothing_is_refused(template: str) -> None:
    with pytest.raises(InputError, match="--name"):
        NameTemplate(template)


def test_names_are_what_the_template_says() -> None:
    template = NameTemplate("{folder}/{index:06d}-{seed}-{prompt_hash}.webp")
    path = template.path(identity="x", index=12345, seed=7, prompt="a cat")
    assert path == "0012/012345-7-51e467415607.webp"
    assert NameTemplate("{id}.png").for_several_seeds().text == "{id}-{seed}.png"


def test_nothing_is_drawn_unless_all_lines_are_good_or_the_others_are_skipped(
    write_jobs: Write, draw_batch: Callable[..., Summary], tmp_path: Path
) -> None:
    path = write_jobs([{"prompt": "a cat", "steps": 1}, {"prompt": ""}, {"prompt": "a dog", "steps": -1}])
    with pytest.raises(InputError, match="2 lines cannot be used") as refused:
        draw_batch(path)
    assert refused.value.details.splitlines()[0] == "line 2: prompt: is empty"
    assert not (tmp_path / "out" / ".batch" / "ledger.sqlite").exists()
    summary = draw_batch(path, skip_invalid=True)
    assert (summary.done, summary.skipped_lines) == (1, 2)


def test_the_same_job_without_a_seed_always_draws_the_same_one(write_jobs: Write, bundle: Path) -> None:
    first = planned(write_jobs([{"prompt": "a cat", "id": "x"}]), bundle)[0]
    again = planned(write_jobs([{"prompt": "a dog"}, {"prompt": "a cat", "id": "x"}]), bundle)[1]
    assert isinstance(first, PlannedJob)
    assert isinstance(again, PlannedJob)
    assert first.pictures[0].seed == again.pictures[0].seed < 2**32
