"""The verbs of the command line: the flags of each, and the function that carries it out."""

from __future__ import annotations

import errno
import math
import os
import shlex
import signal
import sys
import warnings
from dataclasses import dataclass, field, replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

from loguru import logger
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from steer_heal import VERSION, flags
from steer_heal.commands.preset import flag_value, unknown_preset, with_preset
from steer_heal.config import EvalConfig, ModelConfig, RunConfig, UserError, check
from steer_heal.presets import DEFAULT_PRESET, MODELS_TOO, PRESETS
from steer_heal.processor import processor
from steer_heal.terminal import harmless, program, take_any_text

INTERRUPTED = 130  # the shell's code for Ctrl-C
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `steer-heal`. An error that the user can fix prints one line and exits with code 2."""
    argv = sys.argv[1:] if argv is None else argv
    take_any_text()
    _log_above_bars()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # treat a scheduler's stop as Ctrl-C
    try:
        carry_out(argv)
    except UserError as error:
        print(f"steer-heal: {harmless(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print("; ".join(["steer-heal: stopped", *map(str, stopped.args)]), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # e.g. in `steer-heal results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            name = harmless(str(error.filename)[:60])
            print(f"steer-heal: {name}... is longer than the file system allows: give a shorter path", file=sys.stderr)
            sys.exit(2)
        if error.errno not in CANNOT_WRITE:
            raise
        print(f"steer-heal: cannot write {error.filename or 'to the disk'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def carry_out(argv: list[str]) -> None:
    """Read the command line and carry out its verb.

    Raises UserError for an error that the user can fix.
    """
    if argv == ["--version"]:
        print(f"steer-heal {VERSION}")
        return
    said, argv = with_preset(argv)
    shared: list[str] = []
    if argv[:1] == ["sweep"] and "--" in argv:
        cut = argv.index("--")
        argv, shared = argv[:cut], argv[cut + 1 :]
    if argv[:1] == ["run"] and {"--help", "-h"} & {*argv}:
        argv = [word for word in argv if word not in ("--help", "-h")]
        flags.short_help(_chosen(argv).config)
    argv = ["--help" if word == "--help-all" else word for word in argv]
    chosen = _chosen(argv)
    asked = flags.read(_verbs(chosen), argv, "steer-heal")
    match asked:
        case Run() if asked.preset != chosen.preset:
            raise UserError(f"the preset comes first: steer-heal run {asked.preset} ...")
        case Run():
            if said:
                logger.info(said)
            run(asked, argv)
        case Sweep():
            sweep(asked, tuple(shared))
        case Eval():
            evaluate(asked)
        case Results():
            results(asked)
        case Report():
            report(asked)
        case Export():
            export(asked)
        case Chat():
            chat(asked)
        case TraitVerb():
            trait(asked)
        case Bench():
            bench(asked)


def _chosen(argv: list[str]) -> Run:
    """Return the preset named after `run` and its config, or, with --resume, those of the run to resume.

    The config's values are the defaults of the flags.
    """
    if argv[:1] != ["run"]:
        return Run()
    named = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else None
    if named is not None and named not in PRESETS:
        raise UserError(f"{unknown_preset(named)}; or give {MODELS_TOO}")
    folder = flag_value("--resume", argv)
    if folder is not None and "config.json" not in argv:  # with --recompute config.json the flags give the config
        from steer_heal.runs.resume import started

        return Run(*started(Path(folder), named))
    return Run(named or DEFAULT_PRESET, PRESETS[named or DEFAULT_PRESET])


def _check_files(**files: str | None) -> None:
    """Raise UserError, before the work, for an output file that is a folder or is in a folder that does not exist."""
    for flag, file in files.items():
        if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            wrong = "is a folder" if Path(file).is_dir() else f"there is no folder {str(Path(file).parent)!r}"
            raise UserError(f"--{flag} {file!r}: {wrong}: give a file in a folder that exists")


def _check_gate(gate: float) -> None:
    if not math.isfinite(gate):
        raise UserError(f"--gate is {gate}: give a number, 0 for the base, 1 for the student")


def _log_above_bars() -> None:
    """Write log lines through tqdm, so that they do not break a progress bar."""
    from tqdm import tqdm

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft calls deprecated names
    logger.remove()
    logger.configure(patcher=lambda record: record.update(message=harmless(record["message"])))
    logger.add(
        lambda line: tqdm.write(line, end="", file=sys.stderr),
        format="<green>{time:HH:mm:ss}</green> <level>{message}</level>",
        colorize=sys.stderr.isatty(),
    )


@dataclass(frozen=True)
class Run:
    """Steer, distil, heal and bake a trait into a model, round after round.

    Example: steer-heal run smollm2-135m --trait mine.toml --rounds 4 --seed 1
    """

    preset: Positional[Annotated[str, arg(help=f"one of {', '.join(PRESETS)}; or {MODELS_TOO}")]] = DEFAULT_PRESET
    config: Annotated[RunConfig, arg(name="")] = PRESETS[DEFAULT_PRESET]


def run(asked: Run, argv: list[str]) -> None:
    from steer_heal.commands.run import run as do
    from steer_heal.report import page as reporting

    folder, summary = do(asked.config, asked.preset, argv)
    page, path = reporting.build(folder.path), shlex.quote(str(folder.path))
    model = asked.config.model.path
    same = [] if model == PRESETS[asked.preset].model.path else ["--model.path", model]
    again = shlex.join([asked.preset, *same])
    print(
        f"done in {summary.seconds / 60:.1f} minutes of stages. The report: {page}\n\n"
        "What to do next:\n"
        f"  1. talk to it, base and student side by side:  {program()} chat {path}\n"
        f"  2. load it without steer-heal:  PeftModel.from_pretrained(base_model, {str(folder.path / 'adapter')!r})\n"
        f"  3. steer another trait, in your own .toml (see README):  {program()} run {again} --trait mine.toml"
    )


@dataclass(frozen=True)
class Sweep:
    """Many runs: a grid over flags times seeds. The same command again continues the runs that are not finished.

    Example: steer-heal sweep agg --grid heal.barrier.agg=mean,rmse --seeds 41,42 -- smollm2-135m --rounds 2
    """

    name: Positional[str]
    """name of the sweep and of its folder under --out"""
    grid: UseAppendAction[tuple[str, ...]] = ()
    """a flag of `run` and its values, FLAG=VALUE,VALUE; once per dimension; a pair of numbers is written 0.4+0.6"""
    seeds: str = "0"
    """seeds of every arm, separated by commas"""
    hypothesis: str = ""
    """one sentence that the sweep is to support or refute; `results` shows it above the arms"""
    engine: Literal["local", "ray"] = "local"
    """local: one run after another on this machine; ray: tasks on a cluster, or on a Ray started here"""
    cpus: int | None = None
    """threads per run (ray: CPUs that a run reserves); default: all of this machine"""
    gpus: float = 0.0
    """ray: GPUs that a run reserves, e.g. 1 or 0.5"""
    workers: int | None = None
    """ray started here: number of runs at once"""
    address: str | None = None
    """ray: address of the cluster, e.g. auto"""
    out: str = "outputs"
    """folder that holds sweeps"""


def sweep(asked: Sweep, shared: tuple[str, ...]) -> None:
    """`shared` are the preset and the flags of all runs."""
    from steer_heal.sweep.plan import plan, seed_list
    from steer_heal.sweep.run import sweep as do

    cpus, gpus, workers = asked.cpus, asked.gpus, asked.workers
    if (cpus is not None and cpus < 1) or (workers is not None and workers < 1) or gpus < 0:
        raise UserError(f"--cpus is {cpus}, --workers {workers}, --gpus {gpus}: 1 or more, 1 or more, 0 or more")
    planned = plan(asked.name, asked.grid, seed_list(asked.seeds), shared, Path(asked.out), asked.hypothesis)
    failed = do(planned, asked.engine, cpus or os.cpu_count(), gpus, asked.address, workers)
    print(f"the arms as a table:  {program()} results --out {shlex.quote(asked.out)}")
    sys.exit(1 if failed else 0)


@dataclass(frozen=True)
class Eval:
    """Read the instruments alone: on base, both personas as prompts and, for an adapter or a run, the student.

    Example: steer-heal eval outputs/RUN --round 0 --json round0.json
    """

    target: Positional[str]
    """a run folder, a PEFT adapter's folder, or a model (hub id, folder, .gguf, smollm2-135m)"""
    round: int | None = None
    """for a run: the student after this round (from 0); default: the last finished round"""
    gate: float = 1.0
    """scale of the adapter: 0 is the base, 1 the student"""
    trait: str | None = None
    """built-in trait or .toml file; default: the run's own trait, else love"""
    json: str | None = None
    """file for every figure with its interval"""
    base: str = ""
    """for an adapter: the base model to load instead of the one that the adapter names"""
    quant: Literal["none", "nf4"] = "none"
    """for a model or adapter: nf4 holds the base in 4 bits. A run is loaded as it was made"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """for a model or adapter: type of the weights that are not quantised"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """for a model or adapter"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """which instruments are read, and how many items of each"""


def evaluate(asked: Eval) -> None:
    from steer_heal.commands.evaluate import evaluate_alone
    from steer_heal.eval.foundations import check_profile
    from steer_heal.records import unstructured

    _check_files(json=asked.json)
    _check_gate(asked.gate)
    check(RunConfig(eval=asked.eval))
    check_profile(asked.eval)
    model = ModelConfig(asked.base, asked.quant, asked.dtype, asked.device)
    record = evaluate_alone(asked.target, asked.round, asked.gate, asked.trait, model, asked.eval)
    if asked.json is not None:
        Path(asked.json).write_text(dumps(unstructured(record), indent=1), "utf-8")


@dataclass(frozen=True)
class Results:
    """Show all runs under a folder: one row per run, and every sweep's arms under its hypothesis.

    Example: steer-heal results --by heal.barrier.agg heal.barrier.tau --markdown table.md
    """

    out: str = "outputs"
    """the folder that holds run folders"""
    by: tuple[str, ...] = ()
    """flags of `run`: one row for each of their values, with mean and interval over the seeds"""
    rounds: bool = False
    """one row per round: the arms, the student minus each, and the cost; for every sweep also the differences between
    its arms after each round"""
    csv: str | None = None
    """file for the table"""
    json: str | None = None
    """file for the table"""
    markdown: str | None = None
    """file for the table"""
    html: str | None = None
    """file for a page with the figures, means and intervals over the seeds"""


def results(asked: Results) -> None:
    from steer_heal.sweep import results as listing

    _check_files(csv=asked.csv, json=asked.json, markdown=asked.markdown, html=asked.html)
    files = listing.Files(asked.csv, asked.json, asked.markdown, asked.html)
    listing.show(Path(asked.out), asked.by, asked.rounds, files)


@dataclass(frozen=True)
class Report:
    """Rebuild report.html and diary.md of a run folder, finished or not.

    Example: steer-heal report outputs/RUN
    """

    run: Positional[str]
    """the run folder"""


def report(asked: Report) -> None:
    from steer_heal.report import page as reporting

    print(reporting.build(Path(asked.run)))


@dataclass(frozen=True)
class Export:
    """Write a run's result for others to load: a PEFT adapter, or with --merge a whole model.

    Both include a README with the description, the measurements and the command that made the run.

    Example: steer-heal export outputs/RUN --to my-model --merge
    """

    run: Positional[str]
    """the run folder"""
    to: str
    """the folder to write, new or empty"""
    merge: bool = False
    """write a float model that plain transformers loads, instead of an adapter"""
    round: int | None = None
    """the student after this round (from 0); default: the last finished round"""


def export(asked: Export) -> None:
    from steer_heal.commands.export import export as write

    write(Path(asked.run), Path(asked.to), asked.round, asked.merge)
    print(f"written: {asked.to}")


@dataclass(frozen=True)
class Chat:
    """Talk to a run's result: base and student answer side by side, streamed; /help lists the commands.

    Example: steer-heal chat outputs/RUN --gate 0.5
    """

    run: Positional[str]
    """the run folder"""
    round: int | None = None
    """the student after this round (from 0); default: the last finished round"""
    gate: float = 1.0
    """scale of the student's adapter: 0 is the base, 1 the student"""
    max_new_tokens: int = 128
    """length limit of an answer, tokens"""


