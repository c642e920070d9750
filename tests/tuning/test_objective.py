# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuned student is asked for, against features that its own module computed."""

import pytest
import torch
from helpers.networks import conv, smooth_images, with_own_statistics
from helpers.students import teacher_of
from torch import nn
from torch.nn import functional

from zsq.config import Finetuning, load_recipe
from zsq.runtime.context import Context
from zsq.stages import tune
from zsq.student import attach
from zsq.synthesis.batches import Batch
from zsq.synthesis.images import ImageSet
from zsq.tuning.objective import Objective

IMAGES = smooth_images(8)


class LastChannels(nn.Module):
    """A block of linear layers on the last axis, which it can return instead of the logits."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = conv(3, 4), nn.BatchNorm2d(4)
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)
        self.head = nn.Linear(4, 10)

    def inner(self, x):
        return self.down(functional.gelu(self.up(x.permute(0, 2, 3, 1))))

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.inner(x).permute(0, 3, 1, 2)).mean((2, 3)))


def attention(x):
    """Return each channel's mean square as a share, of a map with its channels last."""
    energy = (x**2).mean((1, 2))
    return energy / energy.norm(dim=1, keepdim=True)


def test_alignment_compares_channels_where_they_are_last():
    """The teacher's half against what a hook sees in the module, the whole against the formula."""
    module = with_own_statistics(LastChannels())
    teacher = teacher_of(lambda: module)
    recipe = load_recipe(
        "hast", bits="w3a3", settings=["tuning.start=null", "equalize=0", "tuning.steps=1"]
    )
    student = tune(teacher, attach(teacher, recipe), ImageSet(IMAGES, torch.zeros(8).long()))
    assert isinstance(recipe.tuning, Finetuning)
    objective = Objective(teacher, student, recipe.tuning, Context())
    assert list(objective.blocks.values()) == [3]
    lesson = objective.lesson(Batch(IMAGES, None, torch.zeros(8, 10)))
    seen = {}
    with torch.no_grad():
        module.down.register_forward_hook(lambda _, __, out: seen.update(maps=out))
        module(IMAGES)
        for features in lesson.features:
            torch.testing.assert_close(features, seen["maps"].permute(0, 3, 1, 2))
        found = objective.separate(IMAGES, lesson, ["alignment"])["alignment"]
        _, ours = objective.student(IMAGES)
    gap = attention(ours) - attention(seen["maps"])
    assert float(found) == pytest.approx(float((gap**2).mean()), rel=1e-4)
    assert float(found) > 0
