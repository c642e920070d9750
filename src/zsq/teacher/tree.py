# SPDX-License-Identifier: Apache-2.0
"""Small tools for nested modules and nested arguments."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import Node


def as_node(value: object) -> Node:
    """Return ``value``, which is a node."""
    assert isinstance(value, Node)
    return value


def flat(value: object) -> Iterator[object]:
    """Yield what nested lists and tuples hold.

    Example:
        >>> list(flat([1, (2, [3])]))
        [1, 2, 3]
    """
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    else:
        yield value


def plain(value: object) -> object:
    """Turn fx's immutable lists into plain ones."""
    if isinstance(value, tuple):
        return tuple(plain(v) for v in value)
    return [plain(v) for v in value] if isinstance(value, list) else value


def attribute(module: nn.Module, path: str) -> object:
    """Return what a dotted path names: a module, a parameter or any other attribute."""
    found: object = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def child(root: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path, or None."""
    found: nn.Module | None = root
    for part in path.split("."):
        found = found._modules.get(part) if found is not None else None
    return found


def add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at a dotted path, making containers on the way; nested modules stay."""
    parents, _, last = path.rpartition(".")
    for part in parents.split(".") if parents else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    existing = root._modules.get(last)
    root.add_module(last, module)
    if existing is not None:  # a bare container made for something deeper: keep its children
        for name, child in existing.named_children():
            module.add_module(name, child)
