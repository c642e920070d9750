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
from helpers.networks import Inverted, conv, network_of
from torch import nn

from zsq.errors import UsageError
from zsq.synthesis.labels import Labels, superposed_labels
from zsq.synthesis.qimera import QimeraGenerator, classifier_rows

CPU = torch.device("cpu")
FORMS = pytest.mark.parametrize("conditional", [False, True])
SHAPE = (3, 8, 8)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(shape=SHAPE, classes=5, seed=0, **options):
    torch.manual_seed(seed)
    return QimeraGenerator(classes, shape, latent=6, **options)


def images_of(generator, labels, seed=1):
    torch.manual_seed(seed)
    return generator(generator.draw_noise(labels), labels.classes, labels.weights)


def with_weights_of(generator, other):
    """Copy what both have; a linear map that only one has must be the identity."""
    generator.load_state_dict(other.state_dict(), strict=False)
    return generator


@FORMS
@pytest.mark.parametrize("disentangle", [None, 4])
@pytest.mark.parametrize(("mixed", "released"), [(1, False), (3, False), (1, True), (3, True)])
def test_it_is_the_published_generator(conditional, disentangle, mixed, released):
    generator = small(
        (1, 9, 6), conditional=conditional, disentangle=disentangle, noise_scale=0.7,
        per_sample_norm=not released,
    )  # fmt: skip
    randomise_norms(generator)
    labels = mixtures(8, 5, mixed)
    noise = generator.draw_noise(labels)
    assert noise.shape == (8, mixed, 6)
    slots = nn.Embedding.from_pretrained(generator.embedding.detach())(labels.classes) + 0.7 * noise
    if released and mixed > 1:
        slots = nn.BatchNorm1d(mixed, affine=False).train()(slots)  # per slot, over all the rest
    else:
        slots = nn.LayerNorm(6, elementwise_affine=False)(slots)
    if disentangle:
        slots = generator.disentangle(slots)  # before mixing, as published
    vectors = torch.einsum("nk,nkd->nd", labels.weights, slots)
    expected = reference_trunk(generator.trunk, vectors, labels)
    images = generator(noise, labels.classes, labels.weights)
    assert images.shape == (8, 1, 9, 6)
    assert torch.allclose(images, expected, atol=1e-4)


@pytest.mark.parametrize(("latent", "millions"), [(512, 206), (1280, 514), (2048, 822)])
def test_the_map_keeps_the_first_layer_small(latent, millions):
    with torch.device("meta"):
        off = QimeraGenerator(1000, (3, 224, 224), latent=latent, conditional=True)
        on = QimeraGenerator(1000, (3, 224, 224), latent=latent, conditional=True, disentangle=100)
    assert round(off.trunk.project.weight.numel() / 1e6) == millions
    assert round(on.trunk.project.weight.numel() / 1e6) == 40
    assert count(on.disentangle) == 100 * latent + 100
    rest = count(off) - count(off.trunk.project)
    assert rest == 1000 * latent + 640_000 + 223_107  # embedding, tables, convolutions


@FORMS
def test_a_mixture_of_one_is_the_plain_path(conditional):
    generator = small(conditional=conditional)
    torch.manual_seed(0)
    labels = superposed_labels(8, 5, 1, CPU)
    noise = generator.draw_noise(labels)
    images = generator(noise, labels.classes, labels.weights)
    expected = generator(noise, labels.classes, torch.ones(8, 1))
    assert torch.equal(images, expected)
    # and a mixture of equal slots is the slot
    thrice, weights = labels.classes.expand(8, 3), normal(8, 3).softmax(1)
    images = generator(noise.expand(8, 3, 6), thrice, weights)
    assert torch.allclose(images, expected, atol=1e-4)


def test_the_released_norm_differs_for_mixtures_only():
    ours, released = small(), small(per_sample_norm=False)
    for mixed, same in ((1, True), (2, False)):
        labels = mixtures(8, 5, mixed)
        first, second = images_of(ours, labels), images_of(released, labels)
        assert torch.equal(first, second) == same


@FORMS
def test_a_map_that_is_the_identity_changes_nothing(conditional):
    off, labels = small(conditional=conditional), mixtures(8, 5, 3)
    on = with_weights_of(small(conditional=conditional, disentangle=6), off)
    nn.init.eye_(on.disentangle.weight)
    nn.init.zeros_(on.disentangle.bias)
    assert torch.allclose(images_of(on, labels), images_of(off, labels), atol=1e-4)


