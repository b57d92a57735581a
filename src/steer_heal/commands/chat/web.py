"""A chat on a page of this machine: the arms in columns next to one another. It needs the package gradio.

The page is served on the loopback address alone. The browser is told to load nothing from elsewhere, and gradio to
report nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from itertools import cycle
from queue import Empty, SimpleQueue
from typing import Any

from steer_heal.commands.chat.session import Session, answer, arms, as_markdown
from steer_heal.config import UserError

LOOPBACK = "127.0.0.1"
COLUMNS = 4  # base, base with the persona, base steered, and what was trained
# gradio's page has its scripts and styles inside it, and makes functions of the js that it is given.
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
STYLE = """
.arm { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 0 12px 12px; }
.arm h2 { font-size: 1em; margin: 10px 0; color: var(--body-text-color); }
.arm > div { height: 55vh; overflow: auto; display: flex; flex-direction: column-reverse; }
.arm > div > div { margin-bottom: auto !important; } /* above, until it fills the column; then its end is shown */
.arm p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 8px; padding: 6px 10px; border-radius: 6px; }
.arm .you { background: var(--background-fill-secondary); margin-left: 15%; }
"""
DOWNLOAD = """text => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/markdown"}));
  link.download = "chat.md";
  link.click();
}"""


def require_gradio() -> Any:
    """The package gradio. Raises UserError where it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at its import
    try:
        import gradio
    except ImportError as error:
        raise UserError("--web needs the package gradio: pip install 'steer_heal[web]'") from error
    return gradio


def serve(session: Session) -> None:
    """Serve the page until Ctrl-C."""
    with served(session) as address:
        print(f"the chat is at {address} (Ctrl-C ends it)", flush=True)
        try:
            while True:  # a wait without end may not hear of Ctrl-C: polars, for one, takes the signal over
                time.sleep(0.5)
        except KeyboardInterrupt:
            # A second signal, from the user or from a library that has taken it over, must not stop the closing.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print()


