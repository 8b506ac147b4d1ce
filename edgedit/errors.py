"""Errors that a person can act on. The command line prints them as one line and exits with status 2."""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConversionError",
    "EdgeditError",
    "InputError",
    "RuntimeUnavailableError",
]


class EdgeditError(Exception):
    """Something the user can mend. The message is one line: what is wrong, then what to do.

    Anything long (a list of keys, say) belongs in `details`, which the command line prints below the message.
    """

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class InputError(EdgeditError):
    """An argument, prompt, size or picture that cannot be used."""


class CheckpointError(EdgeditError):
    """A checkpoint that is missing, damaged, dangerous or not what its configuration says."""


class ConversionError(EdgeditError):
    """A checkpoint that is sound but cannot be converted, or a conversion that could not be written."""


class BundleError(EdgeditError):
    """A bundle that is missing, damaged, newer than this version, or lacks what is asked of it."""


class RuntimeUnavailableError(EdgeditError):
    """A backend or execution provider that this machine does not have."""
