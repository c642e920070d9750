# SPDX-License-Identifier: Apache-2.0
"""A finished student's losses as functions of its weights, for curvature and surfaces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zsq.analysis.items import FloatWeight
from zsq.functional.losses import kl_divergence
from zsq.runtime.context import Context
from zsq.student import Student
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import Teacher

#: Images at a time: without gradients this bounds the memory, however many there are.
PASS = 128


class StudentLosses:
    """Divergence and cross-entropy of a student on fixed images.

    The variables are the *dequantized* weights: moved ones are not rounded again, for a staircase has
    neither curvature nor slopes. Activations are quantized, straight through.

    Args:
        student: frozen; copied.
        teacher: gives the logits to come near to.
        images: one fixed batch; labels are what cross-entropy asks for.
        temperature: of the divergence.
        mean: over what it is averaged, see `kl_divergence`.
        context: device.

    Attributes:
        parameters: dequantized weights, in execution order.
    """

    def __init__(
        self, student: Student, teacher: Teacher, images: ImageSet, *, temperature: float = 20.0,
        mean: Literal["element", "sample"] = "element",
        context: Context | None = None,
    ) -> None:  # fmt: skip
        policy = (context or Context()).policy
        self.student = student.copy()
        self.paths = list(self.student.layers())
        self.parameters: list[Tensor] = []
        policy.place(self.student).requires_grad_(False)
        for layer in self.student.layers().values():
            with torch.no_grad():
                free = FloatWeight(layer.weight())
            layer.weight = free
            self.parameters.append(free.weight.requires_grad_(True))
        self.images = images.images.to(policy.device)
        self.labels = images.labels.to(policy.device)
        self.temperature, self.mean = temperature, mean
        with torch.no_grad():
            network = policy.placed_copy(teacher.network)
            self.wanted = torch.cat([network(part) for part in torch.split(self.images, PASS)])

    def __call__(self) -> dict[str, Tensor]:
        """Return every loss, from one pass over the images, some of them at a time."""
        logits = torch.cat([self.student(part) for part in torch.split(self.images, PASS)])
        return {
            "kl": kl_divergence(logits.double(), self.wanted, self.temperature, self.mean),
            "ce": cross_entropy(logits.float(), self.labels),
        }

    def separately(self) -> dict[str, Callable[[], Tensor]]:
        """Return one function per loss."""
        return {name: partial(self._one, name) for name in ("kl", "ce")}

    def _one(self, name: str) -> Tensor:
        return self()[name]
