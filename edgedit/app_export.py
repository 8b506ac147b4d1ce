"""What an app needs of a bundle, and nothing else, in one folder with a report of sizes and systems."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgedit.bundle import MANIFEST, Bundle, open_bundle
from edgedit.errors import BundleError
from edgedit.files import sha256_file

__all__ = ["AppExport", "export_app"]

#: The report beside the files.
REPORT = "report.json"

#: Systems that run a package of a target.
_SYSTEMS = {
    "iOS18": {"iOS": "18.0", "macOS": "15.0", "visionOS": "2.0"},
    "iOS26": {"iOS": "26.0", "macOS": "26.0", "visionOS": "26.0"},
}


@dataclass(frozen=True)
class AppExport:
    """What was written.

    Attributes:
        folder: where.
        components: component → bytes of its package.
        size: bytes of everything but the report.
        systems: system → the oldest version that loads the packages.
        pictures: (width, height) that the packages were made for.
    """

    folder: Path
    components: dict[str, int]
    size: int
    systems: dict[str, str]
    pictures: list[tuple[int, int]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "folder": str(self.folder)}


def export_app(bundle: Bundle | str | Path, folder: str | Path, *, overwrite: bool = False) -> AppExport:
    """Write the Core ML packages, the tokenizer and the manifest of `bundle` as a bundle without anything else.

    The folder appears whole or not at all. The report `report.json` has the sizes and the oldest systems.

    Raises:
        BundleError: the bundle has no Core ML packages, or the folder exists or cannot be written.
    """
    source = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    target = Path(folder)
    lacking = [name for name, part in source.manifest.components.items() if "coreml" not in part.artefacts]
    if lacking:
        raise BundleError(f"{source.path}: {lacking[0]} has no Core ML package; convert it again with --to coreml")
    if target.exists() and not (overwrite and (target / REPORT).is_file()):
        raise BundleError(f"{target}: exists already; choose another name, or --overwrite an earlier export")
    if not target.parent.is_dir():
        raise BundleError(f"{target}: the folder {target.parent} does not exist; make it first")
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        report = _fill(source, partial, target)
        if target.exists():
            shutil.rmtree(target)
        partial.chmod(0o777 & ~_umask())
        partial.rename(target)
    except OSError as error:
        raise BundleError(
            f"{target}: cannot be written ({error.strerror}); free some space or choose another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fill(source: Bundle, place: Path, target: Path) -> AppExport:
    raw = json.loads(json.dumps(source.manifest.raw))
    wanted = [raw["prompt"]["tokenizer"]] if raw.get("prompt") else []
    components = {}
    for name, part in raw["components"].items():
        part["artefacts"] = {"coreml": part["artefacts"]["coreml"]}
        files = part["artefacts"]["coreml"]["files"]
        components[name] = sum(source.manifest.files[path].size for path in files)
        wanted += files
    for path in wanted:
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.file(path), place / path)
        if sha256_file(place / path) != source.manifest.files[path].sha256:
            raise BundleError(f"{source.path}: {path} is damaged (wrong SHA-256); fetch or convert the bundle again")
    raw["files"] = {path: entry for path, entry in raw["files"].items() if path in set(wanted)}
    (place / MANIFEST).write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    coreml = raw["provenance"]["options"].get("coreml") or {}
    report = AppExport(
        folder=target,
        components=components,
        size=sum(path.stat().st_size for path in place.rglob("*") if path.is_file()),
        systems=_SYSTEMS.get(str(coreml.get("target")), _SYSTEMS["iOS18"]),
        pictures=[(int(width), int(height)) for width, height in coreml.get("sizes", [])],
    )
    text = {key: value for key, value in report.as_dict().items() if key != "folder"}
    (place / REPORT).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return report
