"""Reads mutated files: each must be read or refused with a documented error, in bounded memory.

    python tests/faults/mutate.py artifact|shard|checkpoint FILE COUNT SEED
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt as golf  # noqa: E402

CHECKSUM_BYTES = 16  # at the end of an artifact
MOST_MIB = 1024  # that a reader may take beyond what the program has


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four changes of the kinds that break parsers."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        # Headers and tables stand at both ends.
        near = rng.choice((64, 4096, max(len(out), 1)))
        at = rng.randrange(min(near, len(out)) or 1)
        at = len(out) - 1 - at if rng.random() < 0.3 else at
        width = rng.choice((1, 2, 4, 8))
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:at + width] = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * width
        elif kind == 2:
            number = rng.choice((1 << 31, 1 << 40, 2**63 - 1, 3))
            out[at:at + width] = struct.pack("<Q", number)[:width]
        elif kind == 3:
            del out[at:at + rng.choice((1, 7, 100, len(out)))]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.choice((1, 7, 100)))
        else:
            begin = rng.randrange(len(out) or 1)
            out[at:at] = out[begin:begin + rng.choice((8, 64, 1000))]
    return bytes(out)


def reseal(data: bytes) -> bytes:
    """A mutated artifact with a checksum that fits, so that the rest of the reader is reached."""
    body = data[:-CHECKSUM_BYTES]
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES]


def config_of(path: Path) -> golf.Config:
    """Settings that read the intact artifact at `path`."""
    data = path.read_bytes()
    begin = len(golf.ARTIFACT_MAGIC) + 4
    length = int.from_bytes(data[begin - 4:begin], "little")
    settings = json.loads(data[begin:begin + length])["settings"]
    return replace(golf.Config.from_env({"PRESET": "demo"}), **settings)


def reader(kind: str, path: Path, sample: Path) -> Callable[[], object]:
    """The program's reader of a kind of file like the sample."""
    config = config_of(sample) if kind == "artifact" else golf.Config()
    readers: dict[str, Callable[[], object]] = {
        "artifact": lambda: golf.decode_artifact(path.read_bytes(), config),
        "shard": lambda: golf.read_shard(path, 384),
        "checkpoint": lambda: golf.TrainState.read(path)}
    return readers[kind]


def report(kind: str, sample: Path, count: int, seed: int) -> dict[str, int]:
    """How many of `count` mutations of a file were refused, and how many crashed the reader."""
    data, rng, refused, crashed = sample.read_bytes(), random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated"
        read = reader(kind, path, sample)
        path.write_bytes(data)
        read()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            changed = mutate(data, rng)
            if kind == "artifact" and number % 2:
                changed = reseal(changed)
            path.write_bytes(changed)
            try:
                read()
            except (golf.ArtifactError, golf.DataError):
                refused += 1
            except BaseException as error:
                crashed += 1
                print(f"{kind} {number} of seed {seed}: {type(error).__name__}: {error}",
                      file=sys.stderr)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"tried": count, "refused": refused, "crashed": crashed, "peak_mib": peak >> 10}


def report_in_fresh_process(kind: str, sample: Path, count: int, seed: int) -> dict[str, int]:
    """The same where memory is measured and limited."""
    arguments = [sys.executable, __file__, kind, str(sample), str(count), str(seed)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def main() -> None:
    """Prints the report as JSON."""
    kind, sample, count, seed = sys.argv[1:]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (MOST_MIB << 20),) * 2)
    print(json.dumps(report(kind, Path(sample), int(count), int(seed))))


if __name__ == "__main__":
    main()
