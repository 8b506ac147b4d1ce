from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgedit.errors import InputError
from edgedit.outputs import expand_output, plan_outputs


def test_seed_and_index_are_filled_in(rng: random.Random) -> None:
    seed, index = rng.randrange(2**64), rng.randrange(10_000)
    for template in (
        "a.png",
        "{seed}.png",
        "{index}.jpg",
        "{index:04d}-{seed}.webp",
        "{{x}}{index:3}.png",
        "{seed:012d}",
    ):
        assert str(expand_output(template, seed=seed, index=index)) == template.format(seed=seed, index=index)


@pytest.mark.parametrize(
    "template",
    [
        *("{prompt}.png", "{}.png", "{0}.png", "{seed.__class__}.png", "{seed[0]}.png", "{seed!r}.png"),
        *("{seed:999999999d}.png", "{index:{seed}}.png", "{index:x}.png", "{seed", "seed}", "{seed:.2f}.png"),
    ],
)
def test_any_other_field_is_refused_in_one_line(template: str) -> None:
    with pytest.raises(InputError) as caught:
        expand_output(template, seed=1, index=0)
    assert "\n" not in str(caught.value)
    assert template in str(caught.value)


def test_without_a_template_no_file_is_ever_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(2):
        for path in plan_outputs(None, [5, 5, 6]):
            names.append(path.name)
            assert not path.exists()
            path.write_bytes(b"x")
    assert names == [
        *("edgedit-5.png", "edgedit-5-1.png", "edgedit-6.png"),
        *("edgedit-5-2.png", "edgedit-5-3.png", "edgedit-6-1.png"),
    ]


def test_a_dangling_link_counts_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "edgedit-5.png").symlink_to("nowhere")
    assert plan_outputs(str(tmp_path), [5]) == [tmp_path / "edgedit-5-1.png"]


def test_a_folder_takes_pictures_with_the_default_name(tmp_path: Path) -> None:
    folder = tmp_path / "{my} pictures"
    folder.mkdir()
    for template in (str(folder), f"{folder}/"):
        assert plan_outputs(template, [1, 2]) == [folder / "edgedit-1.png", folder / "edgedit-2.png"]


def test_a_named_file_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    assert plan_outputs(str(tmp_path / "a.png"), [1]) == [tmp_path / "a.png"]


def test_one_name_for_several_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 pictures would be written .* put \{index\} or \{seed\}"):
        plan_outputs(str(tmp_path / "a.png"), [1, 2])
    with pytest.raises(InputError, match="3 pictures"):
        plan_outputs(str(tmp_path / "{seed}.png"), [1, 2, 1])
    assert len(plan_outputs(str(tmp_path / "{index}.png"), [1, 1])) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.tiff", "pictures are saved as"),
        ("a", "pictures are saved as"),
        ("no/a.png", "does not exist"),
        ("file/a.png", "does not exist"),
        ("no/", "does not exist"),
        ("folder.png/{seed}.xyz", "pictures are saved as"),
        ("f{index}.png", "is a folder"),
        ("n" * 300 + ".png", "File name too long"),
    ],
)
def test_a_place_that_cannot_work_is_refused_before_anything_is_drawn(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "f0.png").mkdir()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=reason) as caught:
        plan_outputs(f"{tmp_path}/{name}", [1])
    assert "\n" not in str(caught.value)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process may enter but not write to, also when the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    try:
        yield folder
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_refused(read_only: Path) -> None:
    if os.geteuid() == 0:
        # access(2) asks for the real user, whom only another process can change for good.
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setuid(65534)
                plan_outputs(str(read_only / "a.png"), [1])
            except InputError as error:
                code = 0 if "is not writable" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    else:
        with pytest.raises(InputError, match="is not writable"):
            plan_outputs(str(read_only / "a.png"), [1])
