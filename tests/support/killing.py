"""Batches that are killed outright, again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence


def draw_and_kill(
    arguments: Sequence[object], *, kills: int, rng: random.Random, longest: float, timeout: float = 600
) -> int:
    """Run `edgedit batch ARGUMENTS --json` and SIGKILL it `kills` times, then let it end.

    It is killed up to `longest` seconds after its first picture, so that every start gets somewhere; the workers must
    go with it. Returns how often it was killed before it had finished.
    """
    command = [sys.executable, "-m", "edgedit", "batch", *map(str, arguments), "--json"]
    done = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] in ("picture", "done"):
                break
        time.sleep(rng.random() * longest)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        done += 1
    last = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert last.returncode == 0, last.stdout[-2000:] + last.stderr[-2000:]
    return done
