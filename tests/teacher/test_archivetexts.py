# SPDX-License-Identifier: Apache-2.0
"""Texts of archives: what torch.export writes passes, and nothing that could do something else."""

import json

import pytest
import sympy
import torch
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod

from zsq.teacher.archivetexts import is_allowed_name, is_expression, is_layout

SIZE = sympy.Symbol("s77", positive=True, integer=True)


@pytest.mark.parametrize(
    "expression",
    [
        SIZE,
        3 * SIZE + 1,
        FloorDiv(SIZE - 1, 2) ** 2,
        Mod(SIZE, 4),
        sympy.Max(1, SIZE),
        sympy.Eq(Mod(SIZE, 2), 0),
        sympy.And(SIZE > 1, SIZE <= 2**63 - 1),
        sympy.Float("0.5") * SIZE,
        -SIZE,
        sympy.oo,
        sympy.true,
    ],
)
def test_expressions_of_sizes_pass(expression):
    text = sympy.srepr(expression)
    assert is_expression(text), text
    functions = {"FloorDiv": FloorDiv, "Mod": Mod}
    assert sympy.sympify(text, locals=functions) == expression  # as PyTorch reads them


@pytest.mark.parametrize(
    "text",
    [
        "S('exec')('1')",
        "S(1)",
        "Lambda(x1, x1)",
        "Symbol('a').free_symbols",
        "Symbol('a', name='b()')",
        "Symbol(**{'a': 1})",
        "Symbol('a', **True)",
        "Symbol(Symbol('a'))",
        "__import__('os')",
        "open('f')",
        "[1 for x1 in s1]",
        "(lambda: 1)()",
        "s1 if s2 else s3",
        "f'{s1}'",
        "'text'",
        "s1[0]",
        "9**9",
        "factorial(9)",
        "Pow(Pow(Integer(9), Integer(64)), Integer(64))",
        "Pow(Symbol('a'), Integer(65))",
        "LShift(Integer(1), Integer(99999999))",
        "PowByNatural(Integer(9), s1)",
        "Float('1e999999999')",
        "Float('1.5', precision=999999999)",
        "1e999999999",
        "9" * 20,
        "Add(Integer(1), Integer(1))" + " " * 100_000,
        "Integer(1)  # comment",
        "Integer(1)\n",
        "\uff33ymbol('a')",  # which Python reads as Symbol
        "(" * 5000,
        "",
    ],
)
def test_other_expressions_do_not(text):
    assert not is_expression(text)


@pytest.mark.parametrize(
    "arguments",
    [torch.ones(1), (torch.ones(1), [1, 2]), {"out/1": 1, "aux": (2,)}, torch.Size([1, 2]), None],
)
def test_nested_arguments_pass(arguments):
    text = pytree.treespec_dumps(pytree.tree_flatten(((arguments,), {}))[1])
    assert is_layout(text), text


LEAF = {"type": None, "context": None, "children_spec": []}


@pytest.mark.parametrize(
    "spec",
    [
        {**LEAF, "type": "collections.defaultdict", "context": {"default_factory_module": "os"}},
        {**LEAF, "type": "collections.namedtuple", "context": '"os.stat_result"'},
        {
            **LEAF,
            "type": "builtins.dict",
            "context": '[{"__enum__": true, "fqn": "os:x", "name": "y"}]',
        },
        {**LEAF, "type": "builtins.dict", "context": '{"__enum__": true, "fqn": "os:x"}'},
        {
            **LEAF,
            "type": "builtins.dict",
            "context": "[\"a', evil(), 'b\"]",
            "children_spec": [LEAF],
        },
        {**LEAF, "type": ["builtins.dict"]},
        {**LEAF, "type": "collections.deque"},
        {**LEAF, "more": 1},
        {**LEAF, "children_spec": [{"type": "my.Class"}]},
        {**LEAF, "context": "[1"},
        [],
    ],
)
def test_nests_that_import_or_name_something_else_do_not(spec):
    assert not is_layout(json.dumps([1, spec]))
    assert not is_layout(json.dumps([2, LEAF]))
    assert not is_layout("[1, __import__('os')]")


def test_names_are_identifiers_or_plain_texts():
    assert is_allowed_name("as_name", "conv_1")
    assert not is_allowed_name("as_name", "x=f()")
    assert is_allowed_name("parameter_name", "conv-1 (first).weight")
    assert not is_allowed_name("parameter_name", 'a", f(), "')
    assert is_allowed_name("stack_trace", "File \"a.py\", line 1, in f\n  g('x')")
