"""Finds what contradicts what in a records folder: README, submission.json, logs, programs, bytes.

`examine(folder)` works on our own folders, whose result files hold every number, and on published
ones, as far as their logs allow. It trusts the logs and questions everything that was written by
hand. A finding is a contradiction (two statements that cannot both hold), something missing, or a
note (cannot be decided from what is there).
"""

from __future__ import annotations

import ast
import bz2
import hashlib
import io
import math
import re
import tokenize
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import brotli

from tools.runs import (
    CAP_BYTES,
    LOG_SUFFIXES,
    NOT_A_RUN,
    PARTS,
    Json,
    Run,
    RunError,
    as_number,
    load_run,
    read_events,
    read_json,
    read_text,
    same_score,
    sha256_of,
    source_in_log,
)

Kind = Literal["contradiction", "missing", "note"]
BLANKS = {"", "-", "--", "---", "\u2013", "\u2014", "?", "tbd", "todo", "n/a", "na", "xx", "..."}
BUDGET_SECONDS = 600.0
RECORD_SEEDS = 3
MAX_PROGRAM_BYTES = 16 * 2**20
PROOFS = ("c1_causal", "c2_normalised", "c3_score_first", "c4_single_pass")
# Settings that say where and who, not how; they may differ between the seeds of one record.
PLACES = re.compile(
    r"^(?:seed|run_id|rank|local_rank|is_main_process|distributed|logfile|date|hostname|port"
    r"|.*_(?:dir|path|file|files)|log_.*)$"
)


class Finding(NamedTuple):
    """One result of the examination."""

    kind: Kind
    where: str
    message: str


@dataclass(slots=True)
class Folder:
    """What a records folder holds."""

    path: Path
    readme: str = ""
    submission: dict[str, Json] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    program: bytes = b""
    requirements: str = ""
    unreadable: list[Finding] = field(default_factory=list)

    def by_seed(self) -> dict[int, Run]:
        """Runs whose seed is known."""
        return {run.seed: run for run in self.runs if run.seed is not None}


class Claim(NamedTuple):
    """A field of one seed in submission.json, the run it speaks of, and what it should equal."""

    field: str
    value: float
    run: Run


# ------------------------------------------------------------------------------------- the folder


def open_folder(path: Path) -> Folder:
    """Everything readable in a folder. Raises: RunError if the folder does not exist."""
    if not path.is_dir():
        raise RunError(f"{path}: no such folder")
    folder = Folder(path)
    folder.readme = _text_of(path / "README.md")
    folder.requirements = _text_of(path / "requirements.txt")
    if (path / "train_gpt.py").is_file():
        folder.program = (path / "train_gpt.py").read_bytes()
    if (path / "submission.json").is_file():
        try:
            folder.submission = read_json(path / "submission.json")
        except RunError as error:
            folder.unreadable.append(Finding("contradiction", "submission.json", str(error)))
    for stem in _log_stems(path):
        try:
            run = load_run(stem)
        except RunError as error:
            folder.unreadable.append(Finding("contradiction", stem.name, str(error)))
            continue
        if run.evaluations or run.train or run.crashes or "result" in run.files:
            if run.seed is None:
                named = re.search(r"(?:seed|_s)[_-]?(\d+)", stem.name)
                run.facts |= {"seed": int(named[1])} if named else {}
            folder.runs.append(run)
    return folder


