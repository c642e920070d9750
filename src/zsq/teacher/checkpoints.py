# SPDX-License-Identifier: Apache-2.0
"""Reading weights from files that strangers wrote, and saying clearly what does not fit.

Nothing here runs code from a file unless the caller passes ``allow_pickle=True``.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from zsq.errors import UsageError

ALLOW_PICKLE_MEANING = (
    "--allow-pickle (allow_pickle=True) unpickles it, which runs whatever code the file contains, "
    "so use it only on files you would also run as a program"
)
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "net")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 3


def describe(error: BaseException) -> str:
    """Return an exception as one short line: its type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def check_finite(module: nn.Module | ExportedProgram) -> None:
    """Refuse a network with NaN or infinite weights or buffers.

    Args:
        module: the network; integer tensors are not looked at.

    Raises:
        UsageError: names the first tensor with such a value and how many it has.

    Example:
        >>> check_finite(nn.Linear(2, 2))
    """
    for name, tensor in _named_tensors(module):
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            continue
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
        bad = int((~torch.isfinite(tensor)).sum())
        raise UsageError(
            f"the network's {name} holds {kind} values ({bad} of {tensor.numel()}): its training "
            "diverged or the file is damaged; use an earlier checkpoint."
        )


def load_checkpoint(module: nn.Module, path: str | Path, *, allow_pickle: bool = False) -> None:
    """Load weights from a file into ``module``, every key exactly.

    Accepts ``.safetensors``, and files of ``torch.save`` that hold a state dict or a dict with one
    under ``"state_dict"``, ``"model"``, ``"model_state_dict"`` or ``"net"``. A prefix that all keys
    share because the network was wrapped (``module.``, ``_orig_mod.``) is removed.

    Args:
        module: the network to fill, in place.
        path: the checkpoint.
        allow_pickle: also read files that can run code while they are read.

    Raises:
        UsageError: the file is missing, unreadable, needs ``allow_pickle``, holds no state dict,
            or does not fit the network.
    """
    path = require_file(path)
    if path.suffix == ".safetensors":
        try:
            content: object = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(path, error) from error
    else:
        content = read_torch_file(path, allow_pickle=allow_pickle)
    _load_strictly(module, _strip_wrapper(_find_state_dict(content, path)), path)


def require_file(path: str | Path) -> Path:
    """Return ``path`` with ``~`` expanded.

    Raises:
        UsageError: there is no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}: check the path.")
    return path


def read_torch_file(path: Path, *, allow_pickle: bool) -> object:
    """Read a file of ``torch.save`` to the CPU, without running its code unless allowed.

    Raises:
        UsageError: the file is damaged, is TorchScript, or needs ``allow_pickle``.
    """
    if _is_torchscript(path):
        raise UsageError(
            f"{path} is a TorchScript archive, which cannot be taken apart for quantization: use "
            "the original network (file.py:function) or save it with torch.export.save to a .pt2."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, it then does or fails at
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise IndexError, KeyError, EOFError, ...
        if not _was_refused(error, path):
            raise _unreadable(path, error) from error
        if not allow_pickle:
            raise UsageError(
                f"{path} holds pickled Python objects and not only weights{_culprit(error)}: save "
                f"its state_dict() alone, or allow it: {ALLOW_PICKLE_MEANING}."
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{path} needs Python classes that cannot be imported here ({describe(error)}): put "
            "their code on PYTHONPATH, or build the network with file.py:function and --weights."
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error


def _named_tensors(module: nn.Module | ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, ExportedProgram):
        yield from module.state_dict.items()
        yield from ((k, v) for k, v in module.constants.items() if isinstance(v, Tensor))
    else:
        yield from module.named_parameters()
        yield from module.named_buffers()


def _is_torchscript(path: Path) -> bool:
    try:
        reader = torch._C.PyTorchFileReader(str(path))
    except RuntimeError:  # not a zip archive: older, or not of torch at all
        return False
    return "constants.pkl" in reader.get_all_records()


def _was_refused(error: Exception, path: Path) -> bool:
    """Whether ``torch.load`` refused the content, rather than failed to read it."""
    if not isinstance(error, pickle.UnpicklingError):
        return False
    if "GLOBAL" in str(error) or "Can only" in str(error):
        return True
    # An unknown instruction is a newer pickle protocol, or text that was never a pickle.
    with path.open("rb") as file:
        is_pickle_or_zip = file.read(2) in (
            b"PK",
            b"\x80\x02",
            b"\x80\x03",
            b"\x80\x04",
            b"\x80\x05",
        )
    return "Unsupported operand" in str(error) and is_pickle_or_zip


def _culprit(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found.group(1)})" if found else ""


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{path} cannot be read as a checkpoint ({describe(error)}): it is truncated, damaged or "
        "of another kind; copy or download it again."
    )


def _find_state_dict(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, nn.Module):
        return content.state_dict()
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{path} holds a {type(content).__name__}, not a state dict: save the network's "
            "state_dict() instead."
        )
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value for key, value in content.items()}
    for key in _STATE_DICT_KEYS:
        if isinstance(content.get(key), (Mapping, nn.Module)):
            return _find_state_dict(content[key], path)
    found = _list_some(str(key) for key in content) or "nothing"
    raise UsageError(
        f"{path} holds no state dict: expected tensors, or a dict of them under one of "
        f"{', '.join(_STATE_DICT_KEYS)}, but found {found}."
    )


def _strip_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPER_PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _strip_wrapper({key.removeprefix(prefix): v for key, v in state.items()})
    return state


def _load_strictly(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    expected = module.state_dict()
    # A network that itself has a top-level "module" has such keys rightly.
    if expected and all(key.startswith("module.") for key in expected):
        state = {f"module.{key}": value for key, value in state.items()}
    wrong_shape = [
        f"{key} ({list(value.shape)} in the file, {list(expected[key].shape)} in the network)"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    wrong_kind = [
        f"{key} ({str(value.dtype).removeprefix('torch.')} in the file)"
        for key, value in state.items()
        if key in expected and not _same_kind(value, expected[key])
    ]  # which would be rounded, or lose a part, without a word
    problems = [f"other shapes: {_list_some(wrong_shape)}"] if wrong_shape else []
    problems += [f"not real numbers: {_list_some(wrong_kind)}"] if wrong_kind else []
    try:
        # strict=False lets the modules' own hooks rename old keys first; nothing is let through.
        outcome = module.load_state_dict(
            {key: v for key, v in state.items() if key not in expected or _fits(v, expected[key])},
            strict=False,
        )
    except RuntimeError as error:
        raise UsageError(f"{path} does not fit the network ({describe(error)}).") from error
    # Counters of batches do not enter the inference, and old checkpoints lack them.
    missing = [
        key
        for key in outcome.missing_keys
        if key not in state and not key.endswith("num_batches_tracked")
    ]
    if missing:
        problems.append(f"missing: {_list_some(missing)}")
    if outcome.unexpected_keys:
        problems.append(f"unexpected: {_list_some(outcome.unexpected_keys)}")
    if problems:
        raise UsageError(
            f"{path} does not fit the network; {'; '.join(problems)}: check that it was saved from "
            "this architecture and number of classes, or build the network with file.py:function."
        )


def _fits(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and _same_kind(value, expected)


def _same_kind(value: Tensor, expected: Tensor) -> bool:
    return value.is_floating_point() or not expected.is_floating_point()


def _list_some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
