# SPDX-License-Identifier: Apache-2.0
"""Loss surfaces: every term of a loss on a line or a plane through a network's weights.

The way of looking is that of Li et al. (arXiv 1712.09913); `zsq.analysis.directions` makes the
directions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsq.errors import UsageError
from zsq.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Surface:
    """Loss terms on a grid, as far as they are computed.

    Attributes:
        axes: the coordinates along each of the one or two directions; the middle one is 0.
        values: by term, a float64 tensor of the grid's shape, on the CPU; NaN where it is not
            computed yet. Empty before the first point.
    """

    axes: tuple[tuple[float, ...], ...]
    values: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Points along each axis."""
        return tuple(len(axis) for axis in self.axes)

    def missing(self) -> list[tuple[int, ...]]:
        """Return the places where no term is computed yet, in order."""
        places = product(*map(range, self.shape))
        return [i for i in places if all(bool(v[i].isnan()) for v in self.values.values())]

    def put(self, place: tuple[int, ...], terms: Mapping[str, Tensor]) -> None:
        """Enter the terms computed at a place.

        Raises:
            UsageError: they are not those of the points before.
        """
        if not self.values:
            empty = torch.full(self.shape, math.nan, dtype=torch.float64)
            self.values.update({name: empty.clone() for name in terms})
        if set(terms) != set(self.values):
            raise UsageError(
                f"the loss has the terms {sorted(terms)} here but {sorted(self.values)} at the points "
                "before; start a new surface."
            )
        for name, value in {name: float(t.detach()) for name, t in terms.items()}.items():
            self.values[name][place] = value

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: nested lists, None for NaN and text for infinities."""
        values = {name: _to_plain(v.tolist()) for name, v in self.values.items()}
        return {"axes": [list(axis) for axis in self.axes], "values": values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Surface:
        """Read what `to_dict` returned.

        Raises:
            UsageError: it is something else.
        """
        try:
            axes = tuple(tuple(float(x) for x in axis) for axis in data["axes"])
            values = {
                str(name): torch.tensor(_from_plain(v), dtype=torch.float64)
                for name, v in data["values"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"this is no loss surface: {error!r}; compute it anew.") from error
        surface = cls(axes, values)
        wrong = [name for name, v in values.items() if tuple(v.shape) != surface.shape]
        if wrong or len(axes) not in (1, 2):
            raise UsageError(
                f"this is no loss surface: the grid is {surface.shape}, of one or two axes, and the "
                f"terms {wrong} have other shapes; compute it anew."
            )
        return surface

    def save(self, path: Path | str) -> None:
        """Write the surface as JSON, computed in full or not.

        Raises:
            RunError: the file cannot be written.
        """
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Surface:
        """Read a file that `save` wrote.

        Raises:
            UsageError: there is none, or it holds something else.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # also from_dict's, which knows no path
            raise UsageError(f"cannot read the loss surface {path}: {error}") from error

    def plot(self, path: Tensor | None = None) -> Figure:
        """Draw one panel per term: a line, or filled contours where there are two directions.

        Args:
            path: (snapshots, 2) coordinates to draw over the contours, such as those of
                `zsq.analysis.directions.path_directions`.
        """
        from matplotlib.figure import Figure

        panels = max(1, len(self.values))
        figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")
        drawn = figure.subplots(1, panels, squeeze=False)[0]
        for axes, (name, values) in zip(drawn, self.values.items(), strict=False):
            axes.set(title=name, xlabel="along direction 1")
            if len(self.axes) == 1:
                axes.plot(self.axes[0], values.numpy(), marker=".")
                axes.set(ylabel="loss")
                axes.grid(visible=True, alpha=0.3)
            else:
                _contours(figure, axes, self, values)
            if path is not None and len(self.axes) == 2:
                x, y = path.detach().cpu().T.numpy()
                axes.plot(x, y, color="white", marker=".", linewidth=1)
        return figure


def _contours(figure: Figure, axes: Axes, surface: Surface, values: Tensor) -> None:
    axes.set(ylabel="along direction 2")
    finite = values[values.isfinite()]
    if len(finite) and bool(finite.max() > finite.min()):  # otherwise there is no contour to draw
        shown = torch.where(values.isfinite(), values, math.nan).T.numpy()
        filled = axes.contourf(surface.axes[0], surface.axes[1], shown, levels=20)
        figure.colorbar(filled, ax=axes)
    axes.plot(0, 0, "+", color="black")


