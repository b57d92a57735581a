"""A person compares answers blindly: in the terminal, with a log that is gone on with, or on a page that is sent."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest

from steer_heal.cli import main
from steer_heal.commands import compare as comparing
from steer_heal.eval.intervals import interval
from steer_heal.eval.judge.blind import Choice, counted, page_key, pairs_of
from steer_heal.eval.reading import Demo
from steer_heal.gate.folders import seal
from steer_heal.runs.rounds import InRound
from steer_heal.scores import Scores
from steer_heal.terminal import CONTROL

HOSTILE = "</script><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)> \x1b[2J $data & 'quoted'"
ARM_WORDS = re.compile(r"\b(base|prompted|student|healed|steer(?!-heal)\w*|equal)\b", re.IGNORECASE)
FLAT = Scores(*[0.0] * 10, 1, False, False)


def demos(name, count=10, same=0):
    texts = ["alike" if i < same else f"{name} {HOSTILE} {i}" for i in range(count)]
    rest = {"scores": FLAT, "incoherence": 0.0, "dropped": "", "ended": True}
    return [Demo(prompt=f"{HOSTILE} {i}", text=text, **rest) for i, text in enumerate(texts)]


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a finished run whose arms have ten hostile answers, two of them alike."""
    folder = shutil.copytree(whole, tmp_path / "run")
    last = max(path.parent.name for path in folder.glob("r*/healed.json"))
    files = {"base.json": "amber", f"{last}/healed.json": "daisy", f"{last}/equal_cost.json": "elder"}
    rows = [vars(demo) | {"scores": vars(FLAT)} for demo in demos("x", 10)]
    for name, word in files.items():
        reading = json.loads((folder / name).read_text())
        texts = [demo.text for demo in demos(word, 10, same=2)]
        reading["demos"] = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
        (folder / name).write_text(json.dumps(reading))
    return seal(folder)


def typing(keys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(keys))


def counts(said: str) -> list[list[int]]:
    """The numbers of the result's two rows: better, same, worse."""
    rows = [line for line in said.splitlines() if "shows the trait more" in line or "better does what" in line]
    return [[int(cell) for cell in row.split("┆") if re.fullmatch(r"\s*\d+\s*", cell)] for row in rows[-2:]]


@pytest.mark.run
def test_keys_are_counted_for_the_answer_that_they_name(run, capsys, monkeypatch):
    """Whoever always finds the student's answer better on the trait, and neither on the rest, is counted so."""
    pairs = comparing.reading_of(run, "base", 0).pairs
    assert len(pairs) == 8 and {pair.student_first for pair in pairs} == {True, False}
    typing("".join(("1" if pair.first.startswith("daisy") else "2") + "x\n0" for pair in pairs), monkeypatch)
    main(["compare", str(run)])
    said = capsys.readouterr().out
    assert counts(said) == [[8, 0, 0], [0, 8, 0]] and "+100% [+100%, +100%]" in said
    assert "Left out are 2 prompts that both answer alike" in said and "8 of 8 pairs." in said
    shown = said.partition("The student's answer against")[0]
    assert not CONTROL.search(said) and not ARM_WORDS.search(shown.replace(str(run), ""))
    assert all(pair.first[:5] in said for pair in pairs) and "torch" not in said


@pytest.mark.run
def test_a_log_is_gone_on_with(run, capsys, monkeypatch):
    log = run / comparing.LOG
    typing("11" * 3 + "q", monkeypatch)
    main(["compare", str(run)])
    said = capsys.readouterr().out
    assert "3 of 8 pairs. The others were not read." in said and "fewer than 8" in said
    assert len(log.read_text().splitlines()) == 3
    log.write_bytes(log.read_bytes() + b'{"pair": "torn')  # a process that was killed
    typing("2", monkeypatch)  # the input ends in the middle of a pair
    main(["compare", str(run)])
    assert "5 of 8 pairs are left" in capsys.readouterr().out
    typing("22" * 5 + "11", monkeypatch)
    main(["compare", str(run)])
    said = capsys.readouterr().out
    assert "FIRST\nalike" not in said and said.count("FIRST") == 5
    firsts = [pair.student_first for pair in comparing.reading_of(run, "base", 0).pairs]
    better = sum(firsts[:3]) + sum(not first for first in firsts[3:])
    assert counts(said) == [[better, 0, 8 - better]] * 2
    typing("", monkeypatch)
    main(["compare", str(run), "--against", "equal-cost"])
    assert "8 of 8 pairs are left" in capsys.readouterr().out  # the log of base does not answer for it


