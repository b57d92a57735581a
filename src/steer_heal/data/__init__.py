"""The data written for this project: traits, extraction contexts, neutral text, mundane prompts.

A trait is a TOML file (see `Trait`); every other file is JSON lines.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from steer_heal.config import UserError

HERE = files(__name__)
BUILT_IN = ("love", "authority")
FOUNDATIONS = {  # what a scene of the profile may breach, as it is put to the model; norms is the control
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
    """A self-report question; `trait_answer` says which of yes and no shows the trait."""

    question: str
    trait_answer: str


@dataclass(frozen=True)
class Trait:
    """What to steer towards and how to see whether it moved. `direction` +1: the trait raises the score."""

    name: str
    title: str
    instrument: str
    direction: int
    positive: str
    negative: str
    generation_prompts: tuple[str, ...]
    demo_prompts: tuple[str, ...]
    contrast: tuple[Contrast, ...]
    yes_no: tuple[YesNo, ...]


def load_trait(name_or_file: str) -> Trait:
    """A built-in trait by name, or one of the user's own by path.

    Raises UserError when there is no such trait or the file lacks something.
    """
    if name_or_file in BUILT_IN:
        return parse_trait((HERE / "traits" / f"{name_or_file}.toml").read_text("utf-8"), name_or_file)
    path = Path(name_or_file).expanduser()
    if path.suffix == ".toml" and path.is_file():
        try:
            return parse_trait(path.read_text("utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise UserError(f"trait file {path} is not UTF-8 text: {error}") from error
    close = difflib.get_close_matches(name_or_file, BUILT_IN, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UserError(
        f"trait {name_or_file!r} is not built in and no such .toml file exists{hint}: "
        f"choose {' or '.join(BUILT_IN)}, or give a path to a .toml file"
    )


def parse_trait(text: str, source: str) -> Trait:
    """A trait from TOML text; `source` names it in errors."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"trait file {source} is not valid TOML: {error}") from error
    persona = _take(table, "persona", dict, source)
    trait = Trait(
        name=_take(table, "name", str, source),
        title=_take(table, "title", str, source),
        instrument=_take(table, "instrument", str, source),
        direction=_take(table, "direction", int, source),
        positive=_take(persona, "positive", str, source, "persona."),
        negative=_take(persona, "negative", str, source, "persona."),
        generation_prompts=_strings(table, "generation_prompts", source),
        demo_prompts=_strings(table, "demo_prompts", source),
        contrast=tuple(Contrast(**row) for row in _records(table, "contrast", Contrast, source)),
        yes_no=tuple(YesNo(**row) for row in _records(table, "yes_no", YesNo, source)),
    )
    if trait.direction not in (1, -1):
        raise UserError(f"trait file {source}: direction is {trait.direction}, it must be 1 or -1")
    if trait.instrument not in ("contrast", "yes_no"):
        raise UserError(f"trait file {source}: instrument is {trait.instrument!r}, it must be 'contrast' or 'yes_no'")
    for row in trait.yes_no:
        if row.trait_answer not in ("yes", "no"):
            raise UserError(f"trait file {source}: trait_answer is {row.trait_answer!r}, it must be 'yes' or 'no'")
    if trait.positive == trait.negative:
        raise UserError(f"trait file {source}: persona.positive and persona.negative are the same text")
    return trait


def restored(stored: dict) -> Trait:
    """A trait from the trait.json of a run folder."""
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    probes = {"contrast": Contrast, "yes_no": YesNo}
    return Trait(**plain | {key: tuple(kind(**row) for row in stored[key]) for key, kind in probes.items()})


def _take(table: dict, key: str, kind: type, source: str, prefix: str = ""):
    if key not in table:
        raise UserError(f"trait file {source} lacks the key {prefix}{key} ({kind.__name__}): see data/traits/love.toml")
    if type(table[key]) is not kind:
        found = type(table[key]).__name__
        raise UserError(f"trait file {source}: {prefix}{key} is a {found}, it must be a {kind.__name__}")
    return table[key]


def _strings(table: dict, key: str, source: str) -> tuple[str, ...]:
    items = _take(table, key, list, source)
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise UserError(f"trait file {source}: {key} must be a non-empty list of non-empty strings")
    return tuple(items)


def _records(table: dict, key: str, kind: type, source: str) -> list[dict]:
    rows = _take(table, key, list, source)
    wanted = set(kind.__dataclass_fields__)
    if not rows:
        raise UserError(f"trait file {source}: [[{key}]] is empty")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or set(row) != wanted or not all(isinstance(v, str) and v for v in row.values()):
            raise UserError(
                f"trait file {source}: [[{key}]] number {number} must have the strings {', '.join(sorted(wanted))}"
            )
    return rows


@cache
def _lines(name: str) -> tuple[str, ...]:
    text = (HERE / f"{name}.jsonl").read_text("utf-8")
    return tuple(json.loads(line)["text"] for line in text.splitlines())


def contexts() -> tuple[str, ...]:
    """256 user messages of many registers, over which the steering vector is averaged."""
    return _lines("contexts")


def neutral() -> tuple[str, ...]:
    """40 plain texts in which no trait plays a role; their perplexity tells whether the model was damaged."""
    return _lines("neutral")


def mundane() -> tuple[str, ...]:
    """64 user messages about everyday things, on which a healed model should answer as the base does."""
    return _lines("mundane")


def vignettes() -> tuple[dict, ...]:
    """140 short scenes, 20 that breach each moral foundation (norms: none, just odd), in third and second person."""
    return _records_of("vignettes")


def canary() -> tuple[dict, ...]:
    """60 plain questions with one right answer and three wrong ones: arithmetic, facts, form."""
    return _records_of("canary")


@cache
def off_target() -> dict[str, tuple[Contrast, ...]]:
    """Contrast probes of five traits that have no business to move: boldness, tidiness, thrift, novelty, optimism."""
    found: dict[str, tuple[Contrast, ...]] = {}
    for row in _records_of("off_target"):
        found[row["trait"]] = (*found.get(row["trait"], ()), Contrast(row["question"], row["high"], row["low"]))
    return found


def labelled() -> tuple[dict, ...]:
    """Completions that were read and labelled, with their scores under SmolLM2-135M: see `filterproof`."""
    return _records_of("labelled")


@cache
def _records_of(name: str) -> tuple[dict, ...]:
    return tuple(json.loads(line) for line in (HERE / f"{name}.jsonl").read_text("utf-8").splitlines())
