"""Rows of different lengths in one call: grouping into batches, padding, and the shared prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from steer_heal.model.lm import LM
from steer_heal.model.steering import ForeignVector, Steering

ROUND = 16  # see `rounded`


def rounded(size: int, to: int = ROUND) -> int:
    """Round `size` up to a multiple of `to`.

    On a CPU a row's result must not depend on the other rows of the batch, down to the bit. But attention sums in
    another order when padding shifts a row against the vector registers, and so does a matrix product with only one to
    three rows. So the widths of batches, the lengths of shared prefixes and the numbers of decoded rows are multiples
    of ROUND.
    """
    return -(-size // to) * to


def filled(rows: Sequence, to: int = ROUND) -> list:
    """Append copies of the first row until the number of rows is a multiple of `to`, see `rounded`."""
    return [*rows, *[rows[0]] * (rounded(len(rows), to) - len(rows))]


def batches(widths: list[int], batch_size: int, steering_: Steering | None = None) -> Iterator[list[int]]:
    """Yield the row numbers of each batch. Its rows have one width and, under a foreign vector, one dose."""
    groups: dict[tuple[int, float], list[int]] = {}
    alike = steering_ is None or not isinstance(steering_.vector, ForeignVector)
    for i, width in enumerate(widths):
        groups.setdefault((width, 0.0 if alike else steering_.dose[i].item()), []).append(i)
    for _, rows in sorted(groups.items()):
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def shared_left_padded(lm: LM, prompts: list[list[int]]) -> int:
    """`shared_prefix` for left-padded rows; 0 for a model with sliding windows."""
    # A sliding window counts cache columns: padding after the prefix would push the prefix out of it.
    return 0 if lm.windowed else shared_prefix(prompts)


def shared_prefix(prompts: list[list[int]], multiple: int = ROUND) -> int:
    """Length of the prefix that all prompts share, rounded down to a multiple of `multiple`.

    Each prompt keeps at least one token after it. A single prompt has no shared prefix: 0.
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    length = 0
    while length < min(map(len, prompts)) - 1 and first[length] == last[length]:
        length += 1
    return length // multiple * multiple


class Padded(NamedTuple):
    """Prompts of different lengths, padded on the left so that all end in the last column."""

    shared: int
    """length of the shared prefix; it is not in `ids`, `prefix` computes its keys and values"""
    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b s"]
    """1 for real tokens, the shared ones included"""
    position: Int[Tensor, "b t"]


def left_padded(lm: LM, prompts: list[list[int]], shared: int, width: int) -> Padded:
    """Pad prompts that share their first `shared` tokens: the rest of each becomes `width` tokens."""
    own = [p[shared:] for p in prompts]
    # Pad with a real token: on a zero embedding another library's hooks would divide by zero.
    ids = torch.tensor([p[:1] * (width - len(p)) + p for p in own], device=lm.device)
    mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * len(p) for p in own], device=lm.device)
    return Padded(shared, ids, mask, mask.cumsum(1).sub(1).clamp(min=0)[:, shared:])
