"""Train, compress and score a small language model: the best that fits in 16,000,000 bytes.

One file is the whole system. It trains a depth-recurrent transformer within a time budget, quantises it with
second-order information, packs it into one flat file, reloads that file, and scores held-out text in bits per
byte (BPB), with and without test-time training.

    make run                                                      the whole story on a laptop (PRESET=demo)
    torchrun --standalone --nproc_per_node=8 train_gpt.py         a run on eight GPUs
    EVAL_ONLY=runs/<run_id>/artifact.bin python train_gpt.py      score an existing artifact

Settings are environment variables (PRINT_CONFIG=1 shows them). `python train_gpt.py pack OUT` writes the packed
program whose bytes count.

Sections, in the order the data flows: 1 Config, 2 Runtime, 3 Data, 4 Model, 5 Optimizer, 6 Training,
7 Quantisation, 8 Artifact, 9 Evaluation, 10 Test-time training, 11 Main, 12 Kernels.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import hashlib
import io
import json
import lzma
import math
import os
import platform
import queue
import struct
import subprocess
import sys
import threading
import time
import typing
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if typing.TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# ======================================================================================================
# 1  Config
#
# Enters: environment variables. Leaves: one frozen `Config`, complete and checked. A preset is a table of
# differences from the defaults; a variable with a field's upper-case name overrides either. Anything that
# looks like a setting of ours but is not one is an error, because a misspelt setting costs a paid run.
# ======================================================================================================


class GolfError(Exception):
    """An error that the user can act on: its message names the variable or file, the value and the bound."""


class ConfigError(GolfError):
    """A setting is unknown, malformed, out of range, or contradicts another one."""


class DataError(GolfError):
    """A shard, tokenizer or token stream is not what it has to be."""


class ArtifactError(GolfError):
    """An artifact is damaged, foreign, or larger than allowed."""


class LegalityError(GolfError):
    """A score would break the rules of evaluation."""


class BudgetError(GolfError):
    """A time budget is crossed or cannot be met."""


class TrainingError(GolfError):
    """Training produced a value that no later step can recover from."""


AttentionName = Literal["auto", "fa3", "fa4", "cudnn", "flash", "math"]
Track = Literal["auto", "10min_16mb", "non_record"]
Compressor = Literal["brotli", "lzma"]


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting of a run. Fields carry the names that the competition published, in lower case."""

    # Run
    preset: str = "record"
    track: Track = "auto"  # auto: 10min_16mb at world size 8 with the official data, else non_record
    seed: int = 1337  # initialisation and data order
    run_id: str = ""  # default: preset, seed and UTC time
    log_dir: str = "logs"
    run_dir: str = "runs"
    print_config: bool = False
    eval_only: str = ""  # path of an artifact; skips training
    attention: AttentionName = "auto"
    compile: bool = True  # torch.compile; the demo runs eagerly
    # Data
    data_dir: str = "./data"  # holds datasets/ and tokenizers/
    data_path: str = ""  # folder of the shards; default: derived from data_dir and vocab_size
    tokenizer_path: str = ""  # SentencePiece model; default: derived likewise
    vocab_size: int = 8192
    train_seq_len: int = 2048  # tokens per training window
    train_batch_tokens: int = 786_432  # per optimizer step, all ranks together
    micro_batch_tokens: int = 98_304  # most tokens of one forward pass on one rank
    # Model
    num_layers: int = 11  # physical blocks
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 4.0
    rope_base: float = 10_000.0
    rope_dims: int = 16  # rotated dimensions of each head; 0: all
    qk_gain_init: float = 5.25
    ln_scale: bool = True  # norm outputs are divided by sqrt(block + 1)
    xsa_last_n: int = 11  # exclusive self attention on that many last blocks
    parallel_residual_start: int = 7  # first block whose attention and MLP read the same input; -1: none
    logit_softcap: float = 30.0
    tied_embed_init_std: float = 0.005
    # Depth recurrence
    num_loops: int = 2  # extra passes through the loop segment; 0: none
    loop_start: int = 3
    loop_end: int = 5  # inclusive
    enable_looping_at: float = 0.35  # progress at which the extra passes begin
    # Optimizer
    matrix_lr: float = 0.022
    tied_embed_lr: float = 0.03
    scalar_lr: float = 0.02
    muon_momentum: float = 0.99
    muon_momentum_warmup_start: float = 0.92
    muon_momentum_warmup_steps: int = 1500
    muon_backend_steps: int = 5  # Newton-Schulz iterations
    muon_row_normalize: bool = True
    muon_wd: float = 0.095
    embed_wd: float = 0.085
    adam_wd: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.3  # global; 0: off
    # Schedule
    iterations: int = 20_000  # most optimizer steps
    max_wallclock_seconds: float = 600.0  # training budget; 0: progress is step / iterations
    gptq_reserve_seconds: float = 12.0  # least share of the budget kept for calibration
    warmdown_frac: float = 0.72  # last share of progress with falling learning rate
    min_lr: float = 0.0  # floor of the learning-rate scale
    warmup_steps: int = 20  # untimed micro-steps per depth plan, on random tokens
    ema_decay: float = 0.9965  # per optimizer step
    train_log_every: int = 500
    val_loss_every: int = 4000  # steps; 0: only at the end
    # Quantisation and artifact
    matrix_bits: int = 6
    embed_bits: int = 8
    matrix_clip_sigmas: float = 12.85
    embed_clip_sigmas: float = 20.0
    gptq_calibration_batches: int = 64  # of micro_batch_tokens, all ranks together
    gptq_damp: float = 0.01  # of the mean Hessian diagonal
    compressor: Compressor = "brotli"
    fit: bool = True  # widen the clips until the artifact fits its cap
    artifact_cap_bytes: int = 16_000_000  # packed program + model file
    # Evaluation
    eval_seq_len: int = 2048
    eval_stride: int = 64
    val_batch_tokens: int = 65_536  # per forward pass on one rank
    sliding_window_enabled: bool = True
    max_eval_seconds: float = 600.0
    # Test-time training
    ttt_enabled: bool = True
    ttt_lr: float = 0.005
    ttt_epochs: int = 3
    ttt_momentum: float = 0.9
    ttt_chunk_tokens: int = 32_768
    ttt_grad_clip: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)
        check_consistency(self)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """The settings of `PRESET` with every variable in `env` applied. Raises: ConfigError."""
        reject_unknown_variables(env)
        preset = env.get("PRESET", "record")
        if preset not in PRESETS:
            raise ConfigError(f"PRESET={preset!r} is not one of {', '.join(PRESETS)}")
        types = typing.get_type_hints(cls)
        given = {f.name: parse_setting(f.name, env[f.name.upper()], types[f.name])
                 for f in fields(cls) if f.name.upper() in env}
        return cls(**{**PRESETS[preset], "preset": preset, **given})  # type: ignore[arg-type]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of all keys, or of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    @property
    def dataset_dir(self) -> Path:
        """Folder with the shards."""
        return Path(self.data_path or Path(self.data_dir) / "datasets" / f"fineweb10B_sp{self.vocab_size}")

    @property
    def tokenizer_file(self) -> Path:
        """The SentencePiece model."""
        return Path(self.tokenizer_path or Path(self.data_dir) / "tokenizers" / f"fineweb_{self.vocab_size}_bpe.model")

    @property
    def config_hash(self) -> str:
        """Fingerprint of everything that defines the method: equal for the seeds of one experiment."""
        method = {k: v for k, v in asdict(self).items() if k not in NOT_METHOD}
        return hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()[:16]

    def differs(self) -> dict[str, object]:
        """The settings that are unlike the preset's."""
        base = Config(**{**PRESETS[self.preset], "preset": self.preset})  # type: ignore[arg-type]
        return {k: v for k, v in asdict(self).items() if v != asdict(base)[k]}


NOT_METHOD = {"seed", "run_id", "log_dir", "run_dir", "print_config", "eval_only", "data_dir", "data_path",
              "tokenizer_path"}

PRESETS: dict[str, dict[str, object]] = {
    "record": {},
    "pr1493": {},
    # The same program at laptop size: two CPU cores, about two minutes.
    "demo": {
        "data_path": "data/datasets/demo_sp1024", "tokenizer_path": "data/tokenizers/demo_1024_bpe.model",
        "vocab_size": 1024, "compile": False, "train_seq_len": 256, "train_batch_tokens": 6144,
        "micro_batch_tokens": 6144, "num_layers": 5, "model_dim": 128, "num_heads": 4, "num_kv_heads": 2,
        "mlp_mult": 3.0, "rope_dims": 8, "xsa_last_n": 5, "parallel_residual_start": 3, "num_loops": 1,
        "loop_start": 1, "loop_end": 2, "matrix_lr": 0.03, "muon_momentum_warmup_steps": 40,
        "muon_momentum": 0.95, "grad_clip_norm": 1.0, "ema_decay": 0.95, "max_wallclock_seconds": 75.0,
        "gptq_reserve_seconds": 1.0, "warmup_steps": 1, "train_log_every": 10, "val_loss_every": 0,
        "gptq_calibration_batches": 8, "eval_seq_len": 256, "val_batch_tokens": 8192,
        "ttt_chunk_tokens": 4096,
    },
}

# Published variables without effect here, and what to use instead.
RETIRED: dict[str, str] = {
    "MUON_BETA2": "it never had an effect; Muon reads MUON_MOMENTUM",
    "ROPE_TRAIN_SEQ_LEN": "it never had an effect; positions follow TRAIN_SEQ_LEN and EVAL_SEQ_LEN",
    "ETLB_ENABLED": "the evaluation it named never existed; use TTT_ENABLED",
    "ETLB_LR": "use TTT_LR",
    "ETLB_STEPS": "use TTT_EPOCHS",
    "ETLB_CLIP": "use TTT_GRAD_CLIP",
    "EMBED_LR": "the head is always tied; use TIED_EMBED_LR",
    "HEAD_LR": "the head is always tied; use TIED_EMBED_LR",
    "TIE_EMBEDDINGS": "the head is always tied; remove it",
    "EMBEDDING_DIM": "the embedding is as wide as the model; use MODEL_DIM",
    "SKIP_GATES_ENABLED": "skips are always gated; remove it",
    "CONTROL_TENSOR_NAME_PATTERNS": "parameters belong to typed groups; remove it",
    "SCALE_PARAM_NAME_PATTERNS": "parameters belong to typed groups; remove it",
    "CASTED_LINEAR_NAME_PATTERNS": "parameters belong to typed groups; remove it",
}

# A variable with one of these words between underscores can only be meant for this program.
OWNED_WORDS = {"TTT", "MUON", "GPTQ", "EMA", "SWA", "WARMDOWN", "LOOPS", "LOOPING", "XSA", "ROPE", "WALLCLOCK", "ETLB",
               "EMBED", "CLIP", "LORA", "GOLF", "KV", "MLP", "ITERATIONS", "VOCAB", "QK", "SOFTCAP", "LR", "SMEAR"}

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1), "vocab_size": (8, 65_535), "train_seq_len": (8, 1 << 20),
    "train_batch_tokens": (8, 1 << 30), "micro_batch_tokens": (8, 1 << 24), "num_layers": (1, 256),
    "model_dim": (8, 16_384), "num_heads": (1, 256), "num_kv_heads": (1, 256), "mlp_mult": (0.1, 32),
    "rope_base": (1, 1e9), "rope_dims": (0, 1024), "qk_gain_init": (0.01, 100), "xsa_last_n": (0, 256),
    "parallel_residual_start": (-1, 256), "logit_softcap": (1, 1e4), "tied_embed_init_std": (1e-6, 1),
    "num_loops": (0, 16), "loop_start": (0, 255), "loop_end": (0, 255), "enable_looping_at": (0, 1),
    "matrix_lr": (0, 10), "tied_embed_lr": (0, 10), "scalar_lr": (0, 10), "muon_momentum": (0, 0.9999),
    "muon_momentum_warmup_start": (0, 0.9999), "muon_momentum_warmup_steps": (1, 1e7),
    "muon_backend_steps": (1, 20), "muon_wd": (0, 10), "embed_wd": (0, 10), "adam_wd": (0, 10), "beta1": (0, 0.9999),
    "beta2": (0, 0.99999), "adam_eps": (1e-20, 1), "grad_clip_norm": (0, 1e6), "iterations": (1, 1e8),
    "max_wallclock_seconds": (0, 1e7), "gptq_reserve_seconds": (0, 1e5), "warmdown_frac": (0.001, 1),
    "min_lr": (0, 1), "warmup_steps": (1, 1000), "ema_decay": (0, 0.999999), "train_log_every": (1, 1e7),
    "val_loss_every": (0, 1e8), "matrix_bits": (2, 8), "embed_bits": (2, 8), "matrix_clip_sigmas": (0.5, 1000),
    "embed_clip_sigmas": (0.5, 1000), "gptq_calibration_batches": (1, 1e5), "gptq_damp": (1e-6, 1),
    "artifact_cap_bytes": (1000, 1e12), "eval_seq_len": (8, 1 << 20), "eval_stride": (1, 1 << 20),
    "val_batch_tokens": (8, 1 << 24), "max_eval_seconds": (1, 1e7), "ttt_lr": (0, 10), "ttt_epochs": (0, 100),
    "ttt_momentum": (0, 0.9999), "ttt_chunk_tokens": (8, 1 << 24), "ttt_grad_clip": (0, 1e6),
}


def parse_setting(name: str, text: str, kind: object) -> object:
    """The value of `text` as the type of field `name`. Raises: ConfigError."""
    variable = f"{name.upper()}={text!r}"
    if kind is bool:
        if text not in ("0", "1"):
            raise ConfigError(f"{variable} must be 0 or 1")
        return text == "1"
    if kind in (int, float):
        try:
            number = float(text) if kind is float else int(text)
        except ValueError:
            raise ConfigError(f"{variable} is not {'a number' if kind is float else 'a whole number'}") from None
        if not math.isfinite(number):
            raise ConfigError(f"{variable} is not finite")
        return number
    choices = typing.get_args(kind)
    if choices and text not in choices:
        raise ConfigError(f"{variable} is not one of {', '.join(choices)}")
    return text


def reject_unknown_variables(env: Mapping[str, str]) -> None:
    """Raises ConfigError for a retired setting and for a variable that can only be a misspelt one."""
    known = {f.name.upper() for f in fields(Config)}
    for variable in sorted(env.keys() - known):
        if variable in RETIRED:
            raise ConfigError(f"{variable} is no longer a setting: {RETIRED[variable]}")
        near = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
        if near or OWNED_WORDS & set(variable.split("_")):
            near = near or difflib.get_close_matches(variable, known, n=1, cutoff=0.0)
            raise ConfigError(f"unknown setting {variable}; did you mean {near[0]}?")


def check_ranges(config: Config) -> None:
    """Raises ConfigError for the first setting outside its range."""
    for name, (low, high) in RANGES.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(f"{name.upper()}={value} must be between {low:g} and {high:g}")


