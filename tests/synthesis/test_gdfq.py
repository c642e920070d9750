# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers.generators import (
    count,
    gradients_arrive,
    mixtures,
    randomise_norms,
    reference_trunk,
    standard,
)
from torch import nn

from zsq.synthesis.gdfq import GdfqGenerator
from zsq.synthesis.labels import Labels, plain_labels

CPU = torch.device("cpu")
FORMS = pytest.mark.parametrize("conditional", [False, True])


def small(conditional, shape=(3, 8, 8), classes=5, seed=0):
    torch.manual_seed(seed)
    return GdfqGenerator(classes, shape, latent=7, conditional=conditional)


def images_of(generator, labels, seed=1):
    torch.manual_seed(seed)
    return generator(generator.draw_noise(labels), labels.classes, labels.weights)


@FORMS
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 14)])
def test_it_is_the_published_generator(conditional, shape):
    generator, labels = small(conditional, shape), mixtures(6, 5, 1)
    randomise_norms(generator)
    noise = generator.draw_noise(labels)
    vectors = noise
    if not conditional:
        embedding = nn.Embedding.from_pretrained(generator.embedding.detach())
        vectors = torch.mul(embedding(labels.classes[:, 0]), noise)
    expected = reference_trunk(generator.trunk, vectors, labels)
    images = generator(noise, labels.classes, labels.weights)
    assert images.shape == (6, *shape)
    assert torch.allclose(images, expected, atol=1e-4)


def test_it_has_the_published_number_of_parameters():
    with torch.device("meta"):
        cifar = GdfqGenerator(10, (3, 32, 32))
        imagenet = GdfqGenerator(1000, (3, 224, 224), conditional=True)
    assert count(cifar) == 1_052_139
    assert round(count(imagenet) / 1e6, 1) == 41.4
    assert round(count(imagenet.trunk.project) / 1e6, 1) == 40.5


@FORMS
def test_the_label_changes_the_image(conditional):
    generator = small(conditional)
    randomise_norms(generator)
    first, second = (
        images_of(generator, Labels(torch.full((6, 1), c), torch.ones(6, 1))) for c in (0, 1)
    )
    assert float((first - second).abs().max().detach()) > 0.1


@FORMS
@pytest.mark.parametrize("mixed", [1, 2, 100])
def test_images_are_standardised(conditional, mixed):
    standard(images_of(small(conditional), mixtures(32, 5, mixed)))


@FORMS
def test_gradients_reach_every_parameter(conditional):
    torch.manual_seed(0)
    gradients_arrive(small(conditional), plain_labels(32, 5, CPU))


@FORMS
def test_a_seed_decides_everything(conditional):
    labels = mixtures(6, 5, 1)
    first, again = (images_of(small(conditional), labels) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, images_of(small(conditional, seed=2), labels))
    assert not torch.equal(first, images_of(small(conditional), labels, seed=2))


@FORMS
def test_it_compiles_as_one_graph(conditional):
    generator, labels = small(conditional), mixtures(6, 5, 1)
    noise = generator.draw_noise(labels)
    compiled = torch.compile(generator, dynamic=False, fullgraph=True, backend="aot_eager")
    images = compiled(noise, labels.classes, labels.weights)
    expected = generator(noise, labels.classes, labels.weights)
    assert torch.allclose(images, expected, atol=1e-5)
    images.square().sum().backward()
