"""One round's training: keep what the survivors agree on, hold back what is improbable under the reference.

One objective (NLL of the sampled token, or KL from the steered teacher) and one barrier, lam_r * relu(D - tau), or with
`barrier dual` one constraint, D <= tau, by the method of multipliers (Hestenes 1969, Powell 1969).
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
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor

from steer_heal.bake.lowrank import OperatorNorm
from steer_heal.bake.student import Student
from steer_heal.barrier import aggregate, hinge, position_losses
from steer_heal.config import HealConfig, UserError
from steer_heal.lm import LM, Row, Steering, row_nll, shared_prefix

BETAS = (0.9, 0.95)  # a round is a few hundred steps at most; 0.999 would never warm up
CLIP = 1.0
DUAL_PULL = 2.0  # dual: weight added at once when D is twice tau; a round is too short to wait for the multiplier alone
BUCKET = 8  # batches whose examples are sorted by length together


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
    """Training examples with the reference's and, for soft and mirrored targets, the teacher's states.

    `steering_` has one dose per row; the teacher is the previous student steered with it, see `HealConfig.target`.
    """
    lm = student.lm
    rows = [_cut(row, config.max_len) for row in rows]
    history = 1.0 if config.reference == "prev" else 0.0
    with student.view(history=history, now=0.0):
        reference = lm.states(rows, batch_size) if config.reg != "nll" else [None] * len(rows)
    with student.view(now=0.0):
        if config.target == "mirrored":
            teacher = _mirrored(lm, rows, steering_, config.gain, batch_size)
        else:
            asked = config.target == "soft" or config.tau == "auto"
            teacher = lm.states(rows, batch_size, steering_) if asked else [None] * len(rows)
    return [Example(*parts) for parts in zip(rows, reference, teacher, strict=True)]


def _mirrored(lm: LM, rows: list[Row], steering_: Steering, gain: float, batch_size: int) -> list[Float[Tensor, "n d"]]:
    """States of the teacher whose logits are the unsteered ones plus `gain` times half of what +dose and -dose differ.

    A head is linear, so mixing the states before it mixes the logits. What the vector does alike in both directions
    cancels; what turns round with it, as the trait does, stays, and `gain` goes on along that in a straight line where
    a larger dose would bend. After classifier-free guidance (Ho and Salimans, arXiv:2207.12598). Where logits
    are soft-capped the mix is made before the cap.
    """
    back = Steering(steering_.vector, -steering_.dose)
    plain, ahead, behind = (lm.states(rows, batch_size, way) for way in (None, steering_, back))
    return [h + gain / 2 * (a - b) for h, a, b in zip(plain, ahead, behind, strict=True)]


def _cut(row: Row, max_len: int) -> Row:
    """The row's first `max_len` tokens. Raises UserError when no completion is left."""
    if len(row.prompt) >= max_len:
        raise UserError(
            f"a prompt has {len(row.prompt)} tokens and heal.max_len is {max_len}: nothing of its completion is left, "
            "raise --heal.max-len"
        )
    return Row(row.prompt, row.completion[: max_len - len(row.prompt)])


def with_tau(lm: LM, examples: list[Example], config: HealConfig) -> HealConfig:
    """The config with `tau` a number: for `auto` a share of the divergence that the teacher itself has here."""
    if config.tau != "auto":
        return config
    if config.reg == "nll":
        return replace(config, tau=0.0)  # nothing is held at it
    with torch.no_grad():
        kl = [position_losses(lm.head, e.teacher, None, e.reference, config.reg)[1] for e in examples]
    tau = config.tau_share * aggregate(torch.cat(kl), config.agg).item()
    logger.info(f"tau {tau:.3g} nats: {config.tau_share:g} of the {config.agg} divergence of the steered teacher")
    return replace(config, tau=tau)


def prepare_anchors(student: Student, rows: list[Row], batch_size: int) -> list[Example]:
    """Anchor examples: mundane completions with the pristine base's states. The same in every round."""
    with student.view(history=0.0, now=0.0):
        return [
            Example(row, h, None, anchor=True) for row, h in zip(rows, student.lm.states(rows, batch_size), strict=True)
        ]


@dataclass
class Multipliers:
    """Weights of the barrier's two divergences."""

    own: float
    anchor: float

    def ascend(self, record: dict, config: HealConfig) -> None:
        """One step of dual ascent: a divergence above its bound makes itself dearer, one below cheaper."""
        self.own = max(0.0, self.own + config.dual_lr * (record["divergence"] / config.tau - 1))
        if "anchor_divergence" in record:
            excess = record["anchor_divergence"] / config.anchor_tau - 1
            self.anchor = max(0.0, self.anchor + config.dual_lr * excess)