def _text_of(path: Path) -> str:
    """Text of a file, empty without one."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _log_stems(path: Path) -> list[Path]:
    """Paths without suffix of everything that may be a log, in the folder and its logs/."""
    stems = set()
    for place in (path, path / "logs"):
        files = sorted(place.iterdir()) if place.is_dir() else []
        for file in files:
            readable = file.suffix in (*LOG_SUFFIXES, ".json", ".jsonl") and file.is_file()
            aside = file.name.startswith((*NOT_A_RUN, "requirements", "README", "LICENSE"))
            if readable and not aside:
                stems.add(file.with_name(file.name.removesuffix(file.suffix)))
    return sorted(stems)


def examine(path: Path, artifacts: Sequence[Path] = ()) -> list[Finding]:
    """All findings on a folder, contradictions first. Raises: RunError if there is no folder."""
    folder = open_folder(path)
    findings = list(folder.unreadable)
    for check in CHECKS:
        findings += check(folder)
    findings += _check_artifacts(folder, artifacts)
    order: dict[Kind, int] = {"contradiction": 0, "missing": 1, "note": 2}
    return sorted(dict.fromkeys(findings), key=lambda finding: order[finding.kind])


# --------------------------------------------------------------------------------- files, blanks


def check_files(folder: Folder) -> Iterator[Finding]:
    """The files that a records folder must hold."""
    needed = {"README.md": folder.readme, "submission.json": folder.submission}
    for name, content in needed.items():
        if not content and not (folder.path / name).is_file():
            yield Finding("missing", name, "the folder does not hold it")
    if not folder.program:
        yield Finding("missing", "train_gpt.py", "the folder does not hold it, or it is empty")
    if not folder.runs:
        yield Finding("missing", "logs", "no log with a training step or a score")
    if not folder.requirements:
        yield Finding("note", "requirements.txt", "the folder does not hold it")
    for run in folder.runs:
        for problem in run.problems:
            yield Finding("note", _log_name(run), problem)


def check_blanks(folder: Folder) -> Iterator[Finding]:
    """Empty cells of README tables that belong to a seed, and empty fields of submission.json."""
    for seed, header, cell in _seed_cells(folder.readme):
        if _bare(cell).lower() in BLANKS:
            yield Finding("contradiction", "README.md", f"seed {seed}: {header!r} is blank")
    for name in _blank_fields(folder.submission):
        yield Finding("contradiction", "submission.json", f"{name} is blank")


def _blank_fields(tree: dict[str, Json], prefix: str = "") -> Iterator[str]:
    """Dotted names of fields that hold null, an empty text or an empty list."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _blank_fields(value, f"{prefix}{key}.")
        elif value is None or value == [] or (isinstance(value, str) and _bare(value) in BLANKS):
            yield f"{prefix}{key}"


def _bare(cell: str) -> str:
    """Cell text without Markdown emphasis and blanks."""
    return re.sub(r"[*_`~\s]", "", cell)


def _seed_cells(markdown: str) -> Iterator[tuple[int, str, str]]:
    """(seed, column header, cell) of every table row that begins with or has a seed column."""
    header: list[str] = []
    before: list[str] = []
    for line in markdown.splitlines():
        cells = [
            cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")
        ]
        if "|" not in line:
            header = before = []
            continue
        if set("".join(cells)) <= set("-: "):  # the rule under a header
            header = before
            continue
        before = cells
        column = next((i for i, name in enumerate(header) if "seed" in name.lower()), None)
        seed = _bare(cells[column]) if column is not None and column < len(cells) else ""
        if seed.isdigit():
            cells += [""] * (len(header) - len(cells))
            for i, name in enumerate(header):
                if i != column:
                    yield int(seed), _bare(name), cells[i]


# ---------------------------------------------------------------------------- numbers as printed


