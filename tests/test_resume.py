"""Resume, guards and hostile files: the quick part of the fault suite (make faults is the rest)."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import PROGRAM, MakeConfig, MakeEnv, SilentLog, quiet_environment, read_result

import train_gpt as golf

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
MUTATE = Path(__file__).with_name("faults") / "mutate.py"


def never(step: int, plan: golf.DepthPlan, is_last: bool) -> None:
    raise AssertionError(f"validated at step {step} of {plan.name}, {is_last}")


class StoppingLog(SilentLog):
    """A log on disk, in memory too, that gets a signal after some step."""

    def __init__(self, config: golf.Config, world: golf.World, after_step: int) -> None:
        super().__init__(config)
        self.world, self.after_step = world, after_step
        self.files = [open(os.devnull, "w")]  # noqa: SIM115
        self.folder.mkdir(parents=True, exist_ok=True)
        self.result_path.parent.mkdir(exist_ok=True)

    def event(self, kind: str, **values: object) -> None:
        """Keeps the event; perhaps the signal comes now."""
        super().event(kind, **values)
        if kind == "train" and values["step"] == self.after_step:
            self.world.interrupt()


def facts_of(config: golf.Config) -> dict[str, object]:
    """What must be equal, as far as these tests vary it."""
    return {"seed": config.seed, "matrix_lr": config.matrix_lr, "ttt_lr": config.ttt_lr}


def find_start(config: golf.Config) -> tuple[golf.TrainState, list[torch.Tensor], list[str]]:
    """Where a run would start, and the warnings on the way."""
    log = SilentLog(config)
    return *golf.find_start(config, facts_of(config), log), log.lines


def train(config: golf.Config, stop_after: int = -1,
          device: str = "cpu") -> tuple[golf.Trainer, StoppingLog]:
    """A trainer that has run until it ended or was stopped."""
    world = golf.World(device=device)
    log = StoppingLog(config, world, stop_after)
    start = golf.find_start(config, facts_of(config), log)
    trainer = golf.Trainer(config, world, log, golf.sdpa_attend, start)
    if stop_after < 0:
        trainer.run(never)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(never)
    return trainer, log


def test_stopped_and_resumed_training_equals_unbroken_training(make_config: MakeConfig,
                                                               tmp_path: Path) -> None:
    common = {"TRAIN_LOG_EVERY": 1, "ITERATIONS": 8}
    whole, _ = train(make_config(**common, RUN_ID="whole"))
    train(make_config(**common), stop_after=1)
    train(make_config(**common, RESUME="auto"), stop_after=4)
    resumed, log = train(make_config(**common, RESUME="auto"))
    assert next(e["step"] for e in log.events if e["event"] == "resume") in (5, 6, 7)
    for a, b in zip(whole.weights, resumed.weights, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.replicated, resumed.replicated, strict=True):
        assert torch.equal(a, b)
    for mine, other in zip(whole.optimizer.groups, resumed.optimizer.groups, strict=True):
        assert torch.equal(mine.momentum, other.momentum)
    assert resumed.last_loss == whole.last_loss
    assert resumed.log.result["train"]["loop_enabled_step"] == 4
    names = sorted(p.name for p in (tmp_path / "runs" / "toy").glob("*"))
    assert names[-1] == "weights.ckpt"
    assert len(names) <= 4


def look(trainer: golf.Trainer) -> tuple[golf.TrainState, list[torch.Tensor], float]:
    """Where a trainer stands, its weights, averages and moments, and the loss that is next."""
    tensors = [t.clone() for t in (*trainer.replicated, *trainer.optimizer.momenta)]
    rows = trainer.loader.read(trainer.state.step * trainer.shape.sequences, 4)
    loss = trainer.forward_backward(golf.plan_at(trainer.config, trainer.state.progress),
                                    [torch.from_numpy(rows).to(trainer.world.device)])
    trainer.model.zero_grad()
    return trainer.state, tensors, float(loss)


@pytest.mark.parametrize("device", DEVICES)
def test_restored_state_is_equal_bit_for_bit(make_config: MakeConfig, device: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, _ = train(make_config(TRAIN_LOG_EVERY=1), stop_after=3, device=device)
    state, tensors, loss = look(stopped)
    found = []

    def stop(self: golf.Trainer, validate: object) -> None:
        found.append(look(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(golf.Trainer, "train", stop)
    train(make_config(TRAIN_LOG_EVERY=1, RESUME="auto"), stop_after=0, device=device)
    assert state.step in (4, 5, 6)
    assert found[0][0] == state
    for mine, other in zip(tensors, found[0][1], strict=True):
        assert torch.equal(mine, other)
    assert found[0][2] == pytest.approx(loss, abs=1e-3 if device != "cpu" else 0.0)


def test_wall_clock_goes_on_where_it_stopped(make_config: MakeConfig) -> None:
    common = {"TRAIN_LOG_EVERY": 1, "MAX_WALLCLOCK_SECONDS": 300, "ITERATIONS": 6}
    stopped, _ = train(make_config(**common), stop_after=3)
    state, _, _ = find_start(make_config(**common, RESUME="auto"))
    resumed, log = train(make_config(**common, RESUME="auto"))
    progress = [e["progress"] for e in log.events if e["event"] == "train"]
    limit = stopped.clock.limit
    assert resumed.clock.limit == pytest.approx(limit, rel=0.05)
    assert float(str(progress[0])) >= 0.95 * state.seconds / limit > 0


def test_only_the_last_checkpoints_are_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(CHECKPOINT_EVERY=1e-6))
    names = sorted(p.name for p in (tmp_path / "runs" / "toy").glob("*"))
    assert names == [f"step-{step:08}.ckpt" for step in (6, 7, 8)] + ["weights.ckpt"]


def test_damaged_checkpoint_gives_way_to_the_one_before(make_config: MakeConfig,
                                                        tmp_path: Path) -> None:
    train(make_config(CHECKPOINT_EVERY=1e-6))
    folder = tmp_path / "runs" / "toy"
    data = (folder / "weights.ckpt").read_bytes()
    (folder / "weights.ckpt").write_bytes(data[:5000] + bytes([data[5000] ^ 8]) + data[5001:])
    state, _, (damaged, used) = find_start(make_config(RESUME="auto"))
    assert "weights.ckpt: no checkpoint" in damaged
    assert (state.step, used.rpartition("/")[2]) == (8, "step-00000008.ckpt")
    for path in folder.glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(golf.ArtifactError, match="no checkpoint is whole"):
        find_start(make_config(RESUME="auto"))


def test_resume_auto_without_checkpoints_starts(make_config: MakeConfig) -> None:
    config = make_config(RESUME="auto")
    assert find_start(config) == (golf.TrainState(facts_of(config)), [], [])
    with pytest.raises(golf.ConfigError, match="RUN_ID"):
        make_config(RESUME="auto", RUN_ID="")
    with pytest.raises(golf.ArtifactError, match="no checkpoint is whole"):
        find_start(make_config(RESUME="missing.ckpt"))


@pytest.mark.parametrize(("name", "value"), [("SEED", 5), ("MATRIX_LR", 0.5), ("TTT_LR", 0.1)])
def test_other_settings_are_refused_by_name(make_config: MakeConfig, name: str,
                                            value: float) -> None:
    train(make_config(), stop_after=2)
    with pytest.raises(golf.ConfigError, match=f"{name}={value} was"):
        train(make_config(RESUME="auto", **{name: value}))


def test_compressed_and_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    bomb, pickled = tmp_path / "bomb.ckpt", tmp_path / "pickled.ckpt"
    with bomb.open("wb") as file:
        np.savez_compressed(file, np.array("{}"), np.zeros(1 << 22))
    with pickled.open("wb") as file:
        np.savez(file, np.array([print, {}], dtype=object))
    for path in (bomb, pickled):
        with pytest.raises(golf.ArtifactError, match=str(path)):
            golf.TrainState.read(path)


def test_one_bad_step_is_skipped_and_the_weights_stay_finite(
        make_config: MakeConfig, log: SilentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = golf.Trainer(make_config(TRAIN_LOG_EVERY=1), golf.World(), log, golf.sdpa_attend)
    honest, calls = trainer.optimizer.step, []

    def poisoned(step: int, scale: float) -> torch.Tensor:
        calls.append(step)
        if step == 3:
            trainer.model.up.grad[0, 0, 0] = math.nan
        return honest(step, scale)

    monkeypatch.setattr(trainer.optimizer, "step", poisoned)
    trainer.run(never)
    assert [line[:42] for line in log.lines if "skipped" in line] == [
        "warning: skipped step 4: gradient norm=nan"]
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_skipped_step_changes_nothing_and_waits_for_nothing(
        make_config: MakeConfig, log: SilentLog, device: str) -> None:
    trainer = golf.Trainer(make_config(), golf.World(device=device), log, golf.sdpa_attend)
    trainer.warm_up()
    optimizer, rows = trainer.optimizer, torch.from_numpy(trainer.loader.read(0, 6)).to(device)
    plan = golf.depth_plans(trainer.config)[-1]

    def step(poison: bool) -> list[torch.Tensor]:
        trainer.forward_backward(plan, [rows])
        if poison:
            trainer.model.embed.grad[3, 3] = math.nan
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("error")
        norm = optimizer.step(1, 1.0)
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("default")
        assert bool(norm.isfinite()) != poison
        state = [*trainer.replicated, *(group.momentum for group in optimizer.groups)]
        return [tensor.clone() for tensor in state]

    before, after = step(False), step(True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, step(False), strict=True))


def test_second_bad_step_names_rank_and_tensors(make_config: MakeConfig, log: SilentLog,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = golf.Trainer(make_config(), golf.World(), log, golf.sdpa_attend)
    honest = trainer.forward_backward

    def poisoned(plan: golf.DepthPlan, batches: list[torch.Tensor]) -> torch.Tensor:
        loss = honest(plan, batches)
        if len(trainer.flight) == 2 and trainer.model.up.grad is not None:
            trainer.model.up.grad[0, 0, 0] = math.inf
        return loss

    monkeypatch.setattr(trainer, "forward_backward", poisoned)
    with pytest.raises(golf.GolfError, match=r"^step 4: .*'up/down'.*step before"):
        trainer.run(never)


@pytest.mark.parametrize("stage", ["fit_to_cap", "save_artifact", "evaluate_artifact"])
def test_run_that_failed_after_training_goes_on_from_there(
        make_env: MakeEnv, tmp_path: Path, trained_run: Path, stage: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(golf, stage, fail)
        golf.main(make_env())
    gc.collect()  # the first run holds its folder
    monkeypatch.delattr(golf.Trainer, "train")
    if stage == "evaluate_artifact":
        monkeypatch.delattr(golf, "train_to_artifact")
    golf.main(make_env(RESUME="auto"))
    first, second = read_result(trained_run), read_result(tmp_path)
    assert first["bpb"] == second["bpb"]
    assert second["status"] == "complete"
    assert first["artifact"]["sha256"] == second["artifact"]["sha256"]
    for section in ("train", "data", "quantisation"):
        assert first[section].keys() == second[section].keys()


def test_large_quantisation_gap_is_no_result(make_env: MakeEnv, tmp_path: Path) -> None:
    with pytest.raises(golf.GolfError, match="MAX_QUANT_GAP_BPB"):
        golf.main(make_env(ATTN_QMAX=1, MLP_QMAX=1, EMBED_QMAX=1, MAX_QUANT_GAP_BPB=0,
                           ITERATIONS=30))
    result = read_result(tmp_path)
    assert result["status"] == "partial"
    assert "val_bpb" not in result
    assert (tmp_path / "runs" / "toy" / "weights.ckpt").exists()


@pytest.mark.parametrize("fits", [4, 1])
def test_evaluation_out_of_memory_goes_on_with_half_the_batch(
        make_env: MakeEnv, trained_run: Path, tmp_path: Path, fits: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    honest = golf.GPT.logits

    def greedy(model: golf.GPT, x: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(x) > fits:
            raise torch.OutOfMemoryError("no memory")
        return honest(model, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(golf.GPT, "logits", greedy)
    artifact = trained_run / "runs" / "toy" / "artifact.bin"
    found = golf.main(make_env(EVAL_ONLY=artifact, TTT_ENABLED=0))["bpb"]
    assert found == pytest.approx({key: read_result(trained_run)["bpb"][key]
                                   for key in ("quantised", "sliding")}, rel=1e-6)
    text = (tmp_path / "logs" / "toy.txt").read_text()
    assert f"batches of {fits} windows from here on" in text


def test_model_too_large_for_one_row_is_said(make_env: MakeEnv, trained_run: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(golf.GPT, "logits", full)
    with pytest.raises(golf.ConfigError, match="EVAL_SEQ_LEN=64 must be shorter"):
        golf.main(make_env(EVAL_ONLY=trained_run / "runs" / "toy" / "artifact.bin"))


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in ("out", "out.partial"):
        (tmp_path / name).symlink_to(victim)
    golf.write_atomically(tmp_path / "out", b"new")
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "out").read_bytes() == b"new"


def test_full_disk_is_said_and_does_not_end_the_run(make_config: MakeConfig, world: golf.World,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    log = golf.RunLog(make_config(), world)
    log.files[0] = open("/dev/full", "w")  # noqa: SIM115
    log.line("a line")
    assert "/dev/full: No space left" in capsys.readouterr().err


def test_second_process_in_a_folder_is_refused_with_its_owner(make_config: MakeConfig,
                                                              world: golf.World) -> None:
    first = golf.RunLog(make_config(), world)
    with pytest.raises(golf.ConfigError, match=f"belongs to process {os.getpid()} on"):
        golf.RunLog(make_config(RESUME="auto"), world)
    assert first.files


@pytest.mark.parametrize("kind", ["artifact", "shard", "checkpoint"])
def test_mutated_files_are_refused_in_bounded_memory(kind: str, trained_run: Path,
                                                     data_dir: Path) -> None:
    samples = {"artifact": trained_run / "runs" / "toy" / "artifact.bin",
               "shard": next((data_dir / "datasets").rglob("*train_000000.bin")),
               "checkpoint": trained_run / "runs" / "toy" / "weights.ckpt"}
    command = [sys.executable, str(MUTATE), kind, str(samples[kind]), "150", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True,
                          env=quiet_environment())
    report = json.loads(done.stdout)
    assert report["crashed"] == 0, done.stderr
    assert report["refused"] > 100


def test_terminated_program_resumes_to_the_same_artifact(make_env: MakeEnv, tmp_path: Path,
                                                         trained_run: Path) -> None:
    env = quiet_environment(**make_env(TRAIN_LOG_EVERY=1))
    command = [sys.executable, str(PROGRAM)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("2/8"):
                process.send_signal(signal.SIGTERM)
                begin = time.monotonic()
    assert process.returncode == 75
    assert time.monotonic() - begin < 20
    assert read_result(tmp_path)["status"] == "partial"
    done = subprocess.run(command, env={**env, "RESUME": "auto"}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (read_result(folder) for folder in (trained_run, tmp_path))
    assert first["bpb"] == second["bpb"]
    blobs = [(folder / "runs" / "toy" / "artifact.bin").read_bytes()
             for folder in (trained_run, tmp_path)]
    assert hashlib.sha256(blobs[0]).digest() == hashlib.sha256(blobs[1]).digest()
