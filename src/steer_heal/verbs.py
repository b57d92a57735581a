"""The verbs of the command line and their flags, one dataclass a verb. tyro shows their docstrings as help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from steer_heal.config import EvalConfig, RunConfig
from steer_heal.presets import DEFAULT_PRESET, MODELS_TOO, PRESETS


@dataclass(frozen=True)
class Run:
    """Steer, distil, heal and bake a trait into a model, round after round.

    In place of a preset, --config FILE takes the settings and the trait of a run's config.json or of an export's
    reproduce.json. Flags beside it change them.

    Example: steer-heal run smollm2-135m --trait mine.toml --rounds 4 --seed 1

    Example: steer-heal run --config my-adapter/reproduce.json --seed 2
    """

    preset: Positional[Annotated[str, arg(help=f"one of {', '.join(PRESETS)}; or {MODELS_TOO}")]] = DEFAULT_PRESET
    config: Annotated[RunConfig, arg(name="")] = PRESETS[DEFAULT_PRESET]


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


@dataclass(frozen=True)
class Eval:
    """Read the instruments alone: on base, both personas as prompts and, for an adapter or a run, the student.

    With --judge, a model that you name rates the answers of a run instead; with --harness, benchmarks are read;
    with --robustness, how much of the trait is left under other conditions.

    Example: steer-heal eval outputs/RUN --round 0 --json round0.json

    Example: steer-heal eval outputs/RUN --judge http://localhost:8000/v1 --json judged.json

    Example: steer-heal eval outputs/RUN --harness plain_questions --json benchmarks.json

    Example: steer-heal eval outputs/RUN --robustness
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
    """file for every figure with its interval; with --judge, also every answer with its ratings"""
    judge: str = ""
    """for a run: who rates its arms' answers, in place of the instruments: an OpenAI-compatible endpoint's URL (key:
    OPENAI_API_KEY), or a chat model (hub id, folder, .gguf, preset)"""
    judge_model: str = ""
    """name of the endpoint's model; default: the first that it lists"""
    judge_items: int = 100
    """prompts of the trait that are judged, 8 or more, and half as many everyday ones. A quarter as many give intervals
    twice as wide"""
    judge_seed: int = 0
    """seed of the order in which the judge is asked"""
    base: str = ""
    """for an adapter: the base model to load instead of the one that the adapter names"""
    quant: Literal["none", "nf4"] = "none"
    """for a model, an adapter or a judge: nf4 holds the weights in 4 bits. A run is loaded as it was made"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """for a model or adapter: type of the weights that are not quantised"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """for a model or adapter"""
    harness: str | None = None
    """instead of the instruments, read these benchmarks of lm-evaluation-harness, separated by commas, also with plain
    steering at equal cost, e.g. gsm8k,ifeval; plain_questions needs no network (install it: pip install
    'steer_heal[harness]')"""
    harness_tasks: str | None = None
    """with --harness: a folder with task files of your own (*.yaml)"""
    harness_items: int | None = None
    """with --harness: read the first so many items of each task; default: all"""
    robustness: bool = False
    """for a finished run: instead of the instruments, read how much of its trait is left in later turns, under other
    system prompts, in JSON and in an e-mail, after rounding to 8 and 4 bits, and after fine-tuning on other text"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """which instruments are read, and how many items of each"""


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


@dataclass(frozen=True)
class Report:
    """Rebuild report.html and diary.md of a run folder, finished or not.

    Example: steer-heal report outputs/RUN
    """

    run: Positional[str]
    """the run folder"""


@dataclass(frozen=True)
class Export:
    """Write a run's result for others to load: an adapter, or with --merge a whole model.

    Into a folder for PEFT and transformers, into a .gguf file for llama.cpp and Ollama. Both come with the description,
    the measurements and the command that made the run.

    Example: steer-heal export outputs/RUN --to my-model --merge

    Example: steer-heal export outputs/RUN --to love.gguf

    Example: steer-heal export outputs/RUN --push USER/NAME --dry-run
    """

    run: Positional[str]
    """the run folder"""
    to: str | None = None
    """the folder to write, new or empty; or a new file NAME.gguf"""
    merge: bool = False
    """write a whole model instead of an adapter: a float model for transformers, or, where the base is a .gguf file, a
    .gguf file"""
    vector: bool = False
    """write the steering vector times its dose as a control vector of llama.cpp, a .gguf file"""
    type: Literal["f16", "q8_0"] = "f16"
    """of the matrices in a merged .gguf file; q8_0 takes half the space and rounds more"""
    rank: int | None = None
    """fold the adapter to this rank where its own is larger; the card says what that loses"""
    round: int | None = None
    """the student after this round (from 0), default: the last finished round; with --vector: the vector of this
    round, default: of the first"""
    push: str = ""
    """USER/NAME: put it at the Hugging Face hub, as a private model (first: hf auth login); --to may be left out"""
    public: bool = False
    """with --push: for everyone to see"""
    dry_run: bool = False
    """with --push: list the files, push and keep nothing"""


@dataclass(frozen=True)
class Reproduce:
    """Make the run behind an export again, and compare: exit code 0 if every outcome lies in its recorded interval.

    Example: steer-heal reproduce USER/NAME
    """

    target: Positional[str]
    """an export's folder or its reproduce.json, a run folder, or a model at the hub"""
    out: str = "outputs"
    """the folder that holds run folders"""


