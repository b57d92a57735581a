"""Packed weights for decoding and evaluation on a CPU.

The plain product reads a matrix in an order that suits large batches. oneDNN's blocked layout is made once and used by
every forward pass without gradient. Decoding gains most, because a step multiplies every matrix by few rows (speeds in
docs/results.md). The layout is a second copy of the weights, which exists until the `with` block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from steer_heal.model.lm import LM

PACK_ROWS = 64  # rows of the batch that oneDNN optimises the layout for
PACK_FROM_TOKENS = 1024  # packing takes about as long as it saves over this many tokens


@contextmanager
def packed(lm: LM, tokens: int = PACK_FROM_TOKENS) -> Iterator[LM]:
    """Yield the model to use inside the `with` block; on a CPU its float32 matrices are packed there.

    Packing depends only on the model and on `tokens`, the number of tokens to write (the default packs, for
    evaluations). It never depends on the batch size or the state of the machine, so a resumed run sums in the same
    order. Quantised and half-precision weights, and GPUs, keep their own kernels.
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
