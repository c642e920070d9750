# SPDX-License-Identifier: Apache-2.0
"""YAML files that people write, read so that nothing in them surprises."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from zsq.errors import yaml_problem

#: References to what stands elsewhere in a file; more than a person writes could unfold into all of memory.
MOST_ALIASES = 100


class _Loader(yaml.SafeLoader):
    """Plain values alone, every key once, and few references."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MOST_ALIASES:
                raise yaml.YAMLError(f"it has more than {MOST_ALIASES} references (*name)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


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
