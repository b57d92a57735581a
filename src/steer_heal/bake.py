"""The gated adapter history, on PEFT.

    y = W x + g_hist * (alpha/r) B_hist A_hist x + g_now * (alpha/r) B A x

Gate (0, 0) is the pristine base, (1, 0) the previous student, (1, 1) the student; g_now dials the latest round.
Past rounds are stacked into one adapter, so a forward pass meets two low-rank products however many rounds went by.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from steer_heal.config import HealConfig
from steer_heal.lm import LM

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOW = "now"


class Student:
    """A model with its baked rounds. Outside a `view` its gate is (1, 1)."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.peft: PeftModel | None = None
        self.history: str | None = None  # name of the adapter that holds all folded rounds
        self.folded = 0

    def begin_round(self, config: HealConfig, seed: int) -> None:
        """Add a fresh adapter with B = 0: the student starts exactly at the previous one."""
        layers, modules = list(self.lm.band(config.band)), self.lm.model.named_modules()
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            target_modules=TARGET_MODULES,
            layers_to_transform=layers,
            layers_pattern="layers",
            # Of a multimodal gemma the text tower only; peft warns about a pattern that matches nothing.
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

    def fold(self) -> None:
        """Stack the current round onto the history; (1, 1) before and (1, 0) after are the same model."""
        parts = [name for name in (self.history, NOW) if name is not None]
        name = f"history{self.folded}"
        self.peft.base_model.add_weighted_adapter(parts, [1.0] * len(parts), name, combination_type="cat")
        self.history = name
        self.folded += 1
        self._apply((1.0, 0.0, False))  # peft warns when an adapter is deleted that is still active
        for part in parts:
            self.peft.delete_adapter(part)
        self._rest()

    @contextmanager
    def view(self, history: float = 1.0, now: float = 1.0, train: bool = False) -> Iterator[None]:
        """The model at gate (history, now); restored afterwards, also through an exception and when nested.

        With `train` the current round's factors require gradients; everything else never does.
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

    def trainable(self) -> list[torch.nn.Parameter]:
        """The factors of the current round."""
        return [p for name, p in self.peft.named_parameters() if f".{NOW}." in name]

    def save(self, folder: Path, name: str = NOW) -> None:
        """Write one adapter as a plain PEFT folder that `PeftModel.from_pretrained` reads."""
        self.peft.peft_config[name].base_model_name_or_path = self.lm.name  # peft would note a path of this machine
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            self.peft.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
            os.rename(Path(scratch) / name, folder)

    def _rest(self) -> None:
        self._gates = (1.0, 1.0, False)
        self._apply(self._gates)

    def _apply(self, gates: tuple[float, float, bool]) -> None:
        """Set active adapters, their scales and requires_grad on every LoRA layer; a gate of 0 leaves no trace."""
        history, now, train = self._gates = gates
        present = self.peft.peft_config
        wanted = [(name, gate) for name, gate in ((self.history, history), (NOW, now)) if name in present and gate != 0]
        for layer in self.peft.modules():
            if isinstance(layer, LoraLayer):
                layer.enable_adapters(bool(wanted))
                layer.set_adapter([name for name, _ in wanted], inference_mode=True)
                for name, gate in wanted:
                    layer.set_scale(name, gate)
        for parameter in self.trainable():
            parameter.requires_grad_(train)
