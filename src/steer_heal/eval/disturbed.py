"""A student, or its base, as users change a merged model: rounded to fewer bits, or trained further on other text.

Each is a context manager that takes the gate of the history: 0 is the base, 1 the student. Both are changed alike, so
that their difference is the trait's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from jaxtyping import Float
from torch import Tensor, nn

from steer_heal.bake.student import Student
from steer_heal.config import AdapterConfig
from steer_heal.data import neutral

STEPS, TEXTS_A_STEP, RATE = 50, 2, 2e-4
LORA = AdapterConfig(r=16, band=(0.0, 1.0))
SEED = 0  # of the fresh adapter and of the order of the texts: the same for base and student


@contextmanager
def unchanged(student: Student, history: float) -> Iterator[None]:
    """The model as it is."""
    with student.view(history=history, now=0.0):
        yield


@contextmanager
def rounded_weights(student: Student, history: float, rounding: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The merged model with the matrices of its blocks rounded. Embeddings, norms and head stay as they are.

    The model must hold float weights. What is computed with the rounded ones has the model's own type.
    """
    updates = {student.peft.get_submodule(path).base_layer: factors for path, factors in student.updates()}
    named = student.lm.blocks.named_modules()
    matrices = [module for name, module in named if isinstance(module, nn.Linear) and ".lora_" not in name]
    before = [module.weight.data for module in matrices]
    try:
        for module in matrices:
            weight = module.weight.data
            if module in updates and history:
                a, b, scale = updates[module]
                weight = (weight + history * scale * (b.to(weight) @ a.to(weight))).detach()
            module.weight.data = rounding(weight)
        with student.view(history=0.0, now=0.0):
            yield
    finally:
        for module, weight in zip(matrices, before, strict=True):
            module.weight.data = weight


def to_8_bits(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The nearest whole multiples, -127 to 127, of a step that each row has of its own: its largest weight / 127."""
    wide = weight.float()
    step = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny) / 127
    return ((wide / step).round() * step).to(weight.dtype)


def to_4_bits(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """NF4 of bitsandbytes, in blocks of 64 with double quantisation, as `model.quant nf4` loads it."""
    return dequantize_4bit(*quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4"))


@contextmanager
def fine_tuned(student: Student, history: float) -> Iterator[None]:
    """The model after 50 steps of plain fine-tuning on neutral text: NLL of every token, no chat, no barrier.

    A fresh LoRA of rank 16 on all blocks is trained by AdamW at a constant rate of 2e-4, two texts a step. It is gone
    when the `with` block ends.
    """
    student.begin_round(LORA, SEED)
    try:
        with student.view(history=history, now=1.0, train=True):
            optimiser = torch.optim.AdamW(student.trainable(), lr=RATE, weight_decay=0.0)
            for batch in _batches():
                _step(student, batch, optimiser)
        with student.view(history=history, now=1.0):
            yield
    finally:
        student.drop()


def _batches() -> Iterator[list[str]]:
    """TEXTS_A_STEP neutral texts for each step, every text once before one comes again."""
    shuffle, left = random.Random(SEED), []
    for _ in range(STEPS):
        if len(left) < TEXTS_A_STEP:
            left = shuffle.sample(neutral(), len(neutral()))
        yield [left.pop() for _ in range(TEXTS_A_STEP)]


def _step(student: Student, texts: list[str], optimiser: torch.optim.Optimizer) -> None:
    """One step on the mean NLL per token. Each text is a pass of its own, so that nothing is padded."""
    lm = student.lm
    rows = [torch.tensor([lm.tokenizer(text).input_ids], device=lm.device) for text in texts]
    tokens = sum(ids.shape[1] - 1 for ids in rows)
    for ids in rows:
        loss = lm.model(input_ids=ids, labels=ids, use_cache=False).loss  # mean over the text's tokens
        (loss * (ids.shape[1] - 1) / tokens).backward()
    optimiser.step()
    optimiser.zero_grad()
