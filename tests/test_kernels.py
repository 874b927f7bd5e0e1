"""Section 12, kernels: each against its reference in float64, interpreted and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "kernels.py"
KERNELS = {"split_heads", "exclude_self", "nll"}
FLOOR = 1e-5  # rounding of float32, where the reference is that exact

# Schema, fake and autograd of every operator agree, also when traced.
OPCHECK = """
import torch, sys
from kernels import cases
for name, operator, _, arguments in cases("cpu", torch.float32):
    operator = getattr(torch.ops.golf, name).default
    leaves = [x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
              for x in arguments]
    torch.library.opcheck(operator, tuple(leaves), test_utils=(
        "test_schema", "test_autograd_registration", "test_faketensor"))
print("registered")
"""


def run(*arguments: str, interpret: bool) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpret else {}
    answer = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True,
                            timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return answer.stdout


def check(lines: list[str]) -> None:
    """Every kernel was compared, and errs at most twice as much as its reference."""
    found = [json.loads(line) for line in lines]
    assert {row["kernel"] for row in found} == KERNELS
    assert [row for row in found
            if not row["error"] <= 2 * row["reference_error"] + FLOOR] == []


def test_kernels_equal_their_references_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    check(run(str(SCRIPT), "cpu", interpret=True).splitlines())


def test_operators_are_registered_consistently() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert run("-c", OPCHECK, interpret=True).strip() == "registered"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_err_at_most_twice_as_much_as_bf16() -> None:
    check(run(str(SCRIPT), "cuda", interpret=False).splitlines())
