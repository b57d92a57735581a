"""Training on one's own text: the student in training answers the prompts itself before every epoch, unsteered.

The steered teacher then says, token by token, what it would have written next on that text. The text comes from the
model that is trained, so the student learns where it really goes, and the teacher's own errors are never imitated. This
is on-policy distillation (Agarwal et al., arXiv:2306.13649) with a steered teacher.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from steer_heal.bake.student import Student
from steer_heal.config import HealConfig
from steer_heal.heal.examples import Example, prepare
from steer_heal.model.decode import Decoded, Sampling, decode
from steer_heal.model.lm import Row
from steer_heal.model.steering import AnyVector, Steering


@dataclass(frozen=True)
class Writing:
    """The student's answers before one epoch, and the seconds that they took with their teacher."""

    epoch: int
    answers: list[Decoded]
    seconds: float


@dataclass
class OwnText:
    """Writes the student's answers and makes training examples of them."""

    student: Student
    prompts: list[str]
    vector: AnyVector
    dose: float
    """of the teacher that compares"""
    longest: int
    """limit of an answer, tokens"""
    key: tuple
    """names the stream of random numbers"""
    persona: str
    """the positive persona, for a target `persona`"""
    written: list[Writing] = field(default_factory=list)

    def examples(self, epoch: int, config: HealConfig) -> list[Example]:
        """Answer every prompt as the student is now; return the answers as training examples."""
        if not self.prompts:
            return []
        began, lm = time.perf_counter(), self.student.lm
        prompts = [lm.prompt(prompt) for prompt in self.prompts]
        with self.student.view():
            answers = decode(lm, prompts, self.longest, None, Sampling((*self.key, epoch)))
        rows = [Row(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
        under = [lm.prompt(prompt, self.persona) for prompt in self.prompts]
        steering = Steering(self.vector, torch.full((len(rows),), self.dose))
        made = prepare(self.student, rows, steering, config, under)
        self.written.append(Writing(epoch, answers, time.perf_counter() - began))
        return made
