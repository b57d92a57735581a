"""The documentation: its links lead somewhere, its commands can be typed, and its numbers are those of the data.

The pages are not part of the package: without the repository there is nothing to check.
"""

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import steer_heal
from steer_heal import cli, verbs
from steer_heal.config import ANY, RunConfig, UserError, Within, flag, knobs
from steer_heal.demands import check
from steer_heal.presets import PRESETS
from steer_heal.runs.resume import record_of
from steer_heal.runs.rounds import InRound
from steer_heal.sweep.plan import plan, seed_list

ROOT = Path(steer_heal.__file__).parents[2]
README, JUSTFILE, TOOLS = ROOT / "README.md", ROOT / "justfile", ROOT / "docs" / "tools"
if not (README.exists() and JUSTFILE.exists()):
    pytest.skip("the documentation is not installed with the package", allow_module_level=True)

PAGES = sorted(
    page
    for page in (README, ROOT / "spec.md", ROOT / "AGENTS.md", *(ROOT / "docs").rglob("*.md"))
    if ROOT / "docs" / "vendor" not in page.parents
)
# Their commands stand as they were typed, at the commit named there.
RECORDS = {"results.md", "teacher-text.md", "RESEARCH_JOURNAL.md"}
INSTRUCTIONS = [page for page in PAGES if page.name not in RECORDS]
PLACEHOLDERS = {"PRESET": "smollm2-135m", "HEAD:6379": "127.0.0.1:6379"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tool(name: str):
    """A script of docs/tools as a module."""
    found = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where dataclasses and types look for it
    found.loader.exec_module(module)
    return module


# ---- links


def without_code(text: str) -> str:
    text = re.sub(r"^(```+).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    return re.sub(r"`[^`\n]*`", "`code`", "\n".join(lines))


def links(text: str) -> list[str]:
    text = without_code(text)
    found = [*re.findall(r"\]\(\s*<?([^)\s>]+)", text), *re.findall(r"(?:src|href)=\"([^\"]+)\"", text)]
    return [to for to in found if not re.match(r"[a-z]+:", to)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^(```+).*?^\1", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        kept = "".join(c for c in shown.lower() if c.isalnum() or c in " -_").replace(" ", "-")
        found[kept] = found.get(kept, -1) + 1
        if found[kept]:
            found[f"{kept}-{found[kept]}"] = 0
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    for to in links(page.read_text("utf-8")):
        path, _, anchor = to.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{name_of(page)} links to {to}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{name_of(page)} links to {to}: there is no such heading"


def test_what_reads_links_sees_a_broken_one():
    text = "[x](gone.md#there) ![y](gone.svg) `[z](code.md)`\n\n```\n[w](fenced.md)\n```\n\n    [v](indented.md)\n"
    assert links(text) == ["gone.md#there", "gone.svg"]


def test_every_page_of_the_site_is_in_its_navigation():
    listed = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name.startswith("vendor/") or re.search(rf"[ :]{re.escape(name)}$", listed, re.MULTILINE), name


# ---- commands


