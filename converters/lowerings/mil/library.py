"""coremltools, imported when it is first needed, without what it prints about the platform that it is on."""

from __future__ import annotations

import contextlib
import io
import logging
from functools import cache
from typing import Any

from edgedit.errors import RuntimeUnavailableError

__all__ = ["coremltools"]


@cache
def coremltools() -> Any:
    """The module. Raises RuntimeUnavailableError, with what to install, when it cannot be imported."""
    logger = logging.getLogger("coremltools")
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import coremltools as library
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"coremltools cannot be imported ({error}); run: pip install 'edgedit[coreml]'"
        ) from error
    logger.setLevel(logging.ERROR)
    return library
