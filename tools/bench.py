#!/usr/bin/env python3
"""Times every part of a run on this machine, beside the least time that the machine would need.

    PRESET=pr1493 python tools/bench.py                     everything; one GPU, a few minutes
    PRESET=demo python tools/bench.py --quick               fewer repetitions and, on a CPU, tokens
    PRESET=pr1493 python tools/bench.py --only training --profile logs/profile.txt
    python tools/bench.py --quick --only documents          test-time training alone, no ceilings

Settings come from the environment, as for train_gpt.py. Tokens are those of the configured dataset
where it is there, else random (the output says which). Times are medians: of device events on a
GPU, of the wall clock on a CPU; what is compiled is warm, unless a row says otherwise.

A floor is what the work itself would take: matrix products and attention at the rates measured on
this machine at the model's own shapes, or the bytes that must move at the measured copy rate.
MFU counts the operations of the configuration against the GPU's data sheet, or, for a GPU that is
not listed, against its fastest measured product.

Writes LOG_DIR/bench_<gpu>_<date>.json. Exit status: 0 done, 1 it could not run, 2 bad arguments.
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
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as golf
from tools.command import exit_status, last_error
from tools.prepare_data import write_shard

# Dense bf16 operations a second, from the data sheets.
PEAK_RATES = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 25}
PARTS = ("startup", "training", "quantisation", "evaluation", "documents")
RANDOM_TOKENS = 4_000_000


class Timer:
    """Medians of repeated timings on one device, in seconds."""

    def __init__(self, device: torch.device, repeats: int = 10, warmups: int = 3) -> None:
        self.device, self.repeats, self.warmups = device, repeats, warmups

    def median(self, function: Callable[[], object]) -> float:
        """Median seconds of one call, after warm-up calls."""
        for _ in range(self.warmups):
            function()
        if self.device.type != "cuda":
            return statistics.median(self.once(function) for _ in range(self.repeats))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.repeats + 1)]
        for mark in marks[:-1]:
            mark.record()
            function()
        marks[-1].record()
        marks[-1].synchronize()
        return statistics.median(a.elapsed_time(b) / 1e3
                                 for a, b in itertools.pairwise(marks))

    def once(self, function: Callable[[], object]) -> float:
        """Wall-clock seconds of one call, its work on the device included."""
        self.synchronize()
        begin = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# ==================================================================================================
# Ceilings
# ==================================================================================================


class Product(NamedTuple):
    """Seconds of the three matrix products of one linear layer on a micro-step, and their size."""

    forward: float
    input_gradient: float
    weight_gradient: float
    operations: float  # of each of the three

    @property
    def total(self) -> float:
        """Seconds forward and backward."""
        return self.forward + self.input_gradient + self.weight_gradient


class Ceilings(NamedTuple):
    """What this machine reaches at the model's shapes."""

    copy: float  # bytes a second, read and written
    products: dict[str, Product]  # by site
    attention: dict[str, tuple[float, float]]  # seconds forward and backward, by back-end

    @property
    def best_rate(self) -> float:
        """Operations a second of the fastest product."""
        return max(p.operations / min(p[:3]) for p in self.products.values())

    @property
    def best_attention(self) -> tuple[float, float]:
        """Seconds forward and backward of the fastest back-end."""
        return min(self.attention.values(), key=sum)