def spelled(value: float) -> str:
    """Number for a message: integers with separators, floats with up to eight decimals."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.8f}".rstrip("0")


def tolerance_of(text: str) -> float:
    """Half a unit of the last printed digit."""
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(0.5 * 10.0 ** (int(exponent or 0) - decimals)) * (1 + 1e-6)


def agrees(claim: float, truth: float, text: str | None = None) -> bool:
    """Whether a claim equals the truth as far as it is printed."""
    return abs(claim - truth) <= max(tolerance_of(text or repr(claim)), 1e-9 * abs(truth))


def cell_number(cell: str) -> tuple[float, str] | None:
    """Number of a table cell and its text without separators; None if it holds none."""
    match = re.search(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?", cell.replace("*", ""))
    if match is None:
        return None
    text = match[0].replace(",", "")
    return float(text), text


# ------------------------------------------------------------------------------------ the scores

# Field -> log key (the first of several that is there), factor from the key's unit to the field's.
SEED_FIELDS: dict[str, tuple[str, float]] = {
    "artifact_bytes": ("artifact.total_bytes", 1),
    "bytes_total": ("artifact.total_bytes", 1),
    "total_bytes": ("artifact.total_bytes", 1),
    "artifact_size_bytes": ("artifact.total_bytes", 1),
    "bytes_code": ("artifact.code_bytes", 1),
    "bytes_model": ("artifact.model_bytes", 1),
    "model_bytes": ("artifact.model_bytes", 1),
    "steps": ("train.steps", 1),
    "train_steps": ("train.steps", 1),
    "step_stop": ("train.steps", 1),
    "pre_quant_val_bpb": ("bpb.averaged", 1),
    "quantized_val_bpb": ("bpb.quantised", 1),
    "sliding_val_bpb": ("bpb.sliding", 1),
    "sliding_bpb": ("bpb.sliding", 1),
    "train_time_s": ("clocks.training_seconds|train.seconds", 1),
    "train_wallclock_ms": ("clocks.training_seconds|train.seconds", 1000),
    "target_tokens": ("data.val_targets", 1),
    "val_tokens": ("data.val_targets", 1),
}
SCORES = ("val_bpb", "mean_val_bpb", "mean_bpb", "bpb")
LOSSES = ("val_loss", "mean_val_loss", "mean_loss")
TOTALS = ("bytes_total", "artifact_bytes", "artifact_size_bytes", "total_bytes")


def seed_results(submission: dict[str, Json]) -> dict[int, dict[str, Json]]:
    """Per-seed fields of submission.json, whichever of the usual forms they have."""
    for name in ("seed_results", "seeds", "results", "per_seed"):
        table = submission.get(name)
        rows: dict[int, dict[str, Json]] = {}
        if isinstance(table, dict):
            for key, value in table.items():
                digits = re.sub(r"\D", "", str(key))
                if digits:
                    rows[int(digits)] = value if isinstance(value, dict) else {"val_bpb": value}
        elif isinstance(table, list):
            for row in table:
                seed = as_number(row.get("seed")) if isinstance(row, dict) else None
                if isinstance(row, dict) and seed is not None:
                    rows[int(seed)] = row
        if rows:
            return rows
    return {}


def claimed_seeds(submission: dict[str, Json]) -> set[int]:
    """Seeds that submission.json names, as a list or as keys of its per-seed results."""
    listed = submission.get("seeds")
    values = listed if isinstance(listed, list) else []
    return {int(n) for value in values if (n := as_number(value)) is not None} | set(
        seed_results(submission)
    )


def check_seed_fields(folder: Folder) -> Iterator[Finding]:
    """Every number that submission.json gives for a seed against that seed's log."""
    runs = folder.by_seed()
    for seed, fields in seed_results(folder.submission).items():
        run = runs.get(seed)
        if run is None:
            yield Finding("contradiction", "submission.json", f"seed {seed} has no log")
            continue
        for name, value in fields.items():
            number = as_number(value)
            if number is None:
                continue
            if name in SCORES or name in LOSSES:
                yield from _check_score(run, name, number)
            elif name in SEED_FIELDS:
                keys, factor = SEED_FIELDS[name]
                known = [run.number(key) for key in keys.split("|")]
                truth = next((value for value in known if value is not None), None)
                if truth is not None and not agrees(number, truth * factor):
                    yield _differs(f"seed {seed}: {name}", number, truth * factor, run)


def _differs(what: str, claim: float, truth: float, run: Run) -> Finding:
    """Finding for a number of submission.json that its log contradicts."""
    text = f"{what} is {spelled(claim)}, the log says {spelled(truth)} ({_log_name(run)})"
    return Finding("contradiction", "submission.json", text)


def _check_score(run: Run, name: str, claim: float) -> Iterator[Finding]:
    """A seed's score must be its log's last score; another evaluation's score is named."""
    is_bpb = name in SCORES
    truth = run.val_bpb if is_bpb else run.val_loss
    if truth is None or agrees(claim, truth):
        return
    others = [e.name for e in run.evaluations if _close(e.bpb if is_bpb else e.loss, claim)]
    hint = f"; it equals the log's {others[0]!r}" if others else ""
    base = _differs(f"seed {run.seed}: {name}", claim, truth, run)
    yield base._replace(message=f"{base.message}{hint}")


def _close(truth: float | None, claim: float) -> bool:
    """Whether a known truth agrees with a claim."""
    return truth is not None and agrees(claim, truth)


