"""Log-probabilities of several answers to each prompt. Each prompt is read once.

The two answers of a probe, or the seven options of a question, share one prompt. The prompt's keys and values are
computed once, and each answer continues from them. The prefix that all prompts share is computed once per batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from steer_heal.model.batching import ROUND, Padded, batches, filled, left_padded, rounded, shared_left_padded
from steer_heal.model.forward import prefix
from steer_heal.model.likelihood import log_probs
from steer_heal.model.lm import LM
from steer_heal.model.steering import Doses, Steering, steering

ANSWER_ROUND = 4  # instead of ROUND: most answers are one or two words

# What is kept of the log-probabilities [n, v]: of these rows and these tokens, one value or more for each.
Kept = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_tokens(log_p: Float[Tensor, "n v"], rows: Int[Tensor, " m"], tokens: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """The tokens' log-probabilities."""
    return log_p[rows, tokens]


def of_tokens_and_best(
    log_p: Float[Tensor, "n v"], rows: Int[Tensor, " m"], tokens: Int[Tensor, " m"]
) -> Float[Tensor, "m 2"]:
    """The tokens' log-probabilities, and those of the likeliest tokens in their places."""
    return torch.stack([log_p[rows, tokens], log_p.amax(-1)[rows]], dim=-1)


def choice_log_probs(
    lm: LM,
    prompts: list[list[int]],
    choices: list[list[list[int]]],
    steering_: Steering | None = None,
    on_prompts: Callable[[int], None] = lambda prompts: None,
    keep: Kept = of_tokens,
) -> list[list[Float[Tensor, "n ..."]]]:
    """Log-probability in nats of each token of each answer: result[i][j] belongs to `choices[i][j]` after `prompts[i]`.

    Args:
        prompts: token ids up to the assistant tag.
        choices: token ids of each prompt's answers, at least one token each.
        steering_: a vector with one dose per prompt.
        keep: what is returned for each token; `of_tokens_and_best` adds the likeliest token's log-probability.
    """
    out: list[list[Tensor] | None] = [None] * len(prompts)
    with torch.no_grad(), steering(lm, steering_) as dial:
        shared = shared_left_padded(lm, prompts)
        widths = [rounded(len(prompt) - shared) for prompt in prompts]
        for chunk in batches(widths, lm.read_rows, steering_):
            batch = [prompts[i] for i in chunk]
            padded = left_padded(lm, batch, shared, widths[chunk[0]])
            doses = Doses.of_batch(lm, dial, steering_, chunk)
            scored = _score(lm, batch, padded, [choices[i] for i in chunk], doses, keep)
            for i, log_probs in zip(chunk, scored, strict=True):
                out[i] = log_probs
            on_prompts(len(chunk))
    return out


class _Read(NamedTuple):
    """A batch of prompts after its forward pass."""

    cache: Cache
    mask: Int[Tensor, "b s"]
    last: Int[Tensor, " b"]
    """position of the last token"""
    doses: Doses
    keep: Kept


def _score(lm: LM, prompts: list, padded: Padded, choices: list, doses: Doses, keep: Kept) -> list[list[Tensor]]:
    answers = [(row, answer) for row, options in enumerate(choices) for answer in options]
    if not answers:  # a broken model may have written nothing
        return [[] for _ in prompts]
    shared, ids, mask, position = padded
    cache = DynamicCache()
    if shared:
        cache = prefix(lm, prompts[0][:shared], doses)
        if doses.dose is None:
            cache.batch_repeat_interleave(len(prompts))
    doses.set(mask[:, shared:].bool())
    hidden = lm.decoder(
        input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, -1]
    first = lm.head(hidden[filled(range(len(prompts)))])[: len(prompts)].log_softmax(-1)
    read = _Read(cache, mask, position[:, -1], doses, keep)

    begun = torch.tensor([(row, answer[0]) for row, answer in answers], device=lm.device)
    kept = list(keep(first, begun[:, 0], begun[:, 1]).split(1))
    by_width: dict[int, list[int]] = {}
    for i, (_, answer) in enumerate(answers):
        if len(answer) > 1:
            by_width.setdefault(rounded(len(answer) - 1, ANSWER_ROUND), []).append(i)
    for width, alike in sorted(by_width.items()):
        at_once = lm.read_rows * max(1, ROUND // width)
        for start in range(0, len(alike), at_once):
            part = alike[start : start + at_once]
            rest = _rest(lm, read, [answers[i] for i in part], width)
            for i, more in zip(part, rest, strict=True):
                kept[i] = torch.cat([kept[i], more])
    scored: list[list[Tensor]] = [[] for _ in prompts]
    for (row, _), values in zip(answers, kept, strict=True):
        scored[row].append(values.cpu())
    return scored


def _rest(lm: LM, read: _Read, answers: list[tuple[int, list[int]]], width: int) -> list[Tensor]:
    """Log-probabilities of the second and later tokens of each answer, continued from its row's keys and values.

    `answers` holds (row, answer) pairs. Each is padded to `width` tokens. Copies of the first pair fill the batch until
    rows x width is a multiple of ROUND, see `batching.rounded`.
    """
    lengths = [len(answer) - 1 for _, answer in answers]
    answers = filled(answers, ROUND // math.gcd(ROUND, width))
    rows = torch.tensor([row for row, _ in answers], device=lm.device)
    # Attention is causal: no position that is read sees the padding on the right.
    ids = torch.tensor([a[:-1] + a[-1:] * (width - len(a) + 1) for _, a in answers], device=lm.device)
    went_on = DynamicCache()
    for index, layer in enumerate(read.cache.layers):
        went_on.update(layer.keys[rows], layer.values[rows], index)
    read.doses.of(rows).set()
    hidden = lm.decoder(
        input_ids=ids,
        attention_mask=torch.cat([read.mask[rows], read.mask.new_ones(len(rows), width)], dim=1),
        position_ids=read.last[rows, None] + 1 + torch.arange(width, device=lm.device),
        past_key_values=went_on,
        use_cache=True,
    ).last_hidden_state[: len(lengths)]
    states = torch.cat([h[:n] for h, n in zip(hidden, lengths, strict=True)])
    targets = torch.tensor([token for _, a in answers[: len(lengths)] for token in a[1:]], device=lm.device)
    parts = (
        read.keep(log_p, torch.arange(len(log_p), device=lm.device), targets[at])
        for at, (log_p,) in log_probs(lm.head, states)
    )
    return list(torch.cat(list(parts)).split(lengths))
