"""The gated history: exact gates, folding, files that plain PEFT reads."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from steer_heal.bake import Student
from steer_heal.config import PRESETS, HealConfig
from steer_heal.loading import load

CONFIG = replace(PRESETS["tiny-random"].heal, r=4, alpha=8)
IDS = torch.tensor([[7, 300, 41, 900, 12]])


def logits(student):
    with torch.no_grad():
        return student.lm.model(IDS).logits


def add_round(student, seed, config: HealConfig = CONFIG):
    """A round whose adapter does something: B is drawn instead of trained."""
    student.begin_round(config, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.trainable():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def dense_delta(student, name):
    """{module: scale * B @ A} of one adapter, as dense matrices."""
    return {
        path: (layer.get_delta_weight(name)).clone()
        for path, layer in student.lm.model.named_modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    }


def test_a_fresh_round_starts_exactly_at_the_previous_student(lm):
    before = lm.model(IDS).logits
    student = Student(lm)
    student.begin_round(CONFIG, 0)
    assert torch.equal(logits(student), before)


def test_gates(lm):
    base = lm.model(IDS).logits.detach()
    student = Student(lm)
    add_round(student, 1)
    student.fold()
    after_one = logits(student)
    add_round(student, 2)
    after_two = logits(student)
    assert not torch.allclose(after_one, base) and not torch.allclose(after_two, after_one)
    with student.view(history=0.0, now=0.0):
        assert torch.equal(logits(student), base)
    with student.view(now=0.0):
        assert torch.equal(logits(student), after_one)
    assert torch.equal(logits(student), after_two)


def test_half_a_gate_is_half_the_update(lm):
    student = Student(lm)
    add_round(student, 1)
    weight = dict(lm.model.named_modules())["model.layers.1.mlp.up_proj"]
    x = torch.randn(3, 64)
    with torch.no_grad():
        full = weight(x)
        with student.view(now=0.0):
            none = weight(x)
        with student.view(now=0.5):
            half = weight(x)
    torch.testing.assert_close(half, (full + none) / 2)


def test_views_restore_when_nested_and_through_exceptions(lm):
    student = Student(lm)
    add_round(student, 1)
    before = logits(student)
    with pytest.raises(RuntimeError, match="stop"), student.view(0.0, 0.0), student.view(now=0.3, train=True):
        assert all(p.requires_grad for p in student.trainable())
        raise RuntimeError("stop")
    assert torch.equal(logits(student), before)
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_only_the_current_round_trains(lm):
    student = Student(lm)
    add_round(student, 1)
    student.fold()
    add_round(student, 2)
    with student.view(train=True):
        student.lm.model(IDS).logits.square().mean().backward()
        with_gradient = {name for name, p in student.peft.named_parameters() if p.grad is not None}
    assert with_gradient and all(".now." in name for name in with_gradient)


def test_folded_history_equals_the_dense_sum_of_all_rounds(lm):
    student = Student(lm)
    total: dict[str, torch.Tensor] = {}
    for seed in (1, 2, 3):
        add_round(student, seed)
        for path, delta in dense_delta(student, "now").items():
            total[path] = total.get(path, 0) + delta
        before = logits(student)
        student.fold()
        torch.testing.assert_close(logits(student), before, rtol=1e-4, atol=1e-4)
    folded = dense_delta(student, student.history)
    assert folded.keys() == total.keys() and len(folded) > 0
    for path, delta in folded.items():
        torch.testing.assert_close(delta, total[path])


def test_files_load_with_plain_peft_and_give_the_same_logits(lm, tmp_path):
    student = Student(lm)
    for seed in (1, 2):
        add_round(student, seed)
        student.save(tmp_path / f"r{seed}")
        student.fold()
    student.save(tmp_path / "adapter", student.history)
    expected = logits(student)

    fresh = load(PRESETS["tiny-random"].model)
    plain = PeftModel.from_pretrained(fresh.model, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-5, atol=1e-5)

    again = Student(load(PRESETS["tiny-random"].model))
    for seed in (1, 2):
        again.load_round(tmp_path / f"r{seed}")
        again.fold()
    assert torch.equal(logits(again), expected)
