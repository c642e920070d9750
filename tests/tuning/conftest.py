# SPDX-License-Identifier: Apache-2.0
"""A small teacher and images that it labelled, for the tests of this folder that bring none."""

import pytest
from helpers.students import labelled_images, teacher_of


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


@pytest.fixture(scope="module")
def images(teacher):
    return labelled_images(teacher, 24)
