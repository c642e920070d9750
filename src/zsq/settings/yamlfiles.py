# SPDX-License-Identifier: Apache-2.0
"""YAML files that people write, read so that nothing in them surprises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from zsq.errors import yaml_problem

#: Values that a file may come to when all that it refers to is written out; a few references to references
#: are more than memory holds.
MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """Plain values alone, every key once, and no more than fit into memory."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _unfolded(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its references (*name) unfold to more than {MOST_VALUES} values")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:  # here merges (<<) are still keys themselves
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


def _unfolded(node: yaml.Node, counted: dict[int, int]) -> int:
    """Return how many values a node holds, each as often as it is referred to."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = MOST_VALUES  # of one that holds itself
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        counted[id(node)] = min(
            1 + sum(_unfolded(part, counted) for part in parts), 2 * MOST_VALUES
        )
    return counted[id(node)]


def read_yaml(source: str | Path | bytes) -> Any:
    """Return what a YAML file, or its content, says.

    Raises:
        ValueError: it cannot be read; says why in one line.

    Example:
        >>> read_yaml(b"a: [1, 2]")
        {'a': [1, 2]}
        >>> read_yaml(b"{a: 1, a: 2}")
        Traceback (most recent call last):
            ...
        ValueError: the key 'a' stands there twice (line 1, column 8)
    """
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return yaml.load(content, Loader=_Loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(yaml_problem(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        # PyYAML's own, of values that are no dates, numbers or booleans though they are said to be
        raise ValueError(f"a value is not what it is said to be ({error})"[:150]) from error
