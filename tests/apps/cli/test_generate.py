"""`edgedit generate`, run for real on a tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgedit
from edgedit.metadata import read_recipe

Run = Callable[..., Any]


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_the_picture_is_what_the_python_api_draws_with_the_same_settings(draw: Run, bundle: Path, rng: str) -> None:
    seed = random.randrange(2**32)
    width, height = (4 * random.randrange(2, 10) for _ in range(2))
    settings: dict[str, Any] = {
        "negative_prompt": "a small dog",
        "guidance_scale": round(random.uniform(1.5, 9), 3),
        "sampler": random.choice(["euler", "dpmpp_2m", "unipc", "lcm"]),
        "rng": rng,
        "steps": random.randrange(1, 5),
    }
    done = draw(
        "a red cat", "-s", seed, "--size", f"{width}x{height}", "--force-size", "-n", settings["negative_prompt"],
        "--cfg", settings["guidance_scale"], "--sampler", settings["sampler"], "--rng", settings["rng"],
        "-o", "cat.png",
        steps=settings["steps"],
    )  # fmt: skip
    assert (done.status, done.out) == (0, "cat.png\n"), done.err
    with edgedit.load(bundle, threads=1) as pipe:
        expected = pipe.generate("a red cat", seed=seed, width=width, height=height, **settings)
    assert np.array_equal(pixels("cat.png"), np.asarray(expected.images[0])), (seed, width, height, settings)
    recipe = read_recipe("cat.png")
    assert recipe == expected.recipe
    assert {key: recipe[key] for key in settings} == settings
    assert (recipe["seed"], recipe["width"], recipe["height"]) == (seed, width, height)


def test_without_a_seed_a_random_one_is_drawn_printed_and_kept_in_the_recipe(draw: Run) -> None:
    seeds = set()
    for _ in range(2):
        done = draw("a cat")
        assert done.status == 0, done.err
        seed = read_recipe(done.lines[0])["seed"]
        assert done.lines == [f"edgedit-{seed}.png"]
        assert f"seed {seed}," in done.err
        seeds.add(seed)
    assert len(seeds) == 2


def test_several_seeds_and_a_batch_count_give_consecutive_seeds_from_each(draw: Run) -> None:
    done = draw("a cat", "-s", 7, "-s", 70, "-b", 2, "-o", "{index:02d}-{seed}.png")
    assert done.lines == ["00-7.png", "01-8.png", "02-70.png", "03-71.png"]
    assert [read_recipe(name)["seed"] for name in done.lines] == [7, 8, 70, 71]


def test_a_picture_does_not_depend_on_the_others_of_the_run(draw: Run) -> None:
    draw("a cat", "-s", 1, "-s", 2, "-s", 3, "-o", "all-{seed}.png")
    draw("a cat", "-s", 3, "-o", "alone.png")
    assert Path("all-3.png").read_bytes() == Path("alone.png").read_bytes()
    assert Path("all-2.png").read_bytes() != Path("alone.png").read_bytes()


def test_the_default_name_never_overwrites_and_an_explicit_one_does(draw: Run) -> None:
    assert [draw("a cat", "-s", 5).out, draw("a dog", "-s", 5).out] == ["edgedit-5.png\n", "edgedit-5-1.png\n"]
    draw("a cat", "-s", 5, "-o", "same.png")
    draw("a dog", "-s", 5, "-o", "same.png")
    assert read_recipe("same.png")["prompt"] == "a dog"


@pytest.mark.parametrize("form", ["option", "stdin", "file"])
def test_the_prompt_may_come_from_an_option_standard_input_or_a_file(
    draw: Run, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a red cat, größer\n"
    Path("prompt.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    if form == "stdin":
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(Path("prompt.txt").read_bytes())))
    arguments = {"option": ["-p", text.strip()], "stdin": ["-"], "file": ["--prompt-file", "prompt.txt"]}[form]
    done = draw(*arguments, "-o", "a.png")
    assert done.status == 0, done.err
    assert read_recipe("a.png")["prompt"] == text.strip()


@pytest.mark.parametrize("flag", ["--guidance", "--cfg", "--cfg-scale", "--guidance-scale"])
def test_guidance_has_the_names_that_people_know(draw: Run, flag: str) -> None:
    assert draw("a cat", flag, "2.5", "-o", "a.png").status == 0
    assert read_recipe("a.png")["guidance_scale"] == 2.5


def test_sigmas_and_the_guidance_interval_reach_the_picture(draw: Run) -> None:
    flags = ["--sampler", "euler", "--sigmas", "9, 4,1.5 0"]
    done = draw("a cat", *flags, "--guidance-interval", "0.3:0.7", "-o", "a.png", steps=None)
    assert done.status == 0, done.err
    recipe = read_recipe("a.png")
    assert (recipe["sigmas"], recipe["steps"], recipe["guidance_interval"]) == ([9.0, 4.0, 1.5, 0.0], 3, [0.3, 0.7])
    draw("a cat", *flags, "-s", recipe["seed"], "-o", "b.png", steps=None)
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))


def test_image_to_image_takes_the_steps_that_its_strength_leaves(draw: Run) -> None:
    draw("a cat", "-s", 3, "-o", "start.png")
    taken = {}
    for strength in (0.1, 0.6, 1.0):
        flags = [] if strength == 0.6 else ["--strength", strength]
        done = draw("a dog", "-s", 4, "-i", "start.png", *flags, "-o", f"{strength}.png", "--json", steps=10)
        assert done.status == 0, done.err
        taken[strength] = sum('"event": "step"' in line for line in done.lines)
        recipe = read_recipe(f"{strength}.png")
        assert recipe["strength"] == strength
        assert recipe["image"]["path"] == "start.png"
    assert taken == {0.1: 1, 0.6: 6, 1.0: 10}
    assert not np.array_equal(pixels("0.1.png"), pixels("0.6.png"))


def test_latents_go_out_and_come_back_as_starting_noise(draw: Run) -> None:
    noise = np.random.default_rng().standard_normal((1, 4, 8, 8), dtype=np.float32)
    np.save("noise.npy", noise)
    runs = [
        draw("a cat", "-s", 1, "--latents-in", "noise.npy", "--latents-out", f"out{i}.npy", "-o", f"{i}.png")
        for i in range(2)
    ]
    assert [run.status for run in runs] == [0, 0], runs[0].err
    assert np.array_equal(np.load("out0.npy"), np.load("out1.npy"))
    assert np.load("out0.npy").shape == (1, 4, 8, 8)
    draw("a cat", "-s", 1, "--latents-out", "other.npy", "-o", "other.png")
    assert not np.array_equal(np.load("other.npy"), np.load("out0.npy"))


def test_the_preview_is_there_after_every_step_and_has_the_picture_s_size(
    draw: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgedit.apps.cli import drawing

    seen = []
    original = drawing.Run.step

    def step(self: drawing.Run, state: Any) -> bool | None:
        answer = original(self, state)
        with Image.open("preview.png") as image:
            seen.append((image.size, image.convert("RGB").tobytes()))
        return answer

    monkeypatch.setattr(drawing.Run, "step", step)
    done = draw("a cat", "--size", "24x32", "--force-size", "--preview", "preview.png", "-o", "a.png", steps=5)
    assert done.status == 0, done.err
    assert [size for size, _ in seen] == [(24, 32)] * 5
    assert len({data for _, data in seen}) > 1


def test_json_gives_one_event_a_line_and_nothing_else_on_stdout(draw: Run) -> None:
    done = draw("a red zebra", "-s", 1, "-s", 2, "--json", steps=3)
    assert done.status == 0, done.err
    events = [json.loads(line) for line in done.lines]
    kinds = [event["event"] for event in events]
    assert set(kinds) == {"stage", "step", "warning", "picture", "done"}
    steps = [(event["index"], event["step"], event["steps"]) for event in events if event["event"] == "step"]
    assert steps == [(i, s, 3) for i in range(2) for s in (1, 2, 3)]
    pictures = [event for event in events if event["event"] == "picture"]
    assert [(p["seed"], p["path"]) for p in pictures] == [(1, "edgedit-1.png"), (2, "edgedit-2.png")]
    assert all(p["recipe"] == read_recipe(p["path"]) for p in pictures)
    assert events[-1]["pictures"] == 2
    assert events[-1]["peak_memory_bytes"] > 1 << 20
    assert events[-1]["seconds"]["denoise"] > 0


def test_quiet_prints_the_path_alone_and_verbose_adds_settings_times_and_memory(draw: Run) -> None:
    quiet = draw("a cat", "-q", "-o", "a.png")
    assert (quiet.out, quiet.err) == ("a.png\n", "")
    loud = draw("a cat", "-v", "-o", "a.png")
    assert loud.out == "a.png\n"
    assert "16x16, 2 steps, dpmpp_2m, guidance 4.5" in loud.err
    assert "peak memory" in loud.err
    assert "denoise 0." in loud.err


def test_no_metadata_leaves_the_recipe_out(draw: Run) -> None:
    draw("a cat", "--no-metadata", "-o", "a.png")
    with Image.open("a.png") as image:
        assert not image.info


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_jpeg_and_webp_carry_the_recipe_too(draw: Run, suffix: str) -> None:
    assert draw("a cat", "-s", 9, "-o", f"a{suffix}").status == 0
    assert read_recipe(f"a{suffix}")["seed"] == 9


def test_a_long_prompt_is_drawn_and_what_was_cut_is_said(draw: Run) -> None:
    done = draw(" ".join(["red cat on"] * 1332 + ["zebra"] * 4), "-q", "-o", "a.png")
    assert done.status == 0
    (warning,) = [line for line in done.err.splitlines() if "too long" in line]
    # 300 tokens, one of them </s>; the zebras were cut as well, so nothing is unknown.
    assert "its last 3701 words were cut" in warning
    assert len(warning) < 300
    assert "does not know" not in done.err


def test_words_that_the_model_does_not_know_are_named(draw: Run) -> None:
    done = draw("a purple zebra cat", "-n", "an ugly dog", "-o", "a.png")
    assert "does not know these words of the prompt: purple, zebra" in done.err
    assert "does not know these words of the negative prompt: ugly" in done.err


def test_a_size_that_the_model_was_not_made_for_is_drawn_only_when_told_to(draw: Run) -> None:
    refused = draw("a cat", "-W", 32, "-H", 20, "-o", "a.png")
    assert refused.status == 2
    assert "not made for 32x20 pixels; take one of 16x16, or draw it anyway with --force-size" in refused.err
    assert not Path("a.png").exists()
    assert draw("a cat", "-W", 32, "-H", 20, "--force-size", "-o", "a.png").status == 0
    assert pixels("a.png").shape == (20, 32, 3)
    # Whoever drew a picture at a size has said that it may be.
    assert draw("-C", "a.png", "-o", "b.png").status == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_an_aspect_ratio_chooses_among_the_models_sizes(draw: Run) -> None:
    assert draw("a cat", "--aspect", "16:9", "-o", "a.png").status == 0
    assert pixels("a.png").shape == (16, 16, 3)
    assert "write it like 16:9" in draw("a cat", "--aspect", "wide").err
    assert "either --aspect or a size" in draw("a cat", "--aspect", "1:1", "-W", 16).err


def test_windows_of_a_size_that_the_model_was_made_for_draw_any_larger_picture(draw: Run) -> None:
    done = draw("a cat", "-s", 1, "--size", "40x16", "--denoise-tile", 16, "-o", "a.png")
    assert done.status == 0, done.err
    assert pixels("a.png").shape == (16, 40, 3)
    assert (read_recipe("a.png")["denoise_tile"], read_recipe("a.png")["denoise_overlap"]) == (16, 8)
    assert draw("-C", "a.png", "-o", "b.png").status == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    wrong = draw("a cat", "--size", "40x16", "--denoise-tile", 32)
    assert "not made for windows of 32x16 pixels" in wrong.err


def test_the_machine_s_flags_change_nothing_in_the_picture(draw: Run, tmp_path: Path) -> None:
    draw("a cat", "-s", 3, "-o", "a.png")
    for i, flag in enumerate(("--low-ram", "--graph-cache", "--graph-cache", "--no-cache", "--provider=cpu")):
        done = draw("a cat", "-s", 3, "-o", f"{i}.png", "--backend", "onnx", "--offline", flag)
        assert done.status == 0, done.err
        assert np.abs(pixels("a.png").astype(int) - pixels(f"{i}.png")).max() <= 1, flag
    assert list((tmp_path / ".cache" / "graphs").rglob("*.onnx"))


def test_low_ram_loads_the_transformer_again_for_every_picture(draw: Run) -> None:
    loads = [draw("a cat", "-b", 2, *flags).err.count("load transformer") for flags in ([], ["--low-ram"])]
    assert loads == [1, 2]


def test_a_model_is_found_by_name_in_the_current_folder_and_in_edgedit_models(
    cli: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("generate", "a cat", "-m", "tiny").status == 2
    monkeypatch.setenv("EDGEDIT_MODELS", f"/nonexistent:{bundle.parent}")
    for name in ("tiny", "tiny.edgedit"):
        assert cli("generate", "a cat", "-m", name, "--steps", 1, "-o", "a.png").status == 0


def test_a_run_that_dies_while_decoding_is_finished_byte_for_byte(
    cli: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["a red cat", "-m", bundle, "-s", 3, "--steps", 2, "-W", 48, "-H", 64, "--force-size"]
    assert cli("generate", *flags, "-o", "whole.png").status == 0
    whole = Path("whole.png").read_bytes()
    assert not list(Path().glob("*.npz"))

    from edgedit.tiling.run import TileRunner

    finished = TileRunner._finished_tile

    def die(self: TileRunner) -> None:
        finished(self)
        if self._done == 3:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(TileRunner, "_finished_tile", die)
        died = cli("generate", *flags, "-o", "whole.png", "--vae-tiling", "exact", "--vae-tile-size", 16)
    assert died.status == 2
    assert "edgedit decode whole.latents.npz" in died.err
    Path("whole.png").unlink()
    done = cli("decode", "whole.latents.npz", "-m", bundle)
    assert done.status == 0, done.err
    assert Path("whole.png").read_bytes() == whole
    assert not Path("whole.latents.npz").exists()


def test_latents_of_a_file_are_decoded(cli: Run, bundle: Path) -> None:
    flags = ["a red cat", "-m", bundle, "-s", 3, "--steps", 1, "--no-metadata", "--latents-out", "a.npy"]
    assert cli("generate", *flags, "-o", "a.png").status == 0
    assert cli("decode", "a.npy", "-m", bundle, "-o", "b.png").status == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (np.zeros((1, 7, 8, 8), np.float32), "latents must be [batch, 4, height, width]"),
        (np.full((1, 4, 8, 8), np.nan, np.float32), "not numbers"),
    ],
    ids=["another-model", "nan"],
)
def test_latents_that_cannot_be_decoded_are_one_line(cli: Run, bundle: Path, latents: np.ndarray, words: str) -> None:
    np.save("a.npy", latents)
    refused = cli("decode", "a.npy", "-m", bundle)
    assert refused.status == 2
    assert words in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert not Path("a.png").exists()
