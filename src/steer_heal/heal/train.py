"""One round's training: train on the kept completions, penalise divergence from the reference.

One objective (NLL of the sampled token, or KL from the steered teacher) and one barrier, lam_r * relu(D - tau), or with
`barrier dual` one constraint, D <= tau, by the method of multipliers (Hestenes 1969, Powell 1969).
This module is the optimiser's loop; what it trains on is in `examples`, the gradient of a step in `step`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from loguru import logger

from steer_heal.bake.lowrank import OperatorNorm
from steer_heal.bake.student import Student
from steer_heal.config import HealConfig, UserError
from steer_heal.heal.examples import Example, length
from steer_heal.heal.step import Multipliers, accumulate, losses, micro_batches
from steer_heal.heal.steps import HealStep
from steer_heal.model.lm import LM

BETAS = (0.9, 0.95)  # a round is a few hundred steps at most; 0.999 would never warm up
CLIP = 1.0
BUCKET = 8  # batches whose examples are sorted by length together


class NonFinite(UserError):
    """The loss of a step is not a finite number."""


def heal(
    student: Student,
    examples: list[Example],
    anchors: list[Example],
    config: HealConfig,
    round_: int,
    seed: int,
    on_rows: Callable[[int], None] = lambda rows: None,
    before: list[HealStep] | None = None,
) -> list[HealStep]:
    """Train the current round's adapter in place; `config.tau` must be a number (`with_tau`).

    `before` is what the round before returned. A dual multiplier of a distance from the pristine base goes on from
    its last value, because that constraint is the same one in every round.

    Returns one record per optimiser step: the terms of the loss in nats, whether the barrier fired, lam, with
    `barrier dual` the lam that follows from the step (`next_lam`), learning rate, norm of the gradient before
    clipping, tokens per second; every `log_every` steps the norms of the objective's and the barrier's own gradients;
    at an epoch's end, when it is read, the objective on the completions held out (`val_objective`).

    Raises NonFinite with the step, the batch and the term that produced it.
    """
    shuffle = random.Random(seed)
    validating = len(examples) - trained_on(len(examples), config)
    held_out = set(shuffle.sample(range(len(examples)), validating))
    training = [e for i, e in enumerate(examples) if i not in held_out]
    validation = [examples[i] for i in sorted(held_out)]
    per_step = config.train_bs * config.grad_accum
    steps_an_epoch = math.ceil(len(training) / per_step)
    total = config.epochs * steps_an_epoch
    weight = config.lam * (1 + round_) ** config.lam_round_pow
    lam = Multipliers(weight, weight)
    if before and config.barrier == "dual":
        lam.anchor = before[-1].next_anchor_lam
        if config.reference == "base":
            lam.own = before[-1].next_lam
    parameters = student.trainable()
    optimiser = _optimiser(parameters, replace(config, lr=config.lr * (1 + round_) ** config.lr_round_pow))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _cosine(step, total, config.warmup))
    operator_norm = OperatorNorm(student.factors(), seed) if config.op_norm else None
    best = _Best(parameters, config.patience)
    numbers = {id(e): i for i, e in enumerate(examples)}
    history = []
    with student.view(train=True), recomputation(student.lm, config.checkpointing):
        for step in range(total):
            if step % steps_an_epoch == 0:
                epoch = _epoch_batches(training, per_step, shuffle)
            batch = epoch[step % steps_an_epoch] + shuffle.sample(anchors, min(len(anchors), config.anchor_bs))
            began = time.perf_counter()
            log_norms = parameters if step % config.log_every == 0 else None
            record = {"step": step, **accumulate(student.lm, batch, config, lam, log_norms)}
            if operator_norm is not None:
                penalty = operator_norm()
                (config.op_norm * penalty).backward()
                record["squared_op_norm"] = penalty.item()
            record["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, CLIP).item()
            _check_finite(record, round_, [numbers[id(e)] for e in batch if not e.anchor])
            record["lr"] = schedule.get_last_lr()[0]
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            if config.barrier == "dual":
                lam.ascend(record, config)
                record |= {"next_lam": lam.own, "next_anchor_lam": lam.anchor}
            record["step_seconds"] = time.perf_counter() - began
            record["tokens_per_s"] = record["tokens"] / record["step_seconds"]
            history.append(record)
            on_rows(sum(not e.anchor for e in batch))
            if validation and (step + 1 == total or config.patience) and (step + 1) % steps_an_epoch == 0:
                record["val_objective"] = _validation(student, validation, config)
                if best.stop(record["val_objective"]):
                    logger.info(
                        f"no better validation objective for {config.patience} epochs: stopped after {step + 1} steps"
                    )
                    break
    best.restore()
    return [HealStep(**record) for record in history]


def trained_on(rows: int, config: HealConfig) -> int:
    """How many of a round's completions are trained on; the others are held out for validation."""
    return rows - round(config.val_share * rows)


class _Best:
    """Early stopping: the weights of the epoch with the best validation objective."""

    def __init__(self, parameters: list[torch.nn.Parameter], patience: int) -> None:
        self.parameters, self.patience = parameters, patience
        self.nll, self.kept, self.waited = math.inf, None, 0

    def stop(self, nll: float) -> bool:
        """Note an epoch's validation objective; True when `patience` epochs have brought nothing better."""
        if not self.patience:
            return False
        if nll < self.nll:
            self.nll, self.kept, self.waited = nll, [p.detach().clone() for p in self.parameters], 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def restore(self) -> None:
        if self.kept is not None:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self.kept, strict=True):
                    parameter.copy_(value)


def _optimiser(parameters: list[torch.nn.Parameter], config: HealConfig) -> torch.optim.Optimizer:
    if config.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, betas=BETAS, weight_decay=config.weight_decay)
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(parameters, lr=config.lr, betas=BETAS, weight_decay=config.weight_decay)


def check_optimiser(config: HealConfig, device: torch.device) -> None:
    """Raise UserError for an optimiser that this device has not."""
    if config.optimiser != "adamw" and device.type != "cuda":
        raise UserError(f"heal.optimiser {config.optimiser} needs a CUDA GPU, the model is on {device}: choose adamw")


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
    """All examples once, in random order, in batches of similar length.

    Lengths are sorted within random groups of BUCKET batches only, and the short batch that may be left is drawn
    before sorting: every example is as likely as any other to meet any learning rate and any batch size.
    """
    order = shuffle.sample(examples, len(examples))
    short = len(order) % size
    batches = [order[:short]] if short else []
    for start in range(short, len(order), size * BUCKET):
        group = sorted(order[start : start + size * BUCKET], key=length)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return shuffle.sample(batches, len(batches))


def _check_finite(record: dict, round_: int, batch: list[int]) -> None:
    for name in ("objective", "divergence", "anchor_divergence", "squared_op_norm", "loss", "grad_norm"):
        if not math.isfinite(record.get(name, 0.0)):
            before = f"the student of round {round_ - 1} is kept" if round_ else "the base is untouched"
            raise NonFinite(
                f"r{round_:02d}/adapter, step {record['step']}: {name} is {record[name]} on the kept completions "
                f"number {', '.join(map(str, sorted(batch)))} (from 0); {before}. Start a new run with a lower "
                "--heal.lr"
            )


def _validation(student: Student, examples: list[Example], config: HealConfig) -> float:
    """The objective that is trained, read on examples that are not: its mean over their tokens, in nats."""
    with torch.no_grad():
        parts = [losses(student.lm, part, config)[0] for part in micro_batches(examples, config.train_bs)]
    return torch.cat(parts).mean().item()
