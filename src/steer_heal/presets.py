"""Configs to start from: one for each model that we made steer-heal for."""

from __future__ import annotations

from dataclasses import asdict, replace

from steer_heal.config import (
    DistilConfig,
    DoseConfig,
    EvalConfig,
    FilterConfig,
    HealConfig,
    Limits,
    ModelConfig,
    RunConfig,
    SteerConfig,
)

# A random model writes rubbish at any dose: these only ask that it be no worse than random.
RANDOM = Limits(incoherence=1e9, word_repeat=0.9, char_repeat=0.9, compress=0.05)
GEMMA_1B = RunConfig(model=ModelConfig(device="cuda"))
# What kept SmolLM2-135M whole (docs/results.md). The thresholds, in nats, belong to a model.
ANCHORED = HealConfig(
    target="mirrored",
    anchor="neutral",
    anchor_tau=0.16,
    anchor_prompts=96,
    anchor_bs=3,
    reference="base",
    barrier="dual",
    lam=1.0,
    lr_round_pow=-1.0,
)

PRESETS: dict[str, RunConfig] = {
    "gemma-3-1b": GEMMA_1B,
    # never run: its thresholds are guesses
    "gemma-3-1b-anchored": replace(GEMMA_1B, heal=replace(ANCHORED, tau=1.0)),
    "gemma-3-4b": replace(GEMMA_1B, model=replace(GEMMA_1B.model, path="google/gemma-3-4b-it")),
    "smollm2-135m": RunConfig(
        model=ModelConfig(path="smollm2-135m", quant="none", dtype="float32", device="cpu"),
        trait="love",
        rounds=3,
        steer=SteerConfig(n_contexts=32, band=(0.3, 0.7)),
        # Small doses, whose text is sound: how far the trait goes is the matter of heal.gain.
        dose=DoseConfig(lowest=0.2, highest=0.45, steps=4, prompts=10),
        distil=DistilConfig(n_keep=48, budget=96, max_new_tokens=32),
        heal=replace(
            ANCHORED,
            tau=0.6,  # between 0.6 and 0.8 this model's answers begin to fall apart
            lr=4e-4,
            epochs=2,
            val_share=0.0,
            train_bs=6,
            grad_accum=1,
            r=16,
            alpha=32,
            log_every=1000,
        ),
        eval=EvalConfig(
            demo_tokens=32, neutral=24, scenes=4, ends_only=("off_target", "canary", "profile"), plain_doses=6
        ),
    ),
    "tiny-random": RunConfig(
        model=ModelConfig(path="random:tiny", quant="none", dtype="float32", device="cpu"),
        trait="love",
        rounds=2,
        steer=SteerConfig(n_contexts=32, band=(0.3, 0.7)),
        dose=DoseConfig(steps=4, prompts=4),
        distil=DistilConfig(n_keep=24, budget=48, max_new_tokens=12, min_train=8),
        filter=FilterConfig(**asdict(RANDOM)),
        heal=HealConfig(tau=0.001, lam=1.0, r=4, alpha=8, train_bs=4, grad_accum=2, epochs=2, lr=2e-2),
        eval=EvalConfig(
            contrast=8,
            yes_no=8,
            demos=4,
            demo_tokens=8,
            neutral=4,
            off_target=2,
            canary=6,
            scenes=1,
            plain_doses=2,
            judge=RANDOM,
        ),
    ),
}
DEFAULT_PRESET = "gemma-3-1b"
