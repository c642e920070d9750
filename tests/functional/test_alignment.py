# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from zsq.functional.alignment import alignment_loss, channel_attention


def test_attention_is_the_normalised_mean_square():
    x = torch.randn(2, 3, 4, 5)
    for n in range(2):
        energy = torch.tensor([float((x[n, c] ** 2).mean()) for c in range(3)])
        assert torch.allclose(channel_attention(x)[n], energy / energy.norm(), atol=1e-6)


def test_dead_features_have_no_attention():
    assert torch.equal(channel_attention(torch.zeros(1, 3, 2, 2)), torch.zeros(1, 3))


def test_alignment_is_zero_for_equals_and_does_not_mind_scale():
    ours = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    theirs = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    assert alignment_loss(ours, ours).item() == 0
    base = alignment_loss(ours, theirs).item()
    assert base > 0
    assert alignment_loss([7 * x for x in ours], theirs).item() == pytest.approx(base, rel=1e-5)


def test_alignment_averages_over_images_and_channels_and_sums_over_blocks():
    ours = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    theirs = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    expected = 0.0
    for a, b in zip(ours, theirs, strict=True):
        gap = channel_attention(a) - channel_attention(b)
        expected += float((gap**2).sum()) / gap.numel()
    assert alignment_loss(ours, theirs).item() == pytest.approx(expected, rel=1e-5)
