"""A steering vector of others as `--steer.method file:PATH`: a control vector (.gguf), or safetensors.

repeng and llama.cpp write control vectors. steering-vectors and others keep a tensor for each block, which safetensors
holds as it is. Pickles are not read: they can run code. A run's own vector.safetensors is read as well.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer_heal.config import FILE, UserError
from steer_heal.model.gguf_file import Directions, read_control_vector
from steer_heal.model.lm import LM

RECIPE = "save_file({f'direction.{n}': v for n, v in vector.layer_activations.items()}, 'vector.safetensors')"


def path_of(method: str) -> Path:
    return Path(method.removeprefix(FILE)).expanduser()


def read(method: str) -> Directions:
    """The directions in the file that a method names, by block, counted from 0.

    Raises UserError for a file that is missing, damaged, of another kind, or holds no direction.
    """
    file, what = path_of(method), f"steer.method {method!r}"
    if not file.is_file():
        wrong = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"{what}: {str(file)!r} {wrong}: give a control vector (.gguf) or a .safetensors file")
    with file.open("rb") as stream:
        is_gguf = stream.read(4) == b"GGUF"
    found = read_control_vector(file, what) if is_gguf else _read_safetensors(file, what)
    if not found or any(direction.ndim != 1 for direction in found.values()):
        raise UserError(
            f"{what}: {str(file)!r} does not hold one direction for each block: name them direction.N, N counted from 0"
        )
    return dict(sorted(found.items()))


def _read_safetensors(file: Path, what: str) -> dict[int, Tensor]:
    try:
        with safe_open(file, "pt") as stored:
            own = (stored.metadata() or {}).get("vector")
            tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{what}: {str(file)!r} is neither a GGUF nor a safetensors file, and pickles (.pt) are not read, because "
            f"they can run code: save a vector of steering-vectors with {RECIPE}"
        ) from error
    if own is not None and "direction" in tensors:
        return _own(json.loads(own), tensors["direction"], what)
    numbered = {name: re.search(r"(?:^|\D)(\d+)$", name) for name in tensors}
    return {int(number[1]): tensors[name] for name, number in numbered.items() if number}


def _own(described: dict, direction: Float[Tensor, "l d"], what: str) -> Directions:
    """The directions of a run's own vector.safetensors."""
    if described["operation"] != "add":
        raise UserError(
            f"{what}: this vector is projected out, and a vector from a file is added: start a run with the "
            "steer.method that made it"
        )
    return dict(zip(described["layers"], direction, strict=True))


def directions(lm: LM, method: str, layers: tuple[int, ...]) -> Float[Tensor, "l d"]:
    """The file's directions for these blocks. Raises UserError when they do not fit the model."""
    found, what = read(method), f"steer.method {method!r}"
    width, own = len(next(iter(found.values()))), lm.decoder.config.hidden_size
    if any(len(direction) != own for direction in found.values()):
        raise UserError(
            f"{what}: its directions have {width} numbers, the states of {lm.name!r} {own}: it is of another model"
        )
    if missing := [layer for layer in layers if layer not in found]:
        raise UserError(
            f"{what}: it has no direction for block {missing[0]} of {lm.name!r} (it has blocks {min(found)} to "
            f"{max(found)}): choose them with steer.band, or give steer.band auto, which takes all of the file's"
        )
    chosen = torch.stack([found[layer] for layer in layers])
    for layer, norm in zip(layers, chosen.norm(dim=-1).tolist(), strict=True):
        if not 0 < norm < float("inf"):
            raise UserError(f"{what}: its direction of block {layer} has norm {norm:g}: leave that block out")
    return chosen.to(lm.device)


def blocks(lm: LM, method: str) -> tuple[int, ...]:
    """All blocks that the file steers. Raises UserError for one that the model has not."""
    found = tuple(read(method))
    if found[-1] >= len(lm.blocks):
        raise UserError(
            f"steer.method {method!r}: it has a direction for block {found[-1]}, {lm.name!r} has blocks 0 to "
            f"{len(lm.blocks) - 1}: it is of another model"
        )
    return found
