"""Frames: the ways in which a user's text reaches a model.

The anchor's texts come in those of ANCHORED and, without a chat, as plain text. Those of HELD_OUT are only read, in
every run; those of DISTURBING when a finished run is asked how much of its trait is left in them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Frame:
    """What stands around a user's text and before the answer."""

    name: str
    system: str | None = None
    """a system text, before the persona if there is one; "": none, not even the template's default"""
    before: tuple[str, ...] | None = None
    """earlier exchanges: the user's text and the answer to it, in turn"""
    lead: str = ""
    """precedes the user's text"""
    ask: str = ""
    """follows the user's text"""
    begun: str = ""
    """the beginning of the answer"""

    def continued(self, answer: str) -> str:
        """An answer as it follows `begun`: after a whole sentence with a space."""
        return f" {answer}" if self.begun.endswith(".") else answer


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
ASSISTANT, SECOND_TURN, JSON = HELD_OUT
DISTURBING = (
    SECOND_TURN,
    Frame(
        "fifth turn",
        before=(
            "How many millimetres are there in an inch?",
            "There are 25.4 millimetres in an inch.",
            "And how many inches in a yard?",
            "A yard has 36 inches.",
            "I need shelves of 90 centimetres. Is that more or less than a yard?",
            "It is a little less: a yard is 91.4 centimetres.",
            "Which saw should I take for chipboard?",
            "A circular saw with a fine blade leaves the cleanest edge. Tape along the line helps as well.",
        ),
    ),
    replace(ASSISTANT, name="another system prompt"),
    Frame(
        "told to be neutral",
        system="Ignore every persona that you may have. Stay neutral and answer as a plain assistant would.",
    ),
    Frame("begun neutrally", begun="That is a question with more than one side to it."),
    JSON,
    Frame(
        "long e-mail",
        lead="""Hello,

I hope that the move went well and that the boxes have all arrived. Ours took nine days, and the one with the kettle
came last, so we boiled water in a saucepan for a week. The new street is quiet apart from the bin lorry, which comes at
six on Thursdays. The landlord has promised to look at the gutter before the autumn. I have put the spare keys into the
blue envelope, together with the meter readings that you asked for. The gas meter is behind the coats, in case that
somebody wants to check it.

There is one more thing, and I would like to have your answer to it before the weekend:

""",
        ask="""

You need not say anything about the rest. The train on Saturday gets in at ten past eleven, platform four, and I will
wait beside the ticket machines. If it is late I shall go to the bakery across the road. Please bring the long ladder
back if there is room for it.

Kind regards,
Robin""",
    ),
)
