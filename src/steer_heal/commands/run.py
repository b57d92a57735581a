"""The verb `run`: check the input, run the loop, and explain an early end."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

import torch

from steer_heal import data, loop
from steer_heal.config import FILE, ModelConfig, RunConfig, UserError, settled
from steer_heal.demands import check
from steer_heal.eval.foundations import check_profile
from steer_heal.eval.harness.record import Benchmarks
from steer_heal.eval.harness.tasks import load_tasks
from steer_heal.heal.train import check_optimiser
from steer_heal.model.lm import LM
from steer_heal.model.loading import load
from steer_heal.runs.environment import block_network, environment
from steer_heal.runs.folder import HARNESS, Damaged, RunDir
from steer_heal.runs.resume import as_recorded, check_place, create, described, reopened, require_surroundings, trait_of
from steer_heal.runs.summary import Summary
from steer_heal.runs.tracking import check_tracker, follower
from steer_heal.stages.run import Work
from steer_heal.steer import from_file, lite
from steer_heal.steer.personas import neighbours

# What can run out of memory, by the modules that do it; the first that fits counts.
PARTS = {
    "decoding": {"steer_heal.model.decode"},
    "training": {"steer_heal.heal.train"},
    "reading": {f"steer_heal.{m}" for m in ("model.forward", "model.answers", "model.likelihood", "heal.examples")},
}


def run(config: RunConfig, preset: str, argv: list[str], trait: data.Trait | None = None) -> tuple[RunDir, Summary]:
    """Start or resume a run; return its folder and summary. `argv` is the command line.

    A new run takes `trait` in place of the one that the config names.

    Raises UserError for what the user can fix, and KeyboardInterrupt, with the command to resume, when stopped.
    """
    folder, summary = _looped(config, preset, argv, trait)
    wanted, kept = config.eval.harness, folder.load(Benchmarks, HARNESS)
    if wanted and not (kept and kept.holds(wanted)):
        from steer_heal.commands.benchmark import Asked, Wanted, benchmark  # with it come the report's libraries
        from steer_heal.report.page import build

        build(folder.path)  # first: a benchmark that fails leaves a report behind
        student = Asked(str(folder.path), round=None, gate=1.0, trait=None, model=config.model)
        benchmark(student, Wanted(",".join(wanted), folder=None, items=None))
    return folder, summary


def _looped(config: RunConfig, preset: str, argv: list[str], trait: data.Trait | None) -> tuple[RunDir, Summary]:
    check(config)
    given, config = config.model.path, settled(config)
    as_words = (given, f"--model.path={given}")
    argv = [word.removesuffix(given) + config.model.path if word in as_words else word for word in argv]
    if config.steer.method.startswith(lite.PREFIX):
        lite.check_method(config.steer.method)
    check_profile(config.eval)
    if config.eval.harness:  # before hours of work
        load_tasks([*config.eval.harness], None)
    check_tracker(config.track)
    if not config.resume:
        if config.steer.method.startswith(FILE):
            from_file.read(config.steer.method)
        check_place(Path(config.out))
        trait = trait or data.load_trait(config.trait)
        neighbours(config.steer.without, trait)
        require_room(config, trait, argv)
        lm = loaded(config.model)  # before the folder is made: a model that cannot be loaded leaves no folder
        check_optimiser(config.heal.training, lm.device)
        folder = create(config, preset, trait, environment(lm), argv)
        with folder.held():
            return folder, loop_of(config, preset, folder, trait, lm)
    here = config.trait in data.BUILT_IN or Path(config.trait).expanduser().exists()
    given = data.load_trait(config.trait) if here else None
    with reopened(config, preset) as folder:
        trait = trait_of(folder, config, given)
        model = config.model
        if "env.json" not in config.recompute:
            env = folder.read("env.json")
            torch.set_num_threads(env["threads"])  # another number changes how sums are rounded
            model = as_recorded(model, env)
        lm = loaded(model)
        check_optimiser(config.heal.training, lm.device)
        require_surroundings(folder, config, environment(lm))
        folder.event("resume", argv=argv)
        return folder, loop_of(config, preset, folder, trait, lm)


def require_room(config: RunConfig, trait: data.Trait, argv: list[str]) -> None:
    """Raise UserError when the command line itself gives answers less room than the trait asks for."""
    given = any(word.partition("=")[0].replace("_", "-") == "--distil.max-new-tokens" for word in argv)
    limit = config.distil.max_new_tokens
    if given and trait.answer_limit(limit) > limit:
        raise UserError(
            f"--distil.max-new-tokens is {limit}, and the trait {trait.name!r} asks for answers of "
            f"{trait.answer_tokens} tokens (answer_tokens): leave the flag out, give as many, or change the trait"
        )


def loaded(config: ModelConfig) -> LM:
    try:
        return load(config)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if (wanted := _wanted(error)) is None:
            raise
        raise UserError(
            f"out of memory while loading {config.path} ({wanted} more were wanted): choose --model.quant nf4, "
            "--model.dtype bfloat16 or a smaller model"
        ) from error


def loop_of(config: RunConfig, preset: str, folder: RunDir, trait: data.Trait, lm: LM) -> Summary:
    """Run the loop. An error that ends it early names the command to resume."""
    if os.environ.get("STEER_HEAL_BLOCK_NETWORK") == "1":  # set by the fast-dev run: a loaded model needs no network
        block_network()
    folder.follow = follower(config.track, folder.path.name, described(config))
    try:
        return loop.run(Work.begun(config, preset, folder, trait, lm))
    except (Damaged, loop.Unmeasurable):
        raise
    except UserError as error:
        raise UserError(f"{error}. What is done is kept, go on with: {folder.resuming}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is done is kept, go on with: {folder.resuming}") from None
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if (wanted := _wanted(error)) is None:
            raise
        raise UserError(out_of_memory(folder, config, wanted, part_of(error))) from error


def _wanted(error: RuntimeError) -> str | None:
    """Return the memory that torch could not allocate, from its GPU or CPU message; None for any other error."""
    said = re.search(r"[Tt]ried to allocate ([\d.]+ (?:[KMG]iB|bytes))", str(error))
    return said and said[1]


def part_of(error: BaseException) -> str:
    """Return what was being computed when the error was raised, by the modules in its traceback; "" if none fits.

    One artefact needs several: a dose curve is decoded, then judged; an adapter is trained on states read before.
    """
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return next((part for part, of_part in PARTS.items() if modules & of_part), "")


def out_of_memory(folder: RunDir, config: RunConfig, wanted: str, part: str) -> str:
    """Return a message: where memory ran out, how much was wanted, and the command that resumes with less."""
    where = f"out of memory while making {folder.doing}{part and ', '}{part} ({wanted} more were wanted)"
    smaller = _smaller(folder, config, part)
    if not smaller:
        return (
            f"{where}, and no batch is left to make smaller: start a new run with a smaller --distil.max-new-tokens, "
            f"with --model.quant nf4 or with a smaller model. What is done is kept in {folder.path}"
        )
    flags = " ".join(f"--{key.replace('_', '-')} {value}".rstrip() for key, value in smaller.items())
    return f"{where}. What is done is kept, go on with: {folder.resuming} {flags} --allow-change {' '.join(smaller)}"


def _smaller(folder: RunDir, config: RunConfig, part: str) -> dict[str, int | str]:
    """Return flags that make this part of the work take less memory and give the same result."""
    training = config.heal.training
    match part:
        case "training" if training.pass_rows == 1:
            return {} if training.checkpointing else {"heal.training.checkpointing": ""}
        case "training":
            key, rows = "heal.training.pass_rows", training.pass_rows
        case "decoding":
            key, rows = "model.decode_rows", config.model.decode_rows
            rows = folder.read("decode_rows.json") if rows == "auto" else rows
        case "reading":
            key, rows = "model.read_rows", config.model.read_rows
        case _:
            return {}
    return {key: rows // 2} if rows > 1 else {}
