# SPDX-License-Identifier: Apache-2.0
"""Gradient inundation against torch's SGD and against the published search."""

import pytest
import torch

from zsq.functional.affine import quant_max, quantize
from zsq.functional.crossing import crossing_multipliers
from zsq.quantizers.minmax import MinMaxWeight, minmax_grid
from zsq.quantizers.weight import round_to_nearest
from zsq.runtime.policy import Compiled
from zsq.tuning.inundation import InundatedSGD, search_multiplier

SHAPES = [(16, 8, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3), (10, 64)]


def weights(bits=4, seed=0):
    torch.manual_seed(seed)
    return {f"layer{i}": MinMaxWeight(torch.randn(shape), bits) for i, shape in enumerate(SHAPES)}


def give_gradients(found, seed, size=1e-2):
    generator = torch.Generator().manual_seed(seed)
    for weight in found.values():
        weight.master.grad = size * torch.randn(weight.master.shape, generator=generator) ** 3


def codes_of(found):
    return {name: weight.codes().int() for name, weight in found.items()}


@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_a_target_it_is_sgd(decay, momentum):
    ours, theirs = weights(), weights()
    rule = InundatedSGD(ours, momentum=momentum, weight_decay=decay)
    reference = torch.optim.SGD([w.master for w in theirs.values()], lr=0.1, momentum=momentum,
                                nesterov=momentum > 0, weight_decay=decay)  # fmt: skip
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        rule.step(0.1)
        reference.step()
    for name in ours:
        assert torch.allclose(ours[name].master, theirs[name].master, rtol=1e-6, atol=1e-7)


def test_the_buffers_keep_raw_gradients():
    found = weights()
    rule = InundatedSGD(found)
    give_gradients(found, 0)
    gradients = [w.master.grad.clone() for w in found.values()]
    rule.step(1e-4, target=1e-2)
    assert all(torch.equal(b, g) for b, g in zip(rule.buffers, gradients, strict=True))


@pytest.mark.parametrize("target", [1e-4, 1e-3, 1e-2])
def test_every_layer_reaches_the_target_on_the_old_grid(target):
    found = weights()
    rule = InundatedSGD(found)
    for step in range(3):
        give_gradients(found, step)
        before = {n: (w.codes().int(), *w.grid()) for n, w in found.items()}
        rule.step(1e-5, target=target)
        for i, (name, weight) in enumerate(found.items()):
            codes, scale, zero = before[name]
            after = quantize(weight.master.detach(), scale, zero, quant_max(4)).int()
            changed = float((after != codes).float().mean())
            assert changed >= target
            assert changed == pytest.approx(float(rule.shares[i]), abs=1.5 / codes.numel())
            assert changed <= target + 1.5 / codes.numel()
    assert (rule.multipliers > 1).all()


def test_the_step_does_not_depend_on_the_rate():
    moved = []
    for rate in (1e-6, 1e-5):
        found = weights()
        give_gradients(found, 0)
        InundatedSGD(found).step(rate, target=1e-3)
        moved.append(torch.cat([w.master.detach().flatten() for w in found.values()]))
    assert torch.allclose(*moved, rtol=1e-5, atol=1e-6)


def test_steps_that_cross_enough_are_left_alone():
    found, plain = weights(), weights()
    for each in (found, plain):
        give_gradients(each, 0, size=1.0)
    rule = InundatedSGD(found)
    rule.step(1.0, target=1e-3)
    InundatedSGD(plain).step(1.0)
    assert (rule.multipliers == 1).all()
    assert (rule.shares > 1e-3).all()
    assert all(torch.equal(found[n].master, plain[n].master) for n in found)


@pytest.mark.parametrize("grid", ["frozen", "moving"])
@pytest.mark.parametrize("gradient", [0.0, None])
def test_no_gradient_moves_nothing(grid, gradient):
    found = weights()
    for weight in found.values():
        weight.master.grad = None if gradient is None else torch.zeros_like(weight.master)
    before = [w.master.detach().clone() for w in found.values()]
    rule = InundatedSGD(found, grid=grid)
    rule.step(1e-4, target=1e-3)
    assert all(torch.equal(w.master, b) for w, b in zip(found.values(), before, strict=True))
    assert rule.multipliers.tolist() == [1.0] * 4
    assert rule.shares.tolist() == [0.0] * 4


