"""Where the command line finds bundles: by path, by name in the usual folders, or on the Hugging Face Hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgedit.errors import BundleError, EdgeditError

if TYPE_CHECKING:
    from edgedit.bundle import Bundle

__all__ = ["MODELS_VARIABLE", "SUFFIX", "bundles_at_hand", "find_bundle", "open_local"]

SUFFIX = ".edgedit"
#: Folders that hold bundles, separated as in PATH.
MODELS_VARIABLE = "EDGEDIT_MODELS"


def open_local(name: str | Path) -> Bundle:
    """The bundle `name` on this machine, its manifest read and nothing else. Raises BundleError."""
    from edgedit.bundle import open_bundle

    return open_bundle(find_bundle(str(name), hub=False))


def find_bundle(name: str, *, hub: bool = True, offline: bool = False) -> Path:
    """The folder of the bundle `name`: builtin, a path, one that `bundles_at_hand` lists, or a Hub id ORG/NAME.

    A bundle of the Hub is fetched into the cache folder once and verified; from then on the network is not asked. With
    `offline` it never is. Raises BundleError when there is none.
    """
    from edgedit.api import BUILTIN

    if name == "builtin":
        return BUILTIN
    path = Path(name).expanduser()
    if path.exists():
        return path
    for found in bundles_at_hand():
        if name in (found.name, found.name.removesuffix(SUFFIX)):
            return found
    from edgedit.converters.hub import is_repository_id

    if hub and is_repository_id(name) and not name.endswith(SUFFIX):
        return _from_hub(name, offline)
    raise BundleError(f"{name}: there is no such bundle; `edgedit models` lists those at hand")


def bundles_at_hand() -> list[Path]:
    """Folders NAME.edgedit in the current folder, in those of EDGEDIT_MODELS, and those fetched from the Hub."""
    found: dict[Path, Path] = {}
    for folder in _folders():
        try:
            inside = sorted(folder.iterdir())
        except OSError:
            continue
        for path in inside:
            if path.name.endswith(SUFFIX) and not path.name.startswith(".") and path.is_dir():
                found.setdefault(path.resolve(), path)
    return list(found.values())


def _folders() -> Iterator[Path]:
    yield Path()
    for entry in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep):
        if entry:
            yield Path(entry).expanduser()
    yield _hub_cache()


def _hub_cache() -> Path:
    from edgedit.device import cache_dir

    return cache_dir() / "bundles"


def _from_hub(repository: str, offline: bool) -> Path:
    from edgedit.bundle import open_bundle

    folder = _hub_cache() / (repository.replace("/", "--") + SUFFIX)
    try:
        open_bundle(folder)
    except BundleError as error:
        if offline:
            raise BundleError(
                f"{repository}: neither a bundle here nor in the cache ({folder}); run once without --offline"
            ) from error
        _download(repository, folder)
    return folder


def _download(repository: str, folder: Path) -> None:
    """Fetch the files that the repository's manifest names, verify them, and put the bundle at `folder`.

    An interrupted download goes on where it stopped; one that arrives damaged is removed.
    """
    from edgedit.bundle import MANIFEST, open_bundle, read_manifest

    partial = folder.with_suffix(".partial")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download

        hf_hub_download(repository, MANIFEST, local_dir=partial)
        names = [MANIFEST, *read_manifest(partial).files]
        snapshot_download(repository, allow_patterns=names, local_dir=partial)
    except EdgeditError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # The client's transport errors are a different library's in each of its major versions.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(
            f"{repository}: no bundle here, and none can be fetched from the Hub ({type(error).__name__}: {reason}); "
            "check the name and the network"
        ) from error
    try:
        open_bundle(partial, verify=True)
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BundleError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
