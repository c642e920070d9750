# SPDX-License-Identifier: Apache-2.0
"""Learned equalization: the same network, on which quantized activations cost the predictions less."""

import pytest
import torch
from helpers.networks import Concat, Inverted, Residual, smooth_images, with_own_statistics
from helpers.students import SHAPE, labelled_images, recipe, teacher_of

import zsq
from zsq import running
from zsq.analysis.runs import diagnose, kept_in
from zsq.artifact.networkfile import load_saved_teacher
from zsq.artifact.runfolder import RunFolder
from zsq.config import load_recipe
from zsq.errors import RunError, UsageError
from zsq.functional.affine import Grid
from zsq.preparation import equalization_steps, prepared_teacher
from zsq.quantizers.activation import ActivationQuantizer
from zsq.quantizers.protocol import place
from zsq.runtime.checkpoints import Checkpoints, load_tensors
from zsq.runtime.context import Context
from zsq.stages import tuned
from zsq.synthesis.images import ImageSet
from zsq.teacher.equalize import equalized, find_streams, rescale
from zsq.tuning import equalizing
from zsq.tuning.equalizing import RescaledQuantizer, learn_equalization


def uneven(make=Residual):
    """A teacher whose channels are of very unequal range, so that there is something to gain."""
    teacher = teacher_of(make)
    for module in teacher.network.modules():
        if type(module).__name__ == "BatchNorm":
            module.weight.data *= torch.linspace(0.2, 3, len(module.weight))
    return teacher


def learned_on(teacher, steps, context=None, protocol="edges-8bit"):
    network = equalized(teacher, None, 0).network
    chosen = recipe(bits="w8a3")
    placement = place(network, protocol, chosen.bits)
    images = smooth_images(64, seed=5)
    found = learn_equalization(
        network, placement, images, steps, chosen.tuning, context or Context()
    )
    return network, placement, found


def quantized(network, placement, grids):
    """Quantize the activations of a network on given grids."""
    student = equalizing.copy_network(network)
    equalizing.insert_quantizers(student, placement, ActivationQuantizer)
    for name, grid in grids.items():
        student.get_submodule(f"quantizers.{name}").set_grid(grid)
    return student


def divergence(network, placement, grids, x, wanted):
    """Return the mean divergence of a network with quantized activations, in float64."""
    student = quantized(network, placement, grids)
    with torch.no_grad():
        given, wanted = student(x).double().log_softmax(1), wanted.double().log_softmax(1)
    return float((wanted.exp() * (wanted - given)).sum(1).mean())


@pytest.mark.parametrize("make", [Residual, Inverted, Concat])
def test_outputs_stay_the_same(make):
    teacher = uneven(make)
    network, _, found = learned_on(teacher, 5)
    x = smooth_images(8)
    with torch.no_grad():
        rescale(network, found.factors)
        before, after = teacher(x), network(x)
    assert before.std() > 0.01
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("protocol", ["edges-8bit", "all-low-bit", "integer"])
def test_quantized_activations_cost_less_on_other_images(protocol):
    teacher = uneven()
    x = smooth_images(256, seed=9)
    with torch.no_grad():
        wanted = teacher(x)
    costs = []
    for steps in (0, 150):
        network, placement, found = learned_on(teacher, steps, protocol=protocol)
        rescale(network, found.factors)
        costs.append(divergence(network, placement, found.grids, x, wanted))
    assert costs[1] < 0.7 * costs[0]


@pytest.mark.parametrize("protocol", ["edges-8bit", "all-low-bit", "integer"])
@pytest.mark.parametrize("make", [Residual, Inverted, Concat])
def test_what_learns_is_the_rescaled_network(make, protocol, monkeypatch):
    """Factors on the quantizers, whatever they are, are worth what they are in the weights."""
    seen = []

    def draw(student, images, wanted, steps, context):
        for name, parameter in student.named_parameters():
            if name.endswith("logarithms"):
                parameter.data = torch.randn(parameter.shape).mul(0.5)
        seen.append(student)

    monkeypatch.setattr(equalizing, "_learn", draw)
    network, placement, found = learned_on(uneven(make), 1, protocol=protocol)
    rescale(network, found.factors)
    x = smooth_images(16, seed=7)
    with torch.no_grad():
        after = quantized(network, placement, found.grids)(x)
        torch.testing.assert_close(after, seen[0](x), atol=1e-4, rtol=1e-3)


