"""Adapters that others made: measured as plain PEFT computes them, or refused in a line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steer_heal.commands.target import opened
from steer_heal.config import UserError
from steer_heal.model.likelihood import row_nll
from steer_heal.model.lm import Row
from steer_heal.model.loading import load
from steer_heal.model.random_weights import build_random
from steer_heal.presets import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

MODEL = replace(PRESETS["tiny-random"].model, path="")
ROWS = [Row([7, 300, 41], [900, 12, 5]), Row([7, 300, 41, 8, 9, 10, 11], [44, 2])]
SOME = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_random("tiny", folder)
    return folder


def written(base: Path, folder: Path, config) -> Path:
    """An adapter with random weights, written by plain PEFT."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def plain_nll(model, row: Row) -> torch.Tensor:
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([row.prompt + row.completion])).logits[0].log_softmax(-1)
    return -log_p[len(row.prompt) - 1 : -1].gather(1, torch.tensor(row.completion)[:, None])[:, 0]


MEASURED = {
    "plain": LoraConfig(r=4, **SOME),
    "a few layers": LoraConfig(r=4, layers_to_transform=[0, 3], layers_pattern="layers", **SOME),
    "rsLoRA": LoraConfig(r=4, use_rslora=True, **SOME),
    "patterns": LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}, **SOME),
    "biases of its own": LoraConfig(r=4, lora_bias=True, **SOME),
    "DoRA": LoraConfig(r=4, use_dora=True, **SOME),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_an_adapter_is_measured_as_plain_peft_computes_it(base, tmp_path, kind):
    adapter = written(base, tmp_path / "adapter", MEASURED[kind])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    found = opened(str(adapter), None, None, replace(MODEL, path=str(base)))
    lm, arm = found.student.lm, found.arm
    with found.student.view(history=arm.history, now=arm.now):
        with_adapter = row_nll(lm, ROWS)
    with found.student.view(history=0.0, now=0.0):
        without = row_nll(lm, ROWS)
    with plain.disable_adapter():
        of_base = [plain_nll(plain, row) for row in ROWS]
    for ours, base_nll, expected, row in zip(with_adapter, without, of_base, ROWS, strict=True):
        torch.testing.assert_close(ours, plain_nll(plain, row), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(base_nll, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, base_nll, atol=1e-2)


REFUSED = {
    "biases": (LoraConfig(r=4, bias="all", **SOME), "changes biases of the model (bias 'all')"),
    "whole modules": (LoraConfig(r=4, modules_to_save=["lm_head"], **SOME), "replaces whole modules (modules_to_save)"),
    "tokens": (LoraConfig(r=4, trainable_token_indices=[3], **SOME), "retrains single tokens"),
    "the head": (LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"), "changes lm_head"),
    "embeddings": (
        LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
        "changes embed_tokens",
    ),
    "a base that it changes": (
        LoraConfig(r=4, init_lora_weights="pissa", **SOME),
        "changes the base when it is loaded",
    ),
    "IA3": (IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "is IA3 and no LoRA"),
    "LoHa": (LoHaConfig(**SOME), "is LOHA and no LoRA"),
    "LoKr": (LoKrConfig(**SOME), "is LOKR and no LoRA"),
    "prompt": (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "is PROMPT_TUNING and no LoRA"),
    "prefix": (PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "is PREFIX_TUNING and no LoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_measured_is_refused_in_a_line(base, tmp_path, kind):
    config, said = REFUSED[kind]
    adapter = written(base, tmp_path / "adapter", config)
    with pytest.raises(UserError) as error:
        opened(str(adapter), None, None, replace(MODEL, path=str(base)))
    assert said in str(error.value) and "merge it into its base" in str(error.value)


def test_an_adapter_without_a_base_or_with_a_gate_that_it_has_not(base, tmp_path):
    adapter = written(base, tmp_path / "adapter", MEASURED["DoRA"])
    with pytest.raises(UserError, match="DoRA adapter is on"):
        opened(str(adapter), None, None, replace(MODEL, path=str(base)), gate=0.5)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not say on which model it was made: name it with --base"):
        opened(str(adapter), None, None, MODEL)
    file.write_text("[]")
    with pytest.raises(UserError, match="is no config of an adapter"):
        opened(str(adapter), None, None, MODEL)


def test_an_adapter_that_lacks_layers_does_not_fit(base, tmp_path):
    adapter = written(base, tmp_path / "adapter", MEASURED["plain"])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="name its base with --base"):
        opened(str(adapter), None, None, replace(MODEL, path=str(base)))


def test_the_base_is_the_base_also_where_an_adapter_was_left_beside_it(base, tmp_path):
    build_random("tiny", tmp_path)
    written(base, tmp_path, MEASURED["plain"])
    with pytest.raises(UserError, match="has an adapter beside it"):
        load(replace(MODEL, path=str(tmp_path)))
