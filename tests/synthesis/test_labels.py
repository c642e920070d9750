# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from zsq.synthesis.labels import Labels, plain_labels, superposed_labels

CPU = torch.device("cpu")


def test_plain_labels_are_one_uniform_class_each():
    torch.manual_seed(0)
    labels = plain_labels(6000, 3, CPU)
    assert labels.classes.shape == labels.weights.shape == (6000, 1)
    assert labels.classes.dtype == torch.int64
    assert torch.equal(labels.weights, torch.ones(6000, 1))
    assert torch.all((labels.classes.flatten().bincount(minlength=3) - 2000).abs() < 200)


@pytest.mark.parametrize("mixed", [1, 2, 10, 100])
def test_mixtures_sum_to_one_duplicates_included(mixed):
    torch.manual_seed(0)
    labels = superposed_labels(50, 4, mixed, CPU)
    assert labels.classes.shape == labels.weights.shape == (50, mixed)
    soft = labels.soft(4)
    assert soft.shape == (50, 4)
    assert torch.allclose(soft.sum(1), torch.ones(50))
    expected = torch.zeros(50, 4)
    for i in range(50):
        for k in range(mixed):
            expected[i, labels.classes[i, k]] += labels.weights[i, k]
    assert torch.allclose(soft, expected, atol=1e-6)


def test_a_class_that_is_drawn_twice_counts_twice():
    labels = Labels(torch.tensor([[1, 1, 2]]), torch.tensor([[0.25, 0.5, 0.25]]))
    assert torch.equal(labels.soft(4), torch.tensor([[0.0, 0.75, 0.25, 0.0]]))


def test_a_mixture_of_one_is_a_plain_label():
    labels = superposed_labels(9, 4, 1, CPU)
    assert torch.equal(labels.weights, torch.ones(9, 1))


def test_weights_are_those_of_a_softmax_of_normal_numbers():
    torch.manual_seed(0)
    weights = superposed_labels(20000, 4, 2, CPU).weights[:, 0]
    # the logit of the first of two is the difference of two normal numbers: variance 2
    assert float(torch.logit(weights).std()) == pytest.approx(2**0.5, rel=0.03)


@pytest.mark.parametrize("draw", [plain_labels, lambda n, c, d: superposed_labels(n, c, 3, d)])
def test_labels_follow_torchs_seed(draw):
    torch.manual_seed(3)
    first, second = draw(8, 5, CPU), draw(8, 5, CPU)
    torch.manual_seed(3)
    again = draw(8, 5, CPU)
    assert torch.equal(first.classes, again.classes)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.classes, second.classes)
