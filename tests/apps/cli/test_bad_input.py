"""Mistakes: one line that says what and what to do, status 2, nothing written, no model loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., Any]

#: Arguments after `generate -m BUNDLE`, and words of the message.
GENERATE: list[tuple[list[str], str]] = [
    ([], "there is no prompt"),
    ([""], "the prompt is empty"),
    (["  \n"], "--allow-empty"),
    (["a cat", "-p", "a dog"], "give the prompt once"),
    (["a cat", "--prompt-file", "missing.txt"], "give the prompt once"),
    (["--prompt-file", "missing.txt"], "missing.txt: the prompt cannot be read"),
    (["--prompt-file", "binary.txt"], "not UTF-8"),
    (["a cat", "--steps", "0"], "steps must be a whole number from 1"),
    (["a cat", "--steps", "-3"], "steps must be"),
    (["a cat", "--steps", "many"], "integer"),
    (["a cat", "-W", "30"], "width 30 is not a multiple of 4, as this model needs; use 28 or 32"),
    (["a cat", "-H", "3"], "use 4"),
    (["a cat", "-W", "0"], "width must be a positive whole number"),
    (["a cat", "--size", "16"], "write it like 512x512"),
    (["a cat", "--size", "16x-16"], "write it like 512x512"),
    (["a cat", "--size", "16x16", "-W", "16"], "either --size or --width"),
    (["a cat", "--guidance", "nan"], "guidance scale must be"),
    (["a cat", "--guidance", "-1"], "guidance scale must be"),
    (["a cat", "--guidance", "inf"], "guidance scale must be"),
    (["a cat", "--guidance-interval", "0.5"], "write it like 0.1:0.8"),
    (["a cat", "--guidance-interval", "0.8:0.1"], "guidance interval must be"),
    (["a cat", "--guidance-interval", "a:b"], "write it like 0.1:0.8"),
    (["a cat", "--guidance", "1", "--guidance-interval", "0:0.5"], "--guidance-interval does nothing"),
    (["a cat", "--guidance", "1", "-n", "a dog"], "negative prompt does nothing"),
    (["a cat", "--sampler", "eulr"], "unknown sampler 'eulr'"),
    (["a cat", "--sigmas", "one,two"], "write them like 1,0.7,0.3"),
    (["a cat", "--sigmas", ","], "--sigmas is empty"),
    (["a cat", "--sigmas", "1,2"], "sigmas must fall"),
    (["a cat", "--sigmas", "1,nan"], "sigmas must be numbers"),
    (["a cat", "--sigmas", "5,1", "--steps", "3"], "leave --steps out"),
    (["a cat", "--rng", "dice"], "unknown rng 'dice'"),
    (["a cat", "-s", "-2"], "a seed is a whole number"),
    (["a cat", "-s", "18446744073709551616"], "a seed is a whole number"),
    (["a cat", "-s", "x"], "integer"),
    (["a cat", "-b", "0"], "--batch-count must be from 1"),
    (["a cat", "-b", "1000000000000"], "--batch-count must be from 1"),
    (["a cat", "--strength", "0.5"], "pass --image too"),
    (["a cat", "-i", "start.png", "--strength", "0"], "strength must be above 0"),
    (["a cat", "-i", "start.png", "--strength", "1.5"], "strength must be above 0"),
    (["a cat", "-i", "missing.png"], "missing.png: there is no such picture"),
    (["a cat", "-i", "binary.txt"], "cannot be read as a picture"),
    (["a cat", "-i", "start.png", "--latents-in", "noise.npy"], "either --image or --latents-in"),
    (["a cat", "--latents-in", "missing.npy"], "missing.npy: the latents cannot be read"),
    (["a cat", "--latents-in", "binary.txt"], "not a whole NumPy file"),
    (["a cat", "--latents-in", "whole.npy"], "no floating-point array"),
    (["a cat", "--latents-in", "noise.npy", "-W", "32", "--force-size"], "as 32x16 needs"),
    (["a cat", "--latents-in", "noise.npy", "-b", "2"], "makes one picture"),
    (["a cat", "--latents-out", "a.txt"], "saved as .npy"),
    (["a cat", "--latents-out", "no/a.npy"], "does not exist"),
    (["a cat", "--latents-out", "a.npy", "-b", "2"], "several pictures, one name"),
    (["a cat", "-o", "no/such/folder/a.png"], "the folder no/such/folder does not exist"),
    (["a cat", "-o", "a.bmp"], "pictures are saved as .png"),
    (["a cat", "-o", "a.png", "-b", "2"], "put {index} or {seed} in the name"),
    (["a cat", "-o", "{name}.png"], "there is no field {name}"),
    (["a cat", "--preview", "no/a.png"], "the folder no does not exist"),
    (["a cat", "-C", "start.png"], "carries no edgedit recipe"),
    (["-C", "missing.png"], "there is no such picture"),
    (["a cat", "--backend", "abacus"], "unknown backend 'abacus'"),
    (["a cat", "--provider", "abacus"], "abacus is not in this onnxruntime"),
    (["a cat", "--threads", "0"], "--threads must be at least 1"),
    (["a cat", "-q", "-v"], "either --quiet or --verbose"),
    (["a cat", "a dog"], "unexpected extra argument"),
    (["a cat", "--stpes", "3"], "--stpes"),
    (["a cat", "--steps"], "requires an argument"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), GENERATE, ids=[" ".join(a) or "nothing" for a, _ in GENERATE])
def test_generate_refuses(cli: Run, bundle: Path, arguments: list[str], words: str) -> None:
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x93")
    Image.new("RGB", (16, 16), "red").save("start.png")
    np.save("noise.npy", np.zeros((1, 4, 8, 8), np.float32))
    np.save("whole.npy", np.zeros((1, 4, 8, 8), np.int64))
    before = sorted(Path().rglob("*"))
    done = cli("generate", "-m", bundle, "-t", "1", *arguments)
    assert (done.status, done.out) == (2, ""), done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    assert words in done.err
    assert "load" not in done.err
    assert sorted(Path().rglob("*")) == before


def test_an_unknown_sampler_is_answered_with_the_known_ones(draw: Run) -> None:
    assert "dpmpp_2m" in draw("a cat", "--sampler", "dpm2k").err


def test_an_error_is_an_event_too_when_programs_listen(draw: Run) -> None:
    done = draw("a cat", "-W", "30", "--json")
    assert done.status == 2
    event = json.loads(done.out)
    assert event["event"] == "error"
    assert done.err == f"error: {event['message']}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "a cat", "-m", "nothing.edgedit"], "no such bundle; `edgedit models` lists those at hand"),
        (["generate", "a cat", "-m", "here"], "not a bundle, it has no manifest.json"),
        (["convert", "missing", "-o", "a.edgedit"], "does not exist"),
        (["convert", "here", "-o", "a.edgedit"], "error: "),
        (["convert", "here"], "Missing option '--output'"),
        (["convert", "here", "-o", "a.edgedit", "--to", "abacus"], "unknown target 'abacus'"),
        (["convert", "here", "-o", "a.edgedit", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["convert", "here", "-o", "a.edgedit", "--components", ","], "--components is empty"),
        (["convert", "here", "-o", "a.edgedit", "-q", "-v"], "--quiet goes with neither"),
        (["inspect", "missing"], "does not exist"),
        (["inspect", "here"], "error: "),
        (["verify", "missing"], "no such bundle"),
        (["paint"], "No such command 'paint'"),
        (["--verbose"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_other_commands_refuse(cli: Run, arguments: list[str], words: str) -> None:
    Path("here").mkdir()
    done = cli(*arguments)
    assert (done.status, done.out) == (2, ""), done.err
    said = [line for line in done.err.splitlines() if line != "read checkpoint"]
    assert len(said) == 1, done.err
    assert words in said[0]
    assert "Traceback" not in done.err
    assert sorted(Path().rglob("*")) == [Path("here")]


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_a_flipped_byte_is_one_line(cli: Run, bundle: Path, command: str) -> None:
    shutil.copytree(bundle, "broken.edgedit")
    weights = max(Path("broken.edgedit").rglob("*.data"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    if command == "verify":
        done = cli("verify", "broken.edgedit", "-q")
        assert (done.status, len(done.err.splitlines())) == (2, 1), done.err
        assert "is damaged (wrong SHA-256)" in done.err
    weights.write_bytes(data[:-1])
    done = cli(command, *(["a cat", "-m"] if command == "generate" else []), "broken.edgedit", "-q")
    assert (done.status, len(done.err.splitlines())) == (2, 1), done.err
    assert "is damaged (" in done.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format_version=99), "upgrade edgedit"),
        (lambda m: m["files"].update({"../outside": {"size": 1, "sha256": "0" * 64}}), "../outside"),
        (lambda m: m["schedule"].update(path="spiral"), "spiral"),
    ],
)
def test_a_manifest_that_is_newer_unsafe_or_odd_is_one_line(
    cli: Run, bundle: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    shutil.copytree(bundle, "odd.edgedit")
    manifest = json.loads(Path("odd.edgedit/manifest.json").read_text())
    change(manifest)
    Path("odd.edgedit/manifest.json").write_text(json.dumps(manifest))
    done = cli("generate", "a cat", "-m", "odd.edgedit")
    assert (done.status, len(done.err.splitlines())) == (2, 1), done.err
    assert words in done.err


def test_a_preview_is_refused_where_the_bundle_has_no_factors(cli: Run, checkpoint: Path) -> None:
    assert cli("convert", checkpoint, "-o", "plain.edgedit", "--no-measure", "-q").status == 0
    done = cli("generate", "a cat", "-m", "plain.edgedit", "--preview", "p.png", "-t", 1)
    assert (done.status, len(done.err.splitlines())) == (2, 1), done.err
    assert "leave --preview out" in done.err


def test_image_to_image_is_refused_where_the_bundle_has_no_encoder(cli: Run, checkpoint: Path) -> None:
    parts = "transformer,text_encoder,decoder"
    assert cli("convert", checkpoint, "-o", "a.edgedit", "--components", parts, "--no-measure", "-q").status == 0
    Image.new("RGB", (16, 16)).save("start.png")
    assert cli("generate", "a cat", "-m", "a.edgedit", "-t", 1, "--steps", 1, "-q").status == 0
    done = cli("generate", "a cat", "-m", "a.edgedit", "-i", "start.png", "-t", 1)
    assert (done.status, len(done.err.splitlines())) == (2, 1), done.err
    assert "has no encoder" in done.err


def test_a_lone_transformer_draws_nothing_and_says_why(cli: Run, checkpoint: Path) -> None:
    assert cli("convert", checkpoint / "transformer", "-o", "part.edgedit", "--no-measure", "-q").status == 0
    done = cli("generate", "a cat", "-m", "part.edgedit")
    assert (done.status, len(done.err.splitlines())) == (2, 1), done.err
    assert "convert the whole" in done.err


def test_an_empty_prompt_is_drawn_when_that_is_meant(draw: Run) -> None:
    assert draw("", "--allow-empty", "-s", 4, "-o", "a.png").status == 0
    assert draw("-C", "a.png", "-o", "b.png", steps=None).status == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_place_that_a_folder_takes_is_refused(draw: Run) -> None:
    Path("a.png").mkdir()
    done = draw("a cat", "-s", 1, "-o", "a.png")
    assert (done.status, done.lines) == (0, ["a.png/edgedit-1.png"])
