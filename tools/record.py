#!/usr/bin/env python3
"""Turns finished runs into a records folder, checks such folders, and compares two systems.

    python tools/record.py make RUN... --name NAME --author A --github-id G --blurb TEXT
    python tools/record.py verify records/<track>/<folder> [--artifact runs/<run_id>/artifact.bin]
    python tools/record.py compare A B          each: a records folder, a submission.json, or runs
    python tools/record.py submission RUN...      submission.json of the repository
    python tools/record.py submission --check     is it still what its logs give?

RUN is a run id in logs/, a path to one of a run's files, or the folder of a sweep: all its runs,
and `make` refuses them while one of its seeds is missing. Every number is read from the logs;
author, blurb and the like are words and come from the options, or from the submission.json that is
already there. A cell that would stay blank is an error, as is a set of runs that is not one method.

Exit status: 0 in order, 1 contradictions or runs refused, 2 bad arguments or unreadable files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tools import evidence, welch
from tools.command import integers
from tools.runs import CAP_BYTES, Json, Run, RunError, as_number, load_run, read_json, source_in_log
from tools.sweep import Ledger

RECORD_TRACK = "10min_16mb"
TRIAL_SECONDS = 300  # the packed program must print its settings within this
WORDS = ("author", "github_id", "name", "blurb")
OFFICIAL_DOCUMENTS = 50_000
OFFICIAL_BYTES = (151_070_000, 151_090_000)  # every published export of those documents lies here
DATA_PATHS = {"data_path": "datasets", "tokenizer_path": "tokenizers"}
AUDIT_FLAGS = {
    "c1_causal": "strictly_causal",
    "c2_normalised": "full_normalised_distribution",
    "c3_score_first": "score_before_update",
    "c4_single_pass": "single_pass",
    "documents_isolated": "documents_isolated",
}


class RecordError(Exception):
    """Runs or a folder that cannot become what was asked for; the message says why in one line."""


# ------------------------------------------------------------------------------------ submission


class Field(NamedTuple):
    """A value of submission.json and the log key it was read from."""

    value: Json
    source: str


def required(run: Run, key: str) -> float:
    """Number at a log key. Raises: RecordError naming run and key where the log has none."""
    value = run.number(key)
    if value is None:
        raise RecordError(f"{run.run_id}: {key} is absent from the log, its cell would be blank")
    return value


def required_text(run: Run, key: str) -> str:
    """Text at a log key. Raises: RecordError naming run and key where the log has none."""
    value = run.text(key)
    if value is None:
        raise RecordError(f"{run.run_id}: {key} is absent from the log, its cell would be blank")
    return value


def whole(value: float) -> int | float:
    """Counts as integers, so that they are printed as such."""
    return int(value) if float(value).is_integer() else value


# Per-seed fields: name, log key, factor. Those in OPTIONAL are left out where they were not run.
SEED_FIELDS: tuple[tuple[str, str, float], ...] = (
    ("val_loss", "val_loss", 1),
    ("val_bpb", "val_bpb", 1),
    ("artifact_bytes", "artifact.total_bytes", 1),
    ("bytes_code", "artifact.code_bytes", 1),
    ("bytes_model", "artifact.model_bytes", 1),
    ("steps", "train.steps", 1),
    ("step_avg_ms", "train.ms_per_step", 1),
    ("train_wallclock_ms", "clocks.training_seconds", 1000),
    ("train_to_artifact_s", "clocks.train_to_artifact_seconds", 1),
    ("eval_time_s", "clocks.eval_seconds_strict", 1),
    ("target_tokens", "data.val_targets", 1),
    ("pre_quant_val_bpb", "bpb.averaged", 1),
    ("quantized_val_bpb", "bpb.quantised", 1),
    ("sliding_val_bpb", "bpb.sliding", 1),
)
OPTIONAL = {"pre_quant_val_bpb", "sliding_val_bpb", "train_to_artifact_s"}
# Means over the seeds: field, per-seed field.
MEANS = (
    ("val_loss", "val_loss"),
    ("val_bpb", "val_bpb"),
    ("pre_quant_val_bpb", "pre_quant_val_bpb"),
    ("quantized_val_bpb", "quantized_val_bpb"),
    ("artifact_bytes_mean", "artifact_bytes"),
    ("train_steps_mean", "steps"),
    ("step_avg_ms_mean", "step_avg_ms"),
    ("train_wallclock_ms_mean", "train_wallclock_ms"),
    ("eval_time_s_mean", "eval_time_s"),
)
LARGEST = (
    ("bytes_total", "artifact_bytes"),
    ("bytes_code", "bytes_code"),
    ("bytes_model", "bytes_model"),
    ("artifact_bytes_max", "artifact_bytes"),
    ("eval_time_seconds", "eval_time_s"),
)


def build_submission(runs: Sequence[Run], words: Mapping[str, str]) -> dict[str, Json]:
    """Contents of submission.json: means over seeds at the top, each seed's values below.

    `bytes_total`, `bytes_code` and `bytes_model` are the largest of the seeds, never a mean. Every
    field has its origin under `sources`. Raises: RecordError on runs of different methods, a field
    without a log key, or words that are missing.
    """
    refuse(one_method(runs))
    runs = sorted(runs, key=lambda run: run.seed or 0)
    fields = {name: Field(words.get(name, ""), "written by hand") for name in WORDS}
    for name, item in fields.items():
        if not item.value:
            raise RecordError(f"submission: {name} is blank, give --{name.replace('_', '-')}")
    table = {str(run.seed): seed_fields(run) for run in runs}
    fields |= _head_fields(runs)
    fields |= _statistics(table)
    fields["seeds"] = Field([run.seed for run in runs], "seed")
    fields["seed_results"] = Field(
        {**table}, "keys of each seed's own log, see sources.seed_results"
    )
    fields |= _place_fields(runs)
    fields |= _method_fields(runs, words)
    fields["logs"] = Field([f"{run.run_id}.json" for run in runs], "run_id")
    sources: dict[str, Json] = {name: item.source for name, item in fields.items()}
    origins: dict[str, Json] = {name: key for name, key, _ in SEED_FIELDS}
    sources["seed_results"] = origins | {"artifact_sha256": "artifact.sha256", "run_id": "run_id"}
    return {name: item.value for name, item in fields.items()} | {"sources": sources}


def seed_fields(run: Run) -> dict[str, Json]:
    """One seed's values. Raises: RecordError where a log key is absent."""
    row: dict[str, Json] = {}
    for name, key, factor in SEED_FIELDS:
        if name in OPTIONAL and run.number(key) is None:
            continue
        value = required(run, key)
        row[name] = whole(round(value * factor, 6)) if factor != 1 else whole(value)
    row["artifact_sha256"] = required_text(run, "artifact.sha256")
    row["run_id"] = run.run_id
    return row


