"""Joules that the processor packages of this machine have used, where the system lets a user read that."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["POWERCAP", "EnergyMeter"]

#: Running Average Power Limit counters of Linux.
POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")


class EnergyMeter:
    """Energy between its making and `joules`, of all packages and of every process that ran on them.

    Counters wrap around; one wrap between two readings is accounted for.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._folder = folder
        self._start = self._read()

    def _read(self) -> dict[str, tuple[int, int]]:
        found = {}
        try:
            for zone in self._folder.iterdir():
                if _PACKAGE.fullmatch(zone.name):
                    now = int((zone / "energy_uj").read_text())
                    found[zone.name] = now, int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def joules(self) -> float | None:
        """Joules since the meter was made; None where the system does not tell."""
        end = self._read()
        if not self._start or end.keys() != self._start.keys():
            return None
        used = 0
        for name, (now, limit) in end.items():
            before = self._start[name][0]
            used += now - before if now >= before else now + limit - before
        return used / 1e6
