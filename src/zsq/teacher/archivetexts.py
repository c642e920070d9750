# SPDX-License-Identifier: Apache-2.0
"""What texts in an archive of torch.export may say, so that PyTorch, which evaluates some, runs no code of them.

Shape expressions become Python that sympy evaluates, nested arguments name classes that are looked up or modules
that are imported, and names of arguments are put into the source of a function.
"""

from __future__ import annotations

import ast
import json
import re

#: What PyTorch writes in shape expressions: sympy's own classes, and those of `torch.utils._sympy.functions`.
_FUNCTIONS = frozenset({
    "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "Float", "FloatPow", "FloatTrueDiv",
    "FloorDiv", "FloorToInt", "Ge", "GreaterThan", "Gt", "Identity", "IntTrueDiv", "Integer",
    "IsNonOverlappingAndDenseIndicator", "LShift", "Le", "LessThan", "Lt", "Max", "Min", "Mod", "ModularIndexing",
    "Mul", "Ne", "Not", "Or", "Pow", "PowByNatural", "PythonMod", "RShift", "Rational", "RoundDecimal", "RoundToInt",
    "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat", "TruncToFloat", "TruncToInt", "Unequality", "Where",
})  # fmt: skip
_VALUES = re.compile(r"[a-z]{1,3}\d+|int_oo|oo|nan|true|false")
#: What Python evaluates beside calls: signs, sums, comparisons, and the digits of numbers.
_PLAIN = (
    ast.Expression, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
#: Numbers, powers and texts beyond these, and powers of powers, could keep a reader busy for years.
_LONGEST = 100_000
_LARGEST = 2**63
_LARGEST_POWER = 64
_MOST_DIGITS = 1000
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_FLOAT = re.compile(r"-?(\d{1,40}(\.\d{1,40})?(e[+-]?\d{1,3})?|inf|nan)")

# What becomes an identifier in the code that PyTorch writes of a graph, and what a string there.
_IDENTIFIER = re.compile(r"\w*")
_TEXT = re.compile(r"[^\"'\\\x00-\x1f]*")

#: How arguments may be nested; of other classes, PyTorch would import what the archive names.
_NESTS = frozenset({
    None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "torch.Size",
    "torch.fx.immutable_collections.immutable_list", "torch.fx.immutable_collections.immutable_dict",
})  # fmt: skip


def is_allowed_name(key: str, text: str) -> bool:
    """Whether a text may stand under a key of an archive; any may where it is no name.

    Example:
        >>> is_allowed_name("as_name", "conv_1"), is_allowed_name("as_name", "f()"), is_allowed_name("kind", "f()")
        (True, False, True)
    """
    if key in ("name", "as_name", "forward_arg_names"):
        return _IDENTIFIER.fullmatch(text) is not None
    return not key.endswith("_name") or _TEXT.fullmatch(text) is not None


def is_expression(text: str) -> bool:
    """Whether a text is an expression of sizes, as sympy writes them, and quickly evaluated.

    Example:
        >>> is_expression("Add(Integer(1), Symbol('s0', positive=True, integer=True))")
        True
        >>> is_expression("S('exec')('1')"), is_expression("Pow(Integer(9), Integer(99999999))")
        (False, False)
    """
    if len(text) > _LONGEST or not text.isascii() or not text.isprintable() or "#" in text:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return False
    return _is_size(tree)


def _is_size(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _is_call(node)
    if isinstance(node, ast.Name):
        return _VALUES.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):  # floats stand in `Float`; sympy reads their digits anew
        return isinstance(node.value, bool) or _is_whole(node, _LARGEST)
    return isinstance(node, _PLAIN) and all(_is_size(child) for child in ast.iter_child_nodes(node))


def _is_call(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Name) or call.func.id not in _FUNCTIONS:
        return False
    for keyword in call.keywords:  # assumptions of symbols, and digits of numbers
        assumed = isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
        if keyword.arg is None or not (assumed or _is_whole(keyword.value, _MOST_DIGITS)):
            return False
    if call.func.id in ("Symbol", "Float"):
        return len(call.args) == 1 and _is_literal(call.func.id, call.args[0])
    if call.func.id in _POWERS:
        return len(call.args) == 2 and _is_power(*call.args)
    return all(_is_size(argument) for argument in call.args)


def _is_literal(kind: str, node: ast.expr) -> bool:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return kind == "Float" and _is_whole(node, _LARGEST)
    return bool((_FLOAT if kind == "Float" else _IDENTIFIER).fullmatch(node.value))


def _is_power(base: ast.expr, exponent: ast.expr) -> bool:
    """Whether the exponent is a small number and the base holds no powers."""
    if isinstance(exponent, ast.Call) and _name(exponent) == "Integer" and len(exponent.args) == 1:
        exponent = exponent.args[0]
    nested = any(isinstance(x, ast.Call) and _name(x) in _POWERS for x in ast.walk(base))
    return not nested and _is_size(base) and _is_whole(exponent, _LARGEST_POWER)


def _name(call: ast.Call) -> str | None:
    return call.func.id if isinstance(call.func, ast.Name) else None


def _is_whole(node: ast.expr, largest: int) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value <= largest


def is_layout(text: str) -> bool:
    """Whether a text says how arguments are nested, in Python's own lists, tuples and dictionaries.

    Example:
        >>> is_layout('[1, {"type": null, "context": null, "children_spec": []}]')
        True
        >>> is_layout('[1, {"type": "my.Class", "context": null, "children_spec": []}]')
        False
    """
    try:
        content = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(content, list) and len(content) == 2 and content[0] == 1 and _is_nest(content[1])
    )


def _is_nest(spec: object) -> bool:
    if not isinstance(spec, dict) or spec.keys() != {"type", "context", "children_spec"}:
        return False
    kind, children = spec["type"], spec["children_spec"]
    if not isinstance(kind, str | None) or kind not in _NESTS or not isinstance(children, list):
        return False
    return _is_context(spec["context"]) and all(_is_nest(child) for child in children)


def _is_context(context: object) -> bool:
    """Whether what belongs to a nest is nothing, or the keys of a dictionary."""
    if context is None:
        return True
    try:
        keys = json.loads(context) if isinstance(context, str) else context
    except ValueError:
        return False
    if keys is None:
        return True
    return isinstance(keys, list) and all(
        isinstance(key, int) or (isinstance(key, str) and _TEXT.fullmatch(key)) for key in keys
    )
