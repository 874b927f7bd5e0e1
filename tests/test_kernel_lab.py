"""tools/kernel_lab.py in Triton's interpreter, in a process of its own: triton reads the switch
for its interpreter when it is first imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

LAB = Path(__file__).parent.parent / "tools" / "kernel_lab.py"
CASES = ("mix_norm", "qk", "xsa", "square", "mlp", "nll", "nll_fast", "head", "head_fast")
BLOCKS = ("block serial", "block parallel")

# Registration: schema, fake and autograd of every operator agree, also when traced.
OPCHECK = """
import torch
from tools import kernel_lab as lab
tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
for case, operator, rest in (
        ("mix_norm", lab.mix_norm, ()), ("qk", lab.qk, ()), ("xsa", lab.xsa, ()),
        ("square", lab.square, ()), ("mlp", lab.mlp, ()), ("nll", lab.nll, (30.0, False)),
        ("head", lab.head_nll, (30.0, False))):
    make = next(c.inputs for c in lab.CASES if c.name == case)
    given = make(lab.EVEN, torch.Generator().manual_seed(0))
    leaves = [t.requires_grad_() for t in (*given.narrow, *given.wide)]
    torch.library.opcheck(operator, (*leaves, *given.fixed, *rest), test_utils=tests)
print("registered")
"""


def run_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with the kernels interpreted."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PRESET": "pr1493",
           "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(LAB.parent.parent)}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True,
                          timeout=300, check=False)


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    path = tmp_path_factory.mktemp("lab") / "checks.json"
    answer = run_lab(str(LAB), "--check", "--json", str(path))
    assert path.exists(), answer.stderr
    found: list[dict[str, object]] = json.loads(path.read_text())["checks"]
    return found


def test_errors_are_at_most_twice_the_bf16_reference(checks: list[dict[str, object]]) -> None:
    assert {check["case"] for check in checks} == {*CASES, *BLOCKS}
    assert [check for check in checks if not check["passed"]] == []


def test_gradients_of_every_case_were_checked(checks: list[dict[str, object]]) -> None:
    for case in CASES:
        whats = {str(check["what"]) for check in checks if check["case"] == case}
        assert "output 0" in whats
        assert "gradient 0" in whats


def test_operators_are_registered_for_tracing() -> None:
    answer = run_lab("-c", OPCHECK)
    assert answer.stdout.strip().endswith("registered"), answer.stderr[-2000:]


def test_predictions_come_from_shapes(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    answer = run_lab(str(LAB), "--predict", "--json", str(path))
    assert answer.returncode == 0, answer.stderr
    rows = {(row["name"], row["direction"]): row for row in json.loads(path.read_text())["rows"]}
    assert rows["mix_norm", "forward"]["floor_bytes"] == 98_304 * 4 * 512 * 2
    assert rows["nll", "backward"]["floor_bytes"] == 98_304 * 2 * 8192 * 2
    assert rows["qk", "forward"]["uses"] == [11, 17]
    assert all(row["predicted_gain"] > -1e-3 for row in rows.values())
    assert all(row["floor_seconds"] > 0 for key, row in rows.items() if key[0] != "fold")


def test_unknown_case_is_a_usage_error() -> None:
    answer = run_lab(str(LAB), "--only", "norm")
    assert answer.returncode == 2
    assert "mix_norm" in answer.stderr
