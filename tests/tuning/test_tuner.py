# SPDX-License-Identifier: Apache-2.0
"""One piece's optimisation, step by step."""

import math

import pytest
import torch
from helpers.students import image_set, recipe, teacher_of, values

from zsq.functional.rounding import beta_at
from zsq.quantizers.attach import calibrate
from zsq.runtime.context import Context
from zsq.student import attach, prepared_network
from zsq.tuning.pieces import block_pieces
from zsq.tuning.tuner import PieceTuner, Problem


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


def tuner(teacher, *settings, index=1, count=24, **changes):
    """Return the tuner of one block; both inputs differ by noise, as if it were the student's."""
    chosen = recipe(*settings, **changes)
    student = attach(teacher, chosen)
    network = prepared_network(teacher, chosen)
    piece = block_pieces(network, student)[index]
    seen = values(network, image_set(count).images)
    inputs = seen[piece.source]
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    problem = Problem(inputs, inputs + noise, seen[piece.output])
    torch.manual_seed(0)
    made = PieceTuner(piece, problem, chosen.tuning, Context())
    made.calibrate()
    return made, student


# --- batches and inputs --------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (24, 8), (7, 3), (5, 5)])
def test_every_image_is_used_once_an_epoch(teacher, count, batch):
    made, _ = tuner(teacher, f"tuning.batch={batch}", count=count)
    drawn = torch.cat([made.next_indices() for _ in range(count)])  # `batch` epochs
    assert len(drawn) == count * batch
    for epoch in drawn.split(count):
        assert sorted(epoch.tolist()) == list(range(count))
    assert not torch.equal(drawn[:count], drawn[count : 2 * count]) or batch == 1


def test_a_batch_larger_than_the_set_is_the_set(teacher):
    made, _ = tuner(teacher, "tuning.batch=100", count=6)
    assert sorted(made.next_indices().tolist()) == list(range(6))


class Recorded(PieceTuner):
    """Remembers what the loss is given."""

    def loss(self, inputs, target):
        self.given = inputs.clone(), target.clone()
        return super().loss(inputs, target)


def given(teacher, *settings):
    made, _ = tuner(teacher, *settings)
    made.__class__ = Recorded
    torch.manual_seed(1)
    indices = made.next_indices()
    made.next_indices = lambda: indices
    made.step(0)
    problem = made.problem
    return (*made.given, *(t[indices] for t in (problem.from_teacher, problem.from_student)),
            problem.target[indices])  # fmt: skip


@pytest.mark.parametrize(("mix", "share"), [(0, 0.0), (0.5, 0.5), (0.25, 0.25), (1, 1.0)])
def test_inputs_are_mixed_element_by_element(teacher, mix, share):
    inputs, target, ours, theirs, wanted = given(teacher, f"tuning.mix={mix}")
    assert torch.equal(target, wanted)
    from_student = inputs == theirs
    assert bool((from_student | (inputs == ours)).all())
    assert float(from_student.float().mean()) == pytest.approx(share, abs=0.05)
    if 0 < share < 1:  # neither whole images nor whole channels
        assert bool((from_student.float().mean((2, 3)) < 0.9).all())
        assert bool((from_student.float().mean((2, 3)) > 0.05).all())


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("index", [1, 3])  # a block of maps, the classifier of vectors
def test_the_error_is_summed_over_channels_and_averaged_over_the_rest(teacher, index, power):
    made, _ = tuner(teacher, f"tuning.loss_power={power}", index=index)
    for quantizer in made.quantizers.values():
        quantizer.drop = 0.0
    problem = made.problem
    difference = made.piece.student(problem.from_student) - problem.target
    places = difference.numel() // difference.shape[1]
    expected = float((difference.detach().double().abs() ** power).sum()) / places
    assert made.loss(problem.from_student, problem.target).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_the_regularizer_is_off_during_the_warm_up_and_the_papers_sum_after(teacher):
    made, _ = tuner(teacher, "tuning.steps=100", "tuning.warmup=0.2", "tuning.rounding_weight=0.7")
    assert made.regularizer(19) is None
    made.loss(made.problem.from_teacher, made.problem.target)
    for step in (20, 60, 99):
        total = 0.0
        for weight in made.weights:
            h = weight.soft_bits().detach().double()
            total += float((1 - (2 * h - 1).abs() ** beta_at(step, 100)).sum())
        assert made.regularizer(step).item() == pytest.approx(0.7 * total, rel=1e-4)


def test_without_its_weight_there_is_no_regularizer(teacher):
    made, _ = tuner(teacher, "tuning.steps=10", "tuning.rounding_weight=0")
    made.loss(made.problem.from_teacher, made.problem.target)
    assert made.regularizer(9) is None