def check_means(folder: Folder) -> Iterator[Finding]:
    """Headline score and loss must be means over the seeds, bytes the largest (or the mean)."""
    scored = [run for run in folder.runs if run.val_bpb is not None]
    unseen = sorted(claimed_seeds(folder.submission) - {run.seed for run in scored})
    if unseen:
        yield Finding("missing", "logs", f"no log with a score for seed(s) {unseen}")
        return
    for names, key in ((SCORES, "val_bpb"), (LOSSES, "val_loss")):
        values = {run.seed: run.number(key) for run in scored}
        known = {seed: value for seed, value in values.items() if value is not None}
        claim_name = next((n for n in names if as_number(folder.submission.get(n)) is not None), "")
        claim = as_number(folder.submission.get(claim_name))
        if claim is not None and known:
            yield from _check_mean(claim_name, claim, known)
    sizes = {run.seed: size for run in scored if (size := run.number("artifact.total_bytes"))}
    for name in TOTALS:
        claim = as_number(folder.submission.get(name))
        if claim is None or not sizes:
            continue
        mean, most = sum(sizes.values()) / len(sizes), max(sizes.values())
        if not (agrees(claim, most) or abs(claim - mean) < 1):
            seeds = [str(seed) for seed, size in sizes.items() if size == claim]
            what = f"seed {seeds[0]}'s alone" if seeds else "no seed's"
            yield Finding(
                "contradiction",
                "submission.json",
                f"{name} is {claim:,.0f}, {what}: largest {most:,.0f}, mean {mean:,.0f}",
            )


def _check_mean(name: str, claim: float, known: dict[int | None, float]) -> Iterator[Finding]:
    """A claim that is no mean; where it is one seed's value, that seed is named."""
    mean = sum(known.values()) / len(known)
    if agrees(claim, mean):
        return
    seeds = [seed for seed, value in known.items() if agrees(claim, value)]
    what = f"that is seed {seeds[0]} alone" if seeds else "no seed has it"
    text = f"{name} is {spelled(claim)}, the mean of {len(known)} logs is {spelled(mean)}; {what}"
    yield Finding("contradiction", "submission.json", text)


def check_spread(folder: Folder) -> Iterator[Finding]:
    """The standard deviation over seeds: sample (n - 1) or population."""
    for name, key in (("val_bpb_std", "val_bpb"), ("val_loss_std", "val_loss")):
        claim = as_number(folder.submission.get(name))
        values = [value for run in folder.runs if (value := run.number(key)) is not None]
        if claim is None or len(values) < 2:
            continue
        mean = sum(values) / len(values)
        total = sum((value - mean) ** 2 for value in values)
        sample, population = (math.sqrt(total / n) for n in (len(values) - 1, len(values)))
        if not (agrees(claim, sample) or agrees(claim, population)):
            text = f"{name} is {claim:g}, the logs give {sample:.6f} (n - 1) or {population:.6f}"
            yield Finding("contradiction", "submission.json", text)


def check_readme(folder: Folder) -> Iterator[Finding]:
    """Numbers of README tables with a seed column against that seed's log."""
    runs = folder.by_seed()
    for seed, header, cell in _seed_cells(folder.readme):
        run, number = runs.get(seed), cell_number(cell)
        if run is None or number is None or _bare(cell).lower() in BLANKS:
            continue
        truths = _truths(run, header)
        claim, text = number
        if re.search(r"\d\s*(?:MB|M)\b", cell) or (truths and header.lower().endswith("(mb)")):
            truths = [truth / 1e6 for truth in truths]
        if truths and not any(agrees(claim, truth, text) for truth in truths):
            nearest = min(truths, key=lambda truth: abs(truth - claim))
            message = f"seed {seed}: {header} {text}, the log says {spelled(nearest)}"
            yield Finding("contradiction", "README.md", f"{message} ({_log_name(run)})")


def _truths(run: Run, header: str) -> list[float]:
    """Values of the log that a column may mean; empty where the log cannot tell."""
    name = header.lower()
    values: list[float | None] = []
    if "bpb" in name or "bpp" in name:
        values = [e.bpb for e in run.evaluations]
        values += [run.validation[-1].bpb] if run.validation else []
    elif "nats" in name or "loss" in name:
        values = [e.loss for e in run.evaluations]
        values += [run.validation[-1].loss] if run.validation else []
    elif any(word in name for word in ("bytes", "artifact", "size")):
        values = [run.number(f"artifact.{part}_bytes") for part in PARTS]
    elif "ms" not in name and "step" in name and "s/step" not in name:
        values = [run.number("train.steps")]
    return [value for value in values if value is not None]


# ------------------------------------------------------------------------------- bytes, programs