def heal(
    student: Student,
    examples: list[Example],
    anchors: list[Example],
    config: HealConfig,
    round_: int,
    seed: int,
    on_rows: Callable[[int], None] = lambda rows: None,
    before: list[dict] | None = None,
) -> list[dict]:
    """Train the current round's adapter in place; `config.tau` must be a number (`with_tau`).

    `before` is what the round before returned: a dual multiplier of a distance from the pristine base goes on as it
    was, because that constraint is the same one in every round.

    Returns one record per optimiser step: the terms of the loss in nats, whether the barrier fired, lam, learning
    rate, norm of the gradient before clipping, tokens per second; every `log_every` steps the norms of the objective's
    and the barrier's own gradients; at an epoch's end, when it is read, the validation NLL.

    Raises NonFinite with the step, the batch and the term that produced it.
    """
    shuffle = random.Random(seed)
    held_out = set(shuffle.sample(range(len(examples)), round(config.val_share * len(examples))))
    training = [e for i, e in enumerate(examples) if i not in held_out]
    validation = [examples[i] for i in sorted(held_out)]
    per_step = config.train_bs * config.grad_accum
    steps_an_epoch = math.ceil(len(training) / per_step)
    total = config.epochs * steps_an_epoch
    weight = config.lam * (1 + round_) ** config.lam_round_pow
    lam = Multipliers(weight, weight)
    if before and config.barrier == "dual":
        lam.anchor = before[-1]["anchor_lam"]
        if config.reference == "base":
            lam.own = before[-1]["lam"]
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
            record = {"step": step, **_accumulate(student.lm, batch, config, lam, log_norms)}
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
            record["step_seconds"] = time.perf_counter() - began
            record["tokens_per_s"] = record["tokens"] / record["step_seconds"]
            history.append(record)
            on_rows(sum(not e.anchor for e in batch))
            if validation and (step + 1 == total or config.patience) and (step + 1) % steps_an_epoch == 0:
                record["val_nll"] = _validation_nll(student, validation)
                if best.stop(record["val_nll"]):
                    logger.info(
                        f"no better validation NLL for {config.patience} epochs: stopped after {step + 1} steps"
                    )
                    break
    best.restore()
    return history


class _Best:
    """Early stopping: the weights of the epoch with the best validation NLL."""

    def __init__(self, parameters: list[torch.nn.Parameter], patience: int) -> None:
        self.parameters, self.patience = parameters, patience
        self.nll, self.kept, self.waited = math.inf, None, 0

    def stop(self, nll: float) -> bool:
        """Note an epoch's validation NLL; True when `patience` epochs have brought nothing better."""
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
        group = sorted(order[start : start + size * BUCKET], key=_length)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return shuffle.sample(batches, len(batches))


def _length(example: Example) -> int:
    return len(example.row.prompt) + len(example.row.completion)


def _accumulate(
    lm: LM,
    batch: list[Example],
    config: HealConfig,
    lam: Multipliers,
    log_norms: list[torch.nn.Parameter] | None = None,
) -> dict:
    """Gradient of the effective batch's loss into the adapter; returns its terms in nats.

    With `log_norms`, the adapter's parameters, the norms of the objective's and the barrier's gradient are added.
    """
    micro = _micro_batches(batch, config.train_bs if config.grad_accum > 1 else len(batch))
    if len(micro) == 1:
        losses = [_losses(lm, micro[0], config)]
    else:
        with torch.no_grad():
            losses = [_losses(lm, part, config) for part in micro]
    objective, kl = (torch.cat(v).detach().requires_grad_() for v in zip(*losses, strict=True))
    terms = loss_terms(objective, kl, torch.cat([_is_anchor(part) for part in micro]), config, lam)
    penalty = terms.pop("penalty")
    on_objective, on_kl = (
        torch.autograd.grad(term, leaf, allow_unused=True, materialize_grads=True)[0].split([len(v) for v, _ in losses])
        for term, leaf in ((terms["objective"], objective), (penalty, kl))
    )
    norms = _Norms(log_norms)
    for index, part in enumerate(micro):
        part_objective, part_kl = losses[index] if len(micro) == 1 else _losses(lm, part, config)
        norms.backward(on_objective[index] @ part_objective, on_kl[index] @ part_kl)
    return {name: term.item() for name, term in terms.items()} | {
        "fired": config.reg != "nll" and terms["divergence"].item() > config.tau,
        "anchor_fired": bool(terms.get("anchor_divergence", 0.0) > config.anchor_tau),
        "tau": config.tau,
        "lam": lam.own,
        "anchor_lam": lam.anchor,
        "tokens": sum(len(e.row.completion) for e in batch),
        **norms.record(),
    }


