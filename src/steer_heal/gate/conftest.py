"""Shared by all checks: types and shapes checked at run time, and one tiny random model."""

import warnings

import pytest

from steer_heal import check_types

check_types()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@pytest.fixture
def lm():
    """A fresh tiny random gemma-3 in float32 on the CPU."""
    from steer_heal.model.loading import load
    from steer_heal.presets import PRESETS

    return load(PRESETS["tiny-random"].model)


@pytest.fixture
def prompts(lm):
    """Chat prompts of very different lengths."""
    texts = [
        "Hi.",
        "How long should I boil an egg for a soft yolk?",
        "Name a tree.",
        "Why do people cry? " * 9,
        "Go on",
    ]
    return [lm.prompt(text) for text in texts]


@pytest.fixture
def vector(lm):
    """A steering vector strong enough to change what the tiny model writes."""
    import torch

    from steer_heal.model.steering import Vector

    generator = torch.Generator().manual_seed(1)
    return Vector((1, 2), 8.0 * torch.randn(2, 64, generator=generator))
