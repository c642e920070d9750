# SPDX-License-Identifier: Apache-2.0
"""Which layer hurts: against networks taken apart by hand."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers.networks import smooth_images
from helpers.students import teacher_of
from torch import nn

from zsq.analysis.items import Dissection, signal_to_noise
from zsq.analysis.layers import Diagnosis, Item, diagnose_student
from zsq.config import Override, load_recipe
from zsq.preparation import prepared_teacher
from zsq.stages import tune
from zsq.student import attach, prepared_network
from zsq.synthesis.images import ImageSet

IMAGES = smooth_images(32)


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


def made(teacher, name, *settings, bits="w3a3", overrides=()):
    recipe = load_recipe(name, bits=bits, settings=settings, overrides=list(overrides))
    images = ImageSet(IMAGES, torch.zeros(32).long())
    prepared = prepared_teacher(teacher, recipe, images)
    student = tune(prepared, attach(prepared, recipe), images)
    return student, prepared_network(prepared, recipe)


@pytest.fixture(scope="module")
def calibrated(teacher):
    return made(teacher, "zeroq")


def divergence(p, q):
    p, q = p.softmax(1), q.softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


def test_one_weight_alone_is_that_weight_in_the_float_network(teacher, calibrated):
    student, network = calibrated
    found = diagnose_student(student, network, IMAGES)
    wanted = network(IMAGES)
    for path, layer in student.layers().items():
        one = copy.deepcopy(network)
        one.get_submodule(path).weight = nn.Parameter(layer.weight(), requires_grad=False)
        with torch.no_grad():
            expected = divergence(wanted, one(IMAGES))
        item = next(i for i in found.items if i.kind == "weight" and i.name == path)
        assert item.only == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_leaving_one_out_is_the_student_without_it(calibrated):
    student, network = calibrated
    found = diagnose_student(student, network, IMAGES)
    wanted = network(IMAGES)
    with torch.no_grad():
        assert found.divergence == pytest.approx(divergence(wanted, student(IMAGES)), rel=1e-3)
    other = student.copy()
    name = next(iter(other.quantizers()))
    other.quantizer(name).enabled = False
    item = next(i for i in found.items if i.name == name)
    with torch.no_grad():
        expected = divergence(wanted, other(IMAGES))
    assert item.without == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found.gain(item) == pytest.approx(found.divergence - expected, abs=1e-6)


def test_every_weight_and_edge_is_there_once_worst_first(calibrated):
    student, network = calibrated
    found = diagnose_student(student, network, IMAGES)
    assert {(i.kind, i.name) for i in found.items} == {
        *(("weight", p) for p in student.layers()), *(("edge", n) for n in student.quantizers())
    }  # fmt: skip
    gains = [found.gain(item) for item in found.items]
    assert gains == sorted(gains, reverse=True)


def test_a_layer_that_was_hit_hard_comes_first(teacher):
    hit = {"match": "b1", "weights": 2}
    student, network = made(teacher, "zeroq", bits="w8a8", overrides=[hit])
    found = diagnose_student(student, network, IMAGES)
    assert (found.items[0].kind, found.items[0].name, found.items[0].bits) == ("weight", "b1", 2)
    assert 'match: "b1", weights: 4' in found.suggestions()[0]
    assert found.overrides == student.recipe.overrides


def test_a_suggestion_can_be_pasted_and_helps(teacher):
    hit = {"match": "b1", "weights": 2}
    student, network = made(teacher, "zeroq", bits="w8a8", overrides=[hit])
    before = diagnose_student(student, network, IMAGES)
    setting = before.suggestions()[0].removeprefix("--set '").removesuffix("'")
    recipe = load_recipe("zeroq", bits="w8a8", settings=[setting])
    images = ImageSet(IMAGES, torch.zeros(32).long())
    better = tune(teacher, attach(teacher, recipe), images)
    assert diagnose_student(better, network, IMAGES).divergence < before.divergence


def test_suggestions_keep_what_a_recipe_overrides_and_name_the_bits_file():
    """A list of overrides replaces the recipe's; a bits file and an override may not say the same."""
    items = [
        Item("weight", "b1", 2, 10.0, 1.0, 0.1, 0.0, 0.0), Item("edge", "relu", 3, 10.0, 1.0, 0.2, 0.0, 0.0)
    ]  # fmt: skip
    kept = (Override(match="a.*", weights=8),)
    found = Diagnosis("integer", 1.0, 4, tuple(items), kept)
    texts = found.suggestions()
    assert len(texts) == 2
    for text, count in zip(texts, (2, 3), strict=True):
        setting = text.removeprefix("--set '").removesuffix("'")
        overrides = load_recipe("genie", settings=[setting]).overrides
        assert overrides[0] == kept[0]
        assert len(overrides) == count
    assert overrides[2] == Override(edge="relu", activations=6)
    own, plans = Override(match="b1", activations=8), Override(match="b1", weights=2)
    planned = replace(found, planned=(plans,), overrides=(own, plans)).suggestions()
    assert planned == [
        "b1: 4  # in bits.yaml, layers",
        '--set \'overrides=[{match: "b1", activations: 8}, {edge: "relu", activations: 6}]\'',
    ]
    edges = replace(found, planned=(Override(edge="relu", activations=3),)).suggestions()
    assert edges[0] == "relu: 6  # in bits.yaml, edges"
    same_name = replace(found, planned=(Override(match="relu", weights=8),)).suggestions()
    assert '{edge: "relu", activations: 6}' in same_name[1]
    json.dumps(found.to_dict())


