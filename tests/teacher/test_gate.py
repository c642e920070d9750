# SPDX-License-Identifier: Apache-2.0
"""Which operators a network that is read from a file may call."""

import pytest
import torch

from zsq.errors import UsageError
from zsq.teacher.gate import refusal
from zsq.teacher.layers import resolve_operator


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default",  # reads and, mapped, writes any file
        "aten.save.default",
        "aten._sparse_coo_tensor_unsafe.default",  # indices that nobody looks at
        "aten.sparse_coo_tensor.indices_size",
        "aten._nested_view_from_buffer.default",
        "aten.set_.source_Tensor",
        "aten.resize_.default",
        "aten.fbgemm_linear_int8_weight.default",  # an address in a tensor
        "aten.add.out",
        "aten.sort.values",  # writes, too, under another name
        "aten.record_stream.default",
        "aten.to.device_or_anything",
        "aten.quantize_per_tensor.default",
    ],
)
def test_operators_that_are_no_arithmetic_are_refused(name):
    with pytest.raises(UsageError, match=f"calls the operator '{name}'"):
        resolve_operator(name)


@pytest.mark.parametrize(
    "overload",
    [
        torch.ops.aten.relu.default,
        torch.ops.aten.add_.Tensor,  # writes into what it changes
        torch.ops.aten.cat.default,
        torch.ops.aten.arange.start_step,
        torch.ops.aten.index_put.default,
        torch.ops.aten._to_copy.default,
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.fake_quantize_per_tensor_affine.default,
        torch.ops.aten.batch_norm.default,
        torch.ops.aten.einsum.default,
        torch.ops.aten.div.Tensor_mode,
        torch.ops.aten.to.dtype,
        torch.ops.aten.dropout.default,
        torch.ops.aten.scaled_dot_product_attention.default,
    ],
)
def test_operators_of_networks_pass(overload):
    assert refusal(overload) is None
