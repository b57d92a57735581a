"""`eval RUN --judge`: a judge rates the answers of a run's arms to held-out prompts. It is not told whose they are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from steer_heal.bake.student import Student
from steer_heal.commands.evaluate import equal_cost
from steer_heal.commands.judge.judges import Judge
from steer_heal.commands.judge.kept import Kept, KeptJudge
from steer_heal.config import RunConfig, UserError
from steer_heal.data import LEAST_PROBES, Trait
from steer_heal.eval.arms import Arm, unsteered
from steer_heal.eval.judge.held_out import HeldOut, held_out
from steer_heal.eval.judge.questions import Question, choice_question, rating_question
from steer_heal.eval.judge.record import (
    EQUAL_COST,
    STUDENT,
    Compared,
    Judged,
    Rated,
    Rating,
    agreements,
    compared,
    judge_validity,
    judged_arms,
    judged_preferences,
)
from steer_heal.eval.reading import ArmReading
from steer_heal.model.decode import decode, rows_that_fit
from steer_heal.report.judged import judged_text
from steer_heal.runs.folder import GIVEN, RunDir
from steer_heal.runs.resume import measured_trait, opened, settings
from steer_heal.runs.rounds import InRound
from steer_heal.runs.student import finished_rounds, student_after
from steer_heal.terminal import progress

KEPT = "judge.jsonl"  # in the run folder: answers of the arms and of judges
TOKENS = 200  # of an answer
USUAL = 100  # prompts of the trait; half as many everyday ones
SPREAD = 25  # points by which ratings of one arm differ from prompt to prompt, to say what width to expect
TRIAL = Rated(arm="", prompt="What is 8 plus 6?", everyday=True, text="It is 14.")
AGAIN = 10  # of so many ratings one is asked for a second time


@dataclass(frozen=True)
class Wanted:
    """What is judged: the student of which round, at which gate, on how many prompts; the seed of the order."""

    round: int | None = None
    gate: float = 1.0
    prompts: int = USUAL
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < LEAST_PROBES:
            raise UserError(f"--judge-items is {self.prompts}: it must be {LEAST_PROBES} or more, {USUAL} is usual")

    @property
    def everyday(self) -> int:
        return self.prompts // 2

    @property
    def width(self) -> str:
        """What interval to expect of a mean rating."""
        few, usual = (f"±{1.96 * SPREAD / math.sqrt(count):.0f}" for count in (self.prompts, USUAL))
        more = "" if self.prompts >= USUAL else f", with {USUAL} prompts {usual}"
        return f"expect intervals of about {few} points{more}"


@dataclass(frozen=True)
class RunArms:
    """A run whose arms are judged: its student after some rounds, and what its answers depend on."""

    folder: Path
    run: RunDir
    config: RunConfig
    trait: Trait
    rounds: int
    gate: float

    @cached_property
    def student(self) -> Student:
        """Loaded at the first use: an earlier call may have kept all answers."""
        return student_after(self.folder, self.run.read("config.json"), self.rounds)

    @cached_property
    def equal_cost(self) -> ArmReading | None:
        """The base, plainly steered at the student's cost, as the run read it; None where it did not."""
        return self.run.load(ArmReading, InRound.EQUAL_COST.of(self.rounds - 1))

    @property
    def arms(self) -> dict[str, Arm]:
        found = [*unsteered(self.trait), Arm(STUDENT, history=self.gate, now=0.0)]
        if self.equal_cost:
            found.append(equal_cost(self.run, self.equal_cost))
        return {arm.name: arm for arm in found}

    @property
    def readings(self) -> dict[str, ArmReading]:
        """The run's own readings of the same arms."""
        files = {name: f"{name}.json" for name in ("base", "prompted", "negative")}
        files |= {STUDENT: InRound.HEALED.of(self.rounds - 1)} if self.gate == 1.0 else {}
        read = {name: self.run.load(ArmReading, file) for name, file in files.items()} | {EQUAL_COST: self.equal_cost}
        return {name: reading for name, reading in read.items() if reading}

    def made_of(self, arm: Arm) -> list:
        """What an arm's answers depend on, beside the prompt: checksums of the run's files, and the arm's settings."""
        artefacts = {STUDENT: [InRound.ADAPTER.of(i) for i in range(self.rounds)], EQUAL_COST: [InRound.VECTOR.of(0)]}
        record = self.run.record
        files = [file for name in (*GIVEN, *artefacts.get(arm.name, ())) for file in record.files[name]]
        return [[sorted(record.sums[file]) for file in files], arm.history, arm.system, arm.dose, TOKENS]

    def answers(self, arm: Arm, prompts: list[str], kept: Kept) -> list[str]:
        """The arm's greedy answers, of which an earlier call may have kept some."""
        made_of = self.made_of(arm)
        new = [prompt for prompt in prompts if kept.get("arm", made_of, prompt) is None]
        for prompt, text in zip(new, self._written(arm, new) if new else [], strict=True):
            kept.add(text, "arm", made_of, prompt)
        return [kept.get("arm", made_of, prompt) for prompt in prompts]

    def _written(self, arm: Arm, prompts: list[str]) -> list[str]:
        lm = self.student.lm
        rows = [lm.prompt(prompt, arm.system) for prompt in prompts]
        label = f"answers, {arm.name.replace('_', ' ')}"
        with self.student.view(history=arm.history, now=arm.now), progress(label, len(rows), "answer") as done:
            lm = replace(lm, decode_rows=rows_that_fit(lm, max(map(len, rows)), TOKENS))
            return [lm.text(one.ids) for one in decode(lm, rows, TOKENS, arm.steering(len(rows)), on_batch=done)]