def _head_fields(runs: Sequence[Run]) -> dict[str, Field]:
    """Date, track and what kept the runs from being a record attempt."""
    reasons = non_record_reasons(runs)
    tracks = {required_text(run, "track") for run in runs}
    track = tracks.pop() if len(tracks) == 1 else "non_record"
    fields = {
        "date": Field(max(required_text(run, "finished") for run in runs)[:10], "finished"),
        "track": Field(track, "track"),
        "headline_evaluation": Field(runs[0].headline, "headline"),
    }
    if track != RECORD_TRACK and reasons:
        fields["non_record_because"] = Field([*reasons], "hardware, data, seed, clocks")
    return fields


def non_record_reasons(runs: Sequence[Run]) -> list[str]:
    """What separates these runs from the 10-minute record track, in words; may be empty."""
    first, reasons = runs[0], []
    gpus, gpu = first.number("hardware.gpus"), first.text("hardware.gpu") or "none"
    if gpus != 8 or "H100" not in gpu:
        reasons.append(f"hardware: {hardware(first)}, not 8x H100")
    if not official_data(first):
        name = first.text("data.name")
        reasons.append(f"data: {name}, not the official 50,000 validation documents")
    if len(runs) < evidence.RECORD_SEEDS:
        reasons.append(f"seeds: {len(runs)}, a record needs {evidence.RECORD_SEEDS}")
    slow = [run for run in runs if (run.number("clocks.eval_seconds_strict") or 0) > 600]
    if slow:
        seconds = required(slow[0], "clocks.eval_seconds_strict")
        reasons.append(f"evaluation: {seconds:.0f} s on this hardware, over 600 s")
    return reasons


def official_data(run: Run) -> bool:
    """Whether the official validation documents were scored, judged by their count and bytes."""
    documents, size = run.number("data.val_documents"), run.number("data.val_bytes")
    raw = run.number("data.val_raw_bytes")
    low, high = OFFICIAL_BYTES
    fits = any(value is not None and low <= value <= high for value in (size, raw))
    return documents == OFFICIAL_DOCUMENTS and fits


def hardware(run: Run) -> str:
    """Machine of a run in words. Raises: RecordError where the log has none."""
    if run.machine is None:
        raise RecordError(f"{run.run_id}: hardware is absent from the log, its cell would be blank")
    return run.machine


def _statistics(table: Mapping[str, Mapping[str, Json]]) -> dict[str, Field]:
    """Means, deviations and maxima over the seeds; a mean only where every seed has the value."""
    fields: dict[str, Field] = {}
    for name, column in MEANS:
        values = _column(table, column)
        if values:
            middle = whole(round(welch.mean(values), 10))
            fields[name] = Field(middle, f"mean of seed_results.*.{column}")
            if len(values) > 1 and name in ("val_loss", "val_bpb"):
                spread = round(welch.deviation(values), 10)
                fields[f"{name}_std"] = Field(spread, f"n - 1 over seed_results.*.{column}")
    for name, column in LARGEST:
        values = _column(table, column)
        fields[name] = Field(whole(max(values)), f"largest of seed_results.*.{column}")
    return fields