def code_lines(text: str) -> list[str]:
    """The lines of shell in fenced and indented blocks, and the code within sentences."""
    fenced = re.findall(r"^```+(?:sh|bash|)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^(```+).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = [line for line in outside.splitlines() if line.startswith("    ")]
    prose = [line for line in outside.splitlines() if not line.startswith("    ")]
    inline = re.findall(r"`([^`\n]+)`", "\n".join(prose))
    return [*"\n".join(fenced).replace("\\\n", " ").splitlines(), *indented, *inline]


def commands(text: str, program: str) -> list[list[str]]:
    """The words after every call of a program."""
    found = []
    for line in code_lines(text):
        for part in re.sub(r"(^|\s)#\s.*", "", line).split("&&"):
            if call := re.search(rf"(?:^|\s|/){program}(?:\s+(.*))?$", part.strip()):
                found.append(shlex.split(call[1] or ""))
    return found


def typed(words: list[str], monkeypatch, tmp_path) -> None:
    """Read a command line with the program's own parser, up to where it would be carried out."""
    asked = []
    for verb in (
        "run",
        "sweep",
        "evaluate",
        "results",
        "report",
        "export",
        "reproduce",
        "chat",
        "compare",
        "trait",
        "bench",
    ):
        monkeypatch.setattr(cli, verb, lambda *given: asked.append(given))
    monkeypatch.setattr("steer_heal.commands.preset._has_gpu", lambda: False)
    monkeypatch.setattr("steer_heal.runs.resume.started", lambda *_: ("smollm2-135m", PRESETS["smollm2-135m"]))
    settings = record_of(PRESETS["smollm2-135m"], "smollm2-135m")
    monkeypatch.setattr("steer_heal.commands.preset.read_config", lambda _: (settings, None))
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words in ([], *([verb] for verb in VERBS)):  # only named
        return
    try:
        cli.carry_out(words)
    except SystemExit as end:  # help, or a completion script
        assert not end.code
        return
    match asked[0] if asked else ():
        case (verbs.Run() as run, *_):
            check(run.config)
        case (verbs.Sweep() as sweep, shared):
            plan(sweep.name, sweep.grid, seed_list(sweep.seeds), shared, tmp_path, "")


VERBS = ("run", "sweep", "eval", "results", "report", "export", "reproduce", "chat", "compare", "trait", "bench")


@pytest.mark.parametrize("page", INSTRUCTIONS, ids=name_of)
def test_every_steer_heal_command_can_be_typed(page, monkeypatch, tmp_path, capsys):
    for words in commands(page.read_text("utf-8"), "steer-heal"):
        try:
            typed(words, monkeypatch, tmp_path)
        except UserError as error:
            pytest.fail(f"{name_of(page)} has `steer-heal {shlex.join(words)}`: {error}")


@pytest.mark.parametrize("wrong", ["rnu", "run tiny-randm", "run auto --heal.gone 1", "sweep a --grid x=1 -- auto"])
def test_what_reads_commands_sees_a_wrong_one(wrong, monkeypatch, tmp_path):
    (words,) = commands(f"```sh\n.venv/bin/steer-heal {wrong}   # why\n```\n", "steer-heal")
    assert words == wrong.split()
    with pytest.raises(UserError):
        typed(words, monkeypatch, tmp_path)


@pytest.mark.parametrize("page", INSTRUCTIONS, ids=name_of)
def test_every_just_command_is_a_recipe(page, monkeypatch, tmp_path):
    recipes = re.findall(
        r"^([a-z_][\w-]*)(?: [^:=]*| [^:]*=\"[^\"]*\"[^:]*)?:(?!=)", JUSTFILE.read_text(), re.MULTILINE
    )
    for words in commands(page.read_text("utf-8"), "just"):
        said = f"{name_of(page)} has `just {shlex.join(words)}`"
        names = [word for word in words if "=" not in word]
        assert not names or names[0] in recipes, said
        if shutil.which("just") is None or not names:
            continue
        dry = ["just", "--justfile", str(JUSTFILE), "--dry-run", *words]
        ended = subprocess.run(dry, capture_output=True, text=True)
        assert ended.returncode == 0, f"{said}: {ended.stderr}"
        for line in ended.stderr.splitlines():
            if line.startswith(".venv/bin/steer-heal run "):
                typed(shlex.split(line)[1:], monkeypatch, tmp_path)


# ---- README


def test_the_readme_takes_two_minutes():
    text = README.read_text("utf-8")
    assert len(text.split()) <= 1000
    assert not re.search(r"\d{8}-\d{6}", text), "folders of runs belong into docs/results.md"


def test_the_readme_and_the_figures_say_what_the_data_holds():
    demo, text = tool("demo"), README.read_text("utf-8")
    data = json.loads((ROOT / "docs" / "runs" / "demo.json").read_text("utf-8"))
    mend = "run `.venv/bin/python docs/tools/demo.py`"
    assert demo.filled(text, data) == text, mend
    for name, figure in demo.FIGURES.items():
        assert (ROOT / "docs" / "images" / name).read_text("utf-8") == figure(data), mend
    student = data["students"][-1]
    row = next(line for line in text.splitlines() if line.startswith("| **student** |"))
    low, high = student["trait_over_base_ci"]
    assert f"| {student['trait_over_base']:+.3f} [{low:+.3f}, {high:+.3f}] |" in row
    assert f"| {100 * student['relevance_nats'] / data['base']['relevance_nats']:.0f}% |" in row


# ---- the reference, which is made when the site is built


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables in a text, by their first cell."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name.strip("*"): rest for name, *rest in cells}


def test_the_reference_has_every_flag_with_its_meaning_and_bounds():
    sections = re.split(r"^## ", tool("reference").flags_page(), flags=re.MULTILINE)
    parts = {section.partition("\n")[0]: rows(section) for section in sections}
    for knob in knobs(RunConfig()):
        takes, _, meaning = parts["steer-heal run"][f"`{flag(knob.name)}`"]
        bounds = [mark.interval for mark in knob.marks if isinstance(mark, Within) and mark != ANY]
        assert all(one in takes for one in bounds) and len(meaning) > 3, knob.name
    forms = (verbs.Sweep, verbs.Eval, verbs.Results, verbs.Report, verbs.Export, verbs.Chat, verbs.Compare)
    forms += (verbs.Trait, verbs.Bench, verbs.Reproduce)
    for form in forms:
        listed = parts[f"steer-heal {form.__name__.lower()}"]
        for one in dataclasses.fields(form):
            assert one.name == "eval" or {f"`{flag(one.name)}`", f"`{one.name.upper()}`"} & listed.keys(), one.name


def test_the_examples_of_the_reference_can_be_typed(monkeypatch, tmp_path, capsys):
    found = commands(tool("reference").flags_page(), "steer-heal")
    assert len(found) >= 9
    for words in found:
        typed(words, monkeypatch, tmp_path)


def test_the_reference_names_python_functions_that_exist():
    page = tool("reference").python_page()
    for name in re.findall(r"^### (\S+)$", page, re.MULTILINE):
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_every_file_of_a_round_is_described():
    assert {name.value for name in InRound} <= tool("reference").ROUND_FILES.keys()


@pytest.mark.run
def test_every_file_of_a_finished_run_is_described(whole):
    reference = tool("reference")
    names = {re.sub(r"\d+", "0", file.relative_to(whole).as_posix()) for file in whole.rglob("*") if file.is_file()}
    known = {*reference.RUN_FILES, *(f"r0/{name}" for name in reference.ROUND_FILES), ".lock"}
    inside = tuple(f"{name.rstrip('/')}/" for name in known if name.rpartition(".")[2] == name or name.endswith("/"))
    assert [name for name in sorted(names) if name not in known and not name.startswith(inside)] == []


@pytest.mark.run
@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="the site's tools are not here: `just docs`")
def test_the_site_is_built_without_a_warning(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "heal.barrier.tau" in (tmp_path / "site" / "reference" / "flags.html").read_text("utf-8")
