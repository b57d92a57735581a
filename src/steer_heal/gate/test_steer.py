"""The vector against its definition, and hooks that do not outlive their block."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from steer_heal.config import SteerConfig, UserError
from steer_heal.distil.iso_kl import iso_kl
from steer_heal.gate.conftest import by
from steer_heal.model import forward
from steer_heal.model.decode import decode
from steer_heal.model.lm import Row
from steer_heal.model.steering import Steering, Vector, steering
from steer_heal.steer import extract as extraction
from steer_heal.steer.extract import Extraction, auc, extract
from steer_heal.steer.personas import Neighbour, Personas

CONTEXTS = ["What is a glacier?", "ok", "Write two lines about rain on a tin roof, please.", "Name a bird."]
POSITIVE, NEGATIVE = "You love people and their noise.", "You despise people and their noise."
PERSONAS = Personas(POSITIVE, NEGATIVE, CONTEXTS)
BAND = SteerConfig(band=(0.3, 0.7))


@pytest.fixture
def lm(lm):
    """The tiny model, reading two rows at a time."""
    return replace(lm, read_rows=2)


def slow_states(lm, persona, layers):
    """States [n, l, d] from one full forward pass per prompt."""
    out = []
    for text in CONTEXTS:
        with torch.no_grad():
            hidden = lm.model(torch.tensor([lm.prompt(text, persona)]), output_hidden_states=True).hidden_states
        out.append(torch.stack([hidden[layer + 1][0, -1] for layer in layers]))
    return torch.stack(out)


@pytest.mark.parametrize("shared", [True, False], ids=["shared prefix", "no sharing"])
def test_vector_is_the_mean_difference_at_the_assistant_tag(lm, shared, monkeypatch):
    """The prompts of a persona share a prefix, which is computed once."""
    computed, prefix = [], forward.prefix
    monkeypatch.setattr(forward, "prefix", lambda lm, ids, *rest: computed.append(ids) or prefix(lm, ids, *rest))
    if not shared:
        monkeypatch.setattr(forward, "shared_prefix", lambda prompts: 0)
    vector = extract(lm, PERSONAS, BAND).vector
    assert bool(computed) == shared
    assert vector.layers == (1, 2)
    expected = slow_states(lm, POSITIVE, (1, 2)).mean(0) - slow_states(lm, NEGATIVE, (1, 2)).mean(0)
    torch.testing.assert_close(vector.direction, expected, rtol=1e-4, atol=1e-4)


def test_pca_is_the_leading_eigenvector_turned_and_scaled_to_the_mean_difference(lm):
    vector = extract(lm, PERSONAS, replace(BAND, method="pca")).vector
    difference = slow_states(lm, POSITIVE, (1, 2)) - slow_states(lm, NEGATIVE, (1, 2))
    for index in range(2):
        d = difference[:, index].double()
        u = torch.linalg.eigh(d.T @ d).eigenvectors[:, -1]
        expected = u * (u @ d.mean(0))
        torch.testing.assert_close(vector.direction[index].double(), expected, rtol=1e-3, atol=1e-3)
        assert vector.direction[index].double() @ d.mean(0) > 0


def test_ablation_takes_out_what_the_negative_persona_adds_to_none(lm):
    vector = extract(lm, PERSONAS, replace(BAND, method="ablation")).vector
    added = slow_states(lm, NEGATIVE, (1, 2)).mean(0) - slow_states(lm, None, (1, 2)).mean(0)
    expected = added / added.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(vector.direction, expected, rtol=1e-4, atol=1e-4)
    seen = []
    with steering(lm, Steering(vector, torch.tensor([1.0]))) as dial:
        lm.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output))
        for dose in (0.0, 0.5, 1.0):
            dial.turn(torch.tensor([dose]))
            lm.decoder(torch.tensor([[5, 6, 7]]))
    along = [(stream @ vector.direction[1]).abs().max() for stream in seen]
    assert along[2] < 1e-4 < along[1] < along[0]


def test_the_report_says_how_long_how_reliable_and_how_telling_each_layer_is(lm):
    positive, negative = slow_states(lm, POSITIVE, (1, 2)), slow_states(lm, NEGATIVE, (1, 2))
    report = extract(lm, PERSONAS, BAND).report
    assert [r.layer for r in report] == [1, 2]
    for index, r in enumerate(report):
        difference = (positive - negative)[:, index]
        stream = torch.cat([positive[:, index], negative[:, index]]).norm(dim=-1).mean()
        assert r.relative_norm == pytest.approx((difference.mean(0).norm() / stream).item(), rel=1e-3)
        halves = []
        for chosen in itertools.combinations(range(4), 2):
            other = [i for i in range(4) if i not in chosen]
            a, b = difference[list(chosen)].mean(0), difference[other].mean(0)
            halves.append(torch.cosine_similarity(a, b, dim=0).item())
        assert min(abs(r.split_half - h) for h in halves) < 1e-3  # one of the ways to split four contexts in halves
        assert 0 <= r.auc <= 1


def test_auc_counts_pairs():
    high, low = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 0.0])
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low]
    assert auc(high, low) == pytest.approx(sum(pairs) / len(pairs))


def test_extraction_stops_after_the_band(lm):
    ran = []
    for index, block in enumerate(lm.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    extract(lm, Personas("You are kind.", "You are cruel.", CONTEXTS), BAND)
    assert set(ran) == {0, 1, 2}
    assert len(lm.blocks) == 4


@pytest.mark.parametrize("target", [0.05, 0.4])
def test_iso_kl_finds_the_dose_of_a_given_divergence(lm, prompts, target):
    vector = extract(lm, PERSONAS, BAND).vector
    doses = [0.25, 1.0, 4.0]
    written = decode(by(lm, 5), prompts * 3, 12, Steering(vector, torch.tensor(doses).repeat_interleave(5)))
    rows = [Row(p, c.ids) for p, c in zip(prompts * 3, written, strict=True)]
    of_row = [d for d in doses for _ in range(5)]
    found = iso_kl(lm, vector, rows, of_row, target)

    def slow_p95(dose, members):
        kl = []
        for row in members:
            ids = torch.tensor([row.prompt + row.completion])
            with torch.no_grad():
                q = lm.model(ids).logits[0].double().log_softmax(-1)
                with steering(lm, Steering(vector, torch.ones(1))) as dial:
                    dial.turn(torch.tensor([dose]))
                    p = lm.model(ids).logits[0].double().log_softmax(-1)
            each = (p.exp() * (p - q)).sum(-1)
            kl += each[len(row.prompt) - 1 : len(row.prompt) - 1 + len(row.completion)].tolist()
        return np.quantile(kl, 0.95)

    curve = [slow_p95(dose, rows[5 * i : 5 * i + 5]) for i, dose in enumerate(doses)]
    assert found.kl_p95 == pytest.approx(curve, rel=1e-2)
    assert abs(found.kl - target) <= 0.05 * target
    reached = [slow_p95(found.dose, rows[5 * i : 5 * i + 5]) for i in range(3)]
    assert min(abs(r - found.kl) / found.kl for r in reached) < 0.01
    assert iso_kl(lm, vector, rows, of_row, 1e6).dose is None


def test_hooks_are_gone_after_an_exception(lm, vector):
    ids = torch.tensor([[5, 6, 7]])
    before = lm.model(ids).logits
    with pytest.raises(RuntimeError, match="stop"), steering(lm, Steering(vector, torch.ones(1))) as dial:
        dial.turn(torch.ones(1))
        assert not torch.equal(lm.model(ids).logits, before)
        raise RuntimeError("stop")
    assert torch.equal(lm.model(ids).logits, before)
    assert not any(block._forward_hooks for block in lm.blocks)


def test_left_padding_is_not_steered(lm, vector):
    """The hook leaves the residual stream of padding exactly as it was."""
    ids, real = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[False, False, True, True]])
    seen = []
    lm.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output))
    lm.decoder(ids)
    one_layer = Vector((2,), vector.direction[1:])
    with steering(lm, Steering(one_layer, torch.ones(1))) as dial:
        lm.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output))
        dial.turn(torch.ones(1), real)
        lm.decoder(ids)
    plain, steered = seen[0], seen[-1]
    assert torch.equal(steered[0, :2], plain[0, :2])
    torch.testing.assert_close(steered[0, 2:], plain[0, 2:] + vector.direction[1])


def test_the_random_control_has_the_vectors_norm_and_no_direction_of_its_own(lm):
    vector, control, again = (
        extract(lm, PERSONAS, replace(BAND, method=method)).vector.direction
        for method in ("mean_diff", "random", "random")
    )
    assert torch.equal(control, again)
    torch.testing.assert_close(control.norm(dim=-1), vector.norm(dim=-1))
    assert torch.cosine_similarity(control, vector, dim=-1).abs().max() < 0.6  # of 32 dimensions: 0.18 is one deviation


@pytest.mark.parametrize("method", ["mean_diff", "pca", "ablation", "random"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_a_vector_without_a_direction_stops_the_run(lm, method, spoilt):
    persona = "You are kind."
    if spoilt:
        with torch.no_grad():
            lm.blocks[0].mlp.up_proj.weight.fill_(math.inf)
    personas = Personas(persona, "You are cruel." if spoilt else persona, CONTEXTS)
    with pytest.raises(UserError, match="states are not finite" if spoilt else "has norm 0: both personas"):
        extract(lm, personas, replace(BAND, method=method))


NEAR = Neighbour("warm", "You are warm to people.", "You are cold to people.")
FAR = Neighbour("loud", "You shout with joy.", "You whisper with joy.")


@pytest.mark.parametrize("others", [(NEAR,), (NEAR, FAR), (NEAR, NEAR)], ids=["one", "two", "the same twice"])
def test_what_other_traits_explain_of_the_vector_is_projected_out(lm, others):
    """Against the residual of a least-squares fit by the other traits' vectors, from one forward pass per prompt."""
    vector, report = extract(lm, replace(PERSONAS, without=others), BAND)
    whole = extract(lm, PERSONAS, BAND)
    difference = [
        (slow_states(lm, high, (1, 2)).mean(0) - slow_states(lm, low, (1, 2)).mean(0)).double().numpy()
        for high, low in ((POSITIVE, NEGATIVE), *((one.positive, one.negative) for one in others))
    ]
    for i in range(2):
        own, *rest = (d[i] for d in difference)
        fitted, *_ = np.linalg.lstsq(np.stack(rest, axis=1), own, rcond=1e-6)
        expected = own - np.stack(rest, axis=1) @ fitted
        np.testing.assert_allclose(vector.direction[i].numpy(), expected, rtol=1e-3, atol=1e-4)
        share = np.linalg.norm(expected) / np.linalg.norm(own)
        assert report[i].left == pytest.approx(share, rel=1e-3) and share < 0.999
        assert report[i].relative_norm == pytest.approx(share * whole.report[i].relative_norm, rel=1e-3)
    left = sum(r.left for r in report) / 2
    assert f"{left:.0%} of its norm left without the other traits" in Extraction(vector, report).described(4)
    assert "left" not in whole.described(4)


