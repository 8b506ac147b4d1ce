"""edgedit: diffusion transformers that draw on your own machine.

import edgedit
with edgedit.load() as pipe:
    pipe.generate("a red circle above a blue square", seed=1).images[0].save("scene.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgedit.api import convert, load, verify
    from edgedit.errors import EdgeditError
    from edgedit.pipeline import Pipeline, Result

__version__ = "0.1.0"
__all__ = ["EdgeditError", "Pipeline", "Result", "__version__", "convert", "load", "verify"]

_PLACES = {
    "EdgeditError": "edgedit.errors",
    "Pipeline": "edgedit.pipeline",
    "Result": "edgedit.pipeline",
    "convert": "edgedit.api",
    "load": "edgedit.api",
    "verify": "edgedit.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import edgedit` stays quick."""
    if name not in _PLACES:
        raise AttributeError(f"module 'edgedit' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