def chat(asked: Chat) -> None:
    from steer_heal.commands.chat import chat as talk

    _check_gate(asked.gate)
    if asked.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {asked.max_new_tokens}: it must be 1 or more")
    talk(Path(asked.run), asked.gate, asked.max_new_tokens, asked.round)


@dataclass(frozen=True)
class TraitVerb:
    """Traits: `list` and `show` the built-in ones, begin a file with `new`, find what is wrong with one by `check`.

    Example: steer-heal trait check patient.toml --model smollm2-135m
    """

    action: Positional[Literal["list", "show", "new", "check"]]
    """list: the built-in traits. show: the file of one. new: write the smallest file. check: all problems of a file"""
    name: Positional[str] = ""
    """show: a built-in trait. new: the trait's name. check: a .toml file or a built-in trait"""
    model: str = ""
    """check: try the trait out on this model as well (hub id, folder, .gguf, smollm2-135m)"""
    quant: Literal["none", "nf4"] = "none"
    """check: nf4 holds that model in 4 bits"""


def trait(asked: TraitVerb) -> None:
    from steer_heal.commands import trait as traits

    if (asked.action == "list") == bool(asked.name):
        needs = "takes no name" if asked.name else "needs a name"
        raise UserError(f"trait {asked.action} {needs}: see steer-heal trait --help")
    if asked.model and asked.action != "check":
        raise UserError(f"--model {asked.model!r}: only `trait check` tries a trait out, leave it out")
    match asked.action:
        case "list":
            print(traits.listing())
        case "show":
            print(traits.show(asked.name), end="")
        case "new":
            print(traits.new(asked.name), end="")
        case "check":
            _check_trait(asked)


