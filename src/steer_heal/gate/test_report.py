"""The report: its numbers are right, hostile text is escaped, it is self-contained, unfinished runs work."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from plotly.offline import get_plotlyjs

from steer_heal import VERSION
from steer_heal.config import BarrierConfig, HealConfig, UserError
from steer_heal.eval import intervals
from steer_heal.eval.framed import InFrame
from steer_heal.eval.intervals import Change, across_seeds
from steer_heal.eval.prompts import BestPrompt
from steer_heal.eval.reading import ArmReading, trait_over
from steer_heal.gate.conftest import turned
from steer_heal.gate.folders import seal, sha256, write_events
from steer_heal.presets import PRESETS
from steer_heal.records import structured, unstructured
from steer_heal.report import opening, words
from steer_heal.report import page as report
from steer_heal.report.figures import frontier_figure, paths_figure
from steer_heal.report.html import marked
from steer_heal.runs.folder import RunDir
from steer_heal.runs.reading import load
from steer_heal.runs.resume import described
from steer_heal.runs.rounds import read_round
from steer_heal.runs.summary import Baselines, RunName, summarise
from steer_heal.scores import Scores
from steer_heal.sweep import disk, overview, results
from steer_heal.sweep.disk import identity

pytestmark = pytest.mark.run

STEP = {
    "epoch": 0,
    "objective": 3.0,
    "barrier": 0.0,
    "loss": 3.0,
    "tau": 0.05,
    "lam": 1.0,
    "anchor_lam": 1.0,
    "tokens": 9,
}
STEP |= {"grad_norm": 1.0, "lr": 1e-3, "step_seconds": 1.0, "tokens_per_s": 9.0}
HOSTILE = "<script>alert(1)</script></script><img src=https://example.org/x onerror=alert(2)>\x00 & 'quoted'"
TRAIT = "</title><script>alert(3)"  # a trait may have any name
CONTRAST = {"base": [0.1, 0.3, 0.2, 0.4], "prompted": [0.2, 0.5, 0.4, 0.5], "steered": [0.6, 0.7, 0.7, 0.8]}
CONTRAST |= {"healed": [0.4, 0.5, 0.5, 0.6], "negative": [-0.1, 0.0, -0.1, 0.1], "equal_cost": [0.2, 0.3, 0.3, 0.4]}
PROFILE = {"base": 0.30, "prompted": 0.40, "negative": 0.20, "healed": 0.35}  # probability of care, in every scene


SCORED = {"scores": dict.fromkeys((field.name for field in fields(Scores)), 0), "incoherence": -2.0}


class Tags(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))


def write_arm(
    path: Path, name: str, mass: float = 0.8, kept_share: float = 1.0, neutral_ppl: float = 20.0, **more: float | bool
) -> ArmReading:
    trait = sum(CONTRAST[name]) / 4
    demos = [
        {"prompt": f"{HOSTILE} {i}", "text": f"{name} {HOSTILE}", "dropped": "incoherence" * (i % 2), **SCORED}
        for i in range(12)
    ]
    items = {"contrast": CONTRAST[name], "yes_no": [2 * x for x in CONTRAST[name]], "mass": [mass] * 4}
    items["demo_coherent"] = [kept_share] * 4
    items |= {"neutral_nll": [math.log(neutral_ppl)] * 3, "off:thrift": [0.1, 0.2] if name == "healed" else [0.1, 0.15]}
    arm = {"arm": name, "instrument": "contrast", "dose": 0.7, "answer_mass": mass, "neutral_ppl": neutral_ppl}
    arm |= {"trait_nats": trait, "trait_ci": [trait - 0.1, trait + 0.1], "coherent_share": kept_share, "demo_ppl": 8.0}
    arm |= {"looped_share": 0.25, "styled_share": 0.0, "canary_share": 0.5, "ended_share": 0.4, "demo_words": 21.25}
    if name in PROFILE:
        rest = (1 - PROFILE[name]) / 6
        arm["scenes"] = [[PROFILE[name], *[rest] * 6]] * 4
        nats = dict.fromkeys(("care", "fairness", "loyalty", "auth", "sanctity", "liberty", "norms"), math.log(rest))
        nats["care"] = math.log(PROFILE[name])
        arm["profile"] = {f"{key}_nats": value for key, value in nats.items()}
        arm["profile"] |= {"source": "vignettes", "top1": 0.5, "top1_ci": [0.25, 0.75], "p_ans_any": 0.9}
        arm["profile"]["unreadable_share"] = 0.0
    arm |= {"items": items, "asked": dict.fromkeys([*items, "profile"], "same"), "demos": demos, "read": [], **more}
    path.write_text(json.dumps(arm), "utf-8")
    return structured(ArmReading, arm)


def write_run(folder: Path, rounds: int = 2, **healed_scores: float) -> Path:
    """Write a finished run: the healed student moved 0.25, the prompt 0.15, steering 0.45 nats/token."""
    heal = asdict(HealConfig(barrier=BarrierConfig(tau=0.05)))  # complete, as in a real run
    own = {"rounds": rounds, "seed": 7, "model.path": "org/model", "dose.range": "auto"}
    config = described(turned(PRESETS["tiny-random"], own)) | {"preset": "tiny-random", "trait": TRAIT + ".toml"}
    config["heal"] = heal
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "trait.json").write_text(json.dumps({"name": "love", "title": TRAIT}), "utf-8")
    env = {
        "python": "3.11",
        "platform": "Linux",
        "packages": {"steer_heal": VERSION},
        "cpus": 2,
        "threads": 2,
        "gpu": None,
    }
    (folder / "env.json").write_text(json.dumps(env), "utf-8")
    arms = [write_arm(folder / f"{name}.json", name) for name in ("base", "prompted", "negative")]
    (folder / "plain").mkdir()
    plain = [write_arm(folder / f"plain/d{i}.json", "equal_cost", dose=i + 1.0) for i in range(2)]
    events = [{"event": "start", "argv": ["run", "--trait", HOSTILE]}]
    for index in range(rounds):
        where = folder / f"r{index:02d}"
        where.mkdir()
        for name in ("steered", "healed", "equal_cost"):
            write_arm(where / f"{name}.json", name, **healed_scores)
        if index == rounds - 1:
            write_arm(where / "equal_trait.json", "equal_cost", reached=False)
        geometry = {"cos_first_vector": 1.0, "cos_shift_vector": 0.61, "cos_total_first": 0.57, "kl_to_base_nats": 0.02}
        geometry |= {"kl_to_base_rmse_nats": 0.05}
        (where / "geometry.json").write_text(json.dumps(geometry), "utf-8")
        curve = [
            {"dose": d, "survival": s, "fitted": s, "tail_ppl": 9.0, "example": HOSTILE}
            for d, s in ((0.0, 1.0), (0.5, 1.0), (2, 0.5))
        ]
        dose = {"rule": "survival", "dose": 1.0, "target": 0.75, "curve": curve, "completions": []}
        (where / "dose.json").write_text(json.dumps(dose), "utf-8")
        written = {"prompt": HOSTILE, "text": HOSTILE, "dose": 1.0, "ids": [1], "ended": True, **SCORED}
        completions = [written | {"dropped": "empty" * (i % 3 == 0)} for i in range(120)]
        (where / "completions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in completions), "utf-8")
        steps = [STEP | {"step": i, "divergence": 0.02 * i, "fired": i > 2, "anchor_fired": i > 3} for i in range(5)]
        (where / "heal.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps), "utf-8")
        (where / "adapter").write_text("adapter")
        (where / "vector").mkdir()
        layers = [{"layer": 1, "depth": 0.5, "relative_norm": 0.1, "split_half": 0.9, "auc": 1.0}]
        (where / "vector" / "layers.json").write_text(json.dumps(layers), "utf-8")
        events += [{"event": "stage", "artefact": f"r{index:02d}/{n}", "seconds": 2.0} for n in report.TIMED]
    write_events(folder, events)
    done = [read_round(RunDir(seal(folder)), index) for index in range(rounds)]
    base, prompted, negative = arms
    baselines = Baselines(base=base, prompted=prompted, negative=negative, plain=plain)
    of = RunName(model="org/model", trait="love", seed=7, preset="tiny-random")
    summary = replace(summarise(of, baselines, done, {"all": 90.0}), peak_memory_bytes=123_000_000)
    (folder / "summary.json").write_text(json.dumps(unstructured(summary)), "utf-8")
    return seal(folder)


def test_page_is_safe_and_self_contained(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    more = {"event": "file", "artefact": "r01/healed.json", "seconds": 1.5}
    more["sha256"] = {"r01/healed.json": sha256(folder / "r01/healed.json")}
    write_events(folder, [*RunDir(folder).events(), more])  # what the last round adds to an earlier reading
    path = report.build(folder).path
    page = path.read_text("utf-8")
    assert path.stat().st_size < 8e6
    ours = page.replace(get_plotlyjs(), "")
    assert len(ours) < len(page)
    assert "<script>alert" not in ours and "<img" not in ours and "\x00" not in ours
    assert "&lt;script&gt;alert(1)" in ours
    tags = Tags(ours).seen
    assert [t for t in tags if {"src", "href", "onerror"} & t[1].keys() or t[0] in ("link", "iframe", "base")] == []
    figures = 1 + 1 + 3 + 1 + 2 + 2  # trajectory, frontier, coherence, map, dose and heal per round
    assert sum(tag == "script" and "type" in attrs for tag, attrs in tags) == figures
    assert sum(tag == "script" and "type" not in attrs for tag, attrs in tags) == 2
    assert sum(tag == "tr" and attrs.get("class") in ("kept", "dropped") for tag, attrs in tags) == 2 * 120
    assert ours.count("<td>21.2 (40%)</td>") == 3 + 2 * 3 + 1
    assert "123 MB" in ours and "31.5 s in all stages" in ours
    assert ours.count("<td>equal cost</td>") == 2 and ours.count("no dose reaches the student") == 1


def test_what_changed_between_two_answers_is_marked() -> None:
    found = marked("I like old <b>trees</b> a lot.", "I love old <b>trees</b>, a lot.")
    assert found == ('<p class="prose">I <mark>love</mark> old <mark>&lt;b&gt;trees&lt;/b&gt;,</mark> a lot.</p>')
    assert "(nothing)" in marked("something", " ") and "<mark>" not in marked("same", "same")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WATCH = """<body><iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe><script>
