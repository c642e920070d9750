# SPDX-License-Identifier: Apache-2.0
"""Batches in slices: loss, gradients and images are those of the whole batch."""

import gc
import weakref

import pytest
import torch
from helpers.networks import Residual, randomise
from torch import nn

from zsq.config import GenieSynthesis
from zsq.runtime.context import Context
from zsq.runtime.policy import Policy
from zsq.runtime.progress import QuietReporter
from zsq.synthesis import genie_loss
from zsq.synthesis.genie import synthesize_genie
from zsq.synthesis.slicing import kept_bytes, slice_size, sliced_loss
from zsq.teacher.teacher import load_teacher


@pytest.mark.parametrize("size", [1, 3, 4, 7, 10])
def test_loss_and_gradient_are_those_of_the_whole_batch(size):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2)).double()
    images = torch.randn(7, 2, 6, 6, dtype=torch.float64, requires_grad=True)

    def sums(x, offsets):
        y = network(x + offsets)
        return [y.sum((0, 2, 3)), (y * y).sum((0, 2, 3))]

    def weigh(found):
        first, second = (total / (7 * 9) for total in found)
        return (second - first * first).sqrt().sum() + first.square().sum()

    offsets = torch.tensor(0.25, dtype=torch.float64)
    expected = weigh(sums(images, offsets))
    (slope,) = torch.autograd.grad(3 * expected, images)
    ours = sliced_loss(images, offsets, sums, weigh, size)
    (found,) = torch.autograd.grad(3 * ours, images)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(found, slope)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return load_teacher(randomise(Residual()), input_shape=(3, 8, 8))


def made(teacher, memory, notes, **changes):
    reporter = QuietReporter()
    reporter.note = notes.append
    context = Context(policy=Policy(memory=memory), reporter=reporter)
    settings = GenieSynthesis(**{"images": 10, "batch": 10, "steps": 4, "latent": 8, **changes})
    return synthesize_genie(teacher, settings, context)


def test_images_do_not_depend_on_the_memory(teacher):
    plenty, little = [], []
    whole, sliced = made(teacher, None, plenty), made(teacher, 1, little)
    torch.testing.assert_close(sliced.images, whole.images, rtol=1e-3, atol=1e-3)
    assert not any("at a time" in note for note in plenty)
    assert any("batches of 10 images go through the teacher 1 at a time" in note for note in little)


def test_batches_side_by_side_do_not_depend_on_the_memory_either(teacher):
    plenty, little = [], []
    five = {"batch": 5, "parallel": 2}
    whole, sliced = made(teacher, None, plenty, **five), made(teacher, 1, little, **five)
    torch.testing.assert_close(sliced.images, whole.images, rtol=1e-3, atol=1e-3)
    assert not any("at a time" in note for note in plenty)
    assert any("batches of 5 images go through the teacher 1 at a time" in note for note in little)


def test_the_teacher_never_sees_more_than_a_slice(teacher, monkeypatch):
    seen = []
    original = genie_loss.Objective.inputs
    monkeypatch.setattr(
        genie_loss.Objective,
        "inputs",
        lambda self, x, o: seen.append(len(x)) or original(self, x, o),
    )
    monkeypatch.setattr(genie_loss, "slice_size", lambda *_: 4)
    made(teacher, None, [])
    assert max(seen) == 4
    assert seen[-6:] == [4, 4, 2] * 2, "a pass for the sums and one for the gradient"


def test_what_a_backward_pass_keeps_is_counted_once():
    x = torch.randn(1000, requires_grad=True)
    # exp keeps its result, sin its argument, which is that very tensor
    assert kept_bytes(lambda: x.exp().sin()) == 4000
    assert kept_bytes(lambda: (x.exp() * x).sin()) == 12_000


def test_what_was_counted_is_freed():
    """A tensor of the graph that its own hooks keep is never."""
    made = []

    def function():
        y = torch.ones(10, requires_grad=True).exp()
        made.append(weakref.ref(y))
        return y.sin()

    kept_bytes(function)
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize(
    ("fixed", "per_image", "memory", "size"),
    [(0, 10, 10**9, 64), (0, 1000, 64_000, 32), (60_000, 1000, 64_000, 2), (10**9, 1000, 1, 1)],
)
def test_slices_are_as_large_as_the_memory_allows_and_about_equal(fixed, per_image, memory, size):
    found = slice_size(64, fixed, per_image, memory)
    assert found == size
    assert found == 1 or fixed + found * per_image * 1.5 <= memory
