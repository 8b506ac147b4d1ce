"""Checkpoints of the Hugging Face Hub: the cache first, then only the files that are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgedit.converters.folder import Folder, MissingFileError
from edgedit.converters.layout import plan_files
from edgedit.converters.strict_json import read_object
from edgedit.errors import CheckpointError

__all__ = ["Snapshot", "fetch", "is_repository_id"]

_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot in the cache: its folder and the commit it is."""

    path: Path
    revision: str


def is_repository_id(source: str) -> bool:
    """Whether `source` has the form ORG/NAME of a Hub repository."""
    return bool(_ID.fullmatch(source)) and ".." not in source and "--" not in source


def fetch(
    repo_id: str,
    *,
    revision: str | None,
    offline: bool,
    variant: str | None,
    components: Sequence[str] | None,
) -> Snapshot:
    """Brings a Hub repository's checkpoint to this machine.

    A snapshot in the cache (HF_HUB_CACHE, HF_HOME) that has every file its model_index.json and index.json files name
    is used without asking the network, whatever has been published since: name a `revision` for another. Otherwise the
    missing files, and no others, are downloaded. With `offline` nothing is asked of the network and a partial snapshot
    is refused. Raises CheckpointError in every case of failure, with what to do.
    """
    cached = _cached(repo_id, revision)
    problem: CheckpointError | None = None
    if cached is not None:
        try:
            notes = _check_whole(cached, variant, components)
        except MissingFileError as error:
            problem = error
        else:
            # The cache may hold one variant where the Hub has the plain weights too; only the Hub knows.
            if offline or not notes:
                return Snapshot(cached, cached.name)
    if offline:
        if problem is None:
            raise CheckpointError(
                f"{repo_id} (revision {revision or 'main'}) is not in the local cache: run once without --offline."
            )
        raise CheckpointError(f"the cached snapshot of {repo_id} is partial: {problem} Run once without --offline.")
    path = _download(repo_id, revision, variant, components)
    _check_whole(path, variant, components)
    return Snapshot(path, path.name)


def _cached(repo_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # An empty list asks for the folder alone: whether it is whole, `_check_whole` knows better.
        folder = snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[])
    except LocalEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the local cache has no usable {repo_id} ({_first_line(error)}): clear it.") from None
    return Path(folder)


def _check_whole(path: Path, variant: str | None, components: Sequence[str] | None) -> tuple[str, ...]:
    """Notes on the choice of weights; raises MissingFileError unless every file that is needed is there."""
    folder = Folder(path)
    plan = plan_files(folder, variant, components)
    for name in sorted(plan.files):
        folder.path(name)
    return plan.notes


@dataclass(frozen=True)
class _Remote:
    """A repository on the Hub as a listing; the JSON files that are asked for are downloaded into the cache."""

    repo_id: str
    revision: str | None
    files: frozenset[str]

    @property
    def name(self) -> str:
        return self.repo_id

    def read_json(self, relative: str, *, strict: bool = False) -> dict[str, Any]:
        from huggingface_hub import hf_hub_download

        path = _ask(self.repo_id, lambda: hf_hub_download(self.repo_id, relative, revision=self.revision))
        return read_object(Path(path), strict=strict)


def _download(repo_id: str, revision: str | None, variant: str | None, components: Sequence[str] | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = _ask(repo_id, lambda: HfApi().model_info(repo_id, revision=revision))
    files = frozenset(sibling.rfilename for sibling in info.siblings or ())
    plan = plan_files(_Remote(repo_id, revision, files), variant, components)
    missing = sorted(plan.files - files)
    if missing:
        raise CheckpointError(f"{repo_id} on the Hub lacks {missing[0]}, which it names: use another checkpoint.")
    names = sorted(plan.files)
    return Path(_ask(repo_id, lambda: snapshot_download(repo_id, revision=revision, allow_patterns=names)))


def _ask(repo_id: str, call: Callable[[], _T]) -> _T:
    """Runs a call of huggingface_hub and turns each way it fails into one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return call()
    except GatedRepoError:
        raise CheckpointError(f"{repo_id} is gated: accept its terms on the Hub and run `hf auth login`.") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id} is neither a path here nor a repository on the Hub that you may read: check the name, or run "
            "`hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo_id} has no such revision: give a branch, tag or commit of it.") from None
    except OfflineModeIsEnabled:
        raise CheckpointError(
            f"{repo_id} is not whole in the cache and HF_HUB_OFFLINE is set: unset it once."
        ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id} cannot be asked for ({_first_line(error)}): check the name.") from None
    except Exception as error:
        # The client's transport errors are a different library's in each of its major versions.
        raise CheckpointError(
            f"{repo_id} is not whole in the local cache and cannot be downloaded ({_first_line(error)}): check network "
            "and disk, or give a local folder."
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
