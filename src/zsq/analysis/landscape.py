# SPDX-License-Identifier: Apache-2.0
"""Curvature and loss surfaces of a finished run (AIT, arXiv 2203.17008, section 3)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zsq.analysis.curvature import Curvature, curvature
from zsq.analysis.directions import PathDirections, path_directions, random_directions
from zsq.analysis.losses import StudentLosses
from zsq.analysis.runs import kept_in
from zsq.analysis.surface import Surface, check_grid, loss_surface
from zsq.artifact.networkfile import load_saved_teacher, load_student
from zsq.artifact.runfolder import RunFolder
from zsq.config import Finetuning
from zsq.errors import UsageError
from zsq.preparation import prepared_teacher
from zsq.runtime.ambient import own_modes
from zsq.runtime.checkpoints import load_tensors
from zsq.runtime.context import Context
from zsq.runtime.files import atomic_write
from zsq.runtime.seeds import seeded
from zsq.synthesis.images import ImageSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Points between two saves of a surface.
SAVE_EVERY = 20


@dataclass(frozen=True)
class Landscape:
    """What the losses look like around a finished student.

    Attributes:
        curvature: trace and largest eigenvalues per loss.
        line: losses along one filter-normalised random direction.
        plane: losses over two of them.
        path: losses over the training path's two principal directions; None without snapshots.
        directions: of that path, with its coordinates.
    """

    curvature: Curvature
    line: Surface
    plane: Surface
    path: Surface | None
    directions: PathDirections | None

    def to_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return {
            "curvature": self.curvature.to_dict(), "line": self.line.to_dict(),
            "plane": self.plane.to_dict(), "path": self.path.to_dict() if self.path else None,
        }  # fmt: skip

    def plot(self) -> Figure:
        """Draw the surface along the training path, or where that is unknown a random plane."""
        if self.path is not None and self.directions is not None:
            return self.path.plot(self.directions.coordinates)
        return self.plane.plot()

    def figures(self) -> dict[str, Figure]:
        """Draw everything."""
        found = {"curvature": self.curvature.plot(), "surface_line": self.line.plot(),
                 "surface_plane": self.plane.plot()}  # fmt: skip
        if self.path is not None:
            found["surface_path"] = self.plot()
        return found


@own_modes()
def analyse(
    run: str | Path, *, images: int = 128, probes: int = 32, eigenvalues: int = 3, points: int = 21,
    radius: float = 1.0, context: Context | None = None,
) -> Landscape:  # fmt: skip
    """Measure curvature and draw loss surfaces of a run; results go to its ``analysis`` folder.

    An interrupted analysis goes on where it was when it is started again with the same settings.

    Args:
        run: the folder that `quantize` wrote.
        images: of the run, one fixed batch.
        probes: random vectors of the trace.
        eigenvalues: how many of the largest.
        points: per direction.
        radius: of the surfaces, in units of the filters' own norms.
        context: device and progress.

    Raises:
        UsageError: no finished run, or no such grid.
        RunError: a product with the Hessian is not finite.
    """
    context = context or Context()
    check_grid(points, radius)
    if images < 2:
        raise UsageError(f"{images} images are too few for a batch; give at least 2.")
    folder = RunFolder.open(run)
    losses = _losses(folder, images, context)
    place = _place(folder, {"images": images, "seed": context.seed})
    with seeded(context.seed, "analyse", "curvature"):
        curves = curvature(
            losses.separately(), losses.parameters, probes=probes, count=eigenvalues,
            steps=max(20, 4 * eigenvalues),
        )  # fmt: skip
    with seeded(context.seed, "analyse", "directions"):
        random = random_directions(losses.parameters, 2)

    def surface(name: str, directions: Sequence[Sequence[Tensor]], reach: float) -> Surface:
        return _surface(place / f"{name}.json", losses, directions, reach, points, context)

    path = _path(folder, losses, context)
    steps = None
    if path is not None:  # a quarter more than what training passed through
        reach = 1.25 * float(path.coordinates.abs().max())
        steps = surface("surface_path", path.directions, max(reach, 1e-6))
    found = Landscape(
        curves, surface("surface_line", random[:1], radius), surface("surface_plane", random, radius),
        steps, path,
    )  # fmt: skip
    with atomic_write(place / "curvature.json") as temporary:
        temporary.write_text(json.dumps(curves.to_dict(), indent=1) + "\n", encoding="utf-8")
    for name, figure in found.figures().items():
        with atomic_write(place / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    return found


def _place(folder: RunFolder, settings: dict[str, int]) -> Path:
    """Return the folder of a run's analysis, without surfaces that were computed otherwise or of another student."""
    place = folder.file("analysis")
    place.mkdir(exist_ok=True)
    student = hashlib.sha256(folder.require("student.safetensors").read_bytes()).hexdigest()
    wanted = json.dumps(settings | {"student": student}) + "\n"
    stamp = place / "made_with.json"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        for surface in place.glob("surface_*"):
            surface.unlink()
        with atomic_write(stamp) as temporary:
            temporary.write_text(wanted, encoding="utf-8")
    return place


