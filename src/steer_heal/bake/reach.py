"""What a LoRA reaches: the matrices of the blocks that it adapts, and their share of the blocks' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

ROUTERS = ("gate", "router")  # choose the expert of a token; a small change there changes the whole output
# In a model that keeps its experts as one parameter, peft takes these names for the experts, also where a block has
# plain layers of that name.
EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
LEAST_SHARE = 0.01  # of the weights; what is smaller is not named


@dataclass(frozen=True)
class Reach:
    """What is trained in some blocks."""

    targets: tuple[str, ...]
    """names of the matrices, as in an adapter's `target_modules`"""
    share: float
    """their share of the blocks' weights, without norms and biases"""
    left_out: tuple[str, ...]
    """names of other weights with at least LEAST_SHARE"""

    @property
    def described(self) -> str:
        rest = f"; {', '.join(self.left_out)} stay as they are" if self.left_out else ""
        return f"{', '.join(self.targets)}: {self.share:.0%} of the weights there{rest}"


def reach(blocks: nn.ModuleList, which: Sequence[int]) -> Reach:
    """What a LoRA on some of a model's blocks trains: every linear layer but a router. They hold no adapter yet.

    A mixture of experts that keeps them as one parameter is left out; so are convolutions.
    """
    adapted: dict[str, int] = {}
    other: dict[str, int] = {}
    one_parameter = any(parameter.ndim == 3 for parameter in blocks.parameters())
    not_trained = (*ROUTERS, *EXPERTS) if one_parameter else ROUTERS
    for index in which:
        for path, module in blocks[index].named_modules():
            name = path.rpartition(".")[2]
            if isinstance(module, nn.Linear):
                counted = other if name in not_trained else adapted
                weights = module.in_features * module.out_features  # a 4-bit weight is stored packed
                counted[name] = counted.get(name, 0) + weights
            else:
                for part, parameter in module.named_parameters(recurse=False):
                    if parameter.ndim > 1:
                        label = ".".join((name, part)) if name else part
                        other[label] = other.get(label, 0) + parameter.numel()
    total = sum(adapted.values()) + sum(other.values())
    left_out = tuple(name for name, weights in other.items() if weights >= LEAST_SHARE * total)
    return Reach(tuple(adapted), sum(adapted.values()) / total, left_out)
