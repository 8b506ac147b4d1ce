"""What the commands that train share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

from edgedit.apps.cli.progress import Progress
from edgedit.errors import InputError, RuntimeUnavailableError

__all__ = ["need_training", "parse_budget", "training_progress"]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def need_training() -> None:
    """Raises RuntimeUnavailableError when the packages that training needs are not installed."""
    missing = [name for name in ("torch", "diffusers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeUnavailableError(
            f"this command trains and needs {', '.join(missing)}; run: pip install 'edgedit[train]'"
        )


def parse_budget(text: str | None) -> float | None:
    """Seconds in "90s", "30m" or "1.5h". Raises InputError for anything else."""
    if text is None:
        return None
    try:
        return float(text[:-1]) * _UNITS[text[-1:]]
    except (KeyError, ValueError):
        raise InputError(f"--budget {text!r} is not a time; write 90s, 30m or 2h") from None


def training_progress(progress: Progress) -> Callable[[str, int, int, Mapping[str, float]], None]:
    """Hands what training reports on to the progress display."""
    stage = ""

    def tell(name: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        nonlocal stage
        if name != stage:
            stage = name
            progress.stage(name)
        progress.step(done, total, **figures)

    return tell
