# SPDX-License-Identifier: Apache-2.0
"""What is found out about a request before a run is begun: what cannot work, and what will not come of it."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq.config import (
    Finetuning,
    GeneratorSynthesis,
    MixedSynthesis,
    PixelSynthesis,
    Recipe,
    Reconstruction,
)
from zsq.errors import UsageError
from zsq.evaluation.folder import ImageFolder, open_for
from zsq.preparation import reconstruction_of
from zsq.quantizers.protocol import check_overrides, place
from zsq.runtime.group import Group
from zsq.runtime.progress import Reporter
from zsq.stages import learns_together
from zsq.student import prepared_network
from zsq.synthesis.centers import pooled_width
from zsq.synthesis.generators import reads_classifier
from zsq.synthesis.images import Images, ImageSet
from zsq.synthesis.objective import count_classes
from zsq.synthesis.pixels import loss_weights
from zsq.synthesis.qimera import classifier_rows
from zsq.teacher.inspect import floating_layers
from zsq.teacher.taps import tap_batch_norms
from zsq.teacher.teacher import Teacher
from zsq.tuning.objective import check_terms
from zsq.tuning.pieces import check_single_layers


def check_request(teacher: Teacher, recipe: Recipe, images: Images, group: Group) -> None:
    """Find out what cannot work before a run is begun, whose folder would be in the way afterwards.

    Args:
        teacher: stays as it is.
        recipe: resolved.
        images: of process 0; what the others hold is a name.
        group: the processes of the run.

    Raises:
        UsageError: nothing to quantize, nothing to synthesise images from or to
            compare features of, or unsuitable images.
    """
    network = prepared_network(teacher, recipe)
    placed = place(network, recipe.protocol, recipe.bits, recipe.overrides)
    check_overrides(network, placed, recipe.overrides)
    check_terms(teacher, recipe)
    reconstruction = reconstruction_of(recipe)
    if reconstruction is not None and reconstruction.unit == "layer":
        started = isinstance(recipe.tuning, Finetuning)
        check_single_layers(network, "tuning.start.unit" if started else "tuning.unit")
    if images is None:
        together = learns_together(recipe, images)
        _check_batches(recipe, recipe.synthesis.images, group, together=together)
        tap_batch_norms(teacher.network)
        _check_features(teacher, recipe)
    if group.rank or images is None:
        return
    if isinstance(images, Tensor):
        images = ImageSet(images, torch.zeros(len(images)))
    if isinstance(images, ImageSet):
        _check_batches(recipe, len(images.check(teacher.info.input_shape)), group, together=False)
        if isinstance(recipe.tuning, Finetuning):
            images.check_labels(count_classes(teacher))
    else:
        opened = open_for(teacher.info, images)
        count = min(recipe.synthesis.images, len(opened))
        _check_batches(recipe, count, group, together=False)
        if isinstance(recipe.tuning, Finetuning):
            _check_folders(opened, count_classes(teacher))


def _check_batches(recipe: Recipe, count: int, group: Group, *, together: bool) -> None:
    """Refuse more processes than there are images in a step.

    Args:
        recipe: resolved.
        count: of images to tune on.
        group: the processes of the run.
        together: a generator makes every batch that the student learns from.
    """
    tuning, synthesis = recipe.tuning, recipe.synthesis
    if together and isinstance(synthesis, GeneratorSynthesis):
        group.check_batch(synthesis.batch, "synthesis.batch")
    elif isinstance(tuning, Finetuning | Reconstruction):
        group.check_batch(min(tuning.batch, count), "tuning.batch")
    if isinstance(tuning, Finetuning) and tuning.start is not None:
        group.check_batch(min(tuning.start.batch, count), "tuning.start.batch")


def _check_features(teacher: Teacher, recipe: Recipe) -> None:
    """Refuse syntheses that ask for a classifier's rows or pooled features where there are none."""
    synthesis = recipe.synthesis
    for part in synthesis.parts if isinstance(synthesis, MixedSynthesis) else (synthesis,):
        if isinstance(part, PixelSynthesis) and "class_band" in loss_weights(part):
            pooled_width(teacher)
        if isinstance(part, GeneratorSynthesis) and reads_classifier(part):
            classifier_rows(teacher.network)


def _check_folders(opened: ImageFolder, classes: int) -> None:
    """Refuse a folder with images of more classes than a network has."""
    if len(opened.classes) > classes:
        raise UsageError(
            f"{opened.root} holds {len(opened.classes)} class folders but the network has {classes} "
            "classes; this recipe learns from labels, so leave a folder for each of them, in their order."
        )


def warn_of_floating(teacher: Teacher, recipe: Recipe, reporter: Reporter) -> None:
    """Say before a long run what will stay float that one would not expect to."""
    if recipe.protocol == "all-low-bit":
        network = prepared_network(teacher, recipe)
        if not place(network, recipe.protocol, recipe.bits, recipe.overrides).activations:
            reporter.note(
                f"protocol {recipe.protocol} quantizes no activation of this network: it looks behind ReLU, ReLU6 and "
                "hardtanh, and there are none. They stay float while the student is tuned, and have 8 bits in its "
                "ONNX file; --protocol edges-8bit quantizes what layers read"
            )
    found = floating_layers(teacher.network)
    if found:
        reporter.note(
            f"{len(found)} layers stay in float ({', '.join(found[:3])}): the student is quantized and kept, and "
            "its ONNX file refused; `zsq export RUN --allow-partial` writes it all the same"
        )