def copy_rate(timer: Timer) -> float:
    """Bytes a second of a copy on the device, read and written ones counted."""
    source = torch.ones(COPY_BYTES[timer.device.type], dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timer.median(lambda: target.copy_(source))


def layer_shapes(config: golf.Config) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer, by site."""
    D, hidden = config.model_dim, config.mlp_dim
    return {"qkv": (D + 2 * config.kv_dim, D), "out": (D, D), "up": (hidden, D),
            "down": (D, hidden), "head": (config.vocab_size, D)}


def measure_product(timer: Timer, rows: int, outputs: int, inputs: int) -> Product:
    """The three products of one layer, in the compute type, on random values."""
    dtype = golf.compute_dtype(timer.device)
    x, w, dy = (torch.randn(shape, device=timer.device, dtype=dtype)
                for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    return Product(timer.median(lambda: F.linear(x, w)), timer.median(lambda: dy @ w),
                   timer.median(lambda: dy.T @ x), 2.0 * rows * outputs * inputs)


def measure_attention(timer: Timer, config: golf.Config, name: str) -> tuple[float, float]:
    """Seconds forward and backward on a micro-step. Raises: ConfigError where it cannot run."""
    attend = golf.choose_attention(name, timer.device).attend
    sequences = golf.batch_shape(config, 1).sequences
    q, k, v = (torch.randn(sequences, config.train_seq_len, heads, config.head_dim,
                           device=timer.device, dtype=golf.compute_dtype(timer.device),
                           requires_grad=True)
               for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads))
    y = attend(q, k, v)
    dy = torch.randn_like(y)
    forward = timer.median(lambda: attend(q, k, v))
    return forward, timer.median(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True))


def measure_ceilings(config: golf.Config, timer: Timer) -> tuple[Ceilings, dict[str, str]]:
    """Rates of this machine, and why some attention back-ends are not among them."""
    rows = micro_tokens(config)
    products = {site: measure_product(timer, rows, *shape)
                for site, shape in layer_shapes(config).items()}
    attention, missing = {}, {}
    # The plain back-end writes whole score matrices: on a GPU it is no ceiling.
    names = ("fa3", "cudnn", "flash") if timer.device.type == "cuda" else ("math",)
    for name in names:
        try:
            attention[name] = measure_attention(timer, config, name)
        except golf.ConfigError as problem:
            missing[name] = str(problem)
    if not attention:
        attention["math"] = measure_attention(timer, config, "math")
    return Ceilings(copy_rate(timer), products, attention), missing


def micro_tokens(config: golf.Config) -> int:
    """Tokens of one micro-step at world size 1."""
    return golf.batch_shape(config, 1).sequences * config.train_seq_len


def forward_floor(ceilings: Ceilings, visits: int) -> float:
    """Seconds of all products and attentions of a forward pass over one micro-step."""
    layer = sum(p.forward for site, p in ceilings.products.items() if site != "head")
    return visits * (layer + ceilings.best_attention[0]) + ceilings.products["head"].forward


def micro_floor(ceilings: Ceilings, visits: int) -> float:
    """The same forward and backward."""
    layer = sum(p.total for site, p in ceilings.products.items() if site != "head")
    return visits * (layer + sum(ceilings.best_attention)) + ceilings.products["head"].total


def attention_operations(config: golf.Config) -> float:
    """Operations of one token in one causal attention, forward."""
    return 2.0 * config.train_seq_len * config.model_dim


def newton_schulz_operations(config: golf.Config) -> float:
    """Operations of one orthogonalisation of all matrices."""
    heads, total = config.model_dim, 0.0
    shapes = [(heads, heads), (config.kv_dim, heads), (config.kv_dim, heads), (heads, heads),
              (config.mlp_dim, heads), (heads, config.mlp_dim)]
    for shape in shapes:
        short, long = sorted(shape)
        total += 4.0 * short * short * long + 2.0 * short**3
    return total * config.num_layers * config.muon_backend_steps


# ==================================================================================================
# Material: tokens, a trainer, a validation stream
# ==================================================================================================


def with_tokens(config: golf.Config, folder: Path) -> tuple[golf.Config, str]:
    """Settings whose dataset exists, and what it is: the configured one, or random tokens."""
    try:
        golf.find_shards(config.dataset_dir, "train")
        golf.ValStream.load(config)
        return config, config.dataset_dir.name
    except golf.DataError:
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            tokens = rng.integers(0, config.vocab_size, RANDOM_TOKENS, dtype=np.uint16)
            write_shard(folder / f"random_{split}_000000.bin", tokens)
        return replace(config, data_path=str(folder)), "random tokens"


def validation_stream(config: golf.Config, num_targets: int, data: str) -> golf.ValStream:
    """The first targets of the validation tokens; of random ones each counts one byte."""
    size = config.vocab_size
    table = golf.TokenBytes(np.ones(size, np.int16), np.zeros(size, bool), np.zeros(size, bool))
    if data != "random tokens":
        table = golf.token_bytes(golf.load_tokenizer(config.tokenizer_file, size))
    shard = golf.read_shard(golf.find_shards(config.dataset_dir, "val")[0], size)
    return golf.ValStream(shard[:num_targets + 1], table, config.eval_seq_len)


def silent_log(config: golf.Config) -> golf.RunLog:
    """A log that writes nothing, as ranks other than 0 have it."""
    return golf.RunLog(config, golf.World(rank=1, size=2))


def quick_sizes(config: golf.Config) -> golf.Config:
    """The same model on so few tokens that a CPU is done in half a minute; rates hardly change."""
    tokens = 8 * config.train_seq_len
    return replace(config, train_batch_tokens=min(config.train_batch_tokens, tokens),
                   micro_batch_tokens=min(config.micro_batch_tokens, tokens),
                   val_batch_tokens=min(config.val_batch_tokens, 64 * config.eval_seq_len),
                   ttt_chunk_tokens=min(config.ttt_chunk_tokens, 4 * config.eval_seq_len),
                   gptq_calibration_batches=min(config.gptq_calibration_batches, 2))


# ==================================================================================================
# The bench
# ==================================================================================================


class Row(NamedTuple):
    """One figure; the floor is in the same unit."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    ratio_to_floor: float | None = None
    mfu: float | None = None


class Bench:
    """Figures of one machine and configuration, as they come in."""

    def __init__(self, config: golf.Config, world: golf.World, data: str, *, quick: bool,
                 ceilings: bool = True) -> None:
        self.config, self.world, self.data, self.quick = config, world, data, quick
        self.timer = Timer(world.device, *((3, 1) if quick else (10, 3)))
        self.rows: list[Row] = []
        facts = golf.environment_facts(world)
        hardware = golf.typing.cast("dict[str, str]", facts["hardware"])
        self.gpu = hardware["gpu"] if world.is_cuda else "cpu"
        self.result: dict[str, object] = {
            "gpu": self.gpu, "versions": facts["versions"], "hardware": hardware,
            "preset": config.preset, "differs": config.differs(), "compile": config.compile,
            "config_hash": config.config_hash, "data": data,
            "tokens_per_micro_step": micro_tokens(config)}
        if ceilings:
            self.ceilings, self.result["attention_missing"] = measure_ceilings(config, self.timer)
        # Last, because the back-ends of PyTorch are chosen by flags of the process.
        self.backend = golf.choose_attention(config.attention, world.device)
        self.result["attention_backend"] = self.backend.name
        if ceilings:
            self.add_ceilings()

    @property
    def peak_rate(self) -> float:
        """Operations a second to count MFU against."""
        return next((rate for name, rate in PEAK_RATES.items() if name in self.gpu),
                    self.ceilings.best_rate)

    def add(self, name: str, seconds: float, floor: float | None = None,
            operations: float | None = None) -> None:
        """A row in milliseconds."""
        ratio = seconds / floor if floor else None
        mfu = operations / seconds / self.peak_rate if operations else None
        self.rows.append(Row(name, 1e3 * seconds, "ms", 1e3 * floor if floor else None, ratio, mfu))

    def add_rate(self, name: str, value: float, unit: str, ceiling: float | None = None) -> None:
        """A row in something per second, whose floor is the highest rate possible."""
        ratio = ceiling / value if ceiling else None
        self.rows.append(Row(name, value, unit, ceiling, ratio))

    def add_ceilings(self) -> None:
        """Rows for what the machine reaches."""
        self.add_rate("copy", self.ceilings.copy / 1e9, "GB/s")
        for site, product in self.ceilings.products.items():
            for what, seconds in zip(("forward", "input gradient", "weight gradient"), product[:3],
                                     strict=True):
                self.add_rate(f"product {site} {what}", product.operations / seconds / 1e12,
                              "TFLOP/s")
        forward = attention_operations(self.config) * micro_tokens(self.config)
        for name, pair in self.ceilings.attention.items():
            for what, seconds, share in zip(("forward", "backward"), pair, (1.0, 2.5), strict=True):
                self.add(f"attention {name} {what}", seconds, operations=share * forward)

    # ---------------------------------------------------------------------------------- training

    def trainer(self) -> golf.Trainer:
        """A trainer after its warm-up: every plan is compiled."""
        trainer = golf.Trainer(self.config, self.world, silent_log(self.config),
                               self.backend.attend)
        self.add("warm_up", self.timer.once(trainer.warm_up))
        return trainer

    def time_training(self, trainer: golf.Trainer) -> None:
        """Micro-steps per plan, loader, optimizer step and average."""
        config, timer, tokens = self.config, self.timer, micro_tokens(self.config)
        stream = golf.batch_stream(trainer.loader, trainer.shape, self.world)
        batches = next(stream)
        stream.close()
        if self.world.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        for plan in golf.depth_plans(config):
            visits = len(plan.visits)
            operations = golf.flops_per_token(config, plan) * tokens
            whole_floor = micro_floor(self.ceilings, visits)
            first_floor = forward_floor(self.ceilings, visits)
            rows = batches[0]
            forward = timer.median(lambda plan=plan, rows=rows:  # type: ignore[misc]
                                   trainer.model(rows[:, :-1], rows[:, 1:], plan).mean())
            whole = timer.median(lambda plan=plan, rows=rows:  # type: ignore[misc]
                                 trainer.forward_backward(plan, [rows]))
            self.add(f"{plan.name} forward", forward, first_floor)
            self.add(f"{plan.name} backward", whole - forward, whole_floor - first_floor)
            self.add(f"{plan.name} micro-step", whole, whole_floor, operations)
            self.add_rate(f"{plan.name} tok/s", tokens / whole, "tok/s", tokens / whole_floor)
            self.result[f"micro_tok_s_{plan.name}"] = round(tokens / whole)
        if self.world.is_cuda:
            self.result["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        self.time_step(trainer)
        self.time_loader(trainer)

    def time_step(self, trainer: golf.Trainer) -> None:
        """What a step costs beside its micro-steps: clip, Muon, AdamW and average."""
        model, copy = trainer.model, self.ceilings.copy
        gradients = [torch.randn_like(p) * 1e-3 for p in model.parameters()]

        def step() -> None:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            trainer.optimizer.step(0, 0.0)

        total = sum(p.numel() for p in model.parameters())
        matrices = sum(m.parameter[:, m.rows].numel() for m in model.matrices())
        # Muon: gradient and, read and written, momentum and weight. AdamW: one more moment.
        least_bytes = 4 * (5 * matrices + 7 * (total - matrices))
        operations = newton_schulz_operations(self.config)
        optimizer = self.timer.median(step)
        self.add("optimizer step", optimizer,
                 least_bytes / copy + operations / self.ceilings.best_rate)
        ema = self.timer.median(lambda: trainer.update_average(1 - self.config.ema_decay))
        self.add("average", ema, 12 * total / copy)
        self.result["step_overhead_ms"] = 1e3 * (optimizer + ema)

    def time_loader(self, trainer: golf.Trainer) -> None:
        """Reading one step's windows, which a thread does meanwhile."""
        count = self.config.train_batch_tokens // self.config.train_seq_len
        clock = Timer(torch.device("cpu"), self.timer.repeats, 1)
        seconds = clock.median(lambda: trainer.loader.read(0, count))
        self.add_rate("loader", self.config.train_batch_tokens / seconds, "tok/s")

    # ------------------------------------------------------------------------------ quantisation

    def time_quantisation(self, trainer: golf.Trainer, folder: Path) -> Path:
        """Hessians, solving, encoding and decoding; the artifact."""
        config, timer, model = self.config, self.timer, trainer.model
        plan = golf.depth_plans(config)[-1]
        rows = torch.from_numpy(trainer.loader.read(0, trainer.shape.sequences))
        rows = rows.to(self.world.device)
        hessians = golf.Hessians(model)
        batch = timer.median(lambda: golf.collect(hessians, rows, plan))
        shapes = layer_shapes(config)
        operations = micro_tokens(config) * 2.0 * (len(plan.visits) * sum(
            inputs**2 for site, (_, inputs) in shapes.items() if site != "head")
            + shapes["head"][1]**2)
        self.add("hessians of a batch", batch, forward_floor(self.ceilings, len(plan.visits))
                 + operations / self.ceilings.best_rate)
        batches = golf.calibration_share(config, self.world, trainer.shape)
        solved: list[golf.QuantisedModel] = []
        encoded: list[bytes] = []
        torch.set_float32_matmul_precision("highest")  # as the trainer solves
        solve = timer.once(lambda: solved.append(
            golf.quantise(model, hessians.moments, self.world)))
        torch.set_float32_matmul_precision("high")
        encode = timer.once(lambda: encoded.append(golf.encode_artifact(solved[0], config, plan)))
        decode = timer.once(lambda: golf.decode_artifact(encoded[0], config))
        self.add(f"hessians of all {batches} batches", batches * batch)
        for name, seconds in (("solve", solve), ("encode", encode), ("decode", decode)):
            self.add(name, seconds)
        self.result |= {"quantise_seconds": round(batches * batch + solve, 3),
                        "hessian_seconds": round(batches * batch, 3),
                        "solve_seconds": round(solve, 3), "encode_seconds": round(encode, 3),
                        "decode_seconds": round(decode, 3), "model_bytes": len(encoded[0])}
        path = folder / "artifact.bin"
        path.write_bytes(encoded[0])
        return path

    # -------------------------------------------------------------------------------- evaluation

    def time_evaluation(self, path: Path) -> None:
        """From the artifact to the first score, and the steady rates of the evaluations."""
        config, timer = self.config, self.timer
        size, rows = config.ttt_chunk_tokens, config.eval_rows
        chunks, batches = (2, 2) if self.quick else (4, 8)
        most = max(chunks * size, config.eval_seq_len + rows * batches * config.eval_stride)
        val = validation_stream(config, most, self.data)
        scorers: list[golf.Scorer] = []
        windows = golf.sliding_windows(val.num_targets, config.eval_seq_len, config.eval_stride)
        windows = windows.select(slice(1, 1 + rows * batches))

        def load() -> None:
            model, plan = golf.load_artifact(path, config, self.world, self.backend.attend)
            scorers.append(golf.Scorer(model, plan, val, self.world))
            scorers[0].score(windows.select(slice(0, rows)), golf.ScoreLedger(val, self.world))

        self.result["load_to_first_score_seconds"] = round(timer.once(load), 3)
        self.add("load to first score (compiles)",
                 golf.typing.cast(float, self.result["load_to_first_score_seconds"]))
        scored = int((windows.stops - windows.first_scored).sum())
        seconds = timer.once(lambda: scorers[0].score(windows, golf.ScoreLedger(val, self.world)))
        visits = len(scorers[0].plan.visits)
        per_token = forward_floor(self.ceilings, visits) / micro_tokens(config)
        ceiling = config.eval_stride / (per_token * config.eval_seq_len)
        self.result["sliding_tok_s"] = round(scored / seconds)
        self.add_rate("sliding", scored / seconds, "tok/s", ceiling)
        self.time_adaptation(scorers[0], chunks, ceiling)

    def time_adaptation(self, scorer: golf.Scorer, chunks: int, sliding_ceiling: float) -> None:
        """Scoring and learning, chunk by chunk; changes the scorer's weights."""
        config, size = self.config, self.config.ttt_chunk_tokens

        def adapt(count: int) -> None:
            stream = validation_stream(config, count * size, self.data)
            windows = golf.sliding_windows(stream.num_targets, config.eval_seq_len,
                                           config.eval_stride)
            golf.evaluate_adapting(golf.Scorer(scorer.model, scorer.plan, stream, self.world),
                                   windows)

        few, many = 1 + chunks // 2, 1 + chunks
        if config.compile:
            adapt(few)
        # The last chunk is not learned from: the difference is whole chunks, scored and learned.
        short, long = (self.timer.once(lambda n=n: adapt(n))  # type: ignore[misc]
                       for n in (few, many))
        seconds = (long - short) / (many - few)
        learning = config.ttt_epochs * size * micro_floor(
            self.ceilings, len(scorer.plan.visits)) / micro_tokens(config)
        if seconds > 0:
            self.result["ttt_sgd_tok_s"] = round(size / seconds)
            self.add_rate("test-time training", size / seconds, "tok/s",
                          size / (size / sliding_ceiling + learning))

    # --------------------------------------------------------------------------------- documents

    def time_documents(self) -> None:
        """Adapting by document at the official lengths: start-up, rates, projection, audit."""
        config, world, samples = self.config, self.world, document_samples(self.config)
        if self.quick and not world.is_cuda:
            samples = {name: lengths[:1] // 64 + 1 for name, lengths in samples.items()}
        if world.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        graphs, begin = compiled_graphs(), time.perf_counter()
        model, plan = self.any_model()
        some = synthetic_stream(config, samples["middle"][:config.ttt_batch_size])
        own = golf.project_documents(golf.Scorer(model, plan, some, world))
        startup = time.perf_counter() - begin
        started = compiled_graphs()
        golf.evaluate_documents(golf.Scorer(model, plan, some, world))  # libraries meet all widths
        passes, widths, seconds = [], [], []
        for name, lengths in samples.items():
            scorer = golf.Scorer(model, plan, synthetic_stream(config, lengths), world)
            seconds.append(golf.evaluate_documents(scorer).seconds)
            count, width = pass_costs(config, lengths).sum(0)
            passes.append(count)
            widths.append(width)
            self.add_rate(f"documents {name} ({count:.0f} passes)", lengths.sum() / seconds[-1],
                          "tok/s")
        per_pass, per_position = fit_seconds(np.array(passes), np.array(widths), np.array(seconds))
        official = pass_costs(config, golf.official_lengths())
        owners = golf.share_out(official[:, 1].tolist(), golf.RECORD_RANKS)
        slowest = float(np.bincount(owners, official @ [per_pass, per_position]).max())
        rate = golf.official_lengths().sum() / golf.RECORD_RANKS / slowest
        scorer = golf.Scorer(model, plan, synthetic_stream(config, samples["middle"]), world,
                             golf.Audit())
        audited = golf.evaluate_documents(scorer).seconds / seconds[list(samples).index("middle")]
        self.add_rate("documents official, slowest of 8", rate, "tok/s")
        self.add("documents pass of the longest width", per_pass
                 + per_position * config.eval_seq_len)
        self.add("documents start-up (compiles)", startup)
        self.result |= {
            "ttt_documents_tok_s": round(rate), "ttt_documents_startup_seconds": round(startup, 2),
            "projected_full_eval_seconds_8gpu": round(startup + slowest, 1),
            "projected_by_the_run_seconds_8gpu": round(startup + own, 1),
            "ttt_documents_graphs": started - graphs,
            "ttt_documents_recompiles": compiled_graphs() - started,
            "audit_overhead_percent": round(100 * (audited - 1), 2)}
        if world.is_cuda:
            self.result["ttt_documents_peak_mib"] = torch.cuda.max_memory_allocated() >> 20

    def any_model(self) -> tuple[golf.GPT, golf.DepthPlan]:
        """The model of EVAL_ONLY, or an untrained one, with the plan that it ends with."""
        config, device, attend = self.config, self.world.device, self.backend.attend
        if config.eval_only:
            return golf.load_artifact(Path(config.eval_only), config, self.world, attend)
        model = golf.GPT(config, attend, golf.compute_dtype(device)).to(device)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.data, std=0.02)
        return model, golf.depth_plans(config)[-1]

    # ------------------------------------------------------------------------------------ output

    def table(self) -> str:
        """All rows as text."""
        lines = [f"{self.gpu} | PRESET={self.config.preset} | {micro_tokens(self.config):,} tokens "
                 f"a micro-step | {self.data} | attention {self.backend.name}"]
        for plan in golf.depth_plans(self.config):
            operations = golf.flops_per_token(self.config, plan)
            lines.append(f"plan {plan.name}: {len(plan.visits)} visits, {operations / 1e6:.1f} "
                         f"MFLOP per token, {operations * micro_tokens(self.config) / 1e12:.2f} "
                         "TFLOP per micro-step")
        lines.append(f"{'what':<34}{'value':>14}{'unit':>9}{'floor':>14}{'/floor':>8}{'MFU':>8}")
        for row in self.rows:
            floor = f"{row.floor:,.3f}" if row.floor else "-"
            ratio = f"{row.ratio_to_floor:.2f}" if row.ratio_to_floor else "-"
            mfu = f"{100 * row.mfu:.1f}%" if row.mfu else "-"
            lines.append(f"{row.name:<34}{row.value:>14,.3f}{row.unit:>9}{floor:>14}{ratio:>8}"
                         f"{mfu:>8}")
        return "\n".join(lines)

    def save(self, folder: Path) -> Path:
        """Writes the result and returns where."""
        self.result["rows"] = [row._asdict() for row in self.rows]
        return write_new(folder, f"bench_{self.gpu}", self.result)


def write_new(folder: Path, what: str, result: dict[str, object]) -> Path:
    """Writes a result under a name of today and returns where; an earlier file stays."""
    name = f"{what.lower().replace(' ', '-')}_{time.strftime('%Y-%m-%d')}"
    path, number = folder / f"{name}.json", 2
    while path.exists():
        path, number = folder / f"{name}-{number}.json", number + 1
    folder.mkdir(parents=True, exist_ok=True)
    golf.write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    return path


# ==================================================================================================
# Documents of the official lengths
# ==================================================================================================


def document_samples(config: golf.Config) -> dict[str, np.ndarray]:
    """Lengths of some batches of documents: short and middle ones, and what fills the longest.

    The longest are cut where their passes are as wide, and their chunks as long, as they get.
    """
    rows, lengths = config.ttt_batch_size, np.sort(golf.official_lengths())
    return {"short": lengths[len(lengths) // 4:][:16 * rows],
            "middle": lengths[len(lengths) * 4 // 5:][:8 * rows],
            "longest": np.full(rows, 20_000)}


def synthetic_stream(config: golf.Config, lengths: np.ndarray) -> golf.ValStream:
    """Random tokens in documents of these lengths; every target counts one byte."""
    size, rng = config.vocab_size, np.random.default_rng(0)
    tokens = rng.integers(golf.BOS_ID + 1, size, int(lengths.sum()) + 1, dtype=np.uint16)
    tokens[np.cumsum(lengths) - lengths] = golf.BOS_ID
    table = golf.TokenBytes(np.ones(size, np.int16), np.zeros(size, bool), np.zeros(size, bool))
    return golf.ValStream(tokens, table, min(config.eval_seq_len, len(tokens) - 1), True)


def pass_costs(config: golf.Config, lengths: np.ndarray) -> np.ndarray:
    """For every batch of documents of these lengths, its passes and the sum of their widths."""
    stops = np.cumsum(lengths)
    groups = golf.document_passes(stops - lengths, stops, config)
    return np.array([(len(passes), sum(width for _, width in passes)) for passes in groups], float)


def fit_seconds(passes: np.ndarray, widths: np.ndarray, seconds: np.ndarray
                ) -> tuple[float, float]:
    """Seconds of a pass and of each position of its width, by least relative squares, not below 0.

    Example: 10 passes of 100 and 5 of 400 in 3 s and 4.5 s -> 0.1 s and 0.002 s
    """
    columns = np.array([passes, widths]).T / seconds[:, None]
    constant, slope = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)[0]
    if min(constant, slope) < 0:
        return 0.0, float(seconds.sum() / widths.sum())
    return float(constant), float(slope)


def compiled_graphs() -> int:
    """Graphs that the compiler has built in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ==================================================================================================
# Start-up and profile
# ==================================================================================================


def reach_first_step(config: golf.Config, world: golf.World) -> None:
    """Everything that a run does before its clock starts."""
    backend = golf.choose_attention(config.attention, world.device)
    golf.Trainer(config, world, silent_log(config), backend.attend).warm_up()


def measure_startup(config: golf.Config, cache: Path) -> dict[str, float]:
    """Seconds from starting a process to its first timed step: caches empty, then filled."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
           "TRITON_CACHE_DIR": str(cache / "triton"), "DATA_PATH": str(config.dataset_dir)}
    command = [sys.executable, str(Path(__file__).resolve()), "--first-step"]
    seconds = {}
    for name in ("startup_cold_seconds", "startup_warm_seconds"):
        begin = time.time()
        answer = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise golf.GolfError(f"start-up failed: {last_error(answer.stderr)}")
        seconds[name] = round(float(answer.stdout.split()[-1]) - begin, 2)
    return seconds


# In this order: attention kernels may be named after the products inside them.
GROUPS = (
    ("attention", ("flash", "fmha", "attention", "sdpa", "_bwd_postprocess", "_bwd_preprocess")),
    ("products", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "::mm", "addmm", "bmm")),
    ("reductions (triton)", ("triton_red", "triton_per")),
    ("elementwise (triton)", ("triton_",)),
    ("copies", ("memcpy", "memset", "copy", "::to", "fill")),
)


def group_of(kernel: str) -> str:
    """The kind of work of a kernel or operator, by its name."""
    name = kernel.lower()
    return next((group for group, marks in GROUPS if any(mark in name for mark in marks)), "other")


def profile_plan(trainer: golf.Trainer, plan: golf.DepthPlan, batches: Sequence[Tensor],
                 steps: int) -> str:
    """Where the device's time goes in a micro-step: by group, then by kernel."""
    on_gpu = trainer.world.is_cuda
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            trainer.forward_backward(plan, batches)
        trainer.world.synchronize()
    times: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if on_gpu == (event.device_type == torch.autograd.DeviceType.CUDA):
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[event.key] = (spent / 1e3 / steps, event.count // steps)
    total = sum(ms for ms, _ in times.values())
    groups: dict[str, tuple[float, int]] = {}
    for name, (ms, count) in times.items():
        before, calls = groups.get(group_of(name), (0.0, 0))
        groups[group_of(name)] = (before + ms, calls + count)
    lines = [f"== {plan.name}: {total:.2f} ms of device time a micro-step"]
    for table in (groups, times):
        ordered = sorted(table.items(), key=lambda item: -item[1][0])
        lines += [f"{ms:>10.3f} ms {100 * ms / max(total, 1e-9):>5.1f}% {count:>5} x  {name[:150]}"
                  for name, (ms, count) in ordered[:60] if ms > 0]
        lines.append("")
    for parameter in trainer.model.parameters():
        parameter.grad = None
    return "\n".join(lines)


def write_profile(trainer: golf.Trainer, path: Path, *, quick: bool) -> None:
    """Profiles of all plans, into one file; prints the groups."""
    rows = torch.from_numpy(trainer.loader.read(0, trainer.shape.sequences))
    batches = [rows.to(trainer.world.device)]
    texts = [profile_plan(trainer, plan, batches, 1 if quick else 3)
             for plan in golf.depth_plans(trainer.config)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts))
    print("\n".join(text.split("\n\n")[0] for text in texts))


# ==================================================================================================
# Command line
# ==================================================================================================


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true",
                        help="fewer repetitions, no start-up figures; on a CPU fewer tokens")
    parser.add_argument("--only", default="", metavar="PARTS",
                        help=f"parts, separated by commas: {', '.join(PARTS)}; default: all")
    parser.add_argument("--profile", type=Path, metavar="FILE",
                        help="write a profile of a micro-step of every plan")
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = set(filter(None, options.only.split(","))) or set(PARTS)
    if options.parts - set(PARTS):
        parser.error(f"--only {options.only}: parts are {', '.join(PARTS)}")
    if options.quick and "startup" in options.only.split(","):
        parser.error(f"--only {options.only}: --quick takes no start-up figures")
    if options.profile and options.parts <= {"documents", "startup"}:
        parser.error(f"--profile {options.profile}: --only {options.only} trains nothing")
    return options


