"""Hub repositories: from a cache laid out as huggingface_hub lays it out, and from a Hub that runs in this process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from edgedit.converters.checkpoint import open_checkpoint
from edgedit.converters.hub import is_repository_id
from edgedit.errors import CheckpointError

REPOSITORY = "someone/tiny-pixart"
COMMIT = hashlib.sha1(b"first").hexdigest()


def write_pipeline(folder: Path, variants: tuple[str, ...] = ("",)) -> Path:
    """A pipeline's files, small and of no real model: the Hub is what is tested here."""
    index = {
        "_class_name": "PixArtSigmaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
    }
    for name in ("scheduler", "tokenizer", "text_encoder", "transformer", "unrelated"):
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    # Contents differ, because the cache keeps equal ones once.
    for name in ("scheduler/scheduler_config", "tokenizer/tokenizer", "tokenizer/tokenizer_config"):
        (folder / f"{name}.json").write_text(json.dumps({"file": name}))
    (folder / "edgedit.json").write_text(json.dumps({"licence": "none"}))
    (folder / "README.md").write_text("a model card")
    (folder / "unrelated" / "big.bin").write_bytes(bytes(1000))
    for part in ("text_encoder", "transformer"):
        (folder / part / "config.json").write_text(json.dumps({"_class_name": index[part][1]}))
    for variant in variants:
        dot = f".{variant}" if variant else ""
        weights = {"w": torch.arange(5.0)}
        save_file(weights, folder / "transformer" / f"diffusion_pytorch_model{dot}.safetensors", {"variant": variant})
        shards = {key: f"model{dot}-0000{number}-of-00002.safetensors" for number, key in enumerate("ab", 1)}
        for key, name in shards.items():
            save_file({key: torch.randn(3)}, folder / "text_encoder" / name)
        (folder / "text_encoder" / f"model.safetensors.index{dot}.json").write_text(
            json.dumps({"metadata": {}, "weight_map": shards})
        )
    torch.save({"w": torch.arange(5.0)}, folder / "transformer" / "diffusion_pytorch_model.bin")
    return folder


URL_TAIL = "/{repo_id}/resolve/{revision}/{filename}"
NEEDED = {
    "model_index.json",
    "edgedit.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
}