# --- what is learned -----------------------------------------------------------------------------


def state(student):
    return {k: v.detach().clone() for k, v in student.state_dict().items()}


def test_a_step_moves_the_pieces_own_parameters_and_nothing_else(teacher):
    made, student = tuner(teacher)
    before = state(student)
    made.step(0)
    moved = {k for k, v in state(student).items() if not torch.equal(v, before[k])}
    layers = {f"network.{p}.weight" for p in ("a1", "a2", "proj")}
    steps = {f"network.quantizers.{n}.raw_scale" for n in ("relu_default", "relu_default_1")}
    assert moved == {f"{p}.{n}" for p in layers for n in ("rounding", "raw_scale")} | steps


@pytest.mark.parametrize(
    ("setting", "still"),
    [("learn_weight_scale", ".weight.raw_scale"), ("learn_activation_scale", "quantizers.")],
)
def test_steps_that_are_not_learned_stand_still(teacher, setting, still):
    made, student = tuner(teacher, f"tuning.{setting}=false")
    before = state(student)
    for step in range(3):
        made.step(step)
    for key, value in state(student).items():
        if still in key:
            assert torch.equal(value, before[key]), key
    assert not torch.equal(
        state(student)["network.a1.weight.rounding"], before["network.a1.weight.rounding"]
    )


def test_step_rates_fall_along_a_cosine_and_that_of_the_bits_is_constant(teacher):
    made, _ = tuner(
        teacher, "tuning.steps=10", "tuning.scale_lr=0.02", "tuning.activation_lr=0.01",
        "tuning.rounding_lr=0.003",
    )  # fmt: skip
    steps, bits = made.optimizers
    for step in range(10):
        made.step(step)
        factor = (1 + math.cos(math.pi * step / 10)) / 2
        rates = [group["lr"] for group in steps.param_groups]
        assert rates == pytest.approx([0.02 * factor, 0.01 * factor])
        assert bits.param_groups[0]["lr"] == 0.003


@pytest.mark.parametrize(("steps", "rate"), [(1000, 0.02), (20000, 0.001), (10, 0.1)])
def test_unless_told_the_rate_of_the_bits_suits_the_number_of_steps(teacher, steps, rate):
    made, _ = tuner(teacher, "tuning.rounding_lr=null", f"tuning.steps={steps}")
    assert made.optimizers[1].param_groups[0]["lr"] == pytest.approx(rate)


def test_biases_are_learned_only_when_they_have_a_rate(teacher):
    for rate, learned in ((0, False), (0.01, True)):
        made, student = tuner(teacher, f"tuning.bias_lr={rate}")
        before = state(student)
        made.step(0)
        after = state(student)
        for path in ("a1", "a2", "proj"):
            key = f"network.{path}.bias"
            assert torch.equal(after[key], before[key]) is not learned
        assert torch.equal(after["network.b1.bias"], before["network.b1.bias"])


def test_the_first_steps_of_activations_come_from_the_students_inputs(teacher):
    made, student = tuner(teacher)
    reference, other = tuner(teacher)
    names = reference.quantizers
    for quantizer in names.values():
        quantizer.enabled = False
    calibrate(reference.piece.student, names, [reference.problem.from_student], power=2.4)
    for name, quantizer in made.quantizers.items():
        assert torch.equal(quantizer.scale, other.quantizer(name).scale)
        assert bool(quantizer.calibrated)
        assert quantizer.enabled
        assert quantizer.drop == 0.5
    assert not student.quantizer("relu_default_2").enabled, "another piece's"


def test_dropping_everything_leaves_the_activation_steps_alone(teacher):
    made, student = tuner(teacher, "tuning.drop=1")
    before = state(student)
    for step in range(3):
        made.step(step)
    after = state(student)
    for name in ("relu_default", "relu_default_1"):
        key = f"network.quantizers.{name}.raw_scale"
        assert torch.equal(after[key], before[key])


def test_finishing_rounds_hard_and_stops_dropping(teacher):
    made, student = tuner(teacher, "tuning.steps=10")
    for step in range(10):
        made.step(step)
    bits = torch.cat([w.soft_bits().detach().flatten() for w in made.weights])
    expected = float(((bits > 0.05) & (bits < 0.95)).float().mean())
    codes = {p: student.layers()[p].weight.codes() for p in made.layers}
    assert made.finish() == pytest.approx(expected)
    for path, wanted in codes.items():
        assert torch.equal(student.layers()[path].frozen.codes(), wanted)
    assert all(q.drop == 0 for q in made.quantizers.values())
    x = made.problem.from_student
    assert torch.equal(made.piece.student(x), made.piece.student(x))
    assert not made.piece.student(x).requires_grad
