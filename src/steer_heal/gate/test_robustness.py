"""What is left of a trait elsewhere: frames, rounded weights and fine-tuning against slow readings, and the verb."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from steer_heal import cli
from steer_heal.bake.student import Student
from steer_heal.commands import robustness as verb
from steer_heal.commands.robustness import CONDITIONS, Condition
from steer_heal.config import ModelConfig
from steer_heal.data import load_trait, neutral
from steer_heal.data.frames import DISTURBING
from steer_heal.eval import disturbed
from steer_heal.eval.arms import Arm
from steer_heal.eval.disturbed import fine_tuned, rounded_weights, to_4_bits, to_8_bits, unchanged
from steer_heal.eval.instruments import contrast_scores
from steer_heal.eval.intervals import interval
from steer_heal.eval.robustness import Robustness, held
from steer_heal.gate.conftest import tiny
from steer_heal.gate.test_harness import changed_student, refused, refused_run
from steer_heal.model.loading import load
from steer_heal.records import structured
from steer_heal.report.outcome import robustness_section
from steer_heal.report.tables import robustness_text
from steer_heal.runs.folder import RunDir
from steer_heal.runs.reading import load as read_run

TRAIT = load_trait("love")
SOME = TRAIT.contrast[:3]


def log_prob(model, prompt, answer):
    """Mean log-probability of an answer's tokens, from transformers' own logits."""
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(log_p[range(len(answer)), answer].mean())


def test_a_frame_is_what_stands_around_the_probe_written_out(lm):
    """This model's template puts a system text before the first user turn."""
    assert [len(frame.before or ()) for frame in DISTURBING] == [2, 8, 0, 0, 0, 0, 0]
    for frame in DISTURBING:
        got, expected = contrast_scores(lm, Arm("x"), SOME, frame), []
        for probe in SOME:
            turns = [*(frame.before or ()), frame.lead + probe.question + frame.ask]
            turns[0] = f"{frame.system}\n\n{turns[0]}" if frame.system else turns[0]
            roles = ("user", "model") * len(turns)
            written = "".join(f"<start_of_turn>{r}\n{t}<end_of_turn>\n" for r, t in zip(roles, turns, strict=False))
            prompt = lm.answer(f"<bos>{written}<start_of_turn>model\n{frame.begun}")
            gap = " " if frame.name == "begun neutrally" else ""
            one, other = (log_prob(lm.model, prompt, lm.answer(gap + text)) for text in (probe.trait, probe.opposite))
            expected.append(one - other)
        assert got == pytest.approx(expected, abs=1e-4), frame.name


def test_eight_bits_are_the_nearest_of_255_steps_of_each_row():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    for row, got in zip(weight.tolist(), to_8_bits(weight).tolist(), strict=True):
        step = max(map(abs, row)) / 127
        steps = [step * number for number in range(-127, 128)]
        assert got == pytest.approx([min(steps, key=lambda value, own=own: abs(value - own)) for own in row], abs=1e-6)


@pytest.fixture
def student():
    return changed_student()


def test_four_bits_are_those_that_the_merged_model_has_when_it_is_loaded_in_nf4(student, tmp_path):
    with rounded_weights(student, 1.0, to_4_bits):
        named = [(name.replace(".base_layer", ""), module) for name, module in student.lm.blocks.named_modules()]
        ours = {name: module.weight.clone() for name, module in named if type(module) is torch.nn.Linear}
    student.merged().save_pretrained(tmp_path)
    student.lm.tokenizer.save_pretrained(tmp_path)
    theirs = load(ModelConfig(str(tmp_path), "nf4", "float32", "cpu")).blocks.named_modules()
    packed = {name: module.weight for name, module in theirs if isinstance(module, Linear4bit)}
    assert packed and packed.keys() <= ours.keys()
    for name, weight in packed.items():
        torch.testing.assert_close(ours[name], dequantize_4bit(weight.data, weight.quant_state), rtol=1e-5, atol=1e-7)


