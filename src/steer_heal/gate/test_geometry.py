"""Where a round moved the model, against one plain forward pass per text."""

from dataclasses import replace

import pytest
import torch

from steer_heal.bake.student import Student
from steer_heal.data import neutral
from steer_heal.eval.geometry import Fixed, geometry, read_base
from steer_heal.eval.instruments import neutral_rows
from steer_heal.model.steering import Vector
from steer_heal.presets import PRESETS

LORA = replace(PRESETS["tiny-random"].heal.lora, r=2)
TEXTS = ["Hi.", "How long should I boil an egg for a soft yolk?", "Name a tree."]


def grown(student, seed):
    """A round with nonzero factors."""
    student.begin_round(LORA, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factors in student.factors():
            factors.b.copy_(0.3 * torch.randn(factors.b.shape, generator=generator))


def test_shifts_and_divergence_equal_a_plain_reading(lm):
    student = Student(lm)
    grown(student, 1)
    student.fold()
    grown(student, 2)
    generator = torch.Generator().manual_seed(3)
    vector, first = (Vector((1, 2), torch.randn(2, 64, generator=generator)) for _ in range(2))
    fixed = Fixed(TEXTS, neutral_rows(lm, 2))
    found = geometry(student, fixed, vector, first, read_base(student, fixed, vector.layers))

    def states(history, now):
        with student.view(history=history, now=now), torch.no_grad():
            layers = []
            for text in TEXTS:
                hidden = lm.model(torch.tensor([lm.prompt(text)]), output_hidden_states=True).hidden_states
                layers.append(torch.stack([hidden[layer + 1][0, -1] for layer in vector.layers]))
            logits = [lm.model(torch.tensor([lm.tokenizer(t).input_ids])).logits[0, :-1] for t in neutral()[:2]]
        return torch.stack(layers).mean(0), torch.cat(logits).log_softmax(-1)

    base, before, now = states(0.0, 0.0), states(1.0, 0.0), states(1.0, 1.0)
    cosine = torch.nn.functional.cosine_similarity
    kl = (now[1].exp() * (now[1] - base[1])).sum(-1)
    expected = {
        "cos_first_vector": cosine(vector.direction, first.direction, dim=-1).mean().item(),
        "cos_shift_vector": cosine(now[0] - before[0], vector.direction, dim=-1).mean().item(),
        "cos_total_first": cosine(now[0] - base[0], first.direction, dim=-1).mean().item(),
        "kl_to_base_nats": kl.mean().item(),
        "kl_to_base_rmse_nats": kl.square().mean().sqrt().item(),
    }
    assert vars(found) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert kl.mean() > 0.01 and not torch.allclose(base[0], before[0], atol=1e-3)
