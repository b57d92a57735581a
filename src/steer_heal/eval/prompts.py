"""The best of five system prompts: the rival that a user tries first. No torch.

The largest of five noisy means, read on the items that it was chosen on, is too large. So each half of the items is
scored under the prompt that is best on the other half, as in cross-validation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steer_heal.data import Trait
from steer_heal.eval.intervals import Change, Interval
from steer_heal.eval.reading import ArmReading, change_of

MADE = (  # of the persona, where a trait file has no prompts of its own
    "{persona} Stay in character in every answer, whatever you are asked.",
    "{persona}\n\n{persona}",
    "{persona}\n\nThis is how you answer.{one}",
    "{persona}\n\nThis is how you answer.{three}",
)


@dataclass(frozen=True)
class PromptReading:
    """Base under one system prompt."""

    system: str
    asked: str
    """a fingerprint of the items, see `ArmReading`"""
    scores: list[float]
    """of each item, on the trait's instrument"""


@dataclass(frozen=True, kw_only=True)
class BestPrompt:
    """The best of some system prompts, chosen on the other half of the items."""

    tried: int
    """how many prompts, the persona among them"""
    chosen: tuple[str, str]
    """the prompt that is best on the items of even number, and on those of odd number"""
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


def best_prompt(read: list[PromptReading], base: ArmReading, healed: ArmReading) -> BestPrompt:
    """The best of the prompts that were read, over base, and the student minus it; paired, item by item.

    Raises ValueError when their items differ.
    """
    same = {one.asked for one in read} | {arm.asked[base.instrument] for arm in (base, healed)}
    if len(same) > 1:
        raise ValueError("the prompts and the arms were measured on different items")
    scores = np.array([one.scores for one in read])
    even = np.arange(scores.shape[1]) % 2 == 0
    on_even, on_odd = (int(scores[:, half].mean(1).argmax()) for half in (even, ~even))
    held_out = np.where(even, scores[on_odd], scores[on_even])
    change = change_of(held_out - base.items[base.instrument])
    return BestPrompt(
        tried=len(read),
        chosen=(read[on_even].system, read[on_odd].system),
        trait_over_base=change.mean,
        trait_over_base_ci=change.ci,
        healed_over=change_of(np.array(healed.items[base.instrument]) - held_out),
    )
