from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgedit
from edgedit.errors import BundleError, CheckpointError, ConversionError, InputError

Saved = Callable[[str], tuple[Any, Path, int]]


@pytest.fixture
def checkpoint(saved_pipeline: Saved, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved_pipeline("pixart-sigma")[1], tmp_path / "checkpoint"))


def weights(checkpoint: Path, component: str = "transformer") -> Path:
    return next((checkpoint / component).glob("*.safetensors"))


def test_a_bundle_accounts_for_every_parameter_of_every_component(saved_pipeline: Saved, tmp_path: Path) -> None:
    pipeline, folder, _ = saved_pipeline("pixart-sigma")
    report = edgedit.convert(folder, tmp_path / "x.edgedit")
    found = {c.name: c.parameters for c in report.components}
    transformer, vae = pipeline.transformer, pipeline.vae
    assert found["transformer"] == sum(p.numel() for p in transformer.parameters())
    assert found["decoder"] + found["encoder"] == sum(p.numel() for p in vae.parameters())
    assert found["text_encoder"] == sum(p.numel() for p in pipeline.text_encoder.parameters())
    assert report.size == sum(c.size for c in report.components) > 0
    assert json.loads(json.dumps(report.as_dict()))["family"] == "pixart-sigma"


def test_converting_twice_gives_the_same_weights_and_graphs(saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = saved_pipeline("pixart-sigma")[1]
    hashes = []
    for name in ("a", "b"):
        edgedit.convert(folder, tmp_path / f"{name}.edgedit", dtype="fp16")
        manifest = json.loads((tmp_path / f"{name}.edgedit" / "manifest.json").read_text())
        hashes.append({path: entry["sha256"] for path, entry in manifest["files"].items()})
    assert hashes[0] == hashes[1]


def test_half_precision_halves_the_weights_and_says_what_it_cost(saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = saved_pipeline("pixart-sigma")[1]
    edgedit.convert(folder, tmp_path / "full.edgedit")
    report = edgedit.convert(folder, tmp_path / "half.edgedit", dtype="fp16")

    def data(name: str) -> int:
        return (tmp_path / f"{name}.edgedit" / "onnx" / "transformer.onnx.data").stat().st_size

    assert data("half") < 0.8 * data("full")  # a tiny model is mostly biases and norms, which stay float32
    transformer = next(c for c in report.components if c.name == "transformer")
    assert transformer.parity is not None
    assert 1e-6 < transformer.parity["relative_l2"] < 1e-2


def test_a_dry_run_reports_and_writes_nothing(saved_pipeline: Saved, tmp_path: Path) -> None:
    report = edgedit.convert(saved_pipeline("sana")[1], tmp_path / "x.edgedit", dry_run=True)
    assert {c.name for c in report.components} == {"transformer", "text_encoder", "decoder", "encoder"}
    assert report.bundle is None
    assert list(tmp_path.iterdir()) == []


def test_a_transformer_alone_becomes_a_bundle_that_predicts(saved_pipeline: Saved, tmp_path: Path) -> None:
    import torch

    pipeline, folder, _ = saved_pipeline("pixart-sigma")
    edgedit.convert(folder / "transformer", tmp_path / "x.edgedit")
    latents, states = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 24)
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    with torch.no_grad():
        wanted = pipeline.transformer(
            latents,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=torch.tensor([400.0, 400.0]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0].numpy()
    with edgedit.load(tmp_path / "x.edgedit") as pipe:
        found = pipe.predict(
            latents=latents.numpy(),
            timestep=400.0,
            encoder_hidden_states=states.numpy(),
            encoder_attention_mask=mask.numpy(),
        )
        assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
        with pytest.raises(BundleError, match="draws no pictures"):
            pipe.generate("a red cat")
        with pytest.raises(BundleError, match="no text encoder"):
            pipe.encode_prompt("a red cat")


def test_an_unknown_key_stops_the_conversion_and_is_listed_with_its_neighbour(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(weights(checkpoint))
    tensors["transformer_blocks.0.attn1.to_qq.weight"] = tensors.pop("transformer_blocks.0.attn1.to_q.weight")
    save_file(tensors, weights(checkpoint))
    with pytest.raises(ConversionError) as caught:
        edgedit.convert(checkpoint, tmp_path / "x.edgedit")
    assert "\n" not in str(caught.value)
    assert "transformer_blocks.0.attn1.to_qq.weight" in caught.value.details
    assert "transformer_blocks.0.attn1.to_q.weight" in caught.value.details
    assert not (tmp_path / "x.edgedit").exists()


def test_a_configuration_that_disagrees_with_the_weights_is_named(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(ConversionError) as caught:
        edgedit.convert(checkpoint, tmp_path / "x.edgedit")
    assert "num_layers" in str(caught.value) + caught.value.details


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"to": ("tensorrt",)}, "unknown target 'tensorrt'; choose from: onnx"),
        ({"dtype": "int3"}, "unknown dtype 'int3'; choose from: fp32, fp16"),
        ({"components": ["unet"]}, "makes no component 'unet'; it makes: "),
    ],
)
def test_an_option_that_is_not_known_is_refused(
    saved_pipeline: Saved, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        edgedit.convert(saved_pipeline("pixart-sigma")[1], tmp_path / "x.edgedit", **change)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_pipeline_class_is_refused_with_what_is_known(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "CogView9Pipeline"}))
    with pytest.raises((ConversionError, CheckpointError), match=r"CogView9Pipeline.*PixArtSigmaPipeline"):
        edgedit.convert(checkpoint, tmp_path / "x.edgedit")


