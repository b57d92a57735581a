"""The verbs of the command line: the flags of each, and the function that carries it out."""

from __future__ import annotations

import errno
import math
import os
import shlex
import signal
import sys
import warnings
from dataclasses import fields, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from steer_heal import VERSION, flags
from steer_heal.commands.preset import chosen, unknown_preset, with_config, with_preset
from steer_heal.config import EvalConfig, ModelConfig, RunConfig, UserError
from steer_heal.demands import check
from steer_heal.presets import PRESETS
from steer_heal.processor import processor
from steer_heal.terminal import harmless, program, take_any_text
from steer_heal.verbs import Bench, Chat, Compare, Eval, Export, Report, Reproduce, Results, Run, Sweep, Trait, verbs

if TYPE_CHECKING:
    from steer_heal.data import Trait as TraitRecord
    from steer_heal.eval.harness.record import Benchmarks
    from steer_heal.eval.judge.record import Judged
    from steer_heal.eval.robustness import Robustness

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
    argv, recorded = with_config(argv)
    said, argv = with_preset(argv)
    shared: list[str] = []
    if argv[:1] == ["sweep"] and "--" in argv:
        cut = argv.index("--")
        argv, shared = argv[:cut], argv[cut + 1 :]
    if argv[:1] == ["run"] and {"--help", "-h"} & {*argv}:
        argv = [word for word in argv if word not in ("--help", "-h")]
        flags.short_help(chosen(argv).config)
    argv = ["--help" if word == "--help-all" else word for word in argv]
    usual = chosen(argv)
    asked = flags.read(verbs(usual), argv, "steer-heal")
    match asked:
        case Run() if asked.preset != usual.preset:
            raise UserError(f"the preset comes first: steer-heal run {asked.preset} ...")
        case Run():
            if said:
                logger.info(said)
            run(asked, argv, recorded)
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
        case Reproduce():
            reproduce(asked)
        case Chat():
            chat(asked)
        case Compare():
            compare(asked)
        case Trait():
            trait(asked)
        case Bench():
            bench(asked)


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


def run(asked: Run, argv: list[str], trait: TraitRecord | None = None) -> None:
    """A new run takes `trait` in place of the one that the flags name."""
    from steer_heal.commands.run import run as do
    from steer_heal.report import page as reporting

    folder, summary = do(asked.config, asked.preset, argv, trait)
    built, path = reporting.build(folder.path), shlex.quote(str(folder.path))
    model = asked.config.model.path
    same = [] if model == PRESETS[asked.preset].model.path else ["--model.path", model]
    again = shlex.join([asked.preset, *same])
    print(
        f"{built.headline}\nIt took {summary.seconds / 60:.1f} minutes. The report: {built.path}\n\n"
        "What to do next:\n"
        f"  1. talk to it, base and student side by side:  {program()} chat {path}\n"
        f"  2. load it without steer-heal:  PeftModel.from_pretrained(base_model, {str(folder.path / 'adapter')!r})\n"
        f"  3. steer another trait, in your own .toml (see README):  {program()} run {again} --trait mine.toml"
    )


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


def evaluate(asked: Eval) -> None:
    from steer_heal.commands.evaluate import evaluate_alone
    from steer_heal.eval.foundations import check_profile
    from steer_heal.records import unstructured

    _check_files(json=asked.json)
    _check_gate(asked.gate)
    _check_readers(asked)
    check(RunConfig(eval=asked.eval))
    check_profile(asked.eval)
    model = ModelConfig(asked.base, asked.quant, asked.dtype, asked.device)
    if asked.judge:
        record = _judged(asked)
    elif asked.harness is not None:
        record = _benchmarks(asked, model)
    elif asked.robustness:
        record = _robustness(asked)
    else:
        record = evaluate_alone(asked.target, asked.round, asked.gate, asked.trait, model, asked.eval)
    if asked.json is not None:
        Path(asked.json).write_text(dumps(unstructured(record), indent=1), "utf-8")


