# SPDX-License-Identifier: Apache-2.0
"""Sensitivity, budgets, and the bits file, on a small network."""

import copy

import pytest
import torch
from helpers.students import labelled_images, teacher_of
from torch import nn

from zsq.bits.choose import choose_bits
from zsq.bits.costs import Budget, LayerFacts, cost_of, shown_cost
from zsq.bits.latency import measure_latency
from zsq.bits.layers import layer_facts
from zsq.bits.plan import BitsPlan, make_plan, read_plan
from zsq.bits.plots import write_plan
from zsq.bits.sensitivity import measure_sensitivity
from zsq.config import load_recipe
from zsq.errors import UsageError
from zsq.quantizers.minmax import MinMaxWeight
from zsq.runtime.context import Context
from zsq.stages import tune
from zsq.student import attach
from zsq.tables import bits_tables
from zsq.teacher.teacher import Teacher


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


@pytest.fixture(scope="module")
def images(teacher):
    return labelled_images(teacher, 32)


def planned(plan, teacher, recipe, **changes):
    """Return a recipe with a plan put into effect, as a run does."""
    resolved = load_recipe(recipe, bits=plan.widths(), **changes)
    return load_recipe(resolved, overrides=plan.overrides(teacher, resolved))


INNER = ("a1", "a2", "proj", "b1", "b2")


def test_sensitivity_is_the_divergence_with_one_layer_rounded(teacher, images):
    found = measure_sensitivity(
        teacher.network, images.images, ["a1", "fc"], [2, 5], load_recipe("zeroq").tuning, Context()
    )
    for path in ("a1", "fc"):
        for bits in (2, 5):
            network = copy.deepcopy(teacher.network)
            layer = network.get_submodule(path)
            layer.weight = nn.Parameter(MinMaxWeight(layer.weight, bits)().detach())
            with torch.no_grad():
                p = teacher(images.images).softmax(1)
                q = network(images.images).softmax(1)
            expected = float((p * (p / q).log()).sum(1).mean())
            assert found[path][bits] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_measuring_changes_nothing(teacher, images):
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    choose_bits(teacher, "4.0", images=images)
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())


def test_the_protocol_fixes_the_edges(teacher, images):
    plan = choose_bits(teacher, "4.0", "genie", bits="w4a4", images=images)
    assert plan.free == INNER
    assert plan.layers["stem"] == plan.layers["fc"] == 8
    assert plan.average() <= 4.0
    everywhere = choose_bits(teacher, "4.0", "gdfq", bits="w4a4", images=images)
    assert everywhere.free == ("stem", *INNER, "fc")


def test_a_choice_is_no_more_sensitive_than_uniform_bits(teacher, images):
    plan = choose_bits(teacher, "4.0", images=images)
    assert plan.sensitivity <= sum(values[4] for values in plan.measured.values()) + 1e-9


def test_a_size_counts_all_weights(teacher, images):
    facts = layer_facts(teacher, load_recipe("genie"))[0]
    fixed = facts["stem"].weights + facts["fc"].weights
    free = sum(facts[path].weights for path in INNER)
    budget = fixed + 0.75 * free
    plan = choose_bits(teacher, f"{budget / 1e3}kB", images=images)
    assert fixed + free / 2 < plan.onnx_bytes() <= budget
    assert plan.bytes() <= plan.onnx_bytes() == plan.to_dict()["onnx_bytes"]
    with pytest.raises(UsageError, match="smallest possible"):
        choose_bits(teacher, f"{(fixed + 0.4 * free) / 1e3}kB", images=images)


@pytest.mark.parametrize(
    ("budget", "label"),
    [("3.5", "average bits per weight, free layers"), ("4kB", "MB of weights in the ONNX file"),
     ("0.005GBOP", "GBOP an image")],
)  # fmt: skip
def test_costs_are_in_the_budgets_unit_with_fixed_layers(teacher, images, budget, label):
    plan = choose_bits(teacher, budget, "genie", images=images)
    facts = layer_facts(teacher, load_recipe("genie"))[0]
    whole = {
        "average": plan.average(), "size": plan.onnx_bytes(),
        "bops": sum(cost_of(facts[path], bits, "bops") for path, bits in plan.layers.items()),
    }[plan.kind]  # fmt: skip
    assert plan.cost == pytest.approx(whole)
    assert plan.cost <= Budget.parse(budget).amount
    assert plan.cost in [pytest.approx(point.cost) for point in plan.frontier]
    axes = plan.plot().axes[0]
    assert axes.get_xlabel() == label
    chosen = axes.get_lines()[-1].get_xdata()[0]
    assert chosen == pytest.approx(shown_cost(plan.kind, whole))
    table = next(iter(bits_tables(plan)))
    assert table.columns[0].header == label
    first = shown_cost(plan.kind, plan.frontier[0].cost)
    assert next(iter(table.columns[0].cells)) == f"{first:.6g}"


