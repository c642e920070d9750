# SPDX-License-Identifier: Apache-2.0
"""HAST's training: harder images, aligned features, one rounding for both passes."""

import copy

import pytest
import torch
from helpers.kills import Killed
from helpers.networks import smooth_images

from zsq.config import load_recipe
from zsq.functional.alignment import alignment_loss
from zsq.functional.losses import kl_divergence
from zsq.quantizers.minmax import MinMaxWeight
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.metrics import MetricsLog, read_metrics
from zsq.stages import tune
from zsq.student import attach
from zsq.synthesis.batches import Batch
from zsq.teacher.blocks import block_outputs, tap_nodes
from zsq.tuning.objective import Objective
from zsq.tuning.promotion import learn_from_harder, rounded_once

SMALL = ["tuning.steps=4", "tuning.batch=8", "tuning.range_steps=2", "tuning.lr=1e-4"]


def ready(teacher, *settings, name="hast", bits="w3a3"):
    """A student with ranges, and its objective."""
    recipe = load_recipe(name, bits=bits, settings=[*SMALL, *settings])
    student = attach(teacher, recipe)
    for quantizer in student.quantizers().values():
        quantizer.enabled = quantizer.tracking = True
    student(smooth_images(16, seed=3))
    for quantizer in student.quantizers().values():
        quantizer.tracking = False
    weights = [layer.weight for layer in student.layers().values()]
    student.network.requires_grad_(False)
    for weight in weights:
        weight.master.requires_grad_(True)
    return student, Objective(teacher, student, recipe.tuning, Context()), weights, recipe.tuning


def by_hand(teacher, student, x):
    """20 T^2 KL + 1000 FA, from nets tapped by the test."""
    names = block_outputs(teacher.network, (3, 8, 8))
    wanted, *theirs = tap_nodes(teacher.network, names)(x)
    given, *ours = tap_nodes(student.network, names)(x)
    p, log_q = (wanted / 20).softmax(1), (given / 20).log_softmax(1)
    divergence = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    return 20 * 400 * divergence + 1000 * alignment_loss(ours, theirs)


@pytest.mark.parametrize(("name", "share"), [("hast", 1), ("hast", 2.5), ("hast-reference", 1)])
def test_the_gradient_is_that_of_clean_and_harder_images_by_hand(teacher, name, share):
    student, objective, weights, settings = ready(
        teacher, f"tuning.promotion.weight={share}", name=name
    )
    x = smooth_images(8, seed=5)
    terms = learn_from_harder(
        objective, Batch(x, None, torch.ones(8, 5) / 5), settings.promotion, weights
    )
    found = [w.master.grad.clone() for w in weights]
    for weight in weights:
        weight.master.grad = None

    pixels = x.clone().requires_grad_()
    names = block_outputs(teacher.network, (3, 8, 8))
    if name == "hast":  # the teacher's part of the lesson is a constant
        given, *ours = tap_nodes(student.network, names)(pixels)
        with torch.no_grad():
            wanted, *theirs = tap_nodes(teacher.network, names)(x)
        loss = 20 * kl_divergence(given, wanted, 20.0, "sample") + 1000 * alignment_loss(
            ours, theirs
        )
    else:
        loss = by_hand(teacher, student, pixels)
    (uphill,) = torch.autograd.grad(loss, pixels)
    moved = x + 0.01 * uphill.sign()
    clean, other = by_hand(teacher, student, x), by_hand(teacher, student, moved)
    (clean + share * other).backward()
    for gradient, weight in zip(found, weights, strict=True):
        assert torch.allclose(gradient, weight.master.grad, rtol=1e-3, atol=1e-4)
    assert sum(float(t.detach()) for t in terms.values()) == pytest.approx(
        float((clean + other).detach()), rel=1e-4
    )


def test_harder_images_are_exactly_epsilon_away_and_harder(teacher, monkeypatch):
    _, objective, weights, settings = ready(teacher, bits="w3a8")  # nearly smooth in the pixels
    seen = []
    call = Objective.__call__
    monkeypatch.setattr(
        Objective, "__call__", lambda self, x, lesson: (seen.append(x.detach().clone()), call(self, x, lesson))[1]
    )  # fmt: skip
    x = smooth_images(8, seed=5)
    terms = learn_from_harder(
        objective, Batch(x, None, torch.ones(8, 5) / 5), settings.promotion, weights
    )
    clean, moved = seen
    assert torch.equal(clean, x)
    gap = (moved - clean).abs()
    assert torch.allclose(gap[gap > 0], torch.tensor(0.01), atol=1e-6)
    assert (gap > 0).float().mean() > 0.9
    assert sum(terms[f"{n}_harder"] for n in objective.names) > sum(
        terms[n] for n in objective.names
    )


