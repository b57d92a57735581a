"""Who writes the rows of a trait file: a model behind an OpenAI-compatible endpoint, or one that is loaded here."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from steer_heal.config import ModelConfig, UserError, model_name
from steer_heal.data.frames import Frame

SECONDS = {"models": 20, "rows": 240}  # until an endpoint must have answered, retries included
RETRIES = 2  # of the client, on a lost connection, on 429 and on 5xx
MOST_BYTES = 4_000_000  # of an endpoint's answer
LONGEST_MODEL = 200  # characters of a model's name
ROWS = {"endpoint": 16, "local": 4}  # that a writer is asked for at once
DRAWS = 8  # answers that a local model draws to an ask, together: that takes little longer than one
TOKENS = 90  # of a row, from a local model; personas are longer
BEGUN = Frame("rows", begun='{"rows": [{"')  # a small model goes on with JSON where it would not begin it


@dataclass(frozen=True)
class Ask:
    """Rows that are wanted: the request in words, the keys of a row, and the number of rows."""

    text: str
    keys: tuple[str, ...]
    rows: int

    @property
    def schema(self) -> dict:
        """The form of the answer as a JSON schema."""
        texts = {key: {"type": "string"} for key in self.keys}
        if "trait_answer" in texts:
            texts["trait_answer"]["enum"] = ["yes", "no"]
        return _object({"rows": {"type": "array", "items": _object(texts)}})


@dataclass(frozen=True)
class Writer:
    """Answers asks in text, which may be anything."""

    name: str
    rows: int
    """that it is best asked for at once"""
    write: Callable[[Ask], str]
    draws: int = 1
    """answers to an ask, joined"""


def _object(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def local(config: ModelConfig) -> Writer:
    """A chat model that is loaded here. Raises UserError for one that cannot be loaded."""
    from steer_heal.model.decode import Sampling, decode
    from steer_heal.model.loading import load

    lm, numbers = load(config), count()

    def write(ask: Ask) -> str:
        drawn = Sampling(("trait file", next(numbers)), temperature=0.7)
        prompts = [lm.prompt(ask.text, frame=BEGUN)] * DRAWS
        answers = decode(lm, prompts, TOKENS * max(3, ask.rows), None, drawn)
        return "\n".join(BEGUN.begun + lm.text(answer.ids) for answer in answers)

    return Writer(model_name(config.path), ROWS["local"], write, DRAWS)


def endpoint(url: str, model: str) -> Writer:
    """A model behind an OpenAI-compatible endpoint; without a name, the first one that the endpoint lists.

    The key is that of the environment variable OPENAI_API_KEY.

    Raises UserError when the package openai is missing, for a URL that is none, and for an endpoint that does not
    answer as one.
    """
    server = _Endpoint(url)
    model = model or server.first_model()
    if not (model.isprintable() and 0 < len(model) <= LONGEST_MODEL):
        raise UserError(f"the model's name {model[:60]!r} at {server.shown} cannot be used: give --writer-model")
    return Writer(model, ROWS["endpoint"], lambda ask: server.rows(model, ask))


class _Endpoint:
    """Asks a server. Every answer comes within a time and a size, or is one UserError."""

    def __init__(self, url: str) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("--write URL needs the package openai: pip install 'steer_heal[write]'") from error
        self.openai, self.url, self.key = openai, url, os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        self.structured = True
        try:
            parts = urlsplit(url)
            self.shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        except ValueError:
            parts = None
        if parts is None or not parts.hostname or not re.fullmatch(r"[!-~]+", url):
            raise UserError(f"--write {url[:80]!r} is no URL of an endpoint: give e.g. http://localhost:8000/v1")
        if not re.fullmatch(r"[!-~]+", self.key):
            raise UserError("OPENAI_API_KEY has characters that no key has: set it again")

    def first_model(self) -> str:
        """The name of the first model that the server lists."""
        said = self._asked("models", lambda client: client.models.with_streaming_response.list())
        try:
            return str(said["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.shown} lists no model: give --writer-model") from error

    def rows(self, model: str, ask: Ask) -> str:
        """The text of the model's answer. A server that refuses a JSON schema is asked without one from then on."""
        form = {"type": "json_schema", "json_schema": {"name": "rows", "strict": True, "schema": ask.schema}}
        body = {"model": model, "messages": [{"role": "user", "content": ask.text}]}
        body |= {"response_format": form} if self.structured else {}
        try:
            said = self._asked("rows", lambda client: client.chat.completions.with_streaming_response.create(**body))
        except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
            if not self.structured:
                raise UserError(f"{self.shown} refuses the request: {_line(error.message)}") from error
            self.structured = False
            return self.rows(model, ask)
        try:
            return str(said["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.shown} answered without a message: {_line(json.dumps(said))}") from error

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
