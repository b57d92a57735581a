"""Adapters of others: which of them are measured as plain PEFT computes them. The others are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from steer_heal.bake.student import NOW, Student
from steer_heal.config import UserError
from steer_heal.model.agreement import agreed

# By the key of a LoRA's config, what it does beyond adding a product to some layers.
BEYOND_LORA = {
    "modules_to_save": "replaces whole modules",
    "trainable_token_indices": "retrains single tokens",
    "layer_replication": "repeats blocks",
    "alora_invocation_tokens": "begins at certain tokens",
}
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights; the others change the base
MEASURED = "steer-heal measures LoRA (also rsLoRA, DoRA, ranks and biases of its own in a layer) inside the blocks"


def config_of(folder: Path) -> dict:
    """The adapter's config. Raises UserError for one that cannot be read, or of a kind that is not measured."""
    described = folder / "adapter_config.json"
    try:
        config = json.loads(described.read_text("utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(described)!r} is no config of an adapter ({error!r}): save it anew with peft") from error
    if kind != "LORA":
        raise _refused(folder, f"is {kind} and no LoRA")
    if config.get("bias", "none") != "none":
        raise _refused(folder, f"changes biases of the model (bias {config['bias']!r})")
    if (begun := config.get("init_lora_weights", True)) not in KEEPS_BASE:
        raise _refused(folder, f"changes the base when it is loaded (init_lora_weights {begun!r})")
    for key, does in BEYOND_LORA.items():
        if config.get(key):
            raise _refused(folder, f"{does} ({key})")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{str(folder)!r} has no adapter_model.safetensors: pickles are not loaded, convert it")
    return config


def load_adapter(student: Student, folder: Path) -> None:
    """Load an adapter as the student's current round, not folded: a history holds no more than LoRA's factors.

    Raises UserError when it does not fit the model, or when we would not compute what PEFT computes.
    """
    lm = student.lm
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # PEFT would leave these layers as they are
            student.load_round(folder)
    except (RuntimeError, ValueError, KeyError, SafetensorError, UserWarning) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"adapter {str(folder)!r} does not fit {lm.name!r}: name its base with --base ({said})"
        ) from error
    inside = {id(module) for block in lm.blocks for module in block.modules()}
    for path, module in student.peft.named_modules():
        if isinstance(module, LoraLayer) and id(module) not in inside:
            raise _refused(folder, f"changes {path.rpartition('.')[2]}, outside the blocks")
    agreed(lm)


def scalable(student: Student) -> bool:
    """Whether the adapter can be scaled. With DoRA, half the scale is not half the way from the base."""
    return not student.peft.peft_config[NOW].use_dora


def _refused(folder: Path, why: str) -> UserError:
    return UserError(f"adapter {str(folder)!r} {why}: {MEASURED}; merge it into its base and measure that")
