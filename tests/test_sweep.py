"""tools/sweep.py with a trainer of thirty lines: plan, ledger, resume, early stop, settings."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import sweep

TRAINER = '''
import json, os, pathlib, sys, time
env = os.environ
run_id, logs = env["RUN_ID"], pathlib.Path(env["LOG_DIR"])
logs.mkdir(parents=True, exist_ok=True)
config = {"matrix_lr": float(env.get("MATRIX_LR", ".022")), "seed": int(env.get("SEED", "1337")),
          "ttt_enabled": env.get("TTT_ENABLED", "1") == "1"}
if env.get("FAKE_IGNORES"):
    config[env["FAKE_IGNORES"]] = 0.5
events = (logs / f"{run_id}.jsonl").open("w")
def event(**row):
    events.write(json.dumps(row) + "\\n")
    events.flush()
if env.get("FAKE_START", "1") == "1":
    event(event="start", config=config)
steps = int(env.get("FAKE_STEPS", "8"))
for step in range(1, steps + 1):
    loss = config["matrix_lr"] * 10 + 1 / step
    event(event="train", step=step, train_loss=loss, progress=step / steps)
    time.sleep(float(env.get("FAKE_SECONDS", "0")))
if env.get("FAKE_FAILS") == str(config["seed"]):
    sys.exit("error: SEED is unlucky")
result = {"run_id": run_id, "status": "complete", "config": config, "world_size": 1,
          "headline": "sliding", "val_bpb": 1 + config["matrix_lr"] + config["seed"] / 1e6,
          "val_loss": 2.5,
          "train": {"steps": steps}, "artifact": {"total_bytes": 15_990_000},
          "gpus": env.get("CUDA_VISIBLE_DEVICES")}
(logs / f"{run_id}.json").write_text(json.dumps(result))
sys.exit(int(env.get("FAKE_EXIT", "0")))
'''


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("FAKE_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "fake_trainer.py"
    path.write_text(TRAINER)
    return path


def run(trainer: Path, *arguments: str, gpus: str = "") -> int:
    out = str(trainer.parent / "sweep")
    fast = ["--poll-seconds", "0.02", "--gpus", gpus, "--nproc", "1"]
    return sweep.main(["--trainer", str(trainer), "--out", out, *fast, *arguments])


def ledger(trainer: Path) -> list[dict]:
    lines = (trainer.parent / "sweep" / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ends(trainer: Path) -> dict[str, str]:
    return {row["label"]: row["status"] for row in ledger(trainer) if row["event"] == "end"}


# ---- the plan ----


@pytest.mark.parametrize(("text", "expected"), [
    ("MATRIX_LR=.022,.026", ("MATRIX_LR", [".022", ".026"])),
    ("LOOP_LAYERS=3,4;4,5", ("LOOP_LAYERS", ["3,4", "4,5"])),
    ("LOOP_LAYERS=3,4;", ("LOOP_LAYERS", ["3,4"])), ("SEED=07,10", ("SEED", ["7", "10"])),
])
def test_axis_is_a_name_and_its_values(text: str, expected: tuple[str, list[str]]) -> None:
    assert sweep.parse_axis(text) == expected


@pytest.mark.parametrize(
    "text", ["MATRIX_LR", "matrix_lr=1", "A=", "A=1,,2", "A=1,1", "RUN_ID=x", "A=;", "SEED=1,01"])
def test_bad_axis_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(sweep.SweepError, match=text.split("=")[0]):
        sweep.parse_axis(text)


def test_plan_is_the_product_with_every_setting_before_the_next_seed() -> None:
    axes = sweep.parse_axes("1,2", ["MATRIX_LR=.1,.2", "PRESET=demo"])
    runs = sweep.plan_runs(axes, {"DATA_DIR": "here"})
    assert [entry.label for entry in runs] == [
        "matrix_lr.1-presetdemo-seed1", "matrix_lr.2-presetdemo-seed1",
        "matrix_lr.1-presetdemo-seed2", "matrix_lr.2-presetdemo-seed2"]
    assert runs[3].settings == {
        "DATA_DIR": "here", "MATRIX_LR": ".2", "PRESET": "demo", "SEED": "2"}
    assert len({entry.key for entry in runs}) == 4


def test_labels_that_collide_get_their_key(tmp_path: Path) -> None:
    book = sweep.Ledger(tmp_path / "ledger.jsonl")
    runs = book.distinct(sweep.plan_runs([("A", ["a/b", "a b"])], {}))
    assert len({entry.label for entry in runs}) == 2
    book.add(event="start", label="b1", key="settled with other settings of the shell")
    assert book.distinct(sweep.plan_runs([("B", ["1"])], {}))[0].label.startswith("b1-")
    assert all("/" not in entry.label and " " not in entry.label for entry in runs)


def test_a_variable_given_twice_is_refused() -> None:
    with pytest.raises(sweep.SweepError, match="SEED is given twice"):
        sweep.parse_axes("1", ["SEED=2"])


def test_gpus_are_dealt_out_by_processes() -> None:
    assert sweep.gpu_slots([], 1) == [None]
    assert sweep.gpu_slots(["0", "1", "2"], 1) == ["0", "1", "2"]
    assert sweep.gpu_slots(list("01234"), 2) == ["0,1", "2,3"]
    with pytest.raises(sweep.SweepError, match="--nproc 4: only 2 GPUs"):
        sweep.gpu_slots(["0", "1"], 4)


def test_several_processes_start_through_torchrun() -> None:
    assert "torch.distributed.run" in sweep.launch_command(Path("t.py"), 8)
    assert "--nproc_per_node=8" in sweep.launch_command(Path("t.py"), 8)
    assert sweep.launch_command(Path("t.py"), 1)[-1] == "t.py"


# ---- settings that took effect ----


@pytest.mark.parametrize(("asked", "actual", "same"), [
    (".022", 0.022, True), ("1e3", 1000, True), ("1", True, True), ("0", True, False),
    ("x", 1, False), ("3,4,5", [3, 4, 5], True), ("3,4", [3, 4, 5], False), ("", None, True),
    ("demo", "demo", True), ("./data", "data", True), ("5.25", 5.0, False), ("2", True, False),
])
def test_took_effect_compares_text_with_value(asked: str, actual: object, same: bool) -> None:
    assert sweep.took_effect(asked, actual) is same


# ---- whole sweeps ----


def test_sweep_runs_everything_once_and_a_repeat_runs_nothing(
    trainer: Path, capsys: pytest.CaptureFixture,
) -> None:
    arguments = ["--seeds", "1,2", "--set", "MATRIX_LR=.01,.02"]
    assert run(trainer, *arguments) == 0
    assert set(ends(trainer).values()) == {"complete"} and len(ends(trainer)) == 4
    assert "matrix_lr.01: mean 1.01000" in capsys.readouterr().out
    rows = ledger(trainer)
    results = [row["result"] for row in rows if row["event"] == "end"]
    assert all((trainer.parent / "sweep" / result).is_file() for result in results)

    assert run(trainer, *arguments) == 0
    assert ledger(trainer) == rows
    assert "4 already settled" in capsys.readouterr().out

    assert run(trainer, "--seeds", "1,2,3", "--set", "MATRIX_LR=.01,.02") == 0
    assert len(ledger(trainer)) == len(rows) + 5  # the plan, two starts and two ends


def test_a_lost_result_is_run_again_under_a_new_id(trainer: Path) -> None:
    assert run(trainer, "--seeds", "1") == 0
    result = trainer.parent / "sweep" / ledger(trainer)[-1]["result"]
    result.unlink()
    assert run(trainer, "--seeds", "1") == 0
    started = [row["run_id"] for row in ledger(trainer) if row["event"] == "start"]
    assert started == ["sweep-seed1", "sweep-seed1-2"]


def test_failed_run_is_reported_with_its_last_words_and_tried_again(
    trainer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "2")
    assert run(trainer, "--seeds", "1,2,3") == 1
    assert ends(trainer) == {"seed1": "complete", "seed2": "failed", "seed3": "complete"}
    assert "error: SEED is unlucky" in capsys.readouterr().out
    monkeypatch.delenv("FAKE_FAILS")
    assert run(trainer, "--seeds", "1,2,3") == 0
    assert ends(trainer)["seed2"] == "complete"


def test_no_run_starts_after_too_many_failures(
    trainer: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "1")
    assert run(trainer, "--seeds", "1,2,3", "--max-failures", "1") == 1
    assert ends(trainer) == {"seed1": "failed"}


@pytest.mark.parametrize("start_event", ["1", "0"])
def test_setting_without_effect_stops_the_sweep(
    trainer: Path, monkeypatch: pytest.MonkeyPatch, start_event: str,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("FAKE_IGNORES", "matrix_lr")
    monkeypatch.setenv("FAKE_START", start_event)
    assert run(trainer, "--set", "MATRIX_LR=.022,.026") == 3
    assert ends(trainer) == {"matrix_lr.022": "mismatch"}
    assert "MATRIX_LR=.022 was asked for, 0.5 was used" in capsys.readouterr().out


def test_mismatch_ends_a_run_before_it_is_paid_for(
    trainer: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_IGNORES", "matrix_lr")
    monkeypatch.setenv("FAKE_SECONDS", "60")
    started = time.monotonic()
    assert run(trainer, "--set", "MATRIX_LR=.022") == 3
    assert time.monotonic() - started < 30


def test_unknown_variable_does_not_pass_silently(trainer: Path) -> None:
    assert run(trainer, "--set", "MATRIX_LRR=.022") == 3
    assert "is not a setting" in ledger(trainer)[-1]["reason"]


def test_crossed_budget_with_a_whole_result_is_not_run_again(
    trainer: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_EXIT", "4")
    assert run(trainer, "--seeds", "1") == 0
    assert ledger(trainer)[-1]["status"] == "complete" and ledger(trainer)[-1]["exit_code"] == 4


def test_hopeless_run_is_stopped_at_matched_steps_and_stays_stopped(
    trainer: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_STEPS", "100")
    assert run(trainer, "--set", "MATRIX_LR=.02", "--seeds", "1") == 0
    reference = str(next((trainer.parent / "sweep").glob("*/logs/*.jsonl")))
    early = ["--reference", reference, "--tolerance", "0.05", "--window", "3", "--seeds", "1"]
    assert run(trainer, "--set", "MATRIX_LR=.021", *early) == 0
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    assert run(trainer, "--set", "MATRIX_LR=.03", *early) == 0
    assert list(ends(trainer).values()) == ["complete", "complete", "stopped"]
    stopped = ledger(trainer)[-1]
    assert 12 <= stopped["steps"] < 100 and "0.1000 nats above the reference" in stopped["reason"]
    assert run(trainer, "--set", "MATRIX_LR=.03", *early) == 0
    assert ledger(trainer)[-1] == stopped


def test_one_run_per_gpu(trainer: Path) -> None:
    assert run(trainer, "--seeds", "1,2,3,4", gpus="0,3") == 0
    results = (trainer.parent / "sweep").glob("*/logs/*.json")
    assert {json.loads(path.read_text())["gpus"] for path in results} == {"0", "3"}


def test_a_gpu_named_twice_is_refilled_while_its_other_run_goes_on(
    trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(planned: sweep.Run, attempt: int, slot: str | None, *_: object) -> SimpleNamespace:
        return SimpleNamespace(slot=slot, run_id=planned.label, process=SimpleNamespace(pid=1))

    monkeypatch.setattr(sweep, "start_run", start)
    options = ["--trainer", str(trainer), "--gpus", "0,0,1", "--nproc", "1", "--out", str(tmp_path)]
    settings = sweep.settings_from(sweep.build_parser().parse_args(options))
    plan = sweep.plan_runs(sweep.parse_axes("1,2,3,4,5", []), {})
    with (tmp_path / "lock").open("w") as lock:
        running = sweep.Sweep(plan, settings, sweep.Ledger(tmp_path / "ledger.jsonl"), lock)
        running.fill_slots()
        assert [active.slot for active in running.active] == ["0", "0", "1"]
        del running.active[0]
        running.fill_slots()
        running.fill_slots()
    assert [active.slot for active in running.active] == ["0", "1", "0"]
    assert len(running.pending) == 1


def test_run_that_hangs_is_ended(trainer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "60")
    assert run(trainer, "--seeds", "1", "--run-timeout", "0.5") == 1
    assert "--run-timeout" in ledger(trainer)[-1]["reason"]


def test_changed_trainer_is_refused(trainer: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(trainer, "--seeds", "1") == 0
    trainer.write_text(TRAINER + "\n# changed\n")
    assert run(trainer, "--seeds", "1,2") == 2
    assert "another trainer" in capsys.readouterr().err


def test_ledger_with_a_truncated_last_line_is_read_and_stays_readable(trainer: Path) -> None:
    assert run(trainer, "--seeds", "1") == 0
    path = trainer.parent / "sweep" / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "end", "key": "cut')
    assert run(trainer, "--seeds", "1,2") == 0
    assert len(sweep.Ledger(path).rows) == 6  # of each: plan, start, end


@pytest.mark.parametrize("row", [
    {"event": "start", "label": "seed1"}, {"event": "start", "key": 1, "label": "seed1"},
    {"event": "plan"}, {"event": "plan", "seeds": ["x"]}, {"event": "plan", "seeds": 1},
    {"event": "end", "key": "k"}, {"event": "end", "key": "k", "status": "complete"},
])
def test_damaged_row_of_a_ledger_is_passed_over_and_counted(
    trainer: Path, row: dict, capsys: pytest.CaptureFixture,
) -> None:
    assert run(trainer, "--seeds", "1") == 0
    path = trainer.parent / "sweep" / "ledger.jsonl"
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    assert run(trainer, "--seeds", "1,2") == 0
    assert sweep.main(["--out", str(path.parent), "--status"]) == 0
    assert capsys.readouterr().err == f"{path}: 1 damaged row(s) passed over\n" * 2
    book = sweep.Ledger(path)
    assert (len(book.rows), book.seeds(), len(book.results())) == (6, [1, 2], 2)


def test_only_one_sweep_works_in_a_folder(trainer: Path, capsys: pytest.CaptureFixture) -> None:
    with sweep.exclusive(trainer.parent / "sweep"):
        assert run(trainer, "--seeds", "1") == 2
    assert "another sweep" in capsys.readouterr().err


def command(trainer: Path, *arguments: str) -> list[str]:
    out = str(trainer.parent / "sweep")
    return [sys.executable, sweep.__file__, "--trainer", str(trainer), "--out", out,
            "--gpus", "", "--nproc", "1", "--poll-seconds", "0.05", *arguments]


def wait_for(path: Path, seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.05)


def test_terminated_sweep_ends_its_runs_and_continues_later(trainer: Path) -> None:
    env = {**os.environ, "FAKE_SECONDS": "60"}
    process = subprocess.Popen(command(trainer, "--seeds", "7"), env=env, stdout=subprocess.PIPE)
    wait_for(trainer.parent / "sweep" / "seed7" / "logs" / "sweep-seed7.jsonl")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    child = ledger(trainer)[1]["pid"]
    assert ledger(trainer)[-1]["status"] == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert run(trainer, "--seeds", "7") == 0
    assert ends(trainer)["seed7"] == "complete"


def test_run_left_behind_by_a_killed_sweep_keeps_the_folder_locked(
    trainer: Path, capsys: pytest.CaptureFixture,
) -> None:
    env = {**os.environ, "FAKE_SECONDS": "60"}
    process = subprocess.Popen(command(trainer, "--seeds", "7"), env=env, stdout=subprocess.PIPE)
    wait_for(trainer.parent / "sweep" / "seed7" / "logs" / "sweep-seed7.jsonl")
    process.kill()
    process.wait(10)
    child = ledger(trainer)[1]["pid"]
    try:
        assert run(trainer, "--seeds", "7") == 2
        assert "a run it left behind" in capsys.readouterr().err
    finally:
        os.killpg(child, signal.SIGKILL)


def test_detached_sweep_goes_on_by_itself(trainer: Path, capsys: pytest.CaptureFixture) -> None:
    env = {**os.environ, "FAKE_SECONDS": "0.6"}
    started = subprocess.run(command(trainer, "--seeds", "5", "--detach"), env=env,
                             capture_output=True, text=True, timeout=60, check=True)
    assert "goes on in the background" in started.stdout
    wait_for(trainer.parent / "sweep" / "seed5" / "logs" / "sweep-seed5.json")
    limit = time.monotonic() + 20
    while "end" not in [row["event"] for row in ledger(trainer)] and time.monotonic() < limit:
        time.sleep(0.05)
    assert ends(trainer) == {"seed5": "complete"}
    assert sweep.main(["--out", str(trainer.parent / "sweep"), "--status"]) == 0
    assert "seed5" in capsys.readouterr().out


def test_detached_sweep_that_cannot_start_says_so(trainer: Path) -> None:
    assert run(trainer, "--seeds", "1") == 0
    trainer.write_text(TRAINER + "\n# changed\n")
    refused = subprocess.run(command(trainer, "--seeds", "2", "--detach"), capture_output=True,
                             text=True, timeout=60, check=False)
    assert refused.returncode == 2 and "another trainer" in refused.stderr


def test_score_that_is_no_number_counts_in_no_mean_and_comes_last(tmp_path: Path) -> None:
    book = sweep.Ledger(tmp_path / "ledger.jsonl")
    for seed, score in enumerate((math.nan, 1.25, 1.75)):
        for row in ({"event": "start"}, {"event": "end", "status": "complete", "val_bpb": score}):
            book.add(key=str(seed), label=f"seed{seed}", **row)
    lines = sweep.table(book).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["seed1", "seed2", "seed0"]
    assert "mean 1.50000" in lines[-1] and "n 2" in lines[-1]


# ---- curves ----


def curve(*losses: float, kind: str = "train") -> sweep.Curve:
    made = sweep.Curve()
    for step, loss in enumerate(losses, start=1):
        made.add({"event": kind, "step": step * 10, f"{kind}_loss": loss})
    return made


def test_reference_is_read_between_its_steps() -> None:
    reference = curve(4.0, 3.0)
    assert reference.at("train", 15) == 3.5
    assert reference.at("train", 20) == 3.0
    assert reference.at("train", 21) is None and reference.at("train", 9) is None


def test_one_bad_batch_is_not_hopeless_but_a_bad_mean_is() -> None:
    patience = sweep.Patience(curve(4.0, 3.5, 3.0, 2.9, 2.8), tolerance=0.1, window=3, after_step=0)
    assert sweep.hopeless(curve(4.0, 3.5, 3.2), patience) is None
    assert "0.2000 nats above" in str(sweep.hopeless(curve(4.2, 3.7, 3.2), patience))
    assert sweep.hopeless(curve(4.2, 3.7), patience) is None
    late = patience._replace(after_step=20)
    assert sweep.hopeless(curve(4.2, 3.7, 3.2), late) is None


def test_one_validation_is_enough_and_not_a_number_always_ends() -> None:
    patience = sweep.Patience(curve(3.0, 2.5, kind="val"), tolerance=0.05, window=5, after_step=0)
    assert sweep.hopeless(curve(3.0, 2.54, kind="val"), patience) is None
    assert "val loss" in str(sweep.hopeless(curve(3.0, 2.6, kind="val"), patience))
    assert "nan" in str(sweep.hopeless(curve(3.0, math.nan), patience))


def test_reference_without_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sweep.SweepError, match="no such file"):
        sweep.load_curve(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"event": "start"}\n')
    with pytest.raises(sweep.SweepError, match="holds no train"):
        sweep.load_curve(tmp_path / "empty.jsonl")


def test_event_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = sweep.EventTail(path)
    assert tail.read() == []
    path.write_text('{"a": 1}\nnot json\n[1]\n{"b"')
    assert tail.read() == [{"a": 1}]
    with path.open("a") as file:
        file.write(': 2}\n')
    assert tail.read() == [{"b": 2}]


def test_progress_tells_step_loss_and_time_left(trainer: Path) -> None:
    with sweep.exclusive(trainer.parent / "sweep") as lock:
        settings = sweep.settings_from(sweep.build_parser().parse_args(
            ["--trainer", str(trainer), "--out", str(trainer.parent / "sweep"), "--gpus", ""]))
        active = sweep.start_run(sweep.Run("seed1", {"SEED": "1"}, "k"), 1, None, settings, lock)
        active.process.wait(20)
        active.console.close()
    active.started = time.monotonic() - 600
    sweep.take_event(active, {"event": "train", "step": 5, "train_loss": 3.25, "progress": 0.5})
    text = sweep.progress_line([active], [], pending=1, slots=1)
    assert "seed1 step 5 loss 3.2500 50%" in text and "about 30m" in text
    assert "about 2h" in sweep.progress_line([active], [4000.0], pending=1, slots=1)
    sweep.take_event(active, {"event": "train", "step": 6, "train_loss": math.nan})
    assert active.stage == "step 6"
    sweep.take_event(active, {"event": "eval", "label": "sliding", "val_bpb": 1.25})
    text = sweep.progress_line([active], [], pending=1, slots=1)
    assert "seed1 sliding 1.2500 BPB" in text and "about" not in text


@pytest.mark.parametrize("arguments", [
    [], ["--seeds", "x"], ["--seeds", "1", "--nproc", "5"], ["--seeds", "1", "--window", "0"],
    ["--seeds", "1", "--trainer", "none.py"], ["--seeds", "1", "--reference", "none.jsonl"],
    ["--seeds", "1", "--packed"], ["--status"], ["--seeds", "1", "--poll-seconds", "-1"],
    ["--seeds", "1", "--report-seconds", "nan"], ["--seeds", "1", "--run-timeout", "nan"],
    ["--seeds", "1", "--tolerance", "nan"],
])
def test_bad_arguments_exit_2_with_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture,
) -> None:
    trainer = [] if "--trainer" in arguments else ["--trainer", __file__]
    out = tmp_path / "none"
    assert sweep.main([*arguments, *trainer, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("detach", [[], ["--detach"]])
@pytest.mark.parametrize("name", ["file", "file/below"])
def test_folder_that_cannot_be_made_exits_2_with_one_line(
    trainer: Path, name: str, detach: list[str], capsys: pytest.CaptureFixture,
) -> None:
    (trainer.parent / "file").touch()
    assert run(trainer, "--seeds", "1", "--out", str(trainer.parent / name), *detach) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out {trainer.parent / name}: no folder")
    assert error.count("\n") == 1


# ---- with the real trainer ----


def test_settings_that_the_trainer_refuses_start_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "sweep"
    for assignment, words in (("MATRIX_LR=.02,99", "must be between"),
                              ("MATRIX_LRR=.02", "did you mean MATRIX_LR?"),
                              ("NOPE=3", "nope3-seed1: NOPE is no setting of train_gpt.py"),
                              ("MATRIX_LR=.02,0.02", "matrix_lr0.02-seed1: the same settings as "
                               "matrix_lr.02-seed1")):
        assert sweep.main(["--out", str(out), "--seeds", "1", "--set", assignment]) == 2
        assert words in capsys.readouterr().err
    assert not out.exists()


def test_settings_of_the_shell_are_passed_on_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PRESET", "demo")
    monkeypatch.setenv("QK_GAIN_INIT", "5.0")
    assert sweep.main(["--out", str(tmp_path), "--seeds", "1", "--gpus", "", "--dry-run"]) == 0
    assert "PRESET=demo QK_GAIN_INIT=5.0 SEED=1" in capsys.readouterr().out


def test_packed_program_runs_from_the_folder_of_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PRESET", "demo")
    command = ["--out", str(tmp_path / "s"), "--seeds", "1", "--gpus", "", "--packed", "--dry-run"]
    assert sweep.main(command) == 0
    program = tmp_path / "s" / "train_gpt.py"
    assert f"PRESET=demo SEED=1 {sys.executable} -u {program}" in capsys.readouterr().out
    assert sweep.main([*command[:-1], "--window", "0"]) == 2
    assert not program.parent.exists()
    monkeypatch.setattr(sweep.Sweep, "execute", lambda _: 0)
    assert sweep.main(command[:-1]) == 0
    shown = subprocess.run([sys.executable, str(program)], env={**os.environ, "PRINT_CONFIG": "1"},
                           capture_output=True, text=True, timeout=120, check=True)
    assert "PRESET=demo" in shown.stdout
    program.write_bytes(program.read_bytes() + b" ")
    capsys.readouterr()
    for more in ([], ["--detach"]):
        assert sweep.main([*command[:-1], *more]) == 2
        assert "an earlier version of the program" in capsys.readouterr().err


@pytest.mark.slow
def test_real_runs_take_their_settings(tmp_path: Path) -> None:
    repository = Path(sweep.__file__).parent.parent
    data = tmp_path / "data"
    subprocess.run([sys.executable, str(repository / "tools" / "prepare_data.py"), "demo",
                    "--data-dir", str(data)], check=True, timeout=300)
    env = {**os.environ, "PRESET": "demo", "DATA_PATH": str(data / "datasets" / "demo_sp1024"),
           "TOKENIZER_PATH": str(data / "tokenizers" / "demo_1024_bpe.model"), "ITERATIONS": "2",
           "MAX_WALLCLOCK_SECONDS": "0", "SLIDING_WINDOW_ENABLED": "0", "TTT_ENABLED": "0"}
    command = [sys.executable, sweep.__file__, "--out", str(tmp_path / "sweep"), "--nproc", "1",
               "--gpus", "", "--seeds", "1", "--set", "MATRIX_LR=.01,.02"]
    subprocess.run(command, env=env, check=True, timeout=600, cwd=tmp_path)
    rows = sweep.Ledger(tmp_path / "sweep" / "ledger.jsonl").rows
    scores = [row["val_bpb"] for row in rows if row["event"] == "end"]
    assert len(scores) == 2 and scores[0] != scores[1]
