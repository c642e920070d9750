# SPDX-License-Identifier: Apache-2.0
"""Methods that tune weights first and activation steps in a pass of their own (BRECQ, AdaRound)."""

import pytest
import torch
from helpers.kills import Killed
from helpers.networks import Inverted
from helpers.students import image_set, recipe, same_weights, teacher_of, tuned, values

from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.student import calibrate_student, prepared_network
from zsq.tuning import reconstruct as module
from zsq.tuning.tuner import PieceTuner

AFTER = ["tuning.quantize_activations=after", "tuning.mix=1", "tuning.drop=0"]


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


def codes(student):
    return {path: layer.frozen.codes() for path, layer in student.layers().items()}


@pytest.fixture
def problems(monkeypatch):
    seen = []

    class Spy(PieceTuner):
        def __init__(self, piece, problem, settings, context, **options):
            super().__init__(piece, problem, settings, context, **options)
            enabled = [m.enabled for m in piece.student.modules() if hasattr(m, "enabled")]
            seen.append((piece, problem, settings, any(enabled), bool(self.weights)))

    monkeypatch.setattr(module, "PieceTuner", Spy)
    return seen


def test_weights_are_tuned_with_float_activations(teacher, problems):
    student = tuned(teacher, *AFTER)
    assert [weights for *_, weights in problems] == [True] * 4
    assert not any(enabled for *_, enabled, _ in problems)
    for part in student.quantizers().values():
        part.enabled = False
    images = image_set().images
    ours = values(student.network, images)
    for piece, problem, *_ in problems:
        assert torch.allclose(problem.from_student, ours[piece.source], atol=1e-5)


def test_without_a_pass_of_their_own_activation_steps_are_calibrated_at_the_end(teacher):
    student = tuned(teacher, *AFTER)
    reference = student.copy()
    for quantizer in reference.quantizers().values():
        quantizer.calibrated.fill_(False)
        quantizer.enabled = False
    calibrate_student(reference, image_set().images)
    for name, quantizer in student.quantizers().items():
        assert quantizer.scale.item() == pytest.approx(reference.quantizer(name).scale.item())


def test_the_second_pass_moves_activation_steps_only(teacher, problems):
    first = tuned(teacher, *AFTER)
    count = len(problems)
    both = tuned(teacher, *AFTER, "tuning.activation_steps=5", "tuning.activation_lr=0.05")
    later = problems[2 * count :]
    assert [weights for *_, weights in later] == [False] * count
    assert {settings.steps for _, _, settings, *_ in later} == {5}
    assert all(torch.equal(v, codes(first)[k]) for k, v in codes(both).items())
    scales = [{n: q.scale.item() for n, q in s.quantizers().items()} for s in (first, both)]
    assert scales[0].keys() == scales[1].keys()
    assert all(scales[0][n] != scales[1][n] for n in scales[0])


def test_the_second_pass_reads_the_teachers_values(teacher, problems):
    tuned(teacher, *AFTER, "tuning.activation_steps=2")
    network = prepared_network(teacher, recipe())
    theirs = values(network, image_set().images)
    for piece, problem, settings, *_ in problems[4:]:
        assert settings.mix == 0
        assert torch.allclose(problem.from_teacher, theirs[piece.source], atol=1e-5)
        assert torch.allclose(problem.target, theirs[piece.output], atol=1e-5)


@pytest.mark.parametrize("last", ["piece_001", "piece_003", "activations_000", "activations_003"])
def test_both_passes_can_be_resumed(teacher, tmp_path, last):
    settings = [*AFTER, "tuning.activation_steps=3"]
    expected = tuned(teacher, *settings)
    with pytest.raises(KeyboardInterrupt):
        tuned(teacher, *settings, context=Context(checkpoints=Killed(tmp_path, last)))
    resumed = tuned(teacher, *settings, context=Context(checkpoints=Checkpoints(tmp_path)))
    assert same_weights(resumed, expected)


def test_single_layers_of_any_protocol_can_be_tuned_before_activations():
    own = teacher_of(Inverted)
    for protocol in ("edges-8bit", "integer", "all-low-bit"):
        student = tuned(own, *AFTER, "tuning.unit=layer", protocol=protocol, bits="w8a8")
        x = image_set().images
        expected = own(x)
        assert float((student(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())