def check_consistency(config: Config) -> None:
    """Raises ConfigError for the first pair of settings that contradict each other."""
    rules = (
        (config.model_dim % config.num_heads == 0, "MODEL_DIM", config.model_dim, "a multiple of NUM_HEADS",
         config.num_heads),
        (config.num_heads % config.num_kv_heads == 0, "NUM_HEADS", config.num_heads, "a multiple of NUM_KV_HEADS",
         config.num_kv_heads),
        (config.rope_dims <= config.head_dim, "ROPE_DIMS", config.rope_dims, "at most the head width", config.head_dim),
        (config.rope_dims % 2 == 0 and config.head_dim % 2 == 0, "ROPE_DIMS", config.rope_dims,
         "even, in heads of even width", config.head_dim),
        (not config.num_loops or config.loop_start <= config.loop_end, "LOOP_START", config.loop_start,
         "at most LOOP_END", config.loop_end),
        (not config.num_loops or config.loop_end < config.num_layers, "LOOP_END", config.loop_end,
         "below NUM_LAYERS", config.num_layers),
        (config.train_batch_tokens % config.train_seq_len == 0, "TRAIN_BATCH_TOKENS", config.train_batch_tokens,
         "a multiple of TRAIN_SEQ_LEN", config.train_seq_len),
        (config.micro_batch_tokens >= config.train_seq_len, "MICRO_BATCH_TOKENS", config.micro_batch_tokens,
         "at least TRAIN_SEQ_LEN", config.train_seq_len),
        (config.val_batch_tokens >= config.eval_seq_len, "VAL_BATCH_TOKENS", config.val_batch_tokens,
         "at least EVAL_SEQ_LEN", config.eval_seq_len),
        (config.eval_stride <= config.eval_seq_len, "EVAL_STRIDE", config.eval_stride, "at most EVAL_SEQ_LEN",
         config.eval_seq_len),
        (config.ttt_chunk_tokens % config.eval_seq_len == 0, "TTT_CHUNK_TOKENS", config.ttt_chunk_tokens,
         "a multiple of EVAL_SEQ_LEN", config.eval_seq_len),
        (config.max_wallclock_seconds == 0 or config.max_wallclock_seconds > config.gptq_reserve_seconds,
         "MAX_WALLCLOCK_SECONDS", config.max_wallclock_seconds, "0 or above GPTQ_RESERVE_SECONDS",
         config.gptq_reserve_seconds),
        (not config.ttt_enabled or config.sliding_window_enabled, "TTT_ENABLED", 1,
         "set only with SLIDING_WINDOW_ENABLED", int(config.sliding_window_enabled)),
    )
    for holds, variable, value, bound, limit in rules:
        if not holds:
            raise ConfigError(f"{variable}={value} must be {bound} ({limit})")


# ======================================================================================================
# 2  Runtime
#
# Enters: the variables that torchrun sets. Leaves: a `World` (who we are, which device, how ranks talk) and a
# `RunLog` (text for people, JSON lines for programs, one result file). Seconds everywhere.
# ======================================================================================================


