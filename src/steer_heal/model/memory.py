"""The memory of this process. What is freed within a stage serves the next tensor; between stages it goes back to the
system. Where the C library is not glibc nothing of that changes.
"""

from __future__ import annotations

import ctypes
import platform
import resource
from functools import cache

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


def keep_freed_memory() -> None:
    """From now on the memory of a freed tensor serves the next one: the system would have to clear it page by page
    before it gave it again."""
    if libc := _glibc():
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            if libc.mallopt(option, value) != 1:
                raise RuntimeError(f"mallopt refused option {option}")


def give_back_freed_memory() -> None:
    """What has been freed goes back to the system. Kept over stages, holes that no tensor fits add up: an aligned
    request does not always fit the hole that its like has left."""
    if libc := _glibc():
        libc.malloc_trim(ctypes.c_size_t(0))


def peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes: on the GPU when the model is there, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
