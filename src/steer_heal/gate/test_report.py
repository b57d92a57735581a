"""The report: true to the numbers, safe with hostile text, self-contained, at ease with unfinished runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from steer_heal import report

HOSTILE = "<script>alert(1)</script></script><img src=https://example.org/x onerror=alert(2)>\x00 & 'quoted'"
TRAIT = "</title><script>alert(3)"  # a trait file may be called anything
ITEMS = {"base": [0.1, 0.3, 0.2, 0.4], "prompted": [0.2, 0.5, 0.4, 0.5], "steered": [0.6, 0.7, 0.7, 0.8]}
ITEMS["healed"] = [0.4, 0.5, 0.5, 0.6]


class Tags(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))


def write_arm(path: Path, name: str, mass: float = 0.8, kept_share: float = 1.0, neutral_ppl: float = 20.0) -> dict:
    trait = sum(ITEMS[name]) / 4
    demos = [
        {"prompt": f"{HOSTILE} {i}", "text": f"{name} {HOSTILE}", "dropped": "incoherence" * (i % 2)} for i in range(12)
    ]
    scores = {"answer_mass": mass, "demo_kept_share": kept_share, "demo_ppl": 8.0, "neutral_ppl": neutral_ppl}
    arm = {"arm": name, "instrument": "contrast", "dose": 0.0, **scores}
    arm |= {"trait_nats": trait, "trait_ci": [trait - 0.1, trait + 0.1]}
    path.write_text(json.dumps(arm | {"items": {"contrast": ITEMS[name]}, "demos": demos}), "utf-8")
    return arm


def summary_arm(arm: dict, over: float, ci: list[float]) -> dict:
    return arm | {"trait_over_base": over, "trait_over_base_ci": ci}


def write_run(folder: Path, rounds: int = 2, **healed_scores: float) -> Path:
    """A finished run; the healed student moved 0.25, the prompt 0.15, steering 0.45 nats/token."""
    heal = {"reg": "kl_rev", "agg": "rmse", "tau": 0.05, "anchor_tau": 0.02}
    config = {"trait": TRAIT + ".toml", "rounds": rounds, "seed": 7, "model": {"path": "org/model"}, "heal": heal}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "trait.json").write_text(json.dumps({"title": TRAIT}), "utf-8")
    env = {"python": "3.11", "platform": "Linux", "packages": {"torch": "2"}, "cpus": 2, "threads": 2, "gpu": None}
    (folder / "env.json").write_text(json.dumps(env), "utf-8")
    base, prompted = (write_arm(folder / f"{name}.json", name) for name in ("base", "prompted"))
    events = [{"event": "start", "argv": ["run", "--trait", HOSTILE]}]
    sums = []
    for index in range(rounds):
        where = folder / f"r{index:02d}"
        where.mkdir()
        steered, healed = (write_arm(where / f"{n}.json", n, **healed_scores) for n in ("steered", "healed"))
        curve = [
            {"dose": d, "survival": s, "fitted": s, "tail_ppl": 9.0, "example": HOSTILE}
            for d, s in ((0.0, 1.0), (0.5, 1.0), (2, 0.5))
        ]
        (where / "dose.json").write_text(
            json.dumps({"rule": "survival", "dose": 1.0, "target": 0.75, "curve": curve}), "utf-8"
        )
        completions = [
            {"prompt": HOSTILE, "text": HOSTILE, "dose": 1.0, "incoherence": -2.0, "dropped": "empty" * (i % 3 == 0)}
            for i in range(120)
        ]
        (where / "completions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in completions), "utf-8")
        steps = [
            {"step": i, "objective": 3.0, "divergence": 0.02 * i, "fired": i > 2, "anchor_fired": i > 3, "tau": 0.05}
            for i in range(5)
        ]
        steps[-1]["val_nll"] = 2.5
        (where / "heal.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps), "utf-8")
        events += [{"event": "stage", "artefact": f"r{index:02d}/{n}", "seconds": 2.0} for n in report.ARTEFACTS]
        arms = {"steered": summary_arm(steered, 0.45, [0.4, 0.5]), "healed": summary_arm(healed, 0.25, [0.2, 0.3])}
        heal_sums = {
            "barrier_fired_share": 0.4,
            "anchor_fired_share": 0.2,
            "tau_nats": 0.05,
            "operating_kl_nats": 0.04,
            "val_nll": 2.5,
        }
        sums.append({"dose": 1.0, "generated": 120, "kept": 80, **arms, **heal_sums})
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), "utf-8")
    summary = {"base": summary_arm(base, 0.0, [0.0, 0.0]), "prompted": summary_arm(prompted, 0.15, [0.1, 0.2])}
    summary |= {"rounds": sums, "peak_memory_bytes": 123_000_000}
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    return folder


def test_page_is_safe_and_self_contained(tmp_path: Path) -> None:
    path = report.build(write_run(tmp_path))
    page = path.read_text("utf-8")
    assert path.stat().st_size < 8e6
    ours = page.replace(get_plotlyjs(), "")
    assert len(ours) < len(page)
    assert "<script>alert" not in ours and "<img" not in ours and "\x00" not in ours
    assert "&lt;script&gt;alert(1)" in ours
    tags = Tags(ours).seen
    assert [t for t in tags if {"src", "href", "onerror"} & t[1].keys() or t[0] in ("link", "iframe", "base")] == []
    figures = 1 + 3 + 2 + 2  # trajectory, coherence, dose and heal per round
    assert sum(tag == "script" and "type" in attrs for tag, attrs in tags) == figures
    assert sum(tag == "script" and "type" not in attrs for tag, attrs in tags) == 2
    assert sum(tag == "tr" and attrs.get("class") in ("kept", "dropped") for tag, attrs in tags) == 2 * 100
    assert "123 MB" in ours and "24.0 s in all stages" in ours


def test_verdict_has_the_numbers_of_the_summary(tmp_path: Path) -> None:
    run = report.load(write_run(tmp_path, mass=0.72, kept_share=0.97, neutral_ppl=20.6))
    text, kind = report.verdict(run)
    assert kind == "moved"
    assert "+0.250 nats/token over base (95% interval +0.200 to +0.300)" in text
    assert "1.7 times the effect of the system prompt (+0.150)" in text  # 0.25 / 0.15
    assert "56% of that round's steered movement (+0.450)" in text  # 0.25 / 0.45
    assert "Coherence held: coherent share 97% of the demo answers (base 100%)" in text
    assert "answer mass 90% of base, neutral perplexity +3.0% against base" in text


@pytest.mark.parametrize(
    ("scores", "where"),
    [
        ({"mass": 0.67}, "answer mass"),
        ({"kept_share": 0.94}, "coherent share"),
        ({"neutral_ppl": 21.1}, "neutral perplexity"),
        ({"mass": 0.1, "neutral_ppl": 90.0}, "answer mass and neutral perplexity"),
    ],
)
def test_verdict_names_the_damage(tmp_path: Path, scores: dict, where: str) -> None:
    text, kind = report.verdict(report.load(write_run(tmp_path, **scores)))
    assert kind == "damaged" and f"It is damaged in {where}:" in text


def test_verdict_says_when_nothing_moved(tmp_path: Path) -> None:
    run = report.load(write_run(tmp_path))
    healed, prompted = run.summary["rounds"][-1]["healed"], run.summary["prompted"]
    prompted["trait_over_base_ci"] = [-0.1, 0.4]
    assert "the system prompt alone did not move it measurably (+0.150)" in report.verdict(run)[0]
    healed["trait_over_base_ci"] = [-0.01, 0.5]
    text, kind = report.verdict(run)
    assert kind == "unmoved" and "the trait did not move" in text and "times the effect" not in text


def test_unfinished_run(tmp_path: Path) -> None:
    """Without summary.json the same numbers come from the arms; a round without healed.json does not count."""
    write_run(tmp_path, rounds=3)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "r02" / "healed.json").unlink()
    run = report.load(tmp_path)
    healed = run.summary["rounds"][-1]["healed"]
    assert healed["trait_over_base"] == pytest.approx(0.25)
    low, high = healed["trait_over_base_ci"]
    assert 0.199 < low < 0.25 < high < 0.301
    assert run.summary["rounds"][0]["barrier_fired_share"] == 0.4 and run.summary["rounds"][0]["kept"] == 80
    page = report.build(tmp_path).read_text("utf-8")
    assert "unfinished: 2 of 3 rounds" in page and "1.7 times" in page
    assert "MB" not in page[page.index("<footer>") : page.index("</footer>")]


def test_folder_with_config_alone(tmp_path: Path) -> None:
    full, bare = tmp_path / "full", tmp_path / "bare"
    full.mkdir()
    bare.mkdir()
    shutil.copy(write_run(full) / "config.json", bare)
    page = report.build(bare).read_text("utf-8")
    assert "unfinished: 0 of 2 rounds" in page and "No arm has been measured yet" in page


def test_diary_shows_the_voice_round_by_round(tmp_path: Path) -> None:
    report.build(write_run(tmp_path))
    lines = (tmp_path / "diary.md").read_text("utf-8").splitlines()
    assert lines[0].startswith("# org/model") and "seed 7" in lines[0]
    assert sum(line.startswith("- healed: ") for line in lines) == 2 * report.DIARY_DEMOS
    assert not any("<script" in line.replace("\\<", "") for line in lines)
    assert all(len(line) < 300 for line in lines if line.startswith("- "))


def test_importing_the_report_loads_no_model_code() -> None:
    code = "import sys, steer_heal.report; sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
