# SPDX-License-Identifier: Apache-2.0
"""Curvature of a loss in chosen parameters: the Hessian's trace and largest eigenvalues.

The Hessian is never built: everything is made of its products with vectors. What they mean for a
student whose weights are rounded straight through is said in `zsq.analysis.hessian`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsq.analysis.hessian import Hessian
from zsq.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A new Lanczos direction is rounding noise below this share of the largest entry so far.
NOISE = 1e-6


@dataclass(frozen=True)
class TraceEstimate:
    """An estimated trace.

    Attributes:
        value: the mean over the probes; divided by the number of parameters, the mean eigenvalue.
        stderr: its standard error.
        probes: how many random vectors it rests on.
    """

    value: float
    stderr: float
    probes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Spectrum:
    """The algebraically largest eigenvalues: the most positive ones, not those largest in size.

    Attributes:
        values: in descending order. Each is a lower bound in exact arithmetic: Ritz values approach
            the top of the spectrum from below.
        residuals: ``|H v - value * v|`` of each; some eigenvalue is no further away than that.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"values": list(self.values), "residuals": list(self.residuals)}


@dataclass(frozen=True)
class Curvature:
    """The curvature of several losses in the same parameters.

    Attributes:
        parameters: how many numbers they are.
        traces: by the name of the loss.
        spectra: by the name of the loss.
    """

    parameters: int
    traces: dict[str, TraceEstimate]
    spectra: dict[str, Spectrum]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        terms = {
            name: {"trace": trace.to_dict(), "spectrum": self.spectra[name].to_dict()}
            for name, trace in self.traces.items()
        }
        return {"parameters": self.parameters, "terms": terms}

    def plot(self) -> Figure:
        """Draw traces with their standard errors beside the largest eigenvalues."""
        from matplotlib.figure import Figure

        names = list(self.traces)
        places = range(len(names))
        figure = Figure(figsize=(max(6, 1.6 * len(names) + 3), 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.bar(
            places, [self.traces[n].value for n in names],
            yerr=[self.traces[n].stderr for n in names], capsize=4,
        )  # fmt: skip
        for place, name in enumerate(names):
            top = self.spectra[name]
            right.errorbar(
                [place] * len(top.values), top.values, yerr=top.residuals, fmt="o", capsize=4
            )
        for axes, label in ((left, "trace of the Hessian"), (right, "largest eigenvalues")):
            axes.set_xticks(list(places), names)
            axes.set(ylabel=label, xlim=(-0.6, len(names) - 0.4))
            axes.grid(visible=True, alpha=0.3)
        return figure


def hessian_trace(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], *, probes: int = 16
) -> TraceEstimate:
    """Estimate the trace of the Hessian by Hutchinson's method.

    ``E[v' H v] = tr H`` for vectors of random signs; of all distributions of independent entries
    they have the smallest variance (Hutchinson 1990), none at all where H is diagonal. The signs come
    from torch's CPU generator (`zsq.runtime.seeds.seeded`), the same on every device.

    Args:
        loss: returns a scalar with its graph; called once. ``.grad`` is not touched.
        parameters: leaves or not, with ``requires_grad``.
        probes: random vectors, at least 2.

    Raises:
        UsageError: too few probes, or nothing to differentiate.
        RunError: a product is not finite.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> hessian_trace(lambda: (torch.tensor([1.0, 2.0, 4.0]) * x**2).sum(), [x], probes=2)
        TraceEstimate(value=14.0, stderr=0.0, probes=2)
    """
    return _trace(Hessian(loss, parameters), probes)


def _trace(hessian: Hessian, probes: int) -> TraceEstimate:
    if probes < 2:
        raise UsageError(f"a trace with an error needs at least 2 probes, got {probes}.")
    found = []
    for _ in range(probes):
        signs = torch.randint(0, 2, (hessian.size,), dtype=torch.float32).mul_(2).sub_(1)
        signs = signs.to(hessian.device)
        found.append(float(signs @ hessian(signs)))
    return TraceEstimate(
        statistics.fmean(found), statistics.stdev(found) / math.sqrt(probes), probes
    )


def top_eigenvalues(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], *, count: int = 1, steps: int = 20
) -> Spectrum:
    """Find the algebraically largest eigenvalues of the Hessian by the Lanczos method.

    Every new direction is orthogonalised against all earlier ones, twice, so that no eigenvalue
    appears more often than it is there. Memory: ``steps`` vectors as long as all parameters.

    Args:
        loss: returns a scalar with its graph; called once. ``.grad`` is not touched.
        parameters: leaves or not, with ``requires_grad``.
        count: eigenvalues, at most ``steps`` and the number of parameters.
        steps: products with the Hessian; fewer where the parameters have fewer dimensions. The
            residuals say whether they were enough.

    Raises:
        UsageError: ``count`` is out of range, or there is nothing to differentiate.
        RunError: a product is not finite.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> loss = lambda: (torch.tensor([1.0, -8.0, 2.0]) * x**2).sum() / 2
        >>> [round(value, 4) for value in top_eigenvalues(loss, [x], count=2).values]
        [2.0, 1.0]
    """
    return _spectrum(Hessian(loss, parameters), count, steps)