def judge_run(target: str, judge: Judge, wanted: Wanted) -> Judged:
    """Have a judge read a run's arms, and print what it found.

    The two personas come first. A judge that cannot tell them apart is asked nothing more.

    Raises UserError when the target is no run, and for a judge that cannot be asked or answers in no form asked.
    """
    of = arms_of(target, wanted)
    prompts = held_out(of.trait, of.config, wanted.prompts, wanted.everyday)
    asked = KeptJudge(judge, Kept(of.folder / KEPT), wanted.seed)
    if judge.trial:
        rate(asked, of.trait, [TRIAL], "judge, trial")
    print(f"{len(prompts)} held-out prompts, {sum(one.everyday for one in prompts)} of them everyday: {wanted.width}")
    arms = of.arms
    rated = rate(asked, of.trait, _answers(of, ("prompted", "negative"), prompts, asked.kept), "judge, personas")
    validity = judge_validity(rated, of.readings)
    found: list[Compared] = []
    if validity.valid:
        others = tuple(name for name in arms if name not in ("prompted", "negative"))
        rest = rate(asked, of.trait, _answers(of, others, prompts, asked.kept), "judge, other arms")
        rated = rate_again(asked, of.trait, [*rest, *rated], wanted.seed)
        validity = judge_validity(rated, of.readings)
        found = compare(asked, of.trait, rated)
    record = Judged(
        judge=asked.name,
        trait=of.trait.name,
        round=of.rounds - 1,
        gate=of.gate,
        seed=wanted.seed,
        prompts=wanted.prompts,
        everyday=wanted.everyday,
        validity=validity,
        agreement=agreements(rated, of.readings),
        arms=judged_arms(rated) if validity.valid else [],
        preferences=judged_preferences(found),
        cost=asked.cost,
        rated=rated,
        compared=found,
    )
    print(judged_text(record, of.folder / KEPT))
    return record


def arms_of(target: str, wanted: Wanted) -> RunArms:
    """The run that is judged. Raises UserError when the target is none."""
    folder = Path(target).expanduser()
    run = opened(folder)
    config = settings(run)[1]
    rounds = finished_rounds(folder, config.rounds, wanted.round)
    return RunArms(folder, run, config, measured_trait(run), rounds, wanted.gate)


def _answers(of: RunArms, names: tuple[str, ...], prompts: list[HeldOut], kept: Kept) -> list[Rated]:
    """The answers of some arms, not yet rated."""
    found, arms = [], of.arms
    for name in names:
        texts = of.answers(arms[name], [prompt.text for prompt in prompts], kept)
        for prompt, text in zip(prompts, texts, strict=True):
            found.append(Rated(arm=name, prompt=prompt.text, everyday=prompt.everyday, text=text))
    return found


def rate(judge: KeptJudge, trait: Trait, answers: list[Rated], label: str) -> list[Rated]:
    """The answers with the judge's ratings."""
    ratings = _ratings(judge, trait, answers, label, 1)
    return [
        replace(one, rating=rating, failure=None if rating else "the judge gave no rating")
        for one, rating in zip(answers, ratings, strict=True)
    ]


def rate_again(judge: KeptJudge, trait: Trait, rated: list[Rated], seed: int) -> list[Rated]:
    """The answers, a random tenth of those that are rated with a second rating."""
    done = [i for i, one in enumerate(rated) if one.rating]
    twice = random.Random(f"{seed} again").sample(done, math.ceil(len(done) / AGAIN))
    second = _ratings(judge, trait, [rated[i] for i in twice], "judge, again", 2)
    found = dict(zip(twice, second, strict=True))
    return [replace(one, again=found.get(i)) for i, one in enumerate(rated)]


def _ratings(judge: KeptJudge, trait: Trait, answers: list[Rated], label: str, reading: int) -> list[Rating | None]:
    questions = [rating_question(trait, one.prompt, one.text) for one in answers]
    found = _asked(judge, questions, label, reading)
    return [values and _rating(values) for values in found]


def _rating(values: dict[str, int | str]) -> Rating:
    return Rating(float(values["trait"]), float(values["coherence"]), float(values["answered"] == "yes"))


def _asked(judge: KeptJudge, questions: list[Question], label: str, reading: int = 1) -> list[dict | None]:
    with progress(label, len({question.text for question in questions}), "question") as done:
        return judge.answers(questions, done, reading)


def compare(judge: KeptJudge, trait: Trait, rated: list[Rated]) -> list[Compared]:
    """The student's answers beside those of base and of plain steering, each pair in both orders.

    Two answers with the same text are a tie, which nobody is asked about.
    """
    texts = {(one.arm, one.prompt): one.text for one in rated}
    pairs = [(one, texts[STUDENT, one.prompt], one.text) for one in rated if one.arm in ("base", EQUAL_COST)]
    apart = [pair for pair in pairs if pair[1] != pair[2]]
    orders: list[Callable[[str, str], tuple[str, str]]] = [lambda a, b: (a, b), lambda a, b: (b, a)]
    questions = [
        choice_question(trait, one.prompt, *order(own, other)) for one, own, other in apart for order in orders
    ]
    choices = iter(_asked(judge, questions, "judge, pairs") if questions else [])
    tie = {"trait": "same", "answered": "same"}
    return [
        compared(one.arm, one.prompt, one.everyday, (next(choices), next(choices)) if own != other else (tie, tie))
        for one, own, other in pairs
    ]
