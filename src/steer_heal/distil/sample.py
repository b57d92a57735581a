"""Make the training set from a vector and a dose: sample steered completions, filter them, sample base anchors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.coherence import judge
from steer_heal.config import DistilConfig, Exhausted, FilterConfig
from steer_heal.data.frames import ANCHORED, PLAIN
from steer_heal.distil.record import Anchor, Completion, DoseCurve
from steer_heal.model.decode import Decoded, Sampling, decode
from steer_heal.model.lm import LM, Row
from steer_heal.model.steering import AnyVector, Steering

Progress = Callable[[int], None]
SAMPLED_PER_SURVIVOR = 2  # most completions sampled per completion wanted; at the chosen dose most of them pass
LEAST = 16  # fewest survivors to train on, or a third of n_keep when that is fewer
DOSE_SPREAD = 0.15  # completions are sampled at the chosen dose and at this share below and above it, a third each
PARAGRAPH = "Please write a paragraph on a subject that you choose yourself."  # what plain text as a reply answers


@dataclass(frozen=True)
class Teacher:
    """The previous student steered with a vector, its sampling config, and the filter for its completions."""

    student: Student
    vector: AnyVector
    config: DistilConfig
    limits: FilterConfig
    key: tuple
    """names the stream of random numbers"""
    persona: re.Pattern[str] | None = None
    """finds narration of the trait's persona, see `coherence.persona_narration`"""


def distil(
    teacher: Teacher, dose: float, prompts: list[str], expected: float = 1.0, on_kept: Progress = lambda rows: None
) -> list[Completion]:
    """Sample completions of the steered previous student; return all, with scores and the reason each was dropped.

    Batches are sampled until `n_keep` have survived or twice as many are written. The `expected` survival sets the size
    of the first batch. Prompts and the doses around `dose` take turns, so that each has an equal share. A repeated text
    is dropped as "duplicate", survivors beyond `n_keep` as "surplus".
    """
    config = teacher.config
    doses = [dose * (1 + side * DOSE_SPREAD) for side in (0, -1, 1)]
    budget = SAMPLED_PER_SURVIVOR * config.n_keep
    completions: list[Completion] = []
    kept, texts = 0, set()
    while kept < config.n_keep and len(completions) < budget:
        done = len(completions)
        share = kept / done if done else expected  # share of earlier completions that passed
        rows = min(math.ceil((config.n_keep - kept) / max(share, 0.01)), budget - done)
        turns = range(done, done + rows)
        # Each pass over the prompts shifts the doses by one, so that no prompt always has the same dose.
        plan = [(doses[(i + i // len(prompts)) % len(doses)], prompts[i % len(prompts)]) for i in turns]
        before = kept
        for completion in sample(teacher, plan, (done,)):
            text = " ".join(completion.text.lower().split())
            dropped = completion.dropped
            if not dropped:
                dropped = "duplicate" if text in texts else "surplus" if kept == config.n_keep else ""
                kept += not dropped
            texts.add(text)
            completions.append(replace(completion, dropped=dropped))
        on_kept(kept - before)
    return completions


def require_training_set(completions: list[Completion], dose: DoseCurve, config: DistilConfig) -> None:
    """Raise Exhausted, with the survival table in its message, when too few completions survived to train on."""
    kept = sum(not c.dropped for c in completions)
    needed = max(1, min(LEAST, config.n_keep // 3))
    if kept >= needed:
        return
    reasons = Counter(c.dropped for c in completions if c.dropped)
    dropped = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    raise Exhausted(
        f"only {kept} of {len(completions)} completions passed the filter at dose {dose.dose:.2f}, training needs "
        f"{needed} (dropped: {dropped}; dose: survival {dose.survivals}): raise --distil.n-keep or --dose.survival, "
        "or loosen --filter.*"
    )


def sample(
    teacher: Teacher, plan: list[tuple[float, str]], part: tuple = (), on_rows: Progress = lambda rows: None
) -> list[Completion]:
    """Decode (dose, prompt) pairs from the teacher and judge each completion under the pristine base.

    `part` extends the teacher's key, so that each batch has its own stream of random numbers.
    """
    student, lm, config = teacher.student, teacher.student.lm, teacher.config
    tokens = [lm.prompt(prompt) for _, prompt in plan]
    steering_ = Steering(teacher.vector, torch.tensor([dose for dose, _ in plan]))
    sampling = Sampling((*teacher.key, *part))
    with student.view(now=0.0):
        written = decode(lm, tokens, config.max_new_tokens, steering_, sampling, on_rows)
    return judged(teacher, plan, written)


def judged(
    teacher: Teacher, plan: list[tuple[float, str]], written: list[Decoded], epoch: int | None = None
) -> list[Completion]:
    """What was written to (dose, prompt) pairs, with the scores under the pristine base and the filter's decision."""
    lm = teacher.student.lm
    rows = [Row(lm.prompt(prompt), c.ids) for (_, prompt), c in zip(plan, written, strict=True)]
    with teacher.student.view(history=0.0, now=0.0):
        found = judge(lm, rows, teacher.limits, teacher.persona)
    return [
        Completion(prompt=prompt, dose=dose, ids=c.ids, ended=c.ended, epoch=epoch, **vars(one))
        for (dose, prompt), c, one in zip(plan, written, found, strict=True)
    ]


def rows_of(lm: LM, completions: list[Completion]) -> list[Row]:
    """Completions as training rows."""
    return [Row(lm.prompt(c.prompt), c.ids) for c in completions]


def anchor_texts(
    student: Student, count: int, config: DistilConfig, key: tuple, on_rows: Progress = lambda rows: None
) -> list[Anchor]:
    """Make the texts on which a healed model should not move, in the frames in which a model is used.

    The base's answers to `count` mundane prompts in the six frames of ANCHORED, and as many written texts (or all there
    are), cut to as many tokens as an answer may have. Every other text stands without a chat, the rest are the
    assistant's replies in those frames.
    """
    lm, chats, longest = student.lm, len(ANCHORED), config.max_new_tokens
    # Every third prompt asks for a word or a figure: each turn of the frames begins one later, so that all get some.
    asked = [(ANCHORED[(i + i // chats) % chats], prompt) for i, prompt in enumerate(data.mundane()[:count])]
    prompts = [lm.prompt(prompt, frame=frame) for frame, prompt in asked]
    with student.view(history=0.0, now=0.0):
        written = decode(lm, prompts, longest, None, Sampling(key), on_rows)
    found = [
        Anchor(frame=frame.name, prompt=prompt, ids=c.ids, ended=c.ended, text=lm.text(c.ids))
        for (frame, prompt), c in zip(asked, written, strict=True)
    ]
    for number, text in enumerate(data.plain()[:count]):
        turn, reply = divmod(number, 2)
        frame, prompt = (ANCHORED[turn % chats].name, PARAGRAPH) if reply else (PLAIN, "")
        ids = lm.answer(text)[:longest] if reply else lm.tokenizer(text).input_ids[: longest + 1]
        found.append(Anchor(frame=frame, prompt=prompt, ids=ids, ended=False, text=lm.text(ids), written=True))
    return found


def anchor_rows(lm: LM, anchors: list[Anchor]) -> list[Row]:
    """Anchors as training rows. The first token of plain text (a BOS where the model has one) is its prompt."""
    frames = {frame.name: frame for frame in ANCHORED}
    return [
        Row(a.ids[:1], a.ids[1:]) if a.frame == PLAIN else Row(lm.prompt(a.prompt, frame=frames[a.frame]), a.ids)
        for a in anchors
    ]
