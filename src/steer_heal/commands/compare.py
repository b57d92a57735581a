"""The verb `compare`: a person reads the student's answers beside another arm's, and is not told which is which.

It reads the answers that the run folder holds, without a model and without torch.
"""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal

from steer_heal.config import UserError
from steer_heal.data import HERE
from steer_heal.eval.judge.blind import Choice, Pair, counted, page_key, pairs_of
from steer_heal.eval.judge.preferences import ASPECTS
from steer_heal.eval.reading import ArmReading
from steer_heal.files import append_row, appended_rows, write_text
from steer_heal.report.judged import preference_table
from steer_heal.runs.reading import load
from steer_heal.runs.resume import opened
from steer_heal.terminal import harmless, program

Against = Literal["base", "equal-cost", "prompted"]
AGAINST: tuple[Against, ...] = ("base", "equal-cost", "prompted")
LOG = "compare.jsonl"  # in the run folder, unless the user names another
MADE_BY = "steer-heal compare"  # in the file that a page saves
MOST_BYTES = 1_000_000  # of such a file
KEYS = {"1": "first", "2": "second", "0": "same"}
QUIT = "q\x03\x04"
WIDTH = 100  # columns of the text


class NoAnswers(UserError):
    """A run that holds no answers of an arm."""


@dataclass(frozen=True)
class Reading:
    """What a person reads: the pairs, whom the student is compared with, and the trait in words."""

    pairs: list[Pair]
    equal: int
    """prompts that both answer with the same text, which are not shown"""
    against: Against
    trait: str


def reading_of(folder: Path, against: Against, seed: int) -> Reading:
    """The answers of a run's last finished round beside those of another arm.

    Raises UserError when the folder is no run, NoAnswers when it holds no answers of one of the two.
    """
    run = load(folder)
    if not run.rounds:
        raise UserError(f"{str(folder)!r} has no finished round yet: there is no student to compare")
    last = run.rounds[-1]
    other = {"base": run.base, "prompted": run.prompted, "equal-cost": last.equal_cost}[against]
    trait = opened(folder).read("trait.json")
    described = (
        f"The trait: {trait['title']}. Someone who has it: {trait['positive']} The opposite: {trait['negative']}"
    )
    student, theirs = _demos(last.healed, folder), _demos(other, folder, against)
    pairs = pairs_of(student, theirs, seed)
    return Reading(pairs, len(student) - len(pairs), against, described)


def _demos(arm: ArmReading | None, folder: Path, against: str = "student") -> list:
    if arm is None or not arm.demos:
        others = " or ".join(name for name in AGAINST if name != against)
        when = ": a run reads them at its end" if against == "equal-cost" else ""
        raise NoAnswers(f"{str(folder)!r} holds no answers of {against}{when}; compare --against {others}")
    return arm.demos


# ---- in the terminal


def compare(folder: Path, against: Against, seed: int, log: Path) -> None:
    """Show pair after pair, note what the person types, and print the result at the end or at `q`.

    Pairs that the log has are not shown again.
    """
    reading = reading_of(folder, against, seed)
    noted = _noted(log)
    left = [pair for pair in reading.pairs if pair.key not in noted]
    print(f"{textwrap.fill(harmless(reading.trait), WIDTH)}\n")
    print(f"{len(left)} of {len(reading.pairs)} pairs are left. Type 1 for the first, 2 for the second, 0 for neither;")
    print(f"q stops, and the same command goes on. The choices are kept in {log}.")
    with_keys = _keys()
    for number, pair in enumerate(left, len(reading.pairs) - len(left) + 1):
        print(f"\n{number} of {len(reading.pairs)}. {_shown(pair.prompt)}\n")
        print(f"FIRST\n{_shown(pair.first)}\n\nSECOND\n{_shown(pair.second)}\n")
        if (choice := _chosen(with_keys)) is None:
            break
        append_row(log, {"pair": pair.key, **asdict(choice)})
        noted[pair.key] = choice
    print(_result(reading, [noted.get(pair.key) for pair in reading.pairs]))


def _noted(log: Path) -> dict[str, Choice]:
    """The choices of a log, by pair; the last one counts. Raises UserError for a file that is no log."""
    found = {}
    for number, row in enumerate(appended_rows(log), 1):
        try:
            key, choice = row["pair"], Choice(row["trait"], row["answered"])
        except (TypeError, KeyError) as error:
            raise UserError(f"--log {str(log)!r}: line {number} is no choice: give another file") from error
        if not isinstance(key, str) or not choice.sound:
            raise UserError(f"--log {str(log)!r}: line {number} is no choice: give another file")
        found[key] = choice
    return found


