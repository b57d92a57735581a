"""The data written for this project: traits, extraction contexts, neutral text, mundane prompts.

A trait is a TOML file (see `Trait`); every other file is JSON lines.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from steer_heal.config import UserError, nearest

HERE = files(__name__)
BUILT_IN = ("love", "care-over-authority", "calm", "formal", "less-sycophantic")
RENAMED = {"authority": "care-over-authority"}  # names that older commands and folders have
PERSONAS = ("positive", "negative")
INSTRUMENTS = ("contrast", "yes_no", "whole")
LONGEST_NAME = 64  # characters of a trait's name
ANSWER_TOKENS = (8, 512)  # of `Trait.answer_tokens`
MOST_PROMPTS = 4  # of `Trait.prompts`
LEAST_PROBES = 8  # with fewer, the interval of a mean says nothing
UNWRITTEN = "You ... "  # begins the personas of a file that `trait new` wrote
PERSONA_WORDS = (4, 2000)  # fewest words of a persona, most characters
FOUNDATIONS = {  # foundations that a scene of the profile may breach, as the model reads them; norms is the control
    "care": "someone is hurt or treated coldly",
    "fairness": "someone cheats or takes more than their share",
    "loyalty": "someone turns against their own group",
    "authority": "someone defies a leader or an order",
    "sanctity": "something is disgusting or defiled",
    "liberty": "someone is bullied or controlled",
    "norms": "nothing is wrong, it is only unusual",
}


@dataclass(frozen=True)
class Contrast:
    """A question and two answers of equal form: one with the trait, one with its opposite."""

    question: str
    trait: str
    opposite: str


@dataclass(frozen=True)
class YesNo:
    """A self-report question; `trait_answer`, yes or no, is the answer that shows the trait."""

    question: str
    trait_answer: str


Probe = TypeVar("Probe", Contrast, YesNo)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Trait:
    """A trait to steer towards, and its probes. A trait file needs a name and both personas; see `parse_trait`."""

    name: str
    title: str
    instrument: str
    """what the trait is measured on: contrast, yes_no, or whole: contrast of whole answers with their end"""
    direction: int
    """+1 if the trait raises the score, -1 if it lowers it"""
    positive: str
    negative: str
    generation_prompts: tuple[str, ...]
    """in which the trait shows"""
    everyday_prompts: tuple[str, ...]
    """in which the trait is a manner and not the topic; the steered teacher answers them too, see `asked_of_teacher`"""
    demo_prompts: tuple[str, ...]
    contrast: tuple[Contrast, ...]
    """empty: the base writes them at the start of a run, see `eval.own_probes`"""
    yes_no: tuple[YesNo, ...]
    answer_tokens: int | None = None
    """tokens that the demo's and training's answers may have, where that is more than the config's"""
    prompts: tuple[str, ...] = ()
    """up to four more system prompts for the trait, a rival with the positive persona; empty: four are made of it"""

    @classmethod
    def from_personas(cls, name: str, positive: str, negative: str) -> Trait:
        """A trait of a name and two personas: system prompts for somebody who has it, and for the opposite.

        Raises UserError for what a trait file would be refused for.
        """
        words = (json.dumps(text, ensure_ascii=False) for text in (name, positive, negative))  # TOML reads them
        return parse_trait("name = {}\n[persona]\npositive = {}\nnegative = {}\n".format(*words), name)

    def answer_limit(self, tokens: int) -> int:
        """The larger of a limit and of the one that the trait asks for."""
        return max(tokens, self.answer_tokens or 0)

    @property
    def asked_of_teacher(self) -> tuple[str, ...]:
        """The generation prompts, and half as many everyday ones: the teacher's text shows the trait as a manner."""
        return self.generation_prompts + self.everyday_prompts[: len(self.generation_prompts) // 2]

    @property
    def questions(self) -> tuple[YesNo, ...]:
        """The yes/no questions on which answer mass is read: the trait's own, or plain ones."""
        return self.yes_no or tuple(YesNo(**row) for row in _records_of("yes_no"))


def load_trait(name_or_file: str) -> Trait:
    """Load a built-in trait by name, or the user's own by path.

    Raises UserError when there is no such trait, or when the file is incomplete or its trait cannot be measured.
    """
    return parse_trait(*trait_text(name_or_file))


def trait_text(name_or_file: str) -> tuple[str, str]:
    """The text of a trait file, and what it is called in errors. Raises UserError when it cannot be read."""
    name = RENAMED.get(name_or_file, name_or_file)
    if name in BUILT_IN:
        return (HERE / "traits" / f"{name}.toml").read_text("utf-8"), name
    path = Path(name_or_file).expanduser()
    if path.suffix == ".toml" and path.is_dir():
        raise UserError(f"trait {name_or_file!r} is a folder: give a .toml file")
    if path.suffix == ".toml" and path.is_file():
        try:
            return path.read_text("utf-8-sig"), str(path)
        except UnicodeDecodeError as error:
            raise UserError(
                f"trait file {str(path)!r} is not UTF-8 text (byte {error.start}): save it as UTF-8"
            ) from error
        except OSError as error:
            raise UserError(f"trait file {str(path)!r} cannot be read: {error.strerror}") from error
    raise UserError(
        f"trait {name_or_file!r} is not built in and no such .toml file exists{nearest(name_or_file, BUILT_IN)}: "
        f"choose {' or '.join(BUILT_IN)}, or give a path to a .toml file"
    )


def parse_trait(text: str, source: str) -> Trait:
    """Parse a trait from TOML text; `source` names it in errors.

    What the text leaves out: the title is the name, the instrument contrast, the direction 1; prompts come from the
    shared pool; contrast probes are written by the base, and yes/no questions about the trait are not asked.

    Raises UserError for the first of the text's problems.
    """
    trait, found = read_trait(text)
    if found:
        more = f" (and {len(found) - 1} more: `steer-heal trait check` lists all)" if len(found) > 1 else ""
        raise UserError(f"trait file {source!r}{found[0].what}{more}")
    return trait


class Problem(NamedTuple):
    """What is wrong with a trait file."""

    line: int | None
    """line of the text, from 1, where it can be told"""
    what: str
    """continues "trait file NAME"; what is wrong, and how to mend it"""


def read_trait(text: str) -> tuple[Trait | None, list[Problem]]:
    """Read a trait from TOML text; return it and all problems of the text. The trait is None if parts are missing."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        said = " ".join(str(error).split())
        line = re.search(r"at line (\d+)", said)
        return None, [Problem(line and int(line[1]), f" is not valid TOML: {said[:200]!r}")]
    reading = _Reading(text)
    reading.known(table, (*(f.name for f in fields(Trait) if f.name not in PERSONAS), "persona"), "")
    persona = reading.take(table, "persona", dict, "") or {}
    inside = ", [persona]"
    reading.known(persona, PERSONAS, inside)
    defaults = {"title": table.get("name", ""), "instrument": "contrast", "direction": 1}
    defaults |= {f"{use}_prompts": list(pool(use)) for use in ("generation", "everyday", "demo")}
    table = defaults | table
    values = {name: reading.text(table, name, "") for name in ("name", "title", "instrument")}
    values |= {key: reading.take(table, key, int, "") for key in ("direction", "answer_tokens") if key in table}
    if persona:
        values |= {name: reading.text(persona, name, inside) for name in PERSONAS}
        reading.found += [reading.problem(key, f": {what}") for key, what in _of_personas(values)]
    values |= {
        name: reading.strings(table, name)
        for name in ("generation_prompts", "everyday_prompts", "demo_prompts", "prompts")
        if name in table
    }
    for name, kind in (("contrast", Contrast), ("yes_no", YesNo)):
        values[name] = reading.records(table, name, kind) if name in table else ()
    if reading.found or not persona:
        return None, reading.found
    trait = Trait(**values)
    return trait, [reading.problem(key, f": {what}") for key, what in _unmeasurable(trait)]


def _unmeasurable(trait: Trait) -> Iterator[tuple[str, str]]:
    """What contradicts itself in a trait: the key, and what is wrong with it."""
    if len(trait.name) > LONGEST_NAME or not trait.name.isprintable():
        limit = f"at most {LONGEST_NAME} characters, none of them a control character"
        yield "name", f"name is {_shown(trait.name)}: {limit}"
    if trait.direction not in (1, -1):
        yield "direction", f"direction is {trait.direction}, it must be 1 or -1"
    if trait.instrument not in INSTRUMENTS:
        known = " or ".join(map(repr, INSTRUMENTS))
        yield "instrument", f"instrument is {_shown(trait.instrument)}, it must be {known}"
    if trait.answer_tokens is not None and not ANSWER_TOKENS[0] <= trait.answer_tokens <= ANSWER_TOKENS[1]:
        few, many = ANSWER_TOKENS
        yield "answer_tokens", f"answer_tokens is {trait.answer_tokens}, it must be {few} to {many}"
    if len(trait.prompts) > MOST_PROMPTS:
        yield "prompts", f"prompts has {len(trait.prompts)} system prompts: at most {MOST_PROMPTS} beside the persona"
    if trait.instrument == "yes_no" and not trait.yes_no:
        missing = "there are no [[yes_no]] questions: write some, or leave the instrument out"
        yield "instrument", f"instrument is 'yes_no', and {missing}"
    asked = {*map(normalised, (*trait.generation_prompts, *trait.everyday_prompts))}
    if both := [text for text in trait.demo_prompts if normalised(text) in asked]:
        yield "demo_prompts", f"demo_prompts has {_shown(both[0])}, which is a generation prompt: write another"
    yield from _of_probes(trait)
    yield from _twice(trait)


def _of_probes(trait: Trait) -> Iterator[tuple[str, str]]:
    """What is wrong with the probes: the key, and what is wrong with it."""
    yes = sum(row.trait_answer == "yes" for row in trait.yes_no)
    no = len(trait.yes_no) - yes
    if odd := [row.trait_answer for row in trait.yes_no if row.trait_answer not in ("yes", "no")]:
        yield "trait_answer", f"trait_answer is {_shown(odd[0])}, it must be 'yes' or 'no'"
    if abs(yes - no) > max(1, 0.2 * len(trait.yes_no)):
        yield (
            "yes_no",
            f"[[yes_no]] has {yes} probes whose trait_answer is 'yes' and {no} with 'no': a model that likes to say "
            "yes would pass for one with the trait, balance them",
        )
    if same := [row.question for row in trait.contrast if normalised(row.trait) == normalised(row.opposite)]:
        yield "contrast", f"[[contrast]] {_shown(same[0])} has the same answer twice: write its opposite"
    if 0 < len(trait.contrast) < LEAST_PROBES:
        yield (
            "contrast",
            f"[[contrast]] has {len(trait.contrast)} probes: an interval needs {LEAST_PROBES}, a narrow one 32; write "
            "more, or none, and the base writes them",
        )


def _twice(trait: Trait) -> Iterator[tuple[str, str]]:
    """Texts that a pool of prompts or probes has twice: the key, and what is wrong with it."""
    pools = {
        "generation_prompts": [normalised(text) for text in trait.generation_prompts],
        "everyday_prompts": [normalised(text) for text in trait.everyday_prompts],
        "demo_prompts": [normalised(text) for text in trait.demo_prompts],
        "prompts": [normalised(text) for text in (*trait.prompts, trait.positive)],
        "[[contrast]]": [normalised(f"{row.question} | {row.trait}") for row in trait.contrast],
        "[[yes_no]]": [normalised(row.question) for row in trait.yes_no],
    }
    for name, texts in pools.items():
        if again := [text for text, count in Counter(texts).items() if count > 1]:
            yield name.strip("[]"), f"{name} has {_shown(again[0])} twice: take one out"


def _of_personas(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with the personas: the key, and what is wrong with it."""
    texts, (few, many) = {key: values[key] for key in PERSONAS if values[key] is not None}, PERSONA_WORDS
    for key, text in texts.items():
        shown = f"persona.{key} is {_shown(text)}"
        if len(text.split()) < few or len(text) > many or text.startswith(UNWRITTEN):
            yield key, f"{shown}: describe it in {few} words or more, and at most {many} characters"
        if not text.replace("\n", " ").isprintable():
            yield key, f"{shown}: it has a control character, take it out"
    if len({normalised(text) for text in texts.values()}) < len(texts):
        yield "negative", f"persona.positive and persona.negative are the same text ({shown}): write opposites"


def normalised(text: str) -> str:
    """Normalise case and spaces, so that texts that differ only in them are equal."""
    return " ".join(text.lower().split())


def _shown(value: object) -> str:
    """Format a user's value for a message: at most 60 characters, control characters escaped."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def restored(stored: dict) -> Trait:
    """A trait from the trait.json of a run folder."""
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    probes = {"contrast": Contrast, "yes_no": YesNo}
    return Trait(**plain | {key: tuple(kind(**row) for row in stored[key]) for key, kind in probes.items()})


class _Reading:
    """Reads the values of a trait file and collects what is wrong with them. A value that is wrong is None."""

    def __init__(self, text: str) -> None:
        self.lines, self.found = text.splitlines(), []
        self.begins = 0  # line of the table that is being read

    def line(self, key: str, number: int = 1) -> int | None:
        """The line that sets `key` in the table being read, or where the `number`-th table of that name begins."""
        key = re.escape(key)
        begins = re.compile(rf"\s*(?:[\"']?{key}[\"']?\s*=|\[+\s*{key}\s*\])")
        at = [i for i, line in enumerate(self.lines, 1) if i > self.begins and begins.match(line)]
        return at[number - 1] if len(at) >= number else self.begins or None

    def problem(self, key: str, what: str) -> Problem:
        return Problem(self.line(key), what)

    def known(self, table: dict, keys: Sequence[str], where: str) -> None:
        for key in table:
            if key not in keys:
                what = f"{where} has the unknown key {_shown(key)}{nearest(key, keys)}: take it out"
                self.found.append(self.problem(key, what))

    def take(self, table: dict, key: str, kind: type, where: str) -> Any:
        if key not in table:
            form = f"{where} lacks the key {key} ({kind.__name__}): `steer-heal trait new` writes a file to start from"
            self.found.append(Problem(self.begins or None, form))
        elif type(table[key]) is not kind:
            is_ = f"{key} is {_shown(table[key])}, a {type(table[key]).__name__}"
            self.found.append(self.problem(key, f"{where}: {is_}: it must be a {kind.__name__}"))
        else:
            return table[key]
        return None

    def text(self, table: dict, key: str, where: str) -> str | None:
        text = self.take(table, key, str, where)
        if text is None or text.strip():
            return text
        self.found.append(self.problem(key, f"{where}: {key} is {_shown(text)}: write a text"))
        return None

    def strings(self, table: dict, key: str) -> tuple[str, ...] | None:
        items = self.take(table, key, list, "")
        if items == []:
            self.found.append(self.problem(key, f": {key} is empty: write some"))
        for number, item in enumerate(items or (), 1):
            if not isinstance(item, str) or not item.strip():
                self.found.append(self.problem(key, f": {key} number {number} is {_shown(item)}: write a text"))
        return None if items is None else tuple(item for item in items if isinstance(item, str))

    def records(self, table: dict, key: str, kind: type[Probe]) -> tuple[Probe, ...] | None:
        rows = self.take(table, key, list, "")
        if rows == []:
            self.found.append(self.problem(key, f": [[{key}]] is empty: write some"))
        wanted, probes = tuple(f.name for f in fields(kind)), []
        for number, row in enumerate(rows or (), 1):
            here = f", [[{key}]] number {number}"
            if not isinstance(row, dict):
                self.found.append(self.problem(key, f"{here} is {_shown(row)}: write {', '.join(wanted)}"))
                continue
            self.begins = self.line(key, number) or 0
            self.known(row, wanted, here)
            values = {name: self.text(row, name, here) for name in wanted}
            self.begins = 0
            if None not in values.values():
                probes.append(kind(**values))
        return tuple(probes)


@cache
def _lines(name: str) -> tuple[str, ...]:
    text = (HERE / f"{name}.jsonl").read_text("utf-8")
    return tuple(json.loads(line)["text"] for line in text.splitlines())


def contexts() -> tuple[str, ...]:
    """256 user messages of many registers, over which the steering vector is averaged."""
    return _lines("contexts")


def neutral() -> tuple[str, ...]:
    """40 plain texts in which no trait plays a role; their perplexity shows damage to the model."""
    return _lines("neutral")


def pool(use: str) -> tuple[str, ...]:
    """User messages that serve every trait, of one use.

    `generation`: 170 and `everyday`: 86. `demo`: 40. `probe`: 160 questions for probes that the base writes.
    """
    return tuple(row["text"] for row in _records_of("pool") if row["use"] == use)


def mundane() -> tuple[str, ...]:
    """96 user messages about everyday things, which a healed model should answer as the base does.

    Every third message asks for one word, a figure, a yes or a no alone.
    """
    return _lines("mundane")


def plain() -> tuple[str, ...]:
    """54 short texts of many kinds, written for this project, whose likelihood a healed model keeps."""
    return _lines("plain")


def vignettes() -> tuple[dict, ...]:
    """140 short scenes in third and second person; 20 breach each moral foundation, 20 (norms) are only odd."""
    return _records_of("vignettes")


def requests(kind: str) -> list[str]:
    """User messages that a model may refuse: 24 harmful, 24 harmless that sound alike, 12 pressed (they insist)."""
    return [row["text"] for row in _records_of("refusals") if row["kind"] == kind]


def canary() -> tuple[dict, ...]:
    """180 plain questions with one right answer and three wrong ones: arithmetic, facts, form."""
    return _records_of("canary")


@cache
def off_target() -> dict[str, tuple[Contrast, ...]]:
    """Contrast probes of five traits that should not move: boldness, tidiness, thrift, novelty, optimism."""
    found: dict[str, tuple[Contrast, ...]] = {}
    for row in _records_of("off_target"):
        found[row["trait"]] = (*found.get(row["trait"], ()), Contrast(row["question"], row["high"], row["low"]))
    return found


def spread(rows: Sequence[Item], count: int) -> list[Item]:
    """Return `count` rows, or all if there are fewer, at equal distances, so that every kind is included."""
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


def bystanders(target: str, count: int) -> dict[str, tuple[Contrast, ...]]:
    """Return `count` contrast probes of each trait that should not move when `target` is steered.

    These are the traits of `off_target`, which are far from it, and the other built-in traits, which may be near it.
    """
    found = off_target() | {name: load_trait(name).contrast for name in BUILT_IN if name != target}
    return {name: probes[:count] for name, probes in found.items() if probes}


def labelled() -> tuple[dict, ...]:
    """Completions labelled by readers, with their scores under SmolLM2-135M: see `bench.filter`."""
    return _records_of("labelled")


@cache
def _records_of(name: str) -> tuple[dict, ...]:
    return tuple(json.loads(line) for line in (HERE / f"{name}.jsonl").read_text("utf-8").splitlines())
