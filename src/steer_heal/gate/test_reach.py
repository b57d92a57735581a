"""What a LoRA reaches, in families whose matrices have other names than llama's."""

from dataclasses import replace

import pytest
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from steer_heal.bake.reach import reach
from steer_heal.bake.student import Student
from steer_heal.config import AdapterConfig
from steer_heal.gate.conftest import tiny
from steer_heal.gate.families import WORK, config_of

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = {
    "llama-tied": USUAL,
    "phi3": ("o_proj", "qkv_proj", "gate_up_proj", "down_proj"),
    "glm4": (*USUAL[:4], "gate_up_proj", "down_proj"),
    "neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "mixtral": USUAL[:4],
}
EXPERTS = ("deepseek3", "gpt-oss", "mixtral", "qwen3-moe")  # the others have no experts
BAND = (1, 2)  # of four blocks


def adapted(student) -> dict[str, LoraLayer]:
    return {path: layer for path, layer in student.peft.named_modules() if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("name", WORK)
def test_every_matrix_of_the_band_is_trained_or_named(lm, name):
    """The share is counted anew on the model that PEFT made."""
    student = Student(replace(lm, model=AutoModelForCausalLM.from_config(config_of(name))))
    blocks = student.lm.blocks
    found = reach(blocks, BAND)
    matrices = sum(p.numel() for index in BAND for p in blocks[index].parameters() if p.ndim > 1)
    student.begin_round(AdapterConfig(r=2), 0)
    layers = adapted(student)
    assert all(".layers.1." in path or ".layers.2." in path for path in layers)
    assert found.share == pytest.approx(sum(layer.weight.numel() for layer in layers.values()) / matrices)
    assert (found.share > 0.99) == (name not in EXPERTS) and found.targets == NAMES.get(name, found.targets)
    if name in EXPERTS:
        assert {"experts.gate_up_proj", "experts.down_proj"} <= {*found.left_out}
        assert f"{found.share:.0%} of the weights there; {found.left_out[0]}" in found.described
    student.fold()
    student.begin_round(AdapterConfig(r=2), 1)
    assert adapted(student).keys() == layers.keys()


def test_the_share_of_a_mixture_by_hand(lm):
    """Attention has 2 x 64 x 64 + 2 x 64 x 32 weights; four experts 3 x 64 x 128 each; the router 4 x 64."""
    student = Student(replace(lm, model=AutoModelForCausalLM.from_config(config_of("mixtral"))))
    assert reach(student.lm.blocks, BAND).share == pytest.approx(12288 / (12288 + 4 * 24576 + 256))


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_packed_matrix_counts_as_what_it_stands_for(quant):
    found = reach(tiny(quant=quant).blocks, BAND)
    assert (found.targets, found.share, found.left_out) == (USUAL, 1.0, ())
