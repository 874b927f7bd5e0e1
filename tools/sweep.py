#!/usr/bin/env python3
"""Runs train_gpt.py over seeds and settings; a ledger sees to it that nothing is paid for twice.

    python tools/sweep.py --seeds 42,314,999                       one after another, all GPUs each
    python tools/sweep.py --seeds 42,314 --set MATRIX_LR=.022,.026 --nproc 1       one run per GPU
    python tools/sweep.py --out runs/sweeps/lr --seeds 42 --detach       survives a lost connection
    python tools/sweep.py --out runs/sweeps/lr --status               what is done and what is left
    AUDIT=1 python tools/sweep.py --packed --seeds 42,314,999 --out runs/sweeps/mine    for a record

Every combination of seeds and settings becomes one run in its own folder `<out>/<label>/`.
`<out>/ledger.jsonl` gets the plan, one line when a run starts and one when it ends; repeating the
command skips what is complete and runs the rest. Every setting is passed to the child by name and
read back from its log and result: a run that did not use what it was given is stopped and reported,
never averaged. `--reference` ends runs that fall behind a finished run's loss at the same step.
`--packed` runs the packed program, the one whose bytes count; `record.py make` takes the folder.

Exit status: 0 all runs complete or stopped early, 1 a run failed, 2 bad arguments, 3 a setting did
not take effect, 130 interrupted.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tools.runs import as_number

OURS = REPOSITORY / "train_gpt.py"
RESERVED = ("RUN_ID", "LOG_DIR", "RUN_DIR")  # the sweep chooses these so that runs cannot collide
WORLD_SIZES = (8, 6, 4, 3, 2, 1)  # what train_gpt.py accepts, largest first
SETTLED = ("complete", "stopped")  # states that a repeated command does not run again
KILL_AFTER_SECONDS = 45.0  # between the polite signal and the other one


class SweepError(Exception):
    """Arguments or a folder that the sweep cannot work with."""


# ----------------------------------------------------------------------------------------------
# The plan: which runs
# ----------------------------------------------------------------------------------------------
class Run(NamedTuple):
    """One training run: its folder name, what is passed to it, and a hash of the latter."""

    label: str
    settings: dict[str, str]
    key: str


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Variable name and its values from `NAME=a,b`.

    With a semicolon anywhere, only semicolons separate values. Seeds lose leading zeros.
    Example: LOOP_LAYERS=3,4;4,5 -> ("LOOP_LAYERS", ["3,4", "4,5"])
    Raises: SweepError for anything else.
    """
    name, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        raise SweepError(f"--set {text}: expected NAME=value[,value...] with NAME in capitals")
    parts = [part.strip() for part in values.split(";" if ";" in values else ",")]
    if ";" in values:
        parts = [part for part in parts if part]
    if name == "SEED":
        parts = [str(int(part)) if re.fullmatch(r"\d+", part) else part for part in parts]
    if name in RESERVED:
        raise SweepError(f"--set {name}: the sweep chooses {name} itself, one per run")
    if not parts or "" in parts or len(set(parts)) != len(parts):
        raise SweepError(f"--set {text}: values must be non-empty and distinct")
    return name, parts


def parse_axes(seeds: str | None, assignments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """All axes, seeds first, so that every setting is seen once before any seed is repeated.

    Raises: SweepError when a variable is given twice or a seed is not a whole number.
    """
    axes = [parse_axis(f"SEED={seeds}")] if seeds else []
    axes += [parse_axis(assignment) for assignment in assignments]
    names = [name for name, _ in axes]
    for name in names:
        if names.count(name) > 1:
            raise SweepError(f"{name} is given twice; list its values in one place: {name}=a,b")
    for value in dict(axes).get("SEED", []):
        if not re.fullmatch(r"\d+", value):
            raise SweepError(f"SEED={value}: a whole number is needed")
    return axes


def plan_runs(axes: Sequence[tuple[str, list[str]]], ambient: Mapping[str, str]) -> list[Run]:
    """Every combination of the axes on top of the settings that the shell already carries.

    The label names the axes and nothing else, so that a folder listing reads as a table.
    """
    names = [name for name, _ in axes]
    runs = []
    for combination in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(names, combination, strict=True))
        settings = dict(sorted({**ambient, **chosen}.items()))
        words = [f"{name.lower()}{chosen[name]}" for name in names if name != "SEED"]
        words += [f"seed{chosen['SEED']}"] if "SEED" in chosen else []
        label = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))[:120] or "run"
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        runs.append(Run(label, settings, key))
    return runs


def setting_names() -> set[str]:
    """Every environment variable that train_gpt.py knows as a setting."""
    import train_gpt

    return {name.upper() for name in train_gpt.Config.__dataclass_fields__}


