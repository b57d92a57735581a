"""The processor: its name, its instructions, and the strict mode of Intel's matrix library that suits it. No torch."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}  # Linux' names of the instructions, the last one of ARM


@dataclass(frozen=True)
class Processor:
    """Name and instruction flags as the system reports them; both may be empty elsewhere than on Linux."""

    name: str
    flags: frozenset[str]

    @property
    def mkl_mode(self) -> str:
        """The widest mode of `MKL_CBWR` in which a sum does not depend on where its numbers lie in memory.

        MKL offers AVX-512 in this mode on Intel's processors only.
        """
        return "AVX512,STRICT" if "Intel" in self.name and self.flags >= AVX512 else "AVX2,STRICT"

    @property
    def bfloat16(self) -> str:
        """The instructions that multiply bfloat16, e.g. "amx_bf16"; "" when there are none."""
        return next((name for name in sorted(BFLOAT16) if name in self.flags), "")


@cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """This machine's processor."""
    said = cpuinfo.read_text("utf-8", "replace") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", said, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", said, re.MULTILINE)
    return Processor(name[1].strip() if name else platform.machine(), frozenset(flags[1].split() if flags else ()))
