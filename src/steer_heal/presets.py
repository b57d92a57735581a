"""Preset configs for the models that steer-heal was made for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from steer_heal.config import (
    JUDGES,
    AdapterConfig,
    AnchorConfig,
    BarrierConfig,
    DistilConfig,
    DoseConfig,
    EvalConfig,
    HealConfig,
    ModelConfig,
    RunConfig,
    SteerConfig,
    TargetConfig,
    TrainingConfig,
)

GEMMA_1B = RunConfig(model=ModelConfig(device="cuda"))
# The settings that kept SmolLM2-135M coherent (docs/results.md). The thresholds, in nats, are specific to a model.
BUDGET = BarrierConfig(kind="dual", reference="base", lam=1.0)  # lam applies only to kind fixed
ANCHORED = HealConfig(
    target=TargetConfig(kind="mirrored"),
    barrier=BUDGET,
    anchor=AnchorConfig(prompts=96, tau=0.16),
    training=TrainingConfig(lr_round_pow=-1.0),
)

PRESETS: dict[str, RunConfig] = {
    "gemma-3-1b": GEMMA_1B,
    # never run: its thresholds are guesses
    "gemma-3-1b-anchored": replace(GEMMA_1B, heal=replace(ANCHORED, barrier=replace(BUDGET, tau=1.0))),
    "gemma-3-4b": replace(GEMMA_1B, model=replace(GEMMA_1B.model, path="google/gemma-3-4b-it")),
    "smollm2-135m": RunConfig(
        model=ModelConfig(path="smollm2-135m", quant="none", device="cpu"),
        trait="love",
        rounds=3,
        steer=SteerConfig(n_contexts=32, band=(0.3, 0.7)),
        # Small doses keep the text coherent. heal.target.gain sets how far the trait moves.
        dose=DoseConfig(range=(0.2, 0.45), steps=4, prompts=10),
        distil=DistilConfig(n_keep=48, max_new_tokens=32),
        heal=replace(
            ANCHORED,
            barrier=replace(BUDGET, tau=0.6),  # between 0.6 and 0.8 this model's answers begin to fall apart
            training=replace(ANCHORED.training, lr=4e-4, pass_rows=9, val_share=0.0),
            lora=AdapterConfig(r=16),
        ),
        eval=EvalConfig(
            size="demo", ends_only=("off_target", "canary", "profile", "frames", "relevance"), plain_range=(0.1, 1.35)
        ),
    ),
    # A random model writes rubbish at any dose, so filter and judge have limits that random text passes.
    "tiny-random": RunConfig(
        model=ModelConfig(path="random:tiny", quant="none", dtype="float32", device="cpu"),
        trait="love",
        rounds=2,
        steer=SteerConfig(n_contexts=32, band=(0.3, 0.7)),
        dose=DoseConfig(steps=4, prompts=4),
        distil=DistilConfig(n_keep=24, max_new_tokens=12),
        filter=JUDGES["random"],
        heal=HealConfig(
            barrier=BarrierConfig(tau=0.001, lam=1.0),
            training=TrainingConfig(lr=2e-2, batch=8, pass_rows=4),
            lora=AdapterConfig(r=4),
        ),
        eval=EvalConfig(size="tiny"),
    ),
}
DEFAULT_PRESET = "gemma-3-1b"


@dataclass(frozen=True)
class Recipe:
    """A preset whose settings a model without a preset of its own is run with."""

    preset: str
    tuned_on: str


RECIPES = {
    "cpu": Recipe("smollm2-135m", "tuned on SmolLM2-135M"),
    "cuda": Recipe("gemma-3-1b-anchored", "guessed for gemma-3-1b"),
}
MODELS_TOO = "a model: a hub id (owner/name), a folder or a .gguf file"


def is_model(name: str) -> bool:
    """Whether the word after `run` names a model and not a preset."""
    return name not in PRESETS and (
        "/" in name or name.lower().endswith(".gguf") or os.path.isdir(Path(name).expanduser())
    )
