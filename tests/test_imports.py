"""Importing the program: quick, without side effects, on a machine that has next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from toy import ROOT, quiet_environment

# Optional packages are hidden, as on a machine that never had them.
MEASURE = """
import json, os, sys, threading, time
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("brotli", "triton", "flash_attn", "flash_attn_interface",
                                  "sentencepiece"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
sys.path.insert(0, sys.argv[1])
begin = time.perf_counter()
import torch
middle = time.perf_counter()
state = lambda: [dict(os.environ), threading.active_count(), torch.get_num_threads(),
                 str(torch.get_default_dtype()), torch.get_float32_matmul_precision(),
                 torch.initial_seed(), torch.is_grad_enabled(), sorted(os.listdir())]
before = state()
start = time.perf_counter()
import train_gpt
end = time.perf_counter()
print(json.dumps({"torch": middle - begin, "own": end - start, "same": state() == before,
                  "loaded": [m for m in ("torch._dynamo", "torch._inductor") if m in sys.modules]}))
"""


def import_once(folder: Path) -> dict[str, object]:
    process = subprocess.run([sys.executable, "-c", MEASURE, str(ROOT)], cwd=folder,
                             env=quiet_environment(), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return json.loads(process.stdout)


def test_import_adds_little_and_changes_nothing(tmp_path: Path) -> None:
    runs = [import_once(tmp_path) for _ in range(3)]
    assert all(run["same"] for run in runs)
    assert all(run["loaded"] == [] for run in runs)
    assert not list(tmp_path.iterdir())
    own, whole = (min(float(str(run[key])) for run in runs) for key in ("own", "torch"))
    assert own < 0.1 * whole
