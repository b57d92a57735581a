"""The gated history: exact gates, folding, files that plain PEFT reads."""

from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel

from steer_heal.bake.lowrank import compress
from steer_heal.bake.student import Student
from steer_heal.config import AdapterConfig
from steer_heal.gate.conftest import DEVICE, tiny
from steer_heal.presets import PRESETS

pytestmark = pytest.mark.device
CONFIG = PRESETS["tiny-random"].heal.lora
IDS = torch.tensor([[7, 300, 41, 900, 12]], device=DEVICE)


def logits(student):
    with torch.no_grad():
        return student.lm.model(IDS).logits


def add_round(student, seed, config: AdapterConfig = CONFIG):
    """Add a round with a random B in place of a trained one, so that its adapter has an effect."""
    student.begin_round(config, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.trainable():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(DEVICE)


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
    x = torch.randn(3, 64, device=DEVICE)
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

    fresh = tiny()
    plain = PeftModel.from_pretrained(fresh.model, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-5, atol=1e-5)

    again = Student(tiny())
    for seed in (1, 2):
        again.load_round(tmp_path / f"r{seed}")
        again.fold()
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_compression_is_the_truncated_svd_of_the_dense_update(rank):
    draw = torch.Generator().manual_seed(rank)
    a, b = torch.randn(6, 40, generator=draw), torch.randn(25, 6, generator=draw)
    u, s, vt = torch.linalg.svd((b @ a).double(), full_matrices=False)
    small = compress(a, b, rank)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    torch.testing.assert_close((small.b @ small.a).double(), best, rtol=1e-4, atol=1e-4)
    assert small.lost == pytest.approx(s[rank:].square().sum().item(), rel=1e-5, abs=1e-9)
    assert small.total == pytest.approx(s.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize(("inner", "outer"), [(40, 3), (3, 25), (4, 4)])
def test_a_rank_above_a_layers_width_loses_nothing(inner, outer):
    """A key projection may be narrower than the rank that the history is compressed to."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, inner, generator=draw), torch.randn(outer, 8, generator=draw)
    small = compress(a, b, 6)
    assert small.a.shape == (6, inner) and small.b.shape == (outer, 6)
    torch.testing.assert_close(small.b @ small.a, b @ a, rtol=1e-4, atol=1e-4)
    assert small.lost < 1e-9 * small.total


def test_a_history_is_folded_to_a_rank_above_a_layers_width(lm):
    narrow = min(min(m.weight.shape) for m in lm.blocks.modules() if type(m) is torch.nn.Linear)
    student = Student(lm)
    wide = replace(CONFIG, r=narrow)
    for seed in range(2):
        add_round(student, seed, wide)
        before = logits(student)
        student.fold(rank=narrow + 1)
    assert student.peft.peft_config[student.history].r == narrow + 1
    assert not torch.equal(logits(student), before)


def test_a_folded_history_of_fixed_rank_says_what_it_lost(lm):
    student = Student(lm)
    for seed in range(3):
        add_round(student, seed)
        before = dense_delta(student, "now")
        if student.history is not None:
            before = {path: delta + dense_delta(student, student.history)[path] for path, delta in before.items()}
        lost = student.fold(rank=5)
        after = dense_delta(student, student.history)
        gap = sum((after[path] - before[path]).square().sum() for path in before) ** 0.5
        whole = sum(delta.square().sum() for delta in before.values()) ** 0.5
        assert lost == pytest.approx((gap / whole).item(), rel=1e-3, abs=1e-6)
        assert (lost == 0.0) == (seed == 0)
        assert student.peft.peft_config[student.history].r == (4 if seed == 0 else 5)


def test_in_a_bf16_model_adapters_train_and_fold_in_float32():
    student = Student(tiny(dtype="bfloat16"))
    add_round(student, 1)
    student.fold()
    student.begin_round(CONFIG, 2)
    lora = {name: p.dtype for name, p in student.peft.named_parameters() if "lora_" in name}
    others = {p.dtype for name, p in student.peft.named_parameters() if "lora_" not in name}
    assert set(lora.values()) == {torch.float32} and others == {torch.bfloat16}
    assert logits(student).dtype == torch.bfloat16


def test_an_adapter_trained_under_nf4_loads_on_the_float_model(tmp_path):
    quantised = Student(tiny(quant="nf4"))
    add_round(quantised, 1)
    quantised.save(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny().model, tmp_path / "adapter")
    on_float = Student(tiny())
    add_round(on_float, 1)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, logits(on_float), rtol=1e-5, atol=1e-5)


def test_under_nf4_nothing_is_silently_upcast():
    """4-bit base weights, bf16 everywhere else in the base and on the residual stream, float32 factors."""
    student = Student(tiny(quant="nf4", dtype="bfloat16"))
    student.begin_round(CONFIG, 0)
    kinds: dict[str, set] = {"packed": set(), "lora": set(), "rest": set()}
    linear = {id(m.weight) for m in student.lm.blocks.modules() if isinstance(m, Linear4bit)}
    assert len(linear) == 7 * 4
    for name, parameter in student.peft.named_parameters():
        kinds["lora" if "lora_" in name else "packed" if id(parameter) in linear else "rest"].add(parameter.dtype)
    assert kinds == {"packed": {torch.uint8}, "lora": {torch.float32}, "rest": {torch.bfloat16}}
    seen = set()
    hooks = [b.register_forward_hook(lambda m, a, out: seen.add(out.dtype)) for b in student.lm.blocks]
    logits(student)
    assert seen == {torch.bfloat16} and len(hooks) == 4
