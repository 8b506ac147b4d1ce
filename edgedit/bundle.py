"""Bundles: folders `NAME.edgedit` with a manifest and everything that it names. The format is in `docs/bundle.md`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgedit.errors import BundleError
from edgedit.files import sha256_file
from edgedit.json_reader import parse_json
from edgedit.manifest import Artefact, Component, Manifest
from edgedit.manifest_parser import check_references, is_bundle_path, parse_manifest

__all__ = ["MANIFEST", "Bundle", "is_bundle", "open_bundle", "read_manifest"]

MANIFEST = "manifest.json"
#: A manifest is a few kilobytes; one beyond this is not read into memory.
_LARGEST_MANIFEST = 64 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Bundle:
    """An open bundle: its folder and its manifest. Nothing but the manifest is read until it is asked for."""

    path: Path
    manifest: Manifest

    def file(self, relative: str) -> Path:
        """The file or folder `relative` of this bundle.

        Raises BundleError when the path is not plain (`..`, absolute, backslashes), is not listed in the manifest, is
        missing, or leads out of the bundle through a symbolic link.
        """
        if not is_bundle_path(relative):
            raise BundleError(
                f"{self.path}: {relative!r} is not a plain path inside the bundle; do not use this bundle"
            )
        listed = self.manifest.files
        if relative not in listed and not any(path.startswith(relative + "/") for path in listed):
            raise BundleError(f"{self.path}: {relative} is not listed in the manifest; convert the model again")
        path = self.path / relative
        try:
            resolved = path.resolve(strict=True)
            inside = resolved.is_relative_to(self.path.resolve(strict=True))
        except (OSError, RuntimeError):
            raise BundleError(f"{self.path}: {relative} is missing; fetch or convert the bundle again") from None
        if not inside:
            raise BundleError(f"{self.path}: {relative} is a link out of the bundle; copy the file into the bundle")
        return path

    def component(self, name: str) -> Component:
        """The component `name`. Raises BundleError, naming those that are there, when the bundle lacks it."""
        try:
            return self.manifest.components[name]
        except KeyError:
            there = ", ".join(self.manifest.components)
            raise BundleError(
                f"{self.path}: has no {name} (it has: {there}); convert the whole checkpoint to get one"
            ) from None

    def artefact(self, component: str, backend: str) -> Artefact:
        """What `backend` loads for `component`. Raises BundleError, naming the backends that are there."""
        artefacts = self.component(component).artefacts
        try:
            return artefacts[backend]
        except KeyError:
            there = ", ".join(artefacts)
            raise BundleError(
                f"{self.path}: {component} was not converted for {backend} (only: {there}); convert with --to {backend}"
            ) from None

    def need(self, section: T | None, name: str) -> T:
        """`section`, a part of the manifest that may be null. Raises BundleError with its `name` when it is."""
        if section is None:
            raise BundleError(
                f"{self.path}: has no {name}, as it holds single components only; convert the whole checkpoint"
            )
        return section

    def verify(self, on_file: Callable[[str], None] | None = None) -> None:
        """Reads every file and compares size and SHA-256. `on_file` is called with each path before it is read.

        Raises BundleError that names the first file that differs.
        """
        for path in self.manifest.files:
            if on_file is not None:
                on_file(path)
            self._check_size(path)
            try:
                found = sha256_file(self.file(path))
            except OSError as error:
                raise BundleError(
                    f"{self.path}: {path} cannot be read ({error.strerror}); fetch or convert the bundle again"
                ) from error
            if found != self.manifest.files[path].sha256:
                raise BundleError(f"{self.path}: {path} is damaged (wrong SHA-256); fetch or convert the bundle again")

    @property
    def model_hash(self) -> str:
        """64 hexadecimal digits that every copy of the model shares and that change with any of its files.

        The SHA-256 of the lines `SHA256  PATH` of all files, in the order of the paths; no file is read.
        """
        digest = hashlib.sha256()
        for path, entry in sorted(self.manifest.files.items()):
            digest.update(f"{entry.sha256}  {path}\n".encode())
        return digest.hexdigest()

    def _check_size(self, relative: str) -> None:
        path, expected = self.file(relative), self.manifest.files[relative].size
        if not path.is_file():
            raise BundleError(f"{self.path}: {relative} is not a file; fetch or convert the bundle again")
        size = path.stat().st_size
        if size != expected:
            raise BundleError(
                f"{self.path}: {relative} is damaged ({size} bytes, not {expected}); fetch or convert the bundle again"
            )


def open_bundle(path: str | Path, *, verify: bool = False) -> Bundle:
    """Opens the bundle at `path`: reads the manifest, checks it, and checks that every file is there in its size.

    With `verify` every file is read and its SHA-256 compared too (`Bundle.verify`). Raises BundleError, one line, when
    the bundle is missing, damaged, unsafe or of a newer format.
    """
    bundle = Bundle(Path(path), read_manifest(Path(path)))
    for relative in bundle.manifest.files:
        bundle._check_size(relative)
    if verify:
        bundle.verify()
    return bundle


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of the bundle in `folder`. Raises BundleError."""
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_MANIFEST + 1)
    except FileNotFoundError:
        if folder.is_dir():
            problem = f"not a bundle, it has no {MANIFEST}; make one with: edgedit convert SOURCE -o NAME.edgedit"
        else:
            problem = "there is no such bundle; check the path"
        raise BundleError(f"{folder}: {problem}") from None
    except NotADirectoryError:
        raise BundleError(f"{folder}: a bundle is a folder; convert the checkpoint with: edgedit convert") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if len(data) > _LARGEST_MANIFEST:
        raise BundleError(f"{path}: far too large for a manifest; fetch or convert the bundle again")
    node = parse_json(data, str(path))
    manifest = parse_manifest(node)
    check_references(manifest, str(path))
    return manifest


def is_bundle(path: Path) -> bool:
    """Whether `path` is a folder whose manifest looks like a bundle's, of whatever version, whole or not."""
    try:
        members = parse_json((path / MANIFEST).read_bytes(), MANIFEST).members()
    except (OSError, BundleError):
        return False
    return {"format_version", "components", "files"} <= members.keys()