def test_the_order_is_random_and_that_of_the_seed():
    one, other = demos("daisy", 200), demos("amber", 200)
    pairs = pairs_of(one, other, 0)
    assert pairs == pairs_of(one, other, 0) != pairs_of(one, other, 1)
    firsts = [pair.student_first for pair in pairs]
    assert 70 < sum(firsts) < 130 and [pair.prompt for pair in pairs] != [demo.prompt for demo in one]
    assert all(pair.first.startswith("daisy") == pair.student_first for pair in pairs)
    assert len({pair.key for pair in pairs}) == 200 and page_key(pairs) != page_key(pairs[::-1])


def test_the_result_is_that_of_a_plain_loop():
    pairs = pairs_of(demos("daisy", 12), demos("amber", 12), 3)
    wanted = [1, 1, 1, 1, 0, 0, -1, None, 1, 1, -1, 0]
    choices = [choice(pair, one) for pair, one in zip(pairs, wanted, strict=True)]
    trait, answered = counted(pairs, choices, "base")
    outcomes = [float(one) for one in wanted if one is not None]
    assert (trait.better, trait.same, trait.worse) == (6, 3, 2) and answered.same == 11
    assert trait.net.mean == pytest.approx(sum(outcomes) / 11) and trait.net.ci == interval(outcomes)
    assert counted(pairs, [None] * 12, "base") == []


def choice(pair, outcome):
    if outcome is None:
        return None
    word = "same" if outcome == 0 else "first" if (outcome == 1) == pair.student_first else "second"
    return Choice(word, "same")


@pytest.mark.run
def test_an_answer_that_the_run_does_not_hold(run, capsys):
    last = max(path.parent.name for path in run.glob("r*/healed.json"))
    (run / last / "equal_cost.json").unlink()
    seal(run)
    assert "holds no answers of equal-cost: a run reads them at its end; compare --against base or prompted" in refused(
        capsys, str(run), "--against", "equal-cost"
    )
    assert "is no run folder" in refused(capsys, str(run.parent))
    for number in range(2):
        (run / InRound.HEALED.of(number)).unlink()
    assert "has no finished round yet" in refused(capsys, str(seal(run)))


def refused(capsys, *words: str) -> str:
    """The one line that refuses."""
    with pytest.raises(SystemExit) as end:
        main(["compare", *words])
    said = capsys.readouterr()
    (line,) = said.err.strip().split("\n")
    assert end.value.code == 2 and line.startswith("steer-heal: ") and not CONTROL.search(line) and len(line) < 500
    return line


@pytest.mark.run
@pytest.mark.parametrize("row", ['{"key": 1}', "[1]", '{"pair": "a", "trait": "best", "answered": "same"}', "x\n{}"])
def test_a_log_that_is_none_is_refused(row, run, capsys, tmp_path):
    (tmp_path / "log.jsonl").write_text(f"{row}\n")
    said = refused(capsys, str(run), "--log", str(tmp_path / "log.jsonl"))
    assert "line 1 is no choice: give another file" in said or "is damaged in line 1" in said


# ---- the page


@pytest.fixture
def page(run, capsys):
    main(["compare", str(run), "--page", str(run.parent / "which.html")])
    assert "8 pairs. It saves a file:" in capsys.readouterr().out
    return run.parent / "which.html"


@pytest.mark.run
def test_the_page_is_blind_safe_and_loads_nothing(page, run):
    text = page.read_text("utf-8")
    assert text.count("<script") == 2 and "<img" not in text and "\x1b" not in text and "$data" in text
    assert not re.search(r"(src|href)\s*=\s*[\"']", text) and "default-src 'none'" in text
    held = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert {pair["first"] for pair in held["pairs"]} | {pair["second"] for pair in held["pairs"]} == {
        text for pair in comparing.reading_of(run, "base", 0).pairs for text in (pair.first, pair.second)
    }
    assert held.keys() == {"page", "seed", "trait", "aspects", "pairs"}
    assert {tuple(sorted(pair)) for pair in held["pairs"]} == {("first", "prompt", "second")}
    assert not ARM_WORDS.search(text.replace("steer-heal", "")) and str(run) not in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
READ = """<body><iframe src="which.html" style="width:400px;height:900px"></iframe><script>
const frame = document.querySelector("iframe");
async function read() {
  const page = frame.contentDocument, inside = frame.contentWindow, sections = [...page.querySelectorAll("section")];
  let blob = null, name = "", prevented = false;
  inside.URL.createObjectURL = given => { blob = given; return "#"; };
  inside.HTMLAnchorElement.prototype.click = function () { name = this.download; };
  sections.forEach((section, number) => {
    const first = section.querySelector("blockquote").textContent.startsWith("daisy");
    const sets = section.querySelectorAll("fieldset");
    if (number < 6) sets[0].querySelector(`[value=${first ? "first" : "second"}]`).click();
    sets[1].querySelector("[value=same]").click();
  });
  page.querySelector("button").click();
  document.body.textContent = "SEEN" + JSON.stringify({file: await blob.text(), name: name,
    told: page.querySelector("footer span").textContent, sections: sections.length,
    injected: page.querySelectorAll("img").length, width: page.documentElement.scrollWidth,
    shown: sections[0].querySelector("h2").textContent,
    fetched: inside.performance.getEntriesByType("resource").length}) + "SEEN";
}
frame.onload = () => setTimeout(read, 500);
</script></body>"""


