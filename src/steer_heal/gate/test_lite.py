"""Vectors with another library's hooks: one dose per batch, the same text as one row at a time."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from steer_heal.cli import main
from steer_heal.config import UserError
from steer_heal.model.decode import decode
from steer_heal.model.likelihood import row_nll
from steer_heal.model.lm import Row
from steer_heal.model.steering import ForeignVector, Steering, steering
from steer_heal.presets import PRESETS
from steer_heal.steer import lite
from steer_heal.steer.extract import extract
from steer_heal.steer.personas import Personas

DOSES = torch.tensor([0.5, 2.0, 0.5, 0.0, 2.0])


class OneCoefficient(ForeignVector):
    """Adds coefficient * direction after block 1 for the whole batch, padding included, as other libraries do."""

    layers = (1,)

    def __init__(self, direction):
        self.direction, self.batches = direction, []

    @contextmanager
    def attached(self, lm, dose):
        def hook(module, args, output):
            self.batches.append((dose, len(output)))
            return output + dose * self.direction

        handle = lm.blocks[1].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def test_rows_of_one_dose_are_decoded_and_scored_together(lm, prompts, vector):
    foreign = OneCoefficient(vector.direction[0])
    own = Steering(type(vector)((1,), vector.direction[:1]), DOSES)
    assert decode(lm, prompts, 12, Steering(foreign, DOSES)) == decode(lm, prompts, 12, own)
    assert {rows for dose, rows in foreign.batches if dose != 0.0} == {16}  # two rows per dose, see `batching.rounded`
    rows = [Row(p, lm.answer("A long walk")) for p in prompts]
    for a, b in zip(row_nll(lm, rows, Steering(foreign, DOSES)), row_nll(lm, rows, own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not lm.blocks[1]._forward_hooks


def test_a_foreign_vector_leaves_no_hook_behind_after_an_exception(lm, vector):
    with (
        pytest.raises(RuntimeError, match="stop"),
        steering(lm, Steering(OneCoefficient(vector.direction[0]), DOSES)) as d,
    ):
        d.turn(torch.ones(2))
        assert lm.blocks[1]._forward_hooks
        raise RuntimeError("stop")
    assert not lm.blocks[1]._forward_hooks


def test_without_the_package_the_user_is_told_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        main(["run", "tiny-random", "--steer.method", "lite:pca", "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert "just vendor" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["mean_diff", "pca", "spherical", "directional_ablation"])
def test_steering_lite_writes_the_same_through_us_as_by_itself(lm, prompts, method, tmp_path):
    pytest.importorskip("steering_lite")
    contexts = ["What is a glacier?", "ok", "Write two lines about rain.", "Name a bird."]
    config = replace(PRESETS["tiny-random"].steer, method=f"lite:{method}")
    trained = extract(lm, Personas("You love noise.", "You hate noise.", contexts), config).vector
    lite.save(tmp_path / "vector.safetensors", trained)
    found = decode(lm, prompts, 8, Steering(lite.load(tmp_path / "vector.safetensors"), DOSES / 4))
    for prompt, dose, completion in zip(prompts, (DOSES / 4).tolist(), found, strict=True):
        with trained.inner(lm.model, C=dose):
            ids = list(prompt)
            for _ in completion.ids:
                with torch.no_grad():
                    ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == completion.ids
    with pytest.raises(UserError, match="no method 'men_diff'"):
        lite.check_method("lite:men_diff")