def check_settings(runs: Sequence[Run]) -> None:
    """Nothing, when train_gpt.py knows and accepts each run's settings and no two runs are equal.

    Raises: SweepError, where it can with train_gpt's own message, before anything is started.
    """
    import train_gpt

    labels: dict[train_gpt.Config, str] = {}
    for run in runs:
        try:
            config = train_gpt.Config.from_env({**os.environ, **run.settings})
        except train_gpt.GolfError as error:
            raise SweepError(f"{run.label}: {error}") from error
        if unknown := sorted(run.settings.keys() - setting_names()):
            raise SweepError(f"{run.label}: {unknown[0]} is no setting of {OURS.name}")
        if config in labels:
            raise SweepError(f"{run.label}: the same settings as {labels[config]}")
        labels[config] = run.label


# ----------------------------------------------------------------------------------------------
# The machine: who runs where
# ----------------------------------------------------------------------------------------------
def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """Indices (or UUIDs) of the GPUs that a child would see; empty without any."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return [name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return listing.stdout.split() if listing.returncode == 0 else []


def gpu_slots(gpus: Sequence[str], processes: int) -> list[str | None]:
    """One CUDA_VISIBLE_DEVICES per run that can go on at the same time; None without GPUs.

    Example: 8 GPUs, 2 processes a run -> ["0,1", "2,3", "4,5", "6,7"]
    Raises: SweepError when one run needs more GPUs than there are.
    """
    if not gpus:
        return [None]
    if processes > len(gpus):
        raise SweepError(f"--nproc {processes}: only {len(gpus)} GPUs ({','.join(gpus)})")
    firsts = range(0, len(gpus) - processes + 1, processes)
    return [",".join(gpus[first:first + processes]) for first in firsts]


def launch_command(trainer: Path, processes: int) -> list[str]:
    """The command of one run; torchrun picks a free port itself, so that neighbours do not meet."""
    if processes == 1:
        return [sys.executable, "-u", str(trainer)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={processes}", str(trainer)]


# ----------------------------------------------------------------------------------------------
# What a run says: events, result, whether its settings took effect
# ----------------------------------------------------------------------------------------------
Event = dict[str, object]


class EventTail:
    """Reads the events added to a JSON-lines file since the last call.

    An unfinished last line waits for its end.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def read(self) -> list[Event]:
        """New complete events, oldest first; lines that are not JSON objects are passed over."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            block = file.read()
        end = block.rfind(b"\n") + 1
        self.position += end
        events = map(parse_event, block[:end].splitlines())
        return [event for event in events if event is not None]


def parse_event(line: bytes) -> Event | None:
    """The JSON object on a line, or None."""
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    return None


def took_effect(asked: str, actual: object) -> bool:
    """Whether the text of a variable and the value in a run's configuration say the same."""
    if isinstance(actual, bool):
        return asked == str(int(actual))
    if isinstance(actual, (int, float)):
        with contextlib.suppress(ValueError):
            return math.isclose(float(asked), float(actual), rel_tol=1e-9)
        return False
    if isinstance(actual, (list, tuple)):
        parts = [part for part in re.split(r"[,\s]+", asked) if part]
        return len(parts) == len(actual) and all(map(took_effect, parts, actual))
    if actual is None:
        return asked in ("", "none", "None")
    return asked == str(actual) or Path(asked) == Path(str(actual))


def unlike(config: object, settings: Mapping[str, str]) -> list[str]:
    """What a run's recorded configuration has otherwise than it was told, one text per variable."""
    if not isinstance(config, dict):
        return ["the result holds no configuration to compare with"]
    wrong = []
    for name, asked in settings.items():
        if name.lower() not in config:
            wrong.append(f"{name}={asked} is not a setting of the program")
        elif not took_effect(asked, config[name.lower()]):
            wrong.append(f"{name}={asked} was asked for, {config[name.lower()]!r} was used")
    return wrong


def read_result(path: Path) -> Event:
    """The result file of a run; empty when there is none or it cannot be parsed."""
    return (parse_event(path.read_bytes()) or {}) if path.exists() else {}


