#!/usr/bin/env python3
"""What learning from each document gains, against the seconds that it takes, on one artifact.

    python tools/adaptation_curve.py runs/<run_id>/artifact.bin
    python tools/adaptation_curve.py ARTIFACT --documents 100 --point "TTT_CHUNK_SIZE=16"

Every point is a set of settings over those of the environment: the first documents of the
validation text are scored without and with adapters, on one device, with the same context. Gain:
the difference in bits per byte. Projected: seconds that the official text would take on eight
such devices, by the times of passes measured here. Points that the file already has, of the same
artifact, source and documents, are not repeated; it is written after each.

Exit status: 0 measured, 1 an error, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as golf
from tools.command import exit_status, number_between
from tools.runs import earlier_rows
from tools.sweep import setting_names

# Around the settings of `record`, one at a time, and rank at an equal alpha / rank.
POINTS = ("", "TTT_CHUNK_SIZE=96", "TTT_CHUNK_SIZE=24", "TTT_LORA_RANK=32 TTT_LORA_ALPHA=57.6",
          "TTT_LORA_SITES=qkv,down,head", "EVAL_SEQ_LEN=3072")
COLUMNS = ("plain_bpb", "adapted_bpb", "gain_bpb", "seconds", "projected_seconds")


def first_documents(config: golf.Config, count: int) -> golf.ValStream:
    """The validation stream up to the end of its document number `count`; all of them for 0."""
    whole = golf.ValStream.load(config)
    if not 0 < count < len(whole.document_stops):
        return whole
    stop = int(whole.document_stops[count - 1])
    table = golf.token_bytes(golf.load_tokenizer(config.tokenizer_file, config.vocab_size))
    # The first token is no target.
    sidecar = np.append(0, whole.target_bytes[:stop]) if whole.transformed else None
    return golf.ValStream(whole.tokens[:stop + 1], table, config.eval_seq_len, True, sidecar)


def measure(path: Path, config: golf.Config, world: golf.World,
            stream: golf.ValStream) -> dict[str, float]:
    """One point: scores, gain and seconds."""
    attend = golf.choose_attention(config.attention, world.device).attend
    model, plan = golf.load_artifact(path, config, world, attend)
    scorer = golf.Scorer(model, plan, stream, world)
    windows = golf.document_windows(stream, config.eval_seq_len, config.eval_seq_len)
    plain = golf.evaluate(scorer, windows, by_document=True)
    projected = golf.project_documents(scorer)  # compiles
    adapted = golf.evaluate_documents(scorer)
    return {"plain_bpb": plain.bits, "adapted_bpb": adapted.bits,
            "gain_bpb": plain.bits - adapted.bits, "seconds": round(adapted.seconds, 2),
            "projected_seconds": round(projected, 1), "targets": stream.num_targets}


def read_settings(text: str) -> dict[str, str]:
    """`NAME=value NAME=value` as a mapping. Raises: ConfigError."""
    pairs = [word.partition("=") for word in text.split()]
    if bad := [name for name, sign, _ in pairs if not sign]:
        raise golf.ConfigError(f"--point {text!r}: {bad[0]} must be NAME=value")
    return {name: value for name, _, value in pairs}


def point_config(text: str, env: Mapping[str, str]) -> golf.Config:
    """The settings of a point over those of the environment. Raises: ConfigError."""
    settings = read_settings(text)
    config = golf.Config.from_env({**env, **settings})
    if unknown := settings.keys() - setting_names():
        raise golf.ConfigError(f"--point {text!r}: {min(unknown)} is no setting of train_gpt.py")
    return config


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="artifact.bin of a run with these settings")
    parser.add_argument("--documents", type=number_between(int, 0, 10**9), default=240, metavar="N",
                        help="first ones to score, 0: all (default %(default)s)")
    parser.add_argument("--point", action="append", metavar="SETTINGS",
                        help="NAME=value ..., instead of the built-in points; can be repeated")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="default adaptation_curve.json in LOG_DIR")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """Measures all points and prints them; the exit status.

    Raises: GolfError, RunError, OSError.
    """
    options = parse_arguments(arguments)
    points = {text: point_config(text, env) for text in options.point or POINTS}
    config, world = golf.Config.from_env(env), golf.World.from_env(env)
    out = options.out or Path(config.log_dir) / "adaptation_curve.json"
    earlier_rows(out, {})  # or its error, before anything is compiled
    golf.open_artifact(options.artifact, config)
    facts: dict[str, object] = {
        "artifact_sha256": golf.digest(options.artifact.read_bytes()), "preset": config.preset,
        "source_sha256": golf.digest(golf.program_source()), "documents": options.documents,
        "device": torch.cuda.get_device_name() if world.is_cuda else "CPU",
        "data": config.dataset_dir.name}
    rows, stream = earlier_rows(out, facts), first_documents(config, options.documents)
    torch.set_float32_matmul_precision("high")
    with world.process_group():
        for text, point in points.items():
            found = next((row for row in rows if row["settings"] == text), None)
            if not found:
                found = {"settings": text, **measure(options.artifact, point, world, stream)}
                rows.append(found)
                golf.write_atomically(
                    out, (json.dumps(facts | {"rows": rows}, indent=1) + "\n").encode())
            print(f"{text or 'as they are':<40}" + "  ".join(
                f"{name} {found[name]:.6g}" for name in COLUMNS), flush=True)
    print(f"result: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, golf.GolfError))
