# SPDX-License-Identifier: Apache-2.0
"""A teacher to examine images with."""

import torch
from helpers.networks import Residual, smooth_images, with_own_statistics

from zsq.synthesis.images import ImageSet
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.teacher import ModelInfo, Teacher

SHAPE = (3, 8, 8)


def teacher_of(module):
    network = build_network(export_module(module.eval(), SHAPE))
    return Teacher(network.requires_grad_(False), ModelInfo("net", SHAPE))


def sure_teacher():
    """Return a network that is sure of its classes, all of which smooth images show."""
    torch.manual_seed(0)
    module = with_own_statistics(Residual())
    with torch.no_grad():
        module.fc.weight.mul_(40)
        module.fc.bias.zero_().sub_(module(smooth_images(256)).mean(0))
    return teacher_of(module)


def labelled(teacher, images):
    """Return images with the teacher's own labels."""
    with torch.no_grad():
        return ImageSet(images, teacher(images).argmax(1))