def test_widths_that_are_stored_alike_give_the_widest(teacher, images):
    facts = layer_facts(teacher, load_recipe("genie"))[0]
    flat = {path: dict.fromkeys((2, 3, 4, 8), 0.5) for path in INNER}
    plan = make_plan(teacher, load_recipe("genie"), Budget("size", 1e6), flat, facts)
    assert {plan.layers[path] for path in INNER} == {4}, "8 bits would cost more for nothing"
    plan = choose_bits(teacher, "1MB", images=images, candidates=[2, 3, 4])
    assert {plan.layers[path] for path in INNER} == {4}


def test_bit_operations_count_both_operands(teacher):
    facts = layer_facts(teacher, load_recipe("genie", bits="w4a3"))[0]
    assert facts["stem"].input_bits == 32
    assert facts["a1"].input_bits == 8
    assert facts["a2"].input_bits == 3
    assert facts["fc"].input_bits == 8
    assert facts["b1"].macs == 6 * 6 * 9 * 16
    assert cost_of(facts["b1"], 5, "bops") == 6 * 6 * 9 * 16 * 5 * facts["b1"].input_bits


def test_a_budget_in_operations_favours_layers_with_few(teacher, images):
    plan = choose_bits(teacher, "1GBOP", images=images, candidates=[2, 8])
    assert set(plan.layers.values()) == {8}


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [("4", "average", 4), ("3.5", "average", 3.5), ("900kB", "size", 9e5), ("1.7 MB", "size", 1.7e6),
     ("2GBOP", "bops", 2e9), ("2GBOPs", "bops", 2e9), ("1.3ms", "latency", 1.3)],
)  # fmt: skip
def test_budgets_are_read_as_people_write_them(text, kind, amount):
    assert Budget.parse(text) == Budget(kind, pytest.approx(amount))


