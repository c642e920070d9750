# SPDX-License-Identifier: Apache-2.0
"""Curvature and surfaces of finished runs."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from helpers.networks import Residual, with_own_statistics
from helpers.runs import zsq, zsq_json
from helpers.students import labelled_images, teacher_of
from safetensors.torch import load_file

import zsq as package
from zsq.analysis.curvature import hessian_trace
from zsq.analysis.landscape import analyse
from zsq.analysis.losses import StudentLosses
from zsq.analysis.surface import Surface
from zsq.errors import UsageError
from zsq.functional.losses import kl_divergence
from zsq.runtime.context import Context
from zsq.stages import tune
from zsq.student import attach
from zsq.synthesis.images import ImageSet


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


@pytest.fixture(scope="module")
def images(teacher):
    return labelled_images(teacher, 16)


def with_seeded_residual():
    torch.manual_seed(0)
    return with_own_statistics(Residual())


@pytest.fixture(scope="module")
def run(teacher, images, tmp_path_factory):
    """A fine-tuned run with snapshots of its path."""
    folder = tmp_path_factory.mktemp("run") / "run"
    package.quantize(
        with_seeded_residual(), "intraq", bits="w4a4", input_shape=(3, 8, 8), images=images,
        settings=["tuning.steps=8", "tuning.batch=8", "tuning.range_steps=2", "tuning.snapshots=4",
                  "tuning.lr=1e-3"], out=folder, report=False,
    )  # fmt: skip
    return folder


def calibrated(teacher, images, bits):
    recipe = package.load_recipe("zeroq", bits=bits)
    return tune(teacher, attach(teacher, recipe), images)


def test_losses_are_the_students_own(teacher, images):
    student = calibrated(teacher, images, "w4a4")
    found = StudentLosses(student, teacher, images)()
    with torch.no_grad():
        logits, wanted = student(images.images), teacher(images.images)
    assert float(found["kl"].detach()) == pytest.approx(
        float(kl_divergence(logits.double(), wanted)), rel=1e-4
    )
    expected = torch.nn.functional.cross_entropy(logits, images.labels)
    assert float(found["ce"].detach()) == pytest.approx(float(expected), rel=1e-4)


def test_the_trace_is_that_of_finite_differences_of_the_gradient(teacher, images):
    """Through a real student, activations quantized straight through, at eight bits."""
    losses = StudentLosses(calibrated(teacher, images, "w8a8"), teacher, images)
    layer = losses.parameters[-1]
    torch.manual_seed(0)
    found = hessian_trace(lambda: losses()["ce"], [layer], probes=64)
    total, step = 0.0, 1e-2
    for index in range(layer.numel()):
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                layer.view(-1)[index] += sign * step
            slopes.append(torch.autograd.grad(losses()["ce"], layer)[0].view(-1)[index])
            with torch.no_grad():
                layer.view(-1)[index] -= sign * step
        total += float(slopes[0] - slopes[1]) / (2 * step)
    assert found.value == pytest.approx(total, abs=max(3 * found.stderr, 0.03 * abs(total)))


def test_the_student_is_not_changed(teacher, images):
    student = calibrated(teacher, images, "w4a4")
    before = student(images.images)
    losses = StudentLosses(student, teacher, images)
    losses.parameters[0].data.mul_(2)
    assert torch.equal(student(images.images), before)


def test_many_images_are_looked_at_some_at_a_time(teacher, images, monkeypatch):
    from zsq.analysis import losses

    student = calibrated(teacher, images, "w4a4")
    whole = StudentLosses(student, teacher, images)()
    monkeypatch.setattr(losses, "PASS", 5)
    parts = StudentLosses(student, teacher, images)()
    for name, value in whole.items():
        # kernels for other batches round otherwise, and a value on the edge between two integers may fall
        # to the other; parts that counted alike, though one holds a single image, would be off by far more
        assert float(parts[name].detach()) == pytest.approx(float(value.detach()), rel=0.02)


def test_snapshots_of_the_path_are_kept(run):
    assert [p.name for p in sorted((run / "path").iterdir())] == [
        f"path_{step:06d}.safetensors" for step in (2, 4, 6, 8)
    ]


def test_a_run_is_analysed_into_its_folder(run, monkeypatch, capsys):
    found = zsq_json(
        monkeypatch, capsys, "analyse", run, "--images", 8, "--points", 5, "--probes", 4
    )
    assert set(found["curvature"]["terms"]) == {"kl", "ce"}
    assert found["path"] is not None
    names = {p.name for p in (run / "analysis").iterdir()}
    assert names == {
        f"{name}.{kind}" for name in ("curvature", "surface_line", "surface_plane", "surface_path")
        for kind in ("json", "png")
    } | {"made_with.json"}  # fmt: skip
    plane = Surface.load(run / "analysis" / "surface_plane.json")
    line = Surface.load(run / "analysis" / "surface_line.json")
    assert plane.shape == (5, 5)
    for term in ("kl", "ce"):
        assert torch.allclose(plane.values[term][:, 2], line.values[term], rtol=1e-5)
    code, out, _ = zsq(
        monkeypatch, capsys, "analyse", run, "--images", 8, "--points", 5, "--probes", 4
    )
    assert code == 0
    assert "trace" in out
    page = (run / "report.html", zsq(monkeypatch, capsys, "report", run, "--quiet"))[0]
    assert page.read_text(encoding="utf-8").count("Landscape") >= 4


def test_the_path_is_drawn_where_it_is_seen_from_the_student(run):
    """Its end, of weights that are not rounded, is not the student, in the middle."""
    found = analyse(run, images=8, points=5, probes=2)
    student = package.load(run)
    files = sorted((run / "path").iterdir())
    for file, coordinates in zip(files, found.directions.coordinates, strict=True):
        weights = load_file(file)
        expected = [
            sum(
                float(((weights[path] - layer.weight().detach()) * part).sum())
                for (path, layer), part in zip(student.layers().items(), direction, strict=True)
            )
            for direction in found.directions.directions
        ]
        assert coordinates.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.directions.coordinates[-1].abs().max() > 0


def test_the_divergence_is_the_recipes(run, teacher, images):
    """IntraQ's is averaged over images, not elements: five times as large with five classes."""
    found = analyse(run, images=8, points=5, probes=2)
    student, batch = package.load(run), ImageSet.load(run / "images.safetensors").images[:8]
    tuning = student.recipe.tuning
    own = package.load_teacher(with_seeded_residual(), input_shape=(3, 8, 8))
    with torch.no_grad():
        logits, wanted = student(batch).double(), own(batch)
    expected = kl_divergence(logits, wanted, tuning.temperature, "sample")
    assert tuning.kl_mean == "sample"
    assert float(found.line.values["kl"][2]) == pytest.approx(float(expected), rel=0.02)


