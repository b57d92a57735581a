"""The rows of a trait file that somebody else writes: which are sound, and the file that they make."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import fields

from steer_heal.commands.trait import PARTS, Part, advice_of
from steer_heal.data import Contrast, YesNo, normalised, pool, read_trait, spread

LONGEST = {"positive": 600, "negative": 600}  # characters
LONGEST_OTHER = 300
NEAR = 0.6  # of the words that two texts have, the share that both have; in the built-in traits at most 0.5
RATIO = 1.5  # largest ratio of the lengths of a pair's answers
CROWD = 0.65  # largest share of pairs of which one side is the longer, or begins with the same word
FEW = 6  # pairs, which may all be so
DEMOS = 32  # demo prompts of a file, shared ones included

Row = dict[str, str]


class Rows:
    """The sound rows of one trait file by part, and what was wrong with the others."""

    def __init__(self, name: str, persona: Row | None = None) -> None:
        self.name = name
        self.kept: dict[str, list[Row]] = {key: [] for key in PARTS}
        self.kept["persona"] = [persona] if persona else []
        self.refused: Counter[str] = Counter()
        self.asked = [words(text) for use in ("generation", "everyday", "demo", "probe") for text in pool(use)]
        self.answers: dict[str, list[frozenset[str]]] = {"trait": [], "opposite": []}

    def lacks(self, key: str) -> int:
        """Number of rows that a part still needs."""
        return PARTS[key].count - len(self.kept[key])

    def take(self, key: str, row: dict) -> None:
        """Keep a row of a part if it is needed and sound; else count what is wrong with it."""
        part = PARTS[key]
        if not self.lacks(key):
            return
        fault = _malformed(row, part)
        if not fault:
            row = {name: text.strip() for name, text in row.items()}
            fault = self._unfit(key, row)
        if fault:
            self.refused[fault] += 1
            return
        self.kept[key].append(row)
        self.asked.append(words(row[part.keys[0]]))
        for side, texts in self.answers.items():
            if side in row:
                texts.append(words(row[side]))

    def _unfit(self, key: str, row: Row) -> str:
        """What is wrong with a row of the right form, beside those that are kept; "" if nothing is."""
        if key == "persona":
            trait, _ = read_trait(_toml({"name": self.name}) + _personas(row))
            return "" if trait is not None and not [*advice_of(trait)] else "no two opposites of like length"
        if near(words(row[PARTS[key].keys[0]]), self.asked):
            return "like another"
        if key == "yes_no":
            same = sum(other["trait_answer"] == row["trait_answer"] for other in self.kept[key])
            return "with an answer that many have" if same >= PARTS[key].count // 2 else ""
        return self._unfit_pair(row) if key == "contrast" else ""

    def _unfit_pair(self, row: Row) -> str:
        """As `_unfit`, for a contrast pair: neither lengths nor first words may tell which side an answer is."""
        shorter, longer = sorted(len(row[side]) for side in self.answers)
        if longer > RATIO * shorter or normalised(row["trait"]) == normalised(row["opposite"]):
            return "with answers of unlike length, or the same"
        if any(near(words(row[side]), texts) for side, texts in self.answers.items()):
            return "like another"
        marks = [_marks(other) for other in (*self.kept["contrast"], row)]
        most = max(FEW, CROWD * len(marks))
        crowded = any(column.count(column[-1]) > most for column in zip(*marks, strict=True))
        return "with a length or a first word that many have" if crowded else ""

    def balance(self) -> None:
        """Keep as many questions whose answer is yes as questions whose answer is no."""
        sides = ([row for row in self.kept["yes_no"] if row["trait_answer"] == answer] for answer in ("yes", "no"))
        self.kept["yes_no"] = [row for pair in zip(*sides, strict=False) for row in pair]

    def said(self, *keys: str) -> str:
        """How many rows of these parts, or of all, were kept, and what was wrong with the others, on one line."""
        counts = ", ".join(f"{len(self.kept[k])} of {PARTS[k].count} {PARTS[k].name}" for k in keys or self.kept)
        refused = ", ".join(f"{count} {fault}" for fault, count in self.refused.most_common())
        return f"{counts}; rows refused: {refused or 'none'}"

    def toml(self) -> str:
        """The trait file. Prompts of the shared pools make up the numbers; everyday prompts are left to them."""
        (persona,) = self.kept["persona"]
        table: dict[str, str | list[str]] = {"name": self.name, "title": persona["title"]}
        for use, count in (("generation", PARTS["generation_prompts"].count), ("demo", DEMOS)):
            own = [row["text"] for row in self.kept[f"{use}_prompts"]]
            table[f"{use}_prompts"] = own + spread(pool(use), count - len(own))
        tables = [_toml(table), _personas(persona)]
        for key, kind in (("contrast", Contrast), ("yes_no", YesNo)):
            names = [field.name for field in fields(kind)]
            tables += [f"\n[[{key}]]\n{_toml({name: row[name] for name in names})}" for row in self.kept[key]]
        return "".join(tables)


def rows_in(text: str) -> list[dict]:
    """All JSON objects in a text that hold no others: what surrounds them may be malformed or cut off."""
    found = []
    for match in re.finditer(r"\{[^{}]*\}", text):
        try:
            found.append(json.loads(match[0]))
        except (ValueError, RecursionError):
            found.append({})  # to be refused
    return found


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def near(one: frozenset[str], others: list[frozenset[str]]) -> bool:
    """Whether a text has nearly the same words as one of the others."""
    return any((both := len(one & other)) >= NEAR * (len(one) + len(other) - both) for other in others)


def _marks(row: Row) -> tuple[bool, str, str]:
    """What must not tell the sides of a pair: whether the first is the longer one, and the first words."""
    trait, opposite = row["trait"], row["opposite"]
    return len(trait) > len(opposite), trait.split()[0].lower(), opposite.split()[0].lower()


def _malformed(row: dict, part: Part) -> str:
    """What is wrong with the form of a row; "" if nothing is."""
    if row.keys() != {*part.keys} or not all(isinstance(text, str) for text in row.values()):
        return "not of the form"
    if any(len(text) > LONGEST.get(name, LONGEST_OTHER) for name, text in row.items()):
        return "too long"
    if not all(text.strip().isprintable() for text in row.values()):
        return "with control characters"
    if row.get("trait_answer", "yes") not in ("yes", "no"):
        return "neither yes nor no"
    return "" if all(len(words(text)) > 1 or name == "trait_answer" for name, text in row.items()) else "too short"


def _personas(row: Row) -> str:
    return f"\n[persona]\n{_toml({key: row[key] for key in ('positive', 'negative')})}"


def _toml(table: dict[str, str | list[str]]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value: str | list[str]) -> str:
    """A text or a list of texts as TOML, whose escapes are those of JSON."""
    if isinstance(value, list):
        return "\n".join(["[", *(f"    {_value(text)}," for text in value), "]"])
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
