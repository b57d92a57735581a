"""Contrast probes that the base writes about a trait: for traits that come without any.

The base answers questions under the positive and under the negative persona. The two answers to a question are a
contrast probe, which any arm is then scored on without a persona. A question is chosen by answers that are drawn at
random, and its probe is the pair of greedy answers, so that what is scored is not what was chosen by.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from steer_heal.bake.student import Student
from steer_heal.coherence import STYLES, judge, persona_narration
from steer_heal.config import FilterConfig, UserError
from steer_heal.data import Contrast, Trait
from steer_heal.model.answers import choice_log_probs
from steer_heal.model.decode import Sampling, decode
from steer_heal.model.lm import LM, Row

TOKENS = 24  # of an answer
LENGTHS = 1.5  # largest ratio of the two answers' tokens
ECHOES = 0.25  # largest share of an answer's words that are its persona's
MOST = 64  # probes
LEAST = 8  # fewer say nothing about a trait
DRAWS = Sampling(("own probes",))  # one stream for all seeds, so that they are measured on the same probes


class Pair(NamedTuple):
    """Token ids of a question's answers under the positive and under the negative persona."""

    trait: list[int]
    opposite: list[int]


def own_probes(
    student: Student,
    trait: Trait,
    limits: FilterConfig,
    questions: tuple[str, ...],
    on_answers: Callable[[int], None] = lambda answers: None,
) -> list[Contrast]:
    """Write up to 64 contrast probes with the pristine base, the most telling first. `questions` are those it answers.

    Both greedy answers must be coherent, of similar length, and not echo their persona. Of the questions that are left,
    those come first whose random answers the base best tells apart: nats per token by which each is likelier under its
    own persona than under the other.

    Raises UserError when fewer than 8 questions are left: the base's two personas do not answer differently.
    """
    with student.view(history=0.0, now=0.0):
        lm = student.lm
        greedy = _answers(lm, trait, questions, None, on_answers)
        sound = _sound(lm, trait, questions, greedy, limits)
        asked = tuple(question for question, fine in zip(questions, sound, strict=True) if fine)
        drawn = _answers(lm, trait, asked, DRAWS, on_answers) if asked else []
        apart = dict(zip(asked, _separation(lm, trait, asked, drawn), strict=True)) if asked else {}
    pairs = dict(zip(questions, greedy, strict=True))
    found = sorted((question for question in asked if apart[question] > 0), key=lambda q: -apart[q])
    if len(found) < LEAST:
        raise UserError(
            f"this model answers only {len(found)} of {len(questions)} questions differently, and in whole sentences, "
            f"under the two personas of {trait.name!r}: {LEAST} probes are needed. Write personas that differ more, or "
            "[[contrast]] probes of your own, or take a larger model"
        )
    return [Contrast(question, *(lm.text(ids) for ids in pairs[question])) for question in found[:MOST]]


def _answers(
    lm: LM, trait: Trait, questions: tuple[str, ...], how: Sampling | None, on_answers: Callable[[int], None]
) -> list[Pair]:
    sides = []
    for persona in (trait.positive, trait.negative):
        prompts = [lm.prompt(question, persona) for question in questions]
        sides.append([_whole(lm, answer.ids) for answer in decode(lm, prompts, TOKENS, None, how, on_answers)])
    return [Pair(*both) for both in zip(*sides, strict=True)]


def _whole(lm: LM, ids: list[int]) -> list[int]:
    """The answer up to the end of its last whole sentence, if there is one."""
    text = lm.text(ids)
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s|$)", text)]
    return lm.answer(text[: ends[-1]] if ends else text)


def _sound(lm: LM, trait: Trait, questions: tuple[str, ...], answers: list[Pair], limits: FilterConfig) -> list[bool]:
    """Whether both answers to a question are coherent, of similar length, different, and do not echo their persona."""
    persona = persona_narration(trait.positive, trait.negative, trait.title)
    coherent = []
    for side in range(2):
        rows = [Row(lm.prompt(q), pair[side] or lm.answer(" ")) for q, pair in zip(questions, answers, strict=True)]
        coherent.append([judged.dropped in ("", *STYLES[:1]) for judged in judge(lm, rows, limits, persona)])
    found = []
    for one, other, pair in zip(*coherent, answers, strict=True):
        lengths = sorted(map(len, pair))
        texts = [lm.text(ids) for ids in pair]
        echo = max(echoed(*both) for both in zip(texts, (trait.positive, trait.negative), strict=True))
        alike = lengths[0] > 0 and lengths[1] <= LENGTHS * lengths[0]
        found.append(one and other and alike and echo <= ECHOES and texts[0] != texts[1])
    return found


def echoed(text: str, persona: str) -> float:
    """The share of a text's longer words that are in the persona's description as well."""
    words, own = ([w for w in re.findall(r"\w+", t.lower()) if len(w) > 4] for t in (text, persona))
    return sum(word in own for word in words) / max(1, len(words))


def _separation(lm: LM, trait: Trait, questions: tuple[str, ...], answers: list[Pair]) -> list[float]:
    """For each question the nats per token by which both answers are likelier under their own persona, on average."""
    filled = [Pair(*(ids or lm.answer(" ") for ids in pair)) for pair in answers]
    under = []
    for persona in (trait.positive, trait.negative):
        prompts = [lm.prompt(question, persona) for question in questions]
        scored = choice_log_probs(lm, prompts, [list(pair) for pair in filled])
        under.append([[answer.double().mean().item() for answer in pair] for pair in scored])
    return [(pos[0] - neg[0] + neg[1] - pos[1]) / 2 for pos, neg in zip(*under, strict=True)]
