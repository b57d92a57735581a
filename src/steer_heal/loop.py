"""The loop: steer, distil, heal, bake, and again from the student.

The only module that knows the order of the stages. Each stage is a function from the model and earlier artefacts to
one artefact; `RunDir` computes it or, in a resumed run, loads it.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from loguru import logger
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from steer_heal import data, lite
from steer_heal.arms import Arm
from steer_heal.bake import Student
from steer_heal.card import model_card
from steer_heal.config import EvalConfig, RunConfig
from steer_heal.distil import (
    Exhausted,
    anchor_completions,
    distil,
    dose_curve,
    expected_survival,
    kept_rows,
    require_dose,
    require_training_set,
)
from steer_heal.eval import evaluate, instruments, neutral_rows
from steer_heal.generate import MOST_ROWS, rows_that_fit
from steer_heal.geometry import Base, geometry, read_base
from steer_heal.heal import Example, heal, prepare, prepare_anchors, with_tau
from steer_heal.lite import LiteVector
from steer_heal.lm import LM, AnyVector, Row, Steering, Vector
from steer_heal.plain import allowed_cost, coherence_cost, dose_at_trait, find_dose_at_cost, fitting, plain_doses
from steer_heal.rundir import RunDir
from steer_heal.steer import Extraction, extract, prompts_read
from steer_heal.summary import (
    arm_table,
    barrier_warning,
    demo_rows,
    headline,
    last_verdict,
    peak_memory,
    summarise,
    verdict_line,
)

FIXED_TEXTS = 12  # neutral texts on which the divergence from base is read, about a thousand tokens
FIXED_CONTEXTS = 32  # contexts over which the student's shift is averaged


def run(config: RunConfig, preset: str, folder: RunDir, trait: data.Trait, lm: LM) -> dict:
    """All rounds of a run; returns the summary that is also in summary.json."""
    began = time.perf_counter()
    student = Student(lm)
    logger.info(f"model {config.model.path}, trait {trait.name!r}, {config.rounds} rounds, folder {folder.path}")

    config = with_batch_size(folder, config, trait, lm)
    base = measure(folder, "base.json", student, Arm("base", history=0.0, now=0.0), trait, config, at_end=True)
    prompted_arm = Arm("prompted", history=0.0, now=0.0, system=trait.positive)
    prompted = measure(folder, "prompted.json", student, prompted_arm, trait, config, at_end=True)
    negative = negative_stage(folder, student, trait, config)
    folder.write_jsonl("demos.jsonl", demo_rows(base=base, prompted=prompted))
    anchors = anchor_stage(folder, student, config)
    of_base = base_stage(student, config)

    arms, rounds, plain = {"base": base, "prompted": prompted, "negative": negative}, [], []
    stopped = ""
    for round_ in range(config.rounds):
        where = f"r{round_:02d}"
        first = rounds[0]["vector"].layers if rounds else None  # a band chosen in round 0 is kept
        vector, layers = extract_stage(folder, where, student, trait, config, first)
        if not rounds:
            plain = plain_stage(folder, student, vector, trait, config)
        try:
            dose = dose_stage(folder, where, student, vector, trait, config, round_)
            completions = distil_stage(folder, where, student, vector, dose, trait, config, round_)
        except Exhausted as end:
            if not rounds:
                raise
            stopped = str(end)
            logger.warning(f"the loop ends after {round_} of {config.rounds} rounds: {end}")
            break
        steered_arm = Arm("steered", now=0.0, vector=vector, dose=dose["dose"])
        steered = measure(folder, f"{where}/steered.json", student, steered_arm, trait, config)
        before = rounds[-1]["heal"] if rounds else None
        records = heal_stage(folder, where, student, vector, completions, anchors, before, config, round_)
        teachers = [vector, rounds[0]["vector"] if rounds else vector]
        moved = geometry_stage(folder, where, student, *teachers, of_base, config)
        fold(folder, student, config.heal.fold_rank, round_)
        last = round_ == config.rounds - 1
        healed = measure(folder, f"{where}/healed.json", student, Arm("healed"), trait, config, at_end=last)
        earlier = [done["equal"] for done in rounds]
        equal, same_trait = equal_stages(
            folder, where, student, teachers[1], plain, base, healed, earlier, trait, config, last
        )
        folder.write_jsonl(f"{where}/demos.jsonl", demo_rows(base=base, steered=steered, healed=healed))

        rounds.append(
            {
                "vector": vector,
                "layers": layers,
                "dose": dose,
                "completions": completions,
                "heal": records,
                "steered": steered,
                "healed": healed,
                "equal": equal,
                "same_trait": same_trait,
                "geometry": moved,
            }
        )
        print(f"\nround {round_}\n{arm_table(base, prompted, steered, *filter(None, [equal, same_trait]), healed)}\n")
        barrier_warning(records, config.heal)
        said = last_verdict(arms, rounds)
        logger.info(f"{where} verdict: {verdict_line(said, config.rounds - 1 - round_)}")
        measures = {arm["arm"]: headline(arm) for arm in (base, prompted, steered, healed)}
        folder.event("round", round=round_, verdict=said["word"], dose=dose["dose"], **measures)

    folder.stage("adapter", lambda: student, lambda path, s: s.save(path, s.history), lambda path: None)
    summary = summarise(config, preset, trait, arms | {"plain": plain}, rounds, folder.stage_seconds())
    summary["stopped"] = stopped
    summary["peak_memory_bytes"] = peak_memory(lm.device)
    folder.replace_json("summary.json", summary)
    described = map(folder.read, ("config.json", "trait.json"))
    folder.replace_text("adapter/README.md", model_card(summary, *described, len(rounds)))
    folder.event("done", wall_seconds=time.perf_counter() - began)
    return summary


def with_batch_size(folder: RunDir, config: RunConfig, trait: data.Trait, lm: LM) -> RunConfig:
    """The config with `distil.batch_size` a number, the same one when the run is resumed."""
    if config.distil.batch_size != "auto":
        return config

    def compute() -> int:
        longest = max(len(lm.prompt(prompt)) for prompt in trait.generation_prompts)
        return rows_that_fit(lm, longest, config.distil.max_new_tokens)

    rows = folder.json("batch_size.json", compute)
    logger.info(f"up to {rows} rows are decoded together: what free memory holds, {MOST_ROWS[lm.device.type]} at most")
    return replace(config, distil=replace(config.distil, batch_size=rows))


def measure(
    folder: RunDir, name: str, student: Student, arm: Arm, trait: data.Trait, config: RunConfig, at_end: bool = False
) -> dict:
    """One arm; everything is read of base, of the prompted arm and of the last student, see `eval.ends_only`."""
    which = instruments(config.eval, at_end)
    return folder.json(
        name, lambda: read_arm(f"eval {name.removesuffix('.json')}", student, arm, trait, config.eval, which)
    )


def read_arm(
    label: str, student: Student, arm: Arm, trait: data.Trait, config: EvalConfig, which: tuple[str, ...]
) -> dict:
    with progress(label, len(which), "instrument") as done:
        return evaluate(student, arm, trait, config, which, done)


def negative_stage(folder: RunDir, student: Student, trait: data.Trait, config: RunConfig) -> dict:
    """The negative persona as system prompt, on what measures the trait: see `verdict.validity`."""
    arm = Arm("negative", history=0.0, now=0.0, system=trait.negative)
    which = ("contrast", "yes_no", "neutral") + ("profile",) * (config.eval.profile != "none")
    return folder.json("negative.json", lambda: read_arm("eval negative", student, arm, trait, config.eval, which))


def base_stage(student: Student, config: RunConfig) -> Callable[[tuple[int, ...]], Base]:
    """What geometry compares with, read of the base when it is first asked for."""
    return cache(lambda layers: read_base(student, *_where_read(student, config), layers, config.eval.batch_size))


def _where_read(student: Student, config: RunConfig) -> tuple[list[str], list[Row]]:
    contexts = list(data.contexts()[: min(FIXED_CONTEXTS, config.steer.n_contexts)])
    return contexts, neutral_rows(student.lm, min(FIXED_TEXTS, config.eval.neutral))


def geometry_stage(
    folder: RunDir,
    where: str,
    student: Student,
    vector: AnyVector,
    first: AnyVector,
    of_base: Callable[[tuple[int, ...]], Base],
    config: RunConfig,
) -> dict:
    def compute() -> dict:
        asked = _where_read(student, config)
        return geometry(student, *asked, vector, first, of_base(vector.layers), config.eval.batch_size)

    return folder.json(f"{where}/geometry.json", compute)


def plain_arm(name: str, first: AnyVector, dose: float) -> Arm:
    return Arm(name, history=0.0, now=0.0, vector=first, dose=dose)


def plain_stage(folder: RunDir, student: Student, first: AnyVector, trait: data.Trait, config: RunConfig) -> list[dict]:
    """The base steered by the first round's vector, dose by dose."""
    found, which = [], ("contrast", "yes_no", "neutral")
    for index, dose in enumerate(plain_doses(config.dose, config.eval.plain_doses)):
        arm = plain_arm("plain", first, dose)
        read = partial(read_arm, f"plain steering {dose:.2f}", student, arm, trait, config.eval, which)
        found.append(folder.json(f"plain/d{index}.json", read))
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

    def equal() -> dict:
        known = fitting([*plain, *earlier], base, allowed)
        if known and not last:
            return known | {"arm": "equal cost"}
        curve = [{"dose": arm["dose"], "cost": coherence_cost(arm, base)} for arm in plain]
        dose = known["dose"] if known else find_dose_at_cost(allowed, curve, cost_at)
        return read("equal cost", dose, at_end if last else ("contrast", "yes_no", "neutral"))

    def same_trait() -> dict:
        dose, reached = dose_at_trait(plain, base, healed)
        return read("equal trait", dose, at_end) | {"reached": reached}

    found = folder.json(f"{where}/equal.json", equal)
    return found, folder.json(f"{where}/same_trait.json", same_trait) if last else None


