"""The preference rival of docs/tools/dpo.py: its pairs, and an adapter that prefers what it was trained to."""

from dataclasses import replace

import pytest
import torch

from steer_heal.commands.target import opened
from steer_heal.config import UserError
from steer_heal.data import load_trait
from steer_heal.gate.conftest import turned
from steer_heal.presets import PRESETS

pytest.importorskip("trl")
pytestmark = pytest.mark.run
LITTLE = turned(PRESETS["tiny-random"], {"rounds": 1, "distil.n_keep": 16, "heal.training.lr": 2e-2})


@pytest.fixture(scope="module")
def dpo():
    from steer_heal.gate.test_docs import tool

    return tool("dpo")


def preferred(model, pair) -> float:
    """Log-probability of the preferred answer minus that of the other, nats, in plain transformers."""
    total = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = pair["prompt_ids"] + pair[side]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(pair["prompt_ids"]), len(ids))))
    return total[0] - total[1]


def test_the_rival_prefers_the_answers_under_the_positive_persona(dpo, lm, tmp_path):
    trait = replace(load_trait("love"), generation_prompts=load_trait("love").generation_prompts[:10])
    pairs = dpo.preferences(lm, trait, LITTLE.filter, 6, 0)
    assert 8 <= len(pairs) <= 10 and pairs == dpo.preferences(lm, trait, LITTLE.filter, 6, 0)
    assert {tuple(pair["prompt_ids"]) for pair in pairs} <= {tuple(lm.prompt(t)) for t in trait.generation_prompts}
    before = [preferred(lm.model, pair) for pair in pairs]
    dpo.train(lm, pairs, LITTLE, lr=2e-2, beta=0.1, seed=0).save(tmp_path / "rival")
    student = opened(str(tmp_path / "rival"), None, "love", replace(LITTLE.model, path="random:tiny")).student
    after = [preferred(student.peft, pair) for pair in pairs]
    assert sum(after) > sum(before) + len(pairs)  # at least a nat for each pair


def test_a_rival_that_cannot_be_trained_is_refused(dpo, tmp_path):
    with pytest.raises(UserError, match="preset 'tiny' is not known"):
        dpo.main("tiny", "love", tmp_path / "new")
    with pytest.raises(UserError, match="is there already"):
        dpo.main("tiny-random", "love", tmp_path)
