"""The training loop: what an interruption leaves behind, and what comes out at the end."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file as load_safetensors
from tiny_scenes import TINY_AUTOENCODER, TINY_TEXT, TINY_TRANSFORMER, write_tiny_scenes

from edgedit.converters.training import train
from edgedit.converters.training.autoencoder import AutoencoderStage, encode_mean, pictures_to_tensor, standardise
from edgedit.converters.training.data import cache_latents, training_scenes
from edgedit.converters.training.decoder import DecoderStage
from edgedit.converters.training.evaluate import held_out_prompts, open_model, score
from edgedit.converters.training.export import (
    CALIBRATION_PROMPTS,
    TRANSFORMER,
    export_pipeline,
    load_autoencoder,
    load_text_encoder,
)
from edgedit.converters.training.layout import object_cells
from edgedit.converters.training.loop import Budget, load_file, run_stage, save_file
from edgedit.converters.training.teacher import PlainAttention, TeacherStage, build_transformer
from edgedit.converters.training.text_encoder import TextStage, build_text_encoder
from edgedit.converters.training.world import is_held_out, render

CPU = torch.device("cpu")
SCENES = Path(__file__).parents[3] / "models" / "scenes"


def teacher(seed: int) -> TeacherStage:
    scenes = training_scenes(12, seed=seed)
    latents = np.random.default_rng(seed).standard_normal((12, 4, 16, 16)).astype(np.float16)
    torch.manual_seed(seed)
    return TeacherStage(
        latents,
        scenes,
        build_text_encoder(TINY_TEXT),
        seed=seed,
        device=CPU,
        transformer_config=TINY_TRANSFORMER,
        batch_size=4,
        compiled=False,
    )


def test_guidance_is_added_to_the_velocity_of_the_picture_or_of_the_guide() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    latents = np.random.default_rng(seed).standard_normal((12, 4, 16, 16)).astype(np.float16)
    torch.manual_seed(seed)
    guide = build_transformer(TINY_TRANSFORMER)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    text_encoder = build_text_encoder(TINY_TEXT)

    def loss(**options: Any) -> float:
        stage = TeacherStage(
            latents,
            training_scenes(12, seed=3),
            text_encoder,
            seed=seed,
            device=CPU,
            batch_size=8,
            compiled=False,
            layout_weight=0.0,
            transformer=copy.deepcopy(guide),
            **options,
        )
        return stage.loss(5).item()

    assert loss(guide=copy.deepcopy(guide), guidance_scale=1.0) == loss()
    assert loss(guide=copy.deepcopy(guide), guidance_scale=1.0, borrowed_steps=6) == pytest.approx(0, abs=1e-9)
    once, twice = (loss(guide=copy.deepcopy(guide), guidance_scale=g, borrowed_steps=6) for g in (2.0, 3.0))
    assert twice == pytest.approx(4 * once, rel=1e-3), f"seed {seed}: what guidance adds grows with its scale"
    assert once > 0
    assert loss(guide=copy.deepcopy(guide), guidance_scale=2.0, borrowed_steps=5) not in (once, loss())


def autoencoder(seed: int) -> AutoencoderStage:
    return AutoencoderStage(seed=seed, device=CPU, config=TINY_AUTOENCODER, batch_size=2, crop_steps=3)


def text_encoder(seed: int) -> TextStage:
    return TextStage(training_scenes(12, seed=seed), seed=seed, device=CPU, config=TINY_TEXT, batch_size=4)


@pytest.mark.parametrize("make", [teacher, autoencoder, text_encoder])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(make: Any, tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    whole = run_stage(make(seed), tmp_path / "whole", Budget(steps=6), log=lambda line: None, warm_up=2)
    for stop in (2, 5, None):
        parts = run_stage(
            make(seed), tmp_path / "parts", Budget(steps=6), log=lambda line: None, warm_up=2, stop_after=stop
        )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole), f"seed {seed}"
    start = dict(make(seed).modules.named_parameters())
    moved = [name for name in whole if not torch.equal(whole[name], start[name])]
    assert len(moved) > 0.9 * len(whole), f"seed {seed}"


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_file({"step": 1}, path)

    class Unwritable:
        def __reduce__(self) -> Any:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        save_file({"step": 2, "broken": Unwritable()}, path)
    assert load_file(path)["step"] == 1


def test_training_scenes_are_never_held_out_and_depend_on_their_number_alone() -> None:
    scenes = training_scenes(200, seed=4)
    assert not any(is_held_out(scene) for scene in scenes)
    assert training_scenes(7, seed=4) == scenes[:7]
    assert training_scenes(7, seed=5) != scenes[:7]


def test_plain_attention_is_the_attention_of_diffusers() -> None:
    stage = teacher(3)
    transformer = stage.modules.transformer
    assert all(isinstance(processor, PlainAttention) for processor in transformer.attn_processors.values())
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7]),
        "timestep": torch.tensor([20.0, 900.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.no_grad():
        ours = transformer(**inputs).sample
        transformer.set_default_attn_processor()
        theirs = transformer(**inputs).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_standardising_changes_the_latents_and_not_the_picture() -> None:
    torch.manual_seed(1)
    model = AutoencoderKL(**TINY_AUTOENCODER).eval()
    pictures = pictures_to_tensor([render(scene) for scene in training_scenes(6, seed=1)])
    with torch.no_grad():
        before = model.decode(model.encode(pictures).latent_dist.mode()).sample
        standardise(model, model.encode(pictures).latent_dist.mode())
        latents = model.encode(pictures).latent_dist.mode()
        after = model.decode(latents).sample
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)


def test_latents_are_cached_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoencoderKL(**TINY_AUTOENCODER).eval()
    scenes = training_scenes(5, seed=1)
    first = cache_latents(model, scenes, tmp_path / "latents.npy", batch_size=2)
    pictures = pictures_to_tensor([render(scene) for scene in scenes])
    expected = torch.cat([encode_mean(model, pictures[start : start + 2]) for start in range(0, 5, 2)]).numpy()
    np.testing.assert_allclose(first.astype(np.float32), expected, rtol=1e-3, atol=1e-3)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert np.array_equal(cache_latents(model, scenes, tmp_path / "latents.npy"), first)


def test_the_exported_folder_draws_in_diffusers_and_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged = run_stage(teacher(5), tmp_path, Budget(steps=2), log=lambda line: None)
    train.save_transformer(averaged, tmp_path / TRANSFORMER)
    torch.manual_seed(1)
    save_file({"averaged": build_text_encoder(TINY_TEXT).state_dict()}, tmp_path / "text-encoder-final.pt")
    tiny = AutoencoderKL(**TINY_AUTOENCODER)
    save_file({"averaged": tiny.state_dict()}, tmp_path / "autoencoder-final.pt")
    folder = tmp_path / "scenes"
    export_pipeline(
        tmp_path,
        folder,
        autoencoder_config=TINY_AUTOENCODER,
        text_config=TINY_TEXT,
        transformer_config=TINY_TRANSFORMER,
    )
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == "PixArtSigmaPipeline"
    stored = load_safetensors(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    trained = averaged["transformer.proj_out.bias"]
    assert torch.equal(pipeline.transformer.proj_out.bias.data.half(), trained.half())
    assert len((folder / "calibration.txt").read_text().splitlines()) == CALIBRATION_PROMPTS
    prompts = held_out_prompts(3, seed=0)
    with open_model(folder, steps=2, guidance_scale=2.0) as draw:
        pictures = draw([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts])
        alone = [draw([prompt.text], [prompt.seed])[0] for prompt in prompts]
    assert all(np.array_equal(a, b) for a, b in zip(pictures, alone, strict=True))
    tables, scores = score(pictures, prompts)
    assert [picture.shape for picture in pictures] == [(128, 128, 3)] * 3
    assert len(scores) == 3
    assert tables["all prompts"]["all"]["total"] == 3


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("100m", 6000.0), ("1.5h", 5400.0)])
def test_a_budget_is_read_as_time(text: str, seconds: float) -> None:
    assert train.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "ten", "10", "10d"])
def test_a_budget_without_sense_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        train.parse_budget(text)


def test_finishing_the_decoder_leaves_the_encoder_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoencoderKL(**TINY_AUTOENCODER)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scenes = training_scenes(4, seed=1)
    latents = np.random.default_rng(1).standard_normal((4, 4, 16, 16)).astype(np.float16)
    stage = DecoderStage(model, latents, scenes, seed=1, device=CPU, batch_size=2, crop_steps=1)
    run_stage(stage, tmp_path, Budget(steps=2), log=lambda line: None)
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_training_goes_on_from_a_published_folder(tmp_path: Path) -> None:
    folder = write_tiny_scenes(tmp_path, tmp_path / "scenes", 3)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    train.begin_from(folder, run_dir)
    autoencoder = load_autoencoder(run_dir / "autoencoder-final.pt", TINY_AUTOENCODER)
    text_encoder = load_text_encoder(run_dir / "text-encoder-final.pt", TINY_TEXT)
    transformer = PixArtTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    stored = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for loaded, kept in ((autoencoder, stored.vae), (text_encoder, stored.text_encoder)):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), kept.parameters(), strict=True))
    latents = np.random.default_rng(1).standard_normal((12, 4, 16, 16)).astype(np.float16)
    stage = TeacherStage(
        latents,
        training_scenes(12, seed=1),
        text_encoder,
        seed=1,
        device=CPU,
        batch_size=2,
        compiled=False,
        transformer=transformer,
    )
    averaged = run_stage(stage, run_dir, Budget(steps=1), log=lambda line: None, warm_up=10_000)
    before = stored.transformer.state_dict()
    # One step of next to no learning rate: these are the weights that it began with.
    for name, value in averaged.items():
        if name.startswith("transformer."):
            torch.testing.assert_close(value, before[name.removeprefix("transformer.")], atol=1e-4, rtol=0)


def test_the_mean_of_two_ends_is_written(tmp_path: Path) -> None:
    folder = write_tiny_scenes(tmp_path, tmp_path / "scenes", 3)
    path = tmp_path / TRANSFORMER
    stored = PixArtTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).state_dict()
    mine = {name: torch.randn_like(value) for name, value in stored.items() if name != "pos_embed.pos_embed"}
    save_file({"averaged": mine}, path)
    train.mean_with(folder, path)
    for name, value in load_file(path)["averaged"].items():
        torch.testing.assert_close(2 * value - mine[name], stored[name])


def test_going_on_is_for_the_transformer_and_from_a_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = ["--stage", "transformer"]
    for options, named in (
        (["--from", str(tmp_path)], "--from"),
        ([*stage, "--from", str(tmp_path)], "--from"),
        ([*stage, "--guide", str(tmp_path)], "--guide goes with --from"),
        ([*stage, "--guidance-scale", "2"], "go with --guide"),
        ([*stage, "--from", str(SCENES), "--guide", str(SCENES), "--guidance-scale", "1"], "above 1"),
        ([*stage, "--from", str(SCENES), "--guide", str(SCENES), "--borrowed-steps", "-1"], "0 or more"),
        ([*stage, "--mean-with", str(tmp_path)], "--mean-with"),
        (["--stage", "decoder", "--mean-with", str(tmp_path)], "transformer's weights"),
    ):
        with pytest.raises(SystemExit):
            train.main(["-o", str(tmp_path / "run"), *options])
        assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_cells_of_objects_are_where_objects_are() -> None:
    scenes = training_scenes(3, seed=2)
    cells = object_cells(scenes, 16)
    for scene, cell in zip(scenes, cells, strict=True):
        for item in scene.items:
            assert cell[int(item.y / 8), int(item.x / 8)]
        assert 0 < cell.mean() < 0.8
