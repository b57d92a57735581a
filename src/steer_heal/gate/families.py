"""Small random models of the families that people steer, see families.json."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steer_heal.model.random_weights import build_random

WALK = json.loads((Path(__file__).parent / "families.json").read_text())
STATE = "a state-space, hybrid or chunked model"
REFUSED = {  # and the reason, a part of the line that the user sees
    "falcon-h1": STATE,
    "gpt2": "steers the blocks of a decoder",
    "granite4": STATE,
    "lfm2": STATE,
    "qwen35": STATE,
}
WORK = sorted(WALK["families"].keys() - REFUSED.keys())


def config_of(name):
    settings = WALK["common"] | WALK["families"][name]
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def save(name, folder):
    """A random model of the family with the tiny tokenizer. Biases and norms are random too: most begin at 0 or 1."""
    build_random("tiny", folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
