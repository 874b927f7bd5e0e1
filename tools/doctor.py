#!/usr/bin/env python3
"""Checks, before the money runs, that a run would work here; says what to type where it would not.

    python tools/doctor.py                  default preset, all GPUs, with a 30-second speed check
    PRESET=pr1493 python tools/doctor.py    settings come from the environment, as for train_gpt.py
    python tools/doctor.py --quick          everything but the speed check
    python tools/doctor.py --json           the same for programs

Looks at GPUs, driver, torch, compiler, attention back-end, packages, tokenizer, shards, byte
totals, disk, memory, other GPU processes, clocks, port, caches and the size of the artifact. Says
how to start the run on eight GPUs, and what it takes there in steps, seconds and dollars by the
newest run of this model in logs/. Changes nothing and leaves no file behind.

Exit status: 0 a run would start, 1 a run would fail, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

if TYPE_CHECKING:
    import torch

    from train_gpt import Config

from tools.runs import Run, RunError, read_result
from tools.sweep import WORLD_SIZES

Status = Literal["ok", "warn", "fail"]

OLDEST_PYTHON = (3, 11)
TORCH_RANGE = ((2, 9), (2, 16))           # from, below
GOOD_SDPA_TORCH = (2, 11)                 # its cuDNN attention is near flash-attn-3 on Hopper
INSTALL_TORCH_GPU = "pip install torch==2.13.0"
INSTALL_TORCH_CPU = "pip install uv && uv pip install --torch-backend=cpu torch==2.13.0"
MATCH_TORCH = "pip install uv && uv pip install --torch-backend=auto --reinstall torch==2.13.0"
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "ceph", "lustre", "gluster", "fuse", "9p", "beegfs")
GIB = 1 << 30
LEAST_BITS = 1.5                   # a weight; a model that is left fewer is too large
IDLE_GPU_MIB = 1500                # more in use before we start belongs to somebody else
# Bits of nvidia-smi's reasons for lower clocks that cost speed; the others are no trouble.
SLOWDOWNS = {0x8: "hardware slowdown", 0x20: "too hot (software)", 0x40: "too hot (hardware)",
             0x80: "power brake"}
# Share of the rate of large matrix products that whole training steps of this model family reach.
STEP_EFFICIENCY = 0.42
# Published totals of the official validation documents in the SP8192 tokenizer.
OFFICIAL_TARGETS, OFFICIAL_BYTES = 40_540_160, 151_078_222
# What a finding advises more than once
APT = "apt-get update && apt-get install -y"
EXPLAIN_CLOCKS = "nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE"
FREE_MEMORY = "ps aux --sort=-rss | head    # end what is not needed"
TORCHRUN = "torchrun --standalone --nproc_per_node={} train_gpt.py"
RECORD_RANKS = WORLD_SIZES[0]
POD_DOLLARS_PER_HOUR = 20.0        # what eight H100 cost to rent


class Check(NamedTuple):
    """One line of the report: what was looked at, how it is, what was found, what to type."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def ok(name: str, detail: str) -> Check:
    """A finding that needs nothing."""
    return Check(name, "ok", detail)


def warn(name: str, detail: str, fix: str) -> Check:
    """A finding that costs speed, money or trust."""
    return Check(name, "warn", detail, fix)


def fail(name: str, detail: str, fix: str) -> Check:
    """A finding that a run would not survive."""
    return Check(name, "fail", detail, fix)


