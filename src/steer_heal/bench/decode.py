"""Benchmark of steered decoding against named alternatives, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from steer_heal import data
from steer_heal.model.decode import Sampling, decode
from steer_heal.model.dtype import dtype_of
from steer_heal.model.lm import LM
from steer_heal.model.loading import load
from steer_heal.model.packing import packed
from steer_heal.model.steering import Steering, steering
from steer_heal.presets import PRESETS
from steer_heal.steer.extract import extract
from steer_heal.steer.personas import Personas

DOSES = (0.5, 1.0, 1.5, 2.0)
SINGLE_ROWS = 4  # rows timed one at a time; more would only make the benchmark longer
REPEATS = 5  # runs of each alternative, in turn; the fastest counts, other processes on the machine slow the rest
SINGLE_REPEATS = 2  # runs of decoding one row at a time, which takes longest and varies least


def generate(preset: str, rows: int, tokens: int) -> dict:
    """Time sampled steered decoding: transformers' `generate` one row at a time with hooks, and our one batch.

    Returns tokens per second of both and their ratio, ours without the steering hook, the share of our time that reads
    the prompts, and our share of the machine's matrix-product limit. The limit is measured in the same run: only the
    model's own weight matrices times `rows` rows, packed as for decoding.
    """
    config = PRESETS[preset]
    lm, trait = load(config.model), data.load_trait("love")
    lm = replace(lm, end_tokens=frozenset(), decode_rows=rows)  # no end token: both write all tokens
    steer = replace(config.steer, n_contexts=16)
    vector = extract(lm, Personas(trait.positive, trait.negative, list(data.contexts()[:16])), steer).vector
    prompts = [lm.prompt(trait.generation_prompts[i % len(trait.generation_prompts)]) for i in range(rows)]
    doses = torch.tensor([DOSES[i % len(DOSES)] for i in range(rows)])
    sampling = Sampling(("bench",), top_k=64, top_p=0.95)
    dosed = Steering(vector, doses)

    def one_at_a_time() -> None:
        for prompt, dose in zip(prompts[:SINGLE_ROWS], doses, strict=False):
            plain_generate(lm, prompt, Steering(vector, dose[None]), tokens)

    alternatives = {
        "single": one_at_a_time,
        "batched": lambda: decode(lm, prompts, tokens, dosed, sampling),
        "unsteered": lambda: decode(lm, prompts, tokens, None, sampling),
        "prompts": lambda: decode(lm, prompts, 1, dosed, sampling),
        "products": lambda: _weight_products(lm, rows, tokens),
    }
    seconds = {name: float("inf") for name in alternatives}
    for turn in range(REPEATS):
        for name, work in alternatives.items():
            if name != "single" or turn < SINGLE_REPEATS:
                seconds[name] = min(seconds[name], _seconds(work))
    single = min(rows, SINGLE_ROWS) * tokens / seconds["single"]
    batched = rows * tokens / seconds["batched"]
    return {
        "model": config.model.path,
        "dtype": dtype_of(lm),
        "rows": rows,
        "tokens": tokens,
        "single_tokens_per_s": single,
        "batched_tokens_per_s": batched,
        "ratio": batched / single,
        "unsteered_tokens_per_s": rows * tokens / seconds["unsteered"],
        "hook_cost": seconds["batched"] / seconds["unsteered"] - 1,
        "matrix_product_limit_tokens_per_s": rows * tokens / seconds["products"],
        "share_of_limit": seconds["products"] / seconds["batched"],
        "share_reading_prompts": seconds["prompts"] / seconds["batched"],
    }


def _weight_products(lm: LM, rows: int, steps: int) -> None:
    """Do the least work of `steps` decoding steps: multiply each weight matrix by `rows` vectors."""
    linear = [m for m in lm.decoder.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features, device=lm.device, dtype=m.weight.dtype) for m in linear}
    states = torch.randn(rows, lm.head.weight.shape[1], device=lm.device, dtype=lm.head.weight.dtype)
    with torch.no_grad(), packed(lm, rows * steps) as lm:
        for _ in range(steps):
            for module in linear:
                module(inputs[module.in_features])
            lm.head(states)


def plain_generate(lm: LM, prompt: list[int], steered: Steering, tokens: int) -> None:
    with steering(lm, steered) as dial:
        dial.turn(steered.dose.to(lm.device))
        ids = torch.tensor([prompt], device=lm.device)
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=64, top_p=0.95, **length)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
