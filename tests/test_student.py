# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers.networks import (
    Inverted,
    Net,
    Residual,
    conv,
    randomise,
    smooth_images,
    with_own_statistics,
)
from helpers.students import SHAPE, recipe, same_weights, teacher_of, tuned

import zsq
from zsq.config import Override, load_recipe
from zsq.errors import UsageError
from zsq.export.deploy import to_integer
from zsq.functional.affine import Grid
from zsq.quantizers.weight import FrozenWeight, SoftRoundWeight
from zsq.runtime.context import Context
from zsq.runtime.policy import make_policy
from zsq.student import attach, calibrate_student, prepared_network
from zsq.teacher.layers import BatchNorm
from zsq.teacher.teacher import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return teacher_of()


def calibrated(teacher, *settings, **changes):
    student = attach(teacher, recipe(*settings, **changes))
    calibrate_student(student, smooth_images(16))
    return student.freeze()


def bits_of(student):
    return (
        {path: layer.bits for path, layer in student.layers().items()},
        {name: quantizer.bits for name, quantizer in student.quantizers().items()},
    )


def test_a_fresh_student_computes_what_the_teacher_computes_where_weights_are_in_range(teacher):
    """Soft bits start at the float weights and activations are not quantized yet."""
    student = attach(teacher, recipe(bits="w8a8"))
    x = smooth_images(8, seed=3)
    expected = teacher(x)
    error = (student(x) - expected).abs().max().detach()
    assert float(error) < 0.02 * float(expected.abs().max())
    assert not any(q.enabled or bool(q.calibrated) for q in student.quantizers().values())


def test_recipes_that_tune_learn_the_rounding_and_those_that_do_not_round(teacher):
    kinds = {
        steps: {type(p.weight) for p in attach(teacher, recipe(f"tuning.steps={steps}")).layers()
                .values()}
        for steps in (0, 1)
    }  # fmt: skip
    assert kinds == {0: {FrozenWeight}, 1: {SoftRoundWeight}}


def test_layers_and_quantizers_are_those_of_the_protocol(teacher):
    weights, activations = bits_of(attach(teacher, recipe(bits="w3a5")))
    assert weights == {"stem": 8, "a1": 3, "a2": 3, "proj": 3, "b1": 3, "b2": 3, "fc": 8}
    assert activations == {
        "relu_default": 8, "relu_default_1": 5, "relu_default_2": 5, "relu_default_3": 5,
        "mean_dim": 8,
    }  # fmt: skip
    weights, activations = bits_of(attach(teacher, recipe(bits="w3a5", protocol="all-low-bit")))
    assert set(weights.values()) == {3}
    assert set(activations.values()) == {5}
    weights, activations = bits_of(attach(teacher, recipe(bits="w3a5", protocol="integer")))
    assert activations["x"] == activations["a2"] == 8


def test_overrides_reach_the_layers(teacher):
    chosen = recipe(bits="w4a4").model_copy(
        update={"overrides": (Override(match="b*", weights=2, activations=6),)}
    )
    weights, activations = bits_of(attach(teacher, chosen))
    assert weights["b1"] == weights["b2"] == 2
    assert activations["relu_default_2"] == 6
    assert weights["a1"] == 4
    wrong = chosen.model_copy(update={"overrides": (Override(match="zz", weights=2),)})
    with pytest.raises(UsageError, match="matches no layer"):
        attach(teacher, wrong)


@pytest.mark.parametrize(
    ("protocol", "fold", "left"),
    [("edges-8bit", True, 0), ("edges-8bit", False, 6), ("all-low-bit", False, 6),
     ("integer", True, 0), ("integer", False, 0)],
)  # fmt: skip
def test_norms_are_folded_where_the_recipe_or_the_protocol_wants_it(teacher, protocol, fold, left):
    chosen = recipe(f"fold_batch_norm={str(fold).lower()}", protocol=protocol)
    for network in (prepared_network(teacher, chosen), attach(teacher, chosen).network):
        assert sum(isinstance(m, BatchNorm) for m in network.modules()) == left
    x = smooth_images(4)
    assert torch.allclose(prepared_network(teacher, chosen)(x), teacher(x), atol=1e-5)


