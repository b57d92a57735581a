"""The loop: steer, distil, heal, bake, and again from the student.

The only module that knows the order of the stages. What a stage does is in `stages`: it computes its artefact or, in a
resumed run, loads it.
"""

from __future__ import annotations

from loguru import logger

from steer_heal.distil.sample import Exhausted
from steer_heal.eval.summary import barrier_warning, headline, last_verdict
from steer_heal.report.card import model_card
from steer_heal.report.tables import arm_table, verdict_line
from steer_heal.runs.rounds import Round, folder_of
from steer_heal.stages import Baselines, Work


def run(work: Work) -> dict:
    """All rounds of a run; returns the summary that is also in summary.json."""
    baselines = work.baselines()
    anchors, rounds, plain, stopped = work.anchors(), [], [], ""
    for number in range(work.config.rounds):
        stage = work.round(number, rounds)
        vector, layers = stage.extract()
        plain = plain or work.steer_plainly(vector)
        try:
            dose = stage.find_dose(vector)
            completions = stage.distil(vector, dose)
        except Exhausted as end:
            if not rounds:
                raise
            stopped = str(end)
            logger.warning(f"the loop ends after {number} of {work.config.rounds} rounds: {end}")
            break
        steered = stage.measure_steered(vector, dose)
        steps = stage.heal(vector, completions, anchors)
        geometry = stage.locate(vector)
        stage.bake()
        healed = stage.measure_healed()
        equal_cost = stage.steer_at_equal_cost(plain, baselines.base, healed)
        done = Round(number, layers, dose, completions, steps, steered, healed, geometry, equal_cost, None)
        rounds.append(stage.ended(done, plain, baselines.base) if stage.last else done)
        announce(work, baselines, rounds)
    if stopped:
        rounds[-1] = work.round(len(rounds) - 1, rounds[:-1]).ended(rounds[-1], plain, baselines.base)
    return finish(work, baselines, plain, rounds, stopped)


def announce(work: Work, baselines: Baselines, rounds: list[Round]) -> None:
    """Say what the round came to: its arms, whether the barrier acted, the verdict."""
    done, config = rounds[-1], work.config
    opponents = [arm for arm in (done.equal_cost, done.equal_trait) if arm]
    table = arm_table(baselines.base, baselines.prompted, done.steered, *opponents, done.healed)
    print(f"\nround {done.index}\n{table}\n")
    barrier_warning(done.heal, config.heal)
    said = last_verdict(baselines._asdict(), rounds)
    logger.info(f"{folder_of(done.index)} verdict: {verdict_line(said, config.rounds - 1 - done.index)}")
    measures = {arm["arm"]: headline(arm) for arm in (baselines.base, baselines.prompted, done.steered, done.healed)}
    work.folder.event("round", round=done.index, verdict=said["word"], dose=done.dose["dose"], **measures)


def finish(work: Work, baselines: Baselines, plain: list[dict], rounds: list[Round], stopped: str) -> dict:
    """The student's adapter, the summary and the model card."""
    work.save_adapter()
    summary = work.summarise(baselines, plain, rounds, stopped)
    described = map(work.folder.read, ("config.json", "trait.json"))
    work.folder.replace_text("adapter/README.md", model_card(summary, *described, work.folder.first_argv, len(rounds)))
    work.note_end()
    return summary