def test_clipping_and_unused_codes_are_counted(calibrated):
    student, network = calibrated
    name, quantizer = next(iter(student.quantizers().items()))
    found = diagnose_student(student, network, IMAGES)
    item = next(i for i in found.items if i.name == name)
    assert item.clipped == 0, "minimum and maximum clip nothing"
    narrow = student.copy()
    narrow.quantizer(name).raw_scale.data.mul_(0.25)
    item = next(i for i in diagnose_student(narrow, network, IMAGES).items if i.name == name)
    with torch.no_grad():
        x = student.network.stem_bn(student.network.stem(IMAGES)).relu()
    step = float(quantizer.scale) / 4
    expected = float(((x / step).round() > 7).float().mean())
    assert item.clipped == pytest.approx(expected, abs=1e-4)
    wide = student.copy()
    wide.quantizer(name).raw_scale.data.mul_(4)
    item = next(i for i in diagnose_student(wide, network, IMAGES).items if i.name == name)
    assert item.unused >= 5 / 8


def test_signal_to_noise_of_edges_is_measured_on_what_they_read(calibrated):
    student, network = calibrated
    name, quantizer = next(iter(student.quantizers().items()))
    with torch.no_grad():
        x = student.network.stem_bn(student.network.stem(IMAGES)).relu()
        expected = signal_to_noise(x, quantizer(x))
    found = diagnose_student(student, network, IMAGES)
    item = next(i for i in found.items if i.name == name)
    assert item.sqnr == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("protocol", ["edges-8bit", "integer", "all-low-bit"])
def test_tuned_students_of_every_protocol_are_diagnosed(teacher, protocol):
    few = ["tuning.steps=4", "tuning.batch=8", f"protocol={protocol}"]
    student, network = made(teacher, "genie", *few)
    found = diagnose_student(student, network, IMAGES)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.protocol == protocol
    assert found.divergence >= 0


def test_the_student_is_not_changed(calibrated):
    student, network = calibrated
    before = {k: v.clone() for k, v in student.state_dict().items()}
    first = student(IMAGES)
    diagnose_student(student, network, IMAGES)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert torch.equal(student(IMAGES), first)


def test_the_float_twin_of_a_fine_tuned_student_is_the_teacher(teacher):
    few = ["tuning.steps=6", "tuning.batch=8", "tuning.range_steps=2", "tuning.lr=1e-3"]
    student, network = made(teacher, "intraq", *few)
    parts = Dissection(student, network)
    assert torch.allclose(parts.float(IMAGES), teacher(IMAGES), atol=1e-5)
    assert not torch.allclose(parts.quantized(IMAGES), teacher(IMAGES), atol=1e-2)


def test_pictures_are_drawn(calibrated, tmp_path):
    diagnose_student(*calibrated, IMAGES).plot().savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_large_networks_are_diagnosed_on_fewer_images(teacher):
    from zsq.analysis.runs import IMAGES, affordable_images

    assert affordable_images(teacher, 10) == IMAGES
    assert affordable_images(teacher, 10**6) < IMAGES
    assert affordable_images(teacher, 10**12) == 8