def _losses(folder: RunFolder, images: int, context: Context) -> StudentLosses:
    student = load_student(folder.require("student.safetensors"))
    teacher = load_saved_teacher(folder.require("teacher.safetensors"))
    pictures = ImageSet.load(folder.require("images.safetensors"))
    prepared = prepared_teacher(teacher, student.recipe, pictures, kept_in(folder, student.recipe))
    batch = ImageSet(pictures.images[:images], pictures.labels[:images])
    tuning = student.recipe.tuning
    if not isinstance(tuning, Finetuning):
        return StudentLosses(student, prepared, batch, context=context)
    return StudentLosses(
        student, prepared, batch, temperature=tuning.temperature, mean=tuning.kl_mean, context=context
    )  # fmt: skip


def _path(folder: RunFolder, losses: StudentLosses, context: Context) -> PathDirections | None:
    """Return the principal directions of the run's snapshots; None where they span no plane.

    Snapshots are of weights that are not rounded, and the student is: it lies beside their plane. The
    coordinates are those that the path has seen from the student, at a right angle to the plane.
    """
    files = sorted(folder.file("path").glob("path_*.safetensors"))
    if len(files) < 3:
        return None
    loaded = [load_tensors(file)[0] for file in files]
    try:
        found = path_directions([[tensors[path] for path in losses.paths] for tensors in loaded])
    except UsageError as error:
        context.reporter.note(f"no surface along the training path: {error}")
        return None
    apart = [
        loaded[-1][path] - w.detach().cpu()
        for path, w in zip(losses.paths, losses.parameters, strict=True)
    ]
    offset = [
        sum(float((d.cpu() * a).sum()) for d, a in zip(direction, apart, strict=True))
        for direction in found.directions
    ]
    return replace(found, coordinates=found.coordinates + torch.tensor(offset))


def _surface(
    file: Path, losses: StudentLosses, directions: Sequence[Sequence[Tensor]], radius: float,
    points: int, context: Context,
) -> Surface:  # fmt: skip
    """Compute a surface, going on with a file of the same grid."""
    device = context.policy.device
    placed = [[part.to(device) for part in direction] for direction in directions]
    done = Surface.load(file) if file.exists() else None
    if done is not None and not _same_grid(done, len(directions), points, radius):
        done = None
    count = 0
    with context.reporter.task(file.stem.replace("_", " "), points ** len(directions)) as task:

        def note(surface: Surface) -> None:
            nonlocal count
            count += 1
            task.advance(1)
            if count % SAVE_EVERY == 0:
                surface.save(file)

        with torch.no_grad():
            found = loss_surface(
                losses, losses.parameters, placed, radius=radius, points=points, done=done,
                on_point=note,
            )  # fmt: skip
    found.save(file)
    return found


def _same_grid(surface: Surface, directions: int, points: int, radius: float) -> bool:
    ends = {round(axis[-1] / radius, 6) for axis in surface.axes}
    return surface.shape == (points,) * directions and ends == {1.0}
