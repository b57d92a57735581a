"""Weights laid out for reading and decoding on a CPU.

The plain product re-reads a matrix in an order that suits large batches. oneDNN's blocked layout is made once and used
by every forward pass without gradient: a decoding step, which multiplies every matrix by a handful of rows, gains most
(docs/results.md has what it reaches). It holds a second copy of the weights for as long as the block lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from steer_heal.model.lm import LM

PACK_ROWS = 64  # rows that the layout is chosen for
PACK_FROM_TOKENS = 1024  # laying out the weights costs about as long as this many tokens save


@contextmanager
def packed(lm: LM, tokens: int = PACK_FROM_TOKENS) -> Iterator[LM]:
    """The model to read or decode with; inside the block the decoder's float32 matrices on a CPU are packed.

    Whether and how depends on the model and the tokens to write alone (an evaluation, which does not say, reads
    enough), never on the batch size or the state of the machine, so that a resumed run multiplies in the same order.
    Quantised and half-precision weights, and GPUs, keep their own kernels.
    """
    weight = lm.head.weight
    already = lm.head_product is not None
    if already or weight.device.type != "cpu" or weight.dtype != torch.float32 or tokens < PACK_FROM_TOKENS:
        yield lm
        return
    linear = [m for m in lm.decoder.modules() if type(m) is nn.Linear and m.weight.dtype == torch.float32]
    try:
        for module in linear:
            module.forward = _product(module.weight, module.bias)
        yield replace(lm, head_product=_product(weight, None))
    finally:
        for module in linear:
            module.__dict__.pop("forward", None)


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")
