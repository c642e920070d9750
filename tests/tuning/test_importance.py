# SPDX-License-Identifier: Apache-2.0
"""What an error in each channel counts: the Fisher information, and what reconstruction does with it."""

import pytest
import torch
from helpers.students import image_set, recipe, same_weights, teacher_of, tuned, values
from torch import nn

import zsq.tuning.importance as module
from zsq.errors import RunError
from zsq.functional.losses import reconstruction_error
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.student import attach, prepared_network
from zsq.teacher.blocks import tap_nodes
from zsq.teacher.equalize import equalized
from zsq.tuning.importance import FLOOR, channel_importance
from zsq.tuning.pieces import block_pieces
from zsq.tuning.tuner import PieceTuner, Problem

NAMES = ["relu_default", "relu_default_2"]


def exact(network, names, images):
    """Fisher information, label by label and image by image, by plain sums."""
    tapped = tap_nodes(network, names)
    totals = [0.0] * len(names)
    for image in images:
        logits, *values = tapped(image[None].requires_grad_(True))
        shares = logits.log_softmax(1)[0]
        for label in range(len(shares)):
            found = torch.autograd.grad(shares[label], values, retain_graph=True)
            for i, gradient in enumerate(found):
                square = gradient[0].square().flatten(1).sum(1)
                totals[i] = totals[i] + shares[label].exp().detach() * square
    return {name: t / t.mean() for name, t in zip(names, totals, strict=True)}


def test_it_is_the_fisher_information_of_the_predictions(teacher, monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 300)
    network = prepared_network(teacher, tuned(teacher).recipe)
    images = image_set(8).images
    found = channel_importance(network, NAMES, images, Context())
    for name, wanted in exact(network, NAMES, images).items():
        torch.testing.assert_close(found[name], wanted.clamp(min=FLOOR), rtol=0.15, atol=0.02)
    assert max(float(f.max() / f.min()) for f in found.values()) > 1.5, "channels differ"


def test_it_undoes_the_scales_of_channels(teacher):
    """A channel made larger by an equal function counts less, by the square of the factor."""
    images = image_set(16).images
    plain, scaled = (equalized(teacher, images, s).network for s in (0.0, 1.0))
    first, second = (channel_importance(n, NAMES, images, Context()) for n in (plain, scaled))
    for name in NAMES:
        sizes = [_taps(n, name, images).square().mean((0, 2, 3)) for n in (plain, scaled)]
        ours, theirs = (f[name] * s for f, s in zip((first, second), sizes, strict=True))
        torch.testing.assert_close(ours / ours.mean(), theirs / theirs.mean(), rtol=1e-3, atol=1e-3)


def _taps(network, name, images):
    with torch.no_grad():
        return tap_nodes(network, [name])(images)[1]


def test_labels_follow_the_seed_alone(teacher):
    network, images = prepared_network(teacher, tuned(teacher).recipe), image_set(8).images
    one, other = channel_importance(network, NAMES, images, Context(seed=3)), None
    torch.manual_seed(11)
    other = channel_importance(network, NAMES, images, Context(seed=3))
    assert all(torch.equal(one[n], other[n]) for n in NAMES)
    third = channel_importance(network, NAMES, images, Context(seed=4))
    assert not torch.equal(one[NAMES[0]], third[NAMES[0]])


def test_predictions_that_nothing_changes_leave_all_channels_equal():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 2)
            nn.init.zeros_(self.head.weight)

        def forward(self, x):
            return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

    network = teacher_of(Constant).network
    found = channel_importance(network, ["relu_default"], image_set(4).images, Context())
    assert torch.equal(found["relu_default"], torch.ones(4))


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_errors_are_weighed_channel_by_channel(power):
    torch.manual_seed(0)
    outputs, target, weight = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.rand(4)
    total = 0.0
    for n in range(3):
        for c in range(4):
            for y in range(2):
                for x in range(2):
                    gap = abs(float(outputs[n, c, y, x] - target[n, c, y, x]))
                    total += float(weight[c]) * gap**power
    found = reconstruction_error(outputs, target, power, weight)
    assert float(found) == pytest.approx(total / (3 * 2 * 2), rel=1e-5)
    plain = reconstruction_error(outputs, target, power)
    torch.testing.assert_close(plain, reconstruction_error(outputs, target, power, torch.ones(4)))


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_every_piece_but_the_logits_is_given_its_own_importance(teacher, unit, monkeypatch):
    seen = []
    original = PieceTuner.__init__

    def watched(self, piece, problem, *args, **more):
        original(self, piece, problem, *args, **more)
        seen.append((piece.output, problem.target.shape[1], problem.importance))

    monkeypatch.setattr(PieceTuner, "__init__", watched)
    tuned(teacher, "tuning.importance=fisher", f"tuning.unit={unit}")
    *inner, last = seen
    assert last[2] is None
    assert inner
    for output, channels, importance in inner:
        assert importance.shape == (channels,), output
    seen.clear()
    tuned(teacher, f"tuning.unit={unit}")
    assert all(importance is None for *_, importance in seen)


def trained_with(teacher, images, importance):
    """Return each channel's squared error after training a block with errors weighed like this."""
    chosen = recipe("tuning.rounding_lr=0.05", "tuning.drop=0", "tuning.steps=200", bits="w2a8")
    student, network = attach(teacher, chosen), prepared_network(teacher, chosen)
    piece, seen = block_pieces(network, student)[1], values(network, images)
    inputs, target = seen[piece.source], seen[piece.output]
    torch.manual_seed(0)
    tuner = PieceTuner(
        piece,
        Problem(inputs, inputs, target, importance(target.shape[1])),
        chosen.tuning,
        Context(),
    )
    tuner.calibrate()
    for _ in range(200):
        tuner.step(0)  # before the regulariser starts
    with torch.no_grad():
        return (piece.student(inputs) - target).square().mean((0, 2, 3))


def test_what_counts_more_ends_nearer_to_the_teacher(teacher):
    images = image_set(32).images
    even = torch.tensor([1.99, 0.01])
    first = trained_with(teacher, images, lambda n: even.repeat(n)[:n])
    second = trained_with(teacher, images, lambda n: even.flip(0).repeat(n)[:n])
    assert first[0::2].sum() < 0.9 * second[0::2].sum()
    assert second[1::2].sum() < 0.9 * first[1::2].sum()


def test_an_interrupted_run_ends_as_a_whole_one(teacher, tmp_path, monkeypatch):
    settings = ["tuning.importance=fisher"]
    whole = tuned(teacher, *settings)
    context = Context(checkpoints=Checkpoints(tmp_path))
    steps = iter(range(6))
    original = PieceTuner.step

    def killed(self, step):
        if next(steps, None) is None:
            raise RunError("killed")
        return original(self, step)

    monkeypatch.setattr(PieceTuner, "step", killed)
    with pytest.raises(RunError, match="killed"):
        tuned(teacher, *settings, context=context)
    monkeypatch.setattr(PieceTuner, "step", original)
    assert same_weights(whole, tuned(teacher, *settings, context=context))
