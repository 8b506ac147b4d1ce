"""Opening checkpoints that diffusers and transformers saved, and refusing those that are broken or mean harm."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from edgedit.converters.checkpoint import Checkpoint, ComponentSource, open_checkpoint
from edgedit.converters.folder import MissingFileError
from edgedit.errors import CheckpointError


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.manual_seed(random.randrange(1 << 31))
    width = 4 * random.randint(1, 3)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width,
        cross_attention_dim=2 * width,
        num_layers=2,
        sample_size=8,
        caption_channels=16,
    )
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{letter}", -2.0) for letter in "abc")]
    return PixArtSigmaPipeline(
        tokenizer=T5Tokenizer(vocab=letters, extra_ids=0),
        text_encoder=T5EncoderModel(T5Config(vocab_size=10, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)),
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(flow_shift=2.5),
    )


@pytest.fixture(scope="module")
def saved(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def assert_weights(source: ComponentSource, model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    state = model.state_dict()
    tied = state.keys() - source.tensors.keys()
    assert tied <= {"encoder.embed_tokens.weight"}, "only a tied weight may be stored once"
    assert source.tensors.keys() <= state.keys()
    for name, ref in source.tensors.items():
        array = ref.load()
        assert array.dtype.name == str(dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float32), state[name].to(dtype).float().numpy(), err_msg=name)


def assert_whole(checkpoint: Checkpoint, pipeline: Any, dtype: torch.dtype = torch.float32) -> None:
    assert checkpoint.components.keys() == {"transformer", "vae", "text_encoder"}
    for name, source in checkpoint.components.items():
        model = getattr(pipeline, name)
        assert source.name == name
        assert source.class_name == type(model).__name__
        assert source.library == ("transformers" if name == "text_encoder" else "diffusers")
        assert_weights(source, model, dtype)
    transformer = checkpoint.components["transformer"].config
    assert {key: transformer[key] for key in transformer if key[0] != "_"} == {
        key: value for key, value in pipeline.transformer.config.items() if key[0] != "_"
    }


def test_a_pipeline_that_diffusers_saved_is_opened_whole(pipeline: Any, saved: Path) -> None:
    checkpoint = open_checkpoint(str(saved))
    assert_whole(checkpoint, pipeline)
    assert (checkpoint.source, checkpoint.path, checkpoint.revision) == (str(saved), saved, None)
    assert checkpoint.pipeline_class == "PixArtSigmaPipeline"
    assert checkpoint.scheduler is not None
    assert checkpoint.scheduler.class_name == "DPMSolverMultistepScheduler"
    assert checkpoint.scheduler.config["flow_shift"] == 2.5
    assert checkpoint.tokenizer_dirs == {"tokenizer": saved / "tokenizer"}
    assert checkpoint.model_index == json.loads((saved / "model_index.json").read_text())
    assert checkpoint.notes == ()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "3KB"}], ids=["one file", "shards"])
def test_a_variant_is_taken_when_asked_for_or_alone_and_said(pipeline: Any, options: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, variant="fp16", **options)
    asked = open_checkpoint(tmp_path, variant="fp16")
    assert_whole(asked, pipeline)
    assert asked.notes == ()
    alone = open_checkpoint(tmp_path)
    assert_whole(alone, pipeline)
    assert len(alone.notes) == 3
    assert all("has only the variant fp16: took it" in note for note in alone.notes)
    with pytest.raises(CheckpointError, match="only the variant fp16"):
        open_checkpoint(tmp_path, variant="bf16")


def test_plain_weights_are_preferred_and_replace_a_variant_that_one_component_lacks(
    pipeline: Any, folder: Path
) -> None:
    half = {key: value.half() for key, value in pipeline.transformer.state_dict().items()}
    save_file(half, folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    assert_whole(open_checkpoint(folder), pipeline)
    mixed = open_checkpoint(folder, variant="fp16")
    assert_weights(mixed.components["transformer"], pipeline.transformer, torch.float16)
    assert_weights(mixed.components["vae"], pipeline.vae)
    assert len(mixed.notes) == 2
    assert all("no variant fp16: took the plain weights" in note for note in mixed.notes)
    with pytest.raises(CheckpointError, match="no weights of the variant bf16"):
        open_checkpoint(folder, variant="bf16")
    with pytest.raises(CheckpointError, match="not a name"):
        open_checkpoint(folder, variant="../x")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    save_file(half, folder / "transformer" / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(CheckpointError, match="only the variant bf16 and fp16"):
        open_checkpoint(folder)


def test_sharded_weights_are_put_together(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list((tmp_path / "transformer").glob("*-of-*"))) > 3
    checkpoint = open_checkpoint(tmp_path)
    assert_whole(checkpoint, pipeline)
    assert checkpoint.notes == ()


def as_pickles(model: torch.nn.Module, folder: Path) -> None:
    """The text encoder as repositories of 2023 have it: `.bin` shards and the tied weight listed twice."""
    for file in folder.glob("model*"):
        file.unlink()
    items = list(model.state_dict().items())
    assert any(key == "encoder.embed_tokens.weight" for key, _ in items)
    halves = [dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])]
    placed = {}
    for number, half in enumerate(halves, 1):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(half, folder / name)
        placed |= dict.fromkeys(half, name)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_a_text_encoder_in_pickle_shards_is_read(pipeline: Any, folder: Path) -> None:
    as_pickles(pipeline.text_encoder, folder / "text_encoder")
    source = open_checkpoint(folder).components["text_encoder"]
    assert source.tensors.keys() == pipeline.text_encoder.state_dict().keys()
    assert_weights(source, pipeline.text_encoder)


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_the_folder_of_one_component_is_a_checkpoint(name: str, pipeline: Any, saved: Path, tmp_path: Path) -> None:
    for place in (saved / name, Path(shutil.copytree(saved / name, tmp_path / "any name"))):
        checkpoint = open_checkpoint(place)
        assert list(checkpoint.components) == [name]
        assert checkpoint.pipeline_class is None
        assert checkpoint.scheduler is None
        assert checkpoint.components[name].class_name == type(getattr(pipeline, name)).__name__
        assert_weights(checkpoint.components[name], getattr(pipeline, name))


@pytest.mark.parametrize("ending", ["safetensors", "bin", "pth", "pt", "ckpt"])
def test_a_single_file_is_a_checkpoint_whatever_its_ending(ending: str, pipeline: Any, tmp_path: Path) -> None:
    state = pipeline.vae.state_dict()
    path = tmp_path / f"vae.{ending}"
    if ending == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"config\.json for the file"):
        open_checkpoint(path)
    pipeline.vae.save_config(tmp_path)
    for checkpoint in (open_checkpoint(path), open_checkpoint(path, config=tmp_path / "config.json")):
        assert checkpoint.components["vae"].class_name == "AutoencoderKL"
        assert_weights(checkpoint.components["vae"], pipeline.vae)


def test_a_configuration_of_another_class_is_refused(pipeline: Any, tmp_path: Path) -> None:
    save_file(pipeline.transformer.state_dict(), tmp_path / "x.safetensors")
    pipeline.vae.save_config(tmp_path)
    with pytest.raises(CheckpointError, match="is of 'AutoencoderKL', the weights are of PixArt"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_only_the_components_asked_for_need_be_there(pipeline: Any, folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    checkpoint = open_checkpoint(folder, components=["transformer", "vae"])
    assert checkpoint.components.keys() == {"transformer", "vae"}
    assert checkpoint.tokenizer_dirs == {}
    assert checkpoint.scheduler is not None
    with pytest.raises(MissingFileError, match="text_encoder"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"no component 'unet'; it has .*transformer"):
        open_checkpoint(folder, components=["unet"])
    with pytest.raises(CheckpointError, match="no component 'vae'; it has transformer"):
        open_checkpoint(folder / "transformer", components=["vae"])


def test_the_old_class_name_of_pixart_is_understood(pipeline: Any, folder: Path) -> None:
    edit(folder / "model_index.json", lambda index: index.update(transformer=["diffusers", "Transformer2DModel"]))
    edit(folder / "transformer" / "config.json", lambda config: config.update(_class_name="Transformer2DModel"))
    assert open_checkpoint(folder).components["transformer"].class_name == "PixArtTransformer2DModel"
    assert open_checkpoint(folder / "transformer").components["transformer"].class_name == "PixArtTransformer2DModel"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shard(folder: Path, model: torch.nn.Module) -> Path:
    """The transformer in two shards; the path of the index."""
    target = folder / "transformer"
    (target / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(target, max_shard_size="8KB")  # type: ignore[operator]
    return target / "diffusion_pytorch_model.safetensors.index.json"


def refused(source: Path | str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_shard_is_named(pipeline: Any, folder: Path) -> None:
    index = shard(folder, pipeline.transformer)
    lost = sorted(index.parent.glob("*-of-*"))[1]
    lost.unlink()
    assert lost.name in refused(folder)
    index.unlink()
    assert "no index.json" in refused(folder)


def test_an_index_that_does_not_fit_its_shards_is_refused(pipeline: Any, folder: Path) -> None:
    index = shard(folder, pipeline.transformer)
    text = index.read_text()
    first, second, *_ = sorted(set(json.loads(text)["weight_map"].values()))
    edit(index, lambda content: content["weight_map"].update(novel=first))
    assert "names 'novel'" in refused(folder)
    index.write_text(text)
    edit(index, lambda content: content["weight_map"].update({"proj_out.bias": first if "bias" in second else second}))
    moved = json.loads(index.read_text())["weight_map"]["proj_out.bias"]
    if moved != json.loads(text)["weight_map"]["proj_out.bias"]:
        assert "proj_out.bias" in refused(folder)
    index.write_text("{}")
    assert "no weight_map" in refused(folder)
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    assert "twice" in refused(folder)


@pytest.mark.parametrize(
    "path", ["../../secret.safetensors", "/secret.safetensors", "..", "a/b.safetensors", "a\\b", "", 3]
)
def test_no_path_in_an_index_leads_out_of_its_folder(path: Any, pipeline: Any, folder: Path) -> None:
    save_file({"proj_out.bias": torch.ones(1)}, folder.parent / "secret.safetensors")
    index = shard(folder, pipeline.transformer)
    outside = str(folder.parent / "secret.safetensors") if path == "/secret.safetensors" else path
    edit(index, lambda content: content["weight_map"].update({"proj_out.bias": outside}))
    assert "not in its folder" in refused(folder)


@pytest.mark.parametrize("name", ["..", "../outside", "a/b", ".hidden"])
def test_no_component_name_leads_out_of_the_folder(name: str, saved: Path, folder: Path) -> None:
    shutil.copytree(saved / "transformer", folder.parent / "outside")
    edit(folder / "model_index.json", lambda index: index.update({name: ["diffusers", "PixArtTransformer2DModel"]}))
    assert "not [library, class]" in refused(folder)


@pytest.mark.parametrize("kind", ["file", "folder", "configuration", "tokenizer"])
def test_a_link_to_the_outside_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    places = {
        "file": folder / "transformer" / "diffusion_pytorch_model.safetensors",
        "folder": folder / "transformer",
        "configuration": folder / "vae" / "config.json",
        "tokenizer": folder / "tokenizer" / "tokenizer.json",
    }
    place = places[kind]
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    assert "link to the outside" in refused(folder)


def test_a_link_within_the_folder_is_followed(pipeline: Any, folder: Path) -> None:
    (folder / "transformer").rename(folder / "real")
    (folder / "transformer").symlink_to("real")
    assert_whole(open_checkpoint(folder), pipeline)
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to("config.json")
    assert "is missing" in refused(folder)


@pytest.mark.parametrize(
    "lost",
    [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae",
        "scheduler/scheduler_config.json",
        "tokenizer",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_partial_folder_is_refused_naming_what_lacks(lost: str, folder: Path) -> None:
    place = folder / lost
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(MissingFileError, match=lost.split("/")[0]):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", "{", "not valid JSON"),
        ("model_index.json", "[]", "not an object"),
        ("model_index.json", "{}", "names no pipeline class"),
        ("model_index.json", '{"_class_name": ["my_code", "Pipeline"]}', "code that a checkpoint brings is not run"),
        ("model_index.json", '{"_class_name": "X"}', "names no network"),
        ("model_index.json", '{"_class_name": "X", "vae": ["diffusers"]}', "not [library, class]"),
        ("model_index.json", '{"_class_name": "X", "vae": [["a"], "b"]}', "not [library, class]"),
        ("transformer/config.json", '{"a": ' * 30000, "not valid JSON"),
        ("transformer/config.json", '{"quantization_config": {"quant_method": "bnb"}}', "quantized already"),
        ("transformer/diffusion_pytorch_model.safetensors", "short", "too few"),
        (
            "transformer/diffusion_pytorch_model.safetensors",
            "version https://git-lfs.github.com/spec/v1",
            "git lfs pull",
        ),
        ("vae/diffusion_pytorch_model.safetensors", "<!DOCTYPE html>" + " " * 99, "truncated or not safetensors"),
    ],
)
def test_damage_is_told_in_one_line(file: str, content: str, message: str, folder: Path) -> None:
    (folder / file).write_text(content)
    assert message in refused(folder)


def test_a_folder_that_is_no_checkpoint_is_refused_with_what_to_give(tmp_path: Path) -> None:
    assert "no diffusers pipeline" in refused(tmp_path)
    torch.save({"w": torch.ones(1)}, tmp_path / "model.pth")
    assert "give the file model.pth" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert "names no class" in refused(tmp_path) or "no weights" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.gguf", b"GGUF" + bytes(60), "a GGUF file"),
        ("x.pth", b"<html>" + b" " * 60, "a web page"),
        ("x.bin", b"\x1f\x8b" + bytes(60), "a gzip archive"),
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file"),
        ("x.txt", b"hello", "neither safetensors nor torch's"),
        ("x.pth", b"PK\x05\x06" + bytes(18), "not one of torch's"),
        ("x.pth", b"PK\x03\x04" + bytes(60), "not a whole torch file"),
        ("x.pth", b"", "not a whole torch file"),
        ("x.safetensors", b"", "too few"),
    ],
)
def test_an_unknown_file_is_told_apart_where_it_can_be(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


def test_what_is_not_there_or_does_not_apply_is_refused(pipeline: Any, saved: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none")
    assert "does not exist" in refused("checkpoints/model.safetensors")
    assert "does not exist" in refused("not an id")
    assert "does not exist" in refused("a\0b")
    assert "has no revision" in refused(saved, revision="main")
    assert "leave the config out" in refused(saved, config=saved / "vae" / "config.json")
    assert "leave the variant out" in refused(saved / "vae", variant="fp16")
    file = saved / "vae" / "diffusion_pytorch_model.safetensors"
    assert "has no variants" in refused(file, variant="fp16")
    assert "No such file" in refused(file, config=tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a plain file" in refused(tmp_path / "pipe.safetensors")


def test_a_pickle_that_calls_code_is_refused_from_the_folder_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    class Stolen:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save({"w": torch.ones(1), "x": Stolen()}, folder / "text_encoder" / "pytorch_model.bin")
    message = refused(folder)
    assert "asks to run" in message
    assert "system; it was not run" in message
    assert not (tmp_path / "ran").exists()


def test_opening_and_reading_imports_neither_torch_nor_any_model_library(saved: Path) -> None:
    code = (
        "import sys; from edgedit.converters.checkpoint import open_checkpoint; "
        f"c = open_checkpoint({str(saved)!r}); "
        "[ref.load() for part in c.components.values() for ref in part.tensors.values()]; "
        "assert not {'torch', 'diffusers', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