@pytest.mark.parametrize("protocol", ["edges-8bit", "integer", "all-low-bit"])
@pytest.mark.parametrize("make", [Residual, Inverted])
def test_more_bits_are_nearer_to_the_teacher(make, protocol):
    own = teacher_of(make)
    x = smooth_images(16)  # those of the calibration: others may be clipped
    errors = [
        float((calibrated(own, "tuning.steps=0", bits=bits, protocol=protocol)(x) - own(x))
              .square().mean())
        for bits in ("w2a2", "w4a4", "w8a8")
    ]  # fmt: skip
    assert errors[2] < 0.1 * errors[1]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] > 0


def test_calibration_switches_on_what_has_no_step_and_leaves_the_rest(teacher):
    student = attach(teacher, recipe("tuning.steps=0"))
    calibrate_student(student, smooth_images(8))
    before = {n: q.scale.clone() for n, q in student.quantizers().items()}
    assert all(bool(q.calibrated) and q.enabled for q in student.quantizers().values())
    calibrate_student(student, 5 * smooth_images(8))
    assert all(torch.equal(q.scale, before[n]) for n, q in student.quantizers().items())


def test_calibration_switches_on_a_quantizer_whose_step_was_given(teacher):
    student = attach(teacher, recipe("tuning.steps=0"))
    name, given = next(iter(student.quantizers().items()))
    given.set_grid(Grid(torch.tensor(0.3), torch.tensor(0.0), torch.tensor(0.0)))
    given.enabled = False
    calibrate_student(student, smooth_images(8))
    assert given.enabled
    assert float(student.quantizer(name).scale.detach()) == pytest.approx(0.3)


def test_calibration_looks_at_as_many_images_as_the_recipe_says(teacher):
    x = smooth_images(8)
    outlier = torch.cat([x, 100 * x])
    few = attach(teacher, recipe("tuning.steps=0", "tuning.calibration_images=8"))
    calibrate_student(few, outlier)
    reference = attach(teacher, recipe("tuning.steps=0"))
    calibrate_student(reference, x)
    for name, quantizer in few.quantizers().items():
        assert torch.equal(quantizer.scale, reference.quantizer(name).scale)


def test_images_of_another_shape_are_refused(teacher):
    student = attach(teacher, recipe())
    with pytest.raises(UsageError, match=r"\(3, 8, 9\) but the network takes \(3, 8, 8\)"):
        calibrate_student(student, torch.zeros(2, 3, 8, 9))


def test_freezing_leaves_integers_and_no_gradients(teacher):
    student = attach(teacher, recipe())
    calibrate_student(student, smooth_images(8))
    codes = {path: layer.weight.codes() for path, layer in student.layers().items()}
    student.quantizer("relu_default").drop = 0.5
    assert student.freeze() is student
    for path, layer in student.layers().items():
        assert torch.equal(layer.frozen.codes(), codes[path])
    assert not any(p.requires_grad for p in student.parameters())
    x = smooth_images(4)
    assert torch.equal(student(x), student(x))
    before = student(x)
    student.freeze()
    assert torch.equal(student(x), before), "freezing twice is freezing once"


def test_a_copy_is_independent(teacher):
    student = calibrated(teacher)
    copied = student.copy()
    x = smooth_images(4)
    assert torch.equal(copied(x), student(x))
    assert same_weights(copied, student)
    copied.layers()["a1"].frozen.scale.mul_(2)
    copied.quantizer("relu_default").raw_scale.data.mul_(2)
    assert not torch.allclose(copied(x), student(x), atol=1e-3)
    assert torch.equal(calibrated(teacher)(x), student(x))


