"""The reference pages of the website, made from the code: flags, files of a run folder, Python functions.

Meanings are the docstrings at the fields, bounds and defaults those that the program checks and uses. Nothing here
loads a model or torch.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from steer_heal import VERSION, verbs
from steer_heal.config import COMMON, SIZES, Counts, EvalConfig, RunConfig, Within, flag, hints, knobs
from steer_heal.data import Contrast, Trait
from steer_heal.distil.record import Anchor, Completion, DoseCurve
from steer_heal.eval.catalogue import CATALOGUE
from steer_heal.eval.harness.record import Benchmarks
from steer_heal.eval.prompts import PromptsReading
from steer_heal.eval.reading import ArmReading, Geometry, Survey
from steer_heal.eval.robustness import Robustness
from steer_heal.heal.steps import HealStep
from steer_heal.presets import DEFAULT_PRESET, PRESETS, RECIPES
from steer_heal.runs.reproduction import Reproducible
from steer_heal.runs.rounds import InRound
from steer_heal.runs.summary import Summary
from steer_heal.steer.layers import LayerReport
from steer_heal.steer.personas import Neighbour

MADE = f"*Made from the code of version {VERSION}.*"


# ---- what the source says


@cache
def _documented(module: str) -> dict[str, dict[str, str]]:
    """For every class of a module, the docstring at each of its fields; that of the class itself is under ""."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text("utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            texts = {"": ast.get_docstring(node) or ""}
            for here, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(here, ast.AnnAssign) and _is_text(after):
                    texts[here.target.id] = after.value.value
            found[node.name] = texts
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def meaning(form: type, name: str = "") -> str:
    """The docstring at a field of a dataclass, also an inherited one; of the class itself without a name."""
    for one in form.__mro__:
        if text := _documented(one.__module__).get(one.__name__, {}).get(name) if one is not object else "":
            return " ".join(text.split())
    return ""


# ---- tables


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(value: Any) -> str:
    return f"`{value}`"


def values(hint: Any) -> str:
    """What a flag takes, in words: `auto` or a number in [0, 1]."""
    bounds = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Within)]
    hint = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    within = f" in {bounds[0].interval}" if bounds and bounds[0].interval != "(-inf, inf)" else ""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return " or ".join(_kind(part, within) for part in parts if part is not type(None))


def _kind(hint: Any, within: str) -> str:
    plain = {int: f"whole number{within}", float: f"number{within}", str: "text", bool: "switch"}
    if hint in plain:
        return plain[hint]
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(_code, inner))
    if typing.get_origin(hint) is tuple and inner[-1] is not Ellipsis:
        return f"two numbers{within}"
    choices = [part for part in _flat(inner[0])]
    return "any of " + ", ".join(map(_code, choices)) if choices else "several texts"


def _flat(hint: Any) -> Iterator[Any]:
    """The values of a Literal, or of a union of them."""
    for part in typing.get_args(hint):
        yield from _flat(part) if typing.get_args(part) else [part]


def shown(value: Any) -> str:
    """A default as one would type it."""
    if value is None or value in ("", ()):
        return ""
    if isinstance(value, tuple):
        return _code(" ".join(map(str, value)))
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else _code(value)


# ---- flags


def flags_page() -> str:
    """Every flag of every verb, with what it takes, its default and its meaning."""
    parts = ["# Flags", MADE, _run_flags(RunConfig()), "## Presets", _presets()]
    for name, form in _verbs().items():
        parts += [f"## steer-heal {name}", meaning_of_verb(form), _verb_flags(form)]
    return "\n\n".join(parts) + "\n"


def _run_flags(usual: RunConfig) -> str:
    about = (
        "`steer-heal run PRESET --help` lists the flags in bold, `--help-all` lists all. The defaults hold where a "
        "preset sets nothing else. To turn a switch off, put `no-` before its last word."
    )
    return "\n\n".join(["## steer-heal run", meaning_of_verb(verbs.Run), about, *_sections(usual, "")])