def test_saturated_integers_are_passed_over():
    weight = MinMaxWeight(torch.tensor([[0.0, 1.0, 0.6, 0.3]]), 2)
    weight.master.grad = torch.tensor([[1.0, -1.0, 0.0, 0.0]])  # both extremes move outwards
    before = weight.codes()
    rule = InundatedSGD({"layer": weight}, momentum=0.0)
    rule.step(1e-3, target=0.5)
    assert rule.multipliers.tolist() == [1.0]
    assert weight.master.isfinite().all()
    assert torch.equal(weight.codes(), before)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("target", [1e-3, 1e-2])
def test_the_closed_form_agrees_with_the_published_search(bits, target):
    torch.manual_seed(bits)
    weight = MinMaxWeight(torch.randn(64, 64, 3, 3), bits)
    weight.master.grad = 1e-3 * torch.randn(64, 64, 3, 3)
    master, grid = weight.master.detach().clone(), weight.grid()
    direction = weight.master.grad * 1e-4
    start = weight.codes().int()

    def share(a):
        moved = quantize(master - a * direction, *grid, quant_max(bits)).int()
        return float((moved != start).float().mean())

    published = search_multiplier(share, target, 2.0**30)
    rule = InundatedSGD({"layer": weight}, momentum=0.0)
    rule.step(1e-4, target=target, cap=2.0**30)
    assert float(rule.multipliers[0]) == pytest.approx(published, rel=0.1)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_closed_form_agrees_with_the_published_search_on_its_moving_grid(bits, spread):
    """About, on layers above 5,000 weights: extremes move the grid, and with it other codes.

    With ``spread`` gradients of unequal size, as they are in training. The search ends within 3 %.
    """
    multipliers = {}
    for grid in ("frozen", "moving"):
        torch.manual_seed(10 * bits)
        found = {str(i): MinMaxWeight(torch.randn(64, 64, 3, 3), bits) for i in range(4)}
        for weight in found.values():
            sizes = torch.exp(spread * torch.randn_like(weight.master))
            weight.master.grad = 1e-3 * torch.randn_like(weight.master) * sizes
        rule = InundatedSGD(found, momentum=0.0, grid=grid, guarantee=False)
        rule.step(1e-4, target=1e-3, cap=2.0**30)
        multipliers[grid] = rule.multipliers.tolist()
    ratios = [ours / theirs for ours, theirs in zip(*multipliers.values(), strict=True)]
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)
    assert ratios == pytest.approx([1] * 4, abs=0.25)
    assert min(multipliers["frozen"]) > 1


def test_a_moving_grid_is_searched_and_guaranteed():
    for guarantee in (False, True):
        found = weights()
        give_gradients(found, 0)
        before, directions = codes_of(found), {n: w.master.grad * 1.9e-4 for n, w in found.items()}
        masters = {n: w.master.detach().clone() for n, w in found.items()}
        rule = InundatedSGD(found, grid="moving", guarantee=guarantee)
        rule.step(1e-4, target=1e-2)
        changed = {n: float((codes_of(found)[n] != before[n]).float().mean()) for n in found}
        assert list(changed.values()) == pytest.approx(rule.shares.tolist(), abs=1e-6)
        if guarantee:
            assert min(changed.values()) >= 1e-2
        for i, name in enumerate(found):
            moved = masters[name] - rule.multipliers[i] * directions[name]
            assert torch.allclose(moved, found[name].master, atol=1e-6)


def test_the_published_search_step_by_step():
    assert search_multiplier(lambda a: a / 1000, 1e-3, 1e9) == 1.0
    tried = []

    def share(a):
        tried.append(a)
        return a / 1000

    assert search_multiplier(share, 0.0111, 1e9) == 11.0, "near enough, though below the target"
    assert tried == [1.0, 2.0, 4.0, 8.0, 16.0, 12.0, 10.0, 11.0]
    assert search_multiplier(lambda a: 0.0, 1e-3, 128.0) == 126.0, "the cap's effective maximum"
    assert search_multiplier(lambda a: a / 1000, 0.0114, 1e9) == pytest.approx(11.375, abs=0.13)
    assert search_multiplier(lambda a: a / 1000, 0.0111, 1e9, guarantee=True) / 1000 >= 0.0111


def test_momentum_survives_a_checkpoint():
    found, again = weights(), weights()
    rules = [InundatedSGD(found), InundatedSGD(again)]
    give_gradients(found, 0)
    rules[0].step(1e-3)
    state = {k: v.clone() for k, v in rules[0].state_dict().items()}
    rules[1].load_state_dict(state)
    for name in found:
        again[name].master.data.copy_(found[name].master)
    for each, rule in zip((found, again), rules, strict=True):
        give_gradients(each, 1)
        rule.step(1e-3, target=1e-3)
    assert all(torch.equal(found[n].master, again[n].master) for n in found)


