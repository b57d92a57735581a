"""Training on one's own text: who writes it, when, and what the teacher says about it."""

from dataclasses import replace

import pytest
import torch

from steer_heal.bake.student import Student
from steer_heal.gate.conftest import turned
from steer_heal.heal.own_text import OwnText
from steer_heal.heal.train import Turn, heal
from steer_heal.model.forward import states
from steer_heal.model.lm import Row
from steer_heal.model.steering import Steering
from steer_heal.presets import PRESETS

CONFIG = turned(
    PRESETS["tiny-random"].heal,
    {"text": "own", "objective": "kl_rev", "target.kind": "mirrored", "barrier.tau": 1e9, "training.lr": 5e-3},
)
ASKED = ["What is a glacier?", "Say something kind.", "How do I boil an egg?", "Why is the sky blue?"]
DOSE = 0.3
PERSONA = "You are very fond of eggs."


def writer(lm, vector, **changes):
    student = Student(lm)
    student.begin_round(CONFIG.lora, 0)
    return replace(OwnText(student, ASKED, vector, DOSE, 8, (0, 0, "own"), PERSONA), **changes)


def moved(student, scale=0.5):
    draw = torch.Generator().manual_seed(1)
    for parameter in student.trainable():
        parameter.data = scale * torch.randn(parameter.shape, generator=draw).to(parameter.device)


def texts(examples):
    return [example.row.completion for example in examples]


@pytest.mark.device
def test_the_student_in_training_writes_and_the_student_before_is_the_teacher(lm, vector):
    own = writer(lm, vector)
    before = texts(own.examples(0, CONFIG))
    moved(own.student)
    examples = own.examples(0, CONFIG)
    assert texts(examples) != before  # the same noise, another student
    rows = [example.row for example in examples]
    with own.student.view(now=0.0):
        plain, ahead, behind = (
            states(lm, rows, Steering(vector, torch.full((len(rows),), dose))) for dose in (0.0, DOSE, -DOSE)
        )
    for example, h, a, b in zip(examples, plain, ahead, behind, strict=True):
        torch.testing.assert_close(example.teacher, h + CONFIG.target.gain / 2 * (a - b), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(example.reference, h, rtol=1e-4, atol=1e-5)


@pytest.mark.device
def test_a_persona_teaches_without_a_vector(lm, vector):
    own = writer(lm, vector)
    moved(own.student)
    examples = own.examples(0, turned(CONFIG, {"target.kind": "persona"}))
    rows = [Row(lm.prompt(p, PERSONA), e.row.completion) for p, e in zip(ASKED, examples, strict=True)]
    with own.student.view(now=0.0):
        expected = states(lm, rows)
    for example, taught in zip(examples, expected, strict=True):
        torch.testing.assert_close(example.teacher, taught)


def test_every_epoch_has_answers_of_its_own_and_the_same_ones_again(lm, vector):
    own = writer(lm, vector)
    epochs = [texts(own.examples(epoch, CONFIG)) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert [writing.epoch for writing in own.written] == [0, 1, 0]
    assert all(len(answer.ids) <= 8 for writing in own.written for answer in writing.answers)
    assert writer(lm, vector, prompts=[]).examples(0, CONFIG) == []


def test_training_asks_for_text_before_each_epoch_and_not_in_training_mode(lm, vector):
    own, asked = writer(lm, vector), []

    def text(epoch):
        asked.append((epoch, own.student._gates, lm.model.training))
        return own.examples(epoch, CONFIG)

    config = turned(CONFIG, {"training.epochs": 3, "training.checkpointing": True, "training.batch": 2})
    steps = heal(own.student, text, [], config, Turn(0, 0))
    assert [epoch for epoch, *_ in asked] == [0, 0, 1, 2] and len(steps) == 6
    assert {(gates, mode) for _, gates, mode in asked} == {((1.0, 1.0, False), False)}
    assert [step.epoch for step in steps] == [0, 0, 1, 1, 2, 2]


@pytest.mark.run
@pytest.mark.device
def test_the_student_comes_nearer_to_the_teacher_on_text_that_it_writes_afterwards(lm, vector):
    own = writer(lm, vector)
    config = turned(CONFIG, {"training.epochs": 25, "training.batch": 2})
    steps = heal(own.student, lambda epoch: own.examples(epoch, config), [], config, Turn(0, 0))
    first, last = (sum(s.objective for s in steps if s.epoch in which) for which in ((0, 1, 2), (22, 23, 24)))
    assert 0 < last < 0.7 * first
