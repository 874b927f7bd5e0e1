"""tools/runs.py: three grammars of published trainers, ours, and damaged logs."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
import synthetic_runs as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import runs

MINUTES = """Hyperparameters:
  enable_looping_at: 0.35
  seed: 314
  train_batch_tokens: 786432
  world_size: 8
train_shards: 128
val_tokens: 40540160
model_params:35944536
gptq:reserving 12s, effective=588000ms
0/20000 val_loss: 9.0090 val_bpb: 3.4877
1/20000 train_loss: 9.0111 train_time: 0.0m tok/s: 8348323
2000/20000 train_loss: 3.0686 train_time: 3.4m tok/s: 7710490
layer_loop:enabled step:2018 frac:0.350 encoder:[0, 1, 2, 3, 4, 5, 3, 4] decoder:[5, 3, 4, 5, 6]
4000/20000 train_loss: 2.9106 train_time: 8.4m tok/s: 6223343
4000/20000 val_loss: 2.8722 val_bpb: 1.1119
4550/20000 val_loss: 2.8119 val_bpb: 1.0886
stopping_early: wallclock_cap train_time: 588047ms step: 4550/20000
peak memory allocated: 39045 MiB reserved: 39124 MiB
pre-quantization post-ema val_loss:2.80873254 val_bpb:1.08734790 eval_time:7440ms
Serialized model: 135431033 bytes
Code size: 16630 bytes
GPTQ:collected 67 Hessians in 12.7s
Serialized model quantized+brotli: 15975300 bytes
Total submission size quantized+brotli: 15991930 bytes
quantized val_loss:2.84065044 val_bpb:1.09970431 eval_time:25515ms
quantized_sliding_window val_loss:2.79714850 val_bpb:1.08286335 eval_time:120961ms
ttt:start chunks=1238 ttt_lr=0.005 ttt_epochs=3
quantized_ttt val_loss:2.79180191 val_bpb:1.08079352 eval_time:366525ms"""

BASELINE = """import os
seed = int(os.environ.get("SEED", 1))
print(f"step:{seed}/1 val_loss:{2.0:.4f} val_bpb:{1.0:.4f}")
====================================================================================================
Running PyTorch 2.9.1+cu128
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |
train_loader:dataset:fineweb10B_sp1024 train_shards:25
seed:1337
step:7150/20000 train_loss:2.1952 train_time:311056ms step_avg:43.50ms
step:7200/20000 val_loss:2.1299 val_bpb:1.2582 train_time:313228ms step_avg:43.50ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""

LATE = """4945/20000 val_loss: 2.3539 val_bpb: 1.0756
diagnostic pre-quantization post-ema val_loss:2.32848665 val_bpb:1.06395844 eval_time:6718ms
Code size (uncompressed): 157868 bytes
Code size (compressed): 31999 bytes
Serialized model quantized+pergroup: 15865260 bytes
Total submission size quantized+pergroup: 15897259 bytes
diagnostic quantized val_loss:2.34727563 val_bpb:1.07254371 eval_time:49995ms
ttt_phased: total_docs:50000 prefix_docs:2500 suffix_docs:47500 num_phases:3
quantized_ttt_phased val_loss:2.31871 val_bpb:1.05989 eval_time:486000ms
total_eval_time:486.1s
"""


def read(tmp_path: Path, text: str | bytes, name: str = "train.log") -> runs.Run:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return runs.read_text(path)


