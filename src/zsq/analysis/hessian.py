# SPDX-License-Identifier: Apache-2.0
"""Products of a loss's Hessian with vectors, by differentiating its gradient once more.

A fine-tuned student rounds its master weights straight through
(`zsq.quantizers.minmax.straight_through`), and that function's backward pass can be differentiated
in its turn: it hands the gradient on as it is, so its own second derivative is zero. What comes out is
the Hessian of the straight-through surrogate: the second derivatives of the loss with respect to the
rounded weights, at the rounded weights, with the derivative of every activation quantizer taken as
1 (0 where it clamps, whatever the recipe did there) and all grids as constants. The loss as a
function of the master weights is a staircase, whose own second derivatives are zero almost
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zsq.errors import RunError, UsageError


class Hessian:
    """Products of the Hessian of one loss with vectors.

    The graph of the gradient is recorded once and held as long as the object lives; every product is
    one backward pass through it. No ``.grad`` is touched.

    Args:
        loss: returns a scalar with its graph; called once. Not compiled: what `torch.compile` makes
            can be differentiated only once.
        parameters: what to differentiate with respect to; leaves or not, on one device.
        name: of the loss, for messages.

    Attributes:
        size: length of the vectors: all parameters, flattened, one after the other.
        device: where the vectors are.

    Raises:
        UsageError: the loss is no scalar with a graph, depends on none of the parameters, or one of
            them does not require gradients.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> Hessian(lambda: x[0] * x[1] ** 2, [x])(torch.tensor([1.0, 0.0]))
        tensor([0., 4.])
    """

    def __init__(
        self, loss: Callable[[], Tensor], parameters: Sequence[Tensor], name: str = "the loss"
    ) -> None:
        self.name, self.parameters = name, _checked(parameters)
        self.sizes = [p.numel() for p in self.parameters]
        self.size, self.device = sum(self.sizes), self.parameters[0].device
        with torch.enable_grad():
            value = loss()
            if value.numel() != 1 or not value.requires_grad:
                raise UsageError(
                    f"{name} is a tensor of shape {tuple(value.shape)} with requires_grad="
                    f"{value.requires_grad}; curvature needs a scalar that was computed from the "
                    "parameters with gradients on."
                )
            self.gradients = torch.autograd.grad(
                value.sum(), self.parameters, create_graph=True, allow_unused=True
            )
        if all(gradient is None for gradient in self.gradients):
            raise UsageError(
                f"{name} depends on none of the {len(self.parameters)} parameters given; pass those "
                "of the network that it is computed with."
            )

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product with a vector (size,) as a constant (size,), float32.

        Raises:
            RunError: it is not finite.
        """
        pieces = torch.split(vector, self.sizes)
        # where the loss is linear in a parameter its gradient has no graph, and no curvature
        pairs = [
            (gradient, piece.view_as(gradient).to(gradient.dtype))
            for gradient, piece in zip(self.gradients, pieces, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(vector)
        gradients, pieces = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            gradients, self.parameters, pieces, retain_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        product = torch.cat([f.detach().float().flatten() for f in found])
        if not bool(product.isfinite().all()):
            raise RunError(
                f"a second derivative of {self.name} is not a finite number; measure where the loss "
                "is smooth and finite, in float32."
            )
        return product


def _checked(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters as a list of tensors that can be differentiated with respect to."""
    frozen = [i for i, p in enumerate(parameters) if not p.requires_grad]
    if not parameters or frozen:
        seen = f"those at {frozen} do not require gradients" if frozen else "there are none"
        raise UsageError(
            f"curvature needs at least one parameter, each with requires_grad=True, but {seen}; "
            "call requires_grad_() on them first."
        )
    return list(parameters)
