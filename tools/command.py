"""What the command lines of the tools share: bounded arguments, errors in one line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from tools.runs import RunError

Number = TypeVar("Number", int, float)

# An error's last line in a traceback; torchrun's own says nothing behind its colon.
ERROR_LINE = re.compile(
    r"^(?:\[rank\d+\]: )?((?:error|[\w.]*(?:Error|Exception))(?:: \S.*)?)$", re.MULTILINE)
KILLED_LINE = re.compile(r"Signal \d+ .*")


def exit_status(main: Callable[[], int], *known: type[Exception]) -> int:
    """That of `main`; 1, with a line on stderr, for an error of a run, a file or a known kind."""
    expected: tuple[type[Exception], ...] = (RunError, OSError, *known)
    try:
        return main()
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def last_error(text: str) -> str:
    """Why a process ended, by what it and its ranks wrote to stderr."""
    found = ERROR_LINE.findall(text) or KILLED_LINE.findall(text) or ["no error on stderr"]
    return found[-1].removeprefix("error: ")


def integers(text: str) -> list[int]:
    """An argument of whole numbers between commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be whole numbers, separated by commas") from None


def number_between(kind: type[Number], low: Number, high: Number) -> Callable[[str], Number]:
    """A parser of arguments for numbers in [low, high]."""

    def number(text: str) -> Number:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    return number
