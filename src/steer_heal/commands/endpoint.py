"""A model behind an OpenAI-compatible endpoint: one answer to one message, within a time and a size."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from steer_heal.config import UserError

SECONDS = {"models": 20, "answer": 240}  # until an endpoint must have answered, retries included
RETRIES = 2  # of the client, on a lost connection, on 429 and on 5xx
MOST_BYTES = 4_000_000  # of an endpoint's answer
LONGEST_MODEL = 200  # characters of a model's name


@dataclass(frozen=True)
class Flags:
    """The flags by which the user named the endpoint, and the extra with the package that it needs; for messages."""

    url: str
    model: str
    extra: str


@dataclass(frozen=True)
class Form:
    """The form that an answer must have: a JSON schema and its name."""

    name: str
    schema: dict


@dataclass(frozen=True)
class Said:
    """An answer, which may be any text, and the tokens of the exchange where the endpoint counts them."""

    text: str
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


def object_of(properties: dict) -> dict:
    """The JSON schema of an object that has all of these properties and no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


class Endpoint:
    """Asks a server. Every answer comes within a time and a size, or is one UserError.

    The key is that of the environment variable OPENAI_API_KEY.
    """

    def __init__(self, url: str, flags: Flags) -> None:
        try:
            import openai
        except ImportError as error:
            needs = f"{flags.url} URL needs the package openai"
            raise UserError(f"{needs}: pip install 'steer_heal[{flags.extra}]'") from error
        self.flags = flags
        self.openai, self.url, self.key = openai, url, os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        self.structured = True
        try:
            parts = urlsplit(url)
            self.shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        except ValueError:
            parts = None
        if parts is None or not parts.hostname or not re.fullmatch(r"[!-~]+", url):
            raise UserError(f"{flags.url} {url[:80]!r} is no URL of an endpoint: give e.g. http://localhost:8000/v1")
        if not re.fullmatch(r"[!-~]+", self.key):
            raise UserError("OPENAI_API_KEY has characters that no key has: set it again")

    def model(self, named: str) -> str:
        """The name of the model that is asked: the one named, or else the first that the server lists."""
        name = named or self._first_model()
        if not (name.isprintable() and 0 < len(name) <= LONGEST_MODEL):
            raise UserError(f"the model's name {name[:60]!r} at {self.shown} cannot be used: give {self.flags.model}")
        return name

    def _first_model(self) -> str:
        said = self._asked("models", lambda client: client.models.with_streaming_response.list())
        try:
            return str(said["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.shown} lists no model: give {self.flags.model}") from error

    def answer(self, model: str, text: str, form: Form, **sampling: float) -> Said:
        """The model's answer. A server that refuses a JSON schema is asked without one from then on."""
        structured = self.structured  # another thread may change it meanwhile
        schema = {"type": "json_schema", "json_schema": {"name": form.name, "strict": True, "schema": form.schema}}
        body = {"model": model, "messages": [{"role": "user", "content": text}], **sampling}
        body |= {"response_format": schema} if structured else {}
        try:
            said = self._asked("answer", lambda client: client.chat.completions.with_streaming_response.create(**body))
        except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
            if not structured:
                raise UserError(f"{self.shown} refuses the request: {_line(error.message)}") from error
            self.structured = False
            return self.answer(model, text, form, **sampling)
        try:
            content = str(said["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.shown} answered without a message: {_line(json.dumps(said))}") from error
        return Said(content, *_tokens(said.get("usage")))

    def _asked(self, what: str, ask: Callable[[Any], Any]) -> Any:
        """The JSON that the server answers. A request that the server finds malformed is the client's own error."""
        openai, shown = self.openai, self.shown
        try:
            body = asyncio.run(self._body(SECONDS[what], ask))
        except (UserError, openai.BadRequestError, openai.UnprocessableEntityError):
            raise
        except (TimeoutError, openai.APITimeoutError) as error:
            raise UserError(f"{shown} did not answer in {SECONDS[what]} seconds: is it up, and fast enough?") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            mend = "set the environment variable OPENAI_API_KEY to a key of this endpoint"
            raise UserError(f"{shown} refuses the key ({error.status_code}): {mend}") from error
        except openai.APIStatusError as error:
            hint = ": is the path right? It often ends with /v1" if error.status_code == 404 else ""
            raise UserError(f"{shown} answered {error.status_code} {_line(error.message)}{hint}") from error
        except Exception as error:  # of openai or of its HTTP library: no address, a connection that broke
            raise UserError(f"{shown} cannot be reached: {_line(error.__cause__ or error)}") from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{shown} answered no JSON, so it is no such endpoint: {_line(body[:80])}") from error

    async def _body(self, seconds: float, ask: Callable[[Any], Any]) -> bytes:
        client = self.openai.AsyncOpenAI(base_url=self.url, api_key=self.key, timeout=seconds, max_retries=RETRIES)
        body = b""
        async with asyncio.timeout(seconds), client, ask(client) as response:
            async for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise UserError(f"{self.shown} answered more than {MOST_BYTES:,} bytes: stopped")
        return body


def _line(said: object) -> str:
    """What a server said, on one line of at most 200 characters."""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    return repr(" ".join(text.split())[:200])


def _tokens(usage: Any) -> tuple[int | None, int | None]:
    """The tokens of the prompt and of the answer, as a server reports them."""
    counts = [usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")]
    prompt, answer = (count if isinstance(count, int) and count >= 0 else None for count in counts)
    return prompt, answer
