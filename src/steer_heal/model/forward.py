"""Hidden states of rows: before the head at the completion's positions, or after chosen blocks at the last token.

No logits are computed here: `likelihood` applies the head to a chunk of positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from steer_heal.model.batching import ROUND, batches, rounded, shared_prefix
from steer_heal.model.lm import LM, Row
from steer_heal.model.steering import UNSTEERED, Doses, Steering, steering, stream


def states(lm: LM, rows: list[Row], steering_: Steering | None = None) -> list[Float[Tensor, "n d"]]:
    """Hidden states that predict each completion token, one tensor [len(completion), d] per row, without gradient.

    Rows are batched by width. Under causal attention right padding needs no mask, so a result depends on the rest of
    its batch by float rounding at most.
    """
    out: list[Tensor | None] = [None] * len(rows)
    with torch.no_grad(), steering(lm, steering_) as dial:
        shared = shared_prefix([row.prompt for row in rows])
        widths = [rounded(len(row.prompt) + len(row.completion) - 1 - shared) for row in rows]
        for chunk in batches(widths, lm.read_rows, steering_):
            doses = Doses.of_batch(lm, dial, steering_, chunk)
            for i, hidden in zip(chunk, forward(lm, [rows[i] for i in chunk], doses, shared), strict=True):
                out[i] = hidden.clone()
    return out


def forward(
    lm: LM,
    rows: list[Row],
    doses: Doses = UNSTEERED,
    shared: int = 0,
    multiple: int = ROUND,
) -> list[Float[Tensor, "n d"]]:
    """Hidden states before the head at each row's completion positions, with gradient when it is enabled.

    The keys and values of the first `shared` tokens, which all prompts share, are computed once. The rows are padded to
    a multiple of `multiple`, see `rounded`.
    """
    cache = None
    if shared:
        start = prefix(lm, rows[0].prompt[:shared], doses)
        cache = Cache(layers=[SharedPrefix(layer) for layer in start.layers])
    sequences = [(row.prompt + row.completion[:-1])[shared:] for row in rows]
    longest = rounded(max(map(len, sequences)), multiple)
    ids = torch.tensor([s + s[-1:] * (longest - len(s)) for s in sequences], device=lm.device)
    doses.set()
    hidden = lm.decoder(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state
    return [
        h[len(row.prompt) - 1 - shared : len(row.prompt) - 1 - shared + len(row.completion)]
        for h, row in zip(hidden, rows, strict=True)
    ]


def prefix(lm: LM, ids: list[int], doses: Doses) -> Cache:
    """Keys and values of the shared prefix: [1, ...], or [b, ...] under steering, computed once per distinct dose."""
    cache, rows = DynamicCache(), 1
    if doses.dose is not None:
        different, where = doses.dose.unique(return_inverse=True)
        rows = len(different)
        doses.dial.turn(different)
    lm.decoder(input_ids=torch.tensor([ids] * rows, device=lm.device), past_key_values=cache, use_cache=True)
    if doses.dose is not None:
        cache.batch_select_indices(where)
    return cache


class SharedPrefix(DynamicLayer):
    """Cache layer for one forward pass: puts the shared prefix's keys and values before each row's own."""

    def __init__(self, prefix: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = prefix.keys, prefix.values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        return tuple(
            torch.cat([before.expand(rows, -1, -1, -1), new], dim=2)
            for before, new in ((self.keys, key_states), (self.values, value_states))
        )


@contextmanager
def first_blocks(lm: LM, count: int) -> Iterator[None]:
    """Inside the `with` block the decoder runs only its first `count` blocks."""
    whole = lm.blocks
    lm.decoder.layers = whole[:count]
    try:
        yield
    finally:
        lm.decoder.layers = whole


def last_token_states(
    lm: LM,
    prompts: list[list[int]],
    layers: tuple[int, ...],
    on_prompts: Callable[[int], None] = lambda prompts: None,
) -> Float[Tensor, "n l d"]:
    """Residual stream after each of `layers` at the last token of each prompt, float32, on the CPU."""
    return mean_states(lm, [Row(prompt[:-1], prompt[-1:]) for prompt in prompts], layers, on_prompts)


def mean_states(
    lm: LM,
    rows: list[Row],
    layers: tuple[int, ...],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Float[Tensor, "n l d"]:
    """Residual stream after each of `layers`, mean over the tokens of each completion, float32, on the CPU.

    Rows are batched by width. The forward pass stops after the last of `layers`.
    """
    out = torch.empty(len(rows), len(layers), lm.model.config.get_text_config().hidden_size)
    whole = [row.prompt + row.completion for row in rows]
    with torch.no_grad(), first_blocks(lm, layers[-1] + 1), reading(lm, layers) as seen:
        shared = min(shared_prefix(whole), min(len(row.prompt) for row in rows) // ROUND * ROUND)
        for chunk in batches([rounded(len(ids) - shared) for ids in whole], lm.read_rows):
            forward(lm, [Row(whole[i], [0]) for i in chunk], shared=shared)
            own = [slice(len(rows[i].prompt) - shared, len(whole[i]) - shared) for i in chunk]
            for index, layer in enumerate(layers):
                means = [seen[layer][place, tokens].float().mean(0) for place, tokens in enumerate(own)]
                out[chunk, index] = torch.stack(means).cpu()
            on_rows(len(chunk))
    return out


@contextmanager
def reading(lm: LM, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Yield a dict that holds, after each forward pass, the residual stream after each of `layers`."""
    seen: dict[int, Tensor] = {}

    def read(layer: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
            seen[layer] = stream(output)

        return hook

    handles = [lm.blocks[layer].register_forward_hook(read(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
