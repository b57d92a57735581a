"""What a LoRA reaches, in families whose matrices have other names than llama's."""

from dataclasses import replace

import pytest
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from steer_heal.bake.student import Student
from steer_heal.config import AdapterConfig
from steer_heal.gate.conftest import tiny

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# attention is 4 x 32 x 32; the experts are four times 3 x 32 x 64, and the router 4 x 32
FAMILIES = [
    ("llama", {}, USUAL, 1.0),
    ("phi3", {}, ("o_proj", "qkv_proj", "gate_up_proj", "down_proj"), 1.0),
    ("glm4", {"head_dim": 16}, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"), 1.0),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, USUAL[:4], 4096 / (4096 + 4 * 6144 + 128)),
]


def small(lm, model_type: str, more: dict) -> Student:
    """A student of a small random model; it needs no tokenizer here."""
    return Student(
        replace(lm, model=AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL, **more)))
    )


@pytest.mark.parametrize(("model_type", "more", "names", "share"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_every_matrix_of_the_band_is_trained_or_named(lm, model_type, more, names, share):
    student = small(lm, model_type, more)
    found = student.reach(AdapterConfig())
    assert found.targets == student.targets == names and found.share == pytest.approx(share)
    assert found.left_out == (("experts.gate_up_proj", "experts.down_proj") if share < 1 else ())
    assert f"{share:.0%} of the weights there" in found.described
    student.begin_round(AdapterConfig(r=2), 0)
    adapted = [path for path, layer in student.peft.named_modules() if isinstance(layer, LoraLayer)]
    assert len(adapted) == 2 * len(names) and all(".layers.1." in path or ".layers.2." in path for path in adapted)
    student.fold()
    student.begin_round(AdapterConfig(r=2), 1)
    assert len([path for path, layer in student.peft.named_modules() if isinstance(layer, LoraLayer)]) == len(adapted)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_packed_matrix_counts_as_what_it_stands_for(quant):
    found = Student(tiny(quant=quant)).reach(AdapterConfig())
    assert (found.targets, found.share, found.left_out) == (USUAL, 1.0, ())
