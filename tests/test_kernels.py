"""Section 12, kernels: against the reference in float64, interpreted and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt as golf

SCRIPT = Path(__file__).parent / "kernels.py"
INTERPRETER = "3.9"  # of Triton, from which on its interpreter runs with NumPy of today
FLOOR = 1e-6  # rounding of float32, where the reference is that exact

# Schema and fake of the operator agree with what it does, in both directions.
OPCHECK = """
import torch, kernels
kernels.pretend_to_have_processors()
x, up, down = kernels.inputs(kernels.SHAPES[0], "cpu", torch.float32)
x = x.flatten(0, 1).contiguous()
pre, out = (x.new_empty(len(x), len(up)) for _ in range(2))
for left, right, known, room in (x, up, None, pre), (x, down.T, x @ up.T, None):
    torch.library.opcheck(torch.ops.golf.product.default, (left, right, known, room, out, 0.3),
                          test_utils=("test_schema", "test_faketensor"))
print("registered")
"""


def run(*arguments: str, interpret: bool) -> str:
    """What a fresh interpreter prints."""
    paths = filter(None, (str(SCRIPT.parent), os.environ.get("PYTHONPATH")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpret else {}
    answer = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True,
                            timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return answer.stdout


def check(text: str) -> None:
    """Output and gradients of every shape err at most twice as much as those of the reference."""
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({(tuple(row["shape"]), row["tensor"]) for row in rows}) == len(rows) == 8
    assert [row for row in rows if not row["error"] <= 2 * row["reference_error"] + FLOOR] == []


def test_kernel_equals_its_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton", INTERPRETER)
    check(run(str(SCRIPT), "cpu", interpret=True))


def test_operator_is_registered_consistently() -> None:
    pytest.importorskip("triton", INTERPRETER)
    assert run("-c", OPCHECK, interpret=True).strip() == "registered"


@pytest.mark.parametrize(("dtype", "is_cuda", "capability", "triton", "fused"), [
    (torch.bfloat16, True, (9, 0), True, True), (torch.float32, True, (9, 0), True, False),
    (torch.bfloat16, True, (8, 6), True, False),  # no copies by descriptor
    (torch.bfloat16, True, (12, 0), True, False),  # less shared memory
    (torch.bfloat16, True, (9, 0), None, False), (torch.bfloat16, False, None, True, False)])
def test_kernel_serves_bf16_on_hopper_alone(
        config: golf.Config, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_cuda: bool,
        capability: tuple[int, int] | None, triton: object, fused: bool) -> None:
    model = golf.GPT(config, golf.sdpa_attend, dtype)
    monkeypatch.setattr(golf, "triton", triton)
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    weights = model.block_weights()
    assert [w.fused for w in weights] == [fused] * len(weights)


@pytest.mark.gpu
def test_kernel_errs_at_most_twice_as_much_as_bf16() -> None:
    check(run(str(SCRIPT), "cuda", interpret=False))
