# SPDX-License-Identifier: Apache-2.0
"""What is written to ONNX, judged by ONNX Runtime."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.networks import (
    DecomposedSplitAttention,
    Inverted,
    Net,
    Residual,
    SplitAttention,
    conv,
)
from helpers.students import SHAPE, image_set, teacher_of, tuned
from torch import nn

from zsq.errors import RunError, UsageError
from zsq.export.export import export_student
from zsq.export.parity import run_file
from zsq.export.simulate import IntegerSimulation
from zsq.student import attach
from zsq.teacher.fold import fold_batch_norms


def exported(make, path, **changes):
    teacher = teacher_of(make)
    student = tuned(teacher, **changes)
    images = image_set(16, seed=9).images
    return export_student(student, fold_batch_norms(teacher.network), images, path)


def logits(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


@pytest.mark.parametrize("make", [Residual, Inverted, SplitAttention])
@pytest.mark.parametrize("bits", ["w4a4", "w8a8", "w2a4"])
@pytest.mark.parametrize("protocol", ["edges-8bit", "integer"])
def test_the_file_computes_what_the_simulation_does_in_integers(tmp_path, make, bits, protocol):
    report, integer = exported(make, tmp_path / "n.onnx", bits=bits, protocol=protocol)
    images = image_set(40, seed=11).images
    ours = IntegerSimulation(integer)(images).detach().numpy()
    theirs = logits(tmp_path / "n.onnx", images)
    assert ours.std() > 0.01, "a constant would agree with anything"
    assert np.abs(ours - theirs).max() <= (ours.max() - ours.min()) / 255
    assert (ours.argmax(1) == theirs.argmax(1)).all()
    assert report.fused == report.convs > 0
    assert report.fused_matmuls == report.matmuls == 1
    assert report.agreement == 100
    assert report.identical == 100


@pytest.mark.parametrize("protocol", ["edges-8bit", "integer"])
def test_what_the_added_edges_cost_is_reported(tmp_path, protocol):
    teacher = teacher_of(Residual)
    student, images = tuned(teacher, bits="w4a4", protocol=protocol), image_set(64, seed=9).images
    report, integer = export_student(
        student, fold_batch_norms(teacher.network), images, tmp_path / "n.onnx"
    )
    with torch.no_grad():
        before, after = student(images), IntegerSimulation(integer)(images)
    same = float((before.argmax(1) == after.argmax(1)).double().mean())
    gap = before.softmax(1) * (before.log_softmax(1) - after.log_softmax(1))
    assert report.student_agreement == pytest.approx(100 * same)
    assert report.student_divergence == pytest.approx(float(gap.sum(1).mean()), rel=1e-3, abs=1e-7)
    assert report.student_divergence > 0, "biases on the accumulator's grid, at least"


@pytest.mark.parametrize("make", [SplitAttention, DecomposedSplitAttention])
def test_a_softmax_is_written_by_its_parts(tmp_path, make):
    report, _ = exported(make, tmp_path / "n.onnx")
    written = {node.op_type for node in onnx.load(tmp_path / "n.onnx").graph.node}
    assert "Exp" in written
    assert "Softmax" not in written
    assert report.agreement == 100


def test_the_file_is_opset_21_and_small_weights_are_int4(tmp_path):
    exported(Residual, tmp_path / "n.onnx", bits="w4a4")
    model = onnx.load(tmp_path / "n.onnx")
    onnx.checker.check_model(model)
    assert {o.domain: o.version for o in model.opset_import}[""] == 21
    kinds = [i.data_type for i in model.graph.initializer if len(i.dims) == 4]
    assert kinds.count(onnx.TensorProto.INT4) == 5, "all but the first convolution"
    assert kinds.count(onnx.TensorProto.INT8) == 1
    assert len(model.graph.input) == len(model.graph.output) == 1
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)


@pytest.mark.parametrize("bits", ["w2a4", "w4a4", "w6a8", "w8a8"])
def test_depthwise_layers_have_one_zero_point_which_the_fast_kernel_needs(tmp_path, bits):
    exported(Inverted, tmp_path / "n.onnx", bits=bits)
    model = onnx.load(tmp_path / "n.onnx")
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    producers = {name: n for n in model.graph.node for name in n.output}
    seen = 0
    for node in model.graph.node:
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type == "Conv" and groups > 1:
            weight = producers[node.input[1]]
            assert len(np.unique(constants[weight.input[2]])) == 1
            assert constants[weight.input[0]].shape[1] == 1
            seen += 1
    assert seen == 1


def test_a_layer_that_stays_float_is_an_error_whatever_its_kind(tmp_path):
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv(3, 4)
            self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            return self.head(torch.relu(self.up(self.body(x))).mean((2, 3)))

    with pytest.raises(RunError, match=r"would run in float"):
        exported(Up, tmp_path / "n.onnx")
    assert not (tmp_path / "n.onnx").exists()


@pytest.mark.parametrize(("differing", "refused"), [(1, False), (2, True)])
def test_a_file_that_disagrees_is_not_kept(tmp_path, monkeypatch, differing, refused):
    honest = run_file

    def lying(session, images):
        found = honest(session, images).clone()
        found[:differing] = -found[:differing]
        return found

    monkeypatch.setattr(sys.modules["zsq.export.parity"], "run_file", lying)
    if refused:
        with pytest.raises(RunError, match=r"another class than its simulation for 2 of 16"):
            exported(Residual, tmp_path / "n.onnx")
    else:
        exported(Residual, tmp_path / "n.onnx")
    assert (tmp_path / "n.onnx").exists() != refused


def test_any_batch_size_runs(tmp_path):
    exported(Residual, tmp_path / "n.onnx")
    images = image_set(5).images
    one = np.concatenate([logits(tmp_path / "n.onnx", x[None]) for x in images])
    assert np.array_equal(one, logits(tmp_path / "n.onnx", images))


def test_the_report_is_plain_data(tmp_path):
    report, _ = exported(Residual, tmp_path / "n.onnx")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["bytes"] == (tmp_path / "n.onnx").stat().st_size
    for key in ("agreement", "fused", "convs", "speedup", "latency_ms", "float_bytes"):
        assert plain[key] > 0


def test_an_activation_that_is_no_clamp_is_exported_too(tmp_path):
    def make():
        return Net(lambda m, x: m.b(nn.functional.silu(m.a(x))).relu(), a=conv(3, 4), b=conv(4, 4))

    report, integer = exported(make, tmp_path / "n.onnx", bits="w4a8")
    images = image_set(20, seed=3).images
    ours = IntegerSimulation(integer)(images).detach().numpy()
    theirs = logits(tmp_path / "n.onnx", images)
    assert np.abs(ours - theirs).max() <= (ours.max() - ours.min()) / 100
    assert report.fused == report.convs == 2


def test_fewer_fused_convolutions_than_expected_are_an_error(tmp_path, monkeypatch):
    from zsq.export import parity

    real = parity.read_fusion

    def one_missing(*files):
        found = real(*files)
        return type(found)(**{
            **vars(found), "fused_convs": found.fused_convs - 1, "unfused": ("a1: stays in float",),
        })  # fmt: skip

    monkeypatch.setattr(parity, "read_fusion", one_missing)
    path = tmp_path / "n.onnx"
    path.write_bytes(b"the file of before")
    with pytest.raises(RunError, match=r"1 of 7 layers would run in float: a1"):
        exported(Residual, path)
    assert path.read_bytes() == b"the file of before"


def test_bad_requests(tmp_path):
    teacher = teacher_of()
    student = tuned(teacher)
    float_network = fold_batch_norms(teacher.network)
    images = image_set(4).images
    with pytest.raises(UsageError, match="export target 'tpu' is unknown"):
        export_student(student, float_network, images, tmp_path / "n.onnx", target="tpu")
    fresh = attach(teacher, student.recipe)
    with pytest.raises(UsageError):
        export_student(fresh, float_network, images, tmp_path / "n.onnx")
    with pytest.raises(UsageError):
        export_student(student, float_network, torch.zeros(4, 3, 9, 9), tmp_path / "n.onnx")
    assert not (tmp_path / "n.onnx").exists()
    assert SHAPE == (3, 8, 8)


def test_added_edges_reach_further_than_the_images_as_far_as_the_recipe_says():
    from helpers.students import labelled_images, teacher_of

    from zsq.config import load_recipe
    from zsq.export.deploy import to_integer
    from zsq.stages import tune
    from zsq.student import attach

    teacher = teacher_of()
    images = labelled_images(teacher)
    scales = {}
    for margin in (1.0, 2.0):
        recipe = load_recipe("zeroq", settings=[f"tuning.edge_margin={margin}"])
        student = tune(teacher, attach(teacher, recipe), images)
        integer = to_integer(student, images.images)
        scales[margin] = {name: float(q.scale) for name, q in integer.quantizers().items()}
        own = set(student.quantizers())
    added = set(scales[1.0]) - own - {"x"}
    assert added
    assert any(name in scales[1.0] for name in own)
    for name, scale in scales[1.0].items():
        if name in added:
            assert scales[2.0][name] == pytest.approx(2 * scale, rel=1e-5)
        elif name in own:
            assert scales[2.0][name] == scale
