"""Instruments: did the trait move, did coherence hold.

All are deterministic, read log-probabilities or greedy text, and compare arms (base, prompted, steered, healed) on the
same items. An arm is a view of the model plus, perhaps, a system prompt or a steering vector.

* Contrast (primary): a question with two answers that differ in the trait alone; the score is the log-probability per
  token of the trait answer minus that of its opposite, in nats per token. It needs no instruction following, so it
  works from 135M parameters up.
* Yes/no self-report (secondary): log-odds of yes against no times the question's polarity, in nats. The probability
  mass on the two answers is a canary for coherence whatever the trait does.
* Coherence: greedy demo answers judged by the filter, and perplexity of neutral text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from steer_heal.bake import Student
from steer_heal.bootstrap import interval
from steer_heal.choices import choice_log_probs
from steer_heal.coherence import judge
from steer_heal.config import EvalConfig, FilterConfig
from steer_heal.data import Trait, YesNo, neutral
from steer_heal.generate import decode
from steer_heal.lm import LM, AnyVector, Row, Steering, row_nll

YES = ("Yes", "yes", "YES", " Yes", " yes", " YES")
NO = ("No", "no", "NO", " No", " no", " NO")
YES_NO_FORM = "{question} Answer with one word, yes or no."


@dataclass(frozen=True)
class Arm:
    """Which model is measured: gate of the adapter history, system prompt, steering vector and dose."""

    name: str
    history: float = 1.0
    now: float = 1.0
    system: str | None = None
    vector: AnyVector | None = None
    dose: float = 0.0

    def steering(self, rows: int) -> Steering | None:
        return None if self.vector is None else Steering(self.vector, torch.full((rows,), self.dose))


def evaluate(
    student: Student,
    arm: Arm,
    trait: Trait,
    config: EvalConfig,
    limits: FilterConfig,
    on_items: Callable[[int], None] = lambda items: None,
) -> dict:
    """All instruments on one arm.

    Returns the arm's means with 95% intervals, the per-item scores under "items" (so that later arms are compared item
    by item), and the demo answers with their scores under "demos".
    """
    lm = student.lm
    with student.view(history=arm.history, now=arm.now):
        contrast = contrast_scores(lm, arm, trait, config)
        on_items(len(contrast))
        log_odds, mass = yes_no_scores(lm, arm, trait.yes_no[: config.yes_no], config.batch_size)
        log_odds = trait.direction * log_odds
        on_items(len(mass))
        neutral_nll = neutral_scores(lm, arm, config)
        on_items(len(neutral_nll))
        asked = [lm.prompt(p, arm.system) for p in trait.demo_prompts[: config.demos]]
        written = decode(lm, asked, config.demo_tokens, config.batch_size, arm.steering(len(asked)), on_batch=on_items)
    plain = [lm.prompt(p) for p in trait.demo_prompts[: config.demos]]
    with student.view(history=0.0, now=0.0):
        demos = judge(lm, [Row(p, c.ids) for p, c in zip(plain, written, strict=True)], limits, config.batch_size)
    demos = [{"prompt": p, **d} for p, d in zip(trait.demo_prompts, demos, strict=False)]
    primary = contrast if trait.instrument == "contrast" else log_odds
    return {
        "arm": arm.name,
        "instrument": trait.instrument,
        "dose": arm.dose,
        "trait_nats": float(primary.mean()),
        "trait_ci": interval(primary),
        "yes_no_nats": float(log_odds.mean()),
        "yes_no_ci": interval(log_odds),
        "answer_mass": float(mass.mean()),
        "answer_mass_ci": interval(mass),
        "demo_kept_share": sum(not d["dropped"] for d in demos) / len(demos),
        "demo_ppl": math.exp(np.mean([math.log(d["ppl"]) for d in demos])),
        "neutral_ppl": math.exp(neutral_nll.mean()),
        "items": {
            "contrast": contrast.tolist(),
            "yes_no": log_odds.tolist(),
            "mass": mass.tolist(),
            "neutral_nll": neutral_nll.tolist(),
        },
        "demos": demos,
    }


def contrast_scores(lm: LM, arm: Arm, trait: Trait, config: EvalConfig) -> np.ndarray:
    """Log-probability per token of the trait answer minus its opposite, nats per token, one a probe."""
    probes = trait.contrast[: config.contrast]
    prompts = [lm.prompt(p.question, arm.system) for p in probes]
    answers = [[lm.answer(p.trait), lm.answer(p.opposite)] for p in probes]
    scored = choice_log_probs(lm, prompts, answers, config.batch_size, arm.steering(len(probes)))
    per_token = np.array([[answer.double().mean().item() for answer in pair] for pair in scored])
    return trait.direction * (per_token[:, 0] - per_token[:, 1])


def yes_no_scores(lm: LM, arm: Arm, probes: tuple[YesNo, ...], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(polarity * log-odds of yes in nats, probability mass on yes and no), one each a probe."""
    rows = [Row(lm.prompt(YES_NO_FORM.format(question=p.question), arm.system), [0]) for p in probes]
    states = torch.cat(lm.states(rows, batch_size, arm.steering(len(rows))))
    with torch.no_grad():
        logp = lm.head(states).log_softmax(-1)
    yes, no = (logp[:, first_tokens(lm, spellings)].logsumexp(-1).double().cpu() for spellings in (YES, NO))
    polarity = torch.tensor([1.0 if p.trait_answer == "yes" else -1.0 for p in probes], dtype=torch.float64)
    return (polarity * (yes - no)).numpy(), (yes.exp() + no.exp()).numpy()


def first_tokens(lm: LM, spellings: tuple[str, ...]) -> list[int]:
    """The distinct first tokens of the spellings, those aside that stand for a bare space or a single letter."""
    first = {lm.answer(s)[0] for s in spellings}
    return sorted(t for t in first if len(lm.tokenizer.decode([t]).strip()) > 1) or sorted(first)


def neutral_scores(lm: LM, arm: Arm, config: EvalConfig) -> np.ndarray:
    """Mean NLL per token of each neutral text, nats; read as plain text after the first token, without a chat frame."""
    texts = [lm.tokenizer(text).input_ids for text in neutral()[: config.neutral]]  # with a BOS where the model has one
    rows = [Row(ids[:1], ids[1:]) for ids in texts]
    nll = row_nll(lm, rows, config.batch_size, arm.steering(len(rows)))
    return np.array([row.double().mean().item() for row in nll])
