"""tools/bench.py: the counts behind its floors, and that a tiny run gives every promised figure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_gpt as golf
from tools import bench

# Of the keys that results have, those that a machine without start-up figures and GPU gives.
KEYS = {"gpu", "versions", "tokens_per_micro_step", "micro_tok_s_unlooped", "micro_tok_s_looped",
        "step_overhead_ms", "quantise_seconds", "encode_seconds", "decode_seconds",
        "load_to_first_score_seconds", "sliding_tok_s", "rows"}


@pytest.fixture(scope="module")
def published() -> golf.Config:
    return golf.Config.from_env({"PRESET": "pr1493"})


@pytest.fixture
def tiny_result(make_env: Callable[[], dict[str, str]], tmp_path: Path,
                monkeypatch: pytest.MonkeyPatch,
                capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    for name, value in make_env().items():
        monkeypatch.setenv(name, value)
    assert bench.main(["--quick", "--profile", str(tmp_path / "profile.txt")]) == 0
    print(capsys.readouterr().out)
    (path,) = (tmp_path / "logs").glob("bench_*.json")
    return json.loads(path.read_text())


def test_counted_operations_equal_the_trainers(published: golf.Config) -> None:
    for plan in golf.depth_plans(published):
        counted = bench.counted_operations(published, len(plan.visits))
        told = golf.flops_per_token(published, plan) * bench.micro_tokens(published)
        assert counted == pytest.approx(told, rel=1e-12)


def test_newton_schulz_of_the_published_shapes(published: golf.Config) -> None:
    assert bench.newton_schulz_operations(published) == pytest.approx(373e9, rel=0.005)


def test_layer_shapes_are_the_models(published: golf.Config) -> None:
    with torch.device("meta"):
        model = golf.GPT(published, golf.sdpa_attend)
    stacks = {name: tuple(p.shape[-2:]) for name, p in model.stacks().items()}
    stacks["head"] = stacks.pop("embed")
    assert bench.layer_shapes(published) == stacks


def test_result_has_the_promised_keys_and_rows(tiny_result: dict[str, object],
                                               tmp_path: Path) -> None:
    assert not KEYS - tiny_result.keys()
    rows = tiny_result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        assert {"name", "value", "unit", "floor", "ratio_to_floor"} <= row.keys()
        # A backward pass is a difference of two timings, which may be noise on a busy machine.
        assert row["value"] > 0 or row["name"].endswith("backward")
        assert math.isfinite(row["value"])
        assert row["floor"] is None or (row["floor"] > 0 and row["ratio_to_floor"] > 0)
    names = {row["name"] for row in rows}
    assert {"copy", "product head forward", "attention math backward", "looped micro-step",
            "optimizer step", "average", "loader", "solve", "sliding"} <= names
    text = (tmp_path / "profile.txt").read_text()
    assert "== unlooped" in text
    assert "== looped" in text
    assert "products" in text


def test_missing_dataset_is_replaced_by_random_tokens(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RANDOM_TOKENS", 5000)
    config = golf.Config.from_env({"PRESET": "demo", "DATA_PATH": str(tmp_path / "none")})
    found, what = bench.with_tokens(config, tmp_path)
    assert what == "random tokens"
    stream = bench.validation_stream(found, 1000, what)
    assert stream.num_targets == stream.num_bytes == 1000 // config.eval_seq_len \
        * config.eval_seq_len


def test_an_earlier_result_stays(tmp_path: Path, make_env: Callable[[], dict[str, str]]) -> None:
    instance = bench.Bench.__new__(bench.Bench)
    instance.gpu, instance.rows, instance.result = "NVIDIA H200", [], {"gpu": "NVIDIA H200"}
    first, second = instance.save(tmp_path), instance.save(tmp_path)
    assert first != second
    assert first.name.startswith("bench_nvidia-h200_")
    assert first.exists()


@pytest.mark.parametrize(("kernel", "group"), [
    ("nvjet_tst_128x256_64x3_1x2_h_bz_coopA_NNT", "products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob", "attention"),
    ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90", "attention"),
    ("triton_red_fused_mul_sum_3", "reductions (triton)"),
    ("triton_poi_fused_add_1", "elementwise (triton)"),
    ("Memcpy DtoD (Device -> Device)", "copies"),
    ("mix_norm_backward", "lab kernels"),
    ("void at::native::reduce_kernel<512>", "other"),
])
def test_kernels_are_grouped_by_their_work(kernel: str, group: str) -> None:
    assert bench.group_of(kernel) == group


def test_unknown_part_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--only", "trainig"])
    assert stop.value.code == 2
    assert "startup, training" in capsys.readouterr().err
