"""The best of five system prompts: the rival that a user tries first. No torch.

The largest of five noisy means, read on the items that it was chosen on, is too large. So the prompt is chosen on every
fifth item and measured on the others. That takes less than half of the time of whole readings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from steer_heal.config import Counts
from steer_heal.data import Item, Trait
from steer_heal.eval.intervals import Change, Interval
from steer_heal.eval.reading import ArmReading, change_of

EVERY = 5  # the prompt is chosen on every fifth item; odd, because yes/no questions may take turns
MADE = (  # of the persona, where a trait file has no prompts of its own
    "{persona} Stay in character in every answer, whatever you are asked.",
    "{persona}\n\n{persona}",
    "{persona}\n\nThis is how you answer.{one}",
    "{persona}\n\nThis is how you answer.{three}",
)


@dataclass(frozen=True, kw_only=True)
class PromptsReading:
    """Base under some system prompts: all of them on every fifth item, the best on the others."""

    asked: str
    """a fingerprint of all items, see `ArmReading`"""
    systems: list[str]
    """the positive persona first"""
    tried: list[list[float]]
    """for each prompt the scores of every fifth item, on the trait's instrument"""
    scores: list[float]
    """of the other items, under the best prompt"""


@dataclass(frozen=True, kw_only=True)
class BestPrompt:
    """The best of some system prompts, on the items that it was not chosen on."""

    tried: int
    """how many prompts, the persona among them"""
    system: str
    """the best"""
    trait_over_base: float
    trait_over_base_ci: Interval
    healed_over: Change
    """the student of the last round minus this"""


def other_prompts(trait: Trait, answers: list[tuple[str, str]]) -> list[str]:
    """System prompts beside the persona: the trait file's own, else four made of the persona.

    Two of those have examples: the first of `answers`, pairs of a prompt and base's answer to it under the persona.
    """
    shown = [f'\nSomebody says: "{asked}" You reply: "{said}"' for asked, said in answers[:3]]
    made = (text.format(persona=trait.positive, one=shown[0], three="".join(shown)) for text in MADE)
    return list(trait.prompts or made)


def parts(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Every fifth item, on which a prompt is chosen, and the others, on which it is measured."""
    return items[::EVERY], [item for place, item in enumerate(items) if place % EVERY]


def part_of(trait: Trait, counts: Counts, part: int) -> Trait:
    """The trait with one part of the probes that are read, see `parts`."""
    contrast, yes_no = list(trait.contrast[: counts.contrast]), list(trait.yes_no[: counts.yes_no])
    return replace(trait, contrast=tuple(parts(contrast)[part]), yes_no=tuple(parts(yes_no)[part]))


def best_of(tried: list[list[float]]) -> int:
    """Which prompt has the highest mean score; the first of equals."""
    return int(np.mean(tried, axis=1).argmax())


def best_prompt(read: PromptsReading, base: ArmReading, healed: ArmReading) -> BestPrompt:
    """The best of the prompts that were read, over base, and the student minus it; paired, item by item.

    Raises ValueError when the arms' items are others.
    """
    name = base.instrument
    if {read.asked, base.asked[name], healed.asked[name]} != {read.asked}:
        raise ValueError("the prompts and the arms were measured on different items")
    before, after = (np.array(parts(arm.items[name])[1]) for arm in (base, healed))
    change = change_of(np.array(read.scores) - before)
    return BestPrompt(
        tried=len(read.systems),
        system=read.systems[best_of(read.tried)],
        trait_over_base=change.mean,
        trait_over_base_ci=change.ci,
        healed_over=change_of(after - np.array(read.scores)),
    )
