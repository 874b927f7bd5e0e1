"""Train, compress and score a small language model: the best that fits in 16,000,000 bytes.

One file is the whole system. It trains a depth-recurrent transformer within a time budget,
quantises it with second-order information, packs it into one flat file, reloads that file, and
scores held-out text in bits per byte (BPB), with and without test-time training.

    make run                                                     the whole story on a laptop
    torchrun --standalone --nproc_per_node=8 train_gpt.py        a run on eight GPUs
    EVAL_ONLY=runs/<run_id>/artifact.bin python train_gpt.py     score an existing artifact
    python train_gpt.py pack OUT                                 write the program whose bytes count

Settings are environment variables; PRINT_CONFIG=1 shows them and what they build.

Sections, in the order the data flows: 1 Config, 2 Runtime, 3 Data, 4 Model, 5 Optimizer,
6 Training, 7 Quantisation, 8 Artifact, 9 Evaluation, 10 Test-time training, 11 Main, 12 Kernels.
"""

from __future__ import annotations

import ast
import bz2
import contextlib
import difflib
import functools
import hashlib
import io
import json
import lzma
import math
import operator
import os
import platform
import re
import signal
import struct
import sys
import time
import typing
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if typing.TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# ==================================================================================================
# 1  Config
#
# Enters: environment variables. Leaves: one frozen `Config`, complete and checked. A preset is a
# table of differences from the defaults; a variable named like a field, in capitals, overrides it.
# What looks like a setting of ours but is none is an error: a misspelt setting costs a paid run.
# ==================================================================================================


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


class TrainingError(GolfError):
    """Training or quantisation produced what nothing later can recover from."""


def require(holds: object, name: str, value: object, bound: object) -> None:
    """Raises ConfigError with what the setting has to be, unless that holds."""
    if not holds:
        raise ConfigError(f"{name.upper()}={value} must be {bound}")


