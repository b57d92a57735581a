"""Who judges: a model behind an OpenAI-compatible endpoint, or a chat model that is loaded here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from steer_heal.commands.endpoint import Endpoint, Flags, Form, object_of
from steer_heal.config import ModelConfig, UserError, model_name
from steer_heal.data.frames import Frame
from steer_heal.eval.judge.questions import Allowed, Question, values_in

if TYPE_CHECKING:
    from steer_heal.model.lm import LM

FLAGS = Flags("--judge", "--judge-model", "judge")
TRIES = 3  # for an answer of the form asked
AT_ONCE = 8  # requests to an endpoint
TOGETHER = 64  # questions to a local model, after which their answers are kept
WHOLE_TOKENS = 40  # of an answer in one go, from a local model
TOKENS = 6  # of a value alone: a number, or a word
MALFORMED = "no answer in the form asked"


@dataclass(frozen=True)
class Heard:
    """A judge's answer to a question, and what it cost."""

    values: dict[str, int | str] | None
    """None without an answer of the form asked"""
    said: str
    """the answer's text, or why there is none"""
    failure: str = ""
    broken: bool = False
    """whether the judge could not be asked, as an endpoint that does not answer"""
    calls: int = 1
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


@dataclass(frozen=True)
class Judge:
    """Answers questions, in their order. An endpoint is asked nothing before the first one."""

    place: str
    """the endpoint's URL and model, or the local model, as the user named them; names the kept answers"""
    name: Callable[[], str]
    ask: Callable[[str, list[Question]], Iterator[Heard]]
    """takes the judge's name, too"""
    trial: bool = True
    """whether it is tried on one question before the arms answer any: an endpoint may fail in many ways"""


def endpoint_judge(url: str, model: str) -> Judge:
    """A model behind an OpenAI-compatible endpoint; without a name, the first one that the endpoint lists.

    Raises UserError when the package openai is missing, and for a URL that is none.
    """
    server = Endpoint(url, FLAGS)

    def ask(name: str, questions: list[Question]) -> Iterator[Heard]:
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            yield from pool.map(partial(_heard, server, name), questions)
        finally:
            pool.shutdown(cancel_futures=True)

    return Judge(f"{url} {model}".strip(), lambda: server.model(model), ask)


def _heard(server: Endpoint, name: str, question: Question) -> Heard:
    """Ask at temperature 0; an answer that is not of the form is shown to the judge, which may write another."""
    text, said, prompt_tokens, answer_tokens = question.text, "", [], []
    form = Form("judgement", object_of(question.properties))
    for number in range(1, TRIES + 1):
        try:
            answer = server.answer(name, text, form, temperature=0.0)
        except UserError as error:
            return Heard(None, str(error), f"endpoint: {error}"[:120], broken=True, calls=number)
        said = answer.text
        prompt_tokens.append(answer.prompt_tokens)
        answer_tokens.append(answer.answer_tokens)
        if values := values_in(question.form, said):
            return Heard(values, said, "", False, number, _sum(prompt_tokens), _sum(answer_tokens))
        text = question.again(said)
    return Heard(None, said, MALFORMED, False, TRIES, _sum(prompt_tokens), _sum(answer_tokens))


def _sum(counts: list[int | None]) -> int | None:
    return None if None in counts else sum(counts)


def local_judge(config: ModelConfig) -> Judge:
    """A chat model that is loaded here. It decodes greedily, and goes on with an answer that is begun for it.

    Raises UserError for a model that cannot be loaded.
    """
    from steer_heal.model.loading import load

    lm = load(config)

    def ask(name: str, questions: list[Question]) -> Iterator[Heard]:
        for start in range(0, len(questions), TOGETHER):
            for question, said in _answered(lm, questions[start : start + TOGETHER]):
                values = values_in(question.form, said)
                yield Heard(values, said, "" if values else MALFORMED)

    return Judge(f"model {config.path} {config.quant}", lambda: model_name(config.path), ask, trial=False)


def _answered(lm: LM, questions: list[Question]) -> list[tuple[Question, str]]:
    """Have every question answered in one go; those whose answer is not of the form, value by value."""
    begun = [_opened("{", *next(iter(question.form.items()))) for question in questions]
    written = _go_on(lm, questions, begun, WHOLE_TOKENS)
    found = {question.text: before + after for question, before, after in zip(questions, begun, written, strict=True)}
    if left := [one for one in questions if values_in(one.form, found[one.text]) is None]:
        found |= {question.text: said for question, said in _filled_in(lm, left)}
    return [(question, found[question.text]) for question in questions]


def _opened(text: str, key: str, allowed: Allowed) -> str:
    """The answer so far, with the beginning of its next value."""
    return f'{text}"{key}": ' + ("" if isinstance(allowed, range) else '"')


def _go_on(lm: LM, questions: list[Question], begun: list[str], tokens: int) -> list[str]:
    """What the model writes after the beginning of each answer."""
    from steer_heal.model.decode import decode, rows_that_fit

    prompts = [
        lm.prompt(one.text, frame=Frame("judge", begun=text)) for one, text in zip(questions, begun, strict=True)
    ]
    fit = rows_that_fit(lm, max(map(len, prompts)), tokens)
    return [lm.text(answer.ids) for answer in decode(replace(lm, decode_rows=fit), prompts, tokens)]


def _filled_in(lm: LM, questions: list[Question]) -> list[tuple[Question, str]]:
    """Have every question's form filled in, value by value: small models seldom write whole JSON by themselves.

    The questions have one form. A value that is not allowed ends its answer.
    """
    form = questions[0].form
    begun, left, last = ["{"] * len(questions), [*range(len(questions))], [*form][-1]
    for key, allowed in form.items():
        for i in left:
            begun[i] = _opened(begun[i], key, allowed)
        written = _go_on(lm, [questions[i] for i in left], [begun[i] for i in left], TOKENS) if left else []
        values = {i: _value(allowed, text) for i, text in zip(left, written, strict=True)}
        left = [i for i, value in values.items() if value is not None]
        for i in left:
            begun[i] += f"{values[i]}{'' if isinstance(allowed, range) else chr(34)}{'}' if key == last else ', '}"
    return [*zip(questions, begun, strict=True)]


def _value(allowed: Allowed, written: str) -> str | None:
    """The value at the beginning of what a model wrote; None for one that is not allowed."""
    if isinstance(allowed, range):
        number = re.match(r"\d{1,3}(?!\d)", written)
        return number[0] if number and int(number[0]) in allowed else None
    return next((word for word in allowed if re.match(rf"{word}\b", written)), None)
