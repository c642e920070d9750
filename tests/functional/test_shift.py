# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from torch.nn import functional

from zsq.functional.shift import Shift, random_offsets, shift_matrix

OFFSETS = list(itertools.product(range(3), range(3)))
SHAPES = [(2, 3, 5, 7), (1, 1, 2, 2), (3, 2, 2, 9), (2, 4, 8, 8)]


def pad_and_crop(x, dy, dx):
    """Swing convolution as published: reflect-pad by one pixel, crop at an offset."""
    h, w = x.shape[2:]
    return functional.pad(x, (1, 1, 1, 1), mode="reflect")[:, :, dy : dy + h, dx : dx + w]


def copied(x, offsets):
    return Shift()(x, offsets)


WAYS = pytest.mark.parametrize("shift", [copied, Shift.multiplied], ids=["copies", "products"])


def sample(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dy", "dx"), OFFSETS)
def test_equals_padding_and_cropping_to_the_bit(shift, shape, dy, dx, dtype):
    x = sample(shape, dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = shift(x.to(memory_format=layout), torch.tensor([dy, dx]))
        assert y.dtype == dtype
        assert torch.equal(y, pad_and_crop(x.float(), dy, dx).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_offset_one_one_is_the_identity(shape):
    x = sample(shape)
    assert torch.equal(Shift()(x, torch.tensor([1, 1])), x)


@WAYS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dy", "dx"), OFFSETS)
def test_gradient_equals_that_of_padding_and_cropping(shift, shape, dy, dx):
    x, upstream = sample(shape), sample(shape) + 1
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (shift(a, torch.tensor([dy, dx])) * upstream).sum().backward()
    (pad_and_crop(b, dy, dx) * upstream).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_torch_finds_the_operator_sound():
    x = sample((2, 3, 4, 5)).requires_grad_()
    for offsets in ([0, 2], [1, 1]):
        torch.library.opcheck(torch.ops.zsq.shift, (x, torch.tensor(offsets)))


@pytest.mark.parametrize("shape", [(2, 3, 1, 6), (2, 3, 6, 1), (2, 3, 1, 1)])
def test_a_single_row_or_column_stays(shape):
    x = sample(shape)
    assert torch.equal(Shift()(x, torch.tensor([0, 2])), x)


@pytest.mark.parametrize("length", [2, 3, 10])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_each_row_of_the_matrix_picks_one_element(length, offset):
    matrix = shift_matrix(torch.tensor(offset), length, torch.float32)
    assert torch.equal(matrix.sum(1), torch.ones(length))
    assert set(matrix.flatten().tolist()) == {0.0, 1.0}


def test_offsets_are_independent_and_uniform():
    torch.manual_seed(0)
    offsets = random_offsets(9000)
    assert offsets.shape == (9000, 2)
    counts = torch.bincount(offsets[:, 0] * 3 + offsets[:, 1], minlength=9)
    assert len(counts) == 9
    assert bool(((counts - 1000).abs() < 150).all())  # five standard deviations


def test_batches_side_by_side_have_offsets_of_their_own():
    x, offsets = torch.randn(6, 2, 5, 4), torch.tensor([[0, 2], [1, 1], [2, 0]])
    shift = Shift()
    expected = [shift(part, own) for part, own in zip(x.split(2), offsets, strict=True)]
    assert torch.equal(shift(x, offsets), torch.cat(expected))
    assert torch.equal(shift(x, offsets[:1]), shift(x, offsets[0]))