def _column(table: Mapping[str, Mapping[str, Json]], name: str) -> list[float]:
    """A column of the per-seed table; empty unless every seed has it."""
    values = [as_number(row.get(name)) for row in table.values()]
    return [value for value in values if value is not None] if None not in values else []


def _place_fields(runs: Sequence[Run]) -> dict[str, Field]:
    """Hardware, versions and data."""
    first = runs[0]
    fields = {
        "hardware": Field(hardware(first), "hardware.gpus, hardware.gpu"),
        "world_size": Field(whole(required(first, "world_size")), "world_size"),
        "pytorch_version": Field(required_text(first, "versions.torch"), "versions.torch"),
        "python_version": Field(required_text(first, "versions.python"), "versions.python"),
    }
    for name, key in (("cuda_version", "versions.cuda"), ("driver_version", "hardware.driver")):
        if first.text(key):
            fields[name] = Field(required_text(first, key), key)
    backend = "versions.attention_backend"
    fields["attention_backend"] = Field(required_text(first, backend), backend)
    data: dict[str, Json] = {k: v for k, v in first.table("data").items() if v is not None}
    data["official_validation"] = official_data(first)
    fields["data"] = Field(data, "data")
    return fields


def _method_fields(runs: Sequence[Run], words: Mapping[str, str]) -> dict[str, Field]:
    """What was run and which rules it kept."""
    first = runs[0]
    flags, unmeasured = compliance(runs)
    summary = words.get("technique_summary") or f"PRESET={required_text(first, 'preset')}"
    fields = {
        "technique_summary": Field(summary, "preset, or written by hand"),
        "run_command": Field(run_command(first), "preset, differs, world_size"),
        "compliance": Field({**flags}, "clocks, artifact, audit, seed, data"),
    }
    if unmeasured:
        fields["compliance_not_measured"] = Field([*unmeasured], "audit")
    if words.get("attribution"):
        fields["attribution"] = Field(words["attribution"], "written by hand")
    for key in ("config_hash", "packed_sha256"):
        fields[key] = Field(required_text(first, key), key)
    return fields


def compliance(runs: Sequence[Run]) -> tuple[dict[str, bool], list[str]]:
    """Rules kept or not, each decided by the logs, and the names of those no log decides."""
    cap, budget = float(CAP_BYTES), evidence.BUDGET_SECONDS
    flags = {
        "artifact_under_16mb": all(required(r, "artifact.total_bytes") <= cap for r in runs),
        "train_under_600s": all(required(r, "clocks.training_seconds") <= budget for r in runs),
        "eval_under_600s": all(required(r, "clocks.eval_seconds_strict") <= budget for r in runs),
        "three_seeds": len(runs) >= evidence.RECORD_SEEDS,
        "official_validation": all(official_data(run) for run in runs),
        "eight_h100": all("8x" in hardware(run) and "H100" in hardware(run) for run in runs),
    }
    unmeasured = []
    for proof, name in AUDIT_FLAGS.items():
        passed = [run.get(f"audit.{proof}.passed") for run in runs]
        if all(isinstance(value, bool) for value in passed):
            flags[name] = all(passed)
        else:
            unmeasured.append(name)
    return flags, unmeasured


def run_command(run: Run) -> str:
    """Command that repeats the run, with every setting that is unlike its preset."""
    parts = [f"{name}={value}" for name, value in run_settings(run).items()]
    size = int(required(run, "world_size"))
    launcher = "python" if size == 1 else f"torchrun --standalone --nproc_per_node={size}"
    return " ".join([*parts, launcher, "train_gpt.py"])


def run_settings(run: Run) -> dict[str, str]:
    """Environment variables of the run: preset, seed and what differs from the preset."""
    settings = {"PRESET": required_text(run, "preset"), "SEED": f"{required(run, 'seed'):.0f}"}
    for name, value in run.table("differs").items():
        if name in ("run_id", "log_dir", "run_dir", "eval_only", "print_config", "preset", "seed"):
            continue
        text = str(int(value)) if isinstance(value, bool) else str(value)
        if (
            name in DATA_PATHS and Path(text).is_absolute()
        ):  # where it lay on one machine is no news
            text = f"data/{DATA_PATHS[name]}/{Path(text).name}"
        settings[name.upper()] = f"'{text}'" if re.search(r"[^\w.,/:=+-]", text) else text
    return settings


# ---------------------------------------------------------------------------------- what is refused


def refuse(reasons: Sequence[str]) -> None:
    """Raises: RecordError with all reasons, if there are any."""
    if reasons:
        raise RecordError("; ".join(reasons))