# ----------------------------------------------------------------------------------------------
# Early stop: losses in nats at matched steps
# ----------------------------------------------------------------------------------------------
class Curve:
    """Training and validation losses of one run by step."""

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[float, float]]] = {}

    def add(self, event: Event) -> None:
        """Takes the loss out of a `train` or `val` event; other events are passed over."""
        if event.get("event") not in ("train", "val"):
            return
        kind = "train" if event["event"] == "train" else f"val {event.get('label', '')}".strip()
        step = as_number(event.get("step"))
        loss = event.get("train_loss" if kind == "train" else "val_loss")
        # `as_number` would drop the losses of a run that diverged, and they are why it should end.
        if step is not None and isinstance(loss, int | float):
            self.points.setdefault(kind, []).append((step, float(loss)))

    def at(self, kind: str, step: float) -> float | None:
        """Loss at a step, on the line between its two neighbours; None outside the curve."""
        points = self.points.get(kind, [])
        place = bisect.bisect_left(points, (step, -math.inf))
        if place < len(points) and points[place][0] == step:
            return points[place][1]
        if place in (0, len(points)):
            return None
        (step_a, loss_a), (step_b, loss_b) = points[place - 1], points[place]
        return loss_a + (loss_b - loss_a) * (step - step_a) / (step_b - step_a)

    def last_step(self) -> float:
        """The largest step of the curve; 0 when it is empty."""
        return max((points[-1][0] for points in self.points.values()), default=0.0)


class Patience(NamedTuple):
    """When a run is hopeless: its mean excess at matched steps is above `tolerance` nats."""

    reference: Curve
    tolerance: float
    window: int
    after_step: float


def hopeless(curve: Curve, patience: Patience) -> str | None:
    """Why a run should end, or None.

    Training losses are noisy, so the mean over the last `window` matched points counts. A
    validation loss counts alone: it is a mean over the same targets every time.
    """
    for kind, points in curve.points.items():
        if not math.isfinite(points[-1][1]):
            return f"{kind} loss is {points[-1][1]} at step {points[-1][0]:.0f}"
        window = patience.window if kind == "train" else 1
        recent = [point for point in points[-window:] if point[0] >= patience.after_step]
        before = [(loss, patience.reference.at(kind, step)) for step, loss in recent]
        gaps = [loss - reference for loss, reference in before if reference is not None]
        if len(gaps) == window and statistics.fmean(gaps) > patience.tolerance:
            return (f"{kind} loss is {statistics.fmean(gaps):.4f} nats above the reference at step "
                    f"{recent[-1][0]:.0f}, tolerance {patience.tolerance}")
    return None


def load_curve(path: Path) -> Curve:
    """The loss curve in an event file.

    Raises: SweepError when the file is missing or holds no loss.
    """
    if not path.is_file():
        raise SweepError(f"--reference {path}: no such file")
    curve = Curve()
    for event in EventTail(path).read():
        curve.add(event)
    if not curve.points:
        raise SweepError(f"--reference {path}: holds no train or val event with a step and a loss")
    return curve


# ----------------------------------------------------------------------------------------------
# The ledger
# ----------------------------------------------------------------------------------------------
def is_whole(row: Event) -> bool:
    """Whether a row of a ledger holds what the ledger reads from it."""
    seeds = row.get("seeds")
    if row.get("event") == "plan":
        return isinstance(seeds, list) and all(re.fullmatch(r"\d+", str(seed)) for seed in seeds)
    complete = ["result"] if row.get("status") == "complete" else []
    needed = {"start": ["key", "label"], "end": ["key", "status", *complete]}
    return all(isinstance(row.get(name), str) for name in needed.get(str(row.get("event")), []))


