"""Frames: the ways in which a user's text reaches a model.

The anchor's texts come in those of ANCHORED and, without a chat, as plain text. Those of HELD_OUT are only read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """What stands around a user's text and before the answer."""

    name: str
    system: str | None = None
    """a system text, before the persona if there is one; "": none, not even the template's default"""
    before: tuple[str, str] | None = None
    """a first exchange: the user's text and the answer to it"""
    ask: str = ""
    """follows the user's text"""
    begun: str = ""
    """the beginning of the answer"""


USUAL = Frame("usual")  # the template's default: of training and of most instruments
ANCHORED = (
    USUAL,
    Frame("no system text", system=""),
    Frame("beginners", system="You explain things to people who are new to a subject."),
    Frame("shop", system="You answer for a small hardware shop. Keep your replies short."),
    Frame("everyday words", system="Use everyday words. If you are not sure, say so."),
    Frame(
        "later turn",
        before=(
            "Where does the word 'breakfast' come from?",
            "It is what breaks the fast of the night: the first meal after sleep.",
        ),
    ),
)
PLAIN = "plain text"  # the anchor's texts without a chat
HELD_OUT = (
    Frame("assistant", system="You are a helpful assistant."),
    Frame(
        "second turn",
        before=(
            "Which way should a bookshelf face so that the sun does not fade the spines?",
            "Away from the window, so towards the north or along a side wall. A thin curtain helps as well.",
        ),
    ),
    Frame("JSON", ask=' Reply as JSON with one key, "answer".', begun='{"answer": "'),
)