def one_method(runs: Sequence[Run]) -> list[str]:
    """Why these runs are not the seeds of one method; empty if they are."""
    if not runs:
        return ["no runs"]
    reasons = []
    for key in evidence.ONE_VALUE:
        values = {json.dumps(run.get(key)): run for run in runs}
        if len(values) > 1:
            text = ", ".join(f"{run.run_id} has {value[:20]}" for value, run in values.items())
            reasons.append(f"{key} differs: {text}")
    seeds = [run.seed for run in runs]
    for run in runs:
        if run.seed is None:
            reasons.append(f"{run.run_id}: the seed is missing")
        elif seeds.count(run.seed) > 1:
            reasons.append(f"seed {run.seed} is given {seeds.count(run.seed)} times")
        if run.text("status") != "complete":
            reasons.append(f"{run.run_id}: status is {run.text('status')}, not complete")
        if run.val_bpb is None or run.headline is None:
            reasons.append(f"{run.run_id}: no headline score")
        reasons += [f"{run.run_id}: {text}" for text in evidence.result_contradictions(run)]
    return list(dict.fromkeys(reasons))


def record_refusals(runs: Sequence[Run], track: str, seeds: Sequence[int]) -> list[str]:
    """Why these runs cannot become a folder under records/; empty if they can."""
    reasons = one_method(runs)
    missing = sorted(set(seeds) - {run.seed for run in runs})
    if missing:
        reasons.append(f"seeds announced but not given: {missing}")
    for run in runs:
        audit = run.table("audit")
        absent = [proof for proof in evidence.PROOFS if proof not in audit]
        if absent:
            reasons.append(f"{run.run_id}: audit absent for {', '.join(absent)}")
    if track == RECORD_TRACK:
        reasons += non_record_reasons(runs)
    return reasons


# ------------------------------------------------------------------------------------------- make


class Order(NamedTuple):
    """What `make` was asked for."""

    name: str
    track: str
    words: dict[str, str]
    seeds: tuple[int, ...]
    out: Path
    requirements: Path


def make(runs: Sequence[Run], order: Order) -> Path:
    """Build a records folder, verify it and try its program; the finished folder.

    Nothing is left behind when a step fails. Raises: RecordError.
    """
    refuse(record_refusals(runs, order.track, order.seeds))
    runs = sorted(runs, key=lambda run: run.seed or 0)
    submission = build_submission(runs, {**order.words, "name": order.name})
    submission["track"] = order.track
    program = packed_program(runs)
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", order.name).strip("-")
    folder = order.out / f"{submission['date']}_{slug}"
    if folder.exists():
        raise RecordError(f"{folder} exists; nothing is overwritten")
    order.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".record-", dir=order.out))
    try:
        (work / "train_gpt.py").write_bytes(program)
        write_json(work / "submission.json", submission)
        (work / "README.md").write_text(folder_readme(runs, submission), encoding="utf-8")
        shutil.copyfile(order.requirements, work / "requirements.txt")
        for run in runs:
            for path in run.files.values():
                shutil.copyfile(path, work / path.name)
        found = [f for f in evidence.examine(work) if f.kind != "note"]
        refuse([f"{finding.where}: {finding.message}" for finding in found])
        try_program(work / "train_gpt.py", runs[0])
        work.chmod(0o755)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def write_json(path: Path, content: Mapping[str, Json]) -> None:
    """Write a mapping as indented JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def packed_program(runs: Sequence[Run]) -> bytes:
    """The packed program of the runs, made by the packer of the source that stands in their logs.

    A source that ran packed has no packer any more: this repository's writes its archive again.
    Raises: RecordError if a log carries no source, the sources do not all pack to the hash that was
    logged, or no run was started from the packed file.
    """
    made: dict[str, bytes] = {}
    ran_packed = False
    for run in runs:
        text, wanted = run.files.get("text"), required_text(run, "source_sha256")
        source = source_in_log(text, wanted) if text else None
        if source is None:
            raise RecordError(f"{run.run_id}: no program text with sha256 {wanted[:12]} in the log")
        stripped = evidence.is_stripped(source)  # a packed program carries no comments
        if source not in made:
            made[source] = pack_stripped(source) if stripped else pack_source(source, run)
        mine = made[source]
        here, logged = hashlib.sha256(mine).hexdigest(), required_text(run, "packed_sha256")
        if here != logged:
            there, now = run.text("versions.python"), platform.python_version()
            hint = f" (packed by Python {there} there, {now} here)" if there != now else ""
            raise RecordError(
                f"{run.run_id}: its source packs to sha256 {here[:12]}, the log says "
                f"{logged[:12]}{hint}"
            )
        ran_packed |= stripped
    if not ran_packed:
        raise RecordError(
            "no run used the packed program: AUDIT=1 python tools/sweep.py --packed --seeds ... "
            "runs it"
        )
    return next(iter(made.values()))


def pack_stripped(source: str) -> bytes:
    """The packed program around a source that came out of one; packing it again changes nothing."""
    from train_gpt import pack_program

    return pack_program(source)


def pack_source(source: str, run: Run) -> bytes:
    """What `train_gpt.py pack` makes of a source. Raises: RecordError with the program's words."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "train_gpt.py").write_bytes(source.encode())
        done = _start([sys.executable, "train_gpt.py", "pack", "packed.zip"], folder, {})
        if done.returncode != 0 or not (folder / "packed.zip").is_file():
            raise RecordError(f"{run.run_id}: its program does not pack: {_last_line(done)}")
        return (folder / "packed.zip").read_bytes()