def test_other_settings_or_another_student_have_other_surfaces(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    first = analyse(run, images=8, points=5, probes=2)
    again = analyse(run, images=8, points=5, probes=2)
    seeded = analyse(run, images=8, points=5, probes=2, context=Context(seed=5))
    fewer = analyse(run, images=4, points=5, probes=2, context=Context(seed=5))
    surfaces = [found.line.values["ce"] for found in (first, seeded, fewer)]
    assert torch.equal(again.line.values["ce"], surfaces[0])
    assert not any(torch.equal(a, b) for a, b in pairwise(surfaces))
    student = package.load(run)
    student.layers()["b1"].weight.scale.mul_(2)
    package.save(student, run / "student.safetensors")
    other = analyse(run, images=4, points=5, probes=2, context=Context(seed=5))
    assert not torch.equal(other.line.values["ce"], surfaces[2])
    with pytest.raises(UsageError, match="odd number of points"):
        analyse(run, points=4)


def test_an_interrupted_surface_goes_on(run, monkeypatch):
    whole = analyse(run, images=8, points=5, probes=2)
    file = run / "analysis" / "surface_plane.json"
    data = json.loads(file.read_text())
    data["values"] = {name: [[None] * 5, *rows[1:]] for name, rows in data["values"].items()}
    file.write_text(json.dumps(data))
    calls = []
    call = StudentLosses.__call__
    monkeypatch.setattr(StudentLosses, "__call__", lambda self: (calls.append(1), call(self))[1])
    again = analyse(run, images=8, points=5, probes=2)
    assert len(calls) == 5 + 2, "five missing points, one graph per loss's curvature"
    for name, values in whole.plane.values.items():
        assert torch.equal(again.plane.values[name], values)
