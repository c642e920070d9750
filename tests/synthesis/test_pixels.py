# SPDX-License-Identifier: Apache-2.0
"""Images made by optimising pixels: ZeroQ, IntraQ, HAST."""

import json

import pytest
import torch
from helpers.kills import Killed
from helpers.networks import Net, Residual, conv, network_of, with_own_statistics
from torch import nn

from zsq.config import PixelSynthesis, load_recipe
from zsq.errors import RunError, UsageError
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.metrics import MetricsLog, read_metrics
from zsq.stages import synthesize
from zsq.synthesis.pixels import synthesize_pixels
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.layers import BatchNorm
from zsq.teacher.teacher import ModelInfo, Teacher


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = build_network(export_module(with_own_statistics(Residual()), (3, 8, 8)))
    return Teacher(network.requires_grad_(False), ModelInfo("residual", (3, 8, 8)))


HAST = {"batch_statistics": 1.0, "cross_entropy": 10.0}
INTRAQ = {"batch_statistics": 1.0, "soft_target": 1.0, "class_band": 1.0}


def make(teacher, context=None, **changes):
    base = {"images": 16, "batch": 16, "steps": 3, "lr": 0.1}
    settings = PixelSynthesis.model_validate(base | changes)
    return synthesize_pixels(teacher, settings, context or Context())


def distance(teacher, images):
    """The batch statistics' distance, measured by torch's batch norm in training mode."""
    total, network = 0.0, teacher.network
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0]))
        for m in network.modules()
        if isinstance(m, BatchNorm)
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    for norm, x in seen.items():
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        total += float(
            ((mean - norm.running_mean) ** 2 + (variance - norm.running_var) ** 2).mean()
        )
    return total / len(seen)


def test_pixels_come_to_have_the_statistics(teacher):
    noise = make(teacher, steps=1, lr=1e-9).images
    images = make(teacher, steps=200).images
    assert distance(teacher, images) < 0.2 * distance(teacher, noise)


def test_pixels_start_from_the_noise_asked_for(teacher):
    white = make(teacher, steps=1, lr=1e-9).images
    smooth = make(teacher, steps=1, lr=1e-9, init_slope=2.0, init_std=0.5).images

    def grain(images):
        return float((images[..., 1:] - images[..., :-1]).std() / images.std())

    assert grain(white) == pytest.approx(2**0.5, abs=0.1)
    assert grain(smooth) < 0.7
    assert float(smooth.std()) == pytest.approx(0.5, abs=0.05)
    assert float(white.std()) == pytest.approx(1.0, abs=0.05)


ONLY_LABELS = {"cross_entropy": 1.0, "batch_statistics": 0.0}


def confidence(teacher, made):
    """The teacher's probability of the labels, image by image."""
    return teacher(made.images).softmax(1).gather(1, made.labels[:, None]).squeeze(1)


def test_images_come_to_show_the_class_asked_for(teacher):
    noise = make(teacher, steps=1, lr=1e-9, losses=ONLY_LABELS)
    made = make(teacher, steps=150, losses=ONLY_LABELS)
    assert torch.equal(made.labels, noise.labels)
    assert len(made.labels.unique()) > 2
    assert bool((confidence(teacher, made) > confidence(teacher, noise)).all())


def test_difficulty_stops_pushing_easy_images(teacher):
    """Plain cross-entropy goes on making the easiest images easier."""
    plain = make(teacher, steps=150, losses=ONLY_LABELS)
    hard = make(teacher, steps=150, losses=ONLY_LABELS, difficulty=4.0)
    easiest = confidence(teacher, plain).argmax()
    assert confidence(teacher, hard)[easiest] < confidence(teacher, plain)[easiest]


def test_without_a_label_term_the_teacher_labels(teacher):
    made = make(teacher, losses={"image_statistics": 1.0})
    assert torch.equal(made.labels, teacher(made.images).argmax(1))


@pytest.mark.parametrize("losses", [HAST, INTRAQ])
def test_batches_side_by_side_are_the_batches_one_after_the_other(teacher, losses):
    """Statistics, rates and chance are each batch's own, class centres those of all before."""
    changes = {"images": 24, "batch": 8, "steps": 12, "losses": losses, "difficulty": 2.0,
               "soft_floor": 0.9, "band": (0.05, 0.8),
               "plateau_patience": 2, "crop": {"probability": 0.5}}  # fmt: skip
    alone, together = make(teacher, **changes), make(teacher, parallel=3, **changes)
    assert torch.equal(alone.labels, together.labels)
    assert torch.allclose(alone.images, together.images, atol=1e-3)


