"""tools/doctor.py: what each check must find, on small data and a stand-in for nvidia-smi."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt
from tools import doctor
from tools.prepare_data import write_shard

VOCAB = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, two training shards and a validation shard, with their manifest."""
    folder = tmp_path_factory.mktemp("data")
    words = ["the quick brown fox", "a lazy dog sleeps", "under old trees by rivers"]
    text = [f"{words[i % 3]} {words[i * 7 % 3]} {i} {words[i * 5 % 3]}" for i in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokens"), vocab_size=VOCAB,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokens.model"))
    ids = [token for line in text for token in [train_gpt.BOS_ID, *tokenizer.encode(line)]]
    shards = folder / "shards"
    shards.mkdir()
    for name in ("train_000000", "train_000001", "val_000000"):
        write_shard(shards / f"fineweb_{name}.bin", np.array(ids, dtype=np.uint16))
    return folder


@pytest.fixture
def env(data: Path, tmp_path: Path) -> dict[str, str]:
    shards = tmp_path / "shards"
    shutil.copytree(data / "shards", shards)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokens.model"))
    return {"PRESET": "demo", "DATA_PATH": str(shards),
            "TOKENIZER_PATH": str(data / "tokens.model"),
            "VOCAB_SIZE": str(tokenizer.vocab_size()), "LOG_DIR": str(tmp_path / "logs"),
            "RUN_DIR": str(tmp_path / "runs"), "PATH": os.environ["PATH"]}


def findings(env: Mapping[str, str]) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(doctor.Pod(env))}


def names_of(env: Mapping[str, str], status: str) -> list[str]:
    return [check.name for check in findings(env).values() if check.status == status]


# ---- the whole report ----


