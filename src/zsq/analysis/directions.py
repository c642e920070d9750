# SPDX-License-Identifier: Apache-2.0
"""Directions to look at a loss along (Li et al., arXiv 1712.09913).

Random ones are scaled like the weights, filter by filter (section 4), so that networks whose weights
differ in size can be compared; those of a path are the main ones that training took (section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zsq.errors import UsageError
from zsq.functional.affine import per_channel

#: A direction of a path that explains a smaller share of it than this is rounding noise.
NOISE = 1e-12


@torch.no_grad()
def random_directions(
    parameters: Sequence[Tensor], count: int, generator: torch.Generator | None = None
) -> list[list[Tensor]]:
    """Draw filter-normalised random directions (arXiv 1712.09913, section 4).

    Every filter, an index of axis 0, gets normal noise scaled to the norm of the same filter of the
    weights; biases and batch norms, with fewer than two axes, get zeros, as in the paper.

    Args:
        parameters: of any shapes.
        count: directions.
        generator: None: torch's CPU generator, so that every device gets the same noise.

    Returns:
        ``count`` directions, each with a tensor of the shape of every parameter.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> direction = random_directions([weight, torch.ones(2)], 1)[0]
        >>> direction[0].norm(dim=1).round(decimals=4), direction[1]
        (tensor([5., 1.]), tensor([0., 0.]))
    """
    return [[_random_like(p, generator) for p in parameters] for _ in range(count)]


def _random_like(parameter: Tensor, generator: torch.Generator | None) -> Tensor:
    if parameter.dim() < 2:
        return torch.zeros_like(parameter)
    source = torch.device("cpu") if generator is None else generator.device
    noise = torch.randn(parameter.shape, generator=generator, device=source).to(parameter)
    wanted, drawn = (torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (parameter, noise))
    return noise * per_channel(wanted / drawn.clamp(min=1e-12), noise)


@dataclass(frozen=True)
class PathDirections:
    """The plane that a training path runs in.

    Attributes:
        directions: two, each with a tensor of the shape of every parameter; orthonormal as flat
            vectors.
        shares: of the summed squared distances to the last snapshot, what each explains.
        coordinates: (snapshots, 2), of every snapshot in that plane; the last one is the origin.
    """

    directions: list[list[Tensor]]
    shares: tuple[float, float]
    coordinates: Tensor


@torch.no_grad()
def path_directions(snapshots: Sequence[Sequence[Tensor]]) -> PathDirections:
    """Find the two main directions of a training path (arXiv 1712.09913, section 7.2).

    They are the first right singular vectors of the differences to the last snapshot, which are
    not centred: a surface around the last snapshot shows the path where it was. They come from the
    Gram matrix, (snapshots, snapshots), so that nothing is larger than the snapshots themselves.
    Each points to the side on which the path gets furthest from its end.

    Args:
        snapshots: the parameters at three or more points of the path, the last at its end.

    Raises:
        UsageError: there are too few snapshots, or they lie on a line.

    Example:
        >>> path = [[torch.tensor([0.0, 3.0])], [torch.tensor([1.0, 0.0])], [torch.zeros(2)]]
        >>> found = path_directions(path)
        >>> found.coordinates, found.directions[0][0]
        (tensor([[3., 0.], [0., 1.], [0., 0.]]), tensor([0., 1.]))
        >>> found.shares
        (0.9, 0.1)
    """
    if len(snapshots) < 3:
        raise UsageError(f"a plane needs 3 snapshots of a path or more, got {len(snapshots)}.")
    steps = [
        torch.stack([t.detach() - tensors[-1].detach() for t in tensors]).flatten(1)
        for tensors in zip(*snapshots, strict=True)
    ]
    gram = torch.stack([(s.double() @ s.double().T).cpu() for s in steps]).sum(0)
    vectors, squares, _ = torch.linalg.svd(gram)
    total = float(squares.sum())
    if not float(squares[1]) > NOISE * total:
        raise UsageError(
            f"the {len(snapshots)} snapshots lie on one line, which spans no plane; take snapshots "
            "that are further apart."
        )
    lengths = squares[:2].sqrt()
    coordinates = vectors[:, :2] * lengths
    signs = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True)).sign()
    last = snapshots[-1]
    directions = [
        [(w.to(s.device) @ s.double()).to(t).view_as(t) for s, t in zip(steps, last, strict=True)]
        for w in (vectors[:, :2] * signs / lengths).T
    ]
    shares = (float(squares[0]) / total, float(squares[1]) / total)
    return PathDirections(directions, shares, (coordinates * signs).float())