def test_batches_of_other_sizes_go_alone(teacher):
    assert len(make(teacher, images=21, batch=8, parallel=3)) == 21


def test_later_batches_keep_away_from_the_centres_of_earlier_ones(teacher):
    """With a band of [1, 2] features of a class must be at least orthogonal to its centre."""
    changes = {"images": 64, "batch": 32, "steps": 60, "lr": 0.05}
    free = make(teacher, **changes, losses={"soft_target": 1.0, "batch_statistics": 0.0})
    kept = make(teacher, **changes, band=(1.0, 2.0),
                losses={"soft_target": 1.0, "class_band": 5.0, "batch_statistics": 0.0})  # fmt: skip
    assert torch.allclose(free.images[:32], kept.images[:32], atol=1e-4)  # no centre yet

    def nearness(made):
        features = _features(teacher, made.images)
        first, second = made.labels[:32], made.labels[32:]
        near = [
            torch.cosine_similarity(features[32:][second == c], features[:32][first == c].mean(0), dim=1)
            for c in set(first.tolist()) & set(second.tolist())
        ]  # fmt: skip
        return float(torch.cat(near).mean())

    assert nearness(kept) < nearness(free) - 0.02


def _features(teacher, images):
    kept = {}
    module = teacher.network.get_submodule("fc")
    hook = module.register_forward_pre_hook(lambda m, args: kept.__setitem__("x", args[0]))
    teacher(images)
    hook.remove()
    return kept["x"]


@pytest.mark.parametrize("losses", [HAST, INTRAQ])
def test_a_killed_run_goes_on_where_it_was(teacher, tmp_path, losses):
    changes = {"images": 24, "batch": 8, "losses": losses, "band": (0.05, 0.8),
               "crop": {"probability": 0.5}}  # fmt: skip
    whole = make(teacher, **changes)

    with pytest.raises(KeyboardInterrupt):
        make(teacher, Context(checkpoints=Killed(tmp_path, "synthesis_001")), **changes)
    resumed = make(teacher, Context(checkpoints=Checkpoints(tmp_path)), **changes)
    assert torch.equal(whole.images, resumed.images)
    assert torch.equal(whole.labels, resumed.labels)


def test_terms_are_recorded(teacher, tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        make(teacher, Context(metrics=metrics), losses=INTRAQ)
    first = next(iter(read_metrics(tmp_path / "metrics.jsonl")))
    assert {"batch_statistics", "soft_target", "class_band"} <= set(first)


def test_the_teacher_is_not_changed(teacher):
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    make(teacher)
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_a_set_says_where_it_came_from(teacher):
    made = make(teacher)
    assert json.loads(json.dumps(made.provenance))["settings"]["method"] == "pixels"


def test_no_term_is_refused(teacher):
    with pytest.raises(UsageError, match=r"choose among image_statistics.*batch_statistics=1"):
        make(teacher, losses={"batch_statistics": 0.0})


def test_nan_stops_with_the_step(teacher):
    with pytest.raises(RunError, match=r"step .*synthesis"):
        make(teacher, lr=1e38, steps=60)


class Spatial(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.b, self.last = conv(), nn.BatchNorm2d(4), conv(4, 5)

    def forward(self, x):
        return self.last(self.b(self.c(x))).mean((2, 3))


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.b, self.last = conv(), nn.BatchNorm2d(4), nn.Linear(4 * 64, 5)

    def forward(self, x):
        return self.last(self.b(self.c(x)).flatten(1))


@pytest.mark.parametrize("kind", [Spatial, Flattened])
def test_class_centres_need_pooled_features(kind):
    teacher = Teacher(network_of(kind()), ModelInfo("spatial", (3, 8, 8)))
    with pytest.raises(UsageError, match=r"\(4, 8, 8\).*pooled.*class_band=0"):
        make(teacher, losses=INTRAQ)


def test_images_need_batch_norms():
    teacher = Teacher(network_of(Net(lambda n, x: n.c(x), c=conv())), ModelInfo("n", (3, 8, 8)))
    with pytest.raises(UsageError, match="batch norm"):
        make(teacher)


@pytest.mark.parametrize("name", ["zeroq", "intraq", "hast"])
def test_recipes_synthesise(teacher, name):
    settings = ["synthesis.images=8", "synthesis.batch=8", "synthesis.steps=2"]
    assert len(synthesize(teacher, load_recipe(name, settings=settings))) == 8
