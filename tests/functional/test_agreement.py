# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional

from zsq.functional.agreement import gradient_cosines


def losses():
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    x = torch.randn(7, 3)
    y = x @ a.T @ b.T
    return {"ce": functional.cross_entropy(y, torch.arange(7) % 5), "l2": y.square().mean(),
            "l1": y.abs().mean()}, {"a": a, "b": b}  # fmt: skip


def test_cosines_are_those_of_the_flattened_gradients():
    terms, parameters = losses()
    found = gradient_cosines(terms, parameters)
    assert set(found) == {"ce,l2", "ce,l1", "l2,l1"}
    gradients = {}
    for name, loss in terms.items():
        loss.backward(retain_graph=True)
        gradients[name] = {k: p.grad.flatten().clone() for k, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
    for key, values in found.items():
        one, two = (gradients[name] for name in key.split(","))
        for name in ("a", "b"):
            expected = functional.cosine_similarity(one[name], two[name], dim=0)
            assert values[name] == pytest.approx(expected.item(), abs=1e-5)
        whole = functional.cosine_similarity(
            torch.cat([*one.values()]), torch.cat([*two.values()]), dim=0
        )
        assert values["overall"] == pytest.approx(whole.item(), abs=1e-5)


def test_gradients_of_parameters_are_left_alone():
    terms, parameters = losses()
    gradient_cosines(terms, parameters)
    assert all(p.grad is None for p in parameters.values())


def test_a_loss_and_its_negative_are_opposed_and_an_unused_parameter_has_none():
    terms, parameters = losses()
    unused = torch.zeros(2, requires_grad=True)
    found = gradient_cosines({"x": terms["ce"], "y": -terms["ce"]}, parameters | {"c": unused})
    assert found["x,y"]["overall"] == pytest.approx(-1, abs=1e-5)
    assert found["x,y"]["c"] == 0


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e12])
def test_cosines_do_not_depend_on_the_gradients_size(scale):
    """Squares of such numbers, multiplied, are beyond float32."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, generator=generator)
    w = torch.zeros(50, requires_grad=True)
    found = gradient_cosines({"a": (w * a * scale).sum(), "b": (w * b * scale).sum()}, {"w": w})
    expected = torch.cosine_similarity(a.double(), b.double(), dim=0).item()
    assert found["a,b"]["w"] == pytest.approx(expected, rel=1e-5)