@dataclass(frozen=True)
class Chat:
    """Talk to a run's student, an adapter or a model, turn by turn: base answers beside it; /help lists the commands.

    Example: steer-heal chat outputs/RUN --gate 0.5

    Example: steer-heal chat my-adapter --base Qwen/Qwen2.5-0.5B-Instruct
    """

    what: Positional[str]
    """a run folder, a PEFT adapter's folder, or a model (hub id, folder, .gguf, smollm2-135m)"""
    round: int | None = None
    """for a run: the student after this round (from 0); default: the last finished round"""
    gate: float = 1.0
    """scale of the adapter: 0 is the base, 1 the student"""
    max_new_tokens: int = 128
    """length limit of an answer, tokens"""
    temperature: float = 0.7
    """how freely the arms write; 0: always the likeliest token"""
    web: bool = False
    """show a page in place of the terminal, on this machine alone (install it: pip install 'steer_heal[web]')"""
    base: str = ""
    """for an adapter: the base model to load instead of the one that the adapter names"""
    quant: Literal["none", "nf4"] = "none"
    """for a model or an adapter: nf4 holds the weights in 4 bits. A run is loaded as it was made"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """for a model or an adapter: type of the weights that are not quantised"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """for a model or an adapter"""


@dataclass(frozen=True)
class Compare:
    """Read a run's answers yourself: two to a prompt, unlabelled; press a key for the better one. Needs no model.

    Example: steer-heal compare outputs/RUN --against equal-cost

    Example: steer-heal compare outputs/RUN --page which.html
    """

    run: Positional[str]
    """the run folder"""
    against: Literal["base", "equal-cost", "prompted"] = "base"
    """whose answers stand beside the student's: base, base plainly steered at the student's cost, or base with the
    persona as its system prompt"""
    log: str | None = None
    """file that keeps the choices and is gone on with; default: compare.jsonl in the run folder"""
    page: str | None = None
    """.html file for a colleague: one page with all pairs, which saves the choices as a file"""
    read: str | None = None
    """file that such a page saved: show its result"""
    seed: int = 0
    """seed of the order of the prompts, and of which answer comes first"""


@dataclass(frozen=True)
class Trait:
    """Traits: `list` and `show` the built-in ones, begin a file with `new`, find what is wrong with one by `check`.

    Example: steer-heal trait check patient.toml --model smollm2-135m

    Example: steer-heal trait new patient --write http://localhost:8000/v1 --about "has time for everyone, and waits"
    """

    action: Positional[Literal["list", "show", "new", "check"]]
    """list: the built-in traits. show: the file of one. new: write the smallest file, with --write a whole one. check:
    all problems of a file"""
    name: Positional[str] = ""
    """show: a built-in trait. new: the trait's name. check: a .toml file or a built-in trait"""
    model: str = ""
    """check: try the trait out on this model as well (hub id, folder, .gguf, smollm2-135m)"""
    quant: Literal["none", "nf4"] = "none"
    """check, new: nf4 holds that model in 4 bits"""
    write: str = ""
    """new: who writes the whole file: the URL of an OpenAI-compatible endpoint (key: OPENAI_API_KEY), or a chat model
    (hub id, folder, .gguf, preset). A file with both personas and nothing else is filled"""
    about: str = ""
    """new: the trait in one sentence, from which the personas are written"""
    writer_model: str = ""
    """new: name of the endpoint's model; default: the first that it lists"""


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


def verbs(chosen: Run) -> Any:
    """Return the union of the verbs' dataclasses; the flags of `run` have the chosen preset's values as defaults."""
    return (
        Annotated[Run, subcommand("run", default=chosen)]
        | Annotated[Sweep, subcommand("sweep")]
        | Annotated[Eval, subcommand("eval")]
        | Annotated[Results, subcommand("results")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Reproduce, subcommand("reproduce")]
        | Annotated[Chat, subcommand("chat")]
        | Annotated[Compare, subcommand("compare")]
        | Annotated[Trait, subcommand("trait")]
        | Annotated[Bench, subcommand("bench")]
    )
