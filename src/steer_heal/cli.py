"""The verbs of the command line."""

from __future__ import annotations

import errno
import io
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro
from loguru import logger
from tyro.conf import Positional

from steer_heal.config import EvalConfig, ModelConfig, RunConfig, UserError, check, nearest
from steer_heal.presets import DEFAULT_PRESET, PRESETS
from steer_heal.terminal import condensed, harmless, program

EVERYTHING = EvalConfig()
INTERRUPTED = 130  # the shell's code for Ctrl-C
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `steer-heal`. Exit code 2 and one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"steer-heal {version('steer_heal')}")
        return
    _log_above_bars()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    shared: list[str] = []
    if argv[:1] == ["sweep"] and "--" in argv:  # what all runs of a sweep share
        cut = argv.index("--")
        argv, shared = argv[:cut], argv[cut + 1 :]
    live, sys.stderr = sys.stderr, io.StringIO()  # until a verb begins, only tyro's complaints are written to it
    try:
        app(argv, *_chosen(argv), shared, live).cli(args=argv, prog="steer-heal")
    except SystemExit:
        if sys.stderr is live:
            raise
        misread, sys.stderr = sys.stderr.getvalue(), live
        if misread:
            print(f"steer-heal: {harmless(condensed(misread))}", file=sys.stderr)
        raise
    except UserError as error:
        sys.stderr = live
        print(f"steer-heal: {harmless(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print("; ".join(["steer-heal: stopped", *map(str, stopped.args)]), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # of `steer-heal results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        print(f"steer-heal: cannot write {error.filename or 'to the disk'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.stderr = live


def _chosen(argv: list[str]) -> tuple[str, RunConfig]:
    """The preset named after `run` and its config, or those that the run after --resume was started with.

    Their values are the defaults of the flags.
    """
    if argv[:1] != ["run"]:
        return DEFAULT_PRESET, PRESETS[DEFAULT_PRESET]
    named = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else None
    if named is not None and named not in PRESETS:
        raise UserError(_unknown_preset(named))
    folder = _value_of("--resume", argv)
    if folder is not None and "config.json" not in argv:  # with --recompute config.json the flags say it
        from steer_heal.runs.resume import started

        return started(Path(folder), named)
    return named or DEFAULT_PRESET, PRESETS[named or DEFAULT_PRESET]


def _value_of(flag: str, argv: list[str]) -> str | None:
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag and following:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def _unknown_preset(name: str) -> str:
    return f"preset {name!r} is not known{nearest(name, PRESETS)}: choose {', '.join(PRESETS)}"


def _check_files(**files: str | None) -> None:
    """Before the work: raise UserError for a file that cannot be put where it is wanted."""
    for flag, file in files.items():
        if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            wrong = "is a folder" if Path(file).is_dir() else f"there is no folder {str(Path(file).parent)!r}"
            raise UserError(f"--{flag} {file!r}: {wrong}: give a file in a folder that exists")


def _check_gate(gate: float) -> None:
    if not math.isfinite(gate):
        raise UserError(f"--gate is {gate}: give a number, 0 for the base, 1 for the student")


def _log_above_bars() -> None:
    """Log lines go through tqdm, so that a bar survives them."""
    from tqdm import tqdm

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft calls old names
    logger.remove()
    logger.configure(patcher=lambda record: record.update(message=harmless(record["message"])))
    logger.add(
        lambda line: tqdm.write(line, end="", file=sys.stderr),
        format="<green>{time:HH:mm:ss}</green> <level>{message}</level>",
        colorize=sys.stderr.isatty(),
    )


def app(
    argv: list[str], chosen: str, defaults: RunConfig, shared: list[str], live: io.TextIOBase
) -> tyro.extras.SubcommandApp:
    """The verbs; `run` has the chosen preset and its flags these defaults, `shared` are those of a whole sweep.

    A verb writes to the `live` stderr.
    """
    verbs = tyro.extras.SubcommandApp()

    def command(verb: Callable | None = None, *, name: str | None = None) -> Callable:
        if verb is None:
            return lambda verb: command(verb, name=name)

        @wraps(verb)
        def begun(*args, **kwargs) -> None:
            sys.stderr = live
            verb(*args, **kwargs)

        return verbs.command(begun, name=name)

    @command
    def run(
        preset: Positional[Annotated[str, tyro.conf.arg(help=f"one of {', '.join(PRESETS)}")]] = chosen,
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = defaults,
    ) -> None:
        """Steer, distil, heal and bake a trait into a model, round after round.

        Example: steer-heal run smollm2-135m --trait mine.toml --rounds 4 --seed 1
        """
        from steer_heal.commands.run import run as carry_out
        from steer_heal.report import page as reporting

        if preset != chosen:
            raise UserError(f"the preset comes first: steer-heal run {preset} ...")
        folder, summary = carry_out(config, preset, argv)
        page = reporting.build(folder.path)
        print(
            f"done in {summary.seconds / 60:.1f} minutes of stages. The report: {page}\n\n"
            "What to do next:\n"
            f"  1. talk to it, base and student side by side:  {program()} chat {folder.path}\n"
            f"  2. load it without steer-heal:  PeftModel.from_pretrained(base_model, '{folder.path}/adapter')\n"
            f"  3. steer another trait, in your own .toml (see README):  {program()} run {preset} --trait mine.toml"
        )

    @command
    def sweep(
        name: Positional[str],
        grid: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
        seeds: str = "0",
        hypothesis: str = "",
        engine: Literal["local", "ray"] = "local",
        cpus: int | None = None,
        gpus: float = 0.0,
        workers: int | None = None,
        address: str | None = None,
        out: str = "outputs",
    ) -> None:
        """Many runs: a grid over flags times seeds. The same command again goes on with what is not finished.

        Example: steer-heal sweep agg --grid heal.agg=mean,rmse --seeds 41,42 -- smollm2-135m --rounds 2

        Args:
            name: of the sweep, a folder under --out.
            grid: FLAG=VALUE,VALUE of `run`, once a dimension; a pair of numbers is written 0.4+0.6.
            seeds: seeds of every arm, with commas.
            hypothesis: one sentence that the sweep is to support or refute; `results` shows it above the arms.
            engine: local: one after another on this machine; ray: tasks on a cluster, or on a Ray started here.
            cpus: threads of a run (ray: CPUs that it reserves); all of this machine when not given.
            gpus: ray: GPUs that a run reserves, e.g. 1 or 0.5.
            workers: ray started here: runs at once.
            address: of a Ray cluster, e.g. auto.
            out: folder that holds sweeps.
        """
        from os import cpu_count

        from steer_heal.sweep.plan import plan, seed_list
        from steer_heal.sweep.run import sweep as carry_out

        if (cpus is not None and cpus < 1) or (workers is not None and workers < 1) or gpus < 0:
            raise UserError(f"--cpus is {cpus}, --workers {workers}, --gpus {gpus}: 1 or more, 1 or more, 0 or more")
        threads = cpus or cpu_count()
        asked = plan(name, grid, seed_list(seeds), tuple(shared), Path(out), hypothesis)
        failed = carry_out(asked, engine, threads, gpus, address, workers)
        print(f"the arms as a table:  {program()} results --out {out}")
        sys.exit(1 if failed else 0)

    @command(name="eval")
    def evaluate(
        target: Positional[str],
        round: int | None = None,
        gate: float = 1.0,
        trait: str | None = None,
        json: str | None = None,
        base: str = "",
        quant: Literal["none", "nf4"] = "none",
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        eval: EvalConfig = EVERYTHING,
    ) -> None:
        """The instruments alone: base, both personas as prompts and, of an adapter or a run, the student.

        Example: steer-heal eval outputs/RUN --round 0 --json round0.json

        Args:
            target: a run folder, a PEFT adapter's folder, or a model (hub id, folder, .gguf, smollm2-135m).
            round: of a run: the student after this round (from 0); the last finished one when not given.
            gate: how much of the adapter acts: 0 is the base, 1 the student.
            trait: built-in trait or .toml file; of a run its own, else love.
            json: file for every figure with its interval.
            base: of an adapter: its base model, when the one it names is not the one to load.
            quant: of a model or adapter: nf4 holds the base in 4 bits. A run is loaded as it was made.
            dtype: of a model or adapter: type of the weights that are not quantised.
            device: of a model or adapter.
            eval: how much of every instrument is read.
        """
        from json import dumps

        from steer_heal.commands.evaluate import evaluate_alone
        from steer_heal.eval.foundations import check_profile

        _check_files(json=json)
        _check_gate(gate)
        check(RunConfig(eval=eval))
        check_profile(eval)
        model = ModelConfig(base, quant, dtype, device)
        record = evaluate_alone(target, round, gate, trait, model, eval)
        if json is not None:
            Path(json).write_text(dumps(record, indent=1), "utf-8")

    @command
    def results(
        out: str = "outputs",
        by: tuple[str, ...] = (),
        rounds: bool = False,
        csv: str | None = None,
        json: str | None = None,
        markdown: str | None = None,
        html: str | None = None,
    ) -> None:
        """All runs under a folder: one row a run, and every sweep's arms under its hypothesis.

        Example: steer-heal results --by heal.agg heal.tau --markdown table.md

        Args:
            out: the folder that holds run folders.
            by: flags of `run`: one row for each of their values, mean and interval over the seeds.
            rounds: one row a round: the arms, the student against each, and what it cost; and of every sweep the
                differences between its arms after each round.
            csv: file for the table.
            json: file for the table.
            markdown: file for the table.
            html: file for a page with the figures, means and intervals over the seeds.
        """
        from steer_heal.sweep import results as listing

        _check_files(csv=csv, json=json, markdown=markdown, html=html)
        listing.show(Path(out), by, rounds, csv, json, markdown, html)

    @command
    def report(run: Positional[str]) -> None:
        """Rebuild report.html and diary.md of a run folder, finished or not.

        Example: steer-heal report outputs/RUN

        Args:
            run: the run folder.
        """
        from steer_heal.report import page as reporting

        print(reporting.build(Path(run)))

    @command
    def export(run: Positional[str], to: str, merge: bool = False, round: int | None = None) -> None:
        """Write a run's result for others to load: a PEFT adapter, or with --merge a whole model.

        Both hold a README that says what it is, what was measured and how it was made.

        Example: steer-heal export outputs/RUN --to my-model --merge

        Args:
            run: the run folder.
            to: the folder to write, new or empty.
            merge: a float model that plain transformers loads, instead of an adapter.
            round: the student after this round (from 0); the last one when not given.
        """
        from steer_heal.commands.export import export as write

        write(Path(run), Path(to), round, merge)
        print(f"written: {to}")

    @command
    def chat(run: Positional[str], round: int | None = None, gate: float = 1.0, max_new_tokens: int = 128) -> None:
        """Talk to a run's result: base and student answer side by side, streamed; /help lists the commands.

        Example: steer-heal chat outputs/RUN --gate 0.5

        Args:
            run: the run folder.
            round: the student after this round (from 0); the last finished one when not given.
            gate: how much of the student: 0 is the base, 1 healed.
            max_new_tokens: length limit of an answer, tokens.
        """
        from steer_heal.commands.chat import chat as talk

        _check_gate(gate)
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {max_new_tokens}: it must be 1 or more")
        talk(Path(run), gate, max_new_tokens, round)

    @command
    def bench(
        what: Positional[Literal["generate", "heal", "filter", "eval"]],
        preset: str = "smollm2-135m",
        rows: int = 64,
        tokens: int = 64,
        json: str | None = None,
        figure: str | None = None,
    ) -> None:
        """Side-by-side measurements on this machine, printed, and with --json in a file.

        Example: steer-heal bench heal --json heal.json

        Args:
            what: generate: steered sampling one row at a time against one batch. heal: a training step with full
                logits, plain fine-tuning and ours, and what folded rounds cost. eval: the instruments against a plain
                loop with one forward pass an item and answer. filter: precision and recall on labelled completions.
            preset: whose model is measured (heal has its own).
            rows: generate: completions.
            tokens: generate: length of a completion, tokens.
            json: file for the figures.
            figure: filter: .html file for precision and recall over the threshold.
        """
        from json import dumps

        from steer_heal.bench import decode, filter, heal
        from steer_heal.bench import eval as instruments

        if preset not in PRESETS:
            raise UserError(_unknown_preset(preset))
        if rows < 1 or tokens < 1:
            raise UserError(f"--rows is {rows} and --tokens {tokens}: both must be 1 or more")
        _check_files(json=json, figure=figure)
        match what:
            case "generate":
                measured = decode.generate(preset, rows, tokens)
            case "heal":
                measured = heal.heal()
            case "filter":
                measured = filter.filter(preset)
            case "eval":
                measured = instruments.instruments_bench(preset)
        if json is not None:
            Path(json).write_text(dumps(measured, indent=1), "utf-8")
        if figure is not None and what == "filter":
            from steer_heal.report.figures import threshold_figure

            threshold_figure(measured["sweep"]).write_html(figure, include_plotlyjs=True)
        print(dumps({key: value for key, value in measured.items() if key != "sweep"}, indent=1))

    return verbs


if __name__ == "__main__":
    main()