def _start(
    command: list[str], folder: Path, settings: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with a bare environment. Raises: RecordError if it hangs."""
    keep = ("PATH", "HOME", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")
    env = {name: os.environ[name] for name in keep if name in os.environ} | dict(settings)
    try:
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RecordError(f"{' '.join(command)}: nothing after {TRIAL_SECONDS} s") from error


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed command said last."""
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
    return f"exit status {done.returncode}: {lines[-1]}"


def try_program(program: Path, run: Run) -> None:
    """Start the program by itself, with the run's settings, in an otherwise empty folder.

    It must print its settings and the run's config hash. Raises: RecordError with its last line.
    """
    settings = {name: value.strip("'") for name, value in run_settings(run).items()}
    with tempfile.TemporaryDirectory() as place:
        shutil.copyfile(program, Path(place) / "train_gpt.py")
        command = [sys.executable, "train_gpt.py"]
        done = _start(command, Path(place), settings | {"PRINT_CONFIG": "1"})
    if done.returncode != 0:
        raise RecordError(f"{program.name} does not run by itself: {_last_line(done)}")
    wanted = required_text(run, "config_hash")
    if wanted not in done.stdout:
        raise RecordError(f"{program.name}: the run command does not give config hash {wanted}")


# ------------------------------------------------------------------------------- README of a folder


def folder_readme(runs: Sequence[Run], submission: Mapping[str, Json]) -> str:
    """README.md of a records folder; every number in it comes from submission.json."""
    bpb, loss = as_number(submission["val_bpb"]), as_number(submission["val_loss"])
    spread = as_number(submission.get("val_bpb_std"))
    many = f" +- {spread:.5f} over {len(runs)} seeds" if spread is not None else " (one seed)"
    reasons = submission.get("non_record_because")
    lines = [
        f"# {submission['name']}",
        "",
        f"**val_bpb {bpb:.5f}**{many}, {loss:.5f} nats per token, "
        f"{as_number(submission['bytes_total']):,.0f} of {CAP_BYTES:,} bytes, "
        f"{submission['hardware']}, evaluation `{submission['headline_evaluation']}`.",
        "",
        str(submission["blurb"]),
        "",
    ]
    if isinstance(reasons, list) and reasons:
        lines += ["Not a record attempt: " + "; ".join(str(reason) for reason in reasons) + ".", ""]
    lines += ["## Results", "", *seed_table(submission), ""]
    lines += ["Artifacts (the model files are not in git):", "", *_artifact_table(submission), ""]
    lines += ["## Run", "", "```bash", str(submission["run_command"]), "```", ""]
    lines += ["## Rules", "", *_compliance_table(submission), ""]
    lines += ["Logs: " + ", ".join(f"`{run.run_id}.txt`, `.jsonl`, `.json`" for run in runs) + "."]
    lines += ["", "Made by `tools/record.py make`; check with `tools/record.py verify`.", ""]
    return "\n".join(lines)


SEED_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("Steps", "steps", ",.0f"),
    ("ms/step", "step_avg_ms", ".1f"),
    ("Pre-quant BPB", "pre_quant_val_bpb", ".5f"),
    ("Quantised BPB", "quantized_val_bpb", ".5f"),
    ("Sliding BPB", "sliding_val_bpb", ".5f"),
    ("**BPB**", "val_bpb", ".5f"),
    ("Nats per token", "val_loss", ".5f"),
    ("Artifact bytes", "artifact_bytes", ",.0f"),
    ("Training s", "train_wallclock_ms", ".1f"),
    ("Evaluation s", "eval_time_s", ".1f"),
)


def seed_table(submission: Mapping[str, Json]) -> list[str]:
    """Markdown table with one row a seed and the means; columns that no seed has are left out."""
    table = submission["seed_results"]
    entries = table.items() if isinstance(table, dict) else ()
    rows = {seed: row for seed, row in entries if isinstance(row, dict)}
    columns = [column for column in SEED_COLUMNS if _column(rows, column[1])]
    lines = ["| Seed | " + " | ".join(title for title, _, _ in columns) + " |"]
    lines.append("|---:|" + "---:|" * len(columns))

    def cells(values: Mapping[str, float]) -> str:
        """Formatted cells of one row; wall clocks in milliseconds are shown as seconds."""
        scale = {"train_wallclock_ms": 1e-3}
        return " | ".join(f"{values[key] * scale.get(key, 1):{form}}" for _, key, form in columns)

    for seed, row in rows.items():
        values = {key: as_number(row.get(key)) or 0.0 for _, key, _ in columns}
        lines.append(f"| {seed} | {cells(values)} |")
    if len(rows) > 1:
        means = {key: welch.mean(_column(rows, key)) for _, key, _ in columns}
        lines.append(f"| **Mean** | {cells(means)} |")
    return lines