def test_log_with_minutes_and_cumulative_rates(tmp_path: Path) -> None:
    run = read(tmp_path, MINUTES)
    assert (run.seed, run.headline, run.val_bpb) == (314, "ttt_sgd", 1.08079352)
    assert [e.name for e in run.evaluations] == ["averaged", "quantised", "sliding", "ttt_sgd"]
    assert run.evaluations[-1].seconds == pytest.approx(366.525)
    assert run.number("train.steps") == 4550
    assert run.number("train.seconds") == pytest.approx(588.047)
    assert run.number("artifact.code_bytes") + run.number("artifact.model_bytes") == 15_991_930
    assert run.number("quantisation.seconds_hessians") == 12.7
    assert run.plans == [runs.PlanChange(2018, "looped", 0.35)]
    assert run.get("config.enable_looping_at") == "0.35"
    assert run.number("data.val_targets") == 40_540_160
    # 2,000 steps at a mean of 7.71 M tok/s took 204 s; the next 2,000 ran at 5.2 M tok/s.
    assert run.train[1].seconds == pytest.approx(2000 * 786_432 / 7_710_490)
    assert run.train[2].tok_s == pytest.approx(5.217e6, rel=1e-3)
    assert run.validation[-1].seconds == pytest.approx(588, rel=0.02)


def test_baseline_log_with_its_source(tmp_path: Path) -> None:
    run = read(tmp_path, BASELINE)
    assert (run.seed, run.val_bpb, run.headline) == (1337, 1.2243657, "quantised")
    assert len(run.evaluations) == 1
    assert run.evaluations[0].seconds == 1.401  # of the line with fewer digits
    assert run.number("artifact.total_bytes") == 15_863_489
    assert run.text("hardware.gpu") == "NVIDIA H100 80GB HBM3"
    assert run.text("versions.torch") == "2.9.1+cu128"
    assert run.train == [runs.TrainPoint(7150, 311.056, 2.1952)]
    assert run.validation[0].seconds == pytest.approx(313.228)
    source = runs.source_in_log(tmp_path / "train.log")
    assert source is not None
    assert source.startswith("import os")


def test_late_log(tmp_path: Path) -> None:
    run = read(tmp_path, LATE)
    assert run.headline == "ttt_documents"
    assert run.number("artifact.code_bytes") == 31_999
    assert run.number("artifact.source_bytes") == 157_868
    assert run.number("data.val_documents") == 50_000
    assert run.number("clocks.eval_seconds_lenient") == 486.1


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("final_int8_zlib_roundtrip_exact", "quantised"),
        ("final_int6_sliding_window_s64", "sliding"),
        ("legal_ttt_exact", "ttt_sgd"),
        ("quantized_ttt_phased", "ttt_documents"),
        ("DIAGNOSTIC post_ema", "averaged"),
        ("final_int8_ttt_lora", "ttt_documents"),
        ("final_sliding_window_ngram7", "mixer"),
        ("raw weights", "raw"),
        ("my own", "my_own"),
    ],
)
def test_labels_of_the_field(label: str, name: str) -> None:
    assert runs.canonical(label) == name


def test_score_repeated_under_another_label_is_not_taken_twice(tmp_path: Path) -> None:
    run = read(
        tmp_path,
        "final_int6_roundtrip_exact val_loss:2.95701557 val_bpb:1.14475288\n"
        "final_int6_sliding_window_exact val_loss:2.91416466 val_bpb:1.12816870\n"
        "final_int8_zlib_roundtrip_exact val_loss:2.91416466 val_bpb:1.12816870\n",
    )
    assert run.headline == "sliding"
    assert run.number("bpb.quantised") == 1.14475288


def test_our_own_three_files(tmp_path: Path) -> None:
    content = synthetic.result()
    path = synthetic.write_run(tmp_path, content)
    run = runs.load_run(content["run_id"], tmp_path)
    assert run.facts["artifact"] == content["artifact"]
    assert run.name == "pr1493 seed 42"
    assert len(run.train) == 25
    assert run.train[-1] == (400, 300.0, run.train[-1].loss, 0.0, 110_000, "looped", 38_900, 1.0)
    assert run.evaluation("sliding").seconds == 60.0
    assert run.phases == [("calibration", 9.0)]
    assert set(run.files) == {"result", "events", "text"}
    for other in (path, path.with_suffix(".txt"), str(path).removesuffix(".json")):
        assert runs.load_run(other).val_bpb == run.val_bpb
    text = runs.read_text(path.with_suffix(".txt"))
    assert text.number("artifact.total_bytes") == content["artifact"]["total_bytes"]
    assert text.number("data.val_bytes") == synthetic.BYTES
    assert text.seed is None  # a number inside the program text is no statement of the run


