# SPDX-License-Identifier: Apache-2.0
"""YAML files of strangers: one line says why one cannot be read, whatever is in it."""

import pytest

from zsq.bits.plan import BitsPlan
from zsq.config import load_recipe
from zsq.errors import UsageError
from zsq.settings.yamlfiles import read_yaml
from zsq.sweep import Sweep
from zsq.synthesis.architecture import Architecture

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 12)}]\n" for i in range(1, 12)
)
# Each refers twice to the one before: few references, and more values than there are atoms.
CHAIN = "- &a0 [x, x]\n" + "".join(f"- &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 45))
# The same within three cells of an architecture.
CELLS = f"- [&a0 [x, x], {', '.join(f'&a{i} [*a{i - 1}, *a{i - 1}]' for i in range(1, 45))}]\n- b\n- c\n"
BAD = {
    "chain": CHAIN, "cells": CELLS, "itself": "tuning: &a {x: *a}", "items": "&a [*a, *a]",
    "date": "x: 2026-13-45", "int": "x: !!int foo", "float": "x: !!float abc", "bool": "x: !!bool foo",
    "time": "x: !!timestamp foo", "digits": f"x: {'9' * 5000}", "deep": "[" * 3000, "bomb": BOMB,
    "twice": "tuning: {steps: 1}\ntuning: {steps: 2}", "object": "x: !!python/object/apply:os.getcwd []",
    "bytes": "\x00",
}  # fmt: skip
READERS = {
    "recipe": load_recipe, "bits": BitsPlan.load, "sweep": Sweep.load, "architecture": Architecture.load,
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bad", BAD)
def test_bad_files_are_one_sentence(tmp_path, bad, reader):
    path = tmp_path / "file.yaml"
    path.write_text(BAD[bad])
    with pytest.raises(UsageError) as caught:
        READERS[reader](path)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_references_that_a_person_writes_are_read():
    assert read_yaml(b"a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}
    }  # fmt: skip
    merged_twice = b"a: {base: &base {x: 1}, mid: &mid {<<: *base, x: 2}}\ntop: {<<: *mid}"
    assert read_yaml(merged_twice)["top"] == {"x": 2}
    assert read_yaml(b"a: &a [1, 2]\nb: [" + b"*a, " * 200 + b"*a]")["b"][200] == [1, 2]
    assert read_yaml(b"{1: a, '1': b}") == {1: "a", "1": "b"}  # other keys, written alike


def test_a_name_that_no_file_can_have_is_no_recipe(tmp_path):
    (tmp_path / "heir.yaml").write_text(f"extends: {'a' * 5000}.yaml")
    with pytest.raises(UsageError, match="is neither a YAML file nor one of"):
        load_recipe(tmp_path / "heir.yaml")


def test_a_recipe_finds_its_neighbour_through_a_linked_folder(tmp_path):
    (tmp_path / "else" / "dir").mkdir(parents=True)
    (tmp_path / "rec").mkdir()
    (tmp_path / "rec" / "link").symlink_to(tmp_path / "else" / "dir")
    (tmp_path / "else" / "base.yaml").write_text("extends: genie\ntuning: {steps: 7}")
    (tmp_path / "else" / "dir" / "heir.yaml").write_text("extends: ../base.yaml")
    assert load_recipe(tmp_path / "rec" / "link" / "heir.yaml").tuning.steps == 7
