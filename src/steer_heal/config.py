"""Every knob of a run. No heavy imports: `--help` must be quick."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import reduce
from typing import Any, Literal

STEER_METHODS = ("mean_diff", "pca", "ablation")
# Where a run lies, who watches and how it is gone on with is not what it is.
PLACE_FIELDS = ("out", "resume", "recompute", "allow_change", "track")
FIRED_FLOOR = 0.05  # a barrier that fires on a smaller share of the steps holds nothing back


class UserError(Exception):
    """Something a user can mend. Its text is the one line they see: the value, what is allowed, the mend."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how its weights are held."""

    path: str = "google/gemma-3-1b-it"
    """hub id, folder, .gguf file, `smollm2-135m` (packaged weights) or `random:ARCHITECTURE`"""
    quant: Literal["none", "nf4"] = "nf4"
    """nf4: 4-bit base weights with double quantisation and bf16 compute (QLoRA)"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """type of the weights that are not quantised"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is one"""


@dataclass(frozen=True)
class SteerConfig:
    """The teacher vector."""

    method: str = "mean_diff"
    """how a direction is made of the personas' states: mean_diff, pca, ablation, or lite:NAME of steering-lite"""
    band: tuple[float, float] | Literal["auto"] = (0.45, 0.55)
    """blocks that are steered, as shares of depth; a wide band destroys text sooner; auto: see steer.auto_band"""
    source: Literal["student", "base"] = "student"
    """whose vector the teacher gets: the student's own, read again in every round, or the pristine base's"""
    n_contexts: int = 256
    """user messages over which the persona difference is averaged"""
    batch_size: int = 32
    """prompts a forward pass"""


@dataclass(frozen=True)
class DoseConfig:
    """The dose curve: how much of the vector the text survives."""

    rule: Literal["survival", "iso_kl"] = "survival"
    """survival: largest dose whose completions still pass the filter; iso_kl: dose of a given divergence"""
    lowest: float = 0.25
    """smallest dose tried, in multiples of the raw vector"""
    highest: float = 4.0
    """largest dose tried"""
    steps: int = 6
    """doses tried, log-spaced, all in one mixed batch"""
    prompts: int = 12
    """generation prompts answered at every dose and without steering"""
    survival: float = 0.75
    """the dose chosen is the largest at which completions pass the filter this often, relative to unsteered ones"""
    kl_target: float = 1.0
    """iso_kl: 95th percentile over tokens of KL(steered || unsteered) to reach, nats"""


@dataclass(frozen=True)
class DistilConfig:
    """Sampling from the steered teacher."""

    n_keep: int = 128
    """survivors wanted a round, a fair share of each generation prompt and dose"""
    budget: int = 256
    """completions sampled a round at most"""
    min_train: int = 16
    """fewer survivors than this stop the run"""
    dose_spread: float = 0.15
    """a third of the completions each at the chosen dose and this share below and above it"""
    max_new_tokens: int = 256
    """length limit of a completion, tokens"""
    temperature: float = 1.0
    """softmax temperature"""
    top_k: int = 64
    """tokens kept by rank"""
    top_p: float = 0.95
    """tokens kept by probability mass, after top_k"""
    batch_size: int | Literal["auto"] = "auto"
    """rows decoded together; auto: as many as free memory holds, chosen once a run; results do not depend on it"""


@dataclass(frozen=True)
class Limits:
    """What counts as coherent text. Every threshold is on a score stored with the completion."""

    incoherence: float = 0.0
    """largest log-odds that the text is broken; docs/results.md shows what each value costs and catches"""
    word_repeat: float = 0.25
    """largest share of repeated word n-grams (worst of n = 2, 3, 4)"""
    char_repeat: float = 0.35
    """largest share of the text inside immediately repeated stretches of characters"""
    compress: float = 0.35
    """smallest ratio of compressed to plain size, for texts of 200 bytes or more"""
    min_words: int = 1
    """fewest words"""


@dataclass(frozen=True)
class FilterConfig(Limits):
    """Which completions are trained on: coherent ones that neither narrate the persona nor refuse."""

    trim: bool = False
    """keep the sound front (whole sentences, 16 tokens or more) of a completion that breaks in the middle"""
    trim_margin: float = 1.0
    """trim: log-odds by which a front must be sounder than a whole completion, because many fronts are tried"""


