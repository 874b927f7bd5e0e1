#!/usr/bin/env python3
"""How training scales over the GPUs of this machine, and whether its ranks agree.

    PRESET=pr1493 python tools/bench_ranks.py                1, 2, 4 and 8 ranks, as GPUs allow
    PRESET=demo python tools/bench_ranks.py --sizes 1,2      ranks of one CPU, over gloo
    torchrun --standalone --nproc_per_node=8 tools/bench_ranks.py --whole-run

Every world size starts under torchrun and trains the first steps of one run, always of the same
global batch, then times steps of that batch and of one whose share of a rank is that of a single
rank. Settings come from the environment, as for train_gpt.py; MICRO_BATCH_TOKENS is the share.
Tokens are those of the configured dataset where it is there, else random.

Speed-up is against one rank with the same kind of batch. Collectives are NCCL's kernels on the
device, and overlapped is their share during which another kernel ran; on a CPU neither is known.
Equal weights: the SHA-256 of all parameters after those first steps is the same on all ranks. Loss
gap: the largest difference of a step's loss from that of one rank.

--whole-run is the program itself, under torchrun, and ends in an error unless all ranks hold equal
weights when training ends; its result says so under `train`.

Writes LOG_DIR/bench_ranks_<gpu>_<date>.json. Exit status: 0 done, 1 it could not run, 2 bad
arguments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as golf
from tools import bench
from tools.command import exit_status, integers, last_error, number_between
from tools.sweep import WORLD_SIZES

Interval = tuple[float, float]
Mark = torch.cuda.Event | float


class Timing(NamedTuple):
    """One kind of step at one world size: medians in milliseconds, of all ranks the slowest."""

    batch_tokens: int  # of all ranks
    plan: str
    micro_steps: int
    micro_ms: float
    optimizer_ms: float
    average_ms: float
    ms_per_step: float
    collectives_ms: float | None = None  # of rank 0
    overlapped: float | None = None  # share of them


class Measured(NamedTuple):
    """One world size."""

    world_size: int
    losses: list[float]  # of the first steps
    equal_weights: bool  # of all ranks after them
    timings: list[Timing]


def overlapped_length(some: Sequence[Interval], others: Sequence[Interval]) -> float:
    """Length of `some` during which one of `others` ran. Example: (0, 4) and (1, 2), (3, 9) -> 2"""
    merged: list[list[float]] = []
    for begin, end in sorted(others):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return sum(max(0.0, min(end, last) - max(begin, first))
               for begin, end in some for first, last in merged)


class RankBench:
    """One rank of one world size."""

    def __init__(self, config: golf.Config, world: golf.World, repeats: int) -> None:
        self.config, self.world, self.repeats = config, world, repeats
        self.attend = golf.choose_attention(config.attention, world.device).attend

    def trainer(self, batch_tokens: int) -> golf.Trainer:
        """A trainer at its start."""
        config = replace(self.config, train_batch_tokens=batch_tokens)
        return golf.Trainer(config, self.world, bench.silent_log(config), self.attend)

    def first_losses(self, trainer: golf.Trainer, steps: int) -> list[float]:
        """Losses of the first steps, means over the whole batch, through all plans of a run."""
        stream, found = golf.batch_stream(trainer.loader, trainer.shape, self.world), list[Tensor]()
        for step in range(steps):
            plan = golf.plan_at(self.config, step / steps)
            found.append(trainer.forward_backward(plan, next(stream)))
            trainer.optimizer.step(step, 1.0)
        stream.close()
        return (self.world.combine(torch.stack(found)) / self.world.size).tolist()

    def step(self, trainer: golf.Trainer, plan: golf.DepthPlan, rows: list[Tensor]) -> list[Mark]:
        """One step that changes no weight; when its parts began and the last one ended."""
        marks = [trainer.mark()]
        trainer.forward_backward(plan, rows)
        marks.append(trainer.mark())
        trainer.optimizer.step(0, 0.0)
        marks.append(trainer.mark())
        trainer.update_average(1 - self.config.ema_decay)
        return [*marks, trainer.mark()]

    def time_plan(self, trainer: golf.Trainer, plan: golf.DepthPlan) -> Timing:
        """Steps of one plan, warm."""
        stream = golf.batch_stream(trainer.loader, trainer.shape, self.world)
        rows, parts = next(stream), list[list[float]]()
        stream.close()
        for _ in range(3):
            self.step(trainer, plan, rows)
        self.world.synchronize()
        steps = [self.step(trainer, plan, rows) for _ in range(self.repeats)]
        self.world.synchronize()
        for marks in steps:
            pairs = [*itertools.pairwise(marks), (marks[0], marks[-1])]
            parts.append([milliseconds(*pair) for pair in pairs])
        mine = torch.tensor([statistics.median(part) for part in zip(*parts, strict=True)])
        micro, optimizer, average, whole = self.world.combine(mine, dist.ReduceOp.MAX).tolist()
        collectives, overlapped = self.collectives(trainer, plan, rows)
        return Timing(trainer.config.train_batch_tokens, plan.name, trainer.shape.micro_steps,
                      micro, optimizer, average, whole, collectives, overlapped)

    def collectives(self, trainer: golf.Trainer, plan: golf.DepthPlan,
                    rows: list[Tensor]) -> tuple[float | None, float | None]:
        """Milliseconds of NCCL's kernels in a step of this rank, and their overlapped share."""
        if not self.world.is_cuda or self.world.size == 1:
            return None, None
        count = 3
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(count):
                self.step(trainer, plan, rows)
            self.world.synchronize()
        spans: dict[bool, list[Interval]] = {True: [], False: []}
        for event in profiler.events() or ():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                span = event.time_range.start, event.time_range.end  # in microseconds
                spans["nccl" in event.name.lower()].append(span)
        total = sum(end - begin for begin, end in spans[True])
        share = overlapped_length(spans[True], spans[False]) / total if total else 0.0
        return total / count / 1e3, share

    def measure(self, batches: Sequence[int], losses: int) -> Measured:
        """Everything of this world size; the largest batch is the one that all sizes share."""
        trainer = self.trainer(max(batches))
        first, equal = self.first_losses(trainer, losses), weights_digest(trainer)[1]
        timings = []
        for tokens in batches:
            trainer = self.trainer(tokens)  # fresh: weights that learned draw more power
            timings += [self.time_plan(trainer, plan) for plan in golf.depth_plans(self.config)]
        return Measured(self.world.size, first, equal, timings)


