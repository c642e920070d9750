# SPDX-License-Identifier: Apache-2.0
"""Class centres in feature space, from the images made so far (IntraQ, arXiv 2111.09136)."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq.errors import UsageError
from zsq.teacher.blocks import tap_nodes
from zsq.teacher.fold import tensor_inputs
from zsq.teacher.layers import operator_name
from zsq.teacher.taps import classifier_node
from zsq.teacher.teacher import Teacher

#: What may lie between pooling and the classifier without changing a value.
_RESHAPES = ("aten.reshape", "aten.view", "aten.flatten", "aten.squeeze", "aten.dropout")


class ClassCenters:
    """Running means of features per class.

    Args:
        classes: how many.
        width: of a feature vector.

    Example:
        >>> centers = ClassCenters(2, 1)
        >>> centers.add(torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]))
        >>> centers.of(torch.tensor([1, 0]))
        (tensor([[2.],
                [0.]]), tensor([ True, False]))
    """

    def __init__(self, classes: int, width: int) -> None:
        self.total = torch.zeros(classes, width)
        self.count = torch.zeros(classes)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take note of finished images: features (N, width), labels (N,), on the CPU."""
        self.total.index_add_(0, labels, features)
        self.count.index_add_(0, labels, torch.ones(len(labels)))

    def of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return each label's centre, (N, width), and whether it has one, (N,) bool."""
        means = self.total / self.count.clamp(min=1)[:, None]
        return means[labels], self.count[labels] > 0


@torch.no_grad()
def pooled_width(teacher: Teacher) -> int:
    """Return how many pooled features a teacher's classifier reads.

    Raises:
        UsageError: it reads a feature map, flattened or not.
    """
    node = tensor_inputs(classifier_node(teacher.network))[0]
    while operator_name(node.target).startswith(_RESHAPES) and tensor_inputs(node):
        node = tensor_inputs(node)[0]
    parameter = next(teacher.network.parameters())
    sample = torch.zeros(1, *teacher.info.input_shape, device=parameter.device)
    shape = tap_nodes(teacher.network, [node.name])(sample)[1].shape
    if shape.numel() != shape[1]:
        raise UsageError(
            f"the classifier of {teacher.info.reference} reads features of shape {tuple(shape[1:])}, "
            "not pooled ones, so images have no distance to a class centre; leave that term out with "
            "--set synthesis.losses.class_band=0, or of mixed images the part that has it with --set "
            "'synthesis.parts=[hast, genie]'."
        )
    return int(shape[1])
