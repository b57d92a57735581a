"""Rows of different lengths in one call: which go together, how they are padded, and the prefix that they share."""

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
    """`size` or the next multiple.

    On a CPU a row's sums must not depend on what else is in the batch, down to the bit. Attention adds up otherwise
    when padding shifts a row against the vector registers, and the matrix product for one to three rows alone. So the
    widths of batches, what their prompts share and the rows that decode are multiples of ROUND.
    """
    return -(-size // to) * to


def filled(rows: Sequence, to: int = ROUND) -> list:
    """The rows and as many copies of the first as make them a multiple, see `rounded`."""
    return [*rows, *[rows[0]] * (rounded(len(rows), to) - len(rows))]


def batches(widths: list[int], batch_size: int, steering_: Steering | None = None) -> Iterator[list[int]]:
    """Row numbers batch by batch: rows of a batch are equally wide, and have one dose under a foreign vector."""
    groups: dict[tuple[int, float], list[int]] = {}
    alike = steering_ is None or not isinstance(steering_.vector, ForeignVector)
    for i, width in enumerate(widths):
        groups.setdefault((width, 0.0 if alike else steering_.dose[i].item()), []).append(i)
    for _, rows in sorted(groups.items()):
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def shared_left_padded(lm: LM, prompts: list[list[int]]) -> int:
    """`shared_prefix` where padding on the left comes between it and the rest."""
    # A window is counted in cache columns: the padding would push the prefix out.
    return 0 if lm.windowed else shared_prefix(prompts)


def shared_prefix(prompts: list[list[int]], multiple: int = ROUND) -> int:
    """Length of what all prompts begin with, leaving each at least one token of its own, down to a `multiple`."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    length = 0
    while length < min(map(len, prompts)) - 1 and first[length] == last[length]:
        length += 1
    return length // multiple * multiple


class Padded(NamedTuple):
    """Prompts of different lengths in one call, padded on the left, so that all end in the last column."""

    shared: int
    """tokens that all begin with; they are not in `ids`, their keys and values come from `prefix`"""
    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b s"]
    """1 for real tokens, the shared ones included"""
    position: Int[Tensor, "b t"]


def left_padded(lm: LM, prompts: list[list[int]], shared: int, width: int) -> Padded:
    """Prompts that have the first `shared` tokens in common, each with `width` tokens of its own and padding."""
    own = [p[shared:] for p in prompts]
    # Padding is a real token: a zero embedding would divide another library's hooks by zero.
    ids = torch.tensor([p[:1] * (width - len(p)) + p for p in own], device=lm.device)
    mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * len(p) for p in own], device=lm.device)
    return Padded(shared, ids, mask, mask.cumsum(1).sub(1).clamp(min=0)[:, shared:])
