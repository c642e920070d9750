# SPDX-License-Identifier: Apache-2.0
"""What is said of a set of images, and when nothing is."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.examined import SHAPE, labelled, sure_teacher
from helpers.networks import smooth_images

from zsq.analysis.images import examine_images
from zsq.analysis.imagewarnings import find_warnings
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import Teacher


@pytest.fixture(scope="module")
def teacher():
    return sure_teacher()


@pytest.fixture(scope="module")
def diverse(teacher):
    return labelled(teacher, smooth_images(150, seed=4))


def test_a_diverse_set_has_no_warnings(teacher, diverse):
    assert examine_images(teacher, diverse, labelled(teacher, smooth_images(200))).warnings == ()


def test_copies_of_an_image_have_collapsed(teacher, diverse):
    noise = 1e-3 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    report = examine_images(teacher, labelled(teacher, diverse.images[:1] + noise))
    assert any("collapsed" in w and "nearest neighbour" in w for w in report.warnings)
    assert report.images.pixel_spread < 1e-4


def test_pixels_tell_of_a_collapse_that_features_hide(teacher, diverse):
    facts = examine_images(teacher, diverse).images
    (text,) = find_warnings(replace(facts, pixel_spread=0.012), None)
    assert "collapsed" in text
    assert "1.2% of their pixels" in text


@pytest.mark.parametrize(
    ("distance", "images", "collapsed"), [(0.05, 150, True), (0.03, 150, False), (0.05, 149, False)]
)
def test_real_images_set_the_measure_if_there_are_enough(
    teacher, diverse, distance, images, collapsed
):
    """A quarter of their distance; it grows as a set shrinks, so fewer images are no measure."""
    facts = replace(examine_images(teacher, diverse).images, nearest_distance=0.01)
    real = replace(facts, nearest_distance=distance, images=images)
    assert bool(find_warnings(facts, real)) == collapsed


def test_what_is_missing_and_uncertain_is_said(teacher, diverse):
    kept = diverse.labels != 3
    report = examine_images(teacher, ImageSet(diverse.images[kept], diverse.labels[kept]))
    assert any("1 of 5 classes are never shown (3)" in w for w in report.warnings)
    wrong = ImageSet(diverse.images, (diverse.labels + 1) % 5)
    report = examine_images(teacher, wrong, wrong)
    assert sum("confirms the labels of only 0%" in w for w in report.warnings) == 2
    skewed = torch.zeros_like(diverse.labels)
    skewed[:4] = torch.arange(1, 5)
    report = examine_images(teacher, ImageSet(diverse.images, skewed))
    assert any("class 0 has 146 of 150" in w for w in report.warnings)
    unsure = copy.deepcopy(teacher.network)
    unsure.get_submodule("fc").weight.data.mul_(1e-3)
    unsure.get_submodule("fc").bias.data.zero_()
    report = examine_images(Teacher(unsure, teacher.info), diverse)
    assert any("unsure" in w and "0.20" in w for w in report.warnings)


def test_broken_real_images_are_said(teacher, diverse):
    facts = examine_images(teacher, diverse).images
    (text,) = find_warnings(facts, replace(facts, broken=3))
    assert "3 of 150 real images" in text
