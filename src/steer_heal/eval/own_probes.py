"""Contrast probes that the base writes about a trait: for traits that come without any.

The base answers questions under the positive and under the negative persona. The two answers to a question are a
contrast probe, which any arm is then scored on without a persona. A question is chosen by answers that are drawn at
random, and its probe is the pair of greedy answers, so that what is scored is not what was chosen by.

For a trait that is measured on whole answers the two may differ in length, and both must have ended by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from steer_heal.bake.student import Student
from steer_heal.coherence import judge, persona_narration
from steer_heal.config import FilterConfig, UserError
from steer_heal.data import LEAST_PROBES, Contrast, Trait
from steer_heal.eval.catalogue import WHOLE
from steer_heal.model.answers import choice_log_probs
from steer_heal.model.decode import Sampling, decode
from steer_heal.model.lm import LM, Row
from steer_heal.terminal import progress

TOKENS = 24  # of an answer
WHOLE_TOKENS = 96  # of an answer that must end by itself
LENGTHS = 1.5  # largest ratio of the two answers' tokens
ECHOES = 0.25  # largest share of an answer's words that are its persona's
MOST = 64  # probes
SOUND = ("", "boilerplate")  # what the filter may say of an answer; one that narrates its persona echoes it
DRAWS = Sampling(("own probes",))  # one stream for all seeds, so that they are measured on the same probes


class Pair(NamedTuple):
    """Token ids of a question's answers under the positive and under the negative persona.

    For whole answers they have the end token, where there is one.
    """

    trait: list[int]
    opposite: list[int]


def probed(student: Student, trait: Trait, limits: FilterConfig, questions: tuple[str, ...]) -> Trait:
    """The trait with contrast probes: its own, or those that the base writes."""
    if trait.contrast:
        return trait
    return replace(trait, contrast=tuple(own_probes(student, trait, limits, questions)))


def own_probes(student: Student, trait: Trait, limits: FilterConfig, questions: tuple[str, ...]) -> list[Contrast]:
    """Write up to 64 contrast probes with the pristine base, the most telling first. `questions` are those it answers.

    Both greedy answers must be coherent, of similar length, and not echo their persona. Of the questions that are left,
    those come first whose random answers the base best tells apart: nats per token by which each is likelier under its
    own persona than under the other. For whole answers that is nats per answer, and any length will do that ends.

    Raises UserError when fewer than 8 questions are left: too few answers end, or the base's two personas do not answer
    differently.
    """
    with student.view(history=0.0, now=0.0), progress("own probes", None, "answer") as done:
        lm = student.lm
        greedy = dict(zip(questions, _answers(lm, trait, questions, None, done), strict=True))
        if trait.instrument == WHOLE.name:
            greedy = _ended(lm, trait, greedy)
        asked = _sound(lm, trait, greedy, limits)
        apart = _separation(lm, trait, asked, _answers(lm, trait, asked, DRAWS, done)) if asked else {}
    found = sorted((question for question in asked if apart[question] > 0), key=lambda question: -apart[question])
    if len(found) < LEAST_PROBES:
        raise UserError(
            f"this model answers only {len(found)} of {len(questions)} questions differently, and in whole sentences, "
            f"under the two personas of {trait.name!r}: {LEAST_PROBES} probes are needed. Write personas that differ "
            "more, or [[contrast]] probes of your own, or take a larger model"
        )
    return [Contrast(question, *map(lm.text, greedy[question])) for question in found[:MOST]]


def _answers(
    lm: LM, trait: Trait, questions: tuple[str, ...], how: Sampling | None, on_answers: Callable[[int], None]
) -> list[Pair]:
    sides = []
    for persona in (trait.positive, trait.negative):
        prompts = [lm.prompt(question, persona) for question in questions]
        if trait.instrument == WHOLE.name:
            sides.append([answer.ids for answer in decode(lm, prompts, WHOLE_TOKENS, None, how, on_answers)])
        else:
            written = decode(lm, prompts, TOKENS, None, how, on_answers)
            sides.append([_sentences(lm, answer.ids) for answer in written])
    return [Pair(*both) for both in zip(*sides, strict=True)]


def _ended(lm: LM, trait: Trait, greedy: dict[str, Pair]) -> dict[str, Pair]:
    """The questions whose two answers end by themselves. Raises UserError when they are fewer than 8."""
    ended = {question: [ids[-1] in lm.end_tokens for ids in pair] for question, pair in greedy.items()}
    found = {question: pair for question, pair in greedy.items() if all(ended[question])}
    if len(found) < LEAST_PROBES:
        of_sides = [sum(sides) for sides in zip(*ended.values(), strict=True)]
        raise UserError(
            f"this model ends both of its answers within {WHOLE_TOKENS} tokens on only {len(found)} of {len(greedy)} "
            f"questions ({of_sides[0]} under the positive persona of {trait.name!r}, {of_sides[1]} under the negative "
            f"one): {LEAST_PROBES} whole answers are needed. Ask for shorter answers in both personas, write "
            "[[contrast]] pairs of your own, or leave instrument = 'whole' out"
        )
    return found


def _sentences(lm: LM, ids: list[int]) -> list[int]:
    """The answer up to the end of its last whole sentence, if there is one; an empty answer as a space."""
    text = lm.text(ids)
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s|$)", text)]
    return lm.answer((text[: ends[-1]] if ends else text) or " ")


def _sound(lm: LM, trait: Trait, greedy: dict[str, Pair], limits: FilterConfig) -> tuple[str, ...]:
    """The questions whose two answers are coherent, of similar length and different, and do not echo their persona.

    Whole answers may have any length.
    """
    persona, any_length = persona_narration(trait.positive, trait.negative, trait.title), trait.instrument == WHOLE.name
    coherent = []
    for side in range(2):
        rows = [Row(lm.prompt(question), pair[side]) for question, pair in greedy.items()]
        coherent.append([judged.dropped in SOUND for judged in judge(lm, rows, limits, persona)])
    found = []
    for one, other, (question, pair) in zip(*coherent, greedy.items(), strict=True):
        shorter, longer = sorted(map(len, pair))
        texts = [lm.text(ids) for ids in pair]
        echo = max(echoed(*both) for both in zip(texts, (trait.positive, trait.negative), strict=True))
        similar = any_length or longer <= LENGTHS * shorter
        if one and other and similar and echo <= ECHOES and texts[0] != texts[1]:
            found.append(question)
    return tuple(found)


def echoed(text: str, persona: str) -> float:
    """The share of a text's longer words that are in the persona's description as well."""
    words, own = ([w for w in re.findall(r"\w+", t.lower()) if len(w) > 4] for t in (text, persona))
    return sum(word in own for word in words) / max(1, len(words))


def _separation(lm: LM, trait: Trait, questions: tuple[str, ...], answers: list[Pair]) -> dict[str, float]:
    """For each question the nats by which both answers are likelier under their own persona, on average.

    They are nats per token, or of whole answers nats per answer; one that has not ended is scored as far as it goes.
    """
    under, score = [], torch.sum if trait.instrument == WHOLE.name else torch.mean
    for persona in (trait.positive, trait.negative):
        prompts = [lm.prompt(question, persona) for question in questions]
        scored = choice_log_probs(lm, prompts, [list(pair) for pair in answers])
        under.append([[score(answer.double()).item() for answer in pair] for pair in scored])
    pairs = zip(questions, *under, strict=True)
    return {question: (pos[0] - neg[0] + neg[1] - pos[1]) / 2 for question, pos, neg in pairs}
