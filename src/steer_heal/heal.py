"""One round's training: keep what the survivors agree on, hold back what is improbable under the reference.

One objective (NLL of the sampled token, or KL from the steered teacher) and one barrier, lam_r * relu(D - tau).
The reference does not change within a round, so its hidden states at the completion positions are computed once.

A step's loss is defined over all completion tokens of its effective batch (train_bs * grad_accum rows). The
aggregate of the barrier is not a sum over micro-batches, so with grad_accum > 1 a first pass without gradient reads
every position's losses, the loss of the whole batch gives each position its weight, and a second pass sends
the weights back: the same gradient in less memory.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.bake import Student
from steer_heal.barrier import aggregate, hinge, position_losses
from steer_heal.config import HealConfig, UserError
from steer_heal.lm import LM, Row, Steering, row_nll

BETAS = (0.9, 0.95)  # a round is a few hundred steps at most; 0.999 would never warm up
CLIP = 1.0


@dataclass(frozen=True)
class Example:
    """A completion with the cached hidden states at its positions. Anchor rows have no objective."""

    row: Row
    reference: Float[Tensor, "n d"] | None
    teacher: Float[Tensor, "n d"] | None
    anchor: bool = False


class NonFinite(UserError):
    """The loss of a step is not a finite number."""


def prepare(
    student: Student, rows: list[Row], steering_: Steering, config: HealConfig, batch_size: int
) -> list[Example]:
    """Training examples with the reference's and, for soft targets, the teacher's states.

    `steering_` has one dose per row; the teacher is the previous student steered with it.
    """
    lm = student.lm
    history = 1.0 if config.reference == "prev" else 0.0
    with student.view(history=history, now=0.0):
        reference = lm.states(rows, batch_size) if config.reg != "nll" else [None] * len(rows)
    with student.view(now=0.0):
        teacher = lm.states(rows, batch_size, steering_) if config.target == "soft" else [None] * len(rows)
    return [Example(*parts) for parts in zip(rows, reference, teacher, strict=True)]


def prepare_anchors(student: Student, rows: list[Row], batch_size: int) -> list[Example]:
    """Anchor examples: mundane completions with the pristine base's states. The same in every round."""
    with student.view(history=0.0, now=0.0):
        return [
            Example(row, h, None, anchor=True) for row, h in zip(rows, student.lm.states(rows, batch_size), strict=True)
        ]