class _Norms:
    """Backward passes that, when asked, keep the objective's gradient apart from the barrier's."""

    def __init__(self, parameters: list[torch.nn.Parameter] | None) -> None:
        self.parameters = parameters
        self.gradients: dict[str, list[Tensor]] = {}

    def backward(self, objective: Float[Tensor, ""], barrier: Float[Tensor, ""]) -> None:
        if self.parameters is None:
            (objective + barrier).backward()
            return
        for name, term in (("objective", objective), ("barrier", barrier)):
            keep = name == "objective"  # the graph, for the other term
            found = torch.autograd.grad(term, self.parameters, retain_graph=keep, materialize_grads=True)
            so_far = self.gradients.get(name)
            self.gradients[name] = (
                list(found) if so_far is None else [a + b for a, b in zip(so_far, found, strict=True)]
            )
            for parameter, gradient in zip(self.parameters, found, strict=True):
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient

    def record(self) -> dict[str, float]:
        return {
            f"grad_norm_{name}": torch.stack([g.float().square().sum() for g in found]).sum().sqrt().item()
            for name, found in self.gradients.items()
        }


def _micro_batches(batch: list[Example], size: int) -> list[list[Example]]:
    """Split by length, so that little padding is computed, anchors last in each; the loss does not depend on it."""
    ordered = sorted(batch, key=_length)
    return [sorted(ordered[i : i + size], key=lambda e: e.anchor) for i in range(0, len(ordered), size)]


def _losses(lm: LM, part: list[Example], config: HealConfig) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Objective and divergence of every position; anchors come last and have no objective."""
    rows = [e.row for e in part]
    # What is recomputed in the backward pass cannot come from a cache.
    shared = 0 if lm.model.is_activation_checkpointing else shared_prefix([row.prompt for row in rows], multiple=1)
    states = lm.forward(rows, shared=shared, multiple=1)
    own = sum(not e.anchor for e in part)
    losses = []
    for group, h in ((part[:own], states[:own]), (part[own:], states[own:])):
        if not group:
            continue
        targets, reference, teacher = None, None, None
        if config.reg != "nll":
            reference = torch.cat([e.reference for e in group])
        if not group[0].anchor:
            targets = torch.tensor([t for e in group for t in e.row.completion], device=lm.device)
            teacher = torch.cat([e.teacher for e in group]) if config.target != "sampled" else None
        losses.append(position_losses(lm.head, torch.cat(h), targets, reference, config.reg, teacher))
    objective, kl = zip(*losses, strict=True)
    return torch.cat(objective), torch.cat(kl)


def _is_anchor(part: list[Example]) -> Tensor:
    return torch.cat([torch.full((len(e.row.completion),), e.anchor) for e in part])


def loss_terms(
    objective: Float[Tensor, "n"], kl: Float[Tensor, "n"], anchor: Tensor, config: HealConfig, lam: Multipliers
) -> dict[str, Tensor]:
    """The step's loss and its parts: objective, D, anchor D, how far they are above their bounds, weighted penalty.

    With an anchor its own hinge is added to the barrier; both are in nats.
    """
    anchor = anchor.to(kl.device)
    mean = objective[~anchor].mean()
    divergence = aggregate(kl[~anchor], config.agg)
    terms = {"objective": mean, "divergence": divergence}
    bounded = [(divergence, config.tau, lam.own)] if config.reg != "nll" else []
    if anchor.any():
        terms["anchor_divergence"] = aggregate(kl[anchor], config.agg)
        bounded.append((terms["anchor_divergence"], config.anchor_tau, lam.anchor))
    zero = 0.0 * kl.sum()
    barrier = sum((hinge(d, bound) for d, bound, _ in bounded), zero)
    if config.barrier == "fixed":
        penalty = sum((weight * hinge(d, bound) for d, bound, weight in bounded), zero)
    else:
        penalty = sum((_dual_weight(d, bound, weight) * (d - bound) for d, bound, weight in bounded), zero)
    return {**terms, "barrier": barrier, "penalty": penalty, "loss": mean + penalty}


def _dual_weight(divergence: Float[Tensor, ""], bound: float, multiplier: float) -> Float[Tensor, ""]:
    """Slope of the augmented Lagrangian: the multiplier, more above the bound, less below it, never below 0."""
    return torch.relu(multiplier + DUAL_PULL * (divergence.detach() / bound - 1))


def _check_finite(record: dict, round_: int, batch: list[int]) -> None:
    for name in ("objective", "divergence", "anchor_divergence", "squared_op_norm", "loss", "grad_norm"):
        if not math.isfinite(record.get(name, 0.0)):
            before = f"the student of round {round_ - 1} is kept" if round_ else "the base is untouched"
            raise NonFinite(
                f"r{round_:02d}/adapter, step {record['step']}: {name} is {record[name]} on the kept completions "
                f"number {', '.join(map(str, sorted(batch)))} (from 0); {before}. Start a new run with a lower "
                "--heal.lr"
            )


def _validation_nll(student: Student, examples: list[Example]) -> float:
    rows = [e.row for e in examples]
    return torch.cat(row_nll(student.lm, rows, batch_size=8)).mean().item()
