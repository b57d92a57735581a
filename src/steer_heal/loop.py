"""The loop: steer, distil, heal, bake, and again from the student.

The only module that knows the order of the stages. What a stage does is in `stages`: it computes its artefact or, in a
resumed run, loads it.
"""

from __future__ import annotations

import time

from loguru import logger

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.config import RunConfig
from steer_heal.distil.sample import Exhausted
from steer_heal.eval.arms import Arm
from steer_heal.eval.summary import barrier_warning, demo_rows, headline, last_verdict, peak_memory, summarise
from steer_heal.model.lm import LM
from steer_heal.report.card import model_card
from steer_heal.report.tables import arm_table, verdict_line
from steer_heal.runs.folder import RunDir
from steer_heal.stages import (
    anchor_stage,
    base_stage,
    distil_stage,
    dose_stage,
    equal_stages,
    extract_stage,
    fold,
    geometry_stage,
    heal_stage,
    measure,
    negative_stage,
    plain_stage,
    with_batch_size,
)


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
    folder.replace_text("adapter/README.md", model_card(summary, *described, folder.first_argv, len(rounds)))
    folder.event("done", wall_seconds=time.perf_counter() - began)
    return summary
