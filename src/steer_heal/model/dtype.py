"""The type of a model's weights: bfloat16 where the hardware multiplies it natively, else float32."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from steer_heal.config import ModelConfig
from steer_heal.model.lm import LM
from steer_heal.processor import Processor, processor

TRIED = (256, 1024, 1024)  # rows, columns and sums of the product that is timed, a few milliseconds
TURNS = 7
FASTER = 1.5  # times; below it bfloat16 is not worth its coarser rounding


class Chosen(NamedTuple):
    dtype: str
    why: str


def chosen(config: ModelConfig, device: str, found: Processor | None = None) -> Chosen:
    """The type that `model.dtype` asks for; with `auto` the one that suits the device, and why."""
    found = found or processor()
    if config.dtype != "auto":
        return Chosen(config.dtype, "as asked for")
    if config.quant != "none":
        return Chosen("bfloat16", "4-bit weights are multiplied in it")
    if device != "cpu":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Chosen("bfloat16", "this GPU multiplies it")
        return Chosen("float32", "this GPU does not multiply bfloat16")
    if not found.bfloat16:
        return Chosen("float32", "this processor has no instruction that multiplies bfloat16")
    if speed_up() < FASTER:
        return Chosen("float32", f"this processor's {found.bfloat16} was hardly faster in a product tried at the start")
    return Chosen("bfloat16", f"this processor multiplies it with {found.bfloat16}")


def dtype_of(lm: LM) -> str:
    """The type of the weights that are not quantised, e.g. "bfloat16"."""
    return str(lm.head.weight.dtype).removeprefix("torch.")


def speed_up() -> float:
    """How many times as fast as float32 a matrix product in bfloat16 is on this CPU; the fastest of some turns each.

    On one thread, and the two in turn: on a busy machine threads wait for one another, which is no property of a type.
    """
    rows, columns, sums = TRIED
    types = (torch.float32, torch.bfloat16)
    factors = [(torch.ones(rows, sums, dtype=one), torch.ones(columns, sums, dtype=one)) for one in types]
    took, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(TURNS):
            for a, b in factors:
                began = time.perf_counter()
                torch.nn.functional.linear(a, b)
                took.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return min(took[::2]) / min(took[1::2])