class World:
    """This process among its peers. At world size 1 every collective is the identity."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, device: str = "cpu") -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.device = torch.device(device)
        self.control: dist.ProcessGroup | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> World:
        """The world that torchrun describes, or a world of one. Raises: ConfigError."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        present = [name for name in names if name in env]
        if present and len(present) < len(names):
            raise ConfigError(f"{'/'.join(present)} set without {'/'.join(n for n in names if n not in env)}: "
                              "start several ranks with torchrun")
        try:
            rank, size, local_rank = (int(env.get(name, default)) for name, default in zip(names, "010", strict=True))
        except ValueError:
            raise ConfigError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers") from None
        if not 0 <= rank < size:
            raise ConfigError(f"RANK={rank} must be below WORLD_SIZE ({size})")
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise ConfigError(f"LOCAL_RANK={local_rank} but only {torch.cuda.device_count()} GPUs are visible")
            return cls(rank, size, local_rank, f"cuda:{local_rank}")
        return cls(rank, size, local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0

    @property
    def is_cuda(self) -> bool:
        """Whether the ranks compute on GPUs."""
        return self.device.type == "cuda"

    @contextlib.contextmanager
    def process_group(self) -> Iterator[None]:
        """Connects the ranks for the duration of a block. Host decisions travel over a CPU group of their own, so
        that they never wait for the device."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)
        if self.size == 1:
            yield
            return
        dist.init_process_group("nccl" if self.is_cuda else "gloo", rank=self.rank, world_size=self.size,
                                device_id=self.device if self.is_cuda else None)
        self.control = dist.new_group(backend="gloo") if self.is_cuda else dist.group.WORLD
        try:
            yield
        finally:
            dist.destroy_process_group()

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor`, replaced by its sum over ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """`tensor`, replaced by its mean over ranks."""
        return self.sum_(tensor).div_(self.size) if self.size > 1 else tensor

    def scatter_mean(self, stack: Tensor) -> Tensor:
        """This rank's equal share, along dim 0, of the mean of `stack` over ranks."""
        if self.size == 1:
            return stack
        share = stack.shape[0] // self.size
        if not self.is_cuda:  # gloo has no reduce-scatter
            return self.mean_(stack)[self.rank * share:(self.rank + 1) * share]
        out = torch.empty_like(stack[:share])
        dist.reduce_scatter_tensor(out, stack, op=dist.ReduceOp.AVG)
        return out

    def gather(self, shard: Tensor) -> Tensor:
        """The shares of all ranks, concatenated along dim 0 in rank order."""
        if self.size == 1:
            return shard
        out = shard.new_empty((self.size * shard.shape[0], *shard.shape[1:]))
        dist.all_gather_into_tensor(out, shard.contiguous())
        return out

    def decide(self, *values: float) -> tuple[float, ...]:
        """Rank 0's `values` on every rank: one clock and one choice for all."""
        if self.size == 1:
            return values
        box = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(box, 0, group=self.control)
        return tuple(box.tolist())

    def maximum(self, value: float) -> float:
        """The largest `value` of any rank."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return float(box.item())

    def synchronize(self) -> None:
        """Waits until this rank's device has finished everything it was given."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def barrier(self) -> None:
        """Waits for all ranks and their devices."""
        self.synchronize()
        if self.size > 1:
            dist.barrier(group=self.control)


class RunLog:
    """Three files of one run: text, JSON lines and the result. Ranks other than 0 are silent.

    `result` collects the keys of the result file as they become known; `finish` writes it atomically.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.started = time.time()
        self.result: dict[str, object] = {}
        self.run_id = config.run_id or default_run_id(config, self.started)
        self.folder = Path(config.run_dir) / self.run_id
        self.text_file: typing.TextIO | None = None
        self.event_file: typing.TextIO | None = None
        self.result_path = Path(config.log_dir) / f"{self.run_id}.json"
        if world.is_main:
            self.text_file, self.event_file = self.open_files(Path(config.log_dir))

    def open_files(self, log_dir: Path) -> tuple[typing.TextIO, typing.TextIO]:
        """The text and event files, created anew. Raises: ConfigError if they exist or cannot be written."""
        if set(self.run_id) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") \
                or self.run_id.startswith("."):
            raise ConfigError(f"RUN_ID={self.run_id!r} may hold only letters, digits, '.', '_' and '-'")
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            paths = [log_dir / f"{self.run_id}.txt", log_dir / f"{self.run_id}.jsonl"]
            return (paths[0].open("x", encoding="utf-8"), paths[1].open("x", encoding="utf-8"))
        except FileExistsError:
            raise ConfigError(f"RUN_ID={self.run_id} was used before in {log_dir}; nothing is overwritten") from None
        except OSError as error:
            raise ConfigError(f"LOG_DIR={log_dir} or RUN_DIR={self.folder} cannot be written: {error}") from None

    def line(self, text: str, *, console: bool = True) -> None:
        """Writes one line for people."""
        if self.text_file is None:
            return
        if console:
            print(text, flush=True)
        self.text_file.write(text + "\n")
        self.text_file.flush()

    def event(self, name: str, **values: object) -> None:
        """Writes one JSON line for programs."""
        if self.event_file is None:
            return
        record = {"event": name, "t": round(time.time() - self.started, 3), **values}
        self.event_file.write(json.dumps(record) + "\n")
        self.event_file.flush()

    def warn(self, message: str) -> None:
        """Says something the user should know, in both files."""
        self.line(f"warning: {message}")
        self.event("warning", message=message)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block and logs its seconds."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.event("phase", phase=name, seconds=round(seconds, 3))
        self.line(f"{name}: {seconds:.1f}s")

    def put(self, section: str, **values: object) -> None:
        """Adds keys to a section of the result."""
        target = self.result.setdefault(section, {})
        if not isinstance(target, dict):
            raise TypeError(f"result key {section} is not a section")
        target.update(values)

    def finish(self, status: Literal["complete", "partial"], reason: str) -> dict[str, object]:
        """Writes the result file and closes the logs."""
        self.result |= {"status": status, "exit_reason": reason, "finished": utc_text(time.time())}
        if self.text_file is not None and self.event_file is not None:
            self.event("result", status=status, reason=reason)
            write_atomically(self.result_path, (json.dumps(self.result, indent=1) + "\n").encode())
            self.text_file.close()
            self.event_file.close()
        return self.result


def utc_text(seconds: float) -> str:
    """ISO 8601 text of a Unix time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def default_run_id(config: Config, started: float) -> str:
    """Preset, seed and UTC time."""
    return f"{config.preset}-{config.seed}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(started))}"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` so that a reader, or a crash, never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def program_source() -> str:
    """The text of the running program, also when it runs from its packed form."""
    loader = globals().get("__loader__")
    if loader is not None and hasattr(loader, "archive"):
        return typing.cast(str, loader.get_source("__main__"))
    return Path(__file__).read_text(encoding="utf-8")


def packed_program() -> bytes:
    """The packed program: the running file itself where it is packed already."""
    loader = globals().get("__loader__")
    if loader is not None and hasattr(loader, "archive"):
        return Path(loader.archive).read_bytes()
    return pack_program(program_source())


def hardware_facts(world: World) -> dict[str, object]:
    """What the run ran on, with the keys of the result file."""
    facts: dict[str, object] = {"gpu": "none", "gpus": 0, "cpu_count": os.cpu_count()}
    if world.is_cuda:
        facts |= {"gpu": torch.cuda.get_device_name(world.device), "gpus": world.size}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            facts["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20,
                                             check=True).stdout.split("\n")[0].strip()
    return facts


def version_facts() -> dict[str, object]:
    """Versions of everything whose change could move a number."""
    facts: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__,
                                "numpy": np.__version__}
    if torch.cuda.is_available():
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        with contextlib.suppress(ImportError):
            import triton
            facts["triton"] = triton.__version__
    return facts


# ======================================================================================================
# 3  Data
#
# Enters: shards of uint16 token ids and a SentencePiece model. Leaves: training windows in an order that only
# the seed decides, and the validation stream with the number of bytes that every target stands for.
# ======================================================================================================

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
BOS_ID = 1
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a leading space


def read_shard(path: Path, vocab_size: int | None = None) -> np.ndarray:
    """The token ids of a shard, uint16, mapped and not loaded.

    With `vocab_size` every id is checked against it.
    Raises: DataError if the header, the length or an id is wrong.
    """
    try:
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
        actual = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if header.size < SHARD_HEADER_INTS:
        raise DataError(f"{path}: {actual} bytes is shorter than the header of {4 * SHARD_HEADER_INTS}")
    magic, version, count = (int(n) for n in header[:3])
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise DataError(f"{path}: magic {magic} version {version}, expected {SHARD_MAGIC} and {SHARD_VERSION}")
    expected = 4 * SHARD_HEADER_INTS + 2 * count
    if count < 0 or actual != expected:
        raise DataError(f"{path}: {actual} bytes, but its header announces {count} tokens ({expected} bytes)")
    if count == 0:
        return np.empty(0, dtype="<u2")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS, shape=(count,))
    if vocab_size is not None:
        check_ids(tokens, vocab_size, str(path))
    return tokens


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes token ids in the competition's format."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    write_atomically(path, header.tobytes() + tokens.astype("<u2").tobytes())


def check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises DataError if a token id is not below `vocab_size`."""
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise DataError(f"{where}: token id {largest} must be below VOCAB_SIZE ({vocab_size})")


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shard files of `split`, in order. Raises: DataError if there are none."""
    found = sorted(folder.glob(f"*_{split}_[0-9]*.bin"))
    if not found:
        raise DataError(f"{folder}: no *_{split}_*.bin shards; tools/prepare_data.py makes or downloads them")
    return found


class TrainLoader:
    """Windows of `seq_len + 1` tokens, drawn without replacement from all shards.

    Window number n is a pure function of the seed and the shards: the order does not depend on the world size,
    and a run resumes from a number. Every pass over the data has new window boundaries and a new order.
    """

    def __init__(self, shards: Sequence[np.ndarray], seq_len: int, seed: int, vocab_size: int) -> None:
        self.shards, self.seq_len, self.seed, self.vocab_size = shards, seq_len, seed, vocab_size
        self.shard_offsets = np.cumsum([0] + [s.size for s in shards])
        self.num_tokens = int(self.shard_offsets[-1])
        self.epoch_start, self.epoch, self.starts = 0, 0, self.epoch_windows(0)
        if not self.starts.size:
            raise DataError(f"training shards hold {self.num_tokens} tokens in {len(shards)} files, "
                            f"none long enough for TRAIN_SEQ_LEN ({seq_len}) + 1")

    def epoch_windows(self, epoch: int) -> np.ndarray:
        """Start positions, in the concatenation of all shards, of the windows of one pass in their order."""
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        starts = []
        for shard, offset in zip(self.shards, self.shard_offsets[:-1], strict=True):
            phase = int(rng.integers(0, min(self.seq_len - 1, max(0, shard.size - self.seq_len - 1)) + 1))
            count = max(0, (shard.size - 1 - phase) // self.seq_len)
            starts.append(offset + phase + self.seq_len * np.arange(count, dtype=np.int64))
        return rng.permutation(np.concatenate(starts)) if starts else np.empty(0, np.int64)

    def read(self, first: int, count: int) -> np.ndarray:
        """Windows `first` to `first + count`, int32 (count, seq_len + 1). Raises: DataError for a bad id."""
        windows = np.empty((count, self.seq_len + 1), dtype=np.int32)
        for row in range(count):
            start = self.start_of(first + row)
            shard = int(np.searchsorted(self.shard_offsets, start, side="right")) - 1
            begin = start - int(self.shard_offsets[shard])
            windows[row] = self.shards[shard][begin:begin + self.seq_len + 1]
        check_ids(windows, self.vocab_size, "training shards")
        return windows

    def start_of(self, number: int) -> int:
        """Start position of window `number`."""
        if number < self.epoch_start:
            self.epoch_start, self.epoch, self.starts = 0, 0, self.epoch_windows(0)
        while number >= self.epoch_start + self.starts.size:
            self.epoch_start += self.starts.size
            self.epoch += 1
            self.starts = self.epoch_windows(self.epoch)
        return int(self.starts[number - self.epoch_start])


class BatchShape(NamedTuple):
    """How one optimizer step is divided: ranks x micro-steps x sequences."""

    micro_steps: int
    sequences: int  # per rank and micro-step

    @property
    def per_rank(self) -> int:
        """Sequences of one rank in one optimizer step."""
        return self.micro_steps * self.sequences


def batch_shape(config: Config, world_size: int) -> BatchShape:
    """The fewest micro-steps that respect MICRO_BATCH_TOKENS at the same global batch.

    Raises: ConfigError if the batch does not divide by the world size.
    """
    total = config.train_batch_tokens // config.train_seq_len
    if total % world_size:
        possible = [w for w in range(1, 9) if total % w == 0]
        raise ConfigError(f"WORLD_SIZE={world_size} does not divide the {total} sequences of TRAIN_BATCH_TOKENS "
                          f"({config.train_batch_tokens}); possible: {', '.join(map(str, possible))}")
    per_rank, most = total // world_size, config.micro_batch_tokens // config.train_seq_len
    micro_steps = next(m for m in range(1, per_rank + 1) if per_rank % m == 0 and per_rank // m <= most)
    return BatchShape(micro_steps, per_rank // micro_steps)


class BatchStream:
    """This rank's micro-batches, read ahead by a thread into page-locked memory.

    `next()` returns the micro-batches of the next optimizer step, int32 (sequences, seq_len + 1) on the device.
    """

    def __init__(self, loader: TrainLoader, shape: BatchShape, world: World, first_step: int = 0) -> None:
        self.loader, self.shape, self.world, self.step = loader, shape, world, first_step
        self.ready: queue.Queue[list[Tensor] | Exception] = queue.Queue(maxsize=2)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.fill, daemon=True)
        self.thread.start()

    def fill(self) -> None:
        """Reads steps in order until told to stop; an error travels to the consumer."""
        per_rank = self.shape.per_rank
        while not self.stopped.is_set():
            first = (self.step * self.world.size + self.world.rank) * per_rank
            try:
                rows = torch.from_numpy(self.loader.read(first, per_rank))
                item: list[Tensor] | Exception = [self.pin(m) for m in rows.split(self.shape.sequences)]
            except Exception as error:
                item = error
            self.step += 1
            while not self.stopped.is_set():
                with contextlib.suppress(queue.Full):
                    self.ready.put(item, timeout=0.2)
                    break
            if isinstance(item, Exception):
                return

    def pin(self, rows: Tensor) -> Tensor:
        """Page-locked copy on a CUDA machine, so that the transfer is asynchronous."""
        return rows.pin_memory() if self.world.is_cuda else rows

    def next(self) -> list[Tensor]:
        """The micro-batches of the next step. Raises: what reading them raised."""
        item = self.ready.get()
        if isinstance(item, Exception):
            raise item
        return [rows.to(self.world.device, non_blocking=True) for rows in item]

    def close(self) -> None:
        """Stops the thread."""
        self.stopped.set()
        self.thread.join(timeout=5)


class TokenBytes(NamedTuple):
    """What each token id adds to the byte count, as arrays over the vocabulary."""

    base: np.ndarray  # int16, bytes without the leading space
    leading_space: np.ndarray  # bool
    boundary: np.ndarray  # bool: control, unknown and unused ids, after which a leading space is no byte


def load_tokenizer(path: Path, vocab_size: int) -> SentencePieceProcessor:
    """The SentencePiece model at `path`. Raises: DataError if it is missing or of another size."""
    from sentencepiece import SentencePieceProcessor
    if not path.is_file():
        raise DataError(f"{path}: tokenizer not found; set TOKENIZER_PATH or run tools/prepare_data.py")
    try:
        tokenizer = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a SentencePiece model: {error}") from None
    if tokenizer.vocab_size() != vocab_size:
        raise DataError(f"{path}: {tokenizer.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
    return tokenizer


def token_bytes(tokenizer: SentencePieceProcessor) -> TokenBytes:
    """Bytes of decoded text that each token id stands for; control tokens count 0.

    A leading U+2581 is one space byte unless the previous token is a boundary; `bytes_of_targets` adds it.
    Raises: DataError if U+2581 is no piece of its own (its fallback bytes would count it as 3), or if a piece
    holds it anywhere but in front.
    Example: pieces (U+2581)"caf", "<0xC3>", "<0xA9>" -> 3 and a leading space, 1, 1
    """
    size = tokenizer.vocab_size()
    table = TokenBytes(np.zeros(size, np.int16), np.zeros(size, bool), np.ones(size, bool))
    if tokenizer.is_unknown(tokenizer.piece_to_id(SPACE_MARK)):
        raise DataError(f"tokenizer with {size} pieces has no piece U+2581; its byte counts would be wrong")
    for token in range(size):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            continue
        table.boundary[token] = False
        if tokenizer.is_byte(token):
            table.base[token] = 1
            continue
        piece = tokenizer.id_to_piece(token)
        text = piece.removeprefix(SPACE_MARK)
        if SPACE_MARK in text:
            raise DataError(f"tokenizer piece {token} ({piece!r}) holds U+2581 past its first character")
        table.leading_space[token] = text != piece
        table.base[token] = len(text.encode())
    return table


def bytes_of_targets(previous: np.ndarray, target: np.ndarray, table: TokenBytes) -> np.ndarray:
    """Bytes each target stands for, int16, given the token before it."""
    return table.base[target] + (table.leading_space[target] & ~table.boundary[previous])


class ValStream:
    """The validation tokens in order, and the bytes of every target (a target is any token but the first).

    With `whole_sequences` the tail that fills no sequence of `seq_len` is left out, as the published runs did.
    """

    def __init__(self, tokens: np.ndarray, table: TokenBytes, seq_len: int, whole_sequences: bool = True) -> None:
        targets = tokens.size - 1
        if whole_sequences:
            targets = targets // seq_len * seq_len
        if targets <= 0:
            raise DataError(f"validation shards hold {tokens.size} tokens, fewer than EVAL_SEQ_LEN ({seq_len}) + 1")
        self.tokens = np.ascontiguousarray(tokens[:targets + 1], dtype=np.int32)
        self.num_targets = targets
        self.num_documents = int((self.tokens == BOS_ID).sum())
        self.target_bytes = bytes_of_targets(self.tokens[:-1], self.tokens[1:], table)
        self.num_bytes = int(self.target_bytes.sum(dtype=np.int64))
        if self.num_bytes == 0:
            raise DataError(f"validation stream of {targets} targets stands for 0 bytes of text")

    @classmethod
    def load(cls, config: Config) -> ValStream:
        """The stream of the configured dataset. Raises: DataError."""
        table = token_bytes(load_tokenizer(config.tokenizer_file, config.vocab_size))
        shards = [read_shard(p, config.vocab_size) for p in find_shards(config.dataset_dir, "val")]
        return cls(np.concatenate(shards), table, config.eval_seq_len)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Total nats as bits per byte of text."""
    return nats / (math.log(2) * num_bytes)


def data_facts(config: Config, train_tokens: int, train_shards: int, val: ValStream) -> dict[str, object]:
    """What the run read, with the keys of the result file."""
    manifest_path = config.dataset_dir / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.is_file() else {}
    facts: dict[str, object] = {
        "name": config.dataset_dir.name, "train_tokens": train_tokens, "train_shards": train_shards,
        "tokenizer_sha256": hashlib.sha256(config.tokenizer_file.read_bytes()).hexdigest(),
        "val_documents": val.num_documents, "val_targets": val.num_targets, "val_bytes": val.num_bytes,
        "fingerprint": hashlib.sha256(val.tokens.tobytes()).hexdigest()[:16],
    }
    if "val_raw_bytes" in manifest:
        facts["val_raw_bytes"] = manifest["val_raw_bytes"]
    return facts


# ======================================================================================================
# 4  Model
#
# Enters: token ids, a `DepthPlan`, optionally an adapter. Leaves: hidden states, or the nats of every target.
#
#   B batch   T tokens   D model width   H query heads   G key/value heads   K head width
#   F hidden width of the MLP   V vocabulary   L physical blocks   N rows (B*T)
# ======================================================================================================

NORM_EPS = torch.finfo(torch.float32).eps

Site = Literal["qkv", "out", "up", "down", "head"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q_BTHK, k_BTGK, v_BTGK -> y_BTHK, causal
Tap = Callable[[Site, Tensor, Tensor], Tensor]  # site, input and output of a linear layer -> the output to use


class Adapter(Protocol):
    """Sees every linear layer of the forward pass and may change its output: low-rank adaptation, calibration."""

    def __call__(self, visit: int, block: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """The output that takes the place of `y`; `visit` counts virtual layers, the head is visit -1."""


class Visit(NamedTuple):
    """One virtual layer: a physical block, which pass over it this is, and the skip that enters before it."""

    block: int
    pass_number: int
    skip_row: int = -1  # row of the skip weights; -1: none
    skip_from: int = -1  # visit whose output is mixed in


class DepthPlan(NamedTuple):
    """The order in which the forward pass visits the physical blocks."""

    name: str
    visits: tuple[Visit, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Physical blocks in order of visit."""
        return tuple(v.block for v in self.visits)

    @property
    def num_encoder(self) -> int:
        """Visits whose outputs are kept for skips."""
        return len(self.visits) // 2

    @property
    def num_skips(self) -> int:
        """Skip rows that this plan uses."""
        return sum(v.skip_row >= 0 for v in self.visits)

    def describe(self) -> str:
        """Encoder and decoder halves, as the published logs write them."""
        order = list(self.order)
        return f"encoder:{order[:self.num_encoder]} decoder:{order[self.num_encoder:]}"


def plan_from_order(name: str, order: Sequence[int]) -> DepthPlan:
    """A U-Net over `order`: the first half are encoders, decoder j takes the output of the j-th last encoder.

    Example: order 0 1 2 3 4 -> encoders 0 1, decoders 2 (skip from 1), 3 (skip from 0), 4
    """
    num_encoder = len(order) // 2
    seen: dict[int, int] = {}
    visits = []
    for position, block in enumerate(order):
        row = position - num_encoder
        has_skip = 0 <= row < num_encoder
        visits.append(Visit(block, seen.get(block, 0), row if has_skip else -1,
                            num_encoder - 1 - row if has_skip else -1))
        seen[block] = seen.get(block, 0) + 1
    return DepthPlan(name, tuple(visits))


def depth_plans(config: Config) -> tuple[DepthPlan, ...]:
    """The plans of a run, in the order in which training reaches them; evaluation uses the last one trained."""
    blocks = list(range(config.num_layers))
    plans = (plan_from_order("unlooped", blocks),)
    if not config.num_loops:
        return plans
    segment = blocks[config.loop_start:config.loop_end + 1]
    looped = blocks[:config.loop_start] + segment * (config.num_loops + 1) + blocks[config.loop_end + 1:]
    return (*plans, plan_from_order("looped", looped))


def plan_at(config: Config, progress: float) -> DepthPlan:
    """The plan in force at `progress` (0 to 1)."""
    plans = depth_plans(config)
    return plans[-1] if progress >= config.enable_looping_at else plans[0]


Residual = Literal["serial", "parallel"]


class BlockForm(NamedTuple):
    """What is fixed about a block when it is compiled."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    residual: Residual
    exclusive: bool  # exclusive self attention


class BlockWeights(NamedTuple):
    """Parameters of one physical block, matrices in the compute type."""

    qkv: Tensor  # (H+2G)*K, D
    out: Tensor  # D, H*K
    up: Tensor  # F, D
    down: Tensor  # D, F
    attn_scale: Tensor  # D
    mlp_scale: Tensor  # D
    resid_mix: Tensor  # 2, D
    q_gain: Tensor  # H
    norm_scale: Tensor  # 0-D


class Rotary(NamedTuple):
    """Rotation tables, float32 (T, half the rotated dimensions)."""

    cos: Tensor
    sin: Tensor


def rms_norm(x: Tensor) -> Tensor:
    """`x` divided by its root mean square over the last dimension, computed in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=NORM_EPS).to(x.dtype)


def rotary_tables(num_positions: int, rotated_dims: int, base: float) -> Rotary:
    """Tables for positions 0 to `num_positions`; angles are computed in float64, where integers stay exact."""
    frequency = base ** (-torch.arange(0, rotated_dims, 2, dtype=torch.float64) / rotated_dims)
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequency)
    return Rotary(angle.cos().float(), angle.sin().float())


def rotate(x_BTHK: Tensor, rotary: Rotary) -> Tensor:
    """Rotates the first dimensions of every head by its position; the others pass. Float32 in and out.

    Dimension i is paired with i + half: (a, b) -> (a cos + b sin, -a sin + b cos).
    """
    half = rotary.cos.shape[-1]
    cos, sin = (t[:x_BTHK.shape[1], None, :] for t in rotary)
    a, b, rest = x_BTHK[..., :half], x_BTHK[..., half:2 * half], x_BTHK[..., 2 * half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def exclude_self(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Attention output without its component along the value at the same position (exclusive self attention)."""
    v = F.normalize(v_BTGK.float(), dim=-1, eps=1e-12).unsqueeze(3)
    y_BTGRK = y_BTHK.float().unflatten(2, (v.shape[2], -1))
    return (y_BTGRK - (y_BTGRK * v).sum(-1, keepdim=True) * v).flatten(2, 3).to(y_BTHK.dtype)


def linear(x: Tensor, w_OI: Tensor, site: Site, tap: Tap | None) -> Tensor:
    """`x` times the transpose of `w`, as seen or changed by an adapter."""
    y = F.linear(x, w_OI)
    return y if tap is None else tap(site, x, y)


def attention(x_BTD: Tensor, w: BlockWeights, form: BlockForm, rotary: Rotary, attend: Attend,
              tap: Tap | None) -> Tensor:
    """Grouped-query attention with normalised, rotated, gained queries and keys."""
    heads = form.num_heads + form.num_kv_heads
    qkv = linear(x_BTD, w.qkv, "qkv", tap).unflatten(-1, (heads + form.num_kv_heads, form.head_dim))
    qk, v_BTGK = qkv[:, :, :heads], qkv[:, :, heads:]
    qk = rotate(rms_norm(qk.float()), rotary)
    q_BTHK = (qk[:, :, :form.num_heads] * w.q_gain[:, None]).to(x_BTD.dtype)
    k_BTGK = qk[:, :, form.num_heads:].to(x_BTD.dtype)
    y_BTHK = attend(q_BTHK, k_BTGK, v_BTGK)
    if form.exclusive:
        y_BTHK = exclude_self(y_BTHK, v_BTGK)
    return linear(y_BTHK.flatten(2), w.out, "out", tap)


def mlp(x_BTD: Tensor, w: BlockWeights, tap: Tap | None) -> Tensor:
    """Two linear layers round the square of a leaky ReLU with slope 1/2."""
    hidden = F.leaky_relu(linear(x_BTD, w.up, "up", tap), 0.5).square()
    return linear(hidden, w.down, "down", tap)


def run_block(x_BTD: Tensor, x0_BTD: Tensor, w: BlockWeights, form: BlockForm, rotary: Rotary, attend: Attend,
              tap: Tap | None = None) -> Tensor:
    """One block: mixes the residual stream with the embedding, then adds attention and MLP."""
    mix, attn_scale, mlp_scale = (t.to(x_BTD.dtype) for t in (w.resid_mix, w.attn_scale, w.mlp_scale))
    u = mix[0] * x_BTD + mix[1] * x0_BTD
    z = rms_norm(u) * w.norm_scale.to(u.dtype)
    after = u + attn_scale * attention(z, w, form, rotary, attend, tap)
    if form.residual == "serial":
        z = rms_norm(after) * w.norm_scale.to(u.dtype)
    return after + mlp_scale * mlp(z, w, tap)


def softcapped_nll(logits_NV: Tensor, target_N: Tensor, cap: float) -> Tensor:
    """Negative log-likelihood in nats, float32 (N,), of logits squashed to (-cap, cap)."""
    return F.cross_entropy(cap * torch.tanh(logits_NV.float() / cap), target_N, reduction="none")


class Matrix(NamedTuple):
    """The matrices of one role in all blocks, a view (L, rows, columns) into a parameter."""

    role: str
    kind: Literal["attention", "mlp"]
    parameter: nn.Parameter
    first_row: int
    num_rows: int

    def view(self, tensor: Tensor) -> Tensor:
        """This role's share of `tensor`, which is the parameter, its gradient or its quantised form."""
        return tensor[:, self.first_row:self.first_row + self.num_rows]


class GPT(nn.Module):
    """The language model. Parameters are float32 and stacked over blocks; the compute type is a constructor's choice.

    `forward` is the only forward pass of the program: training, calibration, every evaluation and test-time
    training call it, and differ only in the plan and the adapter.
    """

    def __init__(self, config: Config, attend: Attend, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        layers, dim, heads = config.num_layers, config.model_dim, config.num_heads * config.head_dim
        self.config, self.attend, self.compute_dtype = config, attend, compute_dtype
        self.embed = nn.Parameter(torch.empty(config.vocab_size, dim))
        self.qkv = nn.Parameter(torch.empty(layers, heads + 2 * config.kv_dim, dim))
        self.out = nn.Parameter(torch.zeros(layers, dim, heads))
        self.up = nn.Parameter(torch.empty(layers, config.mlp_dim, dim))
        self.down = nn.Parameter(torch.zeros(layers, dim, config.mlp_dim))
        self.attn_scale = nn.Parameter(torch.ones(layers, dim))
        self.mlp_scale = nn.Parameter(torch.ones(layers, dim))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(layers, dim), torch.zeros(layers, dim)], dim=1))
        self.q_gain = nn.Parameter(torch.full((layers, config.num_heads), config.qk_gain_init))
        num_skips = max(plan.num_skips for plan in depth_plans(config))
        self.skip_weights = nn.Parameter(torch.ones(num_skips, dim))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips, dim))
        depth = torch.arange(1, layers + 1).float()
        self.register_buffer("norm_scale", depth.rsqrt() if config.ln_scale else torch.ones(layers), persistent=False)
        rotary = rotary_tables(max(config.train_seq_len, config.eval_seq_len),
                               config.rope_dims or config.head_dim, config.rope_base)
        self.register_buffer("cos", rotary.cos, persistent=False)
        self.register_buffer("sin", rotary.sin, persistent=False)
        self.forms = tuple(block_form(config, block) for block in range(layers))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Orthogonal input matrices, zero output matrices, a small Gaussian embedding."""
        generator = torch.Generator().manual_seed(seed)
        self.embed.normal_(0, self.config.tied_embed_init_std, generator=generator)
        for matrix in self.matrices():
            if matrix.role not in ("out", "down"):
                for w_OI in matrix.view(matrix.parameter.data):
                    nn.init.orthogonal_(w_OI, generator=generator)

    def matrices(self) -> list[Matrix]:
        """The logical matrices, each role stacked over blocks."""
        config = self.config
        heads, kv = config.num_heads * config.head_dim, config.kv_dim
        return [Matrix("q", "attention", self.qkv, 0, heads), Matrix("k", "attention", self.qkv, heads, kv),
                Matrix("v", "attention", self.qkv, heads + kv, kv),
                Matrix("out", "attention", self.out, 0, config.model_dim),
                Matrix("up", "mlp", self.up, 0, config.mlp_dim), Matrix("down", "mlp", self.down, 0, config.model_dim)]

    def vectors(self) -> dict[str, nn.Parameter]:
        """The small parameters, by name."""
        names = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates")
        return {name: getattr(self, name) for name in names}

    def block_weights(self) -> list[BlockWeights]:
        """The parameters of every block. Each stack is cast and unbound once, so that the backward pass builds one
        gradient per stack instead of one full-size gradient per visit."""
        matrices = [p.to(self.compute_dtype).unbind() for p in (self.qkv, self.out, self.up, self.down)]
        vectors = [p.unbind() for p in (self.attn_scale, self.mlp_scale, self.resid_mix, self.q_gain, self.norm_scale)]
        return [BlockWeights(*parts) for parts in zip(*matrices, *vectors, strict=True)]

    def hidden(self, ids_BT: Tensor, plan: DepthPlan, adapter: Adapter | None = None,
               block_runner: Callable[..., Tensor] = run_block) -> Tensor:
        """Normalised output of the last block, (B, T, D) in the compute type."""
        weights = self.block_weights()
        rotary = Rotary(typing.cast(Tensor, self.cos), typing.cast(Tensor, self.sin))
        skip_weights, skip_gates = self.skip_weights.unbind(), self.skip_gates.sigmoid().unbind()
        x = x0 = rms_norm(F.embedding(ids_BT, self.embed).to(self.compute_dtype))
        outputs: list[Tensor] = []
        for number, visit in enumerate(plan.visits):
            if visit.skip_row >= 0:
                weight, gate = (t[visit.skip_row].to(x.dtype) for t in (skip_weights, skip_gates))
                x = (1 - gate) * (weight * outputs[visit.skip_from]) + gate * x
            x = block_runner(x, x0, weights[visit.block], self.forms[visit.block], rotary, self.attend,
                             bind_tap(adapter, number, visit.block))
            outputs.append(x)
        return rms_norm(x)

    def logits(self, x_NTD: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Scores before the soft cap, (..., V) in the compute type."""
        return linear(x_NTD, self.embed.to(self.compute_dtype), "head", bind_tap(adapter, -1, -1))

    def forward(self, ids_BT: Tensor, target_BT: Tensor, plan: DepthPlan, adapter: Adapter | None = None,
                first_scored: int = 0, block_runner: Callable[..., Tensor] = run_block) -> Tensor:
        """Nats of the targets from position `first_scored` on, float32 (B, T - first_scored)."""
        x_BTD = self.hidden(ids_BT, plan, adapter, block_runner)[:, first_scored:]
        logits_BTV = self.logits(x_BTD, adapter)
        target_BT = target_BT[:, first_scored:].long()
        return softcapped_nll(logits_BTV.flatten(0, 1), target_BT.flatten(), self.config.logit_softcap) \
            .view(target_BT.shape)


def bind_tap(adapter: Adapter | None, visit: int, block: int) -> Tap | None:
    """The adapter as one virtual layer sees it."""
    if adapter is None:
        return None
    return lambda site, x, y: adapter(visit, block, site, x, y)


def block_form(config: Config, block: int) -> BlockForm:
    """The fixed part of one physical block."""
    parallel = 0 <= config.parallel_residual_start <= block
    return BlockForm(config.num_heads, config.num_kv_heads, config.head_dim, "parallel" if parallel else "serial",
                     block >= config.num_layers - config.xsa_last_n)


def count_parameters(model: GPT) -> dict[str, tuple[int, int]]:
    """(tensors, parameters) of each optimizer group, counted as the logical tensors of the published systems."""
    layers = model.config.num_layers
    matrices = [m.view(m.parameter) for m in model.matrices()]
    per_block = [v for name, v in model.vectors().items() if not name.startswith("skip")]
    skips = [v for name, v in model.vectors().items() if name.startswith("skip")]
    return {
        "embedding": (1, model.embed.numel()),
        "matrix": (layers * len(matrices), sum(m.numel() for m in matrices)),
        "vector": (layers * len(per_block) + len(skips), sum(v.numel() for v in per_block + skips)),
    }


def flops_per_token(config: Config, plan: DepthPlan) -> float:
    """Forward and backward floating-point operations per training token; attention counts its causal half and a
    backward pass of 2.5 times the forward one."""
    matrix = (config.model_dim * (2 * config.model_dim + 2 * config.kv_dim + 2 * config.mlp_dim))
    attention_forward = 2 * config.train_seq_len * config.model_dim
    return len(plan.visits) * (6 * matrix + 3.5 * attention_forward) + 6 * config.vocab_size * config.model_dim


# ------------------------------------------------------------------------------------------------------
# Attention back-ends: one function, several kernels. The first that loads and agrees with float32 wins.
# ------------------------------------------------------------------------------------------------------


class AttentionBackend(NamedTuple):
    """The kernel in use and why the ones before it were not."""

    name: str
    attend: Attend
    rejected: dict[str, str]


def sdpa_attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal attention by PyTorch; which kernel runs is set by the process-wide flags of `load_sdpa`."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTHK, k_BTGK, v_BTGK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def load_sdpa(kernel: str, device: torch.device) -> Attend:
    """PyTorch attention pinned to one kernel. Raises: GolfError if the device cannot run it."""
    if kernel != "math" and device.type != "cuda":
        raise GolfError("needs a CUDA device")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(kernel == "cudnn")
        torch.backends.cuda.enable_flash_sdp(kernel == "flash")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(kernel == "math")
    return sdpa_attend


def attention_error(attend: Attend, device: torch.device) -> float:
    """Largest relative error of the output and the three gradients against float32 attention, on random input."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 256, 8, 64), (2, 256, 4, 64), (2, 256, 4, 64), (2, 256, 8, 64))
    q, k, v, dy = (torch.randn(s, generator=generator) for s in shapes)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def run(function: Attend, target: torch.device, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(target, kind).requires_grad_() for t in (q, k, v)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(target, kind))]

    wanted = run(sdpa_attend, torch.device("cpu"), torch.float32)
    found = run(attend, device, dtype)
    return max(float((f.cpu().float() - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True))


def choose_attention(name: str, device: torch.device) -> AttentionBackend:
    """The named back-end, or with `auto` the first that works. Raises: ConfigError if none does."""
    loaders: dict[str, Callable[[torch.device], Attend]] = {
        "fa3": load_fa3, "fa4": load_fa4, "cudnn": lambda d: load_sdpa("cudnn", d),
        "flash": lambda d: load_sdpa("flash", d), "math": lambda d: load_sdpa("math", d)}
    rejected: dict[str, str] = {}
    tolerance = 0.02 if device.type == "cuda" else 1e-4
    for candidate in loaders if name == "auto" else (name,):
        try:
            attend = loaders[candidate](device)
            error = attention_error(attend, device)
        except Exception as problem:
            rejected[candidate] = f"{type(problem).__name__}: {problem}".split("\n")[0][:160]
            continue
        if error < tolerance:
            return AttentionBackend(candidate, attend, rejected)
        rejected[candidate] = f"relative error {error:.1e} against float32, at most {tolerance:g}"
    raise ConfigError(f"ATTENTION={name}: " + "; ".join(f"{k} ({why})" for k, why in rejected.items()))


# ======================================================================================================
# 5  Optimizer
#
# Enters: gradients of this rank's share of the batch. Leaves: updated parameters, equal on all ranks. Matrices
# go to Muon, whose momentum and orthogonalisation are shared out over the ranks; the rest goes to AdamW.
# Schedules are functions of progress (0 to 1) or of the step, and of nothing else.
# ======================================================================================================

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def lr_scale(progress: float, warmdown_frac: float, floor: float) -> float:
    """1 until the last `warmdown_frac` of the run, then linear down to `floor`."""
    return max(floor, min(1.0, (1.0 - progress) / warmdown_frac))


def muon_momentum(step: int, config: Config) -> float:
    """Linear ramp from the warm-up start to the final momentum."""
    share = min(step / config.muon_momentum_warmup_steps, 1.0)
    return config.muon_momentum_warmup_start + share * (config.muon_momentum - config.muon_momentum_warmup_start)


def orthogonalise(update_MRC: Tensor, iterations: int) -> Tensor:
    """Each matrix of a stack (rows <= columns) moved towards the nearest semi-orthogonal one, in bf16.

    Source: Newton-Schulz iteration of Muon (Jordan et al. 2024), quintic with coefficients (a, b, c).
    """
    a, b, c = NEWTON_SCHULZ
    x = update_MRC.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MatrixGroup:
    """All logical matrices of one shape, laid wide (rows <= columns), padded to a multiple of the world size.

    Stacking equal shapes makes Newton-Schulz a handful of batched products; laying tall matrices on their side
    lets both MLP matrices share a stack, so that the ranks get equal work.
    """

    def __init__(self, matrices: Sequence[Matrix], world: World) -> None:
        self.matrices, self.world = tuple(matrices), world
        views = [m.view(m.parameter.data) for m in matrices]
        self.tall = [v.shape[1] > v.shape[2] for v in views]
        self.counts = [v.shape[0] for v in views]
        rows, columns = sorted(views[0].shape[1:])
        total = sum(self.counts)
        self.padded = -(-total // world.size) * world.size
        share = self.padded // world.size
        device = views[0].device
        tall = torch.zeros(self.padded, dtype=torch.bool)
        tall[:total] = torch.repeat_interleave(torch.tensor(self.tall), torch.tensor(self.counts))
        mine = slice(world.rank * share, (world.rank + 1) * share)
        self.tall_M11 = tall[mine, None, None].to(device)
        self.momentum = torch.zeros(share, rows, columns, device=device)

    def reduce_gradients(self) -> Tensor:
        """This rank's share of the gradients, averaged over ranks, float32 (M, rows, columns)."""
        parts = []
        for matrix, tall in zip(self.matrices, self.tall, strict=True):
            gradient = matrix.view(typing.cast(Tensor, matrix.parameter.grad))
            parts.append(gradient.mT if tall else gradient)
        padding = self.padded - sum(self.counts)
        if padding:
            parts.append(parts[0].new_zeros(padding, *parts[0].shape[1:]))
        return self.world.scatter_mean(torch.cat(parts))

    def step(self, gradient: Tensor, lr: float, momentum: float, config: Config) -> None:
        """Momentum, row normalisation and orthogonalisation of this rank's share; then all ranks apply all shares."""
        self.momentum.mul_(momentum).add_(gradient)
        update = gradient.add_(self.momentum, alpha=momentum)
        if config.muon_row_normalize:
            # A tall matrix lies on its side here: its rows are columns.
            row_norm = update.norm(dim=2, keepdim=True).clamp_min(1e-7)
            column_norm = update.norm(dim=1, keepdim=True).clamp_min(1e-7)
            update = update / torch.where(self.tall_M11, column_norm, row_norm)
        updates = self.world.gather(orthogonalise(update, config.muon_backend_steps))
        first = 0
        for matrix, tall, count in zip(self.matrices, self.tall, self.counts, strict=True):
            view = matrix.view(matrix.parameter.data)
            part = updates[first:first + count]
            first += count
            scale = math.sqrt(max(1.0, view.shape[1] / view.shape[2]))
            view.mul_(1 - lr * config.muon_wd).sub_((part.mT if tall else part).float(), alpha=lr * scale)


class Optimizer:
    """Muon for the matrices, AdamW for the embedding and the vectors, one global gradient clip for all."""

    def __init__(self, model: GPT, config: Config, world: World) -> None:
        self.config, self.world = config, world
        shapes: dict[tuple[int, ...], list[Matrix]] = {}
        for matrix in model.matrices():
            shapes.setdefault(tuple(sorted(matrix.view(matrix.parameter.data).shape[1:])), []).append(matrix)
        self.groups = [MatrixGroup(matrices, world) for matrices in shapes.values()]
        self.replicated = [model.embed, *model.vectors().values()]
        self.parameters = [*{id(m.parameter): m.parameter for m in model.matrices()}.values(), *self.replicated]
        missing = {id(p) for p in model.parameters()} ^ {id(p) for p in self.parameters}
        if missing:
            raise TypeError(f"{len(missing)} parameters belong to no optimizer group")
        self.adam = torch.optim.AdamW(
            [{"params": [model.embed], "base_lr": config.tied_embed_lr, "weight_decay": config.embed_wd},
             {"params": list(model.vectors().values()), "base_lr": config.scalar_lr, "weight_decay": config.adam_wd}],
            lr=0.0, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=world.is_cuda)

    @torch.no_grad()
    def step(self, step: int, scale: float) -> Tensor:
        """Applies the accumulated gradients at `scale` times the base learning rates and clears them.

        Returns the gradient norm before clipping, 0-D on the device: nothing here waits for the device.
        """
        shards = [group.reduce_gradients() for group in self.groups]
        self.reduce_replicated()
        norm = self.gradient_norm(shards)
        gradients = [typing.cast(Tensor, p.grad) for p in self.replicated]
        if self.config.grad_clip_norm > 0:
            torch._foreach_mul_([*shards, *gradients], (self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        self.adam.step()
        momentum = muon_momentum(step, self.config)
        for matrix_group, shard in zip(self.groups, shards, strict=True):
            matrix_group.step(shard, self.config.matrix_lr * scale, momentum, self.config)
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def reduce_replicated(self) -> None:
        """Averages the gradients outside Muon over ranks, in one collective."""
        if self.world.size == 1:
            return
        gradients = [typing.cast(Tensor, p.grad) for p in self.replicated]
        flat = self.world.mean_(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def gradient_norm(self, shards: list[Tensor]) -> Tensor:
        """L2 norm of the averaged gradient of all parameters."""
        squares = torch.stack(torch._foreach_norm(shards)).square().sum()
        own = torch.stack(torch._foreach_norm([typing.cast(Tensor, p.grad) for p in self.replicated])).square().sum()
        return (self.world.sum_(squares) + own).sqrt()


class WeightAverage:
    """Exponential moving average of every parameter, float32, updated once a step."""

    def __init__(self, model: GPT, decay: float) -> None:
        self.decay = decay
        self.source = [p.data for p in model.parameters()]
        self.shadow = [p.clone() for p in self.source]

    def update(self) -> None:
        """shadow = decay * shadow + (1 - decay) * weight."""
        torch._foreach_lerp_(self.shadow, self.source, 1 - self.decay)

    def apply(self) -> None:
        """Replaces the model's weights by their average."""
        torch._foreach_copy_(self.source, self.shadow)


# ======================================================================================================
# 6  Training
#
# Enters: model, batches, clock. Leaves: averaged weights and calibration statistics, inside the time budget.
# The host runs at most two steps ahead of the device and never waits for a value it does not need.
# ======================================================================================================


class StepPlan(NamedTuple):
    """What all ranks do next: decided by rank 0's clock alone."""

    progress: float
    stop: bool


class TrainingClock:
    """Budget of the training loop. Runs from the first step to the last read of training data, calibration
    included; validation pauses it."""

    def __init__(self, config: Config, world: World, reserve_seconds: float) -> None:
        self.world, self.iterations = world, config.iterations
        self.limit = config.max_wallclock_seconds - reserve_seconds if config.max_wallclock_seconds else 0.0
        self.begin = time.perf_counter()
        self.paused = 0.0
        self.pause_begin = 0.0
        self.marks: deque[float] = deque(maxlen=9)

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self.begin - self.paused

    def pause(self) -> None:
        """Stops the clock; the caller has synchronised the device."""
        self.pause_begin = time.perf_counter()

    def resume(self) -> None:
        """Starts the clock again."""
        self.paused += time.perf_counter() - self.pause_begin
        self.marks.clear()

    def next_step(self, step: int, in_flight: int) -> StepPlan:
        """Progress at which to run `step`, or that training must end so that the limit is never crossed.

        `in_flight` steps were given to the device and have not finished; each is expected to take as long as
        the slowest of the last eight.
        """
        now = self.elapsed()
        self.marks.append(now)
        if not self.limit:
            return StepPlan(min(1.0, step / self.iterations), step >= self.iterations)
        slowest = max((b - a for a, b in zip(self.marks, list(self.marks)[1:], strict=False)), default=0.0)
        stop = step >= self.iterations or now + (in_flight + 1) * slowest * 1.02 > self.limit
        progress, stop_flag = self.world.decide(now / self.limit, float(stop))
        return StepPlan(min(1.0, progress), bool(stop_flag))


class StepRecord(NamedTuple):
    """A step given to the device: its numbers arrive on the host when `done` is reached."""

    step: int
    plan: DepthPlan
    progress: float
    scale: float
    values: Tensor  # loss and gradient norm, on the host
    marks: tuple[torch.cuda.Event, ...]  # begin, end of the micro-steps, end of the step; empty on CPU
    seconds: tuple[float, float]  # the same without a device: micro-steps, step


class TrainResult(NamedTuple):
    """What training hands on."""

    plan: DepthPlan  # the plan trained last
    hessians: dict[str, Tensor]


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where matrix units exist, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_model(config: Config, world: World, attend: Attend) -> GPT:
    """A model with initial weights on this rank's device."""
    model = GPT(config, attend, compute_dtype(world.device))
    model.initialise(config.seed)
    return model.to(world.device)


def maybe_compile(function: Callable[..., Tensor], config: Config) -> Callable[..., Tensor]:
    """`function`, compiled to one graph where the settings ask for it."""
    return torch.compile(function, fullgraph=True, dynamic=False) if config.compile else function


class Trainer:
    """The training loop and everything it keeps between steps."""

    def __init__(self, config: Config, world: World, log: RunLog, attend: Attend) -> None:
        self.config, self.world, self.log = config, world, log
        self.shape = batch_shape(config, world.size)
        shards = [read_shard(p) for p in find_shards(config.dataset_dir, "train")]
        self.loader = TrainLoader(shards, config.train_seq_len, config.seed, config.vocab_size)
        self.model = build_model(config, world, attend)
        self.optimizer = Optimizer(self.model, config, world)
        self.losses = {plan: maybe_compile(self.loss_function(plan), config) for plan in depth_plans(config)}
        self.flight: deque[StepRecord] = deque()
        self.micro_seconds: dict[str, list[float]] = {}
        self.loss_curve: list[float] = []
        self.loop_enabled_step = 0

    def loss_function(self, plan: DepthPlan) -> Callable[..., Tensor]:
        """Mean nats of a micro-batch under `plan`, ready to compile."""
        def loss(rows: Tensor) -> Tensor:
            return self.model(rows[:, :-1], rows[:, 1:], plan).mean()
        return loss

    def forward_backward(self, plan: DepthPlan, batches: list[Tensor]) -> Tensor:
        """Accumulates gradients over the micro-batches; the mean loss of this rank, 0-D on the device."""
        total = torch.zeros((), device=self.world.device)
        for rows in batches:
            loss = self.losses[plan](rows) / len(batches)
            loss.backward()
            total += loss.detach()
        return total

    def warm_up(self) -> float:
        """Compiles everything that the clock will meet, on random tokens; returns the calibration reserve in seconds.

        Weights and optimizer state afterwards are what they were before.
        """
        config = self.config
        weights = [p.detach().clone() for p in self.model.parameters()]
        generator = torch.Generator().manual_seed(0)
        size = (self.shape.sequences, config.train_seq_len + 1)
        rows = torch.randint(config.vocab_size, size, generator=generator, dtype=torch.int32).to(self.world.device)
        for plan in depth_plans(config):
            with self.log.phase(f"warm_up {plan.name}"):
                for _ in range(config.warmup_steps):
                    self.forward_backward(plan, [rows])
                self.optimizer.step(0, 0.0)
                self.world.synchronize()
        reserve = self.time_calibration(rows)
        torch._foreach_copy_([p.data for p in self.model.parameters()], weights)
        self.optimizer = Optimizer(self.model, config, self.world)
        return reserve

    def time_calibration(self, rows: Tensor) -> float:
        """Seconds to keep for calibration: measured on one batch, never below the configured reserve."""
        hessians = Hessians(self.model)
        seconds = 0.0
        for _ in range(2):
            self.world.synchronize()
            begin = time.perf_counter()
            collect(hessians, rows, depth_plans(self.config)[-1])
            self.world.synchronize()
            seconds = time.perf_counter() - begin
        expected = 1.15 * seconds * calibration_share(self.config, self.world, self.shape) + 0.2
        return self.world.maximum(max(self.config.gptq_reserve_seconds, expected))

    def run(self, validate: Callable[[GPT, DepthPlan, str], None]) -> TrainResult:
        """The timed loop, averaging and calibration. `validate` scores the model as it stands, off the clock."""
        config, log = self.config, self.log
        reserve = self.warm_up()
        average = WeightAverage(self.model, config.ema_decay)
        stream = BatchStream(self.loader, self.shape, self.world)
        log.put("train", startup_seconds=round(time.time() - log.started, 1))
        log.line(f"calibration: reserving {reserve:.1f}s of {config.max_wallclock_seconds:g}s")
        self.world.barrier()
        if self.world.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        clock = TrainingClock(config, self.world, reserve)
        step, plan, stopped = 0, depth_plans(config)[0], False
        try:
            while not stopped:
                self.drain(2)
                decision = clock.next_step(step, len(self.flight))
                stopped = decision.stop
                if self.validation_due(step, stopped):
                    self.drain(0)
                    clock.pause()
                    validate(self.model, plan, "raw" if stopped else "step")
                    clock.resume()
                if not stopped:
                    plan = self.enter_plan(step, plan, decision.progress)
                    self.take_step(step, plan, decision.progress, stream.next())
                    average.update()
                    step += 1
        finally:
            stream.close()
        self.drain(0)
        if self.world.is_cuda:
            log.put("train", peak_mib=torch.cuda.max_memory_allocated() >> 20)
        average.apply()
        hessians = self.calibrate(plan)
        self.summarise(step, clock, plan)
        return TrainResult(plan, hessians)

    def validation_due(self, step: int, stopped: bool) -> bool:
        """Whether to validate before `step`."""
        every = self.config.val_loss_every
        return bool(every) and (stopped or step % every == 0)

    def enter_plan(self, step: int, current: DepthPlan, progress: float) -> DepthPlan:
        """The plan for this step; says so when it changes."""
        plan = plan_at(self.config, progress)
        if plan != current or step == 0:
            self.log.event("plan", step=step, plan=plan.name, progress=round(progress, 4))
            if step:
                self.loop_enabled_step = step
                self.log.line(f"layer_loop:enabled step:{step} frac:{progress:.3f} {plan.describe()}")
        return plan

    def take_step(self, step: int, plan: DepthPlan, progress: float, batches: list[Tensor]) -> None:
        """Gives one optimizer step to the device."""
        config, cuda = self.config, self.world.is_cuda
        scale = lr_scale(progress, config.warmdown_frac, config.min_lr)
        marks = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3)) if cuda else ()
        begin = time.perf_counter()
        if cuda:
            marks[0].record()
        loss = self.forward_backward(plan, batches)
        if cuda:
            marks[1].record()
        micro_seconds = time.perf_counter() - begin
        norm = self.optimizer.step(step, scale)
        values = torch.stack([loss, norm])
        if cuda:
            host = torch.empty(2, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            marks[2].record()
        seconds = (micro_seconds, time.perf_counter() - begin)
        self.flight.append(StepRecord(step, plan, progress, scale, values, marks, seconds))

    def drain(self, most_in_flight: int) -> None:
        """Waits until at most that many steps are unfinished and takes in the numbers of the finished ones."""
        while len(self.flight) > most_in_flight:
            record = self.flight.popleft()
            if record.marks:
                record.marks[-1].synchronize()
            self.take_in(record)

    def take_in(self, record: StepRecord) -> None:
        """Checks, keeps and logs the numbers of a finished step. Raises: TrainingError if they are not finite."""
        loss, norm = record.values.tolist()
        step = record.step + 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(f"step {step} on rank {self.world.rank}: train_loss={loss}, gradient norm={norm}; "
                                "both must be finite")
        micro, whole = record.seconds
        if record.marks:
            micro = record.marks[0].elapsed_time(record.marks[1]) / 1e3
            whole = record.marks[0].elapsed_time(record.marks[2]) / 1e3
        self.micro_seconds.setdefault(record.plan.name, []).append(micro)
        self.loss_curve.append(loss)
        if step <= 5 or step % self.config.train_log_every == 0:
            tokens = self.config.train_batch_tokens
            self.log.event("train", step=step, train_loss=loss, gradient_norm=norm, lr_scale=record.scale,
                           tok_s=round(tokens / whole), plan=record.plan.name, progress=round(record.progress, 5),
                           mem_mib=torch.cuda.memory_allocated() >> 20 if record.marks else 0)
            self.log.line(f"{step}/{self.config.iterations} train_loss: {loss:.4f} "
                          f"step_time: {1e3 * whole:.1f}ms tok/s: {tokens / whole:.0f}")

    def calibrate(self, plan: DepthPlan) -> dict[str, Tensor]:
        """Second moments of every linear layer's input over training windows, summed over ranks."""
        hessians = Hessians(self.model)
        begin = time.perf_counter()
        for number in range(calibration_share(self.config, self.world, self.shape)):
            first = (number * self.world.size + self.world.rank) * self.shape.sequences
            rows = torch.from_numpy(self.loader.read(first, self.shape.sequences)).to(self.world.device)
            collect(hessians, rows, plan)
        moments = {name: self.world.sum_(h) for name, h in hessians.moments.items()}
        self.world.synchronize()
        self.log.put("quantisation", seconds_hessians=round(time.perf_counter() - begin, 2))
        self.log.line(f"calibration: {len(moments)} Hessians in {time.perf_counter() - begin:.1f}s")
        return moments

    def summarise(self, steps: int, clock: TrainingClock, plan: DepthPlan) -> None:
        """Writes the training section of the result. Raises: BudgetError after the result knows it."""
        config = self.config
        seconds, tokens = clock.elapsed(), steps * config.train_batch_tokens
        by_plan = {name: round(config.train_batch_tokens / float(np.median(times)))
                   for name, times in self.micro_seconds.items()}
        data_seconds = max(seconds, 1e-9)
        self.log.put("train", steps=steps, seconds=round(seconds, 3), tokens=tokens, tok_s_by_plan=by_plan,
                     ms_per_step=round(1e3 * seconds / max(steps, 1), 3), tok_s=round(tokens / data_seconds),
                     loop_enabled_step=self.loop_enabled_step, final_plan=plan.name,
                     final_loss=self.loss_curve[-1] if self.loss_curve else None)
        self.log.put("data", passes=round(tokens / self.loader.num_tokens, 3))
        self.log.put("clocks", training_seconds=round(seconds, 3),
                     training_budget_seconds=config.max_wallclock_seconds)
        if config.max_wallclock_seconds and seconds > config.max_wallclock_seconds:
            self.log.put("clocks", training_budget_crossed=True)
            self.log.warn(f"training took {seconds:.1f}s, over MAX_WALLCLOCK_SECONDS "
                          f"({config.max_wallclock_seconds:g})")
        self.log.line(f"training: {steps} steps, {seconds:.1f}s, {tokens / data_seconds:.0f} tok/s, "
                      f"micro-steps only {by_plan}")


# ======================================================================================================
# 7  Quantisation
#
# Enters: averaged weights and Hessians (second moments of the inputs of every linear layer). Leaves: integers
# with one scale per row. "6 bits" names a range; what decides the size is the step, a multiple of the row's
# standard deviation, because the integers are entropy coded.
#
#   R rows (outputs)   C columns (inputs)
# ======================================================================================================

# Which site feeds each stacked tensor; the embedding is the head and sees the final norm.
SITE_OF: dict[str, Site] = {"qkv": "qkv", "out": "out", "up": "up", "down": "down", "embed": "head"}
SMALLEST_SCALE = 2.0**-24  # of float16


class Hessians:
    """An adapter that changes nothing and sums x x^T over all inputs of every linear layer.

    A looped block is visited several times and gets the sum: its weights serve all visits.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.moments: dict[str, Tensor] = {}

    def __call__(self, visit: int, block: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Adds the second moments of `x` and returns `y`."""
        rows = x.flatten(0, -2).float()
        name = f"{site}.{block}" if block >= 0 else site
        if name not in self.moments:
            self.moments[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.moments[name].addmm_(rows.T, rows)
        return y


@torch.no_grad()
def collect(hessians: Hessians, rows: Tensor, plan: DepthPlan) -> None:
    """One calibration batch, int32 (sequences, seq_len + 1), through the forward pass."""
    x_BTD = hessians.model.hidden(rows[:, :-1], plan, hessians)
    hessians(-1, -1, "head", x_BTD, x_BTD)


def calibration_share(config: Config, world: World, shape: BatchShape) -> int:
    """Calibration batches of one rank, so that all ranks together read the configured number of tokens."""
    wanted = config.gptq_calibration_batches * (config.micro_batch_tokens // config.train_seq_len)
    return -(-wanted // (shape.sequences * world.size))


class QuantRule(NamedTuple):
    """How one tensor class is quantised."""

    bits: int
    clip_sigmas: float

    @property
    def max_level(self) -> int:
        """Largest integer."""
        return 2**(self.bits - 1) - 1


def quant_rule(config: Config, tensor: str, widen: float = 1.0) -> QuantRule:
    """The rule of a stacked tensor; `widen` multiplies its clip width."""
    if tensor == "embed":
        return QuantRule(config.embed_bits, config.embed_clip_sigmas * widen)
    return QuantRule(config.matrix_bits, config.matrix_clip_sigmas * widen)


def row_scales(w_RC: Tensor, rule: QuantRule) -> Tensor:
    """Step size of every row, float16 (R,): the clip width in standard deviations over the largest integer.

    A wider clip means a larger step: fewer bytes, more error. The rounded scale is the one that quantises.
    """
    scale_R = rule.clip_sigmas * w_RC.float().std(dim=1, correction=1) / rule.max_level
    return scale_R.clamp(SMALLEST_SCALE, 65_504).half()


def round_to_nearest(w_RC: Tensor, scale_R: Tensor, max_level: int) -> Tensor:
    """Nearest integers, int8, without error feedback."""
    return (w_RC / scale_R.float()[:, None]).round().clamp(-max_level, max_level).to(torch.int8)


def dequantise(q_RC: Tensor, scale_R: Tensor) -> Tensor:
    """Float32 weights of integers and row scales."""
    return q_RC.float() * scale_R.float()[..., None]


def inverse_factor(hessian_CC: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float32.

    Damping is raised tenfold until the factorisation succeeds. Raises: TrainingError for a Hessian that is not
    finite.
    """
    if not bool(torch.isfinite(hessian_CC).all()):
        raise TrainingError("a calibration Hessian is not finite")
    mean = hessian_CC.diagonal().mean()
    eye = torch.eye(len(hessian_CC), device=hessian_CC.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian_CC + damp * mean * eye)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return upper
        damp *= 10


def gptq(w_RC: Tensor, hessian_CC: Tensor, scale_R: Tensor, max_level: int, damp: float, block: int = 128) -> Tensor:
    """Integers, int8 (R, C), that keep W x close for inputs with second moments `hessian_CC`.

    Columns are rounded one by one, most important first; the error of each is spread over those to come.
    Source: GPTQ (Frantar et al. 2022), with descending-diagonal order.
    """
    w, hessian = w_RC.float().clone(), hessian_CC.float().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    w, hessian = w[:, order], hessian[order][:, order]
    factor = inverse_factor(hessian, damp)
    scale = scale_R.float()
    q = torch.empty_like(w)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        errors = torch.empty_like(w[:, first:last])
        for j in range(first, last):
            level = (w[:, j] / scale).round().clamp(-max_level, max_level)
            error = (w[:, j] - level * scale) / factor[j, j]
            w[:, j:last] -= torch.outer(error, factor[j, j:last])
            q[:, j], errors[:, j - first] = level, error
        w[:, last:] -= errors @ factor[first:last, last:]
    return q[:, torch.argsort(order)].to(torch.int8)


class QuantisedModel(NamedTuple):
    """Everything an artifact holds: integers with row scales, and small tensors kept in float16. All on the CPU."""

    integers: dict[str, tuple[Tensor, Tensor]]  # name -> int8 (..., R, C), float16 (..., R)
    small: dict[str, Tensor]


def quantise(model: GPT, hessians: dict[str, Tensor], world: World, widen: float = 1.0) -> QuantisedModel:
    """Quantises every stacked tensor; each rank solves its share of the blocks and all ranks get all integers."""
    integers = {}
    for name, site in SITE_OF.items():
        stack = typing.cast(Tensor, getattr(model, name)).detach()
        stack_LRC = stack if stack.dim() == 3 else stack[None]
        rule = quant_rule(model.config, name, widen)
        scales = torch.stack([row_scales(w_RC, rule) for w_RC in stack_LRC])
        levels = torch.zeros(stack_LRC.shape, dtype=torch.int8, device=stack.device)
        for block, w_RC in enumerate(stack_LRC):
            if block % world.size == world.rank:
                hessian = hessians[f"{site}.{block}" if stack.dim() == 3 else site]
                levels[block] = gptq(w_RC, hessian, scales[block], rule.max_level, model.config.gptq_damp)
        levels = world.sum_(levels).view(stack.shape)
        integers[name] = (levels.cpu(), scales.view(stack.shape[:-1]).cpu())
    return QuantisedModel(integers, {name: v.detach().half().cpu() for name, v in model.vectors().items()})


def restore_weights(model: GPT, quantised: QuantisedModel) -> None:
    """Sets the model's parameters to what the artifact stands for."""
    with torch.no_grad():
        for name, (levels, scales) in quantised.integers.items():
            getattr(model, name).copy_(dequantise(levels, scales))
        for name, value in quantised.small.items():
            getattr(model, name).copy_(value)


def tensor_report(model: GPT, quantised: QuantisedModel) -> list[dict[str, object]]:
    """Entropy in bits per weight and relative error of every quantised tensor."""
    rows: list[dict[str, object]] = []
    for name, (levels, scales) in quantised.integers.items():
        w = typing.cast(Tensor, getattr(model, name)).detach().float().cpu()
        error = (w - dequantise(levels, scales)).norm() / w.norm()
        rows.append({"name": name, "bits": round(entropy_bits(levels) / levels.numel(), 4),
                     "error": round(float(error), 5)})
    return rows


def entropy_bits(levels: Tensor) -> float:
    """Order-0 entropy of a stack of integers in bits, one histogram per matrix."""
    total = 0.0
    for matrix in levels if levels.dim() == 3 else levels[None]:
        counts = torch.bincount(matrix.flatten().int() + 128, minlength=256).double()
        counts = counts[counts > 0]
        total += float((counts * (counts.sum().log2() - counts.log2())).sum())
    return total


def gaussian_bits(rule: QuantRule) -> float:
    """Bits per weight of Gaussian rows under `rule`: differential entropy less the logarithm of the step."""
    return 0.5 * math.log2(2 * math.pi * math.e) - math.log2(rule.clip_sigmas / rule.max_level)


def estimate_artifact_bytes(config: Config) -> int:
    """Bytes of program and model to expect before training, assuming Gaussian weights."""
    layers, dim = config.num_layers, config.model_dim
    matrix = layers * dim * (2 * dim + 2 * config.kv_dim + 2 * config.mlp_dim)
    scales = layers * (3 * dim + 2 * config.kv_dim + config.mlp_dim) + config.vocab_size
    bits = matrix * gaussian_bits(quant_rule(config, "up"))
    bits += config.vocab_size * dim * gaussian_bits(quant_rule(config, "embed"))
    coder_loss = {"brotli": 1.014, "lzma": 1.08}[config.compressor]
    return int(bits / 8 * coder_loss + 1.33 * scales + 8 * layers * dim + len(packed_program()))


# ======================================================================================================
# 8  Artifact
#
# Enters: a `QuantisedModel`. Leaves: one flat file, and back. Nothing in it is executed, every size is declared
# and checked before memory is taken, and a checksum covers every byte. Here too is the packed program, whose
# bytes count beside the model's.
#
#   magic, lengths of the header | header: compressed JSON | streams | first 16 bytes of the SHA-256 of all before
# ======================================================================================================

ARTIFACT_MAGIC = b"GOLF\x00\x01\r\n"
CHECKSUM_BYTES = 16
MOST_HEADER_BYTES = 1 << 20
MOST_ELEMENTS = 1 << 31

# Settings without which the weights mean something else.
MODEL_SETTINGS = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_base",
                  "rope_dims", "ln_scale", "xsa_last_n", "parallel_residual_start", "logit_softcap", "num_loops",
                  "loop_start", "loop_end")


class Artifact(NamedTuple):
    """What an artifact file says."""

    settings: dict[str, float]
    plan: str
    preset: str
    model: QuantisedModel


def compress(data: bytes, codec: str) -> bytes:
    """`data` as `codec` stores it."""
    if codec == "lzma":
        return lzma.compress(data, preset=6)
    import brotli
    return typing.cast(bytes, brotli.compress(data, quality=11, lgwin=24))


def decompress(data: bytes, codec: str, size: int) -> bytes:
    """The inverse of `compress`; never produces more than `size` bytes, give or take one.

    Raises: ArtifactError unless exactly `size` bytes come out and all of `data` is used.
    """
    try:
        if codec == "lzma":
            decoder = lzma.LZMADecompressor()
            out = decoder.decompress(data, size + 1)
            complete = decoder.eof and not decoder.unused_data
        else:
            out, complete = decompress_brotli(data, size)
    except Exception as error:
        raise ArtifactError(f"artifact: a {codec} stream does not decode: {error}") from None
    if len(out) != size or not complete:
        raise ArtifactError(f"artifact: a {codec} stream holds {len(out)} bytes or more, declared {size}")
    return out


def decompress_brotli(data: bytes, size: int) -> tuple[bytes, bool]:
    """At most `size` + 1 bytes of a brotli stream, and whether it ended there."""
    import brotli
    decoder = brotli.Decompressor()
    out = bytearray()
    while not decoder.is_finished() and len(out) <= size:
        piece = decoder.process(b"" if out else data, output_buffer_limit=size + 1 - len(out))
        if not piece:
            break
        out += piece
    return bytes(out), bool(decoder.is_finished())


def require_compressor(config: Config) -> None:
    """Raises ConfigError where the codec is missing, before time is spent on a model that could not be stored."""
    if config.compressor == "brotli":
        try:
            import brotli
        except ImportError:
            raise ConfigError("COMPRESSOR=brotli needs the package brotli: pip install 'brotli>=1.2'") from None
        if not hasattr(brotli.Decompressor, "can_accept_more_data"):
            raise ConfigError("COMPRESSOR=brotli needs brotli 1.2 or newer: pip install -U brotli")


class TensorEntry(NamedTuple):
    """One line of the tensor table. Integers of a stack are one stream per matrix; all float16 tensors share the
    last stream, low bytes first, because exponents compress and mantissas do not."""

    name: str
    kind: Literal["int8", "float16"]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    def part_bytes(self) -> list[int]:
        """Bytes of each integer stream before compression."""
        parts = self.shape[0] if len(self.shape) == 3 else 1
        return [self.num_elements // parts] * parts


def tensor_table(settings: Mapping[str, float]) -> list[TensorEntry]:
    """The tensors that a model with these settings has, in file order, without building it."""
    layers, dim, vocab, heads, kv_heads, loops = (int(settings[k]) for k in (
        "num_layers", "model_dim", "vocab_size", "num_heads", "num_kv_heads", "num_loops"))
    head_dim, mlp_dim = dim // heads, int(settings["mlp_mult"] * dim)
    segment = int(settings["loop_end"] - settings["loop_start"] + 1)
    skips = (layers + loops * segment) // 2
    shapes = {"embed": (vocab, dim), "qkv": (layers, (heads + 2 * kv_heads) * head_dim, dim),
              "out": (layers, dim, heads * head_dim), "up": (layers, mlp_dim, dim), "down": (layers, dim, mlp_dim)}
    small = {"attn_scale": (layers, dim), "mlp_scale": (layers, dim), "resid_mix": (layers, 2, dim),
             "q_gain": (layers, heads), "skip_weights": (skips, dim), "skip_gates": (skips, dim)}
    return [*(TensorEntry(name, "int8", shape) for name, shape in shapes.items()),
            *(TensorEntry(f"{name}.scale", "float16", shape[:-1]) for name, shape in shapes.items()),
            *(TensorEntry(name, "float16", shape) for name, shape in small.items())]


def encode_artifact(quantised: QuantisedModel, config: Config, plan: DepthPlan) -> bytes:
    """The artifact file. Raises: TypeError if the tensors are not those of the configured model."""
    settings = {name: getattr(config, name) for name in MODEL_SETTINGS}
    table = tensor_table(settings)
    tensors = {**{name: levels for name, (levels, _) in quantised.integers.items()},
               **{f"{name}.scale": scale for name, (_, scale) in quantised.integers.items()}, **quantised.small}
    raw: list[bytes] = []
    floats = []
    for entry in table:
        array = tensors.pop(entry.name).contiguous().numpy()
        if array.shape != entry.shape or str(array.dtype) != entry.kind:
            raise TypeError(f"{entry.name} is {array.dtype} {array.shape}, the table says {entry}")
        if entry.kind == "int8":
            raw += [part.tobytes() for part in array.reshape(len(entry.part_bytes()), -1)]
        else:
            floats.append(array.astype("<f2").view(np.uint8).reshape(-1, 2))
    if tensors:
        raise TypeError(f"tensors without a place in the artifact: {', '.join(tensors)}")
    raw.append(np.ascontiguousarray(np.concatenate(floats).T).tobytes())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        streams = list(pool.map(lambda data: compress(data, config.compressor), raw))
    header = json.dumps({"settings": settings, "plan": plan.name, "preset": config.preset, "codec": config.compressor,
                         "streams": [len(s) for s in streams]}, separators=(",", ":")).encode()
    packed = lzma.compress(header, lzma.FORMAT_ALONE)
    body = ARTIFACT_MAGIC + struct.pack("<II", len(packed), len(header)) + packed + b"".join(streams)
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES]


class Header(NamedTuple):
    """The self-description of an artifact file."""

    settings: dict[str, float]
    plan: str
    preset: str
    codec: str
    streams: list[int]  # compressed bytes of each


def decode_header(data: bytes) -> tuple[Header, int]:
    """The header of an artifact whose checksum holds, and where its streams begin. Raises: ArtifactError."""
    start = len(ARTIFACT_MAGIC) + 8
    if not data.startswith(ARTIFACT_MAGIC):
        raise ArtifactError(f"artifact: begins with {data[:8]!r}, not {ARTIFACT_MAGIC!r}")
    if len(data) < start + CHECKSUM_BYTES:
        raise ArtifactError(f"artifact: {len(data)} bytes is shorter than its frame ({start + CHECKSUM_BYTES})")
    if hashlib.sha256(data[:-CHECKSUM_BYTES]).digest()[:CHECKSUM_BYTES] != data[-CHECKSUM_BYTES:]:
        raise ArtifactError("artifact: checksum does not match; the file is damaged or incomplete")
    packed_bytes, header_bytes = struct.unpack_from("<II", data, len(ARTIFACT_MAGIC))
    if header_bytes > MOST_HEADER_BYTES or start + packed_bytes + CHECKSUM_BYTES > len(data):
        raise ArtifactError(f"artifact: header of {header_bytes} bytes, at most {MOST_HEADER_BYTES}")
    try:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=1 << 26)
        header = Header(**json.loads(decoder.decompress(data[start:start + packed_bytes], header_bytes + 1)))
        well_formed = (header.codec in typing.get_args(Compressor) and isinstance(header.settings, dict)
                       and all(type(n) is int and n >= 0 for n in header.streams)
                       and isinstance(header.plan, str) and isinstance(header.preset, str))
    except Exception as error:
        raise ArtifactError(f"artifact: header cannot be read: {type(error).__name__}") from None
    if not well_formed or start + packed_bytes + sum(header.streams) + CHECKSUM_BYTES != len(data):
        raise ArtifactError("artifact: its streams do not add up to the file")
    return header, start + packed_bytes


def decode_artifact(data: bytes) -> Artifact:
    """The contents of an artifact file. Raises: ArtifactError for anything but a whole, well-formed file."""
    header, position = decode_header(data)
    settings = check_settings(header.settings)
    table = tensor_table(settings)
    sizes = [n for entry in table if entry.kind == "int8" for n in entry.part_bytes()]
    num_floats = sum(entry.num_elements for entry in table if entry.kind == "float16")
    if sum(sizes) + num_floats > MOST_ELEMENTS or len(sizes) + 1 != len(header.streams):
        raise ArtifactError(f"artifact: {sum(sizes)} weights in {len(header['streams'])} streams, expected "
                            f"{len(sizes) + 1} streams and at most {MOST_ELEMENTS} weights")
    raw = []
    for length, size in zip(header.streams, [*sizes, 2 * num_floats], strict=True):
        raw.append(decompress(data[position:position + length], header.codec, size))
        position += length
    floats = np.ascontiguousarray(np.frombuffer(raw.pop(), np.uint8).reshape(2, -1).T).view("<f2").ravel()
    tensors: dict[str, Tensor] = {}
    first = 0
    for entry in table:
        if entry.kind == "int8":
            count = len(entry.part_bytes())
            values = np.frombuffer(b"".join(raw[:count]), np.int8)
            del raw[:count]
        else:
            values = floats[first:first + entry.num_elements]
            first += entry.num_elements
        tensors[entry.name] = torch.from_numpy(values.reshape(entry.shape).copy())
    integers = {e.name: (tensors.pop(e.name), tensors.pop(f"{e.name}.scale")) for e in table if e.kind == "int8"}
    return Artifact(settings, header.plan, header.preset, QuantisedModel(integers, tensors))


def check_settings(settings: dict[str, float]) -> dict[str, float]:
    """The model settings of a header, complete, typed and in range. Raises: ArtifactError."""
    if set(settings) != set(MODEL_SETTINGS):
        raise ArtifactError(f"artifact: settings {sorted(set(settings) ^ set(MODEL_SETTINGS))} missing or unknown")
    types = typing.get_type_hints(Config)
    try:
        for name, value in settings.items():
            if type(value) is not types[name] and not (types[name] is float and type(value) is int):
                raise ConfigError(f"{name} is not of type {types[name].__name__}")
        Config(**settings)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ArtifactError(f"artifact: {error}") from None
    return dict(settings)


def load_artifact(path: Path, config: Config, world: World, attend: Attend) -> tuple[GPT, DepthPlan]:
    """The model and depth plan that the file at `path` stands for. Raises: ArtifactError."""
    try:
        artifact = decode_artifact(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    for name, value in artifact.settings.items():
        if value != getattr(config, name):
            raise ArtifactError(f"{path}: was made with {name.upper()}={value} (PRESET={artifact.preset}), but the "
                                f"settings say {getattr(config, name)}")
    plans = {plan.name: plan for plan in depth_plans(config)}
    if artifact.plan not in plans:
        raise ArtifactError(f"{path}: depth plan {artifact.plan!r} is not one of {', '.join(plans)}")
    model = GPT(config, attend, compute_dtype(world.device)).to(world.device)
    restore_weights(model, artifact.model)
    return model, plans[artifact.plan]


def fit_to_cap(model: GPT, hessians: dict[str, Tensor], plan: DepthPlan, world: World,
               log: RunLog) -> tuple[QuantisedModel, bytes]:
    """Quantises and encodes so that program and model fit ARTIFACT_CAP_BYTES.

    With FIT, clips that are too narrow are widened by one factor, found by bisection on the measured size.
    Raises: ArtifactError if the artifact does not fit.
    """
    config, code_bytes = model.config, len(packed_program())
    too_narrow, fits, widen = 1.0, 0.0, 1.0
    best: tuple[QuantisedModel, bytes] | None = None
    for _ in range(16):
        quantised, blob = quantise_and_encode(model, hessians, plan, world, log, widen)
        total = code_bytes + int(world.decide(len(blob))[0])
        if total <= config.artifact_cap_bytes:
            best, fits = (quantised, blob), widen
            if widen == 1.0 or config.artifact_cap_bytes - total < 4000:
                break
        else:
            too_narrow = widen
            log.line(f"fit: {total:,} bytes at clip width x{widen:.4f}, {total - config.artifact_cap_bytes:,} over")
            if not config.fit:
                raise ArtifactError(f"artifact is {total:,} bytes, {total - config.artifact_cap_bytes:,} over "
                                    f"ARTIFACT_CAP_BYTES ({config.artifact_cap_bytes:,}); FIT=1 widens the clips")
        if fits and fits / too_narrow < 1.0005:
            break
        excess_bits = 8 * (total - config.artifact_cap_bytes + 1500) / (total - code_bytes) * 3.5
        guess = widen * 2**max(-2.0, min(2.0, excess_bits))
        inside = too_narrow < guess < fits if fits else guess > too_narrow
        widen = guess if inside else (math.sqrt(too_narrow * fits) if fits else too_narrow * 2)
    if best is None:
        raise ArtifactError(f"artifact does not fit ARTIFACT_CAP_BYTES ({config.artifact_cap_bytes:,}) even with clips "
                            f"x{too_narrow:.0f}; the packed program alone is {code_bytes:,} bytes")
    if fits != 1.0:
        log.warn(f"the preset's clip widths do not fit the cap: widened x{fits:.4f}")
    log.put("quantisation", clip_widening=round(fits, 5))
    return best


def quantise_and_encode(model: GPT, hessians: dict[str, Tensor], plan: DepthPlan, world: World, log: RunLog,
                        widen: float) -> tuple[QuantisedModel, bytes]:
    """One pass from weights to file; only rank 0 encodes, the others return an empty file."""
    begin = time.perf_counter()
    quantised = quantise(model, hessians, world, widen)
    solved = time.perf_counter()
    blob = encode_artifact(quantised, model.config, plan) if world.is_main else b""
    log.put("quantisation", seconds_solve=round(solved - begin, 2),
            seconds_encode=round(time.perf_counter() - solved, 2))
    return quantised, blob


def save_artifact(path: Path, blob: bytes, quantised: QuantisedModel, model: GPT, log: RunLog) -> None:
    """Writes the artifact and says where its bytes go."""
    write_atomically(path, blob)
    config, code_bytes = model.config, len(packed_program())
    total = code_bytes + len(blob)
    weights = sum(levels.numel() for levels, _ in quantised.integers.values())
    log.put("artifact", code_bytes=code_bytes, model_bytes=len(blob), total_bytes=total,
            cap_bytes=config.artifact_cap_bytes, unused_bytes=config.artifact_cap_bytes - total,
            sha256=hashlib.sha256(blob).hexdigest(), codec=config.compressor, path=str(path))
    log.put("quantisation", bits_per_weight=round(8 * len(blob) / weights, 4),
            by_tensor=tensor_report(model, quantised))
    log.event("artifact", code_bytes=code_bytes, model_bytes=len(blob), total_bytes=total)
    log.line(f"artifact_bytes = {code_bytes:,} code + {len(blob):,} model = {total:,} / "
             f"{config.artifact_cap_bytes:,}")


def strip_source(source: str) -> str:
    """The same program without comments, docstrings and annotations of variables nobody reads at run time."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(
                    first.value.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def pack_program(source: str) -> bytes:
    """A zip that Python runs like the script: equal sources give equal bytes, and tracebacks, compilers and Triton
    find the source text through the loader."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("__main__.py")
        member.create_system = 3
        archive.writestr(member, strip_source(source), zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


# ======================================================================================================
# 9  Evaluation
#
# Enters: a model and the validation stream. Leaves: nats per target in a ledger, and their total in bits per
# byte. Target t is token t+1 of the stream, predicted from tokens up to t.
# ======================================================================================================


class ScoreLedger:
    """Every target's score, taken exactly once.

    `released` hands out tokens for adaptation only after their scores are in; `total_nats` refuses to add up an
    incomplete ledger. With several ranks, `agree` says between which targets all of them have finished.
    """

    def __init__(self, stream: ValStream, world: World) -> None:
        self.stream, self.world = stream, world
        self.scored = np.zeros(stream.num_targets, dtype=np.uint8)  # by this rank
        self.final = np.zeros(stream.num_targets, dtype=np.uint8)  # by any rank, as agreed
        self.nats = torch.zeros(stream.num_targets, device=world.device)

    def commit(self, starts: np.ndarray, counts: np.ndarray, nats_BS: Tensor) -> None:
        """Takes the scores of targets starts[b] to starts[b] + counts[b] from the front of row b.

        Raises: LegalityError if one of them was scored before.
        """
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        if (self.scored[positions] | self.final[positions]).any() or np.unique(positions).size != positions.size:
            raise LegalityError(f"targets between {positions.min()} and {positions.max()} were scored before")
        self.scored[positions] = 1
        keep = torch.from_numpy(np.arange(nats_BS.shape[1])[None, :] < counts[:, None])
        rows = nats_BS[:len(starts)]
        self.nats[torch.from_numpy(positions).to(rows.device)] = rows[keep.to(rows.device)].float()

    def agree(self, first: int, last: int) -> None:
        """Makes the scores of all ranks for targets `first` to `last` final.

        Raises: LegalityError if two ranks scored the same target.
        """
        flags = torch.from_numpy(self.scored[first:last].copy())
        if self.world.size > 1:
            dist.all_reduce(flags, group=self.world.control)
        if bool((flags > 1).any()):
            raise LegalityError(f"targets between {first} and {last} were scored by two ranks")
        self.final[first:last] = flags.numpy()

    def released(self, first: int, last: int) -> np.ndarray:
        """Tokens whose scores are final, int32 (last - first + 1): inputs first..last-1 and targets first..last-1.

        Raises: LegalityError if one of those targets has no final score.
        """
        missing = int((self.final[first:last] == 0).sum())
        if missing:
            raise LegalityError(f"{missing} targets between {first} and {last} are not scored yet")
        return self.stream.tokens[first:last + 1]

    def total_nats(self) -> float:
        """Sum over all targets and ranks, in float64. Raises: LegalityError if a score is missing."""
        self.agree(0, self.stream.num_targets)
        missing = int((self.final == 0).sum())
        if missing:
            raise LegalityError(f"{missing} of {self.final.size} targets were never scored")
        return float(self.world.sum_(self.nats.double().sum()).item())


class Windows(NamedTuple):
    """Stretches of the stream to run through the model, and which targets each of them scores."""

    starts: np.ndarray  # first input position
    first_scored: np.ndarray  # first target that counts
    stops: np.ndarray  # one past the last target

    def select(self, chosen: slice | np.ndarray) -> Windows:
        """Some of the windows."""
        return Windows(*(a[chosen] for a in self))

    def share(self, world: World) -> Windows:
        """This rank's contiguous share."""
        count = len(self.starts)
        return self.select(slice(count * world.rank // world.size, count * (world.rank + 1) // world.size))


def plain_windows(num_targets: int, seq_len: int) -> Windows:
    """Windows side by side; each scores all its targets."""
    starts = np.arange(0, num_targets, seq_len)
    return Windows(starts, starts, np.minimum(starts + seq_len, num_targets))


def sliding_windows(num_targets: int, seq_len: int, stride: int) -> Windows:
    """Windows every `stride` targets; the first scores all its targets, the others their last `stride`.

    Example: 10 targets, seq_len 4, stride 2 -> windows 0-4, 2-6, 4-8, 6-10 score 0-4, 4-6, 6-8, 8-10
    """
    context = seq_len - stride
    starts = np.arange(0, max(num_targets - context, 1), stride)
    return Windows(starts, np.where(starts == 0, 0, starts + context), np.minimum(starts + seq_len, num_targets))


def chunk_of(windows: Windows, chunk_tokens: int, num_targets: int) -> np.ndarray:
    """Adaptation chunk that each window's first scored target belongs to."""
    return np.minimum(windows.first_scored // chunk_tokens, num_chunks(num_targets, chunk_tokens) - 1)


def num_chunks(num_targets: int, chunk_tokens: int) -> int:
    """Adaptation chunks in a stream."""
    return -(-num_targets // chunk_tokens)


class Scorer:
    """Runs windows through a model and commits their scores. The one way from a model to a number.

    Batches have one shape, the last one padded, so that a compiled model is compiled once.
    """

    def __init__(self, model: GPT, plan: DepthPlan, stream: ValStream, world: World) -> None:
        config = model.config
        self.model, self.plan, self.stream, self.world = model, plan, stream, world
        self.seq_len = config.eval_seq_len
        self.rows = max(1, config.val_batch_tokens // config.eval_seq_len)
        self.block_runner = maybe_compile(run_block, config)
        self.tokens = torch.from_numpy(stream.tokens).to(world.device)

    @torch.no_grad()
    def score(self, windows: Windows, ledger: ScoreLedger) -> None:
        """Scores windows in order; windows that skip equally many positions go through the head together."""
        skipped = windows.first_scored - windows.starts
        for skip in np.unique(skipped):
            group = windows.select(skipped == skip)
            for first in range(0, len(group.starts), self.rows):
                self.score_batch(group.select(slice(first, first + self.rows)), int(skip), ledger)

    def score_batch(self, windows: Windows, skip: int, ledger: ScoreLedger) -> None:
        """Scores at most one batch of windows that all skip their first `skip` positions."""
        starts = np.zeros(self.rows, dtype=np.int64)
        starts[:len(windows.starts)] = windows.starts
        offsets = torch.arange(self.seq_len + 1, device=self.world.device)
        index = (torch.from_numpy(starts).to(self.world.device)[:, None] + offsets).clamp_(max=len(self.tokens) - 1)
        rows = self.tokens[index]
        nats = self.model(rows[:, :-1], rows[:, 1:], self.plan, first_scored=skip, block_runner=self.block_runner)
        ledger.commit(windows.first_scored, windows.stops - windows.first_scored, nats)


class Score(NamedTuple):
    """The outcome of one evaluation."""

    nats: float  # per target
    bits: float  # per byte
    seconds: float


def evaluate(scorer: Scorer, windows: Windows) -> Score:
    """Scores a fixed model on all windows."""
    begin = time.perf_counter()
    ledger = ScoreLedger(scorer.stream, scorer.world)
    scorer.score(windows.share(scorer.world), ledger)
    return finish_score(ledger, begin)


def finish_score(ledger: ScoreLedger, begin: float) -> Score:
    """The score of a complete ledger whose evaluation began at `begin`."""
    nats, stream = ledger.total_nats(), ledger.stream
    return Score(nats / stream.num_targets, bits_per_byte(nats, stream.num_bytes), time.perf_counter() - begin)


def log_score(log: RunLog, key: str, label: str, score: Score) -> None:
    """Writes a score to all three files, under its key and under the label that the published logs use."""
    log.put("bpb", **{key: score.bits})
    log.put("nats", **{key: score.nats})
    log.put("eval_seconds", **{key: round(score.seconds, 2)})
    log.event("eval", label=key, val_loss=score.nats, val_bpb=score.bits, seconds=round(score.seconds, 3))
    log.line(f"{label} val_loss:{score.nats:.8f} val_bpb:{score.bits:.8f} eval_time:{1e3 * score.seconds:.0f}ms")


# ======================================================================================================
# 10  Test-time training
#
# Enters: a model from an artifact and the validation stream. Leaves: its score when it learns from every chunk
# after, and only after, that chunk was scored. The ledger enforces the order.
# ======================================================================================================


class ChunkLearner:
    """Full-weight SGD on tokens that the ledger released."""

    def __init__(self, model: GPT, plan: DepthPlan, world: World, block_runner: Callable[..., Tensor]) -> None:
        self.model, self.plan, self.world, self.block_runner = model, plan, world, block_runner
        self.config = model.config
        self.parameters = list(model.parameters())
        self.sgd = torch.optim.SGD(self.parameters, lr=self.config.ttt_lr, momentum=self.config.ttt_momentum)

    def adapt(self, tokens: np.ndarray, lr: float) -> None:
        """All epochs on one released chunk; a tail shorter than a sequence is left out."""
        seq_len = self.config.eval_seq_len
        count = (tokens.size - 1) // seq_len
        rows = torch.from_numpy(np.stack([tokens[i * seq_len:(i + 1) * seq_len + 1] for i in range(count)])
                                if count else np.empty((0, seq_len + 1), np.int32))
        for group in self.sgd.param_groups:
            group["lr"] = lr
        per_batch = max(1, self.config.val_batch_tokens // seq_len)
        for _ in range(self.config.ttt_epochs):
            for batch in rows.split(per_batch):
                self.descend(batch)

    def descend(self, batch: Tensor) -> None:
        """One step on the mean over the batch, shared out over ranks.

        Every rank runs the same number of rows and joins the collective; rows that only pad count nothing.
        """
        world, total = self.world, len(batch)
        share = -(-total // world.size)
        mine = batch[world.rank * share:(world.rank + 1) * share]
        weight = torch.zeros(share, 1)
        weight[:len(mine)] = 1.0 / (total * (batch.shape[1] - 1))
        rows = torch.zeros(share, batch.shape[1], dtype=batch.dtype)
        rows[:len(mine)] = mine
        rows, weight = rows.to(world.device), weight.to(world.device)
        nats = self.model(rows[:, :-1], rows[:, 1:], self.plan, block_runner=self.block_runner)
        (nats * weight).sum().backward()
        self.reduce_and_clip()
        self.sgd.step()
        self.sgd.zero_grad()

    def reduce_and_clip(self) -> None:
        """Sums the gradients over ranks in one collective and clips their global norm."""
        gradients = [typing.cast(Tensor, p.grad) for p in self.parameters]
        if self.world.size > 1:
            flat = self.world.sum_(torch.cat([g.flatten() for g in gradients]))
            parts = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
        if self.config.ttt_grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.ttt_grad_clip)


def evaluate_adapting(scorer: Scorer, windows: Windows) -> Score:
    """Scores all windows chunk by chunk; after each chunk the model learns from it.

    The last chunk is scored only. The learning rate falls along a cosine over the chunks that are learnt from.
    """
    config, stream, world = scorer.model.config, scorer.stream, scorer.world
    begin = time.perf_counter()
    ledger = ScoreLedger(stream, world)
    learner = ChunkLearner(scorer.model, scorer.plan, world, scorer.block_runner)
    chunk_tokens, targets = config.ttt_chunk_tokens, stream.num_targets
    chunks, total = chunk_of(windows, chunk_tokens, targets), num_chunks(targets, chunk_tokens)
    for chunk in range(total):
        first, last = chunk * chunk_tokens, min((chunk + 1) * chunk_tokens, targets)
        scorer.score(windows.select(chunks == chunk).share(world), ledger)  # 1. predict with the weights as they are
        ledger.agree(first, last)  # 2. final: a second score raises
        if chunk + 1 < total:
            lr = config.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / (total - 1)))
            learner.adapt(ledger.released(first, last), lr)  # 3. learn, from final tokens only
    return finish_score(ledger, begin)


# ======================================================================================================
# 11  Main
#
# The story: settings, checks before any paid time, training, quantisation, one file, and from there on only that
# file. Every error a user can act on ends the program with one line.
# ======================================================================================================

OFFICIAL_VAL_TARGETS = 40_540_160
RECORD_WORLD_SIZE = 8
RECORD_ATTENTION = ("fa3", "fa4", "cudnn")


class Setup(NamedTuple):
    """What is known before the clock starts."""

    config: Config
    world: World
    log: RunLog
    attend: Attend
    val: ValStream
    strict: bool  # the run claims the 10min_16mb track


def resolve_track(config: Config, world: World, val: ValStream, attention: str) -> bool:
    """Whether the run is on the 10min_16mb track. Raises: ConfigError if it claims that but cannot be."""
    official = val.num_targets == OFFICIAL_VAL_TARGETS
    if config.track == "non_record" or (config.track == "auto" and not (world.size == RECORD_WORLD_SIZE and official)):
        return False
    rules = (
        (world.size == RECORD_WORLD_SIZE, "WORLD_SIZE", world.size, RECORD_WORLD_SIZE),
        (official, "validation targets", val.num_targets, OFFICIAL_VAL_TARGETS),
        (config.compile and not os.environ.get("TORCH_COMPILE_DISABLE"), "COMPILE", int(config.compile), 1),
        (attention in RECORD_ATTENTION, "ATTENTION", attention, " or ".join(RECORD_ATTENTION)),
        (0 < config.max_wallclock_seconds <= 600, "MAX_WALLCLOCK_SECONDS", config.max_wallclock_seconds, "at most 600"),
        (config.max_eval_seconds <= 600, "MAX_EVAL_SECONDS", config.max_eval_seconds, "at most 600"),
        (config.artifact_cap_bytes <= 16_000_000, "ARTIFACT_CAP_BYTES", config.artifact_cap_bytes,
         "at most 16000000"),
    )
    for holds, name, value, bound in rules:
        if not holds:
            raise ConfigError(f"TRACK=10min_16mb: {name}={value} must be {bound}")
    return True


def prepare(config: Config, world: World) -> Setup:
    """Everything that can fail before paid time: settings against files, packages, attention, logs."""
    torch.set_float32_matmul_precision("high")
    batch_shape(config, world.size)
    require_compressor(config)
    val = ValStream.load(config)
    if not config.eval_only:
        for path in find_shards(config.dataset_dir, "train"):
            read_shard(path)
    backend = choose_attention(config.attention, world.device)
    strict = resolve_track(config, world, val, backend.name)
    log = RunLog(config, world)
    source, packed = program_source(), packed_program()
    track = "10min_16mb" if strict else "non_record"
    log.result |= {"run_id": log.run_id, "track": track, "preset": config.preset, "seed": config.seed,
                   "world_size": world.size, "config_hash": config.config_hash, "started": utc_text(log.started),
                   "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
                   "packed_sha256": hashlib.sha256(packed).hexdigest(), "config": asdict(config),
                   "differs": config.differs(), "hardware": hardware_facts(world),
                   "versions": version_facts() | {"attention_backend": backend.name}}
    log.event("start", run_id=log.run_id, preset=config.preset, seed=config.seed, config_hash=config.config_hash)
    log.line(source, console=False)
    log.line(f"run {log.run_id}: PRESET={config.preset}, differs from preset: {config.differs() or 'nothing'}")
    log.line(f"versions: {log.result['versions']} hardware: {log.result['hardware']}")
    log.line(f"source: {len(source.encode()):,} bytes sha256 {log.result['source_sha256']}; packed: {len(packed):,} "
             f"bytes sha256 {log.result['packed_sha256']}")
    log.line(f"attention: {backend.name}" + "".join(f"; not {name}: {why}" for name, why in backend.rejected.items()))
    log.line(f"compile: {'torch.compile' if config.compile else 'eager'} | world size {world.size} | track {track}")
    return Setup(config, world, log, backend.attend, val, strict)


def describe_data(setup: Setup, trainer: Trainer) -> None:
    """Logs what the run reads and trains."""
    config, log, val = setup.config, setup.log, setup.val
    log.result["data"] = data_facts(config, trainer.loader.num_tokens, len(trainer.loader.shards), val)
    groups = count_parameters(trainer.model)
    total = sum(count for _, count in groups.values())
    log.put("model", parameters=total, groups={name: list(pair) for name, pair in groups.items()})
    log.line(f"train_shards: {len(trainer.loader.shards)} | train_tokens: {trainer.loader.num_tokens:,} | "
             f"val_tokens: {val.num_targets} (predictions) | val_bytes: {val.num_bytes} | model_params:{total}")


def train_to_artifact(setup: Setup) -> Path:
    """Trains, quantises and writes the artifact; its path."""
    config, world, log, attend, val, _ = setup
    trainer = Trainer(config, world, log, attend)
    describe_data(setup, trainer)

    def validate(model: GPT, plan: DepthPlan, key: str) -> None:
        score = evaluate(Scorer(model, plan, val, world), plain_windows(val.num_targets, config.eval_seq_len))
        log.event("val", step=len(trainer.loss_curve), label=key, val_loss=score.nats, val_bpb=score.bits)
        log.line(f"{len(trainer.loss_curve)}/{config.iterations} val_loss: {score.nats:.4f} val_bpb: {score.bits:.4f}")
        if key == "raw":
            log_score(log, key, "raw weights", score)

    begin = time.perf_counter()
    trained = trainer.run(validate)
    training_seconds = typing.cast("dict[str, float]", log.result["clocks"])["training_seconds"]
    begin = time.perf_counter()
    with float32_products():
        quantised, blob = fit_to_cap(trainer.model, trained.hessians, trained.plan, world, log)
    path = log.folder / "artifact.bin"
    if world.is_main:
        save_artifact(path, blob, quantised, trainer.model, log)
    log.put("clocks", train_to_artifact_seconds=round(training_seconds + time.perf_counter() - begin, 3))
    score = evaluate(Scorer(trainer.model, trained.plan, val, world),
                     plain_windows(val.num_targets, config.eval_seq_len))
    log_score(log, "averaged", "pre-quantization post-ema", score)
    world.barrier()
    return path


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Matrix products in full float32 inside a block: error feedback cancels too finely for tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def evaluate_artifact(setup: Setup, path: Path) -> None:
    """Scores what the file at `path` stands for. The strict clock runs from opening it to the last score."""
    config, world, log, attend, val, _ = setup
    begin = time.perf_counter()
    model, plan = load_artifact(path, config, world, attend)
    scorer = Scorer(model, plan, val, world)
    score = evaluate(scorer, plain_windows(val.num_targets, config.eval_seq_len))
    log_score(log, "quantised", "quantized", score)
    headline = "quantised"
    lenient = score.seconds
    if config.sliding_window_enabled:
        windows = sliding_windows(val.num_targets, config.eval_seq_len, config.eval_stride)
        headline, score = "sliding", evaluate(scorer, windows)
        log_score(log, headline, "quantized_sliding_window", score)
        if config.ttt_enabled:
            log.line(f"ttt:start chunks={num_chunks(val.num_targets, config.ttt_chunk_tokens)} "
                     f"ttt_lr={config.ttt_lr} ttt_epochs={config.ttt_epochs}")
            headline, score = "ttt_sgd", evaluate_adapting(scorer, windows)
            log_score(log, headline, "quantized_ttt", score)
        lenient = score.seconds
    strict_seconds = time.perf_counter() - begin
    per_target = score.seconds * world.size / val.num_targets
    projected = strict_seconds - score.seconds + per_target * OFFICIAL_VAL_TARGETS / RECORD_WORLD_SIZE
    log.put("clocks", eval_seconds_strict=round(strict_seconds, 2), eval_seconds_lenient=round(lenient, 2),
            eval_budget_seconds=config.max_eval_seconds, projected_full_eval_seconds_8gpu=round(projected, 1))
    log.result |= {"headline": headline, "val_bpb": score.bits, "val_loss": score.nats}


def report_outcome(setup: Setup) -> None:
    """Adds the quantisation gap and prints the result table."""
    log = setup.log
    bpb = typing.cast("dict[str, float]", log.result["bpb"])
    if "averaged" in bpb:
        log.put("quantisation", gap_bpb=bpb["quantised"] - bpb["averaged"])
    seconds = typing.cast("dict[str, float]", log.result["eval_seconds"])
    nats = typing.cast("dict[str, float]", log.result["nats"])
    log.line(f"{'evaluation':<14}{'BPB':>10}{'nats':>10}{'seconds':>10}")
    for key in bpb:
        mark = "  <- headline" if key == log.result["headline"] else ""
        log.line(f"{key:<14}{bpb[key]:>10.5f}{nats[key]:>10.5f}{seconds[key]:>10.1f}{mark}")
    log.line(f"clocks: {log.result['clocks']}")
    log.line(f"result: {log.result_path}")


def crossed_budget(setup: Setup) -> str:
    """What a run on the record track did not keep, or nothing."""
    clocks = typing.cast("dict[str, float]", setup.log.result["clocks"])
    if clocks.get("training_seconds", 0) > setup.config.max_wallclock_seconds > 0:
        return f"training took {clocks['training_seconds']}s, budget {setup.config.max_wallclock_seconds}s"
    if clocks["eval_seconds_strict"] > setup.config.max_eval_seconds:
        return f"evaluation took {clocks['eval_seconds_strict']}s, budget {setup.config.max_eval_seconds}s"
    return ""


def describe_config(config: Config, world: World) -> str:
    """Settings, topology, parameters, floating-point operations and expected bytes, as text."""
    lines = [f"{name.upper()}={int(value) if isinstance(value, bool) else value}"
             for name, value in asdict(config).items()]
    lines += [f"differs from preset: {config.differs() or 'nothing'}", f"config hash: {config.config_hash}"]
    for plan in depth_plans(config):
        lines.append(f"plan {plan.name}: {plan.describe()} {flops_per_token(config, plan) / 1e6:.1f} MFLOP per token")
        for number, visit in enumerate(plan.visits):
            form = block_form(config, visit.block)
            skip = f", skip row {visit.skip_row} from visit {visit.skip_from}" if visit.skip_row >= 0 else ""
            lines.append(f"  visit {number:>2}: block {visit.block} pass {visit.pass_number} {form.residual}"
                         f"{' xsa' if form.exclusive else ''}{skip}")
    groups = count_parameters(GPT(config, sdpa_attend))
    lines += [f"{name}: {tensors} tensors, {count:,} parameters" for name, (tensors, count) in groups.items()]
    shape = batch_shape(config, world.size)
    lines += [f"total: {sum(count for _, count in groups.values()):,} parameters",
              f"batch: world size {world.size} x {shape.micro_steps} micro-steps x {shape.sequences} sequences",
              f"expected artifact: {estimate_artifact_bytes(config):,} of {config.artifact_cap_bytes:,} bytes"]
    return "\n".join(lines)


def main(env: Mapping[str, str] = os.environ) -> dict[str, object]:
    """One run from settings to result. Raises: GolfError."""
    config, world = Config.from_env(env), World.from_env(env)
    if config.print_config:
        print(describe_config(config, world))
        return {}
    with world.process_group():
        setup = prepare(config, world)
        try:
            path = Path(config.eval_only) if config.eval_only else train_to_artifact(setup)
            # From here on only the artifact exists.
            evaluate_artifact(setup, path)
            report_outcome(setup)
        except BaseException as error:
            setup.log.finish("partial", f"{type(error).__name__}: {error}")
            raise
        crossed = crossed_budget(setup)
        result = setup.log.finish("complete", crossed or "finished")
        if crossed and setup.strict:
            raise BudgetError(crossed)
        return result


def command_line(arguments: Sequence[str]) -> int:
    """Runs the program or a sub-command; the exit code."""
    try:
        if arguments[:1] == ["pack"] and len(arguments) == 2:
            packed = packed_program()
            write_atomically(Path(arguments[1]), packed)
            print(f"{arguments[1]}: {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")
        elif arguments:
            print(__doc__, file=sys.stderr)
            return 2
        else:
            main()
    except GolfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# ======================================================================================================
# 12  Kernels
#
# Attention libraries behind one signature. Each loader imports what it needs, so that a machine without the
# library only loses the choice.
# ======================================================================================================


def require_capability(device: torch.device, *majors: int) -> None:
    """Raises GolfError unless the device is a GPU of one of these compute-capability majors."""
    if device.type != "cuda":
        raise GolfError("needs a CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    if major not in majors:
        raise GolfError(f"compute capability {major}.{minor}, needs major {' or '.join(map(str, majors))}")


def load_fa3(device: torch.device) -> Attend:
    """flash-attn-3, whose package registers operators that torch.compile knows."""
    require_capability(device, 9)
    from flash_attn_interface import flash_attn_func

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        result = flash_attn_func(q_BTHK, k_BTGK, v_BTGK, causal=True)
        return result[0] if isinstance(result, tuple) else result

    return attend


def load_fa4(device: torch.device) -> Attend:
    """flash-attn-4, wrapped in operators of our own, because the package registers none."""
    require_capability(device, 9, 10)
    operator = fa4_operator()
    return lambda q_BTHK, k_BTGK, v_BTGK: operator(q_BTHK, k_BTGK, v_BTGK)[0]


@functools.cache
def fa4_operator() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Causal attention as a differentiable operator: q, k, v -> y (B, T, H, K) and log-sum-exp (B, H, T)."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    @torch.library.custom_op("golf::fa4_forward", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y, log_sum, *_ = _flash_attn_fwd(q, k, v, causal=True, return_lse=True)
        return y, log_sum

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
            (q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)

    @torch.library.custom_op("golf::fa4_backward", mutates_args=())
    def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor,
                 log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, y, dy, log_sum, causal=True)
        return dq, dk, dv

    @backward.register_fake
    def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor,
          log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))  # type: ignore[return-value]

    def save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...],
             output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: torch.autograd.function.FunctionCtx, dy: Tensor,
                      _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        return typing.cast("tuple[Tensor, Tensor, Tensor]", backward(dy.contiguous(), *saved))

    forward.register_autograd(differentiate, setup_context=save)
    return typing.cast("Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]", forward)


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
