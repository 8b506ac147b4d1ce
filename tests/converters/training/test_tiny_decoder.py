"""A decoder distilled from another: what is made, what draws with it, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import edgedit
from edgedit.apps.cli.main import main
from edgedit.converters.training.tiny_decoder import TinyDecoderStage, build_tiny, distill_decoder
from edgedit.errors import InputError
from edgedit.metadata import read_recipe

Saved = Callable[[str], tuple[Any, Path, int]]
QUICK: dict[str, Any] = {"train_steps": 4, "samples": 6, "batch_size": 2, "width": 8}


@pytest.fixture(scope="module")
def made(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path, Path]]:
    """kind → (diffusers pipeline, checkpoint with a tiny decoder, its bundle)."""
    done: dict[str, tuple[Any, Path, Path]] = {}

    def get(kind: str) -> tuple[Any, Path, Path]:
        if kind not in done:
            pipeline, folder, _ = saved_pipeline(kind)
            place = tmp_path_factory.mktemp("tiny")
            distill_decoder(folder, place / "model", **QUICK)
            edgedit.convert(place / "model", place / "x.edgedit")
            done[kind] = (pipeline, place / "model", place / "x.edgedit")
        return done[kind]

    return get


@pytest.mark.parametrize("kind", ["pixart-sigma", "sana"])
def test_what_it_decodes_agrees_with_autoencoder_tiny_of_diffusers(
    made: Callable[[str], tuple[Any, Path, Path]], kind: str
) -> None:
    pipeline, checkpoint, bundle = made(kind)
    config = diffusers.AutoencoderTiny.load_config(checkpoint / "tiny_vae")
    reference = diffusers.AutoencoderTiny.from_config(config)
    stored = diffusers.models.model_loading_utils.load_state_dict(
        checkpoint / "tiny_vae" / "diffusion_pytorch_model.safetensors"
    )
    missing, unexpected = reference.load_state_dict(stored, strict=False)
    assert not unexpected
    assert all(name.startswith("encoder.") for name in missing)
    latents = torch.randn(1, 4, random.randint(3, 9), random.randint(3, 9))
    with torch.no_grad():
        expected = reference.decode(latents).sample.clamp(-1, 1).numpy()
    with edgedit.load(bundle, decoder="tiny") as pipe:
        found = pipe.decode(latents.numpy(), output="array")
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4
    with torch.no_grad():
        full = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)
    with edgedit.load(bundle) as pipe:
        assert np.abs(pipe.decode(latents.numpy(), output="array") - full.numpy()).max() <= 1e-4


def test_a_tiny_decoder_learns_the_pictures_of_a_known_one() -> None:
    """The teacher enlarges three latent channels; a student of this kind can do that."""

    class Enlarge(nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.tanh(nn.functional.interpolate(latents[:, :3], scale_factor=4.0))

    torch.manual_seed(0)
    latents = np.random.default_rng(0).standard_normal((32, 4, 6, 6)).astype(np.float16)
    student = build_tiny(4, 4, 16).decoder
    stage = TinyDecoderStage(
        Enlarge(), student, latents, seed=0, device=torch.device("cpu"), batch_size=8, learning_rate=2e-3
    )
    optimiser = torch.optim.Adam(student.parameters(), 2e-3)
    losses = []
    for step in range(60):
        loss = stage.loss(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_an_interrupted_run_goes_on_to_the_same_weights(saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = saved_pipeline("pixart-sigma")[1]
    distill_decoder(folder, tmp_path / "whole", **QUICK)
    with pytest.raises(KeyboardInterrupt):
        distill_decoder(folder, tmp_path / "parts", stop_after=2, **QUICK)
    assert not (tmp_path / "parts").exists()
    distill_decoder(folder, tmp_path / "parts", **QUICK)
    name = "tiny_vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".*.work"))


def test_generate_decodes_with_it_and_says_so(
    made: Callable[[str], tuple[Any, Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = made("pixart-sigma")[2]
    call = ["generate", "a cat", "-m", str(bundle), "-s", "3", "--steps", "1", "--size", "16x16"]
    assert main([*call, "-o", str(tmp_path / "full.png")]) == 0
    assert main([*call, "-o", str(tmp_path / "tiny.png"), "--decoder", "tiny"]) == 0
    assert main(["generate", "-C", str(tmp_path / "tiny.png"), "-m", str(bundle), "-o", str(tmp_path / "2.png")]) == 0
    assert read_recipe(tmp_path / "tiny.png")["decoder"] == "tiny"
    assert "decoder" not in read_recipe(tmp_path / "full.png")
    assert (tmp_path / "tiny.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert (tmp_path / "tiny.png").read_bytes() != (tmp_path / "full.png").read_bytes()
    capsys.readouterr()
    assert main([*call, "-o", str(tmp_path / "no.png"), "--decoder", "quick"]) == 2
    assert "unknown decoder 'quick'" in capsys.readouterr().err


@pytest.mark.parametrize("tiling", ["exact", "fast"])
def test_it_decodes_in_tiles_as_well(made: Callable[[str], tuple[Any, Path, Path]], tiling: str) -> None:
    latents = np.random.default_rng().standard_normal((1, 4, 40, 24)).astype(np.float32)
    with edgedit.load(made("pixart-sigma")[2], decoder="tiny") as pipe:
        whole = pipe.decode(latents, output="array", tiling="off")
        assert np.abs(pipe.decode(latents, output="array", tiling=tiling, tile_size=32) - whole).max() <= 2e-4


def test_what_cannot_be_done_is_one_clear_line(saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = saved_pipeline("pixart-sigma")[1]
    edgedit.convert(folder, tmp_path / "plain.edgedit")
    with pytest.raises(InputError, match="edgedit distill --component decoder"):
        edgedit.load(tmp_path / "plain.edgedit", decoder="tiny")
    with pytest.raises(InputError, match="from 8 to 512"):
        distill_decoder(folder, tmp_path / "x", **{**QUICK, "width": 4})


@pytest.mark.parametrize(
    "flags", [["--component", "decoder", "--steps", "2"], ["--width", "32"], ["--component", "text_encoder"]]
)
def test_flags_that_would_do_nothing_are_refused(
    flags: list[str], saved_pipeline: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved_pipeline("pixart-sigma")[1]
    assert main(["distill", str(folder), "-o", str(tmp_path / "x"), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_batch_decodes_with_it_from_beginning_to_end(
    made: Callable[[str], tuple[Any, Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a cat", "steps": 1, "size": "16x16"}\n', encoding="utf-8")
    call = [
        "batch",
        str(tmp_path / "jobs.jsonl"),
        "-m",
        str(made("pixart-sigma")[2]),
        "-o",
        str(tmp_path / "out"),
        "-q",
    ]
    assert main([*call, "--decoder", "tiny"]) == 0
    (line,) = (tmp_path / "out" / "index.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["recipe"]["decoder"] == "tiny"
    capsys.readouterr()
    assert main([*call, "--decoder", "full"]) == 2
    assert "was begun with --decoder tiny" in capsys.readouterr().err