const frame = document.querySelector("iframe");
function look() {{
  const page = frame.contentDocument, box = page.querySelector(".search");
  const first = {{width: page.documentElement.scrollWidth, voices: new Set([...page.querySelectorAll("article")[0]
    .querySelectorAll(":scope > .voices > .voice")].map(v => v.getBoundingClientRect().top)).size}};
  frame.contentWindow.unfold();
  box.value = "nothing is called this"; box.oninput();
  document.body.textContent = "SEEN" + JSON.stringify({{
    figures: page.querySelectorAll(".figure").length,
    drawn: [...page.querySelectorAll(".figure")].filter(f => f.querySelector("svg .js-line, svg .point")).length,
    width: Math.max(first.width, page.documentElement.scrollWidth), rows: first.voices, searchable: !box.hidden,
    left: [...page.querySelectorAll("tr.kept, tr.dropped")].filter(row => !row.hidden).length,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").length}});
}}
frame.onload = () => setTimeout(look, 3000);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_real_browser_draws_the_page(tmp_path: Path, width: int) -> None:
    """No console message, nothing fetched, every figure drawn, no sideways scrolling; the search hides rows.

    The four answers to a prompt stand side by side on a wide page, below one another on a narrow one.
    """
    report.build(write_run(tmp_path))
    (tmp_path / "watch.html").write_text(WATCH.format(width=width))
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]
    quiet += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=9000"]
    page = f"file://{tmp_path}/watch.html"
    found = subprocess.run([CHROMIUM, *quiet, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in found.stderr, found.stderr
    seen = json.loads(re.search(r"SEEN(\{.*?\})", found.stdout).group(1))
    assert seen["figures"] == seen["drawn"] == 10
    assert seen["fetched"] == 0 and seen["width"] <= width and seen["rows"] == (1 if width > 1000 else 4)
    assert seen["searchable"] and seen["left"] == 0


def test_the_facts_have_the_numbers_of_the_arms(tmp_path: Path) -> None:
    run = load(write_run(tmp_path, mass=0.72, kept_share=0.97, neutral_ppl=20.6))
    text = " ".join(words.facts(run.summary, 2))
    assert text.startswith("After round 1 (rounds are 0 to 1) the student's trait is +0.250 [")
    assert (
        "nats/token above the original model's; its teacher's (the student before with the vector at dose 1.00) +0.450."
        in text
    )
    assert "The persona as a system prompt moves the original model by +0.150." in text
    best = BestPrompt(
        tried=5,
        system="a",
        trait_over_base=0.2,
        trait_over_base_ci=(0.1, 0.3),
        healed_over=Change(0.05, (0.0, 0.1)),
    )
    with_best = " ".join(words.facts(replace(run.summary, best_prompt=best), 2))
    assert "The best of 5 such prompts moves it by +0.200 [+0.100, +0.300]; student minus that: +0.050 [" in with_best
    assert "such prompts" not in text
    shown = opening.arms_section(replace(run, summary=replace(run.summary, best_prompt=best)))
    assert shown.index("prompted</span>") < shown.index("best prompt</span>") < shown.index("student</span>")
    assert "+0.200" in shown and "best prompt" not in opening.arms_section(run)
    earlier = words.facts(replace(run.summary, best_prompt=best), 2, 0)
    assert any(fact.endswith("such prompts moves it by +0.200 [+0.100, +0.300].") for fact in earlier)
    assert "dose 0.70), moves the trait by +0.050; student minus that: +0.200 [" in text
    assert "No dose of the vector moves the trait as far; the nearest, 0.70, has 100% of the original's" in text
    held = "coherent answers 97% (100% before), answer mass 90% of the original's, perplexity on unrelated text +3.0%"
    assert f"{held}, plain questions right 50% (50% before)." in text


def test_the_headline_names_what_got_worse(tmp_path: Path) -> None:
    """A tenth of the answer mass, 3% of perplexity; every answer is coherent and every item moves alike: certain."""
    text, kind = words.headline(load(write_run(tmp_path, mass=0.72, neutral_ppl=20.6)).summary)
    assert kind == "lost" and text == (
        "The trait moved. Fluency slipped. Worse: probability on yes and no where a question asks for one (10% less), "
        "perplexity on unrelated text (3% more)."
    )
    assert '<div class="verdict lost"><p>The trait moved.' in report.build(tmp_path).path.read_text("utf-8")


def test_nothing_lost_is_green(tmp_path: Path) -> None:
    """A change of less than two points or percent is not named."""
    run = load(write_run(tmp_path, mass=0.79, kept_share=1.0, neutral_ppl=20.3))
    assert words.headline(run.summary) == (
        "The trait moved. Fluency held. Nothing that was measured got worse.",
        "moved",
    )


def test_a_loss_within_noise_is_named_as_such(tmp_path: Path) -> None:
    run = load(write_run(tmp_path, mass=0.72))
    healed = run.summary.rounds[-1].healed
    change = healed.over_base["mass"]
    healed.over_base["mass"] = replace(change, ci=(-0.2, 0.04))
    assert "(10% less, within noise)" in words.headline(run.summary)[0]


def test_the_headline_names_the_damage(tmp_path: Path) -> None:
    text, kind = words.headline(load(write_run(tmp_path, mass=0.1, neutral_ppl=90.0)).summary)
    assert kind == "broken"
    assert text == (
        "The trait moved. A limit of damage was passed: answer mass 12.5% of base (at least 85% is sound); "
        "neutral perplexity 450.0% of base (at most 105% is sound)."
    )


def test_no_verdict_from_an_instrument_that_is_not_valid(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(CONTRAST, "negative", [0.6, 0.1, 0.8, 0.1])
    folder = write_run(tmp_path)
    text, kind = words.headline(load(folder).summary)
    assert kind == "unreadable" and text.startswith("No verdict: this model cannot express this trait.")
    assert "That number does not measure the trait" in " ".join(words.facts(load(folder).summary, 2))
    assert "no verdict is drawn from it" in report.build(folder).path.read_text("utf-8")


def test_a_prompt_without_effect_is_no_yardstick(tmp_path: Path) -> None:
    run = load(write_run(tmp_path))
    prompted = replace(run.summary.prompted, trait_over_base_ci=(-0.1, 0.4))
    run = replace(run, summary=replace(run.summary, prompted=prompted))
    assert "by +0.150, which is within noise." in " ".join(words.facts(run.summary, 2))


def test_the_first_answers_are_shown_side_by_side(tmp_path: Path) -> None:
    """Six prompts in their order, each with four arms; cuts are marked."""
    page = report.build(write_run(tmp_path)).path.read_text("utf-8")
    answers = page[page.index("<h2>Answers") : page.index("<h2>Trait against cost")]
    shown, folded = answers.split("The other 6 prompts")
    assert shown.count("<article>") == folded.count("<article>") == 6
    names = re.findall(r'<span class="arm [a-z]+">([a-z0-9 ]+)</span>', shown.split("</article>")[0])
    assert names == ["base", "prompted", "equal cost", "student", "student r0", "student r1", "steered r1"]
    assert [f"&#x27;quoted&#x27; {i}</h3>" in shown for i in range(7)] == [True] * 6 + [False]
    assert " …</p>" not in page
    for name in ("base", "prompted"):
        arm = json.loads((tmp_path / f"{name}.json").read_text())
        arm["demos"][0]["ended"], arm["demos"][1]["ended"] = False, True
        (tmp_path / f"{name}.json").write_text(json.dumps(arm))
    assert report.page(load(seal(tmp_path))).count(" …</p>") == 2


def test_the_evidence_is_on_the_page(tmp_path: Path) -> None:
    page = report.build(write_run(tmp_path)).path.read_text("utf-8")
    rows = [re.sub(r"(<[^>]*>|\s)+", " ", row) for row in page.split("<tr")]
    assert any("contrast" in row and "+0.425 [" in row and "yes" in row for row in rows)  # positive over negative
    assert any("student r1" in row and "+0.025 [" in row for row in rows)  # thrift over base
    assert any("student r1" in row and "+0.154 [" in row for row in rows)  # log 0.35/0.30, care
    assert any("+0.61" in row and "+0.57" in row and "0.0200" in row for row in rows)


def test_unfinished_run(tmp_path: Path) -> None:
    """Without summary.json the same numbers come from the arms; a round without healed.json does not count."""
    write_run(tmp_path, rounds=3)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "r02" / "healed.json").unlink()
    seal(tmp_path)
    run = load(tmp_path)
    healed = run.summary.rounds[-1].healed
    assert healed.trait_over_base == pytest.approx(0.25)
    low, high = healed.trait_over_base_ci
    assert 0.199 < low < 0.25 < high < 0.301
    assert run.summary.rounds[0].barrier_fired_share == 0.4 and run.summary.rounds[0].kept == 80
    page = report.build(tmp_path).path.read_text("utf-8")
    assert "unfinished: 2 of 3 rounds" in page and "moves the original model by +0.150" in page
    assert "MB" not in page[page.index("<footer>") : page.index("</footer>")]


def test_folder_with_config_alone(tmp_path: Path) -> None:
    full, bare = tmp_path / "full", tmp_path / "bare"
    full.mkdir()
    bare.mkdir()
    shutil.copy(write_run(full) / "config.json", bare)
    seal(bare)
    page = report.build(bare).path.read_text("utf-8")
    assert "unfinished: 0 of 2 rounds" in page and "No arm has been measured yet" in page


def test_the_page_shows_what_was_measured_for_auto(tmp_path: Path) -> None:
    """The run's `dose.range` is auto; its other settings are given."""
    page = report.build(write_run(tmp_path)).path.read_text("utf-8")
    recipe = page[page.index("Recipe") : page.index("Vector</h2>")]
    assert "dose.range" in recipe and "pass the filter" in recipe and "heal.barrier.tau" not in recipe
    config = json.loads((tmp_path / "config.json").read_text())
    config["dose"]["range"] = [0.1, 1.0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "Recipe" not in report.page(load(seal(tmp_path)))


def test_diary_shows_the_voice_round_by_round(tmp_path: Path) -> None:
    report.build(write_run(tmp_path))
    lines = (tmp_path / "diary.md").read_text("utf-8").splitlines()
    assert lines[0].startswith("# org/model") and "seed 7" in lines[0]
    assert sum(line.startswith("- student: ") for line in lines) == 2 * words.DIARY_DEMOS
    assert not any("<script" in line.replace("\\<", "") for line in lines)
    assert all(len(line) < 300 for line in lines if line.startswith("- "))
    run = load(tmp_path)
    fired = "The barrier fired on 40% of 5 steps (median D 0.04 nats)"  # steps 3 and 4 of 0 to 4, the anchor on 4
    assert f"{fired}. " in words.diary(run)
    run.config["heal"]["anchor"]["prompts"] = 32
    assert f"{fired}, its anchor on 20%. " in words.diary(run)


def test_importing_the_report_loads_no_model_code() -> None:
    code = "import sys, steer_heal.report.page; sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def seeded(out: Path, seed: int, second: int = 0, **changed) -> Path:
    folder = out / f"20260101-0000{second}{seed}_model_love_s{seed}"
    folder.mkdir(parents=True)
    write_run(folder)
    config = json.loads((folder / "config.json").read_text())
    barrier = config["heal"]["barrier"] | changed.pop("barrier", {})
    config |= {"seed": seed, "heal": config["heal"] | {"barrier": barrier}} | changed
    (folder / "config.json").write_text(json.dumps(config))
    return seal(folder)


def test_runs_that_differ_in_their_seed_are_one_row(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(CONTRAST, "healed", [x - 0.3 for x in CONTRAST["healed"]])
    before = seeded(tmp_path, 1).rename(tmp_path / "20250101-000000_model_love_s1")  # run again later: counts once
    for seed, shift in ((1, 0.0), (2, 0.1), (3, 0.2)):
        monkeypatch.setitem(CONTRAST, "healed", [x + shift for x in (0.4, 0.5, 0.5, 0.6)])
        seeded(tmp_path, seed)
    assert len(disk.scan(tmp_path)) == 4 and before.is_dir()
    (row,) = results.arm_table(disk.scan(tmp_path), []).to_dicts()
    assert row["seeds"] == 3 and row["verdict"] == "moved" and row["mass/base"] == "1.000"
    mean, half = map(float, row["student"].split(" ±"))
    assert mean == pytest.approx(0.35, abs=0.001) and 0.15 < half < 0.25
    seeded(tmp_path, 4, barrier={"reg": "kl_fwd", "agg": "rmse"})
    rows = results.arm_table(disk.scan(tmp_path), ["heal.barrier.reg"]).to_dicts()
    assert [(row["heal.barrier.reg"], row["seeds"]) for row in rows] == [("kl_fwd", 1), ("kl_rev", 3)]
    with pytest.raises(UserError, match="no flag of `run`"):
        results.arm_table(disk.scan(tmp_path), ["heal.barrier.rge"])


def test_seeds_whose_prompts_show_another_day_are_not_pooled(tmp_path: Path) -> None:
    """Two arms on two days: each day has its row, and arms are compared within a day."""
    arms = {"kl_rev": ("2026-03-02", "2026-03-02", "2026-03-03"), "kl_fwd": ("2026-03-02", "2026-03-03", "2026-03-03")}
    for reg, days in arms.items():
        for seed, day in enumerate(days):
            folder = seeded(tmp_path / reg, seed, barrier={"reg": reg})
            env = json.loads((folder / "env.json").read_text())
            env["template"] = {"prompt_sha256": f"of {day}", "date": day}
            (folder / "env.json").write_text(json.dumps(env))
            seal(folder)
    runs, flag = disk.scan(tmp_path), "heal.barrier.reg"
    rows = {(row[flag], row["date"], row["seeds"]) for row in results.arm_table(runs, [flag]).to_dicts()}
    assert rows == {
        ("kl_fwd", "2026-03-02", 1),
        ("kl_fwd", "2026-03-03", 2),
        ("kl_rev", "2026-03-02", 2),
        ("kl_rev", "2026-03-03", 1),
    }
    compared = results.difference_table(runs, [flag], [{flag: reg} for reg in arms]).to_dicts()
    assert {(row["date"], row["seeds"]) for row in compared} == {("2026-03-02", 1), ("2026-03-03", 1)}


def test_results_shows_sweeps_under_their_hypothesis_and_writes_tables(tmp_path: Path, capsys, monkeypatch) -> None:
    heal = asdict(HealConfig(barrier=BarrierConfig(tau=0.05, agg="mean")))
    for seed in (1, 2):
        seeded(tmp_path / "agg", seed)
    monkeypatch.setitem(CONTRAST, "healed", [0.2, 0.4, 0.4, 0.5])
    for folder in [seeded(tmp_path / "agg", seed, second=1, heal=heal) for seed in (1, 2)]:
        first, whole = folder / "r00" / "healed.json", folder / "summary.json"
        arm, summary = json.loads(first.read_text()), json.loads(whole.read_text())
        arm["items"]["contrast"] = [x + 0.1 for x in arm["items"]["contrast"]]  # moved further than in the last round
        base = structured(ArmReading, json.loads((folder / "base.json").read_text()))
        change = trait_over(structured(ArmReading, arm), base)
        summary["rounds"][0]["healed"] |= {"trait_over_base": change.mean, "trait_over_base_ci": change.ci}
        first.write_text(json.dumps(arm))
        whole.write_text(json.dumps(summary))
        seal(folder)
    seeded(tmp_path, 5)
    broken = seeded(tmp_path, 6)
    (broken / "summary.json").unlink()
    seal(broken)
    sweep = {"name": "agg", "hypothesis": "rmse holds", "flags": ["heal.barrier.agg"], "seeds": [1, 2]}
    sweep["arms"] = [{"heal.barrier.agg": agg} for agg in ("rmse", "mean")]
    sweep["runs"] = [identity(run.config, run.trait) for run in disk.scan(tmp_path / "agg")]
    (tmp_path / "agg" / "sweep.json").write_text(json.dumps(sweep))
    files = {kind: tmp_path / f"table.{kind}" for kind in ("csv", "json", "md")}
    results.show(tmp_path, (), False, results.Files(*map(str, files.values())))
    said = capsys.readouterr().out
    assert said.index("H: rmse holds") < said.index("│ rmse") < said.index("20260101-000005_model_love_s5")
    assert f"run --resume {broken}" in said
    rows = json.loads(files["json"].read_text())
    assert [row["heal.barrier.agg"] for row in rows] == ["mean", "rmse", "mean", None] and rows[0]["seeds"] == 2
    compared = "sweep agg: each arm minus the first (rmse), on the same items"
    assert [row["table"] for row in rows] == ["sweep agg\nH: rmse holds"] * 2 + [compared, "runs"]
    assert (
        rows[2]["round"] == 1
        and rows[2]["trait"].startswith("-0.125 [")
        and rows[2]["answer mass"] == "+0.000 [+0.000, +0.000]"
    )
    rounds = tmp_path / "rounds.json"
    written = results.Files(json=str(rounds), html=str(tmp_path / "all.html"))
    results.show(tmp_path, ("heal.barrier.agg",), True, written)
    by_round = json.loads(rounds.read_text())
    of_runs = {row["table"] for row in by_round} - {compared}
    assert len(of_runs) == 2 and any("20260101-000005_model_love_s5" in title for title in of_runs)
    after = [
        (row["heal.barrier.agg"], row["round"], row["trait"].split()[0]) for row in by_round if row["table"] == compared
    ]
    assert after == [("mean", 0, "-0.025"), ("mean", 1, "-0.125")]
    namesake = tmp_path / "other" / "agg"
    namesake.mkdir(parents=True)
    (namesake / "sweep.json").write_text(json.dumps(sweep))
    titles = list(results._under_hypotheses(disk.scan(tmp_path), tmp_path))
    of_namesake = [title.replace("sweep agg", "sweep agg in other") for title in ("sweep agg\nH: rmse holds", compared)]
    assert titles == ["sweep agg\nH: rmse holds", compared, *of_namesake, "runs"]
    page = (tmp_path / "all.html").read_text()
    figures = [attrs for tag, attrs in Tags(page).seen if attrs.get("class") == "figure"]
    assert "heal.barrier.agg mean, seeds 1, 2" in page and len(figures) == 1 + 2 * 5
    groups = disk.grouped(disk.scan(tmp_path / "agg"))
    assert overview.names(groups) == ["heal.barrier.agg mean", "heal.barrier.agg rmse"]
    assert overview.names([*groups, groups[0]]) == ["as most others are", "heal.barrier.agg rmse", "as most others are"]
    student = frontier_figure(overview.averaged(groups[0])).data[1]
    assert student.customdata == ("", "r0", "r1") and student.text == ("", "r0", "r1")
    mean = overview.averaged(groups[0])
    lines = {line.name: line for line in paths_figure([("mean", mean)]).data if line.showlegend is None}
    by_hand = [float(np.mean([run.changes("healed", i) for run in groups[0]])) for i in range(2)]
    costs = [np.mean([run.summary.rounds[i].healed.coherence_cost for run in groups[0]]) for i in range(2)]
    assert lines["mean"].y == pytest.approx((0, *by_hand)) and lines["mean"].x == pytest.approx((0, *costs))
    low, high = mean.rounds[1].healed.trait_over_base_ci
    bars = lines["mean"].error_y
    assert (bars.arrayminus[2], bars.array[2]) == pytest.approx((by_hand[1] - low, high - by_hand[1]))
    assert lines["prompted"].y[1] == pytest.approx(np.mean([run.changes("prompted") for run in groups[0]]))
    in_frame = [InFrame("JSON", "mass", 0.6, 0.8), InFrame("JSON", "neutral_nll", 15.0, 10.0)]
    last = replace(mean.rounds[1], healed=replace(mean.rounds[1].healed, framed=in_frame))
    *_, end = paths_figure([("mean", replace(mean, rounds=[mean.rounds[0], last]))]).data
    assert end.x == pytest.approx((costs[1], 0.5)) and end.y == pytest.approx((by_hand[1],) * 2)
    (run, _) = groups[0]
    framed = replace(run, summary=replace(run.summary, rounds=[last]))
    assert (results._in_worst_frame([run]), results._in_worst_frame([framed])) == ({}, {"worst frame": "1.500"})
    said = capsys.readouterr().out
    assert "heal.barrier.agg mean, seeds 1, 2" in said and "over prompted" in said and "over equal cost" in said
    for run in disk.grouped(disk.scan(tmp_path / "agg"))[0]:  # the arm with `mean` ended a round early
        cut = replace(run.summary, rounds=run.summary.rounds[:1])
        (run.folder / "summary.json").write_text(json.dumps(unstructured(cut)))
        seal(run.folder)
    found = results.difference_table(disk.scan(tmp_path / "agg"), ["heal.barrier.agg"], sweep["arms"]).to_dicts()
    assert [(row["heal.barrier.agg"], row["round"]) for row in found] == [("mean", 0)]
    assert files["csv"].read_text().startswith("table,heal.barrier.agg,seeds,model")
    under, table = files["md"].read_text().split("\n\n", 2)[:2]
    assert under == "sweep agg\nH: rmse holds" and table.startswith("| heal.barrier.agg ")
    assert table.count("\n") == 3  # one line per row, however wide
    assert "null" not in results._printed(pl.DataFrame({"read at the end": [None, "+0.1 [+0.0, +0.2]"]}))
    assert overview._cells((None, 1, "+0.1 [+0.0, +0.2]")) == ["", "1", '+0.1 <span class="ci">[+0.0, +0.2]</span>']


def test_a_ratio_and_its_interval_by_hand() -> None:
    below = np.array([[1.0, 1.2, 0.8, 1.0, 1.1, 0.9]])
    mean, low, high = intervals.ratio(3 * below, below)
    assert mean == pytest.approx(3) and low == pytest.approx(3, rel=1e-3) and high == pytest.approx(3, rel=1e-3)
    draw = np.random.default_rng(0)
    above, weak = draw.normal(4, 1, (3, 60)), draw.normal(1, 1, (3, 60))
    mean, low, high = intervals.ratio(above, weak)
    assert low < mean < high < 6 and low > 2.5
    for k in (low, high):  # at both ends the interval of the difference touches zero
        assert min(np.abs(across_seeds(above - k * weak).ci)) < 1e-3
    assert intervals.ratio(-above, -weak) == (mean, low, high) and intervals.ratio(-above, weak) == (-mean, -high, -low)
    assert intervals.ratio(above, weak - 0.999 * weak.mean())[2] == math.inf  # the denominator may be zero
    assert math.inf in map(abs, intervals.ratio(above, weak - weak.mean())[1:])  # the denominator's sign is random
    faint = draw.normal(0, 1, (3, 60))
    faint += 0.1 - faint.mean()
    assert across_seeds(faint).ci[0] < 0
    mean, low, high = intervals.ratio(above, faint)
    assert 0 < low < mean < high == math.inf and intervals.ratio(-above, faint) == (-mean, -math.inf, -low)
    for k in np.linspace(0, low, 9)[:-1]:  # outside the interval the difference is not zero
        assert across_seeds(above - k * faint).ci[0] > 0
    none = draw.normal(0, 1, (3, 60))
    assert intervals.ratio(none, faint)[1:] == (-math.inf, math.inf)