def anchor_stage(folder: RunDir, student: Student, config: RunConfig) -> Callable[[], list[Example]]:
    """Base completions of mundane prompts; what is returned gives the anchor examples, their states read once."""
    if config.heal.anchor == "none":
        return list

    def compute() -> list[dict]:
        with progress("anchor", config.heal.anchor_prompts, "row") as done:
            prompts = list(data.mundane()[: config.heal.anchor_prompts])
            return anchor_completions(student, prompts, config.distil, stage_key(config, -1, "anchor"), done)

    rows, _ = kept_rows(student, folder.jsonl("anchor.jsonl", compute))
    return cache(lambda: prepare_anchors(student, rows, config.eval.batch_size))


def extract_stage(
    folder: RunDir, where: str, student: Student, trait: data.Trait, config: RunConfig, layers: tuple[int, ...] | None
) -> Extraction:
    contexts = list(data.contexts()[: config.steer.n_contexts])

    def compute() -> Extraction:
        own = float(config.steer.source == "student")
        bar = progress(f"{where} extract", prompts_read(config.steer) * len(contexts), "prompt")
        with bar as done, student.view(history=own, now=0.0):
            return extract(student.lm, trait.positive, trait.negative, contexts, config.steer, layers, done)

    extraction = folder.stage(f"{where}/vector", compute, _write_vector, read_vector)
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

    def compute() -> list[dict]:
        seed = stage_seed(config, round_, "heal")
        student.begin_round(config.heal, seed)
        steering = Steering(vector, torch.tensor(doses))
        examples = prepare(student, rows, steering, config.heal, config.eval.batch_size)
        with progress(f"{where} heal", config.heal.epochs * len(rows), "row") as done:
            settled = with_tau(student.lm, examples, config.heal)
            return heal(student, examples, anchors(), settled, round_, seed, done, before)

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


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """One bar for a stage; call the result with the units just finished."""
    with tqdm(total=total, desc=f"{label:<20}", unit=unit, dynamic_ncols=True, mininterval=0.5) as bar:
        yield bar.update


def _write_vector(path: Path, extraction: Extraction) -> None:
    """A folder: the vector, and what was seen of each layer."""
    path.mkdir()
    vector, report = extraction
    (path / "layers.json").write_text(json.dumps(report, indent=1), "utf-8")
    if isinstance(vector, LiteVector):
        lite.save(path / "lite.safetensors", vector)
        return
    described = json.dumps({"layers": vector.layers, "operation": vector.operation})
    # One key: safetensors writes several in random order, and the file would be another one each time.
    save_file({"direction": vector.direction.contiguous()}, path / "vector.safetensors", {"vector": described})


def read_vector(path: Path) -> Extraction:
    """A round's vector and its layer report, from its folder."""
    report = json.loads((path / "layers.json").read_text("utf-8"))
    if (path / "lite.safetensors").exists():
        return Extraction(lite.load(path / "lite.safetensors"), report)
    with safe_open(path / "vector.safetensors", "pt") as stored:
        described = json.loads(stored.metadata()["vector"])
        vector = Vector(tuple(described["layers"]), stored.get_tensor("direction"), described["operation"])
        return Extraction(vector, report)
