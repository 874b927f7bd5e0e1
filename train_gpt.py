"""Train, compress and score a small language model: the best that fits in 16,000,000 bytes.

One file is the whole system. It trains a depth-recurrent transformer within a time budget,
quantises it with second-order information, packs it into one flat file, reloads that file, and
scores held-out text in bits per byte (BPB), with and without test-time training.

    make run                                                     the whole story on a laptop
    torchrun --standalone --nproc_per_node=8 train_gpt.py        a run on eight GPUs
    EVAL_ONLY=runs/<run_id>/artifact.bin python train_gpt.py     score an existing artifact
    python train_gpt.py pack OUT                                 write the program whose bytes count

Settings are environment variables; PRINT_CONFIG=1 shows them and what they build. Sections, in the
order the data flows: 1 Config, 2 Runtime, 3 Data, 4 Model, 5 Optimizer, 6 Training,
7 Quantisation, 8 Artifact, 9 Evaluation, 10 Test-time training, 11 Main, 12 Kernels.
"""

from __future__ import annotations

import ast
import bz2
import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import signal
import sys
import time
import typing
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # PyTorch for CPUs comes without
    triton = None

# ====  1  Config  =================================================================================
# Enters: environment variables named like fields. Leaves: one frozen `Config`, checked. A preset is
# a table of differences from the defaults. A misspelt setting is an error: it costs a paid run.

class GolfError(Exception):
    """An error to act on: the message names the variable or file, the value and the bound."""
class ConfigError(GolfError):
    """A setting is unknown, malformed, out of range, or contradicts another one."""
class DataError(GolfError):
    """A shard, tokenizer or token stream is not what it has to be."""
class ArtifactError(GolfError):
    """An artifact is damaged, foreign, or larger than allowed."""
class LegalityError(GolfError):
    """A score or a clock would break the rules of the competition."""

def require(holds: object, name: str, value: object, bound: object) -> None:
    """Raises ConfigError with what the setting has to be, unless that holds."""
    if not holds:
        raise ConfigError(f"{name.upper()}={value} must be {bound}")

def within(default: float | str, low: float, high: float) -> Any:
    """A setting with its range, both ends included; of text, that of all numbers in it."""
    return field(default=default, metadata={"range": (low, high)})

