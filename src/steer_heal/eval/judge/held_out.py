"""Prompts that a run has used for nothing: no training, no vector and no probe has seen them. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from steer_heal.config import RunConfig, UserError
from steer_heal.data import Trait, canary, contexts, mundane, normalised, pool, spread


@dataclass(frozen=True)
class HeldOut:
    """A message that the arms answer."""

    text: str
    everyday: bool
    """whether the trait is a manner in its answer and not the topic"""


def held_out(trait: Trait, config: RunConfig, count: int, everyday: int) -> list[HeldOut]:
    """`count` prompts of the trait and `everyday` plain ones, the same for every arm and every call.

    Those of the trait are its demo prompts, on which relevance is read too, and then prompts of the shared pool. The
    plain ones are everyday prompts of the trait and of the pool, and then plain questions.

    Raises UserError when the run has left fewer.
    """
    used = _used(trait, config)
    demos = _unused(trait.demo_prompts, used)
    others = _unused((*pool("demo"), *pool("probe"), *pool("generation")), used | {*map(normalised, demos)})
    if len(demos) + len(others) < count:
        there = f"this run has left {len(demos) + len(others)} prompts of its trait unused"
        raise UserError(f"{count} held-out prompts are wanted, and {there}: ask for at most as many")
    chosen = [*demos[:count], *spread(others, count - len(demos[:count]))]
    used |= {*map(normalised, chosen)}
    plain = _unused((*trait.everyday_prompts, *pool("everyday")), used)
    questions = _unused([row["question"] for row in canary()], used)
    plain = [*spread(plain, everyday), *spread(questions, max(0, everyday - len(plain)))]
    return [*(HeldOut(text, False) for text in chosen), *(HeldOut(text, True) for text in plain)]


def _used(trait: Trait, config: RunConfig) -> set[str]:
    """What the run has trained on, read its vectors of, or probes with, normalised."""
    trained = trait.generation_prompts if config.heal.text == "own" else trait.asked_of_teacher
    anchored = mundane() if config.heal.anchor.prompts else ()
    probes = [probe.question for probe in (*trait.contrast, *trait.questions)]
    return {*map(normalised, (*trained, *anchored, *contexts()[: config.steer.n_contexts], *probes))}


def _unused(texts: Iterable[str], used: set[str]) -> list[str]:
    """The texts that are not used, each once."""
    found = {normalised(text): text for text in texts}
    return [text for key, text in found.items() if key not in used]