def _spectrum(hessian: Hessian, count: int, steps: int) -> Spectrum:
    steps = min(steps, hessian.size)
    if not 1 <= count <= steps:
        raise UsageError(
            f"count is {count}; it must be from 1 to the steps and the number of parameters, here "
            f"{steps}."
        )
    basis = torch.empty(steps, hessian.size, device=hessian.device)
    diagonal, beside = [], [0.0]  # of the tridiagonal matrix that the products span
    rest = torch.zeros(hessian.size, device=hessian.device)
    for step in range(steps):
        if beside[-1] == 0.0:  # at the start, and where the directions so far span all they reach
            rest = _without(basis[:step], torch.randn(hessian.size).to(hessian.device))
        basis[step] = rest / rest.norm()
        product = hessian(basis[step])
        diagonal.append(float(product @ basis[step]))
        rest = _without(basis[: step + 1], product)
        norm = float(rest.norm())
        largest = max(map(abs, diagonal + beside))
        beside.append(norm if norm > NOISE * largest else 0.0)
    inner = torch.tensor(beside[1:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(matrix + inner.diag(1) + inner.diag(-1))
    residuals = beside[-1] * vectors[-1].abs()
    return Spectrum(
        tuple(values.flip(0)[:count].tolist()), tuple(residuals.flip(0)[:count].tolist())
    )


def _without(basis: Tensor, vector: Tensor) -> Tensor:
    """Return a vector less its parts along orthonormal rows; the second pass removes rounding."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def curvature(
    losses: Mapping[str, Callable[[], Tensor]], parameters: Sequence[Tensor], *,
    probes: int = 16, count: int = 1, steps: int = 20,
) -> Curvature:  # fmt: skip
    """Measure the trace and the largest eigenvalues of several losses, such as an objective's terms.

    Each loss is computed once; `hessian_trace` and `top_eigenvalues` say how, and what they raise.

    Args:
        losses: by name; each returns a scalar with its graph.
        parameters: the same for all.
        probes: random vectors per trace.
        count: eigenvalues per loss.
        steps: Lanczos steps per loss.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> found = curvature({"bowl": lambda: (x**2).sum(), "plane": lambda: x.sum()}, [x])
        >>> found.traces["bowl"].value, found.traces["plane"].value
        (4.0, 0.0)
    """
    traces, spectra = {}, {}
    for name, loss in losses.items():
        hessian = Hessian(loss, parameters, name)
        traces[name] = _trace(hessian, probes)
        spectra[name] = _spectrum(hessian, count, steps)
        del hessian  # two graphs at a time would be twice the memory
    return Curvature(sum(p.numel() for p in parameters), traces, spectra)
