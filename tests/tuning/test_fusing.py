# SPDX-License-Identifier: Apache-2.0
"""Compiled rounding: the same numbers, and only while the loop runs."""

import pytest
import torch

from zsq.quantizers.minmax import TrackedActivation, to_grid
from zsq.runtime.policy import Policy
from zsq.tuning.fusing import fused_rounding

FAST = Policy(compile=True)


def quantizer(low, high):
    made = TrackedActivation(4)
    made.tracking = True
    made(torch.tensor([low, high]))
    made.tracking = False
    return made


def test_the_numbers_are_the_plain_ones():
    notes = []
    quantizers = [quantizer(0.0, 1.0), quantizer(-0.3, 2.0)]
    inputs = [torch.randn(2, 3, 8, 8), torch.randn(4, 5, 4, 4).bfloat16()]
    layout = torch.channels_last
    inputs = [x.contiguous(memory_format=layout).requires_grad_() for x in inputs]
    plain = [q(x) for q, x in zip(quantizers, inputs, strict=True)]
    with fused_rounding(quantizers, FAST, 1000, notes.append):
        fused = [q(x) for q, x in zip(quantizers, inputs, strict=True)]
        for x, y in zip(inputs, fused, strict=True):
            y.float().sum().backward()
            assert torch.equal(x.grad, torch.ones_like(x))
    assert quantizers[0].rounding is to_grid
    assert notes == []
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous(memory_format=layout)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("policy", "steps"), [(Policy(compile=False), 1000), (FAST, 10)], ids=["not asked", "short"]
)
def test_nothing_is_compiled_where_it_is_not_repaid(policy, steps):
    one = quantizer(0.0, 1.0)
    with fused_rounding([one], policy, steps, print):
        assert one.rounding is to_grid


def test_an_error_leaves_nothing_behind():
    one, seen = quantizer(0.0, 1.0), []

    def fail():
        with fused_rounding([one], FAST, 1000, print):
            seen.append(one.rounding)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen[0] is not to_grid
    assert one.rounding is to_grid
