"""Writes a bundle whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from edgedit.bundle import MANIFEST, Bundle, is_bundle, open_bundle
from edgedit.errors import BundleError, ConversionError
from edgedit.files import sha256_file, sync_file, sync_folder
from edgedit.json_reader import JsonNode
from edgedit.manifest import FORMAT_VERSION
from edgedit.manifest_parser import check_references, is_bundle_path, parse_manifest

__all__ = ["BundleWriter"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class BundleWriter:
    """A bundle in the making: fill `root`, then call `finish` with the manifest.

        with BundleWriter("cat.edgedit") as writer:
            (writer.root / "onnx").mkdir()
            ...
            bundle = writer.finish(manifest)

    `root` is a hidden folder beside the target. Leaving the block without `finish`, by an exception or Ctrl-C too,
    removes it. A bundle that was there before is replaced only by `finish`, and put back if that fails.

    Args:
        path: the bundle to write; its parent folder must exist.
        overwrite: replace a bundle that is there. Anything else that is there is never touched.

    Raises:
        BundleError: the target exists, or its folder is missing or not writable (on entering the block); the manifest
            is not what the schema says (in `finish`).
        ConversionError: the disk filled up anywhere inside the block.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.overwrite = overwrite
        self._target = Path(os.path.realpath(path))
        self._root: Path | None = None
        self._old: Path | None = None

    @property
    def root(self) -> Path:
        """The folder to fill. Raises RuntimeError outside the block."""
        if self._root is None:
            raise RuntimeError("a BundleWriter has a folder only inside its with block, before finish")
        return self._root

    def __enter__(self) -> Self:
        try:
            self._check_target()
            self._root = self._beside("partial")
            self._root.mkdir()
        except OSError as error:
            self._raise_if_full(error)
            raise BundleError(
                f"{self.path}: cannot be written ({error.strerror}); choose a folder that exists and is writable"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for folder in (self._root, self._old):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        self._root = self._old = None
        if error is not None:
            self._raise_if_full(error)

    def finish(self, manifest: Mapping[str, object]) -> Bundle:
        """Hashes every file, completes and checks the manifest, and puts the bundle in its place.

        `format_version` and `files` are filled in here; everything else must be in `manifest`.
        """
        paths = sorted(self._files())
        files = {
            path: {"size": (self.root / path).stat().st_size, "sha256": sha256_file(self.root / path)} for path in paths
        }
        complete = {**manifest, "format_version": FORMAT_VERSION, "files": files}
        # Through JSON and back, so that what is checked is what a reader will see.
        text = json.dumps(complete, indent=1, ensure_ascii=False, allow_nan=False)
        check_references(parse_manifest(JsonNode(json.loads(text), MANIFEST)), MANIFEST)
        (self.root / MANIFEST).write_text(text + "\n", encoding="utf-8")

        for path in [*paths, MANIFEST]:
            sync_file(self.root / path)
        for folder in {(self.root / path).parent for path in [*paths, MANIFEST]}:
            sync_folder(folder)
        self._put_in_place()
        return open_bundle(self.path)

    def _files(self) -> Iterator[str]:
        for path in self.root.rglob("*"):
            relative = path.relative_to(self.root).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise BundleError(f"{relative}: a bundle holds plain files only; copy the file instead of linking it")
            if path.is_file() and relative != MANIFEST:
                if not is_bundle_path(relative):
                    raise BundleError(f"{relative!r}: not a name for a file of a bundle; use letters, digits, _ . + -")
                yield relative

    def _put_in_place(self) -> None:
        self._check_target()
        root, old = self.root, self._beside("old")
        try:
            try:
                if self._target.exists():
                    self._target.rename(old)
                root.rename(self._target)
            except BaseException:
                if old.exists():
                    if self._target.exists():
                        self._target.rename(root)
                    old.rename(self._target)
                raise
        except OSError as error:
            self._raise_if_full(error)
            raise BundleError(
                f"{self.path}: cannot be put in place ({error.strerror}); close the programs that use it"
            ) from error
        self._root, self._old = None, old
        sync_folder(self._target.parent)

    def _check_target(self) -> None:
        if not self._target.parent.is_dir():
            raise BundleError(f"{self.path}: the folder {self._target.parent} does not exist; make it first")
        if not os.path.lexists(self._target):
            return
        if not is_bundle(self._target):
            raise BundleError(f"{self.path}: exists and is not a bundle, so it is left alone; choose another name")
        if not self.overwrite:
            raise BundleError(f"{self.path}: exists already; choose another name or allow overwriting (--overwrite)")

    def _beside(self, what: str) -> Path:
        return self._target.parent / f".{self._target.name}.{what}-{secrets.token_hex(4)}"

    def _raise_if_full(self, error: BaseException) -> None:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
                raise ConversionError(
                    f"{self.path}: the disk is full ({cause.strerror}), nothing was written; "
                    "free some space or choose another folder"
                ) from error
            cause = cause.__cause__ or cause.__context__
