"""Every knob of a run, and the presets. No heavy imports: `--help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

STEER_METHODS = ("mean_diff", "pca", "ablation")
PLACE_FIELDS = ("out", "resume", "track")  # where a run lies and who watches is not what it is
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
class FilterConfig:
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
    trim: bool = False
    """keep the sound front (whole sentences, 16 tokens or more) of a completion that breaks in the middle"""
    trim_margin: float = 1.0
    """trim: log-odds by which a front must be sounder than a whole completion, because many fronts are tried"""


@dataclass(frozen=True)
class HealConfig:
    """One round's training: an objective and a barrier."""

    target: Literal["sampled", "soft"] = "sampled"
    """sampled: NLL of the sampled token; soft: forward KL from the steered teacher's whole distribution"""
    reg: Literal["nll", "kl_fwd", "kl_rev"] = "kl_rev"
    """divergence under the barrier; nll: no barrier"""
    agg: Literal["mean", "rmse", "p95", "max"] = "rmse"
    """how the divergence is aggregated over token positions"""
    reference: Literal["prev", "base"] = "prev"
    """model the divergence is measured to; prev lets the trait accumulate"""
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
    """tau auto: share of the divergence that the steered teacher itself has from the previous student on this text"""
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
    """peak learning rate"""
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
    """completions held out for the validation NLL"""
    patience: int = 0
    """epochs without a better validation NLL after which training stops and its best epoch is kept; 0: never"""
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
    """probes of each of five traits that should stay put; 0: none"""
    canary: int = 60
    """plain questions with one right answer of four; 0: none"""
    profile: Literal["vignettes", "tiny-mfv", "none"] = "vignettes"
    """moral-foundation profile: on our scenes, or on those of tiny-mfv through that package (`just vendor`)"""
    scenes: int = 20
    """profile: scenes of each of the seven concerns"""
    person: Literal["see", "do"] = "see"
    """profile: see: somebody else does it; do: you do it yourself"""
    ends_only: tuple[Literal["off_target", "canary", "profile"], ...] = ("profile",)
    """instruments read on base, on the two prompted arms and after the last round, not in every round"""
    equal_doses: int = 6
    """doses on which the coherence cost of plain steering is read, for the arm steered at equal coherence; 0: no arm"""
    batch_size: int = 32
    """sequences a forward pass; results do not depend on it"""