class Ledger:
    """`ledger.jsonl`: one line per start and per end of a run, synced to disk at once.

    Damaged rows are passed over and counted on stderr.
    """

    def __init__(self, path: Path) -> None:
        rows = EventTail(path).read()
        self.path, self.rows = path, [row for row in rows if is_whole(row)]
        if damaged := len(rows) - len(self.rows):
            print(f"{path}: {damaged} damaged row(s) passed over", file=sys.stderr)
        # A line that a crash cut short gets its newline, so that the next one stays readable.
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")

    def add(self, **row: object) -> None:
        """Appends one line with the time."""
        row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **row}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempts(self, key: str) -> int:
        """How often a run was started."""
        return sum(row.get("key") == key and row.get("event") == "start" for row in self.rows)

    def distinct(self, plan: Sequence[Run]) -> list[Run]:
        """The plan, where labels that stand for several settings, here or before, get the key."""
        keys: dict[str, set[str]] = {}
        for row in self.rows:
            keys.setdefault(str(row.get("label")), set()).add(str(row.get("key")))
        for run in plan:
            keys.setdefault(run.label, set()).add(run.key)
        return [run if len(keys[run.label]) == 1 else
                run._replace(label=f"{run.label}-{run.key[:6]}") for run in plan]

    def last_end(self, key: str) -> Event | None:
        """The last recorded end of a run."""
        ends = [row for row in self.rows if row.get("key") == key and row.get("event") == "end"]
        return ends[-1] if ends else None

    def announce(self, plan: Sequence[Run]) -> None:
        """Writes down the seeds of a plan, unless they are there: none can be dropped later."""
        seeds = {run.settings["SEED"]: None for run in plan if "SEED" in run.settings}
        if not {int(seed) for seed in seeds} <= set(self.seeds()):
            self.add(event="plan", seeds=list(seeds))

    def seeds(self) -> list[int]:
        """Seeds of all runs that were ever planned, run or not."""
        plans = [row["seeds"] for row in self.rows if row.get("event") == "plan"]
        lists = [seeds for seeds in plans if isinstance(seeds, list)]
        return list(dict.fromkeys(int(seed) for seeds in lists for seed in seeds))

    def results(self) -> list[Path]:
        """Result files of the runs that are complete, in the order of their ends."""
        keys = dict.fromkeys(str(row["key"]) for row in self.rows if "key" in row)
        ends = map(self.last_end, keys)
        return [self.path.parent / str(end["result"]) for end in ends
                if end is not None and end.get("status") == "complete"]

    def is_settled(self, run: Run) -> bool:
        """Whether a run was stopped early, or is complete with its result still there."""
        row = self.last_end(run.key)
        if row is None or row.get("status") not in SETTLED:
            return False
        return row["status"] != "complete" or (self.path.parent / str(row.get("result"))).is_file()

    def check_trainer(self, digest: str) -> None:
        """Raises: SweepError when earlier runs of this ledger came from another source."""
        seen = {str(row["trainer_sha256"]) for row in self.rows if "trainer_sha256" in row}
        if seen - {digest}:
            raise SweepError(
                f"{self.path}: earlier runs used another trainer (sha256 {min(seen)[:12]}, now "
                f"{digest[:12]}); results would not compare, so give a new --out")


# ----------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------
class Settings(NamedTuple):
    """How the sweep runs, from the command line."""

    out: Path
    trainer: Path
    processes: int
    slots: list[str | None]
    patience: Patience | None
    run_timeout: float  # seconds, 0 for none
    max_failures: int
    poll_seconds: float
    report_seconds: float
    packed: bool  # the trainer is written when runs start

    @property
    def ours(self) -> bool:
        """Whether our program is the trainer, packed or not."""
        return self.packed or self.trainer == OURS


@dataclass
class Active:
    """A run in progress."""

    run: Run
    run_id: str
    folder: Path
    slot: str | None
    process: subprocess.Popen[bytes]
    tail: EventTail
    console: IO[bytes]
    started: float = field(default_factory=time.monotonic)
    curve: Curve = field(default_factory=Curve)
    last_train: Event = field(default_factory=dict)
    stage: str = "starting"
    promised: float | None = None  # seconds in all, by the share of training that is done
    verdict: tuple[str, str] | None = None  # status and reason when the sweep itself ended the run

    @property
    def seconds(self) -> float:
        """Time since the start, in seconds."""
        return time.monotonic() - self.started

    @property
    def result_path(self) -> Path:
        """Where the run writes its result."""
        return self.folder / "logs" / f"{self.run_id}.json"


def start_run(run: Run, attempt: int, slot: str | None, settings: Settings,
              lock: IO[str]) -> Active:
    """The run, started in its own process group with every setting in its environment.

    The child inherits the lock: a sweep killed without notice leaves it held until its runs end.
    """
    folder = settings.out / run.label
    run_id = f"{settings.out.name}-{run.label}" + (f"-{attempt}" if attempt > 1 else "")
    folder.mkdir(parents=True, exist_ok=True)
    forced = {"RUN_ID": run_id, "LOG_DIR": str(folder / "logs"), "RUN_DIR": str(folder / "runs")}
    env = {**os.environ, **run.settings, **forced}
    if slot is not None:
        env["CUDA_VISIBLE_DEVICES"] = slot
    console = (folder / f"{run_id}.console.txt").open("wb")
    process = subprocess.Popen(
        launch_command(settings.trainer, settings.processes), env=env, stdin=subprocess.DEVNULL,
        stdout=console, stderr=subprocess.STDOUT, start_new_session=True,
        pass_fds=(lock.fileno(),))
    tail = EventTail(folder / "logs" / f"{run_id}.jsonl")
    return Active(run, run_id, folder, slot, process, tail, console)