def write_cache(cache: Path, files: Path, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """`files` as huggingface_hub keeps them: blobs by their hash, links to them in the snapshot, a ref."""
    root = cache / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in files.rglob("*") if path.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to the network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def refused(**options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(REPOSITORY, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_a_whole_snapshot_is_used_without_asking_the_network(offline: bool, cache: Path, tmp_path: Path) -> None:
    snapshot = write_cache(cache, write_pipeline(tmp_path / "files"))
    checkpoint = open_checkpoint(REPOSITORY, offline=offline)
    assert checkpoint.source == REPOSITORY
    assert checkpoint.revision == COMMIT
    assert checkpoint.path == snapshot
    assert checkpoint.tokenizer_dirs == {"tokenizer": snapshot / "tokenizer"}
    weights = {name: sorted(part.tensors) for name, part in checkpoint.components.items()}
    assert weights == {"text_encoder": ["a", "b"], "transformer": ["w"]}
    np.testing.assert_array_equal(checkpoint.components["transformer"].tensors["w"].load(), np.arange(5.0))


def test_a_revision_is_a_branch_or_a_commit(cache: Path, tmp_path: Path) -> None:
    write_cache(cache, write_pipeline(tmp_path / "files"))
    other = hashlib.sha1(b"other").hexdigest()
    snapshot = write_cache(cache, write_pipeline(tmp_path / "others"), other, "v2")
    for revision in ("v2", other):
        assert open_checkpoint(REPOSITORY, revision=revision, offline=True).path == snapshot
    assert open_checkpoint(REPOSITORY, offline=True).revision == COMMIT
    assert "not in the local cache" in refused(revision="v3", offline=True)


def test_a_snapshot_may_be_given_as_a_path(cache: Path, tmp_path: Path) -> None:
    snapshot = write_cache(cache, write_pipeline(tmp_path / "files"))
    assert sorted(open_checkpoint(snapshot).components) == ["text_encoder", "transformer"]
    assert list(open_checkpoint(snapshot / "transformer").components) == ["transformer"]


@pytest.mark.parametrize(
    "lost", sorted(NEEDED - {"tokenizer/tokenizer_config.json", "edgedit.json", "model_index.json"})
)
@pytest.mark.parametrize("how", ["link", "blob"])
def test_a_partial_snapshot_is_refused_whatever_lacks(lost: str, how: str, cache: Path, tmp_path: Path) -> None:
    files = write_pipeline(tmp_path / "files")
    (files / "transformer" / "diffusion_pytorch_model.bin").unlink()
    (files / lost).write_bytes((files / lost).read_bytes() + b" " if lost.endswith("json") else os.urandom(64))
    snapshot = write_cache(cache, files)
    if how == "blob":
        (snapshot / lost).resolve().unlink()
    else:
        (snapshot / lost).unlink()
    message = refused(offline=True)
    assert "is partial" in message
    assert "run once without --offline" in message.lower()
    assert lost.split("/")[0] in message
    # Online it is the network's turn, which is not there.
    assert "HF_HUB_OFFLINE" in refused()


def test_a_snapshot_without_its_index_is_partial_too(cache: Path, tmp_path: Path) -> None:
    files = write_pipeline(tmp_path / "files")
    (files / "model_index.json").unlink()
    write_cache(cache, files)
    assert "is partial" in refused(offline=True)


def test_nothing_in_the_cache_is_said_so(cache: Path) -> None:
    message = refused(offline=True)
    assert "(revision main) is not in the local cache: run once without --offline" in message


def test_damage_in_the_cache_is_not_taken_for_a_missing_file(cache: Path, tmp_path: Path) -> None:
    files = write_pipeline(tmp_path / "files")
    (files / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(100))
    write_cache(cache, files)
    assert "diffusion_pytorch_model.safetensors is truncated or not safetensors" in refused(offline=True)


def test_a_link_out_of_the_models_own_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    snapshot = write_cache(cache, write_pipeline(tmp_path / "files"))
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "transformer" / "config.json").unlink()
    (snapshot / "transformer" / "config.json").symlink_to(tmp_path / "secret.json")
    assert "link to the outside" in refused(offline=True)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_offline_the_only_variant_in_the_cache_is_taken_and_said(
    variant: str | None, cache: Path, tmp_path: Path
) -> None:
    files = write_pipeline(tmp_path / "files", variants=("fp16",))
    (files / "transformer" / "diffusion_pytorch_model.bin").unlink()
    write_cache(cache, files)
    checkpoint = open_checkpoint(REPOSITORY, offline=True, variant=variant)
    assert sorted(checkpoint.components) == ["text_encoder", "transformer"]
    assert len(checkpoint.notes) == (0 if variant else 2)
    # Online the Hub is asked first, for it may have the plain weights.
    if variant is None:
        assert "HF_HUB_OFFLINE" in refused()


def test_repository_ids_are_told_from_paths() -> None:
    assert is_repository_id("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    assert is_repository_id("Efficient-Large-Model/Sana_1600M_1024px_diffusers")
    for source in ("name", "a/b/c", "../a", "a/..", "/a/b", "a b/c", "./a", "a/b.", "~/x", "", "a\\b", "a--b/c"):
        assert not is_repository_id(source) or source == "a/b.", source


def test_the_cache_that_the_environment_names_is_used(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", write_pipeline(tmp_path / "files"))
    call = f"o({REPOSITORY!r}, offline=True).revision"
    code = f"from edgedit.converters.checkpoint import open_checkpoint as o; print({call})"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == COMMIT, done.stderr


@dataclass
class Hub:
    """The parts of the Hub's HTTP interface that a download uses, over a folder."""

    files: Path
    url: str = ""
    status: int = 200
    error: str = ""
    asked: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    served = Hub(write_pipeline(tmp_path / "files", variants=("", "fp16")))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self, body: bytes, kind: str, **headers: str) -> None:
            self.send_response(served.status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            if served.error:
                self.send_header("X-Error-Code", served.error)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                entries = [self.entry(name) for name in served.names()]
                self.answer(json.dumps(entries).encode(), "application/json")
            elif path.startswith(f"/api/models/{REPOSITORY}"):
                siblings = [{"rfilename": name} for name in served.names()]
                info = {"_id": "1", "id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "siblings": siblings}
                self.answer(json.dumps(info).encode(), "application/json")
            elif path.startswith(f"/{REPOSITORY}/resolve/"):
                name = path.split("/", 5)[5]
                if self.command == "GET":
                    served.asked.append(name)
                body = (served.files / name).read_bytes()
                self.answer(body, "application/octet-stream", ETag=f'"{hashlib.sha1(body).hexdigest()}"')
            else:
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def entry(self, name: str) -> dict[str, Any]:
            body = (served.files / name).read_bytes()
            return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """huggingface_hub set to an empty cache and to the Hub that runs here."""
    settings = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    settings |= {"ENDPOINT": served.url, "HUGGINGFACE_CO_URL_TEMPLATE": served.url + URL_TAIL}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": True, "HF_HUB_DISABLE_TELEMETRY": True}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return served


def test_only_what_is_needed_is_downloaded_and_then_nothing_more(online: Hub) -> None:
    first = open_checkpoint(REPOSITORY)
    assert (first.revision, sorted(first.components), first.notes) == (COMMIT, ["text_encoder", "transformer"], ())
    assert sorted(online.asked) == sorted(NEEDED), "the model card, other formats and variants stay where they are"
    for name in NEEDED:
        assert (first.path / name).read_bytes() == (online.files / name).read_bytes()
    online.asked.clear()
    online.status = 500
    second = open_checkpoint(REPOSITORY)
    assert second.path == first.path
    assert online.asked == []


def test_a_snapshot_that_was_left_partial_is_completed(online: Hub) -> None:
    open_checkpoint(REPOSITORY, components=["transformer"])
    assert not any(name.startswith(("text_encoder", "tokenizer")) for name in online.asked)
    online.asked.clear()
    open_checkpoint(REPOSITORY)
    assert set(online.asked) == {name for name in NEEDED if name.startswith(("text_encoder", "tokenizer"))}


def test_the_variant_asked_for_is_downloaded(online: Hub) -> None:
    open_checkpoint(REPOSITORY, variant="fp16", components=["transformer"])
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in online.asked
    assert "transformer/diffusion_pytorch_model.safetensors" not in online.asked
    assert "no weights of the variant bf16" in refused(variant="bf16")


def test_with_one_variant_in_the_cache_the_plain_weights_of_the_hub_are_fetched(online: Hub) -> None:
    open_checkpoint(REPOSITORY, variant="fp16")
    online.asked.clear()
    checkpoint = open_checkpoint(REPOSITORY)
    assert checkpoint.notes == ()
    assert "transformer/diffusion_pytorch_model.safetensors" in online.asked


@pytest.mark.parametrize("cached", [None, "bf16"])
def test_a_variant_that_the_cache_lacks_is_fetched(cached: str | None, tmp_path: Path, online: Hub) -> None:
    shutil.rmtree(online.files)
    write_pipeline(online.files, variants=("", "fp16", "bf16"))
    open_checkpoint(REPOSITORY, variant=cached)
    online.asked.clear()
    assert open_checkpoint(REPOSITORY, variant="fp16").notes == ()
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in online.asked
    shutil.rmtree(next(iter((tmp_path / "cache").glob("*/snapshots"))))
    assert "not in the local cache" in refused(offline=True)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (404, "RepoNotFound", "neither a path here nor a repository on the Hub"),
        (404, "RevisionNotFound", "no such revision"),
        (403, "GatedRepo", "is gated: accept its terms"),
        (500, "", "cannot be downloaded"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(status: int, error: str, message: str, online: Hub) -> None:
    online.status, online.error = status, error
    assert message in refused()


def test_a_file_that_the_hub_does_not_have_is_named(online: Hub) -> None:
    (online.files / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    assert "lacks text_encoder/model-00002-of-00002.safetensors" in refused()
    shutil.rmtree(online.files / "transformer")
    assert "transformer has no weights" in refused()
    (online.files / "model_index.json").unlink()
    assert "no diffusers pipeline" in refused()


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path) -> None:
    code = f"from edgedit.converters.checkpoint import open_checkpoint as o; o({REPOSITORY!r})"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("edgedit.errors.CheckpointError: ")
    assert "cannot be downloaded" in last
    assert "check network and disk, or give a local folder" in last
