"""The stages of a run outside its rounds, and the state that all stages share.

A stage computes its artefact or loads it from the run folder. It passes its inputs to the function that does the work,
and returns one artefact. Only `loop` knows the order of the stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import TypeVar

from loguru import logger

from steer_heal import data
from steer_heal.bake.reach import reach
from steer_heal.bake.student import Student
from steer_heal.config import FILE, RunConfig, SteerConfig
from steer_heal.data import Contrast
from steer_heal.distil.record import Anchor
from steer_heal.distil.sample import anchor_rows, anchor_texts
from steer_heal.eval.arms import Arm, plainly, unsteered
from steer_heal.eval.catalogue import OF_TRAIT
from steer_heal.eval.geometry import Base, Fixed, read_base
from steer_heal.eval.instruments import instruments, neutral_rows, read_arm, with_relevance
from steer_heal.eval.opponents import plain_doses
from steer_heal.eval.own_probes import own_probes
from steer_heal.eval.prompts import PromptsReading, best_of, other_prompts, part_of, parts
from steer_heal.eval.reading import ArmReading, Survey, side_by_side
from steer_heal.eval.survey import BANDS, survey
from steer_heal.heal.examples import Example, prepare_anchors
from steer_heal.model.decode import MOST_ROWS, rows_that_fit
from steer_heal.model.dtype import dtype_of
from steer_heal.model.lm import LM
from steer_heal.model.memory import give_back_freed_memory, peak_memory
from steer_heal.model.packing import packed
from steer_heal.model.steering import AnyVector
from steer_heal.runs.folder import PROBES, WITHOUT, RunDir
from steer_heal.runs.rounds import InRound, Round
from steer_heal.runs.student import vector_of
from steer_heal.runs.summary import PROMPTS, SUMMARY, SURVEY, Baselines, RunName, Summary, plain_file, summarise
from steer_heal.steer import from_file
from steer_heal.steer.extract import VECTOR_FILE, extract, prompts_read
from steer_heal.steer.personas import Neighbour, Personas, neighbours
from steer_heal.terminal import progress

T = TypeVar("T")
FIXED_TEXTS = 12  # neutral texts on which the divergence from base is read, about a thousand tokens
FIXED_CONTEXTS = 32  # contexts over which the student's shift is averaged
PLAIN = ("contrast", "yes_no", "neutral")  # instruments for plain steering at each dose


def freeing(compute: Callable[[], T]) -> Callable[[], T]:
    """Wrap the computation of an artefact: the memory that it freed then goes back to the system."""

    def computed() -> T:
        value = compute()
        give_back_freed_memory()
        return value

    return computed


def roomy(config: RunConfig, trait: data.Trait) -> RunConfig:
    """The config with as long answers as the trait asks for. config.json has it as the flags gave it."""
    longest = trait.answer_limit(config.distil.max_new_tokens)
    if trait.answer_tokens is not None:
        demo = trait.answer_limit(config.eval.counts.demo_tokens)
        asked = f"the trait asks for answers of {trait.answer_tokens} tokens (answer_tokens)"
        logger.info(f"{asked}: training's may have {longest}, the demo's {demo}")
    return replace(config, distil=replace(config.distil, max_new_tokens=longest))


@dataclass(frozen=True)
class Work:
    """A run in progress: its folder, model, trait and config, and the stages outside its rounds."""

    folder: RunDir
    student: Student
    trait: data.Trait
    config: RunConfig
    preset: str
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def begun(cls, config: RunConfig, preset: str, folder: RunDir, trait: data.Trait, lm: LM) -> Work:
        """Start the work. "auto" for `model.decode_rows` becomes a number, which a resumed run takes again."""
        logger.info(f"model {config.model.path}, trait {trait.name!r}, folder {folder.path}")
        rounds = f"{config.rounds} round{'s' * (config.rounds != 1)}"
        logger.info(f"first the model itself is measured, then {rounds} of: find a vector, find a dose, train, measure")
        config = roomy(config, trait)
        logger.info(f"weights in {dtype_of(lm)}: {lm.why_dtype}")
        if not lm.fused_attention:
            logger.info(
                "attention in plain products, which take more time and memory: transformers offers no fused ones for "
                f"{lm.model.config.model_type}"
            )
        rows = config.model.decode_rows
        if rows == "auto":

            @freeing
            def compute() -> int:
                longest = max(len(lm.prompt(prompt)) for prompt in trait.asked_of_teacher)
                return rows_that_fit(lm, longest, config.distil.max_new_tokens)

            rows, most = folder.artefact(int, "decode_rows.json", compute), MOST_ROWS[lm.device.type]
            logger.info(f"{rows} answers are written at a time: as many as fit free memory, {most} at most")
        lora, band = config.heal.lora, lm.band(config.heal.lora.band)
        logger.info(f"LoRA of rank {lora.r} in blocks {band[0]} to {band[-1]} on {reach(lm.blocks, band).described}")
        return cls(folder, Student(replace(lm, decode_rows=rows)), trait, config, preset)

    def read_arm(self, label: str, arm: Arm, which: tuple[str, ...]) -> ArmReading:
        return read_arm(label, self.student, arm, self.trait, self.config.eval, which)

    def measured(self, name: str, arm: Arm, which: tuple[str, ...]) -> ArmReading:
        """The reading of an arm, stored as the artefact `name`."""
        label = f"eval {name.removesuffix('.json')}"
        return self.folder.artefact(ArmReading, name, freeing(lambda: self.read_arm(label, arm, which)))

    def completed(self, name: str, reading: ArmReading, arm: Arm, which: tuple[str, ...]) -> ArmReading:
        """The reading stored as `name`, with the missing ones of the instruments `which` added there."""
        if not reading.missing(which):
            return reading
        began = time.perf_counter()
        whole = freeing(lambda: self.widened(f"eval {name.removesuffix('.json')}", reading, arm, which))()
        self.folder.replace_json(name, whole, seconds=time.perf_counter() - began)
        return whole

    def widened(self, label: str, reading: ArmReading, arm: Arm, which: tuple[str, ...]) -> ArmReading:
        """The reading of an arm, with the missing ones of the instruments `which`."""
        missing = reading.missing(which)
        if "relevance" in missing and "demos" not in missing:
            missing = tuple(name for name in missing if name != "relevance")
            reading = with_relevance(self.student, reading, self.config.eval)
        return reading.joined(self.read_arm(label, arm, missing)) if missing else reading

    def with_probes(self) -> Work:
        """The work with contrast probes that the base writes, where the trait has none; the same for all seeds."""
        if self.trait.contrast:
            return self

        @freeing
        def compute() -> list[Contrast]:
            return own_probes(self.student, self.trait, self.config.eval.judge, data.pool("probe"))

        probes = self.folder.artefacts(Contrast, PROBES, compute)
        logger.info(f"the base wrote {len(probes)} contrast probes of {self.trait.name!r}: see {PROBES}")
        return replace(self, trait=replace(self.trait, contrast=tuple(probes)))

    def first_look(self) -> list[ArmReading]:
        """The trait's instrument on base and both personas, and the answers of the first two: what `loop.run` shows
        first."""

        def compute() -> list[ArmReading]:
            probes = OF_TRAIT[self.trait.instrument].read_with
            which = {"base": (probes, "demos"), "prompted": (probes, "demos"), "negative": (probes,)}
            return [self.read_arm(f"first look, {arm.name}", arm, which[arm.name]) for arm in unsteered(self.trait)]

        return self.folder.artefact(list[ArmReading], "first_look.json", freeing(compute))

    def baselines(self, first: list[ArmReading]) -> Baselines:
        """The arms that need no training, with the instruments that every round reads."""
        early = instruments(self.config.eval, at_end=False)
        read = {}
        for arm, begun in zip(unsteered(self.trait), first, strict=True):
            which = PLAIN if arm.name == "negative" else early
            compute = freeing(partial(self.widened, f"eval {arm.name}", begun, arm, which))
            read[arm.name] = self.folder.artefact(ArmReading, f"{arm.name}.json", compute)
        self.folder.write_jsonl("demos.jsonl", side_by_side(base=read["base"], prompted=read["prompted"]))
        return Baselines(**read, plain=[])

    def baselines_in_full(self, arms: Baselines) -> Baselines:
        """The baselines, with the instruments added that only the last round is compared on."""
        everything = instruments(self.config.eval, at_end=True)
        profile = tuple(name for name in everything if name == "profile")
        which = {"base": everything, "prompted": everything, "negative": (*PLAIN, *profile)}
        read = {
            arm.name: self.completed(f"{arm.name}.json", getattr(arms, arm.name), arm, which[arm.name])
            for arm in unsteered(self.trait)
        }
        return replace(arms, **read, prompts=self.prompts(read["prompted"]))

    def prompts(self, prompted: ArmReading) -> PromptsReading | None:
        """The base under the positive persona and under four other system prompts, on the trait's instrument."""
        if "prompts" in self.config.eval.leave_out:
            return None
        name, config = self.trait.instrument, self.config.eval
        own = parts(prompted.items[name])

        def read(system: str, part: int) -> list[float]:
            if system == self.trait.positive:
                return own[part]
            arm, asked = replace(unsteered(self.trait)[1], system=system), part_of(self.trait, config.counts, part)
            which = (OF_TRAIT[name].read_with,)
            return read_arm("eval another prompt", self.student, arm, asked, config, which).items[name]

        def compute() -> PromptsReading:
            answers = [(demo.prompt, demo.text) for demo in prompted.demos]
            systems = [self.trait.positive, *other_prompts(self.trait, answers)]
            tried = [read(system, 0) for system in systems]
            scores = read(systems[best_of(tried)], 1)
            return PromptsReading(asked=prompted.asked[name], systems=systems, tried=tried, scores=scores)

        return self.folder.artefact(PromptsReading, PROMPTS, freeing(compute))

    def anchors(self) -> Callable[[], list[Example]]:
        """Make the anchor's texts with the base. The returned function computes their states at its first call."""
        count = self.config.heal.anchor.prompts
        if count == 0:
            return list

        @freeing
        def compute() -> list[Anchor]:
            with progress("anchor", count, "row") as done:
                return anchor_texts(self.student, count, self.config.distil, self.key(-1, "anchor"), done)

        found = self.folder.artefacts(Anchor, "anchor.jsonl", compute)
        rows, written = anchor_rows(self.student.lm, found), [anchor.written for anchor in found]
        return cache(lambda: prepare_anchors(self.student, rows, written))

    @property
    def personas(self) -> Personas:
        """The trait's personas, and the user messages that are asked under both."""
        contexts = list(data.contexts()[: self.config.steer.n_contexts])
        return Personas(self.trait.positive, self.trait.negative, contexts, self.without)

    @cached_property
    def without(self) -> tuple[Neighbour, ...]:
        """The traits whose vectors are projected out. A resumed run does not read their files again."""
        named = self.config.steer.without
        if not named:
            return ()
        return tuple(self.folder.artefact(list[Neighbour], WITHOUT, lambda: neighbours(named, self.trait)))

    @cached_property
    def survey(self) -> Survey | None:
        """What plain steering does on this model; None where neither the band nor plain steering's range asks for it.

        Computed or loaded at the first use.
        """
        band, lm, config = self.config.steer.band, self.student.lm, self.config.eval
        if band != "auto" and (config.plain_range != "auto" or "plain" in config.leave_out):
            return None

        @freeing
        def compute() -> Survey:
            bands = self.bands  # a resumed run no longer needs the file of a vector
            blocks = tuple(sorted(set().union(*bands)))
            prompts = prompts_read(self.config.steer) * len(self.personas.contexts)
            with self.student.view(history=0.0, now=0.0):
                with progress("survey, extract", prompts, "prompt") as done:
                    extraction = extract(lm, self.personas, self.config.steer, blocks, done)
                with progress("survey, plain steering", None, "dose") as done, packed(lm) as packed_lm:
                    return survey(packed_lm, self.trait, extraction, bands, done)

        found = self.folder.artefact(Survey, SURVEY, compute)
        logger.info(f"survey: {found.described}")
        return found

    @property
    def bands(self) -> list[tuple[int, ...]]:
        """The bands of blocks that the survey compares; one where the band is given, or a file gives the vector."""
        lm, steer = self.student.lm, self.config.steer
        if steer.band != "auto":
            return [lm.band(steer.band)]
        if steer.method.startswith(FILE):
            return [from_file.blocks(lm, steer.method)]
        return list(dict.fromkeys(lm.band(share) for share in BANDS))

    def steer_in(self, number: int) -> SteerConfig:
        """How a round's vector is made. From the second round on, a vector from a file is that of the first."""
        steer = self.config.steer
        if number == 0 or not steer.method.startswith(FILE):
            return steer
        return replace(steer, method=f"{FILE}{self.folder.find(InRound.VECTOR.of(0)) / VECTOR_FILE}")

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that are steered, in all rounds."""
        band = self.config.steer.band
        return tuple(self.survey.best.blocks) if band == "auto" else self.student.lm.band(band)

    def steer_plainly(self, first: AnyVector) -> list[ArmReading]:
        """The base steered by the first round's vector, at each dose."""
        found, begins_to_cost = [], self.survey and self.survey.best.dose
        for index, dose in enumerate(plain_doses(self.config.eval, begins_to_cost)):
            compute = freeing(partial(self.plain_arm, "plain", first, dose))
            found.append(self.folder.artefact(ArmReading, plain_file(index), compute))
        return found

    def plain_arm(self, name: str, first: AnyVector, dose: float, which: tuple[str, ...] = PLAIN) -> ArmReading:
        """The reading of the base steered by the first round's vector at a dose."""
        return self.read_arm(f"plain steering {dose:.2f}", plainly(name, first, dose), which)

    def first_vector(self) -> AnyVector:
        """The vector of round 0. Later vectors are compared with it, and plain steering uses it."""
        return vector_of(self.folder)

    @property
    def fixed(self) -> Fixed:
        """The contexts and texts on which the movement of every student is measured."""
        contexts = list(data.contexts()[: min(FIXED_CONTEXTS, self.config.steer.n_contexts)])
        rows = neutral_rows(self.student.lm, min(FIXED_TEXTS, self.config.eval.counts.neutral))
        return Fixed(contexts, rows)

    @cached_property
    def base_states(self) -> Callable[[tuple[int, ...]], Base]:
        """The base's states on `fixed`, computed at the first call: a resumed run may not need them."""
        return cache(lambda layers: read_base(self.student, self.fixed, layers))

    def key(self, number: int, stage: str) -> tuple:
        """The name of a stage's random stream."""
        return (self.config.seed, number, stage)

    def save_adapter(self) -> None:
        """Write all rounds as one adapter."""
        self.folder.stage("adapter", lambda: self.student, lambda path, s: s.save(path, s.history), lambda path: None)

    def summarise(self, arms: Baselines, rounds: list[Round], stopped: str) -> Summary:
        """Write summary.json; `stopped` says why the loop ended early, if it did."""
        of = RunName(model=self.student.lm.name, trait=self.trait.name, seed=self.config.seed, preset=self.preset)
        found = summarise(of, arms, rounds, self.folder.stage_seconds())
        peak = peak_memory(self.student.lm.device)
        summary = replace(found, stopped=stopped, peak_memory_bytes=peak)
        self.folder.replace_json(SUMMARY, summary)
        return summary

    def note_end(self) -> None:
        self.folder.event("done", wall_seconds=time.perf_counter() - self.began)
