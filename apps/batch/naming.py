"""Names of output files: a template whose results stay inside the output folder."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from string import Formatter

from edgedit.apps.batch.jobs import prompt_hash
from edgedit.errors import InputError
from edgedit.metadata import FORMATS

__all__ = ["DEFAULT_NAME", "PER_FOLDER", "NameTemplate", "path_key"]

#: `{seed}` is added to it for a job of several seeds.
DEFAULT_NAME = "{folder}/{id}.png"
#: Pictures in one folder when the name has `{folder}`.
PER_FOLDER = 1000

_FIELDS = ("id", "index", "seed", "prompt_hash", "folder")
_WIDTH = re.compile(r"0?[0-9]{0,2}d?")
_HIDDEN = re.compile(r"(^|/)\.")


@dataclass(frozen=True)
class NameTemplate:
    """A checked template. `{folder}` counts pictures by the thousand: 0000, 0001 …

    Raises InputError for an unknown field, a lone brace, a suffix that is no picture's, and a path that is absolute,
    leaves the folder or is hidden in it.
    """

    text: str

    def __post_init__(self) -> None:
        parts = self._parts()
        literal = "".join(part for part, _, _ in parts)
        if not any(self.text.lower().endswith(suffix) for suffix in FORMATS):
            raise InputError(
                f"--name {self.text!r}: pictures are saved as {', '.join(FORMATS)}; give one of these suffixes"
            )
        bad = "\\" in self.text or self.text.startswith("/") or any(mark in literal for mark in '<>:"|?*\0\n')
        if bad or any(part in ("", ".", "..") for part in self.text.split("/")) or _HIDDEN.search(self.text):
            raise InputError(
                f"--name {self.text!r} must be a plain path inside the output folder, without a leading dot, .. or :"
            )

    def _parts(self) -> list[tuple[str, str | None, str]]:
        parts: list[tuple[str, str | None, str]] = []
        try:
            for literal, name, spec, conversion in Formatter().parse(self.text):
                numeric = name in ("index", "seed")
                wrong_spec = bool(spec) and not (numeric and _WIDTH.fullmatch(spec or ""))
                if name is not None and (name not in _FIELDS or conversion or wrong_spec):
                    field = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                    raise InputError(
                        f"--name {self.text!r}: there is no field {{{field}}}; use "
                        f"{', '.join(f'{{{known}}}' for known in _FIELDS)} or {{index:06d}}"
                    )
                parts.append((literal, name, spec or ""))
        except ValueError as error:
            raise InputError(f"--name {self.text!r}: {error}; write {{{{ and }}}} for braces") from None
        return parts

    def uses(self, name: str) -> bool:
        """Whether the template has the field `name`."""
        return any(field == name for _, field, _ in self._parts())

    def for_several_seeds(self) -> NameTemplate:
        """This template, with the seed before the suffix if nothing in it tells the seeds of one job apart."""
        if self.uses("seed") or self.uses("index"):
            return self
        stem, dot, suffix = self.text.rpartition(".")
        return NameTemplate(f"{stem}-{{seed}}{dot}{suffix}")

    def path(self, *, identity: str, index: int, seed: int, prompt: str) -> str:
        """The path of one picture, relative to the output folder, joined by "/"."""
        folder = f"{index // PER_FOLDER:04d}"
        values = {"id": identity, "index": index, "seed": seed, "folder": folder}
        if "{prompt_hash}" in self.text:
            values["prompt_hash"] = prompt_hash(prompt)
        return self.text.format(**values)


def path_key(path: str) -> str:
    """`path` as file systems that fold case and accents compare it."""
    return path if path.isascii() and path.islower() else unicodedata.normalize("NFC", path.casefold())
