# SPDX-License-Identifier: Apache-2.0
"""The published trunk of GDFQ and Qimera in torch's own layers, with the weights of ours."""

import torch
from torch import nn
from torch.nn import functional

from zsq.synthesis.labels import Labels


def mixtures(count, classes, mixed, seed=0):
    """Return labels of random classes, duplicates among them, and random weights."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(classes, (count, mixed), generator=generator)
    return Labels(drawn, torch.randn(count, mixed, generator=generator).softmax(1))


def randomise_norms(module):
    """Give norms scales and shifts that differ between channels and classes."""
    for name, parameter in module.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.5)


def _norm(x, part, eps, labels):
    if part.weight.ndim == 1:
        norm = nn.BatchNorm2d(x.shape[1], eps=eps)
        norm.load_state_dict(part.state_dict(), strict=False)
        return norm.train()(x)
    plain = nn.BatchNorm2d(x.shape[1], eps=eps, affine=False).train()(x)
    samples = []
    for sample, classes, weights in zip(plain, labels.classes, labels.weights, strict=True):
        pairs = list(zip(classes.tolist(), weights.tolist(), strict=True))
        scale = sum(weight * part.weight[c] for c, weight in pairs)
        shift = sum(weight * part.bias[c] for c, weight in pairs)
        samples.append(sample * scale[:, None, None] + shift[:, None, None])
    return torch.stack(samples)


def reference_trunk(trunk, vectors, labels):
    """Return the images that the published table makes of vectors, (N, C, H, W)."""
    height, width = (-(-side // 4) for side in trunk.image_shape[1:])
    x = functional.linear(vectors, trunk.project.weight, trunk.project.bias)
    x = x.reshape(-1, height, width, 128).permute(0, 3, 1, 2)  # a relabelling of outputs
    up, act = nn.Upsample(scale_factor=2), nn.LeakyReLU(0.2)

    def conv(x, part):
        return functional.conv2d(x, part.weight, part.bias, padding=1)

    x = up(_norm(x, trunk.norm1, 1e-5, labels))
    x = up(act(_norm(conv(x, trunk.conv1), trunk.norm2, 0.8, labels)))
    x = act(_norm(conv(x, trunk.conv2), trunk.norm3, 0.8, labels))
    x = conv(x, trunk.conv3).tanh()[:, :, : trunk.image_shape[1], : trunk.image_shape[2]]
    return nn.BatchNorm2d(x.shape[1], affine=False).train()(x)


def standard(images, tolerance=0.02):
    """Check that every channel of a batch has mean 0 and standard deviation 1."""
    std, mean = torch.std_mean(images.detach(), (0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-4)
    assert torch.allclose(std, torch.ones_like(std), atol=tolerance)


def gradients_arrive(generator, labels):
    """Check that every parameter learns, but biases that the batch norm behind them takes away."""
    images = generator(generator.draw_noise(labels), labels.classes, labels.weights)
    (images * torch.randn_like(images)).sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if name not in {"trunk.conv1.bias", "trunk.conv2.bias"}:
            assert parameter.grad.abs().max() > 1e-4, name


def count(module):
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())
