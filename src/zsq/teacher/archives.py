# SPDX-License-Identifier: Apache-2.0
"""Networks saved with ``torch.export.save``, read without running code from the file.

``torch.export.load`` itself unpickles freely, evaluates shape expressions as Python, looks
operators up anywhere in ``torch`` and loads native libraries. So the archive is looked through
first, with the same reader, and whatever could run code is refused unless the caller allows it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader

from zsq.errors import UsageError
from zsq.teacher.archivetexts import is_allowed_name, is_expression, is_layout
from zsq.teacher.checkpoints import ALLOW_PICKLE_MEANING, describe, require_file
from zsq.teacher.layers import resolve_operator

# Folders of the archive and what may lie in them.
_WEIGHTS = re.compile(r"data/(weights|constants)/(weight|tensor)_\d+")
_PAYLOAD_CONFIG = re.compile(r"data/(weights|constants)/\w+_config\.json")
_SAMPLE_INPUTS = re.compile(r"data/sample_inputs/\w+\.pt")
_GRAPH = re.compile(r"models/\w+\.json")
_INERT = re.compile(r"archive_format|archive_version|byteorder|\.data/.*|extra/.*|\.format_version")

# Operators beside ATen's: arithmetic on sizes, and regions of a graph, whose operands are graphs.
_TARGET = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_|[lr]shift)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.(sym_\w+|_sym_\w+)"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond|while_loop)"
)
_ATEN = re.compile(r"torch\.ops\.(aten\.\w+\.\w+)")
# Functions found by their name, and objects of C++ classes.
_OBJECTS = frozenset({"as_operator", "as_custom_obj", "class_fqn"})


def load_exported(path: str | Path, *, allow_pickle: bool = False) -> ExportedProgram:
    """Load a ``.pt2`` file that ``torch.export.save`` wrote.

    Args:
        path: the file.
        allow_pickle: skip the search for content that can run code.

    Raises:
        UsageError: the file is missing or damaged, or could run code and ``allow_pickle`` is off.
    """
    path = require_file(path)
    try:
        reason = None if allow_pickle else _find_code(path)
        if reason is None:
            return torch.export.load(path) if allow_pickle else _load_screened(path)
    except UsageError:
        raise
    except Exception as error:  # damaged archives raise anything
        raise UsageError(
            f"{path} cannot be read as a torch.export archive ({describe(error)}): it is "
            f"truncated, damaged or from an incompatible PyTorch (this is {torch.__version__}); "
            "save it again with torch.export.save."
        ) from error
    raise UsageError(f"{path} {reason}, which could run code on loading; {ALLOW_PICKLE_MEANING}.")


def _load_screened(path: Path) -> ExportedProgram:
    # torch.export.load would retry a file that fails here in an older format, not looked through.
    from torch.export.pt2_archive._package import load_pt2

    program = load_pt2(str(path)).exported_programs["model"]
    assert isinstance(program, ExportedProgram)
    # PyTorch makes Python of both when it is asked for a module, and runs it.
    program._example_inputs = None
    program._guards_code = []
    return program


def _find_code(path: Path) -> str | None:
    """Return what in the archive could run code, as the end of a sentence; None when nothing."""
    with PT2ArchiveReader(str(path)) as reader:
        for name in reader.get_file_names():
            if _GRAPH.fullmatch(name) or _PAYLOAD_CONFIG.fullmatch(name):
                reason = _look_through_json(json.loads(reader.read_bytes(name)))
            elif _SAMPLE_INPUTS.fullmatch(name):
                reason = _look_through_pickle(reader.read_bytes(name))
            elif _WEIGHTS.fullmatch(name) or _INERT.fullmatch(name):
                reason = None
            else:
                reason = f"holds {name!r}"
            if reason is not None:
                return reason
    return None


def _look_through_pickle(content: bytes) -> str | None:
    if not content:
        return None
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:
        return f"holds pickled objects ({describe(error)})"
    return None


def _look_through_json(content: object) -> str | None:
    for key, value in _entries(content):
        shown = repr(str(value)[:80])
        if key == "target" and not _is_operator(value):
            return f"calls {shown}"
        if key == "expr_str" and not (isinstance(value, str) and is_expression(value)):
            return f"holds the expression {shown}"
        if key in ("in_spec", "out_spec") and not (isinstance(value, str) and is_layout(value)):
            return f"nests arguments as {shown}"
        if key == "use_pickle" and value:
            return "holds pickled tensors"
        if key in _OBJECTS and value:
            return f"holds the object {shown}"
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not is_allowed_name(key, text):
                return f"holds the name {shown}"
    return None


def _is_operator(target: object) -> bool:
    """Whether a network may call what a target names."""
    if not isinstance(target, str):
        return True  # of something else than a call
    aten = _ATEN.fullmatch(target)
    if aten is None:
        return bool(_TARGET.fullmatch(target))
    resolve_operator(aten[1])
    return True


def _entries(content: object) -> Iterator[tuple[str, object]]:
    """Every key and value of nested JSON objects."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(content, list):
        for value in content:
            yield from _entries(value)