def heal(
    student: Student,
    examples: list[Example],
    anchors: list[Example],
    config: HealConfig,
    round_: int,
    seed: int,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[dict]:
    """Train the current round's adapter in place. Returns one record per optimiser step.

    Raises NonFinite with the step, the batch and the term that produced it.
    """
    shuffle = random.Random(seed)
    held_out = set(shuffle.sample(range(len(examples)), round(config.val_share * len(examples))))
    training = [e for i, e in enumerate(examples) if i not in held_out]
    validation = [examples[i] for i in sorted(held_out)]
    per_step = config.train_bs * config.grad_accum
    steps_an_epoch = math.ceil(len(training) / per_step)
    total = config.epochs * steps_an_epoch
    lam = config.lam * (1 + round_) ** config.lam_round_pow
    parameters = student.trainable()
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, betas=BETAS, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _cosine(step, total, config.warmup))
    history = []
    with student.view(train=True), recomputation(student.lm, config.checkpointing):
        for step in range(total):
            if step % steps_an_epoch == 0:
                epoch = _epoch_batches(training, per_step, shuffle)
            batch = epoch[step % steps_an_epoch] + shuffle.sample(anchors, min(len(anchors), config.anchor_bs))
            began = time.perf_counter()
            record = {"step": step, **_accumulate(student.lm, batch, config, lam)}
            _check_finite(record)
            record["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, CLIP).item()
            record["lr"] = schedule.get_last_lr()[0]
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            record["step_seconds"] = time.perf_counter() - began
            history.append(record)
            on_rows(sum(not e.anchor for e in batch))
    if validation:
        history[-1]["val_nll"] = _validation_nll(student, validation)
    return history


@contextmanager
def recomputation(lm: LM, on: bool) -> Iterator[None]:
    """Activations are recomputed in the backward pass. transformers does so in training mode only; no layer of a
    supported model behaves otherwise in it, since dropout is 0."""
    if on:
        lm.model.activation_checkpointing_enable({"use_reentrant": False})
        lm.model.train()
    try:
        yield
    finally:
        if on:
            lm.model.activation_checkpointing_disable()
            lm.model.eval()


def _cosine(step: int, total: int, warmup: float) -> float:
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _epoch_batches(examples: list[Example], size: int, shuffle: random.Random) -> list[list[Example]]:
    """All examples once, in random batches."""
    order = shuffle.sample(examples, len(examples))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _accumulate(lm: LM, batch: list[Example], config: HealConfig, lam: float) -> dict:
    """Gradient of the effective batch's loss into the adapter; returns its terms in nats."""
    micro = _micro_batches(batch, config.train_bs if config.grad_accum > 1 else len(batch))
    if len(micro) == 1:
        objective, kl = _losses(lm, micro[0], config)
        terms = loss_terms(objective, kl, _is_anchor(micro[0]), config, lam)
        terms["loss"].backward()
    else:
        with torch.no_grad():
            values = [_losses(lm, part, config) for part in micro]
        objective, kl = (torch.cat(v).requires_grad_() for v in zip(*values, strict=True))
        anchor = torch.cat([_is_anchor(part) for part in micro])
        terms = loss_terms(objective, kl, anchor, config, lam)
        weights = torch.autograd.grad(terms["loss"], (objective, kl), allow_unused=True, materialize_grads=True)
        sizes = [len(v[0]) for v in values]
        for part, w_objective, w_kl in zip(micro, *(w.split(sizes) for w in weights), strict=True):
            part_objective, part_kl = _losses(lm, part, config)
            (w_objective @ part_objective + w_kl @ part_kl).backward()
    return {name: term.item() for name, term in terms.items()} | {
        "fired": bool(terms["barrier"] > 0),
        "anchor_fired": bool(terms.get("anchor_divergence", 0.0) > config.anchor_tau),
        "lam": lam,
        "tokens": sum(len(e.row.completion) for e in batch),
    }


def _micro_batches(batch: list[Example], size: int) -> list[list[Example]]:
    """Split by length, so that little padding is computed; the loss does not depend on the split."""
    ordered = sorted(batch, key=lambda e: len(e.row.prompt) + len(e.row.completion))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _losses(lm: LM, part: list[Example], config: HealConfig) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    states = torch.cat(lm.forward([e.row for e in part]))
    targets = torch.tensor([t for e in part for t in e.row.completion], device=lm.device)
    reference = None if config.reg == "nll" else torch.cat([e.reference for e in part])
    teacher = None
    if config.target == "soft":  # anchor rows have no objective: their teacher is a placeholder of weight 0
        teacher = torch.cat([e.reference if e.anchor else e.teacher for e in part])
    return position_losses(lm.head, states, targets, reference, config.reg, teacher)


def _is_anchor(part: list[Example]) -> Tensor:
    return torch.cat([torch.full((len(e.row.completion),), e.anchor) for e in part])


def loss_terms(
    objective: Float[Tensor, "n"], kl: Float[Tensor, "n"], anchor: Tensor, config: HealConfig, lam: float
) -> dict[str, Tensor]:
    """The step's loss and its parts: objective, D, anchor D, barrier.

    With an anchor its own hinge is added to the barrier; both are in nats.
    """
    anchor = anchor.to(kl.device)
    mean = objective[~anchor].mean()
    divergence = aggregate(kl[~anchor], config.agg)
    barrier = hinge(divergence, config.tau)
    terms = {"objective": mean, "divergence": divergence}
    if config.reg == "nll":
        barrier = barrier * 0.0
    if anchor.any():
        terms["anchor_divergence"] = aggregate(kl[anchor], config.agg)
        barrier = barrier + hinge(terms["anchor_divergence"], config.anchor_tau)
    return {**terms, "barrier": barrier, "loss": mean + lam * barrier}


def _check_finite(record: dict) -> None:
    for name in ("objective", "divergence", "anchor_divergence", "loss"):
        if not math.isfinite(record.get(name, 0.0)):
            raise NonFinite(
                f"heal step {record['step']}: {name} is {record[name]} over {record['tokens']} tokens: lower --heal.lr"
            )


def _validation_nll(student: Student, examples: list[Example]) -> float:
    rows = [e.row for e in examples]
    return torch.cat(row_nll(student.lm, rows, batch_size=8)).mean().item()
