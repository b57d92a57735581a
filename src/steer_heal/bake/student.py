"""The gated adapter history, on PEFT.

    y = W x + g_hist * (alpha/r) B_hist A_hist x + g_now * (alpha/r) B A x

Gate (g_hist, g_now) is (0, 0) for the pristine base, (1, 0) for the previous student and (1, 1) for the student.
g_now scales the latest round. Past rounds are folded into one adapter, so a forward pass has two low-rank products
per layer, whatever the number of rounds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from steer_heal.bake.lowrank import Factors, compress
from steer_heal.bake.reach import reach
from steer_heal.config import AdapterConfig
from steer_heal.model.lm import LM

NOW = "now"
ALPHA_OVER_RANK = 2  # scale of the update; constant, so that the step size does not depend on the rank


class Student:
    """A model with its baked rounds. Outside a `view` its gate is (1, 1)."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.peft: PeftModel | None = None
        self.history: str | None = None  # name of the adapter that holds all folded rounds
        self.folded = 0
        self.targets = reach(lm.blocks, range(len(lm.blocks))).targets  # now: later the blocks hold adapters

    def begin_round(self, config: AdapterConfig, seed: int) -> None:
        """Add a fresh adapter with B = 0. The student then equals the previous student exactly."""
        layers, modules = list(self.lm.band(config.band)), self.lm.model.named_modules()
        lora = LoraConfig(
            r=config.r,
            lora_alpha=ALPHA_OVER_RANK * config.r,
            target_modules=list(self.targets),
            layers_to_transform=layers,
            layers_pattern="layers",
            # In a multimodal gemma, adapt the text tower only. peft warns about a pattern that matches nothing.
            exclude_modules=r".*vision.*" if any("vision" in name for name, _ in modules) else None,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.peft is None:
                self.peft = get_peft_model(self.lm.model, lora, adapter_name=NOW)
            else:
                self.peft.add_adapter(NOW, lora)
        self._rest()

    def load_round(self, folder: Path) -> None:
        """Add a finished round's adapter from disk, in place of `begin_round` and training."""
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.lm.model, folder, adapter_name=NOW)
        else:
            self.peft.load_adapter(folder, NOW)
        self._rest()

    def fold(self, rank: int = 0) -> float:
        """Join the current round, if there is one, to the history. Gate (1, 1) before and (1, 0) after are one model.

        The factors are stacked: this is exact, and the history's rank grows by r each round. With `rank` above 0 a
        stack of a larger rank is compressed to the closest update of that rank, so the cost per token stays constant.
        Returns the relative error of the compression, in the Frobenius norm over all layers (0 when there is none).
        """
        parts = [name for name in (self.history, NOW) if name in self.peft.peft_config]
        stacked = {path: _stacked([_factors(layer, part) for part in parts]) for path, layer in self._layers()}
        lost, total = 0.0, 0.0
        width = sum(self.peft.peft_config[part].r for part in parts)
        if 0 < rank < width:
            for path, (a, b) in stacked.items():
                small = compress(a, b, rank)
                stacked[path] = (small.a, small.b)
                lost, total, width = lost + small.lost, total + small.total, rank
        name = f"history{self.folded}"
        config = replace(self.peft.peft_config[parts[-1]], r=width, lora_alpha=width, rank_pattern={}, alpha_pattern={})
        self.peft.add_adapter(name, config)
        with torch.no_grad():
            for path, layer in self._layers():
                factors = _factors(layer, name)
                for factor, value in zip((factors.a, factors.b), stacked[path], strict=True):
                    factor.copy_(value)
        self.history = name
        self.folded += 1
        self._apply((1.0, 0.0, False))  # peft warns when an active adapter is deleted
        for part in parts:
            self.peft.delete_adapter(part)
        self._rest()
        return (lost / total) ** 0.5 if total else 0.0

    def drop(self) -> None:
        """Remove the current round's adapter without joining it to the history."""
        self._apply((1.0, 0.0, False))  # peft warns when an active adapter is deleted
        self.peft.delete_adapter(NOW)
        self._rest()

    @contextmanager
    def view(self, history: float = 1.0, now: float = 1.0, train: bool = False) -> Iterator[None]:
        """Set the gate to (history, now) in the block. It is restored afterwards, also after an exception and nested.

        With `train` the current round's factors require gradients. Other parameters never do.
        """
        if self.peft is None:
            yield
            return
        before = self._gates
        self._apply((history, now, train))
        try:
            yield
        finally:
            self._apply(before)

    def factors(self) -> list[Factors]:
        """The current round's update, layer by layer."""
        return [_factors(layer, NOW) for _, layer in self._layers()]

    @property
    def rank(self) -> int:
        """The rank of the history."""
        return self.peft.peft_config[self.history].r

    def updates(self) -> Iterator[tuple[str, Factors]]:
        """The history's update, layer by layer, each with its path in the model."""
        for path, layer in self._layers():
            yield path, _factors(layer, self.history)

    def trainable(self) -> list[torch.nn.Parameter]:
        """The factors of the current round."""
        return [p for name, p in self.peft.named_parameters() if f".{NOW}." in name]

    def save(self, folder: Path, name: str = NOW) -> None:
        """Write one adapter as a plain PEFT folder that `PeftModel.from_pretrained` reads."""
        config = self.peft.peft_config[name]
        config.base_model_name_or_path = self.lm.name  # peft would write a local path
        config.target_modules = sorted(config.target_modules)  # a set's order differs between processes
        self.peft.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
        (folder / "README.md").unlink()  # peft's own model card; the adapter lies in a subfolder of its name
        for file in (folder / name).iterdir():
            os.rename(file, folder / file.name)
        (folder / name).rmdir()

    def merged(self) -> PreTrainedModel:
        """Return the plain model with the history added to its weights. The student cannot be used afterwards."""
        return self.peft.merge_and_unload(adapter_names=[self.history])

    def _rest(self) -> None:
        self._gates = (1.0, 1.0, False)
        self._apply(self._gates)

    def _apply(self, gates: tuple[float, float, bool]) -> None:
        """Set active adapters, their scales and requires_grad on every LoRA layer. An adapter at gate 0 is inactive."""
        history, now, train = self._gates = gates
        present = self.peft.peft_config
        wanted = [(name, gate) for name, gate in ((self.history, history), (NOW, now)) if name in present and gate != 0]
        for _, layer in self._layers():
            layer.enable_adapters(bool(wanted))
            layer.set_adapter([name for name, _ in wanted], inference_mode=True)
            for name, gate in wanted:
                layer.set_scale(name, gate)
        for parameter in self.trainable():
            parameter.requires_grad_(train)

    def _layers(self) -> list[tuple[str, LoraLayer]]:
        return [(path, layer) for path, layer in self.peft.named_modules() if isinstance(layer, LoraLayer)]


def _factors(layer: LoraLayer, name: str) -> Factors:
    return Factors(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_alpha[name] / layer.r[name])


def _stacked(parts: list[Factors]) -> tuple[Tensor, Tensor]:
    """One pair of factors whose product is the sum of all updates."""
    with torch.no_grad():
        return torch.cat([part.a for part in parts]), torch.cat([part.scale * part.b for part in parts], dim=1)