def _check_trait(asked: TraitVerb) -> None:
    from steer_heal.commands import trait as traits

    found = traits.check(asked.name)
    for line in found.problems:
        print(line)
    if found.problems:
        count = len(found.problems)
        raise UserError(f"{asked.name}: {count} problem{'s' * (count > 1)} to mend (above)")
    print("\n".join([f"{asked.name}: no problem found", *(f"advice: {line}" for line in found.advice)]))
    if asked.model:
        from steer_heal.commands.try_trait import try_out

        model = replace(PRESETS["auto"].model, path=asked.model, quant=asked.quant)
        print(try_out(found.trait, model, PRESETS["auto"].eval))


@dataclass(frozen=True)
class Bench:
    """Compare speed, memory or filter quality on this machine; print the figures, and with --json write them to a file.

    Example: steer-heal bench heal --json heal.json
    """

    what: Positional[Literal["demo", "generate", "heal", "filter", "eval"]]
    """demo: a whole run, its seconds until something is to be seen and of each stage. generate: steered sampling, one
    row at a time against one batch. heal: a training step with full logits, plain fine-tuning and ours, and the cost of
    folded rounds. eval: the instruments against a plain loop with one forward pass per item and answer. filter:
    precision and recall on labelled completions"""
    preset: str = "smollm2-135m"
    """preset whose model is measured (heal has its own models)"""
    rounds: int | None = None
    """demo: number of rounds; default: the preset's"""
    rows: int = 64
    """generate: number of completions"""
    tokens: int = 64
    """generate: length of a completion, tokens"""
    json: str | None = None
    """file for the figures"""
    figure: str | None = None
    """filter: .html file for precision and recall against the threshold"""


