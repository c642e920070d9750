# SPDX-License-Identifier: Apache-2.0
"""Models that zsq cannot take: one sentence each, with the next step."""

import logging
import sys
import warnings

import pytest
import torch
from helpers.networks import Net, conv, images, network_of
from torch import nn

from zsq import quantize
from zsq.errors import UsageError
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.inspect import inspect_teacher
from zsq.teacher.taps import tap_batch_norms
from zsq.teacher.teacher import load_teacher


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 5)


class ReturnsTuple(Linear):
    def forward(self, x):
        return (self.fc(x.flatten(1)),)


class ReturnsTwo(Linear):
    def forward(self, x):
        return self.fc(x.flatten(1)), x


class ReturnsDict(Linear):
    def forward(self, x):
        return {"logits": self.fc(x.flatten(1))}


class TakesTwo(Linear):
    def forward(self, x, y):
        return self.fc((x + y).flatten(1))


class DataDependent(Linear):
    def forward(self, x):
        return self.fc(x.flatten(1)) if x.sum() > 0 else self.fc(-x.flatten(1))


class FixedBatch(Linear):
    def forward(self, x):
        return self.fc(x.reshape(2, 192))


class Reshapes(Linear):
    def forward(self, x):
        return self.fc(x.reshape(x.shape[0], 192))


class IgnoresInput(Linear):
    def forward(self, x):
        return self.fc.bias.expand(3, 5) * 2