def send(active: Active, sign: signal.Signals) -> None:
    """Signals a run and what it started, if any of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(active.process.pid, sign)


def end_processes(active: Active) -> None:
    """Ends a run and everything that it started, politely first."""
    for sign, patience in ((signal.SIGTERM, KILL_AFTER_SECONDS), (signal.SIGKILL, 5.0)):
        send(active, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            active.process.wait(patience)
            return


def read_events(active: Active) -> None:
    """Takes in what the run has written."""
    for event in active.tail.read():
        take_event(active, event)


def take_event(active: Active, event: Event) -> None:
    """Takes in one event; a setting that did not take effect is the verdict."""
    active.curve.add(event)
    kind, score = event.get("event"), as_number(event.get("val_bpb"))
    if kind == "train":
        active.last_train = event
        share, loss = as_number(event.get("progress")), as_number(event.get("train_loss"))
        active.promised = active.seconds / share if share else None
        words = [f"step {event.get('step')}", "" if loss is None else f"loss {loss:.4f}",
                 "" if share is None else f"{share:.0%}"]
        active.stage = " ".join(filter(None, words))
    elif kind in ("artifact", "eval"):    # training no longer tells how long the rest takes
        active.stage = f"{event.get('label')} {score:.4f} BPB" if score else "artifact written"
        active.promised = None
    elif kind == "start" and "config" in event:
        wrong = unlike(event["config"], active.run.settings)
        if wrong:
            active.verdict = ("mismatch", "; ".join(wrong))


def should_end(active: Active, settings: Settings) -> tuple[str, str] | None:
    """Status and reason when a run that goes on should not."""
    reason = hopeless(active.curve, settings.patience) if settings.patience is not None else None
    if reason:
        return "stopped", reason
    if 0 < settings.run_timeout < active.seconds:
        return "failed", f"ran past --run-timeout {settings.run_timeout:g} s"
    return None


def last_words(path: Path) -> str:
    """The last line that a run printed, which for a failed one is its error."""
    lines = path.read_bytes()[-4000:].decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")


def judge(active: Active, settings: Settings) -> Event:
    """The ledger's line for a run whose process has ended."""
    result = read_result(active.result_path)
    code = active.process.returncode
    words = last_words(Path(active.console.name))
    status, reason = active.verdict or ("failed", f"exit {code}: {words}")
    if active.verdict is None and result:
        wrong = unlike(result.get("config"), active.run.settings)
        if result.get("world_size", settings.processes) != settings.processes:
            wrong.append(f"{settings.processes} processes were asked for, the run had "
                         f"{result['world_size']}")
        if wrong:
            status, reason = "mismatch", "; ".join(wrong)
        elif result.get("status") == "complete":
            # A budget crossed at the very end leaves a whole result and a non-zero exit: the score
            # is there and is not run again.
            status, reason = "complete", ""
            if code != 0:
                reason = f"exit {code}: {result.get('exit_reason', '')}"
        elif result.get("exit_reason"):
            reason = f"exit {code}: {result['exit_reason']}"
    train = result.get("train")
    artifact = result.get("artifact")
    return {
        "event": "end", "key": active.run.key, "label": active.run.label, "run_id": active.run_id,
        "status": status, "reason": reason, "exit_code": code, "seconds": round(active.seconds, 1),
        "steps": train.get("steps") if isinstance(train, dict) else active.last_train.get("step"),
        "headline": result.get("headline"), "val_bpb": result.get("val_bpb"),
        "val_loss": result.get("val_loss"),
        "total_bytes": artifact.get("total_bytes") if isinstance(artifact, dict) else None,
        "result": str(active.result_path.relative_to(settings.out)) if result else None,
    }