def _artifact_table(submission: Mapping[str, Json]) -> list[str]:
    """Markdown table of model files: size and hash by seed."""
    lines = [
        "| Seed | Model bytes | Code bytes | sha256 of the model file |",
        "|---:|---:|---:|---|",
    ]
    table = submission["seed_results"]
    for seed, row in (table if isinstance(table, dict) else {}).items():
        if isinstance(row, dict):
            model, code = as_number(row["bytes_model"]), as_number(row["bytes_code"])
            lines.append(f"| {seed} | {model:,.0f} | {code:,.0f} | `{row['artifact_sha256']}` |")
    return lines


def _compliance_table(submission: Mapping[str, Json]) -> list[str]:
    """Markdown table of the rules, decided by the logs."""
    flags = submission["compliance"]
    lines = ["| Rule | Kept |", "|---|---|"]
    for name, value in (flags if isinstance(flags, dict) else {}).items():
        lines.append(f"| {name.replace('_', ' ')} | {'yes' if value else 'no'} |")
    unmeasured = submission.get("compliance_not_measured")
    for rule in unmeasured if isinstance(unmeasured, list) else []:
        lines.append(f"| {str(rule).replace('_', ' ')} | not measured |")
    return lines


# ----------------------------------------------------------------------------------------- verify


def verify(folder: Path, artifacts: Sequence[Path]) -> list[evidence.Finding]:
    """Findings on a folder; for a folder of ours also submission.json against its logs."""
    findings = evidence.examine(folder, artifacts)
    opened = evidence.open_folder(folder)
    ours = [run for run in opened.runs if "result" in run.files]
    if ours and len(ours) == len(opened.runs) and "sources" in opened.submission:
        words = {name: str(opened.submission.get(name) or "") for name in (*WORDS, "attribution")}
        words["technique_summary"] = str(opened.submission.get("technique_summary") or "")
        try:
            expected = build_submission(ours, words)
        except RecordError as error:
            return [*findings, evidence.Finding("contradiction", "logs", str(error))]
        for field in differences(expected, opened.submission):
            text = f"{field} is not what the logs give"
            findings.append(evidence.Finding("contradiction", "submission.json", text))
    return findings


def differences(expected: Mapping[str, Json], found: Mapping[str, Json]) -> list[str]:
    """Dotted names that differ between two trees; the track may be stricter than the logs'."""
    names = []
    for name in sorted({*expected, *found} - {"track"}):
        left, right = expected.get(name), found.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            names += [f"{name}.{below}" for below in differences(left, right)]
        elif left != right:
            names.append(name)
    return names


# ---------------------------------------------------------------------------------------- compare


class Side(NamedTuple):
    """Scores of one system by seed, and how its tokens relate to bytes of text."""

    name: str
    nats: dict[int, float]
    bpb: dict[int, float]
    bytes_per_token: float | None
    text_bytes: float | None  # raw bytes of the scored text where known, else of the decoded text


def load_side(spec: str, logs: Path) -> Side:
    """Scores of a records folder, a submission.json, or comma-separated runs or sweeps.

    Raises: RecordError when it holds no score with a seed.
    """
    path = Path(spec)
    if path.is_dir() and not (path / "ledger.jsonl").is_file():
        opened = evidence.open_folder(path)
        runs = [run for run in opened.runs if run.seed is not None and run.val_bpb is not None]
        side = _side_of_runs(path.name, runs) if runs else _side_of(path.name, opened.submission)
    elif path.name == "submission.json":
        side = _side_of(str(path), read_json(path))
    else:
        side = _side_of_runs(spec, load_runs(spec.split(","), logs)[0])
    if not side.bpb:
        raise RecordError(f"{spec}: no score with a seed")
    return side


def _side_of_runs(name: str, runs: Sequence[Run]) -> Side:
    """Scores of runs. Raises: RecordError for runs without seed or score."""
    nats, bpb = {}, {}
    for run in runs:
        if run.seed is None or run.val_bpb is None or run.val_loss is None:
            raise RecordError(f"{run.run_id}: no seed or no headline score")
        if run.seed in bpb:
            raise RecordError(f"{run.run_id}: seed {run.seed} is given twice")
        nats[run.seed], bpb[run.seed] = run.val_loss, run.val_bpb
    ratio, first = _bytes_per_token(nats, bpb), runs[0]
    size = first.number("data.val_raw_bytes") or first.number("data.val_bytes")
    return Side(name, nats, bpb, ratio, size)


def _side_of(name: str, submission: dict[str, Json]) -> Side:
    """Scores that a submission.json gives for its seeds."""
    nats, bpb = {}, {}
    for seed, fields in evidence.seed_results(submission).items():
        score = next(
            (n for f in evidence.SCORES if (n := as_number(fields.get(f))) is not None), None
        )
        loss = as_number(fields.get("val_loss"))
        if score is not None:
            bpb[seed] = score
        if loss is not None:
            nats[seed] = loss
    ratio = _bytes_per_token(nats, bpb)
    if ratio is None:
        score, loss = as_number(submission.get("val_bpb")), as_number(submission.get("val_loss"))
        ratio = loss / (score * math.log(2)) if score and loss else None
    return Side(name, nats, bpb, ratio, None)