@dataclass(frozen=True)
class HealConfig:
    """One round's training: an objective and a barrier."""

    target: Literal["sampled", "soft", "mirrored"] = "sampled"
    """sampled: NLL of the sampled token; soft: forward KL from the steered teacher's whole distribution; mirrored: from
    the unsteered one moved by half of what steering forwards and backwards differ in, so that what both do cancels"""
    gain: float = 2.0
    """mirrored: how many times that half difference the target is moved, in logits; 1: as far as the dose itself"""
    reg: Literal["nll", "kl_fwd", "kl_rev"] = "kl_rev"
    """divergence under the barrier; nll: no barrier"""
    agg: Literal["mean", "rmse", "p95", "max"] = "rmse"
    """how the divergence is aggregated over token positions"""
    reference: Literal["prev", "base"] = "prev"
    """model the divergence is measured to; prev: tau is what a round may move, base: what all rounds together may"""
    anchor: Literal["none", "neutral"] = "none"
    """neutral: the barrier also reads base completions of mundane prompts, with the pristine base as reference"""
    anchor_tau: float = 0.02
    """barrier threshold on the anchor's divergence, nats"""
    anchor_prompts: int = 32
    """mundane prompts whose base completions make the anchor"""
    anchor_bs: int = 2
    """anchor completions joined to each optimiser step"""
    tau: float | Literal["auto"] = 2.0
    """divergence below which the barrier is silent, nats; must lie below the operating KL of the model; auto: below"""
    tau_share: float = 0.5
    """tau auto: share of the divergence that the steered teacher itself has from the reference on this text"""
    barrier: Literal["fixed", "dual"] = "fixed"
    """fixed: lam_r * relu(D - tau); dual: lam moves until D stays at tau, a constraint in place of a penalty"""
    lam: float = 0.3
    """barrier weight in round 0; dual: where it starts"""
    lam_round_pow: float = -0.5
    """lam_r = lam * (1 + round) ** lam_round_pow"""
    dual_lr: float = 0.1
    """dual: lam rises by this times (D / tau - 1) a step"""
    op_norm: float = 0.0
    """weight of the mean squared operator norm of the update (its largest singular value); 0: no such penalty"""
    lr: float = 2e-4
    """peak learning rate in round 0"""
    lr_round_pow: float = 0.0
    """lr_r = lr * (1 + round) ** lr_round_pow"""
    epochs: int = 2
    """passes over the training completions"""
    train_bs: int = 3
    """completions a forward pass"""
    grad_accum: int = 2
    """forward passes an optimiser step; trades time for memory, the gradient is the same"""
    optimiser: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """paged_adamw_8bit: bitsandbytes', 8-bit moments that move to main memory when the GPU is full; CUDA only"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    warmup: float = 0.1
    """share of steps with rising learning rate; cosine afterwards"""
    val_share: float = 0.125
    """share of the completions held out: the trained objective is read on them"""
    patience: int = 0
    """epochs without a better validation objective after which training stops and its best epoch is kept; 0: never"""
    max_len: int = 1024
    """tokens of prompt and completion that are trained on; the rest of a completion is cut"""
    log_every: int = 10
    """steps between two records of the objective's and the barrier's gradient norm; each costs a second backward"""
    r: int = 32
    """LoRA rank"""
    alpha: int = 64
    """LoRA alpha; the update is scaled by alpha / r"""
    band: tuple[float, float] = (0.2, 0.8)
    """blocks that get LoRA, as shares of depth"""
    checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    fold_rank: int = 0
    """rank that the joined past rounds are compressed to, the error is logged; 0: stacked, exact, r more each round"""


@dataclass(frozen=True)
class EvalConfig:
    """The instruments."""

    contrast: int = 64
    """contrast probes, at most as many as the trait has"""
    yes_no: int = 24
    """yes/no probes"""
    demos: int = 32
    """free-text prompts answered greedily"""
    demo_tokens: int = 64
    """length limit of a demo answer, tokens"""
    neutral: int = 40
    """neutral texts for perplexity"""
    off_target: int = 16
    """probes of each trait that should stay put, five far ones and the other built-in ones; 0: none"""
    canary: int = 180
    """plain questions with one right answer of four; 0: none"""
    profile: Literal["vignettes", "tiny-mfv", "none"] = "vignettes"
    """moral-foundation profile: on our scenes, or on those of tiny-mfv through that package (`just vendor`)"""
    scenes: int = 20
    """profile: scenes of each of the seven concerns"""
    person: Literal["see", "do"] = "see"
    """profile: see: somebody else does it; do: you do it yourself"""
    ends_only: tuple[Literal["off_target", "canary", "profile"], ...] = ("profile",)
    """instruments read on base, on the two prompted arms and on the last student, not in every round"""
    plain_doses: int = 7
    """doses at which the base, plainly steered, is measured: what healing is compared with at equal cost in coherence
    and, after the last round, at equal trait; 0: no such arms"""
    judge: Limits = field(default_factory=Limits)
    """what counts as coherent in a demo answer; apart from the filter, so that arms of another filter are comparable"""
    batch_size: int = 32
    """sequences a forward pass; results do not depend on it"""


@dataclass(frozen=True)
class RunConfig:
    """A run: steer, distil, heal and bake one trait into one model, round after round."""

    model: ModelConfig = field(default_factory=ModelConfig)
    trait: str = "authority"
    """built-in trait (love, authority, calm) or a path to a .toml file"""
    rounds: int = 8
    """rounds of the loop"""
    seed: int = 0
    """seed; every stage draws from (seed, round, stage)"""
    out: str = "outputs"
    """folder that holds run folders"""
    resume: str | None = None
    """run folder to go on with, with its own preset and flags: what is done is loaded, the rest computed"""
    recompute: tuple[str, ...] = ()
    """resume: artefacts of the folder that are damaged or gone and are made again, e.g. r00/dose.json"""
    allow_change: tuple[str, ...] = ()
    """resume: what may differ from when the run was started, e.g. heal.train_bs or packages.torch"""
    track: Literal["none", "trackio", "wandb"] = "none"
    """also send every event of events.jsonl to a tracker (install it: pip install 'steer_heal[trackio]' or [wandb])"""
    steer: SteerConfig = field(default_factory=SteerConfig)
    dose: DoseConfig = field(default_factory=DoseConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    heal: HealConfig = field(default_factory=HealConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def of_record(table: dict, default: Any = None) -> Any:
    """A config of what JSON made of it: lists become tuples, a key too many or too few is a KeyError."""
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


def flat(table: dict, joint: str = ".", before: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested tables under the joined names of what they lie in."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, joint, f"{before}{key}{joint}")
        else:
            yield f"{before}{key}", value


ALLOWED = {  # intervals; what is not finite lies in none
    "rounds": "[1, inf)",
    "steer.n_contexts": "[2, 256]",
    "steer.batch_size": "[1, inf)",
    "dose.lowest": "(0, inf)",
    "dose.highest": "(0, inf)",
    "dose.steps": "[2, inf)",
    "dose.prompts": "[1, inf)",
    "dose.survival": "(0, 1]",
    "dose.kl_target": "(0, inf)",
    "distil.n_keep": "[1, inf)",
    "distil.budget": "[1, inf)",
    "distil.min_train": "[1, inf)",
    "distil.dose_spread": "[0, 1)",
    "distil.max_new_tokens": "[1, inf)",
    "distil.temperature": "(0, inf)",
    "distil.top_k": "[1, inf)",
    "distil.top_p": "(0, 1]",
    "distil.batch_size": "[1, inf)",
    "filter.incoherence": "(-inf, inf)",
    "filter.word_repeat": "[0, 1]",
    "filter.char_repeat": "[0, 1]",
    "filter.compress": "[0, 1]",
    "filter.min_words": "[0, inf)",
    "filter.trim_margin": "[0, inf)",
    "heal.gain": "(0, inf)",
    "heal.anchor_tau": "(0, inf)",
    "heal.anchor_prompts": "[1, 96]",
    "heal.anchor_bs": "[1, inf)",
    "heal.tau": "[0, inf)",
    "heal.tau_share": "(0, inf)",
    "heal.lam": "[0, inf)",
    "heal.lam_round_pow": "(-inf, inf)",
    "heal.dual_lr": "(0, inf)",
    "heal.op_norm": "[0, inf)",
    "heal.lr": "(0, inf)",
    "heal.lr_round_pow": "(-inf, inf)",
    "heal.epochs": "[1, inf)",
    "heal.train_bs": "[1, inf)",
    "heal.grad_accum": "[1, inf)",
    "heal.weight_decay": "[0, inf)",
    "heal.warmup": "[0, 1]",
    "heal.val_share": "[0, 0.5]",
    "heal.patience": "[0, inf)",
    "heal.max_len": "[2, inf)",
    "heal.log_every": "[1, inf)",
    "heal.r": "[1, inf)",
    "heal.alpha": "[1, inf)",
    "heal.fold_rank": "[0, inf)",
    "eval.contrast": "[1, inf)",
    "eval.yes_no": "[1, inf)",
    "eval.demos": "[1, inf)",
    "eval.demo_tokens": "[1, inf)",
    "eval.neutral": "[1, 40]",
    "eval.off_target": "[0, 16]",
    "eval.canary": "[0, 180]",
    "eval.scenes": "[1, 20]",
    "eval.plain_doses": "[0, inf)",
    "eval.batch_size": "[1, inf)",
}
ALLOWED |= {f"eval.judge.{f.name}": ALLOWED[f"filter.{f.name}"] for f in fields(Limits)}


def check(config: RunConfig) -> None:
    """Raise UserError for a value that no run could work with."""
    for name, interval in ALLOWED.items():
        value = reduce(getattr, name.split("."), config)
        if value != "auto" and not _lies_in(value, interval):
            raise UserError(f"{name} is {value}: it must lie in {interval}")
    steer, dose, distil, heal, evals = config.steer, config.dose, config.distil, config.heal, config.eval
    for name, band in (("steer.band", steer.band), ("heal.band", heal.band)):
        if band != "auto" and not 0 <= band[0] <= band[1] <= 1:
            raise UserError(f"{name} is {band[0]} {band[1]}: give two shares of depth, 0 <= low <= high <= 1")
    demands = [
        (
            steer.method in STEER_METHODS or steer.method.startswith("lite:"),
            f"steer.method {steer.method!r} is not known{nearest(steer.method, STEER_METHODS)}: "
            f"choose {', '.join(STEER_METHODS)} or lite:NAME",
        ),
        (
            dose.lowest < dose.highest,
            f"dose.lowest is {dose.lowest} and dose.highest {dose.highest}: lowest must be below highest",
        ),
        (
            distil.min_train <= distil.n_keep <= distil.budget,
            f"distil.min_train is {distil.min_train}, distil.n_keep {distil.n_keep} and distil.budget "
            f"{distil.budget}: min_train <= n_keep <= budget",
        ),
        (
            heal.barrier == "fixed" or (heal.tau != 0 and heal.reg != "nll"),
            "heal.barrier dual needs a divergence to hold at tau: choose heal.reg kl_rev or kl_fwd and tau above 0",
        ),
        (
            heal.patience == 0 or heal.val_share > 0,
            "heal.patience needs completions to validate on: give heal.val_share, e.g. 0.125",
        ),
        (
            heal.reg != "nll" or heal.anchor == "none",
            "heal.reg nll has no divergence for heal.anchor neutral to hold: choose kl_rev or kl_fwd, or anchor none",
        ),
        (evals.plain_doses != 1, "eval.plain_doses is 1: a curve needs 2 doses or more; 0 leaves the arms out"),
        (
            config.resume or not (config.recompute or config.allow_change),
            "--recompute and --allow-change go on with a run: give its folder with --resume",
        ),
    ]
    for fine, complaint in demands:
        if not fine:
            raise UserError(complaint)


def _lies_in(value: int | float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when something known is spelt nearly so."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1) or [k for k in known if name and k.startswith(name)]
    return f" (did you mean {close[0]!r}?)" if close else ""
