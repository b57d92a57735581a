"""One round's training: learn from some text, penalise divergence from the reference.

One objective (NLL of the text's tokens, or KL divergence from the steered teacher) and one barrier,
lam_r * relu(D - tau), or with `barrier.kind dual` one constraint, D <= tau, by the method of multipliers (Hestenes
1969, Powell 1969). With an anchor the same holds for its divergence and for the likelihood of its written texts. This
module is the optimiser's loop. `examples` makes the training examples, `own_text` those of the student's own answers,
`step` computes the gradient of a step.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from loguru import logger

from steer_heal.bake.lowrank import OperatorNorm
from steer_heal.bake.student import Student
from steer_heal.config import BarrierConfig, HealConfig, TrainingConfig, UserError
from steer_heal.heal.examples import Example, Kind, length
from steer_heal.heal.schedule import Schedule, most_epochs
from steer_heal.heal.step import Multipliers, accumulate, losses, micro_batches
from steer_heal.heal.steps import HealStep
from steer_heal.model.lm import LM

BETAS = (0.9, 0.95)  # a round is a few hundred steps at most; 0.999 would never warm up
CLIP = 1.0
TEXTS_A_STEP = 1  # written texts among the anchors of a step: a text that gains must not make up for one that loses
ANCHORS_A_STEP = 3  # anchor completions per step; 6 changed nothing (docs/archive/teacher-text.md)
DUAL_START = 1.0  # a multiplier before the first step; the constraint soon moves it
BUCKET = 8  # batches whose examples are sorted by length together
FIRST_RATE = 4e-4  # lr auto: tried first
HALVINGS = 5  # lr auto: most times that the rate is halved
OVERSHOT = 3.0  # lr auto: a D above this times tau, in the first epoch, is a step too far


class NonFinite(UserError):
    """The loss of a step is not a finite number."""


@dataclass(frozen=True)
class Turn:
    """The round that is trained, and the steps of the previous round."""

    number: int
    seed: int
    before: list[HealStep] | None = None
    """the steps of the previous round. A dual multiplier of a divergence from the pristine base continues from its last
    value, because that constraint is the same in every round"""


def heal(
    student: Student,
    text: Callable[[int], list[Example]],
    anchors: list[Example],
    config: HealConfig,
    turn: Turn,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[HealStep]:
    """Train the current round's adapter in place; `config.barrier.tau` must be a number (`with_tau`).

    `text` gives the examples of an epoch, the same number in each. Returns one `HealStep` per optimiser step. With lr
    `auto`, a first epoch of round 0 in which D overshoots tau is undone and begun again at half the rate. A later round
    begins near tau, and is above it at any rate.

    Raises NonFinite with the step, the batch and the term that is not finite.
    """
    knobs, examples = config.training, text(0)
    seeks_rate = knobs.lr == "auto" and not turn.before
    first = _objective(student, examples, config) if knobs.epochs == "auto" else math.nan
    untrained = [parameter.detach().clone() for parameter in student.trainable()]
    rate = _first_rate(knobs, turn)
    for left in reversed(range(1 + HALVINGS)):
        schedule = Schedule(math.ceil(len(examples) / knobs.batch), knobs.epochs, first)
        descent, shuffle = Descent(student, config, turn, schedule, rate), random.Random(turn.seed)
        while not schedule.done:
            descent.epoch(text(schedule.epoch), anchors, shuffle, on_rows)
            if seeks_rate and left and schedule.epoch == 1 and descent.excess > OVERSHOT:
                break
        else:
            break
        over = f"D was {descent.excess:.1f} times its limit"
        logger.info(f"learning rate {rate:.2g} is too high: {over}. Trying half")
        rate /= 2
        on_rows(-len(examples))
        with torch.no_grad():
            for parameter, start in zip(student.trainable(), untrained, strict=True):
                parameter.copy_(start)
    if schedule.why:
        logger.info(f"trained for {schedule.epoch} epochs: {schedule.why}")
        on_rows(len(examples) * (most_epochs(knobs.epochs) - schedule.epoch))
    return descent.steps


def _first_rate(knobs: TrainingConfig, turn: Turn) -> float:
    """The round's peak learning rate; for `auto` the one tried first, which is that of the round before, if any."""
    round_, power = turn.number, knobs.lr_round_pow
    if knobs.lr == "auto" and turn.before:
        return max(step.lr for step in turn.before) * ((1 + round_) / round_) ** power
    return (FIRST_RATE if knobs.lr == "auto" else knobs.lr) * (1 + round_) ** power