class Sweep:
    """Runs a plan over the slots of this machine."""

    def __init__(self, plan: list[Run], settings: Settings, ledger: Ledger, lock: IO[str]) -> None:
        self.settings, self.ledger, self.lock = settings, ledger, lock
        self.plan = ledger.distinct(plan)
        self.pending = [run for run in self.plan if not ledger.is_settled(run)]
        self.active: list[Active] = []
        self.durations: list[float] = []
        self.failures = 0
        self.mismatched = False
        self.reported = 0.0
        self.digest = hashlib.sha256(settings.trainer.read_bytes()).hexdigest()

    def execute(self) -> int:
        """Exit status after all runs have ended."""
        skipped = len(self.plan) - len(self.pending)
        say(f"{len(self.plan)} runs, {skipped} already settled, {len(self.settings.slots)} at a "
            f"time, in {self.settings.out}")
        try:
            while self.pending or self.active:
                self.fill_slots()
                self.poll()
                self.report()
                if self.active:
                    time.sleep(self.settings.poll_seconds)
        except KeyboardInterrupt:
            for active in self.active:
                send(active, signal.SIGTERM)       # to all at once, so that they end together
            for active in self.active:
                active.verdict = ("interrupted", "the sweep was interrupted")
                self.finish(active)
            say("interrupted; the same command continues")
            return 130
        return 3 if self.mismatched else 1 if self.failures else 0

    def fill_slots(self) -> None:
        """Starts pending runs on free slots."""
        busy = Counter(active.slot for active in self.active)
        free = Counter(self.settings.slots) - busy  # a GPU is there as often as it was named
        for slot in list(free.elements())[:len(self.pending)]:
            run = self.pending.pop(0)
            attempt = self.ledger.attempts(run.key) + 1
            active = start_run(run, attempt, slot, self.settings, self.lock)
            self.active.append(active)
            self.ledger.add(
                event="start", key=run.key, label=run.label, run_id=active.run_id, attempt=attempt,
                settings=run.settings, gpus=slot, processes=self.settings.processes,
                pid=active.process.pid, trainer_sha256=self.digest)
            where = f" on GPU {slot}" if slot is not None else ""
            say(f"start {run.label}{where} (process {active.process.pid})")

    def poll(self) -> None:
        """Looks at every active run once and finishes those that ended or should."""
        for active in list(self.active):
            ended = active.process.poll() is not None
            read_events(active)                    # after poll(), so that the last ones are read
            if not ended and active.verdict is None:
                active.verdict = should_end(active, self.settings)
            if ended or active.verdict is not None:
                self.finish(active)
                self.active.remove(active)

    def finish(self, active: Active) -> None:
        """Ends the run's processes if any are left and writes its end into the ledger."""
        end_processes(active)
        active.console.close()
        row = judge(active, self.settings)
        self.ledger.add(**row)
        score = f" val_bpb {row['val_bpb']:.5f}" if isinstance(row["val_bpb"], float) else ""
        because = f": {row['reason']}" if row["reason"] else ""
        say(f"{row['status']} {row['label']}{score} {row['seconds']} s{because}")
        if row["status"] == "complete":
            self.durations.append(active.seconds)
        elif row["status"] in ("failed", "mismatch"):
            self.failures += 1
            self.mismatched |= row["status"] == "mismatch"
            if self.mismatched or self.failures >= self.settings.max_failures:
                say(f"no further run is started: {self.failures} failed, {len(self.pending)} left "
                    "for the next try")
                self.pending.clear()

    def report(self) -> None:
        """Prints progress and the time left: in place on a terminal, else now and then."""
        interval = 1.0 if sys.stdout.isatty() else self.settings.report_seconds
        if not self.active or time.monotonic() - self.reported < interval:
            return
        self.reported = time.monotonic()
        slots = len(self.settings.slots)
        text = progress_line(self.active, self.durations, len(self.pending), slots)
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", flush=True)
        else:
            say(text)


def progress_line(active: Sequence[Active], durations: Sequence[float], pending: int,
                  slots: int) -> str:
    """Where each active run is and when the sweep should end.

    A run's length is the mean of the finished ones, before that what the fastest one promises.
    """
    parts = [f"{run.run.label} {run.stage}" for run in active]
    promised = [run.promised for run in active if run.promised is not None]
    length = statistics.fmean(durations) if durations else min(promised, default=None)
    if length is None:
        return " | ".join([*parts, f"{pending} waiting"])
    seconds = (sum(max(0.0, length - run.seconds) for run in active) + pending * length) / slots
    ends = datetime.now().astimezone().timestamp() + seconds
    clock = datetime.fromtimestamp(ends).strftime("%H:%M")
    left = f"about {format_seconds(seconds)} left, until {clock}"
    return " | ".join([*parts, f"{pending} waiting", left])


def format_seconds(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}m{rest:02d}"


def say(text: str) -> None:
    """Prints one line with the time of day, over a progress line if one stands there."""
    lead = "\r\x1b[K" if sys.stdout.isatty() else ""
    print(f"{lead}{datetime.now():%H:%M:%S} {text}", flush=True)


