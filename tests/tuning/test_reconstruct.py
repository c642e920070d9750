# SPDX-License-Identifier: Apache-2.0
"""Reconstruction of a whole network: better than rounding, right inputs, repeatable, resumable."""

import pytest
import torch
from helpers.kills import Killed
from helpers.networks import Inverted, Parallel
from helpers.students import SHAPE, image_set, recipe, same_weights, teacher_of, tuned, values

from zsq.errors import RunError, UsageError
from zsq.functional.affine import search_weight_grid
from zsq.runtime.amounts import size
from zsq.runtime.checkpoints import Checkpoints, load_tensors, save_tensors
from zsq.runtime.context import Context
from zsq.runtime.metrics import MetricsLog, read_metrics
from zsq.runtime.policy import Policy
from zsq.runtime.progress import QuietReporter
from zsq.student import attach, prepared_network
from zsq.synthesis.images import ImageSet
from zsq.tuning import pieces
from zsq.tuning import reconstruct as module
from zsq.tuning.pieces import block_pieces
from zsq.tuning.reconstruct import reconstruct, run
from zsq.tuning.tuner import PASS, PieceTuner


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


# --- what it is for ------------------------------------------------------------------------------


def errors(teacher, student, x):
    """Mean squared error of every block's output, and of the logits, against the teacher's."""
    ours = values(student.network, x)
    theirs = values(prepared_network(teacher, student.recipe), x)
    cuts = ["relu_default", "relu_default_2", "relu_default_4", "fc"]
    return {c: float((ours[c] - theirs[c]).square().mean()) for c in cuts}


@pytest.mark.parametrize(("unit", "most"), [("block", 16), ("layer", 16), ("block", 2)])
def test_every_block_is_nearer_to_the_teacher_than_rounding_to_nearest(
    teacher, monkeypatch, unit, most
):
    monkeypatch.setattr(pieces, "MAX_LAYERS", most)
    settings = ["tuning.steps=150", "tuning.batch=16", f"tuning.unit={unit}"]
    images, unseen = image_set(64), image_set(200, seed=9).images
    # the bits need a faster rate to settle in so few steps
    student = tuned(teacher, *settings, "tuning.rounding_lr=0.02", bits="w2a4", images=images)
    nearest = tuned(teacher, "tuning.steps=0", bits="w2a4", images=images)
    for x, factor in ((images.images, 0.8), (unseen, 0.9)):
        ours, theirs = errors(teacher, student, x), errors(teacher, nearest, x)
        for cut in ("relu_default_2", "relu_default_4", "fc"):
            assert ours[cut] < factor * theirs[cut], (cut, ours, theirs)


def test_without_steps_every_weight_is_the_nearest_code(teacher):
    student = tuned(teacher, "tuning.steps=0")
    network = prepared_network(teacher, student.recipe)
    for path, layer in student.layers().items():
        weight = network.get_submodule(path).weight
        step = layer.frozen.scale.reshape(-1, *[1] * (weight.ndim - 1))
        zero = layer.frozen.zero_point.reshape(step.shape)
        codes = ((weight / step).round() + zero).clamp(0, 2**layer.bits - 1)
        assert torch.equal(layer.frozen.codes().float(), codes)
    assert all(bool(q.calibrated) and q.enabled for q in student.quantizers().values())


# --- what comes out ------------------------------------------------------------------------------


def test_tuned_weights_are_codes_next_to_the_float_weights(teacher):
    student = tuned(teacher, "tuning.steps=30", "tuning.rounding_lr=0.1")
    network = prepared_network(teacher, student.recipe)
    moved = 0
    for path, layer in student.layers().items():
        weight = network.get_submodule(path).weight
        grid = search_weight_grid(weight, layer.bits)
        shape = (-1, *[1] * (weight.ndim - 1))
        floor = torch.floor(weight / grid.scale.reshape(shape)) + grid.zero_point.reshape(shape)
        codes = layer.frozen.codes().float()
        high = 2**layer.bits - 1
        up, down = (floor + 1).clamp(0, high), floor.clamp(0, high)
        assert bool(((codes == up) | (codes == down)).all())
        moved += int((codes != (weight / grid.scale.reshape(shape)).round().add(
            grid.zero_point.reshape(shape)).clamp(0, high)).sum())  # fmt: skip
        assert torch.equal(layer.frozen.zero_point, grid.zero_point)
        for channel in layer.weight():
            assert len(channel.unique()) <= 2**layer.bits
    assert moved > 0, "some bits were learned away from the nearest"