def _bytes_per_token(nats: Mapping[int, float], bpb: Mapping[int, float]) -> float | None:
    """Bytes of text a scored token stands for, from seeds that have both scores."""
    ratios = [
        nats[seed] / (bpb[seed] * math.log(2)) for seed in bpb if seed in nats and bpb[seed] > 0
    ]
    return welch.mean(ratios) if ratios else None


def in_nats(side: Side, reference: Side, bytes_per_token: float | None) -> dict[int, float]:
    """Nats per token of the reference's tokenizer, so that tokenizers can be compared.

    Raises: RecordError if neither side says how many bytes a token stands for.
    """
    ratio = bytes_per_token or reference.bytes_per_token or side.bytes_per_token
    if ratio is None:
        raise RecordError(f"{reference.name}: bytes per token unknown, give --bytes-per-token")
    own = side.bytes_per_token
    if side.nats.keys() == side.bpb.keys() and own and abs(own / ratio - 1) < 1e-4:
        return dict(side.nats)
    return {seed: value * math.log(2) * ratio for seed, value in side.bpb.items()}


def compare(a: Side, b: Side, margin: float, level: float, ratio: float | None) -> list[str]:
    """Lines of the comparison "A is better than B". Raises: RecordError for different texts."""
    if a.text_bytes and b.text_bytes and abs(a.text_bytes / b.text_bytes - 1) > 1e-3:
        raise RecordError(
            f"different texts were scored: {a.text_bytes:,.0f} bytes and {b.text_bytes:,.0f} bytes"
        )
    nats_a, nats_b = in_nats(a, b, ratio), in_nats(b, b, ratio)
    lines = [_describe("A", a, nats_a), _describe("B", b, nats_b)]
    gain = welch.mean(list(nats_b.values())) - welch.mean(list(nats_a.values()))
    bits = welch.mean(list(b.bpb.values())) - welch.mean(list(a.bpb.values()))
    lines.append(f"gain of A over B: {gain:+.5f} nats per token, {bits:+.5f} BPB")
    common = sorted(nats_a.keys() & nats_b.keys())
    pairs = [nats_a[seed] for seed in common], [nats_b[seed] for seed in common]
    for bar in dict.fromkeys((0.0, margin)):
        sides = list(nats_a.values()), list(nats_b.values())
        lines.append(_test_line(f"Welch,  margin {bar:g}", welch.welch(*sides, bar)))
        if len(common) > 1:
            tag = f"paired, margin {bar:g}"
            lines.append(f"{_test_line(tag, welch.paired(*pairs, bar))} (seeds {common})")
        if len(nats_b) > 1:
            need = welch.seeds_needed(*sides, bar, level)
            lines.append(_need_line(f"seeds of A for p < {level:g}", need, len(nats_a)))
        if len(common) > 1:
            gains = [y - x for x, y in zip(*pairs, strict=True)]
            need = welch.pairs_needed(gains, bar, level)
            lines.append(_need_line(f"pairs for p < {level:g}", need, len(common)))
    final = welch.welch(list(nats_a.values()), list(nats_b.values()), margin)
    passed = final is not None and final.p < level
    verdict = "is shown" if passed else "is not shown"
    lines.append(f"a gain of more than {margin:g} nats per token {verdict} at p < {level:g}")
    return lines


def _describe(label: str, side: Side, nats: Mapping[int, float]) -> str:
    """One line about a side."""
    values, bits = list(nats.values()), list(side.bpb.values())
    spread = f" sd {welch.deviation(values):.5f}" if len(values) > 1 else ""
    seeds = ", ".join(str(seed) for seed in sorted(nats))
    return (
        f"{label}  {side.name}: {welch.mean(values):.5f}{spread} nats per token, "
        f"{welch.mean(bits):.5f} BPB, seeds {seeds}"
    )


def _test_line(name: str, result: welch.TestResult | None) -> str:
    """One test in one line."""
    if result is None:
        return f"  {name}: needs two seeds on each side"
    return f"  {name}: t = {result.t:.2f}, df = {result.degrees:.2f}, one-sided p = {result.p:.4g}"


def _need_line(what: str, need: int | None, have: int) -> str:
    """How many more are needed, if means and spreads stay as they are."""
    if need is None:
        return f"    {what}: no number suffices at this gain and spread"
    return f"    {what}: {need} in all, {max(0, need - have)} more"


# ------------------------------------------------------------------------------------ command line


def load_runs(names: Sequence[str], logs: Path) -> tuple[list[Run], tuple[int, ...]]:
    """Runs by id or path, and of folders of sweeps those that ended well; the sweeps' seeds.

    Raises: RunError for one that is not there.
    """
    runs: list[Run] = []
    seeds: list[int] = []
    for name in names:
        ledger = Path(name) / "ledger.jsonl"
        if not ledger.is_file():
            runs.append(load_run(name, logs))
            continue
        sweep = Ledger(ledger)
        seeds += sweep.seeds()
        runs += [load_run(path) for path in sweep.results()]
    return runs, tuple(seeds)