# ----------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------
def table(ledger: Ledger) -> str:
    """State of every run in the ledger, best first, then mean and standard deviation over seeds."""
    starts = {row["key"]: row for row in ledger.rows if row.get("event") == "start"}
    rows = []
    for key, start in starts.items():
        end = ledger.last_end(str(key))
        open_again = end is not None and end.get("run_id") != start.get("run_id")
        lost: Event = {"status": "running or lost"}
        rows.append((start, lost if end is None or open_again else end))
    rows.sort(key=lambda pair: (as_number(pair[1].get("val_bpb")) or math.inf,
                                str(pair[0]["label"])))
    lines = [f"{'run':<44} {'status':<16} {'val_bpb':>9} {'steps':>7} {'bytes':>11} {'seconds':>8}"]
    groups: dict[str, list[float]] = {}
    for start, end in rows:
        score = as_number(end.get("val_bpb"))
        lines.append(
            f"{start['label']!s:<44} {end['status']!s:<16} {f'{score:.5f}' if score else '-':>9} "
            f"{end.get('steps') or '-'!s:>7} {end.get('total_bytes') or '-'!s:>11} "
            f"{end.get('seconds') or '-'!s:>8}"
        )
        if score is not None and end["status"] == "complete":
            group = re.sub(r"-?seed\d+$", "", str(start["label"])) or "all seeds"
            groups.setdefault(group, []).append(score)
    for name, scores in sorted(groups.items(), key=lambda pair: statistics.fmean(pair[1])):
        if len(scores) > 1:
            lines.append(f"{name}: mean {statistics.fmean(scores):.5f}, standard deviation "
                         f"{statistics.stdev(scores):.5f}, n {len(scores)}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------
OPTIONS: dict[str, dict[str, object]] = {
    "--seeds": {"help": "comma-separated seeds, e.g. 42,314,999"},
    "--set": {"action": "append", "default": [], "metavar": "NAME=A,B", "dest": "assignments",
              "help": "values of a setting; repeat it for more settings, every combination runs; "
                      "separate with semicolons where values hold commas"},
    "--out": {"type": Path, "default": Path("runs/sweeps/default"), "help": "folder of this sweep"},
    "--nproc": {"type": int, "help": "processes, and GPUs, per run; default: as many as GPUs"},
    "--gpus": {"default": "all", "help": "e.g. 0,1,2,3; with --nproc 1 each takes its own run"},
    "--reference": {"type": Path, "help": "events (.jsonl) of a run to compare with"},
    "--tolerance": {"type": float, "default": 0.02,
                    "help": "nats above the reference that end a run"},
    "--window": {"type": int, "default": 5, "help": "training losses that are averaged for that"},
    "--after-step": {"type": float,
                     "help": "no early stop before it; default: a tenth of the reference's steps"},
    "--run-timeout": {"type": float, "default": 0.0,
                      "help": "seconds after which a run counts as hung; 0 for never"},
    "--max-failures": {"type": int, "default": 2,
                       "help": "failed runs after which no other is started"},
    "--detach": {"action": "store_true", "help": "go on in the background, log in OUT/sweep.log"},
    "--status": {"action": "store_true", "help": "print the ledger as a table and exit"},
    "--dry-run": {"action": "store_true", "help": "print the runs with their commands and exit"},
    "--trainer": {"type": Path, "default": OURS, "help": "program to run"},
    "--packed": {"action": "store_true", "help": "run our program packed, from OUT/train_gpt.py"},
    "--report-seconds": {"type": float, "default": 60.0,
                         "help": "between progress lines when the output is not a terminal"},
    "--poll-seconds": {"type": float, "default": 1.0, "help": "between looks at the runs"},
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines and names the defaults."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter,
                                     allow_abbrev=False)
    for name, properties in OPTIONS.items():
        parser.add_argument(name, **properties)  # type: ignore[arg-type]
    return parser


def settings_from(arguments: argparse.Namespace) -> Settings:
    """How to run, with defaults that depend on this machine filled in.

    Raises: SweepError for values out of range.
    """
    named = {**os.environ, "CUDA_VISIBLE_DEVICES": arguments.gpus}
    gpus = visible_gpus(os.environ if arguments.gpus == "all" else named)
    processes = arguments.nproc or next((size for size in WORLD_SIZES if size <= len(gpus)), 1)
    if processes not in WORLD_SIZES:
        sizes = ", ".join(map(str, sorted(WORLD_SIZES)))
        raise SweepError(f"--nproc {processes}: world sizes are {sizes}")
    trainer = arguments.trainer
    if arguments.packed and trainer.resolve() != OURS:
        raise SweepError(f"--trainer {trainer}: --packed runs {OURS}, no other program")
    if not trainer.is_file():
        raise SweepError(f"--trainer {trainer}: no such file")
    if arguments.packed:
        trainer = arguments.out / OURS.name
    for name, least in (("window", 1), ("max_failures", 1), ("run_timeout", 0), ("tolerance", 0),
                        ("poll_seconds", 0), ("report_seconds", 0)):
        if not getattr(arguments, name) >= least:  # which holds for NaN too
            option = name.replace("_", "-")
            raise SweepError(f"--{option} {getattr(arguments, name)}: at least {least}")
    patience = None
    if arguments.reference is not None:
        curve = load_curve(arguments.reference)
        after = arguments.after_step if arguments.after_step is not None else curve.last_step() / 10
        patience = Patience(curve, arguments.tolerance, arguments.window, after)
    return Settings(
        arguments.out.resolve(), trainer.resolve(), processes, gpu_slots(gpus, processes),
        patience, arguments.run_timeout, arguments.max_failures, arguments.poll_seconds,
        arguments.report_seconds, arguments.packed)


def planned(arguments: argparse.Namespace, settings: Settings) -> list[Run]:
    """The runs that the command line asks for.

    Where our program is the trainer, the shell's own settings are made explicit and it checks all.
    """
    axes = parse_axes(arguments.seeds, arguments.assignments)
    if not axes:
        raise SweepError("nothing to run: give --seeds, --set, or both")
    if not settings.ours:
        return plan_runs(axes, {})
    known = setting_names() - set(RESERVED)
    runs = plan_runs(axes, {name: value for name, value in os.environ.items() if name in known})
    check_settings(runs)
    return runs


def pack_into(path: Path) -> None:
    """Writes our program, packed.

    Raises: SweepError when another one lies there, whose runs would not compare.
    """
    import train_gpt

    program = train_gpt.packed_program()
    if path.is_file() and path.read_bytes() != program:
        raise SweepError(f"{path}: an earlier version of the program; give a new --out")
    path.write_bytes(program)


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[IO[str]]:
    """The lock of a sweep folder, held until the block ends and no run that inherited it is alive.

    Raises: SweepError when somebody else holds it, or there can be no such folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "lock").open("w", encoding="utf-8")
    except OSError as error:
        raise SweepError(f"--out {out}: no folder to write to: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            message = f"{out}: another sweep, or a run it left behind, is still at work here"
            raise SweepError(message) from error
        yield file


def detach(arguments: Sequence[str], settings: Settings) -> int:
    """Starts the same command in a session of its own and returns once it is under way."""
    log = settings.out / "sweep.log"
    with exclusive(settings.out), log.open("ab") as output:
        start = output.tell()
        if settings.packed:
            pack_into(settings.trainer)
    with log.open("ab") as output:
        words = [word for word in arguments if word != "--detach"]
        process = subprocess.Popen(
            [sys.executable, "-u", __file__, *words], stdin=subprocess.DEVNULL, stdout=output,
            stderr=output, start_new_session=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.wait(3.0) != 0:
            print(log.read_bytes()[start:].decode(errors="replace").strip(), file=sys.stderr)
            return process.returncode
    out = shlex.quote(str(settings.out))
    print(
        f"process {process.pid} goes on in the background\n"
        f"  follow  tail -f {shlex.quote(str(log))}\n"
        f"  state   python tools/sweep.py --out {out} --status\n  stop    kill {process.pid}"
    )
    return 0


def interrupt(sign: int, frame: FrameType | None) -> None:
    """Turns a signal into what Ctrl-C raises, so that both end the children."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets a closed terminal and a plain `kill` end the sweep as Ctrl-C does."""
    before = [(sign, signal.signal(sign, interrupt)) for sign in (signal.SIGTERM, signal.SIGHUP)]
    try:
        yield
    finally:
        for sign, handler in before:
            signal.signal(sign, handler)


def run_sweep(plan: list[Run], settings: Settings) -> int:
    """Exit status of the whole sweep, its table printed."""
    with interruptible(), exclusive(settings.out) as lock:
        if settings.packed:
            pack_into(settings.trainer)
        ledger = Ledger(settings.out / "ledger.jsonl")
        sweep = Sweep(plan, settings, ledger, lock)
        ledger.check_trainer(sweep.digest)
        ledger.announce(sweep.plan)
        status = sweep.execute()
        print(table(ledger))
    return status


def existing_ledger(out: Path, option: str = "--out") -> Ledger:
    """The ledger of a folder that an option named. Raises: SweepError when there is none."""
    if not (out / "ledger.jsonl").is_file():
        raise SweepError(f"{option} {out}: no ledger there")
    return Ledger(out.resolve() / "ledger.jsonl")


def show_status(out: Path) -> int:
    """Prints the table of a folder's ledger. Raises: SweepError when there is none."""
    print(table(existing_ledger(out)))
    return 0


def show_plan(plan: Sequence[Run], settings: Settings) -> int:
    """Prints the runs with their commands."""
    for run in plan:
        words = [f"{name}={shlex.quote(value)}" for name, value in run.settings.items()]
        print(" ".join([*words, *launch_command(settings.trainer, settings.processes)]))
    return 0


def main(arguments: Sequence[str]) -> int:
    """Exit status; see the module's text."""
    options = build_parser().parse_args(arguments)
    try:
        if options.status:
            return show_status(options.out)
        settings = settings_from(options)
        plan = planned(options, settings)
        if options.dry_run:
            return show_plan(plan, settings)
        return detach(arguments, settings) if options.detach else run_sweep(plan, settings)
    except SweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
