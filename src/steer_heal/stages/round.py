"""The stages of a round: each computes its artefact or loads it from the run folder. See `stages.run`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
from loguru import logger

from steer_heal.coherence import persona_narration
from steer_heal.distil.dose import dose_curve, expected_survival, require_dose
from steer_heal.distil.record import Completion, DoseCurve
from steer_heal.distil.sample import Teacher, distil, judged, require_training_set, rows_of
from steer_heal.eval.arms import Arm, plainly
from steer_heal.eval.geometry import geometry
from steer_heal.eval.instruments import instruments
from steer_heal.eval.opponents import (
    Cost,
    allowed_cost,
    coherence_cost,
    dose_at_trait,
    find_dose_at_cost,
    fitting,
)
from steer_heal.eval.reading import ArmReading, Geometry, side_by_side
from steer_heal.eval.survey import SMALLEST, Coherence, coherence, dose_of
from steer_heal.heal.examples import Example, prepare, with_anchor_tau, with_tau
from steer_heal.heal.own_text import OwnText
from steer_heal.heal.schedule import most_epochs
from steer_heal.heal.steps import HealStep
from steer_heal.heal.train import Turn, heal
from steer_heal.model.steering import AnyVector, Steering
from steer_heal.runs.rounds import InRound, Round, folder_of
from steer_heal.runs.summary import Baselines
from steer_heal.stages.run import PLAIN, Work, freeing
from steer_heal.steer.extract import Extraction, extract, prompts_read, read_vector, write_vector
from steer_heal.steer.layers import LayerReport
from steer_heal.terminal import progress


class Trained(NamedTuple):
    """A round's training: its steps, and the answers of its own that the student was trained on."""

    steps: list[HealStep]
    answers: list[Completion]


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

    def shuffled(self, texts: tuple[str, ...], stage: str) -> list[str]:
        """The texts in an order of the stage's own, anew in each round: who uses only some of them uses others."""
        prompts = list(texts)
        random.Random(self.seed(stage)).shuffle(prompts)
        return prompts

    @property
    def own_rows(self) -> int:
        """How many answers of its own the student trains on per epoch; the rest of n_keep is the teacher's text."""
        whole = self.work.config.distil.n_keep
        return {"teacher": 0, "own": whole, "mixed": (whole + 1) // 2}[self.work.config.heal.text]

    @property
    def teacher_rows(self) -> int:
        """How many of the teacher's completions are trained on."""
        return self.work.config.distil.n_keep - self.own_rows

    @property
    def teacher_prompts(self) -> tuple[str, ...]:
        """What the teacher is asked. Everyday prompts only matter where its text is trained on."""
        trait = self.work.trait
        return trait.asked_of_teacher if self.teacher_rows else trait.generation_prompts

    def teacher(self, vector: AnyVector, stage: str) -> Teacher:
        config, trait = self.work.config, self.work.trait
        persona = persona_narration(trait.positive, trait.negative, trait.title)
        return Teacher(self.work.student, vector, config.distil, config.filter, self.key(stage), persona)

    # ---- steer

    def extract(self) -> Extraction:
        """The round's vector."""
        work, config = self.work, self.work.steer_in(self.number)
        personas, blocks = work.personas, work.blocks

        @freeing
        def compute() -> Extraction:
            own = float(config.source == "student")
            bar = progress(f"{self.name} extract", prompts_read(config) * len(personas.contexts), "prompt")
            with bar as done, work.student.view(history=own, now=0.0):
                return extract(work.student.lm, personas, config, blocks, done)

        extraction = work.folder.stage(self.file(InRound.VECTOR), compute, write_vector, read_vector)
        logger.info(f"{self.name} steering vector {extraction.described(len(work.student.lm.blocks))}")
        return extraction

    def find_dose(self, vector: AnyVector, layers: list[LayerReport]) -> DoseCurve:
        """The dose curve. Raises Exhausted when no dose leaves text to train on."""
        config = self.work.config.dose

        @freeing
        def compute() -> DoseCurve:
            rows = None if config.range == "auto" else (config.steps + 1) * config.prompts
            with progress(f"{self.name} dose curve", rows, "row") as done:
                teacher, asked = self.teacher(vector, "dose"), self.shuffled(self.teacher_prompts, "dose")
                return dose_curve(teacher, asked, config, self.cost_of(vector), dose_of(SMALLEST, layers), done)

        found = self.work.folder.artefact(DoseCurve, self.file(InRound.DOSE), compute)
        logger.info(
            f"{self.name} dose {require_dose(found):.2f}: {found.reason}. Texts that pass, by dose: {found.survivals}"
        )
        if found.open_ended:
            logger.info(f"{self.name} no larger dose was tried, though one may do as well (dose.range)")
        return found

    def cost_of(self, vector: AnyVector) -> Callable[[float], float]:
        """The share of coherence that steering the student so far costs, as a function of the dose."""

        @cache
        def read(dose: float) -> Coherence:
            with self.work.student.view(now=0.0):
                return coherence(self.work.student.lm, self.work.trait, Arm("steered", vector=vector, dose=dose))

        return lambda dose: read(dose).lost_from(read(0.0))

    # ---- distil, heal, bake

    def distil(self, vector: AnyVector, dose: DoseCurve) -> list[Completion]:
        """The teacher's completions, judged by the filter; none where the student trains on its own text alone.

        Raises Exhausted when too few survive to train on.
        """
        config = replace(self.work.config.distil, n_keep=self.teacher_rows)
        if config.n_keep == 0:
            return []

        @freeing
        def compute() -> list[Completion]:
            with progress(f"{self.name} distil", config.n_keep, "row") as done:
                teacher, survival = replace(self.teacher(vector, "distil"), config=config), expected_survival(dose)
                return distil(teacher, dose.dose, self.shuffled(self.teacher_prompts, "distil"), survival, done)

        completions = self.work.folder.artefacts(Completion, self.file(InRound.COMPLETIONS), compute)
        kept = sum(not c.dropped for c in completions)
        logger.info(f"{self.name} distil kept {kept} of {len(completions)} completions")
        require_training_set(completions, dose, config)
        return completions

    def heal(
        self,
        vector: AnyVector,
        dose: DoseCurve,
        completions: list[Completion],
        anchors: Callable[[], list[Example]],
    ) -> Trained:
        """Train the round's adapter, or load it. Afterwards it is the student's current adapter."""
        student, folder, config = self.work.student, self.work.folder, self.work.config.heal
        kept = [completion for completion in completions if not completion.dropped]
        own = self.own_text(vector, dose)
        steps_file, own_file = self.file(InRound.STEPS), self.file(InRound.OWN)

        @freeing
        def compute() -> Trained:
            seed = self.seed("heal")
            student.begin_round(config.lora, seed)
            steering = Steering(vector, torch.tensor([completion.dose for completion in kept]))
            under = [student.lm.prompt(completion.prompt, own.persona) for completion in kept]
            given = prepare(student, rows_of(student.lm, kept), steering, config, under) if kept else []
            text = lru_cache(1)(lambda epoch: [*given, *own.examples(epoch, config)])  # the first epoch is asked twice
            before = self.before[-1].steps if self.before else None
            held, settled = anchors(), with_tau(student.lm, text(0), config, before)
            at_dose = Steering(vector, torch.full((len(held),), dose.dose))
            settled = with_anchor_tau(student, held, at_dose, settled, before)
            rows = len(text(0)) * most_epochs(config.training.epochs)
            with progress(f"{self.name} heal", rows, "row") as done:
                steps = heal(student, text, held, settled, Turn(self.number, seed, before), done)
            return Trained(steps, self.own_answers(own))

        def write(path: Path, made: Trained) -> None:
            folder.write_jsonl(steps_file, made.steps)  # before the adapter: once that exists, the stage is done
            if own.prompts:
                folder.write_jsonl(own_file, made.answers)
            student.save(path)

        def read(path: Path) -> Trained:
            student.load_round(path)
            return Trained(folder.load(list[HealStep], steps_file), folder.load(list[Completion], own_file) or [])

        also = (steps_file, own_file) if own.prompts else (steps_file,)
        return folder.stage(self.file(InRound.ADAPTER), compute, write, read, also=also)

    def own_text(self, vector: AnyVector, dose: DoseCurve) -> OwnText:
        """What writes the student's own answers; it has no prompts where only the teacher's text is trained on."""
        return OwnText(
            self.work.student,
            prompts=list(islice(cycle(self.shuffled(self.work.trait.generation_prompts, "own")), self.own_rows)),
            vector=vector,
            dose=dose.dose,
            longest=self.work.config.distil.max_new_tokens,
            key=self.key("own"),
            persona=self.work.trait.positive,
        )

    def own_answers(self, own: OwnText) -> list[Completion]:
        """The student's own answers with the filter's decision, which changes nothing: all were trained on."""
        teacher, found, shares = self.teacher(own.vector, "own"), [], []
        for writing in own.written:
            plan = [(0.0, prompt) for prompt in own.prompts]
            answers = judged(teacher, plan, writing.answers, writing.epoch)
            found += answers
            shares.append(sum(not answer.dropped for answer in answers) / len(answers))
            about = {"epoch": writing.epoch, "tokens": sum(len(answer.ids) for answer in answers)}
            self.work.folder.event("own_text", round=self.number, **about, seconds=writing.seconds)
        if shares:
            change = f"{shares[0]:.0%} before training, {shares[-1]:.0%} before the last epoch"
            logger.info(f"{self.name} the student's own answers that pass the filter: {change}")
        return found

    def locate(self, vector: AnyVector) -> Geometry:
        """Where the round moved the student. Must run before `bake`, which joins the round to the history."""
        work, first = self.work, self.work.first_vector()

        @freeing
        def compute() -> Geometry:
            return geometry(work.student, work.fixed, vector, first, work.base_states(vector.layers))

        return work.folder.artefact(Geometry, self.file(InRound.GEOMETRY), compute)

    def bake(self) -> None:
        """Join the round to the history. Log the relative error if the history is compressed to a rank."""
        rank = self.work.config.heal.lora.fold_rank
        lost = self.work.student.fold(rank)
        if rank:
            logger.info(f"{self.name} history at rank {rank}: relative error {lost:.2%}")
            self.work.folder.event("fold", round=self.number, rank=rank, relative_error=lost)

    # ---- measure

    def measure_steered(self, vector: AnyVector, dose: DoseCurve) -> ArmReading:
        """The reading of the round's teacher; in the last round with the relevance of its answers."""
        arm, config = Arm("steered", now=0.0, vector=vector, dose=dose.dose), self.work.config.eval
        which = instruments(config, at_end=False)
        if self.last and "relevance" in instruments(config, at_end=True):
            which = tuple(dict.fromkeys((*which, "relevance")))
        return self.work.measured(self.file(InRound.STEERED), arm, which)

    def measure_healed(self) -> ArmReading:
        """The reading of the round's student, by all instruments in the last round."""
        which = instruments(self.work.config.eval, at_end=self.last)
        return self.work.measured(self.file(InRound.HEALED), Arm("healed"), which)

    def steer_at_equal_cost(self, arms: Baselines, healed: ArmReading) -> ArmReading | None:
        """The base steered at the dose that costs as much coherence as the rounds so far; None without plain arms."""
        if not arms.plain:
            return None
        work, base, first, allowed = self.work, arms.base, self.work.first_vector(), allowed_cost(healed, arms.base)

        def cost_at(dose: float) -> float:
            return coherence_cost(work.plain_arm("equal_cost", first, dose, ("yes_no", "neutral")), base)

        @freeing
        def compute() -> ArmReading:
            known = fitting([*arms.plain, *(done.equal_cost for done in self.before)], base, allowed)
            if known and not self.last:
                return replace(known, arm="equal_cost")
            curve = [Cost(arm.dose, coherence_cost(arm, base)) for arm in arms.plain]
            dose = known.dose if known else find_dose_at_cost(allowed, curve, cost_at)
            return work.plain_arm("equal_cost", first, dose, self.opponents_read if self.last else PLAIN)

        return work.folder.artefact(ArmReading, self.file(InRound.EQUAL_COST), compute)

    def steer_at_equal_trait(self, arms: Baselines, healed: ArmReading) -> ArmReading:
        """The base steered at the dose that moves the trait as far as the student, or else furthest."""

        @freeing
        def compute() -> ArmReading:
            dose, reached = dose_at_trait(arms.plain, arms.base, healed)
            arm = self.work.plain_arm("equal_trait", self.work.first_vector(), dose, self.opponents_read)
            return replace(arm, reached=reached)

        return self.work.folder.artefact(ArmReading, self.file(InRound.EQUAL_TRAIT), compute)

    @property
    def opponents_read(self) -> tuple[str, ...]:
        """The instruments for plain steering in the last round."""
        return tuple(name for name in instruments(self.work.config.eval, at_end=True) if name != "profile")

    def read_fully(self, done: Round, arms: Baselines) -> Round:
        """The last round, `done`, with all readings of the end. A loop that ends early learns late which it is."""
        everything = instruments(self.work.config.eval, at_end=True)
        healed = self.work.completed(self.file(InRound.HEALED), done.healed, Arm("healed"), everything)
        if not arms.plain:
            return replace(done, healed=healed)
        arm = plainly("equal_cost", self.work.first_vector(), done.equal_cost.dose)
        cost = self.work.completed(self.file(InRound.EQUAL_COST), done.equal_cost, arm, self.opponents_read)
        return replace(done, healed=healed, equal_cost=cost, equal_trait=self.steer_at_equal_trait(arms, healed))

    def note_demos(self, base: ArmReading, steered: ArmReading, healed: ArmReading) -> None:
        """Write the free-text answers of the round's arms side by side."""
        rows = side_by_side(base=base, steered=steered, healed=healed)
        self.work.folder.write_jsonl(self.file(InRound.DEMOS), rows)
