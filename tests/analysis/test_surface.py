# SPDX-License-Identifier: Apache-2.0
"""Directions against numpy; surfaces against direct evaluation, interrupted and gone on with."""

import io
import json

import numpy as np
import pytest
import torch
from torch import nn

from zsq.analysis.directions import path_directions, random_directions
from zsq.analysis.surface import Surface, loss_surface
from zsq.errors import UsageError

X = torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(1))


class Model:
    """A small network and two terms of its outputs; counts how often it is asked."""

    def __init__(self):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
        self.parameters = list(self.network.parameters())
        self.calls = 0

    def losses(self):
        self.calls += 1
        out = self.network(X)
        return {"size": out.square().mean(), "entropy": -out.log_softmax(1).mean()}

    def directions(self, count=2):
        return random_directions(self.parameters, count, torch.Generator().manual_seed(2))


@pytest.fixture
def model():
    return Model()


def bits(tensors):
    """The tensors' bytes: equality of -0 and 0, or of NaN, does not count."""
    return [t.detach().numpy().tobytes() for t in tensors]


def test_filters_of_random_directions_have_the_norms_of_the_weights(model):
    with torch.no_grad():
        model.parameters[0][1] = 0  # a filter that was pruned away stays where it is
    first, second = model.directions()
    for parameter, direction in zip(model.parameters, first, strict=True):
        assert direction.shape == parameter.shape
        assert not direction.requires_grad
        if parameter.dim() < 2:
            assert not direction.any()
        else:
            norms = [t.detach().flatten(1).norm(dim=1) for t in (direction, parameter)]
            torch.testing.assert_close(*norms)
    assert not torch.equal(first[0], second[0])
    assert bits(model.directions()[1]) == bits(second)
    torch.manual_seed(5)
    free = random_directions(model.parameters, 1)
    assert not torch.equal(free[0][0], first[0])


def walk(count=7):
    """Snapshots of two tensors, and all of them as rows of one array."""
    generator = torch.Generator().manual_seed(3)
    snapshots = [
        [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]
        for _ in range(count)
    ]
    return snapshots, np.stack([torch.cat([t.flatten() for t in s]).numpy() for s in snapshots])


