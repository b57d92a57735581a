"""The loop: steer, distil, heal, bake, and repeat from the student.

Only this module knows the order of the stages. The stages are in `stages`: each computes its artefact or, in a resumed
run, loads it.
"""

from __future__ import annotations

from dataclasses import replace

from loguru import logger

from steer_heal.config import Exhausted, UserError
from steer_heal.eval.instruments import dropped
from steer_heal.eval.reading import ArmReading, Survey
from steer_heal.eval.verdict import expressible
from steer_heal.heal.steps import barrier_warning
from steer_heal.report.card import Form, Made, model_card
from steer_heal.report.tables import arm_table, filter_text, first_look_text, recipe_table, verdict_line
from steer_heal.runs.recipe import choices
from steer_heal.runs.rounds import Round
from steer_heal.runs.summary import Baselines, Summary, verdict_of
from steer_heal.stages.round import RoundStages
from steer_heal.stages.run import Work


class Unmeasurable(UserError):
    """The trait's two personas do not score differently on its own instrument."""


def run(work: Work) -> Summary:
    """Do all rounds of a run; return the summary that is also in summary.json."""
    work = work.with_probes()
    first = look(work)
    arms, anchors, survey = work.baselines(first), work.anchors(), work.survey
    rounds: list[Round] = []
    stopped = ""
    for number in range(work.config.rounds):
        stage = RoundStages(work, number, rounds)
        try:
            vector, layers = stage.extract()
            if number == 0:
                arms = replace(arms, plain=work.steer_plainly(vector))
            dose = stage.find_dose(vector, layers)
            completions = stage.distil(vector, dose)
        except Exhausted as end:
            if number == 0:
                raise
            stopped = str(end)
            logger.warning(f"the loop ends after {number} of {work.config.rounds} rounds: {end}")
            break
        steered = stage.measure_steered(vector, dose)
        steps, own_answers = stage.heal(vector, dose, completions, anchors)
        geometry = stage.locate(vector)
        stage.bake()
        healed = stage.measure_healed()
        done = Round(
            number=number,
            layers=layers,
            dose=dose,
            completions=[*completions, *own_answers],
            steps=steps,
            steered=steered,
            geometry=geometry,
            healed=healed,
            equal_cost=stage.steer_at_equal_cost(arms, healed),
            equal_trait=None,
        )
        if stage.last:
            arms = work.baselines_in_full(arms)
            done = stage.read_fully(done, arms)
        rounds.append(done)
        stage.note_demos(arms.base, steered, healed)
        announce(work, arms, rounds, survey)
    if stopped:
        arms = work.baselines_in_full(arms)
        rounds[-1] = RoundStages(work, len(rounds) - 1, rounds[:-1]).read_fully(rounds[-1], arms)
    return finish(work, arms, rounds, stopped)


def look(work: Work) -> list[ArmReading]:
    """Show whether the trait can be measured on this model, and the base's first answers.

    Raises Unmeasurable, before anything is trained, when it cannot.
    """
    first = work.first_look()
    filtered = filter_text(*(dropped(arm.demos, work.config.filter) for arm in first[:2]))
    print(f"\n{first_look_text(work.trait, first)}\n{filtered}\n")
    if not (expressible(first, work.trait.instrument) or work.config.anyway):
        raise Unmeasurable(
            f"under its two personas this model does not score differently on the probes of {work.trait.name!r}: what "
            "is trained could not be measured. Write personas that differ more or other probes, take a larger model, "
            "or start again with --anyway"
        )
    return first


def announce(work: Work, arms: Baselines, rounds: list[Round], survey: Survey | None) -> None:
    """Report the last round: its arms, how often the barrier fired, the verdict; after the first, what was chosen."""
    done, left = rounds[-1], work.config.rounds - len(rounds)
    if done.number == 0 and (found := choices(work.config, survey, done)):
        print(f"\n{recipe_table(found)}")
    table = arm_table(arms.base, arms.prompted, done.steered, *done.opponents, done.healed)
    print(f"\nround {done.number}\n{table}\n")
    barrier_warning(done.steps, work.config.heal)
    verdict = verdict_of(done, arms)
    logger.info(f"{done.name} verdict: {verdict_line(verdict, left)}")
    figures = {arm.arm: headline(arm) for arm in (arms.base, arms.prompted, done.steered, done.healed)}
    if left:
        seconds = work.folder.stage_seconds()
        spent = sum(took for artefact, took in seconds.items() if artefact.startswith(f"{done.name}/"))
        print(f"Next: round {done.number + 1}. This one took {spent / 60:.0f} min, {left} to go.\n")
    work.folder.event("round", round=done.number, verdict=verdict.word, dose=done.dose.dose, **figures)


def headline(arm: ArmReading) -> dict[str, float]:
    """An arm in four numbers, for the run's events."""
    return {name: getattr(arm, name) for name in ("trait_nats", "answer_mass", "coherent_share", "neutral_ppl")}


def finish(work: Work, arms: Baselines, rounds: list[Round], stopped: str) -> Summary:
    """Write the student as one adapter, the summary and the model card."""
    work.save_adapter()
    summary = work.summarise(arms, rounds, stopped)
    config, trait = map(work.folder.read, ("config.json", "trait.json"))
    made = Made(summary=summary, config=config, trait=trait, argv=work.folder.first_argv, rounds=len(rounds))
    work.folder.replace_text("adapter/README.md", model_card(made, Form()))
    work.note_end()
    return summary
