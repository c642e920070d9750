# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot work leave no run behind that would be in the way of the next one."""

from contextlib import nullcontext

import pytest
import torch
from helpers.runs import FEW, write_images
from torch import nn

from zsq import quantize, running
from zsq.config import load_recipe
from zsq.errors import UsageError
from zsq.requests import check_request, warn_of_floating
from zsq.runtime.group import Group
from zsq.runtime.progress import QuietReporter
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import load_teacher

SETTINGS = FEW[1:10:2]


#: Labels of a network of more classes.
LABELLED = ImageSet(torch.randn(8, 3, 8, 8), torch.arange(8))
NOISE = torch.randn(8, 3, 8, 8)
#: An override of what the first layer reads, which is the image, in float.
FIRST = load_recipe("genie", overrides=[{"match": "0", "activations": 8}])
#: A recipe whose student learns from labels.
LEARNS = load_recipe("genie", tuning={"method": "finetune", "steps": 1})


class Mean(nn.Module):
    """A network with nothing to quantize, and no parameter."""

    def forward(self, x):
        return x.mean((2, 3))


def without_pooling():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )


def with_norms():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )  # fmt: skip


def without_norms():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


class TwoHeads(nn.Module):
    """Its logits are those of two classifiers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        return torch.cat([self.one(x), self.two(x)], 1)


class Attention(nn.Module):
    """Whose inner layers read sequences first."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu().flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


#: Parts of which the second asks for a classifier's rows.
PARTS = {"method": "mixed", "images": 8, "parts": ["genie", "qimera"]}
#: A recipe whose pixels have nothing to be optimised for.
AIMLESS = load_recipe(
    "hast", settings=["synthesis.losses.batch_statistics=0", "synthesis.losses.cross_entropy=0"]
)
#: A recipe that begins with a reconstruction, layer by layer.
STARTS = load_recipe(
    "hast", schedule="quick", settings=["tuning.start.unit=layer", "tuning.losses.alignment=0"]
)


def ask(out, network, **more):
    return quantize(
        network.eval(), settings=SETTINGS, input_shape=(3, 8, 8), compile=False, precision="fp32",
        report=False, out=out, **more,
    )  # fmt: skip


@pytest.mark.parametrize(("network", "more", "says"), [
    (without_norms, {}, "--images"),
    (Mean, {"images": torch.randn(8, 3, 8, 8)}, "nothing to"),
    (without_norms, {"images": "nowhere", "mean": (0.5,) * 3, "std": (0.5,) * 3}, "nowhere"),
    (without_norms, {"images": "."}, "--mean"),
    (without_norms, {"images": torch.randn(8, 3, 9, 9)}, "shape"),
    (without_norms, {"images": torch.randn(8, 3, 8, 8), "memory": -5}, "-5"),
    (without_norms, {"images": LABELLED, "recipe": LEARNS}, "5 classes, 0 to 4"),
    (without_norms, {"images": torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)}, r"uint8.*/ 255"),
    (without_pooling, {"recipe": "intraq"}, "not pooled ones.*class_band=0"),
    (without_pooling, {"recipe": "mixed"}, r"not pooled ones.*synthesis\.parts"),
    (TwoHeads, {"recipe": "qimera"}, r"2 operands.*synthesis\.embedding=random"),
    (TwoHeads, {"recipe": load_recipe("mixed", synthesis=PARTS)}, r"2 operands.*embedding=random"),
    (Attention, {"recipe": "adaround"}, r"attention.*cannot be tuned one by one.*tuning\.unit=block"),
    (Attention, {"recipe": STARTS}, r"cannot be tuned one by one.*tuning\.start\.unit=block"),
    (without_norms, {"images": NOISE, "recipe": load_recipe("genie", overrides=[{"match": "3"}])}, "no bits"),
    (with_norms, {"recipe": AIMLESS}, "no term with a weight"),
    (without_norms, {"images": NOISE, "recipe": FIRST}, "'0' gives activations 8 bits, and protocol"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_a_run_is_begun(tmp_path, network, more, says):
    with pytest.raises(UsageError, match=says):
        ask(tmp_path / "run", network(), **more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("recipe", "settings", "size", "says"), [
    ("genie", ["tuning.batch=2"], 3, "tuning.batch gives 2"),
    ("hast", ["tuning.start.batch=2"], 3, "tuning.start.batch gives 2"),
    ("gdfq", ["synthesis.batch=2"], 3, "synthesis.batch gives 2"),
    ("gdfq", ["tuning.batch=1", "tuning.start.batch=8"], 3, None),  # a generator's batch is the student's
])  # fmt: skip
def test_more_processes_than_images_of_a_step_are_refused_before_images_are_made(
    recipe, settings, size, says
):
    teacher = load_teacher(with_norms(), input_shape=(3, 8, 8))
    asked = load_recipe(recipe, schedule="quick", settings=settings)
    group = Group(0, size, "cpu", 0)
    with pytest.raises(UsageError, match=says) if says else nullcontext():
        check_request(teacher, asked, None, group)


def test_images_are_counted_by_the_process_that_has_them():
    teacher = load_teacher(with_norms(), input_shape=(3, 8, 8))
    asked = load_recipe("genie", settings=["synthesis.images=2", "synthesis.batch=2"])
    check_request(teacher, asked, NOISE, Group(0, 4, "cpu", 0))
    check_request(teacher, asked, "given 0123", Group(1, 4, "cpu", 1))
    with pytest.raises(UsageError, match=r"tuning\.batch gives 3"):
        check_request(teacher, asked, NOISE[:3], Group(0, 4, "cpu", 0))


def test_one_logit_is_no_classifier(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1))
    with pytest.raises(UsageError, match=r"one number an image.*two logits.*zeros_like"):
        ask(tmp_path / "run", network)
    with pytest.raises(UsageError, match="one number an image"):
        load_teacher(network, input_shape=(3, 8, 8))


def test_a_protocol_that_finds_no_activation_says_so():
    notes = []
    reporter = QuietReporter()
    reporter.note = notes.append
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )  # fmt: skip
    teacher = load_teacher(network, input_shape=(3, 8, 8))
    for protocol, said in (("all-low-bit", True), ("edges-8bit", False)):
        notes.clear()
        warn_of_floating(teacher, load_recipe("zeroq", protocol=protocol), reporter)
        assert any("quantizes no activation" in note for note in notes) == said


def test_a_folder_of_more_classes_is_refused_where_labels_are_learned_from(tmp_path):
    images = tmp_path / "images"
    for name in "abcdef":
        write_images(images / name)
    normal = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(UsageError, match="6 class folders but the network has 5"):
        ask(tmp_path / "run", without_norms(), images=str(images), recipe=LEARNS, **normal)
    assert not (tmp_path / "run").exists()
    student = ask(None, without_norms(), images=str(images), **normal)
    assert student(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_what_turns_out_not_to_work_can_be_asked_for_otherwise(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise UsageError("give other images")

    images = write_images(tmp_path / "images")
    normalisation = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with monkeypatch.context() as patched:
        patched.setattr(running, "choose_images", refuse)
        with pytest.raises(UsageError, match="other images"):
            ask(tmp_path / "run", without_norms(), images=images, **normalisation)
    other = torch.randn(8, 3, 8, 8)
    assert ask(tmp_path / "run", without_norms(), images=other)(other).shape == (8, 5)
