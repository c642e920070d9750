# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on equalized networks: with a generator's images, before there is any, and with given ones."""

import pytest
import torch
from helpers.students import labelled_images, teacher_of

from zsq import together
from zsq.config import load_recipe
from zsq.preparation import prepared_teacher
from zsq.runtime.context import Context
from zsq.stages import produce
from zsq.teacher.layers import BatchNorm

SMALL = [
    "synthesis.steps=4", "synthesis.batch=8", "synthesis.images=8", "tuning.steps=0",
    "tuning.range_steps=3", "tuning.batch=8",
]  # fmt: skip
TWO = [
    "synthesis.images=8",
    "synthesis.steps=2",
    "tuning.steps=0",
    "tuning.range_steps=1",
    "tuning.batch=8",
]


@pytest.fixture(scope="module")
def teacher():
    """One whose batch norms, and so its channels, are of unequal size."""
    made = teacher_of()
    for module in made.network.modules():
        if isinstance(module, BatchNorm):
            module.weight.data *= torch.linspace(0.5, 2, len(module.weight))
    return made


def gammas(network):
    return torch.cat([m.weight.detach() for m in network.modules() if isinstance(m, BatchNorm)])


def recipe(name, *settings):
    chosen = SMALL if "gdfq" in name else TWO
    return load_recipe(name, bits="w8a8", settings=[*chosen, *settings])


@pytest.mark.parametrize("name", ["gdfq", "gdfq+ait", "hast"])
def test_a_student_starts_as_the_equalized_teacher(teacher, name):
    images = None if "gdfq" in name else labelled_images(teacher, 16)
    plain, _ = produce(teacher, recipe(name), images, Context())
    student, kept = produce(teacher, recipe(name, "equalize=1"), images, Context())
    assert torch.equal(gammas(plain.network), gammas(teacher.network))
    assert not torch.allclose(gammas(student.network), gammas(teacher.network), rtol=0.05)
    x = labelled_images(teacher, 32, seed=3).images
    with torch.no_grad():
        wanted, found = teacher(x), student(x)
    assert float((found - wanted).square().mean()) < 0.02 * float(wanted.var())
    assert kept.images.isfinite().all()


@pytest.mark.parametrize("fold", ["false", "true"])
def test_networks_are_equalized_alike_while_learning_and_when_looked_at(teacher, fold):
    """A diagnosis has the images that the generator made; training had none when it began."""
    chosen = recipe("gdfq", "equalize=0.5", f"fold_batch_norm={fold}")
    first = prepared_teacher(teacher, chosen, None)
    later = prepared_teacher(teacher, chosen, labelled_images(teacher, 16))
    for a, b in zip(first.network.parameters(), later.network.parameters(), strict=True):
        assert torch.equal(a, b)
    student, _ = produce(teacher, chosen, None, Context())
    assert bool(gammas(teacher.network).numel())
    left = [m for m in student.network.modules() if isinstance(m, BatchNorm)]
    assert bool(left) == (fold == "false")


def test_without_equalization_and_folding_the_teacher_is_taken_as_it_is():
    teacher = teacher_of()
    assert prepared_teacher(teacher, recipe("hast"), labelled_images(teacher, 4)) is teacher
    assert prepared_teacher(teacher, recipe("gdfq"), None) is teacher


def test_the_generator_learns_from_the_network_as_it_came(teacher, monkeypatch):
    """Qimera's embeddings start from the classifier, whose columns equalization scales."""
    given = []

    class Watched(together.GeneratorLearner):
        def __init__(self, source, *args, **more):
            given.append(source)
            super().__init__(source, *args, **more)

    monkeypatch.setattr(together, "GeneratorLearner", Watched)
    produce(teacher, recipe("gdfq", "equalize=1"), None, Context())
    assert given == [teacher]
