# SPDX-License-Identifier: Apache-2.0
"""Networks built by a function in a Python file that the user names."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn
from torch.export import ExportedProgram

from zsq.errors import UsageError
from zsq.teacher.checkpoints import describe, require_file


def build_from_file(path: str, function: str) -> nn.Module | ExportedProgram:
    """Import ``path`` under a private name and return what its ``function()`` builds.

    Args:
        path: a Python file; the files beside it can be imported while this runs, not afterwards.
        function: the name of a function or class without required arguments, or of a network.

    Raises:
        UsageError: the file or the function is missing, fails, or returns something else.
    """
    file = require_file(path).resolve()
    with _importable(file.parent):
        module = _execute(file)
        if not hasattr(module, function):
            raise UsageError(
                f"{path} has no function {function!r}: it defines {', '.join(_built_in(module)) or 'none'}."
            )
        builder = getattr(module, function)
        try:
            built = builder if isinstance(builder, nn.Module) else builder()
        except (Exception, SystemExit) as error:
            raise UsageError(
                f"{path}:{function} failed ({describe(error)}): it must be callable without "
                "arguments and return the network."
            ) from error
    if not isinstance(built, (nn.Module, ExportedProgram)):
        raise UsageError(
            f"{path}:{function} returned a {type(built).__name__}, not a torch.nn.Module: let it "
            "return the network alone."
        )
    return built


def _built_in(module: ModuleType) -> list[str]:
    """Name what could build a network: functions and classes of the file itself, and networks."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, nn.Module)
            or (callable(value) and getattr(value, "__module__", None) == module.__name__)
        )
    ]


def _execute(file: Path) -> ModuleType:
    name = f"_zsq_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} cannot be imported as Python: it must end in .py.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and torch.export look a class's module up here, also after this call.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{file} cannot be imported ({describe(error)}): fix it first.") from error
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put ``folder`` on the import path; afterwards forget the modules that came from it.

    Otherwise two files in different folders, each with its own ``layers.py`` beside it, would
    share the first one's.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        loaded = set(sys.modules) - before
        ours = {name for name in loaded if "." not in name and _lies_in(sys.modules[name], folder)}
        for name in loaded:
            if name.partition(".")[0] in ours and not name.startswith("_zsq_"):
                del sys.modules[name]


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    # A namespace package has no file, only the folders it is made of.
    places = [Path(file)] if file else [Path(p, "_") for p in getattr(module, "__path__", [])]
    for place in places:
        home = place.parent.parent if hasattr(module, "__path__") else place.parent
        if home == folder:
            return True
    return False
