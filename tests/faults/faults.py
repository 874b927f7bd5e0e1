"""Breaks the real program in every way we know, resumes it, and compares with an unbroken twin.

    python tests/faults/faults.py              all; the table goes to docs/FAULTS.md (make faults)
    python tests/faults/faults.py --only ranks --moments 2 --mutations 300 --out /tmp/faults.md

Everything runs with a toy corpus, on GPUs where there are some (two for `--only ranks`). "Lost"
are bytes that were in a log before the fault and are not afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mutate  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402

PROGRAM = ROOT / "train_gpt.py"
LIMIT_SECONDS = 120.0
Limit = Callable[[], None]


@dataclass
class Row:
    """What came of one kind of fault."""

    fault: str
    tried: int = 0
    survived: int = 0
    bytes_lost: int = 0
    note: str = ""

    def add(self, survived: bool, bytes_lost: int = 0) -> None:
        """Counts one fault."""
        self.tried, self.survived = self.tried + 1, self.survived + survived
        self.bytes_lost += bytes_lost


class Run:
    """One run of the program in a folder of its own."""

    def __init__(self, data: Path, folder: Path, **settings: object) -> None:
        self.folder = folder
        defaults = {"ITERATIONS": 24, "TRAIN_LOG_EVERY": 1, "VAL_LOSS_EVERY": 10,
                    "CHECKPOINT_EVERY": 0.2, "MAX_QUANT_GAP_BPB": 1}
        self.env = toy.tiny_env(data, folder, **{**defaults, **settings})
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted((self.folder / "runs" / "toy").glob("*.ckpt"))

    def start(self, limit: Limit | None = None, command: Sequence[str] = (),
              **settings: object) -> subprocess.Popen[str]:
        """Starts the program, or what starts it; its words go to files."""
        env = toy.quiet_environment(**self.env, **{k: str(v) for k, v in settings.items()})
        name = f"console{env.get('RANK', '')}.txt"
        with (self.folder / name).open("a") as console:
            return subprocess.Popen(command or [sys.executable, str(PROGRAM)], env=env,
                                    stdout=console, stderr=console, text=True, preexec_fn=limit)

    def finish(self, limit: Limit | None = None, **settings: object) -> int:
        """Runs to the end; the exit code."""
        return self.start(limit, **settings).wait(timeout=LIMIT_SECONDS)

    def words(self, rank: object = "") -> str:
        """All that was printed."""
        path = self.folder / f"console{rank}.txt"
        return path.read_text() if path.exists() else ""

    def logs(self) -> dict[str, bytes]:
        """The logs as they are on disk."""
        return {p.name: p.read_bytes() for p in (self.folder / "logs").glob("toy.*")
                if p.suffix != ".json"}

    def lost(self, before: dict[str, bytes]) -> int:
        """Bytes of `before` that the logs no longer begin with."""
        now = self.logs()
        return sum(len(text) for name, text in before.items()
                   if not now.get(name, b"").startswith(text))

    def outcome(self) -> tuple[str, dict[str, float]] | None:
        """Hash of the artifact and all scores of a complete run."""
        path = self.folder / "logs" / "toy.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        if result.get("status") != "complete":
            return None
        blob = (self.folder / "runs" / "toy" / "artifact.bin").read_bytes()
        return hashlib.sha256(blob).hexdigest(), result["bpb"]

    def wait_for(self, text: str, rank: object = "") -> None:
        """Waits until the program has printed something."""
        begin = time.monotonic()
        while text not in self.words(rank):
            if time.monotonic() - begin > LIMIT_SECONDS:
                raise TimeoutError(f"{self.folder}: {text!r} does not come:\n{self.words(rank)}")
            time.sleep(0.02)


class Suite:
    """All faults, on one corpus, against one unbroken twin."""

    def __init__(self, folder: Path, moments: int, mutations: int, seed: int) -> None:
        self.folder, self.moments, self.mutations = folder, moments, mutations
        self.rng, self.rows, self.data = random.Random(seed), list[Row](), folder / "corpus"
        toy.write_corpus(self.data)
        self.twin = Run(self.data, folder / "twin", CHECKPOINT_EVERY=0)
        begin = time.monotonic()
        process = self.twin.start()
        self.twin.wait_for("track:")
        silent = time.monotonic() - begin
        if process.wait(timeout=LIMIT_SECONDS):
            raise RuntimeError(self.twin.words())
        self.seconds = time.monotonic() - begin - silent
        self.wanted = self.twin.outcome()

    def row(self, fault: str) -> Row:
        """A new row of the table."""
        self.rows.append(Row(fault))
        return self.rows[-1]

    def fresh(self, name: str, **settings: object) -> Run:
        """A run in a new folder."""
        return Run(self.data, self.folder / name, **settings)

    def interrupt(self, number: signal.Signals) -> None:
        """A signal at random moments between the first line and the last; then a resumed run."""
        row = self.row(f"{number.name} at a random moment, then RESUME=auto")
        slowest, stages = 0.0, set[str]()
        for moment in range(self.moments):
            run = self.fresh(f"{number.name}{moment}")
            process = run.start()
            run.wait_for("track:")
            time.sleep(self.rng.uniform(0, self.seconds))
            process.send_signal(number)
            begin = time.monotonic()
            code = process.wait(timeout=LIMIT_SECONDS)
            slowest = max(slowest, time.monotonic() - begin)
            before, newest = run.logs(), run.checkpoints[-1].stem if run.checkpoints else "none"
            stages.add(newest.split("-")[0])
            if run.outcome() is None:  # else the signal came after the result
                expected = 75 if number == signal.SIGTERM else -9
                if code != expected or run.finish(RESUME="auto"):
                    print(f"{run.folder.name}: exit code {code}\n{run.words()[-3000:]}")
            row.add(run.outcome() == self.wanted, run.lost(before))
        row.note = f"newest checkpoint: {', '.join(sorted(stages))}; ended within {slowest:.1f} s"

    def damage(self) -> None:
        """A damaged newest checkpoint; then no whole one at all."""
        row = self.row("newest checkpoint damaged: the one before it is used and said")
        run = self.fresh("damage")
        process = run.start()
        run.wait_for("\n16/24")
        process.kill()
        process.wait()
        saved = {path: path.read_bytes() for path in run.checkpoints}
        kinds: dict[str, Callable[[bytes], bytes]] = {
            "cut": lambda data: data[:len(data) // 2], "empty": lambda data: b"",
            "flipped": lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:]}
        for kind, change in kinds.items():
            copy = self.fresh(f"damage-{kind}")
            shutil.copytree(run.folder, copy.folder, dirs_exist_ok=True)
            newest = copy.checkpoints[-1]
            newest.write_bytes(change(saved[run.checkpoints[-1]]))
            code = copy.finish(RESUME="auto")
            said = f"{newest}: no checkpoint" in copy.words()
            row.add(code == 0 and said and copy.outcome() == self.wanted)
        row = self.row("no whole checkpoint left: refused in one line")
        for path in run.checkpoints:
            path.write_bytes(b"PK")
        row.add(run.finish(RESUME="auto") == 1 and "Traceback" not in run.words())

    def refusals(self) -> None:
        """What must not be resumed, and what must not run twice."""
        row = self.row("other settings than the checkpoint's: refused with the differences")
        run = self.fresh("refusals")
        process = run.start()
        run.wait_for("\n8/24")
        process.send_signal(signal.SIGSTOP)
        shared = self.row("second run in the folder of a running one: refused with its owner")
        shared.add(run.finish(RESUME="auto") == 1
                   and f"belongs to process {process.pid}" in run.words())
        shared.add(run.finish() == 1 and "File exists" in run.words())
        process.terminate()
        process.send_signal(signal.SIGCONT)
        process.wait()
        for name, value in (("SEED", 3), ("MATRIX_LR", 0.5), ("TTT_EPOCHS", 1)):
            row.add(run.finish(RESUME="auto", **{name: value}) == 1
                    and f"{name}={value} was" in run.words())
        shared.add(run.finish(RESUME="auto") == 0 and run.outcome() == self.wanted)
        again = self.row("complete run started again: refused")
        before = {p: p.read_bytes() for p in run.folder.rglob("toy*/*") if p.is_file()}
        again.add(run.finish(RESUME="auto") == 1 and run.finish() == 1
                  and all(p.read_bytes() == data for p, data in before.items()))

    def full_disk(self) -> None:
        """Files that may not grow beyond a limit, and small file systems where one can mount."""
        row = self.row("no room for checkpoints: said, and the run completes")
        run = self.fresh("small-files")
        code = run.finish(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
        row.add(code == 0 and "warning: no checkpoint" in run.words()
                and run.outcome() == self.wanted)
        artifact = self.row("disk full at the artifact: one line, then resumed with room")
        log = self.row("disk full at the logs: said, artifact is kept, exit is not 0")
        try:
            self.full_file_systems(artifact, log)
        except subprocess.CalledProcessError:
            artifact.note = log.note = "not tried: needs the right to mount a tmpfs"

    def full_file_systems(self, artifact: Row, log: Row) -> None:
        """The faults of small file systems. Raises: CalledProcessError if none can be mounted."""
        run = self.fresh("small-runs", CHECKPOINT_EVERY=0)
        with small_disk(run.folder / "runs", 260) as resize:
            code = run.finish()
            before = run.logs()
            resize(10_000)
            said = "artifact.bin cannot be written" in run.words()
            artifact.add(code == 1 and said and run.finish(RESUME="auto") == 0
                         and run.outcome() == self.wanted, run.lost(before))
        run = self.fresh("small-logs", CHECKPOINT_EVERY=0)
        with small_disk(run.folder / "logs", 164):
            code = run.finish()
            log.add(code == 1 and "No space left" in run.words()
                    and (run.folder / "runs" / "toy" / "artifact.bin").exists())

    def ranks(self) -> None:
        """Two ranks: one killed, one told to stop, one stuck."""
        twin = self.fresh("ranks-twin", CHECKPOINT_EVERY=0)
        if any(self.finish_ranks(twin)):
            raise RuntimeError(twin.words(0) + twin.words(1))
        training, evaluation = "\n12/24", "artifact_bytes ="
        cases = (
            ("one of two ranks killed: the other ends, says why once", signal.SIGKILL, {1},
             training),
            ("one of two ranks told to stop: both stop with one checkpoint", signal.SIGTERM, {75},
             training),
            ("one of two ranks stuck: RANK_TIMEOUT_SECONDS end the other", signal.SIGSTOP, {1},
             training),
            ("one of two ranks killed in evaluation: likewise, and only that is repeated",
             signal.SIGKILL, {1}, evaluation))
        for number_of_case, (fault, number, codes, words_before) in enumerate(cases):
            row = self.row(fault)
            run = self.fresh(f"ranks-{number_of_case}", RANK_TIMEOUT_SECONDS=8)
            processes = self.start_ranks(run)
            run.wait_for(words_before, 0)
            processes[1].send_signal(number)
            begin = time.monotonic()
            code = processes[0].wait(timeout=LIMIT_SECONDS)
            seconds = time.monotonic() - begin
            processes[1].kill()
            processes[1].wait()
            before, words = run.logs(), run.words(0) + run.words(1)
            named = words.count("Traceback") == 1 and "; silent ranks: [1]" in words
            once = code == 75 or named
            row.add(code in codes and once and not any(self.finish_ranks(run, RESUME="auto"))
                    and run.outcome() == twin.outcome(), run.lost(before))
            row.note = f"the other rank ended after {seconds:.1f} s"
        self.launcher(twin)

    def launcher(self, twin: Run) -> None:
        """SIGTERM to torchrun, which passes it on; resumed under torchrun, too."""
        row = self.row("SIGTERM to torchrun of two ranks: a checkpoint, then RESUME=auto")
        run = self.fresh("ranks-launcher")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", str(PROGRAM)]
        process = run.start(command=command)
        run.wait_for("\n12/24")
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        code = process.wait(timeout=LIMIT_SECONDS)
        row.note = f"torchrun ended after {time.monotonic() - begin:.1f} s with code {code}"
        before, saved = run.logs(), bool(run.checkpoints)
        again = run.start(command=command, RESUME="auto").wait(timeout=LIMIT_SECONDS)
        row.add(code != 0 and saved and again == 0 and run.outcome() == twin.outcome(),
                run.lost(before))

    def start_ranks(self, run: Run, **settings: object) -> list[subprocess.Popen[str]]:
        """Starts two ranks on this machine."""
        port = toy.free_port()
        common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                  "GLOO_SOCKET_IFNAME": "lo", **settings}
        return [run.start(RANK=rank, LOCAL_RANK=rank, **common) for rank in range(2)]

    def finish_ranks(self, run: Run, **settings: object) -> list[int]:
        """Runs two ranks to the end; their exit codes."""
        processes = self.start_ranks(run, **settings)
        try:
            return [process.wait(timeout=LIMIT_SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()

    def hostile(self) -> None:
        """Mutated artifacts, shards and checkpoints."""
        run = self.fresh("hostile")
        process = run.start()
        run.wait_for("\n8/24")
        process.kill()
        process.wait()
        samples = {"artifact": self.twin.folder / "runs" / "toy" / "artifact.bin",
                   "shard": next((self.data / "datasets").rglob("*train_000000.bin")),
                   "checkpoint": run.checkpoints[-1]}
        for kind, sample in samples.items():
            seed = self.rng.randrange(2**31)
            report = mutate.report_in_fresh_process(kind, sample, self.mutations, seed)
            row = self.row(f"mutated {kind} read")
            row.tried, row.survived = report["tried"], report["tried"] - report["crashed"]
            row.note = f"{report['refused']} refused, {report['peak_mib']} MiB more memory at most"

    def table(self) -> str:
        """The rows as Markdown."""
        lines = ["| fault | tried | survived | bytes lost | |", "|---|---|---|---|---|"]
        lines += [f"| {r.fault} | {r.tried} | {r.survived} | {r.bytes_lost} | {r.note} |"
                  for r in self.rows]
        tried, survived, lost = (sum(getattr(r, name) for r in self.rows)
                                 for name in ("tried", "survived", "bytes_lost"))
        return "\n".join([*lines, f"| **all** | {tried} | {survived} | {lost} | |"])


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Callable[[int], None]]:
    """A file system of a few KiB at `folder`; yields a function that changes its size."""
    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)

    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs")
    try:
        yield lambda size: mount("-o", f"remount,size={size}k")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def main() -> int:
    """Runs the suite; 0 if everything survived."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=10, help="random moments for each signal")
    parser.add_argument("--mutations", type=int, default=3_400, help="mutated files of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="stop kill damage refusals disk ranks hostile")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "FAULTS.md")
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), options.moments, options.mutations, options.seed)
        stages: dict[str, Callable[[], None]] = {
            "stop": lambda: suite.interrupt(signal.SIGTERM),
            "kill": lambda: suite.interrupt(signal.SIGKILL),
            "damage": suite.damage, "refusals": suite.refusals, "disk": suite.full_disk,
            "ranks": suite.ranks, "hostile": suite.hostile}
        for name, stage in stages.items():
            if options.only in ("", name):
                stage()
                print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    gpus = torch.cuda.device_count()
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "a CPU"
    table, minutes = suite.table(), (time.monotonic() - begin) / 60
    with suppress(FileExistsError):
        options.out.parent.mkdir(parents=True)
    part = f"python tests/faults/faults.py --only {options.only}"
    header = HEADER.format(command=part if options.only else "make faults", minutes=minutes,
                           seed=options.seed, device=device)
    options.out.write_text(f"{header}{table}\n")
    print(f"{table}\n{minutes:.1f} minutes; {options.out}")
    return int(any(r.survived < r.tried for r in suite.rows))


HEADER = """# Faults

Written by `{command}` (seed {seed}, {minutes:.0f} minutes on {device}). Every fault hits the real
program as a subprocess with a toy model. *Survived* means: the program ended as documented, and
where a run is resumed, its artifact and all its scores equal those of a run without faults to the
last bit. *Bytes lost* were in a log before the fault and are not afterwards.

"""

if __name__ == "__main__":
    sys.exit(main())