def bench(asked: Bench) -> None:
    if asked.preset not in PRESETS:
        raise UserError(unknown_preset(asked.preset))
    if asked.rows < 1 or asked.tokens < 1:
        raise UserError(f"--rows is {asked.rows} and --tokens {asked.tokens}: both must be 1 or more")
    _check_files(json=asked.json, figure=asked.figure)
    measured = _machine() | _measured(asked)
    if asked.json is not None:
        Path(asked.json).write_text(dumps(measured, indent=1), "utf-8")
    if asked.figure is not None and asked.what == "filter":
        from steer_heal.report.figures import threshold_figure

        threshold_figure(measured["sweep"]).write_html(asked.figure, include_plotlyjs=True)
    print(dumps({key: value for key, value in measured.items() if key != "sweep"}, indent=1))


def _machine() -> dict:
    """What a figure must be read with: the processor, its threads and the mode of its matrix products."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor().name,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "mkl_cbwr": os.environ["MKL_CBWR"],
    }


def _measured(asked: Bench) -> dict:
    from steer_heal.bench import decode, demo, filter, heal
    from steer_heal.bench import eval as instruments

    match asked.what:
        case "demo":
            return demo.demo(asked.preset, asked.rounds)
        case "generate":
            return decode.generate(asked.preset, asked.rows, asked.tokens)
        case "heal":
            return heal.heal()
        case "filter":
            return filter.filter(asked.preset)
        case "eval":
            return instruments.instruments_bench(asked.preset)


def _verbs(chosen: Run) -> Any:
    """Return the union of the verbs' dataclasses; the flags of `run` have the chosen preset's values as defaults."""
    return (
        Annotated[Run, subcommand("run", default=chosen)]
        | Annotated[Sweep, subcommand("sweep")]
        | Annotated[Eval, subcommand("eval")]
        | Annotated[Results, subcommand("results")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Chat, subcommand("chat")]
        | Annotated[TraitVerb, subcommand("trait")]
        | Annotated[Bench, subcommand("bench")]
    )


if __name__ == "__main__":
    main()
