# SPDX-License-Identifier: Apache-2.0
"""Batch norms that fine-tuning kept are folded into integers exactly, whatever the sign of gamma."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.networks import Inverted, Residual
from helpers.students import image_set, teacher_of
from helpers.students import labelled_images as labelled

from zsq.config import load_recipe
from zsq.export.export import export_student
from zsq.export.folding import fold_batch_norms, fold_into_frozen
from zsq.export.simulate import IntegerSimulation
from zsq.quantizers.layers import QuantizedLayer
from zsq.quantizers.weight import FrozenWeight
from zsq.stages import tune
from zsq.student import attach
from zsq.teacher.fold import fold_batch_norms as fold_teacher
from zsq.teacher.fold import module_of
from zsq.teacher.layers import BatchNorm

ARGUMENTS = ([1, 1], [1, 1], [1, 1], 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_layer_is_the_layer_and_its_batch_norm(bits, bias):
    torch.manual_seed(bits)
    codes = torch.randint(2**bits, (6, 3, 3, 3)).float()
    zero = torch.randint(2**bits, (6,)).float()
    weight = FrozenWeight(codes, torch.rand(6) + 0.1, zero, bits)
    own = torch.randn(6) if bias else None
    layer = QuantizedLayer("aten.conv2d.default", ARGUMENTS, weight, own)
    gamma = torch.tensor([1.5, -0.7, 0.0, -2.0, 0.3, 1.0])
    norm = BatchNorm(gamma, torch.randn(6), torch.randn(6), torch.rand(6) + 0.1, 1e-5)
    x = torch.randn(4, 3, 5, 5)
    before = copy.deepcopy(layer.state_dict())
    folded = fold_into_frozen(layer, norm)
    with torch.no_grad():
        expected, found = norm(layer(x)), folded(x)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    new = folded.frozen
    assert torch.equal(new.integers[1].float(), 2**bits - 1 - codes[1]), "a negative gamma mirrors"
    assert torch.equal(new.integers[0].float(), codes[0])
    assert float(found[:, 2].std()) < 1e-6, "a gamma of zero leaves the shift alone"
    assert int(new.integers.min()) >= 0
    assert int(new.integers.max()) < 2**bits
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in before.items())


def with_signed_gammas(student):
    """Change every batch norm that is kept: some channels mirrored, some silent."""
    torch.manual_seed(3)
    norms = [m for m in student.network.modules() if isinstance(m, BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            signs = torch.ones_like(norm.weight)
            signs[::3], signs[1] = -1.0, 0.0
            norm.weight.mul_(signs)
    return len(norms)


@pytest.mark.parametrize("make", [Residual, Inverted])
def test_a_student_with_negative_gammas_survives_folding_and_export(tmp_path, make):
    teacher = teacher_of(make)
    changes = {"fold_batch_norm": False, "equalize": 0.0, "tuning": {"method": "calibrate"}}
    raw = attach(teacher, load_recipe("genie", bits="w4a8", protocol="all-low-bit", **changes))
    assert with_signed_gammas(raw) > 2
    student = tune(teacher, raw, labelled(teacher))
    images = image_set(24, seed=9).images
    with torch.no_grad():
        expected = student(images)
        folded = copy.deepcopy(student)
        fold_batch_norms(folded.network)
        found = folded(images)
    called = [module_of(folded.network, node) for node in folded.network.graph.nodes]
    assert not any(isinstance(module, BatchNorm) for module in called)
    # a value on the edge between two codes may fall to either side in another order of float32
    assert float((found - expected).abs().max()) < 0.05 * float(expected.std())
    report, integer = export_student(
        student, fold_teacher(teacher.network), images, tmp_path / "n.onnx"
    )
    assert report.fused == report.convs > 0
    with torch.no_grad():
        ours = IntegerSimulation(integer)(images).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx", providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert (ours.argmax(1) == theirs.argmax(1)).all()
    # the file's added 8-bit edges are small beside what mirrored the wrong way would do
    close = np.corrcoef(theirs.ravel(), expected.numpy().ravel())[0, 1]
    assert close > 0.99
