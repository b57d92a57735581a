"""The stages of a run and of its rounds: each computes its artefact, or loads what the run's folder has.

A stage hands what it needs to the function that does the work (`extract`, `dose_curve`, `distil`, `heal`, ...) and
returns one artefact. No stage knows what comes before or after it: `loop` does.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from loguru import logger

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.coherence import persona_narration
from steer_heal.config import RunConfig
from steer_heal.distil.dose import dose_curve, expected_survival, require_dose
from steer_heal.distil.sample import Teacher, anchor_completions, distil, kept_rows, require_training_set
from steer_heal.eval.arms import Arm
from steer_heal.eval.geometry import Base, Fixed, geometry, read_base
from steer_heal.eval.instruments import instruments, joined, neutral_rows, read_arm
from steer_heal.eval.opponents import (
    allowed_cost,
    coherence_cost,
    dose_at_trait,
    find_dose_at_cost,
    fitting,
    plain_doses,
)
from steer_heal.eval.summary import demo_rows, peak_memory, summarise
from steer_heal.heal.examples import Example, prepare, prepare_anchors, with_tau
from steer_heal.heal.train import heal, trained_on
from steer_heal.model.decode import MOST_ROWS, rows_that_fit
from steer_heal.model.lm import LM
from steer_heal.model.memory import give_back_freed_memory
from steer_heal.model.steering import AnyVector, Steering
from steer_heal.runs.folder import RunDir
from steer_heal.runs.rounds import InRound, Round, folder_of
from steer_heal.steer.extract import Extraction, extract, prompts_read, read_vector, write_vector
from steer_heal.steer.personas import Personas
from steer_heal.terminal import progress

T = TypeVar("T")
FIXED_TEXTS = 12  # neutral texts on which the divergence from base is read, about a thousand tokens
FIXED_CONTEXTS = 32  # contexts over which the student's shift is averaged
PLAIN = ("contrast", "yes_no", "neutral")  # what is read of the base plainly steered, dose by dose

READING, TRAINING = "reading what it is trained on", "training"  # parts of the stage "adapter"


def freeing(compute: Callable[[], T]) -> Callable[[], T]:
    """The computation of an artefact, after which the memory that it freed goes back to the system."""

    def computed() -> T:
        value = compute()
        give_back_freed_memory()
        return value

    return computed


class Baselines(NamedTuple):
    """The arms that need no training."""

    base: dict
    prompted: dict
    """the positive persona as system prompt"""
    negative: dict
    """the negative persona as system prompt"""


@dataclass(frozen=True)
class Work:
    """A run at work: its folder, model, trait and config, and the stages around its rounds."""

    folder: RunDir
    student: Student
    trait: data.Trait
    config: RunConfig
    preset: str
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def begun(cls, config: RunConfig, preset: str, folder: RunDir, trait: data.Trait, lm: LM) -> Work:
        """The run's work, with `model.decode_rows` a number: the same one when the run is resumed."""
        logger.info(f"model {config.model.path}, trait {trait.name!r}, {config.rounds} rounds, folder {folder.path}")
        rows = config.model.decode_rows
        if rows == "auto":

            @freeing
            def compute() -> int:
                longest = max(len(lm.prompt(prompt)) for prompt in trait.generation_prompts)
                return rows_that_fit(lm, longest, config.distil.max_new_tokens)

            rows, most = folder.json("decode_rows.json", compute), MOST_ROWS[lm.device.type]
            logger.info(f"up to {rows} rows are decoded together: what free memory holds, {most} at most")
        lm = replace(lm, decode_rows=rows)
        return cls(folder, Student(lm), trait, config, preset)

    def round(self, number: int, before: list[Round]) -> RoundStages:
        """The stages of a round that follows on the rounds `before`."""
        return RoundStages(self, number, before)

    def read_arm(self, label: str, arm: Arm, which: tuple[str, ...]) -> dict:
        return read_arm(label, self.student, arm, self.trait, self.config.eval, which)

    def measured(self, name: str, arm: Arm, which: tuple[str, ...]) -> dict:
        """The reading of an arm that lies under `name`."""
        label = f"eval {name.removesuffix('.json')}"
        return self.folder.json(name, freeing(lambda: self.read_arm(label, arm, which)))

    def baselines(self) -> Baselines:
        everything = instruments(self.config.eval, at_end=True)
        arms = {"base": None, "prompted": self.trait.positive, "negative": self.trait.negative}
        which = {name: everything for name in ("base", "prompted")}
        which["negative"] = (*PLAIN, *(("profile",) if "profile" in everything else ()))
        read = {
            name: self.measured(f"{name}.json", Arm(name, history=0.0, now=0.0, system=system), which[name])
            for name, system in arms.items()
        }
        self.folder.write_jsonl("demos.jsonl", demo_rows(base=read["base"], prompted=read["prompted"]))
        return Baselines(**read)

    def anchors(self) -> Callable[[], list[Example]]:
        """Completions of mundane prompts by the base. The call of what is returned reads their states, once."""
        if self.config.heal.anchor.prompts == 0:
            return list

        @freeing
        def compute() -> list[dict]:
            with progress("anchor", self.config.heal.anchor.prompts, "row") as done:
                prompts = list(data.mundane()[: self.config.heal.anchor.prompts])
                return anchor_completions(self.student, prompts, self.config.distil, self.key(-1, "anchor"), done)

        rows, _ = kept_rows(self.student, self.folder.jsonl("anchor.jsonl", compute))
        return cache(lambda: prepare_anchors(self.student, rows))

    def steer_plainly(self, first: AnyVector) -> list[dict]:
        """The base steered by the first round's vector, dose by dose."""
        return [
            self.folder.json(f"plain/d{index}.json", freeing(lambda dose=dose: self.plain_arm("plain", first, dose)))
            for index, dose in enumerate(plain_doses(self.config.eval))
        ]

    def plain_arm(self, name: str, first: AnyVector, dose: float, which: tuple[str, ...] = PLAIN) -> dict:
        """The base under the first round's vector at a dose."""
        arm = Arm(name, history=0.0, now=0.0, vector=first, dose=dose)
        return self.read_arm(f"plain steering {dose:.2f}", arm, which)

    def first_vector(self) -> AnyVector:
        """The vector of round 0, which the later rounds and plain steering are compared with."""
        return read_vector(self.folder.find(InRound.VECTOR.of(0))).vector

    @property
    def fixed(self) -> Fixed:
        """What is read of every student to see where it went."""
        contexts = list(data.contexts()[: min(FIXED_CONTEXTS, self.config.steer.n_contexts)])
        rows = neutral_rows(self.student.lm, min(FIXED_TEXTS, self.config.eval.counts.neutral))
        return Fixed(contexts, rows, self.student.lm.read_rows)

    @cached_property
    def base_states(self) -> Callable[[tuple[int, ...]], Base]:
        """What the base has on `fixed`, read when it is first asked for: a resumed run may not need it."""
        return cache(lambda layers: read_base(self.student, self.fixed, layers))

    def key(self, number: int, stage: str) -> tuple:
        """Name of a stage's stream of random numbers."""
        return (self.config.seed, number, stage)

    def save_adapter(self) -> None:
        """All rounds as one adapter."""
        self.folder.stage("adapter", lambda: self.student, lambda path, s: s.save(path, s.history), lambda path: None)

    def summarise(self, baselines: Baselines, plain: list[dict], rounds: list[Round], stopped: str) -> dict:
        """Write summary.json; `stopped` says why the loop ended early, if it did."""
        arms = baselines._asdict() | {"plain": plain}
        summary = summarise(self.config, self.preset, self.trait, arms, rounds, self.folder.stage_seconds())
        summary |= {"stopped": stopped, "peak_memory_bytes": peak_memory(self.student.lm.device)}
        self.folder.replace_json("summary.json", summary)
        return summary

    def note_end(self) -> None:
        self.folder.event("done", wall_seconds=time.perf_counter() - self.began)


