"""What the model makes of tokens, in nats: NLL, entropy and KL, with the logits of a chunk of positions at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer_heal.model.batching import filled
from steer_heal.model.forward import states
from steer_heal.model.lm import LM, Head, Row
from steer_heal.model.steering import Steering

HEAD_CHUNK = 256  # positions whose logits are held at once


def row_surprise(lm: LM, rows: list[Row], batch_size: int) -> list[tuple[Float[Tensor, "n"], Float[Tensor, "n"]]]:
    """NLL and predictive entropy in nats of every completion token of every row, on the CPU."""
    hidden = torch.cat(states(lm, rows, batch_size))
    targets = torch.tensor([t for row in rows for t in row.completion], device=lm.device)
    nll, entropy = [], []
    with torch.no_grad():
        for h, t in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
            log_p = lm.head(h).log_softmax(-1)
            nll.append(-log_p.gather(1, t[:, None])[:, 0])
            entropy.append(-torch.linalg.vecdot(log_p.exp(), log_p))
    lengths = [len(row.completion) for row in rows]
    return list(zip(*(torch.cat(nats).cpu().split(lengths) for nats in (nll, entropy)), strict=True))


def row_nll(lm: LM, rows: list[Row], batch_size: int, steering_: Steering | None = None) -> list[Float[Tensor, "n"]]:
    """NLL in nats of every completion token of every row under the model as it stands (view, steering)."""
    hidden = torch.cat(states(lm, rows, batch_size, steering_))
    targets = torch.tensor([t for row in rows for t in row.completion], device=lm.device)
    return list(token_nll(lm, hidden, targets).cpu().split([len(row.completion) for row in rows]))


def token_nll(lm: LM, states: Float[Tensor, "n d"], targets: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """NLL in nats of each target at its state, HEAD_CHUNK rows of logits at a time."""
    with torch.no_grad():
        parts = [
            torch.nn.functional.cross_entropy(lm.head(h[filled(range(len(h)))])[: len(h)], t, reduction="none")
            for h, t in zip(states.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
        ]
    return torch.cat(parts)


def token_kl(
    head: Head, steered: list[Float[Tensor, "_ d"]], plain: list[Float[Tensor, "_ d"]]
) -> list[Float[Tensor, "_"]]:
    """KL(steered || plain) in nats at every position, from hidden states, a chunk of logits at a time."""
    out = []
    with torch.no_grad():
        pairs = zip(torch.cat(steered).split(HEAD_CHUNK), torch.cat(plain).split(HEAD_CHUNK), strict=True)
        for a, b in pairs:
            log_p, log_q = head(a).log_softmax(-1), head(b).log_softmax(-1)
            out.append(torch.linalg.vecdot(log_p.exp(), log_p - log_q))
    return list(torch.cat(out).cpu().split([len(states) for states in steered]))
