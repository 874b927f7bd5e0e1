"""tools/command.py: whatever stops a tool is one line and a documented exit status."""

from __future__ import annotations

import re
import subprocess

import pytest
from toy import ROOT, run_program

from tools import command

TORCHRUN = """\
E1130 21:55:41.508000 15306 torch/distributed/elastic/multiprocessing/api.py:1002] failed
Traceback (most recent call last):
  File "torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\x20
============================================================
tools/bench_ranks.py FAILED
------------------------------------------------------------
  exitcode  : -9 (pid: 15322)  (SIGKILL)
  error_file: <N/A>
  traceback : {reason}
============================================================
"""
NO_TRACEBACK = TORCHRUN.format(reason="To enable traceback see: https://pytorch.org/docs/")


@pytest.mark.parametrize(("text", "reason"), [
    ("Traceback:\n  raise\ntorch.OutOfMemoryError: CUDA out of memory.\nmore\n" + NO_TRACEBACK,
     "torch.OutOfMemoryError: CUDA out of memory."),
    ("[rank1]: ValueError: first\n[rank1]: RuntimeError: second\n" + NO_TRACEBACK,
     "RuntimeError: second"),
    ("error: rank 0: no shards\n" + NO_TRACEBACK, "rank 0: no shards"),
    ("AssertionError\n" + NO_TRACEBACK, "AssertionError"),
    (TORCHRUN.format(reason="Signal 9 (SIGKILL) received by PID 15322"),
     "Signal 9 (SIGKILL) received by PID 15322"),
    (NO_TRACEBACK, "no error on stderr"),
])
def test_the_error_of_a_rank_is_found_among_torchruns_lines(text: str, reason: str) -> None:
    assert command.last_error(text) == reason


@pytest.mark.parametrize(("tool", "arguments", "named"), [
    ("bench.py", [], "/proc/nope"),
    ("bench_ranks.py", [], "/proc/nope"),
    ("quantiser_curve.py", [], "/proc/nope"),
    ("quantiser_curve.py", ["--out", "/proc/x/y.json"], "/proc/x"),
    ("adaptation_curve.py", ["none.bin"], "/proc/nope"),
    ("adaptation_curve.py", ["none.bin", "--out", "/proc/x/y.json"], "/proc/x"),
])
def test_a_folder_that_cannot_be_made_is_one_line(
    tool: str, arguments: list[str], named: str,
) -> None:
    process = run_program(ROOT / "tools" / tool, {"PRESET": "demo", "LOG_DIR": "/proc/nope"},
                          *arguments)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert named in process.stderr


def test_make_help_names_every_target() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout
    targets = re.search(r"^\.PHONY: help (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets and all(f"make {target} " in text for target in targets[1].split()[1:])
