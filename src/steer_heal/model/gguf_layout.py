"""How llama.cpp names a model's matrices, and in which order it keeps their rows.

The names are those of the package gguf. What no table of names says is in FAMILIES: which families were compared with
llama.cpp itself (`gate/test_llama_cpp.py`), and which of them keep the rows of q and k in another order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import gguf
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from steer_heal.config import UserError
from steer_heal.model.lm import LM

NAME_ONLY = "model.layers.{}.{}"  # the form under which gguf looks a matrix up


@dataclass(frozen=True)
class Family:
    """A family of models in llama.cpp."""

    architecture: str
    """its name there"""
    paired: bool = False
    """whether rotary position is applied to neighbouring rows of q and k; transformers applies it to two halves"""


# By transformers' model_type.
FAMILIES = {
    "llama": Family("llama", paired=True),
    "mistral": Family("llama", paired=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3"),
}


@dataclass(frozen=True)
class Layout:
    """Names and row orders of one model."""

    architecture: str
    names: gguf.TensorNameMap
    heads: dict[str, int]
    """heads of the matrices whose rows are kept in pairs"""

    def name(self, path: str) -> str:
        """llama.cpp's name of the matrix at this path of the model, e.g. blk.3.attn_q.weight.

        Raises UserError for a matrix that it has no name for.
        """
        found = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", path)
        name = self.names.get_name(NAME_ONLY.format(*found.groups())) if found else None
        if name is None:
            raise UserError(f"llama.cpp has no name for {path!r} in a {self.architecture}: export without .gguf")
        return f"{name}.weight"

    def rows(self, name: str, matrix: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
        """The matrix with its rows in llama.cpp's order.

        An update B A changes its rows with B alone, so its factor B takes the place of the matrix.
        """
        heads = self.heads.get(name.split(".")[-2])
        if heads is None:
            return matrix
        return rearrange(matrix, "(heads half dim) n -> (heads dim half) n", heads=heads, half=2)


def layout_of(lm: LM) -> Layout:
    """The layout of a model. Raises UserError for a family that was not compared with llama.cpp."""
    config = lm.decoder.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"--to FILE.gguf: {lm.name!r} is a {config.model_type}; llama.cpp's layout is known for "
            f"{', '.join(sorted(FAMILIES))}: give a folder in place of a .gguf file"
        )
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if family.paired else {}
    return Layout(family.architecture, gguf.get_tensor_name_map(number, len(lm.blocks)), heads)
