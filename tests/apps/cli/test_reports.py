"""`convert`, `inspect`, `verify` and `models`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgedit
from edgedit.bundle import open_bundle
from edgedit.converters.families import FAMILIES

Run = Callable[..., Any]


def test_convert_prints_a_table_with_class_size_and_parity_of_every_component(cli: Run, checkpoint: Path) -> None:
    done = cli("convert", checkpoint, "-o", "a.edgedit")
    assert done.status == 0, done.err
    manifest = open_bundle("a.edgedit").manifest
    assert done.lines[0] == "pixart-sigma (PixArtSigmaPipeline)"
    for name, class_name in (
        ("text_encoder", "T5EncoderModel"),
        ("transformer", "PixArtTransformer2DModel"),
        ("decoder", "AutoencoderKL"),
        ("encoder", "AutoencoderKL"),
    ):
        (row,) = [line.split() for line in done.lines if line.strip().startswith(name)]
        assert row[1] == class_name
        assert manifest.components[name].parameters == pytest.approx(float(row[2]) * 1e3, rel=0.01)
        assert row[7] == "fp32"
        assert "equal" in row or "dB" in row
    assert done.lines[-1].startswith("a.edgedit: ")
    assert [line for line in done.err.splitlines() if line in manifest.components] == list(manifest.components)


def test_convert_verbose_names_every_dropped_key_and_why(cli: Run, checkpoint: Path) -> None:
    done = cli("convert", checkpoint / "vae", "-o", "a.edgedit", "--components", "decoder", "--dry-run", "-v")
    assert done.status == 0, done.err
    reported = [line.strip() for line in done.lines if line.startswith("    ") and line.strip()]
    from safetensors import safe_open

    with safe_open(checkpoint / "vae" / "diffusion_pytorch_model.safetensors", "np") as file:
        names = [name for name in file.keys() if name.startswith(("encoder.", "quant_conv."))]  # noqa: SIM118
    assert sorted(reported) == sorted(names)
    assert f"{len(names)} keys dropped, belongs to the encoder" in done.out


def test_a_dry_run_reports_the_plan_and_writes_nothing(cli: Run, checkpoint: Path) -> None:
    done = cli("convert", checkpoint, "-o", "a.edgedit", "--dry-run", "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["bundle"] is None
    assert [part["name"] for part in report["components"]] == ["text_encoder", "transformer", "decoder", "encoder"]
    assert sorted(Path().rglob("*.edgedit*")) == []


def test_convert_honours_components_dtype_name_and_overwrite(cli: Run, checkpoint: Path) -> None:
    flags = ["--components", "transformer, decoder", "--dtype", "fp16", "--name", "My model", "--no-measure"]
    done = cli("convert", checkpoint, "-o", "a.edgedit", "--json", *flags)
    assert done.status == 0, done.err
    report = json.loads(done.out)
    manifest = open_bundle("a.edgedit").manifest
    assert list(manifest.components) == ["transformer", "decoder"] == [part["name"] for part in report["components"]]
    assert {part.artefacts["onnx"].precision for part in manifest.components.values()} == {"fp16"}
    assert {part["parity"] for part in report["components"]} == {None}
    assert manifest.name == "My model"

    again = cli("convert", checkpoint, "-o", "a.edgedit", "-q")
    assert (again.status, len(again.err.splitlines())) == (2, 1), again.err
    assert "--overwrite" in again.err
    done = cli("convert", checkpoint, "-o", "a.edgedit", "-q", "--no-measure", "--overwrite")
    assert (done.status, done.out) == (0, "a.edgedit\n"), done.err
    assert len(open_bundle("a.edgedit").manifest.components) == 4


def test_a_folder_that_is_no_bundle_is_never_overwritten(cli: Run, checkpoint: Path) -> None:
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    done = cli("convert", checkpoint, "-o", "mine", "--overwrite", "-q")
    assert (done.status, len(done.err.splitlines())) == (2, 1), done.err
    assert Path("mine/letter.txt").read_text() == "dear"


def test_inspect_tells_what_a_bundle_is(cli: Run, bundle: Path) -> None:
    done = cli("inspect", bundle)
    assert done.status == 0, done.err
    opened = open_bundle(bundle)
    for words in (
        "pixart-sigma",
        "PixArtSigmaPipeline",
        opened.model_hash[:16],
        "latents float32[batch, 4, height, width]",
        "16x16, 20 steps, dpmpp_2m, guidance 4.5",
        "at most 300 tokens",
        "sides multiples of 4",
        *opened.manifest.components,
    ):
        assert words in done.out, words
    document = json.loads(cli("inspect", bundle, "--json").out)
    assert (document["kind"], document["model_hash"]) == ("bundle", opened.model_hash)
    assert document["manifest"] == json.loads((bundle / "manifest.json").read_text())
    assert json.loads(cli("inspect", bundle / "manifest.json", "--json").out)["manifest"] == document["manifest"]


def test_inspect_tells_how_a_picture_was_drawn(cli: Run, draw: Run) -> None:
    draw("a [red] cat", "-s", 12, "-o", "a.png")
    done = cli("inspect", "a.png")
    assert done.status == 0
    assert "a [red] cat" in done.out
    assert "edgedit generate -C a.png" in done.out
    recipe = json.loads(cli("inspect", "a.png", "--json").out)["recipe"]
    assert (recipe["prompt"], recipe["seed"]) == ("a [red] cat", 12)


def test_inspect_tells_what_a_checkpoint_holds(
    cli: Run, checkpoint: Path, saved_pipeline: Callable[[str], tuple[Any, Path, int]]
) -> None:
    done = cli("inspect", checkpoint)
    assert done.status == 0, done.err
    assert "PixArtTransformer2DModel" in done.out
    document = json.loads(cli("inspect", checkpoint, "--json").out)
    assert document["pipeline"] == "PixArtSigmaPipeline"
    pipeline = saved_pipeline("pixart-sigma")[0]
    for part in document["components"]:
        module = getattr(pipeline, part["name"])
        assert part["class"] == type(module).__name__
        assert part["parameters"] == sum(p.numel() for p in module.parameters())
        assert list(part["dtypes"]) == ["float32"]
    (vae,) = json.loads(cli("inspect", checkpoint / "vae", "--json").out)["components"]
    assert (vae["class"], vae["makes"]) == ("AutoencoderKL", ["decoder", "encoder"])


def test_verify_measures_every_component_and_passes(cli: Run, bundle: Path) -> None:
    done = cli("verify", bundle, "-t", 1)
    assert done.status == 0, done.err
    assert done.out.count("passed") == 5
    report = json.loads(cli("verify", bundle, "-t", 1, "--json").out)
    assert report["passed"] is True
    assert all(0 <= part["agreement"]["relative_l2"] <= part["tolerance"] for part in report["components"])
    assert cli("verify", bundle, "-t", 1, "-q").out == ""


def test_verify_ends_with_status_1_when_a_component_computes_something_else(cli: Run, bundle: Path) -> None:
    shutil.copytree(bundle, "odd.edgedit")
    recorded = Path("odd.edgedit/reference/transformer.npz")
    with np.load(recorded) as file:
        arrays = {key: file[key] * 1.5 if key.startswith("out.") else file[key] for key in file.files}
    np.savez(recorded, **arrays)
    manifest = json.loads(Path("odd.edgedit/manifest.json").read_text())
    import hashlib

    data = recorded.read_bytes()
    manifest["files"]["reference/transformer.npz"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    Path("odd.edgedit/manifest.json").write_text(json.dumps(manifest))
    done = cli("verify", "odd.edgedit", "-t", 1)
    assert done.status == 1, done.err
    (row,) = [line for line in done.lines if line.strip().startswith("transformer")]
    assert row.rstrip().endswith("FAILED")
    assert "components FAILED" in done.lines[-1]
    assert cli("verify", "odd.edgedit", "-t", 1, "-q").status == 1


def test_models_lists_what_is_here_and_what_can_be_converted(
    cli: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("broken.edgedit").mkdir()
    monkeypatch.setenv("EDGEDIT_MODELS", str(bundle.parent))
    done = cli("models")
    assert done.status == 0, done.err
    assert "builtin" in done.out
    (row,) = [line for line in done.lines if line.strip().startswith("tiny ")]
    assert "16x16" in row
    assert str(bundle) in row
    assert "cannot be used: broken.edgedit" in done.out
    document = json.loads(cli("models", "--json").out)
    found = {entry["name"]: entry for entry in document["models"]}
    assert found["tiny"]["model_hash"] == open_bundle(bundle).model_hash
    assert found["broken"]["error"]
    assert [family["family"] for family in document["families"]] == [family.name for family in FAMILIES]
    assert all(family["example"].startswith("edgedit convert ") for family in document["families"])


def test_verify_and_inspect_take_names_too(cli: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDIT_MODELS", str(bundle.parent))
    assert cli("inspect", "tiny").status == 0
    assert cli("verify", "tiny", "-t", 1, "-q").status == 0


def test_bench_times_the_components_that_are_asked_for(cli: Run, bundle: Path) -> None:
    flags = ["--components", "decoder,transformer", "--repeat", 1, "-t", 1]
    report = json.loads(cli("bench", bundle, *flags, "--json").out)
    assert {part["name"] for part in report["components"]} == {"decoder", "transformer"}
    assert all(part["best_seconds"] > 0 for part in report["components"])
    done = cli("bench", bundle, *flags, "--size", "32x16")
    assert done.status == 0, done.err
    assert "32×16 px" in done.out


def test_bench_beside_another_bundle_says_who_is_nearer_and_faster(cli: Run, bundle: Path) -> None:
    flags = ["--components", "decoder", "--repeat", 1, "--rounds", 1, "-t", 1]
    done = cli("bench", bundle, *flags, "--vs", f"{bundle}@onnxruntime")
    assert done.status == 0, done.err
    assert "tiny.edgedit@onnxruntime" in done.out
    assert "reference" in done.out
    assert "above 1 where the bundle is faster" in done.out
    done = cli("bench", bundle, *flags, "--vs", "ollama")
    assert done.status == 2
    assert "--vs ollama: choose one of diffusers, ort-export" in done.err


def test_no_command_prints_the_help(cli: Run) -> None:
    done = cli()
    assert done.status == 0
    for command in ("generate", "convert", "inspect", "verify", "bench", "tune", "models"):
        assert command in done.out
        assert cli(command, "--help").status == 0


def test_python_and_command_line_make_the_same_bundle(cli: Run, checkpoint: Path, bundle: Path) -> None:
    edgedit.convert(checkpoint, "python.edgedit")
    assert open_bundle("python.edgedit").model_hash == open_bundle(bundle).model_hash
