"""A heal step against the loss over the whole effective batch, read slowly; and what must stop a run."""

from dataclasses import replace

import pytest
import torch

from steer_heal.bake import Student
from steer_heal.config import PRESETS
from steer_heal.heal import NonFinite, _accumulate, heal, prepare, prepare_anchors, recomputation
from steer_heal.lm import Row, Steering

BASE = replace(PRESETS["tiny-random"].heal, tau=0.0, anchor_tau=0.0, lam=2.0)
TEXTS = [
    "A short one.",
    "Something rather longer than that, with commas, and more.",
    "Yes.",
    "Hm, well.",
    "So be it then.",
]


def student_with_update(lm, vector, config, scale=0.2):
    """A student away from its reference, its examples and its anchors."""
    student = Student(lm)
    rows = [Row(lm.prompt(f"Question {'very ' * i}?"), lm.answer(text)) for i, text in enumerate(TEXTS)]
    student.begin_round(config, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.trainable():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    steering = Steering(vector, torch.full((3,), 0.1))
    anchors = prepare_anchors(student, rows[3:], 2) if config.anchor == "neutral" else []
    return student, rows, prepare(student, rows[:3], steering, config, 2), anchors


def naive_loss(student, rows, steering, config):
    """All logits of every row on its own, distributions in full."""

    def log_probs(row, steered=False, **gate):
        ids = torch.tensor([row.prompt + row.completion])
        hooks = []
        if steered:
            for index, layer in enumerate(steering.vector.layers):
                add = steering.dose[0] * steering.vector.direction[index]
                hooks.append(student.lm.blocks[layer].register_forward_hook(lambda m, a, out, add=add: out + add))
        with student.view(**gate):
            logits = student.lm.model(ids).logits[0, len(row.prompt) - 1 : -1]
        for hook in hooks:
            hook.remove()
        return logits.log_softmax(-1)

    objective, kl, anchor_kl = [], [], []
    for index, row in enumerate(rows):
        p = log_probs(row, train=True)
        reference = log_probs(row, now=0.0).detach()
        position_kl = list((p.exp() * (p - reference)).sum(-1))
        if index >= 3:
            anchor_kl += position_kl
            continue
        kl += position_kl
        if config.target == "soft":
            teacher = log_probs(row, steered=True, now=0.0).detach()
            objective += list((teacher.exp() * (teacher - p)).sum(-1))
        else:
            objective += [-p[i, token] for i, token in enumerate(row.completion)]

    def root_mean_square(values):
        return torch.stack([v**2 for v in values]).mean().sqrt()

    loss = torch.stack(objective).mean() + config.lam * root_mean_square(kl)
    return loss + config.lam * root_mean_square(anchor_kl) if config.anchor == "neutral" else loss


@pytest.mark.parametrize("target", ["sampled", "soft"])
@pytest.mark.parametrize("anchor", ["none", "neutral"])
@pytest.mark.parametrize("sizes", [(6, 1), (3, 2), (1, 6)])
def test_every_split_of_a_batch_gives_the_gradient_of_the_whole(lm, vector, target, anchor, sizes):
    config = replace(BASE, target=target, anchor=anchor, train_bs=sizes[0], grad_accum=sizes[1])
    student, rows, examples, anchors = student_with_update(lm, vector, config)
    with student.view(train=True):
        record = _accumulate(student.lm, examples + anchors, config, config.lam)
        gradients = [p.grad.clone() for p in student.trainable()]
        expected_loss = naive_loss(student, rows, Steering(vector, torch.full((3,), 0.1)), config)
        expected = torch.autograd.grad(expected_loss, student.trainable())
    assert record["fired"]
    assert record["loss"] == pytest.approx(expected_loss.item(), rel=1e-4)
    largest = max(g.abs().max() for g in expected)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5 * float(largest))


def test_checkpointing_changes_no_gradient(lm, vector):
    student, _, examples, _ = student_with_update(lm, vector, BASE)
    gradients = []
    for checkpointing in (False, True):
        with student.view(train=True), recomputation(lm, checkpointing):
            _accumulate(lm, examples, BASE, 1.0)
        gradients.append([p.grad.clone() for p in student.trainable()])
        for parameter in student.trainable():
            parameter.grad = None
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_training_moves_towards_the_text_and_the_barrier_holds_it_back(lm, vector):
    """Without a barrier the NLL falls and D grows; a strong barrier keeps D near tau."""
    final = {}
    for lam in (0.0, 50.0):
        config = replace(BASE, lam=lam, lam_round_pow=0.0, tau=0.002, epochs=12, lr=5e-3, val_share=0.0)
        student, _, examples, _ = student_with_update(lm, vector, config, scale=0.0)
        student.peft.delete_adapter("now")
        student.begin_round(config, 0)
        records = heal(student, examples, [], config, round_=0, seed=0)
        final[lam] = records
    assert final[0.0][-1]["objective"] < final[0.0][0]["objective"] - 0.05
    assert final[50.0][-1]["divergence"] < 0.5 * final[0.0][-1]["divergence"]
    assert any(r["fired"] for r in final[50.0]) and final[50.0][-1]["divergence"] < 10 * 0.002


def test_training_is_reproducible(lm, vector):
    config = replace(BASE, val_share=0.34)
    runs = []
    for _ in range(2):
        student, _, examples, _ = student_with_update(lm, vector, config, scale=0.0)
        student.peft.delete_adapter("now")
        student.begin_round(config, 7)
        records = heal(student, examples, [], config, round_=1, seed=3)
        runs.append(([p.detach().clone() for p in student.trainable()], records[-1]["val_nll"]))
        student.peft.unload()
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_term(lm, vector):
    student, _, examples, _ = student_with_update(lm, vector, BASE)
    student.trainable()[0].data.fill_(float("nan"))
    with pytest.raises(NonFinite, match=r"heal step 0: objective is nan over \d+ tokens"):
        heal(student, examples, [], BASE, round_=0, seed=0)
    assert not any(p.requires_grad for p in lm.model.parameters())