def test_no_step_changes_nothing():
    _, _, found = learned_on(uneven(), 0)
    assert found.factors
    assert all(torch.equal(f, torch.ones_like(f)) for f in found.factors.values())


def test_tensors_of_a_stream_share_their_factors():
    network, placement, found = learned_on(uneven(), 5)
    streams = {s.tensors[0].name: s for s in find_streams(network)}
    assert set(found.factors) <= set(streams)
    for name, factor in found.factors.items():
        assert len(factor) == streams[name].channels(network)
        assert bool((factor > 0).all())
        assert float(factor.std()) > 0
    assert set(found.grids) == set(placement.activations)


def test_a_rescaled_quantizer_has_a_step_per_channel():
    """Its values and gradients are those of a grid for every channel by itself."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 5, 5) * torch.tensor([1.0, 2.0, 0.3]).view(1, 3, 1, 1)
    quantizer = ActivationQuantizer(3)
    quantizer.set_grid(Grid(torch.tensor(0.1), torch.tensor(0.0), torch.tensor(0.0)))
    logarithms = torch.nn.Parameter(torch.tensor([0.0, 0.7, -1.0]))
    module = RescaledQuantizer(quantizer, logarithms)
    outward = torch.randn(4, 3, 5, 5)
    (module(x) * outward).sum().backward()
    wanted = torch.zeros(3)
    for channel in range(3):
        step = 0.1 * float(logarithms[channel].detach().exp())
        ratio = x[:, channel] / step
        codes = ratio.round().clamp(0, 7)
        torch.testing.assert_close(module(x)[:, channel].detach(), codes * step)
        # LSQ's gradient of the step (arXiv 1902.08153, equation 3), times the step for its logarithm
        slope = torch.where(ratio > 7, codes, codes - ratio) * step
        wanted[channel] = (slope * outward[:, channel]).sum()
    torch.testing.assert_close(logarithms.grad, wanted, rtol=1e-4, atol=1e-4)


def test_slices_add_up_to_the_batch(monkeypatch):
    whole = learned_on(uneven(), 3)[2]
    monkeypatch.setattr(equalizing, "PIXELS", 8 * 8 * 10)
    parts = learned_on(uneven(), 3)[2]
    for name, factor in whole.factors.items():
        torch.testing.assert_close(parts.factors[name], factor, rtol=1e-3, atol=1e-3)


def test_what_was_learned_is_read_back(tmp_path, monkeypatch):
    context = Context(checkpoints=Checkpoints(tmp_path))
    _, _, first = learned_on(uneven(), 3, context)
    monkeypatch.setattr(equalizing, "_learn", None)  # another time it would fail
    _, _, second = learned_on(uneven(), 3, context)
    assert first.factors.keys() == second.factors.keys()
    assert all(torch.equal(first.factors[k], second.factors[k]) for k in first.factors)
    assert all(torch.equal(first.grids[k].scale, second.grids[k].scale) for k in first.grids)


def test_a_loss_that_is_no_number_stops_with_the_step_and_a_hint(monkeypatch):
    monkeypatch.setattr(equalizing, "TEMPERATURE", float("nan"))
    with pytest.raises(RunError, match=r"step 0 of equalization.*--set tuning\.equalize_steps=0"):
        learned_on(uneven(), 3)


@pytest.mark.parametrize(
    ("bits", "settings", "steps"),
    [
        ("w4a4", ["tuning.equalize_steps=200"], 4),  # no more than for a unit
        ("w4a4", ["tuning.equalize_steps=2"], 2),
        ("w4a4", ["tuning.equalize_steps=2", "tuning.steps=0"], 0),
        ("w4a8", ["tuning.equalize_steps=2"], 0),
    ],
)
def test_how_many_steps_are_made(bits, settings, steps):
    assert equalization_steps(recipe(*settings, bits=bits)) == steps


def test_training_end_to_end_learns_factors_only_for_a_reconstruction_to_begin_with():
    assert equalization_steps(load_recipe("hast")) == 0
    assert equalization_steps(load_recipe("hast", schedule="quick")) == 100
    without = load_recipe("hast", schedule="quick", settings=["tuning.start=null"])
    assert equalization_steps(without) == 0


def test_a_student_starts_from_what_was_learned():
    teacher, images = uneven(), labelled_images(uneven(), 32)
    settings = recipe("tuning.equalize_steps=4", "tuning.learn_activation_scale=false")
    context = Context()
    network = equalized(teacher, images.images, settings.equalize).network
    placement = place(network, settings.protocol, settings.bits)
    wanted = learn_equalization(network, placement, images.images, 4, settings.tuning, context)
    student = tuned(teacher, settings, images, context)
    for name, quantizer in student.quantizers().items():
        torch.testing.assert_close(quantizer.scale, wanted.grids[name].scale)


def test_without_surroundings_nothing_is_learned():
    """Looking at weights alone needs no factors; a run's own are read from its folder."""
    teacher, images = uneven(), labelled_images(uneven(), 16)
    settings = recipe("tuning.equalize_steps=4")
    plain = prepared_teacher(teacher, recipe(), images)
    same = prepared_teacher(teacher, settings, images)
    other = prepared_teacher(teacher, settings, images, Context())
    name, weight = next(iter(plain.network.named_parameters()))
    assert torch.equal(same.network.get_parameter(name), weight)
    assert not torch.equal(other.network.get_parameter(name), weight)


