"""Answers scored from shared prompts, and with their end, against one plain forward pass per answer."""

from dataclasses import replace

import pytest
import torch

from steer_heal.config import ModelConfig
from steer_heal.gate.conftest import by
from steer_heal.model.answers import choice_log_probs
from steer_heal.model.likelihood import ended_log_probs
from steer_heal.model.lm import Row
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


@pytest.mark.parametrize("batch_size", [1, 64])
def test_an_answer_and_its_end_get_the_log_probabilities_of_a_plain_forward(model, batch_size):
    """Each of three end tokens ends an answer; the last value is the log of the sum of their probabilities."""
    ends = [1, 5, len(model.tokenizer) - 3]
    model = replace(model, end_tokens=frozenset(ends))
    prompts = [model.prompt(user, "You are kind.") for user in ("Hi.", "Name a tree. " * 7, "Go on", "Why?")]
    rows = [Row(prompt, model.answer(answer)) for prompt, answer in zip(prompts, ANSWERS, strict=True)]
    vector, doses = (
        Vector((1, 2), torch.randn(2, 64, generator=torch.Generator().manual_seed(1))),
        [0.0, 1.0, -2.0, 1.0],
    )
    found = ended_log_probs(by(model, batch_size), rows, Steering(vector, torch.tensor(doses)))
    for (prompt, answer), log_probs, dose in zip(rows, found, doses, strict=True):
        after = [slowly(model, prompt, [*answer, end], vector, dose) for end in ends]
        expected = torch.cat([after[0][:-1], torch.stack([one[-1] for one in after]).logsumexp(0)[None]])
        torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_prompt_without_answers_has_no_scores(model, rows):
    """Also where all prompts of a batch have none."""
    prompts = [model.prompt(f"Question {i}?") for i in range(3)]
    scored = choice_log_probs(by(model, rows), prompts, [[], [model.answer("Yes.")], []])
    assert [len(found) for found in scored] == [0, 1, 0]
    assert choice_log_probs(by(model, rows), prompts, [[], [], []]) == [[], [], []]