def test_label_that_two_kinds_of_evaluation_share_takes_the_name_of_its_score(
    tmp_path: Path,
) -> None:
    content = synthetic.result(headline="ttt_documents")
    for table in ("bpb", "nats", "eval_seconds"):
        content[table]["ttt_documents"] = content[table].pop("ttt_sgd")
    path = synthetic.write_run(tmp_path, content)
    run = runs.load_run(path)
    assert [item.name for item in run.evaluations] == list(content["bpb"])
    assert run.facts["bpb"] == content["bpb"]
    path.unlink()  # of a run that died, the events know the name
    run = runs.load_run(path)
    assert run.headline == "ttt_documents" and set(run.table("bpb")) == set(content["bpb"])


def test_source_is_found_by_its_hash(tmp_path: Path) -> None:
    path = synthetic.write_run(tmp_path, synthetic.result()).with_suffix(".txt")
    digest = hashlib.sha256(synthetic.PROGRAM.encode()).hexdigest()
    assert runs.source_in_log(path, digest) == synthetic.PROGRAM
    assert (runs.source_in_log(path) or "").strip() == synthetic.PROGRAM.strip()
    assert runs.source_in_log(path, "00" * 32) is None


def test_clock_of_events_without_a_training_clock_starts_with_training(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    events = [{"event": "train", "t": 90.0 + s, "step": s, "train_loss": 3.0} for s in (0, 10)]
    path.write_text("\n".join(map(json.dumps, events)))
    assert [point.seconds for point in runs.read_events(path).train] == [0.0, 10.0]


def test_missing_and_broken_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(runs.RunError, match="'nobody' not found"):
        runs.load_run("nobody", tmp_path)
    (tmp_path / "bad.json").write_text('{"run_id": ')
    with pytest.raises(runs.RunError, match=r"bad\.json: not JSON"):
        runs.load_run("bad", tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(runs.RunError, match="a list, not a mapping"):
        runs.load_run("list", tmp_path)


def test_a_run_is_told_by_what_its_file_holds_not_by_its_name(tmp_path: Path) -> None:
    names = ["bench_a", "manifest-1", "recipe-all-seed42", "submission", "z"]
    for name in names:
        synthetic.write_run(tmp_path, synthetic.result(run_id=name))
    for name, content in (("bench_cpu", {"rows": []}), ("curve", {"run_id": "z", "rows": []}),
                          ("manifest", {"status": "complete"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert [run.run_id for run in runs.find_runs(tmp_path)] == names
    (tmp_path / "cut.json").write_text('{"run_id": ')
    with pytest.raises(runs.RunError, match=r"cut\.json: not JSON"):
        runs.find_runs(tmp_path)


# --------------------------------------------------------------------------------------- damage


def test_truncated_last_lines(tmp_path: Path) -> None:
    path = synthetic.write_run(tmp_path, synthetic.result())
    jsonl = path.with_suffix(".jsonl")
    jsonl.write_bytes(jsonl.read_bytes()[:-9] + b"\xff\xfe")
    run = runs.read_events(jsonl)
    assert run.problems == [f"{jsonl.name}: 1 unreadable line(s), the last line is cut"]
    assert len(run.evaluations) == 5
    cut = read(tmp_path, MINUTES[: MINUTES.index("3.0686") + 3])
    assert cut.problems == ["train.log: the last line is cut"]
    assert cut.headline is None
    short = read(tmp_path, MINUTES[: MINUTES.index("79352 eval")])  # its last digits are missing
    assert short.val_bpb == 1.080 and short.problems == ["train.log: the last line is cut"]
    assert read(tmp_path, MINUTES).problems == []


def test_interleaved_ranks_and_colours(tmp_path: Path) -> None:
    lines = []
    for step in (1, 2, 3):
        for rank in (1, 0, 2):
            loss = 3.0 if rank == 0 else 9.9
            lines.append(
                f"\x1b[1;32m[rank{rank}]:\x1b[0m {step}/9 train_loss: {loss} train_time: {step}00ms"
            )
    lines.append("[rank1]: quantized val_loss:9.0 val_bpb:9.0")
    lines.append("[rank0]: quantized val_loss:2.0 val_bpb:1.0")
    lines.append("progress 10%\rprogress 20%\r4/9 train_loss: 2.5 train_time: 400ms")
    run = read(tmp_path, "\n".join(lines))
    assert [point.loss for point in run.train] == [3.0, 3.0, 3.0, 2.5]
    assert run.val_bpb == 1.0


def test_lines_of_two_ranks_run_into_each_other(tmp_path: Path) -> None:
    text = "500/20000 train_loss: 3.3346 train_time: 900ms tok/s: 76912\n"
    run = read(
        tmp_path, text + "10/20 train_loss: 3.1 tok/s: 6223343000/40 train_loss: 2.9 tok/s: 1\n"
    )
    assert [point.step for point in run.train] == [10, 500]
    assert "run into each other" in run.problems[0]


def test_crashes_before_and_after_the_score(tmp_path: Path) -> None:
    crash = "[rank3]: Traceback (most recent call last):\n"
    after = read(tmp_path, f"{BASELINE}{crash}  File\n")
    assert after.crashes == [runs.Crash(19, "Traceback (most recent call last):", True)]
    before = read(tmp_path, crash + BASELINE.split("=\n", 1)[1])
    assert [c.after_score for c in before.crashes] == [False]
    assert read(tmp_path, MINUTES).crashes == []


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, len(MINUTES)), junk=st.binary(max_size=40), keep=st.integers(0, 3))
def test_no_damage_makes_reading_fail(tmp_path_factory, cut: int, junk: bytes, keep: int) -> None:
    folder = tmp_path_factory.mktemp("damage")
    read(folder, MINUTES.encode()[:cut] + junk + MINUTES.encode()[cut + keep :])
    path = folder / "run.jsonl"
    line = json.dumps(synthetic.events(synthetic.result())[5]).encode()
    path.write_bytes(line[: cut % len(line)] + junk + b"\n" + line + b"\n")
    runs.read_events(path)


def test_values_of_wrong_types_are_absent(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(
        '{"seed": "x", "val_bpb": NaN, "train": [], "bpb": {"raw": true}}'
    )
    run = runs.load_run("odd", tmp_path)
    assert (run.seed, run.val_bpb, run.number("train.steps")) == (None, None, None)
    assert run.evaluations[0].bpb is None
    path = tmp_path / "odd.jsonl"
    path.write_text('{"event": "train", "step": null, "train_loss": "NaN"}\n[]\n3\n')
    assert runs.load_run("odd", tmp_path).train == []


def test_reading_is_fast_enough_for_100_megabytes_in_ten_seconds(tmp_path: Path) -> None:
    path = tmp_path / "long.log"
    with path.open("w") as stream:
        for i in range(60_000):
            stream.write(
                f"\x1b[32m[rank0]:\x1b[0m {i}/90000 train_loss: 3.12 train_time: 0.9m tok/s: 7691\n"
            )
            stream.write(
                "ttp: b12/782 bl:2.1403 bb:1.0135 rl:2.1403 rb:1.0135 dl:30339-97114 gd:0\n"
            )
    rates = []
    for _ in range(3):  # the best of three: other work on the machine slows a single one down
        begin = time.process_time()
        assert len(runs.read_text(path).train) == 60_000
        rates.append(path.stat().st_size / (time.process_time() - begin))
        if rates[-1] > 10e6:
            break
    assert max(rates) > 10e6
