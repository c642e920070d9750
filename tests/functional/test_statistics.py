# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from zsq.functional.statistics import batch_norm_loss, image_loss, mean_std


def sample(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    channels = torch.arange(1.0, shape[1] + 1, dtype=torch.float64)
    return (x * channels.reshape(1, -1, *[1] * (len(shape) - 2)) + channels.mean()).to(dtype)


SHAPES = [(8, 3, 5, 7), (16, 4), (4, 2, 9), (2, 5, 3, 3, 3), (64, 1, 6, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_those_torch_computes(shape):
    x = sample(*shape, dtype=torch.float64)
    axes = [0, *range(2, len(shape))]
    variance, mean = torch.var_mean(x, axes, correction=1)
    ours = mean_std(x.float(), torch.full((shape[1],), 0.5))
    assert torch.allclose(ours[0].double(), mean, rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours[1].double(), variance.sqrt(), rtol=1e-5, atol=1e-6)


def test_statistics_are_those_a_batch_norm_stores():
    x = sample(32, 3, 4, 4)
    norm = nn.BatchNorm2d(3, momentum=1.0).train()
    norm(x)
    mean, std = mean_std(x, torch.zeros(3))
    assert torch.allclose(mean, norm.running_mean, rtol=1e-5, atol=1e-6)
    assert torch.allclose(std**2, norm.running_var, rtol=1e-5)


def test_a_center_near_the_mean_keeps_small_variances():
    x = sample(64, 2, 8, 8, dtype=torch.float64) * 1e-3 + 1000
    expected = torch.var_mean(x.float().double(), (0, 2, 3), correction=1)[0].sqrt()
    _, std = mean_std(x.float(), torch.full((2,), 1000.0))
    assert torch.allclose(std.double(), expected, rtol=1e-3)


def test_bf16_inputs_are_summed_in_float32():
    x = sample(64, 2, 32, 32).to(torch.bfloat16)
    mean, std = mean_std(x, torch.zeros(2))
    assert mean.dtype == std.dtype == torch.float32
    variance, expected = torch.var_mean(x.double(), (0, 2, 3), correction=1)
    assert torch.allclose(mean.double(), expected, rtol=1e-4)
    assert torch.allclose(std.double(), variance.sqrt(), rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_that_of_torchs_statistics(layout):
    x = sample(6, 3, 4, 5)
    center, weights = torch.tensor([0.1, -0.2, 3.0]), torch.tensor([1.0, -2.0, 0.5])
    ours = x.to(memory_format=layout).clone().requires_grad_()
    mean, std = mean_std(ours, center)
    (mean * weights + std * weights.flip(0)).sum().backward()
    theirs = x.double().requires_grad_()
    variance, mean = torch.var_mean(theirs, (0, 2, 3), correction=1)
    (mean * weights + variance.sqrt() * weights.flip(0)).sum().backward()
    assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)


def test_the_gradient_passes_gradcheck():
    x = sample(4, 2, 3, 3, dtype=torch.float64).requires_grad_()
    center = torch.tensor([1.0, 1.5], dtype=torch.float64)
    # statistics are float32 by contract, so the finite differences are coarse
    assert torch.autograd.gradcheck(lambda x: mean_std(x, center), x, eps=1e-2, atol=2e-3)


def test_a_constant_channel_has_a_finite_gradient():
    x = torch.full((4, 1, 3, 3), 2.0, requires_grad=True)
    mean, std = mean_std(x, torch.zeros(1))
    (mean + std).sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert std.item() < 1e-4


def test_batch_norm_loss_is_the_papers_sum():
    inputs = [sample(8, 3, 4, 4), sample(8, 5, 2, 2, seed=1)]
    means = [torch.tensor([0.0, 1.0, 2.0]), torch.zeros(5)]
    stds = [torch.ones(3), torch.full((5,), 2.0)]
    expected = 0.0
    for x, mean, std in zip(inputs, means, stds, strict=True):
        layer = 0.0
        for c in range(x.shape[1]):
            values = x[:, c].double().flatten()
            layer += float((values.mean() - mean[c]) ** 2 + (values.std() - std[c]) ** 2)
        expected += layer / x.shape[1]
    assert float(batch_norm_loss(inputs, means, stds)) == pytest.approx(expected, rel=1e-5)


def test_batch_norm_loss_vanishes_on_its_own_statistics():
    x = sample(8, 3, 4, 4)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=1)
    assert float(batch_norm_loss([x], [mean], [variance.sqrt()])) < 1e-10


def test_batch_norm_loss_wants_a_target_for_every_input():
    x = sample(8, 3, 4, 4)
    with pytest.raises(ValueError, match="shorter"):
        batch_norm_loss([x, x], [torch.zeros(3)], [torch.ones(3)])


def test_image_loss_sums_over_channels_and_averages_over_images():
    x = sample(5, 3, 6, 4)
    expected = 0.0
    for image in x.double():
        for channel in image:
            expected += float(channel.mean() ** 2 + (channel.std() - 1) ** 2) / 5
    assert float(image_loss(x)) == pytest.approx(expected, rel=1e-5)


def test_image_loss_gradient_is_that_of_the_direct_formula():
    ours, theirs = (sample(3, 3, 4, 4).requires_grad_() for _ in range(2))
    image_loss(ours).backward()
    flat = theirs.flatten(2)
    (flat.mean(2) ** 2 + (flat.std(2) - 1) ** 2).sum(1).mean().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_image_loss_of_flat_images_has_a_finite_gradient():
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = image_loss(x)
    loss.backward()
    assert loss.item() == pytest.approx(3, rel=1e-4)
    assert bool(torch.isfinite(x.grad).all())
