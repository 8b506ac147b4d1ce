"""Start the process of a contender and take what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedit import errors
from edgedit.errors import EdgeditError

__all__ = ["call_alone"]


def call_alone(call: str, order: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What `call` ("module:function") returns for `order` in a new process; files of the exchange go to `folder`.

    Raises:
        EdgeditError: of the class and with the message that it had there, or with the process's last words when it
            broke down.
    """
    path, result = folder / "order.json", folder / "result.json"
    result.unlink(missing_ok=True)
    whole = {**order, "call": call, "result": str(result), "spawned": time.time()}
    path.write_text(json.dumps(whole), encoding="utf-8")
    command = [sys.executable, "-m", "edgedit.bench.child", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="backslashreplace", check=False)
    if done.returncode or not result.exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1][:300] if lines else f"it ended with status {done.returncode}"
        raise EdgeditError(f"{order.get('label', call)}: the process broke down: {said}", details=done.stderr[-4000:])
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        kind = getattr(errors, found["error"]["kind"], EdgeditError)
        raise kind(found["error"]["message"])
    return found
