"""The data written for this project: traits, extraction contexts, neutral text, mundane prompts.

A trait is a TOML file (see `Trait`); every other file is JSON lines.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from steer_heal.config import UserError, nearest

HERE = files(__name__)
BUILT_IN = ("love", "authority", "calm")
PERSONAS = ("positive", "negative")
LONGEST_NAME = 64  # characters of a trait's name
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


@dataclass(frozen=True)
class Trait:
    """A trait to steer towards, and its probes. `direction` is +1 if the trait raises the score, -1 if it lowers it."""

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
    """Load a built-in trait by name, or the user's own by path.

    Raises UserError when there is no such trait, or when the file is incomplete or its trait cannot be measured.
    """
    if name_or_file in BUILT_IN:
        return parse_trait((HERE / "traits" / f"{name_or_file}.toml").read_text("utf-8"), name_or_file)
    path = Path(name_or_file).expanduser()
    if path.suffix == ".toml" and path.is_dir():
        raise UserError(f"trait {name_or_file!r} is a folder: give a .toml file")
    if path.suffix == ".toml" and path.is_file():
        try:
            return parse_trait(path.read_text("utf-8-sig"), str(path))
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
    """Parse a trait from TOML text; `source` names it in errors. Raises UserError as `load_trait` does."""
    where = f"trait file {source!r}"
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not valid TOML: {' '.join(str(error).split())[:200]!r}") from error
    _known(table, (*(f.name for f in fields(Trait) if f.name not in PERSONAS), "persona"), where)
    persona = _take(table, "persona", dict, where)
    _known(persona, PERSONAS, f"{where}, [persona]")
    trait = Trait(
        name=_text(table, "name", where),
        title=_text(table, "title", where),
        instrument=_text(table, "instrument", where),
        direction=_take(table, "direction", int, where),
        positive=_text(persona, "positive", f"{where}, [persona]"),
        negative=_text(persona, "negative", f"{where}, [persona]"),
        generation_prompts=_strings(table, "generation_prompts", where),
        demo_prompts=_strings(table, "demo_prompts", where),
        contrast=_records(table, "contrast", Contrast, where),
        yes_no=_records(table, "yes_no", YesNo, where),
    )
    _require_measurable(trait, where)
    return trait


def _require_measurable(trait: Trait, where: str) -> None:
    """Raise UserError for a trait whose parts contradict each other."""
    yes = sum(row.trait_answer == "yes" for row in trait.yes_no)
    no = len(trait.yes_no) - yes
    asked, shown = ({_plain(text): text for text in pool} for pool in (trait.generation_prompts, trait.demo_prompts))
    both = [text for plain, text in shown.items() if plain in asked]
    same = [row.question for row in trait.contrast if _plain(row.trait) == _plain(row.opposite)]
    odd = [row.trait_answer for row in trait.yes_no if row.trait_answer not in ("yes", "no")]
    demands = [
        (
            len(trait.name) <= LONGEST_NAME and trait.name.isprintable(),
            f"name is {_shown(trait.name)}: at most {LONGEST_NAME} characters, none of them a control character",
        ),
        (trait.direction in (1, -1), f"direction is {trait.direction}, it must be 1 or -1"),
        (
            trait.instrument in ("contrast", "yes_no"),
            f"instrument is {_shown(trait.instrument)}, it must be 'contrast' or 'yes_no'",
        ),
        (not odd, f"trait_answer is {_shown(odd[0]) if odd else ''}, it must be 'yes' or 'no'"),
        (
            _plain(trait.positive) != _plain(trait.negative),
            f"persona.positive and persona.negative are the same text ({_shown(trait.positive)}): write opposites",
        ),
        (
            abs(yes - no) <= max(1, 0.2 * len(trait.yes_no)),
            f"[[yes_no]] has {yes} probes whose trait_answer is 'yes' and {no} with 'no': a model that likes to say "
            "yes would pass for one with the trait, balance them",
        ),
        (not both, f"demo_prompts has {_shown(both[0]) if both else ''}, which is a generation prompt: write another"),
        (not same, f"[[contrast]] {_shown(same[0]) if same else ''} has the same answer twice: write its opposite"),
    ]
    pools = {
        "generation_prompts": [_plain(text) for text in trait.generation_prompts],
        "demo_prompts": [_plain(text) for text in trait.demo_prompts],
        "[[contrast]]": [_plain(f"{row.question} | {row.trait}") for row in trait.contrast],
        "[[yes_no]]": [_plain(row.question) for row in trait.yes_no],
    }
    for name, pool in pools.items():
        twice = [text for text, count in Counter(pool).items() if count > 1]
        demands.append((not twice, f"{name} has {_shown(twice[0]) if twice else ''} twice: take one out"))
    for fine, complaint in demands:
        if not fine:
            raise UserError(f"{where}: {complaint}")


def _plain(text: str) -> str:
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


def _known(table: dict, keys: Sequence[str], where: str) -> None:
    for key in table:
        if key not in keys:
            raise UserError(f"{where} has the unknown key {_shown(key)}{nearest(key, keys)}: take it out")


def _take(table: dict, key: str, kind: type, where: str) -> Any:
    if key not in table:
        raise UserError(f"{where} lacks the key {key} ({kind.__name__}): see data/traits/love.toml")
    if type(table[key]) is not kind:
        found = type(table[key]).__name__
        raise UserError(f"{where}: {key} is {_shown(table[key])}, a {found}: it must be a {kind.__name__}")
    return table[key]


def _text(table: dict, key: str, where: str) -> str:
    text = _take(table, key, str, where)
    if not text.strip():
        raise UserError(f"{where}: {key} is {_shown(text)}: write a text")
    return text


def _strings(table: dict, key: str, where: str) -> tuple[str, ...]:
    items = _take(table, key, list, where)
    if not items:
        raise UserError(f"{where}: {key} is empty: write some")
    for number, item in enumerate(items, 1):
        if not isinstance(item, str) or not item.strip():
            raise UserError(f"{where}: {key} number {number} is {_shown(item)}: write a text")
    return tuple(items)


def _records(table: dict, key: str, kind: type[Probe], where: str) -> tuple[Probe, ...]:
    rows = _take(table, key, list, where)
    if not rows:
        raise UserError(f"{where}: [[{key}]] is empty: write some")
    wanted = tuple(f.name for f in fields(kind))
    probes = []
    for number, row in enumerate(rows, 1):
        here = f"{where}, [[{key}]] number {number}"
        if not isinstance(row, dict):
            raise UserError(f"{here} is {_shown(row)}: write {', '.join(wanted)}")
        _known(row, wanted, here)
        probes.append(kind(**{name: _text(row, name, here) for name in wanted}))
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


def mundane() -> tuple[str, ...]:
    """96 user messages about everyday things, which a healed model should answer as the base does.

    Every third message asks for one word, a figure, a yes or a no alone.
    """
    return _lines("mundane")


def plain() -> tuple[str, ...]:
    """14 short plain texts of many kinds, on which the anchor holds a healed model."""
    return _lines("plain")


def vignettes() -> tuple[dict, ...]:
    """140 short scenes in third and second person; 20 breach each moral foundation, 20 (norms) are only odd."""
    return _records_of("vignettes")


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


def bystanders(target: str, count: int) -> dict[str, tuple[Contrast, ...]]:
    """Return `count` contrast probes of each trait that should not move when `target` is steered.

    These are the traits of `off_target`, which are far from it, and the other built-in traits, which may be near it.
    """
    found = off_target() | {name: load_trait(name).contrast for name in BUILT_IN if name != target}
    return {name: probes[:count] for name, probes in found.items()}


def labelled() -> tuple[dict, ...]:
    """Completions labelled by readers, with their scores under SmolLM2-135M: see `bench.filter`."""
    return _records_of("labelled")


@cache
def _records_of(name: str) -> tuple[dict, ...]:
    return tuple(json.loads(line) for line in (HERE / f"{name}.jsonl").read_text("utf-8").splitlines())