def check_bytes(folder: Folder) -> Iterator[Finding]:
    """Code counted, added up, and as large as the file that is shipped; nothing over the cap."""
    if folder.submission and as_number(folder.submission.get("bytes_code")) is None:
        counted = next((n for r in folder.runs if (n := r.number("artifact.code_bytes"))), None)
        hint = f"; the log counts {counted:,.0f}" if counted else ""
        yield Finding("contradiction", "submission.json", f"bytes_code is missing{hint}")
    claimed = as_number(folder.submission.get("bytes_code"))
    for run in folder.runs:
        code, model, total = (run.number(f"artifact.{part}_bytes") for part in PARTS)
        where = _log_name(run)
        if code and model and total and code + model != total:
            text = f"{code:,.0f} code + {model:,.0f} model is not {total:,.0f} total"
            yield Finding("contradiction", where, text)
        if total and total > CAP_BYTES:
            over = f"{total:,.0f} bytes, {total - CAP_BYTES:,.0f} over the cap"
            yield Finding("contradiction", where, over)
        if code and claimed and claimed != code:
            text = f"bytes_code is {claimed:,.0f}, {where} counts {code:,.0f}"
            yield Finding("contradiction", "submission.json", text)
        if code and folder.program and code != len(folder.program):
            text = f"{len(folder.program):,} bytes are shipped, {where} counts {code:,.0f}"
            yield Finding("contradiction", "train_gpt.py", text)


def check_pruning(folder: Folder) -> Iterator[Finding]:
    """Pruned values that README or submission.json claims must stand in a log."""
    logged = [run.number("quantisation.pruned_values") for run in folder.runs]
    if any(logged):
        return
    for line in folder.readme.splitlines():
        if re.search(r"prun", line, re.I) and not re.search(
            r"\b(?:no|zero|not|never|without|0)\b", line, re.I
        ):
            count = re.search(r"\d[\d,.]*\s*[kKM]?(?![\w.]*(?:MB|bpb|BPB))", line)
            if count and re.search(r"\d{2,}", count[0]):
                text = f"pruning is claimed but no log holds it: {line.strip()[:100]!r}"
                yield Finding("contradiction", "README.md", text)
                return


def check_program(folder: Folder) -> Iterator[Finding]:
    """The logs must come from the program that is shipped, and all from one program."""
    codes = {run.number("artifact.code_bytes"): run for run in folder.runs}
    codes.pop(None, None)
    if len(codes) > 1:
        text = ", ".join(f"{size:,.0f} ({_log_name(run)})" for size, run in codes.items() if size)
        yield Finding("contradiction", "logs", f"logs of different programs, code bytes: {text}")
    for run in folder.runs:
        yield from _check_source(folder, run)
    known = [run for run in folder.runs if run.table("config")]
    for run in known[1:]:
        differ = sorted(set(known[0].table("config")) ^ set(run.table("config")))
        if differ:
            text = f"settings exist here or in {_log_name(known[0])} only: {', '.join(differ)}"
            yield Finding("contradiction", _log_name(run), text)


def _check_source(folder: Folder, run: Run) -> Iterator[Finding]:
    """The program text in a log, if it carries one, against the shipped program and its hashes."""
    path = run.files.get("text")
    if path is None or not folder.program:
        return
    packed, shipped = run.text("packed_sha256"), hashlib.sha256(folder.program).hexdigest()
    if packed is not None and packed != shipped:
        text = f"packed_sha256 is {packed[:12]}, the shipped program's is {shipped[:12]}"
        yield Finding("contradiction", _log_name(run), text)
    wanted = run.text("source_sha256")
    source = source_in_log(path, wanted)
    if source is None:
        if wanted:
            text = f"no program text with source_sha256 {wanted[:12]} in the log"
            yield Finding("contradiction", _log_name(run), text)
        return
    same = same_program(source, folder.program)
    if same is False:
        text = "the program in the log is not the one that is shipped"
        yield Finding("contradiction", _log_name(run), text)
    elif same is None and packed is None:
        text = "the shipped program unpacks itself; only running it would show its source"
        yield Finding("note", "train_gpt.py", text)


def same_program(source: str, shipped: bytes) -> bool | None:
    """Whether a shipped file is this source up to docstrings and comments.

    None where it is a wrapper around compressed text: nothing is executed here to find out. Of our
    own packed programs the text is known, and must be what a packed run logged; a plain run's has
    other names inside functions.
    """
    inside = packed_source(shipped)
    if inside is not None:
        return True if inside == source else False if is_stripped(source) else None
    try:
        text = shipped.decode("utf-8") if shipped[:2] != b"PK" else _zipped(shipped)
        tree, wanted = ast.parse(text), ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    if _essence(tree) == _essence(wanted):
        return True
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    wrapped = any(isinstance(call, ast.Name) and call.id == "exec" for call in calls)
    return None if wrapped else False


