#!/usr/bin/env python3
"""Evaluates an artifact once more and says where its bits and its bytes go.

    PRESET=pr1493 python tools/breakdown.py runs/<run_id>/artifact.bin
    PRESET=pr1493 torchrun --standalone --nproc_per_node=8 tools/breakdown.py runs/<id>/artifact.bin

Settings, SEED too, come from the environment, as for `EVAL_ONLY=... train_gpt.py`, which this is.
The result of that run gets two sections more: `breakdown`, BPB by document length, by position in
the document and along the stream, and `artifact.parts`. `tools/report.py RUN` draws both.

Exit status: that of train_gpt.py; 2 bad arguments.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import numpy as np

import train_gpt as golf

STREAM_SHARES = 20
FIRST_POSITIONS = 64  # targets in the first class of positions; each further one is twice as wide

Rows = list[dict[str, float]]


def break_down(stream: golf.ValStream, nats: np.ndarray, name: str) -> dict[str, Rows]:
    """BPB of one evaluation by the class of each target; classes end at `upto` or at `share`."""
    starts, stops = stream.document_starts, stream.document_stops
    length = np.repeat(stops - starts, stops - starts)
    place = np.arange(stream.num_targets) - np.repeat(starts, stops - starts)
    classes = {
        "document_length": np.ceil(np.log2(length)).astype(int),
        "position": np.ceil(np.log2(np.maximum(place + 1, FIRST_POSITIONS))).astype(int),
        "stream": np.arange(stream.num_targets) * STREAM_SHARES // stream.num_targets,
    }
    found: dict[str, Rows] = {}
    for key, kinds in classes.items():
        total, size = np.bincount(kinds, nats), np.bincount(kinds, stream.target_bytes)
        found[key] = [
            ({"share": (n + 1) / STREAM_SHARES} if key == "stream" else {"upto": 2**n})
            | {"bytes": int(size[n]), name: float(total[n] / (math.log(2) * size[n]))}
            for n in map(int, np.flatnonzero(size))
        ]
    return found


def merge_columns(before: Mapping[str, Rows], more: Mapping[str, Rows]) -> dict[str, Rows]:
    """Rows of several evaluations side by side; all of them have the same classes."""
    return {
        key: [one | other for one, other in zip(before.get(key, rows), rows, strict=True)]
        for key, rows in more.items()
    }


def artifact_parts(path: Path, config: golf.Config) -> dict[str, int]:
    """Bytes of a model file by stack of matrices; the coder mixes them, so by their entropy."""
    data = path.read_bytes()
    _, quantised = golf.decode_artifact(data, config)
    bits = {name: golf.entropy_bits(levels) for name, levels in quantised.integers.items()}
    sizes, position = [], len(golf.ARTIFACT_MAGIC)
    while position < len(data) - 16:  # frames of a length and as many bytes, then a checksum
        sizes.append(4 + int.from_bytes(data[position:position + 4], "little"))
        position += sizes[-1]
    scale = sum(sizes[1:-1]) / sum(bits.values())
    parts = {name: round(scale * value) for name, value in bits.items()}
    parts["vectors and scales"] = sizes[-1]
    return parts | {"header and checksum": len(data) - sum(parts.values())}


def evaluate(path: Path, env: Mapping[str, str]) -> dict[str, object]:
    """Result of an evaluation, with its breakdown. Raises: GolfError as train_gpt.py does.

    The two functions that every evaluation ends with are wrapped: one has the ledger, the other
    knows its name.
    """
    finish, log_score = golf.finish_score, golf.log_score
    latest: list[tuple[golf.ValStream, np.ndarray]] = []

    def finish_and_keep(scorer: golf.Scorer, ledger: golf.ScoreLedger) -> golf.Score:
        score = finish(scorer, ledger)
        nats = scorer.world.combine(ledger.nats.double())
        latest[:] = [(scorer.stream, nats.cpu().numpy())]
        return score

    def log_both(log: golf.RunLog, key: str, label: str, score: golf.Score) -> None:
        log_score(log, key, label, score)
        columns = break_down(*latest[0], key)
        log.result["breakdown"] = merge_columns(log.result.get("breakdown", {}), columns)
        log.put("artifact", cap_bytes=config.artifact_cap_bytes, parts=parts, **sizes)

    config = golf.Config.from_env(env)
    code, model = len(golf.packed_program()), path.stat().st_size
    sizes = {"code_bytes": code, "model_bytes": model, "total_bytes": code + model}
    parts = artifact_parts(path, config)

    golf.finish_score, golf.log_score = finish_and_keep, log_both
    try:
        return golf.main(env)
    finally:
        golf.finish_score, golf.log_score = finish, log_score


def main(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Exit status; see the module's text."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("artifact", type=Path)
    path = parser.parse_args(arguments).artifact
    try:
        evaluate(path, {**env, "EVAL_ONLY": str(path)})
    except (golf.GolfError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