@dataclass
class Pod:
    """What the checks need to know; filled in as they go."""

    env: Mapping[str, str]
    processes: int = 0            # ranks that the run will have; 0: as many as there are GPUs
    bench_seconds: float = 0.0    # 0: no speed check
    config: Config | None = None
    smi: list[dict[str, str]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where a run would compute."""
        import torch

        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def numbers(version: str) -> tuple[int, int]:
    """Major and minor part of a version text."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.1f} GiB"


# ----------------------------------------------------------------------------------------------
# Python, torch, packages
# ----------------------------------------------------------------------------------------------
def check_python(pod: Pod) -> Iterator[Check]:
    """The interpreter is new enough."""
    version = platform.python_version()
    detail = f"{version} on {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        yield fail("python", detail, "make PYTHON=python3.12 run    # 3.11 or later")
    else:
        yield ok("python", detail)


def check_torch(pod: Pod) -> Iterator[Check]:
    """torch is there, in range, and built for this machine's driver."""
    if importlib.util.find_spec("torch") is None:
        install = INSTALL_TORCH_GPU if pod.smi else INSTALL_TORCH_CPU
        yield fail("torch", "not installed", install)
        return
    import torch

    cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
    detail = f"{torch.__version__}, CUDA {cuda or 'none'}, cuDNN {cudnn or 'none'}"
    low, below = TORCH_RANGE
    if low <= numbers(torch.__version__) < below:
        yield ok("torch", detail)
    else:
        tested = f"tested from {low[0]}.{low[1]} to below {below[0]}.{below[1]}"
        yield warn("torch", f"{detail}; {tested}", MATCH_TORCH)
    if pod.smi and not torch.cuda.is_available():
        why = f"driver {pod.smi[0]['driver_version']} cannot run CUDA {cuda}"
        yield fail("torch and driver", why if cuda else "this torch is built without CUDA",
                   MATCH_TORCH)


def check_packages(pod: Pod) -> Iterator[Check]:
    """What a run imports besides torch."""
    for package in ("numpy", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            yield fail(package, "not installed", f"pip install {package}")
        else:
            yield ok(package, importlib.metadata.version(package))


def check_brotli(pod: Pod, config: Config) -> Iterator[Check]:
    """The artifact's codec is there: a run would otherwise end without an artifact."""
    import train_gpt

    try:
        coder = train_gpt.codec_of(config)
    except train_gpt.GolfError as error:
        yield fail("codec", str(error), "pip install 'brotli>=1.2'")
        return
    detail = f"{coder}, with brotli {importlib.metadata.version('brotli')}"
    if coder == config.compressor:
        yield ok("codec", detail)
    else:
        yield warn("codec", f"{detail}, instead of COMPRESSOR={config.compressor}",
                   "pip install zstandard")


def check_compiler(pod: Pod, config: Config) -> Iterator[Check]:
    """torch.compile finds a C compiler and, for Triton, Python's headers."""
    switches = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
    disabled = [name for name in switches if pod.env.get(name, "0") != "0"]
    if disabled:
        yield warn("compile", f"{disabled[0]} is set: the run will be eager and much slower",
                   f"unset {' '.join(disabled)}")
    if not config.compile:
        yield ok("compiler", "COMPILE=0 needs none")
        return
    on_gpu = pod.device.type == "cuda"
    compilers = (pod.env.get("CC", "gcc"), "gcc", "clang") if on_gpu else ("g++", "clang++")
    found = next((path for name in compilers if (path := shutil.which(name))), None)
    if found is None:
        yield fail("compiler", "torch.compile needs one", f"{APT} build-essential")
    else:
        yield ok("compiler", found)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if on_gpu and not header.is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        yield fail("python headers", f"Triton needs {header}", f"{APT} {package}")


def check_config(pod: Pod) -> Iterator[Check]:
    """The settings in the environment are accepted."""
    import train_gpt

    try:
        pod.config = train_gpt.Config.from_env(pod.env)
    except train_gpt.GolfError as error:
        words = re.findall(r"[A-Z][A-Z0-9_]+", str(error))
        named = next((word for word in words if word in pod.env), "")
        yield fail("settings", str(error), f"unset {named}" if named else "env | sort")
        return
    differs = ", ".join(f"{key.upper()}={value}" for key, value in pod.config.differs().items())
    yield ok("settings", f"PRESET={pod.config.preset}, differs: {differs or 'nothing'}")


# ----------------------------------------------------------------------------------------------
# GPUs
# ----------------------------------------------------------------------------------------------
SMI_FIELDS = (
    "index", "name", "driver_version", "memory.used", "temperature.gpu", "power.limit",
    "power.default_limit", "clocks.max.sm")


def ask_smi(arguments: Sequence[str], names: Sequence[str]) -> list[dict[str, str]]:
    """Rows that nvidia-smi prints for a query; empty when it is missing or refuses."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        lines = [line for line in answer.stdout.splitlines() if line.strip()]
        rows = [[cell.strip() for cell in line.split(",")] for line in lines]
        return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
    return []


def smi_number(text: str) -> float:
    """A cell of nvidia-smi as a number; 0 for its `[N/A]` and the like."""
    with contextlib.suppress(ValueError):
        return float(text)
    return 0.0


def check_processes(pod: Pod) -> Iterator[Check]:
    """No other program sits on the GPUs. Asked before this one touches them."""
    if not pod.smi:
        return
    names = ("pid", "process_name", "used_memory")
    rows = ask_smi([f"--query-compute-apps={','.join(names)}"], names)
    others = [row for row in rows if row["pid"] != str(os.getpid())]
    busy = [row["index"] for row in pod.smi if smi_number(row["memory.used"]) > IDLE_GPU_MIB]
    if others:
        listing = ", ".join(f"{row['pid']} {Path(row['process_name']).name} "
                            f"{row['used_memory']} MiB" for row in others)
        stale = " ".join(row["pid"] for row in others)
        yield warn("other GPU processes", listing, f"kill {stale}    # if they are stale")
    elif busy:
        yield warn("other GPU processes", f"memory of GPU {', '.join(busy)} is in use by something "
                   "out of sight", "fuser -v /dev/nvidia*    # or take another pod")
    else:
        yield ok("other GPU processes", "none")


def slowdown_bits() -> list[int]:
    """Why each GPU runs below its clocks, as nvidia-smi's bits; the query has two names."""
    for name in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
        rows = ask_smi([f"--query-gpu={name}"], ("bits",))
        if rows:
            return [int(row["bits"], 16) if row["bits"].startswith("0x") else 0 for row in rows]
    return []


def check_clocks(pod: Pod) -> Iterator[Check]:
    """No GPU is throttled, or power-limited below its default."""
    if not pod.smi:
        return
    bad = [f"GPU {row['index']} {text}" for row, bits in zip(pod.smi, slowdown_bits(), strict=False)
           for bit, text in SLOWDOWNS.items() if bits & bit]
    for row in pod.smi:
        limit, usual = smi_number(row["power.limit"]), smi_number(row["power.default_limit"])
        if 0 < limit < usual:
            bad.append(f"GPU {row['index']} limited to {limit:.0f} of {usual:.0f} W")
    if bad:
        yield warn("clocks", "; ".join(bad), f"{EXPLAIN_CLOCKS}    # or take another pod")
        return
    hottest = max(smi_number(row["temperature.gpu"]) for row in pod.smi)
    clock = pod.smi[0]["clocks.max.sm"]
    yield ok("clocks", f"up to {clock} MHz, not throttled, hottest {hottest:.0f} C")


def check_gpus(pod: Pod, config: Config) -> Iterator[Check]:
    """The GPUs are equal."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    pod.processes = pod.processes or next((size for size in WORLD_SIZES if size <= count), 1)
    if count:
        names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
        driver = pod.smi[0]["driver_version"] if pod.smi else "unknown"
        detail = f"{count} x {' and '.join(names)}, driver {driver}"
        same = len(names) == 1
        yield ok("gpu", detail) if same else warn("gpu", detail, "take a pod with equal GPUs")
    elif config.preset == "demo":
        yield ok("gpu", "none: a run uses the CPU")
    else:
        yield warn("gpu", f"none: PRESET={config.preset} on a CPU takes days",
                   "PRESET=demo python train_gpt.py")


def check_ranks(pod: Pod, config: Config) -> Iterator[Check]:
    """Every GPU works, and the batch divides by the number of ranks."""
    import torch

    import train_gpt

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < pod.processes < count:
        launch = TORCHRUN.format(count if count in WORLD_SIZES else pod.processes)
        yield warn("ranks", f"{pod.processes} of {count} GPUs would work", launch)
    elif count and pod.processes > count:
        yield fail("ranks", f"{pod.processes} ranks but {count} GPUs", TORCHRUN.format(count))
    try:
        shape = train_gpt.batch_shape(config, pod.processes)
    except train_gpt.GolfError as error:
        yield fail("batch", str(error), TORCHRUN.format("...") + "    # with one of these")
    else:
        yield ok("batch", f"{pod.processes} ranks x {shape.micro_steps} micro-steps x "
                 f"{shape.sequences} sequences")


def activation_bytes(config: Config) -> float:
    """Rough GPU bytes of one micro-step: what the backward pass keeps, and the logits."""
    import train_gpt

    visits = max(len(plan.visits) for plan in train_gpt.depth_plans(config))
    per_visit = 2 * (10 * config.model_dim + 2 * config.kv_dim + 3 * config.mlp_dim)
    return config.micro_batch_tokens * (visits * per_visit + 8 * config.vocab_size)


def check_gpu_memory(pod: Pod, config: Config) -> Iterator[Check]:
    """A micro-step fits the GPU, as far as a rough estimate can tell."""
    import torch

    if pod.device.type != "cuda":
        return
    free = min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    need, tokens = activation_bytes(config), config.micro_batch_tokens
    detail = f"about {gib(need)} for a micro-step, {gib(free)} free"
    if need < 0.85 * free:
        yield ok("gpu memory", detail)
        return
    while tokens > config.train_seq_len and need * tokens / config.micro_batch_tokens > 0.8 * free:
        tokens //= 2
    least = max(tokens, config.train_seq_len)
    yield warn("gpu memory", detail, f"export MICRO_BATCH_TOKENS={least}")


def attention_fix(pod: Pod) -> str:
    """The command that installs the fastest attention for this GPU; empty where there is none."""
    import torch

    if pod.device.type != "cuda":
        return ""
    if numbers(torch.__version__) >= GOOD_SDPA_TORCH:
        return ""
    least = ".".join(map(str, GOOD_SDPA_TORCH))
    return f"pip install -U 'torch>={least}'"


def check_attention(pod: Pod, config: Config) -> Iterator[Check]:
    """The back-end that a run would choose, and why the faster ones lost."""
    import torch

    import train_gpt

    fix = attention_fix(pod)
    try:
        chosen = train_gpt.choose_attention(config.attention, pod.device)
    except train_gpt.GolfError as error:
        yield fail("attention", str(error), fix or "unset ATTENTION")
        return
    if pod.device.type != "cuda":
        yield ok("attention", f"{chosen.name} (the others need a GPU)")
        return
    reasons = "; ".join(f"not {name}: {reason}" for name, reason in chosen.rejected.items())
    detail = chosen.name + (f" ({reasons})" if reasons else "")
    fast = {"fa3"} | ({"cudnn"} if numbers(torch.__version__) >= GOOD_SDPA_TORCH else set())
    slow = chosen.name not in fast and fix
    yield warn("attention", detail, fix) if slow else ok("attention", detail)


# ----------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------
def data_command(config: Config) -> str:
    """The command that prepares the dataset of a configuration."""
    variant = "demo" if config.preset == "demo" else f"download sp{config.vocab_size}"
    return f"python tools/prepare_data.py {variant}"


def check_tokenizer(pod: Pod, config: Config) -> Iterator[Check]:
    """The tokenizer loads, has the configured size, and its byte table can be built."""
    import train_gpt

    path = config.tokenizer_file
    try:
        train_gpt.token_bytes(train_gpt.load_tokenizer(path, config.vocab_size))
    except train_gpt.GolfError as error:
        yield fail("tokenizer", str(error), data_command(config))
    else:
        yield ok("tokenizer", f"{path}, {config.vocab_size} pieces")


def check_train_shards(pod: Pod, config: Config) -> Iterator[Check]:
    """Every training shard has a good header and length, and its first ids are in range."""
    import train_gpt

    sample = 1 << 16
    try:
        paths = train_gpt.find_shards(config.dataset_dir, "train")
        total = 0
        for path in paths:
            tokens = train_gpt.read_shard(path)
            train_gpt.check_ids(tokens[:sample], config.vocab_size, str(path))
            total += len(tokens)
    except train_gpt.GolfError as error:
        yield fail("train shards", str(error), data_command(config))
    else:
        yield ok("train shards", f"{len(paths)} in {config.dataset_dir}, {total:,} tokens")


def check_val_stream(pod: Pod, config: Config) -> Iterator[Check]:
    """The validation bytes agree with the published totals and with the manifest."""
    import train_gpt

    try:
        val = train_gpt.ValStream.load(config)
    except train_gpt.GolfError as error:
        yield fail("val shards", str(error), data_command(config))
        return
    detail = (f"{val.num_targets:,} targets, {val.num_documents:,} documents, "
              f"{val.num_bytes:,} bytes")
    official = val.num_targets == OFFICIAL_TARGETS
    if official and val.num_bytes != OFFICIAL_BYTES:
        yield fail("val shards", f"{detail}; the official documents have {OFFICIAL_BYTES:,} bytes",
                   data_command(config))
    else:
        yield ok("val shards", f"{detail}{' (the official documents)' if official else ''}")
    manifest = config.dataset_dir / "manifest.json"
    if manifest.is_file():
        yield compare_manifest(config, manifest, val.num_bytes)


def compare_manifest(config: Config, path: Path, val_bytes: int) -> Check:
    """Whether the manifest describes the shards beside it: same tokenizer, at least as many bytes.

    It may count a few bytes more, because a run leaves out the tail that fills no window.
    """
    fix = f"rm -r {shlex.quote(str(config.dataset_dir))} && {data_command(config)}"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return warn("manifest", f"{path}: {error}", fix)
    digest = hashlib.sha256(config.tokenizer_file.read_bytes()).hexdigest()
    if facts.get("tokenizer_sha256", digest) != digest:
        other = f"{path}: made with another tokenizer than {config.tokenizer_file}"
        return fail("manifest", other, fix)
    recorded = facts.get("val_bytes", val_bytes)
    if recorded < val_bytes:
        fewer = f"{path}: val_bytes {recorded:,}, the shards hold {val_bytes:,}"
        return fail("manifest", fewer, fix)
    return ok("manifest", f"{facts.get('name', path.parent.name)}, tokenizer as recorded")


# ----------------------------------------------------------------------------------------------
# Disk, memory, port, caches, artifact
# ----------------------------------------------------------------------------------------------
def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def is_writable(folder: Path) -> bool:
    """Whether a file can really be made there, which permission bits alone do not tell."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder):
        return True
    return False


def check_disk(pod: Pod, config: Config) -> Iterator[Check]:
    """Log and run folders can be written and hold an artifact, weights and checkpoints."""
    needed = 4 * config.artifact_cap_bytes
    for variable, setting in (("LOG_DIR", config.log_dir), ("RUN_DIR", config.run_dir)):
        folder = existing_parent(Path(setting))
        free = shutil.disk_usage(folder).free
        detail, fix = f"{setting}, {gib(free)} free", f"du -xh --max-depth=2 {folder} | sort -h"
        if not is_writable(folder):
            yield fail(variable, f"{setting} cannot be written",
                       f"export {variable}=/tmp/{Path(setting).name}")
        elif free < needed:
            yield fail(variable, f"{detail}, {gib(needed)} needed", fix)
        else:
            yield ok(variable, detail) if free > 2 * GIB else warn(variable, detail, fix)


def available_memory() -> int:
    """Bytes of main memory that are left: the machine's, or the container's if less."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(rows["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def check_memory(pod: Pod, config: Config) -> Iterator[Check]:
    """Main memory and, for several ranks, the shared memory that NCCL uses."""
    wanted = 4 * GIB * pod.processes if pod.device.type == "cuda" else 3 * GIB
    available = available_memory()
    detail = f"{gib(available)} available, {gib(wanted)} wanted"
    if available < wanted / 3:
        yield fail("memory", detail, FREE_MEMORY)
    else:
        yield ok("memory", detail) if available >= wanted else warn("memory", detail, FREE_MEMORY)
    shared = Path("/dev/shm")
    if pod.processes > 1 and shared.is_dir() and shutil.disk_usage(shared).total < GIB:
        total = gib(shutil.disk_usage(shared).total)
        yield warn("shared memory", f"/dev/shm holds {total}, NCCL wants 1 GiB",
                   "mount -o remount,size=16G /dev/shm    # or start with --shm-size=16g")


def check_port(pod: Pod, config: Config) -> Iterator[Check]:
    """The port of the rendezvous is a port, and free."""
    text = pod.env.get("MASTER_PORT", "29500")
    port = int(text) if re.fullmatch("[0-9]{1,5}", text) else 0
    if not 0 < port < 1 << 16:
        yield fail("port", f"MASTER_PORT={text!r} must be between 1 and 65535", "unset MASTER_PORT")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            yield warn("port", f"{port}: {error.strerror}",
                       f"{TORCHRUN.format(pod.processes)}    # picks a free port itself")
            return
    yield ok("port", f"{port} is free")


def file_system(path: Path) -> str:
    """Type of the file system that holds a path; empty where /proc/mounts cannot be read."""
    mounts = Path("/proc/mounts")
    if not mounts.is_file():
        return ""
    place = existing_parent(path).resolve()
    rows = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    mounted = [(where.replace("\\040", " "), kind) for where, kind in rows]
    holding = [(where, kind) for where, kind in mounted if place.is_relative_to(where)]
    return max(holding, key=lambda row: len(row[0]))[1] if holding else ""


def check_caches(pod: Pod, config: Config) -> Iterator[Check]:
    """Compile caches lie on a local, writable disk; says whether they are warm."""
    if not config.compile:
        return
    inductor = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    folders = {"TORCHINDUCTOR_CACHE_DIR": inductor}
    if pod.device.type == "cuda":
        folders["TRITON_CACHE_DIR"] = Path.home() / ".triton" / "cache"
    for variable, usual in folders.items():
        folder = Path(pod.env.get(variable) or usual)
        kind, free = file_system(folder), shutil.disk_usage(existing_parent(folder)).free
        warm = folder.is_dir() and any(folder.iterdir())
        detail = (f"{folder}, {'warm' if warm else 'cold'}, {kind or 'unknown file system'}, "
                  f"{gib(free)} free")
        fix = f"export {variable}=/tmp/{variable.lower()}"
        if not is_writable(existing_parent(folder)):
            yield fail(variable, f"{detail}; cannot be written", fix)
        elif kind.startswith(NETWORK_FILE_SYSTEMS):
            yield warn(variable, f"{detail}; a network disk is slow and its locks fail", fix)
        else:
            yield ok(variable, detail) if free > GIB else warn(variable, detail, fix)


def check_artifact(pod: Pod, config: Config) -> Iterator[Check]:
    """The artifact should fit its cap, or its weights what the cap leaves them."""
    import train_gpt

    cap = config.artifact_cap_bytes
    if config.quantiser == "rate":
        weights = sum(shape.numel() for shape in train_gpt.expected_shapes(config)[0].values())
        bits = 8 * (cap - len(train_gpt.packed_program())) / weights
        detail = f"fitted to its cap of {cap:,} bytes by design: {bits:.2f} bits a weight"
        if bits < LEAST_BITS:
            yield fail("artifact", f"{detail}, at least {LEAST_BITS} needed",
                       f"export MODEL_DIM={config.model_dim // 2}    # or another smaller model")
        else:
            yield ok("artifact", detail)
        return
    size = train_gpt.estimate_artifact_bytes(config)
    detail = f"about {size:,} of {cap:,} bytes expected"
    if size <= cap:
        yield ok("artifact", detail)
    elif config.fit and size <= 1.1 * cap:
        yield warn("artifact", f"{detail}; FIT=1 will widen the clips, which costs quality",
                   f"export NUM_LAYERS={config.num_layers - 1}    # or another smaller model")
    else:
        yield fail("artifact", detail,
                   f"export MLP_QMAX={config.mlp_qmax // 2}    # or a smaller model")


# ----------------------------------------------------------------------------------------------
# Speed: matrix products, copies, all-reduce
# ----------------------------------------------------------------------------------------------
class RankSpeed(NamedTuple):
    """What one rank measured."""

    tflops: list[float]       # of large bf16 products, one number per window, in order of time
    copy_gb_s: float          # within device memory, read plus written
    upload_gb_s: float        # from page-locked main memory
    all_reduce_gb_s: float    # bus bandwidth; 0 with one rank


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes on a device."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def measure_products(device: torch.device, seconds: float, size: int = 8192) -> list[float]:
    """TFLOP/s of square bf16 products in windows of about half a second, for some seconds."""
    import torch

    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    once = min(timed(lambda: torch.mm(left, right, out=out), device) for _ in range(3))
    repeats = max(1, round(0.5 / once))
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        taken = timed(lambda: [torch.mm(left, right, out=out) for _ in range(repeats)], device)
        rates.append(repeats * 2 * size**3 / taken / 1e12)
    return rates


def measure_copies(device: torch.device, size: int = GIB) -> tuple[float, float]:
    """GB/s of a copy within device memory (read plus written) and of an upload to it."""
    import torch

    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    part = target[:host.numel()]
    inside = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    upload = min(timed(lambda: part.copy_(host, non_blocking=True), device) for _ in range(5))
    return 2 * size / inside / 1e9, host.numel() / upload / 1e9


def measure_all_reduce(device: torch.device, ranks: int, elements: int = 1 << 25) -> float:
    """GB/s of bus bandwidth: 2 (n - 1) / n times the data, as NCCL's own tests count it."""
    import torch
    import torch.distributed as dist

    data = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    seconds = min(timed(lambda: dist.all_reduce(data), device) for _ in range(40))
    return 2 * (ranks - 1) / ranks * data.nbytes / seconds / 1e9


def bench_rank(rank: int, ranks: int, seconds: float, folder: str) -> None:
    """Measures one GPU, all of them at the same time, and leaves the numbers in a file."""
    import torch
    import torch.distributed as dist

    device = torch.device(f"cuda:{rank}")
    torch.cuda.set_device(device)
    with torch.no_grad():
        if ranks > 1:
            dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank,
                                    world_size=ranks)
        bus = measure_all_reduce(device, ranks) if ranks > 1 else 0.0
        inside, upload = measure_copies(device)
        speed = RankSpeed(measure_products(device, 0.7 * seconds), inside, upload, bus)
    Path(folder, f"{rank}.json").write_text(json.dumps(speed))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_bench(ranks: int, seconds: float) -> list[RankSpeed]:
    """Measurements of all ranks. Raises: TimeoutError when they hang, as a broken NCCL does."""
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.spawn(bench_rank, (ranks, seconds, folder), ranks, join=False)
        end = time.monotonic() + seconds + 60
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{ranks} ranks did not finish within {seconds + 60:.0f} s")
        texts = [Path(folder, f"{rank}.json").read_text() for rank in range(ranks)]
        return [RankSpeed(*json.loads(text)) for text in texts]


def rates_at(config: Config, tflops: float) -> dict[str, float]:
    """Tokens per second of each depth plan at the matrix rate of all GPUs together."""
    import train_gpt

    return {plan.name: tflops * 1e12 * STEP_EFFICIENCY / train_gpt.flops_per_token(config, plan)
            for plan in train_gpt.depth_plans(config)}


def expected_steps(config: Config, rates: Mapping[str, float]) -> float:
    """Optimizer steps within the training budget; each moment counts with its own depth plan."""
    import train_gpt

    if not config.max_wallclock_seconds:
        return float(config.iterations)
    seconds = config.max_wallclock_seconds - config.gptq_reserve_seconds
    moments = [rates[train_gpt.plan_at(config, (place + 0.5) / 100).name] for place in range(100)]
    steps = seconds * statistics.fmean(moments) / config.train_batch_tokens
    return min(float(config.iterations), steps)


def say_steps(config: Config, rates: Mapping[str, float]) -> str:
    """Steps and rates in words."""
    plans = ", ".join(f"{rate / 1e6:.2f} M tok/s {name}" for name, rate in rates.items())
    budget = f"in {config.max_wallclock_seconds:g} s" if config.max_wallclock_seconds else "in all"
    return f"about {expected_steps(config, rates):,.0f} steps {budget} ({plans})"


def check_speed(pod: Pod, config: Config) -> Iterator[Check]:
    """The GPUs are equally fast, stay fast when hot and reach each other; steps to expect."""
    if pod.device.type != "cuda" or not pod.bench_seconds:
        yield ok("speed", "skipped: " + ("--quick" if pod.device.type == "cuda" else "no GPU"))
        return
    try:
        speeds = run_bench(pod.processes, pod.bench_seconds)
    except Exception as error:    # whatever breaks in here would break a run
        last = (str(error).strip() or "no message").splitlines()[-1]
        yield fail("speed", f"{type(error).__name__}: {last}",
                   "NCCL_DEBUG=INFO python tools/doctor.py    # then take another pod")
        return
    yield from judge_speed(config, speeds)


def judge_speed(config: Config, speeds: Sequence[RankSpeed]) -> Iterator[Check]:
    """Findings from what the ranks measured."""
    settled = [statistics.median(speed.tflops[len(speed.tflops) // 2:]) for speed in speeds]
    early = [statistics.median(speed.tflops[:max(1, len(speed.tflops) // 4)]) for speed in speeds]
    slowest, fastest = min(settled), max(settled)
    detail = (f"{slowest:.0f} TFLOP/s per GPU, memory {min(s.copy_gb_s for s in speeds):.0f} GB/s, "
              f"upload {min(s.upload_gb_s for s in speeds):.0f} GB/s")
    if len(speeds) > 1:
        detail += f", all-reduce {min(s.all_reduce_gb_s for s in speeds):.0f} GB/s"
    lost = max(1 - late / before for late, before in zip(settled, early, strict=True))
    if slowest < 0.95 * fastest:
        gap = f"GPU {settled.index(slowest)} is {1 - slowest / fastest:.0%} slower than the fastest"
        yield warn("speed", f"{detail}; {gap}, and every step waits for it", "take another pod")
    elif lost > 0.05:
        yield warn("speed", f"{detail}; {lost:.0%} slower once hot", EXPLAIN_CLOCKS)
    else:
        yield ok("speed", detail)
    yield ok("expected", say_steps(config, rates_at(config, slowest * len(speeds))))


# ----------------------------------------------------------------------------------------------
# What the run takes on eight GPUs, by the runs that there are
# ----------------------------------------------------------------------------------------------
class Projection(NamedTuple):
    """What a run takes on eight GPUs, from the measurements of earlier ones."""

    speed: Run                    # that its rates and times come from
    rates: dict[str, float]       # tokens per second by depth plan, on eight GPUs
    startup_seconds: float
    training_seconds: float
    artifact_seconds: float       # from the end of training to the file
    evaluation: Run | None        # that the next figure comes from; None if none was logged
    evaluation_seconds: float

    @property
    def seconds(self) -> float:
        """From start to score."""
        parts = (self.startup_seconds, self.training_seconds, self.artifact_seconds)
        return sum(parts) + self.evaluation_seconds


def runs_on_gpus(config: Config, logs: Path) -> list[Run]:
    """Complete runs of this model on GPUs, newest first."""
    import train_gpt

    # What a log older than a setting has for it.
    found, default = [], train_gpt.Config.from_env({"PRESET": "pr1493"})
    for path in logs.glob("*.json"):
        with contextlib.suppress(RunError):
            run = read_result(path)
            logged = {name: run.get(f"config.{name}") for name in train_gpt.MODEL_SETTINGS}
            same = all((getattr(default, name) if value is None else value)
                       == getattr(config, name) for name, value in logged.items())
            if same and run.text("status") == "complete" and run.number("hardware.gpus"):
                found.append(run)
    return sorted(found, key=lambda run: run.text("started") or "", reverse=True)


def last_evaluations(config: Config) -> list[str]:
    """Keys of the evaluations beyond that of the fixed model; the last one is the headline."""
    return [f"ttt_{config.ttt_mode}"] * config.ttt_enabled + ["mixer"] * (config.mixer == "legal")


def project(config: Config, logs: Path = REPOSITORY / "logs") -> Projection | None:
    """What a run takes on eight GPUs; None without a logged run of this model on a GPU."""
    import train_gpt

    plans, runs = train_gpt.depth_plans(config), runs_on_gpus(config, logs)
    names = last_evaluations(config)
    measured = [run for run in runs if all(run.number(f"train.tok_s_by_plan.{plan.name}")
                                           for plan in plans)]
    scored = [run for run in runs if run.number("clocks.projected_full_eval_seconds_8gpu")
              and names[-1:] in ([run.headline], []) and all(run.number(f"bpb.{n}") for n in names)]
    if not measured:
        return None
    run = measured[0]
    scale = RECORD_RANKS / (run.number("hardware.gpus") or 1)
    rates = {plan.name: scale * (run.number(f"train.tok_s_by_plan.{plan.name}") or 0)
             for plan in plans}
    trained = run.number("clocks.training_seconds") or 0
    seconds = config.max_wallclock_seconds
    if not seconds:
        seconds = config.iterations * config.train_batch_tokens / min(rates.values())
    full = scored[0].number("clocks.projected_full_eval_seconds_8gpu") if scored else None
    return Projection(run, rates, run.number("train.startup_seconds") or 0, seconds,
                      (run.number("clocks.train_to_artifact_seconds") or trained) - trained,
                      scored[0] if scored else None, full or 0)


def launch_command(config: Config, ranks: int) -> str:
    """The command that starts this run, with every setting that is unlike the preset's."""
    settings = {"preset": config.preset} | config.differs()
    words = [f"{name.upper()}={shlex.quote(str(int(v) if isinstance(v, bool) else v))}"
             for name, v in settings.items()]
    return " ".join([*words, TORCHRUN.format(ranks)])


def dollars(seconds: float) -> str:
    """Price of a pod of eight GPUs for some seconds."""
    return f"${seconds / 3600 * POD_DOLLARS_PER_HOUR:.2f}"


def check_projection(pod: Pod, config: Config) -> Iterator[Check]:
    """How to start the run on eight GPUs, and what to expect there."""
    yield ok(f"on {RECORD_RANKS} GPUs", launch_command(config, RECORD_RANKS))
    found = project(config)
    if found is None:
        yield ok("projected", "unknown: no run of this model on a GPU lies in logs/")
        return
    gpu = found.speed.text("hardware.gpu")
    yield ok("projected", f"{say_steps(config, found.rates)} on {RECORD_RANKS} x {gpu}, "
             f"by {found.speed.run_id}")
    score = f"evaluation of the official text {found.evaluation_seconds:.0f} s"
    if found.evaluation is None:
        names = " and ".join(last_evaluations(config)) or "an evaluation"
        score = f"evaluation unknown: no logged run ends with {names}"
    yield ok("projected time", f"start {found.startup_seconds:.0f} s, training "
             f"{found.training_seconds:.0f} s, artifact {found.artifact_seconds:.0f} s, {score}: "
             f"{found.seconds / 60:.0f} minutes, {dollars(found.seconds)} at "
             f"${POD_DOLLARS_PER_HOUR:g} an hour")


# ----------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------
CheckFunction = Callable[[Pod], Iterator[Check]]
ConfigCheckFunction = Callable[[Pod, "Config"], Iterator[Check]]

# The first group needs nothing but Python, the second accepted settings. What others do on the GPUs
# is asked before this program takes memory there.
BEFORE_TORCH: tuple[CheckFunction, ...] = (
    check_python, check_processes, check_clocks, check_torch, check_packages)
WITH_CONFIG: tuple[ConfigCheckFunction, ...] = (
    check_gpus, check_ranks, check_brotli, check_compiler, check_tokenizer, check_train_shards,
    check_val_stream, check_disk, check_memory, check_port, check_caches, check_artifact,
    check_gpu_memory, check_attention, check_speed, check_projection)


def run_check(check: Callable[..., Iterator[Check]], *arguments: object) -> list[Check]:
    """What a check found; an error inside it is a finding too."""
    found: list[Check] = []
    try:
        found.extend(check(*arguments))
    except Exception as error:    # dying of one symptom would hide the others
        text = (str(error).strip() or "no message").splitlines()[0]
        name = check.__name__.removeprefix("check_").replace("_", " ")
        found.append(fail(name, f"{type(error).__name__}: {text}", ""))
    return found


def examine(pod: Pod) -> Iterator[Check]:
    """All findings, in order, as they are made."""
    pod.smi = ask_smi([f"--query-gpu={','.join(SMI_FIELDS)}"], SMI_FIELDS)
    failed = set()
    for check in BEFORE_TORCH:
        for found in run_check(check, pod):
            failed |= {found.name} if found.status == "fail" else set()
            yield found
    if failed & {"python", "torch", "numpy"}:
        return
    yield from run_check(check_config, pod)
    for config_check in WITH_CONFIG if pod.config is not None else ():
        yield from run_check(config_check, pod, pod.config)


def render(check: Check) -> str:
    """One finding as text, what to type below it."""
    line = f"{check.status:<5} {check.name:<22} {check.detail}"
    return line + (f"\n{'':<29}-> {check.fix}" if check.fix else "")


def verdict(checks: Sequence[Check]) -> str:
    """The last line."""
    failed = [check.name for check in checks if check.status == "fail"]
    warned = [check.name for check in checks if check.status == "warn"]
    tail = f"; look at: {', '.join(warned)}" if warned else ""
    return f"a run would FAIL: {', '.join(failed)}{tail}" if failed else f"ready{tail}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--nproc", type=int, default=0, choices=(0, *WORLD_SIZES), metavar="N",
                        help="ranks that the run will have; default: as many as GPUs")
    parser.add_argument("--bench-seconds", type=float, default=30.0,
                        help="length of the speed check (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="no speed check")
    parser.add_argument("--json", action="store_true", help="findings as one JSON object")
    return parser


def main(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Exit status: 1 when a run would fail."""
    options = build_parser().parse_args(arguments)
    pod = Pod(env, options.nproc, 0.0 if options.quick else options.bench_seconds)
    checks = []
    for check in examine(pod):
        checks.append(check)
        if not options.json:
            print(render(check), flush=True)
    failed = any(check.status == "fail" for check in checks)
    if options.json:
        report = {"ready": not failed, "verdict": verdict(checks),
                  "checks": [check._asdict() for check in checks]}
        print(json.dumps(report, indent=1))
    else:
        print(f"\n{verdict(checks)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
