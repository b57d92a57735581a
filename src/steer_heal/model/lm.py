"""A causal language model and its tokenizer.

Loading is in `loading`. The rest of the package uses a model through five things: prompt tokens (`LM.prompt`), decoder
blocks (`LM.blocks`), the hidden states before the head (`forward`), the head itself (`LM.head`), and a context that
adds a vector to the residual stream (`steering`). No logits tensor of shape [tokens, vocab] is made here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer_heal.data.frames import USUAL, Frame
from steer_heal.model.template import Template


class Row(NamedTuple):
    """Token ids of one prompt and one completion. They are joined as tokens, so no token crosses the boundary."""

    prompt: list[int]
    completion: list[int]


HEAD_BLOCK = 512  # rows of the head per product on a CPU; one product of all takes a third longer


class AfterHead(NamedTuple):
    """What a model does to the product of its head: see `Head`. `agreement.after_head` measures it."""

    softcap: float | None = None
    scale: float = 1.0
    bias: Float[Tensor, " v"] | None = None


PLAIN = AfterHead()


class Head(NamedTuple):
    """The output head: logits = cap(scale * h @ weight.T + bias), cap(z) = softcap * tanh(z / softcap) if it is set.

    `product` replaces h @ weight.T where the weight is packed, see `packing`.
    """

    weight: Float[Tensor, "v d"]
    softcap: float | None
    product: Callable[[Tensor], Tensor] | None = None
    scale: float = 1.0
    bias: Float[Tensor, " v"] | None = None

    def __call__(self, states: Float[Tensor, "n d"], out: Float[Tensor, "n v"] | None = None) -> Float[Tensor, "n v"]:
        """Logits in float32, or in float64 for float64 states. No gradient: `heal.barrier` computes its own.

        With `out` the plain product writes them there.
        """
        packed = self.product is not None and out is None
        logits = self.product(states) if packed else wide_product(states, self.weight, out)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.bias is not None:
            logits.add_(self.bias)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


def wide_product(
    states: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], out: Float[Tensor, "n v"] | None = None
) -> Float[Tensor, "n v"]:
    """states @ weight.T in float32 (float64 for float64 states), not rounded back to a narrower type.

    Rounding to bf16 changes a logit of 20 by up to 0.06, which changes the softmax. A GPU multiplies bf16 matrices into
    float32. No CPU kernel of torch does, so on a CPU the head is converted in blocks that fit a cache. On a CPU without
    bf16 instructions that takes at most a third of the time of the rounded product (journal, 2026-11-26).
    """
    weight = weight.detach()
    if out is None:
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        out = torch.empty(len(states), len(weight), dtype=wide, device=states.device)
    if states.is_cuda and out.dtype == torch.float32 != states.dtype == weight.dtype:
        return torch.mm(states, weight.T, out_dtype=out.dtype, out=out)
    states = states.to(out.dtype)
    if states.is_cuda and weight.dtype == out.dtype:
        return torch.mm(states, weight.T, out=out)
    for start in range(0, len(weight), HEAD_BLOCK):
        part = slice(start, start + HEAD_BLOCK)
        torch.mm(states, weight[part].to(out.dtype).T, out=out[:, part])
    return out


@dataclass(frozen=True)
class LM:
    """A loaded model. `model` is the causal LM itself; PEFT adapters are injected into it by `bake`."""

    model: PreTrainedModel
    template: Template
    name: str
    end_tokens: frozenset[int]
    why_dtype: str = ""
    """why the weights have their type, see `dtype.chosen`"""
    after_head: AfterHead = PLAIN
    head_product: Callable[[Tensor], Tensor] | None = None
    """`Head.product`"""
    read_rows: int = 32
    """sequences in a forward pass without gradient; does not change results"""
    decode_rows: int = 32
    """completions decoded together; does not change results"""

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.template.tokenizer

    @property
    def fused_attention(self) -> bool:
        """Whether torch's fused function computes attention."""
        return self.decoder.config._attn_implementation != "eager"

    @property
    def decoder(self) -> nn.Module:
        """The text tower: token ids in, hidden states after the final norm out."""
        return self.model.get_decoder()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def head(self) -> Head:
        softcap, scale, bias = self.after_head
        return Head(self.model.get_output_embeddings().weight, softcap, self.head_product, scale, bias)

    def band(self, share: tuple[float, float]) -> tuple[int, ...]:
        """Block indices whose relative depth lies in `share`, e.g. (0.45, 0.55) of 30 blocks -> 13, 14, 15, 16."""
        low, high = (round(edge * (len(self.blocks) - 1)) for edge in share)
        return tuple(range(low, high + 1))

    @property
    def windowed(self) -> bool:
        """Whether some block attends to a sliding window only."""
        config = self.model.config.get_text_config()
        if getattr(config, "layer_types", None) is not None:
            return "sliding_attention" in config.layer_types
        return getattr(config, "sliding_window", None) is not None

    def prompt(self, user: str, system: str | None = None, frame: Frame = USUAL) -> list[int]:
        """Token ids of a chat up to where the answer begins, or goes on if the frame begins it."""
        return self.template.prompt(user, system, frame)

    def answer(self, text: str, begun: str = "") -> list[int]:
        """Token ids of an answer as they follow a prompt, or as they follow `begun` in it."""
        return self.template.answer(text, begun)

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
