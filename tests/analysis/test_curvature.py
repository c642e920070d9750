# SPDX-License-Identifier: Apache-2.0
"""Traces and eigenvalues against whole Hessians, also through the rounding of a student."""

import io
import json
import weakref

import pytest
import torch
from helpers.networks import Residual, smooth_images, with_own_statistics
from torch import nn
from torch.autograd.functional import hessian as whole_hessian

from zsq.analysis.curvature import curvature, hessian_trace, top_eigenvalues
from zsq.analysis.hessian import Hessian
from zsq.config import load_recipe
from zsq.errors import RunError, UsageError
from zsq.quantizers.minmax import MinMaxWeight, TrackedActivation
from zsq.runtime.context import Context
from zsq.runtime.seeds import seeded
from zsq.student import attach
from zsq.synthesis.batches import Batch
from zsq.teacher.teacher import load_teacher
from zsq.tuning.objective import Objective


def from_flat(flat, shapes):
    """Cut a vector into tensors of the given shapes."""
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class Net:
    """Two layers, their loss, and its whole Hessian by torch."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(24, 3, generator=generator)
        self.y = torch.randint(0, 3, (24,), generator=generator)
        shapes = [(5, 3), (5,), (3, 5)]
        self.parameters = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]

    def loss_of(self, w, b, v):
        return nn.functional.cross_entropy((self.x @ w.T + b).tanh() @ v.T, self.y)

    def loss(self):
        return self.loss_of(*self.parameters)

    def hessian(self):
        shapes = [p.shape for p in self.parameters]
        flat = torch.cat([p.detach().flatten() for p in self.parameters]).double()
        self.x = self.x.double()
        found = whole_hessian(lambda f: self.loss_of(*from_flat(f, shapes)), flat)
        self.x = self.x.float()
        return found


def test_products_and_traces_are_those_of_the_whole_hessian():
    net = Net()
    wanted = net.hessian()
    product = Hessian(net.loss, net.parameters)
    columns = torch.stack([product(row) for row in torch.eye(35)])
    torch.testing.assert_close(columns.double(), wanted, atol=1e-6, rtol=1e-4)
    with seeded(0, "probes"):
        found = hessian_trace(net.loss, net.parameters, probes=400)
    assert abs(found.value - float(wanted.trace())) < 3 * found.stderr
    # of random signs the variance is known: twice the squares beside the diagonal
    spread = float((2 * (wanted - wanted.diag().diag()).square().sum() / 400).sqrt())
    assert found.stderr == pytest.approx(spread, rel=0.2)


def test_the_trace_of_a_diagonal_hessian_is_exact():
    x = torch.randn(64).requires_grad_()
    powers = 2.0 ** torch.randint(-3, 4, (64,))
    found = hessian_trace(lambda: (powers * x.square()).sum() / 2, [x], probes=3)
    assert (found.value, found.stderr) == (float(powers.sum()), 0.0)


def test_eigenvalues_are_the_largest_ones_of_the_whole_hessian():
    net = Net()
    wanted = torch.linalg.eigvalsh(net.hessian()).flip(0)[:4]
    with seeded(0, "start"):
        found = top_eigenvalues(net.loss, net.parameters, count=4, steps=35)
    assert found.values == pytest.approx(wanted.tolist(), rel=1e-3)
    assert list(found.values) == sorted(found.values, reverse=True)


def test_residuals_bound_the_error_of_few_steps():
    net = Net()
    everything = torch.linalg.eigvalsh(net.hessian())
    with seeded(0, "start"):
        found = top_eigenvalues(net.loss, net.parameters, count=2, steps=6)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert float((everything - value).abs().min()) <= residual + 1e-6
    assert found.residuals[1] > 1e-4


def test_algebraically_largest_and_repeated_eigenvalues():
    x = torch.zeros(40).requires_grad_()
    slopes = torch.tensor([3.0] * 3 + [1.0] * 36 + [-50.0])
    found = top_eigenvalues(lambda: (slopes * x.square()).sum() / 2, [x], count=4, steps=12)
    assert found.values == pytest.approx([3.0, 3.0, 3.0, 1.0], rel=1e-4)
    zero = top_eigenvalues(lambda: x.sum(), [x], count=2, steps=4)
    assert zero.values == (0.0, 0.0)


def test_nothing_is_left_behind():
    net = Net()
    marks = [torch.randn_like(p) for p in net.parameters]
    for parameter, mark in zip(net.parameters, marks, strict=True):
        parameter.grad = mark
    before = [p.detach().clone() for p in net.parameters]
    kept = []

    def loss():
        assert all(reference() is None for reference in kept)  # one graph at a time
        last = net.parameters[2] * 1  # the graph holds it: the gradient of the layer below needs it
        kept.append(weakref.ref(last))
        return net.loss_of(*net.parameters[:2], last)

    with torch.no_grad():  # what the caller has switched off does not matter
        curvature({"loss": loss, "again": loss}, net.parameters, probes=2, steps=3)
    assert len(kept) == 2  # computed once each
    assert all(reference() is None for reference in kept)
    for parameter, mark, value in zip(net.parameters, marks, before, strict=True):
        assert parameter.grad is mark
        assert torch.equal(parameter, value)


def detour(x, scale, zero_point, high, low=0, rounding=None, *, stop=False):
    """Straight-through rounding without a function of its own: x plus a constant."""
    shape = (-1, *[1] * (x.dim() - 1)) if scale.dim() else ()
    scale, zero_point = scale.detach().view(shape), zero_point.detach().view(shape)
    whole = (x.detach() / scale).round() + zero_point
    codes = whole.clamp(low, high)
    if stop:
        x = torch.where(codes == whole, x, x.detach())
    return x + ((codes - zero_point) * scale - x.detach())


def test_the_hessian_of_a_student_is_that_at_its_rounded_weights():
    net = Net()
    first, second = (MinMaxWeight(net.parameters[i], 3) for i in (0, 2))
    bias = net.parameters[1]
    quantizer = TrackedActivation(3)
    quantizer.track(net.x)
    quantizer.enabled = True
    masters = [first.master, bias, second.master]
    x, rounded = net.x, [first().detach(), bias, second().detach()]
    assert not torch.equal(first(), first.master)

    def loss():
        hidden = (quantizer(x) @ first().T + bias).tanh()
        return nn.functional.cross_entropy(hidden @ second().T, net.y)

    product = Hessian(loss, masters)
    found = torch.stack([product(row) for row in torch.eye(35)])
    net.x, net.parameters = quantizer(x).detach(), rounded
    torch.testing.assert_close(found.double(), net.hessian(), atol=1e-6, rtol=1e-4)


def test_curvature_of_the_terms_of_a_students_objective(monkeypatch):
    torch.manual_seed(0)
    teacher = load_teacher(with_own_statistics(Residual()), input_shape=(3, 8, 8))
    recipe = load_recipe("hast", bits="w3a3", settings=["tuning.losses.ce=1"])
    student = attach(teacher, recipe)
    for quantizer in student.quantizers().values():
        quantizer.enabled = quantizer.tracking = True
    student(smooth_images(16, seed=3))
    for quantizer in student.quantizers().values():
        quantizer.tracking = False
    masters = [layer.weight.master for layer in student.layers().values()]
    objective = Objective(teacher, student, recipe.tuning, Context())
    images = smooth_images(8, seed=5)
    lesson = objective.lesson(Batch(images, None, torch.ones(8, 5) / 5))

    terms = {n: lambda n=n: objective(images, lesson)[1][n] for n in objective.names}
    assert set(terms) == {"kl", "ce", "alignment"}
    chosen = masters[-2:]
    with seeded(0, "curvature"):
        found = curvature(terms, chosen, probes=8, count=2, steps=40)
    assert found.parameters == sum(p.numel() for p in chosen)
    columns = {n: Hessian(loss, chosen) for n, loss in terms.items()}

    # the same student, rounded straight through in another way
    monkeypatch.setattr("zsq.quantizers.minmax.straight_through", detour)
    for name, product in columns.items():
        reference, vector = Hessian(terms[name], chosen), torch.randn(found.parameters)
        wanted = reference(vector)
        assert float(wanted.norm()) > 0
        torch.testing.assert_close(
            product(vector), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max()
        )
        whole = torch.stack([reference(row) for row in torch.eye(found.parameters)])
        trace, top = found.traces[name], torch.linalg.eigvalsh(whole).flip(0)[:2]
        assert abs(trace.value - float(whole.trace())) < 5 * trace.stderr + 1e-3
        assert found.spectra[name].values == pytest.approx(top.tolist(), rel=1e-3)


def test_results_are_plain_data_and_a_figure():
    net = Net()
    found = curvature(
        {"first": net.loss, "second": lambda: 2 * net.loss()}, net.parameters, count=2
    )
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["parameters"] == 35
    assert data["terms"]["first"]["trace"]["probes"] == 16
    assert data["terms"]["second"]["spectrum"]["values"] == list(found.spectra["second"].values)
    figure = found.plot()
    figure.savefig(io.BytesIO(), format="png")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["first", "second"]
    assert len(right.containers) == 2


@pytest.mark.parametrize(
    ("loss", "parameters", "message"),
    [
        (lambda x: x.square(), lambda x: [x], "scalar"),
        (lambda x: x.detach().sum(), lambda x: [x], "requires_grad=False"),
        (lambda x: x.sum(), lambda x: [torch.ones(2)], "do not require gradients"),
        (lambda x: x.sum(), lambda x: [], "there are none"),
        (lambda x: x.sum(), lambda x: [torch.ones(2).requires_grad_()], "depends on none"),
    ],
)
def test_what_has_no_curvature_is_refused(loss, parameters, message):
    x = torch.ones(2).requires_grad_()
    with pytest.raises(UsageError, match=message):
        hessian_trace(lambda: loss(x), parameters(x))


def test_settings_out_of_range_and_infinite_curvature():
    x = torch.zeros(2).requires_grad_()
    with pytest.raises(UsageError, match="probes"):
        hessian_trace(lambda: x.square().sum(), [x], probes=1)
    for count in (0, 3):
        with pytest.raises(UsageError, match="count"):
            top_eigenvalues(lambda: x.square().sum(), [x], count=count)
    with pytest.raises(RunError, match="root"):
        curvature({"root": lambda: x.sqrt().sum()}, [x])
