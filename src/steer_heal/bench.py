"""Side-by-side measurements: each figure is a ratio against a named alternative, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from steer_heal import data
from steer_heal.config import PRESETS
from steer_heal.generate import Sampling, decode
from steer_heal.lm import LM, Steering, steering
from steer_heal.loading import load
from steer_heal.steer import extract

DOSES = (0.5, 1.0, 1.5, 2.0)
SINGLE_ROWS = 6  # rows timed one at a time; more of them only make the benchmark longer


def generate(preset: str, rows: int, tokens: int) -> dict:
    """Sampled steered decoding: transformers' `generate` one row at a time with hooks, against one batch of ours.

    Returns tokens per second of each, their ratio, and of ours without the steering hook.
    """
    config = PRESETS[preset]
    lm, trait = load(config.model), data.load_trait("love")
    lm = LM(lm.model, lm.tokenizer, lm.name, frozenset())  # no end token: both write the full count
    vector = extract(lm, trait.positive, trait.negative, list(data.contexts()[:16]), config.steer).vector
    prompts = [lm.prompt(trait.generation_prompts[i % len(trait.generation_prompts)]) for i in range(rows)]
    doses = torch.tensor([DOSES[i % len(DOSES)] for i in range(rows)])
    sampling = Sampling(("bench",), top_k=64, top_p=0.95)

    def one_at_a_time() -> None:
        for prompt, dose in zip(prompts[:SINGLE_ROWS], doses, strict=False):
            _plain_generate(lm, prompt, Steering(vector, dose[None]), tokens)

    single = _tokens_per_second(one_at_a_time, min(rows, SINGLE_ROWS) * tokens)
    dosed = Steering(vector, doses)
    batched = _tokens_per_second(lambda: decode(lm, prompts, tokens, rows, dosed, sampling), rows * tokens)
    unsteered = _tokens_per_second(lambda: decode(lm, prompts, tokens, rows, None, sampling), rows * tokens)
    return {
        "model": config.model.path,
        "rows": rows,
        "tokens": tokens,
        "single_tokens_per_s": single,
        "batched_tokens_per_s": batched,
        "ratio": batched / single,
        "unsteered_tokens_per_s": unsteered,
    }


def _plain_generate(lm: LM, prompt: list[int], steered: Steering, tokens: int) -> None:
    with steering(lm, steered) as dial:
        dial.turn(steered.dose.to(lm.device))
        ids = torch.tensor([prompt], device=lm.device)
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=64, top_p=0.95, **length)


def _tokens_per_second(work: Callable[[], object], tokens: int) -> float:
    """Best of two: the first pays for warm-up."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return tokens / min(seconds)