@FORMS
@pytest.mark.parametrize("mixed", [1, 2, 10, 100])
@pytest.mark.parametrize("per_sample_norm", [True, False])
def test_images_are_standardised_however_many_are_mixed(conditional, mixed, per_sample_norm):
    generator = small(conditional=conditional, per_sample_norm=per_sample_norm)
    standard(images_of(generator, mixtures(16, 5, mixed)))


def test_the_released_form_makes_constant_images_of_many_classes():
    generator = small(conditional=True, divide_by_mixed=True)
    assert float(images_of(generator, mixtures(16, 5, 1)).std().detach()) > 0.95
    assert float(images_of(generator, mixtures(16, 5, 100)).std().detach()) < 1e-3


def test_the_embedding_starts_where_it_was_told():
    rows = normal(5, 6) * 0.28
    kept = rows.clone()
    generator = small(embedding=rows)
    assert torch.equal(generator.embedding, rows)
    generator.embedding.data.zero_()
    assert torch.equal(rows, kept)  # the teacher's own weight is not what learns
    rescaled = small(embedding=rows, rescale_rows=True).embedding.detach()
    assert torch.allclose(rescaled.std(1, correction=0), torch.ones(5))
    assert torch.allclose(torch.cosine_similarity(rescaled, rows), torch.ones(5))
    zeros = small(embedding=torch.zeros(5, 6), rescale_rows=True)
    assert torch.equal(zeros.embedding, torch.zeros(5, 6))


def test_rows_of_another_shape_are_refused():
    with pytest.raises(UsageError, match=r"\(4, 6\).*\(5, 6\)"):
        small(embedding=torch.zeros(4, 6))


@FORMS
@pytest.mark.parametrize("options", [{}, {"disentangle": 4}, {"embedding": normal(5, 6)}])
def test_gradients_reach_every_parameter(conditional, options):
    torch.manual_seed(0)
    labels = superposed_labels(32, 5, 2, CPU)
    gradients_arrive(small(conditional=conditional, **options), labels)


@FORMS
def test_a_seed_decides_everything(conditional):
    labels = mixtures(6, 5, 2)
    first, again = (
        images_of(small(conditional=conditional, disentangle=4), labels) for _ in range(2)
    )
    assert torch.equal(first, again)
    other = small(conditional=conditional, disentangle=4, seed=2)
    assert not torch.equal(first, images_of(other, labels))
    assert not torch.equal(first, images_of(small(conditional=conditional), labels, seed=2))


@FORMS
def test_it_compiles_as_one_graph(conditional):
    generator = small(conditional=conditional, disentangle=4)
    compiled = torch.compile(generator, dynamic=False, fullgraph=True, backend="aot_eager")
    for mixed in (1, 3):
        labels = mixtures(6, 5, mixed)
        noise = generator.draw_noise(labels)
        images = compiled(noise, labels.classes, labels.weights)
        expected = generator(noise, labels.classes, labels.weights)
        assert torch.allclose(images, expected, atol=1e-5)
        images.square().sum().backward()


def test_noise_is_drawn_per_slot():
    labels = Labels(torch.zeros(4, 3, dtype=torch.long), torch.full((4, 3), 1 / 3))
    noise = small().draw_noise(labels)
    assert len(noise.reshape(12, 6).unique(dim=0)) == 12


class OfParts(nn.Module):
    """A network of parts, as the function says."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def test_rows_are_those_of_the_linear_classifier():
    network = network_of(Inverted())
    rows = classifier_rows(network)
    assert torch.equal(rows, network.get_submodule("fc").weight)
    assert not rows.requires_grad
    assert rows.data_ptr() != network.get_submodule("fc").weight.data_ptr()


@pytest.mark.parametrize("pool_first", [True, False])
def test_rows_are_those_of_a_classifier_that_is_a_convolution(pool_first):
    def run(net, x):
        x = net.stem(x).relu()
        if pool_first:
            return net.head(nn.functional.adaptive_avg_pool2d(x, 1)).flatten(1)
        x = nn.functional.avg_pool2d(net.head(x).relu(), 8)
        return x.reshape(x.shape[0], -1)

    network = network_of(OfParts(run, stem=conv(3, 6), head=conv(6, 5, 1)))
    rows = classifier_rows(network)
    assert torch.equal(rows, network.get_submodule("head").weight[:, :, 0, 0])
    small(embedding=rows)


def test_logits_of_two_layers_have_no_rows():
    def two(net, x):
        x = x.mean((2, 3))
        return net.one(x) + net.two(x)

    network = network_of(OfParts(two, one=nn.Linear(3, 5), two=nn.Linear(3, 5)))
    with pytest.raises(UsageError, match=r"add.*2 operands.*single classifier"):
        classifier_rows(network)