def test_a_run_keeps_what_it_learned_for_its_analysis(tmp_path, monkeypatch):
    settings = [
        "synthesis.images=8", "synthesis.batch=8", "synthesis.steps=2", "tuning.steps=3",
        "tuning.batch=8",
    ]  # fmt: skip
    network = with_own_statistics(Residual())
    zsq.quantize(
        network, "genie", settings=settings, input_shape=SHAPE, out=tmp_path / "run", report=False,
        compile=False,
    )  # fmt: skip
    kept = load_tensors(tmp_path / "run" / "equalization.safetensors")[0]
    assert any(name.startswith("factors.") for name in kept)
    monkeypatch.setattr(equalizing, "_learn", None)
    folder = RunFolder.open(tmp_path / "run")
    student = zsq.load(tmp_path / "run")
    teacher = load_saved_teacher(folder.require("teacher.safetensors"))
    images = ImageSet.load(folder.require("images.safetensors"))
    ready = prepared_teacher(teacher, student.recipe, images, kept_in(folder, student.recipe))
    for path, layer in student.layers().items():
        rounded, weight = layer.weight(), ready.network.get_submodule(path).weight
        assert float((rounded - weight).abs().max()) < 0.5 * float(weight.abs().max()), path
    assert diagnose(tmp_path / "run", images=4).to_dict()


def test_a_run_that_dies_before_its_student_is_saved_does_not_learn_again(tmp_path, monkeypatch):
    """Its blocks were tuned on these factors, so others would not fit them."""
    request = {
        "settings": ["synthesis.images=8", "synthesis.batch=8", "synthesis.steps=2", "tuning.steps=3"],
        "input_shape": SHAPE, "out": tmp_path / "run", "report": False, "compile": False,
    }  # fmt: skip
    torch.manual_seed(0)
    network = with_own_statistics(Residual())
    with monkeypatch.context() as dying:
        dying.setattr(running, "save_student", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            zsq.quantize(network, "genie", **request)
    monkeypatch.setattr(equalizing, "_learn", None)
    assert zsq.quantize(network, "genie", resume=True, **request).quantizers()


def test_a_lost_file_of_factors_is_made_again_and_never_guessed(tmp_path):
    settings = [
        "synthesis.images=8", "synthesis.batch=8", "synthesis.steps=2", "tuning.steps=3",
        "tuning.batch=8",
    ]  # fmt: skip
    network, out = with_own_statistics(Residual()), tmp_path / "run"

    def run(**more):
        zsq.quantize(
            network, "genie", settings=settings, input_shape=SHAPE, out=out, report=False, compile=False,
            seed=1, **more,
        )  # fmt: skip

    run()
    file = out / "equalization.safetensors"
    kept, student = load_tensors(file)[0], (out / "student.safetensors").read_bytes()
    file.unlink()
    with pytest.raises(UsageError, match=r"has no equalization\.safetensors.*--resume"):
        diagnose(out)
    assert not file.exists()
    run(resume=True)
    again = load_tensors(file)[0]
    assert kept.keys() == again.keys()
    assert all(torch.equal(values, again[name]) for name, values in kept.items())
    assert (out / "student.safetensors").read_bytes() == student
    assert diagnose(out).to_dict()
