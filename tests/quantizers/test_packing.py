# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsq.errors import UsageError
from zsq.quantizers.packing import pack_codes, unpack_codes

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def packed(draw):
    bits = draw(st.integers(2, 8))
    shape = draw(SHAPES)
    count = math.prod(shape)
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.uint8).reshape(shape), bits


@given(packed())
def test_unpacking_undoes_packing(case):
    codes, bits = case
    again = unpack_codes(pack_codes(codes, bits), bits, tuple(codes.shape))
    assert again.dtype == torch.uint8
    assert torch.equal(again, codes)


@given(packed())
def test_the_bytes_are_one_long_little_endian_number(case):
    codes, bits = case
    number = sum(code << (bits * i) for i, code in enumerate(codes.flatten().tolist()))
    size = -(-codes.numel() * bits // 8)
    assert bytes(pack_codes(codes, bits).tolist()) == number.to_bytes(size, "little")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_codes_of_any_type_and_layout_are_packed(dtype):
    codes = (torch.arange(24).reshape(2, 3, 2, 2) % 16).to(dtype)
    expected = pack_codes(codes.contiguous(), 4)
    assert torch.equal(pack_codes(codes.to(memory_format=torch.channels_last), 4), expected)
    flipped = codes.flip(0).transpose(0, 1)
    again = unpack_codes(pack_codes(flipped, 4), 4, tuple(flipped.shape))
    assert torch.equal(again, flipped.to(torch.uint8))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_a_single_code_and_none_at_all(shape):
    codes = torch.full(shape, 5, dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, shape), codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_codes_that_do_not_fit_are_refused(bits):
    pack_codes(torch.tensor([0, 2**bits - 1]), bits)
    with pytest.raises(UsageError, match=rf"code {2**bits} does not fit in {bits} bits"):
        pack_codes(torch.tensor([0, 2**bits]), bits)


@pytest.mark.parametrize("code", [-1, 256, 300])
def test_codes_beyond_a_byte_are_refused(code):
    with pytest.raises(UsageError, match="does not fit"):
        pack_codes(torch.tensor([0, code]), 8)


@pytest.mark.parametrize("shape", [(9,), (11,), (2, 3)])
def test_bytes_that_do_not_belong_to_the_shape_are_refused(shape):
    raw = pack_codes(torch.zeros(17, dtype=torch.uint8), 4)
    with pytest.raises(UsageError, match=r"9 packed bytes do not hold .* codes of 4 bits"):
        unpack_codes(raw, 4, shape)
