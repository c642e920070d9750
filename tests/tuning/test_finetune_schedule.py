# SPDX-License-Identifier: Apache-2.0
"""How fine-tuning's rates, targets and caps go with the steps, what decays, and which ranges it freezes."""

from itertools import pairwise

import pytest
import torch
from helpers.students import values

from zsq.config import load_recipe
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.metrics import MetricsLog, read_metrics
from zsq.stages import tune
from zsq.student import attach
from zsq.tuning import finetune

#: Two steps of warm-up and eight of the student.
SMALL = ["tuning.steps=8", "tuning.range_steps=2", "tuning.batch=8", "tuning.lr=0.01"]


def tuned(teacher, images, *settings, name="gdfq", bits="w4a4", context=None):
    recipe = load_recipe(name, bits=bits, settings=[*SMALL, *settings])
    return tune(teacher, attach(teacher, recipe), images, context=context)


def rest_of(network, student):
    """Biases, gamma and beta by name: what learns besides the quantized weights."""
    quantized = {f"{path}.weight" for path in student.layers()}
    named = dict(network.named_parameters())
    return {n: p.detach() for n, p in named.items() if n not in quantized and "quant" not in n}


def path_of(teacher, images, folder, *settings, **options):
    """The weights after each of the student's steps, in one vector a step."""
    context = Context(checkpoints=Checkpoints(folder))
    tuned(teacher, images, "tuning.snapshots=8", *settings, context=context, **options)
    saved = [context.checkpoints.load(f"path_{step:06d}") for step in range(1, 9)]
    return [torch.cat([w.flatten() for w in one.values()]) for one in saved]


def test_the_rate_of_weights_falls_at_the_milestones(teacher, images, tmp_path):
    """Shares count the warm-up: of ten steps, 0.5 ends after two of warm-up and three of the student."""
    path = path_of(teacher, images, tmp_path, "tuning.milestones=[0.5]", "tuning.decay=1e-4",
                   "tuning.momentum=0")  # fmt: skip
    moves = [float((after - before).norm()) for before, after in pairwise(path)]
    assert min(moves[:2]) > 300 * max(moves[2:])


def test_the_rate_of_the_rest_falls_too(teacher, images):
    start = rest_of(teacher.network, attach(teacher, load_recipe("gdfq")))
    moved = {}
    for milestones in ("[]", "[0]"):
        student = tuned(teacher, images, f"tuning.milestones={milestones}", "tuning.decay=1e-4")
        rest = rest_of(student.network, student)
        assert set(rest) == set(start)
        moved[milestones] = {name: float((rest[name] - start[name]).norm()) for name in start}
    for name in start:
        assert moved["[]"][name] > 300 * moved["[0]"][name]


def records(teacher, images, path, monkeypatch, *settings):
    """What is recorded after each step of the student, with inundation."""
    monkeypatch.setattr(finetune, "RECORD_EVERY", 1)
    with MetricsLog(path) as metrics:
        tuned(teacher, images, "tuning.lr=1e-7", *settings, name="gdfq+ait",
              context=Context(metrics=metrics))  # fmt: skip
    return [r for r in read_metrics(path) if "multiplier" in r]


def test_the_share_that_must_change_falls_at_the_milestones(teacher, images, monkeypatch):
    """What the rule is asked for: the share that it then changes depends on grids that move too."""
    asked, step = [], finetune.InundatedSGD.step

    def spy(self, lr, target=0.0, *rest, **options):
        asked.append(target)
        return step(self, lr, target, *rest, **options)

    monkeypatch.setattr(finetune.InundatedSGD, "step", spy)
    tuned(teacher, images, "tuning.milestones=[0.5]", "tuning.inundation.target=0.2",
          "tuning.decay=0.25", name="gdfq+ait")  # fmt: skip
    assert asked == pytest.approx([0.2] * 3 + [0.05] * 5)


def test_multipliers_have_a_cap_of_their_own_in_the_first_steps(
    teacher, images, tmp_path, monkeypatch
):
    found = records(teacher, images, tmp_path / "m.jsonl", monkeypatch, "tuning.milestones=[]",
                    "tuning.inundation.target=0.5", "tuning.inundation.first_steps=3",
                    "tuning.inundation.first_cap=100", "tuning.inundation.cap=3000",
                    "tuning.lr=1e-3")  # fmt: skip
    largest = [max(record["multiplier"].values()) for record in found]
    assert all(m <= 100 for m in largest[:3])
    assert max(largest[:3]) > 1
    assert all(300 < m <= 3000 for m in largest[3:])


def test_everything_that_learns_decays(teacher, images, tmp_path):
    """One step of SGD by hand: decay adds ``-lr * decay * parameter`` to what the loss does."""
    start = attach(teacher, load_recipe("gdfq"))
    before = rest_of(teacher.network, start)
    weights = {path: teacher.network.get_submodule(path).weight for path in start.layers()}
    first = {}
    for decay in (0.0, 5.0):
        context = Context(checkpoints=Checkpoints(tmp_path / str(decay)))
        student = tuned(teacher, images, "tuning.steps=1", "tuning.momentum=0", "tuning.snapshots=1",
                        f"tuning.weight_decay={decay}", "tuning.milestones=[]",
                        context=context)  # fmt: skip
        masters = context.checkpoints.load("path_000001")
        first[decay] = rest_of(student.network, student) | masters
    assert {name.rpartition(".")[2] for name, value in before.items() if value.any()} == {
        "weight", "bias"
    }, "gamma, and beta or bias"  # fmt: skip
    for name, value in (before | weights).items():
        difference = first[5.0][name] - first[0.0][name]
        assert torch.allclose(difference, -0.05 * value, atol=1e-5), name


@pytest.mark.parametrize("percentile", [99.0, 80.0])
def test_ranges_without_the_outermost_values_are_quantiles(teacher, images, percentile):
    student = tuned(teacher, images, "tuning.ranges=percentile", f"tuning.percentile={percentile}",
                    "tuning.steps=0", "tuning.range_steps=1", "tuning.batch=24", bits="w8a8")  # fmt: skip
    seen = values(teacher.network, images.images)
    assert student.quantizers()
    for name in student.quantizers():
        quantizer = student.quantizer(name)
        wanted = torch.quantile(seen[name].flatten(), percentile / 100)
        reached = float(quantizer(torch.tensor([1e6])))  # the largest value on the grid
        assert reached == pytest.approx(float(wanted), rel=0.05)
