# SPDX-License-Identifier: Apache-2.0
"""Compiled losses of pieces: the numbers of the eager loss, one compilation for equal blocks."""

import dataclasses

import pytest
import torch
from helpers.students import image_set, recipe, teacher_of, values
from torch import nn

import zsq.tuning.compiling as compiling
from zsq.functional.masks import RandomMasks
from zsq.runtime.context import Context
from zsq.runtime.policy import Policy, make_policy
from zsq.student import attach, prepared_network
from zsq.tuning.compiling import PieceCompiler, structure
from zsq.tuning.pieces import block_pieces
from zsq.tuning.tuner import PieceTuner, Problem


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
            for _ in range(2)
        )

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Blocks(nn.Module):
    """Three blocks of equal shape, whose first reads 8 bits, and one that is wider."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.one, self.two, self.three = Block(4), Block(4), Block(4)
        self.widen = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.four = Block(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.four(self.widen(self.three(self.two(self.one(self.stem(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def teacher():
    return teacher_of(Blocks)


def tuners(teacher, *settings, compiler=None, context=None, weigh=False):
    """Return a tuner for every block, each with the float network's inputs plus noise."""
    chosen = recipe(*settings)
    student, network = attach(teacher, chosen), prepared_network(teacher, chosen)
    seen = values(network, image_set(24).images)
    found = {}
    for piece in block_pieces(network, student):
        torch.manual_seed(0)
        inputs = seen[piece.source]
        problem = Problem(inputs, inputs + 0.1 * torch.randn(inputs.shape), seen[piece.output])
        if weigh:
            counts = torch.linspace(0.5, 1.5, seen[piece.output].shape[1])
            problem = dataclasses.replace(problem, importance=counts)
        made = PieceTuner(piece, problem, chosen.tuning, context or Context(), compiler=compiler)
        made.calibrate()
        found[piece.name] = made
    return found


@pytest.fixture
def eager(monkeypatch):
    """Return a compiler that does everything but compile, so that numbers can be compared exactly."""
    monkeypatch.setattr(compiling, "REPAID", 0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return PieceCompiler(Policy(compile=True), print)


def names_of(found, *parts):
    return [found[next(n for n in found if part in n)] for part in parts]


def test_equal_blocks_have_equal_structures_and_others_do_not(teacher):
    found = tuners(teacher)
    one, two, three, four = (
        structure(t.piece.student) for t in names_of(found, "one", "two", "three", "four")
    )
    assert two == three
    assert one != two, "the first block reads 8 bits"
    assert two != four


def test_bits_are_part_of_the_structure(teacher):
    usual = tuners(teacher)
    chosen = recipe(bits="w2a4")
    student = attach(teacher, chosen)
    pieces = block_pieces(prepared_network(teacher, chosen), student)
    other = next(p for p in pieces if "two" in p.name)
    assert structure(names_of(usual, "two")[0].piece.student) != structure(other.student)


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("settings", [(), ("tuning.loss_power=2.4", "tuning.drop=0")])
def test_a_shared_loss_trains_every_block_as_its_own_loss_does(teacher, eager, settings, weigh):
    shared = tuners(teacher, *settings, compiler=eager, weigh=weigh)
    own = tuners(teacher, *settings, weigh=weigh)
    for name, tuner in shared.items():
        for made in (tuner, own[name]):
            torch.manual_seed(3)
            made.masks = RandomMasks(0.0)  # the draws of masks differ in order, so nothing is mixed
            for quantizer in made.quantizers.values():
                quantizer.drop = 0.0
            for step in range(4):
                made.step(step)
        for path, layer in tuner.layers.items():
            expected = own[name].layers[path].weight
            torch.testing.assert_close(layer.weight.rounding, expected.rounding)
            torch.testing.assert_close(layer.weight.raw_scale, expected.raw_scale)
        for key, quantizer in tuner.quantizers.items():
            torch.testing.assert_close(quantizer.raw_scale, own[name].quantizers[key].raw_scale)
    assert len(eager.templates) < len(shared), "blocks two and three share one"


def test_masks_are_drawn_anew_in_every_step(teacher, eager):
    (made,) = names_of(tuners(teacher, compiler=eager), "two")
    drawn = []
    for step in range(3):
        made.step(step)
        drawn.append({name: q.mask.clone() for name, q in made.quantizers.items()})
    assert len(drawn[0]) == len(made.quantizers) > 0
    for name in drawn[0]:
        assert not torch.equal(drawn[0][name], drawn[1][name])
        assert float(drawn[0][name].mean()) == pytest.approx(0.5, abs=0.1)
    made.finish()
    assert all(q.mask is None for q in made.quantizers.values())


def test_a_finished_piece_leaves_the_shared_loss_usable(teacher, eager):
    first, second = names_of(tuners(teacher, compiler=eager), "two", "three")
    first.step(0)
    first.finish()
    before = second.weights[0].rounding.detach().clone()
    second.step(0)
    assert len(eager.templates) == 1
    assert not torch.equal(second.weights[0].rounding, before)


def test_what_is_compiled_gives_the_eager_numbers(teacher, monkeypatch):
    """The one test here that really compiles."""
    monkeypatch.setattr(compiling, "REPAID", 0)
    notes = []
    compiler = PieceCompiler(Policy(compile=True), notes.append)
    (made,) = names_of(tuners(teacher, compiler=compiler, weigh=True), "one")
    made.step(0)
    loss, batch = made.compiled, made.next_indices()
    inputs, target = made.problem.from_student[batch], made.problem.target[batch]
    beta, weight = torch.tensor(7.0), torch.tensor(0.3)
    for w in made.weights:
        w.rounding.grad = None
    total, error = loss(inputs, target, beta, weight, made.problem.importance)
    total.backward()
    gradients = [w.rounding.grad.clone() for w in made.weights]
    for w in made.weights:
        w.rounding.grad = None
    expected = made.loss(inputs, target)  # the masks that `loss` drew are still there
    bits = [w.used_bits for w in made.weights]
    pull = sum((1 - (2 * h - 1).abs() ** 7.0).sum() for h in bits)
    (expected + 0.3 * pull).backward()
    torch.testing.assert_close(error, expected)
    for w, gradient in zip(made.weights, gradients, strict=True):
        torch.testing.assert_close(w.rounding.grad, gradient, rtol=1e-3, atol=1e-5)
    assert notes == []


def test_short_runs_on_small_blocks_are_not_compiled():
    compiler = PieceCompiler(Policy(compile=True), print)
    small, large = torch.empty(2, 16, 32, 32), torch.empty(2, 64, 64, 64)
    assert not compiler.worth(500, 32, small)
    assert compiler.worth(20_000, 32, small)
    assert compiler.worth(500, 32, large)
    assert not PieceCompiler(Policy(compile=False), print).worth(20_000, 32, large)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "low"), [("w4a4", True), ("w6a6", True), ("w8a8", False)])
def test_passes_are_in_bf16_where_a_code_is_coarser_than_that(teacher, bits, low):
    chosen = recipe(bits=bits)
    student, network = attach(teacher, chosen), prepared_network(teacher, chosen)
    piece = next(p for p in block_pieces(network, student) if "one" in p.name)
    seen = values(network, image_set(8).images)
    problem = Problem(seen[piece.source], seen[piece.source], seen[piece.output])
    context = Context(policy=make_policy(precision="bf16", compile=False))
    made = PieceTuner(piece, problem, chosen.tuning, context)
    with made.policy.autocast():
        product = torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
    assert product.dtype == (torch.bfloat16 if low else torch.float32)
    made.calibrate()
    assert made.step(0).dtype == torch.float32
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in piece.student.parameters())
