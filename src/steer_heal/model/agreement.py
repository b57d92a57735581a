"""Whether we compute what transformers computes, asked at every load.

What measures and trains never calls `model(...)`: it runs the decoder with caches, padding and shared prefixes of its
own, and applies the head itself. That is right for the families in FAMILIES, which the gate walks over. Of any other it
is not known, and a wrong number that nobody sees is the worst fault. So the step from states to logits is measured, and
two rows are compared with `model(...)` of each row alone. A model that differs is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from steer_heal.config import UserError
from steer_heal.model.batching import left_padded
from steer_heal.model.decode import Batch, decode_batch
from steer_heal.model.forward import first_blocks, forward, reading
from steer_heal.model.lm import LM, AfterHead, Row
from steer_heal.model.steering import UNSTEERED

# Their model_type, from the gate's walk (gate/test_families.py). Others are used too, if they agree.
# fmt: off
FAMILIES = (
    "cohere", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm4", "gpt_neox", "gpt_oss", "granite",
    "llama", "ministral3", "mistral", "mixtral", "nemotron", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_moe", "smollm3",
)
# fmt: on
ATTENTION = {"full_attention", "sliding_attention"}
WIDTHS = (9, 4)  # tokens of the prompts that are compared
SHARED = 2  # tokens that they share; the positions after these are compared
STEPS = 2  # tokens decoded after each prompt
# The largest root mean square difference, as a share of the spread. Another order of summation alone gives SmolLM2 in
# these types 4e-6, 0.01 and 0.08. 4-bit weights are multiplied in bfloat16, beside float32 ones too.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


class _Differs(Exception):
    """Says why a model cannot be used."""


def refused(path: str, config: PreTrainedConfig, why: str) -> UserError:
    """The error for a model that cannot be used, with the families that can."""
    kind = config.get_text_config().model_type
    return UserError(f"model {path!r} is a {kind}: {why}; families that work: {', '.join(FAMILIES)}")


def require_attention(config: PreTrainedConfig, path: str) -> None:
    """Raise UserError for a model that keeps another state than keys and values. It needs no weights."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - ATTENTION
    if kinds or getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_is_stateful", False):
        blocks = f" (blocks: {', '.join(sorted(kinds))})" if kinds else ""
        raise refused(path, config, f"a state-space, hybrid or chunked model{blocks}")


def attention(config: PreTrainedConfig) -> str:
    """The implementation of attention to load the model with: torch's fused function where transformers offers it."""
    models = [MODEL_FOR_CAUSAL_LM_MAPPING.get(type(part), None) for part in (config, config.get_text_config())]
    return "sdpa" if all(getattr(model, "_supports_sdpa", True) for model in models) else "eager"


def agreed(lm: LM) -> LM:
    """The model with its measured `after_head`. Raises UserError unless what we compute is what transformers does."""
    try:
        lm = replace(lm, after_head=after_head(lm))
        quantised = getattr(lm.model, "hf_quantizer", None) is not None
        most = TOLERANCE[torch.bfloat16 if quantised else lm.head.weight.dtype]
        for what, share in differences(lm):
            if not share <= most:
                raise _Differs(
                    f"its {what} would differ from transformers' by {share:.2g} of their spread (at most {most:g} may)"
                )
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a family that we do not know may fail in any way
        said = " ".join(str(error).split())[:300]
        why = said if isinstance(error, _Differs) else f"its decoder cannot be run ({type(error).__name__}: {said})"
        raise refused(lm.name, lm.model.config, why) from error
    return lm


@torch.no_grad()
def after_head(lm: LM) -> AfterHead:
    """Measure what the model does to its head's product: scale, bias and cap, see `lm.Head`.

    In a forward pass of one block known numbers in float32 replace the decoder's states and the head's product. What
    the head is given tells what happens before it; the logits tell what happens after it.
    """
    head = lm.model.get_output_embeddings()
    if not (isinstance(head, nn.Linear) and head.weight.is_floating_point()):
        raise _Differs(f"its head is a {type(head).__name__}, not a plain matrix")
    device = head.weight.device
    size = torch.tensor([[1.0], [-2.0]], device=device)
    states = size * torch.linspace(0.5, 1, head.in_features, device=device)
    product = size * 2.0 ** (torch.arange(head.out_features, device=device) % 61 - 20)
    given: list[Tensor] = []

    def give(_module: nn.Module, _args: tuple, output: dict) -> dict:
        output["last_hidden_state"] = states[None]
        return output

    def take(_module: nn.Module, args: tuple) -> tuple:
        given.append(args[0])
        return (args[0].to(head.weight.dtype),)

    hooks = [
        lm.decoder.register_forward_hook(give),
        head.register_forward_pre_hook(take),
        head.register_forward_hook(lambda _module, _args, _output: product[None]),
    ]
    try:
        with first_blocks(lm, 1):
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            logits = lm.model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    if [tuple(x.shape[1:]) for x in given] != [tuple(states.shape)] or logits.shape != product.shape:
        raise _Differs("between its decoder and its logits lies more than one head")
    return _after_head(states, given[0][0].float(), product, logits, head.bias)


