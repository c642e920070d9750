# SPDX-License-Identifier: Apache-2.0
"""What students and generators learn from, against slow references."""

import math

import pytest
import torch
from torch.nn import functional

from zsq.functional.generator_loss import soft_cross_entropy, variance_distance
from zsq.functional.losses import kl_divergence


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_at_a_high_temperature_it_is_the_centred_gap(classes):
    torch.manual_seed(classes)
    teacher = torch.randn(16, classes)
    student = teacher + 0.3 * torch.randn(16, classes)
    gap = student - teacher
    gap = gap - gap.mean(1, keepdim=True)
    expected = float(gap.square().mean() / (2 * classes))
    assert float(kl_divergence(student, teacher, 20.0)) == pytest.approx(expected, rel=0.01)


def test_it_is_torchs_with_its_own_divisor():
    student, teacher = torch.randn(8, 5), torch.randn(8, 5)
    for mean, divisor in (("element", 40), ("sample", 8)):
        total = functional.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1),
                                  reduction="sum")  # fmt: skip
        ours = kl_divergence(student, teacher, 3.0, mean)
        assert float(ours) == pytest.approx(9 * float(total) / divisor, rel=1e-4)


def test_gradients_are_those_of_the_formula_for_student_and_teacher():
    student, teacher = (torch.randn(2, 3).double().requires_grad_() for _ in range(2))
    kl_divergence(student, teacher, 2.0, "sample").backward()
    found = student.grad.clone(), teacher.grad.clone()
    student.grad = teacher.grad = None
    p, log_q = (teacher / 2).softmax(1), (student / 2).log_softmax(1)
    torch.nn.functional.kl_div(log_q, p, reduction="batchmean").mul(4).backward()
    assert torch.allclose(found[0], student.grad, atol=1e-6)
    assert torch.allclose(found[1], teacher.grad, atol=1e-6)


def test_soft_cross_entropy_of_plain_labels_is_torchs():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    ours = soft_cross_entropy(logits, functional.one_hot(labels, 4).float())
    assert float(ours) == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)


def test_distance_against_a_loop():
    torch.manual_seed(0)
    inputs = [torch.randn(5, 3, 4, 4) * 2 + 1, torch.randn(5, 7)]
    means, variances = [torch.randn(3), torch.randn(7)], [torch.rand(3), torch.rand(7)]
    expected = 0.0
    for x, mean, variance in zip(inputs, means, variances, strict=True):
        flat = x.transpose(0, 1).flatten(1).double()
        channels = [
            (float(row.mean()) - float(m)) ** 2 + (float(row.var(unbiased=False)) - float(v)) ** 2
            for row, m, v in zip(flat, mean, variance, strict=True)
        ]
        expected += math.fsum(channels) / len(channels)
    assert float(variance_distance(inputs, means, variances)) == pytest.approx(
        expected / 2, rel=1e-4
    )


def test_distance_is_zero_at_the_batches_own_statistics():
    x = torch.randn(8, 3, 6, 6) * 3 - 1
    flat = x.transpose(0, 1).flatten(1)
    own = variance_distance([x], [flat.mean(1)], [flat.var(1, unbiased=False)])
    assert float(own) == pytest.approx(0.0, abs=1e-9)