def _to_plain(value: Any) -> Any:
    """Replace the numbers that JSON does not have, in nested lists."""
    if isinstance(value, list):
        return [_to_plain(v) for v in value]
    return value if math.isfinite(value) else None if math.isnan(value) else str(value)


def _from_plain(value: Any) -> Any:
    """Undo `_to_plain`."""
    if isinstance(value, list):
        return [_from_plain(v) for v in value]
    return math.nan if value is None else float(value)


def loss_surface(
    losses: Callable[[], Mapping[str, Tensor]], parameters: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]], *, radius: float = 1.0, points: int = 21,
    done: Surface | Mapping[str, Any] | None = None,
    on_point: Callable[[Surface], None] | None = None,
) -> Surface:  # fmt: skip
    """Compute every term of a loss on a grid around the parameters.

    Args:
        losses: returns the terms as scalars; called once per point, without gradients.
        parameters: moved in place, and put back bit for bit at the end, also after an error.
        directions: one or two, each with a tensor of the shape of every parameter; multiples of them
            are added to the parameters.
        radius: the grid goes from ``-radius`` to ``radius`` along each direction.
        points: along each direction; odd, so that the parameters themselves are one.
        done: an earlier surface of the same directions, computed in part, or its `Surface.to_dict`;
            only what is missing is computed. It is not changed.
        on_point: called with the surface so far after every point, to save it now and then.

    Raises:
        UsageError: a setting is out of range, or ``done`` is of another grid or other terms.

    Example:
        >>> x = torch.tensor([1.0, 0.0])
        >>> lines = [[torch.tensor([1.0, 0.0])]]
        >>> found = loss_surface(lambda: {"norm": x.norm()}, [x], lines, points=3)
        >>> found.axes[0], found.values["norm"]
        ((-1.0, 0.0, 1.0), tensor([0., 1., 2.], dtype=torch.float64))
    """
    axes = _grid(len(directions), radius, points)
    surface = Surface(axes, {})
    if done is not None:
        earlier = done if isinstance(done, Surface) else Surface.from_dict(done)
        if earlier.axes != axes:
            raise UsageError(
                f"the surface to go on with has a grid of {earlier.shape} points that is not the one "
                f"asked for, {surface.shape} up to {radius}; ask for the same grid or start anew."
            )
        surface.values.update({name: v.clone() for name, v in earlier.values.items()})
    with torch.no_grad(), _put_back(parameters) as start:
        for place in surface.missing():
            shift = [axis[i] for axis, i in zip(axes, place, strict=True)]
            _move(parameters, start, directions, shift)
            surface.put(place, losses())
            if on_point is not None:
                on_point(surface)
    return surface


def check_grid(points: int, radius: float, directions: int = 1) -> None:
    """Refuse what is no grid around a student.

    Raises:
        UsageError: says what is.
    """
    if directions not in (1, 2) or points < 3 or points % 2 == 0 or not 0 < radius < math.inf:
        raise UsageError(
            f"a surface has 1 or 2 directions, an odd number of points from 3 on, and a radius above "
            f"0; got {directions} directions, {points} points and radius {radius}."
        )


def _grid(directions: int, radius: float, points: int) -> tuple[tuple[float, ...], ...]:
    """Return the coordinates along each axis; the middle one is exactly 0."""
    check_grid(points, radius, directions)
    middle = points // 2
    return (tuple(radius * ((i - middle) / middle) for i in range(points)),) * directions


@contextmanager
def _put_back(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield copies of the parameters, and copy them back afterwards."""
    start = [p.detach().clone() for p in parameters]
    try:
        yield start
    finally:
        with torch.no_grad():
            for parameter, kept in zip(parameters, start, strict=True):
                parameter.copy_(kept)


def _move(
    parameters: Sequence[Tensor], start: Sequence[Tensor], directions: Sequence[Sequence[Tensor]],
    shift: Sequence[float],
) -> None:  # fmt: skip
    """Set the parameters to where they started plus multiples of the directions."""
    for parameter, kept, *along in zip(parameters, start, *directions, strict=True):
        parameter.copy_(kept)
        for direction, amount in zip(along, shift, strict=True):
            parameter.add_(direction, alpha=amount)