def test_weights_are_rounded_once_for_both_passes(teacher, monkeypatch):
    _, objective, weights, settings = ready(teacher)
    rounded = []
    grid = MinMaxWeight.grid
    monkeypatch.setattr(MinMaxWeight, "grid", lambda self: (rounded.append(self), grid(self))[1])
    batch = Batch(smooth_images(8), None, torch.ones(8, 5) / 5)
    learn_from_harder(objective, batch, settings.promotion, weights)
    assert len(rounded) == len(weights)
    assert all(weight.held is None for weight in weights)


def test_nothing_is_held_after_an_error(teacher):
    _, _, weights, _ = ready(teacher)

    def fail():
        with rounded_once(weights):
            assert all(weight.held is not None for weight in weights)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(weight.held is None for weight in weights)


def test_alignment_vanishes_for_a_student_that_is_its_teacher(teacher):
    student, objective, weights, _ = ready(teacher)
    for quantizer in student.quantizers().values():
        quantizer.enabled = False
    batch = Batch(smooth_images(4), None, torch.ones(4, 5) / 5)
    with rounded_once(weights):
        for weight in weights:
            weight.held = weight.master
        _, terms = objective(batch.images, objective.lesson(batch))
    assert float(terms["alignment"].detach()) < 1e-8
    assert float(terms["kl"].detach()) < 1e-6


@pytest.mark.parametrize("name", ["hast", "hast-reference", "hast+ait", "intraq"])
def test_recipes_train_and_leave_the_teacher_alone(teacher, images, name, tmp_path):
    before = copy.deepcopy(teacher.network.state_dict())
    recipe = load_recipe(name, bits="w4a4", settings=SMALL)
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        student = tune(teacher, attach(teacher, recipe), images, context=Context(metrics=metrics))
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert ("kl_harder" in last) == name.startswith("hast")
    assert ("alignment" in last) == name.startswith("hast")
    assert ("ce" in last) == (name == "intraq")
    assert student(images.images).isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())
    assert all(p.grad is None for p in teacher.network.parameters())


def test_any_terms_gradients_can_be_compared(teacher, images, tmp_path):
    settings = [*SMALL, "tuning.agreement_every=2", "tuning.agreement_terms=[kl, ce, alignment]"]
    recipe = load_recipe("intraq", bits="w4a4", settings=settings)
    with MetricsLog(tmp_path / "m.jsonl") as metrics:
        tune(teacher, attach(teacher, recipe), images, context=Context(metrics=metrics))
    found = [r for r in read_metrics(tmp_path / "m.jsonl") if r["stage"] == "agreement"]
    assert len(found) == 2
    assert {"kl,ce", "kl,alignment", "ce,alignment"} <= set(found[0])


def test_learning_brings_the_student_nearer(teacher, images):
    found = []
    for steps in (0, 120):
        recipe = load_recipe(
            "hast", bits="w2a4", settings=[*SMALL, f"tuning.steps={steps}", "tuning.lr=3e-4"]
        )
        student = tune(teacher, attach(teacher, recipe), images)
        with torch.no_grad():
            found.append(float(by_hand(teacher, student, images.images)))
    assert found[1] < 0.92 * found[0]


@pytest.mark.parametrize("protocol", ["edges-8bit", "integer"])
def test_hast_trains_folded_networks_too(teacher, images, protocol):
    settings = [*SMALL, "fold_batch_norm=true", "equalize=0.5", f"protocol={protocol}"]
    recipe = load_recipe("hast", bits="w4a4", settings=settings)
    assert tune(teacher, attach(teacher, recipe), images)(images.images).isfinite().all()


def test_an_interrupted_run_goes_on_to_the_same_weights(teacher, images, tmp_path, monkeypatch):
    from zsq.tuning import finetune

    monkeypatch.setattr(finetune, "CHECKPOINT_EVERY", 1)
    recipe = load_recipe("hast", bits="w4a4", settings=SMALL)
    whole = tune(teacher, attach(teacher, recipe), images)

    class Third(Killed):
        def save(self, name, tensors):
            Checkpoints.save(self, name, tensors)
            if int(tensors["done"]) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(teacher, attach(teacher, recipe), images,
             context=Context(checkpoints=Third(tmp_path, "finetune")))  # fmt: skip
    resumed = tune(teacher, attach(teacher, recipe), images,
                   context=Context(checkpoints=Checkpoints(tmp_path)))  # fmt: skip
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name])