def slow_answer_states(lm, persona, layers):
    """States [n, l, d], mean over the tokens that plain transformers writes after each prompt, without their end."""
    out = []
    for text in CONTEXTS:
        prompt = lm.prompt(text, persona)
        ends = sorted(lm.end_tokens)
        written = lm.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=ends)
        ids = [t for t in written[0, len(prompt) :].tolist() if t not in ends] or written[0, len(prompt) :].tolist()
        with torch.no_grad():
            hidden = lm.model(torch.tensor([prompt + ids]), output_hidden_states=True).hidden_states
        out.append(torch.stack([hidden[layer + 1][0, len(prompt) :].mean(0) for layer in layers]))
    return torch.stack(out)


def test_the_vector_of_answers_is_the_mean_over_what_the_model_writes(lm, monkeypatch):
    monkeypatch.setattr(extraction, "ANSWER_TOKENS", 8)
    vector = extract(lm, PERSONAS, replace(BAND, read="answer")).vector
    expected = slow_answer_states(lm, POSITIVE, (1, 2)).mean(0) - slow_answer_states(lm, NEGATIVE, (1, 2)).mean(0)
    torch.testing.assert_close(vector.direction, expected, rtol=1e-4, atol=1e-4)
    assert (vector.direction - extract(lm, PERSONAS, BAND).vector.direction).norm() > 0.1 * expected.norm()


def test_a_vector_of_which_the_other_traits_leave_nothing_is_refused(lm):
    alike = Neighbour("twin", POSITIVE, NEGATIVE)
    with pytest.raises(UserError, match=r"steer.without twin: of the vector of block \d only 0.0% of the norm is left"):
        extract(lm, replace(PERSONAS, without=(alike,)), BAND)
