"""Budgets of the one file: it should be read top to bottom once."""

from __future__ import annotations

import ast
import re

import pytest
from toy import PROGRAM

SOURCE = PROGRAM.read_text()
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def test_file_is_short_enough() -> None:
    assert len(SOURCE.splitlines()) <= 3000
    assert SOURCE.isascii()


def test_functions_are_short_enough() -> None:
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in FUNCTIONS)
    longest = [node.name for node in FUNCTIONS if (node.end_lineno or 0) - node.lineno + 1 > 80]
    assert not longest
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[len(lengths) * 9 // 10] <= 45


def test_sections_stand_in_order() -> None:
    names = re.findall(r"^# ====  (\d+)  ([A-Z].*?)  =+$", SOURCE, re.MULTILINE)
    assert [int(number) for number, _ in names] == list(range(1, 13))
    assert [name for _, name in names] == [
        "Config", "Runtime", "Data", "Model", "Optimizer", "Training", "Quantisation", "Artifact",
        "Evaluation", "Test-time training", "Main", "Kernels"]


def test_program_starts_on_its_last_lines() -> None:
    assert isinstance(TREE.body[-1], ast.If)
    assert ast.unparse(TREE.body[-1].test) == "__name__ == '__main__'"


@pytest.mark.parametrize("kind", [ast.Assert, ast.Global])
def test_statements_that_packing_or_reading_would_lose_are_absent(kind: type[ast.stmt]) -> None:
    assert not [node.lineno for node in ast.walk(TREE) if isinstance(node, kind)]


def test_every_function_is_typed() -> None:
    for node in FUNCTIONS:
        if node.name.endswith("_kernel"):  # what Triton compiles has types of its own
            continue
        assert node.returns is not None, node.name
        untyped = {a.arg for a in [*node.args.args, *node.args.kwonlyargs] if not a.annotation}
        assert untyped <= {"self", "cls"}, node.name


def test_environment_is_read_in_few_places() -> None:
    readers = [line for line in SOURCE.splitlines() if re.search(r"os\.(environ|getenv)", line)]
    assert len(readers) <= 2


def test_no_text_stands_inside_a_replacement_field() -> None:
    """Python 3.12 would write it so that 3.11 cannot read the packed program."""
    fields = [f for node in ast.walk(TREE) if isinstance(node, ast.JoinedStr)
              for f in node.values if isinstance(f, ast.FormattedValue)]
    assert len(fields) > 100
    assert not [f.lineno for f in fields for inner in ast.walk(f.value)
                if isinstance(inner, ast.JoinedStr)
                or (isinstance(inner, ast.Constant) and isinstance(inner.value, str))]
