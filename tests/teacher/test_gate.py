# SPDX-License-Identifier: Apache-2.0
"""Which operators a network that is read from a file may call."""

import pytest
import torch
from torch import nn

from zsq.errors import UsageError
from zsq.teacher.gate import refusal
from zsq.teacher.layers import resolve_operator
from zsq.teacher.teacher import load_teacher


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
        "aten.quantize_per_tensor.default",
        "aten._reshape_alias.default",  # a view of whatever size, also of memory that is not there
        "aten.max_pool2d_with_indices_backward.default",  # writes where its indices say
        "aten.segment_reduce.default",
        "aten.manual_seed.default",
        "aten.requires_grad_.default",
        "aten.native_batch_norm.out",
    ],
)
def test_operators_that_are_no_arithmetic_are_refused(name):
    with pytest.raises(UsageError, match=f"calls the operator '{name}', which (is|writes)"):
        resolve_operator(name)


def test_operators_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match="does not have among its standard"):
        resolve_operator("aten.relu.no_such_overload")


@pytest.mark.parametrize(
    ("overload", "why"),
    [
        ("keys.str", "takes or gives something else"),  # of dictionaries
        ("upper.default", "takes or gives something else"),  # gives a text
        ("ord.default", "takes something else than tensors and numbers first"),
    ],
)
def test_operators_of_other_types_are_refused(overload, why):
    name, _, kind = overload.partition(".")
    assert why in refusal(getattr(getattr(torch.ops.aten, name), kind))


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
        torch.ops.aten.__and__.Tensor,  # what `(x > 0) & (x < 1)` calls
        torch.ops.aten.__ior__.Tensor,
        torch.ops.aten.__lshift__.Scalar,
        torch.ops.aten._upsample_lanczos2d_aa.vec,
        torch.ops.aten._native_batch_norm_legit_no_training.default,
        torch.ops.aten.sym_size.int,
    ],
)
def test_operators_of_networks_pass(overload):
    assert refusal(overload) is None


def test_networks_may_combine_conditions():
    class Band(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images):
            values = self.conv(images)
            return (values * ((values > 0) & (values < 1) | (values < -1))).mean((2, 3))

    network, images = Band().eval(), torch.randn(2, 3, 8, 8)
    teacher = load_teacher(network, input_shape=(3, 8, 8))
    torch.testing.assert_close(teacher(images), network(images))