def test_a_tuned_student_is_constant(teacher):
    student = tuned(teacher)
    x = image_set().images
    assert torch.equal(student(x), student(x))
    assert not any(p.requires_grad for p in student.parameters())
    assert all(q.drop == 0 and q.enabled for q in student.quantizers().values())


def test_the_teacher_and_the_biases_stay_as_they_are(teacher):
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    student = tuned(teacher)
    after = teacher.network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    network = prepared_network(teacher, student.recipe)
    for path, layer in student.layers().items():
        assert torch.equal(layer.bias, network.get_submodule(path).bias)


@pytest.mark.parametrize("protocol", ["integer", "all-low-bit"])
@pytest.mark.parametrize("make", [None, Inverted])
def test_every_protocol_can_be_tuned(teacher, make, protocol):
    own = teacher if make is None else teacher_of(make)
    student = tuned(own, protocol=protocol, bits="w8a8")
    x = image_set().images
    expected = own(x)
    assert float((student(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_norms_that_are_not_folded_can_be_tuned_around(teacher):
    student = tuned(teacher, "fold_batch_norm=false", bits="w8a8")
    x = image_set().images
    expected = teacher(x)
    assert float((student(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert "network.a1_bn.running_mean" in student.state_dict()


def test_single_layers_of_an_integer_student_can_be_tuned():
    tuned(teacher_of(Inverted), "tuning.unit=layer", protocol="integer")


# --- what every piece is given -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "most", "count"), [("block", 16, 4), ("layer", 16, 7), ("block", 2, 6)]
)
def test_pieces_get_the_teachers_and_the_tuned_students_values(
    teacher, monkeypatch, unit, most, count
):
    monkeypatch.setattr(pieces, "MAX_LAYERS", most)
    problems = []

    class Spy(PieceTuner):
        def __init__(self, piece, problem, *rest, **options):
            problems.append((piece, problem))
            super().__init__(piece, problem, *rest, **options)

    monkeypatch.setattr(module, "PieceTuner", Spy)
    images = image_set()
    student = tuned(teacher, f"tuning.unit={unit}", images=images)
    theirs = values(prepared_network(teacher, student.recipe), images.images)
    ours = values(student.network, images.images)  # earlier pieces were final when they were read
    assert len(problems) == count
    for piece, problem in problems:
        assert torch.allclose(problem.from_teacher, theirs[piece.source], atol=1e-5), piece.name
        assert torch.allclose(problem.target, theirs[piece.output], atol=1e-5), piece.name
        assert torch.allclose(problem.from_student, ours[piece.source], atol=1e-5), piece.name
    piece, problem = problems[-1]
    assert not torch.allclose(problem.from_student, problem.from_teacher, atol=1e-3)


def test_a_piece_that_is_tuned_in_parts_is_said(monkeypatch):
    notes = []
    reporter = QuietReporter()
    reporter.note = notes.append
    tuned(teacher_of(Parallel), "tuning.steps=2", context=Context(reporter=reporter))
    assert any(
        "18 layers without a cut between them are reconstructed in 10 parts" in n for n in notes
    )


def test_many_images_pass_a_few_at_a_time_in_order(teacher):
    piece = block_pieces(teacher.network, attach(teacher, recipe("fold_batch_norm=false")))[1]
    x = torch.randn(2 * PASS + 3, 4, 8, 8)
    assert torch.allclose(run(piece.teacher, x, Context()), piece.teacher(x), atol=1e-6)


# --- repeatable and resumable --------------------------------------------------------------------


def test_a_seed_decides_everything(teacher):
    torch.manual_seed(1)
    first = tuned(teacher, context=Context(seed=3))
    torch.manual_seed(2)
    assert same_weights(first, tuned(teacher, context=Context(seed=3)))
    assert not same_weights(first, tuned(teacher, context=Context(seed=4)))


@pytest.mark.parametrize(("unit", "most"), [("block", 16), ("layer", 16), ("block", 2)])
@pytest.mark.parametrize("last", ["piece_000", "piece_002", "piece_003"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    teacher, tmp_path, monkeypatch, last, unit, most
):
    monkeypatch.setattr(pieces, "MAX_LAYERS", most)
    setting = f"tuning.unit={unit}"
    expected = tuned(teacher, setting)
    with pytest.raises(KeyboardInterrupt):
        tuned(teacher, setting, context=Context(checkpoints=Killed(tmp_path, last)))
    torch.manual_seed(99)
    resumed = tuned(teacher, setting, context=Context(checkpoints=Checkpoints(tmp_path)))
    assert same_weights(resumed, expected)
    x = image_set().images
    assert torch.equal(resumed(x), expected(x))


def test_learned_biases_are_resumed_too(teacher, tmp_path):
    setting = "tuning.bias_lr=0.01"
    expected = tuned(teacher, setting)
    assert not torch.equal(expected.layers()["a1"].bias, tuned(teacher).layers()["a1"].bias)
    with pytest.raises(KeyboardInterrupt):
        tuned(teacher, setting, context=Context(checkpoints=Killed(tmp_path, "piece_001")))
    resumed = tuned(teacher, setting, context=Context(checkpoints=Checkpoints(tmp_path)))
    assert same_weights(resumed, expected)


def test_finished_pieces_are_not_tuned_again(teacher, tmp_path):
    context = Context(checkpoints=Checkpoints(tmp_path))
    tuned(teacher, context=context)
    path = tmp_path / "piece_001.safetensors"
    tensors = load_tensors(path)[0]
    save_tensors(path, {**tensors, "a1.codes": torch.zeros_like(tensors["a1.codes"])})
    student = tuned(teacher, context=context)
    assert int(student.layers()["a1"].frozen.codes().max()) == 0
    assert int(student.layers()["a2"].frozen.codes().max()) > 0


def test_metrics_name_the_piece(teacher, tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        tuned(teacher, context=Context(metrics=log))
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["stage"] == "tuning"]
    assert {r["piece"] for r in records} == {"stem", "a1 + a2", "b1 + b2", "fc"}
    ends = [r for r in records if "undecided" in r]
    assert len(ends) == 4
    assert all(0 <= r["undecided"] <= 1 for r in ends)


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_the_piece_the_step_and_a_hint(teacher):
    with pytest.raises(
        RunError, match=r"of stem became nan at or before step 3\. Lower tuning\.rounding_lr"
    ):
        tuned(teacher, "tuning.scale_lr=1e30")


def test_images_that_do_not_suit_are_refused_before_anything_long(teacher):
    student = attach(teacher, recipe())
    wrong = ImageSet(torch.zeros(4, 3, 9, 9), torch.zeros(4))
    with pytest.raises(UsageError, match=r"\(3, 9, 9\) but the network takes \(3, 8, 8\)"):
        reconstruct(teacher, student, wrong, Context())
    nan = ImageSet(torch.full((4, *SHAPE), float("nan")), torch.zeros(4))
    with pytest.raises(UsageError, match="NaN"):
        reconstruct(teacher, student, nan, Context())


# --- memory --------------------------------------------------------------------------------------


def test_weights_do_not_depend_on_where_block_inputs_lie(tmp_path):
    reporter = QuietReporter()
    notes = []
    reporter.note = notes.append
    students = []
    for memory in (None, 1000):
        policy = Policy(memory=memory)
        context = Context(
            policy=policy, reporter=reporter, checkpoints=Checkpoints(tmp_path / str(memory))
        )
        students.append(tuned(teacher_of(), context=context))
    assert same_weights(*students)
    assert "all in memory" in notes[0]
    assert "lie in files" in notes[1]
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".cache"]


def test_what_single_layers_take_is_said_before(teacher):
    """Two inputs and the target of the largest: the stem, 3 channels to 4."""
    notes = []
    reporter = QuietReporter()
    reporter.note = notes.append
    student = attach(teacher, recipe("tuning.unit=layer", "tuning.steps=1"))
    pictures = ImageSet(torch.randn(16, *SHAPE), torch.zeros(16, dtype=torch.long))
    reconstruct(teacher, student, pictures, Context(reporter=reporter))
    assert f"take up to {size(16 * 4 * (2 * 3 + 4) * 64)} " in notes[0]
