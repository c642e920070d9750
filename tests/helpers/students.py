# SPDX-License-Identifier: Apache-2.0
"""Small teachers, and students of them, for tests of tuning."""

import torch
from helpers.networks import Residual, smooth_images, with_own_statistics
from torch.fx import Interpreter

from zsq.config import load_recipe
from zsq.runtime.context import Context
from zsq.student import attach
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import load_teacher
from zsq.tuning.reconstruct import reconstruct

SHAPE = (3, 8, 8)


def teacher_of(make=Residual):
    torch.manual_seed(0)
    return load_teacher(with_own_statistics(make()), input_shape=SHAPE)


def labelled_images(teacher, count=32, seed=0):
    """Return smooth images with the teacher's own labels."""
    x = smooth_images(count, seed=seed)
    with torch.no_grad():
        return ImageSet(x, teacher(x).argmax(1))


#: Few steps, and everything that tests rely on, whatever the recipes of the day are.
FEW = [
    "tuning.steps=4", "tuning.batch=8", "tuning.unit=block", "tuning.drop=0.5", "tuning.mix=0.5",
    "tuning.learn_weight_scale=true", "tuning.learn_activation_scale=true", "tuning.warmup=0.2",
    "tuning.log_scale=true", "tuning.rounding_lr=0.001", "tuning.scale_lr=0.005",
    "tuning.activation_lr=0.001", "tuning.bias_lr=0", "tuning.rounding_weight=1",
    "tuning.loss_power=2", "tuning.power=2.4", "tuning.asymmetric=true",
    "tuning.calibration_images=256", "tuning.quantize_activations=together",
    "fold_batch_norm=true",
]  # fmt: skip


def recipe(*settings, bits="w3a3", **changes):
    """Return a GENIE recipe of few steps; later settings win."""
    return load_recipe("genie", bits=bits, settings=[*FEW, *settings], **changes)


def image_set(count=24, seed=5):
    return ImageSet(smooth_images(count, SHAPE, seed), torch.zeros(count, dtype=torch.long))


def tuned(teacher, *settings, images=None, context=None, **changes):
    student = attach(teacher, recipe(*settings, **changes))
    return reconstruct(teacher, student, images or image_set(), context or Context())


def planned(plan, teacher, recipe, **changes):
    """Return a recipe with a plan put into effect, as a run does."""
    resolved = load_recipe(recipe, bits=plan.widths(), **changes)
    return load_recipe(resolved, overrides=plan.overrides(teacher, resolved))


class Values(Interpreter):
    """Every node's value, by name."""

    def __init__(self, network, x):
        super().__init__(network)
        self.seen = {}
        with torch.no_grad():
            self.run(x)

    def run_node(self, n):
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


def values(network, x):
    return Values(network, x).seen


def same_weights(first, second):
    """Whether two students have the same state, to the bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
