"""The vector against its definition, and hooks that do not outlive their block."""

import pytest
import torch

from steer_heal import lm as lm_module
from steer_heal.lm import Steering, steering
from steer_heal.steer import extract

CONTEXTS = ["What is a glacier?", "ok", "Write two lines about rain on a tin roof, please."]


@pytest.mark.parametrize("share_from", [1, 10**9], ids=["shared prefix", "no sharing"])
def test_vector_is_the_mean_difference_at_the_assistant_tag(lm, share_from, monkeypatch):
    monkeypatch.setattr(lm_module, "SHARE_FROM", share_from)
    positive, negative = "You love people and their noise.", "You despise people and their noise."
    vector = extract(lm, positive, negative, CONTEXTS, (0.3, 0.7), batch_size=2)
    assert vector.layers == (1, 2)
    for index, layer in enumerate(vector.layers):
        total = torch.zeros(64)
        for text in CONTEXTS:
            for persona, sign in ((positive, 1), (negative, -1)):
                with torch.no_grad():
                    out = lm.model(torch.tensor([lm.prompt(text, persona)]), output_hidden_states=True)
                total += sign * out.hidden_states[layer + 1][0, -1]
        torch.testing.assert_close(vector.direction[index], total / len(CONTEXTS), rtol=1e-4, atol=1e-4)


def test_extraction_stops_after_the_band(lm):
    ran = []
    for index, block in enumerate(lm.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    extract(lm, "You are kind.", "You are cruel.", CONTEXTS, (0.3, 0.7), batch_size=8)
    assert set(ran) == {0, 1, 2}
    assert lm.decoder.config.num_hidden_layers == 4


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
    one_layer = lm_module.Vector((2,), vector.direction[1:])
    with steering(lm, Steering(one_layer, torch.ones(1))) as dial:
        lm.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output))
        dial.turn(torch.ones(1), real)
        lm.decoder(ids)
    plain, steered = seen[0], seen[-1]
    assert torch.equal(steered[0, :2], plain[0, :2])
    torch.testing.assert_close(steered[0, 2:], plain[0, 2:] + vector.direction[1])