def run_parts(bench: Bench, options: argparse.Namespace, folder: Path) -> None:
    """The parts asked for; quantisation needs a trainer, evaluation an artifact."""
    if "documents" in options.parts:
        bench.time_documents()
    if options.parts <= {"documents", "startup"}:
        return
    trainer = bench.trainer()
    if "training" in options.parts:
        bench.time_training(trainer)
    if options.profile:
        write_profile(trainer, options.profile, quick=options.quick)
    if options.parts & {"quantisation", "evaluation"}:
        path = bench.time_quantisation(trainer, folder)
        del trainer
        if "evaluation" in options.parts:
            bench.time_evaluation(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and writes the file; the exit status."""
    options = parse_arguments(arguments)
    config = golf.Config.from_env(os.environ)
    Path(config.log_dir).mkdir(parents=True, exist_ok=True)  # or its error, before minutes of work
    world = golf.World.from_env({})
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as name, world.process_group():
        folder = Path(name)
        if options.first_step:
            reach_first_step(config, world)
            print(time.time())
            return 0
        config, data = with_tokens(config, folder)
        if options.quick and not world.is_cuda:
            config = quick_sizes(config)
        startup: dict[str, float] = {}
        if "startup" in options.parts and not options.quick:
            startup = measure_startup(config, folder / "cache")
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache" / "inductor")
            os.environ["TRITON_CACHE_DIR"] = str(folder / "cache" / "triton")
        bench = Bench(config, world, data, quick=options.quick,
                      ceilings=options.parts != {"documents"})
        bench.result |= startup
        for what, seconds in startup.items():
            bench.add(what.removesuffix("_seconds").replace("_", " "), seconds)
        try:
            run_parts(bench, options, folder)
        finally:  # an error does not take with it what was measured before
            print(bench.table())
            print(f"result: {bench.save(Path(config.log_dir))}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, golf.GolfError))