@contextmanager
def served(session: Session) -> Iterator[str]:
    """Serve the page until the block ends; yields its address. Raises UserError where no port is free."""
    gradio = require_gradio()
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    blocks = Page(session).blocks()
    own = [Middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"]), Middleware(_NothingFromElsewhere)]
    try:
        _, address, _ = blocks.launch(
            server_name=LOOPBACK,
            share=False,
            ssr_mode=False,
            run_history=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            css=STYLE,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            app_kwargs={"middleware": own},
        )
    except OSError as error:
        raise UserError(f"--web: no page could be served on {LOOPBACK} ({error}): free a port") from error
    try:
        yield address
    finally:
        blocks.close(verbose=False)


class _NothingFromElsewhere:
    """Adds the policy by which a browser loads nothing from other machines."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", POLICY)]}
            await send(message)

        await self.app(scope, receive, with_policy)


class Page:
    """The page. Every tab has a session of its own; one answer is written at a time."""

    def __init__(self, begun: Session) -> None:
        self.gradio, self.begun = require_gradio(), begun
        self.writer = ThreadPoolExecutor(max_workers=1)  # also when a tab is closed while an answer is written

    def blocks(self) -> Any:
        """What gradio serves."""
        gr, subject = self.gradio, self.begun.subject
        with gr.Blocks(title="steer-heal chat", analytics_enabled=False, fill_width=True) as blocks:
            state, saved = gr.State(), gr.Textbox(visible="hidden", elem_id="saved")
            with gr.Row():
                columns = [gr.HTML(min_width=240, padding=False, visible=False) for _ in range(COLUMNS)]
            message = gr.Textbox(label="message", placeholder="type a message", elem_id="message")
            with gr.Row():
                send = gr.Button("Send", variant="primary", elem_id="send")
                new, save = gr.Button("New", elem_id="new"), gr.Button("Save", elem_id="save")
            with gr.Row(visible=not subject.alone):
                dials = self._dials()
        shown = [state, *columns]
        # gradio asks whether a function is a generator; of one whose types are checked it cannot tell
        says = lambda *given: (yield from self.said(*given))  # noqa: E731
        in_turn = {"concurrency_id": "chat", "concurrency_limit": 1, "show_progress": "hidden"}
        with blocks:
            gr.on(
                [blocks.load, *(dial.change for dial in dials)],
                self.dialled,
                [state, *dials],
                shown,
                trigger_mode="always_last",
                **in_turn,
            )
            gr.on([send.click, message.submit], says, [message, state, *dials], [message, *shown], **in_turn)
            new.click(self.new, [state, *dials], shown, **in_turn)
            kept = save.click(self.saved, [state], saved, **in_turn)
            kept.then(None, saved, None, js=DOWNLOAD)
        return blocks

    def _dials(self) -> list[Any]:
        gr, begun, subject = self.gradio, self.begun, self.begun.subject
        low, high = min(0.0, begun.gate), max(1.0, begun.gate)
        step, has_run = (0.05 if subject.gradual else 1), subject.run is not None
        return [
            gr.Slider(low, high, begun.gate, step=step, label="gate: 0 is base, 1 is trained", elem_id="gate"),
            gr.Checkbox(begun.base, label="base", elem_id="base"),
            gr.Checkbox(begun.persona, label="base with the persona", visible=has_run, elem_id="persona"),
            gr.Number(begun.dose, label="base steered at this dose; 0: not", visible=has_run, elem_id="dose"),
        ]

    def dialled(self, state: Session | None, *dials: Any) -> list[Any]:
        """Show the conversations of the arms that the dials ask for."""
        session = self._session(state, *dials)
        return [session, *self._columns(session)]

    def new(self, state: Session | None, *dials: Any) -> list[Any]:
        """Begin a fresh chat."""
        session = self._session(state, *dials)
        return self.dialled(replace(session, chat=session.chat + 1), *dials)

    def saved(self, state: Session | None) -> str:
        """All turns of all chats of this tab."""
        return as_markdown(state or self.begun)

    def said(self, message: str, state: Session | None, *dials: Any) -> Iterator[list[Any]]:
        """Let the arms answer, and show what they write as they write it."""
        session, message = self._session(state, *dials), message.strip()
        if not message:
            yield ["", session, *self._columns(session)]
            return
        pieces: SimpleQueue[tuple[str, str]] = SimpleQueue()
        done = self.writer.submit(answer, session, message, lambda arm, text: pieces.put((arm, text)))
        written = {arm.name: "" for arm in arms(session)}
        while not (done.done() and pieces.empty()):
            yield ["", session, *self._columns(session, message, written)]
            for arm, text in _waiting(pieces):
                written[arm] += text
        try:
            session, left = done.result(), ""
        except UserError as error:
            self.gradio.Warning(str(error))
            left = message
        yield [left, session, *self._columns(session)]

    def _session(
        self, state: Session | None, gate: float | int, base: bool, persona: bool, dose: float | int | None
    ) -> Session:
        """The tab's session with the dials as they stand; a page sends whole numbers without a point."""
        return replace(state or self.begun, gate=float(gate), base=base, persona=persona, dose=float(dose or 0))

    def _columns(self, session: Session, message: str = "", written: dict[str, str] | None = None) -> list[Any]:
        """What each column shows: an arm's conversation, and what it is writing as the answer to `message`."""
        found = []
        for arm in arms(session):
            texts = [*session.before(arm.name), *([message, written[arm.name]] if written is not None else [])]
            found.append(self.gradio.update(value=_conversation(arm.name, texts), visible=True))
        return found + [self.gradio.update(value="", visible=False)] * (COLUMNS - len(found))


def _conversation(arm: str, texts: list[str]) -> str:
    """HTML of messages and answers, in turn. What a model or a user writes is shown as it is."""
    said = "".join(
        f'<p class="{who}">{escape(text)}</p>' for who, text in zip(cycle(("you", "answer")), texts, strict=False)
    )
    return f'<section class="arm"><h2>{escape(arm)}</h2><div><div>{said}</div></div></section>'


def _waiting(pieces: SimpleQueue[tuple[str, str]], seconds: float = 0.2) -> Iterator[tuple[str, str]]:
    """The pieces that are there now, after at most some time for the first."""
    try:
        yield pieces.get(timeout=seconds)
        while True:
            yield pieces.get_nowait()
    except Empty:
        return
