"""Read flags with tyro into a frozen dataclass, and report a mistake in one line."""

from __future__ import annotations

import difflib
import io
import re
from contextlib import redirect_stderr
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any

from steer_heal.config import COMMON, RunConfig, UserError, hints, knobs
from steer_heal.presets import MODELS_TOO

RUN_HELP = "Steer, distil, heal and bake a trait into a model, round after round."


def read(form: Any, words: list[str], prog: str, default: Any = None) -> Any:
    """Fill the dataclass `form` from the command line's words; `default` gives the values of flags not named.

    tyro prints its errors as a box on stderr. The box is captured here because tyro's own hook for errors is private.

    Raises UserError for words that cannot be read, and SystemExit when help was asked for.
    """
    import tyro

    said = io.StringIO()
    given = {} if default is None else {"default": default}
    try:
        with redirect_stderr(said):
            return tyro.cli(form, args=words, prog=prog, **given)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(condensed(said.getvalue())) from None


def words_of(flag: str, *values: str) -> list[str]:
    """A flag and its values as command-line words. A switch takes no value: true is --flag, false is its no- form."""
    section, dot, knob = flag.rpartition(".")
    switches = {"true": [f"--{flag}"], "false": [f"--{section}{dot}no-{knob}"]}
    return switches.get(" ".join(values).lower()) or [f"--{flag}", *values]


def short_help(usual: RunConfig) -> None:
    """Print the common flags of `run`; `usual` gives their defaults."""
    import tyro

    every = sum(1 for _ in knobs(usual))
    about = f"{RUN_HELP} In place of a preset, give {MODELS_TOO}."
    about += " In place of both, --config FILE takes the settings of a run's config.json or an export's reproduce.json."
    about += f" These are the flags that people use; --help-all lists all {every}."
    short = common(usual)
    tyro.cli(type(short), args=["--help"], prog="steer-heal run PRESET", description=about, default=short)


def common(config: Any) -> Any:
    """Return the config as a subclass of its own class whose help lists only the knobs marked COMMON."""
    from tyro.conf import Suppress

    shown = []
    for f in fields(config):
        value, hint = getattr(config, f.name), hints(type(config))[f.name]
        if is_dataclass(value):
            value = common(value)
            hint = type(value)
        elif COMMON not in getattr(hint, "__metadata__", ()):
            hint = Annotated[hint, Suppress]
        shown.append((f.name, hint, field(default=value)))
    form = make_dataclass(type(config).__name__, shown, bases=(type(config),), frozen=True)
    form.__doc__ = type(config).__doc__
    return form()


def condensed(box: str) -> str:
    """Condense tyro's message to one line, without title and frame. Of several similar flags, keep only the nearest."""
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