@pytest.mark.parametrize("text", ["", "many", "-4", "0", "4 apples", "MB"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UsageError, match=r"4\.0.*1\.7MB"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("budget", "smallest"), [("1.9", "2 bits per weight"), ("0.1kB", "MB"), ("1e3MBOP", None)]
)
def test_a_budget_that_nothing_meets_says_the_smallest_possible(teacher, images, budget, smallest):
    if smallest is None:
        choose_bits(teacher, budget, images=images)
        return
    with pytest.raises(UsageError, match=f"smallest possible is .*{smallest}"):
        choose_bits(teacher, budget, images=images)


def test_latency_must_be_measured_first():
    with pytest.raises(UsageError, match="milliseconds"):
        cost_of(LayerFacts(1, 1, 8), 4, "latency")
    assert cost_of(LayerFacts(1, 1, 8, {4: 0.5}), 4, "latency") == 0.5


def test_latency_is_read_off_the_runtimes_profile(teacher, images):
    plan = choose_bits(teacher, "50ms", images=images, candidates=[4, 8])
    assert plan.kind == "latency"
    assert 0 < plan.cost < 50
    assert set(plan.layers.values()) == {8}, "in ONNX Runtime fewer bits are no faster"
    with pytest.raises(UsageError, match=r"smallest possible is .*ms"):
        choose_bits(teacher, "0.0001ms", images=images, candidates=[4, 8])


def test_latencies_add_up_to_a_run_without_the_profiler(teacher, images, monkeypatch):
    monkeypatch.setattr("zsq.bits.latency._whole", lambda file, image: 7.0)
    eight = {"match": "b2", "activations": 8}
    recipe = load_recipe("genie", bits="w4a4", overrides=[eight])
    times = measure_latency(teacher, recipe, images, [4, 8], Context())
    assert set(times) == {"stem", *INNER, "fc"}
    assert sum(values[8] for values in times.values()) == pytest.approx(7)
    assert all(0 < values[4] <= values[8] for values in times.values())
    plan = choose_bits(teacher, "7.001ms", recipe, images=images, candidates=[4, 8])
    assert plan.cost == pytest.approx(7), "fixed layers and layers without a choice are part of it"


@pytest.mark.parametrize("candidates", [[1, 4], [4, 9], []])
def test_widths_outside_two_to_eight_are_refused(teacher, images, candidates):
    with pytest.raises(UsageError, match="from 2 to 8"):
        choose_bits(teacher, "4.0", images=images, candidates=candidates)


def test_a_file_is_read_back_and_pictures_are_drawn(teacher, images, tmp_path):
    plan = choose_bits(teacher, "4.0", images=images)
    write_plan(plan, tmp_path / "bits")
    assert read_plan(str(tmp_path / "bits" / "bits.yaml")) == plan
    for name in ("bits_frontier.png", "bits_sensitivity.png"):
        assert (tmp_path / "bits" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plan.plot().savefig(tmp_path / "plot.png")
    assert plan.to_dict()["average"] == plan.average()
    assert read_plan("w4a4") is None
    assert read_plan(None) is None


@pytest.mark.parametrize("recipe", ["genie", "hast", "zeroq"])
def test_recipes_follow_the_file_layer_by_layer(teacher, images, recipe, tmp_path):
    plan = choose_bits(teacher, "4.0", recipe, bits="w4a3", images=images)
    assert len(set(plan.layers.values())) > 1
    few = [] if recipe == "zeroq" else ["tuning.steps=2", "tuning.batch=8"]
    resolved = planned(plan, teacher, recipe, settings=few)
    student = tune(teacher, attach(teacher, resolved), images)
    assert {path: layer.bits for path, layer in student.layers().items()} == plan.layers
    assert resolved.bits.activations == 3
    for layer in student.layers().values():
        assert int(layer.frozen.integers.max()) < 2**layer.bits


def test_a_file_for_another_network_is_refused(teacher, images):
    plan = choose_bits(teacher, "4.0", images=images)
    other = Teacher(copy.deepcopy(teacher.network), teacher.info)
    with torch.no_grad():
        other.network.get_submodule("a1").weight.mul_(2)
    with pytest.raises(UsageError, match="another network"):
        planned(plan, other, "genie")


FIXED = {"match": "a1", "weights": 6}


def test_overrides_fix_layers_and_activations(teacher, images):
    eight = {"match": "b?", "activations": 8}
    recipe = load_recipe("zeroq", bits="w4a4", overrides=[eight, FIXED])
    plan = choose_bits(teacher, "3.0", recipe, images=images)
    assert plan.layers["a1"] == 6
    assert plan.free == ("stem", "a2", "proj", "b1", "b2", "fc")
    assert plan.average() <= 3
    placement = attach(teacher, planned(plan, teacher, recipe)).placement
    assert placement.weights == plan.layers
    assert placement.activations == attach(teacher, recipe).placement.activations
    assert 8 in placement.activations.values()
    assert layer_facts(teacher, recipe)[0]["b1"].input_bits == 8


def test_a_file_keeps_what_overrides_fixed_when_it_was_made(teacher, images):
    recipe = load_recipe("zeroq", bits="w4a4", overrides=[FIXED])
    plan = choose_bits(teacher, "3.0", recipe, images=images)
    assert attach(teacher, planned(plan, teacher, "zeroq")).placement.weights == plan.layers
    stem = load_recipe("genie", bits="w4a4", overrides=[{"match": "stem", "weights": 6}])
    plan = choose_bits(teacher, "3.0", stem, images=images)
    assert attach(teacher, planned(plan, teacher, "genie")).placement.weights["stem"] == 6


def test_overrides_that_contradict_the_file_are_refused(teacher, images):
    plan = choose_bits(teacher, "3.0", "zeroq", images=images, candidates=[2, 3])
    with pytest.raises(
        UsageError, match=r"'a1' \d bits and an override of recipe 'zeroq' fixes it to 6"
    ):
        planned(plan, teacher, "zeroq", overrides=[FIXED])


@pytest.mark.parametrize(("made", "used"), [("genie", "hast+ait"), ("hast+ait", "genie")])
def test_a_file_of_a_protocol_that_frees_other_layers_is_refused(teacher, images, made, used):
    plan = choose_bits(teacher, "4.0", made, images=images)
    wanted = load_recipe(used)
    with pytest.raises(UsageError, match=r"fixes the bits of stem, fc; .*--protocol") as caught:
        planned(plan, teacher, used)
    assert f"zsq bits MODEL --recipe {used} --protocol {wanted.protocol}" in str(caught.value)
    same = planned(plan, teacher, used, protocol=plan.protocol)
    assert attach(teacher, same).placement.weights == plan.layers


def test_protocols_that_free_the_same_layers_share_a_file(teacher, images):
    plan = choose_bits(teacher, "4.0", "genie", images=images)
    assert plan.protocol == "edges-8bit"
    resolved = planned(plan, teacher, "genie", protocol="integer")
    assert attach(teacher, resolved).placement.weights == plan.layers


@pytest.mark.parametrize("text", ["", "a: [", "layers: {a: 9}", "{format: 1}"])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "bits.yaml").write_text(text)
    with pytest.raises(UsageError, match="not a readable bits file"):
        BitsPlan.load(tmp_path / "bits.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not a readable bits file"):
        read_plan(str(tmp_path / "none.yaml"))