def weights_digest(trainer: golf.Trainer) -> tuple[str, bool]:
    """SHA-256 of a rank's parameters, and whether all ranks hold the same to the bit."""
    content = b"".join(p.detach().cpu().numpy().tobytes() for p in trainer.model.parameters())
    digest = golf.digest(content)
    number = float(int(digest[:12], 16))  # exact in float64
    least, most = (trainer.world.combine(torch.tensor(number, dtype=torch.float64), operation)
                   for operation in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    return digest, bool(least == most)


def whole_run() -> int:
    """The program's exit status, its training followed by a comparison of the ranks' weights."""
    train = golf.Trainer.run

    def run(trainer: golf.Trainer, validate: Callable[..., None]) -> tuple:
        found = train(trainer, validate)
        digest, equal = weights_digest(trainer)
        trainer.log.put("train", weights_sha256=digest, equal_weights=equal)
        size = trainer.world.size
        if not equal:
            raise golf.GolfError(f"weights of {size} ranks differ, here sha256 {digest}")
        trainer.log.line(f"weights of {size} ranks: equal, sha256 {digest}")
        return found

    with mock.patch.object(golf.Trainer, "run", run):
        return golf.command_line([])


def milliseconds(begin: Mark, end: Mark) -> float:
    """Between two marks of a trainer."""
    if isinstance(begin, float) or isinstance(end, float):
        return 1e3 * (float(end) - float(begin))  # type: ignore[arg-type] # both are
    return begin.elapsed_time(end)


def rank_main(options: argparse.Namespace) -> None:
    """One process under torchrun; rank 0 writes what was measured."""
    config, world = golf.Config.from_env(os.environ), golf.World.from_env(os.environ)
    torch.set_float32_matmul_precision("high")
    with world.process_group(config.rank_timeout_seconds):
        found = RankBench(config, world, options.repeats).measure(options.batches, options.losses)
        if world.is_main:
            timings = [timing._asdict() for timing in found.timings]
            options.rank_of.write_text(json.dumps({**found._asdict(), "timings": timings}))


def launch(size: int, batches: Sequence[int], options: argparse.Namespace, folder: Path,
           config: golf.Config) -> Measured:
    """The measurements of one world size. Raises: GolfError with the reason of a failure."""
    out = folder / f"{size}.json"
    env = {**os.environ, "DATA_PATH": str(config.dataset_dir)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={size}", __file__, "--rank-of", str(out), "--batches",
               ",".join(map(str, batches)), "--repeats", str(options.repeats),
               "--losses", str(options.losses)]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if answer.returncode or not out.is_file():
        raise golf.GolfError(f"{size} ranks: {last_error(answer.stderr)}")
    content = json.loads(out.read_text())
    return Measured(**{**content, "timings": [Timing(**timing) for timing in content["timings"]]})


def rows_of(found: Sequence[Measured], share: int, most: int) -> list[dict[str, object]]:
    """A row for each world size, kind of batch and plan, with its speed-up over one rank."""
    rates: dict[tuple[int, str, str], float] = {}
    rows: list[dict[str, object]] = []
    for size, _, _, timings in found:
        for kind, tokens in (("per rank", share * size), ("global", share * most)):
            for timing in timings:
                if timing.batch_tokens != tokens:
                    continue
                rate = rates[size, kind, timing.plan] = 1e3 * tokens / timing.ms_per_step
                known = {k: v for k, v in timing._asdict().items() if v is not None}
                rows.append({"world_size": size, "batch": kind, **known, "tok_s": rate})
                if alone := rates.get((1, kind, timing.plan)):
                    rows[-1] |= {"speed_up": rate / alone, "efficiency": rate / alone / size}
    return rows


def agreement_of(found: Sequence[Measured]) -> list[dict[str, object]]:
    """For each world size: equal weights, and how far its losses are from those of the first."""
    rows: list[dict[str, object]] = []
    for size, losses, equal, _ in found:
        gaps = [a - b for a, b in zip(losses, found[0].losses, strict=True)]
        rows.append({"world_size": size, "equal_weights": equal, "steps": len(losses),
                     "loss_gap": max(map(abs, gaps)), "mean_loss_gap": abs(sum(gaps)) / len(gaps),
                     "last_loss": losses[-1]})
    return rows


def table(rows: Sequence[dict[str, object]], agreement: Sequence[dict[str, object]]) -> str:
    """Both as text."""
    lines = [f"{'ranks':>5}  {'batch':<9}{'plan':<10}{'ms a step':>10}{'tok/s':>12}{'speed-up':>9}"
             f"{'optimizer':>10}{'collectives':>12}"]
    for row in rows:
        cells = [row.get(name, float("nan")) for name in
                 ("ms_per_step", "tok_s", "speed_up", "optimizer_ms", "collectives_ms")]
        ms, rate, speed_up, optimizer, collectives = cells
        lines.append(f"{row['world_size']:>5}  {row['batch']:<9}{row['plan']:<10}{ms:>10.2f}"
                     f"{rate:>12,.0f}{speed_up:>9.3f}{optimizer:>10.2f}{collectives:>12.2f}")
    lines += [f"{row['world_size']} ranks: equal weights {row['equal_weights']}, losses of "
              f"{row['steps']} steps within {row['loss_gap']:.2e} of one rank" for row in agreement]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=integers, metavar="N,...",
                        help="world sizes, 1 first; default: those of 1, 2, 4, 8 that GPUs allow")
    steps = number_between(int, 1, 10**6)
    parser.add_argument("--losses", type=steps, default=50, metavar="STEPS", help="to compare")
    parser.add_argument("--repeats", type=steps, default=15, metavar="STEPS", help="to time")
    parser.add_argument("--whole-run", action="store_true", help="run the program, under torchrun")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=integers, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sizes and options.sizes[0] != 1:
        parser.error(f"--sizes {options.sizes}: 1 comes first, the others are compared with it")
    if unknown := set(options.sizes or ()) - set(WORLD_SIZES):
        parser.error(f"--sizes {min(unknown)} must be one of {sorted(WORLD_SIZES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures all world sizes, prints the table and writes the file; the exit status."""
    options = parse_arguments(arguments)
    if options.whole_run:
        return whole_run()
    if options.rank_of:
        rank_main(options)
        return 0
    config, gpus = golf.Config.from_env(os.environ), torch.cuda.device_count()
    sizes = options.sizes or [size for size in (1, 2, 4, 8) if size <= max(gpus, 1)]
    Path(config.log_dir).mkdir(parents=True, exist_ok=True)  # or its error, before minutes of work
    share = config.micro_batch_tokens // config.train_seq_len * config.train_seq_len
    most, found = max(sizes), list[Measured]()
    with tempfile.TemporaryDirectory() as name:
        config, data = bench.with_tokens(config, Path(name))
        for size in sizes:
            batches = sorted({share * size, share * most})
            found.append(launch(size, batches, options, Path(name), config))
    rows, agreement = rows_of(found, share, most), agreement_of(found)
    facts = golf.environment_facts(golf.World.from_env({}))
    gpu = torch.cuda.get_device_name() if gpus else "cpu"
    result = {"gpu": gpu, **facts, "preset": config.preset, "differs": config.differs(),
              "source_sha256": golf.digest(golf.program_source()), "data": data,
              "config_hash": config.config_hash, "rows": rows, "agreement": agreement,
              "losses": {str(measured.world_size): measured.losses for measured in found}}
    path = bench.write_new(Path(config.log_dir), f"bench_ranks_{gpu}", result)
    print(f"{table(rows, agreement)}\nresult: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, golf.GolfError))