def _sections(config: Any, prefix: str) -> Iterator[str]:
    form, rows, inner = type(config), [], []
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints(form)[field.name]
        if dataclasses.is_dataclass(value):
            inner.append((value, f"{prefix}{field.name}."))
            continue
        name = _code(flag(f"{prefix}{field.name}"))
        name = f"**{name}**" if COMMON in getattr(hint, "__metadata__", ()) else name
        rows.append((name, values(hint), shown(value), meaning(form, field.name)))
    if rows:
        title = f"### {prefix.removesuffix('.')}" if prefix else "### The run"
        yield "\n\n".join([title, meaning(form), _table(("flag", "takes", "default", "meaning"), rows)])
    elif prefix:
        yield f"### {prefix.removesuffix('.')}\n\n{meaning(form)}"
    if form is EvalConfig:
        yield _sizes()
    for value, name in inner:
        yield from _sections(value, name)


def _sizes() -> str:
    rows = [
        (meaning(Counts, field.name), *(str(getattr(counts, field.name)) for counts in SIZES.values()))
        for field in dataclasses.fields(Counts)
    ]
    return "The number of items in each `--eval.size`:\n\n" + _table(("items", *SIZES), rows)


def _presets() -> str:
    about = (
        f"A preset is a set of values, written after `run`: `steer-heal run smollm2-135m`. Without one, "
        f"`{DEFAULT_PRESET}` is taken. A model in its place (a hub id, a folder or a `.gguf` file) is run with the "
        f"settings of `{RECIPES['cpu']}` on a CPU and of `{RECIPES['cuda']}` on a GPU. A preset has the defaults above "
        "but for these:"
    )
    usual, parts = {knob.name: knob.value for knob in knobs(RunConfig())}, [about]
    for name, config in PRESETS.items():
        rows = [(_code(flag(k.name)), shown(k.value) or "none") for k in knobs(config) if k.value != usual[k.name]]
        parts.append(f"### {name}\n\n" + _table(("flag", "value"), rows))
    return "\n\n".join(parts)


def _verbs() -> dict[str, type]:
    """The verbs but `run`, by name."""
    found = {}
    for part in typing.get_args(verbs.verbs(verbs.Run())):
        form = typing.get_args(part)[0]
        if form is not verbs.Run:
            found[form.__name__.lower()] = form
    return found


def meaning_of_verb(form: type) -> str:
    """A verb's docstring; its example as code."""
    text, _, example = inspect.cleandoc(form.__doc__).partition("Example: ")
    return f"{' '.join(text.split())}\n\n```sh\n{example.strip()}\n```" if example else text


def _verb_flags(form: type) -> str:
    rows, below = [], ""
    for field in dataclasses.fields(form):
        hint, value = hints(form)[field.name], _default(field)
        if dataclasses.is_dataclass(value):
            below = f"\n\nBeside these it takes the flags of [{field.name}](#{field.name}) above."
            continue
        positional = "Positional" in map(str, getattr(hint, "__metadata__", ()))
        name = _code(field.name.upper() if positional else flag(field.name))
        bare = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        rows.append((name, values(bare), shown(value), meaning(form, field.name)))
    return _table(("flag", "takes", "default", "meaning"), rows) + below


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


# ---- files of a run folder

