"""Train a preference rival: DPO on answers that the base itself writes under a trait's two personas.

    .venv/bin/pip install -c constraints.txt -e '.[dpo]'
    .venv/bin/python docs/tools/dpo.py smollm2-135m love outputs/dpo
    .venv/bin/steer-heal eval outputs/dpo --trait love

The base answers the trait's generation prompts under the positive persona (preferred) and under the negative one. Pairs
of which the preset's filter would drop an answer are left out. The trainer is trl's (direct preference optimisation,
Rafailov et al., arXiv:2305.18290). Adapter, batch and number of trained answers are those of a run of the preset. What
is written is a PEFT adapter, which `eval` reads as it reads any other. The trait's probes are not seen.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import tyro
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from steer_heal import data
from steer_heal.bake.student import NOW, Student
from steer_heal.coherence import judge, persona_narration
from steer_heal.config import FilterConfig, RunConfig, UserError
from steer_heal.data import Trait
from steer_heal.model.decode import Sampling, decode
from steer_heal.model.lm import LM, Row
from steer_heal.model.loading import load
from steer_heal.presets import PRESETS

EPOCHS = 4  # of a preset whose epochs are auto
LEAST_PAIRS = 8


class OnTokens(DPOTrainer):
    """trl's trainer on token ids, joined as everywhere here; it would tokenise the text anew."""

    def _prepare_dataset(self, dataset: Dataset, *_) -> Dataset:
        return dataset


def main(preset: str, trait: str, to: Path, /, lr: float = 1e-4, beta: float = 0.1, seed: int = 0) -> None:
    """Train the rival and write its adapter.

    Args:
        preset: preset of `steer-heal run` whose model, adapter, filter and budget are taken
        trait: built-in trait or path to a .toml file
        to: folder for the adapter
        lr: peak learning rate; it falls linearly
        beta: weight of the divergence from base in the preference loss
        seed: of the answers and of the training
    """
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is not known: choose {', '.join(PRESETS)}")
    if to.exists():
        raise UserError(f"{str(to)!r} is there already: give a new folder")
    config, of = PRESETS[preset], data.load_trait(trait)
    lm = replace(load(config.model), decode_rows=32)
    pairs = preferences(lm, of, config.filter, of.answer_limit(config.distil.max_new_tokens), seed)
    print(f"{len(pairs)} of {len(of.generation_prompts)} pairs of answers are sound")
    if len(pairs) < LEAST_PAIRS:
        raise UserError(f"{len(pairs)} pairs are too few, {LEAST_PAIRS} are needed: give more generation_prompts")
    train(lm, pairs, config, lr=lr, beta=beta, seed=seed).save(to)
    print(f"written: {to}. Read it: steer-heal eval {to} --trait {trait}")


def preferences(lm: LM, trait: Trait, limits: FilterConfig, longest: int, seed: int) -> list[dict[str, list[int]]]:
    """Token ids of prompts without a persona, each with an answer under the positive persona and under the negative."""
    asked, narration = trait.generation_prompts, persona_narration(trait.positive, trait.negative, trait.title)
    prompts, sides = [lm.prompt(text) for text in asked], []
    for persona in (trait.positive, trait.negative):
        under = [lm.prompt(text, persona) for text in asked]
        answers = decode(lm, under, longest, None, Sampling(("dpo", seed, persona)))
        rows = [Row(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
        sides.append(list(zip(rows, judge(lm, rows, limits, narration), strict=True)))
    return [
        {"prompt_ids": high.prompt, "chosen_ids": high.completion, "rejected_ids": low.completion}
        for (high, sound), (low, also) in zip(*sides, strict=True)
        if not sound.dropped and not also.dropped and high.completion != low.completion
    ]


def train(lm: LM, pairs: list[dict], config: RunConfig, *, lr: float, beta: float, seed: int) -> Student:
    """Train an adapter like a round's on as many answers as a run of this config trains on."""
    knobs, student = config.heal.training, Student(lm)
    epochs = EPOCHS if knobs.epochs == "auto" else knobs.epochs
    answers = config.rounds * epochs * config.distil.n_keep
    with tempfile.TemporaryDirectory() as scratch:
        how = DPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=max(1, knobs.batch // 2),  # pairs
            max_steps=-(-answers // knobs.batch),
            learning_rate=lr,
            beta=beta,
            max_length=None,
            gradient_checkpointing=knobs.checkpointing,
            bf16=False,
            use_cpu=lm.device.type == "cpu",
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_steps=8,
        )
        student.begin_round(config.heal.lora, seed)
        adapter, base = student.peft.peft_config[NOW], student.peft.unload()
        trainer = OnTokens(
            base,
            args=how,
            train_dataset=Dataset.from_list(pairs),
            processing_class=lm.tokenizer,
            peft_config=adapter,
        )
        trainer.train()
        trainer.model.save_pretrained(f"{scratch}/adapter", save_embedding_layers=False)
        made = Student(load(config.model))
        made.load_round(Path(scratch) / "adapter")
        return made


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(f"dpo: {error}")
