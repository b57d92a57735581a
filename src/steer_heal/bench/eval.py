"""Benchmark of the log-probability instruments against a plain loop: one forward pass per item and answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.config import EvalConfig
from steer_heal.eval.arms import Arm
from steer_heal.eval.foundations import BEGUN, question
from steer_heal.eval.instruments import NO, YES, YES_NO_FORM, evaluate, instruments, with_relevance
from steer_heal.model.dtype import dtype_of
from steer_heal.model.lm import LM
from steer_heal.model.loading import load
from steer_heal.presets import PRESETS

EVERY = 8  # the plain loop reads every eighth item; it would take half an hour otherwise
READ = ("contrast", "yes_no", "off_target", "canary", "profile")


@dataclass(frozen=True)
class Item:
    """A prompt and the answers that are scored after it."""

    prompt: list[int]
    answers: list[list[int]]


def instruments_bench(preset: str) -> dict:
    """Return items per second of both methods, and our seconds per instrument, on one arm.

    Both score the same answers after the same prompts, in float32 for a float32 model. The plain loop reads every
    eighth item of each instrument; its time is scaled up to all items. "ratio" is over all instruments in READ
    together, "ratios" has one per instrument.
    """
    lm, trait = load(PRESETS[preset].model), data.load_trait("love")
    config = EvalConfig()
    student, arm = Student(lm), Arm("bench", system=trait.positive)

    def ours(name: str) -> None:
        evaluate(student, arm, trait, config, [name])

    ours("yes_no")  # warm-up: the first pass also does one-time setup
    found: dict = {
        "model": PRESETS[preset].model.path,
        "dtype": dtype_of(lm),
        "items": {},
        "seconds": {},
        "ratios": {},
    }
    plain_total = 0.0
    for name in (name for name in instruments(config, at_end=True) if name != "relevance"):
        found["seconds"][name] = _seconds(lambda name=name: ours(name))
        if name in READ:
            items = list(questions(lm, trait, config, arm, name))
            sample = items[::EVERY]
            plain = _seconds(lambda sample=sample: [plainly(lm, item) for item in sample]) * len(items) / len(sample)
            found["items"][name] = len(items)
            found["ratios"][name] = plain / found["seconds"][name]
            plain_total += plain
    answered = evaluate(student, arm, trait, config, ["demos"])
    found["seconds"]["relevance"] = _seconds(lambda: with_relevance(student, answered, config))
    mine, count = sum(found["seconds"][name] for name in READ), sum(found["items"].values())
    found |= {"items_per_s": count / mine, "plain_items_per_s": count / plain_total, "ratio": plain_total / mine}
    core = ("contrast", "yes_no", "neutral", "demos")
    return found | {"core_seconds": sum(found["seconds"][name] for name in core)}


def questions(lm: LM, trait: data.Trait, config: EvalConfig, arm: Arm, name: str) -> Iterable[Item]:
    """Yield the items of an instrument for the plain loop; those of the profile twice, in both orders of the labels."""
    match name:
        case "contrast" | "off_target":
            others = data.bystanders(trait.name, config.counts.off_target)
            groups = {name: trait.contrast} if name == "contrast" else others
            for probe in (probe for group in groups.values() for probe in group):
                yield Item(lm.prompt(probe.question, arm.system), [lm.answer(probe.trait), lm.answer(probe.opposite)])
        case "yes_no":
            spelled = lm.template.spellings((*YES, *NO))
            for probe in trait.yes_no[: config.counts.yes_no]:
                yield Item(lm.prompt(YES_NO_FORM.format(question=probe.question), arm.system), spelled)
        case "canary":
            for q in data.spread(data.canary(), config.counts.canary):
                yield Item(lm.prompt(q["question"], arm.system), [lm.answer(a) for a in (q["right"], *q["wrong"])])
        case "profile":
            names = tuple(data.FOUNDATIONS)
            labels = [lm.answer(f" {label}", BEGUN) for label in names]
            for row in data.vignettes():
                for order in (names, names[::-1]):
                    yield Item(lm.prompt(question(row["see"], order), arm.system) + lm.answer(BEGUN), labels)


def plainly(lm: LM, item: Item) -> list[float]:
    """Return the log-probability of each answer, with one forward pass and all its logits per answer."""
    found = []
    for answer in item.answers:
        with torch.no_grad():
            logits = lm.model(torch.tensor([item.prompt + answer], device=lm.device)).logits[0]
        at = torch.arange(len(item.prompt) - 1, len(item.prompt) + len(answer) - 1)
        found.append(logits[at].log_softmax(-1)[range(len(answer)), answer].sum().item())
    return found


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
