"""What this machine has: memory, cores, and where caches go."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

from edgedit.errors import InputError

__all__ = [
    "available_cores",
    "available_memory",
    "cache_dir",
    "parse_memory",
    "peak_memory",
    "processor_name",
    "resident_memory",
    "return_large_blocks",
]

_M_MMAP_THRESHOLD = -3


def available_cores() -> int:
    """Processors that this process may use, at least 1; the quota of a container's control group counts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def processor_name() -> str:
    """The processor's model as the system calls it; "unknown" where it does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def available_memory() -> int | None:
    """Bytes that a process may still take without swapping, as the system tells; None where it does not.

    In a container the limit of the control group counts, when it is lower.
    """
    free: int | None = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        try:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (ValueError, OSError, AttributeError):
            return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max" and free is not None:
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass
    return free


def resident_memory() -> int:
    """Bytes of memory that this process holds now; its peak where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError, IndexError):
        return peak_memory() or 0


def parse_memory(text: str | int) -> int:
    """Bytes from "3G", "800M", "1.5 GB" or a number of bytes; K, M, G and T are powers of 1000, Ki … Ti of 1024.

    Raises InputError for anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?", str(text).strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise InputError(f"a memory of {text!r} cannot be read; write it like 3G or 800M")
    unit = (found[2] or "").upper()
    base = 1024 if unit.endswith("I") else 1000
    return int(float(found[1]) * base ** (" KMGT".index(unit[0]) if unit else 0))


def return_large_blocks() -> None:
    """Make the C library give blocks of 1 MiB and more back to the system as soon as they are freed.

    glibc raises that limit to 32 MiB as a program runs and keeps freed blocks below it: the peak of a decoder whose
    maps were 16 MiB each was nine times as high. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not tell.

    Linux counts what the process was before it became this program into `ru_maxrss`, so its own figure goes first.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cache_dir() -> Path:
    """Folder for caches: EDGEDIT_CACHE, or the platform's place for caches."""
    if explicit := os.environ.get("EDGEDIT_CACHE"):
        return Path(explicit)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgedit"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "edgedit" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgedit"
