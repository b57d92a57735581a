"""Asks a judge, keeps its answers in a file by their content, and counts what that cost."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer_heal.commands.judge.judges import Heard, Judge
from steer_heal.config import UserError
from steer_heal.eval.judge.questions import Question, values_in
from steer_heal.eval.judge.record import Cost
from steer_heal.files import append_row, appended_rows

FRUITLESS = 20  # questions at the beginning without one answer of the form asked: this is no judge
BROKEN = 5  # questions in a row on which an endpoint failed: it is down


class Kept:
    """Texts kept in a JSON lines file, by a hash of what they depend on."""

    def __init__(self, path: Path) -> None:
        self.path, self.texts = path, {}
        for row in appended_rows(path):
            if not (isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("text"), str)):
                raise UserError(f"{path} has a line that steer-heal did not write: move the file away")
            self.texts[row["key"]] = row["text"]

    def get(self, *of: Any) -> str | None:
        return self.texts.get(_key(of))

    def add(self, text: str, *of: Any) -> None:
        self.texts[_key(of)] = text
        append_row(self.path, {"key": _key(of), "text": text})


def _key(of: tuple) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:32]


class KeptJudge:
    """A judge with its kept answers. Only an answer of the form asked is kept; what failed is asked again next time."""

    def __init__(self, judge: Judge, kept: Kept, seed: int) -> None:
        self.judge, self.kept, self.order = judge, kept, random.Random(seed)
        self.asked = self.found = self.calls = self.heard = self.down = 0
        self.failures: Counter[str] = Counter()
        self.tokens: list[tuple[int | None, int | None]] = []
        self.read = False  # whether any answer was of the form asked

    @property
    def name(self) -> str:
        """The judge's name. An endpoint that was not told a model is asked once."""
        if (name := self.kept.get("name", self.judge.place)) is None:
            name = self.judge.name()
            self.kept.add(name, "name", self.judge.place)
        return name

    def answers(
        self, questions: list[Question], on_answer: Callable[[int], None], reading: int = 1
    ) -> list[dict[str, int | str] | None]:
        """The values of every answer, None where there is none. The questions are asked in a random order.

        `reading` 2 asks again what was asked before.

        Raises UserError for a judge that cannot be asked, and for one none of whose first answers is of the form.
        """
        unique = [*{question.text: question for question in questions}.values()]  # two arms may have one answer
        self.order.shuffle(unique)
        new, found, name = [], {}, self.name
        for question in unique:
            said = self.kept.get("answer", self.judge.place, name, question.text, reading)
            found[question.text] = None if said is None else values_in(question.form, said)
            if found[question.text] is None:
                new.append(question)
        self.asked += len(unique)
        self.found += len(unique) - len(new)
        self.read = self.read or len(new) < len(unique)
        on_answer(len(unique) - len(new))
        for question, heard in zip(new, self.judge.ask(name, new), strict=True):
            self._count(heard)
            found[question.text] = heard.values
            if heard.values is not None:
                self.kept.add(heard.said, "answer", self.judge.place, name, question.text, reading)
            on_answer(1)
        return [found[question.text] for question in questions]

    def _count(self, heard: Heard) -> None:
        self.calls += heard.calls
        self.heard += 1
        self.tokens.append((heard.prompt_tokens, heard.answer_tokens))
        self.read = self.read or heard.values is not None
        self.down = self.down + 1 if heard.broken else 0
        if heard.failure:
            self.failures[heard.failure] += 1
        if heard.broken and (self.down == BROKEN or not self.read):
            raise UserError(f"{heard.said}. {self._so_far}")
        if not self.read and self.heard == FRUITLESS:
            raise UserError(
                f"{self.name!r} is no judge: none of its first {FRUITLESS} answers is of the form asked, the last is "
                f"{heard.said[:80]!r}: take a larger model"
            )

    @property
    def _so_far(self) -> str:
        done = self.asked and sum(self.failures.values()) < self.heard
        kept = f"Its answers so far are kept in {self.kept.path}: the same command goes on" if done else ""
        return kept or "Nothing was judged"

    @property
    def cost(self) -> Cost:
        sums = [None if None in column else sum(column) for column in zip(*self.tokens, strict=True)] or [None, None]
        return Cost(
            asked=self.asked,
            kept=self.found,
            calls=self.calls,
            failures=dict(self.failures),
            prompt_tokens=sums[0],
            answer_tokens=sums[1],
        )
