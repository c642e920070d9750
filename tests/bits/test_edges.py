# SPDX-License-Identifier: Apache-2.0
"""Bits for activations, tensor by tensor: what is measured, what is chosen, and what becomes of it."""

import pytest
import torch
from helpers.students import SHAPE, planned, values
from torch.fx import Interpreter

from zsq.bits.choose import choose_bits
from zsq.bits.edges import count_values, measure_edges
from zsq.bits.layers import free_edges, layer_facts
from zsq.bits.plan import BitsPlan, read_plan
from zsq.bits.plots import write_plan
from zsq.config import load_recipe
from zsq.errors import UsageError
from zsq.runtime.context import Context
from zsq.settings import Override
from zsq.stages import tune
from zsq.student import attach, prepared_network


class Rounded(Interpreter):
    """Runs a network with one node's result on a grid of minimum and maximum, by torch's own fake quantization."""

    def __init__(self, network, name, bits):
        super().__init__(network)
        self.name, self.top = name, 2**bits - 1

    def run_node(self, n):
        x = super().run_node(n)
        if n.name != self.name:
            return x
        assert float(x.min()) >= 0, "after a ReLU zero is the smallest code"
        return torch.fake_quantize_per_tensor_affine(x, float(x.max()) / self.top, 0, 0, self.top)


def test_sensitivity_is_the_divergence_with_one_tensor_rounded(teacher, images):
    edges = free_edges(teacher.network, "all-low-bit")
    found = measure_edges(
        teacher.network, images.images, edges, [2, 5], load_recipe("gdfq", settings=["tuning.ranges=minmax"]).tuning,
        Context(),
    )  # fmt: skip
    assert set(found) == set(edges)
    with torch.no_grad():
        p = teacher(images.images).softmax(1)
        for name in edges:
            for bits in (2, 5):
                q = Rounded(teacher.network, name, bits).run(images.images).softmax(1)
                expected = float((p * (p / q).log()).sum(1).mean())
                assert found[name][bits] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_measuring_changes_nothing(teacher, images):
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    nodes = [n.name for n in teacher.network.graph.nodes]
    choose_bits(teacher, "4.0", activations=4, images=images)
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())
    assert [n.name for n in teacher.network.graph.nodes] == nodes


def test_values_are_those_of_one_image(teacher, images):
    edges = free_edges(teacher.network, "all-low-bit")
    seen = values(teacher.network, images.images[:1])
    assert count_values(teacher.network, edges, SHAPE) == {n: seen[n].numel() for n in edges}


def test_protocol_and_overrides_fix_tensors(teacher):
    genie = load_recipe("genie")
    network = prepared_network(teacher, genie)
    placed = attach(teacher, genie).placement.activations
    free = free_edges(network, "edges-8bit")
    assert free
    assert set(free) == {name for name, bits in placed.items() if bits == 4} != set(placed)
    fixed = Override(edge=free[0], activations=5)
    assert free_edges(network, "edges-8bit", [fixed]) == free[1:]


