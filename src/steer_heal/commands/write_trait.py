"""Have a whole trait file written: `steer-heal trait new NAME --write`. A writer is asked, its sound rows are kept."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from math import ceil
from pathlib import Path

from steer_heal.commands.trait import PARTS, advice_of, file_of, smallest
from steer_heal.commands.trait_rows import Row, Rows, rows_in
from steer_heal.commands.writers import Ask, Writer
from steer_heal.config import UserError
from steer_heal.data import LEAST_PROBES, parse_trait, read_trait, trait_text
from steer_heal.files import write_text
from steer_heal.terminal import program, progress

MOST_ASKS = 3  # times as many asks as a writer needs whose rows are all sound
FRUITLESS = 3  # asks in a row without a sound row end a part
NEEDED = {"persona": 1, "contrast": LEAST_PROBES}  # rows without which nothing is written
MOST_ROWS = 256  # of an answer that are looked at
SHOWN = 12  # rows that a writer is shown, not to write them again
SPARE = 4  # rows that are asked for beyond those that lack
SUBJECTS = (
    *("family", "work", "money", "travel", "neighbours", "school", "health", "friends", "food", "sport", "animals"),
    *("repairs", "music and art", "the internet", "gardens and weather", "offices and rules"),
)


def write(name: str, about: str, open_writer: Callable[[], Writer]) -> str:
    """Write a whole trait file into the current folder; return what was kept and what to do next.

    The personas are those of the file, if there is one with nothing else in it; or they are written from the sentence
    `about`.

    Raises UserError, and writes nothing, for a file that has more, and where too few sound rows come.
    """
    file = file_of(name)
    before, name, persona = _begun(name, file, about)
    writer, rows = open_writer(), Rows(name, persona)
    for key in PARTS:
        _collect(writer, rows, key, about)
        if len(rows.kept[key]) < NEEDED.get(key, 0):
            found = f"{rows.said(key)}; needed: {NEEDED[key]}"
            raise UserError(
                f"{writer.name!r} cannot write this trait, nothing is written: {found}. Take a larger model"
            )
    rows.balance()
    text = f"# Written by {json.dumps(writer.name)} for steer-heal trait new\n{rows.toml()}"
    trait, found = read_trait(text)
    if trait is None or found:
        raise UserError(f"{writer.name!r} cannot write this trait, nothing is written{found[0].what}")
    write_text(file, text, lambda scratch: _require_unchanged(file, before))
    lines = [f"written: {file}: {rows.said(*[*PARTS][1:])}", *(f"advice: {line}" for line in advice_of(trait))]
    return "\n".join([*lines, f"Read it, then: {program()} trait check {file} --model smollm2-135m\n"])


def _text_of(file: Path) -> str | None:
    return trait_text(str(file))[0] if file.exists() else None


def _begun(name: str, file: Path, about: str) -> tuple[str | None, str, Row | None]:
    """The text of the file, the trait's name, and its title and personas; None for what does not exist yet."""
    text = _text_of(file)
    if text is None or text == smallest(name):
        if not about:
            raise UserError(f'--write needs the trait in one sentence, --about "...", or both personas in {file}')
        return text, name, None
    trait = parse_trait(text, str(file))
    if more := sorted(tomllib.loads(text).keys() - {"name", "title", "persona"}):
        raise UserError(f"{str(file)!r} has {more[0]}: --write fills a file with a name and two personas alone")
    if about:
        raise UserError(f"{str(file)!r} has personas: leave --about out, or take the file away")
    return text, trait.name, {"title": trait.title, "positive": trait.positive, "negative": trait.negative}


def _require_unchanged(file: Path, before: str | None) -> None:
    if _text_of(file) != before:
        raise UserError(f"{str(file)!r} was changed in the meantime: it is left as it is")


def _collect(writer: Writer, rows: Rows, key: str, about: str) -> None:
    """Ask for rows of a part until none lacks, or too many asks were in vain."""
    part, fruitless = PARTS[key], 0
    with progress(part.name, part.count, "row") as done:
        for number in range(MOST_ASKS * ceil(part.count / (writer.rows * writer.draws))):
            lack = rows.lacks(key)
            if not lack or fruitless == FRUITLESS:
                break
            wanted = min(writer.rows, lack + SPARE) if part.count > 1 else 1
            said = writer.write(Ask(_request(rows, key, about, number, wanted), part.keys, wanted))
            for row in rows_in(said)[:MOST_ROWS]:
                rows.take(key, row)
            gained = lack - rows.lacks(key)
            done(gained)
            fruitless = 0 if gained else fruitless + 1


def _request(rows: Rows, key: str, about: str, number: int, wanted: int) -> str:
    """The text of an ask: the trait, what is wanted, what is there already, and the form of the answer."""
    part, kept = PARTS[key], rows.kept[key]
    if key == "persona":
        lines = [f'A trait called "{rows.name}": {about}', f"Write one description of it. {part.rules}"]
    else:
        (persona,) = rows.kept["persona"]
        subjects = ", ".join(SUBJECTS[(4 * number + i) % len(SUBJECTS)] for i in range(4))
        lines = [
            f"A trait: {persona['title']}.",
            f"Someone who has it: {persona['positive']}",
            f"The opposite: {persona['negative']}",
            f"Write {wanted} {part.name}, about: {subjects}. {part.rules}",
        ]
    if key == "contrast" and kept:
        longer = sum(len(row["trait"]) > len(row["opposite"]) for row in kept) > len(kept) / 2
        lines.append(f"This time `trait` is a little {'shorter' if longer else 'longer'} than `opposite`.")
    if kept:
        lines += ["Write nothing like these:", *(f"- {row[part.keys[0]]}" for row in kept[-SHOWN:])]
    form = json.dumps({"rows": [dict.fromkeys(part.keys, "...")]})
    return "\n".join([*lines, f"Answer with JSON alone, in this form: {form}"])
