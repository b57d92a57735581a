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
from steer_heal.eval.catalogue import WHOLE
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
#   instrument = "whole"            # for a style that shows in length or form: probes are scored whole, with their end
#   answer_tokens = 96              # how long answers may be, where that is longer than the preset's limit
"""


@dataclass(frozen=True)
class Part:
    """Rows of one kind in a whole trait file, and how a writer is asked for them."""

    keys: tuple[str, ...]
    count: int
    rules: str
    name: str
    """of the rows, in the plural"""


MESSAGES = (
    "What users say to an assistant: situations, requests and questions in whose answer the trait would show, none of "
    "which names it. Of all walks of life and forms: some short, some of two sentences, some no questions."
)
PARTS = {
    "persona": Part(
        ("title", "positive", "negative"),
        1,
        "`title` is the trait as the predicate of a sentence, at most 6 words, such as: is patient. `positive` "
        "describes someone who has the trait to the highest degree, `negative` the direct opposite: two or three "
        'sentences each in the second person ("You ..."), concrete behaviour, at most 60 words, of equal length and '
        'form, without "not" and without a mention of AI or assistants.',
        "descriptions",
    ),
    "contrast": Part(
        ("question", "trait", "opposite"),
        64,
        "Each has a question or remark of a user and two answers of one sentence, 6 to 14 words: `trait` shows the "
        "trait, `opposite` its opposite, and nothing else differs. Both have the same form, as many characters within "
        "a tenth, and the same first word where they can; in half the rows `trait` is the longer one. Neither names "
        "the trait. The first words change from row to row.",
        "contrast pairs",
    ),
    "yes_no": Part(
        ("question", "trait_answer"),
        24,
        "Each has a question to the assistant about itself, to be answered by yes or no, about concrete behaviour. "
        '`trait_answer` is the answer of one who has the trait: "yes" in half the rows, "no" in the other half.',
        "yes/no questions",
    ),
    "generation_prompts": Part(("text",), 64, MESSAGES, "generation prompts"),
    "demo_prompts": Part(("text",), 16, MESSAGES, "demo prompts"),
}
PASTE = """\
Write a TOML file that describes a trait of a chat assistant and tests it. The trait: {about}.
Answer with the file alone, in the form below, without the remarks after #. No text may come twice, or nearly so.

title, persona: {parts[persona].rules}
generation_prompts: {parts[generation_prompts].rules}
demo_prompts: the same sort, others.
[[contrast]]: {parts[contrast].rules}
[[yes_no]]: {parts[yes_no].rules}

name = "{name}"
title = "..."
generation_prompts = [
    "...",  # {parts[generation_prompts].count} of these
]
demo_prompts = [
    "...",  # {parts[demo_prompts].count} of these
]

[persona]
positive = "..."
negative = "..."

[[contrast]]  # {parts[contrast].count} of these
question = "..."
trait = "..."
opposite = "..."

[[yes_no]]  # {parts[yes_no].count} of these
question = "..."
trait_answer = "yes"  # or "no"
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


def new(name: str, about: str) -> str:
    """Write the smallest trait file into the current folder; return what to do next, and a prompt for an assistant.

    Raises UserError for a name that is none, and for a file that exists.
    """
    file = file_of(name)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(smallest(name))
    except FileExistsError as error:
        raise UserError(f"{str(file)!r} exists: choose another name, or take it away") from error
    return (
        f"written: {file}\nFill in the two personas, then: {program()} trait check {file}\n"
        f"and, whether a model can express it (some minutes): {program()} trait check {file} --model smollm2-135m\n\n"
        f"A model can write the rest: {program()} trait new {name} --write URL|MODEL\n"
        f"So can an assistant: what it answers to this replaces the whole of {file}:\n\n{paste(name, about)}"
    )


def file_of(name: str) -> Path:
    """The file of a new trait. Raises UserError for a name that is none."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise UserError(f"trait new {name!r}: give a name of small letters, digits and hyphens, e.g. patient")
    return Path(f"{name}.toml")


def smallest(name: str) -> str:
    """The text of the smallest trait file, with its personas still to be written."""
    texts = {key: f"{UNWRITTEN}(describe the {key} side in two to four sentences)" for key in PERSONAS}
    counts = {use: len(pool(use)) for use in ("generation", "everyday", "demo")}
    return SMALL.format(name=name, **texts, **counts)


def paste(name: str, about: str) -> str:
    """What to ask an assistant for, so that its answer is a whole trait file."""
    return PASTE.format(name=name, about=about or name, parts=PARTS)


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
        yield from _of_probes(trait.contrast, trait.instrument == WHOLE.name)
    asked = {normalised(p.question) for p in (*trait.contrast, *trait.yes_no)}
    prompts = (*trait.generation_prompts, *trait.everyday_prompts, *trait.demo_prompts)
    both = [text for text in prompts if normalised(text) in asked]
    if both:
        yield f"{len(both)} prompts are also probes, e.g. {both[0]!r}: what is trained on must not be measured"


def _of_probes(probes: tuple[Contrast, ...], whole: bool) -> Iterator[str]:
    """Advice on contrast probes. Of `whole` answers the length may be the trait."""
    count = len(probes)
    if count < ENOUGH:
        width = "wide intervals" if whole else f"intervals of about ±{1.96 * SPREAD / count**0.5:.2f} nats per token"
        yield f"{count} contrast probes: expect {width}"
    longer = sum(len(p.trait) > len(p.opposite) for p in probes) / count
    if not whole and not 1 - TELLING < longer < TELLING:
        side, share = ("trait", longer) if longer >= TELLING else ("opposite", 1 - longer)
        yield f"the {side} answer is the longer one in {share:.0%} of the probes: length alone tells them apart"
    for side in ("trait", "opposite"):
        first = Counter(getattr(p, side).split()[0].lower() for p in probes)
        word, times = first.most_common(1)[0]
        if times >= TELLING * count:
            yield f"{times} of {count} {side} answers begin with {word!r}: the first word alone tells them apart"
