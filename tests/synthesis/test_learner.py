# SPDX-License-Identifier: Apache-2.0
"""The generator's loop and the sources of batches."""

import copy

import pytest
import torch
from helpers.networks import Residual, network_of, smooth_images, with_own_statistics
from torch import nn

from zsq.config import Finetuning, GeneratorSynthesis, load_recipe
from zsq.errors import RunError, UsageError
from zsq.runtime.context import Context
from zsq.stages import synthesize
from zsq.synthesis.batches import FixedImages
from zsq.synthesis.images import ImageSet
from zsq.synthesis.learner import GeneratorLearner
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.layers import BatchNorm
from zsq.teacher.teacher import ModelInfo, Teacher


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = build_network(export_module(with_own_statistics(Residual()), (3, 8, 8)))
    return Teacher(network.requires_grad_(False), ModelInfo("residual", (3, 8, 8)))


def learner(teacher, **settings):
    torch.manual_seed(0)
    return GeneratorLearner(teacher, GeneratorSynthesis(batch=16, **settings), Context(), 10)


def test_the_student_sees_the_images_before_the_update(teacher):
    source = learner(teacher)
    before = {k: v.clone() for k, v in source.generator.state_dict().items()}
    state = torch.get_rng_state()
    batch = source.next(1.0)
    after = source.generator.state_dict()
    assert any(not torch.equal(v, after[k]) for k, v in before.items())
    source.generator.load_state_dict(before)
    torch.set_rng_state(state)
    labels = source.draw_labels()
    noise = source.generator.draw_noise(labels)
    with torch.no_grad():
        images = source.generator(noise, labels.classes, labels.weights)
        logits = teacher(images)
    assert torch.equal(batch.images, images)
    assert torch.allclose(batch.logits, logits, atol=1e-4)
    assert torch.equal(batch.targets, labels.soft(5))
    assert not batch.images.requires_grad


def test_a_generator_learns_the_classes(teacher):
    source = learner(teacher)
    first = source.next(1.0).terms
    for _ in range(100):
        last = source.next(1.0).terms
    assert float(last["generator_ce"]) < 0.9 * float(first["generator_ce"])


def test_a_generator_learns_the_statistics(teacher):
    """Of a teacher whose first batch norm remembers other images than a new generator makes."""
    shifted = Teacher(copy.deepcopy(teacher.network), teacher.info)
    norm = next(m for m in shifted.network.modules() if isinstance(m, BatchNorm))
    norm.running_mean += 0.5
    norm.running_var *= 0.5
    source = learner(shifted, statistics_weight=10.0)
    first = source.next(1.0).terms
    for _ in range(100):
        last = source.next(1.0).terms
    assert float(last["generator_bns"]) < 0.7 * float(first["generator_bns"])


def test_the_rate_follows_the_schedule(teacher):
    source = learner(teacher)
    before = {k: v.clone() for k, v in source.generator.state_dict().items()}
    source.next(0.0)
    assert all(torch.equal(v, before[k]) for k, v in source.generator.state_dict().items())


def test_superposed_batches_come_as_often_as_asked(teacher):
    for share in (0.0, 1.0):
        source = learner(teacher, generator="qimera", latent=None, superpose=share, mixed=3)
        widths = {source.draw_labels().classes.shape[1] for _ in range(20)}
        assert widths == ({3} if share else {1})
    source = learner(teacher, generator="qimera", latent=None, superpose=0.4, mixed=3)
    drawn = [source.draw_labels().classes.shape[1] for _ in range(400)]
    assert 0.3 < drawn.count(3) / 400 < 0.5


def test_a_latent_that_does_not_fit_the_classifier_is_refused(teacher):
    with pytest.raises(UsageError, match="latent"):
        learner(teacher, generator="qimera", latent=7, embedding="classifier")
    assert learner(teacher, generator="qimera", latent=7).generator.embedding.shape == (5, 7)


@pytest.mark.parametrize("released", [False, True])
def test_a_label_embedding_starts_at_the_classifier_as_loud_as_the_noise(teacher, released):
    """Released code takes the rows as they are; they are several times smaller than the noise."""
    source = learner(teacher, generator="qimera", latent=None, embedding="classifier",
                     norm_as_released=released)  # fmt: skip
    rows = teacher.network.get_submodule("fc").weight
    found = source.generator.embedding.detach()
    if released:
        assert torch.equal(found, rows)
    else:
        assert torch.allclose(found, rows / rows.std(1, correction=0, keepdim=True))


def test_images_can_be_synthesised_alone(teacher):
    recipe = load_recipe(
        "gdfq", settings=["synthesis.steps=3", "synthesis.batch=8", "synthesis.images=11"]
    )
    first, again = synthesize(teacher, recipe), synthesize(teacher, recipe)
    assert first.images.shape == (11, 3, 8, 8)
    assert torch.equal(first.images, again.images)
    with torch.no_grad():
        assert torch.equal(first.labels, teacher(first.images).argmax(1))
    assert first.provenance["method"] == "gdfq"


def test_nan_is_named(teacher):
    recipe = load_recipe(
        "gdfq", settings=["synthesis.steps=60", "synthesis.batch=8", "synthesis.lr=1e38"]
    )
    with pytest.raises(RunError, match="generator_"):
        synthesize(teacher, recipe)


def test_a_network_without_batch_norms_is_refused():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 5))  # fmt: skip
    one = Teacher(network_of(plain), ModelInfo("plain", (3, 8, 8)))
    with pytest.raises(UsageError, match="no batch norm"):
        synthesize(one, "gdfq")


def test_fixed_batches_show_every_image_once_a_round(teacher):
    images = ImageSet(smooth_images(12), torch.arange(12) % 5)
    source = FixedImages(teacher, images, Finetuning(batch=5, range_steps=2), Context())
    seen = torch.cat([source.next(1.0).images for _ in range(12)])
    assert len(seen) == 60
    counts = [int((seen == image).flatten(1).all(1).sum()) for image in images.images]
    assert counts == [5] * 12
    batch = source.next(1.0)
    with torch.no_grad():
        assert torch.allclose(batch.logits, teacher(batch.images), atol=1e-4)
    assert batch.targets.sum(1).tolist() == [1.0] * 5


def test_fixed_batches_are_shuffled_anew_each_round(teacher):
    images = ImageSet(smooth_images(12), torch.arange(12) % 5)
    torch.manual_seed(0)
    source = FixedImages(teacher, images, Finetuning(batch=12, range_steps=2), Context())
    rounds = [source.next(1.0).images for _ in range(3)]
    orders = [
        [int((one == image).flatten(1).all(1).nonzero()) for image in images.images]
        for one in rounds
    ]
    assert list(range(12)) not in orders
    assert len({tuple(order) for order in orders}) == 3


def test_crops_are_left_to_whoever_asks_the_teacher(teacher):
    images = ImageSet(smooth_images(12), torch.arange(12) % 5)
    settings = Finetuning(batch=6, crop={"probability": 1.0, "smallest": 0.3})
    source = FixedImages(teacher, images, settings, Context())
    batch = source.next(1.0)
    assert batch.logits is None
    assert batch.images.shape == (6, 3, 8, 8)
    assert not any(bool((batch.images == image).all()) for image in images.images)


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_outside_the_classes_are_refused(teacher, label):
    images = ImageSet(smooth_images(2), torch.tensor([0, label]))
    with pytest.raises(UsageError, match="5 classes, 0 to 4"):
        FixedImages(teacher, images, Finetuning(), Context())
