"""Main memory: free memory, peak memory, and the reuse of freed memory.

Within a stage the memory of freed tensors is kept for new ones. After a stage it goes back to the system. Both need
glibc; with another C library nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sys
from functools import cache
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_main_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that this process can still allocate: those free on the machine, or fewer under a container's limit."""
    said = proc / "meminfo"
    if not said.exists():  # not Linux: half of the physical memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", said.read_text())[1])
    return min([available, *_left_in_control_groups(proc / "self" / "cgroup", cgroups)])


def _left_in_control_groups(membership: Path, cgroups: Path) -> list[int]:
    """Bytes left under the limit of each control group (v1 and v2) around this process; cached files count as free.

    Groups are nested and each may have a limit. A container sees its own group at the root, while `membership` may hold
    the host's path to it. So the root is read even where that path does not exist.
    """
    left = []
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = cgroups if controllers == "" else cgroups / "memory"
        limit, usage, cached = (
            ("memory.max", "memory.current", "inactive_file")
            if controllers == ""
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        own = root.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        for group in (own, *own.parents):
            if not group.is_relative_to(root):
                break
            if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
                stat = (group / "memory.stat").read_text() if (group / "memory.stat").exists() else ""
                found = re.search(rf"^{cached} (\d+)$", stat, re.MULTILINE)
                used = int((group / usage).read_text()) - (int(found[1]) if found else 0)
                left.append(max(0, int(most) - used))
    return left


def keep_freed_memory() -> None:
    """From now on keep the memory of freed tensors for new ones: the system would clear returned memory page by page
    before giving it again."""
    if libc := _glibc():
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            if libc.mallopt(option, value) != 1:
                raise RuntimeError(f"mallopt refused option {option}")


def give_back_freed_memory() -> None:
    """Return freed memory to the system. Kept over several stages, unusable holes would add up: an aligned request does
    not always fit the hole that an equal one has left."""
    if libc := _glibc():
        libc.malloc_trim(ctypes.c_size_t(0))


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: on the GPU if `device` is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, kilobytes on Linux


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