def _check_readers(asked: Eval) -> None:
    """Raise UserError for flags of a judge or of benchmarks that are not asked for, and for two readers at once."""
    readers = {"--judge": asked.judge, "--harness": asked.harness is not None, "--robustness": asked.robustness}
    wanted = [reader for reader, given in readers.items() if given]
    if len(wanted) > 1:
        raise UserError(f"{' and '.join(wanted)}: give one of them")
    if asked.eval != EvalConfig() and wanted:
        raise UserError(f"--eval.* choose the instruments, which {wanted[0]} replaces: leave one of them out")
    for reader, given in (("judge", bool(asked.judge)), ("harness", asked.harness is not None)):
        for name, usual in ((f.name, f.default) for f in fields(Eval) if f.name.startswith(f"{reader}_")):
            if not given and (value := getattr(asked, name)) != usual:
                raise UserError(f"--{name.replace('_', '-')} {value!r} needs --{reader}: leave it out")


def _judged(asked: Eval) -> Judged:
    from steer_heal.commands.judge.judges import endpoint_judge, local_judge
    from steer_heal.commands.judge.run import Wanted, judge_run

    if asked.trait is not None:
        raise UserError(f"--trait {asked.trait!r} with --judge: a run is judged on its own trait, leave it out")
    is_url = _is_url(asked.judge)
    if asked.judge_model and not is_url:
        raise UserError(f"--judge-model {asked.judge_model!r} needs --judge URL: leave it out")
    wanted = Wanted(asked.round, asked.gate, asked.judge_items, asked.judge_seed)
    if is_url:
        judge = endpoint_judge(asked.judge, asked.judge_model)
    else:
        judge = local_judge(_named_model(asked.judge, asked.quant))
    return judge_run(asked.target, judge, wanted)


def _benchmarks(asked: Eval, model: ModelConfig) -> Benchmarks:
    from steer_heal.commands.benchmark import Asked, Wanted, benchmark

    target = Asked(asked.target, asked.round, asked.gate, asked.trait, model)
    return benchmark(target, Wanted(asked.harness, asked.harness_tasks, asked.harness_items))


def _robustness(asked: Eval) -> Robustness:
    from steer_heal.commands.robustness import robustness

    usual = {"round": None, "gate": 1.0, "trait": None, "base": "", "quant": "none", "dtype": "auto", "device": "auto"}
    for name, value in usual.items():
        if getattr(asked, name) != value:
            raise UserError(f"--{name} with --robustness: a run's last student is read as it was made, leave it out")
    return robustness(asked.target)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _named_model(name: str, quant: str) -> ModelConfig:
    """The model of a preset, or the one that is named; `quant` is the user's where it is not none."""
    model = PRESETS[name].model if name in PRESETS else replace(PRESETS["auto"].model, path=name)
    return model if quant == "none" else replace(model, quant=quant)


def results(asked: Results) -> None:
    from steer_heal.sweep import results as listing

    _check_files(csv=asked.csv, json=asked.json, markdown=asked.markdown, html=asked.html)
    files = listing.Files(asked.csv, asked.json, asked.markdown, asked.html)
    listing.show(Path(asked.out), asked.by, asked.rounds, files)


def report(asked: Report) -> None:
    from steer_heal.report import page as reporting

    print(reporting.build(Path(asked.run)).path)


def export(asked: Export) -> None:
    from steer_heal.commands.share import Push, Wanted, share

    in_gguf = (asked.to or "").lower().endswith(".gguf")
    if asked.merge and asked.vector:
        raise UserError("--merge and --vector: a file holds one of them, leave the other out")
    if asked.vector and not in_gguf:
        raise UserError(f"--vector --to {asked.to!r}: a control vector is a .gguf file: give --to NAME.gguf")
    if asked.vector and asked.push:
        raise UserError(f"--vector --push {asked.push!r}: a control vector has no card: leave --push out")
    if asked.type != "f16" and not (asked.merge and in_gguf):
        raise UserError(f"--type {asked.type} is of a merged .gguf file: give --merge --to NAME.gguf, or leave it out")
    if asked.rank is not None and (asked.rank < 1 or asked.merge or asked.vector):
        raise UserError(f"--rank {asked.rank} is of an adapter, 1 or more: leave out --merge and --vector, or --rank")
    if not (asked.to or asked.push):
        raise UserError("export: give --to FOLDER, --to NAME.gguf or --push USER/NAME")
    if not asked.push and (asked.public or asked.dry_run):
        raise UserError("--public and --dry-run are of --push USER/NAME: leave them out")
    wanted = Wanted(Path(asked.run), asked.round, asked.merge, asked.vector, asked.type, asked.rank)
    push = Push(asked.push, asked.public, asked.dry_run) if asked.push else None
    print(share(wanted, Path(asked.to) if asked.to else None, push))