def _shown(text: str) -> str:
    lines = (textwrap.fill(line, WIDTH) for line in harmless(text).strip().splitlines())
    return "\n".join(lines) or "(nothing)"


def _chosen(keys: Iterator[str]) -> Choice | None:
    """The person's choice on both aspects; None at `q` and at the end of the input."""
    found = []
    for says in ASPECTS.values():
        print(f"Which {says}? 1, 2 or 0: ", end="", flush=True)
        key = next((key for key in keys if key in KEYS or key in QUIT), "q")
        print(key if key in KEYS else "stopped")
        if key in QUIT:
            return None
        found.append(KEYS[key])
    return Choice(*found)


def _keys() -> Iterator[str]:
    """Keys as they are pressed; what is piped in, character by character."""
    if not sys.stdin.isatty():
        while key := sys.stdin.read(1):
            yield key
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    while True:
        try:
            tty.setcbreak(terminal)
            key = sys.stdin.read(1)
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        if not key:
            return
        yield key


def _result(reading: Reading, choices: list[Choice | None]) -> str:
    read = sum(choice is not None for choice in choices)
    if not read:
        return "\nNothing was read yet."
    rows = counted(reading.pairs, choices, reading.against.replace("-", "_"))
    more = "" if read == len(choices) else " The others were not read."
    more += f" Left out are {reading.equal} prompts that both answer alike." if reading.equal else ""
    intervals = "" if read >= 8 else " With fewer than 8 the interval says little."
    return (
        f"\nThe student's answer against that of {reading.against}, {read} of {len(choices)} pairs.{more}{intervals}\n"
        f"{preference_table(rows)}"
    )


# ---- as a page


def write_page(folder: Path, against: Against, seed: int, page: Path) -> None:
    """Write the pairs as one page. It loads nothing, names no arm and saves a file for `read_back`."""
    reading = reading_of(folder, against, seed)
    shown = {
        "page": page_key(reading.pairs),
        "seed": seed,
        "trait": reading.trait,
        "aspects": [{"name": name, "says": says} for name, says in ASPECTS.items()],
        "pairs": [{"prompt": pair.prompt, "first": pair.first, "second": pair.second} for pair in reading.pairs],
    }
    data = json.dumps(shown).replace("<", "\\u003c")  # otherwise a text could end the script
    write_text(page, Template((HERE / "compare.html").read_text("utf-8")).substitute(data=data))
    quoted = shlex.quote(str(folder))
    print(
        f"written: {page}: {len(reading.pairs)} pairs. It saves a file: {program()} compare {quoted} --read FILE.json"
    )


def read_back(folder: Path, file: Path) -> None:
    """Print the result of a file that a page of this run saved.

    Raises UserError for any other file.
    """
    table = _table(file)
    wanted = {"made_by": str, "page": str, "seed": int, "choices": list}
    if any(not isinstance(table.get(key), kind) for key, kind in wanted.items()) or table["made_by"] != MADE_BY:
        raise UserError(
            f"--read {str(file)!r} was not saved by a page of steer-heal compare: give the file that it saves"
        )
    reading = _that_of(folder, table["page"], table["seed"], file)
    choices = [_choice(one, file) for one in table["choices"]]
    if len(choices) != len(reading.pairs):
        raise UserError(
            f"--read {str(file)!r} has {len(choices)} choices for {len(reading.pairs)} pairs: it was changed"
        )
    print(_result(reading, choices))


def _table(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"--read {str(file)!r} has more than {MOST_BYTES:,} bytes: it was not saved by a page")
        table = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"--read {str(file)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--read {str(file)!r} is no JSON: give the file that the page saved") from error
    return table if isinstance(table, dict) else {}


def _that_of(folder: Path, page: str, seed: int, file: Path) -> Reading:
    """The reading whose page this was: the file does not say whom the student was compared with."""
    for against in AGAINST:
        try:
            reading = reading_of(folder, against, seed)
        except NoAnswers:
            continue
        if page_key(reading.pairs) == page:
            return reading
    raise UserError(f"--read {str(file)!r} is of another run, or this run has gone on since: give the run of its page")


def _choice(one: Any, file: Path) -> Choice | None:
    """One choice of the file; None for a pair that was not read on both aspects."""
    if not isinstance(one, dict) or not one.keys() <= ASPECTS.keys():
        raise UserError(f"--read {str(file)!r} has {str(one)[:60]!r} where a choice should be: it was changed")
    choice = Choice(str(one.get("trait")), str(one.get("answered")))
    if any(str(value) not in KEYS.values() for value in one.values()):
        raise UserError(f"--read {str(file)!r} has the choice {str(one)[:80]!r}: allowed are first, second and same")
    return choice if choice.sound else None
