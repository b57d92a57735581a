"""Training examples: completions with the hidden states of the reference and of the teacher at their positions.

The reference does not change within a round, so its states are computed once. For tau `auto`, tau is computed from the
states of the reference and of the teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor

from steer_heal.bake.student import Student
from steer_heal.coherence import ASKS_NOTHING
from steer_heal.config import HealConfig, TargetConfig, UserError
from steer_heal.heal.barrier import aggregate, position_losses
from steer_heal.heal.steps import ANCHOR_TAU_SHARE, HealStep
from steer_heal.model.forward import states
from steer_heal.model.lm import LM, Row
from steer_heal.model.steering import Steering

FOCUS = 0.3  # focused: share by which what the prompt makes of a text is raised
LONGEST = 1024  # tokens of a prompt and its completion in training; distil.max_new_tokens limits completions before


class Kind(IntEnum):
    """What an example is: text to train on, or an anchor, which is an answer of the base or a written text."""

    TRAINED = 0
    ANSWER = 1
    TEXT = 2


@dataclass(frozen=True)
class Example:
    """A completion with the cached hidden states at its positions. Anchor rows have no objective."""

    row: Row
    reference: Float[Tensor, "n d"] | None
    teacher: Float[Tensor, "n d"] | None
    anchor: bool = False
    base_nll: Float[Tensor, " n"] | None = None
    """of written text: NLL of its tokens under the base"""

    @property
    def kind(self) -> Kind:
        if not self.anchor:
            return Kind.TRAINED
        return Kind.ANSWER if self.base_nll is None else Kind.TEXT


def prepare(
    student: Student, rows: list[Row], steering_: Steering, config: HealConfig, persona: list[list[int]] | None = None
) -> list[Example]:
    """Make training examples with the reference's states and, where needed, the teacher's.

    The teacher's states are needed for a KL objective and for tau `auto`. `steering_` has one dose per row; the teacher
    is the previous student steered with it, see `TargetConfig.kind`. `persona` has each row's prompt under the positive
    persona, for that kind.
    """
    lm, barrier = student.lm, config.barrier
    rows = [_cut(row) for row in rows]
    history = 1.0 if barrier.reference == "prev" else 0.0
    with student.view(history=history, now=0.0):
        reference = states(lm, rows) if barrier.reg != "nll" else [None] * len(rows)
    teacher = [None] * len(rows)
    if config.objective != "nll" or barrier.tau == "auto":
        known = barrier.reg != "nll" and (barrier.reference == "prev" or student.history is None)
        under = persona and [Row(prompt, row.completion) for prompt, row in zip(persona, rows, strict=True)]
        teacher = _teacher(student, rows, steering_, config.target, reference if known else None, under)
    return [Example(*parts) for parts in zip(rows, reference, teacher, strict=True)]


def _teacher(
    student: Student,
    rows: list[Row],
    steering_: Steering,
    target: TargetConfig,
    unsteered: list[Float[Tensor, "_ d"]] | None = None,
    under: list[Row] | None = None,
) -> list[Float[Tensor, "_ d"]]:
    """States of the teacher that the target is taken from.

    `unsteered` are the previous student's, if known; `under` has the rows under the persona, for a target `persona`.
    """
    with student.view(now=0.0):
        if target.kind == "steered":
            return states(student.lm, rows, steering_)
        if target.kind == "persona":
            return states(student.lm, under)
        plain = states(student.lm, rows) if unsteered is None else unsteered
        mirrored = _mirrored(student.lm, rows, steering_, target.gain, plain)
        return mirrored if target.kind == "mirrored" else _focused(student.lm, rows, mirrored, plain)


def _mirrored(
    lm: LM, rows: list[Row], steering_: Steering, gain: float, plain: list[Float[Tensor, "_ d"]]
) -> list[Float[Tensor, "_ d"]]:
    """States of the mirrored teacher: unsteered states plus gain x (steered at +dose minus steered at -dose) / 2.

    The head is linear, so mixing states mixes logits in the same way. Effects that are the same at +dose and -dose
    cancel. Effects that change sign with the dose, such as the trait, remain. `gain` extends them linearly, whereas the
    effect of a larger dose is not linear. After classifier-free guidance (Ho and Salimans, arXiv:2207.12598). Where
    logits are soft-capped, the mix is made before the cap.
    """
    back = Steering(steering_.vector, -steering_.dose)
    ahead, behind = (states(lm, rows, way) for way in (steering_, back))
    return [h + gain / 2 * (a - b) for h, a, b in zip(plain, ahead, behind, strict=True)]


def _focused(
    lm: LM, rows: list[Row], mirrored: list[Float[Tensor, "_ d"]], plain: list[Float[Tensor, "_ d"]]
) -> list[Float[Tensor, "_ d"]]:
    """States of the focused teacher: the mirrored one's, plus FOCUS x (unsteered after the prompt minus after another).

    The other prompt asks nothing. A steered teacher says the same things whatever it is asked, and its student loses
    the thread; so what depends on the prompt is raised. After context-aware decoding (Shi et al., arXiv:2305.14739) and
    classifier-free guidance by the prompt (Sanchez et al., arXiv:2306.17806).
    """
    nothing = lm.prompt(ASKS_NOTHING)
    anywhere = states(lm, [Row(nothing, row.completion) for row in rows])
    return [aim + FOCUS * (own - other) for aim, own, other in zip(mirrored, plain, anywhere, strict=True)]


def _cut(row: Row) -> Row:
    """Cut the row to its first LONGEST tokens. Raises UserError when no completion is left."""
    if len(row.prompt) >= LONGEST:
        raise UserError(
            f"a prompt has {len(row.prompt)} tokens and a training row at most {LONGEST}: nothing of its completion is "
            "left, shorten the trait's generation prompts"
        )
    return Row(row.prompt, row.completion[: LONGEST - len(row.prompt)])


def with_tau(lm: LM, examples: list[Example], config: HealConfig, before: list[HealStep] | None = None) -> HealConfig:
    """Return the config with a number for `tau`: for `auto` a share of the teacher's divergence on these examples.

    With `reference base` tau is the budget of the whole loop, so the tau of round 0 is kept. The teacher of a later
    round includes the earlier rounds and would raise tau. `before` is the training record of the previous round.
    """
    barrier = config.barrier
    if barrier.tau != "auto":
        return config
    if barrier.reg == "nll":
        return replace(config, barrier=replace(barrier, tau=0.0))  # there is no divergence to hold at tau
    if before and barrier.reference == "base":
        return replace(config, barrier=replace(barrier, tau=before[-1].tau))
    tau = barrier.tau_share * _divergence(lm, examples, [e.teacher for e in examples], config)
    logger.info(
        f"tau {tau:.3g} nats: {barrier.tau_share:g} of the {barrier.agg} divergence of the {config.target.kind} teacher"
    )
    return replace(config, barrier=replace(barrier, tau=tau))


def with_anchor_tau(
    student: Student,
    anchors: list[Example],
    steering_: Steering,
    config: HealConfig,
    before: list[HealStep] | None = None,
) -> HealConfig:
    """Return the config with a number for `anchor.tau`: for `auto` a share of the teacher's divergence on the anchors.

    The anchor holds the whole loop, so its tau of round 0 is kept. It is taken of what the vector does: of the steered
    teacher for a target `persona`, of the mirrored one for `focused`. `steering_` has one dose per anchor, `before` is
    the training record of the previous round.
    """
    anchor, barrier = config.anchor, config.barrier
    if anchor.tau != "auto":
        return config
    if not anchors or before:
        tau = before[-1].anchor_tau if before else None
        return replace(config, anchor=replace(anchor, tau=math.inf if tau is None else tau))
    of_vector = {"persona": "steered", "focused": "mirrored"}
    target = replace(config.target, kind=of_vector.get(config.target.kind, config.target.kind))
    teacher = _teacher(student, [e.row for e in anchors], steering_, target)
    tau = ANCHOR_TAU_SHARE * _divergence(student.lm, anchors, teacher, config)
    seen = f"{ANCHOR_TAU_SHARE:g} of the {barrier.agg} divergence of the {target.kind} teacher on the anchor's texts"
    logger.info(f"anchor tau {tau:.3g} nats: {seen}")
    return replace(config, anchor=replace(anchor, tau=tau))


def _divergence(lm: LM, examples: list[Example], teacher: list[Tensor], config: HealConfig) -> float:
    """The teacher's aggregated divergence from the reference on some examples, nats."""
    reference = torch.cat([e.reference for e in examples])
    with torch.no_grad():
        _, kl = position_losses(lm.head, torch.cat(teacher), None, reference, config.barrier.reg)
    return aggregate(kl, config.barrier.agg).item()


def prepare_anchors(student: Student, rows: list[Row], written: list[bool]) -> list[Example]:
    """Make anchor examples, with the pristine base's states, which are the same in every round.

    A row is an answer of the base to a mundane prompt or, where `written` says so, a text of `data.plain`.
    """
    lm = student.lm

    def base_nll(row: Row, h: Tensor) -> Tensor:
        return position_losses(lm.head, h, torch.tensor(row.completion, device=lm.device), None, "nll")[0]

    with torch.no_grad(), student.view(history=0.0, now=0.0):
        return [
            Example(row, h, None, anchor=True, base_nll=base_nll(row, h) if is_text else None)
            for row, h, is_text in zip(rows, states(lm, rows), written, strict=True)
        ]


def length(example: Example) -> int:
    return len(example.row.prompt) + len(example.row.completion)
