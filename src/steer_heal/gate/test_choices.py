"""Answers scored from shared prompts against one plain forward pass per answer."""

import pytest
import torch

from steer_heal.config import ModelConfig
from steer_heal.gate.conftest import by
from steer_heal.model.answers import choice_log_probs
from steer_heal.model.loading import load
from steer_heal.model.steering import Steering, Vector
from steer_heal.presets import PRESETS

ANSWERS = ["Yes.", "No, not at all, and certainly not before noon.", "n", "Perhaps we could ask the neighbours first."]


def slowly(lm, prompt, answer, vector=None, dose=0.0):
    hooks = []
    if vector is not None:
        for layer, v in zip(vector.layers, vector.direction, strict=True):
            hooks.append(lm.blocks[layer].register_forward_hook(lambda m, a, out, v=v: out + dose * v))
    with torch.no_grad():
        log_p = lm.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return torch.stack([log_p[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])


@pytest.fixture(params=["windowed", "shared"])
def model(request, tmp_path):
    """The tiny gemma with sliding windows, and one without them, on which prompts share a prefix."""
    if request.param == "windowed":
        return load(PRESETS["tiny-random"].model)
    from steer_heal.model.random_weights import build_random

    build_random("tiny", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("sliding_attention", "full_attention"))
    lm = load(ModelConfig(str(tmp_path), "none", "float32", "cpu"))
    assert not lm.windowed
    return lm


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("steered", [False, True])
def test_every_answer_gets_the_log_probability_of_a_plain_forward(model, batch_size, steered):
    system = "You weigh every word, and you answer in one short sentence that a child can follow."
    users = ["Hi.", "How long should I boil an egg for a soft yolk?", "Name a tree. " * 7, "Go on", "Why?"]
    prompts = [model.prompt(user, system) for user in users]
    answers = [[model.answer(a) for a in ANSWERS[i % 3 :]] for i in range(len(prompts))]
    vector = Vector((1, 2), torch.randn(2, 64, generator=torch.Generator().manual_seed(1)))
    doses = torch.tensor([0.0, 1.0, 1.0, -2.0, 0.5])
    found = choice_log_probs(by(model, batch_size), prompts, answers, Steering(vector, doses) if steered else None)
    for i, prompt in enumerate(prompts):
        assert len(found[i]) == len(answers[i])
        for answer, log_probs in zip(answers[i], found[i], strict=True):
            expected = slowly(model, prompt, answer, vector if steered else None, doses[i].item())
            torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
