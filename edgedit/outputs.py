"""Where pictures go: names from a template, settled before anything is drawn."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from string import Formatter

from edgedit.errors import InputError
from edgedit.metadata import FORMATS

__all__ = ["DEFAULT_NAME", "expand_output", "plan_outputs"]

DEFAULT_NAME = "edgedit-{seed}.png"
_SPEC = re.compile(r"0?[0-9]{0,2}d?")


def expand_output(template: str, *, seed: int, index: int) -> Path:
    """`template` with `{seed}` and `{index}` replaced; widths as in `{index:04d}` are allowed, `{{` stands for `{`.

    Raises InputError for any other field and for a lone brace.
    """
    parts: list[str] = []
    values = {"seed": seed, "index": index}
    try:
        for literal, name, spec, conversion in Formatter().parse(template):
            parts.append(literal)
            if name is None:
                continue
            if name not in values or conversion or not _SPEC.fullmatch(spec or ""):
                field = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise InputError(
                    f"output {template!r}: there is no field {{{field}}}; use {{seed}}, {{index}} or {{index:04d}}"
                )
            parts.append(format(values[name], spec or ""))
    except ValueError as error:
        raise InputError(f"output {template!r}: {error}; write {{{{ and }}}} for braces") from None
    return Path("".join(parts))


def plan_outputs(template: str | None, seeds: Sequence[int]) -> list[Path]:
    """One path for each picture; picture `i` has seed `seeds[i]` and index i.

    An explicit template may overwrite files: who names a file means it. Without a template, or when it names a folder,
    the name is `edgedit-SEED.png`, and a file that is there is never overwritten: `-1`, `-2` … is added.

    Raises InputError when two pictures would get one name, the suffix is not a picture's, the folder is missing or not
    writable, or a path is taken by a folder.
    """
    folder = _folder(template)
    paths: list[Path] = []
    for index, seed in enumerate(seeds):
        if folder is not None:
            path = _free(folder / expand_output(DEFAULT_NAME, seed=seed, index=index), paths)
        else:
            path = expand_output(template or "", seed=seed, index=index)
            if path in paths:
                raise InputError(
                    f"output {template!r}: {len(seeds)} pictures would be written to {path}; "
                    "put {index} or {seed} in the name"
                )
        _check(path)
        paths.append(path)
    return paths


def _folder(template: str | None) -> Path | None:
    if template is None:
        return Path()
    is_folder = template.endswith(("/", os.sep)) or _is_folder(template, Path(template))
    return Path(template) if is_folder else None


def _free(path: Path, taken: Sequence[Path]) -> Path:
    candidate, number = path, 0
    while candidate in taken or os.path.lexists(candidate):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def _check(path: Path) -> None:
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"output {str(path)!r}: pictures are saved as {', '.join(FORMATS)}; give one of these suffixes"
        )
    if not _is_folder(path, path.parent):
        raise InputError(f"output {str(path)!r}: the folder {path.parent} does not exist; make it first")
    if _is_folder(path, path):
        raise InputError(f"output {str(path)!r}: is a folder; give a file name")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"output {str(path)!r}: the folder {path.parent} is not writable; choose another")


def _is_folder(output: str | Path, path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise InputError(f"output {str(output)!r}: {error.strerror}; choose another name") from None