class Descent:
    """The optimiser of one round, its learning-rate schedule and the barrier's weights."""

    def __init__(self, student: Student, config: HealConfig, turn: Turn, schedule: Schedule, rate: float) -> None:
        """`rate` is the peak learning rate."""
        knobs = config.training
        self.student, self.config, self.turn, self.schedule, self.lr = student, config, turn, schedule, rate
        self.parameters = student.trainable()
        self.optimiser = _optimiser(self.parameters, knobs)
        self.records: list[dict] = []  # the fields of each step's `HealStep`
        self.operator_norm = OperatorNorm(student.factors(), turn.seed) if knobs.op_norm else None
        self.lam = _weights(config.barrier, turn)

    @property
    def steps(self) -> list[HealStep]:
        """The steps so far."""
        return [HealStep(**record) for record in self.records]

    @property
    def excess(self) -> float:
        """The largest D so far as a multiple of tau."""
        return max(step.excess for step in self.steps)

    def epoch(
        self,
        examples: list[Example],
        anchors: list[Example],
        shuffle: random.Random,
        on_rows: Callable[[int], None],
    ) -> None:
        """Do one pass over the examples, each step with some anchors."""
        knobs, numbers = self.config.training, {id(e): i for i, e in enumerate(examples)}
        with self.student.view(train=True), recomputation(self.student.lm, knobs.checkpointing):
            for batch in _epoch_batches(examples, knobs.batch, shuffle):
                self.step(batch + _held(anchors, shuffle), [numbers[id(e)] for e in batch])
                on_rows(len(batch))
        self.schedule.next_epoch(self.records)

    def step(self, batch: list[Example], kept: list[int]) -> None:
        """Do one optimiser step and note it. `kept` numbers the batch's completions."""
        began, knobs, number = time.perf_counter(), self.config.training, len(self.records)
        rate = self.lr * self.schedule.rate(number)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        record = {"step": number, "epoch": self.schedule.epoch, "lr": rate}
        record |= accumulate(self.student.lm, batch, self.config, self.lam)
        if self.operator_norm is not None:
            penalty = self.operator_norm()
            (knobs.op_norm * penalty).backward()
            record["squared_op_norm"] = penalty.item()
        record["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP).item()
        _check_finite(record, self.turn.number, kept)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.config.barrier.kind == "dual":
            self.lam.ascend(record, self.config)
            record |= {"next_lam": self.lam.own, "next_anchor_lam": self.lam.anchor, "next_text_lam": self.lam.text}
        seconds = time.perf_counter() - began
        self.records.append(record | {"step_seconds": seconds, "tokens_per_s": record["tokens"] / seconds})


def _weights(barrier: BarrierConfig, turn: Turn) -> Multipliers:
    """The barrier's weights at a round's first step."""
    if barrier.kind == "fixed":
        weight = barrier.lam * (1 + turn.number) ** barrier.lam_round_pow
        return Multipliers(weight, weight, weight)
    lam = Multipliers(DUAL_START, DUAL_START, DUAL_START)
    if turn.before:
        last = turn.before[-1]
        lam.own = last.next_lam if barrier.reference == "base" else lam.own
        lam.anchor = last.next_anchor_lam
        lam.text = lam.text if last.next_text_lam is None else last.next_text_lam  # None: by a version without texts
    return lam


def _optimiser(parameters: list[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser; each step sets its own learning rate."""
    if config.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=FIRST_RATE, betas=BETAS, weight_decay=config.weight_decay)
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(parameters, lr=FIRST_RATE, betas=BETAS, weight_decay=config.weight_decay)


def check_optimiser(config: TrainingConfig, device: torch.device) -> None:
    """Raise UserError for an optimiser that this device does not support."""
    if config.optimiser != "adamw" and device.type != "cuda":
        raise UserError(
            f"heal.training.optimiser {config.optimiser} needs a CUDA GPU, the model is on {device}: choose adamw"
        )


@contextmanager
def recomputation(lm: LM, on: bool) -> Iterator[None]:
    """If `on`, recompute activations in the backward pass inside the block.

    transformers does so in training mode only. No layer of a supported model behaves differently in that mode, since
    dropout is 0.
    """
    if on:
        lm.model.activation_checkpointing_enable({"use_reentrant": False})
        lm.model.train()
    try:
        yield
    finally:
        if on:
            lm.model.activation_checkpointing_disable()
            lm.model.eval()


def _epoch_batches(examples: list[Example], size: int, shuffle: random.Random) -> list[list[Example]]:
    """Split the examples into batches of similar length, in random order; each example is in one batch.

    Examples are sorted by length only within random groups of BUCKET batches. A short batch, if one is left, is drawn
    before sorting. So every example is equally likely to meet each learning rate and each batch size.
    """
    order = shuffle.sample(examples, len(examples))
    short = len(order) % size
    batches = [order[:short]] if short else []
    for start in range(short, len(order), size * BUCKET):
        group = sorted(order[start : start + size * BUCKET], key=length)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return shuffle.sample(batches, len(batches))


def _held(anchors: list[Example], shuffle: random.Random) -> list[Example]:
    """The anchors of a step: written texts and answers of the base."""
    text, answers = ([e for e in anchors if (e.kind == Kind.TEXT) == written] for written in (True, False))
    texts = shuffle.sample(text, min(len(text), TEXTS_A_STEP))
    return texts + shuffle.sample(answers, min(len(answers), ANCHORS_A_STEP - len(texts)))


def _check_finite(record: dict, round_: int, batch: list[int]) -> None:
    for name in ("objective", "divergence", "anchor_divergence", "text_loss", "squared_op_norm", "loss", "grad_norm"):
        if not math.isfinite(record.get(name, 0.0)):
            before = f"the student of round {round_ - 1} is kept" if round_ else "the base is untouched"
            raise NonFinite(
                f"r{round_:02d}/adapter, step {record['step']}: {name} is {record[name]} on the completions "
                f"number {', '.join(map(str, sorted(batch)))} (from 0); {before}. Start a new run with a lower "
                "--heal.training.lr"
            )


def _objective(student: Student, examples: list[Example], config: HealConfig) -> float:
    """Return the training objective on some examples: its mean over their tokens, in nats."""
    with torch.no_grad():
        parts = [losses(student.lm, part, config)[0] for part in micro_batches(examples, config.training.pass_rows)]
    return torch.cat(parts).mean().item()
