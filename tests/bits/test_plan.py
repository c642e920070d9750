# SPDX-License-Identifier: Apache-2.0
"""Sensitivity, and the bits file, on a small network."""

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from helpers.networks import network_of
from helpers.students import planned
from torch import nn

from zsq.bits.choose import choose_bits
from zsq.bits.layers import layer_facts
from zsq.bits.plan import BitsPlan, EdgePlan, read_plan
from zsq.bits.plots import write_plan
from zsq.bits.sensitivity import measure_sensitivity
from zsq.config import load_recipe
from zsq.errors import RunError, UsageError
from zsq.functional.affine import search_weight_grid
from zsq.quantizers.minmax import MinMaxWeight
from zsq.quantizers.weight import round_to_nearest
from zsq.runtime.context import Context
from zsq.stages import tune
from zsq.student import attach, prepared_network, rounded_weight
from zsq.teacher.teacher import ModelInfo, Teacher

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


def test_a_file_that_lacks_a_layer_is_refused(teacher, images, tmp_path):
    plan, path = choose_bits(teacher, "4.0", images=images), tmp_path / "bits.yaml"
    fewer = {n: b for n, b in plan.layers.items() if n != "b1"}
    plan.model_copy(update={"layers": fewer}).save(path)
    with pytest.raises(UsageError, match=r"not a readable bits file.*: b1"):
        BitsPlan.load(path)
    counted = {n: count for n, count in plan.weights.items() if n != "b1"}
    free = tuple(n for n in plan.free if n != "b1")
    nowhere = plan.model_copy(update={"layers": fewer, "weights": counted, "free": free})
    with pytest.raises(UsageError, match=r"other layers than the 7 .*: b1"):
        planned(nowhere, teacher, "genie")
    plan.model_copy(update={"format": 4}).save(path)
    with pytest.raises(UsageError, match="not a readable bits file"):
        BitsPlan.load(path)


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


@pytest.mark.parametrize("recipe", ["hast", "genie"])
def test_weights_are_rounded_as_the_student_begins(teacher, images, recipe):
    """HAST's quick schedule begins with a reconstruction, on grids of least error."""
    plan = choose_bits(
        teacher, "4.0", recipe, schedule="quick", settings=["equalize=0"], images=images
    )
    resolved = load_recipe(recipe, schedule="quick")
    begins = resolved.tuning.start if recipe == "hast" else resolved.tuning
    network = prepared_network(teacher, resolved)
    path, bits = plan.free[0], 3
    grid = search_weight_grid(network.get_submodule(path).weight, bits, power=begins.power)
    with torch.no_grad():
        p = network(images.images).softmax(1)
        layer = network.get_submodule(path)
        layer.weight = nn.Parameter(round_to_nearest(layer.weight, bits, grid)())
        q = network(images.images).softmax(1)
    expected = float((p * (p / q).log()).sum(1).mean())
    assert plan.measured[path][bits] == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_is_measured_as_a_student_that_is_not_tuned_has_it(bits):
    """Depthwise layers of 8 bits among them, whose grids have zero in the middle."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    )
    one = Teacher(network_of(net, (4, 8, 8)), ModelInfo("depthwise", (4, 8, 8)))
    recipe = load_recipe(
        "genie",
        bits=f"w{bits}a8",
        protocol="all-low-bit",
        settings=["equalize=0", "tuning.steps=0"],
    )
    network = prepared_network(one, recipe)
    for path, layer in attach(one, recipe).layers().items():
        there = rounded_weight(network.get_submodule(path), bits, recipe.tuning)
        assert torch.equal(layer.weight(), there)


def test_a_budget_may_be_a_number_and_a_plan_or_a_path_may_be_the_bits(teacher, images, tmp_path):
    plan = choose_bits(teacher, 4.0, images=images)
    assert plan == choose_bits(teacher, "4.0", images=images)
    plan.save(tmp_path / "odd-name")
    assert read_plan(plan) == read_plan(tmp_path / "odd-name") == plan


def test_a_width_that_was_not_measured_is_drawn_without_a_mark(teacher, images, tmp_path):
    plan = choose_bits(teacher, 4.0, images=images, candidates=[2, 4, 8])
    edited = plan.model_copy(update={"layers": plan.layers | {plan.free[0]: 5}})
    write_plan(edited, tmp_path)
    assert BitsPlan.load(tmp_path / "bits.yaml") == edited


@pytest.mark.parametrize(("field", "value", "says"), [
    ("free", (), "free names no layer"), ("measured", {}, "no sensitivities of a1"),
])  # fmt: skip
def test_a_file_without_choices_or_what_they_rest_on_is_refused(
    teacher, images, tmp_path, field, value, says
):
    plan = choose_bits(teacher, "4.0", images=images)
    plan.model_copy(update={field: value}).save(tmp_path / "bits.yaml")
    with pytest.raises(UsageError, match=f"not a readable bits file.*{says}"):
        BitsPlan.load(tmp_path / "bits.yaml")


def test_a_damaged_network_is_named_where_its_bits_are_chosen(teacher, images):
    network = copy.deepcopy(teacher.network)
    network.get_submodule("b1").weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"divergence with .* at 2 bits is nan"):
        choose_bits(Teacher(network, teacher.info), "4.0", images=images, settings=["equalize=0"])


def test_names_with_brackets_and_stars_are_names_and_no_patterns():
    """Keys of an `nn.ModuleDict` may hold what a pattern of an override reads as a set or as anything."""
    for name, other in (("heads.[ab]", "heads.a"), ("heads.*", "heads.b"), ("heads.?", "heads.c")):
        edges = EdgePlan.model_construct(edges={name: 5})
        plan = BitsPlan.model_construct(layers={name: 3}, edges=edges)
        matched = [o.match or o.edge for o in (*plan.of_layers(), *plan.of_edges())]
        assert len(matched) == 2
        for pattern in matched:
            assert fnmatchcase(name, pattern)
            assert not fnmatchcase(other, pattern)