def _after_head(
    states: Float[Tensor, "2 d"],
    given: Float[Tensor, "2 d"],
    product: Float[Tensor, "2 v"],
    logits: Float[Tensor, "2 v"],
    bias: Float[Tensor, " v"] | None,
) -> AfterHead:
    before, scale = (given[0, -1] / states[0, -1]).item(), (logits[0, 0] / product[0, 0]).item()
    softcap, expected = None, scale * product
    if logits.abs().max() < 0.5 * expected.abs().max():
        softcap = logits.abs().max().item()
        expected = softcap * torch.tanh(expected / softcap)
    if not all(torch.allclose(a, b, rtol=1e-5, atol=0) for a, b in ((given, before * states), (logits, expected))):
        raise _Differs("its logits are more than a matrix product that is scaled, shifted and soft-capped")
    before, scale = (1.0 if abs(x - 1) < 1e-6 else x for x in (before, scale))  # the softcap costs a rounding
    return AfterHead(softcap, before * scale, None if bias is None else scale * bias.detach().float())


@torch.no_grad()
def differences(lm: LM) -> Iterator[tuple[str, float]]:
    """What we compute for two rows of unequal length, and how far it lies from `model(...)` of each row alone."""
    text = lm.prompt("Hello") * max(WIDTHS)
    prompts = [(text[:SHARED] + text[SHARED + i :])[:width] for i, width in enumerate(WIDTHS)]
    padded = left_padded(lm, prompts, 0, max(WIDTHS))
    with _last_states(lm) as last:
        decoded = decode_batch(lm, Batch(torch.arange(len(prompts)), [], padded, UNSTEERED), STEPS, None)
    rows = [Row(p[: SHARED + 1], p[SHARED + 1 :] + done.ids) for p, done in zip(prompts, decoded, strict=True)]
    with reading(lm, tuple(range(len(lm.blocks)))) as seen:
        states = forward(lm, rows, shared=SHARED, multiple=1)
        ours = [_residual(lm, seen, i)[:, : len(row.completion)] for i, row in enumerate(rows)]
        for i, (row, done) in enumerate(zip(rows, decoded, strict=True)):
            ids = torch.tensor([row.prompt + row.completion[:-1]], device=lm.device)
            logits = lm.model(input_ids=ids, use_cache=False).logits[0, SHARED:].float()
            blocks, spread = _residual(lm, seen, 0)[:, SHARED:], _size(logits - logits.mean(-1, keepdim=True))
            yield "hidden states", max(_size(a - b) / _size(b) for a, b in zip(ours[i], blocks, strict=True))
            yield "logits", _size(lm.head(states[i]) - logits) / spread
            steps = lm.head(torch.stack([step[i] for step in last[: len(done.ids)]]))
            yield "logits in batched decoding", _size(steps - logits[-len(done.ids) :]) / spread


def _size(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@contextmanager
def _last_states(lm: LM) -> Iterator[list[Float[Tensor, "b d"]]]:
    """Yield a list that grows by the states at the last position of each forward pass."""
    last: list[Tensor] = []
    hook = lm.decoder.register_forward_hook(lambda _module, _args, output: last.append(output.last_hidden_state[:, -1]))
    try:
        yield last
    finally:
        hook.remove()


def _residual(lm: LM, seen: dict[int, Tensor], row: int) -> Float[Tensor, "l t d"]:
    """The residual stream of one row of the latest forward pass after every block."""
    streams = [stream.float() for _, stream in sorted(seen.items())]
    width = lm.model.config.get_text_config().hidden_size
    if any(stream.ndim != 3 or stream.shape[-1] != width for stream in streams):
        raise _Differs("its blocks do not return the residual stream")
    return torch.stack([stream[row] for stream in streams])
