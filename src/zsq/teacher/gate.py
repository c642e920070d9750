# SPDX-License-Identifier: Apache-2.0
"""Which ATen operators a network may call: arithmetic on tensors, and nothing else.

Networks are read from files, and files come from strangers. Among ATen's operators are some that read and
write files, that take addresses for numbers, or that write wherever an index says without looking; an
operator passes that is known to be none of these, by its schema and by its name.
"""

from __future__ import annotations

import re

from torch._ops import OpOverload

#: What operators may take and give. Types that a schema counts as numbers (dtypes, layouts) are ``int``.
_TAKEN = frozenset({
    "Optional", "List", "Tensor", "int", "float", "bool", "number", "str", "Device", "Generator",
})  # fmt: skip
_GIVEN = frozenset({"Optional", "List", "Tensor", "int", "float", "bool", "number"})
#: Of files and of other libraries' handles; of layouts whose indices are not looked at; in place of
#: another tensor's memory; of training, where indices that the forward operator would have made are taken
#: as they come, and the states of autograd and of chance are changed.
_REFUSED = re.compile(
    r"from_file|save|sparse|_?(coo|cs[rc]|bs[rc])_.*|nested|jagged|mkldnn|miopen|cudnn|fbgemm|(?<!fake_)quantize"
    r"|^set(_.*)?$|resize|record_stream|get_gradients|_test_"
    r"|backward|segment_reduce|ctc_loss|seed|(requires|retain)_grad|^batch_norm_"
)
#: Operators that are not meant to be called by name, except these, which exporting and decomposing
#: common layers writes.
_INTERNAL = frozenset({
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_assert_async", "_assert_scalar",
    "_assert_tensor_metadata", "_cdist_forward", "_conj", "_conv_depthwise2d", "_convolution",
    "_euclidean_dist", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_lazy_clone", "_local_scalar_dense",
    "_log_softmax", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "_prelu_kernel", "_safe_softmax",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu",
    "_shape_as_tensor", "_softmax", "_stack", "_to_copy", "_trilinear", "_unsafe_index",
    "_unique2", "_unsafe_masked_index", "_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
    "_upsample_lanczos2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_weight_norm", "_weight_norm_interface",
    "__and__", "__iand__", "__or__", "__ior__", "__xor__", "__ixor__", "__lshift__", "__ilshift__",
    "__rshift__", "__irshift__",
})  # fmt: skip


def refusal(operator: OpOverload) -> str | None:
    """Say why a network may not call an operator, as the end of a sentence; None where it may.

    Example:
        >>> import torch
        >>> refusal(torch.ops.aten.relu.default)
        >>> refusal(torch.ops.aten.from_file.default)
        'is not arithmetic on tensors'
    """
    schema = operator._schema
    name = schema.name.removeprefix("aten::")
    if name.startswith("_") and name not in _INTERNAL and name.rstrip("_") not in _INTERNAL:
        return "is internal to PyTorch"
    if _REFUSED.search(name):
        return "is not arithmetic on tensors"
    taken, given = ([_kinds(x.type) for x in part] for part in (schema.arguments, schema.returns))
    if not all(kinds <= _TAKEN for kinds in taken) or not all(kinds <= _GIVEN for kinds in given):
        return "takes or gives something else than tensors and numbers"
    if taken and taken[0] & {"str", "Device", "Generator"} and name != "einsum":
        return "takes something else than tensors and numbers first"
    written = [x for x in schema.arguments[1:] if x.alias_info and x.alias_info.is_write]
    # Batch norms of training write their running statistics, and are refused for that with a better sentence.
    if written and ("batch_norm" not in name or any(x.kwarg_only for x in written)):
        return "writes into a tensor that it is given"
    return None


def _kinds(kind: object) -> set[str]:
    """Return the names that a type of a schema is made of."""
    return set(re.findall(r"[\w.]+", str(kind)))