@dataclass(frozen=True)
class RoundStages:
    """The stages of one round."""

    work: Work
    number: int
    before: list[Round]
    """the rounds that are done"""

    @property
    def name(self) -> str:
        return folder_of(self.number)

    @property
    def last(self) -> bool:
        return self.number == self.work.config.rounds - 1

    def file(self, artefact: InRound) -> str:
        return artefact.of(self.number)

    def key(self, stage: str) -> tuple:
        return self.work.key(self.number, stage)

    def seed(self, stage: str) -> int:
        return int.from_bytes(hashlib.blake2b(repr(self.key(stage)).encode(), digest_size=4).digest(), "little")

    def prompts(self, stage: str) -> list[str]:
        """The generation prompts in another order in every round: a round that asks fewer asks others each time."""
        prompts = list(self.work.trait.generation_prompts)
        random.Random(self.seed(stage)).shuffle(prompts)
        return prompts

    def teacher(self, vector: AnyVector, stage: str) -> Teacher:
        config, trait = self.work.config, self.work.trait
        persona = persona_narration(trait.positive, trait.negative, trait.title)
        return Teacher(self.work.student, vector, config.distil, config.filter, self.key(stage), persona)

    # ---- steer

    def extract(self) -> Extraction:
        """The round's vector. It acts on the blocks of round 0: a band that was chosen there is kept."""
        work, config = self.work, self.work.config.steer
        personas = Personas(work.trait.positive, work.trait.negative, list(data.contexts()[: config.n_contexts]))
        layers = tuple(r["layer"] for r in self.before[0].layers if r["steered"]) if self.before else None

        @freeing
        def compute() -> Extraction:
            own = float(config.source == "student")
            bar = progress(f"{self.name} extract", prompts_read(config) * len(personas.contexts), "prompt")
            with bar as done, work.student.view(history=own, now=0.0):
                return extract(work.student.lm, personas, config, layers, done)

        extraction = work.folder.stage(self.file(InRound.VECTOR), compute, write_vector, read_vector)
        logger.info(f"{self.name} vector {extraction.described(len(work.student.lm.blocks))}")
        return extraction

    def find_dose(self, vector: AnyVector) -> dict:
        """The dose curve. Raises Exhausted when no dose leaves text to train on."""
        config = self.work.config.dose

        @freeing
        def compute() -> dict:
            with progress(f"{self.name} dose curve", (config.steps + 1) * config.prompts, "row") as done:
                return dose_curve(self.teacher(vector, "dose"), self.prompts("dose"), config, done)

        dose = self.work.folder.json(self.file(InRound.DOSE), compute)
        shares = "  ".join(f"{point['dose']:.2f}:{point['survival']:.0%}" for point in dose["curve"])
        chosen = require_dose(dose)
        if dose["rule"] == "iso_kl":
            logger.info(f"{self.name} dose {chosen:.2f}: 95th percentile KL {dose['kl']:.3g} nats  (survival {shares})")
        else:
            logger.info(f"{self.name} dose {chosen:.2f}, the largest that {dose['target']:.0%} survive  ({shares})")
        return dose

    # ---- distil, heal, bake

    def distil(self, vector: AnyVector, dose: dict) -> list[dict]:
        """The teacher's completions, judged. Raises Exhausted when too few survive to train on."""
        config = self.work.config.distil

        @freeing
        def compute() -> list[dict]:
            with progress(f"{self.name} distil", config.n_keep, "row") as done:
                teacher, survival = self.teacher(vector, "distil"), expected_survival(dose)
                return distil(teacher, dose["dose"], self.prompts("distil"), survival, done)

        completions = self.work.folder.jsonl(self.file(InRound.COMPLETIONS), compute)
        kept = sum(not c["dropped"] for c in completions)
        logger.info(f"{self.name} distil kept {kept} of {len(completions)} completions")
        require_training_set(completions, dose, config)
        return completions

    def heal(self, vector: AnyVector, completions: list[dict], anchors: Callable[[], list[Example]]) -> list[dict]:
        """Train the round's adapter, or load it; either way it is the student's current one afterwards."""
        student, folder, config = self.work.student, self.work.folder, self.work.config
        rows, doses = kept_rows(student, completions)
        log = self.file(InRound.STEPS)

        @freeing
        def compute() -> list[dict]:
            seed = self.seed("heal")
            student.begin_round(config.heal.lora, seed)
            steering = Steering(vector, torch.tensor(doses))
            before = self.before[-1].heal if self.before else None
            folder.part = READING
            examples = prepare(student, rows, steering, config.heal)
            trained = config.heal.training.epochs * trained_on(len(rows), config.heal.training)
            with progress(f"{self.name} heal", trained, "row") as done:
                settled = with_tau(student.lm, examples, config.heal, before)
                held = anchors()
                folder.part = TRAINING
                return heal(student, examples, held, settled, self.number, seed, done, before)

        def write(path: Path, records: list[dict]) -> None:
            folder.write_jsonl(log, records)  # before the adapter, whose existence says that all is done
            student.save(path)

        def read(path: Path) -> list[dict]:
            student.load_round(path)
            return folder.read(log)

        return folder.stage(self.file(InRound.ADAPTER), compute, write, read, also=(log,))

    def locate(self, vector: AnyVector) -> dict:
        """Where the round moved the student. Before `bake`, which joins the round to the history."""
        work, first = self.work, self.work.first_vector()

        @freeing
        def compute() -> dict:
            return geometry(work.student, work.fixed, vector, first, work.base_states(vector.layers))

        return work.folder.json(self.file(InRound.GEOMETRY), compute)

    def bake(self) -> None:
        """The round joins the history; the log and the events say what compression to a rank loses."""
        rank = self.work.config.heal.lora.fold_rank
        lost = self.work.student.fold(rank)
        if rank:
            logger.info(f"{self.name} history at rank {rank}: relative error {lost:.2%}")
            self.work.folder.event("fold", round=self.number, rank=rank, relative_error=lost)

    # ---- measure

    def measure_steered(self, vector: AnyVector, dose: dict) -> dict:
        """The round's teacher."""
        arm = Arm("steered", now=0.0, vector=vector, dose=dose["dose"])
        return self.work.measured(self.file(InRound.STEERED), arm, instruments(self.work.config.eval, at_end=False))

    def measure_healed(self) -> dict:
        """The round's student; of the last one everything is read."""
        which = instruments(self.work.config.eval, at_end=self.last)
        return self.work.measured(self.file(InRound.HEALED), Arm("healed"), which)

    def steer_at_equal_cost(self, plain: list[dict], base: dict, healed: dict) -> dict | None:
        """The base steered at the dose that costs as much coherence as the rounds so far."""
        if not plain:
            return None
        work, first, allowed = self.work, self.work.first_vector(), allowed_cost(healed, base)
        which = self.opponents_read if self.last else PLAIN

        def cost_at(dose: float) -> float:
            return coherence_cost(work.plain_arm("equal_cost", first, dose, ("yes_no", "neutral")), base)

        @freeing
        def compute() -> dict:
            known = fitting([*plain, *(done.equal_cost for done in self.before)], base, allowed)
            if known and not self.last:
                return known | {"arm": "equal_cost"}
            curve = [{"dose": arm["dose"], "cost": coherence_cost(arm, base)} for arm in plain]
            dose = known["dose"] if known else find_dose_at_cost(allowed, curve, cost_at)
            return work.plain_arm("equal_cost", first, dose, which)

        return work.folder.json(self.file(InRound.EQUAL_COST), compute)

    def steer_at_equal_trait(self, plain: list[dict], base: dict, healed: dict) -> dict | None:
        """The base steered at the dose that moves the trait as far as the student, or as far as any dose does."""
        if not plain:
            return None

        @freeing
        def compute() -> dict:
            dose, reached = dose_at_trait(plain, base, healed)
            arm = self.work.plain_arm("equal_trait", self.work.first_vector(), dose, self.opponents_read)
            return arm | {"reached": reached}

        return self.work.folder.json(self.file(InRound.EQUAL_TRAIT), compute)

    @property
    def opponents_read(self) -> tuple[str, ...]:
        """What is read of plain steering beside the last student."""
        return tuple(name for name in instruments(self.work.config.eval, at_end=True) if name != "profile")

    def ended(self, done: Round, plain: list[dict], base: dict) -> Round:
        """The last round, `done`, with everything that is read at the end; a loop that ends early had not known."""
        healed = self.completed(InRound.HEALED, done.healed, Arm("healed"), instruments(self.work.config.eval, True))
        if not plain:
            return replace(done, healed=healed)
        cost = done.equal_cost
        arm = Arm("equal_cost", history=0.0, now=0.0, vector=self.work.first_vector(), dose=cost["dose"])
        cost = self.completed(InRound.EQUAL_COST, cost, arm, self.opponents_read)
        return replace(done, healed=healed, equal_cost=cost, equal_trait=self.steer_at_equal_trait(plain, base, healed))

    def completed(self, artefact: InRound, reading: dict, arm: Arm, which: tuple[str, ...]) -> dict:
        """A reading with what it lacks of the instruments `which`."""
        lacking = tuple(name for name in which if name not in reading["read"])
        if not lacking:
            return reading
        name = self.file(artefact)
        whole = joined(reading, self.work.read_arm(f"eval {name.removesuffix('.json')}", arm, lacking))
        self.work.folder.replace_json(name, whole)
        return whole
