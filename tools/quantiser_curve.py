#!/usr/bin/env python3
"""The quantisation gap against bytes, for several quantisers on one trained checkpoint.

    PRESET=pr1493 python tools/quantiser_curve.py                  trains, then measures
    PRESET=pr1493 python tools/quantiser_curve.py --whole-run      train_gpt.py's run, then measures
    PRESET=pr1493 python tools/quantiser_curve.py --weights runs/<run_id>/checkpoint.pt

Training writes runs/<run_id>/checkpoint.pt: averaged weights, Hessians and output gradients. The
curve has one row per method and cap: the methods differ in quantiser and coder alone, and one
factor on all steps, wider or finer, brings each to just under the cap, program included.

    reference          QUANTISER=gptq COMPRESSOR=brotli
    coder              QUANTISER=gptq COMPRESSOR=ans
    rate_distortion    QUANTISER=rate COMPRESSOR=ans
    tuned              the same; then row scales and small parameters follow, for some steps on
                       training windows, the gradient of the divergence from the checkpoint

Gap: bits per byte after less before, every document alone, windows of EVAL_SEQ_LEN side by side.
The file is written after every row; rows of the same checkpoint that it holds are not repeated.
Exit status: 0 measured, 1 an error or a cap that nothing fits, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as golf
from tools.command import exit_status, integers
from tools.runs import earlier_rows

METHODS: dict[str, tuple[Literal["gptq", "rate"], Literal["brotli", "ans"]]] = {
    "reference": ("gptq", "brotli"), "coder": ("gptq", "ans"), "rate_distortion": ("rate", "ans"),
    "tuned": ("rate", "ans")}
MOST_PASSES = 6
TOLERANCE = 1e-3  # of the cap, unused
TUNE_STEPS, TUNE_RATE, TUNE_SEQUENCES = 30, 0.004, 16
TUNED_BITS = 7  # of a scale's mantissa; they cost about half a byte a row
CODE_BYTES = len(golf.packed_program())


class Checkpoint(NamedTuple):
    """What a training run leaves to quantise, on the device."""

    run_id: str
    config: golf.Config
    plan: golf.DepthPlan
    weights: dict[str, Tensor]
    hessians: dict[str, Tensor]

    def digest(self) -> str:
        """SHA-256 of the weights."""
        found = hashlib.sha256()
        for name in sorted(self.weights):
            found.update(self.weights[name].cpu().numpy().tobytes())
        return found.hexdigest()

    def model(self, config: golf.Config, device: torch.device,
              attend: golf.Attend = golf.sdpa_attend) -> golf.GPT:
        """A model of its own with these weights."""
        model = golf.GPT(config, attend, golf.compute_dtype(device)).to(device)
        model.load_state_dict(self.weights)
        return model


# ==================================================================================================
# Training
# ==================================================================================================


class Keeper:
    """Makes a run of the program collect gradients too, and keep what it would quantise."""

    def __init__(self) -> None:
        self.collect, self.fit_to_cap = golf.collect, golf.fit_to_cap
        self.path: Path | None = None

    def collect_all(self, hessians: golf.Hessians, rows: Tensor, plan: golf.DepthPlan) -> None:
        """Hessians and gradients, whatever the quantiser of the run needs."""
        model = hessians.model
        config = model.config
        model.config = replace(config, quantiser="rate", compressor="ans")
        try:
            self.collect(hessians, rows, plan)
        finally:
            model.config = config

    def keep_and_fit(self, model: golf.GPT, hessians: dict[str, Tensor], plan: golf.DepthPlan,
                     world: golf.World, log: golf.RunLog) -> tuple[golf.QuantisedModel, bytes]:
        """Saves the checkpoint, then fits as usual."""
        self.save(model, hessians, plan, log)
        return self.fit_to_cap(model, hessians, plan, world, log)

    def save(self, model: golf.GPT, hessians: dict[str, Tensor], plan: golf.DepthPlan,
             log: golf.RunLog) -> None:
        """Writes the checkpoint into the folder of the run."""
        begin = time.perf_counter()
        self.path = log.folder / "checkpoint.pt"
        torch.save({"run_id": log.run_id, "config": asdict(model.config), "plan": plan.name,
                    "weights": model.state_dict(), "hessians": hessians}, self.path)
        print(f"{self.path}: {self.path.stat().st_size:,} bytes in "
              f"{time.perf_counter() - begin:.1f}s", flush=True)


def train(env: Mapping[str, str], *, whole: bool) -> Path:
    """Trains as the environment says; the path of the checkpoint. Raises: GolfError."""
    keeper = Keeper()
    config, world = golf.Config.from_env(env), golf.World.from_env(env)
    if world.size > 1:
        raise golf.ConfigError(f"WORLD_SIZE={world.size} must be 1: the curve is one process")
    golf.collect, golf.fit_to_cap = keeper.collect_all, keeper.keep_and_fit
    try:
        if whole:
            golf.main(env)
        else:
            with world.process_group():
                _, _, log, attend, *_ = golf.prepare(config, world)
                trainer = golf.Trainer(config, world, log, attend)
                plan, hessians = trainer.run(lambda step, plan, is_last: None)
                keeper.save(trainer.model, hessians, plan, log)
                log.write_result("partial", "trained for the quantiser curve")
    finally:
        golf.collect, golf.fit_to_cap = keeper.collect, keeper.fit_to_cap
    if keeper.path is None:
        raise golf.ConfigError("EVAL_ONLY and PRINT_CONFIG leave no checkpoint")
    return keeper.path


def load(path: Path, env: Mapping[str, str], device: torch.device) -> Checkpoint:
    """The checkpoint at `path`; paths of data come from the environment. Raises: GolfError."""
    here = golf.Config.from_env(env)
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        config = golf.Config(**content["config"])
    except Exception as error:  # whatever reading a foreign file raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise golf.ArtifactError(f"{path}: not a checkpoint of this tool: {reason}") from None
    config = replace(config, data_dir=here.data_dir, data_path=here.data_path, compile=False,
                     tokenizer_path=here.tokenizer_path, log_dir=here.log_dir)
    plan = {plan.name: plan for plan in golf.depth_plans(config)}[content["plan"]]
    return Checkpoint(content["run_id"], config, plan, content["weights"], content["hessians"])


# ==================================================================================================
# The curve
# ==================================================================================================


class Point(NamedTuple):
    """One pass of quantiser and coder."""

    at: float  # logarithm to base 2 of the factor on all steps
    total_bytes: int
    solve_seconds: float
    encode_seconds: float


def order0_bytes(quantised: golf.QuantisedModel) -> int:
    """Entropy of the integers, one histogram per matrix."""
    return round(sum(golf.entropy_bits(levels) for levels in quantised.integers.values()) / 8)


def log_probabilities(model: golf.GPT, ids_BT: Tensor, plan: golf.DepthPlan) -> Tensor:
    """Of all tokens at all positions, float32 (B, T, V)."""
    logits = torch.nn.functional.linear(model.hidden(ids_BT, plan), model.embed.to(model.dtype))
    cap = model.config.logit_softcap
    return (cap * torch.tanh(logits.float() / cap)).log_softmax(-1)


def tune(quantised: golf.QuantisedModel, teacher: golf.GPT, model: golf.GPT,
         checkpoint: Checkpoint) -> golf.QuantisedModel:
    """The same integers with scales of rows and small parameters that undo some of the damage."""
    golf.restore_weights(model, quantised)
    shards = [golf.read_shard(path) for path in
              golf.find_shards(checkpoint.config.dataset_dir, "train")]
    loader = golf.TrainLoader(shards, checkpoint.config)
    stacks, device = model.stacks(), model.embed.device
    stored = {name: p.detach().clone() for name, p in stacks.items()}
    factors = {name: torch.ones_like(p[..., 0]).requires_grad_() for name, p in stored.items()}
    adam = torch.optim.Adam([*factors.values(), *model.vectors().values()], betas=(0.9, 0.95))
    for step in range(TUNE_STEPS):
        adam.param_groups[0]["lr"] = TUNE_RATE * (1 - step / TUNE_STEPS)
        windows = loader.read(step * TUNE_SEQUENCES, TUNE_SEQUENCES)
        ids_BT = torch.from_numpy(windows[:, :-1]).to(device)
        with torch.no_grad():
            wanted = log_probabilities(teacher, ids_BT, checkpoint.plan)
            for name, factor in factors.items():
                stacks[name].copy_(stored[name] * factor[..., None])
        model.zero_grad()
        found = log_probabilities(model, ids_BT, checkpoint.plan)
        ((wanted.exp() * (wanted - found)).sum() / ids_BT.numel()).backward()
        for name, factor in factors.items():
            factor.grad = (cast(Tensor, stacks[name].grad) * stored[name]).sum(-1)
        adam.step()
    model.zero_grad()
    floats = quantised.floats | {name: v.detach().half().cpu()
                                 for name, v in model.vectors().items()}
    for name, factor in factors.items():
        scale = quantised.floats[f"{name}.scale"].float() * factor.detach().cpu()
        floats[f"{name}.scale"] = golf.coarse(scale, TUNED_BITS, 1 << 9 - TUNED_BITS)
    return golf.QuantisedModel(quantised.integers, floats)


class Curve:
    """The rows of all methods, and the file that they go to."""

    def __init__(self, checkpoint: Checkpoint, path: Path, world: golf.World) -> None:
        self.checkpoint, self.path, self.world = checkpoint, path, world
        self.lock = threading.Lock()  # one thread at a time has the device
        config = checkpoint.config
        self.val = golf.ValStream.load(config)
        self.known: dict[str, tuple] = {}
        backend = golf.choose_attention(config.attention, world.device)
        self.scorer = golf.Scorer(checkpoint.model(config, world.device, backend.attend),
                                  checkpoint.plan, self.val, world)
        gpu = torch.cuda.get_device_name(world.device) if world.is_cuda else "none"
        sha256 = checkpoint.digest()
        self.content: dict = {
            "rows": earlier_rows(path, {"checkpoint_sha256": sha256}),
            "checkpoint_run_id": checkpoint.run_id, "preset": config.preset,
            "checkpoint_sha256": sha256, "differs": config.differs(),
            "eval_seq_len": config.eval_seq_len, "val_targets": self.val.num_targets,
            "val_bytes": self.val.num_bytes, "code_bytes": CODE_BYTES, "gpu": gpu,
            "attention": backend.name}
        self.content["bpb_before"], seconds = self.score()
        print(f"before: {self.content['bpb_before']:.6f} BPB in {seconds:.1f}s", flush=True)

    def score(self) -> tuple[float, float]:
        """BPB of the scorer's model, every document alone, and the seconds it took."""
        length = self.checkpoint.config.eval_seq_len
        windows = golf.document_windows(self.val, length, length)
        score = golf.evaluate(self.scorer, windows, by_document=True)
        return score.bits, score.seconds

    def measure(self, method: str, caps: Sequence[int]) -> None:
        """The rows of one method, from the largest cap down. Raises: ArtifactError."""
        quantiser, compressor = METHODS[method]
        config = replace(self.checkpoint.config, quantiser=quantiser, compressor=compressor)
        with self.lock:
            model = self.checkpoint.model(config, self.world.device)
        points: list[Point] = []
        done = {row["cap_bytes"] for row in self.content["rows"] if row["method"] == method}
        extra = sum(p[..., 0].numel() for p in model.stacks().values()) // 2
        for cap in sorted(set(caps) - done, reverse=True):
            if method == "tuned":
                self.add_row(method, cap, *self.fit_and_tune(model, points, cap, extra))
            else:
                self.add_row(method, cap, *self.fit(model, points, cap))

    def fit_and_tune(self, model: golf.GPT, points: list[Point], cap: int,
                     extra: int) -> tuple[Point, golf.QuantisedModel, bytes]:
        """An artifact with room for `extra` bytes, or twice as many, that tuning fills."""
        for room in (extra, 2 * extra, 4 * extra):
            point, quantised, _ = self.fit(model, points, cap - room)
            with self.lock:
                begin = time.perf_counter()
                tuned = tune(quantised, model, self.scorer.model, self.checkpoint)
                seconds = point.solve_seconds + time.perf_counter() - begin
            blob = golf.encode_artifact(tuned, model.config, self.checkpoint.plan)
            total = CODE_BYTES + len(blob)
            if total <= cap:
                return point._replace(total_bytes=total, solve_seconds=seconds), tuned, blob
        raise golf.ArtifactError(f"tuned scales do not fit {cap:,} bytes")

    def solve(self, model: golf.GPT, at: float) -> tuple[golf.QuantisedModel, float]:
        """Integers with all steps times 2**at, and the seconds they took."""
        with self.lock:
            begin = time.perf_counter()
            quantised = golf.quantise(model, self.checkpoint.hessians, self.world, 2**at,
                                      self.known)
            return quantised, time.perf_counter() - begin

    def first_factor(self, model: golf.GPT, target: float, slope: float) -> float:
        """Where the order-0 entropy alone comes near the target: without the coder, cheaply."""
        points: list[Point] = []
        at = 0.0
        while len(points) < 12 and (not points or abs(points[-1].total_bytes / target - 1) > 0.01):
            size = CODE_BYTES + order0_bytes(self.solve(model, at)[0])
            points.append(Point(at, size, 0.0, 0.0))
            at = golf.next_factor({p.at: p.total_bytes for p in points}, target, slope)
        return at

    def fit(self, model: golf.GPT, points: list[Point],
            cap: int) -> tuple[Point, golf.QuantisedModel, bytes]:
        """The largest artifact found under the cap; `points` are what passes showed so far."""
        target, best = cap * (1 - TOLERANCE / 2), None
        slope = -sum(p.numel() for p in model.stacks().values()) / 8
        for _ in range(MOST_PASSES):
            sizes = {p.at: p.total_bytes for p in points}
            at = (golf.next_factor(sizes, target, slope) if points else
                  self.first_factor(model, target, slope))
            quantised, seconds = self.solve(model, at)
            begin = time.perf_counter()
            blob = golf.encode_artifact(quantised, model.config, self.checkpoint.plan)
            total = CODE_BYTES + len(blob)
            points.append(Point(at, total, seconds, time.perf_counter() - begin))
            if total <= cap and (best is None or total > best[0].total_bytes):
                best = points[-1], quantised, blob
            if cap * (1 - TOLERANCE) <= total <= cap:
                break
        if best is None:
            raise golf.ArtifactError(f"nothing under {cap:,} bytes in {MOST_PASSES} passes")
        return best

    def add_row(self, method: str, cap: int, point: Point, quantised: golf.QuantisedModel,
                blob: bytes) -> None:
        """Scores an artifact, decodes the first of a method, and writes the row."""
        parts = {"solve": point.solve_seconds, "encode": point.encode_seconds}
        if all(row["method"] != method for row in self.content["rows"]):
            begin = time.perf_counter()
            config = replace(self.checkpoint.config, compressor=METHODS[method][1])
            _, quantised = golf.decode_artifact(blob, config)
            parts["decode"] = time.perf_counter() - begin
        with self.lock:
            golf.restore_weights(self.scorer.model, quantised)
            bits, parts["score"] = self.score()
            row = {"method": method, "total_bytes": point.total_bytes,
                   "gap_bpb": bits - self.content["bpb_before"],
                   "checkpoint_run_id": self.checkpoint.run_id, "cap_bytes": cap, "bpb": bits,
                   "step_factor": round(2**point.at, 6), "model_bytes": len(blob),
                   "order0_bytes": order0_bytes(quantised),
                   **{f"seconds_{name}": round(seconds, 3) for name, seconds in parts.items()}}
            self.content["rows"] = sorted(
                [*self.content["rows"], row],
                key=lambda r: (r["cap_bytes"], [*METHODS].index(r["method"])))
            golf.write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())
        print(f"{method:<16}{point.total_bytes:>12,} bytes  gap {row['gap_bpb']:.6f}  "
              f"steps x{row['step_factor']:.4f}", flush=True)


