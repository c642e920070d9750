# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.nn import functional

from zsq.synthesis.generator import BatchStandardize, Generator, upsample_twice


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 9, 14), (4, 5, 3), (3, 1, 2)])
def test_images_have_the_shape_that_was_asked_for(shape):
    torch.manual_seed(0)
    images = Generator(7, shape)(normal(5, 7))
    assert images.shape == (5, *shape)
    assert images.dtype == torch.float32


def test_a_batch_has_mean_0_and_standard_deviation_1_per_channel():
    torch.manual_seed(0)
    images = Generator(16, (3, 16, 16))(normal(9, 16)).detach()
    variance, mean = torch.var_mean(images, (0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(3), atol=1e-5)
    assert torch.allclose(variance, torch.ones(3), atol=1e-2)


def test_it_has_the_parameters_of_the_published_generator():
    def expected(side):
        project = (256 + 1) * 128 * (side // 4) ** 2
        return project + 2 * 128 + (128 * 9 + 1) * 64 + 2 * 64 + (64 * 9 + 1) * 3

    generator = Generator(256, (3, 8, 8))
    assert sum(p.numel() for p in generator.parameters()) == expected(8)
    assert round(expected(224) / 1e6, 1) == 103.2  # as the notes count


def test_it_computes_the_published_table_layer_by_layer():
    torch.manual_seed(0)
    generator = Generator(16, (3, 8, 12))
    for norm in (generator.norm1, generator.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    z = normal(6, 16)
    x = functional.linear(z, generator.project.weight, generator.project.bias)
    x = x.reshape(6, 2, 3, 128).permute(0, 3, 1, 2)  # channels last: a relabelling of outputs

    def norm(x, part):
        return functional.batch_norm(x, None, None, part.weight, part.bias, training=True)

    x = functional.interpolate(norm(x, generator.norm1), scale_factor=2, mode="nearest")
    x = functional.conv2d(x, generator.conv1.weight, generator.conv1.bias, padding=1)
    x = functional.leaky_relu(norm(x, generator.norm2), 0.2)
    x = functional.interpolate(x, scale_factor=2, mode="nearest")
    x = functional.conv2d(x, generator.conv2.weight, generator.conv2.bias, padding=1)
    x = functional.batch_norm(torch.tanh(x), None, None, training=True)
    assert torch.allclose(generator(z), x, atol=1e-4)
    assert generator.norm3.weight is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_standardising_is_torchs_batch_norm_in_training_mode(affine, layout):
    ours, theirs = BatchStandardize(3, affine=affine), nn.BatchNorm2d(3, affine=affine).train()
    if affine:
        for name in ("weight", "bias"):
            values = normal(3, seed=len(name))
            getattr(ours, name).data.copy_(values)
            getattr(theirs, name).data.copy_(values)
    a, b = (
        (normal(4, 3, 5, 6) * 3 + 1).to(memory_format=layout).requires_grad_() for _ in range(2)
    )
    upstream = normal(4, 3, 5, 6, seed=2)
    y, expected = ours(a), theirs(b)
    assert torch.allclose(y, expected, atol=1e-5)
    (y * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-4)


def test_statistics_of_bf16_are_float32():
    x = (normal(64, 2, 16, 16) + 30).to(torch.bfloat16)
    y = BatchStandardize(2)(x)
    assert y.dtype == torch.bfloat16
    assert float(y.float().mean().abs().detach()) < 0.01


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_is_nearest_neighbour(layout):
    x = normal(2, 3, 4, 5).to(memory_format=layout)
    assert torch.equal(upsample_twice(x), functional.interpolate(x, scale_factor=2.0))


def test_a_reset_generator_is_a_fresh_one():
    torch.manual_seed(0)
    generator = Generator(8, (3, 8, 8))
    state = {k: v.clone() for k, v in generator.state_dict().items()}
    for parameter in generator.parameters():
        parameter.data.fill_(3.0)
    torch.manual_seed(0)
    generator.reset_parameters()
    after = generator.state_dict()
    assert all(torch.equal(after[k], v) for k, v in state.items())