EVENT = (
    "one event a line: the start with its command, every artefact with its SHA-256 and seconds, every round's result"
)
ENV = "Python and package versions, commit, processor, threads, type of the weights, SHA-256 of the model's files"
RUN_FILES: dict[str, tuple[Any, str]] = {
    "config.json": (None, "every setting of the run, see [flags](flags.md)"),
    "trait.json": (Trait, "the trait as it was read"),
    "env.json": (None, ENV),
    "events.jsonl": (None, EVENT),
    "first_look.json": (ArmReading, "the trait's instrument on base and both personas, before anything is trained"),
    "probes.jsonl": (Contrast, "test questions that base wrote; only for a trait without its own"),
    "base.json": (ArmReading, "base"),
    "prompted.json": (ArmReading, "base with the positive persona as system prompt"),
    "negative.json": (ArmReading, "base with the negative persona as system prompt"),
    "without.json": (Neighbour, "traits whose vectors are projected out; only with `steer.without`"),
    "prompts.json": (PromptsReading, "base under five system prompts, the best of them; at the end of the run"),
    "survey.json": (Survey, "what steering does, band by band; only with an automatic band or plain range"),
    "anchor.jsonl": (Anchor, "the anchor's texts; only with an anchor"),
    "decode_rows.json": (None, "how many rows are decoded together; only when it was chosen by the run"),
    "plain/d0.json": (ArmReading, "base with the first round's vector, a file for each dose"),
    "demos.jsonl": (None, "answers of base and prompted, side by side"),
    "adapter/": (None, "the student as one PEFT adapter, with a README; at the end of the run"),
    "summary.json": (Summary, "every figure with its interval; at the end of the run"),
    "judge.jsonl": (None, "what `eval --judge` keeps: answers of the arms and of judges"),
    "compare.jsonl": (None, "what `compare` keeps: a choice a line"),
    "harness.json": (Benchmarks, "benchmarks of the last student; only after `eval --harness`"),
    "robustness.json": (Robustness, "what is left of the trait elsewhere; only after `eval --robustness`"),
    "report.html": (None, "the report as one page"),
    "diary.md": (None, "the report in short"),
}
ROUND_FILES: dict[str, tuple[Any, str]] = {
    "vector": (None, "the steering vector as safetensors"),
    "vector/layers.json": (LayerReport, "how well each steered block tells the personas apart"),
    "dose.json": (DoseCurve, "the doses tried and the one chosen"),
    "completions.jsonl": (Completion, "the teacher's text, judged by the filter"),
    "own.jsonl": (Completion, "the student's own text that it was trained on, judged by the filter"),
    "steered.json": (ArmReading, "the teacher"),
    "adapter": (None, "this round's PEFT adapter"),
    "heal.jsonl": (HealStep, "one training step a line"),
    "geometry.json": (Geometry, "direction and size of the round's move"),
    "healed.json": (ArmReading, "the student"),
    "equal_cost.json": (ArmReading, "base steered at the student's cost"),
    "equal_trait.json": (ArmReading, "base steered as far as the student; in the last round"),
    "demos.jsonl": (None, "answers of base, teacher and student, side by side"),
}
EXPORT_FILES: dict[str, tuple[Any, str]] = {
    "README.md": (None, "the model card; beside a .gguf file NAME.md"),
    "reproduce.json": (
        Reproducible,
        "what makes the run again, and what came out; beside a .gguf file NAME.reproduce.json",
    ),
}


def files_page() -> str:
    """The files of a run folder, and the fields of each kind of record."""
    rounds = {f"r00/{name.value}": ROUND_FILES[name.value] for name in InRound}
    kinds: dict[str, type] = {}
    for kind, _ in (*RUN_FILES.values(), *rounds.values(), *EXPORT_FILES.values()):
        _collect(kind, kinds)
    about = (
        "A run writes one folder. A file exists only when it is complete. `.json` files hold one value, `.jsonl` files "
        "one a line. A run that trains on one kind of text alone lacks the other's file. Versions that share their "
        "first two numbers read one another's folders."
    )
    parts = ["# Files of a run folder", MADE, about, "## The run", _file_table(RUN_FILES)]
    parts += ["## A round", "The first round is `r00`, the second `r01`.", _file_table(rounds)]
    parts += ["## An export", "Beside the weights lie:", _file_table(EXPORT_FILES)]
    parts += ["## Records", "A field that has no value is left out of the file."]
    for name in sorted(kinds):
        parts += [f"### {name}", meaning(kinds[name]), _fields(kinds[name])]
    return "\n\n".join(parts) + "\n"


def _file_table(files: dict[str, tuple[Any, str]]) -> str:
    rows = [(_code(name), _link(kind) if kind else "", text) for name, (kind, text) in files.items()]
    return _table(("file", "record", "content"), rows)


def _link(kind: type) -> str:
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def _collect(kind: Any, kinds: dict[str, type]) -> None:
    """Add the records in a type, and those in their fields."""
    for part in (kind, *typing.get_args(kind)):
        if part is not kind:
            _collect(part, kinds)
        elif isinstance(part, type) and _is_record(part) and part.__name__ not in kinds:
            kinds[part.__name__] = part
            for hint in typing.get_type_hints(part).values():
                _collect(hint, kinds)