@dataclass(frozen=True, slots=True)
class Config:
    """Every setting of a run, under the names that the competition published, in lower case."""
    # Run
    preset: str = "record"
    track: Literal["auto", "10min_16mb", "non_record"] = "auto"
    seed: int = within(1337, 0, 2**32 - 1)  # initialisation and data order
    run_id: str = ""  # default: preset, seed and UTC time
    log_dir: str = "logs"
    run_dir: str = "runs"
    print_config: bool = False
    eval_only: str = ""  # path of an artifact; skips training
    resume: str = ""  # path of a checkpoint of RUN_ID, or auto: the newest if there is one
    checkpoint_every: float = within(0.0, 0, 10**7)  # seconds; 0: only when a signal ends training
    rank_timeout_seconds: float = within(900.0, 1, 10**7)  # for which a rank waits for the others
    audit: bool = False  # checks sampled scores live and refuses a headline that fails
    attention: Literal["auto", "fa3", "cudnn", "flash", "math"] = "auto"
    compile: bool = True
    # Data
    data_dir: str = "./data"  # holds datasets/ and tokenizers/
    data_path: str = ""  # folder of the shards; default: by vocab_size under data_dir
    tokenizer_path: str = ""  # SentencePiece model; default: likewise
    vocab_size: int = within(8192, 8, 65_535)
    train_seq_len: int = within(2048, 8, 2**20)  # tokens per training window
    train_context: str = "0.35:512,0.7:1024"  # progress:tokens,...; until then rows are shorter
    train_batch_tokens: int = within(786_432, 8, 2**30)  # per optimizer step, all ranks
    micro_batch_tokens: int = within(98_304, 8, 2**20)  # most in one forward pass of one rank
    train_order: Literal["shuffled", "coprime", "sequential"] = "shuffled"  # of windows
    # Model
    num_layers: int = within(11, 2, 256)  # physical blocks
    model_dim: int = within(512, 8, 16_384)
    num_heads: int = within(8, 1, 256)
    num_kv_heads: int = within(4, 1, 256)
    mlp_mult: float = within(4.0, 0.1, 32)
    rope_base: float = within(10_000.0, 1, 10**7)
    rope_dims: int = within(16, 0, 1024)  # rotated dimensions of each head; 0: all
    qk_gain_init: float = within(5.25, 0.01, 100)
    ln_scale: bool = True  # norm outputs are divided by sqrt(block + 1)
    xsa_last_n: int = within(11, 0, 256)  # last blocks, or with CROSS_REPEAT visits, so attending
    residual: Literal["parallel", "two_lane_drop", "two_lane_attn", "two_lane_both"] = "parallel"
    parallel_residual_start: int = within(7, -1, 256)  # -1: every block is serial
    max_skips: int = within(256, 0, 256)  # U-Net skips, from the middle outwards
    leaky_slope: float = within(0.3, 0, 1)  # of the activation below zero, before it is squared
    smear_gate: bool = True  # a gated share of the token before joins each embedding
    attn_gate: float = within(0.5, 0, 100)  # slope of the gate of each head's output; 0: none
    ve_layers: str = ""  # blocks to whose values a narrow embedding is added
    num_value_embeds: int = within(0, 0, 8)  # full tables, scaled anew for every visit
    logit_softcap: float = within(30.0, 1, 40)  # exp(-2 * 40) is a float32
    tied_embed_init_std: float = within(0.005, 1e-6, 1)
    # Depth recurrence
    num_loops: int = within(2, 0, 16)  # extra passes through the loop segment
    loop_start: int = within(3, 0, 255)
    loop_end: int = within(5, 0, 255)  # inclusive
    enable_looping_at: float = within(0.35, 0, 1)  # progress at which they begin
    prog_depth: str = ""  # instead of that: progress:passes,... in force until then
    cross_repeat: bool = False  # a vector joins every visit, a block's last output its next one
    # Optimizer
    matrix_lr: float = within(0.026, 0, 10)
    tied_embed_lr: float = within(0.03, 0, 10)
    scalar_lr: float = within(0.02, 0, 10)
    muon_momentum: float = within(0.97, 0, 0.9999)
    muon_momentum_warmup_start: float = within(0.92, 0, 0.9999)
    muon_momentum_warmup_steps: int = within(1500, 1, 10**7)
    muon_backend_steps: int = within(5, 1, 20)  # iterations of Newton-Schulz
    muon_row_normalize: bool = True
    muon_wd: float = within(0.095, 0, 10)
    embed_wd: float = within(0.085, 0, 10)
    adam_wd: float = within(0.02, 0, 10)
    beta1: float = within(0.9, 0, 0.9999)
    beta2: float = within(0.99, 0, 0.9999)
    adam_eps: float = within(1e-8, 1e-20, 1)
    grad_clip_norm: float = within(0.3, 0, 10**7)  # global; 0: off
    # Schedule
    iterations: int = within(20_000, 1, 10**7)  # most optimizer steps
    max_wallclock_seconds: float = within(600.0, 0, 10**7)  # 0: progress is step / iterations
    gptq_reserve_seconds: float = within(0.0, 0, 10**7)  # least share kept for calibration
    warmdown_frac: float = within(0.85, 0.001, 1)  # last share of progress with falling rate
    warmdown_iters: int = within(0, 0, 10**7)  # instead, in steps of the mean time so far
    schedule_steps: int = within(0, 0, 10**7)  # settings in steps are shares of so many; 0: steps
    min_lr: float = within(0.1, 0, 1)  # floor of the learning-rate scale
    warmup_steps: int = within(20, 1, 1000)  # untimed micro-steps per plan, on random tokens
    averaging: Literal["ema", "ema_warm", "swa"] = "ema"  # warm: decay at most (s + 1) / (s + 10)
    ema_decay: float = within(0.9965, 0, 0.9999)  # per optimizer step
    swa_start_frac: float = within(0.6, 0, 1)  # learning-rate scale below which snapshots count
    swa_every: int = within(30, 1, 10**6)  # steps
    train_log_every: int = within(500, 1, 10**7)
    val_loss_every: int = within(4000, 0, 10**7)  # steps; 0: never while training
    # Quantisation and artifact
    attn_qmax: int = within(31, 1, 127)  # largest integer; there are 2 * qmax + 1
    mlp_qmax: int = within(31, 1, 127)
    embed_qmax: int = within(127, 1, 127)
    matrix_clip_sigmas: str = within("12.85", 1e-6, 1000)  # of rows; up to 1: a quantile of
    embed_clip_sigmas: str = within("20", 1e-6, 1000)  # magnitudes; of several the best wins
    clip_floor: float = within(0.0, 0, 1000)  # least clip width of a row
    gptq_calibration_batches: int = within(16, 0, 10**7)  # of micro_batch_tokens, all ranks
    max_quant_gap_bpb: float = within(0.05, 0, 100)  # a larger loss by quantisation is no result
    gptq_damp: float = within(0.03, 1e-6, 1)  # of the mean Hessian diagonal
    quantiser: Literal["gptq", "rate", "gptq_matrices", "nearest"] = "rate"  # rate: per bit
    compressor: Literal["brotli", "ans", "zstd"] = "ans"  # zstd: brotli where not installed
    fit: bool = True  # one factor on all steps fits the artifact to its cap
    prune: bool = False  # instead, as many ones of the finest rows of matrices become zeros
    artifact_cap_bytes: int = within(16_000_000, 1000, 10**12)  # packed program and model file
    # Evaluation
    eval_seq_len: int = within(2048, 8, 2**20)
    eval_stride: int = within(64, 1, 2**20)
    val_batch_tokens: int = within(524_288, 8, 2**23)  # eight ranks' share of a forward pass
    sliding_window_enabled: bool = False
    mixer: Literal["off", "legal"] = "legal"  # with n-grams of scored text
    val_tail: bool = True  # 0: without the tail that fills no sequence, as the published runs
    max_eval_seconds: float = within(600.0, 1, 10**7)
    # Test-time training
    ttt_enabled: bool = True
    ttt_mode: Literal["sgd", "documents"] = "documents"  # one stream, or each document alone
    ttt_lr: float = within(0.005, 0, 10)
    ttt_epochs: int = within(3, 0, 100)
    ttt_momentum: float = within(0.9, 0, 0.9999)
    ttt_chunk_tokens: int = within(32_768, 8, 2**24)
    ttt_grad_clip: float = within(1.0, 0, 10**7)
    ttt_batch_size: int = within(64, 1, 4096)  # documents that adapt side by side
    ttt_chunk_size: int = within(40, 1, 2**16)  # targets between two steps
    ttt_lora_sites: str = "qkv,out,up,down,head"  # adapted layers, of every visit
    ttt_lora_rank: int = within(80, 1, 4096)
    ttt_lora_alpha: float = within(144.0, 0, 10**7)  # output is scaled by alpha / rank
    ttt_lora_lr: float = within(1.4e-4, 0, 1)
    ttt_beta1: float = within(0.0, 0, 0.9999)
    ttt_beta2: float = within(0.99, 0, 0.9999)
    ttt_weight_decay: float = within(0.5, 0, 100)

    def __post_init__(self) -> None:
        for f in fields(self):
            for low, high in f.metadata.values():
                text = str(getattr(self, f.name))
                inside = all(low <= value <= high for value in numbers(f.name, text))
                require(inside, f.name, text, f"between {low:g} and {high:g}")
        check_consistency(self)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """The settings of PRESET under those of `env`. Raises: ConfigError, also if misspelt."""
        known = {name.upper(): kind for name, kind in typing.get_type_hints(cls).items()}
        for variable in sorted(env.keys() - known):
            owned = {*OWNED_WORDS.split()} & {*variable.split("_")}
            if near := difflib.get_close_matches(variable, known, n=1, cutoff=0.85 * (not owned)):
                raise ConfigError(f"{variable} is unknown; did you mean {near[0]}?")
        preset = env.get("PRESET", "record")
        require(preset in PRESETS, "preset", repr(preset), "one of " + ", ".join(PRESETS))
        return cls(**PRESETS[preset] | {name.lower(): parse_setting(name, env[name], kind)
                                        for name, kind in known.items() if name in env})

    # What follows from settings
    head_dim = property(lambda c: c.model_dim // c.num_heads)
    kv_dim = property(lambda c: c.num_kv_heads * c.head_dim)  # of all keys, or of all values
    mlp_dim = property(lambda c: int(c.mlp_mult * c.model_dim))
    ve_blocks = property(lambda c: [parse_setting("ve_layers", part, int)
                                    for part in c.ve_layers.split(",") if part])
    eval_rows = property(lambda c: max(1, c.val_batch_tokens // (8 * c.eval_seq_len)))  # of a rank
    dataset_dir = property(lambda c: Path(
        c.data_path or f"{c.data_dir}/datasets/fineweb10B_sp{c.vocab_size}"))
    tokenizer_file = property(lambda c: Path(
        c.tokenizer_path or f"{c.data_dir}/tokenizers/fineweb_{c.vocab_size}_bpe.model"))
    depth_schedule = property(lambda c: stages(  # passes through the loop segment
        "prog_depth", c.prog_depth or f"{c.enable_looping_at}:1,1:{c.num_loops + 1}"))
    context_schedule = property(lambda c: stages(  # tokens of a row
        "train_context", f"{c.train_context},1:{c.train_seq_len}".lstrip(",")))
    config_hash = property(lambda c: digest(json.dumps(c.method(), sort_keys=True))[:16])

    def method(self) -> dict[str, object]:
        """The settings that define the method: equal for the seeds of one experiment."""
        return {k: v for k, v in asdict(self).items() if k not in NOT_METHOD.split()}

    def differs(self) -> dict[str, object]:
        """The settings that are unlike the preset's."""
        base = Config.from_env({"PRESET": self.preset})
        return {k: v for k, v in asdict(self).items() if v != getattr(base, k)}

NOT_METHOD = ("seed run_id log_dir run_dir print_config eval_only data_dir data_path audit resume "
              "tokenizer_path checkpoint_every rank_timeout_seconds max_quant_gap_bpb")

# Published steps to the recurrence are shares of the run here; SCHEDULE_STEPS does it to others.
FORMER: dict = dict(leaky_slope=0.5, smear_gate=False, attn_gate=0.0, min_lr=0.0, train_context="",
                    muon_momentum=0.99, matrix_lr=0.022, beta2=0.95, warmdown_frac=0.72)
PLAIN = FORMER | dict(quantiser="gptq", compressor="brotli", ttt_mode="sgd", mixer="off",
    val_tail=False, gptq_damp=0.01, gptq_calibration_batches=64, sliding_window_enabled=True)
PR1445 = PLAIN | dict(
    vocab_size=4096, ttt_enabled=False, residual="two_lane_drop", max_skips=5, ve_layers="9,10",
    num_loops=1, enable_looping_at=2000 / 5104, qk_gain_init=5.0, embed_wd=0.095, prune=True,
    train_order="coprime", gptq_reserve_seconds=10.0, quantiser="gptq_matrices", clip_floor=1.0)
QUANTILES = dict(matrix_clip_sigmas="0.999,0.9995,0.9999,0.99999,1", embed_clip_sigmas="0.9999984")
PR1453 = PLAIN | dict.fromkeys(("matrix_clip_sigmas", "embed_clip_sigmas"),
                               "0.9999,0.99995,0.99999,0.999995,0.999999") | dict(
    vocab_size=1024, ttt_enabled=False, num_layers=3, model_dim=880, mlp_mult=3.0, qk_gain_init=1.5,
    rope_dims=0, ln_scale=False, xsa_last_n=4, parallel_residual_start=-1, max_skips=0, num_loops=3,
    num_value_embeds=2, cross_repeat=True, loop_start=0, loop_end=2, prog_depth="0.3:2,0.5:3,1:4",
    train_seq_len=1024, train_batch_tokens=524_288, train_order="sequential", eval_seq_len=1024,
    eval_stride=256, matrix_lr=0.018, scalar_lr=0.018, tied_embed_lr=0.021, muon_momentum=0.95,
    muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500, muon_row_normalize=False,
    muon_wd=0.04, embed_wd=0.0, adam_wd=0.0, warmdown_iters=3000, compressor="zstd", mlp_qmax=16,
    gptq_calibration_batches=0, quantiser="nearest", attn_qmax=63, embed_qmax=63, averaging="swa")

PRESETS: dict[str, dict] = {
    "record": {}, "pr1493": PLAIN | dict(gptq_reserve_seconds=12.0), "pr1445": PR1445 | QUANTILES,
    "pr1453": PR1453, "pr1471": PR1445 | dict(vocab_size=8192, enable_looping_at=2000 / 4968),
    "pr1395": PR1445 | QUANTILES | dict(
        residual="two_lane_attn", loop_start=4, enable_looping_at=3000 / 5409, matrix_lr=0.02,
        muon_wd=0.09, embed_wd=0.09, warmdown_frac=0.667, averaging="ema_warm", ema_decay=0.997),
    "pr895": PR1453 | dict(model_dim=832, mlp_mult=2.0, num_loops=4, iterations=200_000,
        prog_depth="0.3:2,0.5:3,0.75:4,1:5", matrix_lr=0.015, scalar_lr=0.015, tied_embed_lr=0.018,
        warmdown_iters=15_000, swa_start_frac=0.4, swa_every=100, max_wallclock_seconds=14_400.0,
        attn_qmax=127, mlp_qmax=127, embed_qmax=127),
    "demo": FORMER | dict(  # the same program at laptop size: two CPU cores, about two minutes
        data_path="data/datasets/demo_sp1024", tokenizer_path="data/tokenizers/demo_1024_bpe.model",
        compile=False, vocab_size=1024, train_seq_len=256, train_batch_tokens=6144,
        micro_batch_tokens=6144, num_layers=5, model_dim=128, num_heads=4, num_kv_heads=2,
        mlp_mult=3.0, rope_dims=8, parallel_residual_start=3, num_loops=1, loop_start=1, loop_end=2,
        matrix_lr=0.03, muon_momentum=0.95, muon_momentum_warmup_steps=40, grad_clip_norm=1.0,
        ema_decay=0.95, max_wallclock_seconds=75.0, gptq_reserve_seconds=1.0, warmup_steps=1,
        train_log_every=10, val_loss_every=0, gptq_calibration_batches=8, eval_seq_len=256,
        val_batch_tokens=65_536, ttt_batch_size=16, ttt_chunk_size=32, ttt_lora_rank=16,
        ttt_lora_alpha=32.0, ttt_lora_lr=1e-3)}

# A variable with one of these words between underscores can only be meant for this program.
OWNED_WORDS = ("TTT MUON GPTQ EMA SWA WARMDOWN LOOPS XSA ROPE WALLCLOCK EMBED CLIP LORA MLP QK LR "
               "MATRIX EMBEDDING EMBEDDINGS TENSOR GATES ETLB")

def parse_setting(name: str, text: str, kind: Any) -> Any:
    """The value of `text` as a type or as one of the literals. Raises: ConfigError."""
    choices = ("0", "1") if kind is bool else typing.get_args(kind) or (text,)
    require(text in choices, name, repr(text), "one of " + ", ".join(choices))
    try:
        return text == "1" if kind is bool else kind(text) if kind in (int, float) else text
    except ValueError:
        raise ConfigError(f"{name.upper()}={text!r} must be a number ({kind.__name__})") from None

def numbers(name: str, text: str) -> list[float]:
    """The numbers in a setting that lists some. Raises: ConfigError."""
    return [parse_setting(name, part, float) for part in re.split("[,:]", text)]

def stages(name: str, text: str) -> list[tuple[float, int]]:
    """Pairs of the progress until which, and the value that, is in force."""
    flat = numbers(name, text)
    return [*zip(flat[::2], map(int, flat[1::2]), strict=False)]

def value_at(schedule: Sequence[tuple[float, int]], progress: float) -> int:
    """What is in force at `progress` (0 to 1)."""
    return next((value for until, value in schedule if progress < until), schedule[-1][1])

def check_consistency(c: Config) -> None:
    """Raises ConfigError for the first two settings that contradict each other."""
    rules = ["model_dim % 8", "mlp_dim % 8", "model_dim % num_heads", "head_dim % 2",
             "num_heads % num_kv_heads", "rope_dims % 2", "rope_dims <= head_dim",
             "train_batch_tokens % train_seq_len", "train_seq_len <= micro_batch_tokens",
             "eval_stride <= eval_seq_len", "ttt_chunk_size <= eval_seq_len"]
    rules += ["loop_start <= loop_end", "loop_end < num_layers"] * bool(c.num_loops)
    rules += ["gptq_reserve_seconds < max_wallclock_seconds"] * bool(c.max_wallclock_seconds)
    rules += ["loop_end < parallel_residual_start"] * (c.residual != "parallel")
    if c.ttt_enabled and c.ttt_mode == "sgd":
        rules += ["ttt_enabled <= sliding_window_enabled", "ttt_chunk_tokens % eval_seq_len"]
    relations = {"%": ("a multiple of", np.mod), "<=": ("at most", np.greater),
                 "<": ("below", np.greater_equal)}  # in words, and what contradicts them
    for name, sign, other in map(str.split, rules):
        (words, broken), value = relations[sign], getattr(c, name)
        bound = int(other) if other.isdigit() else getattr(c, other)
        require(not broken(value, bound), name, value, f"{words} {other.upper()} ({bound})")
    least, most = c.cross_repeat + 1, c.num_loops + 1
    rises = np.diff([(0, least), *c.depth_schedule, (math.inf, most)], axis=0)
    for name, holds, words in (
            ("compressor", c.compressor == "ans" or c.quantiser != "rate", "ans (QUANTISER=rate)"),
            ("prog_depth", rises.min() >= 0 and most in dict(c.depth_schedule).values(),
             f"progress:passes,... that rise, to NUM_LOOPS ({c.num_loops}) + 1 passes, and from "
             f"{least} on for CROSS_REPEAT={c.cross_repeat:d}"),
            ("train_context", np.diff([(0, 8), *c.context_schedule], axis=0).min() >= 0
             and not any(c.train_seq_len % tokens for _, tokens in c.context_schedule),
             f"progress:tokens,... that rise, divisors of {c.train_seq_len} from 8 on"),
            ("ve_layers", {*c.ve_blocks} <= {*range(c.num_layers)},
             f"blocks below NUM_LAYERS ({c.num_layers})"),
            ("gptq_calibration_batches", c.gptq_calibration_batches or c.quantiser == "nearest",
             f"above 0 for QUANTISER={c.quantiser}"),
            ("run_id", c.run_id or not c.resume, f"set for RESUME={c.resume}"),
            ("run_id", re.fullmatch(r"([\w-][\w.-]*)?", c.run_id, re.ASCII), "of a-z, 0-9, . _ -"),
            ("ttt_lora_sites", {*c.ttt_lora_sites.split(",")} <= {*SITES}, f"some of {SITES}")):
        require(holds, name, repr(getattr(c, name)), words)

# ====  2  Runtime  ================================================================================
# Enters: the variables that torchrun sets. Leaves: a `World` (who we are, which device, how ranks
# talk) and a `RunLog` (text for people, JSON lines for programs, one result file). All in seconds.

class World:
    """This process among its peers. At world size 1 every collective is the identity."""
    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.is_main, self.is_cuda = rank == 0, self.device.type == "cuda"
        self.control: dist.ProcessGroup | None = None  # of CPUs: never waits for the device
        self.deferring = self.signalled = self.stopping = False

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> World:
        """The world that torchrun describes, or a world of one. Raises: ConfigError."""
        names, gpus = ("WORLD_SIZE", "LOCAL_RANK", "RANK"), torch.cuda.device_count()
        given = env if env.keys() & names else dict(zip(names, "100", strict=True))
        size, local_rank, rank = (parse_setting(n, given.get(n, ""), int) for n in names)
        require(0 <= rank < size, "rank", rank, f"below WORLD_SIZE ({size})")
        require(local_rank < gpus or not gpus, "local_rank", local_rank, f"below the {gpus} GPUs")
        return cls(rank, size, f"cuda:{local_rank}" if gpus else "cpu")

    @contextlib.contextmanager
    def process_group(self, timeout_seconds: float = 900.0) -> Iterator[None]:
        """Connects the ranks for a block, which ends for all if it fails for one, and says why."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)
        handlers = {n: signal.signal(n, self.interrupt) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            if self.size > 1:
                backend, device = ("nccl", self.device) if self.is_cuda else ("gloo", None)
                wait = timedelta(seconds=timeout_seconds)
                dist.init_process_group(backend, device_id=device, timeout=wait)
                self.control = dist.new_group(backend="gloo", timeout=wait)
            yield
            if self.size > 1:
                dist.destroy_process_group()
        except BaseException as error:
            if self.size > 1:
                reason = self.explain(error)
                if reason.startswith(f"rank {self.rank}:"):
                    if not isinstance(error, GolfError | KeyboardInterrupt):
                        sys.excepthook(*sys.exc_info())
                    print(f"error: {reason}", file=sys.stderr)
                os._exit(75 if isinstance(error, KeyboardInterrupt) else 1)  # waits for nobody
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def interrupt(self, number: int = 0, frame: object = None) -> None:
        """A signal handler: ends the run, or while training only notes that it came."""
        self.signalled = True
        if not self.deferring:
            self.deferring = True  # a second one would disturb the end
            raise KeyboardInterrupt("stopped by a signal")

    def explain(self, error: BaseException) -> str:
        """Why the run ends; of several ranks, what the first one that failed says."""
        text = f"rank {self.rank}: {type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # there is no store, or it went with its process
            store = dist.distributed_c10d._get_default_store()
            store.set(f"rank {self.rank}", "")
            if not isinstance(error, GolfError | KeyboardInterrupt):  # another may be stuck
                time.sleep(1)
                silent = [r for r in range(self.size) if not store.check([f"rank {r}"])]
                text += f"; silent ranks: {silent}"
            text = store.compare_set("failure", "", text).decode()
        return text

    def combine(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """`tensor`, combined in place over ranks; one of the CPU never waits for the device."""
        if self.size > 1:
            dist.all_reduce(tensor, operation, None if tensor.is_cuda else self.control)
        return tensor

    def sum_all_(self, tensors: list[Tensor], scale: float = 1.0) -> None:
        """Replaces each tensor by `scale` times its sum over ranks, in one collective."""
        if self.size > 1:
            flat = self.combine(torch._utils._flatten_dense_tensors(tensors)).mul_(scale)
            torch._foreach_copy_(tensors, torch._utils._unflatten_dense_tensors(flat, tensors))

    def scatter_mean(self, stack: Tensor) -> Tensor:
        """This rank's equal share, along dim 0, of the mean of `stack` over ranks."""
        if self.size == 1:
            return stack
        share = torch.empty_like(stack.chunk(self.size)[0])
        dist.reduce_scatter_tensor(share, stack, op=dist.ReduceOp.AVG)
        return share

    def gather(self, share: Tensor) -> Tensor:
        """The shares of all ranks, concatenated along dim 0 in rank order."""
        if self.size == 1:
            return share
        out = share.new_empty(self.size * len(share), *share.shape[1:])
        dist.all_gather_into_tensor(out, share.contiguous())
        return out

    def decide(self, *values: float) -> tuple[float, ...]:
        """Rank 0's `values` on every rank, and in `stopping`, whether one was told to stop."""
        mine = values if self.is_main else [0.0] * len(values)
        box = self.combine(torch.tensor([*mine, self.signalled], dtype=torch.float64)).tolist()
        self.stopping = box.pop() > 0
        return tuple(box)

    def synchronize(self) -> float:
        """The time when the device and all ranks have come this far."""
        if self.is_cuda:
            torch.cuda.synchronize()
        if self.size > 1:
            dist.barrier(group=self.control)
        return time.perf_counter()

class RunLog:
    """The files of one run: text, JSON lines and the `result`. Ranks other than 0 are silent."""
    def __init__(self, config: Config, world: World, moment: float | None = None) -> None:
        self.started, stamp = time.time(), utc_text("%Y%m%dT%H%M%S", moment)
        run_id = config.run_id or f"{config.preset}-{config.seed}-{stamp}"
        self.run_id, self.folder = run_id, Path(config.run_dir, run_id)
        self.result_path = Path(config.log_dir, run_id + ".json")
        self.result, self.files = dict[str, Any](), list[typing.IO]()  # filled as keys are known
        if config.resume and self.result_path.is_file():
            self.result = json.loads(self.result_path.read_text())
            require(self.result["status"] == "partial", "run_id", run_id, "of an incomplete run")
        if not world.is_main:
            return
        import fcntl
        owner, mode = self.folder / "owner", "a" if config.resume else "x"
        try:
            self.result_path.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(parents=True, exist_ok=bool(config.resume))
            self.lock = owner.open("a")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner.write_text(f"process {os.getpid()} on {os.uname().nodename}")
            self.files = [self.result_path.with_suffix(s).open(mode) for s in (".txt", ".jsonl")]
        except BlockingIOError:
            raise ConfigError(f"RUN_ID={run_id} belongs to {owner.read_text()}") from None
        except OSError as error:
            raise ConfigError(f"RUN_ID={run_id}: {error.filename}: {error.strerror}") from None

    def append(self, number: int, line: str) -> None:
        """Adds a line to a file; a full disk is said and does not end the run."""
        if self.files:
            try:
                print(line, file=self.files[number], flush=True)
            except OSError as error:
                print(f"error: {self.files[number].name}: {error.strerror}", file=sys.stderr)

    def line(self, text: str, *, console: bool = True) -> None:
        if self.files and console:
            print(text, flush=True)
        self.append(0, text)

    def event(self, kind: str, **values: object) -> None:
        self.append(1, json.dumps({"event": kind, "t": time.time() - self.started, **values}))

    def warn(self, message: str) -> None:
        self.line(f"warning: {message}")
        self.event("warning", message=message)

    def put(self, title: str, **values: Any) -> None:
        self.result.setdefault(title, {}).update(values)

    def write_result(self, status: Literal["complete", "partial"], reason: str) -> None:
        self.event("result", status=status, reason=reason)
        self.result |= {"status": status, "exit_reason": reason, "finished": utc_text()}
        if self.files:
            write_atomically(self.result_path, (json.dumps(self.result, indent=1) + "\n").encode())

def utc_text(form: str = "%Y-%m-%dT%H:%M:%SZ", seconds: float | None = None) -> str:
    """A time, or the time now, as ISO 8601 text."""
    return time.strftime(form, time.gmtime(seconds))

def digest(data: bytes | str) -> str:
    """The SHA-256 of bytes, or of a text, in hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()

def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Writes `data` so that a reader, or a crash, never sees half of it, nor through a link."""
    partial = Path(f"{path}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from None

ARCHIVE = getattr(globals().get("__loader__"), "archive", None)  # what runs, if it is packed

@functools.cache  # the file may be edited while a run goes on; what counts is what runs
def program_source() -> str:
    """The text of the running program, also when it runs from its packed form."""
    return unpack_program(Path(ARCHIVE)) if ARCHIVE else Path(__file__).read_text(encoding="utf-8")

@functools.cache
def packed_program() -> bytes:
    """The packed form of the running program, which may be packed already."""
    return Path(ARCHIVE).read_bytes() if ARCHIVE else pack_program(program_source())

def environment_facts(world: World) -> dict[str, object]:
    """Hardware and versions: everything outside the program whose change could move a number."""
    gpu = torch.cuda.get_device_name(world.device) if world.is_cuda else "none"
    hardware = dict(gpu=gpu, gpus=world.size * world.is_cuda, cpu_count=os.cpu_count())
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__,
                    cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    with contextlib.suppress(OSError, ImportError, IndexError):  # no GPU, or no triton
        versions["triton"] = importlib.metadata.version("triton")
        hardware["driver"] = Path("/proc/driver/nvidia/version").read_text().split("  ")[1]
    return dict(hardware=hardware, versions=versions)

# ====  3  Data  ===================================================================================
# Enters: shards of uint16 token ids and a SentencePiece model. Leaves: training windows in an order
# that only the seed decides, and the validation stream with the bytes every target stands for.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
BOS_ID = 1
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a leading space
CASE_OPERATOR = "\ue001"  # a piece of tokenizers of text whose capitals are operators

def read_shard(path: Path, vocab_size: int | None = None) -> np.ndarray:
    """The uint16 ids of a shard, mapped, below `vocab_size` if given. Raises: DataError."""
    try:
        data = np.memmap(path, "<u2", "r")
        header, start = data[:6].view("<i4").tolist(), 2 * SHARD_HEADER_INTS
    except (OSError, ValueError) as error:  # also of odd size, or empty
        raise DataError(f"{path}: cannot be read: {error}") from None
    if header != (wanted := [SHARD_MAGIC, SHARD_VERSION, data.size - start]):
        raise DataError(f"{path}: magic, version and tokens are {header}, must be {wanted}")
    if vocab_size is not None:
        check_ids(data[start:], vocab_size, str(path))
    return data[start:]

def check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises DataError if a token id is not below `vocab_size`."""
    if (largest := int(tokens.max(initial=0))) >= vocab_size:
        raise DataError(f"{where}: token id {largest} must be below VOCAB_SIZE ({vocab_size})")

def find_shards(folder: Path, split: str) -> list[Path]:
    """The shard files of `split`, in order. Raises: DataError if there are none."""
    if not (found := sorted(folder.glob(f"*_{split}_[0-9]*.bin"))):
        raise DataError(f"{folder}: no *_{split}_*.bin shards; tools/prepare_data.py provides them")
    return found

class TrainLoader:
    """Windows of `seq_len + 1` tokens; number n depends on the seed and the shards alone."""
    def __init__(self, shards: Iterable[np.ndarray], config: Config) -> None:
        self.shards, self.config, self.seq_len = [*shards], config, config.train_seq_len
        self.num_tokens = sum(shard.size for shard in self.shards)
        self.ends_sha256 = digest(b"".join(shard[-999:].tobytes() for shard in self.shards))
        self.enter_epoch(0)
        if not len(self.starts):
            raise DataError(f"{config.dataset_dir}: {self.num_tokens} training tokens; shards need "
                            f"TRAIN_SEQ_LEN ({self.seq_len}) + 1 at least")

    def enter_epoch(self, epoch: int) -> None:
        """Draws boundaries and order of the windows of one pass: rows of a shard and a start."""
        order, starts, keys = self.config.train_order, [], []
        contents = [int(self.ends_sha256[:8], 16)] * (order == "coprime")
        rng = np.random.default_rng([self.config.seed, epoch, *contents])
        for number, shard in enumerate(self.shards):
            count, spare = divmod(max(0, shard.size - 1), self.seq_len)
            phase, places = rng.integers(spare + 1) * (order != "sequential"), np.arange(count)
            if order == "coprime" and count:
                stride = rng.choice(np.flatnonzero(np.gcd(places, count) == 1))
                places = (rng.integers(count) + stride * places) % count
                keys.append(np.sort(rng.random(count)))  # shards are drawn by what is left in them
            starts.append(np.stack([np.full(count, number), phase + self.seq_len * places], axis=1))
        self.epoch, self.starts = epoch, np.concatenate(starts)
        if order == "shuffled":
            self.starts = rng.permutation(self.starts)
        elif keys:
            self.starts = self.starts[np.concatenate(keys).argsort()]

    def read(self, first: int, count: int) -> np.ndarray:
        """Windows `first` to `first + count`, int32 (count, seq_len + 1). Raises: DataError."""
        windows = np.empty((count, self.seq_len + 1), dtype=np.int32)
        for number, row in enumerate(windows, first):
            epoch, index = divmod(number, len(self.starts))
            if epoch != self.epoch:
                self.enter_epoch(epoch)
            shard, start = self.starts[index]
            row[:] = self.shards[shard][start:start + self.seq_len + 1]
        check_ids(windows, self.config.vocab_size, f"{self.config.dataset_dir}: training shards")
        return windows

class BatchShape(NamedTuple):
    """How a rank's share of one optimizer step is divided."""
    micro_steps: int
    sequences: int  # per micro-step

def batch_shape(config: Config, world_size: int) -> BatchShape:
    """The fewest micro-steps within MICRO_BATCH_TOKENS, same global batch. Raises: ConfigError."""
    total = config.train_batch_tokens // config.train_seq_len
    require(total % world_size == 0, "world_size", world_size, "a divisor of TRAIN_BATCH_TOKENS / "
            f"TRAIN_SEQ_LEN ({total}): {[n for n in range(1, 9) if total % n == 0]}")
    per_rank, most = total // world_size, config.micro_batch_tokens // config.train_seq_len
    sequences = next(n for n in range(most, 0, -1) if per_rank % n == 0)
    return BatchShape(per_rank // sequences, sequences)

def batch_stream(loader: TrainLoader, shape: BatchShape, world: World, step: int = 0
                 ) -> Generator[list[Tensor], None, None]:
    """This rank's micro-batches (sequences, seq_len + 1) of each step; a thread reads two ahead."""
    per_rank = shape.micro_steps * shape.sequences
    def read(step: int) -> list[Tensor]:
        first = (step * world.size + world.rank) * per_rank
        batches = torch.from_numpy(loader.read(first, per_rank)).split(shape.sequences)
        return [b.pin_memory() for b in batches] if world.is_cuda else list(batches)
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(read, step + ahead) for ahead in range(2))
        while True:
            pending.append(pool.submit(read, step + 2))
            step += 1
            yield [rows.to(world.device, non_blocking=True) for rows in pending.popleft().result()]

class TokenBytes(NamedTuple):
    """What each token id adds to the byte count, as arrays over the vocabulary."""
    base: np.ndarray  # int16, bytes without the leading space
    leading_space: np.ndarray  # bool
    boundary: np.ndarray  # bool: control, unknown, unused; a leading space after it is no byte

def load_tokenizer(path: Path, vocab_size: int) -> Any:
    """The SentencePiece model at `path`. Raises: DataError if missing or of another size."""
    from sentencepiece import SentencePieceProcessor
    try:
        tokenizer = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: no SentencePiece model; set TOKENIZER_PATH or run "
                        f"tools/prepare_data.py: {error}") from None
    if tokenizer.vocab_size() != vocab_size:
        raise DataError(f"{path}: {tokenizer.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
    return tokenizer

def token_bytes(tokenizer: Any) -> TokenBytes:
    """Bytes of decoded text per token id, 0 for control tokens; `bytes_of_targets` adds the space.
    Raises: DataError if U+2581 is no piece (its fallback bytes would count as 3), or inside one.
    Example: pieces (U+2581)"caf", "<0xC3>", "<0xA9>" -> 3 and a leading space, 1, 1"""
    if tokenizer.is_unknown(tokenizer.piece_to_id(SPACE_MARK)):
        raise DataError("tokenizer: U+2581 is no piece of its own; bytes would be wrong")
    pieces = tokenizer.id_to_piece(ids := [*range(tokenizer.vocab_size())])
    if inside := [piece for piece in pieces if SPACE_MARK in piece[1:]]:
        raise DataError(f"tokenizer: piece {inside[0]!r} holds U+2581 inside")
    sizes = [len(piece.removeprefix(SPACE_MARK).encode()) for piece in pieces]
    tests = tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_unused
    boundary = np.any([test(ids) for test in tests], axis=0)
    base = np.where(boundary, 0, np.where(tokenizer.is_byte(ids), 1, sizes)).astype(np.int16)
    return TokenBytes(base, np.char.startswith(pieces, SPACE_MARK) & ~boundary, boundary)

def bytes_of_targets(previous: np.ndarray, target: np.ndarray, table: TokenBytes) -> np.ndarray:
    """Bytes each target stands for, int16, given the token before it."""
    return table.base[target] + (table.leading_space[target] & ~table.boundary[previous])

def is_transformed(tokenizer: Any) -> bool:
    """Whether a tokenizer is for text whose capitals are operators."""
    return not tokenizer.is_unknown(tokenizer.piece_to_id(CASE_OPERATOR))

class ValStream:
    """The validation tokens, and the bytes of every target; of transformed text, by a side-car."""
    def __init__(self, tokens: np.ndarray, table: TokenBytes, seq_len: int,
                 keep_tail: bool = False, sidecar: np.ndarray | None = None) -> None:
        whole = max(0, tokens.size - 1) // seq_len * seq_len  # the tail fills no sequence
        self.num_targets = tokens.size - 1 if keep_tail else whole
        self.tokens = tokens[:self.num_targets + 1].astype(np.int32)
        self.num_documents = int((self.tokens == BOS_ID).sum())
        self.document_starts = np.union1d(0, np.flatnonzero(self.tokens[:-1] == BOS_ID))
        self.document_stops = np.append(self.document_starts[1:], self.num_targets)
        self.transformed = sidecar is not None
        self.target_bytes = (bytes_of_targets(self.tokens[:-1], self.tokens[1:], table)
                             if sidecar is None else sidecar[1:self.num_targets + 1])
        self.num_bytes = int(self.target_bytes.sum())
        if not (whole and self.num_bytes):
            raise DataError(f"validation: {tokens.size} tokens must be above EVAL_SEQ_LEN "
                            f"({seq_len}) and stand for text, not {self.num_bytes} bytes")

    @classmethod
    def load(cls, config: Config) -> ValStream:
        """The stream of the configured dataset. Raises: DataError."""
        folder, size, sidecar = config.dataset_dir, config.vocab_size, None
        tokenizer = load_tokenizer(config.tokenizer_file, size)
        tokens = np.concatenate([read_shard(path, size) for path in find_shards(folder, "val")])
        if is_transformed(tokenizer):  # the token table would count operators
            sidecar = np.concatenate([*map(read_shard, find_shards(folder, "val_bytes"))])
            if sidecar.size != tokens.size or sidecar[tokens == BOS_ID].any():
                raise DataError(f"{folder}: {sidecar.size} byte counts in val_bytes shards, must "
                                f"be {tokens.size}, and none for the starts of documents")
        return cls(tokens, token_bytes(tokenizer), config.eval_seq_len, config.val_tail, sidecar)

# ====  4  Model  ==================================================================================
# Enters: token ids, a `DepthPlan`, perhaps an adapter. Leaves: hidden states, or nats per target.
#   B batch   T tokens   D model width   H query heads   G key/value heads   K head width
#   F hidden width of the MLP   V vocabulary   L physical blocks   N rows (B*T)

NORM_EPS = torch.finfo(torch.float32).eps
GATE_WIDTH = 12  # dimensions that a gate reads
VALUE_EMBED_DIM = 128
TABLES, MATRICES = ("embed", "ve_table", "value_tables"), ("qkv", "out", "up", "down")
Site = Literal["qkv", "out", "up", "down", "head"]
SITES: tuple[Site, ...] = typing.get_args(Site)
Attend = Callable[..., Tensor]  # q_BTHK, k_BTGK, v_BTGK -> y_BTHK, causal
Tap = Callable[[Site, Tensor, Tensor], Tensor]  # input and output of a layer -> output to use
Adapter = Callable[[int, int, Site, Tensor, Tensor], Tensor]  # that of visit, block (head: -1, -1)

class Visit(NamedTuple):
    """One virtual layer: a physical block, which pass over it, and the skip that precedes it."""
    block: int
    pass_number: int
    form: str  # serial, or RESIDUAL; and xsa where self attention is exclusive
    skip_row: int = -1  # row of the skip weights; -1: none
    skip_from: int = -1  # visit whose output is mixed in

class DepthPlan(NamedTuple):
    """The order in which the forward pass visits the physical blocks."""
    name: str
    visits: tuple[Visit, ...]

    def describe(self) -> str:
        """Encoder and decoder halves, as the published logs write them."""
        order, half = [v.block for v in self.visits], len(self.visits) // 2
        return f"encoder:{order[:half]} decoder:{order[half:]}"

@functools.cache  # asked at every step
def build_plan(config: Config, passes: int) -> DepthPlan:
    """A U-Net: decoder j, in the second half of visits, takes the j-th last encoder's output.
    Example: blocks 0 1 2 3 4 -> encoders 0 1; decoders 2 (skip from 1), 3 (skip from 0), 4"""
    blocks, first, last = [*range(config.num_layers)], config.loop_start, config.loop_end + 1
    order = blocks[:first] + blocks[first:last] * passes + blocks[last:]
    half, start, visits = len(order) // 2, config.parallel_residual_start, list[Visit]()
    for position, block in enumerate(order):
        row, skip_from = position - half, 2 * half - 1 - position
        residual = config.residual if 0 <= start <= block else "serial"
        if residual.startswith("two") and visits[-1].form.startswith("serial"):
            residual = "two_lane_both"  # where lanes part, the skip is mixed in before
        left = (len(order) - position) if config.cross_repeat else config.num_layers - block
        mixed = 0 <= row < min(half, config.max_skips) and residual != "two_lane_drop"
        form, skip = residual + " xsa" * (left <= config.xsa_last_n), (row, skip_from) * mixed
        visits.append(Visit(block, order[:position].count(block), form, *skip))
    name = {config.num_loops + 1: "looped", 1: "unlooped"}.get(passes, f"looped_{passes}")
    return DepthPlan(name, tuple(visits))

def depth_plans(config: Config) -> tuple[DepthPlan, ...]:
    """The plans of a run, in the order in which training reaches them."""
    return tuple(dict.fromkeys(build_plan(config, passes) for _, passes in config.depth_schedule))

def plan_at(config: Config, progress: float) -> DepthPlan:
    """The plan in force at `progress` (0 to 1)."""
    return build_plan(config, value_at(config.depth_schedule, progress))

class BlockWeights(NamedTuple):
    """Parameters of one physical block; matrices are in the compute type."""
    qkv: Tensor  # (H+2G)*K, D
    out: Tensor  # D, H*K, times attn_scale
    up: Tensor  # F, D
    down: Tensor  # D, F, times mlp_scale
    resid_mix: Tensor  # 2, D
    q_gain: Tensor  # H
    norm_scale: Tensor  # 0-D
    gate: Tensor | None = None  # H, GATE_WIDTH; of the output of attention
    slope: float = 0.5  # of the activation below zero
    fused: bool = False  # whether its kernel computes the MLP

class Stream(NamedTuple):
    """What enters a block: the residual stream, the embedding, and what joins them there."""
    x: Tensor  # B, T, D
    x0: Tensor  # B, T, D
    skip: tuple[Tensor, ...] = ()  # (B, T, D), its weight (D), and the stream's share (D)
    terms: tuple[tuple[Tensor, Tensor], ...] = ()  # sources (B, T, D) or 0-D, weights (D)
    value: tuple[Tensor, ...] = ()  # (B, T, G*K) and its scale, for the values of attention
    lane: tuple[Tensor, ...] = ()  # (B, T, D), which the MLP reads and adds to instead

def rms_norm(x: Tensor) -> Tensor:
    """`x` over its root mean square along the last dimension, computed in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=NORM_EPS).to(x.dtype)

def rotary_tables(num_positions: int, rotated_dims: int, base: float) -> Tensor:
    """Cosines and sines, (2, T, half the dimensions); angles are float64, where all are exact."""
    exponent = -torch.arange(0, rotated_dims, 2, dtype=torch.float64) / rotated_dims
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float64), base**exponent)
    return torch.stack([angle.cos(), angle.sin()]).float()

def rotate(x_BTHK: Tensor, rotary: Tensor) -> Tensor:
    """Rotates pairs (i, i + half) of every head by its position; other dimensions pass. Float32."""
    half, (cos, sin) = rotary.shape[-1], rotary[:, :x_BTHK.shape[1], None]
    a, b, rest = x_BTHK.split((half, half, x_BTHK.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)

def exclude_self(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Attention output without its component along the value at the same position."""
    v = F.normalize(v_BTGK.float(), dim=-1)[..., None, :]
    y_BTGRK = y_BTHK.float().unflatten(2, (v.shape[2], -1))
    return (y_BTGRK - (y_BTGRK * v).sum(-1, keepdim=True) * v).flatten(2, 3).to(y_BTHK.dtype)

def linear(x: Tensor, w_OI: Tensor, site: Site, tap: Tap | None) -> Tensor:
    """`x` times the transpose of `w`, as seen or changed by an adapter."""
    y = F.linear(x, w_OI)
    return y if tap is None else tap(site, x, y)

def attention(x_BTD: Tensor, w: BlockWeights, form: str, rotary: Tensor, attend: Attend,
              tap: Tap | None, value: Sequence[Tensor] = ()) -> Tensor:
    """Grouped-query attention with normalised, rotated, gained queries and keys."""
    H, width, dtype = len(w.q_gain), w.out.shape[1] // len(w.q_gain), x_BTD.dtype
    qkv_BTNK = linear(x_BTD, w.qkv, "qkv", tap).unflatten(-1, (-1, width))
    q_BTHK, k_BTGK, v_BTGK = qkv_BTNK.split((H, G := (qkv_BTNK.shape[2] - H) // 2, G), dim=2)
    padding = -width % 8  # kernels want such heads; their scale goes by the padded width
    gain_H1 = (w.q_gain * math.sqrt(1 + padding / width))[:, None]
    # Each kind by itself, split by sizes, and gained through its factor: anything else makes the
    # compiler write slower code, or keep float32 queries for the backward pass.
    factor_BTH1 = gain_H1 * (q_BTHK.float().square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    q_BTHK = rotate(q_BTHK.float() * factor_BTH1, rotary).to(dtype)
    k_BTGK, v_BTGK = rotate(rms_norm(k_BTGK.float()), rotary).to(dtype), v_BTGK.contiguous()
    if value:
        v_BTGK = v_BTGK + value[1].to(dtype) * value[0].view_as(v_BTGK)
    padded = (F.pad(t, (0, padding)) if padding else t for t in (q_BTHK, k_BTGK, v_BTGK))
    y_BTHK = attend(*padded)[..., :width]
    if form.endswith("xsa"):
        y_BTHK = exclude_self(y_BTHK, v_BTGK)
    if w.gate is not None:
        y_BTHK = y_BTHK * gate_share(x_BTD, w.gate)[..., None]
    return linear(y_BTHK.flatten(2), w.out, "out", tap)

def gate_share(x_BTD: Tensor, gate_GI: Tensor) -> Tensor:
    """Between 0 and 1, (B, T, G), by the first dimensions of `x`."""
    return F.linear(x_BTD[..., :gate_GI.shape[1]], gate_GI.to(x_BTD.dtype)).sigmoid()

def mlp(x_BTD: Tensor, w: BlockWeights, tap: Tap | None) -> Tensor:
    """Two linear layers round the square of a leaky ReLU."""
    if w.fused and tap is None:
        return FusedMLP.apply(x_BTD, w.up, w.down, w.slope)
    hidden_BTF = F.leaky_relu(linear(x_BTD, w.up, "up", tap), w.slope).square()
    return linear(hidden_BTF, w.down, "down", tap)

def mix_skip(x_BTD: Tensor, skip: Sequence[Tensor]) -> Tensor:
    """The stream with its share of a U-Net skip, if there is one."""
    if not skip:
        return x_BTD
    source_BTD, weight, gate = (t.to(x_BTD.dtype) for t in skip)
    return (1 - gate) * (weight * source_BTD) + gate * x_BTD

def run_block(stream: Stream, w: BlockWeights, form: str, rotary: Tensor, attend: Attend,
              tap: Tap | None = None) -> tuple[Tensor, ...]:
    """One block: mixes what enters, then adds attention and MLP. The stream, or both its lanes."""
    dtype, x_BTD = stream.x.dtype, mix_skip(stream.x, stream.skip)
    for source, weight in stream.terms:
        x_BTD = x_BTD + weight.to(dtype) * source
    mix, norm_scale = w.resid_mix.to(dtype), w.norm_scale.to(dtype)
    u = mix[0] * x_BTD + mix[1] * stream.x0
    z = rms_norm(u) * norm_scale
    after = other = u + attention(z, w, form, rotary, attend, tap, stream.value)
    for lane in stream.lane:
        other = mix_skip(lane, stream.skip) if form.startswith("two_lane_both") else lane
    if not form.startswith("parallel"):
        z = rms_norm(other) * norm_scale
    other = other + mlp(z, w, tap)
    return (after, other) if stream.lane else (other,)

def embed_tokens(ids_BT: Tensor, embed_VD: Tensor, dtype: torch.dtype,
                 smear: Sequence[Tensor] = ()) -> Tensor:
    """Normalised embeddings in the compute type, each first smeared into its document's next."""
    x_BTD = F.embedding(ids_BT, embed_VD).to(dtype)
    if smear:
        scale, gate_1I = smear
        share_BT1 = scale.to(dtype) * gate_share(x_BTD, gate_1I) * (ids_BT != BOS_ID)[..., None]
        x_BTD = x_BTD + share_BT1 * F.pad(x_BTD[:, :-1], (0, 0, 1, 0))
    return rms_norm(x_BTD)

def softcapped_nll(logits_NV: Tensor, target_N: Tensor, cap: float) -> Tensor:
    """Negative log-likelihood in nats, float32 (N,), of logits squashed to (-cap, cap)."""
    z_NV = -2 * cap * torch.sigmoid(logits_NV.float() * (-2 / cap))  # cap * tanh(x / cap) - cap
    right_NV = torch.arange(z_NV.shape[1], device=z_NV.device) == target_N[:, None]
    return z_NV.exp().sum(1).log() - torch.where(right_NV, z_NV, 0.0).sum(1)  # no exp overflows

class Matrix(NamedTuple):
    """The matrices of one role in all blocks: rows of a parameter stacked over blocks."""
    role: str  # q, k or v of qkv, else the name of the parameter
    parameter: nn.Parameter
    rows: slice = slice(None)  # of each block

class Fan(torch.autograd.Function):
    """Views of a tensor for its readers, whose gradients `add` sums: in one pass, not one each."""
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, add: Callable) -> tuple[Tensor, ...]:
        ctx.add = add
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.add(*gradients), None, None

class GPT(nn.Module):
    """The language model: float32 parameters stacked over blocks, and the only forward pass."""
    def __init__(self, config: Config, attend: Attend, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        ones, zeros, L, smears = torch.ones, torch.zeros, config.num_layers, int(config.smear_gate)
        D, visits, ve = config.model_dim, len(depth_plans(config)[-1].visits), len(config.ve_blocks)
        self.config, self.attend, self.dtype, reads = config, attend, dtype, min(GATE_WIDTH, D)
        skips, extra, one = min(config.max_skips, visits // 2), config.num_value_embeds, min(ve, 1)
        self.embed = nn.Parameter(zeros(config.vocab_size, D))
        self.qkv = nn.Parameter(zeros(L, D + 2 * config.kv_dim, D))
        self.out = nn.Parameter(zeros(L, D, D))
        self.up = nn.Parameter(zeros(L, config.mlp_dim, D))
        self.down = nn.Parameter(zeros(L, D, config.mlp_dim))
        self.attn_scale, self.mlp_scale = nn.Parameter(ones(L, D)), nn.Parameter(ones(L, D))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(L, 1, D))
        self.q_gain = nn.Parameter(torch.full((L, config.num_heads), config.qk_gain_init))
        for name, value in {
                "skip_weights": ones(skips, D), "skip_gates": zeros(skips, D),
                "lane_mix": 0.5 * ones(int(config.residual != "parallel")),
                "smear_scale": zeros(smears), "smear_gate": zeros(smears, reads),
                "attn_gate": zeros(L * (config.attn_gate > 0), config.num_heads, reads),
                "ve_table": zeros(one, config.vocab_size, VALUE_EMBED_DIM),
                "ve_proj": zeros(one, config.kv_dim, VALUE_EMBED_DIM),
                "ve_scale": torch.tensor([[0.1]] * one + [[1.0]] * ve),  # of all, of each
                "value_tables": zeros(extra, config.vocab_size, D),
                "visit_scales": zeros(visits, config.cross_repeat + extra, D),
                "cross_repeat_scales": zeros(L * config.cross_repeat, config.num_loops, D)}.items():
            if value.numel():  # of nothing there is no parameter
                self.register_parameter(name, nn.Parameter(value))
        self.norm_scale = nn.Buffer(
            torch.arange(1, L + 1).rsqrt() if config.ln_scale else ones(L), persistent=False)
        length, rotated = max(config.train_seq_len, config.eval_seq_len), config.rope_dims
        self.rotary = nn.Buffer(rotary_tables(
            length, rotated or config.head_dim, config.rope_base), persistent=False)
        # One graph per form of a block serves every visit, plan and evaluation.
        self.run_block, self.embed_tokens, self.norm, self.softcapped_nll = (
            maybe_compile(f, config) for f in (run_block, embed_tokens, rms_norm, softcapped_nll))
        self.add = maybe_compile(lambda *parts: functools.reduce(torch.add, parts), config)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Orthogonal input matrices, zero output matrices, Gaussian embeddings."""
        generator = torch.Generator().manual_seed(seed)
        self.embed.normal_(0, self.config.tied_embed_init_std, generator=generator)
        for matrix in self.matrices():
            if matrix.role not in ("out", "down"):
                for w_OI in matrix.parameter.data[:, matrix.rows]:
                    nn.init.orthogonal_(w_OI, generator=generator)
        for name, table in self.named(*TABLES[1:]).items():
            table.normal_(0, 0.01 if name == "ve_table" else 1.0, generator=generator)

    def matrices(self) -> list[Matrix]:
        """The matrices that Muon trains, by role."""
        k, v = self.config.model_dim, self.config.model_dim + self.config.kv_dim  # first rows
        parts = ("q", slice(k)), ("k", slice(k, v)), ("v", slice(v, None))
        whole = self.named(*MATRICES[1:], "ve_proj").items()
        return [Matrix(role, self.qkv, rows) for role, rows in parts] + [Matrix(*w) for w in whole]

    def named(self, *names: str) -> dict[str, nn.Parameter]:
        """Those of some parameters that this model has."""
        return {name: p for name, p in self.named_parameters() if name in names}

    def stacks(self) -> dict[str, nn.Parameter]:
        """The tensors that are quantised, by name: tables, and matrices over blocks."""
        return self.named(*TABLES, *MATRICES)

    def vectors(self, *but: str) -> dict[str, nn.Parameter]:
        """The tensors that stay floating-point numbers; Muon trains one of them, ve_proj."""
        return {k: p for k, p in self.named_parameters() if k not in TABLES + MATRICES + but}

    def block_weights(self) -> list[BlockWeights]:
        # A scale of outputs goes into the weights: rows of them are few, rows of a batch are many.
        out, down = self.out * self.attn_scale[:, :, None], self.down * self.mlp_scale[:, :, None]
        # Unbound once: backward through an index per visit would build a full-size gradient each.
        matrices = [p.to(self.dtype).unbind() for p in (self.qkv, out, self.up, down)]
        vectors = [p.unbind() for p in (self.resid_mix, self.q_gain, self.norm_scale)]
        fuse = triton and self.embed.is_cuda and self.dtype.itemsize == 2 and (
            torch.cuda.get_device_capability()[0] == 9)  # others may lack its shared memory
        gates = [self.config.attn_gate * p for p in self.named("attn_gate").values()]
        return [BlockWeights(*parts)._replace(slope=self.config.leaky_slope, fused=bool(fuse))
                for parts in zip(*matrices, *vectors, *gates, strict=True)]

    def rows(self, name: str) -> Sequence[Tensor]:
        """A parameter by its first dimension; nothing if the model has none."""
        return [row for p in self.named(name).values() for row in p.unbind()]

    def hidden(self, ids_BT: Tensor, plan: DepthPlan, adapter: Adapter | None = None,
               block_runner: Callable | None = None) -> Tensor:
        """Normalised output of the last block, (B, T, D) in the compute type."""
        config, weights = self.config, self.block_weights()
        skips = self.rows("skip_weights"), [gate.sigmoid() for gate in self.rows("skip_gates")]
        scales, repeats = map(self.rows, ("visit_scales", "cross_repeat_scales"))
        embedder, runner, norm = ((embed_tokens, block_runner or run_block, rms_norm) if adapter
                                  else (self.embed_tokens, self.run_block, self.norm))
        x0 = embedder(ids_BT, self.embed, self.dtype,
                      [*self.named("smear_scale", "smear_gate").values()])
        x, *x0s = Fan.apply(x0, 1 + len(plan.visits), self.add)
        values: dict[int, tuple] = defaultdict(tuple)
        shared, *own = self.rows("ve_scale") or [x0]
        for table, w_OI in zip(self.rows("ve_table"), self.rows("ve_proj"), strict=True):
            ve_BTC = shared.to(x0) * F.linear(F.embedding(ids_BT, table).to(x0), w_OI.to(x0))
            values |= {block: (ve_BTC, w) for block, w in zip(config.ve_blocks, own, strict=True)}
        sources = [x0.new_ones(())] * config.cross_repeat
        sources += [F.embedding(ids_BT, table).to(x0) for table in self.rows("value_tables")]
        outputs: list[Tensor] = []
        lane: list[Tensor] = []
        segment = config.loop_end + 1 - config.loop_start  # visits between two of a block
        for number, (block, again, form, row, skip_from) in enumerate(plan.visits):
            skip = (outputs[skip_from], *(t[row] for t in skips)) if row >= 0 else ()
            terms = [*zip(sources, *scales[number:number + 1], strict=True)]
            if repeats and again:
                terms.append((outputs[number - segment], repeats[block][again - 1]))
            lane = lane or [x.view_as(x)] * form.startswith("two")  # x twice: another graph
            tap = functools.partial(adapter, number, block) if adapter else None
            stream = Stream(x.view_as(x), x0s[number], skip, (*terms,), values[block], (*lane,))
            x, *lane = runner(stream, weights[block], form, self.rotary, self.attend, tap)
            outputs.append(x)
        for other in lane:
            x = other + self.get_parameter("lane_mix").to(x.dtype) * (x - other)
        return norm(x)

    def forward(self, ids_BT: Tensor, target_BT: Tensor, plan: DepthPlan,
                adapter: Adapter | None = None) -> Tensor:
        """Nats of all targets, float32 (B, T)."""
        logits_NV = self.logits(self.hidden(ids_BT, plan, adapter), adapter)
        return self.target_nats(logits_NV, target_BT.flatten().long()).view(target_BT.shape)

    def target_nats(self, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        return self.softcapped_nll(logits_NV, target_N, self.config.logit_softcap)

    def logits(self, x_BTD: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Logits (N, V) before their soft cap, given hidden states."""
        tap = functools.partial(adapter, -1, -1) if adapter else None
        return linear(x_BTD, self.embed.to(self.dtype), "head", tap).flatten(0, 1)

def count_parameters(model: GPT) -> dict[str, tuple[int, int]]:
    """(tensors, parameters) per optimizer group, counted as the published systems' tensors."""
    vectors = model.vectors("ve_proj")
    blocks = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "attn_gate")
    groups = {"embedding": [*model.named(*TABLES).values()],
              "matrix": [w for m in model.matrices() for w in m.parameter[:, m.rows]],
              "vector": [t for name, v in vectors.items() for t in (v if name in blocks else [v])]}
    return {name: (len(found), sum(t.numel() for t in found)) for name, found in groups.items()}

def flops_per_token(config: Config, plan: DepthPlan) -> float:
    """Operations of one training token, forward and backward; attention counts its causal half."""
    matrices = 2 * (config.model_dim + config.kv_dim + config.mlp_dim)
    per_visit = 6 * matrices + 2 * 3.5 * config.train_seq_len  # backward is 2.5 times forward
    return config.model_dim * (len(plan.visits) * per_visit + 6 * config.vocab_size)

class AttentionBackend(NamedTuple):
    """The attention kernel in use, and why the ones before it are not."""
    name: str
    attend: Attend
    rejected: dict[str, str]

def sdpa_attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal attention by PyTorch; `load_sdpa` decides which of its kernels runs."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTHK, k_BTGK, v_BTGK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

def load_sdpa(device: torch.device, kernel: str) -> Attend:
    """PyTorch attention pinned to one kernel. Raises: GolfError without a CUDA device."""
    if device.type == "cuda":  # process-wide: a context manager would break the compiled graph
        for name in ("cudnn", "flash", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(kernel == name)
    elif kernel != "math":
        raise GolfError("needs a CUDA device")
    return sdpa_attend

def load_fa3(device: torch.device) -> Attend:
    """flash-attn-3, whose package registers operators that torch.compile knows."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise GolfError("needs a GPU of compute capability 9")
    from flash_attn_interface import flash_attn_func
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = flash_attn_func(q, k, v, causal=True)
        return y[0] if isinstance(y, tuple) else y
    return attend

def attention_error(attend: Attend, device: torch.device) -> float:
    """Largest relative error of output and gradients against float32, on random input."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 256, n, 64, generator=generator) for n in (8, 4, 4, 8)]
    def run(function: Attend, device: torch.device) -> list[Tensor]:
        *leaves, dy = (t.to(device, compute_dtype(device)).requires_grad_() for t in inputs)
        gradients = torch.autograd.grad(y := function(*leaves), leaves, dy)
        return [t.detach().cpu().float() for t in (y, *gradients)]
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        wanted = run(sdpa_attend, torch.device("cpu"))
    errors = [(f - w).norm() / w.norm() for f, w in zip(run(attend, device), wanted, strict=True)]
    return float(torch.stack(errors).max())  # unlike Python's max, lets no NaN pass

def choose_attention(name: str, device: torch.device) -> AttentionBackend:
    """The named, or first exact, back-end. Raises: ConfigError."""
    rejected, tolerance = dict[str, str](), 0.02 if device.type == "cuda" else 1e-4
    for candidate in ("fa3", "cudnn", "flash", "math") if name == "auto" else (name,):
        try:
            attend = load_fa3(device) if candidate == "fa3" else load_sdpa(device, candidate)
            if not (worst := attention_error(attend, device)) <= tolerance:  # NaN is not
                raise GolfError(f"error {worst:.1e} against float32, at most {tolerance:g}")
            return AttentionBackend(candidate, attend, rejected)
        except Exception as error:  # whatever a foreign library raises only loses the choice
            rejected[candidate] = f"{type(error).__name__}: {error}".split("\n")[0][:160]
    raise ConfigError(f"ATTENTION={name}: " + "; ".join(f"{k}: {v}" for k, v in rejected.items()))

def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where matrix units exist, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32

def maybe_compile(function: Callable, config: Config) -> Callable:
    """`function`, compiled to one graph where the settings ask for it."""
    torch._dynamo.config.recompile_limit = 64  # forms of blocks, shapes of batches
    torch._functorch.config.ban_recompute_used_far_apart = False  # or float32 values are kept
    return torch.compile(function, fullgraph=True, dynamic=False) if config.compile else function

# ====  5  Optimizer  ==============================================================================
# Enters: gradients of this rank's share of a batch. Leaves: parameters, updated alike everywhere.
# Matrices go to Muon, whose momentum and work are shared out over the ranks; the rest to AdamW.
#   M matrices of one shape, laid wide   R rows   C columns (R <= C)

def lr_scale(config: Config, step: float, progress: float) -> float:
    """1, then linear down to the floor over a share of the run, or steps as long as until now."""
    iters = config.warmdown_iters * progress / max(step, 1)
    return max(config.min_lr, min(1.0, (1 - progress) / max(iters or config.warmdown_frac, 1e-9)))

def muon_momentum(step: float, config: Config) -> float:
    """Linear ramp from the warm-up start to the final momentum."""
    share, first = step / config.muon_momentum_warmup_steps, config.muon_momentum_warmup_start
    return first + min(share, 1.0) * (config.muon_momentum - first)

def orthogonalise(update_MRC: Tensor, iterations: int) -> Tensor:
    """Matrices made nearly orthogonal by odd polynomials of their singular values."""
    x = update_MRC.bfloat16()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315  # of x, x^3 and x^5; Muon (Jordan et al. 2024)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x

class MatrixGroup:
    """All matrices of one shape, laid wide, in one stack padded to a multiple of the world size."""
    def __init__(self, matrices: Sequence[Matrix], world: World) -> None:
        views = [m.parameter.data[:, m.rows] for m in matrices]
        self.matrices, self.world, self.views = matrices, world, views
        # Tall ones lie on their side: both MLP matrices share a stack, and ranks get equal work.
        self.tall = [v.shape[1] > v.shape[2] for v in views]
        self.counts = [*map(len, views), -sum(map(len, views)) % world.size]  # the last are padding
        tall_M = torch.tensor([*self.tall, False]).repeat_interleave(torch.tensor(self.counts))
        self.tall_M11 = tall_M.chunk(world.size)[world.rank].view(-1, 1, 1).to(views[0].device)
        self.momentum = views[0].new_zeros(len(self.tall_M11), *sorted(views[0].shape[1:]))

    def reduce_gradients(self) -> Tensor:
        """This rank's share of the gradients, averaged over ranks, float32 (M, R, C)."""
        gradients = [typing.cast(Tensor, m.parameter.grad)[:, m.rows] for m in self.matrices]
        parts = [g.mT if tall else g for g, tall in zip(gradients, self.tall, strict=True)]
        parts.append(parts[0].new_zeros(self.counts[-1], *parts[0].shape[1:]))
        return self.world.scatter_mean(torch.cat(parts))

    def step(self, gradient: Tensor, lr: Tensor, momentum: Tensor, config: Config) -> None:
        """Nesterov momentum, row normalisation, orthogonalisation; all ranks apply all shares."""
        self.momentum.mul_(momentum).add_(gradient)
        update = gradient + momentum * self.momentum
        if config.muon_row_normalize:  # the rows of a tall matrix lie as columns here
            columns, rows = (update.norm(dim=d, keepdim=True) for d in (1, 2))
            update = update / torch.where(self.tall_M11, columns, rows).clamp_min(1e-7)
        update = orthogonalise(update, config.muon_backend_steps)
        parts = self.world.gather(update).split(self.counts)[:-1]
        for w, tall, part in zip(self.views, self.tall, parts, strict=True):
            scale = lr * math.sqrt(max(1.0, w.shape[1] / w.shape[2]))
            w.mul_(1 - lr * config.muon_wd).sub_(scale * (part.mT if tall else part).float())

class Optimizer:
    """Muon for the matrices, AdamW for the rest, one global gradient clip for all."""
    def __init__(self, model: GPT, config: Config, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        shapes: dict[tuple[int, ...], list[Matrix]] = {}
        for m in model.matrices():
            shapes.setdefault(tuple(sorted(m.parameter[:, m.rows].shape[1:])), []).append(m)
        self.groups = [MatrixGroup(matrices, world) for matrices in shapes.values()]
        self.momenta = [group.momentum for group in self.groups]
        tables, vectors = model.named(*TABLES), model.vectors("ve_proj")
        self.replicated = [*tables.values(), *vectors.values()]
        roles = ("/".join(m.role for m in group.matrices) for group in self.groups)
        self.names = [*roles, *tables, *vectors]
        self.adam = torch.optim.AdamW(
            [dict(params=tables.values(), base=config.tied_embed_lr, weight_decay=config.embed_wd),
             dict(params=vectors.values(), base=config.scalar_lr, weight_decay=config.adam_wd)],
            lr=0.0, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)

    @torch.no_grad()
    def step(self, step: float, scale: float) -> Tensor:
        """Applies gradients at `scale` times the base rates if their norm, returned, is finite."""
        shares = [group.reduce_gradients() for group in self.groups]
        replicated = [typing.cast(Tensor, p.grad) for p in self.replicated]
        self.world.sum_all_(replicated, 1 / self.world.size)
        self.squares = torch.stack(torch._foreach_norm([*shares, *replicated])).square()
        self.world.combine(self.squares[:len(shares)])
        norm = self.squares.sum().sqrt()
        factor = ((self.config.grad_clip_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([*shares, *replicated], factor)
        bad = ~norm.isfinite()  # known to the device; nothing here waits for it
        self.adam.found_inf = bad.float()  # type: ignore[attr-defined] # the fused kernel then leaves all as it is
        for adam_group in self.adam.param_groups:
            adam_group["lr"] = adam_group["base"] * scale
        self.adam.step()
        lr = torch.where(bad, 0.0, self.config.matrix_lr * scale)
        momentum = torch.where(bad, 1.0, muon_momentum(step, self.config))
        for group, share in zip(self.groups, shares, strict=True):
            group.step(share.masked_fill_(bad, 0.0), lr, momentum, self.config)
        self.model.zero_grad()
        return norm

    # AdamW's live state; there is none before the first step.
    moments = property(lambda o: [t for state in o.adam.state.values() for t in state.values()])

# ====  6  Training  ===============================================================================
# Enters: model, batches, clock. Leaves: averaged weights and calibration statistics, in the time
# budget. The host runs two steps ahead of the device and never waits for a value it does not need.

@dataclass
class TrainState:
    """Where a run stands. With a checkpoint's tensors and the settings, it decides what follows."""
    facts: dict[str, object]  # settings, data, world and source, which must be equal
    step: int = 0
    progress: float = -1.0  # of the last step, if there was one
    plan_step: int = 0  # with which its plan began; 0: it is the first
    seconds: float = 0.0  # on the training clock
    period: int = 0  # of SWA_EVERY steps
    snapshots: int = 0  # in the average
    trained: bool = False  # the weights are averaged; calibration is next

    def average_share(self, config: Config, at: float, in_swa: bool) -> float:
        """What the newest weights weigh in the average, `at` steps after the start."""
        if config.averaging != "swa":
            warm = (self.step + 1) / (self.step + 10) if config.averaging == "ema_warm" else 1.0
            return 1 - min(config.ema_decay, warm)
        before, self.period = self.period, int(at / config.swa_every)
        due = in_swa and self.period > before
        self.snapshots += due
        return due / max(self.snapshots, 1)

    def write(self, path: Path, tensors: list[Tensor]) -> None:
        """Writes a checkpoint: an uncompressed .npz, which holds no code."""
        buffer, header = io.BytesIO(), np.array(json.dumps(asdict(self)))
        np.savez(buffer, header, *(t.detach().cpu().numpy() for t in tensors))
        write_atomically(path, buffer.getbuffer())

    @classmethod
    def read(cls, path: Path) -> Start:
        """The contents of a whole checkpoint. Raises: ArtifactError for anything else."""
        try:
            with np.load(path) as file:  # which by default unpickles nothing
                if any(member.compress_type for member in file.zip.infolist()):
                    raise ValueError("compressed")  # a small file could fill the memory
                header, *arrays = file.values()
            return cls(**json.loads(str(header))), [torch.from_numpy(a) for a in arrays]
        except Exception as error:  # whatever a foreign file provokes
            raise ArtifactError(f"{path}: no checkpoint: {error}") from None

Start = tuple[TrainState, list[Tensor]]  # where training starts, and with what

def find_start(config: Config, facts: dict[str, object], log: RunLog) -> Start:
    """The newest whole checkpoint that RESUME means, if any. Raises: ArtifactError, ConfigError."""
    newest = sorted(log.folder.glob("*.ckpt"), reverse=True)  # names sort in the order of writing
    paths = newest if config.resume in ("", "auto") else [Path(config.resume)]
    for path in paths:
        try:
            state, tensors = TrainState.read(path)
        except ArtifactError as error:
            log.warn(str(error))
            continue
        if differs := [f"{name.upper()}={value} was {state.facts.get(name)}"
                       for name, value in facts.items() if value != state.facts.get(name)]:
            raise ConfigError(f"{path} differs: " + ", ".join(differs))
        log.event("resume", step=state.step, path=str(path))
        log.line(f"resumed after step {state.step} from {path}")
        return state, tensors
    if paths:
        raise ArtifactError(f"RESUME={config.resume}: no checkpoint is whole")
    return TrainState(facts), []

class TrainingClock:
    """Budget from the first step to the last read of training data. Rank 0's decides for all."""
    def __init__(self, config: Config, world: World, reserve_seconds: float) -> None:
        self.world, self.iterations = world, config.iterations
        self.limit = (config.max_wallclock_seconds or math.inf) - reserve_seconds
        self.begin, self.marks = time.perf_counter(), deque[float](maxlen=9)  # of eight steps

    elapsed = property(lambda clock: time.perf_counter() - clock.begin)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps a block, entered with an idle device, off the clock."""
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def next_step(self, step: int, in_flight: int) -> tuple[float, bool]:
        """Progress at which to run `step`, and whether to stop instead so as to keep the limit."""
        now = self.elapsed
        self.marks.append(now)
        end = now + 1.02 * (in_flight + 1) * float(max(np.diff(self.marks), default=0.0))
        self.agreed, stopped = self.world.decide(now, end > self.limit or step >= self.iterations)
        return min(1.0, max(self.agreed / self.limit, step / self.iterations)), bool(stopped)

class Trainer:
    """The training loop and everything it keeps between steps."""
    def __init__(self, config: Config, world: World, log: RunLog, attend: Attend,
                 start: Start | None = None) -> None:
        self.config, self.world, self.log = config, world, log
        self.state, self.saved = start or (TrainState({}), [])
        self.shape = batch_shape(config, world.size)
        self.loader = TrainLoader(map(read_shard, find_shards(config.dataset_dir, "train")), config)
        self.model = GPT(config, attend, compute_dtype(world.device))
        self.model.initialise(config.seed)
        self.optimizer = Optimizer(self.model.to(world.device), config, world)
        self.weights = [p.data for p in self.model.parameters()]
        self.shadow = [p.clone() for p in self.weights]  # their moving average
        self.flight, self.micro_seconds = deque[tuple](), defaultdict[str, list[float]](list)
        self.last_loss, self.skipped, self.context = math.nan, -1, config.train_seq_len

    def forward_backward(self, plan: DepthPlan, batches: Sequence[Tensor]) -> Tensor:
        """Accumulates gradients over micro-batches; this rank's mean loss, 0-D on the device."""
        losses = []
        for rows in batches:
            pair = (t.reshape(-1, self.context) for t in (rows[:, :-1], rows[:, 1:]))
            losses.append(self.model(*pair, plan).mean())
            (losses[-1] / len(batches)).backward()
        return torch.stack(losses).detach().mean()

    def warm_up(self) -> float:
        """Compiles, without trace, what the clock will meet; the calibration reserve in seconds."""
        config, size = self.config, (self.shape.sequences, self.config.train_seq_len + 1)
        rows = torch.randint(config.vocab_size, size, dtype=torch.int32, device=self.world.device)
        for at in sorted({0.0, *dict(config.depth_schedule + config.context_schedule)} - {1.0}):
            plan, self.context = plan_at(config, at), value_at(config.context_schedule, at)
            begin = time.perf_counter()
            for _ in range(config.warmup_steps):
                self.forward_backward(plan, [rows])
            self.optimizer.step(0, 0.0)
            seconds = self.world.synchronize() - begin
            self.log.event("phase", name=f"warm_up {plan.name}", seconds=seconds)
            self.log.line(f"warm_up {plan.name}, rows of {self.context}: {seconds:.1f}s")
        torch._foreach_copy_(self.weights, self.shadow)  # which are the first ones yet
        torch._foreach_zero_([*self.optimizer.moments, *self.optimizer.momenta])
        for _ in range(2):  # the second is warm
            begin = time.perf_counter()
            collect(Hessians(self.model), rows, depth_plans(config)[-1])
            seconds = self.world.synchronize() - begin
        needed = 1.15 * seconds * calibration_share(config, self.world, self.shape) + 0.2
        slowest = self.world.combine(torch.tensor(needed), dist.ReduceOp.MAX).item()
        budget = config.max_wallclock_seconds
        require(not 0 < budget <= slowest, "max_wallclock_seconds", budget,
                f"above the {slowest:.1f}s that GPTQ_CALIBRATION_BATCHES takes here")
        return max(config.gptq_reserve_seconds, slowest)

    def run(self, validate: Callable[..., None]) -> tuple[DepthPlan, dict[str, Tensor]]:
        """The timed loop, averaging and calibration; the plan trained last and the Hessians."""
        config, log, state, reserve = self.config, self.log, self.state, 0.0
        if not state.trained:
            reserve = self.warm_up()
            log.put("train", startup_seconds=time.time() - log.started)
            log.line(f"gptq:reserving {reserve:.1f}s of {config.max_wallclock_seconds:g}s")
        live, world = [*self.replicated, *self.optimizer.momenta], self.world
        for mine, value in zip(live, self.saved, strict=False):  # which may be weights alone
            mine.copy_(value if value.shape == mine.shape else value.chunk(world.size)[world.rank])
        world.synchronize()
        self.clock = TrainingClock(config, world, reserve)
        self.clock.begin -= state.seconds
        if not state.trained:
            self.train(validate)
        plan = plan_at(config, state.progress)
        hessians, budget = self.calibrate(plan), config.max_wallclock_seconds
        log.put("clocks", training_seconds=self.clock.elapsed, training_budget_seconds=budget)
        return plan, hessians

    def train(self, validate: Callable[..., None]) -> None:
        """The loop, until averaged weights, or after a signal a checkpoint, are on disk."""
        config, log, clock, world = self.config, self.log, self.clock, self.world
        state, stream = self.state, batch_stream(self.loader, self.shape, world, self.state.step)
        saved, world.deferring = state.seconds, True
        for step in range(state.step, config.iterations + 1):
            self.drain(2)  # the steps that the host runs ahead
            progress, stopped = clock.next_step(step, len(self.flight))
            progress = max(progress, state.progress)  # a resumed clock may lag
            plan, last_plan = (plan_at(config, at) for at in (progress, state.progress))
            if world.stopping or 0 < config.checkpoint_every <= clock.agreed - saved:
                self.save()
                saved = clock.agreed
            if world.stopping:
                raise KeyboardInterrupt("stopped by a signal")
            if config.val_loss_every and (stopped or step % config.val_loss_every == 0):
                self.drain(0)
                with clock.paused():
                    validate(step, last_plan, stopped)
            if stopped:
                break
            if plan != last_plan:
                state.plan_step = step + 1
                log.event("plan", step=step + 1, plan=plan.name, progress=progress)
                log.line(f"layer_loop:enabled step:{step+1} frac:{progress:.3f} {plan.describe()}")
            self.take_step(plan, progress, next(stream))
            state.step, state.progress = step + 1, progress
        stream.close()
        self.drain(0)
        self.update_average((config.averaging == "swa") / (state.snapshots + 1))
        torch._foreach_copy_(self.weights, self.shadow)
        self.summarise(clock.elapsed)
        state.trained = True
        self.save()
        world.deferring = False
        if world.signalled:
            raise KeyboardInterrupt("stopped by a signal")

    # What a checkpoint holds and all ranks have alike, in its order.
    replicated = property(lambda t: [*t.weights, *t.shadow, *t.optimizer.moments])

    def save(self) -> None:
        """Writes a checkpoint, off the clock. If it cannot, it warns: the run is worth more."""
        self.drain(0)
        log, state, begin = self.log, self.state, time.perf_counter()
        name = "weights.ckpt" if state.trained else f"step-{state.step:08}.ckpt"
        state.seconds = self.clock.elapsed
        with self.clock.paused():
            tensors = self.weights if state.trained else [
                *self.replicated, *map(self.world.gather, self.optimizer.momenta)]
            try:
                if log.files:
                    state.write(log.folder / name, tensors)
                    for old in sorted(log.folder.glob("step-*"))[:-3]:
                        old.unlink()
                    log.write_result("partial", "training")
            except OSError as error:
                log.warn(f"no checkpoint: {error}")
        log.event("checkpoint", step=state.step, name=name, seconds=time.perf_counter() - begin)

    def mark(self) -> torch.cuda.Event | float:
        """When the device gets to what it is given from now on; on CPU, the time."""
        return (torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
                if self.world.is_cuda else time.perf_counter())

    def take_step(self, plan: DepthPlan, progress: float, batches: Sequence[Tensor]) -> None:
        """Gives the device one step, and the average its share of the new weights."""
        config, state = self.config, self.state
        at = config.schedule_steps * progress or state.step  # the step that settings in steps mean
        scale, begin = lr_scale(config, at, progress), self.mark()
        self.context = value_at(config.context_schedule, progress)
        with torch._dynamo.config.patch(error_on_recompile=True):  # the error names the guard
            loss = self.forward_backward(plan, batches)
        middle = self.mark()
        values = torch.stack([loss, self.optimizer.step(at, scale)]).to("cpu", non_blocking=True)
        self.flight.append((state.step + 1, plan, progress, scale, values,  # not on the host yet
                            self.optimizer.squares, begin, middle, self.mark()))
        in_swa = plan == depth_plans(config)[-1] and scale < config.swa_start_frac
        self.update_average(state.average_share(config, at + 1, in_swa))  # numbered from one

    def update_average(self, share: float) -> None:
        """Gives the newest weights their share of the average."""
        if share:  # between snapshots there is none
            torch._foreach_lerp_(self.shadow, self.weights, share)

    def drain(self, most_in_flight: int) -> None:
        log, config, cuda = self.log, self.config, self.world.is_cuda
        while len(self.flight) > most_in_flight:
            step, plan, progress, scale, values, squares, begin, *ends = self.flight.popleft()
            if cuda:
                ends[-1].synchronize()
            micro, whole = (begin.elapsed_time(end) / 1e3 if cuda else end - begin for end in ends)
            self.last_loss, norm = values.tolist()
            if not math.isfinite(norm):
                self.skip(step, norm, squares.tolist())
            self.micro_seconds[plan.name].append(micro)
            if step <= 5 or step % config.train_log_every == 0:
                tok_s = config.train_batch_tokens / whole
                log.event("train", step=step, train_loss=self.last_loss, gradient_norm=norm,
                          train_seconds=self.clock.elapsed, lr_scale=scale, tok_s=tok_s, plan=
                          plan.name, mem_mib=torch.cuda.memory_allocated() >> 20, progress=progress)
                log.line(f"{step}/{config.iterations} train_loss: {self.last_loss:.4f} "
                         f"step_time: {1e3 * whole:.1f}ms tok/s: {tok_s:.0f}")

    def skip(self, step: int, norm: float, squares: list[float]) -> None:
        """Notes a step without effect. Raises: GolfError if the one before had none either."""
        losses = self.world.gather(torch.tensor([self.last_loss]).to(self.world.device)).tolist()
        names = np.array(self.optimizer.names)[~np.isfinite(squares)].tolist()
        text = f"step {step}: gradient norm={norm}, losses by rank: {losses}, not finite in {names}"
        if self.skipped == step - 1:
            raise GolfError(f"{text}, as in the step before")
        self.skipped = step
        self.log.warn(f"skipped {text}")

    def calibrate(self, plan: DepthPlan) -> dict[str, Tensor]:
        """Second moments of every linear layer's input over training windows and all ranks."""
        begin, hessians = time.perf_counter(), Hessians(self.model)
        stream = batch_stream(self.loader, self.shape._replace(micro_steps=1), self.world)
        for _ in range(calibration_share(self.config, self.world, self.shape)):
            collect(hessians, next(stream)[0], plan)
        stream.close()
        moments = {name: self.world.combine(h) for name, h in hessians.moments.items()}
        seconds = self.world.synchronize() - begin
        self.log.put("quantisation", seconds_hessians=seconds)
        self.log.line(f"GPTQ:collected {len(moments)} Hessians in {seconds:.1f}s")
        return moments

    def summarise(self, seconds: float) -> None:
        log, per_step, steps = self.log, self.config.train_batch_tokens, self.state.step
        tokens, peak = steps * per_step, torch.cuda.max_memory_allocated() >> 20  # 0 on CPU
        by_plan = {name: round(per_step / np.median(t)) for name, t in self.micro_seconds.items()}
        log.put("train", steps=steps, seconds=seconds, tokens=tokens, tok_s=tokens / seconds,
                ms_per_step=1e3 * seconds / max(steps, 1), tok_s_by_plan=by_plan,
                loop_enabled_step=self.state.plan_step, final_loss=self.last_loss, peak_mib=peak)
        log.put("data", passes=tokens / self.loader.num_tokens)
        log.line(f"training: {steps} steps, {seconds:.1f}s, {tokens / seconds:.0f} tok/s, "
                 f"micro-steps only {by_plan}, peak memory {peak} MiB")

# ====  7  Quantisation  ===========================================================================
# Enters: averaged weights and Hessians (second moments of every linear layer's inputs). Leaves:
# integers with scales of rows and columns.   L blocks   R rows (outputs)   C columns (inputs)

class Hessians:
    """An adapter that changes nothing and sums x x^T of every linear layer over all visits."""
    def __init__(self, model: GPT) -> None:
        self.model, self.moments = model, defaultdict[str, Any](float)

    def __call__(self, visit: int, block: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        x_NC = x.flatten(0, -2).float()
        self.moments[hessian_name(site, block)] += x_NC.T @ x_NC
        return y

def hessian_name(stack: str, block: int) -> str:
    """The site that feeds a block of a stack; the embedding is the head."""
    return "head" if block < 0 or stack == "embed" else f"{stack}.{block}"

def collect(hessians: Hessians, rows: Tensor, plan: DepthPlan) -> None:
    """One calibration batch (sequences, seq_len + 1); an eighth of it also gives gradients."""
    model, names, outputs = hessians.model, [], []
    with torch.no_grad():
        x_BTD = model.hidden(rows[:, :-1], plan, hessians)
        hessians(-1, -1, "head", x_BTD, x_BTD)
    if model.config.quantiser != "rate":
        return
    def keep(visit: int, block: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        names.append(hessian_name(site, block) + ".rows")
        outputs.append(y)
        return y
    few, scales = rows[:-(-len(rows) // 8)], {"out": model.attn_scale, "down": model.mlp_scale}
    nats = model(few[:, :-1], few[:, 1:], plan, keep).sum()
    for name, gradient in zip(names, torch.autograd.grad(nats, outputs), strict=True):
        mean_1R = gradient.flatten(0, -2).float().square().mean(0, keepdim=True)
        site, block, *_ = name.split(".")
        if site in scales:  # what such a layer puts out is scaled already
            mean_1R *= scales[site][int(block)].detach().square()
        hessians.moments[name] += mean_1R * (rows[:, 1:].numel() / names.count(name))

def calibration_share(config: Config, world: World, shape: BatchShape) -> int:
    """Calibration batches of one rank, so that all ranks together read the configured tokens."""
    per_batch = config.micro_batch_tokens // config.train_seq_len
    return -(-config.gptq_calibration_batches * per_batch // (shape.sequences * world.size))

def prepare_solver(hessian_CC: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Columns by descending diagonal, and so ordered the upper factor of the damped inverse."""
    if not torch.isfinite(hessian_CC).all():
        raise GolfError("a calibration Hessian is not finite")
    diagonal_C, order_C = hessian_CC.diagonal().sort(descending=True, stable=True)
    eye_CC, failed = torch.eye(len(order_C)).to(hessian_CC), True
    # Factored back to front, so that inverting the triangle gives the inverse's factor.
    reverse_CC = hessian_CC[order_C][:, order_C].flip(0, 1)
    while failed:
        ridge_CC = damp * (diagonal_C.mean() + 1e-30) * eye_CC
        lower_CC, failed = torch.linalg.cholesky_ex(reverse_CC + ridge_CC)
        damp *= 10
    return order_C, torch.linalg.solve_triangular(lower_CC.flip(0, 1), eye_CC, upper=True)

class QuantRule(NamedTuple):
    """How a class of tensors becomes integers from -qmax to qmax."""
    qmax: int
    solver: str  # gptq, rate or nearest
    clips: list[float]  # of rows, to try: up to 1 quantiles, else standard deviations

def quant_rule(config: Config, stack: str) -> QuantRule:
    """The rule for a stacked tensor; only the token table has inputs to learn a better one from."""
    part = {"qkv": "attn", "out": "attn", "up": "mlp", "down": "mlp"}.get(stack, "embed")
    clips = config.embed_clip_sigmas if part == "embed" else config.matrix_clip_sigmas
    learns = stack in MATRICES or (stack == "embed" and config.quantiser != "gptq_matrices")
    solver = config.quantiser.removesuffix("_matrices") if learns else "nearest"
    qmax = 127 if solver == "rate" else getattr(config, f"{part}_qmax")
    return QuantRule(qmax, solver, numbers("clip_sigmas", clips))

def row_scales(w_RC: Tensor, clip: float, qmax: int, widen: float = 1, floor: float = 0) -> Tensor:
    """Steps of rows, float16 (R,): larger ones mean fewer bytes and more error."""
    width_R = w_RC.abs().quantile(clip, 1) if clip <= 1 else clip * w_RC.std(1).nan_to_num(0.0)
    return (widen / qmax * width_R.clamp_min(floor)).clamp(2**-24, 65_504).half()

def coarse(values: Tensor, bits: int, dither: Tensor | int) -> Tensor:
    """Float16 of few mantissa bits, which cost little to store; dither keeps the mean."""
    step = 1 << 10 - bits
    return ((values.half().view(torch.int16) + dither % step) & -step).short().view(torch.float16)

def balanced_steps(w_RC: Tensor, hessians: dict[str, Tensor], key: str,
                   solver: tuple[Tensor, Tensor], unit: float) -> tuple[Tensor, Tensor]:
    """Steps of rows and of columns, float16, at which one more bit buys the same everywhere.
    Feedback leaves a column the error of its pivot, for which later columns cannot make up. An
    output's costs its mean squared gradient, whose noise makes powers below one better."""
    tokens = hessians["head"].trace() / len(hessians["head"])  # of normalised inputs
    gradient_R, (order_C, factor_CC) = hessians[key + ".rows"][0] / tokens, solver
    pivot_C = (factor_CC.diagonal() * tokens.sqrt()).reciprocal()[order_C.argsort()]
    middle, mean = pivot_C.log().mean().exp(), gradient_R.mean()
    column_C = coarse((middle / pivot_C).clamp(2**-8, 2**8), 2, 128)
    # Rows of the embedding are inputs as well, of which the head's gradient knows nothing.
    row_R = (gradient_R + 0.1 * mean) ** (0.0 if key == "head" else -0.25)
    row_R *= 2e-4 * unit / row_R.log().mean().exp() * (mean.sqrt() * middle) ** -0.8
    row_R = row_R.maximum((w_RC / column_C).abs().amax(1) / 127).clamp(2**-14, 60_000)
    return coarse(row_R, 3, 79 * torch.arange(len(row_R), device=row_R.device)), column_C

def gptq(w_LCR: Tensor, factor_LCC: Tensor, max_level: int, bit_cost: float = 0.0,
         block: int = 128) -> Tensor:
    """Integers (L, C, R) that keep outputs close, in steps. Source: GPTQ (Frantar et al. 2022).
    Columns lie as rows; later ones take up the error of each. A level's bits move its threshold."""
    # What adds up is done matrix by matrix, so that it is equal at every world size.
    sizes = [s.mean(1, keepdim=True) * (s.mean(0) / s.mean()) for s in w_LCR.abs() + 1e-6]
    shift_LCR = (bit_cost / torch.stack(sizes)).clamp(max=0.3)
    w_LCR, errors, last = w_LCR.clone(), torch.empty_like(w_LCR), 0
    while last < w_LCR.shape[1]:
        first, last = last, min(last + block, w_LCR.shape[1])
        for j in range(first, last):
            w_LR = w_LCR[:, j]
            level_LR = (w_LR - shift_LCR[:, j] * w_LR.sign()).round_().clamp_(-max_level, max_level)
            errors[:, j] = error_LR = (w_LR - level_LR) / factor_LCC[:, j, j, None]
            w_LCR[:, j:last].addcmul_(factor_LCC[:, j, j:last, None], error_LR[:, None], value=-1)
            w_LR.copy_(level_LR)
        for w_CR, factor_CC, error_CR in zip(w_LCR, factor_LCC, errors, strict=True):
            w_CR[last:].addmm_(factor_CC[first:last, last:].T, error_CR[first:last], alpha=-1)
    return w_LCR

class QuantisedModel(NamedTuple):
    """Everything an artifact holds, on the CPU."""
    integers: dict[str, Tensor]  # int8 (..., R, C)
    floats: dict[str, Tensor]  # float16: scales of rows and columns, and the small parameters

@torch.no_grad()
def quantise(model: GPT, hessians: dict[str, Tensor], world: World, widen: float = 1.0,
             known: dict[str, tuple[Tensor, Tensor]] | None = None) -> QuantisedModel:
    """Quantises every stack, each rank its share of the blocks; `known` serves later passes."""
    config, integers, known = model.config, {}, {} if known is None else known
    floats = dict[str, Tensor](model.vectors())
    for name, stack in model.stacks().items():
        rule, stack_LRC = quant_rule(config, name), stack.view(-1, *stack.shape[-2:])
        balanced, nearest = (rule.solver == solver for solver in ("rate", "nearest"))
        levels = torch.zeros_like(stack_LRC, dtype=torch.int8)
        scales, columns = (levels.select(dim, 0).half() for dim in (2, 1))
        best_LR, eye_CC = scales.float() + math.inf, torch.eye(stack.shape[-1]).to(stack)
        own = range(world.rank, len(stack_LRC), world.size)
        for clip in rule.clips * bool(own):
            weights, factors, steps = [], [], []
            for block in own:
                # Where inputs are taken as uncorrelated, the solver rounds to nearest.
                key = f"{len(eye_CC)} columns" if nearest else hessian_name(name, block)
                w_RC, hessian_CC = stack_LRC[block], eye_CC if nearest else hessians[key]
                solver = known.get(key) or prepare_solver(hessian_CC, config.gptq_damp)
                known[key] = order_C, factor_CC = solver
                scale_R, column_C = (
                    balanced_steps(w_RC, hessians, key, solver, widen) if balanced else
                    (row_scales(w_RC, clip, rule.qmax, widen, config.clip_floor), eye_CC[0] ** 0))
                steps.append((scale_R, column_C, order_C.argsort()))
                # An input that never occurs gets no weight.
                w_RC = w_RC / scale_R[:, None] / column_C * (hessian_CC.diagonal() > 0)
                weights.append(w_RC.T[order_C])
                factors.append(factor_CC / column_C[order_C])
            solved = gptq(torch.stack(weights), torch.stack(factors), rule.qmax, 0.02 * balanced)
            for block, q_CR, (scale_R, column_C, place_C) in zip(own, solved, steps, strict=True):
                q_RC = q_CR[place_C].T
                off_RC = q_RC * scale_R[:, None] * column_C - stack_LRC[block]
                error_R = off_RC.square().sum(1 if nearest else (0, 1))  # or of the solved whole
                better_R = error_R < best_LR[block]
                best_LR[block] = error_R.minimum(best_LR[block])
                levels[block][better_R] = q_RC[better_R].to(torch.int8)
                scales[block][better_R], columns[block] = scale_R[better_R], column_C
        integers[name] = world.combine(levels).view_as(stack).cpu()
        floats[f"{name}.scale"] = world.combine(scales).view_as(stack[..., 0])
        floats[f"{name}.column"] = world.combine(columns).view_as(stack[..., 0, :])
    return QuantisedModel(integers, {name: t.half().cpu() for name, t in floats.items()})

def prune_ones(quantised: QuantisedModel, share: float) -> int:
    """Makes zeros of the ones in that share of matrix rows, finest first; their number."""
    scales = [quantised.floats[f"{name}.scale"].flatten() for name in MATRICES]
    place, count = torch.cat(scales).argsort(stable=True).argsort(), 0
    for name, rows in zip(MATRICES, place.split([*map(len, scales)]), strict=True):
        q = quantised.integers[name]
        ones = (q.abs() == 1) & (rows.view(q.shape[:-1])[..., None] < share * len(place))
        count += int(ones.sum())
        q[ones] = 0
    return count

def stored_weights(quantised: QuantisedModel, name: str) -> Tensor:
    """The float32 stack that the integers, row scales and column scales of `name` stand for."""
    scale, column = (quantised.floats[f"{name}.{kind}"].float() for kind in ("scale", "column"))
    return quantised.integers[name] * scale[..., None] * column[..., None, :]

@torch.no_grad()
def restore_weights(model: GPT, quantised: QuantisedModel) -> None:
    """Sets the model's parameters to what the integers stand for."""
    for name, parameter in model.named_parameters():
        is_stack = name in quantised.integers
        parameter.copy_(stored_weights(quantised, name) if is_stack else quantised.floats[name])

def tensor_report(model: GPT, quantised: QuantisedModel) -> Iterator[dict[str, object]]:
    """Entropy in bits per weight and relative error of every stack."""
    for name, q in quantised.integers.items():
        w, rule = model.get_parameter(name).detach().cpu(), quant_rule(model.config, name)
        error = float((w - stored_weights(quantised, name)).norm() / w.norm())
        yield dict(name=name, bits=round(entropy_bits(q) / q.numel(), 4), error=error,
                   qmax=rule.qmax, range_bits=math.log2(2 * rule.qmax + 1), solver=rule.solver)

def entropy_bits(levels: Tensor) -> float:
    """Order-0 entropy of a stack of integers in bits, with one histogram per matrix."""
    matrices = levels.view(-1, levels.shape[-2:].numel()).numpy().view(np.uint8)
    counts = np.stack([np.bincount(matrix, minlength=256) for matrix in matrices])
    return float((counts * np.log2(matrices.shape[1] / counts.clip(1))).sum())

def estimate_artifact_bytes(config: Config) -> int:
    """Bytes of program and model to expect before training, as if rows were Gaussian."""
    if config.quantiser == "rate":
        return config.artifact_cap_bytes
    integers, floats = expected_shapes(config)
    total = len(packed_program()) + 1.3 * sum(shape.numel() for shape in floats.values())
    for name, shape in integers.items():
        rule = quant_rule(config, name)
        clip = max(rule.clips) if rule.clips[0] > 1 else 4.0  # about where such quantiles lie
        bits = 2.047 - math.log2(clip / rule.qmax)  # entropy of a bell in such steps
        total += 1.01 * shape.numel() * max(bits, 0.05) / 8
    return int(total)

# ====  8  Artifact  ===============================================================================
# Enters: a `QuantisedModel`. Leaves: one flat file, and back. Nothing in it is executed, it is
# compared with the settings before memory is taken. The packed program, too, is made here.
#   magic | JSON header, streams, each behind its length | start of the SHA-256 of it all

ARTIFACT_MAGIC = b"GOLF\x00\x02\r\n"
PIECE = 1 << 19  # of a brotli stream: many small ones share out among cores
SLOTS = 1 << 15  # the sum of a context's frequencies
CONTEXTS = 64
FIRST_MAGNITUDE = 0x3D800000  # the bits of 1/16 as float32
LevelTables = tuple[np.ndarray, np.ndarray]

# Settings without which the weights mean something else.
MODEL_SETTINGS = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult",
                  "rope_base", "rope_dims", "ln_scale", "xsa_last_n", "parallel_residual_start",
                  "logit_softcap", "num_loops", "loop_start", "loop_end", "residual", "max_skips",
                  "ve_layers", "num_value_embeds", "prog_depth", "cross_repeat", "leaky_slope",
                  "smear_gate", "attn_gate")

def codec_of(config: Config) -> str:
    """The coder of levels in use. Raises: ConfigError if time would go into a model without it."""
    with contextlib.suppress(ImportError):
        from brotli import Decompressor
        if hasattr(Decompressor, "can_accept_more_data"):
            missing = config.compressor == "zstd" and not importlib.util.find_spec("zstandard")
            return "brotli" if missing else config.compressor
    raise ConfigError(f"COMPRESSOR={config.compressor} needs: pip install -U 'brotli>=1.2'")

def compress(data: np.ndarray | bytes, *, codec: str = "brotli") -> bytes:
    """Bytes, or those of an array, as a brotli or zstd stream."""
    if codec == "zstd":
        from zstandard import ZstdCompressor
        return ZstdCompressor(level=22).compress(bytes(data))
    import brotli
    return brotli.compress(bytes(data), quality=11, lgwin=24)

def decompress(data: bytes, shape: Sequence[int], *, codec: str = "brotli") -> np.ndarray:
    """The inverse of `compress`, int8. Raises: ArtifactError unless just the shape comes out."""
    size, out, whole = math.prod(shape), b"", True
    with contextlib.suppress(Exception):  # one byte more, not whatever it would expand to
        if codec == "zstd":
            from zstandard import ZstdDecompressor
            out = ZstdDecompressor().stream_reader(data).read(size + 1)
        else:
            from brotli import Decompressor
            out = (decoder := Decompressor()).process(data, output_buffer_limit=size + 1)
            whole = decoder.is_finished()
    if len(out) != size or not whole:
        raise ArtifactError(f"a {codec} stream does not decode to {size} bytes")
    return np.frombuffer(out, np.int8).reshape(shape)

def expected_shapes(config: Config) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Shapes of a file's integers and float16 tensors, in order; takes no memory."""
    with torch.device("meta"):
        model = GPT(config, sdpa_attend)
    integers = {name: p.shape for name, p in model.stacks().items()}
    floats = {name: p.shape for name, p in model.vectors().items()}
    for name, shape in integers.items():
        floats |= {f"{name}.scale": shape[:-1], f"{name}.column": shape[:-2] + shape[-1:]}
    return integers, floats

def stream_parts(levels: Tensor, codec: str) -> Sequence[Tensor]:
    """What of a stack goes into each stream: all of it for the adaptive coder, else pieces."""
    return [levels.view(-1, *levels.shape[-2:])] if codec == "ans" else levels.view(-1).split(PIECE)

def class_magnitude(classes: np.ndarray, shift: int) -> np.ndarray:
    """The float32 magnitudes at which classes begin, 2**(23 - shift) of them per octave."""
    return (classes.astype(np.int32) * (1 << shift) + FIRST_MAGNITUDE).view(np.float32)

def magnitude_class(magnitude: np.ndarray, shift: int) -> np.ndarray:
    """The class in which a float32 magnitude lies."""
    return np.clip((magnitude.view(np.int32) - FIRST_MAGNITUDE) >> shift, 0, CONTEXTS - 1)

def level_tables(counts: np.ndarray) -> LevelTables:
    """By context: frequency and start of every level, packed, and the level of every slot."""
    freq = counts * (SLOTS - counts.shape[1]) // counts.sum(1, keepdims=True) + 1
    freq[np.arange(CONTEXTS), counts.argmax(1)] += SLOTS - freq.sum(1)
    numbers = np.tile(np.arange(counts.shape[1], dtype=np.uint8), CONTEXTS)
    return ((freq << 16 | freq.cumsum(1) - freq).astype(np.uint32),
            np.repeat(numbers, freq.ravel()).reshape(CONTEXTS, SLOTS))

def walk_levels(levels_LRC: np.ndarray, row_LR: np.ndarray, limits: Sequence[int],
                visit: Callable[[np.ndarray, np.ndarray, LevelTables], np.ndarray]) -> None:
    """Lets `visit` see, or set, a stack row after row, given what a decoder knows by then.
    A level's context is its expected magnitude: its row's class times what its column has shown.
    Integers and single float32 operations give the same on every machine."""
    low, size = limits[0], max(3, limits[1] - limits[0] + 1)
    ratio = np.arange(low, low + size) / class_magnitude(np.arange(CONTEXTS), 20)[:, None]
    tail = np.square(np.square(1 + np.square(ratio.astype(np.float64)) / 23))
    counts = (4096 / np.square(tail)).astype(np.int64) + 1
    tables, patience, new = level_tables(counts), 2048, []
    row_RL1 = class_magnitude(row_LR.T, 21)[..., None]
    rows_L1 = 8 * row_RL1[0]
    shown_LC = rows_L1.repeat(levels_LRC.shape[2], 1)
    for number, row_L1 in enumerate(row_RL1):
        context_LC = magnitude_class(shown_LC * (row_L1 / rows_L1), 20)
        symbol_LC = visit(context_LC, levels_LRC[:, number].astype(np.int32) - low, tables)
        levels_LRC[:, number] = symbol_LC + low
        shown_LC += np.abs(symbol_LC + low)
        rows_L1 += row_L1
        new.append((context_LC * size + symbol_LC).ravel())
        if len(new) * symbol_LC.size > patience:
            counts += 64 * np.bincount(np.concatenate(new), None, counts.size).reshape(counts.shape)
            tables, patience, new = level_tables(counts), min(2 * patience, 1 << 20), []

def num_lanes(shape: Sequence[int]) -> int:
    """Coder states that advance together: more are faster, and each costs two bytes."""
    return max(16, min(512, math.prod(shape) >> 14))

def encode_levels(levels_LRC: np.ndarray) -> bytes:
    """A stack of int8 as one stream: limits, classes of rows, the coder's states, its words.
    Source: asymmetric numeral systems (Duda 2013), many of them interleaved (Giesen 2014)."""
    row_LR = magnitude_class(np.abs(levels_LRC, dtype=np.float32).mean(2), 21).astype(np.int8)
    limits, classes = np.array([levels_LRC.min(), levels_LRC.max()]), compress(row_LR)
    lanes, rows = num_lanes(levels_LRC.shape), list[np.ndarray]()
    def record(context: np.ndarray, symbols: np.ndarray, tables: LevelTables) -> np.ndarray:
        rows.append(tables[0][context, symbols].ravel())
        return symbols
    walk_levels(levels_LRC.copy(), row_LR, limits.tolist(), record)
    states, words = np.full(lanes, 1 << 16, "<u4"), list[bytes]()
    for row in reversed(rows):
        for begin in reversed(range(0, len(row), lanes)):
            cell = row[begin:begin + lanes]
            freq, x = cell >> 16, states[:len(cell)]
            full = np.flatnonzero(x >= freq << 17)
            words.append(x[full].astype("<u2").tobytes())
            x[full] >>= 16
            x += x // freq * (SLOTS - freq) + (cell & 0xFFFF)
    return b"".join([limits.tobytes(), len(classes).to_bytes(4, "little"), classes,
                     states.tobytes(), *words[::-1]])

def decode_levels(data: bytes, shape: Sequence[int]) -> np.ndarray:
    """The inverse. Raises: ArtifactError, ValueError or IndexError if it ends not as it began."""
    levels_LRC, lanes, words = np.zeros(shape, np.int8), num_lanes(shape), io.BytesIO(data)
    def take(context: np.ndarray, symbols: np.ndarray, tables: LevelTables) -> np.ndarray:
        contexts, out = context.ravel(), symbols.ravel()
        for begin in range(0, len(out), lanes):
            some = slice(begin, begin + lanes)
            x = states[:len(out[some])]
            slot = x & SLOTS - 1
            out[some] = symbol = tables[1][contexts[some], slot]
            cell = tables[0][contexts[some], symbol]
            x[:] = (x >> 15) * (cell >> 16) + slot - (cell & 0xFFFF)
            empty = np.flatnonzero(x < 1 << 16)
            x[empty] = x[empty] << 16 | np.frombuffer(words.read(2 * len(empty)), "<u2")
        return out.reshape(context.shape)
    limits = np.frombuffer(words.read(2), np.int8).tolist()
    row_LR = decompress(words.read(int.from_bytes(words.read(4), "little")), shape[:2])
    states = np.frombuffer(words.read(4 * lanes), "<u4").copy()
    walk_levels(levels_LRC, row_LR, limits, take)
    if words.read() or (states != 1 << 16).any():
        raise ArtifactError("a stream of levels does not end where it began")
    return levels_LRC

CODERS: dict[str, Sequence[Callable]] = {
    "brotli": (compress, decompress), "ans": (encode_levels, decode_levels),
    "zstd": tuple(functools.partial(f, codec="zstd") for f in (compress, decompress))}

def encode_artifact(quantised: QuantisedModel, config: Config, plan: DepthPlan) -> bytes:
    """The artifact file: streams of levels, and one of brotli for float16 values."""
    (integers, floats), codec = expected_shapes(config), codec_of(config)
    parts = [p.numpy() for name in integers for p in stream_parts(quantised.integers[name], codec)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # both coders let go of the interpreter
        streams = [*pool.map(CODERS[codec][0], parts)]
    # Low bytes apart from high bytes: exponents compress, mantissas do not.
    values = torch.cat([quantised.floats[name].flatten() for name in floats])
    streams.append(compress(values.view(torch.int8).view(-1, 2).T.numpy()))
    header = dict(preset=config.preset, plan=plan.name, codec=codec,
                  settings={name: getattr(config, name) for name in MODEL_SETTINGS})
    frames = [json.dumps(header, separators=(",", ":")).encode(), *streams]
    body = ARTIFACT_MAGIC + b"".join(len(f).to_bytes(4, "little") + f for f in frames)
    return body + hashlib.sha256(body).digest()[:16]

def decode_artifact(data: bytes, config: Config) -> tuple[DepthPlan, QuantisedModel]:
    """Plan and contents of a whole file of this model. Raises: ArtifactError for anything else."""
    body, frames = io.BytesIO(data[len(ARTIFACT_MAGIC):-16]), []
    if data[:8] != ARTIFACT_MAGIC or hashlib.sha256(data[:-16]).digest()[:16] != data[-16:]:
        raise ArtifactError(f"{len(data)} bytes that begin with {data[:8]!r}: not an artifact of "
                            "this version, or damaged (checksum)")
    try:
        while size := body.read(4):
            frames.append(body.read(int.from_bytes(size, "little")))
        header = json.loads(frames.pop(0))  # compared first: a small file can claim a large model
        for name in MODEL_SETTINGS:
            claimed, wanted = header["settings"][name], getattr(config, name)
            if claimed != wanted:
                raise ArtifactError(f"{name.upper()}={claimed}, but the settings say {wanted}; "
                                    "PRESET=" + header["preset"])
        plan = {plan.name: plan for plan in depth_plans(config)}[header["plan"]]
        (stacks, small), codec = expected_shapes(config), header["codec"]
        sizes = [shape.numel() for shape in small.values()]
        halves = torch.tensor(decompress(frames.pop(), (2, sum(sizes))).T.copy())
        values = zip(small.items(), halves.view(torch.float16).flatten().split(sizes), strict=True)
        integers = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in stacks.items()}
        parts = [part for levels in integers.values() for part in stream_parts(levels, codec)]
        for part, stream in zip(parts, frames, strict=True):
            part.copy_(torch.tensor(CODERS[codec][1](stream, part.shape)))
        return plan, QuantisedModel(integers, {k: v.view(shape) for (k, shape), v in values})
    except (ValueError, TypeError, LookupError, RecursionError, ImportError) as error:
        raise ArtifactError(f"malformed: {error!r}") from None

def open_artifact(path: Path, config: Config) -> tuple[DepthPlan, QuantisedModel]:
    """Plan and contents of the file at `path`. Raises: ArtifactError unless of this model."""
    try:
        return decode_artifact(path.read_bytes(), config)
    except (OSError, ArtifactError) as error:
        raise ArtifactError(f"{path}: {error}") from None

def load_artifact(path: Path, config: Config, world: World,
                  attend: Attend) -> tuple[GPT, DepthPlan]:
    """The model and the depth plan that the file at `path` stands for. Raises: ArtifactError."""
    plan, quantised = open_artifact(path, config)
    model = GPT(config, attend, compute_dtype(world.device)).to(world.device)
    restore_weights(model, quantised)
    return model, plan

def next_factor(sizes: Mapping[float, int], target: float, slope: float) -> float:
    """The logarithm of steps for `target` bytes: by a secant, or halfway where that goes astray."""
    near, *others = sorted(sizes, key=lambda at: abs(sizes[at] - target))[:2]
    for other in others:
        slope = min((sizes[other] - sizes[near]) / (other - near), 0.1 * slope)
    at = near + max(-3.0, min(3.0, (target - sizes[near]) / slope))
    low = max((at for at in sizes if sizes[at] > target), default=-math.inf)
    high = min((at for at in sizes if sizes[at] <= target), default=math.inf)
    return at if low < at < high or math.isinf(high - low) else (low + high) / 2

def fit_to_cap(model: GPT, hessians: dict[str, Tensor], plan: DepthPlan, world: World,
               log: RunLog) -> tuple[QuantisedModel, bytes]:
    """Integers and file that fit ARTIFACT_CAP_BYTES with the program. Raises: ArtifactError.
    FIT searches one factor on all steps: clips are only ever widened, balanced steps shrink too."""
    config, known, sizes = model.config, dict[str, tuple](), dict[float, int]()
    cap, least = config.artifact_cap_bytes, -3.0 if config.quantiser == "rate" else 0.0
    most = 1.0 if config.prune else 99.0  # all rows, or no bound
    slope, best, at = -sum(p.numel() for p in model.stacks().values()) / 8, None, 0.0
    while at not in sizes and len(sizes) < 20:
        begin, widen = time.perf_counter(), 1.0 if config.prune else 2**at
        quantised = quantise(model, hessians, world, widen, known)
        pruned = prune_ones(quantised, at) if config.prune else 0
        solved = time.perf_counter()
        blob = encode_artifact(quantised, config, plan) if world.is_main else b""
        log.put("quantisation", seconds_solve=round(solved - begin, 2),
                seconds_encode=round(time.perf_counter() - solved, 2))
        sizes[at] = int(world.decide(len(packed_program()) + len(blob))[0])
        unused, margin = cap - sizes[at], min(5000, cap // 200)
        what = f"{pruned:,} pruned ones" if config.prune else f"steps x{widen:.4f}"
        log.line(f"fit: {what} leave {unused:,} bytes unused")
        if unused >= 0:  # and more of the cap is used than ever before
            best, chosen = (quantised, blob), what
            log.put("quantisation", clip_widening=round(widen, 5), pruned=pruned)
        if config.fit and not 0 <= unused < margin:
            at = max(least, min(next_factor(sizes, cap - margin / 2, slope), most))
    if not best:
        raise ArtifactError(f"artifact is {-unused:,} bytes over ARTIFACT_CAP_BYTES ({cap:,}), "
                            f"even with {what} (FIT={config.fit:d})")
    if least == 0.0 < min(at for at in sizes if sizes[at] <= cap):
        log.warn(f"the preset's clip widths do not fit the cap: {chosen}")
    return best

def save_artifact(path: Path, blob: bytes, found: QuantisedModel, model: GPT, log: RunLog) -> None:
    """Writes the artifact and says where its bytes go."""
    write_atomically(path, blob)
    config, code, size = model.config, len(packed_program()), len(blob)
    cap, total = config.artifact_cap_bytes, code + size
    log.put("artifact", code_bytes=code, model_bytes=size, total_bytes=total, cap_bytes=cap,
            unused_bytes=cap - total, path=str(path), sha256=digest(blob), codec=codec_of(config))
    weights = sum(q.numel() for q in found.integers.values())
    log.put("quantisation", bits_per_weight=round(8 * size / weights, 4),
            by_tensor=[*tensor_report(model, found)])
    log.event("artifact", **log.result["artifact"])
    log.line(f"artifact_bytes = {code:,} code + {size:,} model = {total:,} / {cap:,}")

# Runs the text in front of its archive. Tracebacks and torch.compile read it in the line cache.
PACKED_STUB = """import bz2, linecache
s = bz2.decompress(open(__loader__.archive, "rb").read()).decode()
linecache.cache["<train_gpt>"] = len(s), None, s.splitlines(True), "<train_gpt>"
exec(compile(s, "<train_gpt>", "exec"))"""

NAMED = {ast.Name: "id", ast.arg: "arg", ast.FunctionDef: "name", ast.ClassDef: "name",
         ast.ExceptHandler: "name", ast.alias: "name"}  # nodes of a syntax tree that hold names
SIGNS = re.compile(  # a text, which stays as it is, or a sign between spaces
    r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?<=\S) ?([-+*/%@&|^=<>!,:]+) ?""")

def strip_source(source: str) -> str:
    """The same program, under short names, without what only people read or only packing needs."""
    tree, read = ast.parse(source), set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = node.body[bool(ast.get_docstring(node)):] or [ast.Pass()]
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            read.update(n for n in node.body if isinstance(n, ast.AnnAssign))  # by from_env
        if isinstance(node, ast.arg) and "constexpr" in ast.unparse(node):
            read.add(node)
        for kind in {"annotation", "returns"} & vars(node).keys() if node not in read else ():
            setattr(node, kind, ast.Constant(0) if isinstance(node, ast.AnnAssign) else None)
    unused = {"pack_program"}  # it is packed already; then whatever nothing mentions any more
    while unused:
        tree.body = [n for n in tree.body if not unused & definitions(n)]
        used = names_in(tree, read=True).keys()
        unused = {name for n in tree.body if not used & (own := definitions(n)) for name in own}
    shorten_names(tree)
    text = SIGNS.sub(lambda found: found[1] or found[2], ast.unparse(tree))
    return re.sub("\n+( *)", lambda found: "\n" + found[1][::4], text) + "\n"

def named_nodes(scope: ast.AST) -> list[tuple[Any, str]]:
    """The nodes that hold a name, and the names."""
    return [(n, getattr(n, NAMED[type(n)])) for n in ast.walk(scope) if type(n) in NAMED]

def names_in(scope: ast.AST, *, read: bool) -> Counter[str]:
    """How often which names are read inside, or else bound."""
    return Counter(name for n, name in named_nodes(scope)
                   if isinstance(getattr(n, "ctx", None), ast.Load) == read)

def definitions(node: ast.stmt) -> set[str]:
    """The names that a statement of the module gives to a function, a class or constants."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {*names_in(node, read=False)} if isinstance(node, ast.Assign | ast.AnnAssign) else set()

def shorten_names(tree: ast.Module) -> None:
    """Renames definitions and what functions bind, unless inner functions or callers name it.
    Callers may name arguments behind a star, and no others."""
    bodies = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))]
    for function in (n for body in bodies for n in body if isinstance(n, ast.FunctionDef)):
        kept = {s for n, s in named_nodes(function)
                if not isinstance(n, ast.Name) and n not in function.args.args}
        rename(function, names_in(function, read=False).keys() - kept, "abcdefghijklmnopqrstuvwxyz")
    bound = names_in(tree, read=False)
    rename(tree, {s for n in tree.body for s in definitions(n) if bound[s] == 1
                  and not s.endswith(("Config", "Error"))}, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")

def rename(scope: ast.AST, names: set[str], letters: str) -> None:
    """Gives `names` the shortest that are free in a scope, in the order of its tree."""
    nodes = named_nodes(scope)
    taken = {name for _, name in nodes} - names
    free = (a + b for a in ("", *letters.upper()) for b in letters if a + b not in taken)
    short = {name: next(free) for name in dict.fromkeys(name for _, name in nodes) if name in names}
    for node, name in nodes:
        setattr(node, NAMED[type(node)], short.get(name, name))

def pack_program(source: str) -> bytes:
    """A zip that Python runs like the script. Equal sources give equal bytes."""
    buffer = io.BytesIO(bz2.compress(strip_source(source).encode()))  # which the archive follows
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), PACKED_STUB, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()

def unpack_program(path: Path) -> str:
    """The source inside a packed program."""
    return bz2.decompress(path.read_bytes()).decode()  # up to the archive

# ====  9  Evaluation  =============================================================================
# Enters: a model and the validation stream. Leaves: nats per target in a ledger, and their total in
# bits per byte. Target t is token t+1 of the stream, predicted from tokens up to t.

BROKEN = 16 * math.log(2)  # nats where a score is no number: all 16-bit ids are equally likely
TEMPERED = 1.1, 0.9  # factors of logits
AUDIT_EVERY = 100  # batches, from the first on: what keeps the overhead at a few percent
AUDIT_TOLERANCE = 1e-4  # nats, or probability
CONDITIONS = "c1_causal", "c2_normalised", "c3_score_first", "c4_single_pass", "documents_isolated"

class Windows(NamedTuple):
    """Stretches of the stream to run through the model, and which targets each of them scores."""
    starts: np.ndarray  # first input position
    first_scored: np.ndarray  # first target that counts
    stops: np.ndarray  # one past the last target

    @property
    def skip(self) -> int:
        return int(self.first_scored[0] - self.starts[0])  # of all windows, if they form a batch

    def select(self, chosen: slice | np.ndarray) -> Windows:
        return Windows(*(a[chosen] for a in self))

    def targets(self) -> np.ndarray:
        return np.concatenate([*map(np.arange, self.first_scored, self.stops)])

    def scores(self, nats_KBS: Tensor) -> Tensor:
        """The nats (K, N) of `targets`, from those of positions from the first scored ones on."""
        counts = (self.stops - self.first_scored)[:, None]
        kept = torch.from_numpy(np.flatnonzero(np.arange(nats_KBS.shape[-1]) < counts))
        return nats_KBS.flatten(-2)[..., kept.to(nats_KBS.device, non_blocking=True)]

class ScoreLedger:
    """Every target's score, taken exactly once; nothing is released before it is scored."""
    def __init__(self, stream: ValStream, world: World, by_document: bool = False,
                 views: int = 0) -> None:
        self.stream, self.world, self.by_document = stream, world, by_document
        self.begin, self.num_commits, self.num_releases = time.perf_counter(), 0, 0
        self.scored = np.zeros(stream.num_targets, dtype=np.uint8)  # how often, by this rank
        self.kept = torch.zeros(1 + views, stream.num_targets, device=world.device)
        self.nats = self.kept[0]  # what counts; the views are for a mixture

    def commit(self, windows: Windows, nats_KBS: Tensor) -> None:
        """Takes the scores of some windows. Raises: LegalityError if a target had one."""
        targets = windows.targets()
        np.add.at(self.scored, targets, 1)
        if (self.scored[targets] > 1).any():
            raise LegalityError(f"a target of {targets.min()} to {targets.max()} was scored before")
        place = torch.from_numpy(targets).to(self.nats.device, non_blocking=True)
        self.kept[:, place] = windows.scores(nats_KBS.detach()).nan_to_num(BROKEN, posinf=BROKEN)
        self.num_commits += 1

    def released(self, first: int, last: int) -> np.ndarray:
        """Inputs and targets `first` to `last`. Raises: LegalityError unless scored once each."""
        counts = self.world.combine(torch.tensor(self.scored[first:last]))
        if (counts != 1).any():
            raise LegalityError(f"{(counts == 0).sum()} targets between {first} and {last} are not "
                                f"scored, {(counts > 1).sum()} by two ranks")
        self.num_releases += 1
        return self.stream.tokens[first:last + 1]

    def released_nats(self, windows: Windows, nats_BS: Tensor) -> Tensor:
        """Total nats of windows, to learn from. Raises: LegalityError unless committed before."""
        if not self.scored[windows.targets()].all():
            raise LegalityError("a target was to be learned from before its score was committed")
        self.num_releases += 1
        return windows.scores(nats_BS).sum()

    def save(self, path: Path) -> None:
        buffer, place = io.BytesIO(), np.flatnonzero(self.scored)
        np.savez(buffer, place, self.kept.cpu().numpy()[:, place], time.perf_counter() - self.begin)
        write_atomically(path, buffer.getvalue())

    def resume(self, path: Path) -> float:
        """Takes over the scores in a file, and their time, which it returns."""
        with np.load(path) as saved:
            place, kept, seconds = saved.values()
        self.kept[:, torch.from_numpy(place)] = torch.from_numpy(kept).to(self.kept)
        self.scored[place], self.begin = 1, self.begin - float(seconds)
        return float(seconds)

    def total_nats(self) -> float:
        """Sum of all ranks' scores, now known to each. Raises: LegalityError if one is missing."""
        self.released(0, self.scored.size)
        return float(self.world.combine(self.kept)[0].double().sum())

def sliding_windows(num_targets: int, seq_len: int, stride: int) -> Windows:
    """Windows every `stride` targets; the first scores all of its own, the others the last ones.
    Example: 10 targets, seq_len 4, stride 2 -> windows at 0, 2, 4, 6 score 0-4, 4-6, 6-8, 8-10"""
    starts = np.arange(0, max(num_targets - seq_len + stride, 1), stride)
    first_scored = np.where(starts == 0, 0, starts + seq_len - stride)
    return Windows(starts, first_scored, np.minimum(starts + seq_len, num_targets))

def document_windows(stream: ValStream, seq_len: int, stride: int) -> Windows:
    """The sliding windows of every document; its last target is the next one's first token."""
    parts = [start + np.array(sliding_windows(stop - start, seq_len, stride)) for start, stop
             in zip(stream.document_starts, stream.document_stops, strict=True)]
    return Windows(*np.concatenate(parts, axis=1))

class Scorer:
    """Runs windows through a model: the one way from a model to a number."""
    def __init__(self, model: GPT, plan: DepthPlan, stream: ValStream, world: World,
                 audit: Audit | None = None) -> None:
        self.model, self.plan, self.audit = model, plan, audit
        self.stream, self.world, self.rows = stream, world, model.config.eval_rows
        self.tokens = torch.from_numpy(stream.tokens).to(world.device)
        self.earlier_seconds = 0.0  # of an evaluation that was interrupted and went on
        self.views = 0  # how many further facts of each score a mixture will want
        self.last: ScoreLedger  # of the last evaluation, complete
        self.fixed: ScoreLedger | None = None  # of the last evaluation without learning, complete
        self.stopped_at = 0  # targets scored when learning was given up; 0: never

    def is_harmed(self, ledger: ScoreLedger, targets: np.ndarray, world: World) -> bool:
        """Whether learning still goes on, and made scores of these ranks worse by MAX_HARM."""
        if self.stopped_at or not self.fixed:
            return False
        gap = float((ledger.nats[targets] - self.fixed.nats[targets]).sum())
        gap, count = world.combine(torch.tensor([gap, len(targets)])).tolist()
        return gap / count > MAX_HARM

    @torch.no_grad()
    def score(self, windows: Windows, ledger: ScoreLedger) -> None:
        """Scores this rank's share; windows that skip equally many positions share batches."""
        share = np.array_split(np.arange(len(windows.starts)), self.world.size)[self.world.rank]
        skips, width = windows.first_scored - windows.starts, self.model.config.eval_seq_len
        for skip in np.unique(skips[share]):
            left = share[skips[share] == skip]
            while len(left):
                part = windows.select(left[:self.rows])
                try:
                    ledger.commit(part, self.predict(part, (self.rows, width), ledger))
                    left = left[self.rows:]
                except torch.OutOfMemoryError:
                    require(self.rows > 1, "eval_seq_len", width, "shorter: memory is full")
                    self.rows //= 2

    def predict(self, windows: Windows, shape: tuple[int, int], ledger: ScoreLedger,
                adapter: LowRank | None = None) -> Tensor:
        """Nats from the first scored positions on, of a batch padded to `shape`, rows and width."""
        device = self.world.device
        starts = torch.from_numpy(np.resize(windows.starts, (shape[0], 1)))
        index = starts.to(device, non_blocking=True) + torch.arange(shape[1] + 1, device=device)
        rows = self.tokens[index.clamp_(max=self.stream.num_targets)]
        nats_KBS = self.nats(rows, windows.skip, adapter)
        if self.audit:
            self.audit.observe(self, ledger, windows, rows, nats_KBS, adapter)
        return nats_KBS

    def nats(self, rows: Tensor, skip: int, adapter: LowRank | None) -> Tensor:
        return self.judge(self.states(rows, skip, adapter), rows[:, 1 + skip:], adapter)

    def judge(self, x_BSD: Tensor, target_BS: Tensor, adapter: LowRank | None) -> Tensor:
        """Nats of targets and, if a mixture wants them, of tempered copies: (K, B, S)."""
        logits_NV, target_N = self.model.logits(x_BSD, adapter), target_BS.flatten().long()
        for tensor in (logits_NV, target_N):  # one graph for all numbers of targets
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        found, cap = [self.model.target_nats(logits_NV, target_N)], self.model.config.logit_softcap
        if self.views:
            capped_NV = cap * torch.tanh(logits_NV.detach().float() / cap)
            found += [F.cross_entropy(capped_NV * f, target_N, reduction="none") for f in TEMPERED]
        return torch.stack(found).view(-1, *target_BS.shape)

    def states(self, rows: Tensor, skip: int, adapter: LowRank | None) -> Tensor:
        runner = adapter.run_block if adapter else None  # and each row is of one document
        return self.model.hidden(rows[:, :-1], self.plan, adapter, runner)[:, skip:]

class Audit:
    """Checks evaluations while they run: order in every batch, distributions in sampled ones."""
    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.notes: dict[str, list[tuple[int, float | Tensor]]] = {name: [] for name in CONDITIONS}
        self.state: tuple[int, list[int]] = 0, []
        self.rows: dict[int, np.ndarray] = {}  # by target, what was sampled of every token, K, V

    def note(self, condition: str, checked: int, violation: float | Tensor) -> None:
        self.notes[condition].append((checked, violation))  # read when all is over

    @torch.no_grad()
    def observe(self, scorer: Scorer, ledger: ScoreLedger, windows: Windows, rows: Tensor,
                nats_KBS: Tensor, adapter: LowRank | None) -> None:
        """Looks at scores that are not committed yet: weights move only after a release, or back
        to fresh adapters where documents begin. Waits for the device in sampled batches only."""
        if not ledger.num_commits:
            self.rows = {}  # those of an earlier evaluation are nothing to mix
        weights = adapter.parameters if adapter else scorer.model.parameters()
        before, self.state = self.state, (ledger.num_releases, [p._version for p in weights])
        moved = ledger.num_commits > 0 and before[1] != self.state[1] and before[0] == self.state[0]
        starts, stale = ledger.stream.document_starts, torch.tensor(False)
        fresh = adapter is not None and windows.first_scored[0] in starts
        if adapter and fresh:
            stale = torch.stack(torch._foreach_norm([b for _, b in adapter.pairs])).any()
        self.note("c3_score_first", 1, moved * (stale if fresh else 1.0))
        if ledger.by_document:  # no document starts inside a context, nor with another's adapter
            later, last = np.searchsorted(starts, [windows.starts + 1, windows.stops])
            self.note("documents_isolated", len(last), stale | bool((later < last).any()))
        if ledger.num_commits % AUDIT_EVERY == 0:
            self.sample(scorer, windows, rows, nats_KBS, adapter)

    def sample(self, scorer: Scorer, windows: Windows, rows: Tensor, nats_KBS: Tensor,
               adapter: LowRank | None) -> None:
        """Scores up to a drawn target again, with it, all that follows and other rows replaced."""
        model, skip, counts = scorer.model, windows.skip, windows.stops - windows.first_scored
        drawn = int(torch.randint(int(counts.max()), (), generator=self.generator))
        altered = torch.randint(len(model.embed), rows.shape, generator=self.generator).to(rows)
        altered[::2, :skip + drawn + 1] = rows[::2, :skip + drawn + 1]
        with torch.set_grad_enabled(nats_KBS.requires_grad):  # the graph that scored
            x_BSD = scorer.states(altered, skip, adapter).detach()
        gap = scorer.judge(x_BSD, rows[:, 1 + skip:], adapter) - nats_KBS
        gap = gap[:, :len(counts):2, :drawn + 1]
        self.note("c1_causal", gap[0].numel(), gap.abs().max())
        row_KBV = torch.cat([scorer.judge(
            x_BSD[:, drawn:drawn + 1].expand(-1, len(ids), -1), ids.expand(len(rows), -1), adapter)
            for ids in torch.arange(len(model.embed)).to(rows).split(64)], dim=2)
        mass_KB = (-row_KBV.double()).exp().sum(2)
        self.note("c2_normalised", len(rows), (mass_KB - 1).abs().max())
        if scorer.views and drawn < counts[0]:
            self.rows[int(windows.first_scored[0]) + drawn] = row_KBV[:, 0].cpu().numpy()

    def replay(self, stream: ValStream, kept_KT: np.ndarray, ledger: ScoreLedger,
               rows: dict[int, np.ndarray]) -> None:
        """Mixes again up to the first probe, whose target and all that follows are replaced."""
        for row_FV in rows.values():  # the mixture with the neural distribution, and without
            self.note("c2_normalised", 1, abs(np.exp(-row_FV).sum(1) - 1).max())
        first, row_KV = min(self.rows.items())
        stop = min((first // MIX_CHUNK + 1) * MIX_CHUNK, stream.num_targets)  # of its chunk
        altered, changed_KT = copy.copy(stream), kept_KT[:, :stop].copy()
        altered.tokens = (stream.tokens + (np.arange(len(stream.tokens)) > first)) % len(row_KV.T)
        changed_KT[0, first:] += 1  # as of other targets
        other, again = mix(altered, changed_KT, stop, {first: row_KV})
        self.note("c1_causal", first, (other.nats != ledger.nats)[:first].any())
        self.note("c3_score_first", 1, (again[first] != rows[first]).any())

    def report(self, world: World) -> dict[str, dict[str, object]]:
        """Of every condition that any rank checked: whether it held, how often, the worst case."""
        noted = self.notes.values()  # whose worst is NumPy's: Python's max lets a NaN pass
        counts = torch.tensor([sum(count for count, _ in notes) for notes in noted])
        worst = torch.tensor([np.max([float(v) for _, v in notes], initial=0) for notes in noted])
        found = world.combine(counts).tolist(), world.combine(worst, dist.ReduceOp.MAX).tolist()
        return {name: {"passed": most <= AUDIT_TOLERANCE, "checked": count, "worst": most}
                for name, count, most in zip(CONDITIONS, *found, strict=True) if count}

class Score(NamedTuple):
    """The outcome of one evaluation."""
    nats: float  # per target
    bits: float  # per byte
    seconds: float

def evaluate(scorer: Scorer, windows: Windows, by_document: bool = False) -> Score:
    """The score of a fixed model on all windows."""
    scorer.fixed = ScoreLedger(scorer.stream, scorer.world, by_document, scorer.views)
    scorer.score(windows, scorer.fixed)
    return finish_score(scorer, scorer.fixed)

def finish_score(scorer: Scorer, ledger: ScoreLedger) -> Score:
    """The score of a complete ledger."""
    nats, stream, scorer.last = ledger.total_nats(), ledger.stream, ledger
    if scorer.audit and scorer.world.is_main:  # an incomplete or repeated score has raised
        scorer.audit.note("c4_single_pass", stream.num_targets, 0.0)
    return Score(nats / stream.num_targets, nats / math.log(2) / stream.num_bytes,
                 time.perf_counter() - ledger.begin)

def log_score(log: RunLog, key: str, label: str, score: Score) -> None:
    """Writes a score under its key, and in the text under the label that published logs use."""
    nats, bits, seconds = score
    for section, value in ("bpb", bits), ("nats", nats), ("eval_seconds", round(seconds, 2)):
        log.put(section, **{key: value})
    log.event("eval", label=key, val_loss=nats, val_bpb=bits, seconds=round(seconds, 3))
    log.line(f"{label} val_loss:{nats:.8f} val_bpb:{bits:.8f} eval_time:{1e3 * seconds:.0f}ms")

# ====  10  Test-time training  ====================================================================
# Enters: a model from an artifact and the validation stream. Leaves: its score when it learns from
# every chunk after, and only after, that chunk was scored. The ledger enforces the order.

MAX_HARM = 0.1  # nats per target of a chunk or batch of documents, at which learning is given up
ADAPTED_BY = 0.8  # of MAX_EVAL_SECONDS documents are to be done: mixture and report come after
HARM_EVERY = 8  # passes over a batch of documents: each look waits for the device
RECORD_RANKS, SAVE_SECONDS = 8, 60.0
Factors = dict[str, tuple[Tensor, Tensor]]  # by site: (B, inputs, R), (B, R, outputs); R is rank

def adapt(scorer: Scorer, sgd: torch.optim.SGD, tokens: np.ndarray, lr: float) -> None:
    """All epochs on a released chunk, less a tail shorter than a sequence; padding is no loss."""
    config, world, parameters = scorer.model.config, scorer.world, sgd.param_groups[0]["params"]
    if tokens.size <= config.eval_seq_len:
        return
    sgd.param_groups[0]["lr"] = lr
    rows = torch.from_numpy(tokens).unfold(0, config.eval_seq_len + 1, config.eval_seq_len)
    for batch in rows.split(config.eval_rows) * config.ttt_epochs:
        share = -(-len(batch) // world.size)  # equally many on every rank: the step is on one mean
        mine = batch[world.rank * share:(world.rank + 1) * share]
        padded = F.pad(mine, (0, 0, 0, share - len(mine))).to(world.device)
        nats = scorer.model(padded[:, :-1], padded[:, 1:], scorer.plan)
        (nats[:len(mine)].sum() / batch[:, 1:].numel()).backward()
        world.sum_all_([p.grad for p in parameters])
        nn.utils.clip_grad_norm_(parameters, config.ttt_grad_clip or math.inf)
        sgd.step()
        sgd.zero_grad()

def evaluate_adapting(scorer: Scorer, windows: Windows) -> Score:
    """The score of a model that learns, along a cosine, from every chunk but the last."""
    stream, world, config = scorer.stream, scorer.world, scorer.model.config
    weights, size = [*scorer.model.parameters()], config.ttt_chunk_tokens
    artifact, last_chunk = [p.detach().clone() for p in weights], (stream.num_targets - 1) // size
    sgd = torch.optim.SGD(weights, lr=0.0, momentum=config.ttt_momentum)
    ledger = ScoreLedger(stream, world, False, scorer.views)
    for chunk in range(last_chunk + 1):
        first, last = chunk * size, min((chunk + 1) * size, stream.num_targets)
        scorer.score(windows.select(windows.first_scored // size == chunk), ledger)  # 1. predict
        tokens = ledger.released(first, last)  # 2. final
        if scorer.is_harmed(ledger, first + np.flatnonzero(ledger.scored[first:last]), world):
            torch._foreach_copy_([p.data for p in weights], artifact)
            scorer.stopped_at = last
        if chunk < last_chunk and not scorer.stopped_at:
            lr = config.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / last_chunk))
            adapt(scorer, sgd, tokens, lr)  # 3. learn from final tokens only
    return finish_score(scorer, ledger)

def low_rank(factors: Factors, scale: float, site: Site, x: Tensor, y: Tensor) -> Tensor:
    """`y` plus, row by row of the batch, a scaled low-rank map of `x`."""
    if site not in factors:
        return y
    a, b = (t.to(x.dtype) for t in factors[site])
    return y + scale * (x @ a @ b)

class LowRank:
    """Adapters of a frozen model for a batch of documents: each row has its own in every layer."""
    def __init__(self, model: GPT, plan: DepthPlan) -> None:
        c, shapes = model.requires_grad_(False).config, {**model.stacks(), "head": model.embed}
        zeros = functools.partial(model.embed.new_zeros, c.ttt_batch_size, requires_grad=True)
        self.config, self.scale, rank = c, c.ttt_lora_alpha / c.ttt_lora_rank, c.ttt_lora_rank
        self.compiled = model.run_block
        self.factors: dict[int, Factors] = {visit: {
            site: (zeros(shapes[site].shape[-1], rank), zeros(rank, shapes[site].shape[-2]))
            for site in c.ttt_lora_sites.split(",") if (site == "head") == (visit < 0)}
            for visit in range(-1, len(plan.visits))}
        self.pairs = [pair for factors in self.factors.values() for pair in factors.values()]
        self.parameters = [factor for pair in self.pairs for factor in pair]
        self.adam = torch.optim.AdamW(self.parameters, lr=c.ttt_lora_lr, fused=model.embed.is_cuda,
            betas=(c.ttt_beta1, c.ttt_beta2), eps=1e-10, weight_decay=c.ttt_weight_decay)

    def __call__(self, visit: int, block: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return low_rank(self.factors[visit], self.scale, site, x, y)

    def run_block(self, stream: Stream, *others: Any) -> tuple[Tensor, ...]:
        """One block, adapted as in the visit that its last input is bound to."""
        if not stream.x.requires_grad:  # as later blocks see it, or the first is compiled anew
            stream = stream._replace(x=stream.x.detach().requires_grad_())
        for tensor in torch.utils._pytree.tree_leaves(stream):
            if tensor.ndim == 3:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)  # one graph for all widths
        tap = functools.partial(low_rank, self.factors[others[-1].args[0]], self.scale)
        return self.compiled(stream, *others[:-1], tap)  # factors as inputs: one graph for all

    @torch.no_grad()
    def reset(self) -> None:
        generator = torch.Generator(self.parameters[0].device).manual_seed(self.config.seed)
        self.adam.state.clear()
        for a, b in self.pairs:
            b.zero_()
            a[:] = a.shape[1] ** -0.5 * torch.empty_like(a[0]).uniform_(-1, 1, generator=generator)

    def learn(self, loss: Tensor) -> None:
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()

def pass_widths(widest: int) -> list[int]:
    """The widths that a pass can have, so that few are timed and compiled: sixteenths."""
    return [min(-(-widest // 16) * sixteenths, widest) for sixteenths in range(1, 17)]

def document_passes(starts: np.ndarray, stops: np.ndarray, config: Config
                    ) -> list[list[tuple[Windows, int]]]:
    """For groups of documents by falling length, their passes chunk by chunk, each with its width.
    Chunks grow with length: short documents gain from early steps, long ones must not hold up a
    rank. A pass sees all before its end that fits, and is as wide as `pass_widths` allows."""
    rows, widest, groups = config.ttt_batch_size, config.eval_seq_len, []
    order, widths = np.argsort(starts - stops, kind="stable"), pass_widths(widest)
    for group in np.split(order, range(rows, len(order), rows)):
        start, stop = starts[group], stops[group]
        length, passes = stop[0] - start[0], []
        chunk = int(np.clip(config.ttt_chunk_size * np.clip(length / 2048, 0.5, 8), 1, widest // 2))
        for last in range(chunk, length + chunk, chunk):
            windows = Windows(start + max(0, last - widest), np.minimum(start + last - chunk, stop),
                              np.minimum(start + last, stop))
            passes.append((windows, widths[min(-(-last // widths[0]), 16) - 1]))
        groups.append(passes)
    return groups

def share_out(costs: Sequence[float], ranks: int) -> np.ndarray:
    """The rank of every piece of work: each goes to the rank with the least so far."""
    totals, owners = np.zeros(ranks), []
    for cost in costs:
        owners.append(totals.argmin())
        totals[owners[-1]] += cost
    return np.array(owners)

def evaluate_documents(scorer: Scorer, prefix: str = "") -> Score:
    """The score when each document's adapters learn by chunks; `prefix` names files to resume."""
    stream, world, adapters = scorer.stream, scorer.world, LowRank(scorer.model, scorer.plan)
    ledger, rows = ScoreLedger(stream, world, True, scorer.views), adapters.config.ttt_batch_size
    path = Path(f"{prefix}_{world.rank}_of_{world.size}.npz")
    if prefix and path.is_file():
        scorer.earlier_seconds = ledger.resume(path)
    groups = document_passes(stream.document_starts, stream.document_stops, adapters.config)
    costs, saved = [sum(width for _, width in passes) for passes in groups], time.perf_counter()
    for passes, owner in zip(groups, share_out(costs, world.size), strict=True):
        if owner != world.rank or ledger.scored[passes[0][0].targets()].all():
            continue
        adapters.reset()
        for number, (windows, width) in enumerate(passes, 1):
            nats_KBS = scorer.predict(windows, (rows, width), ledger, adapters)  # 1. predict
            ledger.commit(windows, nats_KBS)  # 2. final
            if number < len(passes) and not scorer.stopped_at:
                adapters.learn(ledger.released_nats(windows, nats_KBS[0]))  # 3. from final scores
            if number % HARM_EVERY == 0:
                targets = np.concatenate([part.targets() for part, _ in passes[:number]])
                if scorer.is_harmed(ledger, targets, World()):
                    adapters.reset()
                    scorer.stopped_at = int(ledger.scored.sum())
        if prefix and time.perf_counter() > saved + SAVE_SECONDS:
            with contextlib.suppress(OSError):  # a full disk costs the safety net, not the run
                ledger.save(path)
            saved = time.perf_counter()
    return finish_score(scorer, ledger)

def official_lengths(count: int = 50_000) -> np.ndarray:
    """Document lengths like the official ones: mean 957, 59 % of targets in those up to 2,048."""
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    lengths = np.exp(6.33 + 1.022 * quantiles.numpy())
    return np.append(lengths[:-16], np.geomspace(30_000, 97_000, 16)).astype(np.int64)

def project_documents(scorer: Scorer, deadline: float = math.inf) -> float:
    """Compiles on random tokens; seconds of the official text on eight ranks, by measured passes.
    Before that, the model's chunks grow until its own text would be done at `deadline`."""
    model, stream, world, seconds = scorer.model, scorer.stream, scorer.world, {}
    lengths, config, adapters = official_lengths(), model.config, LowRank(model, scorer.plan)
    stops, most = lengths.cumsum(), config.eval_seq_len
    widths = sorted({*pass_widths(most)[::5]})  # four of sixteen
    for width in widths * (1 + config.compile):
        rows = torch.randint(config.vocab_size, (config.ttt_batch_size, width + 1))
        begin, skip = time.perf_counter(), max(0, width - config.ttt_chunk_size)
        adapters.learn(scorer.nats(rows.to(world.device), skip, adapters).sum())
        seconds[width] = world.synchronize() - begin
    def slowest(starts: np.ndarray, stops: np.ndarray, ranks: int) -> float:
        costs = [np.interp([width for _, width in passes], widths, [*seconds.values()]).sum()
                 for passes in document_passes(starts, stops, model.config)]
        return float(np.bincount(share_out(costs, ranks), costs).max())
    own = stream.document_starts, stream.document_stops, world.size
    while (chunk := model.config.ttt_chunk_size * 5 // 4 + 1) <= most // 2:
        late = torch.tensor(slowest(*own) + time.perf_counter() - deadline)
        if world.combine(late, dist.ReduceOp.MAX) <= 0:
            break
        model.config = replace(model.config, ttt_chunk_size=chunk)
    return slowest(stops - lengths, stops, RECORD_RANKS)

MIX_CHUNK = 512  # targets that a mixture scores before it learns from them
MIX_ORDERS = 2, 3, 5, 8, 13  # tokens of context of an n-gram row
MIX_ROWS = 1 << 26  # at most, of all orders; a new context may take an old one's place
MIX_SHARE = 5e-6  # of the mixture in the beginning, and its loss in nats at worst
MIX_MEMORY = 120.0  # targets that weights remember
MIX_FACTORS = np.full(MIX_ORDERS[-1], 0x9E3779B97F4A7C15, np.uint64).cumprod()  # of a hash

class Mixed(NamedTuple):
    """What a mixture says of targets, and what to learn from once they are final."""
    gain: np.ndarray  # N, in nats, over the neural distribution
    place: np.ndarray  # O, N: of the n-gram row of every order
    cell: np.ndarray  # O, N, 4: that row: check of the context, token, its run, 0 if unknown
    kind: np.ndarray  # N: longest order that knows the context; each has weights of its own
    credit: np.ndarray  # E, N: share of each expert in the chance of the target

class Mixture:
    """The neural distribution, tempered copies of it, and what followed the same context before.
    Every expert is a whole distribution whose weight is set before the target is known, so the
    mixture sums to one. An n-gram row counts the last token after a context as often as it came in
    a row; the rest of it is the next shorter context's row, in the end the neural distribution."""
    def __init__(self, num_targets: int) -> None:
        self.cells = np.zeros(min(MIX_ROWS, 1 << (16 * num_targets).bit_length()), np.uint64)
        self.credit = np.full((1 + len(TEMPERED + MIX_ORDERS), 1 + len(MIX_ORDERS)), 0.2)
        self.credit[0], self.odds = 20.0, math.log(MIX_SHARE)

    def score(self, context_NC: np.ndarray, target_N: np.ndarray, kept_KN: np.ndarray) -> Mixed:
        """Of targets after a context, given what the neural distribution says of them."""
        hash_ON = np.stack([context_NC[:, -n:] @ MIX_FACTORS[:n] for n in MIX_ORDERS])
        place_ON, check_ON = (hash_ON >> 32) % len(self.cells), (hash_ON >> 16).astype(np.uint16)
        cell_ONF = self.cells[place_ON][..., None].view(np.uint16)
        cell_ONF[..., 2] *= cell_ONF[..., 0] == check_ON
        cell_ONF[..., 0] = check_ON
        experts = [*np.exp(-kept_KN.astype(np.float64))]
        kind_N, row_N = np.zeros(len(target_N), np.int64), experts[0]
        for order, (token_N, run_N) in enumerate(np.moveaxis(cell_ONF[..., 1:3], 2, 1), 1):
            row_N = (run_N * (token_N == target_N) + 0.5 * row_N) / (run_N + 0.5)
            experts.append(row_N)
            kind_N[run_N > 0] = order
        parts_EN = (self.credit / self.credit.sum(0))[:, kind_N] * experts
        chance_N = parts_EN.sum(0)
        return Mixed(np.log(chance_N) + kept_KN[0], place_ON, cell_ONF, kind_N, parts_EN / chance_N)

    def learn(self, tokens: np.ndarray, found: Mixed, odds: float) -> None:
        """Takes up released tokens, of several with one place the last, and the odds after them."""
        run_ON = found.cell[..., 2] * (found.cell[..., 1] == tokens[1:])
        found.cell[..., 1], found.cell[..., 2] = tokens[1:], np.minimum(run_ON, 999) + 1
        self.cells[found.place] = found.cell.view(np.uint64)[..., 0]
        for credit, credit_N in zip(self.credit, found.credit, strict=True):
            credit += np.bincount(found.kind, credit_N, len(credit))
        self.credit /= np.maximum(1, self.credit.sum(0) / MIX_MEMORY)
        self.odds = odds

def mix(stream: ValStream, kept_KT: np.ndarray, stop: int, probes: dict[int, np.ndarray]
        ) -> tuple[ScoreLedger, dict[int, np.ndarray]]:
    """A ledger of targets before `stop`, mixed alike on all ranks, and all nats where probed."""
    ledger, mixture = ScoreLedger(stream, World()), Mixture(stream.num_targets)
    padded, rows = np.pad(stream.tokens, (len(MIX_FACTORS) - 1, 0)).astype(np.uint64), {}
    contexts = np.lib.stride_tricks.sliding_window_view(padded, len(MIX_FACTORS))
    for first in range(0, stop, MIX_CHUNK):
        last = min(first + MIX_CHUNK, stop)
        found = mixture.score(contexts[first:last], stream.tokens[first + 1:last + 1],
                              kept_KT[:, first:last])  # 1. predict
        # One more than targets: each counts what came before it, so all lose MIX_SHARE at worst.
        odds = mixture.odds + np.cumsum(np.append(0, found.gain))
        for target, row_KV in probes.items():
            if first <= target < last:
                ids, before = np.arange(row_KV.shape[1]), odds[target - first]
                gain = mixture.score(contexts[target + 0 * ids], ids, row_KV).gain
                won = np.logaddexp(0, before + gain) - np.logaddexp(0, before)
                rows[target] = row_KV[0] - np.stack([won, gain])
        nats = kept_KT[:1, first:last] - np.diff(np.logaddexp(0, odds))
        whole = Windows(*np.array([[first], [first], [last]]))
        ledger.commit(whole, torch.from_numpy(nats).float())  # 2. final
        mixture.learn(ledger.released(first, last), found, odds[-1])  # 3. from final tokens
    return ledger, rows

def evaluate_mixture(scorer: Scorer) -> Score:
    """The score of a mixture on top of the last evaluation."""
    kept_KT, stream, audit = scorer.last.kept.cpu().numpy(), scorer.stream, scorer.audit or Audit()
    if audit.rows:  # one more of the beginning, so that little is to be mixed again
        early = torch.randint(min(2 * MIX_CHUNK, stream.num_targets), (), generator=audit.generator)
        audit.rows.setdefault(int(early), next(iter(audit.rows.values())))
    ledger, rows = mix(stream, kept_KT, stream.num_targets, audit.rows)
    if rows:
        audit.replay(stream, kept_KT, ledger, rows)
    return finish_score(scorer, ledger)

# ====  11  Main  ==================================================================================
# The story: checks before any paid time, training, quantisation, one file, and from there on only
# that file. Every error that a user can act on ends the program with one line.

OFFICIAL_VAL_TARGETS = 40_540_160, 47_851_520  # whole sequences; with case operators
OFFICIAL_VAL_BYTES = range(151_070_000, 151_090_000)  # tokenizers truncate at different places
Setup = tuple[Config, World, RunLog, Attend, ValStream, Start]  # known before the clock starts

def is_official(val: ValStream) -> bool:
    """Whether these are the competition's targets, with the tail that fills no sequence or not."""
    return val.num_targets // 2048 * 2048 == OFFICIAL_VAL_TARGETS[val.transformed]

def resolve_track(config: Config, world: World, val: ValStream, attention: str) -> str:
    """The track of the run. Raises: ConfigError if it claims 10min_16mb and cannot be on it."""
    official, eight, claim = is_official(val), world.size == RECORD_RANKS, " for TRACK=10min_16mb"
    if config.track == "non_record" or (config.track == "auto" and not (official and eight)):
        return "non_record"
    require(eight, "world_size", world.size, f"{RECORD_RANKS}{claim}")
    require(official, "val_targets", val.num_targets, f"{OFFICIAL_VAL_TARGETS}{claim}")
    require(config.compile and not torch._dynamo.config.disable, "compile", 0, f"1{claim}")
    require(attention not in ("flash", "math"), "attention", attention, f"fa3 or cudnn{claim}")
    limits = dict(max_wallclock_seconds=600, max_eval_seconds=600, artifact_cap_bytes=16_000_000)
    for name, most in limits.items():
        require(0 < (value := getattr(config, name)) <= most, name, value, f"at most {most}{claim}")
    return "10min_16mb"

def prepare(config: Config, world: World) -> Setup:
    """Everything that can fail before paid time: files, packages, attention, logs."""
    torch.set_float32_matmul_precision("high")
    batch_shape(config, world.size)
    codec_of(config)
    memory = (torch.cuda.get_device_properties(world.device).total_memory if world.is_cuda else
              os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    numbers = sum(shape.numel() for kind in expected_shapes(config) for shape in kind.values())
    require(20 * numbers <= memory, "num_value_embeds", config.num_value_embeds,  # with moments
            f"less, or MODEL_DIM ({config.model_dim}): above {memory >> 30} GiB in all")
    source, packed = program_source(), packed_program()
    total, cap = len(packed), config.artifact_cap_bytes
    if config.eval_only:
        open_artifact(Path(config.eval_only), config)
        total += Path(config.eval_only).stat().st_size
    require(total <= cap, "artifact_cap_bytes", cap, f"at least {total}, what there is already")
    data = data_facts(config, val := ValStream.load(config))
    backend = choose_attention(config.attention, world.device)
    track, differs = resolve_track(config, world, val, backend.name), config.differs()
    log = RunLog(config, world, *world.decide(time.time()))
    facts: dict = {**environment_facts(world), "data": {**log.result.get("data", {}), **data}}
    facts["versions"] |= {"attention_backend": backend.name, "rejected": backend.rejected}
    identity = {"seed": config.seed, "world_size": world.size, "source_sha256": digest(source)}
    log.result = {"started": utc_text(), **log.result, "run_id": log.run_id, "track": track,
                  "preset": config.preset, "config_hash": config.config_hash, **identity, **facts,
                  "packed_sha256": digest(packed), "config": asdict(config), "differs": differs}
    log.event("start", **log.result)
    log.line(source, console=False)
    log.line(f"run {log.run_id} | PRESET={config.preset} differs: {differs or None}")
    for name in ("track", "world_size", "source_sha256", "packed_sha256", *facts):
        log.line(f"{name}: {log.result[name]}")
    start = find_start(config, {**config.method(), **identity, **data}, log)
    return config, world, log, backend.attend, val, start

def data_facts(config: Config, val: ValStream) -> dict[str, object]:
    """The data section of the result. Raises: DataError if tokenizer and shards do not match."""
    folder, tokenizer = config.dataset_dir, digest(config.tokenizer_file.read_bytes())
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if (written := manifest.get("tokenizer_sha256", tokenizer)) != tokenizer:
        raise DataError(f"{config.tokenizer_file}: sha256 {tokenizer}, but {path} says {written}")
    if is_official(val) and val.num_bytes not in OFFICIAL_VAL_BYTES:
        raise DataError(f"{folder}: {val.num_bytes} bytes, not in {OFFICIAL_VAL_BYTES}")
    facts = {"name": folder.name, "val_documents": val.num_documents, "val_bytes": val.num_bytes,
             "val_targets": val.num_targets, "val_raw_bytes": manifest.get("val_raw_bytes"),
             "fingerprint": digest(val.tokens.tobytes())[:16], "tokenizer_sha256": tokenizer}
    if not config.eval_only:
        loader = TrainLoader(map(read_shard, find_shards(folder, "train")), config)
        facts |= {"train_tokens": loader.num_tokens, "train_shards": len(loader.shards),
                  "train_ends_sha256": loader.ends_sha256}
    return facts

def train_to_artifact(setup: Setup, path: Path) -> None:
    """Trains, quantises and writes the artifact to `path`."""
    config, world, log, attend, val, start = setup
    trainer = Trainer(config, world, log, attend, start)
    total = sum(p.numel() for p in trainer.model.parameters())
    log.put("model", parameters=total, groups=count_parameters(trainer.model))
    log.line(f"model_params:{total}")
    def score(plan: DepthPlan) -> Score:
        windows = sliding_windows(val.num_targets, config.eval_seq_len, config.eval_seq_len)
        return evaluate(Scorer(trainer.model, plan, val, world), windows)
    def validate(step: int, plan: DepthPlan, is_last: bool) -> None:
        nats, bits, _ = result = score(plan)
        log.event("val", step=step, label="raw", val_loss=nats, val_bpb=bits)
        log.line(f"{step}/{config.iterations} val_loss: {nats:.4f} val_bpb: {bits:.4f}")
        if is_last:
            log_score(log, "raw", "final raw weights", result)
    plan, hessians = trainer.run(validate)
    begin = time.perf_counter() - log.result["clocks"]["training_seconds"]
    torch.set_float32_matmul_precision("highest")  # error feedback cancels too finely for tf32
    quantised, blob = fit_to_cap(trainer.model, hessians, plan, world, log)
    if world.is_main:
        save_artifact(path, blob, quantised, trainer.model, log)
    log.put("clocks", train_to_artifact_seconds=time.perf_counter() - begin)
    log_score(log, "averaged", "pre-quantization post-ema", score(plan))
    log.write_result("partial", "evaluating")

def plan_evaluations(config: Config, val: ValStream, prefix: str) -> Iterator[tuple]:
    """Key, label of published logs, function and inputs of the evaluations of an artifact."""
    targets, size, by_document = val.num_targets, config.eval_seq_len, config.ttt_mode != "sgd"
    sliding = sliding_windows(targets, size, config.eval_stride)
    yield "quantised", "quantized", evaluate, sliding_windows(targets, size, size)
    if config.sliding_window_enabled:
        yield "sliding", "quantized_sliding_window", evaluate, sliding
    if by_document:
        yield "documents", "quantized_documents", evaluate, document_windows(val, size, size), True
    if config.ttt_enabled:
        learner = (evaluate_documents, prefix) if by_document else (evaluate_adapting, sliding)
        yield f"ttt_{config.ttt_mode}", "quantized_ttt", *learner

def evaluate_artifact(setup: Setup, path: Path) -> None:
    """Scores what the file at `path` stands for; the last evaluation is the headline."""
    config, world, log, attend, val, _ = setup
    begin = time.perf_counter()
    torch._dynamo.reset()  # what training compiled would be missing on the clock
    model, plan = load_artifact(path, config, world, attend)
    scorer = Scorer(model, plan, val, world, Audit(config.seed) if config.audit else None)
    scorer.views = len(TEMPERED) * (config.mixer == "legal")
    log.put("artifact", sha256=(scored := digest(path.read_bytes())))
    prefix = f"{log.folder}/ledger_{digest(scored + config.config_hash + program_source())[:16]}"
    full = 0.0
    if config.ttt_enabled and config.ttt_mode == "documents":
        full = project_documents(scorer, begin + ADAPTED_BY * config.max_eval_seconds)
        if (longer := model.config.ttt_chunk_size) > (chunk := config.ttt_chunk_size):
            log.result["ttt_chunk_size"] = longer
            log.warn(f"TTT_CHUNK_SIZE={longer} instead of {chunk}, or the evaluation would take "
                     f"longer than MAX_EVAL_SECONDS ({config.max_eval_seconds:g})")
    for headline, label, function, *inputs in plan_evaluations(config, val, prefix):
        score = function(scorer, *inputs)
        log_score(log, headline, label, score)
        if headline == "quantised" and (averaged := log.result["bpb"].get("averaged")):
            log.put("quantisation", gap_bpb=(gap := score.bits - averaged))
            if not gap <= config.max_quant_gap_bpb:
                raise GolfError(f"quantisation lost {gap:.4f} BPB, over MAX_QUANT_GAP_BPB; "
                                    f"{log.folder} keeps the weights")
    most = OFFICIAL_VAL_TARGETS[val.transformed] / val.num_targets
    full = full or score.seconds * most / RECORD_RANKS * world.size
    if scorer.rows < config.eval_rows:
        log.warn(f"out of memory: batches of {scorer.rows} windows from here on")
    if stopped := int(world.combine(torch.tensor(scorer.stopped_at), dist.ReduceOp.MAX)):
        log.result["ttt_stopped_at"] = stopped
        log.warn(f"test-time training made scores worse: stopped after {stopped} targets")
    if config.mixer == "legal":
        mixed, headline = evaluate_mixture(scorer), "mixer"
        log_score(log, headline, "quantized_mixture", mixed)
        score = mixed._replace(seconds=score.seconds + mixed.seconds)
        full += mixed.seconds * most
    # The strict clock runs from opening the file on, the lenient one in the headline alone.
    strict, lenient = time.perf_counter() - begin + scorer.earlier_seconds, score.seconds
    log.put("clocks", eval_seconds_strict=strict, eval_budget_seconds=config.max_eval_seconds,
            eval_seconds_lenient=lenient, projected_full_eval_seconds_8gpu=strict - lenient + full)
    if scorer.audit:
        log.result["audit"] = record = scorer.audit.report(world)
        if failed := [f"{name} {facts}" for name, facts in record.items() if not facts["passed"]]:
            raise LegalityError("audit: " + "; ".join(failed))
    log.result |= {"headline": headline, "val_bpb": score.bits, "val_loss": score.nats}

def describe_config(config: Config, world: World) -> str:
    """Settings, topology, parameters, operations and expected bytes, as text."""
    micro_steps, sequences = batch_shape(config, world.size)
    lines = [f"{name.upper()}={int(value) if isinstance(value, bool) else value}"
             for name, value in asdict(config).items()]
    lines.append(f"config hash {config.config_hash}, differs: {config.differs() or None}")
    for plan in depth_plans(config):
        lines.append(f"plan {plan.name}: {plan.describe()} "
                     f"{flops_per_token(config, plan) / 1e6:.1f} MFLOP per token")
        for number, (block, again, form, skip_row, skip_from) in enumerate(plan.visits):
            facts = {form: True, f"skip {skip_row} from visit {skip_from}": skip_row >= 0,
                     f"{config.num_value_embeds} value tables": config.num_value_embeds,
                     "loop embedding": config.cross_repeat, "value embedding": block in
                     config.ve_blocks, "its last output": config.cross_repeat and again}
            kind = ", ".join(text for text, holds in facts.items() if holds)
            lines.append(f"  visit {number:>2}: block {block} pass {again} {kind}")
    with torch.device("meta"):
        groups = count_parameters(GPT(config, sdpa_attend))
    lines += [f"{name}: {n} tensors, {count:,} parameters" for name, (n, count) in groups.items()]
    total, most = sum(count for _, count in groups.values()), config.artifact_cap_bytes
    lines += [f"total: {total:,} parameters", f"batch: {world.size} ranks x {micro_steps} "
              f"micro-steps x {sequences} sequences x {config.train_seq_len} tokens",
              f"expected artifact: {estimate_artifact_bytes(config):,} of {most:,} bytes"]
    return "\n".join(lines)

def main(env: Mapping[str, str] = os.environ) -> dict[str, object]:
    """One run from settings to result. Raises: GolfError."""
    config, world = Config.from_env(env), World.from_env(env)
    if config.print_config:
        print(describe_config(config, world))
        return {}
    with world.process_group(config.rank_timeout_seconds):
        _, _, log, _, _, (state, _) = setup = prepare(config, world)
        path, result = Path(config.eval_only or log.folder / "artifact.bin"), log.result
        try:
            if not (config.eval_only or (state.trained and "averaged" in result.get("bpb", {}))):
                train_to_artifact(setup, path)
            evaluate_artifact(setup, path)  # from here on only the artifact exists
            for key, bits in result["bpb"].items():
                mark = "  <- headline" if key == result["headline"] else ""
                nats, seconds = result["nats"][key], result["eval_seconds"][key]
                log.line(f"{key:<14}{bits:>9.5f} BPB{nats:>9.5f} nats{seconds:>9.1f} s{mark}")
            log.line(f"result: {log.result_path}")
            world.deferring = True  # nothing is lost any more
        except BaseException as error:
            if any(log.folder.glob("*.ckpt")):
                log.line(f"RUN_ID={log.run_id} RESUME=auto continues")
            with contextlib.suppress(OSError):
                log.write_result("partial", world.explain(error))
            raise
        crossed = [f"{name.upper()}={limit} was crossed: {seconds:.1f}s" for name, clock in (
            ("max_wallclock_seconds", "training_seconds"),
            ("max_eval_seconds", "eval_seconds_strict"))
            if 0 < (limit := getattr(config, name)) < (seconds := result["clocks"].get(clock, 0))]
        log.write_result("complete", "; ".join(crossed) or "finished")
        if crossed and result["track"] == "10min_16mb":
            raise LegalityError(result["exit_reason"])
        return result

def command_line(arguments: Sequence[str]) -> int:
    """Runs the program or its sub-command; the exit code."""
    try:
        if len(arguments) == 2 and arguments[0] == "pack":
            packed = packed_program()
            write_atomically(Path(arguments[1]), packed)
            print(f"{arguments[1]}: {len(packed):,} bytes, {digest(packed)}")
        elif arguments:
            raise ConfigError("usage: train_gpt.py [pack OUT], settings as environment variables")
        else:
            main()
    except (GolfError, OSError, KeyboardInterrupt) as error:
        print(f"error: {error}", file=sys.stderr)
        return 75 if isinstance(error, KeyboardInterrupt) else 1
    return 0

# ====  12  Kernels  ===============================================================================
# Enters: inputs (N, D) of an MLP and its matrices, bf16. Leaves: what `mlp` and its gradients are,
# within twice bf16's error. An activation is part of the product before it: less has to be moved.

@typing.cast(Any, triton.jit if triton else functools.cache)
def product_kernel(left, right, known, pre, out, slope, COLUMNS: tl.constexpr):  # type: ignore
    """Tiles of pre = left right^T and its activation, or, given what that was, half a gradient."""
    across, down = tl.cdiv(out.shape[1], COLUMNS), tl.cdiv(out.shape[0], 128)
    for tile in tl.range(tl.program_id(0), across * down, tl.num_programs(0), flatten=True):
        row, column = tile // across * 128, tile % across * COLUMNS
        total = tl.zeros((128, COLUMNS), tl.float32)
        for depth in tl.range(0, left.shape[1], 64):
            total = tl.dot(left.load([row, depth]), right.load([column, depth]).T, total)
        first, second = tl.split(tl.permute(tl.reshape(total, (128, 2, COLUMNS // 2)), (0, 2, 1)))
        for part in tl.static_range(2):  # whole tiles would leave less room for loads ahead
            y, place = first if part == 0 else second, [row, column + part * (COLUMNS // 2)]
            p = y if known is None else known.load(place).to(tl.float32)
            if pre is not None:
                pre.store(place, y.to(pre.dtype))
            out.store(place, (p * y * tl.where(p > 0, 1.0, slope * slope)).to(out.dtype))

def run_product(x: Tensor, w: Tensor, known: Tensor | None, pre: Tensor | None, out: Tensor,
                slope: float) -> None:
    """Fills `pre` and `out`, (N, F); given what `pre` was, `out`. The fastest tiles of each."""
    columns, each = (128, 2) if known is None else (256, 1)
    programs = torch.cuda.get_device_properties(out.device).multi_processor_count * each
    part, tensors = [128, columns // 2], (x.contiguous(), w.contiguous(), known, pre, out)
    described = [t if t is None else TensorDescriptor.from_tensor(t, shape) for t, shape in zip(
        tensors, ([128, 64], [columns, 64], part, part, part), strict=True)]
    product_kernel[programs,](*described, slope, columns, num_warps=8 // each, num_stages=3)

product = torch.library.custom_op("golf::product", run_product, mutates_args=("pre", "out"), schema=
    "(Tensor x, Tensor w, Tensor? known, Tensor(a!)? pre, Tensor(b!) out, float slope) -> ()")

class FusedMLP(torch.autograd.Function):
    """`mlp` without a tap."""
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, up_FD: Tensor, down_DF: Tensor, slope: float) -> Tensor:
        ctx.slope, x_ND = slope, x_BTD.flatten(0, -2)
        pre_NF, hidden_NF = (x_ND.new_empty(len(x_ND), len(up_FD)) for _ in range(2))
        product(x_ND, up_FD, None, pre_NF, hidden_NF, slope)
        ctx.save_for_backward(x_ND, up_FD, down_DF, hidden_NF, pre_NF)
        return (hidden_NF @ down_DF.T).view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        (x_ND, up_FD, down_DF, hidden_NF, pre_NF), dy_ND = ctx.saved_tensors, dy_BTD.flatten(0, -2)
        product(dy_ND, 2 * down_DF.T, pre_NF, None, dpre_NF := torch.empty_like(pre_NF), ctx.slope)
        return (dpre_NF @ up_FD).view_as(dy_BTD), dpre_NF.T @ x_ND, dy_ND.T @ hidden_NF, None

if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
