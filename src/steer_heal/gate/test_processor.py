"""The type of the weights and the mode of the matrix library follow the processor."""

import pytest
import torch

from steer_heal.config import ModelConfig
from steer_heal.model import dtype as dtype_module
from steer_heal.model.dtype import chosen, speed_up
from steer_heal.processor import Processor, processor

WIDE = "avx avx2 fma avx512f avx512cd avx512bw avx512dq avx512vl"
MACHINES = [
    ("Intel(R) Xeon(R) Platinum 8481C", f"{WIDE} avx512_bf16 amx_bf16 amx_tile", "AVX512,STRICT", "amx_bf16"),
    ("Intel(R) Xeon(R) Platinum 8275CL", WIDE, "AVX512,STRICT", ""),
    ("Intel(R) Core(TM) i7-8700", "avx avx2 fma", "AVX2,STRICT", ""),
    ("AMD EPYC 7B13", "avx avx2 fma", "AVX2,STRICT", ""),
    ("AMD EPYC 9B14", f"{WIDE} avx512_bf16", "AVX2,STRICT", "avx512_bf16"),
]


@pytest.mark.parametrize(("name", "flags", "mode", "native"), MACHINES, ids=[name for name, *_ in MACHINES])
def test_a_processor_is_known_by_its_flags(tmp_path, name, flags, mode, native):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: {name}\nflags\t\t: fpu {flags} sse2\n\n" * 2)
    found = processor(file)
    assert (found.name, found.mkl_mode, found.bfloat16) == (name, mode, native)


def test_other_systems_have_no_flags(tmp_path):
    assert processor(tmp_path / "none").mkl_mode == "AVX2,STRICT" and not processor(tmp_path / "none").bfloat16
    arm = tmp_path / "arm"
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n")
    assert processor(arm).bfloat16 == "bf16"


PLAIN, NATIVE = Processor("x", frozenset()), Processor("y", frozenset({"amx_bf16"}))
CHOICES = [
    ({}, "cpu", PLAIN, 9.0, "float32", "no instruction"),
    ({}, "cpu", NATIVE, 4.0, "bfloat16", "amx_bf16"),
    ({}, "cpu", NATIVE, 1.1, "float32", "amx_bf16 was hardly faster"),
    ({"quant": "nf4"}, "cpu", PLAIN, 1.0, "bfloat16", "4-bit"),
    ({"dtype": "bfloat16"}, "cpu", PLAIN, 1.0, "bfloat16", "as asked for"),
    ({"dtype": "float32"}, "cpu", NATIVE, 4.0, "float32", "as asked for"),
]


@pytest.mark.parametrize(("asked", "device", "found", "faster", "dtype", "why"), CHOICES)
def test_auto_takes_bfloat16_where_it_is_native_and_faster(monkeypatch, asked, device, found, faster, dtype, why):
    monkeypatch.setattr(dtype_module, "speed_up", lambda: faster)
    picked = chosen(ModelConfig(**({"quant": "none"} | asked)), device, found)
    assert picked.dtype == dtype and why in picked.why


def test_both_products_are_timed():
    threads = torch.get_num_threads()
    assert 0 < speed_up() < 1000 and torch.get_num_threads() == threads
