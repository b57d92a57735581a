"""The stages of a round and of the run around it: each computes its artefact, or loads what the run's folder has.

A stage is a function from the model, its slice of the config and earlier artefacts to one artefact. None of them knows
what comes before or after it: `loop` does.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from loguru import logger

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.config import RunConfig
from steer_heal.distil.dose import dose_curve, expected_survival, require_dose
from steer_heal.distil.sample import anchor_completions, distil, kept_rows, require_training_set
from steer_heal.eval.arms import Arm
from steer_heal.eval.geometry import Base, geometry, read_base
from steer_heal.eval.instruments import instruments, neutral_rows, read_arm
from steer_heal.eval.opponents import (
    allowed_cost,
    coherence_cost,
    dose_at_trait,
    find_dose_at_cost,
    fitting,
    plain_doses,
)
from steer_heal.heal.examples import Example, prepare, prepare_anchors, with_tau
from steer_heal.heal.train import heal, trained_on
from steer_heal.model.decode import MOST_ROWS, rows_that_fit
from steer_heal.model.lm import LM, Row
from steer_heal.model.memory import give_back_freed_memory
from steer_heal.model.steering import AnyVector, Steering
from steer_heal.runs.folder import RunDir
from steer_heal.steer.extract import Extraction, extract, prompts_read, read_vector, write_vector
from steer_heal.terminal import progress

T = TypeVar("T")
FIXED_TEXTS = 12  # neutral texts on which the divergence from base is read, about a thousand tokens
FIXED_CONTEXTS = 32  # contexts over which the student's shift is averaged

READING, TRAINING = "reading what it is trained on", "training"  # parts of the stage "adapter"


def freeing(compute: Callable[[], T]) -> Callable[[], T]:
    """The computation of an artefact, after which the memory that it freed goes back to the system."""

    def computed() -> T:
        value = compute()
        give_back_freed_memory()
        return value

    return computed


def with_decode_rows(folder: RunDir, config: RunConfig, trait: data.Trait, lm: LM) -> LM:
    """The model with the number of rows that it decodes together, the same one when the run is resumed."""
    if config.model.decode_rows != "auto":
        return replace(lm, decode_rows=config.model.decode_rows)

    @freeing
    def compute() -> int:
        longest = max(len(lm.prompt(prompt)) for prompt in trait.generation_prompts)
        return rows_that_fit(lm, longest, config.distil.max_new_tokens)

    rows = folder.json("decode_rows.json", compute)
    logger.info(f"up to {rows} rows are decoded together: what free memory holds, {MOST_ROWS[lm.device.type]} at most")
    return replace(lm, decode_rows=rows)


def measure(
    folder: RunDir, name: str, student: Student, arm: Arm, trait: data.Trait, config: RunConfig, at_end: bool = False
) -> dict:
    """One arm; everything is read of base, of the prompted arm and of the last student, see `eval.ends_only`."""
    which = instruments(config.eval, at_end)
    return folder.json(
        name,
        freeing(lambda: read_arm(f"eval {name.removesuffix('.json')}", student, arm, trait, config.eval, which)),
    )


def negative_stage(folder: RunDir, student: Student, trait: data.Trait, config: RunConfig) -> dict:
    """The negative persona as system prompt, on what measures the trait: see `verdict.validity`."""
    arm = Arm("negative", history=0.0, now=0.0, system=trait.negative)
    which = ("contrast", "yes_no", "neutral") + ("profile",) * ("profile" not in config.eval.leave_out)
    return folder.json(
        "negative.json", freeing(lambda: read_arm("eval negative", student, arm, trait, config.eval, which))
    )


def base_stage(student: Student, config: RunConfig) -> Callable[[tuple[int, ...]], Base]:
    """What geometry compares with, read of the base when it is first asked for."""
    return cache(lambda layers: read_base(student, *_where_read(student, config), layers, student.lm.read_rows))


def _where_read(student: Student, config: RunConfig) -> tuple[list[str], list[Row]]:
    contexts = list(data.contexts()[: min(FIXED_CONTEXTS, config.steer.n_contexts)])
    return contexts, neutral_rows(student.lm, min(FIXED_TEXTS, config.eval.counts.neutral))


def geometry_stage(
    folder: RunDir,
    where: str,
    student: Student,
    vector: AnyVector,
    first: AnyVector,
    of_base: Callable[[tuple[int, ...]], Base],
    config: RunConfig,
) -> dict:
    @freeing
    def compute() -> dict:
        asked = _where_read(student, config)
        return geometry(student, *asked, vector, first, of_base(vector.layers), student.lm.read_rows)

    return folder.json(f"{where}/geometry.json", compute)


def plain_arm(name: str, first: AnyVector, dose: float) -> Arm:
    return Arm(name, history=0.0, now=0.0, vector=first, dose=dose)


def plain_stage(folder: RunDir, student: Student, first: AnyVector, trait: data.Trait, config: RunConfig) -> list[dict]:
    """The base steered by the first round's vector, dose by dose."""
    found, which = [], ("contrast", "yes_no", "neutral")
    for index, dose in enumerate(plain_doses(config.eval)):
        arm = plain_arm("plain", first, dose)
        read = partial(read_arm, f"plain steering {dose:.2f}", student, arm, trait, config.eval, which)
        found.append(folder.json(f"plain/d{index}.json", freeing(read)))
    return found