def table(content: dict) -> str:
    """Gaps by cap and method, and each one's share of the reference."""
    lines = [f"{'cap':>12}" + "".join(f"{method:>26}" for method in METHODS)]
    for cap in sorted({row["cap_bytes"] for row in content["rows"]}):
        gaps = {r["method"]: r["gap_bpb"] for r in content["rows"] if r["cap_bytes"] == cap}
        cells = []
        for method in METHODS:
            share = gaps.get(method, 0.0) / gaps["reference"] if gaps.get("reference") else 0.0
            text = f"{gaps[method]:.6f} ({share:.2f}x)" if method in gaps else "-"
            cells.append(f"{text:>26}")
        lines.append(f"{cap:>12,}" + "".join(cells))
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, metavar="FILE",
                        help="a checkpoint.pt of an earlier call, instead of training")
    parser.add_argument("--whole-run", action="store_true",
                        help="train_gpt.py's whole run with its evaluations, then the curve")
    parser.add_argument("--train-only", action="store_true", help="stop at the checkpoint")
    parser.add_argument("--caps", type=integers, metavar="BYTES",
                        default="10000000,12000000,14000000,16000000",
                        help="of program and model, separated by commas (default %(default)s)")
    parser.add_argument("--methods", default="reference,coder,rate_distortion", metavar="NAMES",
                        help=f"some of {','.join(METHODS)} (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="default quantiser_curve.json in LOG_DIR")
    options = parser.parse_args(arguments)
    options.methods = options.methods.split(",")
    if set(options.methods) - set(METHODS):
        parser.error(f"--methods: some of {', '.join(METHODS)}")
    if min(options.caps) < 1:
        parser.error(f"--caps {min(options.caps)} must be at least 1")
    if options.weights and (options.whole_run or options.train_only):
        parser.error("--weights is instead of training")
    return options


def main(arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """Trains or loads, measures, prints the table; the exit status.

    Raises: GolfError, RunError, OSError.
    """
    options = parse_arguments(arguments)
    out = options.out or Path(golf.Config.from_env(env).log_dir) / "quantiser_curve.json"
    if not options.train_only:
        earlier_rows(out, {})  # or its error, before anything is trained
    path = options.weights or train(env, whole=options.whole_run)
    if options.train_only:
        return 0
    begin, world = time.perf_counter(), golf.World.from_env(env)
    torch.set_float32_matmul_precision("highest")  # as the trainer solves
    checkpoint = load(path, env, world.device)
    # A thread per method: while one encodes, another has the device.
    with world.process_group(), ThreadPoolExecutor(len(options.methods)) as pool:
        curve = Curve(checkpoint, out, world)
        tasks = [pool.submit(curve.measure, method, options.caps) for method in options.methods]
    print(table(curve.content))
    print(f"{out}: {len(curve.content['rows'])} rows in {time.perf_counter() - begin:.1f}s")
    failures = [str(task.exception()) for task in tasks if task.exception()]
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(exit_status(main, golf.GolfError))