class ReturnsNothing(Linear):
    def forward(self, x):
        self.fc(x.flatten(1))


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.fc = conv(), nn.Linear(4, 5)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.c(x)
        return self.fc(x.float().mean((2, 3)))


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (ReturnsTuple, "returns a tuple, list or dict with 1 tensor"),
        (ReturnsTwo, "returns a tuple, list or dict with 2 tensor"),
        (ReturnsDict, "returns a tuple, list or dict with 1 tensor"),
        (ReturnsNothing, "returns a tuple, list or dict with 0 tensor"),
        (Autocast, "layer 'c' computes in bfloat16.*Take autocast"),
        (TakesTwo, "takes 2 inputs; zsq needs exactly one image tensor"),
        (DataDependent, "free of data-dependent Python control flow"),
        (FixedBatch, "of a fixed batch size"),
        (IgnoresInput, "does not depend on its input"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unsuitable_models_are_refused_with_the_next_step(module, sentence):
    with pytest.raises(UsageError, match=sentence):
        build_network(export_module(module(), (3, 8, 8)))


def test_a_failing_export_says_one_sentence(monkeypatch, capfd, caplog):
    """Torch logs, warns and prints whole graphs before it gives up."""

    def noisy(*args, **options):
        logging.getLogger("torch.fx").warning("noise")
        warnings.warn("noise", stacklevel=1)
        print("noise", file=sys.stderr)
        raise RuntimeError("No idea.\nNoise")

    monkeypatch.setattr(torch.export, "export", noisy)
    before = logging.root.manager.disable
    with pytest.raises(UsageError, match=r"cannot read this model's graph: No idea\. Make"):
        export_module(Reshapes(), (3, 8, 8))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.root.manager.disable == before


def test_an_optional_second_input_is_no_obstacle():
    class Optional(Linear):
        def forward(self, x, y=None, *rest, **more):
            return self.fc(x.flatten(1))

    assert build_network(export_module(Optional(), (3, 8, 8)))(images()).shape == (3, 5)


def test_an_exported_program_of_two_inputs_is_refused():
    program = torch.export.export(TakesTwo().eval(), (images(), images()))
    with pytest.raises(UsageError, match="takes 2 inputs"):
        build_network(program)


def test_a_wrong_shape_is_refused_with_what_the_model_says():
    with pytest.raises(UsageError, match=r"shape \(2, 4, 8, 8\).*--input-shape"):
        export_module(Net(lambda n, x: n.c(x), c=conv()), (4, 8, 8))


@torch.library.custom_op("zsqtest::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return torch.empty_like(x)


def test_operators_outside_the_standard_set_are_refused_by_name():
    with pytest.raises(UsageError, match=r"zsqtest\.double"):
        network_of(Net(lambda n, x: double(n.c(x)), c=conv()))


# --- what only shows when the network runs, or is used --------------------------------------------


def with_norm(**options):
    return Net(lambda n, x: n.bn(n.c(x)), c=conv(), bn=nn.BatchNorm2d(4, **options))


@pytest.mark.parametrize("part", ["c.weight", "fc.bias", "bn.running_mean"])
def test_weights_that_are_not_finite_are_named(part):
    module = with_norm()
    module.state_dict()[part].view(-1)[1] = float("nan")
    with pytest.raises(UsageError, match=part):
        load_teacher(module, input_shape=(3, 8, 8))


def test_weights_that_are_not_finite_are_named_in_an_exported_program_too():
    module = with_norm().eval()
    module.bn.weight.data[2] = float("inf")
    with pytest.raises(UsageError, match=r"bn\.weight"):
        load_teacher(export_module(module, (3, 8, 8)))


def test_outputs_that_are_not_finite_are_refused():
    module = with_norm()
    module.bn.running_var.fill_(-1)
    with pytest.raises(UsageError, match=r"NaN or Inf.*negative running variance"):
        load_teacher(module, input_shape=(3, 8, 8))


@pytest.mark.parametrize(
    "module", [conv(), nn.Sequential(conv(), nn.Flatten(0))], ids=["maps", "numbers"]
)
def test_outputs_that_are_no_logits_are_refused(module):
    with pytest.raises(UsageError, match=r"needs logits of shape \(3, classes\)"):
        load_teacher(module, input_shape=(3, 8, 8))


def test_a_program_of_a_fixed_batch_size_is_refused_with_the_next_step():
    program = torch.export.export(Reshapes().eval(), (images(count=2),))
    with pytest.raises(UsageError, match="exported with a dynamic batch size"):
        load_teacher(program)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_program_exported_in_training_mode_is_refused_with_the_next_step(decomposed):
    free = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(with_norm().train(), (images(count=2),), dynamic_shapes=free)
    if decomposed:
        program = program.run_decompositions({})
    with pytest.raises(UsageError, match=r"'bn'.*in training mode; call model\.eval\(\) before"):
        load_teacher(program)


@pytest.mark.parametrize("shape", [None, (3, 8), (3, 8, 8, 1), (3, 0, 8)])
def test_a_shape_that_is_no_image_is_refused(shape):
    with pytest.raises(UsageError, match="--input-shape 3,224,224"):
        load_teacher(with_norm(), input_shape=shape)


@pytest.mark.parametrize("side", [99_999_999, 10**15])
def test_a_shape_beyond_all_memory_is_refused(side):
    with pytest.raises(UsageError, match=f"{side}.*--input-shape 3,224,224"):
        load_teacher(with_norm(), input_shape=(3, side, side))


@pytest.mark.parametrize(
    ("mean", "std", "sentence"),
    [
        ((0.5,), (0.2,) * 3, "--mean has 1 values but the input has 3 channels"),
        ((0.5,) * 3, (0.2, 0.2), "--std has 2 values but the input has 3 channels"),
        ((0.5,) * 3, (0.2, 0.0, 0.2), "--std .* must be positive"),
        ((0.5,) * 3, (float("nan"),) * 3, r"--std \(nan, nan, nan\) must be finite"),
        ((float("inf"),) * 3, (0.2,) * 3, "--mean .* must be finite"),
    ],
)
def test_normalisation_that_does_not_fit_is_refused(mean, std, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_teacher(with_norm(), input_shape=(3, 8, 8), mean=mean, std=std)


@pytest.mark.parametrize(
    "module",
    [Net(lambda n, x: n.c(x), c=conv()), with_norm(track_running_stats=False)],
    ids=["none", "without statistics"],
)
def test_no_batch_norm_to_synthesise_from_offers_real_images(module):
    with pytest.raises(UsageError, match=r"no batch norm with running statistics.*--images FOLDER"):
        tap_batch_norms(network_of(module))


def test_nothing_to_quantize_is_said():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = load_teacher(module, input_shape=(3, 8, 8))
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        inspect_teacher(teacher)


@pytest.mark.parametrize(
    ("given", "says"),
    [("x", "a str;"), ([1, 2], "a list;"), (torch.zeros(3, 8, 8), r"of shape \(3, 8, 8\);")],
)
def test_example_inputs_must_be_a_batch_of_images(given, says):
    with pytest.raises(UsageError, match=rf"{says} give a batch of images as a tensor \(N, C, H"):
        quantize(with_norm(), example_inputs=given)


EXPORTED = """
import torch
from torch import nn

own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
sizes = ({0: torch.export.Dim.DYNAMIC},)
program = torch.export.export(own, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=sizes)


def itself():
    return program


def alone():
    return program.module()


def nested():
    return nn.Sequential(program.module(), nn.Dropout())
"""


def test_a_module_of_torch_export_has_one_mode_and_its_program_is_taken(tmp_path):
    (tmp_path / "net.py").write_text(EXPORTED)
    teacher = load_teacher(f"{tmp_path / 'net.py'}:itself", input_shape=(3, 8, 8))
    assert teacher(images()).shape == (3, 5)
    for name in ("alone", "nested"):
        with pytest.raises(UsageError, match=r"is, or holds, a module that torch\.export made"):
            load_teacher(f"{tmp_path / 'net.py'}:{name}", input_shape=(3, 8, 8))