def equal_stages(
    folder: RunDir,
    where: str,
    student: Student,
    first: AnyVector,
    plain: list[dict],
    base: dict,
    healed: dict,
    earlier: list[dict | None],
    trait: data.Trait,
    config: RunConfig,
    last: bool,
) -> tuple[dict | None, dict | None]:
    """The base plainly steered: at the dose that costs as much coherence as the rounds so far and, in the last round,
    at the dose that moves the trait as far."""
    if not plain:
        return None, None
    allowed = allowed_cost(healed, base)
    at_end = tuple(name for name in instruments(config.eval, at_end=True) if name != "profile")

    def read(name: str, dose: float, which: tuple[str, ...]) -> dict:
        return read_arm(f"plain steering {dose:.2f}", student, plain_arm(name, first, dose), trait, config.eval, which)

    def cost_at(dose: float) -> float:
        return coherence_cost(read("equal cost", dose, ("yes_no", "neutral")), base)

    @freeing
    def equal() -> dict:
        known = fitting([*plain, *earlier], base, allowed)
        if known and not last:
            return known | {"arm": "equal cost"}
        curve = [{"dose": arm["dose"], "cost": coherence_cost(arm, base)} for arm in plain]
        dose = known["dose"] if known else find_dose_at_cost(allowed, curve, cost_at)
        return read("equal cost", dose, at_end if last else ("contrast", "yes_no", "neutral"))

    @freeing
    def same_trait() -> dict:
        dose, reached = dose_at_trait(plain, base, healed)
        return read("equal trait", dose, at_end) | {"reached": reached}

    found = folder.json(f"{where}/equal.json", equal)
    return found, folder.json(f"{where}/same_trait.json", same_trait) if last else None


def anchor_stage(folder: RunDir, student: Student, config: RunConfig) -> Callable[[], list[Example]]:
    """Base completions of mundane prompts; what is returned gives the anchor examples, their states read once."""
    if config.heal.anchor.prompts == 0:
        return list

    @freeing
    def compute() -> list[dict]:
        with progress("anchor", config.heal.anchor.prompts, "row") as done:
            prompts = list(data.mundane()[: config.heal.anchor.prompts])
            return anchor_completions(student, prompts, config.distil, stage_key(config, -1, "anchor"), done)

    rows, _ = kept_rows(student, folder.jsonl("anchor.jsonl", compute))
    return cache(lambda: prepare_anchors(student, rows))


def extract_stage(
    folder: RunDir, where: str, student: Student, trait: data.Trait, config: RunConfig, layers: tuple[int, ...] | None
) -> Extraction:
    contexts = list(data.contexts()[: config.steer.n_contexts])

    @freeing
    def compute() -> Extraction:
        own = float(config.steer.source == "student")
        bar = progress(f"{where} extract", prompts_read(config.steer) * len(contexts), "prompt")
        with bar as done, student.view(history=own, now=0.0):
            return extract(student.lm, trait.positive, trait.negative, contexts, config.steer, layers, done)

    extraction = folder.stage(f"{where}/vector", compute, write_vector, read_vector)
    steered = [r for r in extraction.report if r["steered"]]
    norm, split_half, auc = (
        sum(r[key] for r in steered) / len(steered) for key in ("relative_norm", "split_half", "auc")
    )
    chosen = "chosen from" if len(extraction.report) > len(steered) else "of"
    logger.info(
        f"{where} vector on blocks {steered[0]['layer']} to {steered[-1]['layer']} {chosen} {len(student.lm.blocks)}: "
        f"norm {norm:.1%} of the residual stream, halves agree {split_half:.2f}, tells personas apart (AUC) {auc:.2f}"
    )
    return extraction


