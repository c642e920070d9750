# SPDX-License-Identifier: Apache-2.0
"""What pixels are asked to show while they are optimised: crops, wanted probabilities, centres, rates."""

import pytest
import torch
from helpers.students import teacher_of

from zsq.config import PixelSynthesis
from zsq.runtime.context import Context
from zsq.synthesis import pixels
from zsq.synthesis.pixels import synthesize_pixels


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


def make(teacher, **changes):
    base = {"images": 16, "batch": 16, "steps": 3, "lr": 0.1}
    return synthesize_pixels(teacher, PixelSynthesis.model_validate(base | changes), Context())


@pytest.fixture
def views(monkeypatch):
    """Everything that the term ``soft_target`` is shown."""
    seen, term = [], pixels.TERMS["soft_target"]
    monkeypatch.setitem(
        pixels.TERMS, "soft_target", lambda view: (seen.append(view), term(view))[1]
    )
    return seen


def test_a_batch_is_cropped_whole_or_not_at_all(teacher, monkeypatch):
    """As IntraQ does; in a cropped batch every image has a window of its own."""
    seen, crop = [], pixels.crop
    monkeypatch.setattr(pixels, "crop", lambda x, w: (seen.append(w), crop(x, w))[1])
    make(teacher, images=24, batch=8, parallel=3, steps=40,
         crop={"probability": 0.3, "smallest": 0.5})  # fmt: skip
    windows = torch.stack(seen).reshape(40, 3, 8, 5)
    whole = (windows == torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])).all(-1)
    cropped = ~whole.all(-1)
    assert not bool(whole[cropped].any())
    assert 0.15 < float(cropped.float().mean()) < 0.45
    assert int((cropped.sum(1) % 3 > 0).sum()) > 0, "every batch decides for itself"
    assert all(len(batch.unique(dim=0)) == 8 for batch in windows[cropped])


def test_half_of_the_wanted_probabilities_are_one_the_others_spread_above_the_floor(teacher, views):
    make(teacher, images=256, batch=256, steps=2, soft_floor=0.6,
         losses={"soft_target": 1.0, "batch_statistics": 0.0})  # fmt: skip
    first, last = (view.wishes.probability for view in views)
    assert torch.equal(first, last), "fixed while a batch is made"
    soft = first[first < 1]
    assert 0.35 < len(soft) / 256 < 0.65
    assert 0.6 <= float(soft.min()) < 0.62
    assert float(soft.mean()) == pytest.approx(0.8, abs=0.03)
    assert float(soft.std()) == pytest.approx(0.4 / 12**0.5, abs=0.02)


def test_a_centre_is_the_mean_of_the_features_of_its_class_so_far(teacher, views):
    made = make(teacher, images=24, batch=8, steps=2, band=(0.05, 0.8),
                losses={"soft_target": 1.0, "class_band": 1.0})  # fmt: skip
    kept = []
    layer = teacher.network.get_submodule("fc")
    hook = layer.register_forward_pre_hook(lambda m, args: kept.append(args[0].detach()))
    teacher(made.images)
    hook.remove()
    for batch, view in enumerate(views[::2]):
        labels, before = made.labels[8 * batch : 8 * batch + 8], made.labels[: 8 * batch]
        assert torch.equal(view.wishes.labels, labels)
        for i, label in enumerate(labels):
            of_class = kept[0][: 8 * batch][before == label]
            assert bool(view.wishes.known[i]) == bool(len(of_class))
            if len(of_class):
                assert torch.allclose(view.wishes.centers[i], of_class.mean(0), atol=1e-5)
    assert bool(views[-1].wishes.known.any())


@pytest.mark.parametrize("patience", [1, 4, 50])
def test_the_rate_falls_after_as_many_steps_without_a_better_loss(teacher, monkeypatch, patience):
    """Against torch's scheduler: under a constant slope Adam moves every pixel by the rate."""

    def level(view):
        slope = view.images.sum()
        return (slope - slope.detach() + 1.0).reshape(1)

    monkeypatch.setitem(pixels.TERMS, "batch_statistics", level)
    moved = {}
    for steps in (1, 12):
        made = make(teacher, images=2, batch=2, steps=steps, plateau_patience=patience)
        moved[steps] = made.images
    rate = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(rate, patience=patience, min_lr=1e-4)
    path = 0.0
    for step in range(12):
        path += rate.param_groups[0]["lr"] if step else 0.0
        rate.step()
        scheduler.step(1.0)
    assert torch.allclose(moved[1] - moved[12], torch.tensor(path), atol=1e-4)


def test_a_floor_of_one_and_the_whole_band_are_neither_soft_targets_nor_a_band(teacher, views):
    """IntraQ's switches as published: epsilon of 1 makes every target hard."""
    soft = {"batch_statistics": 1.0, "soft_target": 1.0}
    off = make(teacher, soft_floor=1.0, band=(0.0, 2.0), losses=soft | {"class_band": 1.0})
    assert all(torch.equal(view.wishes.probability, torch.ones(16)) for view in views)
    without = make(teacher, soft_floor=1.0, losses=soft)
    assert torch.equal(off.images, without.images)


@pytest.mark.parametrize("band", [(0.8, 0.05), (-0.1, 1.0), (0.0, 2.5)])
def test_a_band_that_is_none_is_refused(band):
    with pytest.raises(ValueError, match="smallest and a largest cosine distance"):
        PixelSynthesis(band=band)


@pytest.mark.parametrize("term", ["image_statistics", "batch_statistics"])
def test_gradients_reach_the_pixels_and_no_weight(teacher, term):
    before = {name: p.clone() for name, p in teacher.network.named_parameters()}
    start = make(teacher, steps=1, lr=1e-9, losses={term: 1.0}).images
    moved = make(teacher, steps=1, lr=0.1, losses={term: 1.0}).images
    assert float((moved - start).abs().mean()) == pytest.approx(0.1, rel=0.05), "Adam's first step"
    assert all(p.grad is None for p in teacher.network.parameters())
    assert all(torch.equal(p, before[name]) for name, p in teacher.network.named_parameters())
