"""The verb `trait`: list and show built-in traits, begin a trait file, check one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steer_heal.config import UserError
from steer_heal.data import (
    BUILT_IN,
    PERSONAS,
    RENAMED,
    UNWRITTEN,
    Contrast,
    Trait,
    load_trait,
    normalised,
    pool,
    read_trait,
    trait_text,
)
from steer_heal.terminal import program

ENOUGH = 32  # probes with which an interval is narrow
SPREAD = 0.3  # standard deviation over a built-in trait's probes of what moves it, nats per token
TELLING = 0.8  # share of probes that length or first word may tell apart
SMALL = """\
# A trait: all it needs are a name and two personas. Run it with: steer-heal run MODEL --trait {name}.toml
name = "{name}"

# Who the model shall become, and the opposite. Describe behaviour, in the second person, in sentences of equal length,
# each the direct opposite of the other, without "not".
[persona]
positive = "{positive}"
negative = "{negative}"

# What may be added (steer-heal trait show love has examples of all):
#   title = "..."                   # as it reads in reports: "is patient"
#   generation_prompts = [...]      # asked in training, where the trait shows; default: a shared pool of {generation}
#   everyday_prompts = [...]        # asked of the steered teacher besides; default: a shared pool of {everyday}
#   demo_prompts = [...]            # answered for the report; default: a shared pool of {demo}
#   [[contrast]]                    # question, trait, opposite: probes; default: the model writes them itself
#   [[yes_no]]                      # question, trait_answer: questions about itself; default: none
"""
ASK = """\
Write two persona descriptions for a trait called "{name}", as values of a TOML file:
[persona]
positive = "..."   # someone who has the trait to the highest degree
negative = "..."   # the direct opposite
Each: two to four sentences in the second person ("You ..."), concrete behaviour, no more than 60 words, equal length
and form, no "not", no mention of AI or assistants.
"""


def listing() -> str:
    """The built-in traits, a line each."""
    rows = []
    for name in BUILT_IN:
        trait = load_trait(name)
        probes = f"{len(trait.contrast)} probes of its own" if trait.contrast else "the model writes the probes"
        rows.append(f"{name:<22}{trait.title} ({probes})")
    return "\n".join(rows)


def show(name: str) -> str:
    """The file of a built-in trait."""
    if RENAMED.get(name, name) not in BUILT_IN:
        raise UserError(f"trait {name!r} is not built in: choose {', '.join(BUILT_IN)}")
    return trait_text(name)[0]


def new(name: str) -> str:
    """Write the smallest trait file into the current folder; return what to do next.

    Raises UserError for a name that is none, and for a file that exists.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise UserError(f"trait new {name!r}: give a name of small letters, digits and hyphens, e.g. patient")
    file = Path(f"{name}.toml")
    texts = {key: f"{UNWRITTEN}(describe the {key} side in two to four sentences)" for key in PERSONAS}
    counts = {use: len(pool(use)) for use in ("generation", "everyday", "demo")}
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(SMALL.format(name=name, **texts, **counts))
    except FileExistsError as error:
        raise UserError(f"{str(file)!r} exists: choose another name, or take it away") from error
    return (
        f"written: {file}\nFill in the two personas, then: {program()} trait check {file}\n"
        f"and, whether a model can express it (some minutes): {program()} trait check {file} --model smollm2-135m\n\n"
        f"An assistant can draft them. Paste this:\n\n{ASK.format(name=name)}"
    )


@dataclass(frozen=True)
class Checked:
    """A trait file that was checked."""

    problems: list[str]
    """what must be mended before a run"""
    advice: list[str]
    """what makes a measurement wide or doubtful"""
    trait: Trait | None


def check(name_or_file: str) -> Checked:
    """Find everything that is wrong with a trait file, without a model."""
    text, source = trait_text(name_or_file)
    trait, found = read_trait(text)
    problems = [f"{source}{f', line {one.line}' if one.line else ''}{one.what}" for one in found]
    return Checked(problems, [] if trait is None else list(advice_of(trait)), trait)


def advice_of(trait: Trait) -> Iterator[str]:
    """Yield what makes the measurement of a trait wide or doubtful."""
    words = [len(text.split()) for text in (trait.positive, trait.negative)]
    if max(words) > 1.5 * min(words):
        yield f"the personas have {words[0]} and {words[1]} words: write them equally long, or length becomes the trait"
    if trait.contrast:
        yield from _of_probes(trait.contrast)
    asked = {normalised(p.question) for p in (*trait.contrast, *trait.yes_no)}
    prompts = (*trait.generation_prompts, *trait.everyday_prompts, *trait.demo_prompts)
    both = [text for text in prompts if normalised(text) in asked]
    if both:
        yield f"{len(both)} prompts are also probes, e.g. {both[0]!r}: what is trained on must not be measured"


def _of_probes(probes: tuple[Contrast, ...]) -> Iterator[str]:
    count = len(probes)
    if count < ENOUGH:
        yield f"{count} contrast probes: expect intervals of about ±{1.96 * SPREAD / count**0.5:.2f} nats per token"
    longer = sum(len(p.trait) > len(p.opposite) for p in probes) / count
    if not 1 - TELLING < longer < TELLING:
        side, share = ("trait", longer) if longer >= TELLING else ("opposite", 1 - longer)
        yield f"the {side} answer is the longer one in {share:.0%} of the probes: length alone tells them apart"
    for side in ("trait", "opposite"):
        first = Counter(getattr(p, side).split()[0].lower() for p in probes)
        word, times = first.most_common(1)[0]
        if times >= TELLING * count:
            yield f"{times} of {count} {side} answers begin with {word!r}: the first word alone tells them apart"
