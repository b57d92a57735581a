"""What tyro says of a command line that it cannot read, in one line: the value, what is allowed, the mend."""

from __future__ import annotations

import difflib
import re


def condensed(box: str) -> str:
    """tyro's message without its title and frame; of several similar flags the nearest is kept."""
    _, *rows = re.sub(r"\[/?bold\]", "", box).splitlines()
    text = "\n".join(row.strip(" │╭╮╰╯") for row in rows)
    parts = [" ".join(part.split()) for part in re.split(r"^[─-]{9,}$", text, flags=re.MULTILINE)]
    what, *more = filter(None, parts)
    hints = "".join(_hint(what, part) for part in more)
    help_ = re.findall(r"steer-heal(?: \w+)? --help", box)
    return f"{what.rstrip('.')}{hints}: see {help_[0] if help_ else 'steer-heal --help'}"


def _hint(what: str, part: str) -> str:
    if part.startswith("Perhaps you meant") and (flag := re.search(r"--[\w.-]+", part)):
        return f" (did you mean {flag[0]}?)"
    if part.startswith("Available subcommands"):
        verbs = part.partition(": ")[2].split(", ")
        close = difflib.get_close_matches(what.split()[-1], verbs, 1)
        return (f" (did you mean {close[0]}?)" if close else "") + f", choose {', '.join(verbs)}"
    if part.startswith("Argument helptext"):
        return f" ({part.partition(': ')[2]})"
    return ""
