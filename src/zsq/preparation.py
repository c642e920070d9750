# SPDX-License-Identifier: Apache-2.0
"""What is done before tuning: batch norms folded, channels equalized, quantizers put on."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq.config import Finetuning, GeneratorSynthesis, Recipe, Reconstruction, load_recipe
from zsq.errors import RunError
from zsq.functional.affine import Grid
from zsq.quantizers.protocol import place
from zsq.runtime.ambient import own_modes
from zsq.runtime.context import Context
from zsq.student import Student, attach
from zsq.synthesis.images import ImageSet, image_set
from zsq.teacher.equalize import equalized, rescale
from zsq.teacher.teacher import Teacher
from zsq.tuning.equalizing import learn_equalization

#: Images that a prepared network is compared with its teacher on, and how far apart logits may be, relative
#: to the largest: rounding errors of float32 are a hundred times smaller even in deep networks.
CHECKED, TOLERANCE = 8, 1e-2


@own_modes()
def prepare(
    teacher: Teacher, recipe: Recipe | str = "genie", images: ImageSet | Tensor | None = None, *,
    context: Context | None = None,
) -> tuple[Teacher, Student]:  # fmt: skip
    """Do everything between images and tuning that a recipe says: fold, equalize, put quantizers on.

    Args:
        teacher: from `load_teacher`; stays as it is.
        recipe: its protocol, bits, and how channels are equalized.
        images: an `ImageSet`, or a normalised tensor (N, C, H, W), which say how large channels are; None
            where a generator is still to make them; where it begins a reconstruction, those of `first_images`.
        context: seed, device, progress; defaults to seed 0 on the CPU in float32.

    Returns:
        The teacher to tune against, which computes the same, and the student, for `tune`.

    Raises:
        UsageError: nothing to quantize, or an override that matches nothing.
        RunError: the loss became NaN while channels' factors were learned.
    """
    recipe, context = load_recipe(recipe), context or Context()
    if images is not None:
        images = image_set(images, teacher, context)
    ready, grids = prepared(teacher, recipe, images, context)
    context.group.align(ready.network)
    student = attach(ready, recipe)
    for name, grid in grids.items():
        student.quantizer(name).set_grid(grid)
    return ready, student


def prepared_teacher(
    teacher: Teacher, recipe: Recipe, images: ImageSet | None, context: Context | None = None
) -> Teacher:
    """Return the teacher as the recipe wants it before quantizers: folded, equalized, both or neither.

    Args:
        teacher: stays as it is.
        recipe: one whose generator learns with the student, before there are images, equalizes by the
            batch norms alone, and keeps them, as the generator learns from them; `attach` folds. If its
            student begins with a reconstruction there are images, and what they teach is added.
        images: give the channels' sizes for the others.
        context: where what is learned is kept, and how it is computed; None learns nothing, which makes
            little difference to which layers and tensors are sensitive.
    """
    return prepared(teacher, recipe, images, context)[0]


def prepared(
    teacher: Teacher, recipe: Recipe, images: ImageSet | None, context: Context | None
) -> tuple[Teacher, dict[str, Grid]]:
    """Return the teacher as `prepared_teacher` does, and the grids learned for its activations, by name."""
    learns = has_a_learning_generator(recipe)
    tuning = reconstruction_of(recipe)
    steps = equalization_steps(recipe)
    if images is None or (learns and not steps):
        if recipe.equalize == 0:
            return teacher, {}
        return equalized(teacher, None, recipe.equalize, fold=False), {}
    fold = recipe.fold_batch_norm or recipe.protocol == "integer"
    if not (fold or recipe.equalize or steps):
        return teacher, {}
    sample = None if learns else images.images[: recipe.tuning.calibration_images]
    ready = equalized(teacher, sample, recipe.equalize, fold=fold)
    _check_same(teacher, ready, images.images[:CHECKED])
    if not steps or context is None or tuning is None:
        return ready, {}
    placement = place(ready.network, recipe.protocol, recipe.bits, recipe.overrides)
    learned = learn_equalization(ready.network, placement, images.images, steps, tuning, context)
    rescale(ready.network, learned.factors)
    _check_same(teacher, ready, images.images[:CHECKED])
    return ready, learned.grids


@torch.no_grad()
def _check_same(teacher: Teacher, ready: Teacher, images: Tensor) -> None:
    """Refuse a prepared network that computes something else: all that follows is compared with it alone."""
    wanted, found = teacher(images), ready(images)
    if not bool(wanted.isfinite().all()):
        return  # of which others speak
    apart, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not apart <= TOLERANCE * size:
        raise RunError(
            f"folding batch norms and equalizing channels changed the network: its logits on {len(images)} images "
            f"are up to {apart:.3g} off, the largest is {size:.3g}. Leave both out with --set equalize=0 --set "
            "fold_batch_norm=false (and --set tuning.equalize_steps=0, where the recipe has it), and report the "
            "network, please."
        )


def reconstruction_of(recipe: Recipe) -> Reconstruction | None:
    """Return how a recipe reconstructs blocks, as all of its tuning or to begin with, or None."""
    tuning = recipe.tuning
    if isinstance(tuning, Finetuning):
        return tuning.start
    return tuning if isinstance(tuning, Reconstruction) else None


def equalization_steps(recipe: Recipe) -> int:
    """Return for how many steps a recipe learns how to equalize: no more than it tunes a unit for."""
    tuning = reconstruction_of(recipe)
    if tuning is None or recipe.bits.activations >= 8:
        return 0  # at 8 bits there is nothing to gain
    return min(tuning.equalize_steps, tuning.steps)


def has_a_learning_generator(recipe: Recipe) -> bool:
    """Whether a recipe's images come from a generator that learns with the student."""
    return isinstance(recipe.synthesis, GeneratorSynthesis) and isinstance(
        recipe.tuning, Finetuning
    )
