# SPDX-License-Identifier: Apache-2.0
"""Which warm-up steps set ranges, and what a fine-tuning run refuses."""

import pytest
import torch
from helpers.networks import Residual, network_of, smooth_images, with_own_statistics
from torch import nn

from zsq.config import Finetuning, load_recipe
from zsq.errors import RunError, UsageError
from zsq.quantizers.minmax import TrackedActivation
from zsq.requests import check_request
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.group import Group
from zsq.runtime.metrics import MetricsLog, read_metrics
from zsq.stages import tune
from zsq.student import attach
from zsq.synthesis.batches import FixedImages
from zsq.synthesis.images import ImageSet
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.teacher import ModelInfo, Teacher
from zsq.tuning import finetune as module
from zsq.tuning.ranges import tracked_steps, tracking


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = build_network(export_module(with_own_statistics(Residual()), (3, 8, 8)))
    return Teacher(network.requires_grad_(False), ModelInfo("residual", (3, 8, 8)))


def recipe(*settings, name="gdfq+ait", bits="w4a4"):
    small = ["tuning.steps=6", "tuning.range_steps=3", "tuning.batch=8", "tuning.lr=0.01"]
    return load_recipe(name, bits=bits, settings=[*small, *settings])


def images_of(teacher, count=24):
    images = smooth_images(count)
    with torch.no_grad():
        return ImageSet(images, teacher(images).argmax(1))


@pytest.mark.parametrize(
    ("warmup", "changes", "expected"),
    [
        (400, {}, range(300, 400)),
        (400, {"range_start": 0}, range(100)),
        (10_000, {"range_start": 0, "range_steps": 800}, range(800)),
        (400, {"range_start": 390}, range(300, 400)),
        (50, {}, range(50)),
        (50, {"range_start": 20}, range(50)),
    ],
)
def test_ranges_are_tracked_where_the_recipe_says(warmup, changes, expected):
    assert tracked_steps(Finetuning(**changes), warmup) == expected


@pytest.mark.parametrize("name", ["gdfq-reference", "qimera-reference", "ait-reference"])
@pytest.mark.parametrize("large", [False, True])
def test_reference_recipes_track_the_first_800_steps(name, large):
    one = load_recipe(name, bits="w4a4", large=large)
    assert tracked_steps(one.tuning, one.synthesis.steps) == range(800)


def test_an_interrupted_batch_moves_nothing_afterwards():
    quantizer = TrackedActivation(4)

    def interrupted():
        with tracking({"one": quantizer}, Group()):
            quantizer(torch.tensor([0.0, 1.0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    before = quantizer.range().clone()
    quantizer(torch.tensor([0.0, 50.0]))
    assert torch.equal(quantizer.range(), before)
    assert quantizer.widen is None


def test_a_damaged_weight_is_not_kept(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 2)
    learn = module.FineTuner._learn

    def damage(self, batch, step, factor, *, measure):
        terms = learn(self, batch, step, factor, measure=measure)
        if step == 2:
            next(iter(self.weights.values())).master.data[0, 0] = float("nan")
        return terms

    images, context = images_of(teacher), Context(checkpoints=Checkpoints(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(module.FineTuner, "_learn", damage)
        with pytest.raises(RunError, match=r"at or before step 5"):
            tune(teacher, attach(teacher, recipe()), images, context=context)
    kept = context.checkpoints.load("finetune")
    assert int(kept["done"]) == 4
    assert all(t.isfinite().all() for t in kept.values())
    again = tune(teacher, attach(teacher, recipe()), images, context=context)
    whole = tune(teacher, attach(teacher, recipe()), images)
    found = again.network.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in whole.network.state_dict().items())


def test_what_is_recorded_is_the_share_of_the_students_own_integers(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORD_EVERY", 1)
    seen, step = [], module.InundatedSGD.step

    def watched(self, *args, **kwargs):
        before = {n: w.codes() for n, w in zip(self.names, self._weights, strict=True)}
        step(self, *args, **kwargs)
        seen.append({
            n: float((w.codes() != before[n]).double().mean())
            for n, w in zip(self.names, self._weights, strict=True)
        })  # fmt: skip

    monkeypatch.setattr(module.InundatedSGD, "step", watched)
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        tune(teacher, attach(teacher, recipe()), images_of(teacher), context=Context(metrics=log))
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "changed" in r]
    recorded = [row["changed"] for row in rows if row["changed"]]
    assert len(recorded) == len(seen) == 6
    for ours, theirs in zip(recorded, seen, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_alignment_without_feature_maps_is_refused_before_any_image_is_made():
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)
    )
    flat = Teacher(network_of(net).requires_grad_(False), ModelInfo("flat", (3, 8, 8)))
    with pytest.raises(UsageError, match=r"flat puts out a feature map.*alignment=0"):
        check_request(flat, recipe(name="hast"), None, Group())


def test_labels_and_images_come_in_pairs(tmp_path):
    path = tmp_path / "images.safetensors"
    ImageSet(torch.zeros(4, 3, 8, 8), torch.zeros(3, dtype=torch.long)).save(path)
    with pytest.raises(UsageError, match=r"4 images and labels of shape \(3,\)"):
        ImageSet.load(path).check((3, 8, 8))


def test_looking_at_images_leaves_the_teacher_in_its_layout(teacher):
    layouts = {n: p.stride() for n, p in teacher.network.named_parameters()}
    images = images_of(teacher)
    FixedImages(teacher, images, recipe().tuning, Context())
    tune(teacher, attach(teacher, recipe()), images)
    assert {n: p.stride() for n, p in teacher.network.named_parameters()} == layouts
