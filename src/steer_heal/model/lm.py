"""A causal language model and its tokenizer.

Loading is in `loading`. Everything above sees a model through five things: prompt tokens (`LM.prompt`), decoder blocks
(`LM.blocks`), the hidden states before the head (`forward`), the head itself (`LM.head`), and a context that
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

from steer_heal.config import UserError


class Row(NamedTuple):
    """One prompt and one completion, tokenised apart and joined, so that no merge crosses the boundary."""

    prompt: list[int]
    completion: list[int]


class Head(NamedTuple):
    """The output head: logits = cap(h @ weight.T), cap(z) = softcap * tanh(z / softcap) when softcap is set.

    `product` takes the place of the plain h @ weight.T where the weight is packed, see `packing`.
    """

    weight: Float[Tensor, "v d"]
    softcap: float | None
    product: Callable[[Tensor], Tensor] | None = None

    def __call__(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        plain = self.product is None
        logits = (states @ self.weight.T.to(states.dtype) if plain else self.product(states)).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class LM:
    """A loaded model. `model` is the causal LM itself; PEFT adapters are injected into it by `bake`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    end_tokens: frozenset[int]
    head_product: Callable[[Tensor], Tensor] | None = None
    """see `Head`"""
    read_rows: int = 32
    """sequences in a forward pass that only reads; changes no result"""
    decode_rows: int = 32
    """completions decoded together; changes no result"""

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def decoder(self) -> nn.Module:
        """The text tower: token ids in, hidden states after the final norm out."""
        return self.model.get_decoder()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def head(self) -> Head:
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return Head(self.model.get_output_embeddings().weight, softcap, self.head_product)

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

    def prompt(self, user: str, system: str | None = None) -> list[int]:
        """Token ids of a one-turn chat up to and including the assistant tag.

        A template that knows no system role gets the system text at the head of the user turn.
        """
        messages = [{"role": "user", "content": user}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = self._render(messages)
        except Exception as error:  # jinja templates refuse a role by raising whatever they like
            if system is None:
                raise UserError(f"the chat template of {self.name!r} cannot render a user turn: {error}") from error
            text = self._render([{"role": "user", "content": f"{system}\n\n{user}"}])
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def answer(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
