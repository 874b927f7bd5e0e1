"""tools/bench.py: the counts behind its floors, and that a tiny run gives every promised figure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as golf
from tools import bench

# Of the keys that results have, those that a machine without start-up figures and GPU gives.
KEYS = {"gpu", "versions", "tokens_per_micro_step", "micro_tok_s_unlooped", "micro_tok_s_looped",
        "step_overhead_ms", "quantise_seconds", "encode_seconds", "decode_seconds",
        "load_to_first_score_seconds", "sliding_tok_s", "ttt_documents_tok_s",
        "ttt_documents_startup_seconds", "ttt_documents_recompiles", "audit_overhead_percent",
        "projected_full_eval_seconds_8gpu", "rows"}


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
        assert math.isfinite(row["value"])
        assert row["floor"] is None or row["floor"] > 0
        # A backward pass is a difference of two timings, which may be noise on a busy machine.
        if not row["name"].endswith("backward"):
            assert row["value"] > 0
            assert row["floor"] is None or row["ratio_to_floor"] > 0
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
    ("void at::native::reduce_kernel<512>", "other"),
])
def test_kernels_are_grouped_by_their_work(kernel: str, group: str) -> None:
    assert bench.group_of(kernel) == group


def test_seconds_of_a_pass_are_recovered() -> None:
    passes, widths = np.array([10.0, 5.0, 7.0]), np.array([1000.0, 2000.0, 300.0])
    found = bench.fit_seconds(passes, widths, 0.1 * passes + 0.002 * widths)
    assert found == pytest.approx((0.1, 0.002))
    assert bench.fit_seconds(passes, widths, 0.002 * widths - 0.01 * passes)[0] == 0


def test_samples_are_whole_batches_of_the_official_lengths() -> None:
    config = golf.Config()
    samples = bench.document_samples(config)
    for name, batches in (("short", 16), ("middle", 8), ("longest", 1)):
        assert len(bench.pass_costs(config, samples[name])) == batches
        assert len(samples[name]) == batches * config.ttt_batch_size
    stream = bench.synthetic_stream(config, samples["short"])
    lengths = stream.document_stops - stream.document_starts
    assert lengths.tolist() == samples["short"].tolist()
    assert samples["short"].max() <= 512 < samples["middle"].min() < 2048
    longest, whole = (golf.document_passes(np.array([0]), np.array([n]), config)[0][-1]
                      for n in (20_000, 97_000))
    assert longest[1] == whole[1] == 2048
    assert longest[0].skip == whole[0].skip


def test_documents_can_be_timed_alone(make_env: Callable[[], dict[str, str]], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf, "official_lengths", lambda: np.arange(64, 3000, 7))
    for name, value in make_env().items():
        monkeypatch.setenv(name, value)
    assert bench.main(["--quick", "--only", "documents"]) == 0
    (path,) = (tmp_path / "logs").glob("bench_*.json")
    result = json.loads(path.read_text())
    assert result["ttt_documents_tok_s"] > 0
    assert result["projected_full_eval_seconds_8gpu"] >= result["ttt_documents_startup_seconds"]
    assert result["ttt_documents_recompiles"] == 0
    assert any(row["name"].startswith("documents longest") for row in result["rows"])
    assert not any(row["name"] == "copy" for row in result["rows"])


@pytest.mark.parametrize(("arguments", "message"), [
    ("--only trainig", "startup, training"),
    ("--quick --only startup,training", "--quick takes no start-up figures"),
    ("--only startup,documents --profile p.txt", "--only startup,documents trains nothing")])
def test_arguments_without_effect_are_usage_errors(capsys: pytest.CaptureFixture[str],
                                                   arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
