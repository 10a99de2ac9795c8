"""What this machine has: processor cores and their name, free memory, free disk space, packages."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")


def cpu_count() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the system does not give one."""
    model = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Return the instruction set extensions by their Linux names, such as `avx2`; empty on other systems."""
    flags = re.search(r"^flags\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return frozenset(flags[1].split()) if flags else frozenset()


def installed_version(package: str) -> str:
    """Return the installed version of a package, or an empty string."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next image or step; other libraries than glibc's are left alone.

    By default glibc maps and unmaps every tensor and image of a few megabytes, and the kernel clears their pages.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its upper limit
        mallopt(-1, 128 << 20)  # M_TRIM_THRESHOLD


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return ""


def free_bytes(folder: Path | None) -> int:
    """Return the free bytes of a folder's disk, or of memory within this container's limit."""
    import psutil

    if folder is not None:
        return int(psutil.disk_usage(os.fspath(folder)).free)
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        taken = int((CONTROL_GROUP / "memory.current").read_text())
        # Files that were read count as taken, and are given up when somebody needs the room.
        given_up = re.search(r"^inactive_file (\d+)$", (CONTROL_GROUP / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - taken + (int(given_up[1]) if given_up else 0))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        pass
    return max(free, 0)