@dataclass(frozen=True)
class RunConfig:
    """A run: steer, distil, heal and bake one trait into one model, round after round."""

    model: ModelConfig = field(default_factory=ModelConfig)
    trait: str = "authority"
    """built-in trait (love, authority) or a path to a .toml file"""
    rounds: int = 8
    """rounds of the loop"""
    seed: int = 0
    """seed; every stage draws from (seed, round, stage)"""
    out: str = "outputs"
    """folder that holds run folders"""
    resume: str | None = None
    """run folder to go on with: what is done is loaded, the rest computed"""
    track: Literal["none", "trackio", "wandb"] = "none"
    """also send every event of events.jsonl to a tracker (install it: pip install 'steer_heal[trackio]' or [wandb])"""
    steer: SteerConfig = field(default_factory=SteerConfig)
    dose: DoseConfig = field(default_factory=DoseConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    heal: HealConfig = field(default_factory=HealConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def check(config: RunConfig) -> None:
    """Raise UserError for a value that no run could work with."""
    low, high = (0, 1) if config.steer.band == "auto" else config.steer.band
    demands = [
        (
            config.steer.method in STEER_METHODS or config.steer.method.startswith("lite:"),
            f"steer.method {config.steer.method!r} is not known: choose {', '.join(STEER_METHODS)} or lite:NAME",
        ),
        (config.rounds >= 1, f"rounds is {config.rounds}: it must be 1 or more"),
        (0 <= low <= high <= 1, f"steer.band is {low} {high}: give two shares of depth, 0 <= low <= high <= 1"),
        (
            0 < config.dose.lowest < config.dose.highest,
            f"dose.lowest is {config.dose.lowest} and dose.highest {config.dose.highest}: 0 < lowest < highest",
        ),
        (config.dose.kl_target > 0, f"dose.kl_target is {config.dose.kl_target}: it must be above 0"),
        (
            config.distil.min_train <= config.distil.n_keep <= config.distil.budget,
            f"distil.min_train is {config.distil.min_train}, distil.n_keep {config.distil.n_keep} and distil.budget "
            f"{config.distil.budget}: min_train <= n_keep <= budget",
        ),
        (
            0 <= config.distil.dose_spread < 1,
            f"distil.dose_spread is {config.distil.dose_spread}: it must be at least 0, below 1",
        ),
        (0 < config.dose.survival <= 1, f"dose.survival is {config.dose.survival}: it must be above 0, at most 1"),
        (
            config.heal.tau == "auto" or config.heal.tau >= 0,
            f"heal.tau is {config.heal.tau}: it must be auto, or 0 nats or more",
        ),
        (config.heal.tau_share > 0, f"heal.tau_share is {config.heal.tau_share}: it must be above 0"),
        (
            config.heal.barrier == "fixed" or (config.heal.tau != 0 and config.heal.reg != "nll"),
            "heal.barrier dual needs a divergence to hold at tau: choose heal.reg kl_rev or kl_fwd and tau above 0",
        ),
        (
            config.heal.patience == 0 or config.heal.val_share > 0,
            "heal.patience needs completions to validate on: give heal.val_share, e.g. 0.125",
        ),
        (config.heal.fold_rank >= 0, f"heal.fold_rank is {config.heal.fold_rank}: it must be 0 or more"),
        (config.eval.off_target >= 0, f"eval.off_target is {config.eval.off_target}: it must be 0 or more"),
        (config.eval.canary >= 0, f"eval.canary is {config.eval.canary}: it must be 0 or more"),
        (
            config.eval.equal_doses == 0 or config.eval.equal_doses >= 2,
            f"eval.equal_doses is {config.eval.equal_doses}: it must be 0 or at least 2",
        ),
        (0 <= config.heal.val_share < 1, f"heal.val_share is {config.heal.val_share}: it must be at least 0, below 1"),
    ]
    demands.append(
        (
            config.heal.reg != "nll" or config.heal.anchor == "none",
            "heal.reg nll has no divergence for heal.anchor neutral to hold: choose kl_rev or kl_fwd, or anchor none",
        )
    )
    counts = {
        "steer": ("n_contexts", "batch_size"),
        "dose": ("steps", "prompts"),
        "distil": ("n_keep", "budget", "min_train", "max_new_tokens", "top_k"),
        "heal": ("epochs", "train_bs", "grad_accum", "r", "max_len", "log_every"),
        "eval": ("contrast", "yes_no", "demos", "demo_tokens", "neutral", "scenes", "batch_size"),
    }
    for section, names in counts.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            demands.append((value >= 1, f"{section}.{name} is {value}: it must be 1 or more"))
    rows = config.distil.batch_size
    demands.append((rows == "auto" or rows >= 1, f"distil.batch_size is {rows}: it must be auto, or 1 or more"))
    for fine, complaint in demands:
        if not fine:
            raise UserError(complaint)


GEMMA_1B = RunConfig()

PRESETS: dict[str, RunConfig] = {
    "gemma-3-1b": GEMMA_1B,
    "gemma-3-4b": replace(GEMMA_1B, model=replace(GEMMA_1B.model, path="google/gemma-3-4b-it")),
    "smollm2-135m": RunConfig(
        model=ModelConfig(path="smollm2-135m", quant="none", dtype="float32", device="cpu"),
        trait="love",
        rounds=3,
        steer=SteerConfig(n_contexts=64),
        # Above 1.2 the answer mass falls faster than the trait rises.
        dose=DoseConfig(lowest=0.4, highest=1.2, steps=5, prompts=10),
        distil=DistilConfig(n_keep=60, budget=120, max_new_tokens=32),
        heal=HealConfig(
            target="soft",
            anchor="neutral",
            anchor_tau=0.08,
            anchor_prompts=24,
            anchor_bs=1,
            tau=0.15,  # this model operates at an rmse of 0.1 to 0.2 nats
            barrier="dual",
            lam=1.0,
            lr=4e-4,
            epochs=3,
            train_bs=6,
            grad_accum=1,
            r=16,
            alpha=32,
        ),
        eval=EvalConfig(demo_tokens=32, neutral=24, off_target=8, ends_only=("canary", "profile"), equal_doses=4),
    ),
    "tiny-random": RunConfig(
        model=ModelConfig(path="random:tiny", quant="none", dtype="float32", device="cpu"),
        trait="love",
        rounds=2,
        steer=SteerConfig(n_contexts=32, band=(0.3, 0.7)),
        dose=DoseConfig(steps=4, prompts=4),
        distil=DistilConfig(n_keep=24, budget=48, max_new_tokens=12, min_train=8),
        # A random model writes rubbish at any dose: the thresholds only ask that it be no worse than random.
        filter=FilterConfig(incoherence=1e9, word_repeat=0.9, char_repeat=0.9, compress=0.05, min_words=1),
        heal=HealConfig(tau=0.001, lam=1.0, r=4, alpha=8, train_bs=4, grad_accum=2, epochs=2, lr=2e-2),
        eval=EvalConfig(
            contrast=8, yes_no=8, demos=4, demo_tokens=8, neutral=4, off_target=2, canary=6, scenes=1, equal_doses=2
        ),
    ),
}
DEFAULT_PRESET = "gemma-3-1b"
