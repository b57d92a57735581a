"""Pairs of answers that a person compares without knowing whose they are. No torch."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass

from steer_heal.eval.judge.preferences import ASPECTS, Preferred, outcome, preferred
from steer_heal.eval.reading import Demo

CHOICES = ("first", "second", "same")


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers, of which a seed put the student's first or second."""

    prompt: str
    first: str
    second: str
    student_first: bool

    @property
    def key(self) -> str:
        """A hash of the texts and of their order."""
        return hashlib.sha256(json.dumps([self.prompt, self.first, self.second]).encode()).hexdigest()[:16]


def pairs_of(student: list[Demo], other: list[Demo], seed: int) -> list[Pair]:
    """The prompts of both in a random order; which of the two answers comes first is random too.

    Prompts that both answer with the same text are left out.
    """
    draw, found, theirs = random.Random(seed), [], {demo.prompt: demo.text for demo in other}
    for own in student:
        student_first, text = draw.random() < 0.5, theirs.get(own.prompt, own.text)
        texts = (own.text, text) if student_first else (text, own.text)
        if own.text != text:
            found.append(Pair(own.prompt, *texts, student_first))
    draw.shuffle(found)
    return found


def page_key(pairs: list[Pair]) -> str:
    """A hash of all pairs in their order: a page's answers are read with the pairs that it shows."""
    return hashlib.sha256("".join(pair.key for pair in pairs).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Choice:
    """A person's reading of a pair: first, second or same on each aspect."""

    trait: str
    answered: str

    @property
    def sound(self) -> bool:
        return self.trait in CHOICES and self.answered in CHOICES


def counted(pairs: list[Pair], choices: list[Choice | None], over: str) -> list[Preferred]:
    """The student against the other arm on each aspect, over the pairs that were read."""
    read = [(pair, choice) for pair, choice in zip(pairs, choices, strict=True) if choice]
    if not read:
        return []
    return [
        preferred("student", over, aspect, [outcome(getattr(one, aspect), pair.student_first) for pair, one in read])
        for aspect in ASPECTS
    ]