@pytest.mark.parametrize("recipe", ["genie", "hast", "zeroq"])
def test_recipes_follow_the_file_tensor_by_tensor(teacher, images, recipe, tmp_path):
    plan = choose_bits(teacher, "4.0", recipe, activations=3.6, images=images)
    chosen = plan.edges
    counts = chosen.values
    average = sum(counts[n] * b for n, b in chosen.edges.items()) / sum(counts.values())
    assert average == pytest.approx(chosen.cost)
    assert average <= 3.6
    assert len(set(chosen.edges.values())) > 1
    write_plan(plan, tmp_path)
    assert read_plan(str(tmp_path / "bits.yaml")) == plan
    assert (tmp_path / "bits_sensitivity.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    few = [] if recipe == "zeroq" else ["tuning.steps=2", "tuning.batch=8"]
    resolved = planned(plan, teacher, recipe, settings=few)
    assert resolved.bits.activations == plan.activations == round(chosen.cost)
    student = tune(teacher, attach(teacher, resolved), images)
    own = {name: q.bits for name, q in student.quantizers().items()}
    others = attach(teacher, load_recipe(recipe)).placement.activations
    assert own == others | chosen.edges
    assert {path: layer.bits for path, layer in student.layers().items()} == plan.layers
    seen = values(student.network, images.images)
    for name, bits in chosen.edges.items():
        assert len(seen[f"quantizers_{name}"].unique()) <= 2**bits, name


def test_a_choice_is_no_more_sensitive_than_uniform_bits(teacher, images):
    chosen = choose_bits(teacher, "4.0", "hast", activations=4, images=images).edges
    assert chosen.sensitivity <= sum(values[4] for values in chosen.measured.values()) + 1e-9


def test_bit_operations_are_counted_with_the_bits_that_were_chosen(teacher, images):
    plan = choose_bits(teacher, "1GBOP", "hast", activations=3, images=images)
    facts, _ = layer_facts(teacher, planned(plan, teacher, "hast"))
    assert {fact.input_bits for fact in facts.values()} > {32}
    assert plan.cost == sum(f.macs * f.input_bits * plan.layers[p] for p, f in facts.items())


def test_what_a_recipe_overrides_stays(teacher, images):
    plan = choose_bits(teacher, "4.0", activations=3, images=images)
    name = next(iter(plan.edges.edges))
    resolved = planned(plan, teacher, "genie", overrides=[{"edge": name, "activations": 7}])
    assert attach(teacher, resolved).placement.activations[name] == 7


def test_a_protocol_that_frees_the_same_tensors_shares_the_file(teacher, images):
    plan = choose_bits(teacher, "4.0", activations=3, images=images)
    placed = attach(teacher, planned(plan, teacher, "genie", protocol="integer")).placement
    assert {name: placed.activations[name] for name in plan.edges.edges} == plan.edges.edges


def test_a_file_that_names_other_tensors_is_refused(teacher, images, tmp_path):
    plan, path = choose_bits(teacher, "4.0", activations=4, images=images), tmp_path / "bits.yaml"
    fewer = dict(list(plan.edges.edges.items())[1:])
    plan.model_copy(update={"edges": plan.edges.model_copy(update={"edges": fewer})}).save(path)
    with pytest.raises(UsageError, match=r"not a readable bits file.*different tensors"):
        BitsPlan.load(path)
    renamed = plan.edges.model_copy(update={"edges": {"nowhere": 4}, "values": {"nowhere": 1}})
    with pytest.raises(UsageError, match="'nowhere' matches no tensor"):
        attach(teacher, planned(plan.model_copy(update={"edges": renamed}), teacher, "genie"))


def test_a_file_without_them_is_still_read(teacher, images, tmp_path):
    plan, path = choose_bits(teacher, "4.0", images=images), tmp_path / "bits.yaml"
    plan.model_copy(update={"format": 2}).save(path)
    path.write_text(path.read_text().replace("edges: null\n", ""))
    assert BitsPlan.load(path).layers == plan.layers


@pytest.mark.parametrize("budget", [1.9, 8.1, float("nan"), -4])
def test_an_average_that_no_choice_has_is_refused(teacher, images, budget):
    with pytest.raises(UsageError, match="cannot be made of the candidates 2, 3, 4, 5, 6, 8"):
        choose_bits(teacher, "4.0", activations=budget, images=images)


def test_activations_alone_leave_weights_as_they_are(teacher, images):
    plan = choose_bits(teacher, bits="w5a2", activations=3.6, images=images)
    assert {plan.layers[path] for path in plan.free} == {5}
    assert plan.average() == 5
    student = attach(teacher, planned(plan, teacher, "genie"))
    uniform = attach(teacher, load_recipe("genie", bits="w5a2"))
    assert student.placement.weights == uniform.placement.weights
    own = {name: q.bits for name, q in student.quantizers().items()}
    assert own == own | plan.edges.edges
    assert len(set(plan.edges.edges.values())) > 1


def test_the_frontiers_of_what_was_chosen_are_drawn(teacher, images):
    weights = choose_bits(teacher, "4.0", images=images)
    edges = choose_bits(teacher, activations=4, images=images)
    both = weights.model_copy(update={"edges": edges.edges})
    for plan, chosen in ((weights, [4.0]), (edges, [4.0]), (both, [4.0, 4.0])):
        axes = plan.plot().axes
        assert len(axes) == len(chosen)
        for panel, average in zip(axes, chosen, strict=True):
            assert panel.get_lines()[-1].get_xdata()[0] <= average


def test_something_has_to_be_bounded(teacher, images):
    with pytest.raises(UsageError, match=r"nothing bounds the bits: .*--budget .*--activations"):
        choose_bits(teacher, images=images)


def test_bits_where_everything_is_chosen_are_refused(teacher, images):
    with pytest.raises(UsageError, match=r"--bits w4a4 says what is not chosen.* leave one"):
        choose_bits(teacher, "4.0", bits="w4a4", activations=4, images=images)


def test_nothing_to_choose_is_said(teacher, images):
    fixed = load_recipe("genie", overrides=[{"edge": "*", "activations": 8}])
    with pytest.raises(UsageError, match="leave --activations out"):
        choose_bits(teacher, "4.0", fixed, activations=4, images=images)