def reproduce(asked: Reproduce) -> None:
    from steer_heal.commands.reproduce import reproduce as do

    told, agrees = do(asked.target, asked.out)
    print(told)
    sys.exit(0 if agrees else 1)


def chat(asked: Chat) -> None:
    from steer_heal.commands.chat import terminal, web
    from steer_heal.commands.chat.session import Session
    from steer_heal.commands.chat.subject import opened

    _check_gate(asked.gate)
    if asked.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {asked.max_new_tokens}: it must be 1 or more")
    if not (math.isfinite(asked.temperature) and asked.temperature >= 0):
        raise UserError(f"--temperature is {asked.temperature}: it must be 0 or more; 0 takes the likeliest token")
    if asked.web:
        web.require_gradio()
    subject = opened(asked.what, asked.round, ModelConfig(asked.base, asked.quant, asked.dtype, asked.device))
    if asked.gate != 1.0:
        subject.require_gate(asked.gate, "--gate")
    session = Session(subject, asked.max_new_tokens, asked.temperature, asked.gate)
    if asked.web:
        web.serve(session)
    else:
        terminal.chat(session)


def compare(asked: Compare) -> None:
    from steer_heal.commands import compare as comparing

    _check_files(log=asked.log, page=asked.page)
    folder = Path(asked.run)
    given = {f"--{name}": value for name in ("log", "page", "read") if (value := getattr(asked, name)) is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    if asked.read is not None:
        comparing.read_back(folder, Path(asked.read))
    elif asked.page is not None:
        comparing.write_page(folder, asked.against, asked.seed, Path(asked.page))
    else:
        comparing.compare(folder, asked.against, asked.seed, Path(asked.log or folder / comparing.LOG))


def trait(asked: Trait) -> None:
    from steer_heal.commands import trait as traits

    if (asked.action == "list") == bool(asked.name):
        needs = "takes no name" if asked.name else "needs a name"
        raise UserError(f"trait {asked.action} {needs}: see steer-heal trait --help")
    if asked.model and asked.action != "check":
        raise UserError(f"--model {asked.model!r}: only `trait check` tries a trait out, leave it out")
    if asked.action != "new" and (asked.write or asked.about or asked.writer_model):
        raise UserError("--write, --about and --writer-model: only `trait new` writes a trait, leave them out")
    match asked.action:
        case "list":
            print(traits.listing())
        case "show":
            print(traits.show(asked.name), end="")
        case "new":
            print(_new_trait(asked), end="")
        case "check":
            _check_trait(asked)


def _new_trait(asked: Trait) -> str:
    from steer_heal.commands import trait as traits
    from steer_heal.commands import write_trait, writers

    is_url = _is_url(asked.write)
    if asked.about and not (asked.about.isprintable() and len(asked.about) <= 500 and len(asked.about.split()) > 2):
        raise UserError(f"--about {asked.about[:60]!r}: give one sentence of 3 words or more, at most 500 characters")
    if asked.writer_model and not is_url:
        raise UserError(f"--writer-model {asked.writer_model!r} needs --write URL: leave it out")
    if not asked.write:
        return traits.new(asked.name, asked.about)
    if is_url:
        return write_trait.write(asked.name, asked.about, lambda: writers.endpoint(asked.write, asked.writer_model))
    model = _named_model(asked.write, asked.quant)
    return write_trait.write(asked.name, asked.about, lambda: writers.local(model))


def _check_trait(asked: Trait) -> None:
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


if __name__ == "__main__":
    main()