def test_a_plain_step_can_be_measured():
    found = weights()
    give_gradients(found, 0, size=1.0)
    before = {n: (w.codes().int(), *w.grid()) for n, w in found.items()}
    rule = InundatedSGD(found)
    rule.step(0.1, measure=True)
    for i, (name, weight) in enumerate(found.items()):
        codes, scale, zero = before[name]
        after = quantize(weight.master.detach(), scale, zero, quant_max(4)).int()
        assert float((after != codes).float().mean()) == pytest.approx(
            float(rule.shares[i]), abs=2e-3
        )
    assert rule.multipliers.tolist() == [1.0] * 4


def test_the_layout_in_memory_changes_nothing():
    found, again = weights(), weights()
    for weight in again.values():
        if weight.master.ndim == 4:
            weight.master.data = weight.master.data.contiguous(memory_format=torch.channels_last)
    assert not again["layer0"].master.is_contiguous()
    rules = [InundatedSGD(found), InundatedSGD(again)]
    for each, rule in zip((found, again), rules, strict=True):
        give_gradients(each, 0)  # of the other layout, for one of the two
        rule.step(1e-3, target=1e-2)
    assert torch.equal(rules[0].multipliers, rules[1].multipliers)
    assert all(torch.equal(found[n].master, again[n].master) for n in found)


def test_measuring_changes_no_step():
    found, again = weights(), weights()
    rules = [InundatedSGD(found), InundatedSGD(again)]
    for (each, rule), measure in zip(
        zip((found, again), rules, strict=True), (True, False), strict=True
    ):
        give_gradients(each, 0)
        rule.step(1e-4, target=1e-2, measure=measure)
    assert all(torch.equal(found[n].master, again[n].master) for n in found)
    assert (rules[0].shares >= 1e-2).all()
    assert not rules[1].shares.any()


def test_a_compiled_rule_takes_the_same_step():
    found, again = weights(), weights()
    notes = []
    compiled = Compiled(crossing_multipliers, enabled=True, note=notes.append, dynamic=True)
    rules = [InundatedSGD(found), InundatedSGD(again, crossings=compiled)]
    for step in range(2):
        for each, rule in zip((found, again), rules, strict=True):
            give_gradients(each, step)
            rule.step(1e-4, target=1e-2)
    assert notes == []
    assert torch.allclose(rules[0].multipliers, rules[1].multipliers, rtol=1e-5)
    assert (rules[1].shares >= 1e-2).all()
    for name in found:
        assert torch.allclose(found[name].master, again[name].master, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("guarantee", [True, False])
@pytest.mark.parametrize("cap", [1.0, 1.5, 3.0, 100.0])
def test_the_published_search_keeps_between_one_and_its_cap(cap, guarantee):
    found = search_multiplier(lambda a: 0.0, 0.5, cap, guarantee=guarantee)
    assert 1 <= found <= cap


def test_the_grid_of_a_group_is_each_layers_own():
    found = weights()
    scale, _ = minmax_grid(torch.cat([found["layer0"].master, found["layer1"].master]), 4)
    own = torch.cat([found["layer0"].scale, found["layer1"].scale])
    assert torch.equal(scale, own)


def test_on_a_grid_that_stands_still_both_counts_are_one():
    """What is counted before the step is what changes, and the published search finds the same."""
    torch.manual_seed(0)
    shares = {}
    for grid in ("frozen", "moving"):
        layers = {name: MinMaxWeight(torch.randn(64, 32, 3, 3), 3) for name in ("a", "b")}
        for number, layer in enumerate(layers.values()):
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                layer.master.copy_(torch.randn(64, 32, 3, 3, generator=generator))
            tuned = round_to_nearest(layer.master.detach(), 3)
            layer.go_on_from(tuned)
            layer.master.grad = torch.randn(64, 32, 3, 3, generator=generator) * 1e-3
        before = {name: layer.codes() for name, layer in layers.items()}
        rule = InundatedSGD(layers, grid=grid)
        rule.step(1e-3, target=1e-2)
        shares[grid] = [
            float((layer.codes() != before[name]).float().mean()) for name, layer in layers.items()
        ]
        assert shares[grid] == pytest.approx(rule.shares.tolist())
        assert min(shares[grid]) >= 1e-2
    assert shares["moving"] == pytest.approx(shares["frozen"], rel=0.1)