def within(default: float, low: float, high: float) -> typing.Any:
    """A setting with its range, both ends included."""
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
    checkpoint_every: float = within(0.0, 0, 1e7)  # seconds; 0: only when a signal ends training
    rank_timeout_seconds: float = within(900.0, 1, 1e7)  # for which a rank waits for the others
    audit: bool = False  # checks sampled scores live and refuses a headline that fails
    attention: Literal["auto", "fa3", "fa4", "cudnn", "flash", "math"] = "auto"
    compile: bool = True
    # Data
    data_dir: str = "./data"  # holds datasets/ and tokenizers/
    data_path: str = ""  # folder of the shards; default: by vocab_size under data_dir
    tokenizer_path: str = ""  # SentencePiece model; default: likewise
    vocab_size: int = within(8192, 8, 65_535)
    train_seq_len: int = within(2048, 8, 1 << 20)  # tokens per training window
    train_batch_tokens: int = within(786_432, 8, 1 << 30)  # per optimizer step, all ranks
    micro_batch_tokens: int = within(98_304, 8, 1 << 24)  # most in one forward pass of one rank
    # Model
    num_layers: int = within(11, 2, 256)  # physical blocks
    model_dim: int = within(512, 8, 16_384)
    num_heads: int = within(8, 1, 256)
    num_kv_heads: int = within(4, 1, 256)
    mlp_mult: float = within(4.0, 0.1, 32)
    rope_base: float = within(10_000.0, 1, 1e7)
    rope_dims: int = within(16, 0, 1024)  # rotated dimensions of each head; 0: all
    qk_gain_init: float = within(5.25, 0.01, 100)
    ln_scale: bool = True  # norm outputs are divided by sqrt(block + 1)
    xsa_last_n: int = within(11, 0, 256)  # exclusive self attention on that many last blocks
    parallel_residual_start: int = within(7, -1, 256)  # -1: every block is serial
    logit_softcap: float = within(30.0, 1, 1e4)
    tied_embed_init_std: float = within(0.005, 1e-6, 1)
    # Depth recurrence
    num_loops: int = within(2, 0, 16)  # extra passes through the loop segment
    loop_start: int = within(3, 0, 255)
    loop_end: int = within(5, 0, 255)  # inclusive
    enable_looping_at: float = within(0.35, 0, 1)  # progress at which they begin
    # Optimizer
    matrix_lr: float = within(0.022, 0, 10)
    tied_embed_lr: float = within(0.03, 0, 10)
    scalar_lr: float = within(0.02, 0, 10)
    muon_momentum: float = within(0.99, 0, 0.9999)
    muon_momentum_warmup_start: float = within(0.92, 0, 0.9999)
    muon_momentum_warmup_steps: int = within(1500, 1, 10**7)
    muon_backend_steps: int = within(5, 1, 20)  # Newton-Schulz iterations
    muon_row_normalize: bool = True
    muon_wd: float = within(0.095, 0, 10)
    embed_wd: float = within(0.085, 0, 10)
    adam_wd: float = within(0.02, 0, 10)
    beta1: float = within(0.9, 0, 0.9999)
    beta2: float = within(0.95, 0, 0.9999)
    adam_eps: float = within(1e-8, 1e-20, 1)
    grad_clip_norm: float = within(0.3, 0, 1e7)  # global; 0: off
    # Schedule
    iterations: int = within(20_000, 1, 10**7)  # most optimizer steps
    max_wallclock_seconds: float = within(600.0, 0, 1e7)  # 0: progress is step / iterations
    gptq_reserve_seconds: float = within(12.0, 0, 1e7)  # least share kept for calibration
    warmdown_frac: float = within(0.72, 0.001, 1)  # last share of progress with falling rate
    min_lr: float = within(0.0, 0, 1)  # floor of the learning-rate scale
    warmup_steps: int = within(20, 1, 1000)  # untimed micro-steps per plan, on random tokens
    ema_decay: float = within(0.9965, 0, 0.9999)  # per optimizer step
    train_log_every: int = within(500, 1, 10**7)
    val_loss_every: int = within(4000, 0, 10**7)  # steps; 0: never while training
    # Quantisation and artifact
    matrix_bits: int = within(6, 2, 8)
    embed_bits: int = within(8, 2, 8)
    matrix_clip_sigmas: float = within(12.85, 0.5, 1000)
    embed_clip_sigmas: float = within(20.0, 0.5, 1000)
    gptq_calibration_batches: int = within(64, 1, 10**7)  # of micro_batch_tokens, all ranks
    max_quant_gap_bpb: float = within(0.05, 0, 100)  # a larger loss by quantisation is no result
    gptq_damp: float = within(0.01, 1e-6, 1)  # of the mean Hessian diagonal
    quantiser: Literal["gptq", "rate"] = "gptq"  # clips as given, or steps by their effect per bit
    compressor: Literal["brotli", "ans"] = "brotli"
    fit: bool = True  # one factor on all steps fits the artifact to its cap
    artifact_cap_bytes: int = within(16_000_000, 1000, 10**12)  # packed program and model file
    # Evaluation
    eval_seq_len: int = within(2048, 8, 1 << 20)
    eval_stride: int = within(64, 1, 1 << 20)
    val_batch_tokens: int = within(524_288, 8, 1 << 27)  # eight ranks' share of a forward pass
    sliding_window_enabled: bool = False
    val_tail: bool = True  # 0: without the tail that fills no sequence, as the published runs
    max_eval_seconds: float = within(600.0, 1, 1e7)
    # Test-time training
    ttt_enabled: bool = True
    ttt_mode: Literal["sgd", "documents"] = "documents"  # one stream, or each document alone
    ttt_lr: float = within(0.005, 0, 10)
    ttt_epochs: int = within(3, 0, 100)
    ttt_momentum: float = within(0.9, 0, 0.9999)
    ttt_chunk_tokens: int = within(32_768, 8, 1 << 24)
    ttt_grad_clip: float = within(1.0, 0, 1e7)
    ttt_batch_size: int = within(32, 1, 4096)  # documents that adapt side by side
    ttt_chunk_size: int = within(48, 1, 1 << 16)  # targets between two steps; CHUNK_SCALES
    ttt_lora_sites: str = "qkv,out,up,down,head"  # adapted layers, of every visit
    ttt_lora_rank: int = within(80, 1, 4096)
    ttt_lora_alpha: float = within(144.0, 0, 1e7)  # output is scaled by alpha / rank
    ttt_lora_lr: float = within(1e-4, 0, 1)
    ttt_beta1: float = within(0.0, 0, 0.9999)
    ttt_beta2: float = within(0.99, 0, 0.9999)
    ttt_weight_decay: float = within(0.5, 0, 100)
    ttt_warm_start_a: bool = False  # input factors survive from one batch of documents to the next

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            for low, high in f.metadata.values():
                require(low <= value <= high, f.name, value, f"between {low:g} and {high:g}")
        check_consistency(self)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """The settings of PRESET under those of `env`. Raises: ConfigError, also if misspelt."""
        known = {name.upper(): kind for name, kind in typing.get_type_hints(cls).items()}
        for variable in sorted(env.keys() - known):
            if variable in RETIRED:
                raise ConfigError(f"{variable} has no effect; {RETIRED[variable]}")
            owned = set(OWNED_WORDS.split()).intersection(variable.split("_"))
            near = difflib.get_close_matches(variable, known, n=1, cutoff=0.85 * (not owned))
            if near:
                raise ConfigError(f"{variable} is unknown; did you mean {near[0]}?")
        preset = env.get("PRESET", "record")
        require(preset in PRESETS, "preset", repr(preset), f"one of {', '.join(PRESETS)}")
        given = {name.lower(): parse_setting(name, env[name], kind)
                 for name, kind in known.items() if name in env}
        return cls(**{**PRESETS[preset], "preset": preset, **given})

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
    def eval_rows(self) -> int:
        """Windows in one evaluation batch of one rank."""
        return max(1, self.val_batch_tokens // (8 * self.eval_seq_len))

    @property
    def dataset_dir(self) -> Path:
        """Folder with the shards."""
        return Path(self.data_path or f"{self.data_dir}/datasets/fineweb10B_sp{self.vocab_size}")

    @property
    def tokenizer_file(self) -> Path:
        """The SentencePiece model."""
        default = f"{self.data_dir}/tokenizers/fineweb_{self.vocab_size}_bpe.model"
        return Path(self.tokenizer_path or default)

    def method(self) -> dict[str, object]:
        """The settings that define the method: equal for the seeds of one experiment."""
        return {k: v for k, v in asdict(self).items() if k not in NOT_METHOD}

    @property
    def config_hash(self) -> str:
        """Fingerprint of the method."""
        return hashlib.sha256(json.dumps(self.method(), sort_keys=True).encode()).hexdigest()[:16]

    def differs(self) -> dict[str, object]:
        """The settings that are unlike the preset's."""
        base = Config.from_env({"PRESET": self.preset})
        return {k: v for k, v in asdict(self).items() if v != getattr(base, k)}


NOT_METHOD = {"seed", "run_id", "log_dir", "run_dir", "print_config", "eval_only", "data_dir",
              "data_path", "tokenizer_path", "audit", "resume", "checkpoint_every",
              "rank_timeout_seconds", "max_quant_gap_bpb"}

PRESETS: dict[str, dict] = {
    "record": {},
    "pr1493": dict(sliding_window_enabled=True, val_tail=False, ttt_mode="sgd"),
    # The same program at laptop size: two CPU cores, about two minutes.
    "demo": dict(
        data_path="data/datasets/demo_sp1024", tokenizer_path="data/tokenizers/demo_1024_bpe.model",
        compile=False, vocab_size=1024, train_seq_len=256, train_batch_tokens=6144,
        micro_batch_tokens=6144, num_layers=5, model_dim=128, num_heads=4, num_kv_heads=2,
        mlp_mult=3.0, rope_dims=8, xsa_last_n=5, parallel_residual_start=3, num_loops=1,
        loop_start=1, loop_end=2, matrix_lr=0.03, muon_momentum=0.95,
        muon_momentum_warmup_steps=40, grad_clip_norm=1.0, ema_decay=0.95,
        max_wallclock_seconds=75.0, gptq_reserve_seconds=1.0, warmup_steps=1, train_log_every=10,
        val_loss_every=0, gptq_calibration_batches=8, eval_seq_len=256, val_batch_tokens=65_536,
        ttt_chunk_tokens=4096, ttt_batch_size=16, ttt_chunk_size=32, ttt_lora_rank=16,
        ttt_lora_alpha=32.0, ttt_lora_lr=1e-3),
}

# Published variables without effect here, and what to do instead.
RETIRED = {
    "MUON_BETA2": "use MUON_MOMENTUM", "ROPE_TRAIN_SEQ_LEN": "use TRAIN_SEQ_LEN",
    "EMBEDDING_DIM": "use MODEL_DIM", **dict.fromkeys(("EMBED_LR", "HEAD_LR"), "use TIED_EMBED_LR"),
    **dict.fromkeys(("ETLB_ENABLED", "ETLB_LR", "ETLB_STEPS", "ETLB_CLIP"), "use TTT_ENABLED"),
    **dict.fromkeys(("TIE_EMBEDDINGS", "SKIP_GATES_ENABLED", "CONTROL_TENSOR_NAME_PATTERNS"),
                    "remove it"),
}

# A variable with one of these words between underscores can only be meant for this program.
OWNED_WORDS = "TTT MUON GPTQ EMA SWA WARMDOWN LOOPS XSA ROPE WALLCLOCK EMBED CLIP LORA MLP QK LR"



def parse_setting(name: str, text: str, kind: typing.Any) -> object:
    """The value of `text` as a type or as one of the literals. Raises: ConfigError."""
    choices = ("0", "1") if kind is bool else typing.get_args(kind) or (text,)
    require(text in choices, name, repr(text), f"one of {', '.join(choices)}")
    if kind is bool:
        return text == "1"
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be a {'whole ' * (kind is int)}number") from None


# Relations between settings in words, and what contradicts them.
RELATIONS: dict[str, tuple[str, Callable]] = {
    "%": ("a multiple of", operator.mod), "<=": ("at most", operator.gt),
    "<": ("below", operator.ge)}


def check_consistency(config: Config) -> None:
    """Raises ConfigError for the first two settings that contradict each other."""
    rules = ["model_dim % num_heads", "head_dim % 2", "num_heads % num_kv_heads", "rope_dims % 2",
             "rope_dims <= head_dim", "train_batch_tokens % train_seq_len",
             "train_seq_len <= micro_batch_tokens", "eval_stride <= eval_seq_len",
             "ttt_chunk_size <= eval_seq_len"]
    if config.num_loops:
        rules += ["loop_start <= loop_end", "loop_end < num_layers"]
    if config.max_wallclock_seconds:
        rules.append("gptq_reserve_seconds < max_wallclock_seconds")
    if config.ttt_enabled and config.ttt_mode == "sgd":
        rules += ["ttt_enabled <= sliding_window_enabled", "ttt_chunk_tokens % eval_seq_len"]
    for name, sign, other in map(str.split, rules):
        (words, broken), value = RELATIONS[sign], getattr(config, name)
        bound = getattr(config, other, 2)
        require(not broken(value, bound), name, value, f"{words} {other.upper()} ({bound})")
    require(config.compressor == "ans" or config.quantiser == "gptq", "compressor",
            config.compressor, f"ans for QUANTISER={config.quantiser}")
    require(config.run_id or not config.resume, "run_id", "''", f"set for RESUME={config.resume}")
    sites = config.ttt_lora_sites
    require(set(sites.split(",")) <= set(SITES), "ttt_lora_sites", sites,
            f"some of {','.join(SITES)}")


# ==================================================================================================
# 2  Runtime
#
# Enters: the variables that torchrun sets. Leaves: a `World` (who we are, which device, how ranks
# talk) and a `RunLog` (text for people, JSON lines for programs, one result file). All in seconds.
# ==================================================================================================


class World:
    """This process among its peers. At world size 1 every collective is the identity."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.is_main, self.is_cuda = rank == 0, self.device.type == "cuda"
        # Decisions of the host travel over a CPU group and never wait for the device.
        self.control: dist.ProcessGroup | None = None
        self.deferring = self.signalled = self.stopping = False

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> World:
        """The world that torchrun describes, or a world of one. Raises: ConfigError."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given, gpus = [env[name] for name in names if name in env], torch.cuda.device_count()
        try:
            rank, size, local_rank = map(int, given or (0, 1, 0))
        except ValueError:
            raise ConfigError(f"{', '.join(names)}={given} must be three numbers") from None
        require(0 <= rank < size, "rank", rank, f"below WORLD_SIZE ({size})")
        require(local_rank < gpus or not gpus, "local_rank", local_rank,
                f"below the number of visible GPUs ({gpus})")
        return cls(rank, size, f"cuda:{local_rank}" if gpus else "cpu")

    @contextlib.contextmanager
    def process_group(self, timeout_seconds: float = 900.0) -> Iterator[None]:
        """Connects the ranks for a block, which ends for all if it fails for one, and says why."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)
        handlers = {number: signal.signal(number, self.interrupt)
                    for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if self.size > 1:
                backend, device = ("nccl", self.device) if self.is_cuda else ("gloo", None)
                wait = timedelta(seconds=timeout_seconds)
                dist.init_process_group(backend, rank=self.rank, world_size=self.size,
                                        device_id=device, timeout=wait)
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
                    print(f"error: {reason}", file=sys.stderr, flush=True)
                # An orderly end would wait for the others.
                os._exit(75 if isinstance(error, KeyboardInterrupt) else 1)
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

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor`, replaced by its sum over ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all_(self, tensors: list[Tensor], scale: float = 1.0) -> None:
        """Replaces each tensor by `scale` times its sum over ranks, in one collective."""
        if self.size > 1:
            flat = self.sum_(torch.cat([t.flatten() for t in tensors])).mul_(scale)
            parts = zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
            torch._foreach_copy_(tensors, [part.view_as(t) for part, t in parts])

    def scatter_mean(self, stack: Tensor) -> Tensor:
        """This rank's equal share, along dim 0, of the mean of `stack` over ranks."""
        if self.size == 1:
            return stack
        share = stack.chunk(self.size)[self.rank]
        if self.is_cuda:
            share = torch.empty_like(share)
            dist.reduce_scatter_tensor(share, stack, op=dist.ReduceOp.AVG)
        else:  # gloo has no reduce-scatter
            self.sum_(stack).div_(self.size)
        return share

    def gather(self, share: Tensor) -> Tensor:
        """The shares of all ranks, concatenated along dim 0 in rank order."""
        if self.size == 1:
            return share
        out = share.new_empty((self.size * share.shape[0], *share.shape[1:]))
        dist.all_gather_into_tensor(out, share.contiguous())
        return out

    def decide(self, *values: float) -> tuple[float, ...]:
        """Rank 0's `values` on every rank, and in `stopping`, whether one was told to stop."""
        mine = values if self.is_main else [0.0] * len(values)
        box = torch.tensor([*mine, self.signalled], dtype=torch.float64)
        *decided, stopping = self.combine(box).tolist()
        self.stopping = stopping > 0
        return tuple(decided)

    def combine(self, tensor: Tensor,
                operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """A CPU tensor, combined over ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, operation, group=self.control)
        return tensor

    def synchronize(self) -> None:
        """Waits for all ranks and for what their devices were given."""
        if self.is_cuda:
            torch.cuda.synchronize()
        if self.size > 1:
            dist.barrier(group=self.control)


class RunLog:
    """The files of one run: text, JSON lines and the `result`. Ranks other than 0 are silent."""

    def __init__(self, config: Config, world: World) -> None:
        self.started = time.time()
        stamp = f"{config.preset}-{config.seed}-{utc_text('%Y%m%dT%H%M%S')}"
        self.run_id = run_id = config.run_id or stamp
        self.folder = Path(config.run_dir, run_id)
        self.result_path = Path(config.log_dir, run_id + ".json")
        self.result: dict = {}  # filled as its keys become known
        self.files: list[typing.TextIO] = []
        require(re.fullmatch(r"[\w-][\w.-]*", run_id, re.ASCII), "run_id", repr(run_id),
                "letters, digits, . _ and - only")
        if config.resume and self.result_path.is_file():
            self.result = json.loads(self.result_path.read_text())
            require(self.result["status"] == "partial", "run_id", run_id, "of an incomplete run")
        if not world.is_main:
            return
        import fcntl
        owner = self.folder / "owner"
        mode: Literal["a", "x"] = "a" if config.resume else "x"
        try:
            self.result_path.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(parents=True, exist_ok=mode == "a")
            self.lock = owner.open("a")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner.write_text(f"process {os.getpid()} on {platform.node()}")
            self.files = [self.result_path.with_name(run_id + suffix).open(mode)
                          for suffix in (".txt", ".jsonl")]
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
        """Writes one line for people."""
        if self.files and console:
            print(text, flush=True)
        self.append(0, text)

    def event(self, kind: str, **values: object) -> None:
        """Writes one JSON line for programs."""
        record = {"event": kind, "t": time.time() - self.started, **values}
        self.append(1, json.dumps(record))

    def warn(self, message: str) -> None:
        """Says something the user should know, in both files."""
        self.line(f"warning: {message}")
        self.event("warning", message=message)

    def put(self, title: str, **values: typing.Any) -> None:
        """Adds keys to a section of the result."""
        self.result.setdefault(title, {}).update(values)

    def write_result(self, status: Literal["complete", "partial"], reason: str) -> dict:
        """Writes the result as it stands."""
        self.event("result", status=status, reason=reason)
        self.result |= {"status": status, "exit_reason": reason, "finished": utc_text()}
        if self.files:
            write_atomically(self.result_path, (json.dumps(self.result, indent=1) + "\n").encode())
        return self.result


def utc_text(form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    """The time now, as ISO 8601 text."""
    return time.strftime(form, time.gmtime())


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Writes `data` so that a reader, or a crash, never sees half of it, nor through a link."""
    partial = path.with_name(path.name + ".partial")
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


# The packed program that is running, or None for the plain script.
ARCHIVE = getattr(globals().get("__loader__"), "archive", None)


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
    cuda, device = world.is_cuda, world.device
    hardware: dict = {"gpu": torch.cuda.get_device_name(device) if cuda else "none",
                      "gpus": world.size * cuda, "cpu_count": os.cpu_count()}
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__, "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version()}
    if cuda:
        with contextlib.suppress(ImportError):
            versions["triton"] = __import__("triton").__version__
        with contextlib.suppress(OSError):
            text = Path("/proc/driver/nvidia/version").read_text()
            hardware["driver"] = text.split("  ")[1]  # follows the module's name
    return {"hardware": hardware, "versions": versions}


# ==================================================================================================
# 3  Data
#
# Enters: shards of uint16 token ids and a SentencePiece model. Leaves: training windows in an order
# that only the seed decides, and the validation stream with the bytes every target stands for.
# ==================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
BOS_ID = 1
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a leading space


def read_shard(path: Path, vocab_size: int | None = None) -> np.ndarray:
    """The uint16 ids of a shard, mapped, below `vocab_size` if given. Raises: DataError."""
    try:
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
        actual = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if header.size < SHARD_HEADER_INTS:
        raise DataError(f"{path}: {actual} bytes, shorter than a header ({4 * SHARD_HEADER_INTS})")
    magic, version, count = header[:3].tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise DataError(f"{path}: magic {magic} version {version}, expected {SHARD_MAGIC} "
                        f"and {SHARD_VERSION}")
    if count < 0 or actual != 4 * SHARD_HEADER_INTS + 2 * count:
        raise DataError(f"{path}: {actual} bytes, but the header announces {count} tokens")
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
        raise DataError(f"{folder}: no *_{split}_*.bin shards; tools/prepare_data.py provides them")
    return found


class TrainLoader:
    """Windows of `seq_len + 1` tokens, without replacement, new boundaries and order every pass.

    Window number n depends on the seed and the shards alone, so a run can resume from a number.
    """

    def __init__(self, shards: Sequence[np.ndarray], config: Config) -> None:
        self.shards, self.config, self.seq_len = shards, config, config.train_seq_len
        self.offsets = np.cumsum([0] + [s.size for s in shards])
        self.num_tokens = int(self.offsets[-1])
        self.enter_epoch(0, 0)
        if not self.starts.size:
            raise DataError(
                f"{config.dataset_dir}: {self.num_tokens} training tokens in {len(shards)} shards, "
                f"none as long as TRAIN_SEQ_LEN ({self.seq_len}) + 1")

    def enter_epoch(self, epoch: int, first_number: int) -> None:
        """Draws the windows of one pass: start positions in the concatenation of all shards."""
        rng = np.random.Generator(np.random.PCG64([self.config.seed, epoch]))
        starts = []
        for shard, offset in zip(self.shards, self.offsets[:-1], strict=True):
            last = shard.size - self.seq_len  # where a window would lack its final token
            phase = rng.integers(max(1, min(self.seq_len, last)))
            starts.append(offset + np.arange(phase, last, self.seq_len))
        self.starts = rng.permutation(np.concatenate(starts))
        self.epoch, self.first_number = epoch, first_number

    def read(self, first: int, count: int) -> np.ndarray:
        """Windows `first` to `first + count`, int32 (count, seq_len + 1). Raises: DataError."""
        windows = np.empty((count, self.seq_len + 1), dtype=np.int32)
        for row, number in zip(windows, range(first, first + count), strict=True):
            if number < self.first_number:
                self.enter_epoch(0, 0)
            while number >= self.first_number + self.starts.size:
                self.enter_epoch(self.epoch + 1, self.first_number + self.starts.size)
            start = self.starts[number - self.first_number]
            shard = int(np.searchsorted(self.offsets, start, side="right")) - 1
            row[:] = self.shards[shard][start - self.offsets[shard]:][:self.seq_len + 1]
        check_ids(windows, self.config.vocab_size, f"{self.config.dataset_dir}: training shards")
        return windows


class BatchShape(NamedTuple):
    """How a rank's share of one optimizer step is divided."""

    micro_steps: int
    sequences: int  # per micro-step


def batch_shape(config: Config, world_size: int) -> BatchShape:
    """The fewest micro-steps within MICRO_BATCH_TOKENS, same global batch. Raises: ConfigError."""
    total = config.train_batch_tokens // config.train_seq_len
    if total % world_size:
        possible = ", ".join(str(w) for w in range(1, 9) if total % w == 0)
        raise ConfigError(f"WORLD_SIZE={world_size} does not divide the {total} sequences of "
                          f"TRAIN_BATCH_TOKENS ({config.train_batch_tokens}); possible: {possible}")
    per_rank, most = total // world_size, config.micro_batch_tokens // config.train_seq_len
    sequences = next(n for n in range(most, 0, -1) if per_rank % n == 0)
    return BatchShape(per_rank // sequences, sequences)


class BatchStream:
    """This rank's micro-batches, read two steps ahead by a thread into page-locked memory."""

    def __init__(self, loader: TrainLoader, shape: BatchShape, world: World, step: int = 0) -> None:
        self.loader, self.shape, self.world, self.step = loader, shape, world, step
        self.pool, self.pending = ThreadPoolExecutor(1), deque[Future[list[Tensor]]]()

    def read(self, step: int) -> list[Tensor]:
        """The micro-batches of one step, int32 (sequences, seq_len + 1), on the host."""
        per_rank = self.shape.micro_steps * self.shape.sequences
        first = (step * self.world.size + self.world.rank) * per_rank
        batches = torch.from_numpy(self.loader.read(first, per_rank)).split(self.shape.sequences)
        return [b.pin_memory() for b in batches] if self.world.is_cuda else list(batches)

    def next(self) -> list[Tensor]:
        """The micro-batches of the next step, on the device. Raises: what reading them raised."""
        while len(self.pending) < 3:
            self.pending.append(self.pool.submit(self.read, self.step))
            self.step += 1
        batches = self.pending.popleft().result()
        return [rows.to(self.world.device, non_blocking=True) for rows in batches]

    def close(self) -> None:
        """Stops the thread."""
        self.pool.shutdown(cancel_futures=True)


class TokenBytes(NamedTuple):
    """What each token id adds to the byte count, as arrays over the vocabulary."""

    base: np.ndarray  # int16, bytes without the leading space
    leading_space: np.ndarray  # bool
    boundary: np.ndarray  # bool: control, unknown, unused; a leading space after it is no byte


def load_tokenizer(path: Path, vocab_size: int) -> SentencePieceProcessor:
    """The SentencePiece model at `path`. Raises: DataError if missing or of another size."""
    from sentencepiece import SentencePieceProcessor
    if not path.is_file():
        raise DataError(f"{path}: no tokenizer; set TOKENIZER_PATH or run tools/prepare_data.py")
    try:
        tokenizer = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a SentencePiece model: {error}") from None
    if tokenizer.vocab_size() != vocab_size:
        raise DataError(f"{path}: {tokenizer.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
    return tokenizer


def token_bytes(tokenizer: SentencePieceProcessor) -> TokenBytes:
    """Bytes of decoded text per token id, 0 for control tokens; `bytes_of_targets` adds the space.

    Raises: DataError if U+2581 is no piece of its own (its fallback bytes would count it as 3), or
    if a piece holds it anywhere but in front.
    Example: pieces (U+2581)"caf", "<0xC3>", "<0xA9>" -> 3 and a leading space, 1, 1
    """
    size = tokenizer.vocab_size()
    table = TokenBytes(np.zeros(size, np.int16), np.zeros(size, bool), np.ones(size, bool))
    if tokenizer.is_unknown(tokenizer.piece_to_id(SPACE_MARK)):
        raise DataError(f"tokenizer of {size} pieces: U+2581 is none of them; bytes would be wrong")
    for token in range(size):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            continue
        piece = tokenizer.id_to_piece(token)
        text = piece.removeprefix(SPACE_MARK)
        if SPACE_MARK in text:
            raise DataError(f"tokenizer piece {token} ({piece!r}) holds U+2581 inside")
        table.boundary[token] = False
        table.leading_space[token] = text != piece
        table.base[token] = 1 if tokenizer.is_byte(token) else len(text.encode())
    return table


def bytes_of_targets(previous: np.ndarray, target: np.ndarray, table: TokenBytes) -> np.ndarray:
    """Bytes each target stands for, int16, given the token before it."""
    return table.base[target] + (table.leading_space[target] & ~table.boundary[previous])


class ValStream:
    """The validation tokens in order, and the bytes of every target: any token but the first."""

    def __init__(self, tokens: np.ndarray, table: TokenBytes, seq_len: int,
                 keep_tail: bool = False) -> None:
        whole = max(0, tokens.size - 1) // seq_len * seq_len  # the tail fills no sequence
        self.num_targets = tokens.size - 1 if keep_tail else whole
        if not whole:
            raise DataError(f"validation shards hold {tokens.size} tokens, fewer than EVAL_SEQ_LEN "
                            f"({seq_len}) + 1")
        self.tokens = np.ascontiguousarray(tokens[:self.num_targets + 1], dtype=np.int32)
        self.num_documents = int((self.tokens == BOS_ID).sum())
        self.document_starts = np.union1d(0, np.flatnonzero(self.tokens[:-1] == BOS_ID))
        self.document_stops = np.append(self.document_starts[1:], self.num_targets)
        self.target_bytes = bytes_of_targets(self.tokens[:-1], self.tokens[1:], table)
        self.num_bytes = int(self.target_bytes.sum())
        if not self.num_bytes:
            raise DataError(f"validation stream of {self.num_targets} targets holds no text")

    @classmethod
    def load(cls, config: Config) -> ValStream:
        """The stream of the configured dataset. Raises: DataError."""
        table = token_bytes(load_tokenizer(config.tokenizer_file, config.vocab_size))
        shards = find_shards(config.dataset_dir, "val")
        tokens = np.concatenate([read_shard(path, config.vocab_size) for path in shards])
        return cls(tokens, table, config.eval_seq_len, config.val_tail)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Total nats as bits per byte of text."""
    return nats / (math.log(2) * num_bytes)


# ==================================================================================================
# 4  Model
#
# Enters: token ids, a `DepthPlan`, perhaps an adapter. Leaves: hidden states, or nats per target.
#
#   B batch   T tokens   D model width   H query heads   G key/value heads   K head width
#   F hidden width of the MLP   V vocabulary   L physical blocks   N rows (B*T)
# ==================================================================================================

NORM_EPS = torch.finfo(torch.float32).eps

Site = Literal["qkv", "out", "up", "down", "head"]
SITES: tuple[Site, ...] = typing.get_args(Site)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q_BTHK, k_BTGK, v_BTGK -> y_BTHK, causal
Tap = Callable[[Site, Tensor, Tensor], Tensor]  # input and output of a layer -> output to use


class Adapter(Protocol):
    """Sees every linear layer and may change its output. `visit` counts; the head is -1."""

    def __call__(self, visit: int, block: int, site: Site, x: Tensor, y: Tensor) -> Tensor: ...


class Visit(NamedTuple):
    """One virtual layer: a physical block, which pass over it, and the skip that precedes it."""

    block: int
    pass_number: int
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


def plan_from_order(name: str, order: list[int]) -> DepthPlan:
    """A U-Net over `order`: decoder j, in the second half, takes the j-th last encoder's output.

    Example: order 0 1 2 3 4 -> encoders 0 1; decoders 2 (skip from 1), 3 (skip from 0), 4
    """
    half, visits = len(order) // 2, []
    for position, block in enumerate(order):
        row, skip_from = position - half, 2 * half - 1 - position
        skip = (row, skip_from) if row >= 0 <= skip_from else ()
        visits.append(Visit(block, order[:position].count(block), *skip))
    return DepthPlan(name, tuple(visits))


def depth_plans(config: Config) -> tuple[DepthPlan, ...]:
    """The plans of a run, in the order in which training reaches them."""
    blocks, first, last = list(range(config.num_layers)), config.loop_start, config.loop_end + 1
    looped = blocks[:first] + blocks[first:last] * (config.num_loops + 1) + blocks[last:]
    plans = (plan_from_order("unlooped", blocks), plan_from_order("looped", looped))
    return plans if config.num_loops else plans[:1]


def plan_at(config: Config, progress: float) -> DepthPlan:
    """The plan in force at `progress` (0 to 1)."""
    return depth_plans(config)[-1 if progress >= config.enable_looping_at else 0]


class BlockForm(NamedTuple):
    """What is fixed about a block when it is compiled."""

    num_heads: int
    num_kv_heads: int
    residual: Literal["serial", "parallel"]
    exclusive: bool  # exclusive self attention


class BlockWeights(NamedTuple):
    """Parameters of one physical block; matrices are in the compute type."""

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
    """`x` over its root mean square along the last dimension, computed in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=NORM_EPS).to(x.dtype)


def rotary_tables(num_positions: int, rotated_dims: int, base: float) -> Rotary:
    """Tables for positions from 0; angles are float64, in which every position is exact."""
    exponent = -torch.arange(0, rotated_dims, 2, dtype=torch.float64) / rotated_dims
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float64), base**exponent)
    return Rotary(angle.cos().float(), angle.sin().float())


def rotate(x_BTHK: Tensor, rotary: Rotary) -> Tensor:
    """Rotates pairs (i, i + half) of every head by its position; other dimensions pass. Float32."""
    half = rotary.cos.shape[-1]
    cos, sin = (t[:x_BTHK.shape[1], None, :] for t in rotary)
    a, b, rest = x_BTHK.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def exclude_self(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Attention output without its component along the value at the same position."""
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
    H, G = form.num_heads, form.num_kv_heads
    qkv = linear(x_BTD, w.qkv, "qkv", tap).unflatten(-1, (H + 2 * G, -1))
    qk = rotate(rms_norm(qkv[:, :, :H + G].float()), rotary)
    q_BTHK = (qk[:, :, :H] * w.q_gain[:, None]).to(x_BTD.dtype)
    k_BTGK, v_BTGK = qk[:, :, H:].to(x_BTD.dtype), qkv[:, :, H + G:]
    y_BTHK = attend(q_BTHK, k_BTGK, v_BTGK)
    if form.exclusive:
        y_BTHK = exclude_self(y_BTHK, v_BTGK)
    return linear(y_BTHK.flatten(2), w.out, "out", tap)


def mlp(x_BTD: Tensor, w: BlockWeights, tap: Tap | None) -> Tensor:
    """Two linear layers round the square of a leaky ReLU with slope 1/2."""
    hidden_BTF = F.leaky_relu(linear(x_BTD, w.up, "up", tap), 0.5).square()
    return linear(hidden_BTF, w.down, "down", tap)


def run_block(x_BTD: Tensor, x0_BTD: Tensor, w: BlockWeights, form: BlockForm, rotary: Rotary,
              attend: Attend, tap: Tap | None = None) -> Tensor:
    """One block: mixes the residual stream with the embedding, then adds attention and MLP."""
    vectors = (w.resid_mix, w.attn_scale, w.mlp_scale, w.norm_scale)
    mix, attn_scale, mlp_scale, norm_scale = (t.to(x_BTD.dtype) for t in vectors)
    u = mix[0] * x_BTD + mix[1] * x0_BTD
    z = rms_norm(u) * norm_scale
    after = u + attn_scale * attention(z, w, form, rotary, attend, tap)
    if form.residual == "serial":
        z = rms_norm(after) * norm_scale
    return after + mlp_scale * mlp(z, w, tap)


def softcapped_nll(logits_NV: Tensor, target_N: Tensor, cap: float) -> Tensor:
    """Negative log-likelihood in nats, float32 (N,), of logits squashed to (-cap, cap)."""
    return F.cross_entropy(cap * torch.tanh(logits_NV.float() / cap), target_N, reduction="none")


class Matrix(NamedTuple):
    """The matrices of one role in all blocks: rows of a parameter stacked over blocks."""

    role: Literal["q", "k", "v", "out", "up", "down"]
    parameter: nn.Parameter
    rows: slice

    def view(self, stack: Tensor) -> Tensor:
        """This role's share (L, rows, columns) of the parameter's values, gradient or integers."""
        return stack[:, self.rows]


class GPT(nn.Module):
    """The language model: float32 parameters stacked over blocks, and the only forward pass."""

    norm_scale: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, attend: Attend, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        L, D = config.num_layers, config.model_dim
        num_skips = max(sum(v.skip_row >= 0 for v in p.visits) for p in depth_plans(config))
        self.config, self.attend, self.dtype = config, attend, dtype
        self.embed = nn.Parameter(torch.zeros(config.vocab_size, D))
        self.qkv = nn.Parameter(torch.zeros(L, D + 2 * config.kv_dim, D))
        self.out = nn.Parameter(torch.zeros(L, D, D))
        self.up = nn.Parameter(torch.zeros(L, config.mlp_dim, D))
        self.down = nn.Parameter(torch.zeros(L, D, config.mlp_dim))
        self.attn_scale = nn.Parameter(torch.ones(L, D))
        self.mlp_scale = nn.Parameter(torch.ones(L, D))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(L, 1, D))
        self.q_gain = nn.Parameter(torch.full((L, config.num_heads), config.qk_gain_init))
        self.skip_weights = nn.Parameter(torch.ones(num_skips, D))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips, D))
        norm_scale = torch.arange(1.0, L + 1).rsqrt() if config.ln_scale else torch.ones(L)
        rotary = rotary_tables(max(config.train_seq_len, config.eval_seq_len),
                               config.rope_dims or config.head_dim, config.rope_base)
        for name, table in {"norm_scale": norm_scale, **rotary._asdict()}.items():
            self.register_buffer(name, table, persistent=False)
        self.forms = tuple(block_form(config, block) for block in range(L))

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
        """The matrices that Muon trains, by role."""
        k, v = self.config.model_dim, self.config.model_dim + self.config.kv_dim  # first rows
        return [Matrix("q", self.qkv, slice(k)), Matrix("k", self.qkv, slice(k, v)),
                Matrix("v", self.qkv, slice(v, None)), Matrix("out", self.out, slice(None)),
                Matrix("up", self.up, slice(None)), Matrix("down", self.down, slice(None))]

    def vectors(self) -> dict[str, nn.Parameter]:
        """The small parameters, by name."""
        names = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates")
        return {name: getattr(self, name) for name in names}

    def stacks(self) -> dict[str, nn.Parameter]:
        """The tensors that are quantised, by name: matrices over blocks, and the embedding."""
        return {name: getattr(self, name) for name in ("embed", "qkv", "out", "up", "down")}

    def block_weights(self) -> list[BlockWeights]:
        """The parameters of every block."""
        # Unbound once: backward through an index per visit would build a full-size gradient each.
        matrices = [p.to(self.dtype).unbind() for p in (self.qkv, self.out, self.up, self.down)]
        vectors = [p.unbind() for p in (self.attn_scale, self.mlp_scale, self.resid_mix,
                                        self.q_gain, self.norm_scale)]
        return [BlockWeights(*parts) for parts in zip(*matrices, *vectors, strict=True)]

    def hidden(self, ids_BT: Tensor, plan: DepthPlan, adapter: Adapter | None = None,
               block_runner: Callable[..., Tensor] = run_block) -> Tensor:
        """Normalised output of the last block, (B, T, D) in the compute type."""
        weights, rotary = self.block_weights(), Rotary(self.cos, self.sin)
        skips = torch.stack((self.skip_weights, self.skip_gates.sigmoid()), 1).unbind()
        x = x0 = rms_norm(F.embedding(ids_BT, self.embed).to(self.dtype))
        outputs: list[Tensor] = []
        for number, visit in enumerate(plan.visits):
            if visit.skip_row >= 0:
                weight, gate = skips[visit.skip_row].to(x.dtype)
                x = (1 - gate) * (weight * outputs[visit.skip_from]) + gate * x
            tap = functools.partial(adapter, number, visit.block) if adapter else None
            x = block_runner(x, x0, weights[visit.block], self.forms[visit.block], rotary,
                             self.attend, tap)
            outputs.append(x)
        return rms_norm(x)

    def forward(self, ids_BT: Tensor, target_BT: Tensor, plan: DepthPlan,
                adapter: Adapter | None = None,
                block_runner: Callable[..., Tensor] = run_block) -> Tensor:
        """Nats of all targets, float32 (B, T)."""
        return self.nats(self.hidden(ids_BT, plan, adapter, block_runner), target_BT, adapter)

    def nats(self, x_BTD: Tensor, target_BT: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Nats of targets, float32 (B, T), given the hidden states that predict them."""
        tap = functools.partial(adapter, -1, -1) if adapter else None
        logits_NV = linear(x_BTD, self.embed.to(self.dtype), "head", tap).flatten(0, 1)
        target_N = target_BT.flatten().long()
        return softcapped_nll(logits_NV, target_N, self.config.logit_softcap).view(target_BT.shape)


def block_form(config: Config, block: int) -> BlockForm:
    """The fixed part of one physical block."""
    parallel = 0 <= config.parallel_residual_start <= block
    return BlockForm(config.num_heads, config.num_kv_heads, "parallel" if parallel else "serial",
                     block >= config.num_layers - config.xsa_last_n)


def count_parameters(model: GPT) -> dict[str, tuple[int, int]]:
    """(tensors, parameters) per optimizer group, counted as the published systems' tensors."""
    blocks, vectors = model.config.num_layers, model.vectors()
    tensors = sum(1 if name.startswith("skip") else blocks for name in vectors)
    matrices = [m.view(m.parameter).numel() for m in model.matrices()]
    return {"embedding": (1, model.embed.numel()),
            "matrix": (blocks * len(matrices), sum(matrices)),
            "vector": (tensors, sum(v.numel() for v in vectors.values()))}


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
    if device.type == "cuda":
        # Process-wide flags, because a context manager would break the compiled graph.
        torch.backends.cuda.enable_cudnn_sdp(kernel == "cudnn")
        torch.backends.cuda.enable_flash_sdp(kernel == "flash")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(kernel == "math")
    elif kernel != "math":
        raise GolfError("needs a CUDA device")
    return sdpa_attend


def attention_error(attend: Attend, device: torch.device) -> float:
    """Largest relative error of output and gradients against float32, on random input."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(2, 256, n, 64, generator=generator) for n in (8, 4, 4, 8))

    def run(function: Attend, where: torch.device, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(where, kind).requires_grad_() for t in (q, k, v)]
        y = function(*leaves)
        gradients = torch.autograd.grad(y, leaves, dy.to(where, kind))
        return [t.detach().cpu().float() for t in (y, *gradients)]

    wanted = run(sdpa_attend, torch.device("cpu"), torch.float32)
    found = run(attend, device, compute_dtype(device))
    errors = [(f - w).norm() / w.norm() for f, w in zip(found, wanted, strict=True)]
    return float(torch.stack(errors).max())  # unlike Python's max, lets no NaN pass


def choose_attention(name: str, device: torch.device) -> AttentionBackend:
    """The named back-end, or the first that loads and is exact enough. Raises: ConfigError."""
    loaders: dict[str, Callable[[torch.device], Attend]] = {"fa3": load_fa3, "fa4": load_fa4}
    loaders |= {k: functools.partial(load_sdpa, kernel=k) for k in ("cudnn", "flash", "math")}
    rejected: dict[str, str] = {}
    tolerance = 0.02 if device.type == "cuda" else 1e-4
    for candidate in loaders if name == "auto" else (name,):
        try:
            attend = loaders[candidate](device)
            error = attention_error(attend, device)
            if not error <= tolerance:  # NaN is not
                raise GolfError(f"error {error:.1e} against float32, at most {tolerance:g}")
        except Exception as problem:  # whatever a foreign library raises only loses the choice
            rejected[candidate] = f"{type(problem).__name__}: {problem}".split("\n")[0][:160]
        else:
            return AttentionBackend(candidate, attend, rejected)
    raise ConfigError(f"ATTENTION={name}: " + "; ".join(f"{k}: {v}" for k, v in rejected.items()))


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where matrix units exist, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def maybe_compile(function: Callable[..., Tensor], config: Config) -> Callable[..., Tensor]:
    """`function`, compiled to one graph where the settings ask for it."""
    return torch.compile(function, fullgraph=True, dynamic=False) if config.compile else function


# ==================================================================================================
# 5  Optimizer
#
# Enters: gradients of this rank's share of a batch. Leaves: parameters, updated alike everywhere.
# Matrices go to Muon, whose momentum and orthogonalisation are shared out over the ranks; the rest
# goes to AdamW. Schedules are functions of progress (0 to 1) or of the step, and of nothing else.
#
#   M matrices of one shape, laid wide   R rows   C columns (R <= C)
# ==================================================================================================


def lr_scale(progress: float, warmdown_frac: float, floor: float) -> float:
    """1 until the last `warmdown_frac` of the run, then linear down to `floor`."""
    return max(floor, min(1.0, (1.0 - progress) / warmdown_frac))


def muon_momentum(step: int, config: Config) -> float:
    """Linear ramp from the warm-up start to the final momentum."""
    share, first = step / config.muon_momentum_warmup_steps, config.muon_momentum_warmup_start
    return first + min(share, 1.0) * (config.muon_momentum - first)


def orthogonalise(update_MRC: Tensor, iterations: int) -> Tensor:
    """Each matrix of a stack moved towards the nearest semi-orthogonal one, in bf16.

    Source: Newton-Schulz iteration of Muon (Jordan et al. 2024), a quintic in three coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update_MRC.bfloat16()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MatrixGroup:
    """All matrices of one shape, laid wide, in one stack padded to a multiple of the world size."""

    def __init__(self, matrices: Sequence[Matrix], world: World) -> None:
        self.matrices, self.world = matrices, world
        views = [m.view(m.parameter.data) for m in matrices]
        # Tall ones lie on their side: both MLP matrices share a stack, and ranks get equal work.
        self.tall = [v.shape[1] > v.shape[2] for v in views]
        self.counts = [len(v) for v in views]
        self.padding = -sum(self.counts) % world.size
        counts = torch.tensor([*self.counts, self.padding])
        tall = torch.tensor([*self.tall, False]).repeat_interleave(counts).to(views[0].device)
        self.tall_M11 = tall.chunk(world.size)[world.rank].view(-1, 1, 1)
        self.momentum = views[0].new_zeros(len(self.tall_M11), *sorted(views[0].shape[1:]))

    def reduce_gradients(self) -> Tensor:
        """This rank's share of the gradients, averaged over ranks, float32 (M, R, C)."""
        gradients = [m.view(gradient_of(m.parameter)) for m in self.matrices]
        parts = [g.mT if tall else g for g, tall in zip(gradients, self.tall, strict=True)]
        parts.append(parts[0].new_zeros(self.padding, *parts[0].shape[1:]))
        return self.world.scatter_mean(torch.cat(parts))

    def step(self, gradient: Tensor, lr: Tensor, momentum: Tensor, config: Config) -> None:
        """Nesterov momentum, row normalisation, orthogonalisation; all ranks apply all shares."""
        self.momentum.mul_(momentum).add_(gradient)
        update = gradient + momentum * self.momentum
        if config.muon_row_normalize:  # the rows of a tall matrix lie as columns here
            columns, rows = (torch.linalg.vector_norm(update, dim=d, keepdim=True) for d in (1, 2))
            update = update / torch.where(self.tall_M11, columns, rows).clamp_min(1e-7)
        updates = self.world.gather(orthogonalise(update, config.muon_backend_steps))
        parts = updates[:sum(self.counts)].split(self.counts)
        for matrix, tall, part in zip(self.matrices, self.tall, parts, strict=True):
            w = matrix.view(matrix.parameter.data)
            scale = lr * math.sqrt(max(1.0, w.shape[1] / w.shape[2]))
            w.mul_(1 - lr * config.muon_wd).sub_(scale * (part.mT if tall else part).float())


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient, which must be there."""
    return typing.cast(Tensor, parameter.grad)


class Optimizer:
    """Muon for the matrices, AdamW for the rest, one global gradient clip for all."""

    def __init__(self, model: GPT, config: Config, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        shapes: dict[tuple[int, ...], list[Matrix]] = {}
        for matrix in model.matrices():
            shape = tuple(sorted(matrix.view(matrix.parameter).shape[1:]))
            shapes.setdefault(shape, []).append(matrix)
        self.groups = [MatrixGroup(matrices, world) for matrices in shapes.values()]
        vectors = list(model.vectors().values())
        self.replicated = [model.embed, *vectors]
        self.names = [*("/".join(m.role for m in group.matrices) for group in self.groups),
                      "embed", *model.vectors()]
        stacked = {id(m.parameter) for m in model.matrices()}
        if sorted([*stacked, *map(id, self.replicated)]) != sorted(map(id, model.parameters())):
            raise TypeError("a parameter is in no optimizer group, or in two")
        self.adam = torch.optim.AdamW(
            [dict(params=[model.embed], base=config.tied_embed_lr, weight_decay=config.embed_wd),
             dict(params=vectors, base=config.scalar_lr, weight_decay=config.adam_wd)],
            lr=0.0, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)

    @torch.no_grad()
    def step(self, step: int, scale: float) -> Tensor:
        """Applies gradients at `scale` times the base rates if their norm, returned, is finite."""
        config = self.config
        shares = [group.reduce_gradients() for group in self.groups]
        replicated = [gradient_of(p) for p in self.replicated]
        self.world.sum_all_(replicated, 1 / self.world.size)
        self.squares = torch.stack(torch._foreach_norm([*shares, *replicated])).square()
        self.world.sum_(self.squares[:len(shares)])
        norm = self.squares.sum().sqrt()
        if config.grad_clip_norm:
            factor = (config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*shares, *replicated], factor)
        bad = ~norm.isfinite()  # known to the device; nothing here waits for it
        self.adam.found_inf = bad.float()  # type: ignore[attr-defined] # the fused kernel then leaves all as it is
        for adam_group in self.adam.param_groups:
            adam_group["lr"] = adam_group["base"] * scale
        self.adam.step()
        lr, momentum = (torch.where(bad, idle, value) for idle, value in (
            (0.0, config.matrix_lr * scale), (1.0, muon_momentum(step, config))))
        for group, share in zip(self.groups, shares, strict=True):
            group.step(share.masked_fill_(bad, 0.0), lr, momentum, config)
        self.model.zero_grad()
        return norm

    def moments(self) -> list[Tensor]:
        """AdamW's live state; there is none before the first step."""
        return [t for state in self.adam.state.values() for t in state.values()]


class WeightAverage:
    """Exponential moving average of every parameter, updated once a step."""

    def __init__(self, model: GPT, decay: float) -> None:
        self.decay = decay
        self.weights = [p.data for p in model.parameters()]
        self.shadow = [p.clone() for p in self.weights]

    def update(self) -> None:
        """shadow = decay * shadow + (1 - decay) * weight."""
        torch._foreach_lerp_(self.shadow, self.weights, 1 - self.decay)

    def apply(self) -> None:
        """Replaces the model's weights by their average."""
        torch._foreach_copy_(self.weights, self.shadow)


# ==================================================================================================
# 6  Training
#
# Enters: model, batches, clock. Leaves: averaged weights and calibration statistics, in the time
# budget. The host runs two steps ahead of the device and never waits for a value it does not need.
# ==================================================================================================


@dataclass
class TrainState:
    """Where a run stands. With a checkpoint's tensors and the settings, it decides what follows."""

    facts: dict[str, object]  # settings, data, world and source, which must be equal
    step: int = 0
    plan: int = 0
    plan_step: int = 0  # with which that plan began; 0: it is the first
    seconds: float = 0.0  # on the training clock
    trained: bool = False  # the weights are averaged; calibration is next

    def write(self, path: Path, tensors: list[Tensor]) -> None:
        """Writes a checkpoint: an uncompressed .npz, which holds no code."""
        buffer, header = io.BytesIO(), np.array(json.dumps(asdict(self)))
        np.savez(buffer, header, *(t.detach().cpu().numpy() for t in tensors))
        write_atomically(path, buffer.getbuffer())

    @classmethod
    def read(cls, path: Path) -> Start:
        """The contents of a whole checkpoint. Raises: ArtifactError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if any(member.compress_type for member in file.zip.infolist()):
                    raise ValueError("compressed")  # a small file could fill the memory
                header, *arrays = file.values()
            return cls(**json.loads(str(header))), [torch.from_numpy(a) for a in arrays]
        except Exception as error:  # whatever a foreign file provokes
            raise ArtifactError(f"{path}: no checkpoint: {error}") from None


Start = tuple[TrainState, list[Tensor]]  # where training starts, and with what


def find_start(config: Config, facts: dict[str, object], log: RunLog) -> Start:
    """The newest whole checkpoint that RESUME means, if any. Raises: ArtifactError, ConfigError."""
    paths = [Path(config.resume)]
    if config.resume in ("", "auto"):  # names sort in the order in which a run writes them
        paths = sorted(log.folder.glob("*.ckpt"), reverse=True)
    for path in paths:
        try:
            state, tensors = TrainState.read(path)
        except ArtifactError as error:
            log.warn(str(error))
            continue
        differs = [f"{name.upper()}={value} was {state.facts.get(name)}"
                   for name, value in facts.items() if value != state.facts.get(name)]
        if differs:
            raise ConfigError(f"{path} differs: {', '.join(differs)}")
        log.event("resume", step=state.step, path=str(path))
        log.line(f"resumed after step {state.step} from {path}")
        return state, tensors
    if paths:
        raise ArtifactError(f"RESUME={config.resume}: no checkpoint is whole")
    return TrainState(facts), []


class TrainingClock:
    """Budget from the first step to the last read of training data. Rank 0's decides for all."""

    def __init__(self, config: Config, world: World, reserve_seconds: float) -> None:
        budget = config.max_wallclock_seconds
        self.world, self.iterations = world, config.iterations
        self.limit = budget - reserve_seconds if budget else math.inf
        self.begin, self.marks = time.perf_counter(), deque[float](maxlen=9)

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self.begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps a block, entered with an idle device, off the clock."""
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def next_step(self, step: int, in_flight: int) -> tuple[float, bool]:
        """Progress at which to run `step`, and whether to stop instead so as to keep the limit."""
        now = self.elapsed()
        self.marks.append(now)
        slowest = float(max(np.diff(self.marks), default=0.0))  # of the last eight steps
        ahead = now + 1.02 * slowest * (in_flight + 1)
        stop = step >= self.iterations or ahead > self.limit
        self.agreed, stopped = self.world.decide(now, stop)
        progress = max(self.agreed / self.limit, step / self.iterations)
        return min(1.0, progress), bool(stopped)


class Trainer:
    """The training loop and everything it keeps between steps."""

    def __init__(self, config: Config, world: World, log: RunLog, attend: Attend,
                 start: Start | None = None) -> None:
        self.config, self.world, self.log = config, world, log
        self.state, self.saved = start or (TrainState({}), [])
        self.shape = batch_shape(config, world.size)
        shards = map(read_shard, find_shards(config.dataset_dir, "train"))
        self.loader = TrainLoader(list(shards), config)
        self.model = GPT(config, attend, compute_dtype(world.device))
        self.model.initialise(config.seed)
        self.model.to(world.device)
        self.optimizer = Optimizer(self.model, config, world)
        self.average = WeightAverage(self.model, config.ema_decay)
        self.losses = {plan: self.compiled_loss(plan) for plan in depth_plans(config)}
        # Steps given to the device, whose numbers are on the host once the last mark is reached.
        self.flight: deque[tuple] = deque()
        self.micro_seconds: dict[str, list[float]] = {}
        self.last_loss, self.skipped = math.nan, -1

    def compiled_loss(self, plan: DepthPlan) -> Callable[..., Tensor]:
        """Mean nats of a micro-batch under `plan`."""
        def loss(rows: Tensor) -> Tensor:
            return self.model(rows[:, :-1], rows[:, 1:], plan).mean()
        return maybe_compile(loss, self.config)

    def forward_backward(self, plan: DepthPlan, batches: list[Tensor]) -> Tensor:
        """Accumulates gradients over micro-batches; this rank's mean loss, 0-D on the device."""
        total = torch.zeros((), device=self.world.device)
        for rows in batches:
            loss = self.losses[plan](rows) / len(batches)
            loss.backward()
            total += loss.detach()
        return total

    def warm_up(self) -> float:
        """Compiles, without trace, what the clock will meet; the calibration reserve in seconds."""
        config = self.config
        rows = torch.randint(
            config.vocab_size, (self.shape.sequences, config.train_seq_len + 1), dtype=torch.int32,
            generator=torch.Generator().manual_seed(0)).to(self.world.device)
        for plan in depth_plans(config):
            begin = time.perf_counter()
            for _ in range(config.warmup_steps):
                self.forward_backward(plan, [rows])
            self.optimizer.step(0, 0.0)
            self.world.synchronize()
            seconds = time.perf_counter() - begin
            self.log.event("phase", name=f"warm_up {plan.name}", seconds=seconds)
            self.log.line(f"warm_up {plan.name}: {seconds:.1f}s")
        self.average.apply()  # which holds the first weights
        momenta = [group.momentum for group in self.optimizer.groups]
        torch._foreach_zero_([*self.optimizer.moments(), *momenta])
        for _ in range(2):  # the second is warm
            begin = time.perf_counter()
            collect(Hessians(self.model), rows, depth_plans(config)[-1])
            self.world.synchronize()
        seconds = time.perf_counter() - begin
        needed = 1.15 * seconds * calibration_share(config, self.world, self.shape) + 0.2
        slowest = self.world.combine(torch.tensor(needed), dist.ReduceOp.MAX).item()
        budget = config.max_wallclock_seconds
        require(not 0 < budget <= slowest, "max_wallclock_seconds", budget,
                f"above the {slowest:.1f}s that GPTQ_CALIBRATION_BATCHES takes here")
        return max(config.gptq_reserve_seconds, slowest)

    def run(self, validate: Callable[[int, DepthPlan, bool], None]
            ) -> tuple[DepthPlan, dict[str, Tensor]]:
        """The timed loop, averaging and calibration; the plan trained last and the Hessians."""
        config, log, state, reserve = self.config, self.log, self.state, 0.0
        if not state.trained:
            reserve = self.warm_up()
            log.put("train", startup_seconds=time.time() - log.started)
            log.line(f"gptq:reserving {reserve:.1f}s of {config.max_wallclock_seconds:g}s")
        saved = iter(self.saved)  # of trained weights, nothing else
        for tensor, value in zip(self.replicated(), saved, strict=False):
            tensor.copy_(value.view_as(tensor))
        for group, whole in zip(self.optimizer.groups, saved, strict=False):
            group.momentum.copy_(whole.chunk(self.world.size)[self.world.rank])
        self.world.synchronize()
        self.clock = TrainingClock(config, self.world, reserve)
        self.clock.begin -= state.seconds
        if not state.trained:
            self.train(validate)
        plan = depth_plans(config)[state.plan]
        hessians, seconds = self.calibrate(plan), self.clock.elapsed()
        log.put("clocks", training_seconds=seconds,
                training_budget_seconds=config.max_wallclock_seconds)
        return plan, hessians

    def train(self, validate: Callable[[int, DepthPlan, bool], None]) -> None:
        """The loop, until averaged weights, or after a signal a checkpoint, are on disk.

        `validate(step, plan, is_last)` scores the model as it stands, off the clock.
        """
        config, log, clock, world = self.config, self.log, self.clock, self.world
        state, plans = self.state, depth_plans(config)
        stream = BatchStream(self.loader, self.shape, world, state.step)
        saved, stopped, world.deferring = state.seconds, False, True
        while not stopped:
            self.drain(2)  # the steps that the host runs ahead
            step = state.step
            progress, stopped = clock.next_step(step, len(self.flight))
            if world.stopping or 0 < config.checkpoint_every <= clock.agreed - saved:
                self.save()
                saved = clock.agreed
            if world.stopping:
                raise KeyboardInterrupt("stopped by a signal")
            if config.val_loss_every and (stopped or step % config.val_loss_every == 0):
                self.drain(0)
                with clock.paused():
                    validate(step, plans[state.plan], stopped)
            if not stopped:
                plan = plan_at(config, progress)
                if plan != plans[state.plan]:
                    state.plan, state.plan_step = plans.index(plan), step + 1
                    log.event("plan", step=step + 1, plan=plan.name, progress=progress)
                    log.line(f"layer_loop:enabled step:{step + 1} frac:{progress:.3f} "
                             f"{plan.describe()}")
                self.take_step(step, plan, progress, stream.next())
                self.average.update()
                state.step += 1
        stream.close()
        self.drain(0)
        self.average.apply()
        self.summarise(clock.elapsed())
        state.trained = True
        self.save()
        world.deferring = False
        if world.signalled:
            raise KeyboardInterrupt("stopped by a signal")

    def replicated(self) -> list[Tensor]:
        """What a checkpoint holds and all ranks have alike, in its order."""
        return [*self.average.weights, *self.average.shadow, *self.optimizer.moments()]

    def save(self) -> None:
        """Writes a checkpoint, off the clock. If it cannot, it warns: the run is worth more."""
        self.drain(0)
        log, state, begin = self.log, self.state, time.perf_counter()
        state.seconds, name = self.clock.elapsed(), f"step-{state.step:08}.ckpt"
        with self.clock.paused():
            tensors = [*self.replicated(), *(self.world.gather(g.momentum)
                                             for g in self.optimizer.groups)]
            if state.trained:
                name, tensors = "weights.ckpt", self.average.weights
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
        if not self.world.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take_step(self, step: int, plan: DepthPlan, progress: float, batches: list[Tensor]) -> None:
        """Gives one optimizer step to the device."""
        scale = lr_scale(progress, self.config.warmdown_frac, self.config.min_lr)
        begin = self.mark()
        with torch._dynamo.config.patch(error_on_recompile=True):  # the error names the guard
            loss = self.forward_backward(plan, batches)
        middle = self.mark()
        values = torch.stack([loss, self.optimizer.step(step, scale)]).to("cpu", non_blocking=True)
        self.flight.append((step + 1, plan, progress, scale, values, begin, middle, self.mark()))

    def drain(self, most_in_flight: int) -> None:
        """Leaves at most that many steps unfinished."""
        log, config = self.log, self.config
        while len(self.flight) > most_in_flight:
            step, plan, progress, scale, values, begin, middle, end = self.flight.popleft()
            if self.world.is_cuda:
                end.synchronize()
                micro, whole = (begin.elapsed_time(mark) / 1e3 for mark in (middle, end))
            else:
                micro, whole = middle - begin, end - begin
            self.last_loss, norm = values.tolist()
            if not math.isfinite(norm):
                self.skip(step, norm)
            self.micro_seconds.setdefault(plan.name, []).append(micro)
            if step <= 5 or step % config.train_log_every == 0:
                tok_s = config.train_batch_tokens / whole
                log.event("train", step=step, train_loss=self.last_loss, gradient_norm=norm,
                          train_seconds=self.clock.elapsed(), lr_scale=scale, tok_s=tok_s,
                          plan=plan.name, mem_mib=torch.cuda.memory_allocated() >> 20,  # 0 on CPU
                          progress=progress)
                log.line(f"{step}/{config.iterations} train_loss: {self.last_loss:.4f} "
                         f"step_time: {1e3 * whole:.1f}ms tok/s: {tok_s:.0f}")

    def skip(self, step: int, norm: float) -> None:
        """Notes a step without effect. Raises: TrainingError if the one before had none either."""
        mine = torch.zeros(self.world.size)
        mine[self.world.rank] = self.last_loss
        losses = self.world.combine(mine).tolist()
        values = zip(self.optimizer.names, self.optimizer.squares.tolist(), strict=True)
        names = [name for name, value in values if not math.isfinite(value)]
        text = (f"step {step}: gradient norm={norm}, losses by rank: {losses}, "
                f"gradients not finite: {names}")
        if self.skipped == step - 1:
            raise TrainingError(f"{text}, as in the step before")
        self.skipped = step
        self.log.warn(f"skipped {text}")

    def calibrate(self, plan: DepthPlan) -> dict[str, Tensor]:
        """Second moments of every linear layer's input over training windows and all ranks."""
        begin = time.perf_counter()
        hessians = Hessians(self.model)
        for number in range(calibration_share(self.config, self.world, self.shape)):
            first = (number * self.world.size + self.world.rank) * self.shape.sequences
            rows = torch.from_numpy(self.loader.read(first, self.shape.sequences))
            collect(hessians, rows.to(self.world.device), plan)
        moments = {name: self.world.sum_(h) for name, h in hessians.moments.items()}
        self.world.synchronize()
        seconds = time.perf_counter() - begin
        self.log.put("quantisation", seconds_hessians=seconds)
        self.log.line(f"GPTQ:collected {len(moments)} Hessians in {seconds:.1f}s")
        return moments

    def summarise(self, seconds: float) -> None:
        """Writes the training section of the result."""
        log, per_step, steps = self.log, self.config.train_batch_tokens, self.state.step
        tokens, peak = steps * per_step, torch.cuda.max_memory_allocated() >> 20  # 0 on CPU
        by_plan = {name: round(per_step / float(np.median(times)))
                   for name, times in self.micro_seconds.items()}
        log.put("train", steps=steps, seconds=seconds, tokens=tokens, tok_s=tokens / seconds,
                ms_per_step=1e3 * seconds / max(steps, 1), tok_s_by_plan=by_plan,
                loop_enabled_step=self.state.plan_step, final_loss=self.last_loss, peak_mib=peak)
        log.put("data", passes=tokens / self.loader.num_tokens)
        log.line(f"training: {steps} steps, {seconds:.1f}s, {tokens / seconds:.0f} tok/s, "
                 f"micro-steps only {by_plan}, peak memory {peak} MiB")


# ==================================================================================================
# 7  Quantisation
#
# Enters: averaged weights and Hessians (second moments of every linear layer's inputs). Leaves:
# integers with one scale per row. "6 bits" names a range; what decides the size is the step, a
# multiple of the row's standard deviation, because the integers are entropy coded.
#
#   R rows (outputs)   C columns (inputs)
# ==================================================================================================


class Hessians:
    """An adapter that changes nothing and sums x x^T of every linear layer over all visits."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.moments: dict[str, Tensor] = {}

    def __call__(self, visit: int, block: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Adds the second moments of `x` and returns `y`."""
        x_NC = x.flatten(0, -2).float()
        name = hessian_name(site, block)
        if name not in self.moments:
            self.moments[name] = x_NC.new_zeros(x_NC.shape[1], x_NC.shape[1])
        self.moments[name].addmm_(x_NC.T, x_NC)
        return y


def hessian_name(stack: str, block: int) -> str:
    """The site that feeds a block of a stack; the embedding is the head."""
    return "head" if block < 0 or stack == "embed" else f"{stack}.{block}"


@torch.no_grad()
def collect(hessians: Hessians, rows: Tensor, plan: DepthPlan) -> None:
    """One calibration batch, int32 (sequences, seq_len + 1), through the forward pass."""
    x_BTD = hessians.model.hidden(rows[:, :-1], plan, hessians)
    hessians(-1, -1, "head", x_BTD, x_BTD)
    if hessians.model.config.quantiser == "rate":
        collect_gradients(hessians, rows[:-(-len(rows) // 8)], plan, rows[:, 1:].numel())


@torch.enable_grad()
def collect_gradients(hessians: Hessians, rows: Tensor, plan: DepthPlan, weight: int) -> None:
    """Adds the mean squared gradient of every linear output, (1, R), times `weight`."""
    found: list[tuple[str, Tensor]] = []

    def keep(visit: int, block: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        found.append((hessian_name(site, block) + ".rows", y))
        return y

    nats = hessians.model(rows[:, :-1], rows[:, 1:], plan, keep).sum()
    names = [name for name, _ in found]
    for name, gradient in zip(names, torch.autograd.grad(nats, [y for _, y in found]), strict=True):
        mean_1R = gradient.flatten(0, -2).float().square().mean(0, keepdim=True)
        mean_1R *= weight / names.count(name)
        hessians.moments[name] = hessians.moments.get(name, 0) + mean_1R


def calibration_share(config: Config, world: World, shape: BatchShape) -> int:
    """Calibration batches of one rank, so that all ranks together read the configured tokens."""
    per_batch = config.micro_batch_tokens // config.train_seq_len
    return -(-config.gptq_calibration_batches * per_batch // (shape.sequences * world.size))


class QuantRule(NamedTuple):
    """How one tensor class is quantised."""

    max_level: int  # largest integer
    clip_sigmas: float  # the value it stands for, in standard deviations of the row


def quant_rule(config: Config, stack: str, widen: float = 1.0) -> QuantRule:
    """The rule of a stacked tensor; `widen` multiplies its clip width."""
    bits, sigmas = ((config.embed_bits, config.embed_clip_sigmas) if stack == "embed" else
                    (config.matrix_bits, config.matrix_clip_sigmas))
    bits = 8 if config.quantiser == "rate" else bits
    return QuantRule(2**(bits - 1) - 1, sigmas * widen)


def row_scales(w_RC: Tensor, rule: QuantRule) -> Tensor:
    """Steps of rows, float16 (R,): a wider clip means larger ones, fewer bytes, more error."""
    scale_R = rule.clip_sigmas * w_RC.float().std(1) / rule.max_level
    return scale_R.nan_to_num(0.0).clamp(2**-24, 65_504).half()


def coarse(values: Tensor, bits: int, dither: Tensor | int) -> Tensor:
    """Float16 of few mantissa bits, which cost little to store; dither keeps the mean."""
    step = 1 << 10 - bits
    bits_16 = (values.half().view(torch.int16) + dither % step) & -step
    return bits_16.to(torch.int16).view(torch.float16)


def balanced_steps(w_RC: Tensor, hessians: dict[str, Tensor], key: str, unit: float,
                   damp: float) -> tuple[Tensor, Tensor]:
    """Steps of rows and of columns, float16, at which one more bit buys the same everywhere.

    Feedback leaves each column an error of its pivot, the part of the input that later columns
    cannot make up for, so steps are in inverse proportion to it. What an output's error does to the
    loss is its squared gradient; as an estimate it is noisy, and powers below one are measured to
    be better. Source: successive interference cancellation with unequal steps.
    """
    tokens = hessians["head"].trace() / len(hessians["head"])  # of normalised inputs
    hessian_CC, gradient_R = hessians[key] / tokens, hessians[key + ".rows"][0] / tokens
    order = torch.argsort(hessian_CC.diagonal(), descending=True, stable=True)
    pivot_C = torch.empty_like(hessian_CC[0])
    pivot_C[order] = inverse_factor(hessian_CC[order][:, order], damp).diagonal().reciprocal()
    middle, mean = pivot_C.log().mean().exp(), gradient_R.mean()
    column_C = coarse((middle / pivot_C).clamp(2**-8, 2**8), 2, 128)
    # Rows of the embedding are inputs as well, of which the head's gradient knows nothing.
    row_R = (gradient_R + 0.1 * mean) ** (0.0 if key == "head" else -0.25)
    row_R *= 1e-3 * unit / row_R.log().mean().exp() * (mean.sqrt() * middle) ** -0.8
    row_R = row_R.maximum((w_RC / column_C).abs().amax(1) / 127).clamp(2**-20, 60_000)
    return coarse(row_R, 3, 79 * torch.arange(len(row_R), device=row_R.device)), column_C


def dequantise(q_RC: Tensor, scale_R: Tensor) -> Tensor:
    """Float32 weights of integers and row scales."""
    return q_RC.float() * scale_R.float()[..., None]


def inverse_factor(hessian_CC: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse. Raises: TrainingError (NaN, inf)."""
    if not torch.isfinite(hessian_CC).all():
        raise TrainingError("a calibration Hessian is not finite")
    ridge = torch.eye(len(hessian_CC), device=hessian_CC.device) * hessian_CC.diagonal().mean()
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian_CC + damp * ridge)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damp *= 10  # until both factorisations succeed


def gptq(w_RC: Tensor, hessian_CC: Tensor, scale_R: Tensor, max_level: int, damp: float,
         block: int = 128, bit_cost: float = 0.0) -> Tensor:
    """Integers, int8 (R, C), that keep W x close for inputs with the given second moments.

    Columns are rounded one by one, the most important first; the error of each is spread over those
    to come. With a cost, levels are chosen by squared error plus rate: their bits are taken to grow
    in proportion to the level over its expected magnitude, which moves the rounding threshold.
    Source: GPTQ (Frantar et al. 2022), with columns in order of descending diagonal.
    """
    w, hessian, scale = w_RC.float().clone(), hessian_CC.float().clone(), scale_R.float()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    w = w[:, order]
    size = (w / scale[:, None]).abs() + 1e-6
    size = size.mean(1, keepdim=True) * (size.mean(0) / size.mean())
    shift = (bit_cost / size).clamp(max=0.3)
    factor = inverse_factor(hessian[order][:, order], damp)
    q = torch.empty_like(w)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        errors = torch.empty_like(w[:, first:last])
        for j in range(first, last):
            level = w[:, j] / scale
            level -= shift[:, j] * level.sign()
            q[:, j] = level.round().clamp(-max_level, max_level)
            errors[:, j - first] = error = (w[:, j] - q[:, j] * scale) / factor[j, j]
            w[:, j:last] -= error.outer(factor[j, j:last])
        w[:, last:] -= errors @ factor[first:last, last:]
    return q[:, torch.argsort(order)].to(torch.int8)


class QuantisedModel(NamedTuple):
    """Everything an artifact holds, on the CPU."""

    integers: dict[str, Tensor]  # int8 (..., R, C)
    scales: dict[str, Tensor]  # float16 (..., R)
    vectors: dict[str, Tensor]  # float16


def quantise(model: GPT, hessians: dict[str, Tensor], world: World,
             widen: float = 1.0) -> QuantisedModel:
    """Quantises every stack; each rank solves its share of the blocks, and all get the integers."""
    integers, all_scales, config, damp = {}, {}, model.config, model.config.gptq_damp
    vectors = {name: v.detach().half().cpu() for name, v in model.vectors().items()}
    balanced = config.quantiser == "rate"
    for name, parameter in model.stacks().items():
        rule, stack = quant_rule(config, name, widen), parameter.detach()
        stack_LRC = stack if stack.dim() == 3 else stack[None]
        levels = torch.zeros_like(stack_LRC, dtype=torch.int8)
        scales, columns = (levels.select(dim, 0).half() for dim in (2, 1))
        for block in range(world.rank, len(stack_LRC), world.size):
            w_RC, key, column_C = stack_LRC[block], hessian_name(name, block), columns[block]
            if balanced:
                scales[block], column_C[:] = balanced_steps(w_RC, hessians, key, widen, damp)
            else:
                scales[block], column_C[:] = row_scales(w_RC, rule), 1.0
            levels[block] = gptq(
                w_RC / column_C, hessians[key] * column_C.float().outer(column_C.float()),
                scales[block], rule.max_level, damp, bit_cost=0.04 * balanced)
        integers[name] = world.sum_(levels).view(stack.shape).cpu()
        all_scales[name] = world.sum_(scales).view(stack.shape[:-1]).cpu()
        if config.compressor == "ans":
            vectors[f"{name}.column"] = world.sum_(columns).view(stack[..., 0, :].shape).cpu()
    return QuantisedModel(integers, all_scales, vectors)


def stored_weights(quantised: QuantisedModel, name: str) -> Tensor:
    """The float32 stack that the integers, row scales and column scales of `name` stand for."""
    column = quantised.vectors.get(f"{name}.column", torch.ones(1)).float().unsqueeze(-2)
    return dequantise(quantised.integers[name], quantised.scales[name]) * column


@torch.no_grad()
def restore_weights(model: GPT, quantised: QuantisedModel) -> None:
    """Sets the model's parameters to what the integers stand for."""
    for name, parameter in model.stacks().items():
        parameter.copy_(stored_weights(quantised, name))
    for name, vector in model.vectors().items():
        vector.copy_(quantised.vectors[name])


def tensor_report(model: GPT, quantised: QuantisedModel) -> list[dict[str, object]]:
    """Entropy in bits per weight and relative error of every stack."""
    rows = []
    for name, parameter in model.stacks().items():
        q, w = quantised.integers[name], parameter.detach().float().cpu()
        error = (w - stored_weights(quantised, name)).norm() / w.norm()
        rows.append({"name": name, "bits": round(entropy_bits(q) / q.numel(), 4),
                     "error": round(float(error), 5)})
    return rows


def entropy_bits(levels: Tensor) -> float:
    """Order-0 entropy of a stack of integers in bits, with one histogram per matrix."""
    total = 0.0
    for matrix in levels if levels.dim() == 3 else levels[None]:
        shares = torch.bincount(matrix.flatten().int() + 128).double() / matrix.numel()
        total += matrix.numel() * float(torch.special.entr(shares).sum()) / math.log(2)
    return total


def estimate_artifact_bytes(config: Config) -> int:
    """Bytes of program and model to expect before training, as if rows were Gaussian."""
    if config.quantiser == "rate":
        return config.artifact_cap_bytes
    integers, floats = expected_shapes(config, "brotli")  # without column scales
    coder_loss = {"brotli": 1.014, "ans": 1.001}[config.compressor]
    total = float(len(packed_program()))
    for name, shape in integers.items():
        rule = quant_rule(config, name)
        # Differential entropy less the logarithm of the step.
        bits = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(rule.clip_sigmas / rule.max_level)
        total += coder_loss * shape.numel() * max(bits, 0.05) / 8
        total += 1.33 * floats.pop(f"{name}.scale").numel()
    return int(total + 1.5 * sum(shape.numel() for shape in floats.values()))


# ==================================================================================================
# 8  Artifact
#
# Enters: a `QuantisedModel`. Leaves: one flat file, and back. Nothing in it is executed, every size
# is declared and checked before memory is taken, and a checksum covers every byte. Here too is the
# packed program, whose bytes count beside the model's.
#
#   magic, lengths of the header | compressed JSON header | streams | start of the SHA-256 of it all
# ==================================================================================================

ARTIFACT_MAGIC = b"GOLF\x00\x01\r\n"
CHECKSUM_BYTES = 16
MOST_HEADER_BYTES = 1 << 20
MOST_ELEMENTS = 1 << 31

SLOTS = 1 << 15  # the sum of a context's frequencies
CONTEXTS = 64
FIRST_MAGNITUDE = 0x3D800000  # the bits of 1/16 as float32

Shapes = dict[str, torch.Size]
LevelTables = tuple[np.ndarray, np.ndarray]
Visitor = Callable[[np.ndarray, np.ndarray, LevelTables], np.ndarray]

# Settings without which the weights mean something else.
MODEL_SETTINGS = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult",
                  "rope_base", "rope_dims", "ln_scale", "xsa_last_n", "parallel_residual_start",
                  "logit_softcap", "num_loops", "loop_start", "loop_end")


class Header(NamedTuple):
    """The self-description of an artifact file."""

    settings: dict[str, float]
    plan: str
    preset: str
    codec: str
    streams: list[int]  # compressed bytes of each


class Artifact(NamedTuple):
    """What an artifact file says."""

    header: Header
    model: QuantisedModel


def compress(levels: np.ndarray) -> bytes:
    """The bytes of an array as a brotli stream."""
    import brotli
    return brotli.compress(levels.tobytes(), quality=11, lgwin=24)


def decompress(data: bytes, size: int) -> bytes:
    """The inverse of `compress`. Raises: ArtifactError unless exactly `size` bytes come out."""
    import brotli
    decoder, out, piece = brotli.Decompressor(), b"", b" "
    try:
        while not decoder.is_finished() and len(out) <= size and (piece or data):
            # Never over one byte more than `size`, whatever the stream would expand to.
            piece = decoder.process(data, output_buffer_limit=size + 1 - len(out))
            out, data = out + piece, b""
    except Exception as error:
        raise ArtifactError(f"artifact: a brotli stream does not decode: {error}") from None
    if len(out) != size or not decoder.is_finished():
        raise ArtifactError(f"artifact: a brotli stream gives {len(out)}+ bytes, not {size}")
    return out


def require_compressor(config: Config) -> None:
    """Raises ConfigError where the codec is missing, before time goes into a model for it."""
    try:
        from brotli import Decompressor
    except ImportError:
        Decompressor = None
    if not hasattr(Decompressor, "can_accept_more_data"):
        raise ConfigError(f"COMPRESSOR={config.compressor} needs brotli 1.2: "
                          "pip install -U 'brotli>=1.2'")


def expected_shapes(config: Config, codec: str) -> tuple[Shapes, Shapes]:
    """Shapes of a file's integers and float16 tensors, in order; takes no memory."""
    with torch.device("meta"):
        model = GPT(config, sdpa_attend)
    integers = {name: p.shape for name, p in model.stacks().items()}
    floats = {f"{name}.scale": shape[:-1] for name, shape in integers.items()}
    floats |= {name: p.shape for name, p in model.vectors().items()}
    if codec == "ans":
        floats |= {f"{k}.column": shape[:-2] + shape[-1:] for k, shape in integers.items()}
    return integers, floats


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
                visit: Visitor) -> None:
    """Lets `visit` see, or set, a stack row after row, given what a decoder knows by then.

    The context of a level is the magnitude to expect: that of its row's class times what its column
    has shown so far. Frequencies begin as bells and follow what comes. Integers and single float32
    operations give the same on every machine.
    """
    low, size = limits[0], max(3, limits[1] - limits[0] + 1)
    ratio = np.arange(low, low + size) / class_magnitude(np.arange(CONTEXTS), 20)[:, None]
    tail = np.square(np.square(1 + np.square(ratio.astype(np.float64)) / 23))
    counts = (4096 / np.square(tail)).astype(np.int64) + 1
    tables, patience, fresh = level_tables(counts), 2048, []
    row_RL1 = class_magnitude(row_LR.T, 21)[..., None]
    rows_L1 = 8 * row_RL1[0]
    shown_LC = rows_L1.repeat(levels_LRC.shape[2], 1)
    for number, row_L1 in enumerate(row_RL1):
        context_LC = magnitude_class(shown_LC * (row_L1 / rows_L1), 20)
        symbol_LC = visit(context_LC, levels_LRC[:, number].astype(np.int32) - low, tables)
        levels_LRC[:, number] = symbol_LC + low
        shown_LC += np.abs(symbol_LC + low)
        rows_L1 += row_L1
        fresh.append((context_LC * size + symbol_LC).ravel())
        if len(fresh) * symbol_LC.size > patience:
            found = np.bincount(np.concatenate(fresh), minlength=counts.size)
            counts += 64 * found.reshape(counts.shape)
            tables, patience, fresh = level_tables(counts), min(2 * patience, 1 << 20), []


def walk_stack(levels_LRC: np.ndarray, classes: np.ndarray, facts: Sequence[int],
               visit: Visitor) -> None:
    """Walks the classes of a stack's rows, less their middle, and then the stack."""
    grid = classes.reshape(1, -1, 64)
    walk_levels(grid, 24 + 0 * grid[..., 0], facts[:2], visit)
    row_LR = classes[:levels_LRC[..., 0].size].reshape(levels_LRC.shape[:2])
    walk_levels(levels_LRC, row_LR.astype(np.int32) + facts[4], facts[2:4], visit)


def num_lanes(shape: Sequence[int]) -> int:
    """Coder states that advance together: more are faster, and each costs two bytes."""
    return max(16, min(512, math.prod(shape) >> 14))


def encode_levels(levels_LRC: np.ndarray) -> bytes:
    """A stack of int8 as one stream: five facts about it, the coder's states, its words.

    Source: asymmetric numeral systems (Duda 2013), many of them interleaved (Giesen 2014).
    """
    row_LR = magnitude_class(np.abs(levels_LRC, dtype=np.float32).mean(2), 21)
    middle = int(np.median(row_LR))
    classes = np.pad(row_LR.ravel() - middle, (0, -row_LR.size % 64)).astype(np.int8)
    facts = [int(end) for a in (classes, levels_LRC) for end in (a.min(), a.max())] + [middle]
    rows: list[np.ndarray] = []

    def record(context: np.ndarray, symbols: np.ndarray, tables: LevelTables) -> np.ndarray:
        rows.append(tables[0][context, symbols].ravel())
        return symbols

    walk_stack(levels_LRC.copy(), classes, facts, record)
    lanes = num_lanes(levels_LRC.shape)
    states, words = np.full(lanes, 1 << 16, np.uint32), [np.empty(0, np.uint16)]
    for row in reversed(rows):
        for begin in reversed(range(0, len(row), lanes)):
            cell = row[begin:begin + lanes]
            freq, x = cell >> 16, states[:len(cell)]
            full = np.flatnonzero(x >= freq << 17)
            words.append(x[full].astype(np.uint16))
            x[full] >>= 16
            x += x // freq * (SLOTS - freq) + (cell & 0xFFFF)
    tail = np.concatenate(words[::-1]).astype("<u2")
    return struct.pack("5b", *facts) + states.astype("<u4").tobytes() + tail.tobytes()


def decode_levels(data: bytes, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `encode_levels`. Raises: ArtifactError unless the stream ends as it began."""
    levels_LRC, lanes = np.zeros(shape, np.int8), num_lanes(shape)
    if len(data) < 5 + 4 * lanes or len(data) % 2 == 0:
        raise ArtifactError(f"artifact: a stream of {len(data)} bytes, not {5 + 4 * lanes} or more")
    states = np.frombuffer(data, "<u4", lanes, 5).astype(np.uint32)
    words = np.frombuffer(data, "<u2", -1, 5 + 4 * lanes).astype(np.uint32)
    position = 0

    def take(context: np.ndarray, symbols: np.ndarray, tables: LevelTables) -> np.ndarray:
        nonlocal position
        contexts, out = context.ravel(), symbols.ravel()
        for begin in range(0, len(out), lanes):
            some = slice(begin, begin + lanes)
            x = states[:len(out[some])]
            slot = x & SLOTS - 1
            out[some] = symbol = tables[1][contexts[some], slot]
            cell = tables[0][contexts[some], symbol]
            x[:] = (x >> 15) * (cell >> 16) + slot - (cell & 0xFFFF)
            empty = np.flatnonzero(x < 1 << 16)
            x[empty] = x[empty] << 16 | words[position:position + len(empty)]
            position += len(empty)
        return out.reshape(context.shape)

    classes = np.zeros(-(-levels_LRC[..., 0].size // 64) * 64, np.int8)
    try:
        walk_stack(levels_LRC, classes, struct.unpack_from("5b", data), take)
    except (ValueError, IndexError):  # facts or states that no encoder writes
        position = -1
    if position != len(words) or (states != 1 << 16).any():
        raise ArtifactError("artifact: a stream of levels does not end where it began")
    return levels_LRC


def encode_artifact(quantised: QuantisedModel, config: Config, plan: DepthPlan) -> bytes:
    """The artifact file: one stream per stack of integers, one of brotli for float16 values."""
    integers, floats = expected_shapes(config, config.compressor)
    tensors = quantised.vectors | {f"{k}.scale": v for k, v in quantised.scales.items()}
    values = np.concatenate([tensors[name].numpy().ravel() for name in floats]).astype("<f2")
    # Low bytes apart from high bytes: exponents compress, mantissas do not.
    planes = values.view(np.int8).reshape(-1, 2).T
    stacks = [quantised.integers[k].view(-1, *shape[-2:]).numpy() for k, shape in integers.items()]
    encode = encode_levels if config.compressor == "ans" else compress
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        streams = [*pool.map(encode, stacks), compress(planes)]
    settings = {name: getattr(config, name) for name in MODEL_SETTINGS}
    header = Header(settings, plan.name, config.preset, config.compressor, [*map(len, streams)])
    text = json.dumps(header._asdict(), separators=(",", ":")).encode()
    packed = lzma.compress(text, lzma.FORMAT_ALONE)
    frame = struct.pack("<II", len(packed), len(text))
    body = b"".join([ARTIFACT_MAGIC, frame, packed, *streams])
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES]


def decode_header(data: bytes) -> tuple[Header, int]:
    """The header of an intact file, and where its streams begin. Raises: ArtifactError."""
    start = len(ARTIFACT_MAGIC) + 8
    if not data.startswith(ARTIFACT_MAGIC) or len(data) < start + CHECKSUM_BYTES:
        raise ArtifactError(f"artifact: {len(data)} bytes that begin with {data[:8]!r}, expected "
                            f"{start + CHECKSUM_BYTES} or more with {ARTIFACT_MAGIC!r} in front")
    if hashlib.sha256(data[:-CHECKSUM_BYTES]).digest()[:CHECKSUM_BYTES] != data[-CHECKSUM_BYTES:]:
        raise ArtifactError("artifact: checksum does not match; the file is damaged or incomplete")
    packed_bytes, text_bytes = struct.unpack_from("<II", data, len(ARTIFACT_MAGIC))
    end = start + packed_bytes
    if text_bytes > MOST_HEADER_BYTES or end + CHECKSUM_BYTES > len(data):
        raise ArtifactError(f"artifact: header of {text_bytes} bytes, at most {MOST_HEADER_BYTES}")
    try:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=1 << 26)
        text = decoder.decompress(data[start:end], text_bytes + 1)
        header = Header(**json.loads(text))
        well_formed = (len(text) == text_bytes and not decoder.unused_data
                       and header.codec in ("brotli", "ans") and isinstance(header.settings, dict)
                       and all(type(n) is int and n >= 0 for n in header.streams)
                       and isinstance(header.plan, str) and isinstance(header.preset, str))
    except Exception as error:
        raise ArtifactError(f"artifact: unreadable header ({type(error).__name__})") from None
    if not well_formed or end + sum(header.streams) + CHECKSUM_BYTES != len(data):
        raise ArtifactError("artifact: its streams do not add up to the file")
    return header, end


def decode_artifact(data: bytes) -> Artifact:
    """The contents of a whole, well-formed file. Raises: ArtifactError for anything else."""
    header, position = decode_header(data)
    config = stored_config(header.settings)
    integers, floats = expected_shapes(config, header.codec)
    sizes = [shape.numel() for shape in floats.values()]
    shapes = [(shape[:-2].numel(), *shape[-2:]) for shape in integers.values()]
    shapes.append((1, 2, sum(sizes)))
    if sum(map(math.prod, shapes)) > MOST_ELEMENTS or len(shapes) != len(header.streams):
        raise ArtifactError(f"artifact: {len(header.streams)} streams, must be {len(shapes)} with "
                            f"at most {MOST_ELEMENTS} levels")
    arrays = []
    for number, (length, shape) in enumerate(zip(header.streams, shapes, strict=True), 1):
        stream = data[position:position + length]
        adaptive = header.codec == "ans" and number < len(shapes)
        arrays.append(decode_levels(stream, shape) if adaptive else np.frombuffer(
            bytearray(decompress(stream, math.prod(shape))), np.int8))
        position += length
    values = arrays.pop().reshape(2, -1).T.copy().view("<f2").ravel()
    parts = torch.from_numpy(values).split(sizes)
    tensors = {name: p.view(shape) for (name, shape), p in zip(floats.items(), parts, strict=True)}
    stacks = {name: torch.from_numpy(array).view(shape)
              for (name, shape), array in zip(integers.items(), arrays, strict=True)}
    scales = {name: tensors.pop(f"{name}.scale") for name in integers}
    return Artifact(header, QuantisedModel(stacks, scales, tensors))


def stored_config(settings: dict[str, float]) -> Config:
    """The configuration with a header's model settings. Raises: ArtifactError."""
    types = typing.get_type_hints(Config)
    if set(settings) != set(MODEL_SETTINGS):
        raise ArtifactError(f"artifact: {set(settings) ^ set(MODEL_SETTINGS)} missing or unknown")
    for name, value in settings.items():
        if type(value) is not types[name]:
            raise ArtifactError(f"artifact: {name}={value!r} is not of type {types[name].__name__}")
    try:
        return Config(**settings)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ArtifactError(f"artifact: {error}") from None


def open_artifact(path: Path, config: Config) -> Artifact:
    """The contents of the file at `path`. Raises: ArtifactError unless it is of this model.

    What it claims is compared before it is decoded: a small file can claim a large model.
    """
    try:
        data = path.read_bytes()
        header, _ = decode_header(data)
        plans = [plan.name for plan in depth_plans(config)]
        if header.plan not in plans:
            raise ArtifactError(f"depth plan {header.plan!r} is not one of {', '.join(plans)}")
        for name, value in header.settings.items():
            if name in MODEL_SETTINGS and value != getattr(config, name):
                raise ArtifactError(f"{name.upper()}={value} (PRESET={header.preset}), but the "
                                    f"settings say {getattr(config, name)}")
        return decode_artifact(data)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def load_artifact(path: Path, config: Config, world: World,
                  attend: Attend) -> tuple[GPT, DepthPlan]:
    """The model and the depth plan that the file at `path` stands for. Raises: ArtifactError."""
    header, quantised = open_artifact(path, config)
    plans = {plan.name: plan for plan in depth_plans(config)}
    model = GPT(config, attend, compute_dtype(world.device)).to(world.device)
    restore_weights(model, quantised)
    return model, plans[header.plan]


def fit_to_cap(model: GPT, hessians: dict[str, Tensor], plan: DepthPlan, world: World,
               log: RunLog) -> tuple[QuantisedModel, bytes]:
    """Integers and file such that program and model fit ARTIFACT_CAP_BYTES.

    With FIT, one factor on all steps is searched on the measured size: along the slope so far, and
    never outside what is known to be too fine and to fit. Clips are only ever widened; balanced
    steps shrink too, until bytes stop to matter.
    Raises: ArtifactError if the artifact does not fit.
    """
    config, code_bytes = model.config, len(packed_program())
    cap, floor = config.artifact_cap_bytes, -3.0 if config.quantiser == "rate" else 0.0
    margin, best, low, high, at = min(5000, cap // 200), None, floor - 1, math.inf, 0.0
    slope, last = -sum(p.numel() for p in model.stacks().values()) / 8, (math.inf, 0)
    for _ in range(20):
        begin = time.perf_counter()
        quantised = quantise(model, hessians, world, 2**at)
        solved = time.perf_counter()
        blob = encode_artifact(quantised, config, plan) if world.is_main else b""
        log.put("quantisation", seconds_solve=round(solved - begin, 2),
                seconds_encode=round(time.perf_counter() - solved, 2))
        over = int(world.decide(code_bytes + len(blob))[0]) - cap
        log.line(f"fit: steps x{2**at:.4f} leave {-over:,} bytes unused")
        if over <= 0:
            best, high = (quantised, blob), at
        else:
            low = at
        if not config.fit or -margin < over <= 0 or high <= floor:
            break
        if math.isfinite(last[0]):
            slope = min((over - last[1]) / (at - last[0]), 0.1 * slope)
        last, at = (at, over), at - (over + margin / 2) / slope
        at = max(floor, last[0] - 3, min(last[0] + 3, at))
        if not low < at < high:
            at = (low + high) / 2
    if best is None:
        hint = f"even with steps x{2**low:.0f}" if config.fit else "FIT=1 would widen the steps"
        raise ArtifactError(f"artifact is {over:,} bytes over ARTIFACT_CAP_BYTES ({cap:,}), "
                            f"{code_bytes:,} of them the program; {hint}")
    if floor == 0.0 < high:
        log.warn(f"the preset's clip widths do not fit the cap: widened x{2**high:.4f}")
    log.put("quantisation", clip_widening=round(2**high, 5))
    return best


def save_artifact(path: Path, blob: bytes, quantised: QuantisedModel, model: GPT,
                  log: RunLog) -> None:
    """Writes the artifact and says where its bytes go."""
    write_atomically(path, blob)
    cap, code_bytes = model.config.artifact_cap_bytes, len(packed_program())
    total = code_bytes + len(blob)
    sizes = {"code_bytes": code_bytes, "model_bytes": len(blob), "total_bytes": total}
    log.put("artifact", **sizes, cap_bytes=cap, unused_bytes=cap - total, path=str(path),
            sha256=hashlib.sha256(blob).hexdigest(), codec=model.config.compressor)
    weights = sum(q.numel() for q in quantised.integers.values())
    log.put("quantisation", bits_per_weight=round(8 * len(blob) / weights, 4),
            by_tensor=tensor_report(model, quantised))
    log.event("artifact", **sizes)
    log.line(f"artifact_bytes = {code_bytes:,} code + {len(blob):,} model = {total:,} / {cap:,}")


# Runs the program inside its archive. The line cache gets the text, because tracebacks,
# torch.compile and Triton read the source of what they compile.
PACKED_STUB = """import bz2, linecache
s = bz2.decompress(__loader__.get_data("source")).decode()
linecache.cache["<train_gpt>"] = len(s), None, s.splitlines(True), "<train_gpt>"
exec(compile(s, "<train_gpt>", "exec"))
"""


def strip_source(source: str) -> str:
    """The same program without comments, docstrings and annotations nobody reads, indented by one.

    Config reads the types of its fields, operators and kernels those of their arguments.
    """
    tree, read = ast.parse(source), set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = node.body[bool(ast.get_docstring(node)):] or [ast.Pass()]
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            read.update(node.body)
        if isinstance(node, ast.AnnAssign) and node not in read:
            node.annotation = ast.Constant(0)
        if isinstance(node, ast.FunctionDef) and not re.search(
                "_op|jit", " ".join(map(ast.unparse, node.decorator_list))):
            node.returns = None
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                argument.annotation = None
    lines = [(line, line.lstrip(" ")) for line in ast.unparse(tree).split("\n")]
    return "".join(" " * ((len(line) - len(text)) // 4) + text + "\n" for line, text in lines)


def pack_program(source: str) -> bytes:
    """A zip that Python runs like the script. Equal sources give equal bytes."""
    data = bz2.compress(strip_source(source).encode())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (("source", data), ("__main__.py", PACKED_STUB.encode())):
            member = zipfile.ZipInfo(name)  # its fixed date makes the archive reproducible
            member.create_system = 3
            archive.writestr(member, content, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def unpack_program(path: Path) -> str:
    """The source inside a packed program."""
    with zipfile.ZipFile(path) as archive:
        return bz2.decompress(archive.read("source")).decode()


# ==================================================================================================
# 9  Evaluation
#
# Enters: a model and the validation stream. Leaves: nats per target in a ledger, and their total in
# bits per byte. Target t is token t+1 of the stream, predicted from tokens up to t.
# ==================================================================================================


class ScoreLedger:
    """Every target's score, taken exactly once; nothing is released before it is scored."""

    def __init__(self, stream: ValStream, world: World) -> None:
        self.stream, self.world = stream, world
        self.by_document, self.num_releases = False, 0
        self.scored = np.zeros(stream.num_targets, dtype=np.uint8)  # by this rank
        self.final = np.zeros(stream.num_targets, dtype=np.uint8)  # by any rank, as agreed
        self.nats = torch.zeros(stream.num_targets, device=world.device)

    def commit(self, starts: np.ndarray, counts: np.ndarray, nats_BS: Tensor) -> None:
        """Takes scores of counts[b] targets from starts[b] on. Raises: LegalityError if one had."""
        spans = zip(starts, counts, strict=True)
        positions = np.concatenate([np.arange(start, start + n) for start, n in spans])
        again = (self.scored[positions] | self.final[positions]).any()
        if again or np.unique(positions).size != positions.size:
            first, last = positions.min(), positions.max()
            raise LegalityError(f"a target between {first} and {last} was scored before")
        self.scored[positions] = 1
        place = torch.from_numpy(positions).to(nats_BS.device)
        self.nats[place] = scored_nats(counts, nats_BS).float()

    def agree(self, first: int, last: int) -> None:
        """Makes all ranks' scores of some targets final. Raises: LegalityError if two have one."""
        flags = torch.from_numpy(self.scored[first:last].copy())
        if bool((self.world.combine(flags, dist.ReduceOp.SUM) > 1).any()):
            raise LegalityError(f"a target between {first} and {last} was scored by two ranks")
        self.final[first:last] = flags.numpy()

    def released(self, first: int, last: int) -> np.ndarray:
        """Inputs and targets `first` to `last`. Raises: LegalityError unless all are final."""
        self.require_final(first, last)
        self.num_releases += 1
        return self.stream.tokens[first:last + 1]

    def released_nats(self, windows: Windows, nats_BS: Tensor) -> Tensor:
        """Total nats of windows, to learn from. Raises: LegalityError unless committed before."""
        spans = zip(windows.first_scored, windows.stops, strict=True)
        if not all(self.scored[first:stop].all() for first, stop in spans):
            raise LegalityError("a target was to be learned from before its score was committed")
        self.num_releases += 1
        return scored_nats(windows.counts(), nats_BS).sum()

    def require_final(self, first: int, last: int) -> None:
        """Raises LegalityError unless every target from `first` to `last` has a final score."""
        missing = (self.final[first:last] == 0).sum()
        if missing:
            raise LegalityError(f"{missing} targets between {first} and {last} are not scored")

    def total_nats(self) -> float:
        """Sum over all targets and ranks, in float64. Raises: LegalityError if one is missing."""
        self.agree(0, self.final.size)
        self.require_final(0, self.final.size)
        return float(self.world.sum_(self.nats.double().sum()))


def scored_nats(counts: np.ndarray, nats_BS: Tensor) -> Tensor:
    """The first counts[b] entries of every row b, one after the other."""
    kept_BS = np.arange(nats_BS.shape[1]) < np.asarray(counts)[:, None]
    return nats_BS.flatten()[torch.from_numpy(np.flatnonzero(kept_BS)).to(nats_BS.device)]


class Windows(NamedTuple):
    """Stretches of the stream to run through the model, and which targets each of them scores."""

    starts: np.ndarray  # first input position
    first_scored: np.ndarray  # first target that counts
    stops: np.ndarray  # one past the last target

    def select(self, chosen: slice | np.ndarray) -> Windows:
        """Some of the windows."""
        return Windows(*(a[chosen] for a in self))

    def counts(self) -> np.ndarray:
        """Targets that each window scores."""
        return self.stops - self.first_scored

    def share(self, world: World) -> Windows:
        """This rank's contiguous share."""
        ranks = np.array([world.rank, world.rank + 1])
        return self.select(slice(*len(self.starts) * ranks // world.size))


def plain_windows(num_targets: int, seq_len: int) -> Windows:
    """Windows side by side; each scores all its targets."""
    return sliding_windows(num_targets, seq_len, seq_len)


def sliding_windows(num_targets: int, seq_len: int, stride: int) -> Windows:
    """Windows every `stride` targets; the first scores all of its own, the others the last ones.

    Example: 10 targets, seq_len 4, stride 2 -> windows at 0, 2, 4, 6 score 0-4, 4-6, 6-8, 8-10
    """
    context = seq_len - stride
    starts = np.arange(0, max(num_targets - context, 1), stride)
    first_scored = np.where(starts == 0, 0, starts + context)
    return Windows(starts, first_scored, np.minimum(starts + seq_len, num_targets))


def document_windows(stream: ValStream, seq_len: int, stride: int) -> Windows:
    """The sliding windows of every document; its last target is the next one's first token."""
    parts = [[start + a for a in sliding_windows(stop - start, seq_len, stride)]
             for start, stop in zip(stream.document_starts, stream.document_stops, strict=True)]
    return Windows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class Batch(NamedTuple):
    """One forward pass: windows that skip equally many positions, padded to a shape of few."""

    windows: Windows
    rows: int
    width: int
    scored: int  # positions that go through the head, after the skipped ones

    def span(self, sequence_BT: Tensor) -> Tensor:
        """The scored positions of a sequence."""
        skip = int(self.windows.first_scored[-1] - self.windows.starts[-1])
        return sequence_BT[:, skip:skip + self.scored]


class Scorer:
    """Runs windows through a model: the one way from a model to a number."""

    def __init__(self, model: GPT, plan: DepthPlan, stream: ValStream, world: World,
                 audit: Audit | None = None) -> None:
        self.model, self.plan, self.stream, self.world = model, plan, stream, world
        self.block_runner, self.audit = maybe_compile(run_block, model.config), audit
        self.tokens = torch.from_numpy(stream.tokens).to(world.device)

    @torch.no_grad()
    def score(self, windows: Windows, ledger: ScoreLedger) -> None:
        """Scores windows in order; those that skip equally many positions share batches."""
        skipped, config = windows.first_scored - windows.starts, self.model.config
        rows, width = config.eval_rows, config.eval_seq_len
        for skip in np.unique(skipped):
            group = windows.select(skipped == skip)
            for first in range(0, len(group.starts), rows):
                part = group.select(slice(first, first + rows))
                nats_BS = self.predict(Batch(part, rows, width, width - int(skip)), ledger)
                ledger.commit(part.first_scored, part.counts(), nats_BS)

    def predict(self, batch: Batch, ledger: ScoreLedger, adapter: LowRank | None = None) -> Tensor:
        """Nats (rows, scored) of the batch's targets under the weights as they are now."""
        starts = np.resize(batch.windows.starts, (batch.rows, 1))  # repeats pad the batch
        index = np.minimum(starts + np.arange(batch.width + 1), self.stream.num_targets)
        rows = self.tokens[torch.from_numpy(index).to(self.world.device)]
        nats_BS = self.nats(rows, batch, adapter)
        if self.audit:
            self.audit.observe(self, ledger, batch, rows, nats_BS, adapter)
        return nats_BS

    def nats(self, rows: Tensor, batch: Batch, adapter: LowRank | None) -> Tensor:
        """Nats (rows, scored) of the targets in token rows (rows, width + 1)."""
        return self.model.nats(self.states(rows, batch, adapter), batch.span(rows[:, 1:]), adapter)

    def states(self, rows: Tensor, batch: Batch, adapter: LowRank | None) -> Tensor:
        """Hidden states at the scored positions."""
        runner = adapter.run_block if adapter else self.block_runner
        return batch.span(self.model.hidden(rows[:, :-1], self.plan, adapter, runner))


AUDIT_EVERY = 100  # batches, from the first on: what keeps the overhead at a few percent
AUDIT_TOLERANCE = 1e-4  # nats, or probability
CONDITIONS = "c1_causal", "c2_normalised", "c3_score_first", "c4_single_pass", "documents_isolated"


class Audit:
    """Checks evaluations while they run: order in every batch, distributions in sampled ones."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.checked, self.worst = torch.zeros(2, len(CONDITIONS), dtype=torch.float64)
        self.ledger: ScoreLedger | None = None
        self.state: tuple[int, list[int]] = 0, []

    def note(self, condition: str, checked: int, violation: float | Tensor) -> None:
        """Counts checks of a condition and keeps the largest violation."""
        index = CONDITIONS.index(condition)
        self.checked[index] += checked
        self.worst[index] = self.worst[index].maximum(torch.as_tensor(violation).cpu())

    def observe(self, scorer: Scorer, ledger: ScoreLedger, batch: Batch, rows: Tensor,
                nats_BS: Tensor, adapter: LowRank | None) -> None:
        """Looks at scores that are not committed yet: weights move only after a release."""
        weights = adapter.parameters if adapter else scorer.model.parameters()
        state = ledger.num_releases, [p._version for p in weights]
        if ledger is not self.ledger:
            self.ledger, self.number, self.state = ledger, 0, state
        windows, starts = batch.windows, ledger.stream.document_starts
        opened = adapter.pairs if adapter and windows.first_scored[-1] in starts else []
        stale = any(bool(b.any()) for _, b in opened)
        moved = state[1] != self.state[1] and state[0] == self.state[0]
        self.note("c3_score_first", 1, float(moved and (stale or not opened)))
        if ledger.by_document:  # no document starts inside a context, nor with another's adapter
            inside = np.searchsorted(starts, windows.stops)
            inside -= np.searchsorted(starts, windows.starts, "right")
            self.note("documents_isolated", len(inside), float(stale or inside.max() > 0))
        if self.number % AUDIT_EVERY == 0:
            self.sample(scorer, batch, rows, nats_BS, adapter)
        self.state, self.number = state, self.number + 1

    @torch.no_grad()
    def sample(self, scorer: Scorer, batch: Batch, rows: Tensor, nats_BS: Tensor,
               adapter: LowRank | None) -> None:
        """Scores up to a drawn target again, with it, all that follows and other rows replaced."""
        vocabulary = torch.arange(scorer.model.config.vocab_size).to(rows)
        counts = batch.windows.counts()
        drawn = int(torch.randint(int(counts.max()), (), generator=self.generator))
        cut = int(batch.windows.first_scored[-1] - batch.windows.starts[-1]) + drawn
        altered = torch.randint(len(vocabulary), rows.shape, generator=self.generator).to(rows)
        altered[::2, :cut + 1] = rows[::2, :cut + 1]
        with torch.set_grad_enabled(nats_BS.requires_grad):  # the graph that scored
            x_BSD = scorer.states(altered, batch, adapter).detach()
        again_BS = scorer.model.nats(x_BSD, batch.span(rows[:, 1:]), adapter)
        shift = (again_BS - nats_BS)[:len(counts):2, :drawn + 1].abs()
        self.note("c1_causal", shift.numel(), shift.max())
        mass_B = torch.zeros(batch.rows, dtype=torch.float64, device=rows.device)
        for ids in vocabulary.split(64):
            x_BKD = x_BSD[:, drawn:drawn + 1].expand(-1, len(ids), -1)
            nats_BK = scorer.model.nats(x_BKD, ids.expand(batch.rows, -1), adapter)
            mass_B += (-nats_BK.double()).exp().sum(1)
        self.note("c2_normalised", batch.rows, (mass_B - 1).abs().max())

    def report(self, world: World) -> dict[str, dict[str, object]]:
        """Of every condition that any rank checked: whether it held, how often, the worst case."""
        world.combine(self.checked, dist.ReduceOp.SUM)
        world.combine(self.worst, dist.ReduceOp.MAX)
        facts = zip(CONDITIONS, self.checked.tolist(), self.worst.tolist(), strict=True)
        return {name: {"passed": worst <= AUDIT_TOLERANCE, "checked": int(count), "worst": worst}
                for name, count, worst in facts if count}


class Score(NamedTuple):
    """The outcome of one evaluation."""

    nats: float  # per target
    bits: float  # per byte
    seconds: float


def evaluate(scorer: Scorer, windows: Windows, by_document: bool = False) -> Score:
    """The score of a fixed model on all windows."""
    begin = time.perf_counter()
    ledger = ScoreLedger(scorer.stream, scorer.world)
    ledger.by_document = by_document
    scorer.score(windows.share(scorer.world), ledger)
    return finish_score(scorer, ledger, begin)


def finish_score(scorer: Scorer, ledger: ScoreLedger, begin: float) -> Score:
    """The score of a complete ledger whose evaluation began at `begin`."""
    nats, stream = ledger.total_nats(), ledger.stream
    if scorer.audit and scorer.world.is_main:  # an incomplete or repeated score has raised
        scorer.audit.note("c4_single_pass", stream.num_targets, 0.0)
    return Score(nats / stream.num_targets, bits_per_byte(nats, stream.num_bytes),
                 time.perf_counter() - begin)


def log_score(log: RunLog, key: str, label: str, score: Score) -> None:
    """Writes a score under its key, and in the text under the label that published logs use."""
    nats, bits, seconds = score
    for section, value in ("bpb", bits), ("nats", nats), ("eval_seconds", round(seconds, 2)):
        log.put(section, **{key: value})
    log.event("eval", label=key, val_loss=nats, val_bpb=bits, seconds=round(seconds, 3))
    log.line(f"{label} val_loss:{nats:.8f} val_bpb:{bits:.8f} eval_time:{1e3 * seconds:.0f}ms")


# ==================================================================================================
# 10  Test-time training
#
# Enters: a model from an artifact and the validation stream. Leaves: its score when it learns from
# every chunk after, and only after, that chunk was scored. The ledger enforces the order.
# ==================================================================================================


class ChunkLearner:
    """Full-weight SGD on tokens that the ledger released."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.config, self.world = scorer, scorer.model.config, scorer.world
        self.parameters = list(scorer.model.parameters())
        self.sgd = torch.optim.SGD(self.parameters, lr=0.0, momentum=self.config.ttt_momentum)

    def adapt(self, tokens: np.ndarray, lr: float) -> None:
        """All epochs on one released chunk; a tail shorter than a sequence is left out."""
        seq_len = self.config.eval_seq_len
        if tokens.size > seq_len:
            self.sgd.param_groups[0]["lr"] = lr
            rows = torch.from_numpy(tokens).unfold(0, seq_len + 1, seq_len)
            for batch in rows.split(self.config.eval_rows) * self.config.ttt_epochs:
                self.descend(batch)

    def descend(self, batch: Tensor) -> None:
        """One step on the mean over the batch: equally many rows per rank, padding not counted."""
        world, share = self.world, -(-len(batch) // self.world.size)
        mine = batch[world.rank * share:(world.rank + 1) * share]
        rows = F.pad(mine, (0, 0, 0, share - len(mine))).to(world.device)
        nats = self.scorer.model(rows[:, :-1], rows[:, 1:], self.scorer.plan,
                                 block_runner=self.scorer.block_runner)
        (nats[:len(mine)].sum() / batch[:, 1:].numel()).backward()
        world.sum_all_([gradient_of(p) for p in self.parameters])
        if self.config.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.config.ttt_grad_clip)
        self.sgd.step()
        self.sgd.zero_grad()


def evaluate_adapting(scorer: Scorer, windows: Windows) -> Score:
    """The score of a model that learns, along a cosine, from every chunk but the last."""
    config, num_targets = scorer.model.config, scorer.stream.num_targets
    begin, size = time.perf_counter(), config.ttt_chunk_tokens
    ledger, learner = ScoreLedger(scorer.stream, scorer.world), ChunkLearner(scorer)
    last_chunk = (num_targets - 1) // size
    for chunk in range(last_chunk + 1):
        first, last = chunk * size, min((chunk + 1) * size, num_targets)
        of_chunk = windows.select(windows.first_scored // size == chunk)
        scorer.score(of_chunk.share(scorer.world), ledger)  # 1. predict with the present weights
        ledger.agree(first, last)  # 2. final: a second score raises
        if chunk < last_chunk:
            lr = config.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / last_chunk))
            learner.adapt(ledger.released(first, last), lr)  # 3. learn from final tokens only
    return finish_score(scorer, ledger, begin)


Factors = dict[Site, tuple[Tensor, Tensor]]  # (B, inputs, R) and (B, R, outputs); R is the rank


def low_rank(factors: Factors, scale: float, site: Site, x: Tensor, y: Tensor) -> Tensor:
    """`y` plus, row by row of the batch, a scaled low-rank map of `x`."""
    if site not in factors:
        return y
    a, b = (t.to(x.dtype) for t in factors[site])
    return y + scale * (x @ a @ b)


def adapted_block(*inputs: object, factors: Factors, scale: float) -> Tensor:
    """`run_block` as a function of the factors, so that one graph serves all visits."""
    return run_block(*inputs, functools.partial(low_rank, factors, scale))  # type: ignore


class LowRank:
    """Adapters of a frozen model for a batch of documents: each row has its own in every layer."""

    def __init__(self, model: GPT, plan: DepthPlan) -> None:
        c, shapes = model.requires_grad_(False).config, {**model.stacks(), "head": model.embed}

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(c.ttt_batch_size, *shape, device=model.embed.device,
                               requires_grad=True)

        self.config, self.scale = c, c.ttt_lora_alpha / c.ttt_lora_rank
        self.compiled = maybe_compile(adapted_block, c)
        self.factors: dict[int, Factors] = {
            visit: {site: (zeros(shapes[site].shape[-1], c.ttt_lora_rank),
                           zeros(c.ttt_lora_rank, shapes[site].shape[-2]))
                    for site in SITES
                    if site in c.ttt_lora_sites.split(",") and (site == "head") == (visit < 0)}
            for visit in range(-1, len(plan.visits))}
        self.pairs = [pair for factors in self.factors.values() for pair in factors.values()]
        self.parameters = [factor for pair in self.pairs for factor in pair]
        self.adam = torch.optim.AdamW(
            self.parameters, lr=c.ttt_lora_lr, betas=(c.ttt_beta1, c.ttt_beta2), eps=1e-10,
            weight_decay=c.ttt_weight_decay, fused=model.embed.is_cuda)

    def __call__(self, visit: int, block: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output of one layer."""
        return low_rank(self.factors[visit], self.scale, site, x, y)

    def run_block(self, *inputs: typing.Any) -> Tensor:
        """One block, adapted as in the visit that its last input is bound to."""
        factors = self.factors[inputs[-1].args[0]]
        return self.compiled(*inputs[:-1], factors=factors, scale=self.scale)

    @torch.no_grad()
    def reset(self, keep_a: bool = False) -> None:
        """Makes all outputs zero; with `keep_a` the input factors stay as documents left them."""
        generator = torch.Generator().manual_seed(self.config.seed)
        self.adam.state.clear()
        for a, b in self.pairs:
            b.zero_()
            if not keep_a:
                a.copy_((torch.rand(a.shape[1:], generator=generator) * 2 - 1) / a.shape[1] ** 0.5)

    def learn(self, loss: Tensor) -> None:
        """One step of every row on its own share of the loss."""
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()


# Longest document, in targets, and its chunk in units of TTT_CHUNK_SIZE: short documents gain from
# early steps, and the longest must not hold up a rank.
CHUNK_SCALES = ((512, 0.5), (4096, 1.0), (16_384, 4.0), (math.inf, 8.0))
RECORD_RANKS = 8


class DocumentGroup(NamedTuple):
    """Documents that adapt side by side."""

    starts: np.ndarray  # first target of each
    stops: np.ndarray
    chunk: int  # targets between two steps

    def widths(self, config: Config) -> list[int]:
        """Width of the pass for every chunk, with as much context as fits: one of three shapes."""
        choices = config.eval_seq_len // np.array([4, 2, 1])
        longest = int((self.stops - self.starts).max())
        ends = np.arange(self.chunk, longest + self.chunk, self.chunk)
        return choices[np.searchsorted(choices, np.minimum(ends, choices[-1]))].tolist()

    def passes(self, config: Config) -> Iterator[Batch]:
        """The forward passes in order."""
        for number, width in enumerate(self.widths(config)):
            first, last = number * self.chunk, (number + 1) * self.chunk
            scored = (np.minimum(self.starts + n, self.stops) for n in (first, last))
            windows = Windows(self.starts + max(0, last - config.eval_seq_len), *scored)
            yield Batch(windows, config.ttt_batch_size, width, self.chunk)


def group_documents(starts: np.ndarray, stops: np.ndarray, config: Config) -> list[DocumentGroup]:
    """All documents, by length, in groups that fill a batch and share a chunk length."""
    limits, scales = (np.array(column) for column in zip(*CHUNK_SCALES, strict=True))
    sizes = np.clip(config.ttt_chunk_size * scales, 1, config.eval_seq_len // 2).astype(int)
    chunks, groups = sizes[np.searchsorted(limits, stops - starts)], []
    order = np.argsort(stops - starts, kind="stable")
    for chunk in np.unique(chunks):
        same = order[chunks[order] == chunk]
        for first in range(0, len(same), config.ttt_batch_size):
            rows = same[first:first + config.ttt_batch_size]
            groups.append(DocumentGroup(starts[rows], stops[rows], int(chunk)))
    return groups


def share_out(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices by rank: the costliest first, each to the rank with the least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(shares, key=lambda share: sum(costs[i] for i in share)).append(index)
    return shares


def evaluate_documents(scorer: Scorer, adapters: LowRank) -> Score:
    """The score when each document, chunk by chunk, is learned from by adapters of its own."""
    begin, stream, config = time.perf_counter(), scorer.stream, adapters.config
    ledger = ScoreLedger(stream, scorer.world)
    ledger.by_document = True
    adapters.reset()
    groups = group_documents(stream.document_starts, stream.document_stops, config)
    costs = [sum(group.widths(config)) for group in groups]  # no clock: the same on every rank
    for index in share_out(costs, scorer.world.size)[scorer.world.rank]:
        adapters.reset(config.ttt_warm_start_a)
        passes = list(groups[index].passes(config))
        for batch in passes:
            windows = batch.windows
            nats_BS = scorer.predict(batch, ledger, adapters)  # 1. predict with what is known
            ledger.commit(windows.first_scored, windows.counts(), nats_BS.detach())  # 2. final
            if batch is not passes[-1]:
                adapters.learn(ledger.released_nats(windows, nats_BS))  # 3. from final scores
    return finish_score(scorer, ledger, begin)


def official_lengths(count: int = 50_000) -> np.ndarray:
    """Document lengths like the official ones: mean 957, 59 % of targets in those up to 2,048."""
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    lengths = np.exp(6.33 + 1.022 * quantiles.numpy()).astype(np.int64)
    lengths[-16:] = np.geomspace(30_000, 97_000, 16)
    return lengths


def project_documents(scorer: Scorer, adapters: LowRank) -> float:
    """Warms up every shape on random tokens; seconds of the official text on eight ranks."""
    config, stops, seconds = adapters.config, np.cumsum(official_lengths()), {}
    groups = group_documents(np.append(0, stops[:-1]), stops, config)
    shapes = {batch.width: batch for group in groups[:1] + groups[-1:]
              for batch in group.passes(config)}
    for width, batch in 2 * list(shapes.items()):  # the first round compiles
        rows = torch.randint(config.vocab_size, (batch.rows, width + 1))
        begin = time.perf_counter()
        adapters.learn(scorer.nats(rows.to(scorer.world.device), batch, adapters).sum())
        scorer.world.synchronize()
        seconds[width] = time.perf_counter() - begin
    costs = [sum(seconds[width] for width in group.widths(config)) for group in groups]
    return max(sum(costs[i] for i in share) for share in share_out(costs, RECORD_RANKS))


# ==================================================================================================
# 11  Main
#
# The story: checks before any paid time, training, quantisation, one file, and from there on only
# that file. Every error that a user can act on ends the program with one line.
# ==================================================================================================

OFFICIAL_VAL_TARGETS = 40_540_160  # whole sequences of 2,048
OFFICIAL_VAL_BYTES = range(151_070_000, 151_090_000)  # tokenizers truncate at different places
Setup = tuple[Config, World, RunLog, Attend, ValStream, Start]  # known before the clock starts


def is_official(val: ValStream) -> bool:
    """Whether these are the competition's targets, with the tail that fills no sequence or not."""
    return val.num_targets // 2048 * 2048 == OFFICIAL_VAL_TARGETS


def resolve_track(config: Config, world: World, val: ValStream, attention_name: str) -> str:
    """The track of the run. Raises: ConfigError if it claims 10min_16mb and cannot be on it."""
    official, claim = is_official(val), " for TRACK=10min_16mb"
    if config.track == "non_record" or (
            config.track == "auto" and not (official and world.size == RECORD_RANKS)):
        return "non_record"
    require(world.size == RECORD_RANKS, "world_size", world.size, f"{RECORD_RANKS}{claim}")
    require(official, "val_targets", val.num_targets, f"{OFFICIAL_VAL_TARGETS}{claim}")
    compiled = config.compile and not os.environ.get("TORCH_COMPILE_DISABLE")
    require(compiled, "compile", 0, f"1{claim}")
    slow = attention_name in ("flash", "math")
    require(not slow, "attention", attention_name, f"fa3, fa4 or cudnn{claim}")
    for name, most in (("max_wallclock_seconds", 600), ("max_eval_seconds", 600),
                       ("artifact_cap_bytes", 16_000_000)):
        value = getattr(config, name)
        require(0 < value <= most, name, value, f"at most {most}{claim}")
    return "10min_16mb"


def prepare(config: Config, world: World) -> Setup:
    """Everything that can fail before paid time: files, packages, attention, logs."""
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # plans, block forms, and batch shapes of evaluations
    batch_shape(config, world.size)
    require_compressor(config)
    val = ValStream.load(config)
    source, packed = program_source(), packed_program()
    require(len(packed) < config.artifact_cap_bytes, "artifact_cap_bytes",
            config.artifact_cap_bytes, f"above the bytes of the packed program ({len(packed)})")
    data = data_facts(config, val)
    if config.eval_only:
        open_artifact(Path(config.eval_only), config)
    else:
        shards = [read_shard(path) for path in find_shards(config.dataset_dir, "train")]
        ends = b"".join(shard[-999:].tobytes() for shard in shards)
        data |= {"train_tokens": TrainLoader(shards, config).num_tokens,
                 "train_shards": len(shards), "train_ends_sha256": hashlib.sha256(ends).hexdigest()}
    facts: dict = environment_facts(world)
    backend = choose_attention(config.attention, world.device)
    track, log = resolve_track(config, world, val, backend.name), RunLog(config, world)
    facts["versions"] |= {"attention_backend": backend.name, "rejected": backend.rejected}
    identity = {"seed": config.seed, "world_size": world.size,
                "source_sha256": hashlib.sha256(source.encode()).hexdigest()}
    facts["data"] = {**log.result.get("data", {}), **data}
    log.result = {"started": utc_text(), **log.result, "run_id": log.run_id, "track": track,
                  "preset": config.preset, "config_hash": config.config_hash, **identity, **facts,
                  "packed_sha256": hashlib.sha256(packed).hexdigest(),
                  "config": asdict(config), "differs": config.differs()}
    log.event("start", **log.result)
    log.line(source, console=False)
    log.line(f"run {log.run_id} | PRESET={config.preset} differs: {config.differs() or 'nothing'}")
    for name in ("track", "world_size", "source_sha256", "packed_sha256", *facts):
        log.line(f"{name}: {log.result[name]}")
    start = find_start(config, {**config.method(), **identity, **data}, log)
    return config, world, log, backend.attend, val, start


def data_facts(config: Config, val: ValStream) -> dict[str, object]:
    """The data section of the result. Raises: DataError if tokenizer and shards do not match."""
    path, digest = config.dataset_dir / "manifest.json", hashlib.sha256
    try:
        manifest = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    tokenizer = digest(config.tokenizer_file.read_bytes()).hexdigest()
    written = manifest.get("tokenizer_sha256", tokenizer)
    if written != tokenizer:
        raise DataError(f"{config.tokenizer_file}: sha256 {tokenizer}, but {path} says {written}")
    if is_official(val) and val.num_bytes not in OFFICIAL_VAL_BYTES:
        raise DataError(f"{config.dataset_dir}: {val.num_bytes} bytes must be in "
                        f"{OFFICIAL_VAL_BYTES}")
    return {"name": config.dataset_dir.name, "tokenizer_sha256": tokenizer,
            "val_documents": val.num_documents, "val_targets": val.num_targets,
            "fingerprint": digest(val.tokens.tobytes()).hexdigest()[:16],
            "val_bytes": val.num_bytes, "val_raw_bytes": manifest.get("val_raw_bytes")}


def train_to_artifact(setup: Setup, path: Path) -> None:
    """Trains, quantises and writes the artifact to `path`."""
    config, world, log, attend, val, start = setup
    trainer = Trainer(config, world, log, attend, start)
    groups = count_parameters(trainer.model)
    total = sum(count for _, count in groups.values())
    log.put("model", parameters=total, groups=groups)
    log.line(f"model_params:{total}")

    def score(plan: DepthPlan) -> Score:
        windows = plain_windows(val.num_targets, config.eval_seq_len)
        return evaluate(Scorer(trainer.model, plan, val, world), windows)

    def validate(step: int, plan: DepthPlan, is_last: bool) -> None:
        nats, bits, _ = result = score(plan)
        log.event("val", step=step, label="raw", val_loss=nats, val_bpb=bits)
        log.line(f"{step}/{config.iterations} val_loss: {nats:.4f} val_bpb: {bits:.4f}")
        if is_last:
            log_score(log, "raw", "final raw weights", result)

    plan, hessians = trainer.run(validate)
    begin = time.perf_counter()
    # Full float32 products from here on: error feedback cancels too finely for tf32.
    torch.set_float32_matmul_precision("highest")
    quantised, blob = fit_to_cap(trainer.model, hessians, plan, world, log)
    if world.is_main:
        save_artifact(path, blob, quantised, trainer.model, log)
    whole = log.result["clocks"]["training_seconds"] + time.perf_counter() - begin
    log.put("clocks", train_to_artifact_seconds=whole)
    log_score(log, "averaged", "pre-quantization post-ema", score(plan))
    log.write_result("partial", "evaluating")


def evaluate_artifact(setup: Setup, path: Path) -> None:
    """Scores what the file at `path` stands for; the last evaluation is the headline."""
    config, world, log, attend, val, _ = setup
    begin, targets = time.perf_counter(), val.num_targets
    by_document = config.ttt_mode == "documents"
    model, plan = load_artifact(path, config, world, attend)
    scorer = Scorer(model, plan, val, world, Audit(config.seed) if config.audit else None)
    seq_len, stride = config.eval_seq_len, config.eval_stride
    sliding = sliding_windows(targets, seq_len, stride)
    evaluations = [("quantised", "quantized", plain_windows(targets, seq_len))]
    if config.sliding_window_enabled:
        evaluations.append(("sliding", "quantized_sliding_window", sliding))
    if by_document:
        windows = document_windows(val, seq_len, stride)
        evaluations.append(("documents", "quantized_documents", windows))
    for headline, label, windows in evaluations:
        score = evaluate_with_less(scorer, windows, headline == "documents", log)
        log_score(log, headline, label, score)
        check_gap(config, log)
    if config.ttt_enabled:
        headline = f"ttt_{config.ttt_mode}"
        if by_document:
            adapters = LowRank(model, plan)
            full = project_documents(scorer, adapters)
            score = evaluate_documents(scorer, adapters)
        else:
            score = evaluate_adapting(scorer, sliding)
        log_score(log, headline, "quantized_ttt", score)
    if headline != "ttt_documents":
        full = score.seconds * OFFICIAL_VAL_TARGETS / RECORD_RANKS * world.size / targets
    strict = time.perf_counter() - begin  # from opening the file on; lenient: the headline alone
    log.put("clocks", eval_seconds_strict=strict, eval_seconds_lenient=score.seconds,
            eval_budget_seconds=config.max_eval_seconds,
            projected_full_eval_seconds_8gpu=strict - score.seconds + full)
    if scorer.audit:
        log.result["audit"] = record = scorer.audit.report(world)
        failed = [f"{name} {facts}" for name, facts in record.items() if not facts["passed"]]
        if failed:
            raise LegalityError(f"audit: {'; '.join(failed)}")
    log.result |= {"headline": headline, "val_bpb": score.bits, "val_loss": score.nats}


def evaluate_with_less(scorer: Scorer, windows: Windows, by_document: bool, log: RunLog) -> Score:
    """The score on all windows; out of memory halves the batches, as far as there is a half."""
    while True:
        try:
            return evaluate(scorer, windows, by_document)
        except torch.OutOfMemoryError:
            tokens = scorer.model.config.val_batch_tokens // 2
            log.warn(f"out of memory: VAL_BATCH_TOKENS={tokens} from here on")
            scorer.model.config = replace(scorer.model.config, val_batch_tokens=tokens)


def check_gap(config: Config, log: RunLog) -> None:
    """Notes what quantisation lost. Raises: TrainingError if it is more than the limit."""
    bpb = log.result["bpb"]
    if "averaged" in bpb:
        gap = bpb["quantised"] - bpb["averaged"]
        log.put("quantisation", gap_bpb=gap)
        if not gap <= config.max_quant_gap_bpb:
            raise TrainingError(f"quantisation lost {gap:.4f} BPB, over MAX_QUANT_GAP_BPB; "
                                f"{log.folder} keeps the weights")


def report_outcome(log: RunLog) -> None:
    """Prints the result table."""
    result = log.result
    for key, bits in result["bpb"].items():
        mark = "  <- headline" if key == result["headline"] else ""
        log.line(f"{key:<14}{bits:>9.5f} BPB{result['nats'][key]:>9.5f} nats"
                 f"{result['eval_seconds'][key]:>9.1f} s{mark}")
    log.line(f"result: {log.result_path}")


def describe_config(config: Config, world: World) -> str:
    """Settings, topology, parameters, operations and expected bytes, as text."""
    lines = [f"{name.upper()}={int(value) if isinstance(value, bool) else value}"
             for name, value in asdict(config).items()]
    lines.append(f"config hash {config.config_hash}, differs: {config.differs() or 'nothing'}")
    for plan in depth_plans(config):
        lines.append(f"plan {plan.name}: {plan.describe()} "
                     f"{flops_per_token(config, plan) / 1e6:.1f} MFLOP per token")
        for number, (block, pass_number, skip_row, skip_from) in enumerate(plan.visits):
            form = block_form(config, block)
            skip = f", skip {skip_row} from visit {skip_from}" if skip_row >= 0 else ""
            lines.append(f"  visit {number:>2}: block {block} pass {pass_number} {form.residual}"
                         f"{' xsa' if form.exclusive else ''}{skip}")
    with torch.device("meta"):
        groups = count_parameters(GPT(config, sdpa_attend))
    lines += [f"{name}: {tensors} tensors, {count:,} parameters"
              for name, (tensors, count) in groups.items()]
    micro_steps, sequences = batch_shape(config, world.size)
    lines += [f"total: {sum(count for _, count in groups.values()):,} parameters",
              f"batch: {world.size} ranks x {micro_steps} micro-steps x {sequences} sequences x "
              f"{config.train_seq_len} tokens",
              f"expected artifact: {estimate_artifact_bytes(config):,} of "
              f"{config.artifact_cap_bytes:,} bytes"]
    return "\n".join(lines)


def main(env: Mapping[str, str] = os.environ) -> dict[str, object]:
    """One run from settings to result. Raises: GolfError."""
    config, world = Config.from_env(env), World.from_env(env)
    if config.print_config:
        print(describe_config(config, world))
        return {}
    with world.process_group(config.rank_timeout_seconds):
        _, _, log, _, _, (state, _) = setup = prepare(config, world)
        try:
            path = Path(config.eval_only or log.folder / "artifact.bin")
            done = state.trained and "averaged" in log.result.get("bpb", {})
            if not (config.eval_only or done):
                train_to_artifact(setup, path)
            # From here on only the artifact exists.
            evaluate_artifact(setup, path)
            report_outcome(log)
            world.deferring = True  # nothing is lost any more
        except BaseException as error:
            if any(log.folder.glob("*.ckpt")):
                log.line(f"RUN_ID={log.run_id} RESUME=auto continues")
            with contextlib.suppress(OSError):
                log.write_result("partial", world.explain(error))
            raise
        clocks = log.result["clocks"]
        crossed = [f"{name.upper()}={getattr(config, name)} was crossed: {clocks[clock]:.1f}s"
                   for name, clock in (("max_wallclock_seconds", "training_seconds"),
                                       ("max_eval_seconds", "eval_seconds_strict"))
                   if 0 < getattr(config, name) < clocks.get(clock, 0)]
        result = log.write_result("complete", "; ".join(crossed) or "finished")
        if crossed and result["track"] == "10min_16mb":
            raise LegalityError(result["exit_reason"])
        return result


def command_line(arguments: Sequence[str]) -> int:
    """Runs the program or its sub-command; the exit code."""
    try:
        if len(arguments) == 2 and arguments[0] == "pack":
            packed = packed_program()
            write_atomically(Path(arguments[1]), packed)
            print(f"{arguments[1]}: {len(packed):,} bytes, {hashlib.sha256(packed).hexdigest()}")
        elif arguments:
            raise ConfigError("usage: train_gpt.py [pack OUT], settings as environment variables")
        else:
            main()
    except (GolfError, OSError, KeyboardInterrupt) as error:
        print(f"error: {error}", file=sys.stderr)
        return 75 if isinstance(error, KeyboardInterrupt) else 1
    return 0


# ==================================================================================================
# 12  Kernels
#
# Attention libraries, each imported by its loader: a machine without one only loses the choice.
# ==================================================================================================


def require_capability(device: torch.device, *majors: int) -> None:
    """Raises GolfError unless the device is a GPU of one of these compute-capability majors."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in majors:
        raise GolfError(f"needs a GPU of compute capability {' or '.join(map(str, majors))}")


def load_fa3(device: torch.device) -> Attend:
    """flash-attn-3, whose package registers operators that torch.compile knows."""
    require_capability(device, 9)
    from flash_attn_interface import flash_attn_func

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        y = flash_attn_func(q_BTHK, k_BTGK, v_BTGK, causal=True)
        return y[0] if isinstance(y, tuple) else y

    return attend


def load_fa4(device: torch.device) -> Attend:
    """flash-attn-4, wrapped in operators of our own, because the package registers none."""
    require_capability(device, 9, 10)
    operator = fa4_operator()
    return lambda q_BTHK, k_BTGK, v_BTGK: operator(q_BTHK, k_BTGK, v_BTGK)[0]


@functools.cache
def fa4_operator() -> Callable[..., tuple[Tensor, Tensor]]:
    """Causal attention, differentiable: q, k, v -> y (B, T, H, K) and log-sum-exp (B, H, T)."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    @torch.library.custom_op("golf::fa4_forward", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y, log_sum, *_ = _flash_attn_fwd(q, k, v, causal=True, return_lse=True)
        return y, log_sum

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        B, T, H, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)

    @torch.library.custom_op("golf::fa4_backward", mutates_args=())
    def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor,
                 log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, y, dy, log_sum, causal=True)
        return dq, dk, dv

    @backward.register_fake
    def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor,
          log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def save(ctx: typing.Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: typing.Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return backward(dy.contiguous(), *ctx.saved_tensors)

    forward.register_autograd(differentiate, setup_context=save)
    return forward


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
