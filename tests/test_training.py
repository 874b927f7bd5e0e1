"""Section 6: the loop, its clock and what it hands on."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import MakeConfig, MakeEnv, SilentLog, blocks_of, plan_named, random_model, tiny_env

import train_gpt as golf
from tools.prepare_data import write_shard


def never(step: int, plan: golf.DepthPlan, is_last: bool) -> None:
    raise AssertionError(f"validated at step {step} of {plan.name}, {is_last}")


def make_trainer(config: golf.Config, log: golf.RunLog) -> golf.Trainer:
    return golf.Trainer(config, golf.World(), log, golf.sdpa_attend)


# ---- The clock ----


class FakeTime:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        """Seconds, as far as the program can tell."""
        return self.now


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(golf, "time", SimpleNamespace(perf_counter=fake.perf_counter,
                                                      time=time.time))
    return fake


def simulate(config: golf.Config, fake: FakeTime, reserve: float, step_seconds: list[float],
             ahead: int = 2, validate_every: int = 0) -> tuple[float, int]:
    """Training seconds and steps of the loop in `Trainer.run`, with a host `ahead` of its device.

    Step n takes step_seconds[n], the last value from there on; a validation takes ten seconds.
    """
    clock = golf.TrainingClock(config, golf.World(), reserve)
    queue: deque[float] = deque()  # when each unfinished step will be finished

    def drain(most: int) -> None:
        while len(queue) > most:
            fake.now = max(fake.now, queue.popleft())

    step, stopped = 0, False
    while not stopped:
        drain(ahead)
        _, stopped = clock.next_step(step, len(queue))
        if validate_every and (stopped or step % validate_every == 0):
            drain(0)
            with clock.paused():
                fake.now += 10.0
        if not stopped:
            begin = max(fake.now, queue[-1] if queue else 0.0)
            queue.append(begin + step_seconds[min(step, len(step_seconds) - 1)])
            fake.now += 1e-4
            step += 1
    drain(0)
    return clock.elapsed, step


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("step_seconds", [[1.0], [0.1], [3.0], [1.0, 0.7], [5.0, 1.0],
                                          [0.3] * 20 + [0.45]])
def test_clock_uses_its_budget_and_never_crosses_it(fake_time: FakeTime, step_seconds: list[float],
                                                    ahead: int) -> None:
    config = golf.Config(max_wallclock_seconds=30.0, gptq_reserve_seconds=2.0)
    seconds, steps = simulate(config, fake_time, 2.0, step_seconds, ahead)
    assert seconds <= 28.0
    # What is left would not have held another step, allowing for the slowest of the last eight.
    assert seconds + 1.1 * max(step_seconds[-1], *step_seconds[-2:]) * 2 > 28.0
    assert steps >= 5


@pytest.mark.parametrize("every", [1, 2, 3, 5, 10, 11])
def test_validation_does_not_let_a_step_cross_the_budget(fake_time: FakeTime, every: int) -> None:
    config = golf.Config(max_wallclock_seconds=30.0, gptq_reserve_seconds=2.0)
    seconds, steps = simulate(config, fake_time, 2.0, [2.2], validate_every=every)
    assert seconds <= 28.0
    assert steps >= 8


def test_validation_takes_no_training_time(fake_time: FakeTime) -> None:
    config = golf.Config(max_wallclock_seconds=100.0, gptq_reserve_seconds=2.0)
    clock = golf.TrainingClock(config, golf.World(), 2.0)
    fake_time.now += 5.0
    with clock.paused():
        fake_time.now += 1000.0
    fake_time.now += 3.0
    assert clock.elapsed == pytest.approx(8.0)


def test_progress_is_the_share_of_the_budget_without_the_reserve(fake_time: FakeTime) -> None:
    config = golf.Config(max_wallclock_seconds=60.0)
    clock = golf.TrainingClock(config, golf.World(), 20.0)
    assert clock.next_step(0, 0) == (0.0, False)
    fake_time.now += 10.0
    assert clock.next_step(1, 0) == (pytest.approx(0.25), False)


def test_iterations_end_a_timed_run_too(fake_time: FakeTime) -> None:
    config = golf.Config(max_wallclock_seconds=600.0, iterations=7)
    assert simulate(config, fake_time, 12.0, [1.0])[1] == 7


def test_iterations_that_end_a_timed_run_complete_its_schedule(fake_time: FakeTime) -> None:
    config = golf.Config(max_wallclock_seconds=600.0, iterations=8)
    clock = golf.TrainingClock(config, golf.World(), 12.0)
    found = []
    for step in range(8):
        found.append(clock.next_step(step, 0)[0])
        fake_time.now += 1.0
    assert found == pytest.approx([step / 8 for step in range(8)])


def test_without_a_budget_progress_counts_steps(fake_time: FakeTime) -> None:
    config = golf.Config(max_wallclock_seconds=0.0, iterations=8)
    clock = golf.TrainingClock(config, golf.World(), 20.0)
    decisions = []
    for step in range(9):
        fake_time.now += 1e6
        decisions.append(clock.next_step(step, 2))
    assert decisions == [(step / 8, step == 8) for step in range(9)]


# ---- The loop ----


def test_warm_up_leaves_no_trace(config: golf.Config, log: SilentLog) -> None:
    trainer = make_trainer(config, log)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    reserve = trainer.warm_up()
    for p, first in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(p, first)
        assert p.grad is None
    assert all(not group.momentum.any() for group in trainer.optimizer.groups)
    assert trainer.optimizer.moments
    assert not any(bool(t.any()) for t in trainer.optimizer.moments)
    assert reserve >= config.gptq_reserve_seconds
    assert not trainer.micro_seconds


def test_training_follows_the_published_recipe(make_config: MakeConfig, log: SilentLog) -> None:
    """The same steps written down once more: order of data, plan, schedules, averaging."""
    config = make_config(ITERATIONS=5, ENABLE_LOOPING_AT=0.5, WARMDOWN_FRAC=0.6)
    trained = make_trainer(config, log)
    plan, _ = trained.run(never)
    assert plan.name == "looped"

    model = golf.GPT(config, golf.sdpa_attend)
    model.initialise(config.seed)
    optimizer = golf.Optimizer(model, config, golf.World())
    shards = [golf.read_shard(p) for p in golf.find_shards(config.dataset_dir, "train")]
    loader = golf.TrainLoader(shards, config)
    averages = [p.detach().clone() for p in model.parameters()]
    for step in range(5):
        rows = torch.from_numpy(loader.read(12 * step, 12))
        plan = plan_named(config, "looped" if step >= 3 else "unlooped")
        model(rows[:, :-1], rows[:, 1:], plan).mean().backward()
        optimizer.step(step, min(1.0, (1 - step / 5) / 0.6))
        with torch.no_grad():
            for average, p in zip(averages, model.parameters(), strict=True):
                average.mul_(config.ema_decay).add_(p, alpha=1 - config.ema_decay)
    start = golf.GPT(config, golf.sdpa_attend)
    start.initialise(config.seed)
    for found, wanted, first in zip(trained.model.parameters(), averages, start.parameters(),
                                    strict=True):
        assert (found - wanted).norm() < 0.02 * (wanted - first).norm() + 1e-6


def test_hessians_are_of_the_averaged_weights_and_the_last_plan(config: golf.Config,
                                                                log: SilentLog) -> None:
    trainer = make_trainer(config, log)
    _, found = trainer.run(never)
    again = golf.Hessians(trainer.model)
    for first in range(0, 24, 6):
        rows = torch.from_numpy(trainer.loader.read(first, 6))
        golf.collect(again, rows, plan_named(config, "looped"))
    assert found.keys() == again.moments.keys()
    for name, hessian in found.items():
        torch.testing.assert_close(hessian, again.moments[name])


def test_loss_falls(make_config: MakeConfig, log: SilentLog) -> None:
    trainer = make_trainer(make_config(ITERATIONS=30), log)
    trainer.run(never)
    losses = [e["train_loss"] for e in log.events if e["event"] == "train"]
    assert losses[0] == pytest.approx(math.log(384), abs=0.05)
    assert cast_float(losses[-1]) < 4.0


def test_plan_switch_is_logged_once_with_its_step(config: golf.Config, log: SilentLog) -> None:
    trainer = make_trainer(config, log)
    trainer.run(never)
    switches = [e for e in log.events if e["event"] == "plan" and e["plan"] == "looped"]
    assert len(switches) == 1
    assert switches[0]["progress"] == pytest.approx(3 / 8)
    plans = {e["step"]: e["plan"] for e in log.events if e["event"] == "train"}
    assert plans == {1: "unlooped", 2: "unlooped", 3: "unlooped", 4: "looped", 5: "looped",
                     8: "looped"}
    train = log.result["train"]
    assert train["steps"] == 8
    assert train["tokens"] == 8 * 768
    assert log.result["train"]["loop_enabled_step"] in (3, 4)
    assert any(line.startswith("layer_loop:enabled step:") for line in log.lines)
    assert set(train["tok_s_by_plan"]) == {"unlooped", "looped"}  # type: ignore[call-overload]


def test_run_without_the_loop_hands_on_the_plan_it_trained(make_config: MakeConfig,
                                                           log: SilentLog) -> None:
    trainer = make_trainer(make_config(ENABLE_LOOPING_AT=1), log)
    assert trainer.run(never)[0].name == "unlooped"


def test_train_events_have_the_agreed_keys(config: golf.Config, log: SilentLog) -> None:
    make_trainer(config, log).run(never)
    events = [e for e in log.events if e["event"] == "train"]
    for event in events:
        assert event.keys() >= {"step", "train_loss", "lr_scale", "tok_s", "plan", "mem_mib",
                                "progress"}
    assert [e["progress"] for e in events] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.875])
    scales = [golf.lr_scale(config, 0, cast_float(e["progress"])) for e in events]
    assert [e["lr_scale"] for e in events] == pytest.approx(scales)


def cast_float(value: object) -> float:
    assert isinstance(value, float)
    return value


def test_validation_sees_raw_weights_at_the_agreed_steps(make_config: MakeConfig,
                                                         log: SilentLog) -> None:
    trainer, seen = make_trainer(make_config(VAL_LOSS_EVERY=3), log), []

    def validate(step: int, plan: golf.DepthPlan, is_last: bool) -> None:
        seen.append((step, plan.name, is_last, trainer.model.embed.detach().clone()))

    trainer.run(validate)
    assert [entry[:3] for entry in seen] == [(0, "unlooped", False), (3, "unlooped", False),
                                             (6, "looped", False), (8, "looped", True)]
    embeds = [entry[3] for entry in seen]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(embeds))
    assert not torch.equal(embeds[-1], trainer.model.embed)  # averaged afterwards


def test_validating_changes_nothing_else(make_config: MakeConfig, log: SilentLog) -> None:
    plain, watched = (make_trainer(make_config(VAL_LOSS_EVERY=every), log) for every in (0, 2))
    plain.run(never)
    watched.run(lambda step, plan, is_last: None)
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", [1, 2])
def test_seed_decides_everything(make_config: MakeConfig, log: SilentLog, seed: int) -> None:
    models = []
    for each in (1, seed):
        trainer = make_trainer(make_config(SEED=each, ITERATIONS=2), log)
        trainer.run(never)
        models.append(trainer.model)
    assert torch.equal(models[0].embed, models[1].embed) == (seed == 1)


def test_timed_run_keeps_its_budget(make_config: MakeConfig, log: SilentLog, fake_time: FakeTime,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(MAX_WALLCLOCK_SECONDS=30, GPTQ_RESERVE_SECONDS=3, ITERATIONS=10**6)
    trainer = make_trainer(config, log)
    honest_batch, honest_calibration = trainer.forward_backward, trainer.calibrate

    def slow_batch(plan: golf.DepthPlan, batches: list[Tensor]) -> Tensor:
        fake_time.now += 1.5 if plan.name == "unlooped" else 2.0
        return honest_batch(plan, batches)

    def slow_calibration(plan: golf.DepthPlan) -> dict[str, Tensor]:
        fake_time.now += 2.5
        return honest_calibration(plan)

    monkeypatch.setattr(trainer, "forward_backward", slow_batch)
    monkeypatch.setattr(trainer, "calibrate", slow_calibration)
    plan, _ = trainer.run(never)
    assert plan.name == "looped"
    assert 22.0 < log.result["clocks"]["training_seconds"] <= 30.0
    assert log.result["train"]["loop_enabled_step"] == 8  # at 10.5 of 27 seconds
    assert not any(line.startswith("warning") for line in log.lines)


def test_budget_that_calibration_alone_would_cross_is_refused(make_config: MakeConfig,
                                                              log: SilentLog) -> None:
    config = make_config(MAX_WALLCLOCK_SECONDS=0.3, GPTQ_RESERVE_SECONDS=0.1,
                         GPTQ_CALIBRATION_BATCHES=400)
    with pytest.raises(golf.GolfError, match="MAX_WALLCLOCK_SECONDS"):
        make_trainer(config, log).run(never)


def test_loss_that_is_not_finite_ends_training(config: golf.Config, log: SilentLog,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(config, log)
    honest = trainer.take_step

    def poisoned(plan: golf.DepthPlan, progress: float, batches: list[Tensor]) -> None:
        if trainer.state.step == 2:
            with torch.no_grad():
                trainer.model.q_gain[0, 0] = math.inf
        honest(plan, progress, batches)

    monkeypatch.setattr(trainer, "take_step", poisoned)
    with pytest.raises(golf.GolfError, match=r"^step 4: .*nan") as error:
        trainer.run(never)
    assert "\n" not in str(error.value)


def test_gradient_that_is_not_finite_ends_training(config: golf.Config, log: SilentLog,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(config, log)
    honest = trainer.forward_backward

    def poisoned(plan: golf.DepthPlan, batches: list[Tensor]) -> Tensor:
        loss = honest(plan, batches)
        if trainer.model.embed.grad is not None and len(trainer.flight) == 2:
            trainer.model.embed.grad[5, 5] = math.inf
        return loss

    monkeypatch.setattr(trainer, "forward_backward", poisoned)
    with pytest.raises(golf.GolfError, match=r"norm=inf.*'embed'"):
        trainer.run(never)


def write_bad_dataset(config: golf.Config, folder: Path) -> Path:
    """The dataset with one token id too large late in a training shard."""
    folder.mkdir()
    for split in ("train", "val"):
        for path in golf.find_shards(config.dataset_dir, split):
            tokens = np.array(golf.read_shard(path))
            if split == "train":
                tokens[3000:] = 384
            write_shard(folder / path.name, tokens)
    return folder


def test_bad_token_ends_the_run_and_keeps_what_was_written(
        make_env: MakeEnv, config: golf.Config, tmp_path: Path) -> None:
    data = write_bad_dataset(config, tmp_path / "bad")
    with pytest.raises(golf.DataError, match=r"token id 384 must be below VOCAB_SIZE") as error:
        golf.main(make_env(DATA_PATH=data))
    assert str(data) in str(error.value)
    result = json.loads((tmp_path / "logs" / "toy.json").read_text())
    assert result["status"] == "partial"
    assert "token id 384" in result["exit_reason"]
    assert (tmp_path / "logs" / "toy.jsonl").stat().st_size > 0


def test_calibration_reads_the_configured_number_of_windows(make_config: MakeConfig) -> None:
    config = make_config(GPTQ_CALIBRATION_BATCHES=5)
    for size in (1, 2, 3, 4, 6):
        shape = golf.batch_shape(config, size)
        share = golf.calibration_share(config, golf.World(0, size), shape)
        read = share * size * shape.sequences
        assert 30 <= read < 30 + size * shape.sequences


def test_rows_are_cut_to_the_context_in_force(make_config: MakeConfig, log: SilentLog) -> None:
    """A shorter context is the same text in more rows, and none sees past its start."""
    trainer = make_trainer(make_config(TRAIN_CONTEXT="0.5:16"), log)
    trainer.model, trainer.context = random_model(trainer.config), 16
    rows, plan = torch.from_numpy(trainer.loader.read(0, 4)), plan_named(trainer.config, "looped")
    loss = trainer.forward_backward(plan, [rows])
    pieces = [row[first:first + 17] for row in rows for first in range(0, 64, 16)]
    alone = [trainer.model(p[None, :-1], p[None, 1:], plan).mean() for p in pieces]
    torch.testing.assert_close(loss, torch.stack(alone).mean().detach())


def test_context_grows_at_its_share_of_the_run(make_config: MakeConfig, log: SilentLog,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_config(TRAIN_CONTEXT="0.25:16,0.75:32", ITERATIONS=8), log)
    honest, used = trainer.forward_backward, []

    def noted(plan: golf.DepthPlan, batches: list[Tensor]) -> Tensor:
        used.append((plan.name, trainer.context))
        return honest(plan, batches)

    monkeypatch.setattr(trainer, "forward_backward", noted)
    trainer.run(never)
    trained = used[-8:]
    assert [context for _, context in trained] == [16] * 2 + [32] * 4 + [64] * 2
    assert set(trained) <= set(used[:-8])  # warmed up before the clock


def test_micro_steps_add_up_to_the_whole_batch(make_config: MakeConfig, log: SilentLog) -> None:
    gradients = []
    for micro in (768, 384, 64):
        trainer = make_trainer(make_config(MICRO_BATCH_TOKENS=micro), log)
        trainer.model = random_model(trainer.config)
        rows = torch.from_numpy(trainer.loader.read(0, 12))
        loss = trainer.forward_backward(plan_named(trainer.config, "looped"),
                                        rows.split(trainer.shape.sequences))
        assert len(rows.split(trainer.shape.sequences)) == 768 // micro
        gradients.append((loss, trainer.model.qkv.grad))
    for loss, gradient in gradients[1:]:
        torch.testing.assert_close(loss, gradients[0][0])
        torch.testing.assert_close(gradient, gradients[0][1], rtol=1e-3, atol=1e-6)


def test_plans_of_a_run_are_those_of_its_settings(data_dir: Path, tmp_path: Path) -> None:
    config = golf.Config.from_env(tiny_env(data_dir, tmp_path))
    assert [blocks_of(p) for p in golf.depth_plans(config)] == [[0, 1, 2, 3, 4],
                                                                [0, 1, 2, 1, 2, 3, 4]]
    assert len(golf.depth_plans(replace(config, num_loops=0))) == 1