def _is_record(kind: type) -> bool:
    return kind.__module__.startswith("steer_heal.") and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"))


MEASURED = {one.measure: f"{one.label}, {one.unit}" for one in CATALOGUE} | {
    one.interval: "its 95% interval" for one in CATALOGUE
}


def _fields(form: type) -> str:
    rows = [
        (_code(name), _typed(hint), meaning(form, name) or MEASURED.get(name, ""))
        for name, hint in typing.get_type_hints(form).items()
    ]
    return _table(("field", "type", "meaning"), rows)


def _typed(hint: Any) -> str:
    """A type in words, with links to the records in it."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return _link(hint) if _is_record(hint) else {"NoneType": "nothing"}.get(hint.__name__, hint.__name__)
    inner, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_typed(part) for part in inner if part is not type(None)) + ", optional" * (
            type(None) in inner
        )
    if origin is dict:
        return f"{_typed(inner[1])} by name"
    if origin is list or (origin is tuple and inner[-1] is Ellipsis):
        return f"list of {_typed(inner[0])}"
    if origin is tuple:
        return f"pair of {_typed(inner[0])}"
    return "any"


# ---- Python functions

ENTRIES = {
    "The interface": tuple(
        ("steer_heal.python", name) for name in ("load", "extract", "answer", "run", "resume", "Result")
    ),
    "Read and compare runs": (
        ("steer_heal.runs.reading", "load"),
        ("steer_heal.sweep.disk", "scan"),
        ("steer_heal.report.page", "build"),
        ("steer_heal.commands.export", "export"),
        ("steer_heal.commands.export_gguf", "export_gguf"),
        ("steer_heal.commands.reproduce", "reproduce"),
    ),
    "Underneath": (
        ("steer_heal.model.steering", "steering"),
        ("steer_heal.model.decode", "decode"),
        ("steer_heal.eval.instruments", "evaluate"),
        ("steer_heal.heal.train", "heal"),
        ("steer_heal.loop", "run"),
    ),
}
EXAMPLE = """\
```python
from pathlib import Path

from steer_heal.runs.reading import load

run = load(Path("outputs/RUN"))
for done in run.summary.rounds:
    print(done.round, done.verdict.word, done.healed.trait_over_base, done.healed.trait_over_base_ci)
```"""


def python_page() -> str:
    """Signatures and docstrings of the functions that a program of one's own may call."""
    about = (
        "`import steer_heal as sh` has the names of the first section, `sh.Trait`, `sh.load_trait` and `sh.VERSION`; "
        "`docs/tutorial.ipynb` goes through them. The other functions are behind the commands and may change between "
        "versions. Reading a finished run needs no torch:"
    )
    parts = ["# Python functions", MADE, about, EXAMPLE]
    for title, entries in ENTRIES.items():
        parts.append(f"## {title}")
        for module, name in entries:
            parts += [f"### {module}.{name}", *_described(module, name)]
    return "\n\n".join(parts) + "\n"


def _described(module: str, name: str) -> list[str]:
    """Signature and docstring of a function, or docstring of a class and signatures of its methods."""
    source = Path(importlib.util.find_spec(module).origin).read_text("utf-8")
    node = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    if isinstance(node, ast.FunctionDef):
        return [f"```python\n{_signature(node)}\n```", f"```text\n{ast.get_docstring(node) or ''}\n```"]
    members = [f"{ast.get_docstring(node)}"]
    for member in (n for n in node.body if isinstance(n, ast.FunctionDef)):
        shown = member.name if any("property" in ast.unparse(d) for d in member.decorator_list) else _signature(member)
        members.append(f"- `{shown}`: {' '.join((ast.get_docstring(member) or '').split())}")
    return ["\n".join([members[0], "", *members[1:]])]


def _signature(node: ast.FunctionDef) -> str:
    return f"{node.name}({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


PAGES = {"flags.md": flags_page, "files.md": files_page, "python.md": python_page}

if __name__ == "__main__":
    for name in sys.argv[1:] or PAGES:
        print(PAGES[name]())
