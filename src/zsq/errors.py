# SPDX-License-Identifier: Apache-2.0
"""The errors zsq raises on purpose.

Every message says what is wrong, the value seen, what is allowed and what to do next.
"""

import re


class ZsqError(Exception):
    """Base of every error that zsq raises on purpose. The command line exits with ``exit_code``."""

    exit_code = 1


class UsageError(ZsqError, ValueError):
    """What was asked for cannot be done: a bad value, an unknown name, an unsuitable network."""

    exit_code = 2


class RunError(ZsqError, RuntimeError):
    """A run that was asked for correctly and failed: a loss became NaN, a full disk, no parity."""


class ToldError(ZsqError):
    """An error that the user has been told about already, perhaps by another process of the run.

    Args:
        exit_code: what the command line exits with.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("the run ended with an error that was shown before")
        self.exit_code = exit_code


def printable(text: str) -> str:
    r"""Replace the characters that a terminal acts on, other than ends of lines and tabs.

    Example:
        >>> printable("a\x1b[31mb")
        'a?[31mb'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


def one_line(text: str) -> str:
    r"""Replace ends of lines by spaces, and the characters that a terminal acts on as `printable` does.

    Example:
        >>> one_line("two\n\nlines\x1b")
        'two lines?'
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in line)


def yaml_problem(error: Exception) -> str:
    """Say in one line why a YAML file cannot be read, without PyYAML's picture of the place.

    Example:
        >>> import yaml
        >>> try:
        ...     yaml.safe_load("[1")
        ... except yaml.YAMLError as error:
        ...     print(yaml_problem(error))
        expected ',' or ']', but got '<stream end>' (line 1, column 3)
    """
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if not problem or mark is None:
        return one_line(str(error))[:150]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})"