def test_an_unknown_component_class_is_refused_with_what_is_known(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "MyDiT"}))
    index = checkpoint / "model_index.json"
    found = json.loads(index.read_text())
    index.write_text(json.dumps({**found, "transformer": ["diffusers", "MyDiT"]}))
    with pytest.raises((ConversionError, CheckpointError), match="MyDiT"):
        edgedit.convert(checkpoint, tmp_path / "x.edgedit")


def test_a_model_states_its_own_recommendation(checkpoint: Path, tmp_path: Path) -> None:
    own = {
        "recommended": {"steps": 7, "guidance_scale": 2.5, "sampler": "euler"},
        "prompt": {"max_length": 9},
        "licence": "MIT",
    }
    (checkpoint / "edgedit.json").write_text(json.dumps(own))
    edgedit.convert(checkpoint, tmp_path / "x.edgedit")
    manifest = edgedit.load(tmp_path / "x.edgedit").bundle.manifest
    assert manifest.recommended is not None
    assert manifest.prompt is not None
    assert (manifest.recommended.steps, manifest.recommended.guidance_scale, manifest.recommended.sampler) == (
        7,
        2.5,
        "euler",
    )
    assert manifest.prompt.positive.max_length == 9
    assert manifest.provenance.licence == "MIT"
    (checkpoint / "edgedit.json").write_text('{"recommended": {"step": 3}}')
    with pytest.raises(CheckpointError, match=r"edgedit.json: recommended has the unknown entry 'step'"):
        edgedit.convert(checkpoint, tmp_path / "y.edgedit")


def test_an_existing_bundle_is_kept_unless_told_otherwise(saved_pipeline: Saved, tmp_path: Path) -> None:
    folder = saved_pipeline("pixart-sigma")[1]
    edgedit.convert(folder, tmp_path / "x.edgedit")
    before = (tmp_path / "x.edgedit" / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="overwrite"):
        edgedit.convert(folder, tmp_path / "x.edgedit")
    assert (tmp_path / "x.edgedit" / "manifest.json").read_bytes() == before
    edgedit.convert(folder, tmp_path / "x.edgedit", overwrite=True, dtype="fp16")
    assert (tmp_path / "x.edgedit" / "manifest.json").read_bytes() != before


FLOW_TABLES = {"path": "flow", "prediction": "flow", "sampler": "lcm", "sigmas": [[1.0, 0.9, 0.7, 0.4], [1.0, 0.7]]}