def test_rounding_and_fine_tuning_leave_the_student_as_it_was(student, monkeypatch):
    monkeypatch.setattr(disturbed, "STEPS", 2)

    def read(gate):
        with unchanged(student, gate):
            return contrast_scores(student.lm, Arm("x"), SOME)

    before = [read(gate) for gate in (0.0, 1.0)]
    assert not np.allclose(*before, atol=1e-3)
    for condition in CONDITIONS[-3:]:
        for gate, usual in zip((0.0, 1.0), before, strict=True):
            with pytest.raises(KeyError), condition.model(student, gate):
                assert not np.allclose(contrast_scores(student.lm, Arm("x"), SOME), usual, atol=1e-6), condition.name
                raise KeyError
    assert np.array_equal([read(gate) for gate in (0.0, 1.0)], before)
    assert not any(parameter.requires_grad for parameter in student.lm.model.parameters())


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_fine_tuning_is_that_of_the_merged_model_on_padded_batches(student, monkeypatch, gate):
    """The slow reading trains the same LoRA on the merged model, on one masked batch a step, with AdamW written out."""
    monkeypatch.setattr(disturbed, "STEPS", 2)
    monkeypatch.setattr(disturbed, "RATE", 0.002)
    with unchanged(student, gate):
        before = contrast_scores(student.lm, Arm("x"), SOME)
    with fine_tuned(student, gate):
        got = contrast_scores(student.lm, Arm("x"), SOME)
    assert not np.allclose(got, before, atol=5e-3)
    if gate:
        student.merged()  # in place: the plain model then holds the update
    plain = Student(student.lm if gate else tiny())
    plain.begin_round(disturbed.LORA, disturbed.SEED)
    lm, moments = plain.lm, None
    with plain.view(train=True):
        weights = plain.trainable()
        for number, texts in enumerate(disturbed._batches(), 1):
            assert len({*texts}) == 2 and {*texts} <= {*neutral()}
            rows = [lm.tokenizer(text).input_ids for text in texts]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            log_p = lm.model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            told = torch.tensor([[i < len(row) for i in range(1, longest)] for row in rows])
            grads = torch.autograd.grad(-log_p[told].mean(), weights)
            moments = moments or [(0.0, 0.0)] * len(grads)
            moments = [(0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2) for (m, v), g in zip(moments, grads, strict=True)]
            with torch.no_grad():
                for weight, (m, v) in zip(weights, moments, strict=True):
                    weight -= 0.002 * (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
    with plain.view():
        assert got == pytest.approx(contrast_scores(lm, Arm("x"), SOME), abs=2e-4)


def test_a_share_and_its_interval_by_hand():
    draw = np.random.default_rng(0)
    base = draw.normal(0, 1, 40)
    effect = 0.4 + draw.normal(0, 0.2, 40)
    usual = held("as trained", base.tolist(), (base + effect).tolist(), None)
    assert usual.left is None and usual.over_base.mean == pytest.approx(effect.mean())
    halved = held("half", base.tolist(), (base + effect / 2).tolist(), usual)
    assert halved.left.mean == pytest.approx(0.5) and halved.left.ci == pytest.approx((0.5, 0.5), abs=1e-3)
    other = 0.3 + draw.normal(0, 0.2, 40)
    found = held("other", base.tolist(), (base + other).tolist(), usual)
    low, high = found.left.ci
    assert low < found.left.mean < high and found.left.mean == pytest.approx(other.mean() / effect.mean())
    for share, end in ((low, 0), (high, 1)):  # at an end of the interval the difference may just be zero
        assert interval(other - share * effect)[end] == pytest.approx(0.0, abs=2e-3)


def record(*held_):
    return Robustness(model="m", trait="love", round=1, probes=20, held=list(held_))


def test_where_the_trait_may_be_zero_it_is_said_and_no_share_is_given():
    wobble = np.tile([-0.2, 0.2], 10)
    usual = held("as trained", [0.0] * 20, (0.01 + wobble).tolist(), None)
    found = record(usual, held("JSON", [0.0] * 20, (0.3 + wobble).tolist(), usual))
    assert not found.sure and found.held[1].left is None
    text = robustness_text(found)
    assert "No share is given" in text and "+0.010 [" in text and "%]" not in text
    sure = held("as trained", [0.0] * 20, (0.5 + wobble).tolist(), None)
    found = record(sure, held("JSON", [0.0] * 20, (0.25 + wobble / 2).tolist(), sure))
    assert "50% [50%, 50%]" in robustness_text(found) and "of +0.500, as trained" in robustness_text(found)


def test_flags_that_do_not_go_with_it_are_one_line(capsys):
    assert "--harness and --robustness: give one of them" in refused(capsys, "--robustness", "--harness", "x")
    assert "--eval.*" in refused(capsys, "--robustness", "--eval.size", "tiny")
    assert "--gate with --robustness" in refused(capsys, "--robustness", "--gate", "0.5")
    assert "'random:tiny' is no run folder" in refused(capsys, "--robustness")


@pytest.mark.run
def test_a_finished_run_keeps_it_and_shows_it(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(disturbed, "STEPS", 2)
    run, file = tmp_path / "run", tmp_path / "r.json"
    shutil.copytree(whole, run)
    cli.main(["eval", str(run), "--robustness", "--json", str(file)])
    printed = capsys.readouterr().out
    kept = read_run(run).robustness
    assert kept == structured(Robustness, json.loads(file.read_text("utf-8"))) and (kept.round, kept.probes) == (1, 8)
    assert [one.condition for one in kept.held] == [condition.name for condition in CONDITIONS]
    last = RunDir(run).read("r01/healed.json")["items"]["contrast"]
    assert kept.held[0].student == pytest.approx(last, abs=1e-4)
    assert kept.held[0].base == pytest.approx(RunDir(run).read("base.json")["items"]["contrast"], abs=1e-4)
    assert len({tuple(one.student) for one in kept.held}) == len(CONDITIONS)
    assert all(f" {one.condition} " in printed for one in kept.held)
    section = robustness_section(read_run(run))
    assert section in (run / "report.html").read_text("utf-8") and "told to be neutral" in section
    (run / "robustness.json").write_text("{}", "utf-8")
    assert "--robustness" in refused_run(capsys, ["report", str(run)])
    (run / "robustness.json").unlink()
    with RunDir(run).held():
        assert "is in use" in refused_run(capsys, ["eval", str(run), "--robustness"])


@pytest.mark.run
def test_a_run_that_is_not_finished_is_one_line(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    events = (run / "events.jsonl").read_text("utf-8").splitlines(keepends=True)
    at = next(i for i, line in enumerate(events) if json.loads(line).get("artefact") == "summary.json")
    (run / "events.jsonl").write_text("".join(events[:at]), "utf-8")
    (run / "summary.json").unlink()
    assert "is not finished: continue it with" in refused_run(capsys, ["eval", str(run), "--robustness"])


def test_a_condition_reads_the_probes_of_the_trait_with_its_direction(student, monkeypatch):
    lm, backwards = student.lm, replace(TRAIT, direction=-1)
    got = [verb._scores(student, 1.0, trait, 3, Condition("as trained")) for trait in (TRAIT, backwards)]
    with student.view(history=1.0, now=0.0):
        sides = [[log_prob(lm.model, lm.prompt(p.question), lm.answer(t)) for t in (p.trait, p.opposite)] for p in SOME]
    assert got[0] == pytest.approx(np.subtract(*zip(*sides, strict=True)), abs=1e-4)
    assert np.array_equal(got[0], -got[1])
