"""The verbs of the command line."""

from __future__ import annotations

import difflib
import shlex
import signal
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro
from loguru import logger
from tyro.conf import Positional

from steer_heal.config import DEFAULT_PRESET, PRESETS, EvalConfig, ModelConfig, RunConfig, UserError, check

EVERYTHING = EvalConfig()
INTERRUPTED = 130  # the shell's code for Ctrl-C


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
    try:
        app(_chosen_preset(argv), shared).cli(args=argv, prog="steer-heal")
    except UserError as error:
        print(f"steer-heal: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("steer-heal: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _self() -> str:
    """How this program was called, for commands that can be copied."""
    return f"{sys.executable} -m steer_heal.cli" if sys.argv[0].endswith(".py") else sys.argv[0]


def _chosen_preset(argv: list[str]) -> str:
    """The preset named after `run`; its values are the defaults of the flags."""
    if len(argv) < 2 or argv[0] != "run" or argv[1].startswith("-"):
        return DEFAULT_PRESET
    if argv[1] not in PRESETS:
        raise UserError(_unknown_preset(argv[1]))
    return argv[1]


def _unknown_preset(name: str) -> str:
    close = difflib.get_close_matches(name, PRESETS, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"preset {name!r} is not known{hint}: choose {', '.join(PRESETS)}"


def _log_above_bars() -> None:
    """Log lines go through tqdm, so that a bar survives them."""
    from tqdm import tqdm

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft calls old names
    logger.remove()
    logger.add(
        lambda line: tqdm.write(line, end="", file=sys.stderr),
        format="<green>{time:HH:mm:ss}</green> <level>{message}</level>",
        colorize=sys.stderr.isatty(),
    )


def app(chosen: str, shared: list[str]) -> tyro.extras.SubcommandApp:
    """The verbs; flags of `run` default to the values of the chosen preset, `shared` are those of a whole sweep."""
    verbs = tyro.extras.SubcommandApp()

    @verbs.command
    def run(
        preset: Positional[Annotated[str, tyro.conf.arg(help=f"one of {', '.join(PRESETS)}")]] = chosen,
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = PRESETS[chosen],
    ) -> None:
        """Steer, distil, heal and bake a trait into a model, round after round.

        Example: steer-heal run smollm2-135m --trait mine.toml --rounds 4 --seed 1
        """
        from steer_heal import data, lite, loop, rundir
        from steer_heal import report as reporting
        from steer_heal.foundations import check_profile
        from steer_heal.heal import check_optimiser
        from steer_heal.loading import load
        from steer_heal.tracking import check_tracker, follower

        if preset != chosen:
            raise UserError(f"the preset comes first: steer-heal run {preset} ...")
        check(config)
        trait = data.load_trait(config.trait)
        if config.steer.method.startswith(lite.PREFIX):
            lite.check_method(config.steer.method)
        check_profile(config.eval)
        check_tracker(config.track)
        folder = rundir.reopen(config, trait) if config.resume else None
        lm = load(config.model)  # before a folder is made: a model that cannot be loaded leaves nothing behind
        check_optimiser(config.heal, lm.device)
        folder = folder or rundir.create(config, preset, trait)
        folder.follow = follower(config.track, folder.path.name, rundir.described(config))
        try:
            summary = loop.run(config, preset, folder, trait, lm)
        except UserError as error:
            raise UserError(f"{error}. What is done is kept in {folder.path}") from error
        except KeyboardInterrupt:
            again = f"{_self()} {shlex.join([*folder.first_argv(), '--resume', str(folder.path)])}"
            print(f"\nstopped; what is done is kept. Go on with:  {again}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        page = reporting.build(folder.path)
        print(
            f"done in {summary['seconds'] / 60:.1f} minutes of stages. The report: {page}\n\n"
            "What to do next:\n"
            f"  1. talk to it, base and student side by side:  {_self()} chat {folder.path}\n"
            f"  2. load it without steer-heal:  PeftModel.from_pretrained(base_model, '{folder.path}/adapter')\n"
            f"  3. steer another trait, in your own .toml (see README):  {_self()} run {preset} --trait mine.toml"
        )

    @verbs.command
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

        from steer_heal import sweep as sweeping

        threads = cpus or cpu_count()
        asked = sweeping.plan(name, grid, sweeping.seed_list(seeds), tuple(shared), Path(out), hypothesis)
        failed = sweeping.sweep(asked, engine, threads, gpus, address, workers)
        print(f"the arms as a table:  {_self()} results --out {out}")
        sys.exit(1 if failed else 0)

    @verbs.command(name="eval")
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

        from steer_heal.alone import evaluate_alone
        from steer_heal.foundations import check_profile

        check_profile(eval)
        model = ModelConfig(base, quant, dtype, device)
        record = evaluate_alone(target, round, gate, trait, model, eval)
        if json is not None:
            Path(json).write_text(dumps(record, indent=1), "utf-8")

    @verbs.command
    def results(
        out: str = "outputs",
        by: tuple[str, ...] = (),
        csv: str | None = None,
        json: str | None = None,
        markdown: str | None = None,
    ) -> None:
        """All runs under a folder: one row a run, and every sweep's arms under its hypothesis.

        Example: steer-heal results --by heal.agg heal.tau --markdown table.md

        Args:
            out: the folder that holds run folders.
            by: flags of `run`: one row for each of their values, mean and interval over the seeds.
            csv: file for the table.
            json: file for the table.
            markdown: file for the table.
        """
        from steer_heal import results as listing

        listing.show(Path(out), by, csv, json, markdown)

    @verbs.command
    def report(run: Positional[str]) -> None:
        """Rebuild report.html and diary.md of a run folder, finished or not.

        Example: steer-heal report outputs/RUN

        Args:
            run: the run folder.
        """
        from steer_heal import report as reporting

        if not (Path(run) / "config.json").is_file():
            raise UserError(f"{run!r} is no run folder: it has no config.json")
        print(reporting.build(Path(run)))

    @verbs.command
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
        from steer_heal.export import export as write

        write(Path(run), Path(to), round, merge)
        print(f"written: {to}")

    @verbs.command
    def chat(run: Positional[str], round: int | None = None, gate: float = 1.0, max_new_tokens: int = 128) -> None:
        """Talk to a run's result: base and student answer side by side, streamed; /help lists the commands.

        Example: steer-heal chat outputs/RUN --gate 0.5

        Args:
            run: the run folder.
            round: the student after this round (from 0); the last finished one when not given.
            gate: how much of the student: 0 is the base, 1 healed.
            max_new_tokens: length limit of an answer, tokens.
        """
        from steer_heal.chat import chat as talk

        talk(Path(run), gate, max_new_tokens, round)

    @verbs.command
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

        from steer_heal import bench as measuring
        from steer_heal import evalbench, healbench

        if preset not in PRESETS:
            raise UserError(_unknown_preset(preset))
        match what:
            case "generate":
                measured = measuring.generate(preset, rows, tokens)
            case "heal":
                measured = healbench.heal()
            case "filter":
                measured = measuring.filter(preset)
            case "eval":
                measured = evalbench.instruments_bench(preset)
        if json is not None:
            Path(json).write_text(dumps(measured, indent=1), "utf-8")
        if figure is not None and what == "filter":
            from steer_heal.figures import threshold_figure

            threshold_figure(measured["sweep"]).write_html(figure, include_plotlyjs=True)
        print(dumps({key: value for key, value in measured.items() if key != "sweep"}, indent=1))

    return verbs


if __name__ == "__main__":
    main()
