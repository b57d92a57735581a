"""NLL, entropy and KL divergence of tokens, in nats. Logits are computed for a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer_heal.model.batching import filled
from steer_heal.model.forward import states
from steer_heal.model.lm import LM, Head, Row
from steer_heal.model.steering import Steering

HEAD_CHUNK = 256  # positions whose logits are held at once


@torch.no_grad()
def log_probs(head: Head, *models: Float[Tensor, "_ d"]) -> Iterator[tuple[slice, list[Float[Tensor, "_ v"]]]]:
    """Log-probabilities of every token of the vocabulary, HEAD_CHUNK positions at a time.

    Each of `models` holds one model's hidden states at the same positions. Yields a slice of positions and one tensor
    per model.
    """
    for start in range(0, len(models[0]), HEAD_CHUNK):
        at = slice(start, min(start + HEAD_CHUNK, len(models[0])))
        rows = filled(range(start, at.stop))
        yield at, [head(states[rows])[: at.stop - start].log_softmax(-1) for states in models]


def row_surprise(lm: LM, rows: list[Row]) -> list[tuple[Float[Tensor, " n"], Float[Tensor, " n"]]]:
    """NLL and predictive entropy in nats of every completion token of every row, on the CPU."""
    hidden = torch.cat(states(lm, rows))
    targets = torch.tensor([t for row in rows for t in row.completion], device=lm.device)
    nll, entropy = [], []
    for at, (log_p,) in log_probs(lm.head, hidden):
        nll.append(_of_targets(log_p, targets[at]))
        entropy.append(-torch.linalg.vecdot(log_p.exp(), log_p))
    lengths = [len(row.completion) for row in rows]
    return list(zip(*(torch.cat(nats).cpu().split(lengths) for nats in (nll, entropy)), strict=True))


def row_nll(lm: LM, rows: list[Row], steering_: Steering | None = None) -> list[Float[Tensor, " n"]]:
    """NLL in nats of every completion token of every row under the current view and `steering_`."""
    hidden = torch.cat(states(lm, rows, steering_))
    targets = torch.tensor([t for row in rows for t in row.completion], device=lm.device)
    return list(token_nll(lm, hidden, targets).cpu().split([len(row.completion) for row in rows]))


def ended_log_probs(lm: LM, rows: list[Row], steering_: Steering | None = None) -> list[Float[Tensor, " _"]]:
    """Log-probability in nats of every completion token of every row and, as the last value, of the end after it.

    The completions come without an end token. Any of the model's end tokens ends an answer: their probabilities add up.
    """
    ends = sorted(lm.end_tokens)
    hidden = states(lm, [Row(row.prompt, [*row.completion, ends[0]]) for row in rows], steering_)
    targets = torch.tensor([t for row in rows for t in row.completion], device=lm.device)
    said = -token_nll(lm, torch.cat([h[:-1] for h in hidden]), targets).cpu()
    last = torch.stack([h[-1] for h in hidden])
    ended = torch.cat([log_p[:, ends].logsumexp(-1).cpu() for _, (log_p,) in log_probs(lm.head, last)])
    tokens = said.split([len(row.completion) for row in rows])
    return [torch.cat([answer, end[None]]) for answer, end in zip(tokens, ended, strict=True)]


def token_nll(lm: LM, states: Float[Tensor, "n d"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """NLL in nats of each target token, predicted from the hidden state of the same index."""
    return torch.cat([_of_targets(log_p, targets[at]) for at, (log_p,) in log_probs(lm.head, states)])


def _of_targets(log_p: Float[Tensor, "n v"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return -log_p.gather(1, targets[:, None])[:, 0]


def token_kl(
    head: Head, steered: list[Float[Tensor, "_ d"]], plain: list[Float[Tensor, "_ d"]]
) -> list[Float[Tensor, " _"]]:
    """KL(steered || plain) in nats at every position, from hidden states."""
    chunks = log_probs(head, torch.cat(steered), torch.cat(plain))
    kl = [torch.linalg.vecdot(log_p.exp(), log_p - log_q) for _, (log_p, log_q) in chunks]
    return list(torch.cat(kl).cpu().split([len(states) for states in steered]))
