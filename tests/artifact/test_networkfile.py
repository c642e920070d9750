# SPDX-License-Identifier: Apache-2.0
"""Networks in files, damaged and made up ones among them: right, or refused in a sentence."""

import copy
import json

import pytest
import torch
from helpers.students import labelled_images, teacher_of

from zsq.artifact.networkfile import load_saved_teacher, load_student, save_student, save_teacher
from zsq.config import load_recipe
from zsq.errors import UsageError
from zsq.runtime.checkpoints import load_tensors, save_tensors
from zsq.runtime.context import Context
from zsq.stages import tuned


@pytest.fixture(scope="module")
def student():
    teacher = teacher_of()
    recipe = load_recipe("zeroq", bits="w4a8")
    return tuned(teacher, recipe, labelled_images(teacher, 4), Context())


def first(header, kind):
    return next(path for path, module in header["modules"].items() if module["kind"] == kind)


def call(header, tensors, **node):
    defaults = {
        "name": "more",
        "op": "call_function",
        "args": [],
        "kwargs": {},
        "path": "",
        "scalar": False,
    }
    header["graph"].insert(1, defaults | node)


def no_output(header, tensors):
    header["graph"].pop()


def two_outputs(header, tensors):
    header["graph"].append(copy.deepcopy(header["graph"][-1]) | {"name": "output_1"})


def another_operator(header, tensors):
    header["modules"][first(header, "quantized_layer")]["operator"] = "aten.relu.default"


def operator_of_files(header, tensors):
    call(header, tensors, target="aten.from_file.default", args=["/etc/passwd"])


def operator_without_checks(header, tensors):
    call(header, tensors, target="aten._sparse_coo_tensor_unsafe.default")


def keyword(header, tensors):
    source = {"node": header["graph"][0]["name"]}
    call(header, tensors, target="aten.relu.default", args=[source], kwargs={"class": 1})


def nested(header, tensors):
    value = 1
    for _ in range(400):
        value = {"tuple": [value]}
    source = {"node": header["graph"][0]["name"]}
    call(header, tensors, target="aten.reshape.default", args=[source, value])


def steps_of_nothing(header, tensors):
    tensors[f"{first(header, 'quantized_layer')}.weight_scale"][0] = 0


def steps_that_are_none(header, tensors):
    tensors[f"{first(header, 'activation')}.scale"].fill_(torch.nan)


def negative_steps(header, tensors):
    tensors[f"{first(header, 'activation')}.scale"].neg_()


def no_mapping(header, tensors):
    return []


def bits_of_a_word(header, tensors):
    header["modules"][first(header, "activation")]["bits"] = "four"


def too_many_bits(header, tensors):
    header["modules"][first(header, "quantized_layer")]["bits"] = 10**12


def another_shape(header, tensors):
    header["modules"][first(header, "quantized_layer")]["shape"] = [10**12, 3]


def too_few_codes(header, tensors):
    name = f"{first(header, 'quantized_layer')}.weight_packed"
    tensors[name] = tensors[name].flatten()[:1]


def names_of_nothing(header, tensors):
    header["modules"]["a..b"] = header["modules"].pop(first(header, "activation"))


CHANGES = [
    bits_of_a_word, too_many_bits, another_shape, too_few_codes, names_of_nothing, no_output,
    two_outputs, another_operator, operator_of_files, operator_without_checks, keyword, nested,
    steps_of_nothing, steps_that_are_none, negative_steps, no_mapping,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_made_up_students_are_refused(student, tmp_path, change):
    path = tmp_path / "student.safetensors"
    save_student(student, path)
    tensors, header = load_tensors(path)
    header = json.loads(json.dumps(header))
    changed = change(header, tensors)
    save_tensors(path, tensors, header if changed is None else changed)
    with pytest.raises(UsageError) as caught:
        load_student(path)
    assert "\n" not in str(caught.value)


def test_what_was_saved_is_what_is_read(student, tmp_path):
    teacher, images = teacher_of(), labelled_images(teacher_of(), 4).images
    save_student(student, tmp_path / "s.safetensors")
    save_teacher(teacher, tmp_path / "t.safetensors")
    torch.testing.assert_close(load_student(tmp_path / "s.safetensors")(images), student(images))
    torch.testing.assert_close(
        load_saved_teacher(tmp_path / "t.safetensors")(images), teacher(images)
    )
    assert load_student(tmp_path / "s.safetensors").finished
