"""Whether ledger, index and disk agree."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgedit.apps.batch.index import read_index
from edgedit.apps.batch.ledger import Ledger
from edgedit.errors import InputError
from edgedit.files import sha256_file

__all__ = ["Agreement", "check_batch"]

#: Files of the output folder that are no pictures.
_OTHERS = ("index.jsonl", "index.parquet", "report.html")


@dataclass
class Agreement:
    """What `check_batch` found.

    Attributes:
        checked: finished pictures that were read.
        damaged: those that are missing or have other bytes, by index.
        strangers: files in the folder that no picture of the ledger is called.
        leftovers: temporary files that a killed process left.
        unindexed: finished pictures that the index lacks, has twice, or has with another hash.
    """

    checked: int = 0
    damaged: dict[int, str] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    unindexed: dict[int, str] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """One line each."""
        return [
            *self.damaged.values(),
            *(f"{path}: belongs to no picture of this batch" for path in self.strangers),
            *(f"{path}: left by a process that was killed" for path in self.leftovers),
            *self.unindexed.values(),
        ]


def check_batch(ledger: Ledger, on_picture: Callable[[int], None] | None = None) -> Agreement:
    """Read every finished picture and compare its hash; look for files and index entries that should not be there."""
    found, root = Agreement(), ledger.places.root
    hashes: dict[int, str] = {}
    for picture, sha256, _, _ in ledger.finished():
        if on_picture is not None:
            on_picture(found.checked)
        found.checked += 1
        hashes[picture.index] = sha256
        try:
            if sha256_file(root / picture.path) != sha256:
                found.damaged[picture.index] = f"{picture.path}: has other bytes than were recorded"
        except OSError as error:
            found.damaged[picture.index] = f"{picture.path}: cannot be read ({error.strerror})"
    _look_around(ledger, found)
    _read_index(ledger, hashes, found)
    return found


def _look_around(ledger: Ledger, found: Agreement) -> None:
    places = ledger.places
    known = {hash(path) for (path,) in ledger.rows("SELECT path FROM paths")}
    for folder, folders, files in os.walk(places.root):
        here = Path(folder)
        if here == places.root and ".batch" in folders:
            folders.remove(".batch")
        for name in files:
            path = (here / name).relative_to(places.root).as_posix()
            if hash(path) not in known and path not in _OTHERS:
                found.strangers.append(path)
    left = [*places.partial.glob("*"), *places.inside.glob("ledger.sqlite.partial-*"), *places.latents.glob("*")]
    busy = {f"{index}" for (index,) in ledger.rows("SELECT idx FROM pictures WHERE state != 2")}
    for file in left:
        # Latents of a picture that is not finished are kept for its next attempt.
        if file.parent != places.latents or file.name.partition("-")[0] not in busy:
            found.leftovers.append(file.relative_to(places.root).as_posix())


def _read_index(ledger: Ledger, hashes: dict[int, str], found: Agreement) -> None:
    last: dict[int, str] = {}
    try:
        if ledger.places.index.exists():
            for entry in read_index(ledger.places.index):
                last[entry["index"]] = entry["sha256"]
    except InputError as error:
        found.unindexed[-1] = str(error)
    for index, sha256 in hashes.items():
        if last.get(index) != sha256:
            found.unindexed[index] = f"picture {index}: is not in index.jsonl, or with another hash"