def test_state_comes_back_to_the_bit(teacher):
    student = calibrated(teacher)
    other = attach(teacher, recipe()).freeze()
    other.load_state_dict(student.state_dict())
    for quantizer in other.quantizers().values():
        quantizer.enabled = True
    x = smooth_images(4)
    assert torch.equal(other(x), student(x))


def test_the_teacher_stays_as_it_is(teacher):
    x = smooth_images(4)
    before, targets = teacher(x), [str(n.target) for n in teacher.network.graph.nodes]
    student = attach(teacher, recipe(protocol="integer"))
    student.layers()["a1"].bias.data.zero_()
    calibrate_student(student, smooth_images(8))
    assert torch.equal(teacher(x), before)
    assert [str(n.target) for n in teacher.network.graph.nodes] == targets


@pytest.mark.parametrize("bits", ["w2a8", "w8a2", "w5a7"])
def test_any_bits_from_2_to_8(teacher, bits):
    student = calibrated(teacher, bits=bits)
    for layer in student.layers().values():
        assert int(layer.frozen.codes().max()) < 2**layer.bits
    x = smooth_images(32)
    seen = torch.fx.Interpreter(student.network)
    assert torch.equal(seen.run(x), student(x))
    low = student.quantizer("relu_default_1")
    assert len(low(torch.randn(1000)).unique()) <= 2 ** int(bits[-1])


def test_dead_channels_and_constant_tensors_do_no_harm():
    module = Net(lambda n, x: n.b(n.a(x).relu()), a=conv(), b=conv(4, 4))
    torch.nn.init.zeros_(module.a.weight.data[1])
    module.b.weight.data.zero_()
    own = load_teacher(randomise(module), input_shape=SHAPE)
    student = calibrated(own, "tuning.steps=0", protocol="integer", bits="w4a4")
    x = smooth_images(4)
    assert bool(torch.isfinite(student(x)).all())
    assert torch.allclose(student(x), own(x), atol=0.05 * float(own(x).abs().max()))


def test_the_steps_in_a_row_are_what_quantize_does():
    """With channels equalized by learned factors, which `attach` alone would leave out."""
    settings = ["tuning.steps=4", "tuning.equalize_steps=3", "tuning.batch=8", "synthesis.images=16",
                "synthesis.batch=16", "synthesis.steps=3", "equalize=0.5"]  # fmt: skip
    teacher = teacher_of()
    torch.manual_seed(0)
    module = with_own_statistics(Residual())
    asked = load_recipe("genie", bits="w4a4", settings=settings)
    whole = zsq.quantize(module, asked, input_shape=SHAPE, precision="fp32", compile=False)
    context = Context(0, make_policy(precision="fp32", compile=False))
    images = zsq.synthesize(teacher, asked, context=context)
    ready, student = zsq.prepare(teacher, asked, images, context=context)
    student = zsq.tune(ready, student, images, context=context)
    assert same_weights(student, whole)
    assert not torch.equal(
        ready.network.get_submodule("a1").weight,
        prepared_network(teacher, asked).get_submodule("a1").weight,
    )


FINISHED = ["tuning.steps=2", "tuning.equalize_steps=2", "tuning.batch=8", "synthesis.images=8",
            "synthesis.batch=8", "synthesis.steps=2"]  # fmt: skip


def test_a_finished_student_stays_as_it_is():
    """No gradient is left for somebody's optimiser, and a step run twice does not tune integers."""
    teacher, asked = teacher_of(), load_recipe("genie", bits="w4a4", settings=FINISHED)
    ready, student = zsq.prepare(teacher, asked, smooth_images(8))
    student = zsq.tune(ready, student, smooth_images(8))
    assert all(parameter.grad is None for parameter in student.parameters())
    for finished in (student, student.copy()):
        assert not finished.training
        with pytest.raises(UsageError, match="this student is finished"):
            zsq.tune(ready, finished, smooth_images(8))
    with pytest.raises(UsageError, match="'genie' has no generator"):
        zsq.tune_with_generator(ready, attach(ready, asked))


