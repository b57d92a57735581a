"""Batched decoding: left-padded prompts, one dose per row, sampling noise that belongs to the row.

Decoding takes much of a run's time, so this is a bare loop over the decoder with a preallocated key/value cache. The
head sees one position per row, a partial top-k sort replaces a full sort, and rows that have ended leave the batch.

The noise is counter-based: a token depends on its logits and on a hash of (key, row, step), never on the other rows.
So a completion is the same in every batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from steer_heal.model.batching import Padded, batches, filled, left_padded, rounded, shared_left_padded
from steer_heal.model.forward import prefix
from steer_heal.model.lm import LM
from steer_heal.model.memory import free_main_memory
from steer_heal.model.packing import packed
from steer_heal.model.steering import UNSTEERED, Doses, Steering, steering

COMPACT_SHARE = 0.8  # ended rows leave the batch when fewer than this share of it still writes


MEMORY_SHARE = 0.5  # share of the free memory for the rows; the rest is for temporary tensors of a step
MOST_ROWS = {"cpu": 96, "cuda": 512}  # a larger batch is not faster


class Decoded(NamedTuple):
    """Token ids. When the model ended by itself within the limit, the last one is the end token."""

    ids: list[int]
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. `key` names the random stream, e.g. (seed, round, stage). None instead: greedy."""

    key: tuple
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95


class _Buffer(DynamicLayer):
    """A cache layer with preallocated tensors: concatenating at every step would copy the whole cache."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        b, heads, _, width = key_states.shape
        self.key_room = key_states.new_empty(b, heads, self.capacity, width)
        self.value_room = value_states.new_empty(b, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        self.key_room[:, :, self.filled : end] = key_states
        self.value_room[:, :, self.filled : end] = value_states
        self.filled = end
        self.keys, self.values = self.key_room[:, :, :end], self.value_room[:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.filled

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:  # some blocks use the keys and values of another
            self.key_room, self.value_room = self.key_room[indices], self.value_room[indices]


def decode(
    lm: LM,
    prompts: list[list[int]],
    max_new_tokens: int,
    steering_: Steering | None = None,
    sampling: Sampling | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[Decoded]:
    """Complete every prompt; greedy without `sampling`.

    Args:
        prompts: token ids, of any lengths.
        steering_: vector and one dose per prompt.
        on_batch: called with the number of rows just finished, for progress.
    """
    out: list[Decoded | None] = [None] * len(prompts)
    shared = shared_left_padded(lm, prompts)
    width = rounded(max(map(len, prompts)) - shared)  # one for all batches, so that many rows are decoded together
    with torch.no_grad(), steering(lm, steering_) as dial, packed(lm, len(prompts) * max_new_tokens) as lm:
        for chunk in batches([width] * len(prompts), lm.decode_rows, steering_):
            padded = left_padded(lm, filled([prompts[i] for i in chunk]), shared, width)
            batch = Batch(torch.tensor(chunk), prompts[0][:shared], padded, Doses.of_batch(lm, dial, steering_, chunk))
            for i, completion in zip(chunk, decode_batch(lm, batch, max_new_tokens, sampling), strict=True):
                out[i] = completion
            on_batch(len(chunk))
    return out


def rows_that_fit(lm: LM, prompt_tokens: int, max_new_tokens: int) -> int:
    """Number of rows to decode together: a share of the free memory divided by the memory of a row at full length.

    A row takes the keys and values of every block, the activations of its prompt's forward pass, and three copies of
    its logits.
    """
    text = lm.model.config.get_text_config()
    weight = lm.head.weight
    with torch.no_grad():
        token = prefix(lm, [0], UNSTEERED)  # families differ in what they keep of a token
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in token.layers) * (prompt_tokens + max_new_tokens)
    inner = getattr(text, "intermediate_size", 4 * text.hidden_size)
    reading = prompt_tokens * (4 * text.hidden_size + 3 * inner) * weight.element_size()
    row_bytes = cache + reading + 3 * 4 * weight.shape[0]
    free = free_memory(lm.device)
    if lm.device.type == "cpu":
        free -= sum(p.numel() * p.element_size() for p in lm.decoder.parameters())  # for the packed copy
    return max(1, min(MOST_ROWS[lm.device.type], int(MEMORY_SHARE * free / row_bytes)))


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_main_memory()


class Batch(NamedTuple):
    """Prompts that are decoded together."""

    rows: Int[Tensor, " b"]
    """their indices among all prompts; the sampling noise depends on them"""
    beginning: list[int]
    """tokens that all prompts of the call share at their beginning"""
    padded: Padded
    """the prompts, and copies of the first"""
    doses: Doses


def decode_batch(lm: LM, batch: Batch, max_new_tokens: int, sampling: Sampling | None) -> list[Decoded]:
    shared, ids, mask, position = batch.padded
    rows = batch.rows
    slots = torch.tensor([*range(len(rows)), *[0] * (len(ids) - len(rows))])  # prompt of each row, as rows leave
    doses = batch.doses.of(slots)
    cache = Cache(layers=[_Buffer(mask.shape[1] + max_new_tokens) for _ in lm.blocks])
    if shared:
        start = prefix(lm, batch.beginning, doses)
        for layer, begun in zip(cache.layers, start.layers, strict=False):  # those that have keys of their own
            layer.update(*(x.expand(len(slots), -1, -1, -1) for x in (begun.keys, begun.values)))
    written: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)

    for step in range(max_new_tokens):
        doses.set(mask[:, shared:].bool() if step == 0 else None)
        hidden = lm.decoder(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state
        token = choose(lm.head(hidden[:, -1]), rows[slots], step, sampling)
        for slot, t in dict(zip(slots.tolist(), token.tolist(), strict=True)).items():
            if not ended[slot]:
                written[slot].append(t)
                ended[slot] = t in lm.end_tokens
        writing = torch.tensor([not ended[slot] for slot in slots.tolist()])
        if not writing.any():
            break
        ids, position = token[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if writing.float().mean() < COMPACT_SHARE:
            stay = torch.tensor(filled(writing.nonzero()[:, 0].tolist()))
            slots = slots[stay]
            stay = stay.to(lm.device)
            ids, mask, position = ids[stay], mask[stay], position[stay]
            doses = doses.of(stay)
            cache.batch_select_indices(stay)
    return [Decoded(w, e) for w, e in zip(written, ended, strict=True)]


def choose(
    logits: Float[Tensor, "b v"], rows: Int[Tensor, " b"], step: int, sampling: Sampling | None
) -> Int[Tensor, " b"]:
    """Next token of each row: the largest logit, or one draw from the top-k, top-p truncated softmax.

    The draw inverts the cumulative distribution at one uniform number per (key, row, step).
    """
    if sampling is None:
        return logits.argmax(-1)
    top, index = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    probability = torch.softmax(top.double() / sampling.temperature, dim=-1)
    before = probability.cumsum(-1) - probability
    probability = torch.where(before < sampling.top_p, probability, 0.0)
    cumulative = probability.cumsum(-1)
    uniform = torch.from_numpy(uniforms(sampling.key, rows.numpy(), step)).to(logits.device)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    return index.gather(1, drawn.clamp(max=index.shape[1] - 1))[:, 0]


def uniforms(key: tuple, rows: np.ndarray, step: int) -> np.ndarray:
    """One number in [0, 1) per row: splitmix64 over a hash of the key, the row and the step."""
    base = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        x = np.uint64(base) ^ _mix(rows.astype(np.uint64) + (np.uint64(step) << np.uint64(32)))
        return (_mix(x) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
