"""`generate -m ORG/NAME`: bundles of the Hugging Face Hub, from a server that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edgedit.metadata import read_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the repository someone/tiny and counts what is asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.server.requests += 1
        folder = self.server.folder
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        if self.path.startswith("/api/models/someone/tiny/tree/"):
            listing = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0"} for name, path in files.items()
            ]
            self.send(json.dumps(listing).encode(), "application/json")
        elif self.path.startswith("/api/models/someone/tiny"):
            document = {"id": "someone/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.send(json.dumps(document).encode(), "application/json")
        elif self.path.startswith("/someone/tiny/resolve/"):
            name = self.path.removeprefix("/someone/tiny/resolve/").partition("/")[2]
            if name in files:
                self.send(files[name].read_bytes(), "application/octet-stream")
            else:
                self.send_error(404)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = tmp_path / "served"
    served.mkdir()
    for path in bundle.rglob("*"):
        if path.is_file():
            (served / path.relative_to(bundle)).parent.mkdir(parents=True, exist_ok=True)
            (served / path.relative_to(bundle)).write_bytes(path.read_bytes())
    (served / "README.md").write_text("not part of the bundle")
    server = Hub(served)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_bundle_is_fetched_once_and_then_used_without_the_network(
    hub: Hub, start: Callable[..., Any], tmp_path: Path
) -> None:
    def generate(*flags: str) -> tuple[int, str]:
        process = start("generate", "a cat", "-m", "someone/tiny", "--steps", 1, "-t", 1, "-o", "a.png", "-q", *flags)
        err = process.communicate()[1]
        return process.returncode, err

    status, err = generate("--offline")
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "run once without --offline" in err
    assert hub.requests == 0

    assert generate() == (0, "")
    assert read_recipe("a.png")["model"] == "tiny"
    folder = tmp_path / ".cache" / "bundles" / "someone--tiny.edgedit"
    assert (folder / "manifest.json").is_file()
    assert not (folder / "README.md").exists()

    asked = hub.requests
    assert generate("--offline") == (0, "")
    assert generate() == (0, "")
    assert hub.requests == asked


def test_a_bundle_that_arrives_damaged_is_refused(hub: Hub, start: Callable[..., Any]) -> None:
    weights = max(hub.folder.rglob("*.data"), key=lambda path: path.stat().st_size)
    whole = weights.read_bytes()
    weights.write_bytes(bytes([*whole[:100], whole[100] ^ 1, *whole[101:]]))
    command = ["generate", "a cat", "-m", "someone/tiny", "--steps", 1, "-t", 1, "-q"]
    for _ in range(2):
        process = start(*command)
        err = process.communicate()[1]
        assert (process.returncode, len(err.splitlines())) == (2, 1), err
        assert "is damaged (wrong SHA-256)" in err
    weights.write_bytes(whole)
    process = start(*command)
    err = process.communicate()[1]
    assert (process.returncode, err) == (0, "")


def test_a_repository_that_is_not_there_is_one_line(hub: Hub, start: Callable[..., Any]) -> None:
    process = start("generate", "a cat", "-m", "someone/nothing", "-q")
    err = process.communicate()[1]
    assert (process.returncode, len(err.splitlines())) == (2, 1), err
    assert "someone/nothing: no bundle here, and none can be fetched" in err
