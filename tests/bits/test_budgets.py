# SPDX-License-Identifier: Apache-2.0
"""Budgets: what they count, in which unit, and what meets them."""

import onnx
import pytest
from helpers.networks import Inverted
from helpers.students import labelled_images, planned, teacher_of

from zsq.bits import choose
from zsq.bits.choose import choose_bits
from zsq.bits.costs import Budget, LayerFacts, cost_of, shown_cost
from zsq.bits.fitting import make_plan
from zsq.bits.latency import measure_latency
from zsq.bits.layers import layer_facts
from zsq.bits.tables import bits_tables
from zsq.config import Override, load_recipe
from zsq.errors import UsageError
from zsq.export.deploy import to_integer
from zsq.export.onnx import write_integer
from zsq.runtime.context import Context
from zsq.stages import tune
from zsq.student import attach

#: What an ONNX file calls integer weights.
WEIGHTS = ("weight_quantized", "weight_quantized_int4")
INNER = ("a1", "a2", "proj", "b1", "b2")


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
    [("3.5", "average bits per weight, free layers"), ("1.1kB", "MB of weights in the ONNX file"),
     ("0.0021GBOP", "GBOP an image")],
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


def test_depthwise_layers_are_stored_in_whole_bytes(tmp_path):
    teacher = teacher_of(Inverted)
    images = labelled_images(teacher, 16)
    plan = choose_bits(teacher, "3.0", images=images, candidates=[2, 4])
    assert plan.depthwise == ("dw",)
    resolved = planned(plan, teacher, "genie", tuning={"method": "calibrate"})
    student = tune(teacher, attach(teacher, resolved), images)
    write_integer(to_integer(student, images.images), tmp_path / "model.onnx")
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    held = sum(len(i.raw_data) for i in stored if i.name.endswith(WEIGHTS))
    assert held == plan.onnx_bytes()
    sized = choose_bits(teacher, f"{plan.onnx_bytes()}B", images=images, candidates=[2, 4, 8])
    assert sized.cost <= plan.onnx_bytes()
    assert sized.layers["dw"] == 8, "narrower ones would save nothing"


def test_bit_operations_count_both_operands(teacher):
    facts = layer_facts(teacher, load_recipe("genie", bits="w4a3"))[0]
    assert facts["stem"].input_bits == 32
    assert facts["a1"].input_bits == 8
    assert facts["a2"].input_bits == 3
    assert facts["fc"].input_bits == 8
    assert facts["b1"].macs == 6 * 6 * 9 * 16
    assert cost_of(facts["b1"], 5, "bops") == 6 * 6 * 9 * 16 * 5 * facts["b1"].input_bits


def test_a_budget_in_operations_is_kept_and_refused(teacher, images):
    facts, free = layer_facts(teacher, load_recipe("genie"))

    def whole(bits):
        widths = {path: bits if path in free else 8 for path in facts}
        return sum(cost_of(facts[path], width, "bops") for path, width in widths.items())

    halfway = (whole(2) + whole(8)) / 2
    plan = choose_bits(teacher, f"{halfway / 1e9}GBOP", images=images, candidates=[2, 8])
    assert whole(2) < plan.cost <= halfway
    assert {plan.layers[path] for path in free} == {2, 8}
    everything = choose_bits(teacher, "1GBOP", images=images, candidates=[2, 8])
    assert everything.cost == pytest.approx(whole(8))
    with pytest.raises(UsageError, match=r"smallest possible is .* GBOP, .* GBOP of it layers"):
        choose_bits(teacher, f"{0.99 * whole(2) / 1e9}GBOP", images=images, candidates=[2, 8])


def test_a_budget_that_nothing_meets_is_refused_before_anything_is_made(teacher, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("images were made")

    monkeypatch.setattr(choose, "choose_images", refuse)
    with pytest.raises(UsageError, match="smallest possible"):
        choose_bits(teacher, "1.9")


def test_what_the_recipe_is_changed_by_prepares_the_network(teacher, images, monkeypatch):
    seen = []
    monkeypatch.setattr(choose, "make_plan", lambda *given: seen.append(given[1]))
    for more in ({}, {"schedule": "quick"}, {"settings": ["equalize=0.25"]}):
        choose_bits(teacher, "4.0", "hast", images=images, candidates=[4, 8], **more)
    assert [recipe.equalize for recipe in seen] == [0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [("4", "average", 4), ("3.5", "average", 3.5), ("900kB", "size", 9e5), ("1.7 MB", "size", 1.7e6),
     ("2GBOP", "bops", 2e9), ("2GBOPs", "bops", 2e9), ("1.3ms", "latency", 1.3)],
)  # fmt: skip
def test_budgets_are_read_as_people_write_them(text, kind, amount):
    assert Budget.parse(text) == Budget(kind, pytest.approx(amount))


@pytest.mark.parametrize(
    "text", ["", "many", "-4", "0", "4 apples", "MB", "1.7M", "5s", "1mss", "2MBs"]
)
def test_other_budgets_are_refused(text):
    with pytest.raises(UsageError, match=r"4\.0.*1\.7MB"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("budget", "smallest"), [("1.9", "2 bits per weight"), ("0.1kB", "MB"), ("1e-1MBOP", "GBOP")]
)
def test_a_budget_that_nothing_meets_says_the_smallest_possible(teacher, images, budget, smallest):
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
    six = recipe.model_copy(
        update={"overrides": (*recipe.overrides, Override(match="a1", weights=6))}
    )
    fixed = choose_bits(teacher, "9ms", six, images=images, candidates=[4, 8])
    assert fixed.layers["a1"] == 6, "its time is measured though nobody asked for that width"
    plan = choose_bits(teacher, "7.001ms", recipe, images=images, candidates=[4, 8])
    assert plan.cost == pytest.approx(7), "fixed layers and layers without a choice are part of it"