def test_a_distilled_model_states_its_schedule_and_guidance_and_is_drawn_by_them(
    checkpoint: Path, tmp_path: Path
) -> None:
    own = {"schedule": FLOW_TABLES, "guidance": {"kind": "none"}}
    (checkpoint / "edgedit.json").write_text(json.dumps(own))
    (checkpoint / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "PNDMScheduler"}')
    edgedit.convert(checkpoint, tmp_path / "x.edgedit")
    pipeline = edgedit.load(tmp_path / "x.edgedit")
    manifest = pipeline.bundle.manifest
    assert manifest.schedule == FLOW_TABLES
    assert manifest.guidance is not None
    assert manifest.guidance.kind == "none"
    assert manifest.recommended is not None
    assert (manifest.recommended.steps, manifest.recommended.sampler, manifest.recommended.guidance_scale) == (
        4,
        "lcm",
        1.0,
    )
    seen: list[float] = []
    pipeline.generate("a red cat", seed=1, on_step=lambda state: seen.append(state.timestep) or True)
    np.testing.assert_allclose(seen, [1000, 900, 700, 400], rtol=1e-6)
    assert pipeline.generate("a red cat", seed=1, steps=2).recipe["steps"] == 2
    for change, message in (({"steps": 3}, "distilled for 2 or 4 steps"), ({"negative_prompt": "x"}, "no negative")):
        with pytest.raises(InputError, match=message):
            pipeline.generate("a red cat", seed=1, **change)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"schedul": {}}, "unknown entry 'schedul'"),
        ({"schedule": []}, "has schedule = .* must be an object"),
        ({"schedule": {"path": "flow"}}, "lacks 'prediction'"),
        ({"schedule": {**FLOW_TABLES, "sigmas": [[1.0, 0.5], [0.9, 0.4]]}}, "has sigmas"),
        ({"schedule": {**FLOW_TABLES, "sigmas": [0.5, 0.9]}}, "must fall"),
        ({"schedule": FLOW_TABLES, "recommended": {"steps": 3}}, "distilled for 2 or 4 steps; ask for that, not 3"),
        ({"schedule": FLOW_TABLES, "recommended": {"sampler": "ddim"}}, "sampler ddim cannot run"),
        ({"recommended": {"sampler": "eulr"}}, "unknown sampler 'eulr'"),
        ({"recommended": {"steps": 0}}, "steps = 0: it must be a whole number"),
        ({"recommended": {"sizes": [[64]]}}, "sizes = .*width, height"),
        ({"guidance": {"kind": "strong"}}, "kind = 'strong'"),
        ({"guidance": {"kind": "embedded"}}, "'embedded': it must be cfg or none"),
        ({"attention": {}}, "attention = .* a list"),
        ({"licence": 3}, "licence = 3"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(" ")[0].strip("'"),
)
def test_a_record_that_is_not_what_it_should_be_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, own: dict[str, Any], message: str
) -> None:
    (checkpoint / "edgedit.json").write_text(json.dumps(own))
    with pytest.raises((CheckpointError, ConversionError), match=message) as caught:
        edgedit.convert(checkpoint, tmp_path / "x.edgedit")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.edgedit").exists()


def test_the_timestep_scale_of_sana_reaches_the_network_as_its_pipeline_has_it(
    saved_pipeline: Saved, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved_pipeline("sana")[1], tmp_path / "checkpoint"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "timestep_scale": 0.25}))
    edgedit.convert(folder, tmp_path / "x.edgedit")
    seen: list[float] = []
    pipeline = edgedit.load(tmp_path / "x.edgedit")
    pipeline.generate("a red cat", seed=0, steps=2, on_step=lambda state: seen.append(state.timestep) or True)
    scheduler = saved_pipeline("sana")[0].scheduler
    scheduler.set_timesteps(2)
    assert seen == [float(0.25 * timestep) for timestep in scheduler.timesteps]