def dose_stage(
    folder: RunDir,
    where: str,
    student: Student,
    vector: AnyVector,
    trait: data.Trait,
    config: RunConfig,
    round_: int,
) -> dict:
    @freeing
    def compute() -> dict:
        with progress(f"{where} dose curve", (config.dose.steps + 1) * config.dose.prompts, "row") as done:
            prompts, key = shuffled_prompts(trait, config, round_, "dose"), stage_key(config, round_, "dose")
            return dose_curve(student, vector, prompts, config.dose, config.distil, config.filter, key, done)

    dose = folder.json(f"{where}/dose.json", compute)
    shares = "  ".join(f"{point['dose']:.2f}:{point['survival']:.0%}" for point in dose["curve"])
    chosen = require_dose(dose)
    if dose["rule"] == "iso_kl":
        logger.info(f"{where} dose {chosen:.2f}: 95th percentile KL {dose['kl']:.3g} nats  (survival {shares})")
    else:
        logger.info(f"{where} dose {chosen:.2f}, the largest that {dose['target']:.0%} survive  ({shares})")
    return dose


def distil_stage(
    folder: RunDir,
    where: str,
    student: Student,
    vector: AnyVector,
    dose: dict,
    trait: data.Trait,
    config: RunConfig,
    round_: int,
) -> list[dict]:
    @freeing
    def compute() -> list[dict]:
        with progress(f"{where} distil", config.distil.n_keep, "row") as done:
            prompts, key = shuffled_prompts(trait, config, round_, "distil"), stage_key(config, round_, "distil")
            survival = expected_survival(dose)
            return distil(student, vector, dose["dose"], prompts, config.distil, config.filter, key, survival, done)

    completions = folder.jsonl(f"{where}/completions.jsonl", compute)
    kept = sum(not c["dropped"] for c in completions)
    logger.info(f"{where} distil kept {kept} of {len(completions)} completions")
    require_training_set(completions, dose, config.distil)
    return completions


def heal_stage(
    folder: RunDir,
    where: str,
    student: Student,
    vector: AnyVector,
    completions: list[dict],
    anchors: Callable[[], list[Example]],
    before: list[dict] | None,
    config: RunConfig,
    round_: int,
) -> list[dict]:
    """Train the round's adapter, or load it; either way it is the student's current one afterwards."""
    rows, doses = kept_rows(student, completions)
    log = f"{where}/heal.jsonl"

    @freeing
    def compute() -> list[dict]:
        seed = stage_seed(config, round_, "heal")
        student.begin_round(config.heal.lora, seed)
        steering = Steering(vector, torch.tensor(doses))
        folder.part = READING
        examples = prepare(student, rows, steering, config.heal)
        trained = config.heal.training.epochs * trained_on(len(rows), config.heal.training)
        with progress(f"{where} heal", trained, "row") as done:
            settled = with_tau(student.lm, examples, config.heal, before)
            held = anchors()
            folder.part = TRAINING
            return heal(student, examples, held, settled, round_, seed, done, before)

    def write(path: Path, records: list[dict]) -> None:
        folder.write_jsonl(log, records)  # before the adapter, whose existence says that all is done
        student.save(path)

    def read(path: Path) -> list[dict]:
        student.load_round(path)
        return folder.read(log)

    return folder.stage(f"{where}/adapter", compute, write, read, also=(log,))


def fold(folder: RunDir, student: Student, rank: int, round_: int) -> None:
    """The round joins the history; what compression to a rank loses is said and noted."""
    lost = student.fold(rank)
    if rank:
        logger.info(f"r{round_:02d} history at rank {rank}: relative error {lost:.2%}")
        folder.event("fold", round=round_, rank=rank, relative_error=lost)


def stage_key(config: RunConfig, round_: int, stage: str) -> tuple:
    """Name of a stage's stream of random numbers."""
    return (config.seed, round_, stage)


def stage_seed(config: RunConfig, round_: int, stage: str) -> int:
    digest = hashlib.blake2b(repr(stage_key(config, round_, stage)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def shuffled_prompts(trait: data.Trait, config: RunConfig, round_: int, stage: str) -> list[str]:
    """The generation prompts in another order in every round: a round that asks fewer asks others each time."""
    prompts = list(trait.generation_prompts)
    random.Random(stage_seed(config, round_, stage)).shuffle(prompts)
    return prompts