def test_directions_of_a_path_are_its_principal_ones():
    snapshots, rows = walk()
    found = path_directions(snapshots)
    steps = (rows - rows[-1]).astype(np.float64)
    _, sizes, principal = np.linalg.svd(steps, full_matrices=False)
    flat = np.stack([torch.cat([t.flatten() for t in d]).numpy() for d in found.directions])
    np.testing.assert_allclose(flat @ flat.T, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(np.abs((flat * principal[:2]).sum(1)), 1, atol=1e-6)
    np.testing.assert_allclose(found.shares, (sizes**2 / (sizes**2).sum())[:2], rtol=1e-6)
    np.testing.assert_allclose(found.coordinates.numpy(), steps @ flat.T, atol=1e-5)
    assert [d.shape for d in found.directions[0]] == [t.shape for t in snapshots[0]]
    assert not found.coordinates[-1].any()
    furthest = found.coordinates.abs().argmax(0)
    assert (found.coordinates[furthest, [0, 1]] > 0).all()


def test_paths_that_span_no_plane_are_refused():
    snapshots, _ = walk(2)
    with pytest.raises(UsageError, match="3 snapshots"):
        path_directions(snapshots)
    line = [[torch.tensor([1.0, 2.0]) * k] for k in range(4)]
    for snapshots in (line, [line[0]] * 3):
        with pytest.raises(UsageError, match="line"):
            path_directions(snapshots)


def test_a_path_lies_on_the_surface_at_its_coordinates():
    path = [[torch.tensor([a, b, 0.0])] for a, b in ((3.0, 1.0), (1.0, -1.0), (0.0, 0.0))]
    found = path_directions(path)
    weights = path[-1][0].clone()
    surface = loss_surface(
        lambda: {"far": (weights - path[0][0]).norm()}, [weights], found.directions, radius=0.5
    )
    x, y = found.coordinates[0].tolist()
    for i, a in enumerate(surface.axes[0]):
        for j, b in enumerate(surface.axes[1]):
            wanted = ((a - x) ** 2 + (b - y) ** 2) ** 0.5
            assert float(surface.values["far"][i, j]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_values_are_those_of_moved_parameters(model, count):
    directions, before = model.directions(count), bits(model.parameters)
    plain = {n: float(v.detach()) for n, v in model.losses().items()}
    surface = loss_surface(model.losses, model.parameters, directions, radius=0.7, points=5)
    assert bits(model.parameters) == before
    assert surface.axes[0] == pytest.approx((-0.7, -0.35, 0, 0.35, 0.7))
    assert not surface.missing()
    moved = Model()
    for place in [(0,) * count, (4,) * count, (1, 3)[:count]]:
        with torch.no_grad():
            for k, parameter in enumerate(moved.parameters):
                steps = [surface.axes[d][i] * directions[d][k] for d, i in enumerate(place)]
                parameter.copy_(model.parameters[k] + sum(steps))
            for name, value in moved.losses().items():
                assert float(surface.values[name][place]) == pytest.approx(float(value), rel=1e-5)
    for name, value in plain.items():
        assert float(surface.values[name][(2,) * count]) == value


def test_parameters_are_put_back_after_an_error(model):
    with torch.no_grad():
        model.parameters[1][:2] = torch.tensor([-0.0, float("nan")])
    before, requires = bits(model.parameters), [p.requires_grad for p in model.parameters]

    def failing():
        assert bits(model.parameters) != before
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        loss_surface(failing, model.parameters, model.directions())
    assert bits(model.parameters) == before
    assert [p.requires_grad for p in model.parameters] == requires
    assert torch.is_grad_enabled()


def test_an_interrupted_surface_goes_on_where_it_was(model, tmp_path):
    directions, file = model.directions(), tmp_path / "surface.json"
    whole = loss_surface(model.losses, model.parameters, directions, points=5)
    assert model.calls == 25

    def stop(surface):
        surface.save(file)
        if len(surface.missing()) == 25 - 7:
            raise KeyboardInterrupt

    before = bits(model.parameters)
    with pytest.raises(KeyboardInterrupt):
        loss_surface(model.losses, model.parameters, directions, points=5, on_point=stop)
    assert bits(model.parameters) == before
    part = Surface.load(file)
    assert [int(v.isnan().sum()) for v in part.values.values()] == [18, 18]
    for done in (part, part.to_dict(), json.loads(file.read_text())):
        model.calls = 0
        again = loss_surface(model.losses, model.parameters, directions, points=5, done=done)
        assert model.calls == 18
        assert again.axes == whole.axes
        assert all(torch.equal(again.values[n], v) for n, v in whole.values.items())
    assert len(part.missing()) == 18
    model.calls = 0
    loss_surface(model.losses, model.parameters, directions, points=5, done=whole)
    assert model.calls == 0


def test_a_surface_of_another_grid_or_other_terms_is_not_gone_on_with(model):
    line = model.directions(1)
    done = loss_surface(model.losses, model.parameters, line, points=3)
    with pytest.raises(UsageError, match="same grid"):
        loss_surface(model.losses, model.parameters, line, points=5, done=done)
    with pytest.raises(UsageError, match="same grid"):
        loss_surface(model.losses, model.parameters, line, points=3, radius=2.0, done=done)
    done.values["entropy"][0] = done.values["size"][0] = float("nan")
    with pytest.raises(UsageError, match="terms"):
        loss_surface(lambda: {"kl": X.mean()}, model.parameters, line, points=3, done=done)


def test_files_keep_every_value(tmp_path):
    values = {"kl": torch.rand(3, 5, dtype=torch.float64) / 3}
    values["kl"][0, 1], values["kl"][2, 2] = float("inf"), float("nan")
    surface = Surface(((-0.1, 0.0, 0.1), (-2.0, -1.0, 0.0, 1.0, 2.0)), values)
    surface.save(tmp_path / "surface.json")
    again = Surface.load(tmp_path / "surface.json")
    assert again.axes == surface.axes
    torch.testing.assert_close(again.values, values, rtol=0, atol=0, equal_nan=True)
    assert again.missing() == [(2, 2)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "{}",
        lambda text: text.replace("0.25", '"much"'),
        lambda text: text.replace("[0.25, ", "["),
        lambda text: text.replace('"axes": [[', '"axes": [[9.0, '),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage):
    file = tmp_path / "surface.json"
    Surface(((-1.0, 0.0, 1.0),), {"kl": torch.tensor([0.25, 0.5, 0.75]).double()}).save(file)
    assert len(Surface.load(file).values["kl"]) == 3
    file.write_text(damage(file.read_text()))
    with pytest.raises(UsageError, match=r"surface\.json"):
        Surface.load(file)
    with pytest.raises(UsageError, match="nowhere"):
        Surface.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize("count", [1, 2])
def test_figures_have_a_panel_per_term_also_of_unfinished_surfaces(model, count):
    figures = []
    surface = loss_surface(
        model.losses, model.parameters, model.directions(count), points=5,
        on_point=lambda part: figures.append(part.plot(torch.zeros(3, 2))),
    )  # fmt: skip
    figures += [surface.plot(), Surface(surface.axes, {}).plot()]
    for figure in figures:
        figure.savefig(io.BytesIO(), format="png")
    titles = [axes.get_title() for axes in figures[-2].axes]
    assert [t for t in titles if t] == ["size", "entropy"]


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_flat_or_empty_plane_has_no_colour_bar(value):
    axes = ((-1.0, 0.0, 1.0),) * 2
    figure = Surface(axes, {"kl": torch.full((3, 3), value).double()}).plot()
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.axes) == 1


@pytest.mark.parametrize(
    "settings",
    [{"points": 4}, {"points": 1}, {"radius": 0.0}, {"radius": float("nan")}, {"count": 3}],
)
def test_settings_out_of_range_are_refused(model, settings):
    directions = model.directions(settings.pop("count", 1))
    with pytest.raises(UsageError, match="odd number"):
        loss_surface(model.losses, model.parameters, directions, **settings)