def test_a_generators_steps_in_a_row_are_what_quantize_does():
    settings = ["synthesis.images=8", "synthesis.batch=8", "synthesis.steps=2", "tuning.steps=2",
                "tuning.start.steps=2", "tuning.start.equalize_steps=2", "tuning.start.batch=8"]  # fmt: skip
    asked = load_recipe("gdfq", schedule="quick", bits="w4a4", settings=settings)
    torch.manual_seed(0)
    module = with_own_statistics(Residual())
    whole = zsq.quantize(module, asked, input_shape=SHAPE, precision="fp32", compile=False)
    teacher = load_teacher(module, input_shape=SHAPE)
    ready, student = zsq.prepare(teacher, asked, zsq.first_images(teacher, asked))
    student, _ = zsq.tune_with_generator(ready, student, original=teacher)
    assert same_weights(student, whole)


def test_the_callers_chance_goes_on_where_it_was():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    teacher = load_teacher("zsq:resnet20_cifar10")
    asked = load_recipe("genie", settings=[*FINISHED, "synthesis.images=4", "synthesis.batch=4"])
    zsq.synthesize(teacher, asked)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_image_sets_of_other_types_are_taken(kind):
    teacher, asked = teacher_of(), load_recipe("zeroq")
    pixels = smooth_images(8).to(kind).requires_grad_()
    given = zsq.ImageSet(pixels, torch.zeros(8, dtype=torch.int32))
    for images in (pixels, given):
        ready, student = zsq.prepare(teacher, asked, images)
        assert zsq.tune(ready, student, images)(smooth_images(2)).isfinite().all()
    with pytest.raises(UsageError, match="not a ndarray"):
        zsq.prepare(teacher, asked, pixels.detach().numpy())


def test_steps_take_pixels_as_quantize_does():
    """Whoever tries a synthesis of their own has a tensor."""
    settings = ["tuning.steps=4", "tuning.equalize_steps=3", "tuning.batch=8", "equalize=0.5"]
    asked = load_recipe("genie", bits="w4a4", settings=settings)
    torch.manual_seed(0)
    module = with_own_statistics(Residual())
    pixels, options = smooth_images(16), {"precision": "fp32", "compile": False}
    whole = zsq.quantize(module, asked, input_shape=SHAPE, images=pixels, **options)
    context = Context(0, make_policy(**options))
    ready, student = zsq.prepare(
        load_teacher(module, input_shape=SHAPE), asked, pixels, context=context
    )
    assert same_weights(zsq.tune(ready, student, pixels, context=context), whole)
    with pytest.raises(UsageError, match=r"\(3, 4, 4\) but the network takes"):
        zsq.prepare(ready, asked, pixels[:, :, :4, :4])


@pytest.mark.parametrize("protocol", ["edges-8bit", "integer"])
def test_what_rounding_learned_in_a_depthwise_layer_of_eight_bits_is_deployed(protocol):
    teacher = teacher_of(Inverted)
    student = tuned(teacher, bits="w8a8", protocol=protocol)
    deployed = to_integer(student, smooth_images(16))
    kept = {path: layer for path, layer in student.layers().items() if layer.is_depthwise}
    assert set(kept) == {"dw"}
    for path, layer in kept.items():
        assert torch.equal(deployed.layers()[path].frozen.integers, layer.frozen.integers)
        assert torch.equal(deployed.layers()[path].frozen.scale, layer.frozen.scale)
        assert layer.frozen.zero_point.tolist() == [128] * len(layer.frozen.zero_point)
    narrow = attach(teacher, recipe(bits="w4a4", protocol=protocol)).layers()["dw"].weight
    assert narrow.zero_point.unique().numel() > 1