def packed_source(program: bytes) -> str | None:
    """The text inside a program packed by train_gpt.py, now, when it stood inside the archive, or
    when it was brotli's instead of bz2's; None for any other file."""
    try:
        with zipfile.ZipFile(io.BytesIO(program)) as archive:
            packed = program if program.startswith(b"BZh") else archive.read("source")
        if not packed.startswith(b"BZh"):
            return str(_unbrotli(packed), "utf-8")
        unpacker = bz2.BZ2Decompressor()
        text = unpacker.decompress(packed, MAX_PROGRAM_BYTES)
        return str(text, "utf-8") if unpacker.eof else None
    except (KeyError, OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return None


def _unbrotli(packed: bytes) -> bytes:
    """What was compressed. Raises: ValueError if it is damaged or too large."""
    unpacker = brotli.Decompressor()
    try:
        text = bytes(unpacker.process(packed, output_buffer_limit=MAX_PROGRAM_BYTES))
    except brotli.error as error:
        raise ValueError(str(error)) from error
    if not unpacker.is_finished():
        raise ValueError("unfinished")
    return text


def _zipped(program: bytes) -> str:
    """Main module of a zipped program. Raises: ValueError if there is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(program)) as archive:
            info = archive.getinfo("__main__.py")
            if info.file_size > MAX_PROGRAM_BYTES:
                raise ValueError(f"__main__.py is {info.file_size:,} bytes")
            return archive.read(info).decode("utf-8")
    except (KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"not a packed program: {error}") from error


def _essence(tree: ast.Module) -> str:
    """Canonical text of a program without docstrings; the tree is changed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            constant = first.value if isinstance(first, ast.Expr) else None
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def is_stripped(source: str) -> bool:
    """Whether a program has neither comments nor docstrings, like one that ran packed."""
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return False
    before = ast.unparse(tree)
    comments = any(token.type == tokenize.COMMENT for token in tokens)
    return not comments and _essence(tree) == before


def check_settings(folder: Folder) -> Iterator[Finding]:
    """One method for all seeds: equal settings, hashes, data and world size."""
    with_config = [run for run in folder.runs if run.table("config")]
    for run in with_config[1:]:
        first, here = with_config[0].table("config"), run.table("config")
        for name in sorted(set(first) & set(here)):
            if first[name] != here[name] and not PLACES.match(name):
                text = f"{name} is {here[name]}, in {_log_name(with_config[0])} it is {first[name]}"
                yield Finding("contradiction", _log_name(run), text)
    for key in ONE_VALUE:
        values = {str(value): run for run in folder.runs if (value := run.get(key)) is not None}
        if len(values) > 1:
            text = ", ".join(f"{value[:24]} ({_log_name(run)})" for value, run in values.items())
            yield Finding("contradiction", "logs", f"{key} differs between runs: {text}")
    seeds = [run.seed for run in folder.runs if run.seed is not None]
    for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        yield Finding("contradiction", "logs", f"seed {seed} has {seeds.count(seed)} logs")


ONE_VALUE = (
    "config_hash",
    "packed_sha256",
    "world_size",
    "headline",
    "data.fingerprint",
    "data.tokenizer_sha256",
    "data.train_shards",
    "data.val_targets",
    "hardware.gpu",
)


# --------------------------------------------------------------------------------- crash, budget


def check_crashes(folder: Folder) -> Iterator[Finding]:
    """Processes that died, before or after the score."""
    for run in folder.runs:
        for crash in run.crashes[:1]:
            when = "after" if crash.after_score else "before"
            text = f"a rank crashed {when} the score, line {crash.line}: {crash.text[:90]}"
            yield Finding("contradiction", _log_name(run), text)
        if "result" in run.files and run.text("status") != "complete":
            text = f"status is {run.text('status')}: {run.text('exit_reason')}"
            yield Finding("contradiction", _log_name(run), text)


def check_compliance(folder: Folder) -> Iterator[Finding]:
    """Compliance flags that the logs contradict."""
    flags = folder.submission.get("compliance")
    if not isinstance(flags, dict):
        return
    for name, value in flags.items():
        if value is True and name in FLAGS:
            for text in FLAGS[name](folder):
                yield Finding("contradiction", "submission.json", f"compliance.{name}: {text}")


def _over_training(folder: Folder) -> Iterator[str]:
    """Runs whose training data was still read after the budget."""
    for run in folder.runs:
        seconds, hessians = run.number("clocks.training_seconds"), 0.0
        if seconds is None:  # other programs stop their clock before calibration
            seconds = run.number("train.seconds")
            hessians = run.number("quantisation.seconds_hessians") or 0.0
        if seconds is not None and seconds + hessians > BUDGET_SECONDS + 0.05:
            parts = f" ({seconds:.1f} s of steps + {hessians:.1f} s of calibration)"
            yield f"seed {run.seed}: {seconds + hessians:.1f} s{parts if hessians else ''}"


def _over_evaluation(folder: Folder) -> Iterator[str]:
    """Runs whose headline evaluation took longer than the budget."""
    for run in folder.runs:
        strict = run.number("clocks.eval_seconds_strict")
        last = run.evaluation(run.headline or "")
        seconds = strict if strict is not None else (last.seconds if last else None)
        if seconds is not None and seconds > BUDGET_SECONDS:
            yield f"seed {run.seed}: {seconds:.1f} s"


def _over_size(folder: Folder) -> Iterator[str]:
    """Runs over the byte cap."""
    for run in folder.runs:
        total = run.number("artifact.total_bytes")
        if total is not None and total > CAP_BYTES:
            yield f"seed {run.seed}: {total:,.0f} bytes"


def _too_few_seeds(folder: Folder) -> Iterator[str]:
    """Fewer logs with a score than three."""
    count = len({run.seed for run in folder.runs if run.val_bpb is not None})
    if count < RECORD_SEEDS:
        yield f"{count} log(s) with a score"


FLAGS: dict[str, Callable[[Folder], Iterator[str]]] = {
    "train_under_600s": _over_training,
    "eval_under_600s": _over_evaluation,
    "artifact_under_16mb": _over_size,
    "three_seeds": _too_few_seeds,
}


def check_environment(folder: Folder) -> Iterator[Finding]:
    """Hardware and torch version as claimed, pinned and logged."""
    claim = folder.submission.get("hardware")
    counts = re.match(r"\s*(\d+)\s*x", claim) if isinstance(claim, str) else None
    torch = folder.submission.get("pytorch_version")
    pin = re.search(r"^torch==([\w.+]+)", folder.requirements, re.M)
    if isinstance(torch, str) and pin and pin[1].split("+")[0] != torch.split("+")[0]:
        text = f"pins torch {pin[1]}, submission.json says {torch}"
        yield Finding("contradiction", "requirements.txt", text)
    for run in folder.runs:
        world, logged, gpu = run.number("world_size"), run.text("versions.torch"), None
        if counts and world and int(counts[1]) != int(world) and run.text("hardware.gpu") != "none":
            text = f"hardware is {claim!r}, {_log_name(run)} ran on {world:.0f} process(es)"
            yield Finding("contradiction", "submission.json", text)
        gpu = run.text("hardware.gpu")
        model = re.search(r"[A-Z]+\d{2,4}", gpu) if gpu else None
        if model and isinstance(claim, str) and model[0] not in claim:
            text = f"hardware is {claim!r}, {_log_name(run)} ran on {gpu}"
            yield Finding("contradiction", "submission.json", text)
        if isinstance(torch, str) and logged and torch.split("+")[0] != logged.split("+")[0]:
            text = f"pytorch_version is {torch}, {_log_name(run)} says {logged}"
            yield Finding("contradiction", "submission.json", text)


# ------------------------------------------------------------------------------- our result files


def check_results(folder: Folder) -> Iterator[Finding]:
    """A result file against itself, its events and its text log."""
    for run in folder.runs:
        if "result" not in run.files:
            continue
        where = _log_name(run)
        for message in [*result_contradictions(run), *_other_files(run)]:
            yield Finding("contradiction", where, message)
        audit = run.table("audit")
        for proof in PROOFS:
            if proof not in audit:
                yield Finding("missing", where, f"audit.{proof}: the run was not audited for it")


def result_contradictions(run: Run) -> Iterator[str]:
    """Numbers of one result file that cannot all hold."""
    headline = run.headline or ""
    for key, section in (("val_bpb", "bpb"), ("val_loss", "nats")):
        claim, truth = run.number(key), as_number(run.table(section).get(headline))
        if claim is None or truth is None or abs(claim - truth) > 1e-9:
            yield f"{key} is {claim}, {section}.{headline} is {truth}"
    targets, size = run.number("data.val_targets"), run.number("data.val_bytes")
    for item in run.evaluations:
        if item.bpb is not None and item.loss is not None and targets and size:
            bpb = item.loss * targets / (math.log(2) * size)
            if abs(bpb - item.bpb) > 1e-6:
                yield f"bpb.{item.name} is {item.bpb}, nats over {size:,.0f} bytes are {bpb:.8f}"
    code, model, total = (run.number(f"artifact.{part}_bytes") for part in PARTS)
    if code and model and total and code + model != total:
        yield f"artifact: {code:,.0f} code + {model:,.0f} model is not {total:,.0f}"
    cap = run.number("artifact.cap_bytes")
    if cap and total and total > cap:
        yield f"artifact: {total:,.0f} bytes are over the cap of {cap:,.0f}"
    for stage, clock in (("training", "training_seconds"), ("evaluation", "eval_seconds_strict")):
        prefix = "clocks." + clock.partition("_")[0]
        took, budget = run.number(f"clocks.{clock}"), run.number(f"{prefix}_budget_seconds")
        if took and budget and took > budget:
            yield f"{stage} took {took:.1f} s of {budget:.1f} s"
    yield from audit_contradictions(run)


def audit_contradictions(run: Run) -> Iterator[str]:
    """Proofs that failed, and targets that no evaluation or more than one covered."""
    for proof, entry in run.table("audit").items():
        if isinstance(entry, dict) and entry.get("passed") is not True:
            yield f"audit.{proof} did not pass: worst {entry.get('worst')}"
    targets = run.number("data.val_targets")
    checked = run.number("audit.c4_single_pass.checked")
    # Every evaluation of the artifact covers all targets once.
    evaluations = len(run.table("bpb").keys() - {"raw", "averaged"})
    if checked is not None and targets is not None and checked != evaluations * targets:
        yield (f"audit.c4_single_pass covers {checked:,.0f} of {targets:,.0f} targets in "
               f"{evaluations} evaluations")


def _other_files(run: Run) -> Iterator[str]:
    """Scores in the events and the text log that differ from the result file's."""
    readers: tuple[tuple[str, Callable[[Path], Run]], ...] = (
        ("events", read_events),
        ("text", read_text),
    )
    for kind, reader in readers:
        if kind not in run.files:
            yield f"no {kind} log beside the result file"
            continue
        for item in reader(run.files[kind]).evaluations:
            if not any(same_score(item, mine) for mine in run.evaluations):
                named = run.evaluation(item.name)
                mine = "absent" if named is None else named.bpb
                yield f"bpb.{item.name} is {mine}, the {kind} log says {item.bpb}"


def _check_artifacts(folder: Folder, artifacts: Sequence[Path]) -> Iterator[Finding]:
    """Artifact files against the hashes and sizes in the folder."""
    known = {run.text("artifact.sha256"): run for run in folder.runs}
    for fields in seed_results(folder.submission).values():
        value = fields.get("artifact_sha256")
        if isinstance(value, str) and value not in known:
            text = f"artifact_sha256 {value[:12]} is in no log"
            yield Finding("contradiction", "submission.json", text)
    for path in artifacts:
        if not path.is_file():
            yield Finding("missing", str(path), "no such artifact")
            continue
        run = known.get(sha256_of(path))
        if run is None:
            text = f"sha256 {sha256_of(path)[:12]} ({path.stat().st_size:,} bytes) is in no log"
            yield Finding("contradiction", str(path), text)
        elif run.number("artifact.model_bytes") != path.stat().st_size:
            logged = run.number("artifact.model_bytes") or 0
            text = f"{path.stat().st_size:,} bytes, {_log_name(run)} says {logged:,.0f}"
            yield Finding("contradiction", str(path), text)


def _log_name(run: Run) -> str:
    """File name by which a run is called in findings."""
    for kind in ("result", "text", "events"):
        if kind in run.files:
            return run.files[kind].name
    return run.run_id


CHECKS: tuple[Callable[[Folder], Iterator[Finding]], ...] = (
    check_files,
    check_blanks,
    check_seed_fields,
    check_means,
    check_spread,
    check_readme,
    check_bytes,
    check_pruning,
    check_program,
    check_settings,
    check_crashes,
    check_compliance,
    check_environment,
    check_results,
)
