# SPDX-License-Identifier: Apache-2.0
"""Range calibration: a student without training."""

import pytest
import torch
from helpers.networks import smooth_images
from helpers.students import teacher_of

from zsq.config import load_recipe
from zsq.functional.affine import dequantize, quantize
from zsq.functional.ranges import range_grid
from zsq.quantizers.minmax import minmax_grid
from zsq.stages import tune
from zsq.student import attach
from zsq.synthesis.images import ImageSet


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


def calibrated(teacher, bits, *settings, protocol=None):
    recipe = load_recipe("zeroq", bits=bits, settings=settings, protocol=protocol)
    return tune(
        teacher, attach(teacher, recipe), ImageSet(smooth_images(32), torch.zeros(32).long())
    )


def test_eight_bits_are_the_teacher(teacher):
    x = smooth_images(64, seed=9)
    student = calibrated(teacher, "w8a8")
    assert (student(x).argmax(1) == teacher(x).argmax(1)).float().mean() > 0.95


def test_weights_are_rounded_on_their_minmax_grid(teacher):
    student = calibrated(teacher, "w3a3")
    for path, layer in student.layers().items():
        weight = teacher.network.get_submodule(path).weight
        scale, zero_point = minmax_grid(weight, 3)
        expected = dequantize(quantize(weight, scale, zero_point, 7), scale, zero_point)
        assert torch.equal(layer.weight(), expected)


def test_first_ranges_follow_the_rule_asked_for(teacher):
    """The first activation reads what no other activation quantizer has touched."""
    for rule in ("minmax", "percentile", "error"):
        student = calibrated(teacher, "w8a4", f"tuning.ranges={rule}", "tuning.percentile=98")
        first, quantizer = next(iter(student.quantizers().items()))
        assert first.startswith("relu")
        x = student.network.stem_bn(student.network.stem(smooth_images(32))).relu()
        expected = range_grid(x, 4, rule, percentile=98)
        assert float(quantizer.scale) == pytest.approx(float(expected.scale), rel=0.1)


@pytest.mark.parametrize(("bits", "wider"), [("w8a8", 1.5), ("w8a4", 1.0)])
def test_the_margin_widens_ranges_of_eight_bits_only(teacher, bits, wider):
    plain, wide = (calibrated(teacher, bits, f"tuning.margin={margin}") for margin in (1, 1.5))
    first, quantizer = next(iter(plain.quantizers().items()))
    assert float(wide.quantizer(first).scale) == pytest.approx(wider * float(quantizer.scale))
    assert float(wide.quantizer(first).zero_point) == float(quantizer.zero_point)


def test_least_error_beats_minmax_at_low_bits(teacher):
    x = smooth_images(64, seed=9)
    wanted = teacher(x).softmax(1)

    def gap(*settings):
        return float((calibrated(teacher, "w3a3", *settings)(x).softmax(1) - wanted).abs().mean())

    assert gap("tuning.ranges=error", "tuning.weights=error") < gap()


@pytest.mark.parametrize("protocol", ["edges-8bit", "integer"])
def test_every_protocol_can_be_calibrated(teacher, protocol):
    student = calibrated(teacher, "w8a8", protocol=protocol)
    assert student(smooth_images(4)).isfinite().all()