def test_a_good_machine_is_ready(
    env: dict[str, str], capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main(["--quick"], env) == 0
    report = capsys.readouterr().out
    assert "ready" in report.splitlines()[-1]
    assert "2 in " in report and "targets" in report and "bits a weight" in report
    assert "brotli" in report and "attention" in report


def test_json_report_names_every_finding(
    env: dict[str, str], capsys: pytest.CaptureFixture[str],
) -> None:
    env["TOKENIZER_PATH"] = "nowhere.model"
    assert doctor.main(["--json", "--quick"], env) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is False and "tokenizer" in report["verdict"]
    assert all(set(row) == {"name", "status", "detail", "fix"} for row in report["checks"])
    assert {row["status"] for row in report["checks"]} <= {"ok", "warn", "fail"}


def test_nothing_is_left_behind(env: dict[str, str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    findings(env)
    assert sorted(tmp_path.rglob("*")) == before


def test_every_failure_says_what_to_type(env: dict[str, str]) -> None:
    for broken in ({"TOKENIZER_PATH": "none"}, {"DATA_PATH": "none"}, {"MATRIX_LRR": "1"},
                   {"SEED": "-1"}, {"LOG_DIR": "/dev/null/logs"}):
        failures = [c for c in findings({**env, **broken}).values() if c.status == "fail"]
        assert failures and all(check.fix for check in failures), broken


def test_command_line_is_quick_on_a_cpu(env: dict[str, str]) -> None:
    command = [sys.executable, doctor.__file__, "--json", "--quick"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True,
                          timeout=30, check=True)
    assert json.loads(done.stdout)["ready"]


def test_one_broken_check_does_not_hide_the_others(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(path: Path) -> str:
        raise RuntimeError("no such thing\nsecond line")

    monkeypatch.setattr(doctor, "is_writable", broken)
    found = findings(env)
    assert found["disk"].status == "fail" and found["disk"].detail == "RuntimeError: no such thing"
    assert found["attention"].status == "ok"


# ---- settings, packages, compiler ----


def test_misspelt_setting_ends_the_examination_with_its_name(env: dict[str, str]) -> None:
    found = findings({**env, "MATRIX_LRR": "1"})
    assert found["settings"].status == "fail" and found["settings"].fix == "unset MATRIX_LRR"
    assert "tokenizer" not in found


def test_overrides_are_listed(env: dict[str, str]) -> None:
    assert "MATRIX_LR=0.5" in findings({**env, "MATRIX_LR": "0.5"})["settings"].detail


def test_missing_torch_comes_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = findings({})
    assert found["torch"].fix == doctor.INSTALL_TORCH_CPU
    assert {"numpy", "sentencepiece"} <= set(found) and "settings" not in found


def test_missing_codec_fails_before_it_is_needed(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "brotli", None)
    assert findings(env)["codec"].status == "fail"


def test_coder_in_use_is_named_and_another_one_than_asked_for_is_noticed(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert findings(env)["codec"].detail.startswith("ans, with brotli ")
    with_zstd = {**env, "QUANTISER": "gptq", "COMPRESSOR": "zstd"}
    find_spec = train_gpt.importlib.util.find_spec
    monkeypatch.setattr(train_gpt.importlib.util, "find_spec",
                        lambda name: None if name == "zstandard" else find_spec(name))
    found = findings(with_zstd)["codec"]
    assert found.status == "warn" and found.fix == "pip install zstandard"
    assert found.detail.startswith("brotli") and found.detail.endswith("COMPRESSOR=zstd")


def test_compiler_is_wanted_only_for_compiled_runs(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert findings(env)["compiler"].status == "ok"
    assert "build-essential" in findings({**env, "COMPILE": "1"})["compiler"].fix


def test_disabled_compile_is_noticed(env: dict[str, str]) -> None:
    variable = "TORCH_COMPILE_DISABLE"
    assert findings({**env, variable: "1"})["compile"].fix == f"unset {variable}"
    assert "compile" not in findings({**env, variable: "0"})


# ---- data ----


def test_truncated_shard_is_found_by_its_header(env: dict[str, str]) -> None:
    shard = Path(env["DATA_PATH"]) / "fineweb_train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    found = findings(env)["train shards"]
    assert found.status == "fail" and shard.name in found.detail and "prepare_data.py" in found.fix


def test_token_id_past_the_vocabulary_is_found(env: dict[str, str]) -> None:
    shard = Path(env["DATA_PATH"]) / "fineweb_train_000000.bin"
    write_shard(shard, np.full(600, 5000, dtype=np.uint16))
    assert "5000" in findings(env)["train shards"].detail


def test_missing_validation_is_found(env: dict[str, str]) -> None:
    (Path(env["DATA_PATH"]) / "fineweb_val_000000.bin").unlink()
    assert findings(env)["val shards"].status == "fail"


@pytest.mark.parametrize(("facts", "status"), [
    ({"name": "demo"}, "ok"), ({"tokenizer_sha256": "0" * 64}, "fail"), ({"val_bytes": 1}, "fail"),
    ({"val_bytes": 10**9}, "ok"),
])
def test_manifest_must_describe_the_shards(env: dict[str, str], facts: dict, status: str) -> None:
    (Path(env["DATA_PATH"]) / "manifest.json").write_text(json.dumps(facts))
    assert findings(env)["manifest"].status == status


def test_official_targets_must_have_the_official_bytes(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = train_gpt.ValStream.load(train_gpt.Config.from_env(env)).num_targets
    monkeypatch.setattr(doctor, "OFFICIAL_TARGETS", targets)
    assert "official" in findings(env)["val shards"].detail
    assert findings(env)["val shards"].status == "fail"


# ---- disk, memory, port, caches, artifact ----


def test_unwritable_folder_is_found(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = findings({**env, "LOG_DIR": str(tmp_path / "file" / "logs")})
    assert found["LOG_DIR"].status == "fail" and found["LOG_DIR"].fix.startswith("export LOG_DIR=")


def test_full_disk_is_found(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert {"LOG_DIR", "RUN_DIR"} <= set(names_of(env, "fail"))


def test_little_memory_is_found(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: 2 * doctor.GIB)
    assert findings(env)["memory"].status == "warn"
    monkeypatch.setattr(doctor, "available_memory", lambda: doctor.GIB // 2)
    assert findings(env)["memory"].status == "fail"


def test_available_memory_is_below_the_machines_and_above_nothing() -> None:
    assert 0 < doctor.available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_taken_port_is_found(env: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert findings({**env, "MASTER_PORT": port})["port"].status == "warn"
    assert findings({**env, "MASTER_PORT": port})["port"].status == "ok"


@pytest.mark.parametrize("port", ["abc", "-1", "0", "65536", "9" * 5000])
def test_port_that_is_none_is_found(env: dict[str, str], port: str) -> None:
    found = findings({**env, "MASTER_PORT": port})["port"]
    assert found.status == "fail" and found.fix == "unset MASTER_PORT"
    assert found.detail == f"MASTER_PORT={port!r} must be between 1 and 65535"


def test_cache_on_a_network_disk_is_found(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    compiled = {**env, "COMPILE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    assert "cold" in findings(compiled)["TORCHINDUCTOR_CACHE_DIR"].detail
    monkeypatch.setattr(doctor, "file_system", lambda path: "nfs4")
    found = findings(compiled)["TORCHINDUCTOR_CACHE_DIR"]
    assert found.status == "warn" and found.fix.startswith("export TORCHINDUCTOR_CACHE_DIR=")


def test_artifact_far_over_its_cap_fails_and_a_little_over_warns(env: dict[str, str]) -> None:
    env = {**env, "QUANTISER": "gptq", "COMPRESSOR": "brotli"}
    size = train_gpt.estimate_artifact_bytes(train_gpt.Config.from_env(env))
    assert findings({**env, "ARTIFACT_CAP_BYTES": str(size // 2)})["artifact"].status == "fail"
    tight = {**env, "ARTIFACT_CAP_BYTES": str(int(size / 1.05))}
    assert findings(tight)["artifact"].status == "warn"
    assert findings({**tight, "FIT": "0"})["artifact"].status == "fail"


@pytest.mark.parametrize(("changes", "status"), [
    ({}, "ok"), ({"NUM_LAYERS": "44"}, "fail"), ({"ARTIFACT_CAP_BYTES": "5000000"}, "fail")])
def test_weights_of_a_fitted_artifact_need_some_bits(changes: dict[str, str], status: str) -> None:
    config = train_gpt.Config.from_env({"PRESET": "record", **changes})
    found, = doctor.check_artifact(doctor.Pod({}), config)
    assert found.status == status and "by design" in found.detail
    weights = sum(shape.numel() for shape in train_gpt.expected_shapes(config)[0].values())
    room = 8 * (config.artifact_cap_bytes - len(train_gpt.packed_program()))
    assert f"{room / weights:.2f} bits a weight" in found.detail
    assert bool(found.fix) == (status == "fail")


# ---- GPUs, from a stand-in for nvidia-smi ----


GPU = "0, NVIDIA H100 80GB HBM3, 570.1, {used}, {heat}, {limit}, 700.00, 1980"
PROGRAM = """#!/bin/sh
case "$1" in
  --query-gpu=index*) cat {folder}/gpus ;;
  --query-compute-apps*) cat {folder}/apps ;;
  --query-gpu=clocks_throttle_reasons.active) cat {folder}/bits ;;
  *) echo "Field \\"$1\\" is not a valid field to query."; exit 2 ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a stand-in that prints the files gpus, apps and bits as an older one would."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(PROGRAM.format(folder=folder))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (folder / "gpus").write_text(GPU.format(used=3, heat=35, limit="700.00") + "\n")
    (folder / "apps").write_text("")
    (folder / "bits").write_text("0x0000000000000001\n")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_idle_gpu_is_good(env: dict[str, str], smi: Path) -> None:
    found = findings(env)
    assert found["other GPU processes"].status == "ok" and found["clocks"].status == "ok"
    assert "1980 MHz" in found["clocks"].detail and "35 C" in found["clocks"].detail


def test_torch_that_cannot_use_the_gpu_fails(env: dict[str, str], smi: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this torch can")
    found = findings(env)["torch and driver"]
    assert found.status == "fail" and "torch" in found.fix


def test_stale_process_is_named_with_the_command(env: dict[str, str], smi: Path) -> None:
    (smi / "apps").write_text("4242, /usr/bin/python3, 70123\n")
    found = findings(env)["other GPU processes"]
    assert found.status == "warn" and "4242 python3 70123 MiB" in found.detail
    assert found.fix.startswith("kill 4242")


def test_memory_used_by_nobody_visible_is_noticed(env: dict[str, str], smi: Path) -> None:
    (smi / "gpus").write_text(GPU.format(used=60123, heat=35, limit="700.00") + "\n")
    assert "out of sight" in findings(env)["other GPU processes"].detail


@pytest.mark.parametrize(("bits", "limit", "text"), [
    ("0x0000000000000020", "700.00", "too hot"), ("0x0000000000000080", "700.00", "power brake"),
    ("0x0000000000000004", "500.00", "limited to 500 of 700 W"),
])
def test_slow_clocks_are_found(
    env: dict[str, str], smi: Path, bits: str, limit: str, text: str,
) -> None:
    (smi / "bits").write_text(bits + "\n")
    (smi / "gpus").write_text(GPU.format(used=3, heat=88, limit=limit) + "\n")
    found = findings(env)["clocks"]
    assert found.status == "warn" and text in found.detail


def test_cells_without_a_number_count_as_none(env: dict[str, str], smi: Path) -> None:
    (smi / "gpus").write_text("0, NVIDIA GB10, 580.1, [N/A], 40, [N/A], [N/A], [N/A]\n")
    (smi / "bits").write_text("[N/A]\n")
    assert findings(env)["clocks"].status == "ok"


# ---- speed ----


def speed(*tflops: float) -> doctor.RankSpeed:
    return doctor.RankSpeed(list(tflops), 3000.0, 50.0, 400.0)


def judged(*speeds: doctor.RankSpeed) -> dict[str, doctor.Check]:
    config = train_gpt.Config.from_env({"PRESET": "pr1493"})
    return {check.name: check for check in doctor.judge_speed(config, speeds)}


def test_equal_gpus_are_good_and_steps_are_near_the_published_ones() -> None:
    found = judged(*[speed(650, 650, 650, 650)] * 8)
    assert found["speed"].status == "ok" and "all-reduce 400 GB/s" in found["speed"].detail
    config = train_gpt.Config.from_env({"PRESET": "pr1493"})
    rates = doctor.rates_at(config, 8 * 650)
    steps = doctor.expected_steps(config, rates)
    assert 4550 * 0.85 < steps < 4550 * 1.15      # 8 x H100, published logs of the system
    assert len(rates) == 2 and f"{steps:,.0f} steps" in found["expected"].detail


def test_slow_and_hot_gpus_are_found() -> None:
    assert "GPU 1 is 10% slower" in judged(speed(600, 600), speed(540, 540))["speed"].detail
    hot = judged(speed(700, 690, 640, 630, 630, 630))["speed"]
    assert hot.status == "warn" and "slower once hot" in hot.detail


def test_step_driven_runs_take_their_own_number_of_steps() -> None:
    config = train_gpt.Config.from_env(
        {"PRESET": "pr1493", "MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": "77"})
    assert doctor.expected_steps(config, doctor.rates_at(config, 100.0)) == 77


def test_measurements_return_rates() -> None:
    cpu = torch.device("cpu")
    rates = doctor.measure_products(cpu, seconds=0.0, size=64)
    assert len(rates) == 1 and rates[0] > 0
    assert all(rate > 0 for rate in doctor.measure_copies(cpu, size=1 << 16))


@pytest.mark.gpu
def test_speed_check_on_gpus(env: dict[str, str]) -> None:
    found = {check.name: check for check in doctor.examine(doctor.Pod(env, bench_seconds=4.0))}
    assert found["speed"].status in ("ok", "warn") and "TFLOP/s" in found["speed"].detail
    assert "steps" in found["expected"].detail


# ---- what a run takes on eight GPUs ----


def logged(folder: Path, name: str, **changes: object) -> None:
    """A result file of a run of pr1493 on one GPU."""
    config = train_gpt.Config.from_env({"PRESET": "pr1493"})
    facts = {
        "run_id": name, "status": "complete", "headline": "ttt_sgd", "started": f"2026 {name}",
        "config": {key: getattr(config, key) for key in train_gpt.MODEL_SETTINGS},
        "hardware": {"gpu": "NVIDIA H200", "gpus": 1}, "bpb": {"ttt_sgd": 1.1},
        "train": {"startup_seconds": 20.0, "tok_s_by_plan": {"unlooped": 1e6, "looped": 1e6}},
        "clocks": {"training_seconds": 590.0, "train_to_artifact_seconds": 605.0,
                   "projected_full_eval_seconds_8gpu": 200.0}}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(facts | changes))


def test_projection_comes_from_the_newest_run_of_the_model(tmp_path: Path) -> None:
    config = train_gpt.Config.from_env({"PRESET": "pr1493"})
    assert doctor.project(config, tmp_path) is None
    logged(tmp_path, "a")
    logged(tmp_path, "b", status="partial")
    logged(tmp_path, "c", config={"num_layers": 3})
    logged(tmp_path, "d", hardware={"gpu": "none", "gpus": 0})
    found = doctor.project(config, tmp_path)
    assert found is not None and found.speed.run_id == "a"
    assert found.rates == {"unlooped": 8e6, "looped": 8e6}
    assert found.seconds == 20 + 600 + 15 + 200
    assert doctor.expected_steps(config, found.rates) == pytest.approx(
        (600 - config.gptq_reserve_seconds) * 8e6 / 786_432)
    other = train_gpt.Config.from_env({"PRESET": "pr1493", "TTT_MODE": "documents",
                                         "MIXER": "legal"})
    projected = doctor.project(other, tmp_path)
    assert projected is not None and projected.evaluation is None    # it ends otherwise
    logged(tmp_path, "e", headline="mixer", bpb={"ttt_sgd": 1.1, "mixer": 1.0})
    projected = doctor.project(other, tmp_path)
    assert projected is not None and projected.evaluation is None    # it adapts otherwise
    logged(tmp_path, "f", headline="mixer", bpb={"ttt_documents": 1.1, "mixer": 1.0})
    projected = doctor.project(other, tmp_path)
    assert projected is not None and projected.evaluation is not None
    assert projected.evaluation.run_id == "f"


def test_launch_command_names_what_differs_and_gives_the_same_settings(
    env: dict[str, str],
) -> None:
    given = {"PRESET": "pr1493", "MATRIX_LR": "0.026", "AUDIT": "1", "DATA_PATH": "a b"}
    config = train_gpt.Config.from_env(given)
    command = doctor.launch_command(config, 8)
    words = shlex.split(command.partition(" torchrun ")[0])
    assert dict(word.split("=", 1) for word in words) == given
    assert command.endswith("torchrun --standalone --nproc_per_node=8 train_gpt.py")
    assert "--nproc_per_node=8" in findings(env)["on 8 GPUs"].detail
    assert findings(env)["projected"].detail.startswith("unknown")