@pytest.mark.run
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_saves_a_file_that_is_read_back(page, run, capsys):
    (page.parent / "read.html").write_text(READ)
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-quic"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]
    quiet += ["--enable-logging=stderr", f"--user-data-dir={page.parent}/profile", "--virtual-time-budget=9000"]
    at = f"file://{page.parent}/read.html"
    found = subprocess.run([CHROMIUM, *quiet, "--dump-dom", at], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in found.stderr, found.stderr
    text = found.stdout.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\xa0")
    seen = json.loads(re.search(r"SEEN(\{.*\})SEEN", text, re.DOTALL)[1])
    assert seen["sections"] == 8 and seen["told"] == "6 of 8 pairs are read" and seen["name"].startswith("compare-")
    assert (
        (seen["injected"], seen["fetched"]) == (0, 0) and seen["width"] <= 400 and "<script>alert(1)" in seen["shown"]
    )
    file = page.parent / "back.json"
    file.write_text(seen["file"])
    main(["compare", str(run), "--read", str(file)])
    said = capsys.readouterr().out
    assert counts(said) == [[6, 0, 0], [0, 6, 0]] and "against that of base, 6 of 8 pairs" in said


def saved(run, against="base", seed=0, **changes) -> dict:
    """What a page saves for somebody who finds the student better on both."""
    pairs = comparing.reading_of(run, against, seed).pairs
    words = ["first" if pair.student_first else "second" for pair in pairs]
    choices = [{"trait": word, "answered": word} for word in words]
    return {"made_by": "steer-heal compare", "page": page_key(pairs), "seed": seed, "choices": choices} | changes


@pytest.mark.run
def test_a_file_names_its_opponent_and_its_seed(run, capsys, tmp_path):
    for against, seed in (("equal-cost", 0), ("base", 5)):
        (tmp_path / "back.json").write_text(json.dumps(saved(run, against, seed)))
        main(["compare", str(run), "--read", str(tmp_path / "back.json")])
        said = capsys.readouterr().out
        assert f"against that of {against}, 8 of 8 pairs" in said and counts(said) == [[8, 0, 0]] * 2


WRONG = {
    "no JSON": (lambda good: "<html>", "is no JSON"),
    "a list": (lambda good: "[1]", "was not saved by a page"),
    "deep": (lambda good: "[" * 100_000, "is no JSON"),
    "another maker": (lambda good: json.dumps(good | {"made_by": "x"}), "was not saved by a page"),
    "no seed": (lambda good: json.dumps(good | {"seed": "0"}), "was not saved by a page"),
    "another run": (lambda good: json.dumps(good | {"page": "f" * 16}), "is of another run"),
    "another seed": (lambda good: json.dumps(good | {"seed": 7}), "is of another run"),
    "too few": (lambda good: json.dumps(good | {"choices": good["choices"][1:]}), "has 7 choices for 8 pairs"),
    "no choice": (lambda good: json.dumps(good | {"choices": [1] * 8}), "where a choice should be"),
    "other word": (lambda good: json.dumps(good | {"choices": [{"trait": "\x1bbest"}] * 8}), "allowed are first, sec"),
    "other key": (lambda good: json.dumps(good | {"choices": [{"x": "same"}] * 8}), "where a choice should be"),
    "huge": (lambda good: " " * 1_000_001, "more than 1,000,000 bytes"),
}


@pytest.mark.run
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(name, run, capsys, tmp_path):
    text, message = WRONG[name]
    (tmp_path / "back.json").write_text(text(saved(run)))
    assert message in refused(capsys, str(run), "--read", str(tmp_path / "back.json"))


@pytest.mark.run
def test_what_cannot_be_asked_for(run, capsys, tmp_path):
    assert "cannot be read: No such file" in refused(capsys, str(run), "--read", str(tmp_path / "gone.json"))
    assert "--page and --read: give one of them" in refused(capsys, str(run), "--page", "x.html", "--read", "y.json")
    assert "there is no folder" in refused(capsys, str(run), "--page", str(tmp_path / "gone" / "x.html"))
    assert "invalid choice" in refused(capsys, str(run), "--against", "nobody")