def words_from(options: argparse.Namespace, kept: Mapping[str, Json]) -> dict[str, str]:
    """Author, name and the like from the options, else those of `kept`."""
    words = {}
    for name in (*WORDS, "technique_summary", "attribution"):
        given, before = getattr(options, name), kept.get(name)
        words[name] = given if given is not None else (before if isinstance(before, str) else "")
    return words


def command_make(options: argparse.Namespace) -> int:
    """Build a records folder."""
    runs, seeds = load_runs(options.runs, options.logs)
    ours = REPOSITORY / "submission.json"
    before = read_json(ours) if ours.is_file() else {}
    # That tells of other runs: only who made it carries over.
    words = words_from(options, {name: before.get(name) for name in ("author", "github_id")})
    track = options.track or (runs[0].text("track") if runs else None) or "non_record"
    seeds += tuple(options.seeds)
    out = options.out or REPOSITORY / "records" / track
    folder = make(runs, Order(options.name, track, words, seeds, out, options.requirements))
    print(f"{folder}: {len(runs)} run(s), verified, program tried")
    return 0


def command_verify(options: argparse.Namespace) -> int:
    """Check one folder or several."""
    bad = 0
    for folder in options.folders:
        findings = verify(folder, options.artifact)
        worse = [finding for finding in findings if finding.kind != "note"]
        bad += bool(worse)
        for finding in findings:
            print(f"{folder.name}: {finding.kind}: {finding.where}: {finding.message}")
        print(f"{folder.name}: {'in order' if not worse else f'{len(worse)} finding(s)'}")
    return 1 if bad else 0


def command_compare(options: argparse.Namespace) -> int:
    """Compare two systems."""
    a, b = (load_side(spec, options.logs) for spec in (options.a, options.b))
    print("\n".join(compare(a, b, options.margin, options.level, options.bytes_per_token)))
    return 0


def command_submission(options: argparse.Namespace) -> int:
    """Write or check the submission.json of the repository."""
    names = options.runs
    if options.check and not names:
        listed = read_json(options.out).get("logs")
        names = [str(name) for name in listed] if isinstance(listed, list) else []
    runs, _ = load_runs(names, options.logs)
    kept = read_json(options.out) if options.out.is_file() else {}
    if str(kept.get("technique_summary")).startswith("PRESET="):
        del kept["technique_summary"]  # not by hand: these runs may have another
    content = build_submission(runs, words_from(options, kept))
    if options.check:
        found = read_json(options.out)
        stale = [name for name in {*content, *found} if content.get(name) != found.get(name)]
        refuse([f"{options.out}: {name} is not what the logs give" for name in sorted(stale)])
        print(f"{options.out}: as the logs say")
        return 0
    write_json(options.out, content)
    print(f"{options.out}: val_bpb {content['val_bpb']}, track {content['track']}")
    return 0


def level(text: str) -> float:
    """An argument that a p-value can be below, and above."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and below 1")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="record.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        """One sub-command with the options all of them have."""
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument(
            "--logs", type=Path, default=REPOSITORY / "logs", help="folder of runs"
        )
        return command

    made = add("make", command_make, "build a records folder from finished runs")
    made.add_argument("runs", nargs="+", metavar="RUN")
    made.add_argument(
        "--track", choices=(RECORD_TRACK, "non_record"), help="default: the runs' own"
    )
    made.add_argument("--seeds", type=integers, default=[], metavar="SEED,...",
                      help="seeds announced beforehand; all must be given: 42,314,999")
    made.add_argument("--out", type=Path, help="default: records/<track>")
    made.add_argument("--requirements", type=Path, default=REPOSITORY / "requirements.txt")
    _add_words(made, name_required=True)

    checked = add("verify", command_verify, "name every contradiction in a records folder")
    checked.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    checked.add_argument("--artifact", type=Path, action="append", default=[], metavar="PATH")

    compared = add("compare", command_compare, "test whether A beats B, in nats per token")
    compared.add_argument("a", metavar="A")
    compared.add_argument("b", metavar="B")
    compared.add_argument("--margin", type=float, default=welch.RECORD_MARGIN_NATS)
    compared.add_argument("--level", type=level, default=welch.RECORD_P, help="bar for p")
    compared.add_argument("--bytes-per-token", type=float)

    told = add("submission", command_submission, "write submission.json from the logs of runs")
    told.add_argument("runs", nargs="*", metavar="RUN")
    told.add_argument("--out", type=Path, default=REPOSITORY / "submission.json")
    told.add_argument("--check", action="store_true", help="fail if the file is out of date")
    _add_words(told, name_required=False)
    return top


def _add_words(command: argparse.ArgumentParser, *, name_required: bool) -> None:
    """Options for what no log can say."""
    command.add_argument("--name", required=name_required, help="title of the submission")
    command.add_argument("--author")
    command.add_argument("--github-id")
    command.add_argument("--blurb", help="what was done, in a sentence or two")
    command.add_argument("--technique-summary")
    command.add_argument("--attribution")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
