"""A model's chat template and tokenizer: prompts, and answers as they follow a prompt.

Templates differ in what they can do. `template_of` finds it out once, when the model is loaded, and says in a line each
what a user may not expect: where the system text goes, the date that prompts show, whether the model thinks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import date
from itertools import cycle
from pathlib import Path

from loguru import logger
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from steer_heal.config import ModelConfig, UserError
from steer_heal.data.frames import USUAL, Frame

SYSTEM, USER, ANSWER = "quillfeather", "marrowgate", "bindleworth"  # words that no template holds
CLOCK, THINKING = "strftime_now", "enable_thinking"  # names by which a template asks for the date and for thinking
DATE_CODES = ("%-d", "%-m", "%-j", *(f"%{code}" for code in "aAbBcdDeFgGhHIjmMpSTuUVwWxXyYC"))


@dataclass(frozen=True)
class Template:
    """A chat template and how it is used for one model."""

    tokenizer: PreTrainedTokenizerBase
    source: str
    """in jinja; its clock is stopped at `date`"""
    date: str | None
    """the day that prompts show; None for a template that does not ask for the date"""
    thinking: bool | None
    """`enable_thinking`; None for a template that does not know it"""
    in_parts: bool = False
    """whether a turn's content is a list of parts and no string"""
    system_role: bool = True
    """whether the system text has a turn of its own; else it begins the user turn"""
    own_system: bool = False
    """whether a chat without a system text shows one of the template's own"""
    opening: str = ""
    """what a prompt has after the user's text: the assistant's tag"""
    gap: str = ""
    """a space where the template begins the assistant's text with one, as Mistral's `[/INST] Yes`"""

    def text(self, user: str, system: str | None = None, before: tuple[str, ...] | None = None) -> str:
        """A chat up to and including the assistant's tag, of one turn or, after the exchanges `before`, of more.

        An empty system text takes the place of the template's own, where it has one.
        """
        return self.chat(list(zip(cycle(("user", "assistant")), (*(before or ()), user), strict=False)), system)

    def chat(self, turns: list[tuple[str, str]], system: str | None = None) -> str:
        """A chat of turns (role, text) that begin and end with the user's, up to and including the assistant's tag."""
        system = None if system == "" and not self.own_system else system
        if system is not None and self.system_role:
            turns = [("system", system), *turns]
        elif system is not None:
            turns = [("user", f"{system}\n\n{turns[0][1]}"), *turns[1:]]
        return self._rendered(turns)

    def prompt(self, user: str, system: str | None = None, frame: Frame = USUAL) -> list[int]:
        """Token ids of a chat in a frame, up to where the answer begins or goes on."""
        systems = [text for text in (frame.system, system) if text is not None]
        asked = self.text(frame.lead + user + frame.ask, " ".join(systems).strip() if systems else None, frame.before)
        return self.ids(asked) + (self.answer(frame.begun) if frame.begun else [])

    def answer(self, text: str, begun: str = "") -> list[int]:
        """Token ids of an answer as they follow a prompt, or as they follow `begun` in it.

        The prompt's tokens stay as they are. Many tokenizers begin a word otherwise after a newline than at the start
        of a text: Llama-2's has "Yes" there and "▁Yes" here. Where the answer would change the tokens before it, it is
        tokenised as it follows a newline; where it changes that too, by itself.
        """
        if begun:
            return self.following(self.opening + self.spaced(begun), text)
        return self.following(self.opening, self.spaced(text))

    def spellings(self, words: tuple[str, ...], begun: str = "") -> list[list[int]]:
        """The token ids of these one-word answers; where the template begins with a space, also those without it."""
        found = [self.answer(word, begun) for word in words]
        if self.gap and not begun:
            found += [self.following(self.opening, word) for word in words]
        return [list(ids) for ids in dict.fromkeys(map(tuple, found))]

    @property
    def described(self) -> list[str]:
        """What is done otherwise than with a plain template, a line each."""
        lines = []
        if not self.system_role:
            lines.append("the template has no system role: the persona begins the user turn")
        if self.in_parts:
            lines.append("the template takes a turn as a list of parts: each has one, of text")
        if self.date is not None:
            lines.append(f"the template shows the date: it is {self.date} in all prompts")
        if self.thinking is not None:
            lines.append(f"the template knows a thinking mode: it is {'on' if self.thinking else 'off'}")
        return lines

    @property
    def record(self) -> dict:
        """What env.json holds: the settings, and the hash of one prompt, which changes with all that prompts show."""
        settings = {name: getattr(self, name) for name in ("date", "thinking", "system_role", "in_parts")}
        return {"prompt_sha256": hashlib.sha256(self.text(USER, SYSTEM).encode()).hexdigest()} | settings

    def _rendered(self, turns: list[tuple[str, str]], begins: bool = True) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.in_parts else text}
            for role, text in turns
        ]
        knobs = {} if self.thinking is None else {THINKING: self.thinking}
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.source, tokenize=False, add_generation_prompt=begins, **knobs
        )

    def spaced(self, text: str) -> str:
        """The assistant's text with the space that the template begins it with."""
        return text if text[:1].isspace() else self.gap + text

    def following(self, before: str, text: str) -> list[int]:
        """Token ids of a text as it follows `before`, whose tokens stay as they are, see `answer`."""
        for context in (before, "\n"):
            head, joined = self.ids(context), self.ids(context + text)
            if joined[: len(head)] == head:
                return joined[len(head) :]
        return self.ids(text)

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered chat, which has its own special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def template_of(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> Template:
    """The chat template of a model, tried out with words that must come out of it.

    Raises UserError for a template that is missing, drops what it is given, or does not show where an answer begins.
    """
    source, name = _source(tokenizer, config.path), config.path
    if config.thinking and THINKING not in source:
        raise UserError(f"model.thinking: the chat template of {name!r} has no {THINKING} to turn on: leave it out")
    day = None
    if CLOCK in source:
        day = date.today().isoformat() if config.date == "auto" else config.date
        source = _stopped(source, date.fromisoformat(day))
    template = Template(tokenizer, source, day, config.thinking if THINKING in source else None)
    ways = [
        replace(template, in_parts=in_parts, system_role=system_role)
        for system_role in (True, False)
        for in_parts in (False, True)
    ]
    faults = [_fault(way) for way in ways]
    if "" not in faults:
        raise UserError(f"the chat template of {name!r} {faults[2]}: take the template that the model was trained with")
    template = _with_opening(_with_system(ways[faults.index("")]), name)
    for line in template.described:
        logger.info(line)
    return template


def _source(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if tokenizer.chat_template is None:
        raise UserError(f"model {name!r} has no chat template: steer-heal needs an instruction-tuned chat model")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise UserError(
            f"model {name!r} has chat templates for {', '.join(sorted(tokenizer.chat_template))} and no default one: "
            "save the one to use as chat_template.jinja in the model's folder"
        )
    return tokenizer.get_chat_template()


def _stopped(source: str, day: date) -> str:
    """The template with its clock stopped at a day.

    A macro hides the function of that name which transformers gives to every template. A function cannot be passed,
    because transformers turns arguments into plain data. No `date_string` is passed: a template takes it from the clock
    (Llama 3.2) or has a fixed one (Llama 3.1), which stays, as in transformers.
    """
    shown = "".join(f"|replace('{code}', '{day.strftime(code)}')" for code in DATE_CODES)
    return "{% macro " + CLOCK + "(format) %}{{ format" + shown + " }}{% endmacro %}\n" + source


def _fault(template: Template) -> str:
    """What is wrong with this way of using the template; "" when user and system text come out whole."""
    try:
        alone, both = template.text(USER), template.text(USER, SYSTEM)
    except Exception as error:  # a jinja template may raise anything for a role or a content that it does not know
        return f"cannot render a user turn: {' '.join(str(error).split())}"
    if USER in alone and USER in both and SYSTEM in both:
        return ""
    return "drops what the user says (it is not in the prompt)"


def _with_system(template: Template) -> Template:
    """The template, and whether a system text of its own makes a chat without one longer than one with an empty one."""
    if not template.system_role:
        return template
    try:
        empty = template._rendered([("system", ""), ("user", USER)])
    except Exception:  # see `_fault`
        return template
    return replace(template, own_system=len(empty) < len(template.text(USER)))


def _with_opening(template: Template, name: str) -> Template:
    """The template with the end of its prompts and the space before an answer.

    A template needs no generation prompt where an answered turn begins with the unanswered one and a tag (Mistral's
    `[/INST]`), and the answer follows.
    """
    prompt = template.text(USER)
    try:
        answered = template._rendered([("user", USER), ("assistant", ANSWER)], begins=False)
    except Exception:  # see `_fault`
        answered = ""
    opening = prompt.rpartition(USER)[2]
    gap = next((gap for gap in ("", " ") if answered.startswith(prompt + gap + ANSWER)), None)
    if prompt == template._rendered([("user", USER)], begins=False) and (gap is None or not opening.strip()):
        raise UserError(
            f"the chat template of {name!r} has no generation prompt (add_generation_prompt changes nothing), and an "
            "answer does not follow a tag either: take a template that ends with the assistant's tag"
        )
    return replace(template, opening=opening, gap=gap or "")


def tokenizer_of(adapter: Path, base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or only the chat template, that an adapter's folder brings along; without one, the base's.

    It is what transformers loads from that folder. Raises UserError for files that it cannot load.
    """
    own, template = base, adapter / "chat_template.jinja"
    if (adapter / "tokenizer_config.json").is_file():
        try:
            own = AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"the tokenizer in {str(adapter)!r} could not be loaded: {said[:300]}") from error
        own.chat_template = own.chat_template or base.chat_template
    elif template.is_file():
        own.chat_template = template.read_text("utf-8")
    else:
        return base
    logger.info("the tokenizer is the one in the adapter's folder")
    return own
